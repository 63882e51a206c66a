//! A peer that has a session and says whatever it likes under it, to the cores and the life cycle of the tunnel.

#[allow(clippy::unwrap_used, reason = "the tests' own pair of nodes")]
#[path = "../../../crates/tunnel/tests/pair/mod.rs"]
mod pair;

use self::pair::Pair;

/// Steps that a datagram may cost at the send logs: 64 look-ups of a few each, and what it confirms.
const FEEDBACK_STEPS_MAX: u64 = 64 * 40 + 2_048;
/// Lanes that a round may look at for one datagram.
const LANE_STEPS_MAX: u64 = 512;
/// Datagrams that one of the peer's may be answered with at once.
const ANSWERS_MAX: usize = 8;
/// Bytes that a peer may have this node hold.
const PEER_BYTES_MAX: usize = 16 << 20;

/// Datagrams `wait:8 | core:4, path:4 | length:16 | frames` of a peer with two cores to a node with two, which sends packets meanwhile. What
/// each costs is bounded, and afterwards the node still serves whoever is honest.
pub fn peer_frames(data: &[u8]) {
    let mut pair = Pair::joined(2, 2);
    // Packets that nobody has confirmed.
    for number in 0..240 {
        pair.listener.send(pair.now, 1, 650, 1_000 + number % 64);
        if number % 8 == 0 {
            pair.now = pair.now.plus_ms(1);
            pair.listener.round(pair.now);
        }
    }
    pair.listener.out.sent.clear();
    let mut rest = data;
    let mut datagrams = 0;
    while let Some((step, tail)) = rest.split_first_chunk::<4>() {
        let length = usize::from(u16::from_be_bytes([step[2], step[3]])) % 1_400;
        let (frames, tail) = tail.split_at(length.min(tail.len()));
        rest = tail;
        let (core, path) = (usize::from(step[1] >> 4) % 2, step[1] & 7);
        pair.dialer.out.sent.clear();
        pair.dialer.say(pair.now, core, path, frames.to_vec());
        one(&mut pair);
        pair.now = pair.now.plus_us(u64::from(step[0]) * 50);
        pair.dialer.out.sent.clear();
        pair.listener.round(pair.now);
        pair.listener.out.sent.clear();
        datagrams += 1;
        if datagrams == 64 {
            break;
        }
    }
    honest(&mut pair);
}

/// Lets the listener receive what the dialer has just said.
fn one(pair: &mut Pair) {
    let from = std::net::SocketAddr::from(([192, 0, 2, 1], 40_000));
    let cost = |pair: &Pair| {
        let cores = &pair.listener.cores;
        let feedback: u64 = cores.iter().map(tunnel::forwarder::Forwarder::feedback_steps).sum();
        let lanes: u64 = cores.iter().map(tunnel::forwarder::Forwarder::lane_steps).sum();
        (feedback, lanes)
    };
    for sent in std::mem::take(&mut pair.dialer.out.sent) {
        let before = cost(pair);
        pair.listener.out.sent.clear();
        pair.listener.receive(pair.now, from, None, &mut sent.bytes.clone());
        let after = cost(pair);
        let (feedback, lanes) = (after.0.saturating_sub(before.0), after.1.saturating_sub(before.1));
        assert!(feedback <= FEEDBACK_STEPS_MAX, "{feedback} steps at the send logs");
        assert!(lanes <= LANE_STEPS_MAX, "{lanes} lanes looked at");
        let answers = &pair.listener.out.sent;
        assert!(answers.len() <= ANSWERS_MAX, "{} datagrams for one", answers.len());
        let held = pair.listener.node.peer_bytes();
        assert!(held <= PEER_BYTES_MAX, "{held} bytes held for one peer");
    }
}

/// A peer whose session has ended by what it said joins again; then its packets are delivered.
fn honest(pair: &mut Pair) {
    pair.dialer.out = Default::default();
    pair.listener.out = Default::default();
    for _ in 0..40 {
        for number in 0..4 {
            pair.dialer.send(pair.now, 2, 200, 7_000 + number);
        }
        pair.run_ms(250);
        if !pair.listener.out.delivered.is_empty() {
            return;
        }
    }
    panic!("nothing is delivered for ten seconds");
}
