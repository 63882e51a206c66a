//! Buckets change cores while flows are alive (rows C7, C9).

use packet::flow::FlowKey;
use steering::assign::plan;
use steering::cores::CoreSet;
use steering::table::Unit;

use super::world::*;
use crate::spec::UDP;

fn flows(world: &mut World, count: u16) -> Vec<(FlowKey, FlowKey)> {
    (0..count)
        .map(|number| {
            let inside = key(UDP, &format!("10.0.0.9:{}", 3000 + number), "198.51.100.7:53");
            let outside = world.one(LAN, &udp_of(&inside, b"x")).key();
            world.one(WAN, &udp_of(&outside.reversed(), b"y"));
            (inside, outside)
        })
        .collect()
}

fn all_still_work(world: &mut World, flows: &[(FlowKey, FlowKey)]) {
    for (inside, outside) in flows {
        assert_eq!(world.one(LAN, &udp_of(inside, b"x")).key(), *outside);
        assert_eq!(world.one(WAN, &udp_of(&outside.reversed(), b"y")).key(), inside.reversed());
    }
}

fn weights(weights: &[u32]) -> Vec<Unit> {
    (0..).zip(weights).map(|(id, weight)| Unit { id, weight: *weight }).collect()
}

/// A core is drained: its flows end on it, new ones go elsewhere, none is there twice.
#[test]
fn a_drained_core_keeps_its_flows() {
    let mut world = masquerade(3);
    let old = flows(&mut world, 300);
    let on_core_1 = world.cores[1].flows().len();
    assert!(on_core_1 > 50);
    let table = plan(&world.ownership.table, &weights(&[1, 0, 1]), &[]).unwrap();
    let next = world.ownership.with_table(table, world.ownership.alive);
    world.set_ownership(next);
    all_still_work(&mut world, &old);
    assert_eq!(world.cores[1].flows().len(), on_core_1, "old flows stay where they are");
    let opened = world.cores[1].counters.flows_opened;
    let new: Vec<_> = (0..200u16)
        .map(|number| {
            let inside = key(UDP, &format!("10.0.0.10:{}", 3000 + number), "198.51.100.8:53");
            let outside = world.one(LAN, &udp_of(&inside, b"x")).key();
            (inside, outside)
        })
        .collect();
    assert_eq!(world.cores[1].counters.flows_opened, opened, "nothing new on the drained core");
    all_still_work(&mut world, &new);
    all_still_work(&mut world, &old);
    assert_eq!(world.flows(), 500);
    // Once its flows are over no packet visits it any more.
    world.wait(400);
    assert_eq!(world.cores[1].live().iter().sum::<u32>(), 0);
}

/// Buckets go to and fro several times; every flow stays whole.
#[test]
fn buckets_move_again_and_again() {
    let mut world = masquerade(4);
    let mut all = flows(&mut world, 150);
    for (round, shares) in [[1, 1, 1, 3], [3, 1, 1, 0], [1, 0, 2, 1]].iter().enumerate() {
        let table = plan(&world.ownership.table, &weights(shares), &[]).unwrap();
        let next = world.ownership.with_table(table, world.ownership.alive);
        world.set_ownership(next);
        all_still_work(&mut world, &all);
        for number in 0..60u16 {
            let inside = key(UDP, &format!("10.0.0.{}:{}", 20 + round, 3000 + number), "198.51.100.9:53");
            let outside = world.one(LAN, &udp_of(&inside, b"x")).key();
            all.push((inside, outside));
        }
    }
    let outsides: std::collections::BTreeSet<_> =
        all.iter().map(|(_, outside)| format!("{outside}")).collect();
    assert_eq!(outsides.len(), all.len(), "no outside endpoint was given twice");
    all_still_work(&mut world, &all);
    assert_eq!(world.flows(), all.len());
}

/// A core dies: its flows are gone, the others' are not, and new flows begin on the others.
#[test]
fn a_dead_core_takes_only_its_own_flows() {
    let mut world = masquerade(3);
    let old = flows(&mut world, 300);
    let dead = 2usize;
    let mut table = plan(&world.ownership.table, &weights(&[1, 1]), &[]).unwrap();
    table.forget(dead as u16);
    let next = world.ownership.with_table(table, CoreSet::first(2));
    let lost: Vec<bool> = old
        .iter()
        .map(|(inside, _)| {
            usize::from(world.ownership.table.owner(world.ownership.bucket(inside, 0))) == dead
        })
        .collect();
    world.set_ownership(next);
    let mut kept = 0;
    for ((inside, outside), lost) in old.iter().zip(lost) {
        let again = world.one(LAN, &udp_of(inside, b"x")).key();
        if !lost {
            assert_eq!(again, *outside);
            kept += 1;
        }
    }
    assert!(kept > 150);
    assert_eq!(world.cores[dead].counters.handed_in, 0);
    // It works again, before it is trusted: what it knew is forgotten, so that it cannot stand against what others began.
    let meanwhile: Vec<_> =
        old.iter().map(|(inside, _)| (*inside, world.one(LAN, &udp_of(inside, b"x")).key())).collect();
    let lost = world.cores[dead].flows().len();
    assert!(lost > 50);
    world.now_ns += SECOND_NS / 10;
    world.cores[dead].tick(world.now_ns);
    assert_eq!((world.cores[dead].flows().len(), world.cores[dead].ports_held()), (0, 0));
    let table = plan(&world.ownership.table, &weights(&[1, 1, 1]), &[]).unwrap();
    let next = world.ownership.with_table(table, CoreSet::first(3));
    world.set_ownership(next);
    all_still_work(&mut world, &meanwhile);
}

/// Protocols without ports behind an outside address: the answer has nothing but its remote in common with the question,
/// whichever core reads it, also when buckets move under live flows.
#[test]
fn answers_without_ports_find_their_flow() {
    use packet::ip::PROTOCOL_GRE as GRE;
    for cores in 1..=4 {
        let mut world = masquerade(cores);
        let inside = |number: u8| format!("10.0.0.{}", 2 + number % 90).parse().unwrap();
        let remote = |number: u8| format!("198.51.100.{}", 1 + number).parse().unwrap();
        let talk = |world: &mut World, number: u8| {
            let left = world.one(LAN, &ip(inside(number), remote(number), GRE, b"question")).key();
            assert_eq!((left.src, left.dst), ("203.0.113.1".parse().unwrap(), remote(number)));
            let back = world.one(WAN, &ip(remote(number), left.src, GRE, b"answer")).key();
            assert_eq!((back.src, back.dst), (remote(number), inside(number)));
        };
        (0..200).for_each(|number| talk(&mut world, number));
        if cores > 1 {
            let mut shares = vec![1; usize::from(cores)];
            shares[0] = 0;
            let table = plan(&world.ownership.table, &weights(&shares), &[]).unwrap();
            let next = world.ownership.with_table(table, world.ownership.alive);
            world.set_ownership(next);
            (0..200).for_each(|number| talk(&mut world, number));
        }
        assert_eq!(world.flows(), 200);
        // Another client to the same remote could not be told from the first.
        let other = ip("10.0.0.200".parse().unwrap(), remote(7), GRE, b"question");
        world.dropped(LAN, &other, packet::DropReason::NatUnsupported);
        world.wait(800);
        let live = world.cores.iter().map(|core| core.live().iter().sum::<u32>()).sum::<u32>();
        assert_eq!((world.flows(), live), (0, 0));
    }
}
