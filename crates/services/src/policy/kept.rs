//! Inside endpoints that are reached with the client's tuple kept (row C4): their replies hash elsewhere than the requests.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use crate::spec::{DeliveryMode, GatewaySpec, NatMode};

/// Earlier targets that are remembered over reloads at most; beyond, all but the present ones are forgotten.
const KEPT_MAX: usize = 65_536;

/// Targets of one address: the first port, how many, and where the first one is listened for.
type Ports = (u16, u16, SocketAddr);

/// Where clients ask for an inside endpoint whose replies go back to them as they are.
#[derive(Clone, Debug, Default)]
pub(super) struct KeptTargets {
    by_target: BTreeMap<(u8, IpAddr), Vec<Ports>>,
    count: usize,
}

impl KeptTargets {
    /// Those of a spec. Flows of a target that is configured no longer still live: its replies must find them.
    pub fn of(spec: &GatewaySpec, before: Option<&Self>) -> Self {
        let mut kept = before.filter(|before| before.count <= KEPT_MAX).cloned().unwrap_or_default();
        let inner = |protocol: u8, listen: SocketAddr| {
            let here = spec
                .host
                .inners
                .iter()
                .filter(move |inner| (inner.protocol, inner.listen) == (protocol, listen));
            here.map(|inner| inner.inner)
        };
        for forward in &spec.forwards {
            kept.keep(forward.protocol, forward.to, forward.ports, forward.listen);
            for inner in inner(forward.protocol, forward.listen) {
                kept.keep(forward.protocol, forward.to, 1, inner);
            }
        }
        let servers = spec
            .servers
            .iter()
            .filter(|server| server.source == NatMode::None && server.delivery == DeliveryMode::Nat);
        for server in servers {
            for backend in &server.backends {
                kept.keep(server.protocol, backend.address, 1, server.listen);
                for inner in inner(server.protocol, server.listen) {
                    kept.keep(server.protocol, backend.address, 1, inner);
                }
            }
        }
        kept
    }

    fn keep(&mut self, protocol: u8, target: SocketAddr, ports: u16, listen: SocketAddr) {
        let known = self.by_target.entry((protocol, target.ip())).or_default();
        let place = (target.port(), ports.max(1), listen);
        if target != listen && !known.contains(&place) {
            known.push(place);
            self.count += 1;
        }
    }

    pub fn is_empty(&self) -> bool {
        self.by_target.is_empty()
    }

    /// Where clients ask for this endpoint.
    pub fn listens(&self, protocol: u8, endpoint: SocketAddr) -> impl Iterator<Item = SocketAddr> + '_ {
        let known = self.by_target.get(&(protocol, endpoint.ip())).map_or(&[][..], Vec::as_slice);
        known.iter().filter_map(move |(first, ports, listen)| {
            let step = endpoint.port().checked_sub(*first).filter(|step| step < ports)?;
            Some(SocketAddr::new(listen.ip(), listen.port().checked_add(step)?))
        })
    }
}
