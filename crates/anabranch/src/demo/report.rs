//! Report of the demo: one JSON object, or a page for people.

use std::collections::BTreeMap;
use std::fmt::Write;

use control::status::{CoreStatus, TunnelStatus};
use serde::Serialize;

use super::run::{Results, all_intact, ideal_mbps, ping};
use super::sites::{LINKS, sum_mbps};

/// The figures. Field names are the JSON keys, and are kept.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    version: &'static str,
    seconds: u64,
    /// All data arrived, unchanged.
    pub(super) intact: bool,
    faults: Vec<String>,
    /// Workers of one gateway.
    cores: usize,
    /// How packets find their core: "bpf" or "ring".
    steering: String,
    tcp1_mbps: f64,
    tcp16_mbps: f64,
    udp_mbps: f64,
    udp_offered_mbps: f64,
    udp_loss_percent: f64,
    udp_loss_percent_from_start: f64,
    udp_delay_p50_ms: f64,
    udp_delay_p99_ms: f64,
    udp_reordered: u64,
    udp_duplicates: u64,
    udp_corrupt: u64,
    /// Round-trip times while sixteen TCP streams fill the links.
    ping_p50_ms: f64,
    ping_p99_ms: f64,
    ping_loss_percent: f64,
    best_link_mbps: f64,
    links_sum_mbps: f64,
    ideal_mbps: f64,
    longest_gap_ms: f64,
    silenced_mbps: f64,
    back_mbps: f64,
    bytes_verified: u64,
    /// Of both gateways while traffic ran.
    cross_core_packets: u64,
    packets_read: u64,
    cross_core_percent: f64,
    flows_split_over_cores: u64,
    paths: Vec<PathReport>,
    gateways: Vec<GatewayReport>,
}

/// One link, and what the sending gateway found out about it.
#[derive(Debug, Serialize)]
struct PathReport {
    wan: String,
    rate_mbps: f64,
    delay_ms: f64,
    loss_percent: f64,
    /// Share of the bytes the sending gateway put on it in the steady phases.
    share_percent: f64,
    tx_bytes: u64,
    state: String,
    measured_rate_mbps: f64,
    measured_rtt_ms: f64,
    measured_loss_percent: f64,
    queue_delay_ms: f64,
    mtu: u16,
}

#[derive(Debug, Serialize)]
struct GatewayReport {
    name: String,
    role: String,
    cores: Vec<CoreReport>,
    drops: BTreeMap<String, u64>,
}

#[derive(Debug, Serialize)]
struct CoreReport {
    core: usize,
    cpu: usize,
    /// Inner packets from and to the TUN interface.
    tun_packets: u64,
    /// Datagrams received and sent.
    udp_datagrams: u64,
    ring_packets: u64,
    flows: u64,
}

impl Report {
    /// From the measurements and both gateways' state before the traffic, after the steady phases, and at the end.
    pub(super) fn new(seconds: u64, results: &Results, statuses: [&[TunnelStatus; 2]; 3]) -> Self {
        let [before, loaded, after] = statuses;
        let delta = |get: fn(&TunnelStatus) -> u64| -> u64 {
            after.iter().zip(before).map(|(a, b)| get(a).saturating_sub(get(b))).sum()
        };
        let cross_core_packets = delta(|s| s.cross_core_packets);
        let packets_read = delta(|s| s.packets_read);
        let (udp, ping) = (&results.udp, ping(results));
        let tcp = [&results.one, &results.sixteen, &results.silence.tcp];
        let faults = all_intact(results);
        Self {
            version: env!("CARGO_PKG_VERSION"),
            seconds,
            intact: faults.is_empty(),
            faults,
            cores: after[0].cores.len(),
            steering: after[0].steering.clone(),
            tcp1_mbps: round(results.one.goodput_mbps),
            tcp16_mbps: round(results.sixteen.goodput_mbps),
            udp_mbps: round(udp.goodput_mbps),
            udp_offered_mbps: round(udp.offered_mbps),
            udp_loss_percent: round(udp.loss_percent),
            udp_loss_percent_from_start: round(udp.loss_percent_from_start),
            udp_delay_p50_ms: round(udp.delay.p50_ms),
            udp_delay_p99_ms: round(udp.delay.p99_ms),
            udp_reordered: udp.reordered,
            udp_duplicates: udp.duplicates,
            udp_corrupt: udp.corrupt,
            ping_p50_ms: round(ping.p50_ms),
            ping_p99_ms: round(ping.p99_ms),
            ping_loss_percent: round(results.ping.loss_percent),
            best_link_mbps: LINKS.iter().map(|l| l.mbps).fold(0.0, f64::max),
            links_sum_mbps: sum_mbps(&LINKS),
            ideal_mbps: round(ideal_mbps(&LINKS)),
            longest_gap_ms: round(results.silence.longest_gap_ms),
            silenced_mbps: round(results.silence.silent_mbps),
            back_mbps: round(results.silence.back_mbps),
            bytes_verified: tcp.iter().map(|t| t.bytes_verified).sum::<u64>() + udp.bytes_verified,
            cross_core_packets,
            packets_read,
            cross_core_percent: round(cross_core_packets as f64 * 100.0 / packets_read.max(1) as f64),
            flows_split_over_cores: after.iter().map(|s| s.flows_split_over_cores).sum(),
            paths: paths(&before[0], &loaded[0]),
            gateways: after.iter().zip(before).map(|(a, b)| gateway(b, a)).collect(),
        }
    }

