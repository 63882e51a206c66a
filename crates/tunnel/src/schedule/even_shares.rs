//! Even shares of parallel paths (row R16): of what one core sends, each path gets as many bytes as the others, whichever would
//! deliver first. The slowest path sets the pace.

use super::{Choice, ClassPolicy, PathView, choose_on};
use crate::time::Time;

/// A path may have had this many bytes more than the one that had least.
const LEAD_BYTES: u64 = 128 * 1024;

/// Bytes that one core has sent over the paths of a bond.
#[derive(Debug, Default)]
pub struct EvenShares {
    /// Path and bytes; only the differences count.
    sent: Vec<(u8, u64)>,
}

impl EvenShares {
    /// The path that had least of those that may be booked and are not too far ahead of the others. Takes part in it who is usable and
    /// of the lowest tier; who joins later begins with as much as the first of the others has had.
    pub fn choose(&mut self, now: Time, paths: &[PathView], policy: &ClassPolicy) -> Choice {
        let Some(tier) = paths.iter().filter(|path| path.ready()).map(|path| path.tier).min() else {
            return Choice::None;
        };
        let takes_part = |path: &&PathView| path.ready() && path.tier == tier;
        self.sent.retain(|(id, _)| paths.iter().any(|path| path.id == *id && takes_part(&path)));
        let most = self.sent.iter().map(|(_, bytes)| *bytes).max().unwrap_or(0);
        for path in paths.iter().filter(takes_part) {
            if !self.sent.iter().any(|(id, _)| *id == path.id) {
                self.sent.push((path.id, most));
            }
        }
        let least = self.sent.iter().map(|(_, bytes)| *bytes).min().unwrap_or(0);
        let (mut best, mut until): (Option<(u64, Choice)>, Time) = (None, Time::MAX);
        for (id, bytes) in self.sent.iter().filter(|(_, bytes)| *bytes <= least + LEAD_BYTES) {
            let Some(path) = paths.iter().find(|path| path.id == *id) else { continue };
            match choose_on(now, paths, path, policy) {
                Choice::Wait { until: free } => until = until.min(free),
                choice if best.is_none_or(|(fewest, _)| *bytes < fewest) => best = Some((*bytes, choice)),
                _ => {}
            }
        }
        best.map_or(Choice::Wait { until }, |(_, choice)| choice)
    }

    /// So many bytes go over a path.
    pub fn note(&mut self, path: u8, bytes: u64) {
        if let Some((_, sent)) = self.sent.iter_mut().find(|(id, _)| *id == path) {
            *sent = sent.saturating_add(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn path(id: u8, rate: u64, delay_us: i64) -> PathView {
        PathView {
            id,
            rate,
            tx_free: Time::ZERO,
            delay_us,
            unmeasured_us: 0,
            jitter_us: 0,
            tier: 0,
            usable: true,
        }
    }

    /// Sends for a while as fast as the paths take it; bytes of each.
    fn send(shares: &mut EvenShares, paths: &mut [PathView], ms: u64) -> Vec<u64> {
        const BYTES: u64 = 3_000;
        let mut sent = vec![0; paths.len()];
        let mut now = paths.iter().map(|path| path.tx_free).min().unwrap_or(Time::ZERO);
        let end = now.plus_ns(ms * 1_000_000);
        while now < end {
            match shares.choose(now, paths, &ClassPolicy::BULK) {
                Choice::Send { path: id, depart } => {
                    let at = paths.iter().position(|path| path.id == id).unwrap();
                    paths[at].tx_free = depart.plus_ns(BYTES * 1_000_000_000 / paths[at].rate);
                    sent[at] += BYTES;
                    shares.note(id, BYTES);
                }
                Choice::Wait { until } => {
                    assert!(until > now, "time goes on");
                    now = until;
                }
                Choice::None => panic!("no path"),
            }
        }
        sent
    }

    fn assert_even(sent: &[u64]) {
        let (least, most) = (*sent.iter().min().unwrap(), *sent.iter().max().unwrap());
        assert!(most - least <= LEAD_BYTES + 3_000 && least > 500_000, "{sent:?}");
    }

    #[test]
    fn r16_unequal_paths_get_equal_shares_and_the_slowest_sets_the_pace() {
        let mut paths = [path(1, 10_000_000, 100), path(4, 2_000_000, 9_000), path(7, 5_000_000, 300)];
        let sent = send(&mut EvenShares::default(), &mut paths, 1_000);
        assert_even(&sent);
        assert!(sent[1] > 1_900_000, "{sent:?}");
    }

    #[test]
    fn r16_who_comes_later_has_nothing_to_make_up_for() {
        let mut shares = EvenShares::default();
        let mut paths = [path(1, 4_000_000, 100), path(2, 4_000_000, 100), path(3, 4_000_000, 100)];
        paths[2].usable = false;
        let first = send(&mut shares, &mut paths, 1_000);
        assert_eq!(first[2], 0);
        assert_even(&first[..2]);
        paths[2].usable = true;
        paths[2].tx_free = paths[1].tx_free;
        assert_even(&send(&mut shares, &mut paths, 1_000));
        // And who leaves holds nobody up.
        paths[0].usable = false;
        assert_even(&send(&mut shares, &mut paths, 1_000)[1..]);
    }

    #[test]
    fn r16_a_higher_tier_takes_no_part() {
        let mut paths = [path(1, 4_000_000, 100), path(2, 4_000_000, 100)];
        paths[1].tier = 1;
        assert_eq!(send(&mut EvenShares::default(), &mut paths, 500)[1], 0);
    }
}
