//! A game beside one CUBIC download (rows T12, R15): its delay, its order, and what the download gets all the same.
#![allow(clippy::unwrap_used, reason = "tests")]

use sim::inner::tcp::TcpSpec;
use sim::inner::udp::{UdpSpec, UdpStats};
use sim::link::{QueueLimit, Shape};
use sim::scenario::pair;
use tunnel::time::Time;

/// The game plays alone for so long, then the download begins; delays count when it has found its rate.
const ALONE_MS: u64 = 2_000;
const BEGINS_MS: u64 = 2_000;
const MEASURE_MS: u64 = 10_000;

/// Delays and order of a game that plays along the download, and of one against it; payload of the download, Mbit/s.
struct Played {
    idle_ms: f64,
    p99_ms: f64,
    disordered: usize,
    along: UdpStats,
    against: UdpStats,
    mbps: f64,
}

fn play(seed: u64, cores: u8, links: &[Shape]) -> Played {
    let mut world = pair(sim::seed(seed), (cores, cores), links);
    world.start();
    assert!(world.run_until_true(5_000, |world| (0..2).all(|at| world.sites[at].paths_up(0) == links.len())));
    world.run_ms(500);
    let start = world.now;
    let stop = start.plus_ms(ALONE_MS + BEGINS_MS + MEASURE_MS);
    let game = UdpSpec { packet_bytes: 148, every_ns: 16_667_000, burst: 1, start, stop };
    let (along, against) = (world.udp(0, 1, game), world.udp(1, 0, game));
    let begins = start.plus_ms(ALONE_MS);
    let download = world.tcp(0, 1, TcpSpec { hystart: true, start: begins, stop, bytes: u64::MAX });
    world.run_until(begins);
    let idle_ms = world.udp_stats(along).delay_ms(0.99, start);
    world.run_until(stop);
    let received = world.tcp_flow(download).unwrap().received();
    let measured = begins.plus_ms(BEGINS_MS);
    let mbps = (received.bytes - received.bytes_at(measured)) as f64 * 8e-3 / MEASURE_MS as f64;
    world.run_ms(500);
    world.check().unwrap();
    let (along, against) = (world.udp_stats(along), world.udp_stats(against));
    let p99_ms = along.delay_ms(0.99, measured);
    Played { idle_ms, p99_ms, disordered: disordered(&along, measured), along, against, mbps }
}

/// Packets sent from `start` on that came after a later one.
fn disordered(stats: &UdpStats, start: Time) -> usize {
    let mut newest = start;
    let behind = |(sent, _): &&(Time, u64)| {
        let is_behind = *sent >= start && *sent < newest;
        newest = newest.max(*sent);
        is_behind
    };
    stats.delays_ns.iter().filter(behind).count()
}

fn link(mbps: f64, delay_ms: f64, queue_ms: u32) -> Shape {
    Shape::new(mbps, delay_ms).queue(QueueLimit::Ms(queue_ms))
}

#[test]
fn a_game_beside_a_download_keeps_its_delay_and_its_order() {
    let beds = [
        (vec![link(20.0, 10.0, 200)], 16.0),
        (vec![link(30.0, 10.0, 200), link(20.0, 60.0, 200)], 42.0),
        (vec![link(100.0, 10.0, 120), link(50.0, 20.0, 120), link(20.0, 40.0, 120).loss(0.001)], 125.0),
    ];
    for (number, (links, least_mbps)) in beds.iter().enumerate() {
        for (seed, cores) in [(7_000, 1), (7_000, 2), (7_001, 1), (7_001, 2)] {
            let played = play(seed + 10 * number as u64, cores, links);
            let Played { idle_ms, p99_ms, disordered, along, against, mbps } = &played;
            let what = format!("bed {number}, seed {seed}, {cores} cores");
            eprintln!("{what}: p99 {p99_ms:.1} ms, idle {idle_ms:.1}; download {mbps:.1} Mbit/s");
            assert!(*p99_ms <= idle_ms + 10.0, "{what}: {p99_ms} ms, idle {idle_ms}");
            assert_eq!(along.received, along.sent, "{what}");
            assert_eq!((against.received, against.disordered), (against.sent, 0), "{what}");
            assert_eq!(*disordered, 0, "{what}");
            assert!(*mbps > *least_mbps, "{what}: {mbps} Mbit/s");
        }
    }
}

/// Pings beside sixteen downloads over the demo's links: the more cores report, the less each of them knows of a link, and the rates that are
/// found must not suffer from it.
#[test]
fn pings_beside_many_downloads_keep_their_delay_on_any_number_of_cores() {
    let links = [link(100.0, 10.0, 120), link(50.0, 20.0, 120), link(20.0, 40.0, 120).loss(0.001)];
    for cores in [1, 2, 4] {
        let mut world = pair(sim::seed(7_100), (cores, cores), &links);
        world.start();
        assert!(
            world.run_until_true(5_000, |world| (0..2).all(|at| world.sites[at].paths_up(0) == links.len()))
        );
        world.run_ms(500);
        let (start, stop) = (world.now, world.now.plus_ms(8_000));
        let pings = UdpSpec { packet_bytes: 92, every_ns: 20_000_000, burst: 1, start, stop };
        let pings = world.udp(0, 1, pings);
        let downloads =
            [(); 16].map(|()| world.tcp(0, 1, TcpSpec { hystart: true, start, stop, bytes: u64::MAX }));
        world.run_until(stop);
        world.check().unwrap();
        let measured = start.plus_ms(3_000);
        let bytes = |id| {
            let received = world.tcp_flow(id).unwrap().received();
            received.bytes - received.bytes_at(measured)
        };
        let mbps = downloads.into_iter().map(bytes).sum::<u64>() as f64 * 8e-3 / 5_000.0;
        let p99_ms = world.udp_stats(pings).delay_ms(0.99, measured);
        eprintln!("{cores} cores: p99 {p99_ms:.1} ms of 10; downloads {mbps:.1} Mbit/s");
        // By their bookings, rates and the queue that is kept: some 15.
        assert!(p99_ms < 25.0, "{cores} cores: {p99_ms} ms");
        assert!(mbps > 135.0, "{cores} cores: {mbps} Mbit/s");
    }
}
