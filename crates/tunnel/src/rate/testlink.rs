//! A link, its receiver and a paced sender in virtual time, for closed-loop tests.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::VecDeque;

use super::{RateController, Sample};
use crate::schedule::serialise_ns;
use crate::time::Time;

pub(crate) const MS: u64 = 1_000_000;
pub(crate) const SECOND: u64 = 1_000 * MS;
/// Wire size of a full packet.
pub(crate) const MTU: u32 = 1_500;

/// Bytes per second of so many Mbit/s.
pub(crate) fn mbit(rate: f64) -> f64 {
    rate * 125_000.0
}

/// SplitMix64.
#[derive(Clone, Debug)]
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// 0 ≤ x < 1.
    pub(crate) fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    pub(crate) fn exponential(&mut self, mean: f64) -> f64 {
        -mean * (1.0 - self.unit()).ln()
    }
}

/// Delay noise of a link; packets never overtake each other.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Noise {
    None,
    /// Every packet, 0 … µs.
    Uniform(f64),
    /// Every packet, mean µs.
    Exponential(f64),
    /// Every packet, standard deviation µs, never below −4 of them.
    Gauss(f64),
    /// A radio: every 10 ms another delay, mean µs exponential.
    Radio(f64),
}

/// A process that is sometimes not run: every `every_us` on average, for up to `up_to_us`.
#[derive(Clone, Debug)]
pub(crate) struct Stalls {
    every_us: f64,
    up_to_us: f64,
    from: u64,
    to: u64,
    rng: Rng,
}

impl Stalls {
    pub(crate) fn new(every_us: f64, up_to_us: f64, seed: u64) -> Self {
        Self { every_us, up_to_us, from: 0, to: 0, rng: Rng(seed) }
    }

    pub(crate) fn never() -> Self {
        Self { every_us: 0.0, up_to_us: 0.0, from: u64::MAX, to: u64::MAX, rng: Rng(0) }
    }

    /// When something that is due at `at` (not earlier than the call before) really happens.
    pub(crate) fn delay(&mut self, at: u64) -> u64 {
        if self.from == u64::MAX {
            return at;
        }
        while self.to <= at {
            self.from = self.to + (self.rng.exponential(self.every_us) * 1e3) as u64;
            self.to = self.from + (self.rng.unit() * self.up_to_us * 1e3) as u64 + 1;
        }
        if at >= self.from { self.to } else { at }
    }
}

/// Properties of a link; steps are (from when, value).
#[derive(Clone, Debug)]
pub(crate) struct Spec {
    pub(crate) rate: Vec<(u64, f64)>,
    pub(crate) owd_us: Vec<(u64, u64)>,
    pub(crate) back_us: u64,
    pub(crate) noise: Noise,
    pub(crate) loss: f64,
    pub(crate) queue_us: u64,
    pub(crate) receiver: Stalls,
    pub(crate) seed: u64,
}

impl Spec {
    pub(crate) fn new(rate: f64, owd_us: u64) -> Self {
        Self {
            rate: vec![(0, rate)],
            owd_us: vec![(0, owd_us)],
            back_us: owd_us,
            noise: Noise::None,
            loss: 0.0,
            queue_us: 120_000,
            receiver: Stalls::never(),
            seed: 1,
        }
    }
}

fn step<V: Copy>(steps: &[(u64, V)], at: u64) -> V {
    steps.iter().rev().find(|step| step.0 <= at).unwrap_or(&steps[0]).1
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Packet {
    pub(crate) counter: u64,
    pub(crate) tag: u64,
    pub(crate) bytes: u32,
    pub(crate) sent: u64,
    pub(crate) arrival: u64,
}

/// The receiver's report, as of one moment.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Report {
    bytes: u64,
    packets: u64,
    highest: u64,
    sent: u64,
    arrival: u64,
    hold: u64,
    lane: usize,
}

/// Measured over a period.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Stats {
    pub(crate) since: u64,
    pub(crate) bytes: u64,
    pub(crate) packets: u64,
    pub(crate) lost: u64,
    pub(crate) overflow: u64,
    /// True standing queue, microseconds: sum and maximum.
    pub(crate) queue_us: f64,
    pub(crate) queue_us_max: f64,
}

impl Stats {
    pub(crate) fn queue_ms(&self) -> f64 {
        self.queue_us / 1e3 / (self.packets.max(1) as f64)
    }

