//! Text for people: services, flows, explanations, leases and groups.

use std::fmt::Write as _;

use super::table::{Table, bytes, count, duration};
use super::{
    BackendStatus, Explanation, FlowList, FlowReport, GroupReport, HealthProcessStatus, InterfaceStatus,
    LeaseReport, NicHashStatus, NicPrediction, ServerStatus, ServicesStatus,
};
use crate::config::services::values::protocol_text;

/// The part of `status` that is not the tunnel.
#[must_use]
pub fn services(status: &ServicesStatus) -> String {
    let mut out = String::new();
    interfaces(&status.interfaces, &mut out);
    cores(status, &mut out);
    rules(status, &mut out);
    nats(status, &mut out);
    forwards(status, &mut out);
    for server in &status.virtual_servers {
        virtual_server(server, &mut out);
    }
    if let Some(process) = &status.health_checks {
        health_checks(process, &mut out);
    }
    if !status.groups.is_empty() {
        let _ = write!(out, "\n{}", groups(&status.groups));
    }
    if !status.leases.is_empty() {
        let _ = write!(out, "\n{}", leases(&status.leases));
    }
    let _ = writeln!(
        out,
        "\nhanded to their core by ring: {}; replies on a wrong core: {}",
        count(status.handed_off_packets, "packet"),
        count(status.replies_on_wrong_core_packets, "packet")
    );
    if status.unmet.lost_nat_events > 0 {
        let _ = writeln!(out, "lost from the NAT log: {}", count(status.unmet.lost_nat_events, "event"));
    }
    if let Some(taken) = &status.taken_over {
        let _ = writeln!(out, "{}", crate::handover::text(taken));
    }
    if !status.drops.is_empty() {
        let mut drops: Vec<(&String, &u64)> = status.drops.iter().collect();
        drops.sort_by(|a, b| b.1.cmp(a.1).then_with(|| a.0.cmp(b.0)));
        let list: Vec<String> = drops.iter().map(|(reason, number)| format!("{reason} {number}")).collect();
        let _ = writeln!(out, "gateway dropped: {}", list.join(", "));
    }
    out
}

/// Nothing while all is well.
fn health_checks(status: &HealthProcessStatus, out: &mut String) {
    let HealthProcessStatus { running, process, restarts, last_end, kept_rights } = status;
    if *restarts > 0 {
        let state = match running {
            true => format!("by process {process}"),
            false => "stopped, verdicts stay as they are".to_owned(),
        };
        let _ =
            writeln!(out, "\nhealth checks: {state}; {restarts} ends of the process, the last: {last_end}");
    }
    if !kept_rights.is_empty() {
        let _ = writeln!(out, "\nhealth checks have more rights than they should: {kept_rights}");
    }
}

fn or_dash(text: &str) -> String {
    if text.is_empty() { "-".to_owned() } else { text.to_owned() }
}

fn interfaces(list: &[InterfaceStatus], out: &mut String) {
    let mut table = Table::new(&[
        "interface",
        "device",
        "state",
        "tenant",
        "<in",
        "<bytes in",
        "<out",
        "<bytes out",
        "<lost",
        "RSS",
        "addresses",
    ]);
    for interface in list {
        table.row([
            interface.name.clone(),
            interface.device.clone(),
            interface.state.clone(),
            or_dash(&interface.tenant),
            interface.rx_packets.to_string(),
            bytes(interface.rx_bytes),
            interface.tx_packets.to_string(),
            bytes(interface.tx_bytes),
            interface.lost_packets.to_string(),
            nic_hash(&interface.nic_hash),
            or_dash(&interface.addresses.join(", ")),
        ]);
    }
    table.write("\n", out);
    for interface in list.iter().filter(|interface| !interface.reason.is_empty()) {
        let _ = writeln!(out, "interface {} does not work: {}", interface.name, interface.reason);
    }
}

/// "toeplitz, 8 queues"; a dash without a receive hash.
fn nic_hash(status: &NicHashStatus) -> String {
    match (status.function.as_str(), status.queues) {
        ("", _) => "-".to_owned(),
        (function, 0) => function.to_owned(),
        (function, queues) => format!("{function}, {}", count(queues as u64, "queue")),
    }
}

fn nic_prediction(nic: &NicPrediction) -> String {
    let device = &nic.device;
    match (nic.queue, nic.queue_with_ports) {
        (Some(queue), Some(with_ports)) => {
            format!(
                "{device} gives it to queue {with_ports} if it hashes ports, to queue {queue} by addresses alone"
            )
        }
        (Some(queue), None) => format!("{device} gives it to queue {queue}"),
        (None, _) => format!("no queue of {device} is known: {}", nic.reason),
    }
}

