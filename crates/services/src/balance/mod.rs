//! Virtual servers (row C6): which backend gets a new connection.
//!
//! A [`Balancer`] is compiled from the configuration and shared by all cores. Its structure never changes; what
//! changes while it runs is behind atomics that are touched once per new flow and once per ended flow, never per
//! packet: the counts of a backend (`state`), and the table of a server, which control builds anew when health or
//! weights change (`table`, [`maglev`], `turns`).
//!
//! ```text
//! find(protocol, destination) ─▶ server ─▶ pick(client) ─▶ backend ─▶ opened … over … closed
//! ```
//!
//! * **A look and a reservation.** [`Balancer::pick`] looks, [`Balancer::opened`] takes a place exactly: a flow that
//!   ends between the two (no route, no port) needs no undoing.
//! * **Diversion.** A backend that is down, draining or as full as it may be gets no new connection. Hashing methods
//!   try the next hashes of the same client, so that it is diverted to the same other backend each time. Live
//!   connections stay where they are in all three cases, unless their backend is down: [`Balancer::fate`].
//! * **Affinity.** Where it is asked for, a client's address leads to the backend that it had last (`clients`), before any
//!   method is asked, as long as that backend takes connections: [`Balancer::remember`]. A QUIC connection is known by its id (`connection_ids`), and stays
//!   where it is as long as its backend is up.
//! * **Drain time.** With `drain_s`, connections that a draining backend has after that time end like those of a dead one.
//! * **Nobody left.** When all backends are down, new connections are refused ([`DropReason::NoBackend`]), not sent
//!   to a dead one: clients that are told go elsewhere at once. When those that are up are full, it is
//!   [`DropReason::ServerFull`].
//! * **A new start.** A backend is up until a monitor says otherwise. One that comes up, ends draining or is added to
//!   its server by a reload begins with a tenth of its weight and grows to all of it within `slow_start_s`; those of a
//!   new server, as at the start of the gateway, have their full weight at once.
//! * **Reload.** A backend is known by its server's name and its own address. If both stay, so do its number, counts,
//!   health and drain state. The number of a removed backend is not given away while it has live flows.
//!
//! Orderings are relaxed throughout: the counts stand alone, and a table is published by `arc-swap`.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use packet::drop_reason::DropReason;
use packet::flow::FlowKey;

use crate::spec::{Affinity, BalanceMethod, DeliveryMode, NatMode, ResetOnDown, ServerSpec, UDP};

mod clients;
mod compile;
mod connection_ids;
pub mod maglev;
mod state;
mod status;
mod table;
mod turns;

#[cfg(test)]
mod maglev_tests;
#[cfg(test)]
mod reload_tests;
#[cfg(test)]
mod tests;

use compile::{Backend, Endpoint, Index, Server};

pub use status::{BackendStatus, ServerStatus};

/// Most virtual servers of one gateway.
pub const SERVERS_MAX: usize = 65_535;

/// Most backends of one gateway, removed ones with live flows included. Ids are below it, so that a flow can store
/// "id + 1" in 16 bits.
pub const BACKENDS_MAX: usize = 65_535;

/// So many further hashes of a client are tried before the backends are gone through one by one.
const REHASHES_MAX: u64 = 8;

/// So many of the following turns are tried before the backends are gone through one by one.
const TURNS_MAX: u32 = 8;

/// Decision for a new flow to a virtual server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pick {
    /// The backend's id, for [`Balancer::opened`], [`Balancer::closed`] and the flow's record.
    pub backend: u16,
    /// The backend's address and port.
    pub address: SocketAddr,
    /// How packets reach it.
    pub delivery: DeliveryMode,
    /// Treatment of the client's source. Always [`NatMode::None`] with direct return: the backend answers the
    /// client itself.
    pub source: NatMode,
    /// Whether the connection begins with a PROXY protocol v2 header. Never with UDP or direct return.
    pub proxy_protocol: bool,
}

/// Consequence of a backend's health for its flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// None: it is up, and does not drain or has time to.
    Stay,
    /// Flows that another backend can serve as well go there: UDP, and connections that are still being opened.
    Move,
    /// The same, and live TCP connections are reset.
    Reset,
}

/// A backend as [`Balancer::backends`] lists it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackendRef<'a> {
    /// Its id.
    pub id: u16,
    /// Name of its server.
    pub server: &'a str,
    /// Its address and port.
    pub address: SocketAddr,
}

