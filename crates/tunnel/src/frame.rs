//! Inner frames: what the plaintext of a data datagram is made of.
//!
//! A datagram's plaintext is frames one after another, big endian, without gaps:
//!
//! ```text
//! kind:8 | flags:8 | fields of the kind | body
//! ```
//!
//! * kind 0 ends the datagram: it and everything behind it is padding;
//! * kinds 1–3 carry traffic (IP packet, Ethernet frame, piece of a larger packet) and use the flags;
//! * kinds 4–17 are control frames; their flags are zero;
//! * kinds 128–255 are reserved for later: their fields start with a 16-bit length, so a receiver that does not know
//!   one steps over it ([`Frame::Extension`]).
//!
//! The hot path writes a head with [`PacketHead::write`] and lets the segmenter put the packet right behind
//! it; the receiver walks the plaintext with [`parse`] (or the iterator [`Frames`]) and gets positions
//! as well as slices, so that it can change a packet in place. Nothing here allocates.
//!
//! Every layout is written down byte by byte in `docs/wire-frames.md`; the tests hold its examples.

mod control;
#[cfg(test)]
mod tests;

pub use control::{
    CloseReason, ENTRIES_MAX, Nack, NackRange, PeerPathState, RANGES_MAX, REPORT_ENTRY_BYTES, Report,
    ReportEntry, nack_bytes, of_lane_not_told, report_bytes, write_nack, write_report,
};

use crate::order::Order;
use packet::drop_reason::DropReason;

/// Frame kinds as they stand in the first byte of a frame.
pub mod kind {
    /// Everything from here to the end of the datagram is padding.
    pub const PADDING: u8 = 0;
    /// An IP packet.
    pub const PACKET: u8 = 1;
    /// An Ethernet frame.
    pub const ETHERNET: u8 = 2;
    /// A piece of a packet or Ethernet frame that did not fit one datagram.
    pub const PIECE: u8 = 3;
    /// Arrivals on the lanes of the core that gets the report.
    pub const REPORT: u8 = 4;
    /// Counters that are missing on a lane and wanted again.
    pub const NACK: u8 = 5;
    /// Proof of a path: the other side answers with the token.
    pub const CHALLENGE: u8 = 6;
    /// Answer to a challenge.
    pub const RESPONSE: u8 = 7;
    /// Keepalive that wants an answer.
    pub const PING: u8 = 8;
    /// Answer to a ping.
    pub const PONG: u8 = 9;
    /// MTU probe.
    pub const PROBE: u8 = 10;
    /// Answer to an MTU probe.
    pub const PROBE_ACK: u8 = 11;
    /// Highest stamp given out, sent on a path that is idle.
    pub const MARKER: u8 = 12;
    /// A flow's core, told to the peer.
    pub const ASSIGNMENT: u8 = 13;
    /// Processor information changed (row T3).
    pub const PROCESSOR_INFO: u8 = 14;
    /// The session ends.
    pub const CLOSE: u8 = 15;
    /// A path went down or came up, told over the other paths.
    pub const PATH_STATE: u8 = 16;
    /// First of the kinds that carry their length and may be stepped over by who does not know them.
    pub const EXTENSION: u8 = 128;
}

/// Kinds of the extensions in use.
pub mod extension {
    /// Relative delays of the sender's paths. Body: entries of path 8, delay 32 (signed, µs), jitter 32 (µs).
    pub const PATH_TIMING: u8 = 128;
    /// The sender used up its packets under this session's keys and wants new ones. No body.
    pub const REKEY: u8 = 129;
    /// The sender has the processor information with this digest. Body: 4 bytes.
    pub const PROCESSOR_INFO_SEEN: u8 = 130;
    /// Limits of the sender's paths, see [`crate::path_limits`]. Body: number 32, length of an entry 8, entries of
    /// path 8, tier 8, bits per second 64.
    pub const PATH_LIMITS: u8 = 131;
    /// The sender has the path limits with this number. Body: 4 bytes.
    pub const PATH_LIMITS_SEEN: u8 = 132;
    /// The receiving core of the packets in this datagram (row T7). Body: 1 byte. First in the datagram.
    pub const SEALED_CORE: u8 = 133;
    /// The session-ID of the packets in this datagram (row T9). Body: 8 bytes. First in the datagram, never sealed.
    pub const SESSION_ID: u8 = 134;
    /// Part of a repair symbol of the lane it comes in, see [`crate::fec`]. Body: [`crate::fec::SymbolPart`].
    pub const REPAIR: u8 = 135;
    /// Questions for the cores of flows of which nothing was sent yet (row T5). Body: entries of flow hash 32, class 8.
    pub const CORE_WANTED: u8 = 136;
}

