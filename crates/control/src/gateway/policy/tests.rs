#![allow(clippy::unwrap_used, reason = "tests")]

use services::held_ports::{HeldPort, HeldPorts};
use services::spec::HostSpec;

use std::collections::BTreeSet;
use std::sync::Arc;

use super::*;
use crate::config::tests::config;
use crate::host_facts::{DeviceFacts, KernelRoute, read_ephemeral_ports};
use crate::protocol::BackendWish;
use services::spec::RouteSpec;

pub(crate) fn facts() -> HostFacts {
    let device = |index, name: &str, addresses: &[&str]| DeviceFacts {
        index,
        name: name.to_owned(),
        link: Some(LinkSpec::ethernet([2, 0, 0, 0, 0, index as u8])),
        lies_on: None,
        mtu: 1500,
        ipv6_mtu: u16::MAX,
        up: true,
        loopback: name == "lo",
        addresses: addresses.iter().map(|net| net.parse().unwrap()).collect(),
        vrf: None,
    };
    let route = |prefix: &str, via: Option<&str>, device, metric| KernelRoute {
        table: 254,
        kind: RouteKind::Unicast,
        protocol: 4,
        place: 0,
        weight: 1,
        prefix: prefix.parse().unwrap(),
        via: via.map(|via| via.parse().unwrap()),
        device,
        metric,
        mtu: None,
        from: None,
    };
    HostFacts {
        devices: vec![
            device(1, "lo", &["127.0.0.1/8"]),
            device(2, "eth0", &["203.0.113.1/24", "203.0.113.10/32", "fe80::2/64"]),
            device(3, "eth1", &["10.0.0.254/24"]),
            device(4, "eth2", &[]),
            device(9, "ana0", &["10.77.0.1/24"]),
        ],
        routes: vec![
            route("0.0.0.0/0", Some("203.0.113.254"), 2, 100),
            route("0.0.0.0/0", Some("203.0.113.253"), 2, 50),
            route("10.0.0.0/24", None, 3, 0),
            route("10.5.0.0/16", Some("192.0.2.1"), 7, 0),
            route("10.6.0.0/16", None, 9, 0),
        ],
        rules: Vec::new(),
        ipsec: Vec::new(),
        tunnels: BTreeSet::new(),
        tun_index: Some(9),
        ephemeral_ports: (32_768, 60_999),
        held_ports: Arc::default(),
        port_blocks: None,
        lingering: BTreeSet::new(),
        takes_over: false,
    }
}

const BASE: &str = "[tun]\naddress = \"10.77.0.1/24\"\n[[interface]]\nname = \"wan\"\ndevice = \"eth0\"\n[[interface]]\n\
                    name = \"lan\"\ndevice = \"eth1\"\naddress = \"10.0.0.254/24\"\n";

fn spec(rest: &str) -> GatewaySpec {
    gateway_spec(&config("listen = 4600", &format!("{BASE}{rest}")), &facts(), &Overrides::default())
}

fn routes(spec: &GatewaySpec) -> Vec<String> {
    let line = |route: &RouteSpec| {
        let out = match route.egress {
            Egress::Host => "host".to_owned(),
            Egress::Bond(NOBODY) => "nobody".to_owned(),
            Egress::Bond(id) => spec.peers.iter().find(|peer| peer.id == id).unwrap().name.clone(),
            Egress::Interface(id) => spec.interfaces[id.index()].name.clone(),
            other => format!("{other:?}"),
        };
        let via = route.via.map_or_else(String::new, |via| format!(" via {via}"));
        format!("{} {}{via} {out}", route.tenant, route.prefix)
    };
    spec.routes.iter().map(line).collect()
}

