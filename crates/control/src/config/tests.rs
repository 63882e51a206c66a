//! Golden tests: a configuration and, word for word, what is said about it.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::io;
use std::path::Path;

use proptest::prelude::*;
use zeroize::Zeroizing;

use super::*;

/// Keys whose private half the tests know: `OWN` belongs to the file `node.key`.
const OWN_PRIVATE: &str = "dwdtCnMYpX08FsFyUbJmRd9ML4frwJkqsXf7pR25LCo=";
const OWN: &str = "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=";
const HUB: &str = "3p7bfXt9wbTTW2HC7OQ1Nz+DQ8hbeGdNrfx+FG+IK08=";
const OTHER: &str = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=";

fn read_key(path: &Path) -> io::Result<KeyFile> {
    let file = |text: &str, exposed| Ok(KeyFile { text: Zeroizing::new(text.to_owned()), exposed });
    match path.to_str() {
        Some("/etc/ana/node.key") => file(&format!("{OWN_PRIVATE}\n"), false),
        Some("/etc/ana/open.key") => file(OWN_PRIVATE, true),
        Some("/etc/ana/empty.key") => file("\n", false),
        Some("/etc/ana/bad.key") => file("secret!", false),
        _ => Err(io::ErrorKind::NotFound.into()),
    }
}

fn read_text(path: &Path) -> io::Result<String> {
    match path.to_str() {
        Some("/etc/ana/bots.txt") => {
            Ok("# one a line\n198.51.100.7\n\n2001:db8:7::/48 # all of it\n".to_owned())
        }
        Some("/etc/ana/hub-cores.toml") => Ok("usable = [1]\n".to_owned()),
        Some("/etc/ana/wrong.txt") => Ok("198.51.100.7\nrobots\n".to_owned()),
        _ => Err(io::ErrorKind::NotFound.into()),
    }
}

pub(crate) fn load(text: &str) -> Loaded {
    let surroundings = Surroundings {
        file: "site.toml",
        directory: Path::new("/etc/ana"),
        exposed: true,
        host: "router",
        read_key: &read_key,
        read_text: &read_text,
    };
    parse(&text.replace("$HUB", HUB).replace("$OWN", OWN).replace("$OTHER", OTHER), &surroundings)
}

/// A whole configuration with one part replaced.
const NODE: &str = "[node]\nprivate-key-file = \"node.key\"\nlisten = 4600\n";
const TUN: &str = "[tun]\naddress = [\"10.77.0.1/24\"]\n";
const PEER: &str = "[[peer]]\nname = \"hub\"\npublic-key = \"$HUB\"\nendpoints = [\"198.18.0.2:4600\"]\n\
                    allowed-ips = [\"10.77.0.2/32\"]\n";

fn said(text: &str) -> Vec<String> {
    load(text).problems.iter().map(ToString::to_string).collect()
}

#[track_caller]
pub(crate) fn golden(text: &str, expected: &[&str]) {
    let said = said(text);
    assert_eq!(said, expected, "\n--- of ---\n{text}\n--- is said ---\n{}\n", said.join("\n"));
}

#[test]
fn the_configuration_of_the_design() {
    let text = r#"
[node]
name = "branch"
private-key-file = "node.key"
listen = 4600
cores = "all"
[tun]
name = "ana0"
address = ["10.77.0.1/24"]
[[wan]]
interface = "wan0"
[[wan]]
match = "wwan*"
tier = 1
rate-max = "20 Mbit/s"
address-family = "ipv6"
gateway = "2001:db8::1"
[[peer]]
name = "hub"
public-key = "$HUB"
preshared-key-file = "node.key"
endpoints = ["198.18.0.2:4600", "hub.example.net:4600"]
allowed-ips = ["10.77.0.2/32", "0.0.0.0/0"]
wans = ["wan0", "wwan0"]
paths-per-wan-pair = 2
tls-port = 0
sockets-per-path = 8
policy = "least-loaded"
flow = "2-tuple"
"#;
    let loaded = load(text);
    assert_eq!(loaded.problems, []);
    let config = loaded.config.unwrap();
    assert_eq!(config.node.name, "branch");
    assert_eq!(key::encode(&config.node.private_key.public()), OWN);
    assert_eq!((config.node.listen, &config.node.cores), (Some(4600), &Cores::All));
    assert_eq!((config.tun.name.as_str(), config.tun.mtu, config.tun.routes), ("ana0", 1500, Routes::Auto));
    assert_eq!(config.control_socket(), Path::new("/run/anabranch/ana0.sock"));
    assert_eq!(config.wans.len(), 2);
    assert_eq!(config.wans[0].interface, InterfaceMatch::Name("wan0".to_owned()));
    assert_eq!((config.wans[1].tier, config.wans[1].rate_max_bps), (1, Some(20_000_000)));
    assert_eq!(config.wans[1].family, Family::Ipv6);
    assert!(config.wans[1].interface.covers("wwan7"));
    let peer = &config.peers[0];
    assert_eq!(key::encode(&peer.public_key), HUB);
    assert!(peer.preshared_key.is_some());
    assert_eq!(peer.endpoints[1], Endpoint::Name { host: "hub.example.net".to_owned(), port: 4600 });
    assert_eq!(peer.wans.as_deref().unwrap(), ["wan0", "wwan0"]);
    assert_eq!((peer.paths.udp.per_wan_pair, peer.paths.udp.sockets, peer.paths.tls_port), (2, 8, None));
    assert_eq!((peer.policy, peer.flow), (Policy::LeastLoaded, FlowDefinition::TwoTuple));
    assert!(config.has_default_route());
}

