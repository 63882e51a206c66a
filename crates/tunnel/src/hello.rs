//! Hellos: news that two sides have for each other inside the handshake (rows T2, T3, T4, T11).
//!
//! A [`Hello`] is the Noise payload of an Initiation or Response behind the copy of the header; a
//! [`ProcessorInfo`] is part of it and is sent again, alone, in a processor-info frame whenever cores change.
//!
//! Both are lists of fields `type:8 | length:16 | value`, big endian. Unknown types are skipped, so that a
//! newer peer can say more; a field twice, a wrong length or a missing duty is [`DropReason::HandshakeMalformed`].
//!
//! | type | hello field | value |
//! |---|---|---|
//! | 1 | version | 16 bits; duty |
//! | 2 | capabilities | 32 bits |
//! | 3 | ciphers | 8 bits: 1 AES-256-GCM, 2 ChaCha20-Poly1305; duty |
//! | 4 | timestamp | 64 bits, ns; duty in an Initiation |
//! | 5 | encryption | 8 bits: 0 off, 1 partial, 2 on (default) |
//! | 6 | steering mode | 8 bits, default 0 core-id |
//! | 7 | processor info | the fields below; duty |
//! | 8 | boot id | 64 bits; duty |
//! | 9 | freshness | 16 bytes, answers a challenge; in an Initiation only |
//! | 10 | accepted steering modes | 8 bits, bit n for mode n; default core-id alone |
//!
//! | type | processor field | value; M = ceil(cores / 8) bytes, core c is bit c mod 8 of byte c / 8 |
//! |---|---|---|
//! | 1 | cores | 8 bits, 1–128; duty, first |
//! | 2 | usable | M; default all |
//! | 3 | load | one byte per core, 0 idle – 255 full |
//! | 4 | reserved | (class:8, M) … |
//! | 5 | preferred | (class:8, M) … |
//! | 6 | policy | 8 bits (row T4) |
//! | 7 | flow hash key | 40 bytes; duty |
//! | 8 | bucket table | era, buckets and owners as `steering::table` encodes them; duty |
//! | 9 | flow definition | 8 bits (row T2) |
//! | 10 | tenant | 16 bits, default 0: what the peer's flows are hashed with (row R11) |
//! | 11 | tunnel core | 8 bits: the core for the whole tunnel (row T6); in mode per-tunnel |

use packet::drop_reason::DropReason;
use steering::cores::CoreSet;
use steering::policy::{CLASSES_MAX, Policy, RemoteCores};
use steering::table::BucketTable;

use crate::keys::{Encryption, FlowDefinition};
use crate::mode::{ModeSet, SteeringMode};

/// Longest encoded [`Hello`], bytes. With it every handshake message fits 1,232 bytes, the UDP payload that
/// IPv6's minimum MTU carries.
pub const HELLO_BYTES_MAX: usize = 1_000;

/// Longest encoded [`ProcessorInfo`], bytes.
pub const PROCESSOR_INFO_BYTES_MAX: usize = 940;

/// Version of the protocol inside the handshake.
pub const PROTOCOL_VERSION: u16 = 1;

/// Most cores a side can have: keys, lanes and windows are made for each core that a peer says it has.
pub const CORES_MAX: u8 = steering::ownership::CORES_MAX;

/// Most buckets of a core table that is told to a peer (128 by default).
pub const BUCKETS_MAX: usize = 1 << 10;

/// The hello or processor info does not fit its limit (too many classes or an irregular table).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("handshake information needs {needed} bytes, more than {limit}")]
pub struct TooLarge {
    /// Bytes it would take.
    pub needed: usize,
    /// Bytes it may take.
    pub limit: usize,
}

/// Processor information: a side's cores, so that the other can address the one that owns a flow (row T3).
/// Core numbers are opaque to the peer.
#[derive(Clone, PartialEq)]
pub struct ProcessorInfo {
    /// Number of cores, 1–[`CORES_MAX`].
    pub cores: u8,
    /// Cores the peer may address; at least one, all below `cores`.
    pub usable: CoreSet,
    /// Load of each core, 0 idle – 255 full; empty (not told) or `cores` entries.
    pub load: Vec<u8>,
    /// (class, cores that carry only this class), at most [`CLASSES_MAX`].
    pub reserved: Vec<(u8, CoreSet)>,
    /// (class, cores it uses while one is usable), at most [`CLASSES_MAX`].
    pub preferred: Vec<(u8, CoreSet)>,
    /// How the peer should choose a core (row T4). A number this version does not know reads as the default.
    pub policy: Policy,
    /// Definition of a flow (row T2).
    pub flow: FlowDefinition,
    /// Tenant of the peer that is told: its flows are hashed with it.
    pub tenant: u16,
    /// Core for the whole tunnel, below `cores`; told in mode per-tunnel (row T6).
    pub tunnel_core: Option<u8>,
    /// Toeplitz key of our flow hash. Secret between the two sides.
    pub flow_hash_key: [u8; 40],
    /// Which core owns which bucket; carries the era. Owners are below `cores`.
    pub table: BucketTable,
}

