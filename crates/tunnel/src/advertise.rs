//! Advertises this node's cores to a peer (row T3).
//!
//! The handshake tells the peer our cores, their load, the bucket table and the policy. What changes afterwards goes to
//! it in a processor-info frame: at once when buckets move or cores come and go, load at most every [`LOAD_NS`] and only
//! when it changed much. The frame is repeated until the peer confirms it with the first bytes of its digest
//! ([`frame::extension::PROCESSOR_INFO_SEEN`]).
//!
//! It belongs to the bond and is polled by whichever core runs the bond's timers, so no core is needed for it.

use std::sync::Arc;

use ring::digest;
use steering::ownership::Ownership;

use crate::config::Peer;
use crate::frame::{self, Frame};
use crate::hello::ProcessorInfo;
use crate::lifecycle::encode;
use crate::time::Time;

/// A frame that is not confirmed is sent again after this long, then after twice as long …
const REPEAT_NS: u64 = 20_000_000;
/// … up to this.
const REPEAT_NS_MAX: u64 = 1_000_000_000;
/// Load is advertised at most this often …
const LOAD_NS: u64 = 2_000_000_000;
/// … and only when some core's changed by this much, of 255.
const LOAD_STEP: u8 = 32;

/// Name of an advertisement: the first bytes of the SHA-256 of the encoded processor information.
pub(crate) type Digest = [u8; 4];

/// Names encoded processor information.
pub(crate) fn digest_of(body: &[u8]) -> Digest {
    digest::digest(&digest::SHA256, body).as_ref().first_chunk().copied().unwrap_or_default()
}

/// State towards one peer: the advertisement sent last, and whether it confirmed.
#[derive(Default)]
pub(crate) struct Advertiser {
    /// Ownership and configuration the frame was made of.
    source: Option<(Arc<Ownership>, Arc<Peer>)>,
    load: Vec<u8>,
    load_at: Time,
    frame: Vec<u8>,
    digest: Digest,
    confirmed: bool,
    tries: u32,
    next_at: Time,
}

impl Advertiser {
    /// The frame to send now, if one is due, and the number of this try, from 0. `info` is what the peer shall know.
    pub fn poll(
        &mut self,
        now: Time,
        ownership: &Arc<Ownership>,
        peer: &Arc<Peer>,
        info: impl FnOnce() -> ProcessorInfo,
    ) -> Option<(&[u8], u32)> {
        let known =
            self.source.as_ref().is_some_and(|(o, p)| Arc::ptr_eq(o, ownership) && Arc::ptr_eq(p, peer));
        if !known || now >= self.load_at {
            self.source = Some((Arc::clone(ownership), Arc::clone(peer)));
            self.load_at = now.plus_ns(LOAD_NS);
            self.take(now, info());
        }
        if self.confirmed || self.frame.is_empty() || now < self.next_at {
            return None;
        }
        let wait_ns = REPEAT_NS.checked_shl(self.tries).unwrap_or(REPEAT_NS_MAX).min(REPEAT_NS_MAX);
        self.next_at = now.plus_ns(wait_ns);
        self.tries = (self.tries + 1).min(30);
        Some((&self.frame, self.tries - 1))
    }

    /// Takes over new information; load that hardly changed stays as it was told.
    fn take(&mut self, now: Time, mut info: ProcessorInfo) {
        let hardly = info.load.len() == self.load.len()
            && info.load.iter().zip(&self.load).all(|(new, old)| new.abs_diff(*old) < LOAD_STEP);
        if hardly {
            info.load.clone_from(&self.load);
        }
        // Too large only with more classes and buckets than a node makes; the handshake would have failed as well.
        let Ok(body) = info.encode() else { return };
        let digest = digest_of(&body);
        if digest != self.digest {
            self.load = info.load;
            self.frame = encode(&Frame::ProcessorInfo(&body));
            self.digest = digest;
            self.restart(now);
        }
    }

    /// The peer may not know it (any more): it is told anew.
    pub fn restart(&mut self, now: Time) {
        self.confirmed = false;
        self.tries = 0;
        self.next_at = now;
    }

    /// The peer has the information with this digest.
    pub fn confirm(&mut self, digest: &[u8]) {
        self.confirmed |= digest == self.digest;
    }

    /// When [`Self::poll`] has something to do, if nothing changes before.
    pub fn next(&self) -> Time {
        if self.confirmed { self.load_at } else { self.next_at.min(self.load_at) }
    }
}

/// The frame that confirms encoded processor information.
pub(crate) fn seen(body: &[u8]) -> Vec<u8> {
    encode(&Frame::Extension { kind: frame::extension::PROCESSOR_INFO_SEEN, body: &digest_of(body) })
}
