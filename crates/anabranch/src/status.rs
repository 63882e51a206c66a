//! `anabranch status`

use std::process::ExitCode;

use control::socket::{Request, Response};

use crate::EXIT_NOT_RUNNING;
use crate::output::{Target, complain, print};

/// Arguments of `status`.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  anabranch status
  anabranch status --json | jq '.peers[].paths[] | {wan, state, rtt_ms}'")]
pub(crate) struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    target: Target,
}

/// Shows the live state.
pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let response = match args.target.call(Request::Status) {
        Ok((_, response)) => response,
        Err(code) => return Ok(code),
    };
    let Response { status: Some(report), .. } = response else {
        complain(&format!("anabranch: {}", response.error.as_deref().unwrap_or("the answer has no status")));
        return Ok(ExitCode::from(EXIT_NOT_RUNNING));
    };
    if args.json {
        print(&format!("{}\n", serde_json::to_string_pretty(&report)?))?;
    } else {
        print(&control::report::text(&report))?;
    }
    Ok(ExitCode::SUCCESS)
}