    pub(crate) fn rate(&self, now: u64) -> f64 {
        self.bytes as f64 / ((now - self.since) as f64 / 1e9)
    }
}

/// Bottleneck, delay, receiver.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) spec: Spec,
    free: u64,
    last_arrival: u64,
    rng: Rng,
    pub(crate) flight: VecDeque<Packet>,
    counter: u64,
    /// Cores on the other side, each with its own reports; the second gets every tenth packet.
    pub(crate) lanes: usize,
    report: [Report; 2],
    pub(crate) stats: Stats,
}

impl Link {
    pub(crate) fn new(spec: Spec) -> Self {
        let rng = Rng(spec.seed);
        Self {
            spec,
            free: 0,
            last_arrival: 0,
            rng,
            flight: VecDeque::new(),
            counter: 0,
            lanes: 1,
            report: [Report::default(); 2],
            stats: Stats::default(),
        }
    }

    /// A packet leaves the sender at `now` (never earlier than the one before).
    pub(crate) fn send(&mut self, now: u64, bytes: u32, tag: u64) {
        let counter = self.counter;
        self.counter += 1;
        let start = self.free.max(now);
        let wait_us = (start - now) as f64 / 1e3;
        if start - now > self.spec.queue_us * 1_000 {
            self.stats.overflow += 1;
            self.stats.lost += 1;
            return;
        }
        self.free = start + serialise_ns(u64::from(bytes), step(&self.spec.rate, start) as u64);
        self.stats.queue_us += wait_us;
        self.stats.queue_us_max = self.stats.queue_us_max.max(wait_us);
        if self.rng.unit() < self.spec.loss {
            self.stats.lost += 1;
            self.stats.packets += 1;
            return;
        }
        let noise_us = match self.spec.noise {
            Noise::None => 0.0,
            Noise::Uniform(most) => self.rng.unit() * most,
            Noise::Exponential(mean) => self.rng.exponential(mean),
            Noise::Radio(mean) => {
                let mut slot = Rng((self.free / (10 * MS)) ^ (self.spec.seed << 40));
                slot.exponential(mean)
            }
            Noise::Gauss(sd) => {
                let sum: f64 = (0..12).map(|_| self.rng.unit()).sum();
                ((sum - 6.0) * sd).max(-4.0 * sd) + 4.0 * sd
            }
        };
        let due = self.free + step(&self.spec.owd_us, self.free) * 1_000 + (noise_us * 1e3) as u64;
        let arrival = self.spec.receiver.delay(due.max(self.last_arrival));
        self.last_arrival = arrival;
        self.stats.packets += 1;
        self.flight.push_back(Packet { counter, tag, bytes, sent: now, arrival });
    }

    /// The receiver reads what has arrived.
    pub(crate) fn receive(&mut self, now: u64, mut seen: impl FnMut(&Packet)) {
        while let Some(packet) = self.flight.front().copied()
            && packet.arrival <= now
        {
            self.flight.pop_front();
            let second = self.lanes == 2 && packet.counter % 10 == 0;
            let report = &mut self.report[usize::from(second)];
            report.bytes += u64::from(packet.bytes);
            report.packets += 1;
            report.highest = packet.counter;
            report.sent = packet.sent;
            report.arrival = packet.arrival;
            self.stats.bytes += u64::from(packet.bytes);
            seen(&packet);
        }
    }

    pub(crate) fn report(&self, now: u64, lane: usize) -> Report {
        let report = self.report[lane];
        Report { hold: now - report.arrival, lane, ..report }
    }

    pub(crate) fn restart_stats(&mut self, now: u64) {
        self.stats = Stats { since: now, ..Stats::default() };
    }
}

/// Turns reports into samples as a session would.
#[derive(Debug, Default)]
pub(crate) struct Reader {
    last: [Report; 2],
    arrival: u64,
    gaps: bool,
}

impl Reader {
    /// The receiver's clock is off by this much.
    const OFFSET_US: i64 = -77_000_000;

