//! Handshakes: started by a dialer's timer, answered by a listener. They run on whichever core received them, under one lock,
//! guarded by mac1 and cookies.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use packet::drop_reason::DropReason;

use super::{ControlState, Node, Source, lifecycle};
use crate::bond::Bond;
use crate::handshake::{Established, Initiator, Opened, open_initiation};
use crate::header::{HEADER_BYTES, Header, Kind, NO_SESSION};
use crate::hello::Capabilities;
use crate::index::{IndexCipher, LOCALS_MAX};
use crate::keys::PrivateKey;
use crate::lifecycle::{Action, Attempt, Lifecycle};
use crate::mac::Admission;
use crate::time::Time;

/// Handshakes of one bond that may be under way at once: round trips of four seconds outlast the retry interval so many times.
pub(super) const ATTEMPTS_KEPT: usize = 8;
/// Pause between handshake attempts: short at first, so that a link that comes up joins at once.
pub(super) const RETRY_FAST_MS: u64 = 500;
const RETRY_SLOW_MS: u64 = 2_000;
const FAST_TRIES: u32 = 40;
/// So many handshakes without an answer, some seconds: it may be that only the peer's reach us.
const TRIES_IN_VAIN: u32 = 12;
/// A side that listens though it has endpoints dials again when no path was up for so long. They differ, or both would yield to each
/// other again and again.
const DEAF_LOWER_MS: u64 = 5_000;
const DEAF_HIGHER_MS: u64 = 12_000;

impl Node {
    pub(super) fn start_handshake(
        &self,
        now: Time,
        bond: &Bond,
        life: &mut Lifecycle,
        actions: &mut Vec<Action>,
    ) {
        let mut control = self.control();
        let peer = bond.peer.load();
        let timestamp = control.timestamps.next(self.wall_clock_ns.saturating_add(now.ns()));
        self.timestamp_ns.store(control.timestamps.last_ns(), Relaxed);
        let local_index = self.next_index(&mut control);
        drop(control);
        life.tries += 1;
        life.next_attempt = now.plus_ms(if life.tries < FAST_TRIES { RETRY_FAST_MS } else { RETRY_SLOW_MS });
        let mut hello = self.hello(&peer, Some(timestamp));
        hello.freshness = life.cookies.take_challenge();
        let paths = life.handshake_paths();
        let psk = peer.preshared_key.as_ref().map(PrivateKey::bytes);
        let first = paths.first().map_or(0, |path| path.id);
        match Initiator::start(&self.own.identity, &peer.public_key, psk, &hello, local_index, first, None) {
            Ok((initiator, bytes)) => {
                life.attempts.push_back(Attempt { initiator, local_index });
                if life.attempts.len() > ATTEMPTS_KEPT {
                    life.attempts.pop_front();
                }
                for path in paths {
                    let bytes = life.cookies.for_path(now, path.id, &bytes);
                    actions.push(Action::Datagram {
                        bond: Some(bond.slot),
                        path: path.id,
                        route: path.route(),
                        bytes,
                    });
                }
            }
            Err(error) => tracing::warn!(peer = peer.name, %error, "cannot start a handshake"),
        }
    }

    pub(super) fn next_index(&self, control: &mut ControlState) -> u32 {
        self.next_index_of(control, self.indices.node, &self.indices.cipher)
    }

    pub(super) fn next_index_of(&self, control: &mut ControlState, node: u16, cipher: &IndexCipher) -> u32 {
        let sessions = self.sessions.load();
        loop {
            control.next_local = (control.next_local + 1) % LOCALS_MAX;
            let index = cipher.index(node, control.next_local);
            if !sessions.contains_key(&index) {
                return index;
            }
        }
    }

    /// A handshake datagram arrived.
    ///
    /// # Errors
    /// Why it was dropped.
    pub fn on_handshake(
        &self,
        now: Time,
        source: &Source,
        header: &Header,
        datagram: &[u8],
        actions: &mut Vec<Action>,
    ) -> Result<(), DropReason> {
        match header.kind {
            Kind::Initiation => self.on_initiation(now, source, datagram, actions),
            Kind::Response => self.on_response(now, header, datagram, actions),
            Kind::Cookie => self.on_cookie(now, source, header, datagram),
            Kind::Data | Kind::Clear | Kind::Partial | Kind::SealedHeader => Err(DropReason::UnknownType),
        }
    }

