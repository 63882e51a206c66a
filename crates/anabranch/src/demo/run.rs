//! The traffic of the demo, phase by phase. It knows nothing of gateways: it sends from one node to an address of
//! another, so that it can be tried over plain links too.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::bail;
use linux::clock::monotonic_ns;
use testbed::stop::Stop;
use testbed::topology::Node;
use testbed::traffic::probe::{self, Percentiles};
use testbed::traffic::{Span, Tick, tcp, udp};

use super::progress::Progress;
use super::sites::{LinkFacts, TCP_SHARE, UDP_SHARE, sum_mbps};

const TCP_PORT: u16 = 5001;
const UDP_PORT: u16 = 5002;
const PROBE_PORT: u16 = 5003;

/// Shares of the whole time.
const ONE_STREAM: f64 = 0.27;
const SIXTEEN_STREAMS: f64 = 0.27;
const DATAGRAMS: f64 = 0.2;
const SILENCE: f64 = 0.26;
/// UDP is sent at this share of what the links can carry.
const UDP_LOAD: f64 = 0.9;
/// The best link is silent between these shares of the last phase.
const SILENT_FROM: f64 = 0.35;
const SILENT_TO: f64 = 0.7;
/// Between phases, so that queues are empty.
const PAUSE: Duration = Duration::from_millis(300);

/// Where the traffic goes.
pub(super) struct DemoRun<'a> {
    pub(super) client: &'a Node,
    pub(super) server: &'a Node,
    pub(super) server_ip: IpAddr,
    pub(super) links: &'a [LinkFacts],
    /// Silences the best link (true) or brings it back.
    pub(super) silence: &'a dyn Fn(bool) -> anyhow::Result<()>,
    pub(super) stop: &'a Stop,
}

/// Measurements.
#[derive(Debug)]
pub(super) struct Results {
    pub(super) one: tcp::Report,
    pub(super) sixteen: tcp::Report,
    /// Round-trip times while sixteen streams fill the links.
    pub(super) ping: probe::Report,
    pub(super) udp: udp::Report,
    pub(super) silence: Silence,
}

/// The phase in which the best link falls silent.
#[derive(Debug)]
pub(super) struct Silence {
    pub(super) tcp: tcp::Report,
    /// Longest pause at the receiver from the cut on, ms.
    pub(super) longest_gap_ms: f64,
    /// Goodput while the link was silent, without its first half second, Mbit/s.
    pub(super) silent_mbps: f64,
    /// Goodput in the last part, when the link was back, Mbit/s.
    pub(super) back_mbps: f64,
}

