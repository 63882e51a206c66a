#![allow(clippy::unwrap_used, reason = "tests")]
//! Encoder and decoder over a line that loses.

use std::collections::HashSet;

use super::*;

const HEADER: usize = crate::header::HEADER_BYTES;

/// A sealed datagram with this counter.
fn datagram(rng: &mut fastrand::Rng, bytes: usize) -> Vec<u8> {
    let mut datagram: Vec<u8> = std::iter::repeat_with(|| rng.u8(..)).take(bytes).collect();
    datagram[..HEADER].fill(0);
    datagram
}

/// A line with its two ends.
struct Line {
    rng: fastrand::Rng,
    encoder: Encoder,
    decoder: Decoder,
    arrived: HashSet<u64>,
    sent: Vec<(u64, Vec<u8>)>,
    lost: usize,
    restored: usize,
    next: u64,
}

impl Line {
    fn new(seed: u64) -> Self {
        Self {
            rng: fastrand::Rng::with_seed(seed),
            encoder: Encoder::default(),
            decoder: Decoder::default(),
            arrived: HashSet::new(),
            sent: Vec::new(),
            lost: 0,
            restored: 0,
            next: 0,
        }
    }

    /// Sends one datagram; loses it or not.
    fn send(&mut self, bytes: usize, lose: bool) {
        let datagram = datagram(&mut self.rng, bytes);
        let counter = self.next;
        self.next += 1;
        assert!(self.encoder.reaches(counter));
        self.encoder.add(counter, &datagram);
        if lose {
            self.lost += 1;
        } else {
            self.arrived.insert(counter);
            self.decoder.keep(counter, &datagram);
            self.solve();
        }
        self.sent.push((counter, datagram));
    }

    /// Ends a block; its symbol arrives or not.
    fn end(&mut self, lose: bool) {
        let symbol = self.encoder.finish().unwrap();
        self.next += 1;
        if !lose {
            let arrived = &self.arrived;
            self.decoder.take(symbol, |counter| arrived.contains(&counter));
            self.solve();
        }
    }

    fn solve(&mut self) {
        while let Some(restored) = self.decoder.solve() {
            let (_, original) = self.sent.iter().find(|(counter, _)| *counter == restored.counter).unwrap();
            assert_eq!(&restored.datagram, original, "{}", restored.counter);
            assert!(self.arrived.insert(restored.counter));
            self.decoder.keep(restored.counter, &restored.datagram);
            self.restored += 1;
        }
    }
}

#[test]
fn one_loss_of_a_block_is_back_with_its_symbol() {
    for lost in 0..10 {
        let mut line = Line::new(lost);
        for at in 0..10 {
            line.send(200 + 100 * at as usize, at == lost);
        }
        assert_eq!(line.restored, 0);
        line.end(false);
        assert_eq!(line.restored, 1, "{lost}");
    }
}

#[test]
fn two_of_a_block_are_back_with_the_next_and_three_with_the_one_after() {
    let mut line = Line::new(1);
    for block in 0..20 {
        for at in 0..12 {
            let lose = match block {
                3 => at == 2 || at == 9,
                10 => at == 0 || at == 11,
                11 => at == 5,
                15 => at == 1 || at == 2 || at == 7,
                _ => false,
            };
            line.send(1_400, lose);
        }
        line.end(false);
        match block {
            3 | 10 | 11 | 15 | 16 => assert!(line.restored < line.lost),
            _ => assert_eq!(line.restored, line.lost, "block {block}"),
        }
    }
    assert_eq!(line.lost, 8);
}

#[test]
fn a_lost_symbol_costs_nothing_but_itself() {
    let mut line = Line::new(2);
    for block in 0..10 {
        for at in 0..8 {
            line.send(900, block == 4 && at == 3);
        }
        line.end(block == 4);
    }
    assert_eq!(line.restored, 1);
}

