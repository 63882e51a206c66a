//! Which core owns a packet: asked by whoever reads it, answered without state (rows C2–C4, C9).
//!
//! Nearly always the answer is one core: the bucket table at the hash of the packet's own tuple. Seven things make the
//! list of cores longer or other; each has the flow's record at exactly one of the cores visited:
//!
//! * **Kept source behind a translated destination** (C4 with a virtual server or port forward): the reply's tuple hashes
//!   elsewhere than the request's. The reply's source is a known backend, so the request's tuple is made up again from
//!   it and the listen address, and its owner is visited first. Not where the packet is addressed to an outside port: then it
//!   answers a source NAT, and no client whose tuple was kept. A program of the host may be such a client.
//! * **Endpoint-independent mappings**: what goes out belongs to the core of the client's endpoint, whatever the remote;
//!   what comes in to the core that holds the port's block. A client that talks to another one's outside endpoint does
//!   both: its own core is asked first, then the one that holds the port, which may give it back to begin. Not every
//!   packet between such a client and the outside is of a mapping: it may answer somebody who came in by a forward, or to
//!   the inside address itself. So the cores of kept sources and of the packet's own tuple are visited before.
//! * **Ports that clients keep** (`port-choice = "preserve"`, or those of a forward to them): the core that the replies come to with the client's port has
//!   the flow, and what the client sends takes a ring there.
//! * **Protocols without ports behind an outside address**: no port can lead the answer to its core, so these flows belong
//!   to the core of their remote's address, which both directions have.
//! * **A reply to a tenant** from a shared place, to the tenant's own address: the tenant is part of the hash, so the
//!   question was begun by the core that the hash with the tenant names.
//! * **A bucket that moved** has a chain of earlier owners; they are asked before the owner begins a flow. One that has
//!   the endpoint-independent mapping of the packet's client begins it itself, so that the client keeps its outside port.
//! * **A core that was taken away** is skipped.
//!
//! The last of the chain is always the *creator*: the only core that may begin a flow for this packet, but for such a mapping.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use packet::attachment::{Egress, Ingress};
use packet::flow::FlowKey;
use packet::icmp::is_icmp;
use steering::ownership::{OwnerChain, Ownership};

use crate::nat::{NatClient, first_of_pool, is_translated};
use crate::policy::Policy;
use crate::route::{RouteQuery, SHARED_TENANT};
use crate::spec::NatMode;

/// The cores to ask about a packet, and the mapping that may change who begins its flow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Owners {
    /// The cores to ask, the creator last.
    pub chain: OwnerChain,
    /// The NAT rule by whose endpoint-independent mapping the flow leaves: the core on the way that has the client's
    /// begins the flow instead.
    pub mapping: Option<u16>,
}

/// The owners of a packet that came in by `ingress`.
#[inline]
#[must_use]
pub fn owners(
    ownership: &Ownership,
    policy: &Policy,
    key: &FlowKey,
    tenant: u16,
    ingress: Ingress,
) -> Owners {
    let bucket = ownership.bucket(key, tenant);
    let has_port = is_translated(key.protocol) || !policy.hides();
    if policy.owners.by_hash_only && has_port && ownership.table.chain(bucket).is_empty() {
        let chain = OwnerChain::one(ownership.owner_of_bucket(bucket));
        return Owners { chain, mapping: None };
    }
    owners_beyond_hash(ownership, policy, key, tenant, ingress, bucket)
}

/// Key by which the unit of a cluster is found that has a packet's flow: the packet's own, or, for the reply of a backend or
/// forward target that sees its clients' own addresses, the request's, as the client sent it. Dispatchers and data planes
/// compute the same, from the same configuration of services.
#[inline]
#[must_use]
pub fn unit_key(policy: &Policy, key: &FlowKey) -> FlowKey {
    let from = SocketAddr::new(key.src, key.src_port);
    let Some(listen) = policy.kept_source_listens(key.protocol, from).next() else { return *key };
    if policy.is_own(key.dst) || policy.nat.is_outside(key.dst) {
        return *key;
    }
    FlowKey {
        src: key.dst,
        src_port: key.dst_port,
        dst: listen.ip(),
        dst_port: listen.port(),
        protocol: key.protocol,
    }
}

