#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::VecDeque;

use super::*;

#[derive(Clone, Debug, PartialEq, Eq)]
struct Packet {
    id: u32,
    left: usize,
    at: Time,
    ecn: bool,
}

impl Item for Packet {
    fn bytes(&self) -> usize {
        self.left
    }
    fn enqueued_at(&self) -> Time {
        self.at
    }
    fn ecn_capable(&self) -> bool {
        self.ecn
    }
}

fn packet(id: u32, left: usize, at: Time) -> Packet {
    Packet { id, left, at, ecn: false }
}

fn queue() -> FqCodel<Packet> {
    FqCodel::new(1 << 20, 1_000, 1_500)
}

fn put(queue: &mut FqCodel<Packet>, now: Time, hash: u32, item: Packet) {
    queue.enqueue(now, hash, item, &mut |dropped| panic!("dropped {dropped:?}"));
}

/// Sends the head whole; its id.
fn take(queue: &mut FqCodel<Packet>, now: Time) -> Option<u32> {
    let bytes = queue.head(now)?.item.left;
    queue.consume(now, bytes, true).map(|item| item.id)
}

#[test]
fn one_flow_is_first_in_first_out() {
    let mut queue = queue();
    for id in 0..50 {
        put(&mut queue, Time::ZERO, 7, packet(id, 1_000, Time::ZERO));
    }
    assert_eq!((queue.items(), queue.bytes()), (50, 50_000));
    for id in 0..50 {
        assert_eq!(take(&mut queue, Time::ZERO), Some(id));
    }
    assert!(queue.is_empty() && queue.bytes() == 0);
    assert!(queue.head(Time::ZERO).is_none());
    assert!(queue.consume(Time::ZERO, 10, true).is_none());
}

#[test]
fn looking_commits_to_nothing() {
    let mut queue = queue();
    put(&mut queue, Time::ZERO, 1, packet(1, 64_000, Time::ZERO));
    put(&mut queue, Time::ZERO, 2, packet(2, 64_000, Time::ZERO));
    let first = queue.head(Time::ZERO).unwrap().item.id;
    for ms in 0..5_000 {
        assert_eq!(queue.head(Time::from_ms(ms)).unwrap().item.id, first);
    }
    // CoDel saw a queue for five seconds, and one drop is due, not thousands.
    assert_eq!(queue.head(Time::from_ms(5_000)).unwrap().codel, CodelVerdict::Drop);
}

#[test]
fn a_sparse_flow_gets_in_between_the_segments_of_a_super_packet() {
    let mut queue = queue();
    put(&mut queue, Time::ZERO, 1, packet(1, 64_000, Time::ZERO));
    for _ in 0..4 {
        let head = queue.head(Time::ZERO).unwrap();
        assert!(!head.sparse);
        head.item.left -= 1_500;
        assert!(queue.consume(Time::ZERO, 1_500, false).is_none());
    }
    assert_eq!(queue.bytes(), 58_000);
    let now = Time::from_ms(1);
    put(&mut queue, now, 2, packet(2, 100, now));
    let head = queue.head(now).unwrap();
    assert!(head.sparse && head.item.id == 2 && head.codel == CodelVerdict::Pass);
    assert_eq!(queue.consume(now, 100, true).unwrap().id, 2);
    let head = queue.head(now).unwrap();
    assert_eq!((head.item.id, head.item.left), (1, 58_000));
}

#[test]
fn a_flow_is_sparse_only_while_it_is_slow() {
    let mut queue = queue();
    let sparse_after = |queue: &mut FqCodel<Packet>, hash: u32, every_us: u64| {
        let mut last = false;
        for n in 0..300 {
            let now = Time::from_us(n * every_us);
            put(queue, now, hash, packet(0, 1_200, now));
            last = queue.head(now).unwrap().sparse;
            queue.consume(now, 1_200, true);
        }
        last
    };
    // 3.2 Mbit/s and 19 Mbit/s, neither ever waits.
    assert!(sparse_after(&mut queue, 1, 3_000));
    assert!(!sparse_after(&mut queue, 2, 500));
}