/// All virtual servers of one policy.
#[derive(Debug)]
pub struct Balancer {
    /// By server id.
    servers: Vec<Server>,
    /// Server id by protocol and listen endpoint.
    by_listen: Index<u16>,
    /// By backend id: where it is among the servers, or what is left of it.
    backends: Vec<Option<Backend>>,
    /// Listen addresses by protocol and backend endpoint, see [`Balancer::listen_of`].
    listens: Index<Vec<SocketAddr>>,
    /// Key of the clients' hash.
    key: u64,
    /// Last time that control told, ns.
    now_ns: AtomicU64,
    /// How often a backend went down, fell silent, or had drained as long as it may, over all reloads.
    deaths: Arc<AtomicU64>,
}

impl Balancer {
    /// Compiles the virtual servers; `before` is the balancer that this one follows.
    ///
    /// A server whose listen endpoint an earlier one has is never found. Left out are a backend of another IP version
    /// than its server, the second backend with one address in a server, and what is beyond [`SERVERS_MAX`] and
    /// [`BACKENDS_MAX`]: whoever reads the configuration refuses these with a message.
    #[must_use]
    pub fn compile(servers: &[ServerSpec], before: Option<&Balancer>) -> Balancer {
        Self::compile_keyed(servers, before, before.map_or(0, |before| before.key))
    }

    /// As [`Balancer::compile`], with a key for the clients' hash. Gateways with equal key and configuration choose
    /// equally; who does not know the key cannot choose source ports that all lead to one backend.
    #[must_use]
    pub fn compile_keyed(servers: &[ServerSpec], before: Option<&Balancer>, key: u64) -> Balancer {
        compile::compile(servers, before, key)
    }

    /// The server that listens there, if any.
    #[inline]
    #[must_use]
    pub fn find(&self, protocol: u8, dst: SocketAddr) -> Option<u16> {
        self.by_listen.get(&Endpoint::new(protocol, dst)).copied()
    }

    /// Chooses a backend for a new flow of `client` (the key of its first packet). Takes no place: call
    /// [`Balancer::opened`] when the flow is made. `random` breaks ties. A refusal is counted, see
    /// [`ServerStatus::refused`].
    ///
    /// # Errors
    /// [`DropReason::NoBackend`]: none is up and takes connections. [`DropReason::ServerFull`]: the server, or each
    /// backend that is up, has as many connections as it may have.
    pub fn pick(&self, server: u16, client: &FlowKey, now_ns: u64, random: u32) -> Result<Pick, DropReason> {
        let picked = self.would_pick(server, client, now_ns, random);
        if picked.is_err() {
            self.refuse(server);
        }
        picked
    }

    /// The backend of the QUIC connection that a client's datagram belongs to, for a new flow from an address that the
    /// connection did not have before; `None`: it is no known one, or its backend is down. The connection lives already, so that
    /// neither draining nor a limit keeps it away.
    #[must_use]
    pub fn quic_backend(&self, server: u16, datagram: &[u8], now_ns: u64) -> Option<Pick> {
        let server = self.servers.get(usize::from(server))?;
        if server.affinity != Affinity::QuicConnectionId {
            return None;
        }
        let id = server.state.connection_ids.backend_of(self.key, datagram, now_ns)?;
        let place = server.backends.iter().position(|backend| backend.state.id == id)?;
        let state = &server.backends.get(place)?.state;
        let serves = state.is_up() && !state.is_drained_out();
        u16::try_from(place).ok().filter(|_| serves).and_then(|place| server.pick_at(place))
    }

    /// Whether flows of this server are looked at for connection ids.
    #[must_use]
    pub fn learns_connection_ids(&self, server: u16) -> bool {
        let server = self.servers.get(usize::from(server));
        server.is_some_and(|it| it.affinity == Affinity::QuicConnectionId && it.protocol == UDP)
    }

    /// A backend answers with this datagram. Returns whether later ones are to be looked at too.
    #[cold]
    pub fn learn_connection_id(&self, backend: u16, datagram: &[u8], now_ns: u64) -> bool {
        let Some(entry) = self.backend(backend).filter(|entry| entry.home.is_some()) else { return false };
        entry.state.server.connection_ids.learn(self.key, backend, datagram, now_ns)
    }