#[test]
fn routes_are_those_of_the_gateways_own_devices() {
    let spec = spec(
        "[[route]]\nto = \"10.9.0.0/16\"\nvia = \"10.0.0.7\"\n[[peer]]\nname = \"hub\"\npublic-key = \"$HUB\"\n\
         allowed-ips = [\"10.8.0.0/16\"]\n[[virtual-server]]\nlisten = \"tcp 203.0.113.10:80\"\n\
         backends = [\"10.0.0.1:80\"]\n",
    );
    assert_eq!(
        routes(&spec),
        [
            "0 0.0.0.0/0 via 203.0.113.253 wan",
            "0 10.0.0.0/24 lan",
            "0 10.0.0.254/32 host",
            "0 10.6.0.0/16 nobody",
            "0 10.8.0.0/16 hub",
            "0 10.9.0.0/16 via 10.0.0.7 lan",
            "0 10.77.0.1/32 host",
            // Where the kernel leads what other devices of the host have for the virtual server.
            "0 192.0.0.11/32 host",
            "0 203.0.113.0/24 wan",
            "0 203.0.113.1/32 host",
            "0 203.0.113.10/32 host",
            "0 fe80::/64 wan",
            "0 fe80::2/128 host",
        ]
    );
    assert_eq!(spec.interfaces[0].link, LinkSpec::ethernet([2, 0, 0, 0, 0, 2]));
    assert!(
        !spec.interfaces[0].addresses.contains(&"203.0.113.10/32".parse().unwrap()),
        "{:?}",
        spec.interfaces
    );
}

/// Over other devices the kernel passes packets on itself; addresses on them are the host's. What leads nowhere else does not count.
#[test]
fn routes_over_other_devices_are_the_kernels() {
    let mut facts = facts();
    let device = |index, name: &str| DeviceFacts { index, name: name.to_owned(), ..facts.devices[3].clone() };
    let (vpn, management, wan) = (device(20, "tun7"), device(21, "eth9"), device(22, "wwan0"));
    let like = facts.routes[2].clone();
    let route =
        |prefix: &str, device| KernelRoute { prefix: prefix.parse().unwrap(), device, ..like.clone() };
    let local =
        |prefix: &str, device| KernelRoute { kind: RouteKind::Local, table: 255, ..route(prefix, device) };
    facts.devices.extend([vpn, management, wan]);
    facts.routes.extend([
        route("10.8.0.0/24", 20),
        route("10.8.0.2/32", 20),
        route("0.0.0.0/0", 21),
        route("172.16.0.0/24", 22),
        route("fe80::/64", 20),
        route("127.0.0.0/8", 1),
        KernelRoute { table: 100, ..route("0.0.0.0/0", 20) },
        local("10.8.0.1/32", 20),
        local("192.0.2.0/28", 1),
        local("127.0.0.0/8", 1),
        local("fe80::7/128", 20),
        local("203.0.113.1/32", 2),
        local("10.77.0.1/32", 9),
    ]);
    let with = |rest: &str, facts: &HostFacts| {
        let text = format!("{BASE}{rest}");
        let spec = gateway_spec(&config("listen = 4600", &text), facts, &Overrides::default());
        routes(&spec)
            .into_iter()
            .filter(|line| !line.ends_with("wan") && !line.ends_with("lan"))
            .collect::<Vec<_>>()
    };
    let rest = "[[wan]]\ninterface = \"wwan0\"\n[[nat]]\nout = \"wan\"\n";
    let expected = [
        "0 10.0.0.254/32 host",
        "0 10.6.0.0/16 nobody",
        "0 10.8.0.0/24 Kernel",
        "0 10.8.0.1/32 host",
        "0 10.8.0.2/32 Kernel",
        "0 10.77.0.1/32 host",
        "0 192.0.2.0/28 host",
        "0 203.0.113.1/32 host",
        "0 203.0.113.10/32 host",
        "0 fe80::2/128 host",
        "0 0.0.0.0/0 Kernel",
    ];
    let mut found = with(rest, &facts);
    let mut sorted = expected.to_vec();
    sorted.sort_unstable();
    found.sort_unstable();
    assert_eq!(found, sorted, "the default route is of table 100");
    // Nothing says where the way out is: it is the host's.
    facts.routes.retain(|route| route.prefix.prefix_len() > 0 || route.device == 21);
    assert!(with("", &facts).contains(&"0 0.0.0.0/0 Kernel".to_owned()));
}

