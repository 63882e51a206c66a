//! Frames at the switch between a TAP device and bonds.

use packet::ethernet::Mac;

use super::save;

const ONE: [u8; 6] = [2, 0, 0, 0, 0, 1];
const TWO: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// The LAN, and the first peer.
const LAN: u8 = 0;
const PEER: u8 = 1;

fn step(port: u8, frame: &[u8]) -> Vec<u8> {
    [&[port, 8, frame.len() as u8][..], frame].concat()
}

fn frame(dst: [u8; 6], src: [u8; 6], rest: &[u8]) -> Vec<u8> {
    let mut frame = [&dst[..], &src, rest].concat();
    frame.resize(frame.len().max(60), 0);
    frame
}

fn arp(dst: [u8; 6], operation: u8, src: [u8; 6], from: u8, to: u8) -> Vec<u8> {
    let mut arp = vec![8, 6, 0, 1, 8, 0, 6, 4, 0, operation];
    arp.extend(src);
    arp.extend([10, 0, 0, from]);
    arp.extend([0; 6]);
    arp.extend([10, 0, 0, to]);
    frame(dst, src, &arp)
}

pub fn ethernet() {
    let broadcast = Mac::BROADCAST.0;
    let talk = [
        step(LAN, &frame(TWO, ONE, &[0x88, 0xb6])),
        step(PEER, &frame(ONE, TWO, &[0x88, 0xb6])),
        step(LAN, &frame(TWO, ONE, &[0x88, 0xb6])),
    ];
    save("ethernet", "learns", &talk.concat());
    let tagged = step(PEER, &frame(broadcast, TWO, &[0x88, 0xa8, 0, 7, 0x81, 0, 0, 9, 0x88, 0xb6]));
    save("ethernet", "tagged-twice", &tagged);
    let question = step(LAN, &arp(broadcast, 1, ONE, 1, 2));
    let asked = [question.clone(), step(PEER, &arp(ONE, 2, TWO, 2, 1)), question].concat();
    save("ethernet", "answers-arp", &asked);
    let moves: Vec<u8> =
        (0..12).flat_map(|turn| step(turn % 3, &frame(broadcast, ONE, &[0x88, 0xb6]))).collect();
    save("ethernet", "moves", &moves);
    let made_up: Vec<u8> = (0..60)
        .flat_map(|number| step(number % 2, &frame(broadcast, [2, 1, 0, 0, 0, number], &[0x88, 0xb6])))
        .collect();
    save("ethernet", "made-up-stations", &made_up);
    let mut word = vec![0x88, 0xb5];
    word.extend(*b"ANABLOOP");
    word.extend([1, 8, 0, 0, 0, 0, 0, 0, 0, 4, 1, 2, 3, 4, 5, 6, 7, 8]);
    let word = frame([0x03, 0x41, 0x4e, 0x41, 0x42, 0x52], TWO, &word);
    save("ethernet", "word", &[step(LAN, &word), step(PEER, &word)].concat());
    let stp = frame([1, 0x80, 0xc2, 0, 0, 0], ONE, &[0, 38]);
    save("ethernet", "spanning-tree", &step(LAN, &stp));
    save("ethernet", "cut", &step(LAN, &ONE));
}
