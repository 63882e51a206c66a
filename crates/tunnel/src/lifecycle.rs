//! Life cycle of a bond: handshakes and rekeys, paths that join by challenge, die and return,
//! pings, MTU probes. Everything here runs under the bond's lifecycle lock, some times a second.
//!
//! The state machine says what to send as [`Action`]s; the core that called it seals and sends them.

mod dialing;

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use steering::ownership::Ownership;

use crate::advertise::Advertiser;
use crate::bond::{Bond, PATHS_MAX};
use crate::config::Peer;
use crate::cookies::Cookies;
use crate::frame::{Frame, PeerPathState};
use crate::handshake::{Initiator, PeerGate};
use crate::hello::ProcessorInfo;
use crate::mtu::MtuSearch;
use crate::path::{LEAST_DATAGRAM_BYTES, METERED_PRICE, Path, PathState, Route};
use crate::path_limits::{LimitsExchange, PathLimits};
use crate::session::Session;
use crate::strain::{Bounds, Strain};
use crate::time::Time;

/// An unanswered challenge is repeated after this long, at first.
const CHALLENGE_MS: u64 = 200;
/// An idle path is pinged this often.
const PING_IDLE_MS: u64 = 1_000;
/// A suspect path is pinged this often.
const PING_SUSPECT_MS: u64 = 60;
/// A path that is down is pinged this often.
const PING_DOWN_MS: u64 = 250;
/// A suspect path is down after this long.
const DOWN_AFTER_MS: u64 = 1_000;
/// An idle path that answers no ping is down after this long.
const IDLE_DOWN_AFTER_MS: u64 = 3_500;
/// Pings whose answers still count; with one each 60 ms that covers round trips of almost two seconds.
const PINGS_REMEMBERED: usize = 32;
/// A path that moved this short ago moves again only when it is silent where it is for the time below: behind some NATs each of
/// the peer's sockets has an address of its own.
const MOVED_LATELY_NS: u64 = 10_000_000_000;
const SETTLED_NS: u64 = 3_000_000_000;
/// So many pongs in a row bring a path back.
const PONGS_TO_RETURN: u32 = 3;
/// A listener forgets a path that was down for this long.
const FORGET_AFTER_MS: u64 = 120_000;

/// Challenges that an address gets for each time that something came from it: as many as RFC 9000 §8.1 allows.
const ASKS_UNHEARD_MAX: u32 = 3;
/// Something the calling core must send.
#[derive(Debug)]
pub enum Action {
    /// A finished datagram: handshake messages.
    Datagram {
        /// Bond it belongs to, if known.
        bond: Option<usize>,
        /// Path whose socket to use, for a dialer.
        path: u8,
        /// Where to.
        route: Route,
        /// The datagram.
        bytes: Vec<u8>,
    },
    /// Frames to seal in a datagram of their own on the given path.
    Frames {
        /// Bond.
        bond: usize,
        /// Path.
        path: u8,
        /// Where to, if not where the path leads.
        route: Option<Route>,
        /// The frames.
        frames: Vec<u8>,
        /// Pad the datagram to this size; 0 = do not.
        pad_to: usize,
    },
}

/// One handshake we started.
pub(crate) struct Attempt {
    pub initiator: Initiator,
    pub local_index: u32,
}

/// Properties of the WAN under a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct WanUnder {
    /// It can carry the path: up, with an address of the right family (a listener does not ask).
    pub up: bool,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Largest UDP payload its interface takes.
    pub mtu_limit: u16,
    /// Limits that the peer is told.
    pub limits: PathLimits,
    /// Limits that only we keep to.
    pub bounds: Bounds,
}

/// An address that the peer may have moved to.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    route: Route,
    /// To be echoed from there.
    token: u64,
    /// Challenges since something came from there.
    unheard: u32,
}

/// Challenges that were sent in the present state.
#[derive(Clone, Copy, Debug, Default)]
struct Asks {
    count: u32,
    /// Those since something came over the path.
    unheard: u32,
}

