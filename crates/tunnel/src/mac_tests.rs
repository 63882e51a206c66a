#![allow(clippy::unwrap_used, reason = "tests")]
use super::*;
use proptest::prelude::*;

const PUBLIC: [u8; 32] = [0x31; 32];
const SEED: [u8; 32] = [0x77; 32];

fn guard() -> Guard {
    let limits = GuardLimits { free_per_second: 10, free_burst: 3, ..GuardLimits::default() };
    Guard::new(&PUBLIC, SEED, limits)
}

fn source(last: u8, port: u16) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, last], port))
}

/// An Initiation as far as the guard looks: header, some body, MACs.
fn message(index: u32, cookie: Option<&Cookie>) -> Vec<u8> {
    let header = Header {
        kind: Kind::Initiation,
        receiving_core: NOT_TOLD,
        sending_core: 0,
        path: 4,
        receiver_index: index,
        counter: 0,
    };
    let mut message = header.to_bytes().to_vec();
    message.extend_from_slice(&[0x99; 100]);
    MacKeys::new(&PUBLIC).append(&mut message, cookie);
    message
}

fn takes(guard: &Guard, ip: IpAddr) -> bool {
    let hash = guard.hash_of(ip);
    guard.buckets().take_source(Time::ZERO, &hash, &guard.limits)
}

fn load(guard: &Guard, now: Time) {
    let limits = guard.limits;
    while guard.buckets().free.take(now, limits.free_per_second, limits.free_burst) {}
    assert!(guard.under_load(now));
}

fn cookie_for(guard: &Guard, now: Time, from: SocketAddr) -> Cookie {
    let mut store = CookieStore::new(&PUBLIC);
    let sent = message(7, None);
    store.sent(&sent);
    let reply = guard.cookie_reply(now, from, &sent).unwrap();
    store.accept(now, &reply).unwrap();
    store.cookie(now).unwrap().clone()
}

/// The reference output of BLAKE2s keyed with 00..1f over one zero byte (official test vectors, second entry).
#[test]
fn keyed_blake2s_is_the_official_one() {
    let key: [u8; 32] = std::array::from_fn(|at| at as u8);
    let text: String = keyed_256(&key, &[&[0]]).iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(text, "40d15fee7c328830166ac3f918650f807e7e01e177258cdc0a39b11f598066f1");
}

#[test]
fn mac1_covers_every_byte() {
    let keys = MacKeys::new(&PUBLIC);
    let good = message(1, None);
    assert_eq!(keys.verify_mac1(&good), Ok(()));
    for at in 0..good.len() - MAC_BYTES {
        let mut copy = good.clone();
        copy[at] ^= 0x10;
        assert_eq!(keys.verify_mac1(&copy), Err(DropReason::HandshakeMac), "byte {at}");
    }
    assert_eq!(MacKeys::new(&[0x32; 32]).verify_mac1(&good), Err(DropReason::HandshakeMac));
    for length in 0..HEADER_BYTES + MACS_BYTES {
        assert_eq!(keys.verify_mac1(&good[..length]), Err(DropReason::TooShort));
    }
}

#[test]
fn a_quiet_guard_asks_for_nothing() {
    let guard = guard();
    for index in 0..3 {
        assert!(!guard.under_load(Time::ZERO));
        assert_eq!(guard.admit(Time::ZERO, source(1, 1), &message(index, None)), Admission::Process);
    }
    assert!(guard.under_load(Time::ZERO));
    // One more after a tenth of a second.
    let later = Time::from_ms(100);
    assert_eq!(guard.admit(later, source(1, 1), &message(9, None)), Admission::Process);
    assert!(guard.under_load(later));
}

#[test]
fn wrong_mac1_costs_no_token_and_gets_no_answer() {
    let guard = guard();
    let mut bad = message(1, None);
    bad[20] ^= 1;
    for _ in 0..100 {
        assert_eq!(guard.admit(Time::ZERO, source(1, 1), &bad), Admission::Drop(DropReason::HandshakeMac));
    }
    assert!(!guard.under_load(Time::ZERO));
}

