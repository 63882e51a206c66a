//! How exact the link emulator is on this machine, and what it costs: `cargo run --release -p testbed --example accuracy`.
//!
//! UDP beyond the rate shows the rate, a probe the delay, and the emulator's thread its processor time.
#![allow(clippy::print_stdout, reason = "this is what the program is for")]

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context;
use testbed::link::Shape;
use testbed::stop::Stop;
use testbed::topology::{LinkSpec, Site, Testbed};
use testbed::traffic::{Span, probe, tcp, udp};

fn main() -> anyhow::Result<()> {
    testbed::gain_privilege()?;
    println!(
        "{:>8} {:>6} | {:>9} {:>8} | {:>9} {:>8} {:>8} | {:>9} {:>6}",
        "Mbit/s", "ms", "UDP", "error", "RTT p50", "p99", "error", "TCP", "CPU"
    );
    for (mbps, delay) in
        [(1.0, 5.0), (10.0, 10.0), (20.0, 40.0), (50.0, 20.0), (100.0, 10.0), (200.0, 1.0), (500.0, 1.0)]
    {
        row(mbps, delay)?;
    }
    Ok(())
}

fn row(mbps: f64, delay: f64) -> anyhow::Result<()> {
    let bed = Testbed::new(&[LinkSpec::new(Shape::new(mbps, delay))], 1)?;
    let (a, b) = (bed.site(Site::A), bed.site(Site::B));
    let ip = bed.addresses(Site::B, 0).any().context("address")?;
    let stop = Stop::new();

    let prober = probe::start(a, b, SocketAddr::new(ip, 7), Duration::from_millis(5))?;
    std::thread::sleep(Duration::from_secs(1));
    let rtt = prober.finish()?.rtt;

    let before = emulator_cpu_ms();
    let options = udp::Options::new(mbps * 1.1, Span::seconds(4.0));
    let udp = udp::start(a, b, SocketAddr::new(ip, 5000), options, &stop)?.finish(|_| {})?;
    let wire = udp.goodput_mbps * 1466.0 / 1400.0;
    let cpu = (emulator_cpu_ms() - before) / 40.0;

    let options = tcp::Options::new(1, Span::seconds(4.0));
    let tcp = tcp::start(a, b, SocketAddr::new(ip, 5001), options, &stop)?.finish(|_| {})?;
    println!(
        "{mbps:>8} {delay:>6} | {wire:>9.3} {:>7.2}% | {:>9.3} {:>8.3} {:>+8.3} | {:>9.3} {cpu:>5.1}%",
        (wire / mbps - 1.0) * 100.0,
        rtt.p50_ms,
        rtt.p99_ms,
        rtt.p50_ms - 2.0 * delay,
        tcp.goodput_mbps * 1538.0 / 1448.0,
    );
    Ok(())
}

/// Processor time of the emulator's thread so far, ms.
fn emulator_cpu_ms() -> f64 {
    let Ok(tasks) = std::fs::read_dir("/proc/self/task") else { return 0.0 };
    let read = |task: &std::fs::DirEntry, name: &str| {
        std::fs::read_to_string(task.path().join(name)).unwrap_or_default()
    };
    let ns: u64 = tasks
        .flatten()
        .filter(|task| read(task, "comm").trim() == "emulator")
        .filter_map(|task| read(&task, "schedstat").split_ascii_whitespace().next()?.parse::<u64>().ok())
        .sum();
    ns as f64 / 1e6
}
