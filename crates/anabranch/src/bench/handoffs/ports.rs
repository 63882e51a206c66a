//! Of the ports that can serve a core and a destination: how many are given out before the first refusal, and at what
//! cost each.

use std::net::IpAddr;
use std::time::Instant;

use packet::attachment::Egress;
use packet::flow::FlowKey;
use serde::Serialize;
use services::pipeline::Outcome;
use services::spec::{NatMode, UDP};

use super::cores::{Coming, Cores};
use super::packets;
use crate::bench::gateway::{self, Kind, LAN, WAN};

/// Port tables have 8 words of each class: the most that a search may read, since full classes are passed over.
const WORDS_MAX: u64 = 8;
/// Look-ups in the flow table that a refusal may cost: 64 for ports of other tables, twice, since what was silent too
/// long makes room before it is final.
const CHECKS_MAX: u64 = 2 * 64;

/// One core's ports towards one destination.
#[derive(Serialize)]
pub struct Ports {
    row: &'static str,
    family: &'static str,
    core: u8,
    cores: u8,
    /// Ports of the range whose replies come to the core, each tried with the hash's definition.
    pub usable: u64,
    /// Flows opened before the first refusal.
    pub opened: u64,
    /// Words of the port table that the dearest of them read.
    words_max: u64,
    /// Look-ups in the flow table that the dearest of them needed.
    checks_max: u64,
    /// The same for the refusal.
    refusal_words: u64,
    refusal_checks: u64,
    /// Time of a first packet, median of the first and of the last hundredth, ns.
    first_ns: u64,
    last_ns: u64,
    pub kept: bool,
}

/// Ports that the NAT may use here, inclusive: whole blocks.
const RANGE: (u16, u16) = (2_048, 65_535);

/// Every core's ports towards one destination, in both modes and families.
pub fn run(cores: u8) -> anyhow::Result<Vec<Ports>> {
    let mut all = Vec::new();
    for (row, mode) in [("C2", NatMode::AddressAndPort), ("C3", NatMode::PortOnly)] {
        for v6 in [false, true] {
            for core in 0..cores {
                all.push(one(row, mode, v6, core, cores)?);
            }
        }
    }
    Ok(all)
}

fn one(row: &'static str, mode: NatMode, v6: bool, core: u8, count: u8) -> anyhow::Result<Ports> {
    let kind = if mode == NatMode::PortOnly { Kind::PortOnly } else { Kind::Nat };
    let mut spec = gateway::spec(kind)?;
    for nat in &mut spec.nats {
        // A range of its own: with the default one, clients that use ports below 1,024 get such ports besides (RFC 4787 REQ-3 a).
        nat.ports = RANGE;
    }
    let range = spec.nats.first().map_or(0..=0, |nat| nat.ports.0..=nat.ports.1);
    let mut cores = Cores::new(gateway::assemble(spec, count)?);
    let (client, outside, server): (IpAddr, IpAddr, IpAddr) = if v6 {
        ("fd00::77".parse()?, "2001:db8::1".parse()?, "2600::5".parse()?)
    } else {
        ("10.64.0.77".parse()?, "203.0.113.1".parse()?, "198.51.100.5".parse()?)
    };
    let request = FlowKey { src: client, dst: server, src_port: 0, dst_port: 443, protocol: UDP };
    let own = if mode == NatMode::PortOnly { client } else { outside };
    let comes_here = |key: &FlowKey| {
        let hash = packets::hash_by_definition(&cores.ownership.hasher, key);
        cores.ownership.table.owner_of_hash(hash) == u16::from(core)
    };
    let reply = |port| FlowKey { src: own, src_port: port, ..request }.reversed();
    let usable = range.filter(|port| comes_here(&reply(*port))).count() as u64;
    let requests: Vec<FlowKey> = requests(mode, &request).filter(|key| comes_here(key)).collect();
    let mut ports = Ports {
        row,
        family: if v6 { "IPv6" } else { "IPv4" },
        core,
        cores: count,
        usable,
        opened: 0,
        words_max: 0,
        checks_max: 0,
        refusal_words: 0,
        refusal_checks: 0,
        first_ns: 0,
        last_ns: 0,
        kept: false,
    };
    let refused = ports.open(&mut cores, &requests);
    // All classes are full: the flow's own table is refused without a word read.
    ports.kept = refused
        && ports.opened == usable
        && ports.words_max <= WORDS_MAX
        && ports.checks_max == 0
        && ports.refusal_checks <= CHECKS_MAX;
    Ok(ports)
}

