//! One key epoch of a bond: what a completed handshake leaves behind.
//!
//! A [`Session`] is immutable but for two flags, so every core may read it without a lock. Counters and
//! replay windows live with the cores, one set per lane.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use crate::aead::{Aead, LaneKey};
use crate::header::NOT_TOLD;
use crate::header_seal::HeaderKey;
use crate::keys::Encryption;
use crate::mode::SteeringMode;
use crate::time::Time;

/// A session is renewed after this long, unless the node is told to do it sooner.
pub const REKEY_AFTER_MS: u64 = 120_000;
/// A session is refused after this long.
pub const REJECT_AFTER_MS: u64 = 180_000;
/// A session is renewed after this many packets of one core (AES-GCM limit with a wide margin).
pub const REKEY_AFTER_PACKETS: u64 = 1 << 27;
/// No packet is sealed with a counter at or above this; the rekey above comes long before.
pub const REJECT_AFTER_PACKETS: u64 = 1 << 40;

/// Keys and indices of one epoch between this node and one peer.
pub struct Session {
    /// Number of the session within its bond, from 1.
    pub number: u32,
    /// Slot of the bond it belongs to.
    pub bond: usize,
    /// The index peers put in datagrams to us.
    pub local_index: u32,
    /// The index we put in datagrams to the peer.
    pub remote_index: u32,
    /// Cipher of this session.
    pub aead: Aead,
    /// How inner packets are protected: the stricter of both sides' wishes (row T11).
    pub encryption: Encryption,
    /// How the peer addresses our cores: as we wanted (rows T4–T9).
    pub receives: SteeringMode,
    /// How we address the peer's cores: as it wanted.
    pub sends: SteeringMode,
    /// Cores of the peer: valid sending cores are below it.
    pub peer_cores: u8,
    /// The peer takes repair symbols.
    pub takes_repair: bool,
    /// The peer says which cores it gives to flows before they begin (row T5).
    pub says_cores: bool,
    /// When it was established.
    pub established: Time,
    /// It is renewed after this long.
    rekey_after_ms: u64,
    life: Life,
    keys: Keys,
}

/// Keys by sending core.
struct Keys {
    seal: Vec<LaneKey>,
    open: Vec<LaneKey>,
    /// Of headers; empty where the mode seals none (row T7).
    seal_header: Vec<HeaderKey>,
    open_header: Vec<HeaderKey>,
}

/// Events in the life of a session.
#[derive(Debug, Default)]
struct Life {
    /// The peer proved that it holds the keys.
    confirmed: AtomicBool,
    /// Some core used up its packets: renew now.
    spent: AtomicBool,
    /// The configuration wants more encryption than was agreed on.
    raised: AtomicBool,
}

/// The two direction keys of the handshake and what goes with them.
pub struct Epoch<'a> {
    /// Number within the bond.
    pub number: u32,
    /// Slot of the bond.
    pub bond: usize,
    /// Our index.
    pub local_index: u32,
    /// The peer's index.
    pub remote_index: u32,
    /// Agreed cipher.
    pub aead: Aead,
    /// Agreed protection of inner packets.
    pub encryption: Encryption,
    /// How the peer addresses our cores.
    pub receives: SteeringMode,
    /// How we address the peer's cores.
    pub sends: SteeringMode,
    /// Key for what we send.
    pub send_key: &'a [u8; 32],
    /// Key for what we receive.
    pub receive_key: &'a [u8; 32],
    /// Our cores.
    pub own_cores: u8,
    /// The peer's cores.
    pub peer_cores: u8,
    /// The peer takes repair symbols.
    pub takes_repair: bool,
    /// The peer says which cores it gives to flows before they begin (row T5).
    pub says_cores: bool,
    /// Renewed after this long, ms.
    pub rekey_after_ms: u64,
    /// Whether we started the handshake: the initiator holds a confirmed session at once.
    pub initiator: bool,
}

