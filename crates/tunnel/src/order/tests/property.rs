//! Properties that hold for all traffic.

use super::*;
use proptest::collection::vec;
use proptest::prelude::*;
use std::collections::VecDeque;

/// Packet under way over a path.
#[derive(Clone, Copy, Debug)]
enum Wire {
    Packet { flow: usize, number: u32, order: Order },
    Marker(u32),
}

/// Packet numbers per flow in the order they left, and whether each was late.
#[derive(Default)]
struct Output {
    flows: Vec<Vec<(u32, bool)>>,
}

impl Output {
    fn new(flows: usize) -> Self {
        Self { flows: vec![Vec::new(); flows] }
    }

    fn total(&self) -> usize {
        self.flows.iter().map(Vec::len).sum()
    }

    /// All but late packets of each flow are in the order in which they were sent.
    fn assert_order(&self) {
        for (flow, numbers) in self.flows.iter().enumerate() {
            let mut highest = None;
            for &(number, late) in numbers.iter().filter(|(_, late)| !late) {
                assert!(highest < Some(number), "flow {flow}: {number} after {highest:?}, late: {late}");
                highest = Some(number);
            }
        }
    }

    /// Nothing left twice.
    fn assert_once(&self) {
        for numbers in &self.flows {
            let mut seen: Vec<u32> = numbers.iter().map(|&(number, _)| number).collect();
            seen.sort_unstable();
            seen.dedup();
            assert_eq!(seen.len(), numbers.len());
        }
    }
}

fn receive(orderer: &mut Orderer<(usize, u32)>, now: Time, path: u8, wire: Wire, out: &mut Output) {
    match wire {
        Wire::Marker(stamp) => orderer.marker(now, path, stamp),
        Wire::Packet { flow, number, order } => match orderer.admit(now, path, order) {
            Admit::Deliver => out.flows[flow].push((number, false)),
            Admit::Late => out.flows[flow].push((number, true)),
            Admit::Hold => orderer.hold(now, path, order, (flow, number)).unwrap(),
        },
    }
    take(orderer, now, out);
}

fn take(orderer: &mut Orderer<(usize, u32)>, now: Time, out: &mut Output) {
    while let Some((flow, number)) = orderer.pop_ready(now) {
        out.flows[flow].push((number, false));
    }
}

fn start() -> impl Strategy<Value = u32> {
    prop_oneof![Just(0), any::<u32>(), u32::MAX - 300..=u32::MAX, 65_000..66_000_u32]
}

