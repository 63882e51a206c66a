//! `anabranch replay`: a capture through the production loop, written to another capture. Deterministic: the same input
//! and configuration give the same output, byte by byte.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufReader, BufWriter, Write as _};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use arc_swap::ArcSwap;
use clap::Args as ClapArgs;
use control::config::Config;
use control::gateway::overrides::Overrides;
use control::host_facts::{EPHEMERAL, HostFacts};
use datapath::capture::{Captured, replay};
use datapath::memory::MemoryPorts;
use datapath::{Datapath, Snapshots, Worker};
use packet::attachment::{Ingress, InterfaceId};
use packet::flow::FlowKey;
use pcap_file::pcap::{PcapHeader, PcapPacket, PcapReader, PcapWriter};
use pcap_file::{DataLink, PcapError};
use services::pipeline::{ETHERNET_BYTES, Neighbors};
use services::policy::Policy;
use services::random::Random;
use services::spec::{GatewaySpec, LinkSpec};
use steering::ownership::Ownership;
use tunnel::config::NodeConfig;
use tunnel::node::Node;

use crate::output;

/// Frames of a capture at most: all of them are in memory.
const FRAMES_MAX: usize = 20_000_000;
/// Where time begins, ns: a flow table does not start at zero.
const START_NS: u64 = 1_000_000_000_000;

/// Settings of a replay.
#[derive(ClapArgs)]
#[command(after_help = "\
Frames count as received at the interface in whose prefix their source is; frames of other sources at the interface \
towards the default route. So every [[interface]] needs its address in the configuration, and what is far away a \
[[route]]: neither DHCP nor the kernel's routes are known. The output has what would leave, on any interface, and what would go to the host's own \
stack. No hardware address is known in a replay: those of next hops are made from their addresses.

Example:
  anabranch replay --in lan.pcap --out translated.pcap --config gateway.toml --cores 4

A capture that is cut off within its last frame is used as far as it goes, with a warning.
Exit codes: 1: the configuration is wrong. 2: --out is the file that --in reads. 4: a capture cannot be read or written.")]
pub struct Args {
    /// Capture to read (pcap, Ethernet or raw IP)
    #[arg(long = "in", value_name = "FILE")]
    input: PathBuf,
    /// Capture to write (pcap, Ethernet)
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Configuration with interfaces and services
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// How many cores the gateway has
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=128))]
    cores: u8,
    /// Print the counts as JSON
    #[arg(long)]
    json: bool,
}

/// Result of a replay.
#[derive(serde::Serialize)]
struct Report {
    read_frames: usize,
    sent_frames: u64,
    to_host_frames: u64,
    flows: usize,
    handoffs: u64,
    replies_on_wrong_core: u64,
    drops: std::collections::BTreeMap<String, u64>,
}

/// A host without any device: what a replay needs is in the configuration.
fn no_host() -> HostFacts {
    HostFacts {
        devices: Vec::new(),
        routes: Vec::new(),
        rules: Vec::new(),
        ipsec: Vec::new(),
        tunnels: BTreeSet::new(),
        tun_index: None,
        ephemeral_ports: EPHEMERAL,
        held_ports: Arc::default(),
        port_blocks: None,
        lingering: BTreeSet::new(),
        takes_over: false,
    }
}

