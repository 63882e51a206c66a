//! How a flow gets its source, rule by rule.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use packet::drop_reason::DropReason;
use packet::flow::FlowKey;
use packet::icmp::is_icmp;
use steering::port_solver::Outgoing;
use steering::symmetric::{FlowHasher, MIX_MULTIPLIER, core_bits};

use super::lease::{AddressBlocks, AutomaticWish, Snapshot};
use super::limits::{Automatic, ClientKey};
use super::log::{NatEvent, NatEventKind};
use super::mapping::{InsideKey, MappingWish, OutsideKey, mapping_core};
use super::policy::{Preference, Rule};
use super::pools::{Ask, Chosen, Like, PoolKey, Reach};
use super::port_set::{ALL_BLOCKS, Blocks, block_of};
use super::{BindRequest, Binding, Followed, Nat, is_translated, remote};

/// Addresses tried for a protocol without ports.
const ADDRESSES_MAX: usize = 64;

/// Addresses whose other tables are tried when every own table is exhausted.
const OVERFLOW_ADDRESSES_MAX: usize = 4;

/// Where a client's outside endpoint may be.
enum Candidates<'a> {
    /// Blocks that a lease gives it, and the pool of the rule.
    Held(&'a [AddressBlocks], &'a [IpAddr]),
    /// Blocks of its own.
    Automatic(AddressBlocks),
    /// Any address of the pool, from a place on, and all that is not leased.
    Pool(&'a [IpAddr], usize, &'a Snapshot),
}

impl Candidates<'_> {
    fn count(&self) -> usize {
        match self {
            Self::Held(held, _) => held.len(),
            Self::Automatic(_) => 1,
            Self::Pool(pool, ..) => pool.len(),
        }
    }

    /// Address and blocks; no blocks: not this one.
    fn at(&self, place: usize) -> Option<AddressBlocks> {
        match self {
            Self::Held(held, pool) => {
                let &(address, blocks) = held.get(place)?;
                let usable = pool.contains(&address);
                Some((address, if usable { blocks } else { 0 }))
            }
            Self::Automatic(blocks) => (place == 0).then_some(*blocks),
            Self::Pool(pool, start, snapshot) => {
                let address = *pool.get((start + place).checked_rem(pool.len())?)?;
                Some((address, !snapshot.closed(address)))
            }
        }
    }

    /// The log has a line for the block.
    fn is_quiet(&self) -> bool {
        !matches!(self, Self::Pool(..))
    }
}

impl Rule {
    /// The sets of ports that a flow may get one of, in order: who uses a port below 1,024 gets such a one while there are
    /// any, since servers may want it (RFC 4787 REQ-3 a); then even or odd ones, if that is wanted (REQ-4).
    fn sets_for(&self, request: &BindRequest) -> [Option<usize>; 3] {
        let client = &request.client;
        let low = uses_low_port(client).then_some(self.low_ports).flatten();
        let same = match self.preference {
            Preference::Parity([even, _]) if client.src_port & 1 == 0 => Some(even),
            Preference::Parity([_, odd]) => Some(odd),
            Preference::Any | Preference::Own => None,
        };
        [low, same.filter(|_| !is_icmp(client.protocol)), Some(self.ports)]
    }

    /// The client's port, where it shall have the same outside.
    fn like(&self, request: &BindRequest) -> Option<Like> {
        let wanted = self.preserves() || uses_low_port(&request.client);
        let port = request.client.src_port;
        let has_port = !is_icmp(request.client.protocol) && port != 0;
        (wanted && has_port).then_some(Like { port, set: self.own_ports, beside_tables: self.preserves() })
    }
}

/// Whether a client uses a port below 1,024; queries of ICMP have no such ports.
pub(crate) fn uses_low_port(client: &FlowKey) -> bool {
    is_translated(client.protocol) && !is_icmp(client.protocol) && (1..1024).contains(&client.src_port)
}

