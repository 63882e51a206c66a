//! `anabranch demo --cluster`: a manager, two dispatchers and four data planes in namespaces; thousands of real connections
//! through address translation while units come, drain and go; and a report.
//!
//! The machines are this very program: `anabranch up` and `anabranch manager`. Changes are given to the manager over REST.

mod report;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use testbed::cluster as bed;
use testbed::stop::Stop;
use testbed::traffic::churn::{Churn as Traffic, client, server};

use super::progress::Progress;
use crate::scale::churn::{self, Churn};
use crate::scale::machines::{Machines, Spec, change, data_planes};
use report::{EventReport, Report};

/// Seconds of traffic unless told otherwise.
pub(super) const SECONDS: u64 = 40;
const DISPATCHERS: u16 = 2;
const DATA_PLANES: u16 = 4;
/// All machines share the CPUs of this one, and whatever else runs here: who is late is not dead.
const DEAD_AFTER_MS: u16 = 3_000;
/// Blocks of 1,024 ports of the outside address for each: all connections have the same destination.
const BLOCKS: u16 = 12;
/// Seed of traffic and changes.
const SEED: u64 = 7;
/// Between two changes at least.
const PAUSE: Duration = Duration::from_millis(2_500);
/// TCP and UDP port of the server.
const PORT: u16 = 7_000;
/// A chain that is as long as this is waited for: old flows have to end first.
const CHANGE_MAX: Duration = Duration::from_secs(20);

/// The report as text or JSON, and whether nothing broke.
pub(super) fn perform(
    seconds: u64,
    json: bool,
    stop: &Stop,
    progress: &mut Progress,
) -> anyhow::Result<(String, bool)> {
    progress.step("Building a manager, two dispatchers and four data planes");
    let mut demo = Demo::start()?;
    progress.step("Waiting until they have joined");
    demo.machines.join(&data_planes(DATA_PLANES - 1), stop)?;
    let result = demo.run(seconds, stop, progress);
    let report = result
        .with_context(|| format!("the manager said last:\n{}", demo.machines.manager.last_lines(20)))?;
    if !report.is_clean() {
        progress.note(format!("The manager said:\n{}", demo.machines.manager.last_lines(60)));
    }
    progress.step("Ending the machines");
    drop(demo);
    Ok((if json { report.json()? } else { report.text() }, report.is_clean()))
}

struct Demo {
    machines: Machines,
    churn: Churn,
}

impl Demo {
    fn start() -> anyhow::Result<Self> {
        let manager = format!("drain-ms = 500\nblocks-per-unit = {BLOCKS}\ndead-after-ms = {DEAD_AFTER_MS}");
        let machines = Machines::start(&Spec {
            dispatchers: DISPATCHERS,
            data_planes: DATA_PLANES,
            services: "[[nat]]\nout = \"wan\"",
            dispatcher_services: "",
            manager: &manager,
        })?;
        // All take part, but one data plane that comes later.
        let churn = Churn::new(SEED, &data_planes(DATA_PLANES), usize::from(DATA_PLANES) - 1);
        Ok(Self { machines, churn })
    }

    /// Traffic, and changes under it.
    fn run(&mut self, seconds: u64, stop: &Stop, progress: &mut Progress) -> anyhow::Result<Report> {
        let to = SocketAddr::new(bed::SERVERS[0].into(), PORT);
        let servers = vec![server::start(Some(&self.machines.bed.server), to)?];
        let options = client::Options {
            short_per_second: 150,
            long: 1_000,
            long_life: Some(Duration::from_secs(20)),
            udp: 50,
            ..client::Options::new(to, SEED)
        };
        let side = client::start(Some(&self.machines.bed.client), options)?;
        let mut traffic = Traffic { client: side, servers };
        progress.phase("Connections, while units come, drain and go", seconds as f64);
        let (began, end) = (Instant::now(), Duration::from_secs(seconds));
        let (mut events, mut next) = (Vec::new(), Duration::from_secs(4));
        while began.elapsed() < end && !stop.sleep(Duration::from_millis(100)) {
            let figures = traffic.client.figures();
            progress.tick(
                began.elapsed(),
                format!(
                    "{} connections, {} open, {} broken",
                    figures.connections, figures.open, figures.broken
                ),
            );
            if began.elapsed() >= next && began.elapsed() + PAUSE < end {
                let event = self.event(&mut traffic, stop)?;
                progress.message(&event.text);
                events.push(event);
                next = began.elapsed() + PAUSE;
            }
        }
        self.machines.alive(stop)?;
        let status = self.machines.cluster()?;
        progress.step("Bringing all connections to their end");
        Ok(Report::new(&traffic.finish()?, &events, &status))
    }

    /// One change, several units at once now and then.
    fn event(&mut self, traffic: &mut Traffic, stop: &Stop) -> anyhow::Result<EventReport> {
        let steps = self.churn.event();
        let open = traffic.client.mark().open;
        traffic.servers.iter().for_each(|side| {
            side.mark();
        });
        let took = self.machines.change(&change(&steps), stop, Instant::now() + CHANGE_MAX)?;
        let in_force_ms = took.as_secs_f64() * 1e3;
        let text = format!(
            "data plane {}: in force after {in_force_ms:.0} ms, {open} connections open",
            churn::text(&steps)
        );
        Ok(EventReport { text, open, in_force_ms })
    }
}
