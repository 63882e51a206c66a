//! Answers to packets that go no further: ICMP errors and TCP resets, written into a buffer of the caller's.
//!
//! Who asks first asks the [`Limiter`]. Then [`error()`] or [`reset`] write a whole IP packet to the sender of the packet
//! in question, or nothing where no answer is allowed (RFC 1812 §4.3.2.7, RFC 4443 §2.4). What came as a broadcast or
//! multicast of the link, the caller must not answer either. An answer is never larger than [`ANSWER_BYTES_MAX`].

mod limiter;
mod redirect;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use packet::icmp::{HEADER_BYTES, is_unanswerable, protocol_of};
use packet::ip::{IPV4_HEADER_BYTES, IPV6_HEADER_BYTES, PROTOCOL_TCP};
use packet::{FlowKey, IpHeader, checksum};

use crate::rewrite::bytes::{put, put_u16, put_u32, u32_at};
use crate::tcp::{ACK, RST, Segment};
pub use limiter::Limiter;
pub use redirect::redirect;

/// Longest answer, bytes: an ICMPv6 error fits the smallest MTU of IPv6 (RFC 4443 §2.4 c).
pub const ANSWER_BYTES_MAX: usize = 1_280;
/// Longest ICMP error of IPv4, bytes (RFC 1812 §4.3.2.3).
const ERROR_BYTES_MAX_V4: usize = 576;
/// Bytes that an error must quote behind the IP header to be of use (RFC 792).
const QUOTE_BYTES_MIN: usize = 8;
/// Time to live of answers.
const TTL: u8 = 64;
/// Type of service of IPv4 errors: precedence "internetwork control" (RFC 1812 §4.3.2.5).
const ERROR_TOS: u8 = 0xc0;
/// Smallest MTU that a link of IPv6 may have, bytes of the IP packet (RFC 8200 §5).
pub(crate) const IPV6_MTU_MIN: u16 = 1_280;
/// Smallest MTU of IPv4 (RFC 791) and of IPv6: less is never told.
const MTU_MIN: [u16; 2] = [68, IPV6_MTU_MIN];

/// Problem with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Problem {
    /// Its time to live ran out here.
    TtlExpired,
    /// No route to its destination.
    NoRoute,
    /// The next hop does not answer.
    HostUnreachable,
    /// Nobody listens on its port.
    PortUnreachable,
    /// A rule forbids it.
    Prohibited,
    /// This router is nearer to its destination (IPv4; [`redirect()`]).
    Redirect(Ipv4Addr),
    /// It does not fit the next link's MTU, bytes of the IP packet. IPv4: only where "don't fragment" is set.
    TooBig(u16),
}

impl Problem {
    /// Type, code and the 32 bits behind the checksum.
    const fn message(self, version: u8) -> (u8, u8, u32) {
        if version == 4 {
            match self {
                Problem::TtlExpired => (11, 0, 0),
                Problem::NoRoute => (3, 0, 0),
                Problem::HostUnreachable => (3, 1, 0),
                Problem::PortUnreachable => (3, 3, 0),
                Problem::Prohibited => (3, 13, 0),
                Problem::Redirect(router) => (5, 1, u32::from_be_bytes(router.octets())),
                Problem::TooBig(mtu) => (3, 4, if mtu < MTU_MIN[0] { MTU_MIN[0] } else { mtu } as u32),
            }
        } else {
            match self {
                Problem::TtlExpired => (3, 0, 0),
                Problem::NoRoute => (1, 0, 0),
                Problem::HostUnreachable => (1, 3, 0),
                Problem::PortUnreachable => (1, 4, 0),
                // There is no such error of IPv6: [`redirect`] is made in another way.
                Problem::Prohibited | Problem::Redirect(_) => (1, 1, 0),
                Problem::TooBig(mtu) => (2, 0, if mtu < MTU_MIN[1] { MTU_MIN[1] } else { mtu } as u32),
            }
        }
    }
}

