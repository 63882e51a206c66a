//! Frames of the TAP device and Ethernet frames of bonds, at one core (row T14).
//!
//! A frame goes to the core that owns its flow, decided by that core's [`Switch`]: to the TAP device, to bonds, or back as
//! an answer. Frames that many hear all go to one core ([`EthernetFlow::SHARED`]), also when the peer sent them to another.
//! While the tunnel is at work on what it received, frames for bonds wait.

use std::sync::Arc;

use packet::attachment::{BondId, Ingress, Placement};
use packet::ethernet::{EthernetFlow, EthernetHeader};
use packet::vnet::{NEEDS_CSUM, VirtioNetHeader};
use packet::{DropReason, IpHeader, PacketBuf, PacketPool};
use services::hash::SecretState;
use steering::ownership::Ownership;
use tunnel::bond::reduce;
use tunnel::forwarder::Delivered;
use tunnel::forwarder::ethernet::HOPS_BYTES;
use tunnel::time::Time;

use crate::datapath::{COPY_BYTES_MAX, Datapath};
use crate::delivery::Decision;
use crate::ethernet::{News, Port, Settings, Switch, SwitchCounters, Verdict};
use crate::handed::Handed;
use crate::place::Told;
use crate::ports::Output;
use crate::to_bond::Transmit;

/// How often a frame of our own LAN may go from peer to peer.
const HOPS: u8 = 8;
/// Frames for bonds that wait until the tunnel is done with what it received.
const WAITING_MAX: usize = 1_024;

/// The switch of a node, as control publishes it.
#[derive(Debug)]
pub struct Lan {
    /// Settings of the switch.
    pub settings: Settings,
    /// Key of its tables and proofs: the same at all cores, for the life of the process.
    pub secret: SecretState,
}

/// State of the switch at one core, for reports.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LanReport {
    /// Counts of this core.
    pub counters: SwitchCounters,
    /// Stations in the LAN and behind each peer; the same at every core.
    pub lan_stations: usize,
    /// Behind each peer.
    pub peer_stations: Vec<(BondId, usize)>,
    /// Addresses whose owner is known; at the core that has the frames that many hear.
    pub neighbors: usize,
    /// The TAP device stands by: its LAN is joined elsewhere.
    pub standby: bool,
}

/// The switch at one core; none without a TAP device.
#[derive(Debug, Default)]
pub(crate) struct CoreLan {
    published: Option<Arc<Lan>>,
    switch: Option<Switch>,
    waiting: Vec<(BondId, PacketBuf)>,
}

impl CoreLan {
    /// Takes over what control has published.
    pub fn follow(&mut self, published: Option<&Arc<Lan>>) {
        let same = match (&self.published, published) {
            (Some(old), Some(new)) => Arc::ptr_eq(old, new),
            (None, None) => true,
            _ => false,
        };
        if same {
            return;
        }
        self.published = published.cloned();
        match (published, &mut self.switch) {
            (Some(lan), Some(switch)) => switch.configure(lan.settings.clone()),
            (Some(lan), None) => self.switch = Some(Switch::new(lan.settings.clone(), lan.secret.clone())),
            (None, _) => self.switch = None,
        }
    }

    /// A frame for a bond waits.
    fn wait(&mut self, bond: BondId, frame: PacketBuf) -> bool {
        let room = self.waiting.len() < WAITING_MAX;
        if room {
            self.waiting.push((bond, frame));
        }
        room
    }

    /// Tells the other cores what this one learnt.
    fn share(&mut self, id: u8, ownership: &Ownership, out: &mut impl Output) {
        let Some(news) = self.switch.as_mut().map(Switch::news).filter(|news| !news.is_empty()) else {
            return;
        };
        for core in (0..ownership.cores).filter(|core| *core != id && ownership.is_alive(*core)) {
            for news in &news {
                if !out.hand_over(core, Handed::LanNews(*news)) {
                    // It will learn by itself; until then it floods.
                    out.dropped(DropReason::RingFull);
                }
            }
        }
    }
}

/// The core that has the frames that many hear.
fn shared_core(ownership: &Ownership) -> u8 {
    ownership.owner_of_hash(ownership.hash(&EthernetFlow::SHARED, 0))
}

impl Datapath {
    /// A frame or super-frame of the TAP device. The buffer may be another one afterwards.
    pub fn tap(&mut self, now: Time, packet: &mut PacketBuf, out: &mut impl Output) {
        packet.ingress = Ingress::Host;
        let flow = EthernetHeader::parse(packet.packet()).map(|h| EthernetFlow::of(&h, packet.packet()));
        let owner = match flow {
            Ok(flow) => self.ownership.owner_of_hash(self.ownership.hash(&flow.key, 0)),
            Err(reason) => return self.drops.add(reason),
        };
        if owner == self.id {
            return self.own_tap(now, packet, out);
        }
        let handed = if packet.len() <= COPY_BYTES_MAX {
            self.pool.copy(packet.packet(), &packet.offload, Ingress::Host)
        } else {
            let spare = self.pool.take(packet.capacity());
            Some(std::mem::replace(packet, spare))
        };
        if let Some(handed) = handed {
            self.hand_over(owner, Handed::Frame(handed), out);
        }
    }

