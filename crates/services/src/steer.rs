//! Which core owns a packet: asked by whoever reads it, answered without state (rows C2–C4, C9; design §3).
//!
//! Nearly always the answer is one core: the bucket table at the hash of the packet's own tuple. Five things make the
//! list of cores longer or other; each has the flow's record at exactly one of the cores visited:
//!
//! * **Kept source behind a translated destination** (C4 with a virtual server or port forward): the reply's tuple hashes
//!   elsewhere than the request's. The reply's source is a known backend, so the request's tuple is made up again from
//!   it and the listen address, and its owner is visited first. Not where the packet is addressed to the gateway
//!   itself: then it answers the gateway or a source NAT, and no client whose tuple was kept.
//! * **Endpoint-independent mappings**: what goes out belongs to the core of the client's endpoint, whatever the remote;
//!   what comes in to the core that holds the port's block. A client that talks to another one's outside endpoint does
//!   both: its own core is asked first, then the one that holds the port, which may give it back to begin. Not every
//!   packet between such a client and the outside is of a mapping: it may answer somebody who came in by a forward, or to
//!   the inside address itself. So the cores of kept sources and of the packet's own tuple are visited before.
//! * **Protocols without ports behind an outside address**: no port can lead the answer to its core, so these flows belong
//!   to the core of their remote's address, which both directions have.
//! * **A bucket that moved** has a chain of earlier owners; they are asked before the owner begins a flow. One that has
//!   the endpoint-independent mapping of the packet's client begins it itself, so that the client keeps its outside port.
//! * **A core that was taken away** is skipped.
//!
//! The last stop is always the *creator*: the only core that may begin a flow for this packet, but for such a mapping.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use packet::flow::FlowKey;
use steering::port_solver::ReplyPorts;
use steering::symmetric::FlowHasher;
use steering::table::BucketTable;

use crate::nat::is_translated;
use crate::nat::source_port;
use crate::policy::Policy;
use crate::spec::{NatMode, PortId};

/// Cores visited for one packet at most.
pub const STOPS_MAX: usize = 16;

/// The hash, its solver and the bucket table: one snapshot for all cores, replaced as a whole when buckets move.
#[derive(Debug)]
pub struct Steering {
    /// The gateway's own hash; its key never leaves.
    pub hasher: Arc<FlowHasher>,
    /// Its inverse for reply ports.
    pub solvers: Arc<ReplyPorts>,
    /// Bucket → core, with chains.
    pub table: BucketTable,
    /// How many cores there are, working or not.
    pub cores: u8,
    /// Bit per core: it works. A core that does not is never visited.
    pub alive: u128,
}

impl Steering {
    /// Draws a key for which replies can be steered, with `cores` equal owners of 128 buckets.
    ///
    /// # Errors
    /// Says what is wrong; with sound randomness and 1–128 cores nothing is.
    pub fn new(
        cores: u8,
        keys: impl IntoIterator<Item = [u8; steering::toeplitz::KEY_BYTES]>,
    ) -> Result<Self, String> {
        let units: Vec<_> = (0..u16::from(cores)).map(|id| steering::table::Unit { id, weight: 1 }).collect();
        let table = BucketTable::new(steering::table::CORE_BUCKETS, &units)
            .map_err(|error| format!("no bucket table for {cores} cores: {error}"))?;
        let (hasher, solvers) = ReplyPorts::draw(7, 10, keys)
            .ok_or("none of the drawn hash keys can be solved for ports; the random source is broken")?;
        let alive = if cores >= 128 { u128::MAX } else { (1u128 << cores) - 1 };
        Ok(Self { hasher: Arc::new(hasher), solvers: Arc::new(solvers), table, cores, alive })
    }

    /// Whether core `id` works.
    #[must_use]
    pub fn is_alive(&self, id: u8) -> bool {
        self.alive >> (id & 127) & 1 == 1
    }

