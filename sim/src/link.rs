//! One direction of a link: a chain of plain nodes, each over bytes and virtual time.
//!
//! A node takes a datagram at a moment and says when which datagrams come out, so nodes compose in any order. The
//! [`crate::world::World`] carries a datagram from node to node with one event for each, so that a queue
//! behind a jitter sees datagrams in the order in which they arrive there.

use std::net::SocketAddr;

use tunnel::time::Time;

use crate::random::Random;

/// Bytes that IPv4, UDP and an Ethernet frame add to a UDP payload on the wire (20 + 8 + 38).
pub const WIRE_OVERHEAD_BYTES: u64 = 66;
/// Bytes that IPv4 and UDP add: what counts against an MTU.
pub const IP_OVERHEAD_BYTES: usize = 28;

/// A UDP datagram under way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Datagram {
    /// Source, as the next hop sees it.
    pub from: SocketAddr,
    /// Destination, as the next hop sees it.
    pub to: SocketAddr,
    /// UDP payload.
    pub bytes: Vec<u8>,
}

/// A node of a link. All times are virtual; probabilities are 0.0..=1.0.
#[derive(Clone, Debug)]
pub enum Stage {
    /// A line of fixed rate with a tail-drop queue in front.
    Rate(Rate),
    /// A fixed delay.
    Delay(Delay),
    /// A random addition to the delay.
    Jitter(Jitter),
    /// Independent random loss.
    Loss(Loss),
    /// Loss in bursts.
    Gilbert(Gilbert),
    /// Some datagrams are held back so that others overtake.
    Reorder(Reorder),
    /// Flips bits.
    Corrupt(Corrupt),
    /// Sends some datagrams twice.
    Duplicate(Duplicate),
    /// Drops what is too big, silently.
    Mtu(Mtu),
    /// Drops everything while on, silently.
    BlackHole(BlackHole),
}

/// See [`Stage::Rate`].
#[derive(Clone, Debug)]
pub struct Rate {
    /// Bits per second, counted with [`WIRE_OVERHEAD_BYTES`].
    pub bps: u64,
    /// The queue holds what the line sends in this time, milliseconds (at least two full datagrams).
    pub queue_ms: u64,
    /// When the line has sent everything that waits, ns, with a fraction of 1/2^16 ns.
    free_at: u128,
}

impl Rate {
    fn pass(&mut self, now: Time, bytes: usize) -> Option<Time> {
        let wire = bytes as u64 + WIRE_OVERHEAD_BYTES;
        let start = self.free_at.max(u128::from(now.ns()) << 16);
        let waiting_ns =
            u64::try_from((start >> 16).saturating_sub(u128::from(now.ns()))).unwrap_or(u64::MAX);
        let queue_ns =
            (self.queue_ms * 1_000_000).max(3_200 * 8_000_000_000 / self.bps.max(1) / 1_000 * 1_000);
        if waiting_ns > queue_ns {
            return None;
        }
        self.free_at = start + ((u128::from(wire) * 8_000_000_000) << 16) / u128::from(self.bps.max(1));
        Some(Time::from_ns(u64::try_from(self.free_at >> 16).unwrap_or(u64::MAX)))
    }
}

/// See [`Stage::Delay`].
#[derive(Clone, Debug)]
pub struct Delay {
    /// One way, microseconds.
    pub us: u64,
}

/// See [`Stage::Jitter`].
#[derive(Clone, Debug)]
pub struct Jitter {
    /// Up to this much, microseconds, evenly spread.
    pub us: u64,
    /// Whether datagrams may overtake each other.
    pub reorder: bool,
    last: Time,
}

/// See [`Stage::Loss`].
#[derive(Clone, Debug)]
pub struct Loss {
    /// Share lost.
    pub share: f64,
}

