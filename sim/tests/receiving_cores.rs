//! Flows whose receiving core changes (rows T3, T4): drained, rebalanced and hung cores of the peer.
#![allow(clippy::unwrap_used, reason = "tests")]

use sim::inner::udp::UdpSpec;
use sim::link::Shape;
use sim::scenario::pair;
use sim::world::World;

const CORES: u8 = 4;
const FLOWS: usize = 48;

fn joined(links: &[Shape], seed: u64) -> World {
    let mut world = pair(sim::seed(seed), (CORES, CORES), links);
    world.start();
    let up =
        world.run_until_true(2_000, |world| (0..2).all(|site| world.sites[site].paths_up(0) == links.len()));
    assert!(up, "paths do not come up");
    world.run_ms(300);
    world
}

/// Many flows from site 0 to site 1, for `ms`: each with 100 kB/s, too much to count as sparse and overtake others. They
/// begin one after the other within a second, so that the paths' rates can follow.
fn flows(world: &mut World, ms: u64) -> Vec<usize> {
    let start = world.now;
    (0..FLOWS)
        .map(|n| {
            let every_ns = 9_000_000 + 7_000 * n as u64;
            let (start, stop) = (start.plus_ms(20 * n as u64), start.plus_ms(ms));
            let spec = UdpSpec { packet_bytes: 900, every_ns, burst: 1, start, stop };
            world.udp(0, 1, spec)
        })
        .collect()
}

/// Site 1's table changes while one of its cores is busy with something else for 35 ms: what that was sent waits.
fn move_buckets_of_busy(world: &mut World, busy: u8, owner: impl Fn(usize) -> u16) {
    world.sites[1].hang(busy, true);
    world.run_ms(20);
    world.sites[1].move_buckets(owner);
    world.run_ms(15);
    world.sites[1].hang(busy, false);
}

/// Packets that came after a later one. A flow's first packets are sparse and may be overtaken by the next.
fn disordered(world: &World, flows: &[usize]) -> u64 {
    flows.iter().map(|flow| world.udp_stats(*flow).disordered).sum()
}

/// Every packet came once; each flow changed its core `changes` times at most.
fn complete(world: &World, flows: &[usize], changes: u32) {
    world.check().unwrap();
    for flow in flows {
        let stats = world.udp_stats(*flow);
        assert!(stats.sent > 100);
        assert_eq!(world.udp_missing(*flow), Vec::<u64>::new(), "flow {flow} lost packets");
        let (_, changed) = world.delivering_core(1, *flow).unwrap();
        assert!(changed <= changes, "flow {flow} changed its core {changed} times");
    }
}

fn moved(world: &World, flows: &[usize]) -> usize {
    flows.iter().filter(|flow| world.delivering_core(1, **flow).unwrap().1 > 0).count()
}

fn two() -> Vec<Shape> {
    vec![Shape::new(50.0, 10.0), Shape::new(50.0, 35.0)]
}

#[test]
fn flows_that_stay_are_in_order_by_themselves() {
    let mut world = joined(&two(), 3_300);
    let flows = flows(&mut world, 4_000);
    world.run_ms(1_500);
    let before = disordered(&world, &flows);
    world.run_ms(3_500);
    assert_eq!(disordered(&world, &flows), before);
    complete(&world, &flows, 0);
}

#[test]
fn t3_a_drained_core_of_the_peer_loses_and_reorders_nothing() {
    let cases = [
        vec![Shape::new(100.0, 15.0)],
        two(),
        vec![Shape::new(50.0, 5.0).jitter(3_000, true), Shape::new(50.0, 40.0)],
    ];
    for (case, links) in cases.into_iter().enumerate() {
        let mut world = joined(&links, 3_310 + case as u64);
        let flows = flows(&mut world, 4_000);
        world.run_ms(1_500);
        let before = disordered(&world, &flows);
        move_buckets_of_busy(&mut world, 3, |bucket| (bucket % 3) as u16);
        world.run_ms(250);
        for flow in &flows {
            assert!(
                world.delivering_core(1, *flow).unwrap().0 != 3,
                "flow {flow} is still at the drained core"
            );
        }
        world.run_ms(3_000);
        assert_eq!(disordered(&world, &flows), before, "case {case}");
        complete(&world, &flows, 1);
        assert!(moved(&world, &flows) > FLOWS / 2);
        let waited_ms =
            flows.iter().map(|flow| world.udp_stats(*flow).delay_ns_max / 1_000_000).max().unwrap();
        eprintln!("case {case}: a packet took {waited_ms} ms at most");
        assert!(waited_ms < 250, "case {case}: a packet took {waited_ms} ms");
    }
}