#[cold]
fn owners_beyond_hash(
    ownership: &Ownership,
    policy: &Policy,
    key: &FlowKey,
    tenant: u16,
    ingress: Ingress,
    bucket: usize,
) -> Owners {
    let mut owners = Owners::default();
    if let Some(home) = remote_bucket_of(ownership, policy, key, tenant, ingress) {
        owners.chain.visit_bucket(ownership, home);
        owners.chain.end_with(ownership, ownership.owner_of_bucket(home));
        return owners;
    }
    let from = SocketAddr::new(key.src, key.src_port);
    let ours = || answers_translation(policy, key);
    let listens = policy.kept_source_listens(key.protocol, from);
    for listen in listens.take_while(|_| !ours()) {
        let request = FlowKey {
            src: key.dst,
            src_port: key.dst_port,
            dst: listen.ip(),
            dst_port: listen.port(),
            protocol: key.protocol,
        };
        // Clients come in where the listen address is: untagged interfaces, tenant 0, unless the policy says more.
        let client_tenant = policy.tenant_towards(key.dst, tenant);
        owners.chain.visit_bucket(ownership, ownership.bucket(&request, client_tenant));
    }
    // From a shared place to a tenant: if it is a reply, its flow is where the tenant's question was begun.
    if tenant == SHARED_TENANT {
        for other in policy.tenants_with(key.dst) {
            owners.chain.visit_bucket(ownership, ownership.bucket(key, other));
        }
    }
    owners.chain.visit_bucket(ownership, bucket);
    let creator = port_owner(ownership, policy, key, tenant, ingress, &mut owners)
        .or_else(|| mapping_owner(ownership, policy, key, tenant, ingress, &mut owners));
    owners.chain.end_with(ownership, creator.unwrap_or_else(|| ownership.owner_of_bucket(bucket)));
    owners
}

/// Whether a packet is addressed to a port that address translation gives out, and not to a client or a program of the host.
fn answers_translation(policy: &Policy, key: &FlowKey) -> bool {
    if policy.is_own(key.dst) {
        policy.nat.gives(key.dst, key.dst_port)
    } else {
        policy.nat.is_outside(key.dst)
    }
}

/// The core that the replies come to if the client keeps its port, by a NAT with which clients do, or has that of a forward to it: only
/// there it is known whether the port is free.
fn port_owner(
    ownership: &Ownership,
    policy: &Policy,
    key: &FlowKey,
    tenant: u16,
    ingress: Ingress,
    owners: &mut Owners,
) -> Option<u8> {
    let has_port = is_translated(key.protocol) && !is_icmp(key.protocol);
    let from = SocketAddr::new(key.src, key.src_port);
    let forwarded = || policy.kept_source_listens(key.protocol, from).next().is_some();
    let keeps = policy.owners.preserves_ports || forwarded();
    if !keeps || !has_port || policy.server_or_forward(key).is_some() {
        return None;
    }
    let query = RouteQuery { tenant, ingress: Some(ingress), key: *key, before: None };
    let route = policy.fib.find(&query).ok()?.route;
    let (out, next) = (route.egress, Some(route.via.unwrap_or(key.dst)));
    let rule = policy.nat.rule_for(out, &NatClient::of(key, tenant, ingress))?;
    let place = |addresses| first_of_pool(&ownership.hasher, (tenant, key.src), addresses);
    let forwarded = policy.nat.rule(rule).and_then(|rule| policy.nat.forwarded_from(rule, key, tenant, next));
    let source = match forwarded {
        Some(listen) => Some((listen.ip(), listen.port())),
        None => {
            policy.nat.preserved_source(rule, key.src, next, place).map(|address| (address, key.src_port))
        }
    };
    let (address, port) = source.filter(|_| out != Egress::from(ingress))?;
    let reply = key.with_source(address, port).reversed();
    let bucket = ownership.bucket(&reply, policy.tenant_behind(out));
    owners.chain.visit_bucket(ownership, bucket);
    Some(ownership.owner_of_bucket(bucket))
}

