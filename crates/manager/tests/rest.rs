//! The manager as its callers see it: REST over TCP, units over TCP and UDP on loopback.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU16, Ordering::Relaxed};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use cluster::message::{Frames, Hello, Message, Phase, Refusal, Role};
use manager::api::Document;
use manager::config::Config;
use utoipa::OpenApi as _;

const TOKEN: &str = "0123456789abcdef";

/// A manager in this process, and its folder.
struct Running {
    api: SocketAddr,
    bus: SocketAddr,
    folder: PathBuf,
}

fn folder() -> PathBuf {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let name = format!("anabranch-manager-{}-{}", std::process::id(), NEXT.fetch_add(1, Relaxed));
    let folder = std::env::temp_dir().join(name);
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("token"), TOKEN).unwrap();
    folder
}

/// A port of loopback that is free for TCP and UDP.
fn free_port() -> u16 {
    let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    socket.local_addr().unwrap().port()
}

/// Runs until the process ends: every test has a manager of its own.
fn start(more: &str) -> Running {
    let folder = folder();
    let bus: SocketAddr = format!("127.0.0.1:{}", free_port()).parse().unwrap();
    let text = format!(
        "[manager]\nbus = \"{bus}\"\napi = \"127.0.0.1:0\"\ntoken-file = \"token\"\nstore = \"cluster.redb\"\n{more}"
    );
    let config = Config::parse(&text, &folder).unwrap();
    let (ready, address) = channel();
    std::thread::spawn(move || {
        manager::run(&config, |api| ready.send(api).unwrap()).unwrap();
    });
    let api = address.recv_timeout(Duration::from_secs(10)).unwrap();
    Running { api, bus, folder }
}

impl Running {
    /// Status and body of an answer.
    fn call(&self, method: &str, path: &str, body: &str, token: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(self.api).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: manager\r\nAuthorization: Bearer {token}\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\nConnection: close\r\n\r\n{body}",
            body.len()
        )
        .unwrap();
        let mut text = String::new();
        // A body that is too long may be cut off before it is read.
        let _ = stream.read_to_string(&mut text);
        let status = text.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
        (status, text.split_once("\r\n\r\n").map_or(String::new(), |(_, body)| body.to_owned()))
    }

    fn post(&self, path: &str, body: &str) -> (u16, String) {
        self.call("POST", path, body, TOKEN)
    }

    fn unit(&self, node: u16, role: Role) -> Unit {
        let stream = TcpStream::connect(self.bus).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let mut unit = Unit { stream, frames: Frames::default() };
        unit.send(&Message::Hello(Hello { node, role, weight: 1, instance: 7, held: None }));
        unit
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

struct Unit {
    stream: TcpStream,
    frames: Frames,
}

impl Unit {
    fn send(&mut self, message: &Message) {
        let mut bytes = Vec::new();
        message.encode(&mut bytes).unwrap();
        self.stream.write_all(&bytes).unwrap();
    }

    fn receive(&mut self) -> Message {
        let mut buffer = vec![0; 1 << 16];
        loop {
            if let Some(message) = self.frames.take().unwrap() {
                return message;
            }
            let bytes = self.stream.read(&mut buffer).unwrap();
            assert!(bytes > 0, "the manager ended the connection");
            self.frames.push(&buffer[..bytes]);
        }
    }
}

#[test]
fn the_committed_document_is_what_the_code_says() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/openapi-manager.json");
    let now = Document::openapi().to_pretty_json().unwrap() + "\n";
    if std::env::var_os("WRITE_OPENAPI").is_some() {
        std::fs::write(path, &now).unwrap();
    }
    let committed = std::fs::read_to_string(path).unwrap();
    assert!(committed == now, "run the test with WRITE_OPENAPI=1 to write docs/openapi-manager.json anew");
}

#[test]
fn nobody_without_the_token_gets_anything() {
    let manager = start("");
    assert_eq!(manager.call("GET", "/healthz", "", "").0, 200);
    for (path, token) in [("/v1/cluster", ""), ("/v1/cluster", "0123456789abcdee"), ("/v1/units", "Bearer")] {
        let (status, body) = manager.call("GET", path, "", token);
        assert!(status == 401 && body.contains("token"), "{status} {body}");
    }
    assert_eq!(manager.call("GET", "/v1/cluster", "", TOKEN).0, 200);
}

#[test]
fn wrong_requests_are_told_what_is_wrong() {
    let manager = start("");
    let cases = [
        ("POST", "/v1/units", "{", 400, "EOF"),
        ("POST", "/v1/units", "{\"node\": \"x\"}", 422, "invalid type"),
        ("POST", "/v1/units", "{\"node\": 3, \"colour\": 1}", 422, "unknown field `colour`"),
        (
            "POST",
            "/v1/units",
            "{\"node\": 4096, \"address\": \"127.0.0.1\", \"role\": \"dataplane\"}",
            422,
            "4096",
        ),
        ("POST", "/v1/units", "{\"node\": 3, \"address\": \"127.0.0.1\"}", 422, "belong together"),
        ("POST", "/v1/units/3/drain", "{}", 404, "no unit 3"),
        ("DELETE", "/v1/units/3", "", 404, "no unit 3"),
        ("PATCH", "/v1/units/3", "{\"weight\": -1}", 422, "weight"),
        ("POST", "/v1/changes", "{\"steps\": []}", 422, "steps"),
        (
            "PUT",
            "/v1/config",
            "{\"interfaces\": [{\"id\": 0, \"name\": \"lan\", \"mac\": \"x\", \"addresses\": []}]}",
            422,
            "hardware address",
        ),
        ("GET", "/v2", "", 404, "nothing here"),
        ("DELETE", "/v1/cluster", "", 405, "not done here"),
    ];
    for (method, path, body, status, text) in cases {
        let answer = manager.call(method, path, body, TOKEN);
        assert!(answer.0 == status && answer.1.contains(text), "{method} {path} {body}: {answer:?}");
    }
    let long = format!("{{\"steps\": [{}]}}", " ".repeat(100_000));
    let status = manager.post("/v1/changes", &long).0;
    assert!(status == 413 || status == 0, "{status}");
}