    /// As [`Balancer::pick`], for a look that is not about a connection: nothing is counted. With round robin a turn is
    /// given all the same.
    ///
    /// # Errors
    /// As there.
    pub fn would_pick(
        &self,
        server: u16,
        client: &FlowKey,
        now_ns: u64,
        random: u32,
    ) -> Result<Pick, DropReason> {
        let server = self.servers.get(usize::from(server)).ok_or(DropReason::NoBackend)?;
        if server.is_full() {
            return Err(DropReason::ServerFull);
        }
        let stays = server.affinity == Affinity::SourceAddress;
        if stays
            && let Some(backend) = server.state.clients.backend_of(self.key, client.src, now_ns)
            && let Some(place) = server.place_of(backend)
        {
            return server.pick_at(place).ok_or(DropReason::NoBackend);
        }
        let table = server.table.load();
        let chosen = match server.method {
            BalanceMethod::Maglev => server.by_hash(&table, self.hash(client, !stays)),
            BalanceMethod::SourceAddress => server.by_hash(&table, self.hash(client, false)),
            BalanceMethod::LeastConnections => server.least(&table, now_ns, random),
            BalanceMethod::RoundRobin => server.in_turn(&table),
        };
        let place = chosen.or_else(|| server.any(&table, random)).ok_or_else(|| server.refusal(&table))?;
        server.pick_at(place).ok_or(DropReason::NoBackend)
    }

    /// A flow to this backend is made: takes a place at the server and the backend. Give it back with
    /// [`Balancer::closed`] when the flow is removed, only if this returned `Ok`.
    ///
    /// # Errors
    /// [`DropReason::ServerFull`] when another core took the last place since [`Balancer::pick`]; nothing is
    /// counted then, and the flow must not be made. [`DropReason::NoBackend`] when there is no such server or backend.
    pub fn opened(&self, server: u16, backend: u16) -> Result<(), DropReason> {
        let opened = self.take_place(server, backend);
        if opened.is_err() {
            self.refuse(server);
        }
        opened
    }

    /// Remembers the backend of a client, where clients stay with theirs. `answered`: its flow is one that was; a flow that was
    /// only made may be anybody's who writes the client's address, and makes others forgotten no more than that.
    pub fn remember(&self, backend: u16, client: IpAddr, answered: bool, now_ns: u64) {
        let home = self.backend(backend).and_then(|entry| entry.home);
        if let Some(server) = home.and_then(|home| self.servers.get(usize::from(home)))
            && server.affinity == Affinity::SourceAddress
        {
            server.state.clients.remember(self.key, client, backend, answered, now_ns);
        }
    }

    fn take_place(&self, server: u16, backend: u16) -> Result<(), DropReason> {
        let server = self.servers.get(usize::from(server)).ok_or(DropReason::NoBackend)?;
        let entry = self.backend(backend).ok_or(DropReason::NoBackend)?;
        if !server.state.count.open(server.connections_max) {
            return Err(DropReason::ServerFull);
        }
        if !entry.state.count.open(entry.connections_max) {
            server.state.count.take_back();
            return Err(DropReason::ServerFull);
        }
        Ok(())
    }

