//! State that outlives a restart of the manager, and its bytes.
//!
//! The bytes are the store's only: a version first, then the fields as in the messages. They are written before anything
//! that follows from them is sent, so a manager that starts with them can go on wherever the one before stood.

use std::collections::BTreeMap;
use std::net::IpAddr;

use steering::table::BucketTable;
use steering::toeplitz::KEY_BYTES;
use steering::units::{LEASE_PORTS, Lease};

use super::command::{Command, Step};
use super::enrol::Token;
use crate::codec::{CodecError, Reader, Writer};
use crate::message::{
    Member, Pair, Parts, Role, SharedInterface, put_interface, put_pair, put_role, take_interface, take_pair,
    take_role,
};

/// Version of the bytes. Those of version 2 lack keys and tokens, those of version 1 what belongs to copies of flows too; they are read
/// as well.
const VERSION: u8 = 3;

/// Blocks of one address; the first is never leased.
pub const BLOCKS: u8 = ((1u32 << 16) / LEASE_PORTS as u32) as u8;

/// Normal value of [`UnitRecord::share_permille`].
pub const SHARE_NORMAL: u16 = 1_000;

/// Standing of a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Standing {
    /// Enrolled, and takes no part.
    Free,
    /// Takes part.
    Active,
    /// Owns nothing and keeps its flows until they end.
    Draining {
        /// It is removed when nothing is left.
        remove: bool,
    },
    /// It died while it took part, and takes part again when it is back.
    Lost,
}

impl Standing {
    /// Whether the unit takes part in eras.
    #[must_use]
    pub const fn takes_part(self) -> bool {
        matches!(self, Self::Active | Self::Draining { .. })
    }
}

/// A unit that was enrolled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct UnitRecord {
    /// Its bus address.
    pub address: IpAddr,
    /// Its task.
    pub role: Role,
    /// Its capacity relative to the others'; 0 for one that only dispatches.
    pub weight: u32,
    /// Part of its capacity that it is given, in thousandths: below 1,000 after it was loaded more than others.
    pub share_permille: u16,
    /// Its standing.
    pub standing: Standing,
    /// Place in the order in which units joined.
    pub joined: u64,
    /// The process that joined: another one has none of its flows.
    pub instance: u64,
    /// It has to forget the flows that it has when it joins: they were others' in between.
    pub forget: bool,
    /// While it drains: its flows go to another unit, and it does not wait for their end.
    pub migrate: bool,
}

/// A block of ports that cannot be leased to anybody else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Block {
    /// The outside address.
    pub address: IpAddr,
    /// 1 to 63.
    pub block: u8,
    /// Who has it; `None`: nobody, and flows of a unit that died may still be known to somebody outside.
    pub node: Option<u16>,
    /// It came with another unit's flows: no new flow gets one of its ports until the last of them has ended.
    pub resting: bool,
}

/// A unit whose flows another one takes over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Inheritance {
    /// Whose flows, and who takes them over.
    pub pair: Pair,
    /// The newest era says so; until then it is the next one that will.
    pub planned: bool,
}

/// The change under way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Table of the next era.
    pub table: BucketTable,
    /// All units have it: it comes into force, and there is no way back.
    pub committing: bool,
}

/// A command that was accepted and not carried out yet.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Accepted {
    /// Its number, which grows.
    pub number: u64,
    /// The wish.
    pub command: Command,
}

/// All that must survive.
#[derive(Clone, PartialEq, Eq)]
pub struct State {
    /// The cluster's key.
    pub key: [u8; KEY_BYTES],
    /// Units by node id.
    pub units: BTreeMap<u16, UnitRecord>,
    /// The shared interfaces.
    pub interfaces: Vec<SharedInterface>,
    /// Addresses that sources are translated to.
    pub outside: Vec<IpAddr>,
    /// Blocks that are taken, ascending.
    pub blocks: Vec<Block>,
    /// The table in force; `None` before the first data plane was added.
    pub table: Option<BucketTable>,
    /// The next one.
    pub change: Option<Change>,
    /// Commands that wait.
    pub accepted: Vec<Accepted>,
    /// A unit died and the era that leaves it out has not been planned.
    pub fence: bool,
    /// Number of the next command, and of the next unit that joins.
    pub next_number: u64,
    /// Who sends copies of its flows to whom, by unit.
    pub copies: Vec<Pair>,
    /// Units whose flows others take over, with the newest era or the next.
    pub heirs: Vec<Inheritance>,
    /// Public keys that units have to prove, by node id.
    pub keys: BTreeMap<u16, [u8; 32]>,
    /// Tokens that nobody has used.
    pub tokens: Vec<Token>,
}