/// Where in a pool of so many addresses a client begins that has none yet: all cores agree on it.
pub(crate) fn first_of_pool(hasher: &FlowHasher, (tenant, client): ClientKey, addresses: usize) -> usize {
    let nowhere = match client {
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    let key = FlowKey { src: client, dst: nowhere, src_port: 0, dst_port: 0, protocol: 0 };
    let hash = hasher.hash(&key, tenant).wrapping_mul(MIX_MULTIPLIER);
    ((u64::from(hash) * addresses as u64) >> 32) as usize
}

impl Nat {
    /// C4, and C3 for protocols without ports: nothing changes.
    pub(super) fn keep(&self, followed: &Followed, request: &BindRequest) -> Binding {
        let (source, port) = (request.client.src, request.client.sender_port());
        let hash = followed.hasher.hash(&request.client.reversed(), request.out_tenant);
        let replies_elsewhere = !self.pools.comes_here(hash);
        Binding {
            source,
            port,
            table: 0,
            mapped: false,
            kept: true,
            own_port: false,
            counted: false,
            replies_elsewhere,
        }
    }

    /// C3: a port of the client's own address.
    pub(super) fn choose_port(
        &mut self,
        now_ns: u64,
        followed: &Followed,
        rule: &Rule,
        request: &BindRequest,
        in_use: &dyn Fn(&FlowKey) -> bool,
    ) -> Result<Binding, DropReason> {
        let own = request.client.src;
        let pooled = followed.policy.is_pool(own);
        let key = if pooled { PoolKey::Address(own) } else { PoolKey::Kept(own.is_ipv6()) };
        let chosen = rule.sets_for(request).into_iter().flatten().find_map(|set| {
            let ask = ask(followed, rule, request, key, (set, own, ALL_BLOCKS));
            Reach::ALL.into_iter().find_map(|reach| self.pools.choose(&ask, reach, in_use))
        });
        let chosen = chosen.ok_or(DropReason::NatPortsExhausted)?;
        let binding = self.chosen(followed, request, own, chosen);
        self.events.push(opened(now_ns, request, &binding));
        Ok(binding)
    }

    /// C2: an address of the pool, and a port.
    pub(super) fn translate(
        &mut self,
        now_ns: u64,
        followed: &Followed,
        rule: &Rule,
        request: &BindRequest,
        in_use: &dyn Fn(&FlowKey) -> bool,
    ) -> Result<Binding, DropReason> {
        let (client_key, client) = ((request.tenant, request.client.src), request.client.src);
        let pool = rule.pool_for(request);
        if pool.is_empty() {
            return Err(DropReason::NatNoAddress);
        }
        if let Some(binding) = self.by_forward(followed, rule, request, None, in_use) {
            self.events.push(opened(now_ns, request, &binding));
            return Ok(binding);
        }
        let snapshot = followed.policy.leases().snapshot();
        let held = snapshot.held_by(request.tenant, client);
        let held = held.filter(|held| held.iter().any(|(address, _)| pool.contains(address)));
        let candidates = match held {
            Some(held) => Candidates::Held(held, pool),
            None if rule.blocks_per_client > 0 => {
                let own = self.automatic(now_ns, followed, rule, request);
                let own = own.ok_or(DropReason::NatPortsExhausted)?;
                Candidates::Automatic((own.address, own.blocks))
            }
            None => Candidates::Pool(pool, self.first_address(followed, &client_key, pool), &snapshot),
        };
        let binding = if !is_translated(request.client.protocol) {
            self.by_address(followed, &candidates, request, in_use).ok_or(DropReason::NatUnsupported)?
        } else if rule.independent {
            let mapped = self.map(now_ns, followed, rule, &candidates, request);
            mapped.ok_or(DropReason::NatPortsExhausted)?
        } else {
            let chosen = self.dependent(followed, rule, &candidates, request, in_use);
            chosen.ok_or(DropReason::NatPortsExhausted)?
        };
        if !candidates.is_quiet() && !binding.mapped {
            self.events.push(opened(now_ns, request, &binding));
        }
        Ok(binding)
    }

    /// The endpoint of a forward that leads to the client's own; in no table, since it is nobody else's. `None`: there is none, it is
    /// not the `earlier` one, or it is not this core's.
    pub(super) fn by_forward(
        &mut self,
        followed: &Followed,
        rule: &Rule,
        request: &BindRequest,
        earlier: Option<SocketAddr>,
        in_use: &dyn Fn(&FlowKey) -> bool,
    ) -> Option<Binding> {
        // The next hop of an earlier one was in the network of its address.
        let next = earlier.map(|earlier| earlier.ip()).or(request.next);
        let outside = followed.policy.forwarded_from(rule, &request.client, request.tenant, next)?;
        let binding = self.bound(followed, request, outside.ip(), (outside.port(), 0));
        if earlier.is_some_and(|earlier| earlier != outside) || earlier.is_none() && binding.replies_elsewhere
        {
            return None;
        }
        let key = PoolKey::Address(outside.ip());
        let ask = ask(followed, rule, request, key, (rule.ports, outside.ip(), ALL_BLOCKS));
        let taken = self.pools.take_beside(&ask, outside.port(), in_use);
        taken.then_some(Binding { own_port: true, ..binding })
    }

    /// An address and a port by the port tables: first each address's own table, then others.
    fn dependent(
        &mut self,
        followed: &Followed,
        rule: &Rule,
        candidates: &Candidates<'_>,
        request: &BindRequest,
        in_use: &dyn Fn(&FlowKey) -> bool,
    ) -> Option<Binding> {
        let mut choose = |set: usize, reach: Reach| {
            let addresses = match reach {
                Reach::Home | Reach::Rested => candidates.count(),
                Reach::Others => candidates.count().min(OVERFLOW_ADDRESSES_MAX),
            };
            (0..addresses).find_map(|place| {
                let (address, blocks) = candidates.at(place)?;
                let ask = ask(followed, rule, request, PoolKey::Address(address), (set, address, blocks));
                self.pools.choose(&ask, reach, in_use).map(|chosen| (address, chosen))
            })
        };
        let sets = rule.sets_for(request).into_iter().flatten();
        let mut chosen =
            sets.flat_map(|set| Reach::ALL.map(|reach| (set, reach))).map(|(set, reach)| choose(set, reach));
        let chosen = chosen.find_map(|chosen| chosen);
        let (address, chosen) = chosen?;
        Some(self.chosen(followed, request, address, chosen))
    }

    /// The client endpoint's mapping, new if need be.
    fn map(
        &mut self,
        now_ns: u64,
        followed: &Followed,
        rule: &Rule,
        candidates: &Candidates<'_>,
        request: &BindRequest,
    ) -> Option<Binding> {
        let (key, protocol) = (&request.client, request.client.protocol);
        let pool = rule.pool_for(request);
        let inside: InsideKey = (request.tenant, protocol, key.src, key.sender_port(), *pool.first()?);
        let known = self.mappings.of_inside(&inside).map(|entry| entry.outside);
        if let Some(outside) = known
            && outside.0 == request.out_tenant
            && pool.contains(&outside.2)
            && !followed.is_held(protocol, outside.2, outside.3)
            && self.mappings.join(&outside).is_some()
        {
            return Some(self.mapped(followed, request, &outside));
        }
        let own = rule.like(request).and_then(|like| Some((like, followed.policy.port_set(rule.own_ports)?)));
        let port_of = |nat: &mut Self, set: usize, place: usize| {
            let (address, blocks) = candidates.at(place)?;
            if let Some((like, allowed)) = own
                && allowed.contains(like.port)
                && blocks >> block_of(like.port) & 1 == 1
                && mapping_core(address, like.port, nat.cores) == nat.core
                && nat.mappings.is_free(request.out_tenant, protocol, address, like.port)
                && !followed.is_opened(protocol, address, like.port)
            {
                return Some((request.out_tenant, protocol, address, like.port));
            }
            let allowed = followed.policy.port_set(set)?;
            let opened = followed.policy.is_shared(address).then_some(&*followed.opened);
            let wish = MappingWish {
                allowed,
                opened,
                allowed_id: u64::from(nat.generation) << 32 | set as u64,
                blocks: blocks & allowed.some_blocks(),
                like: (!is_icmp(protocol)).then_some(key.src_port),
                random: request.random,
            };
            let port = nat.mappings.free_port(
                (request.out_tenant, protocol, address),
                &wish,
                &mut nat.mapping_words,
            )?;
            Some((request.out_tenant, protocol, address, port))
        };
        let mut sets = rule.sets_for(request).into_iter().flatten();
        let outside: OutsideKey =
            sets.find_map(|set| (0..candidates.count()).find_map(|place| port_of(self, set, place)))?;
        let entry = self.mappings.insert(inside, outside, candidates.is_quiet());
        if !entry.quiet {
            self.events.push(super::mapping_event(now_ns, NatEventKind::Opened, &entry));
        }
        Some(self.mapped(followed, request, &outside))
    }

    pub(super) fn mapped(
        &mut self,
        followed: &Followed,
        request: &BindRequest,
        outside: &OutsideKey,
    ) -> Binding {
        if let Some(home) = request.home {
            self.mappings.settle(outside, home);
        }
        let (_, _, address, port) = *outside;
        Binding { mapped: true, ..self.bound(followed, request, address, (port, 0)) }
    }

    /// A protocol without ports: the first address whose replies nobody else expects.
    fn by_address(
        &self,
        followed: &Followed,
        candidates: &Candidates<'_>,
        request: &BindRequest,
        in_use: &dyn Fn(&FlowKey) -> bool,
    ) -> Option<Binding> {
        let port = request.client.src_port;
        let free = |place: usize| {
            let (address, blocks) = candidates.at(place)?;
            let reply = FlowKey { src: address, ..request.client }.reversed();
            let of_host = followed.policy.is_hosts_tunnel(reply.protocol, address, reply.src);
            (blocks != 0 && !of_host && !in_use(&reply)).then_some(address)
        };
        let address = (0..candidates.count().min(ADDRESSES_MAX)).find_map(free)?;
        Some(self.bound(followed, request, address, (port, 0)))
    }

    /// The blocks that this client has by the rule, granted now if it has none.
    fn automatic(
        &mut self,
        now_ns: u64,
        followed: &Followed,
        rule: &Rule,
        request: &BindRequest,
    ) -> Option<Automatic> {
        let key: ClientKey = (request.tenant, request.client.src);
        let pool = rule.pool_for(request);
        let zone = *pool.first()?;
        let start = self.first_address(followed, &key, pool);
        let client = self.clients.find(&key)?;
        let known = client.automatic.iter().position(|held| held.zone == zone);
        if let Some(place) = known {
            let held = *client.automatic.get(place)?;
            if pool.contains(&held.address) {
                return Some(held);
            }
            // The address left the pool.
            client.automatic.swap_remove(place);
            let events = followed.policy.leases().leave(now_ns, key, &held);
            events.into_iter().for_each(|event| self.events.push(event));
        }
        let wish = AutomaticWish {
            tenant: request.tenant,
            client: key.1,
            addresses: pool,
            start,
            whole: followed.policy.ports(rule)?.whole_blocks(),
            count: rule.blocks_per_client,
            random: request.random >> 20,
        };
        let (held, events) = followed.policy.leases().join(now_ns, &wish)?;
        events.into_iter().for_each(|event| self.events.push(event));
        self.clients.find(&key)?.automatic.push(held);
        Some(held)
    }

    /// Where in the pool a client begins: at the address that it has, or at one that all cores agree on.
    fn first_address(&mut self, followed: &Followed, client: &ClientKey, pool: &[IpAddr]) -> usize {
        if pool.len() < 2 {
            return 0;
        }
        let paired = self.clients.find(client).map(|client| client.paired).unwrap_or_default();
        let known = paired.iter().flatten().find_map(|had| pool.iter().position(|address| address == had));
        known.unwrap_or_else(|| first_of_pool(&followed.hasher, *client, pool.len()))
    }

    pub(super) fn chosen(
        &self,
        followed: &Followed,
        request: &BindRequest,
        source: IpAddr,
        chosen: Chosen,
    ) -> Binding {
        let Chosen { port, table, anywhere, own_port } = chosen;
        if anywhere {
            return Binding { own_port, ..self.bound(followed, request, source, (port, table)) };
        }
        let (mapped, kept, counted, replies_elsewhere) = (false, false, false, false);
        Binding { source, port, table, mapped, kept, own_port, counted, replies_elsewhere }
    }

    pub(super) fn bound(
        &self,
        followed: &Followed,
        request: &BindRequest,
        source: IpAddr,
        (port, table): (u16, u8),
    ) -> Binding {
        let reply = if is_translated(request.client.protocol) {
            leaving(request, source).with_port(port).reversed()
        } else {
            FlowKey { src: source, ..request.client }.reversed()
        };
        let hash = followed.hasher.hash(&reply, request.out_tenant);
        let replies_elsewhere = !self.pools.comes_here(hash);
        Binding {
            source,
            port,
            table,
            mapped: false,
            kept: false,
            own_port: false,
            counted: false,
            replies_elsewhere,
        }
    }
}

pub(super) fn ask<'a>(
    followed: &'a Followed,
    rule: &Rule,
    request: &BindRequest,
    key: PoolKey,
    (set, own, blocks): (usize, IpAddr, Blocks),
) -> Ask<'a> {
    Ask {
        key,
        flow: leaving(request, own),
        set,
        like: rule.like(request),
        tables: rule.tables,
        blocks,
        avoids: !followed.opened.is_empty() && followed.policy.is_shared(own),
        bucket: core_bits(followed.hasher.hash(&request.client, request.tenant)),
        random: request.random,
        hasher: &followed.hasher,
    }
}

/// The flow as it leaves from `own`, without its port.
fn leaving(request: &BindRequest, own: IpAddr) -> Outgoing {
    let remote = remote(&request.client);
    let protocol = request.client.protocol;
    Outgoing { own, remote: remote.ip(), remote_port: remote.port(), protocol, tenant: request.out_tenant }
}

pub(super) fn opened(at_ns: u64, request: &BindRequest, binding: &Binding) -> NatEvent {
    NatEvent {
        at_ns,
        kind: NatEventKind::Opened,
        tenant: request.tenant,
        protocol: request.client.protocol,
        inside: SocketAddr::new(request.client.src, request.client.sender_port()),
        outside: SocketAddr::new(binding.source, binding.port),
        ports: 1,
        remote: Some(remote(&request.client)),
    }
}
