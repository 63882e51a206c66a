#![allow(clippy::unwrap_used, reason = "tests")]

use super::super::*;

fn header(flags: u8, options: &[u8]) -> Vec<u8> {
    let words = 5 + options.len().div_ceil(4);
    let mut bytes = vec![0, 1, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4, (words as u8) << 4, flags, 1, 2, 0, 0, 0, 0];
    bytes.extend(options);
    bytes.resize(words * 4, 0);
    bytes
}

#[test]
fn fields_and_options_are_read() {
    let syn = header(SYN, &[2, 4, 5, 180, 4, 2, 1, 3, 3, 9]);
    let segment = Segment::parse(&syn, 70).unwrap();
    let expected = Segment {
        seq: 3,
        ack: 4,
        payload_bytes: 70,
        window: 258,
        flags: SYN,
        scale: 9,
        sack_permitted: true,
    };
    assert_eq!(segment, expected);
    assert_eq!((segment.length(), segment.end()), (71, 74));
    let whole = [header(FIN | ACK, &[3, 3, 9]), vec![7; 13]].concat();
    let segment = Segment::of(&whole).unwrap();
    assert_eq!((segment.payload_bytes, segment.end(), segment.scale), (13, 17, NO_SCALE));
    assert_eq!(Segment::of(&header(0xc0 | ACK, &[])).unwrap().flags, ACK);
}

#[test]
fn options_that_cannot_be_read_end_them() {
    for (options, scale) in [
        (&[3, 3, 15][..], SCALE_MAX),
        (&[3, 4, 1, 1], NO_SCALE),
        (&[3, 0, 1], NO_SCALE),
        (&[3, 3], 0),
        (&[0, 3, 3, 7], NO_SCALE),
        (&[1, 3, 3, 7], 7),
        (&[99, 60, 3, 3, 7], NO_SCALE),
        (&[99, 2, 3, 3, 7], 7),
        (&[1, 1, 1, 3], NO_SCALE),
    ] {
        assert_eq!(Segment::of(&header(SYN, options)).unwrap().scale, scale, "{options:?}");
    }
}

#[test]
fn headers_that_are_cut_or_impossible_are_refused() {
    let good = header(ACK, &[1, 1, 1, 0]);
    for bytes in 0..good.len() {
        assert_eq!(Segment::of(&good[..bytes]), None, "{bytes}");
    }
    let mut short = good.clone();
    short[12] = 4 << 4;
    assert_eq!(Segment::of(&short), None);
    let refused = [
        0,
        FIN,
        PSH,
        URG,
        SYN | FIN,
        SYN | RST,
        FIN | RST,
        SYN | FIN | ACK,
        SYN | RST | ACK,
        FIN | RST | ACK,
        FIN | PSH | URG,
        RST | URG,
        0x3f,
    ];
    for flags in refused {
        assert_eq!(Segment::of(&header(flags, &[])), None, "{flags:#x}");
    }
    for flags in [SYN, SYN | ACK, ACK, FIN | ACK, RST, RST | ACK, ACK | URG, PSH | ACK, SYN | PSH | ACK] {
        assert!(Segment::of(&header(flags, &[])).is_some(), "{flags:#x}");
    }
}
