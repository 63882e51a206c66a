//! Units of a hub, as a peer and a dispatcher see them.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::net::SocketAddr;

use packet::DropReason;
use packet::attachment::BondId;
use tunnel::PrivateKey;
use tunnel::config::{NodeConfig, Peer, Snapshot, Wan};
use tunnel::header::{HEADER_BYTES, Header, Kind, NO_SESSION};
use tunnel::index::IndexCipher;
use tunnel::lifecycle::Action;
use tunnel::node::{Node, Source, flow_key_of};
use tunnel::time::Time;

const HUB_KEY: [u8; 32] = [0x77; 32];
const CLUSTER_KEY: [u8; 40] = [0x3c; 40];
const ADDRESS: &str = "192.0.2.1:4600";

fn node(number: u8, hub: bool) -> Node {
    let hub_key = hub.then(|| PrivateKey::new(HUB_KEY));
    Node::new(NodeConfig { hub_key, ..NodeConfig::of_number(number, 1) })
}

fn peer(public_key: [u8; 32], hub: bool, endpoints: &[SocketAddr]) -> Peer {
    Peer {
        hub,
        endpoints: endpoints.to_vec(),
        allowed_ips: vec!["10.77.0.0/24".parse().unwrap()],
        paths: tunnel::config::PeerPaths { sockets: 1, ..Default::default() },
        ..Peer::new(BondId(3), "other", public_key)
    }
}

fn wan() -> Wan {
    Wan::new(0, vec!["192.0.2.2".parse().unwrap()])
}

fn source(socket: Option<(usize, u8)>) -> Source {
    Source { wan: 0, local: None, remote: ADDRESS.parse().unwrap(), socket, hops: None }
}

fn datagrams(actions: &[Action]) -> Vec<Vec<u8>> {
    let datagram = |action: &Action| match action {
        Action::Datagram { bytes, .. } => Some(bytes.clone()),
        Action::Frames { .. } => None,
    };
    actions.iter().filter_map(datagram).collect()
}

fn ms(time: u64) -> Time {
    Time::ZERO.plus_ms(time)
}

/// A peer of the hub, and a unit of it that does not take part yet.
struct Scene {
    edge: Node,
    unit: Node,
}

impl Scene {
    fn new(number: u8) -> Self {
        let (edge, unit) = (node(9, false), node(number, true));
        let hub = PrivateKey::new(HUB_KEY).public();
        let dial = peer(hub, false, &[ADDRESS.parse().unwrap()]);
        edge.apply(
            ms(1),
            &Snapshot { wans: vec![wan()], peers: vec![dial], ..Snapshot::default() },
            &mut Vec::new(),
        );
        let listen = peer(edge.public_key(), true, &[]);
        unit.apply(
            ms(1),
            &Snapshot { wans: vec![wan()], peers: vec![listen], ..Snapshot::default() },
            &mut Vec::new(),
        );
        Self { edge, unit }
    }

    /// Initiation of the peer, if it makes one.
    fn initiation(&self, now: Time) -> Option<Vec<u8>> {
        let mut actions = Vec::new();
        self.edge.poll_soon(now);
        self.edge.poll_if_due(now, &mut actions);
        datagrams(&actions).pop()
    }

    fn answer(&self, now: Time, initiation: &[u8]) -> Result<Vec<u8>, DropReason> {
        let mut actions = Vec::new();
        let header = Header::parse(initiation).unwrap();
        self.unit.on_handshake(now, &source(None), &header, initiation, &mut actions)?;
        Ok(datagrams(&actions).pop().unwrap())
    }

    /// The peer has a session with the unit; the unit's index of it.
    fn join(&self, now: Time, unit: u16) -> u32 {
        self.unit.join_hub(Some((unit, IndexCipher::of_cluster(&CLUSTER_KEY))));
        let response = self.answer(now, &self.initiation(now).unwrap()).unwrap();
        let header = Header::parse(&response).unwrap();
        self.edge.on_handshake(now, &source(Some((0, 0))), &header, &response, &mut Vec::new()).unwrap();
        header.counter as u32
    }