/// Writes the ICMP error about `packet` to the start of `out` and returns its length, at most [`ANSWER_BYTES_MAX`].
/// `packet` must be as its sender sent it, before any translation; `from` is the address that this gateway answers with.
/// As much is quoted as fits.
///
/// `None`: no answer is allowed, `from` is of the other IP version, or `out` is too short for eight bytes of quoted upper
/// layer (or all of it).
#[must_use]
pub fn error(
    out: &mut [u8],
    packet: &[u8],
    header: &IpHeader,
    problem: Problem,
    from: IpAddr,
) -> Option<usize> {
    let packet = packet.get(..header.total_bytes)?;
    if !may_answer(packet, header, matches!(problem, Problem::TooBig(_))) {
        return None;
    }
    let (ip_bytes, bytes_max) = if header.version == 4 {
        (IPV4_HEADER_BYTES, ERROR_BYTES_MAX_V4)
    } else {
        (IPV6_HEADER_BYTES, ANSWER_BYTES_MAX)
    };
    let room = out.len().min(bytes_max).checked_sub(ip_bytes + HEADER_BYTES)?;
    let quote = packet.get(..packet.len().min(room))?;
    if quote.len() < packet.len().min(header.header_bytes + QUOTE_BYTES_MIN) {
        return None;
    }
    let bytes = ip_bytes + HEADER_BYTES + quote.len();
    let out = out.get_mut(..bytes)?;
    let tos = if header.version == 4 { ERROR_TOS } else { 0 };
    let pseudo = ip_header(out, from, header.src, protocol_of(header.version), tos)?;
    let message = out.get_mut(ip_bytes..)?;
    let (kind, code, rest) = problem.message(header.version);
    put(message, 0, &[kind, code, 0, 0]);
    put_u32(message, 4, rest);
    put(message, HEADER_BYTES, quote);
    let pseudo = if header.version == 4 { 0 } else { pseudo };
    put_u16(message, 2, checksum::finish(checksum::sum(message, pseudo)));
    Some(bytes)
}

/// Writes the RST that refuses a TCP segment, as its destination would send it (RFC 9293 §3.10.7.1), to the start of
/// `out` and returns its length, 40 or 60 bytes. `checksum_partial`: the segment's checksum is not complete yet;
/// otherwise it must be right, for a damaged segment is not answered.
///
/// `None`: no answer is allowed, it is no whole TCP segment or is a RST itself, or `out` is too short.
#[must_use]
pub fn reset(out: &mut [u8], packet: &[u8], header: &IpHeader, checksum_partial: bool) -> Option<usize> {
    let upper = header.payload(packet);
    if header.protocol != PROTOCOL_TCP || header.is_fragmented() || !may_answer(packet, header, false) {
        return None;
    }
    let segment = Segment::of(upper).filter(|segment| !segment.has(RST))?;
    if !checksum_partial && !checksum::verify_upper(header.src, header.dst, PROTOCOL_TCP, upper) {
        return None;
    }
    let ip_bytes = if header.version == 4 { IPV4_HEADER_BYTES } else { IPV6_HEADER_BYTES };
    let bytes = ip_bytes + 20;
    let out = out.get_mut(..bytes)?;
    let pseudo = ip_header(out, header.dst, header.src, PROTOCOL_TCP, 0)?;
    let (seq, ack, flags) =
        if segment.has(ACK) { (segment.ack, 0, RST) } else { (0, segment.end(), RST | ACK) };
    let tcp = out.get_mut(ip_bytes..)?;
    tcp.fill(0);
    put_u32(tcp, 0, u32_at(upper, 0)?.rotate_left(16));
    put_u32(tcp, 4, seq);
    put_u32(tcp, 8, ack);
    put(tcp, 12, &[5 << 4, flags]);
    put_u16(tcp, 16, checksum::finish(checksum::sum(tcp, pseudo)));
    Some(bytes)
}

