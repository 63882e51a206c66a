//! Whether replies come to the core of their request, counted over many random flows, and whether every port that can
//! serve a core and a destination is given out (rows C2, C3, C4).
//!
//! Several [`services::Services`]s, no interface: each flow's first packet goes to the core that the distributor's hash
//! names, what comes out is answered, and the answer goes where the hash of its own tuple says. What had to happen is
//! computed beside it from the hash's definition, bit by bit. Everything is deterministic but the hash's key.
//!
//! * [`packets`]: the flows, and the hash by its definition.
//! * [`cores`]: the cores and what they hand each other.
//! * [`rows`]: hand-offs, with the table at rest and with buckets moved in the middle.
//! * [`ports`]: one core, one destination, until the first refusal.

mod cores;
mod packets;
mod ports;
mod rows;

use std::process::ExitCode;

use clap::Args as ClapArgs;
use serde::Serialize;

use crate::{EXIT_CONFIGURATION, output};

/// Settings of a run.
#[derive(ClapArgs)]
#[command(after_help = "Example: anabranch bench handoffs --flows 10000000 --cores 4")]
pub struct Args {
    /// Random flows of each mode
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(1..=100_000_000))]
    flows: u64,
    /// Cores of the gateway
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=32))]
    cores: u8,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    rows: Vec<rows::Row>,
    ports: Vec<ports::Ports>,
    /// Everything is as it has to be.
    kept: bool,
}

/// Runs and prints; fails when something is not as it has to be.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let say = |text: &str| if args.json { Ok(()) } else { output::print(text) };
    say(&rows::Row::head())?;
    let mut done = Vec::new();
    for plan in rows::Plan::all() {
        let row = rows::run(plan, args.flows, args.cores)?;
        say(&row.line())?;
        done.push(row);
    }
    say("\n")?;
    say(&ports::Ports::head())?;
    let ports = ports::run(args.cores)?;
    for line in &ports {
        say(&line.line())?;
    }
    let kept = done.iter().all(|row| row.kept) && ports.iter().all(|ports| ports.kept);
    if args.json {
        output::print_json(&Report { rows: done, ports, kept })?;
    }
    Ok(if kept { ExitCode::SUCCESS } else { ExitCode::from(EXIT_CONFIGURATION) })
}
