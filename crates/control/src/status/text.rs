//! Text of `anabranch status` for people.

use std::fmt::Write as _;

use super::table::{Table, bytes, count, duration};
use super::{
    ClassTrafficStatus, ClusterStatus, CoreStatus, PathStatus, PeerStatus, PeerSteering, Report,
    TunnelStatus, gateway_text,
};

/// The report as text for people.
#[must_use]
pub fn text(report: &Report) -> String {
    let status = &report.status;
    let mut out = String::new();
    let listen = report.listen.map_or_else(String::new, |port| format!(", listening on UDP {port}"));
    let _ = writeln!(
        out,
        "{}: anabranch {} on {}, up {}{listen}",
        status.node,
        status.version,
        report.tun,
        duration(status.uptime_seconds)
    );
    for warning in &report.warnings {
        let _ = writeln!(out, "warning: {warning}");
    }
    if let Some(table) = &report.forward_guard {
        let _ =
            writeln!(out, "if it dies the kernel forwards nothing between the interfaces: nft table {table}");
    }
    wans(report, &mut out);
    for peer in &status.peers {
        peer_text(peer, &mut out);
    }
    cores(status, &mut out);
    if let Some(cluster) = &report.cluster {
        cluster_text(cluster, &mut out);
    }
    if let Some(lan) = &report.lan {
        lan.write(&mut out);
    }
    if let Some(gateway) = &report.gateway {
        out.push_str(&gateway_text::services(gateway));
    }
    out
}

fn cluster_text(cluster: &ClusterStatus, out: &mut String) {
    let manager = if cluster.connected { "answers" } else { "is away; everything goes on as it is" };
    let _ =
        writeln!(out, "\ncluster: {} {}, manager {} {manager}", cluster.role, cluster.node, cluster.manager);
    if !cluster.member {
        let _ = writeln!(out, "  not a member yet: no packet comes here");
        return;
    }
    let members: Vec<String> = cluster.members.iter().map(ToString::to_string).collect();
    let change = if cluster.newest_era == cluster.era_in_force {
        String::new()
    } else {
        format!(", era {} prepared", cluster.newest_era)
    };
    let _ = writeln!(out, "  era {}{change}, members {}", cluster.era_in_force, members.join(" "));
    if let Err(why) = cluster.health() {
        let _ = writeln!(out, "  not fit: {why}");
    }
    for interface in cluster.interfaces.iter().filter(|interface| !interface.active) {
        let _ = writeln!(out, "  {}: another dispatcher has it, this one stands by", interface.name);
    }
    let _ = writeln!(
        out,
        "  {}, {}, {}, {}, {} sent on to another data plane",
        count(cluster.share.buckets as u64, "bucket"),
        count(cluster.share.port_blocks as u64, "port block"),
        count(cluster.flows, "flow"),
        count(cluster.packets.packets, "packet"),
        cluster.packets.second_hops
    );
    if cluster.packets.waited_for_era > 0 {
        let _ =
            writeln!(out, "  {} waited for the next table", count(cluster.packets.waited_for_era, "packet"));
    }
    if let Some(backup) = cluster.copies.at {
        let _ = writeln!(out, "  unit {backup} has copies of its flows");
    }
    if cluster.copies.kept > 0 || cluster.copies.inherited > 0 {
        let _ = writeln!(
            out,
            "  keeps copies of {}; {} were another's",
            count(cluster.copies.kept as u64, "flow"),
            cluster.copies.inherited
        );
    }
}

fn wans(report: &Report, out: &mut String) {
    let mut table = Table::new(&["WAN", "state", "tier", "MTU", "addresses"]);
    for wan in &report.wans {
        let name = if wan.interface.is_empty() { "(host routes)" } else { &wan.interface };
        let addresses = if wan.addresses.is_empty() { "-".to_owned() } else { wan.addresses.join(", ") };
        let mut state = wan.state.clone();
        if wan.quota_used > 0 {
            state.push_str(&format!(", {} of its quota", bytes(wan.quota_used)));
        }
        table.row([name.to_owned(), state, wan.tier.to_string(), wan.mtu.to_string(), addresses]);
    }
    table.write("\n", out);
    for name in &report.names {
        let addresses =
            if name.addresses.is_empty() { "no address yet".to_owned() } else { name.addresses.join(", ") };
        let error =
            name.error.as_ref().map_or_else(String::new, |error| format!(" (last try failed: {error})"));
        let _ = writeln!(out, "name {} = {addresses}{error}", name.host);
    }
}

