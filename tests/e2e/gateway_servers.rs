//! Virtual servers: real HTTP servers behind one address, while some of them die, come back or are drained.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::AsFd as _;
use std::sync::atomic::Ordering;

use control::status::{BackendStatus, ServerStatus};

use crate::gateway_clients::*;
use crate::gateway_host::other_device;
use crate::gateway_scene::*;
use crate::machine::isolated;
use crate::scene::*;

/// Where the virtual server listens: an address of the client's network that only the gateway has.
const LISTEN: &str = "10.1.1.10:80";

/// A client in network 1, backends in networks 2 to 4.
struct Farm {
    lans: Lans,
    mirrors: Vec<Option<Mirror>>,
}

impl Farm {
    fn new() -> Self {
        let lans = Lans::new(4);
        let mut farm = Self { lans, mirrors: vec![None, None, None] };
        (0..3).for_each(|number| farm.bring_back(number));
        farm
    }

    fn bring_back(&mut self, number: usize) {
        let name = format!("backend{}", number + 2);
        self.mirrors[number] = Some(Mirror::start(self.lans.host(number + 2), &name, "0.0.0.0:80"));
    }

    /// The backend's program ends; its host answers with resets.
    fn kill(&mut self, number: usize) {
        self.mirrors[number] = None;
    }

    fn start(&self, more: &str) -> Running {
        self.lans.start(&section(more))
    }

    /// Asks so often, with a new connection each time: how often each backend answered.
    #[track_caller]
    fn spread(&self, connections: usize) -> BTreeMap<String, usize> {
        let mut count = BTreeMap::new();
        for _ in 0..connections {
            *count.entry(ask_tcp(self.lans.host(1), LISTEN).name).or_insert(0) += 1;
        }
        count
    }
}

const BACKENDS: &str = "backends = [\"10.1.2.2:80\", \"10.1.3.2:80\", \"10.1.4.2:80\"]\n";

fn section(more: &str) -> String {
    let backends = if more.contains("backends") { "" } else { BACKENDS };
    format!("{ALLOW}[[virtual-server]]\nname = \"web\"\nlisten = \"tcp {LISTEN}\"\n{backends}{more}\n")
}

const HEALTH: &str = "health = { tcp = true, interval-ms = 200, timeout-ms = 200, fall = 2, rise = 2 }\n";

fn server(gateway: &Gateway) -> ServerStatus {
    services(gateway).virtual_servers[0].clone()
}

fn backend(gateway: &Gateway, number: usize) -> BackendStatus {
    server(gateway).backends[number].clone()
}

/// Rows C6, C10: every method uses all backends; the view counts each connection at its backend.
#[test]
fn c6_connections_are_spread_by_every_method() {
    isolated(|| {
        let farm = Farm::new();
        let gateway = farm.start("method = \"round-robin\"\n");
        for method in ["round-robin", "maglev", "least-connections", "source-address"] {
            assert_eq!(farm.lans.reload(&gateway, &section(&format!("method = \"{method}\"\n"))).0, 0);
            assert_eq!(server(&gateway).method, method);
            let before = server(&gateway).total_connections;
            let spread = farm.spread(48);
            if method == "source-address" {
                assert_eq!(spread.len(), 1, "a client stays with one backend: {spread:?}");
            } else {
                assert_eq!(spread.len(), 3, "{method}: {spread:?}");
            }
            if method == "round-robin" {
                // Each core has its own turn.
                assert!(spread.values().all(|count| (8..=24).contains(count)), "{spread:?}");
            }
            wait_for("48 connections more", PATIENCE, || server(&gateway).total_connections - before == 48);
            assert!(curl(farm.lans.host(1), "10.1.1.10").is_ok());
        }
        no_reply_went_astray(&gateway);
    });
}

/// Row C6: weights are shares, and a backend of weight 0 gets nothing; both can be changed by command.
#[test]
fn c6_weights_are_shares() {
    isolated(|| {
        let farm = Farm::new();
        let gateway = farm.start(
            "backends = [{ address = \"10.1.2.2:80\", weight = 9 }, \"10.1.3.2:80\", \
             { address = \"10.1.4.2:80\", weight = 0 }]\n",
        );
        let spread = farm.spread(100);
        assert_eq!(spread.get("backend4"), None, "{spread:?}");
        assert!(spread["backend2"] > 3 * spread.get("backend3").copied().unwrap_or(0), "{spread:?}");
        for (name, weight) in [("10.1.2.2:80", "0"), ("10.1.4.2:80", "1")] {
            assert_eq!(gateway.command(&["backend", "weight", "web", name, weight]).0, 0);
        }
        let spread = farm.spread(60);
        assert!(spread.len() == 2 && !spread.contains_key("backend2"), "{spread:?}");
        assert_eq!(gateway.command(&["backend", "weight", "web", "10.9.9.9:80", "1"]).0, 1);
    });
}

