//! Report of the gateway demo: one JSON object, or a page for people.

use std::collections::BTreeMap;
use std::fmt::Write;

use control::status::{CoreServices, ServicesStatus};
use serde::Serialize;
use testbed::traffic::tally::Tally;

use super::run::{Phase, Results};

/// Faults that are shown.
const FAULTS_MAX: usize = 30;

/// The figures. Field names are the JSON keys, and are kept.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    version: &'static str,
    seconds: u64,
    /// Nothing broke that should not.
    pub(super) ok: bool,
    faults: Vec<String>,
    /// Answered, every byte right.
    requests: u64,
    failed_requests: u64,
    /// Tries beyond the first: a backend had died, or a datagram was lost.
    retried_requests: u64,
    connections: u64,
    /// Connections that broke although their server lived.
    broken_connections: u64,
    /// Connections that ended because their backend died.
    ended_connections: u64,
    corrupt_answers: u64,
    bytes_verified: u64,
    latency_p50_ms: f64,
    latency_p99_ms: f64,
    /// Packets that came to another core than their owner.
    handoffs: u64,
    replies_on_wrong_core: u64,
    cores: Vec<CoreReport>,
    phases: Vec<PhaseReport>,
    backends: Vec<BackendReport>,
    /// From the death of a backend until the gateway sent nobody there any more.
    backend_detection_ms: f64,
    /// From its return until it had a connection.
    backend_return_ms: f64,
    core_taken: CoreTakenReport,
    reload_ms: f64,
    reload_changes: Vec<String>,
    drops: BTreeMap<String, u64>,
}

/// One core, while traffic ran.
#[derive(Debug, Serialize)]
struct CoreReport {
    core: usize,
    /// Flows it began.
    flows: u64,
    /// Packets it read; a super-packet counts once.
    packets: u64,
    bytes: u64,
    /// Packets it gave to their owner.
    handoffs: u64,
    /// Packets it was given.
    taken_over: u64,
    load_percent: f64,
}

#[derive(Debug, Serialize)]
struct PhaseReport {
    name: &'static str,
    row: &'static str,
    seconds: f64,
    requests: u64,
    failed_requests: u64,
    retried_requests: u64,
    connections: u64,
    broken_connections: u64,
    ended_connections: u64,
    bytes_verified: u64,
    mbps: f64,
    latency_p50_ms: f64,
    latency_p99_ms: f64,
    handoffs: u64,
    replies_on_wrong_core: u64,
}

#[derive(Debug, Serialize)]
struct BackendReport {
    address: String,
    requests: u64,
}

/// Before, while it was away, and after it came back.
#[derive(Debug, Serialize)]
struct CoreTakenReport {
    core: usize,
    buckets: [u32; 3],
    flows: [u64; 3],
}

impl Report {
    pub(super) fn new(seconds: u64, results: &Results) -> Self {
        let mut all = Tally::default();
        let mut faults = results.faults.clone();
        for phase in &results.phases {
            all.merge(phase.tally.clone());
            faults.extend(phase.tally.faults.iter().map(|fault| format!("{}: {fault}", phase.name)));
            let wrong = delta(phase, |status| status.replies_on_wrong_core_packets);
            if wrong > 0 {
                faults.push(format!("{}: {wrong} replies came to another core than the request", phase.name));
            }
            if phase.tally.requests == 0 {
                faults.push(format!("{}: no request was answered", phase.name));
            }
        }
        faults.truncate(FAULTS_MAX);
        let latency = all.latency();
        let sum =
            |get: fn(&ServicesStatus) -> u64| results.phases.iter().map(|phase| delta(phase, get)).sum();
        let taken = &results.core;
        Self {
            version: env!("CARGO_PKG_VERSION"),
            seconds,
            ok: faults.is_empty() && all.is_clean(),
            faults,
            requests: all.requests,
            failed_requests: all.failed_requests,
            retried_requests: all.retries,
            connections: all.connections,
            broken_connections: all.broken_connections,
            ended_connections: all.ended_connections,
            corrupt_answers: all.corrupt,
            bytes_verified: all.bytes_verified,
            latency_p50_ms: round(latency.p50_ms),
            latency_p99_ms: round(latency.p99_ms),
            handoffs: sum(|status| status.handed_off_packets),
            replies_on_wrong_core: sum(|status| status.replies_on_wrong_core_packets),
            cores: cores(results),
            phases: results.phases.iter().map(PhaseReport::new).collect(),
            backends: backends(results),
            backend_detection_ms: round(results.detection_ms),
            backend_return_ms: round(results.return_ms),
            core_taken: CoreTakenReport { core: taken.core, buckets: taken.buckets, flows: taken.flows },
            reload_ms: round(results.reload_ms),
            reload_changes: results.reloaded.clone(),
            drops: drops(results),
        }
    }

