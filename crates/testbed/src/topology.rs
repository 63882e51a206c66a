//! Two sites joined by emulated links, each site in a network namespace of its own.
//!
//! ```text
//!  host ── A ─ wan0 ══ a0 [emulator] b0 ══ wan0 ─ B ── host        without a router
//!              wan1 ══ a1 [emulator] b1 ══ up ─ R1 ─ down ══ wan1  with a router
//! ```
//! Namespaces have no name: they vanish with the last handle, thread and socket in them, so that nothing is
//! left behind however this process ends.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, bail};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use linux::ethtool::{Offloads, set_offloads};
use linux::netlink::{Netlink, RouteSpec};
use linux::netns::{Namespace, die_with_thread, set_sysctl};
use linux::packet_socket::PacketSocket;

use crate::emulator::{Emulator, LinkCounters, Way, Wire};
use crate::link::Shape;
use crate::program::Program;

/// A network namespace with a name for messages. Clones are the same node.
#[derive(Clone, Debug)]
pub struct Node {
    name: String,
    namespace: Arc<Namespace>,
}

impl Node {
    /// A node of its own, without any interface but loopback.
    pub fn create(name: impl Into<String>) -> anyhow::Result<Node> {
        let node = Node { name: name.into(), namespace: Arc::new(Namespace::create()?) };
        node.run(|| {
            for (setting, value) in SETTINGS {
                // A kernel without IPv6 lacks some of them, and then does not need them.
                let result = set_sysctl(setting, value);
                if result.is_err() && !setting.contains("ipv6") {
                    return result;
                }
            }
            Ok(())
        })??;
        Ok(node)
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its namespace.
    #[must_use]
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// Runs `work` inside, on a thread of its own, and waits for it. Sockets opened there stay there, wherever
    /// they are used. Start programs with [`start`](Self::start), not in here: they die with the thread that starts them.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> anyhow::Result<T> {
        self.namespace.run(work).with_context(|| format!("in {}", self.name))
    }

    /// A netlink session inside.
    pub fn netlink(&self) -> anyhow::Result<Netlink> {
        Netlink::open_in(&self.namespace).with_context(|| format!("in {}", self.name))
    }

    /// Lets `command` start inside when it is started by the caller. The kernel kills it when the starting thread ends.
    pub fn prepare(&self, command: &mut Command) -> anyhow::Result<()> {
        die_with_thread(command);
        self.namespace.prepare_command(command).with_context(|| format!("in {}", self.name))
    }

    /// Starts a program inside; its output goes to the file `log` if there is one.
    pub fn start(&self, mut command: Command, log: Option<&std::path::Path>) -> anyhow::Result<Program> {
        self.prepare(&mut command)?;
        Program::start(command, log).with_context(|| format!("in {}", self.name))
    }