/// Pings of one path.
#[derive(Clone, Copy, Debug, Default)]
struct Pings {
    id: u32,
    at: Time,
    /// When the last ones left, by the low bits of their id: an answer may take longer than the next ping.
    left_at: [Time; PINGS_REMEMBERED],
}

/// Life of one path.
pub(crate) struct PathLife {
    pub path: Arc<Path>,
    /// Origin of a dialer's path: WAN id, endpoint, number within the pair.
    pub origin: Option<(u16, SocketAddr, u8)>,
    /// The WAN under it.
    wan: WanUnder,
    strain: Strain,
    mtu: MtuSearch,
    token: u64,
    candidate: Option<Candidate>,
    /// When it moved to another address last.
    moved_at: Time,
    asked_at: Time,
    /// When the first challenge of this round left: its answer may answer any of them.
    first_asked_at: Time,
    asks: Asks,
    pings: Pings,
    pongs: u32,
    state_since: Time,
}

/// Path ids of one key epoch (dialer).
struct PathIds {
    used: [bool; 256],
    exhausted: bool,
}

/// All that one bond's control side remembers.
pub(crate) struct Lifecycle {
    pub attempts: VecDeque<Attempt>,
    pub next_attempt: Time,
    pub tries: u32,
    pub cookies: Cookies,
    /// Newest last.
    pub sessions: Vec<Arc<Session>>,
    pub next_number: u32,
    pub gate: PeerGate,
    pub boot_id: Option<u64>,
    /// Number of the first session with it.
    pub first_of_boot: u32,
    pub paths: Vec<PathLife>,
    ids: PathIds,
    all_down_since: Option<Time>,
    /// Advertises our cores to the peer.
    pub advertiser: Advertiser,
    /// Limits of paths that both sides tell each other.
    pub limits: LimitsExchange,
    /// Paths that were up when [`Lifecycle::choose_paths`] last chose, with their tiers, and whether we may send over them.
    up: Vec<(u8, u8, bool)>,
}

impl PathLife {
    fn new(
        path: Arc<Path>,
        origin: Option<(u16, SocketAddr, u8)>,
        wan: WanUnder,
        token: u64,
        now: Time,
    ) -> Self {
        Self {
            path,
            origin,
            mtu: MtuSearch::new(wan.mtu_limit, now),
            wan,
            strain: Strain::default(),
            token,
            candidate: None,
            moved_at: Time::ZERO,
            asked_at: Time::ZERO,
            first_asked_at: Time::ZERO,
            asks: Asks::default(),
            pings: Pings::default(),
            pongs: 0,
            state_since: now,
        }
    }

    /// Changes the state and restarts what belongs to it. Returns whether it changed.
    fn enter(&mut self, now: Time, state: PathState, reason: &'static str) -> bool {
        let Some(old) = self.path.set_state(state, reason) else { return false };
        self.state_since = now;
        self.pongs = 0;
        self.asks = Asks::default();
        if state == PathState::Up && old != PathState::Up {
            self.path.restart(now);
            // Also after mere suspicion: pings pass where large datagrams vanish, if the MTU shrank (RFC 8899 §4.3).
            // On a path that kept its MTU this costs one round trip with smaller datagrams.
            self.measure_mtu(now);
        }
        tracing::info!(path = self.path.id, from = old.name(), to = state.name(), reason, "path");
        true
    }

    /// How long a path must have been silent where it was before another address is believed.
    fn stays_ns(&self, now: Time) -> u64 {
        if now.since(self.moved_at) < MOVED_LATELY_NS { SETTLED_NS } else { 0 }
    }

    /// Sets the limits of the WAN under a listener's path.
    pub fn limit(&mut self, (limits, bounds): (PathLimits, Bounds)) {
        (self.wan.limits, self.wan.bounds) = (limits, bounds);
    }

