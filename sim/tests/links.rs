//! Handshake, path join and data over every kind of link, and every mixture of MTUs and cores.
#![allow(clippy::unwrap_used, reason = "tests")]

use sim::inner::tcp::TcpSpec;
use sim::inner::udp::UdpSpec;
use sim::link::Link;
use sim::scenario::{pair, star, to_hub};
use sim::world::World;
use tunnel::time::Time;

/// Runs until both sites have `paths` paths up.
fn join(world: &mut World, paths: usize, limit_ms: u64) -> u64 {
    world.start();
    let began = world.now;
    let up = world.run_until_true(limit_ms, |world| (0..2).all(|site| world.sites[site].paths_up(0) == paths));
    assert!(up, "not joined within {limit_ms} ms");
    world.now.since(began) / 1_000_000
}

/// One second of both kinds of traffic, then what must hold after it.
fn traffic(world: &mut World, packet_bytes: usize, mbps: f64) -> (u64, u64) {
    let start = world.now;
    let stop = start.plus_ms(1_000);
    let there = world.udp(0, 1, UdpSpec::mbps(packet_bytes, mbps, start, stop));
    let back = world.udp(1, 0, UdpSpec::mbps(packet_bytes, mbps, start, stop));
    let tcp = world.tcp(0, 1, TcpSpec { start, stop: start.plus_ms(60_000), bytes: 300_000 });
    world.run_ms(2_500);
    world.run_until_true(20_000, |world| world.tcp_flow(tcp).unwrap().finished());
    world.check().unwrap();
    assert_eq!(world.tcp_flow(tcp).unwrap().received().bytes, 300_000, "TCP did not finish");
    assert_eq!(world.totals.flows_split, 0);
    let (there, back) = (world.udp_stats(there), world.udp_stats(back));
    (there.sent + back.sent, there.received + back.received)
}

#[test]
fn every_kind_of_link_joins_and_carries() {
    let base = || Link::new(50.0, 15.0);
    // Name, link, share of packets that must arrive: recovery hides most loss.
    let kinds: [(&str, Link, f64); 12] = [
        ("clean", base(), 1.0),
        ("bare", Link::default(), 1.0),
        ("jitter in order", base().jitter(5_000, false), 1.0),
        ("jitter out of order", base().jitter(5_000, true), 1.0),
        ("loss 1 %", base().loss(0.01), 0.99),
        ("loss 10 %", base().loss(0.1), 0.93),
        ("bursts", base().burst_loss(0.02, 4.0), 0.98),
        ("reordering", base().reorder(0.05, 3_000), 1.0),
        ("corruption", base().corrupt(0.02), 0.99),
        ("duplicates", base().duplicate(0.1), 1.0),
        ("MTU 1280", base().mtu(1_280), 1.0),
        ("satellite", Link::new(10.0, 300.0), 1.0),
    ];
    for (number, (name, link, least)) in kinds.into_iter().enumerate() {
        let mut world = pair(sim::seed(100 + number as u64), (2, 2), &[link]);
        let took_ms = join(&mut world, 1, 10_000);
        let (sent, received) = traffic(&mut world, 800, 2.0);
        let share = received as f64 / sent as f64;
        eprintln!("{name}: joined in {took_ms} ms, {:.2} % arrived", 100.0 * share);
        assert!(share >= least, "{name}: {share}");
        // A round trip for the handshake and one for the challenge, when nothing is lost.
        assert!(least < 1.0 || took_ms < 1_500, "{name}: joined in {took_ms} ms");
    }
}
