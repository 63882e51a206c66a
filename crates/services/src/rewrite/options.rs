//! Options and headers between the IP header and the upper layer that make a translation wrong.

use super::bytes::array_at;
use packet::ip::{
    IPV4_HEADER_BYTES, IPV6_HEADER_BYTES, PROTOCOL_AH, PROTOCOL_ROUTING, extension_bytes, is_extension,
};
use packet::{DropReason, IpHeader};

/// IPv4 options with a list of routers to go by (RFC 791 §3.1).
const LOOSE_SOURCE_ROUTE: u8 = 131;
const STRICT_SOURCE_ROUTE: u8 = 137;

/// # Errors
/// [`DropReason::NatUnsupported`] when checksums or signatures cover other addresses than those of the IP header.
/// `dst_changes`: the destination is to be translated.
pub(super) fn allow(packet: &[u8], header: &IpHeader, dst_changes: bool) -> Result<(), DropReason> {
    let fine = if header.version == 4 {
        header.header_bytes == IPV4_HEADER_BYTES || !dst_changes || !source_route(packet, header)
    } else if is_extension(header.protocol) {
        // Behind a fragment header: the upper layer and its checksum are further inside.
        false
    } else {
        header.header_bytes == IPV6_HEADER_BYTES || extensions_allow(packet, header, dst_changes)
    };
    if fine { Ok(()) } else { Err(DropReason::NatUnsupported) }
}

/// A source route that is not used up: the pseudo-header has its last address.
fn source_route(packet: &[u8], header: &IpHeader) -> bool {
    let mut at = IPV4_HEADER_BYTES;
    while at < header.header_bytes {
        match array_at::<3>(packet, at) {
            Some([0, ..]) | None => return false,
            Some([1, ..]) => at += 1,
            Some([LOOSE_SOURCE_ROUTE | STRICT_SOURCE_ROUTE, length, pointer]) => return pointer <= length,
            Some([_, 0 | 1, _]) => return false,
            Some([_, length, _]) => at += usize::from(length),
        }
    }
    false
}

/// No authentication header, and no routing header with segments left where that matters.
fn extensions_allow(packet: &[u8], header: &IpHeader, dst_changes: bool) -> bool {
    let (mut at, mut protocol) = (IPV6_HEADER_BYTES, packet.get(6).copied().unwrap_or(0));
    while at < header.header_bytes {
        let Some([next, length, _, segments_left]) = array_at::<4>(packet, at) else { return false };
        match protocol {
            PROTOCOL_AH => return false,
            PROTOCOL_ROUTING if segments_left > 0 && dst_changes => return false,
            _ => at += extension_bytes(protocol, length),
        }
        protocol = next;
    }
    true
}
