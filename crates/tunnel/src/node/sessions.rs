//! Sessions of all bonds by receiver index: put in place by handshakes, confirmed by the first datagram, ended by time or
//! by the peer.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use super::handshakes::{ATTEMPTS_KEPT, RETRY_FAST_MS};
use super::{Node, lifecycle};
use crate::bond::Bond;
use crate::handshake::Established;
use crate::hello::Capabilities;
use crate::lifecycle::Lifecycle;
use crate::session::{Epoch, Session};
use crate::time::Time;

/// Sessions kept per bond: the one in use, the one before it (datagrams still under way), and one for each handshake of the peer that may
/// be under way: the first answer that arrives there is the one it goes on with.
const SESSIONS_KEPT: usize = 2 + ATTEMPTS_KEPT;

impl Node {
    /// The session a receiver index names.
    pub fn session(&self, index: u32) -> Option<Arc<Session>> {
        self.sessions.load().get(&index).cloned()
    }

    /// Sessions that datagrams may name now, of all bonds.
    pub fn sessions_held(&self) -> usize {
        self.sessions.load().len()
    }

    /// Puts a new session in place: receive keys for all cores first, then, for the initiator, the switch.
    pub(super) fn install(
        &self,
        now: Time,
        bond: &Bond,
        life: &mut Lifecycle,
        established: &Established,
        local_index: u32,
        initiator: bool,
    ) {
        let hello = &established.remote_hello;
        let peer = bond.peer.load();
        let session = Arc::new(Session::new(
            &Epoch {
                number: life.next_number,
                bond: bond.slot,
                local_index,
                remote_index: established.remote_index,
                aead: established.aead,
                encryption: peer.encryption.agree(hello.encryption),
                receives: peer.steering.receive,
                sends: hello.steering,
                send_key: &established.send_key,
                receive_key: &established.receive_key,
                own_cores: self.cores,
                peer_cores: hello.processor.cores,
                takes_repair: hello.capabilities.contains(Capabilities::REPAIR),
                says_cores: hello.capabilities.contains(Capabilities::CORE_WANTED),
                rekey_after_ms: self.rekey_after_ms,
                initiator,
            },
            now,
        ));
        life.next_number += 1;
        let restarted = life.boot_id.is_some_and(|boot| boot != hello.boot_id);
        if life.boot_id != Some(hello.boot_id) {
            life.boot_id = Some(hello.boot_id);
            life.first_of_boot = session.number;
            bond.reset_clock();
            bond.restarts.fetch_add(1, Relaxed);
            if restarted {
                tracing::info!(peer = peer.name, "peer restarted");
                if bond.dialer {
                    life.challenge_all(now);
                } else {
                    life.retain_paths(bond, |_| false);
                }
            }
        }
        bond.cores.tell(hello.processor.clone());
        life.limits.session(hello.capabilities.contains(Capabilities::PATH_LIMITS), restarted);
        // Our cores may have changed since we said hello.
        life.advertiser.restart(now);
        life.sessions.push(Arc::clone(&session));
        if life.sessions.len() > SESSIONS_KEPT {
            let current = bond.current.load().as_ref().map_or(0, |current| current.number);
            remove_oldest(&mut life.sessions, current);
        }
        bond.totals.handshakes.fetch_add(1, Relaxed);
        self.republish(bond, life);
        if initiator {
            tracing::info!(
                peer = peer.name,
                cipher = session.aead.name(),
                cores = session.peer_cores,
                "session"
            );
            bond.current.store(Some(session));
        }
    }

    /// The first datagram under a session arrived: the peer holds the keys, so we send with them from now on.
    pub fn confirmed(&self, session: &Arc<Session>) {
        let bonds = self.bonds.load();
        if let Some(bond) = bonds.get(session.bond) {
            // One that was ended meanwhile stays so.
            let life = lifecycle(bond);
            let known = life.sessions.iter().any(|known| Arc::ptr_eq(known, session));
            let newer = bond.current.load().as_ref().is_none_or(|current| current.number < session.number);
            if known && newer {
                tracing::info!(peer = bond.peer.load().name, cipher = session.aead.name(), "session");
                bond.current.store(Some(Arc::clone(session)));
            }
        }
    }

    /// The peer closed its side, in the session of this number. A goodbye that was long under way says nothing about a later session
    /// that is in use, or that the peer has made since it was started again.
    pub fn closed(&self, now: Time, bond: &Bond, number: u32) {
        let mut life = lifecycle(bond);
        let in_use = bond.current.load().as_ref().map_or(0, |current| current.number);
        if number < in_use || number < life.first_of_boot {
            return;
        }
        self.drop_sessions(&mut life);
        bond.current.store(None);
        life.next_attempt = now.plus_ms(RETRY_FAST_MS);
        life.close_paths(now, bond);
        self.poll_bond_soon(now, bond);
        tracing::info!(peer = bond.peer.load().name, "peer closed the session");
    }

    /// Ends the sessions of all bonds without a word to the peers: this machine may have been copied, and its copy would seal other
    /// packets with the same counters. A goodbye would be one of them. New handshakes draw new keys.
    pub fn end_sessions(&self, now: Time) {
        for bond in self.bonds.load().iter() {
            let mut life = lifecycle(bond);
            self.drop_sessions(&mut life);
            bond.current.store(None);
            // The copy would end these with the same answer, and have the same keys again.
            life.attempts.clear();
            life.next_attempt = now;
        }
        self.poll_soon(now);
    }

    pub(super) fn expire_sessions(&self, now: Time, bond: &Bond, life: &mut Lifecycle) {
        let before = life.sessions.len();
        life.sessions.retain(|session| !session.expired(now));
        if life.sessions.len() != before {
            if bond.current.load().as_ref().is_some_and(|session| session.expired(now)) {
                bond.current.store(None);
                tracing::warn!(peer = bond.peer.load().name, "session expired without a new one");
            }
            self.republish(bond, life);
        }
    }

    pub(super) fn drop_sessions(&self, life: &mut Lifecycle) {
        let gone = std::mem::take(&mut life.sessions);
        self.sessions.rcu(|table| {
            let mut table = HashMap::clone(table);
            table.retain(|index, _| !gone.iter().any(|session| session.local_index == *index));
            table
        });
    }

    /// Makes the table of receiver indices agree with the bond's sessions.
    pub(super) fn republish(&self, bond: &Bond, life: &Lifecycle) {
        self.sessions.rcu(|table| {
            let mut table = HashMap::clone(table);
            table.retain(|_, session| session.bond != bond.slot);
            table.extend(life.sessions.iter().map(|session| (session.local_index, Arc::clone(session))));
            table
        });
    }
}

/// Makes room among the sessions of a bond. Whoever is not confirmed goes first, never the newest nor the one in use: answers may have
/// been lost on their way.
fn remove_oldest(sessions: &mut Vec<Arc<Session>>, current: u32) {
    let newest = sessions.len() - 1;
    let idle = sessions[..newest].iter().position(|s| s.number != current && !s.is_confirmed());
    let old = sessions[..newest].iter().position(|s| s.number != current);
    sessions.remove(idle.or(old).unwrap_or(0));
}