/// Gilbert's model: in the bad state everything is lost, in the good one nothing.
#[derive(Clone, Debug)]
pub struct Gilbert {
    /// Probability to turn bad, per datagram.
    pub to_bad: f64,
    /// Probability to turn good again: 1 / mean burst length.
    pub to_good: f64,
    bad: bool,
}

/// See [`Stage::Reorder`].
#[derive(Clone, Debug)]
pub struct Reorder {
    /// Share held back.
    pub share: f64,
    /// For how long, microseconds.
    pub us: u64,
}

/// See [`Stage::Corrupt`].
#[derive(Clone, Debug)]
pub struct Corrupt {
    /// Share in which one to three bits are flipped.
    pub share: f64,
}

/// See [`Stage::Duplicate`].
#[derive(Clone, Debug)]
pub struct Duplicate {
    /// Share sent twice.
    pub share: f64,
}

/// See [`Stage::Mtu`].
#[derive(Clone, Debug)]
pub struct Mtu {
    /// Largest IP packet that passes, bytes.
    pub bytes: usize,
}

/// See [`Stage::BlackHole`].
#[derive(Clone, Debug)]
pub struct BlackHole {
    /// Nothing passes.
    pub on: bool,
}

impl Stage {
    /// Takes one datagram; what comes out, and when, goes to `out` (nothing: it was dropped).
    pub fn pass(
        &mut self,
        now: Time,
        random: &mut Random,
        mut datagram: Datagram,
        out: &mut Vec<(Time, Datagram)>,
    ) {
        match self {
            Self::Rate(rate) => {
                if let Some(at) = rate.pass(now, datagram.bytes.len()) {
                    out.push((at, datagram));
                }
            }
            Self::Delay(delay) => out.push((now.plus_us(delay.us), datagram)),
            Self::Jitter(jitter) => {
                let mut at = now.plus_ns(random.below(jitter.us * 1_000 + 1));
                if !jitter.reorder {
                    at = at.max(jitter.last);
                    jitter.last = at;
                }
                out.push((at, datagram));
            }
            Self::Loss(loss) => {
                if !random.chance(loss.share) {
                    out.push((now, datagram));
                }
            }
            Self::Gilbert(state) => {
                state.bad =
                    if state.bad { !random.chance(state.to_good) } else { random.chance(state.to_bad) };
                if !state.bad {
                    out.push((now, datagram));
                }
            }
            Self::Reorder(reorder) => {
                let held = random.chance(reorder.share);
                out.push((if held { now.plus_us(reorder.us) } else { now }, datagram));
            }
            Self::Corrupt(corrupt) => {
                if random.chance(corrupt.share) {
                    flip_bits(random, &mut datagram.bytes);
                }
                out.push((now, datagram));
            }
            Self::Duplicate(duplicate) => {
                if random.chance(duplicate.share) {
                    out.push((now, datagram.clone()));
                }
                out.push((now, datagram));
            }
            Self::Mtu(mtu) => {
                if datagram.bytes.len() + IP_OVERHEAD_BYTES <= mtu.bytes {
                    out.push((now, datagram));
                }
            }
            Self::BlackHole(hole) => {
                if !hole.on {
                    out.push((now, datagram));
                }
            }
        }
    }
}

/// Flips one to three bits.
pub fn flip_bits(random: &mut Random, bytes: &mut [u8]) {
    for _ in 0..=random.below(3) {
        let at = random.below(bytes.len() as u64) as usize;
        if let Some(byte) = bytes.get_mut(at) {
            *byte ^= 1 << random.below(8);
        }
    }
}

/// One direction of a link. Build it with the methods below, in the order in which datagrams pass the nodes.
#[derive(Clone, Debug)]
pub struct Link {
    /// The nodes. The first is always the black hole that [`Link::cut`] turns on.
    pub stages: Vec<Stage>,
    /// Datagrams that entered.
    pub entered: u64,
    /// Datagrams that came out at the end.
    pub left: u64,
    /// UDP payload bytes that came out at the end.
    pub left_bytes: u64,
}

