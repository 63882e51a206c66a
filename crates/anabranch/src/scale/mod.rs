//! `anabranch bench scale`: real connections through a cluster whose units come and go, and through what others do instead.
//!
//! [`machines`] is a cluster of this very program, which `demo --cluster` shows as well; [`churn`] are its events, [`services`] the connections,
//! [`run`](mod@run) one run, [`report`] what came of it.

pub(crate) mod churn;
pub(crate) mod crash;
pub(crate) mod machines;
mod outage;
mod report;
mod run;
mod services;

use std::fmt;
use std::io::Write as _;
use std::process::ExitCode;
use std::str::FromStr;

use anyhow::Context as _;
use cluster::manager::Chains;

use crate::demo::progress::Progress;
use report::Report;

/// Name of what a cluster works by.
const OURS: &str = "counted";

/// Arguments of `anabranch bench scale`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Examples:
  anabranch bench scale --events 20                          two minutes
  anabranch bench scale --compare newest:1 --compare nftables --json > scale.json

Ways to choose the machine of a connection, for --compare:
  newest:N     earlier owners of a bucket are asked, N of them at most (0: none, nothing is punted)
  clock:MS     they are asked until so long after the bucket moved
  rendezvous   weighted rendezvous hashing, a consistent hash; nobody is asked
  nftables     Linux gateways behind nftables' jhash (needs nft and ip)

A connection is broken by a reset, a time-out, a wrong byte or a stall of more than 3 s, seen by its client or its server.
The exit code is 0 only if nothing broke with the cluster as it is.")]
pub(crate) struct Args {
    /// Events: one to three units come, drain, go or change their share with one change
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    events: u32,
    /// Milliseconds from the beginning of one event to that of the next, at least
    #[arg(long, value_name = "MS", default_value_t = 1_500)]
    pause_ms: u64,
    /// Data planes; half of them take part at the beginning
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(2..=16))]
    data_planes: u16,
    /// Seed of events, sizes, pauses, life times and data
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    #[command(flatten)]
    load: services::Load,
    /// Seconds without an event at the end, in which second hops are counted
    #[arg(long, value_name = "S", default_value_t = 0)]
    settle: u64,
    /// A unit that was silent so long is lost. All machines share this one's CPUs: who is late is not dead
    #[arg(long, value_name = "MS", default_value_t = 10_000)]
    dead_after_ms: u16,
    /// Run this as well; may be given several times
    #[arg(long, value_name = "WAY")]
    compare: Vec<Way>,
    /// Events of those
    #[arg(long, value_name = "N")]
    compare_events: Option<u32>,
    /// Leave the cluster itself out
    #[arg(long)]
    only_compare: bool,
    /// Print one JSON object instead of the table, as the only thing on standard output
    #[arg(long)]
    json: bool,
}

/// Way to choose the machine of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Chains(Chains),
    Nftables,
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Chains(chains) => chains.fmt(f),
            Self::Nftables => f.write_str("nftables"),
        }
    }
}

impl FromStr for Way {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "nftables" {
            return Ok(Self::Nftables);
        }
        text.parse().map(Self::Chains)
    }
}

/// Runs it. Call it before any thread exists: as an ordinary user it enters a user namespace first.
pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    testbed::gain_privilege()?;
    let stop = crate::demo::stop_on_signals()?;
    let mut progress = Progress::new();
    let mut runs = Vec::new();
    if !args.only_compare {
        runs.push((Way::Chains(Chains::Counted), args.events));
    }
    runs.extend(args.compare.iter().map(|way| (*way, args.compare_events.unwrap_or(args.events))));
    let mut report = Report { seed: args.seed, data_planes: args.data_planes, variants: Vec::new() };
    for (way, events) in runs {
        let variant = run::run(args, way, events as usize, &stop, &mut progress)?;
        progress.note(format!(
            "{way}: {} of {} connections broke",
            variant.total.broken, variant.total.connections
        ));
        report.variants.push(variant);
    }
    progress.end();
    let text = if args.json { report.json()? } else { report.text() };
    let mut out = std::io::stdout().lock();
    writeln!(out, "{text}").and_then(|()| out.flush()).context("write the report to standard output")?;
    let good = args.only_compare || report.is_clean();
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
