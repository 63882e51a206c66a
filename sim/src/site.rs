//! A site: one node with its cores, sockets, WANs and interfaces, as the engine would run it on a machine.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use arc_swap::ArcSwap;
use datapath::Datapath;
use datapath::memory::MemoryPorts;
use packet::attachment::{Egress, InterfaceId};
use packet::drop_reason::{DropCounters, DropReason};
use services::pipeline::Counters;
use services::spec::{InterfaceSpec, LinkSpec, RouteSpec};
use steering::ownership::Ownership;
use steering::table::BucketTable;
use tunnel::PrivateKey;
use tunnel::bond::Bond;
use tunnel::config::{NodeConfig, Peer, Snapshot, Wan};
use tunnel::forwarder::Target;
use tunnel::lifecycle::Action;
use tunnel::node::{Node, Source};
use tunnel::path::PathState;
use tunnel::time::Time;

use crate::control::{Control, REPORT_NS, Report};
use fastrand::Rng;

/// Where every site listens.
pub const LISTEN_PORT: u16 = 51_820;

/// One worker core: the product's round over ports in memory.
pub(crate) struct Worker {
    pub round: datapath::Worker<MemoryPorts>,
    /// Actions that a new configuration of the tunnel asks for.
    pub actions: Vec<Action>,
    pub wake: Time,
    pub dirty: bool,
    /// It does nothing at all: what it is given waits.
    pub hung: bool,
    /// Version of what control has published that it works by.
    pub version: u64,
    pub report: Report,
}

impl Worker {
    /// Takes over what control has published.
    pub fn follow(&mut self, control: &Control) {
        if self.version != control.version {
            self.version = control.version;
            self.round.datapath.follow(&control.snapshots());
        }
    }

    /// Tells control about this core, some times a second.
    pub fn publish(&mut self, now: Time) {
        if now.since(self.report.at) >= REPORT_NS {
            let services = &self.round.datapath.services;
            self.report = Report { at: now, table_era: services.table_era(), live: services.live() };
        }
    }

    fn drops(&self) -> DropCounters {
        let mut drops = self.round.datapath.tunnel_drops();
        drops.merge(&self.round.datapath.service_drops());
        drops.merge(&self.round.ports.out.drops);
        drops
    }
}

/// A dialer's socket.
#[derive(Clone, Copy, Debug)]
struct Dialed {
    port: u16,
    version: u32,
}

/// Names a dialer's socket: core, bond, path, number within the path.
type DialKey = (u8, usize, u8, u8);

/// Counters of a site besides the cores' own drops.
#[derive(Clone, Debug, Default)]
pub struct SiteCounters {
    /// Packets and datagrams that a core handed to another one.
    pub crossed: u64,
    /// Inner packets that left over a core that does not own their flow.
    pub foreign: u64,
    /// Datagrams that could not be sent: WAN down or gone, no route, too big for the interface.
    pub send_errors: u64,
    /// Datagrams for a port nobody has.
    pub no_socket: u64,
    /// Datagrams received.
    pub received: u64,
    /// Packets for a next hop or a hardware address that nobody has.
    pub no_neighbor: u64,
}

/// Which core reads a frame or a packet of the host; its owner is the same either way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Readers {
    /// The owner, by the kernel's steering.
    #[default]
    Owner,
    /// Any core, as without steering.
    Random,
}

/// One site.
pub struct Site {
    /// Shared state of the node. Replaced by a restart.
    pub node: Arc<Node>,
    /// Configuration as applied last; change it and call [`crate::world::World::reload`].
    pub snapshot: Snapshot,
    /// Services, and what the control thread has published.
    pub control: Control,
    /// Who reads.
    pub readers: Readers,
    /// Counters.
    pub counters: SiteCounters,
    /// Added to the world's time: every site's clock starts elsewhere.
    pub clock_offset_ns: u64,
    pub(crate) workers: Vec<Worker>,
    pub(crate) private_key: [u8; 32],
    /// Wall clock at the world's start, ns since 1970.
    pub(crate) wall_clock_ns: u64,
    pub(crate) running: bool,
    /// Raised by each restart: what was under way inside the process is gone.
    pub(crate) starts: u32,
    dialed: BTreeMap<DialKey, Dialed>,
    ports: BTreeMap<u16, DialKey>,
    next_port: u16,
    cores: u8,
}

