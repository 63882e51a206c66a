//! Flows that begin with a PROXY protocol header ([`crate::proxy_protocol`]): all further sequence numbers are shifted.
//!
//! The header leaves in a small segment of its own, in front of the segment that starts at the client's first byte. So
//! a super-packet stays whole, nothing becomes longer than its sender made it, and partial checksums stay partial.

use foldhash::fast::FixedState;
use hashbrown::HashMap;
use packet::ip::{IpHeader, PROTOCOL_ICMP, PROTOCOL_ICMPV6};
use packet::vnet::{GSO_NONE, VirtioNetHeader};
use packet::{DropReason, FlowKey, checksum};

use super::{Services, Direction, ETHERNET_BYTES, Frame, Origin, Outcome, Output, established, is_partial};
use crate::flow::{FlowId, flags};
use crate::proxy_protocol::{self, Header, Shift};
use crate::tcp::{self, SYN, Segment, Verdict};

/// Shifts of flows with [`flags::PROXY_PROTOCOL`], by key and tenant of their original direction. There are never more
/// than flows: an entry comes and goes with its flow.
pub(super) struct Shifts(HashMap<(FlowKey, u16), Shift, FixedState>);

impl Shifts {
    /// Empty; `seed` is secret.
    pub fn new(seed: u64) -> Self {
        Self(HashMap::with_hasher(FixedState::with_seed(seed)))
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

    fn of(&self, key: &FlowKey, tenant: u16) -> Option<Shift> {
        self.0.get(&(*key, tenant)).copied()
    }

    fn put(&mut self, key: &FlowKey, tenant: u16, shift: Shift) {
        self.0.insert((*key, tenant), shift);
    }
}

impl Services {
    /// A flow with [`flags::PROXY_PROTOCOL`] was begun by this SYN.
    pub(super) fn begin_shift(&mut self, key: &FlowKey, tenant: u16, header: &IpHeader, packet: &[u8]) {
        if let Some(segment) = Segment::of(header.payload(packet)) {
            self.shifts.put(key, tenant, Shift::new(segment.seq, header.version == 6));
        }
    }

