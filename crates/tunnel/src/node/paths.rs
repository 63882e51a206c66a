//! Paths of a bond: which WANs, endpoints and addresses they join, and what the cores found out about them.

use std::net::SocketAddr;
use std::sync::Arc;

use super::{Node, Source, lifecycle};
use crate::bond::{Bond, PATHS_MAX};
use crate::config::{Direction, Wan};
use crate::frame::PeerPathState;
use crate::lifecycle::{Action, WanUnder};
use crate::path::{Path, PathState, Route};
use crate::path_limits::PathLimits;
use crate::strain::Bounds;
use crate::time::Time;

impl Node {
    /// A listener met a path id it does not know, in an authenticated datagram: the dialer opened a path.
    /// It must come in over a WAN of the bond.
    pub fn on_new_path(&self, now: Time, bond: &Bond, id: u8, source: &Source) {
        let wan = self.applied().wans.iter().find(|wan| wan.id == source.wan).cloned();
        let token = self.control().token();
        let mut life = lifecycle(bond);
        // Behind the lock: whoever changes the peer's WANs looks through the paths afterwards, and finds this one or stops it.
        if !bond.peer.load().may_use(source.wan) {
            return;
        }
        if bond.dialer || life.paths.len() >= PATHS_MAX || life.paths.iter().any(|l| l.path.id == id) {
            return;
        }
        let (limits, bounds) = wan.as_ref().map_or_else(Default::default, limits);
        let mtu = wan.map_or(1_500, |wan| wan.mtu);
        let path = Path::new(id, source.route(), limits.tier, bounds.rate_max, now);
        let mtu_limit = datagram_limit(mtu, &source.remote);
        let under = WanUnder { up: true, addresses: Vec::new(), mtu_limit, limits, bounds };
        life.add_path(bond, path, None, under, token, now);
        self.poll_bond_soon(now, bond);
    }

    /// The peer still uses a path that we took away.
    pub fn tell_removed(&self, bond: &Bond, id: u8, actions: &mut Vec<Action>) {
        lifecycle(bond).tell_removed(bond.slot, id, actions);
    }

    /// An authenticated datagram of a known path came from elsewhere.
    pub fn on_moved(&self, now: Time, bond: &Bond, id: u8, source: &Source) {
        let token = self.control().token();
        let mut life = lifecycle(bond);
        if bond.peer.load().may_use(source.wan) {
            life.on_moved(now, id, source.route(), token);
            self.poll_bond_soon(now, bond);
        }
    }

    /// A core found a path dead: nothing came back for what it sent.
    pub fn suspect(&self, now: Time, bond: &Bond, id: u8, actions: &mut Vec<Action>) {
        lifecycle(bond).suspect(now, bond.slot, id, actions);
        self.poll_bond_soon(now, bond);
    }

    /// Small datagrams pass on this path, large ones do not come back as reports.
    pub fn black_hole(&self, now: Time, bond: &Bond, id: u8) {
        lifecycle(bond).black_hole(now, id);
        self.poll_bond_soon(now, bond);
    }

