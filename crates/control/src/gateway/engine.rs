//! Engine's side of the gateway: control's words in the engine's numbers, and back.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use engine::Engine;
use engine::gateway::{CoreReport, CoreState, FlowEntry, GatewaySettings, Readers};
use packet::DropReason;
use packet::attachment::{BondId, Egress, Ingress, InterfaceId};
use packet::flow::FlowKey;
use packet::icmp::is_icmp;
use services::nat::NatEvent;
use services::policy::Policy;
use services::route::RouteQuery;
use services::spec::{LeaseSpec, LinkSpec, Mapping, NatMode, RuleAction, TCP};
use tunnel::class::Class;

use super::policy::{Desired, DeviceState};
use crate::config::services::Distribution;
use crate::nic_hash;
use crate::protocol::FlowFilter;
use crate::status::{
    BackendStatus, CoreServices, Explanation, FlowList, FlowReport, ForwardStatus, InterfaceStatus,
    NatStatus, RuleStatus, ServerStatus, ServicesStatus, TakenOverStatus, TraceReport, UnmetOfNat,
};

mod flow;

/// Reason of the engine for keeping its old policy or core states.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct EngineRefusal(String);

/// The interface that a packet comes in at is not known: no route leads to this source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no route to {0}, so the interface is not known; name it with --interface")]
pub struct ExplainError(IpAddr);

/// Flows that one answer lists at most.
pub const FLOWS_MAX: usize = 100_000;

/// The engine, and what control wanted last. All calls come from the node's thread.
pub struct EngineHandle<'a> {
    engine: &'a Engine,
    handle_state: &'a HandleState,
}

/// State between two calls.
#[derive(Default)]
pub struct HandleState {
    desired: Mutex<Option<Desired>>,
    /// Busy time of each core and when it was read.
    busy: Mutex<Option<(Instant, Vec<u64>)>>,
    /// Since when each backend is in its state.
    backends: Mutex<Ages>,
}

