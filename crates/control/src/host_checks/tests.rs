#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::config::tests::config;
use crate::wans::tests::{address, link, route};
use linux::netlink::nftables::{Act, Effect};

const WAN: &str = "[[wan]]\ninterface = \"wan0\"\n";
const PEER: &str = "[[peer]]\nname = \"hub\"\npublic-key = \"$HUB\"\nendpoints = [\"198.18.9.2:4600\"]\nallowed-ips = [\"10.77.0.2/32\"]\n";

fn view() -> HostView {
    HostView {
        links: vec![link(1, "lo"), link(2, "wan0"), link(3, "lan"), link(9, "ana0")],
        addresses: vec![
            address(1, "127.0.0.1/8"),
            address(2, "10.1.0.2/24"),
            address(3, "192.168.10.1/24"),
            address(3, "fe80::1/64"),
            address(9, "10.77.0.1/24"),
        ],
        routes: vec![],
        other_routes: vec![],
        rules: vec![],
        ipsec: vec![],
        tunnels: BTreeSet::new(),
    }
}

/// Surroundings with nothing in the way.
fn fine() -> Surroundings {
    Surroundings {
        forwards: [Some(true), Some(false)],
        routes: vec![route(2, "0.0.0.0/0", Some("10.1.0.1"), 100)],
        clock_ns: u64::MAX,
        ..Surroundings::default()
    }
}

fn chain(table: &str, name: &str, hook: Hook, rules: &[u8]) -> BaseChain {
    let chains = vec![name.to_owned(), "DOCKER-USER".to_owned()];
    BaseChain {
        family: "ip",
        table: table.to_owned(),
        name: name.to_owned(),
        hook,
        devices: Vec::new(),
        refuses: true,
        acts: Vec::new(),
        rules: rules.to_vec(),
        chains,
        legacy: false,
    }
}

fn told(rest: &str, view: &HostView, around: &Surroundings) -> Vec<String> {
    let config = config("", &format!("{WAN}{PEER}{rest}"));
    obstacles(&config, view, around).into_iter().map(|(_, message)| message).collect()
}

#[test]
fn nothing_is_said_where_nothing_stands_in_the_way() {
    assert_eq!(told("", &view(), &fine()), [""; 0]);
}

#[test]
fn forwarding_that_is_off_is_told_where_the_kernel_has_an_inner_network() {
    let off = Surroundings { forwards: [Some(false), Some(false)], ..fine() };
    let list = told("", &view(), &off);
    assert_eq!(list.len(), 1, "{list:?}");
    assert!(list[0].contains("between lan and ana0; sysctl -w net.ipv4.ip_forward=1"), "{list:?}");
    let unknown = Surroundings { forwards: [None, None], ..fine() };
    assert_eq!(told("", &view(), &unknown), [""; 0]);
    // No inner network, or one that this program forwards itself.
    let mut alone = view();
    alone.links.retain(|link| link.name != "lan");
    assert_eq!(told("", &alone, &off), [""; 0]);
    let mut outside = view();
    outside.routes = vec![route(3, "0.0.0.0/0", Some("192.168.10.254"), 0)];
    assert_eq!(told("", &outside, &off), [""; 0], "the host's own uplink is no inner network");
    assert_eq!(told("[[interface]]\nname = \"lan\"\n", &view(), &off), [""; 0]);
}

#[test]
fn a_nat_that_leads_nowhere_is_told() {
    let text = "[[interface]]\nname = \"lan\"\n[[interface]]\nname = \"wan0\"\n[[nat]]\nout = \"wan0\"\n";
    let told = |view: &HostView, routes: Vec<Route>, more: &str| {
        let list = obstacles(&config("", &format!("{text}{more}")), view, &Surroundings { routes, ..fine() });
        list.into_iter().map(|(key, message)| format!("{key}: {message}")).collect::<Vec<_>>()
    };
    let list = told(&view(), vec![route(2, "10.1.0.0/24", None, 0)], "");
    assert!(
        list.len() == 1 && list[0].starts_with("nat.out: ") && list[0].ends_with(" dev wan0"),
        "{list:?}"
    );
    let routes = [
        route(2, "0.0.0.0/0", Some("10.1.0.1"), 100),
        route(2, "0.0.0.0/0", None, 0),
        route(2, "198.51.100.0/24", Some("10.1.0.9"), 0),
    ];
    for route in routes {
        assert_eq!(told(&view(), vec![route], ""), [""; 0]);
    }
    assert_eq!(told(&view(), vec![], "[[route]]\nto = \"0.0.0.0/0\"\nvia = \"10.1.0.1\"\n"), [""; 0]);
    let mut without = view();
    without.addresses.retain(|address| address.index != 2);
    assert_eq!(told(&without, vec![], ""), [""; 0], "DHCP has not answered yet");
}

