//! One situation each.

use super::*;

const T: Time = Time::from_ms(1_000);

#[test]
fn in_order_packets_never_wait_and_memory_stays_small() {
    let mut orderer = orderer(2, Some(20_000));
    let mut stamper = Stamper::new();
    for n in 0..200_000_u32 {
        let path = (n / 5 % 2) as u8;
        let order = stamper.next(n as usize % 7, path);
        assert_eq!(orderer.admit(T.plus_us(n.into()), path, order), Admit::Deliver);
        assert_eq!(orderer.pop_ready(T.plus_us(n.into())), None);
    }
    assert_eq!(orderer.window.bytes(), 16 * 24);
    assert_eq!(orderer.held.len(), 0);
    assert_eq!(orderer.next_deadline(), None);
    let stats = orderer.stats();
    assert_eq!((stats.delivered, stats.holds, stats.late), (200_000, 0, 0));
}

#[test]
fn a_packet_waits_for_its_flow_only() {
    let mut orderer = orderer(2, None);
    let mut stamper = Stamper::new();
    let slow = stamper.next(1, 0);
    let after = stamper.next(1, 1);
    let other = stamper.next(2, 1);
    let after_that = stamper.next(1, 1);
    assert_eq!(arrive(&mut orderer, T, 1, after), []);
    assert_eq!(arrive(&mut orderer, T, 1, other), [2], "another flow passes");
    assert_eq!(arrive(&mut orderer, T, 1, after_that), []);
    assert_eq!(arrive(&mut orderer, T.plus_ms(3), 0, slow), [0, 1, 3]);
    let stats = orderer.stats();
    assert_eq!((stats.held_now, stats.held_max, stats.holds, stats.late), (0, 2, 2, 0));
    assert_eq!(stats.residence.iter().sum::<u64>(), 2);
    assert_eq!(stats.residence[12], 2, "3 ms lies between 2,048 and 4,095 µs");
}

#[test]
fn three_packets_beyond_on_every_path_declare_a_loss() {
    let mut orderer = orderer(2, None);
    // Stamp 0 is lost, 1 waits for it. Three packets beyond it on path 0 ...
    for stamp in 1..=3 {
        let expected: &[u32] = if stamp == 1 { &[] } else { &[stamp] };
        assert_eq!(arrive(&mut orderer, T, 0, order(stamp, u16::from(stamp == 1))), expected);
    }
    // ... and three on path 1.
    assert_eq!(arrive(&mut orderer, T, 1, order(4, 0)), [4]);
    assert_eq!(arrive(&mut orderer, T, 1, order(5, 0)), [5]);
    assert_eq!(arrive(&mut orderer, T, 1, order(6, 0)), [6, 1]);
    assert_eq!(orderer.stats().declared_lost, 1);
    assert_eq!(orderer.stats().late, 0);
    // It comes after all: written out, counted, and whoever follows it need not wait.
    assert_eq!(orderer.admit(T, 0, order(0, 0)), Admit::Late);
    assert_eq!(orderer.stats().late, 1);
    assert_eq!(orderer.stats().repeated, 0);
    // It was overtaken by three on its own path: the path is trusted less now.
    assert_eq!(orderer.tolerance(0), Some((4, 2_000)));
}

#[test]
fn one_packet_beyond_declares_a_loss_after_two_milliseconds() {
    let mut orderer = orderer(2, None);
    assert_eq!(arrive(&mut orderer, T, 0, order(1, 1)), []);
    assert_eq!(
        orderer.next_deadline(),
        Some(T.plus_ms(5)),
        "path 1 has not passed: only the deadline counts"
    );
    assert_eq!(arrive(&mut orderer, T.plus_us(500), 1, order(2, 0)), [2]);
    let due = orderer.next_deadline().unwrap();
    assert_eq!(due, T.plus_us(2_500));
    assert_eq!(at(&mut orderer, Time::from_ns(due.ns() - 1)), []);
    assert_eq!(at(&mut orderer, due), [1]);
    assert_eq!(orderer.stats().declared_lost, 1);
    assert_eq!(orderer.next_deadline(), None);
}

#[test]
fn markers_stand_for_idle_paths() {
    let mut orderer = orderer(3, None);
    assert_eq!(arrive(&mut orderer, T, 0, order(11, 1)), []);
    orderer.marker(T.plus_us(100), 1, 11);
    assert_eq!(at(&mut orderer, T.plus_us(100)), []);
    orderer.marker(T.plus_us(300), 2, 11);
    assert_eq!(at(&mut orderer, T.plus_us(300)), []);
    assert_eq!(orderer.next_deadline(), Some(T.plus_us(2_300)));
    assert_eq!(at(&mut orderer, T.plus_us(2_300)), [11]);
    assert_eq!(orderer.stats().deadline_expired, 0);
}

