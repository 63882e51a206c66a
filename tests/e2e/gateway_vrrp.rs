//! Two gateways behind virtual addresses that keepalived moves between them (VRRP, RFC 5798).

use std::os::fd::AsFd;
use std::process::Command;
use std::time::{Duration, Instant};

use testbed::program::{Program, ScratchDir};
use testbed::topology::Node;

use crate::gateway_scene::*;
use crate::machine::isolated;
use crate::scene::*;

/// The virtual addresses.
const INSIDE: &str = "10.2.0.1";
const OUTSIDE: &str = "10.3.0.1";
const SERVER: &str = "10.3.0.9:80";

/// Two switches, `lan` and `wan`, two gateways on both, a host on each.
struct Routers {
    directory: ScratchDir,
    _switch: Node,
    client: Node,
    server: Node,
    gateways: Vec<Node>,
}

/// One gateway at work, and the keepalived beside it.
struct Router {
    _gateway: Gateway,
    keepalived: Program,
}

impl Routers {
    fn new() -> Self {
        let switch = Node::create("switch").unwrap();
        shell(&switch, "sysctl -qw net.ipv6.conf.all.disable_ipv6=1");
        for bridge in ["lan", "wan"] {
            shell(&switch, &format!("ip link add {bridge} type bridge && ip link set {bridge} up"));
        }
        let plug = |place: &Node, device: &str, bridge: &str, address: &str| {
            let port = format!("{}-{bridge}", place.name());
            switch.netlink().unwrap().add_veth(&port, device, Some(place.namespace().as_fd())).unwrap();
            shell(&switch, &format!("ip link set {port} master {bridge} up"));
            shell(
                place,
                &format!("ip link set lo up; ip link set {device} up; ip addr add {address} dev {device}"),
            );
        };
        let [client, server] = ["client", "server"].map(|name| Node::create(name).unwrap());
        plug(&client, "eth0", "lan", "10.2.0.9/24");
        shell(&client, &format!("ip route add default via {INSIDE}"));
        plug(&server, "eth0", "wan", "10.3.0.9/24");
        let gateways = [2, 3].map(|last| {
            let gateway = Node::create(format!("gw{last}")).unwrap();
            shell(&gateway, "sysctl -qw net.ipv4.ip_forward=0");
            plug(&gateway, "lan", "lan", &format!("10.2.0.{last}/24"));
            plug(&gateway, "wan", "wan", &format!("10.3.0.{last}/24"));
            gateway
        });
        let directory = ScratchDir::new("vrrp").unwrap();
        Self { directory, _switch: switch, client, server, gateways: gateways.into() }
    }

    /// Starts a gateway and its keepalived; the first one has the higher priority.
    fn start(&self, number: usize, vmac: bool) -> Router {
        let (place, path) = (&self.gateways[number], self.directory.path().display());
        let name = format!("gw{number}");
        let text = format!(
            "[node]\nname = \"{name}\"\nstate-dir = \"{path}/{name}\"\ncontrol-socket = \"{path}/{name}.sock\"\n\
             [[interface]]\nname = \"lan\"\nvirtual-address = \"{INSIDE}\"\n\
             [[interface]]\nname = \"wan\"\nvirtual-address = \"{OUTSIDE}\"\n\
             [[nat]]\nout = \"wan\"\naddresses = [\"{OUTSIDE}\"]\n\
             [[virtual-server]]\nname = \"web\"\nlisten = \"tcp {OUTSIDE}:80\"\nbackends = [\"10.2.0.9:80\"]\n"
        );
        let mut gateway = Gateway::start(place, &self.directory, &name, &text);
        ready(&mut gateway);
        let mut conf = format!(
            "global_defs {{\n router_id {name}\n vrrp_version 3\n}}\n\
             vrrp_sync_group both {{\n group {{\n lan\n wan\n }}\n}}\n"
        );
        for (device, id, address) in [("lan", 51, INSIDE), ("wan", 52, OUTSIDE)] {
            let vmac = if vmac { format!(" use_vmac vrrp.{id}\n") } else { String::new() };
            let priority = 200 - 50 * number;
            conf.push_str(&format!(
                "vrrp_instance {device} {{\n state BACKUP\n interface {device}\n virtual_router_id {id}\n \
                 priority {priority}\n advert_int 0.2\n{vmac} virtual_ipaddress {{\n {address}/24\n }}\n}}\n"
            ));
        }
        let conf = self.directory.write(&format!("{name}.conf"), conf).unwrap();
        let file = |kind: &str| format!("{path}/{name}.{kind}");
        let mut command = Command::new("keepalived");
        command.args(["--dont-fork", "--log-console", "--vrrp", "--use-file"]).arg(conf);
        command.args(["--pid", &file("pid"), "--vrrp_pid", &file("vrrp")]);
        let log = self.directory.path().join(format!("{name}.keepalived"));
        Router { _gateway: gateway, keepalived: place.start(command, Some(&log)).unwrap() }
    }

