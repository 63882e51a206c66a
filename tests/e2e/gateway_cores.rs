//! Cores of the gateway: who owns which flow, what happens when a core goes, other ways to spread packets, the view.

use linux::testing::Halted;

use crate::gateway_scene::*;
use crate::machine::{alone, isolated};
use crate::scene::*;

const NAT: &str = "[[nat]]\nout = \"lan2\"\n";

fn talks(lans: &Lans, count: usize) -> Vec<Talk> {
    (0..count).map(|_| Talk::open(lans.host(1), "10.1.2.2:80").unwrap()).collect()
}

/// The core that owns the flow of a connection, by `status --flows`.
#[track_caller]
fn core_of(gateway: &Gateway, talk: &Talk) -> usize {
    let list = flows(gateway, &format!("tcp {}", talk.local)).flows;
    assert_eq!(list.len(), 1, "{list:?}");
    list[0].core
}

/// Rows C1, C2, C10: each core has its own flows and its share of the table, replies come to it, nothing is handed over; the
/// view tells all of it, for people and for programs.
#[test]
fn c1_c2_c10_each_core_has_its_own_flows() {
    isolated(|| {
        let lans = Lans::new(2);
        let gateway = lans.start(&format!("{ALLOW}{NAT}"));
        let _mirror = Mirror::start(lans.host(2), "server", "0.0.0.0:80");
        let mut talks = talks(&lans, 40);
        for talk in &mut talks {
            talk.echo(10_000).unwrap();
        }
        wait_for("40 flows on all cores", PATIENCE, || {
            let cores = services(&gateway).cores;
            cores.iter().map(|core| core.live_flows).sum::<u64>() >= 40
                && cores.iter().all(|core| core.live_flows > 0 && core.rx_packets > 0 && core.tx_packets > 0)
        });
        assert_eq!(handed_over(&gateway), 0);
        no_reply_went_astray(&gateway);
        assert_eq!(services(&gateway).cores.iter().map(|core| core.buckets).sum::<u32>(), 128);
        let (code, text) = gateway.command(&["status"]);
        assert!(code == 0 && text.contains("gateway core") && text.contains("address-and-port"), "{text}");
        let (code, text) = gateway.command(&["status", "--json"]);
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert!(code == 0 && json["gateway"]["cores"][0]["live_flows"].is_u64(), "{text}");
        assert_eq!(json["gateway"]["lost_nat_events"], 0, "{text}");
        let (code, text) = gateway.command(&["status", "--flows", "--match", "tcp port 80", "--limit", "5"]);
        assert!(code == 0 && text.contains("10.1.2.2:80"), "{text}");
        assert_eq!(gateway.command(&["status", "--flows", "--match", "what is this"]).0, 2);
    });
}

/// Row C10: what `explain` foretells is what happens: core, rule, translation, route; and of a live flow it tells the flow.
#[test]
fn c10_explain_agrees_with_the_flows() {
    isolated(|| {
        let lans = Lans::new(2);
        let gateway = lans.start(&format!(
            "{ALLOW}[[rule]]\nname = \"web\"\naction = \"allow\"\nprotocol = \"tcp\"\nport = 80\n\
             [[rule]]\nname = \"never\"\naction = \"drop\"\nprotocol = \"udp\"\nport = 81\n{NAT}"
        ));
        let _mirror = Mirror::start(lans.host(2), "server", "0.0.0.0:80");
        for port in 30_000..30_016 {
            let packet = format!("udp 10.1.1.2:{port} > 10.1.2.2:80");
            let before = explain(&gateway, &packet);
            assert_eq!((before.verdict.as_str(), before.out.as_str()), ("forward", "lan2"), "{before:?}");
            assert_eq!((before.nat_mode.as_str(), before.rule.as_str()), ("address-and-port", "default"));
            assert!(before.flow.is_none() && before.reply_core == Some(before.core), "{before:?}");
            let seen = UdpClient::new(lans.host(1), &format!("10.1.1.2:{port}")).ask("10.1.2.2:80", 64);
            let flow = &flows(&gateway, &format!("udp 10.1.1.2:{port}")).flows[0];
            assert_eq!((flow.core, flow.bucket), (before.core, before.bucket), "{before:?} {flow:?}");
            assert_eq!(flow.translated_source, seen.source);
            let after = explain(&gateway, &packet).flow.unwrap();
            assert_eq!((after.core, after.translated_source), (flow.core, seen.source));
            let reply = explain(&gateway, &format!("udp 10.1.2.2:80 > {}", seen.source));
            assert_eq!((reply.verdict.as_str(), reply.interface.as_str()), ("forward", "lan2"), "{reply:?}");
            assert_eq!((reply.out.as_str(), reply.core), ("lan1", flow.core), "{reply:?}");
            assert_eq!(reply.translated_destination, Some(format!("10.1.1.2:{port}").parse().unwrap()));
        }
        assert_eq!(explain(&gateway, "tcp 10.1.1.2:1234 > 10.1.2.2:80").rule, "web");
        let drop = explain(&gateway, "udp 10.1.1.2:1234 > 10.1.2.2:81");
        assert_eq!((drop.verdict.as_str(), drop.rule.as_str()), ("drop", "never"));
        assert_eq!(explain(&gateway, "tcp 10.1.1.2:1 > 10.1.1.1:22").verdict, "to the gateway");
        let nowhere = explain(&gateway, "tcp 10.1.1.2:1 > 203.0.113.9:22");
        assert_eq!((nowhere.verdict.as_str(), nowhere.drop_reason.as_str()), ("drop", "no-route"));
        // Nothing that was only asked about began: just one flow for each client.
        assert_eq!(gateway.command(&["explain", "tcp 10.1.1.2:1234 > 10.1.2.2:80"]).0, 0);
        wait_for("the clients' flows are counted", PATIENCE, || new_flows(&gateway) >= 16);
        assert_eq!(settled(|| new_flows(&gateway)), 16);
        assert_eq!(gateway.command(&["explain", "this is no packet"]).0, 1);
    });
}

