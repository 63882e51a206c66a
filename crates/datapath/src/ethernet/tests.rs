#![allow(clippy::unwrap_used, reason = "tests")]
use packet::DropReason;
use packet::ethernet::Mac;
use services::hash::SecretState;
use services::random::Random;

use super::*;

const A: Port = Port::Bond(BondId(0));
const B: Port = Port::Bond(BondId(1));
const HOPS: u8 = 8;
const BROADCAST: [u8; 6] = Mac::BROADCAST.0;
const FLOOD_LAN: Verdict = Verdict::Flood { tap: false, peers: true };

fn settings() -> Settings {
    Settings {
        mtu: 1500,
        relay: false,
        stations_max: 64,
        stations_per_peer: 8,
        age_s: 300,
        flood_per_s: 1_000,
        answers: true,
        peers: vec![BondId(0), BondId(1)],
        down: Vec::new(),
        number: 7,
        cores: 2,
    }
}

fn switch(settings: Settings) -> Switch {
    Switch::new(settings, SecretState::of_number(1))
}

fn mac(number: u8) -> [u8; 6] {
    [2, 0, 0, 0, 0, number]
}

/// A frame of IEEE 802.3 with a tag, or none.
fn frame(dst: [u8; 6], src: [u8; 6], vlan: u16) -> Vec<u8> {
    let mut frame = [dst, src].concat();
    if vlan > 0 {
        frame.extend([0x81, 0]);
        frame.extend(vlan.to_be_bytes());
    }
    frame.extend([0x88, 0xb6]);
    frame.resize(60, 0);
    frame
}

fn arp(dst: [u8; 6], operation: u8, src: [u8; 6], from: u8, to: u8) -> Vec<u8> {
    let mut frame = [dst, src].concat();
    frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, operation]);
    frame.extend(src);
    frame.extend([10, 0, 0, from]);
    frame.extend([0; 6]);
    frame.extend([10, 0, 0, to]);
    frame.resize(60, 0);
    frame
}

fn send(switch: &mut Switch, at_s: u64, from: Port, mut frame: Vec<u8>) -> Verdict {
    switch.frame(at_s * SECOND_NS, from, HOPS, &mut frame)
}

#[test]
fn t14_a_frame_goes_to_its_station_and_floods_until_that_is_known() {
    let mut switch = switch(settings());
    let go = &mut switch;
    assert_eq!(send(go, 1, Port::Tap, frame(mac(2), mac(1), 0)), FLOOD_LAN);
    assert_eq!(send(go, 1, A, frame(mac(1), mac(2), 0)), Verdict::To(Port::Tap));
    assert_eq!(send(go, 1, Port::Tap, frame(mac(2), mac(1), 0)), Verdict::To(A));
    // The same addresses in another VLAN are others.
    assert_eq!(send(go, 1, Port::Tap, frame(mac(2), mac(1), 9)), FLOOD_LAN);
    // Never back to where it came from.
    assert_eq!(send(go, 1, Port::Tap, frame(mac(1), mac(3), 0)), Verdict::Drop(DropReason::EthernetSameSide));
    // A station that was silent is forgotten.
    assert_eq!(send(go, 300, Port::Tap, frame(mac(2), mac(1), 0)), Verdict::To(A));
    assert_eq!(send(go, 301, Port::Tap, frame(mac(2), mac(1), 0)), FLOOD_LAN);
    for second in 301..700 {
        go.tick(second * SECOND_NS, false);
    }
    assert!(go.stations().is_empty(), "{:?}", go.stations());
}

