//! Datagrams of strangers and of broken networks: counted, never a panic, no state held, and the bond goes on.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::net::SocketAddr;

use fastrand::Rng;
use packet::drop_reason::DropReason;
use sim::cable::Datagram;
use sim::inner::udp::UdpSpec;
use sim::link::Shape;
use sim::scenario::{pair, star, to_hub};
use sim::site::LISTEN_PORT;
use sim::world::World;

/// A joined pair and the datagrams that arrived so far, of every kind.
fn prepared(seed: u64) -> World {
    let mut world = pair(seed, (2, 3), &[Shape::new(50.0, 5.0), Shape::new(50.0, 7.0)]);
    world.capture(true);
    world.start();
    world.run_ms(300);
    let start = world.now;
    for (from, to) in [(0, 1), (1, 0), (0, 1), (1, 0)] {
        world.udp(from, to, UdpSpec::mbps(1_400, 10.0, start, start.plus_ms(200)));
    }
    world.run_ms(1_000);
    world.capture(false);
    world.check().unwrap();
    world
}

fn drops(world: &World, site: usize) -> u64 {
    world.sites[site].all_drops().iter().map(|drop| drop.1).sum()
}

/// A datagram was counted once. Beside it the answer to an earlier, stale Initiation may have come: a challenge for a fresh one, which
/// nobody waits for here.
fn counted_once(world: &World, site: usize, before: (u64, u64), bytes: &[u8]) {
    let unknown = world.sites[site].drops(DropReason::UnknownIndex) - before.1;
    let counted = drops(world, site) - before.0;
    assert!(counted == 1 || counted == 2 && unknown > 0, "counted {counted} times: {bytes:?}");
}

/// Drops of a site: all, and those of an index that it does not know.
fn drops_before(world: &World, site: usize) -> (u64, u64) {
    (drops(world, site), world.sites[site].drops(DropReason::UnknownIndex))
}

/// Where a captured datagram's interface is.
fn wan_of(world: &World, site: usize, to: SocketAddr) -> u16 {
    world.sites[site].snapshot.wans.iter().find(|wan| wan.addresses.contains(&to.ip())).unwrap().id
}

/// Flips one to three bits.
fn flip_bits(random: &mut Rng, bytes: &mut [u8]) {
    for _ in 0..=random.u64(..3) {
        let at = random.usize(..bytes.len());
        bytes[at] ^= 1 << random.u64(..8);
    }
}

fn inject(world: &mut World, site: usize, datagram: Datagram) {
    let wan = wan_of(world, site, datagram.to);
    world.receive(site, wan, datagram);
    // At once, so that each is judged alone.
    world.run_until(world.now.plus_us(20));
}

/// Both sites still carry everything and hold what they held.
fn unharmed(world: &mut World, held: [(usize, usize, usize); 2]) {
    assert_eq!([0, 1].map(|site| world.sites[site].held()), held, "strangers made a site hold something");
    let start = world.now;
    let spec = UdpSpec::mbps(1_000, 4.0, start, start.plus_ms(300));
    let flows = [world.udp(0, 1, spec), world.udp(1, 0, spec)];
    world.run_ms(800);
    world.check().unwrap();
    for flow in flows {
        assert_eq!(world.udp_missing(flow), Vec::<u64>::new());
    }
    assert_eq!(world.sites[0].paths_up(0), 2);
}

#[test]
fn replays_are_refused_one_by_one() {
    let mut world = prepared(sim::seed(21));
    let held = [0, 1].map(|site| world.sites[site].held());
    let captured = std::mem::take(&mut world.captured);
    assert!(captured.len() > 400);
    for kind in [1, 2, 4] {
        assert!(
            captured.iter().any(|(_, datagram)| datagram.bytes[0] & 15 == kind),
            "kind {kind} was captured"
        );
    }
    for (site, datagram) in captured {
        let before = drops_before(&world, site);
        inject(&mut world, site, datagram.clone());
        counted_once(&world, site, before, &datagram.bytes[..16]);
    }
    let replayed = world.sites[0].drops(DropReason::Replayed) + world.sites[1].drops(DropReason::Replayed);
    assert!(replayed > 300, "{replayed}");
    unharmed(&mut world, held);
}

#[test]
fn truncated_and_flipped_datagrams_of_every_kind() {
    let mut world = prepared(sim::seed(22));
    let held = [0, 1].map(|site| world.sites[site].held());
    let mut random = Rng::with_seed(sim::seed(22));
    let captured = std::mem::take(&mut world.captured);
    for kind in [1, 2, 4] {
        let of_kind: Vec<_> =
            captured.iter().filter(|(_, datagram)| datagram.bytes[0] & 15 == kind).collect();
        for _ in 0..600 {
            let (site, mut datagram) = of_kind[random.usize(..of_kind.len())].clone();
            let length = datagram.bytes.len() as u64;
            match random.u64(..3) {
                0 => datagram.bytes.truncate(1 + random.u64(..length - 1) as usize),
                1 => {
                    let original = datagram.bytes.clone();
                    flip_bits(&mut random, &mut datagram.bytes);
                    if datagram.bytes == original {
                        continue;
                    }
                }
                _ => {
                    let at = random.u64(..16) as usize;
                    datagram.bytes[at] ^= 1 << random.u64(..8);
                }
            }
            let before = drops_before(&world, site);
            inject(&mut world, site, datagram.clone());
            counted_once(&world, site, before, &datagram.bytes);
        }
    }
    unharmed(&mut world, held);
}

