//! Bodies of the messages, field by field; the page `docs/wire-cluster-messages.md` shows the same.

use std::net::IpAddr;

use steering::table::BUCKETS_MAX;
use steering::units::{LEASE_PORTS, Lease};

use super::{
    Hello, INTERFACE_ADDRESSES_MAX, INTERFACES_MAX, LiveRun, Member, Message, Pair, Parts, Phase, Prepare,
    Proof, Refusal, Report, Retired, Role, Secret, SharedInterface, Welcome, Whole,
};
use crate::codec::{CodecError, Reader, Writer};

/// Numbers of the messages. Those of the manager begin at 16.
mod kind {
    pub const HELLO: u8 = 1;
    pub const HEARTBEAT: u8 = 2;
    pub const ACKNOWLEDGE: u8 = 3;
    pub const REPORT: u8 = 4;
    pub const DRAINED: u8 = 5;
    pub const IDENTIFY: u8 = 6;
    pub const PROOF: u8 = 7;
    pub const WELCOME: u8 = 16;
    pub const PREPARE: u8 = 17;
    pub const COMMIT: u8 = 18;
    pub const RETIRE: u8 = 19;
    pub const REFUSED: u8 = 20;
    pub const GOODBYE: u8 = 21;
    pub const TERM: u8 = 22;
    pub const CHALLENGE: u8 = 23;
    pub const ADMITTED: u8 = 24;
}

/// Blocks of ports of one address.
const BLOCKS: u8 = ((1u32 << 16) / LEASE_PORTS as u32) as u8;

/// Writes kind and body.
pub(super) fn put(out: &mut Writer<'_>, message: &Message) {
    match message {
        Message::Hello(hello) => {
            out.u8(kind::HELLO);
            put_hello(out, hello);
        }
        Message::Heartbeat { load_percent } => {
            out.u8(kind::HEARTBEAT);
            out.u8(*load_percent);
        }
        Message::Acknowledge { era, phase } => {
            out.u8(kind::ACKNOWLEDGE);
            out.u32(*era);
            out.u8(match phase {
                Phase::Prepared => 1,
                Phase::Committed => 2,
            });
        }
        Message::Report(report) => {
            out.u8(kind::REPORT);
            put_report(out, report);
        }
        Message::Drained { era } => {
            out.u8(kind::DRAINED);
            out.u32(*era);
        }
        Message::Welcome(welcome) => {
            out.u8(kind::WELCOME);
            put_welcome(out, welcome);
        }
        Message::Prepare(prepare) => {
            out.u8(kind::PREPARE);
            out.table(&prepare.table);
            put_parts(out, &prepare.parts);
        }
        Message::Commit { era } => {
            out.u8(kind::COMMIT);
            out.u32(*era);
        }
        Message::Retire { era, entries } => {
            out.u8(kind::RETIRE);
            out.u32(*era);
            for entry in entries {
                put_retired(out, entry);
            }
        }
        Message::Refused(reason) => {
            out.u8(kind::REFUSED);
            out.u8(refusal_number(*reason));
        }
        Message::Goodbye => out.u8(kind::GOODBYE),
        Message::Identify { key } => {
            out.u8(kind::IDENTIFY);
            out.bytes(key);
        }
        Message::Proof(proof) => {
            out.u8(kind::PROOF);
            put_proof(out, proof);
        }
        Message::Challenge { nonce } => {
            out.u8(kind::CHALLENGE);
            out.bytes(nonce);
        }
        Message::Admitted => out.u8(kind::ADMITTED),
        Message::Term { term } => {
            out.u8(kind::TERM);
            out.u64(*term);
        }
    }
}

