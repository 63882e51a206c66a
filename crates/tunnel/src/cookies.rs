//! Cookies and freshness challenges that a dialer was given, path by path.
//!
//! A cookie is good for one source address, and whoever sits on a link can make cookie replies from the listener's public key
//! alone. So what comes over one path says nothing about the others: each has a store of its own, each Initiation goes out on all
//! paths, with the cookie of each, and a reply hastens the next try once in a while only.

use std::collections::BTreeMap;

use packet::drop_reason::DropReason;

use crate::mac::{CookieStore, MAC_BYTES, put_mac2};
use crate::time::Time;

/// Pause between two tries that a reply hastens, ms: answers to earlier ones that are still under way must find their attempt.
const HASTE_MS: u64 = 500;

/// Stores of the cookies of all paths to one peer.
pub(crate) struct Cookies {
    remote_public: [u8; 32],
    /// Path ids are a byte: there are no more stores than that.
    stores: BTreeMap<u8, CookieStore>,
    haste_at: Time,
    turn: u8,
}

impl Cookies {
    /// None yet, of the peer with this static public key.
    pub fn new(remote_public: &[u8; 32]) -> Self {
        Self { remote_public: *remote_public, stores: BTreeMap::new(), haste_at: Time::ZERO, turn: 0 }
    }

    /// An Initiation as it goes out on a path: with the path's cookie, if it has one.
    pub fn for_path(&mut self, now: Time, path: u8, initiation: &[u8]) -> Vec<u8> {
        let remote = &self.remote_public;
        let store = self.stores.entry(path).or_insert_with(|| CookieStore::new(remote));
        let mut bytes = initiation.to_vec();
        if let Some(cookie) = store.cookie(now) {
            put_mac2(&mut bytes, cookie);
        }
        store.sent(&bytes);
        bytes
    }

    /// Takes a cookie reply that came over a path. Whether it hastens the next try.
    ///
    /// # Errors
    /// As [`CookieStore::accept`]; `UnknownIndex`: nothing was sent over the path.
    pub fn accept(&mut self, now: Time, path: u8, reply: &[u8]) -> Result<bool, DropReason> {
        self.stores.get_mut(&path).ok_or(DropReason::UnknownIndex)?.accept(now, reply)?;
        let may = now >= self.haste_at;
        if may {
            self.haste_at = now.plus_ms(HASTE_MS);
        }
        Ok(may)
    }

    /// Token that the next Initiation answers a freshness challenge with: those of the paths by turns, because any of them may be
    /// forged.
    pub fn take_challenge(&mut self) -> Option<[u8; MAC_BYTES]> {
        let challenged =
            || self.stores.iter().filter(|(_, store)| store.is_challenged()).map(|(path, _)| *path);
        let turn = self.turn;
        let path = challenged().find(|path| *path > turn).or_else(|| challenged().next())?;
        self.turn = path;
        self.stores.get_mut(&path)?.take_challenge()
    }
}
