#![allow(clippy::unwrap_used, reason = "tests")]
use super::*;
use crate::header::{Kind, NOT_TOLD};
use proptest::prelude::*;
use ring::hmac;

fn hex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}

const BOTH: [Aead; 2] = [Aead::Aes256Gcm, Aead::ChaCha20Poly1305];

fn header(counter: u64) -> Header {
    Header {
        kind: Kind::Data,
        receiving_core: 2,
        sending_core: 1,
        path: 3,
        receiver_index: 0xdead_beef,
        counter,
    }
}

/// Key and nonce as given, no lane: what the cipher itself computes.
fn raw_seal(aead: Aead, key: &str, nonce: &str, aad: &str, plaintext: &str) -> (Vec<u8>, Vec<u8>) {
    let mut material = [0; 44];
    material[..32].copy_from_slice(&hex(key));
    material[32..].copy_from_slice(&hex(nonce));
    let lane = LaneKey::from_parts(&material, aead);
    let mut text = hex(plaintext);
    // With path, core and counter 0 the nonce is the IV itself.
    let header = Header { path: 0, receiving_core: 0, counter: 0, ..header(0) };
    assert_eq!(lane.nonce_bytes(&header)[..], material[32..]);
    let tag = lane
        .key
        .seal_in_place_separate_tag(lane.nonce(&header), aead::Aad::from(hex(aad)), &mut text)
        .unwrap();
    (text, tag.as_ref().to_vec())
}

#[test]
fn chacha20_poly1305_of_rfc_8439() {
    // Section 2.8.2.
    let plaintext: String =
        b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the \
                              future, sunscreen would be it."
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
    let (sealed, tag) = raw_seal(
        Aead::ChaCha20Poly1305,
        "808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9f",
        "070000004041424344454647",
        "50515253c0c1c2c3c4c5c6c7",
        &plaintext,
    );
    assert_eq!(sealed[..16], hex("d31a8d34648e60db7b86afbc53ef7ec2"));
    assert_eq!(tag, hex("1ae10b594f09e26a7e902ecbd0600691"));
}

#[test]
fn aes_256_gcm_of_the_gcm_specification() {
    // Test case 16 of the specification submitted to NIST.
    let (sealed, tag) = raw_seal(
        Aead::Aes256Gcm,
        "feffe9928665731c6d6a8f9467308308feffe9928665731c6d6a8f9467308308",
        "cafebabefacedbaddecaf888",
        "feedfacedeadbeeffeedfacedeadbeefabaddad2",
        "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a721c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b39",
    );
    assert_eq!(
        sealed,
        hex(
            "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662"
        )
    );
    assert_eq!(tag, hex("76fc6ece0f4e1768cddf8853bb2d551b"));
}

/// The example of QUIC multipath (IV, path 3, packet 54321), with our narrower path field.
#[test]
fn nonce_is_iv_xor_path_core_counter() {
    let mut material = [0; 44];
    material[32..].copy_from_slice(&hex("6b26114b9cba2b63a9e8dd4f"));
    let lane = LaneKey::from_parts(&material, Aead::Aes256Gcm);
    let at = |path, receiving_core, counter| {
        lane.nonce_bytes(&Header { path, receiving_core, counter, ..header(0) }).to_vec()
    };
    assert_eq!(at(3, 0, 54_321), hex("6b25114b9cba2b63a9e8097e"));
    assert_eq!(at(3, 5, 54_321), hex("6b25114e9cba2b63a9e8097e"));
    assert_eq!(at(255, NOT_TOLD, u64::MAX), hex("6bd911b46345d49c561722b0"));
}

