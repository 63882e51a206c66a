//! `anabranch lease`

use std::net::IpAddr;
use std::process::ExitCode;

use control::config::values::{ValueError, prefix};
use control::protocol::LeaseWish;
use control::protocol::Request;
use ipnet::IpNet;

use crate::output::{RunningNode, print, print_json};

/// Arguments of `lease`.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  anabranch lease take pod-1 --from 10.0.1.0/24 --ports 2048
  anabranch lease list --json
  anabranch lease list --nft | nft -f -        on the pod host: the kernel enforces the same ranges
  anabranch lease return pod-1

A lease is a range of ports of one outside address, in whole blocks of 1024, for one holder. It survives restarts.
Taking it again with the same words gives the same range. Exit code 1: refused, with the reason.")]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Take a range of ports; prints it
    #[command(after_help = "\
Examples:
  anabranch lease take pod-1 --from 10.0.1.0/24 --ports 2048
  anabranch lease take pod-2 --from 10.0.2.7 --tenant red --address 203.0.113.32

Taking it again with the same words gives the same range. Exit code 1: refused, with the reason.")]
    Take {
        /// Who holds it
        name: String,
        /// Whose packets use it
        #[arg(long, value_name = "PREFIX", value_parser = net)]
        from: IpNet,
        /// Tenant of these packets [default: the shared one]
        #[arg(long, value_name = "NAME")]
        tenant: Option<String>,
        /// How many ports
        #[arg(long, value_name = "N", default_value_t = 1024)]
        ports: u32,
        /// Outside address [default: the first with room]
        #[arg(long, value_name = "ADDRESS")]
        address: Option<IpAddr>,
        /// Print JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        target: RunningNode,
    },
    /// Give a range back
    Return {
        /// Who holds it
        name: String,
        #[command(flatten)]
        target: RunningNode,
    },
    /// List all leases
    List {
        /// Print JSON
        #[arg(long, conflicts_with = "nft")]
        json: bool,
        /// Print rules for nftables that enforce the same ranges in the kernel of a pod host
        #[arg(long)]
        nft: bool,
        #[command(flatten)]
        target: RunningNode,
    },
}

/// Network of a command's argument, without host bits.
pub(crate) fn net(text: &str) -> Result<IpNet, ValueError> {
    prefix(text).map(|net| net.trunc())
}

/// Takes, returns or lists leases.
pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let (request, target, json, nft) = match args.command {
        Command::Take { name, from, tenant, ports, address, json, target } => {
            (Request::LeaseTake(LeaseWish { name, from, tenant, address, ports }), target, json, false)
        }
        Command::Return { name, target } => (Request::LeaseReturn { name }, target, false, false),
        Command::List { json, nft, target } => (Request::LeaseList, target, json, nft),
    };
    let response = match target.ask(request) {
        Ok(response) => response,
        Err(code) => return Ok(code),
    };
    let Some(leases) = response.leases else { return Ok(ExitCode::SUCCESS) };
    if nft {
        print(&control::gateway::overrides::nftables(&leases))?;
    } else if json {
        print_json(&leases)?;
    } else {
        print(&control::status::leases(&leases))?;
    }
    Ok(ExitCode::SUCCESS)
}
