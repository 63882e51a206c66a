#![allow(clippy::unwrap_used, reason = "tests")]

use services::handover::{FlowEntry, Place, Side};

use super::*;

fn shared() -> Shared {
    Shared {
        stop: AtomicBool::new(false),
        own: 11,
        bus: "127.0.0.1".parse().unwrap(),
        assigned: Mutex::default(),
        copied_to: AtomicU32::new(NOBODY),
        kept: Mutex::default(),
        streams: Mutex::default(),
    }
}

fn side(port: u16) -> Side {
    let [src, dst] = ["10.0.0.5", "10.1.0.9"].map(|address| address.parse().unwrap());
    Side { key: FlowKey { src, dst, src_port: port, dst_port: 53, protocol: 17 }, tenant: String::new() }
}

fn flow(port: u16) -> Vec<u8> {
    let reply = Side { key: side(port).key.reversed(), ..side(port) };
    let flow = FlowEntry {
        core: 0,
        original: side(port),
        reply,
        flags: services::flow::flags::REPLIED,
        ingress: Place::Interface("lan".into()),
        idle_ms: 0,
        tcp: None,
        counts: None,
        shift: None,
        source: None,
        backend: None,
    };
    let mut bytes = Vec::new();
    Entry::Flow(Box::new(flow)).encode(&mut bytes).unwrap();
    bytes
}

fn ended(port: u16) -> Vec<u8> {
    let mut bytes = Vec::new();
    Change::encode_end(&side(port), &mut bytes).unwrap();
    bytes
}

#[test]
fn what_has_ended_is_not_kept_and_a_new_connection_begins_anew() {
    let shared = shared();
    let first = shared.begin(12);
    for record in [flow(1), flow(2), flow(1), flow(3), ended(2), ended(9)] {
        assert_eq!(shared.keep(12, first, &record), Ok(true));
    }
    assert_eq!(shared.kept(), 2);
    let other = shared.begin(13);
    assert_eq!(shared.keep(13, other, &flow(1)), Ok(true));
    assert_eq!(shared.kept(), 3);
    let second = shared.begin(12);
    assert_eq!(shared.kept(), 1, "of the connection before nothing is known any more");
    assert_eq!(shared.keep(12, first, &flow(7)), Ok(false), "it was cut off");
    assert_eq!(shared.keep(12, second, &flow(7)), Ok(true));
    assert!(shared.keep(12, second, &[1, 9, 0, 4]).is_err());
    let copies = Copies { shared: Arc::new(shared), threads: Vec::new() };
    assert_eq!(copies.take(12), [flow(7)]);
    assert!(copies.take(12).is_empty());
    copies.follow(Assigned::default());
    assert_eq!(copies.kept(), 0, "nobody sends copies here any more");
}

#[test]
fn who_has_copies_is_said_only_of_the_present_backup() {
    let copies = Copies { shared: Arc::new(shared()), threads: Vec::new() };
    let backup = |node| {
        let address = "10.9.0.12".parse().unwrap();
        Assigned { backup: Some(Backup { node, address }), ..Assigned::default() }
    };
    copies.follow(backup(12));
    assert_eq!(copies.copied_to(), None);
    copies.shared.copied_to.store(12, Relaxed);
    assert_eq!(copies.copied_to(), Some(12));
    copies.follow(backup(13));
    assert_eq!(copies.copied_to(), None);
}
