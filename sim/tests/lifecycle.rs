//! Life cycle of a bond: clocks, rekeys, restarts, roaming, dead and returning paths, reloads.
#![allow(clippy::unwrap_used, reason = "tests")]

use sim::inner::tcp::TcpSpec;
use sim::inner::udp::UdpSpec;
use sim::link::Shape;
use sim::scenario::{WALL_CLOCK_NS, pair, to_hub};
use sim::world::{World, wan_address};
use tunnel::path::PathState;
use tunnel::time::Time;

fn two() -> Vec<Shape> {
    vec![Shape::new(50.0, 10.0), Shape::new(50.0, 15.0)]
}

fn demo() -> Vec<Shape> {
    vec![Shape::new(100.0, 10.0), Shape::new(50.0, 20.0), Shape::new(20.0, 40.0).loss(0.001)]
}

fn joined(world: &mut World, paths: usize, limit_ms: u64) -> u64 {
    let began = world.now;
    let up =
        world.run_until_true(limit_ms, |world| (0..2).all(|site| world.sites[site].paths_up(0) == paths));
    assert!(up, "not all of {paths} paths up after {limit_ms} ms");
    world.now.since(began) / 1_000_000
}

/// Flows both ways for `ms`, 200 packets a second each.
fn flows(world: &mut World, ms: u64) -> [usize; 2] {
    let start = world.now;
    let spec = UdpSpec { packet_bytes: 700, every_ns: 5_000_000, burst: 1, start, stop: start.plus_ms(ms) };
    [world.udp(0, 1, spec), world.udp(1, 0, spec)]
}

/// Nothing was lost, nothing twice, nothing late, nothing on two cores.
fn all_arrived(world: &World, flows: &[usize]) {
    world.check().unwrap();
    assert_eq!(world.totals.flows_split, 0);
    for flow in flows {
        let stats = world.udp_stats(*flow);
        assert!(stats.sent > 0);
        assert_eq!(world.udp_missing(*flow), Vec::<u64>::new(), "flow {flow} lost packets");
        assert_eq!(stats.disordered, 0, "flow {flow}");
    }
}

#[test]
fn a_clock_in_1970_joins_and_joins_again_after_a_restart() {
    for (dialer, listener) in [(0, WALL_CLOCK_NS), (WALL_CLOCK_NS, 0), (0, 0)] {
        let mut world = World::new(sim::seed(1));
        let (a, b) = (world.site(2, dialer), world.site(2, listener));
        let ends = ((a, world.wan(a, 1_500)), (b, world.wan(b, 1_500)));
        world.cable(ends.0, ends.1, Shape::new(10.0, 10.0), Shape::new(10.0, 10.0));
        world.peer(a, b);
        world.start();
        joined(&mut world, 1, 1_000);
        world.run_ms(500);
        // The clock falls back to 1970; only the timestamp floor was kept on disk. Then not even that: the dialer proves to be fresh.
        for floor_kept in [true, false] {
            world.restart(0, floor_kept);
            world.run_ms(100);
            joined(&mut world, 1, 3_000);
        }
        let flows = flows(&mut world, 500);
        world.run_ms(1_000);
        all_arrived(&world, &flows);
    }
}

