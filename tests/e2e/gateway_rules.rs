//! The firewall, its groups, tenants with the same addresses, leases of ports.

use crate::gateway_scene::*;
use crate::machine::isolated;
use crate::scene::*;

const RULES: &str = "[gateway]\ndefault-action = \"drop\"\ncore-rebalance = false\n\
    [[group]]\nname = \"blocked\"\nmembers = []\n\
    [[group]]\nname = \"servers\"\nmembers = [\"10.1.2.2\"]\n\
    [[rule]]\nname = \"blocked\"\naction = \"drop\"\nfrom = \"blocked\"\n\
    [[rule]]\nname = \"web\"\naction = \"allow\"\nfrom = \"lan1\"\nto = \"servers\"\nprotocol = \"tcp\"\nport = [80, \"90-99\"]\n\
    [[rule]]\nname = \"no telnet\"\naction = \"reject\"\nfrom = \"lan1\"\nprotocol = \"tcp\"\nport = 23\n\
    [[rule]]\nname = \"echo\"\naction = \"allow\"\nprotocol = \"icmp\"\nfrom = \"lan1\"\n";

fn matched(gateway: &Gateway, rule: &str) -> u64 {
    services(gateway).rules.iter().find(|entry| entry.name == rule).unwrap().matched_flows
}

/// Rows R5, C10: the first rule that matches decides about new flows; answers pass; drops and rejects are counted, and each
/// rule counts its flows.
#[test]
fn r5_rules_decide_about_new_flows() {
    isolated(|| {
        let lans = Lans::new(3);
        let gateway = lans.start(RULES);
        let (client, server) = (lans.host(1), lans.host(2));
        let _web = Mirror::start(server, "web", "0.0.0.0:80");
        let _range = Mirror::start(server, "range", "0.0.0.0:95");
        let _other = Mirror::start(server, "other", "0.0.0.0:8080");
        let _third = Mirror::start(lans.host(3), "third", "0.0.0.0:80");
        assert_eq!(ask_tcp(client, "10.1.2.2:80").name, "web");
        assert_eq!(ask_tcp(client, "10.1.2.2:95").name, "range");
        ping(client, "-c 2 10.1.2.2");
        wait_for("two flows by the rule", PATIENCE, || matched(&gateway, "web") == 2);
        // Not these: another port, UDP, another server, the other direction.
        for (from, to) in [(client, "10.1.2.2:8080"), (client, "10.1.3.2:80"), (server, "10.1.3.2:80")] {
            assert!(curl_for(from, to, 1).is_err(), "{to} was reached");
        }
        assert!(UdpClient::new(client, "0.0.0.0:0").try_ask("10.1.2.2:80", 64).is_none());
        wait_for("drops are counted", PATIENCE, || dropped(&gateway, "default-drop") >= 4);
        // Rejected at once.
        let error = Talk::open(client, "10.1.2.2:23").err().unwrap();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
        wait_for("the rejection is counted", PATIENCE, || dropped(&gateway, "rule-reject") >= 1);
        wait_for("the rule counts it", PATIENCE, || matched(&gateway, "no telnet") == 1);
    });
}

/// Row R5: a rule names ports that clients come from, and neither their neighbours nor ports of servers are meant.
#[test]
fn r5_rules_by_the_clients_port() {
    isolated(|| {
        let lans = Lans::new(2);
        let gateway = lans.start(&format!(
            "{ALLOW}[[rule]]\nname = \"callers\"\naction = \"drop\"\nsource-port = [\"5000-5009\"]\n"
        ));
        let _web = Mirror::start(lans.host(2), "web", "0.0.0.0:5005");
        for (port, passes) in [(4_999, true), (5_000, false), (5_009, false), (5_010, true)] {
            let client = UdpClient::new(lans.host(1), &format!("0.0.0.0:{port}"));
            if passes {
                client.ask("10.1.2.2:5005", 64);
            } else {
                assert!(client.try_ask("10.1.2.2:5005", 64).is_none(), "port {port}");
            }
        }
        assert_eq!(settled(|| matched(&gateway, "callers")), 2);
    });
}

