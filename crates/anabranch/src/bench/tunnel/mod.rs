//! The tunnel in memory: what cores of two nodes seal and open, without interfaces and sockets.
//!
//! The loop is the production one: [`datapath::Datapath`] of each core, a packet of the host in and a datagram out, then the
//! datagram in and a packet for the host out. Packets that another core has to have go over rings as in the engine. Sending and
//! receiving take turns, and each is timed alone: what is received was prepared before.
//!
//! *One*: a core at each end. *Two*: two cores at each end, which share a node, its paths and its session. *Independent*: two
//! pairs of nodes with a core each, which share nothing; two loops on as many CPUs cannot be faster than this.

mod bed;
mod memory_core;
mod pair;

use std::process::ExitCode;

use clap::Args as ClapArgs;
use serde::Serialize;
use tunnel::mode::SteeringMode;

use crate::output;
use bed::{Load, Measured};

/// Settings of a measurement.
#[derive(ClapArgs)]
#[command(
    after_help = "Examples:\n  anabranch bench tunnel\n  anabranch bench tunnel --mode receiver-decides --bytes 1400 --json"
)]
pub struct Args {
    /// Way in which the receiving core is named; all of them where none is given.
    #[arg(long, value_parser = mode)]
    mode: Option<SteeringMode>,
    /// Bytes of each inner packet, 28 to 1,400.
    #[arg(long, default_value_t = 1_400, value_parser = clap::value_parser!(u16).range(28..=1_400))]
    bytes: u16,
    /// Packets of each measurement.
    #[arg(long, default_value_t = 200_000)]
    packets: u64,
    /// Times that one, two and independent are measured, in turns; medians are shown.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=99))]
    runs: u8,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Mode by its name in configuration.
fn mode(name: &str) -> Result<SteeringMode, String> {
    let names = || SteeringMode::ALL.map(SteeringMode::name).join(", ");
    let found = SteeringMode::ALL.into_iter().find(|mode| mode.name() == name);
    found.ok_or_else(|| format!("there is no such mode; one of {}", names()))
}

/// Thousand packets a second of one core, of two and of two that share nothing.
#[derive(Serialize)]
struct Rates {
    one_kpps: f64,
    two_kpps: f64,
    independent_kpps: f64,
    /// Two cores in ratio to one.
    two_of_one: f64,
    /// Two cores in ratio to two loops that share nothing.
    two_of_independent: f64,
}

impl Rates {
    fn new(kpps: [f64; 3]) -> Self {
        let [one_kpps, two_kpps, independent_kpps] = kpps;
        let (two_of_one, two_of_independent) = (two_kpps / one_kpps, two_kpps / independent_kpps);
        Self { one_kpps, two_kpps, independent_kpps, two_of_one, two_of_independent }
    }
}

#[derive(Serialize)]
struct Report {
    mode: &'static str,
    bytes: u16,
    /// Packets of the host in, datagrams out.
    send: Rates,
    /// Datagrams in, packets for the host out.
    receive: Rates,
    /// Packets that went to another core at the two receiving ones, percent.
    handed_percent: f64,
}

/// Measures and prints.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let modes: Vec<SteeringMode> = args.mode.map_or_else(|| SteeringMode::ALL.to_vec(), |mode| vec![mode]);
    if !args.json {
        output::print(&format!(
            "{:<18} {:>6} {:>8} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9}\n",
            "mode", "bytes", "", "one kpps", "two", "indep.", "two/one", "two/ind.", "handed %"
        ))?;
    }
    let mut reports = Vec::new();
    for mode in modes {
        let report = measure(mode, args)?;
        if !args.json {
            for (what, rates, handed) in
                [("send", &report.send, 0.0), ("receive", &report.receive, report.handed_percent)]
            {
                output::print(&format!(
                    "{:<18} {:>6} {:>8} {:>9.0} {:>9.0} {:>9.0} {:>9.2} {:>9.2} {:>9.1}\n",
                    report.mode,
                    report.bytes,
                    what,
                    rates.one_kpps,
                    rates.two_kpps,
                    rates.independent_kpps,
                    rates.two_of_one,
                    rates.two_of_independent,
                    handed
                ))?;
            }
        }
        reports.push(report);
    }
    if args.json {
        output::print_json(&reports)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Pairs of nodes and cores of each node: one, two, independent.
const SHAPES: [(usize, u8); 3] = [(1, 1), (1, 2), (2, 1)];

fn measure(mode: SteeringMode, args: &Args) -> anyhow::Result<Report> {
    let mut results: [Vec<Measured>; 3] = Default::default();
    for _ in 0..args.runs {
        for (shape, results) in SHAPES.into_iter().zip(&mut results) {
            let load = Load { mode, bytes: usize::from(args.bytes), packets: args.packets };
            results.push(bed::run(shape, &load)?);
        }
    }
    let kpps = |of: fn(&Measured) -> f64| results.each_ref().map(|results| median(results.iter().map(of)));
    Ok(Report {
        mode: mode.name(),
        bytes: args.bytes,
        send: Rates::new(kpps(|measured| measured.send_kpps)),
        receive: Rates::new(kpps(|measured| measured.receive_kpps)),
        handed_percent: median(results[1].iter().map(|measured| measured.handed_percent)),
    })
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