fn cores(status: &ServicesStatus, out: &mut String) {
    let mut table = Table::new(&[
        "gateway core",
        "state",
        "<buckets",
        "<busy",
        "<flows",
        "<new flows",
        "<in",
        "<out",
        "<handed over",
        "<taken over",
    ]);
    for core in &status.cores {
        table.row([
            core.core.to_string(),
            core.state.clone(),
            core.buckets.to_string(),
            format!("{:.0} %", core.busy_percent),
            core.live_flows.to_string(),
            core.new_flows.to_string(),
            core.rx_packets.to_string(),
            core.tx_packets.to_string(),
            core.handed_off_packets.to_string(),
            core.taken_over_packets.to_string(),
        ]);
    }
    table.write("\n", out);
}

fn rules(status: &ServicesStatus, out: &mut String) {
    let mut table = Table::new(&["rule", "action", "<flows"]);
    for rule in &status.rules {
        table.row([rule.name.clone(), rule.action.clone(), rule.matched_flows.to_string()]);
    }
    table.write("\n", out);
}

fn nats(status: &ServicesStatus, out: &mut String) {
    const ADDRESSES_SHOWN: usize = 4;
    let known = |number: Option<u64>| number.map_or_else(|| "-".to_owned(), |number| number.to_string());
    let mut table =
        Table::new(&["NAT", "mode", "<flows", "<ports", "<full", "<exhausted", "<refused", "addresses"]);
    for nat in &status.nats {
        let full = match nat.used_ports {
            Some(used) if nat.total_ports > 0 => {
                format!("{:.1} %", used as f64 * 100.0 / nat.total_ports as f64)
            }
            _ => "-".to_owned(),
        };
        let mut addresses: Vec<String> = nat.addresses.iter().take(ADDRESSES_SHOWN).cloned().collect();
        if nat.addresses.len() > ADDRESSES_SHOWN {
            addresses.push(format!("and {} more", nat.addresses.len() - ADDRESSES_SHOWN));
        }
        table.row([
            nat.out.clone(),
            nat.mode.clone(),
            nat.live_flows.to_string(),
            known(nat.used_ports),
            full,
            nat.exhausted_flows.to_string(),
            nat.refused_flows.to_string(),
            or_dash(&addresses.join(", ")),
        ]);
    }
    table.write("\n", out);
}

fn forwards(status: &ServicesStatus, out: &mut String) {
    let mut table = Table::new(&["forward", "to", "<live", "<total"]);
    for forward in &status.forwards {
        table.row([
            forward.listen.clone(),
            forward.to.clone(),
            forward.live_flows.to_string(),
            forward.total_flows.to_string(),
        ]);
    }
    table.write("\n", out);
}

fn virtual_server(server: &ServerStatus, out: &mut String) {
    let listen = if server.name == server.listen { String::new() } else { format!(" {}", server.listen) };
    let _ = writeln!(
        out,
        "\nvirtual server {}:{listen} {}, {}, {} live, {} in all, {} refused",
        server.name,
        server.method,
        server.delivery,
        server.live_connections,
        server.total_connections,
        server.refused_connections
    );
    let mut table = Table::new(&["  backend", "state", "<since", "<weight", "<live", "<total", "reason"]);
    for backend in &server.backends {
        table.row([
            format!("  {}", backend.address),
            backend.state.clone(),
            duration(backend.state_age_seconds as f64),
            backend.weight.to_string(),
            backend.live_connections.to_string(),
            backend.total_connections.to_string(),
            backend_reason(backend),
        ]);
    }
    table.write("", out);
}

/// Why it is down, or when it is drained.
fn backend_reason(backend: &BackendStatus) -> String {
    match backend.drain_seconds_left.filter(|_| backend.reason.is_empty()) {
        Some(0) => "time is over".to_owned(),
        Some(left) => format!("the rest ends in {}", duration(f64::from(left))),
        None => backend.reason.clone(),
    }
}

/// `anabranch backend drain`.
#[must_use]
pub fn draining(server: &str, backend: &BackendStatus) -> String {
    let live = count(backend.live_connections, "live connection");
    let end = match (backend.live_connections, backend.drain_seconds_left) {
        (0, _) => "nothing is left".to_owned(),
        (_, None) => "they go on until they end (drain-seconds limits that)".to_owned(),
        (_, Some(left)) => format!("what is left is reset in {}", duration(f64::from(left))),
    };
    format!("{} of {server} drains: {live}; {end}\n", backend.address)
}

/// `anabranch group list`.
#[must_use]
pub fn groups(list: &[GroupReport]) -> String {
    if list.is_empty() {
        return "no groups\n".to_owned();
    }
    let mut out = String::new();
    let mut table = Table::new(&["group", "<prefixes", "<added", "<removed"]);
    for group in list {
        table.row([
            group.name.clone(),
            group.members.to_string(),
            group.added.len().to_string(),
            group.removed.len().to_string(),
        ]);
    }
    table.write("", &mut out);
    out
}

