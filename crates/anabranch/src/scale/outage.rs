//! Outages of data planes, one after another: how long until new flows begin elsewhere.

use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use serde::Serialize;
use testbed::stop::Stop;

use super::crash::{Echo, Prober, after, pass, unix_ms};
use super::machines::Machines;

/// Probes before an outage, and after it.
const BEFORE: Duration = Duration::from_millis(300);
const AFTER: Duration = Duration::from_millis(1_500);
/// Time in which a machine that is back takes part again.
const BACK_MAX: Duration = Duration::from_secs(60);

/// Outage of a data plane.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Way {
    /// Its process is killed
    Kill,
    /// Its process is stopped, and has its sockets
    Stop,
    /// Its cable is cut
    Cable,
}

/// Times of some outages, ms. Field names are the JSON keys, and are kept.
#[derive(Debug, Serialize)]
pub(crate) struct Outages {
    pub(crate) way: Way,
    /// From the outage until the manager called the unit lost.
    pub(crate) detected_ms: Vec<f64>,
    /// From the outage until the table without it was in force.
    pub(crate) in_force_ms: Vec<f64>,
    /// From the outage until the last new flow that got no answer.
    pub(crate) new_flows_back_ms: Vec<f64>,
}

impl Outages {
    /// `times` outages of one kind, of one data plane after the other.
    pub(crate) fn measure(
        machines: &mut Machines,
        planes: &[u16],
        (way, times): (Way, usize),
        stop: &Stop,
    ) -> anyhow::Result<Self> {
        let mut all =
            Self { way, detected_ms: Vec::new(), in_force_ms: Vec::new(), new_flows_back_ms: Vec::new() };
        for victim in planes.iter().cycle().take(times) {
            all.one(machines, *victim, stop)?;
            back(machines, (way, *victim), planes, stop)?;
        }
        Ok(all)
    }

    fn one(&mut self, machines: &mut Machines, victim: u16, stop: &Stop) -> anyhow::Result<()> {
        let echo = Echo::start(&machines.bed.server)?;
        let prober = Prober::start(&machines.bed.client)?;
        pass(BEFORE, stop)?;
        let (began, began_unix_ms) = (Instant::now(), unix_ms());
        match self.way {
            Way::Kill => machines.bed.stop(victim, true)?,
            Way::Stop => machines.bed.halt(victim, true)?,
            Way::Cable => machines.bed.cut(victim, true)?,
        }
        pass(AFTER, stop)?;
        let probes = prober.finish()?;
        drop(echo);
        let lost = probes.iter().filter(|probe| !probe.answered && probe.sent >= began);
        let last = lost.map(|probe| (probe.sent - began).as_secs_f64() * 1e3).fold(0.0, f64::max);
        let events = machines.events()?;
        let of_victim = |text: &str, node| after(&events, (text, node), began_unix_ms);
        self.detected_ms.push(of_victim("lost: ", Some(victim)).context("the manager did not notice")?);
        self.in_force_ms.push(of_victim("is in force", None).context("no table without the dead unit")?);
        self.new_flows_back_ms.push(last);
        Ok(())
    }

    /// Most of each kind of time.
    pub(crate) fn most(&self) -> [f64; 3] {
        [&self.detected_ms, &self.in_force_ms, &self.new_flows_back_ms]
            .map(|times| times.iter().copied().fold(0.0, f64::max))
    }

    pub(crate) fn text(&self) -> String {
        let shown = [&self.detected_ms, &self.in_force_ms, &self.new_flows_back_ms].map(|times| {
            let mut sorted = times.clone();
            sorted.sort_by(f64::total_cmp);
            let at = |place: usize| sorted.get(place).copied().unwrap_or(0.0);
            let (least, median, most) = (at(0), at(sorted.len() / 2), at(sorted.len().saturating_sub(1)));
            format!("{least:.0}–{most:.0} ms (median {median:.0})")
        });
        let [detected, in_force, back] = shown;
        let way = match self.way {
            Way::Kill => "killed",
            Way::Stop => "stopped",
            Way::Cable => "cut off",
        };
        format!(
            "{way} {} times: called lost after {detected}, table in force after {in_force}, the last new flow without an answer after {back}",
            self.detected_ms.len()
        )
    }
}

/// Brings a data plane back.
fn back(machines: &mut Machines, (way, node): (Way, u16), planes: &[u16], stop: &Stop) -> anyhow::Result<()> {
    match way {
        Way::Kill => machines.bed.start_one(node)?,
        Way::Stop => machines.bed.halt(node, false)?,
        Way::Cable => machines.bed.cut(node, false)?,
    }
    await_all(machines, planes, stop).with_context(|| format!("unit {node} is back"))
}

/// Waits until all data planes have their share.
pub(super) fn await_all(machines: &mut Machines, planes: &[u16], stop: &Stop) -> anyhow::Result<()> {
    let deadline = Instant::now() + BACK_MAX;
    loop {
        machines.alive(stop)?;
        let cluster = machines.cluster()?;
        let has_share = |node: &u16| cluster.units.iter().any(|unit| unit.node == *node && unit.buckets > 0);
        if planes.iter().all(has_share) && cluster.plan.stage == "idle" {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("not all data planes take part again: {:?}", cluster.plan);
        }
        ensure!(!stop.sleep(Duration::from_millis(100)), "stopped");
    }
}
