//! Handshakes against a hostile network: two that dial at once, recordings, forged cookies, changes of the configuration.
#![allow(clippy::unwrap_used, reason = "tests")]

mod pair;

use std::net::SocketAddr;
use std::sync::Arc;

use pair::{Pair, Sent, Side, peer};
use tunnel::bond::Bond;
use tunnel::config::NodeConfig;
use tunnel::header::{Header, Kind};
use tunnel::mac::{Guard, GuardLimits};
use tunnel::session::Session;
use tunnel::time::Time;
use tunnel::{Encryption, PrivateKey};

/// Two nodes with a network of delays and losses between them; a dialer has a socket for each bond and path.
struct Net {
    sides: [Side; 2],
    now: Time,
    /// Time of arrival, receiver, where it comes from and goes to.
    queue: Vec<(Time, usize, SocketAddr, SocketAddr, Vec<u8>)>,
    random: fastrand::Rng,
    loss: f64,
    delay_ms: std::ops::Range<u64>,
    /// Datagrams that a side dials with do not arrive; its answers do.
    dials_in_vain: [bool; 2],
}

fn socket_of(address: SocketAddr) -> Option<(usize, u8)> {
    let number = address.port().checked_sub(40_000)?;
    Some((usize::from(number / 16), (number % 16) as u8))
}

impl Net {
    /// The node with the lower public key is the first.
    fn new(seed: u64) -> Self {
        let mut sides = [Side::new(1, 1), Side::new(2, 1)];
        if sides[0].node.public_key() > sides[1].node.public_key() {
            sides.swap(0, 1);
        }
        let random = fastrand::Rng::with_seed(seed);
        Self {
            sides,
            now: Time::from_ms(1_000),
            queue: Vec::new(),
            random,
            loss: 0.0,
            delay_ms: 1..2,
            dials_in_vain: [false; 2],
        }
    }

    fn dial(&mut self, from: usize) {
        let to = &self.sides[1 - from];
        let dials = peer(to, &[to.address]);
        self.sides[from].apply(self.now, vec![dials]);
    }

    fn listen(&mut self, at: usize) {
        let listens = peer(&self.sides[1 - at], &[]);
        self.sides[at].apply(self.now, vec![listens]);
    }

    fn origin(&self, side: usize, sent: &Sent) -> SocketAddr {
        let mut from = self.sides[side].address;
        if let Some(bond) = sent.target.bond.filter(|_| sent.target.dialer) {
            from.set_port(40_000 + bond as u16 * 16 + u16::from(sent.target.path));
        }
        from
    }

    /// Puts on its way what the sides sent.
    fn collect(&mut self) {
        for side in 0..2 {
            for sent in std::mem::take(&mut self.sides[side].out.sent) {
                let from = self.origin(side, &sent);
                let in_vain = sent.target.dialer && self.dials_in_vain[side];
                if !in_vain && self.random.f64() >= self.loss {
                    let at = self.now.plus_ms(self.random.u64(self.delay_ms.clone()));
                    self.queue.push((at, 1 - side, from, sent.target.route.remote, sent.bytes));
                }
            }
        }
    }

    /// Runs until `end`, from event to event.
    fn run(&mut self, end: Time) {
        while self.now < end {
            let next = self.sides.each_mut().map(|side| side.round(self.now)).into_iter().min().unwrap();
            self.collect();
            let arrival = self.queue.iter().map(|event| event.0).min().unwrap_or(Time::MAX);
            self.now = next.min(arrival).max(self.now.plus_us(100)).min(end);
            while let Some(at) = self.queue.iter().position(|event| event.0 <= self.now) {
                let (_, to, from, address, mut bytes) = self.queue.swap_remove(at);
                self.sides[to].receive(self.now, from, socket_of(address), &mut bytes);
                self.collect();
            }
        }
    }

    fn bond(&self, side: usize) -> Arc<Bond> {
        let bonds = self.sides[side].node.bonds.load_full();
        assert_eq!(bonds.iter().count(), 1);
        Arc::clone(bonds.iter().next().unwrap())
    }

