//! What the tests share: a scene of two sites, configurations, gateways, traffic.

use std::cell::RefCell;
use std::fmt::Write as _;
use std::io::{Read, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use control::status::PeerStatus;
use ring::digest::{Context, SHA256};
use testbed::link::Shape;
use testbed::program::ScratchDir;
use testbed::stop::Stop;
use testbed::topology::{LinkSpec, Node, Site, Testbed};
use testbed::traffic::pattern::Pattern;
use testbed::traffic::{Span, tcp, udp};

pub use crate::support::{Gateway, Keys, paths_up};

/// The branch inside the tunnel.
pub const BRANCH_IP: &str = "10.77.0.1";
/// The hub inside the tunnel.
pub const HUB_IP: &str = "10.77.0.2";
/// How long something may take that usually takes a second: the machine may be busy with other things.
pub const PATIENCE: f64 = 30.0;

/// Tests that fill the machine run one after the other.
pub fn alone() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    LOCK.lock().unwrap_or_else(PoisonError::into_inner)
}

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
        let node = crate::support::node(directory, &self.name, &self.keys, &self.node);
        let (address, address6) = (&self.address, self.address6());
        let tun = format!("[tun]\nname = \"ana0\"\naddress = [\"{address}/24\", \"{address6}/64\"]\n");
        format!("{node}{tun}{}", self.rest)
    }
}

/// What was dropped for these reasons (for any, if none is named), on all cores; 0 before the gateway answers.
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

fn socket(address: &str, port: u16) -> SocketAddr {
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

/// A small web server that gives everybody the same file. It ends when dropped.
pub struct WebServer {
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    /// SHA-256 of the file.
    pub digest: Vec<u8>,
    /// Size of the file.
    pub bytes: u64,
    address: SocketAddr,
}

impl WebServer {
    pub fn start(place: &Node, address: &str, bytes: u64) -> Self {
        let address = socket(address, 80);
        let listener = place.run(|| TcpListener::bind(address)).unwrap().unwrap();
        listener.set_nonblocking(true).unwrap();
        let end = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&end);
        let thread = std::thread::spawn(move || {
            while !flag.load(Ordering::Relaxed) {
                match listener.accept() {
                    // A client that goes away early is its own affair: it notices that bytes are missing.
                    Ok((stream, _)) => drop(std::thread::spawn(move || serve(stream, bytes))),
                    Err(_) => std::thread::sleep(Duration::from_millis(20)),
                }
            }
        });
        let mut context = Context::new(&SHA256);
        body(bytes, |block| {
            context.update(block);
            Ok(())
        })
        .unwrap();
        Self { end, thread: Some(thread), digest: context.finish().as_ref().to_vec(), bytes, address }
    }

    /// Starts to fetch the file with `curl`, or by ourselves where there is none.
    pub fn fetch(&self, from: &Node) -> Download {
        let mut command = Command::new("curl");
        command.args(["--silent", "--show-error", "--fail", "--max-time", "180"]);
        command.arg(format!("http://{}/file", self.address));
        command.stdout(Stdio::piped());
        from.prepare(&mut command).unwrap();
        let (received, address) = (Arc::new(AtomicU64::new(0)), self.address);
        let (child, input): (_, Box<dyn Read + Send>) = match command.spawn() {
            Ok(mut child) => {
                let output = child.stdout.take().unwrap();
                (Some(child), Box::new(output))
            }
            Err(error) => {
                assert_eq!(error.kind(), std::io::ErrorKind::NotFound, "curl: {error}");
                (None, Box::new(from.run(|| get(address)).unwrap()))
            }
        };
        let counter = Arc::clone(&received);
        let thread = std::thread::spawn(move || hash(input, &counter));
        Download { child, received, thread, bytes: self.bytes, digest: self.digest.clone() }
    }
}

impl Drop for WebServer {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        let _ = self.thread.take().unwrap().join();
    }
}

