//! Memory of the sending side for each flow: its class, the path it stays on, how much it sends.
//!
//! A small table in which a flow has four places by its hash; it grows only when flows that are alive would push each other
//! out, up to [`PLACES_MAX`]. A flow that lost its place is classified again with its next packet: the rules are asked once a flow,
//! not once a packet.

use std::sync::Arc;

use packet::flow::FlowKey;
use packet::ip::{IpHeader, PROTOCOL_TCP, PROTOCOL_UDP};
use packet::server_name::{Payload, ServerName};

use super::media::Shape;
use super::names::Searches;
use crate::bond::Bond;
use crate::class::{Class, Classes, NO_RULE};
use crate::config::Spread;
use crate::server_names::ServerNames;
use crate::time::Time;

/// Places at first, and at most.
const PLACES_MIN: usize = 64;
const PLACES_MAX: usize = 4_096;
/// Places of one flow.
const WAYS: usize = 4;
/// A flow that sent nothing for so long may lose its place, ms.
const ALIVE_MS: u32 = 10_000;
/// A flow is sparse while it sends less than this in a burst and 80 kB/s on average.
const SPARSE_BURST_BYTES: u32 = 8_192;
const SPARSE_BYTES_PER_MS: u32 = 80;
/// UDP's header.
const UDP_HEADER_BYTES: usize = 8;
/// So many packets with a payload are looked at for the server's name, or until the other direction may have told.
pub(super) const LOOKS: u8 = 8;
/// The flow has no path yet.
pub(super) const NO_PATH: u8 = u8::MAX;

/// A flow as it is remembered.
#[derive(Clone, Copy, Debug)]
struct Known {
    hash: u32,
    /// Era of the rules that classified it; 0: nobody is here.
    era: u32,
    /// Leaky bucket: bytes, and when that was right.
    level: u32,
    at_ms: u32,
    shape: Shape,
    /// Time between its last two packets, ms.
    gap_ms: u16,
    class: Class,
    rule: u8,
    dscp: u8,
    path: u8,
    /// When its newest packet left on that path and was expected at the peer, µs; the latter by the relative delays of the paths.
    left_us: u32,
    lands_us: u32,
    /// Packets that are still looked at for the name of its server.
    looks: u8,
    /// Class by which the peer's core was chosen for it.
    core_class: Class,
}

const NOBODY: Known = Known {
    hash: 0,
    era: 0,
    level: 0,
    at_ms: 0,
    shape: Shape::NEW,
    gap_ms: u16::MAX,
    class: Class::Bulk,
    rule: NO_RULE,
    dscp: 0,
    path: NO_PATH,
    left_us: 0,
    lands_us: 0,
    looks: 0,
    core_class: Class::Bulk,
};

impl Known {
    /// Classifies it, by the name of its server too if that is known.
    fn classify(&mut self, classes: &Classes, flow: &FlowKey, name: Option<&ServerName>) {
        let (class, rule) = classes.decide(flow, self.dscp, name);
        if self.class != class || self.rule != rule {
            // Of another class it may want another path.
            self.path = NO_PATH;
        }
        self.looks = if name.is_none() && classes.asks_for_name(flow) { LOOKS } else { 0 };
        (self.class, self.rule) = (class, rule);
    }
}

/// An inner packet as far as it is looked into.
#[derive(Clone, Copy)]
pub(super) struct Inner<'a> {
    pub header: &'a IpHeader,
    pub bytes: &'a [u8],
    /// Payload of each segment of a super-packet, 0 in others.
    pub segment_bytes: u16,
}

impl<'a> Inner<'a> {
    /// Payload of a datagram of UDP.
    fn datagram(self) -> &'a [u8] {
        self.header.payload(self.bytes).get(UDP_HEADER_BYTES..).unwrap_or_default()
    }

    fn payload(self) -> Option<Payload<'a>> {
        Payload::of_packet(self.header, self.bytes, self.segment_bytes)
    }
}

/// A packet's flow, as it is to be treated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Treatment {
    /// Class of the flow.
    pub class: Class,
    /// It leaves at once, past what is paced, and has no place in the order.
    pub express: bool,
    /// Class by which its core at the peer is chosen: another one counts only when nothing of the flow is under way any more.
    pub core_class: Class,
    /// Its packets stay on one path: they have no place in the order, and would pass each other on several.
    pub stays: bool,
}