    fn session(&self, side: usize) -> Option<Arc<Session>> {
        self.bond(side).current.load_full()
    }

    /// Both send with the keys of one handshake.
    fn joined(&self) -> bool {
        match (self.session(0), self.session(1)) {
            (Some(one), Some(other)) => {
                one.local_index == other.remote_index && one.remote_index == other.local_index
            }
            _ => false,
        }
    }
}

#[test]
fn two_that_dial_at_once_end_in_one_bond() {
    for seed in 0..2_000 {
        let mut net = Net::new(seed);
        net.loss = net.random.f64() * 0.2;
        net.delay_ms = 1..2 + net.random.u64(..80);
        let first = net.random.usize(..2);
        net.dial(first);
        let pause = net.random.u64(..400);
        net.run(net.now.plus_ms(pause));
        net.dial(1 - first);
        let start = net.now;
        while !(net.joined() && net.bond(0).dialer && !net.bond(1).dialer) {
            net.run(net.now.plus_ms(20));
            assert!(net.now.since(start) < 15_000_000_000, "seed {seed}: not joined");
        }
        net.run(net.now.plus_ms(1_000));
        assert!(net.joined() && net.bond(0).dialer && !net.bond(1).dialer, "seed {seed}: it does not last");
    }
}

/// Both have endpoints, as two sites with fixed addresses do; a NAT or a firewall lets one direction through. Whose key is lower is
/// chance.
#[test]
fn two_that_dial_join_by_the_direction_that_works() {
    for seed in 0..40 {
        for closed in 0..2 {
            let mut net = Net::new(seed);
            net.delay_ms = 1..2 + net.random.u64(..80);
            net.dials_in_vain[closed] = true;
            net.dial(0);
            let pause = net.random.u64(..20_000);
            net.run(net.now.plus_ms(pause));
            net.dial(1);
            net.run(net.now.plus_ms(15_000));
            assert!(net.joined() && net.bond(1 - closed).dialer, "seed {seed}: {closed} is not reached");
            let session = net.session(0).unwrap();
            net.run(net.now.plus_ms(30_000));
            assert!(Arc::ptr_eq(&session, &net.session(0).unwrap()), "seed {seed}: it does not last");

            // Now it is the other one whose datagrams vanish.
            net.dials_in_vain = [closed == 1, closed == 0];
            net.run(net.now.plus_ms(40_000));
            assert!(net.joined() && net.bond(closed).dialer, "seed {seed}: {closed} does not dial again");
        }
    }
}

/// Answers that take longer than the pause between handshakes: two satellites, a link with a long queue, a path over TCP.
#[test]
fn a_long_round_trip_joins_and_gets_new_keys() {
    for one_way_ms in [600, 800, 1_100, 1_400] {
        let mut net = Net::new(one_way_ms);
        net.delay_ms = one_way_ms..one_way_ms + 20;
        net.listen(1);
        net.dial(0);
        net.run(net.now.plus_ms(10_000));
        assert!(net.joined(), "{one_way_ms} ms: not joined");
        for _ in 0..3 {
            let old = net.session(0).unwrap();
            old.spend();
            net.sides[0].node.poll_soon(net.now);
            for _ in 0..1_000 {
                net.run(net.now.plus_ms(10));
                let sends_with = net.session(0).unwrap();
                assert!(
                    net.sides[1].node.session(sends_with.remote_index).is_some(),
                    "{one_way_ms} ms: the dialer seals with keys that the listener has dropped"
                );
            }
            assert!(
                net.joined() && !Arc::ptr_eq(&old, &net.session(0).unwrap()),
                "{one_way_ms} ms: old keys"
            );
        }
    }
}

