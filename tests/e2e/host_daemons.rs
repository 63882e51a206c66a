//! The router of `docs/nat.md` with real daemons beside it: firewall, name service, DHCP, router advertisements, VRRP, IPsec.
//! None of them is told that there is a gateway.

use std::net::UdpSocket;
use std::process::Command;
use std::time::Duration;

use testbed::program::{Program, ScratchDir};
use testbed::topology::Node;

use crate::gateway_clients::*;
use crate::gateway_scene::*;
use crate::machine::isolated;
use crate::program::up;
use crate::scene::*;

/// The server on the Internet.
const FAR: &str = "198.51.100.7";

/// The devices of `docs/nat.md`: client `eth0` – `eth1` gateway `eth0` – `eth0` provider, who has [`FAR`] as well.
pub struct Site {
    pub directory: ScratchDir,
    pub client: Node,
    pub gateway: Node,
    pub provider: Node,
}

impl Site {
    /// The gateway has 203.0.113.1 and a default route outside, the client 192.168.10.5 and one to 192.168.10.1.
    pub fn new() -> Self {
        let site = Self::without_addresses();
        shell(&site.gateway, "ip addr add 203.0.113.1/24 dev eth0; ip route add default via 203.0.113.254");
        shell(&site.client, "ip addr add 192.168.10.5/24 dev eth0; ip route add default via 192.168.10.1");
        site
    }

    /// Only the provider has addresses: 203.0.113.254, .253 and [`FAR`].
    pub fn without_addresses() -> Self {
        let directory = ScratchDir::new("anabranch-site").unwrap();
        let node = |name: &str| Node::create(name).unwrap();
        let (client, gateway, provider) = (node("the client"), node("the gateway"), node("the provider"));
        client.connect("eth0", &[], &gateway, "eth1", &[]).unwrap();
        let outside = [net("203.0.113.254".parse().unwrap(), 24), net("203.0.113.253".parse().unwrap(), 24)];
        gateway.connect("eth0", &[], &provider, "eth0", &outside).unwrap();
        // What comes untranslated is not answered by luck.
        shell(&provider, &format!("ip addr add {FAR}/32 dev lo; ip route add unreachable 192.168.0.0/16"));
        Self { directory, client, gateway, provider }
    }

    /// Starts a gateway with this configuration and waits until its interfaces are up.
    pub fn start(&self, config: &str) -> Running {
        let socket = self.directory.path().join("gw.sock");
        let config = self.directory.write("router.toml", config).unwrap();
        let log = self.directory.path().join("gw.log");
        let mut command = up(&config);
        command.arg("--socket").arg(&socket);
        let program = self.gateway.start(command, Some(&log)).unwrap();
        let mut gateway = Gateway { program, socket, config, log };
        ready(&mut gateway);
        Running::of(gateway)
    }

    /// Starts a daemon in the foreground.
    pub fn daemon(&self, place: &Node, log: &str, command: &str) -> Program {
        let mut shell = Command::new("sh");
        shell.args(["-c", &format!("PATH=$PATH:/usr/sbin:/sbin:/usr/lib/ipsec; exec {command}")]);
        place.start(shell, Some(&self.directory.path().join(log))).unwrap()
    }

    /// Writes a file for a daemon; its path.
    pub fn file(&self, name: &str, text: &str) -> String {
        let text = text.replace("DIR", &self.directory.path().display().to_string());
        self.directory.write(name, text).unwrap().display().to_string()
    }
}

/// The first example of `docs/nat.md` and the command that stands below it.
pub fn documented() -> (String, String) {
    let page = include_str!("../../docs/nat.md");
    let (_, section) = page.split_once("## A router in 20 lines").unwrap();
    let block = |begin: &str| section.split_once(begin).unwrap().1.split_once("```").unwrap().0.to_owned();
    let config = block("```toml\n");
    let commands = section.split_once("```\nsysctl").unwrap().1;
    let sysctl = commands.lines().next().unwrap().split('#').next().unwrap().trim();
    (config, format!("sysctl -q -w {sysctl}"))
}