impl Session {
    /// Derives every lane key of the epoch: one per sending core and direction.
    pub fn new(epoch: &Epoch<'_>, now: Time) -> Self {
        let keys = |key: &[u8; 32], cores: u8| {
            (0..cores).map(|core| LaneKey::derive(key, core, epoch.aead)).collect()
        };
        let header_keys = |mode: SteeringMode, key: &[u8; 32], cores: u8| {
            let cores = if mode == SteeringMode::SealedHeader { cores } else { 0 };
            (0..cores).map(|core| HeaderKey::derive(key, core, epoch.aead)).collect()
        };
        Self {
            number: epoch.number,
            bond: epoch.bond,
            local_index: epoch.local_index,
            remote_index: epoch.remote_index,
            aead: epoch.aead,
            encryption: epoch.encryption,
            receives: epoch.receives,
            sends: epoch.sends,
            peer_cores: epoch.peer_cores,
            takes_repair: epoch.takes_repair,
            says_cores: epoch.says_cores,
            established: now,
            rekey_after_ms: epoch.rekey_after_ms,
            life: Life { confirmed: AtomicBool::new(epoch.initiator), ..Life::default() },
            keys: Keys {
                seal: keys(epoch.send_key, epoch.own_cores),
                open: keys(epoch.receive_key, epoch.peer_cores),
                seal_header: header_keys(epoch.sends, epoch.send_key, epoch.own_cores),
                open_header: header_keys(epoch.receives, epoch.receive_key, epoch.peer_cores),
            },
        }
    }

    /// The peer's core that reads what our core `own` sends to `core`: where none is named, that which stands for our core.
    pub const fn reader(&self, own: u8, core: u8) -> u8 {
        if core == NOT_TOLD && self.peer_cores > 0 { own % self.peer_cores } else { core }
    }

    /// As [`Self::reader`] for datagrams with inner packets, whose 4-tuple goes by it: where their headers are sealed, one for each core
    /// would tell what they do not.
    pub fn reader_of_packets(&self, own: u8, core: u8) -> u8 {
        let sealed = !self.keys.seal_header.is_empty() && self.encryption == Encryption::On;
        self.reader(own, if sealed { NOT_TOLD } else { core })
    }

    /// Our cores.
    pub fn own_cores(&self) -> u8 {
        u8::try_from(self.keys.seal.len()).unwrap_or(u8::MAX)
    }

    /// Whether the peer's datagrams may have a clear part: with partial encryption, or with a session-ID there.
    pub fn may_be_partial(&self) -> bool {
        self.encryption == Encryption::Partial
            || (self.encryption == Encryption::On && self.receives == SteeringMode::SessionId)
    }

    /// Key for datagrams that our core `core` sends.
    pub fn seal_key(&self, core: u8) -> Option<&LaneKey> {
        self.keys.seal.get(usize::from(core))
    }

    /// Key for the headers of datagrams with inner packets that our core `core` sends; `None` where they are clear.
    pub fn header_seal_key(&self, core: u8) -> Option<&HeaderKey> {
        self.keys.seal_header.get(usize::from(core))
    }

    /// Key for the headers that the peer's core `core` sends; `None` where they are clear.
    pub fn header_open_key(&self, core: u8) -> Option<&HeaderKey> {
        self.keys.open_header.get(usize::from(core))
    }

    /// Key for datagrams that the peer's core `core` sends.
    pub fn open_key(&self, core: u8) -> Option<&LaneKey> {
        self.keys.open.get(usize::from(core))
    }

    /// Notes the first authenticated datagram; true for the call that confirmed it.
    pub fn confirm(&self) -> bool {
        !self.life.confirmed.load(Relaxed) && !self.life.confirmed.swap(true, Relaxed)
    }

    /// Whether the peer proved that it holds the keys.
    pub fn is_confirmed(&self) -> bool {
        self.life.confirmed.load(Relaxed)
    }

    /// The configuration wants more encryption than was agreed on: from now on nothing is sent in the clear, and nothing that
    /// came so is taken, while new keys are asked for.
    pub fn raise(&self) {
        self.life.raised.store(true, Relaxed);
        self.spend();
    }

    /// Whether nothing in the clear is sent or taken any more.
    pub fn is_raised(&self) -> bool {
        self.life.raised.load(Relaxed)
    }

    /// Asks for new keys.
    pub fn spend(&self) {
        self.life.spent.store(true, Relaxed);
    }

    /// Whether some core used up its packets.
    pub fn is_spent(&self) -> bool {
        self.life.spent.load(Relaxed)
    }

    /// Whether it is time for new keys.
    pub fn wants_rekey(&self, now: Time) -> bool {
        self.life.spent.load(Relaxed) || now.since(self.established) >= self.rekey_after_ms * 1_000_000
    }

    /// Whether it must not be used any more.
    pub fn expired(&self, now: Time) -> bool {
        now.since(self.established) >= REJECT_AFTER_MS * 1_000_000
    }
}