#[test]
fn a_unit_enrols_itself_by_a_token() {
    use base64::Engine as _;
    use cluster::message::{Proof, Secret, signed_bytes};
    use ring::signature::{Ed25519KeyPair, KeyPair as _};
    let manager = start("");
    let (status, body) =
        manager.post("/v1/tokens", "{\"node\": 3, \"role\": \"dataplane\", \"valid_seconds\": 60}");
    assert_eq!(status, 201, "{body}");
    let issued: serde_json::Value = serde_json::from_str(&body).unwrap();
    let token = base64::engine::general_purpose::STANDARD.decode(issued["token"].as_str().unwrap()).unwrap();
    let token = Some(Secret(token.try_into().unwrap()));
    let pair = |seed: u8| Ed25519KeyPair::from_seed_unchecked(&[seed; 32]).unwrap();
    let connect = |pair: &Ed25519KeyPair, forged: bool| {
        let stream = TcpStream::connect(manager.bus).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let mut unit = Unit { stream, frames: Frames::default() };
        let key = pair.public_key().as_ref().try_into().unwrap();
        unit.send(&Message::Identify { key });
        assert_eq!(unit.receive(), Message::Term { term: 1 });
        let Message::Challenge { mut nonce } = unit.receive() else { panic!("no challenge") };
        nonce[0] ^= u8::from(forged);
        let signature = pair.sign(&signed_bytes(&nonce, &key)).as_ref().try_into().unwrap();
        unit.send(&Message::Proof(Box::new(Proof { signature, token })));
        unit
    };
    assert_eq!(connect(&pair(1), true).receive(), Message::Refused(Refusal::Key), "another challenge");
    let mut unit = connect(&pair(1), false);
    assert_eq!(unit.receive(), Message::Admitted);
    unit.send(&Message::Hello(Hello { node: 3, role: Role::DataPlane, weight: 1, instance: 7, held: None }));
    assert!(matches!(unit.receive(), Message::Welcome(_) | Message::Prepare(_)));
    assert_eq!(connect(&pair(2), false).receive(), Message::Refused(Refusal::Token), "it is used");
    for (body, status, text) in [
        ("{\"node\": 3, \"role\": \"dataplane\"}", 409, "unit 3 is enrolled"),
        ("{\"node\": 4, \"role\": \"dataplane\", \"valid_seconds\": 0}", 422, "604800"),
        ("{\"node\": 4096, \"role\": \"dataplane\"}", 422, "4096"),
        ("{\"node\": 4}", 422, "role"),
    ] {
        let answer = manager.post("/v1/tokens", body);
        assert!(answer.0 == status && answer.1.contains(text), "{body}: {answer:?}");
    }
}

#[test]
fn a_unit_joins_and_lives_by_its_heartbeats() {
    let manager = start("");
    // Nobody enrolled it.
    let mut stranger = manager.unit(3, Role::DataPlane);
    assert_eq!(stranger.receive(), Message::Term { term: 1 });
    assert_eq!(stranger.receive(), Message::Refused(Refusal::Unknown));
    let body = "{\"node\": 3, \"address\": \"127.0.0.1\", \"role\": \"dataplane\"}";
    assert_eq!(manager.post("/v1/units", body).0, 202);
    let mut unit = manager.unit(3, Role::DataPlane);
    let deadline = Instant::now() + Duration::from_secs(10);
    let era = loop {
        assert!(Instant::now() < deadline);
        match unit.receive() {
            Message::Welcome(welcome) => {
                if let Some(whole) = welcome.whole {
                    assert_eq!(whole.newest.count(3), whole.newest.buckets());
                    break whole.newest.era();
                }
            }
            Message::Prepare(prepare) => break prepare.table.era(),
            _ => {}
        }
    };
    for phase in [Phase::Prepared, Phase::Committed] {
        unit.send(&Message::Acknowledge { era, phase });
    }
    // Somebody else on its machine looks whether the port answers, once for a moment and once for long.
    drop(TcpStream::connect(manager.bus).unwrap());
    let _stray = TcpStream::connect(manager.bus).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    // Heartbeats by themselves keep it alive for longer than silence may last.
    let beats = UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut beat = Vec::new();
    Message::Heartbeat { load_percent: 30 }.encode(&mut beat).unwrap();
    for _ in 0..20 {
        beats.send_to(&beat, manager.bus).unwrap();
        std::thread::sleep(Duration::from_millis(50));
    }
    let (_, units) = manager.call("GET", "/v1/units", "", TOKEN);
    assert!(units.contains("\"active\"") && units.contains("\"load_percent\":30"), "{units}");
}
