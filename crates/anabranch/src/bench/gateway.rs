//! How many packets and new flows one core and two cores decide, and what a flow costs in memory.
//!
//! The packets are 64-byte Ethernet frames (60 bytes without checksum) in memory; nothing is received or sent. The loop
//! is the production one: [`services::Services::batch`] with 64 frames at a time.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::process::ExitCode;
use std::sync::{Arc, Barrier};
use std::time::Instant;

use anyhow::{Context as _, anyhow};
use clap::Args as ClapArgs;
use packet::PacketPool;
use packet::attachment::{Egress, Ingress, InterfaceId};
use packet::checksum;
use packet::flow::FlowKey;
use packet::vnet::VirtioNetHeader;
use serde::Serialize;
use services::Services;
use services::pipeline::{ETHERNET_BYTES, Frame, Handed, Neighbors, Outcome, Output};
use services::policy::Policy;
use services::random::Random;
use services::spec::{
    Affinity, BackendSpec, BalanceMethod, DeliveryMode, GatewaySpec, InterfaceSpec, Limits, LinkSpec,
    Mapping, NatMode, NatSpec, PortChoice, ResetOnDown, RouteSpec, ServerSpec, UDP,
};
use steering::ownership::Ownership;

use super::limit;
use crate::output;

pub(super) const LAN: InterfaceId = InterfaceId(0);
pub(super) const WAN: InterfaceId = InterfaceId(1);
/// Packets of a batch.
pub(super) const BATCH: usize = 64;

/// Settings of a measurement.
#[derive(ClapArgs)]
#[command(after_help = "Example: anabranch bench gateway --flows 1000000")]
pub struct Args {
    /// Flows that are alive.
    #[arg(long, default_value_t = 1_000_000)]
    flows: u32,
    /// Packets of each measurement.
    #[arg(long, default_value_t = 20_000_000)]
    packets: u64,
    /// Only one kind of flows, and nothing with two cores
    #[arg(long, value_enum)]
    only: Option<Kind>,
    /// Leave out how fast the memory alone would be
    #[arg(long)]
    without_limit: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// One line of the result.
#[derive(Serialize)]
struct Row {
    what: &'static str,
    flows: usize,
    /// In memory that the process had not touched before: each page has to be given by the kernel, and cleared.
    new_flows_per_s: f64,
    /// The same number again, in the places of those that ended.
    new_flows_again_per_s: f64,
    hits_mpps: f64,
    /// Random reads of as much memory, prefetched in the same way, and nothing else: packets that only the memory limits.
    limit_mpps: f64,
    /// Share of that limit that the gateway reaches with known flows; goal 0.6.
    of_limit: f64,
    /// Growth of the process while the flows began, for each: the flow table, the NAT's tables, everything.
    bytes_per_flow: f64,
    /// Memory of the process in use before the first flow and after the last.
    resident_before_bytes: u64,
    resident_after_bytes: u64,
    /// The most that it ever was: tables that grow need both for a moment.
    resident_peak_bytes: u64,
    /// Of it the flow table, by its own count.
    flow_table_bytes: u64,
    /// Port tables of the NAT that hold a port.
    port_tables: usize,
}

#[derive(Serialize)]
struct Report {
    rows: Vec<Row>,
    /// Two cores of one gateway, packets per second of both.
    two_cores_mpps: f64,
    /// Two loops that share nothing, started together in the same run.
    two_independent_mpps: f64,
    two_cores_ratio: f64,
    handed_over: u64,
}

/// Kind of flows.
#[derive(Clone, Copy, PartialEq, clap::ValueEnum)]
pub(super) enum Kind {
    /// IPv4 without translation
    Plain,
    /// IPv4, address and port translated
    Nat,
    /// IPv4, port translated
    PortOnly,
    /// Virtual server
    Server,
    /// IPv6, address and port translated
    NatV6,
}

impl Kind {
    const fn name(self) -> &'static str {
        match self {
            Self::Plain => "IPv4, no translation",
            Self::Nat => "IPv4 NAT, address and port (C2)",
            Self::PortOnly => "IPv4 NAT, port only (C3)",
            Self::Server => "IPv4 virtual server, Maglev, 16 backends",
            Self::NatV6 => "IPv6 NAT, address and port (C2)",
        }
    }
}