/// The dialer is started again at once; its goodbye takes a quick path and a slow one.
#[test]
fn a_late_goodbye_ends_nothing_of_the_next_run() {
    let mut net = Net::new(5);
    net.delay_ms = 20..21;
    net.listen(1);
    net.dial(0);
    net.run(net.now.plus_ms(2_000));
    assert!(net.joined());
    net.queue.clear();
    let goodbye = |net: &mut Net| {
        let mut actions = Vec::new();
        net.sides[0].node.close_all(&mut actions);
        net.sides[0].cores[0].run(net.now, actions, &mut net.sides[0].out);
        net.sides[0].out.sent.pop_back().unwrap()
    };
    let (quick, mut slow) = (goodbye(&mut net), goodbye(&mut net));
    let origin = net.origin(0, &slow);
    net.queue.push((net.now, 1, origin, quick.target.route.remote, quick.bytes));
    net.run(net.now.plus_ms(10));
    assert!(net.session(1).is_none(), "the quick one is believed");

    let number = net.sides[0].number;
    let again = NodeConfig {
        boot_id: 77,
        wall_clock_ns: 1_900_000_000_000_000_000,
        ..NodeConfig::of_number(number, 1)
    };
    net.sides[0] = Side::with(number, again);
    net.dial(0);
    while net.sides[1].node.sessions_held() == 0 {
        net.run(net.now.plus_ms(1));
        assert!(net.now < Time::from_ms(10_000), "no handshake");
    }
    assert!(net.session(1).is_none(), "not confirmed yet");
    net.sides[1].receive(net.now, origin, None, &mut slow.bytes);
    net.run(net.now.plus_ms(300));
    assert!(net.joined());
}

#[test]
fn a_recorded_initiation_ends_no_session() {
    let mut net = Net::new(1);
    // At some time the one with the lower key dialled, and somebody kept the message.
    net.dial(0);
    net.sides[0].round(net.now);
    let recorded = net.sides[0].out.sent.pop_back().unwrap().bytes;
    assert_eq!(Header::parse(&recorded).unwrap().kind, Kind::Initiation);
    net.sides[0].out.sent.clear();
    // Now it listens, and the other one dials.
    net.listen(0);
    net.dial(1);
    net.run(net.now.plus_ms(1_000));
    assert!(net.joined() && net.bond(1).dialer);
    let session = net.session(1).unwrap();
    for _ in 0..50 {
        let attacker = SocketAddr::from(([203, 0, 113, 9], 9));
        net.sides[1].receive(net.now, attacker, None, &mut recorded.clone());
        net.run(net.now.plus_ms(30));
    }
    assert!(Arc::ptr_eq(&session, &net.session(1).unwrap()), "the session stays");
    assert!(net.joined() && net.bond(1).dialer, "and nobody yields");
    assert!(net.sides[1].node.session(session.local_index).is_some());
}

#[test]
fn forged_cookie_replies_on_one_link_do_not_delay_the_others() {
    let mut net = Net::new(3);
    let listener = net.sides[1].node.public_key();
    net.listen(1);
    let mut dials = peer(&net.sides[1], &[net.sides[1].address]);
    dials.paths.per_wan_pair = 2;
    let now = net.now;
    net.sides[0].apply(now, vec![dials]);
    // Who sits on the first link answers each Initiation within a millisecond, and lets nothing through. The other link
    // takes 300 ms each way.
    let forger = Guard::new(&listener, [5; 32], GuardLimits::default());
    net.delay_ms = 300..301;
    let start = net.now;
    let mut forged = 0;
    while !net.joined() {
        net.run(net.now.plus_ms(1));
        let mut at = 0;
        while at < net.queue.len() {
            let (_, to, from, _, bytes) = net.queue[at].clone();
            if to == 1 && socket_of(from).is_some_and(|(_, path)| path == 0) {
                net.queue.remove(at);
                if let Ok(reply) = forger.cookie_reply(net.now, from, &bytes) {
                    let address = net.sides[1].address;
                    net.queue.push((net.now.plus_us(500), 0, address, from, reply.to_vec()));
                    forged += 1;
                }
            } else {
                at += 1;
            }
        }
        assert!(net.now.since(start) < 2_000_000_000, "not joined after {forged} forged replies");
    }
    assert!(forged > 0);
}

