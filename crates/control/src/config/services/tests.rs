//! Golden tests: sections and, word for word, what is said about them.
#![allow(clippy::unwrap_used, reason = "tests")]

use ::health::{DnsCheck, HealthKind, HealthSpec, HttpCheck, UdpCheck};
use proptest::prelude::*;

use super::super::tests::{golden, load};
use super::*;

const LAN: &str = "[[interface]]\nname = \"lan\"\naddress = \"10.0.0.254/24\"\n";
const WAN: &str = "[[interface]]\nname = \"wan\"\naddress = [\"203.0.113.1/24\"]\n";

fn services(text: &str) -> Services {
    let loaded = load(text);
    assert_eq!(loaded.problems, []);
    loaded.config.unwrap().services
}

#[test]
fn the_shape_that_tests_from_outside_use() {
    let all = services(&format!(
        "{LAN}device = \"eth1\"\n{WAN}[[nat]]\nout = \"wan\"\nmode = \"port-only\"\n[[nat]]\nout = \"lan\"\n\
         addresses = [\"203.0.113.8/30\", \"203.0.113.2\"]\n[[virtual-server]]\nlisten = \"tcp 203.0.113.10:80\"\n\
         backends = [\"10.0.0.1:80\", \"10.0.0.2:80\"]\nhealth = {{ tcp = true }}\n[[rule]]\naction = \"drop\"\n\
         from = \"10.0.0.0/8\"\nto = \"wan\"\nprotocol = \"tcp\"\nport = 25\n"
    ));
    assert_eq!((all.interfaces[0].name.as_str(), all.interfaces[0].device.as_str()), ("lan", "eth1"));
    assert_eq!(all.interfaces[1].device, "wan");
    assert_eq!((all.nats[0].mode, all.nats[1].mode), (NatMode::PortOnly, NatMode::AddressAndPort));
    assert_eq!(all.nats[1].addresses.len(), 5);
    let server = &all.servers[0];
    assert_eq!((server.name.as_str(), server.backends.len()), ("tcp 203.0.113.10:80", 2));
    assert_eq!(server.health, Some(HealthSpec::new(HealthKind::Tcp)));
    assert_eq!((server.source, server.delivery), (NatMode::AddressAndPort, DeliveryMode::Nat));
    let rule = &all.rules[0];
    assert_eq!(
        (rule.name.as_str(), rule.protocols.as_slice(), rule.ports.as_slice()),
        ("rule 1", &[6][..], &[(25, 25)][..])
    );
    assert_eq!(rule.to, [Subject::Interface("wan".to_owned())]);
}

#[test]
fn an_interface_alone_needs_no_node() {
    let loaded = load(LAN);
    assert_eq!(loaded.problems, []);
    let config = loaded.config.unwrap();
    assert!(config.node.key_was_made && config.peers.is_empty());
    assert_eq!(config.tun.name, "ana0");
    assert_eq!(config.services.settings, Settings::default());
}

