//! `anabranch bench`: in-process measurements of the engine, without any interface.

mod dispatch;
mod distribution;
mod gateway;
mod handoffs;
mod limit;
mod seal;

use std::process::ExitCode;

use clap::{Args as ClapArgs, Subcommand};

/// Measurement.
#[derive(ClapArgs)]
#[command(
    after_help = "Examples:\n  anabranch bench gateway\n  anabranch bench gateway --flows 10000000 --json"
)]
pub struct Args {
    #[command(subcommand)]
    measurement: Measurement,
}

#[derive(Subcommand)]
enum Measurement {
    /// Firewall, NAT and virtual servers over packets in memory
    Gateway(gateway::Args),
    /// A cluster's dispatcher over packets in memory, and its tables
    Dispatch(dispatch::Args),
    /// Schemes of giving packets to cores, compared over packets in memory
    Distribution(distribution::Args),
    /// Sealing and opening datagrams of the tunnel
    Seal(seal::Args),
    /// Which core gets the replies of many random flows, and whether every port is given out
    Handoffs(handoffs::Args),
}

/// Runs it.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    match &args.measurement {
        Measurement::Dispatch(args) => dispatch::run(args),
        Measurement::Distribution(args) => distribution::run(args),
        Measurement::Gateway(args) => gateway::run(args),
        Measurement::Handoffs(args) => handoffs::run(args),
        Measurement::Seal(args) => seal::run(args),
    }
}