/// Row R5: where an interface is said to have strangers, nothing new comes in by it without a rule; what goes out does.
#[test]
fn r5_strangers_are_where_the_configuration_says() {
    isolated(|| {
        let lans = Lans::new(2);
        let strangers = |outside: bool| {
            format!("[[interface]]\nname = \"lan2\"\ndevice = \"lan2\"\noutside = {outside}\n")
        };
        let gateway = lans.start(&strangers(true));
        let (_in, _out) = (
            Mirror::start(lans.host(1), "inside", "0.0.0.0:80"),
            Mirror::start(lans.host(2), "outside", "0.0.0.0:80"),
        );
        assert_eq!(ask_udp(lans.host(1), "10.1.2.2:80").name, "outside");
        let stranger = UdpClient::new(lans.host(2), "0.0.0.0:0");
        assert!(stranger.try_ask("10.1.1.2:80", 64).is_none());
        wait_for("it is counted", PATIENCE, || dropped(&gateway, "default-drop") > 0);
        assert_eq!(lans.reload(&gateway, &strangers(false)).0, 0);
        stranger.ask("10.1.1.2:80", 64);
    });
}

/// Row R5: groups are changed by command while traffic runs: who is put into "blocked" is cut off at once, old flows
/// included, others notice nothing, and who is taken out may come again. The change holds over a reload.
#[test]
fn r5_groups_change_live() {
    isolated(|| {
        let lans = Lans::new(3);
        let rules = RULES.replace("from = \"lan1\"\nto", "from = [\"lan1\", \"lan3\"]\nto");
        let gateway = lans.start(&rules);
        let _web = Mirror::start(lans.host(2), "web", "0.0.0.0:80");
        let mut bad = Talk::open(lans.host(1), "10.1.2.2:80").unwrap();
        let mut good = Talk::open(lans.host(3), "10.1.2.2:80").unwrap();
        let (code, said) = gateway.command(&["group", "add", "blocked", "10.1.1.0/25", "2001:db8::/32"]);
        assert!(code == 0 && said.contains('2'), "{said}");
        good.echo(100_000).unwrap();
        assert!(curl_for(lans.host(1), "10.1.2.2", 1).is_err());
        wait_for("drops are counted", PATIENCE, || dropped(&gateway, "rule-drop") > 0);
        let blocked = settled(|| dropped(&gateway, "rule-drop"));
        std::thread::scope(|scope| {
            let stuck = scope.spawn(|| bad.echo(1_000));
            wait_for("the old flow is cut off", PATIENCE, || dropped(&gateway, "rule-drop") > blocked);
            assert_eq!(lans.reload(&gateway, &rules).0, 0);
            assert!(curl_for(lans.host(1), "10.1.2.2", 1).is_err(), "the change is gone after a reload");
            let (code, said) = gateway.command(&["group", "list"]);
            assert!(code == 0 && said.contains("blocked"), "{said}");
            assert_eq!(gateway.command(&["group", "remove", "blocked", "10.1.1.0/25"]).0, 0);
            // Its segments are sent again and again, and now they pass.
            stuck.join().unwrap().unwrap();
        });
        assert!(curl(lans.host(1), "10.1.2.2").is_ok());
        good.echo(100_000).unwrap();
        assert_eq!(gateway.command(&["group", "add", "nobody", "10.0.0.1"]).0, 1);
        assert_eq!(gateway.command(&["group", "add", "blocked", "10.0.0.1/99"]).0, 2);
    });
}