fn peer_text(peer: &PeerStatus, out: &mut String) {
    let state = match (peer.state.as_str(), peer.reason.is_empty()) {
        ("up", _) => format!("up for {}", duration(peer.session_age_seconds)),
        (state, true) => state.to_owned(),
        (state, false) => format!("{state}: {}", peer.reason),
    };
    let mut facts = vec![peer.role.clone()];
    if !peer.encryption.is_empty() {
        facts.push(peer.encryption.clone());
    }
    let PeerSteering { received, sent, processor_info, remote_core } = &peer.steering;
    if !sent.is_empty() && (sent != "core-id" || received != "core-id") {
        let core = remote_core.map_or_else(String::new, |core| format!(" {core}"));
        facts.push(format!("sends {sent}{core}, receives {received}"));
    }
    if !matches!(processor_info.as_str(), "" | "peer") {
        facts.push(format!("cores by {processor_info}"));
    }
    if peer.remote_cores > 0 {
        facts.push(count(u64::from(peer.remote_cores), "remote core"));
        facts.push(count(peer.handshakes, "handshake"));
    }
    for (number, what) in [
        (peer.recovered, "recovered"),
        (peer.declared_lost, "lost"),
        (peer.traffic.copies_used, "by a copy"),
        (peer.traffic.restored, "restored"),
        (peer.held_packets, "held for order"),
    ] {
        if number > 0 {
            facts.push(format!("{number} {what}"));
        }
    }
    if peer.traffic.queue_bytes > 0 {
        facts.push(format!("{} queued", bytes(peer.traffic.queue_bytes)));
    }
    let _ = writeln!(out, "\npeer {}: {state} ({})", peer.name, facts.join(", "));
    let mut table = Table::new(&[
        "  path",
        "WAN",
        "remote",
        "state",
        "<rate",
        "<delivered",
        "<RTT",
        "<queue",
        "<jitter",
        "<loss",
        "<share",
        "<sent",
        "<received",
        "<MTU",
        "since",
    ]);
    for path in &peer.paths {
        table.row(path_row(path));
    }
    table.write("", out);
    for path in &peer.paths {
        class_text(path, out);
    }
}

/// Traffic of each class on a path, where it was not all bulk.
fn class_text(path: &PathStatus, out: &mut String) {
    if path.tx_copies == 0 && path.classes.keys().all(|class| class == "bulk") {
        return;
    }
    let of_class = |(class, traffic): (&String, &ClassTrafficStatus)| {
        format!("{class} {} ({})", count(traffic.tx_packets, "packet"), bytes(traffic.tx_bytes))
    };
    let mut list: Vec<String> = path.classes.iter().map(of_class).collect();
    if path.tx_copies > 0 {
        list.push(if path.tx_copies == 1 {
            "1 copy".to_owned()
        } else {
            format!("{} copies", path.tx_copies)
        });
    }
    let _ = writeln!(out, "  path {}: {}", path.id, list.join(", "));
}

fn path_row(path: &PathStatus) -> [String; 15] {
    let ms = |value: f64| format!("{value:.1} ms");
    [
        format!("  {}", path.id),
        if path.wan.is_empty() { "-".to_owned() } else { path.wan.clone() },
        path.remote.clone(),
        path.state.clone(),
        rate(path.rate_mbps),
        rate(path.delivered_mbps),
        ms(path.rtt_ms),
        ms(path.queue_delay_ms),
        ms(path.jitter_ms),
        format!("{:.2} %", path.loss_percent),
        format!("{:.1} %", path.tx_share_percent),
        bytes(path.tx_bytes),
        bytes(path.rx_bytes),
        path.mtu.to_string(),
        path.reason.clone(),
    ]
}

