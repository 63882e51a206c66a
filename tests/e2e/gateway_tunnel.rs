//! Tunnel and gateway in one program: the hub's NAT for tunnel clients.

use testbed::topology::Site;

use crate::gateway_clients::*;
use crate::gateway_scene::*;
use crate::machine::isolated;
use crate::scene::*;

/// Rows C2, T13: a branch with two WANs reaches servers behind the hub, which translates: they have no route to the branch. The
/// hub's WANs are interfaces of its gateway as well, and the tunnel runs over them. curl, ssh, DNS, ping, large datagrams,
/// bulk data; both directions of the bond at work.
#[test]
fn c2_t13_tunnel_clients_go_through_the_hubs_nat() {
    isolated(|| {
        let mut scene = Scene::new(&[link(80.0, 2.0), link(40.0, 4.0)]);
        let server = scene.testbed.add_host(Site::B).unwrap().node;
        shell(&server, "ip route del default && ip -6 route del default");
        let mut branch = Config::new("branch", BRANCH_IP).wan("wan0").wan("wan1");
        let mut hub = Config::new("hub", HUB_IP).node_line("listen = 4600");
        let endpoints: Vec<String> = (0..2).map(|number| scene.endpoint(Site::B, number)).collect();
        branch = branch.peer(&hub, &endpoints, &format!("{}, \"10.2.1.0/24\"", hub.own_nets()), "");
        hub = hub.peer(&branch, &[], &branch.own_nets(), "").section(
            "[gateway]\ndefault-action = \"drop\"\n\
             [[interface]]\nname = \"wan0\"\n[[interface]]\nname = \"wan1\"\n[[interface]]\nname = \"lan1\"\n\
             [[nat]]\nout = \"lan1\"\n\
             [[rule]]\naction = \"allow\"\nfrom = \"tunnel\"\n",
        );
        let (_branch, mut hub) = scene.join(&branch, &hub, 2);
        ready(&mut hub);
        let (a, b) = (scene.a(), scene.b());
        let _mirror = Mirror::start(&server, "server", "0.0.0.0:80");
        let hub_ip: std::net::IpAddr = "10.2.1.1".parse().unwrap();
        for _ in 0..8 {
            assert_eq!(ask_tcp(a, "10.2.1.2:80").source.ip(), hub_ip);
            assert_eq!(ask_udp(a, "10.2.1.2:80").source.ip(), hub_ip);
        }
        assert_eq!(curl(a, "10.2.1.2").unwrap().source.ip(), hub_ip);
        ping(a, "-c 3 10.2.1.2");
        ping(a, "-c 2 -s 4000 10.2.1.2");
        assert_eq!(UdpClient::new(a, "0.0.0.0:0").ask("10.2.1.2:80", 8_000).source.ip(), hub_ip);
        let _dns = Dns::start(&server, "10.2.1.2".parse().unwrap());
        resolve(a, "10.2.1.2");
        let ssh = Ssh::start(&server, 22);
        assert!(ssh.run(a, "10.2.1.2", "echo $SSH_CONNECTION; seq 100000").starts_with("10.2.1.1 "));
        Talk::open(a, "10.2.1.2:80").unwrap().echo(5_000_000).unwrap();
        // The hub itself is reached through the tunnel as before.
        echo(a, b, HUB_IP);
        let list = flows(&hub, "tcp port 80").flows;
        assert!(list.iter().all(|flow| flow.out == "lan1"), "{list:?}");
        assert!(peer(&hub).paths.iter().filter(|path| path.state == "up").count() == 2);
        no_reply_went_astray(&hub);
        // The server cannot begin anything: no rule lets it.
        assert!(curl_for(&server, "10.77.0.1", 1).is_err());
    });
}

