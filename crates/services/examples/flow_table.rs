//! Measures the flow table: bytes of real memory for a flow while it grows, inserts, look-ups and pauses. Rates are by
//! processor time, pauses by the clock.
//!
//! `cargo run --release -p services --example flow_table` for all rows; each runs in a process of its own, so that
//! memory of one is not reused by the next. With a kind and a number of flows: that row only, e.g. `nat4 1000000`.

#![allow(clippy::print_stdout, reason = "it prints what it measures")]

use packet::FlowKey;
use services::flow::{Direction, FlowId, FlowTable, Hint, Record};
use services::random::Random;
use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::process::Command;
use std::time::Instant;

const ROWS: [(&str, u64); 7] = [
    ("nat4", 1_000_000),
    ("nat4", 10_000_000),
    ("plain4", 1_000_000),
    ("plain4", 10_000_000),
    ("nat6", 1_000_000),
    ("nat6", 5_000_000),
    ("plain6", 1_000_000),
];
const LOOKUPS: usize = 2_000_000;
const BATCH: usize = 64;
const ROUNDS: usize = 5;
const TENANT: u16 = 1;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [kind, flows] = arguments.as_slice() {
        row(kind, flows.parse().unwrap_or(1_000_000));
        return;
    }
    let Ok(program) = std::env::current_exe() else { return };
    for (kind, flows) in ROWS {
        let done = Command::new(&program).args([kind, &flows.to_string()]).status();
        assert!(done.is_ok_and(|status| status.success()), "{kind} {flows}");
    }
}