#[test]
fn defaults() {
    let loaded = load(&format!("{NODE}{TUN}{PEER}"));
    assert_eq!(loaded.problems, []);
    let config = loaded.config.unwrap();
    assert_eq!(config.node.name, "router");
    assert_eq!(config.node.state_dir, Path::new(STATE_DIR));
    assert_eq!(config.node.rekey_after_seconds, 120);
    let peer = &config.peers[0];
    assert_eq!((peer.paths.udp.per_wan_pair, peer.paths.udp.sockets, &peer.wans), (1, 4, &None));
    assert_eq!((peer.encryption, peer.policy), (Encryption::On, Policy::Hash));
    assert_eq!(peer.steering, Steering::default());
    assert!(!config.has_default_route());
}

#[test]
fn numbers_and_lists_of_cores_and_tables() {
    let config = |node: &str, tun: &str| {
        let loaded = load(&format!("{NODE}{node}\n{TUN}{tun}\n{PEER}"));
        assert_eq!(loaded.problems, []);
        loaded.config.unwrap()
    };
    assert_eq!(config("cores = 4", "").node.cores, Cores::Count(4));
    assert_eq!(config("rekey-after-seconds = 5", "").node.rekey_after_seconds, 5);
    assert_eq!(config("cores = [3, 1]", "").node.cores, Cores::List(vec![3, 1]));
    assert_eq!(config("", "table = 77").tun.routes, Routes::Table(77));
    assert_eq!(config("", "route = \"off\"").tun.routes, Routes::Off);
    assert_eq!(config("", "mtu = 9_000").tun.mtu, 9000);
}

#[test]
fn faults_of_syntax() {
    golden("[node\nname = 1\n", &["site.toml:1:6: error: not TOML: unclosed table, expected `]`"]);
    golden("[node]\nname = \"a\"\nname = \"b\"\n", &["site.toml:3:1: error: not TOML: duplicate key"]);
    golden(
        "[node]\nname = branch\n",
        &["site.toml:2:8: error: not TOML: string values must be quoted, expected literal string"],
    );
}

#[test]
fn sections() {
    golden(
        "",
        &[
            "site.toml: warning: peer: no peers and no interfaces: nothing to do; add a [[peer]] or an [[interface]]",
        ],
    );
    golden(
        PEER,
        &[
            "site.toml: error: node: section [node] is missing; write [node] with private-key-file = \"node.key\"",
            "site.toml:1:1: warning: tun.address: no address: this node itself cannot use the tunnel; \
         for example address = [\"10.77.0.1/24\"]",
        ],
    );
    let all = "[node], [tun], [tap], [[wan]], [[peer]], [[class]], [gateway], [[interface]], [[tenant]], [[route]], [[group]], \
               [[rule]], [[nat]], [[forward]], [[virtual-server]], [[lease]], [cluster]";
    golden(
        &format!("colour = 3\n{NODE}{TUN}{PEER}[pear]\n[zone]\n"),
        &[
            &format!("site.toml:1:1: error: colour: unknown key; every key stands under one of {all}"),
            "site.toml:12:2: error: pear: unknown section; did you mean [[peer]]?",
            &format!("site.toml:13:2: error: zone: unknown section; there are {all}"),
        ],
    );
    golden(
        &format!("{NODE}{TUN}{PEER}[wan]\ninterface = \"wan0\"\n"),
        &["site.toml:11:1: error: wan: stands in double brackets, once for each; write [[wan]]"],
    );
    golden(
        &format!("{NODE}[[tun]]\n{PEER}"),
        &[
            "site.toml:1:1: warning: tun.address: no address: this node itself cannot use the tunnel; \
         for example address = [\"10.77.0.1/24\"]",
            "site.toml:4:1: error: tun: stands once, in single brackets; write [tun]",
        ],
    );
}