/// The flow's path so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stay {
    /// [`NO_PATH`]: none yet.
    pub path: u8,
    /// When its newest packet left there, µs; wraps.
    pub left_us: u32,
    /// When it was expected at the peer, µs, as the relative delays of the paths count; wraps.
    pub lands_us: u32,
    /// Rule that classified it.
    pub rule: u8,
}

/// Flows of one core and bond.
#[derive(Default)]
pub(super) struct Flows {
    places: Box<[Known]>,
    classes: Arc<Classes>,
    era: u32,
    /// How bulk is spread over the paths.
    pub spread: Spread,
    /// Servers that they ask for.
    pub names: Arc<ServerNames>,
    pub searches: Searches,
    /// Of a flow that rested for so long nothing is under way, ms.
    pub rest_ms: u16,
}

impl Flows {
    #[cfg(test)]
    pub fn with(classes: Arc<Classes>) -> Self {
        Self { classes, era: 1, ..Self::default() }
    }

    /// Takes over new rules of the bond, if there are any.
    pub fn follow(&mut self, bond: &Bond) {
        let era = bond.classes.era();
        if era != self.era {
            self.era = era;
            self.classes = bond.classes.rules();
            self.spread = bond.classes.spread();
            self.names = Arc::clone(&bond.classes.names);
        }
    }

    /// The rules in force.
    pub fn classes(&self) -> &Classes {
        &self.classes
    }

    /// Takes one packet of so many bytes into account; none: it has no payload and does not count. `inner`: the packet, if it may
    /// be looked into.
    pub fn packet(
        &mut self,
        now: Time,
        hash: u32,
        (flow, dscp): (&FlowKey, u8),
        bytes: usize,
        inner: Option<Inner<'_>>,
    ) -> Treatment {
        let now_ms = now.ms() as u32;
        let at = self.place(now_ms, hash);
        let sees_names = self.classes.look_at_names();
        let payload = inner.filter(|_| sees_names).and_then(Inner::payload);
        let Self { places, classes, era, names, .. } = self;
        let known = &mut places[at];
        let is_first = known.era == 0;
        // A new connection on the ports of an old one asks for a server of its own.
        let is_syn = matches!(payload, Some(Payload::Tcp { is_syn: true, .. }));
        if known.era != *era || (classes.look_at_marks() && known.dscp != dscp) || is_syn {
            if is_syn {
                names.remove(hash);
            }
            let name = if sees_names { names.get(hash) } else { None };
            (known.dscp, known.era) = (dscp, *era);
            known.classify(classes, flow, name.as_ref());
        }
        if let Some(payload) = payload.filter(|payload| !payload.is_empty()) {
            self.look_for_name(now, (at, hash), flow, payload);
        }
        let known = &mut self.places[at];
        let since_ms = now_ms.wrapping_sub(known.at_ms);
        known.gap_ms = u16::try_from(since_ms).unwrap_or(u16::MAX);
        known.level = known.level.saturating_sub(since_ms.saturating_mul(SPARSE_BYTES_PER_MS));
        known.at_ms = now_ms;
        let level = known.level.saturating_add(u32::try_from(bytes).unwrap_or(u32::MAX));
        known.level = level.min(4 * SPARSE_BURST_BYTES);
        let sparse = known.level <= SPARSE_BURST_BYTES;
        if known.rule == NO_RULE && flow.protocol == PROTOCOL_UDP {
            let media = known.shape.look(inner.map_or(&[], Inner::datagram), known.gap_ms);
            known.class = if media { Class::Interactive } else { Class::Bulk };
        }
        if is_first || is_syn || known.gap_ms >= self.rest_ms {
            known.core_class = known.class;
        }
        let express = match known.class {
            Class::Interactive | Class::Critical => true,
            // Over all paths in turn: what leaves at once would be out of order.
            Class::Bulk if self.spread == Spread::Uniform => false,
            Class::Bulk | Class::Cheap => sparse,
            // Paced with the rest of its flow: on one path, what leaves at once would overtake it.
            Class::Pinned => false,
        };
        // TCP puts its few packets back in order itself, and its acknowledgements are many.
        let stays = express && flow.protocol != PROTOCOL_TCP;
        Treatment { class: known.class, express, core_class: known.core_class, stays }
    }

