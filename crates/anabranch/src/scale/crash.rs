//! `anabranch bench crash`: a data plane that is stopped for a moment, and one that dies, under connections.

use std::io::Write as _;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, ensure};
use manager::api::types::EventLine;
use serde::Serialize;
use testbed::cluster::{CLIENTS, SERVERS};
use testbed::stop::Stop;
use testbed::topology::Node;
use testbed::traffic::churn::Churn as Traffic;

use super::machines::{self, Machines, Spec};
use super::outage::{Outages, Way};
use super::services::{self, Load};
use crate::demo::progress::Progress;

/// UDP port of the probes' server.
const ECHO: u16 = 7_007;
/// Pause between two probes: each is a flow of its own.
const PROBE: Duration = Duration::from_millis(4);
/// A probe that was not answered so soon is lost.
const ANSWERED: Duration = Duration::from_millis(400);
/// Probes before the crash, and after it.
const BEFORE: Duration = Duration::from_millis(1_000);
const AFTER: Duration = Duration::from_millis(4_000);
/// Time in which connections notice that they are broken, and units tell their flows.
const NOTICE: Duration = Duration::from_millis(4_500);

/// Arguments of `anabranch bench crash`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Examples:
  anabranch bench crash
  anabranch bench crash --dead-after-ms 1000 --stolen-ms 700 --json     on a machine that has other work
  anabranch bench crash --outages 10                                    and ten more times: killed, stopped, cut off

A data plane gets no CPU for --stolen-ms: it must not be left out, and nothing breaks. Then one is killed: only its own connections break, and
new flows of its buckets begin elsewhere; with --outages again and again, whole machines and stopped processes too. The exit code
is 0 only if it was so.")]
pub(crate) struct Args {
    /// Data planes
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(2..=16))]
    data_planes: u16,
    /// A unit that was silent so long is lost
    #[arg(long, value_name = "MS", default_value_t = 375)]
    dead_after_ms: u16,
    /// CPU time taken from a data plane
    #[arg(long, value_name = "MS", default_value_t = 300)]
    stolen_ms: u64,
    /// Long connections
    #[arg(long, value_name = "N", default_value_t = 400)]
    long: usize,
    /// Outages of each kind besides
    #[arg(long, value_name = "N", default_value_t = 0)]
    outages: usize,
    /// Kind of those; may be given several times
    #[arg(long, value_name = "WAY", value_enum, default_values_t = [Way::Kill, Way::Stop, Way::Cable])]
    way: Vec<Way>,
    /// Seed of sizes, pauses and data
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Print one JSON object instead of text, as the only thing on standard output
    #[arg(long)]
    json: bool,
}

/// Result. Field names are the JSON keys, and are kept.
#[derive(Debug, Default, Serialize)]
struct Report {
    connections: u64,
    /// Broken and lost while a unit was stopped, and whether it was left out.
    stolen_ms: u64,
    stolen_broken: u64,
    stolen_left_out: bool,
    /// Live flows of the unit that died.
    flows_of_the_dead: u64,
    /// Connections and associations that ended by its death.
    broken: u64,
    /// From the kill until the manager called it lost.
    detected_ms: f64,
    /// From the kill until the last new flow that got no answer.
    new_flows_back_ms: f64,
    /// From the kill until the table without it was in force.
    in_force_ms: f64,
    probes: usize,
    probes_lost: usize,
    /// Probes that were lost before the kill or more than a second after it.
    probes_lost_else: usize,
    /// More of them, by kind.
    outages: Vec<Outages>,
}

impl Report {
    fn is_good(&self, dead_after_ms: u16) -> bool {
        self.stolen_broken == 0
            && !self.stolen_left_out
            && self.broken <= self.flows_of_the_dead
            && self.broken > 0
            && self.probes_lost_else == 0
            && self.detected_ms <= f64::from(dead_after_ms) + 100.0
            && self.new_flows_back_ms <= f64::from(dead_after_ms) + 500.0
            && self.outages.iter().map(Outages::most).all(|[detected_ms, _, back_ms]| {
                detected_ms <= f64::from(dead_after_ms) + 100.0 && back_ms <= f64::from(dead_after_ms) + 500.0
            })
    }

    fn text(&self) -> String {
        let outages: String = self.outages.iter().map(|outages| format!("\n{}", outages.text())).collect();
        format!(
            "stopped for {} ms: {} broken, left out: {}\nkilled: {} of its {} flows broke; called lost after {:.0} ms, table in \
             force after {:.0} ms, the last new flow without an answer after {:.0} ms ({} of {} probes){outages}",
            self.stolen_ms,
            self.stolen_broken,
            self.stolen_left_out,
            self.broken,
            self.flows_of_the_dead,
            self.detected_ms,
            self.in_force_ms,
            self.new_flows_back_ms,
            self.probes_lost,
            self.probes
        )
    }
}

