//! Limits of what an authenticated peer may make a node do: every datagram has a bounded cost, however it is made.
#![allow(clippy::unwrap_used, reason = "tests")]

mod pair;

use packet::DropReason;
use pair::Pair;
use tunnel::frame::{
    Frame, NackRange, PacketHead, PieceHead, ReportEntry, nack_bytes, report_bytes, write_nack, write_report,
};
use tunnel::order::Order;

/// A pair whose listener has sent much that the dialer has not reported.
fn with_full_logs() -> Pair {
    let mut pair = Pair::joined(1, 1);
    pair.run_ms(500);
    // Not so long that the silence of the peer is noticed.
    for step in 0..400 {
        pair.listener.send(pair.now, 1, 650, step % 64 + 1_000);
        if step % 8 == 0 {
            pair.now = pair.now.plus_ms(1);
            pair.listener.round(pair.now);
        }
    }
    assert!(pair.listener.out.sent.len() > 150, "{}", pair.listener.out.sent.len());
    pair
}

/// Lets the dialer say something; what the listener looked at for it, and what it refused.
fn cost(pair: &mut Pair, frames: Vec<u8>) -> (u64, u64) {
    let before = (pair.listener.cores[0].feedback_steps(), pair.listener.drops(DropReason::FrameBudget));
    pair.listener.out.sent.clear();
    pair.dialer.say(pair.now, 0, 0, frames);
    assert_eq!(pair.dialer.out.sent.len(), 1);
    pair.deliver();
    let after = (pair.listener.cores[0].feedback_steps(), pair.listener.drops(DropReason::FrameBudget));
    (after.0 - before.0, after.1 - before.1)
}

fn nack(ranges: &[NackRange]) -> Vec<u8> {
    let mut frame = vec![0; nack_bytes(ranges.len())];
    write_nack(&mut frame, 0, 0, 0, ranges).unwrap();
    frame
}

fn report(highest: u64, packets: u64) -> Vec<u8> {
    let entry = ReportEntry { highest, packets, bytes: u64::MAX, ..ReportEntry::default() };
    let mut frame = vec![0; report_bytes(1)];
    write_report(&mut frame, 0, &[entry]).unwrap();
    frame
}

#[test]
fn nacks_of_one_datagram_cost_a_bounded_number_of_look_ups() {
    let mut pair = with_full_logs();
    let honest = cost(&mut pair, nack(&[NackRange { first: 40, count: 3 }]));
    assert!(honest.0 > 0 && honest.0 < 100 && honest.1 == 0, "{honest:?}");
    // As many ranges as a datagram holds, each over everything that was sent or over nothing that was.
    for (first, count) in [(0, 140), (100, 1), (1 << 40, u16::MAX), (0, u16::MAX)] {
        let frame = nack(&[NackRange { first, count }; 64]);
        let (steps, refused) = cost(&mut pair, frame.repeat(2));
        assert!(steps < 64 * 30 + 512, "{steps} steps for {first}+{count}");
        assert!(refused > 0, "what is over the budget is counted");
    }
}

#[test]
fn the_same_datagram_is_sent_again_once() {
    let mut pair = with_full_logs();
    let frame = nack(&[NackRange { first: 100, count: 20 }; 4]);
    cost(&mut pair, frame);
    let before = pair.listener.out.sent.len();
    pair.listener.round(pair.now);
    assert!(pair.listener.out.sent.len() <= before + 20);
}

#[test]
fn reports_of_one_datagram_cost_a_bounded_number_of_look_ups() {
    let mut pair = with_full_logs();
    let frames: Vec<u8> = (0..90).flat_map(|at| report(50 + at / 30, 10_000 + at)).collect();
    let (steps, refused) = cost(&mut pair, frames);
    // Each entry that left is settled once.
    assert!(steps < 64 * 40 + 300, "{steps} steps");
    assert_eq!(refused, 90 - 64);
    let (steps, refused) = cost(&mut pair, report(u64::MAX, u64::MAX));
    assert_eq!((steps, refused), (0, 1), "nothing with this counter was ever sent");
}

fn written(frame: &Frame<'_>) -> Vec<u8> {
    let mut bytes = vec![0; frame.encoded_len()];
    frame.write(&mut bytes, 0).unwrap();
    bytes
}

/// Every core of the dialer says `frames(n)` for n = 0, 1, 2 … to every core of the listener.
fn flood(pair: &mut Pair, datagrams: u32, frames: impl Fn(u32) -> Vec<u8>) {
    for at in 0..datagrams {
        let core = at as usize % pair.dialer.cores.len();
        pair.dialer.say(pair.now, core, 0, frames(at));
        if at % 64 == 0 {
            pair.deliver();
        }
    }
    pair.deliver();
}

