//! Verdicts and HTTP answers as tables; real servers on loopback that die and come back (row C6).

#![allow(clippy::unwrap_used, reason = "tests")]

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::http::HttpCheck;
use super::verdict::Verdict;
use super::{Change, HealthKind, HealthSpec, MonitorStatus, Monitors, Target};

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
    HealthSpec { kind, interval_ms: 50, timeout_ms: 2_000, fall: 3, rise: 2 }
}

fn target(id: u16, address: SocketAddr, kind: HealthKind) -> Target {
    Target { id, server: "web".to_owned(), address, spec: spec(kind) }
}

fn start(targets: Vec<Target>) -> (Monitors, mpsc::Receiver<Change>) {
    let (sender, receiver) = mpsc::channel();
    let sink = move |change| drop(sender.send(change));
    (Monitors::start(targets, Box::new(sink)).unwrap(), receiver)
}

fn next(changes: &mpsc::Receiver<Change>) -> Change {
    changes.recv_timeout(PATIENCE).expect("a verdict within a minute")
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
fn verdicts() {
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
        let mut verdict = Verdict::new();
        assert!(verdict.is_up() && !verdict.is_checked());
        let got: Vec<Option<bool>> = outcomes.chars().map(|it| verdict.take(it == '+', 3, 2)).collect();
        assert_eq!(got, reported, "{outcomes}");
        assert!(verdict.is_checked());
        assert_eq!(verdict.is_up(), reported.iter().flatten().next_back() == Some(&true));
    }
    let mut hasty = Verdict::new();
    let got: Vec<Option<bool>> = [true, false, true, false].map(|it| hasty.take(it, 1, 1)).into();
    assert_eq!(got, [Some(true), Some(false), Some(true), Some(false)]);
}

