//! Traffic classes (rows T12, R3, R15) where time is exact: what urgent flows get beside transfers that fill the links.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use sim::inner::FIRST_PORT;
use sim::inner::tcp::TcpSpec;
use sim::inner::udp::{UdpSpec, UdpStats};
use sim::link::Shape;
use sim::scenario::pair;
use sim::world::World;
use tunnel::class::{Class, ClassRule, Classes};

/// Two sites; application `port` of each is of `class`.
fn world(seed: u64, links: &[Shape], class: Class, port: u16) -> World {
    let mut world = pair(sim::seed(seed), (1, 1), links);
    let ports = vec![(FIRST_PORT + port, FIRST_PORT + port)];
    let classes = Arc::new(Classes::new(vec![ClassRule { class, ports, ..ClassRule::default() }]));
    for site in &mut world.sites {
        let bond = site.snapshot.peers[0].id;
        site.snapshot.classes.insert(bond, Arc::clone(&classes));
    }
    world.start();
    let up = |world: &World| (0..2).all(|site| world.sites[site].paths_up(0) == links.len());
    assert!(world.run_until_true(5_000, up));
    world
}

fn transfers(world: &mut World, count: usize, ms: u64) {
    for _ in 0..count {
        let (start, stop) = (world.now, world.now.plus_ms(ms));
        world.tcp(0, 1, TcpSpec { hystart: true, start, stop, bytes: u64::MAX });
    }
}

fn ms(stats: &UdpStats) -> (f64, f64) {
    (stats.delay_ns_sum as f64 / stats.received as f64 / 1e6, stats.delay_ns_max as f64 / 1e6)
}

/// 1.6 Mbit/s in datagrams of 1,000 bytes, too much to be sparse.
fn call(world: &World, after_ms: u64, ms: u64) -> UdpSpec {
    UdpSpec::mbps(1_028, 1.6, world.now.plus_ms(after_ms), world.now.plus_ms(after_ms + ms))
}

#[test]
fn interactive_flows_pass_transfers_on_the_quickest_path_in_order() {
    let links = [Shape::new(20.0, 10.0), Shape::new(20.0, 40.0)];
    let measure = |class: Class| {
        let mut world = world(900, &links, class, 4);
        transfers(&mut world, 4, 10_000);
        let call = call(&world, 3_000, 6_000);
        let call = world.udp(0, 1, call);
        world.run_ms(11_000);
        world.check().unwrap();
        let received: u64 = (0..4).map(|id| world.tcp_flow(id).unwrap().received().bytes).sum();
        (world.udp_stats(call).clone(), received)
    };
    let (bulk, _) = measure(Class::Bulk);
    for class in [Class::Interactive, Class::Critical] {
        let (urgent, received) = measure(class);
        eprintln!(
            "{class:?}: mean and longest {:?} ms, bulk {:?} ms; transfers {received} bytes",
            ms(&urgent),
            ms(&bulk)
        );
        assert_eq!((urgent.received, urgent.disordered), (urgent.sent, 0), "{urgent:?}");
        let (mean, longest) = ms(&urgent);
        assert!(mean < 25.0 && longest < 60.0, "{mean} {longest}");
        assert!(mean < ms(&bulk).0 / 2.0, "{:?}", ms(&bulk));
        // 10 s at 40 Mbit/s from rest, less the call, of which a critical one goes twice.
        assert!(received > 35_000_000, "{received}");
    }
}

#[test]
fn a_game_is_found_by_its_pace_and_keeps_the_delay_of_the_idle_link() {
    let links = [Shape::new(30.0, 10.0), Shape::new(20.0, 60.0)];
    let mut world = world(910, &links, Class::Bulk, 9_999);
    let game = |world: &World, ms: u64| UdpSpec {
        // 102 kB/s: too much to be sparse.
        packet_bytes: 420,
        every_ns: 4_100_000,
        burst: 1,
        start: world.now,
        stop: world.now.plus_ms(ms),
    };
    let spec = game(&world, 3_000);
    let idle = world.udp(0, 1, spec);
    world.run_ms(4_000);
    transfers(&mut world, 2, 13_000);
    world.run_ms(2_000);
    let spec = game(&world, 10_000);
    let loaded = world.udp(0, 1, spec);
    world.run_ms(12_000);
    let (idle, loaded) = (world.udp_stats(idle).clone(), world.udp_stats(loaded).clone());
    eprintln!("idle {:?} ms, loaded {:?} ms, {} disordered", ms(&idle), ms(&loaded), loaded.disordered);
    assert_eq!((loaded.received, loaded.disordered), (loaded.sent, 0), "{loaded:?}");
    assert!(ms(&loaded).0 < ms(&idle).0 + 10.0, "{:?} {:?}", ms(&idle), ms(&loaded));
}

