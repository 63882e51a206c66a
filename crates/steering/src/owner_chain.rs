//! Owner chain of a bucket that moved: what a unit does with a packet that may belong to an earlier owner.
//!
//! A bucket has one owner and a chain of earlier owners, newest first, whose flows stay where they began. A unit that
//! reads a packet sends it to the owner. The owner keeps its own flows; what it does not know it *punts* to the newest
//! earlier owner, who keeps it or punts it to the next. At the end of the chain the packet goes back to the owner as
//! *unclaimed*, and only then the owner begins a flow or applies policy, so that no flow is ever begun twice.
//!
//! ```text
//!   any unit ──▶ owner ── punt ──▶ chain[0] ── punt ──▶ chain[1] …
//!                  ▲                                       │
//!                  └────────────── unclaimed ──────────────┘
//! ```
//!
//! A [`Digest`] shortens the way: an owner that gives a bucket away sends the fingerprints of the live flows in it, its own
//! and those of the digests that it was given itself. A fingerprint that is not in it belongs to no earlier owner.
//!
//! Units may hold different eras of the table for a while, so a packet carries the number of times that it may still be
//! sent on; what reaches zero is dropped, and counted by the caller.
//!
//! [`decide`] serves units that hold a table of their own and digests. Cores of one node share one table and send no digests;
//! their list of cores to ask is [`crate::ownership::OwnerChain`]. It is pure: the caller looks up flow and digest.

pub use packet::attachment::Arrival;

use crate::table::{BucketTable, CHAIN_MAX};

/// Times that a packet may be sent from unit to unit, from its first reader on: to the owner, along the longest chain and back
/// to the owner, and all of it once more if the next era is met on the way.
pub const TTL_START: u8 = 2 * (CHAIN_MAX as u8 + 2);

/// Fingerprints of the flows that earlier owners of a bucket had when it moved, and what one of them says of a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Digest {
    /// It has not come yet, or this kind of unit sends none: every earlier owner is asked.
    Unknown,
    /// The packet's fingerprint is in it; by chance perhaps, so a hit proves nothing.
    Hit,
    /// It is not: no earlier owner has the flow.
    Miss,
}

/// A packet as one unit sees it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sighting {
    /// The packet's bucket in the unit's table.
    pub bucket: usize,
    /// How it came here.
    pub arrival: Arrival,
    /// The unit has the packet's flow.
    pub has_flow: bool,
    /// Answer of the unit's digest of its predecessors in this bucket.
    pub digest: Digest,
    /// Times that the packet may still be sent on.
    pub ttl: u8,
}

/// Decision of the unit for the packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Decision {
    /// Its own flow goes on.
    Keep,
    /// No unit has the flow: this one begins it, if policy lets it.
    Begin,
    /// Another unit is asked: `to` sees it with this [`Arrival`] and `ttl`.
    Send {
        /// Unit that gets the packet.
        to: u16,
        /// How it arrives there.
        arrival: Arrival,
        /// Times that it may be sent on from there.
        ttl: u8,
    },
    /// It was sent on too often; the caller drops and counts it.
    Drop,
}

