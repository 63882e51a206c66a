//! Linux gateways behind nftables' hash load balancing: what a cluster is measured against.
//!
//! ```text
//!  client 10.1.0.2–4 ── lan 10.1.0.1 [inside balancer] ══ gateway 11 ══ [outside balancer] wan 10.2.0.254 ── 10.2.0.2–5 server
//!                                                      ══ gateway 12 ══
//! ```
//! Each gateway is a kernel with connection tracking: firewall, masquerading behind an address of its own, and virtual servers. A
//! balancer marks packets with `jhash … mod N map {…}` and a policy rule takes the mark to the gateway; both balancers hash
//! the same words in the same order, so that both directions meet. Neither keeps anything per flow, and no gateway knows of another.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr};
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use ipnet::{IpNet, Ipv4Net};
use linux::netns::set_sysctl;

use crate::cluster::{CLIENTS, LAN, SERVERS};
use crate::topology::Node;

/// Number of the first gateway.
pub const FIRST_GATEWAY: u16 = 11;
/// Address of the outside balancer at the server's network.
const WAN: Ipv4Addr = Ipv4Addr::new(10, 2, 0, 254);

/// Address of the virtual servers.
pub const VIRTUAL: Ipv4Addr = Ipv4Addr::new(10, 3, 0, 1);

/// Virtual server of the gateways: they balance over two of the server's addresses.
#[derive(Clone, Copy, Debug)]
pub struct VirtualPorts {
    /// TCP and UDP port at [`VIRTUAL`].
    pub listen: u16,
    /// Port of the backends.
    pub backend: u16,
}

/// The network with its gateways.
pub struct HashBalancer {
    /// The client.
    pub client: Node,
    /// The server.
    pub server: Node,
    inside: Node,
    outside: Node,
    _gateways: Vec<Node>,
}

fn net(address: Ipv4Addr, length: u8) -> anyhow::Result<IpNet> {
    Ok(IpNet::V4(Ipv4Net::new(address, length)?))
}

fn everywhere() -> IpNet {
    IpNet::V4(Ipv4Net::default())
}

/// Address of one end of the cable between a gateway and the inside (1) or outside (2) balancer.
const fn cable(side: u8, gateway: u16, end: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 210 + side, gateway as u8, end)
}

impl HashBalancer {
    /// Builds it with so many gateways; all of them share the flows evenly.
    ///
    /// # Errors
    /// What the system refuses; `nft` or `ip` are not there.
    pub fn new(gateways: u16, ports: VirtualPorts) -> anyhow::Result<Self> {
        ensure!((1..=64).contains(&gateways), "1 to 64 gateways");
        let (client, server) = (Node::create("client")?, Node::create("server")?);
        let (inside, outside) = (Node::create("inside")?, Node::create("outside")?);
        let sides =
            [(&client, &inside, "lan", &CLIENTS[..], LAN), (&server, &outside, "wan", &SERVERS[..], WAN)];
        for (end, balancer, interface, addresses, own) in sides {
            balancer.forward()?;
            balancer.run(answers_by_any_gateway)??;
            let there =
                addresses.iter().map(|address| net(*address, 24)).collect::<anyhow::Result<Vec<_>>>()?;
            end.connect("eth0", &there, balancer, interface, &[net(own, 24)?])?;
            end.add_route("eth0", everywhere(), IpAddr::V4(own))?;
        }
        let mut nodes = Vec::new();
        for id in FIRST_GATEWAY..FIRST_GATEWAY + gateways {
            nodes.push(gateway(id, &inside, &outside, ports)?);
        }
        let bed = Self { client, server, inside, outside, _gateways: nodes };
        let all: Vec<(u16, u32)> = (FIRST_GATEWAY..FIRST_GATEWAY + gateways).map(|id| (id, 1)).collect();
        bed.balance(&all)?;
        Ok(bed)
    }

