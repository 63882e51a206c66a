//! The world: sites, cables between their WANs, applications on their hosts, and one queue of events.
//!
//! An event is a datagram that reaches a node of a link, a core or an application that wants to be woken, or something
//! the test scheduled. Events of one moment run in the order in which they were made; then every core that
//! got something runs one round, in order of site and core. Nothing depends on anything but the seed.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use packet::attachment::BondId;
use packet::flow::FlowKey;
use tunnel::config::{Peer, Wan};
use tunnel::time::Time;

use crate::inner::packet::Parsed;
use crate::inner::request::{RequestFlow, RequestSpec, RequestStats};
use crate::inner::tcp::{TcpFlow, TcpSpec};
use crate::inner::udp::{UdpFlow, UdpSpec, UdpStats};
use crate::inner::{App, Emit, Ends, FIRST_PORT};
use crate::link::{Datagram, Link};
use crate::nat::Nat;
use crate::random::Random;
use crate::site::{Collected, Item, Site};

/// Lines of the log kept for a failure.
const TRAIL: usize = 64;

/// A cable: two ends, a link each way, perhaps a NAT at the first end.
pub struct Cable {
    /// (site, WAN) at both ends.
    pub ends: [(usize, u16); 2],
    /// From the first end to the second, and back.
    pub links: [Link; 2],
    /// In front of the first end.
    pub nat: Option<Nat>,
}

impl Cable {
    /// Cuts or heals both directions.
    pub fn cut(&mut self, on: bool) {
        for link in &mut self.links {
            link.cut(on);
        }
    }
}

enum Event {
    /// A datagram reaches a node of a link: cable, direction, node.
    Hop(usize, usize, usize, Datagram),
    Wake(usize, u8),
    App(usize),
}

struct Scheduled {
    at: Time,
    order: u64,
    event: Event,
}

impl PartialEq for Scheduled {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}
impl Eq for Scheduled {}
impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Scheduled {
    fn cmp(&self, other: &Self) -> Ordering {
        // The heap gives the largest first: turn it round.
        (other.at, other.order).cmp(&(self.at, self.order))
    }
}

/// Counters over all sites.
#[derive(Clone, Debug, Default)]
pub struct Totals {
    /// Inner packets that came out damaged or belong to no application.
    pub damaged: u64,
    /// Inner packets that came out at a site or from a bond they were not meant for.
    pub misdelivered: u64,
    /// Flows of which different cores of one site decrypted packets.
    pub flows_split: u64,
    /// Datagrams under no address any more.
    pub unroutable: u64,
    /// Events run.
    pub events: u64,
}

/// Sites and what is between them.
pub struct World {
    /// Seed of everything.
    pub seed: u64,
    /// Time now.
    pub now: Time,
    /// Sites.
    pub sites: Vec<Site>,
    /// Cables.
    pub cables: Vec<Cable>,
    /// Counters.
    pub totals: Totals,
    apps: Vec<App>,
    app_wake: Vec<Time>,
    app_ends: Vec<Ends>,
    queue: BinaryHeap<Scheduled>,
    order: u64,
    random: Random,
    log_hash: u64,
    trail: VecDeque<(Time, &'static str, [u64; 4])>,
    /// By site, application and ports: the core that delivered last, and how often it was another than before.
    flow_cores: BTreeMap<(usize, usize, u16, u16), (u8, u32)>,
    /// By site and application: the core that its packets entered the tunnel on last.
    sending_cores: BTreeMap<(usize, usize), u8>,
    keep: bool,
    /// Copies of datagrams that arrived, for tests that replay them.
    pub captured: Vec<(usize, Datagram)>,
    out: Vec<(Time, Datagram)>,
}

impl World {
    /// An empty world.
    pub fn new(seed: u64) -> Self {
        Self {
            seed,
            now: Time::from_ms(1),
            sites: Vec::new(),
            cables: Vec::new(),
            totals: Totals::default(),
            apps: Vec::new(),
            app_wake: Vec::new(),
            app_ends: Vec::new(),
            queue: BinaryHeap::new(),
            order: 0,
            random: Random::new(seed),
            log_hash: 0xcbf2_9ce4_8422_2325,
            trail: VecDeque::new(),
            flow_cores: BTreeMap::new(),
            sending_cores: BTreeMap::new(),
            keep: false,
            captured: Vec::new(),
            out: Vec::new(),
        }
    }