#[test]
fn everything_else() {
    let all = services(&format!(
        "{LAN}tenant = \"red\"\n{WAN}[[tenant]]\nname = \"red\"\n[[route]]\nto = \"10.9.0.1/16\"\nvia = \"10.0.0.1\"\n\
         [[group]]\nname = \"bots\"\nmembers = [\"192.0.2.0/24\"]\nfile = \"bots.txt\"\n\
         [[rule]]\nname = \"x\"\naction = \"reject\"\nfrom = [\"bots\", \"tunnel\"]\nto = \"gateway\"\n\
         port = [80, \"90-99\"]\ntenant = \"red\"\n\
         [[forward]]\nlisten = \"tcp+udp wan:53\"\nto = \"10.0.0.5\"\ntenant = \"red\"\n\
         [[virtual-server]]\nname = \"web\"\nlisten = \"tcp 203.0.113.10:80\"\ndelivery = \"direct-return\"\n\
         backends = [{{ address = \"10.0.0.1:80\", weight = 5, connections-max = 9, drain-seconds = 60 }}]\nmethod = \"source-address\"\n\
         reset-on-down = \"never\"\nhealth = {{ http = \"/up\", status = [\"200-201\", 204], host = \"w\", interval-ms = 500, fall = 1 }}\n\
         [[nat]]\nout = \"wan\"\nfrom = [\"10.0.0.0/8\", \"bots\"]\ntenants = \"red\"\nmapping = \"endpoint-independent\"\n\
         ports = \"2048-4095\"\ntables = 256\nflows-per-client-max = 7\nports-per-client = 1024\n\
         assemble-fragments = true\n\
         [[lease]]\nname = \"pod\"\nfrom = \"10.0.0.64/26\"\naddress = \"203.0.113.1\"\nfirst-port = 2048\nports = 2048\n\
         [gateway]\ndefault-action = \"drop\"\nflows-max = 100_000\nfragments = {{ up-to-bytes = 4000 }}\n\
         distribution = \"cpu\"\ncore-rebalance = false\nkeep-flows-seconds = 3\nlog-file = \"nat.json\"\ntimeouts = {{ icmp-seconds = 61 }}\n"
    ));
    assert_eq!(all.routes[0].to, "10.9.0.0/16".parse().unwrap());
    assert_eq!(all.groups[0].members.len(), 3);
    assert_eq!(all.rules[0].from, [Subject::Group("bots".to_owned()), Subject::Tunnel]);
    assert_eq!(
        (all.rules[0].to.as_slice(), all.rules[0].protocols.as_slice()),
        (&[Subject::Gateway][..], &[6, 17][..])
    );
    assert_eq!(all.forwards[0].host, ListenHost::Interface("wan".to_owned()));
    assert_eq!((all.forwards[0].protocols.as_slice(), all.forwards[0].to.port()), (&[6, 17][..], 53));
    let server = &all.servers[0];
    assert_eq!((server.source, server.method), (NatMode::None, BalanceMethod::SourceAddress));
    assert_eq!(server.reset_on_down, ResetOnDown::Never);
    assert_eq!(
        server.backends[0],
        Backend { address: "10.0.0.1:80".parse().unwrap(), weight: 5, connections_max: 9, drain_s: 60 }
    );
    let http = HttpCheck {
        path: "/up".to_owned(),
        host: Some("w".to_owned()),
        statuses: vec![200, 201, 204],
        body: None,
        tls: None,
    };
    let health = server.health.as_ref().unwrap();
    assert_eq!((&health.kind, health.timeout_ms, health.fall), (&HealthKind::Http(http), 500, 1));
    assert_eq!(
        (all.nats[0].tables, all.nats[0].ports, all.nats[0].ports_per_client),
        (256, (2048, 4095), 1024)
    );
    assert!(all.nats[0].assemble_fragments);
    assert_eq!((all.leases[0].first_port, all.leases[0].ports), (2048, 2048));
    let settings = &all.settings;
    assert_eq!((settings.limits.flows_max, settings.limits.embryonic_max), (100_000, 25_000));
    assert_eq!((settings.fragments, settings.distribution), (Variant::UpToBytes(4000), Distribution::Cpu));
    assert_eq!((settings.timeouts.icmp_s, settings.core_rebalance, settings.keep_flows_s), (61, false, 3));
    assert_eq!(settings.log_file.as_deref().unwrap().to_str(), Some("/etc/ana/nat.json"));
}

#[test]
fn who_dials_needs_a_device_of_the_tunnels_own() {
    let with = |host: &str, peer: &str| {
        load(&format!(
            "[gateway]\nhost = \"{host}\"\n[node]\nprivate-key-file = \"node.key\"\nlisten = 4600\n[tun]\naddress = \"10.77.0.1/24\"\n[[wan]]\n\
             match = \"eth*\"\n[[interface]]\nname = \"out\"\ndevice = \"eth0\"\n[[peer]]\nname = \"hub\"\n\
             public-key = \"$HUB\"\nallowed-ips = \"10.8.0.1\"\n{peer}"
        ))
    };
    assert!(with("native", "endpoints = \"192.0.2.9:4600\"\n").config.is_some());
    let loaded = with("datapath", "endpoints = \"192.0.2.9:4600\"\n");
    assert_eq!(
        loaded.problems.iter().map(ToString::to_string).collect::<Vec<_>>(),
        [
            "site.toml:9:9: error: wan.interface: \"eth0\" is the device of interface \"out\" too, which takes the answers of \
          peer \"hub\" from the tunnel; dial from another device, or let the peer dial: listen = 4600 here and no endpoints"
        ]
    );
    assert!(with("datapath", "").config.is_some());
}

