//! A bond: all paths to one peer (the "aggregated tunnel" of the seeds, row T1), as all cores see it.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::atomic::{
    AtomicBool, AtomicI64, AtomicU32, AtomicU64, Ordering::Acquire, Ordering::Relaxed, Ordering::Release,
};
use std::sync::{Arc, Mutex};

use arc_swap::{ArcSwap, ArcSwapOption};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use packet::attachment::BondId;
use packet::flow::FlowKey;
use prefix_trie::PrefixMap;
use steering::policy::{Policy, Pools};
use steering::symmetric::FlowHasher;

use crate::allowance::Allowances;
use crate::class::{Class, Classes};
use crate::config::{Peer, Spread};
use crate::core_overrides::{BondCores, CoreOverrides};
use crate::hello::ProcessorInfo;
use crate::keys::FlowDefinition;
use crate::lifecycle::Lifecycle;
use crate::memory::BondMemory;
use crate::mode::{Refusal, SteeringMode};
use crate::path::Path;
use crate::server_names::ServerNames;
use crate::session::Session;
use crate::time::Time;

/// Most paths of one bond. Path ids go further (0–254): an id is not reused within a key epoch.
pub const PATHS_MAX: usize = 64;
/// Pause between two reports to one core.
const REPORT_NS: u64 = 10_000_000;

/// The peer's processor information (row T3): enough to choose the receiving core of every flow.
pub struct PeerCores {
    /// The information in force.
    pub info: ProcessorInfo,
    /// As the peer told it, where that is something else.
    told: Option<Box<ProcessorInfo>>,
    hasher: FlowHasher,
    pools: Pools,
}

impl PeerCores {
    /// Takes over a peer's processor information, and what holds instead.
    pub fn new(told: ProcessorInfo, overrides: Option<&CoreOverrides>) -> Self {
        let (info, told) = match overrides.and_then(|overrides| overrides.apply(&told)) {
            Some(info) => (info, Some(Box::new(told))),
            None => (told, None),
        };
        let hasher = FlowHasher::new(info.flow_hash_key);
        let pools = Pools::new(&info.remote_cores());
        Self { info, told, hasher, pools }
    }

    /// As the peer told it.
    pub fn told(&self) -> &ProcessorInfo {
        self.told.as_deref().unwrap_or(&self.info)
    }

    /// Hash of a flow under the peer's key, in the tenant that we are of there.
    pub fn hash(&self, flow: &FlowKey) -> u32 {
        self.hasher.hash(flow, self.info.tenant)
    }

    /// The core for a flow with this hash and class: the one that the peer's table names, unless it reserves or prefers others.
    pub fn core_of_hash(&self, hash: u32, class: u8) -> u8 {
        self.pools.by_hash(&self.info.table, hash, class).filter(|core| *core < self.info.cores).unwrap_or(0)
    }
}

/// Counters of a bond that no single core or path owns.
#[derive(Default)]
pub struct BondTotals {
    /// Completed handshakes.
    pub handshakes: AtomicU64,
    /// Datagrams that arrived after a NACK or a path's death, over another path.
    pub recovered: AtomicU64,
    /// Copies of class `critical` that came before their originals, or instead of them (row R3).
    pub copies_used: AtomicU64,
    /// Datagrams that had come already, as copy or original, and were not forwarded again.
    pub copies_suppressed: AtomicU64,
    /// Datagrams that were lost and came back from repair symbols.
    pub restored: AtomicU64,
    /// Packets the order logic gave up.
    pub declared_lost: AtomicU64,
    /// Packets held for order now, all cores.
    pub held_packets: AtomicI64,
    /// Bytes waiting to be sent now, all cores.
    pub queue_bytes: AtomicI64,
}

/// Times of the peer.
struct Clocks {
    /// Clock offset reference for relative one-way delays: bit 32 = set, low 32 bits the first difference.
    reference: AtomicU64,
    /// When each of the peer's cores last sent anything, ns.
    cores_heard_at: Box<[AtomicU64]>,
}

