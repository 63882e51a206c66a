//! The golden goodput matrix: what one TCP flow gets from typical bonds. Deterministic, so compared exactly.
//!
//! `SIM_GOODPUT=write cargo test -p sim --test goodput` writes the table anew; review the difference.
#![allow(clippy::unwrap_used, reason = "tests")]

use sim::inner::tcp::TcpSpec;
use sim::inner::udp::UdpSpec;
use sim::link::Shape;
use sim::scenario::pair;

/// Share of a line's rate that inner TCP payload can have: 1,392 bytes in a datagram of 1,538 bytes on the wire.
const PAYLOAD_SHARE: f64 = 1_392.0 / 1_538.0;
/// The flow runs so long before it is measured, and while it is.
const WARM_MS: u64 = 3_000;
const MEASURE_MS: u64 = 4_000;
/// Before that, datagrams fill the links for so long: what a bond is worth once its rates are known.
const FILL_MS: u64 = 500;

struct Profile {
    name: &'static str,
    links: Vec<Shape>,
    mbps: f64,
}

fn profiles() -> Vec<Profile> {
    let profile = |name, mbps, links| Profile { name, mbps, links };
    vec![
        profile("1 link 100/10", 100.0, vec![Shape::new(100.0, 10.0)]),
        profile("1 link 20/40", 20.0, vec![Shape::new(20.0, 40.0)]),
        profile("1 link 50/20, loss 1 %", 50.0, vec![Shape::new(50.0, 20.0).loss(0.01)]),
        profile("1 link 50/20, jitter 5 ms", 50.0, vec![Shape::new(50.0, 20.0).jitter(5_000, true)]),
        profile("2 equal 50/15", 100.0, vec![Shape::new(50.0, 15.0), Shape::new(50.0, 15.0)]),
        profile(
            "2 equal 50/15, loss 1 %",
            100.0,
            vec![Shape::new(50.0, 15.0).loss(0.01), Shape::new(50.0, 15.0).loss(0.01)],
        ),
        profile(
            "2 equal 50/15, jitter 5 ms",
            100.0,
            vec![Shape::new(50.0, 15.0).jitter(5_000, true), Shape::new(50.0, 15.0).jitter(5_000, true)],
        ),
        profile(
            "demo 100/10 + 50/20 + 20/40 0.1 %",
            170.0,
            vec![Shape::new(100.0, 10.0), Shape::new(50.0, 20.0), Shape::new(20.0, 40.0).loss(0.001)],
        ),
        profile("unequal 300/5 + 3/50", 303.0, vec![Shape::new(300.0, 5.0), Shape::new(3.0, 50.0)]),
        profile("4 equal 25/20", 100.0, vec![Shape::new(25.0, 20.0); 4]),
    ]
}

/// Cores of both sides: a bond must not get less because its flows are spread.
fn cores(links: usize) -> &'static [u8] {
    match links {
        1 => &[2],
        2 => &[1, 2],
        _ => &[1, 2, 4],
    }
}

/// Runs of a line, of which the one in the middle counts: when slow start ends is a matter of single packets.
const RUNS: u64 = 3;

/// One line: payload rate, share of the ideal, and what the sender had to do for it.
fn measure(number: usize, profile: &Profile, cores: u8) -> String {
    let mut runs: Vec<(f64, String)> =
        (0..RUNS).map(|run| measure_once((number, run), profile, cores)).collect();
    runs.sort_by(|a, b| a.0.total_cmp(&b.0));
    runs.swap_remove(runs.len() / 2).1
}

fn measure_once((number, run): (usize, u64), profile: &Profile, cores: u8) -> (f64, String) {
    let debug = std::env::var("SIM_DEBUG").is_ok_and(|n| n == number.to_string());
    let mut world = pair(4_000 + 100 * run + number as u64, (cores, cores), &profile.links);
    world.start();
    world.run_ms(1_000);
    assert_eq!(world.sites[0].paths_up(0), profile.links.len(), "{}", profile.name);
    let fill = UdpSpec::mbps(1_400, profile.mbps, world.now, world.now.plus_ms(FILL_MS));
    world.udp(0, 1, fill);
    world.run_ms(FILL_MS + 200);
    let start = world.now;
    let flow =
        world.tcp(0, 1, TcpSpec { hystart: true, start, stop: start.plus_ms(60_000), bytes: u64::MAX });
    for _ in 0..10 {
        world.run_ms((WARM_MS + MEASURE_MS) / 10);
        if debug {
            eprintln!("{} {:?} {}", world.now.ms(), world.tcp_flow(flow).unwrap().sent(), world.describe());
        }
    }
    world.check().unwrap();
    let flow = world.tcp_flow(flow).unwrap();
    let (sent, received) = (flow.sent(), flow.received());
    let bytes = received.bytes - received.bytes_at(start.plus_ms(WARM_MS));
    let mbps = bytes as f64 * 8e-3 / MEASURE_MS as f64;
    let line = format!(
        "{:<36} {:>5} {:>7.1} {:>7.1} {:>7.1} {:>8} {:>7} {:>8} {:>8}",
        profile.name,
        cores,
        mbps,
        profile.mbps * PAYLOAD_SHARE,
        100.0 * mbps / (profile.mbps * PAYLOAD_SHARE),
        sent.retransmitted,
        sent.recoveries,
        sent.timeouts,
        received.disordered,
    );
    (mbps, line)
}

#[test]
fn goodput_matrix() {
    let mut table = format!(
        "{:<36} {:>5} {:>7} {:>7} {:>7} {:>8} {:>7} {:>8} {:>8}\n",
        "links (Mbit/s / ms one way)",
        "cores",
        "Mbit/s",
        "ideal",
        "%",
        "repeats",
        "cuts",
        "timeouts",
        "disorder"
    );
    let lines = |(number, profile): (usize, &Profile)| -> String {
        let cores = cores(profile.links.len()).iter();
        cores.map(|cores| format!("{}\n", measure(number, profile, *cores))).collect()
    };
    let profiles = profiles();
    std::thread::scope(|scope| {
        let rows = profiles.iter().enumerate().map(|row| scope.spawn(move || lines(row)));
        rows.collect::<Vec<_>>().into_iter().for_each(|row| table.push_str(&row.join().unwrap()));
    });
    eprintln!("{table}");
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goodput.txt");
    if std::env::var("SIM_GOODPUT").is_ok_and(|value| value == "write") {
        std::fs::write(path, &table).unwrap();
    }
    let golden = std::fs::read_to_string(path).unwrap_or_default();
    assert_eq!(table, golden, "the goodput matrix changed; SIM_GOODPUT=write takes the new one over");
}
