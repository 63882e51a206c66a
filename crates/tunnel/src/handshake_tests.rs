#![allow(clippy::unwrap_used, reason = "tests")]
use super::*;
use crate::aead::{LaneKey, SEALED_OVERHEAD_BYTES};
use crate::hello::tests::hello;
use crate::mac::{Admission, CookieStore, Guard, GuardLimits};
use proptest::prelude::*;

const PSK: [u8; 32] = [0x50; 32];

struct Pair {
    dialer: Identity,
    listener: Identity,
}

fn pair() -> Pair {
    Pair { dialer: Identity::from_private([0x11; 32]), listener: Identity::from_private([0x22; 32]) }
}

fn initiation_hello() -> Hello {
    Hello { timestamp_ns: Some(1_000), ..hello(3) }
}

impl Pair {
    fn start(&self, psk: Option<&[u8; 32]>, index: u32) -> (Initiator, Vec<u8>) {
        Initiator::start(&self.dialer, &self.listener.public(), psk, &initiation_hello(), index, 6, None)
            .unwrap()
    }

    fn respond(&self, initiation: &[u8], psk: Option<&[u8; 32]>) -> (Vec<u8>, Established) {
        open_initiation(&self.listener, initiation)
            .unwrap()
            .respond(psk, &hello(5), 0xb0b0_0001, None)
            .unwrap()
    }
}

/// The message with a fresh mac1: what anybody who knows the receiver's public key can make.
fn with_mac1(message: &[u8], receiver: &Identity) -> Vec<u8> {
    let mut copy = message[..message.len() - MACS_BYTES].to_vec();
    MacKeys::new(&receiver.public()).append(&mut copy, None);
    copy
}

fn exchange_works(sender: &Established, receiver: &Established) {
    for core in [0, 7] {
        let header = Header {
            kind: Kind::Data,
            receiving_core: 1,
            sending_core: core,
            path: 0,
            receiver_index: sender.remote_index,
            counter: 0,
        };
        let mut datagram = vec![0x42; SEALED_OVERHEAD_BYTES + 30];
        LaneKey::derive(&sender.send_key, core, sender.aead).seal(&header, &mut datagram);
        let opened = LaneKey::derive(&receiver.receive_key, core, receiver.aead).open(&header, &mut datagram);
        assert_eq!(opened.as_deref(), Ok(&[0x42; 30][..]));
    }
}

#[test]
fn both_directions_with_and_without_a_preshared_key() {
    for psk in [None, Some(&PSK)] {
        let pair = pair();
        let (mut initiator, initiation) = pair.start(psk, 0xa1a1_0001);
        let opened = open_initiation(&pair.listener, &initiation).unwrap();
        assert_eq!(opened.remote_static, pair.dialer.public());
        assert_eq!(opened.hello, initiation_hello());
        assert_eq!((opened.timestamp_ns, opened.sender_index, opened.path), (1_000, 0xa1a1_0001, 6));
        let (response, at_listener) = opened.respond(psk, &hello(5), 0xb0b0_0001, None).unwrap();
        let at_dialer = initiator.finish(&response).unwrap();
        assert_eq!((at_dialer.remote_index, at_listener.remote_index), (0xb0b0_0001, 0xa1a1_0001));
        assert_eq!((&at_dialer.remote_hello, &at_listener.remote_hello), (&hello(5), &initiation_hello()));
        assert_eq!(*at_dialer.send_key, *at_listener.receive_key);
        assert_eq!(*at_dialer.receive_key, *at_listener.send_key);
        assert_ne!(*at_dialer.send_key, *at_dialer.receive_key);
        assert_eq!((at_dialer.aead, at_listener.aead), (Aead::best(), Aead::best()));
        exchange_works(&at_dialer, &at_listener);
        exchange_works(&at_listener, &at_dialer);
        assert_eq!(initiator.finish(&response).err(), Some(DropReason::HandshakeFailed), "only once");
    }
}

#[test]
fn headers_are_as_documented() {
    let pair = pair();
    let (_, initiation) = pair.start(None, 0xa1a2_a3a4);
    assert_eq!(initiation[..16], [0x11, 255, 0, 6, 0xa1, 0xa2, 0xa3, 0xa4, 0, 0, 0, 0, 0, 0, 0, 0]);
    let (response, _) = pair.respond(&initiation, None);
    assert_eq!(response[..16], [0x12, 255, 0, 6, 0xa1, 0xa2, 0xa3, 0xa4, 0, 0, 0, 0, 0xb0, 0xb0, 0, 1]);
    assert_eq!(initiation.len(), INITIATION_BYTES_MIN + initiation_hello().encode().unwrap().len());
    assert_eq!(response.len(), RESPONSE_BYTES_MIN + hello(5).encode().unwrap().len());
}

