//! A core's thread: wait, run the round of [`datapath::Worker`], publish, sleep. One pinned thread per core.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::SyncSender;
use std::time::Duration;

use datapath::{Datapath, Ports, Ready};
use linux::event::{Epoll, Interest};
use linux::tun::TunQueue;
use packet::DropCounters;
use packet::attachment::InterfaceId;
use services::pipeline::PortCounts;
use services::random::{Random, SEED_BYTES};
use tunnel::time::Time;

use crate::Shared;
use crate::copies::Copier;
use crate::cutter::Cutter;
use crate::gateway::{Command, CoreReport, Interface, InterfaceCounters, LiveByUnitBucket, lock};
use crate::handover;
use crate::output::{InterfaceOutput, InterfaceOutputs, LinuxOutput};
use crate::ports::{INTERFACE_TOKENS, InterfaceInput, LinuxPorts, SHARED_TOKENS};
use crate::rings::Rings;
use crate::scheduling::{Duties, Placement};
use crate::search::Searches;
use crate::sockets::{Sockets, WanDevices};

const TUN_TOKEN: u64 = 0;
const BELL_TOKEN: u64 = 1;
/// Sockets begin behind these.
const TAP_TOKEN: u64 = INTERFACE_TOKENS - 1;
/// A worker that looks for frames of interfaces again and again asks epoll for the rest this often.
const LOOK_NS: u64 = 20_000;
/// A worker sleeps so long at most …
const SLEEP_NS: u64 = 1_000_000_000;
/// … and so long where epoll cannot tell of an interface's frames.
const UNTOLD_NS: u64 = 1_000_000;
/// A core's load is measured over this long.
const LOAD_NS: u64 = 1_000_000_000;
/// Counters are published this often.
const PUBLISH_NS: u64 = 50_000_000;

/// A worker before and while it runs.
pub(crate) struct Worker {
    id: u8,
    shared: Arc<Shared>,
    round: datapath::Worker<LinuxPorts>,
    epoll: Arc<Epoll>,
    ready: Vec<Ready>,
    /// Version of the tunnel's configuration and of the services' snapshots that it works by.
    tunnel_version: u64,
    services_version: u64,
    /// Era of the policy that it works by.
    policy_era: u32,
    /// Number of the snapshot of the cluster that it works by.
    cluster_snapshot: u64,
    published_ns: u64,
    /// Since when the load is measured, and the busy time then.
    load_since: (u64, u64),
    placement: Placement,
    /// Where the records of its flows go at the end.
    exporter: Option<SyncSender<Vec<u8>>>,
    /// Where copies of them go.
    copier: Option<Copier>,
    /// Flows that people ask for.
    searches: Searches,
}

/// Descriptors a worker starts with.
pub(crate) struct Start {
    pub queue: TunQueue,
    /// Of the TAP device, if there is one.
    pub tap: Option<TunQueue>,
    pub rings: Rings,
    pub merge_udp: bool,
}

impl Worker {
    /// A worker for core `id`.
    ///
    /// # Errors
    /// When epoll cannot be set up.
    pub fn new(id: u8, shared: Arc<Shared>, start: Start) -> std::io::Result<Self> {
        let Start { queue, tap, rings, merge_udp } = start;
        let epoll = Arc::new(Epoll::new()?);
        epoll.add(&queue, TUN_TOKEN, Interest::Read)?;
        if let Some(tap) = &tap {
            epoll.add(tap, TAP_TOKEN, Interest::Read)?;
        }
        epoll.add(shared.doorbells[usize::from(id)].event(), BELL_TOKEN, Interest::Read)?;
        let node = Arc::clone(&shared.node);
        let (senders, receivers) = rings.split();
        let out = LinuxOutput {
            tun: Arc::new(queue),
            tap: tap.map(Arc::new),
            epoll: Arc::clone(&epoll),
            sockets: Sockets::new(shared.mark, node.cores),
            interfaces: InterfaceOutputs::default(),
            rings: senders,
            counters: Arc::clone(&shared.counters[usize::from(id)]),
            drops: DropCounters::default(),
            now_ns: 0,
        };
        let mut datapath = Datapath::new(id, node, random()?, shared.gateway.snapshots());
        datapath.set_merge_udp(merge_udp);
        if let Some(counts) = &shared.gateway.port_counts {
            datapath.services.set_port_counts(PortCounts::new(Arc::clone(counts) as _));
        }
        Ok(Self {
            id,
            round: datapath::Worker { datapath, ports: LinuxPorts::new(out, receivers) },
            epoll,
            ready: Vec::new(),
            tunnel_version: 0,
            services_version: 0,
            policy_era: 0,
            cluster_snapshot: 0,
            published_ns: 0,
            load_since: (linux::clock::monotonic_ns(), 0),
            placement: Placement::new(id),
            exporter: None,
            copier: None,
            searches: Searches::default(),
            shared,
        })
    }