#[test]
fn interfaces_and_routes() {
    golden(
        "[[interface]]\ndevice = \"eth0\"\n",
        &["site.toml:1:1: error: interface.name: missing; write name = \"lan\""],
    );
    golden(
        "[[interface]]\nname = \"gateway\"\n[[interface]]\nname = \"ana0\"\n[[interface]]\nname = \"lo\"\n\
         [[interface]]\nname = \"a-name-that-is-long\"\n",
        &[
            "site.toml:2:8: error: interface.name: \"gateway\" has a meaning in rules; choose another name",
            "site.toml:4:8: error: interface.device: \"ana0\" is the tunnel's own interface; rules know it as \"tunnel\" \
             and \"gateway\"",
            "site.toml:6:8: error: interface.device: \"lo\" leads nowhere; name the device of a network",
            "site.toml:8:8: error: interface.name: \"a-name-that-is-long\" is longer than the 15 bytes Linux allows; \
             name the kernel's device with device = \"eth0\"",
        ],
    );
    golden(
        &format!("{LAN}{LAN}tenant = \"blue\"\nmtu = 10\n"),
        &[
            "site.toml:5:8: error: interface.name: two interfaces are named \"lan\"; give each its own name",
            "site.toml:5:8: error: interface.device: \"lan\" belongs to interface \"lan\" already; name another device",
            "site.toml:6:11: error: interface.address: 10.0.0.254 belongs to interface \"lan\" already; remove one",
            "site.toml:7:10: error: interface.tenant: no tenant is named \"blue\"; add a [[tenant]] section with \
             name = \"blue\"",
            "site.toml:8:7: error: interface.mtu: 10 found, a whole number from 576 to 65535 is needed",
        ],
    );
    golden(
        &format!(
            "{LAN}[[route]]\nto = \"10.9.0.0/16\"\n[[route]]\nto = \"10.8.0.0/16\"\nvia = \"10.7.0.1\"\n"
        ),
        &[
            "site.toml:4:1: error: route.via: missing; write via = \"10.0.0.254\", or interface = \"lan\" for neighbors",
            "site.toml:8:7: error: route.via: 10.7.0.1 is in no interface's network, so that nobody knows where it is; \
             add interface = \"lan\"",
        ],
    );
}

#[test]
fn rules_and_groups() {
    golden(
        &format!("{LAN}[[rule]]\nname = \"a\"\nfrom = \"lam\"\n"),
        &[
            "site.toml:4:1: error: rule.action: missing; write action = \"allow\", \"drop\" or \"reject\"",
            "site.toml:6:8: error: rule.from: \"lam\" is no prefix, and no [[group]] or [[interface]] has that name; \
             did you mean \"lan\"?",
        ],
    );
    golden(
        &format!(
            "{LAN}[[rule]]\naction = \"drop\"\nprotocol = \"icmp\"\nport = 80\n[[rule]]\naction = \"deny\"\nport = \"9-8\"\n"
        ),
        &[
            "site.toml:7:8: error: rule.port: icmp has no ports; remove it from protocol, or write a rule of its own for \
             it",
            "site.toml:9:10: error: rule.action: \"deny\" is not one of \"allow\", \"drop\", \"reject\"",
            "site.toml:10:8: error: rule.port: \"9-8\" ends before it begins; write \"8-9\"",
        ],
    );
    golden(
        &format!(
            "{LAN}[gateway]\ndefault-action = \"allow\"\n[[rule]]\naction = \"allow\"\n[[rule]]\naction = \"allow\"\nfrom = \"lan\"\n"
        ),
        &[
            "site.toml:5:18: warning: gateway.default-action: all rules allow, and what no rule matches is allowed as \
             well, so that they refuse nothing; write default-action = \"drop\" under [gateway]",
            "site.toml:8:1: warning: rule: never reached: \"rule 1\" before it matches everything; change their order",
        ],
    );
    golden(
        &format!(
            "{LAN}[[group]]\nname = \"lan\"\nfile = \"wrong.txt\"\n[[group]]\nname = \"g\"\nfile = \"no.txt\"\n"
        ),
        &[
            "site.toml:5:8: error: group.name: an interface is named \"lan\" too; rules could mean both, choose another \
             name",
            "site.toml:6:8: error: group.file: /etc/ana/wrong.txt:2: \"robots\" is not a prefix; write for example \
             \"10.77.0.2/32\"",
            "site.toml:9:8: error: group.file: cannot read /etc/ana/no.txt (entity not found); make the file, with one \
             prefix a line",
        ],
    );
    golden(
        "[[rule]]\naction = \"drop\"\n",
        &[
            "site.toml: warning: peer: no peers and no interfaces: nothing to do; add a [[peer]] or an [[interface]]",
            "site.toml:1:1: warning: rule: there is no [[interface]], so that no packet comes here; write [[interface]] \
             with name = \"lan\"",
        ],
    );
}

