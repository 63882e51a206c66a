//! Checks in a row and HTTP answers as tables; real servers on loopback that die and come back (row C6).

#![allow(clippy::unwrap_used, reason = "tests")]

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::datagram::{DnsCheck, Question, UdpCheck};
use super::http::{Answer, HttpCheck, Malformed};
use super::rise_fall::RiseFall;
use super::{
    HealthChange, HealthKind, HealthNews, HealthSpec, HealthTarget, Known, KnownTarget, MonitorStatus,
    Monitors, TlsCheck,
};

mod verdicts;

/// Far more than any of this takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// An address of its own for each test, so that a port that is closed for a moment is not taken by another.
fn address(test: u8) -> SocketAddr {
    let process = std::process::id().to_be_bytes();
    let host = IpAddr::V4(Ipv4Addr::new(127, 64 + process[2] % 64, process[3], test));
    let listener = TcpListener::bind((host, 0)).unwrap();
    listener.local_addr().unwrap()
}

fn spec(kind: HealthKind) -> HealthSpec {
    HealthSpec { interval_ms: 50, timeout_ms: 2_000, ..HealthSpec::new(kind) }
}

fn target(id: u16, address: SocketAddr, kind: HealthKind) -> HealthTarget {
    HealthTarget { id, server: "web".to_owned(), address, spec: spec(kind) }
}

fn start(targets: Vec<HealthTarget>) -> (Monitors, mpsc::Receiver<HealthChange>) {
    let (sender, receiver) = mpsc::channel();
    let sink = move |news| {
        if let HealthNews::Change(change) = news {
            drop(sender.send(change));
        }
    };
    (Monitors::start(fresh(targets), Box::new(sink)).unwrap(), receiver)
}

/// Nobody knows them.
fn fresh(targets: Vec<HealthTarget>) -> Vec<KnownTarget> {
    targets.into_iter().map(|target| (target, None)).collect()
}

fn next(changes: &mpsc::Receiver<HealthChange>) -> HealthChange {
    changes.recv_timeout(PATIENCE).expect("a change within a minute")
}