/// Row C1: `status` and `explain` tell an interface's receive hash and the queue that it gives a packet to; a veth has none,
/// and both say so. Queues by a card's key and table are computed from the official vectors beside the code.
#[test]
fn c1_the_receive_hash_of_an_interface_is_told() {
    isolated(|| {
        let lans = Lans::new(2);
        let gateway = lans.start(ALLOW);
        let none = "the device has no receive hash (RSS)";
        let shown = services(&gateway).interfaces;
        assert_eq!(shown.len(), 2);
        for interface in &shown {
            let hash = &interface.nic_hash;
            assert_eq!(
                (hash.function.as_str(), hash.reason.as_str(), hash.queues),
                ("", none, 0),
                "{hash:?}"
            );
        }
        let nic = explain(&gateway, "tcp 10.1.1.2:1234 > 10.1.2.2:80").nic.unwrap();
        assert_eq!((&nic.device, nic.reason.as_str()), (&shown[0].device, none));
        assert_eq!((nic.queue, nic.queue_with_ports), (None, None));
        let (code, text) = gateway.command(&["explain", "tcp 10.1.1.2:1234 > 10.1.2.2:80"]);
        let line = format!("\nNIC         no queue of {} is known: {none}\n", shown[0].device);
        assert!(code == 0 && text.contains(&line), "{text}");
        // A packet of the gateway itself comes in by no card.
        assert!(explain(&gateway, "tcp 10.1.1.1:1234 > 10.1.2.2:80").nic.is_none());
    });
}

/// Row C7: a core is taken out of work and put back while connections run on it: none breaks, new ones go elsewhere. The
/// last one stays.
#[test]
fn c7_a_core_is_drained_while_connections_run() {
    isolated(|| {
        let lans = Lans::new(2);
        let gateway = lans.start(&format!("{ALLOW}{NAT}"));
        let _mirror = Mirror::start(lans.host(2), "server", "0.0.0.0:80");
        let mut old = talks(&lans, 24);
        let moved = old.iter().filter(|talk| core_of(&gateway, talk) == 1).count();
        assert!(moved > 0);
        let stream = Bulk::start(lans.host(1), "10.1.2.2:80", 4);
        assert_eq!(gateway.command(&["core", "drain", "1"]).0, 0);
        wait_for("core 1 has no buckets", PATIENCE, || {
            let core = services(&gateway).cores[1].clone();
            core.buckets == 0 && core.state != "active"
        });
        for talk in &mut old {
            talk.echo(50_000).unwrap();
        }
        let new = talks(&lans, 12);
        for talk in &new {
            assert_eq!(core_of(&gateway, talk), 0);
        }
        assert_eq!(gateway.command(&["core", "drain", "0"]).0, 1, "the last core must stay");
        assert_eq!(gateway.command(&["core", "drain", "77"]).0, 1);
        assert_eq!(gateway.command(&["core", "enable", "1"]).0, 0);
        wait_for("core 1 works again", PATIENCE, || {
            let core = services(&gateway).cores[1].clone();
            core.state == "active" && core.buckets > 0
        });
        let more = talks(&lans, 24);
        assert!(more.iter().any(|talk| core_of(&gateway, talk) == 1));
        for talk in old.iter_mut().chain(&mut { new }).chain(&mut { more }) {
            talk.echo(50_000).unwrap();
        }
        stream.finish();
    });
}

