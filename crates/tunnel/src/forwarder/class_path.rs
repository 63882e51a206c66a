//! Service of the classes (row T12): urgent ones go ahead of the rest up to their share, on one path at a time; pinned ones stay where
//! they are, cheap ones keep to the cheapest paths; of critical ones a second path carries the same sealed bytes (row R3).

use std::sync::atomic::Ordering::Relaxed;

use super::Output;
use super::flows::Stay;
use super::transmit::{Flow, PathTx, Repeat, Transmit, Waiting, wire_bytes};
use crate::class::Class;
use crate::config::Spread;
use crate::queue::FqCodel;
use crate::schedule::{Choice, ClassPolicy, EvenShares, PathView, choose, choose_on};
use crate::time::Time;

/// Urgent classes may send this share of the bond's rate ahead of others that wait: one half.
const URGENT_SHARE: u64 = 2;
/// Unused share is kept for this long, ns.
const SHARE_KEPT_NS: u64 = 100_000_000;
/// A path must be quicker by this much before an urgent flow leaves its own for it, ns.
const QUICKER_NS: i64 = 2_000_000;
/// A flow that rested leaves its path only if nothing can be under way there any more: difference of delays, so many times the
/// jitter, and this, ns.
const REST_NS: i64 = 2_000_000;
const REST_JITTERS: i64 = 4;
/// A packet waits no longer than this for what it must not overtake, ns.
const WAIT_NS_MAX: i64 = 100_000_000;

/// Packets of urgent classes, and what else classes need.
#[derive(Default)]
pub(super) struct ClassQueues {
    /// Packets of urgent classes that could not leave at once.
    pub urgent: Option<Box<FqCodel<Waiting>>>,
    share: Share,
    /// Of the paths, where bulk is spread evenly.
    shares: EvenShares,
    /// Datagrams that have just left and go over a second path as well.
    pub copies: Vec<Repeat>,
    views: Vec<PathView>,
}

/// Bytes that urgent classes may still send ahead of others.
#[derive(Default)]
struct Share {
    bytes: i64,
    at: Time,
}

impl Share {
    /// Adds what came together since the last call, at `rate` bytes per second.
    fn refill(&mut self, now: Time, rate: u64) {
        let rate = rate / URGENT_SHARE;
        let new = |ns: u64| (rate / 1_000).saturating_mul(ns / 1_000) / 1_000;
        let most = new(SHARE_KEPT_NS).max(16_384) as i64;
        let since_ns = now.since(self.at).min(SHARE_KEPT_NS);
        let bytes = new(since_ns) as i64;
        if bytes > 0 {
            self.bytes = (self.bytes + bytes).min(most);
            self.at = now;
        }
    }

    fn take(&mut self, bytes: u64) {
        // No debt beyond a few packets: who sends alone owes nothing to those who come later.
        self.bytes = (self.bytes - bytes as i64).max(-4_096);
    }
}

fn is_empty(queue: Option<&FqCodel<Waiting>>) -> bool {
    queue.is_none_or(FqCodel::is_empty)
}

impl Transmit {
    /// Whether a packet need not wait for others, of urgent classes or of the rest.
    pub(super) fn may_leave_at_once(&mut self, now: Time, urgent: bool) -> bool {
        let none_urgent = is_empty(self.classes.urgent.as_deref());
        if urgent {
            return none_urgent && self.share_allows(now);
        }
        none_urgent && self.repeats.is_empty() && is_empty(self.queue.as_deref())
    }

    /// Whether urgent classes may go ahead: always while nobody else waits, else up to their share.
    pub(super) fn share_allows(&mut self, now: Time) -> bool {
        if is_empty(self.queue.as_deref()) {
            return true;
        }
        let rate = self.views.iter().fold(0u64, |sum, view| sum.saturating_add(view.rate));
        self.classes.share.refill(now, rate);
        if self.classes.share.bytes <= 0 {
            self.wake = self.wake.min(now.plus_us(1_000));
            return false;
        }
        true
    }

    /// Bytes that wait in both queues.
    pub(super) fn waiting_bytes(&self) -> usize {
        let queues = [self.queue.as_deref(), self.classes.urgent.as_deref()];
        queues.into_iter().flatten().map(FqCodel::bytes).sum()
    }

    /// Flows that were set aside take part again.
    pub(super) fn unpark_all(&mut self, now: Time) {
        for queue in [&mut self.queue, &mut self.classes.urgent].into_iter().flatten() {
            queue.unpark_all(now);
        }
    }

