#![allow(clippy::unwrap_used, reason = "tests")]

use super::testbond::*;
use super::*;
use crate::rate::testlink::{MS, Noise, SECOND, Spec, Stalls, mbit};

fn path(id: u8, mbit_per_s: u64, delay_ms: i64) -> PathView {
    PathView {
        id,
        rate: mbit_per_s * 125_000,
        tx_free: Time::ZERO,
        delay_us: delay_ms * 1_000,
        unmeasured_us: 0,
        jitter_us: 0,
        tier: 0,
        usable: true,
    }
}

/// `count` packets in a row, booked; how many each path got. The clock stands still.
fn spread(paths: &mut [PathView], count: usize, policy: &ClassPolicy) -> Vec<usize> {
    let now = Time::from_ms(1);
    let mut got = vec![0; paths.len()];
    let mut last = None;
    for _ in 0..count {
        let Choice::Send { path, depart } = choose(now, paths, 1_500, policy, last) else { break };
        let view = paths.iter_mut().find(|view| view.id == path).unwrap();
        view.tx_free = depart.plus_ns(serialise_ns(1_500, view.rate));
        got[usize::from(path)] += 1;
        last = Some(path);
    }
    got
}

#[test]
fn nothing_usable_is_none() {
    assert_eq!(choose(Time::ZERO, &[], 1_500, &ClassPolicy::BULK, None), Choice::None);
    let down = PathView { usable: false, ..path(0, 100, 1) };
    let silent = PathView { rate: 0, ..path(1, 100, 1) };
    for policy in [ClassPolicy::BULK, ClassPolicy::SPARSE] {
        assert_eq!(choose(Time::ZERO, &[down, silent], 1_500, &policy, Some(0)), Choice::None);
        let strict = ClassPolicy { tier_max: 0, ..policy };
        let backup = PathView { tier: 1, ..path(2, 100, 1) };
        assert_eq!(choose(Time::ZERO, &[down, backup], 1_500, &strict, None), Choice::None);
        assert!(matches!(
            choose(Time::ZERO, &[down, backup], 1_500, &policy, None),
            Choice::Send { path: 2, .. }
        ));
    }
}

#[test]
fn the_lowest_tier_alone_is_used() {
    let paths = [PathView { tier: 2, ..path(0, 1_000, 1) }, PathView { tier: 1, ..path(1, 10, 50) }];
    let Choice::Send { path, .. } = choose(Time::ZERO, &paths, 1_500, &ClassPolicy::BULK, None) else {
        panic!()
    };
    assert_eq!(path, 1);
}

#[test]
fn equal_paths_share_by_rate_in_runs() {
    let mut paths = [path(0, 200, 10), path(1, 100, 10)];
    let got = spread(&mut paths, 10_000, &ClassPolicy::BULK);
    // 4 ms of booking: 67 and 33 packets, one run more or less.
    assert!((60..80).contains(&got[0]) && (28..45).contains(&got[1]), "{got:?}");
    assert!(matches!(choose(Time::from_ms(1), &paths, 1_500, &ClassPolicy::BULK, None), Choice::Wait { .. }));

    let mut paths = [path(0, 100, 10), path(1, 100, 10)];
    let (mut runs, mut packets, mut last) = (0u32, 0u32, None);
    while let Choice::Send { path, depart } = choose(Time::ZERO, &paths, 1_500, &ClassPolicy::BULK, last) {
        paths[usize::from(path)].tx_free = depart.plus_ns(serialise_ns(1_500, 12_500_000));
        runs += u32::from(last != Some(path));
        packets += 1;
        last = Some(path);
    }
    let length = f64::from(packets) / f64::from(runs);
    assert!((2.0..=20.0).contains(&length), "{length}");
}

#[test]
fn a_quick_path_is_booked_ahead_by_the_difference() {
    let mut paths = [path(0, 100, 10), path(1, 20, 40)];
    let got = spread(&mut paths, 10_000, &ClassPolicy::BULK);
    // 30 + 4 ms of 100 Mbit/s are 283 packets, 4 ms of 20 Mbit/s are 7.
    assert!((275..295).contains(&got[0]) && (5..13).contains(&got[1]), "{got:?}");
}

