//! Ports of an address that the host shares with address translation.
//!
//! The host may send from a port that a translated flow has: a program opened it since. What it sends to others is no matter, since
//! a flow is known by both of its ends. What it sends to the same remote end would be answered to the flow's client. So the
//! kernel's program at the interface (which the counts here are for) sends the host's packets from such ports by the TUN
//! device, and one that is in a flow's way gets another port, as a client's does; its answers come in by the interface with the
//! program's own port again.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use packet::attachment::Ingress;
use packet::flow::FlowKey;

use super::context::PacketContext;
use super::{Frame, Services, established};
use crate::flow::{FlowId, Record, flags};
use crate::policy::Policy;
use crate::route::RouteQuery;
use crate::spec::{TCP, UDP};
use crate::tcp::{ACK, RST, SYN};

/// How many flows of all cores have each port or query id, by its number: 65,536 counts, which others may read.
#[derive(Clone, Default)]
pub struct PortCounts(Option<Arc<dyn AsRef<[AtomicU32]> + Send + Sync>>);

impl PortCounts {
    /// Counts there.
    #[must_use]
    pub fn new(counts: Arc<dyn AsRef<[AtomicU32]> + Send + Sync>) -> Self {
        Self(Some(counts))
    }

    /// A flow begins or ends: its outside port counts, and that of a program of the host which has another one outside.
    pub(super) fn note(&self, original: &FlowKey, reply: &FlowKey, record: &Record, begins: bool) {
        let Some(counts) = self.0.as_deref().filter(|_| record.flags & flags::SOURCE_NAT != 0) else {
            return;
        };
        let of_host = (record.ingress() == Ingress::Host).then(|| original.sender_port());
        for port in [Some(reply.reversed().sender_port()), of_host].into_iter().flatten() {
            let Some(count) = counts.as_ref().get(usize::from(port)) else { continue };
            // Nobody orders anything by the counts.
            if begins {
                count.fetch_add(1, Ordering::Relaxed);
            } else {
                count.fetch_sub(1, Ordering::Relaxed);
            }
        }
    }
}

impl fmt::Debug for PortCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("PortCounts").field(&self.0.is_some()).finish()
    }
}

impl Services {
    /// Counts the ports of flows there from now on; to be called before the first one.
    pub fn set_port_counts(&mut self, counts: PortCounts) {
        self.flows.ports = counts;
    }

    /// Sends a packet of the host's own on as it is, if it comes from an address that address translation shares with the host and
    /// is in no flow's way. `false`: it is another one, or needs another port.
    pub(super) fn goes_untranslated(
        &mut self,
        policy: &Policy,
        packet: &PacketContext,
        frame: &mut Frame<'_>,
    ) -> bool {
        let PacketContext { key, tenant, .. } = packet;
        if !is_shared_port(policy, packet.ingress, key) || self.is_in_the_way(policy, packet, frame) {
            return false;
        }
        let query = RouteQuery { tenant: *tenant, ingress: Some(Ingress::Host), key: *key, before: None };
        let Ok(route) = policy.route(&query) else { return false };
        if route.egress.interface().is_none() {
            return false;
        }
        let hop = ((route.egress, route.via.unwrap_or(key.dst), route.mtu), key.dst.is_ipv4());
        established::address(frame, &self.routing.unnumbered(hop));
        self.went_on(&packet.header);
        true
    }

    /// Whether the answers would be taken for those of a flow. TCP in the middle of a connection keeps its port whatever comes of it.
    fn is_in_the_way(&self, policy: &Policy, packet: &PacketContext, frame: &Frame<'_>) -> bool {
        if packet.header.protocol == TCP {
            let opens = |flags: &u8| flags & (SYN | ACK | RST) == SYN;
            if !packet.header.payload(frame.packet()).get(13).is_some_and(opens) {
                return false;
            }
        }
        // The mapping of an endpoint gets what anybody sends there, and may be another core's; but for ports that the host is known to have.
        let key = &packet.key;
        let mapped = policy.owners.maps_endpoints
            && matches!(packet.header.protocol, TCP | UDP)
            && !self.nat.is_of_host(packet.header.protocol, key.src, key.src_port);
        mapped || self.flows.find(&packet.key.reversed(), packet.tenant).is_some()
    }

    /// Whether the answers of a flow go to the host by the interface that they come in by, as answers to the host do.
    pub(super) fn is_hosts_by_device(&self, id: FlowId) -> bool {
        let ((original, _), _) = self.flows.table.keys(id);
        let ingress = self.flows.table.record(id).ingress();
        is_shared_port(&self.routing.policy, ingress, &original)
    }
}

/// Whether the host sends this from an address that address translation shares with it, to somebody else.
fn is_shared_port(policy: &Policy, ingress: Ingress, key: &FlowKey) -> bool {
    ingress == Ingress::Host
        && policy.nat.is_outside(key.src)
        && policy.is_own(key.src)
        && !policy.is_own(key.dst)
}