    pub(crate) fn read(&mut self, now: u64, report: Report, limited: bool) -> Option<Sample> {
        let last = self.last[report.lane];
        if report.packets == last.packets {
            return None;
        }
        self.last[report.lane] = report;
        let before = self.arrival;
        self.arrival = self.arrival.max(report.arrival);
        let received = report.packets - last.packets;
        // With two lanes the common counter has gaps that are no losses.
        self.gaps |= report.lane == 1;
        let lost = report.highest - last.highest;
        Some(Sample {
            now: Time::from_ns(now),
            delivered_bytes: report.bytes - last.bytes,
            interval_us: (self.arrival / 1_000) - (before / 1_000),
            owd_us: (report.arrival / 1_000) as i64 - (report.sent / 1_000) as i64 + Self::OFFSET_US,
            rtt_us: ((now - report.sent - report.hold) / 1_000) as u32,
            lost: if self.gaps { 0 } else { lost.saturating_sub(received) as u32 },
            received: received as u32,
            limited,
        })
    }
}

/// A source's traffic.
pub(crate) enum Offer {
    /// At least this many full packets, now.
    Packets(u32),
    /// Nothing before.
    At(u64),
}

pub(crate) trait Source {
    fn offer(&mut self, now: u64) -> Offer;
    /// The pacer takes a packet; returns its tag, or `None` when the queue dropped it instead.
    fn take(&mut self, now: u64) -> Option<u64>;
    /// The acknowledgement of a packet has come back.
    fn acked(&mut self, _now: u64, _tag: u64) {}
    fn wants_acks(&self) -> bool {
        false
    }
}

/// Always has more.
pub(crate) struct Greedy;

impl Source for Greedy {
    fn offer(&mut self, _now: u64) -> Offer {
        Offer::Packets(u32::MAX)
    }
    fn take(&mut self, _now: u64) -> Option<u64> {
        Some(0)
    }
}

/// Bursts of `burst` packets at `rate` on average, while `on(t)`.
pub(crate) struct Bursts {
    pub(crate) rate: f64,
    pub(crate) burst: u32,
    /// On for so long, off for so long (0 = always on), nanoseconds.
    pub(crate) on_off: (u64, u64),
    pub(crate) due: u64,
    pub(crate) backlog: u32,
}

impl Bursts {
    pub(crate) fn new(rate: f64, burst: u32) -> Self {
        Self { rate, burst, on_off: (0, 0), due: 0, backlog: 0 }
    }
}

impl Source for Bursts {
    fn offer(&mut self, now: u64) -> Offer {
        let (on, off) = self.on_off;
        while self.due <= now {
            if off == 0 || self.due % (on + off) < on {
                self.backlog = (self.backlog + self.burst).min(10_000);
            }
            self.due += serialise_ns(u64::from(self.burst * MTU), self.rate as u64);
        }
        if self.backlog > 0 { Offer::Packets(self.backlog) } else { Offer::At(self.due) }
    }
    fn take(&mut self, _now: u64) -> Option<u64> {
        self.backlog -= 1;
        Some(0)
    }
}

/// One path with its controller, pacer and reports.
pub(crate) struct Sim {
    pub(crate) now: u64,
    pub(crate) link: Link,
    pub(crate) control: RateController,
    pub(crate) sender: Stalls,
    /// Reports are lost with this probability …
    pub(crate) report_loss: f64,
    /// … and late by up to this much.
    pub(crate) report_late_us: f64,
    /// Largest burst that leaves at once, packets.
    pub(crate) burst: u32,
    tx_free: u64,
    limited: bool,
    next_report: u64,
    reports: VecDeque<(u64, Report)>,
    acks: VecDeque<(u64, u64)>,
    reader: Reader,
    rng: Rng,
    /// Called at each sample: prints when the environment asks for it.
    trace: bool,
}

impl Sim {
    pub(crate) fn new(spec: Spec, start: f64) -> Self {
        let rng = Rng(spec.seed ^ 0x5eed);
        Self {
            now: 0,
            link: Link::new(spec),
            control: RateController::new(start as u64, 8_000, None),
            sender: Stalls::never(),
            report_loss: 0.0,
            report_late_us: 0.0,
            burst: 43,
            tx_free: 0,
            limited: false,
            next_report: 20 * MS,
            reports: VecDeque::new(),
            acks: VecDeque::new(),
            reader: Reader::default(),
            rng,
            trace: std::env::var_os("RATE_TRACE").is_some(),
        }
    }

