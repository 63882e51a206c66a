//! Answers to senders: ICMP errors and resets, to where the packet came from, never more than the limit.

use std::net::IpAddr;

use packet::DropReason;
use packet::attachment::{Egress, Ingress};
use packet::ip::IpHeader;
use packet::vnet::VirtioNetHeader;

use super::{Services, ETHERNET_BYTES, Frame, Outcome, Output, is_partial};
use crate::icmp::{self, ANSWER_BYTES_MAX, Problem};
use crate::spec::TCP;

impl Services {
    pub(super) fn answer_time_exceeded(&mut self, now_ns: u64, frame: &Frame<'_>, out: &mut impl Output) {
        self.answer(now_ns, frame, Problem::TtlExpired, out);
    }

    pub(super) fn answer_too_big(
        &mut self,
        now_ns: u64,
        frame: &Frame<'_>,
        mtu: usize,
        out: &mut impl Output,
    ) {
        self.answer(now_ns, frame, Problem::TooBig(u16::try_from(mtu).unwrap_or(u16::MAX)), out);
    }

    /// TCP gets a reset, everything else "administratively prohibited".
    pub(super) fn answer_reject(&mut self, now_ns: u64, frame: &Frame<'_>, out: &mut impl Output) {
        let Ok(header) = IpHeader::parse(frame.packet()) else { return };
        if header.protocol == TCP {
            self.answer_reset(now_ns, frame, &header, out);
        } else {
            self.answer(now_ns, frame, Problem::Prohibited, out);
        }
    }

    /// A flow could not be made: its sender is told what will not change by trying again at once.
    ///
    /// * A virtual server without a backend, or full: as a host would say that nobody listens, TCP by a reset and
    ///   everything else by "port unreachable" from the address that was asked. Clients go elsewhere at once.
    /// * No port or flow left for a client: "administratively prohibited" (RFC 5508 REQ-8), never a reset, which would
    ///   speak for a server that was not asked.
    /// * Full tables of this core: nothing. That happens in floods, whose senders did not send.
    pub(super) fn answer_failure(
        &mut self,
        now_ns: u64,
        frame: &Frame<'_>,
        reason: DropReason,
        out: &mut impl Output,
    ) {
        let Ok(header) = IpHeader::parse(frame.packet()) else { return };
        match reason {
            DropReason::NoBackend | DropReason::ServerFull if header.protocol == TCP => {
                self.answer_reset(now_ns, frame, &header, out);
            }
            DropReason::NoBackend | DropReason::ServerFull => {
                self.answer_from(now_ns, frame, Problem::PortUnreachable, header.dst, out);
            }
            DropReason::NatPortsExhausted | DropReason::FlowsPerClient => {
                self.answer(now_ns, frame, Problem::Prohibited, out);
            }
            _ => {}
        }
    }

    fn answer_reset(&mut self, now_ns: u64, frame: &Frame<'_>, header: &IpHeader, out: &mut impl Output) {
        if self.limiter.allow(now_ns) {
            let mut bytes = [0; ETHERNET_BYTES + ANSWER_BYTES_MAX];
            let room = bytes.get_mut(ETHERNET_BYTES..).unwrap_or_default();
            let length = icmp::reset(room, frame.packet(), header, is_partial(&frame.offload));
            self.send_back(frame, &mut bytes, length, out);
        }
    }

    /// From this gateway's address on the sender's side.
    fn answer(&mut self, now_ns: u64, frame: &Frame<'_>, problem: Problem, out: &mut impl Output) {
        let Ok(header) = IpHeader::parse(frame.packet()) else { return };
        let Some(from) = self.policy.address_of(frame.ingress, header.src) else { return };
        self.answer_from(now_ns, frame, problem, from, out);
    }

    fn answer_from(
        &mut self,
        now_ns: u64,
        frame: &Frame<'_>,
        problem: Problem,
        from: IpAddr,
        out: &mut impl Output,
    ) {
        let Ok(header) = IpHeader::parse(frame.packet()) else { return };
        if self.limiter.allow(now_ns) {
            let mut bytes = [0; ETHERNET_BYTES + ANSWER_BYTES_MAX];
            let room = bytes.get_mut(ETHERNET_BYTES..).unwrap_or_default();
            let length = icmp::error(room, frame.packet(), &header, problem, from);
            self.send_back(frame, &mut bytes, length, out);
        }
    }

    /// To the hardware address that the packet came from.
    fn send_back(
        &mut self,
        frame: &Frame<'_>,
        bytes: &mut [u8],
        length: Option<usize>,
        out: &mut impl Output,
    ) {
        let Some(length) = length else { return };
        let Some(bytes) = bytes.get_mut(..ETHERNET_BYTES + length) else { return };
        if let Ingress::Interface(_) = frame.ingress {
            let Some(asked) = frame.bytes.first_chunk::<ETHERNET_BYTES>() else { return };
            if asked.iter().all(|byte| *byte == 0) {
                // A reassembled packet has no frame of its own.
                return;
            }
            if let Some(ethernet) = bytes.first_chunk_mut::<ETHERNET_BYTES>() {
                let (to, rest) = ethernet.split_at_mut(6);
                to.copy_from_slice(&asked[6..12]);
                let (from, kind) = rest.split_at_mut(6);
                from.copy_from_slice(&asked[..6]);
                kind.copy_from_slice(&asked[12..]);
            }
        }
        self.counters.answers += 1;
        out.emit(Outcome::Forward(Egress::from(frame.ingress)), None, &VirtioNetHeader::default(), bytes);
    }
}