/// Flag bits of kinds 1–3.
pub mod flag {
    /// The body's length follows (16 bits); without it the body reaches to the end of the datagram.
    pub const LEN: u8 = 0x01;
    /// Stamp (32 bits) and back-distance (16 bits) follow. Always set on a piece.
    pub const ORDER: u8 = 0x02;
    /// The flow bucket's earlier packets travelled on this same path; only together with `ORDER`.
    pub const SAME_PATH: u8 = 0x04;
    /// The packet's layer 4 checksum field holds the pseudo-header sum only.
    pub const PARTIAL: u8 = 0x08;
    /// The packet continues the super-packet of the frame before it.
    pub const GROUP: u8 = 0x10;
    /// A tenant id (16 bits) follows.
    pub const TENANT: u8 = 0x20;
    /// On a piece only: it belongs to an Ethernet frame, not to an IP packet.
    pub const ETHERNET: u8 = 0x40;
}

/// Bytes of the longest [`PacketHead`].
pub const PACKET_HEAD_BYTES_MAX: usize = 12;
/// Bytes of the longest [`PieceHead`].
pub const PIECE_HEAD_BYTES_MAX: usize = 16;
/// Bytes of an MTU probe frame without the padding behind it.
pub const PROBE_BYTES: usize = 8;

/// Head of a whole packet (kinds 1 and 2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PacketHead {
    /// An Ethernet frame (kind 2) instead of an IP packet (kind 1).
    pub ethernet: bool,
    /// The layer 4 checksum is partial: the field holds the pseudo-header sum of this packet.
    pub partial: bool,
    /// This packet continues the super-packet of the frame before it; the receiver may merge them.
    pub group: bool,
    /// Place in the order of its flow bucket; none for traffic that may overtake.
    pub order: Option<Order>,
    /// Tenant, when there are several.
    pub tenant: Option<u16>,
    /// Bytes of the packet behind the head; none means it reaches to the end of the datagram.
    pub bytes: Option<u16>,
}

impl PacketHead {
    /// Bytes this head takes: 2 to [`PACKET_HEAD_BYTES_MAX`].
    #[inline]
    pub const fn encoded_len(&self) -> usize {
        2 + if self.bytes.is_some() { 2 } else { 0 }
            + if self.order.is_some() { 6 } else { 0 }
            + if self.tenant.is_some() { 2 } else { 0 }
    }

    /// Writes the head at `at` and returns where the packet begins; `None` when it does not fit.
    #[inline]
    pub fn write(&self, out: &mut [u8], at: usize) -> Option<usize> {
        let end = at.checked_add(self.encoded_len())?;
        let mut put = Put::new(out.get_mut(at..end)?);
        let mut flags = 0;
        flags |= if self.bytes.is_some() { flag::LEN } else { 0 };
        flags |= if self.partial { flag::PARTIAL } else { 0 };
        flags |= if self.group { flag::GROUP } else { 0 };
        flags |= if self.tenant.is_some() { flag::TENANT } else { 0 };
        if let Some(order) = self.order {
            flags |= flag::ORDER | if order.same_path { flag::SAME_PATH } else { 0 };
        }
        put.u8(if self.ethernet { kind::ETHERNET } else { kind::PACKET })?;
        put.u8(flags)?;
        if let Some(bytes) = self.bytes {
            put.u16(bytes)?;
        }
        if let Some(order) = self.order {
            put.u32(order.stamp)?;
            put.u16(order.back)?;
        }
        if let Some(tenant) = self.tenant {
            put.u16(tenant)?;
        }
        Some(end)
    }

    /// Puts a length into a head that was written with `bytes: Some(_)` at `head_at`, once the body's
    /// length is known. `None` when there is no such head.
    pub fn patch_bytes(out: &mut [u8], head_at: usize, bytes: u16) -> Option<()> {
        let head = out.get_mut(head_at..head_at.checked_add(4)?)?;
        if !matches!(head[0], kind::PACKET | kind::ETHERNET | kind::PIECE) || head[1] & flag::LEN == 0 {
            return None;
        }
        head[2..4].copy_from_slice(&bytes.to_be_bytes());
        Some(())
    }
}