/// Packets between `[[interface]]` and other devices, which the kernel passes on, and those that its firewall does not see.
#[test]
fn what_the_host_forwards_beside_interfaces_is_told() {
    let of = |view: &HostView, around: &Surroundings| {
        let config =
            config("", "[[interface]]\nname = \"lan\"\n[[interface]]\nname = \"wan\"\ndevice = \"wan0\"\n");
        let list = obstacles(&config, view, around);
        list.into_iter().map(|(key, message)| format!("{key}: {message}")).collect::<Vec<_>>()
    };
    let off = Surroundings { forwards: [Some(false), Some(false)], ..fine() };
    assert_eq!(of(&view(), &off), [""; 0]);
    let mut containers = view();
    containers.links.push(Link { kind: Some("bridge".to_owned()), ..link(7, "docker0") });
    containers.links.push(link(8, "management"));
    containers.addresses.extend([address(7, "172.17.0.1/16"), address(8, "10.9.0.1/24")]);
    let list = of(&containers, &off);
    assert_eq!(list.len(), 1, "{list:?}");
    assert!(list[0].contains("between lan, wan0 and docker0; sysctl -w net.ipv4.ip_forward=1"), "{list:?}");
    assert_eq!(of(&containers, &fine()), [""; 0]);

    let mut tunnels = view();
    tunnels.ipsec.push(IpsecPolicy {
        outward: true,
        priority: 0,
        index: 0,
        from: "192.168.10.0/24".parse().unwrap(),
        to: "10.9.0.0/16".parse().unwrap(),
        protocol: None,
        src_ports: None,
        dst_ports: None,
        action: IpsecAction::Protect,
    });
    let list = of(&tunnels, &off);
    assert!(list.len() == 1 && list[0].contains("that policies of IPsec"), "{list:?}");
    assert_eq!(of(&tunnels, &fine()), [""; 0]);
    let one = tunnels.ipsec[0].clone();
    tunnels.ipsec.resize(1_024, one.clone());
    assert_eq!(of(&tunnels, &fine()), [""; 0]);
    tunnels.ipsec.push(one);
    let list = of(&tunnels, &fine());
    assert!(list.len() == 1 && list[0].contains("1025 policies of IPsec"), "{list:?}");

    let firewall = |chain: BaseChain| of(&view(), &Surroundings { chains: vec![chain], ..fine() });
    let dropping = |hook: Hook| chain("fw", "all", hook, b"..wan0\0");
    let unseen = "does not see what passes between lan, wan0";
    for hook in [Hook::Forward, Hook::Prerouting, Hook::Ingress] {
        let list = firewall(dropping(hook));
        assert!(list.len() == 1 && list[0].starts_with("rule: ") && list[0].contains(unseen), "{list:?}");
    }
    assert_eq!(firewall(dropping(Hook::Input)), [""; 0], "the host gets its packets by the device");
    let own = BaseChain { table: "anabranch_closed-ana0".to_owned(), ..dropping(Hook::Forward) };
    assert_eq!(firewall(own), [""; 0]);
    let at = |device: &str| BaseChain { devices: vec![device.to_owned()], ..dropping(Hook::Ingress) };
    assert_eq!((firewall(at("wan0")).len(), firewall(at("wlan0")).len()), (1, 0));
}

