//! Handshake, path join and data over every kind of link, and every mixture of MTUs and cores.
#![allow(clippy::unwrap_used, reason = "tests")]

use sim::inner::tcp::TcpSpec;
use sim::inner::udp::UdpSpec;
use sim::link::{QueueLimit, Shape};
use sim::scenario::{pair, star, to_hub};
use sim::world::World;
use tunnel::time::Time;

/// Runs until both sites have `paths` paths up.
fn join(world: &mut World, paths: usize, limit_ms: u64) -> u64 {
    world.start();
    let began = world.now;
    let up =
        world.run_until_true(limit_ms, |world| (0..2).all(|site| world.sites[site].paths_up(0) == paths));
    assert!(up, "not joined within {limit_ms} ms");
    world.now.since(began) / 1_000_000
}

/// One second of both kinds of traffic, then what must hold after it.
fn traffic(world: &mut World, packet_bytes: usize, mbps: f64) -> (u64, u64) {
    let start = world.now;
    let stop = start.plus_ms(1_000);
    let there = world.udp(0, 1, UdpSpec::mbps(packet_bytes, mbps, start, stop));
    let back = world.udp(1, 0, UdpSpec::mbps(packet_bytes, mbps, start, stop));
    let tcp = world.tcp(0, 1, TcpSpec { hystart: true, start, stop: start.plus_ms(60_000), bytes: 300_000 });
    world.run_ms(2_500);
    world.run_until_true(20_000, |world| world.tcp_flow(tcp).unwrap().finished());
    world.check().unwrap();
    assert_eq!(world.tcp_flow(tcp).unwrap().received().bytes, 300_000, "TCP did not finish");
    assert_eq!(world.totals.flows_split, 0);
    let (there, back) = (world.udp_stats(there), world.udp_stats(back));
    (there.sent + back.sent, there.received + back.received)
}

#[test]
fn every_kind_of_link_joins_and_carries() {
    let base = || Shape::new(50.0, 15.0);
    // Name, link, share of packets that must arrive: recovery hides most loss.
    let kinds: [(&str, Shape, f64); 12] = [
        ("clean", base(), 1.0),
        ("bare", Shape::default(), 1.0),
        ("jitter in order", base().jitter(5_000, false), 1.0),
        ("jitter out of order", base().jitter(5_000, true), 1.0),
        ("loss 1 %", base().loss(0.01), 0.99),
        ("loss 10 %", base().loss(0.1), 0.93),
        ("bursts", base().burst_loss(0.02, 4.0), 0.98),
        ("reordering", base().late(0.05, 3_000), 1.0),
        ("corruption", base().corrupt(0.02), 0.99),
        ("duplicates", base().duplicate(0.1), 1.0),
        ("MTU 1280", base().mtu(1_280), 1.0),
        ("satellite", Shape::new(10.0, 300.0), 1.0),
    ];
    for (number, (name, link, least)) in kinds.into_iter().enumerate() {
        let (mut sent, mut received) = (0, 0);
        // One run may be unlucky.
        for run in 0..4 {
            let seed = sim::seed(100 + number as u64) + 1_000 * run;
            let mut world = pair(seed, (2, 2), std::slice::from_ref(&link));
            let took_ms = join(&mut world, 1, 10_000);
            let traffic = traffic(&mut world, 800, 2.0);
            (sent, received) = (sent + traffic.0, received + traffic.1);
            // A round trip for the handshake and one for the challenge, when nothing is lost.
            assert!(least < 1.0 || took_ms < 2_000, "{name}: joined in {took_ms} ms");
        }
        let share = received as f64 / sent as f64;
        eprintln!("{name}: {:.2} % arrived", 100.0 * share);
        assert!(share >= least, "{name}: {share}");
    }
}

/// The demo's links.
fn demo() -> Vec<Shape> {
    vec![Shape::new(100.0, 10.0), Shape::new(50.0, 20.0), Shape::new(20.0, 40.0).loss(0.001)]
}