#[test]
fn t14_frames_that_no_bridge_passes_on_end() {
    let mut switch = switch(settings());
    let malformed = Verdict::Drop(DropReason::EthernetMalformed);
    assert_eq!(send(&mut switch, 1, Port::Tap, vec![2; 13]), malformed);
    assert_eq!(send(&mut switch, 1, Port::Tap, frame(mac(2), BROADCAST, 0)), malformed);
    assert_eq!(send(&mut switch, 1, Port::Tap, frame(mac(2), [0; 6], 0)), malformed);
    for (bytes, vlan, fits) in [(1514, 0, true), (1515, 0, false), (1518, 5, true), (1519, 5, false)] {
        let mut large = frame(mac(2), mac(1), vlan);
        large.resize(bytes, 0);
        assert_eq!(send(&mut switch, 1, A, large) != malformed, fits, "{bytes} {vlan}");
    }
    let stp = frame([1, 0x80, 0xc2, 0, 0, 0], mac(1), 0);
    assert_eq!(send(&mut switch, 1, A, stp), Verdict::Drop(DropReason::EthernetLinkLocal));
}

#[test]
fn t14_peers_reach_each_other_only_where_that_is_configured() {
    let mut mesh = switch(settings());
    assert_eq!(
        send(&mut mesh, 1, A, frame(BROADCAST, mac(1), 0)),
        Verdict::Flood { tap: true, peers: false }
    );
    send(&mut mesh, 1, B, frame(BROADCAST, mac(2), 0));
    assert_eq!(send(&mut mesh, 1, A, frame(mac(2), mac(1), 0)), Verdict::Drop(DropReason::EthernetNoRelay));
    let mut hub = switch(Settings { relay: true, ..settings() });
    assert_eq!(send(&mut hub, 1, A, frame(BROADCAST, mac(1), 0)), Verdict::Flood { tap: true, peers: true });
    send(&mut hub, 1, B, frame(BROADCAST, mac(2), 0));
    assert_eq!(send(&mut hub, 1, A, frame(mac(2), mac(1), 0)), Verdict::To(B));
    // The last hop ends at the LAN.
    let last = |hub: &mut Switch, mut frame: Vec<u8>| hub.frame(SECOND_NS, A, 1, &mut frame);
    assert_eq!(last(&mut hub, frame(mac(2), mac(1), 0)), Verdict::Drop(DropReason::EthernetHops));
    assert_eq!(last(&mut hub, frame(BROADCAST, mac(1), 0)), Verdict::Flood { tap: true, peers: false });
    assert_eq!(hub.counters.relayed, 3);
}

#[test]
fn t14_a_peer_that_makes_up_stations_fills_its_own_share_only() {
    let mut switch = switch(settings());
    for number in 0..200 {
        send(&mut switch, 1, A, frame(BROADCAST, [2, 1, 0, 0, 0, number], 0));
    }
    assert_eq!(switch.stations().get(&A), Some(&8));
    assert_eq!(switch.counters.not_learned, 192);
    assert_eq!(
        send(&mut switch, 2, B, frame(BROADCAST, mac(1), 0)),
        Verdict::Flood { tap: true, peers: false }
    );
    assert_eq!(send(&mut switch, 2, Port::Tap, frame(mac(1), mac(2), 0)), Verdict::To(B));
    for number in 0..200 {
        send(&mut switch, 3, Port::Tap, frame(mac(1), [2, 2, 0, 0, 0, number], 0));
    }
    assert_eq!(switch.stations().get(&Port::Tap), Some(&32));
}

#[test]
fn t14_a_peer_that_makes_up_addresses_fills_its_own_share_only() {
    let mut switch = switch(settings());
    // Of stations for which there is no room nothing is believed.
    for number in 0..200 {
        send(&mut switch, 1, A, arp(BROADCAST, 1, [2, 1, 0, 0, 0, number], number, 250));
    }
    assert_eq!((switch.stations().get(&A), switch.neighbors()), (Some(&8), 8));
    // One station has many addresses: four times as many as the peer has stations, and half of all at most.
    for number in 0..200 {
        send(&mut switch, 1, A, arp(BROADCAST, 1, [2, 1, 0, 0, 0, 0], number, 250));
    }
    assert_eq!(switch.neighbors(), 32);
    send(&mut switch, 2, B, arp(BROADCAST, 1, mac(9), 201, 250));
    let question = arp(BROADCAST, 1, mac(1), 1, 201);
    assert!(matches!(send(&mut switch, 2, Port::Tap, question), Verdict::Answer(_)));
    // A share is free again when what was said in it is old.
    for second in 60..90 {
        for part in 0..8 {
            switch.tick(second * SECOND_NS + part * SECOND_NS / 8, false);
        }
    }
    assert_eq!(switch.neighbors(), 0);
    send(&mut switch, 90, A, arp(BROADCAST, 1, [2, 1, 0, 0, 0, 1], 7, 250));
    assert_eq!(switch.neighbors(), 1);
}