/// Row T1: the tier of a WAN is told to the other side, over lossy links too; both use a backup only while no better path works.
#[test]
fn tiers_of_one_side_hold_for_both() {
    let carrying = |world: &World, site: usize| -> Vec<u8> {
        let bond = world.sites[site].bond(0).unwrap();
        bond.paths.load().iter().filter(|path| path.carries()).map(|path| path.tier()).collect()
    };
    for (side, loss) in [(0, 0.0), (1, 0.0), (0, 0.3), (1, 0.3)] {
        let shapes: Vec<Shape> = [10.0, 5.0, 2.0].map(|ms| Shape::new(50.0, ms).loss(loss)).into();
        let mut world = pair(sim::seed(3), (2, 2), &shapes);
        for (id, tier) in [(1, 1), (2, 2)] {
            world.sites[side].wan_mut(id).unwrap().tier = tier;
        }
        world.start();
        joined(&mut world, 3, 5_000);
        let told = world.run_until_true(3_000, |world| (0..2).all(|site| carrying(world, site) == [0]));
        assert!(told, "side {side}, loss {loss}: {:?} {:?}", carrying(&world, 0), carrying(&world, 1));
        if loss > 0.0 {
            continue;
        }
        let flows = flows(&mut world, 3_000);
        world.run_ms(500);
        world.cables[0].cut(true);
        let left = world.run_until_true(1_000, |world| (0..2).all(|site| carrying(world, site) == [1]));
        assert!(left, "side {side}: {:?} {:?}", carrying(&world, 0), carrying(&world, 1));
        world.cables[0].cut(false);
        let back = world.run_until_true(10_000, |world| (0..2).all(|site| carrying(world, site) == [0]));
        assert!(back, "side {side}: {:?} {:?}", carrying(&world, 0), carrying(&world, 1));
        world.run_ms(3_000);
        world.check().unwrap();
        assert!(flows.iter().all(|flow| world.udp_stats(*flow).received > 0));
        // A reload takes the tiers away again, and the other side learns that as well.
        for id in [1, 2] {
            world.sites[side].wan_mut(id).unwrap().tier = 0;
        }
        world.reload(side);
        let equal =
            world.run_until_true(2_000, |world| (0..2).all(|site| carrying(world, site) == [0, 0, 0]));
        assert!(equal, "side {side}: {:?} {:?}", carrying(&world, 0), carrying(&world, 1));
    }
}

#[test]
fn a_rekey_under_traffic_loses_nothing() {
    let mut world = pair(sim::seed(2), (2, 2), &two());
    world.start();
    joined(&mut world, 2, 1_000);
    world.run_ms(118_000 - world.now.ms());
    let before = world.sites[0].handshakes(0);
    let flows = flows(&mut world, 8_000);
    world.run_ms(9_000);
    assert_eq!(world.sites[0].handshakes(0), before + 1, "the key was renewed under traffic");
    all_arrived(&world, &flows);
}

#[test]
fn a_rekey_over_lossy_and_jittery_links_loses_nothing_that_the_links_do_not() {
    let links = [Shape::new(50.0, 10.0).jitter(5_000, true), Shape::new(50.0, 40.0).late(0.02, 8_000)];
    let mut world = pair(sim::seed(33), (2, 3), &links);
    world.start();
    joined(&mut world, 2, 1_000);
    let start = world.now;
    let flow = world.tcp(0, 1, TcpSpec { hystart: true, start, stop: start.plus_ms(3_000), bytes: u64::MAX });
    let light = flows(&mut world, 3_000);
    for _ in 0..5 {
        world.run_ms(500);
        world.sites[0].bond(0).unwrap().current.load().as_ref().unwrap().spend();
    }
    world.run_ms(3_000);
    assert!(world.sites[0].handshakes(0) >= 5, "{}", world.sites[0].handshakes(0));
    world.check().unwrap();
    assert_eq!(world.totals.flows_split, 0);
    for flow in light {
        assert_eq!(world.udp_missing(flow), Vec::<u64>::new());
    }
    let got = world.tcp_flow(flow).unwrap();
    assert_eq!(got.sent().timeouts, 0);
    assert!(got.received().bytes > 5_000_000, "{} bytes", got.received().bytes);
}

#[test]
fn a_spent_key_is_renewed_at_once_whoever_spent_it() {
    for site in 0..2 {
        let mut world = pair(sim::seed(4), (2, 2), &two());
        world.start();
        joined(&mut world, 2, 1_000);
        let flows = flows(&mut world, 2_000);
        world.run_ms(500);
        let before = world.sites[0].handshakes(0);
        world.sites[site].bond(0).unwrap().current.load().as_ref().unwrap().spend();
        world.run_ms(2_500);
        assert_eq!(world.sites[0].handshakes(0), before + 1, "spent by site {site}");
        all_arrived(&world, &flows);
    }
}