impl Site {
    pub(crate) fn new(random: &mut Rng, cores: u8, wall_clock_ns: u64) -> Self {
        let private_key = bytes(random);
        let clock_offset_ns = random.u64(..1 << 40);
        let node = Self::make_node(random, private_key, cores, wall_clock_ns, 0);
        let mut site = Self {
            control: Control::new(Arc::clone(&node.ownership), random.u64(..)),
            node,
            readers: Readers::Owner,
            snapshot: Snapshot::default(),
            counters: SiteCounters::default(),
            clock_offset_ns,
            workers: Vec::new(),
            private_key,
            wall_clock_ns,
            running: true,
            starts: 0,
            dialed: BTreeMap::new(),
            ports: BTreeMap::new(),
            next_port: 33_000,
            cores,
        };
        site.make_workers(random);
        site
    }

    fn make_node(random: &mut Rng, key: [u8; 32], cores: u8, wall_clock_ns: u64, floor: u64) -> Arc<Node> {
        let keys = std::iter::repeat_with(|| bytes(random));
        let ownership = Ownership::new(cores, keys).expect("a sound source of keys, 1–128 cores");
        Arc::new(Node::new(NodeConfig {
            private_key: PrivateKey::new(key),
            ownership: Arc::new(ArcSwap::from_pointee(ownership)),
            node_id: 0,
            hub_key: None,
            index_key: bytes(random),
            boot_id: random.u64(..),
            seed: bytes(random),
            wall_clock_ns,
            timestamp_floor_ns: floor,
            rekey_after_ms: tunnel::session::REKEY_AFTER_MS,
        }))
    }

    fn make_workers(&mut self, random: &mut Rng) {
        let snapshots = self.control.snapshots();
        let mut worker = |id| {
            let (node, random) =
                (Arc::clone(&self.node), services::random::Random::of_number(random.u64(..)));
            let datapath = Datapath::new(id, node, random, snapshots.clone());
            Worker {
                round: datapath::Worker { datapath, ports: MemoryPorts::new() },
                actions: Vec::new(),
                wake: Time::MAX,
                dirty: true,
                hung: false,
                version: self.control.version,
                report: Report::default(),
            }
        };
        self.workers = (0..self.cores).map(&mut worker).collect();
    }

    /// A process that starts anew: another boot id and hash key, no session, no socket; keys and configuration stay.
    pub(crate) fn restart(&mut self, random: &mut Rng, keep_floor: bool, now: Time) {
        let floor = if keep_floor { self.node.timestamp_floor_ns() } else { 0 };
        // A new process' clock starts at zero for all the tunnel cares; the wall clock goes on.
        self.clock_offset_ns = random.u64(..1 << 40);
        let wall = (self.wall_clock_ns + now.ns()).saturating_sub(self.time(now).ns());
        let wall = if self.wall_clock_ns == 0 { 0 } else { wall };
        self.node = Self::make_node(random, self.private_key, self.cores, wall, floor);
        self.control = self.control.restarted(Arc::clone(&self.node.ownership), random.u64(..));
        self.make_workers(random);
        self.running = true;
        self.starts += 1;
        self.dialed.clear();
        self.ports.clear();
    }

    /// The number of cores from the next restart on.
    pub fn set_cores(&mut self, cores: u8) {
        self.cores = cores;
    }

    /// Takes another site's key from the next restart on, as a cloned machine image does.
    pub fn set_private_key(&mut self, key: [u8; 32]) {
        self.private_key = key;
    }

    /// The private key.
    pub fn private_key(&self) -> [u8; 32] {
        self.private_key
    }

    /// Whether the process runs.
    pub fn is_running(&self) -> bool {
        self.running
    }

    /// Stops a core in the middle of its work, or lets it go on; the others are not told.
    pub fn hang(&mut self, core: u8, on: bool) {
        if let Some(worker) = self.workers.get_mut(usize::from(core)) {
            worker.hung = on;
            worker.dirty |= !on;
        }
    }

    /// Gives the core table's buckets new owners and takes the cores that own none out of use.
    pub fn move_buckets(&mut self, owner: impl Fn(usize) -> u16) {
        let ownership = self.node.ownership.load();
        let owners = (0..ownership.table.buckets()).map(owner).collect();
        if let Ok(table) = BucketTable::from_owners(ownership.table.era().wrapping_add(1), owners) {
            self.control.put_table(table);
            for worker in &mut self.workers {
                worker.dirty = true;
            }
        }
    }

    /// Adds an interface with one address; its network is reached there, its own address is the host's. In force with the
    /// next [`crate::world::World::reload_services`].
    pub fn add_interface(&mut self, name: &str, address: ipnet::IpNet) -> InterfaceId {
        let spec = &mut self.control.spec;
        let number = spec.interfaces.len() as u16;
        let id = InterfaceId(number);
        spec.interfaces.push(InterfaceSpec {
            name: name.to_owned(),
            device: name.to_owned(),
            addresses: vec![address],
            tenant: 0,
            mtu: 1_500,
            ipv6_mtu: u16::MAX,
            link: LinkSpec::ethernet([2, 0, 0, 0, 1, number as u8]),
            outside: false,
            through_action: None,
            loose_tcp: false,
        });
        self.add_route(address.trunc(), Egress::Interface(id), None);
        self.add_route(ipnet::IpNet::from(address.addr()), Egress::Host, None);
        id
    }

