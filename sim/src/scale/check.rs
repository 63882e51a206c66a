//! Packets of every flow that lives, at one moment; and figures of that moment.

use std::collections::BTreeSet;

use super::machines::{CORES, End};
use super::report::Sample;
use super::{World, lease_place};

/// Ways of all live flows' packets at one moment.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Ways {
    pub flows: u64,
    /// By the number of units that a packet comes to, less one.
    pub by_units: [u64; 6],
    /// Lost on the way: to a unit that is dead and not yet left out.
    pub lost: u64,
}

impl World {
    /// Sends a packet of every flow through some dispatcher, and an answer to every translated one. `settled`: nothing is under way,
    /// so none may be lost.
    pub(super) fn check(&mut self, settled: bool) -> Ways {
        let (dispatcher, core) = (self.any_dispatcher(), self.rng.usize(..CORES));
        let mut ways = Ways::default();
        let mut broken = BTreeSet::new();
        for node in 1..=self.scenario.planes {
            if !self.machines[usize::from(node)].running {
                continue;
            }
            for bucket in 0..self.keys.len() {
                let live = u64::from(self.machines[usize::from(node)].live[bucket]);
                if live == 0 {
                    continue;
                }
                ways.flows += live;
                let key = self.keys[bucket];
                let end = self.walk(&key, dispatcher, core, node);
                match end {
                    End::Kept { units } => ways.by_units[usize::from(units - 1).min(5)] += live,
                    End::Begins { .. } => drop(broken.insert((node, bucket as u16))),
                    End::Lost if settled => drop(broken.insert((node, bucket as u16))),
                    End::Lost => ways.lost += live,
                }
            }
            self.check_answers(node, dispatcher, core);
        }
        let outcome = &mut self.report.flows;
        outcome.lost_at_once_max = outcome.lost_at_once_max.max(ways.lost);
        outcome.checked += ways.flows;
        if let Some((node, bucket)) = broken.first() {
            let end = self.walk(&self.keys[usize::from(*bucket)].clone(), dispatcher, core, *node);
            let text =
                format!("{} groups of flows break; unit {node} bucket {bucket}: {end:?}", broken.len());
            self.report.note(
                self.now_ns,
                &format!("{text}, dispatcher {dispatcher} core {core}, settled: {settled}"),
            );
            self.break_flows(&broken);
        }
        ways
    }

    /// Answers to translated flows come by the lease of their port.
    fn check_answers(&mut self, node: u16, dispatcher: u16, core: usize) {
        let Some(units) = &self.machines[usize::from(dispatcher)].cores[core].units else { return };
        let blocks = (0u16..).zip(&self.machines[usize::from(node)].live_by_block);
        let mut astray = None;
        for (block, live) in blocks.filter(|(_, live)| **live > 0) {
            let (address, port) = lease_place(block);
            let found = units.leases.unit(address, port);
            if found != Some(node) {
                self.report.flows.answers_astray += u64::from(*live);
                astray = Some((address, port, found));
            }
        }
        if let Some((address, port, found)) = astray {
            let text = format!("answers for unit {node} at {address}:{port} go to {found:?}");
            self.report.note(self.now_ns, &format!("{text}, dispatcher {dispatcher} core {core}"));
        }
    }

    fn break_flows(&mut self, broken: &BTreeSet<(u16, u16)>) {
        let ended = self.flows.drop_if(|holder, bucket| broken.contains(&(holder, bucket)));
        self.report.flows.broken += ended.len() as u64;
        for (holder, bucket, block) in ended {
            self.machines[usize::from(holder)].note_flow(bucket, block, -1);
        }
    }

    /// Notes the figures of this moment.
    pub(super) fn sample(&mut self) {
        let ways = self.check(true);
        let Some(table) = &self.manager.state().table else { return };
        let mut chains = [0; 5];
        for bucket in 0..table.buckets() {
            chains[table.chain(bucket).len()] += 1;
        }
        let owners: BTreeSet<u16> = table.owners().iter().copied().collect();
        let sample = Sample {
            at_s: ((self.now_ns - self.report.start_ns) / super::SECOND) as u32,
            flows: ways.flows,
            by_units: ways.by_units,
            chains,
            owners: owners.len(),
            table_bytes: table.encode_with_chains().len(),
        };
        self.report.samples.push(sample);
    }
}