    /// Adds a site with so many cores; its wall clock starts at `wall_clock_ns` (0: unknown). Returns its number.
    pub fn site(&mut self, cores: u8, wall_clock_ns: u64) -> usize {
        let site = Site::new(&mut self.random, cores, wall_clock_ns);
        self.sites.push(site);
        self.sites.len() - 1
    }

    /// Adds a WAN with one IPv4 address to a site; returns its id.
    pub fn wan(&mut self, site: usize, mtu: u16) -> u16 {
        let id = self.sites[site].snapshot.wans.len() as u16;
        self.sites[site].snapshot.wans.push(Wan {
            id,
            interface: format!("wan{id}"),
            up: true,
            addresses: vec![wan_address(site, id, 1)],
            mtu,
            rate_max_bps: None,
            tier: 0,
        });
        id
    }

    /// Joins two WANs by a cable; returns its number.
    pub fn cable(&mut self, from: (usize, u16), to: (usize, u16), there: Link, back: Link) -> usize {
        self.cables.push(Cable { ends: [from, to], links: [there, back], nat: None });
        self.cables.len() - 1
    }

    /// Puts a NAT in front of a cable's first end.
    pub fn nat(&mut self, cable: usize) {
        let public = IpAddr::from([203, 0, (cable >> 8) as u8, cable as u8]);
        self.cables[cable].nat = Some(Nat::new(public));
    }

    /// Makes two sites peers: `dialer` dials every WAN of `listener` that a cable reaches.
    pub fn peer(&mut self, dialer: usize, listener: usize) {
        let endpoints = self.endpoints(dialer, listener);
        for (own, other, endpoints) in [(dialer, listener, endpoints), (listener, dialer, Vec::new())] {
            let peer = Peer {
                id: BondId(other as u16),
                tenant: 0,
                name: format!("site{other}"),
                public_key: self.sites[other].public_key(),
                preshared_key: None,
                endpoints,
                allowed_ips: vec![site_prefix(other)],
                wans: None,
                paths_per_pair: 1,
                sockets_per_path: 4,
                encryption: tunnel::Encryption::On,
                policy: steering::policy::Policy::Hash,
                flow: tunnel::FlowDefinition::FiveTuple,
            };
            self.sites[own].snapshot.peers.push(peer);
        }
    }

    /// Addresses of `listener` that cables from `dialer` lead to.
    pub fn endpoints(&self, dialer: usize, listener: usize) -> Vec<SocketAddr> {
        let mut wans: Vec<u16> = self
            .cables
            .iter()
            .filter(|cable| cable.ends[0].0 == dialer && cable.ends[1].0 == listener)
            .map(|cable| cable.ends[1].1)
            .collect();
        wans.sort_unstable();
        wans.dedup();
        let site = &self.sites[listener];
        wans.iter()
            .filter_map(|id| site.wan(*id)?.addresses.first())
            .map(|address| SocketAddr::new(*address, crate::site::LISTEN_PORT))
            .collect()
    }

    /// Applies a site's configuration as it is in [`Site::snapshot`].
    pub fn reload(&mut self, site: usize) {
        let at = &mut self.sites[site];
        let mut actions = Vec::new();
        let now = at.time(self.now);
        at.node.apply(now, &at.snapshot, &mut actions);
        if let Some(first) = at.workers.first_mut() {
            first.inbox.push(Item::Run(actions));
        }
        for worker in &mut at.workers {
            worker.dirty = true;
        }
        self.log("reload", [site as u64, 0, 0, 0]);
        self.settle();
    }

    /// Applies every site's configuration; who dials comes last, so that somebody listens.
    pub fn start(&mut self) {
        let dials = |site: &Site| site.snapshot.peers.iter().any(|peer| !peer.endpoints.is_empty());
        let mut order: Vec<usize> = (0..self.sites.len()).collect();
        order.sort_by_key(|site| dials(&self.sites[*site]));
        for site in order {
            self.reload(site);
        }
    }

    /// Restarts a site's process, without a word to the others. `keep_floor`: it kept its handshake timestamp.
    pub fn restart(&mut self, site: usize, keep_floor: bool) {
        self.sites[site].restart(&mut self.random, keep_floor, self.now);
        self.flow_cores.retain(|key, _| key.0 != site);
        self.log("restart", [site as u64, 0, 0, 0]);
        self.reload(site);
    }