    /// For programs.
    pub(super) fn json(&self) -> anyhow::Result<String> {
        Ok(serde_json::to_string_pretty(self)?)
    }

    /// For people.
    pub(super) fn text(&self) -> String {
        let mut out = String::new();
        // Writing to a string does not fail.
        let _ = self.write(&mut out);
        out
    }

    fn write(&self, out: &mut String) -> std::fmt::Result {
        writeln!(
            out,
            "\nAnabranch {}: a gateway with {} cores, three local networks, a virtual server with {} backends",
            self.version,
            self.cores.len(),
            self.backends.len()
        )?;
        self.write_phases(out)?;
        self.write_cores(out)?;
        self.write_events(out)?;
        if !self.faults.is_empty() {
            writeln!(out, "\nWhat should not have happened")?;
            for fault in &self.faults {
                writeln!(out, "  {fault}")?;
            }
        }
        writeln!(
            out,
            "\n{} requests over {} connections, {} compared byte by byte: half within {:.1} ms, 99 % within {:.1} ms",
            self.requests,
            self.connections,
            volume(self.bytes_verified),
            self.latency_p50_ms,
            self.latency_p99_ms
        )?;
        write!(
            out,
            "{}: {} connections broke, {} requests failed, {} replies came to a wrong core",
            if self.ok { "Nothing broke that should not" } else { "FAILED" },
            self.broken_connections,
            self.failed_requests,
            self.replies_on_wrong_core
        )
    }

    fn write_phases(&self, out: &mut String) -> std::fmt::Result {
        writeln!(
            out,
            "\n  {:<34} {:>8} {:>7} {:>7} {:>8} {:>9} {:>8} {:>8} {:>9}",
            "phase", "requests", "failed", "broken", "retried", "Mbit/s", "p50 ms", "p99 ms", "hand-offs"
        )?;
        for phase in &self.phases {
            writeln!(
                out,
                "  {:<34} {:>8} {:>7} {:>7} {:>8} {:>9.1} {:>8.1} {:>8.1} {:>9}",
                format!("{} ({})", phase.name, phase.row),
                phase.requests,
                phase.failed_requests,
                phase.broken_connections,
                phase.retried_requests,
                phase.mbps,
                phase.latency_p50_ms,
                phase.latency_p99_ms,
                phase.handoffs
            )?;
        }
        Ok(())
    }

    fn write_cores(&self, out: &mut String) -> std::fmt::Result {
        writeln!(
            out,
            "\n  {:<6} {:>9} {:>10} {:>10} {:>10} {:>7}",
            "core", "flows", "packets", "MB", "hand-offs", "load"
        )?;
        for core in &self.cores {
            writeln!(
                out,
                "  {:<6} {:>9} {:>10} {:>10.1} {:>10} {:>5.0} %",
                core.core,
                core.flows,
                core.packets,
                core.bytes as f64 / 1e6,
                core.handoffs,
                core.load_percent
            )?;
        }
        Ok(())
    }