#[test]
fn pieces_of_packets_that_never_become_whole_take_bounded_memory() {
    let mut pair = Pair::joined(8, 4);
    let before = pair.listener.node.peer_bytes();
    // A peer that says of each few bytes that they are the end of 64 KB.
    flood(&mut pair, 4_000, |at| {
        let piece = |n: u32| {
            let order = Order { stamp: 16 * at + n, back: 0, same_path: false };
            let head = PieceHead { order, total: u16::MAX, offset: 60_000, ..PieceHead::default() };
            written(&Frame::Piece { head: PieceHead { bytes: Some(20), ..head }, start: 0, body: &[7; 20] })
        };
        (0..16).flat_map(piece).collect()
    });
    let kept = pair.listener.node.peer_bytes() - before;
    assert!(kept > 0 && kept < 2 << 20, "{kept} bytes for 1.3 MB that came");
    // One that sends all but the last byte of its packets.
    flood(&mut pair, 40_000, |at| {
        let order = Order { stamp: 1_000_000 + at / 40, back: 0, same_path: false };
        let offset = (at % 40) as u16 * 1_300;
        let head = PieceHead { order, total: 60_000, offset, bytes: Some(1_300), ..PieceHead::default() };
        written(&Frame::Piece { head, start: 0, body: &[7; 1_300] })
    });
    assert!(pair.listener.node.peer_bytes() <= 16 << 20, "{}", pair.listener.node.peer_bytes());
    pair.run_ms(1_100);
    assert!(pair.listener.node.peer_bytes() <= before + (256 << 10), "it is given back");
}

#[test]
fn packets_that_wait_for_order_take_bounded_memory() {
    let mut pair = Pair::joined(8, 4);
    let body = pair::udp(1, 2, 1_350, 9);
    // Each waits for one that never comes.
    flood(&mut pair, 60_000, |at| {
        let order = Order { stamp: 2 * (at / 8) + 2, back: 1, same_path: false };
        let head = PacketHead { order: Some(order), ..PacketHead::default() };
        written(&Frame::Packet { head, start: 0, body: &body })
    });
    assert!(pair.listener.node.peer_bytes() <= 16 << 20, "{}", pair.listener.node.peer_bytes());
    assert!(pair.listener.out.delivered.len() > 10_000, "what finds no place is not lost");
}

/// Datagrams that the listener sends in answer to one with these frames, and the bytes of both.
fn answers(pair: &mut Pair, frames: Vec<u8>) -> (usize, usize, usize) {
    pair.deliver();
    pair.dialer.say(pair.now, 0, 0, frames);
    let asked: usize = pair.dialer.out.sent.iter().map(|sent| sent.bytes.len()).sum();
    for sent in std::mem::take(&mut pair.dialer.out.sent) {
        let from = std::net::SocketAddr::from(([192, 0, 2, 1], 40_000));
        pair.listener.receive(pair.now, from, None, &mut sent.bytes.clone());
    }
    let sent = std::mem::take(&mut pair.listener.out.sent);
    (sent.len(), sent.iter().map(|sent| sent.bytes.len()).sum(), asked)
}

#[test]
fn a_datagram_full_of_questions_gets_one_small_answer() {
    let mut pair = Pair::joined(1, 1);
    pair.run_ms(100);
    let question = |id: u32| {
        let token = u64::from(id).to_be_bytes();
        let asked =
            [Frame::Ping { id }, Frame::Challenge { token, path: 0 }, Frame::Probe { id, size: 1_000 }];
        asked.iter().flat_map(written).collect::<Vec<u8>>()
    };
    let refused = pair.listener.drops(DropReason::FrameBudget);
    for count in [1, 50] {
        let frames = (0..count).flat_map(question).collect();
        let (datagrams, bytes, asked) = answers(&mut pair, frames);
        assert!(datagrams == 1 && bytes <= asked, "{datagrams} datagrams, {bytes} bytes for {asked}");
    }
    assert_eq!(pair.listener.drops(DropReason::FrameBudget) - refused, 3 * 49);
    // One after the other: only so many in a time.
    let mut answered = 0;
    for id in 0..20_000 {
        pair.now = pair.now.plus_us(10);
        answered += answers(&mut pair, question(id)).0;
    }
    assert!((400..1_000).contains(&answered), "{answered} answers in 0.2 s");
}

