//! Source translation (rows C2, C3, R1): outside addresses and ports for flows, per core, without I/O.
//!
//! [`NatPolicy`] is the operator's wish, compiled and shared. [`Nat`] is one core's state: [`Nat::bind`] gives a new
//! flow its outside endpoint, [`Nat::release`] takes it back. Three kinds of mapping:
//!
//! * *endpoint-dependent* (C2, C3): `pools` finds a port whose replies hash to this core, by tables laid out for it
//!   (`ports`, `classes`);
//! * *endpoint-independent* ([`mapping`]): one outside endpoint for a client's endpoint, known to all remotes;
//! * *by address only*: protocols without ports.
//!
//! [`lease`] gives blocks of ports to tenants, prefixes and clients; [`limits`] counts clients' flows; [`log`] says
//! who had which endpoint and when.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use packet::drop_reason::DropReason;
use packet::flow::FlowKey;
use packet::icmp::is_icmp;
use packet::ip::{PROTOCOL_AH, PROTOCOL_SCTP, PROTOCOL_TCP, PROTOCOL_UDP};
use steering::port_solver::{Outgoing, ReplyPorts};
use steering::symmetric::FlowHasher;
use steering::table::BucketTable;

use crate::flow::{Record, flags};
use crate::hash::SecretState;
use crate::held_ports::HeldPorts;
use crate::random::Random;
use crate::spec::NatMode;

mod bind;
mod classes;
pub mod lease;
pub mod limits;
pub mod log;
pub mod mapping;
mod networks;
mod policy;
mod pools;
pub mod port_set;
mod ports;
mod rebind;
#[cfg(test)]
mod tests;

pub(crate) use bind::{first_of_pool, uses_low_port};
pub use log::{NatEvent, NatEventKind};
pub use mapping::mapping_core;
pub use policy::{NatClient, NatPolicy};
pub use rebind::{Earlier, EarlierMapping};

use limits::{CLIENTS_MAX, ClientKey, Clients, share_of_core, share_of_strangers};
use log::EventQueue;
use mapping::{MAPPINGS_MAX, MappingEntry, Mappings, OutsideKey};
use pools::{OwnBuckets, Pools};
use port_set::block_of;

/// A flow that is to be given a source.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BindRequest {
    /// The NAT rule: [`NatPolicy::rule_for`].
    pub rule: u16,
    /// The flow in the direction of its first packet, with the final destination.
    pub client: FlowKey,
    /// Tenant of the client.
    pub tenant: u16,
    /// Tenant of the interface by which replies come in.
    pub out_tenant: u16,
    /// Random bits, new for each flow.
    pub random: u64,
    /// Bucket of the client's endpoint ([`crate::steer::endpoint_bucket`]), where the flow is steered by that.
    pub home: Option<u16>,
    /// The router or neighbor that the flow goes to. `None`: not known, or no matter.
    pub next: Option<IpAddr>,
}

/// The source that a flow was given.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Binding {
    /// Outside address.
    pub source: IpAddr,
    /// Outside port, or id of an ICMP query; the client's own for protocols that have none.
    pub port: u16,
    /// For [`Record::port_table`].
    pub table: u8,
    /// The port belongs to an endpoint-independent mapping: [`flags::MAPPED`].
    pub mapped: bool,
    /// Address and port are the client's own (rule of mode "none"): no [`flags::SOURCE_NAT`].
    pub kept: bool,
    /// The port is the client's own and in no table: [`flags::OWN_PORT`].
    pub own_port: bool,
    /// It counts as one of the client's flows: [`flags::COUNTED`].
    pub counted: bool,
    /// The hash names another core for the replies: they come by the ring.
    pub replies_elsewhere: bool,
}

/// Who stands behind an endpoint-independent outside endpoint.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Inside {
    /// Tenant of the client.
    pub tenant: u16,
    /// The client's address.
    pub address: IpAddr,
    /// Its port or query id.
    pub port: u16,
}

/// Ports held in one table.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
pub struct TableStatus {
    /// Outside address; `None`: the clients' own (row C3).
    pub address: Option<IpAddr>,
    /// Tenant of the outer interface.
    pub tenant: u16,
    /// Number of the table, 0–255.
    pub table: u8,
    /// Flows whose outside address is above the remote one; ICMP has none of them.
    pub high: bool,
    /// Ports held.
    pub held: u32,
}

