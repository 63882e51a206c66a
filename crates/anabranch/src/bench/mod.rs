//! `anabranch bench`: in-process measurements of the engine, without any interface.

mod distribution;
mod gateway;
mod handoffs;

use std::process::ExitCode;

use clap::{Args as ClapArgs, Subcommand};

/// What to measure.
#[derive(ClapArgs)]
#[command(
    after_help = "Examples:\n  anabranch bench gateway\n  anabranch bench gateway --flows 10000000 --json"
)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Firewall, NAT and virtual servers over packets in memory
    Gateway(gateway::Args),
    /// Schemes of giving packets to cores, compared over packets in memory
    Distribution(distribution::Args),
    /// Which core gets the replies of many random flows, and whether every port is given out
    Handoffs(handoffs::Args),
}

/// Runs it.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    match &args.what {
        What::Distribution(args) => distribution::run(args),
        What::Gateway(args) => gateway::run(args),
        What::Handoffs(args) => handoffs::run(args),
    }
}
