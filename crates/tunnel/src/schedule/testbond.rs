//! Several links, one queue, the scheduler and one rate controller per path, in virtual time.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::VecDeque;

use super::{Choice, Class, ClassPolicy, PathView, TxFree, choose};
use crate::queue::{CodelVerdict, FqCodel, Item};
use crate::rate::RateController;
use crate::rate::testlink::{Link, MS, MTU, Reader, Report, Rng, Spec, Stalls};
use crate::time::Time;

/// A super-packet of one flow.
#[derive(Debug)]
pub(super) struct Super {
    pub(super) flow: u32,
    pub(super) left: u32,
    pub(super) at: u64,
}

impl Item for Super {
    fn bytes(&self) -> usize {
        self.left as usize * MTU as usize
    }
    fn enqueued_at(&self) -> Time {
        Time::from_ns(self.at)
    }
    fn ecn_capable(&self) -> bool {
        false
    }
}

/// When a packet arrived.
#[derive(Clone, Copy, Debug)]
pub(super) struct Arrival {
    pub(super) flow: u32,
    pub(super) sequence: u32,
    pub(super) at: u64,
    /// When it was put into the queue.
    pub(super) born: u64,
}

pub(super) struct Path {
    pub(super) link: Link,
    pub(super) control: RateController,
    tx_free: TxFree,
    pending: VecDeque<(u64, u64)>,
    limited: bool,
    reports: VecDeque<(u64, Report)>,
    reader: Reader,
}

pub(super) struct Bond {
    pub(super) now: u64,
    pub(super) paths: Vec<Path>,
    pub(super) queue: FqCodel<Super>,
    /// Greedy flows keep this many bytes waiting.
    pub(super) greedy: Vec<u32>,
    /// A packet of this flow every so many ns.
    pub(super) ping: Option<(u32, u64, u64)>,
    pub(super) sender: Stalls,
    born: Vec<(u64, u32, u32)>,
    sequences: [u32; 16],
    last: Option<u8>,
    next_report: u64,
    arrivals: Vec<Arrival>,
    record: bool,
    rng: Rng,
    views: Vec<PathView>,
}

impl Bond {
    pub(super) fn new(specs: Vec<Spec>, start: f64) -> Self {
        let mut queue = FqCodel::new(4 << 20, 4096, 2 * MTU as usize);
        queue.set_codel(1_000_000_000, 1_000_000_000);
        let path = |spec: Spec| Path {
            link: Link::new(spec),
            control: RateController::new(start as u64, 8_000, None),
            tx_free: TxFree::new(),
            pending: VecDeque::new(),
            limited: false,
            reports: VecDeque::new(),
            reader: Reader::default(),
        };
        Self {
            now: 0,
            paths: specs.into_iter().map(path).collect(),
            queue,
            greedy: Vec::new(),
            ping: None,
            sender: Stalls::never(),
            born: Vec::new(),
            sequences: [0; 16],
            last: None,
            next_report: 20 * MS,
            arrivals: Vec::new(),
            record: false,
            rng: Rng(99),
            views: Vec::new(),
        }
    }

    pub(super) fn run(&mut self, end: u64) {
        loop {
            self.offer();
            let wake = self.dispatch();
            let mut next = self.next_report.min(wake);
            for path in &self.paths {
                next = next.min(path.pending.front().map_or(u64::MAX, |entry| entry.0));
                next = next.min(path.reports.front().map_or(u64::MAX, |report| report.0));
            }
            if let Some((_, _, due)) = self.ping {
                next = next.min(due);
            }
            if next > end {
                self.now = end;
                self.receive();
                return;
            }
            self.now = self.sender.delay(next.max(self.now)).max(self.now);
            if self.now >= self.next_report {
                self.tick();
            }
            self.read_reports();
            self.transmit();
        }
    }

    /// The sources put their packets into the queue.
    fn offer(&mut self) {
        let greedy: Vec<u32> = self.greedy.clone();
        while self.queue.bytes() < 1 << 20 && !greedy.is_empty() {
            for &flow in &greedy {
                let item = Super { flow, left: 43, at: self.now };
                self.queue.enqueue(Time::from_ns(self.now), flow, item, &mut |_| ());
            }
        }
        if let Some((flow, every, due)) = self.ping
            && due <= self.now
        {
            let item = Super { flow, left: 1, at: due };
            self.queue.enqueue(Time::from_ns(self.now), flow, item, &mut |_| ());
            self.ping = Some((flow, every, due + every + self.rng.next() % MS));
        }
    }