    fn told(&self, now: Time, index: u32, bytes: usize) -> Result<(), DropReason> {
        let datagram = Header {
            kind: Kind::Data,
            receiving_core: 0,
            sending_core: 0,
            path: 0,
            receiver_index: index,
            counter: 7,
        };
        let mut answer = datagram.no_session().to_bytes().to_vec();
        answer.resize(bytes, 0);
        let header = Header::parse(&answer).unwrap();
        assert_eq!((header.kind, header.counter), (Kind::Cookie, NO_SESSION));
        self.edge.on_handshake(now, &source(Some((0, 0))), &header, &answer, &mut Vec::new())
    }
}

#[test]
fn an_index_names_the_unit_that_answered() {
    let scene = Scene::new(5);
    let index = scene.join(ms(600), 0xabc);
    assert_eq!(IndexCipher::of_cluster(&CLUSTER_KEY).parts(index).0, 0xabc);
    assert!(scene.unit.session(index).is_some() && scene.edge.in_session(BondId(3)));
}

#[test]
fn a_unit_that_takes_no_part_answers_nobody() {
    let scene = Scene::new(5);
    let initiation = scene.initiation(ms(600)).unwrap();
    assert_eq!(scene.answer(ms(600), &initiation), Err(DropReason::UnitUnknown));
}

#[test]
fn any_unit_can_tell_whose_initiation_it_is() {
    let scene = Scene::new(5);
    let mut initiation = scene.initiation(ms(600)).unwrap();
    let key = scene.unit.hub_initiator(&initiation).unwrap();
    assert_eq!(key, scene.edge.public_key());
    let flow = flow_key_of(&key);
    assert_eq!(flow, scene.unit.hub_bonds()[0].flow_key());
    let halves = [flow.src, flow.dst].map(|address| match address {
        std::net::IpAddr::V6(address) => address.octets(),
        std::net::IpAddr::V4(_) => unreachable!(),
    });
    assert_eq!(halves.concat(), key);
    initiation[40] ^= 1;
    assert_eq!(scene.unit.hub_initiator(&initiation), Err(DropReason::HandshakeMac));
    assert_eq!(
        scene.edge.hub_initiator(&initiation),
        Err(DropReason::HandshakeUnknownPeer),
        "no unit of a hub"
    );
}

/// A peer that knows the unit by its own key is no peer of the hub, and the other way round.
#[test]
fn an_initiation_is_for_one_of_the_two_keys() {
    let scene = Scene::new(5);
    scene.unit.join_hub(Some((5, IndexCipher::of_cluster(&CLUSTER_KEY))));
    let own = peer(scene.unit.public_key(), false, &[ADDRESS.parse().unwrap()]);
    scene.edge.apply(
        ms(2),
        &Snapshot { wans: vec![wan()], peers: vec![own], ..Snapshot::default() },
        &mut Vec::new(),
    );
    let initiation = scene.initiation(ms(600)).unwrap();
    assert_eq!(scene.answer(ms(600), &initiation), Err(DropReason::HandshakeUnknownPeer));
    let not_of_hub = peer(scene.edge.public_key(), false, &[]);
    scene.unit.apply(
        ms(601),
        &Snapshot { wans: vec![wan()], peers: vec![not_of_hub], ..Snapshot::default() },
        &mut Vec::new(),
    );
    let initiation = scene.initiation(ms(1_200)).unwrap();
    assert!(scene.answer(ms(1_200), &initiation).is_ok());
}

#[test]
fn a_peer_whose_session_is_gone_begins_anew_once() {
    let scene = Scene::new(5);
    let index = scene.join(ms(600), 5);
    // Within a second: a peer whose paths are all silent tries by itself after that.
    assert_eq!(scene.initiation(ms(900)), None, "it has a session");
    assert_eq!(scene.told(ms(1_000), index ^ 1, HEADER_BYTES), Err(DropReason::UnknownIndex));
    assert_eq!(scene.told(ms(1_000), index, HEADER_BYTES + 1), Err(DropReason::HandshakeMalformed));
    assert_eq!(scene.initiation(ms(1_100)), None, "nothing was proven");
    assert_eq!(scene.told(ms(1_200), index, HEADER_BYTES), Ok(()));
    assert!(scene.edge.in_session(BondId(3)), "until it has another");
    let again = scene.initiation(ms(1_201)).unwrap();
    // Who repeats it does not hasten the next try.
    assert_eq!(scene.told(ms(1_202), index, HEADER_BYTES), Ok(()));
    assert_eq!(scene.initiation(ms(1_203)), None);
    let other = scene.answer(ms(1_250), &again).unwrap();
    assert_ne!(Header::parse(&other).unwrap().counter as u32, index);
}