#[test]
fn peers_have_routes_in_the_tables_of_their_tenants() {
    let peer = |name: &str, key: &str, rest: &str| {
        format!(
            "[[peer]]\nname = \"{name}\"\npublic-key = \"{key}\"\nallowed-ips = [\"10.6.0.0/16\"]\n{rest}\n"
        )
    };
    let text = format!(
        "[[tenant]]\nname = \"red\"\n{}{}[[rule]]\naction = \"drop\"\nfrom = \"peer:b\"\nto = \"tunnel\"\n[[nat]]\n\
         out = \"wan\"\nfrom = \"peer:b\"\n",
        peer("hub", "$HUB", ""),
        peer("b", "$OTHER", "tenant = \"red\"")
    );
    let all = spec(&text);
    let ways = routes(&all);
    for way in ["0 10.6.0.0/16 hub", "1 10.6.0.0/16 b"] {
        assert!(ways.contains(&way.to_owned()), "{way} is not among {ways:?}");
    }
    let peers: Vec<_> = all.peers.iter().map(|peer| (peer.id.0, peer.name.as_str(), peer.tenant)).collect();
    assert_eq!(peers, [(0, "hub", 0), (1, "b", 1)]);
    assert_eq!(all.rules[0].from.attachments, [Attachment::Bond(BondId(1))]);
    assert_eq!(all.rules[0].to.attachments, [Attachment::AnyBond]);
    assert_eq!((all.nats[0].from.len(), all.nats[0].from_peers.as_slice()), (0, &[BondId(1)][..]));
}

/// Two uplinks: the worse route is told too, before the one that counts.
#[test]
fn hidden_routes_come_before_those_that_count() {
    let mut facts = facts();
    let second = KernelRoute { via: Some("10.0.0.9".parse().unwrap()), device: 3, ..facts.routes[0].clone() };
    facts.routes.push(second);
    let spec = gateway_spec(&config("", BASE), &facts, &Overrides::default());
    let defaults: Vec<_> = routes(&spec).into_iter().filter(|way| way.contains(" 0.0.0.0/0")).collect();
    assert_eq!(defaults, ["0 0.0.0.0/0 via 10.0.0.9 lan", "0 0.0.0.0/0 via 203.0.113.253 wan"]);
}

#[test]
fn a_nat_takes_the_interfaces_own_address_and_leaves_the_hosts_ports_alone() {
    let all = spec(
        "[[nat]]\nout = \"wan\"\n[[forward]]\nlisten = \"tcp wan:8080\"\nto = \"10.0.0.5:80\"\n[[virtual-server]]\n\
         listen = \"tcp 203.0.113.10:80\"\nbackends = [\"10.0.0.1:80\"]\n",
    );
    let nat = &all.nats[0];
    assert_eq!(nat.addresses, ["203.0.113.1".parse::<IpAddr>().unwrap()]);
    assert_eq!(nat.reserved, [(4600, 4600), (8080, 8080), (32_768, 60_999)]);
    let mut held = facts();
    let hold = |text: &str| {
        let at: SocketAddr = text.parse().unwrap();
        HeldPort { protocol: 6, port: at.port(), address: at.ip() }
    };
    let sockets = ["0.0.0.0:22", "0.0.0.0:443", "[::]:444", "203.0.113.1:2049", "10.0.0.254:53"];
    held.held_ports = Arc::new(HeldPorts::new(sockets.map(hold)));
    let wan = config("", &format!("{BASE}[[nat]]\nout = \"wan\"\n"));
    let reserved = &gateway_spec(&wan, &held, &Overrides::default()).nats[0].reserved;
    assert_eq!(*reserved, [(22, 22), (443, 443), (2049, 2049), (32_768, 60_999)]);
    assert_eq!(all.forwards[0].listen, "203.0.113.1:8080".parse().unwrap());
    let pool = spec(
        "[[nat]]\nout = \"wan\"\naddresses = \"203.0.113.20\"\n[[nat]]\nout = \"wan\"\nmode = \"none\"\n",
    );
    assert_eq!((pool.nats[0].reserved.len(), pool.nats[1].addresses.len()), (0, 0));
    // A forward of all ports takes what is of no flow, and no port.
    let whole = "[[nat]]\nout = \"wan\"\naddresses = \"203.0.113.20\"\n[[forward]]\nlisten = \"udp 203.0.113.20:1-65535\"\nto = \"10.0.0.5\"\n";
    let independent = whole.replacen("addresses", "mapping = \"endpoint-independent\"\naddresses", 1);
    let reserved = |text: &str| spec(text).nats[0].reserved.clone();
    assert_eq!((reserved(whole).len(), reserved(&independent)), (0, vec![(1, 65_535)]));
    assert_eq!((pool.nats[0].tables, pool.nats[0].flows_per_client_max), (64, 65_536));
}

