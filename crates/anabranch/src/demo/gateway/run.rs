//! The gateway demo's traffic, phase by phase, and what happens to the gateway meanwhile.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::bail;
use control::status::{CoreServices, ServicesStatus};
use testbed::stop::Stop;
use testbed::topology::Node;
use testbed::traffic::client::Plan;
use testbed::traffic::tally::{AllLive, Meter, SharedWitness, Tally};
use testbed::traffic::{dns, frames, http};

use super::super::progress::Progress;
use super::network::{self, DNS_PORT, FRAMES_PORT, GatewayNetwork, HTTP_PORT, MODES, VISITORS, backend};
use super::server_farm::{Farm, backend_of};

/// Shares of the whole time.
const EACH_MODE: f64 = 0.13;
const IPV6: f64 = 0.11;
const BACKEND_DIES: f64 = 0.22;
const CORE_GOES: f64 = 0.28;
/// The backend that dies, and when: shares of its phase.
const VICTIM: usize = 2;
const DIES_AT: f64 = 0.25;
const LIVES_AT: f64 = 0.6;
/// When the core goes, the configuration is read again, and the core comes back: shares of that phase.
const GOES_AT: f64 = 0.2;
const RELOAD_AT: f64 = 0.45;
const BACK_AT: f64 = 0.6;
/// The gateway is given this long to notice something.
const NOTICE_MAX: Duration = Duration::from_secs(6);
/// How often the demo looks at the gateway.
const LOOK: Duration = Duration::from_millis(50);
/// Longest pause between two requests of one client; the mean is half of it.
const THINK: Duration = Duration::from_millis(6);
/// The same of a long connection, whose frames are larger.
const FRAMES_THINK: Duration = Duration::from_millis(20);

/// Result of one phase.
#[derive(Debug)]
pub(super) struct Phase {
    pub(super) name: &'static str,
    pub(super) row: &'static str,
    pub(super) seconds: f64,
    pub(super) tally: Tally,
    /// Counters of the gateway before and after.
    pub(super) status: [ServicesStatus; 2],
}

/// Measurements.
#[derive(Debug, Default)]
pub(super) struct Results {
    pub(super) phases: Vec<Phase>,
    /// Faults besides those of the phases.
    pub(super) faults: Vec<String>,
    /// From the death of a backend until the gateway sent nobody there any more, ms.
    pub(super) detection_ms: f64,
    /// From the return of the backend until it had its first request, ms.
    pub(super) return_ms: f64,
    /// Requests of each backend.
    pub(super) backends: Vec<(SocketAddr, u64)>,
    pub(super) core: CoreTaken,
    /// How long the reload took, ms, and what it changed.
    pub(super) reload_ms: f64,
    pub(super) reloaded: Vec<String>,
    /// Load of each core, percent, while traffic ran: sum and number of the looks.
    pub(super) load: Vec<(f64, u32)>,
}

/// The core that was taken away.
#[derive(Debug, Default)]
pub(super) struct CoreTaken {
    pub(super) core: usize,
    /// Its buckets and flows before, while it was away, and after it came back.
    pub(super) buckets: [u32; 3],
    pub(super) flows: [u64; 3],
}

/// Clients that run at the same time.
struct Crowd {
    end: Stop,
    stop: Stop,
    meter: Arc<Meter>,
    witness: SharedWitness,
    handles: Vec<JoinHandle<Tally>>,
}

impl Crowd {
    fn new(stop: &Stop, witness: SharedWitness) -> Self {
        let meter = Arc::new(Meter::default());
        Self { end: Stop::new(), stop: stop.clone(), meter, witness, handles: Vec::new() }
    }

    fn plan(&self, node: &Node, from: IpAddr, to: SocketAddr, think: Duration) -> Plan {
        Plan {
            node: node.clone(),
            from: Some(from),
            to,
            seed: self.handles.len() as u64 + 1,
            think,
            end: self.end.clone(),
            stop: self.stop.clone(),
            meter: Arc::clone(&self.meter),
            witness: Arc::clone(&self.witness),
        }
    }

    fn http(
        &mut self,
        node: &Node,
        from: IpAddr,
        to: SocketAddr,
        options: http::Options,
    ) -> anyhow::Result<()> {
        let plan = self.plan(node, from, to, THINK);
        self.handles.push(http::start(plan, options)?);
        Ok(())
    }

    fn dns(&mut self, node: &Node, from: IpAddr, to: SocketAddr) -> anyhow::Result<()> {
        let plan = self.plan(node, from, to, THINK);
        self.handles.push(dns::start(plan)?);
        Ok(())
    }

