//! `anabranch reload`

use std::process::ExitCode;

use control::protocol::Request;

use crate::EXIT_CONFIGURATION;
use crate::output::{RunningNode, complain, print};

/// Arguments of `reload`.
#[derive(clap::Args)]
#[command(after_help = "\
Example:
  anabranch check site.toml && anabranch reload

Prints what changed. A configuration with errors is refused as a whole (exit code 1) and the old one stays in force;
what cannot change while the gateway runs is listed as needing a restart.")]
pub(crate) struct Args {
    #[command(flatten)]
    target: RunningNode,
}

/// Makes the gateway read its configuration again.
pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let response = match args.target.call(Request::Reload) {
        Ok((_, response)) => response,
        Err(code) => return Ok(code),
    };
    let Some(report) = response.reload else {
        complain(response.error.as_deref().unwrap_or("refused"));
        complain("anabranch: reload refused; the old configuration stays in force");
        return Ok(ExitCode::from(EXIT_CONFIGURATION));
    };
    for warning in &report.warnings {
        complain(warning);
    }
    let mut text = String::new();
    for change in &report.applied {
        text.push_str(&format!("{change}\n"));
    }
    for change in &report.needs_restart {
        text.push_str(&format!("needs a restart: {change}\n"));
    }
    if text.is_empty() {
        text.push_str("nothing changed\n");
    }
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}