impl Default for Link {
    fn default() -> Self {
        Self { stages: vec![Stage::BlackHole(BlackHole { on: false })], entered: 0, left: 0, left_bytes: 0 }
    }
}

impl Link {
    /// A line of `mbps` Mbit/s with a queue of 120 ms, then `delay_ms` milliseconds.
    pub fn new(mbps: f64, delay_ms: f64) -> Self {
        Self::default().rate(mbps, 120).delay((delay_ms * 1e3) as u64)
    }

    fn with(mut self, stage: Stage) -> Self {
        self.stages.push(stage);
        self
    }

    /// Adds a line of `mbps` Mbit/s with a queue of `queue_ms`.
    #[must_use]
    pub fn rate(self, mbps: f64, queue_ms: u64) -> Self {
        self.with(Stage::Rate(Rate { bps: (mbps * 1e6) as u64, queue_ms, free_at: 0 }))
    }

    /// Adds a delay in microseconds.
    #[must_use]
    pub fn delay(self, us: u64) -> Self {
        self.with(Stage::Delay(Delay { us }))
    }

    /// Adds jitter of up to `us` microseconds, with or without reordering.
    #[must_use]
    pub fn jitter(self, us: u64, reorder: bool) -> Self {
        self.with(Stage::Jitter(Jitter { us, reorder, last: Time::ZERO }))
    }

    /// Adds independent loss.
    #[must_use]
    pub fn loss(self, share: f64) -> Self {
        self.with(Stage::Loss(Loss { share }))
    }

    /// Adds loss of `share` in bursts of `burst` datagrams on average.
    #[must_use]
    pub fn burst_loss(self, share: f64, burst: f64) -> Self {
        let to_good = 1.0 / burst.max(1.0);
        let to_bad = (share * to_good / (1.0 - share).max(0.01)).min(1.0);
        self.with(Stage::Gilbert(Gilbert { to_bad, to_good, bad: false }))
    }

    /// Adds reordering: `share` of the datagrams come `us` microseconds later.
    #[must_use]
    pub fn reorder(self, share: f64, us: u64) -> Self {
        self.with(Stage::Reorder(Reorder { share, us }))
    }

    /// Adds flipped bits.
    #[must_use]
    pub fn corrupt(self, share: f64) -> Self {
        self.with(Stage::Corrupt(Corrupt { share }))
    }

    /// Adds duplicates.
    #[must_use]
    pub fn duplicate(self, share: f64) -> Self {
        self.with(Stage::Duplicate(Duplicate { share }))
    }

    /// Adds a silent MTU limit in bytes of IP packet.
    #[must_use]
    pub fn mtu(self, bytes: usize) -> Self {
        self.with(Stage::Mtu(Mtu { bytes }))
    }

    /// Cuts the link silently (true) or heals it (false). What is under way still arrives.
    pub fn cut(&mut self, on: bool) {
        if let Some(Stage::BlackHole(hole)) = self.stages.first_mut() {
            hole.on = on;
        }
    }

    /// Changes the rate of every line in this link, Mbit/s.
    pub fn set_rate(&mut self, mbps: f64) {
        for stage in &mut self.stages {
            if let Stage::Rate(rate) = stage {
                rate.bps = (mbps * 1e6) as u64;
            }
        }
    }

