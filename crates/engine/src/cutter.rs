//! Super-packets inside other packets (IPIP, GRE, VXLAN) are cut when they come in: the kernel would take none back.

use packet::attachment::Ingress;
use packet::encapsulated::{EncapsulatedSegmenter, is_encapsulated};
use packet::vnet::VirtioNetHeader;
use services::pipeline::{BATCH_MAX, ETHERNET_BYTES, Frame};

/// Segments cut at a time: their memory is kept.
const SEGMENTS_MAX: usize = 64;
const _: () = assert!(SEGMENTS_MAX <= BATCH_MAX, "services leave the rest pending");

/// Cuts what comes in by one interface.
#[derive(Default)]
pub(crate) struct Cutter {
    /// Segments, one behind the other, each with its Ethernet header.
    space: Vec<u8>,
    /// Super-packets that could not be cut.
    pub refused: u64,
}

impl Cutter {
    /// Whether a frame has to be cut.
    #[inline]
    pub fn cuts(&self, offload: &VirtioNetHeader, frame: &[u8]) -> bool {
        frame.get(ETHERNET_BYTES..).is_some_and(|packet| is_encapsulated(offload, packet))
    }

    /// Hands on the segments of a frame, in their order.
    pub fn cut(
        &mut self,
        ingress: Ingress,
        offload: &VirtioNetHeader,
        frame: &[u8],
        act: &mut dyn FnMut(&mut [Frame<'_>]),
    ) {
        let (header, packet) = frame.split_at_checked(ETHERNET_BYTES).unwrap_or_default();
        let Ok(segmenter) = EncapsulatedSegmenter::new(offload, packet) else {
            self.refused += 1;
            return;
        };
        // No segment is longer than the first.
        let room = header.len() + segmenter.segment_bytes(0);
        let count = segmenter.segments();
        for first in (0..count).step_by(SEGMENTS_MAX) {
            let some = (first..count).take(SEGMENTS_MAX);
            self.space.resize(room * some.len(), 0);
            let mut frames = Vec::with_capacity(some.len());
            for (index, space) in some.zip(self.space.chunks_exact_mut(room)) {
                let (to, body) = space.split_at_mut(header.len());
                to.copy_from_slice(header);
                let bytes = segmenter.write_segment(index, body);
                let segment = space.get_mut(..header.len() + bytes).unwrap_or_default();
                frames.push(Frame::new(ingress, VirtioNetHeader::default(), segment));
            }
            act(&mut frames);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use packet::attachment::InterfaceId;
    use packet::vnet::{GSO_TCPV4, NEEDS_CSUM};

    use super::*;

    #[test]
    fn segments_come_in_their_order_in_batches_behind_their_ethernet_header() {
        const SIZE: u16 = 100;
        const SEGMENTS: usize = 150;
        let bytes = SEGMENTS as u16 * SIZE - 1;
        let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0];
        for (protocol, length) in [(4, 60 + bytes), (6, 40 + bytes)] {
            let [high, low] = length.to_be_bytes();
            frame.extend([0x45, 0, high, low, 0, 0, 0, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        }
        frame.extend([0, 80, 0, 81, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x10, 1, 0, 0, 0, 0, 0]);
        frame.extend((0..bytes).map(|at| (at / SIZE) as u8));
        let offload = VirtioNetHeader {
            flags: NEEDS_CSUM,
            gso_type: GSO_TCPV4,
            gso_size: SIZE,
            csum_start: 40,
            csum_offset: 16,
            ..VirtioNetHeader::default()
        };
        let mut cutter = Cutter::default();
        assert!(cutter.cuts(&offload, &frame) && !cutter.cuts(&VirtioNetHeader::default(), &frame));
        let ingress = Ingress::Interface(InterfaceId(3));
        let (mut next, mut batches) = (0, 0);
        cutter.cut(ingress, &offload, &frame, &mut |frames| {
            assert!(!frames.is_empty() && frames.len() <= BATCH_MAX);
            batches += 1;
            for segment in frames {
                let payload = if next + 1 == SEGMENTS { SIZE - 1 } else { SIZE };
                assert_eq!(segment.bytes.len(), 14 + 60 + usize::from(payload));
                assert_eq!((&segment.bytes[..14], segment.ingress), (&frame[..14], ingress));
                assert_eq!(segment.offload, VirtioNetHeader::default());
                assert!(segment.bytes[74..].iter().all(|byte| usize::from(*byte) == next));
                next += 1;
            }
        });
        assert_eq!((next, batches, cutter.refused), (SEGMENTS, 3, 0));
        let refused = VirtioNetHeader { csum_start: 44, ..offload };
        cutter.cut(ingress, &refused, &frame, &mut |_| panic!("cut all the same"));
        assert_eq!(cutter.refused, 1);
    }
}