/// Head of a piece of a packet (kind 3). All pieces of a packet carry its one stamp.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PieceHead {
    /// The whole is an Ethernet frame, not an IP packet.
    pub ethernet: bool,
    /// The whole packet's layer 4 checksum is partial.
    pub partial: bool,
    /// The whole packet continues the super-packet of the packet before it.
    pub group: bool,
    /// The whole packet's place in the order; its stamp is the key for reassembly.
    pub order: Order,
    /// Bytes of the whole packet, 1 to 65,535.
    pub total: u16,
    /// Where in the whole packet this piece begins, bytes.
    pub offset: u16,
    /// Tenant, when there are several.
    pub tenant: Option<u16>,
    /// Bytes of this piece behind the head; none means it reaches to the end of the datagram.
    pub bytes: Option<u16>,
}

impl PieceHead {
    /// Bytes this head takes: 12 to [`PIECE_HEAD_BYTES_MAX`].
    #[inline]
    pub const fn encoded_len(&self) -> usize {
        12 + if self.bytes.is_some() { 2 } else { 0 } + if self.tenant.is_some() { 2 } else { 0 }
    }

    /// Writes the head at `at` and returns where the piece begins; `None` when it does not fit.
    pub fn write(&self, out: &mut [u8], at: usize) -> Option<usize> {
        let end = at.checked_add(self.encoded_len())?;
        let mut put = Put::new(out.get_mut(at..end)?);
        let mut flags = flag::ORDER;
        flags |= if self.bytes.is_some() { flag::LEN } else { 0 };
        flags |= if self.order.same_path { flag::SAME_PATH } else { 0 };
        flags |= if self.partial { flag::PARTIAL } else { 0 };
        flags |= if self.group { flag::GROUP } else { 0 };
        flags |= if self.tenant.is_some() { flag::TENANT } else { 0 };
        flags |= if self.ethernet { flag::ETHERNET } else { 0 };
        put.u8(kind::PIECE)?;
        put.u8(flags)?;
        if let Some(bytes) = self.bytes {
            put.u16(bytes)?;
        }
        put.u32(self.order.stamp)?;
        put.u16(self.order.back)?;
        put.u16(self.total)?;
        put.u16(self.offset)?;
        if let Some(tenant) = self.tenant {
            put.u16(tenant)?;
        }
        Some(end)
    }
}

