//! A source that a flow had before, in another process or on another machine: given to it again, or refused.

use std::net::{IpAddr, SocketAddr};

use packet::flow::FlowKey;
use packet::icmp::is_icmp;

use super::bind::{opened, uses_low_port};
use super::lease::AutomaticWish;
use super::limits::{Automatic, share_of_core};
use super::mapping::{InsideKey, MappingEntry, OutsideKey, mapping_core};
use super::policy::Rule;
use super::pools::PoolKey;
use super::port_set::{ALL_BLOCKS, Blocks, block_of};
use super::{BindRequest, Binding, Followed, Nat, NatEventKind, NatPolicy, is_translated, mapping_event};
use crate::handover::Refusal;
use crate::spec::NatMode;

/// Source that a flow had.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Earlier {
    /// Outside address.
    pub source: IpAddr,
    /// Outside port, or id of an ICMP query.
    pub port: u16,
    /// Both were the client's own, and are not held by anybody.
    pub kept: bool,
    /// Blocks that its client had for itself; 0: none.
    pub blocks: Blocks,
    /// Another machine had the port by lease: it is among none of this one's rules.
    pub by_lease: bool,
}

/// An endpoint-independent mapping as it was.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct EarlierMapping {
    /// The NAT rule: [`NatPolicy::rule_named`].
    pub rule: u16,
    /// IP protocol.
    pub protocol: u8,
    /// Tenant of the client.
    pub tenant: u16,
    /// The client's endpoint.
    pub inside: SocketAddr,
    /// Tenant of the outer interface.
    pub out_tenant: u16,
    /// The outside endpoint.
    pub outside: SocketAddr,
    /// Blocks that the client had for itself; 0: none.
    pub blocks: Blocks,
    /// Bucket of the client's endpoint, where flows are begun by it.
    pub home: Option<u16>,
}

impl Rule {
    /// Whether a flow of this client may have this outside port.
    fn allows(&self, policy: &NatPolicy, client: &FlowKey, port: u16) -> bool {
        let own = self.preserves() || uses_low_port(client);
        let sets = [Some(self.ports), self.low_ports, own.then_some(self.own_ports)];
        sets.into_iter().flatten().filter_map(|set| policy.port_set(set)).any(|set| set.contains(port))
    }
}

impl Nat {
    /// Gives a flow the source again that it had, so that nobody else gets it; counts it as one of its client's. As
    /// [`Nat::bind`], [`Nat::release`] takes it back.
    ///
    /// # Errors
    /// [`Refusal::Rule`], [`Refusal::Address`], [`Refusal::Port`], [`Refusal::Limit`].
    pub fn rebind(
        &mut self,
        now_ns: u64,
        request: &BindRequest,
        earlier: &Earlier,
        in_use: &dyn Fn(&FlowKey) -> bool,
    ) -> Result<Binding, Refusal> {
        self.tick(now_ns);
        let (followed, client) = (self.followed.clone().ok_or(Refusal::Rule)?, request.client.src);
        let rule = followed.policy.rule(request.rule).ok_or(Refusal::Rule)?;
        let (client_key, tracks) = ((request.tenant, client), rule.tracks_clients(client));
        if tracks {
            let flows_max = share_of_core(rule.flows_per_client_max, self.cores);
            let known = self.clients.enter(now_ns, client_key).ok_or(Refusal::Limit)?;
            if known.flows >= flows_max {
                return Err(Refusal::Limit);
            }
        }
        let has_port = is_translated(request.client.protocol);
        let keeps = rule.mode == NatMode::None || rule.mode == NatMode::PortOnly && !has_port;
        if keeps != earlier.kept {
            return Err(Refusal::Rule);
        }
        let binding = match rule.mode {
            _ if keeps => self.keep(&followed, request),
            NatMode::AddressAndPort => {
                self.translate_again(now_ns, &followed, rule, request, earlier, in_use)?
            }
            NatMode::PortOnly | NatMode::None => {
                if earlier.source != client {
                    return Err(Refusal::Address);
                }
                let pooled = followed.policy.is_pool(client);
                let key = if pooled { PoolKey::Address(client) } else { PoolKey::Kept(client.is_ipv6()) };
                let binding = self.port_again(&followed, rule, request, (key, earlier), in_use)?;
                self.events.push(opened(now_ns, request, &binding));
                binding
            }
        };
        if tracks {
            let paired = (rule.mode == NatMode::AddressAndPort).then_some(binding.source);
            self.clients.opened(&client_key, paired);
        }
        Ok(Binding { counted: tracks, ..binding })
    }

