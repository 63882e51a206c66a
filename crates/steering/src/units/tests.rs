#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::assign::plan;
use crate::table::{NODE_BUCKETS, Unit};

fn key(port: u16) -> FlowKey {
    FlowKey {
        src: "203.0.113.7".parse().unwrap(),
        dst: "192.0.2.1".parse().unwrap(),
        src_port: port,
        dst_port: 443,
        protocol: 6,
    }
}

fn table(units: &[u16]) -> BucketTable {
    let units: Vec<Unit> = units.iter().map(|id| Unit { id: *id, weight: 1 }).collect();
    BucketTable::new(NODE_BUCKETS, &units).unwrap()
}

fn next(table: &BucketTable, units: &[u16]) -> BucketTable {
    let units: Vec<Unit> = units.iter().map(|id| Unit { id: *id, weight: 1 }).collect();
    plan(table, &units, &[]).unwrap()
}

fn units(node: u16, eras: Eras, in_force: u32) -> Units {
    Units { node, hasher: FlowHasher::new([0x3c; 40]), eras, in_force, leases: Leases::default() }
}

/// Every unit with both tables, the older in force.
fn prepared(node: u16) -> (Units, BucketTable) {
    let old = table(&[1, 2]);
    let new = next(&old, &[1, 2, 3]);
    let mut eras = Eras::new(old.clone());
    eras.install(new.clone());
    (units(node, eras, old.era()), new)
}

/// A flow whose bucket moves from unit 1 to unit 3.
fn moving(units: &Units, new: &BucketTable) -> FlowKey {
    let old = units.table_in_force();
    let moves = |key: &FlowKey| {
        let bucket = units.bucket(key);
        old.owner(bucket) == 1 && new.owner(bucket) == 3
    };
    (1..u16::MAX).map(key).find(moves).unwrap()
}

#[test]
fn a_leased_port_names_the_unit_and_other_ports_the_bucket() {
    let (mut units, _) = prepared(9);
    let outside: IpAddr = "192.0.2.1".parse().unwrap();
    units.leases = Leases::new(&[
        Lease { address: outside, block: 2, node: 2 },
        Lease { address: outside, block: 63, node: 7 },
        Lease { address: "2001:db8::1".parse().unwrap(), block: 0, node: 1 },
    ]);
    for (port, unit) in [(2_047, None), (2_048, Some(2)), (3_071, Some(2)), (3_072, None), (65_535, Some(7))]
    {
        assert_eq!(units.leases.unit(outside, port), unit, "port {port}");
        let reply = FlowKey { dst_port: port, ..key(80) };
        let owner = units.table_in_force().owner(units.bucket(&reply));
        assert_eq!(units.dispatch(&reply).unit, unit.unwrap_or(owner));
    }
    assert_eq!(units.leases.blocks_of(7, outside).collect::<Vec<_>>(), [63]);
    assert_eq!(units.leases.iter().count(), 3);
}

/// Whoever has the port is asked as the first one, whatever the packet was to the unit that asks: its answer is not final by that.
#[test]
fn a_packet_to_anothers_port_starts_anew_there() {
    let (mut units, new) = prepared(9);
    let outside: IpAddr = "192.0.2.1".parse().unwrap();
    units.leases = Leases::new(&[Lease { address: outside, block: 2, node: 2 }]);
    let reply = FlowKey { dst_port: 2_048, ..key(80) };
    for arrival in [Arrival::Outside, Arrival::Punted, Arrival::Unclaimed] {
        let visit = UnitVisit { arrival, ttl: 4, odd_era: new.era() & 1 == 1, dispatcher: 9 };
        let answer = units.ask(&reply, &visit, Digest::Unknown, &mut EraSeen::default());
        let Answer::Send(on) = answer else { panic!("{answer:?}") };
        assert_eq!((on.unit, on.visit.arrival, on.visit.ttl), (2, Arrival::Outside, 3));
    }
}

#[test]
fn both_directions_go_to_one_unit() {
    let (units, _) = prepared(9);
    for port in 1..300 {
        assert_eq!(units.dispatch(&key(port)), units.dispatch(&key(port).reversed()));
    }
}