impl State {
    /// A cluster without units.
    #[must_use]
    pub fn new(key: [u8; KEY_BYTES]) -> Self {
        Self {
            key,
            units: BTreeMap::new(),
            interfaces: Vec::new(),
            outside: Vec::new(),
            blocks: Vec::new(),
            table: None,
            change: None,
            accepted: Vec::new(),
            fence: false,
            next_number: 1,
            copies: Vec::new(),
            heirs: Vec::new(),
            keys: BTreeMap::new(),
            tokens: Vec::new(),
        }
    }

    /// The newest table: of the change under way, or in force.
    #[must_use]
    pub fn newest(&self) -> Option<&BucketTable> {
        self.change.as_ref().map(|change| &change.table).or(self.table.as_ref())
    }

    /// A number that was not given before.
    pub fn number(&mut self) -> u64 {
        let number = self.next_number;
        self.next_number += 1;
        number
    }

    /// Node ids of those who take part.
    pub fn participants(&self) -> impl Iterator<Item = u16> + '_ {
        self.units.iter().filter(|(_, unit)| unit.standing.takes_part()).map(|(node, _)| *node)
    }

    /// Parts that the newest era fixes beside the table.
    #[must_use]
    pub fn parts(&self) -> Parts {
        let mut units: Vec<_> = self.units.iter().filter(|(_, unit)| unit.standing.takes_part()).collect();
        units.sort_by_key(|(node, unit)| (unit.joined, **node));
        let member = |(node, unit): (&u16, &UnitRecord)| {
            let weight = if unit.standing == Standing::Active { unit.weight } else { 0 };
            Member { node: *node, role: unit.role, weight, address: unit.address }
        };
        let lease =
            |block: &Block| block.node.map(|node| Lease { address: block.address, block: block.block, node });
        let leases = |resting| {
            let blocks = self.blocks.iter().filter(move |block| block.resting == resting);
            blocks.filter_map(lease).collect()
        };
        let heirs = self.heirs.iter().filter(|inheritance| inheritance.planned);
        Parts {
            members: units.into_iter().map(member).collect(),
            interfaces: self.interfaces.clone(),
            leases: leases(false),
            resting: leases(true),
            copies: self.copies.clone(),
            heirs: heirs.map(|inheritance| inheritance.pair).collect(),
        }
    }

    /// The bytes for the store.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut out = Writer::new(&mut bytes);
        out.u8(VERSION);
        out.bytes(&self.key);
        out.u64(self.next_number);
        out.u8(u8::from(self.fence));
        let units: Vec<_> = self.units.iter().collect();
        out.list(&units, |out, (node, unit)| {
            out.u16(**node);
            put_unit(out, unit);
        });
        out.list(&self.interfaces, put_interface);
        out.list(&self.outside, |out, address| out.address(*address));
        out.list(&self.blocks, |out, block| {
            out.address(block.address);
            out.u8(block.block);
            put_option(out, block.node, |out, node| out.u16(node));
            out.u8(u8::from(block.resting));
        });
        put_option(&mut out, self.table.as_ref(), |out, table| out.table(table));
        put_option(&mut out, self.change.as_ref(), |out, change| {
            out.table(&change.table);
            out.u8(u8::from(change.committing));
        });
        out.list(&self.accepted, |out, accepted| {
            out.u64(accepted.number);
            put_command(out, &accepted.command);
        });
        out.list(&self.copies, put_pair);
        out.list(&self.heirs, |out, inheritance| {
            put_pair(out, &inheritance.pair);
            out.u8(u8::from(inheritance.planned));
        });
        let keys: Vec<_> = self.keys.iter().collect();
        out.list(&keys, |out, (node, key)| {
            out.u16(**node);
            out.bytes(*key);
        });
        out.list(&self.tokens, put_token);
        bytes
    }

    /// Reads the bytes of the store.
    ///
    /// # Errors
    /// When they are not a whole state of this version.
    pub fn decode(bytes: &[u8]) -> Result<Self, CodecError> {
        let mut from = Reader::new(bytes);
        let (with_copies, with_keys) = match from.u8("version of the state")? {
            VERSION => (true, true),
            2 => (true, false),
            1 => (false, false),
            other => return Err(CodecError::Value("version of the state", other.into())),
        };
        let key = from.array("key")?;
        let next_number = from.u64("next number")?;
        let fence = from.flag("fence")?;
        let units = from.list("units", |from| Ok((from.node("node")?, take_unit(from, with_copies)?)))?;
        let interfaces = from.list("interfaces", take_interface)?;
        let outside = from.list("outside addresses", |from| from.address("outside address"))?;
        let blocks = from.list("blocks", |from| take_block(from, with_copies))?;
        let table = take_option(&mut from, Reader::table)?;
        let change = take_option(&mut from, |from| {
            Ok(Change { table: from.table()?, committing: from.flag("committing")? })
        })?;
        let accepted = from.list("commands", |from| {
            let number = from.u64("number of a command")?;
            Ok(Accepted { number, command: take_command(from, with_copies)? })
        })?;
        let (copies, heirs) = if with_copies {
            (from.list("copies", take_pair)?, from.list("heirs", take_inheritance)?)
        } else {
            (Vec::new(), Vec::new())
        };
        let (keys, tokens) = if with_keys {
            let keys = from.list("keys", |from| Ok((from.node("node")?, from.array("key")?)))?;
            (keys, from.list("tokens", take_token)?)
        } else {
            (Vec::new(), Vec::new())
        };
        from.end()?;
        let state = Self {
            keys: keys.into_iter().collect(),
            tokens,
            key,
            units: units.into_iter().collect(),
            interfaces,
            outside,
            blocks,
            table,
            change,
            accepted,
            fence,
            next_number,
            copies,
            heirs,
        };
        state.check()
    }

    /// A change leads from the table in force to the next era.
    fn check(self) -> Result<Self, CodecError> {
        if let (Some(table), Some(change)) = (&self.table, &self.change) {
            let next = table.era().wrapping_add(1);
            if change.table.era() != next || change.table.buckets() != table.buckets() {
                return Err(CodecError::Value("era of the change", change.table.era().into()));
            }
        }
        Ok(self)
    }
}

