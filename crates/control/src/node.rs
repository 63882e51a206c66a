//! Running node: engine, TUN interface, routes, WANs, names. [`crate::event_loop`] tells it what happened.

mod devices;
mod dialing;
mod requests;
mod sockets;

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ::cluster::snapshot::SharedInterface;
use engine::Engine;
use engine::config::{Peer, Settings, Snapshot, Wan};
use packet::attachment::InterfaceId;
use steering::units::Lease;

use crate::cluster_link::ClusterLink;
use crate::config::{Config, Endpoint, InterfaceMatch, Problem, Severity, classes, processor_file};
use crate::events::{EventSender, NodeEvent};
use crate::gateway::engine::{EngineHandle, HandleState};
use crate::gateway::policy;
use crate::gateway::supervisor::GatewaySupervisor;
use crate::handover;
use crate::host_checks::{self, HostWatch, Surroundings};
use crate::host_facts::{HostFacts, HostView, read_ephemeral_ports};
use crate::host_ports::SocketWatch;
use crate::kernel_routes::KernelRoutes;
use crate::lan::{self, LanDevice};
use crate::nat64;
use crate::peer_names::{self, Resolver};
use crate::protocol::Response;
use crate::reload::{self, ReloadReport};
use crate::route_plan::{HostPlan, Numbers, RouteInputs};
use crate::shared_devices;
use crate::status::read_tunnel::{self, BusyShares};
use crate::status::{ClusterStatus, NameReport, Report, WanReport};
use crate::takeover::Takeover;
use crate::timestamp_floor::TimestampFloor;
use crate::tls_paths::{self, TlsPaths};
use crate::unit_key::UnitKey;
use crate::wan_changes::WanChanges;
use crate::wan_use::WanUse;
use crate::wans::{self, LiveWan, WanRegistry};

/// Reason why a node did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The system refused something; the text says what and what would help.
    #[error("{0}")]
    Start(String),
}

/// A peer with a DNS name that stays unreachable is looked up again after so long.
const LOOK_UP_AGAIN: Duration = Duration::from_secs(10);
/// Endpoints of one peer that are given to the engine at most.
const ENDPOINTS_MAX: usize = 32;

/// WANs and endpoints that the engine was given last; it is told again only when they change.
#[derive(Clone, Default, PartialEq)]
struct Told {
    generation: u64,
    wans: Vec<Wan>,
    peers: Vec<(Vec<SocketAddr>, Option<Vec<u16>>)>,
}

/// Everything of a running node but its event loop.
pub(crate) struct Node {
    config: Config,
    /// Raised by every reload.
    generation: u64,
    engine: Engine,
    host: KernelRoutes,
    numbers: Numbers,
    tun_index: u32,
    registry: WanRegistry,
    lives: Vec<LiveWan>,
    resolver: Resolver,
    /// Routers that advertise the prefix of a NAT64.
    routers: nat64::Routers,
    /// Name servers are reached outside the tunnel now.
    outside: Vec<IpAddr>,
    looked_up_at: Instant,
    /// None for a key that was made for the run.
    state: Option<TimestampFloor>,
    told: Told,
    /// The engine could not do all it was told (a port was taken); tell it again.
    incomplete: bool,
    events: EventSender,
    last_read: Duration,
    /// Ports that the host's programs hold.
    sockets: SocketWatch,
    /// Connection to the manager of the cluster, if this machine is of one.
    cluster: Option<ClusterLink>,
    /// Interfaces that another dispatcher may have.
    takeover: Takeover,
    /// Ports that the manager leases to this machine.
    port_blocks: Option<BTreeSet<Lease>>,
    supervisor: GatewaySupervisor,
    /// State of the gateway's engine handle between calls.
    handle_state: HandleState,
    busy_shares: BusyShares,
    watch: HostWatch,
    lan: LanDevice,
    /// File in which flows wait for the next run.
    flows_file: PathBuf,
    /// Paths over TCP where UDP does not get through.
    tls_paths: TlsPaths,
    /// Quotas and schedules of WANs.
    wan_use: WanUse,
    /// Changes of them by operators since the start.
    wan_changes: WanChanges,
}