/// The core of an endpoint-independent mapping, if the packet uses one.
fn mapping_owner(
    ownership: &Ownership,
    policy: &Policy,
    key: &FlowKey,
    tenant: u16,
    ingress: Ingress,
    owners: &mut Owners,
) -> Option<u8> {
    // What is addressed to a service goes inside, not out by a mapping, wherever the route to its address leads.
    if !policy.owners.maps_endpoints || policy.server_or_forward(key).is_some() {
        return None;
    }
    if let Some(core) = policy.nat.mapping_core_of(key, ownership.cores) {
        if policy.hairpin_out(key, tenant, ingress).is_some() {
            owners.chain.visit_bucket(ownership, endpoint_bucket(ownership, key, tenant));
        }
        return Some(core);
    }
    let query = RouteQuery { tenant, ingress: Some(ingress), key: *key, before: None };
    let out = policy.fib.find(&query).ok()?.route.egress;
    if out == Egress::from(ingress) {
        return None;
    }
    owners.mapping = Some(policy.endpoint_rule(out, &NatClient::of(key, tenant, ingress))?);
    let bucket = endpoint_bucket(ownership, key, tenant);
    owners.chain.visit_bucket(ownership, bucket);
    Some(ownership.owner_of_bucket(bucket))
}

/// The bucket of a client's endpoint alone: of who sends this, whoever the remote is.
#[must_use]
pub fn endpoint_bucket(ownership: &Ownership, key: &FlowKey, tenant: u16) -> usize {
    let nobody = match key.src {
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    ownership.bucket(&FlowKey { src_port: key.sender_port(), dst: nobody, dst_port: 0, ..*key }, tenant)
}

/// The bucket of a remote's address alone, for a protocol without ports; `tenant`: in which its packets come in.
#[must_use]
pub fn remote_bucket(ownership: &Ownership, remote: IpAddr, protocol: u8, tenant: u16) -> usize {
    let nobody = match remote {
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    ownership.bucket(&FlowKey { src: remote, dst: nobody, src_port: 0, dst_port: 0, protocol }, tenant)
}

/// That bucket, if the packet leaves by a NAT that gives another address, or answers such a one.
fn remote_bucket_of(
    ownership: &Ownership,
    policy: &Policy,
    key: &FlowKey,
    tenant: u16,
    ingress: Ingress,
) -> Option<usize> {
    if is_translated(key.protocol) || !policy.hides() {
        return None;
    }
    if policy.nat.is_outside(key.dst) {
        return Some(remote_bucket(ownership, key.src, key.protocol, tenant));
    }
    let query = RouteQuery { tenant, ingress: Some(ingress), key: *key, before: None };
    let out = policy.fib.find(&query).ok()?.route.egress;
    let rule = policy
        .nat
        .rule_for(out, &NatClient::of(key, tenant, ingress))
        .filter(|_| out != Egress::from(ingress))?;
    let hides = policy.nat.mode(rule) == Some(NatMode::AddressAndPort);
    hides.then(|| remote_bucket(ownership, key.dst, key.protocol, policy.tenant_behind(out)))
}

/// The cores that may have the endpoint-independent mapping of a client's endpoint. The last begins one if none has.
#[must_use]
pub fn endpoint_owners(ownership: &Ownership, key: &FlowKey, tenant: u16) -> OwnerChain {
    let bucket = endpoint_bucket(ownership, key, tenant);
    let mut chain = OwnerChain::default();
    chain.visit_bucket(ownership, bucket);
    chain.end_with(ownership, ownership.owner_of_bucket(bucket));
    chain
}