fn wait_until(what: &str, mut reached: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !reached() {
        assert!(begin.elapsed() < PATIENCE, "{what} within a minute");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn status(monitors: &Monitors, id: u16) -> Option<MonitorStatus> {
    monitors.statuses().into_iter().find(|status| status.id == id)
}

/// An HTTP server whose answer's status can be changed; 0 = it takes connections and says nothing.
struct HttpServer {
    status: Arc<AtomicU16>,
    stop: Arc<AtomicBool>,
    address: SocketAddr,
    thread: Option<JoinHandle<Vec<String>>>,
}

impl HttpServer {
    fn start(address: SocketAddr, status: u16) -> Self {
        let listener = TcpListener::bind(address).unwrap();
        let (status, stop) = (Arc::new(AtomicU16::new(status)), Arc::new(AtomicBool::new(false)));
        let (answer, stopped) = (Arc::clone(&status), Arc::clone(&stop));
        let thread = std::thread::spawn(move || serve(&listener, &answer, &stopped));
        Self { status, stop, address, thread: Some(thread) }
    }

    /// The requests that came.
    fn stop(mut self) -> Vec<String> {
        self.stop.store(true, Ordering::SeqCst);
        drop(TcpStream::connect(self.address));
        self.thread.take().unwrap().join().unwrap()
    }
}

fn serve(listener: &TcpListener, answer: &AtomicU16, stop: &AtomicBool) -> Vec<String> {
    let (mut requests, mut silent) = (Vec::new(), Vec::new());
    for stream in listener.incoming() {
        if stop.load(Ordering::SeqCst) {
            break;
        }
        let Ok(mut stream) = stream else { continue };
        let status = answer.load(Ordering::SeqCst);
        if status == 0 {
            silent.push(stream);
            continue;
        }
        let mut request = Vec::new();
        let mut buffer = [0; 512];
        while !request.ends_with(b"\r\n\r\n") {
            match stream.read(&mut buffer) {
                Ok(bytes) if bytes > 0 => request.extend_from_slice(&buffer[..bytes]),
                _ => break,
            }
        }
        requests.push(String::from_utf8_lossy(&request).into_owned());
        // In two parts, as a slow server would.
        let _ = stream.write_all(b"HTTP/1.1 10");
        let _ = stream
            .write_all(format!("3 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 {status} X\r\n\r\n").as_bytes());
    }
    requests
}

#[test]
fn checks_in_a_row() {
    // Outcomes of checks in a row, with fall 3 and rise 2: what is reported after each.
    let cases: [(&str, &[Option<bool>]); 6] = [
        ("+", &[Some(true)]),
        ("-", &[Some(false)]),
        ("+--+---", &[Some(true), None, None, None, None, None, Some(false)]),
        ("-+-++", &[Some(false), None, None, None, Some(true)]),
        ("-++---", &[Some(false), None, Some(true), None, None, Some(false)]),
        ("----+", &[Some(false), None, None, None, None]),
    ];
    for (outcomes, reported) in cases {
        let mut state = RiseFall::new();
        assert!(state.is_up() && !state.is_checked());
        let got: Vec<Option<bool>> =
            outcomes.chars().map(|it| state.take(it == '+', true, 3, 2).map(|news| news.up)).collect();
        assert_eq!(got, reported, "{outcomes}");
        assert!(state.is_checked());
        assert_eq!(state.is_up(), reported.iter().flatten().next_back() == Some(&true));
    }
    let mut hasty = RiseFall::new();
    let got: Vec<Option<bool>> =
        [true, false, true, false].map(|it| hasty.take(it, true, 1, 1).map(|news| news.up)).into();
    assert_eq!(got, [Some(true), Some(false), Some(true), Some(false)]);
}

#[test]
fn datagrams_and_their_answers() {
    let dns = |name: &str| Question::Dns(DnsCheck { name: name.to_owned() }, 0x1234);
    let question = b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x01a\x07example\0\0\x01\0\x01";
    assert_eq!(dns("a.example").bytes(), question);
    assert_eq!(dns("a.example.").bytes(), question);
    assert_eq!(dns(".").bytes(), b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\0\0\x01\0\x01");
    let outcome = |header: [u8; 4]| {
        let answer = [&header[..], &question[4..]].concat();
        dns("a.example").outcome(&answer).map(|outcome| outcome.map_err(|failure| failure.to_string()))
    };
    assert_eq!(outcome([0x12, 0x34, 0x81, 0x80]), Some(Ok(())));
    assert_eq!(outcome([0x12, 0x34, 0x81, 0x82]), Some(Err("DNS error code 2".to_owned())));
    assert_eq!(outcome([0x12, 0x35, 0x81, 0x80]), None, "an answer to somebody else");
    assert_eq!(outcome([0x12, 0x34, 0x01, 0x80]), None, "a question");
    assert!(dns("a.example").outcome(&question[..11]).is_none());
    let udp = |body: Option<&str>| {
        Question::Udp(UdpCheck { send: "ping".to_owned(), body: body.map(str::to_owned) })
    };
    assert_eq!(udp(None).bytes(), b"ping");
    assert!(udp(None).outcome(b"").unwrap().is_ok());
    assert!(udp(Some("on")).outcome(b"pong").unwrap().is_ok());
    let wrong = udp(Some("ok")).outcome(b"pong").unwrap().unwrap_err();
    assert_eq!(wrong.to_string(), "the answer does not contain \"ok\"");
    let sound = |name: &str| DnsCheck { name: name.to_owned() }.problem().is_none();
    let (long, all) = ("a".repeat(64), format!("{}.a", "a.".repeat(127)));
    assert!(sound(".") && sound("a") && sound("a.b.") && sound(&long[1..]));
    assert!(!sound("") && !sound("a..b") && !sound(".a") && !sound("a b") && !sound(&long) && !sound(&all));
}

/// A server on loopback, one connection after another; `each` says what becomes of it.
fn serve_each<T: Send + 'static>(
    address: SocketAddr,
    each: impl Fn(TcpStream) -> T + Send + 'static,
) -> mpsc::Receiver<T> {
    let listener = TcpListener::bind(address).unwrap();
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            if sender.send(each(stream)).is_err() {
                break;
            }
        }
    });
    receiver
}

/// Neither end sees a reset: not a server that waits for its client, nor one that speaks first.
#[test]
fn a_tcp_check_ends_in_order() {
    for greets in [false, true] {
        let address = address(if greets { 21 } else { 22 });
        let seen = serve_each(address, move |mut stream| {
            std::thread::sleep(Duration::from_millis(20));
            if greets {
                stream.write_all(b"220 ready\r\n")?;
            }
            let mut all = Vec::new();
            stream.read_to_end(&mut all)?;
            // A reset that comes late shows here.
            std::thread::sleep(Duration::from_millis(20));
            stream.write_all(b"221 bye\r\n").map(|()| all.len())
        });
        let (_monitors, changes) = start(vec![target(1, address, HealthKind::Tcp)]);
        assert!(next(&changes).up);
        for _ in 0..3 {
            assert_eq!(seen.recv_timeout(PATIENCE).unwrap().unwrap(), 0, "greets: {greets}");
        }
    }
}

