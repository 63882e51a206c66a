//! Datagrams as they are on the wire: seen on an interface, changed, sent again.

use std::net::Ipv4Addr;
use std::sync::atomic::Ordering;
use std::time::Duration;

use linux::packet_socket::PacketSocket;
use testbed::topology::Node;

use crate::scene::Background;

const ETHERNET: usize = 14;
/// Ethernet, IPv4 without options, UDP: what stands in front of a datagram's payload.
pub const HEADERS: usize = ETHERNET + 20 + 8;

/// Keeps a copy of every IPv4 UDP frame that arrives on an interface, up to a limit.
pub struct Capture(Background<Vec<Vec<u8>>>);

impl Capture {
    /// Starts to listen on an interface of a node; keeps `limit` frames at most.
    pub fn start(place: &Node, interface: &str, limit: usize) -> Self {
        let socket = place.run(|| PacketSocket::open(interface, false, true)).unwrap().unwrap();
        socket.set_buffers(8 << 20).unwrap();
        Self(Background::start(move |end| {
            let (mut frames, mut buffer) = (Vec::new(), vec![0; 65_536]);
            loop {
                match socket.receive(&mut buffer) {
                    Ok(length) if frames.len() < limit && is_udp(&buffer[..length]) => {
                        frames.push(buffer[..length].to_vec());
                    }
                    Ok(_) => {}
                    Err(_) if end.load(Ordering::Relaxed) => return frames,
                    Err(_) => std::thread::sleep(Duration::from_millis(1)),
                }
            }
        }))
    }

    /// Ends it and gives what was seen.
    pub fn finish(self) -> Vec<Vec<u8>> {
        self.0.finish()
    }
}

fn is_udp(frame: &[u8]) -> bool {
    frame.len() > HEADERS && frame[12..14] == [8, 0] && frame[ETHERNET] == 0x45 && frame[ETHERNET + 9] == 17
}

/// The UDP datagram's payload.
pub fn payload(frame: &[u8]) -> &[u8] {
    &frame[HEADERS..]
}

/// The same frame with this payload: lengths and IPv4 checksum are right, the UDP checksum is left out (a captured one may not
/// be finished).
pub fn with_payload(frame: &[u8], payload: &[u8]) -> Vec<u8> {
    let mut changed = frame[..HEADERS].to_vec();
    changed.extend_from_slice(payload);
    let udp = u16::try_from(8 + payload.len()).unwrap();
    changed[ETHERNET + 2..ETHERNET + 4].copy_from_slice(&(20 + udp).to_be_bytes());
    changed[ETHERNET + 24..ETHERNET + 26].copy_from_slice(&udp.to_be_bytes());
    changed[ETHERNET + 26..ETHERNET + 28].copy_from_slice(&[0, 0]);
    seal_ip(changed)
}

/// The same frame from another source address, as an attacker elsewhere would send it.
pub fn from_address(frame: &[u8], address: Ipv4Addr, port: u16) -> Vec<u8> {
    let mut changed = frame.to_vec();
    changed[ETHERNET + 12..ETHERNET + 16].copy_from_slice(&address.octets());
    changed[ETHERNET + 20..ETHERNET + 22].copy_from_slice(&port.to_be_bytes());
    changed[ETHERNET + 26..ETHERNET + 28].copy_from_slice(&[0, 0]);
    seal_ip(changed)
}

fn seal_ip(mut frame: Vec<u8>) -> Vec<u8> {
    let header = &mut frame[ETHERNET..ETHERNET + 20];
    header[10..12].copy_from_slice(&[0, 0]);
    let checksum = packet::checksum::finish(packet::checksum::sum(header, 0));
    header[10..12].copy_from_slice(&checksum.to_be_bytes());
    frame
}

/// Sends frames out of an interface of a node, at a pace that no queue overflows. Gives how many the kernel took.
pub fn inject(place: &Node, interface: &str, frames: &[Vec<u8>]) -> u64 {
    let socket = place.run(|| PacketSocket::open(interface, false, false)).unwrap().unwrap();
    let mut sent = 0;
    for (number, frame) in frames.iter().enumerate() {
        sent += u64::from(socket.send(frame).is_ok());
        if number % 32 == 31 {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
    sent
}