/// Since when something is as it is, by a number.
#[derive(Default)]
struct Ages(BTreeMap<u16, (&'static str, Instant)>);

impl Ages {
    /// Notes what everything is now, forgets what is gone, and tells since when each is so.
    fn note(&mut self, now: Instant, all: impl Iterator<Item = (u16, &'static str)>) {
        let mut before = std::mem::take(&mut self.0);
        self.0 = all
            .map(|(id, state)| {
                let since = before.remove(&id).filter(|(known, _)| *known == state);
                (id, (state, since.map_or(now, |(_, since)| since)))
            })
            .collect();
    }

    fn seconds(&self, now: Instant, id: u16) -> u64 {
        self.0.get(&id).map_or(0, |(_, since)| now.saturating_duration_since(*since).as_secs())
    }
}

impl<'a> EngineHandle<'a> {
    /// The engine as control speaks to it.
    #[must_use]
    pub fn new(engine: &'a Engine, handle_state: &'a HandleState) -> Self {
        Self { engine, handle_state }
    }

    fn names(&self) -> Names {
        let desired = self.handle_state.desired.lock().unwrap_or_else(PoisonError::into_inner);
        Names { desired: desired.clone(), policy: self.engine.policy() }
    }
}

/// State of a core in words.
pub(crate) const fn core_state(state: CoreState) -> &'static str {
    match state {
        CoreState::Active => "active",
        CoreState::Reserved => "reserved",
        CoreState::Draining => "draining",
        CoreState::Stuck => "stopped",
    }
}

/// Numbers back into names.
struct Names {
    desired: Option<Desired>,
    policy: Arc<Policy>,
}

impl Names {
    fn egress(&self, egress: Egress) -> String {
        match egress {
            Egress::Interface(id) => self.interface(id),
            Egress::Host => "gateway".to_owned(),
            Egress::Kernel => "kernel".to_owned(),
            Egress::Bond(id) => {
                self.policy.peer(id).map_or_else(|| "tunnel".to_owned(), |peer| format!("peer:{}", peer.name))
            }
            Egress::Core(core) => format!("core {core}"),
            Egress::Unit(unit) => format!("unit {unit}"),
        }
    }

    fn interface(&self, id: InterfaceId) -> String {
        self.policy.interface(id).map(|interface| interface.name.clone()).unwrap_or_default()
    }

    /// Whether packets leave there without a neighbor being looked for.
    fn is_point_to_point(&self, egress: Option<Egress>) -> bool {
        let interface = egress.and_then(Egress::interface).and_then(|id| self.policy.interface(id));
        interface.is_some_and(|interface| interface.link == LinkSpec::PointToPoint)
    }

    /// Kernel device where a packet comes in, if it comes in by an interface.
    fn device(&self, ingress: Ingress) -> Option<&str> {
        let Ingress::Interface(id) = ingress else { return None };
        self.policy.interface(id).map(|interface| interface.device.as_str())
    }

    fn tenant(&self, tenant: u16) -> String {
        self.policy.spec.tenants.get(usize::from(tenant)).cloned().unwrap_or_default()
    }

    fn rule(&self, rule: Option<u16>) -> String {
        match rule.and_then(|rule| self.policy.spec.rules.get(usize::from(rule))) {
            Some(rule) => rule.name.clone(),
            None => "default".to_owned(),
        }
    }

    fn flow(&self, entry: &FlowEntry, bucket: u32) -> FlowReport {
        let tenant = entry.original.1;
        let (protocol, [source, destination, translated_source, translated_destination]) =
            flow::all_ends(entry);
        let record = &entry.record;
        let nat = record.nat.checked_sub(1).and_then(|rule| self.policy.nat.mode(rule));
        let backend = record.backend.checked_sub(1).and_then(|id| self.policy.balancer.backend_ref(id));
        let state = if record.protocol == TCP {
            services::tcp::State::of(record).name().to_owned()
        } else if record.flags & services::flow::flags::REPLIED != 0 {
            "replied".to_owned()
        } else {
            "unreplied".to_owned()
        };
        FlowReport {
            core: usize::from(entry.core),
            bucket,
            protocol,
            source,
            destination,
            translated_source,
            translated_destination,
            tenant: self.tenant(tenant),
            interface: self.egress(record.ingress().into()),
            out: entry.ways[0].map(|(egress, _)| self.egress(egress)).unwrap_or_default(),
            state,
            rule: self.rule(record.rule.checked_sub(1)),
            nat: nat.map(|mode| mode_name(mode).to_owned()).unwrap_or_default(),
            virtual_server: backend.map(|backend| backend.server.to_owned()).unwrap_or_default(),
            idle_seconds: entry.idle_ns as f64 / 1e9,
            expires_in_seconds: entry.expires_ns as f64 / 1e9,
        }
    }
}

/// Source and destination for people. A key of ICMP has the query's identifier in the one or the other port; here it is
/// always the source's.
fn ends(key: &FlowKey) -> (SocketAddr, SocketAddr) {
    let dst_port = if is_icmp(key.protocol) { 0 } else { key.dst_port };
    (SocketAddr::new(key.src, key.sender_port()), SocketAddr::new(key.dst, dst_port))
}

fn mode_name(mode: NatMode) -> &'static str {
    match mode {
        NatMode::AddressAndPort => "address-and-port",
        NatMode::PortOnly => "port-only",
        NatMode::None => "none",
    }
}

fn action_name(action: RuleAction) -> &'static str {
    match action {
        RuleAction::Allow => "allow",
        RuleAction::Drop => "drop",
        RuleAction::Reject => "reject",
    }
}

