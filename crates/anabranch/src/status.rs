//! `anabranch status`

use std::process::ExitCode;

use control::protocol::FlowFilter;
use control::protocol::{Request, Response};

use crate::output::{RunningNode, complain, print, print_json};
use crate::{EXIT_COMMAND_LINE, EXIT_NOT_RUNNING};

/// Arguments of `status`.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  anabranch status
  anabranch status --json | jq '.peers[].paths[] | {wan, state, rtt_ms}'
  anabranch status --json | jq '.gateway.virtual_servers[].backends'
  anabranch status --flows --match 'tcp 10.0.0.5 port 443' --limit 20

A match is words in any order, all of which must hold: a protocol, addresses, prefixes, address:port, port N,
interface NAME, tenant NAME, core N. Addresses and ports are compared before and after translation.")]
pub(crate) struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// List the flows of the gateway's interfaces
    #[arg(long)]
    flows: bool,
    /// Only flows that match, for example 'udp 10.0.0.0/24 port 53'
    #[arg(long = "match", value_name = "WORDS", requires = "flows")]
    matching: Option<String>,
    /// How many flows at most
    #[arg(long, value_name = "N", default_value_t = 100, requires = "flows")]
    limit: usize,
    #[command(flatten)]
    target: RunningNode,
}

/// Shows the live state.
pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    if args.flows {
        return flows(args);
    }
    let response = match args.target.call(Request::Status) {
        Ok((_, response)) => response,
        Err(code) => return Ok(code),
    };
    let Response { status: Some(report), .. } = response else {
        complain(&format!("anabranch: {}", response.error.as_deref().unwrap_or("the answer has no status")));
        return Ok(ExitCode::from(EXIT_NOT_RUNNING));
    };
    if args.json {
        print_json(&report)?;
    } else {
        print(&control::status::text(&report))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn flows(args: &Args) -> anyhow::Result<ExitCode> {
    let filter = match args.matching.as_deref().unwrap_or("").parse::<FlowFilter>() {
        Ok(filter) => filter,
        Err(message) => {
            complain(&format!("anabranch: --match: {message}"));
            return Ok(ExitCode::from(EXIT_COMMAND_LINE));
        }
    };
    let response = match args.target.ask(Request::Flows { filter, limit: args.limit }) {
        Ok(response) => response,
        Err(code) => return Ok(code),
    };
    let list = response.flows.unwrap_or_default();
    if args.json {
        print_json(&list)?;
    } else {
        print(&control::status::flows(&list))?;
    }
    Ok(ExitCode::SUCCESS)
}