    /// A flow's server is asked for here, or was in the other direction.
    fn look_for_name(&mut self, now: Time, (at, hash): (usize, u32), flow: &FlowKey, payload: Payload<'_>) {
        let Self { places, classes, names, searches, .. } = self;
        let known = &mut places[at];
        // A new connection of QUIC on the ports of an old one shows by nothing else.
        let begins = matches!(payload, Payload::Udp { .. }) && payload.may_begin();
        if known.looks == 0 && !(begins && classes.asks_for_name(flow)) {
            return;
        }
        known.looks = known.looks.saturating_sub(1);
        let asked = searches.look(now, hash, payload, names);
        if let Some(name) = &asked {
            names.put(now, hash, name);
        }
        if let Some(name) = asked.or_else(|| names.get(hash)) {
            known.classify(classes, flow, Some(&name));
        }
    }

    /// The next packets of the flow with this hash are looked at again, if there were any.
    pub fn look_again(&mut self, hash: u32, looks: u8) {
        if let Some(at) = self.find(hash) {
            self.places[at].looks = looks;
        }
    }

    /// Where the flow with this hash goes so far.
    pub fn stay(&self, hash: u32) -> Stay {
        let found = self.find(hash).map(|at| &self.places[at]);
        found.map_or(Stay { path: NO_PATH, left_us: 0, lands_us: 0, rule: NO_RULE }, |known| Stay {
            path: known.path,
            left_us: known.left_us,
            lands_us: known.lands_us,
            rule: known.rule,
        })
    }

    /// The flow with this hash goes over `path` from now on; a packet that leaves now takes `takes_us` by the paths' relative delays.
    pub fn set_path(&mut self, now: Time, hash: u32, path: u8, takes_us: i64) {
        if let Some(at) = self.find(hash) {
            let known = &mut self.places[at];
            known.path = path;
            known.left_us = now.us() as u32;
            known.lands_us = (now.us() as i64).wrapping_add(takes_us) as u32;
        }
    }

    /// First of the places of a flow.
    fn first(&self, hash: u32) -> usize {
        // The low bits chose the core: multiplying mixes the others in.
        let sets = self.places.len() / WAYS;
        (hash.wrapping_mul(0x9e37_79b1) >> 12) as usize % sets.max(1) * WAYS
    }

    fn find(&self, hash: u32) -> Option<usize> {
        let first = self.first(hash);
        let of_flow = self.places.get(first..first + WAYS)?;
        of_flow.iter().position(|known| known.era != 0 && known.hash == hash).map(|way| first + way)
    }

    /// The place of a flow, made if need be.
    fn place(&mut self, now_ms: u32, hash: u32) -> usize {
        if let Some(at) = self.find(hash) {
            return at;
        }
        self.make_place(now_ms, hash)
    }

    #[cold]
    fn make_place(&mut self, now_ms: u32, hash: u32) -> usize {
        if self.places.is_empty() {
            self.places = vec![NOBODY; PLACES_MIN].into_boxed_slice();
        }
        let age = |known: &Known| if known.era == 0 { u32::MAX } else { now_ms.wrapping_sub(known.at_ms) };
        loop {
            let first = self.first(hash);
            let ways = first..first + WAYS;
            let oldest = ways.max_by_key(|at| age(&self.places[*at])).unwrap_or(first);
            if age(&self.places[oldest]) >= ALIVE_MS || self.places.len() >= PLACES_MAX {
                self.places[oldest] = Known { hash, at_ms: now_ms, ..NOBODY };
                return oldest;
            }
            self.grow(now_ms);
        }
    }