    /// Where the next `bytes` of a flow go.
    pub(super) fn choose_for(&mut self, now: Time, bytes: u32, flow: Flow) -> Choice {
        let policy = if flow.treatment.express { ClassPolicy::SPARSE } else { ClassPolicy::BULK };
        match flow.treatment.class {
            Class::Bulk if self.flows.spread == Spread::Uniform => {
                self.classes.shares.choose(now, &self.views, &policy)
            }
            Class::Bulk if flow.treatment.stays => self.choose_one(now, bytes, flow, &policy),
            Class::Bulk => choose(now, &self.views, bytes, &policy, self.last_path),
            Class::Cheap => self.choose_cheapest(now, bytes, &policy),
            Class::Interactive | Class::Critical | Class::Pinned => {
                self.choose_one(now, bytes, flow, &policy)
            }
        }
    }

    /// Of the paths of the lowest price the one with the earliest arrival that may be booked.
    fn choose_cheapest(&mut self, now: Time, bytes: u32, policy: &ClassPolicy) -> Choice {
        self.look_at_cheapest();
        let (mut best, mut until): (Option<(i64, u8, Time)>, Time) = (None, Time::MAX);
        for view in &self.classes.views {
            match choose_on(now, &self.views, view, policy) {
                Choice::Send { path, depart } => {
                    let arrival_ns = depart.since(now) as i64 + view.arrival_ns(bytes);
                    if best.is_none_or(|(earliest_ns, ..)| arrival_ns < earliest_ns) {
                        best = Some((arrival_ns, path, depart));
                    }
                }
                Choice::Wait { until: free } => until = until.min(free),
                Choice::None => {}
            }
        }
        match best {
            Some((_, path, depart)) => Choice::Send { path, depart },
            None if until < Time::MAX => Choice::Wait { until },
            None => Choice::None,
        }
    }

    /// The paths of the lowest price.
    fn look_at_cheapest(&mut self) {
        let price = |view: &PathView| {
            let tx = self.paths.iter().find(|tx| tx.path.id == view.id);
            tx.map_or(u32::MAX, |tx| tx.path.price())
        };
        let least = self.views.iter().map(price).min();
        self.classes.views.clear();
        self.classes.views.extend(self.views.iter().filter(|view| Some(price(view)) == least));
    }

    /// Notes after which rest of a flow nothing of it is under way any more, on whatever path it was.
    pub(super) fn note_rest(&mut self) {
        let (mut least_us, mut most_us, mut jitter_us) = (i64::MAX, 0, 0);
        for (_, delay_us, path_jitter_us) in self.timing() {
            least_us = least_us.min(delay_us);
            most_us = most_us.max(delay_us);
            jitter_us = jitter_us.max(i64::from(path_jitter_us));
        }
        let rest_us = (most_us - least_us.min(most_us)) + REST_JITTERS * jitter_us + REST_NS / 1_000;
        self.flows.rest_ms = u16::try_from(rest_us / 1_000 + 1).unwrap_or(u16::MAX);
    }

    /// The path of a flow that has one.
    fn choose_one(&mut self, now: Time, bytes: u32, flow: Flow, policy: &ClassPolicy) -> Choice {
        let stay = self.flows.stay(flow.own_hash);
        let (view, from) = if flow.treatment.class == Class::Pinned {
            (self.pinned_to(now, bytes, stay), now)
        } else {
            self.quickest(now, bytes, stay)
        };
        let Some(view) = view else { return Choice::None };
        if from > now {
            return Choice::Wait { until: from };
        }
        let choice = choose_on(now, &self.views, &view, policy);
        if let Choice::Send { depart, .. } = choice {
            self.flows.set_path(depart, flow.own_hash, view.id, view.arrival_ns(bytes) / 1_000);
        }
        choice
    }

    /// For an urgent flow: its path as long as it carries, or a quicker one, and from when on. What the flow has under way is not
    /// overtaken: its next packet waits until then, if it arrives sooner all the same.
    fn quickest(&self, now: Time, bytes: u32, stay: Stay) -> (Option<PathView>, Time) {
        let Some(best) = self.views.iter().min_by_key(|view| view.arrival_ns(bytes)) else {
            return (None, now);
        };
        let Some(own) = self.views.iter().find(|view| view.id == stay.path) else {
            return (Some(*best), now);
        };
        let quicker_ns = own.arrival_ns(bytes) - best.arrival_ns(bytes);
        if quicker_ns <= QUICKER_NS {
            return (Some(*own), now);
        }
        // By what was known of the path when the newest packet left, and by what is known now.
        let now_us = now.us() as u32;
        let lands_us = |at_us: u32| i64::from(at_us.wrapping_sub(now_us).cast_signed());
        let then_us = lands_us(stay.lands_us);
        let since_us = lands_us(stay.left_us.wrapping_add((own.arrival_ns(bytes) / 1_000) as u32));
        let spare_ns = i64::from(own.jitter_us) * REST_JITTERS * 1_000 + REST_NS;
        let wait_ns = then_us.max(since_us) * 1_000 - best.arrival_ns(bytes) + spare_ns;
        if wait_ns <= 0 {
            (Some(*best), now)
        } else if wait_ns < quicker_ns.min(WAIT_NS_MAX) {
            (Some(*best), now.plus_ns(wait_ns as u64))
        } else {
            (Some(*own), now)
        }
    }

