//! Virtual servers of QUIC: real connections whose client's address changes under them, as behind a NAT that forgets.

use std::collections::{BTreeMap, VecDeque};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::ops::RangeFrom;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use quinn_proto::{
    ClientConfig, Connection, ConnectionHandle, DatagramEvent, Dir, Endpoint, EndpointConfig, Event,
    ServerConfig, StreamId,
};
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use testbed::program::ScratchDir;
use testbed::topology::Node;

use crate::gateway_scene::*;
use crate::machine::isolated;
use crate::scene::*;

/// Time that a step waits for a datagram.
const STEP: Duration = Duration::from_millis(5);

/// One side of QUIC on a socket: the protocol is quinn's, the system calls are ours.
pub struct Quic {
    endpoint: Endpoint,
    socket: UdpSocket,
    connections: BTreeMap<usize, Connection>,
    out: Vec<u8>,
    /// Why connections ended.
    lost: Vec<String>,
}

impl Quic {
    fn new(socket: UdpSocket, server: Option<ServerConfig>) -> Self {
        socket.set_read_timeout(Some(STEP)).unwrap();
        let config = Arc::new(EndpointConfig::default());
        let endpoint = Endpoint::new(config, server.map(Arc::new), false, None);
        Self { endpoint, socket, connections: BTreeMap::new(), out: Vec::new(), lost: Vec::new() }
    }

    /// Takes what came, and sends what is due.
    fn step(&mut self) {
        let mut datagram = [0; 2_048];
        if let Ok((bytes, from)) = self.socket.recv_from(&mut datagram) {
            self.take(from, &datagram[..bytes]);
        }
        let now = Instant::now();
        for (handle, connection) in &mut self.connections {
            if connection.poll_timeout().is_some_and(|at| at <= now) {
                connection.handle_timeout(now);
            }
            while let Some(event) = connection.poll_endpoint_events() {
                if let Some(event) = self.endpoint.handle_event(ConnectionHandle(*handle), event) {
                    connection.handle_event(event);
                }
            }
            self.out.clear();
            while let Some(transmit) = connection.poll_transmit(now, 1, &mut self.out) {
                // What is lost is sent again.
                let _ = self.socket.send_to(&self.out[..transmit.size], transmit.destination);
                self.out.clear();
            }
            while let Some(event) = connection.poll() {
                if let Event::ConnectionLost { reason } = event {
                    self.lost.push(reason.to_string());
                }
            }
        }
    }

    fn take(&mut self, from: SocketAddr, datagram: &[u8]) {
        let now = Instant::now();
        self.out.clear();
        match self.endpoint.handle(now, from, None, None, BytesMut::from(datagram), &mut self.out) {
            Some(DatagramEvent::ConnectionEvent(handle, event)) => {
                if let Some(connection) = self.connections.get_mut(&handle.0) {
                    connection.handle_event(event);
                }
            }
            Some(DatagramEvent::NewConnection(incoming)) => {
                self.out.clear();
                if let Ok((handle, connection)) = self.endpoint.accept(incoming, now, &mut self.out, None) {
                    self.connections.insert(handle.0, connection);
                }
            }
            Some(DatagramEvent::Response(transmit)) => {
                let _ = self.socket.send_to(&self.out[..transmit.size], transmit.destination);
            }
            None => {}
        }
    }
}

/// Reads what there is of a stream.
fn read(connection: &mut Connection, stream: StreamId, take: &mut impl Extend<u8>) {
    let mut receiver = connection.recv_stream(stream);
    let Ok(mut chunks) = receiver.read(true) else { return };
    while let Ok(Some(chunk)) = chunks.next(usize::MAX) {
        take.extend(chunk.bytes);
    }
    let _ = chunks.finalize();
}

/// A server that sends back what it gets, until it is dropped.
pub fn server(place: &Node, config: ServerConfig) -> Background<usize> {
    let socket = udp_socket(place, (Ipv4Addr::UNSPECIFIED, 443));
    Background::start(move |end| {
        let mut quic = Quic::new(socket, Some(config));
        let mut echoes: BTreeMap<(usize, StreamId), VecDeque<u8>> = BTreeMap::new();
        while !end.load(Ordering::Relaxed) {
            quic.step();
            for (handle, connection) in &mut quic.connections {
                while let Some(stream) = connection.streams().accept(Dir::Bi) {
                    echoes.insert((*handle, stream), VecDeque::new());
                }
                for ((_, stream), waiting) in echoes.iter_mut().filter(|((of, _), _)| of == handle) {
                    read(connection, *stream, waiting);
                    while let Ok(written) = connection.send_stream(*stream).write(waiting.as_slices().0) {
                        waiting.drain(..written);
                        if written == 0 {
                            break;
                        }
                    }
                }
            }
        }
        echoes.len()
    })
}

/// A connection that sends bytes and gets them back.
pub struct Client {
    quic: Quic,
    handle: usize,
    stream: Option<StreamId>,
    sent: usize,
    received: Vec<u8>,
}

