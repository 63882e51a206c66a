//! Messages between the manager of a cluster and its units (rows D1, D4–D7), and their bytes.
//!
//! They go over TCP between bus addresses, inside a bond: the peer's address says who it is, and what is said is encrypted.
//! A frame is a length, a version, a kind and a body; `docs/wire-cluster-messages.md` has every layout byte by byte.
//! A whole frame is read before anything of it is believed, and a frame claims no more memory than its bytes justify.

use std::net::IpAddr;

use steering::symmetric::FlowHasher;
use steering::table::BucketTable;
use steering::toeplitz::KEY_BYTES;
use steering::units::{Lease, Leases};

use crate::codec::CodecError;

mod frame;
#[cfg(test)]
mod tests;
mod wire;

pub use frame::{FRAME_BYTES_MAX, FrameError, Frames, VERSION};
pub(crate) use wire::{put_interface, put_pair, put_role, take_interface, take_pair, take_role};

/// TCP port of the manager on its bus address.
pub const MANAGER_PORT: u16 = 4_601;

/// Most shared interfaces of a cluster: their number has 8 bits in the encapsulation.
pub const INTERFACES_MAX: usize = 64;

/// Most addresses of a shared interface.
pub const INTERFACE_ADDRESSES_MAX: usize = 64;

/// Task of a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// It brings packets from outside to data planes and keeps nothing per flow.
    Dispatcher,
    /// It owns flows.
    DataPlane,
    /// Both.
    Both,
}

impl Role {
    /// It sends packets from outside by the table.
    #[must_use]
    pub const fn dispatches(self) -> bool {
        matches!(self, Self::Dispatcher | Self::Both)
    }

    /// It may own buckets.
    #[must_use]
    pub const fn owns_flows(self) -> bool {
        matches!(self, Self::DataPlane | Self::Both)
    }
}

/// A unit that takes part in the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Member {
    /// Its node id, below 4,096.
    pub node: u16,
    /// Its task.
    pub role: Role,
    /// Its share of the buckets, relative to the others'. 0: it drains, or it only dispatches.
    pub weight: u32,
    /// Where it is reached inside the bonds.
    pub address: IpAddr,
}

/// An interface that all units have together (row D2).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SharedInterface {
    /// Its number in the encapsulation.
    pub id: u8,
    /// It leads to the Internet: sources are translated to the outside addresses there.
    pub outside: bool,
    /// The one Ethernet address.
    pub mac: [u8; 6],
    /// Its name on every unit.
    pub name: String,
    /// The addresses with their prefix lengths.
    pub addresses: Vec<(IpAddr, u8)>,
}

/// First message of a unit, and again when it lacks an era: the manager answers with [`Message::Welcome`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Hello {
    /// Its node id.
    pub node: u16,
    /// Its task.
    pub role: Role,
    /// Its capacity.
    pub weight: u32,
    /// A number drawn when the process started: another one says that its flows are gone.
    pub instance: u64,
    /// The newest era that it holds.
    pub held: Option<u32>,
}

/// Bytes that are not for logs: a token as a unit tells it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Secret(pub [u8; 32]);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret")
    }
}

/// A unit's answer to a challenge: it has the key that it told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proof {
    /// Ed25519 signature (RFC 8032) of [`signed_bytes`].
    pub signature: [u8; 64],
    /// By which the key becomes known, if it is not yet.
    pub token: Option<Secret>,
}

/// Bytes that a unit signs: `"anabranch unit"`, the challenge, its public key.
#[must_use]
pub fn signed_bytes(challenge: &[u8; 32], key: &[u8; 32]) -> Vec<u8> {
    [&b"anabranch unit"[..], challenge, key].concat()
}

/// Step of a change that a unit has taken on all its cores.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// It holds the era's table.
    Prepared,
    /// It works by it.
    Committed,
}

