//! A hub made of several units: its peers' bonds end at the data planes (row R6).
//!
//! ```text
//!   peer ── datagrams ── dispatcher ══ by receiver index ══ unit that has the session: inner packet
//!                                                             │ by the inner flow's bucket
//!                                                             ▼
//!            peer's bond ══ by the bond's bucket ══ unit that has the flow: services
//! ```
//! Three things have a unit, each by the cluster's table: a *session* the one that its receiver index names; a *bond* the owner of
//! the bucket of its peer's key, or an earlier one that still has its session; an inner *flow* the owner of its own bucket, or an
//! earlier one, whichever unit its bond is at. So a bond moves without its flows, and flows without their bond.

use std::cell::Cell;
use std::sync::Arc;

use cluster::snapshot::{SharedInterface, Snapshot};
use packet::attachment::{BondId, Egress, Ingress, UnitVisit};
use packet::{DropReason, FlowKey, IpHeader, checksum, put_u16};
use services::pipeline::ETHERNET_BYTES;
use services::policy::Policy;
use steering::owner_chain::{Digest, TTL_START};
use steering::units::{Answer, EraSeen, Target};
use tunnel::header::{HEADER_BYTES, Header, Kind};
use tunnel::index::IndexCipher;
use tunnel::node::Node;

/// Initiations that a core opens in a second to find out whose they are; the others go to the unit's own sockets, which ask for a
/// cookie under load.
const OPENED_PER_SECOND: u32 = 200;

/// Answers of a core to datagrams of sessions that are nowhere any more, in a second.
const NO_SESSION_PER_SECOND: u32 = 200;

const NO_SESSION_BYTES_MAX: usize = ETHERNET_BYTES + 40 + UDP_BYTES + HEADER_BYTES;

const UDP: u8 = 17;
const UDP_BYTES: usize = 8;

/// The hub as one core goes by it.
pub(crate) struct Hub {
    /// UDP port that peers dial at the shared addresses.
    port: u16,
    cipher: IndexCipher,
    node: Arc<Node>,
    /// Bonds of the hub's peers, with the key of each among flows; by bond.
    bonds: Vec<(BondId, FlowKey)>,
    seen: Cell<EraSeen>,
    /// A second, and how many Initiations were opened or answers given in it: a data plane does the one, a dispatcher the other.
    spent: Cell<(u64, u32)>,
}

/// Way of a packet for a peer of the hub.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// The session is here.
    Here(BondId),
    /// Another unit has it, or knows who does.
    Unit(Target),
}

impl Hub {
    /// The hub of a snapshot; `None`: there is none.
    pub fn of(snapshot: &Snapshot, node: &Arc<Node>) -> Option<Self> {
        let mut bonds: Vec<_> = node.hub_bonds().iter().map(|bond| (bond.id, bond.flow_key())).collect();
        bonds.sort_by_key(|(id, _)| *id);
        let mut seen = EraSeen::default();
        seen.note(&snapshot.units);
        Some(Self {
            port: snapshot.hub_port?,
            cipher: IndexCipher::of_cluster(snapshot.units.hasher.key()),
            node: Arc::clone(node),
            bonds,
            seen: Cell::new(seen),
            spent: Cell::default(),
        })
    }

    /// Goes on with what the cores before have seen.
    pub fn after(self, before: Option<&Self>, snapshot: &Snapshot) -> Self {
        if let Some(before) = before {
            let mut seen = before.seen.get();
            seen.note(&snapshot.units);
            self.seen.set(seen);
            self.spent.set(before.spent.get());
        }
        self
    }

    /// Whether a packet of a shared interface is a datagram of a peer.
    #[inline]
    pub fn is_datagram(&self, key: &FlowKey, shared: &SharedInterface) -> bool {
        key.protocol == UDP && key.dst_port == self.port && shared.addresses.contains(&key.dst)
    }

    /// The unit of a peer's datagram: that of its session; for an Initiation any, always the same for one source.
    ///
    /// # Errors
    /// [`DropReason::UnitUnknown`]: the unit takes no part any more. Of datagrams that cannot be read.
    pub fn unit_of(&self, snapshot: &Snapshot, key: &FlowKey, frame: &[u8]) -> Result<u16, DropReason> {
        let header = Header::parse(datagram_of(frame)?)?;
        if header.kind == Kind::Initiation {
            let units = &snapshot.units;
            return Ok(units.table_in_force().owner(units.bucket(key)));
        }
        let (unit, _) = self.cipher.parts(header.receiver_index);
        let member = snapshot.member(unit).filter(|member| member.role.owns_flows());
        member.map(|member| member.node).ok_or(DropReason::UnitUnknown)
    }

