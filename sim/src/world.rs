//! The world: sites, cables between their WANs, hosts beside their interfaces, applications on them, and one queue of
//! events.
//!
//! An event is a datagram that comes out of a link, a frame that reaches a site or a host, something that a core
//! handed to another, a core, a control thread or an application that wants to be woken. Events of one moment run in the
//! order in which they were made; then every core that got something runs one round, in order of site and core. Nothing
//! depends on anything but the seed.
//!
//! * `apps`: applications and what comes to their ends.
//! * `cores`: rounds of the cores, what they hand over, control threads.
//! * `wires`: datagrams over cables, frames between hosts and interfaces.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use packet::attachment::BondId;
use tunnel::config::{Peer, Wan};
use tunnel::time::Time;

use crate::cable::{Cable, Datagram, Link};
use crate::events::{Event, Events};
use crate::host::Host;
use crate::link::Shape;
use crate::log::Log;
use crate::nat::Nat;
use crate::site::Site;
use fastrand::Rng;

mod apps;
mod cores;
mod wires;

use apps::Apps;

/// Counters over all sites.
#[derive(Clone, Debug, Default)]
pub struct Totals {
    /// Inner packets that came out damaged.
    pub damaged: u64,
    /// Inner packets that came to somebody they were not meant for, or from somebody else than they should.
    pub misdelivered: u64,
    /// Flows of which different cores of one site gave out packets.
    pub flows_split: u64,
    /// Datagrams under no address any more.
    pub unroutable: u64,
    /// Events run.
    pub events: u64,
}

/// Sites and what is between them.
pub struct World {
    /// Seed of everything.
    pub seed: u64,
    /// Time now.
    pub now: Time,
    /// Sites.
    pub sites: Vec<Site>,
    /// Cables.
    pub cables: Vec<Cable>,
    /// Neighbors of sites.
    pub hosts: Vec<Host>,
    /// Counters.
    pub totals: Totals,
    apps: Apps,
    events: Events,
    random: Rng,
    log: Log,
    keep: bool,
    /// Copies of datagrams that arrived, for tests that replay them.
    pub captured: Vec<(usize, Datagram)>,
}

impl World {
    /// An empty world.
    pub fn new(seed: u64) -> Self {
        Self {
            seed,
            now: Time::from_ms(1),
            sites: Vec::new(),
            cables: Vec::new(),
            hosts: Vec::new(),
            totals: Totals::default(),
            apps: Apps::default(),
            events: Events::default(),
            random: Rng::with_seed(seed),
            log: Log::new(),
            keep: false,
            captured: Vec::new(),
        }
    }

    /// Adds a site with so many cores; its wall clock starts at `wall_clock_ns` (0: unknown). Returns its number.
    pub fn site(&mut self, cores: u8, wall_clock_ns: u64) -> usize {
        let site = Site::new(&mut self.random, cores, wall_clock_ns);
        self.sites.push(site);
        self.sites.len() - 1
    }

    /// Adds a WAN with one IPv4 address to a site; returns its id.
    pub fn wan(&mut self, site: usize, mtu: u16) -> u16 {
        let id = self.sites[site].snapshot.wans.len() as u16;
        self.sites[site].snapshot.wans.push(Wan {
            id,
            interface: format!("wan{id}"),
            up: true,
            addresses: vec![wan_address(site, id, 1)],
            mtu,
            rate_max_bps: None,
            receive_rate_max_bps: None,
            tier: 0,
            relays: None,
            properties: Default::default(),
        });
        id
    }

    /// Joins two WANs by a cable; returns its number.
    pub fn cable(&mut self, from: (usize, u16), to: (usize, u16), there: Shape, back: Shape) -> usize {
        let links = [there, back].map(|shape| Link::new(&shape, self.random.u64(..)));
        self.cables.push(Cable { ends: [from, to], links, nat: None });
        self.cables.len() - 1
    }

    /// Puts a NAT in front of a cable's first end.
    pub fn nat(&mut self, cable: usize) {
        let public = IpAddr::from([203, 0, (cable >> 8) as u8, cable as u8]);
        self.cables[cable].nat = Some(Nat::new(public));
    }

    /// Makes two sites peers: `dialer` dials every WAN of `listener` that a cable reaches.
    pub fn peer(&mut self, dialer: usize, listener: usize) {
        let endpoints = self.endpoints(dialer, listener);
        for (own, other, endpoints) in [(dialer, listener, endpoints), (listener, dialer, Vec::new())] {
            let peer = Peer {
                endpoints,
                allowed_ips: vec![site_prefix(other)],
                ..Peer::new(BondId(other as u16), format!("site{other}"), self.sites[other].public_key())
            };
            self.sites[own].snapshot.peers.push(peer);
        }
    }

    /// Addresses of `listener` that cables from `dialer` lead to.
    pub fn endpoints(&self, dialer: usize, listener: usize) -> Vec<SocketAddr> {
        let mut wans: Vec<u16> = self
            .cables
            .iter()
            .filter(|cable| cable.ends[0].0 == dialer && cable.ends[1].0 == listener)
            .map(|cable| cable.ends[1].1)
            .collect();
        wans.sort_unstable();
        wans.dedup();
        let site = &self.sites[listener];
        wans.iter()
            .filter_map(|id| site.wan(*id)?.addresses.first())
            .map(|address| SocketAddr::new(*address, crate::site::LISTEN_PORT))
            .collect()
    }