    /// Stops a site: it says good-bye, then neither sends nor receives.
    pub fn stop(&mut self, site: usize) {
        let mut out = Collected::default();
        let now = self.sites[site].time(self.now);
        if let Some(worker) = self.sites[site].workers.first_mut() {
            worker.core.begin(now);
            worker.core.close(now, &mut out);
        }
        self.collect(site, 0, out);
        self.sites[site].running = false;
    }

    /// Keeps copies of what arrives in [`World::captured`].
    pub fn capture(&mut self, on: bool) {
        self.keep = on;
    }

    fn ends(&mut self, client: usize, server: usize) -> Ends {
        let id = self.apps.len();
        let host = (1 + id % 250) as u8;
        let client_port = 30_000 + self.random.below(20_000) as u16;
        Ends {
            id,
            client: (client, host_address(client, host), client_port),
            server: (server, host_address(server, host), FIRST_PORT + id as u16),
        }
    }

    fn add(&mut self, ends: Ends, app: App) -> usize {
        self.apps.push(app);
        self.app_ends.push(ends);
        self.app_wake.push(Time::MAX);
        self.wake_app(ends.id, self.now);
        ends.id
    }

    /// Starts a paced flow of datagrams from one site to another; returns its number.
    pub fn udp(&mut self, from: usize, to: usize, spec: UdpSpec) -> usize {
        let ends = self.ends(from, to);
        self.add(ends, App::Udp(UdpFlow::new(ends, spec)))
    }

    /// Starts a TCP flow from one site to another.
    pub fn tcp(&mut self, from: usize, to: usize, spec: TcpSpec) -> usize {
        let ends = self.ends(from, to);
        self.add(ends, App::Tcp(Box::new(TcpFlow::new(ends, spec))))
    }

    /// Starts requests from one site to another.
    pub fn request(&mut self, from: usize, to: usize, spec: RequestSpec) -> usize {
        let ends = self.ends(from, to);
        self.add(ends, App::Request(RequestFlow::new(ends, spec)))
    }

    /// Statistics of a UDP sink.
    pub fn udp_stats(&self, app: usize) -> UdpStats {
        match &self.apps[app] {
            App::Udp(flow) => flow.stats().clone(),
            App::Tcp(_) | App::Request(_) => UdpStats::default(),
        }
    }

    /// Numbers a UDP sink misses.
    pub fn udp_missing(&self, app: usize) -> Vec<u64> {
        match &self.apps[app] {
            App::Udp(flow) => flow.missing(),
            App::Tcp(_) | App::Request(_) => Vec::new(),
        }
    }

    /// The core of `site` on which an application's packets entered the tunnel last.
    pub fn sending_core(&self, site: usize, app: usize) -> Option<u8> {
        self.sending_cores.get(&(site, app)).copied()
    }

    /// The core of `site` that delivered an application's packets last, and how often that was another than before.
    pub fn delivering_core(&self, site: usize, app: usize) -> Option<(u8, u32)> {
        self.flow_cores.iter().find(|(key, _)| (key.0, key.1) == (site, app)).map(|(_, delivered)| *delivered)
    }

    /// Measures a UDP flow's gaps and delays from now on.
    pub fn reset_gap(&mut self, app: usize) {
        let now = self.now;
        if let App::Udp(flow) = &mut self.apps[app] {
            flow.reset_gap(now);
        }
    }

    /// A TCP flow, if `app` is one.
    pub fn tcp_flow(&self, app: usize) -> Option<&TcpFlow> {
        match &self.apps[app] {
            App::Tcp(flow) => Some(flow),
            App::Udp(_) | App::Request(_) => None,
        }
    }

    /// Statistics of a request client.
    pub fn request_stats(&self, app: usize) -> RequestStats {
        match &self.apps[app] {
            App::Request(flow) => flow.stats().clone(),
            App::Udp(_) | App::Tcp(_) => RequestStats::default(),
        }
    }

    /// Number that changes with every event: equal for equal runs.
    pub fn log_hash(&self) -> u64 {
        self.log_hash
    }

    fn log(&mut self, what: &'static str, numbers: [u64; 4]) {
        let first = u64::from(what.as_bytes().first().copied().unwrap_or(0));
        for number in [self.now.ns(), first].into_iter().chain(numbers) {
            let mut state = self.log_hash ^ number;
            self.log_hash = crate::random::split_mix(&mut state);
        }
        if self.trail.len() == TRAIL {
            self.trail.pop_front();
        }
        self.trail.push_back((self.now, what, numbers));
    }