proptest! {
    /// Within a key, different lanes or counters never share a nonce.
    #[test]
    fn nonces_are_distinct(one: (u8, u8, u64), two: (u8, u8, u64), near: bool) {
        let two = if near { (one.0, two.1, one.2) } else { two };
        let lane = LaneKey::derive(&[1; 32], 0, Aead::ChaCha20Poly1305);
        let nonce = |(path, receiving_core, counter)| {
            lane.nonce_bytes(&Header { path, receiving_core, counter, ..header(0) })
        };
        prop_assert_eq!(nonce(one) == nonce(two), one == two);
    }

    #[test]
    fn round_trip(key: [u8; 32], core: u8, counter: u64, plaintext in proptest::collection::vec(any::<u8>(), 0..2000)) {
        for aead in BOTH {
            let lane = LaneKey::derive(&key, core, aead);
            let header = Header { sending_core: core, ..header(counter) };
            let mut datagram = vec![0; SEALED_OVERHEAD_BYTES + plaintext.len()];
            header.write(&mut datagram);
            datagram[HEADER_BYTES..][..plaintext.len()].copy_from_slice(&plaintext);
            lane.seal(&header, &mut datagram);
            if plaintext.len() >= 16 {
                prop_assert_ne!(&datagram[HEADER_BYTES..][..plaintext.len()], &plaintext[..]);
            }
            let parsed = Header::parse(&datagram).unwrap();
            prop_assert_eq!(parsed, header);
            prop_assert_eq!(&*lane.open(&parsed, &mut datagram).unwrap(), &plaintext[..]);
        }
    }

    #[test]
    fn partial_round_trip(key: [u8; 32], counter: u64, clear in 0u16..200, sealed in 0usize..200, fill: u8) {
        for aead in BOTH {
            let lane = LaneKey::derive(&key, 1, aead);
            let header = Header { kind: Kind::Partial, ..header(counter) };
            let datagram = seal_partial(&lane, &header, clear, sealed, fill);
            let front = HEADER_BYTES + CLEAR_LENGTH_BYTES;
            // The clear part can be read by anybody.
            let shown = &datagram[front..front + usize::from(clear)];
            prop_assert!(shown.iter().all(|byte| *byte == fill));
            let mut copy = datagram.clone();
            let opened = lane.open_partial(&Header::parse(&datagram).unwrap(), &mut copy).unwrap();
            prop_assert_eq!(opened.len(), usize::from(clear) + sealed);
            prop_assert!(opened.iter().all(|byte| *byte == fill));
        }
    }

    #[test]
    fn garbage_never_opens(mut garbage in proptest::collection::vec(any::<u8>(), 0..200)) {
        for aead in BOTH {
            let lane = LaneKey::derive(&[5; 32], 0, aead);
            prop_assert!(lane.open(&header(0), &mut garbage.clone()).is_err());
            prop_assert!(lane.open_partial(&header(0), &mut garbage).is_err());
        }
    }
}

fn seal_partial(lane: &LaneKey, header: &Header, clear: u16, sealed: usize, fill: u8) -> Vec<u8> {
    let plaintext = usize::from(clear) + sealed;
    let mut datagram = vec![fill; HEADER_BYTES + CLEAR_LENGTH_BYTES + plaintext + TAG_BYTES];
    lane.seal_partial(header, clear, &mut datagram);
    datagram
}

fn sealed(lane: &LaneKey, header: &Header, plaintext: &[u8]) -> Vec<u8> {
    let mut datagram = vec![0; SEALED_OVERHEAD_BYTES + plaintext.len()];
    datagram[HEADER_BYTES..][..plaintext.len()].copy_from_slice(plaintext);
    lane.seal(header, &mut datagram);
    datagram
}

/// Every bit of a datagram, header included, is authenticated.
#[test]
fn each_flipped_bit_is_noticed() {
    for aead in BOTH {
        let lane = LaneKey::derive(&[7; 32], 1, aead);
        let datagram = sealed(&lane, &header(99), b"forty-two bytes of plaintext would do as well");
        for bit in 0..datagram.len() * 8 {
            let mut copy = datagram.clone();
            copy[bit / 8] ^= 1 << (bit % 8);
            // Version or kind may already be refused; everything else must fail to authenticate, with the fields
            // as changed and with the fields as they were.
            if let Ok(changed) = Header::parse(&copy) {
                let result = lane.open(&changed, &mut copy.clone()).err();
                assert_eq!(result, Some(DropReason::AuthFailed), "{aead:?} bit {bit}");
            }
            let result = lane.open(&header(99), &mut copy).err();
            assert_eq!(result, Some(DropReason::AuthFailed), "{aead:?} bit {bit}, known header");
        }
    }
}