#[test]
fn every_handshake_has_its_own_keys() {
    let pair = pair();
    let mut seen = std::collections::BTreeSet::new();
    for index in 0..4 {
        let (mut initiator, initiation) = pair.start(Some(&PSK), index);
        let (response, _) = pair.respond(&initiation, Some(&PSK));
        let established = initiator.finish(&response).unwrap();
        assert!(seen.insert(*established.send_key) && seen.insert(*established.receive_key));
        assert!(seen.insert(initiation[16..48].try_into().unwrap()), "a new ephemeral key each time");
    }
}

#[test]
fn a_wrong_preshared_key_leaves_the_attempt_alive() {
    let pair = pair();
    for (ours, theirs) in [(Some(&PSK), None), (None, Some(&PSK)), (Some(&PSK), Some(&[0x51; 32]))] {
        let (mut initiator, initiation) = pair.start(ours, 1);
        let (wrong, _) = pair.respond(&initiation, theirs);
        assert_eq!(initiator.finish(&wrong).err(), Some(DropReason::HandshakeFailed));
        let (right, at_listener) = pair.respond(&initiation, ours);
        exchange_works(&initiator.finish(&right).unwrap(), &at_listener);
    }
}

#[test]
fn a_wrong_public_key_opens_nothing() {
    let pair = pair();
    let stranger = Identity::from_private([0x33; 32]);
    let (_, initiation) = pair.start(None, 1);
    assert_eq!(open_initiation(&stranger, &initiation).err(), Some(DropReason::HandshakeMac));
    // Even if mac1 is made to fit.
    let forged = with_mac1(&initiation, &stranger);
    assert_eq!(open_initiation(&stranger, &forged).err(), Some(DropReason::HandshakeFailed));
}

#[test]
fn an_impostor_cannot_respond() {
    let pair = pair();
    let (mut initiator, initiation) = pair.start(None, 1);
    // An impostor cannot open the Initiation, so it plays a response to another handshake of its own.
    let impostor = Identity::from_private([0x44; 32]);
    let (_, other) =
        Initiator::start(&pair.dialer, &impostor.public(), None, &initiation_hello(), 1, 6, None).unwrap();
    let (forged, _) = open_initiation(&impostor, &other).unwrap().respond(None, &hello(5), 9, None).unwrap();
    assert_eq!(initiator.finish(&forged).err(), Some(DropReason::HandshakeFailed));
    let (right, _) = pair.respond(&initiation, None);
    assert!(initiator.finish(&right).is_ok());
}

#[test]
fn changed_initiations_are_refused() {
    let pair = pair();
    let (_, initiation) = pair.start(None, 1);
    for at in 0..initiation.len() - MACS_BYTES {
        let mut copy = initiation.clone();
        copy[at] ^= 0x40;
        assert!(open_initiation(&pair.listener, &copy).is_err(), "byte {at}");
        assert!(
            open_initiation(&pair.listener, &with_mac1(&copy, &pair.listener)).is_err(),
            "byte {at}, new mac1"
        );
    }
    for length in 0..initiation.len() {
        assert!(open_initiation(&pair.listener, &initiation[..length]).is_err(), "{length} bytes");
    }
    assert!(open_initiation(&pair.listener, &initiation).is_ok());
}

#[test]
fn changed_responses_do_no_harm() {
    let pair = pair();
    let (mut initiator, initiation) = pair.start(Some(&PSK), 1);
    let (response, _) = pair.respond(&initiation, Some(&PSK));
    for at in (0..8).chain(HEADER_BYTES..response.len() - MACS_BYTES) {
        let mut copy = response.clone();
        copy[at] ^= 0x40;
        assert!(initiator.finish(&copy).is_err(), "byte {at}");
        // The path byte is a hint only; the sealed copy counts, so a change of it may even succeed.
        if at != 3 {
            let forged = with_mac1(&copy, &pair.dialer);
            assert!(initiator.finish(&forged).is_err(), "byte {at}, new mac1");
        }
    }
    for length in 0..response.len() {
        assert!(initiator.finish(&response[..length]).is_err(), "{length} bytes");
    }
    assert!(initiator.finish(&response).is_ok());
}

#[test]
fn the_sealed_index_counts() {
    let pair = pair();
    let (mut initiator, initiation) = pair.start(None, 1);
    let (mut response, _) = pair.respond(&initiation, None);
    response[15] ^= 0xff;
    let forged = with_mac1(&response, &pair.dialer);
    assert_eq!(initiator.finish(&forged).unwrap().remote_index, 0xb0b0_0001);
}