/// Runs it. Call it before any thread exists: as an ordinary user it enters a user namespace first.
pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    testbed::gain_privilege()?;
    let stop = crate::demo::stop_on_signals()?;
    let mut progress = Progress::new();
    progress.step("Building the cluster");
    let manager = format!("drain-ms = 300\ndead-after-ms = {}", args.dead_after_ms);
    let mut machines = Machines::start(&Spec {
        dispatchers: 2,
        data_planes: args.data_planes,
        services: &services::data_plane_sections(),
        dispatcher_services: &services::dispatcher_sections(),
        manager: &manager,
    })?;
    let planes = machines::data_planes(args.data_planes);
    machines.join(&planes, &stop)?;
    // They stay for the whole run: how many flows a unit has does not change by itself.
    let load = Load { short_rate: 0, long: args.long, long_life: 100_000, pauses: 2, udp: args.long / 10 };
    let ends = (&machines.bed.client, &machines.bed.server);
    let traffic = services::start(ends, &load, args.seed, false)?;
    let mut report = Report { stolen_ms: args.stolen_ms, ..Report::default() };
    progress.step("A data plane stops for a moment");
    pass(NOTICE, &stop)?;
    let era = machines.cluster()?.plan.era;
    machines.bed.pause(planes[0], Duration::from_millis(args.stolen_ms))?;
    pass(NOTICE, &stop)?;
    report.stolen_broken = broken(&traffic);
    report.stolen_left_out = machines.cluster()?.plan.era != era;
    progress.step("A data plane dies");
    crash(&mut machines, *planes.last().context("no data plane")?, &mut report, &stop)?;
    pass(NOTICE, &stop)?;
    report.broken = broken(&traffic) - report.stolen_broken;
    report.connections = traffic.iter().map(|service| service.client.figures().connections).sum();
    if !report.is_good(args.dead_after_ms) {
        progress.note(format!("The manager said last:\n{}", machines.manager.last_lines(20)));
    }
    drop(traffic);
    if args.outages > 0 {
        progress.step("More data planes die");
        outages(&mut machines, &planes, args, (&mut report, &stop))?;
    }
    progress.end();
    let text = if args.json { serde_json::to_string_pretty(&report)? } else { report.text() };
    let mut out = std::io::stdout().lock();
    writeln!(out, "{text}").and_then(|()| out.flush()).context("write the report to standard output")?;
    Ok(if report.is_good(args.dead_after_ms) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// All over again, without the connections, which would stand still each time.
fn outages(
    machines: &mut Machines,
    planes: &[u16],
    args: &Args,
    (report, stop): (&mut Report, &Stop),
) -> anyhow::Result<()> {
    let dead = *planes.last().context("no data plane")?;
    machines.bed.start_one(dead)?;
    super::outage::await_all(machines, planes, stop)?;
    for way in &args.way {
        report.outages.push(Outages::measure(machines, planes, (*way, args.outages), stop)?);
    }
    Ok(())
}

fn crash(machines: &mut Machines, victim: u16, report: &mut Report, stop: &Stop) -> anyhow::Result<()> {
    let status = machines.cluster()?;
    let unit = status.units.iter().find(|unit| unit.node == victim);
    report.flows_of_the_dead = unit.context("the unit is not known")?.live_flows;
    let echo = Echo::start(&machines.bed.server)?;
    let prober = Prober::start(&machines.bed.client)?;
    pass(BEFORE, stop)?;
    let (killed, killed_unix_ms) = (Instant::now(), unix_ms());
    machines.bed.stop(victim, true)?;
    pass(AFTER, stop)?;
    let probes = prober.finish()?;
    drop(echo);
    let lost: Vec<f64> = probes
        .iter()
        .filter(|probe| !probe.answered)
        .map(|probe| {
            let before = killed.saturating_duration_since(probe.sent).as_secs_f64();
            (probe.sent.saturating_duration_since(killed).as_secs_f64() - before) * 1e3
        })
        .collect();
    report.probes = probes.len();
    report.probes_lost = lost.len();
    // Those just before the kill were under way.
    let else_lost = |ms: &&f64| **ms < -50.0 || **ms > 1_000.0;
    report.probes_lost_else = lost.iter().filter(else_lost).count();
    report.new_flows_back_ms = lost.iter().copied().fold(0.0, f64::max);
    let events = machines.events()?;
    let when = |text: &str, node| after(&events, (text, node), killed_unix_ms);
    report.detected_ms = when("lost: ", Some(victim)).context("the manager did not notice")?;
    report.in_force_ms = when("is in force", None).context("no table without the dead unit")?;
    Ok(())
}

/// Time from `unix_ms` to the first such line of the manager's log.
pub(super) fn after(events: &[EventLine], (text, node): (&str, Option<u16>), unix_ms: u64) -> Option<f64> {
    let of = |line: &&EventLine| {
        let about = node.is_none() || line.node == node;
        line.at_unix_ms + 1 >= unix_ms && about && line.text.contains(text)
    };
    events.iter().find(of).map(|line| line.at_unix_ms.saturating_sub(unix_ms) as f64)
}

/// Connections that broke and associations that were lost so far, seen by either side.
fn broken(traffic: &[Traffic]) -> u64 {
    let of = |service: &Traffic| {
        let client = service.client.figures();
        client.broken + client.udp_lost
    };
    traffic.iter().map(of).sum()
}

pub(super) fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

pub(super) fn pass(time: Duration, stop: &Stop) -> anyhow::Result<()> {
    ensure!(!stop.sleep(time), "stopped");
    Ok(())
}

/// Server that sends datagrams back.
pub(super) struct Echo(Stop);

impl Echo {
    pub(super) fn start(node: &Node) -> anyhow::Result<Self> {
        let address = SocketAddr::new(IpAddr::V4(SERVERS[1]), ECHO);
        let socket = node.run(|| UdpSocket::bind(address))??;
        socket.set_read_timeout(Some(Duration::from_millis(200)))?;
        let stop = Stop::new();
        let flag = stop.clone();
        std::thread::Builder::new().name("echo".into()).spawn(move || {
            let mut bytes = [0; 64];
            while !flag.is_raised() {
                if let Ok((length, from)) = socket.recv_from(&mut bytes) {
                    let _ = socket.send_to(&bytes[..length], from);
                }
            }
        })?;
        Ok(Self(stop))
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.0.raise();
    }
}

/// One datagram of a flow of its own.
pub(super) struct Probe {
    pub(super) sent: Instant,
    socket: Option<UdpSocket>,
    pub(super) answered: bool,
}

/// Sends probes until it is told to finish.
pub(super) struct Prober {
    stop: Stop,
    thread: std::thread::JoinHandle<anyhow::Result<Vec<Probe>>>,
}

impl Prober {
    pub(super) fn start(node: &Node) -> anyhow::Result<Self> {
        let stop = Stop::new();
        let (flag, node) = (stop.clone(), node.clone());
        let thread = std::thread::Builder::new().name("prober".into()).spawn(move || {
            node.namespace().enter()?;
            probe(&flag)
        })?;
        Ok(Self { stop, thread })
    }

    pub(super) fn finish(self) -> anyhow::Result<Vec<Probe>> {
        self.stop.raise();
        self.thread.join().map_err(|_| anyhow::anyhow!("the prober failed"))?
    }
}

fn probe(stop: &Stop) -> anyhow::Result<Vec<Probe>> {
    let mut probes: Vec<Probe> = Vec::new();
    let mut oldest = 0;
    let mut ended: Option<Instant> = None;
    loop {
        if ended.is_none() && stop.is_raised() {
            ended = Some(Instant::now());
        }
        match ended {
            Some(ended) if ended.elapsed() > ANSWERED => return Ok(probes),
            Some(_) => {}
            None => {
                let socket = UdpSocket::bind(SocketAddr::new(IpAddr::V4(CLIENTS[1]), 0))?;
                socket.set_nonblocking(true)?;
                socket.connect(SocketAddr::new(IpAddr::V4(SERVERS[1]), ECHO))?;
                socket.send(b"probe")?;
                probes.push(Probe { sent: Instant::now(), socket: Some(socket), answered: false });
            }
        }
        std::thread::sleep(PROBE);
        for probe in &mut probes[oldest..] {
            let mut bytes = [0; 64];
            if probe.socket.as_ref().is_some_and(|socket| socket.recv(&mut bytes).is_ok()) {
                probe.answered = true;
                probe.socket = None;
            } else if probe.sent.elapsed() > ANSWERED {
                probe.socket = None;
            }
        }
        oldest += probes[oldest..].iter().take_while(|probe| probe.socket.is_none()).count();
    }
}
