//! Hardware addresses of neighbors, as the kernel learns them (decision 0007).

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use linux::netlink::{Neighbor, NeighborChange, NeighborMonitor, NeighborState, Netlink};
use packet::attachment::InterfaceId;
use services::pipeline::Neighbors;

use crate::gateway::lock;

/// Neighbors that went stale are asked again this often …
const PROBE_NS: u64 = 10_000_000_000;
/// … so many at once.
const PROBES_MAX: usize = 256;
/// Neighbors without an answer that workers are told of at most; the kernel's own table is not larger by default.
const FAILED_MAX: usize = 4_096;

/// Neighbors, as the kernel reported them last.
#[derive(Default)]
pub(crate) struct NeighborWatch {
    /// To ask, and to be told; both or neither.
    kernel: Option<(Netlink, NeighborMonitor)>,
    /// Some may be missing or old: the kernel has to be asked, again until it answers.
    stale: bool,
    known: BTreeMap<(u32, IpAddr), Neighbor>,
    /// Device index and number of the open interfaces.
    interfaces: Vec<(u32, InterfaceId)>,
    probed_ns: u64,
}

impl NeighborWatch {
    /// Takes over what the kernel has learned since the last call, and tells the workers.
    pub fn follow(&mut self, engine: &crate::Shared) {
        let interfaces = lock(&engine.gateway.opened).indices();
        let mut changed = interfaces != self.interfaces;
        if self.kernel.is_none() {
            // Told before asked, so that nothing changes between the two.
            let monitor = NeighborMonitor::open();
            self.kernel = monitor.and_then(|monitor| Ok((Netlink::open()?, monitor))).ok();
            self.stale = true;
        }
        let changes = match &mut self.kernel {
            Some((_, monitor)) => monitor.read().unwrap_or_else(|_| vec![NeighborChange::Resync]),
            None => Vec::new(),
        };
        for change in changes {
            changed = true;
            match change {
                NeighborChange::Changed(neighbor) => {
                    self.known.insert((neighbor.index, neighbor.ip), neighbor);
                }
                NeighborChange::Gone(neighbor) => {
                    self.known.remove(&(neighbor.index, neighbor.ip));
                }
                NeighborChange::Resync => self.stale = true,
            }
        }
        changed |= self.stale && self.read_all();
        let now_ns = linux::clock::monotonic_ns();
        if now_ns.saturating_sub(self.probed_ns) >= PROBE_NS {
            self.probed_ns = now_ns;
            self.probe(&interfaces);
        }
        if changed {
            self.interfaces = interfaces;
            self.publish(engine);
        }
    }

    fn read_all(&mut self) -> bool {
        let Some((netlink, _)) = &self.kernel else { return false };
        let Ok(all) = netlink.all_neighbors() else { return false };
        self.stale = false;
        self.known = all.into_iter().map(|neighbor| ((neighbor.index, neighbor.ip), neighbor)).collect();
        true
    }

    /// The kernel does not see our packets: without a question now and then it would keep an address for ever.
    fn probe(&self, interfaces: &[(u32, InterfaceId)]) {
        let Some((netlink, _)) = &self.kernel else { return };
        let ours = |neighbor: &&Neighbor| interfaces.iter().any(|(index, _)| *index == neighbor.index);
        let stale = self.known.values().filter(|neighbor| neighbor.state == NeighborState::Stale);
        for neighbor in stale.filter(ours).take(PROBES_MAX) {
            let _ = netlink.probe_neighbor(neighbor.index, neighbor.ip);
        }
    }

    fn publish(&self, engine: &crate::Shared) {
        let place =
            |index: u32| self.interfaces.iter().find(|(known, _)| *known == index).map(|(_, place)| *place);
        let known: BTreeMap<_, _> = self
            .known
            .values()
            .filter(|neighbor| neighbor.state.is_usable())
            .filter_map(|neighbor| Some(((place(neighbor.index)?, neighbor.ip), neighbor.mac?)))
            .collect();
        let failed: BTreeSet<_> = self
            .known
            .values()
            .filter(|neighbor| neighbor.state == NeighborState::Failed)
            .filter_map(|neighbor| Some((place(neighbor.index)?, neighbor.ip)))
            .take(FAILED_MAX)
            .collect();
        let gateway = &engine.gateway;
        let old = gateway.neighbors.load();
        if old.known == known && old.failed == failed {
            return;
        }
        gateway.put_neighbors(Neighbors { version: old.version + 1, known, failed });
        engine.wake_all();
    }
}