#[test]
fn peers_in_rules_and_nats() {
    let text = |from: &str, nat: &str| {
        format!(
            "[node]\nprivate-key-file = \"node.key\"\nlisten = 4600\n[tun]\naddress = \"10.77.0.1/24\"\n\
             [[peer]]\nname = \"branch\"\npublic-key = \"$HUB\"\nallowed-ips = \"10.8.0.0/16\"\n\
             [[interface]]\nname = \"wan\"\n[[rule]]\naction = \"drop\"\nfrom = {from}\n[[nat]]\nout = \"wan\"\n\
             from = {nat}\n"
        )
    };
    let good = text("[\"peer:branch\", \"tunnel\"]", "[\"10.0.0.0/24\", \"peer:branch\"]");
    golden(&good, &[]);
    let services = load(&good).config.unwrap().services;
    assert_eq!(services.rules[0].from, [Subject::Peer("branch".to_owned()), Subject::Tunnel]);
    let prefix = NatFrom::Prefix("10.0.0.0/24".parse().unwrap());
    assert_eq!(services.nats[0].from, [prefix, NatFrom::Peer("branch".to_owned())]);
    golden(
        &text("\"peer:brunch\"", "\"tunnel\""),
        &[
            "site.toml:14:8: error: rule.from: no peer is named \"brunch\"; did you mean \"branch\"?",
            "site.toml:17:8: error: nat.from: \"tunnel\" is no prefix, group or peer; write for example \
             \"10.0.0.0/24\" or \"peer:NAME\"",
        ],
    );
}

#[test]
fn nats_and_forwards() {
    golden(
        &format!(
            "{WAN}[[nat]]\nmode = \"full-cone\"\n[[nat]]\nout = \"wam\"\nports = \"0-1000\"\nports-per-client = 1024\ntables = 65\nport-choice = \"same\"\n"
        ),
        &[
            "site.toml:4:1: error: nat.out: missing; write out = \"wan\"",
            "site.toml:5:8: error: nat.mode: \"full-cone\" is not one of \"address-and-port\", \"port-only\", \"none\"",
            "site.toml:7:7: error: nat.out: no interface is named \"wam\"; did you mean \"wan\"?",
            "site.toml:8:9: error: nat.ports: port 0 is no port; write for example \"1024-65535\"",
            "site.toml:9:20: error: nat.ports-per-client: ports = \"0-1000\" has no whole block of 1024 ports (such as \
             1024-2047) for a client",
            "site.toml:10:10: error: nat.tables: 65 found, 64 or 256 is needed",
            "site.toml:11:15: error: nat.port-choice: \"same\" is not one of \"random\", \"parity\", \"preserve\"",
        ],
    );
    golden(
        &format!(
            "{WAN}[[nat]]\nout = \"wan\"\nmode = \"none\"\naddresses = \"192.0.2.1\"\n[[nat]]\nout = \"wan\"\n"
        ),
        &[
            "site.toml:7:13: error: nat.addresses: only mode = \"address-and-port\" changes addresses; remove addresses \
             or change mode",
            "site.toml:7:13: warning: nat.addresses: 192.0.2.1 is in no interface's network: nobody asks for it unless a \
             router sends it here",
            "site.toml:8:1: warning: nat.out: never reached: another [[nat]] before it takes all that leaves by \"wan\"",
        ],
    );
    golden(
        &format!(
            "{WAN}[[forward]]\nlisten = \"203.0.113.1:80\"\n[[forward]]\nlisten = \"udp 203.0.113.1:80\"\n\
             to = \"[fd00::1]:80\"\nproxy-protocol = true\n"
        ),
        &[
            "site.toml:4:1: error: forward.to: missing; write to = \"10.0.0.5:80\"",
            "site.toml:5:10: error: forward.listen: \"203.0.113.1:80\" has no protocol; write for example \"tcp \
             203.0.113.1:8080\", or \"tcp wan:8080\" for the addresses of an interface",
            "site.toml:8:6: error: forward.to: fd00::1 is not of the address family of 203.0.113.1; change one of them",
            "site.toml:9:18: error: forward.proxy-protocol: the PROXY protocol needs TCP; remove it, or write \
             listen = \"tcp …\"",
        ],
    );
}

