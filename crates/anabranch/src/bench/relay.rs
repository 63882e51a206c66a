//! Bare relay: what a TUN device sends goes sealed to one UDP peer, and back. The least that any encrypted tunnel has to do on one
//! core, with the same ciphers and the same offloads as the bond: one super-packet is cut, sealed and sent with one call, and
//! opened and written with one. No paths, no order, no rate, no replay window; its key is public. `bench/relay.sh` compares.

use std::io::{ErrorKind, IoSlice, IoSliceMut};
use std::net::SocketAddr;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Args as ClapArgs;
use linux::event::{Epoll, Interest};
use linux::tun::{Tun, TunQueue};
use linux::udp::{RecvMeta, UdpOptions, UdpSocket};
use packet::vnet::VNET_HEADER_BYTES;
use tunnel::aead::{Aead, LaneKey, SEALED_OVERHEAD_BYTES};
use tunnel::header::{HEADER_BYTES, Header, Kind};

/// Bytes of a super-packet in each datagram: a datagram fills a path of 1,500 bytes.
const PIECE_BYTES: usize = 1_440;
/// A super-packet with its header, and a little.
const PACKET_BYTES_MAX: usize = 66_000;
/// Packets or batches of datagrams that are taken from one side before the other has its turn.
const BUDGET: usize = 64;
/// Batches of datagrams received with one call.
const BATCHES: usize = 8;
/// Token of the TUN device; the socket has the other.
const TUN: u64 = 0;
const SOCKET: u64 = 1;

/// Settings of the relay.
#[derive(ClapArgs)]
#[command(
    after_help = "Example: anabranch bench relay --tun t0 --local 192.0.2.1:5000 --remote 192.0.2.2:5000"
)]
pub struct Args {
    /// TUN device to make; give it an address, an MTU of 1400 and gso_max_size 60000.
    #[arg(long)]
    tun: String,
    /// Address and port of this end.
    #[arg(long)]
    local: SocketAddr,
    /// Address and port of the other end.
    #[arg(long)]
    remote: SocketAddr,
    /// ChaCha20-Poly1305 instead of AES-256-GCM.
    #[arg(long)]
    chacha: bool,
}

/// Relays until it is stopped.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let mut tun = Tun::create(&args.tun, 1)?;
    let queue = tun.take_queues().pop().context("a device without a queue")?;
    let socket = UdpSocket::bind(&UdpOptions::new(args.local))
        .with_context(|| format!("cannot listen on UDP {}", args.local))?;
    let epoll = Epoll::new()?;
    epoll.add(&queue, TUN, Interest::Read)?;
    epoll.add(&socket, SOCKET, Interest::Read)?;
    let mut relay = Relay::new(queue, socket, args);
    let mut ready = Vec::new();
    loop {
        epoll.wait(&mut ready, None)?;
        for event in &ready {
            match event.token {
                TUN => relay.send()?,
                _ => relay.receive()?,
            }
        }
    }
}

struct Relay {
    queue: TunQueue,
    socket: UdpSocket,
    remote: SocketAddr,
    /// Keys of both directions: this end's, the other's.
    keys: [LaneKey; 2],
    counter: u64,
    packet: Vec<u8>,
    datagrams: Vec<u8>,
    received: Vec<Vec<u8>>,
    /// A super-packet whose pieces came in more than one batch.
    begun: Vec<u8>,
}

impl Relay {
    fn new(queue: TunQueue, socket: UdpSocket, args: &Args) -> Self {
        let aead = if args.chacha { Aead::ChaCha20Poly1305 } else { Aead::Aes256Gcm };
        // Each direction has its own, by the order of the addresses.
        let (ours, theirs) = if args.local < args.remote { (1, 2) } else { (2, 1) };
        let keys = [ours, theirs].map(|core| LaneKey::derive(&[0x5a; 32], core, aead));
        Self {
            queue,
            socket,
            remote: args.remote,
            keys,
            counter: 0,
            packet: vec![0; PACKET_BYTES_MAX],
            datagrams: vec![0; 2 * PACKET_BYTES_MAX],
            received: vec![vec![0; PACKET_BYTES_MAX]; BATCHES],
            begun: Vec::with_capacity(PACKET_BYTES_MAX),
        }
    }