#[test]
fn full_packets_over_every_mixture_of_mtus() {
    for (number, mtus) in
        [&[1_280][..], &[1_400], &[1_280, 1_500], &[1_500, 1_400, 1_280], &[1_492, 1_492]].iter().enumerate()
    {
        let links: Vec<Shape> = mtus.iter().map(|mtu| Shape::new(40.0, 10.0).mtu(*mtu)).collect();
        let mut world = pair(sim::seed(200 + number as u64), (2, 2), &links);
        join(&mut world, mtus.len(), 3_000);
        // Let the MTU search of each path end.
        world.run_ms(6_000);
        for (wan, mtu) in mtus.iter().enumerate() {
            let bond = world.sites[0].bond(0).unwrap();
            let found = bond
                .paths
                .load()
                .iter()
                .find(|path| path.usable() && usize::from(path.route().wan) == wan)
                .unwrap()
                .datagram_bytes();
            let mtu = *mtu as usize;
            assert!(found + 28 <= mtu && found + 28 + 8 >= mtu, "MTU {mtu}: found {found}");
        }
        let (sent, received) = traffic(&mut world, 1_500, 8.0);
        assert_eq!(sent, received, "{mtus:?}");
    }
}

/// Two links take large datagrams, the quickest one does not: what one of them had under way when it died is repeated over the other.
#[test]
fn what_a_dead_link_had_is_not_repeated_where_it_is_too_large() {
    let large = || Shape::new(50.0, 15.0).mtu(1_500);
    let links = [Shape::new(10.0, 3.0).mtu(1_280), large(), large()];
    let mut world = pair(sim::seed(212), (1, 1), &links);
    join(&mut world, 3, 3_000);
    world.run_ms(6_000);
    let start = world.now;
    let flow = world.udp(0, 1, UdpSpec::mbps(1_400, 35.0, start, start.plus_ms(6_000)));
    world.run_ms(3_000);
    world.cables[1].cut(true);
    world.run_ms(4_000);
    let stats = world.udp_stats(flow);
    let lost = stats.sent - stats.received;
    assert!(lost == 0, "{lost} lost of {}", stats.sent);
}

#[test]
fn an_mtu_that_shrinks_while_data_flows_is_found_again() {
    let links = [Shape::new(40.0, 10.0).mtu(1_500)];
    let mut world = pair(sim::seed(210), (1, 1), &links);
    join(&mut world, 1, 3_000);
    world.run_ms(2_000);
    let start = world.now;
    let flow = world.tcp(0, 1, TcpSpec { hystart: true, start, stop: start.plus_ms(8_000), bytes: u64::MAX });
    world.run_ms(1_000);
    for link in &mut world.cables[0].links {
        link.set_mtu(1_400);
    }
    world.run_ms(3_000);
    let before = world.tcp_flow(flow).unwrap().received().bytes;
    world.run_ms(2_000);
    let after = world.tcp_flow(flow).unwrap().received().bytes;
    world.check().unwrap();
    assert!(after > before + 4_000_000, "{} bytes in two seconds", after - before);
}

/// Bytes a second that a bulk flow from the hub gets over `links`, and its longest gap in ms after `change`, which comes after 3 s.
fn bulk(seed: u64, links: &[Shape], change: impl FnOnce(&mut World)) -> (f64, u64) {
    let mut world = pair(sim::seed(seed), (2, 2), links);
    world.start();
    assert!(world.run_until_true(5_000, |world| (0..2).all(|site| world.sites[site].paths_up(0) > 0)));
    world.run_ms(2_000);
    let start = world.now;
    let flow =
        world.tcp(1, 0, TcpSpec { hystart: true, start, stop: start.plus_ms(60_000), bytes: u64::MAX });
    let probe = world.udp(1, 0, UdpSpec::mbps(1_300, 0.5, start, start.plus_ms(60_000)));
    world.run_ms(3_000);
    change(&mut world);
    world.reset_gap(probe);
    world.run_ms(1_000);
    let from = world.now;
    world.run_ms(7_000);
    world.check().unwrap();
    let received = world.tcp_flow(flow).unwrap().received();
    let bytes = received.bytes - received.bytes_at(from);
    (bytes as f64 / 7.0, world.udp_stats(probe).gap_ns_max / 1_000_000)
}

