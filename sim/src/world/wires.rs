//! Datagrams over cables, frames between sites and their neighbors, packets out of a site's TUN device.

use std::net::IpAddr;

use packet::attachment::{Ingress, InterfaceId};
use packet::flow::FlowKey;
use packet::vnet::VirtioNetHeader;
use services::pipeline::ETHERNET_BYTES;
use tunnel::forwarder::Target;
use tunnel::time::Time;

use super::World;
use crate::cable::Datagram;
use crate::events::Event;
use crate::host::{Host, LAN_NS};
use crate::inner::{Emit, Place};
use crate::site::Readers;

impl World {
    /// Puts a host with this address beside a site's interface; returns its number.
    pub fn neighbor(&mut self, site: usize, interface: InterfaceId, address: [u8; 4]) -> usize {
        let number = self.hosts.len();
        let mac = [2, 0, 0, 1, (number >> 8) as u8, number as u8];
        self.hosts.push(Host { site, interface, address: address.into(), mac });
        number
    }

    /// Puts the datagrams of a core on the cable that leads to their address.
    pub(super) fn transmit(&mut self, site: usize, core: u8, target: &Target, segment: usize, bytes: &[u8]) {
        self.log("tx", [site as u64, u64::from(core), u64::from(target.path), bytes.len() as u64]);
        for datagram in bytes.chunks(segment.max(1)) {
            let Some(from) = self.sites[site].source_of(core, target, datagram.len()) else {
                self.sites[site].counters.send_errors += 1;
                continue;
            };
            let datagram = Datagram { from, to: target.route.remote, bytes: datagram.to_vec() };
            self.send(site, target.route.wan, datagram);
        }
    }

    /// Puts a datagram on the cable that leads to its address.
    pub fn send(&mut self, site: usize, wan: u16, mut datagram: Datagram) {
        let to = datagram.to.ip();
        let found = self.cables.iter().enumerate().find_map(|(number, cable)| {
            let direction = cable.ends.iter().position(|end| *end == (site, wan))?;
            let far = cable.ends[1 - direction];
            let reaches = match &cable.nat {
                Some(nat) if direction == 1 => nat.owns(to),
                _ => self.sites[far.0].owns(far.1, to),
            };
            reaches.then_some((number, direction))
        });
        let Some((number, direction)) = found else {
            self.totals.unroutable += 1;
            return;
        };
        if let Some(nat) = self.cables[number].nat.as_mut().filter(|_| direction == 0) {
            datagram.from = nat.outward(self.now, datagram.from, datagram.to);
        }
        self.cables[number].links[direction].enter(self.now, datagram);
        self.link(number, direction);
    }

    /// Datagrams that have come out of a link arrive.
    pub(super) fn link(&mut self, cable: usize, direction: usize) {
        while let Some((datagram, twice)) = self.cables[cable].links[direction].leave(self.now) {
            if twice {
                self.arrive(cable, direction, datagram.clone());
            }
            self.arrive(cable, direction, datagram);
        }
        self.look_at(cable, direction);
    }

    /// Makes an event for when something comes out of a link.
    pub(super) fn look_at(&mut self, cable: usize, direction: usize) {
        let link = &mut self.cables[cable].links[direction];
        let next = link.next();
        if link.wake <= self.now || next < link.wake {
            link.wake = next;
            if next < Time::MAX {
                self.schedule(next, Event::Link(cable, direction));
            }
        }
    }

    fn arrive(&mut self, cable: usize, direction: usize, mut datagram: Datagram) {
        let (site, wan) = self.cables[cable].ends[1 - direction];
        if let Some(nat) = self.cables[cable].nat.as_ref().filter(|_| direction == 1) {
            match nat.inward(self.now, datagram.from, datagram.to) {
                Some(inside) => datagram.to = inside,
                None => {
                    self.totals.unroutable += 1;
                    return;
                }
            }
        }
        self.receive(site, wan, datagram);
    }

    /// A datagram reaches a site's WAN.
    pub fn receive(&mut self, site: usize, wan: u16, datagram: Datagram) {
        self.log(
            "rx",
            [site as u64, u64::from(wan), datagram.bytes.len() as u64, u64::from(datagram.from.port())],
        );
        if !self.sites[site].running || !self.sites[site].owns(wan, datagram.to.ip()) {
            self.totals.unroutable += 1;
            return;
        }
        if self.keep {
            self.captured.push((site, datagram.clone()));
        }
        let at = &mut self.sites[site];
        let Some((reader, source)) = at.reader(wan, datagram.from, datagram.to, &datagram.bytes) else {
            at.counters.no_socket += 1;
            return;
        };
        at.counters.received += 1;
        if let Some(worker) = at.workers.get_mut(usize::from(reader)) {
            let stride = datagram.bytes.len();
            worker.round.ports.put_datagrams(source, stride, datagram.bytes);
            worker.dirty = true;
        }
    }