#[test]
fn ranges_of_ports() {
    let all = services(&format!(
        "{LAN}{WAN}[[nat]]\nout = \"wan\"\nports = \"512-1023\"\nport-choice = \"preserve\"\n[[forward]]\n\
         listen = \"udp wan:16384-16393\"\nto = \"10.0.0.5\"\n[[forward]]\nlisten = \"tcp+udp 203.0.113.1:1-65535\"\n\
         to = \"10.0.0.6\"\n[[forward]]\nlisten = \"tcp [2001:db8::1]:5000-5009\"\nto = \"[fd00::5]:6000-6009\"\n"
    ).replace("203.0.113.1:1-65535", "203.0.113.2:1-65535"));
    assert_eq!((all.nats[0].ports, all.nats[0].port_choice), ((512, 1023), PortChoice::Preserve));
    let ports = |place: usize| {
        let forward = &all.forwards[place];
        (forward.port, forward.ports, forward.last_port(), forward.to.to_string())
    };
    assert_eq!(ports(0), (16_384, 10, 16_393, "10.0.0.5:16384".to_owned()));
    assert_eq!(ports(1), (1, 65_535, 65_535, "10.0.0.6:1".to_owned()));
    assert_eq!(ports(2), (5_000, 10, 5_009, "[fd00::5]:6000".to_owned()));
    golden(
        &format!(
            "{WAN}[[forward]]\nlisten = \"udp wan:100-90\"\nto = \"10.0.0.5\"\n[[forward]]\nlisten = \"udp wan:0-90\"\n\
             to = \"10.0.0.5\"\n[[forward]]\nlisten = \"udp wan:90-99\"\nto = \"10.0.0.5:80\"\n[[forward]]\n\
             listen = \"udp 203.0.113.1:95-120\"\nto = \"10.0.0.5\"\n"
        ),
        &[
            "site.toml:5:10: error: forward.listen: \"100-90\" ends before it begins; write \"90-100\"",
            "site.toml:8:10: error: forward.listen: port 0 is no port; write for example \"tcp 203.0.113.1:8080\", or \
             \"tcp wan:8080\" for the addresses of an interface",
            "site.toml:12:6: error: forward.to: 10 ports cannot lead to 1; name as many, or the address alone for the same \
             ones",
            "site.toml:14:10: error: forward.listen: udp 203.0.113.1:95-120 belongs to the forward to 10.0.0.5:80 already",
        ],
    );
}

#[test]
fn a_pool_has_addresses_that_hosts_can_have() {
    golden(
        &format!(
            "{WAN}[[route]]\nto = \"0.0.0.0/0\"\nvia = \"203.0.113.2\"\n[[nat]]\nout = \"wan\"\naddresses = \"203.0.113.0/24\"\n\
             [[nat]]\nout = \"wan\"\naddresses = \"203.0.113.255\"\nfrom = \"10.0.0.0/8\"\n[[interface]]\nname = \"lan\"\n\
             address = \"10.0.0.0/24\"\n"
        ),
        &[
            "site.toml:9:13: warning: nat.addresses: 203.0.113.0 is the network address of 203.0.113.0/24; it is left out",
            "site.toml:9:13: error: nat.addresses: 203.0.113.2 belongs to the next router towards 0.0.0.0/0, so that \
             nothing would get out; write a pool without it",
            "site.toml:9:13: warning: nat.addresses: 203.0.113.255 is the broadcast address of 203.0.113.0/24; it is left \
             out",
            "site.toml:10:1: warning: nat.out: never reached: another [[nat]] before it takes all that leaves by \"wan\"",
            "site.toml:12:13: error: nat.addresses: 203.0.113.255 is the broadcast address of 203.0.113.0/24; write the \
             address of a host",
            "site.toml:16:11: warning: interface.address: 10.0.0.0 is the network address of 10.0.0.0/24; write the \
             address of one host",
        ],
    );
}

#[test]
fn two_services_on_one_endpoint_however_it_is_named() {
    let forward = |listen: &str, to: &str| format!("[[forward]]\nlisten = \"{listen}\"\nto = \"{to}\"\n");
    golden(
        &format!(
            "{WAN}{}{}",
            forward("tcp wan:8080", "10.0.0.5:80"),
            forward("tcp 203.0.113.1:8080", "10.0.0.6:80")
        ),
        &[
            "site.toml:8:10: error: forward.listen: tcp 203.0.113.1:8080 belongs to the forward to 10.0.0.5:80 already",
        ],
    );
    golden(
        &format!(
            "{WAN}[[virtual-server]]\nlisten = \"tcp 203.0.113.1:80\"\nbackends = [\"10.0.0.7:80\"]\n{}{}",
            forward("tcp+udp wan:80", "10.0.0.5"),
            forward("tcp wan:53", "[fd00::5]:53"),
        ),
        &[
            "site.toml:8:10: error: forward.listen: tcp wan:80 is tcp 203.0.113.1:80 too, which belongs to virtual server \
             \"tcp 203.0.113.1:80\" already",
            "site.toml:11:10: warning: forward.listen: \"wan\" has no IPv6 address here, so that nothing listens for \
             [fd00::5]:53; give it one, or choose a host of the other family",
        ],
    );
    golden(
        &format!(
            "{WAN}{}{}",
            forward("tcp wan:80800", "10.0.0.5:80"),
            forward("tcp 203.0.113.1:0x50", "10.0.0.5:-1")
        ),
        &[
            "site.toml:5:10: error: forward.listen: \"80800\" is not a port from 1 to 65535; write for example \"tcp \
             203.0.113.1:8080\", or \"tcp wan:8080\" for the addresses of an interface",
            "site.toml:8:10: error: forward.listen: \"0x50\" is not a port from 1 to 65535; write for example \"tcp \
             203.0.113.1:8080\", or \"tcp wan:8080\" for the addresses of an interface",
            "site.toml:9:6: error: forward.to: \"-1\" is not a port from 1 to 65535; write for example \"10.0.0.5:80\"",
        ],
    );
}