    /// Limits that the peer is told: of a path beyond its bounds the last tier.
    fn told_limits(&self) -> PathLimits {
        PathLimits { tier: self.strain.tier(self.wan.limits.tier), ..self.wan.limits }
    }

    /// Keeps to the stricter of both ends' wishes.
    fn apply_limits(&self, exchange: &LimitsExchange) {
        let peer = exchange.of_peer(self.path.id);
        let rates = [self.wan.bounds.rate_max, peer.receive_bps.map(|bps| bps / 8)];
        let rate_max = rates.into_iter().flatten().min();
        let own = self.told_limits();
        self.path.set_limits(own.tier.max(peer.tier), rate_max);
        let metered = own.metered || peer.metered;
        self.path
            .set_price(u32::from(own.cost) + u32::from(peer.cost) + if metered { METERED_PRICE } else { 0 });
        self.path.set_may_send(!self.wan.bounds.may_not_send && !peer.closed);
    }

    fn measure_mtu(&mut self, now: Time) {
        self.path.set_datagram_bytes(LEAST_DATAGRAM_BYTES);
        self.mtu.restart(self.wan.mtu_limit, now);
    }

    fn frames(&self, bond: usize, frames: Vec<u8>) -> Action {
        Action::Frames { bond, path: self.path.id, route: None, frames, pad_to: 0 }
    }

    /// Pings when `every_ms` has passed since the last one. On a path that shall prove that it works again, with datagrams that
    /// are worth having: small ones pass where all others vanish.
    fn ping(&mut self, now: Time, every_ms: u64, bond: usize, actions: &mut Vec<Action>) {
        let proving = self.path.state() != PathState::Up;
        let pad_to = if proving { u64::from(LEAST_DATAGRAM_BYTES) } else { 0 };
        // Half of a slow path at most.
        let every_ms = every_ms.max(2 * pad_to * 1_000 / self.path.rate().max(1));
        if now.since(self.pings.at) < every_ms * 1_000_000 {
            return;
        }
        self.pings.id = self.pings.id.wrapping_add(1);
        self.pings.at = now;
        self.pings.left_at[self.pings.id as usize % PINGS_REMEMBERED] = now;
        let frames = encode(&Frame::Ping { id: self.pings.id });
        actions.push(Action::Frames {
            bond,
            path: self.path.id,
            route: None,
            frames,
            pad_to: pad_to as usize,
        });
    }

    fn poll(&mut self, now: Time, bond: usize, actions: &mut Vec<Action>) {
        if !self.wan.up {
            self.enter(now, PathState::Down, "WAN down");
            return;
        }
        match self.path.state() {
            PathState::Probing => {
                let every_ms = if self.asks.count < 20 { CHALLENGE_MS } else { 1_000 };
                if self.path.heard_at() > self.asked_at {
                    self.asks.unheard = 0;
                }
                // A dialer's address is of its configuration; a listener's came with a datagram.
                let may = self.origin.is_some() || self.asks.unheard < ASKS_UNHEARD_MAX;
                if may && (now.since(self.asked_at) >= every_ms * 1_000_000 || self.asks.count == 0) {
                    if self.asks.count == 0 {
                        self.first_asked_at = now;
                    }
                    self.asks.count += 1;
                    self.asks.unheard += 1;
                    self.asked_at = now;
                    actions.push(self.frames(
                        bond,
                        encode(&Frame::Challenge { token: self.token.to_be_bytes(), path: self.path.id }),
                    ));
                }
            }
            PathState::Up => self.poll_up(now, bond, actions),
            PathState::Suspect => {
                self.ping(now, PING_SUSPECT_MS, bond, actions);
                if self.pongs >= PONGS_TO_RETURN {
                    self.enter(now, PathState::Up, "answers again");
                } else if now.since(self.state_since) >= DOWN_AFTER_MS * 1_000_000 {
                    self.enter(now, PathState::Down, "silent");
                }
            }
            PathState::Down => {
                self.ping(now, PING_DOWN_MS, bond, actions);
                if self.pongs >= PONGS_TO_RETURN {
                    self.enter(now, PathState::Up, "answers again");
                }
            }
        }
        if let Some(candidate) = &mut self.candidate
            && candidate.unheard < ASKS_UNHEARD_MAX
            && now.since(self.asked_at) >= CHALLENGE_MS * 1_000_000
        {
            let Candidate { route, token, .. } = *candidate;
            candidate.unheard += 1;
            self.asked_at = now;
            self.asks.count += 1;
            if self.asks.count > 20 {
                self.candidate = None;
            }
            actions.push(Action::Frames {
                bond,
                path: self.path.id,
                route: Some(route),
                frames: encode(&Frame::Challenge { token: token.to_be_bytes(), path: self.path.id }),
                pad_to: 0,
            });
        }
    }