    pub(super) fn on_initiation(
        &self,
        now: Time,
        source: &Source,
        datagram: &[u8],
        actions: &mut Vec<Action>,
    ) -> Result<(), DropReason> {
        let (admission, identity, of_hub) = self.admit_initiation(now, source, datagram);
        match admission {
            Admission::Process => {}
            Admission::Reply(reply) => {
                let (bond, path) = source.socket.map_or((None, 0), |(bond, path)| (Some(bond), path));
                actions.push(Action::Datagram { bond, path, route: source.route(), bytes: reply.to_vec() });
                return Err(DropReason::HandshakeCookie);
            }
            Admission::Drop(reason) => return Err(reason),
        }
        let opened = open_initiation(identity, datagram)?;
        let bonds = self.bonds.load_full();
        let Some(bond) = bonds.iter().find(|bond| self.dialled_right(bond, &opened, of_hub)) else {
            return Err(DropReason::HandshakeUnknownPeer);
        };
        if !bond.peer.load().may_use(source.wan) {
            // The same message comes over the bond's own WANs as well.
            return Err(DropReason::NoPath);
        }
        if bond.dialer {
            return self.on_rival(now, bond, source, opened, datagram, actions);
        }
        let mut life = lifecycle(bond);
        match life.gate.accept(now, opened.timestamp_ns) {
            // A clock that was set back, with nothing kept of the past: the peer proves that this is no recording.
            Err(DropReason::HandshakeReplayed)
                if life.gate.accept_fresh(now, opened.hello.freshness.as_ref()) =>
            {
                tracing::info!(
                    peer = bond.peer.load().name,
                    "its clock is behind its past, it proved to be fresh"
                );
            }
            Err(DropReason::HandshakeReplayed) => {
                self.challenge_freshness(now, &mut life, source, &opened, datagram, actions);
                return Err(DropReason::HandshakeReplayed);
            }
            other => other?,
        }
        self.respond(now, bond, &mut life, source, opened, actions)
    }

    /// Asks who sent an old timestamp to prove that the message is no recording.
    fn challenge_freshness(
        &self,
        now: Time,
        life: &mut Lifecycle,
        source: &Source,
        opened: &Opened,
        datagram: &[u8],
        actions: &mut Vec<Action>,
    ) {
        if !opened.hello.capabilities.contains(Capabilities::FRESHNESS) {
            return;
        }
        let mut control = self.control();
        let random = || {
            let (high, low) = (control.token(), control.token());
            (u128::from(high) << 64 | u128::from(low)).to_be_bytes()
        };
        if let Some(token) = life.gate.challenge(now, random)
            && let Ok(reply) = self.own.guard.freshness_challenge(datagram, &token)
        {
            let (bond, path) = source.socket.map_or((None, 0), |(bond, path)| (Some(bond), path));
            actions.push(Action::Datagram { bond, path, route: source.route(), bytes: reply.to_vec() });
        }
    }

    /// Both have endpoints and dial: the one with the lower public key goes on, or two dialers would race for path ids. The other
    /// gives its sessions up and listens, but for nobody's recording: the peer first proves that it dials now. The lower one listens
    /// as well when it has dialled in vain: then the other direction is the one that works.
    fn on_rival(
        &self,
        now: Time,
        bond: &Bond,
        source: &Source,
        opened: Opened,
        datagram: &[u8],
        actions: &mut Vec<Action>,
    ) -> Result<(), DropReason> {
        {
            let mut life = lifecycle(bond);
            if self.has_lower_key(&opened.remote_static)
                && !(life.tries >= TRIES_IN_VAIN && life.is_cut_off(now, bond))
            {
                return Err(DropReason::HandshakeUnknownPeer);
            }
            if !life.gate.accept_fresh(now, opened.hello.freshness.as_ref()) {
                self.challenge_freshness(now, &mut life, source, &opened, datagram, actions);
                return Err(DropReason::HandshakeReplayed);
            }
        }
        let listening = self.yield_dialing(now, bond, actions).ok_or(DropReason::HandshakeUnknownPeer)?;
        let mut life = lifecycle(&listening);
        life.gate.accept(now, opened.timestamp_ns)?;
        self.respond(now, &listening, &mut life, source, opened, actions)
    }

    fn has_lower_key(&self, remote: &[u8; 32]) -> bool {
        self.own.identity.public() <= *remote
    }

    /// The peer dials us as well: from now on we listen for it, in a bond of its own.
    fn yield_dialing(&self, now: Time, bond: &Bond, actions: &mut Vec<Action>) -> Option<Arc<Bond>> {
        let peer = bond.peer.load_full();
        tracing::info!(peer = peer.name, "dials us too: we listen");
        self.control().yielded.push(peer.public_key);
        self.apply_again(now, actions);
        let bonds = self.bonds.load();
        bonds.iter().find(|bond| bond.peer.load().public_key == peer.public_key && !bond.dialer).cloned()
    }

    /// Whether we listen, though we have endpoints to dial, and nothing comes.
    pub(super) fn is_deaf(&self, now: Time, bond: &Bond, life: &Lifecycle) -> bool {
        let peer = bond.peer.load();
        let patience_ms = if self.has_lower_key(&peer.public_key) { DEAF_LOWER_MS } else { DEAF_HIGHER_MS };
        !bond.dialer && !peer.endpoints.is_empty() && life.silent_ns(now) >= patience_ms * 1_000_000
    }

