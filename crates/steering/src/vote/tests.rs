#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;
use proptest::prelude::*;

const MS: u64 = 1_000_000;
const S: u64 = 1_000 * MS;

fn table(cores: u16) -> BucketTable {
    let units: Vec<Unit> = (0..cores).map(|id| Unit { id, weight: 1 }).collect();
    BucketTable::new(128, &units).unwrap()
}

fn vote(core: u8, load: u8, priority: u8, at_ms: u64) -> Vote {
    Vote { core, load, priority, at_ns: at_ms * MS }
}

/// An arbiter to which each core told its load every 100 ms from `from_ms` until `to_ms`.
fn told(arbiter: &mut Arbiter, loads: &[u8], times_ms: std::ops::RangeInclusive<u64>) {
    for ms in times_ms.step_by(100) {
        for (core, &load) in (0u8..).zip(loads) {
            arbiter.vote(vote(core, load, 1, ms));
        }
    }
}

fn keep(decision: Decision) -> Reason {
    match decision {
        Decision::Keep(reason) => reason,
        Decision::Change { moves, .. } => panic!("moves {moves:?}"),
    }
}

#[test]
fn votes_weigh_by_age_and_priority() {
    let mut arbiter = Arbiter::new(Settings { age_max_ns: S, ..Settings::default() });
    assert_eq!(arbiter.load(0, 0), None);
    arbiter.vote(vote(0, 100, 1, 1_000));
    assert_eq!(arbiter.load(0, 1_000 * MS), Some(100));
    assert_eq!(arbiter.load(0, 1_999 * MS), Some(100), "alone it counts whole");
    assert_eq!(arbiter.load(0, 2_000 * MS), None, "too old");
    // What is left of their time is their weight: 2/4 and 3/4.
    arbiter.vote(vote(0, 40, 1, 1_250));
    assert_eq!(arbiter.load(0, 1_500 * MS), Some(64), "(100 × 2 + 40 × 3) / 5");
    // One urgent vote outweighs the calm ones.
    arbiter.vote(vote(0, 255, 50, 1_500));
    assert!(arbiter.load(0, 1_500 * MS).unwrap() > 245);
    // Repeated and late votes are ignored.
    arbiter.vote(vote(0, 0, 255, 1_500));
    arbiter.vote(vote(0, 0, 255, 1_400));
    assert!(arbiter.load(0, 1_500 * MS).unwrap() > 245);
}

#[test]
fn a_core_without_young_votes_is_suspect_and_left_alone() {
    let mut arbiter = Arbiter::new(Settings::default());
    told(&mut arbiter, &[200, 10, 10], 0..=3_000);
    for ms in (3_100..=6_000).step_by(100) {
        arbiter.vote(vote(0, 200, 1, ms));
        arbiter.vote(vote(1, 10, 1, ms));
    }
    let three = CoreSet::first(3);
    assert_eq!(arbiter.suspects(&three, 6_000 * MS), [2].into_iter().collect());
    arbiter.decide(&table(3), &[], &three, true, 4_000 * MS);
    let Decision::Change { moves, table } = arbiter.decide(&table(3), &[], &three, true, 6_000 * MS) else {
        panic!("nothing moves")
    };
    assert!(moves.iter().all(|moved| (moved.from, moved.to) == (0, 1)), "{moves:?}");
    assert_eq!(table.count(2), 42);
    assert_eq!(arbiter.suspects(&three, 6_000 * MS).len(), 3, "votes from before the change do not count");
}

#[test]
fn reasons_to_keep_the_table() {
    let settings = Settings { pause_ns: 5 * S, ..Settings::default() };
    let (two, table) = (CoreSet::first(2), table(2));
    let mut arbiter = Arbiter::new(settings);
    assert_eq!(keep(arbiter.decide(&table, &[], &two, true, 0)), Reason::NoVotes);
    told(&mut arbiter, &[150, 110], 0..=1_000);
    assert_eq!(keep(arbiter.decide(&table, &[], &two, true, S)), Reason::Balanced);
    told(&mut arbiter, &[250, 110], 1_100..=3_000);
    assert_eq!(keep(arbiter.decide(&table, &[], &two, true, 3 * S)), Reason::Brief);
    told(&mut arbiter, &[250, 110], 3_100..=4_000);
    assert_eq!(keep(arbiter.decide(&table, &[], &two, false, 4 * S)), Reason::Unsettled);
    // All the work in one bucket: it would only change places.
    let mut one = vec![0; 128];
    one[3] = 77;
    assert_eq!(keep(arbiter.decide(&table, &one, &two, true, 4 * S)), Reason::NothingFits);
    let Decision::Change { table, moves } = arbiter.decide(&table, &[], &two, true, 4 * S) else {
        panic!("nothing moves")
    };
    assert_eq!((table.era(), moves.len(), table.chain(moves[0].bucket)), (1, 4, &[0][..]));
    told(&mut arbiter, &[250, 110], 4_100..=8_000);
    assert_eq!(keep(arbiter.decide(&table, &[], &two, true, 8 * S)), Reason::Pause);
    let strict = Settings { unsettled_max: 3, ..settings };
    let mut arbiter = Arbiter::new(strict);
    told(&mut arbiter, &[250, 110], 0..=8_000);
    arbiter.decide(&table, &[], &two, true, 7 * S);
    assert_eq!(keep(arbiter.decide(&table, &[], &two, true, 8 * S)), Reason::Unsettled);
}

