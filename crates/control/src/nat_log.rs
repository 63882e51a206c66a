//! The log of address translation: one JSON line for every outside port or block that somebody gets or gives back.
//!
//! It answers who had an address and a port at a time (RFC 6888 REQ-12). Rotate it by renaming the file and sending
//! SIGHUP. A line that cannot be written is lost and said, once; traffic does not wait for a disk.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::Serialize;
use services::nat::{NatEvent, NatEventKind};

use crate::config::services::values::protocol_text;

/// The log file.
pub struct NatLog {
    path: PathBuf,
    file: Option<BufWriter<File>>,
    complained: bool,
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
    /// A log at this path, opened with the first line.
    #[must_use]
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), file: None, complained: false }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes at the next line to a new file of the same name, after the old one was renamed.
    pub fn reopen(&mut self) {
        self.file = None;
        self.complained = false;
    }

    /// Writes events. `tenants` are the names by number; `clocks` is a moment: monotonic and since 1970, both ns.
    pub fn write(&mut self, events: &[NatEvent], tenants: &[String], clocks: (u64, u64)) {
        if events.is_empty() {
            return;
        }
        let result = self.try_write(events, tenants, clocks);
        match result {
            Ok(()) => self.complained = false,
            Err(error) => {
                self.file = None;
                if !self.complained {
                    self.complained = true;
                    tracing::error!(
                        "NAT events are lost: {} cannot be written: {error}",
                        self.path.display()
                    );
                }
            }
        }
    }

    fn try_write(&mut self, events: &[NatEvent], tenants: &[String], clocks: (u64, u64)) -> io::Result<()> {
        if self.file.is_none() {
            let file = OpenOptions::new().append(true).create(true).mode(0o640).open(&self.path)?;
            self.file = Some(BufWriter::new(file));
        }
        let Some(file) = &mut self.file else { return Ok(()) };
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
        let mut log = NatLog::new(&path);
        log.write(
            &[event, block],
            &[String::new(), "red".to_owned()],
            (9_000_000, 1_700_000_000_009_000_000),
        );
        log.reopen();
        log.write(&[block], &[], (5_000_000, 7_000_000));
        let text = std::fs::read_to_string(&path).unwrap();
        let expected = "\
{\"time_unix_ms\":1700000000005,\"event\":\"opened\",\"tenant\":\"red\",\"protocol\":\"tcp\",\"inside\":\"10.0.0.5:1234\",\
\"outside\":\"203.0.113.1:2048\",\"remote\":\"198.51.100.7:443\"}
{\"time_unix_ms\":1700000000005,\"event\":\"block-returned\",\"protocol\":\"any\",\"inside\":\"10.0.0.5:1234\",\
\"outside\":\"203.0.113.1:2048\",\"ports\":1024}
{\"time_unix_ms\":7,\"event\":\"block-returned\",\"protocol\":\"any\",\"inside\":\"10.0.0.5:1234\",\
\"outside\":\"203.0.113.1:2048\",\"ports\":1024}
";
        assert_eq!(text, expected);
        std::fs::remove_file(&path).unwrap();
    }
}
