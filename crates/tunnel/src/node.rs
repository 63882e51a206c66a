//! The node: what all cores share. Identity, bonds, sessions by receiver index, handshakes.
//!
//! Cores read immutable tables through one atomic load a batch; changes build a new table. Handshakes run
//! on whichever core received them, under one lock, guarded by mac1 and cookies.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};

use arc_swap::ArcSwap;
use packet::drop_reason::DropReason;
use ring::digest;
use steering::ownership::Ownership;

use crate::advertise;
use crate::aead::Aead;
use crate::bond::{Bond, Bonds, PeerCores};
use crate::config::{NodeConfig, Peer, Snapshot, Wan};
use crate::frame::{CloseReason, Frame, PeerPathState};
use crate::handshake::{Established, Identity, Initiator, Opened, Timestamps, open_initiation};
use crate::header::{Header, Kind};
use crate::hello::{Capabilities, Hello, PROTOCOL_VERSION, ProcessorInfo, SteeringMode};
use crate::index::{IndexCipher, LOCALS_MAX};
use crate::lifecycle::{Action, Attempt, Lifecycle, WanUnder, encode};
use crate::mac::{Guard, GuardLimits, Verdict};
use crate::path::{Path, PathState, Route};
use crate::session::{Epoch, REKEY_AFTER_MS, Session};
use crate::time::Time;

/// Sessions kept per bond: the newest, the one before it (datagrams still under way), one not confirmed yet.
const SESSIONS_KEPT: usize = 3;
/// Handshakes of one bond that may be under way at once: long round trips outlast the retry interval.
const ATTEMPTS_KEPT: usize = 4;
/// Pause between handshake attempts: short at first, so that a link that comes up joins at once.
const RETRY_FAST_MS: u64 = 500;
const RETRY_SLOW_MS: u64 = 2_000;
const FAST_TRIES: u32 = 40;

/// State shared by all cores of a node.
pub struct Node {
    /// Number of worker cores.
    pub cores: u8,
    /// Which of our cores owns a flow. Peers are told hash key and table, and address the owner themselves.
    pub ownership: Arc<ArcSwap<Ownership>>,
    /// All bonds.
    pub bonds: ArcSwap<Bonds>,
    sessions: ArcSwap<HashMap<u32, Arc<Session>, foldhash::fast::FixedState>>,
    /// How busy each core is, 0–255.
    load: Vec<AtomicU8>,
    identity: Identity,
    index_cipher: IndexCipher,
    node_id: u16,
    boot_id: u64,
    wall_clock_ns: u64,
    rekey_after_ms: u64,
    timestamp_ns: AtomicU64,
    /// When [`Node::poll`] is due, ns. Whoever changes a life cycle brings it forward.
    poll_at_ns: AtomicU64,
    shared: Mutex<Shared>,
}

/// What only handshakes and configuration changes touch.
struct Shared {
    guard: Guard,
    timestamps: Timestamps,
    next_local: u32,
    seed: [u8; 32],
    tokens: u64,
    wans: Vec<Wan>,
    /// Peers with endpoints that dial us too and have the lower key.
    yielded: Vec<[u8; 32]>,
}

impl Shared {
    /// An unpredictable number: digest of the secret seed and a counter.
    fn token(&mut self) -> u64 {
        self.tokens += 1;
        let mut context = digest::Context::new(&digest::SHA256);
        context.update(&self.seed);
        context.update(&self.tokens.to_be_bytes());
        let digest = context.finish();
        digest.as_ref().first_chunk().map_or(self.tokens, |bytes| u64::from_be_bytes(*bytes))
    }
}

/// Where a datagram came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    /// WAN id of the socket.
    pub wan: u16,
    /// Local address it was sent to.
    pub local: Option<IpAddr>,
    /// Remote address.
    pub remote: SocketAddr,
    /// For a dialer's socket: bond slot and path it belongs to.
    pub socket: Option<(usize, u8)>,
}

impl Source {
    /// The way back.
    pub fn route(&self) -> Route {
        Route { wan: self.wan, local: self.local, remote: self.remote }
    }
}