impl Node {
    /// Makes TUN interface and engine. Routes and WANs follow with the first [`Self::refresh`].
    pub(crate) fn start(
        config: Config,
        cpus: Vec<usize>,
        mut host: KernelRoutes,
        control_socket: &Path,
        events: EventSender,
    ) -> Result<Self, StartError> {
        let supervisor = GatewaySupervisor::new(&config, control_socket, events.try_clone().map_err(failed)?);
        let numbers = Numbers::of(&config.tun.name);
        let tun = lan::open_tun(&config.tun.name, cpus.len()).map_err(StartError::Start)?;
        let tun_index = tun.index();
        host.set_up_tun(tun_index, &config.tun, &policy::tun_addresses(&config))
            .map_err(|error| StartError::Start(format!("cannot set up {}: {error}", config.tun.name)))?;
        let wall_clock_ns = linux::clock::realtime_ns();
        let (state, floor) = reserve_timestamps(&config, wall_clock_ns);
        let flows_file = handover::path(control_socket);
        // Flows of a cluster are on other machines by now.
        let arrivals = handover::waiting(&flows_file).filter(|_| keeps_flows(&config));
        let tap = lan::open(&config, host.netlink(), cpus.len()).map_err(StartError::Start)?;
        let settings = Settings {
            timestamp_floor_ns: floor,
            wall_clock_ns,
            placement: arrivals.as_ref().map(|arrivals| arrivals.placement.clone()),
            ..settings(&config, cpus, numbers)
        };
        let engine = Engine::start(settings, Snapshot::default(), tun, tap).map_err(failed)?;
        arrivals.into_iter().for_each(|arrivals| engine.expect(arrivals));
        reserve_cores(&engine, &config).map_err(StartError::Start)?;
        engine.share_devices(shared_devices::open(&config, host.netlink()).map_err(StartError::Start)?);
        let (takeover, cluster) = join_cluster(&config, &engine, &events, control_socket)?;
        let mut node = Self {
            tls_paths: TlsPaths::new(&config, numbers.mark(), &events).map_err(StartError::Start)?,
            wan_use: WanUse::load(&config.node.state_dir, &config.tun.name),
            wan_changes: WanChanges::new(&config.wans),
            port_blocks: config.cluster.as_ref().map(|_| BTreeSet::new()),
            cluster,
            takeover,
            config,
            generation: 1,
            engine,
            host,
            numbers,
            tun_index,
            registry: WanRegistry::default(),
            lives: Vec::new(),
            resolver: Resolver::default(),
            routers: nat64::Routers::default(),
            outside: Vec::new(),
            looked_up_at: Instant::now(),
            state,
            told: Told::default(),
            incomplete: false,
            events,
            last_read: Duration::ZERO,
            sockets: SocketWatch::default(),
            supervisor,
            handle_state: HandleState::default(),
            busy_shares: BusyShares::default(),
            watch: HostWatch::default(),
            lan: LanDevice::default(),
            flows_file,
        };
        // Nothing can fail any more.
        handover::discard(&node.flows_file);
        node.set_names();
        node.choose_outside();
        Ok(node)
    }

    /// Index of the TUN interface.
    pub(crate) fn tun_index(&self) -> u32 {
        self.tun_index
    }

    /// How long it took to read the host's tables last: they are not read more often than they can be. What follows, such as
    /// opening devices for the first time, says nothing about how often.
    pub(crate) fn last_read(&self) -> Duration {
        self.last_read
    }