#[test]
fn responses_to_other_attempts_are_left_alone() {
    let pair = pair();
    let (mut first, _) = pair.start(None, 1);
    let (_, second) = pair.start(None, 2);
    let (mut response, _) = pair.respond(&second, None);
    assert_eq!(first.finish(&response).err(), Some(DropReason::UnknownIndex));
    response[4..8].copy_from_slice(&1u32.to_be_bytes());
    let forged = with_mac1(&response, &pair.dialer);
    assert_eq!(first.finish(&forged).err(), Some(DropReason::HandshakeFailed));
}

#[test]
fn kinds_are_not_confused() {
    let pair = pair();
    let (mut initiator, initiation) = pair.start(None, 1);
    let (response, _) = pair.respond(&initiation, None);
    assert_eq!(initiator.finish(&initiation).err(), Some(DropReason::HandshakeMalformed));
    assert_eq!(open_initiation(&pair.dialer, &response).err(), Some(DropReason::HandshakeMalformed));
    let mut parts = initiation.clone();
    parts[9] = 1;
    let parts = with_mac1(&parts, &pair.listener);
    assert_eq!(open_initiation(&pair.listener, &parts).err(), Some(DropReason::HandshakeMalformed));
    let long = [initiation, vec![0; HANDSHAKE_BYTES_MAX]].concat();
    assert_eq!(open_initiation(&pair.listener, &long).err(), Some(DropReason::HandshakeMalformed));
}

#[test]
fn an_initiation_needs_a_timestamp() {
    let pair = pair();
    let (_, initiation) =
        Initiator::start(&pair.dialer, &pair.listener.public(), None, &hello(3), 1, 0, None).unwrap();
    assert_eq!(open_initiation(&pair.listener, &initiation).err(), Some(DropReason::HandshakeMalformed));
}

#[test]
fn ciphers_are_agreed_or_the_handshake_fails() {
    let pair = pair();
    let chacha = Aead::ChaCha20Poly1305.bit();
    let ours = Hello { aeads: chacha, ..initiation_hello() };
    let (mut initiator, initiation) =
        Initiator::start(&pair.dialer, &pair.listener.public(), None, &ours, 1, 0, None).unwrap();
    let both = Hello { aeads: chacha | Aead::Aes256Gcm.bit(), ..hello(5) };
    let opened = open_initiation(&pair.listener, &initiation).unwrap();
    let (response, at_listener) = opened.respond(None, &both, 2, None).unwrap();
    assert_eq!(at_listener.aead, Aead::ChaCha20Poly1305);
    assert_eq!(initiator.finish(&response).unwrap().aead, Aead::ChaCha20Poly1305);
    let only_aes = Hello { aeads: Aead::Aes256Gcm.bit(), ..hello(5) };
    let opened = open_initiation(&pair.listener, &initiation).unwrap();
    assert_eq!(opened.respond(None, &only_aes, 2, None).err(), Some(DropReason::HandshakeFailed));
}

#[test]
fn keys_of_small_order_are_refused() {
    let pair = pair();
    let result = Initiator::start(&pair.dialer, &[0; 32], None, &initiation_hello(), 1, 0, None);
    assert!(matches!(result, Err(HandshakeError::UnsoundKey)));
}

#[test]
fn the_largest_hello_fits_one_datagram() {
    let pair = pair();
    let mut large = Hello { timestamp_ns: Some(u64::MAX), ..hello(128) };
    large.processor.load = vec![1; 128];
    large.processor.reserved = vec![(0, steering::cores::CoreSet::first(128)); 8];
    let owners = (0..512u16).map(|bucket| bucket * 37 % 128).collect();
    large.processor.table = steering::table::BucketTable::from_owners(1, owners).unwrap();
    assert!(large.encode().unwrap().len() > HELLO_BYTES_MAX - 300, "nearly at the limit");
    let (mut initiator, initiation) =
        Initiator::start(&pair.dialer, &pair.listener.public(), None, &large, 1, 0, None).unwrap();
    let opened = open_initiation(&pair.listener, &initiation).unwrap();
    let (response, _) = opened.respond(None, &large, 2, None).unwrap();
    assert!(initiation.len() <= HANDSHAKE_BYTES_MAX && response.len() < initiation.len());
    assert_eq!(initiator.finish(&response).unwrap().remote_hello, large);
}

/// The whole way under load: refused with a cookie, tried again with it, admitted, established.
#[test]
fn a_dialer_gets_through_a_loaded_guard() {
    let pair = pair();
    let limits = GuardLimits { free_per_second: 1, free_burst: 1, ..GuardLimits::default() };
    let guard = Guard::new(&pair.listener.public(), [9; 32], limits);
    let (now, from) = (Time::from_ms(3), "203.0.113.5:4711".parse().unwrap());
    let (_, first) = pair.start(None, 1);
    assert_eq!(guard.admit(now, from, &first), Admission::Process);
    let (_, second) = pair.start(None, 2);
    let mut store = CookieStore::new(&pair.listener.public());
    store.sent(&second);
    let Admission::Reply(reply) = guard.admit(now, from, &second) else { panic!("not under load") };
    store.accept(now, &reply).unwrap();
    let (mut initiator, third) = Initiator::start(
        &pair.dialer,
        &pair.listener.public(),
        None,
        &initiation_hello(),
        3,
        6,
        store.cookie(now),
    )
    .unwrap();
    assert_eq!(guard.admit(now, from, &third), Admission::Process);
    let (response, _) = pair.respond(&third, None);
    assert!(initiator.finish(&response).is_ok());
}