#[test]
fn a_lease_needs_an_address_that_its_nat_has() {
    golden(
        &format!(
            "{WAN}[[nat]]\nout = \"wan\"\n[[lease]]\nname = \"a\"\nfrom = \"10.0.0.0/24\"\naddress = \"203.0.113.9\"\n\
             first-port = 2048\nports = 1024\n"
        ),
        &[
            "site.toml:7:8: warning: lease.address: no [[nat]] uses 203.0.113.9, so that the lease has no effect; add it \
             to the addresses of one",
        ],
    );
}

#[test]
fn health_of_a_virtual_server() {
    let health = |listen: &str, rest: &str, health: &str| {
        let all = services(&format!(
            "{WAN}[[virtual-server]]\nlisten = \"{listen}\"\nbackends = [\"10.0.0.1:80\"]\n{rest}\nhealth = {{ {health} }}\n"
        ));
        all.servers[0].health.clone().unwrap()
    };
    let tcp = "tcp 203.0.113.9:80";
    let plain = health(tcp, "", "tcp = true");
    assert_eq!((plain.port, plain.source, plain.proxy_protocol), (None, None, false));
    let elsewhere = health(tcp, "", "tcp = true, port = 8080, source = \"10.0.0.254\"");
    assert_eq!((elsewhere.port, elsewhere.source), (Some(8080), Some("10.0.0.254".parse().unwrap())));
    // As the backend expects it; another port is another program's.
    let proxied = "proxy-protocol = true";
    assert!(health(tcp, proxied, "http = \"/\"").proxy_protocol);
    assert!(health(tcp, proxied, "tcp = true").proxy_protocol);
    assert!(!health(tcp, proxied, "tcp = true, port = 8080").proxy_protocol);
    assert!(health(tcp, proxied, "tcp = true, port = 8080, proxy-protocol = true").proxy_protocol);
    assert!(!health(tcp, proxied, "tcp = true, proxy-protocol = false").proxy_protocol);
    assert!(!health(tcp, proxied, "command = [\"/bin/true\"]").proxy_protocol);
    let udp = "udp 203.0.113.9:53";
    let name = DnsCheck { name: "www.example.net".to_owned() };
    assert_eq!(health(udp, "", "dns = \"www.example.net\"").kind, HealthKind::Dns(name));
    let ping = UdpCheck { send: "ping".to_owned(), body: Some("pong".to_owned()) };
    assert_eq!(health(udp, "", "udp = \"ping\", body = \"pong\"").kind, HealthKind::Udp(ping));
    let wrong = |line: &str, message: &str| {
        let text = format!(
            "{WAN}[[virtual-server]]\nlisten = \"{tcp}\"\nbackends = [\"10.0.0.1:80\"]\nhealth = {{ {line} }}\n"
        );
        golden(&text, &[message]);
    };
    wrong(
        "tcp = true, body = \"x\"",
        "site.toml:7:10: error: virtual-server.health: body belongs to a check by HTTP or UDP; write http = \"/health\"",
    );
    wrong(
        "tcp = true, source = \"2001:db8::1\"",
        "site.toml:7:33: error: virtual-server.health.source: 2001:db8::1 is not of the address family of 203.0.113.9:80; change \
         one of them",
    );
    wrong(
        "dns = \"a..b\"",
        "site.toml:7:10: error: virtual-server.health: the name must be one of DNS, as www.example.net; correct it",
    );
    wrong(
        "udp = \"x\", proxy-protocol = true",
        "site.toml:7:40: error: virtual-server.health.proxy-protocol: the PROXY protocol belongs to a check over TCP; \
         remove it",
    );
}