/// Status of one core's NAT: what it holds.
#[derive(Clone, PartialEq, Eq, Debug, Default, serde::Serialize)]
pub struct NatStatus {
    /// Tables that hold a port, by address, tenant, number, slot.
    pub tables: Vec<TableStatus>,
    /// Ports held by flows.
    pub ports_held: u64,
    /// Endpoint-independent mappings.
    pub mappings: u64,
    /// Clients remembered.
    pub clients: u64,
    /// Words of port tables read by searches.
    pub words_read: u64,
    /// Look-ups in the flow table that searches needed.
    pub flow_checks: u64,
    /// Log events for which there was no room.
    pub events_lost: u64,
    /// Ports given back that were not held: a fault.
    pub not_held: u64,
}

/// Whether ports (or query ids) of a protocol are translated: TCP, UDP, SCTP, ICMP queries.
#[must_use]
pub const fn is_translated(protocol: u8) -> bool {
    matches!(protocol, PROTOCOL_TCP | PROTOCOL_UDP | PROTOCOL_SCTP) || is_icmp(protocol)
}

/// Policy and hasher, which all cores share. Behind a counter of this core's own: another core's would travel between
/// their caches.
#[derive(Debug)]
struct Followed {
    policy: Arc<NatPolicy>,
    hasher: Arc<FlowHasher>,
    /// Ports of the host's programs: as the policy was made, and opened since.
    held: Arc<HeldPorts>,
    opened: Arc<HeldPorts>,
}

impl Followed {
    /// Whether a program of the host has had this port of an address that is shared with it, when the policy was made.
    fn is_held(&self, protocol: u8, address: IpAddr, port: u16) -> bool {
        self.policy.is_shared(address) && self.held.has(protocol, address, port)
    }

    /// Whether a program of the host has opened this port since then.
    fn is_opened(&self, protocol: u8, address: IpAddr, port: u16) -> bool {
        !self.opened.is_empty() && self.policy.is_shared(address) && self.opened.has(protocol, address, port)
    }
}

/// One core's NAT.
#[derive(Debug)]
pub struct Nat {
    core: u8,
    cores: u8,
    followed: Option<Arc<Followed>>,
    /// How often [`Nat::follow`] was called.
    generation: u32,
    pools: Pools,
    clients: Clients,
    mappings: Mappings,
    mapping_words: u64,
    events: EventQueue,
}

impl Nat {
    /// An empty one for core `core` of `cores`. It serves nothing until [`Self::follow`].
    #[must_use]
    pub fn new(core: u8, cores: u8, random: &mut Random) -> Self {
        Self {
            core,
            cores,
            followed: None,
            generation: 0,
            pools: Pools::new(core, cores, random),
            clients: Clients::new(SecretState::draw(random), CLIENTS_MAX),
            mappings: Mappings::new(core, cores, SecretState::draw(random), MAPPINGS_MAX),
            mapping_words: 0,
            events: EventQueue::default(),
        }
    }

    /// Follows a new policy or owner table. Ports held stay held. `solvers` are those of `hasher` for 7 core bits and
    /// blocks of 1,024 ports; with others no port is found.
    ///
    /// A bucket with a history gives no new ports, since its earlier owners may have flows in it; if the core has no
    /// other, its ports are checked against this core's flow table, which is all that can be done.
    pub fn follow(
        &mut self,
        policy: &Arc<NatPolicy>,
        table: &BucketTable,
        hasher: &Arc<FlowHasher>,
        solvers: &Arc<ReplyPorts>,
    ) {
        let own = own_buckets(table, self.core);
        self.pools.follow(policy.port_sets(), own, hasher, solvers);
        let (policy, hasher) = (Arc::clone(policy), Arc::clone(hasher));
        let (held, opened) = match &self.followed {
            Some(followed) => (Arc::clone(&followed.held), Arc::clone(&followed.opened)),
            None => Default::default(),
        };
        self.followed = Some(Arc::new(Followed { policy, hasher, held, opened }));
        self.generation = self.generation.wrapping_add(1);
    }

    /// Follows the ports that programs of the host hold: `held` as the policy says, which gives them to nobody, `opened` since.
    /// Neither are given out from now on where an address is shared with the host; mappings lose those of the policy.
    pub fn follow_held(&mut self, held: &Arc<HeldPorts>, opened: &Arc<HeldPorts>) {
        let Some(followed) = &self.followed else { return };
        let (policy, hasher) = (Arc::clone(&followed.policy), Arc::clone(&followed.hasher));
        let (held, opened) = (Arc::clone(held), Arc::clone(opened));
        self.followed = Some(Arc::new(Followed { policy, hasher, held, opened }));
    }

