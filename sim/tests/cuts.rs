//! The best link falls silent in the middle of a download: how long that is felt, and what the other links do meanwhile.
#![allow(clippy::unwrap_used, reason = "tests")]

use fastrand::Rng;
use sim::inner::tcp::TcpSpec;
use sim::inner::udp::UdpSpec;
use sim::link::{QueueLimit, Shape};
use sim::scenario::pair;
use sim::world::World;
use tunnel::path::PathState;

/// Datagrams fill the links for so long, so that their rates are known.
const FILL_MS: u64 = 500;
/// The download runs for so long before the cut, and up to a second more.
const WARM_MS: u64 = 3_000;
/// It is watched for so long after it.
const WATCH_MS: u64 = 1_500;

fn link(mbps: f64, delay_ms: f64, queue_ms: u32) -> Shape {
    Shape::new(mbps, delay_ms).queue(QueueLimit::Ms(queue_ms))
}

/// Outcome of one cut.
#[derive(Debug)]
struct Felt {
    /// From the cut to the next bytes in order, and the longest time without any, ms.
    first_ms: u64,
    longest_ms: u64,
    /// Another path was thought to be dead, too.
    others_left: bool,
}

/// Paths of the best link's WANs, or of the others, that are in this state on a site.
fn of_cable(world: &World, site: usize, cut: bool, state: PathState) -> usize {
    let bond = world.sites[site].bond(0).unwrap();
    let paths = bond.paths.load();
    paths.iter().filter(|path| (path.route().wan == 0) == cut && path.state() == state).count()
}

fn cut(seed: u64, links: &[(f64, Shape)]) -> Felt {
    let shapes: Vec<Shape> = links.iter().map(|link| link.1.clone()).collect();
    let mut world = pair(sim::seed(seed), (2, 2), &shapes);
    world.start();
    assert!(world.run_until_true(5_000, |world| (0..2).all(|at| world.sites[at].paths_up(0) == links.len())));
    let mbps = links.iter().map(|link| link.0).sum();
    world.udp(0, 1, UdpSpec::mbps(1_400, mbps, world.now, world.now.plus_ms(FILL_MS)));
    world.run_ms(FILL_MS + 200);
    let (start, stop) = (world.now, world.now.plus_ms(60_000));
    let flow = world.tcp(0, 1, TcpSpec { hystart: true, start, stop, bytes: u64::MAX });
    world.run_until(start.plus_ms(WARM_MS).plus_us(Rng::with_seed(seed).u64(..1_000_000)));
    world.reset_gap(flow);
    world.cables[0].cut(true);
    let at = world.now;
    let (mut first_ms, mut others_left) = (0, false);
    for _ in 0..WATCH_MS {
        world.run_ms(1);
        let suspect = |site| of_cable(&world, site, false, PathState::Suspect);
        others_left |= (0..2).map(suspect).sum::<usize>() > 0;
        let received = world.tcp_flow(flow).unwrap().received();
        // What was under way over the others may still come in order for a moment.
        if first_ms == 0 && received.gap_ns_max > 25_000_000 {
            first_ms = received.last.since(at) / 1_000_000;
        }
    }
    world.check().unwrap();
    let longest_ms = world.tcp_flow(flow).unwrap().received().gap_ns_max / 1_000_000;
    Felt { first_ms, longest_ms, others_left }
}

/// Cuts of one bed, at other moments each, sorted by the longest time without bytes.
fn cuts(name: &str, links: &[(f64, Shape)], seeds: std::ops::Range<u64>) -> Vec<Felt> {
    let mut felt: Vec<Felt> = seeds.map(|seed| cut(seed, links)).collect();
    felt.sort_by_key(|felt| felt.longest_ms);
    let first: Vec<u64> = felt.iter().map(|felt| felt.first_ms).collect();
    let longest: Vec<u64> = felt.iter().map(|felt| felt.longest_ms).collect();
    eprintln!("{name}: first bytes after {first:?} ms, longest gap {longest:?} ms");
    felt
}

/// While the quickest link is silent its reports are, too. That must not make a slower one look dead that carries everything.
#[test]
fn a_slower_link_is_not_thought_dead_with_the_quickest() {
    let beds = [
        ("30/10 + 20/60", vec![(30.0, link(30.0, 10.0, 200)), (20.0, link(20.0, 60.0, 200))]),
        (
            "50/15 + 30/30, jitter",
            vec![
                (50.0, link(50.0, 15.0, 120).jitter(4_000, false)),
                (30.0, link(30.0, 30.0, 120).jitter(8_000, false)),
            ],
        ),
    ];
    for (name, links) in &beds {
        for felt in cuts(name, links, 3..6) {
            assert!(!felt.others_left, "{name}: {felt:?}");
            assert!(felt.first_ms < 200 && felt.longest_ms < 400, "{name}: {felt:?}");
        }
    }
}

/// Datagrams that a link had when it fell silent are still there to be sent again.
#[test]
fn what_a_silent_link_had_comes_over_the_others() {
    let demo =
        vec![(100.0, link(100.0, 10.0, 120)), (50.0, link(50.0, 20.0, 120)), (20.0, link(20.0, 40.0, 120))];
    for felt in cuts("100/10 + 50/20 + 20/40", &demo, 1..5) {
        assert!(felt.first_ms < 150 && felt.longest_ms < 400, "{felt:?}");
    }
}
