//! Datagrams in a stream of bytes: each behind its length, two bytes, big endian.
//!
//! `docs/wire.md` §5 has the format with an example that a test here holds.

use std::io;

/// Bytes in front of a datagram.
pub const LENGTH_BYTES: usize = 2;

/// Longest datagram, bytes: a path's largest.
pub const DATAGRAM_BYTES_MAX: usize = 9_216;

/// Appends a datagram to the bytes that go out; one that is empty or too long is left out, which the tunnel takes for a loss.
pub fn frame(datagram: &[u8], out: &mut Vec<u8>) {
    if let Ok(length) = u16::try_from(datagram.len())
        && (1..=DATAGRAM_BYTES_MAX).contains(&datagram.len())
    {
        out.extend_from_slice(&length.to_be_bytes());
        out.extend_from_slice(datagram);
    }
}

/// Finds the datagrams in what comes in, in whatever pieces.
#[derive(Debug, Default)]
pub struct Deframer {
    /// The beginning of a datagram whose end has not come: less than one.
    pending: Vec<u8>,
}

impl Deframer {
    /// Takes bytes and hands on the datagrams that they complete.
    ///
    /// # Errors
    /// `InvalidData`: a length of 0 or above [`DATAGRAM_BYTES_MAX`]; the other side does not speak this.
    pub fn receive(&mut self, bytes: &[u8], mut take: impl FnMut(&[u8])) -> io::Result<()> {
        self.pending.extend_from_slice(bytes);
        let mut at = 0;
        while let Some(head) = self.pending.get(at..at + LENGTH_BYTES) {
            let length = head.iter().fold(0, |length, byte| length << 8 | usize::from(*byte));
            if !(1..=DATAGRAM_BYTES_MAX).contains(&length) {
                let text = format!("a datagram of {length} bytes");
                return Err(io::Error::new(io::ErrorKind::InvalidData, text));
            }
            let start = at + LENGTH_BYTES;
            let Some(datagram) = self.pending.get(start..start + length) else { break };
            take(datagram);
            at = start + length;
        }
        self.pending.drain(..at);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_example_of_the_wire_page() {
        let mut out = Vec::new();
        frame(&[0x14, 0xff, 0x00], &mut out);
        frame(&[0xab; 0x102], &mut out);
        assert_eq!(&out[..9], [0x00, 0x03, 0x14, 0xff, 0x00, 0x01, 0x02, 0xab, 0xab]);
    }

    #[test]
    fn lengths_that_cannot_be_are_refused() {
        for head in [[0, 0], [0x24, 0x01]] {
            let refused = Deframer::default().receive(&head, |_| panic!("no datagram"));
            assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
        let mut out = Vec::new();
        frame(&[], &mut out);
        frame(&vec![0; DATAGRAM_BYTES_MAX + 1], &mut out);
        assert!(out.is_empty());
    }

    proptest! {
        #[test]
        fn datagrams_arrive_in_whatever_pieces_they_come(
            datagrams in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..200), 0..20),
            piece in 1..50_usize,
        ) {
            let mut stream = Vec::new();
            datagrams.iter().for_each(|datagram| frame(datagram, &mut stream));
            let (mut deframer, mut came) = (Deframer::default(), Vec::new());
            for piece in stream.chunks(piece) {
                deframer.receive(piece, |datagram| came.push(datagram.to_vec())).unwrap();
                prop_assert!(deframer.pending.len() <= LENGTH_BYTES + DATAGRAM_BYTES_MAX);
            }
            prop_assert_eq!(came, datagrams);
        }
    }
}