    /// Whether a program of the host has this port of an address that it shares with flows.
    #[must_use]
    pub fn is_of_host(&self, protocol: u8, address: IpAddr, port: u16) -> bool {
        let has = |followed: &Arc<Followed>| {
            followed.is_held(protocol, address, port) || followed.is_opened(protocol, address, port)
        };
        self.followed.as_ref().is_some_and(has)
    }

    /// Gives a new flow its source. `in_use` says whether a reply key (remote → outside endpoint, tenant
    /// `out_tenant`) is in the flow table; it is asked only where the port tables cannot know.
    ///
    /// # Errors
    /// [`DropReason::FlowsPerClient`], [`DropReason::NatPortsExhausted`], [`DropReason::NatNoAddress`] (the interface has
    /// none), [`DropReason::NatUnsupported`] (an unknown rule, a mix of families, a second flow of a protocol without
    /// ports), [`DropReason::FlowTableFull`] (no room for one more client).
    pub fn bind(
        &mut self,
        now_ns: u64,
        request: &BindRequest,
        in_use: impl Fn(&FlowKey) -> bool,
    ) -> Result<Binding, DropReason> {
        self.tick(now_ns);
        let followed = Arc::clone(self.followed.as_ref().ok_or(DropReason::NatPortsExhausted)?);
        let in_use = |reply: &FlowKey| {
            in_use(reply) || followed.is_opened(reply.protocol, reply.dst, reply.reversed().sender_port())
        };
        let rule = followed.policy.rule(request.rule).ok_or(DropReason::NatUnsupported)?;
        // AH signs the addresses: its receiver would refuse what has others. A flow would only take the answers to the host's own.
        let signed = rule.mode == NatMode::AddressAndPort && request.client.protocol == PROTOCOL_AH;
        if signed || request.client.src.is_ipv4() != request.client.dst.is_ipv4() {
            return Err(DropReason::NatUnsupported);
        }
        let client_key = (request.tenant, request.client.src);
        let tracks = rule.tracks_clients(request.client.src);
        if tracks {
            let flows_max = share_of_core(rule.flows_per_client_max, self.cores);
            let client = self.clients.enter(now_ns, client_key).ok_or(DropReason::FlowTableFull)?;
            if client.flows >= flows_max {
                return Err(DropReason::FlowsPerClient);
            }
        }
        let binding = match rule.mode {
            NatMode::PortOnly if is_translated(request.client.protocol) => {
                self.choose_port(now_ns, &followed, rule, request, &in_use)?
            }
            NatMode::None | NatMode::PortOnly => self.keep(&followed, request),
            NatMode::AddressAndPort => self.translate(now_ns, &followed, rule, request, &in_use)?,
        };
        if tracks {
            let paired = (rule.mode == NatMode::AddressAndPort).then_some(binding.source);
            self.clients.opened(&client_key, paired);
        }
        Ok(Binding { counted: tracks, ..binding })
    }

    /// Takes back what [`Self::bind`] or [`Self::join`] gave to a flow that ended: whatever the policy says now.
    ///
    /// `client`: the key of the flow's first packet as the NAT saw it (for `bind` that of the request); `tenant`: its
    /// tenant. `reply`: the key of replies as they arrive (for `bind`: remote → outside endpoint); `out_tenant`: the
    /// tenant in which they arrive. Of the record the flags and the port table count.
    pub fn release(
        &mut self,
        now_ns: u64,
        reply: &FlowKey,
        out_tenant: u16,
        record: &Record,
        client: &FlowKey,
        tenant: u16,
    ) {
        let mapped = record.flags & flags::MAPPED != 0;
        let client_key = (tenant, client.src);
        if record.flags & flags::SOURCE_NAT == 0 && mapped {
            return self.leave_from_outside(now_ns, client, tenant);
        }
        let counted = record.flags & flags::COUNTED != 0;
        let known =
            if counted { self.clients.closed(now_ns, &client_key) } else { self.clients.known(&client_key) };
        let port = reply.reversed().sender_port();
        let quiet = known.is_some_and(|known| known.holds(reply.dst, port));
        if record.flags & flags::SOURCE_NAT == 0 {
            return;
        }
        self.pools.tick(now_ns);
        if mapped {
            self.mappings.leave(now_ns, &(out_tenant, reply.protocol, reply.dst, port));
        } else if is_translated(reply.protocol) {
            let flow = outgoing(reply, out_tenant);
            if record.flags & flags::OWN_PORT != 0 {
                self.pools.give_own(&flow);
            } else {
                // The server may be in TIME-WAIT (RFC 9293 §3.6.1).
                let rests = reply.protocol == PROTOCOL_TCP && record.flags & flags::REPLIED != 0;
                self.pools.give(&flow, port, record.port_table, rests);
            }
        }
        if !mapped && !quiet && !self.is_leased(&client_key, reply.dst, port) {
            let inside = SocketAddr::new(client.src, client.sender_port());
            let outside = SocketAddr::new(reply.dst, port);
            let remote = Some(remote(&reply.reversed()));
            let (at_ns, kind, protocol) = (now_ns, NatEventKind::Closed, reply.protocol);
            self.events.push(NatEvent { at_ns, kind, tenant, protocol, inside, outside, ports: 1, remote });
        }
    }

