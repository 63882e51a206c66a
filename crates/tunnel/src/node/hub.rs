//! A unit of a hub: several nodes that peers know by one key and dial at one address (row R6).
//!
//! The units have the hub's private key besides their own. Indices of sessions with the hub's peers name the unit under the
//! cluster's key, so that a dispatcher brings every datagram of a session to its unit without a key of the session. A bond that
//! belongs to another unit by now asks its peer for new keys; the peer's Initiation comes to that unit, and the session here
//! stays until nothing comes by it any more: the peer has a way at every moment.

use std::net::Ipv6Addr;
use std::sync::Arc;

use arc_swap::ArcSwapOption;
use packet::attachment::BondId;
use packet::drop_reason::DropReason;
use packet::flow::FlowKey;

use super::{ControlState, Node};
use crate::bond::Bond;
use crate::handshake::{Identity, Opened, open_initiation};
use crate::index::IndexCipher;
use crate::keys::PrivateKey;
use crate::lifecycle::Lifecycle;
use crate::mac::{Admission, Guard, GuardLimits};
use crate::node::Source;
use crate::time::Time;

/// One of the keys that peers know us by, with the guard in front of it.
pub(super) struct Entrance {
    pub identity: Identity,
    pub guard: Guard,
}

impl Entrance {
    /// `seed`: its own for each entrance.
    pub fn new(identity: Identity, seed: [u8; 32]) -> Self {
        let guard = Guard::new(&identity.public(), seed, GuardLimits::default());
        Self { identity, guard }
    }
}

/// Identity of the hub that this node is a unit of.
pub(super) struct Hub {
    entrance: Entrance,
    /// Number of this unit, and the permutation of the cluster; `None`: it takes no part in one.
    place: ArcSwapOption<(u16, IndexCipher)>,
}

/// Bond of a peer of the hub, as it stands at this unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HubBond {
    /// The bond.
    pub id: BondId,
    /// The peer's public key.
    pub public_key: [u8; 32],
    /// This unit has a session with the peer.
    pub in_session: bool,
}

impl HubBond {
    /// The bond among flows: by its bucket it has a unit.
    #[must_use]
    pub fn flow_key(&self) -> FlowKey {
        flow_key_of(&self.public_key)
    }
}

/// A peer's bond among flows: its public key as two addresses, without ports and protocol.
#[must_use]
pub fn flow_key_of(public_key: &[u8; 32]) -> FlowKey {
    let bits = public_key.map(u128::from);
    let address =
        |bytes: &[u128]| Ipv6Addr::from_bits(bytes.iter().fold(0, |all, byte| all << 8 | byte)).into();
    let (src, dst) = bits.split_at(16);
    FlowKey { src: address(src), dst: address(dst), src_port: 0, dst_port: 0, protocol: 0 }
}

impl Hub {
    pub fn new(key: PrivateKey, seed: [u8; 32]) -> Self {
        let identity = Identity::new(key);
        // Nonces of two guards with one seed would repeat.
        let mut own = ring::digest::Context::new(&ring::digest::SHA256);
        own.update(b"anabranch hub");
        own.update(&seed);
        let mut guard_seed = [0; 32];
        guard_seed.copy_from_slice(own.finish().as_ref());
        Self { entrance: Entrance::new(identity, guard_seed), place: ArcSwapOption::empty() }
    }
}

impl Node {
    /// This node is unit `place.0` of a cluster that names units in receiver indices by `place.1`; `None`: it is in none any more.
    pub fn join_hub(&self, place: Option<(u16, IndexCipher)>) {
        if let Some(hub) = &self.hub {
            hub.place.store(place.map(Arc::new));
        }
    }

    /// Public key of the hub that this node is a unit of.
    #[must_use]
    pub fn hub_public_key(&self) -> Option<[u8; 32]> {
        self.hub.as_ref().map(|hub| hub.entrance.identity.public())
    }