/// A backend that speaks PROXY gets LOCAL first, alone or in front of the request.
#[test]
fn checks_of_a_proxied_backend_begin_with_local() {
    for (last, kind, rest) in
        [(23, HealthKind::Tcp, ""), (24, HealthKind::Http(HttpCheck::new("/")), "GET / HTTP/1.1\r\n")]
    {
        let address = address(last);
        let seen = serve_each(address, |mut stream| {
            let mut bytes = [0; 64];
            let count = stream.read(&mut bytes).unwrap();
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
            bytes[..count].to_vec()
        });
        let mut target = target(1, address, kind);
        target.spec.proxy_protocol = true;
        let (_monitors, changes) = start(vec![target]);
        assert!(next(&changes).up);
        let bytes = seen.recv_timeout(PATIENCE).unwrap();
        assert_eq!(bytes[..16], *b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0");
        assert!(bytes[16..].starts_with(rest.as_bytes()), "{bytes:?}");
    }
}

#[test]
fn another_port_and_a_source() {
    let (service, checked) = (address(25), address(25));
    let from = address(26).ip();
    let seen = serve_each(checked, |stream| stream.peer_addr().unwrap());
    let mut target = target(1, service, HealthKind::Tcp);
    (target.spec.port, target.spec.source) = (Some(checked.port()), Some(from));
    let (monitors, changes) = start(vec![target]);
    assert!(next(&changes).up);
    assert_eq!(seen.recv_timeout(PATIENCE).unwrap().ip(), from);
    assert_eq!(status(&monitors, 1).unwrap().address, service, "it is known by its own");
}

#[test]
fn the_content_of_an_answer_counts() {
    let address = address(27);
    let _seen = serve_each(address, |mut stream| {
        let mut bytes = [0; 512];
        let _ = stream.read(&mut bytes);
        // Chunked, and the text is cut by the chunks.
        let _ = stream.write_all(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nI am\r\n6\r\n ready\r\n0\r\n\r\n",
        );
    });
    for (body, up) in [("am ready", true), ("unready", false)] {
        let kind = HealthKind::Http(HttpCheck { body: Some(body.to_owned()), ..HttpCheck::new("/") });
        let (monitors, changes) = start(vec![target(1, address, kind)]);
        assert_eq!(next(&changes).up, up, "{body}");
        if !up {
            assert_eq!(status(&monitors, 1).unwrap().error, "the answer does not contain \"unready\"");
        }
    }
}

#[test]
fn name_servers_and_other_services_of_datagrams() {
    let socket = std::net::UdpSocket::bind((address(28).ip(), 0)).unwrap();
    let address = socket.local_addr().unwrap();
    let code = Arc::new(AtomicU16::new(0));
    let answer = Arc::clone(&code);
    std::thread::spawn(move || {
        let mut bytes = [0; 512];
        while let Ok((count, from)) = socket.recv_from(&mut bytes) {
            bytes[2] |= 0x80;
            bytes[3] = 0x80 | answer.load(Ordering::SeqCst) as u8;
            let _ = socket.send_to(&bytes[..count], from);
        }
    });
    let dns = HealthKind::Dns(DnsCheck { name: "www.example.net".to_owned() });
    let ping = HealthKind::Udp(UdpCheck { send: "ping".to_owned(), body: Some("pi".to_owned()) });
    let closed = self::address(29);
    let nobody = HealthKind::Udp(UdpCheck { send: "ping".to_owned(), body: None });
    let (monitors, changes) =
        start(vec![target(1, address, dns), target(2, address, ping), target(3, closed, nobody)]);
    let mut first = [next(&changes), next(&changes), next(&changes)].map(|change| (change.id, change.up));
    first.sort_unstable();
    assert_eq!(first, [(1, true), (2, true), (3, false)]);
    code.store(2, Ordering::SeqCst);
    let down = next(&changes);
    assert_eq!((down.id, down.up, down.silent, down.reason.as_str()), (1, false, false, "DNS error code 2"));
    assert!(status(&monitors, 3).unwrap().error.contains("refused"));
}

/// Status and completeness after all of `text`, given in two parts cut at every place: the cut must not matter, but that a head or line
/// without an end may be found wrong later.
fn read(text: &[u8]) -> Result<(Option<u16>, bool), Malformed> {
    let parts = |cut: usize| {
        let mut answer = Answer::default();
        let (first, second) = text.split_at(cut);
        answer.receive(first)?;
        answer.receive(second)?;
        Ok((answer.status(), answer.is_complete()))
    };
    let whole = parts(text.len());
    for cut in (0..text.len()).step_by(1 + text.len() / 500) {
        let found = parts(cut);
        let later = whole.is_err() && matches!(found, Ok((_, false)));
        assert!(
            later || found == whole,
            "cut at {cut}: {found:?}, {whole:?}: {:?}",
            String::from_utf8_lossy(text)
        );
    }
    whole
}

/// Whatever a backend sends behind the end of its answer is not looked at again and again, nor kept.
#[test]
fn http_nothing_behind_the_end_is_read() {
    for head in [
        "HTTP/1.1 204 No\r\n\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    ] {
        let mut answer = Answer::with_content();
        answer.receive(head.as_bytes()).unwrap();
        let (steps, came) = (answer.steps(), 4_000);
        for byte in "x\r\n\r\n".bytes().cycle().take(came) {
            answer.receive(&[byte]).unwrap();
        }
        assert!(answer.is_complete());
        let more = answer.steps() - steps;
        assert!(more <= 4 * came as u64, "{more} steps for {came} bytes");
    }
}

#[test]
fn http_heads() {
    for open in
        ["", "H", "HTTP/1.", "HTTP/1.1 200 O", "HTTP/1.1 200 OK\r\n", "HTTP/1.1 100 Continue\r\n\r\n", "\r\n"]
    {
        assert_eq!(read(open.as_bytes()), Ok((None, false)), "{open:?}");
    }
    for (text, status) in [
        ("HTTP/1.1 200 OK\r\n\r\n", 200),
        ("HTTP/1.0 204\r\n\r\n", 204),
        ("HTTP/1.1 302 Found\r\nLocation: /x\r\n\r\n", 302),
        ("HTTP/1.1 399 \n\n", 399),
        ("HTTP/1.1 100 C\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: <a>\r\n\r\nHTTP/1.1 200 OK\r\n\r\n", 200),
        ("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 503 Busy\r\n\r\n", 503),
        ("HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n\0\0", 101),
    ] {
        assert_eq!(read(text.as_bytes()).map(|(status, _)| status), Ok(Some(status)), "{text:?}");
    }
    for garbage in [
        "SSH-2.0-OpenSSH_9.6\r\n",
        "SSH",
        "HTTP/1.1 2000 OK\r\n\r\n",
        "HTTP/1.1 +20 OK\r\n\r\n",
        "HTTP/2.0 200 OK\r\n\r\n",
        "HTTP/1.1\r\n\r\n",
        "HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
    ] {
        assert!(matches!(read(garbage.as_bytes()), Err(Malformed::Head(_))), "{garbage:?}");
    }
    assert_eq!(read(b"HTTP/1.1 099 OK\r\n\r\n"), Err(Malformed::Code(99)));
    assert_eq!(read(b"HTTP/1.1 600 OK\r\n\r\n"), Err(Malformed::Code(600)));
    let endless = format!("HTTP/1.1 200 {}", "x".repeat(20_000));
    assert_eq!(read(endless.as_bytes()), Err(Malformed::HeadTooLong));
    let interim = "HTTP/1.1 103 Early Hints\r\n\r\n".repeat(1_000);
    assert_eq!(read(interim.as_bytes()), Err(Malformed::HeadTooLong));
    let many = format!("HTTP/1.1 200 OK\r\n{}\r\n", "a: b\r\n".repeat(65));
    assert_eq!(read(many.as_bytes()), Err(Malformed::Head(httparse::Error::TooManyHeaders)));
}

#[test]
fn http_statuses() {
    let any = HttpCheck::new("/");
    let accepted =
        |check: &HttpCheck| [101, 199, 200, 399, 400, 401, 500].map(|status| check.accepts(status));
    assert_eq!(accepted(&any), [false, false, true, true, false, false, false]);
    let chosen = HttpCheck { statuses: vec![401, 500], ..any };
    assert_eq!(accepted(&chosen), [false, false, false, false, false, true, true]);
}

#[test]
fn http_ends() {
    let large = format!("HTTP/1.1 200 OK\r\n\r\n{}", "x".repeat(64 << 10));
    let chunked = |rest: &str| format!("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{rest}");
    let large_chunk = chunked(&format!("FFFFFFFFFFFFFF\r\n{}", "x".repeat(64 << 10)));
    let cases: [(&str, bool); 20] = [
        ("HTTP/1.1 200 OK\r\n\r\nuntil the end", false),
        ("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nab", false),
        ("HTTP/1.1 200 OK\r\nServer: x\r\ncontent-length:3\r\n\r\nabc", true),
        ("HTTP/1.1 200 OK\r\nContent-Length: 2, 2\r\nContent-Length: 2\r\n\r\nab", true),
        ("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", true),
        ("HTTP/1.1 103 E\r\nContent-Length: 0\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n", false),
        ("HTTP/1.1 204 No\r\n\r\n", true),
        ("HTTP/1.1 304 Same\r\nContent-Length: 9\r\n\r\n", true),
        (large.as_str(), true),
        (large_chunk.as_str(), true),
        (&chunked(""), false),
        (&chunked("5\r\nhello\r\n"), false),
        (&chunked("5\r\nhello\r\n0\r\n"), false),
        (&chunked("5\r\nhello\r\n0\r\n\r\n"), true),
        (&chunked("1a;name=value\r\nabcdefghijklmnopqrstuvwxyz\r\nA\r\n0\r\n\r\n01234\r\n0\r\n\r\n"), true),
        (&chunked("0\r\nExpires: never\r\n\r\n"), true),
        (&chunked("0\r\nExpires: never\r\n"), false),
        // A length beside chunks does not count; of several codings the last must be the chunks.
        ("HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: gzip, Chunked\r\n\r\n0\r\n", false),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n0\r\n\r\n", false),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: x\r\n\r\n0\r\n\r\n", false),
    ];
    for (answer, complete) in cases {
        assert_eq!(read(answer.as_bytes()), Ok((Some(status_in(answer)), complete)), "{answer:.200?}");
    }
    for length in ["-1", "+1", "", "1x", "1, 2", "99999999999999999999"] {
        let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n");
        assert_eq!(read(answer.as_bytes()), Err(Malformed::Length), "{length:?}");
    }
    for chunk in ["x\r\n", "-1\r\n", "5\r\nhelloX\n", "\r\n", "11111111111111111\r\n"] {
        assert_eq!(read(chunked(chunk).as_bytes()), Err(Malformed::Chunk), "{chunk:?}");
    }
    let extension = chunked(&format!("1;{}", "x".repeat(2_000)));
    assert_eq!(read(extension.as_bytes()), Err(Malformed::Chunk));
    let trailers = chunked(&format!("0\r\na: {}", "x".repeat(20_000)));
    assert_eq!(read(trailers.as_bytes()), Err(Malformed::HeadTooLong));
}

