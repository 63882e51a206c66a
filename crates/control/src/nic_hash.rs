//! Receive hash of network cards (RSS, row C1): which queue a card would give a flow to.
//!
//! A card's hash only decides which CPU is interrupted first; which core owns a flow is the node's own table's word. But
//! an operator who wants the two to coincide has to know both.

use std::net::IpAddr;

use linux::ethtool::{Rss, RssFunction};
use packet::flow::FlowKey;
use packet::ip::{PROTOCOL_TCP, PROTOCOL_UDP};
use steering::toeplitz::{rss_hash, rss_input_v4, rss_input_v4_ports, rss_input_v6, rss_input_v6_ports};

use crate::status::{NicHashStatus, NicPrediction};

/// Address and port parts are made symmetric before hashing (`RXH_XFRM_SYM_XOR`).
const SYMMETRIC_XOR: u8 = 1;
/// Likewise (`RXH_XFRM_SYM_OR_XOR`).
const SYMMETRIC_OR_XOR: u8 = 2;

/// Hash function, key and indirection table of a device's card.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NicHash {
    /// The device has none, or its driver does not tell: veth, TUN, most virtual cards.
    Unsupported,
    /// The kernel refused to tell.
    Unreadable(String),
    /// As the card told.
    Rss(Rss),
}

/// Reads the receive hash of a device.
#[must_use]
pub fn read(device: &str) -> NicHash {
    match linux::ethtool::rss(device) {
        Ok(Some(rss)) => NicHash::Rss(rss),
        Ok(None) => NicHash::Unsupported,
        Err(error) => NicHash::Unreadable(error.to_string()),
    }
}

impl NicHash {
    /// For `status`.
    #[must_use]
    pub fn status(&self) -> NicHashStatus {
        match self {
            Self::Unsupported => NicHashStatus {
                reason: "the device has no receive hash (RSS)".to_owned(),
                ..Default::default()
            },
            Self::Unreadable(reason) => NicHashStatus { reason: reason.clone(), ..Default::default() },
            Self::Rss(rss) => NicHashStatus {
                function: function_name(rss.function).to_owned(),
                reason: unpredictable(rss).unwrap_or_default().to_owned(),
                key_bytes: rss.key.len(),
                table_entries: rss.table.len(),
                queues: queues(rss),
            },
        }
    }

    /// For `explain`: queues of a packet of this flow.
    #[must_use]
    pub fn predict(&self, device: &str, key: &FlowKey) -> NicPrediction {
        let mut prediction = NicPrediction { device: device.to_owned(), ..Default::default() };
        let rss = match self {
            Self::Rss(rss) => rss,
            other => return NicPrediction { reason: other.status().reason, ..prediction },
        };
        if let Some(reason) = unpredictable(rss) {
            return NicPrediction { reason: reason.to_owned(), ..prediction };
        }
        let queue = |hash: u32| rss.table.get(hash as usize % rss.table.len().max(1)).copied();
        let hash = rss_hash(&rss.key, &input(rss.symmetric, key, false));
        (prediction.hash, prediction.queue) = (Some(hash), queue(hash));
        if matches!(key.protocol, PROTOCOL_TCP | PROTOCOL_UDP) {
            let hash = rss_hash(&rss.key, &input(rss.symmetric, key, true));
            (prediction.hash_with_ports, prediction.queue_with_ports) = (Some(hash), queue(hash));
        }
        prediction
    }
}

fn function_name(function: RssFunction) -> &'static str {
    match function {
        RssFunction::Toeplitz => "toeplitz",
        RssFunction::Xor => "xor",
        RssFunction::Crc32 => "crc32",
        RssFunction::Other(_) => "unknown",
    }
}

/// Reason why the queue cannot be computed.
fn unpredictable(rss: &Rss) -> Option<&'static str> {
    if rss.function != RssFunction::Toeplitz {
        Some("only Toeplitz hashes can be predicted")
    } else if rss.key.is_empty() || rss.key.iter().all(|byte| *byte == 0) {
        Some("the driver does not tell the key")
    } else if rss.table.is_empty() {
        Some("the driver does not tell the indirection table")
    } else if rss.symmetric > SYMMETRIC_OR_XOR {
        Some("the card makes its input symmetric in an unknown way")
    } else {
        None
    }
}

/// Number of queues that the indirection table names.
fn queues(rss: &Rss) -> usize {
    let mut queues = rss.table.clone();
    queues.sort_unstable();
    queues.dedup();
    queues.len()
}

