#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::quic::tests::bytes;
use crate::tls::{self, Answer};

/// CRYPTO frame of RFC 9001 §A.2 and RFC 9369 §A.2: a ClientHello for example.com.
pub(crate) const FRAMES: &str = "060040f1010000ed0303ebf8fa56f12939b9584a3896472ec40bb863cfd3e86804fe3a47f06a2b69484c\
    00000413011302010000c000000010000e00000b6578616d706c652e636f6dff01000100000a00080006001d0017001800100007000504616c\
    706e000500050100000000003300260024001d00209370b2c9caa47fbabaf4559fedba753de171fa71f50f1ce15d43e994ec74d748002b0003\
    020304000d0010000e0403050306030203080408050806002d00020101001c00024001003900320408ffffffffffffffff05048000ffff0704\
    8000ffff0801100104800075300901100f088394c8f03e51570806048000ffff";

/// Header, and of the sealed packet its header, its sample and its tag.
const STANDARDS: [[&str; 4]; 2] = [
    [
        "c300000001088394c8f03e5157080000449e00000002",
        "c000000001088394c8f03e5157080000449e7b9aec34",
        "d1b1c98dd7689fb8ec11d242b123dc9b",
        "e221af44860018ab0856972e194cd934",
    ],
    [
        "d36b3343cf088394c8f03e5157080000449e00000002",
        "d76b3343cf088394c8f03e5157080000449ea0c95e82",
        "ffe67b6abcdb4298b485dd04de806071",
        "a18b2faa745b6fe189cf772a9f84cbfc",
    ],
];

/// An Initial with this header, which ends with the packet number.
pub(crate) fn sealed(clear: &[u8], frames: &[u8]) -> Vec<u8> {
    let length = frames.len() + 16;
    let dummy = [clear, &vec![0; length]].concat();
    let keys = InitialKeys::of_client(&Initial::first(&dummy).unwrap().0).unwrap();
    keys.seal(clear, frames).unwrap()
}

#[test]
fn initials_of_the_standards() {
    for [clear, header, sample, tag] in STANDARDS {
        let mut frames = bytes(FRAMES);
        frames.resize(1_162, 0);
        let datagram = sealed(&bytes(clear), &frames);
        assert_eq!(datagram.len(), 1_200);
        assert_eq!(datagram[..38], [bytes(header), bytes(sample)].concat());
        assert_eq!(datagram[1_184..], bytes(tag));
        assert!(may_be(&datagram));
        let (packet, behind) = Initial::first(&datagram).unwrap();
        assert!(behind.is_empty());
        let opened = InitialKeys::of_client(&packet).unwrap().open(&packet).unwrap();
        assert_eq!(opened, frames);
        let crypto: Vec<_> = crypto_frames(&opened).collect();
        assert_eq!(crypto, [(0, &frames[4..245])]);
        let Answer::Name(name) = tls::of_handshake(crypto[0].1) else { panic!("no name") };
        assert_eq!(&*name, "example.com");
        // Not one bit of it may be changed.
        for at in [0, 5, 20, 100, 1_199] {
            let mut changed = datagram.clone();
            changed[at] ^= 1;
            let opened = Initial::first(&changed)
                .and_then(|(packet, _)| InitialKeys::of_client(&packet)?.open(&packet));
            assert_eq!(opened, None, "{at}");
        }
    }
}

#[test]
fn frames_are_told_apart() {
    // PADDING, PING, an ACK with two ranges and counts, CRYPTO at 1,000, CONNECTION_CLOSE, CRYPTO.
    let ack = "03050a020001020304010203";
    let frames = bytes(&format!("000001{ack}0643e803aabbcc1c06000101"));
    assert_eq!(crypto_frames(&frames).collect::<Vec<_>>(), [(1_000, &[0xaa, 0xbb, 0xcc][..])]);
    for malformed in ["0600", "060005aa", "02050a7fff", "02050ac000000000000000", "06c000000000000000ff"] {
        assert_eq!(crypto_frames(&bytes(malformed)).count(), 0, "{malformed}");
    }
}

#[test]
fn what_is_no_initial_of_a_client_has_no_keys() {
    let clear = bytes(STANDARDS[0][0]);
    let datagram = sealed(&clear, &[0; 1_162]);
    for length in 0..datagram.len() {
        assert_eq!(Initial::first(&datagram[..length]), None, "{length}");
    }
    // A server's to a client without an id: RFC 9001 §A.3.
    let mut server = bytes("cf000000010008f067a5502a4262b5004075c0d95a482cd0991cd25b0aac406a");
    server.resize(140, 7);
    assert!(!may_be(&server));
    let (packet, _) = Initial::first(&server).unwrap();
    assert!(InitialKeys::of_client(&packet).is_none());
}