/// Status of the last status line.
fn status_in(answer: &str) -> u16 {
    let at = answer.rfind("HTTP/1.1 ").unwrap() + "HTTP/1.1 ".len();
    answer[at..at + 3].parse().unwrap()
}

/// A server whose answer takes some time is not reset in the middle of it, and an answer without an end is one.
#[test]
fn answers_are_read_to_their_end() {
    let listener = TcpListener::bind(address(5)).unwrap();
    let address = listener.local_addr().unwrap();
    let (done, results) = mpsc::channel();
    // It serves for as long as anybody listens: checks go on.
    std::thread::spawn(move || {
        for endless in [false, true].into_iter().cycle() {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 512];
            let _ = stream.read(&mut request);
            let head = if endless { "" } else { "Content-Length: 6000\r\n" };
            let _ = stream.write_all(format!("HTTP/1.1 200 OK\r\n{head}\r\n").as_bytes());
            for _ in 0..3 {
                std::thread::sleep(Duration::from_millis(20));
                // Who checks may have gone, at the end of the test.
                let _ = stream.write_all(&[b'x'; 2_000]);
            }
            let ended = stream.read(&mut request);
            if done.send(ended.map_err(|error| error.kind())).is_err() {
                return;
            }
        }
    });
    let mut target = target(1, address, HealthKind::Http(HttpCheck::new("/")));
    target.spec.timeout_ms = 400;
    target.spec.fall = 1;
    let (monitors, changes) = start(vec![target]);
    assert!(next(&changes).up);
    // Closed in order, by us, after the whole answer.
    assert_eq!(results.recv(), Ok(Ok(0)));
    assert_eq!(results.recv(), Ok(Ok(0)));
    assert!(changes.try_recv().is_err(), "still up");
    assert!(status(&monitors, 1).unwrap().up);
    drop(monitors);
}

