//! Chains end by counting: an earlier owner that has no live flow in a bucket leaves the bucket's chain.
//!
//! It counts what was counted after all its cores worked by the era in force: from then on a unit begins no flow in a bucket
//! that it does not own, so none is a fact that stays. Time is never a reason; a long, quiet flow would lose its way.

use std::collections::BTreeMap;

use super::{Chains, MS, Manager};
use crate::message::{Message, Retired};

/// Pause between two messages about ended entries.
const RETIRE_EVERY_NS: u64 = 200 * MS;

impl Manager {
    /// Ends entries of chains by the reports that came. Only between changes: chains of a planned era are fixed.
    pub(super) fn retire(&mut self, now_ns: u64) {
        if !self.due.retire || now_ns < self.timers.retire_due_ns {
            return;
        }
        self.due.retire = false;
        self.timers.retire_due_ns = now_ns.saturating_add(RETIRE_EVERY_NS);
        let Some(table) = &mut self.state.table else { return };
        let era = table.era();
        let mut ended: BTreeMap<u16, Vec<u32>> = BTreeMap::new();
        for bucket in 0..table.buckets() {
            for unit in table.chain(bucket).to_vec() {
                let figures = self.peers.get(&unit).map(|peer| &peer.figures);
                let told = figures.filter(|figures| figures.in_force == Some(era));
                let empty = told.and_then(|figures| figures.live.get(bucket)) == Some(&0);
                let over = match self.settings.chains {
                    Chains::Clock { ns } => self.entered.is_over(bucket, unit, now_ns, ns),
                    _ => false,
                };
                if (empty || over) && table.retire(bucket, unit) {
                    ended.entry(unit).or_default().push(bucket as u32);
                }
            }
        }
        if ended.is_empty() {
            return;
        }
        let entries: Vec<Retired> = ended.iter().flat_map(|(unit, buckets)| runs(*unit, buckets)).collect();
        self.due.plan = true;
        let members: Vec<u64> = self
            .connected_peers()
            .filter(|(_, peer)| peer.synced == Some(era))
            .filter_map(|(_, peer)| peer.connection)
            .collect();
        for connection in members {
            self.send(connection, Message::Retire { era, entries: entries.clone() });
        }
    }

    /// Live flows by bucket, of the unit that owns it; empty if nobody has told.
    pub(super) fn live_by_owner(&self) -> Vec<u32> {
        let Some(table) = &self.state.table else { return Vec::new() };
        if self.peers.values().all(|peer| peer.figures.live.is_empty()) {
            return Vec::new();
        }
        let live = |(bucket, owner): (usize, &u16)| {
            let figures = self.peers.get(owner).map(|peer| &peer.figures);
            figures.and_then(|figures| figures.live.get(bucket)).copied().unwrap_or(0)
        };
        table.owners().iter().enumerate().map(live).collect()
    }
}

/// Ascending buckets as runs.
fn runs(unit: u16, buckets: &[u32]) -> Vec<Retired> {
    let mut runs: Vec<Retired> = Vec::new();
    for bucket in buckets {
        match runs.last_mut() {
            Some(run) if run.first + run.buckets == *bucket => run.buckets += 1,
            _ => runs.push(Retired { first: *bucket, buckets: 1, unit }),
        }
    }
    runs
}
