//! Copies of a core's flows for another machine, which takes them over when this one dies: what is new, what changed, what has ended.
//!
//! The flow table is gone through all the time, once in [`PASS_NS`], a little at each call. A flow is written when it is first met and when
//! its state has changed since; what changes with every packet is not worth a record, and whoever takes the flow over does without it. What
//! nobody has answered yet, and what the host began, is not copied: the one may be a flood's, the other ends with the machine.
//! Costs one byte for each place of the table, only while there is somebody who keeps copies.

use packet::attachment::Ingress;

use super::Services;
use super::flows::{TenantKey, is_embryonic};
use crate::flow::{FlowId, Record, Removed, flags};
use crate::handover::wire::Change;
use crate::handover::{Entry, Side};
use crate::tcp::State;

/// The table is gone through once in so many nanoseconds, unless that is more than may be written.
pub const PASS_NS: u64 = 500_000_000;
/// A call makes up for at most so much time.
const STEP_NS_MAX: u64 = 50_000_000;
/// Places that are looked at in one step.
const STEP_PLACES: usize = 64;
/// Flows that have ended and have not been told, at most.
const ENDED_MAX: usize = 65_536;

/// News of flows that have been told.
#[derive(Debug, Default)]
pub(super) struct Copies {
    /// By kind and place of a flow: 0 it was not told, else the state that was, plus one.
    told: [Vec<u8>; 4],
    /// Where the next step begins.
    cursor: u64,
    /// Places that should have been looked at by now.
    debt: f64,
    last_ns: u64,
    ended: Vec<TenantKey>,
    /// More ended than there was room for: who keeps copies begins anew.
    lost: bool,
}

/// Result of [`Services::copies`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Copied {
    /// Records written.
    pub records: usize,
    /// All of the table was gone through since the last time that this was said.
    pub pass_ended: bool,
    /// Ends of flows were lost: the copies have to be begun anew, with [`Services::begin_copies`].
    pub lost: bool,
}

impl Copies {
    fn told(&mut self, id: FlowId) -> &mut u8 {
        let (kind, place) = id.place();
        // Two bits say the kind.
        let told = &mut self.told[kind & 3];
        if told.len() <= place {
            told.resize((place + 1).next_multiple_of(1_024), 0);
        }
        &mut told[place]
    }

    /// A flow has ended.
    pub fn note_end(&mut self, removed: &Removed) {
        if std::mem::take(self.told(removed.id)) == 0 {
            return;
        }
        if self.ended.len() < ENDED_MAX {
            self.ended.push((removed.original, removed.tenants[0]));
        } else {
            self.lost = true;
        }
    }
}

/// State of a flow that is worth a record; `None`: it is not copied (any more).
fn worth(record: &Record) -> Option<u8> {
    let of_host = match record.ingress() {
        Ingress::Host => true,
        Ingress::Bond(_) => record.flags & flags::LOCAL != 0,
        Ingress::Interface(_) => false,
    };
    let state = State::of(record);
    (!of_host && !is_embryonic(record) && !state.is_over()).then_some(state as u8 + 1)
}

impl Services {
    /// Somebody keeps copies of this core's flows from now on, and has none yet; or nobody does any more.
    pub fn begin_copies(&mut self, wanted: bool) {
        self.copies = wanted.then(Box::default);
    }

    /// Writes what is to be told now into `out`: at most some `most` records.
    pub fn copies(&mut self, now_ns: u64, most: usize, out: &mut Vec<u8>) -> Copied {
        let Some(mut copies) = self.copies.take() else { return Copied::default() };
        let mut done = Copied { lost: copies.lost, ..Copied::default() };
        while done.records < most
            && let Some((key, tenant)) = copies.ended.pop()
        {
            done.records += usize::from(self.write_end(key, tenant, out));
        }
        let elapsed_ns = now_ns.saturating_sub(copies.last_ns).min(STEP_NS_MAX);
        copies.last_ns = now_ns;
        let places = self.flows.table.pass_entries() as f64 + STEP_PLACES as f64;
        copies.debt = (copies.debt + places * elapsed_ns as f64 / PASS_NS as f64).min(places);
        while copies.debt >= 1.0 && done.records < most && !done.pass_ended {
            let (ids, next) = self.flows.table.scan(copies.cursor, STEP_PLACES);
            copies.debt -= STEP_PLACES as f64;
            for id in ids {
                done.records += self.copy(now_ns, id, &mut copies, out);
            }
            done.pass_ended = next.is_none();
            copies.cursor = next.unwrap_or(0);
        }
        self.copies = Some(copies);
        done
    }

    /// Writes one flow, if there is news of it; how many records that made.
    fn copy(&mut self, now_ns: u64, id: FlowId, copies: &mut Copies, out: &mut Vec<u8>) -> usize {
        let worth = worth(self.flows.table.record(id)).unwrap_or(0);
        let told = copies.told(id);
        if *told == worth {
            return 0;
        }
        *told = worth;
        if worth == 0 {
            let (original, _) = self.flows.table.keys(id);
            return usize::from(self.write_end(original.0, original.1, out));
        }
        // An entry whose names are too long for a record does not exist: the configuration refuses them.
        let entry = self.flow_entry(now_ns, id).map(|entry| Entry::Flow(Box::new(entry)));
        usize::from(entry.is_some_and(|entry| entry.encode(out).is_ok()))
    }

    fn write_end(&self, key: packet::FlowKey, tenant: u16, out: &mut Vec<u8>) -> bool {
        let tenant = super::export::tenant_name(&self.routing.policy, tenant);
        tenant.is_some_and(|tenant| Change::encode_end(&Side { key, tenant }, out).is_ok())
    }
}