impl Client {
    /// Asks for the server `name`.
    pub fn connect(socket: UdpSocket, to: &str, name: &str, config: ClientConfig) -> Self {
        let mut quic = Quic::new(socket, None);
        let to = to.parse().unwrap();
        let (handle, connection) = quic.endpoint.connect(Instant::now(), config, to, name).unwrap();
        quic.connections.insert(handle.0, connection);
        Self { quic, handle: handle.0, stream: None, sent: 0, received: Vec::new() }
    }

    /// Goes on until so many bytes have come back; `false`: they do not.
    pub fn reach(&mut self, bytes: usize) -> bool {
        let begin = Instant::now();
        while self.received.len() < bytes {
            self.quic.step();
            let Some(connection) = self.quic.connections.get_mut(&self.handle) else { return false };
            if connection.is_closed() || begin.elapsed() > Duration::from_secs(20) {
                return false;
            }
            if self.stream.is_none() {
                self.stream = connection.streams().open(Dir::Bi);
            }
            let Some(stream) = self.stream else { continue };
            // Never much more than is waited for: the connection is in use when its address changes.
            let wanted: Vec<u8> = (self.sent..bytes + 2_000).map(pattern).collect();
            self.sent += connection.send_stream(stream).write(&wanted).unwrap_or(0);
            read(connection, stream, &mut self.received);
        }
        self.received.iter().enumerate().all(|(at, byte)| *byte == pattern(at))
    }
}

/// A socket with a port that none had before it: the gateway still knows the flows of those, and where they go.
pub fn socket(place: &Node, ports: &mut RangeFrom<u16>) -> UdpSocket {
    place.run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, ports.next().unwrap()))).unwrap().unwrap()
}

fn pattern(at: usize) -> u8 {
    (at.wrapping_mul(31) >> 3) as u8
}

/// Files of an authority, `ca.pem`, and of a server with these names, `server.key` and `server.pem`.
pub fn certify(place: &Node, at: &Path, names: &str) {
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
    shell(
        place,
        &format!(
            "cd {} && openssl req -x509 {key} -keyout ca.key -out ca.pem -subj /CN=authority -days 2 2>&1 && \
             openssl req {key} -keyout server.key -out server.csr -subj /CN=good.test 2>&1 && \
             echo subjectAltName={names} > names && openssl x509 -req -in server.csr -CA ca.pem \
             -CAkey ca.key -CAcreateserial -days 2 -out server.pem -extfile names 2>&1",
            at.display()
        ),
    );
}

/// Row C6: the client's port changes in mid-transfer, again and again, and it does not know: the connection goes on at its
/// backend, whatever backends see of clients. Without the affinity it ends.
#[test]
fn c6_quic_connections_outlive_a_nat_that_forgets() {
    isolated(|| {
        let lans = Lans::new(4);
        let directory = ScratchDir::new("anabranch-quic").unwrap();
        let at = directory.path();
        certify(lans.gateway(), at, "DNS:good.test");
        let certificate = |name: &str| CertificateDer::from_pem_file(at.join(name)).unwrap();
        let server_config = || {
            let key = PrivateKeyDer::from_pem_file(at.join("server.key")).unwrap();
            ServerConfig::with_single_cert(vec![certificate("server.pem")], key).unwrap()
        };
        let mut roots = RootCertStore::empty();
        roots.add(certificate("ca.pem")).unwrap();
        let roots = Arc::new(roots);
        let _servers: Vec<_> = (2..=4).map(|number| server(lans.host(number), server_config())).collect();
        let section = |more: &str| {
            format!(
                "{ALLOW}[[virtual-server]]\nname = \"web\"\nlisten = \"udp 10.1.1.10:443\"\n{more}\
                 backends = [\"10.1.2.2:443\", \"10.1.3.2:443\", \"10.1.4.2:443\"]\n"
            )
        };
        let gateway = lans.start(&section(""));
        let mut ports = 20_000..;
        let mut rebinds = |moves: usize| {
            // Nothing of one connection is known to the next, which may get another backend.
            let config = ClientConfig::with_root_certificates(Arc::clone(&roots)).unwrap();
            let mut client =
                Client::connect(socket(lans.host(1), &mut ports), "10.1.1.10:443", "good.test", config);
            assert!(client.reach(10_000), "before it moves: {:?}", client.quic.lost);
            (1..=moves).all(|number| {
                let socket = socket(lans.host(1), &mut ports);
                socket.set_read_timeout(Some(STEP)).unwrap();
                client.quic.socket = socket;
                client.reach(10_000 + number * 20_000)
            })
        };
        for source in ["address-and-port", "port-only", "none"] {
            let text = format!("affinity = \"quic-connection-id\"\nsource = \"{source}\"\n");
            assert_eq!(lans.reload(&gateway, &section(&text)).0, 0);
            for connection in 0..4 {
                assert!(rebinds(6), "{source}, connection {connection}");
            }
        }
        assert_eq!(lans.reload(&gateway, &section("")).0, 0);
        assert!(!rebinds(6), "six ports, three backends, and always the right one?");
        no_reply_went_astray(&gateway);
    });
}
