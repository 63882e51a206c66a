//! Helpers of all tests: a scene of two sites, configurations, gateways, traffic.

use std::cell::RefCell;
use std::fmt::Write as _;
use std::io::{Read, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use control::status::PeerStatus;
use testbed::link::Shape;
use testbed::program::ScratchDir;
use testbed::stop::Stop;
use testbed::topology::{LinkSpec, Node, Site, Testbed};
use testbed::traffic::{Span, tcp, udp};

pub use crate::program::{Gateway, Keys, paths_up};

/// The branch inside the tunnel.
pub const BRANCH_IP: &str = "10.77.0.1";
/// The hub inside the tunnel.
pub const HUB_IP: &str = "10.77.0.2";
/// How long something may take that usually takes a second: the machine may be busy with other things.
pub const PATIENCE: f64 = 30.0;

/// A link of this rate and one-way delay.
pub fn link(mbps: f64, delay_ms: f64) -> LinkSpec {
    LinkSpec::new(Shape::new(mbps, delay_ms))
}

/// Two sites and the files of their gateways. When it goes, no log may have a line of level ERROR that was not announced.
pub struct Scene {
    pub testbed: Testbed,
    pub directory: ScratchDir,
    links: usize,
    expected_errors: RefCell<Vec<String>>,
}

impl Scene {
    pub fn new(links: &[LinkSpec]) -> Self {
        Self {
            testbed: Testbed::new(links, 1).unwrap(),
            directory: ScratchDir::new("anabranch-e2e").unwrap(),
            links: links.len(),
            expected_errors: RefCell::default(),
        }
    }

    pub fn a(&self) -> &Node {
        self.testbed.site(Site::A)
    }

    pub fn b(&self) -> &Node {
        self.testbed.site(Site::B)
    }

    /// Where a site is dialled over a link.
    pub fn endpoint(&self, site: Site, link: usize) -> String {
        SocketAddr::new(self.testbed.addresses(site, link).any().unwrap(), 4600).to_string()
    }

    /// A branch at A that dials the hub at B over all links. Both know each other's tunnel addresses only.
    pub fn pair(&self) -> (Config, Config) {
        let mut branch = Config::new("branch", BRANCH_IP);
        let mut hub = Config::new("hub", HUB_IP).node_line("listen = 4600");
        for number in 0..self.links {
            branch = branch.wan(&format!("wan{number}"));
        }
        let endpoints: Vec<String> = (0..self.links).map(|number| self.endpoint(Site::B, number)).collect();
        branch = branch.peer(&hub, &endpoints, &hub.own_nets(), "");
        hub = hub.peer(&branch, &[], &branch.own_nets(), "");
        (branch, hub)
    }

    /// Links between the sites.
    pub fn links(&self) -> usize {
        self.links
    }

    /// Starts a gateway.
    pub fn start(&self, place: &Node, config: &Config) -> Gateway {
        Gateway::start(place, &self.directory, &config.name, &config.text(&self.directory))
    }

    /// Starts both and waits until the branch has so many paths.
    pub fn join(&self, branch: &Config, hub: &Config, paths: usize) -> (Gateway, Gateway) {
        let mut hub = self.start(self.b(), hub);
        let mut branch = self.start(self.a(), branch);
        branch.wait(&format!("{paths} paths"), PATIENCE, |report| paths_up(report) >= paths);
        hub.wait(&format!("{paths} paths"), PATIENCE, |report| paths_up(report) >= paths);
        (branch, hub)
    }

    /// Lines of level ERROR with this text are part of the test.
    pub fn expect_error(&self, text: &str) {
        self.expected_errors.borrow_mut().push(text.to_owned());
    }

    fn logs(&self) -> Vec<(String, String)> {
        let files = std::fs::read_dir(self.directory.path()).into_iter().flatten().flatten();
        let logs = files.filter(|file| file.path().extension().is_some_and(|e| e == "log"));
        logs.map(|file| {
            let text = std::fs::read(file.path()).unwrap_or_default();
            (file.file_name().to_string_lossy().into_owned(), String::from_utf8_lossy(&text).into_owned())
        })
        .collect()
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        let logs = self.logs();
        if std::thread::panicking() {
            for (name, text) in &logs {
                let lines: Vec<&str> = text.lines().collect();
                eprintln!("--- {name}\n{}", lines[lines.len().saturating_sub(40)..].join("\n"));
            }
            return;
        }
        let expected = self.expected_errors.borrow();
        for (name, text) in &logs {
            let wrong = |line: &&str| {
                (line.contains(" ERROR ") || line.contains("panicked"))
                    && !expected.iter().any(|text| line.contains(text))
            };
            let lines: Vec<&str> = text.lines().filter(wrong).collect();
            assert!(lines.is_empty(), "errors in {name}:\n{}", lines.join("\n"));
        }
    }
}

/// A configuration that is put together step by step.
#[derive(Clone)]
pub struct Config {
    pub name: String,
    pub keys: Keys,
    address: String,
    node: String,
    rest: String,
}

impl Config {
    /// With a new key; the tunnel's IPv6 address is fd77:: and the last number of `address`.
    pub fn new(name: &str, address: &str) -> Self {
        Self {
            name: name.to_owned(),
            keys: Keys::new(),
            address: address.to_owned(),
            node: String::new(),
            rest: String::new(),
        }
    }

    fn address6(&self) -> String {
        format!("fd77::{}", self.address.rsplit('.').next().unwrap())
    }

    /// Its own addresses, for the allowed-ips of others.
    pub fn own_nets(&self) -> String {
        format!("\"{}/32\", \"{}/128\"", self.address, self.address6())
    }

    /// One more line in `[node]`.
    pub fn node_line(mut self, line: &str) -> Self {
        self.node.push_str(line);
        self.node.push('\n');
        self
    }

    /// One more WAN.
    pub fn wan(self, interface: &str) -> Self {
        self.section(&format!("[[wan]]\ninterface = \"{interface}\"\n"))
    }

    /// One more peer.
    pub fn peer(self, other: &Self, endpoints: &[String], allowed: &str, more: &str) -> Self {
        let mut text = format!(
            "[[peer]]\nname = \"{}\"\npublic-key = \"{}\"\nallowed-ips = [{allowed}]\n",
            other.name, other.keys.public
        );
        if !endpoints.is_empty() {
            let _ = writeln!(text, "endpoints = {endpoints:?}");
        }
        self.section(&format!("{text}{more}\n"))
    }

    /// Any other text at the end; keys belong to the last section.
    pub fn section(mut self, text: &str) -> Self {
        self.rest.push_str(text);
        self
    }

    /// The file's text.
    pub fn text(&self, directory: &ScratchDir) -> String {
        let node = crate::program::node(directory, &self.name, &self.keys, &self.node);
        let (address, address6) = (&self.address, self.address6());
        let tun = format!("[tun]\nname = \"ana0\"\naddress = [\"{address}/24\", \"{address6}/64\"]\n");
        format!("{node}{tun}{}", self.rest)
    }
}

/// Drops for these reasons (for any, if none is named), on all cores; 0 before the gateway answers.
pub fn drops(gateway: &Gateway, reasons: &[&str]) -> u64 {
    let Some(report) = gateway.status() else { return 0 };
    let all = report.status.cores.iter().flat_map(|core| &core.drops);
    all.filter(|(name, _)| reasons.is_empty() || reasons.contains(&name.as_str()))
        .map(|(_, count)| count)
        .sum()
}

/// The first peer, as soon as the gateway answers.
pub fn peer(gateway: &Gateway) -> PeerStatus {
    wait_for("an answer of the gateway", PATIENCE, || gateway.status().is_some());
    gateway.status().unwrap().status.peers[0].clone()
}

/// Resident memory of a gateway, kB.
pub fn resident_kb(gateway: &Gateway) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", gateway.program.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches("kB").trim().parse().unwrap()
}

