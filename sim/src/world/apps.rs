//! Applications: what their ends send, and what comes to them.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use packet::flow::FlowKey;
use packet::vnet::VirtioNetHeader;
use tunnel::time::Time;

use super::{World, host_address};
use crate::events::Event;
use crate::inner::packet::{Parsed, Socket, echo_reply, segments};
use crate::inner::ping::{PingFlow, PingSpec, PingStats};
use crate::inner::request::{RequestFlow, RequestSpec, RequestStats};
use crate::inner::tcp::{TcpFlow, TcpSpec};
use crate::inner::udp::{UdpFlow, UdpSpec, UdpStats};
use crate::inner::{App, Arrived, Emit, Ends, FIRST_PORT, Place, Side};

/// A flow that is silent for so long, ns, may have been forgotten: what comes next may begin another.
const FORGOTTEN_NS: u64 = 1_500_000_000;

/// An application and what is known about its packets.
struct Running {
    app: App,
    wake: Time,
    ends: Ends,
    expects: Expects,
    /// Where the server's packets come to, and from whom as it sees it: both stay for the life of the flow.
    seen: Option<(Place, Socket)>,
    /// When the server saw a packet last.
    seen_at: Time,
}

/// Source that a server sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expects {
    /// The client's own.
    Client,
    /// This address, and whatever port.
    Address(Ipv4Addr),
}

/// The core that gave out a flow's packets last, and how often it was another than before.
type Given = (u8, u32);

/// All applications.
#[derive(Default)]
pub(super) struct Apps {
    list: Vec<Running>,
    /// By place, address and port; where several applications share those, also by who sends.
    ends: BTreeMap<(Place, Socket, Option<Socket>), (usize, Side)>,
    /// By site, application and side: who gave out the packets that came there.
    given: BTreeMap<(usize, usize, bool), Given>,
    /// By site and application: the core that its packets entered on last.
    senders: BTreeMap<(usize, usize), u8>,
}

impl Apps {
    pub fn check(&self) -> Result<(), String> {
        for (number, running) in self.list.iter().enumerate() {
            let (corrupt, repeated) = running.app.faults();
            if corrupt > 0 {
                return Err(format!("{corrupt} packets of application {number} with wrong content"));
            }
            if repeated > 0 {
                return Err(format!("{repeated} packets of application {number} came twice"));
            }
        }
        Ok(())
    }

    pub fn forget_cores(&mut self, site: usize) {
        self.given.retain(|key, _| key.0 != site);
    }

    /// Notes the core that a packet out of a TUN device came to.
    pub fn note_sender(&mut self, site: usize, packet: &[u8], core: u8) {
        if let Ok(flow) = FlowKey::of(packet) {
            let port = flow.src_port.min(flow.dst_port).max(FIRST_PORT);
            self.senders.insert((site, usize::from(port - FIRST_PORT)), core);
        }
    }
}

impl World {
    /// An address and a free port of a client at this place.
    fn client(&mut self, place: Place) -> Socket {
        let address = match place {
            Place::Site(site) => host_address(site, (1 + self.apps.list.len() % 250) as u8),
            Place::Host(host) => self.hosts[host].address,
        };
        loop {
            let socket = (address, 30_000 + self.random.u64(..20_000) as u16);
            if !self.apps.ends.contains_key(&(place, socket, None)) {
                return socket;
            }
        }
    }

    /// An application from a client to servers that all answer for `target`.
    fn add(
        &mut self,
        client: Place,
        (servers, target): (&[(Place, Socket)], Socket),
        expects: Expects,
        app: impl FnOnce(Ends) -> App,
    ) -> usize {
        let source = self.client(client);
        let id = self.apps.list.len();
        let ends = Ends { id, client, source, target };
        self.apps.ends.insert((client, source, None), (id, Side::Client));
        let sender = (servers.len() > 1).then_some(source);
        for (place, socket) in servers {
            self.apps.ends.insert((*place, *socket, sender), (id, Side::Server));
        }
        let app = app(ends);
        self.apps.list.push(Running { app, wake: Time::MAX, ends, expects, seen: None, seen_at: Time::ZERO });
        self.wake_app_at(id, self.now);
        id
    }

    /// An application between hosts behind the TUN devices of two sites.
    fn between(&mut self, from: usize, to: usize, app: impl FnOnce(Ends) -> App) -> usize {
        let id = self.apps.list.len();
        let target = (host_address(to, (1 + id % 250) as u8), FIRST_PORT + id as u16);
        let servers = [(Place::Site(to), target)];
        self.add(Place::Site(from), (&servers, target), Expects::Client, app)
    }