#[test]
fn t14_each_side_floods_at_its_own_rate() {
    let mut switch = switch(settings());
    let mut floods = |from, at_ms: u64, dst: [u8; 6]| {
        let mut frame = frame(dst, mac(1), 0);
        (0..1_000)
            .filter(|_| {
                switch.frame(at_ms * SECOND_NS / 1000, from, HOPS, &mut frame)
                    != Verdict::Drop(DropReason::EthernetFlood)
            })
            .count()
    };
    // A tenth of a second's frames at once; unknown stations have a rate of their own, of which each core has a part.
    assert_eq!(floods(A, 1_000, BROADCAST), 100);
    assert_eq!(floods(A, 1_000, mac(9)), 50);
    assert_eq!(floods(B, 9_000, BROADCAST), 100);
    assert_eq!(floods(A, 9_050, BROADCAST), 100);
    assert_eq!(floods(A, 9_060, BROADCAST), 10);
}

#[test]
fn t14_a_station_that_moves_too_often_is_held_where_it_was() {
    let mut switch = switch(settings());
    let mut at = |second, port| send(&mut switch, second, port, frame(BROADCAST, mac(1), 0));
    let held = Verdict::Drop(DropReason::EthernetMoves);
    let sides = [Port::Tap, A, Port::Tap, A];
    for port in sides {
        assert_ne!(at(1, port), held);
    }
    assert_eq!(at(1, Port::Tap), held);
    assert_ne!(at(1, A), held, "where it is it speaks on");
    // Later it may move again, once for each four seconds.
    assert_ne!(at(5, Port::Tap), held);
    assert_eq!(at(5, A), held);
    assert_ne!(at(100, A), held);
}

#[test]
fn t14_questions_about_stations_behind_peers_are_answered_here() {
    let mut switch = switch(settings());
    let go = &mut switch;
    let question = || arp(BROADCAST, 1, mac(1), 1, 2);
    assert_eq!(send(go, 1, Port::Tap, question()), FLOOD_LAN);
    assert_eq!(send(go, 1, A, arp(mac(1), 2, mac(2), 2, 1)), Verdict::To(Port::Tap));
    let Verdict::Answer(answer) = send(go, 2, Port::Tap, question()) else { panic!("not answered") };
    assert_eq!((&answer[..6], &answer[6..12], &answer[22..28]), (&mac(1)[..], &mac(2)[..], &mac(2)[..]));
    // The LAN of the owner hears it itself, so do other VLANs, and probes, announcements, questions to one station pass on.
    assert!(!matches!(send(go, 2, A, arp(BROADCAST, 1, mac(3), 3, 2)), Verdict::Answer(_)));
    assert_eq!(send(go, 2, Port::Tap, arp(BROADCAST, 1, mac(1), 2, 2)), FLOOD_LAN);
    let mut switch = self::switch(settings());
    let go = &mut switch;
    send(go, 1, A, arp(BROADCAST, 1, mac(2), 2, 1));
    assert!(matches!(send(go, 60, Port::Tap, question()), Verdict::Answer(_)));
    assert_eq!(send(go, 61, Port::Tap, question()), FLOOD_LAN, "what was said a minute ago does not count");
    // A second station claims the address: nobody can tell who has it.
    send(go, 70, A, arp(BROADCAST, 1, mac(2), 2, 1));
    send(go, 80, B, arp(BROADCAST, 1, mac(4), 2, 1));
    assert_eq!(send(go, 90, Port::Tap, question()), FLOOD_LAN);
    // Probes for duplicates come from no address.
    let mut probe = question();
    probe[28..32].fill(0);
    send(go, 200, A, arp(BROADCAST, 1, mac(2), 2, 1));
    assert_eq!(send(go, 200, Port::Tap, probe), FLOOD_LAN);
    let mut silent = self::switch(Settings { answers: false, ..settings() });
    send(&mut silent, 1, A, arp(BROADCAST, 1, mac(2), 2, 1));
    assert_eq!(send(&mut silent, 2, Port::Tap, question()), FLOOD_LAN);
}