/// Live flows of some neighboring buckets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LiveRun {
    /// The first bucket.
    pub first: u32,
    /// How many buckets, at least 1.
    pub buckets: u32,
    /// Flows that the unit has in each of them.
    pub flows: u32,
}

/// Figures of a unit.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Report {
    /// Era that all its cores worked by when the flows were counted.
    pub in_force: u32,
    /// Load of its busiest core in percent.
    pub load_percent: u8,
    /// Packets that it sent on to another unit because it did not have their flow, since its start.
    pub second_hops: u64,
    /// Packets that came to it, since its start.
    pub packets: u64,
    /// The unit that has copies of all its flows, but for those of the last two seconds.
    pub copied_to: Option<u16>,
    /// Live flows that were another unit's.
    pub inherited: u32,
    /// `live` tells every bucket: what it leaves out is zero. Else it tells the buckets that changed.
    pub whole: bool,
    /// By bucket, ascending.
    pub live: Vec<LiveRun>,
}

/// Everything that a member has to know.
#[derive(Clone, PartialEq, Eq)]
pub struct Whole {
    /// The unit was not a member for a while: flows that it still has are others' by now, it forgets them.
    pub fresh: bool,
    /// Key of the hash that chooses the unit. Secret.
    pub key: [u8; KEY_BYTES],
    /// Era by which packets are dispatched: one of the tables'.
    pub in_force: u32,
    /// Table of the change under way and the one before it, or only one.
    pub older: Option<BucketTable>,
    /// The newest table.
    pub newest: BucketTable,
    /// Who takes part.
    pub parts: Parts,
}

/// Parts that an era fixes beside the table.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Default)]
pub struct Parts {
    /// All units that take part, in the order in which they joined.
    pub members: Vec<Member>,
    /// The shared interfaces.
    pub interfaces: Vec<SharedInterface>,
    /// Who translates to which ports.
    pub leases: Vec<Lease>,
    /// Ports that came with another unit's flows: packets to them go to the unit, which gives them to no new flow.
    pub resting: Vec<Lease>,
    /// Who sends copies of its flows to whom.
    pub copies: Vec<Pair>,
    /// Whose flows belong to whom from this era on: the second has copies, and takes them over.
    pub heirs: Vec<Pair>,
}

/// A data plane, and the one that has copies of its flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pair {
    /// Whose flows they are.
    pub unit: u16,
    /// Who has copies.
    pub heir: u16,
}

impl Parts {
    /// The unit that gets copies of `unit`'s flows.
    #[must_use]
    pub fn backup(&self, unit: u16) -> Option<u16> {
        self.copies.iter().find(|pair| pair.unit == unit).map(|pair| pair.heir)
    }

    /// Who has which ports, whether it may give them to new flows or not.
    #[must_use]
    pub fn all_leases(&self) -> Leases {
        let all: Vec<Lease> = self.leases.iter().chain(&self.resting).copied().collect();
        Leases::new(&all)
    }
}

/// Answer to a Hello.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Welcome {
    /// The unit's node id.
    pub node: u16,
    /// It sends a heartbeat this often.
    pub heartbeat_ms: u16,
    /// The state of the cluster; `None`: it does not take part yet.
    pub whole: Option<Whole>,
}

/// Earlier owner of some neighboring buckets that leaves their chains.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Retired {
    /// The first bucket.
    pub first: u32,
    /// How many buckets, at least 1.
    pub buckets: u32,
    /// The earlier owner: it has no flow there any more.
    pub unit: u16,
}

/// Why the manager does not talk to a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Refusal {
    /// Nobody enrolled it.
    Unknown,
    /// Its node id belongs to another address, or its address to another node id.
    Identity,
    /// It was enrolled for another task.
    Role,
    /// It holds an era that the manager has not made: the manager's store is an old one.
    NewerEra,
    /// It said what cannot be said then.
    Protocol,
    /// Another manager leads.
    NotLeading,
    /// It did not prove the key that it is known by.
    Key,
    /// Its key is not known, and its token is not, or not any more.
    Token,
}

