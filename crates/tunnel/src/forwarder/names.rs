//! Server names in flows (row T12): looked for in their first packets, in both directions, as far as a class asks for them.

use packet::flow::FlowKey;
use packet::ip::IpHeader;
use packet::server_name::{Payload, Search, ServerName, look};
use steering::ownership::Ownership;

use super::flows::{Flows, LOOKS};
use crate::server_names::ServerNames;
use crate::time::Time;

/// ClientHellos that are incomplete at a time, each of 5 KB.
const SEARCHES_MAX: usize = 64;
/// Initials of QUIC that are opened in a while, each for some ten microseconds: one in 25 of a core's time.
const OPENED_MAX: u32 = 400;
/// The while, ns.
const OPENED_NS: u64 = 100_000_000;

/// ClientHellos that have come in part, of one core and bond.
#[derive(Default)]
pub(super) struct Searches {
    /// Hash of the flow, begin, and what has come; the oldest first.
    open: Vec<(u32, Time, Box<Search>)>,
    /// Datagrams that may still be opened, and since when.
    opened: (Time, u32),
}

impl Searches {
    /// Whether nothing is incomplete.
    pub fn is_empty(&self) -> bool {
        self.open.is_empty()
    }

    /// Looks at a flow's payload. `names`: counts what is missed.
    pub fn look(
        &mut self,
        now: Time,
        hash: u32,
        payload: Payload<'_>,
        names: &ServerNames,
    ) -> Option<ServerName> {
        let at = self.open.iter().position(|(of, ..)| *of == hash);
        if at.is_none() && !payload.may_begin() {
            return None;
        }
        if matches!(payload, Payload::Udp { .. }) && payload.may_begin() && !self.may_open(now) {
            names.miss();
            return None;
        }
        let (begun, mut search) = match at.map(|at| self.open.remove(at)) {
            Some((_, begun, search)) => (begun, Some(search)),
            None => (now, None),
        };
        let found = look(&mut search, payload);
        if let Some(search) = search {
            if self.open.len() >= SEARCHES_MAX {
                self.open.remove(0);
                names.miss();
            }
            let place = self.open.partition_point(|(_, other, _)| *other <= begun);
            self.open.insert(place, (hash, begun, search));
        }
        found
    }

    fn may_open(&mut self, now: Time) -> bool {
        if now.since(self.opened.0) >= OPENED_NS {
            self.opened = (now, OPENED_MAX);
        }
        let may = self.opened.1 > 0;
        self.opened.1 = self.opened.1.saturating_sub(1);
        may
    }
}