/// A link that takes less than the usual base of 1,232 bytes, alone and beside a good one.
#[test]
fn links_smaller_than_the_usual_base_carry() {
    for mtu in [1_240, 1_100, 700] {
        let small = || Shape::new(20.0, 10.0).mtu(mtu);
        let (alone, gap_ms) = bulk(220, &[small()], |_| ());
        assert!(alone > 0.7 * 20e6 / 8.0 && gap_ms < 500, "alone, MTU {mtu}: {alone} B/s, {gap_ms} ms");
        let (beside, gap_ms) = bulk(221, &[small(), Shape::new(40.0, 10.0)], |_| ());
        assert!(beside > 0.9 * 40e6 / 8.0 && gap_ms < 500, "beside, MTU {mtu}: {beside} B/s, {gap_ms} ms");
    }
}

/// A link that begins to lose all but small datagrams is left, though pings pass, and comes back when it works again.
#[test]
fn a_link_that_begins_to_drop_what_is_large_is_left() {
    let links = [Shape::new(20.0, 10.0), Shape::new(20.0, 15.0)];
    let mtu =
        |mtu| move |world: &mut World| world.cables[0].links.iter_mut().for_each(|link| link.set_mtu(mtu));
    let (rate, gap_ms) = bulk(222, &links, mtu(400));
    assert!(rate > 0.75 * 20e6 / 8.0 && gap_ms < 500, "400: {rate} B/s, {gap_ms} ms");
    let (rate, gap_ms) = bulk(223, &links, mtu(1_000));
    assert!(rate > 0.9 * 20e6 / 8.0 && gap_ms < 500, "1,000: {rate} B/s, {gap_ms} ms");
    let mut world = pair(sim::seed(224), (2, 2), &links);
    join(&mut world, 2, 3_000);
    let start = world.now;
    world.tcp(1, 0, TcpSpec { hystart: true, start, stop: start.plus_ms(60_000), bytes: u64::MAX });
    world.run_ms(2_000);
    mtu(400)(&mut world);
    world.run_ms(1_500);
    assert_eq!(world.sites[1].paths_up(0), 1, "the sender has left it");
    world.run_ms(5_000);
    assert_eq!(world.sites[1].paths_up(0), 1, "small answers do not bring it back");
    mtu(1_500)(&mut world);
    assert!(world.run_until_true(3_000, |world| world.sites[1].paths_up(0) == 2), "it works again");
}

/// A modem of 64 kbit/s with a queue of a second beside a line of 20 Mbit/s: never slower than that line alone.
#[test]
fn a_very_slow_link_beside_a_fast_one() {
    let modem = Shape::new(0.064, 20.0).queue(QueueLimit::Ms(1_000));
    for seed in 230..234 {
        let line = Shape::new(20.0, 10.0);
        let (alone, _) = bulk(seed, std::slice::from_ref(&line), |_| ());
        let (rate, gap_ms) = bulk(seed, &[line, modem.clone()], |_| ());
        eprintln!("{seed}: {rate:.0} B/s of {alone:.0}, {gap_ms} ms");
        assert!(rate > 0.95 * alone && gap_ms < 500, "{seed}: {rate} of {alone} B/s, {gap_ms} ms");
    }
}

/// Small packets share datagrams, and each is charged for its own bytes only.
#[test]
fn small_packets_fill_a_slow_link() {
    let link = Shape::new(2.0, 10.0);
    let mut world = pair(sim::seed(131), (1, 1), std::slice::from_ref(&link));
    join(&mut world, 1, 10_000);
    let start = world.now;
    // Packets of a game or of telephones, more than the link takes.
    let flow = world.udp(0, 1, UdpSpec::mbps(60, 4.0, start, start.plus_ms(12_000)));
    world.run_ms(4_000);
    let before = world.udp_stats(flow).received;
    world.run_ms(8_000);
    // Bytes of eight seconds are bits of one.
    let mbps = (world.udp_stats(flow).received - before) as f64 * 60.0 / 1e6;
    eprintln!("{mbps:.2} Mbit/s of packets with 60 bytes over a link of 2 Mbit/s");
    assert!(mbps > 1.35, "{mbps}");
}