#[test]
fn either_side_may_restart() {
    for (site, limit_ms) in [(0, 1_500), (1, 3_000)] {
        let mut world = pair(sim::seed(5), (2, 2), &two());
        world.start();
        joined(&mut world, 2, 1_000);
        let flows = flows(&mut world, 10_000);
        world.run_ms(1_000);
        let cut = world.now;
        for flow in flows {
            world.reset_gap(flow);
        }
        world.restart(site, true);
        world.run_until_true(10_000, |world| {
            flows.iter().all(|flow| world.udp_stats(*flow).last > cut.plus_ms(100))
                && (0..2).all(|site| world.sites[site].paths_up(0) == 2)
        });
        let took_ms = world.now.since(cut) / 1_000_000;
        assert!(took_ms < limit_ms, "site {site} back after {took_ms} ms");
        world.run_ms(11_000);
        world.check().unwrap();
        for flow in flows {
            let stats = world.udp_stats(flow);
            assert!(stats.received + limit_ms / 5 >= stats.sent, "{stats:?}");
        }
    }
}

#[test]
fn a_restart_with_another_number_of_cores() {
    let mut world = pair(sim::seed(6), (2, 3), &two());
    world.start();
    joined(&mut world, 2, 1_000);
    for (site, cores) in [(1, 1), (0, 5), (1, 8)] {
        world.sites[site].set_cores(cores);
        world.restart(site, true);
        world.run_ms(5_000);
        joined(&mut world, 2, 100);
        let flows = flows(&mut world, 300);
        world.run_ms(1_000);
        all_arrived(&world, &flows);
    }
}

#[test]
fn a_nat_that_rebinds_is_followed() {
    for new_address in [false, true] {
        let mut world = to_hub(sim::seed(7), (2, 2), &[Shape::new(20.0, 20.0)]);
        world.nat(0);
        world.start();
        joined(&mut world, 1, 1_000);
        let flows = flows(&mut world, 4_000);
        world.run_ms(1_000);
        for flow in flows {
            world.reset_gap(flow);
        }
        let public = new_address.then(|| [203, 0, 113, 77].into());
        world.cables[0].nat.as_mut().unwrap().rebind(public);
        world.run_ms(4_000);
        world.check().unwrap();
        let gap_ms = flows.map(|flow| world.udp_stats(flow).gap_ns_max / 1_000_000);
        assert!(gap_ms[0] < 200 && gap_ms[1] < 500, "address {new_address}: gaps {gap_ms:?} ms");
        let stats = world.udp_stats(flows[1]);
        assert!(stats.last.ms() > 4_000 && stats.sent - stats.received < 20, "{stats:?}");
    }
}

#[test]
fn a_wan_that_changes_its_address_is_followed() {
    let mut world = to_hub(sim::seed(8), (2, 2), &two());
    world.start();
    joined(&mut world, 2, 1_000);
    let flows = flows(&mut world, 3_000);
    world.run_ms(1_000);
    for flow in flows {
        world.reset_gap(flow);
    }
    world.sites[0].wan_mut(0).unwrap().addresses = vec![wan_address(0, 0, 99)];
    world.reload(0);
    world.run_ms(3_500);
    world.check().unwrap();
    let gap_ms = flows.map(|flow| world.udp_stats(flow).gap_ns_max / 1_000_000);
    assert!(gap_ms.iter().all(|gap| *gap < 400), "gaps {gap_ms:?} ms");
    joined(&mut world, 2, 1_000);
}