    /// Adds a route.
    pub fn add_route(&mut self, prefix: ipnet::IpNet, egress: Egress, via: Option<IpAddr>) {
        self.control.spec.routes.push(RouteSpec::new(0, prefix, egress, via));
    }

    /// Hardware address of an interface.
    pub(crate) fn mac(&self, interface: InterfaceId) -> Option<[u8; 6]> {
        self.control.spec.interfaces.get(interface.index()).map(|interface| interface.link.mac())
    }

    /// Services' counters of one core.
    pub fn service_counters(&self, core: u8) -> Counters {
        self.workers
            .get(usize::from(core))
            .map(|worker| worker.round.datapath.services.counters)
            .unwrap_or_default()
    }

    /// Flows that a core's services have now.
    pub fn flows(&self, core: u8) -> usize {
        self.workers.get(usize::from(core)).map_or(0, |worker| worker.round.datapath.services.flows().len())
    }

    /// Number of cores as configured.
    pub fn cores(&self) -> u8 {
        self.cores
    }

    /// Checks that no flow, in either direction, is in the tables of two cores or twice in one.
    ///
    /// # Errors
    /// The flow and its two cores.
    pub(crate) fn check_flows(&self) -> Result<(), String> {
        let mut known = BTreeMap::new();
        for worker in &self.workers {
            let (core, flows) = (worker.round.datapath.id(), worker.round.datapath.services.flows());
            let mut cursor = Some(0);
            while let Some(from) = cursor {
                let (found, next) = flows.scan(from, 4_096);
                for id in found {
                    let (original, reply) = flows.keys(id);
                    let same = original.0 == reply.0.reversed() && original.1 == reply.1;
                    let keys = if same { vec![original] } else { vec![original, reply] };
                    for (key, tenant) in keys {
                        // A flow that is not translated has one name for both directions.
                        let (one, two) = ((key.src, key.src_port), (key.dst, key.dst_port));
                        let name = (one.min(two), one.max(two), key.protocol, tenant);
                        if let Some(other) = known.insert(name, core) {
                            return Err(format!("{key:?} is at core {other} and at core {core}"));
                        }
                    }
                }
                cursor = next;
            }
        }
        Ok(())
    }

    /// Bonds, paths and sessions the node holds: what strangers must not be able to raise.
    pub fn held(&self) -> (usize, usize, usize) {
        let bonds = self.node.bonds.load();
        let paths = bonds.iter().map(|bond| bond.paths.load().len()).sum();
        (bonds.iter().count(), paths, self.node.sessions_held())
    }

    /// The site's own clock at the world's time `now`.
    pub(crate) fn time(&self, now: Time) -> Time {
        now.plus_ns(self.clock_offset_ns)
    }

    /// Public key.
    pub fn public_key(&self) -> [u8; 32] {
        PrivateKey::new(self.private_key).public()
    }

    /// A configured peer by name.
    pub fn peer_mut(&mut self, name: &str) -> Option<&mut Peer> {
        self.snapshot.peers.iter_mut().find(|peer| peer.name == name)
    }

    /// A WAN by id.
    pub fn wan(&self, id: u16) -> Option<&Wan> {
        self.snapshot.wans.iter().find(|wan| wan.id == id)
    }

    /// A WAN by id, to change before a reload.
    pub fn wan_mut(&mut self, id: u16) -> Option<&mut Wan> {
        self.snapshot.wans.iter_mut().find(|wan| wan.id == id)
    }

    /// The bond in a slot.
    pub fn bond(&self, slot: usize) -> Option<Arc<Bond>> {
        self.node.bonds.load().get(slot).cloned()
    }

    /// Paths of the bond in `slot` in a state.
    pub fn paths_in(&self, slot: usize, state: PathState) -> usize {
        self.bond(slot)
            .map_or(0, |bond| bond.paths.load().iter().filter(|path| path.state() == state).count())
    }

    /// Paths of the bond in `slot` that carry data.
    pub fn paths_up(&self, slot: usize) -> usize {
        self.paths_in(slot, PathState::Up)
    }

    /// Completed handshakes of a bond.
    pub fn handshakes(&self, slot: usize) -> u64 {
        self.bond(slot).map_or(0, |bond| bond.totals.handshakes.load(std::sync::atomic::Ordering::Relaxed))
    }