    /// Looks at the host and brings engine, routes and rules into line with it. A WAN that failed is told to the
    /// engine before anything else; one that came up only after its routes are there.
    pub(crate) fn refresh(&mut self) {
        let start = Instant::now();
        let view = match HostView::read(self.host.netlink()) {
            Ok(view) => view,
            Err(error) => {
                tracing::warn!(%error, "cannot look at the interfaces; trying again");
                self.incomplete = true;
                return;
            }
        };
        self.last_read = start.elapsed();
        let before = std::mem::take(&mut self.lives);
        self.lives = self.registry.observe(&self.config.wans, &self.config.tun.name, &view);
        self.wan_use.apply(&self.config, &mut self.lives);
        self.wan_changes.apply(&mut self.lives);
        self.tell_states(&before);
        // A network with IPv6 alone: IPv4 endpoints are behind its translator, if it has one.
        self.set_names();
        let was_up =
            |live: &LiveWan| !live.replaced && before.iter().any(|b| b.wan.id == live.wan.id && b.wan.up);
        let mut failed: Vec<Wan> = self.lives.iter().map(|live| live.wan.clone()).collect();
        for (wan, live) in failed.iter_mut().zip(&self.lives) {
            wan.up &= was_up(live);
        }
        self.tell_engine(failed);
        let plan = HostPlan::new(&RouteInputs {
            numbers: self.numbers,
            config: &self.config,
            view: &view,
            wans: &self.lives,
            tun_index: self.tun_index,
            outside: &self.outside,
        });
        self.host.apply(&plan);
        self.lan.follow(&self.config, &self.engine, &view, &mut self.host);
        self.set_devices(&view);
        self.tell_wans();
        self.refresh_services(&view);
        let states = |lives: &[LiveWan]| -> Vec<Wan> { lives.iter().map(|live| live.wan.clone()).collect() };
        if states(&before) != states(&self.lives) {
            self.resolver.hurry(Instant::now());
        }
    }

    /// Devices, packet engine and monitors, as the configuration wants them.
    fn refresh_services(&mut self, view: &HostView) {
        let ephemeral = read_ephemeral_ports();
        let mut facts = HostFacts::new(view, Some(self.tun_index), ephemeral);
        facts.port_blocks.clone_from(&self.port_blocks);
        facts.takes_over = self.takeover.is_wanted();
        facts.read_ipv6_mtus(self.config.services.devices());
        self.takeover.follow(&self.config, &facts, self.host.netlink());
        if self.config.services.gives_ports() {
            self.look_at_sockets();
            facts.held_ports = Arc::clone(self.sockets.known());
        }
        self.supervisor.refresh(
            &self.config,
            facts,
            self.host.netlink(),
            &EngineHandle::new(&self.engine, &self.handle_state),
        );
    }

    /// A monitor has a verdict about a backend.
    pub(crate) fn health(&self, change: &health::HealthChange) {
        self.supervisor.health(
            &self.config.services,
            change,
            &EngineHandle::new(&self.engine, &self.handle_state),
        );
    }

    /// The manager of the cluster leases these blocks of ports to this machine.
    pub(crate) fn port_blocks(&mut self, blocks: BTreeSet<Lease>) {
        tracing::info!(blocks = blocks.len(), "ports of this machine");
        self.port_blocks = Some(blocks);
        self.refresh();
    }

    /// Takes over the interfaces that another dispatcher may have, or lets go of them.
    pub(crate) fn take_over(&mut self, take: bool) -> Response {
        match self.takeover.want(&self.config, take) {
            Ok(()) => {
                self.refresh();
                // Once more with the addresses that are there now, or are not: nobody waits for the kernel's word.
                self.refresh();
                Response::done()
            }
            Err(error) => Response::error(error),
        }
    }

    /// Log files were renamed.
    pub(crate) fn reopen_logs(&mut self) {
        self.supervisor.reopen_log();
    }

    /// WANs that mean something: without `[[wan]]` and `[[peer]]` there is no tunnel.
    fn shown_wans(&self) -> &[LiveWan] {
        if self.config.peers.is_empty() && self.config.wans.is_empty() { &[] } else { &self.lives }
    }

