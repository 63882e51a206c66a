//! Questions and answers of the domain name system over UDP (RFC 1035, section 4; AAAA: RFC 3596).
//!
//! The server knows every name: the address is computed from it ([`address4`], [`address6`]), so that the client can check the
//! answer. Each question has a socket of its own, as a resolver has it: many short flows.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context;
use fastrand::Rng;
use linux::clock::monotonic_ns;

use super::client::Plan;
use super::pattern::checksum;
use super::tally::Tally;
use crate::topology::Node;

/// A question is asked again after this time.
const PATIENCE: Duration = Duration::from_millis(1_000);
/// How often a question is asked at most.
const TRIES: u32 = 4;
const MESSAGE_BYTES_MAX: usize = 512;
const HEAD_BYTES: usize = 12;
const TYPE_A: u16 = 1;
const TYPE_AAAA: u16 = 28;
const CLASS_IN: u16 = 1;
/// Answer, recursion desired and available, no error.
const FLAGS_ANSWER: u16 = 0x8180;
const FLAGS_QUESTION: u16 = 0x0100;

/// Time to live in answers, seconds.
const TTL: u32 = 60;

/// Address of a name (its labels as they stand in the message).
#[must_use]
pub fn address4(name: &[u8]) -> Ipv4Addr {
    (checksum(4, name) as u32).into()
}

/// IPv6 address of a name.
#[must_use]
pub fn address6(name: &[u8]) -> Ipv6Addr {
    ((u128::from(checksum(6, name)) << 64) | u128::from(checksum(7, name))).into()
}