    /// Gives the gateways other shares: (gateway, weight). One transaction at each balancer.
    ///
    /// # Errors
    /// What nft refuses.
    pub fn balance(&self, shares: &[(u16, u32)]) -> anyhow::Result<()> {
        let slots: Vec<u16> = shares.iter().flat_map(|(id, weight)| (0..*weight).map(|_| *id)).collect();
        ensure!(!slots.is_empty(), "no gateway has a share");
        let count = slots.len();
        let map: Vec<String> = slots.iter().enumerate().map(|(slot, id)| format!("{slot} : {id}")).collect();
        let map = map.join(", ");
        // The inside's source is the outside's destination.
        let sides = [
            (&self.inside, "lan", "ip daddr != 10.1.0.0/24", "ip saddr . th sport . ip daddr . th dport"),
            // Answers to a gateway's own address need no balancer.
            (&self.outside, "wan", "ip daddr 10.1.0.0/24", "ip daddr . th dport . ip saddr . th sport"),
        ];
        for (node, interface, only, words) in sides {
            let rules = format!(
                "table ip balancer {{}}\nflush table ip balancer\ntable ip balancer {{\n chain pre {{\n  \
                 type filter hook prerouting priority raw; policy accept\n  iifname \"{interface}\" \
                 {only} meta l4proto {{ tcp, udp }} meta mark set jhash {words} mod {count} seed 0x5ca1e map {{ {map} }}\n }}\n}}\n"
            );
            nft(node, &rules)?;
        }
        Ok(())
    }
}

/// Only packets that are to be balanced have a mark, and only it has a route to the other side: without this the kernel takes the sources of
/// what comes back for forged. Called before there are interfaces.
fn answers_by_any_gateway() -> anyhow::Result<()> {
    for setting in ["net.ipv4.conf.all.rp_filter", "net.ipv4.conf.default.rp_filter"] {
        set_sysctl(setting, "0")?;
    }
    Ok(())
}

/// A gateway between both balancers.
fn gateway(id: u16, inside: &Node, outside: &Node, ports: VirtualPorts) -> anyhow::Result<Node> {
    let node = Node::create(format!("gateway{id}"))?;
    node.forward()?;
    let outer = cable(2, id, 2);
    let own = net(cable(1, id, 2), 30)?;
    node.connect("lan", &[own], inside, &format!("g{id}"), &[net(cable(1, id, 1), 30)?])?;
    node.connect("wan", &[net(outer, 30)?], outside, &format!("g{id}"), &[net(cable(2, id, 1), 30)?])?;
    node.add_route("lan", net(Ipv4Addr::new(10, 1, 0, 0), 24)?, IpAddr::V4(cable(1, id, 1)))?;
    node.add_route("wan", everywhere(), IpAddr::V4(cable(2, id, 1)))?;
    for (balancer, side) in [(inside, 1), (outside, 2)] {
        let table = id.to_string();
        let via = cable(side, id, 2).to_string();
        ip(balancer, &["rule", "add", "fwmark", &table, "lookup", &table])?;
        ip(balancer, &["route", "add", "default", "via", &via, "table", &table])?;
    }
    let VirtualPorts { listen, backend } = ports;
    let mut rules = String::from("table ip gateway {\n");
    writeln!(rules, " chain pre {{\n  type nat hook prerouting priority dstnat; policy accept")?;
    for protocol in ["tcp", "udp"] {
        writeln!(
            rules,
            "  ip daddr {VIRTUAL} {protocol} dport {listen} dnat to jhash ip saddr . {protocol} sport mod 2 seed 0xba1a map \
             {{ 0 : {} . {backend}, 1 : {} . {backend} }}",
            SERVERS[2], SERVERS[3]
        )?;
    }
    writeln!(rules, " }}\n chain post {{\n  type nat hook postrouting priority srcnat; policy accept")?;
    writeln!(rules, "  ip saddr {} oifname \"wan\" snat to {outer}", CLIENTS[0])?;
    writeln!(rules, "  ct status dnat oifname \"wan\" snat to {outer}\n }}")?;
    writeln!(rules, " chain forward {{\n  type filter hook forward priority filter; policy drop")?;
    writeln!(rules, "  ct state established,related accept\n  iifname \"lan\" accept\n }}\n}}")?;
    nft(&node, &rules)?;
    Ok(node)
}

fn ip(node: &Node, arguments: &[&str]) -> anyhow::Result<()> {
    let mut command = Command::new("ip");
    command.args(arguments);
    node.output(command).map(drop)
}

fn nft(node: &Node, rules: &str) -> anyhow::Result<()> {
    let mut command = Command::new("nft");
    command.args(["-f", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    node.prepare(&mut command)?;
    let mut child = command.spawn().context("start nft")?;
    if let Some(mut input) = child.stdin.take() {
        std::io::Write::write_all(&mut input, rules.as_bytes())?;
    }
    let output = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "nft in {}: {said}{rules}", node.name());
    Ok(())
}
