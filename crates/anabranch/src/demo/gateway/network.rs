//! Networks of the gateway demo: three local networks, the Internet, a server farm, and the gateway in the middle.
//!
//! ```text
//!  lan1 192.168.1.0/24 ─┐             ┌─ internet 198.51.100.0/24: servers .80–.82, visitors .200–.207
//!  lan2 192.168.2.0/24 ─┼── gateway ──┤
//!  lan3 192.168.3.0/24 ─┘             └─ farm 10.20.0.0/24: backends .11–.14 behind 198.51.100.10
//! ```
//! Every cable is a veth pair with all offloads on.

use std::fmt::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use control::control_socket::call;
use control::protocol::{Request, Response};
use control::reload::ReloadReport;
use control::status::ServicesStatus;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use testbed::Privilege;
use testbed::program::{Program, ScratchDir};
use testbed::stop::Stop;
use testbed::topology::Node;
use testbed::traffic::service::Service;
use testbed::traffic::{dns, frames, http};

use super::super::progress::Progress;

/// A way of translating addresses, with a local network that uses it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mode {
    /// As the configuration calls it.
    pub(super) nat: &'static str,
    pub(super) row: &'static str,
}

/// One for each of lan1, lan2, lan3.
pub(super) const MODES: [Mode; 3] = [
    Mode { nat: "address-and-port", row: "C2" },
    Mode { nat: "port-only", row: "C3" },
    Mode { nat: "none", row: "C4" },
];

/// Servers on the Internet, hosts in each local network, and backends of the farm.
pub(super) const SERVERS: u8 = 3;
pub(super) const HOSTS: u8 = 4;
pub(super) const BACKENDS: usize = 4;
/// Addresses that visitors of the virtual servers come from.
pub(super) const VISITORS: u8 = 8;

pub(super) const HTTP_PORT: u16 = 80;
pub(super) const DNS_PORT: u16 = 53;
pub(super) const FRAMES_PORT: u16 = 7000;

/// The virtual servers' address.
const SERVICE_IP: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 10);
/// Addresses of the pool of lan1.
const POOL: [Ipv4Addr; 2] = [Ipv4Addr::new(198, 51, 100, 16), Ipv4Addr::new(198, 51, 100, 17)];
/// How long the gateway may take until everything is up.
const START_MAX: Duration = Duration::from_secs(20);
/// Backends count as up until their health says otherwise: it has been asked a few times after so long.
const STEADY: Duration = Duration::from_millis(500);

/// The network, all servers but the farm's, and the running gateway. Everything is gone when it is dropped.
pub(super) struct GatewayNetwork {
    // Dropped in this order: first the gateway, then servers, then their networks and files.
    program: Program,
    _servers: Vec<Service>,
    _names: Vec<dns::Server>,
    /// lan1, lan2, lan3.
    pub(super) lans: Vec<Node>,
    pub(super) internet: Node,
    pub(super) farm: Node,
    _gateway: Node,
    cores: usize,
    socket: PathBuf,
    directory: ScratchDir,
}

fn lan_ip(lan: usize, host: u8) -> Ipv4Addr {
    Ipv4Addr::new(192, 168, lan as u8 + 1, host)
}

fn lan_ip6(lan: usize, host: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0, 0, lan as u16 + 1, 0, 0, 0, host.into())
}

fn internet_ip(host: u8) -> Ipv4Addr {
    Ipv4Addr::new(198, 51, 100, host)
}

fn internet_ip6(host: u8) -> Ipv6Addr {
    Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, host.into())
}

fn farm_ip(host: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 20, 0, host)
}

fn net(ip: impl Into<IpAddr>) -> anyhow::Result<IpNet> {
    let ip = ip.into();
    Ok(IpNet::new(ip, if ip.is_ipv4() { 24 } else { 64 })?)
}

/// A host of a local network.
pub(super) fn host(lan: usize, number: u8, ipv6: bool) -> IpAddr {
    let last = 11 + number % HOSTS;
    if ipv6 { lan_ip6(lan, last).into() } else { lan_ip(lan, last).into() }
}

/// A server on the Internet.
pub(super) fn server(number: u8, port: u16, ipv6: bool) -> SocketAddr {
    let last = 80 + number % SERVERS;
    let ip: IpAddr = if ipv6 { internet_ip6(last).into() } else { internet_ip(last).into() };
    SocketAddr::new(ip, port)
}

