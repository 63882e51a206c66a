#![allow(clippy::unwrap_used, reason = "tests")]
use super::*;
use crate::checksum::verify_packet;
use crate::testing::{ACK, ECE, Recipe, SYN, V4, V6, payload};
use proptest::prelude::*;

const MSS_1460: [u8; 4] = [2, 4, 0x05, 0xb4];

fn syn(addresses: (&str, &str), options: &[u8]) -> Recipe {
    Recipe::tcp(addresses, Vec::new()).flags(SYN).options(options)
}

#[test]
fn lowers_and_never_raises() {
    for (addresses, fixed) in [(V4, 40u16), (V6, 60)] {
        for (mtu, changed) in [
            (1280, true),
            (1459 + fixed, true),
            (1460 + fixed, false),
            (9000, false),
            (fixed, false),
            (0, false),
        ] {
            for full in [true, false] {
                let recipe = syn(addresses, &MSS_1460);
                let recipe = if full { recipe.full() } else { recipe };
                let mut clamped = recipe.clone();
                if changed {
                    let [a, b] = (mtu - fixed).to_be_bytes();
                    clamped = clamped.options(&[2, 4, a, b]);
                }
                let mut packet = recipe.build();
                assert_eq!(mss_clamp(&mut packet, mtu, !full), changed, "{mtu}");
                assert_eq!(packet, clamped.build());
            }
        }
    }
}

#[test]
fn only_syn_and_only_with_the_option() {
    let clamp = |recipe: Recipe| mss_clamp(&mut recipe.full().build(), 1280, false);
    assert!(clamp(syn(V4, &MSS_1460)));
    assert!(clamp(syn(V4, &MSS_1460).flags(SYN | ACK | ECE)));
    assert!(!clamp(syn(V4, &MSS_1460).flags(ACK)));
    assert!(!clamp(syn(V4, &[])));
    assert!(!clamp(syn(V4, &[1, 1, 1, 1])));
    assert!(!clamp(syn(V4, &[0, 2, 4, 0x05, 0xb4, 0, 0, 0])), "behind the end of the options");
    assert!(!clamp(syn(V4, &[2, 3, 0x05, 0xb4])), "wrong length");
    assert!(!clamp(syn(V4, &[8, 0, 2, 4, 0x05, 0xb4, 0, 0])), "option of length zero");
    assert!(!clamp(syn(V4, &[8, 1, 2, 4, 0x05, 0xb4, 0, 0])), "option of length one");
    assert!(!clamp(syn(V4, &[1, 1, 2, 4])), "the value is beyond the header");
    assert!(!clamp(syn(V4, &[8, 200, 2, 4])), "an option longer than the header");
    assert!(!clamp(Recipe::udp(V4, payload(40))));
    let mut fragment = syn(V4, &MSS_1460).full().build();
    fragment[6] = 0x20;
    assert!(!mss_clamp(&mut fragment, 1280, false));
    assert!(!mss_clamp(&mut [], 1280, false));
}

#[test]
fn payload_behind_the_header_is_not_read_as_options() {
    let mut recipe = syn(V4, &[1, 1, 1, 1]);
    recipe.payload = MSS_1460.to_vec();
    assert!(!mss_clamp(&mut recipe.full().build(), 1280, false));
}

proptest! {
    /// At any place among NOPs, at odd offsets too, with any other value.
    #[test]
    fn keeps_checksums(before in 0usize..9, mss: u16, mtu in 88u16..2000, id: u16, sequence: u32, six: bool) {
        let mut options = vec![1; 12];
        let [a, b] = mss.to_be_bytes();
        options[before..before + 4].fill(0);
        options.splice(before..before + 4, [2, 4, a, b]);
        options.truncate(12);
        let mut recipe = syn(if six { V6 } else { V4 }, &options);
        recipe.id = id;
        recipe.tcp.as_mut().unwrap().sequence = sequence;
        let fixed = if six { 60 } else { 40 };

        let mut partial = recipe.build();
        let mut expected = partial.clone();
        let changed = mss > mtu - fixed;
        prop_assert_eq!(mss_clamp(&mut partial, mtu, true), changed);
        if changed {
            let at = recipe.ip_bytes() + 20 + before + 2;
            expected[at..at + 2].copy_from_slice(&(mtu - fixed).to_be_bytes());
        }
        prop_assert_eq!(&partial, &expected);

        let mut full = recipe.full().build();
        prop_assert_eq!(mss_clamp(&mut full, mtu, false), changed);
        prop_assert!(verify_packet(&full));
    }

    #[test]
    fn any_bytes(mut bytes in prop::collection::vec(any::<u8>(), 40..100), mtu: u16, partial: bool) {
        bytes[0] = 0x45;
        bytes[2..4].copy_from_slice(&[0, 40]);
        bytes[6..8].fill(0);
        bytes[9] = 6;
        bytes[33] |= SYN;
        let before = bytes.clone();
        let changed = mss_clamp(&mut bytes, mtu, partial);
        prop_assert_eq!(changed, bytes != before);
        prop_assert_eq!(bytes.len(), before.len());
    }
}
