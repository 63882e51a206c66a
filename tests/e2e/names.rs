//! A hub that is known by its DNS name.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use testbed::topology::{Node, Site};

use crate::machine::isolated;
use crate::scene::*;

/// Answers every question for an address of one family (RFC 1035, RFC 3596), as long as there is one to tell.
pub struct NameServer {
    answer: Arc<Mutex<Option<IpAddr>>>,
    _thread: Background<()>,
}

impl NameServer {
    pub fn start(place: &Node, at: IpAddr) -> Self {
        let answer = Arc::new(Mutex::new(None));
        let socket = udp_socket(place, (at, 53));
        socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        let known = Arc::clone(&answer);
        let thread = Background::start(move |end| {
            let mut buffer = [0; 512];
            while !end.load(Ordering::Relaxed) {
                let Ok((length, from)) = socket.recv_from(&mut buffer) else { continue };
                let known = *known.lock().unwrap();
                if let (Some(address), true) = (known, length > 12) {
                    let _ = socket.send_to(&reply(&buffer[..length], address), from);
                }
            }
        });
        Self { answer, _thread: thread }
    }

    /// From now on this is the answer.
    pub fn tell(&self, address: impl Into<IpAddr>) {
        *self.answer.lock().unwrap() = Some(address.into());
    }
}

/// The question again, and for type A or AAAA one answer that points to its name.
fn reply(question: &[u8], address: IpAddr) -> Vec<u8> {
    let name = 12 + question[12..].iter().position(|byte| *byte == 0).unwrap_or(0) + 1;
    let mut message = question[..(name + 4).min(question.len())].to_vec();
    let (kind, bytes) = match address {
        IpAddr::V4(ip) => (1, ip.octets().to_vec()),
        IpAddr::V6(ip) => (28, ip.octets().to_vec()),
    };
    let is_asked = message[name..] == [0, kind, 0, 1];
    message[2..12].copy_from_slice(&[0x81, 0x80, 0, 1, 0, u8::from(is_asked), 0, 0, 0, 0]);
    if is_asked {
        message.extend([0xc0, 12, 0, kind, 0, 1, 0, 0, 0, 1, 0, bytes.len() as u8]);
        message.extend(bytes);
    }
    message
}

/// Row T1: started before any link, any route and any name service; joined after the first link. Later the hub moves
/// to another address and only its name tells where: the branch asks again and follows.
#[test]
fn t1_a_hub_by_name_is_asked_for_again_when_it_moves() {
    isolated(|| {
        let scene = Scene::new(&[link(100.0, 1.0)]);
        let (a, b) = (scene.a(), scene.b());
        // The name server this system is configured for lives at the branch.
        let conf = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
        let server = control::peer_names::name_servers(&conf).first().copied();
        let server = server.unwrap_or(Ipv4Addr::LOCALHOST.into());
        if !server.is_loopback() {
            a.netlink().unwrap().add_address(1, server.into()).unwrap();
        }
        let names = NameServer::start(a, server);
        scene.testbed.set_carrier(0, Site::A, false).unwrap();
        let (branch, hub) = scene.pair();
        let numeric = scene.endpoint(Site::B, 0);
        let text = branch.text(&scene.directory).replace(&numeric, "hub.anabranch.test:4600");
        let _hub = scene.start(b, &hub);
        let mut branch = Gateway::start(a, &scene.directory, "branch", &text);
        branch.wait("waiting", PATIENCE, |report| {
            report.wans[0].state == "no carrier" && report.names[0].addresses.is_empty()
        });
        std::thread::sleep(Duration::from_secs(2));
        let old = scene.testbed.addresses(Site::B, 0).ipv4.unwrap();
        names.tell(old);
        scene.testbed.set_carrier(0, Site::A, true).unwrap();
        branch.wait("joined", 15.0, |report| paths_up(report) == 1);
        echo(a, b, HUB_IP);

        let new = Ipv4Addr::new(198, 18, 0, 99);
        let (netlink, wan0) = (b.netlink().unwrap(), b.interface("wan0").unwrap());
        names.tell(new);
        netlink.add_address(wan0, net(new.into(), 24)).unwrap();
        netlink.del_address(wan0, net(old.into(), 24)).unwrap();
        // Deleting the first address of a network takes the others of that network with it.
        if !netlink.addresses(wan0).unwrap().iter().any(|address| address.net.addr() == IpAddr::from(new)) {
            netlink.add_address(wan0, net(new.into(), 24)).unwrap();
        }
        branch.wait("joined at the new address", 45.0, |report| {
            paths_up(report) >= 1 && report.names[0].addresses.contains(&new.to_string())
        });
        echo(a, b, HUB_IP);
    });
}