#[test]
fn flows_share_by_bytes() {
    let mut queue = FqCodel::new(64 << 20, 100_000, 1_500);
    for id in 0..20_000 {
        put(&mut queue, Time::ZERO, 1, packet(1, 1_500, Time::ZERO));
        put(&mut queue, Time::ZERO, 2, packet(2, 300, Time::ZERO));
        if id % 40 == 0 {
            put(&mut queue, Time::ZERO, 3, packet(3, 60_000, Time::ZERO));
        }
    }
    let mut sent = [0usize; 4];
    while sent.iter().sum::<usize>() < 3_000_000 {
        let head = queue.head(Time::ZERO).unwrap();
        let bytes = head.item.left.min(12_000).min(head.budget_bytes.next_multiple_of(1_500));
        head.item.left -= bytes;
        let (id, finished) = (head.item.id as usize, head.item.left == 0);
        queue.consume(Time::ZERO, bytes, finished);
        sent[id] += bytes;
    }
    for id in 1..=3 {
        assert!((950_000..1_050_000).contains(&sent[id]), "{sent:?}");
    }
}

/// Packets that come `sojourn_ms` old into a queue of five: how often CoDel acts in two seconds at 1,000 packets a second.
fn codel_acts(sojourn_ms: u64, ecn: bool) -> (u32, u32) {
    let mut queue = queue();
    queue.set_codel(10_000, 100_000);
    let (mut marks, mut drops) = (0, 0);
    for ms in 0..2_000 {
        let now = Time::from_ms(1_000 + ms);
        while queue.items() < 5 {
            let at = Time::from_ms(1_000 + ms - sojourn_ms);
            put(&mut queue, now, 1, Packet { ecn, ..packet(0, 1_500, at) });
        }
        match queue.head(now).unwrap().codel {
            CodelVerdict::Pass => {}
            CodelVerdict::Mark => marks += 1,
            CodelVerdict::Drop => drops += 1,
        }
        queue.consume(now, 1_500, true);
    }
    (marks, drops)
}

#[test]
fn codel_acts_on_a_standing_queue_only() {
    // Four packets wait before each.
    assert_eq!(codel_acts(5, false), (0, 0));
    let (marks, drops) = codel_acts(20, false);
    // RFC 8289: after one interval, then each interval / sqrt(n): sum over n of 100 / sqrt(n) ms = 1,900 ms gives n ≈ 100.
    assert!(marks == 0 && (80..120).contains(&drops), "{drops}");
    let (marks, drops) = codel_acts(20, true);
    assert!(drops == 0 && (80..120).contains(&marks), "{marks}");
}

#[test]
fn codel_spares_a_last_packet_and_recovers() {
    let mut queue = queue();
    for s in 0..20 {
        // One packet alone, however old.
        put(&mut queue, Time::from_ms(s * 1_000), 1, packet(0, 1_500, Time::ZERO));
        let now = Time::from_ms(s * 1_000 + 900);
        assert_eq!(queue.head(now).unwrap().codel, CodelVerdict::Pass);
        assert_eq!(queue.head_sojourn_us(now), now.us());
        queue.consume(now, 1_500, true);
    }
    assert_eq!(queue.head_sojourn_us(Time::from_ms(50_000)), 0);
}

#[test]
fn the_fattest_flow_pays_for_the_limit() {
    let mut queue = FqCodel::new(100_000, 1_000, 1_500);
    let mut dropped = Vec::new();
    for id in 0..5 {
        queue.enqueue(Time::ZERO, 2, packet(1_000 + id, 100, Time::ZERO), &mut |item| dropped.push(item.id));
    }
    for id in 0..200 {
        queue.enqueue(Time::ZERO, 1, packet(id, 1_500, Time::ZERO), &mut |item| dropped.push(item.id));
        assert!(queue.bytes() <= 100_000);
    }
    assert!(dropped.iter().all(|id| *id < 1_000));
    assert!(dropped.is_sorted(), "oldest first");
    assert!((130..145).contains(&dropped.len()), "{}", dropped.len());
    // Larger than the queue: refused, nobody else suffers.
    let before = queue.items();
    queue.enqueue(Time::ZERO, 3, packet(5_000, 100_001, Time::ZERO), &mut |item| dropped.push(item.id));
    assert_eq!((queue.items(), dropped.last()), (before, Some(&5_000)));
}