/// Rows C2, C7: a client with an endpoint-independent mapping keeps its outside port, for old remotes and new ones, when the
/// core that has it is taken out of work and put back.
#[test]
fn c2_c7_a_drained_core_keeps_its_mappings() {
    isolated(|| {
        let lans = Lans::new(2);
        let gateway = lans.start(&format!("{ALLOW}{NAT}mapping = \"endpoint-independent\"\n"));
        let _mirrors: Vec<Mirror> =
            (80..84).map(|port| Mirror::start(lans.host(2), "server", &format!("0.0.0.0:{port}"))).collect();
        let clients: Vec<UdpClient> = (0..20)
            .map(|number| UdpClient::new(lans.host(1), &format!("10.1.1.2:{}", 31_000 + 7 * number)))
            .collect();
        let ask = |client: &UdpClient, port: u16| client.ask(&format!("10.1.2.2:{port}"), 64).source;
        let first: Vec<_> = clients.iter().map(|client| ask(client, 80)).collect();
        wait_for("both cores have clients", PATIENCE, || {
            services(&gateway).cores.iter().all(|core| core.new_flows > 0)
        });
        for (port, command, core) in [(81, "drain", 1), (82, "enable", 1), (83, "drain", 0)] {
            assert_eq!(gateway.command(&["core", command, &core.to_string()]).0, 0);
            wait_for("the buckets move", PATIENCE, || {
                (services(&gateway).cores[core].buckets == 0) == (command == "drain")
            });
            // By then the keeper has looked for histories of buckets that nothing lives in.
            std::thread::sleep(std::time::Duration::from_secs(3));
            for (client, first) in clients.iter().zip(&first) {
                assert_eq!(ask(client, 80), *first, "a live flow was translated anew: {command} {core}");
                assert_eq!(ask(client, port), *first, "another mapping for another remote: {command} {core}");
            }
        }
    });
}

/// Row C7: a worker hangs while everything runs. Its buckets go to the others, whose flows do not notice; what comes for
/// its buckets from then on works, whoever spreads the packets. When it works again it gets buckets back, and nothing
/// that began meanwhile breaks.
#[test]
fn c7_a_worker_that_hangs_loses_its_buckets_and_gets_some_back() {
    let _alone = alone();
    isolated(|| {
        let lans = Lans::new(2);
        lans.scene.expect_error("a core hangs");
        let _mirror = Mirror::start(lans.host(2), "server", "0.0.0.0:80");
        for (distribution, worker) in [("flow", 1), ("round-robin", 1), ("interface", 0)] {
            hang(&lans, distribution, worker);
        }
    });
}

fn hang(lans: &Lans, distribution: &str, worker: usize) {
    // Each begins with an even table and no flows.
    let settings = format!("distribution = \"{distribution}\"\nkeep-flows-seconds = 0\n");
    let gateway = lans.start(&format!("{ALLOW}{settings}{NAT}"));
    let ask = |client: &UdpClient| client.ask("10.1.2.2:80", 64).source;
    let mut others: Vec<Talk> =
        talks(lans, 24).into_iter().filter(|talk| core_of(&gateway, talk) != worker).collect();
    let busy: Vec<Talk> = others.split_off(others.len() / 2);
    assert!(!others.is_empty() && !busy.is_empty());
    // Flows of the worker that will hang: old ones, and ports from which new ones will come.
    let owned = |port: &u16| explain(&gateway, &format!("udp 10.1.1.2:{port} > 10.1.2.2:80")).core == worker;
    let mut ports = (30_000..).filter(owned);
    let mut client = || UdpClient::new(lans.host(1), &format!("10.1.1.2:{}", ports.next().unwrap()));
    let old: Vec<UdpClient> = (0..4).map(|_| client()).collect();
    for client in &old {
        ask(client);
    }
    let new: Vec<UdpClient> = (0..4).map(|_| client()).collect();
    let buckets = services(&gateway).cores[worker].buckets;
    assert_eq!(buckets, 64);

    let halted = Halted::thread(gateway.program.id(), &format!("worker-{worker}")).unwrap();
    let busy = (distribution == "flow").then(|| Bulk::run(busy));
    wait_for("the buckets move", PATIENCE, || {
        let cores = services(&gateway).cores;
        cores[worker].buckets == 0 && cores[worker].state == "stopped" && cores[1 - worker].buckets == 128
    });
    // The worker still stands: nothing here can have waited for it.
    for talk in &mut others {
        talk.echo(50_000).unwrap();
    }
    let meanwhile: Vec<_> = old.iter().chain(&new).map(|client| (client, ask(client))).collect();
    let mut begun = talks(lans, 12);
    assert!(begun.iter().all(|talk| core_of(&gateway, talk) != worker));
    assert_eq!(services(&gateway).cores[worker].buckets, 0);
    assert_eq!(gateway.command(&["core", "drain", &(1 - worker).to_string()]).0, 1, "the last that works");
    drop(halted);

    wait_for("buckets come back", PATIENCE, || {
        let core = services(&gateway).cores[worker].clone();
        core.state == "active" && core.buckets > 0
    });
    // They come back a few at a time.
    let mut after = Vec::new();
    wait_for("a flow begins there", PATIENCE, || {
        after.extend(talks(lans, 8));
        after.iter().any(|talk| core_of(&gateway, talk) == worker)
    });
    for talk in others.iter_mut().chain(&mut begun).chain(&mut after) {
        talk.echo(50_000).unwrap();
    }
    for (client, source) in meanwhile {
        assert_eq!(ask(client), source, "a flow that began meanwhile was translated anew");
    }
    if let Some(busy) = busy {
        busy.finish();
    }
    no_reply_went_astray(&gateway);
}

