//! Every way to name a core (rows T4–T9), in virtual time: flows stay whole and on one core, whoever chooses it.
#![allow(clippy::unwrap_used, reason = "tests")]

use sim::inner::tcp::TcpSpec;
use sim::inner::udp::UdpSpec;
use sim::link::Shape;
use sim::scenario::pair;
use sim::world::World;
use steering::policy::Policy;
use tunnel::mode::SteeringMode;

const CORES: u8 = 4;
const FLOWS: usize = 24;

fn joined(mode: SteeringMode, policy: Policy, links: &[Shape], seed: u64) -> World {
    joined_from(3, mode, policy, links, seed)
}

/// With so many cores at site 0.
fn joined_from(cores: u8, mode: SteeringMode, policy: Policy, links: &[Shape], seed: u64) -> World {
    let mut world = pair(sim::seed(seed), (cores, CORES), links);
    for site in &mut world.sites {
        for peer in &mut site.snapshot.peers {
            peer.steering.receive = mode;
            peer.policy = policy;
        }
    }
    world.start();
    let up =
        world.run_until_true(2_000, |world| (0..2).all(|site| world.sites[site].paths_up(0) == links.len()));
    assert!(up, "paths do not come up");
    world.run_ms(300);
    world
}

fn two() -> Vec<Shape> {
    vec![Shape::new(50.0, 10.0), Shape::new(50.0, 35.0)]
}

/// Flows from site 0 to site 1 for `ms`, 100 kB/s each: too much to count as sparse and overtake others.
fn flows(world: &mut World, ms: u64) -> Vec<usize> {
    let start = world.now;
    (0..FLOWS)
        .map(|n| {
            let every_ns = 9_000_000 + 7_000 * n as u64;
            let (start, stop) = (start.plus_ms(20 * n as u64), start.plus_ms(ms));
            world.udp(0, 1, UdpSpec { packet_bytes: 900, every_ns, burst: 1, start, stop })
        })
        .collect()
}

fn disordered(world: &World, flows: &[usize]) -> u64 {
    flows.iter().map(|flow| world.udp_stats(*flow).disordered).sum()
}

fn modes() -> impl Iterator<Item = (SteeringMode, Policy)> {
    SteeringMode::ALL.into_iter().flat_map(|mode| Policy::ALL.into_iter().map(move |policy| (mode, policy)))
}

#[test]
fn t4_to_t9_flows_are_whole_in_order_and_on_one_core() {
    for (number, (mode, policy)) in modes().enumerate() {
        let mut world = joined(mode, policy, &two(), 4_400 + number as u64);
        let flows = flows(&mut world, 2_500);
        let start = world.now;
        world.tcp(1, 0, TcpSpec { hystart: true, start, stop: start.plus_ms(2_000), bytes: 1_000_000 });
        world.run_ms(1_200);
        let before = disordered(&world, &flows);
        world.run_ms(2_500);
        world.check().unwrap();
        assert_eq!(disordered(&world, &flows), before, "{mode} {policy}");
        let mut cores = std::collections::BTreeSet::new();
        for flow in &flows {
            assert_eq!(
                world.udp_missing(*flow),
                Vec::<u64>::new(),
                "{mode} {policy}: flow {flow} lost packets"
            );
            let (core, changed) = world.delivering_core(1, *flow).unwrap();
            assert_eq!(changed, 0, "{mode} {policy}: flow {flow} is on several cores");
            cores.insert(core);
        }
        let expected = if mode == SteeringMode::PerTunnel { 1 } else { usize::from(CORES) };
        assert_eq!(cores.len(), expected, "{mode} {policy}: {cores:?}");
    }
}

#[test]
fn t4_to_t9_a_drained_core_loses_nothing_in_any_mode() {
    for (number, (mode, policy)) in modes().enumerate() {
        let mut world = joined(mode, policy, &two(), 4_500 + number as u64);
        let flows = flows(&mut world, 3_000);
        world.run_ms(1_500);
        world.sites[1].move_buckets(|bucket| (bucket % 3) as u16);
        world.run_ms(400);
        for flow in &flows {
            let (core, _) = world.delivering_core(1, *flow).unwrap();
            assert!(core != 3, "{mode} {policy}: flow {flow} is still at the drained core");
        }
        world.run_ms(2_500);
        world.check().unwrap();
        for flow in &flows {
            assert_eq!(
                world.udp_missing(*flow),
                Vec::<u64>::new(),
                "{mode} {policy}: flow {flow} lost packets"
            );
            let (_, changed) = world.delivering_core(1, *flow).unwrap();
            assert!(changed <= 1, "{mode} {policy}: flow {flow} changed its core {changed} times");
        }
    }
}

/// How many of the flows of one sending core come to each core, and to which each comes.
fn spread(policy: Policy) -> ([usize; CORES as usize], Vec<u8>) {
    let mut world = joined_from(1, SteeringMode::CoreId, policy, &two(), 4_600);
    let flows = flows(&mut world, 1_000);
    world.run_ms(1_500);
    let cores: Vec<u8> = flows.iter().map(|flow| world.delivering_core(1, *flow).unwrap().0).collect();
    let mut counts = [0; CORES as usize];
    cores.iter().for_each(|core| counts[usize::from(*core)] += 1);
    (counts, cores)
}

#[test]
fn t4_policies_choose_as_their_names_say() {
    let (counts, by_hash) = spread(Policy::Hash);
    let even = [FLOWS / usize::from(CORES); CORES as usize];
    assert_ne!(counts, even, "the hash must not look like taking turns here: choose another seed");
    assert_eq!(spread(Policy::Hash).1, by_hash, "the same flows, the same cores");
    assert_eq!(spread(Policy::RoundRobin).0, even);
    // Flows of one rate.
    assert_eq!(spread(Policy::LeastLoaded).0, even);
    let (counts, by_chance) = spread(Policy::Random);
    assert_ne!(counts, even);
    let differ = by_hash.iter().zip(&by_chance).filter(|(hash, chance)| hash != chance).count();
    assert!(differ > FLOWS / 2, "{differ} of {FLOWS} flows are where the hash does not have them");
}