/// Treatment of a bond's flows, replaced by reload.
#[derive(Default)]
pub(crate) struct BondClasses {
    era: AtomicU32,
    rules: ArcSwap<Classes>,
    uniform: AtomicBool,
    /// Servers that clients ask for in its flows.
    pub names: Arc<ServerNames>,
}

impl BondClasses {
    /// Takes over other rules.
    pub fn set(&self, rules: Arc<Classes>, spread: Spread) {
        let uniform = spread == Spread::Uniform;
        if **self.rules.load() != *rules || uniform != self.uniform.load(Relaxed) {
            self.rules.store(rules);
            self.uniform.store(uniform, Relaxed);
            self.era.fetch_add(1, Release);
        }
    }

    /// How bulk is spread over the paths.
    pub fn spread(&self) -> Spread {
        if self.uniform.load(Relaxed) { Spread::Uniform } else { Spread::Earliest }
    }

    /// Raised with the rules and the spread; never 0.
    pub fn era(&self) -> u32 {
        self.era.load(Acquire).wrapping_add(1).max(1)
    }

    /// Class of a flow, as far as its packets tell; those of the server's name come later.
    pub fn of_flow(&self, flow: &FlowKey, dscp: u8) -> Class {
        self.rules.load().decide(flow, dscp, None).0
    }

    /// The rules in force.
    pub fn rules(&self) -> Arc<Classes> {
        self.rules.load_full()
    }
}

/// One peer's bond, shared by all cores.
pub struct Bond {
    /// Slot in the node's list; fixed for the bond's life.
    pub slot: usize,
    /// Configuration; replaced by reload.
    pub peer: ArcSwap<Peer>,
    /// We dial: path ids and sockets are ours to choose.
    pub dialer: bool,
    /// Paths, in order of id.
    pub paths: ArcSwap<Vec<Arc<Path>>>,
    /// Session to seal with.
    pub current: ArcSwapOption<Session>,
    /// The peer's cores.
    pub cores: BondCores,
    /// Why the last handshake gave no session, if that was for the sides' wishes.
    pub refused: ArcSwapOption<Refusal>,
    /// Secret seed for choices that strangers must not guess.
    pub(crate) seed: u64,
    /// Raised when the peer restarted: order state begins anew.
    pub restarts: AtomicU32,
    /// Classes of the flows that are sent to the peer.
    pub(crate) classes: BondClasses,
    clocks: Clocks,
    /// Memory that the peer makes us use.
    pub memory: Arc<BondMemory>,
    /// Limits of how often the peer makes us do something.
    pub(crate) allowances: Allowances,
    /// Totals.
    pub totals: BondTotals,
    /// Handshake, path life cycle. Taken some times a second, never per packet.
    pub(crate) lifecycle: Mutex<Lifecycle>,
}

impl Bond {
    pub(crate) fn new(
        slot: usize,
        peer: Peer,
        dialer: bool,
        seed: u64,
        memory: BondMemory,
        lifecycle: Lifecycle,
    ) -> Self {
        Self {
            slot,
            peer: ArcSwap::from_pointee(peer),
            dialer,
            paths: ArcSwap::default(),
            current: ArcSwapOption::empty(),
            cores: BondCores::default(),
            refused: ArcSwapOption::empty(),
            seed,
            restarts: AtomicU32::new(0),
            classes: BondClasses::default(),
            clocks: Clocks {
                reference: AtomicU64::new(0),
                cores_heard_at: (0..=u8::MAX).map(|_| AtomicU64::new(0)).collect(),
            },
            memory: Arc::new(memory),
            allowances: Allowances::default(),
            totals: BondTotals::default(),
            lifecycle: Mutex::new(lifecycle),
        }
    }

    /// The path with this id.
    pub fn path(&self, id: u8) -> Option<Arc<Path>> {
        self.paths.load().iter().find(|path| path.id == id).cloned()
    }

