//! A WAN that is closed while its sockets still work: outside its schedule or location, or taken out by command.
#![allow(clippy::unwrap_used, reason = "tests")]

mod pair;

use std::net::SocketAddr;

use pair::{Side, peer, wan};
use tunnel::config::Snapshot;
use tunnel::path::PathState;
use tunnel::time::Time;

/// Two WANs of a dialer, of which the second may be closed.
fn apply(dialer: &mut Side, listener: &Side, now: Time, second_up: bool) {
    let mut wans = vec![wan(0, dialer.address), wan(1, SocketAddr::from(([192, 0, 2, 101], 4_600)))];
    wans[1].up = second_up;
    let mut actions = Vec::new();
    let peers = vec![peer(listener, &[listener.address])];
    dialer.node.apply(now, &Snapshot { wans, peers, ..Snapshot::default() }, &mut actions);
    dialer.cores[0].run(now, actions, &mut dialer.out);
}

/// Runs both for so many milliseconds; each path of the dialer has an address of its own.
fn run_ms(now: &mut Time, dialer: &mut Side, listener: &mut Side, ms: u64) {
    for _ in 0..ms {
        *now = now.plus_ms(1);
        dialer.round(*now);
        listener.round(*now);
        for _ in 0..8 {
            for sent in std::mem::take(&mut dialer.out.sent) {
                let from = SocketAddr::from(([192, 0, 2, 1], 40_000 + u16::from(sent.target.path)));
                listener.receive(*now, from, None, &mut sent.bytes.clone());
            }
            for sent in std::mem::take(&mut listener.out.sent) {
                let socket = Some((0, sent.target.path));
                dialer.receive(*now, listener.address, socket, &mut sent.bytes.clone());
            }
        }
    }
}

fn paths_up(side: &Side) -> usize {
    let bonds = side.node.bonds.load();
    let bond = bonds.list.iter().flatten().next().unwrap();
    bond.paths.load().iter().filter(|path| path.state() == PathState::Up).count()
}

/// The peer leaves it, and does not come back as long as it is closed: its questions are not answered.
#[test]
fn the_peer_leaves_a_wan_that_is_closed() {
    let (mut dialer, mut listener) = (Side::new(1, 1), Side::new(2, 1));
    let mut now = Time::from_ms(1_000);
    listener.apply(now, vec![peer(&dialer, &[])]);
    apply(&mut dialer, &listener, now, true);
    run_ms(&mut now, &mut dialer, &mut listener, 2_000);
    assert_eq!((paths_up(&dialer), paths_up(&listener)), (2, 2));
    apply(&mut dialer, &listener, now, false);
    run_ms(&mut now, &mut dialer, &mut listener, 100);
    assert_eq!((paths_up(&dialer), paths_up(&listener)), (1, 1));
    run_ms(&mut now, &mut dialer, &mut listener, 10_000);
    assert_eq!((paths_up(&dialer), paths_up(&listener)), (1, 1));
    apply(&mut dialer, &listener, now, true);
    run_ms(&mut now, &mut dialer, &mut listener, 3_000);
    assert_eq!((paths_up(&dialer), paths_up(&listener)), (2, 2));
}