#[test]
fn the_busiest_bucket_that_fits_moves_first() {
    let mut arbiter = Arbiter::new(Settings { persist_ns: 0, moves_max: 1, ..Settings::default() });
    told(&mut arbiter, &[200, 40], 0..=1_000);
    let mut work = vec![0u32; 128];
    // Of 200: 100, 50, 40, 10. The gap is 160, of which 3/8 may move: 60.
    (work[0], work[1], work[2], work[3]) = (1_000, 500, 400, 100);
    let two = CoreSet::first(2);
    let Decision::Change { moves, .. } = arbiter.decide(&table(2), &work, &two, true, S) else {
        panic!("nothing moves")
    };
    assert_eq!(moves, [Move { bucket: 1, from: 0, to: 1 }]);
}

/// Few flows that are large: each gets a core of its own as far as there are cores, and one alone stays where it is.
#[test]
fn large_flows_part_and_one_alone_stays() {
    let moves = |work: &[u32], loads: &[u8]| {
        let mut arbiter = Arbiter::new(Settings { persist_ns: 0, ..Settings::default() });
        told(&mut arbiter, loads, 0..=1_000);
        let mut all = vec![0u32; 128];
        all[..work.len()].copy_from_slice(work);
        match arbiter.decide(&table(2), &all, &CoreSet::first(2), true, S) {
            Decision::Change { moves, .. } => moves.len(),
            Decision::Keep(_) => 0,
        }
    };
    assert_eq!(moves(&[100, 100], &[140, 10]), 1);
    assert_eq!(moves(&[100, 100, 100, 100], &[200, 10]), 2);
    assert_eq!(moves(&[100, 3], &[200, 10]), 1, "the small one goes");
    assert_eq!(moves(&[100], &[200, 10]), 0);
    // The idle one would be the busy one.
    assert_eq!(moves(&[300, 1], &[200, 60]), 1);
    assert_eq!(moves(&[100, 80], &[255, 10]), 1);
    assert_eq!(moves(&[170, 85], &[255, 130]), 0);
}

#[test]
fn buckets_with_a_history_and_buckets_that_have_just_moved_stay() {
    let settings = Settings { persist_ns: 0, pause_ns: 0, moves_max: 1, ..Settings::default() };
    let mut arbiter = Arbiter::new(settings);
    let two = CoreSet::first(2);
    let mut work = vec![0u32; 128];
    (work[0], work[1], work[2], work[3], work[4]) = (300, 200, 150, 100, 250);
    work[70] = 700;
    let mut decide = |table: &BucketTable, loads: &[u8], now_ms: u64| {
        told(&mut arbiter, loads, now_ms - 500..=now_ms);
        match arbiter.decide(table, &work, &two, true, now_ms * MS) {
            Decision::Change { table, moves } => Some((table, moves[0].bucket, moves[0].to)),
            Decision::Keep(_) => None,
        }
    };
    // Of a load of 200 bucket 0 has 60, which is 3/8 of the difference.
    let (mut first, bucket, to) = decide(&table(2), &[200, 40], 1_000).unwrap();
    assert_eq!((bucket, to), (0, 1));
    // Its flows end at once; still it does not go back, although all the work is there now.
    assert!(first.retire(0, 0));
    assert_eq!(decide(&first, &[40, 200], 2_000), None);
    let (second, bucket, to) = decide(&first, &[40, 200], 31_500).unwrap_or_else(|| panic!("rested"));
    assert_eq!((bucket, to, second.chain(0)), (0, 0, &[1][..]));
    // Long after, with its flows alive: the next best goes.
    let (_, bucket, to) = decide(&second, &[200, 40], 90_000).unwrap();
    assert_eq!((bucket, to), (4, 1));
}

#[test]
fn once_moving_it_goes_on_to_half_the_spread() {
    let settings = Settings { persist_ns: 0, moves_max: 50, spread_min: 60, ..Settings::default() };
    let mut arbiter = Arbiter::new(settings);
    told(&mut arbiter, &[128, 64], 0..=1_000);
    let Decision::Change { moves, .. } = arbiter.decide(&table(2), &[], &CoreSet::first(2), true, S) else {
        panic!("nothing moves")
    };
    // 2 of 128 each: 64 − 4 × 9 = 28 is the first below 30.
    assert_eq!(moves.len(), 9);
}