#[test]
fn unequal_paths_leave_out_what_costs_more_than_it_adds() {
    // Too far away for the class …
    assert_eq!(spread(&mut [path(0, 100, 10), path(1, 100, 300)], 10_000, &ClassPolicy::BULK)[1], 0);
    // … but a slow link with a low delay does not shut out a fast satellite …
    assert_eq!(spread(&mut [path(0, 2, 10), path(1, 100, 300)], 10_000, &ClassPolicy::BULK)[0], 0);
    // … and less than 2 % of the capacity is not worth 40 ms.
    let got = spread(&mut [path(0, 1_000, 10), path(1, 10, 50)], 100_000, &ClassPolicy::BULK);
    assert_eq!(got[1], 0);
    // The best path's bookings do not grow for paths that are left out.
    assert!(got[0] < 400, "{got:?}");
    // Without the others everything is used.
    assert!(spread(&mut [path(0, 2, 10)], 100, &ClassPolicy::BULK)[0] > 0);
}

#[test]
fn waits_for_the_quick_path_rather_than_take_the_slow_one() {
    let now = Time::from_ms(1);
    // Booked up, free again in 6 ms; the other would take 64 KB for half a second.
    let quick = PathView { tx_free: Time::from_ms(7), ..path(0, 100, 10) };
    let slow = path(1, 1, 10);
    let choice = choose(now, &[quick, slow], 65_536, &ClassPolicy::BULK, None);
    assert_eq!(choice, Choice::Wait { until: Time::from_ms(3) });
    // Not worth waiting for: a quarter is not gained.
    let fair = path(1, 90, 10);
    let choice = choose(now, &[quick, fair], 65_536, &ClassPolicy::BULK, None);
    assert_eq!(choice, Choice::Send { path: 1, depart: now });
}

#[test]
fn sparse_packets_pass_bookings_but_not_without_limit() {
    let now = Time::from_ms(100);
    let mut quick = PathView { tx_free: Time::from_ms(130), ..path(0, 100, 10) };
    let slow = path(1, 20, 40);
    let choice = choose(now, &[quick, slow], 100, &ClassPolicy::SPARSE, Some(1));
    assert_eq!(choice, Choice::Send { path: 0, depart: now });
    quick.tx_free = Time::from_ms(160);
    let choice = choose(now, &[quick, slow], 100, &ClassPolicy::SPARSE, Some(1));
    assert_eq!(choice, Choice::Send { path: 1, depart: now });
}

#[test]
fn bookings_add_up_and_idle_time_is_lost() {
    let free = TxFree::new();
    let now = Time::from_ms(50);
    assert_eq!(free.reserve(now, 1_500, 1_500_000, 0), Time::ZERO.max(now));
    assert_eq!(free.get(), Time::from_ms(51));
    assert_eq!(free.reserve(now, 1_500, 1_500_000, 0), Time::from_ms(51));
    // 1 ms late with 2 ms of credit: the slot is not lost, and nothing leaves in the past.
    let late = Time::from_ms(53);
    assert_eq!(free.reserve(late, 1_500, 1_500_000, 2_000), late);
    assert_eq!(free.get(), Time::from_ms(53));
    free.reserve(now, u64::MAX, 1, 0);
    free.reserve(now, 1, 0, 0);
    free.clear(now);
    assert_eq!(free.get(), now);
}

#[test]
fn cores_that_book_at_once_never_get_the_same_slot() {
    let free = TxFree::new();
    let slots = std::thread::scope(|scope| {
        let book =
            || (0..2_000).map(|_| free.reserve(Time::ZERO, 1_000, 1_000_000_000, 0).ns()).collect::<Vec<_>>();
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(book)).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
    });
    let unique: std::collections::BTreeSet<u64> = slots.iter().copied().collect();
    assert_eq!(unique.len(), 8_000);
    assert_eq!(free.get().ns(), 8_000_000);
}

/// Position of `share` in sorted nanoseconds, as milliseconds.
fn at(sorted: &[u64], share: f64) -> f64 {
    sorted[((sorted.len() - 1) as f64 * share) as usize] as f64 / 1e6
}

