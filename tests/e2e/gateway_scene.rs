//! Helpers of the gateway's tests: a gateway with local networks, servers that tell what they see, clients.

use std::io::{BufRead, BufReader, Read, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use control::protocol::FlowFilter;
use control::protocol::{Request, Response};
use control::status::{Explanation, FlowList, ServicesStatus};
use linux::netns::set_sysctl;
use testbed::topology::{Host, Node, Site};

use crate::scene::*;

/// A rule set that lets everything through, and cores that keep their work, so that each packet's core can be foretold.
pub const ALLOW: &str = "[gateway]\ndefault-action = \"allow\"\ncore-rebalance = false\n";

/// A gateway with so many networks, and a host in each. Device `lanN` of the gateway, N from 1, has 10.1.N.1/24 and
/// fd00:1:N::1/64; the host is number 2 there, on its device `eth0`.
pub struct Lans {
    pub scene: Scene,
    pub hosts: Vec<Host>,
}

impl Lans {
    /// The kernel of the gateway forwards nothing by itself: what gets through went through the program.
    pub fn new(networks: usize) -> Self {
        let mut scene = Scene::new(&[link(1_000.0, 0.1)]);
        let hosts = (0..networks).map(|_| scene.testbed.add_host(Site::A).unwrap()).collect();
        let lans = Self { scene, hosts };
        lans.gateway().run(no_kernel_forwarding).unwrap();
        lans
    }

    pub fn gateway(&self) -> &Node {
        self.scene.a()
    }

    /// The host of network `number`, counted from 1.
    pub fn host(&self, number: usize) -> &Node {
        &self.hosts[number - 1].node
    }

    /// The whole configuration: a plain interface for each network, and these sections.
    pub fn text(&self, sections: &str) -> String {
        let directory = self.scene.directory.path().display();
        let mut text = format!(
            "[node]\nname = \"gw\"\nstate-dir = \"{directory}/state\"\ncontrol-socket = \"{directory}/gw.sock\"\n"
        );
        for number in 1..=self.hosts.len() {
            if !sections.contains(&format!("device = \"lan{number}\"")) {
                text.push_str(&format!("[[interface]]\nname = \"lan{number}\"\n"));
            }
        }
        text + sections
    }

    /// Starts the gateway and waits until its interfaces are up.
    pub fn start(&self, sections: &str) -> Running {
        let text = self.text(sections);
        let mut gateway = Gateway::start(self.gateway(), &self.scene.directory, "gw", &text);
        ready(&mut gateway);
        Running(gateway)
    }

    /// Applies other sections to the running gateway; exit code and output.
    pub fn reload(&self, gateway: &Gateway, sections: &str) -> (i32, String) {
        std::fs::write(&gateway.config, self.text(sections)).unwrap();
        gateway.command(&["reload"])
    }

    /// The host of this network has no route but to its own network.
    pub fn no_default_route(&self, number: usize) {
        shell(self.host(number), "ip route del default && ip -6 route del default");
    }
}

/// A running gateway that shows its state when a test fails.
pub struct Running(Gateway);

impl std::ops::Deref for Running {
    type Target = Gateway;

    fn deref(&self) -> &Gateway {
        &self.0
    }
}

impl std::ops::DerefMut for Running {
    fn deref_mut(&mut self) -> &mut Gateway {
        &mut self.0
    }
}

impl Running {
    /// One that is up.
    pub fn of(gateway: Gateway) -> Self {
        Self(gateway)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let (_, status) = self.command(&["status"]);
            let (_, flows) = self.command(&["status", "--flows", "--limit", "40"]);
            eprintln!("{status}\n{flows}");
        }
    }
}

fn no_kernel_forwarding() {
    set_sysctl("net.ipv4.ip_forward", "0").unwrap();
    set_sysctl("net.ipv6.conf.all.forwarding", "0").unwrap();
}

/// Waits until all interfaces of a gateway are up.
#[track_caller]
pub fn ready(gateway: &mut Gateway) {
    gateway.wait("interfaces up", PATIENCE, |report| {
        let services = report.gateway.as_ref();
        services.is_some_and(|all| {
            !all.interfaces.is_empty() && all.interfaces.iter().all(|interface| interface.state == "up")
        })
    });
}

