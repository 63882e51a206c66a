//! `anabranch health`

use std::process::ExitCode;

use linux::privileges::User;

/// Arguments of `health`.
#[derive(clap::Args)]
#[command(after_help = "\
Started by \"anabranch up\" as soon as a virtual server has health checks, with one end of a socket pair as its standard
input; ends with it. It gives up all rights before the first check.

Example:
  ps -C anabranch -o user,pid,args         the gateway and, as another user, \"anabranch health\"")]
pub(crate) struct Args {
    /// Whose rights checks have: a user's name, or its numbers
    #[arg(long, value_name = "USER", default_value = "nobody", value_parser = super::helper_user)]
    user: User,
}

/// Checks backends for a gateway.
pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    health::helper::run(&args.user)?;
    Ok(ExitCode::SUCCESS)
}