#[test]
fn encryption_that_is_wanted_holds_from_that_moment() {
    for before in [Encryption::Off, Encryption::Partial] {
        let mut pair = Pair::joined(1, 1);
        let apply = |pair: &mut Pair, encryption: Encryption, both: bool| {
            let mut listens = peer(&pair.dialer, &[]);
            let mut dials = peer(&pair.listener, &[pair.listener.address]);
            (listens.encryption, dials.encryption) = (encryption, encryption);
            pair.listener.apply(pair.now, vec![listens]);
            if both {
                pair.dialer.apply(pair.now, vec![dials]);
            }
        };
        let current = |side: &Side| side.node.bonds.load().get(0).unwrap().current.load_full().unwrap();
        apply(&mut pair, before, true);
        pair.run_ms(1_500);
        assert_eq!((current(&pair.dialer).encryption, current(&pair.listener).encryption), (before, before));
        let number = current(&pair.listener).number;
        apply(&mut pair, Encryption::On, false);
        // What the peer, who knows nothing yet, sends in the clear is not taken; what we send shows nothing.
        let delivered = pair.listener.out.delivered.len();
        pair.listener.out.sent.clear();
        pair.dialer.send(pair.now, 2, 900, 1);
        pair.listener.send(pair.now, 1, 900, 2);
        pair.dialer.round(pair.now);
        pair.listener.round(pair.now);
        let plain = pair::udp(2, 1, 900, 2);
        let clear = |sent: &Sent| sent.bytes.windows(20).any(|bytes| bytes == &plain[..20]);
        assert!(!pair.listener.out.sent.is_empty() && !pair.listener.out.sent.iter().any(clear));
        pair.deliver();
        assert_eq!(pair.listener.out.delivered.len(), delivered, "{before:?}");
        assert!(pair.listener.drops(packet::DropReason::CleartextRefused) > 0);
        // New keys are asked for at once.
        pair.run_ms(1_500);
        assert_eq!(current(&pair.listener).encryption, Encryption::On);
        assert!(current(&pair.listener).number > number);
        pair.dialer.send(pair.now, 2, 900, 1);
        pair.run_ms(5);
        assert!(pair.listener.out.delivered.len() > delivered);
    }
}

#[test]
fn another_preshared_key_makes_new_keys_at_once() {
    let mut pair = Pair::joined(1, 1);
    let current = |side: &Side| side.node.bonds.load().get(0).unwrap().current.load_full().unwrap();
    let number = current(&pair.dialer).number;
    let mut listens = peer(&pair.dialer, &[]);
    let mut dials = peer(&pair.listener, &[pair.listener.address]);
    for peer in [&mut listens, &mut dials] {
        peer.preshared_key = Some(PrivateKey::new([9; 32]));
    }
    pair.listener.apply(pair.now, vec![listens]);
    pair.dialer.apply(pair.now, vec![dials]);
    pair.run_ms(1_500);
    assert!(current(&pair.dialer).number > number && current(&pair.listener).number > number);
}

#[test]
fn keys_end_with_their_time_also_where_nothing_arrives() {
    let mut pair = Pair::joined(2, 2);
    let weak: Vec<_> = [&pair.dialer, &pair.listener]
        .map(|side| Arc::downgrade(&side.node.bonds.load().get(0).unwrap().current.load_full().unwrap()))
        .into();
    assert!(weak.iter().all(|session| session.upgrade().is_some()));
    // The network is gone, the cores look after their timers.
    for _ in 0..(tunnel::session::REJECT_AFTER_MS + 10_000) / 100 {
        pair.now = pair.now.plus_ms(100);
        pair.dialer.round(pair.now);
        pair.listener.round(pair.now);
        pair.dialer.out.sent.clear();
        pair.listener.out.sent.clear();
    }
    assert!(weak.iter().all(|session| session.upgrade().is_none()), "somebody keeps the keys");
}
