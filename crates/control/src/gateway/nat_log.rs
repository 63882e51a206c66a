//! The log of address translation: one JSON line for every outside port or block that somebody gets or gives back.
//!
//! It answers who had an address and a port at a time (RFC 6888 REQ-12). Rotate it by renaming the file and sending
//! SIGHUP. A line that cannot be written is lost and said, once; traffic does not wait for a disk.
//!
//! Lines about the log itself have an event and a note only: "log-begins", "log-ends" (everything open ends there) and
//! "lost" with the number of lines that are missing.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::Serialize;
use services::nat::{NatEvent, NatEventKind};

use crate::config::services::values::protocol_text;

/// Note of the first line of a run.
pub const BEGUN: &str = "the gateway starts: nothing is open";
/// Note of the first line of a log that was switched on later.
pub const BEGUN_LATE: &str = "switched on while running: what is open already is not listed";
/// Note of the last line of a run.
pub const ENDED: &str = "the gateway ends: everything that is open ends here";
/// Note of the last line of a log that was switched off or goes on in another file.
pub const MOVED: &str = "switched off or moved by a reload: what is open goes on";

/// The log file, or none.
#[derive(Default)]
pub struct NatLog {
    path: Option<PathBuf>,
    file: Option<BufWriter<File>>,
    complained: bool,
    /// Lines that are known to be missing since the start, in whichever file that was said.
    lost: u64,
}

/// A line about the log itself.
#[derive(Serialize)]
struct Remark<'a> {
    time_unix_ms: u64,
    event: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    lines: Option<u64>,
    note: &'a str,
}

/// One line.
#[derive(Serialize)]
struct Line<'a> {
    time_unix_ms: u64,
    event: NatEventKind,
    #[serde(skip_serializing_if = "str::is_empty")]
    tenant: &'a str,
    /// "tcp"; "any" for blocks.
    protocol: String,
    inside: SocketAddr,
    outside: SocketAddr,
    #[serde(skip_serializing_if = "is_one")]
    ports: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    remote: Option<SocketAddr>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn is_one(ports: &u32) -> bool {
    *ports == 1
}

impl NatLog {
    /// Writes to the file at this path from now on, if any. `running`: what is open already is not listed there.
    pub fn follow(&mut self, path: Option<&Path>, running: bool, unix_ns: u64) {
        if path == self.path.as_deref() {
            return;
        }
        self.end(unix_ns, MOVED);
        self.path = path.map(Path::to_owned);
        self.reopen();
        self.remark(unix_ns, "log-begins", None, if running { BEGUN_LATE } else { BEGUN });
    }

    /// Whether there is one.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.path.is_some()
    }

    /// Writes at the next line to a new file of the same name, after the old one was renamed.
    pub fn reopen(&mut self) {
        self.file = None;
        self.complained = false;
    }

    /// Writes events. `tenants` are the names by number; `clocks` is a moment: monotonic and since 1970, both ns.
    pub fn write(&mut self, events: &[NatEvent], tenants: &[String], clocks: (u64, u64)) {
        if events.is_empty() || !self.is_on() {
            return;
        }
        let result = self.try_write(events, tenants, clocks);
        self.settle(result);
    }

    /// The log ends here.
    pub fn end(&mut self, unix_ns: u64, note: &str) {
        self.remark(unix_ns, "log-ends", None, note);
    }

    /// So many lines have been lost since the start: writes how many more than at the last call.
    pub fn lost(&mut self, total: u64, unix_ns: u64) {
        let more = total.saturating_sub(self.lost);
        if more > 0 {
            self.lost = total;
            tracing::error!(lines = more, "NAT events are lost: there are more than can be kept");
            self.remark(unix_ns, "lost", Some(more), "lines are missing before this one");
        }
    }

    fn remark(&mut self, unix_ns: u64, event: &str, lines: Option<u64>, note: &str) {
        if !self.is_on() {
            return;
        }
        let remark = Remark { time_unix_ms: unix_ns / 1_000_000, event, lines, note };
        let result = self.open().and_then(|file| {
            serde_json::to_writer(&mut *file, &remark)?;
            file.write_all(b"\n")?;
            file.flush()
        });
        self.settle(result);
    }

    fn settle(&mut self, result: io::Result<()>) {
        match result {
            Ok(()) => self.complained = false,
            Err(error) => {
                self.file = None;
                if !self.complained {
                    self.complained = true;
                    let path = self.path.as_deref().unwrap_or(Path::new("")).display();
                    tracing::error!("NAT events are lost: {path} cannot be written: {error}");
                }
            }
        }
    }

    fn open(&mut self) -> io::Result<&mut BufWriter<File>> {
        let file = match self.file.take() {
            Some(file) => file,
            None => {
                let path = self.path.as_ref().ok_or(io::ErrorKind::NotFound)?;
                let file = OpenOptions::new().append(true).create(true).mode(0o640).open(path)?;
                BufWriter::new(file)
            }
        };
        Ok(self.file.insert(file))
    }

    fn try_write(&mut self, events: &[NatEvent], tenants: &[String], clocks: (u64, u64)) -> io::Result<()> {
        let file = self.open()?;
        for event in events {
            serde_json::to_writer(&mut *file, &line(event, tenants, clocks))?;
            file.write_all(b"\n")?;
        }
        file.flush()
    }
}