    fn tell_states(&self, before: &[LiveWan]) {
        for live in self.shown_wans() {
            let known = before.iter().find(|known| known.wan.id == live.wan.id);
            if known
                .is_some_and(|known| known.state == live.state && known.wan.addresses == live.wan.addresses)
            {
                continue;
            }
            let wan = if live.wan.interface.is_empty() { "(host routes)" } else { &live.wan.interface };
            tracing::info!(wan, state = live.state, addresses = ?live.wan.addresses, "WAN");
        }
    }

    /// Tells the engine the present WANs and endpoints, unless it knows them already.
    fn tell_engine(&mut self, mut wans: Vec<Wan>) {
        let peers: Vec<_> = self
            .config
            .peers
            .iter()
            .map(|peer| {
                let mut endpoints = self.endpoints(&peer.endpoints);
                endpoints.extend(self.tls_paths.endpoints(peer.id));
                let wans = wans::ids_for_peer(peer.wans.as_deref(), &self.lives);
                (endpoints, wans.map(tls_paths::with_relays))
            })
            .collect();
        wans.extend(self.tls_paths.wans(&wans));
        let told = Told { generation: self.generation, wans, peers };
        if told == self.told && !self.incomplete {
            return;
        }
        let peers = self.config.peers.iter().zip(&told.peers).map(|(peer, (endpoints, wans))| Peer {
            id: peer.id,
            name: peer.name.clone(),
            tenant: policy::tenant_number(&self.config.services, peer.tenant.as_ref()),
            public_key: peer.public_key,
            preshared_key: peer.preshared_key.clone(),
            endpoints: endpoints.clone(),
            allowed_ips: peer.allowed_ips.clone(),
            wans: wans.clone(),
            hub: peer.kind.hub,
            paths: peer.paths.udp,
            encryption: peer.encryption,
            policy: peer.policy,
            flow: peer.flow,
            steering: peer.steering,
            ethernet: peer.kind.ethernet,
        });
        let members = |group: &str| self.supervisor.overrides.members_of(&self.config.services, group);
        let classes = classes::of_peers(&self.config, &self.lives, &members);
        let core_overrides = processor_file::of_peers(&self.config.peers);
        let snapshot = Snapshot { wans: told.wans.clone(), peers: peers.collect(), classes, core_overrides };
        self.told = told;
        match self.engine.apply(snapshot) {
            Ok(()) => self.incomplete = false,
            Err(error) => {
                if !self.incomplete {
                    tracing::error!(%error, "not everything could be applied; trying again");
                }
                self.incomplete = true;
            }
        }
    }

    /// Tells the resolver which names matter.
    fn set_names(&mut self) {
        let endpoints = self.config.peers.iter().flat_map(|peer| &peer.endpoints);
        let mut names: Vec<String> = Vec::new();
        for endpoint in endpoints {
            if let Endpoint::Name { host, .. } = endpoint {
                names.push(host.clone());
            }
        }
        if !self.translated_wans().is_empty() && self.routers.prefixes().is_empty() {
            names.push(nat64::NAME.to_owned());
        }
        self.resolver.set_names(names.iter().map(String::as_str));
    }

    /// WANs that reach IPv4 endpoints only through a translator of their network; none if there are no such endpoints.
    fn translated_wans(&self) -> Vec<&LiveWan> {
        let literal = |endpoint: &Endpoint| match endpoint {
            Endpoint::Address(address) => address.ip().to_canonical().is_ipv4(),
            Endpoint::Name { .. } => false,
        };
        if !self.config.peers.iter().flat_map(|peer| &peer.endpoints).any(literal) {
            return Vec::new();
        }
        self.lives.iter().filter(|live| nat64::needs(live)).collect()
    }

    /// Takes what routers advertise about a translator.
    fn look_at_routers(&mut self, now: Instant) {
        let interfaces: Vec<u32> = self.translated_wans().iter().filter_map(|live| live.index).collect();
        if self.routers.look(&interfaces, now) {
            let prefixes: Vec<String> = self.routers.prefixes().iter().map(ToString::to_string).collect();
            tracing::info!(?prefixes, "prefix of a NAT64 as routers advertise it (RFC 8781)");
            self.set_names();
            self.tell_wans();
        }
    }