#[test]
fn a_marker_covers_its_own_stamp() {
    let mut orderer = orderer(1, None);
    assert_eq!(arrive(&mut orderer, T, 0, order(0, 0)), [0]);
    // Stamp 1 was lost; the marker tells that it went out.
    orderer.marker(T, 0, 1);
    assert_eq!(arrive(&mut orderer, T.plus_ms(2), 0, order(2, 1)), [2]);
    assert_eq!(orderer.stats().holds, 0, "known as lost before its successor came");
    // A packet right behind a marker that is long past is no reordering.
    orderer.marker(T.plus_ms(3), 0, 2);
    assert_eq!(arrive(&mut orderer, T.plus_ms(90), 0, order(3, 0)), [3]);
    assert_eq!(orderer.tolerance(0), Some((3, 2_000)));
}

#[test]
fn a_marker_may_be_the_first_to_arrive() {
    let mut orderer = orderer(2, None);
    orderer.marker(T, 1, u32::MAX);
    assert!(!orderer.started, "nothing was sent before stamp 0");
    orderer.marker(T, 1, 2);
    assert_eq!(arrive(&mut orderer, T.plus_ms(1), 0, order(1, 1)), []);
    assert_eq!(arrive(&mut orderer, T.plus_ms(1), 0, order(2, 0)), [2]);
    assert_eq!(arrive(&mut orderer, T.plus_ms(3), 0, order(3, 0)), [3, 1], "path 1 had passed 0 by then");
    assert_eq!(orderer.window.bytes(), 16 * 24);
}

#[test]
fn a_flow_on_one_path_passes_its_losses() {
    let mut orderer = orderer(3, None);
    let mut stamper = Stamper::new();
    assert!(!stamper.next(5, 1).same_path);
    let lost = stamper.next(5, 1);
    let next = stamper.next(5, 1);
    assert!(lost.same_path && next.same_path);
    assert_eq!(arrive(&mut orderer, T, 1, next), [2]);
    // With recovery on it would come again, so it is worth waiting.
    orderer.set_paths(&equal_paths(3), Some(30_000));
    let lost = stamper.next(5, 1);
    let next = stamper.next(5, 1);
    assert_eq!(lost.stamp, 3);
    assert_eq!(arrive(&mut orderer, T, 1, next), []);
    assert_eq!(arrive(&mut orderer, T.plus_ms(12), 255, lost), [3, 4], "sent again over another path");
}

#[test]
fn same_path_does_not_pass_a_packet_that_is_held() {
    let mut orderer = orderer(2, None);
    let held = order(1, 1);
    assert_eq!(arrive(&mut orderer, T, 0, held), []);
    let after = Order { stamp: 2, back: 1, same_path: true };
    assert_eq!(arrive(&mut orderer, T, 0, after), []);
    assert_eq!(arrive(&mut orderer, T, 1, order(0, 0)), [0, 1, 2]);
    // And once all that has left, a loss may be passed again.
    assert_eq!(arrive(&mut orderer, T, 0, Order { stamp: 4, back: 1, same_path: true }), [4]);
}

#[test]
fn recovery_waits_from_the_moment_all_paths_passed() {
    let mut orderer = orderer(2, Some(20_000));
    orderer.set_budget_us(100_000);
    assert_eq!(arrive(&mut orderer, T, 0, order(1, 1)), []);
    for stamp in 2..=4 {
        assert_eq!(arrive(&mut orderer, T, 0, order(stamp, 0)), [stamp]);
        assert_eq!(arrive(&mut orderer, T, 1, order(stamp + 3, 0)), [stamp + 3]);
    }
    assert_eq!(orderer.next_deadline(), Some(T.plus_ms(20)));
    // A second loss later has a wait of its own.
    let later = T.plus_ms(15);
    assert_eq!(arrive(&mut orderer, later, 0, order(9, 1)), []);
    for stamp in 10..=12 {
        assert_eq!(arrive(&mut orderer, later, 0, order(stamp, 0)), [stamp]);
        assert_eq!(arrive(&mut orderer, later, 1, order(stamp + 3, 0)), [stamp + 3]);
    }
    assert_eq!(at(&mut orderer, Time::from_ns(T.plus_ms(20).ns() - 1)), []);
    assert_eq!(at(&mut orderer, T.plus_ms(20)), [1]);
    assert_eq!(orderer.next_deadline(), Some(T.plus_ms(35)));
    assert_eq!(arrive(&mut orderer, T.plus_ms(30), 255, order(8, 0)), [8, 9], "recovered in time");
    assert_eq!(orderer.stats().declared_lost, 1);
    assert_eq!(orderer.stats().late, 0);
    assert_eq!(orderer.tolerance(0), Some((3, 2_000)), "a recovered packet is no reordering");
}