/// One thing the sender does: a packet of a flow over a path, perhaps with a marker on another path.
fn send() -> impl Strategy<Value = (usize, u8, Option<u8>)> {
    (0..5_usize, 0..4_u8, proptest::option::weighted(0.2, 0..4_u8))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    /// Without loss, whatever the interleaving of the paths: in order, nothing late, nothing left over.
    #[test]
    fn any_interleaving_of_paths_comes_out_in_order(
        start in start(),
        paths in 1..=4_u8,
        sent in vec(send(), 1..200),
        picks in vec(any::<u8>(), 300),
        step_us in 0..20_u64,
        recovery_wait_us in proptest::option::of(0..40_000_u32),
    ) {
        let mut stamper = Stamper::starting_at(start);
        // A count that does not begin at 0 has a packet before: the orderer must know where it is.
        let first = stamper.next(7, 0);
        let mut lines = vec![VecDeque::new(); paths.into()];
        for (number, &(flow, path, marker)) in sent.iter().enumerate() {
            let path = path % paths;
            let number = number as u32;
            let order = stamper.next(flow, path);
            lines[usize::from(path)].push_back(Wire::Packet { flow, number, order });
            if let (Some(path), Some(stamp)) = (marker, stamper.marker()) {
                lines[usize::from(path % paths)].push_back(Wire::Marker(stamp));
            }
        }
        let mut orderer = Orderer::new(1_000);
        orderer.set_paths(&equal_paths(paths), recovery_wait_us);
        orderer.admit(Time::from_ms(5), 0, first);
        let mut out = Output::new(5);
        let mut now = Time::from_ms(5);
        let mut picks = picks.iter().cycle();
        while lines.iter().any(|line| !line.is_empty()) {
            let pick = usize::from(*picks.next().unwrap()) % lines.len();
            let busy = (0..lines.len()).map(|n| (pick + n) % lines.len()).find(|&n| !lines[n].is_empty()).unwrap();
            // Runs of several packets from one path are as likely as single ones.
            for _ in 0..=pick {
                let Some(wire) = lines[busy].pop_front() else { break };
                receive(&mut orderer, now, busy as u8, wire, &mut out);
                now = now.plus_us(step_us);
            }
        }
        prop_assert_eq!(out.total(), sent.len());
        out.assert_order();
        out.assert_once();
        let stats = orderer.stats();
        prop_assert_eq!((stats.held_now, stats.late, stats.declared_lost, stats.deadline_expired), (0, 0, 0, 0));
        prop_assert_eq!(orderer.next_deadline(), None);
    }

    /// With loss, delay of any length, reordering within paths, paths that come and go: all that arrived
    /// leaves exactly once, in order but for what came too late, within bounded memory and time.
    #[test]
    fn what_arrives_leaves_once_and_in_order(
        start in start(),
        sent in vec((send(), 0..10_u8, 0..4_usize), 1..200),
        picks in vec((any::<u8>(), 0..4_000_u64, 0..40_u8), 400),
        limit in prop_oneof![Just(1_usize), 4..20_usize, Just(1_000)],
        recovery_wait_us in proptest::option::of(0..20_000_u32),
    ) {
        let mut stamper = Stamper::starting_at(start);
        let first = stamper.next(7, 0);
        let mut lines = vec![VecDeque::new(); 4];
        let mut arriving = 0;
        for (number, &((flow, path, marker), fate, behind)) in sent.iter().enumerate() {
            let number = number as u32;
            let order = stamper.next(flow, path);
            if fate > 0 {
                let line: &mut VecDeque<Wire> = &mut lines[usize::from(path)];
                // Within a path order is kept unless recovery is on: then `same_path` means nothing.
                let behind = if recovery_wait_us.is_some() { behind.min(line.len()) } else { 0 };
                line.insert(line.len() - behind, Wire::Packet { flow, number, order });
                arriving += 1;
            }
            if let (Some(path), Some(stamp)) = (marker, stamper.marker()) {
                lines[usize::from(path)].push_back(Wire::Marker(stamp));
            }
        }
        let mut orderer = Orderer::new(limit);
        orderer.set_paths(&equal_paths(4), recovery_wait_us);
        orderer.admit(Time::from_ms(5), 0, first);
        let mut out = Output::new(5);
        let mut now = Time::from_ms(5);
        let mut picks = picks.iter().cycle();
        while lines.iter().any(|line| !line.is_empty()) {
            let &(pick, step_us, set) = picks.next().unwrap();
            let busy = (0..4).map(|n| (usize::from(pick) + n) % 4).find(|&n| !lines[n].is_empty()).unwrap();
            let wire = lines[busy].pop_front().unwrap();
            receive(&mut orderer, now, busy as u8, wire, &mut out);
            prop_assert!(orderer.stats().held_now <= limit as u64);
            if set <= 4 {
                orderer.set_paths(&equal_paths(set), recovery_wait_us);
                take(&mut orderer, now, &mut out);
            }
            let next = now.plus_us(if pick < 128 { 0 } else { step_us });
            while let Some(due) = orderer.next_deadline().filter(|&due| due <= next) {
                now = now.max(due);
                take(&mut orderer, now, &mut out);
                prop_assert!(orderer.next_deadline().is_none_or(|after| after > now), "no progress at {now:?}");
            }
            now = next;
        }
        // Timers alone empty it.
        let mut wakes = 0;
        while let Some(due) = orderer.next_deadline() {
            now = now.max(due);
            take(&mut orderer, now, &mut out);
            wakes += 1;
            prop_assert!(wakes < 1_000);
        }
        prop_assert_eq!(orderer.stats().held_now, 0);
        prop_assert_eq!(out.total(), arriving);
        prop_assert_eq!(orderer.stats().delivered, arriving as u64 + 1);
        let late = out.flows.iter().flatten().filter(|(_, late)| *late).count();
        prop_assert_eq!(orderer.stats().late, late as u64);
        out.assert_order();
        out.assert_once();
    }

    /// A peer that sends nonsense gets no order, but loses nothing and costs nothing: no panic, no more
    /// held than allowed, every packet out once, also if the caller takes them out rarely.
    #[test]
    fn nonsense_is_survived(
        input in vec((any::<u32>(), 0..6_u8, any::<u16>(), any::<bool>(), 0..8_u8, 0..6_u8, 0..30_000_u64), 1..400),
        limit in 0..30_usize,
        recovery_wait_us in proptest::option::of(any::<u32>()),
        budget_us in any::<u32>(),
        delay_us in any::<i64>(),
        jitter_us in any::<u32>(),
    ) {
        let mut orderer = Orderer::new(limit);
        orderer.set_paths(&[PathTiming { path: 1, delay_us, jitter_us }, PathTiming::default()], recovery_wait_us);
        orderer.set_budget_us(budget_us);
        let mut now = Time::from_ms(1);
        let mut out = vec![0_u8; input.len()];
        let mut last = 0_u32;
        for (number, &(stamp, near, back, same_path, what, path, step_us)) in input.iter().enumerate() {
            now = now.plus_us(step_us);
            // Mostly near the stamp before, forward or back, sometimes anywhere.
            let stamp = match near {
                0 => stamp,
                1 => last.wrapping_sub(stamp % 70_000),
                2 => last.wrapping_add(stamp % 70_000),
                _ => last.wrapping_add(stamp % 4).wrapping_sub(1),
            };
            last = stamp;
            let back = if near < 3 { back } else { back % 6 };
            match what {
                0 => orderer.marker(now, path, stamp),
                1 => orderer.restart(),
                _ => {}
            }
            let order = Order { stamp, back, same_path };
            match orderer.admit(now, path, order) {
                Admit::Deliver | Admit::Late => out[number] += 1,
                Admit::Hold => {
                    if let Err(number) = orderer.hold(now, path, order, number) {
                        out[number] += 1;
                    }
                }
            }
            prop_assert!(orderer.stats().held_now <= limit as u64 + 64);
            prop_assert!(orderer.window.bytes() <= 24 * 1024);
            if what > 3 {
                while let Some(number) = orderer.pop_ready(now) {
                    out[number] += 1;
                }
                prop_assert!(orderer.stats().held_now <= limit as u64);
            }
        }
        let mut wakes = 0;
        while let Some(due) = orderer.next_deadline() {
            now = now.max(due);
            while let Some(number) = orderer.pop_ready(now) {
                out[number] += 1;
            }
            wakes += 1;
            prop_assert!(wakes < 2_000, "no end at {now:?}: {due:?}");
        }
        prop_assert!(out.iter().all(|&times| times == 1));
        prop_assert_eq!(orderer.stats().delivered, input.len() as u64);
    }
}
