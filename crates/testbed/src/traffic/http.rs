//! HTTP/1.1 as RFC 9112 has it, as far as a server of known bodies and its clients need: `GET /bytes/LENGTH/SEED`.
//!
//! The body is [`super::pattern::body`] of that seed; the client compares every byte. The server says its number in
//! the header field `X-Server`, so that the client knows whom it spoke to.

use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::ops::RangeInclusive;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use fastrand::Rng;
use linux::clock::monotonic_ns;

use super::client::{Connection, Plan, RETRY_MAX};
use super::pattern::{BODY_BYTES_MAX, body};
use super::tally::Tally;

/// Longest head of a request or an answer.
const HEAD_BYTES_MAX: usize = 8 * 1024;

/// How a client asks.
#[derive(Clone, Debug)]
pub struct Options {
    /// Bytes of a body; sizes are spread evenly over their magnitudes.
    pub bytes: RangeInclusive<usize>,
    /// Requests of one connection. After the last the server is told to close it.
    pub requests_per_connection: RangeInclusive<u64>,
}

impl Default for Options {
    /// 100 B to 1 MB; one to forty requests.
    fn default() -> Self {
        Self { bytes: 100..=1_000_000, requests_per_connection: 1..=40 }
    }
}

/// Serves one connection: the handler of a [`super::service::Service`].
pub fn serve(mut stream: &TcpStream, number: u32) -> io::Result<()> {
    let mut buffer = Vec::new();
    loop {
        let Some(head) = read_head(&mut buffer, |more| stream.read(more))? else { return Ok(()) };
        let (answer, keep) = answer(&head, number);
        stream.write_all(answer.head.as_bytes())?;
        stream.write_all(answer.body)?;
        if !keep {
            return Ok(());
        }
    }
}

struct Answer {
    head: String,
    body: &'static [u8],
}

/// Answer to a request, and whether the connection goes on.
fn answer(head: &str, number: u32) -> (Answer, bool) {
    let keep = !field(head, "connection").is_some_and(|value| value.eq_ignore_ascii_case("close"));
    let mut words = head.lines().next().unwrap_or_default().split(' ');
    let (method, path, version) = (words.next(), words.next().unwrap_or_default(), words.next());
    let good = method == Some("GET") && version == Some("HTTP/1.1") && field(head, "host").is_some();
    let wanted = parse_path(path).filter(|_| good);
    let (status, body, keep) = match wanted {
        Some((bytes, seed)) => ("200 OK", body(seed, bytes), keep),
        None if good && path == "/health" => ("200 OK", &b"ok\n"[..], keep),
        None if good => ("404 Not Found", &b"not found\n"[..], keep),
        None => ("400 Bad Request", &b"bad request\n"[..], false),
    };
    let connection = if keep { "keep-alive" } else { "close" };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Length: {}\r\nContent-Type: application/octet-stream\r\nX-Server: {number}\r\n\
         Connection: {connection}\r\n\r\n",
        body.len()
    );
    (Answer { head, body }, keep)
}

fn parse_path(path: &str) -> Option<(usize, u64)> {
    let (bytes, seed) = path.strip_prefix("/bytes/")?.split_once('/')?;
    let bytes = bytes.parse().ok().filter(|bytes| *bytes <= BODY_BYTES_MAX)?;
    Some((bytes, seed.parse().ok()?))
}

/// Reads until the empty line; what follows stays in the buffer. `None`: the other side closed before the first byte.
fn read_head(
    buffer: &mut Vec<u8>,
    mut read: impl FnMut(&mut [u8]) -> io::Result<usize>,
) -> io::Result<Option<String>> {
    loop {
        if let Some(at) = buffer.windows(4).position(|four| four == b"\r\n\r\n") {
            let rest = buffer.split_off(at + 4);
            let head = std::mem::replace(buffer, rest);
            let head = String::from_utf8(head).map_err(|_| bad("the head is no text"))?;
            return Ok(Some(head));
        }
        if buffer.len() > HEAD_BYTES_MAX {
            return Err(bad("the head does not end"));
        }
        let mut more = [0; 4096];
        let count = read(&mut more)?;
        if count == 0 {
            return if buffer.is_empty() { Ok(None) } else { Err(ErrorKind::UnexpectedEof.into()) };
        }
        buffer.extend_from_slice(more.get(..count).unwrap_or_default());
    }
}

/// A field of a head; names are compared without case.
fn field<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    let fields = head.lines().skip(1).filter_map(|line| line.split_once(':'));
    fields.filter(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim()).next()
}

fn bad(text: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, text)
}