fn line<'a>(event: &NatEvent, tenants: &'a [String], (monotonic_ns, unix_ns): (u64, u64)) -> Line<'a> {
    let ago = monotonic_ns.saturating_sub(event.at_ns);
    Line {
        time_unix_ms: unix_ns.saturating_sub(ago) / 1_000_000,
        event: event.kind,
        tenant: tenants.get(usize::from(event.tenant)).map_or("", String::as_str),
        protocol: if event.protocol == 0 { "any".to_owned() } else { protocol_text(event.protocol) },
        inside: event.inside,
        outside: event.outside,
        ports: event.ports,
        remote: event.remote,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn lines_say_who_and_when() {
        let path = std::env::temp_dir().join(format!("anabranch-nat-log-{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let event = NatEvent {
            at_ns: 5_000_000,
            kind: NatEventKind::Opened,
            tenant: 1,
            protocol: 6,
            inside: "10.0.0.5:1234".parse().unwrap(),
            outside: "203.0.113.1:2048".parse().unwrap(),
            ports: 1,
            remote: Some("198.51.100.7:443".parse().unwrap()),
        };
        let block = NatEvent {
            kind: NatEventKind::BlockReturned,
            tenant: 0,
            protocol: 0,
            ports: 1024,
            remote: None,
            ..event
        };
        let mut log = NatLog::default();
        log.follow(Some(&path), false, 3_000_000);
        log.write(
            &[event, block],
            &[String::new(), "red".to_owned()],
            (9_000_000, 1_700_000_000_009_000_000),
        );
        log.reopen();
        log.write(&[block], &[], (5_000_000, 7_000_000));
        log.lost(5, 8_000_000);
        log.lost(5, 9_000_000);
        log.lost(7, 9_000_000);
        log.end(10_000_000, ENDED);
        let text = std::fs::read_to_string(&path).unwrap();
        let expected = "\
{\"time_unix_ms\":3,\"event\":\"log-begins\",\"note\":\"the gateway starts: nothing is open\"}
{\"time_unix_ms\":1700000000005,\"event\":\"opened\",\"tenant\":\"red\",\"protocol\":\"tcp\",\"inside\":\"10.0.0.5:1234\",\
\"outside\":\"203.0.113.1:2048\",\"remote\":\"198.51.100.7:443\"}
{\"time_unix_ms\":1700000000005,\"event\":\"block-returned\",\"protocol\":\"any\",\"inside\":\"10.0.0.5:1234\",\
\"outside\":\"203.0.113.1:2048\",\"ports\":1024}
{\"time_unix_ms\":7,\"event\":\"block-returned\",\"protocol\":\"any\",\"inside\":\"10.0.0.5:1234\",\
\"outside\":\"203.0.113.1:2048\",\"ports\":1024}
{\"time_unix_ms\":8,\"event\":\"lost\",\"lines\":5,\"note\":\"lines are missing before this one\"}
{\"time_unix_ms\":9,\"event\":\"lost\",\"lines\":2,\"note\":\"lines are missing before this one\"}
{\"time_unix_ms\":10,\"event\":\"log-ends\",\"note\":\"the gateway ends: everything that is open ends here\"}
";
        assert_eq!(text, expected);
        std::fs::remove_file(&path).unwrap();
    }

    /// Losses that one file told of are not told again in the next one.
    #[test]
    fn losses_are_told_once_wherever_the_log_goes() {
        let path = |number: u8| {
            std::env::temp_dir().join(format!("anabranch-nat-log-{number}-{}", std::process::id()))
        };
        let said = |number: u8| {
            let text = std::fs::read_to_string(path(number)).unwrap();
            std::fs::remove_file(path(number)).unwrap();
            let lines = text.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
            lines.filter_map(|line| line["lines"].as_u64()).collect::<Vec<_>>()
        };
        let mut log = NatLog::default();
        log.follow(Some(&path(1)), false, 1);
        log.lost(5, 2);
        log.follow(Some(&path(2)), true, 3);
        log.lost(5, 4);
        log.lost(6, 5);
        log.follow(None, true, 6);
        log.lost(6, 7);
        log.follow(Some(&path(3)), true, 8);
        log.lost(6, 9);
        assert_eq!([said(1), said(2), said(3)], [vec![5], vec![1], vec![]]);
    }
}