/// `anabranch lease list`.
#[must_use]
pub fn leases(list: &[LeaseReport]) -> String {
    if list.is_empty() {
        return "no leases\n".to_owned();
    }
    let mut out = String::new();
    let mut table = Table::new(&["lease", "tenant", "from", "address", "ports", "set by"]);
    for lease in list {
        table.row([
            lease.name.clone(),
            or_dash(&lease.tenant),
            lease.from.to_string(),
            lease.address.to_string(),
            format!("{}-{}", lease.first_port, lease.last_port),
            if lease.configured { "configuration" } else { "command" }.to_owned(),
        ]);
    }
    table.write("", &mut out);
    out
}

/// `anabranch status --flows`.
#[must_use]
pub fn flows(list: &FlowList) -> String {
    let mut out = String::new();
    let mut table = Table::new(&[
        "<core",
        "protocol",
        "source",
        "destination",
        "translated",
        "state",
        "<idle",
        "<ends in",
        "way",
        "rule",
        "server",
    ]);
    for flow in &list.flows {
        table.row([
            flow.core.to_string(),
            protocol_text(flow.protocol),
            flow.source.to_string(),
            flow.destination.to_string(),
            translation(flow),
            flow.state.clone(),
            duration(flow.idle_seconds),
            duration(flow.expires_in_seconds),
            format!("{} > {}", or_dash(&flow.interface), or_dash(&flow.out)),
            or_dash(&flow.rule),
            or_dash(&flow.virtual_server),
        ]);
    }
    table.write("", &mut out);
    let shown = list.flows.len();
    let more = if list.more { "; more match, see --limit" } else { "" };
    let cut = if list.cut { "; no time to look at all" } else { "" };
    let _ = writeln!(out, "{shown} of {} shown{more}{cut}", count(list.live_flows, "flow"));
    out
}

fn translation(flow: &FlowReport) -> String {
    let mut parts = Vec::new();
    if flow.translated_source != flow.source {
        parts.push(format!("from {}", flow.translated_source));
    }
    if flow.translated_destination != flow.destination {
        parts.push(format!("to {}", flow.translated_destination));
    }
    or_dash(&parts.join(" "))
}

/// `anabranch explain`: one line for each step, in the order a packet meets them.
#[must_use]
pub fn explanation(about: &Explanation) -> String {
    let mut out = String::new();
    let mut line = |what: &str, text: &str| {
        if !text.is_empty() {
            let _ = writeln!(out, "{what:<12}{text}");
        }
    };
    line("packet", &about.packet);
    let tenant = if about.tenant.is_empty() { String::new() } else { format!(", tenant {}", about.tenant) };
    line("comes in", &format!("{}{tenant}", or_dash(&about.interface)));
    line("core", &format!("{} (hash {:08x}, bucket {})", about.core, about.hash, about.bucket));
    if let Some(nic) = &about.nic {
        line("NIC", &nic_prediction(nic));
    }
    match &about.flow {
        Some(flow) => line("flow", &format!("known, {}: what follows was decided when it began", flow.state)),
        None => line("flow", "none yet: this packet would begin one"),
    }
    line("rule", &format!("{}: {}", or_dash(&about.rule), or_dash(&about.rule_action)));
    if let Some(forward) = &about.forward {
        line("forward", forward);
    }
    if let Some(server) = &about.virtual_server {
        let backend = about.backend.map_or_else(|| "no backend".to_owned(), |backend| backend.to_string());
        let reason = about.backend_reason.as_ref().map_or_else(String::new, |reason| format!(" ({reason})"));
        line("server", &format!("{server}: {backend}{reason}"));
    }
    let source = about.translated_source.map(|source| match source.port() {
        0 => format!(", leaves as {} with a port chosen when the flow begins", source.ip()),
        _ => format!(", leaves as {source}"),
    });
    if about.nat > 0 {
        let source = source.unwrap_or_default();
        line("NAT", &format!("[[nat]] number {}, {}{source}", about.nat, about.nat_mode));
    } else if let Some(source) = source {
        line("NAT", &format!("of the virtual server, {}{source}", about.nat_mode));
    } else {
        line("NAT", "none: the source stays");
    }
    if let Some(destination) = about.translated_destination {
        line("destination", &destination.to_string());
    }
    line("route", &format!("{} by {}", or_dash(&about.route), or_dash(&about.out)));
    if let Some(hop) = about.next_hop {
        let mac = about.next_hop_mac.as_deref().unwrap_or("not asked for yet");
        line("next hop", &format!("{hop} ({mac})"));
    }
    if let Some(core) = about.reply_core {
        let same = if core == about.core { "the same" } else { "handed over by ring" };
        line("reply core", &format!("{core} ({same})"));
    }
    let reason =
        if about.drop_reason.is_empty() { String::new() } else { format!(": {}", about.drop_reason) };
    line("verdict", &format!("{}{reason}", about.verdict));
    for note in &about.notes {
        line("note", note);
    }
    out
}

#[cfg(test)]
mod tests;