#[test]
fn garbage_from_strangers_of_every_kind_and_length() {
    let mut world = prepared(sim::seed(23));
    let held = [0, 1].map(|site| world.sites[site].held());
    let mut random = Rng::with_seed(sim::seed(23));
    let known =
        world.captured.iter().find(|(site, d)| *site == 1 && d.bytes[0] & 15 == 4).unwrap().1.bytes.clone();
    for round in 0..4_000u64 {
        let site = (round % 2) as usize;
        let to = SocketAddr::new(world.sites[site].snapshot.wans[0].addresses[0], LISTEN_PORT);
        let from = SocketAddr::from((
            [198, 51, random.u64(..4) as u8, random.u64(..250) as u8],
            1 + random.u64(..60_000) as u16,
        ));
        let mut bytes: Vec<u8> = (0..random.u64(..1_500)).map(|_| random.u8(..)).collect();
        if let Some(first) = bytes.first_mut().filter(|_| round % 5 != 0) {
            *first = 0x10 | random.u64(..8) as u8;
        }
        if round % 3 == 0 && bytes.len() > 16 {
            // Somebody who saw the header of a real datagram.
            bytes[1..16].copy_from_slice(&known[1..16]);
        }
        let before = drops(&world, site);
        inject(&mut world, site, Datagram { from, to, bytes });
        assert!(drops(&world, site) <= before + 1);
    }
    unharmed(&mut world, held);
}

#[test]
fn a_flood_of_initiations_does_not_stop_a_restarted_peer() {
    let mut world = prepared(sim::seed(24));
    let captured = std::mem::take(&mut world.captured);
    let initiation = captured.iter().find(|(_, datagram)| datagram.bytes[0] & 15 == 1).unwrap().1.clone();
    world.restart(0, true);
    let mut random = Rng::with_seed(24);
    let mut joined = None;
    for round in 0..6_000u64 {
        // 5,000 a second with a right mac1 (a replay) from changing sources.
        let from =
            SocketAddr::from(([198, 51, 100, random.u64(..250) as u8], 1_000 + random.u64(..50_000) as u16));
        world.receive(1, 0, Datagram { from, ..initiation.clone() });
        world.run_until(world.now.plus_us(200));
        if joined.is_none() && world.sites[0].paths_up(0) == 2 {
            joined = Some(round);
        }
    }
    let cookies = world.sites[1].drops(DropReason::HandshakeCookie);
    assert!(
        cookies > 100,
        "under load strangers are asked to prove their address: {:?}",
        world.sites[1].all_drops()
    );
    assert!(joined.is_some(), "the peer joined during the flood");
    world.run_ms(2_000);
    world.check().unwrap();
    assert_eq!(world.sites[1].held().0, 1);
}

#[test]
fn two_sites_with_one_key_disturb_only_each_other() {
    // A cloned machine: site 2 has site 1's key. The hub knows one peer.
    let mut world = star(sim::seed(25), 2, 3, 2, &[Shape::new(20.0, 10.0)]);
    let key = world.sites[1].private_key();
    world.sites[2].set_private_key(key);
    world.sites[0].snapshot.peers.retain(|peer| peer.name != "site2");
    world.restart(2, true);
    world.start();
    world.run_ms(2_000);
    let start = world.now;
    // Site 3 has a key of its own and must not notice.
    let other = world.udp(3, 0, UdpSpec::mbps(800, 2.0, start, start.plus_ms(8_000)));
    let twin = world.udp(1, 0, UdpSpec::mbps(800, 1.0, start, start.plus_ms(8_000)));
    world.udp(2, 0, UdpSpec::mbps(800, 1.0, start, start.plus_ms(8_000)));
    world.run_ms(9_000);
    assert_eq!(world.udp_missing(other), Vec::<u64>::new());
    assert_eq!(world.totals.misdelivered + world.totals.damaged, 0);
    let (bonds, paths, sessions) = world.sites[0].held();
    // Two and eight that may be under way for each.
    assert!(bonds == 2 && paths <= 6 && sessions <= 20, "{:?}", world.sites[0].held());
    let _ = twin;
    // The clone leaves: the right one works within seconds.
    world.stop(2);
    world.run_ms(4_000);
    let start = world.now;
    let flow = world.udp(1, 0, UdpSpec::mbps(800, 1.0, start, start.plus_ms(500)));
    world.run_ms(1_500);
    assert_eq!(world.udp_missing(flow), Vec::<u64>::new());
}

#[test]
fn a_wrong_key_is_refused_and_nothing_is_kept() {
    let mut world = to_hub(sim::seed(26), (2, 2), &[Shape::new(20.0, 10.0)]);
    let wrong = world.sites[1].private_key().map(|byte| byte ^ 0x55);
    world.sites[0].set_private_key(wrong);
    world.restart(0, true);
    world.start();
    world.run_ms(5_000);
    assert_eq!(world.sites[0].paths_up(0), 0);
    assert_eq!(world.sites[1].held(), (1, 0, 0));
    assert!(world.sites[1].drops(DropReason::HandshakeUnknownPeer) >= 5, "{:?}", world.sites[1].all_drops());
}

#[test]
fn inner_sources_that_are_not_the_peers_are_dropped() {
    let mut world = to_hub(sim::seed(27), (1, 1), &[Shape::new(20.0, 10.0)]);
    world.sites[1].snapshot.peers[0].allowed_ips = vec!["10.77.0.0/16".parse().unwrap()];
    world.start();
    world.run_ms(500);
    let start = world.now;
    let flow = world.udp(0, 1, UdpSpec::mbps(800, 1.0, start, start.plus_ms(500)));
    world.run_ms(1_000);
    assert_eq!(world.udp_stats(flow).received, 0);
    assert_eq!(world.sites[1].drops(DropReason::SourceNotAllowed), world.udp_stats(flow).sent);
}