impl Refusal {
    /// The reason for people.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::Unknown => "the manager does not know this unit: enrol it with POST /v1/units",
            Self::Identity => {
                "the node id is enrolled with another bus address, or the address with another node id"
            }
            Self::Role => "the unit is enrolled with another role",
            Self::NewerEra => "the unit holds an era that the manager has not made: its store is an old copy",
            Self::Protocol => "the message does not belong here",
            Self::NotLeading => "another manager leads this cluster",
            Self::Key => {
                "the unit is known by a key, which it did not prove: give it [cluster] token-file and the key of its node"
            }
            Self::Token => {
                "the token is unknown, used or too old: ask the manager for another (anabranch cluster token)"
            }
        }
    }
}

/// One message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// Unit: who it is and what it holds.
    Hello(Hello),
    /// Unit: its public key, before its hello. The manager answers with [`Message::Challenge`].
    Identify {
        /// Ed25519.
        key: [u8; 32],
    },
    /// Unit: it has that key. The manager answers with [`Message::Admitted`].
    Proof(Box<Proof>),
    /// Unit: it lives.
    Heartbeat {
        /// Load of its busiest core in percent.
        load_percent: u8,
    },
    /// Unit: all its cores have taken the step.
    Acknowledge {
        /// The era.
        era: u32,
        /// The step.
        phase: Phase,
    },
    /// Unit: figures.
    Report(Report),
    /// Unit: it owns no bucket by the era in force and has no flow left.
    Drained {
        /// The era in force.
        era: u32,
    },
    /// Manager: the whole state.
    Welcome(Box<Welcome>),
    /// Manager: the next era.
    Prepare(Box<Prepare>),
    /// Manager: this era is in force.
    Commit {
        /// The era.
        era: u32,
    },
    /// Manager: entries of chains that end.
    Retire {
        /// The era, whose table it is.
        era: u32,
        /// The entries.
        entries: Vec<Retired>,
    },
    /// Manager: the term in which it leads, before anything else that it says. Units turn away managers of an older one.
    Term {
        /// Grows with every manager that begins to lead.
        term: u64,
    },
    /// Manager: what the unit is to sign.
    Challenge {
        /// Random, for this connection alone.
        nonce: [u8; 32],
    },
    /// Manager: the key is proved; the unit may say hello.
    Admitted,
    /// Manager: no.
    Refused(Refusal),
    /// Manager: the unit does not take part any more.
    Goodbye,
}

/// The next era.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prepare {
    /// Its table, with chains.
    pub table: BucketTable,
    /// The rest that it fixes. Who is not among the members is fenced from now on: nothing is sent to it or taken from it.
    pub parts: Parts,
}

impl Whole {
    /// The hash of the cluster's key.
    #[must_use]
    pub fn hasher(&self) -> FlowHasher {
        FlowHasher::new(self.key)
    }
}

impl std::fmt::Debug for Whole {
    /// Without the key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Whole")
            .field("fresh", &self.fresh)
            .field("in_force", &self.in_force)
            .field("older", &self.older.as_ref().map(BucketTable::era))
            .field("newest", &self.newest.era())
            .field("parts", &self.parts)
            .finish_non_exhaustive()
    }
}

impl Message {
    /// Appends the message as a frame.
    ///
    /// # Errors
    /// When it would be longer than [`FRAME_BYTES_MAX`]; nothing is appended then.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<(), FrameError> {
        frame::write(self, out)
    }

    /// Reads the body of a frame: version, kind and what follows.
    ///
    /// # Errors
    /// When it is not one whole message.
    pub fn decode(frame: &[u8]) -> Result<Self, FrameError> {
        frame::read(frame)
    }
}

impl From<CodecError> for FrameError {
    fn from(error: CodecError) -> Self {
        Self::Body(error)
    }
}