    /// Answer to a peer whose datagram names a unit that takes no part any more: it makes a new session at once.
    pub fn no_session(&self, now_ns: u64, frame: &[u8]) -> Option<NoSession> {
        self.spend(now_ns, NO_SESSION_PER_SECOND)?;
        NoSession::to(frame)
    }

    /// One of so many in a second.
    fn spend(&self, now_ns: u64, per_second: u32) -> Option<()> {
        let second = now_ns / 1_000_000_000;
        let (counted, spent) = self.spent.get();
        let spent = if counted == second { spent } else { 0 };
        self.spent.set((second, spent + 1));
        (spent < per_second).then_some(())
    }

    /// The unit that has to answer an Initiation that a dispatcher brought here; `None`: this one, or it cannot be told.
    pub fn answerer(&self, now_ns: u64, snapshot: &Snapshot, visit: &UnitVisit, frame: &[u8]) -> Option<u16> {
        let datagram = datagram_of(frame).ok()?;
        if Header::parse(datagram).ok()?.kind != Kind::Initiation || visit.ttl != TTL_START {
            return None;
        }
        self.spend(now_ns, OPENED_PER_SECOND)?;
        let key = self.node.hub_initiator(datagram).ok()?;
        let units = &snapshot.units;
        let unit = units.table_in_force().owner(units.bucket(&tunnel::node::flow_key_of(&key)));
        Some(unit).filter(|unit| *unit != units.node)
    }

    /// Whether the peer of a bond is the hub's.
    #[inline]
    pub fn has(&self, bond: BondId) -> bool {
        self.key(bond).is_some()
    }

    #[inline]
    fn key(&self, bond: BondId) -> Option<&FlowKey> {
        let place = self.bonds.binary_search_by_key(&bond, |(known, _)| *known).ok()?;
        self.bonds.get(place).map(|(_, key)| key)
    }

    /// The hub's bond that a peer's address belongs to.
    pub fn bond_of(&self, policy: &Policy, address: std::net::IpAddr) -> Option<BondId> {
        match policy.fib.lookup(0, address)?.egress {
            Egress::Bond(bond) => Some(bond).filter(|bond| self.has(*bond)),
            _ => None,
        }
    }

    /// Where a packet for a peer goes. `visit`: how it came from another unit.
    ///
    /// # Errors
    /// [`DropReason::NoPath`]: no unit has a session with the peer. [`DropReason::BusTtlExpired`], [`DropReason::EraUnknown`].
    pub fn way(
        &self,
        snapshot: &Snapshot,
        bond: BondId,
        visit: Option<UnitVisit>,
    ) -> Result<Way, DropReason> {
        let key = self.key(bond).ok_or(DropReason::NoRoute)?;
        let units = &snapshot.units;
        let visit = match visit {
            Some(visit) => visit,
            None => {
                let target = units.dispatch(key);
                if target.unit != units.node {
                    return Ok(Way::Unit(target));
                }
                target.visit
            }
        };
        if self.node.in_session(bond) {
            return Ok(Way::Here(bond));
        }
        let mut seen = self.seen.get();
        let answer = units.ask(key, &visit, Digest::Unknown, &mut seen);
        self.seen.set(seen);
        match answer {
            Answer::Begin => Err(DropReason::NoPath),
            Answer::Send(target) => Ok(Way::Unit(target)),
            Answer::TooOften => Err(DropReason::BusTtlExpired),
            Answer::EraUnknown => Err(DropReason::EraUnknown),
        }
    }

    /// The unit of an inner packet that a peer of the hub sent here.
    ///
    /// # Errors
    /// Of packets that cannot be read.
    pub fn dispatch(
        &self,
        snapshot: &Snapshot,
        policy: &Policy,
        ingress: Ingress,
        packet: &[u8],
    ) -> Result<Option<Target>, DropReason> {
        let Ingress::Bond(bond) = ingress else { return Ok(None) };
        if !self.has(bond) {
            return Ok(None);
        }
        let key = services::steer::unit_key(policy, &FlowKey::of(packet)?);
        Ok(Some(snapshot.units.dispatch(&key)))
    }
}

/// Answer to a peer whose session is nowhere any more.
pub(crate) struct NoSession {
    bytes: [u8; NO_SESSION_BYTES_MAX],
    len: usize,
}