    fn schedule(&mut self, at: Time, event: Event) {
        self.order += 1;
        self.queue.push(Scheduled { at: at.max(self.now), order: self.order, event });
    }

    fn wake_app(&mut self, app: usize, at: Time) {
        if at < self.app_wake[app] {
            self.app_wake[app] = at;
            self.schedule(at, Event::App(app));
        }
    }

    /// Runs for so many milliseconds.
    pub fn run_ms(&mut self, ms: u64) {
        self.run_until(self.now.plus_ms(ms));
    }

    /// Runs until `end`.
    pub fn run_until(&mut self, end: Time) {
        self.settle();
        while let Some(next) = self.queue.peek()
            && next.at <= end
        {
            let Some(Scheduled { at, event, .. }) = self.queue.pop() else { break };
            self.now = at;
            self.run_event(event);
            if self.queue.peek().is_none_or(|next| next.at > at) {
                self.settle();
            }
        }
        self.now = end;
    }

    /// Runs until `done` holds, looking every millisecond; false when `limit_ms` passed before.
    pub fn run_until_true(&mut self, limit_ms: u64, mut done: impl FnMut(&Self) -> bool) -> bool {
        for _ in 0..limit_ms {
            if done(self) {
                return true;
            }
            self.run_ms(1);
        }
        done(self)
    }

    fn run_event(&mut self, event: Event) {
        self.totals.events += 1;
        match event {
            Event::Hop(cable, direction, stage, datagram) => self.hop(cable, direction, stage, datagram),
            Event::Wake(site, core) => {
                if let Some(worker) = self.sites[site].workers.get_mut(usize::from(core))
                    && worker.wake <= self.now
                {
                    worker.wake = Time::MAX;
                    worker.dirty = true;
                }
            }
            Event::App(app) => {
                if self.app_wake[app] <= self.now {
                    self.app_wake[app] = Time::MAX;
                    self.poll_app(app);
                }
            }
        }
    }

    fn poll_app(&mut self, app: usize) {
        let mut emitted = Vec::new();
        let next = self.apps[app].poll(self.now, &mut emitted);
        if next < Time::MAX {
            self.wake_app(app, next.max(self.now.plus_ns(1)));
        }
        for emit in emitted {
            self.enter(emit);
        }
    }

    /// A packet comes out of a site's TUN device: on the core that owns its flow, by the steering program.
    fn enter(&mut self, emit: Emit) {
        self.log("tun", [emit.site as u64, emit.bytes.len() as u64, 0, 0]);
        let site = &mut self.sites[emit.site];
        if !site.running {
            return;
        }
        let owner = site.workers.first().and_then(|worker| worker.core.classify(&emit.bytes, None).ok());
        let owner = owner.map_or(0, |classified| usize::from(classified.owner));
        if let Ok(flow) = FlowKey::of(&emit.bytes) {
            let port = flow.src_port.min(flow.dst_port).max(FIRST_PORT);
            self.sending_cores.insert((emit.site, usize::from(port - FIRST_PORT)), owner as u8);
        }
        if let Some(worker) = site.workers.get_mut(owner) {
            worker.inbox.push(Item::Packet(emit.offload, emit.bytes));
            worker.dirty = true;
        }
    }

    /// Runs every core that has something to do, until none has.
    fn settle(&mut self) {
        let mut busy = true;
        while busy {
            busy = false;
            for site in 0..self.sites.len() {
                for core in 0..self.sites[site].workers.len() {
                    let worker = &self.sites[site].workers[core];
                    if self.sites[site].running && worker.dirty && !worker.hung {
                        busy = true;
                        self.round(site, core);
                    }
                }
            }
        }
    }

    fn round(&mut self, site: usize, core: usize) {
        let mut out = Collected::default();
        let at = &mut self.sites[site];
        let now = at.time(self.now);
        let offset_ns = at.clock_offset_ns;
        let worker = &mut at.workers[core];
        worker.dirty = false;
        worker.core.begin(now);
        for item in std::mem::take(&mut worker.inbox) {
            match item {
                Item::Packet(offload, mut bytes) => {
                    if let Ok(classified) = worker.core.classify(&bytes, None) {
                        worker.core.packet(now, &offload, &mut bytes, &classified, &mut out);
                    }
                }
                Item::Datagram(source, mut bytes) => {
                    let stride = bytes.len();
                    worker.core.datagrams(now, &source, &mut bytes, stride, &mut out);
                }
                Item::Run(actions) => worker.core.run(now, actions, &mut out),
            }
        }
        let next = worker.core.finish(now, &mut out);
        let wake = Time::from_ns(next.ns().saturating_sub(offset_ns)).max(self.now.plus_ns(1));
        let sooner = wake < worker.wake;
        if sooner {
            worker.wake = wake;
            self.schedule(wake, Event::Wake(site, core as u8));
        }
        self.collect(site, core as u8, out);
    }