    /// Gives packets from the queue to paths; returns when to try again.
    fn dispatch(&mut self) -> u64 {
        let now = Time::from_ns(self.now);
        loop {
            self.look();
            let Some(head) = self.queue.head(now) else { return u64::MAX };
            if head.codel == CodelVerdict::Drop {
                head.item.left -= 1;
                let finished = head.item.left == 0;
                self.queue.consume(now, MTU as usize, finished);
                continue;
            }
            let run = head.item.left.min(8).min((head.budget_bytes as u32).div_ceil(MTU));
            let class = if head.sparse { ClassPolicy::SPARSE } else { ClassPolicy::BULK };
            let last = if class.class == Class::Bulk { self.last } else { None };
            match choose(now, &self.views, run * MTU, &class, last) {
                Choice::Send { path: id, depart } => {
                    let path = &mut self.paths[usize::from(id)];
                    let booked = path.tx_free.reserve(now, u64::from(run * MTU), path.control.rate(), 1_000);
                    let due = if head.sparse { depart } else { booked };
                    path.limited |= booked > now;
                    for _ in 0..run {
                        let sequence = &mut self.sequences[head.item.flow as usize];
                        let tag = u64::from(head.item.flow) << 32 | u64::from(*sequence);
                        if head.item.flow > 7 {
                            self.born.push((head.item.at, head.item.flow, *sequence));
                        }
                        *sequence += 1;
                        if head.sparse {
                            path.pending.push_front((due.ns(), tag));
                        } else {
                            path.pending.push_back((due.ns(), tag));
                        }
                    }
                    head.item.left -= run;
                    let finished = head.item.left == 0;
                    if class.class == Class::Bulk {
                        self.last = Some(id);
                    }
                    self.queue.consume(now, (run * MTU) as usize, finished);
                }
                Choice::Wait { until } => {
                    for path in &mut self.paths {
                        path.limited |= path.tx_free.get() > now;
                    }
                    return until.ns();
                }
                Choice::None => return u64::MAX,
            }
        }
    }

    fn look(&mut self) {
        self.views.clear();
        for (id, path) in self.paths.iter().enumerate() {
            self.views.push(PathView {
                id: id as u8,
                rate: path.control.rate(),
                tx_free: path.tx_free.get(),
                delay_us: path.control.delay_us(),
                unmeasured_us: 0,
                jitter_us: path.control.jitter_us(),
                tier: 0,
                usable: true,
            });
        }
    }

    fn transmit(&mut self) {
        for path in &mut self.paths {
            while let Some(&(due, tag)) = path.pending.front()
                && due <= self.now
            {
                path.pending.pop_front();
                path.link.send(self.now, MTU, tag);
            }
        }
    }

    fn receive(&mut self) {
        let (arrivals, record) = (&mut self.arrivals, self.record);
        for path in &mut self.paths {
            path.link.receive(self.now, |packet| {
                if record {
                    let (flow, sequence) = ((packet.tag >> 32) as u32, packet.tag as u32);
                    arrivals.push(Arrival { flow, sequence, at: packet.arrival, born: 0 });
                }
            });
        }
    }

    fn tick(&mut self) {
        self.receive();
        self.next_report += 20 * MS;
        for path in &mut self.paths {
            let at = self.now + path.link.spec.back_us * 1_000;
            path.reports.push_back((at, path.link.report(self.now, 0)));
        }
    }

    fn read_reports(&mut self) {
        for path in &mut self.paths {
            while let Some(&(at, report)) = path.reports.front()
                && at <= self.now
            {
                path.reports.pop_front();
                if let Some(sample) = path.reader.read(self.now, report, path.limited) {
                    path.limited = false;
                    path.control.on_sample(&sample);
                }
            }
        }
    }

    /// Runs `ms` more and returns the rate of everything that arrived, bytes per second.
    pub(super) fn measure(&mut self, ms: u64) -> f64 {
        self.receive();
        self.record = true;
        self.arrivals.clear();
        for path in &mut self.paths {
            path.link.restart_stats(self.now);
        }
        self.run(self.now + ms * MS);
        for arrival in &mut self.arrivals {
            let key = (arrival.flow, arrival.sequence);
            if let Some(born) = self.born.iter().find(|born| (born.1, born.2) == key) {
                arrival.born = born.0;
            }
        }
        self.paths.iter().map(|path| path.link.stats.rate(self.now)).sum()
    }

    /// From the queue to the receiver, ns, sorted.
    pub(super) fn delays(&self, flow: u32) -> Vec<u64> {
        let mut delays: Vec<u64> =
            self.arrivals.iter().filter(|a| a.flow == flow).map(|a| a.at - a.born).collect();
        delays.sort_unstable();
        delays
    }

    /// How long each packet of `flow` would wait for its predecessors that arrive at all, ns, sorted.
    pub(super) fn waits(&self, flow: u32) -> Vec<u64> {
        let mut order: Vec<(u32, u64)> =
            self.arrivals.iter().filter(|a| a.flow == flow).map(|a| (a.sequence, a.at)).collect();
        order.sort_unstable();
        let mut latest = 0;
        let mut waits: Vec<u64> = Vec::with_capacity(order.len());
        for (_, at) in order {
            latest = latest.max(at);
            waits.push(latest - at);
        }
        waits.sort_unstable();
        waits
    }
}
