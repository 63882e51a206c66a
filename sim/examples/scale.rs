//! A day of a cluster of 250 units with ten million flows, by the product's own decisions.
//!
//! ```text
//! cargo run --release -p sim --example scale                          a day: prints tables; --svg FILE writes a picture (docs/scaling.md)
//! cargo run --release -p sim --example scale -- --flows 200000 --seconds 3600 --events 30 --seed 7
//! cargo run --release -p sim --example scale -- --without-chains     earlier owners are not asked: flows break
//! ```
//!
//! It ends with 1 if a flow broke.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "it prints a report")]

use std::process::ExitCode;

use sim::scale::{Scenario, run};

fn main() -> ExitCode {
    let mut scenario = Scenario::DAY;
    let mut svg = None;
    let mut log = false;
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        if name == "--without-chains" || name == "--log" {
            scenario.without_chains |= name == "--without-chains";
            log |= name == "--log";
            continue;
        }
        let Some(value) = arguments.next() else { return usage(&name) };
        if name == "--svg" {
            svg = Some(value);
            continue;
        }
        let Ok(number) = value.parse::<u32>() else { return usage(&name) };
        match (name.as_str(), u16::try_from(number)) {
            ("--seed", _) => scenario.seed = number.into(),
            ("--flows", _) if (1..=1 << 24).contains(&number) => scenario.flows = number,
            ("--buckets", _) if number.is_power_of_two() && number <= 1 << 16 => {
                scenario.buckets = number as usize;
            }
            ("--seconds", _) => scenario.seconds = number,
            ("--events", _) => scenario.events = number,
            ("--planes", Ok(planes)) if (5..=1_000).contains(&planes) => scenario.planes = planes,
            ("--dispatchers", Ok(dispatchers)) if (1..=64).contains(&dispatchers) => {
                scenario.dispatchers = dispatchers;
            }
            _ => return usage(&name),
        }
    }
    let report = run(scenario, &mut |report| {
        let minutes = report.now_ns.saturating_sub(report.start_ns) / 60_000_000_000;
        eprintln!(
            "minute {minutes}: {} events, {} flows begun, {} broken, {} lost by crashes",
            report.events, report.flows.begun, report.flows.broken, report.flows.lost_by_crash,
        );
    });
    if log {
        report.lines.iter().for_each(|line| eprintln!("{line}"));
    }
    println!("{}", report.markdown());
    if let Some(path) = svg
        && let Err(error) = std::fs::write(&path, report.svg())
    {
        eprintln!("{path}: {error}");
        return ExitCode::FAILURE;
    }
    eprintln!("waits: {}", report.waits.as_deref().unwrap_or("nothing"));
    if report.is_clean() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn usage(name: &str) -> ExitCode {
    eprintln!(
        "{name}: --seed, --flows (to 16777216), --buckets, --seconds, --events, --planes (5 to 1000), --dispatchers (1 to 64) with a number; --svg FILE; --log; --without-chains"
    );
    ExitCode::FAILURE
}