#[test]
fn http_answers() {
    let any = HttpCheck::new("/");
    let judge = |text: &str| any.judge(text.as_bytes());
    for open in
        ["", "H", "HTTP/1.", "HTTP/1.1 200 O", "HTTP/1.1 100 Continue\r\n", "HTTP/1.1 100 Continue\r\n\r\n"]
    {
        assert_eq!(judge(open), None, "{open:?}");
    }
    for good in [
        "HTTP/1.1 200 OK\r\n",
        "HTTP/1.0 204\r\n",
        "HTTP/1.1 302 Found\r\nLocation: /x\r\n\r\n",
        "HTTP/1.1 399 \n",
        "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: <a>\r\n\r\nHTTP/1.1 200 OK\r\n",
    ] {
        assert_eq!(judge(good), Some(Ok(())), "{good:?}");
    }
    for (bad, reason) in [
        ("HTTP/1.1 500 Oops\r\n", "HTTP status 500"),
        ("HTTP/1.1 404 Not Found\r\n", "HTTP status 404"),
        ("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 503 Busy\r\n", "HTTP status 503"),
        ("SSH-2.0-OpenSSH_9.6\r\n", "the answer is not HTTP"),
        ("SSH", "the answer is not HTTP"),
        ("HTTP/1.1 2000 OK\r\n", "the answer is not HTTP"),
        ("HTTP/1.1 +20 OK\r\n", "the answer is not HTTP"),
        ("HTTP/2.0 200 OK\r\n", "the answer is not HTTP"),
        ("HTTP/1.1 099 OK\r\n", "the answer is not HTTP"),
        ("HTTP/1.1\r\n", "the answer is not HTTP"),
        ("\r\n", "the answer is not HTTP"),
    ] {
        assert_eq!(judge(bad), Some(Err(reason.to_owned())), "{bad:?}");
    }
    let endless = format!("HTTP/1.1 200 {}", "x".repeat(20_000));
    assert!(matches!(judge(&endless), Some(Err(_))));
    let chosen = HttpCheck { statuses: vec![401, 500], ..HttpCheck::new("/") };
    assert_eq!(chosen.judge(b"HTTP/1.1 401 No\r\n"), Some(Ok(())));
    assert_eq!(chosen.judge(b"HTTP/1.1 200 OK\r\n"), Some(Err("HTTP status 200".to_owned())));
    let large = format!("HTTP/1.1 200 OK\r\n\r\n{}", "x".repeat(64 << 10));
    for (answer, whole) in [
        ("HTTP/1.1 200 OK\r\n", false),
        ("HTTP/1.1 200 OK\r\n\r\nuntil the end", false),
        ("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nab", false),
        ("HTTP/1.1 200 OK\r\nServer: x\r\ncontent-length:3\r\n\r\nabc", true),
        (
            "HTTP/1.1 103 Early\r\nContent-Length: 0\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n",
            false,
        ),
        ("HTTP/1.1 204 No\r\n\r\n", true),
        ("HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", false),
        ("nonsense", true),
        (large.as_str(), true),
    ] {
        assert_eq!(HttpCheck::is_whole(answer.as_bytes()), whole, "{answer:?}");
    }
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

proptest::proptest! {
    #[test]
    fn any_answer_is_judged(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200), cut in 0usize..200) {
        let mut answer = b"HTTP/1.1 100 C\r\n\r\n".get(cut % 19..).unwrap_or_default().to_vec();
        answer.extend(bytes);
        let _ = HttpCheck::new("/").judge(&answer);
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
    let named = HttpCheck { host: Some("www.example.com".to_owned()), ..check };
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
        HttpCheck { path: path.to_owned(), host: host.map(str::to_owned), statuses: statuses.to_vec() }
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
    let mut verdicts = [next(&changes), next(&changes)].map(|change| (change.id, change.up));
    verdicts.sort_unstable();
    assert_eq!(verdicts, [(1, true), (2, false)]);
    let before = status(&monitors, 1).unwrap().checks;
    monitors.update(vec![tcp(1, alive), tcp(3, dead)]);
    let freed = next(&changes);
    assert_eq!((freed.id, freed.up, freed.reason.as_str()), (2, true, "no longer monitored"));
    let added = next(&changes);
    assert_eq!((added.id, added.up), (3, false));
    assert!(status(&monitors, 1).unwrap().checks >= before, "a target that stays goes on");
    assert_eq!(monitors.statuses().iter().map(|status| status.id).collect::<Vec<_>>(), [1, 3]);
    // The same id elsewhere is another target.
    monitors.update(vec![tcp(3, alive)]);
    assert!(next(&changes).reason.contains("no longer"));
    let moved = next(&changes);
    assert_eq!((moved.id, moved.up), (3, true));
    // Another kind of check for the same target: what it says now counts, by rise and fall.
    let check = HealthKind::Http(HttpCheck::new("/"));
    let mut changed = target(3, alive, check);
    changed.spec.timeout_ms = 50;
    monitors.update(vec![changed]);
    assert!(!next(&changes).up, "it takes connections but does not answer");
    assert_eq!(status(&monitors, 3).unwrap().kind, "http");
    monitors.update(Vec::new());
    assert!(next(&changes).up);
    wait_until("no targets", || monitors.statuses().is_empty());
}

/// A thousand targets on one thread: half of them answer.
#[test]
fn a_thousand_targets() {
    let listener = TcpListener::bind("0.0.0.0:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let closed = address(7).port();
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let server = std::thread::spawn(move || {
        for stream in listener.incoming() {
            drop(stream);
            if stopped.load(Ordering::SeqCst) {
                break;
            }
        }
    });
    let targets = (0..1_000u16)
        .map(|id| {
            let host = Ipv4Addr::from_bits(0x7f20_0001 + u32::from(id));
            let address = SocketAddr::from((host, if id % 2 == 0 { port } else { closed }));
            let mut target = target(id, address, HealthKind::Tcp);
            (target.spec.interval_ms, target.spec.timeout_ms) = (600_000, 30_000);
            target
        })
        .collect();
    let (monitors, changes) = start(targets);
    let mut seen = vec![None; 1_000];
    for _ in 0..1_000 {
        let change = next(&changes);
        assert_eq!(seen[usize::from(change.id)].replace(change.up), None, "one verdict each");
    }
    assert!((0..).zip(&seen).all(|(id, up)| *up == Some(id % 2 == 0)));
    assert!(monitors.statuses().iter().all(|status| status.checks == 1));
    stop.store(true, Ordering::SeqCst);
    drop(TcpStream::connect(("127.0.0.1", port)));
    server.join().unwrap();
}