/// An address and a port.
pub fn socket(address: &str, port: u16) -> SocketAddr {
    SocketAddr::new(address.parse().unwrap(), port)
}

/// TCP streams for some seconds; every byte is verified. Gives the payload rate in Mbit/s.
pub fn tcp_seconds(from: &Node, to: &Node, address: &str, streams: usize, seconds: f64) -> f64 {
    let transfer = tcp_start(from, to, address, 5201, streams, seconds);
    tcp_finish(transfer)
}

/// Starts TCP streams to `address`, an address of `to`.
pub fn tcp_start(
    from: &Node,
    to: &Node,
    address: &str,
    port: u16,
    streams: usize,
    seconds: f64,
) -> tcp::Transfer {
    let options = tcp::Options::new(streams, Span::seconds(seconds));
    tcp::start(from, to, socket(address, port), options, &Stop::new()).unwrap()
}

/// Waits for the end; every stream must have arrived whole and unchanged.
pub fn tcp_finish(transfer: tcp::Transfer) -> f64 {
    let report = transfer.finish(|_| ()).unwrap();
    assert!(report.intact, "{:?}", report.faults);
    assert!(report.bytes_verified > 100_000, "{report:?}");
    report.goodput_mbps
}

/// UDP for some seconds: nothing damaged, nothing twice.
pub fn udp_seconds(from: &Node, to: &Node, address: &str, options: udp::Options) -> udp::Report {
    let report = udp::start(from, to, socket(address, 5202), options, &Stop::new()).unwrap();
    let report = report.finish(|_| ()).unwrap();
    assert_eq!((report.corrupt, report.duplicates), (0, 0), "{report:?}");
    assert!(report.received > 0, "{report:?}");
    report
}

