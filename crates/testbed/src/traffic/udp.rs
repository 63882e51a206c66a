//! UDP at a set rate: numbered datagrams, each with a checksum over every byte of it.
//!
//! ```text
//! flow:16 | 0:16 | key:32 | number:64 | sent at (ns):64 | checksum:64 | pattern …      (big endian)
//! ```

use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, bail};
use fastrand::Rng;
use linux::clock::monotonic_ns;
use socket2::SockRef;

use super::gaps::Gaps;
use super::pattern::checksum;
use super::probe::Percentiles;
use super::{Span, Tick, watch};
use crate::stop::Stop;
use crate::topology::Node;

const HEAD_BYTES: usize = 32;
/// How long the receiver waits for what is still under way after the sender has stopped.
const DRAIN: Duration = Duration::from_millis(800);
/// The sender sleeps between turns of about this length, so that bursts stay short.
const TURN_NS: u64 = 250_000;

/// Traffic to send.
#[derive(Clone, Debug)]
pub struct Options {
    /// Payload rate of all flows together, Mbit/s.
    pub mbps: f64,
    /// Payload of one datagram, bytes, 64–65,507.
    pub payload_bytes: usize,
    /// Number of flows (source ports), 1–256.
    pub flows: usize,
    /// For how long.
    pub span: Span,
    /// Seed of the data.
    pub seed: u64,
}

impl Options {
    /// Eight flows of 1,400-byte datagrams at `mbps` Mbit/s together.
    #[must_use]
    pub fn new(mbps: f64, span: Span) -> Self {
        Self { mbps, payload_bytes: 1_400, flows: 8, span, seed: 1 }
    }
}

/// Result of a run.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Payload at the receiver after the warm-up, Mbit/s.
    pub goodput_mbps: f64,
    /// Payload sent, Mbit/s.
    pub offered_mbps: f64,
    /// Datagrams sent.
    pub sent: u64,
    /// Datagrams that arrived intact, copies not counted.
    pub received: u64,
    /// Share of the datagrams sent after the warm-up that never arrived, percent.
    pub loss_percent: f64,
    /// The same from the first datagram on, percent.
    pub loss_percent_from_start: f64,
    /// Arrived with a wrong checksum or length.
    pub corrupt: u64,
    /// Arrived a second time.
    pub duplicates: u64,
    /// Arrived after a later one of the same flow.
    pub reordered: u64,
    /// Bytes whose checksum was right.
    pub bytes_verified: u64,
    /// One-way delay after the warm-up.
    pub delay: Percentiles,
    /// Pauses at the receiver.
    pub gaps: Gaps,
}

/// Datagrams on their way.
#[derive(Debug)]
pub struct Transfer {
    options: Options,
    start_ns: u64,
    bytes: Arc<AtomicU64>,
    stop: Stop,
    sending: Arc<AtomicBool>,
    sender: JoinHandle<anyhow::Result<Sent>>,
    receiver: JoinHandle<Received>,
}

#[derive(Debug)]
struct Sent {
    /// Number of datagrams per flow, and of those sent before the warm-up was over.
    per_flow: Vec<(u64, u64)>,
    datagrams: u64,
    ns: u64,
}

