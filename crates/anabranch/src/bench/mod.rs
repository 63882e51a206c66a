//! `anabranch bench`: measurements. All but `scale`, `crash` and `relay` are in-process, without any interface.

mod dispatch;
mod distribution;
mod gateway;
mod handoffs;
mod limit;
mod relay;
mod seal;
mod tunnel;

use std::process::ExitCode;

use clap::{Args as ClapArgs, Subcommand};

use crate::scale;

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
    /// Real connections through a cluster whose units come and go
    Scale(scale::Args),
    /// A data plane of a cluster that stops for a moment, and one that dies, under connections
    Crash(scale::crash::Args),
    /// A cluster's dispatcher over packets in memory, and its tables
    Dispatch(dispatch::Args),
    /// Schemes of giving packets to cores, compared over packets in memory
    Distribution(distribution::Args),
    /// Bare relay of a TUN device over UDP, to compare with; its key is public
    Relay(relay::Args),
    /// Sealing and opening datagrams of the tunnel
    Seal(seal::Args),
    /// Cores of two nodes that seal, open and deliver packets in memory, by steering mode
    Tunnel(tunnel::Args),
    /// Which core gets the replies of many random flows, and whether every port is given out
    Handoffs(handoffs::Args),
}

/// Runs it.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    match &args.measurement {
        Measurement::Crash(args) => scale::crash::run(args),
        Measurement::Dispatch(args) => dispatch::run(args),
        Measurement::Distribution(args) => distribution::run(args),
        Measurement::Gateway(args) => gateway::run(args),
        Measurement::Handoffs(args) => handoffs::run(args),
        Measurement::Scale(args) => scale::run(args),
        Measurement::Relay(args) => relay::run(args),
        Measurement::Seal(args) => seal::run(args),
        Measurement::Tunnel(args) => tunnel::run(args),
    }
}