    /// Runs a program inside to its end and gives its standard output; fails with its errors if it fails.
    pub fn output(&self, mut command: Command) -> anyhow::Result<String> {
        self.prepare(&mut command)?;
        let what = format!("{command:?}");
        let output = command.output().with_context(|| format!("start {what} in {}", self.name))?;
        if !output.status.success() {
            bail!(
                "{what} in {}: {}\n{}{}",
                self.name,
                output.status,
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Number of the interface of this name.
    pub fn interface(&self, name: &str) -> anyhow::Result<u32> {
        let link = self.netlink()?.link(name)?;
        Ok(link.with_context(|| format!("there is no interface {name} in {}", self.name))?.index)
    }

    /// Lays a cable from `interface` here to `far_interface` of `far`, with these addresses and an MTU of 1,500. Offloads
    /// stay as the kernel has them: super-packets pass whole, as between a host and its network card.
    pub fn connect(
        &self,
        interface: &str,
        addresses: &[IpNet],
        far: &Node,
        far_interface: &str,
        far_addresses: &[IpNet],
    ) -> anyhow::Result<()> {
        let other = std::os::fd::AsFd::as_fd(far.namespace());
        self.netlink()?.add_veth(interface, far_interface, Some(other))?;
        self.configure(interface, 1_500, addresses)?;
        far.configure(far_interface, 1_500, far_addresses)?;
        Ok(())
    }

    /// Sends what goes to `network` to `gateway`, a neighbor on `interface`.
    pub fn add_route(&self, interface: &str, network: IpNet, gateway: IpAddr) -> anyhow::Result<()> {
        let interface = Some(self.interface(interface)?);
        let route = RouteSpec { gateway: Some(gateway), interface, ..RouteSpec::new(network) };
        self.netlink()?.add_route(&route).with_context(|| format!("in {}", self.name))
    }

    /// Switches an interface on with an MTU and addresses.
    fn configure(&self, interface: &str, mtu: u32, addresses: &[IpNet]) -> anyhow::Result<u32> {
        let index = self.interface(interface)?;
        let netlink = self.netlink()?;
        netlink.set_mtu(index, mtu)?;
        for address in addresses {
            netlink.add_address(index, *address)?;
        }
        netlink.set_up(index, true)?;
        Ok(index)
    }

    pub(crate) fn forward(&self) -> anyhow::Result<()> {
        self.run(|| {
            set_sysctl("net.ipv4.ip_forward", "1")?;
            match set_sysctl("net.ipv6.conf.all.forwarding", "1") {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
                result => result,
            }
        })??;
        Ok(())
    }

    fn add_default_route(&self, index: u32, gateway: IpAddr, metric: u32) -> anyhow::Result<()> {
        let dst = match gateway {
            IpAddr::V4(_) => IpNet::V4(Ipv4Net::default()),
            IpAddr::V6(_) => IpNet::V6(Ipv6Net::default()),
        };
        let route =
            RouteSpec { gateway: Some(gateway), interface: Some(index), metric, ..RouteSpec::new(dst) };
        self.netlink()?.add_route(&route).with_context(|| format!("in {}", self.name))
    }
}

/// Settings of every node, so that tests do not depend on those of the machine: loose reverse-path filter as systemd sets
/// it, no waiting for IPv6 duplicates that cannot be, no router discovery. And no answer on one link for the address of
/// another: on the Internet nobody sits on all links at once.
const SETTINGS: [(&str, &str); 8] = [
    ("net.ipv4.conf.all.rp_filter", "2"),
    ("net.ipv4.conf.default.rp_filter", "2"),
    ("net.ipv4.conf.all.arp_ignore", "1"),
    ("net.ipv4.conf.all.arp_announce", "2"),
    ("net.ipv6.conf.default.accept_dad", "0"),
    ("net.ipv6.conf.all.accept_dad", "0"),
    ("net.ipv6.conf.default.accept_ra", "0"),
    ("net.ipv6.conf.default.router_solicitations", "0"),
];

/// One of the two ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Site {
    /// The first, usually the branch that dials.
    A,
    /// The second, usually the hub that is dialled.
    B,
}

impl Site {
    fn index(self) -> usize {
        match self {
            Site::A => 0,
            Site::B => 1,
        }
    }
}

/// A link between the sites. Interface `wanN` in both, N counting from 0.
#[derive(Clone, Debug)]
pub struct LinkSpec {
    /// Properties from A to B.
    pub a_to_b: Shape,
    /// Properties from B to A.
    pub b_to_a: Shape,
    /// IPv4 network of the link (at A's end if there is a router); `None` = no IPv4.
    pub ipv4: Option<LinkNet<Ipv4Net>>,
    /// IPv6 network, likewise.
    pub ipv6: Option<LinkNet<Ipv6Net>>,
    /// MTU of the interfaces, bytes.
    pub mtu: u32,
    /// A router between the emulator and B, which is A's and B's default gateway over this link. Two links with the same
    /// network need one each.
    pub router: bool,
}

/// The network of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkNet<N> {
    /// 198.18.N.0/24, 2001:db8:N::/64.
    Own,
    /// This one; may be the same on several links if each has a router.
    Given(N),
}

impl LinkSpec {
    /// The same properties in both directions, IPv4 only, MTU 1500, no router.
    #[must_use]
    pub fn new(shape: Shape) -> Self {
        Self {
            b_to_a: shape.clone(),
            a_to_b: shape,
            ipv4: Some(LinkNet::Own),
            ipv6: None,
            mtu: 1_500,
            router: false,
        }
    }

    /// The same with IPv6 as well.
    #[must_use]
    pub fn with_ipv6(mut self) -> Self {
        self.ipv6 = Some(LinkNet::Own);
        self
    }