#[test]
fn health_over_tls() {
    let server = |health: &str| {
        format!(
            "{WAN}[[virtual-server]]\nlisten = \"tcp 203.0.113.9:80\"\nbackends = [\"10.0.0.1:80\"]\n\
             health = {{ {health} }}\nproxy-protocol = true\n"
        )
    };
    let asked = |check: &str| match services(&server(check)).servers[0].health.clone().unwrap() {
        HealthSpec { kind, proxy_protocol: true, .. } => kind.tls().unwrap().sni.clone(),
        other => panic!("{other:?}"),
    };
    assert_eq!(asked("https = \"/\""), None);
    assert_eq!(asked("tls = true, sni = \"a.example\"").as_deref(), Some("a.example"));
    assert_eq!(asked("https = \"/\", host = \"a.example:8443\"").as_deref(), Some("a.example"));
    assert_eq!(asked("https = \"/\", host = \"10.0.0.1\""), None);
    assert_eq!(
        asked("https = \"/\", host = \"a.example\", sni = \"b.example\"").as_deref(),
        Some("b.example")
    );
    let wrong = |line: &str, message: &str| golden(&server(line), &[message]);
    let file = std::env::temp_dir().join(format!("anabranch-authorities-{}", std::process::id()));
    std::fs::write(&file, "nothing").unwrap();
    wrong(
        &format!("https = \"/\", ca-file = \"{}\"", file.display()),
        &format!(
            "site.toml:7:35: error: virtual-server.health.ca-file: {}: no certificate in it; write a PEM file with the \
             certificates of those who sign",
            file.display()
        ),
    );
    std::fs::remove_file(&file).unwrap();
    wrong(
        "tls = true, ca-file = \"/nonexistent/ca.pem\"",
        "site.toml:7:34: error: virtual-server.health.ca-file: /nonexistent/ca.pem: No such file or directory (os error 2)",
    );
    wrong(
        "http = \"/\", sni = \"a.example\"",
        "site.toml:7:10: error: virtual-server.health: sni and ca-file belong to a check by TLS; write https = \"/health\"",
    );
    wrong(
        "tls = true, sni = \"10.0.0.1\"",
        "site.toml:7:30: error: virtual-server.health.sni: sni must be a host name, as www.example.net",
    );
}

/// Row C6: QUIC is known by its ids where answers come by.
#[test]
fn affinity_of_quic() {
    let server = |more: &str| {
        format!(
            "{WAN}[[virtual-server]]\nbackends = [\"10.0.0.1:443\"]\naffinity = \"quic-connection-id\"\n{more}\n"
        )
    };
    let of = services(&server("listen = \"udp 203.0.113.9:443\"")).servers[0].affinity;
    assert_eq!(of, Affinity::QuicConnectionId);
    let message = "site.toml:6:12: error: virtual-server.affinity: QUIC needs UDP, and ids are learnt from answers, with \
                   delivery = \"nat\"; remove it";
    golden(&server("listen = \"tcp 203.0.113.9:443\""), &[message]);
    golden(&server("listen = \"udp 203.0.113.9:443\"\ndelivery = \"direct-return\""), &[message]);
}

#[test]
fn virtual_servers_and_leases() {
    let server = |rest: &str| format!("{WAN}[[virtual-server]]\nlisten = \"tcp 203.0.113.9:80\"\n{rest}\n");
    golden(
        &server("health = {}"),
        &[
            "site.toml:4:1: error: virtual-server.backends: missing; write for example backends = [\"10.0.0.1:80\", \
             \"10.0.0.2:80\"]",
            "site.toml:6:10: error: virtual-server.health: nothing says how; write health = { tcp = true }, \
             { http = \"/health\" }, { https = \"/health\" }, { tls = true }, { dns = \"www.example.net\" }, { udp = \"ping\" } or { command = [\"/usr/bin/check\"] }",
        ],
    );
    golden(
        &server(
            "delivery = \"direct-return\"\nsource = \"port-only\"\nbackends = [\"10.0.0.1:81\", \"10.0.0.1\", 7]",
        ),
        &[
            "site.toml:7:10: error: virtual-server.source: with delivery = \"direct-return\" backends answer the client \
             themselves; remove source",
            "site.toml:8:13: error: virtual-server.backends: direct return changes no port; write 10.0.0.1:80",
            "site.toml:8:28: error: virtual-server.backends: \"10.0.0.1\" has no port; write for example \"10.0.0.1:80\"",
            "site.toml:8:40: error: virtual-server.backends: a number found, an address is needed; write for example \
             backends = [\"10.0.0.1:80\", \"10.0.0.2:80\"]",
        ],
    );
    golden(
        &server(
            "backends = [\"10.0.0.1:80\"]\nhealth = { command = \"check\" }\n[[forward]]\nlisten = \
                 \"tcp 203.0.113.9:80\"\nto = \"10.0.0.2\"",
        ),
        &[
            "site.toml:7:10: error: virtual-server.health: the command must be an absolute path; correct it",
            "site.toml:9:10: error: forward.listen: tcp 203.0.113.9:80 belongs to virtual server \"tcp 203.0.113.9:80\" \
             already",
        ],
    );
    let lease = "from = \"10.0.0.0/24\"\naddress = \"203.0.113.1\"\nports = 1024\n";
    golden(
        &format!(
            "{WAN}[[nat]]\nout = \"wan\"\n[[lease]]\nname = \"a\"\n{lease}first-port = 2048\n[[lease]]\nname = \"b\"\n\
             {lease}first-port = 2048\n[[lease]]\nname = \"c\"\n{lease}first-port = 2000\n"
        ),
        &[
            "site.toml:13:8: error: lease.first-port: its ports belong to lease \"a\" already; choose others",
            "site.toml:23:14: error: lease.first-port: 2000 is not a multiple of 1024; ports come in blocks",
        ],
    );
}