    /// An established path: alive, and how large are its datagrams?
    fn poll_up(&mut self, now: Time, bond: usize, actions: &mut Vec<Action>) {
        let silent_ns = now.since(self.path.heard_at());
        if silent_ns >= PING_IDLE_MS * 1_000_000 {
            self.ping(now, PING_IDLE_MS, bond, actions);
        }
        if silent_ns >= IDLE_DOWN_AFTER_MS * 1_000_000 {
            self.enter(now, PathState::Down, "silent");
        }
        if self.path.take_large_lost() {
            self.mtu.confirm(now);
        }
        while let Some((id, size)) = self.mtu.poll(now, self.path.rtt_us()) {
            let frames = encode(&Frame::Probe { id, size });
            let pad_to = usize::from(size);
            actions.push(Action::Frames { bond, path: self.path.id, route: None, frames, pad_to });
        }
        if usize::from(self.mtu.passes()) < self.path.datagram_bytes() {
            self.path.set_datagram_bytes(self.mtu.passes());
        }
        if self.mtu.nothing_passes() && self.path.heard_at() > self.mtu.began() {
            self.enter(now, PathState::Down, "loses all but small datagrams");
        }
    }

    /// When [`Self::poll`] has something to do at the latest.
    fn next_poll(&self, now: Time) -> Time {
        let state = match self.path.state() {
            _ if !self.wan.up => 1_000,
            PathState::Probing => CHALLENGE_MS,
            PathState::Up => PING_IDLE_MS / 2,
            PathState::Suspect => PING_SUSPECT_MS / 2,
            PathState::Down => PING_DOWN_MS,
        };
        now.plus_ms(state).min(self.mtu.next().max(now.plus_ms(5)))
    }
}

impl Lifecycle {
    /// A bond that has no session and no path yet.
    pub fn new(remote_public: &[u8; 32]) -> Self {
        Self {
            attempts: VecDeque::new(),
            next_attempt: Time::ZERO,
            tries: 0,
            cookies: Cookies::new(remote_public),
            sessions: Vec::new(),
            next_number: 1,
            gate: PeerGate::default(),
            boot_id: None,
            first_of_boot: 0,
            paths: Vec::new(),
            ids: PathIds { used: [false; 256], exhausted: false },
            all_down_since: None,
            advertiser: Advertiser::default(),
            limits: LimitsExchange::default(),
            up: Vec::new(),
        }
    }

    /// Gives a dialer's new path an id that this epoch has not used. `None` when all are used: a rekey frees them.
    pub fn free_id(&mut self) -> Option<u8> {
        let id = (0..=254u8).find(|id| !self.ids.used[usize::from(*id)]);
        match id {
            Some(id) if self.paths.len() < PATHS_MAX => {
                self.ids.used[usize::from(id)] = true;
                Some(id)
            }
            _ => {
                self.ids.exhausted = true;
                None
            }
        }
    }

    /// A new epoch: ids of paths that are gone may be used again.
    pub fn recycle_ids(&mut self) {
        self.ids = PathIds { used: [false; 256], exhausted: false };
        for life in &self.paths {
            self.ids.used[usize::from(life.path.id)] = true;
        }
    }

