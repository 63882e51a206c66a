//! `anabranch stop`

use std::process::ExitCode;
use std::time::{Duration, Instant};

use control::protocol::Request;

use crate::EXIT_NOT_RUNNING;
use crate::output::{RunningNode, complain, exists};

/// Arguments of `stop`.
#[derive(clap::Args)]
#[command(after_help = "\
Example:
  anabranch stop

Returns when the gateway has told its peers and taken its routes back.")]
pub(crate) struct Args {
    #[command(flatten)]
    target: RunningNode,
}

/// Stops the gateway.
pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    const PATIENCE: Duration = Duration::from_secs(15);
    let (path, response) = match args.target.call(Request::Stop) {
        Ok(answer) => answer,
        Err(code) => return Ok(code),
    };
    if !response.ok {
        complain(&format!("anabranch: {}", response.error.as_deref().unwrap_or("refused")));
        return Ok(ExitCode::from(EXIT_NOT_RUNNING));
    }
    // The socket goes last.
    let deadline = Instant::now() + PATIENCE;
    while exists(&path) {
        if Instant::now() >= deadline {
            complain("anabranch: the gateway is still busy going down");
            return Ok(ExitCode::from(EXIT_NOT_RUNNING));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(ExitCode::SUCCESS)
}