    /// Changes every MTU limit in this link.
    pub fn set_mtu(&mut self, bytes: usize) {
        for stage in &mut self.stages {
            if let Stage::Mtu(mtu) = stage {
                mtu.bytes = bytes;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn datagram(bytes: usize) -> Datagram {
        let any = SocketAddr::from(([10, 0, 0, 1], 1));
        Datagram { from: any, to: any, bytes: vec![0; bytes] }
    }

    /// Sends `count` datagrams of `bytes` bytes `every_us` apart through the chain; returns arrivals.
    fn run(link: Link, count: u64, bytes: usize, every_us: u64) -> Vec<(u64, Time, Datagram)> {
        let mut random = Random::new(1);
        let mut waiting: Vec<(Time, usize, u64, Datagram)> =
            (0..count).map(|n| (Time::from_us(n * every_us), 0, n, datagram(bytes))).collect();
        let mut stages = link.stages;
        let (mut arrived, mut out) = (Vec::new(), Vec::new());
        while let Some(next) =
            waiting.iter().enumerate().min_by_key(|(at, w)| (w.0, w.2, *at)).map(|(at, _)| at)
        {
            let (now, stage, number, datagram) = waiting.remove(next);
            match stages.get_mut(stage) {
                Some(node) => {
                    node.pass(now, &mut random, datagram, &mut out);
                    waiting.extend(out.drain(..).map(|(at, datagram)| (at, stage + 1, number, datagram)));
                }
                None => arrived.push((number, now, datagram)),
            }
        }
        arrived
    }

    #[test]
    fn a_line_keeps_its_rate_and_its_queue_limit() {
        // 934 + 66 = 1,000 wire bytes at 8 Mbit/s: one a millisecond. Ten times that much is offered.
        let arrived = run(Link::default().rate(8.0, 50), 2_000, 934, 100);
        let last = arrived.last().map(|(_, at, _)| at.ms());
        assert_eq!(arrived[0].1, Time::from_ms(1));
        assert!((248..=252).contains(&arrived.len()), "200 ms and a queue of 50 ms: {}", arrived.len());
        assert_eq!(last, Some(arrived.len() as u64));
    }

    #[test]
    fn delay_jitter_and_reordering() {
        let arrived = run(Link::default().delay(5_000).jitter(3_000, false), 500, 100, 200);
        assert!(arrived.windows(2).all(|pair| pair[0].0 < pair[1].0), "in order");
        let waits: Vec<u64> = arrived.iter().map(|(n, at, _)| at.us() - n * 200).collect();
        assert!(waits.iter().all(|wait| (5_000..=8_000).contains(wait)));
        let arrived = run(Link::default().jitter(3_000, true), 500, 100, 200);
        assert!(arrived.windows(2).any(|pair| pair[0].0 > pair[1].0), "out of order");
        let arrived = run(Link::default().reorder(0.1, 1_000), 500, 100, 200);
        let overtaken = arrived.iter().filter(|(n, at, _)| at.us() > n * 200).count();
        assert!((30..80).contains(&overtaken), "{overtaken}");
    }

    #[test]
    fn losses_duplicates_flips_and_limits() {
        let share = |link: Link| run(link, 4_000, 100, 10).len();
        assert!((3_540..3_660).contains(&share(Link::default().loss(0.1))));
        assert!((3_450..3_750).contains(&share(Link::default().burst_loss(0.1, 5.0))));
        assert!((4_340..4_460).contains(&share(Link::default().duplicate(0.1))));
        assert_eq!(share(Link::default().mtu(127)), 0);
        assert_eq!(share(Link::default().mtu(128)), 4_000);
        let mut cut = Link::default();
        cut.cut(true);
        assert_eq!(share(cut), 0);
        let flipped = run(Link::default().corrupt(0.5), 400, 100, 10);
        let bad = flipped.iter().filter(|(_, _, d)| d.bytes.iter().any(|b| *b != 0)).count();
        assert!((150..250).contains(&bad), "{bad}");
    }

    #[test]
    fn bursts_are_bursts() {
        let arrived = run(Link::default().burst_loss(0.05, 8.0), 20_000, 100, 10);
        let numbers: Vec<u64> = arrived.iter().map(|(n, _, _)| *n).collect();
        let gaps: Vec<u64> = numbers.windows(2).map(|p| p[1] - p[0] - 1).filter(|gap| *gap > 0).collect();
        let mean = gaps.iter().sum::<u64>() as f64 / gaps.len() as f64;
        assert!((6.0..10.0).contains(&mean), "{mean}");
    }
}