/// Runs the capture through.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    if same_file(&args.input, &args.out) {
        let message = "--out is the same file as --in, which would be lost; choose another one";
        output::complain(&format!("anabranch: {message}"));
        return Ok(ExitCode::from(crate::EXIT_COMMAND_LINE));
    }
    let (config, warnings) = match Config::load(&args.config).into_result() {
        Ok(loaded) => loaded,
        Err(problems) => {
            for problem in problems {
                output::complain(&problem.to_string());
            }
            return Ok(ExitCode::from(crate::EXIT_CONFIGURATION));
        }
    };
    for warning in warnings {
        output::complain(&warning.to_string());
    }
    let mut spec = control::gateway::policy::gateway_spec(&config, &no_host(), &Overrides::default());
    for (place, interface) in (1u8..).zip(&mut spec.interfaces) {
        interface.link = LinkSpec::ethernet([2, 0, 0, 0, 0, place]);
    }
    if spec.interfaces.is_empty() {
        output::complain(&format!("{}: no [[interface]]: nothing to replay through", args.config.display()));
        return Ok(ExitCode::from(crate::EXIT_CONFIGURATION));
    }
    let frames = read(&args.input, &spec)?;
    let read_frames = frames.len();
    let mut cores = cores(args.cores, spec)?;
    let ownership = Arc::clone(&cores.ownership);
    let policy = Arc::clone(&cores.policy);
    let reader = |frame: &Captured| {
        let key = FlowKey::of(frame.bytes.get(ETHERNET_BYTES..).unwrap_or_default());
        key.map_or(0, |key| {
            usize::from(ownership.owner_of_bucket(ownership.bucket(&key, policy.tenant_of(frame.attachment))))
        })
    };
    let replayed = replay(&mut cores.workers, reader, frames);
    write(&args.out, &replayed.packets)?;
    let mut drops = packet::DropCounters::default();
    for worker in &cores.workers {
        drops.merge(&worker.datapath.service_drops());
        drops.merge(&worker.datapath.tunnel_drops());
    }
    let services = || cores.workers.iter().map(|worker| &worker.datapath.services);
    let report = Report {
        read_frames,
        sent_frames: replayed.sent,
        to_host_frames: replayed.to_host,
        flows: services().map(|core| core.flows().len()).sum(),
        handoffs: services().map(|core| core.counters.handed_out).sum(),
        replies_on_wrong_core: services().map(|core| core.counters.replies_on_wrong_core).sum(),
        drops: drops
            .iter()
            .filter(|(_, count)| *count > 0)
            .map(|(reason, count)| (reason.name().to_owned(), count))
            .collect(),
    };
    if args.json {
        output::print_json(&report)?;
    } else {
        output::print(&text(&report))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Whether both names lead to one file, by links as well.
fn same_file(input: &Path, out: &Path) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    let identity = |path: &Path| std::fs::metadata(path).map(|about| (about.dev(), about.ino())).ok();
    identity(input).is_some_and(|input| identity(out) == Some(input))
}

fn text(report: &Report) -> String {
    let mut text = format!(
        "{} frames read, {} sent, {} to the host; {} flows, {} handed to another core\n",
        report.read_frames, report.sent_frames, report.to_host_frames, report.flows, report.handoffs
    );
    for (reason, count) in &report.drops {
        text.push_str(&format!("dropped {count}: {reason}\n"));
    }
    text
}

struct Cores {
    workers: Vec<Worker<MemoryPorts>>,
    policy: Arc<Policy>,
    ownership: Arc<Ownership>,
}

/// Keys and seeds are fixed: this gateway talks to nobody, and must do the same every time.
fn cores(count: u8, spec: GatewaySpec) -> anyhow::Result<Cores> {
    let neighbors = Arc::new(neighbors(&spec));
    let (policy, _) = Policy::compile(spec, None, START_NS).map_err(|error| anyhow!(error))?;
    let policy = Arc::new(policy);
    let keys = (1u64..65).map(|seed| {
        let mut state = seed;
        std::array::from_fn(|_| {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            (state >> 56) as u8
        })
    });
    let ownership = Arc::new(Ownership::new(count, keys)?);
    let node = Arc::new(Node::new(NodeConfig {
        private_key: tunnel::PrivateKey::new([7; 32]),
        ownership: Arc::new(ArcSwap::new(Arc::clone(&ownership))),
        node_id: 0,
        hub_key: None,
        index_key: [0; 16],
        boot_id: 0,
        seed: [0; 32],
        wall_clock_ns: 0,
        timestamp_floor_ns: 0,
        rekey_after_ms: tunnel::session::REKEY_AFTER_MS,
    }));
    let snapshots = Snapshots {
        policy: Arc::clone(&policy),
        ownership: Arc::clone(&ownership),
        neighbors,
        cluster: None,
        inherited: Arc::default(),
        opened_ports: Arc::default(),
        lan: None,
        serving: true,
    };
    let worker = |id: u8| {
        let random = Random::of_number(u64::from(id));
        let datapath = Datapath::new(id, Arc::clone(&node), random, snapshots.clone());
        Worker { datapath, ports: MemoryPorts::new() }
    };
    Ok(Cores { workers: (0..count).map(worker).collect(), policy, ownership })
}

/// Every configured router has a hardware address made from its own; other neighbors have none and leave as such.
fn neighbors(spec: &GatewaySpec) -> Neighbors {
    let mut neighbors = Neighbors { version: 1, ..Neighbors::default() };
    for route in &spec.routes {
        if let (Some(id), Some(via)) = (route.egress.interface(), route.via) {
            neighbors.known.insert((id, via), made_up(via));
        }
    }
    neighbors
}