fn mix(number: u64) -> u64 {
    let mixed = (number ^ 0x5bd1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mixed = (mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed ^ (mixed >> 32)
}

/// The keys of flow `number`: a client of 10.0.0.0/8 to one of 65,536 servers, translated or not.
fn keys(kind: &str, number: u64) -> (FlowKey, FlowKey) {
    let random = mix(number);
    let (client, server) =
        (0x0a00_0000 | number as u32 & 0xff_ffff, 0xc000_0000 | (random >> 16) as u32 & 0xffff);
    let public = 0xcb00_7100 | (number / 60_000) as u32;
    let address = |bits: u32| match kind.ends_with('6') {
        false => IpAddr::V4(Ipv4Addr::from_bits(bits)),
        true => IpAddr::V6(Ipv6Addr::from_bits(0x2001_0db8_u128 << 96 | u128::from(bits))),
    };
    let original = FlowKey {
        src: address(client),
        dst: address(server),
        src_port: random as u16,
        dst_port: 443,
        protocol: 6,
    };
    let mut reply = original.reversed();
    if kind.starts_with("nat") {
        reply.dst = address(public);
        reply.dst_port = (number % 60_000) as u16 + 1024;
    }
    (original, reply)
}

/// Bytes of memory that this process really has.
fn resident() -> usize {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    text.split_whitespace().nth(1).and_then(|pages| pages.parse::<usize>().ok()).unwrap_or(0) * 4096
}

fn add(table: &mut FlowTable, kind: &str, number: u64) -> Option<FlowId> {
    let (original, reply) = keys(kind, number);
    table.insert((&original, TENANT), (&reply, TENANT), Record::default()).ok()
}

fn row(kind: &str, flows: u64) {
    println!("{kind}, {flows} flows");
    memory(kind, flows);
    let mut table = inserts(kind, flows);
    pauses(kind, flows.min(2_000_000));
    lookups(&table, kind, flows);
    churn(&mut table, kind, flows);
    println!();
}

/// Memory while the table grows, looked at every 20,000 flows once there are 200,000.
fn memory(kind: &str, flows: u64) {
    let before = resident();
    let mut table = FlowTable::new(&mut Random::of_number(7), flows as u32);
    let mut worst = (0.0, 0);
    let mut sum = (0.0, 0);
    for number in 0..flows {
        add(&mut table, kind, number);
        if number >= 200_000 && number % 20_000 == 0 {
            let each = (resident() - before) as f64 / table.len() as f64;
            sum = (sum.0 + each, sum.1 + 1);
            if each > worst.0 {
                worst = (each, number);
            }
        }
    }
    let grown = resident() - before;
    println!(
        "  memory  {:.1} B a flow at the end, {:.1} at worst (at {} flows), {:.1} on average; together {} MB, table says {} MB",
        grown as f64 / table.len() as f64,
        worst.0,
        worst.1,
        sum.0 / f64::from(sum.1.max(1)),
        grown / 1_000_000,
        table.memory_bytes() / 1_000_000
    );
}

/// Inserts as fast as it goes, growth included.
fn inserts(kind: &str, flows: u64) -> FlowTable {
    let mut table = FlowTable::new(&mut Random::of_number(11), flows as u32);
    let mut rates = [0.0; 3];
    for rate in &mut rates {
        table = FlowTable::new(&mut Random::of_number(11), flows as u32);
        let begin = processor_ns();
        for number in 0..flows {
            black_box(add(&mut table, kind, number));
        }
        *rate = flows as f64 * 1e3 / (processor_ns() - begin);
    }
    println!("  insert  {rates:.2?} M/s in three tables, one after the other");
    table
}

/// How long single inserts take.
fn pauses(kind: &str, flows: u64) {
    let mut table = FlowTable::new(&mut Random::of_number(13), flows as u32);
    let mut nanoseconds = Vec::with_capacity(flows as usize);
    for number in 0..flows {
        let begin = Instant::now();
        black_box(add(&mut table, kind, number));
        nanoseconds.push(begin.elapsed().as_nanos() as u64);
    }
    nanoseconds.sort_unstable();
    let at = |part: f64| nanoseconds.get((nanoseconds.len() as f64 * part) as usize).copied().unwrap_or(0);
    println!(
        "  pauses  p50 {} ns, p99.9 {} ns, p99.99 {} ns, p99.999 {} ns, longest {} ns",
        at(0.5),
        at(0.999),
        at(0.9999),
        at(0.99999),
        nanoseconds.last().copied().unwrap_or(0)
    );
}

/// Look-ups of random flows, both directions, keys at hand as from packets.
fn lookups(table: &FlowTable, kind: &str, flows: u64) {
    let wanted: Vec<FlowKey> = (0..LOOKUPS as u64)
        .map(|number| {
            let (original, reply) = keys(kind, mix(number.wrapping_mul(77)) % flows);
            if number % 2 == 0 { original } else { reply }
        })
        .collect();
    let one_by_one = timed(&wanted, |batch| batch.iter().map(|key| one(table, key)).sum());
    let batched = timed(&wanted, |batch| in_batch(table, batch, |_, _| ()));
    let rewritten = timed(&wanted, |batch| {
        in_batch(table, batch, |id, way| {
            black_box(table.leaves_as(id, way));
        })
    });
    let counted = timed(&wanted, |batch| in_batch(table, batch, |id, _| table.prefetch_counters(id)));
    println!(
        "  look-up one by one {one_by_one:.1} ns; batches of {BATCH}: {batched:.1} ns, with the key it leaves as \
         {rewritten:.1}, with a prefetch of counters {counted:.1}"
    );
}

fn one(table: &FlowTable, key: &FlowKey) -> usize {
    let hash = table.hash(key, TENANT);
    table.find(hash, key, TENANT).map_or(0, |(id, _)| 1 + table.record(id).state as usize)
}

fn in_batch(table: &FlowTable, batch: &[FlowKey], each: impl Fn(FlowId, Direction)) -> usize {
    let mut hashes = [0; BATCH];
    let mut hints = [Hint::default(); BATCH];
    for (key, hash) in batch.iter().zip(&mut hashes) {
        *hash = table.hash(key, TENANT);
        table.prefetch(*hash);
    }
    for (hint, hash) in hints.iter_mut().zip(&hashes).take(batch.len()) {
        *hint = table.prefetch_entry(*hash);
    }
    let mut found = 0;
    for (key, (hash, hint)) in batch.iter().zip(hashes.iter().zip(&hints)) {
        if let Some((id, direction)) = table.find_hinted(*hint, *hash, key, TENANT) {
            found += 1 + table.record(id).state as usize;
            each(id, direction);
        }
    }
    found
}

/// Nanoseconds for a key: the best of some rounds over all of them.
fn timed(wanted: &[FlowKey], mut work: impl FnMut(&[FlowKey]) -> usize) -> f64 {
    let mut best = f64::MAX;
    for _ in 0..ROUNDS {
        let begin = processor_ns();
        let found: usize = wanted.chunks(BATCH).map(&mut work).sum();
        assert_eq!(found, wanted.len(), "every flow is found");
        best = best.min((processor_ns() - begin) / wanted.len() as f64);
    }
    best
}

/// Time this thread has had on a processor: what others do at the same time does not count, apart from what they do to
/// caches and memory.
fn processor_ns() -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    text.split_whitespace().next().and_then(|field| field.parse().ok()).unwrap_or(0.0)
}

/// In a full table: packets counted, flows replaced one by one, and one pass of the sweep that removes nothing.
fn churn(table: &mut FlowTable, kind: &str, flows: u64) {
    let rounds = 1_000_000.min(flows);
    let begin = processor_ns();
    for number in 0..rounds {
        let (original, _) = keys(kind, number);
        let hash = table.hash(&original, TENANT);
        let found = table.find(hash, &original, TENANT);
        if let Some((id, _)) = found {
            table.account(id, Direction::Original, 1, 64);
            table.remove(id);
        }
        black_box(add(table, kind, flows + number));
    }
    println!(
        "  replace {:.2} M flows/s (look-up, removal, insert)",
        rounds as f64 * 1e3 / (processor_ns() - begin)
    );
    let begin = processor_ns();
    let mut examined = 0;
    loop {
        let swept = table.sweep(256, |record| record.seen == 1, |_| ());
        examined += swept.examined;
        if swept.pass_ended {
            break;
        }
    }
    println!("  sweep   {:.1} ns a flow ({examined} flows)", (processor_ns() - begin) / examined as f64);
}