    /// The same with IPv6 only.
    #[must_use]
    pub fn ipv6_only(mut self) -> Self {
        self.ipv4 = None;
        self.with_ipv6()
    }

    /// The same with a router, and this IPv4 network at A's end.
    #[must_use]
    pub fn behind_router(mut self, network: Ipv4Net) -> Self {
        self.ipv4 = Some(LinkNet::Given(network));
        self.router = true;
        self
    }

    /// The same with other interface MTU, bytes.
    #[must_use]
    pub fn with_mtu(mut self, mtu: u32) -> Self {
        self.mtu = mtu;
        self
    }
}

/// Addresses of one end of a link.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Addresses {
    /// IPv4 address.
    pub ipv4: Option<Ipv4Addr>,
    /// IPv6 address.
    pub ipv6: Option<Ipv6Addr>,
}

impl Addresses {
    /// The IPv4 address, or else the IPv6 one.
    #[must_use]
    pub fn any(&self) -> Option<IpAddr> {
        self.ipv4.map(IpAddr::V4).or(self.ipv6.map(IpAddr::V6))
    }
}

/// A host in the local network behind a site.
#[derive(Clone, Debug)]
pub struct Host {
    /// The host itself; its default route leads to the site.
    pub node: Node,
    /// Its addresses.
    pub addresses: Addresses,
    /// Its IPv4 network, for allowed-ips.
    pub network: Ipv4Net,
    /// Its IPv6 network.
    pub network6: Ipv6Net,
}

/// The test bed. Everything it made is gone when it is dropped.
#[derive(Debug)]
pub struct Testbed {
    // Dropped in this order: the emulator's thread ends before the namespaces go.
    emulator: Emulator,
    sites: [Node; 2],
    carrier: Node,
    routers: Vec<Node>,
    addresses: Vec<[Addresses; 2]>,
    hosts: [u8; 2],
}

impl Testbed {
    /// Two sites and the given links, 1–100. The caller has the right to make namespaces: as root, or after
    /// [`crate::gain_privilege`], or in a test wrapped in [`linux::testing::isolated`]. The same `seed` gives the same losses for the same
    /// packets.
    pub fn new(links: &[LinkSpec], seed: u64) -> anyhow::Result<Testbed> {
        if !(1..=100).contains(&links.len()) {
            bail!("a test bed has 1 to 100 links, not {}", links.len());
        }
        let sites = [Node::create("site A")?, Node::create("site B")?];
        let carrier = Node::create("the emulator")?;
        // Its interfaces only carry frames; they must not speak for themselves.
        carrier.run(|| set_sysctl("net.ipv6.conf.default.disable_ipv6", "1").ok())?;
        let (mut routers, mut addresses, mut wires) = (Vec::new(), Vec::new(), Vec::new());
        for (number, spec) in links.iter().enumerate() {
            let plan = Plan::new(number, spec)?;
            let router = spec.router.then(|| Node::create(format!("router {number}"))).transpose()?;
            plug(&carrier, &format!("a{number}"), &sites[0], &plan.wan, spec.mtu)?;
            let (node, interface) = match &router {
                None => (&sites[1], plan.wan.as_str()),
                Some(router) => (router, "up"),
            };
            plug(&carrier, &format!("b{number}"), node, interface, spec.mtu)?;
            plan.configure(&sites, router.as_ref(), spec)?;
            let ends = carrier.run(|| -> linux::Result<_> {
                let open = |side: &str| PacketSocket::open(&format!("{side}{number}"), true, true);
                Ok([open("a")?, open("b")?])
            })??;
            addresses.push(plan.ends());
            routers.extend(router);
            let shapes = [spec.a_to_b.clone(), spec.b_to_a.clone()];
            wires.push(Wire { ends, shapes, mtu: spec.mtu, seed });
        }
        let emulator = Emulator::start(wires)?;
        Ok(Testbed { emulator, sites, carrier, routers, addresses, hosts: [0; 2] })
    }

    /// A site.
    #[must_use]
    pub fn site(&self, site: Site) -> &Node {
        &self.sites[site.index()]
    }

    /// The router of a link with one, in the order of the links that have one.
    #[must_use]
    pub fn routers(&self) -> &[Node] {
        &self.routers
    }

    /// A site's addresses on a link; none for a link that does not exist.
    #[must_use]
    pub fn addresses(&self, site: Site, link: usize) -> Addresses {
        self.addresses.get(link).map(|ends| ends[site.index()]).unwrap_or_default()
    }

