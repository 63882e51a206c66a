//! Ports that programs of the host hold, listening or connected. Where address translation shares an address with the host, they are
//! none of its flows'.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// A port of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HeldPort {
    /// IP protocol: TCP (6), UDP (17)…
    pub protocol: u8,
    /// Local port.
    pub port: u16,
    /// Local address; unspecified: all of its version.
    pub address: IpAddr,
}

/// Ports of sockets, each once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeldPorts(Vec<HeldPort>);

impl HeldPorts {
    /// Of these sockets.
    #[must_use]
    pub fn new(ports: impl IntoIterator<Item = HeldPort>) -> Self {
        let mut all: Vec<HeldPort> = ports.into_iter().collect();
        all.sort_unstable();
        all.dedup();
        Self(all)
    }

    /// All of them, in order.
    pub fn iter(&self) -> impl Iterator<Item = &HeldPort> {
        self.0.iter()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether it is among them.
    #[must_use]
    pub fn has_socket(&self, held: &HeldPort) -> bool {
        self.0.binary_search(held).is_ok()
    }

    /// Ports, of whatever protocol, of one of these addresses or of all.
    pub fn of(&self, addresses: &[IpAddr]) -> impl Iterator<Item = u16> {
        let takes = |held: &&HeldPort| addresses.iter().any(|address| covers(held.address, *address));
        self.0.iter().filter(takes).map(|held| held.port)
    }

    /// Whether a socket has this port of this address, or of all.
    #[must_use]
    pub fn has(&self, protocol: u8, address: IpAddr, port: u16) -> bool {
        self.range(protocol, (port, port)).iter().any(|held| covers(held.address, address))
    }

    /// Which of the 64 ports from `64 × at` on are held, a bit each.
    pub(crate) fn word(&self, protocol: u8, address: IpAddr, at: usize) -> u64 {
        if self.0.is_empty() {
            return 0;
        }
        let first = (at << 6) as u16;
        let here = self.range(protocol, (first, first | 63)).iter();
        here.filter(|held| covers(held.address, address)).fold(0, |word, held| word | 1 << (held.port & 63))
    }

    fn range(&self, protocol: u8, (first, last): (u16, u16)) -> &[HeldPort] {
        let from = self.0.partition_point(|held| (held.protocol, held.port) < (protocol, first));
        let behind = self.0.get(from..).unwrap_or_default();
        let count = behind.partition_point(|held| (held.protocol, held.port) <= (protocol, last));
        behind.get(..count).unwrap_or_default()
    }
}

/// Whether a socket with this local address gets what is sent to another.
fn covers(local: IpAddr, address: IpAddr) -> bool {
    let any = match address {
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    local == address || local == any
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::spec::{TCP, UDP};

    fn held(protocol: u8, address: &str, port: u16) -> HeldPort {
        HeldPort { protocol, port, address: address.parse().unwrap() }
    }

    #[test]
    fn a_port_is_held_at_its_address_or_at_all_of_a_version() {
        let ports = HeldPorts::new([
            held(UDP, "0.0.0.0", 5_000),
            held(UDP, "203.0.113.1", 5_001),
            held(UDP, "203.0.113.1", 5_001),
            held(TCP, "::", 5_063),
            held(TCP, "203.0.113.2", 5_064),
        ]);
        let has = |protocol, address: &str, port| ports.has(protocol, address.parse().unwrap(), port);
        for (protocol, address, port, expected) in [
            (UDP, "203.0.113.1", 5_000, true),
            (UDP, "2001:db8::1", 5_000, false),
            (TCP, "203.0.113.1", 5_000, false),
            (UDP, "203.0.113.1", 5_001, true),
            (UDP, "203.0.113.2", 5_001, false),
            (TCP, "2001:db8::1", 5_063, true),
            (TCP, "203.0.113.1", 5_063, false),
        ] {
            assert_eq!(has(protocol, address, port), expected, "{protocol} {address} {port}");
        }
        assert_eq!(ports.iter().count(), 4);
        let here: Vec<IpAddr> = vec!["203.0.113.1".parse().unwrap()];
        assert_eq!(ports.of(&here).collect::<Vec<_>>(), [5_000, 5_001]);
        assert_eq!(ports.word(UDP, here[0], 78), 1 << 8 | 1 << 9);
        assert_eq!(ports.word(TCP, "2001:db8::1".parse().unwrap(), 79), 1 << 7);
        assert_eq!(ports.word(UDP, here[0], 1_023), 0);
    }
}
