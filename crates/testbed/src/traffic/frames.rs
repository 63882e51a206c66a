//! Long TCP connections: the client sends frames of random length, the server sends each back, the client compares.
//!
//! A frame is its length (32 bits, big endian) and [`super::pattern::body`]. The server's first frame, before the client has
//! sent anything, is its number (32 bits).

use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::thread::JoinHandle;

use fastrand::Rng;
use linux::clock::monotonic_ns;

use super::client::{Connection, Plan};
use super::pattern::body;
use super::tally::Tally;

/// Longest frame.
const FRAME_BYTES_MAX: usize = 256 * 1024;
/// Shortest frame a client sends.
const FRAME_BYTES_MIN: usize = 64;

/// Serves one connection: the handler of a [`super::service::Service`].
pub fn serve(mut stream: &TcpStream, number: u32) -> io::Result<()> {
    stream.write_all(&number.to_be_bytes())?;
    let mut frame = Vec::new();
    loop {
        let mut length = [0; 4];
        match stream.read_exact(&mut length) {
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(()),
            result => result?,
        }
        let bytes = u32::from_be_bytes(length) as usize;
        if bytes > FRAME_BYTES_MAX {
            return Err(ErrorKind::InvalidData.into());
        }
        frame.resize(4 + bytes, 0);
        let (head, rest) = frame.split_at_mut(4);
        head.copy_from_slice(&length);
        stream.read_exact(rest)?;
        stream.write_all(&frame)?;
    }
}

/// Starts a client that keeps one connection until it is told to end.
pub fn start(plan: Plan) -> anyhow::Result<JoinHandle<Tally>> {
    plan.spawn("frames-client", run)
}

fn run(plan: &Plan, tally: &mut Tally) {
    let mut random = Rng::with_seed(plan.seed);
    // A connection that broke is made anew: one failure must not hide the next.
    while !plan.is_over() {
        let begun_ns = monotonic_ns();
        let mut server = None;
        let mut connected = false;
        let result = plan.connect().and_then(|connection| {
            connected = true;
            tally.connections += 1;
            converse(plan, &connection, &mut random, &mut server, tally)
        });
        let Err(error) = result else { return };
        if plan.stop.is_raised() {
            return;
        }
        if error.kind() == ErrorKind::InvalidData {
            tally.corrupt += 1;
            tally.fault(|| format!("{} to {}: {error}", plan.node.name(), plan.to));
        } else if !plan.judge(tally, connected, server, begun_ns, &error) && !connected {
            tally.failed_requests += 1;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
}

fn converse(
    plan: &Plan,
    connection: &Connection,
    random: &mut Rng,
    server: &mut Option<u32>,
    tally: &mut Tally,
) -> io::Result<()> {
    let mut number = [0; 4];
    connection.read_exact(&mut number)?;
    let number = *server.insert(u32::from_be_bytes(number));
    let mut frame = Vec::with_capacity(4 + FRAME_BYTES_MAX);
    let mut back = vec![0; 4 + FRAME_BYTES_MAX];
    while !plan.is_over() {
        let spread = FRAME_BYTES_MAX as f64 / FRAME_BYTES_MIN as f64;
        let bytes = (FRAME_BYTES_MIN as f64 * spread.powf(random.f64())) as usize;
        let bytes = bytes.min(FRAME_BYTES_MAX);
        frame.clear();
        frame.extend_from_slice(&(bytes as u32).to_be_bytes());
        frame.extend_from_slice(body(random.u64(..), bytes));
        let begun_ns = monotonic_ns();
        connection.write_all(&frame)?;
        let room = back.get_mut(..frame.len()).unwrap_or_default();
        connection.read_exact(room)?;
        if *room != *frame {
            return Err(io::Error::new(ErrorKind::InvalidData, "a frame came back with other bytes"));
        }
        tally.answered(begun_ns, monotonic_ns(), 2 * bytes as u64, &plan.meter);
        *tally.answers.entry(number).or_default() += 1;
        std::thread::sleep(plan.think.mul_f64(random.f64()));
    }
    connection.finish()?;
    match connection.read(&mut back)? {
        0 => Ok(()),
        _ => Err(io::Error::new(ErrorKind::InvalidData, "bytes that nobody sent")),
    }
}