/// A running name server. It ends when this is dropped.
pub struct Server {
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Answers on `address` in `node`.
    pub fn start(node: &Node, address: SocketAddr) -> anyhow::Result<Server> {
        let socket = node
            .run(|| UdpSocket::bind(address))?
            .with_context(|| format!("cannot bind UDP {address} in {}", node.name()))?;
        socket.set_read_timeout(Some(Duration::from_millis(100)))?;
        let end = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&end);
        let run = move || {
            let mut buffer = [0; MESSAGE_BYTES_MAX];
            while !flag.load(Ordering::Relaxed) {
                let Ok((read, from)) = socket.recv_from(&mut buffer) else { continue };
                if let Some(answer) = buffer.get(..read).and_then(answer) {
                    let _ = socket.send_to(&answer, from);
                }
            }
        };
        let thread = std::thread::Builder::new().name("dns-server".into()).spawn(run)?;
        Ok(Server { end, thread: Some(thread) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn u16_at(message: &[u8], at: usize) -> Option<u16> {
    let bytes: [u8; 2] = message.get(at..at.checked_add(2)?)?.try_into().ok()?;
    Some(u16::from_be_bytes(bytes))
}

/// The name at the start of the question: where it ends. Names are not compressed there.
fn name_end(message: &[u8]) -> Option<usize> {
    let mut at = HEAD_BYTES;
    loop {
        let length = usize::from(*message.get(at)?);
        at += 1;
        match length {
            0 => return Some(at),
            1..=63 => at += length,
            _ => return None,
        }
    }
}

fn question(id: u16, name: &str, kind: u16) -> Vec<u8> {
    let mut message = Vec::with_capacity(64);
    for word in [id, FLAGS_QUESTION, 1, 0, 0, 0] {
        message.extend_from_slice(&word.to_be_bytes());
    }
    for label in name.split('.') {
        message.push(label.len() as u8);
        message.extend_from_slice(label.as_bytes());
    }
    message.push(0);
    message.extend_from_slice(&kind.to_be_bytes());
    message.extend_from_slice(&CLASS_IN.to_be_bytes());
    message
}

/// Answer to a question; `None` when it is none.
fn answer(message: &[u8]) -> Option<Vec<u8>> {
    let flags = u16_at(message, 2)?;
    if flags & 0xf800 != 0 || u16_at(message, 4)? != 1 {
        return None;
    }
    let end = name_end(message)?;
    let name = message.get(HEAD_BYTES..end)?;
    let kind = u16_at(message, end)?;
    if u16_at(message, end + 2)? != CLASS_IN {
        return None;
    }
    let address: Vec<u8> = match kind {
        TYPE_A => address4(name).octets().to_vec(),
        TYPE_AAAA => address6(name).octets().to_vec(),
        _ => return None,
    };
    let mut reply = Vec::with_capacity(end + 4 + 12 + address.len());
    for word in [u16_at(message, 0)?, FLAGS_ANSWER, 1, 1, 0, 0] {
        reply.extend_from_slice(&word.to_be_bytes());
    }
    reply.extend_from_slice(message.get(HEAD_BYTES..end + 4)?);
    // The name again: a pointer to the question's.
    reply.extend_from_slice(&(0xc000 | HEAD_BYTES as u16).to_be_bytes());
    reply.extend_from_slice(&kind.to_be_bytes());
    reply.extend_from_slice(&CLASS_IN.to_be_bytes());
    reply.extend_from_slice(&TTL.to_be_bytes());
    reply.extend_from_slice(&(address.len() as u16).to_be_bytes());
    reply.extend_from_slice(&address);
    Some(reply)
}

/// Checks an answer; `Ok(false)` when it belongs to another question.
fn check(question: &[u8], reply: &[u8]) -> Result<bool, String> {
    if question.get(..2) != reply.get(..2) {
        return Ok(false);
    }
    let expected = answer(question).unwrap_or_default();
    if reply == expected {
        return Ok(true);
    }
    Err(format!("an answer of {} bytes is not the {} it should be", reply.len(), expected.len()))
}

/// Starts a client that asks one name after the other.
pub fn start(plan: Plan) -> anyhow::Result<JoinHandle<Tally>> {
    plan.spawn("dns-client", |plan, tally| {
        let mut random = Rng::with_seed(plan.seed);
        while !plan.is_over() {
            let id = random.u64(..) as u16;
            let name = format!("host-{}.{}.example.net", random.u64(..1_000_000), random.u64(..1_000));
            let kind = if random.f64() < 0.5 { TYPE_A } else { TYPE_AAAA };
            ask(plan, &question(id, &name, kind), tally);
            std::thread::sleep(plan.think.mul_f64(random.f64()));
        }
    })
}

fn ask(plan: &Plan, question: &[u8], tally: &mut Tally) {
    let begun_ns = monotonic_ns();
    for attempt in 0..TRIES {
        if attempt > 0 {
            tally.retries += 1;
        }
        match try_once(plan, question) {
            Ok(true) => {
                let bytes = question.len() as u64;
                return tally.answered(begun_ns, monotonic_ns(), bytes, &plan.meter);
            }
            _ if plan.stop.is_raised() => return,
            Ok(false) => {}
            Err(text) => {
                tally.corrupt += 1;
                return tally.fault(|| format!("DNS from {}: {text}", plan.to));
            }
        }
    }
    tally.failed_requests += 1;
    tally.fault(|| format!("{} has no answer from {} to {TRIES} DNS questions", plan.node.name(), plan.to));
}

/// Asks with a socket of its own; false when no answer came.
fn try_once(plan: &Plan, question: &[u8]) -> Result<bool, String> {
    let any =
        if plan.to.is_ipv4() { IpAddr::V4(Ipv4Addr::UNSPECIFIED) } else { IpAddr::V6(Ipv6Addr::UNSPECIFIED) };
    let open = || {
        let socket = UdpSocket::bind(SocketAddr::new(plan.from.unwrap_or(any), 0))?;
        socket.connect(plan.to)?;
        socket.set_read_timeout(Some(Duration::from_millis(200)))?;
        socket.send(question)?;
        Ok(socket)
    };
    // A refused question is one without an answer.
    let Ok::<_, std::io::Error>(socket) = open() else {
        std::thread::sleep(Duration::from_millis(50));
        return Ok(false);
    };
    let end = Instant::now() + PATIENCE;
    let mut buffer = [0; MESSAGE_BYTES_MAX];
    while Instant::now() < end && !plan.stop.is_raised() {
        if let Ok(read) = socket.recv(&mut buffer)
            && check(question, buffer.get(..read).unwrap_or_default())?
        {
            return Ok(true);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn a_question_is_answered_and_the_answer_checked() {
        // Bytes as RFC 1035 has them: id 0x1234, RD, one question, "a.bc", A, IN.
        let asked = question(0x1234, "a.bc", TYPE_A);
        assert_eq!(asked, b"\x12\x34\x01\x00\0\x01\0\0\0\0\0\0\x01a\x02bc\0\0\x01\0\x01");
        let mut reply = answer(&asked).unwrap();
        assert_eq!(reply[..12], *b"\x12\x34\x81\x80\0\x01\0\x01\0\0\0\0");
        assert_eq!(reply[22..28], *b"\xc0\x0c\0\x01\0\x01");
        assert_eq!(reply[reply.len() - 6..reply.len() - 4], [0, 4]);
        assert_eq!(check(&asked, &reply), Ok(true));
        assert_eq!(check(&question(1, "a.bc", TYPE_A), &reply), Ok(false));
        *reply.last_mut().unwrap() ^= 1;
        assert!(check(&asked, &reply).is_err());
        assert_eq!(answer(&question(1, "a", TYPE_AAAA)).unwrap().len(), 12 + 7 + 12 + 16);
    }

    #[test]
    fn what_is_no_question_is_not_answered() {
        let good = question(1, "host.example.net", TYPE_A);
        for length in 0..good.len() {
            assert_eq!(answer(&good[..length]), None, "{length}");
        }
        assert_eq!(answer(&answer(&good).unwrap()), None);
        let mut long = good.clone();
        long[HEAD_BYTES] = 0xc0;
        assert_eq!(answer(&long), None);
    }
}