/// First packets to the destination: of one client by all its ports where its address stays, else of many clients.
fn requests(mode: NatMode, request: &FlowKey) -> impl Iterator<Item = FlowKey> + '_ {
    let clients: u32 = if mode == NatMode::PortOnly { 1 } else { 4 };
    (0..clients).flat_map(move |client| {
        let src = match request.src {
            IpAddr::V4(first) => IpAddr::V4((u32::from(first) + client).into()),
            IpAddr::V6(first) => IpAddr::V6((u128::from(first) + u128::from(client)).into()),
        };
        // An odd factor: all ports, in an order that says nothing.
        (1..=u16::MAX).map(move |number| FlowKey { src, src_port: number.wrapping_mul(40_503), ..*request })
    })
}

impl Ports {
    /// Opens flows until one is refused; whether that came.
    fn open(&mut self, cores: &mut Cores, requests: &[FlowKey]) -> bool {
        let mut times_ns = Vec::with_capacity(requests.len());
        let (mut words, mut checks) = (0, 0);
        for (number, key) in requests.iter().enumerate() {
            let mut left = false;
            let coming = Coming { key: *key, replies: false, number: number as u32 };
            let mut seen = |_: u8, outcome: Outcome, _: &FlowKey, _: u32| {
                left |= outcome == Outcome::Forward(Egress::Interface(WAN));
            };
            let started = Instant::now();
            cores.arrive(usize::from(self.core), LAN, coming, &mut seen);
            cores.finish(LAN, &mut seen);
            times_ns.push(started.elapsed().as_nanos() as u64);
            let status = cores.cores.get(usize::from(self.core)).map(|core| core.nat().status());
            let status = status.unwrap_or_default();
            let (read, looked_up) = (status.words_read - words, status.flow_checks - checks);
            (words, checks) = (status.words_read, status.flow_checks);
            if !left {
                (self.refusal_words, self.refusal_checks) = (read, looked_up);
                self.first_ns = median(times_ns.get(..times_ns.len() / 100));
                self.last_ns = median(times_ns.get(times_ns.len() * 99 / 100..times_ns.len() - 1));
                return true;
            }
            self.opened += 1;
            self.words_max = self.words_max.max(read);
            self.checks_max = self.checks_max.max(looked_up);
        }
        false
    }

    /// A line for people.
    pub fn line(&self) -> String {
        format!(
            "{:<3} {:<5} {:>4} of {:<3} {:>7} {:>7} {:>8.3} % {:>9} {:>9} {:>15} {:>13}  {}\n",
            self.row,
            self.family,
            self.core,
            self.cores,
            self.usable,
            self.opened,
            self.opened as f64 * 100.0 / self.usable.max(1) as f64,
            self.words_max,
            self.checks_max,
            format!("{} and {}", self.refusal_words, self.refusal_checks),
            format!("{} to {}", self.first_ns, self.last_ns),
            if self.kept { "ok" } else { "NOT KEPT" }
        )
    }

    /// Headings of the columns of [`Ports::line`].
    pub fn head() -> String {
        format!(
            "{:<3} {:<5} {:>11} {:>7} {:>7} {:>10} {:>9} {:>9} {:>15} {:>13}\n",
            "row", "", "core", "usable", "opened", "", "words ≤", "checks ≤", "at the refusal", "ns per flow"
        )
    }
}

fn median(times: Option<&[u64]>) -> u64 {
    let mut times = times.unwrap_or_default().to_vec();
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or(0)
}
