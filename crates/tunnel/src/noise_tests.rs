#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::handshake::NOISE_PROTOCOL;

fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> =
        text.bytes().filter_map(|digit| char::from(digit).to_digit(16)).map(|digit| digit as u8).collect();
    digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
}

fn key(text: &str) -> [u8; 32] {
    hex(text).try_into().unwrap()
}

/// The official vector of `Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s` (cacophony's collection): what each side says, in turns.
const VECTOR: [(&[u8], &str); 6] = [
    (
        b"Ludwig von Mises",
        "ca35def5ae56cec33dc2036731ab14896bc4c75dbb07a61f879f8e3afa4c7944001e21de9f98ddd8e2ad57527207feb5
         6253c9c94a9e496782ecfcb2a75fbcaf1b52948cc48daefe660c62119ab5000980c84831215f2441eba616548e832985
         464cf17e51ee93109008399a21f7e13f",
    ),
    (
        b"Murray Rothbard",
        "95ebc60d2b1fa672c1f46a8aa265ef51bfe38e7ccb39ec5be34069f144808843cb765f2caef0751b8f007572dab03222
         17755c0632f365717edbf34d33e87a",
    ),
    (b"F. A. Hayek", "8153ca9833bc3c1b91a7e66e5f4d4f5b59bf9e64c2f20d15f0bba7"),
    (b"Carl Menger", "07af0c9c86e1b4e80f36b04ff7688d51141af3debd0332f0a705ef"),
    (b"Jean-Baptiste Say", "6ab1467c0448cc78394494abaaf23afce0e234315d6e2624dcbfa8a21c1c4d073d"),
    (
        b"Eugen B\xf6hm von Bawerk",
        "dfc346c0d2296ae6cf1acf6f12b8456a1dba228cf8d8b774aacf1c47fc53aa80ebc7a4c292",
    ),
];

fn builder() -> snow::Builder<'static> {
    snow::Builder::with_resolver(NOISE_PROTOCOL.parse().unwrap(), Box::new(Primitives))
        .prologue(b"John Galt")
        .unwrap()
        .psk(2, b"This is my Austrian perspective!")
        .unwrap()
}

#[test]
fn the_official_vector_of_the_pattern() {
    let [static_i, ephemeral_i, remote, static_r, ephemeral_r] = [
        "e61ef9919cde45dd5f82166404bd08e38bceb5dfdfded0a34c8df7ed542214d1",
        "893e28b9dc6ca8d611ab664754b8ceb7bac5117349a4439a6b0569da977c464a",
        "31e0303fd6418d2f8c0e78b91f22e8caed0fbe48656dcf4767e4834f701b8f62",
        "4a3acbfdb163dec651dfa3194dece676d437029c62a408b4c5ea9114246e4893",
        "bbdb4cdbd309f1a1f2e1456967fe288cadd6f712d65dc7b7793d5e63da6b375b",
    ]
    .map(key);
    let mut initiator = builder()
        .local_private_key(&static_i)
        .unwrap()
        .fixed_ephemeral_key_for_testing_only(&ephemeral_i)
        .remote_public_key(&remote)
        .unwrap()
        .build_initiator()
        .unwrap();
    let mut responder = builder()
        .local_private_key(&static_r)
        .unwrap()
        .fixed_ephemeral_key_for_testing_only(&ephemeral_r)
        .build_responder()
        .unwrap();
    let (mut sealed, mut opened) = ([0; 256], [0; 256]);
    for (turn, (payload, ciphertext)) in VECTOR[..2].iter().enumerate() {
        let sides =
            if turn == 0 { [&mut initiator, &mut responder] } else { [&mut responder, &mut initiator] };
        let length = sides[0].write_message(payload, &mut sealed).unwrap();
        assert_eq!(sealed[..length], hex(ciphertext), "message {turn}");
        let length = sides[1].read_message(&sealed[..length], &mut opened).unwrap();
        assert_eq!(opened[..length], **payload, "message {turn}");
    }
    let hash = key("f5191b875290abcd41347ac3622d9679688a7e980229cb937ef748336cfde0e5");
    assert_eq!(initiator.get_handshake_hash(), hash);
    assert_eq!(responder.get_handshake_hash(), hash);
    let mut sides = [initiator.into_transport_mode().unwrap(), responder.into_transport_mode().unwrap()];
    for (turn, (payload, ciphertext)) in VECTOR.iter().enumerate().skip(2) {
        let length = sides[turn % 2].write_message(payload, &mut sealed).unwrap();
        assert_eq!(sealed[..length], hex(ciphertext), "message {turn}");
        let length = sides[(turn + 1) % 2].read_message(&sealed[..length], &mut opened).unwrap();
        assert_eq!(opened[..length], **payload, "message {turn}");
    }
}

