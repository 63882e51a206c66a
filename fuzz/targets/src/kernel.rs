//! Messages of the kernel. It is trusted, but its versions differ, and what is in them comes from elsewhere.

use linux::testing::messages;

/// Steps per byte at most, with a constant part: messages are looked at once, or a few times.
const STEPS_PER_BYTE: usize = 4;

/// A datagram of routing changes or lists, or one of nftables' lists.
pub fn netlink(data: &[u8]) {
    let Some((&kind, datagram)) = data.split_first() else { return };
    let found = match kind & 3 {
        0 => messages::routing(datagram),
        1 => messages::neighbors(datagram),
        2 => messages::base_chains(datagram),
        _ => messages::exchange(datagram),
    };
    assert!(found <= STEPS_PER_BYTE * datagram.len() + 16, "{found} things in {} bytes", datagram.len());
}

/// Control messages of a datagram's reception: `address:28 | control`.
pub fn control_message(data: &[u8]) {
    let Some((address, control)) = data.split_at_checked(messages::ADDRESS_BYTES) else { return };
    let stride = messages::reception(address, control, 1_400);
    assert!((1..=1_400).contains(&stride), "datagrams of {stride} bytes in 1,400");
}

/// Slots of a packet ring: `snaplen:16 | mac:16 | len:32 | status:8`, one for each of its slots in turn.
pub fn packet_ring(data: &[u8]) {
    let slots = data.chunks_exact(9).map(|slot| messages::Slot {
        kept_bytes: u32::from(u16::from_be_bytes([slot[0], slot[1]])),
        mac: u16::from_be_bytes([slot[2], slot[3]]),
        frame_bytes: u32::from_be_bytes([slot[4], slot[5], slot[6], slot[7]]),
        status: u32::from(slot[8]),
    });
    messages::ring(&slots.collect::<Vec<_>>());
}
