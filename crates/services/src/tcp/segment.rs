//! The part of a TCP header that connection tracking reads (RFC 9293 §3.1).

use crate::rewrite::bytes::{array_at, u16_at, u32_at};

/// Flag: no more data from the sender.
pub const FIN: u8 = 0x01;
/// Flag: synchronize sequence numbers.
pub const SYN: u8 = 0x02;
/// Flag: reset the connection.
pub const RST: u8 = 0x04;
/// Flag: push.
pub const PSH: u8 = 0x08;
/// Flag: the acknowledgment number means something.
pub const ACK: u8 = 0x10;
/// Flag: the urgent pointer means something.
pub const URG: u8 = 0x20;

/// No window scale was offered.
pub const NO_SCALE: u8 = 15;
/// Largest window scale (RFC 7323 §2.3): what offers more means this.
pub const SCALE_MAX: u8 = 14;

const HEADER_BYTES: usize = 20;
const OPTION_END: u8 = 0;
const OPTION_NOP: u8 = 1;
const OPTION_SCALE: u8 = 3;
const OPTION_SACK_PERMITTED: u8 = 4;

/// Fields of a segment, in host byte order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Sequence number of its first byte, or of its SYN.
    pub seq: u32,
    /// Acknowledgment number; means nothing without [`ACK`].
    pub ack: u32,
    /// Bytes of payload, up to 65,535: a super-packet is one long segment.
    pub payload_bytes: u32,
    /// Window as on the wire, not scaled.
    pub window: u16,
    /// [`FIN`], [`SYN`], [`RST`], [`PSH`], [`ACK`], [`URG`]; no others.
    pub flags: u8,
    /// Window scale that a SYN offers, 0–14, or [`NO_SCALE`].
    pub scale: u8,
    /// A SYN offers selective acknowledgments.
    pub sack_permitted: bool,
}

impl Segment {
    /// Reads a segment. `tcp`: starts with the TCP header and has all of it; `payload_bytes`: what follows the header
    /// and its options.
    ///
    /// `None`: a header that is cut or whose data offset is wrong, or flags that no TCP sends: none of SYN, RST and ACK,
    /// two of SYN, FIN and RST, FIN or URG without ACK but for SYN with URG (RFC 9293 §3.10; the same set as Linux).
    #[inline]
    #[must_use]
    pub fn parse(tcp: &[u8], payload_bytes: u32) -> Option<Segment> {
        let fixed = tcp.first_chunk::<HEADER_BYTES>()?;
        let header_bytes = usize::from(fixed[12] >> 4) * 4;
        let flags = fixed[13] & (FIN | SYN | RST | PSH | ACK | URG);
        if header_bytes < HEADER_BYTES || header_bytes > tcp.len() || !possible(flags) {
            return None;
        }
        let mut segment = Segment {
            seq: u32_at(fixed, 4)?,
            ack: u32_at(fixed, 8)?,
            payload_bytes,
            window: u16_at(fixed, 14)?,
            flags,
            scale: NO_SCALE,
            sack_permitted: false,
        };
        if flags & SYN != 0 {
            segment.options(tcp.get(HEADER_BYTES..header_bytes)?);
        }
        Some(segment)
    }

    /// [`Segment::parse`] of a whole upper layer: the payload is what follows the header.
    #[inline]
    #[must_use]
    pub fn of(upper: &[u8]) -> Option<Segment> {
        let header_bytes = usize::from(upper.get(12)? >> 4) * 4;
        Self::parse(upper, upper.len().checked_sub(header_bytes)? as u32)
    }

    /// Any of these flags is set.
    #[inline]
    #[must_use]
    pub const fn has(&self, flags: u8) -> bool {
        self.flags & flags != 0
    }

    /// Length in the sequence space: payload, SYN and FIN.
    #[inline]
    #[must_use]
    pub const fn length(&self) -> u32 {
        self.payload_bytes.saturating_add(self.has(SYN) as u32 + self.has(FIN) as u32)
    }

    /// The sequence number behind it.
    #[inline]
    #[must_use]
    pub const fn end(&self) -> u32 {
        self.seq.wrapping_add(self.length())
    }

    /// Options of a SYN; what cannot be read ends them.
    fn options(&mut self, options: &[u8]) {
        let mut at = 0;
        while let Some(kind) = options.get(at) {
            if *kind == OPTION_NOP {
                at += 1;
                continue;
            }
            let Some([_, length]) = array_at(options, at) else { return };
            if *kind == OPTION_END || length < 2 || at + usize::from(length) > options.len() {
                return;
            }
            match (*kind, length) {
                (OPTION_SCALE, 3) => {
                    self.scale = options.get(at + 2).map_or(NO_SCALE, |scale| (*scale).min(SCALE_MAX));
                }
                (OPTION_SACK_PERMITTED, 2) => self.sack_permitted = true,
                _ => {}
            }
            at += usize::from(length);
        }
    }
}

#[inline]
const fn possible(flags: u8) -> bool {
    const SYN_URG: u8 = SYN | URG;
    const SYN_ACK: u8 = SYN | ACK;
    const RST_ACK: u8 = RST | ACK;
    const FIN_ACK: u8 = FIN | ACK;
    const FIN_ACK_URG: u8 = FIN | ACK | URG;
    const ACK_URG: u8 = ACK | URG;
    matches!(flags & !PSH, SYN | SYN_URG | SYN_ACK | RST | RST_ACK | FIN_ACK | FIN_ACK_URG | ACK | ACK_URG)
}