    /// Doubles the table; flows that find no place in it are classified again.
    fn grow(&mut self, now_ms: u32) {
        let places = vec![NOBODY; self.places.len() * 2].into_boxed_slice();
        let old = std::mem::replace(&mut self.places, places);
        let alive = |known: &&Known| known.era != 0 && now_ms.wrapping_sub(known.at_ms) < ALIVE_MS;
        for known in old.iter().filter(alive) {
            let first = self.first(known.hash);
            if let Some(free) = (first..first + WAYS).find(|at| self.places[*at].era == 0) {
                self.places[free] = *known;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use packet::ip::IpHeader;

    use super::*;
    use crate::class::ClassRule;

    fn packet(dscp: u8) -> Vec<u8> {
        let mut packet = vec![0; 60];
        packet[..20].copy_from_slice(&[
            0x45,
            dscp << 2,
            0,
            60,
            0,
            0,
            0,
            0,
            64,
            6,
            0,
            0,
            10,
            1,
            0,
            1,
            10,
            2,
            0,
            1,
        ]);
        packet
    }

    fn treat(flows: &mut Flows, ms: u64, hash: u32, dscp: u8, bytes: usize) -> Treatment {
        let mut packet = packet(dscp);
        let header = IpHeader::parse(&packet).unwrap();
        packet.resize(bytes, 0);
        let flow = FlowKey::of_parsed(&header, &packet);
        flows.packet(Time::from_ms(ms), hash, (&flow, header.dscp), packet.len(), None)
    }

    fn with(rules: Vec<ClassRule>) -> Flows {
        Flows::with(Arc::new(Classes::new(rules)))
    }

    #[test]
    fn a_flow_is_sparse_until_it_sends_much_and_again_after_a_rest() {
        let mut flows = with(Vec::new());
        let express = |flows: &mut Flows, ms| treat(flows, ms, 7, 0, 1_500).express;
        assert_eq!((0..7).filter(|_| express(&mut flows, 1_000)).count(), 5);
        assert!(!express(&mut flows, 1_010));
        assert!(express(&mut flows, 1_500));
    }

    #[test]
    fn the_class_is_decided_once_and_anew_when_rules_or_marks_change() {
        let marked = ClassRule { dscp: vec![46], class: Class::Critical, ..ClassRule::default() };
        let mut flows = with(vec![marked]);
        assert_eq!(treat(&mut flows, 0, 7, 0, 60).class, Class::Bulk);
        flows.set_path(Time::from_us(500), 7, 3, -20);
        assert_eq!(flows.stay(7), Stay { path: 3, left_us: 500, lands_us: 480, rule: NO_RULE });
        assert_eq!(
            treat(&mut flows, 20, 7, 46, 60),
            Treatment { class: Class::Critical, express: true, core_class: Class::Critical, stays: false }
        );
        // Of another class it may want another path.
        assert_eq!((flows.stay(7).path, flows.stay(7).rule), (NO_PATH, 0));
        flows.classes =
            Arc::new(Classes::new(vec![ClassRule { class: Class::Pinned, ..ClassRule::default() }]));
        assert_eq!(treat(&mut flows, 30, 7, 46, 60).class, Class::Critical, "not asked twice");
        flows.era = 2;
        assert_eq!(
            treat(&mut flows, 30, 7, 46, 60),
            Treatment { class: Class::Pinned, express: false, core_class: Class::Pinned, stays: false }
        );
    }

    #[test]
    fn living_flows_keep_their_place_and_memory_has_a_limit() {
        let mut flows = with(Vec::new());
        let hash = |n: u32| n.wrapping_mul(0x85eb_ca6b) ^ n >> 3;
        for n in 0..1_000 {
            treat(&mut flows, 0, hash(n), 0, 60);
            flows.set_path(Time::ZERO, hash(n), 5, 0);
        }
        let kept = (0..1_000).filter(|n| flows.stay(hash(*n)).path == 5).count();
        assert!(kept > 950, "{kept}");
        for n in 0..100_000 {
            treat(&mut flows, 1, hash(n), 0, 60);
        }
        assert_eq!(flows.places.len(), PLACES_MAX);
        // A few flows after each other need no large table.
        let mut few = with(Vec::new());
        for n in 0..10_000 {
            treat(&mut few, u64::from(n) * 400, hash(n), 0, 60);
        }
        assert!(few.places.len() <= PLACES_MAX / 8, "{}", few.places.len());
    }

    /// Row T2: what is under way to one core must not be overtaken by what goes to another.
    #[test]
    fn a_flow_goes_to_the_core_of_its_new_class_after_a_rest() {
        let marked = ClassRule { dscp: vec![46], class: Class::Critical, ..ClassRule::default() };
        let mut flows = Flows { rest_ms: 30, ..with(vec![marked]) };
        let mut core_class = |ms, dscp| treat(&mut flows, ms, 7, dscp, 60).core_class;
        assert_eq!(core_class(0, 0), Class::Bulk);
        assert_eq!(core_class(29, 46), Class::Bulk);
        assert_eq!(core_class(58, 46), Class::Bulk);
        assert_eq!(core_class(88, 46), Class::Critical);
    }
}