impl std::fmt::Debug for ProcessorInfo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ProcessorInfo")
            .field("cores", &self.cores)
            .field("usable", &self.usable)
            .field("reserved", &self.reserved)
            .field("preferred", &self.preferred)
            .field("policy", &self.policy)
            .field("flow", &self.flow)
            .field("tunnel_core", &self.tunnel_core)
            .field("era", &self.table.era())
            .finish_non_exhaustive()
    }
}

impl ProcessorInfo {
    /// The fields as in the module's table.
    ///
    /// # Errors
    /// [`TooLarge`] beyond [`PROCESSOR_INFO_BYTES_MAX`].
    pub fn encode(&self) -> Result<Vec<u8>, TooLarge> {
        let mask_bytes = usize::from(self.cores).div_ceil(8);
        let mut out = Vec::with_capacity(PROCESSOR_INFO_BYTES_MAX);
        put(&mut out, 1, &[self.cores]);
        put(&mut out, 2, &self.usable.to_bytes()[..mask_bytes]);
        put_unless_empty(&mut out, 3, &self.load);
        put_unless_empty(&mut out, 4, &classes_bytes(&self.reserved, mask_bytes));
        put_unless_empty(&mut out, 5, &classes_bytes(&self.preferred, mask_bytes));
        put(&mut out, 6, &[self.policy.to_u8()]);
        put(&mut out, 7, &self.flow_hash_key);
        put(&mut out, 8, &self.table.encode());
        put(&mut out, 9, &[self.flow.number()]);
        if self.tenant > 0 {
            put(&mut out, 10, &self.tenant.to_be_bytes());
        }
        if let Some(core) = self.tunnel_core {
            put(&mut out, 11, &[core]);
        }
        within(out, PROCESSOR_INFO_BYTES_MAX)
    }

    /// Reads and checks the fields: whatever comes back is safe to index with.
    ///
    /// # Errors
    /// `HandshakeMalformed`.
    pub fn decode(bytes: &[u8]) -> Result<Self, DropReason> {
        let fields = Fields::read(bytes, PROCESSOR_INFO_BYTES_MAX)?;
        let cores = fields.number::<1>(1)?.ok_or(MALFORMED)? as u8;
        if cores == 0 || cores > CORES_MAX {
            return Err(MALFORMED);
        }
        let usable = match fields.get(2) {
            Some(value) => mask(value, cores)?,
            None => CoreSet::first(u16::from(cores)),
        };
        let load = fields.get(3).unwrap_or_default().to_vec();
        let flow_hash_key = fields.get(7).and_then(|value| value.try_into().ok()).ok_or(MALFORMED)?;
        let flow = match fields.number::<1>(9)? {
            Some(number) => FlowDefinition::from_number(number as u8).ok_or(MALFORMED)?,
            None => FlowDefinition::default(),
        };
        let info = Self {
            cores,
            usable,
            load,
            reserved: classes(fields.get(4), cores)?,
            preferred: classes(fields.get(5), cores)?,
            policy: fields
                .number::<1>(6)?
                .and_then(|number| Policy::from_u8(number as u8))
                .unwrap_or_default(),
            flow,
            tenant: fields.number::<2>(10)?.map_or(0, |tenant| tenant as u16),
            tunnel_core: fields.number::<1>(11)?.map(|core| core as u8),
            flow_hash_key,
            table: fields
                .get(8)
                .and_then(|value| BucketTable::decode_at_most(value, BUCKETS_MAX).ok())
                .ok_or(MALFORMED)?,
        };
        if info.is_sound() { Ok(info) } else { Err(MALFORMED) }
    }

    /// Input of [`steering::policy::CoreChooser`] for the choice among these cores.
    #[must_use]
    pub fn remote_cores(&self) -> RemoteCores {
        RemoteCores {
            usable: self.usable,
            reserved: self.reserved.clone(),
            preferred: self.preferred.clone(),
            load: self.load.clone(),
        }
    }

    /// Cores that any class may use; all usable ones where each is reserved for one.
    #[must_use]
    pub fn unreserved(&self) -> CoreSet {
        let reserved = self.reserved.iter().fold(CoreSet::EMPTY, |all, (_, cores)| all.or(cores));
        let open = self.usable.without(&reserved);
        if open.is_empty() { self.usable } else { open }
    }