#[test]
fn t3_tables_that_change_again_and_again_lose_and_reorder_nothing() {
    let mut world = joined(&two(), 3_320);
    let flows = flows(&mut world, 4_000);
    world.run_ms(1_500);
    let before = disordered(&world, &flows);
    for turn in 0..12 {
        world.run_ms(if turn % 3 == 0 { 5 } else { 210 });
        move_buckets_of_busy(&mut world, (turn % 4) as u8, |bucket| ((bucket + turn) % 4) as u16);
    }
    world.run_ms(3_000);
    assert_eq!(disordered(&world, &flows), before);
    complete(&world, &flows, 12);
}

#[test]
fn t3_moves_under_loss_keep_the_order_that_there_is() {
    let links = [Shape::new(50.0, 10.0).loss(0.01), Shape::new(50.0, 20.0).loss(0.01)];
    let mut world = joined(&links, 3_330);
    let flows = flows(&mut world, 4_000);
    world.run_ms(1_500);
    let before = disordered(&world, &flows);
    move_buckets_of_busy(&mut world, 2, |bucket| ((bucket + 1) % 4) as u16);
    world.run_ms(4_000);
    world.check().unwrap();
    // Two losses in a row of one packet cost order with or without a move.
    let late = disordered(&world, &flows) - before;
    assert!(late <= 3, "{late} packets came late");
    assert!(moved(&world, &flows) > FLOWS / 2);
}

#[test]
fn t4_flows_of_every_policy_leave_a_core_that_may_not_be_used_any_more() {
    use steering::policy::Policy;
    for policy in [Policy::RoundRobin, Policy::Random, Policy::LeastLoaded] {
        let mut world = pair(sim::seed(3_340), (CORES, CORES), &two());
        world.sites[1].peer_mut("site0").unwrap().policy = policy;
        world.start();
        world.run_ms(1_500);
        let flows = flows(&mut world, 3_500);
        world.run_ms(1_500);
        assert!(flows.iter().any(|flow| world.delivering_core(1, *flow).unwrap().0 == 3), "{policy}");
        let before = disordered(&world, &flows);
        move_buckets_of_busy(&mut world, 3, |bucket| (bucket % 3) as u16);
        // Busy once more as soon as it has reported: nothing may be under way to it any more.
        world.run_ms(2);
        world.sites[1].hang(3, true);
        world.run_ms(40);
        world.sites[1].hang(3, false);
        world.run_ms(3_000);
        assert_eq!(disordered(&world, &flows), before, "{policy}");
        complete(&world, &flows, 1);
        let moved = moved(&world, &flows);
        assert!((1..FLOWS / 2).contains(&moved), "{policy}: {moved} flows moved, only core 3's should");
        assert!(flows.iter().all(|flow| world.delivering_core(1, *flow).unwrap().0 != 3), "{policy}");
    }
}

