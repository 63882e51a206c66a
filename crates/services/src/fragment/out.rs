//! Packets that are longer than the next link carries are cut (RFC 791 §3.2, RFC 8200 §4.5).

use packet::ip::{
    FRAGMENT_HEADER_BYTES, IPV4_DONT_FRAGMENT, IPV4_HEADER_BYTES, IPV6_HEADER_BYTES,
    PROTOCOL_DESTINATION_OPTIONS, PROTOCOL_FRAGMENT, PROTOCOL_HOP_BY_HOP, PROTOCOL_ROUTING, extension_bytes,
};
use packet::{DropReason, IpHeader, checksum};

use super::pieces::LENGTH_MAX;
use super::{put_u16, u16_at};

/// "More fragments" in the word of flags and offset.
const MORE: u16 = 0x2000;

/// Gives out the packet in fragments of at most `mtu` bytes, in order; as it is if it fits.
///
/// An IPv4 packet must not have DF set; its identification and options stay (options that are not to be copied stand in
/// the first fragment only), and a fragment may be cut further. An IPv6 packet is cut only if it was assembled here:
/// `id` is then its identification ([`super::Whole::id`]), and fragments get a fragment header behind the headers that
/// every router reads. `scratch` is a buffer for reuse.
///
/// The transport checksum must be complete: a partial one could not be finished any more.
///
/// # Errors
/// [`DropReason::TooBig`]: it does not fit and must not be cut, or `mtu` has no room for 8 bytes of payload.
/// [`DropReason::IpMalformed`]: no IP packet. [`DropReason::FragmentInvalid`]: an IPv4 fragment that ends behind the
/// longest packet. Nothing has gone out then.
pub fn fragment_out(
    packet: &[u8],
    mtu: usize,
    id: Option<u32>,
    scratch: &mut Vec<u8>,
    emit: &mut impl FnMut(&[u8]),
) -> Result<(), DropReason> {
    let header = IpHeader::parse(packet)?;
    let packet = packet.get(..header.total_bytes).ok_or(DropReason::IpMalformed)?;
    if packet.len() <= mtu {
        emit(packet);
        return Ok(());
    }
    match (header.version, id) {
        (4, _) => cut_v4(packet, &header, mtu, scratch, emit),
        (_, Some(id)) if header.fragment.is_none() => cut_v6(packet, id, mtu, scratch, emit),
        _ => Err(DropReason::TooBig),
    }
}

/// Payload of a fragment behind `header_bytes`: a multiple of 8, not zero.
fn room(mtu: usize, header_bytes: usize) -> Result<usize, DropReason> {
    let room = mtu.saturating_sub(header_bytes) & !7;
    if room == 0 { Err(DropReason::TooBig) } else { Ok(room) }
}

fn cut_v4(
    packet: &[u8],
    header: &IpHeader,
    mtu: usize,
    scratch: &mut Vec<u8>,
    emit: &mut impl FnMut(&[u8]),
) -> Result<(), DropReason> {
    let word = u16_at(packet, 6).ok_or(DropReason::IpMalformed)?;
    if word & IPV4_DONT_FRAGMENT != 0 {
        return Err(DropReason::TooBig);
    }
    let (head, mut rest) = packet.split_at_checked(header.header_bytes).ok_or(DropReason::IpMalformed)?;
    if rest.is_empty() {
        return Err(DropReason::TooBig);
    }
    let mut offset = usize::from(word & 0x1fff) * 8;
    if offset + packet.len() > LENGTH_MAX {
        return Err(DropReason::FragmentInvalid);
    }
    scratch.clear();
    scratch.extend_from_slice(head);
    while !rest.is_empty() {
        let header_bytes = scratch.len();
        let room = room(mtu, header_bytes)?;
        let all = rest.len() <= mtu - header_bytes;
        let (now, later) = rest.split_at_checked(if all { rest.len() } else { room }).unwrap_or((rest, &[]));
        let more = if all { word & MORE } else { MORE };
        scratch.extend_from_slice(now);
        let bytes = scratch.len() as u16;
        put_u16(scratch, 2, bytes);
        put_u16(scratch, 6, more | (offset / 8) as u16);
        put_u16(scratch, 10, 0);
        let sum = checksum::finish(checksum::sum(scratch.get(..header_bytes).unwrap_or_default(), 0));
        put_u16(scratch, 10, sum);
        emit(scratch);
        offset += now.len();
        rest = later;
        scratch.clear();
        scratch.extend_from_slice(head);
        keep_copied_options(scratch);
    }
    Ok(())
}