#[test]
fn a_nat_never_takes_ipv6_or_link_local_addresses_by_itself() {
    let mut facts = facts();
    facts.devices[1].addresses =
        ["fe80::2/64", "2001:db8::2/64", "169.254.3.4/16"].map(|net| net.parse().unwrap()).to_vec();
    let config = config("", &format!("{BASE}[[nat]]\nout = \"wan\"\n"));
    let spec = gateway_spec(&config, &facts, &Overrides::default());
    assert_eq!(spec.nats[0].addresses, [] as [IpAddr; 0]);
    // What `status` shows is what the packet engine took.
    let (policy, _) = services::policy::Policy::compile(spec, None, 0).unwrap();
    assert_eq!(policy.nat.addresses(0), [] as [IpAddr; 0]);
}

#[test]
fn names_become_numbers() {
    let spec = spec(
        "[[interface]]\nname = \"blue-lan\"\ndevice = \"eth2\"\naddress = \"10.0.0.254/24\"\ntenant = \"blue\"\nmtu = 9000\n\
         [[tenant]]\nname = \"red\"\n[[tenant]]\nname = \"blue\"\n[[group]]\nname = \"g\"\nmembers = \"192.0.2.1\"\n\
         [[rule]]\naction = \"allow\"\nfrom = [\"lan\", \"g\", \"10.1.0.0/16\"]\nto = [\"gateway\", \"tunnel\"]\n\
         tenant = \"blue\"\n[gateway]\ndefault-action = \"reject\"\n",
    );
    assert_eq!(spec.tenants, ["", "red", "blue"]);
    assert_eq!((spec.interfaces[2].tenant, spec.interfaces[2].mtu), (2, 1500));
    let rule = &spec.rules[0];
    assert_eq!(
        (rule.from.attachments.as_slice(), rule.from.groups.as_slice()),
        (&[Attachment::Interface(InterfaceId(1))][..], &[0][..])
    );
    assert_eq!(rule.from.prefixes, ["10.1.0.0/16".parse().unwrap()]);
    assert_eq!(
        (rule.to.attachments.as_slice(), rule.tenants.as_slice()),
        (&[Attachment::Gateway, Attachment::AnyBond][..], &[2][..])
    );
    // Nothing is allowed that the operator has not written: replies to the host pass by the ports that it uses.
    assert_eq!((spec.rules.len(), spec.host.ports), (1, (32_768, 60_999)));
    assert!(spec.host.is_port(60_999) && !spec.host.is_port(61_000) && !spec.host.is_port(4600));
    assert!(HostSpec::default().is_port(61_000));
    assert!(routes(&spec).contains(&"2 10.0.0.0/24 blue-lan".to_owned()));
    assert!(routes(&spec).contains(&"2 10.0.0.254/32 host".to_owned()));
}