impl NoSession {
    /// Answer to the datagram in a frame; `None`: it is none of a session.
    fn to(frame: &[u8]) -> Option<Self> {
        let packet = frame.get(ETHERNET_BYTES..)?;
        let ip = IpHeader::parse(packet).ok()?;
        let header =
            Header::parse(datagram_of(frame).ok()?).ok().filter(|header| !header.kind.is_handshake())?;
        let at = ETHERNET_BYTES + ip.header_bytes;
        if ip.header_bytes != if ip.version == 4 { 20 } else { 40 } {
            return None;
        }
        let len = at + UDP_BYTES + HEADER_BYTES;
        let mut bytes = [0; NO_SESSION_BYTES_MAX];
        bytes.get_mut(..len)?.copy_from_slice(frame.get(..len)?);
        let [to, from] = [frame.get(..6)?, frame.get(6..12)?];
        bytes.get_mut(..6)?.copy_from_slice(from);
        bytes.get_mut(6..12)?.copy_from_slice(to);
        bytes.get_mut(at + UDP_BYTES..len)?.copy_from_slice(&header.no_session().to_bytes());
        let udp = bytes.get_mut(at..len)?;
        udp.swap(0, 2);
        udp.swap(1, 3);
        put_u16(udp, 4, (UDP_BYTES + HEADER_BYTES) as u16);
        put_u16(udp, 6, 0);
        let pseudo = checksum::pseudo_header(ip.dst, ip.src, UDP, udp.len());
        let sum = checksum::nonzero(checksum::finish(checksum::sum(udp, pseudo)));
        put_u16(udp, 6, sum);
        write_ip(bytes.get_mut(ETHERNET_BYTES..len)?, ip.version);
        Some(Self { bytes, len })
    }

    /// The frame.
    pub fn frame(&mut self) -> &mut [u8] {
        self.bytes.get_mut(..self.len).unwrap_or_default()
    }
}

/// Turns an IP header round, for the packet that it is in front of now.
fn write_ip(packet: &mut [u8], version: u8) {
    let total = packet.len() as u16;
    let (addresses, bytes) = if version == 4 { (12..20, 4) } else { (8..40, 16) };
    if let Some((source, destination)) = packet.get_mut(addresses).map(|both| both.split_at_mut(bytes)) {
        source.swap_with_slice(destination);
    }
    if version == 4 {
        put_u16(packet, 2, total);
        put_u16(packet, 10, 0);
        let sum = packet.get(..20).map_or(0, |header| checksum::finish(checksum::sum(header, 0)));
        put_u16(packet, 10, sum);
    } else {
        put_u16(packet, 4, total - 40);
    }
}

