//! Endpoints of the gateway's own that lead to services: what comes for a service by a device of the host that is no interface, the
//! kernel translates there, as it passes on to any other host, and the datapath takes it for what was asked.

use std::net::{IpAddr, SocketAddr};

use hashbrown::HashMap;

use crate::hash::ConfigState;
use crate::spec::InnerSpec;

/// Where what comes to such an endpoint was sent.
#[derive(Debug, Default)]
pub(super) struct Inners {
    listens: HashMap<(u8, SocketAddr), SocketAddr, ConfigState>,
    addresses: Vec<IpAddr>,
}

impl Inners {
    pub fn of(specs: &[InnerSpec]) -> Self {
        let mut inners = Self::default();
        for spec in specs {
            inners.listens.insert((spec.protocol, spec.inner), spec.listen);
            if !inners.addresses.contains(&spec.inner.ip()) {
                inners.addresses.push(spec.inner.ip());
            }
        }
        inners
    }

    /// Where the service listens that an endpoint leads to.
    #[inline]
    pub fn listen(&self, protocol: u8, inner: SocketAddr) -> Option<SocketAddr> {
        if !self.has(inner.ip()) {
            return None;
        }
        self.listens.get(&(protocol, inner)).copied()
    }

    /// Whether an address is one of these endpoints'.
    #[inline]
    pub fn has(&self, address: IpAddr) -> bool {
        self.addresses.contains(&address)
    }
}
