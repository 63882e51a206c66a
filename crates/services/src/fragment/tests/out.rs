use super::*;
use packet::checksum::verify_ipv4_header;
use proptest::prelude::*;

fn cut(packet: &[u8], mtu: usize, id: Option<u32>) -> Result<Vec<Vec<u8>>, DropReason> {
    let mut fragments = Vec::new();
    let mut emit = |fragment: &[u8]| fragments.push(fragment.to_vec());
    fragment_out(packet, mtu, id, &mut Vec::new(), &mut emit)?;
    Ok(fragments)
}

#[test]
fn what_fits_stays_as_it_is() {
    for recipe in [V4, V6, Recipe { dont_fragment: true, ..V4 }] {
        let packet = recipe.whole(&udp(100));
        assert_eq!(cut(&packet, packet.len(), None), Ok(vec![packet.clone()]));
        let mut padded = packet.clone();
        padded.push(0);
        assert_eq!(cut(&padded, packet.len(), None), Ok(vec![packet]));
    }
}

#[test]
fn what_must_not_be_cut() {
    let v4 = V4.whole(&udp(100));
    let v6 = V6.whole(&udp(100));
    let cases = [
        ("DF", Recipe { dont_fragment: true, ..V4 }.whole(&udp(100)), 100, Some(1)),
        ("IPv6 of somebody else", v6.clone(), 100, None),
        ("IPv6 fragment", V6.fragment(8, true, &[0; 80]), 100, Some(1)),
        ("no room", v4, 27, None),
        ("no room", v6, 55, Some(1)),
        ("only a header", V4.whole(&[]), 19, None),
        ("only a header", V6.whole(&[]), 39, Some(1)),
    ];
    for (name, packet, mtu, id) in cases {
        assert_eq!(cut(&packet, mtu, id), Err(DropReason::TooBig), "{name}");
    }
    let far = V4.fragment(65_528, true, &[0; 80]);
    assert_eq!(cut(&far, 68, None), Err(DropReason::FragmentInvalid));
    assert_eq!(cut(&[0x45], 68, None), Err(DropReason::IpMalformed));
}

#[test]
fn cut_as_by_hand() {
    let payload = udp(100);
    assert_eq!(cut(&V4.whole(&payload), 68, None), Ok(V4.cut(&payload, 48)));
    assert_eq!(cut(&V4.whole(&payload), 71, None), Ok(V4.cut(&payload, 48)), "a multiple of 8");
    assert_eq!(cut(&V6.whole(&payload), 99, Some(V6.id)), Ok(V6.cut(&payload, 48)));
    // The last one may be as long as the link carries.
    assert_eq!(cut(&V4.whole(&udp(51)), 70, None).unwrap().len(), 2);
    let routing = Recipe { extensions: (43, vec![0, 0, 0, 0, 0, 0, 0, 0]), ..V6 };
    assert_eq!(cut(&routing.whole(&payload), 104, Some(V6.id)), Ok(routing.cut(&payload, 48)));
    // Destination options without a routing header belong to the payload.
    let options = Recipe { extensions: (60, vec![0, 0, 1, 4, 0, 0, 0, 0]), ..V6 };
    let behind = Recipe { protocol: 60, ..V6 };
    let mut whole = vec![17, 0, 1, 4, 0, 0, 0, 0];
    whole.extend(&payload);
    assert_eq!(cut(&options.whole(&payload), 96, Some(V6.id)), Ok(behind.cut(&whole, 48)));
}

/// A bridged fragment that is too long for its link is cut further (RFC 791 §3.2).
#[test]
fn fragments_are_cut_further() {
    let payload = udp(200);
    let [first, last] = &V4.cut(&payload, 104)[..] else { panic!("two") };
    let mut all = cut(first, 76, None).unwrap();
    all.extend(cut(last, 76, None).unwrap());
    let wanted: Vec<_> = [(0, 56), (56, 104), (104, 160), (160, 200)]
        .map(|(from, to)| V4.fragment(from, to < 200, &payload[from..to]))
        .to_vec();
    assert_eq!(all, wanted);
}

/// Options that every fragment needs are copied, others not.
#[test]
fn options() {
    // Record route (not copied), end of list; loose source route (copied) behind a no-op.
    let record = vec![7, 7, 4, 0, 0, 0, 0, 0];
    let source = vec![1, 0x83, 7, 4, 10, 0, 0, 1];
    let both = Recipe { options: [source.clone(), record.clone()].concat(), ..V4 };
    let fragments = cut(&both.whole(&udp(200)), 100, None).unwrap();
    assert_eq!(fragments[0][20..36], both.options[..]);
    assert_eq!(header(&fragments[0]).payload_bytes(), 64);
    for fragment in &fragments[1..] {
        assert_eq!(header(fragment).header_bytes, 28);
        assert_eq!(fragment[20..28], [0x83, 7, 4, 10, 0, 0, 1, 0]);
        assert!(verify_ipv4_header(&fragment[..28]));
    }
    let none = Recipe { options: record, ..V4 };
    assert_eq!(header(&cut(&none.whole(&udp(200)), 100, None).unwrap()[1]).header_bytes, 20);
    // Lengths that cannot be end the walk.
    for bad in [vec![0x83, 0, 1, 1], vec![0x83, 1, 1, 9], vec![1, 1, 1, 0x83]] {
        let bad = Recipe { options: bad, ..V4 };
        assert!(cut(&bad.whole(&udp(200)), 100, None).is_ok());
    }
}

proptest! {
    /// Fragments that are cut go through both halves and come out the same.
    #[test]
    fn cut_and_assembled(six: bool, bytes in 8usize..3_000, mtu in 56usize..1_500, seed: u64, tos: u8) {
        let recipe = Recipe { tos, ..if six { V6 } else { V4 } };
        // Not more fragments than a packet may have.
        let mtu = mtu.max(bytes / 100 + 64);
        let whole = recipe.whole(&udp(bytes));
        let mut fragments = cut(&whole, mtu, Some(recipe.id)).unwrap();
        prop_assert!(fragments.iter().all(|fragment| fragment.len() <= mtu));
        for fragment in &fragments {
            prop_assert!(six || verify_ipv4_header(&fragment[..20]));
        }
        if fragments.len() == 1 {
            prop_assert_eq!(&fragments[0], &whole);
            return Ok(());
        }
        let mut turn = seed;
        for at in (1..fragments.len()).rev() {
            turn = turn.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            fragments.swap(at, (turn >> 33) as usize % (at + 1));
        }
        let mut pair = model::Pair::new(ROOMY, Action::Assemble);
        let (last, others) = fragments.split_last().unwrap();
        for fragment in others {
            prop_assert_eq!(pair.push(0, fragment), Ok(vec![]));
        }
        prop_assert_eq!(pair.push(0, last), Ok(vec![whole]));
    }
}