    /// Who stands behind the endpoint-independent outside endpoint that a packet is sent to; `tenant`: of the
    /// interface it came by. Any remote may send there, unless a program of the host has opened the port since.
    #[must_use]
    pub fn inbound(&self, key: &FlowKey, tenant: u16) -> Option<Inside> {
        let outside = outside_key(key, tenant);
        let entry = self.mappings.of_outside(&outside)?;
        if self.is_of_host(key.protocol, key.dst, outside.3) {
            return None;
        }
        let (tenant, _, address, port, _) = entry.inside;
        Some(Inside { tenant, address, port })
    }

    /// A flow begins that came in from outside to a mapping ([`Self::inbound`]): keeps the mapping until
    /// [`Self::release`] with [`flags::MAPPED`] and not [`flags::SOURCE_NAT`]. Such flows have a limit of their own
    /// ([`limits::share_of_strangers`]): they cost the client none of those that it may begin.
    ///
    /// # Errors
    /// [`DropReason::NatNoMapping`], [`DropReason::FlowsPerClient`], [`DropReason::FlowTableFull`].
    pub fn join(&mut self, now_ns: u64, key: &FlowKey, tenant: u16, rule: u16) -> Result<Inside, DropReason> {
        let inside = self.inbound(key, tenant).ok_or(DropReason::NatNoMapping)?;
        let client_key = (inside.tenant, inside.address);
        let policy = self.followed.as_ref().map(|followed| &followed.policy);
        let max = policy.and_then(|policy| policy.rule(rule)).map_or(0, |rule| rule.flows_per_client_max);
        let client = self.clients.enter(now_ns, client_key).ok_or(DropReason::FlowTableFull)?;
        if client.joined >= share_of_strangers(max, self.cores) {
            return Err(DropReason::FlowsPerClient);
        }
        self.mappings.join(&outside_key(key, tenant));
        self.clients.joined(&client_key);
        Ok(inside)
    }

    fn leave_from_outside(&mut self, now_ns: u64, first: &FlowKey, tenant: u16) {
        if let Some(entry) = self.mappings.leave(now_ns, &outside_key(first, tenant)) {
            let (tenant, _, address, ..) = entry.inside;
            self.clients.left(now_ns, &(tenant, address));
        }
    }

    /// Ends what was idle long enough: a bounded step. [`Self::bind`] does it too; call it a few times a second for
    /// quiet times.
    pub fn tick(&mut self, now_ns: u64) {
        self.pools.tick(now_ns);
        let events = &mut self.events;
        self.mappings.expire(now_ns, |entry| {
            if !entry.quiet {
                events.push(mapping_event(now_ns, NatEventKind::Closed, entry));
            }
        });
        let Some(followed) = &self.followed else { return };
        let leases = followed.policy.leases();
        self.clients.expire(now_ns, |key, client| {
            for held in &client.automatic {
                leases.leave(now_ns, key, held).into_iter().for_each(|event| events.push(event));
            }
        });
        leases.tick(now_ns);
    }

    /// Whether this core begins the flows of this client's endpoint by a rule, since it has its endpoint-independent
    /// mapping: also when the endpoint's bucket has moved.
    #[must_use]
    pub fn has_mapping(&self, key: &FlowKey, tenant: u16, rule: u16) -> bool {
        let Some(rule) = self.followed.as_ref().and_then(|followed| followed.policy.rule(rule)) else {
            return false;
        };
        rule.pools(key.src).any(|pool| {
            let inside = pool.first().map(|zone| (tenant, key.protocol, key.src, key.sender_port(), *zone));
            inside.is_some_and(|inside| self.mappings.is_home(&inside, pool))
        })
    }