/// A real server that answers each connection with the next of `answers`, in pieces of `piece` bytes with a pause between
/// them, and says how each connection ended.
fn serve_answers(
    answers: Vec<String>,
    piece: usize,
    pause: Duration,
) -> (SocketAddr, mpsc::Receiver<std::io::Result<usize>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (done, ends) = mpsc::channel();
    std::thread::spawn(move || {
        for answer in answers {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 512];
            let _ = stream.read(&mut request);
            let pieces: Vec<&[u8]> = answer.as_bytes().chunks(piece).collect();
            for (number, bytes) in pieces.iter().enumerate() {
                if number > 0 {
                    std::thread::sleep(pause);
                }
                if stream.write_all(bytes).is_err() {
                    break;
                }
            }
            if done.send(stream.read(&mut request)).is_err() {
                return;
            }
        }
    });
    (address, ends)
}

#[test]
fn chunked_answers_of_a_slow_server_are_read_to_their_end() {
    let chunks = "5\r\nhello\r\n6;x=y\r\n world\r\n0\r\nTrailer: x\r\n\r\n";
    let answer = |status: u16| {
        format!(
            "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 {status} X\r\nTransfer-Encoding: chunked\r\n\r\n{chunks}"
        )
    };
    let pause = Duration::from_millis(2);
    let (address, ends) = serve_answers(vec![answer(200), answer(503)], 5, pause);
    let mut target = target(1, address, HealthKind::Http(HttpCheck::new("/")));
    // The connection stays open after the last chunk: only the chunks say that the answer has ended.
    (target.spec.timeout_ms, target.spec.fall) = (60_000, 1);
    let (_monitors, changes) = start(vec![target]);
    assert!(next(&changes).up);
    let down = next(&changes);
    assert_eq!((down.up, down.reason.as_str()), (false, "HTTP status 503"));
    for _ in 0..2 {
        let end = ends.recv_timeout(PATIENCE).unwrap();
        assert_eq!(end.map_err(|error| error.kind()), Ok(0), "closed in order, not reset");
    }
}