/// A provider's router with the network of the LAN; two modems alike are no obstacle.
#[test]
fn interfaces_with_the_same_network_are_told() {
    let mut alike = view();
    alike.addresses.push(address(2, "192.168.10.77/24"));
    let told = |view: &HostView, more: &str| {
        let text = format!(
            "[[interface]]\nname = \"lan\"\n{more}[[interface]]\nname = \"wan\"\ndevice = \"wan0\"\n[[nat]]\nout = \"wan\"\n"
        );
        let list = obstacles(&config("", &text), view, &fine());
        list.into_iter().map(|(_, message)| message).collect::<Vec<_>>()
    };
    assert_eq!(told(&view(), ""), [""; 0]);
    let list = told(&alike, "");
    assert!(
        list.len() == 1 && list[0].starts_with("lan and wan have the same network 192.168.10.0/24: "),
        "{list:?}"
    );
    assert_eq!(told(&alike, "outside = true\n"), [""; 0]);
}

/// A port of a bridge, a common slip where the LAN is one; in a VRF a device stays what it is.
#[test]
fn ports_of_a_bridge_are_told() {
    let told = |table: Option<u32>| {
        let mut seen = view();
        let mut above = seen.links[0].clone();
        (above.index, above.name, above.vrf_table) = (77, "br0".to_owned(), table);
        seen.links.iter_mut().filter(|link| link.name == "wan0").for_each(|link| link.controller = Some(77));
        seen.links.push(above);
        let list =
            obstacles(&config("", "[[interface]]\nname = \"wan\"\ndevice = \"wan0\"\n"), &seen, &fine());
        list.into_iter().map(|(_, message)| message).collect::<Vec<_>>()
    };
    assert_eq!(told(None), ["\"wan0\" is a port of \"br0\", which has the network; write device = \"br0\""]);
    assert_eq!(told(Some(100)), [""; 0]);
}

/// Services that the kernel cannot lead to for what comes by its other devices.
#[test]
fn services_that_other_devices_do_not_reach_are_told() {
    let mut containers = view();
    containers.links.push(Link { kind: Some("bridge".to_owned()), ..link(7, "docker0") });
    containers.addresses.push(address(7, "172.17.0.1/16"));
    let of = |view: &HostView, service: &str| {
        let interfaces = "[[interface]]\nname = \"lan\"\n[[interface]]\nname = \"wan\"\ndevice = \"wan0\"\n";
        let list = obstacles(&config("", &format!("{interfaces}{service}")), view, &fine());
        list.into_iter().map(|(key, message)| format!("{key}: {message}")).collect::<Vec<_>>()
    };
    let forward = "[[forward]]\nlisten = \"tcp wan:80\"\nto = \"192.168.10.5:80\"\n";
    let proxied = format!("{forward}proxy-protocol = true\n");
    let range = proxied.replace("wan:80", "wan:80-89").replace(".5:80", ".5:80-89");
    let server = "[[virtual-server]]\nlisten = \"tcp 10.1.0.9:80\"\nbackends = [\"192.168.10.5:80\"]\n";
    let direct = format!("{server}delivery = \"direct-return\"\n");
    for reached in [forward, &proxied, server] {
        assert_eq!(of(&containers, reached), [""; 0], "the kernel leads to it");
    }
    for (service, begin) in
        [(range.as_str(), "forward: what comes by docker0"), (direct.as_str(), "virtual-server: what")]
    {
        let list = of(&containers, service);
        assert!(list.len() == 1 && list[0].starts_with(begin), "{list:?}");
        assert_eq!(of(&view(), service), [""; 0]);
    }
}

/// Rules that refuse or lead elsewhere some of what passes between interfaces; those about other devices are fine.
#[test]
fn rules_of_the_host_that_do_not_see_what_passes_are_told() {
    let config =
        config("", "[[interface]]\nname = \"lan\"\n[[interface]]\nname = \"wan\"\ndevice = \"wan0\"\n");
    let of = |hook: Hook, effect: Effect, devices: &[&str]| {
        let devices = devices.iter().map(|name| (*name).to_owned()).collect();
        let chain = BaseChain {
            refuses: false,
            acts: vec![Act { effect, devices }],
            ..chain("fw", "some", hook, b"")
        };
        let list = obstacles(&config, &view(), &Surroundings { chains: vec![chain], ..fine() });
        list.into_iter().map(|(key, message)| format!("{key}: {message}")).collect::<String>()
    };
    for (devices, told) in [(&[][..], true), (&["lan", "wan0"], true), (&["la*"], true), (&["virbr0"], false)]
    {
        let text = of(Hook::Forward, Effect::Refuse, devices);
        assert_eq!(
            text.contains("(chain some of table ip fw); it does not see"),
            told,
            "{devices:?}: {text}"
        );
    }
    let text = of(Hook::Prerouting, Effect::Redirect, &["lan"]);
    assert!(text.contains("only what is addressed to the host gets there"), "{text}");
    let to = |address: &str| of(Hook::Prerouting, Effect::Translate(address.parse().unwrap()), &[]);
    assert!(to("192.168.10.5").starts_with("forward: "), "{}", to("192.168.10.5"));
    assert_eq!(to("172.17.0.2"), "", "containers are the kernel's");
    assert_eq!(of(Hook::Prerouting, Effect::Mark, &["lan"]), "", "no rule of routing asks for it");
}