#[test]
fn cores_that_go_and_come_back() {
    let four = table(4);
    use CoreState::{Active, Draining, Stuck};
    let three = replan(&four, &[Active, Active, Stuck, Active], &[]).unwrap();
    assert_eq!((three.count(2), three.era()), (0, 1));
    assert!((0..128).all(|bucket| !three.chain(bucket).contains(&2)), "a dead core is skipped");
    assert!([0, 1, 3].iter().all(|&core| (42..=43).contains(&three.count(core))));
    let again = replan(&three, &[Active; 4], &[]).unwrap();
    assert!((0..4).all(|core| (24..=35).contains(&again.count(core))), "{:?}", again.owners());
    assert!(replan(&four, &[Stuck; 4], &[]).is_err());
    // One that drains owns nothing, but what it owned it may still have flows of; better it than none.
    let drained = replan(&four, &[Active, Active, Draining, Active], &[]).unwrap();
    assert_eq!(drained.count(2), 0);
    assert!((0..128).all(|bucket| (four.owner(bucket) == 2) == drained.chain(bucket).contains(&2)));
    assert_eq!(replan(&four, &[Stuck, Stuck, Draining, Stuck], &[]).unwrap().count(2), 128);
    // An earlier owner goes when it works by this table and has nothing left.
    let at = |era, live| move |_: u16, bucket: usize| Some((era, if bucket == 0 { live } else { 0 }));
    assert!(retire_owners(&drained, at(drained.era() - 1, 0)).is_none(), "it may not know the table yet");
    let settled = retire_owners(&drained, at(drained.era(), 1)).unwrap();
    assert!((0..128).all(|bucket| settled.chain(bucket).is_empty() || bucket == 0));
    assert_eq!(settled.chain(0), drained.chain(0));
}

/// A chain is asked for at most what it has: without an answer it stays.
#[test]
fn owners_that_report_nothing_stay() {
    let drained = replan(&table(2), &[CoreState::Active, CoreState::Draining], &[]).unwrap();
    assert!(retire_owners(&drained, |_, _| None).is_none());
}

/// One core is busy with something that is not its buckets: they move at longer and longer intervals, and are back to short ones when
/// that ends.
#[test]
fn moves_that_do_not_help_become_rare() {
    let mut arbiter = Arbiter::new(Settings { rest_ns: 0, ..Settings::default() });
    let (two, mut table) = (CoreSet::first(2), table(2));
    let mut changes = Vec::new();
    for tick in 0..3_000u64 {
        let now_ns = tick * 100 * MS;
        let loads = if tick < 2_400 { [200, 60] } else { [120, 110] };
        for (core, load) in (0u8..).zip(loads) {
            arbiter.vote(Vote { core, load, priority: 1, at_ns: now_ns });
        }
        if let Decision::Change { table: next, moves } = arbiter.decide(&table, &[], &two, true, now_ns) {
            changes.push(tick / 10);
            table = next;
            for moved in moves {
                table.retire(moved.bucket, moved.from.into());
            }
        }
    }
    let waits: Vec<u64> = changes.windows(2).map(|two| two[1] - two[0]).collect();
    assert_eq!(waits, [4, 8, 16, 32, 64, 64]);
    told(&mut arbiter, &[200, 60], 300_000..=302_000);
    arbiter.decide(&table, &[], &two, true, 301_000 * MS);
    assert!(matches!(arbiter.decide(&table, &[], &two, true, 302_000 * MS), Decision::Change { .. }));
}

/// A machine: buckets with demands, cores that vote with noise, flows that end after a while.
struct Machine {
    demand: Vec<u32>,
    table: BucketTable,
    arbiter: Arbiter,
    cores: u8,
    noise: u32,
    random: u64,
    settled_at_ns: u64,
    /// (time, move).
    moves: Vec<(u64, Move)>,
}

impl Machine {
    fn new(cores: u8, demand: Vec<u32>, noise: u32, seed: u64) -> Self {
        Self {
            demand,
            table: table(cores.into()),
            arbiter: Arbiter::new(Settings::default()),
            cores,
            noise,
            random: seed | 1,
            settled_at_ns: 0,
            moves: Vec::new(),
        }
    }