#[test]
fn x25519_of_rfc_7748() {
    // Section 5.2, and 6.1 from both sides.
    for (private, public, shared) in [
        (
            "a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4",
            "e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c",
            "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552",
        ),
        (
            "77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a",
            "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f",
            "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742",
        ),
        (
            "5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb",
            "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a",
            "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742",
        ),
    ] {
        let mut dh = Primitives.resolve_dh(&DHChoice::Curve25519).unwrap();
        dh.set(&key(private));
        assert_eq!(dh.privkey(), key(private));
        let mut out = [0; 32];
        dh.dh(&key(public), &mut out).unwrap();
        assert_eq!(out, key(shared));
    }
}

#[test]
fn points_of_small_order_share_nothing() {
    let mut dh = X25519::new([0; 32]);
    dh.generate(&mut SystemNumbers(SystemRandom::new())).unwrap();
    let eight = key("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800");
    for bad in [[0; 32], eight] {
        assert_eq!(dh.dh(&bad, &mut [0; 32]), Err(Error::Dh));
    }
    assert_eq!(dh.dh(&[9; 31], &mut [0; 32]), Err(Error::Dh), "too short");
}

#[test]
fn key_pairs_are_random() {
    let mut numbers = Primitives.resolve_rng().unwrap();
    let [one, other] = [(); 2].map(|()| {
        let mut dh = X25519::new([0; 32]);
        dh.generate(numbers.as_mut()).unwrap();
        assert_eq!(crate::PrivateKey::new(*dh.private.as_bytes()).public(), dh.pubkey());
        dh.privkey().to_vec()
    });
    assert_ne!(one, other);
    assert_ne!(one, [0; 32]);
}

/// RFC 8439 appendix A.5: its nonce has the form of Noise's.
#[test]
fn chacha20_poly1305_of_rfc_8439() {
    let mut cipher = Primitives.resolve_cipher(&CipherChoice::ChaChaPoly).unwrap();
    cipher.set(&key("1c9240a5eb55d38af333888604f6b5f0473917c1402b80099dca5cbc207075c0"));
    let (counter, clear) = (0x0807_0605_0403_0201, hex("f33388860000000000004e91"));
    let text = "Internet-Drafts are draft documents valid for a maximum of six months and may be updated, \
        replaced, or obsoleted by other documents at any time. It is inappropriate to use Internet-Drafts as \
        reference material or to cite them other than as /\u{201c}work in progress./\u{201d}";
    let sealed = hex(
        "64a0861575861af460f062c79be643bd5e805cfd345cf389f108670ac76c8cb24c6cfc18755d43eea09ee94e382d26b0
         bdb7b73c321b0100d4f03b7f355894cf332f830e710b97ce98c8a84abd0b948114ad176e008d33bd60f982b1ff37c855
         9797a06ef4f0ef61c186324e2b3506383606907b6a7c02b0f9f6157b53c867e4b9166c767b804d46a59b5216cde7a4e9
         9040c5a40433225ee282a1b0a06c523eaf4534d7f83fa1155b0047718cbc546a0d072b04b3564eea1b422273f548271a
         0bb2316053fa76991955ebd63159434ecebb4e466dae5a1073a6727627097a1049e617d91d361094fa68f0ff77987130
         305beaba2eda04df997b714d6c6f2c29a6ad5cb4022b02709b eead9d67890cbb22392336fea1851f38",
    );
    let mut out = vec![0; sealed.len()];
    assert_eq!(cipher.encrypt(counter, &clear, text.as_bytes(), &mut out), sealed.len());
    assert_eq!(out, sealed);
    // No longer than the text: the tag needs no room.
    let mut opened = vec![0; text.len()];
    assert_eq!(cipher.decrypt(counter, &clear, &sealed, &mut opened), Ok(text.len()));
    assert_eq!(opened, text.as_bytes());
    for at in [0, text.len() - 1, text.len(), sealed.len() - 1] {
        let mut changed = sealed.clone();
        changed[at] ^= 1;
        assert_eq!(cipher.decrypt(counter, &clear, &changed, &mut opened), Err(Error::Decrypt), "byte {at}");
    }
    assert_eq!(cipher.decrypt(counter + 1, &clear, &sealed, &mut opened), Err(Error::Decrypt));
    assert_eq!(cipher.decrypt(counter, &[], &sealed, &mut opened), Err(Error::Decrypt));
    assert_eq!(cipher.decrypt(counter, &clear, &sealed[..15], &mut opened), Err(Error::Decrypt));
    assert_eq!(cipher.decrypt(counter, &clear, &sealed, &mut opened[..9]), Err(Error::Decrypt), "no room");
}