    /// Starts the look-ups that are due. Returns when the next one is.
    pub(crate) fn look_up(&mut self) -> Option<Instant> {
        let now = Instant::now();
        self.look_at_routers(now);
        for host in self.resolver.due(now) {
            let asked = self.events.try_clone().and_then(|events| {
                peer_names::ask(host.clone(), move |host, answer| {
                    events.send(NodeEvent::Answer(host, answer));
                })
            });
            if let Err(error) = asked {
                self.resolver.answer(&host, Err(error.to_string()), now);
            }
        }
        [self.resolver.next(), self.routers.next(now)].into_iter().flatten().min()
    }

    /// Takes the answer to a look-up.
    pub(crate) fn answered(&mut self, host: &str, answer: peer_names::Answer) {
        if self.resolver.answer(host, answer, Instant::now()) {
            self.tell_wans();
        }
    }

    /// Once a second: keeps the state file, asks again for names of peers that cannot be reached.
    /// Returns whether [`Self::refresh`] is needed.
    pub(crate) fn tick(&mut self) -> bool {
        if let Some(state) = &mut self.state {
            state.keep(self.engine.timestamp_floor_ns());
        }
        if processor_file::follow(&mut self.config.peers) {
            self.tell_engine_anew();
        }
        self.watch_host();
        self.look_at_lines();
        self.lan.tick(&self.config, &self.engine, self.host.netlink());
        let handle = EngineHandle::new(&self.engine, &self.handle_state);
        let again = self.supervisor.tick(self.host.netlink(), &handle) || self.incomplete;
        let again = self.wan_use.tick(&self.config, &self.lives, &self.engine.bonds()) || again;
        if self.resolver.is_empty() {
            return again;
        }
        let changed = self.choose_outside();
        if self.waits_for_name() && self.looked_up_at.elapsed() >= LOOK_UP_AGAIN {
            self.looked_up_at = Instant::now();
            self.resolver.hurry(Instant::now());
        }
        changed || again
    }

    /// A peer that is dialled by name is not up.
    fn waits_for_name(&self) -> bool {
        let by_name = |name: &str| {
            self.config.peers.iter().any(|peer| {
                peer.name == name && peer.endpoints.iter().any(|e| matches!(e, Endpoint::Name { .. }))
            })
        };
        // Before the engine was told of any peer, all of them wait.
        self.told.peers.is_empty()
            || self
                .engine
                .bonds()
                .iter()
                .any(|bond| !read_tunnel::is_up(bond) && by_name(&bond.peer.load().name))
    }

    /// While a name waits to be resolved, name servers must be reached although the default route leads into a
    /// tunnel that is not there yet. Returns whether that changed.
    fn choose_outside(&mut self) -> bool {
        let needed = !self.resolver.is_empty() && self.config.has_default_route() && self.waits_for_name();
        let outside = if needed { peer_names::system_name_servers() } else { Vec::new() };
        let changed = outside != self.outside;
        self.outside = outside;
        changed
    }

    /// Reads the configuration again and applies what can be applied.
    pub(crate) fn reload(&mut self) -> Result<ReloadReport, Vec<Problem>> {
        let (mut new, warnings) = Config::load(&self.config.path).into_result()?;
        let mut wan_changes = self.wan_changes.clone();
        wan_changes.configured(&mut new.wans);
        let (config, mut report) = reload::merge(&self.config, &new);
        report.warnings = warnings.iter().map(ToString::to_string).collect();
        report.warnings.extend(host_warnings(&config));
        if let Some(message) =
            self.supervisor.refused(&config, &EngineHandle::new(&self.engine, &self.handle_state))
        {
            return Err(vec![problem(&config, Severity::Error, "lease", message)]);
        }
        (self.config, self.wan_changes) = (config, wan_changes);
        report.warnings.extend(self.supervisor.configured(&self.config));
        self.generation += 1;
        if let Err(error) = self.host.set_addresses(&policy::tun_addresses(&self.config)) {
            report.warnings.push(error.to_string());
        }
        report.warnings.extend(reserve_cores(&self.engine, &self.config).err());
        self.set_names();
        self.choose_outside();
        self.refresh();
        self.watch.ask();
        Ok(report)
    }