    fn write_events(&self, out: &mut String) -> std::fmt::Result {
        writeln!(out)?;
        for backend in &self.backends {
            writeln!(out, "  backend {:<18} {:>8} requests", backend.address, backend.requests)?;
        }
        writeln!(
            out,
            "  A backend died: the gateway knew after {:.0} ms; {} connections ended with it. It came back and had a \
             connection after {:.0} ms.",
            self.backend_detection_ms, self.ended_connections, self.backend_return_ms
        )?;
        let taken = &self.core_taken;
        writeln!(
            out,
            "  Core {} was taken away: {} buckets and {} flows before, {} and {} meanwhile, {} and {} when it was back.",
            taken.core,
            taken.buckets[0],
            taken.flows[0],
            taken.buckets[1],
            taken.flows[1],
            taken.buckets[2],
            taken.flows[2]
        )?;
        writeln!(
            out,
            "  The configuration was read again in {:.0} ms ({} changes).",
            self.reload_ms,
            self.reload_changes.len()
        )?;
        if !self.drops.is_empty() {
            let list: Vec<String> =
                self.drops.iter().map(|(reason, count)| format!("{reason} {count}")).collect();
            writeln!(out, "  Dropped packets: {}", list.join(", "))?;
        }
        Ok(())
    }
}

impl PhaseReport {
    fn new(phase: &Phase) -> Self {
        let (tally, latency) = (&phase.tally, phase.tally.latency());
        Self {
            name: phase.name,
            row: phase.row,
            seconds: round(phase.seconds),
            requests: tally.requests,
            failed_requests: tally.failed_requests,
            retried_requests: tally.retries,
            connections: tally.connections,
            broken_connections: tally.broken_connections,
            ended_connections: tally.ended_connections,
            bytes_verified: tally.bytes_verified,
            mbps: round(tally.bytes_verified as f64 * 8e-6 / phase.seconds.max(0.001)),
            latency_p50_ms: round(latency.p50_ms),
            latency_p99_ms: round(latency.p99_ms),
            handoffs: delta(phase, |status| status.handed_off_packets),
            replies_on_wrong_core: delta(phase, |status| status.replies_on_wrong_core_packets),
        }
    }
}

fn delta(phase: &Phase, get: fn(&ServicesStatus) -> u64) -> u64 {
    let [before, after] = &phase.status;
    get(after).saturating_sub(get(before))
}

/// State before the first phase and after the last.
fn ends(results: &Results) -> Option<(&ServicesStatus, &ServicesStatus)> {
    Some((&results.phases.first()?.status[0], &results.phases.last()?.status[1]))
}

fn cores(results: &Results) -> Vec<CoreReport> {
    let Some((before, after)) = ends(results) else { return Vec::new() };
    let none = CoreServices::default();
    let core = |(number, core): (usize, &CoreServices)| {
        let old = before.cores.iter().find(|old| old.core == core.core).unwrap_or(&none);
        let delta = |get: fn(&CoreServices) -> u64| get(core).saturating_sub(get(old));
        let (sum, count) = results.load.get(number).copied().unwrap_or_default();
        CoreReport {
            core: core.core,
            flows: delta(|c| c.new_flows),
            packets: delta(|c| c.rx_packets),
            bytes: delta(|c| c.rx_bytes),
            handoffs: delta(|c| c.handed_off_packets),
            taken_over: delta(|c| c.taken_over_packets),
            load_percent: round(sum / f64::from(count.max(1))),
        }
    };
    after.cores.iter().enumerate().map(core).collect()
}

fn backends(results: &Results) -> Vec<BackendReport> {
    let mut list: Vec<_> = results.backends.clone();
    list.sort();
    let report = |(address, requests): (std::net::SocketAddr, u64)| BackendReport {
        address: address.to_string(),
        requests,
    };
    list.into_iter().map(report).collect()
}

fn drops(results: &Results) -> BTreeMap<String, u64> {
    let Some((before, after)) = ends(results) else { return BTreeMap::new() };
    let delta = |(reason, count): (&String, &u64)| {
        let old = before.drops.get(reason).copied().unwrap_or(0);
        (reason.clone(), count.saturating_sub(old))
    };
    after.drops.iter().map(delta).filter(|(_, count)| *count > 0).collect()
}

/// Two decimals are more than any of this is exact to.
fn round(value: f64) -> f64 {
    if value.is_finite() { (value * 100.0).round() / 100.0 } else { 0.0 }
}

fn volume(bytes: u64) -> String {
    let mb = bytes as f64 / 1e6;
    if mb >= 1_000.0 { format!("{:.2} GB", mb / 1e3) } else { format!("{mb:.0} MB") }
}
