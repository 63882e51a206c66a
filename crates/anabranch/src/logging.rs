//! The log: to standard error, or to a file that may fill its disk without the gateway noticing more than that.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Context;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use crate::output::complain;

/// Starts logging to standard error.
pub(crate) fn to_stderr(filter: Option<&str>, default: &str) -> anyhow::Result<()> {
    start(filter, default, None)
}

/// Starts logging to a file, or to standard error.
pub(crate) fn start(filter: Option<&str>, default: &str, file: Option<LogFile>) -> anyhow::Result<()> {
    let from_environment = ["ANABRANCH_LOG", "RUST_LOG"].iter().find_map(|name| std::env::var(name).ok());
    let filter = match filter {
        Some(text) => {
            EnvFilter::try_new(text).with_context(|| format!("--log {text}: not a level or filter"))?
        }
        // A variable that is set for other programs must not keep this one from starting.
        None => from_environment
            .and_then(|text| EnvFilter::try_new(text).ok())
            .unwrap_or_else(|| EnvFilter::new(default)),
    };
    let to_journal = file.is_none() && std::env::var_os("JOURNAL_STREAM").is_some();
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_target(false)
        // It would report a failed write to standard error, and panic if that fails too.
        .log_internal_errors(false)
        .with_writer(Output { file });
    let result = if to_journal { subscriber.without_time().try_init() } else { subscriber.try_init() };
    result.map_err(|error| anyhow::anyhow!("cannot start the log: {error}"))
}

/// A log file that is shared by all threads.
#[derive(Clone)]
pub(crate) struct LogFile(Arc<Mutex<Inner>>);

struct Inner {
    path: PathBuf,
    file: Option<File>,
    failing: bool,
}

impl LogFile {
    /// Opens a log file. If that fails it is said, and lines go to standard error until [`Self::reopen`] succeeds.
    pub(crate) fn open(path: &Path) -> Self {
        let log = Self(Arc::new(Mutex::new(Inner { path: path.to_owned(), file: None, failing: false })));
        log.reopen();
        log
    }

    /// Opens the file of this name anew, after the old one was renamed.
    pub(crate) fn reopen(&self) {
        let mut inner = self.lock();
        match OpenOptions::new().append(true).create(true).mode(0o640).open(&inner.path) {
            Ok(file) => {
                inner.file = Some(file);
                inner.failing = false;
            }
            Err(error) => {
                let path = inner.path.display();
                complain(&format!(
                    "anabranch: cannot open the log file {path}: {error}; the gateway goes on"
                ));
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Output {
    file: Option<LogFile>,
}

impl<'a> MakeWriter<'a> for Output {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        match &self.file {
            Some(file) => Line::File(file.lock()),
            None => Line::Stderr,
        }
    }
}

/// One line of the log. Writing never fails: who logs cannot do anything about a full disk.
enum Line<'a> {
    Stderr,
    File(MutexGuard<'a, Inner>),
}

impl Write for Line<'_> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let inner = match self {
            Self::Stderr => {
                let _ = io::stderr().lock().write_all(line);
                return Ok(line.len());
            }
            Self::File(inner) => inner,
        };
        let Some(file) = &mut inner.file else {
            let _ = io::stderr().lock().write_all(line);
            return Ok(line.len());
        };
        match file.write_all(line) {
            Ok(()) => inner.failing = false,
            Err(error) => {
                if !inner.failing {
                    let path = inner.path.display();
                    complain(&format!(
                        "anabranch: cannot write the log file {path}: {error}; lines are lost, the gateway goes on"
                    ));
                }
                inner.failing = true;
            }
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn write(log: &LogFile, text: &str) {
        Output { file: Some(log.clone()) }.make_writer().write_all(text.as_bytes()).unwrap();
    }

    #[test]
    fn a_rotated_file_is_opened_anew() {
        let path = std::env::temp_dir().join(format!("anabranch-log-{}", std::process::id()));
        let rotated = path.with_extension("1");
        let log = LogFile::open(&path);
        write(&log, "one\n");
        std::fs::rename(&path, &rotated).unwrap();
        write(&log, "two\n");
        log.reopen();
        write(&log, "three\n");
        assert_eq!(std::fs::read_to_string(&rotated).unwrap(), "one\ntwo\n");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "three\n");
        std::fs::remove_file(&path).unwrap();
        std::fs::remove_file(&rotated).unwrap();
    }

    #[test]
    fn a_full_disk_and_an_unusable_path_stop_nobody() {
        // The device that is always full.
        let log = LogFile::open(Path::new("/dev/full"));
        write(&log, "lost\n");
        assert!(log.lock().failing);
        write(&log, "lost as well\n");
        let log = LogFile::open(Path::new("/nonexistent/directory/x.log"));
        write(&log, "");
        assert!(log.lock().file.is_none());
    }
}