    /// Makes a mapping again that had no flows, or whose flows follow.
    ///
    /// # Errors
    /// As [`Nat::rebind`]; [`Refusal::Core`]: another core has its port.
    pub fn remap(&mut self, now_ns: u64, earlier: &EarlierMapping) -> Result<(), Refusal> {
        let followed = self.followed.clone().ok_or(Refusal::Rule)?;
        let rule = followed.policy.rule(earlier.rule).filter(|rule| rule.independent);
        let rule = rule.ok_or(Refusal::Rule)?;
        let EarlierMapping { protocol, tenant, inside, out_tenant, outside, .. } = *earlier;
        // A client without any remote: the key's other end means nothing to a mapping.
        let client = FlowKey {
            src: inside.ip(),
            dst: outside.ip(),
            src_port: inside.port(),
            dst_port: if is_icmp(protocol) { inside.port() } else { 0 },
            protocol,
        };
        let request = BindRequest {
            rule: earlier.rule,
            client,
            tenant,
            out_tenant,
            random: 0,
            home: earlier.home,
            next: None,
        };
        let source = Earlier {
            source: outside.ip(),
            port: outside.port(),
            kept: false,
            blocks: earlier.blocks,
            by_lease: false,
        };
        self.clients.enter(now_ns, (tenant, inside.ip())).ok_or(Refusal::Limit)?;
        let quiet = self.may_have_again(now_ns, &followed, rule, &request, &source)?;
        self.mapping_again(now_ns, &followed, rule, (&request, quiet), &source)?;
        // It waits for flows as long as one that has lost its last one.
        self.mappings.leave(now_ns, &(out_tenant, protocol, outside.ip(), outside.port()));
        Ok(())
    }

    fn translate_again(
        &mut self,
        now_ns: u64,
        followed: &Followed,
        rule: &Rule,
        request: &BindRequest,
        earlier: &Earlier,
        in_use: &dyn Fn(&FlowKey) -> bool,
    ) -> Result<Binding, Refusal> {
        let endpoint = SocketAddr::new(earlier.source, earlier.port);
        if let Some(binding) = self.by_forward(followed, rule, request, Some(endpoint), in_use) {
            self.events.push(opened(now_ns, request, &binding));
            return Ok(binding);
        }
        let quiet = self.may_have_again(now_ns, followed, rule, request, earlier)?;
        if rule.independent && is_translated(request.client.protocol) {
            return self.mapping_again(now_ns, followed, rule, (request, quiet), earlier);
        }
        let binding = if is_translated(request.client.protocol) {
            let key = PoolKey::Address(earlier.source);
            self.port_again(followed, rule, request, (key, earlier), in_use)?
        } else {
            let reply = FlowKey { src: earlier.source, ..request.client }.reversed();
            if in_use(&reply) {
                return Err(Refusal::Port);
            }
            self.bound(followed, request, earlier.source, (earlier.port, 0))
        };
        if !quiet {
            self.events.push(opened(now_ns, request, &binding));
        }
        Ok(binding)
    }

    /// Takes a port of the tables.
    fn port_again(
        &mut self,
        followed: &Followed,
        rule: &Rule,
        request: &BindRequest,
        (key, earlier): (PoolKey, &Earlier),
        in_use: &dyn Fn(&FlowKey) -> bool,
    ) -> Result<Binding, Refusal> {
        if !earlier.by_lease && !rule.allows(&followed.policy, &request.client, earlier.port) {
            return Err(Refusal::Port);
        }
        let ask = super::bind::ask(followed, rule, request, key, (rule.ports, earlier.source, ALL_BLOCKS));
        let chosen = self.pools.take_again(&ask, earlier.port, in_use).ok_or(Refusal::Port)?;
        Ok(self.chosen(followed, request, earlier.source, chosen))
    }

