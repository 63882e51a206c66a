//! Causes for which a connection counts as broken, and counts of them.

use rustix::io::Errno;
use serde::{Serialize, Serializer};

/// How a TCP connection broke.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The other end, or somebody between, reset it.
    Reset,
    /// The kernel gave up sending.
    TimedOut,
    /// Nobody listens, or somebody says so.
    Refused,
    /// No way to the other end, or a rule against it.
    Unreachable,
    /// A byte arrived that was not sent, or was sent by another connection.
    WrongByte,
    /// The other end finished where it should not.
    UnexpectedEnd,
    /// Nothing moved for [`super::STALL_NS`] while something was owed.
    Stall,
    /// It did not open within [`super::OPEN_NS_MAX`].
    NotOpened,
    /// Any other error of the kernel.
    Other,
}

impl Cause {
    /// All causes, in the order of the report.
    pub const ALL: [Cause; 9] = [
        Cause::Reset,
        Cause::TimedOut,
        Cause::Refused,
        Cause::Unreachable,
        Cause::WrongByte,
        Cause::UnexpectedEnd,
        Cause::Stall,
        Cause::NotOpened,
        Cause::Other,
    ];

    /// Its name in the report.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Cause::Reset => "reset",
            Cause::TimedOut => "timed_out",
            Cause::Refused => "refused",
            Cause::Unreachable => "unreachable",
            Cause::WrongByte => "wrong_byte",
            Cause::UnexpectedEnd => "unexpected_end",
            Cause::Stall => "stall",
            Cause::NotOpened => "not_opened",
            Cause::Other => "other",
        }
    }

    /// The cause behind an error of the kernel.
    #[must_use]
    pub fn of(error: Errno) -> Cause {
        match error {
            // A socket that was reset before we looked is "not connected" when it is shut down.
            Errno::CONNRESET | Errno::PIPE | Errno::CONNABORTED | Errno::NOTCONN => Cause::Reset,
            Errno::TIMEDOUT => Cause::TimedOut,
            Errno::CONNREFUSED => Cause::Refused,
            Errno::HOSTUNREACH | Errno::NETUNREACH | Errno::HOSTDOWN | Errno::ACCESS | Errno::PERM => {
                Cause::Unreachable
            }
            _ => Cause::Other,
        }
    }
}

/// Counts by cause. In JSON an object with every cause, zeros included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Causes([u64; Cause::ALL.len()]);

impl Causes {
    /// Counts read from `get`.
    #[must_use]
    pub fn from_fn(get: impl FnMut(Cause) -> u64) -> Causes {
        Causes(Cause::ALL.map(get))
    }

    /// Count of one cause.
    #[must_use]
    pub fn count(&self, cause: Cause) -> u64 {
        self.0[cause as usize]
    }

    /// Count of all causes.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }

    /// Adds other counts.
    pub fn add(&mut self, other: &Causes) {
        self.0.iter_mut().zip(other.0).for_each(|(sum, more)| *sum += more);
    }
}

impl Serialize for Causes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(Cause::ALL.iter().map(|cause| (cause.name(), self.count(*cause))))
    }
}

/// How a UDP association was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UdpCause {
    /// No answer came for [`super::STALL_NS`].
    NoAnswer,
    /// The server saw another source address or port than before.
    SourceChanged,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn every_cause_has_its_own_place_and_name() {
        for (place, cause) in Cause::ALL.into_iter().enumerate() {
            assert_eq!(cause as usize, place);
            let counts = Causes::from_fn(|other| u64::from(other == cause));
            assert_eq!((counts.count(cause), counts.total()), (1, 1));
            let json = serde_json::to_value(counts).unwrap();
            assert_eq!(json[cause.name()], 1);
            assert_eq!(json.as_object().unwrap().len(), Cause::ALL.len());
        }
    }
}