/// Somebody on the Internet.
pub(super) fn visitor(number: u8) -> IpAddr {
    internet_ip(200 + number % VISITORS).into()
}

/// A virtual server.
pub(super) fn service(port: u16) -> SocketAddr {
    SocketAddr::new(SERVICE_IP.into(), port)
}

/// A backend of the farm.
pub(super) fn backend(number: usize, port: u16) -> SocketAddr {
    SocketAddr::new(farm_ip(11 + number as u8).into(), port)
}

impl GatewayNetwork {
    /// Builds the networks, starts the servers and the gateway.
    pub(super) fn build(privilege: Privilege, progress: &mut Progress) -> anyhow::Result<GatewayNetwork> {
        progress.step("Building three local networks, the Internet and a farm");
        if !std::path::Path::new("/dev/net/tun").exists() {
            bail!(
                "there is no /dev/net/tun: load the module with \"modprobe tun\", or give the container the device"
            );
        }
        if privilege == Privilege::UserNamespace && !is_installed("nft") {
            bail!(
                "as an ordinary user the gateway needs the program nft (package nftables); root does without it"
            );
        }
        let gateway = Node::create("the gateway")?;
        let lans: Vec<Node> =
            (0..MODES.len()).map(|lan| build_lan(&gateway, lan)).collect::<Result<_, _>>()?;
        let internet = build_internet(&gateway)?;
        let farm = build_farm(&gateway)?;
        let (servers, names) = start_servers(&internet, &farm)?;
        progress.step("Starting the gateway");
        let cpus = linux::affinity::allowed_cpus().map_or(1, |cpus| cpus.len());
        // One core has nothing to hand over, and cannot be taken away.
        let cores = cpus.clamp(2, 8);
        let directory = ScratchDir::new("anabranch-demo")?;
        let config = directory.write("gateway.toml", config(&directory, cores, false)?)?;
        let mut command = Command::new("/proc/self/exe");
        command.arg("up").arg(&config);
        let log = directory.path().join("gateway.log");
        let program = gateway.start(command, Some(&log)).context("the gateway")?;
        let socket = directory.path().join("gateway.sock");
        Ok(GatewayNetwork {
            program,
            _servers: servers,
            _names: names,
            lans,
            internet,
            farm,
            _gateway: gateway,
            cores,
            socket,
            directory,
        })
    }

    /// Waits until interfaces and backends are up.
    pub(super) fn wait_until_up(&mut self, stop: &Stop, progress: &mut Progress) -> anyhow::Result<()> {
        let start = Instant::now();
        let mut up_since = None;
        loop {
            self.check_alive()?;
            // The control socket may not be there yet.
            let missing = match self.status() {
                Ok(status) => missing(&status),
                Err(error) => Some(format!("{error:#}")),
            };
            match &missing {
                None => {
                    let since = *up_since.get_or_insert_with(Instant::now);
                    if since.elapsed() >= STEADY {
                        progress.done(format_args!("up after {:.1} s", (since - start).as_secs_f64()));
                        return Ok(());
                    }
                }
                Some(missing) => {
                    up_since = None;
                    progress.message(missing);
                }
            }
            if stop.sleep(Duration::from_millis(50)) {
                bail!("stopped");
            }
            if start.elapsed() > START_MAX {
                let missing = missing.unwrap_or_else(|| "it goes up and down".to_owned());
                bail!("after {START_MAX:?}: {missing}\nThe gateway said:\n{}", self.program.last_lines(20));
            }
        }
    }

    /// Fails with its last words when the gateway has ended.
    pub(super) fn check_alive(&mut self) -> anyhow::Result<()> {
        self.program.check_alive().context("the gateway")
    }

    /// Its last words.
    pub(super) fn last_words(&self) -> String {
        self.program.last_lines(20)
    }

    /// Live state.
    pub(super) fn status(&self) -> anyhow::Result<ServicesStatus> {
        let report = self.ask(Request::Status)?.status.context("the gateway sent no status")?;
        report.gateway.context("the gateway says nothing of its interfaces")
    }

    /// Takes a core out of work, or puts it back: `anabranch core drain`, `anabranch core enable`.
    pub(super) fn set_core(&self, core: usize, enabled: bool) -> anyhow::Result<()> {
        self.ask(Request::Core { core, enabled }).map(drop)
    }