    fn collect(&mut self, site: usize, core: u8, out: Collected) {
        for (target, segment, bytes) in out.sent {
            self.log("tx", [site as u64, u64::from(core), u64::from(target.path), bytes.len() as u64]);
            for datagram in bytes.chunks(segment.max(1)) {
                let Some(from) = self.sites[site].source_of(core, &target, datagram.len()) else {
                    self.sites[site].counters.send_errors += 1;
                    continue;
                };
                let datagram = Datagram { from, to: target.route.remote, bytes: datagram.to_vec() };
                self.send(site, target.route.wan, datagram);
            }
        }
        for (bond, packet, partial) in out.delivered {
            self.leave(site, core, bond, packet, partial);
        }
    }

    /// Puts a datagram on the cable that leads to its address.
    pub fn send(&mut self, site: usize, wan: u16, mut datagram: Datagram) {
        let to = datagram.to.ip();
        let found = self.cables.iter().enumerate().find_map(|(number, cable)| {
            let direction = cable.ends.iter().position(|end| *end == (site, wan))?;
            let far = cable.ends[1 - direction];
            let reaches = match &cable.nat {
                Some(nat) if direction == 1 => nat.public() == to,
                _ => self.sites[far.0].owns(far.1, to),
            };
            reaches.then_some((number, direction))
        });
        let Some((number, direction)) = found else {
            self.totals.unroutable += 1;
            return;
        };
        if let Some(nat) = self.cables[number].nat.as_mut().filter(|_| direction == 0) {
            datagram.from = nat.outward(self.now, datagram.from, datagram.to);
        }
        self.cables[number].links[direction].entered += 1;
        self.hop(number, direction, 0, datagram);
    }

    fn hop(&mut self, cable: usize, direction: usize, mut stage: usize, mut datagram: Datagram) {
        loop {
            let link = &mut self.cables[cable].links[direction];
            let Some(node) = link.stages.get_mut(stage) else {
                link.left += 1;
                link.left_bytes += datagram.bytes.len() as u64;
                self.arrive(cable, direction, datagram);
                return;
            };
            let mut out = std::mem::take(&mut self.out);
            node.pass(self.now, &mut self.random, datagram, &mut out);
            stage += 1;
            let last = out.pop();
            for (at, copy) in out.drain(..) {
                self.schedule(at, Event::Hop(cable, direction, stage, copy));
            }
            self.out = out;
            match last {
                Some((at, next)) if at <= self.now => datagram = next,
                Some((at, next)) => {
                    self.schedule(at, Event::Hop(cable, direction, stage, next));
                    return;
                }
                None => return,
            }
        }
    }

    fn arrive(&mut self, cable: usize, direction: usize, mut datagram: Datagram) {
        let (site, wan) = self.cables[cable].ends[1 - direction];
        if let Some(nat) = self.cables[cable].nat.as_ref().filter(|_| direction == 1) {
            match nat.inward(self.now, datagram.from, datagram.to) {
                Some(inside) => datagram.to = inside,
                None => {
                    self.totals.unroutable += 1;
                    return;
                }
            }
        }
        self.receive(site, wan, datagram);
    }

    /// A datagram reaches a site's interface.
    pub fn receive(&mut self, site: usize, wan: u16, datagram: Datagram) {
        self.log(
            "rx",
            [site as u64, u64::from(wan), datagram.bytes.len() as u64, u64::from(datagram.from.port())],
        );
        if !self.sites[site].running || !self.sites[site].owns(wan, datagram.to.ip()) {
            self.totals.unroutable += 1;
            return;
        }
        if self.keep {
            self.captured.push((site, datagram.clone()));
        }
        let at = &mut self.sites[site];
        let Some((reader, source)) = at.reader(wan, datagram.from, datagram.to, &datagram.bytes) else {
            at.counters.no_socket += 1;
            return;
        };
        at.counters.received += 1;
        let owner = at.owner(reader, &datagram.bytes);
        at.counters.crossed += u64::from(owner != reader);
        if let Some(worker) = at.workers.get_mut(usize::from(owner)) {
            worker.inbox.push(Item::Datagram(source, datagram.bytes));
            worker.dirty = true;
        }
    }

