//! One connection: datagrams of the UDP socket go into the stream, those of the stream to the UDP socket.

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use linux::event::Interest;
use rustls::Connection as Tls;

use crate::framing::{DATAGRAM_BYTES_MAX, Deframer, frame};

/// Time until a connection has to be made, TLS included.
pub const HANDSHAKE: Duration = Duration::from_secs(5);

/// Time until the node has to have spoken, under keys of a session, to whoever connected: else it is a stranger.
pub const SESSION: Duration = Duration::from_secs(15);

/// First kind of a datagram that is sealed in a session (`docs/wire.md` §1); it stands in the low bits of the first byte.
const SEALED_KIND: u8 = 4;

/// Time without a byte from the peer after which a connection is over: the tunnel's keepalives come far more often.
pub const SILENCE: Duration = Duration::from_secs(90);

/// Datagrams that one turn takes from the UDP socket.
const DATAGRAMS_A_TURN: usize = 64;

/// Bytes after which a turn takes no more of them.
const NODE_BYTES_A_TURN: usize = 128 << 10;

/// Bytes that one turn takes from the stream.
const STREAM_BYTES_A_TURN: usize = 256 << 10;

/// Room of the UDP socket for what the node sends while the stream takes nothing: what does not fit is lost, which the tunnel
/// sees at once, where a longer queue would only cost time.
const UDP_BYTES: usize = 256 << 10;

/// Whom the node's datagrams come from and go to, on the loopback interface.
enum Node {
    /// It listens: one address for all.
    Listens,
    /// It dials from a socket for each of its cores: their ports, by core, and the last that was heard.
    Dials { ports: Box<[u16; 256]>, last: u16 },
}

impl Node {
    /// Port to which a datagram from the peer goes; its receiving core stands in its second byte. `None`: nobody was heard yet.
    fn port(&self, datagram: &[u8]) -> Option<u16> {
        let Node::Dials { ports, last } = self else { return None };
        let own = datagram.get(1).and_then(|core| ports.get(usize::from(*core)).copied());
        own.filter(|port| *port != 0).or(Some(*last)).filter(|port| *port != 0)
    }

    /// Notes from where a datagram of the node came; its sending core stands in its third byte.
    fn note(&mut self, datagram: &[u8], port: u16) {
        let Node::Dials { ports, last } = self else { return };
        *last = port;
        if let Some(known) = datagram.get(2).and_then(|core| ports.get_mut(usize::from(*core))) {
            *known = port;
        }
    }
}

/// A connection and its two sockets.
pub struct Connection {
    pub tcp: TcpStream,
    pub udp: UdpSocket,
    tls: Tls,
    node: Node,
    deframer: Deframer,
    began: Instant,
    heard: Instant,
    is_up: bool,
    /// The node has a session with the peer, or asked for the connection.
    is_proven: bool,
    /// The stream takes nothing at present.
    is_blocked: bool,
}

impl Connection {
    /// One that a peer made; its datagrams go to the node at this port.
    pub fn accepted(tcp: TcpStream, tls: Tls, deliver_to: u16) -> io::Result<Self> {
        let udp = loopback()?;
        udp.connect(SocketAddr::from((Ipv4Addr::LOCALHOST, deliver_to)))?;
        Self::new(tcp, udp, tls, Node::Listens)
    }

    /// One that the node has asked for.
    pub fn dialed(tcp: TcpStream, tls: Tls) -> io::Result<Self> {
        Self::new(tcp, loopback()?, tls, Node::Dials { ports: Box::new([0; 256]), last: 0 })
    }

    fn new(tcp: TcpStream, udp: UdpSocket, mut tls: Tls, node: Node) -> io::Result<Self> {
        // A turn has a limit of its own and comes only when all of the last one is written. The library's limit is lower, and a
        // datagram cut off there would be the end of the stream.
        tls.set_buffer_limit(None);
        tcp.set_nonblocking(true)?;
        // Not waiting for more: the tunnel has put together already what may travel together.
        let _ = tcp.set_nodelay(true);
        let now = Instant::now();
        let is_proven = matches!(node, Node::Dials { .. });
        Ok(Self {
            tcp,
            udp,
            tls,
            node,
            deframer: Deframer::default(),
            began: now,
            heard: now,
            is_up: false,
            is_proven,
            is_blocked: true,
        })
    }

    /// The handshake of TLS is over.
    pub fn is_up(&self) -> bool {
        self.is_up
    }

    /// The node has sealed something for it, or has asked for it.
    pub fn is_proven(&self) -> bool {
        self.is_proven
    }