/// Live state of everything that is not the tunnel.
#[track_caller]
pub fn services(gateway: &Gateway) -> ServicesStatus {
    wait_for("an answer of the gateway", PATIENCE, || gateway.status().is_some());
    gateway.status().unwrap().gateway.unwrap()
}

/// Drops of this reason, on all cores.
pub fn dropped(gateway: &Gateway, reason: &str) -> u64 {
    services(gateway).drops.get(reason).copied().unwrap_or(0)
}

/// Packets that cores handed to the owner of their flow, once all of them are counted.
pub fn handed_over(gateway: &Gateway) -> u64 {
    settled(|| services(gateway).handed_off_packets)
}

/// Flows that began, on all cores, as far as they are counted.
pub fn new_flows(gateway: &Gateway) -> u64 {
    services(gateway).cores.iter().map(|core| core.new_flows).sum()
}

/// Flows that match these words, as `status --flows --match` gives them.
#[track_caller]
pub fn flows(gateway: &Gateway, words: &str) -> FlowList {
    let filter: FlowFilter = words.parse().unwrap();
    let answer = ask(gateway, Request::Flows { filter, limit: 10_000 });
    answer.flows.unwrap()
}

/// The answer of `explain`.
#[track_caller]
pub fn explain(gateway: &Gateway, packet: &str) -> Explanation {
    let answer = ask(gateway, Request::Explain { packet: packet.to_owned(), interface: None });
    *answer.explanation.unwrap()
}

#[track_caller]
fn ask(gateway: &Gateway, request: Request) -> Response {
    let answer = gateway.call(request).unwrap();
    assert!(answer.ok, "{answer:?}");
    answer
}

/// Rows C2, C3: every reply came to the core of its request, and nothing had to be handed over.
#[track_caller]
pub fn no_reply_went_astray(gateway: &Gateway) {
    let astray = settled(|| services(gateway).replies_on_wrong_core_packets);
    assert_eq!(astray, 0, "{:?}", services(gateway));
}

/// Runs a shell command in a node; it must succeed. Its output.
#[track_caller]
pub fn shell(place: &Node, command: &str) -> String {
    match try_shell(place, command) {
        Ok(text) => text,
        Err(error) => panic!("{error}"),
    }
}

/// Runs a shell command in a node: its output, or what went wrong.
pub fn try_shell(place: &Node, command: &str) -> Result<String, String> {
    let mut shell = Command::new("sh");
    shell.args(["-c", command]);
    place.output(shell).map_err(|error| format!("{error:#}"))
}

fn address(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// A server's answer: its name, and who the client is for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    pub name: String,
    pub source: SocketAddr,
}

impl Answer {
    fn parse(text: &str) -> Option<Self> {
        let (name, rest) = text.split_once(' ')?;
        let source = rest.lines().next()?.trim().parse().ok()?;
        Some(Self { name: name.to_owned(), source })
    }
}

/// A server that tells each client its own name and the address that it sees, on TCP (in HTTP if asked so) and UDP. Then it
/// sends back what it gets. It ends when dropped.
pub struct Mirror {
    _udp: Background<()>,
    _tcp: Background<()>,
}

impl Mirror {
    pub fn start(place: &Node, name: &str, listen: &str) -> Self {
        let listen = address(listen);
        // What another server has just left may still be in the kernel.
        let listener = tcp_listener(place, listen);
        let socket = udp_socket(place, listen);
        listener.set_nonblocking(true).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        let name = name.to_owned();
        let udp = {
            let name = name.clone();
            Background::start(move |end| mirror_udp(&socket, &name, end))
        };
        let tcp = Background::start(move |end| {
            while !end.load(Ordering::Relaxed) {
                let Ok((stream, source)) = listener.accept() else {
                    std::thread::sleep(Duration::from_millis(5));
                    continue;
                };
                let (name, end) = (name.clone(), Arc::clone(end));
                // A client that goes away is its own affair.
                std::thread::spawn(move || drop(mirror_tcp(stream, source, &name, &end)));
            }
        });
        Self { _udp: udp, _tcp: tcp }
    }
}