/// Reads the body of a message of `kind`; `None` if there is no such kind.
pub(super) fn take(kind: u8, from: &mut Reader<'_>) -> Result<Option<Message>, CodecError> {
    Ok(Some(match kind {
        kind::HELLO => Message::Hello(take_hello(from)?),
        kind::HEARTBEAT => Message::Heartbeat { load_percent: percent(from)? },
        kind::ACKNOWLEDGE => {
            let era = from.u32("era")?;
            let phase = match from.u8("phase")? {
                1 => Phase::Prepared,
                2 => Phase::Committed,
                other => return Err(CodecError::Value("phase", other.into())),
            };
            Message::Acknowledge { era, phase }
        }
        kind::REPORT => Message::Report(take_report(from)?),
        kind::DRAINED => Message::Drained { era: from.u32("era")? },
        kind::WELCOME => Message::Welcome(Box::new(take_welcome(from)?)),
        kind::PREPARE => {
            let table = from.table()?;
            Message::Prepare(Box::new(Prepare { table, parts: take_parts(from)? }))
        }
        kind::COMMIT => Message::Commit { era: from.u32("era")? },
        kind::RETIRE => {
            let era = from.u32("era")?;
            let mut entries = Vec::new();
            while !from.is_empty() {
                entries.push(take_retired(from)?);
            }
            Message::Retire { era, entries }
        }
        kind::REFUSED => Message::Refused(take_refusal(from)?),
        kind::GOODBYE => Message::Goodbye,
        kind::IDENTIFY => Message::Identify { key: from.array("public key")? },
        kind::PROOF => {
            let signature = from.array("signature")?;
            let token = if from.flag("token")? { Some(Secret(from.array("token")?)) } else { None };
            Message::Proof(Box::new(Proof { signature, token }))
        }
        kind::CHALLENGE => Message::Challenge { nonce: from.array("challenge")? },
        kind::ADMITTED => Message::Admitted,
        kind::TERM => Message::Term { term: from.u64("term")? },
        _ => return Ok(None),
    }))
}

fn put_proof(out: &mut Writer<'_>, proof: &Proof) {
    out.bytes(&proof.signature);
    out.u8(u8::from(proof.token.is_some()));
    out.bytes(proof.token.as_ref().map_or(&[][..], |token| &token.0));
}

fn percent(from: &mut Reader<'_>) -> Result<u8, CodecError> {
    let load = from.u8("load")?;
    if load <= 100 { Ok(load) } else { Err(CodecError::Value("load", load.into())) }
}

pub(crate) fn put_role(out: &mut Writer<'_>, role: Role) {
    out.u8(match role {
        Role::Dispatcher => 1,
        Role::DataPlane => 2,
        Role::Both => 3,
    });
}

pub(crate) fn take_role(from: &mut Reader<'_>) -> Result<Role, CodecError> {
    match from.u8("role")? {
        1 => Ok(Role::Dispatcher),
        2 => Ok(Role::DataPlane),
        3 => Ok(Role::Both),
        other => Err(CodecError::Value("role", other.into())),
    }
}

fn put_hello(out: &mut Writer<'_>, hello: &Hello) {
    out.u16(hello.node);
    put_role(out, hello.role);
    out.u32(hello.weight);
    out.u64(hello.instance);
    out.u8(u8::from(hello.held.is_some()));
    if let Some(era) = hello.held {
        out.u32(era);
    }
}

fn take_hello(from: &mut Reader<'_>) -> Result<Hello, CodecError> {
    let node = from.node("node")?;
    let role = take_role(from)?;
    let weight = from.u32("weight")?;
    let instance = from.u64("instance")?;
    let held = if from.flag("held")? { Some(from.u32("era")?) } else { None };
    Ok(Hello { node, role, weight, instance, held })
}

fn put_report(out: &mut Writer<'_>, report: &Report) {
    out.u32(report.in_force);
    out.u8(report.load_percent);
    out.u64(report.second_hops);
    out.u64(report.packets);
    out.u8(u8::from(report.copied_to.is_some()));
    if let Some(backup) = report.copied_to {
        out.u16(backup);
    }
    out.u32(report.inherited);
    out.u8(u8::from(report.whole));
    let mut at = 0;
    for run in &report.live {
        out.varint(run.first.saturating_sub(at));
        out.varint(run.buckets.saturating_sub(1));
        out.varint(run.flows);
        at = run.first + run.buckets;
    }
}