impl Node {
    /// A node without peers.
    pub fn new(config: NodeConfig) -> Self {
        let cores = config.ownership.load().cores;
        let identity = Identity::new(config.private_key);
        let guard = Guard::new(&identity.public(), config.seed, GuardLimits::default());
        Self {
            cores,
            ownership: config.ownership,
            bonds: ArcSwap::default(),
            sessions: ArcSwap::default(),
            load: (0..cores).map(|_| AtomicU8::new(0)).collect(),
            identity,
            index_cipher: IndexCipher::new(config.index_key),
            node_id: config.node_id,
            boot_id: config.boot_id,
            wall_clock_ns: config.wall_clock_ns,
            rekey_after_ms: config.rekey_after_ms.min(REKEY_AFTER_MS),
            timestamp_ns: AtomicU64::new(config.timestamp_floor_ns),
            poll_at_ns: AtomicU64::new(0),
            shared: Mutex::new(Shared {
                guard,
                timestamps: Timestamps::new(config.timestamp_floor_ns),
                next_local: 0,
                seed: config.seed,
                tokens: 0,
                wans: Vec::new(),
                yielded: Vec::new(),
            }),
        }
    }

    /// Our public key.
    pub fn public_key(&self) -> [u8; 32] {
        self.identity.public()
    }

    /// Highest handshake timestamp used: persist it, a later run must start above it.
    pub fn timestamp_floor_ns(&self) -> u64 {
        self.timestamp_ns.load(Relaxed)
    }

    /// The session a receiver index names.
    pub fn session(&self, index: u32) -> Option<Arc<Session>> {
        self.sessions.load().get(&index).cloned()
    }

    /// Sessions that datagrams may name now, of all bonds.
    pub fn sessions_held(&self) -> usize {
        self.sessions.load().len()
    }

    fn shared(&self) -> MutexGuard<'_, Shared> {
        // A panic while the lock was held leaves nothing half done that matters: go on.
        self.shared.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Our side of the handshake.
    fn hello(&self, peer: &Peer, timestamp_ns: Option<u64>) -> Hello {
        Hello {
            version: PROTOCOL_VERSION,
            capabilities: Capabilities::RETRANSMIT.with(Capabilities::PARTIAL_CHECKSUM),
            aeads: Aead::offered(),
            timestamp_ns,
            boot_id: self.boot_id,
            encryption: peer.encryption,
            steering: SteeringMode::CoreId,
            processor: self.processor_info(peer),
        }
    }

    /// What a peer is told about our cores (row T3).
    pub(crate) fn processor_info(&self, peer: &Peer) -> ProcessorInfo {
        let ownership = self.ownership.load();
        ProcessorInfo {
            cores: self.cores,
            usable: ownership.usable(),
            load: self.load.iter().map(|load| load.load(Relaxed)).collect(),
            reserved: Vec::new(),
            preferred: Vec::new(),
            policy: peer.policy,
            flow: peer.flow,
            flow_hash_key: *ownership.hasher.key(),
            table: ownership.table.clone(),
        }
    }

    /// Notes how busy a core is, 0 idle – 255 full. Peers are told in the handshake and when it changes much.
    pub fn set_load(&self, core: u8, load: u8) {
        if let Some(known) = self.load.get(usize::from(core)) {
            known.store(load, Relaxed);
        }
    }