/// Row C6: a backend dies while connections come all the time. Its health check notices, nothing new goes there, those of
/// the others do not notice; when it comes back it gets its share again.
#[test]
fn c6_a_backend_dies_under_load_and_comes_back() {
    isolated(|| {
        let mut farm = Farm::new();
        let gateway = farm.start(HEALTH);
        let mut talks: Vec<Talk> = (0..12).map(|_| Talk::open(farm.lans.host(1), LISTEN).unwrap()).collect();
        let client = farm.lans.host(1).clone();
        let load = Background::start(move |end| {
            let mut asked = 0;
            while !end.load(Ordering::Relaxed) {
                // Some fail until the check has noticed.
                let _ = Talk::open(&client, LISTEN);
                asked += 1;
            }
            asked
        });
        farm.kill(0);
        wait_for("the check notices", PATIENCE, || backend(&gateway, 0).state == "down");
        assert!(!backend(&gateway, 0).reason.is_empty());
        let spread = farm.spread(40);
        assert!(spread.len() == 2 && !spread.contains_key("backend2"), "{spread:?}");
        for talk in &mut talks {
            assert!(talk.answer.name == "backend2" || talk.echo(10_000).is_ok(), "{:?} broke", talk.answer);
        }
        farm.bring_back(0);
        wait_for("it is up again", PATIENCE, || backend(&gateway, 0).state == "up");
        assert_eq!(farm.spread(60).len(), 3);
        assert!(load.finish() > 0);
        no_reply_went_astray(&gateway);
    });
}

/// Row C6: when no backend is left clients are refused and the reason is counted; nothing hangs afterwards.
#[test]
fn c6_without_backends_clients_are_refused() {
    isolated(|| {
        let mut farm = Farm::new();
        let gateway = farm.start(HEALTH);
        (0..3).for_each(|number| farm.kill(number));
        wait_for("all down", PATIENCE, || server(&gateway).backends.iter().all(|b| b.state == "down"));
        assert!(curl_for(farm.lans.host(1), "10.1.1.10", 2).is_err());
        wait_for("refusals are counted", PATIENCE, || server(&gateway).refused_connections > 0);
        farm.bring_back(1);
        wait_for("one is up", PATIENCE, || backend(&gateway, 1).state == "up");
        assert_eq!(farm.spread(10).len(), 1);
    });
}

/// Row C6: checks by HTTP and by a command of the operator.
#[test]
fn c6_health_by_http_and_by_command() {
    isolated(|| {
        let farm = Farm::new();
        let gateway = farm.start("health = { http = \"/health\", interval-ms = 200, timeout-ms = 200 }\n");
        let up = || server(&gateway).backends.iter().all(|backend| backend.state == "up");
        wait_for("HTTP finds them up", PATIENCE, up);
        let wrong = "health = { http = \"/health\", status = [404], interval-ms = 200, timeout-ms = 200 }\n";
        assert_eq!(farm.lans.reload(&gateway, &section(wrong)).0, 0);
        let down = || server(&gateway).backends.iter().all(|backend| backend.state == "down");
        wait_for("another status is down", PATIENCE, down);
        let flag = farm.lans.scene.directory.path().join("flag");
        let command = format!(
            "health = {{ command = [\"/usr/bin/test\", \"-e\", \"{}\"], interval-ms = 200, timeout-ms = 200 }}\n",
            flag.display()
        );
        std::fs::write(&flag, "").unwrap();
        // The command is another user's.
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o711);
        std::fs::set_permissions(farm.lans.scene.directory.path(), open).unwrap();
        assert_eq!(farm.lans.reload(&gateway, &section(&command)).0, 0);
        wait_for("the command finds them up", PATIENCE, up);
        std::fs::remove_file(&flag).unwrap();
        wait_for("the command finds them down", PATIENCE, down);
    });
}