impl EngineHandle<'_> {
    /// Puts all of it in force at once, without losing a flow. Called at start, when the host changes, at every reload and
    /// after live changes; never twice with the same content unless the last call failed. On error the old policy stays.
    /// An interface that cannot be opened is no error: [`Self::interface_errors`].
    pub fn apply(&self, desired: &Desired) -> Result<(), EngineRefusal> {
        *self.handle_state.desired.lock().unwrap_or_else(PoisonError::into_inner) = Some(desired.clone());
        self.engine.apply_gateway(&settings(desired)).map_err(EngineRefusal)
    }

    /// Tries again to open the interfaces that could not be opened.
    pub fn open_interfaces(&self) {
        if let Some(desired) = self.names().desired {
            self.engine.open_interfaces(&settings(&desired));
        }
    }

    /// Names of interfaces that could not be opened, with the reason.
    pub fn interface_errors(&self) -> BTreeMap<String, String> {
        let names = self.names();
        let errors = self.engine.interface_errors().into_iter();
        errors.map(|(port, error)| (names.interface(port), error)).collect()
    }

    /// Core of this node that sends a flow of the host to a peer, unless there are services, and the peer's core that processes it,
    /// where this side chooses that by hash.
    pub fn cores_of(&self, bond: BondId, flow: &FlowKey, dscp: u8, class: Class) -> (u8, Option<u8>) {
        let ownership = self.engine.ownership();
        let core = ownership.owner_of_class(ownership.hash(flow, 0), class as u8);
        let bonds = self.engine.bonds();
        let bond = bonds.iter().find(|known| known.peer.load().id == bond);
        let peer_core = bond.and_then(|bond| bond.core_of(flow, dscp, class));
        (core, peer_core)
    }

    /// Flows of the run before, if it handed some over.
    pub fn taken_over(&self) -> Option<TakenOverStatus> {
        self.engine.taken_over().as_ref().map(crate::handover::status)
    }

    /// Live state. Leases and groups may be left empty: control fills them in.
    pub fn status(&self) -> ServicesStatus {
        let names = self.names();
        let reports = self.engine.core_reports();
        let mut drops = BTreeMap::new();
        for report in &reports {
            for (reason, count) in report.drops.iter() {
                *drops.entry(reason.name().to_owned()).or_insert(0) += count;
            }
        }
        drops.retain(|_, count| *count > 0);
        let sum = |of: &dyn Fn(&CoreReport) -> u64| reports.iter().map(of).sum::<u64>();
        ServicesStatus {
            cores: self.cores(&reports),
            interfaces: interfaces(&names, &reports, &self.engine.interface_errors()),
            rules: rules(&names, &reports),
            nats: nats(&names, &reports),
            forwards: forwards(&names, &reports),
            virtual_servers: self.servers(&names),
            leases: Vec::new(),
            groups: Vec::new(),
            health_checks: None,
            drops,
            handed_off_packets: sum(&|report| report.counters.handed_out),
            replies_on_wrong_core_packets: sum(&|report| report.counters.replies_on_wrong_core),
            unmet: UnmetOfNat {
                low_ports_lost_flows: sum(&|report| report.counters.low_ports_lost),
                lost_nat_events: self.engine.lost_nat_events(),
            },
            policy_era: names.policy.era,
            taken_over: self.taken_over(),
        }
    }

    /// Flows that match, at most `limit` (≤ [`FLOWS_MAX`]).
    pub fn flows(&self, filter: &FlowFilter, limit: usize) -> FlowList {
        let names = Arc::new(self.names());
        let ownership = self.engine.ownership();
        let (filter, shared) = (filter.clone(), Arc::clone(&names));
        let to_report = move |entry: &FlowEntry| {
            let bucket = ownership.bucket(&entry.original.0, entry.original.1) as u32;
            shared.flow(entry, bucket)
        };
        let to_report = Arc::new(to_report);
        let matching = Arc::clone(&to_report);
        let seen = Arc::new(AtomicU64::new(0));
        let looked_at = Arc::clone(&seen);
        let matches: Arc<dyn Fn(&FlowEntry) -> bool + Send + Sync> = Arc::new(move |entry| {
            looked_at.fetch_add(1, Relaxed);
            // The report, with all its names, is made for those only that may be meant.
            filter.may_match(entry.core.into(), flow::all_ends(entry)) && filter.matches(&matching(entry))
        });
        let answer = self.engine.flows(&matches, limit + 1);
        let (mut found, cut) = (answer.flows, !answer.complete);
        let more = found.len() > limit;
        found.truncate(limit);
        let told: u64 = self.engine.core_reports().iter().map(|report| report.live_flows).sum();
        FlowList {
            flows: found.iter().map(|entry| to_report(entry)).collect(),
            // Cores that found enough have not looked at all, and what they told may be a second old.
            live_flows: seen.load(Relaxed).max(if more || cut { told } else { 0 }),
            more,
            cut,
        }
    }

    /// Which of these addresses flows use: as a destination, or as what the source was translated to. All of them when there
    /// are too many flows to look through.
    pub fn used_addresses(&self, addresses: &BTreeSet<IpAddr>) -> BTreeSet<IpAddr> {
        /// A core that looks through so many does nothing else for some milliseconds.
        const FLOWS_MAX: u64 = 50_000;
        if self.engine.core_reports().iter().any(|report| report.live_flows > FLOWS_MAX) {
            return addresses.clone();
        }
        let used = Arc::new(Mutex::new(BTreeSet::new()));
        let (found, wanted) = (Arc::clone(&used), addresses.clone());
        let matches: Arc<dyn Fn(&FlowEntry) -> bool + Send + Sync> = Arc::new(move |entry| {
            // What a stranger sends to the host itself holds nothing.
            let forwarded = entry.record.flags & services::flow::flags::LOCAL == 0;
            for address in [entry.original.0.dst, entry.reply.0.dst] {
                if forwarded && wanted.contains(&address) {
                    found.lock().unwrap_or_else(PoisonError::into_inner).insert(address);
                }
            }
            false
        });
        if !self.engine.flows(&matches, 1).complete {
            return addresses.clone();
        }
        let used = used.lock().unwrap_or_else(PoisonError::into_inner);
        used.clone()
    }

    /// Fate of a packet with this key that comes in by `ingress`; `None`: from where its source is.
    /// Changes nothing: no flow is made, no port taken.
    pub fn explain(&self, key: &FlowKey, ingress: Option<Ingress>) -> Result<Explanation, ExplainError> {
        let names = self.names();
        let policy = &names.policy;
        let routed = || match policy.fib.lookup(0, key.src)?.egress {
            Egress::Interface(id) => Some(Ingress::Interface(id)),
            Egress::Host => Some(Ingress::Host),
            Egress::Bond(id) => Some(Ingress::Bond(id)),
            Egress::Kernel | Egress::Core(_) | Egress::Unit(_) => None,
        };
        let ingress = match ingress {
            Some(ingress) => ingress,
            None if policy.is_own(key.src) => Ingress::Host,
            None => routed().ok_or(ExplainError(key.src))?,
        };
        let ownership = self.engine.ownership();
        let told = services::pipeline::explain(policy, &ownership, key, ingress);
        let mut explanation = self.say(key, &told, &names);
        if let Some(entry) = self.known_flow(key) {
            let bucket = ownership.bucket(&entry.original.0, entry.original.1) as u32;
            let report = names.flow(&entry, bucket);
            flow::decides(&mut explanation, key, &entry, report, &names, &self.engine.neighbors());
        }
        Ok(explanation)
    }

    /// Way of a packet with this key through the cluster, from this dispatcher on; `None`: it comes in by the interface to which its
    /// source is routed.
    pub fn trace(&self, key: &FlowKey, interface: Option<InterfaceId>) -> Result<TraceReport, &'static str> {
        let policy = self.engine.policy();
        let routed = || policy.fib.lookup(0, key.src)?.egress.interface();
        let interface =
            interface.or_else(routed).ok_or("no interface leads to its source; name one with --interface")?;
        let traced = self.engine.cluster_handle().trace(key, interface).ok_or(
            "no answer within a second: the interface is not shared or another dispatcher has it, or its data plane is not there",
        )?;
        let (dispatcher, way) = traced.route.split_first().ok_or("an answer without a way")?;
        Ok(TraceReport {
            dispatcher: *dispatcher,
            way: way.to_vec(),
            punts: way.len().saturating_sub(1),
            unit: way.last().copied().unwrap_or_default(),
            core: traced.trace.core,
            bucket: traced.trace.bucket,
            era: traced.trace.era,
            verdict: traced.trace.verdict.name().to_owned(),
        })
    }

    /// Tells whether a backend passes its health checks; places as in the spec of the last [`Self::apply`]. All backends
    /// are up until told otherwise, and keep what was told over an [`Self::apply`] as long as server name and address stay.
    /// `silent`: it is down and does not answer at all.
    pub fn set_backend_up(&self, server: usize, backend: usize, up: bool, silent: bool) {
        let policy = self.engine.policy();
        let Some(spec) = policy.spec.servers.get(server) else { return };
        let Some(address) = spec.backends.get(backend).map(|backend| backend.address) else { return };
        let mut all = policy.balancer.backends();
        if let Some(found) = all.find(|known| known.server == spec.name && known.address == address) {
            policy.balancer.set_silent(found.id, silent);
            policy.balancer.set_health(found.id, up, linux::clock::monotonic_ns());
        }
    }

    /// Takes a core out of the bucket table (`false`) or puts it back: its flows end on it, new ones go elsewhere.
    pub fn set_core(&self, core: usize, enabled: bool) -> Result<(), EngineRefusal> {
        self.engine.set_core(core, enabled).map_err(EngineRefusal)
    }

    /// Events of address translation since the last call, oldest first, empty unless [`Desired::nat_events`]; and how many
    /// since the start found no room.
    pub fn take_nat_events(&self) -> (Vec<NatEvent>, u64) {
        self.engine.take_nat_events()
    }

    /// Ports of an outside address that nobody can be given now, a bit for each 1,024: they belong to a lease or to a
    /// client's own block, or rest after one.
    pub fn closed_blocks(&self, address: IpAddr) -> u64 {
        self.engine.policy().nat.leases().closed(linux::clock::monotonic_ns(), address)
    }

    /// Why these leases of a configuration cannot be given; empty when they can.
    pub fn refused_leases(&self, leases: &[LeaseSpec]) -> Vec<String> {
        let policy = self.engine.policy();
        let refused = policy.nat.leases().refused(linux::clock::monotonic_ns(), leases);
        refused.iter().map(ToString::to_string).collect()
    }

    /// Keeps the kernel from forwarding between the interfaces, and from their packets, also where somebody has cleared that away.
    pub fn keep_tables(&self) -> Result<bool, linux::Error> {
        self.engine.keep_tables()
    }

    /// Once a second: notes what only time tells.
    pub fn tick(&self) {
        let policy = self.engine.policy();
        if policy.balancer.is_empty() {
            return;
        }
        self.note_backends(&policy.balancer.status(), Instant::now());
    }
}

