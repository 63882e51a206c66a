//! Tests of the order: scenarios one by one, properties over random traffic, a simulation in virtual time.
#![allow(clippy::unwrap_used, reason = "tests")]

mod property;
mod scenario;
mod simulation;

use super::*;

/// Paths that differ in nothing.
fn equal_paths(count: u8) -> Vec<PathTiming> {
    (0..count).map(|path| PathTiming { path, delay_us: 0, jitter_us: 0 }).collect()
}

/// An orderer with such paths.
fn orderer(paths: u8, recovery_wait_us: Option<u32>) -> Orderer<u32> {
    let mut orderer = Orderer::new(4_096);
    orderer.set_paths(&equal_paths(paths), recovery_wait_us);
    orderer
}

/// A packet has arrived: does everything the caller has to do and returns the stamps written out.
fn arrive(orderer: &mut Orderer<u32>, now: Time, path: u8, order: Order) -> Vec<u32> {
    let mut out = Vec::new();
    match orderer.admit(now, path, order) {
        Admit::Deliver | Admit::Late => out.push(order.stamp),
        Admit::Hold => orderer.hold(now, path, order, order.stamp).unwrap(),
    }
    drain(orderer, now, &mut out);
    out
}

fn drain(orderer: &mut Orderer<u32>, now: Time, out: &mut Vec<u32>) {
    while let Some(stamp) = orderer.pop_ready(now) {
        out.push(stamp);
    }
}

/// Stamps that leave at `now` without an arrival.
fn at(orderer: &mut Orderer<u32>, now: Time) -> Vec<u32> {
    let mut out = Vec::new();
    drain(orderer, now, &mut out);
    out
}

fn order(stamp: u32, back: u16) -> Order {
    Order { stamp, back, same_path: false }
}