/// Row C6: programs of the gateway itself, and a server behind another device of it, as a container, are backends like others, with
/// every `source`: for clients of both sides and for the gateway.
#[test]
fn c6_backends_on_the_gateway_itself() {
    isolated(|| {
        let lans = Lans::new(2);
        let place = lans.gateway();
        let away = other_device(place, 8);
        shell(place, "sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1");
        let _here = Mirror::start(place, "here", "[::]:8080");
        let _other = Mirror::start(lans.host(2), "other", "[::]:8080");
        let _box = Mirror::start(&away, "box", "[::]:8080");
        let mut servers = "[[nat]]\nout = \"lan2\"\n".to_owned();
        for (port, source) in (80..).zip(["none", "port-only", "address-and-port"]) {
            for (at, to) in [
                ("10.1.2.1", "\"10.1.1.1:8080\", \"10.1.2.1:8080\", \"10.1.2.2:8080\", \"10.8.0.2:8080\""),
                ("[fd00:1:1::1]", "\"[fd00:1:1::1]:8080\", \"[fd00:1:2::2]:8080\", \"[fd00:8::2]:8080\""),
            ] {
                servers += &format!(
                    "[[virtual-server]]\nname = \"{at} {source}\"\nlisten = \"tcp {at}:{port}\"\nsource = \"{source}\"\n\
                     method = \"round-robin\"\nbackends = [{to}]\nhealth = {{ tcp = true }}\n"
                );
            }
        }
        let gateway = lans.start(&format!("{ALLOW}{servers}"));
        for (from, port) in [1, 2, 0].into_iter().flat_map(|from| [80, 81, 82].map(|port| (from, port))) {
            let client = if from == 0 { place } else { lans.host(from) };
            for (at, all) in [("10.1.2.1", 3), ("[fd00:1:1::1]", 3)] {
                let mut seen = BTreeSet::new();
                for _ in 0..12 {
                    let mut talk = Talk::open(client, &format!("{at}:{port}")).unwrap();
                    talk.echo(20_000).unwrap();
                    seen.insert(talk.answer.name);
                }
                assert_eq!(seen.len(), all, "{at}:{port} from {from}: {seen:?}");
            }
        }
        no_reply_went_astray(&gateway);
    });
}

/// Row C6: drained by command, a backend keeps its connections and gets no new one.
#[test]
fn c6_drain_keeps_what_lives() {
    isolated(|| {
        let farm = Farm::new();
        let gateway = farm.start("method = \"round-robin\"\n");
        let mut talks: Vec<Talk> = (0..12).map(|_| Talk::open(farm.lans.host(1), LISTEN).unwrap()).collect();
        assert!(talks.iter().any(|talk| talk.answer.name == "backend3"));
        assert_eq!(gateway.command(&["backend", "drain", "web", "10.1.3.2:80"]).0, 0);
        assert_eq!(backend(&gateway, 1).state, "draining");
        let spread = farm.spread(30);
        assert!(spread.len() == 2 && !spread.contains_key("backend3"), "{spread:?}");
        for talk in &mut talks {
            talk.echo(50_000).unwrap();
        }
        // Over a reload as well.
        assert_eq!(gateway.command(&["reload"]).0, 0);
        assert!(!farm.spread(20).contains_key("backend3"));
        for talk in &mut talks {
            talk.echo(50_000).unwrap();
        }
        assert_eq!(gateway.command(&["backend", "enable", "web", "10.1.3.2:80"]).0, 0);
        assert_eq!(farm.spread(30).len(), 3);
        assert_eq!(gateway.command(&["backend", "drain", "nobody", "10.1.3.2:80"]).0, 1);
    });
}