    fn random(&mut self, below: u32) -> u32 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 16) as u32 % below.max(1)
    }

    /// Demand of each core: 255 is all it can do.
    fn loads(&self) -> Vec<u32> {
        let mut loads = vec![0; usize::from(self.cores)];
        for (bucket, demand) in self.demand.iter().enumerate() {
            loads[usize::from(self.table.owner(bucket))] += demand;
        }
        loads.iter().map(|load| load / 100).collect()
    }

    fn spread(&self) -> u32 {
        let loads = self.loads();
        loads.iter().max().unwrap() - loads.iter().min().unwrap()
    }

    /// One tick of 100 ms.
    fn tick(&mut self, now_ns: u64) {
        for (core, load) in (0u8..).zip(self.loads()) {
            let noisy = (load + self.random(2 * self.noise + 1)).saturating_sub(self.noise).min(255);
            self.arbiter.vote(Vote { core, load: noisy as u8, priority: 1, at_ns: now_ns });
        }
        let work: Vec<u32> =
            (0..128).map(|bucket| self.demand[bucket] * (90 + self.random(21)) / 100).collect();
        let usable = CoreSet::first(self.cores.into());
        let settled = now_ns >= self.settled_at_ns;
        if let Decision::Change { table, moves } =
            self.arbiter.decide(&self.table, &work, &usable, settled, now_ns)
        {
            assert!(settled && moves.len() <= 4);
            for moved in moves {
                assert!(self.table.chain(moved.bucket).is_empty(), "an unsettled bucket moves");
                assert_eq!(self.table.owner(moved.bucket), u16::from(moved.from));
                assert_eq!(table.owner(moved.bucket), u16::from(moved.to));
                self.moves.push((now_ns, moved));
            }
            self.table = table;
            self.settled_at_ns = now_ns + 500 * MS;
        }
        // Flows end: some seconds after a move the history goes.
        let bucket = self.random(128) as usize;
        if let Some(&earlier) = self.table.chain(bucket).last() {
            self.table.retire(bucket, earlier);
        }
    }

    fn run(&mut self, seconds: std::ops::Range<u64>) {
        (seconds.start * 10..seconds.end * 10).for_each(|tick| self.tick(tick * 100 * MS));
    }

    /// Moves from a second on.
    fn moves_since(&self, second: u64) -> usize {
        self.moves.iter().filter(|(at_ns, _)| *at_ns >= second * S).count()
    }
}

/// Demands as hashes give them: most buckets alike, some much busier.
fn skewed(cores: u8, seed: u64) -> Vec<u32> {
    let mut machine = Machine::new(cores, Vec::new(), 0, seed);
    let mean = 130 * 100 * u32::from(cores) / 128;
    (0..128)
        .map(|bucket| match machine.random(10) {
            0 => mean * 3,
            _ if bucket < 32 => mean * 3 / 2,
            _ => mean / 3 + machine.random(mean / 2),
        })
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn the_loop_comes_to_rest_and_stays_there(cores in 2u8..9, noise in 0u32..26, seed in any::<u64>()) {
        let mut machine = Machine::new(cores, skewed(cores, seed), noise, seed);
        machine.run(0..240);
        prop_assert!(machine.spread() < 70, "{:?}", machine.loads());
        machine.run(240..480);
        // At rest: what still moves is what noise at the very edge brings about.
        prop_assert!(machine.moves_since(240) <= 4, "{:?}", machine.moves);
        for (place, (at_ns, one)) in machine.moves.iter().enumerate() {
            let soon = |(later_ns, other): &&(u64, Move)| other.bucket == one.bucket && later_ns - at_ns < 30 * S;
            prop_assert!(machine.moves[place + 1..].iter().find(soon).is_none(), "{one:?} moves again");
        }
    }

    #[test]
    fn noise_alone_moves_nothing(cores in 2u8..9, noise in 0u32..40, seed in any::<u64>()) {
        let even = vec![120 * 100 * u32::from(cores) / 128; 128];
        let mut machine = Machine::new(cores, even, noise, seed);
        machine.run(0..300);
        prop_assert_eq!(machine.moves.len(), 0);
    }

    #[test]
    fn a_new_demand_is_followed(seed in any::<u64>()) {
        let mut machine = Machine::new(4, vec![100 * 400 / 128; 128], 10, seed);
        machine.run(0..60);
        prop_assert_eq!(machine.moves.len(), 0);
        // Twice as much for the first core's buckets.
        machine.demand[..32].iter_mut().for_each(|demand| *demand *= 2);
        machine.run(60..180);
        prop_assert!(machine.spread() < 60, "{:?}", machine.loads());
    }

    #[test]
    fn same_votes_same_decision(seed in any::<u64>()) {
        let mut one = Machine::new(5, skewed(5, seed), 20, seed);
        let mut other = Machine::new(5, skewed(5, seed), 20, seed);
        one.run(0..60);
        other.run(0..60);
        prop_assert_eq!(one.moves, other.moves);
        prop_assert_eq!(one.table, other.table);
    }
}