#[test]
fn oversized_and_garbage_answers_fail_at_once() {
    let large = "x".repeat(20_000);
    for (answer, reason) in [
        (format!("HTTP/1.1 200 OK\r\nCookie: {large}\r\n\r\n"), "more than 16384 bytes"),
        ("HTTP/1.1 103 Early Hints\r\n\r\n".repeat(1_000), "more than 16384 bytes"),
        (format!("HTTP/1.1 200 OK\r\n{}\r\n", "a: b\r\n".repeat(1_000)), "not HTTP: too many headers"),
        ("SSH-2.0-OpenSSH_9.6\r\n".to_owned(), "not HTTP: invalid HTTP version"),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nhello".to_owned(), "chunks are invalid"),
        ("HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n".to_owned(), "Content-Length is invalid"),
    ] {
        let (address, _ends) = serve_answers(vec![answer], 1 << 20, Duration::ZERO);
        let mut target = target(1, address, HealthKind::Http(HttpCheck::new("/")));
        // No check is decided by the timeout.
        target.spec.timeout_ms = 600_000;
        let (monitors, changes) = start(vec![target]);
        let down = next(&changes);
        assert!(!down.up && down.reason.contains(reason), "{down:?}");
        drop(monitors);
    }
}

/// Content beyond the limit is not waited for, nor kept.
#[test]
fn a_large_answer_is_cut_off() {
    let answer = format!("HTTP/1.1 200 OK\r\n\r\n{}", "x".repeat(200_000));
    let (address, ends) = serve_answers(vec![answer], 1 << 20, Duration::ZERO);
    let mut target = target(1, address, HealthKind::Http(HttpCheck::new("/")));
    (target.spec.timeout_ms, target.spec.interval_ms) = (600_000, 600_000);
    let (_monitors, changes) = start(vec![target]);
    assert!(next(&changes).up);
    let _ = ends.recv_timeout(PATIENCE).unwrap();
}

proptest::proptest! {
    #[test]
    fn any_answer_is_read(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200), cut in 0usize..80) {
        let head = b"HTTP/1.1 100 C\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n";
        let mut bytes_all = head.get(..cut).unwrap_or(head).to_vec();
        bytes_all.extend(bytes);
        let _ = read(&bytes_all);
    }
}

#[test]
fn http_requests() {
    let text = |check: &HttpCheck, address: &str| {
        String::from_utf8(check.request(address.parse().unwrap())).unwrap()
    };
    let check = HttpCheck::new("/health?full=1");
    let first = text(&check, "10.0.0.1:80");
    assert!(first.starts_with("GET /health?full=1 HTTP/1.1\r\nHost: 10.0.0.1\r\n"), "{first}");
    assert!(first.ends_with("Connection: close\r\n\r\n"), "{first}");
    assert!(text(&check, "10.0.0.1:8080").contains("\r\nHost: 10.0.0.1:8080\r\n"));
    assert!(text(&check, "[2001:db8::1]:8080").contains("\r\nHost: [2001:db8::1]:8080\r\n"));
    let tls = |sni: Option<&str>| Some(TlsCheck { sni: sni.map(str::to_owned), authorities: None });
    let https = |sni| HttpCheck { tls: tls(sni), ..check.clone() };
    assert!(text(&https(None), "10.0.0.1:443").contains("\r\nHost: 10.0.0.1\r\n"));
    assert!(text(&https(None), "10.0.0.1:80").contains("\r\nHost: 10.0.0.1:80\r\n"));
    assert!(text(&https(Some("a.example")), "10.0.0.1:80").contains("\r\nHost: a.example\r\n"));
    let named = HttpCheck { host: Some("www.example.com".to_owned()), ..https(Some("a.example")) };
    assert!(text(&named, "10.0.0.1:80").contains("\r\nHost: www.example.com\r\n"));
    let evil = HttpCheck { host: Some("a\r\nX: y".to_owned()), ..HttpCheck::new("/ b\r\n\r\nGET /c") };
    assert_eq!(text(&evil, "10.0.0.1:80").matches("\r\n").count(), 6, "no line more than meant");
}