    /// Adds a path and shows it to all cores.
    pub fn add_path(
        &mut self,
        bond: &Bond,
        path: Path,
        origin: Option<(u16, SocketAddr, u8)>,
        wan: WanUnder,
        token: u64,
        now: Time,
    ) {
        self.paths.push(PathLife::new(Arc::new(path), origin, wan, token, now));
        self.paths.sort_by_key(|life| life.path.id);
        self.apply_limits();
        self.publish(bond);
    }

    /// Takes paths out that `keep` refuses.
    pub fn retain_paths(&mut self, bond: &Bond, keep: impl FnMut(&PathLife) -> bool) {
        let before = self.paths.len();
        self.paths.retain(keep);
        if self.paths.len() != before {
            self.publish(bond);
        }
    }

    fn publish(&self, bond: &Bond) {
        bond.paths.store(Arc::new(self.paths.iter().map(|life| Arc::clone(&life.path)).collect()));
    }

    /// A WAN under a dialer's path went down, came up or changed.
    pub fn wan_changed(&mut self, now: Time, bond: usize, id: u8, wan: &WanUnder, actions: &mut Vec<Action>) {
        let Some(life) = self.paths.iter_mut().find(|life| life.path.id == id) else { return };
        let old = std::mem::replace(&mut life.wan, wan.clone());
        if old == *wan {
            return;
        }
        life.pings.at = Time::ZERO;
        life.apply_limits(&self.limits);
        if old.mtu_limit != wan.mtu_limit {
            life.measure_mtu(now);
        }
        if wan.up && (!old.up || old.addresses != wan.addresses) {
            // Sockets of the old interface or address are stale.
            life.path.set_route(life.path.route());
        }
        if !wan.up && life.enter(now, PathState::Down, "WAN down") {
            self.tell_state(bond, id, PeerPathState::Down, actions);
        }
    }

    /// Large datagrams vanish on this path while small ones pass: its MTU shrank (RFC 8899 §4.3).
    pub fn black_hole(&mut self, now: Time, id: u8) {
        if let Some(life) = self.paths.iter_mut().find(|life| life.path.id == id) {
            life.measure_mtu(now);
        }
    }

    /// Tells the peer over every other usable path that this one went down.
    pub fn tell_state(&self, bond: usize, id: u8, state: PeerPathState, actions: &mut Vec<Action>) {
        for life in self.paths.iter().filter(|life| life.path.id != id && life.path.usable()) {
            let frames = encode(&Frame::PathState { path: id, state });
            actions.push(Action::Frames { bond, path: life.path.id, route: None, frames, pad_to: 0 });
        }
    }

    /// Tells a peer that uses a path which is gone, over one that works; it is told again while it goes on.
    pub fn tell_removed(&self, bond: usize, id: u8, actions: &mut Vec<Action>) {
        let usable = self.paths.iter().filter(|life| life.path.usable());
        if let Some(life) = usable.min_by_key(|life| (!life.path.carries(), life.path.delay_us())) {
            let frame = Frame::PathState { path: id, state: PeerPathState::Removed };
            actions.push(life.frames(bond, encode(&frame)));
        }
    }

    /// A core found that nothing comes back for what it sent on this path.
    pub fn suspect(&mut self, now: Time, bond: usize, id: u8, actions: &mut Vec<Action>) {
        if let Some(life) = self.paths.iter_mut().find(|life| life.path.id == id)
            && life.path.state() == PathState::Up
        {
            life.enter(now, PathState::Suspect, "no reports");
            life.pings.at = Time::ZERO;
            life.ping(now, 0, bond, actions);
            // Silence is mostly the same both ways: the peer need not find out by itself.
            self.tell_state(bond, id, PeerPathState::Suspect, actions);
        }
        self.choose_paths();
    }