/// Routes by a mark and shapers of what comes in never meet what passes between interfaces.
#[test]
fn marks_and_ingress_filters_of_the_host_are_told() {
    let interfaces = "[[interface]]\nname = \"lan\"\n[[interface]]\nname = \"wan\"\ndevice = \"wan0\"\n";
    let told = |view: &HostView, around: Surroundings| {
        let list = obstacles(&config("", interfaces), view, &around);
        list.into_iter().map(|(_, message)| message).collect::<Vec<_>>()
    };
    let marks = |effect| BaseChain {
        refuses: false,
        acts: vec![Act { effect, devices: vec!["lan".to_owned()] }],
        ..chain("mwan", "pre", Hook::Prerouting, b"")
    };
    let mut spec = linux::netlink::RuleSpec::new(linux::netlink::Family::V4, 100, 200);
    spec.mark = Some((0x200, u32::MAX));
    let rule = |spec| linux::netlink::PolicyRule {
        spec,
        action: linux::netlink::PolicyAction::Table(200),
        protocol: None,
        src_ports: None,
        dst_ports: None,
        special: false,
    };
    let with = |spec: linux::netlink::RuleSpec| HostView { rules: vec![rule(spec)], ..view() };
    let by_mark = told(&with(spec.clone()), Surroundings { chains: vec![marks(Effect::Mark)], ..fine() });
    assert!(
        by_mark.len() == 1 && by_mark[0].contains("chain pre of table ip mwan) and `ip rule` has a fwmark"),
        "{by_mark:?}"
    );
    // wg-quick: everything but its own socket's packets, which is what passes through.
    spec.invert = true;
    assert_eq!(told(&with(spec), Surroundings { chains: vec![marks(Effect::Mark)], ..fine() }), [""; 0]);

    let shaped = |index| told(&view(), Surroundings { ingress_disciplines: vec![index], ..fine() });
    assert!(shaped(2)[0].contains("comes in by wan0 (qdisc ingress)"), "{:?}", shaped(2));
    assert_eq!(shaped(9), [""; 0]);
}

/// Chains of `iptables-legacy` are mended by its own program.
#[test]
fn legacy_chains_are_told_with_their_program() {
    let legacy = BaseChain { legacy: true, ..chain("filter", "FORWARD", Hook::Forward, b"..docker0\0..") };
    let both = vec![chain("filter", "FORWARD", Hook::Forward, b""), legacy];
    let list = told("", &view(), &Surroundings { chains: both, ..fine() });
    assert_eq!(list.len(), 2, "{list:?}");
    assert!(list[1].contains("iptables-legacy -I DOCKER-USER -i ana0 -j ACCEPT"), "{list:?}");
    assert!(list[1].contains("chain FORWARD of table ip filter, iptables-legacy"), "{list:?}");
}

#[test]
fn a_firewall_that_drops_what_is_forwarded_is_told_with_the_command() {
    let with = |chains: Vec<BaseChain>| told("", &view(), &Surroundings { chains, ..fine() });
    let docker = chain("filter", "FORWARD", Hook::Forward, b"..docker0\0..");
    let list = with(vec![docker.clone(), docker]);
    assert_eq!(list.len(), 1, "{list:?}");
    assert!(
        list[0]
            .contains("iptables -I DOCKER-USER -i ana0 -j ACCEPT; iptables -I DOCKER-USER -o ana0 -j ACCEPT")
    );
    assert!(list[0].contains("Docker sets this"));
    let list = with(vec![chain("fw", "forward", Hook::Forward, b"")]);
    assert!(list[0].contains("nft insert rule ip fw forward iifname ana0 accept"), "{list:?}");
    // Rules that name the tunnel or the inner interface were written for them.
    assert_eq!(with(vec![chain("fw", "forward", Hook::Forward, b"..ana0\0")]), [""; 0]);
    assert_eq!(with(vec![chain("fw", "forward", Hook::Forward, b"..lan\0")]), [""; 0]);
    let ipv6 = BaseChain { family: "ip6", ..chain("fw", "forward", Hook::Forward, b"") };
    assert_eq!(with(vec![ipv6]), [""; 0]);
}

