//! The backends behind the virtual server: they die and come back, and it is written down when.

use std::sync::{Mutex, MutexGuard, PoisonError};

use linux::clock::monotonic_ns;
use testbed::topology::Node;
use testbed::traffic::http;
use testbed::traffic::service::Service;
use testbed::traffic::tally::Witness;

use super::network::{BACKENDS, HTTP_PORT, backend};

/// Numbers of a backend's lives: backend 2 is 200 at first, then 201.
const LIVES: u32 = 100;

/// A death of a backend.
#[derive(Clone, Copy, Debug)]
struct Death {
    server: u32,
    at_ns: u64,
    /// When the gateway was seen to know; from then on no new connection may meet the dead one.
    known_ns: Option<u64>,
}

/// All backends.
pub(super) struct Farm {
    node: Node,
    backends: Mutex<Vec<Service>>,
    deaths: Mutex<Vec<Death>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Which backend a server's number means.
pub(super) fn backend_of(server: u32) -> usize {
    (server / LIVES) as usize
}

impl Farm {
    /// Starts all of them.
    pub(super) fn start(node: &Node) -> anyhow::Result<Farm> {
        let start = |number: usize| {
            Service::start(node, backend(number, HTTP_PORT), number as u32 * LIVES, http::serve)
        };
        let backends = (0..BACKENDS).map(start).collect::<Result<_, _>>()?;
        Ok(Farm { node: node.clone(), backends: Mutex::new(backends), deaths: Mutex::default() })
    }

    /// Ends a backend and all its connections.
    pub(super) fn kill(&self, number: usize) {
        let mut backends = lock(&self.backends);
        let Some(service) = backends.get_mut(number) else { return };
        // Written down first: what fails from now on has this reason.
        lock(&self.deaths).push(Death { server: service.number(), at_ns: monotonic_ns(), known_ns: None });
        service.kill();
    }

    /// The gateway knows of all deaths so far.
    pub(super) fn all_known(&self) {
        let now = monotonic_ns();
        for death in lock(&self.deaths).iter_mut() {
            death.known_ns.get_or_insert(now);
        }
    }

    /// Longest time from a death to the moment the gateway knew, ms.
    pub(super) fn slowest_detection_ms(&self) -> f64 {
        let time = |death: &Death| death.known_ns.map(|known| known.saturating_sub(death.at_ns));
        lock(&self.deaths).iter().filter_map(time).max().unwrap_or(0) as f64 / 1e6
    }

    /// Starts it again, under its next number, which is returned.
    pub(super) fn revive(&self, number: usize) -> anyhow::Result<u32> {
        let mut backends = lock(&self.backends);
        let Some(old) = backends.get_mut(number) else { return Ok(0) };
        let next = old.number() + 1;
        *old = Service::start(&self.node, backend(number, HTTP_PORT), next, http::serve)?;
        Ok(next)
    }
}

impl Witness for Farm {
    fn has_died(&self, server: u32) -> bool {
        lock(&self.deaths).iter().any(|death| death.server == server)
    }

    fn may_fail(&self, begun_ns: u64) -> bool {
        // Begun before the death too: the connection may have been on its way to the backend that died meanwhile.
        lock(&self.deaths).iter().any(|death| death.known_ns.is_none_or(|known| begun_ns <= known))
    }
}