/// RFC 7693 appendix B, in one piece and in two.
#[test]
fn blake2s_of_rfc_7693() {
    let expected = key("508c5e8c327c14e2e1a72ba34eeb452f37458b209ed63a294d999b4c86675982");
    let mut hash = Primitives.resolve_hash(&HashChoice::Blake2s).unwrap();
    let mut out = [0; 64];
    hash.input(b"forgotten");
    hash.reset();
    hash.input(b"abc");
    hash.result(&mut out);
    assert_eq!(out[..32], expected);
    hash.input(b"a");
    hash.input(b"bc");
    hash.result(&mut out);
    assert_eq!(out[..32], expected);
}

/// The same hash with `snow`'s own HMAC and HKDF, which leave secrets behind.
struct Plain(Blake2s);

impl Hash for Plain {
    fn name(&self) -> &'static str {
        self.0.name()
    }
    fn block_len(&self) -> usize {
        self.0.block_len()
    }
    fn hash_len(&self) -> usize {
        self.0.hash_len()
    }
    fn reset(&mut self) {
        self.0.reset();
    }
    fn input(&mut self, data: &[u8]) {
        self.0.input(data);
    }
    fn result(&mut self, out: &mut [u8]) {
        self.0.result(out);
    }
}

#[test]
fn hmac_and_hkdf_are_those_of_noise() {
    let (mut ours, mut plain) = (Blake2s::default(), Plain(Blake2s::default()));
    for length in [0, 1, 31, 32, 63, 64] {
        let (key, data) = (vec![0xa5; length], vec![length as u8; 2 * length]);
        let (mut one, mut other) = ([0; 64], [0; 64]);
        ours.hmac(&key, &data, &mut one);
        plain.hmac(&key, &data, &mut other);
        assert_eq!(one, other, "key of {length}");
        for outputs in 1..=3 {
            let (mut one, mut other) = ([[0; 64]; 3], [[0; 64]; 3]);
            let [a, b, c] = &mut one;
            ours.hkdf(&key, &data, outputs, a, b, c);
            let [a, b, c] = &mut other;
            plain.hkdf(&key, &data, outputs, a, b, c);
            assert_eq!(one, other, "{outputs} outputs");
        }
    }
}

#[test]
fn there_are_no_other_primitives() {
    assert!(Primitives.resolve_hash(&HashChoice::SHA256).is_none());
    assert!(Primitives.resolve_hash(&HashChoice::Blake2b).is_none());
    assert!(Primitives.resolve_cipher(&CipherChoice::AESGCM).is_none());
    assert!(Primitives.resolve_dh(&DHChoice::Curve448).is_none());
}
