#![allow(clippy::unwrap_used, reason = "tests")]

use proptest::prelude::*;

use super::*;

const ROUTER: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

/// An advertisement with these options.
fn advertisement(options: &[&[u8]]) -> Vec<u8> {
    let mut message = vec![ADVERTISEMENT, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0];
    options.iter().for_each(|option| message.extend_from_slice(option));
    message
}

/// A PREF64 option: scaled lifetime, code of the length, prefix.
fn option(scaled: u16, code: u16, prefix: &str) -> Vec<u8> {
    let mut bytes = vec![OPTION_TYPE, 2];
    bytes.extend_from_slice(&(scaled << 3 | code).to_be_bytes());
    bytes.extend_from_slice(&prefix.parse::<Ipv6Addr>().unwrap().octets()[..12]);
    bytes
}

fn translated(list: &[Nat64Prefix]) -> Vec<String> {
    list.iter().map(|prefix| prefix.address("192.0.2.33".parse().unwrap()).to_string()).collect()
}

/// Every length, with what stands behind the prefix ignored; addresses as in RFC 6052 §2.4.
#[test]
fn every_length_is_read() {
    for (code, prefix, expected) in [
        (0, "2001:db8:122:344::", "2001:db8:122:344::c000:221"),
        (1, "2001:db8:122:344::", "2001:db8:122:344:c0:2:2100:0"),
        (2, "2001:db8:122:3ff:ffff::", "2001:db8:122:3c0:0:221::"),
        (3, "2001:db8:122:ffff::", "2001:db8:122:c000:2:2100::"),
        (4, "2001:db8:1ff:ffff::", "2001:db8:1c0:2:21::"),
        (5, "2001:db8:ffff:ffff::", "2001:db8:c000:221::"),
    ] {
        let list = read(&advertisement(&[&option(225, code, prefix)]));
        assert_eq!(list.len(), 1, "{code}");
        assert_eq!(list[0].1, Duration::from_secs(1_800));
        let expected = expected.parse::<Ipv6Addr>().unwrap().to_string();
        assert_eq!(translated(&[list[0].0]), [expected], "{code}");
    }
}

/// RFC 8781 §4: another length than 2 and an unknown code are ignored, the other options count. RFC 4861 §6.1.2: an option
/// without length, or longer than the message, makes the whole of it invalid.
#[test]
fn wrong_options_are_ignored() {
    let good = option(10, 0, "64:ff9b::");
    let mut short = good.clone();
    short[1] = 1;
    short.truncate(8);
    let mut long = good.clone();
    long[1] = 3;
    long.extend_from_slice(&[0; 8]);
    let unknown = [option(10, 6, "2001:db8::"), option(10, 7, "2001:db8::")].concat();
    let other = [5, 1, 0, 0, 0, 0, 5, 220];
    let read_all = |options: &[&[u8]]| read(&advertisement(options)).len();
    assert_eq!(read_all(&[&short, &long, &unknown, &other, &good]), 1);
    assert_eq!(read_all(&[&short]) + read_all(&[&long]) + read_all(&[&unknown]), 0);
    let mut without = good.clone();
    without[1] = 0;
    for broken in
        [without, good[..15].to_vec(), [&good[..], &[38]].concat(), [&good[..], &[1, 9, 0]].concat()]
    {
        assert_eq!(read_all(&[&good, &broken]), 0, "{broken:?}");
    }
    let mut message = advertisement(&[&good]);
    message[1] = 1;
    assert!(read(&message).is_empty(), "a code that is not 0");
    assert!(read(&[]).is_empty() && read(&message[..15]).is_empty());
}

#[test]
fn a_prefix_counts_as_long_as_its_router_says() {
    let (mut known, start) = (Advertised::default(), Instant::now());
    let second = Duration::from_secs(1);
    let message = |scaled: u16, prefix: &str| advertisement(&[&option(scaled, 0, prefix)]);
    assert!(!known.take(2, "2001:db8::1".parse().unwrap(), &message(10, "64:ff9b::"), start), "no neighbor");
    assert!(known.take(2, ROUTER, &message(10, "64:ff9b::"), start));
    assert!(!known.take(2, ROUTER, &message(10, "64:ff9b::"), start + 60 * second), "longer, not another");
    assert!(!known.keep(&[2], start + 139 * second));
    assert_eq!(translated(&known.prefixes()), ["64:ff9b::c000:221"]);
    assert!(known.keep(&[2], start + 140 * second) && known.prefixes().is_empty());
    // Zero ends it at once, of the one that says so.
    assert!(known.take(2, ROUTER, &message(10, "64:ff9b::"), start));
    assert!(known.take(2, ROUTER, &message(10, "2001:db8:64::"), start));
    assert!(known.take(2, ROUTER, &message(0, "64:ff9b::"), start));
    assert_eq!(translated(&known.prefixes()), ["2001:db8:64::c000:221"]);
    // The network behind the interface is another one now.
    assert!(known.keep(&[3], start) && known.list.is_empty());
    for number in 0..100 {
        known.take(2, ROUTER, &message(10, &format!("2001:db8:{number:x}::")), start);
    }
    assert_eq!((known.list.len(), known.prefixes().len()), (KNOWN_MAX, PREFIXES_MAX));
}

proptest! {
    #[test]
    fn any_message_is_read(message in proptest::collection::vec(any::<u8>(), 0..200), header in any::<bool>()) {
        let message = if header { advertisement(&[&message]) } else { message };
        let mut known = Advertised::default();
        known.take(1, ROUTER, &message, Instant::now());
        prop_assert!(known.list.len() <= KNOWN_MAX);
    }
}