/// Row R5: a group with very many members, some by file; every one of them counts.
#[test]
fn r5_a_large_group() {
    isolated(|| {
        let lans = Lans::new(2);
        let mut list: String = (0..50_000u32)
            .map(|n| format!("{}/32\n", std::net::Ipv4Addr::from(0x6440_0000 + 2 * n)))
            .collect();
        list.push_str("10.1.1.2 # the client\n");
        let file = lans.scene.directory.write("blocked.txt", &list).unwrap();
        let rules = |group: &str| {
            format!(
                "{ALLOW}[[group]]\nname = \"blocked\"\n{group}\n[[rule]]\naction = \"drop\"\nfrom = \"blocked\"\n"
            )
        };
        let by_file = rules(&format!("file = \"{}\"", file.display()));
        let gateway = lans.start(&by_file);
        let _web = Mirror::start(lans.host(2), "web", "0.0.0.0:80");
        assert!(curl_for(lans.host(1), "10.1.2.2", 1).is_err());
        std::fs::write(&file, list.replace("10.1.1.2 ", "10.1.1.3 ")).unwrap();
        assert_eq!(lans.reload(&gateway, &by_file).0, 0);
        assert!(curl(lans.host(1), "10.1.2.2").is_ok());
        let group = &services(&gateway).groups[0];
        assert_eq!((group.name.as_str(), group.members), ("blocked", 50_001));
    });
}

/// Two customers behind devices lan1 and lan3 with the same addresses; the Internet is lan2.
fn two_tenants() -> Lans {
    let lans = Lans::new(3);
    lans.no_default_route(2);
    // The second customer has the addresses of the first.
    shell(lans.host(3), "ip addr add 10.1.1.2/24 dev eth0 && ip addr del 10.1.3.2/24 dev eth0");
    shell(lans.host(3), "ip route replace default via 10.1.1.1");
    shell(lans.gateway(), "ip addr del 10.1.3.1/24 dev lan3");
    lans
}

const TENANTS: &str = "[gateway]\ndefault-action = \"allow\"\ncore-rebalance = false\n\
    [[tenant]]\nname = \"red\"\n[[tenant]]\nname = \"blue\"\n\
    [[interface]]\nname = \"red-lan\"\ndevice = \"lan1\"\ntenant = \"red\"\n\
    [[interface]]\nname = \"blue-lan\"\ndevice = \"lan3\"\naddress = \"10.1.1.1/24\"\ntenant = \"blue\"\n";

/// Rows R4, R11: two tenants with the same addresses share one line to the Internet. Each flow belongs to the tenant of the
/// interface it came from; every answer finds the right one.
#[test]
fn r4_r11_two_tenants_with_the_same_addresses() {
    isolated(|| {
        let lans = two_tenants();
        let gateway = lans.start(&format!("{TENANTS}[[nat]]\nout = \"lan2\"\n"));
        let _web = Mirror::start(lans.host(2), "web", "0.0.0.0:80");
        let (red, blue) = (lans.host(1), lans.host(3));
        for port in 20_000..20_010 {
            // The same addresses and ports at the same time.
            let local = format!("10.1.1.2:{port}");
            let (one, two) = (UdpClient::new(red, &local), UdpClient::new(blue, &local));
            let (at_one, at_two) = (one.ask("10.1.2.2:80", 64), two.ask("10.1.2.2:80", 64));
            assert_eq!((at_one.source.ip(), at_two.source.ip()), (gateway_ip(2), gateway_ip(2)));
            assert_ne!(at_one.source, at_two.source);
            assert_eq!((one.ask("10.1.2.2:80", 64), two.ask("10.1.2.2:80", 64)), (at_one, at_two));
        }
        let mut talks: Vec<Talk> =
            [red, blue, red, blue].map(|node| Talk::open(node, "10.1.2.2:80").unwrap()).into();
        for talk in &mut talks {
            talk.echo(200_000).unwrap();
        }
        ping(red, "-c 3 10.1.2.2");
        ping(blue, "-c 3 10.1.2.2");
        let list = flows(&gateway, "udp").flows;
        for tenant in ["red", "blue"] {
            assert_eq!(list.iter().filter(|flow| flow.tenant == tenant).count(), 10, "{tenant}: {list:?}");
        }
        assert_eq!(flows(&gateway, "tenant red udp port 20003").flows.len(), 1);
        no_reply_went_astray(&gateway);
    });
}