#[test]
fn the_port_that_peers_dial_may_be_taken_or_filtered() {
    let listener = config("listen = 4600", &format!("{WAN}{PEER}"));
    let of = |around: Surroundings| {
        let list = obstacles(&listener, &view(), &around);
        list.into_iter().map(|(key, message)| format!("{key}: {message}")).collect::<Vec<_>>()
    };
    let holder =
        |name: &str| PortHolder { process: 7, name: name.to_owned(), unit: Some("wg.service".to_owned()) };
    let list = of(Surroundings { port: Some(holder("wg")), ..fine() });
    assert_eq!(
        list,
        [
            "node.listen: UDP port 4600 is taken by wg (process 7); systemctl stop wg.service, or choose another port"
        ]
    );
    assert_eq!(of(Surroundings { port: Some(holder("anabranch")), ..fine() }), [""; 0]);
    let input = |rules: &[u8]| {
        of(Surroundings { chains: vec![chain("filter", "INPUT", Hook::Input, rules)], ..fine() })
    };
    assert!(input(b"")[0].contains("iptables -I INPUT -p udp --dport 4600 -j ACCEPT"));
    assert_eq!(input(&4600u16.to_be_bytes()), [""; 0]);
}

#[test]
fn a_way_without_a_default_route_is_told() {
    let none = Surroundings { routes: vec![route(3, "0.0.0.0/0", Some("192.168.10.254"), 0)], ..fine() };
    let list = told("", &view(), &none);
    assert!(list[0].contains("ip route add default via GATEWAY dev wan0 metric 100"), "{list:?}");
    // A route to the endpoint alone will do, and so will one of another table.
    let mut other = route(2, "198.18.9.0/24", Some("10.1.0.1"), 0);
    other.spec.table = 100;
    assert_eq!(told("", &view(), &Surroundings { routes: vec![other], ..fine() }), [""; 0]);
    let unbound = config("", PEER);
    let list = obstacles(&unbound, &view(), &Surroundings { routes: Vec::new(), ..fine() });
    assert!(list.iter().any(|(key, _)| *key == "peer.endpoints"), "{list:?}");
}

#[test]
fn a_strict_reverse_path_filter_and_a_clock_in_the_past_are_told() {
    let off = config("", &format!("{WAN}{PEER}")).clone();
    let mut off = off;
    off.tun.routes = Routes::Off;
    let strict = Surroundings { rp_filter: 1, ..fine() };
    assert!(obstacles(&off, &view(), &strict)[0].1.contains("sysctl -w net.ipv4.conf.ana0.rp_filter=2"));
    assert_eq!(told("", &view(), &strict), [""; 0]);
    let past = Surroundings { clock_ns: 1_000_000_000, ..fine() };
    assert!(told("", &view(), &past)[0].contains("timedatectl set-ntp true"));
}

#[test]
fn a_running_node_looks_again_from_time_to_time() {
    let (mut watch, start) = (HostWatch::default(), Instant::now());
    assert!(watch.is_due(start));
    let seconds = Duration::from_secs;
    watch.found(start, seconds(0), vec!["a".to_owned()]);
    let later = |after: u64| start + seconds(after);
    assert!(!watch.is_due(later(29)) && watch.is_due(later(30)));
    assert_eq!(watch.ask(), ["a"]);
    assert!(!watch.is_due(later(1)) && watch.is_due(later(2)));
    // A host with many routes and rules is looked at for a small part of the time, whoever asks.
    watch.found(start, seconds(4), vec![]);
    assert_eq!(watch.ask(), Vec::<String>::new());
    assert!(!watch.is_due(later(39)) && watch.is_due(later(40)));
}