/// Settings of the engine for a policy.
fn settings(desired: &Desired) -> GatewaySettings {
    let index = |device: &DeviceState| if device.up { device.index } else { None };
    GatewaySettings {
        spec: desired.spec.clone(),
        devices: desired.devices.iter().map(index).collect(),
        readers: match desired.distribution {
            Distribution::Flow => Readers::Flow,
            Distribution::Interface => Readers::Interface,
            Distribution::RoundRobin => Readers::RoundRobin,
            Distribution::Random => Readers::Random,
            Distribution::Cpu => Readers::Cpu,
        },
        rebalance: desired.core_rebalance,
        nat_events: desired.nat_events,
    }
}

fn interfaces(
    names: &Names,
    reports: &[CoreReport],
    errors: &BTreeMap<InterfaceId, String>,
) -> Vec<InterfaceStatus> {
    let each = names.policy.spec.interfaces.iter().enumerate().map(|(place, interface)| {
        let device = names.desired.as_ref().and_then(|desired| desired.devices.get(place));
        let counters = || reports.iter().filter_map(move |report| report.interfaces.get(place));
        let error = errors.get(&InterfaceId(place as u16));
        let state = match device {
            Some(device) if device.index.is_none() => "no such device",
            Some(device) if !device.up => "down",
            _ if error.is_some() => "failed",
            _ if !counters().any(|counted| counted.reads) => "starting",
            _ => "up",
        };
        InterfaceStatus {
            name: interface.name.clone(),
            device: interface.device.clone(),
            state: state.to_owned(),
            reason: error.cloned().unwrap_or_default(),
            addresses: interface.addresses.iter().map(ToString::to_string).collect(),
            tenant: names.tenant(interface.tenant),
            rx_packets: counters().map(|counted| counted.rx_packets).sum(),
            rx_bytes: counters().map(|counted| counted.rx_bytes).sum(),
            tx_packets: counters().map(|counted| counted.tx_packets).sum(),
            tx_bytes: counters().map(|counted| counted.tx_bytes).sum(),
            lost_packets: counters().map(|counted| counted.lost_packets).sum(),
            nic_hash: nic_hash::read(&interface.device).status(),
        }
    });
    each.collect()
}

