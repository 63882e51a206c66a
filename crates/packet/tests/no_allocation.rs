//! The per-packet path allocates nothing: counted by an allocator of its own, which is why this is a test
//! binary with a single test.

#![allow(clippy::unwrap_used, reason = "tests")]

use packet::vnet::{GSO_TCPV4, GSO_UDP_L4, NEEDS_CSUM};
use packet::{
    Coalescer, DropCounters, DropReason, FlowKey, Ingress, Segmenter, VirtioNetHeader, ip, segment,
};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: every call goes to the system's allocator unchanged; counting touches a constant-initialised
// thread local, which neither allocates nor has a destructor.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's promise about the layout is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the pointer came from `alloc` above, hence from the system's allocator.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// A TCP or UDP super-packet over IPv4 of 60,000 bytes, checksums left out.
fn super_packet(protocol: u8) -> (VirtioNetHeader, Vec<u8>) {
    let mut packet = vec![0u8; 60_000];
    packet[..4].copy_from_slice(&[0x45, 2, 0xea, 0x60]);
    packet[6..10].copy_from_slice(&[0x40, 0, 64, protocol]);
    packet[12..20].copy_from_slice(&[10, 0, 0, 5, 1, 2, 3, 4]);
    packet[20..24].copy_from_slice(&[4, 210, 1, 187]);
    let tcp = protocol == 6;
    if tcp {
        packet[32..36].copy_from_slice(&[0x50, 0x10, 1, 0]);
    } else {
        packet[24..26].copy_from_slice(&59_980u16.to_be_bytes());
    }
    let header = VirtioNetHeader {
        flags: NEEDS_CSUM,
        gso_type: if tcp { GSO_TCPV4 } else { GSO_UDP_L4 },
        hdr_len: 0,
        gso_size: 1400,
        csum_start: 20,
        csum_offset: if tcp { 16 } else { 6 },
    };
    (header, packet)
}

#[test]
fn the_packet_path_does_not_allocate() {
    let supers = [super_packet(6), super_packet(17)];
    let mut coalescer = Coalescer::new();
    let mut counters = DropCounters::new();
    let mut out = vec![0; 2000];
    let (mut emitted, mut keys) = (0, 0);

    let made = ALLOCATIONS.get();
    assert!(made > 0, "the allocator counts");
    for (header, packet) in &supers {
        keys += usize::from(FlowKey::of(packet).unwrap().src_port == 1234);
        let mut segmenter = Segmenter::new(header, packet).unwrap();
        segmenter.set_segment_payload(1300);
        for index in 0..segmenter.segments() {
            let bytes = segmenter.write_segment(index, &mut out);
            let segment = &mut out[..bytes];
            keys += usize::from(FlowKey::of(segment).unwrap().dst_port == 443);
            ip::set_ecn_ce(segment);
            segment::mss_clamp(segment, 1280, true);
            let full = index % 2 == 0;
            if full {
                segment::complete_checksum(segment).unwrap();
            }
            coalescer.push(Ingress::Host, segment, !full, true, &mut |packet| emitted += packet.len());
            counters.add(DropReason::CoDel);
        }
    }
    coalescer.flush(&mut |packet| emitted += packet.len());
    let allocated = ALLOCATIONS.get() - made;

    assert_eq!(allocated, 0);
    assert_eq!(emitted, 2 * 60_000);
    assert_eq!(keys, 2 + 47 + 43);
}