    /// Runs the loop until `end` (ns).
    pub(crate) fn run(&mut self, end: u64, source: &mut impl Source) {
        loop {
            let offer = source.offer(self.now);
            let send_at = match offer {
                Offer::Packets(_) if self.tx_free > self.now => {
                    self.limited = true;
                    self.sender.delay(self.tx_free)
                }
                Offer::Packets(_) => self.sender.delay(self.now),
                Offer::At(at) => at,
            };
            let report_at = self.reports.front().map_or(u64::MAX, |report| report.0);
            let ack_at = self.acks.front().map_or(u64::MAX, |ack| ack.0);
            let next = send_at.min(report_at).min(ack_at).min(self.next_report);
            if next > end {
                self.now = end;
                self.receive(source.wants_acks());
                return;
            }
            self.now = next.max(self.now);
            if next == self.next_report {
                self.receiver_tick(source.wants_acks());
            } else if next == report_at {
                self.sender_tick();
            } else if next == ack_at {
                let (_, tag) = self.acks.pop_front().unwrap();
                source.acked(self.now, tag);
            } else if let Offer::Packets(packets) = offer {
                self.send(packets, source);
            }
        }
    }

    fn send(&mut self, packets: u32, source: &mut impl Source) {
        let rate = self.control.rate();
        // Half a millisecond at once, as an engine that saves system calls would.
        let run = ((rate / 2_000) as u32 / MTU).clamp(1, self.burst).min(packets);
        let mut bytes = 0;
        for _ in 0..run {
            if let Some(tag) = source.take(self.now) {
                self.link.send(self.now, MTU, tag);
                bytes += u64::from(MTU);
            }
        }
        let floor = self.now.saturating_sub(MS);
        self.tx_free = self.tx_free.max(floor) + serialise_ns(bytes, rate);
        if source.wants_acks() {
            self.receive(true);
        }
    }

    fn receive(&mut self, acks: bool) {
        let back = self.link.spec.back_us * 1_000;
        let queue = &mut self.acks;
        if acks {
            // An acknowledgement is on its way before the receiver's tick.
            let horizon = self.now;
            self.link.receive(horizon, |packet| queue.push_back((packet.arrival + back, packet.tag)));
        } else {
            self.link.receive(self.now, |_| {});
        }
    }

    fn receiver_tick(&mut self, acks: bool) {
        self.receive(acks);
        let lanes = self.link.lanes;
        let lane = (self.next_report / (20 * MS / lanes as u64)) as usize % lanes;
        self.next_report += 20 * MS / lanes as u64;
        if self.rng.unit() >= self.report_loss {
            let late = (self.rng.unit() * self.report_late_us * 1e3) as u64;
            let last = self.reports.back().map_or(0, |report| report.0);
            let at = (self.now + self.link.spec.back_us * 1_000 + late).max(last);
            self.reports.push_back((at, self.link.report(self.now, lane)));
        }
    }

    fn sender_tick(&mut self) {
        let (_, report) = self.reports.pop_front().unwrap();
        let Some(sample) = self.reader.read(self.now, report, self.limited) else { return };
        self.limited = false;
        self.control.on_sample(&sample);
        if self.trace {
            self.print(&sample);
        }
    }

    #[allow(clippy::print_stdout, reason = "asked for with RATE_TRACE")]
    fn print(&self, sample: &Sample) {
        println!(
            "{:7.1} ms rate {:9.3} cap {:9.3} D {:9.3} q {:6.2} raw {:6.2} jit {:5.2} base {:7.2} rtt {:6.1} loss {:4.1}% {:?} {} true q {:6.2}",
            self.now as f64 / 1e6,
            self.control.rate() as f64 / 125e3,
            self.control.capacity() as f64 / 125e3,
            sample.delivered_bytes as f64 / sample.interval_us as f64 * 8.0,
            f64::from(self.control.queue_delay_us()) / 1e3,
            (sample.owd_us - self.control.base_owd_us()) as f64 / 1e3,
            f64::from(self.control.jitter_us()) / 1e3,
            self.control.base_owd_us() as f64 / 1e3 - Reader::OFFSET_US as f64 / 1e3,
            f64::from(self.control.rtt_us()) / 1e3,
            100.0 * f64::from(sample.lost) / f64::from(sample.received + sample.lost),
            self.control.phase(),
            if sample.limited { "L" } else { "-" },
            self.link.free.saturating_sub(self.now) as f64 / 1e6,
        );
    }

    /// Runs for `ms` more and returns what happened meanwhile.
    pub(crate) fn measure(&mut self, ms: u64, source: &mut impl Source) -> Stats {
        self.receive(source.wants_acks());
        self.link.restart_stats(self.now);
        self.run(self.now + ms * MS, source);
        self.link.stats
    }
}