fn rules(names: &Names, reports: &[CoreReport]) -> Vec<RuleStatus> {
    let hits = |place: usize| reports.iter().filter_map(|report| report.rule_hits.get(place)).sum();
    let spec = &names.policy.spec;
    let mut rules: Vec<RuleStatus> = spec
        .rules
        .iter()
        .enumerate()
        .map(|(place, rule)| RuleStatus {
            name: rule.name.clone(),
            action: action_name(rule.action).to_owned(),
            matched_flows: hits(place),
        })
        .collect();
    rules.push(RuleStatus {
        name: "default".to_owned(),
        action: match spec.interfaces.iter().find_map(|interface| interface.through_action) {
            Some(action) => {
                format!("{}, from outside {}", action_name(spec.default_action), action_name(action))
            }
            None => action_name(spec.default_action).to_owned(),
        },
        matched_flows: hits(spec.rules.len()),
    });
    rules
}

fn nats(names: &Names, reports: &[CoreReport]) -> Vec<NatStatus> {
    let spec = &names.policy.spec;
    let each = spec.nats.iter().enumerate().map(|(place, nat)| {
        let addresses = names.policy.nat.addresses(place as u16);
        let ports = u64::from(nat.ports.1.saturating_sub(nat.ports.0)) + 1;
        let flows = reports.iter().filter_map(|report| report.nat_flows.get(place)).sum();
        let refusals = || reports.iter().filter_map(|report| report.nat_refusals.get(place));
        // Only then each flow has a place of its own in a port table, of which there are several on each core.
        let counted = nat.mode == NatMode::AddressAndPort
            && nat.mapping == Mapping::EndpointDependent
            && nat.ports_per_client == 0;
        let tables = if counted { u64::from(nat.tables.max(1)) * reports.len().max(1) as u64 } else { 1 };
        let held = nat.reserved.iter().map(|(first, last)| {
            let (first, last) = (nat.ports.0.max(*first), nat.ports.1.min(*last));
            (u64::from(last) + 1).saturating_sub(u64::from(first))
        });
        let free = ports.saturating_sub(held.sum());
        NatStatus {
            out: nat.out.map(|out| names.interface(out)).unwrap_or_default(),
            mode: mode_name(nat.mode).to_owned(),
            total_ports: free * tables * addresses.len() as u64,
            addresses: addresses.iter().map(ToString::to_string).collect(),
            live_flows: flows,
            used_ports: counted.then_some(flows),
            exhausted_flows: refusals().map(|refused| refused.exhausted_flows).sum(),
            refused_flows: refusals().map(|refused| refused.over_limit_flows).sum(),
        }
    });
    each.collect()
}