fn take_report(from: &mut Reader<'_>) -> Result<Report, CodecError> {
    let in_force = from.u32("era")?;
    let load_percent = percent(from)?;
    let second_hops = from.u64("second hops")?;
    let packets = from.u64("packets")?;
    let copied_to = if from.flag("copies")? { Some(from.node("unit with copies")?) } else { None };
    let inherited = from.u32("inherited flows")?;
    let whole = from.flag("whole")?;
    let mut live = Vec::new();
    let mut at = 0u32;
    while !from.is_empty() {
        let first = at.saturating_add(from.varint("skipped buckets")?);
        let more = from.varint("run of buckets")?;
        let end = first.saturating_add(more).saturating_add(1);
        if usize::try_from(end).map_or(true, |end| end > BUCKETS_MAX) {
            return Err(CodecError::Value("bucket", end.into()));
        }
        live.push(LiveRun { first, buckets: more + 1, flows: from.varint("flows")? });
        at = end;
    }
    Ok(Report { in_force, load_percent, second_hops, packets, copied_to, inherited, whole, live })
}

fn put_welcome(out: &mut Writer<'_>, welcome: &Welcome) {
    out.u16(welcome.node);
    out.u16(welcome.heartbeat_ms);
    out.u8(u8::from(welcome.whole.is_some()));
    let Some(whole) = &welcome.whole else { return };
    out.u8(u8::from(whole.fresh));
    out.bytes(&whole.key);
    out.u32(whole.in_force);
    out.u8(u8::from(whole.older.is_some()));
    if let Some(older) = &whole.older {
        out.table(older);
    }
    out.table(&whole.newest);
    put_parts(out, &whole.parts);
}

fn take_welcome(from: &mut Reader<'_>) -> Result<Welcome, CodecError> {
    let node = from.node("node")?;
    let heartbeat_ms = from.u16("heartbeat")?;
    if heartbeat_ms == 0 {
        return Err(CodecError::Value("heartbeat", 0));
    }
    let whole = if from.flag("state")? { Some(take_whole(from)?) } else { None };
    Ok(Welcome { node, heartbeat_ms, whole })
}

fn take_whole(from: &mut Reader<'_>) -> Result<Whole, CodecError> {
    let fresh = from.flag("fresh")?;
    let key = from.array("key")?;
    let in_force = from.u32("era in force")?;
    let older = if from.flag("tables")? { Some(from.table()?) } else { None };
    let newest = from.table()?;
    let older_fits = older.as_ref().is_none_or(|older| {
        older.era().wrapping_add(1) == newest.era() && older.buckets() == newest.buckets()
    });
    if !older_fits {
        return Err(CodecError::Value("era of the newest table", newest.era().into()));
    }
    if in_force != newest.era() && older.as_ref().is_none_or(|older| older.era() != in_force) {
        return Err(CodecError::Value("era in force", in_force.into()));
    }
    Ok(Whole { fresh, key, in_force, older, newest, parts: take_parts(from)? })
}

fn put_parts(out: &mut Writer<'_>, parts: &Parts) {
    out.list(&parts.members, put_member);
    out.list(&parts.interfaces, put_interface);
    out.list(&parts.leases, put_lease);
    out.list(&parts.resting, put_lease);
    out.list(&parts.copies, put_pair);
    out.list(&parts.heirs, put_pair);
}

fn take_parts(from: &mut Reader<'_>) -> Result<Parts, CodecError> {
    let members = from.list("members", take_member)?;
    let interfaces = from.list("interfaces", take_interface)?;
    if interfaces.len() > INTERFACES_MAX {
        return Err(CodecError::Value("number of interfaces", interfaces.len() as u64));
    }
    let leases = from.list("leases", take_lease)?;
    let resting = from.list("resting leases", take_lease)?;
    let copies = from.list("copies", take_pair)?;
    let heirs = from.list("heirs", take_pair)?;
    Ok(Parts { members, interfaces, leases, resting, copies, heirs })
}

/// Writes a unit and the one with its copies.
pub(crate) fn put_pair(out: &mut Writer<'_>, pair: &Pair) {
    out.u16(pair.unit);
    out.u16(pair.heir);
}

/// Reads them; a unit is not its own heir.
pub(crate) fn take_pair(from: &mut Reader<'_>) -> Result<Pair, CodecError> {
    let pair = Pair { unit: from.node("unit")?, heir: from.node("heir")? };
    if pair.unit == pair.heir { Err(CodecError::Value("heir", pair.heir.into())) } else { Ok(pair) }
}

