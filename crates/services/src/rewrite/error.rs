//! ICMP errors: the packet, and the packet that it quotes.

use std::net::IpAddr;

use super::bytes::{changed, changed_partial, delta_of, delta16, put_u16, u16_at};
use super::upper::{Change, Extent};
use super::{options, put_addresses};
use packet::icmp::{HEADER_BYTES, Kind};
use packet::{DropReason, FlowKey, IpHeader, checksum};

/// Of a quoted upper layer no byte behind this one changes: TCP's ports and checksum are in its first 20.
const UPPER_BYTES_MAX: usize = 20;

/// Translates an ICMP error about a flow (RFC 5508 §4). It travels in a flow's direction whose leaving key is `to`, so
/// the packet that it quotes goes the other way and becomes one of `to` reversed.
///
/// * The destination becomes `to.dst`.
/// * The source becomes `to.src` where the flow's own endpoint sent the error, that is where the error's source is the
///   quote's destination. A router on the way keeps its address, unless `hide_router_behind` says that it stands
///   inside and which address hides it (RFC 5508 REQ-5).
/// * The quote's addresses, ports or identifier, its IPv4 header checksum, and its upper checksum if that much is
///   quoted, are those the quoted packet would have had. A quoted SCTP checksum stays as it is.
///
/// `header` was parsed from this packet. `checksum_partial` is about the error itself.
///
/// # Errors
/// The packet is unchanged then. [`DropReason::IcmpInvalid`]: no error, a fragment of one, or a quote that cannot be
/// read or whose source is not the error's destination. [`DropReason::NatUnsupported`]: addresses of the other IP version, or a quote with a source route or an
/// extension header that hides its upper layer.
pub fn rewrite_error(
    packet: &mut [u8],
    header: &IpHeader,
    checksum_partial: bool,
    to: &FlowKey,
    hide_router_behind: Option<IpAddr>,
) -> Result<(), DropReason> {
    let message = packet.get(header.header_bytes..header.total_bytes).ok_or(DropReason::IcmpInvalid)?;
    if Kind::of(header, message) != Some(Kind::Error) || header.is_fragmented() {
        return Err(DropReason::IcmpInvalid);
    }
    let quote = message.get(HEADER_BYTES..).ok_or(DropReason::IcmpInvalid)?;
    let inner = IpHeader::parse_quoted(quote).map_err(|_| DropReason::IcmpInvalid)?;
    let source = match hide_router_behind {
        _ if header.src == inner.dst => to.src,
        Some(address) => address,
        None => header.src,
    };
    let versions = [to.src, to.dst, source].iter().all(|address| address.is_ipv4() == (header.version == 4));
    // An error goes to whom it quotes: otherwise the quote is a pretext for a packet to somebody else.
    if inner.version != header.version || inner.src != header.dst {
        return Err(DropReason::IcmpInvalid);
    }
    if !versions {
        return Err(DropReason::NatUnsupported);
    }
    options::allow(packet, header, to.dst != header.dst)?;
    let quote_at = header.header_bytes + HEADER_BYTES;
    let quote = packet.get_mut(quote_at..header.total_bytes).ok_or(DropReason::IcmpInvalid)?;
    let quote_delta = rewrite_quote(quote, &inner, &to.reversed())?;
    let addresses = delta_of(header.src, source) + delta_of(header.dst, to.dst);
    let at = header.header_bytes + 2;
    let old = u16_at(packet, at).unwrap_or(0);
    let new = match (header.version, checksum_partial) {
        (4, false) => changed(old, quote_delta),
        (4, true) => old,
        (_, false) => changed(old, addresses + quote_delta),
        (_, true) => changed_partial(old, addresses),
    };
    put_u16(packet, at, new);
    put_addresses(packet, source, to.dst);
    Ok(())
}

/// Makes the quoted packet one of `to`; returns the delta of all that changed. Nothing changes in case of an error.
fn rewrite_quote(quote: &mut [u8], inner: &IpHeader, to: &FlowKey) -> Result<u64, DropReason> {
    options::allow(quote, inner, to.dst != inner.dst)?;
    let region = inner.total_bytes.min(inner.header_bytes + UPPER_BYTES_MAX);
    let before = checksum::fold(checksum::sum(quote.get(..region).unwrap_or_default(), 0));
    let change = Change {
        addresses: delta_of(inner.src, to.src) + delta_of(inner.dst, to.dst),
        version: inner.version,
        src_port: to.src_port,
        dst_port: to.dst_port,
        partial: false,
        extent: match inner.fragment {
            Some(fragment) if fragment.offset > 0 => Extent::Later,
            _ => Extent::Quoted,
        },
    };
    if let Some(upper) = quote.get_mut(inner.header_bytes..inner.total_bytes) {
        change.apply(upper, inner.protocol)?;
    }
    put_addresses(quote, to.src, to.dst);
    let after = checksum::fold(checksum::sum(quote.get(..region).unwrap_or_default(), 0));
    Ok(delta16(before, after))
}