#[test]
fn each_held_packet_has_its_deadline() {
    let mut orderer = Orderer::new(100);
    let timings = [
        PathTiming { path: 0, delay_us: -7_000, jitter_us: 100 },
        PathTiming { path: 1, delay_us: 33_000, jitter_us: 1_000 },
        // Silent, so that nothing is declared lost.
        PathTiming { path: 2, delay_us: 0, jitter_us: 0 },
    ];
    orderer.set_paths(&timings, None);
    // The latest arrival is 33 + 4 × 1 ms: 44 ms behind path 0, 4 ms behind path 1. Slack 5 ms.
    assert_eq!(arrive(&mut orderer, T, 0, order(10, 1)), []);
    assert_eq!(orderer.next_deadline(), Some(T.plus_ms(49)));
    assert_eq!(arrive(&mut orderer, T.plus_ms(1), 1, order(20, 1)), []);
    assert_eq!(orderer.next_deadline(), Some(T.plus_ms(10)));
    // Overdue means: everything up to stamp 19 is. So the older one leaves, too, and first.
    assert_eq!(at(&mut orderer, T.plus_ms(10)), [10, 20]);
    assert_eq!(orderer.stats().deadline_expired, 2);
    // The budget caps.
    orderer.set_budget_us(30_000);
    assert_eq!(arrive(&mut orderer, T.plus_ms(50), 0, order(40, 1)), []);
    assert_eq!(orderer.next_deadline(), Some(T.plus_ms(80)));
    // An unknown path waits as long as the fastest would.
    orderer.set_budget_us(150_000);
    assert_eq!(arrive(&mut orderer, T.plus_ms(80), 255, order(50, 1)), [40]);
    assert_eq!(orderer.next_deadline(), Some(T.plus_ms(80 + 49)));
}

#[test]
fn a_deadline_keeps_a_flow_in_order_when_several_are_missing() {
    let mut orderer = orderer(2, None);
    // One flow: 0 missing, 1 held, 2 held, 3 missing, 4 held, 5 missing, 6 held.
    for stamp in [6, 4, 2, 1] {
        assert_eq!(arrive(&mut orderer, T, 0, order(stamp, 1)), []);
    }
    assert_eq!(at(&mut orderer, T.plus_ms(5)), [1, 2, 4, 6]);
    assert_eq!(orderer.stats().deadline_expired, 3);
    for stamp in [0, 3, 5] {
        assert_eq!(orderer.admit(T.plus_ms(6), 1, order(stamp, u16::from(stamp > 0))), Admit::Late);
    }
    assert_eq!(arrive(&mut orderer, T.plus_ms(6), 0, order(7, 1)), [7]);
}

#[test]
fn a_chain_of_losses_is_given_up_at_once() {
    let mut orderer = orderer(1, Some(1_000));
    assert_eq!(arrive(&mut orderer, T, 0, order(0, 0)), [0]);
    // 1, 2, 3 lost; their flow goes on with 4 and 5.
    assert_eq!(arrive(&mut orderer, T, 0, order(4, 1)), []);
    assert_eq!(arrive(&mut orderer, T, 0, order(5, 1)), []);
    assert_eq!(arrive(&mut orderer, T, 0, order(6, 0)), [6]);
    assert_eq!(arrive(&mut orderer, T.plus_us(1_500), 0, order(7, 0)), [7, 4, 5]);
    assert_eq!(orderer.stats().declared_lost, 1, "only 3 was waited for");
}

#[test]
fn a_path_that_leaves_is_not_waited_for() {
    let mut orderer = orderer(2, None);
    assert_eq!(arrive(&mut orderer, T, 0, order(1, 1)), []);
    for stamp in 2..=4 {
        assert_eq!(arrive(&mut orderer, T, 0, order(stamp, 0)), [stamp]);
    }
    orderer.set_paths(&equal_paths(1), None);
    assert_eq!(at(&mut orderer, T), [1]);
    // What still comes over it is written out.
    assert_eq!(orderer.admit(T.plus_ms(1), 1, order(0, 0)), Admit::Late);
    assert_eq!(orderer.tolerance(1), None);
}

