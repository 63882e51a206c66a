//! Real-time media, found by its shape (row R15): RTP and RTCP (RFC 3550), STUN (RFC 8489), and small datagrams at a steady pace, as
//! games, voice and remote control send them.
//!
//! Names nothing and reads no content: version bits, a sequence number that counts up under one source, a cookie, sizes and gaps.

/// STUN's magic cookie, behind type and length.
const STUN_COOKIE: [u8; 4] = [0x21, 0x12, 0xa4, 0x42];
/// RTP's fixed header.
const RTP_BYTES: usize = 12;
/// RTCP packet types, where RTP has marker bit and payload type (RFC 5761 §4).
const RTCP_TYPES: std::ops::RangeInclusive<u8> = 192..=223;
/// A sequence number may jump so far: packets are lost before us, too.
const SEQUENCE_JUMP_MAX: u16 = 8;
/// Largest UDP payload of a steady flow …
const STEADY_BYTES_MAX: usize = 400;
/// … and its gaps, ms: 10 to 250 datagrams a second.
const STEADY_GAP_MS: std::ops::RangeInclusive<u16> = 4..=100;
/// Points that make a flow real-time media …
const ENOUGH: u8 = 32;
/// … and the most it collects, so that it is soon something else when its shape is gone.
const MOST: u8 = 64;
/// A datagram of RTP's shape is worth so much: five of them are enough …
const RTP_POINTS: u8 = 7;
/// … a binding request says it of the flow before any media flows …
const STUN_POINTS: u8 = 16;
/// … a small one at a steady pace so much: 16 of them …
const STEADY_POINTS: u8 = 2;
/// … and one of no such shape takes so much.
const UNLIKE_POINTS: u8 = 8;

/// Look of a flow's datagrams so far.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Shape {
    source: u32,
    sequence: u16,
    points: u8,
    is_media: bool,
}

impl Shape {
    /// Of a flow that sent nothing yet.
    pub const NEW: Self = Self { source: 0, sequence: 0, points: 0, is_media: false };

    /// Looks at a datagram, `gap_ms` after its predecessor. Whether the flow is real-time media now.
    pub fn look(&mut self, payload: &[u8], gap_ms: u16) -> bool {
        let points = self.points_of(payload, gap_ms);
        self.points = match points {
            0 => self.points.saturating_sub(UNLIKE_POINTS),
            _ => (self.points + points).min(MOST),
        };
        // What was media stays so until nothing speaks for it any more.
        self.is_media = self.points >= ENOUGH || (self.is_media && self.points > 0);
        self.is_media
    }

    fn points_of(&mut self, payload: &[u8], gap_ms: u16) -> u8 {
        let steady = payload.len() <= STEADY_BYTES_MAX && STEADY_GAP_MS.contains(&gap_ms);
        let least = if steady { STEADY_POINTS } else { 0 };
        match payload {
            [0..=3, _, _, _, cookie @ ..] if cookie.starts_with(&STUN_COOKIE) => STUN_POINTS,
            [0x80..=0xbf, kind, ..] if payload.len() >= 8 && RTCP_TYPES.contains(kind) => RTP_POINTS,
            [0x80..=0xbf, _, a, b, _, _, _, _, s0, s1, s2, s3, ..] if payload.len() >= RTP_BYTES => {
                let (sequence, source) =
                    (u16::from_be_bytes([*a, *b]), u32::from_be_bytes([*s0, *s1, *s2, *s3]));
                let ahead = sequence.wrapping_sub(self.sequence);
                let follows = source == self.source && (1..=SEQUENCE_JUMP_MAX).contains(&ahead);
                (self.source, self.sequence) = (source, sequence);
                if follows { RTP_POINTS } else { least }
            }
            _ => least,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rtp(sequence: u16, bytes: usize) -> Vec<u8> {
        let mut packet = vec![0x80, 96];
        packet.extend(sequence.to_be_bytes());
        packet.extend([0, 0, 0, 7, 0xde, 0xad, 0xbe, 0xef]);
        packet.resize(bytes, 0x55);
        packet
    }

    #[test]
    fn six_packets_of_rtp_are_media_whatever_their_size_and_pace() {
        let mut shape = Shape::default();
        let found: Vec<bool> =
            (0..7).map(|n| shape.look(&rtp(65_533u16.wrapping_add(n), 1_200), 0)).collect();
        assert_eq!(found, [false, false, false, false, false, true, true]);
        // Not those whose number stands still, or of which each has another source.
        let mut still = Shape::default();
        assert!((0..50).all(|_| !still.look(&rtp(9, 1_200), 0)));
    }

    #[test]
    fn small_datagrams_at_a_steady_pace_are_media_and_transfers_are_not() {
        let mut game = Shape::default();
        let found = (0..20).map(|_| game.look(&[7; 120], 16)).position(|media| media);
        assert_eq!(found, Some(15));
        let mut transfer = Shape::default();
        assert!((0..1_000).all(|n| !transfer.look(&[0x40; 1_200], u16::from(n % 20 == 0) * 20)));
        // Small ones in bursts neither, nor small ones among large ones.
        let mut burst = Shape::default();
        assert!((0..1_000).all(|_| !burst.look(&[7; 120], 0)));
        let mut mixed = Shape::default();
        assert!((0..1_000).all(|n| !mixed.look(&vec![7; if n % 2 == 0 { 100 } else { 1_200 }], 10)));
    }

    #[test]
    fn stun_prepares_for_media_and_media_ends_with_its_shape() {
        let binding = [&[0, 1, 0, 0][..], &STUN_COOKIE, &[0; 12]].concat();
        let mut shape = Shape::default();
        assert!(!shape.look(&binding, 0));
        assert!(shape.look(&binding, 0));
        let ended = (0..20).map(|_| shape.look(&[0x40; 1_200], 0)).position(|media| !media);
        assert_eq!(ended, Some(3));
    }
}