#[test]
fn unknown_keys() {
    golden(
        &format!("{NODE}port = 1\n{TUN}{PEER}PublicKey = \"x\"\nendpoint = \"1.2.3.4:5\"\n"),
        &[
            "site.toml:4:1: error: node.port: unknown key; known here: name, private-key, private-key-file, \
         listen, listen-tls, cores, reserved-cores, preferred-cores, rekey-after-seconds, location-file, \
         state-dir, log-file, \
         control-socket",
            "site.toml:12:1: error: peer.PublicKey: unknown key; did you mean \"public-key\"?",
            "site.toml:13:1: error: peer.endpoint: unknown key; did you mean \"endpoints\"?",
        ],
    );
}

#[test]
fn node_section() {
    let golden_node =
        |node: &str, expected: &[&str]| golden(&format!("[node]\n{node}\n{TUN}{PEER}"), expected);
    golden_node(
        "private-key-file = \"node.key\"\nlisten-tls = 443",
        &[
            "site.toml:3:14: error: node.listen-tls: nothing comes in by TCP without listen; write listen = 4600 beside it",
        ],
    );
    golden_node(
        "",
        &[
            "site.toml:1:1: error: node.private-key-file: missing; write private-key-file = \"node.key\" and make \
         the file with \"anabranch genkey > node.key\"",
        ],
    );
    golden_node(
        "private-key-file = \"gone.key\"",
        &[
            "site.toml:2:20: error: node.private-key-file: cannot read /etc/ana/gone.key (entity not found); make it \
         with \"anabranch genkey > /etc/ana/gone.key\" or correct the name",
        ],
    );
    golden_node(
        "private-key-file = \"open.key\"",
        &[
            "site.toml:2:20: warning: node.private-key-file: other users can read /etc/ana/open.key; chmod 600 it",
        ],
    );
    golden_node(
        "private-key-file = \"empty.key\"",
        &[
            "site.toml:2:20: error: node.private-key-file: not a key: the key is empty; a key is 44 characters of \
         base64 as printed by \"anabranch genkey\" and \"anabranch pubkey\"",
        ],
    );
    golden_node(
        "private-key-file = \"bad.key\"",
        &["site.toml:2:20: error: node.private-key-file: not a key: not base64; a key is 44 characters of \
         base64 as printed by \"anabranch genkey\" and \"anabranch pubkey\""],
    );
    golden_node(
        "private-key-file = 5",
        &[
            "site.toml:2:20: error: node.private-key-file: a number found, a string is needed; for example \"node.key\"",
        ],
    );
    golden_node(
        "private-key-file = \"node.key\"\nprivate-key = \"x\"",
        &[
            "site.toml:3:15: error: node.private-key: private-key and private-key-file are both given; keep one of them",
        ],
    );
    golden_node(
        "private-key = \"dwdtCnMYpX08FsFyUbJmRd9ML4frwJkqsXf7pR25LCo=\"",
        &[
            "site.toml:2:15: warning: node.private-key: other users can read this file; chmod 600 it, or keep the \
         key in a private-key-file",
        ],
    );
}

#[test]
fn other_keys_of_the_node_section() {
    let golden_node =
        |node: &str, expected: &[&str]| golden(&format!("[node]\n{node}\n{TUN}{PEER}"), expected);
    let key = "private-key-file = \"node.key\"\n";
    golden_node(
        &format!("{key}listen = 0\nname = \"\""),
        &[
            "site.toml:3:10: error: node.listen: 0 found, a whole number from 1 to 65535 is needed",
            "site.toml:4:8: error: node.name: \"\" is not a name of 1 to 64 visible characters; write for example \"hub\"",
        ],
    );
    golden_node(
        &format!("{key}listen = \"4600\""),
        &["site.toml:3:10: error: node.listen: a string found, a whole number from 1 to 65535 is needed"],
    );
    golden_node(
        &format!("{key}cores = 0"),
        &[
            "site.toml:3:9: error: node.cores: not understood (1 to 128 cores are possible); write \"all\", a number \
         such as 4, or a list of CPUs such as [0, 1, 2, 3]",
        ],
    );
    golden_node(
        &format!("{key}cores = [0, 0, -1]"),
        &[
            "site.toml:3:13: error: node.cores: CPU 0 stands twice; remove one",
            "site.toml:3:16: error: node.cores: not a CPU from 0 to 1023; write \"all\", a number such as 4, or a \
         list of CPUs such as [0, 1, 2, 3]",
        ],
    );
}

