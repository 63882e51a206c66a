//! The process's loop in a thread, with real sockets: one node that dials, one that listens, and strangers.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream, UdpSocket};
use std::os::fd::{AsFd as _, OwnedFd};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use tls_path::helper;
use tls_path::protocol::{self, FromHelper, ToHelper};

const PATIENCE: Duration = Duration::from_secs(10);

struct Scene {
    node: OwnedFd,
    helper: JoinHandle<std::io::Result<()>>,
    listener: SocketAddr,
    /// Hears what comes out of peers' connections.
    hub: UdpSocket,
}

impl Scene {
    fn new() -> Self {
        let (node, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        let helper = std::thread::spawn(move || helper::serve(theirs, String::new()));
        let socket = linux::tcp::listen(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), 0).unwrap();
        let (listener, hub) = (socket.local_addr().unwrap(), udp());
        let deliver_to = hub.local_addr().unwrap().port();
        protocol::send(&node, &ToHelper::Listen { deliver_to }, Some(socket.as_fd())).unwrap();
        Self { node, helper, listener, hub }
    }

    fn dial(&self, id: u32) -> u16 {
        let socket = linux::tcp::connect(self.listener, None, 0).unwrap();
        protocol::send(&self.node, &ToHelper::Dial { id }, Some(socket.as_fd())).unwrap();
        let up = self.hear(|said| matches!(said, FromHelper::Up { .. } | FromHelper::Down { .. }));
        let FromHelper::Up { id: of, port } = up else { panic!("{up:?}") };
        assert_eq!(of, id);
        port
    }

    fn hear(&self, wanted: impl Fn(&FromHelper) -> bool) -> FromHelper {
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end {
            match protocol::receive::<FromHelper>(&self.node) {
                Ok(Some((said, _))) if wanted(&said) => return said,
                Ok(Some(_)) => {}
                Ok(None) => panic!("the helper is gone"),
                Err(error) => {
                    assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        }
        panic!("nothing heard");
    }

    /// A datagram there and its answer back, both of a session.
    fn round(&self, edge: &UdpSocket, port: u16, text: &[u8]) {
        let datagram = [&[0x14, 0, 0, 0], text].concat();
        edge.send_to(&datagram, (Ipv4Addr::LOCALHOST, port)).unwrap();
        let mut buffer = [0; 2_000];
        let (bytes, from) = self.hub.recv_from(&mut buffer).unwrap();
        assert_eq!(&buffer[..bytes], datagram);
        self.hub.send_to(&datagram, from).unwrap();
        let bytes = edge.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..bytes], datagram);
    }
}

fn udp() -> UdpSocket {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// A connection from another address of this machine.
fn stranger(number: u8, to: SocketAddr) -> TcpStream {
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    rustix::net::bind(&socket, &SocketAddrV4::new(Ipv4Addr::new(127, 0, 1, number), 0)).unwrap();
    rustix::net::connect(&socket, &to).unwrap();
    TcpStream::from(socket)
}

/// Row T1: datagrams of all sizes go there and back; a connection that the node gives up ends at the other side too.
#[test]
fn datagrams_go_there_and_back() {
    let scene = Scene::new();
    let (port, edge) = (scene.dial(1), udp());
    for bytes in [1, 60, 1_400] {
        scene.round(&edge, port, &vec![7; bytes]);
    }
    protocol::send(&scene.node, &ToHelper::HangUp { id: 1 }, None).unwrap();
    let gone = |said: &FromHelper| matches!(said, FromHelper::Alive { accepted: 0, .. });
    scene.hear(gone);
    let Scene { node, helper, .. } = scene;
    drop(node);
    helper.join().unwrap().unwrap();
}

/// Row T1: more at once than the stream takes is lost in part, as on any link, and the connection goes on.
#[test]
fn a_burst_does_not_end_the_connection() {
    let scene = Scene::new();
    let (port, edge) = (scene.dial(1), udp());
    let (burst, last) = ([&[0x14, 0, 0, 0][..], &[7; 8_996]].concat(), [0x14, 0, 0, 0, 9]);
    for _ in 0..50 {
        for _ in 0..40 {
            edge.send_to(&burst, (Ipv4Addr::LOCALHOST, port)).unwrap();
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    scene.hub.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let (end, mut buffer, mut whole) = (Instant::now() + PATIENCE, vec![0; 10_000], 0);
    loop {
        assert!(Instant::now() < end, "nothing comes any more, after {whole} datagrams");
        edge.send_to(&last, (Ipv4Addr::LOCALHOST, port)).unwrap();
        match scene.hub.recv(&mut buffer).map(|bytes| &buffer[..bytes]) {
            Ok(datagram) if datagram == last => break,
            Ok(datagram) => {
                assert_eq!(datagram, burst);
                whole += 1;
            }
            Err(_) => {}
        }
    }
    assert!(whole > 5, "{whole} datagrams of the bursts");
    while scene.hub.recv(&mut buffer).is_ok() {}
    scene.hub.set_read_timeout(Some(PATIENCE)).unwrap();
    scene.round(&edge, port, b"after it");
}

/// Row T1: whoever connects and has no session is let go for others; a peer stays whatever they do, and garbage ends a
/// connection.
#[test]
fn strangers_make_room() {
    let scene = Scene::new();
    let (port, edge) = (scene.dial(1), udp());
    scene.round(&edge, port, b"hello");
    let mut strangers: Vec<TcpStream> =
        (0..300_u16).map(|number| stranger((number / 50) as u8 + 1, scene.listener)).collect();
    let mut rude = stranger(200, scene.listener);
    rude.write_all(b"GET / HTTP/1.1\r\nHost: example.net\r\n\r\n").unwrap();
    rude.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut answer = Vec::new();
    // An alert of TLS, perhaps a reset, and the end.
    let _ = rude.read_to_end(&mut answer);
    assert!(answer.len() < 100, "{answer:?}");
    scene.round(&edge, port, b"still here");
    let first = &mut strangers[0];
    // Sooner than all strangers have to go.
    first.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    let end = first.read(&mut [0; 1]);
    let is_reset = |error: &std::io::Error| error.kind() == std::io::ErrorKind::ConnectionReset;
    assert!(end.as_ref().map_or_else(is_reset, |bytes| *bytes == 0), "the oldest made room: {end:?}");
    let accepted = |said: &FromHelper| matches!(said, FromHelper::Alive { accepted, .. } if *accepted <= 257);
    scene.hear(accepted);
    let second = scene.dial(2);
    scene.round(&udp(), second, b"another peer");
}