#[test]
fn each_flipped_bit_of_a_partial_datagram_is_noticed() {
    for aead in BOTH {
        let lane = LaneKey::derive(&[7; 32], 1, aead);
        let header = Header { kind: Kind::Partial, ..header(5) };
        let datagram = seal_partial(&lane, &header, 20, 30, 0x5a);
        for bit in 0..datagram.len() * 8 {
            let mut copy = datagram.clone();
            copy[bit / 8] ^= 1 << (bit % 8);
            if let Ok(changed) = Header::parse(&copy) {
                assert!(lane.open_partial(&changed, &mut copy).is_err(), "{aead:?} bit {bit}");
            }
        }
    }
}

#[test]
fn truncation_is_noticed() {
    let lane = LaneKey::derive(&[7; 32], 1, Aead::best());
    let datagram = sealed(&lane, &header(1), &[9; 64]);
    for length in 0..datagram.len() {
        let expected =
            if length < SEALED_OVERHEAD_BYTES { DropReason::TooShort } else { DropReason::AuthFailed };
        let result = lane.open(&header(1), &mut datagram[..length].to_vec()).err();
        assert_eq!(result, Some(expected), "{length} bytes");
    }
}

#[test]
fn other_cores_directions_and_ciphers_do_not_open() {
    let lane = LaneKey::derive(&[7; 32], 1, Aead::Aes256Gcm);
    let datagram = sealed(&lane, &header(1), &[9; 64]);
    for other in [
        LaneKey::derive(&[7; 32], 2, Aead::Aes256Gcm),
        LaneKey::derive(&[8; 32], 1, Aead::Aes256Gcm),
        LaneKey::derive(&[7; 32], 1, Aead::ChaCha20Poly1305),
    ] {
        assert_eq!(other.open(&header(1), &mut datagram.clone()).err(), Some(DropReason::AuthFailed));
    }
}

/// RFC 5869 by hand, with HMAC only.
#[test]
fn lane_keys_are_hkdf_sha256() {
    let direction = [0x42; 32];
    let sign = |key: &[u8], data: &[u8]| hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), data);
    let extracted = sign(&[0; 32], &direction);
    let first = sign(extracted.as_ref(), b"anabranch lane\x09\x01");
    let second = sign(extracted.as_ref(), &[first.as_ref(), b"anabranch lane\x09\x02"].concat());
    let mut material = [0; 44];
    material[..32].copy_from_slice(first.as_ref());
    material[32..].copy_from_slice(&second.as_ref()[..12]);
    for aead in BOTH {
        let by_hand = LaneKey::from_parts(&material, aead);
        let derived = LaneKey::derive(&direction, 9, aead);
        assert_eq!(derived.iv, by_hand.iv);
        assert_eq!(sealed(&derived, &header(3), b"same"), sealed(&by_hand, &header(3), b"same"));
    }
}

#[test]
fn both_sides_agree_on_a_cipher() {
    let (aes, chacha) = (Aead::Aes256Gcm.bit(), Aead::ChaCha20Poly1305.bit());
    assert_eq!(Aead::agree(aes | chacha, aes | chacha), Some(Aead::Aes256Gcm));
    assert_eq!(Aead::agree(aes | chacha, chacha), Some(Aead::ChaCha20Poly1305));
    assert_eq!(Aead::agree(chacha, aes | chacha | 0x80), Some(Aead::ChaCha20Poly1305));
    assert_eq!(Aead::agree(aes, chacha), None);
    assert_eq!(Aead::agree(0, 0xff), None);
    assert!(Aead::agree(Aead::offered(), chacha).is_some());
}

#[test]
fn a_buffer_without_room_is_not_sent_in_clear() {
    let lane = LaneKey::derive(&[7; 32], 1, Aead::best());
    let mut datagram = [0x77; SEALED_OVERHEAD_BYTES - 1];
    lane.seal(&header(1), &mut datagram);
    assert!(datagram.iter().all(|byte| *byte == 0));
}