/// Row C6: a backend drains for its time, `backend drain` says what is left, and then both ends of what is left learn at once
/// that it is over.
#[test]
fn c6_drain_has_its_time() {
    isolated(|| {
        let farm = Farm::new();
        let gateway = farm.start("method = \"round-robin\"\ndrain-seconds = 4\n");
        let mut talks: Vec<Talk> = (0..12).map(|_| Talk::open(farm.lans.host(1), LISTEN).unwrap()).collect();
        let (code, text) = gateway.command(&["backend", "drain", "web", "10.1.3.2:80"]);
        let on_it = talks.iter().filter(|talk| talk.answer.name == "backend3").count();
        let expected =
            format!("10.1.3.2:80 of web drains: {on_it} live connections; what is left is reset in ");
        assert!(code == 0 && text.starts_with(&expected), "{text}");
        for talk in &mut talks {
            talk.echo(5_000).unwrap();
        }
        assert!(gateway.command(&["status"]).1.contains("the rest ends in "));
        wait_for("the end of the rest", PATIENCE, || backend(&gateway, 1).live_connections == 0);
        for talk in &mut talks {
            let ended = talk.answer.name == "backend3";
            let error = talk.echo(5_000).err().map(|error| error.kind());
            assert_eq!(error, ended.then_some(std::io::ErrorKind::ConnectionReset), "{}", talk.answer.name);
        }
        let at_backend = shell(farm.lans.host(3), "ss -Htn state established");
        assert_eq!(at_backend.trim(), "", "the backend was told too");
        let (_, text) = gateway.command(&["backend", "drain", "web", "10.1.3.2:80"]);
        assert!(text.contains("0 live connections; nothing is left"), "{text}");
    });
}

/// Rows C2, C3, C4, C6: what backends see. With the client's own address the reply's tuple differs from the request's, arrives
/// at another core about every second time, and is handed to its owner.
#[test]
fn c2_c3_c4_c6_source_modes_of_a_virtual_server() {
    isolated(|| {
        let farm = Farm::new();
        let gateway = farm.start("source = \"address-and-port\"\n");
        for (mode, own) in [("address-and-port", false), ("port-only", true), ("none", true)] {
            assert_eq!(farm.lans.reload(&gateway, &section(&format!("source = \"{mode}\"\n"))).0, 0);
            let before = handed_over(&gateway);
            let mut demanded = false;
            for _ in 0..40 {
                let mut talk = Talk::open(farm.lans.host(1), LISTEN).unwrap();
                talk.echo(20_000).unwrap();
                let backend: usize = talk.answer.name.trim_start_matches("backend").parse().unwrap();
                let expected = if own { host_ip(1) } else { gateway_ip(backend) };
                assert_eq!(talk.answer.source.ip(), expected, "{mode}");
                if mode == "none" {
                    assert_eq!(talk.answer.source, talk.local);
                    let told = explain(&gateway, &format!("tcp {} > {LISTEN}", talk.local));
                    demanded |= told.reply_core != Some(told.core);
                }
            }
            // With few backends the hash may happen to name the same core for all.
            let handed = handed_over(&gateway) - before;
            assert_eq!(demanded, handed > 0, "{mode}: {handed} packets handed over");
            no_reply_went_astray(&gateway);
        }
    });
}

/// Rows C2, C6: a virtual server shows its backends an address that it has for that, and no other one.
#[test]
fn c2_c6_a_virtual_server_has_addresses_for_its_backends() {
    isolated(|| {
        let farm = Farm::new();
        let gateway =
            farm.start("source-addresses = [\"10.1.2.40\", \"10.1.2.41\"]\nbackends = [\"10.1.2.2:80\"]\n");
        let seen: BTreeSet<String> =
            (0..20).map(|_| ask_tcp(farm.lans.host(1), LISTEN).source.ip().to_string()).collect();
        assert!(
            seen.iter().all(|address| ["10.1.2.40", "10.1.2.41"].contains(&address.as_str())),
            "{seen:?}"
        );
        no_reply_went_astray(&gateway);
    });
}

/// Row C6: limits of a server and of a backend hold, and what is refused is counted.
#[test]
fn c6_connection_limits() {
    isolated(|| {
        let farm = Farm::new();
        let gateway = farm.start("connections-max = 4\n");
        let talks: Vec<Talk> = (0..4).map(|_| Talk::open(farm.lans.host(1), LISTEN).unwrap()).collect();
        assert!(curl_for(farm.lans.host(1), "10.1.1.10", 1).is_err());
        wait_for("the limit is counted", PATIENCE, || server(&gateway).refused_connections > 0);
        wait_for("four connections", PATIENCE, || server(&gateway).live_connections == 4);
        drop(talks);
        // Connections that are over are remembered for what comes late, and take no room.
        wait_for("four are over", PATIENCE, || {
            let server = server(&gateway);
            let over: u64 = server.backends.iter().map(|backend| backend.over_connections).sum();
            (server.live_connections, over) == (0, 4)
        });
        assert!(curl(farm.lans.host(1), "10.1.1.10").is_ok());
        // A full backend is passed over.
        let one = "backends = [{ address = \"10.1.2.2:80\", connections-max = 1 }, \"10.1.3.2:80\"]\n";
        assert_eq!(farm.lans.reload(&gateway, &section(one)).0, 0);
        let talks: Vec<Talk> = (0..16).map(|_| Talk::open(farm.lans.host(1), LISTEN).unwrap()).collect();
        let at_first = talks.iter().filter(|talk| talk.answer.name == "backend2").count();
        assert!(at_first <= 1, "{at_first} connections at a backend that takes one");
    });
}

