//! Two ends and their paths in virtual time: does the orderer find losses soon, wait no longer than it must, and stay
//! in order with paths as different as fibre and satellite?

use super::*;
use std::collections::{BTreeMap, VecDeque};

/// SplitMix64: the tests bring their own randomness.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// A path: microseconds, and loss in parts of 10,000.
#[derive(Clone, Copy)]
struct Line {
    packet_us: u64,
    delay_us: u64,
    jitter_us: u64,
    loss: u64,
    /// How far a packet may fall behind its neighbours, microseconds.
    reorder_us: u64,
}

const FIBRE: Line = Line { packet_us: 120, delay_us: 10_000, jitter_us: 300, loss: 0, reorder_us: 0 };
const CABLE: Line = Line { packet_us: 240, delay_us: 20_000, jitter_us: 1_000, loss: 0, reorder_us: 0 };
const RADIO: Line = Line { packet_us: 600, delay_us: 40_000, jitter_us: 3_000, loss: 10, reorder_us: 0 };

/// All that arrives, by time; the second number keeps apart what arrives at once. With the path.
type Air = BTreeMap<(Time, u64), (u8, Wire)>;

#[derive(Clone, Copy)]
enum Wire {
    Packet { flow: usize, number: u32, order: Order, sent: Time },
    Marker(u32),
}

struct Result {
    stats: OrderStats,
    sent: u64,
    arrived: u64,
    /// Longest time from the sending of a packet to its leaving the orderer.
    total_us_max: u64,
    /// Packets of a flow that left behind a younger one and were not late.
    disorder: u64,
    wakes: u64,
    same_path: u64,
}

struct Simulation {
    lines: Vec<Line>,
    recovery_us: Option<u32>,
    /// At this time path 0 goes silent; the second time is when both ends leave it out.
    silent: Option<(u64, u64)>,
    flows: usize,
    /// All packets of flow n go over path n.
    pinned: bool,
    ms: u64,
}

impl Simulation {
    fn timings(&self, now: Time) -> Vec<PathTiming> {
        let used =
            |index: usize| !(index == 0 && self.silent.is_some_and(|(_, out)| now >= Time::from_ms(out)));
        let timing = |(index, line): (usize, &Line)| PathTiming {
            path: index as u8,
            delay_us: line.delay_us as i64,
            jitter_us: (line.jitter_us + line.reorder_us) as u32,
        };
        self.lines.iter().enumerate().filter(|(index, _)| used(*index)).map(timing).collect()
    }

    /// All that arrives, the number of packets sent and how many of them said `same_path`.
    fn send(&self, random: &mut Random) -> (Air, u64, u64) {
        let mut stamper = Stamper::new();
        let mut air = Air::new();
        let mut tx_free = vec![Time::ZERO; self.lines.len()];
        let mut arrival_last = vec![Time::ZERO; self.lines.len()];
        let mut idle_since = vec![Time::ZERO; self.lines.len()];
        let (mut number, mut same_path, mut serial) = (0_u32, 0, 0_u64);
        let mut put = |air: &mut Air, random: &mut Random, path: usize, depart: Time, wire: Wire| {
            let line = self.lines[path];
            let dark = path == 0 && self.silent.is_some_and(|(at, _)| depart >= Time::from_ms(at));
            if dark || random.below(10_000) < line.loss {
                return;
            }
            let delay = line.delay_us + random.below(line.jitter_us + 1);
            arrival_last[path] = arrival_last[path].max(depart.plus_us(delay));
            let late = if random.below(20) == 0 { random.below(line.reorder_us + 1) } else { 0 };
            serial += 1;
            air.insert((arrival_last[path].plus_us(late), serial), (path as u8, wire));
        };
        let mut now = Time::from_ms(100);
        while now < Time::from_ms(self.ms) {
            let usable: Vec<usize> = self.timings(now).iter().map(|timing| timing.path.into()).collect();
            let flow = random.below(self.flows as u64) as usize;
            // Earliest arrival, a run of packets at a time.
            let eta = |&path: &usize| {
                let line = self.lines[path];
                tx_free[path].max(now).plus_us(line.packet_us + line.delay_us + line.jitter_us)
            };
            let path = if self.pinned {
                flow % self.lines.len()
            } else {
                usable.iter().copied().min_by_key(eta).unwrap()
            };
            for _ in 0..=random.below(6) {
                let depart = tx_free[path].max(now);
                tx_free[path] = depart.plus_us(self.lines[path].packet_us);
                let order = stamper.next(flow, path as u8);
                same_path += u64::from(order.same_path);
                put(&mut air, random, path, tx_free[path], Wire::Packet { flow, number, order, sent: now });
                number += 1;
                idle_since[path] = tx_free[path];
            }
            for &path in &usable {
                if now.since(idle_since[path]) > 1_000_000 {
                    put(&mut air, random, path, now, Wire::Marker(stamper.marker().unwrap()));
                    idle_since[path] = now;
                }
            }
            stamper.tick(now, SETTLE_US_DEFAULT);
            // Somewhat less than the paths can carry together, with pauses.
            now = now.plus_us(150 + random.below(400) + if random.below(50) == 0 { 5_000 } else { 0 });
        }
        for path in 0..self.lines.len() {
            put(&mut air, random, path, now.plus_ms(1), Wire::Marker(stamper.marker().unwrap()));
        }
        (air, number.into(), same_path)
    }

