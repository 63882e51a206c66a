//! Limits of paths that one end tells the other: preference tier, the most that may be sent to it, cost and direction.
//!
//! A WAN is configured where it is, but what goes over it is chosen by whoever sends. So each end tells the other the
//! tier of the WAN under each path, how much may come in over it and what it costs, in a path-limits frame
//! ([`extension::PATH_LIMITS`]), and both keep to the stricter of the two ends' wishes. The frame names the paths that
//! have limits and is repeated until the peer confirms it ([`extension::PATH_LIMITS_SEEN`]). Who has no limits and never
//! had any sends nothing.

use crate::bond::PATHS_MAX;
use crate::frame::{Frame, extension};
use crate::lifecycle::encode;
use crate::time::Time;

/// Bytes of number and entry length in front of the entries.
const HEAD_BYTES: usize = 5;
/// Bytes of one entry as this version writes it; a later one may add to its end.
const ENTRY_BYTES: usize = 13;
/// Bytes of one entry at least: an earlier version's end with the rate.
const ENTRY_BYTES_MIN: usize = 10;
/// Flag of an entry: nothing may be sent to this end over the path.
const CLOSED: u8 = 1;
/// Flag of an entry: the WAN is metered.
const METERED: u8 = 2;
/// A frame that is not confirmed is sent again after this long, then after twice as long …
const REPEAT_NS: u64 = 20_000_000;
/// … up to this.
const REPEAT_NS_MAX: u64 = 1_000_000_000;

/// Limits that one end of a path sets for what is sent to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PathLimits {
    /// Preference: 0 first, a higher tier only while no lower one works.
    pub tier: u8,
    /// Most that may be sent to this end over the path, bits per second.
    pub receive_bps: Option<u64>,
    /// No data may be sent to this end over the path.
    pub closed: bool,
    /// The WAN is metered.
    pub metered: bool,
    /// Its cost, for comparison.
    pub cost: u16,
}

/// Paths with their limits, as a frame names them.
type Entries = Vec<(u8, PathLimits)>;

/// Exchange of limits with one peer: what we told and it confirmed, what it told us.
#[derive(Default)]
pub(crate) struct LimitsExchange {
    /// The peer understands these frames.
    supported: bool,
    told: Entries,
    number: u32,
    confirmed: bool,
    tries: u32,
    next_at: Time,
    /// Limits that the peer told last.
    heard: Entries,
    heard_number: Option<u32>,
}

impl LimitsExchange {
    /// A session begins. A peer that restarted knows nothing, and what it told before holds no more.
    pub fn session(&mut self, supported: bool, restarted: bool) {
        self.supported = supported;
        if restarted {
            self.heard.clear();
            self.heard_number = None;
        }
        // Also the same process may have forgotten it: a peer that was taken out of the configuration and put back.
        (self.confirmed, self.tries, self.next_at) = (false, 0, Time::ZERO);
    }

    /// The frame to send now, if one is due, and the number of this try, from 0. `wanted` has the paths with limits.
    pub fn poll(&mut self, now: Time, wanted: &[(u8, PathLimits)]) -> Option<(Vec<u8>, u32)> {
        if self.told != wanted {
            self.told = wanted.to_vec();
            // Rises also over a bond that was taken out of the configuration and put back.
            let clock = (now.ns() / 1_000_000) as u32;
            let after = self.number.wrapping_add(1);
            self.number = if newer(clock, after) { clock } else { after };
            (self.confirmed, self.tries, self.next_at) = (false, 0, now);
        }
        let never = self.number == 0;
        if !self.supported || never || self.confirmed || now < self.next_at {
            return None;
        }
        let wait_ns = REPEAT_NS.checked_shl(self.tries).unwrap_or(REPEAT_NS_MAX).min(REPEAT_NS_MAX);
        self.next_at = now.plus_ns(wait_ns);
        self.tries = (self.tries + 1).min(30);
        let body = write(self.number, &self.told);
        Some((encode(&Frame::Extension { kind: extension::PATH_LIMITS, body: &body }), self.tries - 1))
    }

    /// When [`Self::poll`] has something to do, if nothing changes before.
    pub fn next(&self) -> Time {
        let idle = !self.supported || self.number == 0 || self.confirmed;
        if idle { Time::MAX } else { self.next_at }
    }

    /// A path-limits frame came: takes over what is new, and says what confirms it. `None` when it is malformed.
    pub fn on_limits(&mut self, body: &[u8]) -> Option<Vec<u8>> {
        let (number, entries) = read(body)?;
        // One that was overtaken on its way must not bring old limits back.
        if self.heard_number.is_none_or(|known| newer(number, known)) {
            self.heard_number = Some(number);
            self.heard = entries;
        }
        let body = number.to_be_bytes();
        Some(encode(&Frame::Extension { kind: extension::PATH_LIMITS_SEEN, body: &body }))
    }

    /// The peer confirms the frame with this number.
    pub fn on_seen(&mut self, body: &[u8]) {
        self.confirmed |= body == self.number.to_be_bytes();
    }

    /// Limits that the peer sets for a path.
    pub fn of_peer(&self, path: u8) -> PathLimits {
        self.heard.iter().find(|(id, _)| *id == path).map_or_else(PathLimits::default, |(_, limits)| *limits)
    }
}

/// Whether a number is newer than another, by the sign of their 32-bit difference.
fn newer(number: u32, than: u32) -> bool {
    number.wrapping_sub(than).cast_signed() > 0
}

