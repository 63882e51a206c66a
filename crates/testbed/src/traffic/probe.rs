//! Round-trip times, measured with small UDP datagrams that the other node sends back.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, bail};
use linux::clock::monotonic_ns;

use crate::topology::Node;

/// Order statistics of a set of times.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Percentiles {
    /// How many.
    pub count: usize,
    /// The shortest, ms.
    pub min_ms: f64,
    /// Half are below this, ms.
    pub p50_ms: f64,
    /// 99 of 100 are below this, ms.
    pub p99_ms: f64,
    /// The longest, ms.
    pub max_ms: f64,
}

impl Percentiles {
    /// Of times in microseconds; sorts them. All zero for an empty set.
    #[must_use]
    pub fn of(us: &mut [u32]) -> Self {
        us.sort_unstable();
        let at = |share: f64| {
            let index = (us.len() as f64 * share).ceil() as usize;
            us.get(index.saturating_sub(1)).map_or(0.0, |&us| f64::from(us) / 1e3)
        };
        Self { count: us.len(), min_ms: at(0.0), p50_ms: at(0.5), p99_ms: at(0.99), max_ms: at(1.0) }
    }
}

/// Result of a probe.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Round-trip times.
    pub rtt: Percentiles,
    /// Probes sent.
    pub sent: u64,
    /// Share without an answer within a second, percent.
    pub loss_percent: f64,
}

/// A probe that runs until [`finish`](Self::finish).
#[derive(Debug)]
pub struct Probe {
    end: Arc<AtomicBool>,
    end_echo: Arc<AtomicBool>,
    prober: JoinHandle<(u64, Vec<u32>)>,
    echo: JoinHandle<()>,
}

/// Sends one probe per `interval` from `client` to `to`, an address of `server`.
pub fn start(client: &Node, server: &Node, to: SocketAddr, interval: Duration) -> anyhow::Result<Probe> {
    let far = server.run(|| UdpSocket::bind(to))?.with_context(|| format!("cannot bind UDP {to}"))?;
    far.set_read_timeout(Some(Duration::from_millis(50)))?;
    let any: SocketAddr = if to.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0u16; 8], 0).into() };
    let near = client.run(|| UdpSocket::bind(any).and_then(|s| s.connect(to).map(|()| s)))??;
    let end = Arc::new(AtomicBool::new(false));
    let end_echo = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&end_echo);
    let echo = std::thread::Builder::new().name("probe-echo".into()).spawn(move || {
        let mut buffer = [0; 2048];
        while !flag.load(Ordering::Relaxed) {
            if let Ok((read, from)) = far.recv_from(&mut buffer) {
                let _ = far.send_to(&buffer[..read], from);
            }
        }
    })?;
    let flag = Arc::clone(&end);
    let prober = std::thread::Builder::new()
        .name("probe".into())
        .spawn(move || probe(&near, interval.max(Duration::from_millis(1)), &flag))?;
    Ok(Probe { end, end_echo, prober, echo })
}

fn probe(socket: &UdpSocket, interval: Duration, end: &AtomicBool) -> (u64, Vec<u32>) {
    let interval_ns = u64::try_from(interval.as_nanos()).unwrap_or(u64::MAX);
    let mut next_ns = monotonic_ns();
    let (mut sent, mut us) = (0, Vec::new());
    let mut ended_ns = None;
    let mut buffer = [0; 64];
    loop {
        let now = monotonic_ns();
        if ended_ns.is_none() && end.load(Ordering::Relaxed) {
            ended_ns = Some(now);
        }
        if ended_ns.is_some_and(|at| now > at + 1_000_000_000 || us.len() as u64 >= sent) {
            return (sent, us);
        }
        if ended_ns.is_none() && now >= next_ns {
            if socket.send(&now.to_be_bytes()).is_ok() {
                sent += 1;
            }
            next_ns += interval_ns;
            // After a pause the schedule starts afresh instead of catching up.
            if next_ns < now {
                next_ns = now + interval_ns;
            }
        }
        let wait = Duration::from_nanos(next_ns.saturating_sub(monotonic_ns()).clamp(100_000, 50_000_000));
        if socket.set_read_timeout(Some(wait)).is_err() {
            return (sent, us);
        }
        if let Ok(read) = socket.recv(&mut buffer)
            && let Some(at) = buffer[..read].first_chunk::<8>().map(|b| u64::from_be_bytes(*b))
        {
            let rtt = monotonic_ns().saturating_sub(at) / 1_000;
            us.push(u32::try_from(rtt).unwrap_or(u32::MAX));
        }
    }
}

impl Probe {
    /// Ends it; waits up to a second for answers that are under way.
    pub fn finish(self) -> anyhow::Result<Report> {
        self.end.store(true, Ordering::Relaxed);
        let probed = self.prober.join();
        // The echo answers until the prober has stopped waiting.
        self.end_echo.store(true, Ordering::Relaxed);
        let echoed = self.echo.join();
        let (Ok((sent, mut us)), Ok(())) = (probed, echoed) else { bail!("the probe failed") };
        let answered = us.len() as u64;
        Ok(Report {
            rtt: Percentiles::of(&mut us),
            sent,
            loss_percent: sent.saturating_sub(answered) as f64 * 100.0 / sent.max(1) as f64,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles() {
        let mut us: Vec<u32> = (1..=1000).rev().map(|ms| ms * 1000).collect();
        let p = Percentiles::of(&mut us);
        assert_eq!((p.count, p.min_ms, p.p50_ms, p.p99_ms, p.max_ms), (1000, 1.0, 500.0, 990.0, 1000.0));
        assert_eq!(Percentiles::of(&mut []), Percentiles::default());
        assert_eq!(Percentiles::of(&mut [7_000]).p99_ms, 7.0);
    }
}