impl DemoRun<'_> {
    /// Runs all phases in `seconds`. `loaded` is called when the steady phases are over and nothing has been cut yet.
    pub(super) fn run(
        &self,
        seconds: f64,
        progress: &mut Progress,
        loaded: &mut dyn FnMut() -> anyhow::Result<()>,
    ) -> anyhow::Result<Results> {
        let one = self.streams("One TCP stream", 1, seconds * ONE_STREAM, progress)?;
        let prober = probe::start(
            self.client,
            self.server,
            SocketAddr::new(self.server_ip, PROBE_PORT),
            Duration::from_millis(20),
        )?;
        let sixteen = self.streams("Sixteen TCP streams", 16, seconds * SIXTEEN_STREAMS, progress);
        let ping = prober.finish()?;
        let sixteen = sixteen?;
        let udp = self.datagrams(seconds * DATAGRAMS, progress)?;
        loaded()?;
        let silence = self.silence(seconds * SILENCE, progress)?;
        Ok(Results { one, sixteen, ping, udp, silence })
    }

    fn start_tcp(&self, streams: usize, span: Span) -> anyhow::Result<tcp::Transfer> {
        if self.stop.sleep(PAUSE) {
            bail!("stopped");
        }
        let to = SocketAddr::new(self.server_ip, TCP_PORT);
        tcp::start(self.client, self.server, to, tcp::Options::new(streams, span), self.stop)
    }

    fn streams(
        &self,
        name: &str,
        streams: usize,
        seconds: f64,
        progress: &mut Progress,
    ) -> anyhow::Result<tcp::Report> {
        progress.phase(name, seconds);
        let transfer = self.start_tcp(streams, Span::seconds(seconds))?;
        let report =
            transfer.finish(|tick| progress.tick(tick.elapsed, format_args!("{:6.1} Mbit/s", tick.mbps)))?;
        self.go_on()?;
        progress.done(format_args!("{:.1} Mbit/s{}", report.goodput_mbps, faults(&report)));
        Ok(report)
    }

    fn datagrams(&self, seconds: f64, progress: &mut Progress) -> anyhow::Result<udp::Report> {
        progress.phase("UDP", seconds);
        if self.stop.sleep(PAUSE) {
            bail!("stopped");
        }
        let mbps = sum_mbps(self.links) * UDP_SHARE * UDP_LOAD;
        let to = SocketAddr::new(self.server_ip, UDP_PORT);
        let options = udp::Options::new(mbps, Span::seconds(seconds));
        let report = udp::start(self.client, self.server, to, options, self.stop)?
            .finish(|tick| progress.tick(tick.elapsed, format_args!("{:6.1} Mbit/s", tick.mbps)))?;
        self.go_on()?;
        progress.done(format_args!("{:.1} Mbit/s, {:.2} % lost", report.goodput_mbps, report.loss_percent));
        Ok(report)
    }

    fn silence(&self, seconds: f64, progress: &mut Progress) -> anyhow::Result<Silence> {
        progress.phase("The best link falls silent", seconds);
        let transfer = self.start_tcp(1, Span::seconds(seconds))?;
        let (from, to) =
            (Duration::from_secs_f64(seconds * SILENT_FROM), Duration::from_secs_f64(seconds * SILENT_TO));
        let mut cut = Cut::new(to - from);
        let outcome = transfer.finish(|tick| {
            let text = if cut.at_ns.is_some() && cut.back_ns.is_none() { "best link silent" } else { "" };
            progress.tick(tick.elapsed, format_args!("{:6.1} Mbit/s  {text}", tick.mbps));
            cut.follow(tick, from, to, self.silence);
        });
        // However it ended, the link works again afterwards.
        (self.silence)(false)?;
        let tcp = outcome?;
        self.go_on()?;
        if let Some(error) = cut.error {
            return Err(error);
        }
        let Some(cut_ns) = cut.at_ns else { bail!("the phase was too short to cut a link in it") };
        let longest_gap_ms = tcp.gaps.longest_between(cut_ns, u64::MAX).map_or(1.0, |gap| gap.ms());
        let text = faults(&tcp);
        progress.done(format_args!("longest gap {longest_gap_ms:.0} ms{text}"));
        Ok(Silence { tcp, longest_gap_ms, silent_mbps: cut.silent.mbps(), back_mbps: cut.back.mbps() })
    }

    fn go_on(&self) -> anyhow::Result<()> {
        if self.stop.is_raised() {
            bail!("stopped");
        }
        Ok(())
    }
}

fn faults(report: &tcp::Report) -> String {
    if report.intact { String::new() } else { format!(" — NOT INTACT: {}", report.faults.join("; ")) }
}

/// Bytes between two moments.
#[derive(Debug, Default)]
struct Part {
    first: Option<(Duration, u64)>,
    last: (Duration, u64),
}

impl Part {
    fn add(&mut self, tick: Tick) {
        self.first.get_or_insert((tick.elapsed, tick.bytes));
        self.last = (tick.elapsed, tick.bytes);
    }

    fn mbps(&self) -> f64 {
        let Some(first) = self.first else { return 0.0 };
        let seconds = (self.last.0.saturating_sub(first.0)).as_secs_f64();
        if seconds > 0.0 { self.last.1.saturating_sub(first.1) as f64 * 8e-6 / seconds } else { 0.0 }
    }
}

/// Cuts the link and brings it back at its time, and keeps apart what arrived when.
#[derive(Debug, Default)]
struct Cut {
    at_ns: Option<u64>,
    back_ns: Option<u64>,
    silent: Part,
    back: Part,
    /// Time after a change during which arrivals do not belong to the new state yet.
    settle_ns: u64,
    error: Option<anyhow::Error>,
}

impl Cut {
    /// A silence of this length.
    fn new(length: Duration) -> Self {
        let settle = (length / 3).min(Duration::from_millis(500));
        Self { settle_ns: settle.as_nanos() as u64, ..Self::default() }
    }