    /// The session is gone: nothing is proven any more.
    pub fn close_paths(&mut self, now: Time, bond: &Bond) {
        if bond.dialer {
            self.challenge_all(now);
        } else {
            self.retain_paths(bond, |_| false);
        }
    }

    /// First datagrams under a new session: challenges where a path is not proven, a ping elsewhere.
    pub fn greet(&mut self, now: Time, bond: &Bond, actions: &mut Vec<Action>) {
        for life in self.paths.iter_mut().filter(|life| life.wan.up) {
            life.asks = Asks::default();
            life.pings.at = Time::ZERO;
            if life.path.state() != PathState::Probing {
                life.ping(now, 0, bond.slot, actions);
            }
        }
        self.poll_paths(now, bond, actions);
    }

    /// Every path must prove itself again: the peer restarted.
    pub fn challenge_all(&mut self, now: Time) {
        for life in self.paths.iter_mut().filter(|life| life.wan.up) {
            life.enter(now, PathState::Probing, "peer restarted");
            life.asks = Asks::default();
        }
    }

    /// Paths and roaming; returns when to come back.
    pub fn poll_paths(&mut self, now: Time, bond: &Bond, actions: &mut Vec<Action>) -> Time {
        let mut next = now.plus_ms(1_000);
        let has_session = bond.current.load().is_some();
        for life in &mut self.paths {
            if has_session || !life.wan.up {
                life.poll(now, bond.slot, actions);
            }
            if life.strain.look(now, &life.path, &life.wan.bounds) {
                life.apply_limits(&self.limits);
            }
            next = next.min(life.next_poll(now));
        }
        if !bond.dialer {
            let forgotten = |life: &PathLife| {
                matches!(life.path.state(), PathState::Down | PathState::Probing)
                    && now.since(life.state_since) >= FORGET_AFTER_MS * 1_000_000
            };
            self.retain_paths(bond, |life| !forgotten(life));
        }
        self.ask_for_keys(bond, actions);
        self.choose_paths();
        let any_up = self.paths.iter().any(|life| life.path.state() == PathState::Up);
        self.all_down_since = if any_up { None } else { self.all_down_since.or(Some(now)) };
        next
    }

    /// A listener that used up its packets asks the dialer for new keys: only the dialer starts handshakes.
    fn ask_for_keys(&self, bond: &Bond, actions: &mut Vec<Action>) {
        let spent = bond.current.load().as_ref().is_some_and(|session| session.is_spent());
        if !bond.dialer
            && spent
            && let Some(life) = self.paths.iter().find(|life| life.path.usable())
        {
            let frame = Frame::Extension { kind: crate::frame::extension::REKEY, body: &[] };
            actions.push(life.frames(bond.slot, encode(&frame)));
        }
    }

    /// Chooses the useful permutations (row T1) among the paths that are up. Paths over one WAN share its bottleneck:
    /// using several of them adds nothing but contention. So a set is chosen that covers every local WAN and
    /// every remote address once, the quickest first, and what neither adds a WAN nor an address stays on standby.
    ///
    /// The permutations of each tier are chosen for themselves, and those of the lowest tier alone carry packets. Paths that we
    /// may not send over are not among them.
    fn choose_paths(&mut self) {
        let mut up: Vec<_> =
            self.paths.iter().filter(|life| life.path.usable()).map(|life| &life.path).collect();
        let ids: Vec<(u8, u8, bool)> =
            up.iter().map(|path| (path.id, path.tier(), path.may_send())).collect();
        if ids == self.up {
            return;
        }
        // Rather against the direction of a WAN than not at all.
        let any_sends = up.iter().any(|path| path.may_send());
        let barred = |path: &Path| any_sends && !path.may_send();
        up.retain(|path| !barred(path));
        // Delays within some milliseconds are equal, so that noise does not decide and both ends pair alike.
        up.sort_by_key(|path| (path.rtt_us() / 8_000, path.id));
        let pair = |path: &Path| (path.tier(), path.route().wan, path.route().remote.ip());
        let mut chosen: Vec<(u8, u16, IpAddr)> = Vec::new();
        for both in [true, false] {
            for path in &up {
                let (tier, wan, remote) = pair(path);
                let mut of_tier = chosen.iter().filter(|(known, ..)| *known == tier);
                let wan_new = of_tier.clone().all(|(_, known, _)| *known != wan);
                let remote_new = of_tier.all(|(_, _, known)| *known != remote);
                if (wan_new && remote_new) || (!both && (wan_new || remote_new)) {
                    chosen.push((tier, wan, remote));
                }
            }
        }
        let lowest = up.iter().map(|path| path.tier()).min();
        for path in self.paths.iter().map(|life| &life.path) {
            path.choose(chosen.contains(&pair(path)) && !barred(path));
            path.prefer(lowest.is_none_or(|lowest| path.tier() <= lowest));
        }
        self.up = ids;
    }