    /// An inner packet came out of the tunnel.
    fn leave(&mut self, site: usize, core: u8, bond: usize, mut packet: Vec<u8>, partial: bool) {
        self.log("out", [site as u64, u64::from(core), bond as u64, packet.len() as u64]);
        let flow = FlowKey::of(&packet);
        let Some(parsed) = Parsed::of(&mut packet, partial) else {
            self.totals.damaged += 1;
            return;
        };
        let port = parsed.from.1.min(parsed.to.1).max(FIRST_PORT);
        let app = usize::from(port - FIRST_PORT);
        let Some(ends) = self.app_ends.get(app).copied() else {
            self.totals.damaged += 1;
            return;
        };
        let (here, there) = if parsed.to.1 == ends.server.2 {
            (ends.server, ends.client)
        } else {
            (ends.client, ends.server)
        };
        let peer = self.sites[site].bond(bond).map(|bond| bond.peer.load().public_key);
        let right_bond = peer == Some(self.sites[there.0].public_key());
        if here.0 != site || (here.1, here.2) != parsed.to || (there.1, there.2) != parsed.from || !right_bond
        {
            self.totals.misdelivered += 1;
            return;
        }
        // Rows T3 and T4: what we told the peer decides the core, for every packet of the flow.
        let key = (site, app, parsed.from.1, parsed.to.1);
        let (last, changes) = self.flow_cores.entry(key).or_insert((core, 0));
        if *last != core {
            self.totals.flows_split += 1;
            (*last, *changes) = (core, *changes + 1);
        }
        if let Ok(flow) = flow {
            let ownership = self.sites[site].node.ownership.load();
            let owner = ownership.owner_of_hash(ownership.hash(&flow, 0));
            self.sites[site].counters.foreign += u64::from(owner != core);
        }
        let mut emitted = Vec::new();
        self.apps[app].packet(self.now, site, &parsed, &mut emitted);
        for emit in emitted {
            self.enter(emit);
        }
        self.poll_app(app);
    }

    /// Checks what must hold in every run at any time.
    ///
    /// # Errors
    /// The condition that does not hold.
    pub fn check(&self) -> Result<(), String> {
        let totals = &self.totals;
        if totals.damaged + totals.misdelivered > 0 {
            return Err(format!("damaged or misdelivered packets: {totals:?}"));
        }
        for app in &self.apps {
            let bad = match app {
                App::Udp(flow) => flow.stats().corrupt,
                App::Tcp(flow) => flow.received().corrupt,
                App::Request(flow) => flow.stats().corrupt,
            };
            if bad > 0 {
                return Err(format!("{bad} packets with wrong content"));
            }
            if let App::Udp(flow) = app
                && flow.stats().repeated > 0
            {
                return Err(format!("{} packets came twice", flow.stats().repeated));
            }
        }
        Ok(())
    }

    /// Everything a person needs to understand a failure.
    pub fn describe(&self) -> String {
        use std::fmt::Write as _;
        let mut text = format!("SIM_SEED={} at {} µs, {:?}\n", self.seed, self.now.us(), self.totals);
        for (number, site) in self.sites.iter().enumerate() {
            let _ = write!(text, "site {number}\n{}", site.describe());
        }
        for (number, cable) in self.cables.iter().enumerate() {
            let link = |at: usize| (cable.links[at].entered, cable.links[at].left);
            let _ = writeln!(text, "cable {number} {:?}: {:?} {:?}", cable.ends, link(0), link(1));
        }
        text
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.describe());
            for (at, what, numbers) in &self.trail {
                eprintln!("  {:>10} µs {what} {numbers:?}", at.us());
            }
        }
    }
}

/// Address number `host` of a WAN: every WAN has a network of its own.
pub fn wan_address(site: usize, wan: u16, host: u8) -> IpAddr {
    IpAddr::from([100, 64 + site as u8, wan as u8, host])
}

/// Inner prefix of a site.
pub fn site_prefix(site: usize) -> ipnet::IpNet {
    ipnet::IpNet::from(ipnet::Ipv4Net::new_assert(Ipv4Addr::new(10, site as u8, 0, 0), 16))
}

/// Inner address of a host.
pub fn host_address(site: usize, host: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, site as u8, 0, host)
}