#[test]
fn any_number_of_cores_talks_to_any_other() {
    for (number, cores) in [(1, 1), (1, 4), (2, 3), (3, 2), (8, 3), (5, 8)].into_iter().enumerate() {
        let mut world =
            pair(sim::seed(300 + number as u64), cores, &[Shape::new(50.0, 5.0), Shape::new(50.0, 8.0)]);
        join(&mut world, 2, 3_000);
        let start = world.now.plus_ms(200);
        let stop = start.plus_ms(1_000);
        world.run_until(start);
        let flows: Vec<usize> = (0..24)
            .map(|n| {
                let (from, to) = if n % 2 == 0 { (0, 1) } else { (1, 0) };
                world.udp(from, to, UdpSpec::mbps(600, 1.0, start, stop))
            })
            .collect();
        world.run_ms(1_500);
        world.check().unwrap();
        assert_eq!(world.totals.flows_split, 0, "{cores:?}");
        for (site, flow) in flows.iter().enumerate().map(|(n, flow)| (n % 2, flow)) {
            let stats = world.udp_stats(*flow);
            assert_eq!((stats.sent, stats.disordered), (stats.received, 0), "{cores:?} from {site}");
            assert_eq!(world.sites[site].counters.foreign, 0, "{cores:?}");
        }
    }
}

#[test]
fn the_demos_links_in_both_topologies() {
    for hub in [false, true] {
        let mut world =
            if hub { to_hub(sim::seed(400), (2, 2), &demo()) } else { pair(sim::seed(400), (2, 2), &demo()) };
        join(&mut world, 3, 3_000);
        let (sent, received) = traffic(&mut world, 1_200, 20.0);
        assert!(received as f64 >= 0.998 * sent as f64, "hub {hub}: {received} of {sent}");
    }
}

#[test]
fn a_hub_serves_many_peers() {
    let mut world = star(sim::seed(500), 3, 20, 1, &[Shape::new(20.0, 10.0), Shape::new(10.0, 20.0)]);
    world.start();
    let up = world.run_until_true(4_000, |world| {
        (0..20).all(|slot| world.sites[0].paths_up(slot) == 2 && world.sites[slot + 1].paths_up(0) == 2)
    });
    assert!(up);
    let start = world.now;
    let stop = start.plus_ms(1_000);
    let flows: Vec<usize> = (1..=20)
        .flat_map(|spoke| [(0, spoke), (spoke, 0)])
        .map(|(from, to)| world.udp(from, to, UdpSpec::mbps(800, 1.0, start, stop)))
        .collect();
    // And from one spoke to another: the hub does not forward, and must not mix up peers.
    world.run_ms(1_500);
    world.check().unwrap();
    for flow in flows {
        let stats = world.udp_stats(flow);
        assert_eq!((stats.sent, stats.disordered), (stats.received, 0));
    }
    assert_eq!(world.totals.flows_split, 0);
}

#[test]
fn requests_are_answered_quickly_beside_a_bulk_flow() {
    let mut world = pair(sim::seed(600), (2, 2), &demo());
    join(&mut world, 3, 3_000);
    let start = world.now;
    let stop = start.plus_ms(3_000);
    world.tcp(0, 1, TcpSpec { hystart: true, start, stop, bytes: u64::MAX });
    let spec = sim::inner::request::RequestSpec {
        every_ns: 20_000_000,
        answer_packets: 3,
        start: start.plus_ms(500),
        stop,
    };
    let asked = world.request(0, 1, spec);
    world.run_ms(4_000);
    world.check().unwrap();
    let mut stats = world.request_stats(asked);
    stats.took_ns.sort_unstable();
    let p95_ms = stats.took_ns[stats.took_ns.len() * 95 / 100] / 1_000_000;
    assert!(stats.answered + 2 >= stats.asked, "{} of {}", stats.answered, stats.asked);
    // The quickest link has a round trip of 20 ms; it is full.
    assert!(p95_ms < 90, "p95 {p95_ms} ms");
}

#[test]
fn times_of_the_world_are_virtual() {
    let mut world = pair(1, (1, 1), &[Shape::new(10.0, 1.0)]);
    world.start();
    world.run_until(Time::from_ms(3_600_000));
    assert_eq!(world.now, Time::from_ms(3_600_000));
    assert_eq!(world.sites[0].paths_up(0), 1);
    assert!((25..=35).contains(&world.sites[0].handshakes(0)), "a rekey each two minutes");
}