fn forwards(names: &Names, reports: &[CoreReport]) -> Vec<ForwardStatus> {
    let more = |last: u16, first: u16| if last > first { format!("-{last}") } else { String::new() };
    let each = names.policy.spec.forwards.iter().enumerate().map(|(place, forward)| {
        let counted = || reports.iter().filter_map(move |report| report.forward_flows.get(place));
        ForwardStatus {
            listen: format!("{} {}", if forward.protocol == TCP { "tcp" } else { "udp" }, forward.listen)
                + &more(forward.last_port(), forward.listen.port()),
            to: forward.to.to_string()
                + &more(forward.to.port().saturating_add(forward.ports.saturating_sub(1)), forward.to.port()),
            live_flows: counted().map(|(live, _)| live).sum(),
            total_flows: counted().map(|(_, total)| total).sum(),
        }
    });
    each.collect()
}

fn backend_state(backend: &services::balance::BackendStatus) -> &'static str {
    if !backend.up {
        "down"
    } else if backend.draining || backend.weight == 0 {
        "draining"
    } else if backend.effective_weight < f64::from(backend.weight) {
        "slow-start"
    } else {
        "up"
    }
}

/// The word that serde writes for an enum of words.
fn serde_word(value: &impl serde::Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

impl EngineHandle<'_> {
    fn cores(&self, reports: &[CoreReport]) -> Vec<CoreServices> {
        let states = self.engine.core_states();
        let counters = self.engine.counters();
        let busy: Vec<u64> = counters.iter().map(|counters| counters.busy_ns.get()).collect();
        let now = Instant::now();
        let mut last = self.handle_state.busy.lock().unwrap_or_else(PoisonError::into_inner);
        let percent = |core: usize| {
            let (since, before) = last.as_ref()?;
            let elapsed_ns = now.duration_since(*since).as_nanos().max(1) as f64;
            let spent_ns = busy.get(core)?.saturating_sub(*before.get(core)?) as f64;
            Some((spent_ns * 100.0 / elapsed_ns).min(100.0))
        };
        let each = reports.iter().zip(states).zip(counters).enumerate();
        let each = each.map(|(core, ((report, (state, buckets)), worker))| {
            let counted = &report.counters;
            let drops = report.drops.iter().filter(|(_, count)| *count > 0);
            CoreServices {
                core,
                state: core_state(state).to_owned(),
                buckets: buckets as u32,
                rx_packets: counted.rx_packets,
                rx_bytes: counted.rx_bytes,
                tx_packets: counted.tx_packets,
                tx_bytes: counted.tx_bytes,
                live_flows: report.live_flows,
                new_flows: counted.flows_opened,
                handed_off_packets: counted.handed_out,
                taken_over_packets: counted.handed_in,
                busy_percent: percent(core).unwrap_or(0.0),
                round_us_max: worker.round_ns_max.get() / 1_000,
                rounds_over_1ms: worker.rounds_over_1ms.get(),
                rounds_over_5ms: worker.rounds_over_5ms.get(),
                reload_us_last: worker.reload_ns_last.get() / 1_000,
                reload_us_max: worker.reload_ns_max.get() / 1_000,
                reload_cpu_us_max: worker.reload_cpu_ns_max.get() / 1_000,
                drops: drops.map(|(reason, count)| (reason.name().to_owned(), count)).collect(),
            }
        });
        let cores = each.collect();
        *last = Some((now, busy));
        cores
    }

    fn note_backends(&self, servers: &[services::balance::ServerStatus], now: Instant) {
        let all = servers.iter().flat_map(|server| &server.backends);
        let mut ages = self.handle_state.backends.lock().unwrap_or_else(PoisonError::into_inner);
        ages.note(now, all.map(|backend| (backend.id, backend_state(backend))));
    }

    fn servers(&self, names: &Names) -> Vec<ServerStatus> {
        let told = names.policy.balancer.status();
        let now = Instant::now();
        self.note_backends(&told, now);
        let ages = self.handle_state.backends.lock().unwrap_or_else(PoisonError::into_inner);
        let specs = &names.policy.spec.servers;
        let each = told.into_iter().map(|server| {
            let spec = specs.iter().find(|spec| spec.name == server.name);
            let protocol = spec.map_or("", |spec| if spec.protocol == TCP { "tcp" } else { "udp" });
            let backends = server.backends.iter().map(|backend| BackendStatus {
                address: backend.address.to_string(),
                state: backend_state(backend).to_owned(),
                reason: String::new(),
                weight: backend.weight,
                live_connections: u64::from(backend.live),
                over_connections: u64::from(backend.over),
                total_connections: backend.total,
                state_age_seconds: ages.seconds(now, backend.id),
                drain_seconds_left: backend.drain_left_s,
            });
            ServerStatus {
                listen: format!("{protocol} {}", server.listen),
                method: serde_word(&server.method),
                delivery: spec.map(|spec| serde_word(&spec.delivery)).unwrap_or_default(),
                live_connections: u64::from(server.live),
                total_connections: server.total,
                refused_connections: server.refused,
                backends: backends.collect(),
                name: server.name,
            }
        });
        each.collect()
    }

    /// The flow that a packet of this tuple belongs to already.
    fn known_flow(&self, key: &FlowKey) -> Option<FlowEntry> {
        let key = *key;
        let matches: Arc<dyn Fn(&FlowEntry) -> bool + Send + Sync> =
            Arc::new(move |entry| entry.original.0 == key || entry.reply.0 == key);
        self.engine.flows(&matches, 1).flows.into_iter().next()
    }

    fn say(&self, key: &FlowKey, told: &services::pipeline::Explanation, names: &Names) -> Explanation {
        let policy = &names.policy;
        let server = told.server.and_then(|server| policy.balancer.server_name(server)).map(str::to_owned);
        let own_rules = policy.spec.nats.len() as u16;
        let translated = told.source.mode == NatMode::AddressAndPort;
        let neighbors = self.engine.neighbors();
        let out = told.egress.and_then(Egress::interface);
        let mac = out.zip(told.next_hop).and_then(|hop| neighbors.known.get(&hop).copied());
        let (cores, source) = (&told.cores, &told.source);
        let chooses = matches!(source.mode, NatMode::AddressAndPort | NatMode::PortOnly);
        let chosen = chooses && source.rule.is_some();
        let mut notes = Vec::new();
        let family = source.addresses.iter().find(|address| address.is_ipv4() == key.src.is_ipv4());
        let homeless = translated && source.rule.is_some() && family.is_none();
        if homeless {
            let out = told.egress.map(|egress| names.egress(egress)).unwrap_or_default();
            notes.push(format!("interface {out} has no address yet that its [[nat]] could give"));
        }
        let drop = told.drop.or(homeless.then_some(DropReason::NatNoAddress));
        let handed = |reads: &u8| *reads != cores.creator && told.drop.is_none();
        if let Some(reads) = cores.of_replies.filter(handed) {
            notes.push(format!("replies reach core {reads} and are handed to core {}", cores.creator));
        }
        if cores.owners.len() > 1 {
            notes.push(format!("cores asked for an existing flow, in order: {:?}", cores.owners));
        }
        Explanation {
            packet: key.to_string(),
            interface: names.egress(told.ingress.into()),
            tenant: names.tenant(told.tenant),
            hash: cores.hash,
            bucket: cores.bucket as u32,
            core: usize::from(cores.creator),
            nic: names.device(told.ingress).map(|device| nic_hash::read(device).predict(device, key)),
            flow: None,
            verdict: verdict(drop, told.egress).to_owned(),
            drop_reason: drop.map(|reason| reason.name().to_owned()).unwrap_or_default(),
            rule: names.rule(told.verdict.rule),
            rule_action: action_name(told.verdict.action).to_owned(),
            forward: told.forward.map(|listen| listen.to_string()),
            virtual_server: server,
            backend: told.backend,
            backend_reason: None,
            nat: source.rule.filter(|rule| *rule < own_rules).map_or(0, |rule| usize::from(rule) + 1),
            nat_mode: mode_name(source.mode).to_owned(),
            translated_source: match (translated, family) {
                (true, Some(address)) => Some(SocketAddr::new(*address, 0)),
                _ if chosen && !homeless => Some(SocketAddr::new(key.src, 0)),
                _ => None,
            },
            translated_destination: (told.destination != SocketAddr::new(key.dst, key.dst_port))
                .then_some(told.destination),
            route: policy
                .fib
                .find(&RouteQuery {
                    tenant: told.tenant,
                    ingress: Some(told.ingress),
                    key: key.with_destination(told.destination.ip(), told.destination.port()),
                    before: told.egress,
                })
                .map(|found| route_text(&found))
                .unwrap_or_default(),
            out: told.egress.map(|egress| names.egress(egress)).unwrap_or_default(),
            next_hop: told.next_hop.filter(|_| !names.is_point_to_point(told.egress)),
            next_hop_mac: mac.map(|mac| mac.map(|byte| format!("{byte:02x}")).join(":")),
            reply_core: cores.of_replies.map(usize::from),
            notes,
        }
    }
}

