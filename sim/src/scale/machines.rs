//! Units with their cores, and the way of a packet through them.

use std::sync::Arc;

use cluster::message::Role;
use cluster::unit::{Action, Figures, Identity, Snapshot, Unit};
use packet::flow::FlowKey;
use steering::owner_chain::Digest;
use steering::units::{Answer, EraSeen, Lease, Target, Units};

use super::wires::{Flight, Happening, hop_delay};
use super::{NOBODY, OUTSIDE, World};

/// Cores of a unit; each takes a snapshot over in its own time.
pub(super) const CORES: usize = 2;

/// A core of a unit.
#[derive(Clone, Default)]
pub(super) struct Core {
    pub units: Option<Arc<Units>>,
    pub seen: EraSeen,
    pub blocks: Arc<[Lease]>,
    number: u64,
}

/// A unit's machine.
pub(super) struct Machine {
    pub role: Role,
    pub unit: Unit,
    pub instance: u64,
    pub running: bool,
    pub connection: Option<u64>,
    /// When the last message arrives: at the manager, at the unit.
    pub last_ns: [u64; 2],
    /// It stands still until then.
    pub stalled_until_ns: u64,
    pub cores: [Core; CORES],
    /// Flows by bucket, and by block of ports.
    pub live: Vec<u32>,
    pub live_by_block: Vec<u32>,
    flows: u64,
    pub second_hops: u64,
    packets: u64,
}

/// End of a packet's way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// Its holder has it, after so many units.
    Kept { units: u8 },
    /// A unit begins its flow, after so many units.
    Begins { unit: u16, units: u8 },
    /// It was sent to a unit that is dead, or was dropped: it may come again.
    Lost,
}

impl Machine {
    pub fn new(node: u16, role: Role, buckets: usize) -> Self {
        let identity = Identity { node, role, weight: 1, instance: 0 };
        let owns = role.owns_flows();
        Self {
            role,
            unit: Unit::new(identity),
            instance: 0,
            running: false,
            connection: None,
            last_ns: [0; 2],
            stalled_until_ns: 0,
            cores: Default::default(),
            live: vec![0; buckets],
            live_by_block: vec![0; if owns { usize::from(OUTSIDE) * 64 } else { 0 }],
            flows: 0,
            second_hops: 0,
            packets: 0,
        }
    }

    pub fn start(&mut self, node: u16, instance: u64) {
        let identity = Identity { node, role: self.role, weight: 1_000, instance };
        self.unit = Unit::new(identity);
        self.instance = instance;
        self.running = true;
        self.connection = None;
        self.leave();
    }

    pub fn leave(&mut self) {
        self.cores = Default::default();
    }

    /// A flow has begun (1) or ended (−1).
    pub fn note_flow(&mut self, bucket: u16, block: Option<u16>, change: i32) {
        let slot = self.live.get_mut(usize::from(bucket));
        let block = block.and_then(|block| self.live_by_block.get_mut(usize::from(block)));
        for count in slot.into_iter().chain(block) {
            *count = count.wrapping_add_signed(change);
        }
        self.flows = self.flows.wrapping_add_signed(change.into());
    }

    pub fn clear(&mut self) {
        self.live.fill(0);
        self.live_by_block.fill(0);
        self.flows = 0;
    }

    pub fn report(&mut self) -> Vec<Action> {
        let figures = Figures {
            live: &self.live,
            in_use: self.flows,
            load_percent: 50,
            second_hops: self.second_hops,
            packets: self.packets,
            copied_to: None,
            inherited: 0,
        };
        self.unit.report(&figures)
    }

    /// A core works by a snapshot; the unit is told when all do.
    pub fn take_over(&mut self, core: usize, snapshot: &Snapshot, without_chains: bool) -> Vec<Action> {
        let Some(core) = self.cores.get_mut(core) else { return Vec::new() };
        if snapshot.number <= core.number {
            return Vec::new();
        }
        let mut units = Arc::clone(&snapshot.units);
        if without_chains {
            let table = Arc::make_mut(&mut units).eras.newest_mut();
            for bucket in 0..table.buckets() {
                for unit in table.chain(bucket).to_vec() {
                    table.retire(bucket, unit);
                }
            }
        }
        core.seen.note(&units);
        core.units = Some(units);
        core.blocks = Arc::clone(&snapshot.blocks);
        core.number = snapshot.number;
        let all = self.cores.iter().map(|core| core.number).min().unwrap_or(0);
        self.unit.took_over(all)
    }

    /// Decision of a core about a packet whose flow it does not have.
    fn ask(&mut self, core: usize, key: &FlowKey, target: &Target) -> Option<Answer> {
        let core = self.cores.get_mut(core)?;
        let units = core.units.as_ref()?;
        Some(units.ask(key, &target.visit, Digest::Unknown, &mut core.seen))
    }
}

impl World {
    /// The way of a packet that takes no time. `holder`: who has its flow.
    pub(super) fn walk(&mut self, key: &FlowKey, dispatcher: u16, core: usize, holder: u16) -> End {
        let first = self.machines[usize::from(dispatcher)].cores[core].units.as_ref();
        let Some(mut target) = first.map(|units| units.dispatch(key)) else { return End::Lost };
        let mut units = 1;
        loop {
            let Some(machine) =
                self.machines.get_mut(usize::from(target.unit)).filter(|machine| machine.running)
            else {
                return End::Lost;
            };
            if target.unit == holder {
                return End::Kept { units };
            }
            match machine.ask(core, key, &target) {
                Some(Answer::Begin) => return End::Begins { unit: target.unit, units },
                Some(Answer::Send(next)) => target = next,
                Some(Answer::TooOften | Answer::EraUnknown) | None => return End::Lost,
            }
            units += 1;
        }
    }

    /// A packet of a flow that begins comes to some dispatcher.
    pub(super) fn first_packet(&mut self, slot: u32, generation: u16) {
        if self.flows.generation(slot) != generation {
            return;
        }
        let (dispatcher, core) = (self.any_dispatcher(), slot as usize % CORES);
        let key = self.flows.key(slot);
        let units = self.machines[usize::from(dispatcher)].cores[core].units.as_ref();
        let Some(target) = units.map(|units| units.dispatch(&key)) else { return };
        self.fly(Flight { slot, generation, core, target });
    }

    fn fly(&mut self, flight: Flight) {
        let at_ns = self.now_ns + hop_delay(&mut self.rng);
        self.wires.push(at_ns, Happening::Packet(flight));
    }

    /// A packet reaches a unit.
    pub(super) fn packet(&mut self, Flight { slot, generation, core, target }: Flight) {
        if self.flows.generation(slot) != generation {
            return;
        }
        self.report.faults.packets += 1;
        let holder = self.flows.holder(slot);
        let key = self.flows.key(slot);
        let unit = target.unit;
        let Some(machine) = self.machines.get_mut(usize::from(unit)).filter(|machine| machine.running) else {
            self.report.faults.packets_lost += 1;
            return;
        };
        machine.packets += 1;
        if unit == holder {
            return;
        }
        match machine.ask(core, &key, &target) {
            Some(Answer::Begin) if holder == NOBODY => self.hold(slot, unit, core),
            Some(Answer::Begin) => self.report.flows.begun_twice += 1,
            Some(Answer::Send(target)) => {
                machine.second_hops += 1;
                self.fly(Flight { slot, generation, core, target });
            }
            Some(Answer::TooOften | Answer::EraUnknown) | None => self.report.faults.packets_lost += 1,
        }
    }
}