    /// One JSON object.
    pub(super) fn json(&self) -> anyhow::Result<String> {
        Ok(serde_json::to_string_pretty(self)?)
    }

    /// A page for people.
    pub(super) fn text(&self) -> String {
        let mut out = String::new();
        // Writing to a String cannot fail.
        let _ = self.write(&mut out);
        out
    }

    fn write(&self, out: &mut String) -> std::fmt::Result {
        writeln!(out, "\nLinks (each way)")?;
        writeln!(
            out,
            "  {:<6} {:>11} {:>7} {:>7}    {:>6}  {:>13}  {:>9}  {:>7}",
            "", "rate", "delay", "loss", "share", "rate found", "RTT", "loss"
        )?;
        for p in &self.paths {
            writeln!(
                out,
                "  {:<6} {:>4} Mbit/s {:>4} ms {:>5} %    {:>4.0} %  {:>6.1} Mbit/s  {:>6.1} ms  {:>5.2} %",
                p.wan,
                p.rate_mbps,
                p.delay_ms,
                p.loss_percent,
                p.share_percent,
                p.measured_rate_mbps,
                p.measured_rtt_ms,
                p.measured_loss_percent
            )?;
        }
        self.write_goodput(out)?;
        writeln!(out, "\nThe best link falls silent")?;
        writeln!(out, "  longest gap   {:>7.0} ms", self.longest_gap_ms)?;
        writeln!(out, "  meanwhile     {:>7.1} Mbit/s over the others", self.silenced_mbps)?;
        writeln!(out, "  after return  {:>7.1} Mbit/s", self.back_mbps)?;
        self.write_cores(out)?;
        let volume = volume(self.bytes_verified);
        if self.intact {
            write!(out, "\nAll data arrived intact: {volume} checked at both ends.")?;
        } else {
            write!(out, "\nDATA WAS LOST OR DAMAGED ({volume} were right):")?;
            for fault in &self.faults {
                write!(out, "\n  {fault}")?;
            }
        }
        Ok(())
    }

    fn write_goodput(&self, out: &mut String) -> std::fmt::Result {
        writeln!(
            out,
            "\nGoodput through the tunnel (best link {} Mbit/s, sum {}, ideal payload {:.1})",
            self.best_link_mbps, self.links_sum_mbps, self.ideal_mbps
        )?;
        for (name, mbps) in [("one TCP stream", self.tcp1_mbps), ("16 TCP streams", self.tcp16_mbps)] {
            writeln!(
                out,
                "  {name:<15} {mbps:>6.1} Mbit/s   {:.2} × best link, {:.0} % of the sum, {:.1} % of the ideal",
                mbps / self.best_link_mbps,
                mbps * 100.0 / self.links_sum_mbps,
                mbps * 100.0 / self.ideal_mbps
            )?;
        }
        writeln!(
            out,
            "  {:<15} {:>6.1} Mbit/s   {:.2} % lost of {:.1} sent, delay {:.0} ms, 99 % below {:.0} ms",
            "UDP",
            self.udp_mbps,
            self.udp_loss_percent,
            self.udp_offered_mbps,
            self.udp_delay_p50_ms,
            self.udp_delay_p99_ms
        )?;
        writeln!(
            out,
            "  {:<15} {:>6.1} ms       99 % below {:.1} ms, while 16 streams fill the links",
            "ping", self.ping_p50_ms, self.ping_p99_ms
        )
    }

