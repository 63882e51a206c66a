#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;

pub(crate) fn bytes(hex: &str) -> Vec<u8> {
    (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
}

const CLIENT: &str = "8394c8f03e515708";
const SERVER: &str = "f067a5502a4262b5";

/// The packets of RFC 9001 appendix A and RFC 9369 appendix A, as far as they are clear.
#[test]
fn packets_of_the_standards() {
    for (packet, kind, destination, source) in [
        ("c000000001088394c8f03e5157080000449e7b9aec34", Kind::Initial, CLIENT, ""),
        ("cf000000010008f067a5502a4262b5004075c0d95a482cd0", Kind::Initial, "", SERVER),
        ("ff000000010008f067a5502a4262b5746f6b656e04a265ba2eff4d829058fb3f0f2496ba", Kind::Retry, "", SERVER),
        ("d36b3343cf088394c8f03e5157080000449e00000002", Kind::Initial, CLIENT, ""),
        ("cf6b3343cf0008f067a5502a4262b5746f6b656e", Kind::Retry, "", SERVER),
        ("e00000000104aabbccdd0101", Kind::Handshake, "aabbccdd", "01"),
        ("f06b3343cf04aabbccdd0101", Kind::Handshake, "aabbccdd", "01"),
        ("d00000000104aabbccdd0101", Kind::ZeroRtt, "aabbccdd", "01"),
        ("e06b3343cf04aabbccdd0101", Kind::ZeroRtt, "aabbccdd", "01"),
        ("800000000004aabbccdd010100000001", Kind::VersionNegotiation, "aabbccdd", "01"),
        ("c01a2a3a4a04aabbccdd0101", Kind::Unknown, "aabbccdd", "01"),
    ] {
        let datagram = bytes(packet);
        let Some(Packet::Long(header)) = Packet::parse(&datagram) else { panic!("{packet}") };
        assert_eq!(header.kind, kind, "{packet}");
        assert_eq!(
            (header.destination, header.source),
            (&bytes(destination)[..], &bytes(source)[..]),
            "{packet}"
        );
        assert_eq!(header.rest, &datagram[7 + header.destination.len() + header.source.len()..]);
    }
    let short = bytes("4cfe4189655e5cd55c41f69080575d7999c25a5bfb");
    assert_eq!(Packet::parse(&short), Some(Packet::Short(&short[1..])));
}

#[test]
fn what_is_cut_or_too_long_is_none() {
    let whole = bytes("c000000001088394c8f03e51570804aabbccdd");
    assert!(Packet::parse(&whole).is_some());
    for length in 0..whole.len() {
        assert_eq!(Packet::parse(&whole[..length]), None, "{length}");
    }
    // 20 bytes at most where the version is known, 255 where it is not (RFC 8999 §5.1).
    let with = |version: u32, id: usize| {
        [&[0xc0][..], &version.to_be_bytes(), &[id as u8], &vec![7; id], &[0]].concat()
    };
    assert!(Packet::parse(&with(1, 20)).is_some());
    assert_eq!(Packet::parse(&with(1, 21)), None);
    assert!(Packet::parse(&with(0x1a2a_3a4a, 255)).is_some());
}
