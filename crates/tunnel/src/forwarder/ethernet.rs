//! Ethernet frames (row T14): sent as one flow each, by the packet inside or by their stations; received of peers that may
//! send them.
//!
//! The body of such a frame in a datagram is one byte, how often it may still go from peer to peer, and the Ethernet frame.

use packet::attachment::BondId;
use packet::drop_reason::DropReason;
use packet::ethernet::{EthernetFlow, EthernetHeader};
use packet::segment::Segmenter;
use packet::vnet::VirtioNetHeader;

use super::transmit::{Meta, OfferedPacket};
use super::{Forwarder, Output};
use crate::bond::{Bond, reduce};
use crate::time::Time;

/// Bytes in front of the Ethernet frame: its hops.
pub const HOPS_BYTES: usize = 1;

/// A frame or super-frame that is an Ethernet frame behind its hops, as segments.
pub(super) fn segmenter<'a>(offload: &VirtioNetHeader, body: &'a [u8]) -> Result<Segmenter<'a>, DropReason> {
    let header = EthernetHeader::parse(body.get(HOPS_BYTES..).unwrap_or_default())?;
    Segmenter::of_frame(offload, body, header.ip_at().map(|at| HOPS_BYTES + at))
}

/// Refuses frames of a peer that may not send them, and what is too short to be one.
pub(super) fn check(bond: &Bond, body: &[u8]) -> Result<(), DropReason> {
    if !bond.peer.load().ethernet {
        return Err(DropReason::EthernetNotAllowed);
    }
    EthernetHeader::parse(body.get(HOPS_BYTES..).unwrap_or_default()).map(drop)
}

impl Forwarder {
    /// An Ethernet frame or super-frame for a peer, on the core that owns its flow. `body`: its hops and the frame; `offload`
    /// counts from there.
    pub fn frame(
        &mut self,
        now: Time,
        bond: BondId,
        offload: &VirtioNetHeader,
        body: &[u8],
        out: &mut impl Output,
    ) {
        if let Err(reason) = self.send_frame(now, bond, offload, body, out) {
            self.drops.add(reason);
        }
    }

    fn send_frame(
        &mut self,
        now: Time,
        bond: BondId,
        offload: &VirtioNetHeader,
        body: &[u8],
        out: &mut impl Output,
    ) -> Result<(), DropReason> {
        let slot = self.list.slot(bond).ok_or(DropReason::NoPeer)?;
        let current = self.bonds.get_mut(slot).and_then(Option::as_mut).ok_or(DropReason::NoPeer)?;
        if !current.tx.bond.peer.load().ethernet {
            return Err(DropReason::EthernetNotAllowed);
        }
        let frame = body.get(HOPS_BYTES..).unwrap_or_default();
        let flow = EthernetFlow::of(&EthernetHeader::parse(frame)?, frame);
        current.tx.refresh(now);
        let segmenter = segmenter(offload, body)?;
        let hash = self.ownership.hash(&flow.key, 0);
        // Media and servers' names in frames are not looked for.
        let treatment = current.tx.flows.packet(now, hash, (&flow.key, flow.dscp), body.len(), None);
        let reduced = reduce(&flow.key, current.tx.receiving.flow_definition(), flow.dscp);
        let meta = Meta {
            flow: reduced,
            hash: None,
            session_id: 0,
            own_hash: hash,
            treatment,
            ecn_capable: flow.ecn_capable,
        };
        current.touched = true;
        let packet = OfferedPacket { offload, bytes: body, segmenter };
        current.tx.offer(now, packet, meta, out, &mut self.drops);
        Ok(())
    }
}