    /// The peer of the hub that made an Initiation. Costs two Diffie-Hellman operations: the caller keeps a budget.
    ///
    /// # Errors
    /// As [`open_initiation`]; `HandshakeUnknownPeer`.
    pub fn hub_initiator(&self, datagram: &[u8]) -> Result<[u8; 32], DropReason> {
        let hub = self.hub.as_ref().ok_or(DropReason::HandshakeUnknownPeer)?;
        let key = open_initiation(&hub.entrance.identity, datagram)?.remote_static;
        let known =
            self.bonds.load().iter().any(|bond| is_of_hub(bond, true) && bond.peer.load().public_key == key);
        if known { Ok(key) } else { Err(DropReason::HandshakeUnknownPeer) }
    }

    /// Bonds of the hub's peers.
    #[must_use]
    pub fn hub_bonds(&self) -> Vec<HubBond> {
        let bonds = self.bonds.load();
        let of_hub = bonds.iter().filter(|bond| is_of_hub(bond, true));
        let bond = |bond: &Arc<Bond>| {
            let peer = bond.peer.load();
            HubBond { id: peer.id, public_key: peer.public_key, in_session: bond.current.load().is_some() }
        };
        of_hub.map(bond).collect()
    }

    /// Whether packets for a bond can be sealed here.
    #[must_use]
    pub fn in_session(&self, id: BondId) -> bool {
        let bonds = self.bonds.load();
        bonds.slot(id).and_then(|slot| bonds.get(slot)).is_some_and(|bond| bond.current.load().is_some())
    }

    /// Asks the hub's peers for new keys whose bond belongs to another unit: `stays` tells by the public key.
    pub fn move_hub_bonds(&self, stays: impl Fn(&[u8; 32]) -> bool) {
        let bonds = self.bonds.load();
        for bond in bonds.iter().filter(|bond| is_of_hub(bond, true)) {
            if let Some(session) = &*bond.current.load()
                && !session.is_spent()
                && !stays(&bond.peer.load().public_key)
            {
                tracing::info!(peer = bond.peer.load().name, "the bond moves to another unit");
                session.spend();
                // The next core that looks asks the peer.
                self.poll_soon(Time::ZERO);
            }
        }
    }

    /// Whether a session with a peer of the hub that has moved is silent: it ends.
    pub(super) fn end_moved(&self, bond: &Bond, life: &mut Lifecycle) {
        let spent = bond.current.load().as_ref().is_some_and(|session| session.is_spent());
        if spent && is_of_hub(bond, true) && !bond.paths.load().iter().any(|path| path.usable()) {
            tracing::info!(peer = bond.peer.load().name, "the bond has moved");
            self.drop_sessions(life);
            bond.current.store(None);
            life.close_paths(Time::ZERO, bond);
        }
    }

    /// Judges an Initiation; whom it was made for: this node, or (true) the hub.
    pub(super) fn admit_initiation(
        &self,
        now: Time,
        source: &Source,
        datagram: &[u8],
    ) -> (Admission, &Identity, bool) {
        let own = self.own.guard.admit(now, source.remote, datagram);
        match (own, &self.hub) {
            (Admission::Drop(DropReason::HandshakeMac), Some(hub)) => {
                (hub.entrance.guard.admit(now, source.remote, datagram), &hub.entrance.identity, true)
            }
            (own, _) => (own, &self.own.identity, false),
        }
    }

    /// An index for a session with a peer, of the hub's or this node's own.
    ///
    /// # Errors
    /// `UnitUnknown`: of the hub's, and this node takes no part in the cluster.
    pub(super) fn index_for(&self, control: &mut ControlState, of_hub: bool) -> Result<u32, DropReason> {
        if !of_hub {
            return Ok(self.next_index(control));
        }
        let place = self.hub.as_ref().and_then(|hub| hub.place.load_full());
        let place = place.ok_or(DropReason::UnitUnknown)?;
        Ok(self.next_index_of(control, place.0, &place.1))
    }

    /// Whether an opened Initiation may make this bond's session: its peer is of the identity that it dialled.
    pub(super) fn dialled_right(&self, bond: &Bond, opened: &Opened, of_hub: bool) -> bool {
        bond.peer.load().public_key == opened.remote_static && is_of_hub(bond, of_hub)
    }
}

fn is_of_hub(bond: &Bond, wanted: bool) -> bool {
    bond.peer.load().hub == wanted
}