#[test]
fn t14_cores_tell_each_other_of_stations() {
    let (mut one, mut two) = (switch(settings()), switch(settings()));
    send(&mut one, 1, A, frame(BROADCAST, mac(2), 3));
    let news = one.news();
    assert_eq!(news.len(), 1);
    news.iter().for_each(|news| two.hear(news));
    assert_eq!(send(&mut two, 2, Port::Tap, frame(mac(2), mac(1), 3)), Verdict::To(A));
    // What it heard itself later stands against old news.
    send(&mut two, 3, B, frame(BROADCAST, mac(2), 3));
    news.iter().for_each(|news| two.hear(news));
    assert_eq!(send(&mut two, 3, Port::Tap, frame(mac(2), mac(1), 3)), Verdict::To(B));
    // A station that goes on speaking is told of now and then, not with each frame.
    let told: usize = (10..100)
        .map(|second| {
            send(&mut one, second, A, frame(BROADCAST, mac(2), 3));
            one.news().len()
        })
        .sum();
    assert!((1..=3).contains(&told), "{told}");
}

/// Two nodes whose LANs are joined by a cable besides the bond.
#[test]
fn t14_of_two_nodes_in_one_lan_the_lower_number_works() {
    let node = |number| Switch::new(Settings { number, ..settings() }, SecretState::of_number(number));
    let (mut low, mut high) = (node(1), node(2));
    let passes_bond =
        |verdict: &Verdict| matches!(verdict, Verdict::Flood { peers: true, .. } | Verdict::To(A));
    for second in 1..6 {
        let now_ns = second * SECOND_NS;
        for low_speaks in [true, false] {
            let (from, to) = if low_speaks { (&mut low, &mut high) } else { (&mut high, &mut low) };
            let mut word = from.tick(now_ns, true).unwrap().0;
            // Over the cable to the other's LAN, from there over the bond back.
            let verdict = to.frame(now_ns, Port::Tap, HOPS, &mut word);
            assert!(passes_bond(&verdict), "{verdict:?}");
            assert_eq!(from.frame(now_ns, A, HOPS, &mut word), Verdict::Heard);
        }
        assert!(!low.stands_by(now_ns));
        assert!(high.stands_by(now_ns), "{second}");
        let broadcast = || frame(BROADCAST, mac(1), 0);
        assert_eq!(send(&mut high, second, Port::Tap, broadcast()), Verdict::Drop(DropReason::EthernetLoop));
        assert_eq!(send(&mut high, second, A, broadcast()), Verdict::Drop(DropReason::EthernetLoop));
        assert_eq!(send(&mut low, second, Port::Tap, broadcast()), FLOOD_LAN);
    }
    // The cable is gone: nothing is heard any more.
    assert!(high.stands_by(7 * SECOND_NS) && !high.stands_by(9 * SECOND_NS));
    // A word that anybody could make up proves nothing.
    let mut forged = node(2).tick(10 * SECOND_NS, true).unwrap().0;
    forged[35] ^= 1;
    let mut word = low.tick(10 * SECOND_NS, true).unwrap().0;
    high.frame(10 * SECOND_NS, Port::Tap, HOPS, &mut word);
    high.frame(10 * SECOND_NS, A, HOPS, &mut forged);
    assert!(!high.stands_by(10 * SECOND_NS));
}