    fn write_cores(&self, out: &mut String) -> std::fmt::Result {
        writeln!(out, "\nCores (steering by {})", self.steering)?;
        for gateway in &self.gateways {
            for core in &gateway.cores {
                writeln!(
                    out,
                    "  {:<7} core {:<3} {:>9} packets {:>9} datagrams {:>7} over rings {:>4} flows",
                    gateway.name,
                    core.core,
                    core.tun_packets,
                    core.udp_datagrams,
                    core.ring_packets,
                    core.flows
                )?;
            }
        }
        writeln!(
            out,
            "  {} of {} packets crossed cores ({:.2} %), {} flows were split over cores",
            self.cross_core_packets, self.packets_read, self.cross_core_percent, self.flows_split_over_cores
        )
    }
}

/// Two decimals are more than any of this is exact to.
fn round(value: f64) -> f64 {
    if value.is_finite() { (value * 100.0).round() / 100.0 } else { 0.0 }
}

fn volume(bytes: u64) -> String {
    let mb = bytes as f64 / 1e6;
    if mb >= 1_000.0 { format!("{:.2} GB", mb / 1e3) } else { format!("{mb:.0} MB") }
}

/// Sender's figures of each link. Several paths may run over one.
fn paths(before: &TunnelStatus, loaded: &TunnelStatus) -> Vec<PathReport> {
    let sent = |status: &TunnelStatus, wan: &str| -> u64 {
        let paths = status.peers.iter().flat_map(|peer| &peer.paths);
        paths.filter(|path| path.wan == wan).map(|path| path.tx_bytes).sum()
    };
    let mut list: Vec<PathReport> = LINKS
        .iter()
        .enumerate()
        .map(|(number, link)| {
            let wan = format!("wan{number}");
            let mut report = PathReport {
                tx_bytes: sent(loaded, &wan).saturating_sub(sent(before, &wan)),
                wan,
                rate_mbps: link.mbps,
                delay_ms: link.delay_ms,
                loss_percent: link.loss_percent,
                share_percent: 0.0,
                state: "missing".to_owned(),
                measured_rate_mbps: 0.0,
                measured_rtt_ms: 0.0,
                measured_loss_percent: 0.0,
                queue_delay_ms: 0.0,
                mtu: 0,
            };
            let all = loaded.peers.iter().flat_map(|peer| &peer.paths);
            let on_it = all.filter(|path| path.wan == report.wan);
            if let Some(path) = on_it.max_by_key(|path| path.tx_bytes) {
                report.state.clone_from(&path.state);
                report.measured_rate_mbps = round(path.rate_mbps);
                report.measured_rtt_ms = round(path.rtt_ms);
                report.measured_loss_percent = round(path.loss_percent);
                report.queue_delay_ms = round(path.queue_delay_ms);
                report.mtu = path.mtu;
            }
            report
        })
        .collect();
    let total = list.iter().map(|path| path.tx_bytes).sum::<u64>().max(1);
    for path in &mut list {
        path.share_percent = round(path.tx_bytes as f64 * 100.0 / total as f64);
    }
    list
}

fn gateway(before: &TunnelStatus, after: &TunnelStatus) -> GatewayReport {
    let mut drops = BTreeMap::new();
    for core in &after.cores {
        for (reason, count) in &core.drops {
            *drops.entry(reason.clone()).or_default() += count;
        }
    }
    let none = CoreStatus::default();
    let cores = after.cores.iter().map(|core| {
        let old = before.cores.iter().find(|old| old.core == core.core).unwrap_or(&none);
        let delta = |get: fn(&CoreStatus) -> u64| get(core).saturating_sub(get(old));
        CoreReport {
            core: core.core,
            cpu: core.cpu,
            tun_packets: delta(|c| c.tun_rx_packets + c.tun_tx_packets),
            udp_datagrams: delta(|c| c.udp_rx_datagrams + c.udp_tx_datagrams),
            ring_packets: delta(|c| c.ring_in_packets),
            flows: core.flows,
        }
    });
    GatewayReport {
        name: after.node.clone(),
        role: after.peers.first().map(|peer| peer.role.clone()).unwrap_or_default(),
        cores: cores.collect(),
        drops,
    }
}
