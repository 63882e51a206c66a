//! Flows of backends that are down end, so that both ends learn it now and not by their own timers.
//!
//! * UDP, and TCP connections that are still being opened: the flow is forgotten, and the client's next packet begins anew
//!   with another backend.
//! * Live TCP connections, where [`Fate::Reset`] says so: each end gets a RST as the other would send it, through the flow's
//!   own translation. Its number is the next one that this gateway knows of. An end that lacks some of what was sent before
//!   answers it with a challenge ACK (RFC 5961 §3.2), which belongs to no flow any more; the reset that it gets for that has
//!   the number that it waits for.
//!
//! Nothing is looked at per packet: when [`crate::balance::Balancer::deaths`] has changed, the table is gone through once, a
//! part in each round.

use packet::attachment::{Egress, Ingress};
use packet::vnet::VirtioNetHeader;

use super::context::PacketContext;
use super::flows::is_embryonic;
use super::{Direction, ETHERNET_BYTES, Frame, Origin, Output, Services, established};
use crate::balance::Fate;
use crate::flow::FlowId;
use crate::icmp;
use crate::spec::TCP;

/// So many entries of the table are looked at in one round.
const ENTRIES: usize = 1_024;

/// Bytes of the longest RST.
const RESET_BYTES_MAX: usize = 60;

/// How far the search for flows of dead backends is.
pub(super) struct DeadBackends {
    /// Deaths that the last search, or the present one, knew of when it began.
    known: u64,
    /// Where the present search goes on.
    cursor: Option<u64>,
}

impl DeadBackends {
    /// Nothing to do after so many deaths.
    pub const fn new(known: u64) -> Self {
        Self { known, cursor: None }
    }
}

impl Services {
    /// Ends flows whose backend went down. Call it every round; whether it wants to be called again at once.
    pub fn end_dead(&mut self, now_ns: u64, out: &mut impl Output) -> bool {
        let deaths = self.routing.policy.balancer.deaths();
        if self.dead_backends.cursor.is_none() && deaths != self.dead_backends.known {
            // A death during a search is the next one's: searches come to an end however many backends die.
            self.dead_backends = DeadBackends { known: deaths, cursor: Some(0) };
        }
        let Some(cursor) = self.dead_backends.cursor else { return false };
        let (ids, next) = self.flows.table.scan(cursor, ENTRIES);
        self.dead_backends.cursor = next;
        for id in ids {
            self.end_if_dead(now_ns, id, out);
        }
        next.is_some() || self.dead_backends.known != deaths
    }

    fn end_if_dead(&mut self, now_ns: u64, id: FlowId, out: &mut impl Output) {
        let record = self.flows.table.record(id);
        let Some(backend) = record.backend.checked_sub(1) else { return };
        let fate = self.routing.policy.balancer.fate(backend);
        let opening = record.protocol != TCP || is_embryonic(record);
        if fate == Fate::Stay || established::is_over(record) || (fate == Fate::Move && !opening) {
            return;
        }
        if record.protocol == TCP {
            // Of a handshake that is not complete nobody can tell whether the client has the backend's answer.
            self.send_reset(now_ns, id, Direction::Reply, out);
            self.send_reset(now_ns, id, Direction::Original, out);
        }
        self.end(now_ns, id);
    }

    /// Sends the RST of a flow's one end to the other. Where there is no way any more nobody is told.
    fn send_reset(&mut self, now_ns: u64, id: FlowId, direction: Direction, out: &mut impl Output) {
        let record = *self.flows.table.record(id);
        let (original, reply) = self.flows.table.keys(id);
        let (key, tenant) = if direction == Direction::Original { original } else { reply };
        let seq = record.tcp_end[direction as usize];
        let came_by = match direction {
            Direction::Original => Some(record.ingress()),
            Direction::Reply => {
                self.target(id, Direction::Original).ok().and_then(|(egress, ..)| ingress_of(egress))
            }
        };
        // Nothing was sent in this direction.
        let (Some(ingress), false) = (came_by, seq == 0) else { return };
        let mut bytes = [0; ETHERNET_BYTES + RESET_BYTES_MAX];
        let room = bytes.get_mut(ETHERNET_BYTES..).unwrap_or_default();
        let Some(length) = icmp::abort(room, &key, seq) else { return };
        let Some(bytes) = bytes.get_mut(..ETHERNET_BYTES + length) else { return };
        let mut frame = Frame::new(ingress, VirtioNetHeader::default(), bytes);
        let Ok(packet) = PacketContext::read(now_ns, &frame, key, tenant, Origin::Wire) else { return };
        if self.established(&packet, &mut frame, (id, direction), out).is_ok() {
            self.counters.answers += 1;
            self.settle(frame, out);
        }
    }
}

/// By what replies come in from where packets leave, those that come by here at all.
pub(super) const fn ingress_of(egress: Egress) -> Option<Ingress> {
    match egress {
        Egress::Interface(id) => Some(Ingress::Interface(id)),
        Egress::Bond(id) => Some(Ingress::Bond(id)),
        Egress::Host | Egress::Kernel => Some(Ingress::Host),
        Egress::Core(_) | Egress::Unit(_) => None,
    }
}
