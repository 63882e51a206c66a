//! Flows that move to another core of the peer, and what happens meanwhile.
#![allow(clippy::unwrap_used, reason = "tests")]

mod pair;

use std::sync::Arc;

use pair::Pair;
use steering::cores::CoreState;
use steering::vote::replan;
use tunnel::lifecycle::Action;

/// The listener's core `drained` gives its buckets to the other one.
fn drain(pair: &Pair, drained: u8) {
    let node = &pair.listener.node;
    let before = node.ownership.load_full();
    let state = |core| if core == drained { CoreState::Draining } else { CoreState::Active };
    let states: Vec<CoreState> = (0..before.cores).map(state).collect();
    let table = replan(&before.table, &states, &[]).unwrap();
    node.ownership.store(Arc::new(before.with_table(table, before.alive)));
    node.poll_soon(pair.now);
}

/// The peer takes buckets from a core; flows wait until all that went to that core is confirmed, and in this moment it says goodbye:
/// they go on when there is a session again.
#[test]
fn flows_that_wait_for_their_old_core_go_on_after_a_goodbye() {
    for drained in 0..2 {
        let mut pair = Pair::joined(1, 2);
        let ports = 5_000..5_016;
        let send = |pair: &mut Pair| ports.clone().for_each(|port| pair.dialer.send(pair.now, 2, 200, port));
        send(&mut pair);
        pair.run_ms(100);
        assert_eq!(pair.listener.out.delivered.len(), 16);
        // What is lost is not confirmed.
        send(&mut pair);
        pair.dialer.round(pair.now.plus_ms(1));
        pair.dialer.out.sent.clear();
        drain(&pair, drained);
        for _ in 0..40 {
            pair.now = pair.now.plus_ms(1);
            pair.listener.round(pair.now);
            for sent in std::mem::take(&mut pair.listener.out.sent) {
                let (remote, socket) = (pair.listener.address, Some((0, sent.target.path)));
                pair.dialer.receive(pair.now, remote, socket, &mut sent.bytes.clone());
            }
            pair.dialer.round(pair.now);
            pair.dialer.out.sent.clear();
        }
        send(&mut pair);
        pair.dialer.round(pair.now);
        pair.dialer.out.sent.clear();
        let mut goodbye: Vec<Action> = Vec::new();
        pair.listener.node.close_all(&mut goodbye);
        pair.listener.cores[0].run(pair.now, goodbye, &mut pair.listener.out);
        pair.deliver();
        assert!(!pair.dialer.node.in_session(packet::attachment::BondId(2)));
        pair.run_ms(5_000);
        assert!(pair.is_joined());
        pair.listener.out.delivered.clear();
        send(&mut pair);
        pair.run_ms(500);
        let got = pair.listener.out.delivered.len();
        assert!(got >= 16, "drained {drained}: {got} packets of 16 flows");
    }
}
