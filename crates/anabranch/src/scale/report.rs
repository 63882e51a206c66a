//! Report of the runs, as text and as JSON. Field names are the JSON keys, and are kept.

use std::fmt::Write as _;

use serde::Serialize;
use testbed::traffic::churn::{BySide, Report as Traffic};

/// Events that a long connection lives through at least.
const LIVES_THROUGH: usize = 5;

/// One event.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct Event {
    /// Since the beginning of the traffic, seconds.
    pub(super) at_s: f64,
    /// The change in words.
    pub(super) text: String,
    /// Connections that were open.
    pub(super) open: u64,
    /// Time from the request until it was in force everywhere.
    pub(super) in_force_ms: f64,
    /// Live flows in buckets that had at least three earlier owners, afterwards.
    pub(super) flows_in_chains_of_3: u64,
    /// Live flows at the third earlier owner of their bucket, or before it.
    pub(super) flows_at_third: u64,
}

/// Second hops of a while after the last event.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Settled {
    /// End of the while, seconds after the last event.
    pub(super) after_s: f64,
    /// Packets sent on to another unit, percent of all.
    pub(super) second_hops_percent: f64,
    /// Buckets with earlier owners.
    pub(super) chained_buckets: usize,
    /// Of all live flows, those that are not at the owner of their bucket.
    pub(super) flows_away: u64,
}

/// Connections through one service.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Service {
    pub(super) name: String,
    pub(super) connections: u64,
    pub(super) broken: u64,
    pub(super) broken_by_cause: BySide,
    pub(super) udp_associations: u64,
    pub(super) udp_lost: u64,
    /// Neither completed nor broken when the time to end was over, and what a side could not do.
    pub(super) undecided: u64,
    pub(super) longest_gap_ms: f64,
    /// First faults.
    pub(super) faults: Vec<String>,
}

/// Figures of the units.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct Units {
    /// Packets that data planes sent on, percent of those that came.
    pub(super) second_hops_percent: f64,
    /// Packets of data planes.
    pub(super) packets: u64,
    /// Units that were empty and left while the connections went on.
    pub(super) removed: usize,
}

/// Connections of all services together.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct Connections {
    pub(super) connections: u64,
    pub(super) broken: u64,
    pub(super) broken_percent: f64,
    pub(super) udp_associations: u64,
    pub(super) udp_lost: u64,
    pub(super) undecided: u64,
    /// Closed connections that had lived through five events or more, percent.
    pub(super) lived_5_events_percent: f64,
    pub(super) longest_gap_ms: f64,
}

/// Figures of the events.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct Events {
    pub(super) events: usize,
    /// Connections open at an event, at least.
    pub(super) open_least: u64,
    pub(super) longest_change_ms: f64,
    /// Events after which flows were in buckets with three earlier owners or more, and the most of them.
    pub(super) events_with_chains_of_3: usize,
    pub(super) flows_in_chains_of_3_most: u64,
    pub(super) flows_at_third_most: u64,
}

/// Result with one way to choose the machine of a connection.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Variant {
    pub(super) name: String,
    pub(super) seconds: f64,
    #[serde(flatten)]
    pub(super) total: Connections,
    #[serde(flatten)]
    pub(super) churn: Events,
    pub(super) units: Units,
    pub(super) settled: Vec<Settled>,
    pub(super) services: Vec<Service>,
    pub(super) changes: Vec<Event>,
}

/// Everything that is told.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Report {
    pub(super) seed: u64,
    pub(super) data_planes: u16,
    pub(super) variants: Vec<Variant>,
}

impl Variant {
    pub(super) fn new(
        name: String,
        seconds: f64,
        traffic: Vec<(String, Traffic)>,
        changes: Vec<Event>,
        (units, settled): (Units, Vec<Settled>),
    ) -> Self {
        let (mut closed, mut lived) = (0, 0);
        for (_, traffic) in &traffic {
            closed += traffic.client.lived_marks.iter().sum::<u64>();
            lived += traffic.client.lived_marks.iter().skip(LIVES_THROUGH).sum::<u64>();
        }
        let services: Vec<Service> = traffic.into_iter().map(Service::new).collect();
        let sum = |of: fn(&Service) -> u64| services.iter().map(of).sum::<u64>();
        let (connections, broken) = (sum(|each| each.connections), sum(|each| each.broken));
        let total = Connections {
            connections,
            broken,
            broken_percent: 100.0 * broken as f64 / connections.max(1) as f64,
            udp_associations: sum(|each| each.udp_associations),
            udp_lost: sum(|each| each.udp_lost),
            undecided: sum(|each| each.undecided),
            lived_5_events_percent: 100.0 * lived as f64 / closed.max(1) as f64,
            longest_gap_ms: services.iter().map(|each| each.longest_gap_ms).fold(0.0, f64::max),
        };
        Self { name, seconds, total, churn: Events::of(&changes), units, settled, services, changes }
    }