    fn frames(&mut self, node: &Node, from: IpAddr, to: SocketAddr) -> anyhow::Result<()> {
        let plan = self.plan(node, from, to, FRAMES_THINK);
        self.handles.push(frames::start(plan)?);
        Ok(())
    }

    /// Clients of one local network that speak to servers on the Internet.
    fn lan(&mut self, network: &GatewayNetwork, lan: usize, ipv6: bool, size: LanSize) -> anyhow::Result<()> {
        let Some(node) = network.lans.get(lan) else { return Ok(()) };
        let from = |number: u8| network::host(lan, number, ipv6);
        let to = |number: u8, port| network::server(number, port, ipv6);
        for number in 0..size.http {
            self.http(node, from(number), to(number, HTTP_PORT), http::Options::default())?;
        }
        for number in 0..size.dns {
            self.dns(node, from(number), to(number, DNS_PORT))?;
        }
        for number in 0..size.frames {
            self.frames(node, from(number), to(number, FRAMES_PORT))?;
        }
        Ok(())
    }

    /// Visitors of the virtual servers: some that come and go, some that keep their connection.
    fn visitors(&mut self, network: &GatewayNetwork, come_and_go: u8, keep: u8) -> anyhow::Result<()> {
        let node = &network.internet;
        for number in 0..come_and_go {
            let to = network::service(HTTP_PORT);
            self.http(node, network::visitor(number), to, http::Options::default())?;
        }
        for number in 0..keep {
            let for_ever =
                http::Options { bytes: 100..=20_000, requests_per_connection: u64::MAX..=u64::MAX };
            self.http(node, network::visitor(number), network::service(HTTP_PORT), for_ever)?;
        }
        self.dns(node, network::visitor(VISITORS - 1), network::service(DNS_PORT))
    }

    fn finish(self) -> Tally {
        self.end.raise();
        let mut tally = Tally::default();
        for handle in self.handles {
            match handle.join() {
                Ok(one) => tally.merge(one),
                Err(_) => tally.fault(|| "a client failed".to_owned()),
            }
        }
        tally
    }
}

/// Clients of a local network.
#[derive(Clone, Copy)]
struct LanSize {
    http: u8,
    dns: u8,
    frames: u8,
}

/// Who plays.
pub(super) struct DemoRun<'a> {
    pub(super) network: &'a mut GatewayNetwork,
    pub(super) farm: Arc<Farm>,
    pub(super) stop: &'a Stop,
}

/// Action at a moment of a phase.
type Act<'a> = (f64, &'a mut dyn FnMut(&mut GatewayNetwork, &mut Results) -> anyhow::Result<()>);