    /// Runs until the engine stops.
    pub fn run(mut self) {
        let mut events = Vec::new();
        let mut wait = Duration::ZERO;
        let (mut asked_ns, mut end_ns) = (0, 0);
        loop {
            if !self.round.ports.interfaces.watched && end_ns - asked_ns < LOOK_NS {
                events.clear();
            } else {
                if let Err(error) = self.epoll.wait(&mut events, Some(wait)) {
                    tracing::error!(core = self.id, %error, "epoll");
                    return;
                }
                asked_ns = end_ns;
            }
            let woke_ns = linux::clock::monotonic_ns();
            let signalled = events.iter().any(|event| event.token == BELL_TOKEN);
            self.shared.doorbells[usize::from(self.id)].woke(signalled);
            if self.shared.stop.load(Relaxed) {
                self.stop();
                return;
            }
            let round = self.round(woke_ns, &events);
            end_ns = linux::clock::monotonic_ns();
            self.round.ports.out().counters.note_round(end_ns.saturating_sub(woke_ns));
            self.publish(end_ns);
            self.copy(end_ns);
            let interfaces = &mut self.round.ports.interfaces;
            if interfaces.is_hot(end_ns) && !self.shared.stop.load(Relaxed) {
                // Packets of an interface come one by one: being woken for each costs more than looking again, and
                // whoever else wants this CPU gets it.
                interfaces.watch(&self.epoll, false);
                std::thread::yield_now();
                wait = Duration::ZERO;
                continue;
            }
            interfaces.watch(&self.epoll, true);
            self.shared.doorbells[usize::from(self.id)].prepare_sleep();
            let idle = !round.more && self.round.ports.is_idle();
            wait = if idle {
                let most_ns = if self.round.ports.interfaces.watched { SLEEP_NS } else { UNTOLD_NS };
                Duration::from_nanos(round.next.ns().saturating_sub(end_ns).min(most_ns))
            } else {
                Duration::ZERO
            };
        }
    }

    /// One round with what epoll told.
    fn round(&mut self, now_ns: u64, events: &[linux::event::Ready]) -> datapath::Round {
        let now = Time::from_ns(now_ns);
        self.round.ports.out().now_ns = now_ns;
        self.follow();
        self.ready.clear();
        for event in events {
            match event.token {
                TUN_TOKEN => self.ready.push(Ready::Host),
                TAP_TOKEN => self.ready.push(Ready::Tap),
                BELL_TOKEN => self.answer_bell(now),
                token if token >= SHARED_TOKENS => {
                    self.ready.push(Ready::Shared(InterfaceId((token - SHARED_TOKENS) as u16)));
                }
                token => match token.checked_sub(INTERFACE_TOKENS) {
                    Some(id) => {
                        let id = InterfaceId(id as u16);
                        if event.failed {
                            self.round.ports.interfaces.take_error(id);
                        }
                        self.ready.push(Ready::Interface(id));
                    }
                    None => self.ready.push(Ready::Socket(token)),
                },
            }
        }
        let mut round = self.round.round(now, &self.ready);
        round.more |= self.searches.step(self.id, &self.round.datapath.services);
        if let Some(rounds) = self.shared.gateway.rounds.get(usize::from(self.id)) {
            rounds.fetch_add(1, Relaxed);
        }
        let out = self.round.ports.out();
        for (bond, id, bytes) in out.sockets.take_too_big() {
            let bonds = self.shared.node.bonds.load();
            // An MTU probe that is too big says only what it was sent to find out.
            if let Some(bond) = bonds.get(bond)
                && bond.path(id).is_some_and(|path| bytes <= path.datagram_bytes())
            {
                self.shared.node.black_hole(now, bond, id);
            }
        }
        round
    }

