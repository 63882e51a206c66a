//! TCP MSS clamping: the one place where the gateway edits a transport header on the way through a tunnel
//! whose packets are smaller than the hosts believe (RFC 6691).

use crate::checksum;
use crate::ip::{IpHeader, PROTOCOL_TCP};
use crate::segment::{TCP_CHECKSUM_OFFSET, TCP_HEADER_BYTES, TCP_SYN};
use crate::{array_at, put_u16, u16_at};

const OPTION_END: u8 = 0;
const OPTION_NOP: u8 = 1;
const OPTION_MSS: u8 = 2;

/// Lowers the MSS option of a SYN so that full segments fit packets of `mtu` bytes; never raises it, never
/// adds one. Returns whether the packet changed.
///
/// `checksum_partial`: the packet's checksum is, does not cover the option and stays; a full one follows.
pub fn mss_clamp(packet: &mut [u8], mtu: u16, checksum_partial: bool) -> bool {
    let Some(place) = find(packet, mtu) else { return false };
    place.apply(packet, checksum_partial);
    true
}

/// An MSS option that has to be lowered.
struct Place {
    /// Where the TCP header starts.
    tcp: usize,
    /// Offset of the option's value in the packet.
    value: usize,
    old: u16,
    new: u16,
}

impl Place {
    fn apply(&self, packet: &mut [u8], checksum_partial: bool) {
        put_u16(packet, self.value, self.new);
        if checksum_partial {
            return;
        }
        let at = self.tcp + TCP_CHECKSUM_OFFSET;
        let old_checksum = u16_at(packet, at).unwrap_or(0);
        // At an odd offset the value's bytes lie in two words, each in the other half: the same as swapped.
        let odd = (self.value - self.tcp) % 2 == 1;
        let word = |value: u16| if odd { value.swap_bytes() } else { value };
        put_u16(packet, at, checksum::update16(old_checksum, word(self.old), word(self.new)));
    }
}

fn find(packet: &[u8], mtu: u16) -> Option<Place> {
    let ip = IpHeader::parse(packet).ok()?;
    if ip.protocol != PROTOCOL_TCP || ip.is_fragmented() {
        return None;
    }
    let (tcp, end) = (ip.header_bytes, ip.total_bytes);
    let segment = packet.get(tcp..end)?;
    if segment.get(13)? & TCP_SYN == 0 {
        return None;
    }
    let header_bytes = usize::from(segment.get(12)? >> 4) * 4;
    // The MSS does not count options, so fixed header lengths are right here (RFC 6691 §2).
    let fixed_bytes = if ip.version == 4 { 40 } else { 60 };
    let new = mtu.checked_sub(fixed_bytes).filter(|new| *new > 0)?;
    let value = tcp + find_option(segment.get(..header_bytes)?)?;
    let old = u16_at(packet, value)?;
    (old > new).then_some(Place { tcp, value, old, new })
}

/// Offset of the MSS option's value in a TCP header.
fn find_option(header: &[u8]) -> Option<usize> {
    let mut at = TCP_HEADER_BYTES;
    loop {
        match *header.get(at)? {
            OPTION_END => return None,
            OPTION_NOP => at += 1,
            kind => {
                let [_, length] = array_at(header, at)?;
                if kind == OPTION_MSS && length == 4 && at + 4 <= header.len() {
                    return Some(at + 2);
                }
                if length < 2 {
                    return None;
                }
                at += usize::from(length);
            }
        }
    }
}

#[cfg(test)]
mod tests;
