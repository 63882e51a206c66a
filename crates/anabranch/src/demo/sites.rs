//! Networks of the demo: two sites, three links, a gateway at each site.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use control::status::TunnelStatus;
use testbed::link::Shape;
use testbed::program::{Program, ScratchDir};
use testbed::stop::Stop;
use testbed::topology::{LinkSpec, Node, Site, Testbed};

use super::progress::Progress;

/// One link, the same in both directions.
#[derive(Clone, Copy, Debug)]
pub(super) struct LinkFacts {
    /// Line rate, Mbit/s.
    pub(super) mbps: f64,
    /// One-way delay, ms.
    pub(super) delay_ms: f64,
    /// Random loss, percent.
    pub(super) loss_percent: f64,
}

impl LinkFacts {
    /// As the emulator wants it, with its queue of 120 ms.
    pub(super) fn shape(&self) -> Shape {
        Shape::new(self.mbps, self.delay_ms).loss_percent(self.loss_percent)
    }
}

/// The links, the best first.
pub(super) const LINKS: [LinkFacts; 3] = [
    LinkFacts { mbps: 100.0, delay_ms: 10.0, loss_percent: 0.0 },
    LinkFacts { mbps: 50.0, delay_ms: 20.0, loss_percent: 0.0 },
    LinkFacts { mbps: 20.0, delay_ms: 40.0, loss_percent: 0.1 },
];

/// Wire bytes of a full datagram: 1,500 and what Ethernet adds.
const WIRE_BYTES: f64 = 1_538.0;
/// Bytes in it for the inner packet: less IPv4 20, UDP 8, data header 16, tag 16, frame header 8.
const INNER_BYTES: f64 = 1_500.0 - 68.0;
/// TCP payload per wire byte: inner IPv4 20, TCP 20, timestamps 12 go off.
pub(super) const TCP_SHARE: f64 = (INNER_BYTES - 52.0) / WIRE_BYTES;
/// UDP payload per wire byte of the demo's datagrams of 1,400 bytes: inner IPv4 20 and UDP 8 go off.
pub(super) const UDP_SHARE: f64 = INNER_BYTES / WIRE_BYTES * 1_400.0 / 1_428.0;

/// The gateways' addresses in the tunnel.
const BRANCH_IP: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
pub(super) const HUB_IP: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
const PORT: u16 = 4600;
/// How long the gateways may take until every path is up.
const JOIN_MAX: Duration = Duration::from_secs(20);

/// Line rate of all links together, Mbit/s.
pub(super) fn sum_mbps(links: &[LinkFacts]) -> f64 {
    links.iter().map(|link| link.mbps).sum()
}

/// A running gateway.
#[derive(Debug)]
struct Gateway {
    name: &'static str,
    program: Program,
    socket: PathBuf,
}

/// The network with both gateways. Everything is gone when it is dropped.
pub(super) struct Sites {
    // Dropped in this order: first the gateways, then the network, then their files.
    gateways: [Gateway; 2],
    testbed: Testbed,
    _directory: ScratchDir,
}

impl Sites {
    /// Builds the network and starts the gateways.
    pub(super) fn build(progress: &mut Progress) -> anyhow::Result<Sites> {
        progress.step("Building two sites and three links");
        if !std::path::Path::new("/dev/net/tun").exists() {
            bail!(
                "there is no /dev/net/tun: load the module with \"modprobe tun\", or give the container the device"
            );
        }
        let specs: Vec<LinkSpec> = LINKS.iter().map(|link| LinkSpec::new(link.shape())).collect();
        let testbed = Testbed::new(&specs, 1)?;
        let directory = ScratchDir::new("anabranch-demo")?;
        progress.step("Starting two gateways");
        let gateways = start_gateways(&testbed, &directory)?;
        Ok(Sites { gateways, testbed, _directory: directory })
    }

    /// The node that sends and the node that receives.
    pub(super) fn sites(&self) -> (&Node, &Node) {
        (self.testbed.site(Site::A), self.testbed.site(Site::B))
    }

    /// Silences the best link, or brings it back.
    pub(super) fn silence(&self, on: bool) -> anyhow::Result<()> {
        self.testbed.black_hole(0, on)
    }

    /// State of both gateways, the branch first.
    pub(super) fn statuses(&self) -> anyhow::Result<[TunnelStatus; 2]> {
        let [branch, hub] = &self.gateways;
        Ok([branch.status()?, hub.status()?])
    }

    /// Fails with its last words when a gateway has ended.
    pub(super) fn check_alive(&mut self) -> anyhow::Result<()> {
        for gateway in &mut self.gateways {
            gateway.program.check_alive().with_context(|| format!("the gateway {}", gateway.name))?;
        }
        Ok(())
    }