    fn is_sound(&self) -> bool {
        let owners = self.table.owners();
        !self.usable.is_empty()
            && self.tunnel_core.is_none_or(|core| core < self.cores)
            && (self.load.is_empty() || self.load.len() == usize::from(self.cores))
            && owners.iter().all(|owner| *owner < u16::from(self.cores))
    }
}

/// Optional parts of the protocol a side understands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capabilities(
    /// One bit per capability; unknown bits are kept and mean nothing.
    pub u32,
);

impl Capabilities {
    /// Understands Ethernet frames (frame kind 2).
    pub const ETHERNET: Self = Self(1);
    /// Keeps sealed datagrams and repeats them on a NACK.
    pub const RETRANSMIT: Self = Self(2);
    /// Accepts inner packets with a partial checksum (frame flag PARTIAL).
    pub const PARTIAL_CHECKSUM: Self = Self(4);
    /// Keeps to the limits of paths that the other side tells (extension frame path-limits).
    pub const PATH_LIMITS: Self = Self(8);
    /// Answers a freshness challenge (a cookie reply with counter 1) with [`Hello::freshness`].
    pub const FRESHNESS: Self = Self(16);
    /// Takes repair symbols (extension frame repair).
    pub const REPAIR: Self = Self(32);
    /// Says which core it gives to a flow that nothing was sent of yet (extension frame core-wanted).
    pub const CORE_WANTED: Self = Self(64);
    /// Capabilities of this version.
    pub const OURS: Self = Self::RETRANSMIT
        .with(Self::PARTIAL_CHECKSUM)
        .with(Self::PATH_LIMITS)
        .with(Self::FRESHNESS)
        .with(Self::REPAIR)
        .with(Self::CORE_WANTED);

    /// Both sets together.
    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether all of `other` are in this set.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// Bytes of the token of a freshness challenge.
pub const FRESHNESS_BYTES: usize = 16;

/// The payload of a handshake message.
#[derive(Clone, Debug, PartialEq)]
pub struct Hello {
    /// [`PROTOCOL_VERSION`] of the sender.
    pub version: u16,
    /// Optional parts of the protocol it understands.
    pub capabilities: Capabilities,
    /// Ciphers it offers, bits of [`crate::aead::Aead`]; not zero.
    pub aeads: u8,
    /// Initiation only: ns, higher than in every earlier Initiation of this key ([`crate::handshake::Timestamps`]).
    pub timestamp_ns: Option<u64>,
    /// Initiation only: token of the listener's freshness challenge, which proves that it was made after that.
    pub freshness: Option<[u8; FRESHNESS_BYTES]>,
    /// Random number of this process start: another one tells that the peer restarted and forgot everything
    /// but its keys.
    pub boot_id: u64,
    /// How it wants inner packets protected; both take the stricter wish.
    pub encryption: Encryption,
    /// How it wants its cores addressed.
    pub steering: SteeringMode,
    /// How it is willing to address the cores of the other side.
    pub accepted: ModeSet,
    /// Its cores.
    pub processor: ProcessorInfo,
}

impl Hello {
    /// The fields as in the module's table.
    ///
    /// # Errors
    /// [`TooLarge`] beyond [`HELLO_BYTES_MAX`].
    pub fn encode(&self) -> Result<Vec<u8>, TooLarge> {
        let mut out = Vec::with_capacity(HELLO_BYTES_MAX);
        put(&mut out, 1, &self.version.to_be_bytes());
        put(&mut out, 2, &self.capabilities.0.to_be_bytes());
        put(&mut out, 3, &[self.aeads]);
        if let Some(timestamp_ns) = self.timestamp_ns {
            put(&mut out, 4, &timestamp_ns.to_be_bytes());
        }
        put(&mut out, 5, &[self.encryption.number()]);
        put(&mut out, 6, &[self.steering.number()]);
        put(&mut out, 10, &[self.accepted.0]);
        put(&mut out, 7, &self.processor.encode()?);
        put(&mut out, 8, &self.boot_id.to_be_bytes());
        if let Some(freshness) = &self.freshness {
            put(&mut out, 9, freshness);
        }
        within(out, HELLO_BYTES_MAX)
    }