    /// Everything that was dropped on all cores, by reason.
    pub fn drop_counters(&self) -> DropCounters {
        let mut all = DropCounters::default();
        self.workers.iter().for_each(|worker| all.merge(&worker.drops()));
        all
    }

    /// Datagrams and packets dropped for `reason` on all cores.
    pub fn drops(&self, reason: DropReason) -> u64 {
        self.drop_counters().get(reason)
    }

    /// Everything dropped, by reason, without zeros.
    pub fn all_drops(&self) -> Vec<(DropReason, u64)> {
        self.drop_counters().iter().filter(|drop| drop.1 > 0).collect()
    }

    /// A line about every path, for people who read a failed test.
    pub fn describe(&self) -> String {
        use std::fmt::Write as _;
        let mut text = String::new();
        for bond in self.node.bonds.load().iter() {
            let session = bond.current.load().as_ref().map(|session| session.number);
            let _ = writeln!(text, "  bond {} session {session:?}", bond.slot);
            for path in bond.paths.load().iter() {
                let _ = writeln!(
                    text,
                    "    path {} {} ({}) to {:?} rate {} delay {} queue {} jitter {} rtt {} mtu {}",
                    path.id,
                    path.state().name(),
                    path.reason(),
                    path.route(),
                    path.rate(),
                    path.delay_us(),
                    path.queue_us(),
                    path.jitter_us(),
                    path.rtt_us(),
                    path.datagram_bytes(),
                );
            }
        }
        let _ = writeln!(text, "  {:?} {:?}", self.counters, self.all_drops());
        text
    }

    /// The local address and port a datagram leaves from, or `None` when it cannot leave.
    pub(crate) fn source_of(&mut self, core: u8, target: &Target, bytes: usize) -> Option<SocketAddr> {
        let wan = self.wan(target.route.wan).filter(|wan| wan.up)?;
        if bytes + crate::cable::IP_OVERHEAD_BYTES > usize::from(wan.mtu) {
            return None;
        }
        let remote = target.route.remote;
        let own = wan.addresses.iter().copied().find(|address| address.is_ipv4() == remote.is_ipv4())?;
        let address = match target.route.local {
            Some(local) if wan.addresses.contains(&local) => local,
            _ => own,
        };
        let bond = match target.bond {
            Some(bond) if target.dialer => bond,
            _ => return Some(SocketAddr::new(address, LISTEN_PORT)),
        };
        let cap = self.bond(bond).map_or(4, |bond| bond.peer.load().paths.sockets);
        let slot = target.peer_core % (cap / self.cores.max(1)).max(1);
        let key = (core, bond, target.path, slot);
        if let Some(known) = self.dialed.get(&key) {
            if known.version == target.version {
                return Some(SocketAddr::new(address, known.port));
            }
            self.ports.remove(&known.port);
        }
        while self.ports.contains_key(&self.next_port) {
            self.next_port = self.next_port.wrapping_add(1).max(33_000);
        }
        let port = self.next_port;
        self.next_port = self.next_port.wrapping_add(1).max(33_000);
        self.ports.insert(port, key);
        self.dialed.insert(key, Dialed { port, version: target.version });
        Some(SocketAddr::new(address, port))
    }

    /// The core that reads a datagram, and where it came from; `None` when nobody listens there.
    pub(crate) fn reader(
        &self,
        wan: u16,
        from: SocketAddr,
        to: SocketAddr,
        bytes: &[u8],
    ) -> Option<(u8, Source)> {
        if to.port() == LISTEN_PORT {
            // What the SO_REUSEPORT program does: by core byte for data, any core for the rest.
            let [kind, receiving, sending, ..] = *bytes else {
                return Some((
                    0,
                    Source { wan, local: Some(to.ip()), remote: from, socket: None, hops: None },
                ));
            };
            let core = match kind & 15 {
                7 => sending % self.cores,
                4.. if receiving < self.cores => receiving,
                4.. => sending % self.cores,
                _ => (from.port() % u16::from(self.cores)) as u8,
            };
            return Some((
                core,
                Source { wan, local: Some(to.ip()), remote: from, socket: None, hops: None },
            ));
        }
        let (core, bond, path, _) = *self.ports.get(&to.port())?;
        Some((core, Source { wan, local: None, remote: from, socket: Some((bond, path)), hops: None }))
    }

    /// Whether an address is one of a WAN's.
    pub(crate) fn owns(&self, wan: u16, address: IpAddr) -> bool {
        self.wan(wan).is_some_and(|wan| wan.up && wan.addresses.contains(&address))
    }
}

/// `N` random bytes.
fn bytes<const N: usize>(random: &mut Rng) -> [u8; N] {
    let mut bytes = [0; N];
    random.fill(&mut bytes);
    bytes
}