#[test]
fn live_changes_are_in_it_and_devices_may_be_missing() {
    let config = config(
        "",
        &format!(
            "{BASE}[[interface]]\nname = \"later\"\n[[group]]\nname = \"g\"\n[[nat]]\nout = \"wan\"\nfrom = \"g\"\n\
             [[virtual-server]]\nname = \"web\"\nlisten = \"tcp 203.0.113.10:80\"\nbackends = [\"10.0.0.1:80\"]\n"
        ),
    );
    let mut live = Overrides::default();
    let all = desired(&config, &facts(), &live);
    // Nobody is in the group: not everybody is translated.
    assert_eq!(all.spec.nats, []);
    assert_eq!(all.devices[2], DeviceState { name: "later".to_owned(), index: None, up: false });
    live.change_group(&config.services, "g", &["10.0.0.0/24".parse().unwrap()], true).unwrap();
    live.change_backend(&config.services, "web", "10.0.0.1", BackendWish::Drain).unwrap();
    let all = desired(&config, &facts(), &live);
    assert_eq!(all.spec.nats[0].from, ["10.0.0.0/24".parse().unwrap()]);
    assert_eq!((all.spec.groups[0].members.len(), all.spec.servers[0].backends[0].weight), (1, 0));
}

#[test]
fn ranges_are_joined() {
    assert_eq!(
        merged(vec![(5, 9), (1, 2), (3, 3), (8, 12), (65_535, 65_535)]),
        [(1, 3), (5, 12), (65_535, 65_535)]
    );
    assert!(read_ephemeral_ports().0 > 0);
}

#[test]
fn the_tun_interface_has_an_address_for_the_hosts_packets() {
    let of = |text: &str| -> Vec<String> {
        tun_addresses(&config("listen = 4600", text)).iter().map(ToString::to_string).collect()
    };
    let interface = "[[interface]]\nname = \"wan\"\n";
    assert_eq!(of(interface), ["192.0.0.8/32"]);
    assert_eq!(of(&format!("[tun]\naddress = \"fd77::1/64\"\n{interface}")), ["fd77::1/64", "192.0.0.8/32"]);
    assert_eq!(of(&format!("[tun]\naddress = \"10.77.0.1/24\"\n{interface}")), ["10.77.0.1/24"]);
    assert_eq!(of(""), Vec::<String>::new());
}

/// Where machines share an interface its ports are whose the manager's leases say, for whatever takes ports of its addresses.
#[test]
fn ports_of_a_shared_address_are_those_that_are_leased() {
    let text = "[tun]\naddress = \"10.77.0.1/24\"\n[cluster]\nrole = \"dataplane\"\nnode-id = 11\nmanager = \"10.77.0.9\"\n\
                [[interface]]\nname = \"wan\"\ndevice = \"eth0\"\nshared = 1\nmac = \"02:00:00:00:02:01\"\n\
                [[interface]]\nname = \"lan\"\ndevice = \"eth1\"\naddress = \"10.0.0.254/24\"\n";
    let config = config("listen = 4600", text);
    let mut facts = facts();
    let address: IpAddr = "203.0.113.1".parse().unwrap();
    facts.port_blocks = Some([1, 40].map(|block| steering::units::Lease { address, block, node: 11 }).into());
    let host = gateway_spec(&config, &facts, &Overrides::default()).host;
    let free = |at: &str, port: u16| {
        let others = host.others_ports.get(&at.parse::<IpAddr>().unwrap())?;
        Some(others.iter().all(|(first, last)| !(*first..=*last).contains(&port)))
    };
    assert_eq!([1_024, 2_047, 40_960, 41_983].map(|port| free("203.0.113.1", port)), [Some(true); 4]);
    assert_eq!([1_023, 2_048, 40_959, 41_984].map(|port| free("203.0.113.1", port)), [Some(false); 4]);
    assert_eq!(free("10.0.0.254", 1_024), None, "that is this machine's alone");
}