    /// Changes the configuration and has it read again: `anabranch reload`.
    pub(super) fn reload(&self) -> anyhow::Result<ReloadReport> {
        self.directory.write("gateway.toml", config(&self.directory, self.cores, true)?)?;
        self.ask(Request::Reload)?.reload.context("the gateway said nothing of the reload")
    }

    fn ask(&self, request: Request) -> anyhow::Result<Response> {
        let response = call(&self.socket, request).context("ask the gateway")?;
        match response.ok {
            true => Ok(response),
            false => bail!("the gateway refused: {}", response.error.unwrap_or_default()),
        }
    }
}

/// Whether a program is in one of the directories where programs are looked for.
fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|directory| directory.join(program).is_file())
}

/// Interfaces and backends that are not up yet.
fn missing(status: &ServicesStatus) -> Option<String> {
    let interface = status.interfaces.iter().find(|interface| interface.state != "up");
    if let Some(interface) = interface {
        return Some(format!("interface {}: {}", interface.name, interface.state));
    }
    let backends = status.virtual_servers.iter().flat_map(|server| &server.backends);
    let backend = backends.into_iter().find(|backend| backend.state != "up");
    backend.map(|backend| format!("backend {}: {} {}", backend.address, backend.state, backend.reason))
}

fn build_lan(gateway: &Node, lan: usize) -> anyhow::Result<Node> {
    let node = Node::create(format!("lan{}", lan + 1))?;
    let mut hosts = Vec::new();
    for number in 0..HOSTS {
        hosts.push(net(host(lan, number, false))?);
        hosts.push(net(host(lan, number, true))?);
    }
    // The gateway's own addresses come from its configuration.
    gateway.connect(&format!("lan{}", lan + 1), &[], &node, "eth0", &hosts)?;
    node.add_route("eth0", IpNet::V4(Ipv4Net::default()), lan_ip(lan, 1).into())?;
    node.add_route("eth0", IpNet::V6(Ipv6Net::default()), lan_ip6(lan, 1).into())?;
    Ok(node)
}

/// Knows the way back to lan2 and lan3, whose addresses stay, and to no address of lan1.
fn build_internet(gateway: &Node) -> anyhow::Result<Node> {
    let node = Node::create("the Internet")?;
    let mut addresses = Vec::new();
    for number in 0..SERVERS {
        addresses.push(net(server(number, 0, false).ip())?);
        addresses.push(net(server(number, 0, true).ip())?);
    }
    for number in 0..VISITORS {
        addresses.push(net(visitor(number))?);
    }
    gateway.connect("wan", &[], &node, "eth0", &addresses)?;
    for lan in 1..MODES.len() {
        let network = Ipv4Net::new(lan_ip(lan, 0), 24)?;
        node.add_route("eth0", network.into(), internet_ip(1).into())?;
    }
    node.add_route("eth0", "fd00::/48".parse::<IpNet>()?, internet_ip6(1).into())?;
    Ok(node)
}

fn build_farm(gateway: &Node) -> anyhow::Result<Node> {
    let node = Node::create("the farm")?;
    let backends: Vec<IpNet> =
        (0..BACKENDS).map(|number| net(backend(number, 0).ip())).collect::<Result<_, _>>()?;
    gateway.connect("farm", &[], &node, "eth0", &backends)?;
    node.add_route("eth0", IpNet::V4(Ipv4Net::default()), farm_ip(1).into())?;
    Ok(node)
}

/// All servers that live as long as the demo: those on the Internet, and the farm's name servers.
fn start_servers(internet: &Node, farm: &Node) -> anyhow::Result<(Vec<Service>, Vec<dns::Server>)> {
    let (mut servers, mut names) = (Vec::new(), Vec::new());
    for number in 0..SERVERS {
        for ipv6 in [false, true] {
            let id = 9_000 + u32::from(number) * 10 + u32::from(ipv6);
            let at = |port| server(number, port, ipv6);
            servers.push(Service::start(internet, at(HTTP_PORT), id, http::serve)?);
            servers.push(Service::start(internet, at(FRAMES_PORT), id, frames::serve)?);
            names.push(dns::Server::start(internet, at(DNS_PORT))?);
        }
    }
    for number in 0..2 {
        names.push(dns::Server::start(farm, backend(number, DNS_PORT))?);
    }
    Ok((servers, names))
}