    /// A frame of the TAP device at the core of its flow.
    pub(crate) fn own_tap(&mut self, now: Time, packet: &mut PacketBuf, out: &mut impl Output) {
        let Some(switch) = &mut self.lan.switch else {
            return self.drops.add(DropReason::EthernetNotAllowed);
        };
        let verdict = switch.frame(now.ns(), Port::Tap, HOPS, packet.packet_mut());
        let offload = packet.offload.with_front(HOPS_BYTES as u16);
        match verdict {
            Verdict::To(Port::Bond(bond)) => {
                put_hops(packet);
                self.tunnel.frame(now, bond, &offload, packet.packet(), &mut Transmit(out));
            }
            Verdict::Flood { peers: true, .. } => {
                put_hops(packet);
                for bond in &switch.settings().peers {
                    self.tunnel.frame(now, *bond, &offload, packet.packet(), &mut Transmit(out));
                }
            }
            Verdict::Answer(frame) => out.tap(&VirtioNetHeader::default(), &frame),
            Verdict::Drop(reason) => self.drops.add(reason),
            Verdict::To(Port::Tap) | Verdict::Flood { .. } | Verdict::Heard => {}
        }
        self.lan.share(self.id, &self.ownership, out);
    }

    /// News of another core.
    pub(crate) fn lan_news(&mut self, news: &News) {
        if let Some(switch) = &mut self.lan.switch {
            switch.hear(news);
        }
    }

    /// Timers of the switch; when they are due again.
    pub(crate) fn tick_lan(&mut self, now: Time, out: &mut impl Output) -> Time {
        let Some(switch) = &mut self.lan.switch else { return Time::MAX };
        let speaks = shared_core(&self.ownership) == self.id;
        if let Some((word, forget)) = switch.tick(now.ns(), speaks) {
            out.tap(&VirtioNetHeader::default(), &word);
            for bond in forget.iter().flat_map(|_| &switch.settings().peers) {
                let body = [&[HOPS][..], forget.as_deref().unwrap_or_default()].concat();
                self.tunnel.frame(now, *bond, &VirtioNetHeader::default(), &body, &mut Transmit(out));
            }
        }
        Time::from_ns(switch.next_ns(speaks))
    }

    /// Sends frames that came by bonds to other bonds; whether there were any.
    pub(crate) fn send_frames(&mut self, now: Time, out: &mut impl Output) -> bool {
        if self.lan.waiting.is_empty() {
            return false;
        }
        let mut waiting = std::mem::take(&mut self.lan.waiting);
        for (bond, frame) in waiting.drain(..) {
            let offload = frame.offload.with_front(HOPS_BYTES as u16);
            self.tunnel.frame(now, bond, &offload, frame.packet(), &mut Transmit(out));
            self.pool.recycle(frame);
        }
        self.lan.waiting = waiting;
        true
    }

    /// State of the switch, if there is one.
    #[must_use]
    pub fn lan_report(&self, now_ns: u64) -> Option<LanReport> {
        let switch = self.lan.switch.as_ref()?;
        let stations = switch.stations();
        Some(LanReport {
            counters: switch.counters,
            lan_stations: stations.get(&Port::Tap).copied().unwrap_or(0),
            peer_stations: stations
                .iter()
                .filter_map(|(port, count)| match port {
                    Port::Bond(bond) => Some((*bond, *count)),
                    Port::Tap => None,
                })
                .collect(),
            neighbors: switch.neighbors(),
            standby: switch.stands_by(now_ns),
        })
    }
}

/// Our own frame: all hops are left.
fn put_hops(packet: &mut PacketBuf) {
    packet.grow_front(HOPS_BYTES).fill(HOPS);
}

