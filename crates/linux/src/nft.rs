//! Rules of nftables, through its program.

use std::io::{self, Write as _};
use std::process::{Command, Stdio};

use crate::netns::prepare_command;

/// Lets `nft` do all of this or nothing; what it says.
pub(crate) fn nft(arguments: &[&str], script: &str) -> io::Result<String> {
    let mut command = Command::new("nft");
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    prepare_command(&mut command);
    let mut child = command.spawn().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => io::Error::new(error.kind(), "the program nft is not installed"),
        _ => error,
    })?;
    // The end of its input must come before its answer.
    if let Some(mut input) = child.stdin.take() {
        input.write_all(script.as_bytes())?;
    }
    let output = child.wait_with_output()?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    Err(io::Error::other(format!("nft: {}", text.lines().next().unwrap_or("it failed").trim())))
}