#[test]
fn tun_section() {
    let golden_tun = |tun: &str, expected: &[&str]| golden(&format!("{NODE}[tun]\n{tun}\n{PEER}"), expected);
    golden_tun(
        "address = [\"10.77.0.1\", \"fd77::1\"]",
        &[
            "site.toml:5:12: error: tun.address: \"10.77.0.1\" has no prefix length; write for example \"10.77.0.1/24\"",
            "site.toml:5:25: error: tun.address: \"fd77::1\" has no prefix length; write for example \"fd77::1/64\"",
        ],
    );
    golden_tun(
        "address = \"10.77.0.0/24\"",
        &[
            "site.toml:5:11: warning: tun.address: 10.77.0.0/24 is the network itself; use an address within it",
        ],
    );
    golden_tun(
        "address = [\"10.77.0.1/24\", \"10.77.0.1/16\"]",
        &["site.toml:5:28: error: tun.address: 10.77.0.1 stands twice; remove one"],
    );
    golden_tun(
        "address = [\"10.77.0.1/24\"]\nname = \"a-much-too-long-name\"\nmtu = 576\nroute = \"of\"",
        &[
            "site.toml:6:8: error: tun.name: \"a-much-too-long-name\" is longer than the 15 bytes Linux allows",
            "site.toml:7:7: error: tun.mtu: 576 found, a whole number from 1280 to 9000 is needed",
            "site.toml:8:9: error: tun.route: \"of\" is not one of \"auto\", \"off\"",
        ],
    );
    golden_tun(
        "address = [\"10.77.0.1/24\"]\nroute = \"off\"\ntable = 7",
        &["site.toml:7:9: error: tun.table: route = \"off\" leaves nothing for a table; remove one of them"],
    );
    golden_tun(
        "address = [\"10.77.0.2/24\"]",
        &["site.toml:10:16: warning: peer.allowed-ips: 10.77.0.2/32 is this node's own address"],
    );
}

#[test]
fn wan_section() {
    let golden_wan =
        |wan: &str, expected: &[&str]| golden(&format!("{NODE}{TUN}{PEER}[[wan]]\n{wan}\n"), expected);
    golden_wan(
        "",
        &["site.toml:11:1: error: wan.interface: missing; write interface = \"wan0\" or match = \"wwan*\""],
    );
    golden_wan(
        "interface = \"wwan*\"",
        &["site.toml:12:13: error: wan.interface: \"wwan*\" is a pattern; write it as match = \"wwan*\""],
    );
    golden_wan(
        "interface = \"wan0\"\nmatch = \"wan*\"",
        &["site.toml:13:9: error: wan.match: interface and match are both given; keep one of them"],
    );
    golden_wan(
        "interface = \"ana0\"\n[[wan]]\ninterface = \"lo\"",
        &[
            "site.toml:12:13: error: wan.interface: \"ana0\" is the tunnel's own interface; name the one that leads \
         to the Internet",
            "site.toml:14:13: error: wan.interface: \"lo\" leads nowhere; name the interface that leads to the Internet",
        ],
    );
    golden_wan(
        "interface = \"w0\"\n[[wan]]\ninterface = \"w0\"",
        &["site.toml:14:13: error: wan.interface: \"w0\" stands in two [[wan]] sections; remove one"],
    );
    golden_wan(
        "interface = \"w0\"\nrate-max = \"100\"\ntier = -1\naddress-family = \"v6\"",
        &[
            "site.toml:13:12: error: wan.rate-max: \"100\" has no unit; write for example \"100 Mbit/s\", \
         \"1.5 Gbit/s\" or \"800 kbit/s\"",
            "site.toml:14:8: error: wan.tier: a number found, a whole number from 0 to 255 is needed",
            "site.toml:15:18: error: wan.address-family: \"v6\" is not one of \"any\", \"ipv4\", \"ipv6\"",
        ],
    );
    golden_wan(
        "interface = \"w0\"\naddress-family = \"ipv6\"\ngateway = [\"192.0.2.1\", \"router\"]",
        &[
            "site.toml:9:14: warning: peer.endpoints: no [[wan]] uses the address family of 198.18.0.2:4600",
            "site.toml:14:12: error: wan.gateway: not of the address family in use; change one of address-family \
         and gateway",
            "site.toml:14:25: error: wan.gateway: \"router\" is not the address of a router; write for example \
         \"192.0.2.1\"",
        ],
    );
}