/// Bytes that the card hashes.
fn input(symmetric: u8, key: &FlowKey, with_ports: bool) -> Vec<u8> {
    let (src_port, dst_port) = (key.src_port, key.dst_port);
    let mut input = match (key.src, key.dst, with_ports) {
        (IpAddr::V4(src), IpAddr::V4(dst), true) => rss_input_v4_ports(src, dst, src_port, dst_port).to_vec(),
        (IpAddr::V4(src), IpAddr::V4(dst), false) => rss_input_v4(src, dst).to_vec(),
        (IpAddr::V6(src), IpAddr::V6(dst), true) => rss_input_v6_ports(src, dst, src_port, dst_port).to_vec(),
        (IpAddr::V6(src), IpAddr::V6(dst), false) => rss_input_v6(src, dst).to_vec(),
        (IpAddr::V4(_), IpAddr::V6(_), _) | (IpAddr::V6(_), IpAddr::V4(_), _) => Vec::new(),
    };
    let address_bytes = if key.src.is_ipv4() { 8 } else { 32 };
    let middle = address_bytes.min(input.len());
    let (addresses, ports) = input.split_at_mut(middle);
    for pair in [addresses, ports] {
        let (first, second) = pair.split_at_mut(pair.len() / 2);
        for (a, b) in first.iter_mut().zip(second) {
            (*a, *b) = match symmetric {
                SYMMETRIC_XOR => (*a ^ *b, *a ^ *b),
                SYMMETRIC_OR_XOR => (*a | *b, *a ^ *b),
                _ => (*a, *b),
            };
        }
    }
    input
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use steering::toeplitz::RSS_KEY;

    use super::*;

    fn card(table: Vec<u32>) -> Rss {
        Rss { function: RssFunction::Toeplitz, symmetric: 0, key: RSS_KEY.to_vec(), table }
    }

    fn flow(text: &str) -> FlowKey {
        text.parse().unwrap()
    }

    /// The verification suite of RSS: hashes with and without ports, and queues of a table of 128 entries over 8.
    #[test]
    fn queues_by_the_official_vectors() {
        let card = NicHash::Rss(card((0..128).map(|entry| entry % 8).collect()));
        for (packet, addresses, ports) in [
            ("tcp 66.9.149.187:2794 > 161.142.100.80:1766", 0x323e_8fc2u32, 0x51cc_c178u32),
            ("udp 199.92.111.2:14230 > 65.69.140.83:4739", 0xd718_262a, 0xc626_b0ea),
            ("tcp [3ffe:2501:200:1fff::7]:2794 > [3ffe:2501:200:3::1]:1766", 0x2cc1_8cd5, 0x4020_7d3d),
        ] {
            let seen = card.predict("eth0", &flow(packet));
            assert_eq!((seen.hash, seen.hash_with_ports), (Some(addresses), Some(ports)), "{packet}");
            let queue = |hash: u32| Some(hash % 128 % 8);
            assert_eq!((seen.queue, seen.queue_with_ports), (queue(addresses), queue(ports)), "{packet}");
            assert_eq!((seen.device.as_str(), seen.reason.as_str()), ("eth0", ""));
        }
        let icmp = card.predict("eth0", &flow("icmp 66.9.149.187 > 161.142.100.80 id 7"));
        assert_eq!((icmp.hash, icmp.hash_with_ports), (Some(0x323e_8fc2), None));
    }

    #[test]
    fn symmetric_cards_give_both_directions_to_one_queue() {
        let there = flow("tcp 10.0.0.5:40000 > 192.0.2.7:443");
        for symmetric in [SYMMETRIC_XOR, SYMMETRIC_OR_XOR] {
            let card = NicHash::Rss(Rss { symmetric, ..card((0..16).collect()) });
            let [one, other] = [there, there.reversed()].map(|key| card.predict("eth0", &key));
            assert_eq!(one, other, "{symmetric}");
        }
        let card = NicHash::Rss(card((0..16).collect()));
        assert_ne!(card.predict("eth0", &there), card.predict("eth0", &there.reversed()));
    }

    #[test]
    fn cards_that_cannot_be_predicted_say_why() {
        let whole = card(vec![0, 1, 1, 3]);
        let status = NicHash::Rss(whole.clone()).status();
        let told = (status.function.as_str(), status.key_bytes, status.table_entries, status.queues);
        assert_eq!((told, status.reason.as_str()), (("toeplitz", 40, 4, 3), ""));
        for (rss, part) in [
            (Rss { function: RssFunction::Xor, ..whole.clone() }, "only Toeplitz"),
            (Rss { key: Vec::new(), ..whole.clone() }, "the key"),
            (Rss { key: vec![0; 40], ..whole.clone() }, "the key"),
            (Rss { table: Vec::new(), ..whole.clone() }, "indirection table"),
            (Rss { symmetric: 4, ..whole }, "unknown way"),
        ] {
            let seen = NicHash::Rss(rss).predict("eth0", &flow("udp 10.0.0.1:1 > 10.0.0.2:2"));
            assert!(seen.reason.contains(part) && seen.queue.is_none(), "{seen:?}");
        }
        let none = NicHash::Unsupported.predict("v0", &flow("udp 10.0.0.1:1 > 10.0.0.2:2"));
        assert_eq!(none.reason, "the device has no receive hash (RSS)");
    }
}
