//! `anabranch tls-path`

use std::process::ExitCode;

use linux::privileges::User;

/// Arguments of `tls-path`.
#[derive(clap::Args)]
#[command(after_help = "\
Started by \"anabranch up\" when UDP does not get through to a peer, or when peers may connect over TCP (listen-tls), with one
end of a socket pair as its standard input; ends with it. It gives up all rights before the first connection and sees
sealed datagrams only.

Example:
  ps -C anabranch -o user,pid,args         the node and, as another user, \"anabranch tls-path\"")]
pub(crate) struct Args {
    /// Whose rights it has: a user's name, or its numbers
    #[arg(long, value_name = "USER", default_value = "nobody", value_parser = super::helper_user)]
    user: User,
}

/// Carries datagrams over TCP and TLS for a node.
pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    tls_path::helper::run(&args.user)?;
    Ok(ExitCode::SUCCESS)
}