    /// For a pinned flow: a path over a WAN that its rule names, whatever its tier; else its path as long as it carries; else the one
    /// with the earliest arrival.
    fn pinned_to(&self, now: Time, bytes: u32, stay: Stay) -> Option<PathView> {
        if let Some(wans) = self.flows.classes().rule(stay.rule).and_then(|rule| rule.wans.as_ref()) {
            let named =
                |tx: &&PathTx| tx.path.usable() && tx.path.may_send() && wans.contains(&tx.path.route().wan);
            let own = self.paths.iter().filter(named).find(|tx| tx.path.id == stay.path);
            let tx = own.or_else(|| self.paths.iter().filter(named).min_by_key(|tx| tx.path.delay_us()));
            if let Some(tx) = tx {
                return Some(PathView { usable: true, ..tx.path.view(now) });
            }
        }
        if let Some(own) = self.views.iter().find(|view| view.id == stay.path) {
            return Some(*own);
        }
        let first = match choose(now, &self.views, bytes, &ClassPolicy::BULK, None) {
            Choice::Send { path, .. } => Some(path),
            Choice::Wait { .. } | Choice::None => None,
        };
        let first = self.views.iter().find(|view| Some(view.id) == first);
        first.or_else(|| self.views.iter().min_by_key(|view| view.arrival_ns(bytes))).copied()
    }

    /// Counts a run that path `at` takes.
    pub(super) fn note_class(&mut self, at: usize, flow: Flow, packets: usize, bytes: u64) {
        let class = flow.treatment.class;
        self.classes.shares.note(self.paths[at].path.id, bytes);
        let counted = &mut self.paths[at].classes[class as usize];
        counted.0 += packets as u64;
        counted.1 += bytes;
        if class.is_urgent() {
            self.classes.share.take(bytes);
        }
    }

    /// Sends what has just left over a second path, the same sealed bytes: one that shares least with the first.
    pub(super) fn send_copies(&mut self, now: Time, out: &mut impl Output) {
        let mut copies = std::mem::take(&mut self.classes.copies);
        for copy in copies.drain(..) {
            let Some(from) = self.paths.iter().position(|tx| tx.path.id == copy.path) else { continue };
            let Some(entry) = self.paths[from].express.entry(copy.number).copied() else { continue };
            let Some(to) = self.second_path(from, entry.bytes) else { continue };
            let reader = self
                .session
                .as_ref()
                .map_or(0, |session| session.reader_of_packets(self.core, entry.peer_core));
            let target = self.paths[to].target(&self.bond, reader);
            self.paths[to].path.book(now, wire_bytes(1, entry.bytes));
            let log = &mut self.paths[from].express;
            out.transmit(&target, entry.bytes, log.datagram_mut(copy.number));
            log.note_copied(copy.number);
            self.paths[to].path.traffic.copies.fetch_add(1, Relaxed);
        }
        self.classes.copies = copies;
    }

    /// The path for copies of what path `from` carries: over another WAN and to another address if possible, then the quickest.
    fn second_path(&self, from: usize, bytes: usize) -> Option<usize> {
        let first = self.paths[from].path.route();
        let shared = |tx: &PathTx| {
            let route = tx.path.route();
            u8::from(route.wan == first.wan) + u8::from(route.remote.ip() == first.remote.ip())
        };
        let others = self
            .paths
            .iter()
            .enumerate()
            .filter(|(at, tx)| *at != from && tx.path.carries() && tx.path.datagram_bytes() >= bytes);
        others.min_by_key(|(_, tx)| (shared(tx), tx.path.delay_us())).map(|(at, _)| at)
    }
}

/// Adds what each class had on a path to the path's shared counters.
pub(super) fn publish(tx: &mut PathTx) {
    for ((packets, bytes), shared) in tx.classes.iter_mut().zip(&tx.path.traffic.classes) {
        if *packets > 0 {
            shared.packets.fetch_add(std::mem::take(packets), Relaxed);
            shared.bytes.fetch_add(std::mem::take(bytes), Relaxed);
        }
    }
}