/// Writes a member.
fn put_member(out: &mut Writer<'_>, member: &Member) {
    out.u16(member.node);
    put_role(out, member.role);
    out.u32(member.weight);
    out.address(member.address);
}

/// Reads a member.
fn take_member(from: &mut Reader<'_>) -> Result<Member, CodecError> {
    let node = from.node("node")?;
    let role = take_role(from)?;
    let weight = from.u32("weight")?;
    Ok(Member { node, role, weight, address: from.address("bus address")? })
}

/// Writes a shared interface.
pub(crate) fn put_interface(out: &mut Writer<'_>, interface: &SharedInterface) {
    out.u8(interface.id);
    out.u8(u8::from(interface.outside));
    out.bytes(&interface.mac);
    out.name(&interface.name);
    out.list(&interface.addresses, |out, (address, prefix)| {
        out.address(*address);
        out.u8(*prefix);
    });
}

/// Reads a shared interface.
pub(crate) fn take_interface(from: &mut Reader<'_>) -> Result<SharedInterface, CodecError> {
    let id = from.u8("interface")?;
    let outside = from.flag("outside")?;
    let mac = from.array("MAC address")?;
    let name = from.name("name of an interface")?;
    let addresses = from.list("addresses", |from| {
        let address = from.address("address of an interface")?;
        Ok((address, prefix(from, address)?))
    })?;
    if addresses.len() > INTERFACE_ADDRESSES_MAX {
        return Err(CodecError::Value("number of addresses", addresses.len() as u64));
    }
    Ok(SharedInterface { id, outside, mac, name, addresses })
}

fn prefix(from: &mut Reader<'_>, address: IpAddr) -> Result<u8, CodecError> {
    let length = from.u8("prefix length")?;
    let longest = if address.is_ipv4() { 32 } else { 128 };
    if length <= longest { Ok(length) } else { Err(CodecError::Value("prefix length", length.into())) }
}

/// Writes a lease.
fn put_lease(out: &mut Writer<'_>, lease: &Lease) {
    out.address(lease.address);
    out.u8(lease.block);
    out.u16(lease.node);
}

/// Reads a lease.
fn take_lease(from: &mut Reader<'_>) -> Result<Lease, CodecError> {
    let address = from.address("outside address")?;
    let block = from.u8("block")?;
    if block >= BLOCKS {
        return Err(CodecError::Value("block", block.into()));
    }
    Ok(Lease { address, block, node: from.node("node")? })
}

fn put_retired(out: &mut Writer<'_>, entry: &Retired) {
    out.u16(entry.first as u16);
    out.u16(entry.buckets.saturating_sub(1) as u16);
    out.u16(entry.unit);
}

fn take_retired(from: &mut Reader<'_>) -> Result<Retired, CodecError> {
    let first = u32::from(from.u16("bucket")?);
    let buckets = u32::from(from.u16("run of buckets")?) + 1;
    if (first + buckets) as usize > BUCKETS_MAX {
        return Err(CodecError::Value("run of buckets", buckets.into()));
    }
    Ok(Retired { first, buckets, unit: from.node("unit")? })
}

fn refusal_number(reason: Refusal) -> u8 {
    match reason {
        Refusal::Unknown => 1,
        Refusal::Identity => 2,
        Refusal::Role => 3,
        Refusal::NewerEra => 4,
        Refusal::Protocol => 5,
        Refusal::NotLeading => 6,
        Refusal::Key => 7,
        Refusal::Token => 8,
    }
}

fn take_refusal(from: &mut Reader<'_>) -> Result<Refusal, CodecError> {
    let number = from.u8("reason")?;
    let all = [
        Refusal::Unknown,
        Refusal::Identity,
        Refusal::Role,
        Refusal::NewerEra,
        Refusal::Protocol,
        Refusal::NotLeading,
        Refusal::Key,
        Refusal::Token,
    ];
    let reason = all.into_iter().find(|reason| refusal_number(*reason) == number);
    reason.ok_or(CodecError::Value("reason", number.into()))
}
