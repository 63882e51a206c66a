//! Fragments (row C5): held at the core of their addresses until the ports are known, then at the core of the flow.

use packet::attachment::Egress;
use packet::icmp::Kind;
use packet::ip::PROTOCOL_SCTP;
use packet::vnet::VirtioNetHeader;
use packet::{DropCounters, DropReason, FlowKey, IpHeader};

use super::context::PacketContext;
use super::next_hops::Hop;
use super::{Direction, ETHERNET_BYTES, Frame, Origin, Outcome, Output, Piece, Services, established};
use crate::flow::{FlowId, Record, flags};
use crate::fragment::{
    self, Action, Facts, FragmentLimits, FragmentTable, Measure, PacketId, Rendezvous, SentFragments, SentId,
    Told,
};
use crate::hash::SecretState;
use crate::icmp::{IPV6_MTU_MIN, Limiter};
use crate::nat::NatClient;
use crate::policy::{Policy, Service};
use crate::random::Random;
use crate::route::RouteQuery;

/// A packet that was assembled here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Assembled {
    /// Its identification.
    pub id: u32,
    /// Its longest fragment, bytes of the IP packet.
    pub longest: u16,
}

/// Packets in pieces of one core.
pub(super) struct Fragments {
    /// Those whose fragments come to this core, by their addresses.
    pub rendezvous: Rendezvous,
    /// Those of flows of this core.
    pub table: FragmentTable,
    /// How busy this core is, percent: what `fragments = load-below-percent` goes by.
    pub load_percent: u8,
    /// While a packet that was assembled here goes on: how it may be cut again.
    pub assembled: Option<Assembled>,
    /// Packets that went on in fragments, for errors about them.
    pub sent: SentFragments,
    /// Of questions to other cores, who sent a fragment on.
    pub questions: Limiter,
    /// Room for one fragment that goes out.
    scratch: Vec<u8>,
}

impl Fragments {
    /// None yet.
    pub fn new(policy: &Policy, random: &mut Random) -> Self {
        let limits = limits(policy);
        Self {
            rendezvous: Rendezvous::new(limits, SecretState::draw(random)),
            table: FragmentTable::new(limits, SecretState::draw(random)),
            load_percent: 0,
            assembled: None,
            sent: SentFragments::new(SecretState::draw(random)),
            questions: Limiter::new(policy.limits().errors_per_s_max),
            scratch: Vec::new(),
        }
    }

    /// Goes by the limits of another policy.
    pub fn follow(&mut self, policy: &Policy) {
        self.rendezvous.set_limits(limits(policy));
        self.table.set_limits(limits(policy));
        self.questions.set_rate(policy.limits().errors_per_s_max);
    }

    /// Forgets fragments whose others did not come.
    pub fn tick(&mut self, now_ns: u64) {
        self.rendezvous.tick(now_ns);
        self.table.tick(now_ns);
    }

    /// Fragments that were held and are dropped since, by reason.
    pub fn late_drops(&self) -> DropCounters {
        let mut drops = self.rendezvous.late_drops().clone();
        drops.merge(self.table.late_drops());
        drops
    }

    /// A fragment of the packet goes on, as `leaving`.
    pub fn note_sent(&mut self, packet: &PacketContext, leaving: &[u8]) {
        let id = IpHeader::parse(leaving).ok().and_then(|header| SentId::of(&header));
        if let Some(id) = id {
            self.sent.note(packet.now_ns, id, packet.key, packet.tenant);
        }
    }

    /// Longest packet that may leave by a link of this MTU, bytes. Who cut a packet of IPv6 knew of a narrower link further on
    /// (RFC 8201 §4): whatever was assembled here stays as short, but for what every link carries (RFC 8200 §5).
    pub fn mtu(&self, mtu: usize, version: u8) -> usize {
        match self.assembled {
            Some(assembled) if version == 6 => mtu.min(usize::from(assembled.longest.max(IPV6_MTU_MIN))),
            _ => mtu,
        }
    }

