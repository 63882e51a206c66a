//! `anabranch pubkey`

use std::io::Read;
use std::process::ExitCode;

use zeroize::Zeroizing;

use crate::EXIT_CONFIGURATION;
use crate::output::{complain, print};

/// Arguments of `pubkey`.
#[derive(clap::Args)]
#[command(after_help = "\
Example:
  anabranch pubkey < node.key")]
pub(crate) struct Args {}

/// Reads a private key from standard input and prints its public key.
pub(crate) fn run(_: &Args) -> anyhow::Result<ExitCode> {
    /// A key is one short line; whatever is piped in, no more than this is read.
    const BYTES_MAX: u64 = 4096;
    let mut text = Zeroizing::new(String::new());
    std::io::stdin().lock().take(BYTES_MAX).read_to_string(&mut text)?;
    match control::key::decode_secret(&text) {
        Ok(key) => {
            print(&format!("{}\n", control::key::encode(&key.public())))?;
            Ok(ExitCode::SUCCESS)
        }
        Err(error) => {
            complain(&format!(
                "anabranch: standard input is not a private key: {error}; give it what \"anabranch genkey\" prints"
            ));
            Ok(ExitCode::from(EXIT_CONFIGURATION))
        }
    }
}
