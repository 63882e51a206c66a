//! Ethernet frames at the switch between a TAP device and bonds.

use datapath::ethernet::{Port, Settings, Switch, Verdict};
use packet::attachment::BondId;
use packet::ethernet::{EthernetFlow, EthernetHeader};
use services::hash::SecretState;

/// Stations at most.
const STATIONS: usize = 32;

/// Frames from all sides, one after the other: `port:8 | hops:8 | length:8 | frame`. None goes back to its side, none between
/// peers where that is off; stations stay within their limits; answers are frames.
pub fn ethernet(data: &[u8]) {
    for relay in [false, true] {
        frames(data, relay);
    }
}

fn frames(mut data: &[u8], relay: bool) {
    let settings = Settings {
        mtu: 1_500,
        relay,
        stations_max: STATIONS,
        stations_per_peer: STATIONS / 4,
        age_s: 10,
        flood_per_s: 1_000,
        answers: true,
        peers: vec![BondId(0), BondId(1)],
        down: Vec::new(),
        number: 5,
        cores: 1,
    };
    let mut switch = Switch::new(settings, SecretState::of_number(1));
    let mut now_ns = 1_000_000_000;
    while let [port, hops, length, rest @ ..] = data {
        let (bytes, behind) = rest.split_at(rest.len().min(usize::from(*length)));
        data = behind;
        now_ns += 200_000_000;
        let from = [Port::Tap, Port::Bond(BondId(0)), Port::Bond(BondId(1))][usize::from(*port % 3)];
        let mut frame = bytes.to_vec();
        let verdict = switch.frame(now_ns, from, *hops, &mut frame);
        assert_eq!(frame.len(), bytes.len());
        match verdict {
            Verdict::To(to) => {
                assert_ne!(to, from);
                assert!(relay && *hops > 1 || to == Port::Tap || from == Port::Tap);
            }
            Verdict::Flood { tap, peers } => {
                assert!(!tap || from != Port::Tap);
                assert!(!peers || from == Port::Tap || relay && *hops > 1);
            }
            Verdict::Answer(answer) => {
                let asked = EthernetHeader::parse(bytes).expect("only a frame is answered");
                let header = EthernetHeader::parse(&answer).expect("an answer is a frame");
                assert_eq!((header.dst, header.vlan), (asked.src, asked.vlan));
                assert_eq!(EthernetFlow::of(&header, &answer).key, EthernetFlow::SHARED);
            }
            Verdict::Drop(_) | Verdict::Heard => {}
        }
        switch.news().iter().for_each(|news| switch.hear(news));
        switch.tick(now_ns, *hops & 1 == 0);
        assert!(switch.stations().values().sum::<usize>() <= STATIONS);
    }
}
