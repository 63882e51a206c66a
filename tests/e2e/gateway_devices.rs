//! Interfaces that are no plain Ethernet device: without a link-layer header, and with more hardware addresses than one.

use std::sync::atomic::Ordering;
use std::time::Duration;

use linux::event::{Epoll, Interest};
use linux::tun::{Tun, TunQueue};
use rustix::process::Signal;
use testbed::topology::Node;

use crate::gateway_scene::*;
use crate::machine::isolated;
use crate::scene::*;

/// A link without link-layer header, as PPP or WireGuard make it: a TUN device at each end, super-packets included.
struct PointToPoint {
    _carrier: Background<()>,
}

impl PointToPoint {
    /// Devices in two nodes, switched on, with these addresses of theirs.
    fn connect(near: (&Node, &str, &[&str]), far: (&Node, &str, &[&str])) -> Self {
        let open = |(place, name, addresses): (&Node, &str, &[&str])| {
            let mut tun = place.run(|| Tun::create(name, 1)).unwrap().unwrap();
            let queue = tun.take_queues().remove(0);
            shell(place, &format!("ip link set {name} up mtu 1400"));
            for address in addresses {
                shell(place, &format!("ip addr add {address} dev {name}"));
            }
            (tun, queue)
        };
        let (near, far) = (open(near), open(far));
        let carrier = Background::start(move |end| {
            let epoll = Epoll::new().unwrap();
            epoll.add(&near.1, 0, Interest::Read).unwrap();
            epoll.add(&far.1, 1, Interest::Read).unwrap();
            let (mut ready, mut buffer) = (Vec::new(), vec![0; 70_000]);
            while !end.load(Ordering::Relaxed) {
                epoll.wait(&mut ready, Some(Duration::from_millis(50))).unwrap();
                carry(&near.1, &far.1, &mut buffer);
                carry(&far.1, &near.1, &mut buffer);
            }
        });
        Self { _carrier: carrier }
    }
}

fn carry(from: &TunQueue, to: &TunQueue, buffer: &mut [u8]) {
    while let Ok(bytes) = from.read(buffer) {
        // What the other end has no use for is lost, as on any link.
        let _ = to.write(&buffer[..bytes]);
    }
}

const OUTSIDE: &str = "203.0.113.9";
const SERVER: &str = "198.51.100.7:80";

/// A gateway with `lan1` inside and the only way out over `ppp1`, behind which is a server.
fn behind_ppp() -> (Lans, Node, PointToPoint) {
    let lans = Lans::new(2);
    let isp = Node::create("isp").unwrap();
    let near = [&*format!("{OUTSIDE} peer 203.0.113.1/32"), "2001:db8:9::2/64"];
    let cable = PointToPoint::connect(
        (lans.gateway(), "ppp1", &near),
        (&isp, "ppp0", &["203.0.113.1 peer 203.0.113.9/32", "2001:db8:9::1/64"]),
    );
    shell(&isp, "ip link set lo up && ip addr add 198.51.100.7/32 dev lo && ip route add default dev ppp0");
    // The server knows nothing of the small MTU: only the gateway can tell.
    shell(&isp, "ip link set ppp0 mtu 1500 && ip -6 route add default dev ppp0");
    shell(lans.gateway(), "ip route replace default dev ppp1 && ip -6 route replace default dev ppp1");
    (lans, isp, cable)
}