#[test]
fn critical_flows_lose_nothing_when_a_link_falls_silent() {
    let links = [Shape::new(20.0, 10.0), Shape::new(20.0, 25.0)];
    let mut world = world(920, &links, Class::Critical, 0);
    let spec = call(&world, 0, 8_000);
    let flow = world.udp(0, 1, spec);
    for cable in [0, 1, 0] {
        world.run_ms(1_500);
        world.cables[cable].cut(true);
        world.run_ms(700);
        world.cables[cable].cut(false);
    }
    world.run_ms(4_000);
    world.check().unwrap();
    let stats = world.udp_stats(flow).clone();
    assert_eq!((stats.received, stats.repeated), (stats.sent, 0), "{stats:?}");
    // When a quicker link comes back, copies overtake what is under way on the other.
    assert!(stats.disordered <= 20, "{stats:?}");
    assert!(stats.gap_ns_max < 45_000_000, "{stats:?}");
    let bond = world.sites[1].bond(0).unwrap();
    let (used, suppressed) =
        (bond.totals.copies_used.load(Relaxed), bond.totals.copies_suppressed.load(Relaxed));
    // The flow is back on the quicker link before the other is cut: copies are needed only while it is left, twice.
    assert!(used > 30 && suppressed > 1_000, "{used} {suppressed}");
}

/// Each transfer's bytes: one of a class that may use the quicker of two links only, and one of bulk that may use both.
fn beside_bulk(seed: u64, class: Class) -> [u64; 2] {
    let links = [Shape::new(20.0, 10.0), Shape::new(20.0, 40.0)];
    let mut world = pair(sim::seed(seed), (1, 1), &links);
    let ports = vec![(FIRST_PORT, FIRST_PORT)];
    let rule = ClassRule { class, ports, wans: Some(vec![0]), ..ClassRule::default() };
    let bond = world.sites[0].snapshot.peers[0].id;
    world.sites[0].snapshot.classes.insert(bond, Arc::new(Classes::new(vec![rule])));
    world.sites[0].snapshot.wans[1].properties.cost = 5;
    world.start();
    assert!(world.run_until_true(5_000, |world| (0..2).all(|site| world.sites[site].paths_up(0) == 2)));
    transfers(&mut world, 2, 10_000);
    world.run_ms(11_000);
    world.check().unwrap();
    let over = |path: usize| -> u64 {
        let bond = world.sites[0].bond(0).unwrap();
        let paths = bond.paths.load();
        let of_wan = paths.iter().filter(|known| usize::from(known.route().wan) == path);
        of_wan.map(|path| path.traffic.classes[class as usize].packets.load(Relaxed)).sum()
    };
    assert!(over(0) > 5_000 && over(1) == 0, "{class:?}: {} {}", over(0), over(1));
    [0, 1].map(|id| world.tcp_flow(id).unwrap().received().bytes)
}

#[test]
fn pinned_and_cheap_flows_get_their_share_of_the_paths_that_they_may_use() {
    for (seed, class) in [(930, Class::Pinned), (931, Class::Cheap)] {
        let [choosy, bulk] = beside_bulk(seed, class);
        eprintln!("{class:?} {choosy} bytes, bulk {bulk}");
        // 25 MB is what one link carries in that time.
        assert!(choosy > 8_000_000 && bulk > 15_000_000, "{class:?}: {choosy} {bulk}");
    }
}

#[test]
fn interactive_flows_that_want_everything_leave_half_to_the_others() {
    let links = [Shape::new(10.0, 5.0), Shape::new(10.0, 5.0)];
    let mut world = world(940, &links, Class::Interactive, 0);
    let (start, stop) = (world.now, world.now.plus_ms(10_000));
    let flood = world.udp(0, 1, UdpSpec::mbps(1_228, 38.0, start, stop));
    world.run_ms(1_000);
    transfers(&mut world, 2, 8_000);
    world.run_ms(11_000);
    world.check().unwrap();
    let flood = world.udp_stats(flood).clone();
    let bytes: u64 = [1, 2].iter().map(|id| world.tcp_flow(*id).unwrap().received().bytes).sum();
    eprintln!("transfers {bytes} bytes, flood {} of {}, {:?} ms", flood.received, flood.sent, ms(&flood));
    // 25 MB is what both links carry in that time.
    assert!(bytes > 6_000_000, "{bytes}");
    assert!(flood.received > 5_000, "{flood:?}");
}