fn route_text(found: &services::route::Match) -> String {
    match found.route.via {
        Some(via) => format!("{} via {via}", found.prefix),
        None => found.prefix.to_string(),
    }
}

fn verdict(drop: Option<DropReason>, egress: Option<Egress>) -> &'static str {
    match (drop, egress) {
        (Some(DropReason::RuleReject), _) => "reject",
        (Some(_), _) | (None, None) => "drop",
        (None, Some(Egress::Host)) => "to the gateway",
        (None, Some(Egress::Kernel)) => "to the kernel, which passes it on",
        (None, Some(Egress::Bond(_))) => "into the tunnel",
        (None, Some(_)) => "forward",
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_identifier_of_icmp_is_the_sources_port() {
        for text in ["icmp 10.0.0.5 > 198.51.100.7 id 77", "icmp 198.51.100.7 > 10.0.0.5 id 77"] {
            let key: FlowKey = text.parse().unwrap();
            let (source, destination) = ends(&key);
            assert_eq!((source.port(), destination.port()), (77, 0), "{text}");
        }
        let key: FlowKey = "tcp 10.0.0.5:1 > 198.51.100.7:2".parse().unwrap();
        assert_eq!((ends(&key).0.port(), ends(&key).1.port()), (1, 2));
    }

    #[test]
    fn ages_begin_anew_with_each_change() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut ages = Ages::default();
        ages.note(at(0), [(1, "up"), (2, "up")].into_iter());
        ages.note(at(7), [(1, "up"), (2, "down")].into_iter());
        assert_eq!((ages.seconds(at(9), 1), ages.seconds(at(9), 2), ages.seconds(at(9), 3)), (9, 2, 0));
        ages.note(at(10), [(2, "down")].into_iter());
        ages.note(at(11), [(1, "up"), (2, "up")].into_iter());
        assert_eq!((ages.seconds(at(12), 1), ages.seconds(at(12), 2)), (1, 1));
    }
}
