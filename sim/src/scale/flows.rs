//! Millions of flows: each has a key, a bucket, a holder and an end; another one follows in its place.

use std::collections::BTreeMap;
use std::net::IpAddr;

use packet::flow::FlowKey;
use steering::symmetric::{FlowHasher, node_bucket};
use steering::toeplitz::KEY_BYTES;

use super::{NOBODY, Scenario};

/// End of a list.
const END: u32 = u32::MAX;

/// No block of ports.
const NONE: u16 = u16::MAX;

/// A flow lives at most so many seconds.
const LIFE_MAX: u32 = 6 * 3_600;

/// All flows, by place; a place has one flow after the other.
pub(super) struct Flows {
    hasher: FlowHasher,
    bucket_count: usize,
    holders: Vec<u16>,
    buckets: Vec<u16>,
    generations: Vec<u16>,
    blocks: Vec<u16>,
    /// The next flow that ends in the same second.
    next: Vec<u32>,
    /// The first that ends in a second.
    ending: Vec<u32>,
    /// Places whose flow was ended before its time.
    lost: Vec<u32>,
    /// Places that wait for an answer, by the second in which they look.
    waiting: BTreeMap<u32, Vec<(u32, u16)>>,
}

impl Flows {
    pub fn new(scenario: &Scenario, key: [u8; KEY_BYTES]) -> Self {
        let count = scenario.flows as usize;
        let mut flows = Self {
            hasher: FlowHasher::new(key),
            bucket_count: scenario.buckets,
            holders: vec![NOBODY; count],
            buckets: vec![0; count],
            generations: vec![0; count],
            blocks: vec![NONE; count],
            next: vec![END; count],
            ending: vec![END; (scenario.seconds + 2 * LIFE_MAX) as usize],
            lost: Vec::new(),
            waiting: BTreeMap::new(),
        };
        for slot in 0..count as u32 {
            flows.hash(slot);
        }
        flows
    }

    /// Key of the flow that a place has now.
    pub fn key(&self, slot: u32) -> FlowKey {
        key(slot, self.generations[slot as usize])
    }

    fn hash(&mut self, slot: u32) {
        let bucket = node_bucket(self.hasher.hash(&self.key(slot), 0), self.bucket_count);
        self.buckets[slot as usize] = bucket as u16;
    }

    pub fn bucket(&self, slot: u32) -> u16 {
        self.buckets[slot as usize]
    }

    pub fn block(&self, slot: u32) -> Option<u16> {
        Some(self.blocks[slot as usize]).filter(|block| *block != NONE)
    }

    pub fn holder(&self, slot: u32) -> u16 {
        self.holders[slot as usize]
    }

    pub fn generation(&self, slot: u32) -> u16 {
        self.generations[slot as usize]
    }

    pub fn hold(&mut self, slot: u32, unit: u16, block: Option<u16>) {
        self.holders[slot as usize] = unit;
        self.blocks[slot as usize] = block.unwrap_or(NONE);
    }

    /// Time that a place's next flow lives, in seconds: one in twenty minutes, three in four an hour, one in five hours.
    pub fn lifetime(&self, slot: u32, rng: &mut fastrand::Rng) -> u32 {
        let exponential = |mean: f64, rng: &mut fastrand::Rng| (-rng.f64().max(1e-9).ln() * mean) as u32 + 1;
        let life = match slot % 20 {
            0 => exponential(300.0, rng),
            1..16 => exponential(3_600.0, rng),
            _ => rng.u32(3_600..LIFE_MAX),
        };
        life.min(LIFE_MAX)
    }

    /// The place's flow ends `after` seconds from `now`.
    pub fn end_after(&mut self, slot: u32, now: u32, after: u32) {
        let Some(head) = self.ending.get_mut((now + after.max(1)) as usize) else { return };
        self.next[slot as usize] = std::mem::replace(head, slot);
    }

    /// The first of those that end in this second.
    pub fn take_ending(&mut self, second: u32) -> Option<u32> {
        let head = self.ending.get_mut(second as usize)?;
        Some(std::mem::replace(head, END)).filter(|slot| *slot != END)
    }

    pub fn following(&self, slot: u32) -> Option<u32> {
        Some(self.next[slot as usize]).filter(|slot| *slot != END)
    }

    /// Ends a flow, if it has begun; who had it. Its bucket and block
    /// stay those of the flow that ends until [`Flows::renew`].
    pub fn end(&mut self, slot: u32) -> u16 {
        std::mem::replace(&mut self.holders[slot as usize], NOBODY)
    }

    /// The place's next flow has another key.
    pub fn renew(&mut self, slot: u32) {
        let generation = &mut self.generations[slot as usize];
        *generation = generation.wrapping_add(1);
        self.blocks[slot as usize] = NONE;
        self.hash(slot);
    }

    /// Ends all flows of a unit; how many. Their clients begin anew.
    pub fn drop_of(&mut self, unit: u16) -> u64 {
        self.drop_if(|holder, _| holder == unit).len() as u64
    }

    /// Ends flows by holder and bucket; holder, bucket and block of each. Their clients begin anew.
    pub fn drop_if(&mut self, which: impl Fn(u16, u16) -> bool) -> Vec<(u16, u16, Option<u16>)> {
        let mut ended = Vec::new();
        for slot in 0..self.holders.len() {
            let (holder, bucket) = (self.holders[slot], self.buckets[slot]);
            if holder != NOBODY && which(holder, bucket) {
                ended.push((holder, bucket, self.block(slot as u32)));
                self.holders[slot] = NOBODY;
                self.lost.push(slot as u32);
            }
        }
        ended
    }

    /// Places whose flow was ended.
    pub fn take_lost(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.lost)
    }

    /// Whoever has no answer by then tries again.
    pub fn wait(&mut self, slot: u32, second: u32) {
        let generation = self.generation(slot);
        self.waiting.entry(second).or_default().push((slot, generation));
    }

    /// Places to look at in this second, with the generation of then.
    pub fn take_waiting(&mut self, second: u32) -> Vec<(u32, u16)> {
        let later = self.waiting.split_off(&(second + 1));
        std::mem::replace(&mut self.waiting, later).into_values().flatten().collect()
    }
}

/// A place's flow: client 10.0.0.0 and the place, a port for each.
fn key(slot: u32, generation: u16) -> FlowKey {
    let [_, a, b, c] = slot.to_be_bytes();
    FlowKey {
        src: IpAddr::from([10, a, b, c]),
        dst: IpAddr::from([203, 0, 113, 9]),
        src_port: 1_024 + generation % 60_000,
        dst_port: 443,
        protocol: 6,
    }
}

/// Some flow of every bucket.
pub(super) fn key_of_each_bucket(secret: [u8; KEY_BYTES], buckets: usize) -> Vec<FlowKey> {
    let hasher = FlowHasher::new(secret);
    let mut keys = vec![None; buckets];
    let mut missing = buckets;
    let mut slot = 0;
    while missing > 0 {
        let key = key(slot, u16::MAX);
        let place: &mut Option<FlowKey> = &mut keys[node_bucket(hasher.hash(&key, 0), buckets)];
        missing -= usize::from(place.is_none());
        place.get_or_insert(key);
        slot += 1;
    }
    keys.into_iter().flatten().collect()
}