#[test]
fn problems_of_a_spec() {
    let of = |change: fn(&mut HealthSpec)| {
        let mut spec = HealthSpec::new(HealthKind::Tcp);
        change(&mut spec);
        spec.problem()
    };
    assert_eq!(of(|_| {}), None);
    assert!(of(|spec| spec.interval_ms = 49).is_some());
    assert!(of(|spec| spec.interval_ms = 600_001).is_some());
    assert!(of(|spec| spec.timeout_ms = 0).is_some());
    assert!(of(|spec| spec.fall = 0).is_some() && of(|spec| spec.rise = 0).is_some());
    let command = |program: &str| {
        let program = PathBuf::from(program);
        HealthSpec::new(HealthKind::Command { program, arguments: Vec::new() }).problem()
    };
    assert!(command("/bin/true").is_none() && command("true").is_some());
    let http = |path: &str, host: Option<&str>, statuses: &[u16]| {
        HttpCheck {
            path: path.to_owned(),
            host: host.map(str::to_owned),
            statuses: statuses.to_vec(),
            body: None,
            tls: None,
        }
        .problem()
    };
    assert_eq!(http("/", Some("a.example:8080"), &[200, 404]), None);
    assert!(http("health", None, &[]).is_some() && http("/a b", None, &[]).is_some());
    assert!(http("/", Some(""), &[]).is_some() && http("/", Some("a\n"), &[]).is_some());
    assert!(http("/", None, &[100]).is_some() && http("/", None, &[600]).is_some());
}

#[test]
fn a_tcp_server_dies_and_comes_back() {
    let address = address(1);
    let listener = TcpListener::bind(address).unwrap();
    let (monitors, changes) = start(vec![target(7, address, HealthKind::Tcp)]);
    let first = next(&changes);
    assert_eq!((first.id, first.up), (7, true), "the first check is reported");
    drop(listener);
    let down = next(&changes);
    assert!(!down.up && down.reason.contains("refused"), "{down:?}");
    let seen = status(&monitors, 7).unwrap();
    assert!(!seen.up && seen.checked && seen.failures >= 3, "{seen:?}");
    let _listener = TcpListener::bind(address).unwrap();
    let up = next(&changes);
    assert!(up.up, "{up:?}");
    let seen = status(&monitors, 7).unwrap();
    assert!(seen.up && seen.error.is_empty() && seen.checks >= seen.failures + 3, "{seen:?}");
}

#[test]
fn a_dead_server_is_down_after_its_first_check() {
    let address = address(2);
    let mut patient = target(1, address, HealthKind::Tcp);
    (patient.spec.interval_ms, patient.spec.fall) = (600_000, 200);
    let (monitors, changes) = start(vec![patient]);
    assert!(!next(&changes).up);
    assert_eq!(status(&monitors, 1).unwrap().checks, 1);
}

#[test]
fn tcp_over_ipv6() {
    let listener = TcpListener::bind("[::1]:0").unwrap();
    let (_monitors, changes) = start(vec![target(1, listener.local_addr().unwrap(), HealthKind::Tcp)]);
    assert!(next(&changes).up);
}

#[test]
fn http_statuses_decide() {
    let server = HttpServer::start(address(3), 200);
    let check = HttpCheck { host: Some("shop.example".to_owned()), ..HttpCheck::new("/healthz") };
    let (monitors, changes) = start(vec![target(1, server.address, HealthKind::Http(check))]);
    assert!(next(&changes).up);
    server.status.store(500, Ordering::SeqCst);
    let down = next(&changes);
    assert_eq!((down.up, down.reason.as_str()), (false, "HTTP status 500"));
    server.status.store(302, Ordering::SeqCst);
    assert!(next(&changes).up);
    drop(monitors);
    let requests = server.stop();
    assert!(requests.len() >= 6, "{requests:?}");
    assert!(requests.iter().all(|it| it.starts_with("GET /healthz HTTP/1.1\r\nHost: shop.example\r\n")));
}

#[test]
fn a_silent_server_is_down_at_the_timeout() {
    let server = HttpServer::start(address(4), 0);
    let mut target = target(1, server.address, HealthKind::Http(HttpCheck::new("/")));
    target.spec.timeout_ms = 100;
    let (monitors, changes) = start(vec![target]);
    let down = next(&changes);
    assert_eq!((down.up, down.reason.as_str()), (false, "no answer within 100 ms"));
    server.status.store(200, Ordering::SeqCst);
    assert!(next(&changes).up);
    drop(monitors);
    server.stop();
}