impl<O: Output> Decision<'_, O> {
    /// A frame that a bond delivered, behind its hops: decided here, or by the core of its flow.
    pub(crate) fn bond_frame(&mut self, now_ns: u64, ingress: Ingress, body: &[u8], how: Delivered) {
        let frame = body.get(HOPS_BYTES..).unwrap_or_default();
        let header = match EthernetHeader::parse(frame) {
            Ok(header) => header,
            Err(reason) => return self.out.dropped(reason),
        };
        let owner = self.core_of_frame(now_ns, ingress, &header, frame, how.placement);
        let offload = if how.partial { partial_checksum(&header, frame) } else { VirtioNetHeader::default() };
        let Some(mut copy) = self.pool.copy(body, &offload, ingress) else {
            return self.out.dropped(DropReason::TooBig);
        };
        if owner != self.id {
            if !self.out.hand_over(owner, Handed::Frame(copy)) {
                self.out.dropped(DropReason::RingFull);
            }
            return;
        }
        self.decide_frame(now_ns, &mut copy);
        self.pool.recycle(copy);
    }

    /// The core that has a frame of a bond, by its header and what its datagram told.
    fn core_of_frame(
        &mut self,
        now_ns: u64,
        ingress: Ingress,
        header: &EthernetHeader,
        frame: &[u8],
        placement: Placement,
    ) -> u8 {
        let flow = EthernetFlow::of(header, frame);
        let shared = (flow.key == EthernetFlow::SHARED).then(|| shared_core(self.ownership));
        if shared.is_none() {
            self.out.processed(self.ownership.hasher.hash(&flow.key, 0));
        }
        let rules = self.bonds.rules(ingress);
        let hash = || self.ownership.hash(&reduce(&flow.key, rules.flow, flow.dscp), rules.tenant);
        match placement {
            Placement::Here => shared.unwrap_or(self.id),
            Placement::Core(core) if self.ownership.is_alive(core) => shared.unwrap_or(core),
            Placement::ByFlow { tell: Some(peer_core) } => {
                let hash = hash();
                let core = shared.unwrap_or_else(|| self.ownership.owner_of_hash(hash));
                if let Ingress::Bond(bond) = ingress {
                    self.placer.tell(now_ns, Told { bond, peer_core, hash, core });
                }
                core
            }
            _ => shared.unwrap_or_else(|| self.ownership.owner_of_hash(hash())),
        }
    }

    /// A frame that came by a bond, behind its hops, at the core of its flow.
    pub(crate) fn decide_frame(&mut self, now_ns: u64, packet: &mut PacketBuf) {
        let (Some(switch), Ingress::Bond(bond)) = (&mut self.lan.switch, packet.ingress) else {
            return self.out.dropped(DropReason::EthernetNotAllowed);
        };
        let offload = packet.offload;
        let Some((hops, frame)) = packet.packet_mut().split_first_mut() else { return };
        let verdict = switch.frame(now_ns, Port::Bond(bond), *hops, frame);
        *hops = hops.saturating_sub(1).min(HOPS);
        match verdict {
            Verdict::To(Port::Tap) => self.out.tap(&offload, frame),
            Verdict::To(Port::Bond(to)) => {
                let spare = self.pool.take(packet.capacity());
                let taken = std::mem::replace(packet, spare);
                self.wait(to, Some(taken));
            }
            Verdict::Flood { tap, peers } => {
                if tap {
                    self.out.tap(&offload, frame);
                }
                if peers {
                    let others = switch.settings().peers.iter().filter(|to| **to != bond);
                    let others: Vec<BondId> = others.copied().collect();
                    for to in others {
                        let copy = copy_of(self.pool, packet);
                        self.wait(to, copy);
                    }
                }
            }
            Verdict::Answer(frame) => {
                let mut answer = self.pool.copy(&frame, &VirtioNetHeader::default(), Ingress::Host);
                answer.as_mut().into_iter().for_each(put_hops);
                self.wait(bond, answer);
            }
            Verdict::Drop(reason) => self.out.dropped(reason),
            Verdict::Heard => {}
        }
        self.lan.share(self.id, self.ownership, self.out);
    }

    fn wait(&mut self, bond: BondId, frame: Option<PacketBuf>) {
        if !frame.is_some_and(|frame| self.lan.wait(bond, frame)) {
            self.out.dropped(DropReason::QueueFull);
        }
    }
}

fn copy_of(pool: &mut PacketPool, packet: &PacketBuf) -> Option<PacketBuf> {
    pool.copy(packet.packet(), &packet.offload, packet.ingress)
}

/// Offload of a frame whose checksum is that of the pseudo-header only; counts from the frame.
fn partial_checksum(header: &EthernetHeader, frame: &[u8]) -> VirtioNetHeader {
    let packet = frame.get(header.payload_at..).unwrap_or_default();
    let ip = header.ip_at().and_then(|_| IpHeader::parse(packet).ok());
    let Some((start, at)) = ip.as_ref().and_then(packet::segment::checksum_place) else {
        return VirtioNetHeader::default();
    };
    VirtioNetHeader {
        flags: NEEDS_CSUM,
        csum_start: (header.payload_at + start) as u16,
        csum_offset: (at - start) as u16,
        ..VirtioNetHeader::default()
    }
}