    /// The same hash with another table and other cores that work.
    #[must_use]
    pub fn with_table(&self, table: BucketTable, alive: u128) -> Self {
        Self {
            hasher: Arc::clone(&self.hasher),
            solvers: Arc::clone(&self.solvers),
            table,
            cores: self.cores,
            alive,
        }
    }

    /// Bucket of a tuple.
    #[inline]
    #[must_use]
    pub fn bucket(&self, key: &FlowKey, tenant: u16) -> usize {
        steering::symmetric::core_bucket(self.hasher.hash(key, tenant), self.table.buckets())
    }

    /// The stops of a packet that came in at `port`.
    #[inline]
    #[must_use]
    pub fn stops(&self, policy: &Policy, key: &FlowKey, tenant: u16, port: PortId) -> Stops {
        let bucket = self.bucket(key, tenant);
        let has_port = is_translated(key.protocol) || !policy.hides();
        if policy.steers_by_hash_only && has_port && self.table.chain(bucket).is_empty() {
            return Stops::one(self.table.owner(bucket) as u8);
        }
        self.all_stops(policy, key, tenant, port, bucket)
    }

    #[cold]
    fn all_stops(&self, policy: &Policy, key: &FlowKey, tenant: u16, port: PortId, bucket: usize) -> Stops {
        let mut stops = Stops::default();
        if let Some(home) = self.remote_bucket_of(policy, key, tenant, port) {
            stops.visit_bucket(self, home);
            stops.creator = self.table.owner(home) as u8;
            stops.visit(self, stops.creator);
            return stops;
        }
        let from = SocketAddr::new(key.src, key.src_port);
        let listens = policy.kept_source_listens(key.protocol, from);
        let ours = !listens.is_empty() && (policy.is_own(key.dst) || policy.nat.is_outside(key.dst));
        for listen in listens.iter().filter(|_| !ours) {
            let request = FlowKey {
                src: key.dst,
                src_port: key.dst_port,
                dst: listen.ip(),
                dst_port: listen.port(),
                protocol: key.protocol,
            };
            // Clients come in where the listen address is: untagged interfaces, tenant 0, unless the policy says more.
            let client_tenant = policy.tenant_towards(key.dst, tenant);
            stops.visit_bucket(self, self.bucket(&request, client_tenant));
        }
        stops.visit_bucket(self, bucket);
        let mapped = self.mapping_owner(policy, key, tenant, port, &mut stops);
        stops.creator = mapped.unwrap_or(self.table.owner(bucket) as u8);
        stops.visit(self, stops.creator);
        stops
    }

    /// The core of an endpoint-independent mapping, if the packet uses one.
    fn mapping_owner(
        &self,
        policy: &Policy,
        key: &FlowKey,
        tenant: u16,
        port: PortId,
        stops: &mut Stops,
    ) -> Option<u8> {
        // What is addressed to a service goes inside, not out by a mapping, wherever the route to its address leads.
        if !policy.maps_endpoints || policy.server_or_forward(key).is_some() {
            return None;
        }
        if let Some(core) = policy.nat.mapping_core_of(key, self.cores) {
            if policy.hairpin_out(key, tenant, port).is_some() {
                stops.visit_bucket(self, self.endpoint_bucket(key, tenant));
            }
            return Some(core);
        }
        let out = policy.fib.lookup(tenant, key.dst)?.port;
        if out == port {
            return None;
        }
        stops.mapping = Some(policy.endpoint_rule(out, key, tenant)?);
        let bucket = self.endpoint_bucket(key, tenant);
        stops.visit_bucket(self, bucket);
        Some(self.table.owner(bucket) as u8)
    }

    /// The bucket of a client's endpoint alone: of who sends this, whoever the remote is.
    #[must_use]
    pub fn endpoint_bucket(&self, key: &FlowKey, tenant: u16) -> usize {
        let nobody = match key.src {
            IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        };
        self.bucket(&FlowKey { src_port: source_port(key), dst: nobody, dst_port: 0, ..*key }, tenant)
    }

