//! `anabranch class`: which traffic class a flow is of, and why.

use std::process::ExitCode;

use control::protocol::Request;

use crate::output::{RunningNode, print, print_json};

/// Arguments of `class`.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  anabranch class 'udp 10.0.0.5:5004 > 10.9.0.7:5004'
  anabranch class 'tcp 10.0.0.5:1234 > 10.9.0.7:443' --dscp 46 --json
  anabranch class 'tcp 10.0.0.5:1234 > 10.9.0.7:443' --server-name us02web.zoom.us

Says by which [[class]] of the configuration this side sends the flow as it does, and changes nothing.
Exit code 1: the flow is not understood, or no peer has its destination.")]
pub(crate) struct Args {
    /// The flow as this side sends it: 'PROTOCOL SOURCE > DESTINATION'
    #[arg(value_name = "FLOW")]
    packet: String,
    /// DSCP of its packets, 0–63
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..64))]
    dscp: u8,
    /// Server that its client asks for by TLS or QUIC
    #[arg(long, value_name = "NAME")]
    server_name: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    target: RunningNode,
}

/// Asks the running gateway for a flow's class.
pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let request = Request::Class { packet: args.packet, dscp: args.dscp, server_name: args.server_name };
    let response = match args.target.ask(request) {
        Ok(response) => response,
        Err(code) => return Ok(code),
    };
    let found = response.class.unwrap_or_default();
    if args.json {
        print_json(&found)?;
    } else {
        let by = match &found.by {
            Some(name) => format!("by [[class]] {name}"),
            None => "no [[class]] matches; interactive if it has the shape of real-time media".to_owned(),
        };
        let core = |name: &str, core: Option<u8>| {
            core.map_or_else(String::new, |core| format!(", {name} core {core}"))
        };
        let cores = core("our", found.core) + &core("its", found.peer_core);
        print(&format!("to peer {}: {} ({by}){cores}\n", found.peer, found.class))?;
    }
    Ok(ExitCode::SUCCESS)
}