    /// Whether the client may have the outside endpoint: a lease of another one, or a rule with other blocks, says no. The
    /// answer says whether the log knows the holder by its blocks.
    fn may_have_again(
        &mut self,
        now_ns: u64,
        followed: &Followed,
        rule: &Rule,
        request: &BindRequest,
        earlier: &Earlier,
    ) -> Result<bool, Refusal> {
        let pool = rule.pool(request.client.src);
        if !pool.contains(&earlier.source) {
            return Err(Refusal::Address);
        }
        let has_port = is_translated(request.client.protocol);
        let of_port = if has_port { 1 << block_of(earlier.port) } else { Blocks::MAX };
        let snapshot = followed.policy.leases().snapshot();
        let held = snapshot.held_by(request.tenant, request.client.src);
        if let Some(held) = held.filter(|held| held.iter().any(|(address, _)| pool.contains(address))) {
            let is_held =
                |(address, blocks): &(IpAddr, Blocks)| *address == earlier.source && blocks & of_port != 0;
            return if held.iter().any(is_held) { Ok(true) } else { Err(Refusal::Port) };
        }
        if rule.blocks_per_client > 0 {
            let own = self.blocks_again(now_ns, followed, rule, request, earlier);
            let holds = own.is_some_and(|own| own.address == earlier.source && own.blocks & of_port != 0);
            return if holds { Ok(true) } else { Err(Refusal::Port) };
        }
        let closed = snapshot.closed(earlier.source);
        if has_port && closed & of_port != 0 || closed == Blocks::MAX {
            Err(Refusal::Port)
        } else {
            Ok(false)
        }
    }

    /// The blocks that the client had, granted again unless it has some by now.
    fn blocks_again(
        &mut self,
        now_ns: u64,
        followed: &Followed,
        rule: &Rule,
        request: &BindRequest,
        earlier: &Earlier,
    ) -> Option<Automatic> {
        let pool = rule.pool_with(earlier.source)?;
        let zone = *pool.first()?;
        let client = self.clients.find(&(request.tenant, request.client.src))?;
        if let Some(held) = client.automatic.iter().find(|held| held.zone == zone) {
            return Some(*held);
        }
        let wish = AutomaticWish {
            tenant: request.tenant,
            client: request.client.src,
            addresses: pool,
            start: 0,
            whole: followed.policy.ports(rule)?.whole_blocks(),
            count: rule.blocks_per_client,
            random: 0,
        };
        let had = (earlier.source, earlier.blocks);
        let (held, events) = followed.policy.leases().join_again(now_ns, &wish, had)?;
        events.into_iter().for_each(|event| self.events.push(event));
        self.clients.find(&(request.tenant, request.client.src))?.automatic.push(held);
        Some(held)
    }

    /// One more flow of a mapping, which is made if it is not there.
    fn mapping_again(
        &mut self,
        now_ns: u64,
        followed: &Followed,
        rule: &Rule,
        (request, quiet): (&BindRequest, bool),
        earlier: &Earlier,
    ) -> Result<Binding, Refusal> {
        let (key, protocol) = (&request.client, request.client.protocol);
        let zone = rule.pool_with(earlier.source).and_then(|pool| pool.first());
        let zone = *zone.ok_or(Refusal::Address)?;
        let inside: InsideKey = (request.tenant, protocol, key.src, key.sender_port(), zone);
        let outside: OutsideKey = (request.out_tenant, protocol, earlier.source, earlier.port);
        match self.mappings.of_inside(&inside).map(|entry| entry.outside) {
            Some(known) if known == outside => drop(self.mappings.join(&outside)),
            Some(_) => return Err(Refusal::Port),
            None => {
                if mapping_core(earlier.source, earlier.port, self.cores) != self.core {
                    return Err(Refusal::Core);
                }
                let (tenant, protocol, address, port) = outside;
                let free = self.mappings.is_free(tenant, protocol, address, port);
                if !free || !(earlier.by_lease || rule.allows(&followed.policy, key, earlier.port)) {
                    return Err(Refusal::Port);
                }
                let entry = self.mappings.insert(inside, outside, quiet);
                if !quiet {
                    self.events.push(mapping_event(now_ns, NatEventKind::Opened, &entry));
                }
            }
        }
        Ok(self.mapped(followed, request, &outside))
    }

    /// Endpoint-independent mappings from a place on, at most so many places; and the next place, if there are more.
    pub(crate) fn mappings(
        &self,
        from: usize,
        count: usize,
    ) -> (impl Iterator<Item = &MappingEntry>, Option<usize>) {
        self.mappings.scan(from, count)
    }

    /// The blocks of an outside address that a client has by a rule's blocks; 0: none.
    #[must_use]
    pub fn blocks_of(&self, tenant: u16, client: IpAddr, outside: IpAddr) -> Blocks {
        let known = self.clients.known(&(tenant, client));
        let held = known.and_then(|known| known.automatic.iter().find(|held| held.address == outside));
        held.map_or(0, |held| held.blocks)
    }
}