#[test]
fn a_path_that_joins_is_not_asked_about_the_past() {
    let mut orderer = orderer(1, None);
    for stamp in 1..=9 {
        arrive(&mut orderer, T, 0, order(stamp, 0));
    }
    assert_eq!(arrive(&mut orderer, T, 0, order(12, 2)), []);
    orderer.set_paths(&equal_paths(2), None);
    assert_eq!(arrive(&mut orderer, T, 0, order(13, 0)), [13]);
    assert_eq!(arrive(&mut orderer, T, 0, order(14, 0)), [14, 12], "path 1 was not there when 10 was sent");
    // Stamp 15 may have taken it.
    assert_eq!(arrive(&mut orderer, T, 0, order(16, 1)), []);
    for stamp in 17..=30 {
        assert_eq!(arrive(&mut orderer, T, 0, order(stamp, 0)), [stamp]);
    }
    // A straggler from before does not count as reordering of the new path.
    assert_eq!(orderer.admit(T.plus_ms(30), 1, order(11, 0)), Admit::Late);
    assert_eq!(orderer.tolerance(1), Some((3, 2_000)));
    assert_eq!(arrive(&mut orderer, T, 1, order(15, 0)), [15, 16]);
}

#[test]
fn without_paths_nothing_is_held() {
    let mut orderer = orderer(0, Some(0));
    assert_eq!(arrive(&mut orderer, T, 0, order(9, 3)), [9]);
    assert_eq!(arrive(&mut orderer, T, 3, order(4, 1)), [4]);
    assert_eq!(orderer.stats().holds, 0);
    // And when the last path leaves, what was held goes.
    let mut orderer = super::orderer(1, None);
    assert_eq!(arrive(&mut orderer, T, 0, order(9, 3)), []);
    orderer.set_paths(&[], None);
    assert_eq!(at(&mut orderer, T), [9]);
}

#[test]
fn the_limit_ends_the_longest_wait() {
    let mut orderer = Orderer::new(4);
    orderer.set_paths(&equal_paths(2), Some(50_000));
    // Six flows, each waits for a packet of its own.
    for n in 0..6_u32 {
        let stamp = 101 + 2 * n;
        let expected: &[u32] = match n {
            4 => &[101],
            5 => &[103],
            _ => &[],
        };
        assert_eq!(arrive(&mut orderer, T, 0, order(stamp, 1)), expected);
        assert!(orderer.stats().held_now <= 4);
    }
    let stats = orderer.stats();
    assert_eq!((stats.overflowed, stats.held_max), (2, 5));
    // Nobody takes them out: at last the packet comes back.
    let mut refused = Vec::new();
    for n in 0..200 {
        let order = order(1_001 + 2 * n, 1);
        assert_eq!(orderer.admit(T, 0, order), Admit::Hold);
        refused.extend(orderer.hold(T, 0, order, order.stamp).err());
    }
    assert_eq!(orderer.stats().held_now, 4 + 64);
    assert_eq!(refused.len(), 200 - 64);
    let mut rest = at(&mut orderer, T.plus_ms(200));
    rest.sort_unstable();
    assert_eq!(rest.len(), 68);
    // A limit of nothing passes everything on.
    let mut orderer = Orderer::new(0);
    orderer.set_paths(&equal_paths(2), None);
    assert_eq!(orderer.admit(T, 0, order(5, 1)), Admit::Hold);
    assert_eq!(orderer.hold(T, 0, order(5, 1), 5), Err(5));
    assert_eq!(orderer.admit(T, 0, order(6, 1)), Admit::Deliver);
}

#[test]
fn stamps_wrap() {
    let mut orderer = orderer(2, None);
    let mut stamper = Stamper::starting_at(u32::MAX - 2);
    let orders: Vec<Order> = (0..6).map(|n| stamper.next(0, n % 2)).collect();
    assert_eq!(orders[3], order(0, 1));
    // The odd path first, then the even one.
    for n in [1, 3, 5] {
        assert_eq!(arrive(&mut orderer, T, 1, orders[n]), []);
    }
    assert_eq!(arrive(&mut orderer, T, 0, orders[0]), [u32::MAX - 2, u32::MAX - 1]);
    assert_eq!(arrive(&mut orderer, T, 0, orders[2]), [u32::MAX, 0]);
    assert_eq!(arrive(&mut orderer, T, 0, orders[4]), [1, 2]);
    assert_eq!(orderer.stats().late, 0);
}