/// Writes the RST by which the sender of `key` ends its connection (RFC 9293 §3.10.5, ABORT: `<SEQ=SND.NXT><CTL=RST>`) to
/// the start of `out` and returns its length, 40 or 60 bytes. `seq`: the next sequence number in that direction, which
/// alone a receiver believes (RFC 5961 §3.2). Without ACK a client that has not heard of the connection yet ignores it.
///
/// `None`: addresses of different versions, or `out` is too short.
#[must_use]
pub fn abort(out: &mut [u8], key: &FlowKey, seq: u32) -> Option<usize> {
    let ip_bytes = if key.src.is_ipv4() { IPV4_HEADER_BYTES } else { IPV6_HEADER_BYTES };
    let bytes = ip_bytes + 20;
    let out = out.get_mut(..bytes)?;
    let pseudo = ip_header(out, key.src, key.dst, PROTOCOL_TCP, 0)?;
    let tcp = out.get_mut(ip_bytes..)?;
    tcp.fill(0);
    put_u16(tcp, 0, key.src_port);
    put_u16(tcp, 2, key.dst_port);
    put_u32(tcp, 4, seq);
    put(tcp, 12, &[5 << 4, RST]);
    put_u16(tcp, 16, checksum::finish(checksum::sum(tcp, pseudo)));
    Some(bytes)
}

/// Fills in the IP header of a packet that is as long as `out`; returns the sum of the pseudo-header. `None`: addresses
/// of different versions.
fn ip_header(out: &mut [u8], src: IpAddr, dst: IpAddr, protocol: u8, tos: u8) -> Option<u32> {
    let bytes = out.len();
    match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            // Whole and never fragmented: its identification says nothing (RFC 6864 §4.1).
            put(out, 0, &[0x45, tos, 0, 0, 0, 0, 0x40, 0, TTL, protocol, 0, 0]);
            put_u16(out, 2, bytes as u16);
            put(out, 12, &src.octets());
            put(out, 16, &dst.octets());
            put_u16(out, 10, checksum::finish(checksum::sum(out.get(..IPV4_HEADER_BYTES)?, 0)));
            Some(checksum::pseudo_header_v4(src, dst, protocol, (bytes - IPV4_HEADER_BYTES) as u16))
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            let upper_bytes = bytes.checked_sub(IPV6_HEADER_BYTES)?;
            put(out, 0, &[0x60, 0, 0, 0, 0, 0, protocol, TTL]);
            put_u16(out, 4, upper_bytes as u16);
            put(out, 8, &src.octets());
            put(out, 24, &dst.octets());
            Some(checksum::pseudo_header_v6(&src, &dst, protocol, upper_bytes as u32))
        }
        _ => None,
    }
}

/// Whether anything may be answered to a packet. `too_big`: ICMPv6 tells that to senders of multicast, too (RFC 4443
/// §2.4 e.3), and about later fragments: the first one may be shorter than they are (RFC 8201 §4).
pub fn may_answer(packet: &[u8], header: &IpHeader, too_big: bool) -> bool {
    let too_big = too_big && header.version == 6;
    let about = match header.of_first_fragment(packet) {
        Some(whole) => !is_unanswerable(&whole, whole.payload(packet)),
        // No ICMPv6 error comes in fragments: it fits the smallest MTU (RFC 4443 §2.4 c).
        None => too_big && header.fragment.is_some_and(|fragment| fragment.offset > 0),
    };
    let addresses = match (header.src, header.dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => one_host_v4(src) && !dst.is_multicast() && !dst.is_broadcast(),
        (IpAddr::V6(src), IpAddr::V6(dst)) => one_host_v6(src) && (too_big || !dst.is_multicast()),
        _ => false,
    };
    addresses && about
}

/// The address can be one host's: not "this network", loopback, multicast, reserved or broadcast.
fn one_host_v4(src: Ipv4Addr) -> bool {
    let [first, ..] = src.octets();
    first != 0 && !src.is_loopback() && first < 224
}

fn one_host_v6(src: Ipv6Addr) -> bool {
    !src.is_unspecified() && !src.is_loopback() && !src.is_multicast()
}

#[cfg(test)]
mod tests;