    fn follow(
        &mut self,
        tick: Tick,
        from: Duration,
        to: Duration,
        silence: &dyn Fn(bool) -> anyhow::Result<()>,
    ) {
        let now = monotonic_ns();
        match (self.at_ns, self.back_ns) {
            (None, _) if tick.elapsed >= from => {
                self.at_ns = Some(now);
                self.error = silence(true).err();
            }
            (Some(at), None) => {
                if now >= at + self.settle_ns {
                    self.silent.add(tick);
                }
                if tick.elapsed >= to {
                    self.back_ns = Some(now);
                    self.error = self.error.take().or(silence(false).err());
                }
            }
            (Some(_), Some(back)) if now >= back + self.settle_ns => self.back.add(tick),
            _ => {}
        }
    }
}

/// Everything that makes the demo's exit code.
pub(super) fn all_intact(results: &Results) -> Vec<String> {
    let mut faults: Vec<String> = [&results.one, &results.sixteen, &results.silence.tcp]
        .iter()
        .flat_map(|report| report.faults.iter().cloned())
        .collect();
    if results.udp.corrupt > 0 {
        faults.push(format!("UDP: {} datagrams arrived damaged", results.udp.corrupt));
    }
    if results.udp.received == 0 {
        faults.push("UDP: nothing arrived".to_owned());
    }
    faults
}

/// For the report.
pub(super) fn ping(results: &Results) -> Percentiles {
    results.ping.rtt
}

/// Payload the links can carry together, Mbit/s.
pub(super) fn ideal_mbps(links: &[LinkFacts]) -> f64 {
    sum_mbps(links) * TCP_SHARE
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use linux::testing::isolated;
    use testbed::topology::{LinkSpec, Site, Testbed};

    use super::*;

    /// The phases over one plain link: what they measure there is known.
    #[test]
    fn the_course_over_a_plain_link() {
        isolated(|| {
            let links = [LinkFacts { mbps: 40.0, delay_ms: 5.0, loss_percent: 0.0 }];
            let bed = Testbed::new(&[LinkSpec::new(links[0].shape())], 1).unwrap();
            let silence = |on| bed.black_hole(0, on);
            let run = DemoRun {
                client: bed.site(Site::A),
                server: bed.site(Site::B),
                server_ip: bed.addresses(Site::B, 0).any().unwrap(),
                links: &links,
                silence: &silence,
                stop: &Stop::new(),
            };
            let mut called = 0;
            let results = run
                .run(8.0, &mut Progress::new(), &mut || {
                    called += 1;
                    Ok(())
                })
                .unwrap();
            assert_eq!(called, 1);
            assert_eq!(all_intact(&results), Vec::<String>::new());
            for tcp in [&results.one, &results.sixteen] {
                assert!((30.0..40.0).contains(&tcp.goodput_mbps), "{}", tcp.goodput_mbps);
            }
            assert!((30.0..36.0).contains(&results.udp.goodput_mbps), "{}", results.udp.goodput_mbps);
            // There is no other link: silence lasts as long as it lasts.
            let silent_ms = 8_000.0 * SILENCE * (SILENT_TO - SILENT_FROM);
            assert!(results.silence.longest_gap_ms > silent_ms - 250.0, "{:?}", results.silence);
            assert!(results.silence.silent_mbps < 1.0);
            assert!(ping(&results).p50_ms >= 10.0);
        });
    }

    #[test]
    fn a_raised_flag_ends_the_course_at_once() {
        isolated(|| {
            let links = [LinkFacts { mbps: 40.0, delay_ms: 5.0, loss_percent: 0.0 }];
            let bed = Testbed::new(&[LinkSpec::new(links[0].shape())], 1).unwrap();
            let stop = Stop::new();
            let run = DemoRun {
                client: bed.site(Site::A),
                server: bed.site(Site::B),
                server_ip: bed.addresses(Site::B, 0).any().unwrap(),
                links: &links,
                silence: &|_| Ok(()),
                stop: &stop,
            };
            let start = std::time::Instant::now();
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    std::thread::sleep(Duration::from_millis(700));
                    stop.raise();
                });
                assert!(run.run(60.0, &mut Progress::new(), &mut || Ok(())).is_err());
            });
            assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
        });
    }
}