#[test]
fn peer_section() {
    let golden_peer =
        |peer: &str, expected: &[&str]| golden(&format!("{NODE}{TUN}[[peer]]\n{peer}\n"), expected);
    golden_peer(
        "",
        &[
            "site.toml:6:1: error: peer.name: missing; write name = \"hub\"",
            "site.toml:6:1: error: peer.public-key: missing; write public-key = \"(44 characters of base64)\"",
        ],
    );
    let identity = "name = \"hub\"\nallowed-ips = [\"10.77.0.2/32\"]\n";
    golden_peer(
        &format!("{identity}public-key = \"AAAA\""),
        &[
            "site.toml:9:14: error: peer.public-key: not a key: 3 bytes instead of 32; a key is 44 characters of \
         base64 as printed by \"anabranch genkey\" and \"anabranch pubkey\"",
        ],
    );
    golden_peer(
        &format!("{identity}public-key = \"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\""),
        &["site.toml:9:14: error: peer.public-key: this public key gives no secrecy; use the one that \
         \"anabranch pubkey\" prints on the peer"],
    );
    golden_peer(
        &format!("{identity}public-key = \"$OWN\""),
        &[
            "site.toml:9:14: error: peer.public-key: this is the key of this node itself; put the peer's public \
         key here",
        ],
    );
}

#[test]
fn other_keys_of_a_peer() {
    let golden_peer =
        |peer: &str, expected: &[&str]| golden(&format!("{NODE}{TUN}[[peer]]\n{peer}\n"), expected);
    let identity = "name = \"hub\"\nallowed-ips = [\"10.77.0.2/32\"]\npublic-key = \"$HUB\"\n";
    golden_peer(
        &format!("{identity}endpoints = [\"198.18.0.2\", \"hub:0\", 5]"),
        &[
            "site.toml:10:14: error: peer.endpoints: \"198.18.0.2\" has no port; write \"198.18.0.2:4600\" with the \
         peer's port",
            "site.toml:10:28: error: peer.endpoints: port 0 cannot be dialled; write the port the peer listens on",
            "site.toml:10:37: error: peer.endpoints: a number found, a string is needed; for example \
         \"198.18.0.2:4600\"",
        ],
    );
    golden_peer(
        &format!("{identity}endpoints = [\"1.2.3.4:5\", \"1.2.3.4:5\"]\nwans = \"wan0\""),
        &[
            "site.toml:10:27: warning: peer.endpoints: 1.2.3.4:5 stands twice; remove one",
            "site.toml:11:8: error: peer.wans: \"wan0\" is not in any [[wan]] section; add [[wan]] with \
         interface = \"wan0\"",
        ],
    );
    golden_peer(
        &format!("{identity}encryption = \"off\""),
        &[
            "site.toml:10:14: error: peer.encryption: lets others read inner packets; if that is really meant, add \
         allow-cleartext = true, otherwise write encryption = \"on\"",
        ],
    );
    golden_peer(
        &format!("{identity}encryption = \"partial\"\nallow-cleartext = true"),
        &[
            "site.toml:10:14: warning: peer.encryption: inner packets of this peer are encrypted ONLY IN PART; \
         anybody on the way can read the rest",
        ],
    );
    golden_peer(
        &format!(
            "{identity}steering = \"per-tunel\"\naccept-steering = [\"core-id\", \"core\"]\ntunnel-core = 200"
        ),
        &[
            "site.toml:10:12: error: peer.steering: \"per-tunel\" is not one of \"core-id\", \"receiver-assigned\", \"per-tunnel\", \
         \"sealed-core-id\", \"receiver-decides\", \"session-id\", \"sealed-header\"; did you \
         mean \"per-tunnel\"?",
            "site.toml:11:31: error: peer.accept-steering: must be \"core-id\" or \"receiver-assigned\" or \
         \"per-tunnel\" or \"sealed-core-id\" or \"receiver-decides\" or \"session-id\" or \"sealed-header\"",
            "site.toml:12:15: error: peer.tunnel-core: 200 found, a whole number from 0 to 127 is needed",
        ],
    );
    golden_peer(
        &format!("{identity}policy = \"roundrobin\"\nflow = \"3-tuple\"\npaths-per-wan-pair = 9"),
        &[
            "site.toml:10:10: error: peer.policy: \"roundrobin\" is not one of \"hash\", \"round-robin\", \
         \"random\", \"least-loaded\"; did you mean \"round-robin\"?",
            "site.toml:11:8: error: peer.flow: \"3-tuple\" is not one of \"5-tuple\", \"4-tuple\", \"2-tuple\", \
         \"5-tuple-dscp\"; did you mean \"5-tuple\"?",
            "site.toml:12:22: error: peer.paths-per-wan-pair: 9 found, a whole number from 1 to 8 is needed",
        ],
    );
    golden_peer(
        &format!("{identity}preshared-key-file = \"none\"\nallow-cleartext = \"yes\""),
        &[
            "site.toml:10:22: error: peer.preshared-key-file: cannot read /etc/ana/none (entity not found); make it \
         with \"anabranch genkey > /etc/ana/none\" or correct the name",
            "site.toml:11:19: error: peer.allow-cleartext: a string found, true or false (without quotes) is needed",
        ],
    );
}