/// Rows C2, C3, R7: a device without Ethernet header is an interface as any other: NAT leaves by it, forwards and rules hold there, the
/// host is native, MTU and MSS follow, flows outlive a restart. No neighbor is needed, whatever the destination.
#[test]
fn c2_a_device_without_ethernet_header_leads_outside() {
    isolated(|| {
        let (lans, isp, _cable) = behind_ppp();
        let place = lans.gateway();
        shell(
            place,
            "nft 'table inet own { chain input { type filter hook input priority 0; policy drop; \
             iifname lo accept; ct state established,related accept; icmpv6 type 133-137 accept; \
             iifname ppp1 tcp dport 81 accept; iifname ppp1 icmp type echo-request accept; }; }'",
        );
        let sections = "[gateway]\ncore-rebalance = false\nkeep-flows-seconds = 60\n\
             [[interface]]\nname = \"ppp\"\ndevice = \"ppp1\"\n[[nat]]\nout = \"ppp\"\n\
             [[forward]]\nlisten = \"tcp ppp:8080\"\nto = \"10.1.1.2:80\"\n\
             [[rule]]\naction = \"drop\"\nfrom = \"lan2\"\nto = \"ppp\"\n";
        let mut gateway = lans.start(sections);
        let _server = Mirror::start(&isp, "server", "198.51.100.7:80");
        let _inside = Mirror::start(lans.host(1), "inside", "0.0.0.0:80");
        let _own = [81, 82].map(|port| Mirror::start(place, "gateway", &format!("0.0.0.0:{port}")));
        let client = lans.host(1);
        for _ in 0..5 {
            assert_eq!(ask_tcp(client, SERVER).source.ip().to_string(), OUTSIDE);
            assert_eq!(ask_udp(client, SERVER).source.ip().to_string(), OUTSIDE);
        }
        ping(client, "-c 2 -s 4000 198.51.100.7");
        let mut talk = Talk::open(client, SERVER).unwrap();
        talk.echo(3_000_000).unwrap();
        let mss = shell(client, "ss -tniH dst 198.51.100.7");
        assert!(mss.contains(" mss:1348 "), "1,400 without headers and time stamps: {mss}");
        let mss = shell(&isp, "ss -tniH sport 80");
        assert!(mss.contains(" mss:1348 "), "{mss}");
        // Too big is said with the MTU of the way out.
        let error = try_shell(client, "ping -n -c 2 -W 2 -M do -s 1450 198.51.100.7").unwrap_err();
        assert!(error.contains("mtu = 1400") || error.contains("mtu=1400"), "{error}");
        // In by the forward, and around by it from inside.
        let answer = ask_tcp(&isp, "203.0.113.9:8080");
        assert_eq!(
            (answer.name.as_str(), answer.source.ip().to_string()),
            ("inside", "203.0.113.1".to_owned())
        );
        assert_eq!(ask_tcp(lans.host(2), "203.0.113.9:8080").name, "inside");
        // The rule holds, and strangers come no further.
        assert!(curl_for(lans.host(2), SERVER, 1).is_err());
        assert!(dropped(&gateway, "rule-drop") > 0);
        shell(&isp, "ip route add 10.1.1.0/24 dev ppp0");
        assert!(curl_for(&isp, "10.1.1.2", 1).is_err());
        assert!(dropped(&gateway, "default-drop") > 0);
        // The host: its own firewall knows the device; its programs may be bound to it.
        assert_eq!(ask_tcp(&isp, "203.0.113.9:81").name, "gateway");
        assert!(curl_for(&isp, "203.0.113.9:82", 1).is_err());
        ping(&isp, "-c 2 -s 1000 203.0.113.9");
        // In fragments that are larger than the device's MTU.
        ping(&isp, "-c 2 -s 4000 203.0.113.9");
        ping(place, "-c 2 -I ppp1 198.51.100.7");
        shell(place, "curl -sS --max-time 5 --interface ppp1 http://198.51.100.7/");
        Talk::open(&isp, "203.0.113.9:81").unwrap().echo(1_000_000).unwrap();
        Talk::open(place, SERVER).unwrap().echo(1_000_000).unwrap();
        ping(place, "-c 2 2001:db8:9::1");
        no_reply_went_astray(&gateway);
        // Nobody resets what is open while the program is not there.
        gateway.program.signal(Signal::TERM).unwrap();
        assert!(gateway.program.wait(Duration::from_secs(20)).unwrap().is_some_and(|end| end.success()));
        std::thread::sleep(Duration::from_millis(300));
        let _gateway = lans.start(sections);
        talk.echo(100_000).unwrap();
    });
}

/// Rows C2, R7: clients behind such a device, as behind a WireGuard server, are routed, translated and answered; between two of
/// them the packet comes in and leaves by the same device.
#[test]
fn c2_clients_behind_a_device_without_ethernet_header() {
    isolated(|| {
        let lans = Lans::new(2);
        let phone = Node::create("phone").unwrap();
        let addresses = ["10.9.0.2/24", "10.9.0.3/24", "fd00:9::2/64"];
        let _cable = PointToPoint::connect(
            (lans.gateway(), "wg0", &["10.9.0.1/24", "fd00:9::1/64"]),
            (&phone, "wg0", &addresses),
        );
        shell(&phone, "ip route add default dev wg0 && ip -6 route add default dev wg0");
        let gateway = lans.start(&format!(
            "{ALLOW}[[interface]]\nname = \"vpn\"\ndevice = \"wg0\"\n[[nat]]\nout = \"lan2\"\n\
             [[virtual-server]]\nname = \"web\"\nlisten = \"tcp 10.9.0.100:80\"\n\
             backends = [\"10.1.1.2:80\"]\n"
        ));
        let _server = Mirror::start(lans.host(2), "server", "0.0.0.0:80");
        let _lan = Mirror::start(lans.host(1), "lan", "10.1.1.2:80");
        let _six = Mirror::start(lans.host(1), "lan6", "[fd00:1:1::2]:80");
        assert_eq!(ask_tcp(&phone, "10.1.2.2:80").source.ip(), gateway_ip(2));
        assert_eq!(ask_udp(&phone, "10.1.2.2:80").source.ip(), gateway_ip(2));
        assert_eq!(ask_tcp(&phone, "10.1.1.2:80").source.ip().to_string(), "10.9.0.2");
        assert_eq!(ask_tcp(&phone, "[fd00:1:1::2]:80").source.ip().to_string(), "fd00:9::2");
        assert_eq!(ask_tcp(&phone, "10.9.0.100:80").name, "lan");
        let _phone = Mirror::start(&phone, "phone", "10.9.0.2:80");
        assert_eq!(ask_tcp(lans.host(1), "10.9.0.2:80").name, "phone");
        Talk::open(&phone, "10.1.2.2:80").unwrap().echo(1_000_000).unwrap();
        ping(&phone, "-c 2 10.9.0.1");
        ping(&phone, "-c 2 fd00:9::1");
        // What goes back by the same device: nobody on such a link knows a shorter way.
        shell(&phone, "ping -n -c 2 -W 1 -I 10.9.0.3 10.9.0.77 || true");
        let redirects = shell(&phone, "nstat -asz IcmpInRedirects | tail -1");
        assert_eq!(redirects.split_whitespace().nth(1), Some("0"), "{redirects}");
        no_reply_went_astray(&gateway);
    });
}