#[test]
fn a_silent_black_hole_of_the_best_link() {
    for direction in [None, Some(0), Some(1)] {
        let mut world = pair(sim::seed(9), (2, 2), &demo());
        world.start();
        joined(&mut world, 3, 1_500);
        let start = world.now;
        let spec = UdpSpec::mbps(1_000, 8.0, start, start.plus_ms(6_000));
        let flows = [world.udp(0, 1, spec), world.udp(1, 0, spec)];
        world.run_ms(1_500);
        for flow in flows {
            world.reset_gap(flow);
        }
        match direction {
            None => world.cables[0].cut(true),
            Some(direction) => world.cables[0].links[direction].cut(true),
        }
        world.run_ms(2_000);
        assert!(world.sites[0].paths_in(0, PathState::Up) >= 2);
        let gap_ms = flows.map(|flow| world.udp_stats(flow).gap_ns_max / 1_000_000);
        eprintln!("cut {direction:?}: gaps {gap_ms:?} ms");
        assert!(gap_ms.iter().all(|gap| *gap < 500), "direction {direction:?}: gaps {gap_ms:?} ms");
        world.cables[0].cut(false);
        joined(&mut world, 3, 2_000);
        let carried = world.cables[0].links[0].left_bytes;
        world.run_ms(4_000);
        world.check().unwrap();
        for flow in flows {
            let stats = world.udp_stats(flow);
            // What was under way or booked when the link died is sent again elsewhere.
            assert!(stats.received + 60 >= stats.sent, "direction {direction:?}: {stats:?}");
        }
        assert!(world.cables[0].links[0].left_bytes > carried + 100_000, "the link is used again");
    }
}

#[test]
fn a_tcp_flow_survives_cuts_of_every_link_in_turn() {
    let mut world = pair(sim::seed(10), (2, 2), &demo());
    world.start();
    joined(&mut world, 3, 1_500);
    let start = world.now;
    let flow =
        world.tcp(0, 1, TcpSpec { hystart: true, start, stop: start.plus_ms(60_000), bytes: 20_000_000 });
    for cable in 0..3 {
        world.run_ms(300);
        world.cables[cable].cut(true);
        world.run_ms(700);
        world.cables[cable].cut(false);
        world.run_ms(600);
    }
    world.run_until_true(30_000, |world| world.tcp_flow(flow).unwrap().finished());
    world.check().unwrap();
    let received = world.tcp_flow(flow).unwrap().received();
    assert_eq!(received.bytes, 20_000_000);
    assert!(received.gap_ns_max < 1_000_000_000, "gap {} ms", received.gap_ns_max / 1_000_000);
}

#[test]
fn all_paths_down_and_up_again() {
    for seconds in [1, 5, 200] {
        let mut world = pair(sim::seed(11), (2, 2), &two());
        world.start();
        joined(&mut world, 2, 1_000);
        world.run_ms(500);
        for cable in &mut world.cables {
            cable.cut(true);
        }
        world.run_ms(seconds * 1_000);
        for cable in &mut world.cables {
            cable.cut(false);
        }
        let took_ms = joined(&mut world, 2, 5_000);
        eprintln!("{seconds} s without any link: back after {took_ms} ms");
        let flows = flows(&mut world, 500);
        world.run_ms(1_500);
        all_arrived(&world, &flows);
    }
}

#[test]
fn wans_come_and_go_while_data_flows() {
    let mut world = to_hub(sim::seed(12), (2, 2), &demo());
    world.start();
    joined(&mut world, 3, 1_500);
    let flows = flows(&mut world, 8_000);
    world.run_ms(500);
    // Carrier lost and found: the interface says so, no timer has to run.
    world.sites[0].wan_mut(0).unwrap().up = false;
    world.cables[0].cut(true);
    world.reload(0);
    world.run_ms(1_000);
    assert_eq!(world.sites[0].paths_up(0), 2);
    assert_eq!(world.sites[1].paths_up(0), 2, "the peer was told over the other paths");
    world.sites[0].wan_mut(0).unwrap().up = true;
    world.cables[0].cut(false);
    world.reload(0);
    joined(&mut world, 3, 2_000);
    // A WAN leaves the configuration and returns.
    let removed = world.sites[0].snapshot.wans.remove(1);
    world.reload(0);
    world.run_ms(500);
    assert_eq!((world.sites[0].paths_up(0), world.sites[1].paths_up(0)), (2, 2));
    world.sites[0].snapshot.wans.insert(1, removed);
    world.reload(0);
    joined(&mut world, 3, 2_000);
    world.run_ms(8_000);
    world.check().unwrap();
    assert_eq!(world.totals.flows_split, 0);
    for flow in flows {
        let stats = world.udp_stats(flow);
        assert!(stats.received + 30 >= stats.sent, "{stats:?}");
    }
}