    /// Cuts a packet: frames of at most `mtu` bytes of IP packet for a next hop.
    fn cut(&mut self, packet: &[u8], hop: &Hop, mtu: usize) -> (Vec<Vec<u8>>, Result<(), DropReason>) {
        let mut pieces: Vec<Vec<u8>> = Vec::new();
        let mut each = |piece: &[u8]| pieces.push([&hop.ethernet, piece].concat());
        let id = self.assembled.map(|assembled| assembled.id);
        let result = fragment::fragment_out(packet, mtu, id, &mut self.scratch, &mut each);
        (pieces, result)
    }
}

fn limits(policy: &Policy) -> FragmentLimits {
    FragmentLimits::of(policy.limits(), policy.timeouts())
}

/// A packet with the Ethernet header of another piece of it in front: the host may get it by its device, as it came.
fn with_header_of(frame: &Frame<'_>, packet: &[u8]) -> Vec<u8> {
    [frame.bytes.get(..ETHERNET_BYTES).unwrap_or(&[0; ETHERNET_BYTES]), packet].concat()
}

impl Services {
    /// A fragment as it was read: to the core of its addresses, which holds it until its header has come.
    pub(super) fn fragment(&mut self, packet: &PacketContext, frame: &mut Frame<'_>, out: &mut impl Output) {
        // An error is short (RFC 1812 §4.3.2.3, RFC 4443 §2.4 c). In pieces nothing of what it quotes could be looked at.
        if packet.icmp(frame) == Some(Kind::Error) {
            return self.dropped(frame, DropReason::IcmpInvalid);
        }
        let ownership = &self.routing.ownership;
        // The key of a fragment has no ports.
        let home = ownership.owner_of_bucket(ownership.bucket(&packet.key, packet.tenant));
        if packet.origin == Origin::Wire && home != self.routing.core && ownership.is_alive(home) {
            return self.pass_on(frame, home, Origin::Handed { visit: 0 }, None, out);
        }
        let mut released = Vec::new();
        let result = self.fragments.rendezvous.push(
            packet.now_ns,
            frame.packet(),
            &packet.header,
            packet.tenant,
            packet.ingress,
            &mut |piece| {
                let facts = Piece { key: piece.key, measure: piece.measure };
                released.push((with_header_of(frame, piece.packet), facts));
            },
        );
        frame.outcome = Outcome::Consumed;
        for (mut bytes, piece) in released {
            let mut held = Frame::new(packet.ingress, VirtioNetHeader::default(), &mut bytes);
            // All fragments of a packet come by one way.
            held.visit = frame.visit;
            self.piece(packet.now_ns, &mut held, &piece, Origin::Wire, out);
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
        let tenant = self.routing.tenants.of(frame.ingress);
        let packet = match PacketContext::read(now_ns, frame, piece.key, tenant, origin) {
            Ok(packet) => packet,
            Err(reason) => return self.dropped(frame, reason),
        };
        if self.flows.find(&packet.key, tenant).is_none() {
            match self.next_stop(&packet) {
                Ok(None) => match self.goes_to_unit(&packet.key, frame) {
                    Ok(false) => {}
                    Ok(true) => {
                        frame.ports = Some((packet.key.src_port, packet.key.dst_port));
                        return;
                    }
                    Err(reason) => return self.dropped(frame, reason),
                },
                Ok(Some((core, visit))) => {
                    return self.pass_on(frame, core, Origin::Handed { visit }, Some(*piece), out);
                }
                Err(reason) => return self.dropped(frame, reason),
            }
        }
        let packet = PacketContext { origin: Origin::Wire, ..packet };
        if let Err(reason) = self.own_piece(&packet, frame, &piece.measure, out) {
            self.dropped(frame, reason);
        }
    }

    /// A fragment that another unit of the cluster sent: there its source and destination port became known.
    pub fn piece_of_unit(
        &mut self,
        now_ns: u64,
        frame: &mut Frame<'_>,
        (src_port, dst_port): (u16, u16),
        out: &mut impl Output,
    ) {
        self.counters.rx_packets += 1;
        self.counters.rx_bytes += frame.packet().len() as u64;
        match FlowKey::of(frame.packet()) {
            Ok(key) => {
                let piece = Piece::of(FlowKey { src_port, dst_port, ..key });
                self.piece(now_ns, frame, &piece, Origin::Wire, out);
            }
            Err(reason) => self.dropped(frame, reason),
        }
    }

    fn own_piece(
        &mut self,
        packet: &PacketContext,
        frame: &mut Frame<'_>,
        measure: &Measure,
        out: &mut impl Output,
    ) -> Result<(), DropReason> {
        let header = &packet.header;
        let id = PacketId::of(header, packet.tenant, packet.ingress).ok_or(DropReason::FragmentInvalid)?;
        if self.fragments.table.told(&id).is_none() {
            let action = self.action(packet, measure);
            self.fragments.table.tell(packet.now_ns, &Told { id, key: packet.key, action })?;
        }
        match self.fragments.table.push(packet.now_ns, &id, frame.packet(), header)? {
            fragment::Outcome::Held | fragment::Outcome::Copy => {
                frame.outcome = Outcome::Consumed;
                Ok(())
            }
            fragment::Outcome::Bridge(key) => self.bridge(&PacketContext { key, ..*packet }, frame, out),
            fragment::Outcome::Whole(whole) => {
                let mut bytes = with_header_of(frame, whole.packet);
                self.fragments.assembled = Some(Assembled { id: whole.id, longest: whole.longest });
                let mut whole = Frame::new(packet.ingress, VirtioNetHeader::default(), &mut bytes);
                frame.outcome = Outcome::Consumed;
                let result = self.whole(packet, &mut whole, out);
                self.fragments.assembled = None;
                if let Err(reason) = result {
                    self.dropped(&mut whole, reason);
                }
                self.settle(whole, out);
                Ok(())
            }
        }
    }

    /// An assembled packet is a packet like any other, at the core where it belongs. `piece`: one of its fragments.
    fn whole(
        &mut self,
        piece: &PacketContext,
        frame: &mut Frame<'_>,
        out: &mut impl Output,
    ) -> Result<(), DropReason> {
        let packet = PacketContext::read(piece.now_ns, frame, piece.key, piece.tenant, Origin::Wire)?;
        match self.flows.find(&packet.key, packet.tenant) {
            Some(flow) => self.established(&packet, frame, flow, out),
            None => match self.begin(&packet, frame, out)? {
                Some(id) => self.first_packet(&packet, frame, id, out),
                None => Ok(()),
            },
        }
    }

    fn bridge(
        &mut self,
        packet: &PacketContext,
        frame: &mut Frame<'_>,
        out: &mut impl Output,
    ) -> Result<(), DropReason> {
        let flow = match self.flows.find(&packet.key, packet.tenant) {
            Some(known) => {
                self.check_piece(packet, known)?;
                known
            }
            None => match self.begin(packet, frame, out)? {
                Some(id) => (id, Direction::Original),
                None => return Ok(()),
            },
        };
        self.seen(packet, flow);
        self.forward(packet, frame, flow, out)
    }

    /// Checks a fragment that goes on by itself, as every packet of a known flow. One whose translation does not hold any more
    /// ends the flow: no other core could begin anew with it.
    fn check_piece(&mut self, packet: &PacketContext, flow: (FlowId, Direction)) -> Result<(), DropReason> {
        self.check_ingress(packet, flow)?;
        let (id, _) = flow;
        if self.flows.table.record(id).era != self.routing.era && !self.decide_again(packet.now_ns, id)? {
            self.end(packet.now_ns, id);
            return Err(DropReason::NatGone);
        }
        Ok(())
    }

    /// Action for the fragments of a packet (row C5).
    fn action(&self, packet: &PacketContext, measure: &Measure) -> Action {
        let known = self.flows.find(&packet.key, packet.tenant);
        let record = known.map(|(id, _): (FlowId, Direction)| self.flows.table.record(id));
        let rule = self.rule_ahead(packet);
        if must_assemble(&packet.key, record, rule) {
            return Action::Assemble;
        }
        let facts = self.facts(&packet.key, record, rule);
        self.routing.policy.spec.limits.fragments.action(&facts, measure, self.fragments.load_percent)
    }

    /// Facts that the rules of row C5 ask for.
    fn facts(&self, key: &FlowKey, record: Option<&Record>, rule: Option<u16>) -> Facts {
        let policy = &self.routing.policy;
        let nat = record.filter(|record| record.flags & (flags::SOURCE_NAT | flags::DEST_NAT) != 0);
        let service = match policy.server_or_forward(key) {
            Some(Service::Server(_)) => Some(key.protocol),
            Some(Service::Forward(forward)) => Some(forward.protocol),
            None => None,
        };
        let flag = match nat {
            Some(record) => record.flags & flags::ASSEMBLE != 0,
            None => rule.is_some_and(|rule| policy.assembles(rule)),
        };
        Facts {
            protocol: key.protocol,
            connection_exists: record.is_some(),
            nat_assemble_flag: flag,
            configured_service: service,
            reverse_nat: rule.is_some() || nat.is_some_and(|record| record.flags & flags::SOURCE_NAT != 0),
        }
    }

    /// The NAT rule that the first packet of a flow would meet.
    fn rule_ahead(&self, packet: &PacketContext) -> Option<u16> {
        let PacketContext { key, tenant, ingress, .. } = packet;
        let policy = &self.routing.policy;
        let query = RouteQuery { tenant: *tenant, ingress: Some(*ingress), key: *key, before: None };
        let egress = policy.route(&query).ok()?.egress;
        if egress == Egress::from(*ingress) {
            None
        } else {
            policy.nat.rule_for(egress, &NatClient::of(key, *tenant, *ingress))
        }
    }

    /// A packet that is too long for its link and may be cut.
    pub(super) fn split(
        &mut self,
        packet: &PacketContext,
        frame: &mut Frame<'_>,
        hop: &Hop,
        mtu: usize,
        out: &mut impl Output,
    ) -> Result<(), DropReason> {
        if frame.offload.needs_csum() {
            let offload = std::mem::take(&mut frame.offload);
            packet::segment::complete_offloaded(&offload, frame.packet_mut())?;
        }
        let (pieces, result) = self.fragments.cut(frame.packet(), hop, mtu);
        if let Some(piece) = pieces.first().and_then(|piece| piece.get(ETHERNET_BYTES..)) {
            self.fragments.note_sent(packet, piece);
        }
        for mut bytes in pieces {
            let mut piece = Frame::new(frame.ingress, VirtioNetHeader::default(), &mut bytes);
            established::address(&mut piece, hop);
            self.settle(piece, out);
        }
        frame.outcome = Outcome::Consumed;
        result
    }
}

/// Whether a packet cannot go on in fragments, whatever the operator chose: one with sequence numbers that are shifted,
/// or with SCTP ports that change, because SCTP's checksum is a CRC over the whole packet. `rule`: the NAT rule that it
/// would meet if there is no flow yet.
fn must_assemble(key: &FlowKey, record: Option<&Record>, rule: Option<u16>) -> bool {
    const CHANGES: u16 = flags::SOURCE_NAT | flags::DEST_NAT;
    match record {
        None => key.protocol == PROTOCOL_SCTP && rule.is_some(),
        Some(record) if key.protocol == PROTOCOL_SCTP => record.flags & CHANGES != 0,
        Some(record) => record.flags & flags::PROXY_PROTOCOL != 0,
    }
}

impl Piece {
    /// A fragment of a packet with this key, of which no size is known.
    #[must_use]
    pub fn of(key: FlowKey) -> Self {
        Self { key, measure: Measure::default() }
    }
}