#[test]
fn the_first_to_arrive_need_not_be_the_first_sent() {
    for first in [0, 1, 63, 64, 1_000, 40_000] {
        let mut orderer = orderer(2, None);
        assert_eq!(arrive(&mut orderer, T, 0, order(first + 1, 1)), []);
        assert_eq!(arrive(&mut orderer, T, 1, order(first, 0)), [first, first + 1]);
        if first > 0 {
            assert_eq!(orderer.admit(T, 1, order(0, 0)), Admit::Deliver);
        }
    }
}

#[test]
fn the_window_slides_over_what_never_comes() {
    let mut orderer = orderer(2, None);
    orderer.set_budget_us(u32::MAX);
    // Path 1 is silent, so nothing is ever declared lost; the flow of stamp 1 waits for stamp 0.
    orderer.set_paths(
        &[
            PathTiming { path: 0, ..PathTiming::default() },
            PathTiming { path: 1, delay_us: 3_600_000_000, jitter_us: 0 },
        ],
        None,
    );
    assert_eq!(arrive(&mut orderer, T, 0, order(1, 1)), []);
    let mut released = None;
    for stamp in 2..140_000_u32 {
        let out = arrive(&mut orderer, T.plus_us(stamp.into()), 0, order(stamp, u16::from(stamp > 2)));
        assert_eq!(out[0], stamp);
        if out.len() > 1 {
            assert_eq!(out[1..], [1]);
            assert_eq!(released.replace(stamp), None);
        }
    }
    let released = released.unwrap();
    assert!((65_472..=65_536).contains(&released), "after {released}");
    assert_eq!(orderer.window.bytes(), 24 * 1024);
    // Stamp 0 is outside now; so is everything else that old.
    assert_eq!(orderer.admit(T, 1, order(0, 0)), Admit::Late);
    // A predecessor outside the window counts as resolved.
    assert_eq!(arrive(&mut orderer, T, 0, order(140_000, 65_535)), [140_000]);
}

#[test]
fn a_long_gap_releases_everybody_in_order() {
    for gap in [1_100, 65_536, 70_000, 1 << 20, (1 << 31) - 1] {
        let mut orderer = orderer(2, Some(60_000));
        for stamp in [1, 2, 5, 9] {
            assert_eq!(arrive(&mut orderer, T, 0, order(stamp, 1)), []);
        }
        let out = arrive(&mut orderer, T, 0, order(9 + gap, 0));
        if gap < 65_536 {
            assert_eq!(out, [9 + gap]);
            assert_eq!(arrive(&mut orderer, T, 1, order(4, 0)), [4, 5]);
        } else {
            assert_eq!(out, [9 + gap, 1, 2, 5, 9]);
        }
        assert_eq!(arrive(&mut orderer, T, 0, order(10 + gap, 1)), [10 + gap]);
    }
}

#[test]
fn copies_are_written_out_and_counted() {
    let mut orderer = orderer(2, None);
    assert_eq!(arrive(&mut orderer, T, 0, order(1, 1)), []);
    assert_eq!(orderer.admit(T, 1, order(1, 1)), Admit::Late, "a copy of one that is held");
    assert_eq!(arrive(&mut orderer, T, 1, order(0, 0)), [0, 1]);
    assert_eq!(orderer.admit(T, 0, order(1, 1)), Admit::Late);
    let stats = orderer.stats();
    assert_eq!((stats.late, stats.repeated, stats.delivered), (2, 2, 4));
    assert_eq!(orderer.tolerance(1), Some((3, 2_000)), "a copy says nothing about reordering");
    // Many copies, but never many in a row, are no new count: who waits goes on waiting.
    assert_eq!(arrive(&mut orderer, T, 0, order(20, 1)), []);
    for stamp in 2..10 {
        assert_eq!(arrive(&mut orderer, T, 0, order(stamp, 1)), [stamp]);
        for _ in 0..60 {
            assert_eq!(orderer.admit(T, 0, order(stamp, 1)), Admit::Late);
        }
    }
    assert_eq!(arrive(&mut orderer, T, 1, order(19, 0)), [19, 20]);
}

