//! Where packets leave: policy, owners and neighbors in force at one core, and the next hops that follow from them.

use std::sync::Arc;

use packet::DropReason;
use packet::attachment::{Egress, Ingress, InterfaceId};
use packet::flow::FlowKey;
use steering::ownership::Ownership;
use steering::units::{EraSeen, Units};

use super::Outcome;
use super::flows::TenantKey;
use super::next_hops::{self, Hop, HopKey, Hops, Neighbors, Target, Way};
use crate::handover::InheritedFlows;
use crate::hash::SecretState;
use crate::policy::{Policy, Tenants};
use crate::random::Random;
use crate::route::RouteQuery;
use crate::spec::HostMode;

/// Snapshots that control has published, as one core goes by them.
pub(super) struct Routing {
    /// Number of this core.
    pub core: u8,
    /// Behind a counter of this core's own: taking a reference writes to memory that no other core reads.
    #[expect(clippy::redundant_allocation, reason = "the outer counter is the point")]
    pub policy: Arc<Arc<Policy>>,
    /// Changes of the policy and the next hops that this core has seen; never 0. Flows of another era are decided again.
    pub era: u16,
    /// Who owns a flow.
    pub ownership: Arc<Ownership>,
    /// Next hops that have a number.
    pub hops: Hops,
    /// A copy of the policy's, near this core.
    pub tenants: Tenants,
    neighbors: Arc<Neighbors>,
    /// Machines that share the work with this one.
    pub units: Option<Arc<Units>>,
    /// Newest era of their table that this core has seen in force.
    pub era_seen: EraSeen,
    /// Flows of other machines that do not live where their replies come in.
    pub inherited: Arc<InheritedFlows>,
}

impl Routing {
    /// The first snapshots of core `core`.
    pub fn new(
        core: u8,
        random: &mut Random,
        policy: &Arc<Policy>,
        ownership: &Arc<Ownership>,
        neighbors: Arc<Neighbors>,
    ) -> Self {
        Self {
            core,
            policy: Arc::new(Arc::clone(policy)),
            era: 1,
            ownership: Arc::clone(ownership),
            hops: Hops::new(SecretState::draw(random)),
            tenants: policy.tenants().clone(),
            neighbors,
            units: None,
            era_seen: EraSeen::default(),
            inherited: Arc::default(),
        }
    }

    /// Outcome of a packet for the host.
    pub fn host(&self, ingress: Ingress) -> Outcome {
        match ingress {
            Ingress::Interface(id) if self.policy.spec.host.mode == HostMode::Native => {
                Outcome::DeviceIngress(id)
            }
            _ => Outcome::Forward(Egress::Host),
        }
    }

    /// Takes over policy and owners.
    pub fn take_over(&mut self, policy: &Arc<Policy>, ownership: &Arc<Ownership>) {
        self.tenants.clone_from(policy.tenants());
        self.policy = Arc::new(Arc::clone(policy));
        self.ownership = Arc::clone(ownership);
    }

    /// Every flow is decided again when its next packet comes. Numbers of next hops mean nothing any more.
    pub fn begin_era(&mut self) {
        self.hops.clear();
        self.era = self.era.checked_add(1).unwrap_or(1);
    }

    /// Whether the cluster's next era is prepared and not in force here: other units may work by it already.
    pub fn awaits_era(&self) -> bool {
        self.units.as_ref().is_some_and(|units| units.in_force != units.eras.newest().era())
    }

    /// Whether these are other neighbors than those in force.
    pub fn is_news(&self, neighbors: &Arc<Neighbors>) -> bool {
        !Arc::ptr_eq(neighbors, &self.neighbors)
    }

    /// Takes over what was learned about neighbors.
    pub fn follow_neighbors(&mut self, neighbors: &Arc<Neighbors>) {
        self.neighbors = Arc::clone(neighbors);
        self.hops.follow(&self.policy, &self.neighbors);
        if self.hops.is_worn_out() {
            self.begin_era();
        }
    }

    /// Whether this core was taken away.
    pub fn is_lost(&self) -> bool {
        !self.ownership.is_alive(self.core)
    }

    /// The number of a next hop: [`Hops::number`].
    pub fn number(&mut self, key: HopKey) -> u16 {
        self.hops.number(key, &self.policy, &self.neighbors)
    }

