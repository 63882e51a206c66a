//! The node: what all cores share. Identity, bonds, sessions by receiver index, handshakes.
//!
//! Cores read immutable tables through one atomic load a batch; changes build a new table. What changes by events is in
//! parts: `handshakes`, the `sessions` that they leave behind, `paths`; `hub`: what units of one hub share.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};

use arc_swap::ArcSwap;
use packet::drop_reason::DropReason;
use ring::digest;
use steering::cores::CoreSet;
use steering::ownership::Ownership;
use steering::policy::RemoteCores;

use crate::advertise;
use crate::aead::Aead;
use crate::bond::{Bond, Bonds};
use crate::config::{NodeConfig, Peer, Snapshot};
use crate::frame::{CloseReason, Frame};
use crate::handshake::{Identity, Timestamps};
use crate::hello::{Hello, PROTOCOL_VERSION, ProcessorInfo};
use crate::index::{IndexCipher, IndexState};
use crate::lifecycle::{Action, Lifecycle, encode};
use crate::memory::{BondMemory, NodeMemory};
use crate::mode::SteeringMode;
use crate::path::{Path, Route};
use crate::session::{REKEY_AFTER_MS, Session};
use crate::time::Time;

mod handshakes;
mod hub;
mod paths;
mod polls;
mod sessions;

pub use hub::{HubBond, flow_key_of};

/// State shared by all cores of a node.
pub struct Node {
    /// Number of worker cores.
    pub cores: u8,
    /// Which of our cores owns a flow. Peers are told hash key and table, and address the owner themselves.
    pub ownership: Arc<ArcSwap<Ownership>>,
    /// All bonds.
    pub bonds: ArcSwap<Bonds>,
    sessions: ArcSwap<HashMap<u32, Arc<Session>, IndexState>>,
    /// How busy each core is, 0–255.
    load: Vec<AtomicU8>,
    own: hub::Entrance,
    hub: Option<hub::Hub>,
    indices: OwnIndices,
    boot_id: u64,
    wall_clock_ns: u64,
    rekey_after_ms: u64,
    timestamp_ns: AtomicU64,
    /// When the timers of each bond are due. Whoever changes a life cycle brings its bond forward.
    polls: polls::Polls,
    control: Mutex<ControlState>,
    /// The configuration that was applied last.
    applied: Mutex<Snapshot>,
}

/// Receiver indices of the sessions that this node is not a hub for.
struct OwnIndices {
    node: u16,
    cipher: IndexCipher,
}

/// State that only handshakes and configuration changes touch.
struct ControlState {
    timestamps: Timestamps,
    next_local: u32,
    seed: [u8; 32],
    tokens: u64,
    /// Memory that all peers make us use.
    memory: Arc<NodeMemory>,
    /// Peers with endpoints that dial us too, for which we listen.
    yielded: Vec<[u8; 32]>,
}