#[test]
fn a_sender_that_counts_anew_is_followed() {
    for top in [500_u32, 5_000, 1 << 20, 0xffff_ff00] {
        let mut orderer = orderer(2, None);
        let mut stamper = Stamper::starting_at(top - 300);
        for _ in 0..300 {
            arrive(&mut orderer, T, 0, stamper.next(0, 0));
        }
        assert_eq!(arrive(&mut orderer, T, 0, order(top + 1, 1)), []);
        let mut stamper = Stamper::starting_at(top - 300);
        let mut last = Vec::new();
        for _ in 0..64 {
            last = arrive(&mut orderer, T, 0, stamper.next(0, 0));
        }
        assert_eq!(last, [top - 237, top + 1], "followed, and nothing is left behind");
        // From here on it is a stream like any other.
        let (a, b) = (stamper.next(0, 0), stamper.next(0, 1));
        assert_eq!(arrive(&mut orderer, T, 1, b), []);
        assert_eq!(arrive(&mut orderer, T, 0, a), [a.stamp, b.stamp]);
        assert_eq!(orderer.stats().late, 64);
    }
}

#[test]
fn a_restart_that_is_announced_costs_nothing() {
    let mut orderer = orderer(2, None);
    for stamp in [70_001, 70_003] {
        assert_eq!(arrive(&mut orderer, T, 0, order(stamp, 1)), []);
    }
    orderer.restart();
    assert_eq!(at(&mut orderer, T), [70_001, 70_003]);
    assert_eq!(arrive(&mut orderer, T, 0, order(0, 0)), [0]);
    assert_eq!(arrive(&mut orderer, T, 1, order(2, 1)), []);
    assert_eq!(arrive(&mut orderer, T, 0, order(1, 1)), [1, 2]);
    assert_eq!(orderer.stats().late, 0);
}

#[test]
fn released_packets_go_before_a_younger_one_of_their_flow() {
    let mut orderer = orderer(1, None);
    let held = order(1, 1);
    assert_eq!(orderer.admit(T, 0, held), Admit::Hold);
    orderer.hold(T, 0, held, 1).unwrap();
    // 2 is missing, too. The third packet beyond makes both lost, and is of the same flow.
    for stamp in [4, 5] {
        assert_eq!(orderer.admit(T, 0, order(stamp, 0)), Admit::Deliver);
    }
    let young = order(6, 4);
    assert_eq!(orderer.admit(T, 0, young), Admit::Hold, "1 was released but not taken");
    orderer.hold(T, 0, young, 6).unwrap();
    assert_eq!(orderer.next_deadline(), Some(Time::ZERO));
    assert_eq!(at(&mut orderer, T), [1, 6]);
}

#[test]
fn the_stamper_counts_distances() {
    let mut stamper = Stamper::new();
    assert_eq!(stamper.marker(), None);
    assert_eq!(stamper.next(3, 0), order(0, 0));
    assert_eq!(stamper.next(4, 0), order(1, 0));
    assert_eq!(stamper.next(3 + FLOW_BUCKETS, 0), Order { stamp: 2, back: 2, same_path: true });
    assert_eq!(stamper.marker(), Some(2));
    for _ in 0..65_534 {
        stamper.next(5, 0);
    }
    assert_eq!(stamper.next(3, 0), Order { stamp: 65_537, back: 65_535, same_path: true });
    for _ in 0..65_535 {
        stamper.next(5, 0);
    }
    assert_eq!(stamper.next(3, 0), order(131_073, 0), "outside the window");
}

#[test]
fn same_path_is_said_only_when_other_paths_are_settled() {
    let mut stamper = Stamper::new();
    stamper.tick(T, 30_000);
    stamper.next(0, 0);
    assert!(stamper.next(0, 0).same_path);
    assert!(!stamper.next(0, 1).same_path);
    assert!(!stamper.next(0, 1).same_path, "stamp 1 may still be under way on path 0");
    stamper.tick(T.plus_ms(29), 30_000);
    assert!(!stamper.next(0, 1).same_path);
    stamper.tick(T.plus_ms(30), 30_000);
    assert!(!stamper.next(0, 1).same_path, "it is 30 ms since the last tick, not since stamp 1");
    stamper.tick(T.plus_ms(60), 30_000);
    assert!(stamper.next(0, 1).same_path);
    // Another flow is not affected by the change, and stamps alone settle it, too.
    assert!(!stamper.next(1, 0).same_path);
    assert!(!stamper.next(1, 1).same_path);
    for n in 0..65_536 {
        assert_eq!(stamper.next(2, 0).same_path, n > 0);
    }
    stamper.next(1, 1);
    assert!(stamper.next(1, 1).same_path);
}