/// Body of a path-limits frame.
pub(crate) fn write(number: u32, entries: &[(u8, PathLimits)]) -> Vec<u8> {
    let mut body = number.to_be_bytes().to_vec();
    body.push(ENTRY_BYTES as u8);
    for (path, limits) in entries.iter().take(PATHS_MAX) {
        body.extend([*path, limits.tier]);
        body.extend(limits.receive_bps.unwrap_or(0).to_be_bytes());
        let closed = if limits.closed { CLOSED } else { 0 };
        body.push(closed | if limits.metered { METERED } else { 0 });
        body.extend(limits.cost.to_be_bytes());
    }
    body
}

/// Number and entries of a body. `None` when it is shorter than its head, or its entries than what we know of them.
fn read(body: &[u8]) -> Option<(u32, Entries)> {
    let (head, rest) = body.split_first_chunk::<HEAD_BYTES>()?;
    let [a, b, c, d, entry_bytes] = *head;
    let entry_bytes = usize::from(entry_bytes);
    if entry_bytes < ENTRY_BYTES_MIN {
        return None;
    }
    let entry = |bytes: &[u8]| {
        let (&[path, tier, rate @ ..], rest) = bytes.split_first_chunk::<ENTRY_BYTES_MIN>()?;
        let receive_bps = Some(u64::from_be_bytes(rate)).filter(|bps| *bps > 0);
        // What an earlier version did not write is 0.
        let [flags, cost @ ..] = rest.first_chunk::<3>().copied().unwrap_or_default();
        let (closed, metered) = (flags & CLOSED != 0, flags & METERED != 0);
        Some((path, PathLimits { tier, receive_bps, closed, metered, cost: u16::from_be_bytes(cost) }))
    };
    let entries = rest.chunks_exact(entry_bytes).take(PATHS_MAX).filter_map(entry).collect();
    Some((u32::from_be_bytes([a, b, c, d]), entries))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    const NONE: PathLimits =
        PathLimits { tier: 0, receive_bps: None, closed: false, metered: false, cost: 0 };
    const BACKUP: PathLimits = PathLimits { tier: 1, metered: true, cost: 0x1234, ..NONE };
    const CAPPED: PathLimits = PathLimits { receive_bps: Some(8_000_000), closed: true, ..NONE };

    fn body(frame: &[u8]) -> &[u8] {
        &frame[4..]
    }

    #[test]
    fn limits_are_told_until_they_are_confirmed() {
        let (mut ours, mut theirs) = (LimitsExchange::default(), LimitsExchange::default());
        ours.session(true, false);
        theirs.session(true, false);
        let at = |ms: u64| Time::ZERO.plus_ms(ms);
        let wanted = [(1, BACKUP), (2, CAPPED)];
        let (frame, attempt) = ours.poll(at(5), &wanted).unwrap();
        assert_eq!(attempt, 0);
        assert!(ours.poll(at(6), &wanted).is_none());
        assert_eq!(ours.poll(at(26), &wanted).unwrap().1, 1);
        let seen = theirs.on_limits(body(&frame)).unwrap();
        assert_eq!(
            [theirs.of_peer(0), theirs.of_peer(1), theirs.of_peer(2)],
            [PathLimits::default(), BACKUP, CAPPED]
        );
        ours.on_seen(body(&seen));
        assert!(ours.poll(at(60_000), &wanted).is_none());
        assert_eq!(ours.next(), Time::MAX);
        // A path less: told anew, and the old frame does not bring it back.
        let (less, _) = ours.poll(at(60_001), &wanted[1..]).unwrap();
        theirs.on_limits(body(&less)).unwrap();
        theirs.on_limits(body(&frame)).unwrap();
        assert_eq!(theirs.of_peer(1), PathLimits::default());
        // A peer that restarted is told again, and what it told is void.
        ours.session(true, true);
        theirs.session(true, true);
        assert!(ours.poll(at(60_002), &wanted[1..]).is_some());
        assert_eq!(theirs.of_peer(2), PathLimits::default());
    }

    #[test]
    fn nothing_is_sent_without_limits_or_to_a_peer_that_does_not_know_them() {
        let mut exchange = LimitsExchange::default();
        exchange.session(true, false);
        assert!(exchange.poll(Time::ZERO.plus_ms(1), &[]).is_none());
        exchange.session(false, false);
        assert!(exchange.poll(Time::ZERO.plus_ms(2), &[(0, BACKUP)]).is_none());
        assert_eq!(exchange.next(), Time::MAX);
        exchange.session(true, false);
        assert!(exchange.poll(Time::ZERO.plus_ms(3), &[(0, BACKUP)]).is_some());
        // Limits that are gone are told, too.
        assert!(exchange.poll(Time::ZERO.plus_ms(4), &[]).is_some());
    }

    #[test]
    fn longer_entries_of_a_later_version_are_read_and_shorter_ones_refused() {
        let mut longer = vec![0, 0, 0, 1, 12];
        longer
            .extend([7, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0xaa, 0xbb, 8, 1, 0, 0, 0, 0, 0, 0, 0, 9, 0xcc, 0xdd, 1]);
        let (number, entries) = read(&longer).unwrap();
        assert_eq!(number, 1);
        let capped = PathLimits { tier: 1, receive_bps: Some(9), ..NONE };
        assert_eq!(entries, [(7, PathLimits { tier: 2, ..NONE }), (8, capped)]);
        let longer = [&[0, 0, 0, 1, 14, 7, 2][..], &[0; 8], &[3, 1, 2, 0xcc]].concat();
        let all = PathLimits { tier: 2, closed: true, metered: true, cost: 258, ..NONE };
        assert_eq!(read(&longer).unwrap().1, [(7, all)]);
        assert!(read(&[0, 0, 0, 1, 9, 1, 1, 1, 1, 1, 1, 1, 1, 1]).is_none());
        assert!(read(&[0, 0, 0, 1]).is_none());
        let many = write(1, &[(1, BACKUP); 300]);
        assert_eq!(read(&many).unwrap().1.len(), PATHS_MAX);
    }
}
