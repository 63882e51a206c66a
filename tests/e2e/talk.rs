//! A conversation: datagrams of one size at one pace, whose order, delay and copies are noted at the other end.

use std::net::UdpSocket;
use std::time::{Duration, Instant};

use linux::clock::monotonic_ns;
use rustix::net::sockopt::set_ip_tos;
use testbed::topology::Node;

use crate::scene::{Background, socket, udp_socket};

/// Bytes of RTP's header (RFC 3550), number and time of sending.
const HEAD_BYTES: usize = 28;

/// Datagrams that one side sends.
#[derive(Clone, Copy)]
pub struct Talk {
    pub port: u16,
    pub bytes: usize,
    pub gap: Duration,
    pub seconds: f64,
    pub dscp: u8,
    /// The datagrams look like RTP.
    pub rtp: bool,
}

/// Datagrams as the other side heard them.
#[derive(Clone, Debug, Default)]
pub struct Heard {
    pub sent: u64,
    pub received: u64,
    pub copies: u64,
    pub reordered: u64,
    pub p99_ms: f64,
    pub longest_gap_ms: f64,
}

impl Talk {
    /// 200 datagrams a second of 1,000 bytes, too large and too many to be sparse.
    pub fn new(port: u16, seconds: f64) -> Self {
        Self { port, bytes: 1_000, gap: Duration::from_millis(5), seconds, dscp: 0, rtp: false }
    }

    /// Starts to talk; 1.5 s after the end nothing is expected any more.
    pub fn start(self, from: &Node, to: &Node, address: &str) -> Background<Heard> {
        let address = socket(address, self.port);
        let far = udp_socket(to, address);
        far.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let near = from.run(|| UdpSocket::bind("0.0.0.0:0")).unwrap().unwrap();
        near.connect(address).unwrap();
        set_ip_tos(&near, self.dscp << 2).unwrap();
        let sender = std::thread::spawn(move || self.send(&near));
        Background::start(move |_| {
            let mut heard = listen(&far, self.seconds + 1.5);
            heard.sent = sender.join().unwrap();
            heard
        })
    }

    fn send(self, near: &UdpSocket) -> u64 {
        let (start, mut number) = (Instant::now(), 0u64);
        let mut datagram = vec![0x17; self.bytes];
        while start.elapsed().as_secs_f64() < self.seconds {
            if self.rtp {
                datagram[..2].copy_from_slice(&[0x80, 96]);
                datagram[2..4].copy_from_slice(&(number as u16).to_be_bytes());
            } else {
                datagram[..4].fill(0x17);
            }
            datagram[12..20].copy_from_slice(&number.to_be_bytes());
            datagram[20..HEAD_BYTES].copy_from_slice(&monotonic_ns().to_be_bytes());
            if near.send(&datagram).is_ok() {
                number += 1;
            }
            let next = self.gap * u32::try_from(number).unwrap();
            std::thread::sleep(next.saturating_sub(start.elapsed()));
        }
        number
    }
}

fn listen(far: &UdpSocket, seconds: f64) -> Heard {
    let (start, mut heard) = (Instant::now(), Heard::default());
    let (mut seen, mut newest, mut delays, mut last) = (Vec::new(), None, Vec::new(), None);
    let mut buffer = [0; 2_000];
    while start.elapsed().as_secs_f64() < seconds {
        let Ok(length) = far.recv(&mut buffer) else { continue };
        assert!(length >= HEAD_BYTES);
        let field = |at: usize| u64::from_be_bytes(buffer[at..at + 8].try_into().unwrap());
        let (number, now) = (field(12), monotonic_ns());
        let place = usize::try_from(number).unwrap();
        seen.resize(seen.len().max(place + 1), false);
        if std::mem::replace(&mut seen[place], true) {
            heard.copies += 1;
            continue;
        }
        heard.received += 1;
        heard.reordered += u64::from(newest.is_some_and(|newest| number < newest));
        newest = newest.max(Some(number));
        delays.push((now - field(20)) as f64 / 1e6);
        let gap_ms = last.map_or(0.0, |last| (now - last) as f64 / 1e6);
        heard.longest_gap_ms = heard.longest_gap_ms.max(gap_ms);
        last = Some(now);
    }
    delays.sort_by(f64::total_cmp);
    heard.p99_ms = delays.get(delays.len() * 99 / 100).copied().unwrap_or(0.0);
    heard
}
