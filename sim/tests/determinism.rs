//! The same seed must run the same events, or no failure could be repeated.
#![allow(clippy::unwrap_used, reason = "tests")]

use sim::inner::tcp::TcpSpec;
use sim::inner::udp::UdpSpec;
use sim::link::Shape;
use sim::scenario::pair;

fn run(seed: u64) -> (u64, u64) {
    let links = [
        Shape::new(30.0, 10.0).jitter(3_000, true).loss(0.01),
        Shape::new(20.0, 25.0).burst_loss(0.01, 3.0).duplicate(0.01).corrupt(0.01),
    ];
    let mut world = pair(seed, (3, 2), &links);
    world.start();
    world.run_ms(400);
    let start = world.now;
    world.tcp(0, 1, TcpSpec { hystart: true, start, stop: start.plus_ms(1_500), bytes: u64::MAX });
    world.udp(1, 0, UdpSpec::mbps(900, 5.0, start, start.plus_ms(1_500)));
    world.run_ms(700);
    world.cables[0].cut(true);
    world.run_ms(300);
    world.restart(1, true);
    world.cables[0].cut(false);
    world.run_ms(1_500);
    world.check().unwrap();
    (world.log_hash(), world.totals.events)
}

#[test]
fn equal_seeds_give_equal_event_logs() {
    let seed = sim::seed(77);
    let first = run(seed);
    assert_eq!(first, run(seed));
    assert_ne!(first.0, run(seed + 1).0);
    assert!(first.1 > 5_000, "{} events", first.1);
}
