//! Real clients and servers that are sent through a gateway: ssh, FTP, DNS, iperf3, a route tracer.

use std::io::{BufRead, BufReader, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rustix::net::{AddressFamily, RecvFlags, SocketType, ipproto, recv, socket};
use testbed::program::{Program, ScratchDir};
use testbed::topology::Node;

use crate::gateway_scene::*;
use crate::scene::*;

/// A real `sshd` with a key of its own, and a client key that it accepts.
pub struct Ssh {
    directory: ScratchDir,
    /// Where clients connect.
    pub port: u16,
    _server: Program,
}

impl Ssh {
    /// Starts it on all addresses of a node.
    pub fn start(place: &Node, port: u16) -> Self {
        let directory = ScratchDir::new("anabranch-ssh").unwrap();
        let path = directory.path().display().to_string();
        for key in ["host", "client"] {
            shell(place, &format!("ssh-keygen -q -t ed25519 -N '' -f {path}/{key}"));
        }
        // Where sshd separates privileges; a freshly installed one has it only after its service was started.
        shell(place, "mkdir -p /run/sshd");
        let config = format!(
            "Port {port}\nHostKey {path}/host\nAuthorizedKeysFile {path}/client.pub\nPidFile none\nUsePAM no\n\
             StrictModes no\nPasswordAuthentication no\nPermitRootLogin yes\n"
        );
        directory.write("sshd.conf", config).unwrap();
        let program = shell(place, "command -v /usr/sbin/sshd || command -v sshd");
        let mut command = Command::new(program.trim());
        command.args(["-D", "-e", "-f", &format!("{path}/sshd.conf")]);
        let log = directory.path().join("sshd.log");
        let server = place.start(command, Some(&log)).unwrap();
        wait_for("sshd", PATIENCE, || place.run(|| TcpStream::connect(("127.0.0.1", port)).is_ok()).unwrap());
        Self { directory, port, _server: server }
    }

    fn command(&self, host: &str, remote: &str) -> Command {
        let path = self.directory.path().display();
        let mut command = Command::new("ssh");
        command.args(["-F", "/dev/null", "-i", &format!("{path}/client"), "-p", &self.port.to_string()]);
        for option in
            ["BatchMode=yes", "StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "ConnectTimeout=20"]
        {
            command.args(["-o", option]);
        }
        command.args(["-o", "LogLevel=ERROR", &format!("root@{host}"), remote]);
        command
    }

    /// Runs a command over ssh; its output.
    #[track_caller]
    pub fn run(&self, from: &Node, host: &str, remote: &str) -> String {
        match from.output(self.command(host, remote)) {
            Ok(text) => text,
            Err(error) => {
                panic!("{error:#}\n{:?}", std::fs::read_to_string(self.directory.path().join("sshd.log")))
            }
        }
    }

    /// A session that stays open: what is written comes back.
    pub fn session(&self, from: &Node, host: &str) -> SshSession {
        let mut command = self.command(host, "exec cat");
        command.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
        from.prepare(&mut command).unwrap();
        let mut child = command.spawn().unwrap();
        let input = child.stdin.take().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let mut session = SshSession { child, input, output };
        session.echo("first");
        session
    }
}

/// An open ssh session; ended when dropped.
pub struct SshSession {
    child: std::process::Child,
    input: std::process::ChildStdin,
    output: BufReader<std::process::ChildStdout>,
}

impl SshSession {
    /// Sends a line and waits until it comes back.
    #[track_caller]
    pub fn echo(&mut self, word: &str) {
        writeln!(self.input, "{word}").unwrap();
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        assert_eq!(line.trim(), word, "the ssh session broke");
    }
}

impl Drop for SshSession {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A small FTP server with passive mode only (RFC 959, RFC 2428): everybody gets the same file. It ends when dropped.
pub struct Ftp {
    _thread: Background<()>,
}

/// One line of the file on the FTP server.
const FTP_LINE: &str = "passive mode works\n";
/// How often.
const FTP_LINES: usize = 20_000;

impl Ftp {
    pub fn start(place: &Node, listen: &str) -> Self {
        let listen: SocketAddr = listen.parse().unwrap();
        let listener = tcp_listener(place, listen);
        listener.set_nonblocking(true).unwrap();
        let place = place.clone();
        let thread = Background::start(move |end| {
            while !end.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok((stream, _)) => {
                        let place = place.clone();
                        std::thread::spawn(move || drop(ftp_session(&stream, &place)));
                    }
                    Err(_) => std::thread::sleep(Duration::from_millis(10)),
                }
            }
        });
        Self { _thread: thread }
    }

    /// Fetches the file with curl; it must be whole. `arguments`: for example `--disable-epsv`.
    #[track_caller]
    pub fn fetch(&self, from: &Node, server: &str, arguments: &str) {
        let text = shell(
            from,
            &format!("curl --silent --show-error --max-time 30 {arguments} 'ftp://{server}/file'"),
        );
        assert!(text == FTP_LINE.repeat(FTP_LINES), "{} bytes came over FTP", text.len());
    }
}

fn ftp_session(stream: &TcpStream, place: &Node) -> std::io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    let local = stream.local_addr()?.ip();
    let mut lines = BufReader::new(stream.try_clone()?);
    let say = |text: String| {
        let mut stream = stream;
        stream.write_all(format!("{text}\r\n").as_bytes())
    };
    say("220 ready".to_owned())?;
    let mut data: Option<TcpListener> = None;
    let mut line = String::new();
    while lines.read_line(&mut line)? > 0 {
        let verb = line.split_whitespace().next().unwrap_or("").to_uppercase();
        line.clear();
        match verb.as_str() {
            "USER" => say("331 any password".to_owned())?,
            "PASS" => say("230 welcome".to_owned())?,
            "PWD" => say("257 \"/\"".to_owned())?,
            "TYPE" | "CWD" | "NOOP" => say("200 fine".to_owned())?,
            "SIZE" => say(format!("213 {}", FTP_LINE.len() * FTP_LINES))?,
            "EPSV" | "PASV" => {
                let listener =
                    place.run(|| TcpListener::bind((local, 0))).map_err(std::io::Error::other)??;
                let port = listener.local_addr()?.port();
                data = Some(listener);
                say(match (verb.as_str(), local) {
                    ("PASV", IpAddr::V4(ip)) => {
                        let [a, b, c, d] = ip.octets();
                        format!("227 Entering Passive Mode ({a},{b},{c},{d},{},{})", port >> 8, port & 0xff)
                    }
                    _ => format!("229 Entering Extended Passive Mode (|||{port}|)"),
                })?;
            }
            "RETR" => {
                let Some(listener) = data.take() else { return say("425 no data connection".to_owned()) };
                say("150 here it comes".to_owned())?;
                let (mut sink, _) = listener.accept()?;
                sink.write_all(FTP_LINE.repeat(FTP_LINES).as_bytes())?;
                drop(sink);
                say("226 done".to_owned())?;
            }
            "QUIT" => return say("221 bye".to_owned()),
            _ => say("502 not here".to_owned())?,
        }
    }
    Ok(())
}