/// Leaves the fixed header and the options that every fragment has (RFC 791 §3.1: the copied flag).
fn keep_copied_options(head: &mut Vec<u8>) {
    let (mut read, mut write) = (IPV4_HEADER_BYTES, IPV4_HEADER_BYTES);
    while let Some(kind) = head.get(read).copied() {
        let bytes = match kind {
            0 => break,
            1 => 1,
            _ => usize::from(head.get(read + 1).copied().unwrap_or(0)),
        };
        if bytes == 0 || read + bytes > head.len() {
            break;
        }
        if kind & 0x80 != 0 {
            head.copy_within(read..read + bytes, write);
            write += bytes;
        }
        read += bytes;
    }
    head.truncate(write);
    head.resize(write.next_multiple_of(4), 0);
    let words = head.len() as u8 / 4;
    if let Some(first) = head.first_mut() {
        *first = 0x40 | words;
    }
}

fn cut_v6(
    packet: &[u8],
    id: u32,
    mtu: usize,
    scratch: &mut Vec<u8>,
    emit: &mut impl FnMut(&[u8]),
) -> Result<(), DropReason> {
    let (names, end) = unfragmentable(packet).ok_or(DropReason::IpMalformed)?;
    let (head, mut rest) = packet.split_at_checked(end).ok_or(DropReason::IpMalformed)?;
    let next = *head.get(names).ok_or(DropReason::IpMalformed)?;
    let header_bytes = end + FRAGMENT_HEADER_BYTES;
    let room = room(mtu, header_bytes)?;
    if rest.is_empty() {
        return Err(DropReason::TooBig);
    }
    let mut offset = 0;
    while !rest.is_empty() {
        let all = rest.len() <= mtu - header_bytes;
        let (now, later) = rest.split_at_checked(if all { rest.len() } else { room }).unwrap_or((rest, &[]));
        scratch.clear();
        scratch.extend_from_slice(head);
        if let Some(field) = scratch.get_mut(names) {
            *field = PROTOCOL_FRAGMENT;
        }
        scratch.extend_from_slice(&[next, 0]);
        scratch.extend_from_slice(&(offset | u16::from(!all)).to_be_bytes());
        scratch.extend_from_slice(&id.to_be_bytes());
        scratch.extend_from_slice(now);
        let bytes = (scratch.len() - IPV6_HEADER_BYTES) as u16;
        put_u16(scratch, 4, bytes);
        emit(scratch);
        // A multiple of 8 below 65,535 unless it was the last one.
        offset = offset.wrapping_add(now.len() as u16);
        rest = later;
    }
    Ok(())
}

/// The part of an IPv6 packet that every fragment has (RFC 8200 §4.5): up to the routing header, else up to the
/// hop-by-hop options. Returns where the byte stands that names what follows it, and where it ends.
fn unfragmentable(packet: &[u8]) -> Option<(usize, usize)> {
    let (mut names, mut at) = (6, IPV6_HEADER_BYTES);
    let mut part = (names, at);
    // Hop-by-hop, destination options, routing: RFC 8200 §4.1.
    for _ in 0..3 {
        let protocol = *packet.get(names)?;
        if !matches!(protocol, PROTOCOL_HOP_BY_HOP | PROTOCOL_DESTINATION_OPTIONS | PROTOCOL_ROUTING) {
            break;
        }
        names = at;
        at += extension_bytes(protocol, *packet.get(at + 1)?);
        if protocol != PROTOCOL_DESTINATION_OPTIONS {
            part = (names, at);
        }
    }
    Some(part)
}