    /// A place sends a packet.
    pub(super) fn enter(&mut self, emit: Emit) {
        let Emit { from, offload, bytes } = emit;
        match from {
            Place::Site(site) => self.enter_tun(site, offload, &bytes),
            Place::Host(number) => {
                let host = self.hosts[number];
                let Some(mac) = self.sites[host.site].mac(host.interface) else { return };
                let event = Event::Frame(host.site, host.interface, offload, host.frame(mac, &bytes));
                self.schedule(self.now.plus_ns(LAN_NS), event);
            }
        }
    }

    /// A packet comes out of a site's TUN device.
    fn enter_tun(&mut self, site: usize, offload: VirtioNetHeader, bytes: &[u8]) {
        self.log("tun", [site as u64, bytes.len() as u64, 0, 0]);
        if !self.sites[site].running {
            return;
        }
        let reader = self.reader(site, Ingress::Host, bytes);
        self.apps.note_sender(site, bytes, reader);
        if let Some(worker) = self.sites[site].workers.get_mut(usize::from(reader)) {
            worker.round.ports.put_host(offload, bytes);
            worker.dirty = true;
        }
    }

    /// A frame reaches a site's interface.
    pub(super) fn frame(
        &mut self,
        site: usize,
        interface: InterfaceId,
        offload: VirtioNetHeader,
        bytes: Vec<u8>,
    ) {
        self.log("frame in", [site as u64, u64::from(interface.0), bytes.len() as u64, 0]);
        if !self.sites[site].running {
            return;
        }
        let packet = bytes.get(ETHERNET_BYTES..).unwrap_or_default();
        let reader = self.reader(site, Ingress::Interface(interface), packet);
        if let Some(worker) = self.sites[site].workers.get_mut(usize::from(reader)) {
            worker.round.ports.put_frame(interface, offload, bytes);
            worker.dirty = true;
        }
    }

    /// The core that reads a packet: of its flow by the hash, as the kernel's steering programs choose it, or any.
    fn reader(&mut self, site: usize, ingress: Ingress, packet: &[u8]) -> u8 {
        let at = &self.sites[site];
        if at.readers == Readers::Random {
            return self.random.u64(..u64::from(at.cores())) as u8;
        }
        let tenant = at.control.tenant_of(ingress);
        let ownership = at.node.ownership.load();
        FlowKey::of(packet).map_or(0, |key| ownership.owner_of_hash(ownership.hash(&key, tenant)))
    }

    /// A core's frame leaves by an interface.
    pub(super) fn send_frame(
        &mut self,
        site: usize,
        core: u8,
        interface: InterfaceId,
        offload: VirtioNetHeader,
        frame: &[u8],
    ) {
        let (Some(mac), Some(packet)) = (frame.first_chunk::<6>(), frame.get(ETHERNET_BYTES..)) else {
            return;
        };
        let to = |host: &Host| (host.site, host.interface, host.mac) == (site, interface, *mac);
        match self.hosts.iter().position(to) {
            Some(host) => {
                let event = Event::Host(host, core, offload, packet.to_vec());
                self.schedule(self.now.plus_ns(LAN_NS), event);
            }
            None => self.sites[site].counters.no_neighbor += 1,
        }
    }

    /// A site's kernel asks for a next hop, sends the packet there and remembers the neighbor.
    pub(super) fn resolve(
        &mut self,
        site: usize,
        core: u8,
        interface: InterfaceId,
        next_hop: IpAddr,
        offload: VirtioNetHeader,
        packet: Vec<u8>,
    ) {
        let to = |host: &Host| (host.site, host.interface) == (site, interface) && next_hop == host.address;
        let Some(host) = self.hosts.iter().position(to) else {
            self.sites[site].counters.no_neighbor += 1;
            return;
        };
        let mac = self.hosts[host].mac;
        self.sites[site].control.learn(interface, next_hop, mac);
        // Question, answer, packet.
        self.schedule(self.now.plus_ns(3 * LAN_NS), Event::Host(host, core, offload, packet));
    }

    /// A packet reaches a host.
    pub(super) fn host(&mut self, host: usize, core: u8, offload: &VirtioNetHeader, packet: &[u8]) {
        let site = self.hosts[host].site;
        self.came(Place::Host(host), (site, core), offload, packet);
    }
}
