//! Redirects: ICMP type 5 (RFC 792) and ICMPv6 type 137 (RFC 4861 §4.5).

use std::net::IpAddr;

use packet::icmp::{HEADER_BYTES, protocol_of};
use packet::ip::IPV6_HEADER_BYTES;
use packet::{IpHeader, checksum};

use super::{ANSWER_BYTES_MAX, Problem, error, ip_header, may_answer};
use crate::rewrite::bytes::{put, put_u16};

/// Type of an ICMPv6 redirect.
const REDIRECT_V6: u8 = 137;
/// Target and destination behind the ICMPv6 header.
const ADDRESSES_BYTES: usize = 32;
/// Option "redirected header" (RFC 4861 §4.6.3), before the quote.
const OPTION_REDIRECTED: u8 = 4;
const OPTION_BYTES: usize = 8;

/// Writes the redirect of a packet's sender to `neighbor` and returns its length. `from`: the address by which the sender
/// knows this gateway, for IPv6 the link-local one.
///
/// `None`: as for [`error`].
#[must_use]
pub fn redirect(
    out: &mut [u8],
    packet: &[u8],
    header: &IpHeader,
    neighbor: IpAddr,
    from: IpAddr,
) -> Option<usize> {
    let (target, IpAddr::V6(dst)) = (neighbor, header.dst) else {
        let IpAddr::V4(neighbor) = neighbor else { return None };
        return error(out, packet, header, Problem::Redirect(neighbor), from);
    };
    let IpAddr::V6(target) = target else { return None };
    let packet = packet.get(..header.total_bytes)?;
    if !may_answer(packet, header, false) {
        return None;
    }
    let before = IPV6_HEADER_BYTES + HEADER_BYTES + ADDRESSES_BYTES + OPTION_BYTES;
    // Options are whole units of eight bytes.
    let quote_bytes = packet.len().min(out.len().min(ANSWER_BYTES_MAX).checked_sub(before)?) & !7;
    let out = out.get_mut(..before + quote_bytes)?;
    let pseudo = ip_header(out, from, header.src, protocol_of(6), 0)?;
    // Hosts believe only what no router passed on (RFC 4861 §8.1).
    put(out, 7, &[255]);
    let message = out.get_mut(IPV6_HEADER_BYTES..)?;
    put(message, 0, &[REDIRECT_V6, 0, 0, 0, 0, 0, 0, 0]);
    put(message, HEADER_BYTES, &target.octets());
    put(message, HEADER_BYTES + 16, &dst.octets());
    let units = u8::try_from((OPTION_BYTES + quote_bytes) / 8).ok()?;
    put(message, HEADER_BYTES + ADDRESSES_BYTES, &[OPTION_REDIRECTED, units, 0, 0, 0, 0, 0, 0]);
    put(message, HEADER_BYTES + ADDRESSES_BYTES + OPTION_BYTES, packet.get(..quote_bytes)?);
    put_u16(message, 2, checksum::finish(checksum::sum(message, pseudo)));
    Some(before + quote_bytes)
}