    /// Waits until every path is up on both sides.
    pub(super) fn wait_until_joined(&mut self, stop: &Stop, progress: &mut Progress) -> anyhow::Result<()> {
        progress.step("Waiting for the paths");
        let start = Instant::now();
        loop {
            self.check_alive()?;
            // The control socket may not be there yet.
            let up = match self.statuses() {
                Ok(statuses) => statuses.each_ref().map(paths_up).into_iter().min().unwrap_or(0),
                Err(_) => 0,
            };
            progress.message(format_args!("{up} of {} up", LINKS.len()));
            if up >= LINKS.len() {
                progress.done(format_args!("{up} paths up after {:.1} s", start.elapsed().as_secs_f64()));
                return Ok(());
            }
            if stop.sleep(Duration::from_millis(100)) {
                bail!("stopped");
            }
            if start.elapsed() > JOIN_MAX {
                bail!(
                    "only {up} of {} paths came up within {JOIN_MAX:?}\n{}",
                    LINKS.len(),
                    self.last_words()
                );
            }
        }
    }

    fn last_words(&self) -> String {
        let words = |g: &Gateway| format!("The gateway {} said:\n{}", g.name, g.program.last_lines(20));
        self.gateways.each_ref().map(words).join("\n")
    }
}

/// Number of links with a path that is up.
fn paths_up(status: &TunnelStatus) -> usize {
    let paths = status.peers.iter().flat_map(|peer| &peer.paths);
    paths.filter(|path| path.state == "up").map(|path| &path.wan).collect::<BTreeSet<_>>().len()
}

impl Gateway {
    fn start(name: &'static str, node: &Node, directory: &ScratchDir, config: &str) -> anyhow::Result<Self> {
        let file = directory.write(&format!("{name}.toml"), config)?;
        let mut command = Command::new("/proc/self/exe");
        command.arg("up").arg(&file);
        let log = directory.path().join(format!("{name}.log"));
        let program = node.start(command, Some(&log)).with_context(|| format!("the gateway {name}"))?;
        Ok(Self { name, program, socket: directory.path().join(format!("{name}.sock")) })
    }

    fn status(&self) -> anyhow::Result<TunnelStatus> {
        let response = control::control_socket::call(&self.socket, control::protocol::Request::Status)
            .with_context(|| format!("ask the gateway {}", self.name))?;
        match (response.status, response.error) {
            (Some(report), _) => Ok(report.status),
            (None, error) => bail!("the gateway {} said: {}", self.name, error.unwrap_or_default()),
        }
    }
}

fn start_gateways(testbed: &Testbed, directory: &ScratchDir) -> anyhow::Result<[Gateway; 2]> {
    let generate = || control::key::generate().context("draw a key");
    let (branch, hub) = (generate()?, generate()?);
    directory.write("branch.key", control::key::encode(branch.bytes()))?;
    directory.write("hub.key", control::key::encode(hub.bytes()))?;

    let mut endpoints = Vec::new();
    for link in 0..LINKS.len() {
        let ip = testbed.addresses(Site::B, link).any().context("a link without an address")?;
        endpoints.push(format!("\"{}\"", std::net::SocketAddr::new(ip, PORT)));
    }
    let hub_config = Config {
        name: "hub",
        listen: true,
        ip: HUB_IP,
        peer: "branch",
        peer_key: branch.public(),
        peer_ip: BRANCH_IP,
        endpoints: &[],
    };
    let branch_config = Config {
        name: "branch",
        listen: false,
        ip: BRANCH_IP,
        peer: "hub",
        peer_key: hub.public(),
        peer_ip: HUB_IP,
        endpoints: &endpoints,
    };
    let start = |config: &Config<'_>, name, site| {
        let text = config.text(directory)?;
        Gateway::start(name, testbed.site(site), directory, &text)
    };
    let hub = start(&hub_config, "hub", Site::B)?;
    Ok([start(&branch_config, "branch", Site::A)?, hub])
}

/// Values of a gateway's configuration.
struct Config<'a> {
    name: &'a str,
    listen: bool,
    ip: Ipv4Addr,
    peer: &'a str,
    peer_key: [u8; 32],
    peer_ip: Ipv4Addr,
    endpoints: &'a [String],
}

impl Config<'_> {
    fn text(&self, directory: &ScratchDir) -> anyhow::Result<String> {
        let path =
            directory.path().to_str().context("the directory for temporary files has a strange name")?;
        let mut text = String::new();
        let name = self.name;
        writeln!(text, "[node]\nname = \"{name}\"\nprivate-key-file = \"{name}.key\"")?;
        writeln!(text, "state-dir = {path:?}\ncontrol-socket = {:?}", format!("{path}/{name}.sock"))?;
        if self.listen {
            writeln!(text, "listen = {PORT}")?;
        }
        writeln!(text, "\n[tun]\nname = \"ana0\"\naddress = [\"{}/24\"]", self.ip)?;
        for link in 0..LINKS.len() {
            writeln!(text, "\n[[wan]]\ninterface = \"wan{link}\"")?;
        }
        writeln!(text, "\n[[peer]]\nname = \"{}\"", self.peer)?;
        writeln!(text, "public-key = \"{}\"", control::key::encode(&self.peer_key))?;
        if !self.endpoints.is_empty() {
            writeln!(text, "endpoints = [{}]", self.endpoints.join(", "))?;
        }
        writeln!(text, "allowed-ips = [\"{}/32\"]", self.peer_ip)?;
        Ok(text)
    }
}
