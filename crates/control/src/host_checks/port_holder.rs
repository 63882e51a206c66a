//! Program that holds a UDP port, as far as `/proc` tells.

use std::fmt;
use std::fs;

/// Processes that are looked at, at most.
const PROCESSES_MAX: usize = 32_768;
/// Descriptors of one process that are looked at, at most.
const DESCRIPTORS_MAX: usize = 65_536;

/// Another process with a socket on a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PortHolder {
    /// Process id.
    pub(crate) process: u32,
    /// Its name.
    pub(crate) name: String,
    /// Its systemd unit.
    pub(crate) unit: Option<String>,
}

impl PortHolder {
    /// The other process that holds a UDP port in this network namespace. `None` if nobody does, or if we may not know.
    pub(crate) fn of_udp(port: u16) -> Option<Self> {
        let tables =
            ["/proc/net/udp", "/proc/net/udp6"].map(|path| fs::read_to_string(path).unwrap_or_default());
        let links: Vec<String> = tables
            .iter()
            .flat_map(|table| sockets(table, port))
            .map(|number| format!("socket:[{number}]"))
            .collect();
        if links.is_empty() {
            return None;
        }
        let own = std::process::id();
        let processes = fs::read_dir("/proc").ok()?.flatten().take(PROCESSES_MAX);
        let mut numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        let holds = |process: &u32| {
            let descriptors = fs::read_dir(format!("/proc/{process}/fd")).into_iter().flatten().flatten();
            descriptors.take(DESCRIPTORS_MAX).any(|descriptor| {
                let target = fs::read_link(descriptor.path());
                target.is_ok_and(|target| {
                    target.to_str().is_some_and(|text| links.iter().any(|link| link == text))
                })
            })
        };
        let process = numbers.find(|process| *process != own && holds(process))?;
        let name = fs::read_to_string(format!("/proc/{process}/comm")).unwrap_or_default().trim().to_owned();
        let unit = unit(&fs::read_to_string(format!("/proc/{process}/cgroup")).unwrap_or_default());
        Some(Self { process, name, unit })
    }

    /// Whether it is a gateway like this one: the one whose configuration is checked, most likely.
    pub(crate) fn is_gateway(&self) -> bool {
        self.name == "anabranch"
    }

    /// Command that ends it.
    pub(crate) fn stop(&self) -> String {
        match &self.unit {
            Some(unit) => format!("systemctl stop {unit}"),
            None => format!("kill {}", self.process),
        }
    }
}

impl fmt::Display for PortHolder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (process {})", self.name, self.process)
    }
}

/// Inode numbers of the sockets on a port in a table of `/proc/net`.
fn sockets(table: &str, port: u16) -> impl Iterator<Item = u64> {
    table.lines().skip(1).filter_map(move |line| {
        let mut columns = line.split_whitespace();
        let (_, local) = columns.nth(1)?.rsplit_once(':')?;
        let inode = columns.nth(7)?.parse().ok()?;
        (u16::from_str_radix(local, 16).ok()? == port && inode > 0).then_some(inode)
    })
}

/// The service in a process's control group.
fn unit(cgroup: &str) -> Option<String> {
    let parts = cgroup.lines().flat_map(|line| line.rsplit('/'));
    parts.filter(|part| part.ends_with(".service") && !part.starts_with("user@")).map(str::to_owned).next()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn sockets_and_units_are_read_from_proc() {
        let table = "   sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref pointer drops\n\
            \x20 394: 00000000:11F8 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 31337 2 0000000000000000 0\n\
            \x20 395: 0100007F:0035 00000000:0000 07 00000000:00000000 00:00000000 00000000   101        0 99 2 0000000000000000 0\nshort\n";
        assert_eq!(sockets(table, 4_600).collect::<Vec<_>>(), [31_337]);
        assert_eq!(sockets(table, 53).collect::<Vec<_>>(), [99]);
        assert_eq!(sockets(table, 54).count(), 0);
        assert_eq!(unit("0::/system.slice/wg-quick@wg0.service\n").unwrap(), "wg-quick@wg0.service");
        assert_eq!(unit("0::/user.slice/user-0.slice/session-1.scope\n"), None);
        let holder = PortHolder { process: 7, name: "wg".to_owned(), unit: None };
        assert_eq!((holder.to_string(), holder.stop()), ("wg (process 7)".to_owned(), "kill 7".to_owned()));
    }

    #[test]
    fn who_holds_a_port_is_found_in_another_process() {
        use std::io::{BufRead, BufReader};
        use std::process::{Command, Stdio};
        let script = "import socket, sys; s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM); s.bind(('::', 0)); \
                      print(s.getsockname()[1], flush=True); sys.stdin.read()";
        let mut child = Command::new("python3")
            .args(["-c", script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let holder = PortHolder::of_udp(line.trim().parse().unwrap());
        drop(child.stdin.take());
        child.wait().unwrap();
        let holder = holder.unwrap();
        assert_eq!(holder.process, child.id());
        assert!(holder.name.starts_with("python"), "{holder:?}");
    }
}
