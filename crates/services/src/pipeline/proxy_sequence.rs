//! Flows that begin with a PROXY protocol header ([`crate::proxy_protocol`]): all further sequence numbers are shifted.
//!
//! The header leaves in a small segment of its own, in front of the segment that starts at the client's first byte. So
//! a super-packet stays whole, nothing becomes longer than its sender made it, and partial checksums stay partial.

use hashbrown::HashMap;
use packet::vnet::{GSO_NONE, VirtioNetHeader};
use packet::{DropReason, FlowKey, checksum};

use super::context::PacketContext;
use super::flows::is_embryonic;
use super::{Direction, ETHERNET_BYTES, Frame, Outcome, Output, Services, established};
use crate::flow::{FlowId, flags};
use crate::hash::SecretState;
use crate::proxy_protocol::{self, Header, Shift};
use crate::tcp::{self, SYN, Segment, Verdict};

/// Shifts of flows with [`flags::PROXY_PROTOCOL`], by key and tenant of their original direction. There are never more
/// than flows: an entry comes and goes with its flow.
pub(super) struct Shifts(HashMap<(FlowKey, u16), Shift, SecretState>);

impl Shifts {
    /// Empty; `hash` is secret.
    pub fn new(hash: SecretState) -> Self {
        Self(HashMap::with_hasher(hash))
    }

    /// Forgets an ended flow.
    pub fn forget(&mut self, key: &FlowKey, tenant: u16) {
        self.0.remove(&(*key, tenant));
    }

    /// Flows that are shifted.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// The shift of a flow.
    pub fn of(&self, key: &FlowKey, tenant: u16) -> Option<Shift> {
        self.0.get(&(*key, tenant)).copied()
    }

    /// Notes that of a flow.
    pub fn put(&mut self, key: &FlowKey, tenant: u16, shift: Shift) {
        self.0.insert((*key, tenant), shift);
    }
}

impl Services {
    /// A flow with [`flags::PROXY_PROTOCOL`] was begun by this SYN.
    pub(super) fn begin_shift(&mut self, packet: &PacketContext, frame: &Frame<'_>) {
        if let Ok(segment) = packet.segment(frame) {
            let shift = Shift::new(segment.seq, packet.header.version == 6);
            self.shifts.put(&packet.key, packet.tenant, shift);
        }
    }

    /// As [`Services::established`], for a segment of such a flow. The connection is followed by the client's numbers.
    pub(super) fn established_proxied(
        &mut self,
        packet: &PacketContext,
        frame: &mut Frame<'_>,
        (id, direction): (FlowId, Direction),
        out: &mut impl Output,
    ) -> Result<(), DropReason> {
        let (header, partial) = (&packet.header, packet.partial);
        let ((key, tenant), _) = self.flows.table.keys(id);
        let mut shift = self.shifts.of(&key, tenant).ok_or(DropReason::TcpInvalid)?;
        if direction == Direction::Reply {
            let bytes = frame.packet_mut();
            proxy_protocol::shift(bytes, header, partial, direction, &mut shift)?;
            proxy_protocol::lower_mss(bytes, header, partial, &shift);
        }
        let segment = packet.segment(frame)?;
        let opens = direction == Direction::Original && proxy_protocol::syn_of(&segment).is_some();
        if opens && segment.payload_bytes > 0 {
            return Err(DropReason::NatUnsupported);
        }
        let record = self.flows.table.record_mut(id);
        let (before, was) = (record.flags, is_embryonic(record));
        let was_over = established::is_over(record);
        let verdict = tcp::follow(record, direction, &segment);
        established::note_end(&self.routing.policy, record, was_over);
        let resumed = !before & record.flags & flags::MID_STREAM != 0;
        let is = is_embryonic(record);
        self.flows.embryonic.changed(was, is);
        match verdict {
            Verdict::Accept => {
                let v6 = header.version == 6;
                if opens {
                    shift = Shift::new(segment.seq, v6);
                } else if resumed && direction == Direction::Original {
                    // Both ends began anew between the same ports: this ACK ends their handshake.
                    shift = Shift::new(segment.seq.wrapping_sub(1), v6);
                }
                self.shifts.put(&key, tenant, shift);
                self.seen(packet, (id, direction));
                if was && !is {
                    self.note_client(packet.now_ns, id);
                }
            }
            // What may be forged must not change anything.
            Verdict::Pass => {}
            Verdict::Invalid => return Err(DropReason::TcpInvalid),
            Verdict::Reopen => return self.reopen(packet, frame, (id, direction), out),
        }
        if direction == Direction::Original && !self.shift_original(packet, frame, id, shift, out)? {
            frame.outcome = Outcome::Consumed;
            return Ok(());
        }
        self.forward(packet, frame, (id, direction), out)
    }

