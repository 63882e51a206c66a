//! `anabranch stop`

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use control::control_socket::CallError;
use control::event_loop;
use control::protocol::Request;

use crate::EXIT_NOT_RUNNING;
use crate::output::{RunningNode, complain, exists};

/// Arguments of `stop`.
#[derive(clap::Args)]
#[command(after_help = "\
Example:
  anabranch stop

Returns when the gateway has told its peers and taken its routes back. If it died, what keeps the kernel from
forwarding between its interfaces is removed.")]
pub(crate) struct Args {
    #[command(flatten)]
    target: RunningNode,
}

/// Stops the gateway.
pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    const PATIENCE: Duration = Duration::from_secs(15);
    let (path, response) = match args.target.try_call(Request::Stop) {
        Ok(answer) => answer,
        Err(error) => {
            complain(&format!("anabranch: {error}"));
            // Of one that cannot be reached or chosen nobody knows that it died.
            let opened = match &error {
                CallError::NotRunning(path) => after_a_death(path),
                _ => None,
            };
            return Ok(opened.unwrap_or(ExitCode::from(EXIT_NOT_RUNNING)));
        }
    };
    if let Some(warning) = &response.warning {
        complain(&format!("anabranch: warning: {warning}"));
    }
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

/// Removes what the gateway with this control socket left behind when it died. `None`: there is nothing, or it cannot be
/// removed, which was said then.
fn after_a_death(socket: &Path) -> Option<ExitCode> {
    match linux::own_tables::remove_left_by(&event_loop::last_tun(socket)?) {
        Ok(tables) if tables.is_empty() => None,
        Ok(tables) => {
            let list = tables.join(", ");
            complain(&format!(
                "anabranch: it had died; removed nft table {list}: the kernel may forward again"
            ));
            Some(ExitCode::SUCCESS)
        }
        Err(error) => {
            tracing::debug!(%error, "tables of a gateway that died");
            None
        }
    }
}