#[test]
fn the_gateway_section() {
    golden(
        &format!(
            "{LAN}[gateway]\nfragments = \"sometimes\"\nlog = \"x\"\n[gateway.timeouts]\nudp-seconds = 5\nudp = 5\n"
        ),
        &[
            "site.toml:5:13: error: gateway.fragments: \"sometimes\" is not one of \"as-needed\", \"assemble\", \"bridge\"",
            "site.toml:6:1: error: gateway.log: unknown key; known here: default-action, flows-max, embryonic-max, \
             fragment-bytes-max, fragments-per-source-max, errors-per-second-max, fragments, host, distribution, \
             core-rebalance, health-user, keep-flows-seconds, log-file, timeouts",
            "site.toml:8:15: warning: gateway.timeouts.udp-seconds: RFC 4787 asks for 120 s or more; shorter ones break \
             quiet connections",
            "site.toml:9:1: error: gateway.timeouts.udp: unknown key; known here: tcp-established-seconds, \
             tcp-transitory-seconds, tcp-closed-seconds, udp-seconds, udp-unreplied-seconds, icmp-seconds, \
             other-seconds, fragments-seconds",
        ],
    );
    let user =
        |name: &str| services(&format!("{LAN}[gateway]\nhealth-user = \"{name}\"\n")).settings.health_user;
    assert_eq!((user("root").uid, user("990:991").gid), (0, 991));
    golden(
        &format!("{LAN}[gateway]\nhealth-user = \"no-such-user\"\n"),
        &[
            "site.toml:5:15: error: gateway.health-user: there is no user \"no-such-user\" in /etc/passwd; write a name from \
           there, or numbers as 65534:65534",
        ],
    );
    golden(
        &format!("{LAN}[gateway]\nfragments = {{}}\n"),
        &["site.toml:5:13: error: gateway.fragments: one bound is needed; write for example fragments = \
           { up-to-bytes = 4000 }"],
    );
}

#[test]
fn files_of_groups() {
    let list = values::group_file("# x\n10.0.0.1/8 # y\n\n::1\r\n", 2).unwrap();
    assert_eq!(list, ["10.0.0.0/8".parse::<IpNet>().unwrap(), "::1/128".parse().unwrap()]);
    assert_eq!(values::group_file("::1\n::2\n", 1).unwrap_err().0, 2);
}

proptest! {
    #[test]
    fn no_text_panics(text in "\\PC{0,60}") {
        let _ = (values::listen(&text), values::forward_listen(&text), values::pool(&text), values::target(&text));
        let _ = (values::word(&text), values::port_range(&text), values::group_file(&text, 3));
    }

    /// Lines of a valid file, shuffled, cut and repeated.
    #[test]
    fn no_mixture_of_lines_panics(picks in prop::collection::vec((0usize..100, 0usize..60), 0..60)) {
        let whole = include_str!("../../../../../etc/reference.toml");
        let lines: Vec<&str> = whole.lines().filter(|line| !line.starts_with('#') && !line.is_empty()).collect();
        let mut text = String::new();
        for (line, cut) in picks {
            let line = lines[line % lines.len()];
            text.push_str(line.get(..line.len().min(cut)).unwrap_or(line));
            text.push('\n');
        }
        let _ = load(&text);
    }
}