    /// Looks for what on the host stands in the way, when it is time to.
    fn watch_host(&mut self) {
        let start = Instant::now();
        if self.watch.is_due(start) {
            let texts = obstacle_texts(&self.config, self.host.netlink());
            self.watch.found(Instant::now(), start.elapsed(), texts);
        }
    }

    /// Live state.
    pub(crate) fn report(&mut self) -> Report {
        let status =
            read_tunnel::read(&self.engine, &self.config.node.name, &self.told.wans, &mut self.busy_shares);
        let wans = self.shown_wans().iter().map(|live| WanReport {
            id: live.wan.id,
            interface: live.wan.interface.clone(),
            state: live.state.to_owned(),
            addresses: live.wan.addresses.iter().map(ToString::to_string).collect(),
            tier: live.wan.tier,
            mtu: live.wan.mtu,
            quota_used: self.wan_use.used(&live.wan.interface),
        });
        let mut hosts: Vec<&str> = Vec::new();
        for endpoint in self.config.peers.iter().flat_map(|peer| &peer.endpoints) {
            if let Endpoint::Name { host, .. } = endpoint
                && !hosts.contains(&host.as_str())
            {
                hosts.push(host);
            }
        }
        let names = hosts.into_iter().map(|host| NameReport {
            host: host.to_owned(),
            addresses: self.resolver.addresses(host).iter().map(ToString::to_string).collect(),
            error: self.resolver.error(host).map(str::to_owned),
        });
        Report {
            status,
            tun: self.config.tun.name.clone(),
            listen: self.config.node.listen,
            wans: wans.collect(),
            names: names.collect(),
            warnings: self.watch.ask().to_vec(),
            forward_guard: self.engine.forward_guard(),
            gateway: self
                .supervisor
                .status(&self.config.services, &EngineHandle::new(&self.engine, &self.handle_state)),
            cluster: self.cluster_status(),
            lan: lan::status(&self.config, &self.engine),
        }
    }

    /// Part of this machine in the cluster, with what only the tunnel and the host know.
    fn cluster_status(&self) -> Option<ClusterStatus> {
        let mut status = self.cluster.as_ref()?.status();
        status.interfaces = self.takeover.report(&self.config);
        let bonds = self.engine.bonds();
        for plane in status.data_planes.iter_mut().filter(|plane| plane.node != status.node) {
            let peer = self
                .config
                .peers
                .iter()
                .find(|peer| peer.allowed_ips.iter().any(|net| net.contains(&plane.address)));
            plane.reachable = peer.is_some_and(|peer| {
                bonds.iter().any(|bond| bond.peer.load().name == peer.name && read_tunnel::is_up(bond))
            });
        }
        Some(status)
    }

    /// Heartbeat of the engine: [`engine::Engine::heartbeat`].
    pub(crate) fn heartbeat(&self) -> (u64, Vec<u8>) {
        self.engine.heartbeat()
    }

    /// Warning about an orderly end: [`host_checks::opens_forwarding`].
    pub(crate) fn opens_forwarding(&self) -> Option<String> {
        host_checks::opens_forwarding(&self.config)
    }