impl DemoRun<'_> {
    /// Runs all phases in about `seconds`.
    pub(super) fn run(&mut self, seconds: f64, progress: &mut Progress) -> anyhow::Result<Results> {
        let mut results = Results::default();
        for (lan, mode) in MODES.iter().enumerate() {
            let name = ["NAT of address and port", "NAT of the port only", "no NAT"].get(lan).copied();
            let mut crowd = Crowd::new(self.stop, Arc::new(AllLive));
            crowd.lan(self.network, lan, false, LanSize { http: 4, dns: 2, frames: 4 })?;
            let facts = (name.unwrap_or(mode.nat), mode.row, seconds * EACH_MODE);
            self.phase(facts, crowd, &mut [], &mut results, progress)?;
        }
        let mut crowd = Crowd::new(self.stop, Arc::new(AllLive));
        for lan in 0..MODES.len() {
            crowd.lan(self.network, lan, true, LanSize { http: 1, dns: 1, frames: 2 })?;
        }
        self.phase(("IPv6, no NAT", "C4", seconds * IPV6), crowd, &mut [], &mut results, progress)?;
        self.backend_dies(seconds * BACKEND_DIES, &mut results, progress)?;
        self.core_goes(seconds * CORE_GOES, &mut results, progress)?;
        results.detection_ms = self.farm.slowest_detection_ms();
        Ok(results)
    }

    fn backend_dies(
        &mut self,
        seconds: f64,
        results: &mut Results,
        progress: &mut Progress,
    ) -> anyhow::Result<()> {
        let mut crowd = Crowd::new(self.stop, Arc::clone(&self.farm) as SharedWitness);
        crowd.visitors(self.network, 6, 8)?;
        let (farm, stop) = (Arc::clone(&self.farm), self.stop);
        let mut second_life = None;
        let mut die = |network: &mut GatewayNetwork, results: &mut Results| {
            farm.kill(VICTIM);
            let address = backend(VICTIM, HTTP_PORT).to_string();
            let is_down = |status: &ServicesStatus| backend_state(status, &address) == Some("down");
            if !wait(network, stop, is_down)? {
                results.faults.push(format!("backend {address} died and the gateway did not notice"));
            }
            farm.all_known();
            Ok(())
        };
        let mut back = |network: &mut GatewayNetwork, results: &mut Results| {
            let begun = Instant::now();
            second_life = Some(farm.revive(VICTIM)?);
            let address = backend(VICTIM, HTTP_PORT).to_string();
            let old = connections(&network.status()?, &address);
            let has_work = |status: &ServicesStatus| {
                backend_state(status, &address) == Some("up") && connections(status, &address) > old
            };
            if !wait(network, stop, has_work)? {
                results.faults.push(format!("backend {address} came back and got no connection"));
            }
            results.return_ms = begun.elapsed().as_secs_f64() * 1e3;
            Ok(())
        };
        let acts: &mut [Act<'_>] = &mut [(DIES_AT, &mut die), (LIVES_AT, &mut back)];
        let facts = ("virtual server, a backend dies", "C6", seconds);
        self.phase(facts, crowd, acts, results, progress)?;
        let answers = results.phases.last().map(|phase| phase.tally.answers.clone()).unwrap_or_default();
        if second_life.is_some_and(|server| !answers.contains_key(&server)) {
            results.faults.push("the backend that came back answered nobody".to_owned());
        }
        Ok(())
    }

    fn core_goes(
        &mut self,
        seconds: f64,
        results: &mut Results,
        progress: &mut Progress,
    ) -> anyhow::Result<()> {
        let mut crowd = Crowd::new(self.stop, Arc::clone(&self.farm) as SharedWitness);
        for lan in 0..MODES.len() {
            crowd.lan(self.network, lan, false, LanSize { http: 1, dns: 1, frames: 4 })?;
            crowd.lan(self.network, lan, true, LanSize { http: 0, dns: 0, frames: 1 })?;
        }
        crowd.visitors(self.network, 2, 4)?;
        // And from inside to the virtual server's outside address.
        if let Some(node) = self.network.lans.first() {
            let to = network::service(HTTP_PORT);
            crowd.http(node, network::host(0, 3, false), to, http::Options::default())?;
        }
        let stop = self.stop;
        let Some(core) = self.network.status()?.cores.last().map(|core| core.core) else {
            bail!("the gateway has no cores");
        };
        results.core.core = core;
        let mut go = |network: &mut GatewayNetwork, results: &mut Results| {
            results.core.note(0, &network.status()?);
            network.set_core(core, false)?;
            if !wait(network, stop, |status| buckets(status, core) == 0)? {
                results.faults.push(format!("core {core} was taken away and keeps its buckets"));
            }
            Ok(())
        };
        let mut reload = |network: &mut GatewayNetwork, results: &mut Results| {
            results.core.note(1, &network.status()?);
            let begun = Instant::now();
            results.reloaded = network.reload()?.applied;
            results.reload_ms = begun.elapsed().as_secs_f64() * 1e3;
            Ok(())
        };
        let mut back = |network: &mut GatewayNetwork, results: &mut Results| {
            network.set_core(core, true)?;
            if !wait(network, stop, |status| buckets(status, core) > 0)? {
                results.faults.push(format!("core {core} was put back and got no buckets"));
            }
            Ok(())
        };
        let acts: &mut [Act<'_>] = &mut [(GOES_AT, &mut go), (RELOAD_AT, &mut reload), (BACK_AT, &mut back)];
        let facts = ("a core goes, a reload, it is back", "C7", seconds);
        self.phase(facts, crowd, acts, results, progress)?;
        if let Some(phase) = results.phases.last() {
            results.core.note(2, &phase.status[1]);
        }
        if results.reloaded.is_empty() {
            results.faults.push("the reload changed nothing".to_owned());
        }
        Ok(())
    }

    /// Lets a crowd run for a time, and does what is to be done meanwhile.
    fn phase(
        &mut self,
        (name, row, seconds): (&'static str, &'static str, f64),
        crowd: Crowd,
        acts: &mut [Act<'_>],
        results: &mut Results,
        progress: &mut Progress,
    ) -> anyhow::Result<()> {
        progress.phase(name, seconds);
        let before = self.network.status()?;
        let begun = Instant::now();
        let mut acts = acts.iter_mut();
        let mut next = acts.next();
        let mut look = Look::default();
        while begun.elapsed().as_secs_f64() < seconds || next.is_some() {
            if self.stop.sleep(LOOK) {
                drop(crowd.finish());
                bail!("stopped");
            }
            self.network.check_alive()?;
            if let Some((share, act)) = &mut next
                && begun.elapsed().as_secs_f64() >= seconds * *share
            {
                act(self.network, results)?;
                next = acts.next();
            }
            look.at(&crowd.meter, begun, self.network, results, progress)?;
        }
        let meter = Arc::clone(&crowd.meter);
        let tally = crowd.finish();
        if self.stop.is_raised() {
            bail!("stopped");
        }
        let seconds = begun.elapsed().as_secs_f64();
        let after = self.network.status()?;
        for (server, count) in &tally.answers {
            results.credit(*server, *count);
        }
        progress.done(format_args!(
            "{} requests, {} broken, {:.0} MB{}",
            meter.requests(),
            tally.broken_connections,
            meter.bytes() as f64 / 1e6,
            tally.faults.first().map_or_else(String::new, |fault| format!(" — {fault}"))
        ));
        results.phases.push(Phase { name, row, seconds, tally, status: [before, after] });
        Ok(())
    }
}

impl Results {
    /// Requests that a backend answered.
    fn credit(&mut self, server: u32, count: u64) {
        // Servers on the Internet have numbers far above.
        let number = backend_of(server);
        if number >= network::BACKENDS {
            return;
        }
        let address = backend(number, HTTP_PORT);
        match self.backends.iter_mut().find(|(known, _)| *known == address) {
            Some((_, sum)) => *sum += count,
            None => self.backends.push((address, count)),
        }
    }
}

impl CoreTaken {
    fn note(&mut self, moment: usize, status: &ServicesStatus) {
        let core = status.cores.iter().find(|core| core.core == self.core);
        if let (Some(core), Some(buckets), Some(flows)) =
            (core, self.buckets.get_mut(moment), self.flows.get_mut(moment))
        {
            (*buckets, *flows) = (core.buckets, core.live_flows);
        }
    }
}

/// Looks at the gateway's cores once a second, and tells how the phase goes.
#[derive(Default)]
struct Look {
    last: Option<(Instant, u64, u64)>,
}

impl Look {
    fn at(
        &mut self,
        meter: &Meter,
        begun: Instant,
        network: &GatewayNetwork,
        results: &mut Results,
        progress: &Progress,
    ) -> anyhow::Result<()> {
        let now = Instant::now();
        let (requests, bytes) = (meter.requests(), meter.bytes());
        let Some((at, old_requests, old_bytes)) = self.last else {
            self.last = Some((now, requests, bytes));
            return Ok(());
        };
        let seconds = (now - at).as_secs_f64();
        if seconds < 0.5 {
            return Ok(());
        }
        self.last = Some((now, requests, bytes));
        let rate = |new: u64, old: u64| new.saturating_sub(old) as f64 / seconds;
        progress.tick(
            begun.elapsed(),
            format_args!(
                "{:6.0} requests/s  {:6.1} Mbit/s",
                rate(requests, old_requests),
                rate(bytes, old_bytes) * 8e-6
            ),
        );
        // The gateway's figure is of its last second: the first look of a phase would see what was before.
        if begun.elapsed() >= Duration::from_secs(1) {
            for (number, core) in network.status()?.cores.iter().enumerate() {
                if results.load.len() <= number {
                    results.load.push((0.0, 0));
                }
                if let Some((sum, count)) = results.load.get_mut(number) {
                    *sum += core.busy_percent;
                    *count += 1;
                }
            }
        }
        Ok(())
    }
}

/// Waits until the gateway's state is so; false if it does not come to it.
fn wait(
    network: &GatewayNetwork,
    stop: &Stop,
    wanted: impl Fn(&ServicesStatus) -> bool,
) -> anyhow::Result<bool> {
    let end = Instant::now() + NOTICE_MAX;
    loop {
        if wanted(&network.status()?) {
            return Ok(true);
        }
        if Instant::now() >= end || stop.sleep(Duration::from_millis(20)) {
            return Ok(false);
        }
    }
}

fn backend_state<'a>(status: &'a ServicesStatus, address: &str) -> Option<&'a str> {
    let mut all = status.virtual_servers.iter().flat_map(|server| &server.backends);
    all.find(|backend| backend.address == address).map(|backend| backend.state.as_str())
}

/// How many connections a backend has had.
fn connections(status: &ServicesStatus, address: &str) -> u64 {
    let mut all = status.virtual_servers.iter().flat_map(|server| &server.backends);
    all.find(|backend| backend.address == address).map_or(0, |backend| backend.total_connections)
}

fn buckets(status: &ServicesStatus, core: usize) -> u32 {
    let core = |known: &&CoreServices| known.core == core;
    status.cores.iter().find(core).map_or(0, |core| core.buckets)
}