    /// The bucket of a remote's address alone, for a protocol without ports; `tenant`: in which its packets come in.
    #[must_use]
    pub fn remote_bucket(&self, remote: IpAddr, protocol: u8, tenant: u16) -> usize {
        let nobody = match remote {
            IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        };
        self.bucket(&FlowKey { src: remote, dst: nobody, src_port: 0, dst_port: 0, protocol }, tenant)
    }

    /// That bucket, if the packet leaves by a NAT that gives another address, or answers such a one.
    fn remote_bucket_of(&self, policy: &Policy, key: &FlowKey, tenant: u16, port: PortId) -> Option<usize> {
        if is_translated(key.protocol) || !policy.hides() {
            return None;
        }
        if policy.nat.is_outside(key.dst) {
            return Some(self.remote_bucket(key.src, key.protocol, tenant));
        }
        let out = policy.fib.lookup(tenant, key.dst)?.port;
        let rule = policy.nat.rule_for(out, key, tenant).filter(|_| out != port)?;
        let hides = policy.nat.mode(rule) == Some(NatMode::AddressAndPort);
        hides.then(|| self.remote_bucket(key.dst, key.protocol, policy.tenant_of(out)))
    }

    /// The cores that may have the endpoint-independent mapping of a client's endpoint. The last begins one if none has.
    #[must_use]
    pub fn endpoint_stops(&self, key: &FlowKey, tenant: u16) -> Stops {
        let bucket = self.endpoint_bucket(key, tenant);
        let mut stops = Stops::default();
        stops.visit_bucket(self, bucket);
        stops.creator = self.table.owner(bucket) as u8;
        stops.visit(self, stops.creator);
        stops
    }
}

/// The cores to ask about a packet, in order, each once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stops {
    cores: [u8; STOPS_MAX],
    len: u8,
    /// The only core that may begin a flow for the packet; the last stop.
    pub creator: u8,
    /// The NAT rule by whose endpoint-independent mapping the flow leaves: the core on the way that has the client's begins
    /// the flow instead.
    pub mapping: Option<u16>,
}

impl Stops {
    /// Just one core, which is the creator too.
    #[inline]
    #[must_use]
    pub const fn one(core: u8) -> Self {
        let mut cores = [0; STOPS_MAX];
        cores[0] = core;
        Self { cores, len: 1, creator: core, mapping: None }
    }

    /// The stops in order.
    #[inline]
    #[must_use]
    pub fn cores(&self) -> &[u8] {
        self.cores.get(..usize::from(self.len)).unwrap_or_default()
    }

    /// Where a packet goes that was found unknown at stop `step`; `None` after the last.
    #[must_use]
    pub fn after(&self, step: u8) -> Option<u8> {
        self.cores().get(usize::from(step) + 1).copied()
    }

    fn visit(&mut self, steering: &Steering, core: u8) {
        // The creator has to be the last stop: move it there when it was on the way.
        if let Some(at) = self.cores().iter().position(|known| *known == core) {
            if let Some(rest) = self.cores.get_mut(at..usize::from(self.len)) {
                rest.rotate_left(1);
            }
            return;
        }
        if steering.is_alive(core)
            && let Some(place) = self.cores.get_mut(usize::from(self.len))
        {
            *place = core;
            self.len += 1;
        }
    }

    /// The bucket's owner, then its earlier owners.
    fn visit_bucket(&mut self, steering: &Steering, bucket: usize) {
        let owner = steering.table.owner(bucket) as u8;
        let chain = steering.table.chain(bucket).iter().map(|unit| *unit as u8);
        for core in std::iter::once(owner).chain(chain) {
            // One place stays free for the creator.
            if usize::from(self.len) < STOPS_MAX - 1 && !self.cores().contains(&core) {
                self.visit(steering, core);
            }
        }
    }
}