    /// Dialer: one path per WAN × endpoint × number (row T1), kept as long as its origin exists.
    pub(super) fn update_paths(&self, now: Time, bond: &Bond, wans: &[Wan], actions: &mut Vec<Action>) {
        let peer = bond.peer.load();
        let mut life = lifecycle(bond);
        let mut wanted = Vec::new();
        for wan in wans.iter().filter(|wan| peer.may_use(wan.id)) {
            for endpoint in &peer.endpoints {
                wanted.extend((0..peer.paths.per_wan_pair.clamp(1, 8)).map(|nth| (wan, *endpoint, nth)));
            }
        }
        let exists = |origin: &(u16, SocketAddr, u8)| {
            wanted.iter().any(|(wan, endpoint, nth)| (wan.id, *endpoint, *nth) == *origin)
        };
        let gone: Vec<u8> = life
            .paths
            .iter()
            .filter(|l| l.origin.as_ref().is_none_or(|o| !exists(o)))
            .map(|l| l.path.id)
            .collect();
        for id in gone {
            life.retain_paths(bond, |l| l.path.id != id);
            life.tell_state(bond.slot, id, PeerPathState::Removed, actions);
        }
        for (wan, endpoint, nth) in wanted {
            let up = wan.up && reaches(wans, wan, &endpoint);
            let (limits, bounds) = limits(wan);
            let mtu_limit = datagram_limit(wan.mtu, &endpoint);
            let under = WanUnder { up, addresses: wan.addresses.clone(), mtu_limit, limits, bounds };
            let known = life
                .paths
                .iter()
                .find(|l| l.origin == Some((wan.id, endpoint, nth)))
                .map(|l| Arc::clone(&l.path));
            if let Some(path) = known {
                life.wan_changed(now, bond.slot, path.id, &under, actions);
            } else if up && let Some(id) = life.free_id() {
                let route = Route { wan: wan.id, local: None, remote: endpoint };
                let path = Path::new(id, route, wan.tier, bounds.rate_max, now);
                let token = self.control().token();
                life.add_path(bond, path, Some((wan.id, endpoint, nth)), under, token, now);
                life.next_attempt = life.next_attempt.min(now);
            }
        }
    }

    /// Listener: drops paths over WANs that the bond may not use any more (row T1), and follows caps, tiers and state of
    /// the others' WANs.
    pub(super) fn limit_paths(&self, bond: &Bond, wans: &[Wan], actions: &mut Vec<Action>) {
        let peer = bond.peer.load();
        let mut life = lifecycle(bond);
        let refused: Vec<u8> =
            life.paths.iter().filter(|l| !peer.may_use(l.path.route().wan)).map(|l| l.path.id).collect();
        for id in refused {
            life.retain_paths(bond, |l| l.path.id != id);
            life.tell_state(bond.slot, id, PeerPathState::Removed, actions);
        }
        for life in &mut life.paths {
            if let Some(wan) = wans.iter().find(|wan| wan.id == life.path.route().wan) {
                life.limit(limits(wan));
                if !wan.up {
                    life.path.set_state(PathState::Down, "WAN down");
                }
            }
        }
        life.apply_limits();
    }
}

/// Limits that a WAN sets for the peer, and those that only we keep to.
fn limits(wan: &Wan) -> (PathLimits, Bounds) {
    let properties = wan.properties;
    let limits = PathLimits {
        tier: wan.tier,
        receive_bps: wan.receive_rate_max_bps,
        closed: properties.direction == Direction::Send,
        metered: properties.metered,
        cost: properties.cost,
    };
    let bounds = Bounds {
        rate_max: wan.rate_max_bps.map(|bps| bps / 8),
        may_not_send: properties.direction == Direction::Receive,
        latency_max_us: properties.latency_max_us,
        loss_max: properties.loss_max,
        hops_max: properties.hops_max,
    };
    (limits, bounds)
}

/// Largest UDP payload an interface MTU leaves for this address family.
fn datagram_limit(mtu: u16, remote: &SocketAddr) -> u16 {
    let headers = if remote.ip().to_canonical().is_ipv4() { 28 } else { 48 };
    mtu.clamp(1_280, 9_000) - headers
}

/// A WAN can reach an endpoint: it has an address of that family (or none is known and the kernel decides). What carries
/// datagrams of one WAN over TCP is for that one only.
fn reaches(wans: &[Wan], wan: &Wan, endpoint: &SocketAddr) -> bool {
    if let Some(relays) = &wan.relays {
        return relays.contains(endpoint);
    }
    let is_relay = wans.iter().any(|wan| wan.relays.as_ref().is_some_and(|relays| relays.contains(endpoint)));
    !is_relay
        && (wan.addresses.is_empty()
            || wan
                .addresses
                .iter()
                .any(|address| address.is_ipv4() == endpoint.ip().to_canonical().is_ipv4()))
}