/// Measures and prints.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let mut rows = Vec::new();
    if !args.json {
        output::print(&format!(
            "{:<44} {:>10} {:>14} {:>10} {:>10} {:>10} {:>8} {:>11} {:>11} {:>12}\n",
            "one core, 64-byte packets in memory",
            "flows",
            "new flows/s",
            "again",
            "hits Mpps",
            "limit Mpps",
            "of limit",
            "bytes/flow",
            "flow table",
            "port tables"
        ))?;
    }
    let all = [Kind::Nat, Kind::PortOnly, Kind::Server, Kind::Plain, Kind::NatV6];
    for kind in all.into_iter().filter(|kind| args.only.is_none_or(|only| only == *kind)) {
        let row = on_one_cpu(|| one_core(kind, args)).with_context(|| kind.name())?;
        if !args.json {
            output::print(&format!(
                "{:<44} {:>10} {:>14.0} {:>10.0} {:>10.2} {:>10.2} {:>8.2} {:>11.1} {:>11.1} {:>12}\n",
                row.what,
                row.flows,
                row.new_flows_per_s,
                row.new_flows_again_per_s,
                row.hits_mpps,
                row.limit_mpps,
                row.of_limit,
                row.bytes_per_flow,
                row.flow_table_bytes as f64 / row.flows.max(1) as f64,
                row.port_tables
            ))?;
        }
        rows.push(row);
    }
    if args.only.is_some() {
        if args.json {
            output::print_json(&rows)?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    let (shared, handed_over) = two(args, true)?;
    let (independent, _) = two(args, false)?;
    let report = Report {
        rows,
        two_cores_mpps: shared,
        two_independent_mpps: independent,
        two_cores_ratio: shared / independent,
        handed_over,
    };
    if args.json {
        output::print_json(&report)?;
    } else {
        output::print(&format!(
            "two cores of one gateway {shared:.2} Mpps, two independent loops {independent:.2} Mpps, ratio {:.3}, \
             handed over {handed_over}\n",
            report.two_cores_ratio
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Runs on a thread that stays on one CPU.
fn on_one_cpu<T: Send>(measure: impl FnOnce() -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
    let pinned = || {
        if let Some(cpu) = linux::affinity::allowed_cpus().ok().and_then(|cpus| cpus.last().copied()) {
            let _ = linux::affinity::pin_current_thread(cpu);
        }
        measure()
    };
    std::thread::scope(|scope| scope.spawn(pinned).join()).map_err(|_| anyhow!("a thread panicked"))?
}

fn one_core(kind: Kind, args: &Args) -> anyhow::Result<Row> {
    let mut bench = Bench::new(kind, 1, 0, None)?;
    // The list of keys is ours and not the gateway's: its memory is in use before the flows begin.
    let mut flows = vec![random_pair(); args.flows as usize];
    let before = status_bytes("VmRSS:");
    let opened_s = bench.open(&mut flows);
    let (after, peak) = (status_bytes("VmRSS:"), status_bytes("VmHWM:"));
    shuffle(&mut flows);
    let mpps = bench.hit(&flows, args.packets);
    let flow_table_bytes = bench.core.flows().memory_bytes() as u64;
    let port_tables = bench.core.nat().status().tables.len();
    bench.end_all();
    let again_s = bench.open(&mut flows);
    let limit_mpps = if args.without_limit {
        f64::NAN
    } else {
        limit::mpps(kind, flows.len(), flow_table_bytes as usize, args.packets)
    };
    Ok(Row {
        what: kind.name(),
        flows: flows.len(),
        new_flows_per_s: flows.len() as f64 / opened_s,
        new_flows_again_per_s: flows.len() as f64 / again_s,
        hits_mpps: mpps,
        limit_mpps,
        of_limit: mpps / limit_mpps,
        bytes_per_flow: after.saturating_sub(before) as f64 / flows.len().max(1) as f64,
        resident_before_bytes: before,
        resident_after_bytes: after,
        resident_peak_bytes: peak,
        flow_table_bytes,
        port_tables,
    })
}

/// Two threads; `shared`: two cores of one gateway, else two gateways of one core each. Packets per µs of both.
fn two(args: &Args, shared: bool) -> anyhow::Result<(f64, u64)> {
    let common = shared.then(|| common(Kind::Nat, 2)).transpose()?;
    let start = Arc::new(Barrier::new(2));
    let threads: Vec<_> = (0..2u8)
        .map(|core| {
            let (common, start) = (common.clone(), Arc::clone(&start));
            let (flows, packets) = (args.flows / 2, args.packets / 2);
            std::thread::spawn(move || -> anyhow::Result<(f64, u64)> {
                let allowed = linux::affinity::allowed_cpus().unwrap_or_default();
                if let Some(cpu) = allowed.get(usize::from(core) % allowed.len().max(1)) {
                    let _ = linux::affinity::pin_current_thread(*cpu);
                }
                let (cores, id) = if common.is_some() { (2, core) } else { (1, 0) };
                let mut bench = Bench::new(Kind::Nat, cores, id, common)?;
                let mut opened = vec![random_pair(); flows as usize];
                bench.open(&mut opened);
                shuffle(&mut opened);
                start.wait();
                let started = Instant::now();
                bench.hit(&opened, packets);
                let seconds = started.elapsed().as_secs_f64();
                Ok((packets as f64 / seconds / 1e6, bench.core.counters.handed_out))
            })
        })
        .collect();
    let (mut mpps, mut handed) = (0.0, 0);
    for thread in threads {
        let (own, out) = thread.join().map_err(|_| anyhow!("a thread panicked"))??;
        mpps += own;
        handed += out;
    }
    Ok((mpps, handed))
}

pub(super) type Common = (Arc<Policy>, Arc<Ownership>, Arc<Neighbors>);

struct Bench {
    kind: Kind,
    core: Services,
    ownership: Arc<Ownership>,
    slots: Vec<u8>,
    now_ns: u64,
    out: Nowhere,
}

#[derive(Default)]
struct Nowhere {
    handed: u64,
    pool: PacketPool,
}

impl Output for Nowhere {
    fn emit(&mut self, _: Outcome, _: Option<&FlowKey>, _: &VirtioNetHeader, _: &mut [u8]) {}

    fn to_unit(&mut self, _: u16, _: &Frame<'_>) {}

    fn hand_over(&mut self, _: u8, _: Handed) -> bool {
        self.handed += 1;
        true
    }

    fn buffers(&mut self) -> &mut PacketPool {
        &mut self.pool
    }
}

const SLOT_BYTES: usize = 128;

/// Both directions of a flow as they come in.
#[derive(Clone, Copy)]
struct Pair {
    request: FlowKey,
    reply: FlowKey,
}

impl Bench {
    fn new(kind: Kind, cores: u8, id: u8, shared: Option<Common>) -> anyhow::Result<Self> {
        let (policy, ownership, neighbors) = match shared {
            Some(shared) => shared,
            None => common(kind, cores)?,
        };
        let random = Random::of_number(0x5eed + u64::from(id));
        let mut core = Services::new(id, random, &policy, &ownership, neighbors);
        core.set_nat_events_wanted(false);
        let slots = vec![0; BATCH * SLOT_BYTES];
        Ok(Self { kind, core, ownership, slots, now_ns: 1_000_000_000_000, out: Nowhere::default() })
    }

    /// Opens as many flows as there is room for, and writes down what they look like from both sides. Seconds that the
    /// gateway took.
    fn open(&mut self, pairs: &mut [Pair]) -> f64 {
        let interface = if self.kind == Kind::Server { WAN } else { LAN };
        let mut number = 0u64;
        let mut keys = Vec::with_capacity(BATCH);
        let mut seconds = 0.0;
        for room in pairs.chunks_mut(BATCH) {
            keys.clear();
            while keys.len() < room.len() {
                let key = random_key(self.kind, number);
                number += 1;
                let owner = self.ownership.table.owner(self.ownership.bucket(&key, 0));
                if owner == u16::from(self.core.id()) {
                    keys.push(key);
                }
            }
            let started = Instant::now();
            let went_on = self.send(interface, &keys);
            seconds += started.elapsed().as_secs_f64();
            assert!(went_on == keys.len() as u64, "{went_on} of {} first packets went on", keys.len());
            let slots = self.slots.chunks_exact(SLOT_BYTES);
            for ((pair, request), slot) in room.iter_mut().zip(&keys).zip(slots) {
                let leaving = FlowKey::of(&slot[ETHERNET_BYTES..]).unwrap_or(*request);
                *pair = Pair { request: *request, reply: leaving.reversed() };
            }
            self.now_ns += 20_000;
        }
        seconds
    }

    /// Time passes until no flow is left.
    fn end_all(&mut self) {
        self.now_ns += 10_000_000_000_000;
        while !self.core.flows().is_empty() {
            self.now_ns += 10_000_000;
            self.core.tick(self.now_ns);
        }
    }

    /// Packets of the flows in the order of the list, a batch in one direction. Packets per µs.
    fn hit(&mut self, flows: &[Pair], packets: u64) -> f64 {
        let (near, far) = if self.kind == Kind::Server { (WAN, LAN) } else { (LAN, WAN) };
        let (mut sent, mut went_on) = (0u64, 0u64);
        let mut keys = Vec::with_capacity(BATCH);
        let started = Instant::now();
        let mut rounds = flows.chunks(BATCH).cycle();
        while sent < packets {
            let Some(round) = rounds.next() else { break };
            let replies = mix(sent) & 1 == 1;
            keys.clear();
            keys.extend(round.iter().map(|pair| if replies { pair.reply } else { pair.request }));
            went_on += self.send(if replies { far } else { near }, &keys);
            sent += keys.len() as u64;
            self.now_ns += 5_000;
        }
        let seconds = started.elapsed().as_secs_f64();
        assert!(went_on == sent, "{went_on} of {sent} packets went on");
        sent as f64 / seconds / 1e6
    }

    fn send(&mut self, interface: InterfaceId, keys: &[FlowKey]) -> u64 {
        let mut frames: Vec<Frame<'_>> = Vec::with_capacity(BATCH);
        for (slot, key) in self.slots.chunks_exact_mut(SLOT_BYTES).zip(keys) {
            let length = write_frame(slot, key);
            frames.push(Frame::new(Ingress::Interface(interface), partial(key), &mut slot[..length]));
        }
        self.core.batch(self.now_ns, &mut frames, &mut self.out);
        frames
            .iter()
            .filter(|frame| matches!(frame.outcome, Outcome::Forward(_) | Outcome::Resolve(..)))
            .count() as u64
    }
}

/// A checksum that the card has left to us, as on a virtual interface: only addresses change it.
fn partial(key: &FlowKey) -> VirtioNetHeader {
    let ip_bytes = if key.src.is_ipv4() { 20 } else { 40 };
    VirtioNetHeader {
        flags: packet::vnet::NEEDS_CSUM,
        csum_start: ip_bytes,
        csum_offset: 6,
        ..VirtioNetHeader::default()
    }
}

/// A UDP datagram in an Ethernet frame of 60 bytes, or as long as its headers.
fn write_frame(slot: &mut [u8], key: &FlowKey) -> usize {
    let (ip_bytes, length) = if key.src.is_ipv4() { (20, 60) } else { (40, 62) };
    let packet = &mut slot[ETHERNET_BYTES..length];
    let upper = packet.len() - ip_bytes;
    match (key.src, key.dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            let total = packet.len() as u16;
            packet[..12].copy_from_slice(&[
                0x45,
                0,
                (total >> 8) as u8,
                total as u8,
                0,
                1,
                0x40,
                0,
                64,
                UDP,
                0,
                0,
            ]);
            packet[12..16].copy_from_slice(&src.octets());
            packet[16..20].copy_from_slice(&dst.octets());
            let sum = checksum::finish(checksum::sum(&packet[..20], 0));
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            packet[..8].copy_from_slice(&[0x60, 0, 0, 0, 0, upper as u8, UDP, 64]);
            packet[8..24].copy_from_slice(&src.octets());
            packet[24..40].copy_from_slice(&dst.octets());
        }
        _ => {}
    }
    packet[ip_bytes..ip_bytes + 2].copy_from_slice(&key.src_port.to_be_bytes());
    packet[ip_bytes + 2..ip_bytes + 4].copy_from_slice(&key.dst_port.to_be_bytes());
    packet[ip_bytes + 4..ip_bytes + 6].copy_from_slice(&(upper as u16).to_be_bytes());
    packet[ip_bytes + 6..ip_bytes + 8].copy_from_slice(&[0x12, 0x34]);
    length
}

fn random_key(kind: Kind, number: u64) -> FlowKey {
    let bits = mix(number);
    let (src_port, dst_port) = (1024 + (bits >> 48) as u16 % 60_000, 1 + (bits >> 32) as u16 % 60_000);
    // 16,384 clients, so that a million flows are 63 for each: the scale that CSIT's NAT44 profiles use.
    let inside = Ipv4Addr::from(0x0a40_0000 | (bits as u32 & 0x3fff));
    let remote = Ipv4Addr::from(0x2000_0000 | (mix(bits) as u32 & 0x0fff_ffff));
    match kind {
        Kind::Plain | Kind::Nat | Kind::PortOnly => {
            FlowKey { src: inside.into(), dst: remote.into(), src_port, dst_port, protocol: UDP }
        }
        Kind::Server => FlowKey {
            src: remote.into(),
            dst: Ipv4Addr::new(203, 0, 113, 10).into(),
            src_port,
            dst_port: 53,
            protocol: UDP,
        },
        Kind::NatV6 => {
            let side = |first: u16, low: u64| {
                IpAddr::V6(Ipv6Addr::from((u128::from(first) << 112) | u128::from(low)))
            };
            FlowKey {
                src: side(0xfd00, bits >> 8),
                dst: side(0x2001, mix(bits) >> 8),
                src_port,
                dst_port,
                protocol: UDP,
            }
        }
    }
}

fn common(kind: Kind, cores: u8) -> anyhow::Result<Common> {
    assemble(spec(kind)?, cores)
}

/// State that the cores of a gateway share.
pub(super) fn assemble(spec: GatewaySpec, cores: u8) -> anyhow::Result<Common> {
    let (policy, _) = Policy::compile(spec, None, 0).map_err(|error| anyhow!(error))?;
    // Fixed: figures and instruction counts repeat.
    let mut random = fastrand::Rng::with_seed(0x5eed);
    let keys = std::iter::repeat_with(|| std::array::from_fn(|_| random.u8(..)));
    let ownership = Ownership::new(cores, keys)?;
    let mut neighbors = Neighbors::default();
    for (interface, address) in
        [(WAN, "203.0.113.254"), (WAN, "2001:db8::fe"), (LAN, "10.0.0.254"), (LAN, "fd00::fe")]
    {
        neighbors.known.insert((interface, address.parse()?), [2, 0, 0, 0, 1, interface.0 as u8]);
    }
    neighbors.version = 1;
    Ok((Arc::new(policy), Arc::new(ownership), Arc::new(neighbors)))
}

pub(super) fn spec(kind: Kind) -> anyhow::Result<GatewaySpec> {
    let interface = |name: &str, addresses: [&str; 2], last: u8| -> anyhow::Result<InterfaceSpec> {
        Ok(InterfaceSpec {
            name: name.to_owned(),
            device: name.to_owned(),
            addresses: vec![addresses[0].parse()?, addresses[1].parse()?],
            tenant: 0,
            mtu: 1500,
            ipv6_mtu: u16::MAX,
            link: LinkSpec::ethernet([2, 0, 0, 0, 0, last]),
            outside: false,
            through_action: None,
            loose_tcp: false,
        })
    };
    let route = |prefix: &str, interface: InterfaceId, via: &str| -> anyhow::Result<RouteSpec> {
        let egress = Egress::Interface(interface);
        Ok(RouteSpec::new(0, prefix.parse()?, egress, Some(via.parse()?)))
    };
    let mut spec = GatewaySpec {
        interfaces: vec![
            interface("lan", ["10.0.0.1/24", "fd00::1/64"], 0)?,
            interface("wan", ["203.0.113.1/24", "2001:db8::1/64"], 1)?,
        ],
        tenants: vec![String::new()],
        routes: vec![
            route("10.0.0.0/8", LAN, "10.0.0.254")?,
            route("fd00::/16", LAN, "fd00::fe")?,
            route("0.0.0.0/0", WAN, "203.0.113.254")?,
            route("::/0", WAN, "2001:db8::fe")?,
        ],
        limits: Limits { flows_max: 32_000_000, embryonic_max: 32_000_000, ..Limits::default() },
        ..GatewaySpec::default()
    };
    let mode = match kind {
        Kind::Nat | Kind::NatV6 => Some(NatMode::AddressAndPort),
        Kind::PortOnly => Some(NatMode::PortOnly),
        Kind::Plain | Kind::Server => None,
    };
    if let Some(mode) = mode {
        spec.nats.push(NatSpec {
            out: Some(WAN),
            mode,
            addresses: vec!["203.0.113.1".parse()?, "2001:db8::1".parse()?],
            from: Vec::new(),
            from_peers: Vec::new(),
            tenants: Vec::new(),
            of_interface: false,
            mapping: Mapping::EndpointDependent,
            ports: (1024, 65_535),
            port_choice: PortChoice::Random,
            reserved: Vec::new(),
            tables: 256,
            flows_per_client_max: 0,
            ports_per_client: 0,
            assemble_fragments: false,
        });
    }
    if kind == Kind::Server {
        spec.servers.push(server());
    }
    Ok(spec)
}

/// A virtual server that chooses the clients' ports, so that replies find its core.
fn server() -> ServerSpec {
    let backend = |last: u8| BackendSpec {
        address: (Ipv4Addr::new(10, 0, 0, last), 53).into(),
        weight: 1,
        connections_max: 0,
        drain_s: 0,
    };
    ServerSpec {
        name: "dns".to_owned(),
        protocol: UDP,
        listen: (Ipv4Addr::new(203, 0, 113, 10), 53).into(),
        backends: (10..26).map(backend).collect(),
        method: BalanceMethod::Maglev,
        delivery: DeliveryMode::Nat,
        source: NatMode::PortOnly,
        source_addresses: Vec::new(),
        connections_max: 0,
        slow_start_s: 0,
        proxy_protocol: false,
        reset_on_down: ResetOnDown::default(),
        affinity: Affinity::default(),
    }
}

/// A size of the process's memory, bytes.
fn status_bytes(name: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let kib = line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

/// Memory for a pair, touched.
fn random_pair() -> Pair {
    let key = random_key(Kind::Nat, 1);
    Pair { request: key, reply: key }
}

/// An order that has nothing to do with that in which the flows began.
fn shuffle(pairs: &mut [Pair]) {
    for last in (1..pairs.len()).rev() {
        pairs.swap(last, (mix(last as u64) % (last as u64 + 1)) as usize);
    }
}

/// A random word for each seed, the same in every run.
pub(super) fn mix(seed: u64) -> u64 {
    fastrand::Rng::with_seed(seed).u64(..)
}
