//! Several cores of one gateway in one thread, with rings that are lists.

use std::sync::Arc;

use packet::PacketPool;
use packet::attachment::{Ingress, InterfaceId};
use packet::flow::FlowKey;
use packet::vnet::VirtioNetHeader;
use services::Services;
use services::pipeline::{Frame, Handed, Neighbors, Outcome, Output};
use services::policy::Policy;
use services::random::Random;
use steering::assign;
use steering::ownership::Ownership;
use steering::table::Unit;

use super::packets::{self, SLOT_BYTES};
use crate::bench::gateway::{BATCH, Common};

/// A packet on its way in.
#[derive(Clone, Copy)]
pub struct Coming {
    pub key: FlowKey,
    pub replies: bool,
    pub number: u32,
}

/// Told of each packet that came out whole: core, outcome, tuple, number.
pub type Seen<'a> = dyn FnMut(u8, Outcome, &FlowKey, u32) + 'a;

pub struct Cores {
    pub policy: Arc<Policy>,
    pub ownership: Arc<Ownership>,
    neighbors: Arc<Neighbors>,
    pub cores: Vec<Services>,
    /// Packets that wait for each core.
    waiting: Vec<Vec<Coming>>,
    slots: Vec<[u8; SLOT_BYTES]>,
    caught: Caught,
    pub now_ns: u64,
    /// Packets handed from core to core.
    pub handed: u64,
}

/// Output of the cores besides their batches.
#[derive(Default)]
struct Caught {
    made: Vec<(Outcome, Vec<u8>)>,
    handed: Vec<(u8, Handed)>,
    pool: PacketPool,
}

impl Output for Caught {
    fn emit(&mut self, outcome: Outcome, _: Option<&FlowKey>, _: &VirtioNetHeader, bytes: &mut [u8]) {
        self.made.push((outcome, bytes.to_vec()));
    }

    fn to_unit(&mut self, _: u16, _: &Frame<'_>) {}

    fn hand_over(&mut self, core: u8, handed: Handed) -> bool {
        self.handed.push((core, handed));
        true
    }

    fn buffers(&mut self) -> &mut PacketPool {
        &mut self.pool
    }
}

impl Cores {
    pub fn new((policy, ownership, neighbors): Common) -> Self {
        let core = |id: u8| {
            let random = Random::of_number(0x5eed + u64::from(id));
            let mut core = Services::new(id, random, &policy, &ownership, Arc::clone(&neighbors));
            core.set_nat_events_wanted(false);
            core
        };
        let cores: Vec<Services> = (0..ownership.cores).map(core).collect();
        Self {
            waiting: cores.iter().map(|_| Vec::with_capacity(BATCH)).collect(),
            cores,
            policy,
            ownership,
            neighbors,
            slots: vec![[0; SLOT_BYTES]; BATCH],
            caught: Caught::default(),
            now_ns: 1_000_000_000_000,
            handed: 0,
        }
    }

    /// Puts a packet into a core's queue; a full one is worked off at once.
    pub fn arrive(&mut self, core: usize, interface: InterfaceId, coming: Coming, seen: &mut Seen<'_>) {
        if let Some(waiting) = self.waiting.get_mut(core) {
            waiting.push(coming);
            if waiting.len() == BATCH {
                self.work_off(core, interface, seen);
            }
        }
    }

    /// Works off what still waits.
    pub fn finish(&mut self, interface: InterfaceId, seen: &mut Seen<'_>) {
        for core in 0..self.cores.len() {
            self.work_off(core, interface, seen);
        }
    }

    fn work_off(&mut self, at: usize, interface: InterfaceId, seen: &mut Seen<'_>) {
        let Self { cores, waiting, slots, caught, now_ns, .. } = self;
        let (Some(core), Some(waiting)) = (cores.get_mut(at), waiting.get_mut(at)) else { return };
        let mut frames: Vec<Frame<'_>> = Vec::with_capacity(BATCH);
        for (slot, coming) in slots.iter_mut().zip(waiting.iter()) {
            let length = packets::write(slot, &coming.key, coming.replies, coming.number);
            frames.push(Frame::new(
                Ingress::Interface(interface),
                VirtioNetHeader::default(),
                &mut slot[..length],
            ));
        }
        core.batch(*now_ns, &mut frames, caught);
        for frame in &frames {
            tell(at as u8, frame.outcome, frame.bytes, seen);
        }
        waiting.clear();
        // Time goes on, but never so far that a flow ends.
        *now_ns += 100;
        self.work_off_rings(at as u8, seen);
    }

    /// Until nobody has anything for another core.
    fn work_off_rings(&mut self, from: u8, seen: &mut Seen<'_>) {
        let mut at = from;
        loop {
            for (outcome, bytes) in self.caught.made.drain(..) {
                tell(at, outcome, &bytes, seen);
            }
            let Some((to, mut handed)) = self.caught.handed.pop() else { return };
            self.handed += 1;
            at = to;
            if let Some(core) = self.cores.get_mut(usize::from(to)) {
                core.handed(self.now_ns, &mut handed, &mut self.caught);
            }
            self.caught.pool.recycle(handed.packet);
        }
    }

    /// Gives core 0 half the share of the others: some of its buckets move. How many.
    pub fn move_buckets(&mut self) -> Result<usize, String> {
        let units: Vec<Unit> = (0..u16::from(self.ownership.cores))
            .map(|id| Unit { id, weight: 1 + u32::from(id > 0) })
            .collect();
        let next = assign::plan(&self.ownership.table, &units, &[]).map_err(|error| error.to_string())?;
        let moved = self.ownership.table.moves(&next).count();
        self.ownership = Arc::new(self.ownership.with_table(next, self.ownership.alive));
        for core in &mut self.cores {
            core.follow(&self.policy, &self.ownership, &self.neighbors);
        }
        Ok(moved)
    }

    /// Replies that the cores themselves say were read by a wrong one.
    pub fn replies_on_wrong_core(&self) -> u64 {
        self.cores.iter().map(|core| core.counters.replies_on_wrong_core).sum()
    }
}

fn tell(core: u8, outcome: Outcome, bytes: &[u8], seen: &mut Seen<'_>) {
    if !matches!(outcome, Outcome::Dropped(_) | Outcome::Consumed | Outcome::Pending)
        && let Some((key, number)) = packets::read(bytes)
    {
        seen(core, outcome, &key, number);
    }
}
