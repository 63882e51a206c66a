//! Fragments (row C5): held at the core of their addresses until the ports are known, then at the core of the flow.

use packet::attachment::{Egress, Ingress};
use packet::ip::{IpHeader, PROTOCOL_SCTP};
use packet::vnet::VirtioNetHeader;
use packet::{DropReason, FlowKey};

use super::next_hops::Hop;
use super::{Services, Direction, ETHERNET_BYTES, Frame, Origin, Outcome, Output, Piece, established};
use crate::flow::flags;
use crate::fragment::{self, Action, Facts, Measure, PacketId, Told, Variant};
use crate::nat::NatClient;
use crate::policy::Service;

impl Services {
    /// A fragment as it was read: to the core of its addresses, which holds it until its header has come.
    pub(super) fn fragment(
        &mut self,
        now_ns: u64,
        frame: &mut Frame<'_>,
        tenant: u16,
        origin: Origin,
        out: &mut impl Output,
    ) {
        let header = match IpHeader::parse(frame.packet()) {
            Ok(header) => header,
            Err(reason) => return self.dropped(frame, reason),
        };
        let addresses = FlowKey::of_parsed(&header, frame.packet());
        let home = self.ownership.owner_of_bucket(self.ownership.bucket(&addresses, tenant));
        if origin == Origin::Wire && home != self.id && self.ownership.is_alive(home) {
            return self.pass_on(frame, home, Origin::Handed { visit: 0 }, None, out);
        }
        let mut released = Vec::new();
        let result =
            self.rendezvous.push(now_ns, frame.packet(), &header, tenant, frame.ingress, &mut |piece| {
                let mut bytes = Vec::with_capacity(ETHERNET_BYTES + piece.packet.len());
                bytes.resize(ETHERNET_BYTES, 0);
                bytes.extend_from_slice(piece.packet);
                released.push((bytes, Piece { key: piece.key, measure: piece.measure }));
            });
        frame.outcome = Outcome::Consumed;
        for (mut bytes, piece) in released {
            let mut held = Frame::new(frame.ingress, VirtioNetHeader::default(), &mut bytes);
            self.piece(now_ns, &mut held, &piece, Origin::Wire, out);
            self.settle(held, out);
        }
        if let Err(reason) = result {
            self.dropped(frame, reason);
        }
    }

    /// A fragment whose flow is known: to the flow's core, which assembles or bridges.
    pub(super) fn piece(
        &mut self,
        now_ns: u64,
        frame: &mut Frame<'_>,
        piece: &Piece,
        origin: Origin,
        out: &mut impl Output,
    ) {
        let tenant = self.policy.tenant_of(frame.ingress);
        let hash = self.flows.hash(&piece.key, tenant);
        if self.flows.find(hash, &piece.key, tenant).is_none() {
            match self.next_stop(frame.ingress, &piece.key, tenant, origin) {
                Ok(None) => {}
                Ok(Some((core, visit))) => {
                    return self.pass_on(frame, core, Origin::Handed { visit }, Some(*piece), out);
                }
                Err(reason) => return self.dropped(frame, reason),
            }
        }
        if let Err(reason) = self.own_piece(now_ns, frame, piece, tenant, out) {
            self.dropped(frame, reason);
        }
    }

    fn own_piece(
        &mut self,
        now_ns: u64,
        frame: &mut Frame<'_>,
        piece: &Piece,
        tenant: u16,
        out: &mut impl Output,
    ) -> Result<(), DropReason> {
        let header = IpHeader::parse(frame.packet())?;
        let id = PacketId::of(&header, tenant, frame.ingress).ok_or(DropReason::FragmentInvalid)?;
        if self.fragments.told(&id).is_none() {
            let action = if self.must_assemble(&piece.key, tenant, frame.ingress) {
                Action::Assemble
            } else {
                let facts = self.facts(&piece.key, tenant, frame);
                self.fragment_variant().action(&facts, &piece.measure, self.load_percent)
            };
            self.fragments.tell(now_ns, &Told { id, key: piece.key, action })?;
        }
        match self.fragments.push(now_ns, &id, frame.packet(), &header)? {
            fragment::Outcome::Held | fragment::Outcome::Copy => {
                frame.outcome = Outcome::Consumed;
                Ok(())
            }
            fragment::Outcome::Bridge(key) => self.bridge(now_ns, frame, &header, &key, tenant, out),
            fragment::Outcome::Whole(whole) => {
                let mut bytes = Vec::with_capacity(ETHERNET_BYTES + whole.packet.len());
                bytes.resize(ETHERNET_BYTES, 0);
                bytes.extend_from_slice(whole.packet);
                let id = whole.id;
                let mut whole = Frame::new(frame.ingress, VirtioNetHeader::default(), &mut bytes);
                frame.outcome = Outcome::Consumed;
                self.assembled_id = Some(id);
                let result = self.whole(now_ns, &mut whole, &piece.key, tenant, out);
                self.assembled_id = None;
                if let Err(reason) = result {
                    self.dropped(&mut whole, reason);
                }
                self.settle(whole, out);
                Ok(())
            }
        }
    }