    /// Why it is over by now, if it is.
    pub fn overdue(&self, now: Instant) -> Option<&'static str> {
        if !self.is_up && now.duration_since(self.began) > HANDSHAKE {
            return Some("no TLS connection within 5 s");
        }
        if !self.is_proven && now.duration_since(self.began) > SESSION {
            return Some("no session of the tunnel within 15 s");
        }
        (now.duration_since(self.heard) > SILENCE).then_some("the peer is silent")
    }

    /// Readiness to sleep on: the stream's socket, the UDP socket.
    pub fn interests(&self) -> (Interest, Interest) {
        let tcp = if self.is_blocked { Interest::Both } else { Interest::Read };
        let udp = if self.is_up && !self.is_blocked { Interest::Read } else { Interest::None };
        (tcp, udp)
    }

    /// Takes what the stream and the node have, and gives it to the other.
    ///
    /// # Errors
    /// When the connection is over; the text says why.
    pub fn turn(&mut self, scratch: &mut Vec<u8>) -> io::Result<()> {
        self.take_stream(scratch)?;
        self.flush()?;
        if !self.tls.is_handshaking() {
            self.is_up = true;
        }
        if self.is_up && !self.is_blocked {
            self.take_node(scratch)?;
            self.flush()?;
        }
        Ok(())
    }

    fn take_stream(&mut self, scratch: &mut Vec<u8>) -> io::Result<()> {
        let mut taken = 0;
        while taken < STREAM_BYTES_A_TURN {
            match self.tls.read_tls(&mut self.tcp) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(bytes) => taken += bytes,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            }
            let state = self.tls.process_new_packets().map_err(|error| {
                // The peer is told what was wrong, as far as the socket takes it now.
                let _ = self.tls.write_tls(&mut self.tcp);
                io::Error::new(ErrorKind::InvalidData, error)
            })?;
            self.heard = Instant::now();
            let plain = state.plaintext_bytes_to_read();
            if plain > 0 {
                scratch.resize(plain, 0);
                self.tls.reader().read_exact(scratch)?;
                self.give_node(scratch)?;
            }
            if state.peer_has_closed() {
                return Err(ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(())
    }

    fn give_node(&mut self, bytes: &[u8]) -> io::Result<()> {
        let (udp, node) = (&self.udp, &self.node);
        // A datagram that the node's socket has no room for is lost, as on any other link.
        self.deframer.receive(bytes, |datagram| match node {
            Node::Listens => drop(udp.send(datagram)),
            Node::Dials { .. } => {
                if let Some(port) = node.port(datagram) {
                    drop(udp.send_to(datagram, (Ipv4Addr::LOCALHOST, port)));
                }
            }
        })
    }

    fn take_node(&mut self, scratch: &mut Vec<u8>) -> io::Result<()> {
        let mut datagram = [0; DATAGRAM_BYTES_MAX];
        scratch.clear();
        for _ in 0..DATAGRAMS_A_TURN {
            if scratch.len() >= NODE_BYTES_A_TURN {
                break;
            }
            match self.udp.recv_from(&mut datagram) {
                Ok((bytes, from)) => {
                    let datagram = datagram.get(..bytes).unwrap_or_default();
                    self.node.note(datagram, from.port());
                    self.is_proven |= datagram.first().is_some_and(|first| first & 0xf >= SEALED_KIND);
                    frame(datagram, scratch);
                }
                // The node's socket was closed, or it is not there yet.
                Err(error) if error.kind() == ErrorKind::ConnectionRefused => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        self.tls.writer().write_all(scratch)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.is_blocked = false;
        while self.tls.wants_write() {
            match self.tls.write_tls(&mut self.tcp) {
                Ok(_) => {}
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::NotConnected) => {
                    self.is_blocked = true;
                    return Ok(());
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// A UDP socket of this machine only.
fn loopback() -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    socket.set_nonblocking(true)?;
    rustix::net::sockopt::set_socket_recv_buffer_size(&socket, UDP_BYTES)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn datagrams_go_to_the_socket_of_the_core_that_they_name() {
        let mut node = Node::Dials { ports: Box::new([0; 256]), last: 0 };
        assert_eq!(node.port(&[0x14, 1, 0, 0]), None, "nobody spoke yet");
        node.note(&[0x11, 255, 0, 0], 1_000);
        node.note(&[0x14, 3, 1, 0], 1_001);
        assert_eq!(node.port(&[0x14, 0, 3, 0]), Some(1_000));
        assert_eq!(node.port(&[0x14, 1, 3, 0]), Some(1_001));
        assert_eq!(node.port(&[0x12, 255, 0, 0]), Some(1_001), "of no core: whoever spoke last");
        node.note(&[0x14, 3, 1, 0], 1_002);
        assert_eq!(node.port(&[0x14, 1, 3, 0]), Some(1_002), "it has another socket now");
        assert_eq!(Node::Listens.port(&[0x14, 1, 3, 0]), None);
    }
}