#[test]
fn t3_a_core_of_the_peer_that_hangs_harms_no_other_and_its_flows_leave_it() {
    for (case, links) in [vec![Shape::new(100.0, 15.0)], two()].into_iter().enumerate() {
        let mut world = joined(&links, 3_350 + case as u64);
        let flows = flows(&mut world, 4_000);
        world.run_ms(1_500);
        let before = disordered(&world, &flows);
        let on = |world: &World, core| -> Vec<usize> {
            let at = |flow: &&usize| world.delivering_core(1, **flow).unwrap().0 == core;
            flows.iter().filter(at).copied().collect()
        };
        let (hung, others) = (on(&world, 1), [0, 2, 3].map(|core| on(&world, core)).concat());
        assert!(hung.len() > 5 && others.len() > 20);
        world.sites[1].hang(1, true);
        // Nothing is told for a while: no path may look dead for it, at neither end.
        for _ in 0..400 {
            world.run_ms(1);
            for site in 0..2 {
                assert_eq!(world.sites[site].paths_up(0), links.len(), "a path is blamed for a core");
            }
        }
        world.sites[1].move_buckets(|bucket| [0, 2, 3][bucket % 3]);
        let told = world.now;
        for flow in &hung {
            world.reset_gap(*flow);
        }
        let elsewhere = world.run_until_true(400, |world| {
            hung.iter().all(|flow| world.delivering_core(1, *flow).unwrap().0 != 1)
        });
        assert!(elsewhere, "flows of the hung core are still not delivered after 400 ms");
        let took_ms = world.now.since(told) / 1_000_000;
        assert!(took_ms < 120, "{took_ms} ms: the hung core was waited for");
        world.run_ms(3_000);
        complete(&world, &others, 1);
        for flow in &hung {
            // What the hung core had not reported is the inner protocol's; from then on nothing is missing.
            let missing = world.udp_missing(*flow);
            let stats = world.udp_stats(*flow);
            assert!(missing.windows(2).all(|two| two[1] == two[0] + 1), "flow {flow}: {missing:?}");
            assert_eq!(stats.repeated, 0);
        }
        assert_eq!(disordered(&world, &flows), before);
    }
}

/// Two flows that share no core at either end: one of large packets to core 1 of site 1, one of small packets.
fn two_apart(links: &[Shape]) -> (World, [usize; 2]) {
    for seed in 0..64 {
        let mut world = pair(sim::seed(3_360) + seed, (2, 2), links);
        world.start();
        world.run_ms(1_500);
        let start = world.now;
        let spec =
            UdpSpec { packet_bytes: 1_350, every_ns: 6_000_000, burst: 1, start, stop: start.plus_ms(3_000) };
        let flows = [spec, UdpSpec { packet_bytes: 60, ..spec }].map(|spec| world.udp(0, 1, spec));
        world.run_ms(500);
        let sending = flows.map(|flow| world.sending_core(0, flow).unwrap());
        let receiving = flows.map(|flow| world.delivering_core(1, flow).unwrap().0);
        if sending[0] != sending[1] && receiving == [1, 0] {
            return (world, flows);
        }
    }
    panic!("no such flows");
}

#[test]
fn t3_a_core_that_sends_only_to_one_that_hangs_blames_no_path() {
    for links in [vec![Shape::new(100.0, 15.0)], two()] {
        let (mut world, [hung, other]) = two_apart(&links);
        world.sites[1].hang(1, true);
        for ms in 0..400 {
            world.run_ms(1);
            assert_eq!(world.sites[0].paths_up(0), links.len(), "after {ms} ms a path is blamed for a core");
        }
        world.sites[1].hang(1, false);
        world.run_ms(3_000);
        world.check().unwrap();
        assert_eq!(world.udp_missing(other), Vec::<u64>::new());
        assert_eq!(world.udp_missing(hung), Vec::<u64>::new(), "what waited for the core is still its");
    }
}

#[test]
fn t3_a_path_over_which_nothing_large_passes_is_not_excused_by_a_silent_core() {
    let (mut world, [large, _]) = two_apart(&[Shape::new(100.0, 15.0).mtu(1_500)]);
    let measured = |world: &World| world.sites[0].bond(0).unwrap().paths.load()[0].datagram_bytes();
    assert!(measured(&world) > 1_300);
    world.cables[0].links[0].set_mtu(1_300);
    let noticed = world.run_until_true(600, |world| measured(world) < 1_300);
    assert!(noticed, "the MTU is not measured anew");
    let before = world.udp_stats(large).received;
    world.run_ms(500);
    assert!(world.udp_stats(large).received > before + 30, "the flow goes on in smaller datagrams");
}