    /// Starts a paced flow of datagrams from one site to another; returns its number.
    pub fn udp(&mut self, from: usize, to: usize, spec: UdpSpec) -> usize {
        self.between(from, to, |ends| App::Udp(Box::new(UdpFlow::new(ends, spec, false))))
    }

    /// Starts a TCP flow from one site to another.
    pub fn tcp(&mut self, from: usize, to: usize, spec: TcpSpec) -> usize {
        self.between(from, to, |ends| App::Tcp(Box::new(TcpFlow::new(ends, spec))))
    }

    /// Starts requests from one site to another.
    pub fn request(&mut self, from: usize, to: usize, spec: RequestSpec) -> usize {
        self.between(from, to, |ends| App::Request(RequestFlow::new(ends, spec)))
    }

    /// An application from a host to another one, which sees it come from the address `seen_as`.
    fn between_hosts(
        &mut self,
        from: usize,
        to: usize,
        seen_as: Ipv4Addr,
        app: impl FnOnce(Ends) -> App,
    ) -> usize {
        let target = (self.hosts[to].address, FIRST_PORT + self.apps.list.len() as u16);
        let expects = Expects::Address(seen_as);
        self.add(Place::Host(from), (&[(Place::Host(to), target)], target), expects, app)
    }

    /// Starts a paced flow of datagrams from a host to another one, which sends each of them back.
    pub fn host_udp(&mut self, from: usize, to: usize, seen_as: Ipv4Addr, spec: UdpSpec) -> usize {
        self.between_hosts(from, to, seen_as, |ends| App::Udp(Box::new(UdpFlow::new(ends, spec, true))))
    }

    /// Starts a TCP flow from a host to another one.
    pub fn host_tcp(&mut self, from: usize, to: usize, seen_as: Ipv4Addr, spec: TcpSpec) -> usize {
        self.between_hosts(from, to, seen_as, |ends| App::Tcp(Box::new(TcpFlow::new(ends, spec))))
    }

    /// Starts a paced flow of datagrams from a host to a virtual server, one of whose backends sends each of them back.
    /// The backends see the client's own address.
    pub fn server_udp(
        &mut self,
        from: usize,
        listen: Socket,
        backends: &[(usize, u16)],
        spec: UdpSpec,
    ) -> usize {
        let socket = |(host, port): &(usize, u16)| (Place::Host(*host), (self.hosts[*host].address, *port));
        let servers: Vec<_> = backends.iter().map(socket).collect();
        self.add(Place::Host(from), (&servers, listen), Expects::Client, |ends| {
            App::Udp(Box::new(UdpFlow::new(ends, spec, true)))
        })
    }

    /// Starts ICMP echo requests from a host to an address.
    pub fn ping(&mut self, from: usize, to: Ipv4Addr, spec: PingSpec) -> usize {
        let target = (to, 0);
        self.add(Place::Host(from), (&[], target), Expects::Client, |ends| {
            App::Ping(PingFlow::new(ends, spec))
        })
    }

    /// Gives a UDP flow's packets these DSCPs in turn.
    pub fn mark_udp(&mut self, app: usize, dscps: &[u8]) {
        if let App::Udp(flow) = &mut self.apps.list[app].app {
            flow.mark(dscps.to_vec());
        }
    }

    /// Statistics of a UDP flow's server.
    pub fn udp_stats(&self, app: usize) -> UdpStats {
        self.udp_flow(app).map(|flow| flow.stats().clone()).unwrap_or_default()
    }

    /// Numbers that do not come to the end of a UDP flow's way.
    pub fn udp_missing(&self, app: usize) -> Vec<u64> {
        self.udp_flow(app).map(UdpFlow::missing).unwrap_or_default()
    }

    fn udp_flow(&self, app: usize) -> Option<&UdpFlow> {
        match &self.apps.list[app].app {
            App::Udp(flow) => Some(flow),
            _ => None,
        }
    }

    /// The core of `site` on which an application's packets entered the tunnel last.
    pub fn sending_core(&self, site: usize, app: usize) -> Option<u8> {
        self.apps.senders.get(&(site, app)).copied()
    }

    /// The core of `site` that gave out an application's packets last, and how often that was another than before.
    pub fn delivering_core(&self, site: usize, app: usize) -> Option<(u8, u32)> {
        self.apps.given.iter().find(|(key, _)| (key.0, key.1) == (site, app)).map(|(_, given)| *given)
    }

    /// Where an application's packets come to its server, once one has.
    pub fn served_at(&self, app: usize) -> Option<Place> {
        self.apps.list[app].seen.map(|(place, _)| place)
    }

    /// Measures a UDP flow's gaps and delays, or a TCP flow's gaps, from now on.
    pub fn reset_gap(&mut self, app: usize) {
        let now = self.now;
        match &mut self.apps.list[app].app {
            App::Udp(flow) => flow.reset_gap(now),
            App::Tcp(flow) => flow.reset_gap(),
            _ => {}
        }
    }