    fn run(&self, seed: u64) -> Result {
        let mut random = Random(seed);
        let (mut air, sent, same_path) = self.send(&mut random);
        if self.recovery_us.is_some() {
            self.recover(&mut air, sent);
        }
        let mut orderer: Orderer<(usize, u32, Time)> = Orderer::new(20_000);
        let mut result = Result {
            stats: OrderStats::default(),
            sent,
            arrived: 0,
            total_us_max: 0,
            disorder: 0,
            wakes: 0,
            same_path,
        };
        let mut highest = vec![None; self.flows];
        let mut out = |result: &mut Result, now: Time, flow: usize, number: u32, sent: Time, late: bool| {
            result.total_us_max = result.total_us_max.max(now.since(sent) / 1_000);
            if !late {
                result.disorder += u64::from(highest[flow] > Some(number));
                highest[flow] = highest[flow].max(Some(number));
            }
        };
        let mut set: Vec<PathTiming> = Vec::new();
        let mut air: VecDeque<_> = air.into_iter().collect();
        loop {
            let arrival = air.front().map(|&((at, _), _)| at);
            let Some(now) = [arrival, orderer.next_deadline()].into_iter().flatten().min() else { break };
            let timings = self.timings(now);
            if timings != set {
                orderer.set_paths(&timings, self.recovery_us);
                set = timings;
            }
            if arrival == Some(now) {
                let Some((_, (path, wire))) = air.pop_front() else { break };
                match wire {
                    Wire::Marker(stamp) => orderer.marker(now, path, stamp),
                    Wire::Packet { flow, number, order, sent } => {
                        result.arrived += 1;
                        match orderer.admit(now, path, order) {
                            Admit::Hold => orderer.hold(now, path, order, (flow, number, sent)).unwrap(),
                            admit => out(&mut result, now, flow, number, sent, admit == Admit::Late),
                        }
                    }
                }
            } else {
                result.wakes += 1;
            }
            while let Some((flow, number, sent)) = orderer.pop_ready(now) {
                out(&mut result, now, flow, number, sent, false);
            }
            assert!(
                orderer.next_deadline().is_none_or(|due| due > now),
                "a wake-up that does nothing, at {now:?}"
            );
        }
        result.stats = orderer.stats();
        assert_eq!(result.stats.held_now, 0);
        assert_eq!(result.stats.delivered, result.arrived);
        result
    }

