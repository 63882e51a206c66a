//! Ports that programs of the host hold, listening or connected: address translation must not give them out where it shares
//! an address with the host, or the answers of strangers would be taken for those of clients.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use linux::socket_list::each_local_port;

/// Ports that are kept track of at most.
const HELD_MAX: usize = 65_536;
/// Looking takes at most this part of the time: one of so many.
const TIME_SHARE: u32 = 50;

/// A local address of a socket (unspecified: any) and its port.
pub type HeldPort = (IpAddr, u16);

/// The ports that the host held when they were looked at.
#[derive(Debug, Default)]
pub(crate) struct HeldPorts {
    known: BTreeSet<HeldPort>,
    /// All that were there at the last look; `None` before the first.
    last: Option<BTreeSet<HeldPort>>,
    next_at: Option<Instant>,
}

impl HeldPorts {
    /// Those known.
    pub fn known(&self) -> &BTreeSet<HeldPort> {
        &self.known
    }

    /// Looks again, if it is time to; `ephemeral`: the range of the host's own outgoing connections, which is never given
    /// out. Returns whether anything changed. A port counts from the first look on that finds it again: a resolver has another
    /// one for each question, and a change has every flow decided anew.
    pub fn look(&mut self, ephemeral: (u16, u16)) -> bool {
        let start = Instant::now();
        if self.next_at.is_some_and(|next| start < next) {
            return false;
        }
        let mut found = BTreeSet::new();
        let listed = each_local_port(|address, port| {
            let own = !address.is_loopback() && !(ephemeral.0..=ephemeral.1).contains(&port);
            if own && found.len() < HELD_MAX {
                found.insert((address, port));
            }
        });
        let took: Duration = start.elapsed();
        let first = self.next_at.replace(start + took * TIME_SHARE).is_none();
        if let Err(error) = listed {
            if first {
                tracing::warn!(%error, "ports of the host's programs are not seen, and may be given to flows");
            }
            return false;
        }
        let known = match &self.last {
            Some(last) => found.intersection(last).copied().collect(),
            None => found.clone(),
        };
        self.last = Some(found);
        let changed = known != self.known;
        self.known = known;
        changed
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use std::net::{TcpListener, UdpSocket};

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
        let late = UdpSocket::bind("0.0.0.0:0").unwrap().local_addr().unwrap().port();
        let stays = UdpSocket::bind("0.0.0.0:0").unwrap();
        let port = stays.local_addr().unwrap().port();
        for counts in [false, true] {
            held.next_at = None;
            held.look((1, 1));
            assert_eq!((knows(&held, port), knows(&held, late)), (counts, false));
        }
        held.next_at = None;
        held.look((1, 65_535));
        assert!(held.known().is_empty());
    }
}