#[test]
fn under_load_a_cookie_opens_the_door() {
    let guard = guard();
    let now = Time::from_ms(5);
    load(&guard, now);
    let mut store = CookieStore::new(&PUBLIC);
    assert_eq!(store.cookie(now), None);
    let first = message(0x0102_0304, None);
    store.sent(&first);
    let Admission::Reply(reply) = guard.admit(now, source(1, 5000), &first) else {
        panic!("no cookie reply")
    };
    let header = Header::parse(&reply).unwrap();
    assert_eq!((header.kind, header.receiver_index, header.path), (Kind::Cookie, 0x0102_0304, 4));
    store.accept(now, &reply).unwrap();
    let second = message(2, store.cookie(now));
    assert_eq!(guard.admit(now, source(1, 5000), &second), Admission::Process);
    // The same cookie from another port or address is worth nothing.
    for other in [source(1, 5001), source(2, 5000), "[2001:db8::1]:5000".parse().unwrap()] {
        assert!(matches!(guard.admit(now, other, &second), Admission::Reply(_)));
    }
    // The IPv4-mapped view of a dual-stack socket is the same source.
    assert_eq!(guard.admit(now, "[::ffff:192.0.2.1]:5000".parse().unwrap(), &second), Admission::Process);
}

#[test]
fn a_challenge_is_answered_once() {
    let guard = guard();
    let now = Time::from_ms(5);
    let mut store = CookieStore::new(&PUBLIC);
    let first = message(7, None);
    store.sent(&first);
    assert!(!store.is_challenged());
    let token = [9; MAC_BYTES];
    store.accept(now, &guard.freshness_challenge(&first, &token).unwrap()).unwrap();
    assert!(store.is_challenged() && store.cookie(now).is_none());
    assert_eq!(store.take_challenge(), Some(token));
    assert_eq!((store.take_challenge(), store.is_challenged()), (None, false));
}

#[test]
fn a_reply_is_smaller_than_any_initiation() {
    assert_eq!(COOKIE_REPLY_BYTES, 72);
    const { assert!(COOKIE_REPLY_BYTES < crate::handshake::INITIATION_BYTES_MIN) };
    const { assert!(COOKIE_REPLY_BYTES < crate::handshake::RESPONSE_BYTES_MIN) };
}

#[test]
fn cookies_end_with_the_secret() {
    let guard = guard();
    let from = source(1, 1);
    let start = Time::from_ms(COOKIE_SECRET_MS / 2);
    let sent = message(1, Some(&cookie_for(&guard, start, from)));
    assert!(guard.verify_mac2(start, from, &sent));
    assert!(guard.verify_mac2(start.plus_ms(COOKIE_SECRET_MS), from, &sent));
    assert!(!guard.verify_mac2(start.plus_ms(2 * COOKIE_SECRET_MS), from, &sent));
    // Whatever the moment, a cookie lives at least as long as its owner uses it.
    let edge = Time::from_ns(Time::from_ms(COOKIE_SECRET_MS).ns() - 1);
    let sent = message(1, Some(&cookie_for(&guard, edge, from)));
    assert!(guard.verify_mac2(edge.plus_ms(COOKIE_USE_MS), from, &sent));
}

#[test]
fn the_store_forgets_old_cookies() {
    let guard = guard();
    let (from, now) = (source(1, 1), Time::from_ms(1000));
    let mut store = CookieStore::new(&PUBLIC);
    let sent = message(7, None);
    store.sent(&sent);
    store.accept(now, &guard.cookie_reply(now, from, &sent).unwrap()).unwrap();
    assert!(store.cookie(now.plus_ms(COOKIE_USE_MS - 1)).is_some());
    assert!(store.cookie(now.plus_ms(COOKIE_USE_MS)).is_none());
}

