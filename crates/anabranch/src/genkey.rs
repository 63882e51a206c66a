//! `anabranch genkey`

use std::os::fd::AsFd;
use std::process::ExitCode;

use zeroize::Zeroizing;

use crate::output::{complain, print};

/// Arguments of `genkey`.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  umask 077; anabranch genkey > node.key
  anabranch genkey | tee node.key | anabranch pubkey > node.pub

The key is 32 random bytes in base64, as WireGuard's tools write them; a preshared key is made the same way.")]
pub(crate) struct Args {}

/// Prints a new private key.
pub(crate) fn run(_: &Args) -> anyhow::Result<ExitCode> {
    let is_exposed =
        |stat: rustix::fs::Stat| stat.st_mode & 0o170_000 == 0o100_000 && stat.st_mode & 0o077 != 0;
    if rustix::fs::fstat(std::io::stdout().as_fd()).is_ok_and(is_exposed) {
        complain("anabranch: other users can read the file this key goes to; use umask 077");
    }
    let key = control::key::generate()?;
    let mut text = Zeroizing::new(control::key::encode(key.bytes()));
    text.push('\n');
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}
