//! Physical limit of a look-up: random reads of as much memory as a flow table takes, in the order and with the prefetches
//! of [`services::Services::batch`], and nothing else. How near the gateway comes to it says more between machines than
//! packets a second do.
//!
//! A packet of a known flow reads its bucket of the index, whose content tells where the flow's entry and counters are, and
//! then these; the last two are written as well. Each is a random line of its part of the table.

use std::hint::black_box;
use std::time::Instant;

use packet::{FlowKey, prefetch};

use super::gateway::{BATCH, Kind};

/// Bytes of a cache line.
const LINE_BYTES: usize = 64;

/// Keys of both directions of a flow, in words.
const KEY_WORDS: usize = 2 * size_of::<FlowKey>() / 8;

/// One cache line.
#[derive(Clone, Copy, Default)]
#[repr(align(64))]
struct Line([u64; 8]);

/// Bytes that a flow has beside its part of the index, as [`services::flow`] documents them: entry, counters.
fn bytes_of_flow(kind: Kind) -> (usize, usize) {
    match kind {
        Kind::Plain => (52, 0),
        Kind::Nat | Kind::PortOnly | Kind::Server => (64, 32),
        Kind::NatV6 => (128, 32),
    }
}

/// Lines of each part that one packet touches, in as many bytes as the measured loop reads a flow's keys from.
#[derive(Clone, Copy)]
struct Places {
    bucket: u32,
    entry: u32,
    counters: u32,
    keys: [u64; KEY_WORDS],
}

/// Packets per µs that only the memory limits: `flows` flows in a table of `table_bytes`, `packets` packets of them.
pub(super) fn mpps(kind: Kind, flows: usize, table_bytes: usize, packets: u64) -> f64 {
    let (entry_bytes, counter_bytes) = bytes_of_flow(kind);
    let lines = |bytes: usize| vec![Line::default(); (bytes / LINE_BYTES).max(1)];
    let (mut entries, mut counters) = (lines(flows * entry_bytes), lines(flows * counter_bytes));
    let index = lines(table_bytes.saturating_sub(flows * (entry_bytes + counter_bytes)));
    let entry_lines = entry_bytes.div_ceil(LINE_BYTES);
    let mut random = fastrand::Rng::with_seed(0x5eed);
    let order: Vec<Places> = (0..flows)
        .map(|_| Places {
            bucket: random.u32(..index.len() as u32),
            entry: random.u32(..(entries.len() - entry_lines + 1) as u32),
            counters: random.u32(..counters.len() as u32),
            keys: [1; KEY_WORDS],
        })
        .collect();
    // What a bucket says is always "where the list says"; the compiler does not know it, and the processor has to wait.
    let index = black_box(index);
    let mut pass = |packets: u64| {
        let (mut sent, mut sum) = (0u64, 0u64);
        let mut found = [(0usize, 0usize); BATCH];
        for batch in order.chunks(BATCH).cycle() {
            if sent >= packets {
                break;
            }
            for places in batch {
                sum = sum.wrapping_add(places.keys.iter().sum());
                prefetch::read(&index[places.bucket as usize]);
            }
            for (places, found) in batch.iter().zip(&mut found) {
                let shift = index[places.bucket as usize].0[0] as usize;
                *found = (places.entry as usize + shift, places.counters as usize + shift);
                prefetch::read(&entries[found.0]);
                if entry_lines > 1 {
                    prefetch::read(&entries[found.0 + 1]);
                }
                if counter_bytes > 0 {
                    prefetch::read(&counters[found.1]);
                }
            }
            for (entry, counter) in &found[..batch.len()] {
                for line in &entries[*entry..entry + entry_lines] {
                    sum = sum.wrapping_add(line.0[1]);
                }
                entries[*entry].0[0] = sent;
                if counter_bytes > 0 {
                    counters[*counter].0[0] += 1;
                }
            }
            sent += batch.len() as u64;
        }
        black_box(sum);
        sent
    };
    // Every page is there before the clock runs.
    pass(flows as u64);
    let started = Instant::now();
    let sent = pass(packets);
    sent as f64 / started.elapsed().as_secs_f64() / 1e6
}