    /// The emulator, to change links while they run.
    #[must_use]
    pub fn emulator(&self) -> &Emulator {
        &self.emulator
    }

    /// Changes the properties of a link while it runs.
    pub fn change(
        &self,
        link: usize,
        way: Way,
        change: impl FnMut(&mut Shape) + Send + 'static,
    ) -> anyhow::Result<()> {
        self.emulator.change(link, way, change)
    }

    /// Silences a link or brings it back: nothing arrives, and the interfaces notice nothing.
    pub fn black_hole(&self, link: usize, on: bool) -> anyhow::Result<()> {
        self.emulator.black_hole(link, on)
    }

    /// Pulls or plugs the cable at a site's end of a link: its interface has no carrier, and what is under way is lost.
    /// With a router, B's cable is that of the router.
    pub fn set_carrier(&self, link: usize, site: Site, on: bool) -> anyhow::Result<()> {
        let side = if site == Site::A { "a" } else { "b" };
        let index = self.carrier.interface(&format!("{side}{link}"))?;
        self.carrier.netlink()?.set_up(index, on)?;
        if !on {
            self.emulator.clear(link)?;
        }
        Ok(())
    }

    /// Counters of a link.
    pub fn counters(&self, link: usize) -> anyhow::Result<LinkCounters> {
        self.emulator.counters(link)
    }

    /// Adds a host behind a site, which then forwards: 10.S.N.2/24 and fd00:S:N::2/64 with S = 1 for A and 2 for B, N counting
    /// from 1; the site is .1 on its interface `lanN`.
    pub fn add_host(&mut self, site: Site) -> anyhow::Result<Host> {
        let count = &mut self.hosts[site.index()];
        let number = count.checked_add(1).context("a site has at most 255 hosts")?;
        let site_number = site.index() as u8 + 1;
        let gateway = &self.sites[site.index()];
        let node = Node::create(format!("host {number} of {}", gateway.name))?;
        let interface = format!("lan{number}");
        gateway.netlink()?.add_veth(&interface, "eth0", Some(std::os::fd::AsFd::as_fd(node.namespace())))?;
        let network = Ipv4Net::new(Ipv4Addr::new(10, site_number, number, 0), 24)?;
        let network6 = Ipv6Net::new(
            Ipv6Addr::new(0xfd00, u16::from(site_number), u16::from(number), 0, 0, 0, 0, 0),
            64,
        )?;
        let (near, far) = (ends(network, network6, 1), ends(network, network6, 2));
        gateway.configure(&interface, 1_500, &near)?;
        let index = node.configure("eth0", 1_500, &far)?;
        for gateway in near {
            node.add_default_route(index, gateway.addr(), 0)?;
        }
        gateway.forward()?;
        *count = number;
        let [IpNet::V4(ipv4), IpNet::V6(ipv6)] = far else { bail!("an address of the wrong family") };
        let addresses = Addresses { ipv4: Some(ipv4.addr()), ipv6: Some(ipv6.addr()) };
        Ok(Host { node, addresses, network, network6 })
    }
}

/// The addresses number `host` of both networks.
fn ends(ipv4: Ipv4Net, ipv6: Ipv6Net, host: u8) -> [IpNet; 2] {
    [IpNet::V4(nth4(ipv4, host)), IpNet::V6(nth6(ipv6, host))]
}

fn nth4(network: Ipv4Net, host: u8) -> Ipv4Net {
    let address = u32::from(network.network()) | u32::from(host);
    Ipv4Net::new(address.into(), network.prefix_len()).unwrap_or(network)
}

fn nth6(network: Ipv6Net, host: u8) -> Ipv6Net {
    let address = u128::from(network.network()) | u128::from(host);
    Ipv6Net::new(address.into(), network.prefix_len()).unwrap_or(network)
}

/// A cable from the emulator to a node. Frames on it are what would be on a wire: no super-frames in either direction.
fn plug(carrier: &Node, name: &str, node: &Node, interface: &str, mtu: u32) -> anyhow::Result<()> {
    let other = std::os::fd::AsFd::as_fd(node.namespace());
    carrier.netlink()?.add_veth(name, interface, Some(other))?;
    carrier.configure(name, mtu, &[])?;
    carrier.run(|| set_offloads(name, &Offloads::OFF))??;
    node.run(|| set_offloads(interface, &Offloads::OFF))??;
    Ok(())
}

