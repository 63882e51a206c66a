//! Replays `corpus/nasty.txt`: packets that broke somebody's parser, each with what this crate makes of it.
//! Every one is also tried cut at each byte and with each bit flipped, through everything that reads or
//! edits packets: nothing may panic, and what is reported has to lie within the packet.

#![allow(clippy::unwrap_used, reason = "tests")]

use packet::vnet::VNET_HEADER_BYTES;
use packet::{
    Coalescer, DropReason, FlowKey, Ingress, IpHeader, PacketBuf, Segmenter, VirtioNetHeader, checksum, ip,
    segment,
};

struct Case {
    is_super: bool,
    name: &'static str,
    expected: &'static str,
    bytes: Vec<u8>,
}

fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.chars().map(|digit| digit.to_digit(16).unwrap() as u8).collect();
    assert!(digits.len().is_multiple_of(2));
    digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
}

fn cases() -> Vec<Case> {
    let lines = include_str!("corpus/nasty.txt").lines();
    let cases = lines.filter(|line| !line.is_empty() && !line.starts_with('#')).map(|line| {
        let mut fields = line.split('|').map(str::trim);
        let kind = fields.next().unwrap();
        assert!(kind == "packet" || kind == "super", "{line}");
        Case {
            is_super: kind == "super",
            name: fields.next().unwrap(),
            expected: fields.next().unwrap(),
            bytes: hex(fields.next().unwrap()),
        }
    });
    cases.collect()
}

fn segments(bytes: &[u8]) -> Result<usize, DropReason> {
    let header = VirtioNetHeader::parse(bytes)?;
    Ok(Segmenter::new(&header, &bytes[VNET_HEADER_BYTES..])?.segments())
}

#[test]
fn each_is_what_the_corpus_says() {
    let cases = cases();
    assert!(cases.len() > 100);
    for case in &cases {
        let got = if case.is_super {
            segments(&case.bytes).map(|segments| segments.to_string())
        } else {
            FlowKey::of(&case.bytes).map(|key| key.to_string())
        };
        let got = got.unwrap_or_else(|reason| reason.name().to_string());
        assert_eq!(got, case.expected, "{}", case.name);
    }
}

/// Each case, each of its prefixes, and each with one bit flipped.
#[test]
fn no_variant_panics_or_reaches_beyond_the_packet() {
    let mut bench = Bench { coalescer: Coalescer::new(), out: vec![0; 70_000] };
    for case in cases() {
        for cut in 0..=case.bytes.len() {
            bench.run(&case, &case.bytes[..cut]);
        }
        let mut flipped = case.bytes.clone();
        for bit in 0..case.bytes.len() * 8 {
            flipped[bit / 8] ^= 1 << (bit % 8);
            bench.run(&case, &flipped);
            flipped[bit / 8] ^= 1 << (bit % 8);
        }
    }
}

struct Bench {
    coalescer: Coalescer,
    out: Vec<u8>,
}

impl Bench {
    fn run(&mut self, case: &Case, bytes: &[u8]) {
        if case.is_super {
            self.split(case, bytes);
        } else {
            self.edit(case, bytes);
        }
    }

    fn split(&mut self, case: &Case, bytes: &[u8]) {
        let Ok(header) = VirtioNetHeader::parse(bytes) else { return };
        let packet = &bytes[VNET_HEADER_BYTES..];
        let Ok(mut segmenter) = Segmenter::new(&header, packet) else { return };
        for smaller in [0, 7] {
            segmenter.set_segment_payload(smaller);
            let mut payload = 0;
            for index in 0..segmenter.segments() {
                let bytes = segmenter.write_segment(index, &mut self.out);
                assert!(bytes >= segmenter.header_bytes() && bytes <= packet.len(), "{}", case.name);
                payload += bytes - segmenter.header_bytes();
                let parsed = IpHeader::parse(&self.out[..bytes]).unwrap();
                assert_eq!(parsed.total_bytes, bytes, "{}", case.name);
            }
            assert_eq!(payload, segmenter.payload_bytes(), "{}", case.name);
        }
    }

    fn edit(&mut self, case: &Case, bytes: &[u8]) {
        let header = IpHeader::parse(bytes);
        assert_eq!(FlowKey::of(bytes).is_ok(), header.is_ok(), "{}", case.name);
        if let Ok(header) = header {
            assert!(
                header.header_bytes <= header.total_bytes && header.total_bytes <= bytes.len(),
                "{}",
                case.name
            );
            let key = FlowKey::of(bytes).unwrap();
            assert_eq!(key, FlowKey::of_parsed(&header, bytes), "{}", case.name);
            assert_eq!(key.to_string().parse(), Ok(key), "{}", case.name);
        }
        let _ = (IpHeader::parse_quoted(bytes), checksum::verify_packet(bytes));
        let mut edited = bytes.to_vec();
        ip::set_ecn_ce(&mut edited);
        segment::mss_clamp(&mut edited, 1280, false);
        segment::mss_clamp(&mut edited, 600, true);
        let _ = segment::complete_checksum(&mut edited);
        assert_eq!(edited.len(), bytes.len());
        // Twice the same cannot be merged, as the sequence number or identification is not the next one;
        // UDP without fragmentation can, and is left out by `may_merge`.
        let mut emitted = 0;
        for partial in [true, false] {
            let mut emit = |written: &mut PacketBuf| {
                assert_eq!(written.packet(), bytes, "{}", case.name);
                emitted += 1;
            };
            assert!(self.coalescer.push(Ingress::Host, bytes, partial, false, &mut emit));
            self.coalescer.flush(&mut emit);
        }
        assert_eq!(emitted, 2, "{}", case.name);
        self.coalescer.push(Ingress::Host, bytes, true, true, &mut |_| ());
        self.coalescer.push(Ingress::Host, bytes, true, true, &mut |_| ());
        self.coalescer.flush(&mut |_| ());
    }
}