/// One inner frame. `start` is where the body begins in the plaintext, so that the caller can reach it
/// mutably: `plaintext[start..start + body.len()]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frame<'a> {
    /// A whole IP packet or Ethernet frame.
    Packet {
        /// Its head.
        head: PacketHead,
        /// Where the packet begins in the plaintext.
        start: usize,
        /// The packet, at least one byte.
        body: &'a [u8],
    },
    /// A piece of a packet; `offset + body.len() <= total` holds.
    Piece {
        /// Its head.
        head: PieceHead,
        /// Where the piece begins in the plaintext.
        start: usize,
        /// The piece, at least one byte.
        body: &'a [u8],
    },
    /// Arrivals, per path, from the core that gets this report.
    Report(Report<'a>),
    /// Counters missing on a lane.
    Nack(Nack<'a>),
    /// Asks the other side to prove that it is reachable on the path this came over.
    Challenge {
        /// Unpredictable; comes back in the response.
        token: [u8; 8],
        /// The path that is asked about.
        path: u8,
    },
    /// Answer to a challenge.
    Response {
        /// The challenge's token.
        token: [u8; 8],
    },
    /// Keepalive that wants a pong.
    Ping {
        /// Comes back in the pong.
        id: u32,
    },
    /// Answer to a ping.
    Pong {
        /// The ping's id.
        id: u32,
    },
    /// MTU probe (RFC 8899), padded to the size it tests.
    Probe {
        /// Comes back in the answer.
        id: u32,
        /// UDP payload of the probing datagram, bytes.
        size: u16,
    },
    /// The probe arrived.
    ProbeAck {
        /// The probe's id.
        id: u32,
        /// The probe's size, bytes.
        size: u16,
    },
    /// All stamps up to this one which were to go over this path have gone.
    Marker {
        /// Highest stamp given out so far.
        stamp: u32,
    },
    /// Send the flow's packets to this core from now on (rows T5 and T7).
    Assignment {
        /// The flow's hash under the sender's key.
        hash: u32,
        /// Core of the sender of this frame.
        core: u8,
    },
    /// New processor information (row T3), as the hello encodes it.
    ProcessorInfo(&'a [u8]),
    /// The session ends; nothing will follow.
    Close {
        /// Why.
        reason: CloseReason,
    },
    /// The sender's view of one of the bond's paths changed.
    PathState {
        /// The path.
        path: u8,
        /// Its new state.
        state: PeerPathState,
    },
    /// A frame of a kind from [`kind::EXTENSION`] on that this version does not know. Count and go on.
    Extension {
        /// The kind.
        kind: u8,
        /// Its bytes.
        body: &'a [u8],
    },
}

/// Reads the frame that begins at `at`. Returns it with the position of the next one, or `None` at the end
/// of the plaintext or at padding. After an error the rest of the datagram is lost: a frame's length is known
/// only to who understands it.
#[inline]
pub fn parse(plaintext: &[u8], at: usize) -> Result<Option<(Frame<'_>, usize)>, DropReason> {
    let rest = plaintext.get(at..).ok_or(DropReason::FrameMalformed)?;
    let mut get = Get { rest };
    match rest {
        [] | [kind::PADDING, ..] => Ok(None),
        [_] => Err(DropReason::FrameMalformed),
        [kind @ (kind::PACKET | kind::ETHERNET), flags, ..] => {
            get.skip_head();
            let head = packet_head(*kind, *flags, &mut get)?;
            let start = plaintext.len() - get.rest.len();
            let body = get.body(head.bytes)?;
            Ok(Some((Frame::Packet { head, start, body }, start + body.len())))
        }
        [kind::PIECE, flags, ..] => {
            get.skip_head();
            let head = piece_head(*flags, &mut get)?;
            let start = plaintext.len() - get.rest.len();
            let body = get.body(head.bytes)?;
            if usize::from(head.offset) + body.len() > usize::from(head.total) {
                return Err(DropReason::FrameMalformed);
            }
            Ok(Some((Frame::Piece { head, start, body }, start + body.len())))
        }
        [kind, flags, ..] => {
            get.skip_head();
            let frame = control::parse(*kind, *flags, &mut get)?;
            Ok(Some((frame, plaintext.len() - get.rest.len())))
        }
    }
}

/// Flags of kinds 1 and 2.
const PACKET_FLAGS: u8 =
    flag::LEN | flag::ORDER | flag::SAME_PATH | flag::PARTIAL | flag::GROUP | flag::TENANT;
/// Flags of kind 3.
const PIECE_FLAGS: u8 = PACKET_FLAGS | flag::ETHERNET;

#[inline]
fn packet_head(kind: u8, flags: u8, get: &mut Get<'_>) -> Result<PacketHead, DropReason> {
    if flags & !PACKET_FLAGS != 0 {
        // A bit we do not know could add fields: nothing behind it can be trusted.
        return Err(DropReason::FrameUnknown);
    }
    if flags & (flag::ORDER | flag::SAME_PATH) == flag::SAME_PATH {
        return Err(DropReason::FrameMalformed);
    }
    let bytes = if flags & flag::LEN != 0 { Some(get.u16()?) } else { None };
    let order = if flags & flag::ORDER != 0 { Some(get.order(flags)?) } else { None };
    let tenant = if flags & flag::TENANT != 0 { Some(get.u16()?) } else { None };
    Ok(PacketHead {
        ethernet: kind == kind::ETHERNET,
        partial: flags & flag::PARTIAL != 0,
        group: flags & flag::GROUP != 0,
        order,
        tenant,
        bytes,
    })
}

fn piece_head(flags: u8, get: &mut Get<'_>) -> Result<PieceHead, DropReason> {
    if flags & !PIECE_FLAGS != 0 {
        return Err(DropReason::FrameUnknown);
    }
    if flags & flag::ORDER == 0 {
        return Err(DropReason::FrameMalformed);
    }
    let bytes = if flags & flag::LEN != 0 { Some(get.u16()?) } else { None };
    let order = get.order(flags)?;
    let total = get.u16()?;
    let offset = get.u16()?;
    let tenant = if flags & flag::TENANT != 0 { Some(get.u16()?) } else { None };
    Ok(PieceHead {
        ethernet: flags & flag::ETHERNET != 0,
        partial: flags & flag::PARTIAL != 0,
        group: flags & flag::GROUP != 0,
        order,
        total,
        offset,
        tenant,
        bytes,
    })
}

/// The frames of a plaintext, in order. Ends at padding and after the first error.
#[derive(Clone, Debug)]
pub struct Frames<'a> {
    plaintext: &'a [u8],
    at: usize,
}

impl<'a> Frames<'a> {
    /// Frames of one datagram's plaintext.
    pub const fn new(plaintext: &'a [u8]) -> Self {
        Self { plaintext, at: 0 }
    }
}

impl<'a> Iterator for Frames<'a> {
    type Item = Result<Frame<'a>, DropReason>;

    fn next(&mut self) -> Option<Self::Item> {
        match parse(self.plaintext, self.at) {
            Ok(Some((frame, next))) => {
                self.at = next;
                Some(Ok(frame))
            }
            Ok(None) => {
                self.at = self.plaintext.len();
                None
            }
            Err(reason) => {
                self.at = self.plaintext.len();
                Some(Err(reason))
            }
        }
    }
}

/// Fills `out` from `at` to its end with padding and returns the end; `None` when `at` lies behind it.
pub fn write_padding(out: &mut [u8], at: usize) -> Option<usize> {
    out.get_mut(at..)?.fill(kind::PADDING);
    Some(out.len())
}

/// Cursor over the bytes of a frame; every read is checked.
pub(crate) struct Get<'a> {
    rest: &'a [u8],
}

