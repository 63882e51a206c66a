//! The fast path of nearly all packets: whole TCP and UDP without IP options, of a flow that is decided and answered.
//!
//! It has to do exactly what [`Services::established`] does, in half the time. Whatever is unusual it leaves to that, untouched.

use packet::attachment::Ingress;
use packet::ip::{IPV4_HEADER_BYTES, IPV6_HEADER_BYTES};

use super::flows::{is_embryonic, tick_of};
use super::next_hops::NOWHERE;
use super::{ETHERNET_BYTES, Frame, Look, Services, established};
use crate::flow::{Direction, flags};
use crate::rewrite;
use crate::spec::{TCP, UDP};
use crate::tcp::{self, Segment};

/// Fields of an IP header that the fast path needs.
struct Head {
    header_bytes: usize,
    total_bytes: usize,
    protocol: u8,
    ttl: u8,
}

impl Head {
    /// `None`: anything but whole TCP or UDP directly behind the fixed header.
    #[inline]
    fn of(packet: &[u8]) -> Option<Self> {
        let fixed = packet.first_chunk::<IPV4_HEADER_BYTES>()?;
        let head = match fixed[0] {
            0x45 if (fixed[6] & 0x3f) | fixed[7] == 0 => Self {
                header_bytes: IPV4_HEADER_BYTES,
                total_bytes: usize::from(u16::from_be_bytes([fixed[2], fixed[3]])),
                protocol: fixed[9],
                ttl: fixed[8],
            },
            0x60..=0x6f => Self {
                header_bytes: IPV6_HEADER_BYTES,
                total_bytes: IPV6_HEADER_BYTES + usize::from(u16::from_be_bytes([fixed[4], fixed[5]])),
                protocol: fixed[6],
                ttl: fixed[7],
            },
            _ => return None,
        };
        let upper_bytes = match head.protocol {
            UDP => 8,
            TCP => 20,
            _ => return None,
        };
        (head.total_bytes <= packet.len() && head.header_bytes + upper_bytes <= head.total_bytes)
            .then_some(head)
    }
}

impl Services {
    /// Sends the packet on if there is nothing unusual about it. `false`: nothing has changed.
    #[inline]
    pub(super) fn established_fast(&mut self, now_ns: u64, frame: &mut Frame<'_>, look: &Look) -> bool {
        #[cfg(test)]
        if self.fast_path.off {
            return false;
        }
        let Some((id, direction)) = look.found else { return false };
        if frame.ingress == Ingress::Host {
            return false;
        }
        let Some(packet) = frame.bytes.get_mut(ETHERNET_BYTES..) else { return false };
        let Some(head) = Head::of(packet) else { return false };
        let partial = frame.offload.needs_csum_at(head.header_bytes);
        let Some(mut flow) = self.flows.table.for_packet(id, direction) else { return false };
        let record = &mut *flow.record;
        let Some(hop) = self.routing.hops.get(record.next_hop[direction as usize]) else { return false };
        let decided =
            record.era == self.routing.era && record.flags & (flags::PROXY_PROTOCOL | flags::LEARNS_IDS) == 0;
        let answered = record.flags & flags::REPLIED != 0
            || (direction == Direction::Original && !tcp::is_answered_unseen(record));
        // Both directions come in where the other one leaves; the first packet's ingress is noted.
        let came = match direction {
            Direction::Original => record.in_port,
            Direction::Reply => {
                let other = self.routing.hops.get(record.next_hop[Direction::Original as usize]);
                other.map_or(NOWHERE, |hop| hop.back)
            }
        };
        let fits = frame.offload.gso_size == 0 && head.total_bytes <= usize::from(hop.mtu);
        if !(decided && answered && came == frame.ingress.compact() && fits && head.ttl > 1 && !hop.failed) {
            return false;
        }
        if head.protocol == TCP {
            let upper = packet.get(head.header_bytes..head.total_bytes).unwrap_or_default();
            let Some(segment) = Segment::of(upper) else { return false };
            if is_embryonic(record) || !tcp::follow_data(record, direction, &segment) {
                return false;
            }
        }
        record.seen = tick_of(now_ns);
        flow.count(head.total_bytes as u32);
        rewrite::send_on(packet, head.total_bytes, head.protocol, partial, flow.leaves_as.as_ref());
        established::address(frame, hop);
        frame.flow = Some((id, direction));
        #[cfg(test)]
        {
            self.fast_path.taken += 1;
        }
        self.counters.tx_packets += 1;
        self.counters.tx_bytes += head.total_bytes as u64;
        true
    }
}
