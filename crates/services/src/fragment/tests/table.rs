use super::*;

/// RFC 815: a packet is whole when no hole is left, in whatever order they are filled.
#[test]
fn every_order_of_five_fragments() {
    let payload = udp(8 * 9 + 1);
    for recipe in [V4, V6] {
        // Unequal ones; the last has one byte.
        let ends = [8, 32, 40, 72, 73];
        let mut from = 0;
        let fragments = ends.map(|end| {
            let fragment = recipe.fragment(from, end < 73, &payload[from..end]);
            from = end;
            fragment
        });
        let mut order = [0, 1, 2, 3, 4];
        for number in 0..120 {
            permute(number, &mut order);
            let mut table = told(Action::Assemble, &fragments[0]);
            for (count, at) in order.into_iter().enumerate() {
                let wanted = if count < 4 { Did::Held } else { Did::Whole(recipe.whole(&payload)) };
                assert_eq!(take(&mut table, 0, &fragments[at]), Ok(wanted), "{order:?}");
            }
            assert_eq!((table.bytes(), table.packets(), table.stats().completed), (0, 0, 1));
        }
    }
}

/// The permutation of that number.
fn permute(mut number: usize, order: &mut [usize; 5]) {
    *order = [0, 1, 2, 3, 4];
    for at in (1..5).rev() {
        order.swap(at, number % (at + 1));
        number /= at + 1;
    }
}

#[test]
fn bridged_fragments_go_on_in_the_order_of_arrival() {
    let fragments = V4.cut(&udp(90), 24);
    let mut table = told(Action::Bridge, &fragments[0]);
    for at in [2, 0, 3] {
        assert_eq!(take(&mut table, 0, &fragments[at]), Ok(Did::Bridge));
    }
    assert_eq!(take(&mut table, 0, &fragments[3]), Ok(Did::Copy));
    assert_eq!(table.told(&id_of(&fragments[0])).unwrap().1, Action::Bridge);
    assert_eq!(take(&mut table, 0, &fragments[1]), Ok(Did::Bridge));
    assert_eq!((table.packets(), table.bytes()), (0, 0), "forgotten when all came by");
    assert_eq!(take(&mut table, 0, &fragments[1]), Err(DropReason::FragmentTimeout), "not told");
}

#[test]
fn header_of_the_whole() {
    // The first fragment's options and class stay; DF, which its sender set on fragments, goes.
    let recipe = Recipe { options: vec![7, 3, 4, 0], tos: 0x28, dont_fragment: true, ..V4 };
    let payload = udp(100);
    let first = recipe.fragment(0, true, &payload[..56]);
    let last = V4.fragment(56, false, &payload[56..]);
    let wanted = Recipe { dont_fragment: false, ..recipe }.whole(&payload);
    let mut table = told(Action::Assemble, &first);
    assert_eq!(take(&mut table, 0, &last), Ok(Did::Held));
    match table.push(0, &id_of(&first), &first, &header(&first)) {
        Ok(Outcome::Whole(whole)) => {
            assert_eq!(whole.packet, wanted);
            assert_eq!((whole.id, whole.longest, whole.fragments), (0xbeef, 80, 2));
            assert_eq!(whole.key, tell(Action::Assemble, &first).key);
            assert!(packet::checksum::verify_ipv4_header(&whole.packet[..24]));
        }
        other => panic!("{other:?}"),
    }
    // IPv6: another header in front of the fragment header names what follows.
    let recipe = Recipe { extensions: (0, vec![0, 0, 1, 4, 0, 0, 0, 0]), ..V6 };
    let fragments = recipe.cut(&payload, 56);
    let mut table = told(Action::Assemble, &fragments[0]);
    assert_eq!(take(&mut table, 0, &fragments[1]), Ok(Did::Held));
    assert_eq!(take(&mut table, 0, &fragments[0]), Ok(Did::Whole(recipe.whole(&payload))));
}

