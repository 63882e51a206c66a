//! An operating-system error together with what was tried.

use std::fmt::Display;
use std::io;

/// A system call that failed while configuring something: what was tried, and the kernel's answer.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}")]
pub struct Error {
    what: String,
    source: io::Error,
}

/// The result of a configuration call.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error with its context.
    pub fn new(what: impl Into<String>, source: io::Error) -> Error {
        Error { what: what.into(), source }
    }

    /// Operation that was tried, for example `open /dev/net/tun`.
    pub fn what(&self) -> &str {
        &self.what
    }

    /// The kind of the operating system's error.
    pub fn kind(&self) -> io::ErrorKind {
        self.source.kind()
    }

    /// The error number (`errno`) if the kernel gave one.
    pub fn raw_os_error(&self) -> Option<i32> {
        self.source.raw_os_error()
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> io::Error {
        io::Error::new(error.kind(), error)
    }
}

/// Adds what was tried to an [`io::Result`].
pub(crate) trait Context<T> {
    fn context(self, what: impl Display) -> Result<T>;
}

impl<T, E: Into<io::Error>> Context<T> for std::result::Result<T, E> {
    fn context(self, what: impl Display) -> Result<T> {
        self.map_err(|error| Error::new(what.to_string(), error.into()))
    }
}
