//! Ports that programs of the host hold, listening or connected: address translation must not give them out where it shares
//! an address with the host, or the answers of strangers would be taken for those of clients.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

/// Tables of sockets under `/proc/net`.
const TABLES: [&str; 6] = ["tcp", "tcp6", "udp", "udp6", "udplite", "udplite6"];
/// Ports that are kept track of at most.
const HELD_MAX: usize = 65_536;
/// Reading takes at most this part of the time: one of so many.
const TIME_SHARE: u32 = 50;

/// A local address of a socket (unspecified: any) and its port.
pub type HeldPort = (IpAddr, u16);

/// The ports that the host held when they were looked at.
#[derive(Debug, Default)]
pub(crate) struct HeldPorts {
    known: BTreeSet<HeldPort>,
    next_at: Option<Instant>,
}

impl HeldPorts {
    /// Those known.
    pub fn known(&self) -> &BTreeSet<HeldPort> {
        &self.known
    }

    /// Looks again, if it is time to; `ephemeral`: the range of the host's own outgoing connections, which is never given
    /// out. Returns whether anything changed.
    pub fn look(&mut self, ephemeral: (u16, u16)) -> bool {
        let start = Instant::now();
        if self.next_at.is_some_and(|next| start < next) {
            return false;
        }
        let mut found = BTreeSet::new();
        for table in TABLES {
            let text = std::fs::read_to_string(format!("/proc/thread-self/net/{table}")).unwrap_or_default();
            let held = text.lines().skip(1).filter_map(local);
            let held = held.filter(|(address, port)| {
                !address.is_loopback() && !(ephemeral.0..=ephemeral.1).contains(port)
            });
            found.extend(held.take(HELD_MAX.saturating_sub(found.len())));
        }
        let took: Duration = start.elapsed();
        self.next_at = Some(start + took * TIME_SHARE);
        let changed = found != self.known;
        self.known = found;
        changed
    }
}

/// The local end of a line such as `  0: 0100007F:0016 00000000:0000 0A …`; `None`: no port.
fn local(line: &str) -> Option<HeldPort> {
    let (address, port) = line.split_whitespace().nth(1)?.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok().filter(|port| *port != 0)?;
    // Words in the host's order, each of the network's bytes.
    let words: Vec<u32> = (0..address.len() / 8)
        .filter_map(|word| u32::from_str_radix(address.get(8 * word..8 * word + 8)?, 16).ok())
        .collect();
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let address = match bytes.len() {
        4 => IpAddr::V4(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?)),
        16 => IpAddr::V6(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?)).to_canonical(),
        _ => return None,
    };
    Some((address, port))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use std::net::{TcpListener, UdpSocket};

    #[test]
    fn lines_of_the_kernel() {
        let v4 =
            "   0: 0100007F:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1";
        assert_eq!(local(v4), Some(("127.0.0.1".parse().unwrap(), 22)));
        let any = "   1: 00000000000000000000000000000000:01BB 00000000000000000000000000000000:0000 0A";
        assert_eq!(local(any), Some(("::".parse().unwrap(), 443)));
        let mapped = "   1: 0000000000000000FFFF0000017100CB:01BB 0000000000000000FFFF0000FE7100CB:C350 01";
        assert_eq!(local(mapped), Some(("203.0.113.1".parse().unwrap(), 443)));
        for wrong in ["", "0:", "0: x:y", "0: 0100007F:0000", "0: 01:0016"] {
            assert_eq!(local(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn sockets_come_and_go() {
        let mut held = HeldPorts::default();
        let (tcp, udp) = (TcpListener::bind("0.0.0.0:0").unwrap(), UdpSocket::bind("[::]:0").unwrap());
        let ports = [tcp.local_addr().unwrap().port(), udp.local_addr().unwrap().port()];
        let knows = |held: &HeldPorts, port: u16| held.known().iter().any(|(_, known)| *known == port);
        assert!(held.look((1, 1)));
        assert!(ports.iter().all(|port| knows(&held, *port)));
        drop(tcp);
        assert!(!held.look((1, 1)), "not all the time");
        held.next_at = None;
        held.look((1, 1));
        assert!(knows(&held, ports[1]) && !knows(&held, ports[0]));
        held.next_at = None;
        held.look((1, 65_535));
        assert!(held.known().is_empty());
    }
}