fn cores(status: &TunnelStatus, out: &mut String) {
    let mut table = Table::new(&[
        "core",
        "<CPU",
        "<busy",
        "<flows",
        "<from TUN",
        "<to TUN",
        "<UDP in",
        "<UDP out",
        "<ring in",
        "<ring out",
    ]);
    for core in &status.cores {
        table.row(core_row(core));
    }
    // Without a tunnel nothing comes by it: the gateway's own table says what the cores do.
    if status.peers.is_empty() {
        tunnel_drops(status, out);
        return;
    }
    table.write("\n", out);
    let ratio = if status.packets_read == 0 {
        0.0
    } else {
        status.cross_core_packets as f64 * 100.0 / status.packets_read as f64
    };
    let _ = writeln!(
        out,
        "steering {}: {ratio:.2} % of packets changed core, {} split over cores",
        status.steering,
        count(status.flows_split_over_cores, "flow")
    );
    for (core, state) in status.core_states.iter().enumerate().filter(|(_, state)| *state != "active") {
        let _ = writeln!(out, "core {core} is {state}");
    }
    tunnel_drops(status, out);
}

fn tunnel_drops(status: &TunnelStatus, out: &mut String) {
    let mut drops: Vec<(String, u64)> = Vec::new();
    for (reason, number) in status.cores.iter().flat_map(|core| &core.drops) {
        match drops.iter_mut().find(|(known, _)| known == reason) {
            Some((_, sum)) => *sum += number,
            None => drops.push((reason.clone(), *number)),
        }
    }
    if !drops.is_empty() {
        drops.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
        let list: Vec<String> = drops.iter().map(|(reason, number)| format!("{reason} {number}")).collect();
        let _ = writeln!(out, "dropped: {}", list.join(", "));
    }
}

fn core_row(core: &CoreStatus) -> [String; 10] {
    [
        core.core.to_string(),
        core.cpu.to_string(),
        format!("{:.0} %", core.busy_percent),
        core.flows.to_string(),
        core.tun_rx_packets.to_string(),
        core.tun_tx_packets.to_string(),
        core.udp_rx_datagrams.to_string(),
        core.udp_tx_datagrams.to_string(),
        core.ring_in_packets.to_string(),
        core.ring_out_packets.to_string(),
    ]
}