/// One greedy flow and a ping through 100 Mbit/s 10 ms + 50/20 + 20/40: everything is used, arrives nearly in order,
/// and the ping takes the quick path past it (≤ 30 ms).
#[test]
#[allow(clippy::print_stdout, reason = "shown with --nocapture")]
fn three_links() {
    for (name, noise, loss, stalls, least, wait_ms, ping_ms) in [
        ("clean", Noise::None, 0.0, false, 0.98, 1.0, 20.0),
        ("0.1 % loss", Noise::None, 0.001, false, 0.98, 1.0, 20.0),
        ("stalls", Noise::None, 0.0, true, 0.95, 4.0, 30.0),
        ("radio", Noise::Radio(2_000.0), 0.0, false, 0.94, 12.0, 70.0),
    ] {
        let mut specs = Vec::new();
        for (rate, owd_us) in [(100.0, 10_000), (50.0, 20_000), (20.0, 40_000)] {
            let mut spec = Spec::new(mbit(rate), owd_us);
            (spec.noise, spec.loss, spec.seed) = (noise, loss, owd_us);
            specs.push(spec);
        }
        let mut bond = Bond::new(specs, mbit(20.0));
        bond.greedy = vec![1];
        bond.ping = Some((9, 20 * MS, 0));
        if stalls {
            bond.sender = Stalls::new(20_000.0, 4_000.0, 5);
        }
        bond.run(3 * SECOND);
        let used = bond.measure(6_000) / mbit(170.0);
        let waits = bond.waits(1);
        let mean_ms = waits.iter().sum::<u64>() as f64 / waits.len() as f64 / 1e6;
        let pings = bond.delays(9);
        println!(
            "{name}: {:.2} %, disorder mean {mean_ms:.2} p99 {:.2} max {:.2} ms, ping p50 {:.1} p99 {:.1} ms",
            100.0 * used,
            at(&waits, 0.99),
            at(&waits, 1.0),
            at(&pings, 0.5),
            at(&pings, 0.99)
        );
        assert!(used > least * (1.0 - loss), "{name}: {used}");
        assert!(mean_ms < wait_ms && at(&waits, 0.99) < 10.0 * wait_ms, "{name}: {mean_ms}");
        assert!(at(&pings, 0.99) < ping_ms, "{name}");
    }
}

proptest::proptest! {
    /// Whatever the paths are like: an answer, on a usable path, not in the past, and waiting ends.
    #[test]
    fn any_paths(
        raw in proptest::collection::vec((0u64..3, 0u64..u64::MAX, proptest::num::i64::ANY, proptest::num::u32::ANY,
            0u8..3, proptest::bool::ANY), 0..6),
        now in 0u64..u64::MAX / 2, rate in 0u64..u64::MAX, bytes in proptest::num::u32::ANY, sparse in proptest::bool::ANY,
        budget in proptest::num::u32::ANY) {
        let paths: Vec<PathView> = raw.iter().enumerate().map(|(id, raw)| PathView {
            id: id as u8, rate: [0, 1_000_000, rate][raw.0 as usize], tx_free: Time::from_ns(raw.1), delay_us: raw.2,
            unmeasured_us: raw.2 / 2, jitter_us: raw.3, tier: raw.4, usable: raw.5 }).collect();
        let class = if sparse { Class::Sparse } else { Class::Bulk };
        let policy = ClassPolicy { class, reorder_budget_us: budget, tier_max: 1 };
        let now = Time::from_ns(now);
        match choose(now, &paths, bytes, &policy, Some(0)) {
            Choice::Send { path, depart } => {
                let view = &paths[usize::from(path)];
                proptest::prop_assert!(view.usable && view.rate > 0 && view.tier <= 1 && depart >= now);
            }
            Choice::Wait { until } => proptest::prop_assert!(until > now),
            Choice::None => proptest::prop_assert!(!paths.iter().any(|p| p.usable && p.rate > 0 && p.tier <= 1)),
        }
    }
}

#[test]
fn a_path_that_carried_nothing_yet_is_quick_by_its_round_trip_only() {
    // A satellite that was never used: a single packet goes by the fibre, and so does bulk until the fibre has a queue as long.
    let satellite = PathView { unmeasured_us: 50_000, ..path(0, 20, 0) };
    for (class, busy_ms, expected) in
        [(Class::Sparse, 0, 1), (Class::Bulk, 0, 1), (Class::Bulk, 40, 1), (Class::Bulk, 60, 0)]
    {
        let fibre = PathView { tx_free: Time::from_ms(1 + busy_ms), ..path(1, 100, 5) };
        let choice = choose(Time::from_ms(1), &[satellite, fibre], 1_500, &ClassPolicy::of(class), None);
        assert!(
            matches!(choice, Choice::Send { path, .. } if path == expected),
            "{class:?} {busy_ms} ms: {choice:?}"
        );
    }
}
