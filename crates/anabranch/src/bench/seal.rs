//! Cost of sealing and opening one datagram of the tunnel.

use std::hint::black_box;
use std::process::ExitCode;
use std::time::Instant;

use clap::Args as ClapArgs;
use serde::Serialize;
use tunnel::aead::{Aead, LaneKey, SEALED_OVERHEAD_BYTES};
use tunnel::header::{Header, Kind};

use crate::output;

/// Settings of a measurement.
#[derive(ClapArgs)]
#[command(after_help = "Example: anabranch bench seal --bytes 1400")]
pub struct Args {
    /// Bytes of plaintext in each datagram.
    #[arg(long, default_value_t = 1_400)]
    bytes: usize,
    /// Datagrams.
    #[arg(long, default_value_t = 1_000_000)]
    packets: u64,
    /// Open what was sealed once, copied anew each time, instead of sealing.
    #[arg(long)]
    open: bool,
    /// ChaCha20-Poly1305 instead of AES-256-GCM.
    #[arg(long)]
    chacha: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    what: &'static str,
    aead: &'static str,
    bytes: usize,
    packets: u64,
    ns_per_packet: f64,
    gbps: f64,
}

/// Measures and prints.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let aead = if args.chacha { Aead::ChaCha20Poly1305 } else { Aead::Aes256Gcm };
    let key = LaneKey::derive(&[0x5a; 32], 1, aead);
    let mut header = Header {
        kind: Kind::Data,
        receiving_core: 2,
        sending_core: 1,
        path: 0,
        receiver_index: 0x1234_5678,
        counter: 0,
    };
    let mut datagram = vec![0; args.bytes + SEALED_OVERHEAD_BYTES];
    key.seal(&header, &mut datagram);
    let sealed = datagram.clone();
    let started = Instant::now();
    for _ in 0..args.packets {
        if args.open {
            datagram.copy_from_slice(&sealed);
            let parsed = Header::parse(&datagram).map_err(|reason| anyhow::anyhow!("header: {reason:?}"))?;
            let plaintext = key.open(&parsed, &mut datagram);
            black_box(plaintext.map_err(|reason| anyhow::anyhow!("not opened: {reason:?}"))?);
        } else {
            header.counter += 1;
            key.seal(&header, black_box(&mut datagram));
        }
    }
    let seconds = started.elapsed().as_secs_f64();
    let report = Report {
        what: if args.open { "open" } else { "seal" },
        aead: aead.name(),
        bytes: args.bytes,
        packets: args.packets,
        ns_per_packet: seconds * 1e9 / args.packets.max(1) as f64,
        gbps: args.bytes as f64 * 8.0 * args.packets as f64 / seconds / 1e9,
    };
    if args.json {
        output::print_json(&report)?;
    } else {
        output::print(&format!(
            "{} {} bytes with {}: {:.0} ns a datagram, {:.2} Gbit/s\n",
            report.what, report.bytes, report.aead, report.ns_per_packet, report.gbps
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}