#[test]
fn path_ids_never_run_out() {
    let mut world = to_hub(sim::seed(13), (1, 1), &two());
    world.start();
    joined(&mut world, 2, 1_000);
    for _ in 0..300 {
        let wan = world.sites[0].snapshot.wans.remove(1);
        world.reload(0);
        world.run_ms(2);
        world.sites[0].snapshot.wans.insert(1, wan);
        world.reload(0);
        world.run_ms(3);
    }
    world.run_ms(3_000);
    joined(&mut world, 2, 2_000);
    let flows = flows(&mut world, 500);
    world.run_ms(1_000);
    all_arrived(&world, &flows);
}

#[test]
fn a_machine_that_may_have_been_copied_seals_nothing_more_under_its_keys() {
    for ends in [0, 1] {
        let mut world = pair(sim::seed(70 + ends as u64), (2, 2), &two());
        world.start();
        joined(&mut world, 2, 1_000);
        let number =
            |world: &World| world.sites[ends].bond(0).unwrap().current.load().as_ref().map(|s| s.number);
        let before = number(&world).unwrap();
        let sent = flows(&mut world, 8_000);
        world.run_ms(1_000);
        let now = world.now;
        world.sites[ends].node.end_sessions(now);
        assert_eq!(number(&world), None);
        let began = world.now;
        assert!(world.run_until_true(5_000, |world| number(world).is_some_and(|number| number > before)));
        eprintln!("site {ends}: new keys after {} ms", world.now.since(began) / 1_000_000);
        world.run_ms(8_000);
        world.check().unwrap();
        for flow in sent {
            assert!(
                world.udp_missing(flow).len() < 400,
                "site {ends}: {} lost",
                world.udp_missing(flow).len()
            );
        }
    }
}

#[test]
fn a_peer_that_says_goodbye_is_believed_and_may_come_back() {
    for site in 0..2 {
        let mut world = pair(sim::seed(14), (2, 2), &two());
        world.start();
        joined(&mut world, 2, 1_000);
        world.stop(site);
        world.run_ms(500);
        assert!(world.sites[1 - site].bond(0).unwrap().current.load().is_none(), "site {site} closed");
        world.run_ms(5_000);
        world.restart(site, true);
        world.run_ms(100);
        let took_ms = joined(&mut world, 2, 3_000);
        assert!(took_ms < 2_500, "site {site}: {took_ms} ms");
        let flows = flows(&mut world, 500);
        world.run_ms(1_000);
        all_arrived(&world, &flows);
    }
}

#[test]
fn an_idle_bond_is_quiet() {
    let mut world = pair(sim::seed(15), (4, 4), &two());
    world.start();
    joined(&mut world, 2, 1_000);
    world.run_ms(5_000);
    let before: u64 = world.cables.iter().flat_map(|cable| &cable.links).map(|link| link.entered()).sum();
    world.run_until(Time::from_ms(world.now.ms() + 60_000));
    let after: u64 = world.cables.iter().flat_map(|cable| &cable.links).map(|link| link.entered()).sum();
    let per_second = (after - before) / 60;
    assert!(per_second < 40, "{per_second} datagrams a second on an idle bond");
}

#[test]
fn t3_a_core_that_gets_busy_is_told_to_the_peer() {
    let mut world = pair(3_301, (2, 2), &two());
    world.start();
    joined(&mut world, 2, 1_000);
    let load = |world: &World| {
        let bond = world.sites[0].bond(0).unwrap();
        bond.cores.load().as_ref().map(|cores| cores.info.load.clone()).unwrap()
    };
    assert_eq!(load(&world), [0, 0]);
    world.sites[1].node.set_load(1, 200);
    let sent = flows(&mut world, 4_000);
    world.run_ms(5_000);
    assert_eq!(load(&world), [0, 200]);
    all_arrived(&world, &sent);
    // A small change is not worth a datagram.
    world.sites[1].node.set_load(1, 190);
    flows(&mut world, 3_000);
    world.run_ms(4_000);
    assert_eq!(load(&world), [0, 200]);
}