/// Starts to send from `client` to `to`, an address of `server`.
pub fn start(
    client: &Node,
    server: &Node,
    to: SocketAddr,
    options: Options,
    stop: &Stop,
) -> anyhow::Result<Transfer> {
    if !(1..=256).contains(&options.flows) || !(64..=65_507).contains(&options.payload_bytes) {
        bail!("UDP needs 1 to 256 flows and 64 to 65507 bytes a datagram");
    }
    if !(options.mbps > 0.0 && options.mbps < 1e6) {
        bail!("the UDP rate must be above 0 and below 1,000,000 Mbit/s, not {}", options.mbps);
    }
    let far = server.run(|| UdpSocket::bind(to))?.with_context(|| format!("cannot bind UDP {to}"))?;
    far.set_read_timeout(Some(Duration::from_millis(50)))?;
    // As large as the machine permits: a late receiver must not look like a lossy network.
    let _ = SockRef::from(&far).set_recv_buffer_size(8 << 20);
    let any: SocketAddr = if to.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0u16; 8], 0).into() };
    let near = client.run(|| -> std::io::Result<Vec<UdpSocket>> {
        (0..options.flows)
            .map(|_| {
                let socket = UdpSocket::bind(any)?;
                socket.connect(to)?;
                socket.set_write_timeout(Some(Duration::from_millis(200)))?;
                Ok(socket)
            })
            .collect()
    })??;

    let bytes = Arc::new(AtomicU64::new(0));
    let sending = Arc::new(AtomicBool::new(true));
    let start_ns = monotonic_ns();
    let receiver = {
        let mut receiver = Receiver::new(&options, start_ns);
        let (bytes, sending) = (Arc::clone(&bytes), Arc::clone(&sending));
        std::thread::Builder::new().name("udp-receive".into()).spawn(move || {
            receiver.run(&far, &bytes, &sending);
            receiver.received
        })?
    };
    let (copy, end) = (options.clone(), stop.clone());
    let sender = std::thread::Builder::new()
        .name("udp-send".into())
        .spawn(move || send(&near, &copy, start_ns, &end))?;
    Ok(Transfer { options, start_ns, bytes, stop: stop.clone(), sending, sender, receiver })
}

