//! Other machines: a packet that another unit of a cluster sent here, of a flow that this one does not have.
//!
//! A flow belongs to one core of one unit. A packet comes to the unit that owns its bucket and there to the core that owns
//! its hash; before that core begins a flow it asks [`Units::ask`], which may name an earlier owner of the bucket instead.
//! Packets that no unit sent, of the host and of interfaces of this machine alone, are nobody else's business.

use std::sync::Arc;

use packet::attachment::{Egress, Ingress, UnitVisit};
use packet::{DropReason, FlowKey};
use steering::owner_chain::Digest;
use steering::units::{Answer, Units};

use super::flows::{Expiry, Flows, TenantKey};
use super::{Frame, Outcome, Services};
use crate::flow::{Record, flags};
use crate::handover::InheritedFlows;
use crate::steer;

/// Entries that are looked at together when all flows are counted.
const SCAN_ENTRIES: usize = 4_096;

impl Services {
    /// Takes over what is known of the other machines.
    pub fn follow_units(&mut self, units: Option<&Arc<Units>>) {
        let routing = &mut self.routing;
        let same = match (&routing.units, units) {
            (Some(known), Some(units)) => Arc::ptr_eq(known, units),
            (None, None) => true,
            _ => false,
        };
        if same {
            return;
        }
        let first = routing.units.is_none();
        routing.units = units.cloned();
        if let Some(units) = units {
            routing.era_seen.note(units);
            if first {
                self.flows.count_by_unit_bucket(units);
            }
        }
    }

    /// Takes over which core has flows that were other machines'.
    pub fn follow_inherited(&mut self, flows: &Arc<InheritedFlows>) {
        self.routing.inherited = Arc::clone(flows);
    }

    /// Whether a packet of no flow of this unit goes to another one: then its outcome says so.
    ///
    /// # Errors
    /// [`DropReason::BusTtlExpired`], [`DropReason::EraUnknown`].
    pub(super) fn goes_to_unit(&mut self, key: &FlowKey, frame: &mut Frame<'_>) -> Result<bool, DropReason> {
        let (Some(units), Some(visit)) = (&self.routing.units, frame.visit) else { return Ok(false) };
        let key = steer::unit_key(&self.routing.policy, key);
        match units.ask(&key, &visit, Digest::Unknown, &mut self.routing.era_seen) {
            Answer::Begin => Ok(false),
            Answer::Send(target) => {
                frame.visit = Some(target.visit);
                frame.outcome = Outcome::Forward(Egress::Unit(target.unit));
                self.counters.units.sent += 1;
                Ok(true)
            }
            Answer::TooOften => Err(DropReason::BusTtlExpired),
            Answer::EraUnknown => Err(DropReason::EraUnknown),
        }
    }

    /// Fate of a packet that another unit sent here; nothing changes. `None`: its flow is of this core.
    #[must_use]
    pub fn would(&self, key: &FlowKey, ingress: Ingress, visit: &UnitVisit) -> Option<Answer> {
        let units = self.routing.units.as_ref()?;
        if self.flows.find(key, self.routing.tenants.of(ingress)).is_some() {
            return None;
        }
        let key = steer::unit_key(&self.routing.policy, key);
        Some(units.ask(&key, visit, Digest::Unknown, &mut self.routing.era_seen.clone()))
    }

    /// A packet of another unit waits for the table by which it was dispatched.
    pub fn note_era_wait(&mut self) {
        self.counters.units.waited_for_era += 1;
    }

    /// Ends all flows without a word to anybody: they are other units' by now.
    pub fn forget_flows(&mut self, now_ns: u64) {
        let policy = Arc::clone(&self.routing.policy);
        let expiry = Expiry {
            now_ns,
            era: self.routing.era,
            timeouts: policy.timeouts(),
            patience_s: None,
            lost: true,
        };
        for removed in self.flows.sweep(usize::MAX, &expiry) {
            self.closed(now_ns, &removed);
        }
        self.nat.forget_clients();
    }

    /// Live flows by bucket of the cluster's table; empty without a cluster.
    #[must_use]
    pub fn live_by_unit_bucket(&self) -> &[u32] {
        &self.flows.live_by_unit_bucket
    }
}

impl Flows {
    /// Counts all flows by the bucket of the cluster's table.
    fn count_by_unit_bucket(&mut self, units: &Units) {
        self.live_by_unit_bucket = vec![0; units.eras.newest().buckets()];
        let mut cursor = Some(0);
        while let Some(place) = cursor {
            let (ids, next) = self.table.scan(place, SCAN_ENTRIES);
            for id in ids {
                let (original, _) = self.table.keys(id);
                let record = *self.table.record(id);
                count(&mut self.live_by_unit_bucket, units, (&original, &record), 1);
            }
            cursor = next;
        }
    }

    /// A flow that began with this key has begun (`change` 1) or ended (−1).
    pub(super) fn note_unit_bucket(
        &mut self,
        units: Option<&Arc<Units>>,
        flow: (&TenantKey, &Record),
        change: i32,
    ) {
        if let Some(units) = units {
            count(&mut self.live_by_unit_bucket, units, flow, change);
        }
    }
}

/// A flow counts in the bucket of its request: its replies come by the same, or by a leased port, or by the key that
/// [`steer::unit_key`] makes of them. The host's own connections are not the cluster's: they end with the machine, and it
/// may leave while it talks to the manager, whoever of the two was heard first.
fn count(live: &mut [u32], units: &Units, (original, record): (&TenantKey, &Record), change: i32) {
    let of_host = match record.ingress() {
        Ingress::Host => true,
        Ingress::Bond(_) => record.flags & flags::LOCAL != 0,
        Ingress::Interface(_) => false,
    };
    if of_host {
        return;
    }
    if let Some(live) = live.get_mut(units.bucket(&original.0)) {
        *live = live.wrapping_add_signed(change);
    }
}