/// The UDP payload of an Ethernet frame.
fn datagram_of(frame: &[u8]) -> Result<&[u8], DropReason> {
    let packet = frame.get(ETHERNET_BYTES..).ok_or(DropReason::TooShort)?;
    let header = IpHeader::parse(packet)?;
    packet.get(header.header_bytes + UDP_BYTES..header.total_bytes).ok_or(DropReason::TooShort)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::net::IpAddr;

    use cluster::message::{Member, Role};
    use packet::attachment::InterfaceId;
    use packet::checksum::verify_packet;
    use steering::era::Eras;
    use steering::symmetric::FlowHasher;
    use steering::table::BucketTable;
    use steering::units::{Leases, Units};
    use tunnel::config::NodeConfig;

    use super::*;

    fn snapshot() -> Snapshot {
        let member =
            |node, role| Member { node, role, weight: 1, address: format!("10.9.0.{node}").parse().unwrap() };
        let (eras, hasher) =
            (Eras::new(BucketTable::from_owners(0, vec![5, 7]).unwrap()), FlowHasher::new([7; 40]));
        Snapshot {
            number: 1,
            role: Role::Dispatcher,
            units: Arc::new(Units { node: 2, hasher, eras, in_force: 0, leases: Leases::default() }),
            members: vec![
                member(2, Role::Dispatcher),
                member(5, Role::DataPlane),
                member(7, Role::DataPlane),
            ],
            order: vec![5, 7],
            shared: vec![SharedInterface {
                ifid: 0,
                interface: InterfaceId(0),
                addresses: vec!["10.1.0.1".parse().unwrap(), "fd00::1".parse().unwrap()],
                dispatchers: Vec::new(),
                holding: Arc::new(cluster::snapshot::Holding::new(true)),
            }],
            hub_port: Some(4_600),
            answers_too_big: true,
        }
    }

    fn hub(snapshot: &Snapshot) -> Hub {
        let node = Node::new(NodeConfig::of_number(2, 1));
        Hub::of(snapshot, &Arc::new(node)).unwrap()
    }

    fn datagram(kind: Kind, unit: u16) -> Vec<u8> {
        let cipher = IndexCipher::of_cluster(&[7; 40]);
        let receiver_index = cipher.index(unit, 99);
        let header = Header { kind, receiving_core: 1, sending_core: 2, path: 3, receiver_index, counter: 4 };
        let mut bytes = header.to_bytes().to_vec();
        bytes.extend([0xee; 60]);
        bytes
    }

    fn frame(from: &str, to: &str, port: u16, payload: &[u8]) -> Vec<u8> {
        let (from, to): (IpAddr, IpAddr) = (from.parse().unwrap(), to.parse().unwrap());
        let udp_bytes = (UDP_BYTES + payload.len()) as u16;
        let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 9];
        match (from, to) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                frame.extend([0x08, 0x00, 0x45, 0]);
                frame.extend((20 + udp_bytes).to_be_bytes());
                frame.extend([0, 0, 0x40, 0, 64, UDP, 0, 0]);
                frame.extend([from.octets(), to.octets()].concat());
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
                frame.extend(udp_bytes.to_be_bytes());
                frame.extend([UDP, 64]);
                frame.extend([from.octets(), to.octets()].concat());
            }
            _ => unreachable!(),
        }
        for field in [50_000, port, udp_bytes, 0] {
            frame.extend(field.to_be_bytes());
        }
        frame.extend(payload);
        frame
    }

    #[test]
    fn a_datagram_goes_to_the_unit_that_its_index_names() {
        let snapshot = snapshot();
        let hub = hub(&snapshot);
        for (from, to) in [("10.1.0.2", "10.1.0.1"), ("fd00::2", "fd00::1")] {
            for kind in [Kind::Data, Kind::Partial, Kind::Clear, Kind::Response, Kind::Cookie] {
                for unit in [5, 7] {
                    let frame = frame(from, to, 4_600, &datagram(kind, unit));
                    let key = FlowKey::of(&frame[ETHERNET_BYTES..]).unwrap();
                    assert!(hub.is_datagram(&key, &snapshot.shared[0]));
                    assert_eq!(hub.unit_of(&snapshot, &key, &frame), Ok(unit));
                }
                // Of one that is gone, and of one that owns no flows.
                for unit in [6, 2] {
                    let frame = frame(from, to, 4_600, &datagram(kind, unit));
                    let key = FlowKey::of(&frame[ETHERNET_BYTES..]).unwrap();
                    assert_eq!(hub.unit_of(&snapshot, &key, &frame), Err(DropReason::UnitUnknown));
                }
            }
            let frame = frame(from, to, 4_601, &[]);
            let key = FlowKey::of(&frame[ETHERNET_BYTES..]).unwrap();
            assert!(!hub.is_datagram(&key, &snapshot.shared[0]), "another port");
            assert_eq!(hub.unit_of(&snapshot, &key, &frame), Err(DropReason::TooShort));
        }
    }

    #[test]
    fn initiations_of_one_source_go_to_one_unit() {
        let snapshot = snapshot();
        let hub = hub(&snapshot);
        let unit = |unit| {
            let frame = frame("10.1.0.2", "10.1.0.1", 4_600, &datagram(Kind::Initiation, unit));
            let key = FlowKey::of(&frame[ETHERNET_BYTES..]).unwrap();
            hub.unit_of(&snapshot, &key, &frame).unwrap()
        };
        // The index is the dialer's own and says nothing.
        assert_eq!([unit(1), unit(2), unit(3)], [unit(6); 3]);
    }

    #[test]
    fn who_has_no_session_is_told_so_and_not_too_often() {
        let snapshot = snapshot();
        let hub = hub(&snapshot);
        for (from, to) in [("10.1.0.2", "10.1.0.1"), ("fd00::2", "fd00::1")] {
            let frame = frame(from, to, 4_600, &datagram(Kind::Data, 6));
            let mut answer = hub.no_session(9_000_000_000, &frame).unwrap();
            let answer = answer.frame();
            assert_eq!((&answer[..6], &answer[6..12]), (&frame[6..12], &frame[..6]));
            let packet = &answer[ETHERNET_BYTES..];
            assert!(verify_packet(packet), "{packet:x?}");
            let key = FlowKey::of(packet).unwrap();
            assert_eq!(key.reversed(), FlowKey::of(&frame[ETHERNET_BYTES..]).unwrap());
            let came = Header::parse(datagram_of(&frame).unwrap()).unwrap();
            let told = datagram_of(answer).unwrap();
            assert_eq!((told.len(), Header::parse(told)), (HEADER_BYTES, Ok(came.no_session())));
            assert_eq!((came.no_session().receiver_index, came.no_session().path), (came.receiver_index, 3));
        }
        let handshake = frame("10.1.0.2", "10.1.0.1", 4_600, &datagram(Kind::Response, 6));
        assert!(hub.no_session(9_000_000_000, &handshake).is_none(), "no answer to answers");
        let frame = frame("10.1.0.2", "10.1.0.1", 4_600, &datagram(Kind::Data, 6));
        let answers = (0..1_000).filter(|_| hub.no_session(9_000_000_000, &frame).is_some()).count();
        assert!(answers < 200, "{answers}");
        assert!(hub.no_session(10_000_000_000, &frame).is_some(), "in another second");
    }
}