/// dnsmasq that knows `name.test` as 192.0.2.55 and a text of more than one datagram; ended when dropped.
pub struct Dns {
    _directory: ScratchDir,
    _server: Program,
}

impl Dns {
    pub fn start(place: &Node, listen: IpAddr) -> Self {
        let directory = ScratchDir::new("anabranch-dns").unwrap();
        let program = shell(place, "command -v /usr/sbin/dnsmasq || command -v dnsmasq");
        let mut command = Command::new(program.trim());
        command.args(["--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts"]);
        command.args(["--user=root", "--pid-file=", "--log-facility=-", "--bind-interfaces"]);
        command.args(["--address=/name.test/192.0.2.55", &format!("--listen-address={listen}")]);
        let log = directory.path().join("dnsmasq.log");
        let server = place.start(command, Some(&log)).unwrap();
        wait_for("dnsmasq", PATIENCE, || place.run(|| TcpStream::connect((listen, 53)).is_ok()).unwrap());
        Self { _directory: directory, _server: server }
    }
}

/// Asks a name server for `name.test` over UDP and TCP; both must give 192.0.2.55 (RFC 1035 §4).
#[track_caller]
pub fn resolve(from: &Node, server: &str) {
    resolve_udp(from, server);
    let to: SocketAddr = format!("{server}:53").parse().unwrap();
    let mut stream = from.run(|| TcpStream::connect_timeout(&to, Duration::from_secs(20))).unwrap().unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut framed = (QUESTION.len() as u16).to_be_bytes().to_vec();
    framed.extend_from_slice(QUESTION);
    stream.write_all(&framed).unwrap();
    let mut length = [0; 2];
    stream.read_exact(&mut length).unwrap();
    let mut answer = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut answer).unwrap();
    assert!(is_good(&answer), "{answer:?}");
}

