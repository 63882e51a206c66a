//! From the configuration to a [`Balancer`], with what lives on from the one before.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use crate::hash::ConfigState;
use arc_swap::ArcSwap;
use hashbrown::HashMap;

use super::state::{BackendState, ServerState, TENTHS};
use super::table::Table;
use super::{BACKENDS_MAX, Balancer, SERVERS_MAX, WEIGHT_MAX};
use crate::spec::{Affinity, BackendSpec, BalanceMethod, DeliveryMode, NatMode, ResetOnDown, ServerSpec};

/// Earlier listen endpoints of one backend that are remembered for live flows.
const PASTS_MAX: usize = 8;

/// Protocol, address and port. Unlike [`SocketAddr`] without the scope and flow label that a link-local or labelled
/// packet's may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Endpoint {
    address: IpAddr,
    port: u16,
    protocol: u8,
}

impl Endpoint {
    /// Of a socket address.
    pub const fn new(protocol: u8, address: SocketAddr) -> Self {
        Self { address: address.ip(), port: address.port(), protocol }
    }
}

/// Looked up, never gone through.
pub type Index<V> = HashMap<Endpoint, V, ConfigState>;

/// A virtual server.
#[derive(Debug)]
pub struct Server {
    pub state: Arc<ServerState>,
    pub protocol: u8,
    pub listen: SocketAddr,
    pub method: BalanceMethod,
    pub delivery: DeliveryMode,
    pub source: NatMode,
    pub connections_max: u32,
    pub slow_start_s: u16,
    pub proxy_protocol: bool,
    pub reset_on_down: ResetOnDown,
    pub affinity: Affinity,
    pub backends: Vec<ServerBackend>,
    pub table: ArcSwap<Table>,
    /// Held while a table is built.
    pub building: Mutex<()>,
}

/// A backend, as its server sees it.
#[derive(Debug)]
pub struct ServerBackend {
    pub state: Arc<BackendState>,
    /// Configured.
    pub weight: u16,
    pub connections_max: u32,
    /// Once it drains, connections may last so long, s; 0 = as long as they like.
    pub drain_s: u32,
}

impl ServerBackend {
    /// The configured weight as tables count it.
    pub fn configured_tenths(&self) -> u32 {
        u32::from(self.weight) * TENTHS
    }

    /// Up, and wanted by the operator.
    pub fn is_available(&self) -> bool {
        self.state.is_up() && !self.state.is_draining(self.weight)
    }
}

/// A backend, by its id.
#[derive(Debug)]
pub struct Backend {
    pub state: Arc<BackendState>,
    /// Configured.
    pub weight: u16,
    pub connections_max: u32,
    /// Its server; `None` for one that is no longer configured.
    pub home: Option<u16>,
    /// Where clients of flows come in whose replies must be recognised by this backend's endpoint.
    pub present: Option<Past>,
    /// The same of earlier configurations, while flows may use them.
    pub past: Vec<Past>,
}

/// A listen endpoint that replies of a backend may belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Past {
    protocol: u8,
    listen: SocketAddr,
}

/// See [`Balancer::compile_keyed`].
pub fn compile<'a>(servers: &'a [ServerSpec], before: Option<&'a Balancer>, key: u64) -> Balancer {
    let now_ns = before.map_or(0, |before| before.now_ns.load(Relaxed));
    let mut compiler = Compiler::new(before);
    let servers: Vec<Server> = servers
        .iter()
        .take(SERVERS_MAX)
        .zip(0u16..)
        .map(|(spec, id)| {
            let server = compiler.server(spec, id);
            server.refresh(now_ns);
            server
        })
        .collect();
    let mut by_listen = Index::default();
    for (server, id) in servers.iter().zip(0u16..) {
        by_listen.entry(Endpoint::new(server.protocol, server.listen)).or_insert(id);
    }
    let backends = compiler.finish();
    let mut listens: Index<Vec<SocketAddr>> = Index::default();
    for backend in backends.iter().flatten() {
        for past in backend.present.iter().chain(&backend.past) {
            let list = listens.entry(Endpoint::new(past.protocol, backend.state.address)).or_default();
            if !list.contains(&past.listen) {
                list.push(past.listen);
            }
        }
    }
    let deaths = before.map(|before| Arc::clone(&before.deaths)).unwrap_or_default();
    Balancer { servers, by_listen, backends, listens, key, now_ns: AtomicU64::new(now_ns), deaths }
}