    /// Dials a peer again for which we listened.
    pub(super) fn dial_again(&self, now: Time, bond: &Bond, actions: &mut Vec<Action>) {
        let peer = bond.peer.load_full();
        tracing::info!(peer = peer.name, "does not dial any more: we dial");
        self.control().yielded.retain(|key| *key != peer.public_key);
        self.apply_again(now, actions);
    }

    pub(super) fn respond(
        &self,
        now: Time,
        bond: &Bond,
        life: &mut Lifecycle,
        source: &Source,
        opened: Opened,
        actions: &mut Vec<Action>,
    ) -> Result<(), DropReason> {
        let path = opened.path;
        let peer = bond.peer.load();
        let local_index = self.index_for(&mut self.control(), peer.hub)?;
        let psk = peer.preshared_key.as_ref().map(PrivateKey::bytes);
        let (bytes, established) = opened.respond(psk, &self.hello(&peer, None), local_index, None)?;
        if let Err(reason) = agree(bond, &established) {
            // The answer tells the peer what is wanted and accepted here: it comes to the same conclusion.
            actions.push(Action::Datagram { bond: None, path, route: source.route(), bytes });
            return Err(reason);
        }
        // Receive keys stand before the reply leaves; sending starts with the first datagram under them.
        self.install(now, bond, life, &established, local_index, false);
        actions.push(Action::Datagram { bond: None, path, route: source.route(), bytes });
        Ok(())
    }

    pub(super) fn on_response(
        &self,
        now: Time,
        header: &Header,
        datagram: &[u8],
        actions: &mut Vec<Action>,
    ) -> Result<(), DropReason> {
        let bonds = self.bonds.load_full();
        for bond in bonds.iter().filter(|bond| bond.dialer) {
            let mut life = lifecycle(bond);
            let Some(at) =
                life.attempts.iter().position(|attempt| attempt.local_index == header.receiver_index)
            else {
                continue;
            };
            let established = life.attempts[at].initiator.finish(datagram)?;
            life.attempts.clear();
            if let Err(reason) = agree(bond, &established) {
                life.next_attempt = now.plus_ms(RETRY_SLOW_MS);
                return Err(reason);
            }
            life.tries = 0;
            self.install(now, bond, &mut life, &established, header.receiver_index, true);
            life.recycle_ids();
            // The first datagram confirms the keys to the peer; challenges do that where a path is new.
            life.greet(now, bond, actions);
            self.poll_bond_soon(now, bond);
            return Ok(());
        }
        Err(DropReason::UnknownIndex)
    }

    /// Who received a datagram of ours has no session for it: a new one is made at once. The index is known to those alone who see
    /// our datagrams, and a session asks for the next once: whoever forges this costs one handshake.
    fn on_no_session(
        &self,
        now: Time,
        bond: &Bond,
        header: &Header,
        datagram: &[u8],
    ) -> Result<(), DropReason> {
        let session = bond.current.load_full();
        let session = session.filter(|session| session.remote_index == header.receiver_index && bond.dialer);
        let session = session.ok_or(DropReason::UnknownIndex)?;
        if datagram.len() != HEADER_BYTES {
            return Err(DropReason::HandshakeMalformed);
        }
        if !session.is_spent() {
            tracing::info!(peer = bond.peer.load().name, "the peer has no session any more");
            session.spend();
            lifecycle(bond).next_attempt = now;
            self.poll_bond_soon(now, bond);
        }
        Ok(())
    }

    pub(super) fn on_cookie(
        &self,
        now: Time,
        source: &Source,
        header: &Header,
        datagram: &[u8],
    ) -> Result<(), DropReason> {
        let bonds = self.bonds.load_full();
        let (slot, path) = source.socket.ok_or(DropReason::UnknownIndex)?;
        let bond = bonds.get(slot).ok_or(DropReason::UnknownIndex)?;
        if header.counter == NO_SESSION {
            return self.on_no_session(now, bond, header, datagram);
        }
        let mut life = lifecycle(bond);
        if !life.attempts.iter().any(|attempt| attempt.local_index == header.receiver_index) {
            return Err(DropReason::UnknownIndex);
        }
        if life.cookies.accept(now, path, datagram)? {
            life.next_attempt = now;
            self.poll_bond_soon(now, bond);
        }
        Ok(())
    }
}

/// Whether a handshake that went well gives a session: not where one side wants what the other does not accept.
///
/// # Errors
/// `HandshakeSteering`, `HandshakeEthernet`. The reason is kept for the operator, and said once, not with every attempt.
fn agree(bond: &Bond, established: &Established) -> Result<(), DropReason> {
    let (peer, hello) = (bond.peer.load(), &established.remote_hello);
    let refusal = peer.refusal(hello);
    let before = bond.refused.swap(refusal.map(Arc::new));
    let Some(refusal) = refusal else { return Ok(()) };
    if before.as_deref() != Some(&refusal) {
        tracing::warn!(peer = peer.name, "no session: {refusal}");
    }
    Err(refusal.reason())
}