#[test]
fn an_idle_bond_stays_up_while_the_core_that_would_answer_hangs() {
    for core in 0..2 {
        let mut world = pair(sim::seed(3_370), (2, 2), &two());
        world.start();
        world.run_ms(1_500);
        world.sites[1].hang(core, true);
        for _ in 0..1_000 {
            world.run_ms(10);
            assert_eq!((world.sites[0].paths_up(0), world.sites[1].paths_up(0)), (2, 2), "core {core}");
        }
        // A path that comes back is asked by pings that another core answers.
        world.cables[1].cut(true);
        world.run_ms(5_000);
        assert_eq!(world.sites[0].paths_up(0), 1);
        world.cables[1].cut(false);
        let back = world.run_until_true(4_000, |world| (0..2).all(|site| world.sites[site].paths_up(0) == 2));
        assert!(back, "core {core}");
    }
}

/// Whether site 0 has site 1's table.
fn is_told(world: &World) -> bool {
    let bond = world.sites[0].bond(0).unwrap();
    let era = bond.cores.load().as_ref().unwrap().info.table.era();
    era == world.sites[1].node.ownership.load().table.era()
}

#[test]
fn t3_a_new_table_is_told_within_10_ms_by_whichever_core_works() {
    // Links of 10 and 15 ms.
    for hung in [None, Some(0), Some(1), Some(2), Some(3)] {
        let mut world = joined(&[Shape::new(50.0, 10.0), Shape::new(50.0, 15.0)], 3_380);
        let flows = flows(&mut world, 2_000);
        world.run_ms(1_200);
        if let Some(core) = hung {
            world.sites[1].hang(core, true);
            world.run_ms(100);
        }
        world.sites[1].move_buckets(|bucket| ((bucket + 1) % 4) as u16);
        let told = world.run_until_true(20, is_told);
        assert!(told, "core {hung:?} hangs: not told after 10 ms and a delay of 10 ms");
        if let Some(core) = hung {
            world.sites[1].hang(core, false);
        }
        world.run_ms(2_000);
        world.check().unwrap();
        assert!(flows.iter().all(|flow| world.udp_stats(*flow).received > 0));
    }
}

#[test]
fn t3_a_table_is_told_until_the_peer_has_it_and_then_no_more() {
    for seed in 0..8 {
        let links = [Shape::new(50.0, 10.0).loss(0.4), Shape::new(50.0, 15.0).loss(0.4)];
        let mut world = pair(sim::seed(3_390) + seed, (2, 2), &links);
        world.start();
        assert!(world.run_until_true(20_000, |world| world.sites[0].paths_up(0) == 2));
        for turn in 1..=4 {
            world.sites[1].move_buckets(|bucket| (bucket / turn % 2) as u16);
            let told = world.run_until_true(2_000, is_told);
            assert!(told, "seed {seed}: table {turn} is not told");
        }
    }
    let mut world = joined(&two(), 3_400);
    world.sites[1].move_buckets(|bucket| (bucket % 4) as u16);
    world.run_ms(2_000);
    assert!(is_told(&world));
    world.capture(true);
    world.run_ms(10_000);
    // Pings are 32 + 6 bytes; processor information has some hundred.
    let large =
        world.captured.iter().filter(|(site, datagram)| *site == 0 && datagram.bytes.len() > 200).count();
    assert_eq!(large, 0, "what was confirmed is told again");
}

#[test]
fn t3_an_overtaken_table_does_not_come_back() {
    // What leaves over the second link comes 300 ms later than over the first.
    let mut world = joined(&[Shape::new(50.0, 5.0), Shape::new(50.0, 300.0)], 3_410);
    world.cables[0].cut(true);
    world.sites[1].move_buckets(|bucket| (bucket % 2) as u16);
    // The first try is lost, the second one is under way over the slow link when the next table comes.
    world.run_ms(60);
    world.cables[0].cut(false);
    world.sites[1].move_buckets(|bucket| (bucket % 3) as u16);
    assert!(world.run_until_true(200, is_told));
    for _ in 0..1_500 {
        world.run_ms(1);
        assert!(is_told(&world), "an old table came back");
    }
}