    /// An assembled packet is a packet like any other, at the core where it belongs.
    fn whole(
        &mut self,
        now_ns: u64,
        frame: &mut Frame<'_>,
        key: &FlowKey,
        tenant: u16,
        out: &mut impl Output,
    ) -> Result<(), DropReason> {
        match self.flows.find(self.flows.hash(key, tenant), key, tenant) {
            Some((id, direction)) => self.established(now_ns, frame, id, direction, Origin::Wire, out),
            None => match self.begin(now_ns, frame, key, tenant, Origin::Wire, out)? {
                Some(id) => self.first_packet(now_ns, frame, id, out),
                None => Ok(()),
            },
        }
    }

    fn bridge(
        &mut self,
        now_ns: u64,
        frame: &mut Frame<'_>,
        header: &IpHeader,
        key: &FlowKey,
        tenant: u16,
        out: &mut impl Output,
    ) -> Result<(), DropReason> {
        let known = self.flows.find(self.flows.hash(key, tenant), key, tenant);
        let (id, direction) = match known {
            Some(known) => known,
            None => match self.begin(now_ns, frame, key, tenant, Origin::Wire, out)? {
                Some(id) => (id, Direction::Original),
                None => return Ok(()),
            },
        };
        self.seen(now_ns, id, direction, header.total_bytes);
        self.forward(now_ns, frame, header, id, direction, out)
    }

    /// Facts that the rules of row C5 ask for.
    fn facts(&self, key: &FlowKey, tenant: u16, frame: &Frame<'_>) -> Facts {
        let known = self.flows.find(self.flows.hash(key, tenant), key, tenant);
        let record = known.map(|(id, _)| *self.flows.record(id));
        let nat = record.filter(|record| record.flags & (flags::SOURCE_NAT | flags::DEST_NAT) != 0);
        let service = match self.policy.server_or_forward(key) {
            Some(Service::Server(_)) => Some(key.protocol),
            Some(Service::Forward(forward)) => Some(forward.protocol),
            None => None,
        };
        let rule = self.rule_ahead(key, tenant, frame.ingress);
        let flag = match nat {
            Some(record) => record.flags & flags::ASSEMBLE != 0,
            None => rule.is_some_and(|rule| self.policy.assembles(rule)),
        };
        Facts {
            protocol: key.protocol,
            connection_exists: known.is_some(),
            nat_assemble_flag: flag,
            configured_service: service,
            reverse_nat: rule.is_some() || nat.is_some_and(|record| record.flags & flags::SOURCE_NAT != 0),
        }
    }

    /// The NAT rule that the first packet of a flow would meet.
    fn rule_ahead(&self, key: &FlowKey, tenant: u16, ingress: Ingress) -> Option<u16> {
        let egress = self.policy.route(ingress, tenant, key.dst)?.egress;
        if egress == Egress::from(ingress) {
            None
        } else {
            self.policy.nat.rule_for(egress, &NatClient::of(key, tenant, ingress))
        }
    }

    /// Packets that cannot go on in fragments, whatever the operator chose: those with sequence numbers that are
    /// shifted, and with SCTP ports that change, because SCTP's checksum is a CRC over the whole packet.
    fn must_assemble(&self, key: &FlowKey, tenant: u16, ingress: Ingress) -> bool {
        const CHANGES: u16 = flags::SOURCE_NAT | flags::DEST_NAT;
        let known = self.flows.find(self.flows.hash(key, tenant), key, tenant);
        let bits = known.map(|(id, _)| self.flows.record(id).flags);
        if key.protocol != PROTOCOL_SCTP {
            return bits.is_some_and(|bits| bits & flags::PROXY_PROTOCOL != 0);
        }
        let rule = || self.rule_ahead(key, tenant, ingress);
        bits.map_or_else(|| rule().is_some(), |bits| bits & CHANGES != 0)
    }

    fn fragment_variant(&self) -> Variant {
        self.policy.spec.fragments
    }

    /// A packet that is too long for its link and may be cut.
    pub(super) fn split(
        &mut self,
        frame: &mut Frame<'_>,
        hop: &Hop,
        mtu: usize,
        out: &mut impl Output,
    ) -> Result<(), DropReason> {
        if frame.offload.needs_csum() {
            let packet = frame.bytes.get_mut(ETHERNET_BYTES..).unwrap_or_default();
            packet::segment::complete_checksum(packet)?;
            frame.offload = VirtioNetHeader::default();
        }
        let mut scratch = std::mem::take(&mut self.scratch);
        let mut pieces: Vec<Vec<u8>> = Vec::new();
        let result =
            fragment::fragment_out(frame.packet(), mtu, self.assembled_id, &mut scratch, &mut |piece| {
                let mut bytes = Vec::with_capacity(ETHERNET_BYTES + piece.len());
                bytes.extend_from_slice(&hop.ethernet);
                bytes.extend_from_slice(piece);
                pieces.push(bytes);
            });
        self.scratch = scratch;
        for mut bytes in pieces {
            let mut piece = Frame::new(frame.ingress, VirtioNetHeader::default(), &mut bytes);
            established::address(&mut piece, hop);
            self.settle(piece, out);
        }
        frame.outcome = Outcome::Consumed;
        result
    }

    /// Forgets fragments whose others did not come.
    pub(super) fn rendezvous_tick(&mut self, now_ns: u64) {
        self.rendezvous.tick(now_ns);
        self.fragments.tick(now_ns);
    }
}

impl Piece {
    /// A fragment of a packet with this key, of which no size is known.
    #[must_use]
    pub fn of(key: FlowKey) -> Self {
        Self { key, measure: Measure::default() }
    }
}