/// A locally administered hardware address.
fn made_up(address: IpAddr) -> [u8; 6] {
    let tail = match address {
        IpAddr::V4(address) => address.octets(),
        IpAddr::V6(address) => {
            [address.octets()[12], address.octets()[13], address.octets()[14], address.octets()[15]]
        }
    };
    [2, 0, tail[0], tail[1], tail[2], tail[3]]
}

/// The interface that a frame was captured at, as far as its source tells.
fn interface_of(packet: &[u8], spec: &GatewaySpec) -> InterfaceId {
    let Ok(key) = FlowKey::of(packet) else { return InterfaceId(0) };
    let source = packet::IpHeader::parse(packet).map_or(key.src, |header| header.src);
    let near = (0..)
        .map(InterfaceId)
        .zip(&spec.interfaces)
        .find(|(_, interface)| interface.addresses.iter().any(|address| address.contains(&source)));
    let far = || {
        let default = spec.routes.iter().find(|route| {
            route.prefix.prefix_len() == 0 && route.prefix.addr().is_ipv4() == source.is_ipv4()
        });
        default.and_then(|route| route.egress.interface())
    };
    near.map(|(id, _)| id).or_else(far).unwrap_or(InterfaceId(0))
}

fn read(path: &Path, spec: &GatewaySpec) -> anyhow::Result<Vec<Captured>> {
    let what = || format!("cannot read {}", path.display());
    let file = File::open(path).with_context(what)?;
    let mut reader = PcapReader::new(BufReader::new(file)).with_context(|| {
        format!(
            "{}: not a pcap file; convert pcapng with \"editcap -F pcap in.pcapng out.pcap\"",
            path.display()
        )
    })?;
    let raw = match reader.header().datalink {
        DataLink::ETHERNET => false,
        DataLink::RAW | DataLink::IPV4 | DataLink::IPV6 => true,
        other => {
            return Err(anyhow!("{}: link type {other:?}; Ethernet or raw IP is needed", path.display()));
        }
    };
    let mut frames = Vec::new();
    let mut first = None;
    while let Some(packet) = reader.next_packet() {
        let packet = match packet {
            // A capture program that was killed leaves it so.
            Err(PcapError::IoError(error)) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                output::complain(&format!(
                    "{}: warning: it ends within a frame, or is damaged there; what comes before is used",
                    path.display()
                ));
                break;
            }
            packet => packet.with_context(what)?,
        };
        let at = packet.timestamp;
        let since = at.saturating_sub(*first.get_or_insert(at));
        let mut bytes = Vec::with_capacity(ETHERNET_BYTES + packet.data.len());
        if raw {
            bytes.resize(ETHERNET_BYTES, 0);
        }
        bytes.extend_from_slice(&packet.data);
        let is_ip = raw || matches!(bytes.get(12..14), Some([8, 0] | [0x86, 0xdd]));
        if !is_ip {
            continue;
        }
        let interface = interface_of(bytes.get(ETHERNET_BYTES..).unwrap_or_default(), spec);
        let since_ns = u64::try_from(since.as_nanos()).unwrap_or(u64::MAX / 2);
        let attachment = Ingress::Interface(interface);
        frames.push(Captured { at_ns: START_NS.saturating_add(since_ns), attachment, bytes });
        if frames.len() > FRAMES_MAX {
            return Err(anyhow!("{}: more than {FRAMES_MAX} frames; cut it with editcap -c", path.display()));
        }
    }
    frames.sort_by_key(|frame| frame.at_ns);
    Ok(frames)
}

fn write(path: &Path, frames: &[Captured]) -> anyhow::Result<()> {
    let what = || format!("cannot write {}", path.display());
    let file = File::create(path).with_context(what)?;
    let header = PcapHeader {
        datalink: DataLink::ETHERNET,
        ts_resolution: pcap_file::TsResolution::NanoSecond,
        ..PcapHeader::default()
    };
    let mut writer = PcapWriter::with_header(BufWriter::new(file), header).with_context(what)?;
    for frame in frames {
        let at = Duration::from_nanos(frame.at_ns - START_NS);
        let length = u32::try_from(frame.bytes.len()).unwrap_or(u32::MAX);
        writer.write_packet(&PcapPacket::new(at, length, &frame.bytes)).with_context(what)?;
    }
    // Dropping it would not say that the disk is full.
    writer.into_writer().flush().with_context(what)
}