    /// Takes over what control has published.
    fn follow(&mut self) {
        if self.shared.gateway.version.changed(&mut self.services_version) {
            let snapshots = self.shared.gateway.snapshots();
            let (began_ns, cpu_ns) = (linux::clock::monotonic_ns(), linux::clock::thread_cpu_ns());
            self.round.datapath.follow(&snapshots);
            let number = snapshots.cluster.as_ref().map_or(0, |cluster| cluster.number);
            self.cluster_snapshot = number;
            if let Some(taken) = self.shared.gateway.cluster.taken.get(usize::from(self.id)) {
                taken.store(number, Relaxed);
            }
            if self.policy_era != snapshots.policy.era {
                self.policy_era = snapshots.policy.era;
                let took_ns = linux::clock::monotonic_ns().saturating_sub(began_ns);
                let cpu_ns = linux::clock::thread_cpu_ns().saturating_sub(cpu_ns);
                self.round.ports.out().counters.note_reload(took_ns, cpu_ns);
            }
        }
        let config = self.shared.config.load();
        if config.version == self.tunnel_version {
            return;
        }
        self.tunnel_version = config.version;
        let own = config
            .listeners
            .iter()
            .map(|group| (group.wan, Arc::clone(&group.sockets[usize::from(self.id)])))
            .collect();
        let sockets = &mut self.round.ports.out().sockets;
        let devices = WanDevices(config.devices.clone());
        if let Err(error) = sockets.configure(&self.epoll, own, devices, config.per_path.clone()) {
            tracing::error!(core = self.id, %error, "listening socket");
        }
        let bonds = self.shared.node.bonds.load();
        sockets.retain_paths(&self.epoll, |bond, path| {
            bonds.get(bond).is_some_and(|bond| bond.path(path).is_some())
        });
    }

    /// Somebody rang: commands and actions for this core. Rings are looked into in every round.
    fn answer_bell(&mut self, now: Time) {
        for command in self.shared.gateway.take_commands(usize::from(self.id)) {
            match command {
                Command::Open(interface) => {
                    // What has come by the sockets that it had.
                    self.round.round(now, &[Ready::Interface(interface.id)]);
                    self.open(*interface);
                }
                Command::Close(id) => self.close(id),
                Command::Flows(query) => self.searches.add(query),
                Command::ForgetFlows => self.round.datapath.services.forget_flows(now.ns()),
                Command::Trace(key, interface, id) => {
                    let datapath::Worker { datapath, ports } = &mut self.round;
                    datapath.ask_way(now, (&key, id), interface, ports.out());
                }
                Command::Import(batch) => {
                    // The policy that it is for may be younger than this round.
                    self.follow();
                    batch.import(&mut self.round.datapath.services, now.ns());
                }
                Command::Copy(to) => {
                    self.copier = Some(Copier::new(&mut self.round.datapath.services, to));
                }
                // Not before the last packet.
                Command::Export(chunks) => self.exporter = Some(chunks),
            }
        }
        // Whoever comes first sends what a new configuration asks for, so that no core that hangs holds it up.
        let actions = self.shared.take_actions();
        if !actions.is_empty() {
            self.round.datapath.run(now, actions, self.round.ports.out());
        }
    }

    fn open(&mut self, interface: Interface) {
        let Interface { id, ring, sender, raw, back, shared, tap } = interface;
        // New sockets for an interface that stays count on from the old ones.
        let inputs = &mut self.round.ports.interfaces;
        let before = inputs.list.iter_mut().find(|input| input.id == id);
        let counted = before.map(|input| (input.packets, input.bytes, input.lost()));
        let (packets, bytes, lost_before) = counted.unwrap_or_default();
        self.stop_reading(id);
        self.round.ports.out().interfaces.open(id, InterfaceOutput::new(sender, raw, back, tap));
        if let Some(source) = shared {
            match self.epoll.add(&source, SHARED_TOKENS + u64::from(id.0), Interest::Read) {
                Ok(()) => self.round.ports.shared.push((id, Arc::new(source))),
                Err(error) => tracing::error!(interface = id.0, %error, "cannot wait for a shared interface"),
            }
        }
        let Some(ring) = ring else { return };
        let inputs = &mut self.round.ports.interfaces;
        let cutter = Cutter::default();
        inputs.list.push(InterfaceInput { id, ring, packets, bytes, lost_before, cutter });
        inputs.watched = false;
        inputs.watch(&self.epoll, true);
        if !inputs.watched {
            tracing::error!(
                core = self.id,
                interface = id.0,
                "cannot wait for an interface; it is looked into"
            );
        }
        self.place();
    }

    fn close(&mut self, id: InterfaceId) {
        self.stop_reading(id);
        self.round.ports.out().interfaces.close(id);
        self.place();
    }

    fn stop_reading(&mut self, id: InterfaceId) {
        self.round.ports.shared.retain(|(shared, source)| {
            if *shared == id {
                let _ = self.epoll.remove(source);
            }
            *shared != id
        });
        let inputs = &mut self.round.ports.interfaces;
        inputs.watch(&self.epoll, true);
        inputs.list.retain(|input| {
            if input.id == id {
                let _ = self.epoll.remove(&input.ring);
            }
            input.id != id
        });
    }

    /// Chooses the CPU and how it is shared, by what the node has.
    fn place(&mut self) {
        let gateway = &self.shared.gateway;
        let duties = Duties {
            interfaces: !self.round.ports.interfaces.list.is_empty(),
            peers: self.shared.node.bonds.load().iter().next().is_some(),
            reserves_cores: !gateway.ownership.load().classes.all_reserved().is_empty(),
        };
        self.placement.choose(&gateway.cpus, duties);
    }