    /// A next hop, whether or not it can have a number.
    pub fn unnumbered(&self, key: HopKey) -> Hop {
        Hops::unnumbered(key, &self.policy, &self.neighbors)
    }

    /// Largest packet of an IP version where something came in, bytes; bonds look after theirs themselves.
    pub fn mtu_of(&self, ingress: Ingress, ipv4: bool) -> u16 {
        let interface = ingress.interface().and_then(|id| self.policy.interface(id));
        interface.map_or(u16::MAX, |interface| interface.mtu_of(ipv4))
    }

    /// The way of a number; `None`: it is not decided yet, or no longer.
    pub fn way(&self, number: u16) -> Option<Way> {
        match number {
            next_hops::UNSET => None,
            next_hops::HOST => Some(Way::Host),
            next_hops::HAIRPIN => Some(Way::Hairpin),
            number => self.hops.get(number).copied().map(Way::Hop),
        }
    }

    /// The interface by which a packet of this key would leave, if it comes around instead: both ends are mapped ones
    /// ([`super::hairpin`]).
    pub fn around(&self, leaving: &FlowKey) -> Option<InterfaceId> {
        if !self.policy.owners.maps_endpoints {
            return None;
        }
        let nat = &self.policy.nat;
        nat.mapping_core_of(&leaving.reversed(), self.ownership.cores)?;
        nat.mapping_core_of(leaving, self.ownership.cores)?;
        let rule = nat.rule_of_outside(leaving.dst)?;
        self.policy.spec.nats.get(usize::from(rule)).and_then(|nat| nat.out)
    }

    /// Where a leaving packet goes. `query`: about its destination.
    pub fn egress(&self, leaving: &FlowKey, query: &RouteQuery) -> Result<Target, DropReason> {
        if let Some(interface) = self.around(leaving) {
            return Ok((Egress::Interface(interface), leaving.dst, u16::MAX));
        }
        if self.policy.is_own(leaving.dst) {
            return Ok((Egress::Host, leaving.dst, u16::MAX));
        }
        let route = self.policy.route(query)?;
        Ok((route.egress, route.via.unwrap_or(leaving.dst), route.mtu))
    }

    /// Where a reply goes: by what the question came, if that is still there and leads to its sender.
    pub fn back(&self, ingress: Ingress, leaving: &FlowKey, tenant: u16) -> Result<Target, DropReason> {
        let came = Egress::from(ingress);
        let query = RouteQuery { tenant, ingress: None, key: *leaving, before: Some(came) };
        match ingress {
            _ if self.around(leaving).is_some() => {}
            Ingress::Host => return Ok((Egress::Host, leaving.dst, u16::MAX)),
            Ingress::Bond(id) if self.policy.peer(id).is_some() => {
                return Ok((Egress::Bond(id), leaving.dst, u16::MAX));
            }
            Ingress::Interface(_) => {
                let by_route = self.egress(leaving, &query);
                let there = match by_route {
                    Ok((egress, ..)) => egress == came || egress == Egress::Host,
                    Err(reason) => reason != DropReason::NoRoute,
                };
                if there {
                    return by_route;
                }
                let back = self.policy.fib.lookup_by(tenant, leaving.dst, came);
                return back
                    .map_or(by_route, |route| Ok((came, route.via.unwrap_or(leaving.dst), route.mtu)));
            }
            Ingress::Bond(_) => {}
        }
        self.egress(leaving, &query)
    }

    /// The buckets in which a flow counts, each once: of both directions, and of its remote if that is what leads to it.
    pub fn live_buckets(&self, original: &TenantKey, reply: &TenantKey) -> [Option<usize>; 3] {
        let first = self.ownership.bucket(&original.0, original.1);
        let second = self.ownership.bucket(&reply.0, reply.1);
        let by_remote = !crate::nat::is_translated(reply.0.protocol) && original.0.src != reply.0.dst;
        let third = by_remote
            .then(|| crate::steer::remote_bucket(&self.ownership, reply.0.src, reply.0.protocol, reply.1));
        [
            Some(first),
            (second != first).then_some(second),
            third.filter(|third| *third != first && *third != second),
        ]
    }
}