    /// As [`Services::established`], for a segment of such a flow. The connection is followed by the client's numbers.
    pub(super) fn established_proxied(
        &mut self,
        now_ns: u64,
        frame: &mut Frame<'_>,
        header: &IpHeader,
        id: FlowId,
        direction: Direction,
        origin: Origin,
        out: &mut impl Output,
    ) -> Result<(), DropReason> {
        let ((key, tenant), _) = self.flows.keys(id);
        let mut shift = self.shifts.of(&key, tenant).ok_or(DropReason::TcpInvalid)?;
        if direction == Direction::Reply {
            let partial = is_partial(&frame.offload);
            let packet = frame.bytes.get_mut(ETHERNET_BYTES..).unwrap_or_default();
            proxy_protocol::shift(packet, header, partial, direction, &mut shift)?;
            proxy_protocol::lower_mss(packet, header, partial, &shift);
        }
        let segment = Segment::of(header.payload(frame.packet())).ok_or(DropReason::TcpInvalid)?;
        let opens = direction == Direction::Original && proxy_protocol::syn_of(&segment).is_some();
        if opens && segment.payload_bytes > 0 {
            return Err(DropReason::NatUnsupported);
        }
        let record = self.flows.record_mut(id);
        let (before, was) = (record.flags, established::is_embryonic(record));
        let was_over = established::is_over(record);
        let verdict = tcp::follow(record, direction, &segment);
        established::note_end(&self.policy, record, was_over);
        let (after, is) = (record.flags, established::is_embryonic(record));
        let resumed = !before & after & flags::MID_STREAM != 0;
        self.embryonic = established::embryonic_after(self.embryonic, was, is);
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
                self.seen(now_ns, id, direction, header.total_bytes);
            }
            // What may be forged must not change anything.
            Verdict::Pass => {}
            Verdict::Invalid => return Err(DropReason::TcpInvalid),
            Verdict::Reopen => {
                self.end(now_ns, id);
                self.new_flow(now_ns, frame, &key, tenant, origin, out);
                return Ok(());
            }
        }
        if direction == Direction::Original
            && !self.shift_original(now_ns, frame, header, id, &segment, shift, out)?
        {
            frame.outcome = Outcome::Consumed;
            return Ok(());
        }
        self.forward(now_ns, frame, header, id, direction, out)
    }

    /// Shifts a client's segment and sends the header first where it belongs. Whether the segment has to go on itself:
    /// a bare acknowledgment has gone with the header.
    fn shift_original(
        &mut self,
        now_ns: u64,
        frame: &mut Frame<'_>,
        header: &IpHeader,
        id: FlowId,
        segment: &Segment,
        shift: Shift,
        out: &mut impl Output,
    ) -> Result<bool, DropReason> {
        let mut shift = shift;
        if shift.needs_header(segment) {
            self.send_proxy_header(now_ns, frame, header, id, out)?;
            if segment.length() == 0 {
                return Ok(false);
            }
            shift = shift.behind_header();
        }
        let partial = is_partial(&frame.offload);
        let packet = frame.bytes.get_mut(ETHERNET_BYTES..).unwrap_or_default();
        proxy_protocol::shift(packet, header, partial, Direction::Original, &mut shift)?;
        Ok(true)
    }

    fn send_proxy_header(
        &mut self,
        now_ns: u64,
        frame: &Frame<'_>,
        header: &IpHeader,
        id: FlowId,
        out: &mut impl Output,
    ) -> Result<(), DropReason> {
        let packet = frame.packet();
        // The new segment gets a checksum of its own, which must not vouch for a damaged one.
        if !is_partial(&frame.offload)
            && frame.offload.gso_type == GSO_NONE
            && !checksum::verify_upper(header.src, header.dst, header.protocol, header.payload(packet))
        {
            return Err(DropReason::TcpInvalid);
        }
        let ((key, _), _) = self.flows.keys(id);
        let proxy = Header::of(&key).ok_or(DropReason::NatUnsupported)?;
        let mut bytes = frame.bytes.get(..ETHERNET_BYTES).unwrap_or_default().to_vec();
        proxy_protocol::header_segment(packet, header, &proxy, &mut bytes)?;
        let mut first = Frame::new(frame.ingress, VirtioNetHeader::default(), &mut bytes);
        let header = IpHeader::parse(first.packet())?;
        self.forward(now_ns, &mut first, &header, id, Direction::Original, out)?;
        self.settle(first, out);
        Ok(())
    }

    /// An ICMP error that comes back about a client's segment quotes the shifted number: the client would not know it.
    pub(super) fn unshift_quote(
        &self,
        frame: &mut Frame<'_>,
        header: &IpHeader,
        id: FlowId,
        direction: Direction,
    ) {
        if self.flows.record(id).flags & flags::PROXY_PROTOCOL == 0
            || direction != Direction::Reply
            || !matches!(header.protocol, PROTOCOL_ICMP | PROTOCOL_ICMPV6)
            || is_partial(&frame.offload)
        {
            return;
        }
        let ((key, tenant), _) = self.flows.keys(id);
        let packet = frame.bytes.get_mut(ETHERNET_BYTES..).unwrap_or_default();
        if let Some(shift) = self.shifts.of(&key, tenant) {
            proxy_protocol::shift_quote(packet, header, &shift);
        }
    }
}

/// Whether a SYN carries data, which a header could not be put in front of (RFC 7413: it is sent again without).
pub(super) fn has_early_data(record_flags: u16, segment: &Segment) -> bool {
    record_flags & flags::PROXY_PROTOCOL != 0 && segment.has(SYN) && segment.payload_bytes > 0
}