    /// Shifts a client's segment and sends the header first where it belongs. Whether the segment has to go on itself:
    /// a bare acknowledgment has gone with the header.
    fn shift_original(
        &mut self,
        packet: &PacketContext,
        frame: &mut Frame<'_>,
        id: FlowId,
        mut shift: Shift,
        out: &mut impl Output,
    ) -> Result<bool, DropReason> {
        let segment = packet.segment(frame)?;
        if shift.needs_header(&segment) {
            self.send_proxy_header(packet, frame, id, out)?;
            if segment.length() == 0 {
                return Ok(false);
            }
            shift = shift.behind_header();
        }
        let direction = Direction::Original;
        proxy_protocol::shift(frame.packet_mut(), &packet.header, packet.partial, direction, &mut shift)?;
        Ok(true)
    }

    fn send_proxy_header(
        &mut self,
        packet: &PacketContext,
        frame: &Frame<'_>,
        id: FlowId,
        out: &mut impl Output,
    ) -> Result<(), DropReason> {
        let (header, bytes) = (&packet.header, frame.packet());
        // The new segment gets a checksum of its own, which must not vouch for a damaged one.
        if !packet.partial
            && frame.offload.gso_type == GSO_NONE
            && !checksum::verify_upper(header.src, header.dst, header.protocol, header.payload(bytes))
        {
            return Err(DropReason::TcpInvalid);
        }
        let ((key, _), _) = self.flows.table.keys(id);
        let proxy = Header::of(&self.routing.policy.as_asked(&key)).ok_or(DropReason::NatUnsupported)?;
        let mut first = frame.bytes.get(..ETHERNET_BYTES).unwrap_or_default().to_vec();
        proxy_protocol::header_segment(bytes, header, &proxy, &mut first)?;
        let mut first = Frame::new(packet.ingress, VirtioNetHeader::default(), &mut first);
        let PacketContext { now_ns, key, tenant, origin, .. } = *packet;
        let packet = PacketContext::read(now_ns, &first, key, tenant, origin)?;
        self.forward(&packet, &mut first, (id, Direction::Original), out)?;
        self.settle(first, out);
        Ok(())
    }

    /// An ICMP error that comes back about a client's segment quotes the shifted number: the client would not know it.
    pub(super) fn unshift_quote(
        &self,
        packet: &PacketContext,
        frame: &mut Frame<'_>,
        (id, direction): (FlowId, Direction),
    ) {
        if self.flows.table.record(id).flags & flags::PROXY_PROTOCOL == 0
            || direction != Direction::Reply
            || packet.partial
        {
            return;
        }
        let ((key, tenant), _) = self.flows.table.keys(id);
        if let Some(shift) = self.shifts.of(&key, tenant) {
            proxy_protocol::shift_quote(frame.packet_mut(), &packet.header, &shift);
        }
    }
}

/// Whether a SYN carries data, which a header could not be put in front of (RFC 7413: it is sent again without).
pub(super) fn has_early_data(record_flags: u16, segment: &Segment) -> bool {
    record_flags & flags::PROXY_PROTOCOL != 0 && segment.has(SYN) && segment.payload_bytes > 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hash::testing::assert_spreads;

    #[test]
    fn connections_that_a_stranger_chooses_do_not_meet() {
        let shifts = Shifts::new(SecretState::of_number(1));
        let dst = std::net::Ipv4Addr::LOCALHOST.into();
        let key = |src| FlowKey { src, dst, src_port: 1, dst_port: 443, protocol: 6 };
        assert_spreads(shifts.0.hasher(), |src| (key(src), 0_u16));
    }
}