/// Row C6: limits of backends with HTTP clients: each backend gets what it may have, the rest is refused, and what ends makes
/// room at once.
#[test]
fn c6_each_backend_gets_what_it_may_have() {
    isolated(|| {
        let farm = Farm::new();
        let limited =
            |number: u8, max: u8| format!("{{ address = \"10.1.{number}.2:80\", connections-max = {max} }}");
        let gateway = farm.start(&format!(
            "backends = [{}, {}, {}]\nmethod = \"least-connections\"\n",
            limited(2, 1),
            limited(3, 4),
            limited(4, 7)
        ));
        let mut talks: Vec<Talk> = (0..12).map(|_| Talk::open(farm.lans.host(1), LISTEN).unwrap()).collect();
        let mut shares = BTreeMap::new();
        for talk in &talks {
            *shares.entry(talk.answer.name.clone()).or_insert(0) += 1;
        }
        let shares: Vec<(&str, i32)> = shares.iter().map(|(name, count)| (name.as_str(), *count)).collect();
        assert_eq!(shares, [("backend2", 1), ("backend3", 4), ("backend4", 7)]);
        assert!(curl_for(farm.lans.host(1), "10.1.1.10", 1).is_err());
        let place = talks.iter().position(|talk| talk.answer.name == "backend3").unwrap();
        drop(talks.remove(place));
        wait_for("one is over", PATIENCE, || backend(&gateway, 1).live_connections == 3);
        // The only one with room, again and again.
        for _ in 0..5 {
            assert_eq!(curl(farm.lans.host(1), "10.1.1.10").unwrap().name, "backend3");
            wait_for("it is over", PATIENCE, || backend(&gateway, 1).live_connections == 3);
        }
        assert!(backend(&gateway, 1).over_connections > 0, "remembered all the same");
    });
}

/// Row C6: a backend that comes back begins with a small share of HTTP requests, and has its whole one in the end.
#[test]
fn c6_slow_start() {
    isolated(|| {
        let mut farm = Farm::new();
        let slow =
            |seconds: u16| format!("{HEALTH}method = \"round-robin\"\nslow-start-seconds = {seconds}\n");
        let gateway = farm.start(&slow(300));
        let shares = |farm: &Farm| -> Vec<usize> {
            let mut count = BTreeMap::new();
            for _ in 0..60 {
                *count.entry(curl(farm.lans.host(1), "10.1.1.10").unwrap().name).or_insert(0) += 1;
            }
            (2..=4).map(|number| count.get(&format!("backend{number}")).copied().unwrap_or(0)).collect()
        };
        // At the start of the gateway all have their whole share at once.
        let states: Vec<String> = (0..3).map(|number| backend(&gateway, number).state).collect();
        assert_eq!(states, ["up"; 3]);
        assert_eq!(shares(&farm), [20, 20, 20]);
        farm.kill(1);
        wait_for("backend3 is down", PATIENCE, || backend(&gateway, 1).state == "down");
        assert_eq!(shares(&farm), [30, 0, 30]);
        farm.bring_back(1);
        wait_for("backend3 is back", PATIENCE, || backend(&gateway, 1).state == "slow-start");
        // A tenth of the weight at first, two tenths from the 34th second on: 3 to 6 of 60 by weight.
        let begun = shares(&farm);
        assert_eq!(backend(&gateway, 1).state, "slow-start");
        assert!((1..=12).contains(&begun[1]) && begun[0] >= 20 && begun[2] >= 20, "{begun:?}");
        // Without a slow start it is complete.
        assert_eq!(farm.lans.reload(&gateway, &section(&slow(0))).0, 0);
        wait_for("backend3 is up", PATIENCE, || backend(&gateway, 1).state == "up");
        wait_for("its whole share", PATIENCE, || shares(&farm) == [20, 20, 20]);
    });
}

