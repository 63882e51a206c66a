//! Counts of one side while it runs, read by other threads.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use linux::clock::monotonic_ns;

use super::cause::{Cause, Causes, UdpCause};
use super::report::{Figures, MarkReport, SideReport};

/// Faults kept as text; more are only counted.
const FAULTS_MAX: usize = 20;
/// Identities of broken connections and lost associations that are kept, so that both sides' can be united.
const BROKEN_KEPT_MAX: usize = 100_000;
/// Marks that are kept; later ones count what is open, and nothing more.
const MARKS_MAX: usize = 65_536;
/// Connections that lived through so many marks or more are counted together.
pub(super) const LIVED_MARKS_MAX: usize = 32;

/// A count that one thread raises and others read.
#[derive(Debug, Default)]
pub(super) struct Count(AtomicU64);

impl Count {
    pub(super) fn add(&self, more: u64) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    pub(super) fn sub(&self, less: u64) {
        self.0.fetch_sub(less, Ordering::Relaxed);
    }

    pub(super) fn at_least(&self, value: u64) {
        self.0.fetch_max(value, Ordering::Relaxed);
    }

    pub(super) fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    fn swap(&self, value: u64) -> u64 {
        self.0.swap(value, Ordering::Relaxed)
    }
}

/// Counts of TCP connections.
#[derive(Debug, Default)]
pub(super) struct TcpCounts {
    pub(super) begun: Count,
    pub(super) opened: Count,
    pub(super) completed: Count,
    pub(super) open: Count,
    pub(super) open_long: Count,
    /// Ended by us at the end of the run, in the middle.
    pub(super) undecided: Count,
    /// Ended before their first byte: probes of a balancer, or connections whose client counts them.
    pub(super) without_data: Count,
    /// Short ones that were not begun because too many were open.
    pub(super) skipped: Count,
    pub(super) bytes: Count,
    gap_ns: Count,
    gap_since_mark_ns: Count,
}

/// Counts of UDP associations.
#[derive(Debug, Default)]
pub(super) struct UdpCounts {
    pub(super) associations: Count,
    pub(super) sent: Count,
    pub(super) answered: Count,
    pub(super) corrupt: Count,
    no_answer: Count,
    source_changed: Count,
}

/// All counts of one side.
#[derive(Debug, Default)]
pub(super) struct Meter {
    pub(super) tcp: TcpCounts,
    pub(super) udp: UdpCounts,
    /// Longest time by which the thread was late.
    pub(super) late_ns: Count,
    causes: [Count; Cause::ALL.len()],
    local_errors: Count,
    records: Mutex<Records>,
}

/// Things that do not fit in a count.
#[derive(Debug)]
struct Records {
    start_ns: u64,
    faults: Vec<String>,
    broken: Vec<u64>,
    lost: Vec<u64>,
    /// By the number of marks before a connection opened.
    open: Vec<u64>,
    broke: Vec<u64>,
    marks: Vec<Mark>,
    lived: [u64; LIVED_MARKS_MAX + 1],
}

#[derive(Clone, Copy, Debug)]
struct Mark {
    at_ns: u64,
    open: u64,
    open_long: u64,
    broken: u64,
    gap_ns: u64,
}

impl Default for Records {
    fn default() -> Self {
        Self {
            start_ns: monotonic_ns(),
            faults: Vec::new(),
            broken: Vec::new(),
            lost: Vec::new(),
            open: vec![0],
            broke: vec![0],
            marks: Vec::new(),
            lived: [0; LIVED_MARKS_MAX + 1],
        }
    }
}

impl Meter {
    /// A connection has opened; the number of marks before it, which [`closed`](Self::closed) wants back.
    pub(super) fn opened(&self, long: bool) -> usize {
        self.tcp.opened.add(1);
        self.tcp.open.add(1);
        self.tcp.open_long.add(u64::from(long));
        let mut records = self.records();
        let epoch = records.open.len() - 1;
        records.open[epoch] += 1;
        epoch
    }

    /// A connection that had opened is closed, broken or not.
    pub(super) fn closed(&self, long: bool, epoch: usize, broken: bool) {
        self.tcp.open.sub(1);
        self.tcp.open_long.sub(u64::from(long));
        let mut records = self.records();
        records.open[epoch] -= 1;
        records.broke[epoch] += u64::from(broken);
        let lived = records.marks.len().saturating_sub(epoch).min(LIVED_MARKS_MAX);
        records.lived[lived] += 1;
    }

    /// A connection broke. `id` is none if the server does not know it yet.
    pub(super) fn broke(&self, cause: Cause, id: Option<u64>, text: impl FnOnce() -> String) {
        self.causes[cause as usize].add(1);
        let mut records = self.records();
        if let Some(id) = id.filter(|_| records.broken.len() < BROKEN_KEPT_MAX) {
            records.broken.push(id);
        }
        records.fault(|| format!("{}: {}", cause.name(), text()));
    }

    /// An association is lost.
    pub(super) fn lost(&self, cause: UdpCause, id: u64, text: impl FnOnce() -> String) {
        match cause {
            UdpCause::NoAnswer => self.udp.no_answer.add(1),
            UdpCause::SourceChanged => self.udp.source_changed.add(1),
        }
        let mut records = self.records();
        if records.lost.len() < BROKEN_KEPT_MAX {
            records.lost.push(id);
        }
        records.fault(text);
    }

    /// This side itself could not do its part: no descriptors, no ports.
    pub(super) fn local_error(&self, text: impl FnOnce() -> String) {
        self.local_errors.add(1);
        self.records().fault(text);
    }