    /// Packets of the device, to the peer.
    fn send(&mut self) -> anyhow::Result<()> {
        for _ in 0..BUDGET {
            let bytes = match self.queue.read(&mut self.packet) {
                Ok(bytes) => bytes,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error).context("cannot read from the device"),
            };
            let mut end = 0;
            for (number, piece) in self.packet[..bytes].chunks(PIECE_BYTES).enumerate() {
                let datagram = &mut self.datagrams[end..end + piece.len() + SEALED_OVERHEAD_BYTES];
                datagram[HEADER_BYTES..][..piece.len()].copy_from_slice(piece);
                let header = Header {
                    kind: Kind::Data,
                    receiving_core: 0,
                    sending_core: 0,
                    // Whether a packet begins here.
                    path: u8::from(number > 0),
                    receiver_index: 0,
                    counter: self.counter,
                };
                self.keys[0].seal(&header, datagram);
                self.counter += 1;
                end += datagram.len();
            }
            let stride = PIECE_BYTES + SEALED_OVERHEAD_BYTES;
            // A full buffer or a peer that is not there yet is a loss, as on a wire.
            let _ = self.socket.send(self.remote, None, Some(stride), &self.datagrams[..end]);
        }
        Ok(())
    }

    /// Datagrams of the peer, to the device.
    fn receive(&mut self) -> anyhow::Result<()> {
        let Self { queue, socket, keys, received, begun, .. } = self;
        for _ in 0..BUDGET / BATCHES {
            let mut metas = [RecvMeta::default(); BATCHES];
            let mut buffers: Vec<IoSliceMut<'_>> =
                received.iter_mut().map(|buffer| IoSliceMut::new(buffer)).collect();
            let batches = match socket.recv(&mut buffers, &mut metas) {
                Ok(batches) => batches,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                // What a datagram met at the other end.
                Err(_) => continue,
            };
            for (buffer, meta) in received.iter_mut().zip(&metas[..batches]) {
                write_batch(queue, &keys[1], begun, &mut buffer[..meta.bytes], meta.stride.max(1));
            }
        }
        Ok(())
    }
}

/// Opens datagrams of `stride` bytes each and writes their packets.
fn write_batch(queue: &TunQueue, key: &LaneKey, begun: &mut Vec<u8>, datagrams: &mut [u8], stride: usize) {
    let mut pieces: Vec<IoSlice<'_>> = Vec::with_capacity(BUDGET);
    let mut bytes = 0;
    for datagram in datagrams.chunks_mut(stride) {
        let Ok(header) = Header::parse(datagram) else { continue };
        let Ok(plaintext) = key.open(&header, datagram) else { continue };
        if header.path == 0 {
            begun.clear();
            pieces.clear();
            bytes = 0;
        }
        bytes += plaintext.len();
        pieces.push(IoSlice::new(plaintext));
        let first: &[u8] = if begun.is_empty() { pieces.first().map_or(&[], |piece| piece) } else { begun };
        // A device that is down takes nothing.
        if begun.len() + bytes == packet_bytes(first) {
            if begun.is_empty() {
                let _ = queue.write_vectored(&pieces);
            } else {
                pieces.iter().for_each(|piece| begun.extend_from_slice(piece));
                let _ = queue.write(begun);
                begun.clear();
            }
            pieces.clear();
            bytes = 0;
        }
    }
    if begun.len() + bytes <= PACKET_BYTES_MAX {
        pieces.iter().for_each(|piece| begun.extend_from_slice(piece));
    }
}

/// Bytes of a packet with its offload header, by its beginning; 0: it does not tell.
fn packet_bytes(first: &[u8]) -> usize {
    let Some(packet) = first.get(VNET_HEADER_BYTES..).and_then(<[u8]>::first_chunk::<6>) else { return 0 };
    let field = |at: usize| usize::from(u16::from_be_bytes([packet[at], packet[at + 1]]));
    match packet[0] >> 4 {
        4 => VNET_HEADER_BYTES + field(2),
        6 => VNET_HEADER_BYTES + 40 + field(4),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_tells_its_length() {
        let mut first = vec![0; VNET_HEADER_BYTES + 40];
        first[VNET_HEADER_BYTES..][..4].copy_from_slice(&[0x45, 0, 0x12, 0x34]);
        assert_eq!(packet_bytes(&first), VNET_HEADER_BYTES + 0x1234);
        first[VNET_HEADER_BYTES..][..6].copy_from_slice(&[0x60, 0, 0, 0, 1, 0]);
        assert_eq!(packet_bytes(&first), VNET_HEADER_BYTES + 40 + 256);
        first[VNET_HEADER_BYTES] = 0;
        assert_eq!(packet_bytes(&first), 0);
        assert_eq!(packet_bytes(&first[..12]), 0);
    }
}
