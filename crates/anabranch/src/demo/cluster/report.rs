//! Report of the cluster's demo.

use std::fmt::Write as _;

use manager::api::types::{ClusterReport, UnitReport};
use serde::Serialize;
use testbed::traffic::churn::{BySide, Report as Traffic};

/// One change under traffic.
#[derive(Clone, Debug, Serialize)]
pub(super) struct EventReport {
    /// The change in words.
    pub(super) text: String,
    /// Connections that were open.
    pub(super) open: u64,
    /// Time from the request until it was in force everywhere.
    pub(super) in_force_ms: f64,
}

/// Everything that is told.
#[derive(Serialize)]
pub(super) struct Report {
    connections: u64,
    broken: u64,
    broken_by_cause: BySide,
    events: usize,
    udp_associations: u64,
    udp_lost: u64,
    undecided: u64,
    second_hops_percent: f64,
    longest_gap_ms: f64,
    longest_change_ms: f64,
    chained_buckets: usize,
    changes: Vec<EventReport>,
    units: Vec<UnitReport>,
}

impl Report {
    pub(super) fn new(traffic: &Traffic, events: &[EventReport], status: &ClusterReport) -> Self {
        let planes = status.units.iter().filter(|unit| unit.role != manager::api::types::Duty::Dispatcher);
        let (hops, packets) =
            planes.fold((0, 0), |(hops, packets), unit| (hops + unit.second_hops, packets + unit.packets));
        let sides = std::iter::once(&traffic.client).chain(&traffic.servers);
        Self {
            connections: traffic.connections,
            broken: traffic.broken,
            broken_by_cause: traffic.broken_by_cause.clone(),
            events: events.len(),
            udp_associations: traffic.udp_associations,
            udp_lost: traffic.udp_lost,
            undecided: sides.map(|side| side.undecided).sum(),
            second_hops_percent: 100.0 * hops as f64 / packets.max(1) as f64,
            longest_gap_ms: traffic.longest_gap_ms,
            longest_change_ms: events.iter().map(|event| event.in_force_ms).fold(0.0, f64::max),
            chained_buckets: status.chains.iter().skip(1).sum(),
            changes: events.to_vec(),
            units: status.units.clone(),
        }
    }

    /// Whether nothing broke, and something happened.
    pub(super) fn is_clean(&self) -> bool {
        self.broken == 0
            && self.udp_lost == 0
            && self.undecided == 0
            && self.connections > 0
            && self.events > 0
    }

    pub(super) fn json(&self) -> anyhow::Result<String> {
        Ok(serde_json::to_string_pretty(self)?)
    }

    pub(super) fn text(&self) -> String {
        let mut out = String::new();
        let _ = writeln!(
            out,
            "{} connections through address translation on a cluster, {} changes of its data planes under them",
            self.connections, self.events
        );
        let _ = writeln!(out, "  broken              {}", self.broken);
        let _ = writeln!(
            out,
            "  UDP lost            {} of {} associations",
            self.udp_lost, self.udp_associations
        );
        let _ = writeln!(out, "  longest gap         {:.0} ms", self.longest_gap_ms);
        let _ = writeln!(
            out,
            "  longest change      {:.0} ms from the request to everywhere",
            self.longest_change_ms
        );
        let _ = writeln!(out, "  second hops         {:.2} % of the packets", self.second_hops_percent);
        let _ = writeln!(out, "  buckets in chains   {} of 65,536", self.chained_buckets);
        for event in &self.changes {
            let _ = writeln!(out, "  {}", event.text);
        }
        for unit in &self.units {
            let _ = writeln!(
                out,
                "  unit {:>3}: {:>9}, {:>6} buckets, {:>5} flows, {:>9} packets, {:>7} sent on",
                unit.node, unit.standing, unit.buckets, unit.live_flows, unit.packets, unit.second_hops
            );
        }
        let _ = write!(out, "{}", if self.is_clean() { "Nothing broke." } else { "Something broke." });
        out
    }
}