#[test]
fn replies_to_nothing_are_refused() {
    let guard = guard();
    let (from, now) = (source(1, 1), Time::ZERO);
    let mut store = CookieStore::new(&PUBLIC);
    let (ours, foreign) = (message(7, None), message(8, None));
    store.sent(&ours);
    let reply = guard.cookie_reply(now, from, &foreign).unwrap();
    assert_eq!(store.accept(now, &reply), Err(DropReason::HandshakeCookie));
    let reply = guard.cookie_reply(now, from, &ours).unwrap();
    for at in 1..COOKIE_REPLY_BYTES {
        let mut copy = reply;
        copy[at] ^= 1;
        assert_eq!(store.accept(now, &copy), Err(DropReason::HandshakeCookie), "byte {at}");
    }
    assert_eq!(store.accept(now, &reply[..71]), Err(DropReason::HandshakeMalformed));
    assert_eq!(store.accept(now, &ours), Err(DropReason::HandshakeMalformed));
    assert!(store.cookie(now).is_none());
    assert_eq!(store.accept(now, &reply), Ok(()));
    assert_eq!(store.accept(now, &reply), Err(DropReason::HandshakeCookie), "one answer for each message");
    // Another peer's guard cannot hand out cookies for this one.
    store.sent(&ours);
    let other = Guard::new(&[0x55; 32], SEED, GuardLimits::default());
    let reply = other.cookie_reply(now, from, &ours).unwrap();
    assert_eq!(store.accept(now, &reply), Err(DropReason::HandshakeCookie));
}

#[test]
fn late_replies_are_recognised_after_a_retry() {
    let guard = guard();
    let mut store = CookieStore::new(&PUBLIC);
    let messages: Vec<_> = (0..5).map(|index| message(index, None)).collect();
    for message in &messages {
        store.sent(message);
    }
    let replies: Vec<_> =
        messages.iter().map(|sent| guard.cookie_reply(Time::ZERO, source(1, 1), sent).unwrap()).collect();
    assert_eq!(
        store.accept(Time::ZERO, &replies[0]),
        Err(DropReason::HandshakeCookie),
        "older than the last four"
    );
    assert_eq!(store.accept(Time::ZERO, &replies[1]), Ok(()));
}

#[test]
fn reply_nonces_never_repeat() {
    let guard = guard();
    let sent = message(1, None);
    let nonces: std::collections::BTreeSet<_> = (0..500)
        .map(|_| {
            guard.cookie_reply(Time::ZERO, source(1, 1), &sent).unwrap()[HEADER_BYTES..COOKIE_AT].to_vec()
        })
        .collect();
    assert_eq!(nonces.len(), 500);
}

#[test]
fn a_response_is_answered_by_its_senders_index() {
    let guard = guard();
    let header = Header {
        kind: Kind::Response,
        receiving_core: NOT_TOLD,
        sending_core: 0,
        path: 1,
        receiver_index: 1,
        counter: 0xabcd_0123,
    };
    let mut response = header.to_bytes().to_vec();
    let mut short = response.clone();
    MacKeys::new(&PUBLIC).append(&mut short, None);
    let refused = guard.cookie_reply(Time::ZERO, source(1, 1), &short);
    assert_eq!(refused, Err(DropReason::TooShort), "an answer is never longer than the question");
    response.resize(80, 0);
    MacKeys::new(&PUBLIC).append(&mut response, None);
    let reply = guard.cookie_reply(Time::ZERO, source(1, 1), &response).unwrap();
    assert_eq!(Header::parse(&reply).unwrap().receiver_index, 0xabcd_0123);
    let mut data = Header { kind: Kind::Data, ..header }.to_bytes().to_vec();
    data.resize(80, 0);
    MacKeys::new(&PUBLIC).append(&mut data, None);
    assert_eq!(guard.cookie_reply(Time::ZERO, source(1, 1), &data), Err(DropReason::HandshakeMalformed));
}