fn duration_ns(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

fn send(sockets: &[UdpSocket], options: &Options, start_ns: u64, stop: &Stop) -> anyhow::Result<Sent> {
    let mut datagram = vec![0; options.payload_bytes];
    Rng::with_seed(options.seed).fill(&mut datagram);
    let key = options.seed as u32;
    datagram[4..8].copy_from_slice(&key.to_be_bytes());
    datagram[2..4].fill(0);
    let interval_ns = options.payload_bytes as f64 * 8e3 / options.mbps;
    let (warm_ns, end_ns) = (duration_ns(options.span.warm_up), duration_ns(options.span.send));
    let mut per_flow = vec![(0u64, 0u64); sockets.len()];
    let mut datagrams = 0u64;
    loop {
        let elapsed = monotonic_ns().saturating_sub(start_ns);
        if elapsed >= end_ns || stop.is_raised() {
            return Ok(Sent { per_flow, datagrams, ns: elapsed });
        }
        let due = (elapsed as f64 / interval_ns) as u64 + 1;
        // A sender that was held up does not make up for more than 10 ms in one burst.
        let turn_max = ((10e6 / interval_ns) as u64).max(1);
        for _ in 0..due.saturating_sub(datagrams).min(turn_max) {
            let flow = (datagrams % sockets.len() as u64) as usize;
            let number = per_flow[flow].0;
            datagram[0..2].copy_from_slice(&(flow as u16).to_be_bytes());
            datagram[8..16].copy_from_slice(&number.to_be_bytes());
            datagram[16..24].copy_from_slice(&monotonic_ns().to_be_bytes());
            datagram[24..32].fill(0);
            let sum = checksum(u64::from(key), &datagram);
            datagram[24..32].copy_from_slice(&sum.to_be_bytes());
            match sockets[flow].send(&datagram) {
                Ok(_) => {}
                // A full queue, a route that is just gone: the datagram is lost, which is what gets measured.
                Err(error) if error.kind() == ErrorKind::InvalidInput => return Err(error).context("send"),
                Err(_) => {}
            }
            datagrams += 1;
            per_flow[flow].0 += 1;
            if elapsed < warm_ns {
                per_flow[flow].1 = per_flow[flow].0;
            }
        }
        std::thread::sleep(Duration::from_nanos(TURN_NS));
    }
}

#[derive(Debug, Default)]
struct Received {
    corrupt: u64,
    duplicates: u64,
    reordered: u64,
    bytes: u64,
    /// One bitmap per flow: which numbers have arrived.
    seen: Vec<Vec<u64>>,
    highest: Vec<Option<u64>>,
    delay_us: Vec<u32>,
    gaps: Gaps,
}

struct Receiver {
    received: Received,
    payload_bytes: usize,
    key: u32,
    /// A number beyond this was never sent.
    numbers: u64,
    warm_ns: u64,
}

impl Receiver {
    fn new(options: &Options, start_ns: u64) -> Self {
        let datagrams = options.mbps * 1e6 / 8.0 / options.payload_bytes as f64;
        let numbers = (datagrams * options.span.send.as_secs_f64() / options.flows as f64) as u64 + 1_000;
        Self {
            received: Received {
                seen: vec![Vec::new(); options.flows],
                highest: vec![None; options.flows],
                ..Received::default()
            },
            payload_bytes: options.payload_bytes,
            key: options.seed as u32,
            numbers,
            warm_ns: start_ns + duration_ns(options.span.warm_up),
        }
    }

    fn run(&mut self, socket: &UdpSocket, bytes: &AtomicU64, sending: &AtomicBool) {
        let mut buffer = vec![0; 65_536];
        let mut last_ns = monotonic_ns();
        loop {
            match socket.recv(&mut buffer) {
                Ok(read) => {
                    last_ns = monotonic_ns();
                    if self.take(&mut buffer[..read], last_ns) {
                        bytes.fetch_add(read as u64, Ordering::Relaxed);
                    }
                }
                Err(_) => {
                    let quiet = monotonic_ns().saturating_sub(last_ns) > duration_ns(DRAIN);
                    if quiet && !sending.load(Ordering::Relaxed) {
                        return;
                    }
                }
            }
        }
    }

    /// True when the datagram is a new and intact one.
    fn take(&mut self, datagram: &mut [u8], now_ns: u64) -> bool {
        let Some((flow, number, sent_ns)) = self.parse(datagram) else {
            self.received.corrupt += 1;
            return false;
        };
        let r = &mut self.received;
        let (word, bit) = ((number / 64) as usize, number % 64);
        let seen = &mut r.seen[flow];
        if seen.len() <= word {
            seen.resize(word + 1, 0);
        }
        if seen[word] & (1 << bit) != 0 {
            r.duplicates += 1;
            return false;
        }
        seen[word] |= 1 << bit;
        if r.highest[flow].is_some_and(|h| number < h) {
            r.reordered += 1;
        } else {
            r.highest[flow] = Some(number);
        }
        r.bytes += datagram.len() as u64;
        r.gaps.arrived(now_ns);
        if sent_ns >= self.warm_ns {
            r.delay_us.push(u32::try_from(now_ns.saturating_sub(sent_ns) / 1_000).unwrap_or(u32::MAX));
        }
        true
    }

    fn parse(&self, datagram: &mut [u8]) -> Option<(usize, u64, u64)> {
        if datagram.len() != self.payload_bytes || datagram.len() < HEAD_BYTES {
            return None;
        }
        let u64_at = |d: &[u8], at: usize| {
            d.get(at..at + 8).and_then(|b| b.try_into().ok()).map(u64::from_be_bytes).unwrap_or(u64::MAX)
        };
        let sum = u64_at(datagram, 24);
        datagram[24..32].fill(0);
        if checksum(u64::from(self.key), datagram) != sum {
            return None;
        }
        let flow = usize::from(u16::from_be_bytes([datagram[0], datagram[1]]));
        let (number, sent_ns) = (u64_at(datagram, 8), u64_at(datagram, 16));
        (flow < self.received.seen.len() && number < self.numbers).then_some((flow, number, sent_ns))
    }
}

impl Transfer {
    /// When the sender began, ns of the monotonic clock.
    #[must_use]
    pub fn start_ns(&self) -> u64 {
        self.start_ns
    }

    /// Waits for the end. `observe` is called some ten times a second while data is sent.
    pub fn finish(self, mut observe: impl FnMut(Tick)) -> anyhow::Result<Report> {
        let window = watch(self.options.span, self.start_ns, &self.bytes, &self.stop, &mut observe);
        let sent = self.sender.join();
        // The receiver ends only after this, whatever became of the sender.
        self.sending.store(false, Ordering::Relaxed);
        let received = self.receiver.join();
        let Ok(sent) = sent else { bail!("the UDP sender failed") };
        let Ok(mut received) = received else { bail!("the UDP receiver failed") };
        let sent = sent?;
        let (mut arrived, mut late_sent, mut late_arrived) = (0, 0, 0);
        for ((total, early), seen) in sent.per_flow.iter().zip(&received.seen) {
            arrived += count_from(seen, 0);
            late_sent += total - early;
            late_arrived += count_from(seen, *early);
        }
        let percent =
            |sent: u64, arrived: u64| sent.saturating_sub(arrived) as f64 * 100.0 / sent.max(1) as f64;
        Ok(Report {
            goodput_mbps: window.mbps(),
            offered_mbps: (sent.datagrams * self.options.payload_bytes as u64) as f64 * 8e3
                / sent.ns.max(1) as f64,
            sent: sent.datagrams,
            received: arrived,
            loss_percent: percent(late_sent, late_arrived),
            loss_percent_from_start: percent(sent.datagrams, arrived),
            corrupt: received.corrupt,
            duplicates: received.duplicates,
            reordered: received.reordered,
            bytes_verified: received.bytes,
            delay: Percentiles::of(&mut received.delay_us),
            gaps: received.gaps,
        })
    }
}

/// Number of bits set at and above `first`.
fn count_from(bitmap: &[u64], first: u64) -> u64 {
    let (word, bit) = ((first / 64) as usize, first % 64);
    let whole: u64 = bitmap.iter().skip(word + 1).map(|w| u64::from(w.count_ones())).sum();
    whole + bitmap.get(word).map_or(0, |w| u64::from((w >> bit).count_ones()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn datagram(flow: u16, number: u64, key: u32) -> Vec<u8> {
        let mut d = vec![0xa5; 100];
        d[0..2].copy_from_slice(&flow.to_be_bytes());
        d[4..8].copy_from_slice(&key.to_be_bytes());
        d[8..16].copy_from_slice(&number.to_be_bytes());
        d[16..24].copy_from_slice(&5_000u64.to_be_bytes());
        d[24..32].fill(0);
        let sum = checksum(u64::from(key), &d);
        d[24..32].copy_from_slice(&sum.to_be_bytes());
        d
    }

    #[test]
    fn the_receiver_tells_new_old_doubled_and_broken_apart() {
        let options = Options { payload_bytes: 100, flows: 2, ..Options::new(1.0, Span::seconds(1.0)) };
        let mut r = Receiver::new(&options, 0);
        assert!(r.take(&mut datagram(0, 0, 1), 10_000));
        assert!(r.take(&mut datagram(0, 2, 1), 20_000));
        assert!(r.take(&mut datagram(1, 1, 1), 20_000));
        assert!(r.take(&mut datagram(0, 1, 1), 30_000));
        assert!(!r.take(&mut datagram(0, 1, 1), 40_000));
        let mut broken = datagram(0, 3, 1);
        broken[70] ^= 1;
        assert!(!r.take(&mut broken, 50_000));
        assert!(!r.take(&mut datagram(2, 0, 1), 50_000));
        assert!(!r.take(&mut datagram(0, u64::MAX, 1), 50_000));
        assert!(!r.take(&mut [0; 7], 50_000));
        let r = r.received;
        assert_eq!((r.reordered, r.duplicates, r.corrupt, r.bytes), (1, 1, 4, 400));
        assert_eq!(
            (count_from(&r.seen[0], 0), count_from(&r.seen[0], 1), count_from(&r.seen[1], 0)),
            (3, 2, 1)
        );
        assert_eq!(count_from(&r.seen[0], 1_000), 0);
    }
}
