//! Small files that survive a restart: read with a limit, replaced in one step.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

/// When contents must be on the disk.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Durable {
    /// Written to the disk before the call returns.
    Now,
    /// When the kernel likes: a power failure may bring the old contents back.
    Later,
}

/// The text of a file, cut after so many bytes.
pub fn read_bounded(path: &Path, bytes_max: u64) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(bytes_max).read_to_string(&mut text)?;
    Ok(text)
}

/// Keeps a value in a file, until there is none.
pub fn remember(path: &Path, value: Option<&impl serde::Serialize>) -> io::Result<()> {
    let Some(value) = value else {
        return match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        };
    };
    replace_file(path, &serde_json::to_vec(value)?, Durable::Later)
}

/// Replaces the file in one step: whoever reads it finds the old or the new contents; if it is to be durable now, also after
/// a power failure.
pub fn replace_file(path: &Path, contents: &[u8], durable: Durable) -> io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    let temporary = path.with_extension("new");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    let mut written = file.write_all(contents);
    if durable == Durable::Now {
        written = written.and_then(|()| file.sync_all());
    }
    let result = written.and_then(|()| fs::rename(&temporary, path));
    if result.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    result?;
    if durable == Durable::Later {
        return Ok(());
    }
    File::open(directory)?.sync_all()
}