fn rate(mbps: f64) -> String {
    if mbps >= 1000.0 { format!("{:.2} Gbit/s", mbps / 1000.0) } else { format!("{mbps:.1} Mbit/s") }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::super::{NameReport, WanReport};
    use super::*;

    fn wan(id: u16, interface: &str, state: &str, addresses: &[&str]) -> WanReport {
        WanReport {
            id,
            interface: interface.to_owned(),
            state: state.to_owned(),
            addresses: addresses.iter().map(|text| (*text).to_owned()).collect(),
            tier: 0,
            mtu: 1500,
            quota_used: 0,
        }
    }

    fn report() -> Report {
        let path = |id, wan: &str, state: &str, share| PathStatus {
            id,
            wan: wan.to_owned(),
            remote: "198.18.0.2:4600".to_owned(),
            state: state.to_owned(),
            rate_mbps: 98.2,
            delivered_mbps: 1234.5,
            rtt_ms: 20.4,
            loss_percent: 0.1,
            tx_bytes: 5 << 20,
            tx_share_percent: share,
            mtu: 1472,
            reason: "answers again".to_owned(),
            ..PathStatus::default()
        };
        let peer = PeerStatus {
            name: "hub".to_owned(),
            state: "up".to_owned(),
            role: "dialer".to_owned(),
            session_age_seconds: 192.0,
            handshakes: 2,
            remote_cores: 1,
            encryption: "aes-256-gcm".to_owned(),
            recovered: 7,
            paths: vec![path(0, "wan0", "up", 60.0), path(10, "wwan0", "suspect", 40.0)],
            ..PeerStatus::default()
        };
        let waiting = PeerStatus {
            name: "branch".to_owned(),
            state: "connecting".to_owned(),
            reason: "waiting for the peer to dial".to_owned(),
            role: "listener".to_owned(),
            ..PeerStatus::default()
        };
        let core = |core, drops: &[(&str, u64)]| CoreStatus {
            core,
            cpu: core,
            busy_percent: 12.4,
            flows: 3,
            tun_rx_packets: 1000,
            drops: drops.iter().map(|(reason, number)| ((*reason).to_owned(), *number)).collect(),
            ..CoreStatus::default()
        };
        let status = TunnelStatus {
            node: "branch".to_owned(),
            version: "0.1.0".to_owned(),
            uptime_seconds: 3725.0,
            cores: vec![core(0, &[("replayed", 2), ("no-peer", 1)]), core(1, &[("replayed", 3)])],
            peers: vec![peer, waiting],
            cross_core_packets: 5,
            packets_read: 1000,
            steering: "bpf".to_owned(),
            ..TunnelStatus::default()
        };
        Report {
            warnings: vec!["the kernel does not forward; sysctl -w net.ipv4.ip_forward=1".to_owned()],
            forward_guard: Some("inet anabranch_closed-ana0".to_owned()),
            status,
            tun: "ana0".to_owned(),
            listen: Some(4600),
            wans: vec![
                wan(1, "wan0", "up", &["192.0.2.5", "2001:db8::5"]),
                wan(2, "wwan0", "no carrier", &[]),
            ],
            names: vec![NameReport { host: "hub.example.net".to_owned(), ..NameReport::default() }],
            ..Report::default()
        }
    }

    #[test]
    fn the_table_for_people() {
        let expected = "\
branch: anabranch 0.1.0 on ana0, up 1 h 2 min, listening on UDP 4600
warning: the kernel does not forward; sysctl -w net.ipv4.ip_forward=1
if it dies the kernel forwards nothing between the interfaces: nft table inet anabranch_closed-ana0

WAN    state       tier  MTU   addresses
wan0   up          0     1500  192.0.2.5, 2001:db8::5
wwan0  no carrier  0     1500  -
name hub.example.net = no address yet

peer hub: up for 3 min 12 s (dialer, aes-256-gcm, 1 remote core, 2 handshakes, 7 recovered)
  path  WAN    remote           state           rate    delivered      RTT   queue  jitter    loss   share     sent  received   MTU  since
  0     wan0   198.18.0.2:4600  up       98.2 Mbit/s  1.23 Gbit/s  20.4 ms  0.0 ms  0.0 ms  0.10 %  60.0 %  5.0 MiB       0 B  1472  answers again
  10    wwan0  198.18.0.2:4600  suspect  98.2 Mbit/s  1.23 Gbit/s  20.4 ms  0.0 ms  0.0 ms  0.10 %  40.0 %  5.0 MiB       0 B  1472  answers again

peer branch: connecting: waiting for the peer to dial (listener)

core  CPU  busy  flows  from TUN  to TUN  UDP in  UDP out  ring in  ring out
0       0  12 %      3      1000       0       0        0        0         0
1       1  12 %      3      1000       0       0        0        0         0
steering bpf: 0.50 % of packets changed core, 0 flows split over cores
dropped: replayed 5, no-peer 1
";
        let shown = text(&report());
        assert_eq!(shown, expected, "\n{shown}");
    }

    #[test]
    fn without_a_tunnel_there_is_no_table_of_it() {
        let mut report = report();
        report.status.peers.clear();
        let shown = text(&report);
        assert!(!shown.contains("from TUN") && !shown.contains("steering bpf"), "{shown}");
        assert!(shown.contains("dropped: replayed 5, no-peer 1"), "{shown}");
    }

    #[test]
    fn the_json_has_the_engines_keys_at_the_top() {
        let json = serde_json::to_value(report()).unwrap();
        for key in [
            "node",
            "version",
            "cores",
            "peers",
            "cross_core_packets",
            "flows_split_over_cores",
            "wans",
            "tun",
        ] {
            assert!(json.get(key).is_some(), "{key}");
        }
        let back: Report = serde_json::from_value(json).unwrap();
        assert_eq!(back.wans, report().wans);
        assert_eq!(back.status.peers.len(), 2);
    }

    #[test]
    fn numbers_are_readable() {
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(u64::MAX), "16777216.0 TiB");
        assert_eq!(duration(59.9), "59 s");
        assert_eq!(duration(90_000.0), "1 d 1 h");
        assert_eq!(duration(f64::NAN), "0 s");
        assert_eq!(rate(0.0), "0.0 Mbit/s");
    }
}
