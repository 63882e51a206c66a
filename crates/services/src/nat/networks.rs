//! Which addresses of an interface a translated packet leaves with, where the interface has some in several networks: those of
//! the network that the next hop is in, as the kernel's masquerading does. A modem's page asks for the one beside the modem, and
//! the Internet for the other one, which alone is answered from there.

use std::net::IpAddr;
use std::ops::Range;

use ipnet::IpNet;

/// The outside addresses of a rule.
#[derive(Clone, Debug, Default)]
pub(crate) struct Addresses {
    /// IPv4, IPv6; each address once.
    families: [Vec<IpAddr>; 2],
    networks: Networks,
}

impl Addresses {
    /// Those that somebody named: all are used for all.
    pub(crate) fn named(all: &[IpAddr]) -> Self {
        let mut families = [Vec::new(), Vec::new()];
        let [v4, v6] = &mut families;
        for address in all {
            let family = if address.is_ipv4() { &mut *v4 } else { &mut *v6 };
            if !family.contains(address) {
                family.push(*address);
            }
        }
        Self { families, networks: Networks::default() }
    }

    /// With the IPv4 ones of an interface.
    pub(crate) fn of_interface(self, nets: &[IpNet]) -> Self {
        let [_, v6] = self.families;
        let (networks, v4) = Networks::of(nets);
        Self { families: [v4, v6], networks }
    }

    /// Those of a family.
    pub(crate) fn pool(&self, like: IpAddr) -> &[IpAddr] {
        let [v4, v6] = &self.families;
        if like.is_ipv4() { v4 } else { v6 }
    }

    /// Those of a family that are used by a next hop.
    pub(crate) fn towards(&self, like: IpAddr, next: Option<IpAddr>) -> &[IpAddr] {
        let pool = self.pool(like);
        if like.is_ipv4() { self.networks.towards(pool, next) } else { pool }
    }

    /// Those of a family in parts, of which one is used by a next hop.
    pub(crate) fn parts(&self, like: IpAddr) -> impl Iterator<Item = &[IpAddr]> {
        let [v4, v6] = &self.families;
        let (parts, whole) =
            if like.is_ipv4() { (Some(self.networks.parts(v4)), None) } else { (None, Some(&**v6)) };
        parts.into_iter().flatten().chain(whole)
    }

    /// All, IPv4 first.
    pub(crate) fn all(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.families.iter().flatten().copied()
    }
}

/// The networks of IPv4 addresses, if there are several; nothing else.
#[derive(Clone, Debug, Default)]
struct Networks {
    /// Each with places of its addresses. `None`: of those that have no network of their own (`/32`); they come first, since it is
    /// they that a router beyond every network is asked by.
    parts: Vec<(Option<IpNet>, Range<usize>)>,
}

impl Networks {
    /// Sorts the addresses by network, in the order given otherwise.
    fn of(nets: &[IpNet]) -> (Self, Vec<IpAddr>) {
        let network_of = |net: &IpNet| {
            let wide = nets.iter().filter(|other| other.prefix_len() < other.max_prefix_len());
            let around = wide.filter(|other| other.contains(&net.addr()));
            around.max_by_key(|other| other.prefix_len()).map(IpNet::trunc)
        };
        let mut parts: Vec<(Option<IpNet>, Vec<IpAddr>)> = Vec::new();
        for net in nets {
            let network = network_of(net);
            match parts.iter_mut().find(|(known, _)| *known == network) {
                Some((_, addresses)) if addresses.contains(&net.addr()) => {}
                Some((_, addresses)) => addresses.push(net.addr()),
                None => parts.push((network, vec![net.addr()])),
            }
        }
        // Stable: the first network stays before the second.
        parts.sort_by_key(|(network, _)| network.is_some());
        let mut sorted = Vec::new();
        let mut ranges = Vec::with_capacity(parts.len());
        for (network, addresses) in parts {
            let first = sorted.len();
            sorted.extend(addresses);
            ranges.push((network, first..sorted.len()));
        }
        if ranges.len() < 2 {
            ranges.clear();
        }
        (Self { parts: ranges }, sorted)
    }

    /// Of a pool those addresses that are used towards a next hop. One that is in no network gets the first ones.
    fn towards<'a>(&self, pool: &'a [IpAddr], next: Option<IpAddr>) -> &'a [IpAddr] {
        let around = |(network, range): &'_ (Option<IpNet>, Range<usize>)| {
            let network = network.filter(|network| next.is_some_and(|next| network.contains(&next)))?;
            Some((network.prefix_len(), range.clone()))
        };
        let nearest = self.parts.iter().filter_map(around).max_by_key(|(length, _)| *length);
        let range =
            nearest.map(|(_, range)| range).or_else(|| self.parts.first().map(|(_, range)| range.clone()));
        range.and_then(|range| pool.get(range)).unwrap_or(pool)
    }

    /// The parts of a pool, of which one is used at a time.
    fn parts<'a>(&'a self, pool: &'a [IpAddr]) -> impl Iterator<Item = &'a [IpAddr]> {
        let whole = self.parts.is_empty().then_some(pool);
        whole.into_iter().chain(self.parts.iter().filter_map(|(_, range)| pool.get(range.clone())))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn of(nets: &[&str]) -> (Networks, Vec<IpAddr>) {
        Networks::of(&nets.iter().map(|net| net.parse().unwrap()).collect::<Vec<_>>())
    }

    fn towards(nets: &[&str], next: &str) -> String {
        let (networks, pool) = of(nets);
        let some = networks.towards(&pool, Some(next.parse().unwrap()));
        some.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn the_next_hop_is_asked_by_an_address_of_its_network() {
        let wan = ["203.0.113.1/24", "192.168.100.2/24", "203.0.113.9/24"];
        assert_eq!(towards(&wan, "203.0.113.254"), "203.0.113.1 203.0.113.9");
        assert_eq!(towards(&wan, "192.168.100.1"), "192.168.100.2");
        assert_eq!(towards(&wan, "100.64.0.1"), "203.0.113.1 203.0.113.9", "in none: the first network");
        assert_eq!(towards(&["10.0.0.1/8", "10.9.0.1/16"], "10.9.0.7"), "10.9.0.1", "the nearest");
        assert_eq!(towards(&["10.0.0.1/8", "10.9.0.1/16"], "10.8.0.7"), "10.0.0.1");
    }

    #[test]
    fn addresses_without_a_network_are_for_routers_beyond_every_network() {
        let wan = ["192.168.100.2/24", "203.0.113.77/32", "203.0.113.90/32", "192.168.100.7/32"];
        assert_eq!(towards(&wan, "100.64.0.1"), "203.0.113.77 203.0.113.90");
        assert_eq!(towards(&wan, "192.168.100.1"), "192.168.100.2 192.168.100.7", "one inside belongs to it");
    }

    #[test]
    fn one_network_is_used_whole() {
        for nets in [
            &["203.0.113.1/24", "203.0.113.2/32", "203.0.113.1/24"][..],
            &["10.0.0.1/32", "10.0.0.2/32"],
            &[],
        ] {
            let (networks, pool) = of(nets);
            assert_eq!(networks.towards(&pool, None), pool);
            assert_eq!(networks.parts(&pool).count(), 1);
            assert!(pool.len() < 3, "each once");
        }
        let (networks, pool) = of(&["203.0.113.1/24", "192.168.100.2/24"]);
        assert_eq!(networks.parts(&pool).count(), 2);
    }
}