/// A node that begins to stand by says so to its peers, which reach its stations another way from then on.
#[test]
fn t14_stations_behind_a_node_that_stands_by_are_forgotten() {
    let node =
        |number, relay| Switch::new(Settings { number, relay, ..settings() }, SecretState::of_number(number));
    let (mut low, mut high, mut hub) = (node(1, false), node(2, false), node(3, true));
    send(&mut low, 1, A, arp(BROADCAST, 1, mac(2), 2, 1));
    let question = || arp(BROADCAST, 1, mac(1), 1, 2);
    assert!(matches!(send(&mut low, 1, Port::Tap, question()), Verdict::Answer(_)));
    let now_ns = 2 * SECOND_NS;
    let mut word = low.tick(now_ns, true).unwrap().0;
    high.frame(now_ns, Port::Tap, HOPS, &mut word);
    let (mut word, none) = high.tick(now_ns, true).unwrap();
    assert_eq!(none, None);
    high.frame(now_ns, A, HOPS, &mut word);
    assert!(high.stands_by(now_ns));
    let mut forgets = 0;
    for second in 3..9 {
        let Some((_, Some(mut forget))) = high.tick(second * SECOND_NS, true) else { continue };
        forgets += 1;
        // A hub passes it on; nobody's LAN gets it, and nobody believes it of a LAN.
        assert_eq!(hub.frame(now_ns, A, HOPS, &mut forget), Verdict::Flood { tap: false, peers: true });
        assert_eq!(low.frame(now_ns, Port::Tap, HOPS, &mut forget), Verdict::Heard);
        assert_eq!(low.stations().get(&A).is_some(), forgets == 1);
        assert_eq!(low.frame(now_ns, A, HOPS, &mut forget), Verdict::Flood { tap: false, peers: false });
        assert_eq!(low.stations().get(&A), None);
    }
    // Twice when it begins and twice when it works again.
    assert_eq!((forgets, low.counters.forgotten, high.counters.forgotten), (4, 4, 2));
    assert_eq!(send(&mut low, 9, Port::Tap, question()), FLOOD_LAN, "nobody knows where the owner is now");
    // So it is with a peer that is down.
    send(&mut low, 9, A, arp(BROADCAST, 1, mac(2), 2, 1));
    low.configure(Settings { number: 1, down: vec![BondId(0)], ..settings() });
    assert_eq!(low.stations().get(&A), None);
}

/// Anybody behind a peer can make a word that looks like one: so many a second of each side make the switch forget.
#[test]
fn t14_words_to_forget_are_limited() {
    let mut switch = switch(settings());
    let mut other = Switch::new(Settings { number: 9, ..settings() }, SecretState::of_number(2));
    let mut word = other.tick(SECOND_NS, true).unwrap().0;
    // The kind: forget.
    word[22] = 2;
    let forgets = (0..1_000u64).filter(|number| {
        let now_ns = SECOND_NS + number * SECOND_NS / 1_000;
        switch.frame(now_ns, A, HOPS, &mut word.clone()) != Verdict::Heard
    });
    let forgets = forgets.count() as u64;
    assert!((190..=220).contains(&forgets), "{forgets}");
    assert_eq!(switch.counters.forgotten, forgets);
    // Another peer's are not silenced by them.
    assert_ne!(switch.frame(SECOND_NS + 999 * SECOND_NS / 1_000, B, HOPS, &mut word.clone()), Verdict::Heard);
    // One that came as far as it may is heeded all the same.
    word[23] = 1;
    assert_ne!(switch.frame(9 * SECOND_NS, A, HOPS, &mut word), Verdict::Heard);
}