/// Rows C2, T5, T6, T7, T8, T9: however the hub is told the core, flows of a tunnel client go on through its NAT and its virtual server, and
/// the replies come back: one record for each flow, at one core.
#[test]
fn c2_t5_t9_every_steering_mode_goes_on_through_the_hubs_services() {
    isolated(|| {
        let mut scene = Scene::new(&[link(80.0, 2.0), link(40.0, 4.0)]);
        let server = scene.testbed.add_host(Site::B).unwrap().node;
        shell(&server, "ip route del default && ip -6 route del default");
        let endpoints: Vec<String> = (0..2).map(|number| scene.endpoint(Site::B, number)).collect();
        let _mirror = Mirror::start(&server, "server", "0.0.0.0:80");
        let hub_ip: std::net::IpAddr = "10.2.1.1".parse().unwrap();
        for (mode, more) in [
            ("receiver-assigned", ""),
            ("receiver-assigned", "\nask-core-first = true"),
            ("per-tunnel", ""),
            ("sealed-core-id", ""),
            ("sealed-header", ""),
            ("receiver-decides", ""),
            ("session-id", ""),
        ] {
            let steering = format!("steering = \"{mode}\"{more}");
            let branch = Config::new("branch", BRANCH_IP).node_line("cores = 2").wan("wan0").wan("wan1");
            let hub = Config::new("hub", HUB_IP).node_line("listen = 4600\ncores = 2");
            let allowed = format!("{}, \"10.2.1.0/24\", \"10.9.9.9/32\"", hub.own_nets());
            let branch = branch.peer(&hub, &endpoints, &allowed, &steering);
            let hub = hub.peer(&branch, &[], &branch.own_nets(), &steering).section(
                "[gateway]\ndefault-action = \"allow\"\n[[interface]]\nname = \"lan1\"\n\
                 [[nat]]\nout = \"lan1\"\n\
                 [[virtual-server]]\nname = \"web\"\nlisten = \"tcp 10.9.9.9:8080\"\n\
                 backends = [\"10.2.1.2:80\"]\n",
            );
            let (_branch, mut hub) = scene.join(&branch, &hub, 2);
            ready(&mut hub);
            let a = scene.a();
            for _ in 0..6 {
                assert_eq!(ask_tcp(a, "10.2.1.2:80").source.ip(), hub_ip, "{mode}");
                assert_eq!(ask_udp(a, "10.2.1.2:80").source.ip(), hub_ip, "{mode}");
                ask_tcp(a, "10.9.9.9:8080");
            }
            assert_eq!(UdpClient::new(a, "0.0.0.0:0").ask("10.2.1.2:80", 8_000).source.ip(), hub_ip);
            Talk::open(a, "10.2.1.2:80").unwrap().echo(3_000_000).unwrap();
            Talk::open(a, "10.9.9.9:8080").unwrap().echo(3_000_000).unwrap();
            no_reply_went_astray(&hub);
            assert_eq!(drops(&hub, &["core-out-of-range", "auth-failed", "frame-unknown"]), 0, "{mode}");
        }
    });
}

/// Rows C2, T1: the hub's rules and NAT change by reload while a tunnel client's connections run; none breaks, and the session
/// of the tunnel is not made anew.
#[test]
fn c2_t1_reload_of_the_hubs_services_leaves_the_tunnel_alone() {
    isolated(|| {
        let mut scene = Scene::new(&[link(80.0, 2.0)]);
        let server = scene.testbed.add_host(Site::B).unwrap().node;
        let branch = Config::new("branch", BRANCH_IP).wan("wan0");
        let hub = Config::new("hub", HUB_IP).node_line("listen = 4600");
        let endpoints = [scene.endpoint(Site::B, 0)];
        let branch = branch.peer(&hub, &endpoints, &format!("{}, \"10.2.1.0/24\"", hub.own_nets()), "");
        let hub = hub
            .peer(&branch, &[], &branch.own_nets(), "")
            .section(&format!("{ALLOW}[[interface]]\nname = \"lan1\"\n[[nat]]\nout = \"lan1\"\n"));
        let text = hub.text(&scene.directory);
        let (branch, mut hub) = scene.join(&branch, &hub, 1);
        ready(&mut hub);
        let _mirror = Mirror::start(&server, "server", "0.0.0.0:80");
        let mut talks: Vec<Talk> = (0..8).map(|_| Talk::open(scene.a(), "10.2.1.2:80").unwrap()).collect();
        let before = peer(&branch).handshakes;
        let more = "[[rule]]\naction = \"drop\"\nprotocol = \"tcp\"\nport = 23\n";
        for sections in [more, "", more, ""] {
            std::fs::write(&hub.config, format!("{text}{sections}")).unwrap();
            let (code, said) = hub.command(&["reload"]);
            assert_eq!(code, 0, "{said}");
            for talk in &mut talks {
                talk.echo(20_000).unwrap();
            }
        }
        assert_eq!(peer(&branch).handshakes, before);
    });
}