/// The gateway's configuration; after the reload it has a rule more and another timeout.
fn config(directory: &ScratchDir, cores: usize, reloaded: bool) -> anyhow::Result<String> {
    let path = directory.path().to_str().context("the directory for temporary files has a strange name")?;
    let mut text = String::new();
    writeln!(text, "[node]\nname = \"gateway\"\ncores = {cores}\nstate-dir = {path:?}")?;
    writeln!(text, "control-socket = {:?}\n", format!("{path}/gateway.sock"))?;
    writeln!(text, "[gateway]\ndefault-action = \"drop\"\n")?;
    writeln!(text, "[gateway.timeouts]\nudp-seconds = {}\n", if reloaded { 300 } else { 180 })?;
    let mut interface = |name: &str, addresses: &[IpAddr]| -> anyhow::Result<()> {
        let list: Vec<String> =
            addresses.iter().map(|ip| net(*ip).map(|net| format!("\"{net}\""))).collect::<Result<_, _>>()?;
        writeln!(text, "[[interface]]\nname = \"{name}\"\naddress = [{}]\n", list.join(", "))?;
        Ok(())
    };
    for lan in 0..MODES.len() {
        interface(&format!("lan{}", lan + 1), &[lan_ip(lan, 1).into(), lan_ip6(lan, 1).into()])?;
    }
    interface("wan", &[internet_ip(1).into(), internet_ip6(1).into()])?;
    interface("farm", &[farm_ip(1).into()])?;
    write_nat(&mut text)?;
    write_servers(&mut text)?;
    write_rules(&mut text, reloaded)?;
    Ok(text)
}

fn write_nat(text: &mut String) -> std::fmt::Result {
    for (lan, mode) in MODES.iter().enumerate() {
        let from = format!("{}/24", lan_ip(lan, 0));
        writeln!(text, "[[nat]]\nout = \"wan\"\nmode = \"{}\"\nfrom = [\"{from}\"]", mode.nat)?;
        if lan == 0 {
            writeln!(text, "addresses = [\"{}\", \"{}\"]", POOL[0], POOL[1])?;
        }
        writeln!(text)?;
    }
    Ok(())
}

fn write_servers(text: &mut String) -> std::fmt::Result {
    let list = |count: usize, port: u16| {
        let backends: Vec<String> =
            (0..count).map(|number| format!("\"{}\"", backend(number, port))).collect();
        backends.join(", ")
    };
    writeln!(
        text,
        "[[virtual-server]]\nname = \"web\"\nlisten = \"tcp {}\"\nbackends = [{}]\n\
         health = {{ http = \"/health\", interval-ms = 100, timeout-ms = 1000, fall = 2, rise = 2 }}\n",
        service(HTTP_PORT),
        list(BACKENDS, HTTP_PORT)
    )?;
    // These see the visitor's own address.
    writeln!(
        text,
        "[[virtual-server]]\nname = \"names\"\nlisten = \"udp {}\"\nbackends = [{}]\nsource = \"none\"\n",
        service(DNS_PORT),
        list(2, DNS_PORT)
    )
}

fn write_rules(text: &mut String, reloaded: bool) -> std::fmt::Result {
    let mut rule = |name: &str, rest: &str| writeln!(text, "[[rule]]\nname = \"{name}\"\n{rest}\n");
    if reloaded {
        rule("telnet", "action = \"reject\"\nfrom = \"wan\"\nprotocol = \"tcp\"\nport = 23")?;
    }
    rule("out", "action = \"allow\"\nfrom = [\"lan1\", \"lan2\", \"lan3\"]")?;
    let to = format!("to = \"{SERVICE_IP}/32\"");
    rule(
        "web",
        &format!("action = \"allow\"\nfrom = \"wan\"\n{to}\nprotocol = \"tcp\"\nport = {HTTP_PORT}"),
    )?;
    rule(
        "names",
        &format!("action = \"allow\"\nfrom = \"wan\"\n{to}\nprotocol = \"udp\"\nport = {DNS_PORT}"),
    )?;
    rule("ping", "action = \"allow\"\nprotocol = [\"icmp\", \"icmpv6\"]")
}
