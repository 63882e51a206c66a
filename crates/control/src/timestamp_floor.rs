//! Floor of the handshake timestamps, kept over a restart: the highest timestamp that this key may have used.
//!
//! A peer refuses timestamps that are not newer than the last one it saw. A router whose clock starts in 1970
//! at every boot would be locked out until its clock passed its own past, so the timestamps it
//! uses start above the persisted one. The file holds a *reservation*: everything up to it may be used before the
//! next write, so that a crash needs no last-minute write.
//!
//! A disk that is full or read-only costs exactly this protection, nothing else: it is said once.

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::files::{Durable, read_bounded, replace_file};

/// Timestamps are reserved so far ahead, in nanoseconds (10 minutes).
const AHEAD_NS: u64 = 600_000_000_000;

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Contents {
    /// Handshake timestamps up to here may have been used.
    timestamp_floor_ns: u64,
}

/// The state file of one key.
pub struct TimestampFloor {
    path: PathBuf,
    reserved_ns: u64,
    complained: bool,
}

impl TimestampFloor {
    /// The file of a public key within the state directory.
    #[must_use]
    pub fn new(directory: &Path, public_key: &[u8; 32]) -> Self {
        let name: String = public_key.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        Self { path: directory.join(format!("{name}.json")), reserved_ns: 0, complained: false }
    }

    /// Highest timestamp that an earlier run has reserved; 0 when there was none or the file cannot be used.
    pub fn load(&mut self) -> u64 {
        let contents = match read(&self.path) {
            Ok(contents) => contents,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return 0,
            Err(error) => {
                self.complain("cannot be read", &error);
                return 0;
            }
        };
        self.reserved_ns = contents.timestamp_floor_ns;
        contents.timestamp_floor_ns
    }

    /// Called now and then with the highest timestamp used so far; writes when the reservation runs out.
    pub fn keep(&mut self, used_ns: u64) {
        if used_ns.saturating_add(AHEAD_NS / 2) >= self.reserved_ns {
            self.store(used_ns.saturating_add(AHEAD_NS), Durable::Now);
        }
    }

    /// At an orderly end nothing more is used: the reservation shrinks to what was. A busy disk does not hold up the end:
    /// if this gets lost, the larger reservation holds.
    pub fn finish(&mut self, used_ns: u64) {
        self.store(used_ns, Durable::Later);
    }

    fn store(&mut self, reserved_ns: u64, durable: Durable) {
        match write(&self.path, &Contents { timestamp_floor_ns: reserved_ns }, durable) {
            Ok(()) => {
                self.reserved_ns = reserved_ns;
                self.complained = false;
            }
            Err(error) => self.complain("cannot be written", &error),
        }
    }

    fn complain(&mut self, what: &str, error: &io::Error) {
        if !self.complained {
            let path = self.path.display();
            tracing::warn!(
                "the state file {path} {what} ({error}); with a wrong clock after the next start, peers may refuse us for a while"
            );
            self.complained = true;
        }
    }
}

fn read(path: &Path) -> io::Result<Contents> {
    Ok(serde_json::from_str(&read_bounded(path, 4096)?)?)
}

fn write(path: &Path, contents: &Contents, durable: Durable) -> io::Result<()> {
    let mut text = serde_json::to_string(contents)?;
    text.push('\n');
    replace_file(path, text.as_bytes(), durable)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use std::fs;

    use super::*;

    fn directory(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("anabranch-state-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        path
    }

    #[test]
    fn a_restart_starts_above_everything_used() {
        let directory = directory("restart").join("made/here");
        let open = || TimestampFloor::new(&directory, &[7; 32]);
        let mut first = open();
        assert_eq!(first.load(), 0);
        first.keep(1000);
        // Killed here: the next run must start above all that the first one may have used.
        let mut second = open();
        assert_eq!(second.load(), 1000 + AHEAD_NS);
        second.keep(2000);
        assert_eq!(open().load(), 1000 + AHEAD_NS);
        second.keep(1000 + AHEAD_NS);
        assert_eq!(open().load(), 1000 + 2 * AHEAD_NS);
        second.finish(5000 + AHEAD_NS);
        assert_eq!(open().load(), 5000 + AHEAD_NS);
        assert_eq!(TimestampFloor::new(&directory, &[8; 32]).load(), 0);
        let left: Vec<_> = fs::read_dir(&directory).unwrap().collect();
        assert_eq!(left.len(), 1);
        fs::remove_dir_all(directory.parent().unwrap().parent().unwrap()).unwrap();
    }

    #[test]
    fn garbage_and_unwritable_places_only_cost_the_floor() {
        let directory = directory("garbage");
        fs::create_dir_all(&directory).unwrap();
        let mut state = TimestampFloor::new(&directory, &[1; 32]);
        fs::write(&state.path, "{\"timestamp-floor-ns\": \"soon\"}").unwrap();
        assert_eq!(state.load(), 0);
        state.keep(5);
        assert_eq!(TimestampFloor::new(&directory, &[1; 32]).load(), 5 + AHEAD_NS);
        // The "directory" is a file: nothing can be written, nothing panics.
        let mut nowhere = TimestampFloor::new(&state.path, &[1; 32]);
        assert_eq!(nowhere.load(), 0);
        nowhere.keep(5);
        nowhere.finish(6);
        fs::remove_dir_all(&directory).unwrap();
    }
}