#[test]
fn the_number_of_items_is_limited_too() {
    let mut queue = FqCodel::new(1 << 30, 100, 1_500);
    let mut dropped = 0;
    for id in 0..1_000 {
        queue.enqueue(Time::ZERO, id, packet(id, 0, Time::ZERO), &mut |_| dropped += 1);
        assert!(queue.items() <= 100);
    }
    assert_eq!(queue.items() + dropped, 1_000);
    assert!(queue.slots.len() <= 100);
    let mut none = FqCodel::new(1_000, 0, 1_500);
    none.enqueue(Time::ZERO, 1, packet(1, 10, Time::ZERO), &mut |_| dropped += 1);
    assert!(none.is_empty());
}

#[test]
fn consuming_an_item_that_was_dropped_meanwhile_does_nothing() {
    let mut queue = FqCodel::new(3_000, 10, 1_500);
    put(&mut queue, Time::ZERO, 1, packet(1, 3_000, Time::ZERO));
    assert_eq!(queue.head(Time::ZERO).unwrap().item.id, 1);
    // The same flow and even the same slot, but another item.
    let mut dropped = 0;
    queue.enqueue(Time::ZERO, 1, packet(2, 3_000, Time::ZERO), &mut |_| dropped += 1);
    assert_eq!(dropped, 1);
    assert!(queue.consume(Time::ZERO, 3_000, true).is_none());
    assert_eq!((queue.items(), queue.bytes()), (1, 3_000));
    assert_eq!(take(&mut queue, Time::ZERO), Some(2));
}

#[derive(Clone, Debug)]
enum Step {
    Put { hash: u32, bytes: usize },
    Send { bytes: usize, all: bool },
    Look,
}

fn step() -> impl proptest::strategy::Strategy<Value = Step> {
    use proptest::prelude::*;
    prop_oneof![
        4 => (0u32..6, 0usize..9_000).prop_map(|(hash, bytes)| Step::Put { hash, bytes }),
        4 => (0usize..4_000, any::<bool>()).prop_map(|(bytes, all)| Step::Send { bytes, all }),
        1 => Just(Step::Look),
    ]
}

proptest::proptest! {
    /// Against a plain model: the counters are right, limits hold, every item comes out once and each flow in order.
    #[test]
    fn behaves_like_plain_queues(steps in proptest::collection::vec(step(), 0..400)) {
        let mut queue = FqCodel::new(40_000, 12, 1_500);
        let mut model: Vec<VecDeque<(u32, usize)>> = vec![VecDeque::new(); 6];
        let mut flow_of_id = Vec::new();
        for (number, step) in steps.into_iter().enumerate() {
            let now = Time::from_ms(number as u64 * 3);
            match step {
                Step::Put { hash, bytes } => {
                    let id = flow_of_id.len() as u32;
                    flow_of_id.push(hash as usize);
                    let mut gone = Vec::new();
                    queue.enqueue(now, hash, packet(id, bytes, now), &mut |item| gone.push(item.id));
                    for old in gone.iter().filter(|old| **old != id) {
                        let head = model[flow_of_id[*old as usize]].pop_front();
                        proptest::prop_assert_eq!(head.map(|entry| entry.0), Some(*old), "oldest of its flow");
                    }
                    if !gone.contains(&id) {
                        model[hash as usize].push_back((id, bytes));
                    }
                }
                Step::Look => {
                    let shown = queue.head(now).map(|head| head.item.id);
                    proptest::prop_assert_eq!(shown, queue.head(now).map(|head| head.item.id));
                }
                Step::Send { bytes, all } => {
                    let Some(head) = queue.head(now) else {
                        proptest::prop_assert!(model.iter().all(VecDeque::is_empty));
                        continue;
                    };
                    let id = head.item.id;
                    let bytes = if all { head.item.left } else { bytes.min(head.item.left) };
                    head.item.left -= bytes;
                    let finished = head.item.left == 0;
                    let out = queue.consume(now, bytes, finished);
                    proptest::prop_assert_eq!(out.map(|item| item.id), finished.then_some(id));
                    let flow = &mut model[flow_of_id[id as usize]];
                    proptest::prop_assert_eq!(flow.front().map(|entry| entry.0), Some(id), "in order");
                    if finished { flow.pop_front(); } else { flow[0].1 -= bytes; }
                }
            }
            let (items, bytes) = model.iter().flatten().fold((0, 0), |sum, entry| (sum.0 + 1, sum.1 + entry.1));
            proptest::prop_assert_eq!((queue.items(), queue.bytes()), (items, bytes));
            proptest::prop_assert!(items <= 12 && bytes <= 40_000);
        }
    }
}