/// A macvlan of the host on top of an interface's device is a part of the interface: its hardware address, its addresses, routes
/// over it. One that is an interface itself, or is off, is not.
#[test]
fn devices_on_top_of_an_interface_belong_to_it() {
    let mut with = facts();
    let top = |index, address: &str| DeviceFacts {
        index,
        name: format!("vrrp.{index}"),
        link: Some(LinkSpec::ethernet([0, 0, 0x5e, 0, 1, index as u8])),
        lies_on: Some(2),
        addresses: vec![address.parse().unwrap()],
        ..with.devices[1].clone()
    };
    let (first, off, ours) =
        (top(51, "203.0.113.51/24"), top(52, "203.0.113.52/24"), top(53, "203.0.113.53/24"));
    with.devices.extend([first, DeviceFacts { up: false, ..off }, ours]);
    with.routes.push(KernelRoute {
        prefix: "192.0.2.0/24".parse().unwrap(),
        via: None,
        device: 51,
        ..with.routes[0].clone()
    });
    let text = format!("{BASE}[[interface]]\nname = \"vrrp.53\"\n");
    let spec = gateway_spec(&config("", &text), &with, &Overrides::default());
    let LinkSpec::Ethernet { mac, more } = &spec.interfaces[0].link else { panic!("{:?}", spec.interfaces) };
    assert_eq!((mac[5], more.as_slice()), (2, &[[0, 0, 0x5e, 0, 1, 51]][..]));
    let has = |address: &str| spec.interfaces[0].addresses.iter().any(|net| net.to_string() == address);
    assert!(has("203.0.113.51/24") && !has("203.0.113.52/24") && !has("203.0.113.53/24"));
    let lines = routes(&spec);
    for line in ["0 203.0.113.51/32 host", "0 192.0.2.0/24 wan"] {
        assert!(lines.iter().any(|known| known == line), "{line}: {lines:?}");
    }
    assert!(!lines.iter().any(|line| line.contains("113.52")), "{lines:?}");
}

/// An address that another program moves is used while it is here, and is never ours to add.
#[test]
fn virtual_addresses_are_left_to_who_moves_them() {
    let text = BASE
        .replace("device = \"eth0\"\n", "device = \"eth0\"\nvirtual-address = [\"203.0.113.40\"]\n")
        + "[[nat]]\nout = \"wan\"\naddresses = [\"203.0.113.40\"]\n\
           [[virtual-server]]\nlisten = \"tcp 203.0.113.40:80\"\nbackends = [\"10.0.0.1:80\"]\n";
    let config = config("", &text);
    let planned = |facts: &HostFacts| {
        let plan = addresses::AddressPlan::new(&config.services, facts);
        plan.addresses.iter().any(|entry| entry.net.addr().to_string() == "203.0.113.40")
    };
    let pool =
        |facts: &HostFacts| gateway_spec(&config, facts, &Overrides::default()).nats[0].addresses.clone();
    let mut facts = facts();
    let own: Vec<IpAddr> = vec!["203.0.113.1".parse().unwrap(), "203.0.113.10".parse().unwrap()];
    assert_eq!((planned(&facts), pool(&facts)), (false, own), "another machine has it");
    facts.devices[1].addresses.push("203.0.113.40/24".parse().unwrap());
    assert_eq!((planned(&facts), pool(&facts)), (false, vec!["203.0.113.40".parse().unwrap()]));
    let spec = gateway_spec(&config, &facts, &Overrides::default());
    assert!(routes(&spec).contains(&"0 203.0.113.40/32 host".to_owned()), "{:?}", routes(&spec));
    assert!(super::super::contradictions::left_out(&config.services, &facts).is_empty());
}

/// Packets that come by devices with addresses of their own that are neither interfaces, nor on top of one, nor WANs are the kernel's.
#[test]
fn other_devices_are_those_with_networks_of_the_hosts_own() {
    let mut facts = facts();
    let eth1 = facts.devices[2].clone();
    let device = |index, name: &str, net: &str, lies_on| DeviceFacts {
        index,
        name: name.to_owned(),
        lies_on,
        up: false,
        addresses: vec![net.parse().unwrap()],
        ..eth1.clone()
    };
    facts.devices.extend([
        device(11, "docker0", "172.17.0.1/16", None),
        device(12, "vrrp.7", "10.0.0.253/24", Some(3)),
        device(13, "wwan0", "10.64.0.2/30", None),
        device(14, "veth8", "fe80::7/64", None),
    ]);
    let config = config("", &format!("{BASE}[[wan]]\nmatch = \"wwan*\"\n"));
    assert_eq!(other_devices(&config, &facts), ["docker0"]);
}