/// Where everything of one link gets its address from.
struct Plan {
    number: usize,
    wan: String,
    near4: Option<Ipv4Net>,
    near6: Option<Ipv6Net>,
    far4: Option<Ipv4Net>,
    far6: Option<Ipv6Net>,
    router: bool,
}

impl Plan {
    fn new(number: usize, spec: &LinkSpec) -> anyhow::Result<Plan> {
        let short = u8::try_from(number)?;
        let own4 = |third| Ipv4Net::new(Ipv4Addr::new(198, 18, third, 0), 24);
        let own6 = |third| Ipv6Net::new(Ipv6Addr::new(0x2001, 0xdb8, third, 0, 0, 0, 0, 0), 64);
        let near4 = match spec.ipv4 {
            None => None,
            Some(LinkNet::Own) => Some(own4(short)?),
            Some(LinkNet::Given(network)) if network.prefix_len() <= 24 => Some(network),
            Some(LinkNet::Given(network)) => bail!("the network {network} of a link is smaller than a /24"),
        };
        let near6 = match spec.ipv6 {
            None => None,
            Some(LinkNet::Own) => Some(own6(u16::from(short))?),
            Some(LinkNet::Given(network)) if network.prefix_len() <= 64 => Some(network),
            Some(LinkNet::Given(network)) => bail!("the network {network} of a link is smaller than a /64"),
        };
        if near4.is_none() && near6.is_none() {
            bail!("link {number} has neither IPv4 nor IPv6");
        }
        // Behind a router: the networks 100 and more are not used by `Own`.
        let far4 = if spec.router { near4.and_then(|_| own4(100 + short).ok()) } else { near4 };
        let far6 = if spec.router { near6.and_then(|_| own6(0x100 + u16::from(short)).ok()) } else { near6 };
        Ok(Plan { number, wan: format!("wan{number}"), near4, near6, far4, far6, router: spec.router })
    }

    /// Number of A's address; the router is number 1 where there is one.
    fn host_a(&self) -> u8 {
        if self.router { 100 } else { 1 }
    }

    fn ends(&self) -> [Addresses; 2] {
        let at = |ipv4: Option<Ipv4Net>, ipv6: Option<Ipv6Net>, host| Addresses {
            ipv4: ipv4.map(|n| nth4(n, host).addr()),
            ipv6: ipv6.map(|n| nth6(n, host).addr()),
        };
        [at(self.near4, self.near6, self.host_a()), at(self.far4, self.far6, 2)]
    }

    fn configure(&self, sites: &[Node; 2], router: Option<&Node>, spec: &LinkSpec) -> anyhow::Result<()> {
        let nets = |ipv4: Option<Ipv4Net>, ipv6: Option<Ipv6Net>, host: u8| -> Vec<IpNet> {
            let ipv4 = ipv4.map(|n| IpNet::V4(nth4(n, host)));
            ipv4.into_iter().chain(ipv6.map(|n| IpNet::V6(nth6(n, host)))).collect()
        };
        let [a, b] = sites;
        if let Some(router) = router {
            router.netlink()?.add_veth("down", &self.wan, Some(std::os::fd::AsFd::as_fd(b.namespace())))?;
            router.run(|| set_offloads("down", &Offloads::OFF))??;
            b.run(|| set_offloads(&self.wan, &Offloads::OFF))??;
            router.configure("up", spec.mtu, &nets(self.near4, self.near6, 1))?;
            router.configure("down", spec.mtu, &nets(self.far4, self.far6, 1))?;
            router.forward()?;
        }
        let at_a = a.configure(&self.wan, spec.mtu, &nets(self.near4, self.near6, self.host_a()))?;
        let at_b = b.configure(&self.wan, spec.mtu, &nets(self.far4, self.far6, 2))?;
        if self.router {
            let metric = 100 + self.number as u32;
            for gateway in nets(self.near4, self.near6, 1) {
                a.add_default_route(at_a, gateway.addr(), metric)?;
            }
            for gateway in nets(self.far4, self.far6, 1) {
                b.add_default_route(at_b, gateway.addr(), metric)?;
            }
        }
        Ok(())
    }
}
