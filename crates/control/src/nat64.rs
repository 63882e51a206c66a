//! IPv4 endpoints in networks that have IPv6 only: the prefix of the network's NAT64, and addresses behind it.
//!
//! Routers advertise the prefix (RFC 8781, [`Routers`]); where they do not, the name service shows it. The name `ipv4only.arpa` has two well-known IPv4 addresses and no others. A name server with DNS64 makes IPv6 addresses of
//! them, which show the prefix (RFC 7050 §3): the IPv4 address stands where RFC 6052 §2.2 puts it for one of six prefix lengths.

mod advertised;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::wans::LiveWan;

pub(crate) use advertised::Routers;

/// Name whose IPv6 addresses show the prefix.
pub(crate) const NAME: &str = "ipv4only.arpa";
/// Its IPv4 addresses (RFC 7050 §2.2).
const WELL_KNOWN: [[u8; 4]; 2] = [[192, 0, 0, 170], [192, 0, 0, 171]];
/// Places of the IPv4 address by prefix length; byte 8 is always 0 (RFC 6052 §2.2).
const LAYOUTS: [(u8, [usize; 4]); 6] = [
    (96, [12, 13, 14, 15]),
    (64, [9, 10, 11, 12]),
    (56, [7, 9, 10, 11]),
    (48, [6, 7, 9, 10]),
    (40, [5, 6, 7, 9]),
    (32, [4, 5, 6, 7]),
];
/// Prefixes that are used at most: a network may have several translators.
const PREFIXES_MAX: usize = 2;

/// Prefix of a translator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Nat64Prefix {
    prefix: [u8; 16],
    places: [usize; 4],
}

impl std::fmt::Display for Nat64Prefix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let length = LAYOUTS.iter().find(|(_, places)| *places == self.places).map_or(0, |layout| layout.0);
        write!(f, "{}/{length}", Ipv6Addr::from(self.prefix))
    }
}

impl Nat64Prefix {
    /// The prefix that an address of [`NAME`] shows. `None` for one that has no well-known address in it.
    fn shown_by(address: Ipv6Addr) -> Option<Self> {
        let bytes = address.octets();
        let known = |places: &[usize; 4]| WELL_KNOWN.contains(&places.map(|place| bytes[place]));
        let (length, places) = LAYOUTS.iter().find(|(_, places)| known(places))?;
        let mut prefix = bytes;
        prefix[usize::from(length / 8)..].fill(0);
        Some(Self { prefix, places: *places })
    }

    /// The IPv6 address under which the translator reaches an IPv4 address.
    pub(crate) fn address(&self, ipv4: Ipv4Addr) -> Ipv6Addr {
        let mut bytes = self.prefix;
        for (place, byte) in self.places.iter().zip(ipv4.octets()) {
            bytes[*place] = byte;
        }
        Ipv6Addr::from(bytes)
    }
}

/// Prefixes that the addresses of [`NAME`] show.
pub(crate) fn prefixes(addresses: &[IpAddr]) -> Vec<Nat64Prefix> {
    let mut list = Vec::new();
    for address in addresses {
        if let IpAddr::V6(ipv6) = address
            && let Some(prefix) = Nat64Prefix::shown_by(*ipv6)
            && !list.contains(&prefix)
            && list.len() < PREFIXES_MAX
        {
            list.push(prefix);
        }
    }
    list
}

/// Whether a WAN works with IPv6 alone.
pub(crate) fn needs(live: &LiveWan) -> bool {
    live.wan.up && live.wan.addresses.iter().all(IpAddr::is_ipv6)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    /// The examples of RFC 6052 §2.4 for 192.0.2.33.
    #[test]
    fn every_prefix_length_is_found_and_used() {
        for (shown, expected) in [
            ("64:ff9b::c000:aa", "64:ff9b::c000:221"),
            ("2001:db8:c000:ab::", "2001:db8:c000:221::"),
            ("2001:db8:1c0:0:aa::", "2001:db8:1c0:2:21::"),
            ("2001:db8:122:c000:0:aa00::", "2001:db8:122:c000:2:2100::"),
            ("2001:db8:122:3c0:0:aa::", "2001:db8:122:3c0:0:221::"),
            ("2001:db8:122:344:c0:0:aa00::", "2001:db8:122:344:c0:2:2100::"),
            ("2001:db8:122:344::192.0.0.171", "2001:db8:122:344::192.0.2.33"),
        ] {
            let list = prefixes(&[shown.parse().unwrap()]);
            assert_eq!(list.len(), 1, "{shown}");
            assert_eq!(list[0].address("192.0.2.33".parse().unwrap()), expected.parse::<Ipv6Addr>().unwrap());
        }
    }

    #[test]
    fn answers_without_a_translator_show_nothing() {
        let addresses = ["192.0.0.170", "192.0.0.171", "2001:db8::1"].map(|text| text.parse().unwrap());
        assert_eq!(prefixes(&addresses), []);
        let many: Vec<IpAddr> =
            (1..9u16).map(|n| IpAddr::from([0x2001, 0xdb8, n, 0, 0, 0, 0xc000, 0xaa])).collect();
        assert_eq!(prefixes(&many).len(), PREFIXES_MAX);
    }
}