impl std::fmt::Debug for State {
    /// Without the key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State")
            .field("units", &self.units)
            .field("blocks", &self.blocks.len())
            .field("era", &self.table.as_ref().map(BucketTable::era))
            .field("change", &self.change.as_ref().map(|change| (change.table.era(), change.committing)))
            .field("accepted", &self.accepted)
            .finish_non_exhaustive()
    }
}

fn put_option<T>(out: &mut Writer<'_>, value: Option<T>, put: impl FnOnce(&mut Writer<'_>, T)) {
    out.u8(u8::from(value.is_some()));
    if let Some(value) = value {
        put(out, value);
    }
}

fn take_option<'a, T>(
    from: &mut Reader<'a>,
    take: impl FnOnce(&mut Reader<'a>) -> Result<T, CodecError>,
) -> Result<Option<T>, CodecError> {
    if from.flag("whether it is there")? { take(from).map(Some) } else { Ok(None) }
}

fn put_unit(out: &mut Writer<'_>, unit: &UnitRecord) {
    out.address(unit.address);
    put_role(out, unit.role);
    out.u32(unit.weight);
    out.u16(unit.share_permille);
    out.u8(match unit.standing {
        Standing::Free => 0,
        Standing::Active => 1,
        Standing::Draining { remove: false } => 2,
        Standing::Draining { remove: true } => 3,
        Standing::Lost => 4,
    });
    out.u64(unit.joined);
    out.u64(unit.instance);
    out.u8(u8::from(unit.forget));
    out.u8(u8::from(unit.migrate));
}

fn put_token(out: &mut Writer<'_>, token: &Token) {
    out.bytes(&token.digest);
    out.u16(token.node);
    put_role(out, token.role);
    put_option(out, token.weight, |out, weight| out.u32(weight));
    out.u64(token.ends_s);
}