/// Starts a client that asks one request after the other.
pub fn start(plan: Plan, options: Options) -> anyhow::Result<JoinHandle<Tally>> {
    plan.spawn("http-client", move |plan, tally| Client::new(plan, &options).run(tally))
}

struct Client<'a> {
    plan: &'a Plan,
    options: &'a Options,
    random: Rng,
    line: Option<Line>,
    scratch: Vec<u8>,
}

/// A connection and what is known about it.
struct Line {
    connection: Connection,
    /// Bytes that came behind the last answer.
    buffer: Vec<u8>,
    server: Option<u32>,
    begun_ns: u64,
    requests_left: u64,
}

/// Why a try failed.
enum Failure {
    /// No connection was made; when it was begun.
    Connect(u64, io::Error),
    /// The connection broke.
    Broken(io::Error),
    /// The answer is wrong.
    Wrong(String),
}

impl<'a> Client<'a> {
    fn new(plan: &'a Plan, options: &'a Options) -> Self {
        let random = Rng::with_seed(plan.seed);
        Self { plan, options, random, line: None, scratch: vec![0; 256 * 1024] }
    }

    fn run(&mut self, tally: &mut Tally) {
        while !self.plan.is_over() {
            let bytes = self.size();
            let seed = self.random.u64(..);
            self.request(bytes, seed, tally);
            let pause = self.plan.think.mul_f64(self.random.f64());
            if !pause.is_zero() {
                std::thread::sleep(pause);
            }
        }
    }

    /// Evenly over the magnitudes: as many of 100 B to 1 kB as of 100 kB to 1 MB.
    fn size(&mut self) -> usize {
        let (low, high) = (*self.options.bytes.start() as f64, *self.options.bytes.end() as f64);
        let (low, high) = (low.max(1.0), high.max(1.0));
        (low * (high / low).powf(self.random.f64())).round() as usize
    }