    /// Whether nothing broke, and something happened.
    pub(super) fn is_clean(&self) -> bool {
        let Connections { connections, broken, udp_lost, undecided, .. } = self.total;
        (broken, udp_lost, undecided) == (0, 0, 0) && connections > 0 && self.churn.events > 0
    }
}

impl Events {
    fn of(changes: &[Event]) -> Self {
        let most = |of: fn(&Event) -> u64| changes.iter().map(of).max().unwrap_or(0);
        Self {
            events: changes.len(),
            open_least: changes.iter().map(|event| event.open).min().unwrap_or(0),
            longest_change_ms: changes.iter().map(|event| event.in_force_ms).fold(0.0, f64::max),
            events_with_chains_of_3: changes.iter().filter(|event| event.flows_in_chains_of_3 > 0).count(),
            flows_in_chains_of_3_most: most(|event| event.flows_in_chains_of_3),
            flows_at_third_most: most(|event| event.flows_at_third),
        }
    }
}

impl Service {
    fn new((name, traffic): (String, Traffic)) -> Self {
        let sides = || std::iter::once(&traffic.client).chain(&traffic.servers);
        Self {
            name,
            connections: traffic.connections,
            broken: traffic.broken,
            broken_by_cause: traffic.broken_by_cause.clone(),
            udp_associations: traffic.udp_associations,
            udp_lost: traffic.udp_lost + sides().map(|side| side.udp_corrupt).sum::<u64>(),
            undecided: sides().map(|side| side.undecided + side.local_errors).sum(),
            longest_gap_ms: traffic.longest_gap_ms,
            faults: sides().flat_map(|side| side.faults.iter().cloned()).collect(),
        }
    }
}

impl Report {
    /// Whether nothing broke where nothing may.
    pub(super) fn is_clean(&self) -> bool {
        let ours = self.variants.iter().filter(|variant| variant.name == super::OURS);
        ours.clone().count() > 0 && ours.into_iter().all(Variant::is_clean)
    }

    pub(super) fn json(&self) -> anyhow::Result<String> {
        Ok(serde_json::to_string_pretty(self)?)
    }

    pub(super) fn text(&self) -> String {
        let mut out = String::new();
        let _ = writeln!(
            out,
            "{:<16} {:>7} {:>11} {:>7} {:>7} {:>9} {:>8} {:>6} {:>6} {:>8} {:>8} {:>7}",
            "way",
            "events",
            "connections",
            "broken",
            "%",
            "UDP",
            "UDP lost",
            "open",
            "≥5 ev.",
            "chain ≥3",
            "2nd hops",
            "gap"
        );
        for variant in &self.variants {
            let _ = writeln!(
                out,
                "{:<16} {:>7} {:>11} {:>7} {:>7.2} {:>9} {:>8} {:>6} {:>4.0} % {:>8} {:>6.2} % {:>4.0} ms",
                variant.name,
                variant.churn.events,
                variant.total.connections,
                variant.total.broken,
                variant.total.broken_percent,
                variant.total.udp_associations,
                variant.total.udp_lost,
                variant.churn.open_least,
                variant.total.lived_5_events_percent,
                variant.churn.flows_in_chains_of_3_most,
                variant.units.second_hops_percent,
                variant.total.longest_gap_ms,
            );
            for service in &variant.services {
                let _ = writeln!(
                    out,
                    "  {:<14} {:>7} {:>11} {:>7} {:>7.2} {:>9} {:>8}",
                    service.name,
                    "",
                    service.connections,
                    service.broken,
                    100.0 * service.broken as f64 / service.connections.max(1) as f64,
                    service.udp_associations,
                    service.udp_lost,
                );
            }
            for settled in &variant.settled {
                let _ = writeln!(
                    out,
                    "  {:.0} s after the last event: {:.2} % second hops, {} buckets in chains, {} flows away from their bucket",
                    settled.after_s, settled.second_hops_percent, settled.chained_buckets, settled.flows_away
                );
            }
        }
        let _ = write!(
            out,
            "open: connections open at an event, at least. ≥5 ev.: connections that lived through five events or more.\n\
             chain ≥3: most flows at a time in buckets with three earlier owners or more. Seed {}.",
            self.seed
        );
        out
    }
}
