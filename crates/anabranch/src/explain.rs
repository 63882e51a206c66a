//! `anabranch explain`

use std::process::ExitCode;

use control::protocol::Request;

use crate::output::{RunningNode, print, print_json};

/// Arguments of `explain`.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  anabranch explain 'tcp 10.0.0.5:1234 > 1.2.3.4:443'
  anabranch explain 'icmp 10.0.0.5 > 1.2.3.4 id 7' --interface lan --json

Prints the core, the rule, the backend, the translation and the route that the packet would get, and changes nothing.
Exit code 0 also when the answer is \"drop\". 1: the packet is not understood.")]
pub(crate) struct Args {
    /// The packet: 'PROTOCOL SOURCE > DESTINATION'
    #[arg(value_name = "PACKET")]
    packet: String,
    /// Interface it comes in at, "peer:NAME" or "gateway" [default: where its source is]
    #[arg(long, value_name = "NAME")]
    interface: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    target: RunningNode,
}

/// Explains a packet.
pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let request = Request::Explain { packet: args.packet, interface: args.interface };
    let response = match args.target.ask(request) {
        Ok(response) => response,
        Err(code) => return Ok(code),
    };
    let about = response.explanation.unwrap_or_default();
    if args.json {
        print_json(&about)?;
    } else {
        print(&control::status::explanation(&about))?;
    }
    Ok(ExitCode::SUCCESS)
}