    /// Notes an authenticated datagram that the peer's core `core` sent.
    pub fn note_core_heard(&self, now: Time, core: u8) {
        if let Some(heard_at) = self.clocks.cores_heard_at.get(usize::from(core)) {
            heard_at.store(now.ns(), Relaxed);
        }
    }

    /// When the peer's core `core` last gave a sign of life.
    pub fn core_heard_at(&self, core: u8) -> Time {
        Time::from_ns(
            self.clocks.cores_heard_at.get(usize::from(core)).map_or(0, |heard_at| heard_at.load(Relaxed)),
        )
    }

    /// Number of the interval between reports in which `now` is: the same on all cores, which then tell together what a path carried up
    /// to one moment.
    pub(crate) fn report_turn(&self, now: Time) -> u64 {
        now.plus_ns(self.seed % REPORT_NS).ns() / REPORT_NS
    }

    /// When a core that reported at `before` reports again.
    pub(crate) fn next_report(&self, before: Time) -> Time {
        let turns_ns = self.report_turn(before).saturating_add(1).saturating_mul(REPORT_NS);
        Time::from_ns(turns_ns - self.seed % REPORT_NS)
    }

    /// Relative one-way delay, µs: receiver's clock at arrival less our clock at departure, as a signed
    /// distance from the first such difference of the bond, so that all paths compare and clocks need not agree.
    pub fn relative_delay_us(&self, sent_us: u64, arrival_us: u32) -> i64 {
        const SET: u64 = 1 << 32;
        let difference = arrival_us.wrapping_sub(sent_us as u32);
        let mut reference = self.clocks.reference.load(Relaxed);
        if reference & SET == 0 {
            reference = SET | u64::from(difference);
            if let Err(first) = self.clocks.reference.compare_exchange(0, reference, Relaxed, Relaxed) {
                reference = first;
            }
        }
        i64::from(difference.wrapping_sub(reference as u32).cast_signed())
    }

    /// The peer's core for a flow, where this side chooses it and no memory of flows is needed for that.
    pub fn core_of(&self, flow: &FlowKey, dscp: u8, class: Class) -> Option<u8> {
        let (cores, session) = (self.cores.load_full()?, self.current.load_full()?);
        if session.sends == SteeringMode::PerTunnel {
            return Some(self.tunnel_core_of(&cores.info));
        }
        let by_hash = session.sends.sender_chooses() && cores.info.policy == Policy::Hash;
        let hash = cores.hash(&reduce(flow, cores.info.flow, dscp));
        by_hash.then(|| cores.core_of_hash(hash, class as u8))
    }

    /// The rules by which flows that are sent to the peer have their classes.
    pub fn classes(&self) -> Arc<Classes> {
        self.classes.rules()
    }

    /// Flows whose server's name was not looked for: too many at a time.
    pub fn server_names_missed(&self) -> u64 {
        self.classes.names.missed.load(Relaxed)
    }

    /// The peer's core for the whole tunnel (row T6): as configured here, else as the peer tells, as far as it may be
    /// used.
    pub(crate) fn tunnel_core_of(&self, info: &ProcessorInfo) -> u8 {
        let configured = self.peer.load().steering.peer_tunnel_core;
        let mut wanted = [configured, info.tunnel_core].into_iter().flatten();
        let usable = wanted.find(|core| info.usable.contains(*core));
        usable.or_else(|| info.unreserved().iter().next()).unwrap_or(0)
    }

    /// The peer's core that all packets of `session` go to; `None` where each flow has one.
    pub fn tunnel_core(&self, session: &Session) -> Option<u8> {
        let cores = self.cores.load();
        let info = cores.as_ref().map(|cores| &cores.info)?;
        (session.sends == SteeringMode::PerTunnel).then(|| self.tunnel_core_of(info))
    }