impl ControlState {
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
    /// Routers that it passed; `None`: not known.
    pub hops: Option<u8>,
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
        Self {
            cores,
            ownership: config.ownership,
            bonds: ArcSwap::default(),
            sessions: ArcSwap::default(),
            load: (0..cores).map(|_| AtomicU8::new(0)).collect(),
            own: hub::Entrance::new(identity, config.seed),
            hub: config.hub_key.map(|key| hub::Hub::new(key, config.seed)),
            indices: OwnIndices { node: config.node_id, cipher: IndexCipher::new(config.index_key) },
            boot_id: config.boot_id,
            wall_clock_ns: config.wall_clock_ns,
            rekey_after_ms: config.rekey_after_ms.min(REKEY_AFTER_MS),
            timestamp_ns: AtomicU64::new(config.timestamp_floor_ns),
            polls: polls::Polls::default(),
            control: Mutex::new(ControlState {
                timestamps: Timestamps::new(config.timestamp_floor_ns),
                next_local: 0,
                seed: config.seed,
                tokens: 0,
                memory: Arc::default(),
                yielded: Vec::new(),
            }),
            applied: Mutex::default(),
        }
    }

    /// Our public key.
    pub fn public_key(&self) -> [u8; 32] {
        self.own.identity.public()
    }

    /// Highest handshake timestamp used: persist it, a later run must start above it.
    pub fn timestamp_floor_ns(&self) -> u64 {
        self.timestamp_ns.load(Relaxed)
    }

    fn control(&self) -> MutexGuard<'_, ControlState> {
        // A panic while the lock was held leaves nothing half done that matters: go on.
        self.control.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Our side of the handshake.
    fn hello(&self, peer: &Peer, timestamp_ns: Option<u64>) -> Hello {
        Hello {
            version: PROTOCOL_VERSION,
            capabilities: peer.capabilities(),
            aeads: Aead::offered(),
            timestamp_ns,
            freshness: None,
            boot_id: self.boot_id,
            encryption: peer.encryption,
            steering: peer.steering.receive,
            accepted: peer.steering.accept,
            processor: self.processor_info(peer),
        }
    }

    /// Processor information for a peer (row T3).
    pub(crate) fn processor_info(&self, peer: &Peer) -> ProcessorInfo {
        let ownership = self.ownership.load();
        let RemoteCores { usable, reserved, preferred, .. } = ownership.told();
        let of_all = usable.without(&ownership.classes.all_reserved());
        ProcessorInfo {
            cores: self.cores,
            tunnel_core: (peer.steering.receive == SteeringMode::PerTunnel)
                .then(|| tunnel_core(peer, &usable, &of_all))
                .flatten(),
            usable,
            load: self.load.iter().map(|load| load.load(Relaxed)).collect(),
            reserved,
            preferred,
            policy: peer.policy,
            flow: peer.flow,
            tenant: peer.tenant,
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

    /// How busy each core was told to be ([`Node::set_load`]).
    #[must_use]
    pub fn loads(&self) -> Vec<u8> {
        self.load.iter().map(|load| load.load(Relaxed)).collect()
    }

    /// Takes over a configuration: adds, changes and removes bonds and paths; nothing that stays is disturbed.
    pub fn apply(&self, now: Time, snapshot: &Snapshot, actions: &mut Vec<Action>) {
        // Lock order everywhere: what is applied first, then a bond's lifecycle, then `control`.
        let mut applied = self.applied();
        applied.clone_from(snapshot);
        self.apply_snapshot(now, snapshot, actions);
    }

    /// Who dials has changed: the configuration of now holds for the new bonds as well.
    fn apply_again(&self, now: Time, actions: &mut Vec<Action>) {
        let applied = self.applied();
        self.apply_snapshot(now, &applied, actions);
    }

    fn applied(&self) -> MutexGuard<'_, Snapshot> {
        self.applied.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn apply_snapshot(&self, now: Time, snapshot: &Snapshot, actions: &mut Vec<Action>) {
        self.control().yielded.retain(|key| snapshot.peers.iter().any(|peer| peer.public_key == *key));
        let old = self.bonds.load_full();
        let mut bonds = old.list.clone();
        for slot in &mut bonds {
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
                .flatten()
                .find(|bond| bond.peer.load().public_key == peer.public_key)
                .map(|bond| bond.slot);
            let dialer = !peer.endpoints.is_empty() && !self.control().yielded.contains(&peer.public_key);
            // A slot is never used again: what still speaks of it (sockets, cached sessions) must not meet another
            // peer there. A peer that changes between dialling and listening is a new bond.
            match known.and_then(|slot| bonds.get(slot)?.as_ref()).filter(|bond| bond.dialer == dialer) {
                Some(bond) => {
                    let before = bond.peer.swap(Arc::new(peer.clone()));
                    // What a session was agreed on holds as long as it does: another wish needs another one.
                    if before.steering != peer.steering {
                        bond.current.load().iter().for_each(|session| session.spend());
                    }
                    rekey_for(now, bond, &before, peer);
                }
                None => {
                    if let Some(bond) = known.and_then(|slot| bonds.get_mut(slot)?.take()) {
                        self.drop_sessions(&mut lifecycle(&bond));
                    }
                    let slot = bonds.len();
                    let seed = self.control().token();
                    bonds.push(Some(self.new_bond(slot, peer, dialer, seed)));
                }
            }
        }
        self.poll_soon(now);
        let bonds = Arc::new(Bonds::new(bonds));
        self.bonds.store(Arc::clone(&bonds));
        for bond in bonds.iter() {
            let (id, spread) = {
                let peer = bond.peer.load();
                (peer.id, peer.paths.spread)
            };
            bond.classes.set(snapshot.classes.get(&id).map(Arc::clone).unwrap_or_default(), spread);
            {
                let _order = lifecycle(bond);
                bond.cores.override_with(snapshot.core_overrides.get(&id));
            }
            if bond.dialer {
                self.update_paths(now, bond, &snapshot.wans, actions);
            } else {
                self.limit_paths(bond, &snapshot.wans, actions);
            }
        }
    }

    fn new_bond(&self, slot: usize, peer: &Peer, dialer: bool, seed: u64) -> Arc<Bond> {
        let memory = BondMemory::new(Arc::clone(&self.control().memory), self.cores);
        Arc::new(Bond::new(slot, peer.clone(), dialer, seed, memory, Lifecycle::new(&peer.public_key)))
    }

    /// Bytes that the peers make this node keep, all together: packets in pieces and held for order, lanes.
    #[must_use]
    pub fn peer_bytes(&self) -> usize {
        self.control().memory.bytes()
    }

    /// When the timers of the bonds are due.
    pub fn next_poll(&self) -> Time {
        self.polls.next()
    }

    /// Bonds whose timers ran so far, each time counted.
    pub fn polled(&self) -> u64 {
        self.polls.polled()
    }

    /// Something changed for all bonds: their timers are due now.
    pub fn poll_soon(&self, now: Time) {
        self.polls.all_soon(now);
    }

    /// Something changed for a bond: its timers are due now, the others' are not.
    pub fn poll_bond_soon(&self, now: Time, bond: &Bond) {
        self.polls.set(bond.slot, now);
    }

    /// Runs the timers of the bonds for which they are due, if no other core does; true if it did.
    pub fn poll_if_due(&self, now: Time, actions: &mut Vec<Action>) -> bool {
        if self.polls.next() > now {
            return false;
        }
        let bonds = self.bonds.load_full();
        let due = self.polls.take_due(now, bonds.list.len());
        for bond in due.iter().filter_map(|slot| bonds.get(*slot)) {
            let next = self.poll(now, bond, actions);
            self.polls.set(bond.slot, next);
        }
        !due.is_empty()
    }

    fn poll(&self, now: Time, bond: &Bond, actions: &mut Vec<Action>) -> Time {
        let mut life = lifecycle(bond);
        let mut next = now.plus_ms(1_000).min(life.poll_paths(now, bond, actions));
        if bond.current.load().is_some() {
            let (ownership, peer) = (self.ownership.load_full(), bond.peer.load_full());
            let info = || self.processor_info(&peer);
            next = next.min(life.advertise(now, bond.slot, &ownership, &peer, info, actions));
            next = next.min(life.tell_limits(now, bond.slot, actions));
        }
        if life.wants_handshake(now, bond) {
            self.start_handshake(now, bond, &mut life, actions);
        }
        if bond.dialer && life.next_attempt > now && (bond.current.load().is_none()) {
            next = next.min(life.next_attempt);
        }
        self.expire_sessions(now, bond, &mut life);
        self.end_moved(bond, &mut life);
        let deaf = self.is_deaf(now, bond, &life);
        drop(life);
        if deaf {
            self.dial_again(now, bond, actions);
        }
        next
    }

    /// Handles an authenticated control frame; frames that answer it are added to `answers`.
    pub fn on_control(
        &self,
        now: Time,
        bond: &Bond,
        path: u8,
        source: &Source,
        frame: &Frame<'_>,
        answers: &mut Vec<u8>,
    ) {
        // Unlike repeats, these go over the socket of their own path: they show where it is, also where another one was before.
        let shows_address = !bond.dialer && matches!(frame, Frame::Ping { .. } | Frame::Probe { .. });
        let elsewhere = |path: &Path| {
            let route = path.route();
            route.remote.ip() != source.remote.ip() || route.wan != source.wan
        };
        if shows_address && bond.path(path).is_some_and(|path| elsewhere(&path)) {
            self.on_moved(now, bond, path, source);
        }
        lifecycle(bond).on_control(now, bond, path, frame, answers);
        if matches!(frame, Frame::Response { .. } | Frame::ProbeAck { .. } | Frame::PathState { .. }) {
            self.poll_bond_soon(now, bond);
        }
    }

    /// Sends the answers to one datagram back to where it came from, all in one: that is no larger than the questions were.
    /// False when the peer has asked too much lately: nothing is sent.
    pub fn answer(
        &self,
        now: Time,
        bond: &Bond,
        path: u8,
        source: &Source,
        frames: Vec<u8>,
        actions: &mut Vec<Action>,
    ) -> bool {
        let may = bond.allowances.may_answer(now);
        if may {
            let route = (!bond.dialer).then(|| source.route());
            actions.push(Action::Frames { bond: bond.slot, path, route, frames, pad_to: 0 });
        }
        may
    }

    /// Takes over processor information the peer sent inside the session (row T3).
    ///
    /// # Errors
    /// `HandshakeMalformed`.
    pub fn on_processor_info(
        &self,
        now: Time,
        bond: &Bond,
        body: &[u8],
        answers: &mut Vec<u8>,
    ) -> Result<(), DropReason> {
        let info = ProcessorInfo::decode(body)?;
        let _order = lifecycle(bond);
        let known = bond.cores.load();
        // What says nothing new changes nothing: whoever repeats it makes no core look at its flows again.
        if known.as_ref().is_some_and(|known| *known.told() == info) {
            answers.extend(advertise::seen(body));
            return Ok(());
        }
        if !bond.allowances.may_change_cores(now) {
            // Not confirmed either: an honest peer says it again.
            return Err(DropReason::FrameBudget);
        }
        let takes = known.as_ref().is_some_and(|known| {
            // One that was overtaken on its way must not bring an old table back; a restart begins with a handshake.
            let age = info.table.era().wrapping_sub(known.info.table.era()).cast_signed();
            // More cores than the session has keys for need a new handshake; owners must exist either way.
            known.info.cores == info.cores && age >= 0
        });
        if takes {
            bond.cores.tell(info);
        }
        answers.extend(advertise::seen(body));
        Ok(())
    }

    /// The peer confirms processor information.
    pub fn on_processor_info_seen(&self, bond: &Bond, digest: &[u8]) {
        lifecycle(bond).advertiser.confirm(digest);
    }

    /// Takes over what the peer asks for on its paths, and confirms it.
    ///
    /// # Errors
    /// `FrameMalformed`.
    pub fn on_path_limits(
        &self,
        now: Time,
        bond: &Bond,
        body: &[u8],
        answers: &mut Vec<u8>,
    ) -> Result<(), DropReason> {
        let mut life = lifecycle(bond);
        answers.extend(life.limits.on_limits(body).ok_or(DropReason::FrameMalformed)?);
        life.apply_limits();
        self.poll_bond_soon(now, bond);
        Ok(())
    }

    /// The peer confirms path limits.
    pub fn on_path_limits_seen(&self, bond: &Bond, number: &[u8]) {
        lifecycle(bond).limits.on_seen(number);
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

/// Our core for the whole tunnel (row T6): as configured, else one of those that are for all classes, each bond in turn.
fn tunnel_core(peer: &Peer, usable: &CoreSet, of_all: &CoreSet) -> Option<u8> {
    let configured = peer.steering.tunnel_core.filter(|core| usable.contains(*core));
    let turn = usize::from(peer.id.0) % of_all.iter().count().max(1);
    configured.or_else(|| of_all.iter().nth(turn))
}

/// New keys at once where a configuration changes what they were made with.
fn rekey_for(now: Time, bond: &Bond, before: &Peer, peer: &Peer) {
    let changed = before.preshared_key != peer.preshared_key || before.encryption != peer.encryption;
    if !changed {
        return;
    }
    let mut life = lifecycle(bond);
    for session in &life.sessions {
        if session.encryption < peer.encryption {
            session.raise();
        } else {
            session.spend();
        }
    }
    // Responses to what was asked with the old ones would make the old session again.
    life.attempts.clear();
    life.next_attempt = now;
}

fn lifecycle(bond: &Bond) -> MutexGuard<'_, Lifecycle> {
    bond.lifecycle.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
