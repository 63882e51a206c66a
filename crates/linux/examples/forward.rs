//! A measurement, no product: forwards frames between two interfaces with [`linux::packet_ring`] and
//! [`linux::packet_sender`] on one core, or only counts what arrives.
//!
//! ```text
//! forward receive IN SECONDS
//! forward both A MAC-BEHIND-A B MAC-BEHIND-B SECONDS [bypass]
//! ```
//!
//! With `SUPER_SLOTS` in the environment super-packets fit a slot of the ring. With `SPIN_US` the loop looks
//! again for so many microseconds before it sleeps.
//!
//! Prints one line: frames, megabytes, seconds, CPU seconds of this thread, kernel drops. How the figures of
//! `docs/decisions/0006-packet-io.md` were made with it stands there.

use std::error::Error;
use std::time::{Duration, Instant};

use linux::bpf::KernelShare;
use linux::event::{Epoll, Interest};
use linux::ingress_guard::IngressGuard;
use linux::netlink::Netlink;
use linux::packet_ring::{BATCH_MAX, PacketRing, PacketRingOptions, SLOT_BYTES_SUPER};
use linux::packet_sender::{PacketSender, SendFrame, Sent};

type Mac = [u8; 6];

#[derive(Default)]
struct Count {
    frames: u64,
    bytes: u64,
    full: u64,
    refused: u64,
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["receive", interface, seconds] => {
            let ring = open(interface)?;
            run(&mut [(ring, None)], seconds.parse()?)
        }
        ["both", a, behind_a, b, behind_b, seconds, rest @ ..] => {
            let bypass = rest.contains(&"bypass");
            let way = |from: &str, to: &str, behind: &str| -> Result<_, Box<dyn Error>> {
                let source =
                    Netlink::open()?.link(to)?.and_then(|link| link.mac).ok_or("no such interface")?;
                let send = (PacketSender::open(to, bypass)?, [mac(behind)?, source]);
                Ok((open(from)?, Some(send)))
            };
            run(&mut [way(a, b, behind_b)?, way(b, a, behind_a)?], seconds.parse()?)
        }
        _ => Err("forward receive IN SECONDS | forward both A MAC B MAC SECONDS [bypass]".into()),
    }
}

type Leg = (PacketRing, Option<(PacketSender, [Mac; 2])>);

/// The ring, with the kernel's own stack kept away; the guard stays until the program ends.
fn open(interface: &str) -> linux::Result<PacketRing> {
    std::mem::forget(IngressGuard::attach_program(interface, &KernelShare::default(), None)?);
    let mut options = PacketRingOptions::default();
    if std::env::var_os("SUPER_SLOTS").is_some() {
        options.slot_bytes = SLOT_BYTES_SUPER;
        options.ring_bytes = 64 << 20;
    }
    PacketRing::open(interface, &options)
}

fn mac(text: &str) -> Result<Mac, Box<dyn Error>> {
    let bytes: Result<Vec<u8>, _> = text.split(':').map(|byte| u8::from_str_radix(byte, 16)).collect();
    Ok(bytes?.as_slice().try_into()?)
}

fn run(legs: &mut [Leg], seconds: f64) -> Result<(), Box<dyn Error>> {
    let epoll = Epoll::new()?;
    for (number, (ring, _)) in legs.iter().enumerate() {
        epoll.add(ring, number as u64, Interest::Read)?;
    }
    let mut count = Count::default();
    let mut ready = Vec::new();
    let spin = std::env::var("SPIN_US").ok().and_then(|text| text.parse().ok()).unwrap_or(0);
    let spin = Duration::from_micros(spin);
    let start = Instant::now();
    let end = start + Duration::from_secs_f64(seconds);
    let (mut now, mut busy) = (start, start);
    while now < end {
        let mut idle = true;
        for leg in legs.iter_mut() {
            idle &= turn(leg, &mut count) == 0;
        }
        now = Instant::now();
        if !idle {
            busy = now;
        } else if now - busy >= spin {
            epoll.wait(&mut ready, Some(Duration::from_millis(10)))?;
        }
    }
    let wall = start.elapsed().as_secs_f64();
    let mut drops = 0;
    for (ring, _) in legs {
        drops += ring.drops()? + ring.cut();
    }
    let cpu = cpu_seconds();
    let rate = count.frames as f64 / wall / 1e6;
    let line = format!(
        "{} frames {} MB {wall:.2} s cpu {cpu:.2} s drops {drops} full {} refused {}: {rate:.3} M/s, {:.2} Gbit/s\n",
        count.frames,
        count.bytes / 1_000_000,
        count.full,
        count.refused,
        count.bytes as f64 * 8e-9 / wall,
    );
    std::io::Write::write_all(&mut std::io::stdout(), line.as_bytes())?;
    Ok(())
}

/// One batch of one leg; returns its frames.
fn turn((ring, send): &mut Leg, count: &mut Count) -> usize {
    let frames = ring.receive(BATCH_MAX);
    count.frames += frames as u64;
    if frames == 0 {
        return 0;
    }
    let mut out = [SendFrame::default(); BATCH_MAX];
    for (received, out) in ring.frames().zip(&mut out) {
        count.bytes += received.frame.len() as u64;
        if let (Some((_, [destination, source])), Some((to, rest))) =
            (&send, received.frame.split_first_chunk_mut::<6>())
        {
            to.copy_from_slice(destination);
            if let Some(from) = rest.first_chunk_mut::<6>() {
                from.copy_from_slice(source);
            }
        }
        *out = SendFrame { vnet: received.vnet.to_bytes(), parts: [received.frame, &[], &[]] };
    }
    if let Some((sender, _)) = send {
        let Sent { full, refused, .. } = sender.send_many(out.get(..frames).unwrap_or_default());
        count.full += full as u64;
        count.refused += refused as u64;
    }
    frames
}

fn cpu_seconds() -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/stat").unwrap_or_default();
    let after = text.rsplit(')').next().unwrap_or_default();
    let fields: Vec<f64> = after.split_whitespace().map(|word| word.parse().unwrap_or(0.0)).collect();
    // utime and stime, in hundredths of a second.
    (fields.get(11).unwrap_or(&0.0) + fields.get(12).unwrap_or(&0.0)) / 100.0
}