const QUESTION: &[u8] = b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x04name\x04test\0\0\x01\0\x01";

fn is_good(answer: &[u8]) -> bool {
    answer.starts_with(b"\x12\x34") && answer.ends_with(&[0, 4, 192, 0, 2, 55])
}

/// The same over UDP only.
#[track_caller]
pub fn resolve_udp(from: &Node, server: &str) {
    let to: SocketAddr = format!("{server}:53").parse().unwrap();
    let client = udp_socket(from, (Ipv4Addr::UNSPECIFIED, 0));
    client.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    let mut buffer = [0; 512];
    wait_for("an answer of the name server", PATIENCE, || {
        client.send_to(QUESTION, to).unwrap();
        client.recv(&mut buffer).is_ok_and(|bytes| is_good(&buffer[..bytes]))
    });
}

/// One second of iperf3 with these arguments; both ends must agree that data has arrived.
#[track_caller]
pub fn iperf3(from: &Node, to: &Node, server: &str, arguments: &str) {
    let mut command = Command::new("iperf3");
    command.args(["--server", "--one-off", "--port", "5300"]);
    let directory = ScratchDir::new("anabranch-iperf3").unwrap();
    let _server = to.start(command, Some(&directory.path().join("log"))).unwrap();
    wait_for("iperf3", PATIENCE, || shell(to, "ss -Hltn sport = :5300").contains("5300"));
    let text = shell(from, &format!("iperf3 --client {server} --port 5300 --time 1 --json {arguments}"));
    let report: serde_json::Value = serde_json::from_str(&text).unwrap();
    let end = &report["end"];
    let bytes = end["sum_received"]["bytes"].as_u64().or(end["sum"]["bytes"].as_u64());
    assert!(bytes.is_some_and(|bytes| bytes > 10_000), "{text}");
}

/// Who is at each step on the way to `to`: UDP with a growing time to live, as `traceroute` does it.
pub fn trace(from: &Node, to: Ipv4Addr) -> Vec<Ipv4Addr> {
    let mut hops = Vec::new();
    for ttl in 1..=8u8 {
        let hop = trace_step(from, to, ttl);
        hops.push(hop);
        if hop == to {
            break;
        }
    }
    hops
}

/// The sender of the ICMP error for a datagram with this time to live; 0.0.0.0 if there is none.
fn trace_step(from: &Node, to: Ipv4Addr, ttl: u8) -> Ipv4Addr {
    let (errors, probe) = from
        .run(|| {
            let errors = socket(AddressFamily::INET, SocketType::RAW, Some(ipproto::ICMP)).unwrap();
            rustix::net::sockopt::set_socket_timeout(
                &errors,
                rustix::net::sockopt::Timeout::Recv,
                Some(Duration::from_millis(500)),
            )
            .unwrap();
            (errors, UdpSocket::bind("0.0.0.0:0").unwrap())
        })
        .unwrap();
    probe.set_ttl(u32::from(ttl)).unwrap();
    let port = probe.local_addr().unwrap().port();
    let mut buffer = [0u8; 1500];
    for _ in 0..20 {
        probe.send_to(b"where are you", (to, 33_434)).unwrap_or(0);
        while let Ok((bytes, _)) = recv(&errors, &mut buffer[..], RecvFlags::empty()) {
            let packet = &buffer[..bytes];
            // Outer header 20, ICMP 8, quoted header 20, quoted UDP 8: the quote must be about our own datagram.
            let Some(quote) = packet.get(28..56) else { continue };
            let own = quote[16..20] == to.octets() && quote[20..22] == port.to_be_bytes();
            if own && matches!(packet[20], 3 | 11) {
                return Ipv4Addr::new(packet[12], packet[13], packet[14], packet[15]);
            }
        }
    }
    Ipv4Addr::UNSPECIFIED
}