/// Decides for unit `unit`, which holds `table`. Dead units must not be in it ([`BucketTable::forget`]).
#[must_use]
pub fn decide(unit: u16, table: &BucketTable, seen: &Sighting) -> Decision {
    if seen.has_flow {
        return Decision::Keep;
    }
    let (owner, chain) = (table.owner(seen.bucket), table.chain(seen.bucket));
    let (to, arrival) = if unit == owner {
        match (chain.first(), seen.digest) {
            _ if seen.arrival == Arrival::Unclaimed => return Decision::Begin,
            (None, _) | (_, Digest::Miss) => return Decision::Begin,
            (Some(&newest), _) => (newest, Arrival::Punted),
        }
    } else {
        let place = chain.iter().position(|&earlier| earlier == unit);
        let next = place.and_then(|place| chain.get(place + 1));
        match (seen.arrival, place, next) {
            // A sender with an older table, or a unit that only reads: the owner has to look first.
            (Arrival::Outside, ..) | (_, None, _) => (owner, Arrival::Outside),
            (Arrival::Punted, Some(_), Some(&next)) if seen.digest != Digest::Miss => (next, Arrival::Punted),
            (Arrival::Punted | Arrival::Unclaimed, Some(_), _) => (owner, Arrival::Unclaimed),
        }
    };
    match seen.ttl.checked_sub(1) {
        Some(ttl) => Decision::Send { to, arrival, ttl },
        None => Decision::Drop,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use proptest::prelude::*;

    use super::*;
    use crate::assign::plan;
    use crate::table::Unit;

    const SENT: u8 = TTL_START - 1;

    fn send(to: u16, arrival: Arrival) -> Decision {
        Decision::Send { to, arrival, ttl: SENT }
    }

    /// One bucket that unit 3 owns, after 2, after 1 (or fewer of them).
    fn table(owners: &[u16]) -> BucketTable {
        let unit = |id| Unit { id, weight: 1 };
        let mut owners = owners.iter();
        let mut table = BucketTable::new(1, &[unit(*owners.next().unwrap())]).unwrap();
        for owner in owners {
            // Units that are away are forgotten: the others stay, without weight.
            let others = (0..8).filter(|id| id != owner).map(|id| Unit { id, weight: 0 });
            let units: Vec<_> = others.chain([unit(*owner)]).collect();
            table = plan(&table, &units, &[]).unwrap();
        }
        table
    }

    fn seen(arrival: Arrival, digest: Digest) -> Sighting {
        Sighting { bucket: 0, arrival, has_flow: false, digest, ttl: TTL_START }
    }

    #[test]
    fn the_table_of_all_cases() {
        use Arrival::{Outside, Punted, Unclaimed};
        use Digest::{Hit, Miss, Unknown};
        let moved = table(&[1, 2, 3]);
        assert_eq!((moved.owner(0), moved.chain(0)), (3, &[2, 1][..]));
        let never_moved = table(&[3]);
        // unit, table, arrival, digest → decision, all without the flow
        let rows = [
            // The owner: an unmoved bucket's flow is new; else whoever may have it is asked first.
            (3, &never_moved, Outside, Unknown, Decision::Begin),
            (3, &moved, Outside, Unknown, send(2, Punted)),
            (3, &moved, Outside, Hit, send(2, Punted)),
            (3, &moved, Outside, Miss, Decision::Begin),
            // Nobody has it, although the digest says so: a fingerprint hit by chance, or a flow that has ended.
            (3, &moved, Unclaimed, Hit, Decision::Begin),
            (3, &moved, Unclaimed, Unknown, Decision::Begin),
            // Along the chain, as far as the digests say that it may be there.
            (2, &moved, Punted, Unknown, send(1, Punted)),
            (2, &moved, Punted, Hit, send(1, Punted)),
            (2, &moved, Punted, Miss, send(3, Unclaimed)),
            (1, &moved, Punted, Unknown, send(3, Unclaimed)),
            (1, &moved, Punted, Hit, send(3, Unclaimed)),
            // The earlier owner reads a packet of a sender with an old table: it begins nothing, the owner does.
            (2, &moved, Outside, Unknown, send(3, Outside)),
            (1, &moved, Outside, Miss, send(3, Outside)),
            // Units that have nothing to do with the bucket, any more or yet.
            (9, &moved, Outside, Unknown, send(3, Outside)),
            (9, &moved, Punted, Hit, send(3, Outside)),
            (9, &moved, Unclaimed, Unknown, send(3, Outside)),
            // The table changed while the packet was on its way back.
            (2, &moved, Unclaimed, Unknown, send(3, Unclaimed)),
        ];
        for (unit, table, arrival, digest, wanted) in rows {
            let packet = seen(arrival, digest);
            assert_eq!(decide(unit, table, &packet), wanted, "unit {unit} {packet:?}");
            let own = Sighting { has_flow: true, ttl: 0, ..packet };
            assert_eq!(decide(unit, table, &own), Decision::Keep, "unit {unit} has the flow of {packet:?}");
            let tired = Sighting { ttl: 0, ..packet };
            let expected = if let Decision::Send { .. } = wanted { Decision::Drop } else { wanted };
            assert_eq!(decide(unit, table, &tired), expected, "unit {unit} {tired:?}");
        }
    }

    /// How a packet ends that `reader` reads: who keeps or begins, and how often it was sent; `None`: dropped.
    fn walk<'a>(
        reader: u16,
        table_of: impl Fn(u16) -> &'a BucketTable,
        holder: Option<u16>,
        digest: impl Fn(u16) -> Digest,
    ) -> Option<(u16, Decision, u8)> {
        let mut packet = seen(Arrival::Outside, Digest::Unknown);
        let mut unit = reader;
        for sent in 0..=TTL_START {
            let has_flow = holder == Some(unit);
            let sighting = Sighting { has_flow, digest: digest(unit), ..packet };
            match decide(unit, table_of(unit), &sighting) {
                Decision::Send { to, arrival, ttl } => {
                    (unit, packet) = (to, Sighting { arrival, ttl, ..packet });
                }
                Decision::Drop => return None,
                end => return Some((unit, end, sent)),
            }
        }
        panic!("sent more often than its time to live allows")
    }

    /// Owners of one bucket in turn, none twice in a row.
    fn history() -> impl Strategy<Value = Vec<u16>> {
        proptest::collection::vec(0..6u16, 1..=4).prop_map(|mut owners| {
            owners.dedup();
            owners
        })
    }

    proptest! {
        /// With one era everywhere: whoever reads the packet, the unit that has the flow gets it; if none has, the owner
        /// begins it and nobody else does. A hit by chance changes the way, not the end.
        #[test]
        fn a_flow_is_found_wherever_it_lives_and_begun_by_the_owner_alone(
            owners in history(), reader in 0..8u16, lives in any::<prop::sample::Index>(), exists: bool, hits in any::<[bool; 8]>(),
        ) {
            let table = table(&owners);
            let chain = table.chain(0);
            let mut places = vec![table.owner(0)];
            places.extend_from_slice(chain);
            let holder = exists.then(|| places[lives.index(places.len())]);
            // A digest tells the truth about who comes later in the chain, or hits by chance.
            let digest = |unit: u16| {
                let at = places.iter().position(|&place| place == unit);
                let later = at.map_or(&[][..], |at| &places[at + 1..]);
                match holder {
                    Some(holder) if later.contains(&holder) => Digest::Hit,
                    _ if hits[usize::from(unit)] => Digest::Hit,
                    _ => Digest::Miss,
                }
            };
            for digests in [true, false] {
                let end = walk(reader, |_| &table, holder, |unit| if digests { digest(unit) } else { Digest::Unknown });
                let (unit, decision, sent) = end.expect("one era: no packet is lost");
                match holder {
                    Some(holder) => prop_assert_eq!((unit, decision), (holder, Decision::Keep)),
                    None => prop_assert_eq!((unit, decision), (table.owner(0), Decision::Begin)),
                }
                prop_assert!(usize::from(sent) <= chain.len() + 2, "{sent} steps over {chain:?}");
            }
        }

        /// Half of the units have not heard of the last move: a flow begins nowhere but at a unit that is the owner by its own
        /// table, a unit that has the flow and is asked keeps it, and no packet is sent for ever.
        #[test]
        fn units_of_two_eras_begin_no_flow_as_earlier_owners(
            owners in history().prop_filter("a move", |owners| owners.len() > 1),
            reader in 0..8u16, holder in prop::option::of(0..8u16), newer in any::<[bool; 8]>(),
        ) {
            let (new, old) = (table(&owners), table(&owners[..owners.len() - 1]));
            let table_of = |unit: u16| if newer[usize::from(unit)] { &new } else { &old };
            match walk(reader, table_of, holder, |_| Digest::Unknown) {
                Some((unit, Decision::Keep, _)) => prop_assert_eq!(Some(unit), holder),
                Some((unit, Decision::Begin, _)) => prop_assert_eq!(table_of(unit).owner(0), unit),
                Some((_, other, _)) => prop_assert!(false, "not an end: {other:?}"),
                None => {}
            }
        }
    }
}