    /// Ends in order: peers are told while the WANs still have their routes, then everything is taken back.
    pub(crate) fn stop(self) {
        if let Some(warning) = self.opens_forwarding() {
            tracing::warn!("{warning}");
        }
        let Self {
            mut engine,
            mut host,
            mut state,
            mut supervisor,
            handle_state,
            cluster,
            takeover,
            config,
            flows_file,
            mut wan_use,
            ..
        } = self;
        wan_use.finish();
        drop(cluster);
        let used_ns = engine.timestamp_floor_ns();
        supervisor.end(&EngineHandle::new(&engine, &handle_state));
        let waits = keeps_flows(&config) && handover::give(&mut engine, &flows_file);
        if waits && let Err(error) = engine.hold(config.services.settings.keep_flows_s) {
            tracing::warn!(%error, "until the next start the kernel may reset flows that wait for it");
        }
        engine.stop();
        if waits {
            supervisor.leave(host.netlink(), config.services.settings.keep_flows_s);
        } else {
            supervisor.clear(host.netlink());
        }
        takeover.end(host.netlink());
        host.clear();
        if let Some(state) = &mut state {
            state.finish(used_ns);
        }
    }
}

/// Settings of the engine that follow from the configuration alone.
fn settings(config: &Config, cpus: Vec<usize>, numbers: Numbers) -> Settings {
    Settings {
        name: config.node.name.clone(),
        private_key: config.node.private_key.clone(),
        hub_key: config.cluster.as_ref().and_then(|cluster| cluster.hub_key.clone()),
        cpus,
        listen_port: config.node.listen,
        tun_name: config.tun.name.clone(),
        tun_mtu: config.tun.mtu,
        mark: numbers.mark(),
        timestamp_floor_ns: 0,
        wall_clock_ns: 0,
        placement: None,
        rekey_after_ms: u64::from(config.node.rekey_after_seconds) * 1_000,
    }
}

/// Whether flows wait for the next run.
fn keeps_flows(config: &Config) -> bool {
    config.services.settings.keep_flows_s > 0 && !config.services.is_empty() && config.cluster.is_none()
}

fn failed(error: impl std::fmt::Display) -> StartError {
    StartError::Start(error.to_string())
}

/// Warnings about a configuration from the host as it is now: interfaces that are not there (they may come later, or
/// the name is wrong), default routes that only forwarded packets have, and what else stands in the way.
#[must_use]
pub fn host_warnings(config: &Config) -> Vec<String> {
    let Ok(netlink) = linux::netlink::Netlink::open() else { return Vec::new() };
    let Ok(view) = HostView::read(&netlink) else { return Vec::new() };
    let say = |(key, message): (&str, String)| problem(config, Severity::Warning, key, message).to_string();
    let mut list = missing_interfaces(config, &view);
    list.extend(missing_defaults(config, &view));
    list.extend(host_checks::obstacles(config, &view, &Surroundings::read(config, &netlink)));
    list.into_iter().map(say).collect()
}

/// Obstacles on the host now, without places in the file.
fn obstacle_texts(config: &Config, netlink: &linux::netlink::Netlink) -> Vec<String> {
    let Ok(view) = HostView::read(netlink) else { return Vec::new() };
    let found = host_checks::obstacles(config, &view, &Surroundings::read(config, netlink));
    found.into_iter().map(|(_, message)| message).collect()
}

pub(crate) fn problem(config: &Config, severity: Severity, key: &str, message: String) -> Problem {
    let file = config.path.display().to_string();
    Problem { file, line: 0, column: 0, severity, key: key.to_owned(), message }
}

fn missing_interfaces(config: &Config, view: &HostView) -> Vec<(&'static str, String)> {
    let wans = config.wans.iter().filter_map(|wan| match &wan.interface {
        InterfaceMatch::Name(name) => Some(("wan.interface", name)),
        InterfaceMatch::Pattern(_) => None,
    });
    let devices = config.services.interfaces.iter().map(|interface| ("interface.device", &interface.device));
    // One that waits for the next start has no device yet.
    let named = wans.chain(devices).filter(|(_, name)| *name != reload::NO_DEVICE);
    let missing = named.filter(|(_, name)| !view.links.iter().any(|link| link.name == **name));
    missing
        .map(|(key, name)| {
            (key, format!("there is no interface \"{name}\" now; it is used as soon as it comes"))
        })
        .collect()
}