#[test]
fn several_peers() {
    let two = |second: &str| format!("{NODE}{TUN}{PEER}[[peer]]\n{second}\n");
    golden(
        &two("name = \"hub\"\npublic-key = \"$HUB\"\nallowed-ips = [\"10.77.0.2\"]"),
        &[
            "site.toml:12:8: error: peer.name: two peers are named \"hub\"; give each its own name",
            "site.toml:13:14: error: peer.public-key: peer \"hub\" has the same key; every peer needs a key of its own",
            "site.toml:14:16: error: peer.allowed-ips: 10.77.0.2/32 belongs to peer \"hub\" already; a prefix has \
         one owner, or owners of different tenants",
        ],
    );
    golden(
        &two("name = \"b\"\npublic-key = \"$OTHER\"\nallowed-ips = [\"10.78.0.1/24\", \"10.78.0.0/24\"]"),
        &[
            "site.toml:14:16: warning: peer.allowed-ips: 10.78.0.1/24 has host bits; 10.78.0.0/24 is taken",
            "site.toml:14:32: warning: peer.allowed-ips: 10.78.0.0/24 stands twice; remove one",
        ],
    );
    golden(
        &format!(
            "{NODE}{TUN}[[tenant]]\nname = \"red\"\n{PEER}tenant = \"red\"\n[[peer]]\nname = \"b\"\n\
             public-key = \"$OTHER\"\nallowed-ips = [\"10.77.0.2\"]\ntenant = \"red\"\n"
        ),
        &[
            "site.toml:17:16: error: peer.allowed-ips: 10.77.0.2/32 belongs to peer \"hub\" already; a prefix has \
         one owner in tenant \"red\"",
        ],
    );
    golden(
        &two("name = \"b\"\npublic-key = \"$OTHER\"\nallowed-ips = [\"10.78.0.1\"]\ntenant = \"blue\""),
        &["site.toml:15:10: error: peer.tenant: no tenant is named \"blue\"; add a [[tenant]] section with \
         name = \"blue\""],
    );
    // Tenants may have the same addresses.
    let text = format!(
        "{NODE}{TUN}[[tenant]]\nname = \"red\"\n{PEER}[[peer]]\nname = \"b\"\npublic-key = \"$OTHER\"\n\
         allowed-ips = [\"10.77.0.2\"]\ntenant = \"red\"\n"
    );
    golden(&text, &[]);
    let config = load(&text).config.unwrap();
    let peers: Vec<_> = config.peers.iter().map(|peer| (peer.id.0, peer.tenant.as_deref())).collect();
    assert_eq!(peers, [(0, None), (1, Some("red"))]);
    golden(
        &two("name = \"b\"\npublic-key = \"$OTHER\""),
        &["site.toml:11:1: warning: peer.allowed-ips: none: no packet goes to or comes from this peer; for \
         example [\"10.77.0.2/32\"]"],
    );
}

#[test]
fn nobody_can_dial_and_a_tunnel_in_itself() {
    let node = "[node]\nprivate-key-file = \"node.key\"\n";
    let identity = "name = \"hub\"\npublic-key = \"$HUB\"\n";
    golden(
        &format!("{node}{TUN}[[peer]]\n{identity}allowed-ips = [\"10.0.0.0/8\"]\n"),
        &[
            "site.toml:5:1: error: peer.endpoints: missing, and [node] has no listen, so that neither side can dial \
         the other; write endpoints = [\"198.18.0.2:4600\"] here or listen = 4600 there",
        ],
    );
    let peer = format!(
        "{node}{TUN}[[peer]]\n{identity}allowed-ips = [\"198.18.0.0/15\", \"::/0\"]\nendpoints = \"198.18.0.2:1\"\n"
    );
    golden(
        &peer,
        &[
            "site.toml:9:13: warning: peer.endpoints: 198.18.0.2 lies within 198.18.0.0/15 of allowed-ips, so the \
         tunnel would be routed into itself; name the interface in a [[wan]] section, or take a default route \
         or smaller prefixes",
        ],
    );
    golden(&format!("{peer}[[wan]]\ninterface = \"wan0\"\n"), &[]);
    golden(
        &format!("{peer}wans = [\"wan9\"]\n[[wan]]\ninterface = \"wan0\"\n"),
        &["site.toml:10:9: error: peer.wans: \"wan9\" is not in any [[wan]] section; did you mean \"wan0\"?"],
    );
}