    fn refuse(&self, server: u16) {
        if let Some(server) = self.servers.get(usize::from(server)) {
            server.state.refused.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The connection of a flow to this backend is over (`true`), or goes on after it was over. What is over does not
    /// count as live: neither for least connections nor for limits.
    #[cold]
    pub fn set_over(&self, backend: u16, over: bool) {
        let Some(entry) = self.backend(backend) else { return };
        for count in [&entry.state.count, &entry.state.server.count] {
            if over {
                count.end();
            } else {
                count.resume();
            }
        }
    }

    /// A flow to this backend is removed; `was_over`: what [`Balancer::set_over`] said last of it. The flow may have been
    /// opened under an earlier balancer.
    pub fn closed(&self, backend: u16, was_over: bool) {
        if let Some(entry) = self.backend(backend) {
            entry.state.count.close(was_over);
            entry.state.server.count.close(was_over);
        }
    }

    /// A monitor's verdict. No new connection goes to a backend that is down from then on; one that comes up again gets
    /// some at once, or after the next [`Balancer::tick`] when a hashing server has many backends. Returns whether it
    /// changed anything.
    pub fn set_health(&self, backend: u16, up: bool, now_ns: u64) -> bool {
        self.now_ns.fetch_max(now_ns, Ordering::Relaxed);
        let changed = self.change(backend, |entry| entry.state.set_up(up, now_ns));
        if changed && !up {
            self.deaths.fetch_add(1, Ordering::Release);
        }
        changed
    }

    /// Whether a backend that is down does not answer at all, see [`ResetOnDown::Silent`]. To be told before
    /// [`Balancer::set_health`] where both change.
    pub fn set_silent(&self, backend: u16, silent: bool) {
        if self.backend(backend).is_some_and(|entry| entry.state.set_silent(silent)) {
            self.deaths.fetch_add(1, Ordering::Release);
        }
    }

    /// How often a backend went down, fell silent, or had drained as long as it may. Who sees it change goes through the flows that it has by then: none
    /// that is opened later goes to a backend of that time ([`Balancer::fate`]).
    #[inline]
    #[must_use]
    pub fn deaths(&self) -> u64 {
        self.deaths.load(Ordering::Acquire)
    }

    /// Fate of the flows of a backend.
    #[must_use]
    pub fn fate(&self, backend: u16) -> Fate {
        let Some(entry) = self.backend(backend) else { return Fate::Stay };
        if entry.state.is_drained_out() {
            return Fate::Reset;
        }
        if entry.state.is_up() {
            return Fate::Stay;
        }
        let home = entry.home.and_then(|home| self.servers.get(usize::from(home)));
        match home.map_or(ResetOnDown::Silent, |home| home.reset_on_down) {
            ResetOnDown::Always => Fate::Reset,
            ResetOnDown::Silent if entry.state.is_silent() => Fate::Reset,
            ResetOnDown::Silent | ResetOnDown::Never => Fate::Move,
        }
    }

    /// Changes a backend's weight, 0–1,000, until the configuration names another one; 0 drains it. Returns whether
    /// it changed anything.
    pub fn set_weight(&self, backend: u16, weight: u16) -> bool {
        self.change(backend, |entry| entry.state.set_weight(entry.weight, weight.min(WEIGHT_MAX)))
    }

    /// Begins or ends draining: no new connections, live ones stay. Returns whether it changed anything.
    pub fn drain(&self, backend: u16, draining: bool) -> bool {
        self.change(backend, |entry| entry.state.set_draining(draining))
    }

    /// Control calls this about every second: slow starts and drains go on, large tables of hashing methods follow health and
    /// weights, and so do tables that missed a change because a reload came in between.
    pub fn tick(&self, now_ns: u64) {
        self.now_ns.fetch_max(now_ns, Ordering::Relaxed);
        for server in &self.servers {
            server.start_waiting(now_ns);
            server.refresh(now_ns);
            if server.follow_drains(now_ns) {
                self.deaths.fetch_add(1, Ordering::Release);
            }
        }
    }

    /// The listen endpoints of the virtual servers that have this backend and keep the client's source as it is
    /// ([`NatMode::None`] with [`DeliveryMode::Nat`]). A reply from there belongs to the core that owns the flow from
    /// the client to one of them; earlier listen endpoints are included as long as flows may use them.
    #[inline]
    #[must_use]
    pub fn listen_of(&self, protocol: u8, backend_endpoint: SocketAddr) -> &[SocketAddr] {
        self.listens.get(&Endpoint::new(protocol, backend_endpoint)).map_or(&[], Vec::as_slice)
    }

    /// Name of a server.
    #[must_use]
    pub fn server_name(&self, server: u16) -> Option<&str> {
        self.servers.get(usize::from(server)).map(|server| server.state.name.as_str())
    }

    /// Every configured backend, server by server in the order of the configuration.
    pub fn backends(&self) -> impl Iterator<Item = BackendRef<'_>> {
        self.servers.iter().flat_map(|server| {
            server.backends.iter().map(|backend| BackendRef {
                id: backend.state.id,
                server: &server.state.name,
                address: backend.state.address,
            })
        })
    }

    /// Name of the server and address of a backend, also of a removed one that still has flows.
    #[must_use]
    pub fn backend_ref(&self, backend: u16) -> Option<BackendRef<'_>> {
        let entry = self.backend(backend)?;
        Some(BackendRef { id: backend, server: &entry.state.server.name, address: entry.state.address })
    }

    /// Whether there is no virtual server.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.servers.is_empty()
    }

    /// Counts, health and weights, in the order of the configuration.
    #[must_use]
    pub fn status(&self) -> Vec<ServerStatus> {
        let now_ns = self.now_ns.load(Ordering::Relaxed);
        self.servers.iter().map(|server| status::of(server, now_ns)).collect()
    }

    fn backend(&self, id: u16) -> Option<&Backend> {
        self.backends.get(usize::from(id))?.as_ref()
    }

    fn change(&self, id: u16, change: impl FnOnce(&Backend) -> bool) -> bool {
        let Some(entry) = self.backend(id) else { return false };
        let changed = change(entry);
        if changed && let Some(server) = entry.home.and_then(|home| self.servers.get(usize::from(home))) {
            server.refresh_if_cheap(self.now_ns.load(Ordering::Relaxed));
        }
        changed
    }

    fn hash(&self, client: &FlowKey, with_port: bool) -> u64 {
        table::hash_client(self.key, client.src, if with_port { client.src_port } else { 0 })
    }
}

/// Largest weight of a backend.
pub const WEIGHT_MAX: u16 = 1_000;