fn mirror_udp(socket: &UdpSocket, name: &str, end: &AtomicBool) {
    let mut buffer = vec![0; 65_536];
    while !end.load(Ordering::Relaxed) {
        let Ok((bytes, source)) = socket.recv_from(&mut buffer) else { continue };
        let mut answer = format!("{name} {source}\n").into_bytes();
        answer.extend_from_slice(&buffer[..bytes]);
        let _ = socket.send_to(&answer, source);
    }
}

fn mirror_tcp(
    mut stream: TcpStream,
    source: SocketAddr,
    name: &str,
    end: &AtomicBool,
) -> std::io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_millis(100)))?;
    let mut buffer = vec![0; 65_536];
    let mut first = true;
    while !end.load(Ordering::Relaxed) {
        let bytes = match stream.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => continue,
            Err(error) => return Err(error),
        };
        if first && buffer[..bytes].starts_with(b"GET ") {
            let body = format!("{name} {source}\n");
            let head =
                format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
            return stream.write_all((head + &body).as_bytes());
        }
        if first {
            stream.write_all(format!("{name} {source}\n").as_bytes())?;
        }
        first = false;
        stream.write_all(&buffer[..bytes])?;
    }
    Ok(())
}

/// A TCP connection to a [`Mirror`] that stays.
pub struct Talk {
    stream: BufReader<TcpStream>,
    pub local: SocketAddr,
    pub answer: Answer,
}

impl Talk {
    /// Connects from a node. Every read waits 20 s at most.
    pub fn open(from: &Node, to: &str) -> std::io::Result<Self> {
        let to = address(to);
        let connect = || TcpStream::connect_timeout(&to, Duration::from_secs(20));
        let stream = from.run(connect).unwrap()?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        let local = stream.local_addr()?;
        let mut stream = BufReader::new(stream);
        stream.get_mut().write_all(b"who\n")?;
        let (mut line, mut echo) = (String::new(), String::new());
        stream.read_line(&mut line)?;
        stream.read_line(&mut echo)?;
        let answer = Answer::parse(&line).filter(|_| echo == "who\n");
        let answer =
            answer.ok_or_else(|| std::io::Error::other(format!("a strange answer: {line}{echo}")))?;
        Ok(Self { stream, local, answer })
    }

    /// Waits for something from the server without saying anything.
    pub fn wait(&mut self) -> std::io::Result<usize> {
        self.stream.read(&mut [0; 16])
    }

    /// Sends so many bytes; they must come back.
    pub fn echo(&mut self, bytes: usize) -> std::io::Result<()> {
        let sent: Vec<u8> = (0..bytes).map(|number| (number * 7 % 251) as u8).collect();
        let mut received = vec![0; bytes];
        // More than the buffers on the way hold would block both ends.
        for (sent, received) in sent.chunks(16_384).zip(received.chunks_mut(16_384)) {
            self.stream.get_mut().write_all(sent)?;
            self.stream.read_exact(received)?;
        }
        if sent == received { Ok(()) } else { Err(std::io::Error::other("damaged")) }
    }
}

/// Asks a [`Mirror`] once over TCP.
#[track_caller]
pub fn ask_tcp(from: &Node, to: &str) -> Answer {
    match Talk::open(from, to) {
        Ok(talk) => talk.answer,
        Err(error) => panic!("TCP from {} to {to}: {error}", from.name()),
    }
}

/// A UDP client with one socket, so one flow a server.
pub struct UdpClient(UdpSocket);

impl UdpClient {
    pub fn new(from: &Node, local: &str) -> Self {
        let local = address(local);
        let socket = udp_socket(from, local);
        socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        Self(socket)
    }

    pub fn local(&self) -> SocketAddr {
        self.0.local_addr().unwrap()
    }

    /// Sends so many bytes to a [`Mirror`] and waits half a second for them and its answer.
    pub fn try_ask(&self, to: &str, bytes: usize) -> Option<Answer> {
        static NUMBER: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let mut sent = number.to_be_bytes().to_vec();
        sent.extend((8..bytes).map(|place| (place * 13 % 241) as u8));
        self.0.send_to(&sent, address(to)).ok()?;
        let mut buffer = vec![0; 65_536];
        loop {
            let (bytes, _) = self.0.recv_from(&mut buffer).ok()?;
            let end = buffer[..bytes].iter().position(|byte| *byte == b'\n')?;
            // An answer to an earlier question is late.
            if buffer[end + 1..bytes] == sent[..] {
                return Answer::parse(&String::from_utf8_lossy(&buffer[..=end]));
            }
        }
    }

