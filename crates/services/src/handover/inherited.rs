//! Flows that were another machine's, and whose replies come to another core than the one that has them.
//!
//! Each machine has a hash key of its own, so a port that the other one chose for its core leads anywhere here. The core that a reply
//! comes to finds out here who has the flow. Flows that have ended may still be listed: then that core is asked in vain.

use std::net::IpAddr;

use packet::flow::FlowKey;

/// Keys of directions, and the core that has the flow.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InheritedFlows {
    /// By [`place`].
    cores: Vec<(FlowKey, u16, u8)>,
}

/// Keys as they come in, with their tenant, and the core that has their flow.
pub type Strays = Vec<(FlowKey, u16, u8)>;

/// Order of keys.
fn place(key: &FlowKey, tenant: u16) -> (IpAddr, u16, IpAddr, u16, u8, u16) {
    (key.dst, key.dst_port, key.src, key.src_port, key.protocol, tenant)
}

impl InheritedFlows {
    /// These besides the ones that are known already.
    #[must_use]
    pub fn with(&self, more: Strays) -> Self {
        let mut cores = more;
        cores.extend(&self.cores);
        // The sort keeps the order of equal ones: the newest is first.
        cores.sort_by_key(|(key, tenant, _)| place(key, *tenant));
        cores.dedup_by_key(|(key, tenant, _)| place(key, *tenant));
        Self { cores }
    }

    /// Whether there are none.
    #[inline]
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.cores.is_empty()
    }

    /// The core that has, or had, the flow of a packet.
    #[must_use]
    pub fn core_of(&self, key: &FlowKey, tenant: u16) -> Option<u8> {
        let wanted = place(key, tenant);
        let found = self.cores.binary_search_by(|(key, tenant, _)| place(key, *tenant).cmp(&wanted)).ok()?;
        self.cores.get(found).map(|(_, _, core)| *core)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn key(port: u16) -> FlowKey {
        let [src, dst] = ["198.51.100.7", "203.0.113.1"].map(|address| address.parse().unwrap());
        FlowKey { src, dst, src_port: 443, dst_port: port, protocol: 6 }
    }

    #[test]
    fn the_newest_word_about_a_key_counts() {
        let first = InheritedFlows::default().with(vec![(key(9), 0, 1), (key(2), 0, 2), (key(9), 3, 3)]);
        let both = first.with(vec![(key(9), 0, 7), (key(1), 0, 4)]);
        let core = |port, tenant| both.core_of(&key(port), tenant);
        assert_eq!([core(9, 0), core(2, 0), core(9, 3), core(1, 0)], [7, 2, 3, 4].map(Some));
        assert_eq!((core(3, 0), core(1, 1)), (None, None));
        assert!(InheritedFlows::default().is_empty() && !both.is_empty());
    }
}