    /// A lost packet comes again over path 0, 25 ms after its neighbours arrived.
    fn recover(&self, air: &mut Air, sent: u64) {
        let mut seen: Vec<Option<Time>> = vec![None; sent as usize];
        for (&(at, _), &(_, wire)) in air.iter() {
            if let Wire::Packet { number, .. } = wire {
                seen[number as usize] = Some(at);
            }
        }
        // The flow is not known any more; with one flow all is known: number = stamp.
        assert_eq!(self.flows, 1);
        for number in 1..sent as usize {
            if seen[number].is_none()
                && let Some(&at) = seen[number..].iter().flatten().min()
            {
                let order = order(number as u32, 1);
                let wire = Wire::Packet { flow: 0, number: number as u32, order, sent: at };
                air.insert((at.plus_ms(25), u64::MAX - number as u64), (255, wire));
            }
        }
    }
}

/// The three links of the demo.
fn demo(flows: usize) -> Simulation {
    Simulation {
        lines: vec![FIBRE, CABLE, RADIO],
        recovery_us: None,
        silent: None,
        flows,
        pinned: false,
        ms: 3_000,
    }
}

#[test]
fn three_unequal_paths_without_loss_are_in_order_with_no_timer_needed() {
    for flows in [1, 4] {
        let mut simulation = demo(flows);
        simulation.lines[2].loss = 0;
        let result = simulation.run(1);
        assert!(result.sent > 10_000);
        assert_eq!(result.arrived, result.sent);
        assert_eq!((result.disorder, result.stats.late, result.stats.declared_lost), (0, 0, 0));
        assert_eq!((result.wakes, result.stats.deadline_expired), (0, 0), "{flows} flows");
        assert!(result.stats.holds > 0);
    }
}

#[test]
fn losses_are_found_by_the_paths_long_before_the_deadline() {
    for seed in 0..4 {
        for flows in [1, 5] {
            let mut simulation = demo(flows);
            simulation.lines[0].loss = 50;
            simulation.lines[1].loss = 50;
            simulation.lines[2].loss = 100;
            let result = simulation.run(seed);
            assert!(result.arrived < result.sent);
            assert_eq!((result.disorder, result.stats.late), (0, 0));
            assert!(result.stats.declared_lost > 20);
            assert_eq!(result.stats.deadline_expired, 0);
            // Nobody leaves later than what was sent at the same time over the slowest path arrives, plus
            // a marker's interval and the reorder tolerance.
            assert!(result.total_us_max < 70_000, "{} µs", result.total_us_max);
        }
    }
}

#[test]
fn reordering_within_a_path_is_learned() {
    let mut simulation = demo(1);
    simulation.lines[1].reorder_us = 4_000;
    let result = simulation.run(7);
    assert_eq!(result.disorder, 0);
    let late = result.stats.late;
    assert!(late * 50 < result.stats.holds, "{late} late");
    // A path of its own reorders no more than the path did, and nobody counts as lost for ever.
    assert!(result.stats.deadline_expired < 5);
}

#[test]
fn recovered_packets_come_out_in_order() {
    let mut simulation = demo(1);
    simulation.lines[0].loss = 30;
    simulation.recovery_us = Some(45_000);
    let result = simulation.run(3);
    assert_eq!(result.disorder, 0);
    assert_eq!(result.stats.late, 0);
    assert_eq!(result.stats.declared_lost, 0);
    assert!(result.arrived > result.sent - 3, "all but a tail came again");
}

#[test]
fn a_path_that_falls_silent_costs_its_deadline_and_no_more() {
    let mut simulation = demo(3);
    simulation.silent = Some((1_000, 1_120));
    let result = simulation.run(5);
    assert!(result.arrived < result.sent);
    assert_eq!(result.disorder, 0);
    // 40 − 10 ms between the paths + 4 × 3 ms + 5 ms: all in the bucket below 65.5 ms.
    assert_eq!(result.stats.residence[17..], [0; 3]);
    assert!(result.stats.residence[16] > 0);
    assert!(result.stats.deadline_expired > 0);
}

#[test]
fn pinned_flows_never_wait() {
    let mut simulation = demo(3);
    simulation.pinned = true;
    for line in &mut simulation.lines {
        line.loss = 200;
    }
    let result = simulation.run(9);
    assert!(result.same_path + 3 >= result.sent);
    assert_eq!((result.stats.holds, result.stats.late, result.disorder), (0, 0, 0));
}