/// Row C8: whatever spreads the packets over cores, the flows work and each has one owner; other ways than "flow" read
/// packets on cores that do not own them and hand them over, which is counted.
#[test]
fn c8_every_way_to_spread_packets() {
    isolated(|| {
        let lans = Lans::new(2);
        let _mirror = Mirror::start(lans.host(2), "server", "0.0.0.0:80");
        for distribution in ["flow", "interface", "round-robin", "random", "cpu"] {
            let gateway = lans.start(&format!("{ALLOW}distribution = \"{distribution}\"\n{NAT}"));
            let mut talks = talks(&lans, 12);
            for talk in &mut talks {
                talk.echo(100_000).unwrap();
            }
            let udp = UdpClient::new(lans.host(1), "0.0.0.0:0");
            for _ in 0..8 {
                assert_eq!(udp.ask("10.1.2.2:80", 3_000).source.ip(), gateway_ip(2), "{distribution}");
            }
            ping(lans.host(1), "-c 3 10.1.2.2");
            Talk::open(lans.host(1), "10.1.2.2:80").unwrap().echo(3_000_000).unwrap();
            let (_, text) = gateway.command(&["status"]);
            let handed = handed_over(&gateway);
            match distribution {
                // The pieces of eight large datagrams met somewhere, in both directions.
                "flow" => assert!(handed <= 48, "{text}"),
                // One processor may happen to read what it owns.
                "cpu" => {}
                _ => assert!(handed > 0, "{distribution}: {text}"),
            }
        }
    });
}

/// Row C9: cores vote by their load, and buckets move from a busy one to an idle one; no connection notices.
#[test]
fn c9_a_busy_core_gives_work_away() {
    let _alone = alone();
    isolated(|| {
        let lans = Lans::new(2);
        let gateway = lans.start(&format!("[gateway]\ndefault-action = \"allow\"\n{NAT}"));
        let _mirror = Mirror::start(lans.host(2), "server", "0.0.0.0:80");
        let buckets = services(&gateway).cores[0].buckets;
        // Only flows of core 0 are busy.
        let (busy, mut idle): (Vec<Talk>, Vec<Talk>) =
            talks(&lans, 40).into_iter().partition(|talk| core_of(&gateway, talk) == 0);
        assert!(busy.len() > 4 && idle.len() > 4);
        let busy = Bulk::run(busy);
        wait_for("buckets leave core 0", 60.0, || services(&gateway).cores[0].buckets < buckets);
        for talk in &mut idle {
            talk.echo(50_000).unwrap();
        }
        busy.finish();
        assert_eq!(services(&gateway).cores.iter().map(|core| core.buckets).sum::<u32>(), 128);
    });
}

/// Row C1: one core alone does everything too, and IPv6 and other protocols than TCP and UDP have an owner.
#[test]
fn c1_one_core_alone() {
    isolated(|| {
        let lans = Lans::new(2);
        let sections = format!("{ALLOW}{NAT}");
        let text = lans.text(&sections).replace("name = \"gw\"", "name = \"gw\"\ncores = 1");
        let mut gateway = Gateway::start(lans.gateway(), &lans.scene.directory, "gw", &text);
        ready(&mut gateway);
        let _mirror = Mirror::start(lans.host(2), "server", "0.0.0.0:80");
        for talk in &mut talks(&lans, 8) {
            talk.echo(20_000).unwrap();
        }
        ping(lans.host(1), "-c 2 10.1.2.2");
        ping(lans.host(1), "-c 2 fd00:1:2::2");
        assert_eq!((services(&gateway).cores.len(), handed_over(&gateway)), (1, 0));
    });
}
