//! Rules of nftables, through its program.

use std::io::{self, Read as _, Write as _};

use crate::launcher::{self, Program, Streams};

/// Lets `nft` do all of this or nothing.
pub(crate) fn rules(script: &str) -> io::Result<()> {
    // Both into one pipe: whichever is longer, nobody waits for the other.
    let ((input, mut to), (mut from, output)) = (io::pipe()?, io::pipe()?);
    let streams = Streams { input: input.into(), errors: output.try_clone()?.into(), output: output.into() };
    let mut launched = launcher::spawn(Program::NftRules, streams).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => io::Error::new(error.kind(), "the program nft is not installed"),
        _ => error,
    })?;
    // The end of its input must come before its answer.
    let written = to.write_all(script.as_bytes());
    drop(to);
    let mut said = Vec::new();
    from.read_to_end(&mut said)?;
    if launched.wait()?.success() {
        return written;
    }
    let text = String::from_utf8_lossy(&said);
    Err(io::Error::other(format!("nft: {}", text.lines().next().unwrap_or("it failed").trim())))
}