#[test]
fn news_that_are_none_change_nothing_and_control_frames_wake_one_bond() {
    let mut pair = Pair::joined(1, 1);
    pair.run_ms(100);
    // 500 other peers, with nothing to do.
    let others = (0..500u16).map(|at| {
        let mut other = pair::peer(&pair.listener, &[]);
        other.id = packet::attachment::BondId(1_000 + at);
        other.name = format!("other-{at}");
        let mut key = [7; 32];
        key[..2].copy_from_slice(&at.to_be_bytes());
        other.public_key = tunnel::PrivateKey::new(key).public();
        other.allowed_ips = Vec::new();
        other
    });
    let mut peers = vec![pair::peer(&pair.dialer, &[])];
    peers.extend(others);
    let now = pair.now;
    pair.listener.apply(now, peers);
    pair.run_ms(10);
    let bonds = pair.listener.node.bonds.load_full();
    let bond = bonds.iter().find(|bond| bond.peer.load().name == "peer-1").unwrap();
    let told = bond.cores.load_full().unwrap();
    let polled = pair.listener.node.polled();
    let info = written(&Frame::ProcessorInfo(&told.info.encode().unwrap()));
    let state = tunnel::frame::PeerPathState::Up;
    for _ in 0..20 {
        let frames = [&info[..], &written(&Frame::PathState { path: 0, state })].concat();
        pair.dialer.say(pair.now, 0, 0, frames);
        pair.run_ms(1);
    }
    assert!(std::sync::Arc::ptr_eq(&told, &bond.cores.load_full().unwrap()), "nothing was rebuilt");
    let polled = pair.listener.node.polled() - polled;
    assert!(polled < 100, "timers of {polled} bonds ran");
    // News that are news each time: a few of them are taken.
    let mut taken = 0;
    for load in 0..200u8 {
        let before = bond.cores.load_full().unwrap();
        let mut changed = told.info.clone();
        changed.load = vec![load];
        pair.dialer.say(pair.now, 0, 0, written(&Frame::ProcessorInfo(&changed.encode().unwrap())));
        pair.deliver();
        taken += usize::from(!std::sync::Arc::ptr_eq(&before, &bond.cores.load_full().unwrap()));
    }
    assert!((1..=25).contains(&taken), "{taken} changes of the cores at once");
}

#[test]
fn an_address_that_says_nothing_more_gets_three_challenges() {
    let mut pair = Pair::joined(1, 1);
    pair.run_ms(100);
    // A datagram of a path that the listener does not know, from wherever the peer likes.
    pair.dialer.say(pair.now, 0, 0, vec![0]);
    let mut datagram = pair.dialer.out.sent.pop_back().unwrap().bytes;
    pair.dialer.out.sent.clear();
    let victim = std::net::SocketAddr::from(([198, 51, 100, 9], 53));
    // Its path is the known one, which has been silent for long enough to have moved.
    pair.now = pair.now.plus_ms(3_100);
    pair.listener.receive(pair.now, victim, None, &mut datagram);
    let mut challenges = 0;
    for _ in 0..30_000 {
        pair.now = pair.now.plus_ms(1);
        pair.listener.round(pair.now);
        let sent = std::mem::take(&mut pair.listener.out.sent);
        challenges += sent.iter().filter(|sent| sent.target.route.remote == victim).count();
    }
    assert_eq!(challenges, 3);
}

#[test]
fn lanes_on_which_nothing_happens_cost_nothing() {
    // So many lanes at a core of the listener, and the lanes it looks at in a second in which a ping a millisecond comes.
    let cost = |cores: u8| {
        let mut pair = Pair::joined(cores, 1);
        pair.run_ms(300);
        for core in 0..usize::from(cores) {
            for _ in 0..4 {
                let body = pair::udp(1, 2, 100, 9);
                let head = PacketHead::default();
                pair.dialer.say(pair.now, core, 0, written(&Frame::Packet { head, start: 0, body: &body }));
            }
            pair.run_ms(1);
        }
        pair.run_ms(300);
        let before = pair.listener.cores[0].lane_steps();
        for id in 0..1_000 {
            pair.dialer.say(pair.now, 0, 0, written(&Frame::Ping { id }));
            pair.now = pair.now.plus_ms(1);
            pair.deliver();
            pair.listener.round(pair.now);
            pair.listener.out.sent.clear();
        }
        pair.listener.cores[0].lane_steps() - before
    };
    let (few, many) = (cost(2), cost(128));
    assert!(few > 0 && many <= few + few / 10, "{many} lanes looked at where {few} were with two");
}
