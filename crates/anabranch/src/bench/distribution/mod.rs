//! Compares the schemes of [`steering::distribution`] over the same packets in memory (row C8).
//!
//! Threads stand for cores. Each reads the packets that the scheme gives it, hands those of other owners over by ring, and
//! counts those of its own flows, in order of arrival. Which core reads what is computed beforehand and repeats; rates are
//! for comparison within one run only.

mod cores;

use std::process::ExitCode;

use anyhow::anyhow;
use clap::Args as ClapArgs;
use serde::Serialize;
use steering::distribution::{Distributor, Facts, NO_SERVICE, Scheme};
use steering::table::{BucketTable, Unit};

use self::cores::{FLOWS, Packet, Seen};
use super::gateway::mix;
use crate::{EXIT_CONFIGURATION, output};

/// Runs over the same packets; the rates are the best and the median.
const RUNS: usize = 7;
/// Buckets of the owners' table.
const BUCKETS: usize = 128;

/// Settings of a comparison.
#[derive(ClapArgs)]
#[command(
    after_help = "Schemes: flow, interface, service, round-robin, least-loaded, every-N-packets, slice-N-us,\n\
                  transaction-N-us, interface-flow-N, service-flow-N.\n\n\
                  Example: anabranch bench distribution --scheme flow --scheme every-100-packets"
)]
pub struct Args {
    /// Only this scheme; may be repeated [default: each of them once]
    #[arg(long = "scheme", value_name = "SCHEME")]
    schemes: Vec<Scheme>,
    /// Cores [default: as many as CPUs]
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=64))]
    cores: Option<u8>,
    /// Packets
    #[arg(long, default_value_t = 4_000_000, value_parser = clap::value_parser!(u32).range(1_000..=100_000_000))]
    packets: u32,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// One scheme's result.
#[derive(Serialize)]
struct Row {
    scheme: String,
    cores: u8,
    packets: u64,
    mpps_best: f64,
    mpps_median: f64,
    /// Packets whose reader was not their flow's owner.
    handed_over: u64,
    /// Packets processed after a later one of their flow.
    reordered: u64,
    /// Packets that the busiest core read, by the average.
    reading_imbalance: f64,
    /// The same of reading and processing together.
    work_imbalance: f64,
    /// Packets of flows that the reader read itself, or was handed; each packet once.
    processed: u64,
}

/// Runs and prints; fails when a packet was processed more or less often than once.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let available = std::thread::available_parallelism().map_or(1, usize::from);
    let cores = args.cores.unwrap_or_else(|| available.clamp(1, 64) as u8);
    let schemes = if args.schemes.is_empty() { every_scheme().to_vec() } else { args.schemes.clone() };
    let say = |text: &str| if args.json { Ok(()) } else { output::print(text) };
    say(&format!(
        "{cores} cores (machine: {available}), {} packets, {FLOWS} flows\n{}",
        args.packets,
        head()
    ))?;
    let mut rows = Vec::new();
    for scheme in schemes {
        let row = compare(scheme, cores, args.packets as usize)?;
        say(&line(&row))?;
        rows.push(row);
    }
    if args.json {
        output::print_json(&rows)?;
    }
    let whole = rows.iter().all(|row| row.processed == row.packets);
    Ok(if whole { ExitCode::SUCCESS } else { ExitCode::from(EXIT_CONFIGURATION) })
}

/// Every kind of scheme once, with numbers that suit the packets.
fn every_scheme() -> [Scheme; 10] {
    [
        Scheme::Flow,
        Scheme::Interface,
        Scheme::Service,
        Scheme::RoundRobin,
        Scheme::LeastLoaded,
        Scheme::EveryPackets(100),
        Scheme::TimeSlice(5_000),
        Scheme::Transaction(100),
        Scheme::InterfaceFlow(2),
        Scheme::ServiceFlow(2),
    ]
}

fn compare(scheme: Scheme, cores: u8, packets: usize) -> anyhow::Result<Row> {
    let readers = distribute(scheme, cores, packets)?;
    let mut runs = (0..RUNS).map(|_| cores::run(&readers, cores)).collect::<anyhow::Result<Vec<_>>>()?;
    runs.sort_by(|one, other| one.1.total_cmp(&other.1));
    let rate = |place: usize| runs.get(place).map_or(0.0, |run| packets as f64 / run.1 / 1e6);
    let (mpps_best, mpps_median) = (rate(0), rate(RUNS / 2));
    let seen = runs.get(RUNS / 2).map(|run| run.0.as_slice()).unwrap_or_default();
    let total = |of: fn(&Seen) -> u64| seen.iter().map(of).sum::<u64>();
    let imbalance = |of: fn(&Seen) -> u64| {
        let most = seen.iter().map(of).max().unwrap_or(0);
        most as f64 * f64::from(cores) / total(of).max(1) as f64
    };
    Ok(Row {
        scheme: scheme.to_string(),
        cores,
        packets: packets as u64,
        mpps_best,
        mpps_median,
        handed_over: total(|seen| seen.handed_over),
        reordered: total(|seen| seen.reordered),
        reading_imbalance: imbalance(|seen| seen.read),
        work_imbalance: imbalance(|seen| seen.read + seen.processed),
        processed: total(|seen| seen.processed),
    })
}

/// Packets of each reader. Flows are skewed, four interfaces share the traffic 4:2:1:1, half of it is for three services.
fn distribute(scheme: Scheme, cores: u8, packets: usize) -> anyhow::Result<Vec<Vec<Packet>>> {
    let units: Vec<Unit> = (0..cores).map(|id| Unit { id: id.into(), weight: 1 }).collect();
    let table = BucketTable::new(BUCKETS, &units).map_err(|error| anyhow!("{error}"))?;
    let list: Vec<u8> = (0..cores).collect();
    let mut distributor = Distributor::new(scheme, &list, table);
    let mut numbers = vec![0u32; FLOWS];
    let mut readers = vec![Vec::new(); usize::from(cores)];
    for place in 0..packets {
        let random = mix(place as u64);
        // Log-uniform: the first flows have most of the packets.
        let bits = random % 17;
        let flow = (random >> 20) as usize & ((1 << bits) - 1);
        let of_flow = mix(!(flow as u64));
        let facts = Facts {
            hash: of_flow as u32,
            port: [0, 0, 0, 0, 1, 1, 2, 3][(of_flow >> 32) as usize % 8],
            service: if of_flow >> 40 & 1 == 0 { (of_flow >> 41) as u16 % 3 } else { NO_SERVICE },
            bytes: if random >> 60 == 0 { 1_500 } else { 64 },
            // A packet each 100 ns.
            now_ns: place as u64 * 100,
        };
        numbers[flow] += 1;
        let owner = distributor.owner(facts.hash);
        let reader = usize::from(distributor.reader(&facts));
        readers[reader].push(Packet { place, flow, number: numbers[flow], owner });
    }
    Ok(readers)
}

fn head() -> String {
    format!(
        "{:<18} {:>6} {:>7} {:>12} {:>14} {:>14} {:>12}\n",
        "scheme", "Mpps", "median", "hand-offs %", "reading max/∅", "work max/∅", "reordered %"
    )
}

fn line(row: &Row) -> String {
    let percent = |count: u64| count as f64 * 100.0 / row.packets as f64;
    format!(
        "{:<18} {:>6.1} {:>7.1} {:>12.1} {:>14.2} {:>14.2} {:>12.3}\n",
        row.scheme,
        row.mpps_best,
        row.mpps_median,
        percent(row.handed_over),
        row.reading_imbalance,
        row.work_imbalance,
        percent(row.reordered),
    )
}