    /// Writes copies of flows, if somebody wants them.
    #[inline]
    fn copy(&mut self, now_ns: u64) {
        let Some(copier) = &mut self.copier else { return };
        if !copier.step(self.id, &mut self.round.datapath.services, now_ns) {
            self.copier = None;
        }
    }

    fn publish(&mut self, now_ns: u64) {
        if now_ns.saturating_sub(self.published_ns) < PUBLISH_NS {
            return;
        }
        self.published_ns = now_ns;
        if self.round.ports.out().sockets.take_unwatched() {
            // Once more, from the beginning.
            self.tunnel_version = 0;
        }
        self.place();
        let counters = Arc::clone(&self.round.ports.out().counters);
        let elapsed_ns = now_ns.saturating_sub(self.load_since.0);
        if elapsed_ns >= LOAD_NS {
            let busy_ns = counters.busy_ns.get();
            let share = (busy_ns - self.load_since.1).saturating_mul(255) / elapsed_ns;
            let share = u8::try_from(share).unwrap_or(u8::MAX);
            self.shared.node.set_load(self.id, share);
            self.round.datapath.services.set_load_percent((u16::from(share) * 100 / 255) as u8);
            self.load_since = (now_ns, busy_ns);
        }
        let mut drops = self.round.datapath.tunnel_drops();
        drops.merge(&self.round.ports.out().drops);
        counters.set_drops(&drops);
        self.shared.gateway.cluster.keep_traced(self.round.datapath.take_traced());
        self.report();
    }

    fn report(&mut self) {
        let gateway = &self.shared.gateway;
        let services = &mut self.round.datapath.services;
        services.set_nat_events_wanted(gateway.events_wanted());
        gateway.keep_events(|| services.nat_events());
        let interfaces = self.interface_counters();
        let mut drops = self.round.datapath.service_drops();
        drops.merge(&self.round.ports.out().interfaces.drops);
        let services = &self.round.datapath.services;
        let report = CoreReport {
            counters: services.counters,
            drops,
            live_flows: services.flows().len() as u64,
            embryonic_flows: u64::from(services.embryonic()),
            flow_memory_bytes: services.flows().memory_bytes() as u64,
            rule_hits: services.rule_counters.hits.clone(),
            nat_flows: services.rule_counters.nat_flows.clone(),
            nat_refusals: services.rule_counters.nat_refusals.clone(),
            forward_flows: services.rule_counters.forward_flows.clone(),
            live_by_bucket: services.live(),
            table_era: services.table_era(),
            ports_held: services.ports_held(),
            lost_nat_events: services.nat().events_lost(),
            live_by_unit_bucket: LiveByUnitBucket {
                snapshot: self.cluster_snapshot,
                live: services.live_by_unit_bucket().to_vec(),
                inherited: services.inherited(),
            },
            interfaces,
        };
        self.shared.gateway.lan.put(self.id, self.round.datapath.lan_report(linux::clock::monotonic_ns()));
        if let Some(shared) = self.shared.gateway.reports.get(usize::from(self.id)) {
            *lock(shared) = report;
        }
    }

    fn interface_counters(&mut self) -> Vec<InterfaceCounters> {
        let ports = &mut self.round.ports;
        let outputs = ports.out().interfaces.list.iter();
        let mut all: Vec<InterfaceCounters> =
            outputs.map(|output| output.as_ref().map(|output| output.counters).unwrap_or_default()).collect();
        for input in &mut ports.interfaces.list {
            let lost = input.lost();
            if let Some(counters) = all.get_mut(input.id.index()) {
                counters.rx_packets = input.packets;
                counters.rx_bytes = input.bytes;
                counters.lost_packets = lost;
                counters.reads = true;
            }
        }
        all
    }

    fn stop(&mut self) {
        let now = Time::from_ns(linux::clock::monotonic_ns());
        if self.id == 0 {
            self.round.datapath.close(now, self.round.ports.out());
        }
        for command in self.shared.gateway.take_commands(usize::from(self.id)) {
            if let Command::Export(chunks) = command {
                self.exporter = Some(chunks);
            }
        }
        if let Some(chunks) = self.exporter.take() {
            handover::export(&mut self.round.datapath.services, now.ns(), &chunks);
        }
        self.published_ns = 0;
        self.publish(now.ns());
    }
}

/// A generator of random numbers that is seeded by the system.
pub(crate) fn random() -> std::io::Result<Random> {
    let mut seed = [0; SEED_BYTES];
    getrandom::fill(&mut seed).map_err(std::io::Error::other)?;
    Ok(Random::new(seed))
}