/// Rows R4, R11: a `[[nat]]` of one tenant is not the others'; each leaves by the address that is meant for it.
#[test]
fn r4_r11_tenants_leave_by_addresses_of_their_own() {
    isolated(|| {
        let lans = two_tenants();
        let gateway = lans.start(&format!(
            "{TENANTS}[[nat]]\nout = \"lan2\"\ntenants = [\"red\"]\naddresses = [\"10.1.2.16/32\"]\n\
             [[nat]]\nout = \"lan2\"\naddresses = [\"10.1.2.17/32\"]\n"
        ));
        let _web = Mirror::start(lans.host(2), "web", "0.0.0.0:80");
        for _ in 0..4 {
            for (number, address) in [(1, "10.1.2.16"), (3, "10.1.2.17")] {
                assert_eq!(ask_udp(lans.host(number), "10.1.2.2:80").source.ip().to_string(), address);
            }
        }
        no_reply_went_astray(&gateway);
    });
}

/// Rows R4, R11: rules of one tenant do not touch the other, and a tenant does not reach another one's network.
#[test]
fn r4_r11_tenants_are_apart() {
    isolated(|| {
        let lans = two_tenants();
        let gateway = lans.start(&format!(
            "{TENANTS}[[nat]]\nout = \"lan2\"\n\
             [[rule]]\nname = \"red only\"\naction = \"drop\"\ntenant = \"red\"\nprotocol = \"tcp\"\nport = 81\n"
        ));
        let _web = Mirror::start(lans.host(2), "web", "0.0.0.0:81");
        assert!(curl_for(lans.host(1), "10.1.2.2:81", 1).is_err());
        assert!(curl(lans.host(3), "10.1.2.2:81").is_ok());
        // The SYN, and perhaps its repetition after a second.
        wait_for("the rule is counted", PATIENCE, || matched(&gateway, "red only") >= 1);
        assert!(settled(|| matched(&gateway, "red only")) <= 2, "the other tenant's connection counts too");
        // An address that only blue has.
        shell(lans.host(3), "ip addr add 10.1.1.77/24 dev eth0");
        let _blue = Mirror::start(lans.host(3), "blue", "10.1.1.77:80");
        assert!(curl_for(lans.host(1), "10.1.1.77", 1).is_err(), "red reached blue's network");
    });
}

/// Row R1: a range of ports is handed out on request; what its holder sends has these ports, nobody else gets them, the
/// request is answered alike when repeated, and the range can be returned.
#[test]
fn r1_leases_of_ports() {
    isolated(|| {
        let lans = Lans::new(3);
        let gateway = lans.start(&format!("{ALLOW}[[nat]]\nout = \"lan2\"\n"));
        let _web = Mirror::start(lans.host(2), "web", "0.0.0.0:80");
        let take = ["lease", "take", "pod-1", "--from", "10.1.1.0/24", "--ports", "2048", "--json"];
        let (code, said) = gateway.command(&take);
        assert_eq!(code, 0, "{said}");
        let leases: Vec<control::status::LeaseReport> = serde_json::from_str(&said).unwrap();
        let lease = &leases[0];
        assert_eq!((lease.address, lease.last_port - lease.first_port), (gateway_ip(2), 2_047), "{lease:?}");
        assert_eq!(gateway.command(&take), (0, said), "the same request, the same range");
        let range = lease.first_port..=lease.last_port;
        for _ in 0..30 {
            for answer in [ask_tcp(lans.host(1), "10.1.2.2:80"), ask_udp(lans.host(1), "10.1.2.2:80")] {
                assert!(range.contains(&answer.source.port()), "{answer:?} is not in {range:?}");
            }
            for answer in [ask_tcp(lans.host(3), "10.1.2.2:80"), ask_udp(lans.host(3), "10.1.2.2:80")] {
                assert!(!range.contains(&answer.source.port()), "{answer:?} is in {range:?}");
            }
        }
        no_reply_went_astray(&gateway);
        assert_eq!(services(&gateway).leases.len(), 1);
        let other = ["lease", "take", "pod-2", "--from", "10.1.3.0/24"];
        assert_eq!(gateway.command(&other).0, 0);
        assert_eq!(services(&gateway).leases.len(), 2);
        assert_eq!(
            gateway.command(&["lease", "take", "pod-3", "--from", "10.9.0.0/24", "--ports", "99999"]).0,
            1
        );
        assert_eq!(gateway.command(&["lease", "return", "pod-1"]).0, 0);
        assert_eq!(gateway.command(&["lease", "return", "pod-1"]).0, 1);
        assert_eq!(services(&gateway).leases.len(), 1);
        assert!(curl(lans.host(1), "10.1.2.2").is_ok());
    });
}