    /// Applies every site's configuration; who dials comes last, so that somebody listens.
    pub fn start(&mut self) {
        let dials = |site: &Site| site.snapshot.peers.iter().any(|peer| !peer.endpoints.is_empty());
        let mut order: Vec<usize> = (0..self.sites.len()).collect();
        order.sort_by_key(|site| dials(&self.sites[*site]));
        for site in order {
            self.reload(site);
            if !self.sites[site].control.spec.interfaces.is_empty() {
                self.reload_services(site).expect("the scenario's services");
            }
        }
    }

    /// Restarts a site's process, without a word to the others. `keep_floor`: it kept its handshake timestamp.
    pub fn restart(&mut self, site: usize, keep_floor: bool) {
        let serving = self.sites[site].control.is_serving();
        self.sites[site].restart(&mut self.random, keep_floor, self.now);
        self.apps.forget_cores(site);
        self.log("restart", [site as u64, 0, 0, 0]);
        self.reload(site);
        if serving {
            self.reload_services(site).expect("they were in force before");
        }
    }

    /// Keeps copies of what arrives in [`World::captured`].
    pub fn capture(&mut self, on: bool) {
        self.keep = on;
    }

    /// Number that changes with every event: equal for equal runs.
    pub fn log_hash(&self) -> u64 {
        self.log.hash()
    }

    fn log(&mut self, what: &'static str, numbers: [u64; 4]) {
        self.log.add(self.now, what, numbers);
    }

    fn schedule(&mut self, at: Time, event: Event) {
        self.events.push(at.max(self.now), event);
    }

    /// Runs for so many milliseconds.
    pub fn run_ms(&mut self, ms: u64) {
        self.run_until(self.now.plus_ms(ms));
    }

    /// Runs until `end`.
    pub fn run_until(&mut self, end: Time) {
        self.settle();
        // A test may have changed links since.
        for cable in 0..self.cables.len() {
            self.look_at(cable, 0);
            self.look_at(cable, 1);
        }
        while self.events.next_at().is_some_and(|at| at <= end) {
            let Some((at, event)) = self.events.pop() else { break };
            self.now = at;
            self.run_event(event);
            if self.events.next_at().is_none_or(|next| next > at) {
                self.settle();
            }
        }
        self.now = end;
    }

    /// Runs until `done` holds, looking every millisecond; false when `limit_ms` passed before.
    pub fn run_until_true(&mut self, limit_ms: u64, mut done: impl FnMut(&Self) -> bool) -> bool {
        for _ in 0..limit_ms {
            if done(self) {
                return true;
            }
            self.run_ms(1);
        }
        done(self)
    }

    fn run_event(&mut self, event: Event) {
        self.totals.events += 1;
        match event {
            Event::Link(cable, direction) => self.link(cable, direction),
            Event::Wake(site, core) => self.wake(site, core),
            Event::Handed(site, starts, core, handed) => self.take_handed(site, starts, core, handed),
            Event::Frame(site, interface, offload, bytes) => self.frame(site, interface, offload, bytes),
            Event::Host(host, core, offload, bytes) => self.host(host, core, &offload, &bytes),
            Event::Control(site, starts) => self.control(site, starts),
            Event::App(app) => self.wake_app(app),
        }
    }

    /// Checks what must hold in every run at any time.
    ///
    /// # Errors
    /// The condition that does not hold.
    pub fn check(&self) -> Result<(), String> {
        let totals = &self.totals;
        if totals.damaged + totals.misdelivered > 0 {
            return Err(format!("damaged or misdelivered packets: {totals:?}"));
        }
        self.apps.check()?;
        for (number, site) in self.sites.iter().enumerate() {
            site.check_flows().map_err(|what| format!("site {number}: {what}"))?;
        }
        Ok(())
    }

    /// Everything a person needs to understand a failure.
    pub fn describe(&self) -> String {
        use std::fmt::Write as _;
        let mut text = format!("SIM_SEED={} at {} µs, {:?}\n", self.seed, self.now.us(), self.totals);
        for (number, site) in self.sites.iter().enumerate() {
            let _ = write!(text, "site {number}\n{}", site.describe());
        }
        for (number, cable) in self.cables.iter().enumerate() {
            let link = |at: usize| (cable.links[at].entered(), cable.links[at].left());
            let _ = writeln!(text, "cable {number} {:?}: {:?} {:?}", cable.ends, link(0), link(1));
        }
        text
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.describe());
            for (at, what, numbers) in self.log.trail() {
                eprintln!("  {:>10} µs {what} {numbers:?}", at.us());
            }
        }
    }
}

/// Address number `host` of a WAN: every WAN has a network of its own.
pub fn wan_address(site: usize, wan: u16, host: u8) -> IpAddr {
    IpAddr::from([100, 64 + site as u8, wan as u8, host])
}

/// Inner prefix of a site.
pub fn site_prefix(site: usize) -> ipnet::IpNet {
    ipnet::IpNet::from(ipnet::Ipv4Net::new_assert(Ipv4Addr::new(10, site as u8, 0, 0), 16))
}

/// Inner address of a host.
pub fn host_address(site: usize, host: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, site as u8, 0, host)
}