/// `[[route]]` is for forwarded packets. The host's own (health checks, name service, updates) go by the kernel's routes.
fn missing_defaults(config: &Config, view: &HostView) -> Vec<(&'static str, String)> {
    let defaults = config.services.routes.iter().filter(|route| route.to.prefix_len() == 0);
    let mut list = Vec::new();
    for route in defaults.filter(|route| route.tenant.is_none()) {
        let ipv4 = route.to.addr().is_ipv4();
        let same = |net: ipnet::IpNet| net.prefix_len() == 0 && net.addr().is_ipv4() == ipv4;
        let by_kernel = view.routes.iter().any(|known| same(known.spec.dst));
        let by_tunnel = config.host_prefixes().any(|net| same(*net));
        if !by_kernel && !by_tunnel {
            let via = route.via.map_or_else(String::new, |via| format!(" via {via}"));
            let flag = if ipv4 { "" } else { "-6 " };
            list.push((
                "route.to",
                format!(
                    "{} is for forwarded packets; the host itself has no default route, so that its own checks, updates \
                     and name service reach nobody; ip {flag}route add default{via}",
                    route.to
                ),
            ));
        }
    }
    list
}

/// Part of this machine in its cluster: the interfaces that it may have, and the connection to the manager.
fn join_cluster(
    config: &Config,
    engine: &Engine,
    events: &EventSender,
    control_socket: &Path,
) -> Result<(Takeover, Option<ClusterLink>), StartError> {
    let takeover = Takeover::open(config, control_socket);
    let cluster = start_cluster(config, engine, events, &takeover)?;
    Ok((takeover, cluster))
}

/// Connects this machine to its cluster.
fn start_cluster(
    config: &Config,
    engine: &Engine,
    events: &EventSender,
    takeover: &Takeover,
) -> Result<Option<ClusterLink>, StartError> {
    let Some(settings) = &config.cluster else { return Ok(None) };
    let interfaces = (0..).map(InterfaceId).zip(&config.services.interfaces);
    let shared = interfaces.filter_map(|(id, interface)| {
        Some(SharedInterface {
            ifid: interface.shared?,
            interface: id,
            addresses: Vec::new(),
            dispatchers: interface.dispatchers.clone(),
            holding: takeover.holding(id.index()),
        })
    });
    let failed = |error: io::Error| StartError::Start(format!("cannot start the cluster's thread: {error}"));
    let events = events.try_clone().map_err(failed)?;
    let key = settings.token.as_ref().and_then(|token| UnitKey::new(&config.node.private_key, token));
    let link = ClusterLink::start((settings.clone(), key), shared.collect(), engine.cluster_handle(), events);
    link.map(Some).map_err(failed)
}

/// Reserves timestamps that the first handshakes will use, before they leave. Where they are kept, and the last that an earlier run
/// may have used.
fn reserve_timestamps(config: &Config, wall_clock_ns: u64) -> (Option<TimestampFloor>, u64) {
    let mut state = timestamp_floor(config);
    let floor = state.as_mut().map_or(0, TimestampFloor::load);
    state.iter_mut().for_each(|state| state.keep(floor.max(wall_clock_ns)));
    (state, floor)
}

/// Where handshakes' timestamps are kept. A key that was made for the run has no past.
fn timestamp_floor(config: &Config) -> Option<TimestampFloor> {
    let own = &config.node;
    (!own.key_was_made).then(|| TimestampFloor::new(&own.state_dir, &own.private_key.public()))
}

/// Gives classes of flows their cores.
fn reserve_cores(engine: &Engine, config: &Config) -> Result<(), String> {
    let result = engine.set_class_cores(&config.node.class_cores);
    result.map_err(|error| format!("node.reserved-cores: {error}"))
}

#[cfg(test)]
mod tests;