#[test]
fn each_source_has_its_share() {
    let guard = guard();
    let now = Time::from_ms(10);
    load(&guard, now);
    let (loud, quiet) = (source(1, 1), source(2, 1));
    let from_loud = message(1, Some(&cookie_for(&guard, now, loud)));
    let from_quiet = message(2, Some(&cookie_for(&guard, now, quiet)));
    for _ in 0..5 {
        assert_eq!(guard.admit(now, loud, &from_loud), Admission::Process);
    }
    assert_eq!(guard.admit(now, loud, &from_loud), Admission::Drop(DropReason::HandshakeRate));
    assert_eq!(guard.admit(now, quiet, &from_quiet), Admission::Process);
    // 20 a second: the next one after 50 ms.
    let later = now.plus_ms(50);
    load(&guard, later);
    assert_eq!(guard.admit(later, loud, &from_loud), Admission::Process);
    assert_eq!(guard.admit(later, loud, &from_loud), Admission::Drop(DropReason::HandshakeRate));
}

#[test]
fn one_ipv6_subnet_is_one_source() {
    let guard = guard();
    let mut admitted = 0;
    for host in 1..50u16 {
        let ip = format!("2001:db8:1:2:{host:x}::1").parse().unwrap();
        admitted += u32::from(takes(&guard, ip));
    }
    assert_eq!(admitted, 5);
    assert!(takes(&guard, "2001:db8:1:3::1".parse().unwrap()));
}

#[test]
fn many_sources_together_stay_below_the_total() {
    let guard = Guard::new(
        &PUBLIC,
        SEED,
        GuardLimits { free_per_second: 1, free_burst: 1, total_per_second: 100, ..GuardLimits::default() },
    );
    let mut processed = 0;
    // 2,000 sources in one second: far more than the table has places.
    for number in 0..2_000u32 {
        let now = Time::from_us(u64::from(number) * 500);
        load(&guard, now);
        let from = SocketAddr::from(([10, 1, (number >> 8) as u8, number as u8], 9));
        let sent = message(number, Some(&guard.cookie(period(now), from)));
        processed += u32::from(guard.admit(now, from, &sent) == Admission::Process);
    }
    assert!((100..=151).contains(&processed), "{processed} processed");
}

proptest! {
    #[test]
    fn garbage_is_dropped(garbage in proptest::collection::vec(any::<u8>(), 0..200), port: u16) {
        let guard = guard();
        let mut store = CookieStore::new(&PUBLIC);
        prop_assert!(matches!(guard.admit(Time::ZERO, source(1, port), &garbage), Admission::Drop(_)));
        prop_assert!(!guard.verify_mac2(Time::ZERO, source(1, port), &garbage));
        prop_assert!(store.accept(Time::ZERO, &garbage).is_err());
        store.sent(&garbage);
    }

    /// Over any second-long stretch a bucket lets through at most rate + burst.
    #[test]
    fn buckets_hold_their_rate(gaps in proptest::collection::vec(0u64..30_000_000, 1..300)) {
        let (mut bucket, mut now) = (Bucket::default(), Time::ZERO);
        let mut passed = Vec::new();
        for gap in gaps {
            now = now.plus_ns(gap);
            if bucket.take(now, 20, 5) {
                passed.push(now);
            }
        }
        for (at, start) in passed.iter().enumerate() {
            let within = passed[at..].iter().filter(|time| time.since(*start) < 1_000_000_000).count();
            prop_assert!(within <= 25);
        }
        prop_assert!(!passed.is_empty());
    }
}

/// Row T1: cores judge side by side what comes to one key; no answer has the nonce of another, and tokens are not given twice.
#[test]
fn cores_share_a_guard() {
    let guard = guard();
    load(&guard, Time::ZERO);
    let message = message(0, None);
    let admit_all = || {
        let replies = (0..2_000_u16).map(|port| {
            let from = SocketAddr::new([10, 0, 0, 1].into(), port);
            match guard.admit(Time::ZERO, from, &message) {
                Admission::Reply(reply) => reply[HEADER_BYTES..COOKIE_AT].to_vec(),
                other => panic!("{other:?}"),
            }
        });
        replies.collect::<Vec<_>>()
    };
    let nonces: Vec<Vec<u8>> = std::thread::scope(|scope| {
        let cores = [scope.spawn(admit_all), scope.spawn(admit_all)];
        cores.into_iter().flat_map(|core| core.join().unwrap()).collect()
    });
    let distinct: std::collections::BTreeSet<_> = nonces.iter().collect();
    assert_eq!(distinct.len(), 4_000);
}