/// Row R1: leases survive a restart of the program.
#[test]
fn r1_leases_survive_a_restart() {
    isolated(|| {
        let lans = Lans::new(2);
        let sections = format!("{ALLOW}[[nat]]\nout = \"lan2\"\n");
        let gateway = lans.start(&sections);
        let take = ["lease", "take", "pod-1", "--from", "10.1.1.0/24", "--json"];
        let (code, said) = gateway.command(&take);
        assert_eq!(code, 0, "{said}");
        assert_eq!(gateway.command(&["stop"]).0, 0);
        drop(gateway);
        let gateway = lans.start(&sections);
        assert_eq!(services(&gateway).leases.len(), 1);
        assert_eq!(gateway.command(&take), (0, said));
    });
}

/// Row R1: the same range is enforced by the kernel of a pod's own host: the rules that `lease list --nft` prints load there,
/// and what leaves has the leased address and ports.
#[test]
fn r1_leases_are_enforced_by_nftables_too() {
    isolated(|| {
        let lans = Lans::new(3);
        let gateway = lans.start(&format!("{ALLOW}[[nat]]\nout = \"lan2\"\n"));
        assert_eq!(gateway.command(&["lease", "take", "pod-1", "--from", "10.1.3.2/32"]).0, 0);
        let (code, rules) = gateway.command(&["lease", "list", "--nft"]);
        assert_eq!(code, 0);
        let lease = services(&gateway).leases[0].clone();
        // A pod's host of its own: network 3, whose kernel translates; the address belongs to it here.
        let pod = lans.host(3);
        let file = lans.scene.directory.write("leases.nft", &rules).unwrap();
        shell(pod, &format!("ip addr add {}/32 dev eth0", lease.address));
        shell(pod, &format!("nft -f {0} && nft -f {0}", file.display()));
        let listed = shell(pod, "nft list table inet anabranch_leases");
        assert!(listed.contains(&format!("{}-{}", lease.first_port, lease.last_port)), "{listed}");
        let _peer = Mirror::start(lans.host(1), "peer", "0.0.0.0:80");
        // Its packets carry the outside address already; the gateway is only a router for them here.
        assert_eq!(lans.reload(&gateway, ALLOW).0, 0);
        drop(gateway);
        shell(lans.gateway(), "sysctl -qw net.ipv4.ip_forward=1 && ip addr del 10.1.2.1/24 dev lan2");
        shell(lans.gateway(), &format!("ip route add {}/32 via 10.1.3.2", lease.address));
        for _ in 0..10 {
            let answer = ask_tcp(pod, "10.1.1.2:80");
            assert_eq!(answer.source.ip(), lease.address);
            assert!((lease.first_port..=lease.last_port).contains(&answer.source.port()), "{answer:?}");
        }
    });
}