/// Row C6: UDP servers over IPv4, TCP servers over IPv6.
#[test]
fn c6_udp_and_ipv6() {
    isolated(|| {
        let farm = Farm::new();
        let mirrors: Vec<Mirror> =
            (2..=4).map(|n| Mirror::start(farm.lans.host(n), &format!("b{n}"), "[::]:81")).collect();
        let _dns: Vec<Dns> =
            (2..=4).map(|number| Dns::start(farm.lans.host(number), host_ip(number))).collect();
        let gateway = farm.lans.start(&format!(
            "{ALLOW}[[virtual-server]]\nlisten = \"udp 10.1.1.10:53\"\n\
             backends = [\"10.1.2.2:53\", \"10.1.3.2:53\", \"10.1.4.2:53\"]\n\
             [[virtual-server]]\nlisten = \"tcp 10.1.1.10:53\"\nbackends = [\"10.1.2.2:53\"]\n\
             [[virtual-server]]\nlisten = \"udp 10.1.1.10:80\"\nbackends = [\"10.1.2.2:80\", \"10.1.3.2:80\"]\n\
             [[virtual-server]]\nlisten = \"tcp [fd00:1:1::10]:80\"\nsource = \"none\"\n\
             backends = [\"[fd00:1:2::2]:81\", \"[fd00:1:3::2]:81\", \"[fd00:1:4::2]:81\"]\n"
        ));
        let client = farm.lans.host(1);
        resolve(client, "10.1.1.10");
        let mut names = BTreeMap::new();
        for _ in 0..30 {
            let udp = UdpClient::new(client, "0.0.0.0:0");
            let first = udp.ask(LISTEN, 64);
            assert_eq!(first, udp.ask(LISTEN, 64), "a UDP flow stays with its backend");
            *names.entry(first.name).or_insert(0) += 1;
            let talk = Talk::open(client, "[fd00:1:1::10]:80").unwrap();
            assert_eq!(talk.answer.source, talk.local);
            *names.entry(talk.answer.name).or_insert(0) += 1;
        }
        assert_eq!(names.len(), 5, "{names:?}");
        no_reply_went_astray(&gateway);
        drop(mirrors);
    });
}

/// Row C6: a backend falls silent. When it counts as down, its UDP clients move with the port that they have, and its TCP clients
/// are reset though they only wait; one that refuses checks keeps its connections.
#[test]
fn c6_a_silent_backend_loses_its_flows() {
    isolated(|| {
        let mut farm = Farm::new();
        let udp = format!(
            "{BACKENDS}{HEALTH}[[virtual-server]]\nlisten = \"udp {LISTEN}\"\nbackends = [\"10.1.2.2:80\", \"10.1.3.2:80\"]\n{HEALTH}"
        );
        let gateway = farm.start(&udp);
        let client = farm.lans.host(1);
        let mut talks: Vec<Talk> = (0..24).map(|_| Talk::open(client, LISTEN).unwrap()).collect();
        let sockets: Vec<(UdpClient, String)> = (0..16)
            .map(|_| {
                let socket = UdpClient::new(client, "0.0.0.0:0");
                let name = socket.ask(LISTEN, 64).name;
                (socket, name)
            })
            .collect();
        assert!(sockets.iter().any(|(_, name)| name == "backend2"));
        let drop_all =
            "nft 'table ip silent { chain in { type filter hook input priority 0; policy drop; }; }'";
        shell(farm.lans.host(2), drop_all);
        wait_for("the check notices", PATIENCE, || backend(&gateway, 0).state == "down");
        for (socket, _) in &sockets {
            assert_eq!(socket.ask(LISTEN, 64).name, "backend3");
        }
        let mut reset = 0;
        for talk in &mut talks {
            if talk.answer.name == "backend2" {
                let error = talk.wait().unwrap_err();
                assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
                reset += 1;
            } else {
                talk.echo(1_000).unwrap();
            }
        }
        assert!(reset > 0);
        wait_for("none is counted any more", PATIENCE, || backend(&gateway, 0).live_connections == 0);
        // Its host lives and refuses: connections that it still has may be ended in order.
        farm.kill(1);
        wait_for("the check notices", PATIENCE, || backend(&gateway, 1).state == "down");
        assert_eq!(farm.spread(10).len(), 1);
    });
}

