#![allow(clippy::unwrap_used, reason = "tests")]
use super::*;

const MS: u64 = 1_000_000;

/// Everything that arrives until `until_ns`, asked for at its own time.
fn drain(d: &mut Direction<u32>, until_ns: u64) -> Vec<(u32, u64)> {
    let mut out = Vec::new();
    while let Some(at) = d.next_event_ns().filter(|&at| at <= until_ns) {
        while let Some(a) = d.pop(at) {
            out.push((a.packet, a.at_ns));
        }
    }
    out
}

#[test]
fn one_packet_takes_line_time_and_delay() {
    let mut d = Direction::new(Shape::new(100.0, 10.0), 1);
    d.offer(5 * MS, 1500, 7).unwrap();
    // 1538 bytes at 100 Mbit/s are 123.04 µs.
    assert_eq!(d.pop(15 * MS + 123_039), None);
    let a = d.pop(15 * MS + 123_040).unwrap();
    assert_eq!((a.packet, a.at_ns, a.flip_bit), (7, 15 * MS + 123_040, None));
    assert_eq!(d.next_event_ns(), None);
    // Short packets are padded: 46 + 38.
    assert_eq!(wire_bytes(20), 84);
}

#[test]
fn the_rate_does_not_drift_and_a_late_caller_does_not_slow_the_line() {
    // 33.333333 Mbit/s does not divide evenly; 20,000 packets of 1538 bytes.
    let shape = Shape { rate_bps: 33_333_333, queue: QueueLimit::Bytes(u64::MAX), ..Shape::default() };
    let mut d = Direction::new(shape, 1);
    for i in 0..20_000 {
        d.offer(0, 1500, i).unwrap();
    }
    // One single late call finds all of them, with the exact times.
    let all: Vec<_> = std::iter::from_fn(|| d.pop(60_000 * MS)).collect();
    assert_eq!(all.len(), 20_000);
    let exact = (20_000u128 * 1538 * 8 * 1_000_000_000 / 33_333_333) as u64;
    assert!(all[19_999].at_ns.abs_diff(exact) <= 1, "{} {exact}", all[19_999].at_ns);
}

#[test]
fn the_queue_drops_at_its_tail() {
    let mut d = Direction::new(Shape::new(20.0, 40.0), 1); // 120 ms = 300,000 bytes = 195 packets
    let taken = (0..500).filter(|&i| d.offer(0, 1500, i).is_ok()).count();
    assert_eq!(taken, 195);
    assert_eq!(d.counters().queue_full, 305);
    assert_eq!(d.offer(0, 1500, 1), Err((1, Dropped::Queue)));
    let out = drain(&mut d, 10_000 * MS);
    assert_eq!(out.len(), 195);
    assert!(out.windows(2).all(|w| w[1].1 - w[0].1 == 615_200));
    // The last one waited for the whole queue.
    assert_eq!(out[194].1, 195 * 615_200 + 40 * MS);
    // A slow line still takes two packets.
    let mut slow = Direction::new(Shape::new(0.1, 0.0), 1);
    assert!(slow.offer(0, 1500, 0).is_ok() && slow.offer(0, 1500, 1).is_ok());
    assert!(slow.offer(0, 1500, 2).is_err());
}

#[test]
fn a_change_of_rate_takes_hold_of_what_waits() {
    let mut d = Direction::new(Shape::new(100.0, 0.0), 1);
    for i in 0..10 {
        d.offer(0, 1212, i).unwrap(); // 1250 bytes: 100 µs at 100 Mbit/s
    }
    assert_eq!(drain(&mut d, 250_000).len(), 2);
    d.set_shape(250_000, Shape::new(10.0, 0.0));
    let out = drain(&mut d, 100 * MS);
    // Half of packet 2 was out; the rest of it takes 500 µs, every other one 1 ms.
    assert_eq!(out[0], (2, 750_000));
    assert_eq!(out[1], (3, 1_750_000));
    assert_eq!(out.len(), 8);
}

#[test]
fn a_black_hole_is_silent_and_ends() {
    let mut d = Direction::new(Shape::new(100.0, 10.0), 1);
    d.offer(0, 1500, 0).unwrap();
    d.set_shape(MS, Shape { black_hole: true, ..Shape::new(100.0, 10.0) });
    d.offer(2 * MS, 1500, 1).unwrap();
    assert!(drain(&mut d, 50 * MS).is_empty());
    assert_eq!(d.counters().swallowed, 2);
    d.set_shape(60 * MS, Shape::new(100.0, 10.0));
    d.offer(60 * MS, 1500, 2).unwrap();
    assert_eq!(drain(&mut d, 100 * MS), [(2, 70 * MS + 123_040)]);
}

