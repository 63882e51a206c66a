//! Traffic classes by the server that a client asks for (row T12): real clients of TLS and QUIC.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection, Stream};
use testbed::topology::Node;

use crate::classes::packets;
use crate::gateway_quic::{Client, certify, server, socket};
use crate::gateway_scene::shell;
use crate::machine::{alone, isolated};
use crate::scene::*;

/// Bytes that the server sends.
const BODY_BYTES: usize = 1_000_000;
/// Packets of the answer that are of the class at least: those of the handshake are not.
const ANSWER_PACKETS: u64 = BODY_BYTES as u64 / 1_500 * 9 / 10;

/// An HTTPS server that has one answer, until it is dropped.
fn https(place: &Node, config: ServerConfig) -> Background<()> {
    let listener = tcp_listener(place, (Ipv4Addr::UNSPECIFIED, 443));
    listener.set_nonblocking(true).unwrap();
    let config = Arc::new(config);
    Background::start(move |end| {
        while !end.load(Ordering::Relaxed) {
            match listener.accept() {
                Ok((stream, _)) => {
                    // A client that goes is not the server's matter.
                    let _ = answer(stream, &config);
                }
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    })
}

fn answer(mut stream: TcpStream, config: &Arc<ServerConfig>) -> std::io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    let mut connection = ServerConnection::new(Arc::clone(config)).unwrap();
    let mut tls = Stream::new(&mut connection, &mut stream);
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        tls.read_exact(&mut byte)?;
        request.extend(byte);
    }
    write!(tls, "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {BODY_BYTES}\r\n\r\n")?;
    tls.write_all(&vec![7; BODY_BYTES])?;
    tls.conn.send_close_notify();
    tls.flush()
}

/// A client whose ClientHello comes in many small segments.
fn in_small_segments(mut stream: TcpStream, config: Arc<ClientConfig>, name: &'static str) {
    stream.set_nodelay(true).unwrap();
    let mut connection = ClientConnection::new(config, name.try_into().unwrap()).unwrap();
    let mut hello = Vec::new();
    connection.write_tls(&mut hello).unwrap();
    for part in hello.chunks(hello.len() / 5 + 1) {
        stream.write_all(part).unwrap();
        std::thread::sleep(Duration::from_millis(20));
    }
    let mut tls = Stream::new(&mut connection, &mut stream);
    tls.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    tls.read_to_end(&mut answer).unwrap();
    assert!(answer.len() > BODY_BYTES, "{}", answer.len());
}

/// Servers of HTTPS and QUIC with the certificate in a directory, and the roots that clients trust.
fn serve(place: &Node, at: &Path) -> (Arc<RootCertStore>, (Background<()>, Background<usize>)) {
    let certificate = |name: &str| CertificateDer::from_pem_file(at.join(name)).unwrap();
    let key = || PrivateKeyDer::from_pem_file(at.join("server.key")).unwrap();
    let chain = || vec![certificate("server.pem")];
    let mut roots = RootCertStore::empty();
    roots.add(certificate("ca.pem")).unwrap();
    let config = ServerConfig::builder().with_no_client_auth().with_single_cert(chain(), key()).unwrap();
    let of_quic = quinn_proto::ServerConfig::with_single_cert(chain(), key()).unwrap();
    (Arc::new(roots), (https(place, config), server(place, of_quic)))
}

/// Row T12: connections of curl, of a client that sends its ClientHello in pieces, and of QUIC are of the class that the server's
/// name gives them, in both directions; those to another name at the same address are not.
#[test]
fn t12_a_servers_name_gives_a_connection_its_class() {
    let _alone = alone();
    isolated(|| {
        let scene = Scene::new(&[link(50.0, 5.0), link(50.0, 10.0)]);
        let (a, b) = (scene.a(), scene.b());
        let at = scene.directory.path();
        certify(a, at, "DNS:*.good.test,DNS:other.test");
        let (roots, _servers) = serve(b, at);
        let class = "[[class]]\nname = \"good\"\nclass = \"pinned\"\nserver-name = \"*.good.test\"\n";
        let (branch, hub) = scene.pair();
        let (branch, hub) = scene.join(&branch.section(class), &hub.section(class), 2);
        let sent = || [packets(&branch, "pinned", ""), packets(&hub, "pinned", "")];
        let mut before = sent();
        let mut check = |what: &str, least: [u64; 2]| {
            let now = settled(sent);
            let of_class = [now[0] - before[0], now[1] - before[1]];
            eprintln!("{what}: {of_class:?} packets of the class, up and down");
            let is_right = match least {
                [0, 0] => of_class == least,
                [up, down] => of_class[0] >= up && of_class[1] >= down,
            };
            assert!(is_right, "{what}: {of_class:?} packets of the class, {least:?} wanted");
            before = now;
        };
        let curl = |name: &str| {
            let command = format!(
                "curl --silent --show-error --max-time 30 --cacert {}/ca.pem --resolve {name}:443:{HUB_IP} \
                 --output /dev/null https://{name}/",
                at.display()
            );
            shell(a, &command);
        };
        let tls = ClientConfig::builder().with_root_certificates(Arc::clone(&roots)).with_no_client_auth();
        let tls = Arc::new(tls);
        let small = |name| {
            let stream = a.run(|| TcpStream::connect((HUB_IP, 443))).unwrap().unwrap();
            in_small_segments(stream, Arc::clone(&tls), name);
        };
        let mut ports = 30_000..;
        let mut quic = |name: &str| {
            let config = quinn_proto::ClientConfig::with_root_certificates(Arc::clone(&roots)).unwrap();
            let mut client = Client::connect(socket(a, &mut ports), &format!("{HUB_IP}:443"), name, config);
            assert!(client.reach(200_000), "{name}");
        };
        curl("other.test");
        check("curl, other", [0, 0]);
        curl("www.good.test");
        check("curl", [20, ANSWER_PACKETS]);
        small("other.test");
        check("small segments, other", [0, 0]);
        small("www.good.test");
        check("small segments", [20, ANSWER_PACKETS]);
        quic("other.test");
        check("quic, other", [0, 0]);
        quic("www.good.test");
        check("quic", [100, 100]);
        let asked = |more: &[&str]| {
            let flow = format!("tcp {BRANCH_IP}:40000 > {HUB_IP}:443");
            branch.command(&[&["class", flow.as_str()], more].concat()).1
        };
        assert!(asked(&["--server-name", "www.good.test"]).contains("pinned (by [[class]] good)"));
        assert!(asked(&[]).contains("bulk"));
    });
}