fn folder(name: &str) -> PathBuf {
    let folder = std::env::temp_dir().join(format!("anabranch-health-{name}-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

fn shell(script: &str, argument: &Path) -> HealthKind {
    let argument = argument.display().to_string();
    let arguments = vec!["-c".to_owned(), script.to_owned(), "sh".to_owned(), argument];
    HealthKind::Command { program: "/bin/sh".into(), arguments }
}

#[test]
fn a_command_decides() {
    let folder = folder("command");
    let file = folder.join("alive");
    std::fs::write(&file, "").unwrap();
    let script = r#"test "$ANABRANCH_SERVER $ANABRANCH_ADDRESS $ANABRANCH_PORT" = "web 192.0.2.9 4242" && test -e "$1""#;
    let (_monitors, changes) =
        start(vec![target(3, "192.0.2.9:4242".parse().unwrap(), shell(script, &file))]);
    assert!(next(&changes).up);
    std::fs::remove_file(&file).unwrap();
    let down = next(&changes);
    assert!(!down.up && down.reason.contains("exit status: 1"), "{down:?}");
    std::fs::write(&file, "").unwrap();
    assert!(next(&changes).up);
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn a_command_that_hangs_is_killed_with_its_children() {
    let folder = folder("hang");
    let file = folder.join("child");
    let mut hanging =
        target(1, "192.0.2.9:1".parse().unwrap(), shell(r#"sleep 1000 & echo "$$ $!" > "$1"; wait"#, &file));
    (hanging.spec.timeout_ms, hanging.spec.interval_ms) = (1_000, 600_000);
    let missing = HealthKind::Command { program: folder.join("missing"), arguments: Vec::new() };
    let (_monitors, changes) = start(vec![hanging, target(2, "192.0.2.9:2".parse().unwrap(), missing)]);
    let (mut hung, mut absent) = (None, None);
    while hung.is_none() || absent.is_none() {
        let change = next(&changes);
        assert!(!change.up);
        *if change.id == 1 { &mut hung } else { &mut absent } = Some(change.reason);
    }
    assert_eq!(hung.as_deref(), Some("no answer within 1000 ms"));
    assert!(absent.unwrap().contains("No such file"));
    let both = std::fs::read_to_string(&file).unwrap();
    let (command, child) = both.trim().split_once(' ').unwrap();
    let stat = |process: &str| std::fs::read_to_string(format!("/proc/{process}/stat"));
    wait_until("the command's end, waited for", || stat(command).is_err());
    // A zombie, where nobody adopts it at once.
    let ended = || stat(child).map_or(true, |stat| stat.contains(") Z "));
    wait_until("the child's end", ended);
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn targets_can_be_replaced() {
    let (alive, dead) = (address(5), address(6));
    let _listener = TcpListener::bind(alive).unwrap();
    let tcp = |id, address| target(id, address, HealthKind::Tcp);
    let (monitors, changes) = start(vec![tcp(1, alive), tcp(2, dead)]);
    let mut news = [next(&changes), next(&changes)].map(|change| (change.id, change.up));
    news.sort_unstable();
    assert_eq!(news, [(1, true), (2, false)]);
    let before = status(&monitors, 1).unwrap().checks;
    monitors.update(fresh(vec![tcp(1, alive), tcp(3, dead)]));
    let freed = next(&changes);
    assert_eq!((freed.id, freed.up, freed.reason.as_str()), (2, true, "no longer monitored"));
    let added = next(&changes);
    assert_eq!((added.id, added.up), (3, false));
    assert!(status(&monitors, 1).unwrap().checks >= before, "a target that stays goes on");
    assert_eq!(monitors.statuses().iter().map(|status| status.id).collect::<Vec<_>>(), [1, 3]);
    // The same id elsewhere is another target.
    monitors.update(fresh(vec![tcp(3, alive)]));
    assert!(next(&changes).reason.contains("no longer"));
    let moved = next(&changes);
    assert_eq!((moved.id, moved.up), (3, true));
    // Another kind of check for the same target: what it says now counts, by rise and fall.
    let check = HealthKind::Http(HttpCheck::new("/"));
    let mut changed = target(3, alive, check);
    changed.spec.timeout_ms = 50;
    monitors.update(fresh(vec![changed]));
    assert!(!next(&changes).up, "it takes connections but does not answer");
    assert_eq!(status(&monitors, 3).unwrap().kind, "http");
    monitors.update(fresh(Vec::new()));
    assert!(next(&changes).up);
    wait_until("no targets", || monitors.statuses().is_empty());
}