impl<'a> Get<'a> {
    #[inline]
    fn skip_head(&mut self) {
        self.rest = self.rest.get(2..).unwrap_or_default();
    }

    #[inline]
    fn take(&mut self, bytes: usize) -> Result<&'a [u8], DropReason> {
        let (taken, rest) = self.rest.split_at_checked(bytes).ok_or(DropReason::FrameMalformed)?;
        self.rest = rest;
        Ok(taken)
    }

    #[inline]
    fn array<const N: usize>(&mut self) -> Result<[u8; N], DropReason> {
        let (taken, rest) = self.rest.split_first_chunk().ok_or(DropReason::FrameMalformed)?;
        self.rest = rest;
        Ok(*taken)
    }

    #[inline]
    fn u8(&mut self) -> Result<u8, DropReason> {
        Ok(u8::from_be_bytes(self.array()?))
    }

    #[inline]
    fn u16(&mut self) -> Result<u16, DropReason> {
        Ok(u16::from_be_bytes(self.array()?))
    }

    #[inline]
    fn u32(&mut self) -> Result<u32, DropReason> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    #[inline]
    fn u64(&mut self) -> Result<u64, DropReason> {
        Ok(u64::from_be_bytes(self.array()?))
    }

    #[inline]
    fn order(&mut self, flags: u8) -> Result<Order, DropReason> {
        Ok(Order { stamp: self.u32()?, back: self.u16()?, same_path: flags & flag::SAME_PATH != 0 })
    }

    /// The body: `bytes` long or all that is left, never empty.
    #[inline]
    fn body(&mut self, bytes: Option<u16>) -> Result<&'a [u8], DropReason> {
        let bytes = bytes.map_or(self.rest.len(), usize::from);
        if bytes == 0 {
            return Err(DropReason::FrameMalformed);
        }
        self.take(bytes)
    }
}

/// Cursor that writes; `None` when the room is used up.
pub(crate) struct Put<'a> {
    rest: &'a mut [u8],
}

impl<'a> Put<'a> {
    #[inline]
    pub(crate) fn new(rest: &'a mut [u8]) -> Self {
        Self { rest }
    }

    #[inline]
    fn bytes(&mut self, bytes: &[u8]) -> Option<()> {
        let rest = core::mem::take(&mut self.rest);
        let (head, tail) = rest.split_at_mut_checked(bytes.len())?;
        head.copy_from_slice(bytes);
        self.rest = tail;
        Some(())
    }

    #[inline]
    fn u8(&mut self, value: u8) -> Option<()> {
        self.bytes(&[value])
    }

    #[inline]
    fn u16(&mut self, value: u16) -> Option<()> {
        self.bytes(&value.to_be_bytes())
    }

    #[inline]
    fn u32(&mut self, value: u32) -> Option<()> {
        self.bytes(&value.to_be_bytes())
    }

    #[inline]
    fn u64(&mut self, value: u64) -> Option<()> {
        self.bytes(&value.to_be_bytes())
    }
}
