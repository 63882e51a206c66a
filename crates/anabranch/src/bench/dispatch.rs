//! Cost of a dispatcher: a packet's way from its key to the encapsulated copy, and the tables behind it.
//!
//! Beside it stands what nobody can do without: the same copy and one random read of the table, in the same run.

use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::ensure;
use clap::Args as ClapArgs;
use cluster::encapsulation::outer::{OUTER_BYTES_MAX, Outer, OuterChecksum, entropy_port};
use cluster::encapsulation::{ENCAPSULATION_BYTES_MAX, Encapsulation};
use packet::flow::FlowKey;
use serde::Serialize;
use steering::assign::plan;
use steering::era::Eras;
use steering::symmetric::FlowHasher;
use steering::table::{BucketTable, NODE_BUCKETS, Unit};
use steering::units::{Lease, Leases, Units};

use crate::output;

/// Bytes of an Ethernet header.
const ETHERNET_BYTES: usize = 14;
/// Bytes of a frame without checksum: the shortest there is, or what IPv6 needs.
const FRAME_BYTES: usize = 80;
/// Room of a frame with its headers.
const SLOT_BYTES: usize = 256;
const HEAD_BYTES: usize = ENCAPSULATION_BYTES_MAX + OUTER_BYTES_MAX;

/// Settings of a measurement.
#[derive(ClapArgs)]
#[command(after_help = "Example: anabranch bench dispatch --units 250")]
pub struct Args {
    /// Data planes that share the buckets.
    #[arg(long, default_value_t = 250)]
    units: u16,
    /// Different flows.
    #[arg(long, default_value_t = 65_536)]
    flows: u32,
    /// Passes over all flows; the quickest counts
    #[arg(long, default_value_t = 30)]
    passes: u32,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Result.
#[derive(Serialize)]
struct Report {
    units: u16,
    flows: u32,
    ipv4_ns_per_packet: f64,
    ipv6_ns_per_packet: f64,
    copy_and_read_ns_per_packet: f64,
    ipv4_ratio: f64,
    plan_ms: f64,
    moved_buckets: usize,
    quota_buckets: usize,
    table_bytes: usize,
    wire_bytes: usize,
    encode_ms: f64,
    decode_ms: f64,
    bytes_per_flow: u32,
}

/// Runs it.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    ensure!(args.units > 0 && args.flows > 0 && args.passes > 0, "at least one unit, flow and pass");
    ensure!(args.units < 4_000, "at most 3,999 units");
    let units: Vec<Unit> = (1..=args.units).map(|id| Unit { id, weight: 1 }).collect();
    let table = BucketTable::new(NODE_BUCKETS, &units)?;
    let more: Vec<Unit> = (1..=args.units + 1).map(|id| Unit { id, weight: 1 }).collect();
    let began = Instant::now();
    let next = plan(&table, &more, &[])?;
    let plan_ms = began.elapsed().as_secs_f64() * 1e3;
    let began = Instant::now();
    let wire = next.encode_with_chains();
    let encode_ms = began.elapsed().as_secs_f64() * 1e3;
    let began = Instant::now();
    let again = BucketTable::decode(&wire)?;
    let decode_ms = began.elapsed().as_secs_f64() * 1e3;
    ensure!(again == next, "a table changed on the wire");
    let (moved_buckets, quota_buckets) = (table.moves(&next).count(), next.count(args.units + 1));
    let view = view(table);
    let (ipv4, ipv6) = (frames(args.flows, true), frames(args.flows, false));
    let ipv4_ns = measure(args, &ipv4, |frame, out| dispatch(&view, frame, out));
    let ipv6_ns = measure(args, &ipv6, |frame, out| dispatch(&view, frame, out));
    let random: Vec<u16> =
        ipv4.chunks(FRAME_BYTES).map(|frame| u16::from_be_bytes([frame[36], frame[37]])).collect();
    let owners = view.eras.newest().owners();
    let mut place = 0;
    let copy_ns = measure(args, &ipv4, |frame, out| {
        place = (place + 1) % random.len();
        let bucket = usize::from(random[place].wrapping_mul(40_503));
        copy(frame, out);
        owners[bucket]
    });
    let report = Report {
        units: args.units,
        flows: args.flows,
        ipv4_ns_per_packet: ipv4_ns,
        ipv6_ns_per_packet: ipv6_ns,
        copy_and_read_ns_per_packet: copy_ns,
        ipv4_ratio: ipv4_ns / copy_ns,
        plan_ms,
        moved_buckets,
        quota_buckets,
        table_bytes: NODE_BUCKETS * size_of::<u16>(),
        wire_bytes: wire.len(),
        encode_ms,
        decode_ms,
        bytes_per_flow: 0,
    };
    if args.json {
        output::print_json(&report)?;
    } else {
        print(&report);
    }
    Ok(ExitCode::SUCCESS)
}

fn print(report: &Report) {
    let _ = output::print(&format!(
        "dispatch with encapsulation, {} flows, {} units: IPv4 {:.1} ns a packet, IPv6 {:.1} ns\n\
         the same copy and one random read of the table: {:.1} ns, ratio {:.2}\n\
         plan of one unit more over 65,536 buckets: {:.2} ms, {} moved, its quota is {}\n\
         table {} KiB, with chains on the wire {} KiB, encoded in {:.2} ms, decoded in {:.2} ms; 0 bytes a flow\n",
        report.flows,
        report.units,
        report.ipv4_ns_per_packet,
        report.ipv6_ns_per_packet,
        report.copy_and_read_ns_per_packet,
        report.ipv4_ratio,
        report.plan_ms,
        report.moved_buckets,
        report.quota_buckets,
        report.table_bytes >> 10,
        report.wire_bytes >> 10,
        report.encode_ms,
        report.decode_ms,
    ));
}