/// `ufw` with its own files, of which the machine's stay as they are: closed from everywhere, but for what the LAN asks for.
const UFW: &str = "set -e; cp -L /usr/share/ufw/*.rules /usr/share/ufw/*.init /usr/share/ufw/ufw.conf /etc/ufw/sysctl.conf DIR/ufw
mkdir DIR/ufw/applications.d; chmod 640 DIR/ufw/*.rules; mount --bind DIR/ufw /etc/ufw; mount -t tmpfs none /run
PATH=$PATH:/usr/sbin:/sbin
for rule in 'port 53' 'port 67 proto udp' 'port 80 proto tcp'; do ufw allow in on eth1 to any $rule >/dev/null; done
ufw --force enable >/dev/null; iptables -S INPUT | head -n 1";

/// The chains that firewalld makes of the zones `public` with `eth0` and `internal` with `eth1`, in short.
const FIREWALLD: &str = "table inet firewalld {
  chain mangle_PREROUTING { type filter hook prerouting priority -140; policy accept;
    icmpv6 type { nd-router-advert, nd-neighbor-solicit } accept; meta nfproto ipv6 fib saddr . mark . iif oif missing drop; }
  chain filter_INPUT { type filter hook input priority 10; policy accept;
    ct state { established, related } accept; ct status dnat accept; iifname \"lo\" accept; jump filter_INPUT_ZONES;
    ct state invalid drop; reject with icmpx admin-prohibited; }
  chain filter_FORWARD { type filter hook forward priority 10; policy accept;
    ct state { established, related } accept; iifname \"lo\" accept; ct state invalid drop; reject with icmpx admin-prohibited; }
  chain filter_INPUT_ZONES { iifname \"eth0\" goto filter_IN_public; iifname \"eth1\" goto filter_IN_internal; goto filter_IN_public; }
  chain filter_IN_public { meta l4proto { icmp, ipv6-icmp } accept; ip6 daddr fe80::/64 udp dport 546 accept; }
  chain filter_IN_internal { tcp dport { 53, 80 } accept; udp dport { 53, 67 } accept; meta l4proto { icmp, ipv6-icmp } accept; }
}";

const DNSMASQ: &str = "interface=eth1\nbind-dynamic\nno-hosts\nno-resolv\nserver=198.51.100.7\n\
    dhcp-range=192.168.10.100,192.168.10.120,255.255.255.0,120\ndhcp-leasefile=DIR/leases\n";

const RADVD: &str = "interface eth1 { AdvSendAdvert on; MinRtrAdvInterval 3; MaxRtrAdvInterval 4; prefix fd00:10::/64 { }; };\n";

const KEEPALIVED: &str = "global_defs { vrrp_garp_master_delay 1 }\nvrrp_instance lan { interface eth1\nstate MASTER\nvirtual_router_id 7\n\
    priority 200\nadvert_int 1\nvirtual_ipaddress { 192.168.10.253/24 } }\n";

/// Script that dhclient runs with a lease, instead of the machine's own.
const DHCLIENT: &str = "#!/bin/sh
echo \"$reason $new_ip_address $new_routers\" >>DIR/dhclient.log
case $reason in
BOUND|RENEW|REBIND|REBOOT)
  [ -z \"$old_ip_address\" ] || [ \"$old_ip_address\" = \"$new_ip_address\" ] || ip -4 addr flush dev $interface
  ip addr replace $new_ip_address/24 dev $interface
  ip route replace default via $new_routers dev $interface proto dhcp ;;
EXPIRE|FAIL|STOP) ip -4 addr flush dev $interface ;;
esac\n";

impl Site {
    /// A name server at the provider, and his DHCP server with these options.
    fn provider_dnsmasq(&self, range: &str, router: &str) -> Program {
        let config = self.file(
            "provider.conf",
            &format!(
                "interface=eth0\ninterface=lo\nbind-dynamic\nno-hosts\nno-resolv\naddress=/name.test/192.0.2.55\ndhcp-authoritative\n\
                 dhcp-range={range},{range},255.255.255.0,120\ndhcp-option=3,{router}\ndhcp-option=58,2\ndhcp-option=59,3\n\
                 dhcp-leasefile=DIR/leases-{range}-{router}\n"
            ),
        );
        self.daemon(
            &self.provider,
            "provider.log",
            &format!("dnsmasq -k -C {config} --user=root --pid-file="),
        )
    }

    /// dhclient on `eth0` of a node.
    fn dhclient(&self, place: &Node, name: &str) -> Program {
        let script = self.file(&format!("{name}.sh"), DHCLIENT);
        shell(place, &format!("chmod +x {script}"));
        let config =
            self.file("dhclient.conf", "initial-interval 1;\nbackoff-cutoff 2;\nretry 2;\ntimeout 10;\n");
        let directory = self.directory.path().display();
        self.daemon(
            place,
            &format!("{name}.log"),
            &format!("dhclient -d -4 -cf {config} -sf {script} -lf {directory}/{name}.lease -pf {directory}/{name}.pid eth0"),
        )
    }

    fn waits_for_address(&self, place: &Node, device: &str, text: &str) {
        let addresses = || shell(place, &format!("ip addr show dev {device}; ip route; ip -6 route"));
        wait_for(&format!("{text} at {device}"), 20.0, || addresses().contains(text));
    }
}

/// The router exactly as the page has it, with its commands, on a host where everything else runs already: the firewall, the DHCP
/// client of the uplink, DHCP, DNS and router advertisements for the LAN, VRRP.
fn documented_router(firewall: impl FnOnce(&Site)) {
    let site = Site::without_addresses();
    let (client, place) = (&site.client, &site.gateway);
    firewall(&site);
    // The host is a router already: its addresses are its own, and the daemons are there first.
    shell(place, "ip addr add 192.168.10.1/24 dev eth1; ip -6 addr add fd00:10::1/64 dev eth1 nodad");
    let (dnsmasq, radvd) = (site.file("dnsmasq.conf", DNSMASQ), site.file("radvd.conf", RADVD));
    let keepalived = site.file("keepalived.conf", KEEPALIVED);
    let directory = site.directory.path().display().to_string();
    let _provider = site.provider_dnsmasq("203.0.113.50", "203.0.113.254");
    let _daemons = [
        site.dhclient(place, "uplink"),
        site.daemon(
            place,
            "dnsmasq.log",
            &format!("dnsmasq -k -C {dnsmasq} --user=root --pid-file= --log-facility=-"),
        ),
        site.daemon(place, "radvd.log", &format!("radvd -n -C {radvd} -p {directory}/radvd.pid -m stderr")),
        site.daemon(
            place,
            "keepalived.log",
            &format!("keepalived -n -l -f {keepalived} -p {directory}/k.pid -r {directory}/v.pid"),
        ),
    ];
    let (config, sysctl) = documented();
    shell(place, &sysctl);
    let gateway = site.start(&config);

    shell(client, "sysctl -q -w net.ipv6.conf.eth0.accept_ra=1 net.ipv6.conf.eth0.autoconf=1");
    let _lease = site.dhclient(client, "client");
    site.waits_for_address(place, "eth0", "203.0.113.50");
    site.waits_for_address(client, "eth0", "192.168.10.1");
    site.waits_for_address(client, "eth0", "default via fe80");
    site.waits_for_address(place, "eth1", "192.168.10.253");
    // A client's day: names, pages, pings; by the router's daemons and through it.
    let _web = Mirror::start(&site.provider, "web", &format!("{FAR}:80"));
    let _page = Mirror::start(place, "router", "0.0.0.0:80");
    let _closed = Mirror::start(place, "closed", "0.0.0.0:81");
    resolve(client, "192.168.10.1");
    let answer = curl(client, FAR).unwrap();
    assert_eq!((answer.name.as_str(), answer.source.ip().to_string().as_str()), ("web", "203.0.113.50"));
    ping(client, &format!("-c 3 {FAR}"));
    ping(client, "-c 2 192.168.10.1");
    ping(client, "-c 2 192.168.10.253");
    ping(client, "-c 2 fd00:10::1");
    assert_eq!(curl(client, "192.168.10.1").unwrap().name, "router");
    // What the firewall has closed stays closed.
    for (from, to) in [
        (client, "192.168.10.1:81"),
        (&site.provider, "203.0.113.50:80"),
        (&site.provider, "203.0.113.50:81"),
    ] {
        assert!(curl_for(from, to, 1).is_err(), "{to} is open");
    }
    // The host's own questions.
    ping(place, &format!("-c 2 {FAR}"));
    resolve(place, FAR);
    assert_eq!(curl(place, FAR).unwrap().source.ip().to_string(), "203.0.113.50");
    no_reply_went_astray(&gateway);
}

/// Row R7.
#[test]
fn r7_the_documented_router_works_beside_ufw() {
    isolated(|| {
        documented_router(|site| {
            let directory = site.directory.path().display().to_string();
            shell(&site.gateway, &format!("mkdir {directory}/ufw"));
            let script = site.file("ufw.sh", UFW);
            let said = shell(&site.gateway, &format!("unshare -m sh {script}"));
            assert_eq!(said.trim(), "-P INPUT DROP");
        });
    });
}

/// Row R7.
#[test]
fn r7_the_documented_router_works_beside_firewalld() {
    isolated(|| {
        documented_router(|site| {
            let rules = site.file("firewalld.nft", FIREWALLD);
            shell(&site.gateway, &format!("PATH=$PATH:/usr/sbin nft -f {rules}"));
        });
    });
}

/// Rows R7, C2: the provider's DHCP server names another router, then gives another address. dhclient renews by unicast from port 68
/// all the time; the LAN follows.
#[test]
fn c2_the_uplinks_dhcp_lease_changes() {
    isolated(|| {
        let site = Site::without_addresses();
        let (client, place) = (&site.client, &site.gateway);
        shell(client, "ip addr add 192.168.10.5/24 dev eth0; ip route add default via 192.168.10.1");
        let server = site.provider_dnsmasq("203.0.113.50", "203.0.113.254");
        let (config, sysctl) = documented();
        shell(place, &sysctl);
        let _gateway = site.start(&config);
        let _dhclient = site.dhclient(place, "uplink");
        let _web = Mirror::start(&site.provider, "web", &format!("{FAR}:80"));
        site.waits_for_address(place, "eth0", "default via 203.0.113.254");
        let udp = UdpClient::new(client, "0.0.0.0:0");
        let source = || udp.try_ask(&format!("{FAR}:80"), 16).map(|answer| answer.source.ip().to_string());
        wait_for("the first lease", 5.0, || source().as_deref() == Some("203.0.113.50"));
        let renewals = || shell(place, &format!("cat {}/dhclient.log", site.directory.path().display()));
        wait_for("renewals by unicast", 10.0, || renewals().matches("RENEW").count() >= 2);

        drop(server);
        let server = site.provider_dnsmasq("203.0.113.50", "203.0.113.253");
        site.waits_for_address(place, "eth0", "default via 203.0.113.253");
        wait_for("the other router", 5.0, || source().as_deref() == Some("203.0.113.50"));

        drop(server);
        let _server = site.provider_dnsmasq("203.0.113.60", "203.0.113.254");
        site.waits_for_address(place, "eth0", "203.0.113.60");
        site.waits_for_address(place, "eth0", "default via 203.0.113.254");
        wait_for("the same flow has the new address", 5.0, || source().as_deref() == Some("203.0.113.60"));
    });
}

/// Row R7: a resolver that asks from a random port between 1,024 and 65,535 for each question, beside a NAT of the same address.
#[test]
fn r7_unbound_gets_all_its_answers() {
    isolated(|| {
        let site = Site::new();
        let (config, _) = documented();
        let gateway = site.start(&config);
        let _far = Dns::start(&site.provider, FAR.parse().unwrap());
        let text = "server:\n interface: 192.168.10.1\n access-control: 192.168.10.0/24 allow\n use-syslog: no\n chroot: \"\"\n \
            username: \"\"\n directory: \"DIR\"\n pidfile: \"\"\n module-config: \"iterator\"\n outgoing-num-tcp: 10\n cache-max-ttl: 0\n \
            outbound-msg-retry: 0\n do-not-query-localhost: no\n local-zone: \"test.\" nodefault\nforward-zone:\n name: \".\"\n forward-addr: 198.51.100.7\n";
        let unbound = site.file("unbound.conf", text);
        let server = site.daemon(&site.gateway, "unbound.log", &format!("unbound -d -c {unbound}"));
        let listens = || shell(&site.gateway, "ss -Hlnu sport = :53").contains("192.168.10.1");
        wait_for("unbound listens", 10.0, listens);
        let client = site.client.run(|| UdpSocket::bind("0.0.0.0:0")).unwrap().unwrap();
        client.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
        let before = dropped(&gateway, "nat-no-mapping");
        for number in 0..40_u8 {
            // Another name each time: q00.test …
            let mut question = b"\0\0\x01\0\0\x01\0\0\0\0\0\0\x03q00\x04name\x04test\0\0\x01\0\x01".to_vec();
            question[1] = number;
            question[14] += number / 10;
            question[15] += number % 10;
            client.send_to(&question, "192.168.10.1:53").unwrap();
            let mut answer = [0; 512];
            let bytes = client.recv(&mut answer);
            let good = bytes.as_ref().is_ok_and(|bytes| answer[..*bytes].ends_with(&[0, 4, 192, 0, 2, 55]));
            assert!(good, "question {number}: {bytes:?}\n{}", server.last_lines(20));
        }
        assert_eq!(dropped(&gateway, "nat-no-mapping"), before);
    });
}

/// One end of IPsec: strongSwan with ESP in user space.
fn charon(site: &Site, place: &Node, name: &str, connection: &str) -> Program {
    let config = site.file(
        &format!("{name}.strongswan"),
        &format!(
            "charon {{\n load = random nonce aes sha1 sha2 hmac kdf gmp curve25519 pem pkcs1 pubkey kernel-libipsec kernel-netlink \
             socket-default vici updown\n filelog {{ stderr {{ default = 1 }} }}\n plugins {{ vici {{ socket = unix://DIR/{name}.vici }} }}\n \
             syslog {{ daemon {{ default = -1 }} }}\n}}\n"
        ),
    );
    let process = site.daemon(
        place,
        &format!("{name}.charon"),
        &format!("unshare -m sh -c 'mount -t tmpfs none /run; STRONGSWAN_CONF={config} exec charon'"),
    );
    let socket = site.directory.path().join(format!("{name}.vici"));
    wait_for("charon", 10.0, || socket.exists());
    let swan = site.file(&format!("{name}.swanctl"), connection);
    swanctl(site, place, name, &format!("--load-all --file {swan}"));
    process
}

fn swanctl(site: &Site, place: &Node, name: &str, arguments: &str) -> String {
    let socket = site.directory.path().join(format!("{name}.vici"));
    shell(place, &format!("PATH=$PATH:/usr/sbin swanctl {arguments} --uri unix://{} 2>&1", socket.display()))
}

/// Rows C2, R7: IKE and ESP in UDP 4500, of a client behind the NAT and of the host itself, to the same server at the same time.
#[test]
fn r7_ipsec_of_a_client_and_of_the_host_work_beside_each_other() {
    isolated(|| {
        let site = Site::new();
        let (config, _) = documented();
        let _gateway = site.start(&config);
        shell(&site.provider, "ip addr add 10.99.0.1/32 dev lo");
        let secret = "secrets { ike-1 { secret = \"a shared secret\" } }\n";
        let server = format!(
            "connections {{ road {{ version = 2\n local_addrs = {FAR}\n encap = yes\n pools = road\n local {{ auth = psk\n id = far }}\n \
             remote {{ auth = psk }}\n children {{ net {{ local_ts = 10.99.0.1/32\n esp_proposals = aes128-sha256 }} }} }} }}\n\
             pools {{ road {{ addrs = 10.99.1.0/24 }} }}\n{secret}"
        );
        let client = |id: &str| {
            format!(
                "connections {{ far {{ version = 2\n remote_addrs = {FAR}\n encap = yes\n vips = 0.0.0.0\n local {{ auth = psk\n id = {id} }}\n \
                 remote {{ auth = psk\n id = far }}\n children {{ net {{ remote_ts = 10.99.0.1/32\n esp_proposals = aes128-sha256 }} }} }} }}\n{secret}"
            )
        };
        let _far = charon(&site, &site.provider, "far", &server);
        let ends = [(&site.client, "road"), (&site.gateway, "host")];
        let _near = ends.map(|(place, name)| charon(&site, place, name, &client(name)));
        // The gateway looks once a second which ports the host holds.
        std::thread::sleep(Duration::from_millis(1_500));
        for (place, name) in ends {
            let said = swanctl(&site, place, name, "--initiate --child net --timeout 10");
            assert!(said.contains("initiate completed successfully"), "{said}");
        }
        for (place, _) in ends.repeat(2) {
            ping(place, "-c 3 10.99.0.1");
            ping(place, "-c 2 -s 1300 10.99.0.1");
        }
    });
}