    /// Endpoint-independent mappings by the bucket that leads to them; further buckets have none.
    #[must_use]
    pub fn mappings_by_bucket(&self) -> &[u32] {
        self.mappings.homes()
    }

    /// For a core that was taken away: the others have begun its clients' flows anew.
    pub fn forget_clients(&mut self) {
        self.mappings.forget_homes();
    }

    /// Ports held by flows.
    #[must_use]
    pub fn ports_held(&self) -> u64 {
        self.pools.held()
    }

    /// Takes the log events that wait: at most [`log::EVENTS_MAX`], oldest first. What found no room is counted in
    /// [`NatStatus::events_lost`].
    pub fn events(&mut self) -> impl Iterator<Item = NatEvent> + '_ {
        self.events.drain()
    }

    /// [`NatStatus::events_lost`].
    #[must_use]
    pub fn events_lost(&self) -> u64 {
        self.events.lost()
    }

    /// Whether events are kept for [`Self::events`]; they are unless told otherwise.
    pub fn set_events_wanted(&mut self, wanted: bool) {
        self.events.set_wanted(wanted);
    }

    /// How full the tables are.
    #[must_use]
    pub fn status(&self) -> NatStatus {
        let table = |(address, tenant, table, high, held)| TableStatus { address, tenant, table, high, held };
        NatStatus {
            tables: self.pools.fill().into_iter().map(table).collect(),
            ports_held: self.pools.held(),
            mappings: self.mappings.len() as u64,
            clients: self.clients.len() as u64,
            words_read: self.pools.words_read + self.mapping_words,
            flow_checks: self.pools.checks,
            events_lost: self.events.lost(),
            not_held: self.pools.not_held,
        }
    }

    /// [`NatStatus::words_read`] alone.
    #[cfg(test)]
    fn status_words(&self) -> u64 {
        self.pools.words_read + self.mapping_words
    }

    /// Whether the log knows the holder by a lease.
    fn is_leased(&self, (tenant, client): &ClientKey, address: IpAddr, port: u16) -> bool {
        let Some(followed) = &self.followed else { return false };
        let snapshot = followed.policy.leases().snapshot();
        let held = snapshot.held_by(*tenant, *client).unwrap_or_default();
        held.iter().any(|(held, blocks)| *held == address && blocks >> block_of(port) & 1 == 1)
    }
}

/// The flow that a reply answers, without its port.
fn outgoing(reply: &FlowKey, tenant: u16) -> Outgoing {
    let remote_port = if is_icmp(reply.protocol) { 0 } else { reply.src_port };
    Outgoing { own: reply.dst, remote: reply.src, remote_port, protocol: reply.protocol, tenant }
}

/// Whom a flow talks to; port 0 for ICMP.
fn remote(key: &FlowKey) -> SocketAddr {
    SocketAddr::new(key.dst, if is_icmp(key.protocol) { 0 } else { key.dst_port })
}

/// The outside endpoint that a packet from outside is sent to.
fn outside_key(key: &FlowKey, tenant: u16) -> OutsideKey {
    (tenant, key.protocol, key.dst, key.reversed().sender_port())
}

fn mapping_event(at_ns: u64, kind: NatEventKind, entry: &MappingEntry) -> NatEvent {
    let (tenant, protocol, client, client_port, _) = entry.inside;
    let (_, _, address, port) = entry.outside;
    let (inside, outside) = (SocketAddr::new(client, client_port), SocketAddr::new(address, port));
    NatEvent { at_ns, kind, tenant, protocol, inside, outside, ports: 1, remote: None }
}

fn own_buckets(table: &BucketTable, core: u8) -> OwnBuckets {
    let mut own = OwnBuckets::default();
    // Fewer buckets than classes: a bucket is several classes. More: a class is ours when all its buckets are.
    for class in 0..classes::CLASSES {
        let mut buckets = (class..table.buckets().max(class + 1)).step_by(classes::CLASSES);
        let (mut ours, mut settled) = (true, true);
        buckets.all(|bucket| {
            ours &= table.owner(bucket) == u16::from(core);
            settled &= table.chain(bucket).is_empty();
            ours
        });
        own.all |= u128::from(ours) << class;
        own.settled |= u128::from(ours && settled) << class;
    }
    own
}