/// Row C6: whether connections to a backend that goes down are reset is configured. One that refuses its checks loses those that it
/// has where that is said; one that is silent keeps them where it is said, though by default it loses them.
#[test]
fn c6_what_becomes_of_connections_to_a_backend_that_is_down() {
    isolated(|| {
        let farm = Farm::new();
        // Checks go to another port: one that refuses them still has its connections.
        let down = |reset: &str, port: u16| {
            section(&format!(
                "backends = [\"10.1.2.2:80\"]\nreset-on-down = \"{reset}\"\n{}",
                HEALTH.replace("tcp = true", &format!("tcp = true, port = {port}"))
            ))
        };
        let gateway = farm.lans.start(&down("silent", 80));
        let client = farm.lans.host(1);
        let state = |wanted: &str| wait_for(wanted, PATIENCE, || backend(&gateway, 0).state == wanted);
        shell(
            farm.lans.host(2),
            "nft 'table ip silent { chain in { type filter hook input priority 0; tcp dport 82 drop; }; }'",
        );
        // Port 81 refuses, port 82 says nothing.
        for (reset, port, lives) in
            [("silent", 81, true), ("always", 81, false), ("silent", 82, false), ("never", 82, true)]
        {
            assert_eq!(farm.lans.reload(&gateway, &down(reset, 80)).0, 0);
            state("up");
            let mut talk = Talk::open(client, LISTEN).unwrap();
            assert_eq!(farm.lans.reload(&gateway, &down(reset, port)).0, 0);
            state("down");
            if lives {
                // Long enough for a core to go through its flows.
                std::thread::sleep(std::time::Duration::from_millis(500));
                talk.echo(10_000).unwrap();
            } else {
                let error = talk.wait().unwrap_err();
                assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{reset} {port}");
            }
        }
    });
}

/// Row C6: the host's own programs reach a virtual server by TCP, UDP and IPv6, and nothing of that is left at the end.
#[test]
fn c6_the_gateway_itself_is_a_client() {
    isolated(|| {
        let farm = Farm::new();
        let _v6 = Mirror::start(farm.lans.host(2), "six", "[::]:81");
        // As careful as a host may be: answers have to pass its strict reverse-path filter and its firewall.
        shell(farm.lans.gateway(), "sysctl -qw net.ipv4.conf.all.rp_filter=1");
        shell(
            farm.lans.gateway(),
            "nft 'table inet h { chain in { type filter hook input priority 0; policy drop; ct state established accept; \
             iifname lo accept; meta l4proto ipv6-icmp accept; }; }'",
        );
        let gateway = farm.start(&format!(
            "{BACKENDS}{HEALTH}[[virtual-server]]\nlisten = \"udp {LISTEN}\"\nbackends = [\"10.1.2.2:80\"]\n\
             [[virtual-server]]\nlisten = \"tcp [fd00:1:1::10]:80\"\nbackends = [\"[fd00:1:2::2]:81\"]\n"
        ));
        let host = farm.lans.gateway();
        assert!(curl(host, "10.1.1.10").unwrap().name.starts_with("backend"));
        let mut talk = Talk::open(host, LISTEN).unwrap();
        talk.echo(1_000_000).unwrap();
        assert_eq!(ask_udp(host, LISTEN).name, "backend2");
        assert_eq!(ask_tcp(host, "[fd00:1:1::10]:80").name, "six");
        // Another port of the address is the host's own.
        let own = Mirror::start(host, "own", "10.1.1.10:81");
        assert_eq!(ask_tcp(host, "10.1.1.10:81").name, "own");
        drop(own);
        assert!(curl(farm.lans.host(1), "10.1.1.10").is_ok());
        drop(gateway);
        assert!(curl_for(host, "10.1.1.10", 2).is_err());
    });
}

/// Row C6: what the host asks of its own virtual servers is nothing new from outside: a gateway that drops that answers its host.
#[test]
fn c6_the_gateway_itself_is_a_client_where_nothing_new_is_allowed() {
    isolated(|| {
        let farm = Farm::new();
        let allowed = section(HEALTH);
        let sections = allowed.replace("default-action = \"allow\"", "default-action = \"drop\"");
        assert_ne!(sections, allowed);
        let gateway = farm.lans.start(&sections);
        wait_for("a backend is up", PATIENCE, || backend(&gateway, 0).state == "up");
        assert!(curl(farm.lans.gateway(), "10.1.1.10").unwrap().name.starts_with("backend"));
        assert!(curl_for(farm.lans.host(1), "10.1.1.10", 1).is_err());
        assert!(dropped(&gateway, "default-drop") > 0);
    });
}