fn take_token(from: &mut Reader<'_>) -> Result<Token, CodecError> {
    Ok(Token {
        digest: from.array("digest of a token")?,
        node: from.node("node")?,
        role: take_role(from)?,
        weight: take_option(from, |from| from.u32("weight"))?,
        ends_s: from.u64("end of a token")?,
    })
}

fn take_inheritance(from: &mut Reader<'_>) -> Result<Inheritance, CodecError> {
    Ok(Inheritance { pair: take_pair(from)?, planned: from.flag("planned")? })
}

fn take_unit(from: &mut Reader<'_>, with_copies: bool) -> Result<UnitRecord, CodecError> {
    Ok(UnitRecord {
        address: from.address("bus address")?,
        role: take_role(from)?,
        weight: from.u32("weight")?,
        share_permille: from.u16("share")?,
        standing: match from.u8("standing")? {
            0 => Standing::Free,
            1 => Standing::Active,
            2 => Standing::Draining { remove: false },
            3 => Standing::Draining { remove: true },
            4 => Standing::Lost,
            other => return Err(CodecError::Value("standing", other.into())),
        },
        joined: from.u64("order of joining")?,
        instance: from.u64("instance")?,
        forget: from.flag("forget")?,
        migrate: with_copies && from.flag("migrate")?,
    })
}

fn take_block(from: &mut Reader<'_>, with_copies: bool) -> Result<Block, CodecError> {
    let address = from.address("outside address")?;
    let block = from.u8("block")?;
    if block == 0 || block >= BLOCKS {
        return Err(CodecError::Value("block", block.into()));
    }
    let node = take_option(from, |from| from.node("node"))?;
    Ok(Block { address, block, node, resting: with_copies && from.flag("resting")? })
}

fn put_command(out: &mut Writer<'_>, command: &Command) {
    match command {
        Command::Change(steps) => {
            out.u8(0);
            out.list(steps, put_step);
        }
        Command::Configure { interfaces, outside } => {
            out.u8(1);
            out.list(interfaces, put_interface);
            out.list(outside, |out, address| out.address(*address));
        }
    }
}

fn take_command(from: &mut Reader<'_>, with_copies: bool) -> Result<Command, CodecError> {
    match from.u8("command")? {
        0 => Ok(Command::Change(from.list("steps", |from| take_step(from, with_copies))?)),
        1 => {
            let interfaces = from.list("interfaces", take_interface)?;
            let outside = from.list("outside addresses", |from| from.address("outside address"))?;
            Ok(Command::Configure { interfaces, outside })
        }
        other => Err(CodecError::Value("command", other.into())),
    }
}

fn put_step(out: &mut Writer<'_>, step: &Step) {
    let (number, node) = match step {
        Step::Add { node, .. } => (0, node),
        Step::Drain { node, .. } => (1, node),
        Step::Remove { node, .. } => (2, node),
        Step::Weight { node, .. } => (3, node),
    };
    out.u8(number);
    out.u16(*node);
    match step {
        Step::Add { enrol, weight, .. } => {
            put_option(out, enrol.as_ref(), |out, (address, role)| {
                out.address(*address);
                put_role(out, *role);
            });
            put_option(out, *weight, |out, weight| out.u32(weight));
        }
        Step::Drain { remove, migrate, .. } => {
            out.u8(u8::from(*remove));
            out.u8(u8::from(*migrate));
        }
        Step::Remove { force, .. } => out.u8(u8::from(*force)),
        Step::Weight { weight, .. } => out.u32(*weight),
    }
}

fn take_step(from: &mut Reader<'_>, with_copies: bool) -> Result<Step, CodecError> {
    let number = from.u8("step")?;
    let node = from.node("node")?;
    Ok(match number {
        0 => {
            let enrol = take_option(from, |from| Ok((from.address("bus address")?, take_role(from)?)))?;
            Step::Add { node, enrol, weight: take_option(from, |from| from.u32("weight"))? }
        }
        1 => {
            let remove = from.flag("remove")?;
            Step::Drain { node, remove, migrate: with_copies && from.flag("migrate")? }
        }
        2 => Step::Remove { node, force: from.flag("force")? },
        3 => Step::Weight { node, weight: from.u32("weight")? },
        other => return Err(CodecError::Value("step", other.into())),
    })
}