#[test]
fn a_file_that_cannot_be_read_is_a_problem_too() {
    let loaded = Config::load(Path::new("/nonexistent/site.toml"));
    assert!(loaded.config.is_none());
    assert_eq!(
        loaded.problems[0].to_string(),
        "/nonexistent/site.toml: error: cannot read the configuration (No such file or directory (os error 2)); \
         name an existing TOML file"
    );
    assert!(Config::load(Path::new("/")).config.is_none());
}

#[test]
fn problems_are_bounded() {
    let mut text = String::from(NODE);
    for number in 0..500 {
        text.push_str(&format!("x{number} = 1\n"));
    }
    assert_eq!(said(&text).len(), 100);
}

proptest! {
    #[test]
    fn no_text_panics(text in "\\PC{0,200}") {
        let _ = load(&text);
    }

    /// Lines of a valid file, shuffled, cut and repeated.
    #[test]
    fn no_mixture_of_lines_panics(picks in prop::collection::vec((0usize..16, 0usize..60), 0..40)) {
        let whole = format!("{NODE}{TUN}{PEER}[[wan]]\ninterface = \"wan0\"\nrate-max = \"1 Mbit/s\"\nwans = [{{}}]\n");
        let lines: Vec<&str> = whole.lines().collect();
        let mut text = String::new();
        for (line, cut) in picks {
            let line = lines[line % lines.len()];
            text.push_str(line.get(..line.len().min(cut)).unwrap_or(line));
            text.push('\n');
        }
        let _ = load(&text);
    }
}

/// A configuration without errors, for tests of other modules: `node` stands under `[node]`.
#[track_caller]
pub(crate) fn config(node: &str, rest: &str) -> Config {
    let loaded = load(&format!("[node]\nprivate-key-file = \"node.key\"\n{node}\n{rest}"));
    let said: Vec<String> = loaded.problems.iter().map(ToString::to_string).collect();
    loaded.config.unwrap_or_else(|| panic!("{said:?}"))
}

/// Problems of a configuration: `rest` stands behind a `[node]` that listens.
pub(crate) fn said_of(rest: &str) -> Vec<String> {
    said(&format!("{NODE}{rest}"))
}

#[test]
fn a_file_about_the_cores_of_a_peer_is_read_with_the_configuration() {
    let with = |file: &str| format!("{NODE}{TUN}{PEER}processor-info-file = \"{file}\"\n");
    let config = load(&with("hub-cores.toml")).config.unwrap();
    let file = config.peers[0].processor.as_ref().unwrap();
    assert_eq!(file.path, Path::new("/etc/ana/hub-cores.toml"));
    assert_eq!(file.cores.usable, Some([1].into_iter().collect()));
    golden(
        &with("none.toml"),
        &[
            "site.toml:11:23: error: peer.processor-info-file: cannot read /etc/ana/none.toml (entity not found); make the file, or \
           correct the name",
        ],
    );
    golden(
        &with("wrong.txt"),
        &[
            "site.toml:11:23: error: peer.processor-info-file: /etc/ana/wrong.txt:1:13: error: not TOML: key with no value, \
             expected `=`",
            "site.toml:11:23: error: peer.processor-info-file: /etc/ana/wrong.txt:2:7: error: not TOML: key with no value, \
             expected `=`",
        ],
    );
}

/// The table at the top of this module names every key of `etc/reference.toml`, and readers that there are.
#[test]
fn every_key_is_listed_with_its_reader() {
    let source = include_str!("../config.rs");
    let rows: Vec<Vec<&str>> = source
        .lines()
        .filter_map(|line| line.strip_prefix("//! | `["))
        .map(|row| row.split('|').map(str::trim).collect())
        .collect();
    assert!(rows.len() >= 19, "{rows:?}");
    for row in &rows {
        let (module, function) = row[2].trim_matches('`').rsplit_once("::").unwrap();
        let text = match module {
            "read" => include_str!("read.rs"),
            "tap" => include_str!("tap.rs"),
            "cluster" => include_str!("cluster.rs"),
            "class_cores" => include_str!("class_cores.rs"),
            "classes" => include_str!("classes.rs"),
            "processor_file" => include_str!("processor_file.rs"),
            "properties" => include_str!("properties.rs"),
            "services::read" => include_str!("services/read.rs"),
            "services::balance" => include_str!("services/balance.rs"),
            "services::health" => include_str!("services/health.rs"),
            other => panic!("no module {other}"),
        };
        assert!(text.contains(&format!("fn {function}(")), "{}", row[2]);
        for key in row[1].split(", ") {
            assert!(text.contains(&format!("\"{key}\"")), "{}: {key}", row[2]);
        }
    }
    let (mut section, mut checked) = (String::new(), 0);
    for line in include_str!("../../../../etc/reference.toml").lines() {
        let line = line.strip_prefix("# ").unwrap_or(line);
        if let Some(heading) = line.strip_prefix('[') {
            section = heading.trim_matches(['[', ']']).to_owned();
            continue;
        }
        let is_key = |text: &str| text.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-');
        let Some((key, _)) = line.split_once(" = ").filter(|(key, _)| is_key(key)) else { continue };
        let named = |row: &Vec<&str>| {
            row[0].trim_start_matches('[').split(']').next() == Some(section.as_str())
                && row[1].split(", ").any(|known| known == key)
        };
        assert!(rows.iter().any(named), "[{section}] {key} is not in the table");
        checked += 1;
    }
    assert!(checked > 100, "{checked}");
}