    /// Takes over a configuration: adds, changes and removes bonds and paths; nothing that stays is disturbed.
    pub fn apply(&self, now: Time, snapshot: &Snapshot, actions: &mut Vec<Action>) {
        // Lock order everywhere: a bond's lifecycle first, then `shared`.
        self.shared().wans.clone_from(&snapshot.wans);
        let old = self.bonds.load_full();
        let mut bonds = Bonds { list: old.list.clone(), ..Bonds::default() };
        for slot in &mut bonds.list {
            let gone = slot.as_ref().is_some_and(|bond| {
                let key = bond.peer.load().public_key;
                !snapshot.peers.iter().any(|peer| peer.public_key == key)
            });
            if gone && let Some(bond) = slot.take() {
                self.drop_sessions(&mut lifecycle(&bond));
            }
        }
        for peer in &snapshot.peers {
            let known = bonds
                .iter()
                .find(|bond| bond.peer.load().public_key == peer.public_key)
                .map(|bond| bond.slot);
            let dialer = !peer.endpoints.is_empty() && !self.shared().yielded.contains(&peer.public_key);
            // A slot is never used again: what still speaks of it (sockets, cached sessions) must not meet another
            // peer there. A peer that changes between dialling and listening is a new bond.
            let slot = match known.and_then(|slot| bonds.get(slot)).filter(|bond| bond.dialer == dialer) {
                Some(bond) => {
                    bond.peer.store(Arc::new(peer.clone()));
                    bond.slot
                }
                None => {
                    if let Some(bond) = known.and_then(|slot| bonds.list[slot].take()) {
                        self.drop_sessions(&mut lifecycle(&bond));
                    }
                    let slot = bonds.list.len();
                    bonds.list.push(Some(new_bond(slot, peer, dialer)));
                    slot
                }
            };
            for net in &peer.allowed_ips {
                bonds.allowed_ips.insert(*net, slot);
            }
        }
        self.poll_soon(now);
        let bonds = Arc::new(bonds);
        self.bonds.store(Arc::clone(&bonds));
        for bond in bonds.iter() {
            if bond.dialer {
                self.update_paths(now, bond, &snapshot.wans, actions);
            } else {
                limit_paths(bond, &snapshot.wans);
            }
        }
    }

    /// When the timers of the bonds are due.
    pub fn next_poll(&self) -> Time {
        Time::from_ns(self.poll_at_ns.load(Relaxed))
    }

    /// Something changed: the timers are due now.
    pub(crate) fn poll_soon(&self, now: Time) {
        self.poll_at_ns.fetch_min(now.ns(), Relaxed);
    }

    /// Runs the timers of all bonds if they are due and no other core does; true if it did.
    pub fn poll_if_due(&self, now: Time, actions: &mut Vec<Action>) -> bool {
        let at = self.poll_at_ns.load(Relaxed);
        // Whoever moves the time forward does the work.
        let claimed = at <= now.ns()
            && self.poll_at_ns.compare_exchange(at, now.plus_ms(1_000).ns(), Relaxed, Relaxed).is_ok();
        if claimed {
            let next = self.poll(now, actions);
            self.poll_at_ns.fetch_min(next.ns(), Relaxed);
        }
        claimed
    }

    fn poll(&self, now: Time, actions: &mut Vec<Action>) -> Time {
        let mut next = now.plus_ms(1_000);
        let bonds = self.bonds.load_full();
        for bond in bonds.iter() {
            let mut life = lifecycle(bond);
            next = next.min(life.poll_paths(now, bond, actions));
            if bond.current.load().is_some() {
                let (ownership, peer) = (self.ownership.load_full(), bond.peer.load_full());
                let info = || self.processor_info(&peer);
                next = next.min(life.advertise(now, bond.slot, &ownership, &peer, info, actions));
            }
            if life.wants_handshake(now, bond) {
                self.start_handshake(now, bond, &mut life, actions);
            }
            if bond.dialer && life.next_attempt > now && (bond.current.load().is_none()) {
                next = next.min(life.next_attempt);
            }
            self.expire_sessions(now, bond, &mut life);
        }
        next
    }