#[test]
fn a_repeat_that_comes_late_pushes_no_newer_datagram_out() {
    let mut line = Line::new(4);
    let late = datagram(&mut line.rng, 800);
    for block in 0..20 {
        for at in 0..10 {
            line.send(900, block == 18 && at == 4);
            if block == 18 {
                // As many counters behind as the decoder keeps, and as twice that: of the block's own places.
                for rounds in 1..3 {
                    let counter = line.next - 1;
                    line.decoder.keep(counter - rounds * decoder::KEPT as u64 / 2, &late);
                    line.decoder.keep(counter.saturating_sub(decoder::KEPT as u64), &late);
                }
            }
        }
        line.end(false);
    }
    assert_eq!((line.lost, line.restored), (1, 1));
}

#[test]
fn random_losses_are_nearly_all_repaired() {
    for (loss, least) in [(0.003, 0.999), (0.01, 0.99), (0.03, 0.98), (0.05, 0.97)] {
        let size = block_size(loss);
        let mut line = Line::new(7);
        for _ in 0..2_000 {
            for _ in 0..size {
                let (bytes, lose) = (line.rng.usize(40..1_500), line.rng.f64() < loss);
                line.send(bytes, lose);
            }
            let lose = line.rng.f64() < loss;
            line.end(lose);
        }
        let share = line.restored as f64 / line.lost as f64;
        eprintln!("{loss}: {} of {} with a symbol per {size}", line.restored, line.lost);
        assert!(share >= least, "{loss}: {share}");
    }
}

#[test]
fn whatever_a_peer_sends_costs_a_bounded_number_of_passes() {
    let mut rng = fastrand::Rng::with_seed(3);
    let mut decoder = Decoder::default();
    let mut kept = 0;
    for counter in 0..20_000u64 {
        // Symbols without end, of blocks that lack two or three.
        if counter % 20 != 0 {
            kept += 1;
            decoder.keep(counter, &datagram(&mut rng, 1_400));
        }
        let block = |back: u64| Block { first: counter.saturating_sub(back), mask: 0xffff_ffff };
        for _ in 0..4 {
            let blocks = [block(40), block(70), Block::default()];
            let symbol = Symbol { blocks, bytes: vec![rng.u8(..); rng.usize(0..1_400)] };
            decoder.take(symbol, |_| false);
            let mut solved = 0;
            while decoder.solve().is_some() {
                solved += 1;
                assert!(solved <= decoder::EQUATIONS_MAX);
            }
        }
        assert!(
            decoder.made() <= PASSES_MAX + kept * (PASSES_PER_DATAGRAM + decoder::EQUATIONS_MAX),
            "{counter}"
        );
    }
    assert!(decoder.take_refused() > 0);
}

/// The example of `docs/wire-frames.md`.
pub(crate) fn example() -> SymbolPart<'static> {
    SymbolPart {
        blocks: [Block { first: 0x0102, mask: 0b1011 }, Block { first: 0x00f0, mask: 0b1 }, Block::default()],
        offset: 0x02bd,
        total: 0x02c0,
        bytes: &[0xaa, 0xbb, 0xcc],
    }
}

#[test]
fn parts_are_read_as_they_were_written_and_nonsense_is_refused() {
    let part = example();
    let body = part.encode();
    assert_eq!(SymbolPart::parse(&body), Some(part));
    for cut in 0..=SymbolPart::HEAD_BYTES {
        assert_eq!(SymbolPart::parse(&body[..cut]), None, "{cut}");
    }
    // Without its first datagram, too many of them, none, beyond the symbol, and a symbol that is too long.
    for (at, byte) in [(15, 0x0a), (8, 0xff), (15, 0x00), (49, 0xbe), (50, 0xff)] {
        let mut bad = body.clone();
        bad[at] = byte;
        if at == 8 {
            bad[9..16].fill(0xff);
        }
        assert_eq!(SymbolPart::parse(&bad), None, "{at}");
    }
}