/// A dispatcher's view, with some outside addresses whose ports are leased.
fn view(table: BucketTable) -> Units {
    let mut random = fastrand::Rng::with_seed(7);
    let leases: Vec<Lease> = (0..8u8)
        .flat_map(|last| {
            let address = IpAddr::V4(Ipv4Addr::new(203, 0, 113, last));
            (1..64).map(move |block| Lease { address, block, node: u16::from(block) })
        })
        .collect();
    let in_force = table.era();
    Units {
        node: 4_000,
        hasher: FlowHasher::new(std::array::from_fn(|_| random.u8(..))),
        eras: Eras::new(table),
        in_force,
        leases: Leases::new(&leases),
    }
}

/// Frames of UDP flows in random order.
fn frames(flows: u32, ipv4: bool) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(0x5eed);
    let mut bytes = vec![0; flows as usize * FRAME_BYTES];
    for frame in bytes.chunks_mut(FRAME_BYTES) {
        let packet = &mut frame[ETHERNET_BYTES..];
        if ipv4 {
            packet[..10].copy_from_slice(&[0x45, 0, 0, 46, 0, 0, 0x40, 0, 64, 17]);
            packet[12..16].copy_from_slice(&Ipv4Addr::from(0x0a00_0000 | random.u32(..1 << 24)).octets());
            packet[16..20].copy_from_slice(&Ipv4Addr::new(198, 51, 100, random.u8(..)).octets());
            packet[20..24].copy_from_slice(&random.u32(..).to_be_bytes());
        } else {
            packet[..8].copy_from_slice(&[0x60, 0, 0, 0, 0, 16, 17, 64]);
            packet[8..24].copy_from_slice(&Ipv6Addr::from(random.u128(..)).octets());
            packet[24..40].copy_from_slice(&Ipv6Addr::from(random.u128(..)).octets());
            packet[40..44].copy_from_slice(&random.u32(..).to_be_bytes());
        }
        frame[12..14].copy_from_slice(if ipv4 { &[8, 0] } else { &[0x86, 0xdd] });
    }
    bytes
}

/// Quickest pass, ns a packet.
fn measure(args: &Args, frames: &[u8], mut act: impl FnMut(&[u8], &mut [u8]) -> u16) -> f64 {
    // As many slots as a ring has: what is written stays in the cache no longer than there.
    let mut out = vec![0u8; SLOT_BYTES * 256];
    let mut best = f64::MAX;
    for _ in 0..args.passes {
        let began = Instant::now();
        let mut sum = 0u64;
        for (frame, place) in frames.chunks(FRAME_BYTES).zip((0..256).cycle()) {
            let slot = &mut out[place * SLOT_BYTES..(place + 1) * SLOT_BYTES];
            sum += u64::from(act(black_box(frame), slot));
        }
        black_box(sum);
        best = best.min(began.elapsed().as_secs_f64() * 1e9 / f64::from(args.flows));
    }
    black_box(&out);
    best
}

fn copy(frame: &[u8], out: &mut [u8]) {
    out[HEAD_BYTES..HEAD_BYTES + frame.len()].copy_from_slice(frame);
}

/// A dispatcher's work with one frame; the unit.
fn dispatch(view: &Units, frame: &[u8], out: &mut [u8]) -> u16 {
    let Ok(key) = FlowKey::of(&frame[ETHERNET_BYTES..]) else { return 0 };
    let target = view.dispatch(&key);
    copy(frame, out);
    let head = Encapsulation::of_visit(target.unit, 1, &target.visit);
    let start = HEAD_BYTES - head.bytes();
    head.write(&mut out[start..]);
    let outer = Outer {
        source: IpAddr::V4(Ipv4Addr::new(10, 9, 0, 1)),
        destination: IpAddr::V4(Ipv4Addr::new(10, 9, 0, target.unit as u8)),
        source_port: entropy_port(frame),
        traffic_class: 0,
    };
    let end = HEAD_BYTES + frame.len();
    outer.write(&mut out[start - outer.bytes()..end], OuterChecksum::Zero);
    target.unit
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_measured_is_dispatched() {
        let args = Args { units: 5, flows: 64, passes: 1, json: false };
        let units: Vec<Unit> = (1..=args.units).map(|id| Unit { id, weight: 1 }).collect();
        let Ok(table) = BucketTable::new(NODE_BUCKETS, &units) else { panic!("a table") };
        let view = view(table);
        for ipv4 in [true, false] {
            let mut seen = std::collections::BTreeSet::new();
            measure(&args, &frames(args.flows, ipv4), |frame, out| {
                let unit = dispatch(&view, frame, out);
                let packet =
                    &out[HEAD_BYTES - Encapsulation::default().bytes() - 28..HEAD_BYTES + frame.len()];
                let Ok(Some((_, payload))) = cluster::encapsulation::outer::parse_outer(packet) else {
                    panic!("not found again")
                };
                let Ok((head, inner)) = Encapsulation::parse(payload) else { panic!("not read again") };
                assert_eq!((head.target, inner), (unit, frame));
                seen.insert(unit);
                unit
            });
            assert_eq!(seen.len(), 5, "all units get some");
        }
    }
}