#[test]
fn loss_has_the_share_and_the_burst_length_asked_for() {
    for (loss, burst) in [(0.001, 1.0), (0.05, 1.0), (0.05, 4.0)] {
        let shape = Shape { loss, loss_burst: burst, ..Shape::default() };
        let mut d = Direction::new(shape, 42);
        let n = 400_000u32;
        let mut arrived = vec![false; n as usize];
        for i in 0..n {
            d.offer(u64::from(i), 1000, i).unwrap();
            while let Some(a) = d.pop(u64::from(i)) {
                arrived[a.packet as usize] = true;
            }
        }
        let lost = arrived.iter().filter(|a| !**a).count() as f64;
        assert!((lost / f64::from(n) / loss - 1.0).abs() < 0.12, "{loss} {burst}: {lost}");
        let bursts = arrived.windows(2).filter(|w| w[0] && !w[1]).count() as f64;
        let mean = lost / bursts;
        let expected = if burst > 1.0 { burst } else { 1.0 / (1.0 - loss) };
        assert!((mean / expected - 1.0).abs() < 0.1, "{loss} {burst}: mean {mean}");
        assert_eq!(d.counters().lost as f64, lost);
    }
}

#[test]
fn jitter_keeps_order_unless_told_otherwise() {
    for reorder in [false, true] {
        let shape = Shape { delay_us: 20_000, jitter_us: 5_000, reorder, ..Shape::default() };
        let mut d = Direction::new(shape, 3);
        for i in 0..2_000u32 {
            d.offer(u64::from(i) * 100_000, 1000, i).unwrap();
        }
        let out = drain(&mut d, 10_000 * MS);
        assert_eq!(out.len(), 2_000);
        for &(i, at) in &out {
            let delay = at - u64::from(i) * 100_000;
            assert!((15 * MS..=25 * MS).contains(&delay), "{delay}");
        }
        assert!(out.windows(2).all(|w| w[0].1 <= w[1].1));
        let in_order = out.windows(2).all(|w| w[0].0 < w[1].0);
        assert_eq!(in_order, !reorder);
    }
}

#[test]
fn too_big_and_corrupt_are_counted() {
    let shape = Shape { corrupt: 1.0, ..Shape::new(100.0, 0.0).mtu(1400) };
    let mut d = Direction::new(shape, 3);
    assert_eq!(d.offer(0, 1401, 9), Err((9, Dropped::TooBig)));
    d.offer(0, 1400, 1).unwrap();
    assert!(d.pop(MS).unwrap().flip_bit.is_some());
    let c = d.counters();
    assert_eq!((c.offered, c.too_big, c.corrupted, c.delivered, c.delivered_bytes), (2, 1, 1, 1, 1438));
}

#[test]
fn packets_are_held_back_and_doubled_as_often_as_asked_for() {
    let mut d = Direction::new(Shape::default().late(0.1, 1_000).duplicate(0.2), 3);
    let (mut out, mut twice) = (Vec::new(), 0);
    for i in 0..4_000u32 {
        d.offer(u64::from(i) * 100_000, 1000, i).unwrap();
    }
    while let Some(at) = d.next_event_ns() {
        while let Some(arrival) = d.pop(at) {
            twice += u32::from(arrival.duplicate);
            out.push((arrival.packet, arrival.at_ns));
        }
    }
    let late = out.iter().filter(|(i, at)| *at == u64::from(*i) * 100_000 + MS).count();
    assert!((340..460).contains(&late), "{late}");
    assert!(out.windows(2).any(|w| w[0].0 > w[1].0), "others overtake");
    assert!((720..880).contains(&twice), "{twice}");
}

#[test]
fn the_same_seed_gives_the_same_run() {
    let run = |seed| {
        let shape = Shape { jitter_us: 3_000, reorder: true, loss: 0.1, ..Shape::new(10.0, 5.0) };
        let mut d = Direction::new(shape, seed);
        for i in 0..200 {
            let _ = d.offer(u64::from(i) * MS, 1000, i);
        }
        drain(&mut d, 10_000 * MS)
    };
    assert_eq!(run(5), run(5));
    assert_ne!(run(5), run(6));
}

#[test]
fn a_lost_carrier_empties_the_link() {
    let mut d = Direction::new(Shape::new(1.0, 100.0), 1);
    for i in 0..5 {
        d.offer(0, 1000, i).unwrap();
    }
    d.clear();
    assert_eq!(d.backlog_bytes(), 0);
    assert!(drain(&mut d, 10_000 * MS).is_empty());
    d.offer(20 * MS, 1000, 9).unwrap();
    assert_eq!(drain(&mut d, 10_000 * MS).len(), 1);
}