    /// Forgets the clock reference: the peer restarted with another clock.
    pub(crate) fn reset_clock(&self) {
        self.clocks.reference.store(0, Relaxed);
    }
}

/// Reduces a flow key to what makes a flow for this bond (row T2).
pub fn reduce(flow: &FlowKey, definition: FlowDefinition, dscp: u8) -> FlowKey {
    match definition {
        FlowDefinition::FiveTuple => *flow,
        FlowDefinition::FourTuple => FlowKey { protocol: 0, ..*flow },
        FlowDefinition::TwoTuple => FlowKey { protocol: 0, src_port: 0, dst_port: 0, ..*flow },
        // The class is part of the flow: it goes where the protocol number stands, which it cannot equal.
        FlowDefinition::FiveTupleDscp => FlowKey { protocol: flow.protocol.wrapping_add(dscp << 2), ..*flow },
    }
}

/// Which bond owns an inner prefix, by tenant; longest match wins.
#[derive(Default)]
pub struct AllowedIps {
    tenants: BTreeMap<u16, TenantIps>,
}

/// The prefixes of one tenant's peers.
#[derive(Default)]
struct TenantIps {
    v4: PrefixMap<Ipv4Net, usize>,
    v6: PrefixMap<Ipv6Net, usize>,
}

impl TenantIps {
    fn owner(&self, address: IpAddr) -> Option<usize> {
        match address {
            IpAddr::V4(address) => self.v4.get_lpm(&Ipv4Net::from(address)).map(|(_, slot)| *slot),
            IpAddr::V6(address) => self.v6.get_lpm(&Ipv6Net::from(address)).map(|(_, slot)| *slot),
        }
    }
}

impl AllowedIps {
    /// Adds a prefix of the bond in `slot`, whose peer is of this tenant.
    pub fn insert(&mut self, tenant: u16, net: IpNet, slot: usize) {
        let ips = self.tenants.entry(tenant).or_default();
        match net {
            IpNet::V4(net) => drop(ips.v4.insert(net.trunc(), slot)),
            IpNet::V6(net) => drop(ips.v6.insert(net.trunc(), slot)),
        }
    }

    /// Slot of the bond to which the host's own packets for `address` go: that of a peer without a tenant, else of the
    /// first tenant that has it.
    pub fn owner(&self, address: IpAddr) -> Option<usize> {
        self.tenants.values().find_map(|ips| ips.owner(address))
    }

    /// Slot of the bond that owns `address` among those of a tenant.
    pub fn owner_in(&self, tenant: u16, address: IpAddr) -> Option<usize> {
        self.tenants.get(&tenant)?.owner(address)
    }
}

/// All bonds of a node: replaced as a whole when the configuration changes.
#[derive(Default)]
pub struct Bonds {
    /// By slot; a removed peer leaves `None` so that slots stay.
    pub list: Vec<Option<Arc<Bond>>>,
    /// Who owns which inner address.
    pub allowed_ips: AllowedIps,
    slots: BTreeMap<BondId, usize>,
}

impl Bonds {
    /// These bonds, with the prefixes of their peers.
    pub fn new(list: Vec<Option<Arc<Bond>>>) -> Self {
        let (mut allowed_ips, mut slots) = (AllowedIps::default(), BTreeMap::new());
        for bond in list.iter().flatten() {
            let peer = bond.peer.load();
            slots.insert(peer.id, bond.slot);
            for net in &peer.allowed_ips {
                allowed_ips.insert(peer.tenant, *net, bond.slot);
            }
        }
        Self { list, allowed_ips, slots }
    }

    /// Slot of a bond.
    pub fn slot(&self, id: BondId) -> Option<usize> {
        self.slots.get(&id).copied()
    }

    /// The bond in a slot.
    pub fn get(&self, slot: usize) -> Option<&Arc<Bond>> {
        self.list.get(slot)?.as_ref()
    }

    /// All bonds that exist.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Bond>> {
        self.list.iter().flatten()
    }
}