/// RFC 3168 §5.3.
#[test]
fn congestion_marks() {
    let cases = [
        ([0, 0], Some(0)),
        ([2, 2], Some(2)),
        ([2, 3], Some(3)),
        ([3, 1], Some(3)),
        ([1, 2], Some(1)),
        ([3, 0], None),
        ([0, 3], None),
        ([0, 2], Some(0)),
    ];
    let payload = udp(48);
    for recipe in [V4, V6] {
        for (marks, wanted) in cases {
            let of = |mark| Recipe { tos: mark, ..recipe.clone() };
            let first = of(marks[0]).fragment(0, true, &payload[..24]);
            let last = of(marks[1]).fragment(24, false, &payload[24..]);
            let mut table = told(Action::Assemble, &first);
            assert_eq!(take(&mut table, 0, &first), Ok(Did::Held));
            let did = take(&mut table, 0, &last);
            match wanted {
                Some(mark) => assert_eq!(did, Ok(Did::Whole(of(mark).whole(&payload))), "{marks:?}"),
                None => {
                    assert_eq!(did, Err(DropReason::FragmentInvalid), "{marks:?}");
                    assert_eq!(table.late_drops().total(), 1, "the other one");
                    assert_eq!(table.stats().completed, 0);
                }
            }
        }
    }
}

/// The first fragment has more options than the others: all fit, but not the whole.
#[test]
fn too_long_with_the_first_header() {
    let recipe = Recipe { options: vec![1; 40], ..V4 };
    let first = recipe.fragment(0, true, &udp(32_768));
    let mut table = told(Action::Assemble, &first);
    assert_eq!(take(&mut table, 0, &first), Ok(Did::Held));
    let last = V4.fragment(32_768, false, &vec![0; 65_535 - 20 - 32_768]);
    assert_eq!(take(&mut table, 0, &last), Err(DropReason::FragmentInvalid));
    assert_eq!((table.stats().poisoned, table.late_drops().total()), (1, 1));
    let mut table = told(Action::Assemble, &V4.fragment(0, true, &udp(32_768)));
    take(&mut table, 0, &V4.fragment(0, true, &udp(32_768))).unwrap();
    match take(&mut table, 0, &last) {
        Ok(Did::Whole(packet)) => assert_eq!(packet.len(), 65_535, "the longest there is"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn contradictions_drop_what_is_held() {
    let fragments = V4.cut(&udp(96), 24);
    for action in [Action::Assemble, Action::Bridge] {
        let mut table = told(action, &fragments[0]);
        for fragment in &fragments[..3] {
            take(&mut table, 0, fragment).unwrap();
        }
        let bad = V4.fragment(80, false, &[0; 16]);
        take(&mut table, 0, &V4.fragment(72, true, &[0; 16])).unwrap();
        assert_eq!(take(&mut table, 0, &bad), Err(DropReason::FragmentOverlap));
        let held = if action == Action::Assemble { 4 } else { 0 };
        assert_eq!(table.late_drops().get(DropReason::FragmentOverlap), held);
        assert_eq!(take(&mut table, 0, &fragments[3]), Err(DropReason::FragmentOverlap));
        let again = tell(action, &fragments[0]);
        assert_eq!(table.tell(1, &again), Err(DropReason::FragmentOverlap), "stays refused");
        assert_eq!(table.tell(TIMEOUT, &again), Ok(()));
    }
}

#[test]
fn an_identification_used_anew() {
    let old = V4.cut(&udp(96), 24);
    let mut table = told(Action::Assemble, &old[0]);
    take(&mut table, 0, &old[1]).unwrap();
    take(&mut table, 0, &old[2]).unwrap();
    table.tell(1, &tell(Action::Assemble, &old[0])).unwrap();
    assert_eq!(table.late_drops().get(DropReason::FragmentTimeout), 2);
    let new = V4.cut(&udp(32), 16);
    assert_eq!(take(&mut table, 1, &new[1]), Ok(Did::Held));
    assert_eq!(take(&mut table, 1, &new[0]), Ok(Did::Whole(V4.whole(&udp(32)))));
}

#[test]
fn timeouts_and_what_is_no_fragment() {
    let fragments = V4.cut(&udp(96), 24);
    let mut table = told(Action::Assemble, &fragments[0]);
    take(&mut table, 9, &fragments[0]).unwrap();
    table.tick(TIMEOUT - 1);
    assert_eq!(table.packets(), 1);
    table.tick(TIMEOUT);
    assert_eq!((table.packets(), table.bytes()), (0, 0));
    assert_eq!((table.late_drops().get(DropReason::FragmentTimeout), table.stats().timed_out), (1, 1));
    assert_eq!(take(&mut table, TIMEOUT, &fragments[1]), Err(DropReason::FragmentTimeout));
    let id = id_of(&fragments[0]);
    for whole in [V4.whole(&udp(20)), V6.fragment(0, false, &udp(20))] {
        let result = table.push(0, &id, &whole, &header(&whole)).map(|_| ());
        assert_eq!(result, Err(DropReason::FragmentInvalid));
    }
}