    /// A TCP flow, if `app` is one.
    pub fn tcp_flow(&self, app: usize) -> Option<&TcpFlow> {
        match &self.apps.list[app].app {
            App::Tcp(flow) => Some(flow),
            _ => None,
        }
    }

    /// Statistics of a request client.
    pub fn request_stats(&self, app: usize) -> RequestStats {
        match &self.apps.list[app].app {
            App::Request(flow) => flow.stats().clone(),
            _ => RequestStats::default(),
        }
    }

    /// Statistics of an ICMP echo client.
    pub fn ping_stats(&self, app: usize) -> PingStats {
        match &self.apps.list[app].app {
            App::Ping(flow) => flow.stats().clone(),
            _ => PingStats::default(),
        }
    }

    fn wake_app_at(&mut self, app: usize, at: Time) {
        if at < self.apps.list[app].wake {
            self.apps.list[app].wake = at;
            self.schedule(at, Event::App(app));
        }
    }

    pub(super) fn wake_app(&mut self, app: usize) {
        if self.apps.list[app].wake <= self.now {
            self.apps.list[app].wake = Time::MAX;
            self.poll_app(app);
        }
    }

    fn poll_app(&mut self, app: usize) {
        let mut emitted = Vec::new();
        let next = self.apps.list[app].app.poll(self.now, &mut emitted);
        if next < Time::MAX {
            self.wake_app_at(app, next.max(self.now.plus_ns(1)));
        }
        for emit in emitted {
            self.enter(emit);
        }
    }

    /// A packet or super-packet came to a place, given out by this core of a site.
    pub(super) fn came(&mut self, place: Place, by: (usize, u8), offload: &VirtioNetHeader, packet: &[u8]) {
        let Ok(packets) = segments(offload, packet) else {
            self.totals.damaged += 1;
            return;
        };
        for (mut packet, partial) in packets {
            let flow = FlowKey::of(&packet);
            match Parsed::of(&mut packet, partial) {
                Some(parsed) => self.parsed(place, by, flow.ok(), parsed),
                None => self.totals.damaged += 1,
            }
        }
    }

    fn parsed(&mut self, place: Place, by: (usize, u8), flow: Option<FlowKey>, packet: Parsed<'_>) {
        if packet.is_echo_request {
            let (offload, bytes) = echo_reply(&packet);
            self.enter(Emit { from: place, offload, bytes });
            return;
        }
        let senders = [Some(packet.from), None];
        let end = senders.iter().find_map(|from| self.apps.ends.get(&(place, packet.to, *from)));
        let Some((app, side)) = end.copied() else {
            self.totals.misdelivered += 1;
            return;
        };
        if !self.apps.list[app].is_from_the_other_end(self.now, place, side, &packet) {
            self.totals.misdelivered += 1;
            return;
        }
        self.note_core(by, (app, side), place, flow);
        let arrived = Arrived { side, place, packet };
        let mut emitted = Vec::new();
        self.apps.list[app].app.packet(self.now, &arrived, &mut emitted);
        for emit in emitted {
            self.enter(emit);
        }
        self.poll_app(app);
    }

    /// Rows T3 and T4: what a site told its peer decides the core, for every packet of the flow.
    fn note_core(
        &mut self,
        (site, core): (usize, u8),
        (app, side): (usize, Side),
        place: Place,
        flow: Option<FlowKey>,
    ) {
        let given = self.apps.given.entry((site, app, side == Side::Server)).or_insert((core, 0));
        if given.0 != core {
            self.totals.flows_split += 1;
            *given = (core, given.1 + 1);
        }
        let at = &mut self.sites[site];
        if let (Place::Site(_), Some(flow)) = (place, flow) {
            let ownership = at.node.ownership.load();
            let owner = ownership.owner_of_hash(ownership.hash(&flow, 0));
            at.counters.foreign += u64::from(owner != core);
        }
    }
}

impl Running {
    fn is_from_the_other_end(&mut self, now: Time, place: Place, side: Side, packet: &Parsed<'_>) -> bool {
        if side == Side::Client {
            return packet.from.0 == self.ends.target.0
                && (packet.protocol == 1 || packet.from.1 == self.ends.target.1);
        }
        let expected = match self.expects {
            Expects::Client => packet.from == self.ends.source,
            Expects::Address(address) => packet.from.0 == address,
        };
        if now.since(self.seen_at) > FORGOTTEN_NS {
            self.seen = None;
        }
        self.seen_at = now;
        let seen = *self.seen.get_or_insert((place, packet.from));
        expected && seen == (place, packet.from)
    }
}