    /// One request with all its tries.
    fn request(&mut self, bytes: usize, seed: u64, tally: &mut Tally) {
        let begun_ns = monotonic_ns();
        let end = Instant::now() + RETRY_MAX;
        loop {
            let failure = match self.attempt(bytes, seed, tally) {
                Ok(()) => {
                    return tally.answered(begun_ns, monotonic_ns(), bytes as u64, &self.plan.meter);
                }
                Err(failure) => failure,
            };
            if self.plan.stop.is_raised() {
                return;
            }
            let line = self.line.take();
            let excused = match failure {
                Failure::Connect(at_ns, error) => self.plan.judge(tally, false, None, at_ns, &error),
                Failure::Broken(error) => {
                    let (server, at_ns) = line.map_or((None, begun_ns), |line| (line.server, line.begun_ns));
                    self.plan.judge(tally, true, server, at_ns, &error)
                }
                Failure::Wrong(text) => {
                    tally.corrupt += 1;
                    tally.fault(|| format!("{} from {}: {text}", self.plan.to, self.plan.node.name()));
                    false
                }
            };
            if !excused || Instant::now() >= end {
                tally.failed_requests += 1;
                if excused {
                    tally.fault(|| format!("a request to {} had no answer after all tries", self.plan.to));
                }
                return;
            }
            tally.retries += 1;
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn attempt(&mut self, bytes: usize, seed: u64, tally: &mut Tally) -> Result<(), Failure> {
        let mut line = match self.line.take() {
            Some(line) => line,
            None => self.connect(tally)?,
        };
        let result = exchange(&mut line, self.plan, &mut self.scratch, bytes, seed, tally);
        let again = matches!(result, Ok(true) | Err(_));
        // A broken one too: whoever judges wants to know it.
        self.line = Some(line).filter(|_| again);
        result.map(drop)
    }

    fn connect(&mut self, tally: &mut Tally) -> Result<Line, Failure> {
        let begun_ns = monotonic_ns();
        let range = &self.options.requests_per_connection;
        let span = range.end().saturating_sub(*range.start()).saturating_add(1);
        let requests_left = range.start().saturating_add(self.random.u64(..span)).max(1);
        let connection = self.plan.connect().map_err(|error| Failure::Connect(begun_ns, error))?;
        tally.connections += 1;
        Ok(Line { connection, buffer: Vec::new(), server: None, begun_ns, requests_left })
    }
}

/// One request and its answer; whether the connection goes on.
fn exchange(
    line: &mut Line,
    plan: &Plan,
    scratch: &mut [u8],
    bytes: usize,
    seed: u64,
    tally: &mut Tally,
) -> Result<bool, Failure> {
    line.requests_left -= 1;
    let keep = line.requests_left > 0;
    let connection = if keep { "keep-alive" } else { "close" };
    let request = format!(
        "GET /bytes/{bytes}/{seed} HTTP/1.1\r\nHost: {}\r\nConnection: {connection}\r\n\r\n",
        plan.to
    );
    line.connection.write_all(request.as_bytes()).map_err(Failure::Broken)?;
    let head = read_head(&mut line.buffer, |more| line.connection.read(more)).map_err(Failure::Broken)?;
    let Some(head) = head else { return Err(Failure::Broken(ErrorKind::UnexpectedEof.into())) };
    let server = field(&head, "x-server").and_then(|number| number.parse().ok());
    if line.server.is_some() && line.server != server {
        let text = format!("server {:?} answers on a connection to {server:?}", line.server);
        return Err(Failure::Wrong(text));
    }
    line.server = server;
    if !head.starts_with("HTTP/1.1 200 ") {
        return Err(Failure::Wrong(format!("answered {:?}", head.lines().next().unwrap_or_default())));
    }
    let length = field(&head, "content-length").and_then(|length| length.parse().ok());
    if length != Some(bytes) {
        return Err(Failure::Wrong(format!("{bytes} bytes were asked for, {length:?} came")));
    }
    compare(line, scratch, body(seed, bytes))?;
    if let Some(server) = server {
        *tally.answers.entry(server).or_default() += 1;
    }
    if keep {
        return Ok(true);
    }
    match line.connection.read(scratch) {
        Ok(0) => Ok(false),
        Ok(_) => Err(Failure::Wrong("bytes behind the end of the answer".to_owned())),
        Err(error) => Err(Failure::Broken(error)),
    }
}

fn compare(line: &mut Line, scratch: &mut [u8], mut expected: &[u8]) -> Result<(), Failure> {
    let have = line.buffer.len().min(expected.len());
    let early: Vec<u8> = line.buffer.drain(..have).collect();
    let mut check = |bytes: &[u8]| match expected.split_at_checked(bytes.len()) {
        Some((head, rest)) if head == bytes => {
            expected = rest;
            Ok(expected.len())
        }
        _ => Err(Failure::Wrong("the body has other bytes than it should".to_owned())),
    };
    let mut left = check(&early)?;
    while left > 0 {
        let room = left.min(scratch.len());
        let place = scratch.get_mut(..room).unwrap_or_default();
        let read = line.connection.read(place).map_err(Failure::Broken)?;
        if read == 0 {
            return Err(Failure::Broken(ErrorKind::UnexpectedEof.into()));
        }
        left = check(scratch.get(..read).unwrap_or_default())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn status(request: &str) -> (String, usize, bool) {
        let (answer, keep) = answer(request, 7);
        (answer.head.lines().next().unwrap().to_owned(), answer.body.len(), keep)
    }

    #[test]
    fn the_server_answers_what_it_is_asked() {
        let get = |path: &str, more: &str| status(&format!("GET {path} HTTP/1.1\r\nhost: a\r\n{more}\r\n"));
        assert_eq!(get("/bytes/1234/5", ""), ("HTTP/1.1 200 OK".to_owned(), 1_234, true));
        assert_eq!(get("/bytes/0/5", "Connection: Close\r\n").1, 0);
        assert!(!get("/bytes/0/5", "Connection: Close\r\n").2);
        assert!(get("/health", "").0.contains("200"));
        for path in ["/", "/bytes/2000000/1", "/bytes/1", "/bytes/x/1", "/bytes/1/x", "/bytes/-1/1"] {
            assert!(get(path, "").0.contains("404"), "{path}");
        }
        for request in
            ["", "\r\n\r\n", "GET /bytes/1/1 HTTP/1.1\r\n\r\n", "PUT / HTTP/1.1\r\nhost: a\r\n\r\n"]
        {
            let (line, _, keep) = status(request);
            assert!(line.contains("400") && !keep, "{request:?}");
        }
    }

    #[test]
    fn a_head_ends_at_the_empty_line() {
        let mut pieces = vec![&b"lo: x\r\n\r\nrest"[..], b"GET / HTTP/1.1\r\nhel"];
        let mut read = |to: &mut [u8]| {
            let piece = pieces.pop().unwrap_or_default();
            to[..piece.len()].copy_from_slice(piece);
            Ok(piece.len())
        };
        let mut buffer = Vec::new();
        let head = read_head(&mut buffer, &mut read).unwrap().unwrap();
        assert_eq!(field(&head, "Hello"), Some("x"));
        assert_eq!(buffer, b"rest");
        assert!(read_head(&mut buffer, &mut read).is_err());
        assert!(read_head(&mut Vec::new(), |_| Ok(0)).unwrap().is_none());
        assert!(read_head(&mut Vec::new(), |to| Ok(to.len())).is_err());
    }
}
