#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;

fn key(last: u8) -> ClientKey {
    (0, IpAddr::from([10, 0, 0, last]))
}

#[test]
fn idle_clients_make_room_and_busy_ones_do_not() {
    let mut clients = Clients::new(SecretState::of_number(1), 2);
    clients.enter(0, key(1)).unwrap();
    clients.enter(0, key(2)).unwrap();
    assert!(clients.enter(0, key(3)).is_none());
    clients.opened(&key(1), None);
    let mut gone = Vec::new();
    clients.expire(CLIENT_IDLE_NS - 1, |key, _| gone.push(key));
    assert!(gone.is_empty());
    clients.expire(CLIENT_IDLE_NS, |key, _| gone.push(key));
    assert_eq!(gone, [key(2)]);
    assert!(clients.enter(CLIENT_IDLE_NS, key(3)).is_some());
    // The busy one becomes idle, has a flow again, and counts from its last one.
    let later = 2 * CLIENT_IDLE_NS;
    clients.closed(later, &key(1));
    clients.opened(&key(1), None);
    clients.closed(later + 50, &key(1));
    gone.clear();
    clients.expire(later + CLIENT_IDLE_NS, |key, _| gone.push(key));
    assert_eq!(gone, [key(3)]);
    clients.expire(later + CLIENT_IDLE_NS + 50, |key, _| gone.push(key));
    assert_eq!(gone, [key(3), key(1)]);
    assert_eq!(clients.len(), 0);
}

#[test]
fn a_client_remembers_its_two_latest_addresses() {
    let mut client = Client::default();
    for last in [1, 2, 2, 1, 3] {
        client.pair(IpAddr::from([192, 0, 2, last]));
    }
    assert_eq!(client.paired, [Some(IpAddr::from([192, 0, 2, 3])), Some(IpAddr::from([192, 0, 2, 2]))]);
}

#[test]
fn cores_share_a_limit() {
    assert_eq!(share_of_core(1000, 1), 1000);
    assert_eq!(share_of_core(0, 4), u32::MAX, "no limit");
    assert_eq!(share_of_core(1000, 8), 125 + 4 * 11);
    assert_eq!(share_of_core(1, 8), 1);
    assert_eq!(share_of_core(3, 2), 3, "never more than all");
    assert!((1..=128).all(|cores| u64::from(share_of_core(5000, cores)) * u64::from(cores) >= 5000));
}

#[test]
fn clients_that_a_stranger_chooses_do_not_meet() {
    let clients = Clients::new(SecretState::of_number(1), 2);
    crate::hash::testing::assert_spreads(clients.known.hasher(), |address| -> ClientKey { (0, address) });
}