#[test]
fn timestamps_only_rise() {
    let mut timestamps = Timestamps::new(5_000);
    // A clock that starts at zero, jumps ahead and back again.
    let given: Vec<_> = [0, 0, 9_000, 10, 9_001, 9_002].map(|wall| timestamps.next(wall)).to_vec();
    assert_eq!(given, [5_001, 5_002, 9_000, 9_001, 9_002, 9_003]);
    assert_eq!(timestamps.last_ns(), 9_003);
}

#[test]
fn the_gate_refuses_replays_and_haste() {
    let mut gate = PeerGate::default();
    let at = |ms: u64| Time::from_ms(1_000 + ms);
    assert_eq!(gate.accept(at(0), 100), Ok(()));
    assert_eq!(gate.accept(at(50), 100), Err(DropReason::HandshakeReplayed));
    assert_eq!(gate.accept(at(50), 99), Err(DropReason::HandshakeReplayed));
    assert_eq!(gate.accept(at(19), 101), Err(DropReason::HandshakeRate));
    assert_eq!(gate.accept(at(20), 101), Ok(()));
    let mut fresh = PeerGate::default();
    assert_eq!(fresh.accept(Time::ZERO, 0), Ok(()), "a timestamp of zero is as good as any");
    assert_eq!(fresh.accept(at(0), 0), Err(DropReason::HandshakeReplayed));
}

#[test]
fn an_old_timestamp_with_the_token_of_a_challenge_is_fresh_once() {
    let mut gate = PeerGate::default();
    let at = |ms: u64| Time::from_ms(1_000 + ms);
    assert_eq!(gate.accept(at(0), 2_000), Ok(()));
    // Nothing was asked: no token is right.
    assert!(!gate.accept_fresh(at(1), Some(&[0; 16])));
    assert_eq!(gate.challenge(at(100), || [1; 16]), Some([1; 16]));
    // A recording in between does not change what the peer is about to answer.
    assert_eq!(gate.challenge(at(200), || [2; 16]), Some([1; 16]));
    assert!(!gate.accept_fresh(at(200), None) && !gate.accept_fresh(at(200), Some(&[2; 16])));
    assert!(gate.accept_fresh(at(300), Some(&[1; 16])));
    assert!(!gate.accept_fresh(at(301), Some(&[1; 16])), "a recording of the answer");
    assert_eq!(gate.challenge(at(301), || [3; 16]), None);
    assert_eq!(gate.accept(at(900), 1_999), Err(DropReason::HandshakeReplayed), "the past stays closed");
    assert_eq!(gate.challenge(at(1_300), || [4; 16]), Some([4; 16]));
    assert!(!gate.accept_fresh(at(11_300), Some(&[4; 16])), "too late");
    assert_eq!(gate.challenge(at(11_300), || [5; 16]), Some([5; 16]));
    assert_eq!(gate.accept(at(11_400), 2_001), Ok(()));
}

#[test]
fn nothing_secret_is_printed() {
    let pair = pair();
    let (mut initiator, initiation) = pair.start(Some(&PSK), 1);
    let (response, at_listener) = pair.respond(&initiation, Some(&PSK));
    let established = initiator.finish(&response).unwrap();
    for text in [format!("{:?}", pair.dialer), format!("{established:?}"), format!("{at_listener:?}")] {
        assert!(!text.contains("key"), "{text}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn garbage_never_panics(mut garbage in proptest::collection::vec(any::<u8>(), 0..HANDSHAKE_BYTES_MAX + 50), kind in 1u8..=2, fix: bool) {
        let pair = pair();
        let (mut initiator, _) = pair.start(None, 7);
        if fix && garbage.len() > HEADER_BYTES + MACS_BYTES {
            // Everything an outsider can make fit.
            let header = Header {
                kind: Kind::from_number(kind).unwrap(),
                receiving_core: NOT_TOLD,
                sending_core: 0,
                path: 0,
                receiver_index: 7,
                counter: 0,
            };
            header.write(&mut garbage);
            let receiver = if kind == 1 { &pair.listener } else { &pair.dialer };
            garbage = with_mac1(&garbage, receiver);
        }
        prop_assert!(open_initiation(&pair.listener, &garbage).is_err());
        prop_assert!(initiator.finish(&garbage).is_err());
    }
}