/// Row C6: checks by DNS, by a datagram and on another port find who answers.
#[test]
fn c6_health_of_datagram_services() {
    isolated(|| {
        let farm = Farm::new();
        let _dns = Dns::start(farm.lans.host(2), host_ip(2));
        let check = |health: &str| {
            format!(
                "{ALLOW}[[virtual-server]]\nname = \"web\"\nlisten = \"udp 10.1.1.10:53\"\n\
                 backends = [\"10.1.2.2:53\", \"10.1.3.2:53\"]\n\
                 health = {{ {health}, interval-ms = 200, timeout-ms = 200, fall = 2, rise = 2 }}\n"
            )
        };
        let gateway = farm.lans.start(&check("dns = \"name.test\""));
        let states = |first: &str, second: &str| {
            backend(&gateway, 0).state == first && backend(&gateway, 1).state == second
        };
        wait_for("one has a name server", PATIENCE, || states("up", "down"));
        resolve_udp(farm.lans.host(1), "10.1.1.10");
        for health in [
            "udp = \"ping\", body = \"ping\", port = 80",
            "tcp = true, port = 80",
            "http = \"/\", port = 80, body = \"backend\"",
        ] {
            assert_eq!(farm.lans.reload(&gateway, &check(health)).0, 0);
            wait_for(health, PATIENCE, || states("up", "up"));
            let nobody = health.replace("80", "82");
            assert_eq!(farm.lans.reload(&gateway, &check(&nobody)).0, 0);
            wait_for(&nobody, PATIENCE, || states("down", "down"));
        }
    });
}

/// Row C6: a client that comes from another port each time stays with its backend, with every method.
#[test]
fn c6_clients_stay_by_their_address() {
    isolated(|| {
        let farm = Farm::new();
        let gateway = farm.start("");
        for method in ["round-robin", "maglev", "least-connections"] {
            let text = format!("method = \"{method}\"\naffinity = \"source-address\"\n");
            assert_eq!(farm.lans.reload(&gateway, &section(&text)).0, 0);
            assert_eq!(farm.spread(24).len(), 1, "{method}");
            assert_eq!(farm.lans.reload(&gateway, &section("")).0, 0);
            assert!(farm.spread(24).len() > 1);
        }
    });
}

/// Row C6: direct return. The backends hold the server's address themselves, get the client's packets with only the hardware
/// address changed, and answer over a cable of their own.
#[test]
fn c6_direct_return() {
    isolated(|| {
        let farm = Farm::new();
        for number in 2..=4 {
            let (client, backend) = (farm.lans.host(1), farm.lans.host(number));
            let cable = format!("direct{number}");
            backend.netlink().unwrap().add_veth(&cable, &cable, Some(client.namespace().as_fd())).unwrap();
            shell(client, &format!("ip addr add 10.9.{number}.1/24 dev {cable} && ip link set {cable} up"));
            shell(
                backend,
                &format!(
                    "ip addr add 10.9.{number}.2/24 dev {cable} && ip link set {cable} up && \
                     ip link set lo up && ip addr add 10.1.1.10/32 dev lo && \
                     ip route add 10.1.1.2 via 10.9.{number}.1"
                ),
            );
        }
        let gateway = farm.start("delivery = \"direct-return\"\nmethod = \"round-robin\"\n");
        let mut talks: Vec<Talk> = (0..12).map(|_| Talk::open(farm.lans.host(1), LISTEN).unwrap()).collect();
        for talk in &mut talks {
            assert_eq!(talk.answer.source, talk.local);
            talk.echo(20_000).unwrap();
        }
        assert_eq!(farm.spread(24).len(), 3);
        assert_eq!(server(&gateway).delivery, "direct-return");
        // Nothing of the answers came back through the gateway.
        let from_backends = settled(|| -> u64 {
            services(&gateway).interfaces[1..].iter().map(|interface| interface.rx_bytes).sum()
        });
        assert!(from_backends < 10_000, "{:?}", services(&gateway).interfaces);
    });
}