struct Compiler<'a> {
    /// Backends before, by server name and endpoint.
    old: BTreeMap<(&'a str, Endpoint), &'a Backend>,
    old_servers: BTreeMap<&'a str, &'a Arc<ServerState>>,
    /// The new list by id.
    backends: Vec<Option<Backend>>,
    /// Ids of old backends, used again or not.
    reserved: BTreeSet<u16>,
    /// Backends of the new configuration, by server name and endpoint.
    taken: BTreeSet<(&'a str, Endpoint)>,
    next_id: u16,
}

impl<'a> Compiler<'a> {
    fn new(before: Option<&'a Balancer>) -> Self {
        let mut compiler = Self {
            old: BTreeMap::new(),
            old_servers: BTreeMap::new(),
            backends: Vec::new(),
            reserved: BTreeSet::new(),
            taken: BTreeSet::new(),
            next_id: 0,
        };
        let Some(before) = before else { return compiler };
        for server in &before.servers {
            compiler.old_servers.insert(&server.state.name, &server.state);
        }
        for backend in before.backends.iter().flatten().filter(|backend| backend.lives_on()) {
            let state = &backend.state;
            compiler.old.insert((&state.server.name, Endpoint::new(0, state.address)), backend);
            compiler.old_servers.entry(&state.server.name).or_insert(&state.server);
            compiler.reserved.insert(state.id);
        }
        compiler
    }

    fn server(&mut self, spec: &'a ServerSpec, id: u16) -> Server {
        let old = self.old_servers.get(spec.name.as_str());
        let state = old.map_or_else(|| Arc::new(ServerState::new(&spec.name)), |&old| Arc::clone(old));
        let backends =
            spec.backends.iter().filter_map(|backend| self.backend(spec, id, backend, &state)).collect();
        Server {
            state,
            protocol: spec.protocol,
            listen: spec.listen,
            method: spec.method,
            delivery: spec.delivery,
            source: spec.source,
            connections_max: spec.connections_max,
            slow_start_s: spec.slow_start_s,
            proxy_protocol: spec.proxy_protocol,
            reset_on_down: spec.reset_on_down,
            affinity: spec.affinity,
            backends,
            table: ArcSwap::default(),
            building: Mutex::new(()),
        }
    }

    fn backend(
        &mut self,
        server: &'a ServerSpec,
        home: u16,
        spec: &BackendSpec,
        server_state: &Arc<ServerState>,
    ) -> Option<ServerBackend> {
        if spec.address.is_ipv4() != server.listen.is_ipv4() {
            return None;
        }
        let name_and_endpoint = (server.name.as_str(), Endpoint::new(0, spec.address));
        if !self.taken.insert(name_and_endpoint) {
            return None;
        }
        let old = self.old.get(&name_and_endpoint).copied();
        let id = match old {
            Some(old) => old.state.id,
            None => self.free_id()?,
        };
        let state = match old {
            Some(old) => Arc::clone(&old.state),
            None => {
                // Of a new server all are new: nobody else could take what they leave.
                let slowly = self.old_servers.contains_key(server.name.as_str());
                Arc::new(BackendState::new(id, spec.address, Arc::clone(server_state), slowly))
            }
        };
        let weight = spec.weight.min(WEIGHT_MAX);
        let connections_max = spec.connections_max;
        let steered = server.delivery == DeliveryMode::Nat && server.source == NatMode::None;
        let present = steered.then_some(Past { protocol: server.protocol, listen: server.listen });
        let entry = Backend {
            state: Arc::clone(&state),
            weight,
            connections_max,
            home: Some(home),
            present,
            past: old.map(|old| old.pasts(present)).unwrap_or_default(),
        };
        self.put(entry);
        Some(ServerBackend { state, weight, connections_max, drain_s: spec.drain_s })
    }

    fn put(&mut self, entry: Backend) {
        let place = usize::from(entry.state.id);
        if self.backends.len() <= place {
            self.backends.resize_with(place + 1, || None);
        }
        if let Some(slot @ None) = self.backends.get_mut(place) {
            *slot = Some(entry);
        }
    }

    /// The lowest id that nobody has.
    fn free_id(&mut self) -> Option<u16> {
        while usize::from(self.next_id) < BACKENDS_MAX {
            let id = self.next_id;
            self.next_id += 1;
            if !self.reserved.contains(&id) {
                return Some(id);
            }
        }
        None
    }

    /// Adds what is no longer configured and may still have flows.
    fn finish(mut self) -> Vec<Option<Backend>> {
        for old in std::mem::take(&mut self.old).into_values() {
            let retired = Backend {
                state: Arc::clone(&old.state),
                weight: 0,
                connections_max: 0,
                home: None,
                present: None,
                past: old.pasts(None),
            };
            self.put(retired);
        }
        self.backends
    }
}

impl Backend {
    /// Whether the next balancer must know it: it is configured now (a core may be about to open a flow), or has flows.
    fn lives_on(&self) -> bool {
        self.home.is_some() || self.state.count.held() > 0
    }

    /// Listen endpoints to remember when the present one becomes `next`.
    fn pasts(&self, next: Option<Past>) -> Vec<Past> {
        let older: &[Past] = if self.state.count.held() > 0 { &self.past } else { &[] };
        let mut list: Vec<Past> =
            self.present.iter().chain(older).copied().filter(|past| Some(*past) != next).collect();
        list.truncate(PASTS_MAX);
        list
    }
}
