//! Figures and reports. Field names are the JSON keys, and are kept.

use std::collections::BTreeSet;

use serde::Serialize;

use super::cause::Causes;

/// Counts of one side, at any moment.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Figures {
    /// TCP connections begun; at the server those it has accepted.
    pub connections: u64,
    /// Of those, how many opened.
    pub opened: u64,
    /// Ended as they should, every byte compared, a FIN from both ends.
    pub completed: u64,
    /// Open now.
    pub open: u64,
    /// Long ones open now.
    pub open_long: u64,
    /// Broken by any cause.
    pub broken: u64,
    /// The same by cause.
    pub broken_by_cause: Causes,
    /// Longest time between two pieces of data of a long connection while data was owed, ms.
    pub longest_gap_ms: f64,
    /// UDP associations so far.
    pub udp_associations: u64,
    /// Datagrams sent; at the server its answers.
    pub udp_sent: u64,
    /// Answers that came and were right; at the server datagrams that were.
    pub udp_answered: u64,
    /// Associations that were lost.
    pub udp_lost: u64,
}

/// Result of one side.
#[derive(Clone, Debug, Default, Serialize)]
pub struct SideReport {
    /// Counts at the end.
    #[serde(flatten)]
    pub figures: Figures,
    /// Connections and associations cut by this side because the time to end was over: neither completed nor broken.
    pub undecided: u64,
    /// Connections the server saw open and end without a byte, such as a balancer's probes. Not broken here; a client
    /// behind one counts it.
    pub without_data: u64,
    /// Short connections that were not begun because too many were open.
    pub short_skipped: u64,
    /// Bytes that arrived over TCP and were compared.
    pub bytes_checked: u64,
    /// Longest time this side's thread was late, ms: gaps up to this length may be the machine's.
    pub longest_delay_ms: f64,
    /// Associations without an answer for 3 s.
    pub udp_no_answer: u64,
    /// Associations whose source changed.
    pub udp_source_changed: u64,
    /// Datagrams with a wrong byte.
    pub udp_corrupt: u64,
    /// This side could not do its part: no descriptors, no ports.
    pub local_errors: u64,
    /// First faults, one line each.
    pub faults: Vec<String>,
    /// One for each mark.
    pub marks: Vec<MarkReport>,
    /// Number of closed connections by the number of marks that they lived through; the last is "so many or more".
    pub lived_marks: Vec<u64>,
    /// Broken connections, by identity; not all if they are very many.
    #[serde(skip)]
    pub broken_ids: Vec<u64>,
    /// Lost associations, likewise.
    #[serde(skip)]
    pub lost_ids: Vec<u64>,
}

impl SideReport {
    /// Whether nothing broke, everything was decided, and this side did its part.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        let figures = &self.figures;
        figures.broken == 0
            && figures.udp_lost == 0
            && self.udp_corrupt == 0
            && self.undecided == 0
            && self.local_errors == 0
    }

    /// Share of the closed connections that lived through at least so many marks, percent.
    #[must_use]
    pub fn lived_percent(&self, marks: usize) -> f64 {
        let total: u64 = self.lived_marks.iter().sum();
        let over: u64 = self.lived_marks.iter().skip(marks).sum();
        over as f64 * 100.0 / total.max(1) as f64
    }
}

/// A moment the caller has marked.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct MarkReport {
    /// Since this side began, ms.
    pub at_ms: f64,
    /// Connections open then.
    pub open: u64,
    /// Long ones of them.
    pub open_long: u64,
    /// Of those open then, how many broke later.
    pub broken_later: u64,
    /// Longest gap that ended between this mark and the next, ms.
    pub longest_gap_ms: f64,
}

/// Broken connections of both sides by cause. One connection may be counted on both.
#[derive(Clone, Debug, Default, Serialize)]
pub struct BySide {
    /// Seen by the client.
    pub client: Causes,
    /// Seen by the servers.
    pub server: Causes,
}

/// Result of client and servers together.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// TCP connections begun.
    pub connections: u64,
    /// Those that broke for the client, for a server or for both; each once.
    pub broken: u64,
    /// By cause and side.
    pub broken_by_cause: BySide,
    /// UDP associations begun.
    pub udp_associations: u64,
    /// Those that were lost for the client, for a server or for both; each once.
    pub udp_lost: u64,
    /// Longest gap of either side, ms.
    pub longest_gap_ms: f64,
    /// The client's own.
    pub client: SideReport,
    /// The servers' own.
    pub servers: Vec<SideReport>,
}

impl Report {
    /// Unites what client and servers saw.
    #[must_use]
    pub fn new(client: SideReport, servers: Vec<SideReport>) -> Report {
        let sides = || std::iter::once(&client).chain(&servers);
        let mut server = Causes::default();
        servers.iter().for_each(|side| server.add(&side.figures.broken_by_cause));
        Report {
            connections: client.figures.connections,
            broken: united(sides().map(|side| (&side.broken_ids, side.figures.broken))),
            broken_by_cause: BySide { client: client.figures.broken_by_cause, server },
            udp_associations: client.figures.udp_associations,
            udp_lost: united(sides().map(|side| (&side.lost_ids, side.figures.udp_lost))),
            longest_gap_ms: sides().map(|side| side.figures.longest_gap_ms).fold(0.0, f64::max),
            client,
            servers,
        }
    }

    /// Whether nothing broke, everything was decided, and all sides did their part.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.client.is_clean() && self.servers.iter().all(SideReport::is_clean)
    }
}

/// Number of different identities, and of those that have none.
fn united<'a>(sides: impl Iterator<Item = (&'a Vec<u64>, u64)>) -> u64 {
    let (mut ids, mut unknown) = (BTreeSet::<u64>::new(), 0);
    for (known, count) in sides {
        ids.extend(known);
        unknown += count.saturating_sub(known.len() as u64);
    }
    ids.len() as u64 + unknown
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::traffic::churn::cause::Cause;

    fn side(broken_ids: Vec<u64>, broken: u64, gap: f64) -> SideReport {
        let broken_by_cause = Causes::from_fn(|c| if c == Cause::Stall { broken } else { 0 });
        let figures = Figures { broken, broken_by_cause, longest_gap_ms: gap, ..Figures::default() };
        SideReport { figures, broken_ids, ..SideReport::default() }
    }

    #[test]
    fn a_connection_broken_on_both_sides_is_one() {
        let report =
            Report::new(side(vec![1, 2], 2, 7.0), vec![side(vec![2, 3], 3, 9.0), side(Vec::new(), 0, 0.0)]);
        // Connection 2 on both sides; one of the server's never said who it was.
        assert_eq!(report.broken, 4);
        assert_eq!(report.broken_by_cause.client.count(Cause::Stall), 2);
        assert_eq!(report.broken_by_cause.server.count(Cause::Stall), 3);
        assert_eq!(report.longest_gap_ms, 9.0);
        assert!(!report.is_clean());
        let json = serde_json::to_value(&report).unwrap();
        for key in ["connections", "broken", "udp_associations", "udp_lost", "longest_gap_ms"] {
            assert!(json[key].is_number() && json["client"][key].is_number(), "{key}");
        }
        assert_eq!(json["broken_by_cause"]["server"]["stall"], 3);
    }

    #[test]
    fn the_share_that_lived_through_marks() {
        let report = SideReport { lived_marks: vec![6, 2, 1, 1], ..SideReport::default() };
        assert_eq!([0, 1, 2, 3, 4].map(|n| report.lived_percent(n)), [100.0, 40.0, 20.0, 10.0, 0.0]);
    }
}