    /// Takes over the limits of both ends for all paths.
    pub fn apply_limits(&self) {
        for life in &self.paths {
            life.apply_limits(&self.limits);
        }
    }

    /// Limits of our WANs for the peer, over the quickest path, then over one after the other; returns when to come back.
    pub fn tell_limits(&mut self, now: Time, bond: usize, actions: &mut Vec<Action>) -> Time {
        let limits = self.paths.iter().map(|life| (life.path.id, life.told_limits()));
        let wanted: Vec<_> = limits.filter(|(_, limits)| *limits != PathLimits::default()).collect();
        let mut over: Vec<_> = self.paths.iter().filter(|life| life.wan.up).map(|life| &life.path).collect();
        if over.is_empty() {
            return Time::MAX;
        }
        // Also one that is not proven yet: the peer shall know before it may use it.
        over.sort_by_key(|path| (!path.carries(), !path.usable(), path.delay_us(), path.id));
        if let Some((frames, attempt)) = self.limits.poll(now, &wanted) {
            let path = over[attempt as usize % over.len()].id;
            actions.push(Action::Frames { bond, path, route: None, frames, pad_to: 0 });
        }
        self.limits.next()
    }

    /// Advertises our cores over the quickest path, then over one after the other; returns when to come back.
    pub fn advertise(
        &mut self,
        now: Time,
        bond: usize,
        ownership: &Arc<Ownership>,
        peer: &Arc<Peer>,
        info: impl FnOnce() -> ProcessorInfo,
        actions: &mut Vec<Action>,
    ) -> Time {
        let mut usable: Vec<_> =
            self.paths.iter().map(|life| &life.path).filter(|path| path.usable()).collect();
        usable.sort_by_key(|path| (!path.carries(), path.delay_us(), path.id));
        if usable.is_empty() {
            return Time::MAX;
        }
        if let Some((frames, attempt)) = self.advertiser.poll(now, ownership, peer, info) {
            let path = usable[attempt as usize % usable.len()].id;
            actions.push(Action::Frames { bond, path, route: None, frames: frames.to_vec(), pad_to: 0 });
        }
        self.advertiser.next()
    }

    /// A control frame arrived on path `id`; the answer is added to `answers`.
    pub fn on_control(&mut self, now: Time, bond: &Bond, id: u8, frame: &Frame<'_>, answers: &mut Vec<u8>) {
        if let Frame::PathState { path, state } = *frame {
            return self.on_path_state(now, bond, path, state);
        }
        // A WAN that is not to be used answers nothing, or the peer would take the path up again.
        let Some(life) = self.paths.iter_mut().find(|life| life.path.id == id && life.wan.up) else { return };
        match *frame {
            Frame::Challenge { token, .. } => answers.extend(encode(&Frame::Response { token })),
            Frame::Ping { id } => answers.extend(encode(&Frame::Pong { id })),
            Frame::Probe { id, size } => answers.extend(encode(&Frame::ProbeAck { id, size })),
            Frame::Response { token } => life.on_response(now, u64::from_be_bytes(token)),
            Frame::Pong { id } => life.on_pong(now, id),
            Frame::ProbeAck { size, .. } => {
                let passes = life.mtu.acknowledged(now, size);
                life.path.set_datagram_bytes(passes);
            }
            // The others are the cores' own business and never come here.
            _ => {}
        }
    }