#[test]
fn a_parked_flow_keeps_its_order_and_lets_the_others_go() {
    let mut queue = queue();
    for id in 0..6 {
        put(&mut queue, Time::ZERO, id % 2, packet(id, 1_000, Time::ZERO));
    }
    assert_eq!(queue.head(Time::ZERO).unwrap().item.id, 0);
    queue.park();
    for id in 6..8 {
        put(&mut queue, Time::ZERO, id % 2, packet(id, 1_000, Time::ZERO));
    }
    let others: Vec<_> = std::iter::from_fn(|| take(&mut queue, Time::ZERO)).collect();
    assert_eq!(others, [1, 3, 5, 7]);
    assert!(!queue.is_empty() && queue.head(Time::ZERO).is_none());
    // The wait was not the queue's doing: CoDel has nothing to say about it, even long after.
    queue.unpark_all(Time::from_ms(200));
    queue.head(Time::from_ms(201)).unwrap();
    let late = Time::from_ms(224);
    for id in [0, 2, 4, 6] {
        assert_eq!(queue.head(late).unwrap().codel, CodelVerdict::Pass);
        assert_eq!(take(&mut queue, late), Some(id));
    }
    assert!(queue.is_empty());
}

#[test]
fn parked_flows_give_room_like_all_others() {
    let mut queue = FqCodel::<Packet>::new(10_000, 100, 1_500);
    put(&mut queue, Time::ZERO, 1, packet(1, 9_000, Time::ZERO));
    queue.head(Time::ZERO).unwrap();
    queue.park();
    let mut dropped = Vec::new();
    queue.enqueue(Time::ZERO, 2, packet(2, 5_000, Time::ZERO), &mut |item: Packet| dropped.push(item.id));
    assert_eq!(dropped, [1]);
    queue.unpark_all(Time::ZERO);
    assert_eq!(take(&mut queue, Time::ZERO), Some(2));
    assert_eq!(take(&mut queue, Time::ZERO), None);
}

/// Room for such a flow becomes free one packet at a time; whoever is asked first takes it.
#[test]
fn a_flow_that_was_passed_over_is_asked_first() {
    let mut queue = queue();
    for id in 0..80 {
        put(&mut queue, Time::ZERO, id % 2, packet(id, 1_000, Time::ZERO));
    }
    let mut sent = [0; 2];
    for _ in 0..40 {
        let mut free = 1;
        while let Some(head) = queue.head(Time::ZERO) {
            let choosy = head.item.id % 2 == 1;
            if free > 0 {
                free -= 1;
                sent[usize::from(choosy)] += 1;
                take(&mut queue, Time::ZERO);
            } else if choosy {
                queue.skip();
            } else {
                break;
            }
        }
        queue.resume();
    }
    assert!(sent.iter().all(|sent| (18..=22).contains(sent)), "{sent:?}");
}
