//! `anabranch launch`

use std::process::ExitCode;

/// Arguments of `launch`.
#[derive(clap::Args)]
#[command(after_help = "\
Started by \"anabranch up\" before it gives up the right to execute programs, with one end of a socket pair as its standard
input; ends with it. It starts \"anabranch health\", \"anabranch tls-path\", nft and iptables-save, and nothing else.

Example:
  ps -C anabranch -o pid,args         the gateway, \"anabranch launch\", and what that has started")]
pub(crate) struct Args {}

/// Starts programs for a node.
pub(crate) fn run(_: &Args) -> anyhow::Result<ExitCode> {
    linux::launcher::serve()?;
    Ok(ExitCode::SUCCESS)
}