/// Rows C2, T1: the address of the hub's WAN changes, which is an interface of its gateway as well: what comes to the port of
/// `listen` at the new address is the tunnel's, not taken for a packet to forward.
#[test]
fn c2_t1_the_address_that_peers_dial_changes_on_an_interface_of_the_gateway() {
    for host in ["native", "datapath"] {
        isolated(|| {
            let scene = Scene::new(&[link(80.0, 2.0)]);
            let (a, b) = (scene.a(), scene.b());
            let old = scene.testbed.addresses(Site::B, 0).ipv4.unwrap();
            let [x, y, z, _] = old.octets();
            let new = std::net::Ipv4Addr::new(x, y, z, 77);
            let hub = Config::new("hub", HUB_IP).node_line("listen = 4600");
            let branch = Config::new("branch", BRANCH_IP).wan("wan0");
            let endpoints = [format!("{old}:4600"), format!("{new}:4600")];
            let branch = branch.peer(&hub, &endpoints, &hub.own_nets(), "");
            let hub = hub.peer(&branch, &[], &branch.own_nets(), "").section(&format!(
                "[gateway]\nhost = \"{host}\"\ndefault-action = \"allow\"\n\
                 [[interface]]\nname = \"wan0\"\n[[nat]]\nout = \"wan0\"\n"
            ));
            let (branch, mut hub) = scene.join(&branch, &hub, 1);
            ready(&mut hub);
            echo(a, b, HUB_IP);
            let route = shell(b, "ip route show default");
            let route = route.lines().next().unwrap_or_default().trim();
            shell(b, &format!("ip addr del {old}/24 dev wan0 && ip addr add {new}/24 dev wan0"));
            if !route.is_empty() {
                shell(b, &format!("ip route replace {route}"));
            }
            wait_for("the bond is at the new address", PATIENCE, || {
                let _ = try_echo(a, b, HUB_IP);
                peer(&branch).paths.iter().any(|path| path.state == "up" && path.remote.contains(".77:"))
            });
            wait_for("it answers", PATIENCE, || try_echo(a, b, HUB_IP).is_ok());
        });
    }
}

/// Rows R4, R11: two tenants with equal addresses behind two peers. Both ask the same server from the same address and port; the
/// hub translates each by itself and answers each by the bond that it came by. A rule about one peer does not touch the other.
#[test]
fn r4_r11_tenants_with_equal_addresses_behind_two_peers() {
    isolated(|| {
        let mut scene = Scene::new(&[link(80.0, 2.0)]);
        let server = scene.testbed.add_host(Site::B).unwrap().node;
        let second = scene.testbed.add_host(Site::B).unwrap().node;
        let red = Config::new("red", BRANCH_IP).wan("wan0");
        let blue = Config::new("blue", BRANCH_IP);
        let hub = Config::new("hub", HUB_IP).node_line("listen = 4600");
        let allowed = format!("{}, \"10.2.1.2/32\"", hub.own_nets());
        let red = red.peer(&hub, &[scene.endpoint(Site::B, 0)], &allowed, "");
        let blue = blue.peer(&hub, &["10.2.1.1:4600".to_owned()], &allowed, "");
        let hub = hub
            .peer(&red, &[], &red.own_nets(), "tenant = \"red\"")
            .peer(&blue, &[], &blue.own_nets(), "tenant = \"blue\"")
            .section(
                "[gateway]\ndefault-action = \"drop\"\n[[tenant]]\nname = \"red\"\n[[tenant]]\nname = \"blue\"\n\
                 [[interface]]\nname = \"lan1\"\n[[nat]]\nout = \"lan1\"\n\
                 [[rule]]\naction = \"drop\"\nfrom = \"peer:blue\"\nprotocol = \"udp\"\nport = 81\n\
                 [[rule]]\naction = \"allow\"\nfrom = \"tunnel\"\n",
            );
        let mut hub = scene.start(scene.b(), &hub);
        ready(&mut hub);
        let mut branches = [scene.start(scene.a(), &red), scene.start(&second, &blue)];
        for branch in &mut branches {
            branch.wait("a path", PATIENCE, |report| paths_up(report) >= 1);
        }
        let _mirror = Mirror::start(&server, "server", "0.0.0.0:80");
        let _other = Mirror::start(&server, "server", "0.0.0.0:81");
        let clients = [scene.a(), &second].map(|node| UdpClient::new(node, &format!("{BRANCH_IP}:40000")));
        let seen = [0, 1].map(|at: usize| clients[at].ask("10.2.1.2:80", 64).source);
        assert!(seen.iter().all(|source| source.ip() == "10.2.1.1".parse::<std::net::IpAddr>().unwrap()));
        assert_ne!(seen[0], seen[1], "each has a translation of its own");
        for round in 0..6 {
            let at = round % 2;
            assert_eq!(clients[at].ask("10.2.1.2:80", 64).source, seen[at], "answered by the other's bond");
        }
        let list = flows(&hub, "udp port 80").flows;
        assert_eq!(list.len(), 2, "{list:?}");
        let tenants: std::collections::BTreeSet<_> = list.iter().map(|flow| flow.tenant.clone()).collect();
        assert_eq!(tenants.len(), 2, "{list:?}");
        // One peer's rule.
        assert_eq!(clients[0].ask("10.2.1.2:81", 64).source.ip(), seen[0].ip());
        assert!(
            clients[1].try_ask("10.2.1.2:81", 64).is_none(),
            "the rule about the blue peer has no effect"
        );
        no_reply_went_astray(&hub);
    });
}