    /// Reads and checks the fields.
    ///
    /// # Errors
    /// `HandshakeMalformed`.
    pub fn decode(bytes: &[u8]) -> Result<Self, DropReason> {
        let fields = Fields::read(bytes, HELLO_BYTES_MAX)?;
        let version = fields.number::<2>(1)?.ok_or(MALFORMED)? as u16;
        let aeads = fields.number::<1>(3)?.ok_or(MALFORMED)? as u8;
        if version == 0 || aeads == 0 {
            return Err(MALFORMED);
        }
        let encryption = match fields.number::<1>(5)? {
            Some(number) => Encryption::from_number(number as u8).ok_or(MALFORMED)?,
            None => Encryption::default(),
        };
        let steering = match fields.number::<1>(6)? {
            Some(number) => SteeringMode::from_number(number as u8).ok_or(MALFORMED)?,
            None => SteeringMode::default(),
        };
        Ok(Self {
            version,
            capabilities: Capabilities(fields.number::<4>(2)?.unwrap_or(0) as u32),
            aeads,
            timestamp_ns: fields.number::<8>(4)?,
            freshness: match fields.get(9) {
                Some(bytes) => Some(bytes.try_into().map_err(|_| MALFORMED)?),
                None => None,
            },
            boot_id: fields.number::<8>(8)?.ok_or(MALFORMED)?,
            encryption,
            steering,
            accepted: fields.number::<1>(10)?.map_or(ModeSet::CORE_ID, |set| ModeSet(set as u8)),
            processor: ProcessorInfo::decode(fields.get(7).ok_or(MALFORMED)?)?,
        })
    }
}

const MALFORMED: DropReason = DropReason::HandshakeMalformed;

/// Highest field type that is kept while reading; higher ones are unknown in this version.
const TYPES: usize = 16;

/// The known fields of a list, by type.
struct Fields<'a>([Option<&'a [u8]>; TYPES]);

impl<'a> Fields<'a> {
    fn read(mut bytes: &'a [u8], limit: usize) -> Result<Self, DropReason> {
        if bytes.len() > limit {
            return Err(MALFORMED);
        }
        let mut fields = [None; TYPES];
        while let Some((&[kind, high, low], rest)) = bytes.split_first_chunk::<3>() {
            let length = usize::from(u16::from_be_bytes([high, low]));
            let (value, behind) = rest.split_at_checked(length).ok_or(MALFORMED)?;
            if let Some(slot) = fields.get_mut(usize::from(kind))
                && slot.replace(value).is_some()
            {
                return Err(MALFORMED);
            }
            bytes = behind;
        }
        if bytes.is_empty() { Ok(Self(fields)) } else { Err(MALFORMED) }
    }

    fn get(&self, kind: usize) -> Option<&'a [u8]> {
        self.0.get(kind).copied().flatten()
    }

    /// A number of exactly N bytes.
    fn number<const N: usize>(&self, kind: usize) -> Result<Option<u64>, DropReason> {
        let Some(value) = self.get(kind) else { return Ok(None) };
        let value = <&[u8; N]>::try_from(value).map_err(|_| MALFORMED)?;
        Ok(Some(value.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))))
    }
}

fn put(out: &mut Vec<u8>, kind: u8, value: &[u8]) {
    out.push(kind);
    // A longer value makes the whole list too long, which `within` reports.
    out.extend_from_slice(&u16::try_from(value.len()).unwrap_or(u16::MAX).to_be_bytes());
    out.extend_from_slice(value);
}

fn put_unless_empty(out: &mut Vec<u8>, kind: u8, value: &[u8]) {
    if !value.is_empty() {
        put(out, kind, value);
    }
}

fn within(out: Vec<u8>, limit: usize) -> Result<Vec<u8>, TooLarge> {
    if out.len() <= limit { Ok(out) } else { Err(TooLarge { needed: out.len(), limit }) }
}

fn classes_bytes(classes: &[(u8, CoreSet)], mask_bytes: usize) -> Vec<u8> {
    let mut out = Vec::new();
    for (class, cores) in classes.iter().take(CLASSES_MAX) {
        out.push(*class);
        out.extend_from_slice(&cores.to_bytes()[..mask_bytes]);
    }
    out
}

fn classes(value: Option<&[u8]>, cores: u8) -> Result<Vec<(u8, CoreSet)>, DropReason> {
    let entries = value.unwrap_or_default().chunks(1 + usize::from(cores).div_ceil(8));
    if entries.len() > CLASSES_MAX {
        return Err(MALFORMED);
    }
    entries
        .map(|entry| {
            let (class, cores_of_class) = entry.split_first().ok_or(MALFORMED)?;
            Ok((*class, mask(cores_of_class, cores)?))
        })
        .collect()
}

/// A mask of exactly as many bytes as `cores` need, naming no other core.
fn mask(value: &[u8], cores: u8) -> Result<CoreSet, DropReason> {
    let mut bytes = [0; 32];
    if value.len() != usize::from(cores).div_ceil(8) {
        return Err(MALFORMED);
    }
    bytes[..value.len()].copy_from_slice(value);
    let set = CoreSet::from_bytes(&bytes);
    if set.without(&CoreSet::first(u16::from(cores))).is_empty() { Ok(set) } else { Err(MALFORMED) }
}

#[cfg(test)]
#[path = "hello_tests.rs"]
pub(crate) mod tests;