    /// The same, as often as it takes.
    #[track_caller]
    pub fn ask(&self, to: &str, bytes: usize) -> Answer {
        let mut answer = None;
        wait_for(&format!("an answer of {to} to {bytes} bytes over UDP"), PATIENCE, || {
            answer = self.try_ask(to, bytes);
            answer.is_some()
        });
        answer.unwrap()
    }
}

/// Asks a [`Mirror`] once over UDP, from a new port.
#[track_caller]
pub fn ask_udp(from: &Node, to: &str) -> Answer {
    let local = if to.starts_with('[') { "[::]:0" } else { "0.0.0.0:0" };
    UdpClient::new(from, local).ask(to, 64)
}

/// Fetches the page of a [`Mirror`] with curl.
pub fn curl(from: &Node, to: &str) -> Result<Answer, String> {
    curl_for(from, to, 20)
}

/// The same, waiting so many seconds at most.
pub fn curl_for(from: &Node, to: &str, seconds: u32) -> Result<Answer, String> {
    let text = try_shell(
        from,
        &format!("curl --silent --show-error --fail --globoff --max-time {seconds} 'http://{to}/'"),
    )?;
    Answer::parse(&text).ok_or(text)
}

/// `ping` with these arguments; every request must be answered.
#[track_caller]
pub fn ping(from: &Node, arguments: &str) -> String {
    let text = shell(from, &format!("ping -n -i 0.2 -W 10 {arguments}"));
    assert!(text.contains(" 0% packet loss"), "{text}");
    text
}

/// The address of a [`Mirror`] in the network of this number.
pub fn host_ip(number: usize) -> IpAddr {
    format!("10.1.{number}.2").parse().unwrap()
}

/// The gateway's address in the network of this number.
pub fn gateway_ip(number: usize) -> IpAddr {
    format!("10.1.{number}.1").parse().unwrap()
}

impl UdpClient {
    /// Sends one datagram, expecting nothing.
    pub fn send(&self, to: SocketAddr) {
        let _ = self.0.send_to(b"hello", to);
    }

    /// Whether a datagram of this sender arrives.
    pub fn receives_from(&self, sender: SocketAddr) -> bool {
        let mut buffer = [0; 2_048];
        for _ in 0..20 {
            if self.0.recv_from(&mut buffer).is_ok_and(|(_, source)| source == sender) {
                return true;
            }
        }
        false
    }

    /// Whether the kernel learns that nobody listens there.
    pub fn is_refused(&self, to: &str) -> bool {
        self.0.connect(address(to)).unwrap();
        let _ = self.0.send(b"hello");
        let answer = self.0.recv(&mut [0; 64]);
        answer.is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused)
    }
}

/// TCP connections to a [`Mirror`] that are busy until told to stop.
pub struct Bulk(Vec<Background<std::io::Result<u64>>>);

impl Bulk {
    /// Opens so many connections.
    #[track_caller]
    pub fn start(from: &Node, to: &str, connections: usize) -> Self {
        Self::run((0..connections).map(|_| Talk::open(from, to).unwrap()).collect())
    }

    /// Keeps these connections busy.
    pub fn run(talks: Vec<Talk>) -> Self {
        let busy = |mut talk: Talk| {
            Background::start(move |end| {
                let mut bytes = 0;
                while !end.load(Ordering::Relaxed) {
                    talk.echo(64 * 1024)?;
                    bytes += 64 * 1024;
                }
                Ok(bytes)
            })
        };
        Self(talks.into_iter().map(busy).collect())
    }

    /// Ends them; each must have carried data, and none may have broken.
    #[track_caller]
    pub fn finish(self) {
        for thread in self.0 {
            let bytes = thread.finish();
            assert!(bytes.as_ref().is_ok_and(|bytes| *bytes > 0), "a connection broke: {bytes:?}");
        }
    }
}