    /// A piece of a long connection arrived so long after the one before it, or after it was owed.
    pub(super) fn gap(&self, ns: u64) {
        self.tcp.gap_ns.at_least(ns);
        self.tcp.gap_since_mark_ns.at_least(ns);
    }

    /// Number of connections that are open now, to which [`alive`](Self::alive) refers later by the mark's number.
    pub(super) fn mark(&self) -> (usize, u64) {
        let mut records = self.records();
        let open = records.open.iter().sum();
        let number = records.marks.len();
        if number < MARKS_MAX {
            self.end_gap(&mut records);
            let (open_long, broken) = (self.tcp.open_long.value(), records.broke.iter().sum());
            records.marks.push(Mark { at_ns: monotonic_ns(), open, open_long, broken, gap_ns: 0 });
            records.open.push(0);
            records.broke.push(0);
        }
        (number, open)
    }

    /// Number of connections that were open at the mark and are still.
    pub(super) fn alive(&self, mark: usize) -> u64 {
        self.records().open.iter().take(mark + 1).sum()
    }

    /// The counts as they are now.
    pub(super) fn figures(&self) -> Figures {
        let broken_by_cause = self.causes();
        Figures {
            connections: self.tcp.begun.value(),
            opened: self.tcp.opened.value(),
            completed: self.tcp.completed.value(),
            open: self.tcp.open.value(),
            open_long: self.tcp.open_long.value(),
            broken: broken_by_cause.total(),
            broken_by_cause,
            longest_gap_ms: ms(self.tcp.gap_ns.value()),
            udp_associations: self.udp.associations.value(),
            udp_sent: self.udp.sent.value(),
            udp_answered: self.udp.answered.value(),
            udp_lost: self.udp.no_answer.value() + self.udp.source_changed.value(),
        }
    }

    /// The report, at the end.
    pub(super) fn report(&self) -> SideReport {
        let mut records = self.records();
        self.end_gap(&mut records);
        SideReport {
            figures: self.figures(),
            undecided: self.tcp.undecided.value(),
            without_data: self.tcp.without_data.value(),
            short_skipped: self.tcp.skipped.value(),
            bytes_checked: self.tcp.bytes.value(),
            longest_delay_ms: ms(self.late_ns.value()),
            udp_no_answer: self.udp.no_answer.value(),
            udp_source_changed: self.udp.source_changed.value(),
            udp_corrupt: self.udp.corrupt.value(),
            local_errors: self.local_errors.value(),
            faults: records.faults.clone(),
            marks: records.marks(),
            lived_marks: records.lived.to_vec(),
            broken_ids: records.broken.clone(),
            lost_ids: records.lost.clone(),
        }
    }

    fn causes(&self) -> Causes {
        Causes::from_fn(|cause| self.causes[cause as usize].value())
    }

    fn end_gap(&self, records: &mut Records) {
        let gap_ns = self.tcp.gap_since_mark_ns.swap(0);
        if let Some(last) = records.marks.last_mut() {
            last.gap_ns = last.gap_ns.max(gap_ns);
        }
    }

    fn records(&self) -> MutexGuard<'_, Records> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Records {
    fn fault(&mut self, text: impl FnOnce() -> String) {
        if self.faults.len() < FAULTS_MAX {
            let ms = ms(monotonic_ns().saturating_sub(self.start_ns));
            self.faults.push(format!("{ms:.0} ms: {}", text()));
        }
    }

    fn marks(&self) -> Vec<MarkReport> {
        let report = |(number, mark): (usize, &Mark)| {
            let broken: u64 = self.broke.iter().take(number + 1).sum();
            MarkReport {
                at_ms: ms(mark.at_ns.saturating_sub(self.start_ns)),
                open: mark.open,
                open_long: mark.open_long,
                broken_later: broken.saturating_sub(mark.broken),
                longest_gap_ms: ms(mark.gap_ns),
            }
        };
        self.marks.iter().enumerate().map(report).collect()
    }
}

/// Milliseconds, to the microsecond.
fn ms(ns: u64) -> f64 {
    (ns / 1_000) as f64 / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_tell_what_was_open_what_lives_and_what_broke_later() {
        let meter = Meter::default();
        let early = [meter.opened(true), meter.opened(false), meter.opened(false)];
        meter.closed(false, early[1], true);
        meter.gap(5_000_000);
        assert_eq!(meter.mark(), (0, 2));
        let late = meter.opened(false);
        meter.gap(2_000_000);
        assert_eq!(meter.mark(), (1, 3));
        assert_eq!((meter.alive(0), meter.alive(1)), (2, 3));
        meter.closed(true, early[0], true);
        meter.closed(false, late, false);
        assert_eq!((meter.alive(0), meter.alive(1)), (1, 1));
        meter.gap(3_000_000);
        let report = meter.report();
        let marks: Vec<_> =
            report.marks.iter().map(|m| (m.open, m.open_long, m.broken_later, m.longest_gap_ms)).collect();
        assert_eq!(marks, [(2, 1, 1, 2.0), (3, 1, 1, 3.0)]);
        assert_eq!(report.lived_marks[..4], [1, 1, 1, 0]);
        assert_eq!(report.figures.longest_gap_ms, 5.0);
    }

    #[test]
    fn faults_and_identities_have_a_limit_and_counts_have_none() {
        let meter = Meter::default();
        for id in 0..1_000 {
            meter.broke(Cause::Reset, Some(id), || format!("connection {id}"));
            meter.lost(UdpCause::NoAnswer, id, || format!("association {id}"));
        }
        let report = meter.report();
        assert_eq!((report.figures.broken, report.figures.udp_lost), (1_000, 1_000));
        assert_eq!((report.faults.len(), report.broken_ids.len()), (FAULTS_MAX, 1_000));
    }
}