impl Flows {
    /// Looks at a packet of the peer before it is delivered: what the client there asks for gives what we send back its class.
    pub fn received(&mut self, now: Time, ownership: &Ownership, packet: &[u8]) {
        let Ok(header) = IpHeader::parse(packet) else { return };
        let Some(payload) = Payload::of_packet(&header, packet, 0) else { return };
        let is_syn = matches!(payload, Payload::Tcp { is_syn: true, .. });
        if !is_syn && (payload.is_empty() || (self.searches.is_empty() && !payload.may_begin())) {
            return;
        }
        let flow = FlowKey::of_parsed(&header, packet);
        if !self.classes().asks_for_name(&flow) {
            return;
        }
        let hash = ownership.hash(&flow, 0);
        if is_syn {
            self.names.remove(hash);
        } else if let Some(name) = self.searches.look(now, hash, payload, &self.names) {
            self.names.put(now, hash, &name);
            self.look_again(hash, LOOKS);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use std::sync::Arc;

    use packet::server_name::NamePattern;

    use super::super::flows::{Inner, NO_PATH, Treatment};
    use super::*;
    use crate::class::{Class, ClassRule, Classes};

    const SYN: u8 = 2;
    const ACK: u8 = 16;

    /// A ClientHello for a server in one TLS record.
    fn hello(name: &str) -> Vec<u8> {
        let sized = |bytes: &[u8]| [&(bytes.len() as u16).to_be_bytes(), bytes].concat();
        let names = sized(&[&[0], &sized(name.as_bytes())[..]].concat());
        let extensions = sized(&[&[0, 0], &sized(&names)[..]].concat());
        let body = [&[3, 3][..], &[7; 32], &[0, 0, 2, 0x13, 1, 1, 0], &extensions].concat();
        let message = [&[1, 0][..], &sized(&body)].concat();
        [&[22, 3, 1][..], &sized(&message)].concat()
    }

    /// Of a client at 10.1.0.9:`port`, or of its server at 10.2.0.1:443.
    fn segment(port: u16, of_client: bool, flags: u8, sequence: u32, payload: &[u8]) -> Vec<u8> {
        let mut ends = [([10, 1, 0, 9], port), ([10, 2, 0, 1], 443)];
        if !of_client {
            ends.reverse();
        }
        let mut packet = vec![0x45, 0];
        packet.extend((40 + payload.len() as u16).to_be_bytes());
        packet.extend([0, 0, 0x40, 0, 64, 6, 0, 0]);
        ends.iter().for_each(|(address, _)| packet.extend(address));
        ends.iter().for_each(|(_, port)| packet.extend(port.to_be_bytes()));
        packet.extend(sequence.to_be_bytes());
        packet.extend([0, 0, 0, 0, 0x50, flags, 1, 0, 0, 0, 0, 0]);
        packet.extend(payload);
        packet
    }

    struct Side {
        flows: Flows,
        ownership: Ownership,
    }

    impl Side {
        fn new() -> Self {
            let named = ClassRule {
                class: Class::Pinned,
                to: vec!["10.2.0.0/24".parse().unwrap()],
                server_names: vec![NamePattern::new("*.example.org").unwrap()],
                ..ClassRule::default()
            };
            let flows = Flows::with(Arc::new(Classes::new(vec![named])));
            Self {
                flows,
                ownership: Ownership::new(
                    2,
                    [[0x5a; 40], [7; 40], std::array::from_fn(|at| (at * at + 31 * at) as u8)],
                )
                .unwrap(),
            }
        }

        fn hash(&self, packet: &[u8]) -> u32 {
            self.ownership.hash(&FlowKey::of(packet).unwrap(), 0)
        }

        fn sends(&mut self, ms: u64, packet: &[u8]) -> Class {
            let header = IpHeader::parse(packet).unwrap();
            let flow = FlowKey::of_parsed(&header, packet);
            let inner = Inner { header: &header, bytes: packet, segment_bytes: 0 };
            let hash = self.hash(packet);
            let treatment: Treatment =
                self.flows.packet(Time::from_ms(ms), hash, (&flow, 0), packet.len(), Some(inner));
            treatment.class
        }

        fn receives(&mut self, ms: u64, packet: &[u8]) {
            self.flows.received(Time::from_ms(ms), &self.ownership, packet);
        }
    }

    #[test]
    fn a_flow_changes_its_class_when_its_client_names_the_server() {
        let mut side = Side::new();
        let hello = hello("www.example.org");
        assert_eq!(side.sends(0, &segment(1, true, SYN, 99, b"")), Class::Bulk);
        side.flows.set_path(Time::ZERO, side.hash(&segment(1, true, SYN, 99, b"")), 3, 0);
        assert_eq!(side.sends(1, &segment(1, true, ACK, 100, b"")), Class::Bulk);
        // In two segments.
        assert_eq!(side.sends(2, &segment(1, true, ACK, 100, &hello[..70])), Class::Bulk);
        let second = segment(1, true, ACK, 170, &hello[70..]);
        assert_eq!(side.sends(3, &second), Class::Pinned);
        assert_eq!(side.flows.stay(side.hash(&second)).path, NO_PATH, "it may want another path");
        assert!(side.flows.searches.is_empty());
        assert_eq!(side.sends(4, &segment(1, true, ACK, 400, b"data")), Class::Pinned);
        // So does it under new rules, or on another core: the name is remembered.
        let flows = Flows::with(Arc::new(side.flows.classes().clone()));
        let mut other = Side { flows, ..Side::new() };
        other.flows.names = Arc::clone(&side.flows.names);
        assert_eq!(other.sends(4, &segment(1, true, ACK, 400, b"data")), Class::Pinned);
        // A new connection on the same ports is another flow, and one to another server.
        assert_eq!(side.sends(5, &segment(1, true, SYN, 5_000, b"")), Class::Bulk);
        let other = self::hello("example.net");
        assert_eq!(side.sends(6, &segment(1, true, ACK, 5_001, &other)), Class::Bulk);
        // A flow that no such class is about is not looked into.
        let mut elsewhere = segment(2, true, ACK, 1, &hello[..70]);
        elsewhere[18] = 1;
        assert_eq!(side.sends(7, &elsewhere), Class::Bulk);
        assert!(side.flows.searches.is_empty());
    }

    #[test]
    fn what_a_client_of_the_peer_asks_for_counts_for_the_answers() {
        let mut side = Side::new();
        let hello = hello("www.example.org");
        side.receives(0, &segment(1, true, SYN, 99, b""));
        assert_eq!(side.sends(1, &segment(1, false, SYN | ACK, 7, b"")), Class::Bulk);
        // The second part overtook nothing: the first says where the stream begins.
        side.receives(2, &segment(1, true, ACK, 100, &hello[..70]));
        assert_eq!(side.sends(2, &segment(1, false, ACK, 8, b"")), Class::Bulk);
        side.receives(3, &segment(1, true, ACK, 170, &hello[70..]));
        assert_eq!(side.sends(4, &segment(1, false, ACK, 8, b"server hello")), Class::Pinned);
        // Of another core's flow only the name is left, for whoever sends.
        side.flows.names.put(
            Time::from_ms(5),
            side.hash(&segment(2, true, ACK, 1, b"")),
            &ServerName::new(b"a.example.org").unwrap(),
        );
        assert_eq!(side.sends(5, &segment(2, false, ACK, 8, b"server hello")), Class::Pinned);
        // Who is answered without having asked in time is not looked at for ever.
        for at in 0..u32::from(LOOKS) {
            assert_eq!(side.sends(6, &segment(3, false, ACK, at, b"x")), Class::Bulk);
        }
        side.flows.names.put(
            Time::from_ms(6),
            side.hash(&segment(3, true, ACK, 1, b"")),
            &ServerName::new(b"a.example.org").unwrap(),
        );
        assert_eq!(side.sends(7, &segment(3, false, ACK, 20, b"x")), Class::Bulk);
    }

    #[test]
    fn incomplete_hellos_and_opened_datagrams_have_a_limit() {
        let mut side = Side::new();
        let hello = hello("www.example.org");
        for port in 1..=SEARCHES_MAX as u16 + 5 {
            side.receives(u64::from(port), &segment(port, true, ACK, 100, &hello[..70]));
        }
        assert_eq!(side.flows.searches.open.len(), SEARCHES_MAX);
        assert_eq!(side.flows.names.missed.load(std::sync::atomic::Ordering::Relaxed), 5);
        // The oldest made room, the newest goes on.
        side.receives(200, &segment(5, true, ACK, 170, &hello[70..]));
        assert_eq!(side.sends(201, &segment(5, false, ACK, 8, b"x")), Class::Bulk);
        side.receives(202, &segment(6, true, ACK, 170, &hello[70..]));
        assert_eq!(side.sends(203, &segment(6, false, ACK, 8, b"x")), Class::Pinned);
        let mut searches = Searches::default();
        let may =
            |searches: &mut Searches, ms| (0..1_000).filter(|_| searches.may_open(Time::from_ms(ms))).count();
        assert_eq!(may(&mut searches, 1_000), OPENED_MAX as usize);
        assert_eq!((may(&mut searches, 1_050), may(&mut searches, 1_100)), (0, OPENED_MAX as usize));
    }
}