    fn expire_sessions(&self, now: Time, bond: &Bond, life: &mut Lifecycle) {
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

    fn start_handshake(&self, now: Time, bond: &Bond, life: &mut Lifecycle, actions: &mut Vec<Action>) {
        let mut shared = self.shared();
        let peer = bond.peer.load();
        let timestamp = shared.timestamps.next(self.wall_clock_ns.saturating_add(now.ns()));
        self.timestamp_ns.store(shared.timestamps.last_ns(), Relaxed);
        let local_index = self.next_index(&mut shared);
        drop(shared);
        life.tries += 1;
        life.next_attempt = now.plus_ms(if life.tries < FAST_TRIES { RETRY_FAST_MS } else { RETRY_SLOW_MS });
        let hello = self.hello(&peer, Some(timestamp));
        let cookie = life.cookie.cookie(now);
        let paths = match cookie {
            // A cookie is bound to the source address it was given for.
            Some(_) => life
                .paths
                .iter()
                .filter(|l| l.path.id == life.cookie_path)
                .map(|l| Arc::clone(&l.path))
                .collect(),
            None => life.handshake_paths(),
        };
        let psk = peer.preshared_key.as_ref().map(crate::keys::PrivateKey::bytes);
        let first = paths.first().map_or(0, |path| path.id);
        match Initiator::start(&self.identity, &peer.public_key, psk, &hello, local_index, first, cookie) {
            Ok((initiator, bytes)) => {
                life.cookie.sent(&bytes);
                life.attempts.push_back(Attempt { initiator, local_index });
                if life.attempts.len() > ATTEMPTS_KEPT {
                    life.attempts.pop_front();
                }
                for path in paths {
                    let bytes = bytes.clone();
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

    fn next_index(&self, shared: &mut Shared) -> u32 {
        let sessions = self.sessions.load();
        loop {
            shared.next_local = (shared.next_local + 1) % LOCALS_MAX;
            let index = self.index_cipher.index(self.node_id, shared.next_local);
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
            Kind::Data | Kind::Clear | Kind::Partial => Err(DropReason::UnknownType),
        }
    }

    fn on_initiation(
        &self,
        now: Time,
        source: &Source,
        datagram: &[u8],
        actions: &mut Vec<Action>,
    ) -> Result<(), DropReason> {
        match self.shared().guard.admit(now, source.remote, datagram) {
            Verdict::Process => {}
            Verdict::Reply(reply) => {
                let (bond, path) = source.socket.map_or((None, 0), |(bond, path)| (Some(bond), path));
                actions.push(Action::Datagram { bond, path, route: source.route(), bytes: reply.to_vec() });
                return Err(DropReason::HandshakeCookie);
            }
            Verdict::Drop(reason) => return Err(reason),
        }
        let opened = open_initiation(&self.identity, datagram)?;
        let bonds = self.bonds.load_full();
        let Some(bond) = bonds.iter().find(|bond| bond.peer.load().public_key == opened.remote_static) else {
            return Err(DropReason::HandshakeUnknownPeer);
        };
        if bond.dialer {
            // Both have endpoints: the lower public key dials (design §4), or two dialers would race for path ids.
            if self.identity.public() > opened.remote_static {
                self.yield_dialing(now, bond);
            }
            return Err(DropReason::HandshakeUnknownPeer);
        }
        let mut life = lifecycle(bond);
        life.gate.accept(now, opened.timestamp_ns)?;
        self.respond(now, bond, &mut life, source, opened, actions)
    }

    /// The peer dials us as well and has the lower key: from now on we listen for it. Its next try is answered.
    fn yield_dialing(&self, now: Time, bond: &Bond) {
        let peer = bond.peer.load_full();
        self.shared().yielded.push(peer.public_key);
        tracing::info!(peer = peer.name, "dials us too and has the lower key: we listen");
        self.drop_sessions(&mut lifecycle(bond));
        self.bonds.rcu(|bonds| {
            let mut list = bonds.list.clone();
            list[bond.slot] = None;
            let slot = list.len();
            list.push(Some(new_bond(slot, &peer, false)));
            let mut allowed_ips = crate::bond::AllowedIps::default();
            for bond in list.iter().flatten() {
                for net in &bond.peer.load().allowed_ips {
                    allowed_ips.insert(*net, bond.slot);
                }
            }
            Bonds { list, allowed_ips }
        });
        self.poll_soon(now);
    }

    fn respond(
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
        let local_index = self.next_index(&mut self.shared());
        let psk = peer.preshared_key.as_ref().map(crate::keys::PrivateKey::bytes);
        let (bytes, established) = opened.respond(psk, &self.hello(&peer, None), local_index, None)?;
        // Receive keys stand before the reply leaves; sending starts with the first datagram under them.
        self.install(now, bond, life, &established, local_index, false);
        actions.push(Action::Datagram { bond: None, path, route: source.route(), bytes });
        Ok(())
    }

    fn on_response(
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
            life.tries = 0;
            self.install(now, bond, &mut life, &established, header.receiver_index, true);
            life.recycle_ids();
            // The first datagram confirms the keys to the peer; challenges do that where a path is new.
            life.greet(now, bond, actions);
            self.poll_soon(now);
            return Ok(());
        }
        Err(DropReason::UnknownIndex)
    }

    fn on_cookie(
        &self,
        now: Time,
        source: &Source,
        header: &Header,
        datagram: &[u8],
    ) -> Result<(), DropReason> {
        let bonds = self.bonds.load_full();
        let (slot, path) = source.socket.ok_or(DropReason::UnknownIndex)?;
        let bond = bonds.get(slot).ok_or(DropReason::UnknownIndex)?;
        let mut life = lifecycle(bond);
        if !life.attempts.iter().any(|attempt| attempt.local_index == header.receiver_index) {
            return Err(DropReason::UnknownIndex);
        }
        life.cookie.accept(now, datagram)?;
        life.cookie_path = path;
        life.next_attempt = now;
        self.poll_soon(now);
        Ok(())
    }

    /// Puts a new session in place: receive keys for all cores first, then, for the initiator, the switch.
    fn install(
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
                send_key: &established.send_key,
                receive_key: &established.receive_key,
                own_cores: self.cores,
                peer_cores: hello.processor.cores,
                rekey_after_ms: self.rekey_after_ms,
                initiator,
            },
            now,
        ));
        life.next_number += 1;
        let restarted = life.boot_id.is_some_and(|boot| boot != hello.boot_id);
        if life.boot_id != Some(hello.boot_id) {
            life.boot_id = Some(hello.boot_id);
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
        bond.cores.store(Some(Arc::new(PeerCores::new(hello.processor.clone()))));
        // Our cores may have changed since we said hello.
        life.advertiser.restart(now);
        life.sessions.push(Arc::clone(&session));
        if life.sessions.len() > SESSIONS_KEPT {
            // Whoever is not confirmed goes first, never the one in use: answers may have been lost on their way.
            let current = bond.current.load().as_ref().map_or(0, |current| current.number);
            let newest = life.sessions.len() - 1;
            let idle = life.sessions[..newest].iter().position(|s| s.number != current && !s.is_confirmed());
            let old = life.sessions[..newest].iter().position(|s| s.number != current);
            life.sessions.remove(idle.or(old).unwrap_or(0));
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
            let newer = bond.current.load().as_ref().is_none_or(|current| current.number < session.number);
            if newer {
                tracing::info!(peer = bond.peer.load().name, cipher = session.aead.name(), "session");
                bond.current.store(Some(Arc::clone(session)));
            }
        }
    }

    /// The peer closed its side.
    pub fn closed(&self, now: Time, bond: &Bond) {
        let mut life = lifecycle(bond);
        self.drop_sessions(&mut life);
        bond.current.store(None);
        life.next_attempt = now.plus_ms(RETRY_FAST_MS);
        life.close_paths(now, bond);
        self.poll_soon(now);
        tracing::info!(peer = bond.peer.load().name, "peer closed the session");
    }

    fn drop_sessions(&self, life: &mut Lifecycle) {
        let gone = std::mem::take(&mut life.sessions);
        self.sessions.rcu(|table| {
            let mut table = HashMap::clone(table);
            table.retain(|index, _| !gone.iter().any(|session| session.local_index == *index));
            table
        });
    }

    /// Makes the table of receiver indices agree with the bond's sessions.
    fn republish(&self, bond: &Bond, life: &Lifecycle) {
        self.sessions.rcu(|table| {
            let mut table = HashMap::clone(table);
            table.retain(|_, session| session.bond != bond.slot);
            table.extend(life.sessions.iter().map(|session| (session.local_index, Arc::clone(session))));
            table
        });
    }

    /// Handles an authenticated control frame.
    pub fn on_control(
        &self,
        now: Time,
        bond: &Bond,
        path: u8,
        source: &Source,
        frame: &Frame<'_>,
        actions: &mut Vec<Action>,
    ) {
        if matches!(frame, Frame::Close { .. }) {
            self.closed(now, bond);
            return;
        }
        lifecycle(bond).on_control(now, bond, path, source.route(), frame, actions);
        if !matches!(frame, Frame::Ping { .. } | Frame::Pong { .. }) {
            self.poll_soon(now);
        }
    }

    /// A listener met a path id it does not know, in an authenticated datagram: the dialer opened a path.
    pub fn on_new_path(&self, now: Time, bond: &Bond, id: u8, source: &Source) {
        let (token, wan) = {
            let mut shared = self.shared();
            (shared.token(), shared.wans.iter().find(|wan| wan.id == source.wan).cloned())
        };
        let mut life = lifecycle(bond);
        if bond.dialer
            || life.paths.len() >= crate::bond::PATHS_MAX
            || life.paths.iter().any(|l| l.path.id == id)
        {
            return;
        }
        let (tier, rate_max, mtu) = wan.map_or((0, None, 1_500), |wan| (wan.tier, rate_max(&wan), wan.mtu));
        let path = Path::new(id, source.route(), tier, rate_max, now);
        let under =
            WanUnder { up: true, addresses: Vec::new(), mtu_limit: datagram_limit(mtu, &source.remote) };
        life.add_path(bond, path, None, under, token, now);
        self.poll_soon(now);
    }

    /// The peer still uses a path that we took away.
    pub fn tell_removed(&self, bond: &Bond, id: u8, actions: &mut Vec<Action>) {
        lifecycle(bond).tell_state(bond.slot, id, PeerPathState::Removed, actions);
    }

    /// An authenticated datagram of a known path came from elsewhere.
    pub fn on_moved(&self, now: Time, bond: &Bond, id: u8, source: &Source) {
        self.poll_soon(now);
        let token = self.shared().token();
        lifecycle(bond).on_moved(id, source.route(), token);
    }

    /// A core found a path dead: nothing came back for what it sent.
    pub fn suspect(&self, now: Time, bond: &Bond, id: u8, actions: &mut Vec<Action>) {
        lifecycle(bond).suspect(now, bond.slot, id, actions);
        self.poll_soon(now);
    }

    /// Small datagrams pass on this path, large ones do not come back as reports.
    pub fn black_hole(&self, now: Time, bond: &Bond, id: u8) {
        lifecycle(bond).black_hole(now, id);
        self.poll_soon(now);
    }

    /// Takes over processor information the peer sent inside the session (row T3).
    ///
    /// # Errors
    /// `HandshakeMalformed`.
    pub fn on_processor_info(
        &self,
        bond: &Bond,
        path: u8,
        body: &[u8],
        actions: &mut Vec<Action>,
    ) -> Result<(), DropReason> {
        let info = ProcessorInfo::decode(body)?;
        let _order = lifecycle(bond);
        let takes = bond.cores.load().as_ref().is_some_and(|known| {
            // One that was overtaken on its way must not bring an old table back; a restart begins with a handshake.
            let age = info.table.era().wrapping_sub(known.info.table.era()).cast_signed();
            // More cores than the session has keys for need a new handshake; owners must exist either way.
            known.info.cores == info.cores && age >= 0
        });
        if takes {
            bond.cores.store(Some(Arc::new(PeerCores::new(info))));
        }
        let frames = advertise::seen(body);
        actions.push(Action::Frames { bond: bond.slot, path, route: None, frames, pad_to: 0 });
        Ok(())
    }

    /// The peer confirms processor information.
    pub fn on_processor_info_seen(&self, bond: &Bond, digest: &[u8]) {
        lifecycle(bond).advertiser.confirm(digest);
    }

    /// Dialer: one path per WAN × endpoint × number (row T1), kept as long as its origin exists.
    fn update_paths(&self, now: Time, bond: &Bond, wans: &[Wan], actions: &mut Vec<Action>) {
        let peer = bond.peer.load();
        let mut life = lifecycle(bond);
        let allowed = |wan: &Wan| peer.wans.as_ref().is_none_or(|ids| ids.contains(&wan.id));
        let mut wanted = Vec::new();
        for wan in wans.iter().filter(|wan| allowed(wan)) {
            for endpoint in &peer.endpoints {
                wanted.extend((0..peer.paths_per_pair.clamp(1, 8)).map(|nth| (wan, *endpoint, nth)));
            }
        }
        let exists = |origin: &(u16, SocketAddr, u8)| {
            wanted.iter().any(|(wan, endpoint, nth)| (wan.id, *endpoint, *nth) == *origin)
        };
        let gone: Vec<u8> = life
            .paths
            .iter()
            .filter(|l| l.origin.as_ref().is_none_or(|o| !exists(o)))
            .map(|l| l.path.id)
            .collect();
        for id in gone {
            life.retain_paths(bond, |l| l.path.id != id);
            life.tell_state(bond.slot, id, PeerPathState::Removed, actions);
        }
        for (wan, endpoint, nth) in wanted {
            let up = wan.up && reaches(wan, &endpoint);
            let under = WanUnder {
                up,
                addresses: wan.addresses.clone(),
                mtu_limit: datagram_limit(wan.mtu, &endpoint),
            };
            let known = life
                .paths
                .iter()
                .find(|l| l.origin == Some((wan.id, endpoint, nth)))
                .map(|l| Arc::clone(&l.path));
            if let Some(path) = known {
                path.set_limits(wan.tier, rate_max(wan));
                life.wan_changed(now, bond.slot, path.id, &under, actions);
            } else if up && let Some(id) = life.free_id() {
                let route = Route { wan: wan.id, local: None, remote: endpoint };
                let path = Path::new(id, route, wan.tier, rate_max(wan), now);
                let token = self.shared().token();
                life.add_path(bond, path, Some((wan.id, endpoint, nth)), under, token, now);
                life.next_attempt = life.next_attempt.min(now);
            }
        }
    }

    /// Close frames for every session, for a node that stops.
    pub fn close_all(&self, actions: &mut Vec<Action>) {
        let bonds = self.bonds.load_full();
        for bond in bonds.iter() {
            let frames = encode(&Frame::Close { reason: CloseReason::Shutdown });
            for path in bond.paths.load().iter().filter(|path| path.usable()) {
                actions.push(Action::Frames {
                    bond: bond.slot,
                    path: path.id,
                    route: None,
                    frames: frames.clone(),
                    pad_to: 0,
                });
            }
        }
    }
}

fn lifecycle(bond: &Bond) -> MutexGuard<'_, Lifecycle> {
    bond.lifecycle.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn new_bond(slot: usize, peer: &Peer, dialer: bool) -> Arc<Bond> {
    Arc::new(Bond::new(slot, peer.clone(), dialer, Lifecycle::new(&peer.public_key)))
}

/// Rate cap in bytes per second.
fn rate_max(wan: &Wan) -> Option<u64> {
    wan.rate_max_bps.map(|bps| bps / 8)
}

/// Largest UDP payload an interface MTU leaves for this address family.
fn datagram_limit(mtu: u16, remote: &SocketAddr) -> u16 {
    let headers = if remote.ip().to_canonical().is_ipv4() { 28 } else { 48 };
    mtu.clamp(1_280, 9_000) - headers
}

/// A WAN can reach an endpoint: it has an address of that family (or none is known and the kernel decides).
fn reaches(wan: &Wan, endpoint: &SocketAddr) -> bool {
    wan.addresses.is_empty()
        || wan.addresses.iter().any(|address| address.is_ipv4() == endpoint.ip().to_canonical().is_ipv4())
}

/// Listener: caps and tiers of the WANs its paths came in on.
fn limit_paths(bond: &Bond, wans: &[Wan]) {
    for path in bond.paths.load().iter() {
        if let Some(wan) = wans.iter().find(|wan| wan.id == path.route().wan) {
            path.set_limits(wan.tier, rate_max(wan));
            if !wan.up {
                path.set_state(PathState::Down, "WAN down");
            }
        }
    }
}