/// A node that ceases to stand by says so: what it and its peers heard meanwhile came by the cable that is gone.
#[test]
fn t14_stations_are_forgotten_when_a_node_works_again() {
    let node = |number| Switch::new(Settings { number, ..settings() }, SecretState::of_number(number));
    let (mut low, mut high) = (node(1), node(2));
    let mut word = low.tick(SECOND_NS, true).unwrap().0;
    high.frame(SECOND_NS, Port::Tap, HOPS, &mut word);
    let mut word = high.tick(SECOND_NS, true).unwrap().0;
    high.frame(SECOND_NS, A, HOPS, &mut word);
    assert!(high.stands_by(SECOND_NS));
    // Words of the beginning.
    for second in 2..4 {
        let mut forget = high.tick(second * SECOND_NS, true).unwrap().1.unwrap();
        low.frame(second * SECOND_NS, A, HOPS, &mut forget);
    }
    // Station 2 is in the LAN of the node that stands by.
    for (switch, from) in [(&mut low, Port::Tap), (&mut high, A)] {
        send(switch, 3, from, frame(BROADCAST, mac(2), 0));
    }
    let frame_to_it = || frame(mac(2), mac(1), 0);
    let same_side = Verdict::Drop(DropReason::EthernetSameSide);
    assert_eq!(send(&mut low, 3, Port::Tap, frame_to_it()), same_side, "the cable has it");
    high.news();
    let mut forget = high.tick(5 * SECOND_NS, true).unwrap().1.expect("it says that it works again");
    assert!(!high.stands_by(5 * SECOND_NS));
    assert_eq!(high.news(), [News::ForgetAll]);
    low.frame(5 * SECOND_NS, A, HOPS, &mut forget);
    assert_eq!(low.news().last(), Some(&News::Forget(A)));
    assert_eq!(send(&mut low, 5, Port::Tap, frame_to_it()), FLOOD_LAN);
    assert_eq!(send(&mut high, 5, A, frame_to_it()), Verdict::Flood { tap: true, peers: false });
}

/// Any order of frames, ticks and settings keeps the limits, and nothing ever goes back where it came from.
#[test]
fn t14_random_operations_keep_limits_and_split_horizon() {
    for seed in 0..12 {
        let mut random = Random::of_number(seed);
        let mut draw = |below: u64| random.word() % below;
        let mut now_ns = SECOND_NS;
        let mut go = switch(settings());
        for _ in 0..1_500 {
            now_ns += draw(SECOND_NS / 10);
            if draw(500) == 0 {
                let peers = (0..draw(3) as u16).map(BondId).collect();
                let relay = draw(2) == 0;
                let stations_max = 16 + draw(64) as usize;
                // A smaller table keeps what it has: only what is added is limited.
                let stations_max = stations_max.max(go.settings().stations_max);
                go.configure(Settings { peers, relay, stations_max, ..settings() });
            }
            let port = [Port::Tap, A, B][draw(3) as usize];
            if let Port::Bond(bond) = port
                && !go.settings().peers.contains(&bond)
            {
                continue;
            }
            let (src, dst) = (mac(draw(40) as u8), mac(draw(40) as u8));
            let mut bytes = match draw(6) {
                0 => frame(BROADCAST, src, draw(3) as u16),
                1 => arp(BROADCAST, 1, src, draw(20) as u8, draw(20) as u8),
                2 => arp(dst, 2, src, draw(20) as u8, draw(20) as u8),
                3 => (0..draw(80)).map(|_| draw(256) as u8).collect(),
                _ => frame(dst, src, draw(3) as u16),
            };
            let hops = draw(4) as u8;
            let verdict = go.frame(now_ns, port, hops, &mut bytes);
            match verdict {
                Verdict::To(to) => {
                    assert_ne!(to, port);
                    let between = matches!((port, to), (Port::Bond(_), Port::Bond(_)));
                    assert!(!between || (go.settings().relay && hops > 1), "{port:?} {to:?}");
                }
                Verdict::Flood { tap, peers } => {
                    assert!(!(tap && port == Port::Tap));
                    assert!(port == Port::Tap || !peers || (go.settings().relay && hops > 1));
                }
                Verdict::Drop(_) | Verdict::Answer(_) | Verdict::Heard => {}
            }
            if draw(20) == 0 {
                go.tick(now_ns, draw(2) == 0);
            }
            assert!(go.is_sound(), "seed {seed}");
        }
    }
}