#[test]
fn the_old_owner_begins_until_it_has_seen_the_new_era() {
    let (old_owner, new) = prepared(1);
    let key = moving(&old_owner, &new);
    let mut seen = EraSeen::default();
    let by_old = old_owner.dispatch(&key).visit;
    assert_eq!(old_owner.ask(&key, &by_old, Digest::Unknown, &mut seen), Answer::Begin);
    // The new owner punts a packet of the new era here: it goes back unclaimed, and from now on nothing begins here.
    let by_new = UnitVisit { arrival: Arrival::Punted, ttl: 5, odd_era: !by_old.odd_era, dispatcher: 9 };
    let Answer::Send(back) = old_owner.ask(&key, &by_new, Digest::Unknown, &mut seen) else { panic!() };
    assert_eq!((back.unit, back.visit.arrival, back.visit.ttl), (3, Arrival::Unclaimed, 4));
    let Answer::Send(on) = old_owner.ask(&key, &by_old, Digest::Unknown, &mut seen) else { panic!() };
    assert_eq!((on.unit, on.visit.arrival, on.visit.odd_era), (3, Arrival::Outside, by_new.odd_era));
}

#[test]
fn the_new_owner_asks_before_it_begins() {
    let (new_owner, new) = prepared(3);
    let key = moving(&new_owner, &new);
    let mut seen = EraSeen::default();
    let outside =
        UnitVisit { arrival: Arrival::Outside, ttl: TTL_START, odd_era: new.era() & 1 == 1, dispatcher: 9 };
    let Answer::Send(punt) = new_owner.ask(&key, &outside, Digest::Unknown, &mut seen) else { panic!() };
    assert_eq!((punt.unit, punt.visit.arrival), (1, Arrival::Punted));
    assert_eq!(new_owner.ask(&key, &outside, Digest::Miss, &mut seen), Answer::Begin);
    let back = UnitVisit { arrival: Arrival::Unclaimed, ..outside };
    assert_eq!(new_owner.ask(&key, &back, Digest::Unknown, &mut seen), Answer::Begin);
    let spent = UnitVisit { ttl: 0, ..outside };
    assert_eq!(new_owner.ask(&key, &spent, Digest::Unknown, &mut seen), Answer::TooOften);
}

/// Found by the model of the packets: two packets of a flow, one on its way back to the owner by the older table, one punted by it.
#[test]
fn a_packet_that_was_punted_by_the_older_table_starts_anew() {
    let one = |id| [(1, id == 1), (2, id == 2), (3, id == 3)];
    let shares = |id: u16| -> Vec<Unit> {
        one(id).iter().map(|(id, owns)| Unit { id: *id, weight: u32::from(*owns) }).collect()
    };
    let first = BucketTable::new(NODE_BUCKETS, &shares(1)).unwrap();
    let old = plan(&first, &shares(2), &[]).unwrap();
    let new = plan(&old, &shares(3), &[]).unwrap();
    let mut eras = Eras::new(old.clone());
    eras.install(new.clone());
    let earliest = units(1, eras, new.era());
    for arrival in [Arrival::Punted, Arrival::Unclaimed] {
        let by_old = UnitVisit { arrival, ttl: 9, odd_era: old.era() & 1 == 1, dispatcher: 9 };
        let answer = earliest.ask(&key(7), &by_old, Digest::Unknown, &mut EraSeen::default());
        let Answer::Send(on) = answer else { panic!("{answer:?}") };
        // Not unclaimed: unit 2 is the owner by the older table, was not asked by the newer, and may begin the flow.
        assert_eq!((on.unit, on.visit.arrival, on.visit.odd_era), (3, Arrival::Outside, !by_old.odd_era));
    }
}

#[test]
fn nothing_begins_by_a_table_that_is_not_held() {
    let old = table(&[1]);
    let alone = units(1, Eras::new(old.clone()), old.era());
    let mut seen = EraSeen::default();
    let newer =
        UnitVisit { arrival: Arrival::Outside, ttl: TTL_START, odd_era: old.era() & 1 == 0, dispatcher: 9 };
    assert_eq!(alone.ask(&key(1), &newer, Digest::Unknown, &mut seen), Answer::EraUnknown);
}

#[test]
fn what_comes_to_a_port_of_ones_own_stays() {
    let (mut units, _) = prepared(2);
    let reply = key(80);
    units.leases = Leases::new(&[Lease { address: reply.dst, block: 0, node: 2 }]);
    let visit = units.dispatch(&reply).visit;
    assert_eq!(units.ask(&reply, &visit, Digest::Unknown, &mut EraSeen::default()), Answer::Begin);
}

#[test]
fn the_key_is_not_printed() {
    let (units, _) = prepared(1);
    assert!(!format!("{units:?}").contains("60"), "{units:?}");
}