    fn on_path_state(&mut self, now: Time, bond: &Bond, id: u8, state: PeerPathState) {
        if state == PeerPathState::Removed {
            if !bond.dialer {
                self.retain_paths(bond, |life| life.path.id != id);
            }
        } else if let Some(life) = self.paths.iter_mut().find(|life| life.path.id == id) {
            match state {
                PeerPathState::Down => drop(life.enter(now, PathState::Down, "peer reports it down")),
                PeerPathState::Suspect if life.path.usable() => {
                    life.enter(now, PathState::Suspect, "peer hears nothing");
                }
                PeerPathState::Up | PeerPathState::Suspect | PeerPathState::Removed => {}
            }
        }
    }

    /// A datagram of an established path came from an address that is not the path's: it may have roamed.
    /// Bulk follows only after the new address answered a challenge.
    pub fn on_moved(&mut self, now: Time, id: u8, source: Route, token: u64) {
        if let Some(life) =
            self.paths.iter_mut().find(|life| life.path.id == id && life.path.state() == PathState::Probing)
        {
            // Nothing is proven yet that a new address could put at risk: its challenge goes there from now on.
            life.path.set_route(source);
            life.asks = Asks::default();
            return;
        }
        let Some(life) = self.paths.iter_mut().find(|life| life.path.id == id) else { return };
        if life.path.heard_within(now, life.stays_ns(now)) {
            return;
        }
        // Each of the peer's sockets may show another port: what moved is the address.
        let same = |known: &&mut Candidate| {
            known.route.wan == source.wan && known.route.remote.ip() == source.remote.ip()
        };
        if let Some(known) = life.candidate.as_mut().filter(same) {
            known.unheard = 0;
        } else {
            life.candidate = Some(Candidate { route: source, token, unheard: 0 });
            life.asks = Asks::default();
            life.asked_at = Time::ZERO;
        }
    }
}

/// A round trip in µs, 10 s at most: what took longer says nothing about the path.
fn rtt_us(took_ns: u64) -> u32 {
    u32::try_from((took_ns / 1_000).min(10_000_000)).unwrap_or(u32::MAX)
}

/// A control frame as bytes.
pub(crate) fn encode(frame: &Frame<'_>) -> Vec<u8> {
    let mut bytes = vec![0; frame.encoded_len()];
    let written = frame.write(&mut bytes, 0);
    debug_assert!(written.is_some(), "control frames have no field that could overflow");
    bytes
}

impl PathLife {
    fn on_response(&mut self, now: Time, token: u64) {
        if let Some(Candidate { route, token: expected, .. }) = self.candidate
            && token == expected
        {
            self.path.set_route(route);
            self.candidate = None;
            self.moved_at = now;
            self.enter(now, PathState::Up, "moved to a new address");
            return;
        }
        if token == self.token && self.path.state() == PathState::Probing {
            // Rather too long than too short: a path whose round trip is underestimated looks dead at once.
            // After many unanswered ones only the last can be meant.
            let asked_at = if self.asks.count > 20 { self.asked_at } else { self.first_asked_at };
            self.path.note_ping_rtt(rtt_us(now.since(asked_at)));
            self.enter(now, PathState::Up, "answered its challenge");
        }
    }

    fn on_pong(&mut self, now: Time, id: u32) {
        // Replays do not come this far; a late answer to one of the last pings counts as well.
        if self.pings.id.wrapping_sub(id) < PINGS_REMEMBERED as u32 {
            self.pongs += 1;
            self.path.note_ping_rtt(rtt_us(now.since(self.pings.left_at[id as usize % PINGS_REMEMBERED])));
        }
    }
}
