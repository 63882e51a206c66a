//! Writing to the terminal without panicking when nobody reads any more.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use control::control_socket::{CallError, call, find};
use control::protocol::{Request, Response};

use crate::{EXIT_CONFIGURATION, EXIT_NOT_RUNNING};

/// Writes to standard output. A reader that went away (`| head`) is no error.
pub(crate) fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result,
    }
}

/// Writes a value as JSON.
pub(crate) fn print_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    Ok(print(&format!("{}\n", serde_json::to_string_pretty(value)?))?)
}

/// Writes a line to standard error, if anybody listens.
pub(crate) fn complain(line: &str) {
    let _ = writeln!(io::stderr().lock(), "{line}");
}

/// Running node that a command is for.
#[derive(clap::Args)]
pub(crate) struct RunningNode {
    /// Control socket of the node [default: the only one in /run/anabranch]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
}

impl RunningNode {
    /// The control socket that was named.
    pub(crate) fn path(&self) -> Option<&Path> {
        self.socket.as_deref()
    }

    /// Asks the node. `Err` is the exit code when there is no answer, which has been said then.
    pub(crate) fn call(&self, request: Request) -> Result<(PathBuf, Response), ExitCode> {
        self.try_call(request).map_err(|error| {
            complain(&format!("anabranch: {error}"));
            ExitCode::from(EXIT_NOT_RUNNING)
        })
    }

    /// As [`Self::call`], but nothing has been said when there is no answer.
    pub(crate) fn try_call(&self, request: Request) -> Result<(PathBuf, Response), CallError> {
        let path = find(self.socket.as_deref())?;
        let response = call(&path, request)?;
        Ok((path, response))
    }
}

impl RunningNode {
    /// Asks the node for something it can refuse. `Err` is the exit code; the reason has been said then.
    pub(crate) fn ask(&self, request: Request) -> Result<Response, ExitCode> {
        let (_, response) = self.call(request)?;
        if let Some(warning) = &response.warning {
            complain(&format!("anabranch: warning: {warning}"));
        }
        if response.ok {
            return Ok(response);
        }
        complain(&format!("anabranch: {}", response.error.as_deref().unwrap_or("refused")));
        Err(ExitCode::from(EXIT_CONFIGURATION))
    }
}

/// Whether something is at this path, a dangling link included.
pub(crate) fn exists(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}