fn body(bytes: u64, mut take: impl FnMut(&[u8]) -> std::io::Result<()>) -> std::io::Result<()> {
    let (mut pattern, mut left) = (Pattern::new(7), bytes);
    while left > 0 {
        let block = pattern.next_block();
        let part = block.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        take(&block[..part])?;
        left -= part as u64;
    }
    Ok(())
}

fn serve(mut stream: TcpStream, bytes: u64) {
    let mut request = [0; 4096];
    let mut length = 0;
    while !request[..length].windows(4).any(|end| end == b"\r\n\r\n") {
        match stream.read(&mut request[length..]) {
            Ok(read) if read > 0 => length += read,
            _ => return,
        }
    }
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {bytes}\r\nConnection: close\r\n\r\n");
    let _ = stream.write_all(head.as_bytes()).and_then(|()| body(bytes, |block| stream.write_all(block)));
}

/// A request without `curl`; the answer's head is read.
fn get(address: SocketAddr) -> TcpStream {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(20)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    stream.write_all(b"GET /file HTTP/1.0\r\n\r\n").unwrap();
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
    stream
}

fn hash(mut input: Box<dyn Read + Send>, counter: &AtomicU64) -> (u64, Vec<u8>) {
    let mut context = Context::new(&SHA256);
    let mut buffer = vec![0; 1 << 16];
    while let Ok(read) = input.read(&mut buffer) {
        if read == 0 {
            break;
        }
        context.update(&buffer[..read]);
        counter.fetch_add(read as u64, Ordering::Relaxed);
    }
    (counter.load(Ordering::Relaxed), context.finish().as_ref().to_vec())
}

/// A file on its way.
pub struct Download {
    child: Option<std::process::Child>,
    received: Arc<AtomicU64>,
    thread: JoinHandle<(u64, Vec<u8>)>,
    bytes: u64,
    digest: Vec<u8>,
}

impl Download {
    /// Waits until so many megabytes have arrived.
    #[track_caller]
    pub fn wait_megabytes(&self, megabytes: u64) {
        let what = format!("{megabytes} MB of the file");
        wait_for(&what, 60.0, || self.received.load(Ordering::Relaxed) >= megabytes * 1_000_000);
    }

    /// Waits for the end; the file must be whole and unchanged.
    #[track_caller]
    pub fn finish(self) {
        let (bytes, digest) = self.thread.join().unwrap();
        if let Some(mut child) = self.child {
            let status = child.wait().unwrap();
            assert!(status.success(), "curl: {status} after {bytes} bytes");
        }
        assert_eq!(bytes, self.bytes, "bytes of the file");
        assert_eq!(digest, self.digest, "SHA-256 of the file");
    }
}

/// Sends some bytes over TCP and gets them back.
#[track_caller]
pub fn echo(from: &Node, to: &Node, address: &str) {
    let address = socket(address, 7);
    let listener = to.run(|| TcpListener::bind(address)).unwrap().unwrap();
    let server = std::thread::spawn(move || -> std::io::Result<()> {
        let (mut stream, _) = listener.accept()?;
        let mut buffer = vec![0; 50_000];
        stream.read_exact(&mut buffer)?;
        stream.write_all(&buffer)
    });
    let connect = || TcpStream::connect_timeout(&address, Duration::from_secs(20));
    let mut stream = from.run(connect).unwrap().unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let sent: Vec<u8> = (0..50_000u32).map(|number| (number * 7 % 251) as u8).collect();
    stream.write_all(&sent).unwrap();
    let mut received = vec![0; sent.len()];
    stream.read_exact(&mut received).unwrap();
    assert!(received == sent, "damaged");
    server.join().unwrap().unwrap();
}

/// An address as a node uses it on an interface, with its prefix length.
pub fn net(address: IpAddr, prefix: u8) -> ipnet::IpNet {
    ipnet::IpNet::new(address, prefix).unwrap()
}