/// Problems of a cluster's section and of the shared interfaces, in words.
fn cluster_said(text: &str) -> Vec<String> {
    let rest = format!("{NODE}[tun]\naddress = [\"10.9.0.3/24\"]\n{text}");
    let about = |said: &String| said.contains("cluster") || said.contains("interface.");
    let strip = |said: String| said.split_once(": ").map_or(said.clone(), |(_, text)| text.to_owned());
    said(&rest).into_iter().filter(about).map(strip).collect()
}

#[test]
fn a_cluster_names_its_faults() {
    let cases = [
        ("[cluster]\n", "error: cluster.role: write role = \"dispatcher\" or \"dataplane\""),
        (
            "[cluster]\nrole = \"dataplain\"\n",
            "error: cluster.role: \"dataplain\" is not one of \"dispatcher\", \"dataplane\"; did you mean \"dataplane\"?",
        ),
        (
            "[cluster]\nnode-id = 4096\n",
            "error: cluster.node-id: 4096 found, a whole number from 0 to 4095 is needed",
        ),
        (
            "[cluster]\nbus = \"10.9.0.4\"\n",
            "error: cluster.bus: 10.9.0.4 is no address of [tun]; name one of those",
        ),
        (
            "[cluster]\nmanager = \"hub\"\n",
            "error: cluster.manager: \"hub\" is no address of the manager; write for example \"10.9.0.1:4601\"",
        ),
        (
            "[cluster]\n[[interface]]\nname = \"lan\"\nshared = 0\ndispatchers = [1, 4096]\n",
            "error: interface.dispatchers: 4096 found, whole numbers from 0 to 4095 are needed",
        ),
        (
            "[[interface]]\nname = \"lan\"\nshared = 0\n",
            "error: interface.shared: \"lan\" is shared with nobody; add [cluster]",
        ),
        (
            "[[interface]]\nname = \"lan\"\nmac = \"01:00:5e:00:00:01\"\n",
            "error: interface.mac: 01:00:5e:00:00:01 is the address of a group; one interface has an even first byte",
        ),
        (
            "[cluster]\nrole = \"dataplane\"\n[[interface]]\nname = \"lan\"\nshared = 0\n",
            "error: interface.mac: \"lan\" needs the hardware address of the dispatcher's device as mac = \"…\"",
        ),
        (
            "[cluster]\nrole = \"dispatcher\"\n[[interface]]\nname = \"a\"\nshared = 1\n[[interface]]\nname = \"b\"\nshared = 1\n",
            "error: interface.shared: number 1 stands twice; each has its own",
        ),
        (
            "[[interface]]\nname = \"a\"\ntakeover = true\n",
            "error: interface.takeover: \"a\" is no shared interface of a dispatcher, so that nobody else can have it",
        ),
        (
            "[cluster]\nrole = \"dispatcher\"\n[[interface]]\nname = \"a\"\nshared = 1\ntakeover = true\n",
            "error: interface.takeover: \"a\" needs the shared addresses: whoever has them has the interface",
        ),
        ("[cluster]\nmanager = []\n", "error: cluster.manager: name the manager's address inside the tunnel"),
    ];
    for (text, wanted) in cases {
        let said = cluster_said(text);
        assert!(said.iter().any(|said| said == wanted), "{text}: {said:#?}");
    }
}

#[test]
fn a_cluster_has_defaults() {
    let text = "[tun]\naddress = [\"10.9.0.3/24\"]\n[cluster]\nrole = \"dataplane\"\nnode-id = 3\nmanager = \"10.9.0.1\"\n";
    let cluster = config("", text).cluster.unwrap();
    assert_eq!((cluster.node, cluster.weight, cluster.bus), (3, 1, "10.9.0.3".parse().unwrap()));
    assert_eq!(cluster.managers, ["10.9.0.1:4601".parse().unwrap()]);
}