#[test]
fn when_both_sides_have_endpoints_the_lower_key_dials() {
    let mut world = pair(3_302, (2, 2), &two());
    let address = world.sites[0].wan(0).unwrap().addresses[0];
    let endpoint = std::net::SocketAddr::new(address, sim::site::LISTEN_PORT);
    world.sites[1].peer_mut("site0").unwrap().endpoints = vec![endpoint];
    world.start();
    let up = world.run_until_true(20_000, |world| {
        (0..2).all(|site| {
            world.sites[site]
                .node
                .bonds
                .load()
                .iter()
                .any(|bond| bond.paths.load().iter().any(|path| path.carries()))
        })
    });
    assert!(up);
    let dialers: Vec<bool> =
        (0..2).map(|site| world.sites[site].node.bonds.load().iter().any(|bond| bond.dialer)).collect();
    let lower = world.sites[0].public_key() < world.sites[1].public_key();
    assert_eq!(dialers, [lower, !lower]);
}

/// Two lines whose NATs swap their addresses at the same moment: each path is then where the other was.
#[test]
fn paths_that_swap_their_addresses_are_followed() {
    let mut world = to_hub(sim::seed(70), (2, 2), &[Shape::new(20.0, 20.0), Shape::new(20.0, 25.0)]);
    world.nat(0);
    world.nat(1);
    world.start();
    joined(&mut world, 2, 1_000);
    let flows = flows(&mut world, 6_000);
    world.run_ms(1_000);
    let public = [0, 1].map(|cable: usize| world.cables[cable].nat.as_ref().unwrap().public());
    for cable in 0..2 {
        world.cables[cable].nat.as_mut().unwrap().rebind(Some(public[1 - cable]));
    }
    world.run_ms(3_000);
    joined(&mut world, 2, 100);
    for (cable, public) in public.into_iter().rev().enumerate() {
        let hub = world.sites[1].bond(0).unwrap();
        let paths = hub.paths.load();
        assert!(paths.iter().any(|path| path.usable() && path.route().remote.ip() == public), "{cable}");
    }
    for flow in flows {
        world.reset_gap(flow);
    }
    world.run_ms(1_500);
    for flow in flows {
        let gap_ms = world.udp_stats(flow).gap_ns_max / 1_000_000;
        assert!(gap_ms < 100, "{gap_ms} ms");
    }
    world.check().unwrap();
}

/// A carrier's NAT that gives the socket of each core another address: the path settles at one.
#[test]
fn a_nat_with_an_address_per_mapping() {
    let mut world = to_hub(sim::seed(71), (4, 2), &[Shape::new(20.0, 20.0)]);
    world.nat(0);
    world.cables[0].nat.as_mut().unwrap().addresses = 4;
    world.start();
    joined(&mut world, 1, 2_000);
    let flows: Vec<usize> = (0..16)
        .map(|n| {
            let (from, to) = if n % 2 == 0 { (0, 1) } else { (1, 0) };
            world.udp(from, to, UdpSpec::mbps(600, 0.5, world.now, world.now.plus_ms(20_000)))
        })
        .collect();
    world.run_ms(1_000);
    let hub = world.sites[1].bond(0).unwrap();
    let path = std::sync::Arc::clone(&hub.paths.load()[0]);
    let before = path.route_version();
    world.run_ms(20_000);
    let moves = path.route_version() - before;
    assert!(moves <= 2, "{moves} moves");
    for flow in flows {
        let stats = world.udp_stats(flow);
        assert!(stats.received * 100 >= stats.sent * 99, "{stats:?}");
    }
    world.check().unwrap();
}