    /// Whether a gateway has a virtual address, and on which device.
    fn has(&self, number: usize, address: &str) -> Vec<String> {
        let text = shell(&self.gateways[number], &format!("ip -o addr show to {address}/32"));
        text.lines().filter_map(|line| line.split_whitespace().nth(1)).map(str::to_owned).collect()
    }

    /// Everything works through the virtual addresses; `patience`: for how long it may take.
    #[track_caller]
    fn works(&self, patience: Duration) {
        let end = Instant::now() + patience;
        let mut sources = (String::new(), String::new());
        while Instant::now() < end {
            let of = |answer: Result<Answer, String>| {
                answer.map_or_else(|error| error, |answer| format!("{} {}", answer.name, answer.source.ip()))
            };
            sources = (of(curl_for(&self.client, SERVER, 1)), of(curl_for(&self.server, OUTSIDE, 1)));
            if sources.0 == format!("server {OUTSIDE}") && sources.1.starts_with("backend 10.2.0.") {
                return;
            }
        }
        panic!("through NAT, to the virtual server: {sources:?}");
    }
}

fn takes_over(vmac: bool) {
    isolated(|| {
        let scene = Routers::new();
        let _server = Mirror::start(&scene.server, "server", "0.0.0.0:80");
        let _backend = Mirror::start(&scene.client, "backend", "10.2.0.9:80");
        let devices = if vmac { ["vrrp.51", "vrrp.52"] } else { ["lan", "wan"] };
        let mut first = scene.start(0, vmac);
        let second = scene.start(1, vmac);
        let nobody = || Vec::<String>::new();
        wait_for("the first is master", PATIENCE, || scene.has(0, INSIDE) == [devices[0]]);
        wait_for("the second is not", PATIENCE, || scene.has(1, INSIDE) == nobody());
        scene.works(Duration::from_secs(20));
        assert_eq!(scene.has(0, OUTSIDE), [devices[1]], "nobody but keepalived adds it");
        assert_eq!(scene.has(1, OUTSIDE), nobody(), "and not where it is not");
        // The host itself is there as well, by its virtual address and beside it.
        ping(&scene.client, &format!("-c 2 {INSIDE}"));
        ping(&scene.client, "-c 2 10.2.0.2");
        assert_eq!(ask_tcp(&scene.gateways[0], SERVER).name, "server");
        // Connections that were open learn at once that the next one does not know them.
        let mut talk = Talk::open(&scene.client, SERVER).unwrap();
        talk.echo(1_000_000).unwrap();
        first.keepalived.stop().unwrap();
        wait_for("the second is master", PATIENCE, || scene.has(1, OUTSIDE) == [devices[1]]);
        scene.works(Duration::from_secs(20));
        assert_eq!(scene.has(0, OUTSIDE), nobody(), "it is left to keepalived");
        let asked = Instant::now();
        assert!(talk.echo(100).is_err());
        assert!(asked.elapsed() < Duration::from_secs(10), "{:?}: a reset, no silence", asked.elapsed());
        // The first one comes back, and takes over again.
        drop(first);
        let _first = scene.start(0, vmac);
        wait_for("the first is master again", PATIENCE, || {
            scene.has(0, OUTSIDE) == [devices[1]] && scene.has(1, OUTSIDE) == nobody()
        });
        scene.works(Duration::from_secs(20));
        drop(second);
    });
}

/// Rows C2, R4, R7: two gateways with NAT and a virtual server behind addresses that keepalived moves.
#[test]
fn r7_keepalived_moves_virtual_addresses() {
    takes_over(false);
}

/// The same with the hardware addresses of virtual routers, on macvlan devices.
#[test]
fn r7_keepalived_moves_virtual_addresses_with_their_hardware_addresses() {
    takes_over(true);
}