/// Waits until something is true.
#[track_caller]
pub fn wait_for(what: &str, seconds: f64, mut is_true: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_true() {
        assert!(start.elapsed().as_secs_f64() < seconds, "not within {seconds} s: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The value that something has once it has stopped to change. Counters are shown up to 50 ms after what they count, later on a
/// loaded machine: who wants to see that nothing is added, or how much was, asks like this.
pub fn settled<T: PartialEq>(mut read: impl FnMut() -> T) -> T {
    const QUIET: Duration = Duration::from_millis(500);
    let end = Instant::now() + Duration::from_secs_f64(PATIENCE);
    let (mut value, mut since) = (read(), Instant::now());
    while since.elapsed() < QUIET && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(20));
        let next = read();
        if next != value {
            (value, since) = (next, Instant::now());
        }
    }
    value
}

/// A UDP socket of a place at an address and port.
#[track_caller]
pub fn udp_socket(place: &Node, address: impl ToSocketAddrs + Sync) -> UdpSocket {
    bound(place, || UdpSocket::bind(&address)).unwrap()
}

/// A listener of a place.
#[track_caller]
pub fn tcp_listener(place: &Node, address: impl ToSocketAddrs + Sync) -> TcpListener {
    bound(place, || TcpListener::bind(&address)).unwrap()
}

/// Binds at a place. A port that was just closed may still be taken: a program that another test starts has our descriptors
/// until it is executed.
fn bound<T: Send>(place: &Node, bind: impl Fn() -> std::io::Result<T> + Sync) -> std::io::Result<T> {
    let start = Instant::now();
    loop {
        match place.run(&bind).unwrap() {
            Err(error) if error.kind() == std::io::ErrorKind::AddrInUse && start.elapsed().as_secs() < 5 => {
                std::thread::sleep(Duration::from_millis(10));
            }
            result => return result,
        }
    }
}

/// Sends some bytes over TCP and gets them back.
#[track_caller]
pub fn echo(from: &Node, to: &Node, address: &str) {
    if let Err(error) = try_echo(from, to, address) {
        panic!("no echo from {address}: {error}");
    }
}

/// Sends some bytes over TCP and gets them back, or the error of either side.
pub fn try_echo(from: &Node, to: &Node, address: &str) -> std::io::Result<()> {
    const PATIENCE: Option<Duration> = Some(Duration::from_secs(20));
    let address = socket(address, 7);
    let listener = bound(to, || TcpListener::bind(address))?;
    let server = Background::start(move |end| -> std::io::Result<()> {
        listener.set_nonblocking(true)?;
        let (mut stream, _) = loop {
            match listener.accept() {
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    if end.load(Ordering::Relaxed) {
                        return Ok(());
                    }
                    std::thread::sleep(Duration::from_millis(5));
                }
                result => break result?,
            }
        };
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(PATIENCE)?;
        let mut buffer = vec![0; 100_000];
        stream.read_exact(&mut buffer)?;
        stream.write_all(&buffer)
    });
    let client = || -> std::io::Result<()> {
        let connect = || TcpStream::connect_timeout(&address, Duration::from_secs(20));
        let mut stream = from.run(connect).unwrap()?;
        stream.set_read_timeout(PATIENCE)?;
        let sent: Vec<u8> = (0..100_000u32).map(|number| (number * 7 % 251) as u8).collect();
        stream.write_all(&sent)?;
        let mut received = vec![0; sent.len()];
        stream.read_exact(&mut received)?;
        assert!(received == sent, "damaged");
        Ok(())
    };
    let result = client();
    server.finish()?;
    result
}

/// A thread that is asked to end, by a flag, when its owner goes.
pub struct Background<T> {
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<T>>,
}

impl<T: Send + 'static> Background<T> {
    /// Starts it; the flag becomes true when it shall end.
    pub fn start(work: impl FnOnce(&Arc<AtomicBool>) -> T + Send + 'static) -> Self {
        let end = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&end);
        Self { end, thread: Some(std::thread::spawn(move || work(&flag))) }
    }

    /// Asks it to end, and gives what it made.
    pub fn finish(mut self) -> T {
        self.end.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap()
    }
}

impl<T> Drop for Background<T> {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// An address as a node uses it on an interface, with its prefix length.
pub fn net(address: IpAddr, prefix: u8) -> ipnet::IpNet {
    ipnet::IpNet::new(address, prefix).unwrap()
}
