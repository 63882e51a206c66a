//! Bytes of an entry: `docs/wire-flow-records.md`. Big endian, versioned, bounded by the length in front.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use packet::flow::FlowKey;

use super::{
    Backend, Counts, Entry, FlowEntry, MappingEntry, NAME_BYTES_MAX, Place, Provider, Side, Source, TcpState,
};
use crate::flow::flags;
use crate::proxy_protocol::Shift;
use crate::spec::{NatMode, TCP};

/// Version of the format.
pub const VERSION: u8 = 1;

/// Bytes in front of an entry's body: version, kind, length.
pub const HEAD_BYTES: usize = 4;

const FLOW: u8 = 1;
const MAPPING: u8 = 2;
const ENDED: u8 = 3;

/// All flags that a flow may have.
const FLAGS: u16 = flags::REPLIED
    | flags::ASSEMBLE
    | flags::SOURCE_NAT
    | flags::DEST_NAT
    | flags::ONE_WAY
    | flags::LOCAL
    | flags::MAPPED
    | flags::PROXY_PROTOCOL
    | flags::MID_STREAM
    | flags::RESYNC
    | flags::OWN_PORT;

/// Parts of a flow that follow, as bits.
mod parts {
    pub const COUNTS: u8 = 1;
    pub const SHIFT: u8 = 2;
    pub const SOURCE: u8 = 4;
    pub const BACKEND: u8 = 8;
    pub const ALL: u8 = COUNTS | SHIFT | SOURCE | BACKEND;
}

/// A word of one machine to another about a flow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// It is so now.
    Now(Entry),
    /// The flow that began with this key has ended.
    Ended(Side),
}

impl Change {
    /// Appends the end of a flow; nothing is appended on error.
    ///
    /// # Errors
    /// [`WireError::Name`]: a name is too long.
    pub fn encode_end(side: &Side, out: &mut Vec<u8>) -> Result<(), WireError> {
        record(out, ENDED, |out| {
            out.extend([side.key.protocol, family(side.key.src)]);
            write_side(out, side)
        })
    }

    /// Reads one whole record: an entry, or the end of a flow.
    ///
    /// # Errors
    /// [`WireError`]: what is wrong with it.
    pub fn decode(bytes: &[u8]) -> Result<Change, WireError> {
        if bytes.get(1) != Some(&ENDED) {
            return Entry::decode(bytes).map(Change::Now);
        }
        let (_, mut reader) = head(bytes)?;
        let protocol = reader.u8("protocol")?;
        let family = reader.family()?;
        let side = reader.side(family, protocol)?;
        if reader.bytes.is_empty() {
            Ok(Change::Ended(side))
        } else {
            Err(WireError::Trailing(reader.bytes.len()))
        }
    }
}

/// Appends a record of this kind, with its length; nothing on error.
fn record(
    out: &mut Vec<u8>,
    kind: u8,
    write: impl FnOnce(&mut Vec<u8>) -> Result<(), WireError>,
) -> Result<(), WireError> {
    let start = out.len();
    out.extend([VERSION, kind, 0, 0]);
    let written = write(out);
    let length = u16::try_from(out.len() - start).map_err(|_| WireError::Name("record"));
    match written.and(length) {
        Ok(length) => {
            if let Some(place) = out.get_mut(start + 2..start + HEAD_BYTES) {
                place.copy_from_slice(&length.to_be_bytes());
            }
            Ok(())
        }
        Err(error) => {
            out.truncate(start);
            Err(error)
        }
    }
}

/// Kind and body of one whole record.
fn head(bytes: &[u8]) -> Result<(u8, Reader<'_>), WireError> {
    let length = Entry::length(bytes)?;
    if bytes.len() != length {
        let left = bytes.len().checked_sub(length);
        return Err(left.map_or(WireError::Truncated("end"), WireError::Trailing));
    }
    let mut reader = Reader { bytes };
    let version = reader.u8("version")?;
    if version != VERSION {
        return Err(WireError::Version(version));
    }
    let kind = reader.u8("kind")?;
    reader.u16("length")?;
    Ok((kind, reader))
}

/// Why bytes are no entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The bytes end too early.
    #[error("the bytes end before the {0}")]
    Truncated(&'static str),
    /// Bytes are left behind the last field.
    #[error("{0} bytes behind the last field")]
    Trailing(usize),
    /// Another version.
    #[error("version {0}, and not 1")]
    Version(u8),
    /// A field has a value that it cannot have.
    #[error("{0} is {1}, which it cannot be")]
    Value(&'static str, u64),
    /// A name is no text, or too long.
    #[error("the {0} is not a name of at most 255 bytes")]
    Name(&'static str),
}

impl Entry {
    /// Appends the entry's bytes; nothing is appended on error.
    ///
    /// # Errors
    /// [`WireError::Name`]: a name is too long.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<(), WireError> {
        match self {
            Entry::Flow(flow) => record(out, FLOW, |out| write_flow(out, flow)),
            Entry::Mapping(mapping) => record(out, MAPPING, |out| write_mapping(out, mapping)),
        }
    }

    /// Bytes of the entry that begins here, by its head.
    ///
    /// # Errors
    /// [`WireError::Truncated`], [`WireError::Value`]: shorter than its head.
    pub fn length(bytes: &[u8]) -> Result<usize, WireError> {
        let head = bytes.first_chunk::<HEAD_BYTES>().ok_or(WireError::Truncated("head"))?;
        let length = u16::from_be_bytes([head[2], head[3]]);
        if usize::from(length) < HEAD_BYTES {
            return Err(WireError::Value("length", length.into()));
        }
        Ok(length.into())
    }

    /// Reads one whole entry: the bytes end where it does.
    ///
    /// # Errors
    /// [`WireError`]: what is wrong with them.
    pub fn decode(bytes: &[u8]) -> Result<Entry, WireError> {
        let (kind, mut reader) = head(bytes)?;
        let entry = match kind {
            FLOW => Entry::Flow(Box::new(read_flow(&mut reader)?)),
            MAPPING => Entry::Mapping(read_mapping(&mut reader)?),
            other => return Err(WireError::Value("kind", other.into())),
        };
        if reader.bytes.is_empty() { Ok(entry) } else { Err(WireError::Trailing(reader.bytes.len())) }
    }
}

fn write_flow(out: &mut Vec<u8>, flow: &FlowEntry) -> Result<(), WireError> {
    let part = |is: bool, bit: u8| if is { bit } else { 0 };
    let present = part(flow.counts.is_some(), parts::COUNTS)
        | part(flow.shift.is_some(), parts::SHIFT)
        | part(flow.source.is_some(), parts::SOURCE)
        | part(flow.backend.is_some(), parts::BACKEND);
    let key = &flow.original.key;
    out.extend([flow.core, key.protocol, family(key.src), present]);
    out.extend(flow.flags.to_be_bytes());
    out.extend(flow.idle_ms.to_be_bytes());
    write_side(out, &flow.original)?;
    write_side(out, &flow.reply)?;
    match &flow.ingress {
        Place::Host => out.push(0),
        Place::Interface(name) => {
            out.push(1);
            write_name(out, name, "interface")?;
        }
        Place::Peer(name) => {
            out.push(2);
            write_name(out, name, "peer")?;
        }
    }
    if let Some(tcp) = &flow.tcp {
        out.extend([tcp.state, tcp.scale]);
        tcp.end.iter().for_each(|end| out.extend(end.to_be_bytes()));
        tcp.window.iter().for_each(|window| out.extend(window.to_be_bytes()));
    }
    if let Some(counts) = &flow.counts {
        out.extend(counts.age_ms.to_be_bytes());
        counts.packets.iter().chain(&counts.bytes).for_each(|count| out.extend(count.to_be_bytes()));
    }
    if let Some(shift) = &flow.shift {
        let (first, length, acknowledged) = shift.parts();
        out.extend(first.to_be_bytes());
        out.extend([length, u8::from(acknowledged)]);
    }
    if let Some(source) = &flow.source {
        write_source(out, source)?;
    }
    if let Some(backend) = &flow.backend {
        write_endpoint(out, backend.address.ip(), backend.address.port());
        write_name(out, &backend.server, "server")?;
    }
    Ok(())
}

fn write_mapping(out: &mut Vec<u8>, mapping: &MappingEntry) -> Result<(), WireError> {
    out.extend([mapping.core, mapping.protocol, family(mapping.inside.ip()), u8::from(mapping.is_home)]);
    write_endpoint(out, mapping.inside.ip(), mapping.inside.port());
    write_name(out, &mapping.tenant, "tenant")?;
    write_endpoint(out, mapping.outside.ip(), mapping.outside.port());
    write_name(out, &mapping.out_tenant, "tenant")?;
    write_source(out, &mapping.source)
}

fn write_source(out: &mut Vec<u8>, source: &Source) -> Result<(), WireError> {
    let mode = match source.mode {
        NatMode::AddressAndPort => 1,
        NatMode::PortOnly => 2,
        NatMode::None => 3,
    };
    let (kind, name) = match &source.by {
        Provider::Interface(name) => (1, name),
        Provider::Server(name) => (2, name),
    };
    out.extend([mode, kind]);
    write_name(out, name, "rule")?;
    out.extend(source.blocks.to_be_bytes());
    Ok(())
}

fn write_side(out: &mut Vec<u8>, side: &Side) -> Result<(), WireError> {
    write_endpoint(out, side.key.src, side.key.src_port);
    write_endpoint(out, side.key.dst, side.key.dst_port);
    write_name(out, &side.tenant, "tenant")
}

const fn family(address: IpAddr) -> u8 {
    if address.is_ipv4() { 4 } else { 6 }
}

fn write_endpoint(out: &mut Vec<u8>, address: IpAddr, port: u16) {
    match address {
        IpAddr::V4(v4) => out.extend(v4.octets()),
        IpAddr::V6(v6) => out.extend(v6.octets()),
    }
    out.extend(port.to_be_bytes());
}

fn write_name(out: &mut Vec<u8>, name: &str, what: &'static str) -> Result<(), WireError> {
    let length = u8::try_from(name.len()).map_err(|_| WireError::Name(what))?;
    out.push(length);
    out.extend(name.as_bytes());
    Ok(())
}

fn read_flow(reader: &mut Reader<'_>) -> Result<FlowEntry, WireError> {
    let core = reader.u8("core")?;
    let protocol = reader.u8("protocol")?;
    let family = reader.family()?;
    let present = reader.u8("parts")?;
    if present & !parts::ALL != 0 {
        return Err(WireError::Value("parts", present.into()));
    }
    let bits = reader.u16("flags")?;
    let has = |bit: u16| bits & bit != 0;
    let has_shift = present & parts::SHIFT != 0;
    if bits & !FLAGS != 0
        || has(flags::PROXY_PROTOCOL) != has_shift
        || has_shift && protocol != TCP
        || has(flags::SOURCE_NAT) && present & parts::SOURCE == 0
    {
        return Err(WireError::Value("flags", bits.into()));
    }
    let idle_ms = reader.u32("idle time")?;
    let (original, reply) = (reader.side(family, protocol)?, reader.side(family, protocol)?);
    let ingress = match reader.u8("place")? {
        0 => Place::Host,
        1 => Place::Interface(reader.name("interface")?),
        2 => Place::Peer(reader.name("peer")?),
        other => return Err(WireError::Value("place", other.into())),
    };
    let part = |bit: u8| present & bit != 0;
    Ok(FlowEntry {
        core,
        original,
        reply,
        flags: bits,
        ingress,
        idle_ms,
        tcp: (protocol == TCP).then(|| reader.tcp()).transpose()?,
        counts: part(parts::COUNTS).then(|| reader.counts()).transpose()?,
        shift: has_shift.then(|| reader.shift()).transpose()?,
        source: part(parts::SOURCE).then(|| reader.source()).transpose()?,
        backend: part(parts::BACKEND).then(|| reader.backend(family)).transpose()?,
    })
}

fn read_mapping(reader: &mut Reader<'_>) -> Result<MappingEntry, WireError> {
    let core = reader.u8("core")?;
    let protocol = reader.u8("protocol")?;
    let family = reader.family()?;
    let is_home = reader.flag("home")?;
    let inside = reader.endpoint(family, "inside")?.into();
    let tenant = reader.name("tenant")?;
    let outside = reader.endpoint(family, "outside")?.into();
    let out_tenant = reader.name("tenant")?;
    let source = reader.source()?;
    Ok(MappingEntry { core, protocol, tenant, inside, out_tenant, outside, source, is_home })
}

/// Bytes that are read from the front.
struct Reader<'a> {
    bytes: &'a [u8],
}

impl Reader<'_> {
    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], WireError> {
        let (taken, rest) = self.bytes.split_first_chunk().ok_or(WireError::Truncated(what))?;
        self.bytes = rest;
        Ok(*taken)
    }

    fn u8(&mut self, what: &'static str) -> Result<u8, WireError> {
        self.array::<1>(what).map(|[byte]| byte)
    }

    fn u16(&mut self, what: &'static str) -> Result<u16, WireError> {
        self.array(what).map(u16::from_be_bytes)
    }

    fn u32(&mut self, what: &'static str) -> Result<u32, WireError> {
        self.array(what).map(u32::from_be_bytes)
    }

    fn u64(&mut self, what: &'static str) -> Result<u64, WireError> {
        self.array(what).map(u64::from_be_bytes)
    }

    fn flag(&mut self, what: &'static str) -> Result<bool, WireError> {
        match self.u8(what)? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(WireError::Value(what, other.into())),
        }
    }

    fn family(&mut self) -> Result<u8, WireError> {
        let family = self.u8("family")?;
        if matches!(family, 4 | 6) { Ok(family) } else { Err(WireError::Value("family", family.into())) }
    }

    fn endpoint(&mut self, family: u8, what: &'static str) -> Result<(IpAddr, u16), WireError> {
        let address = if family == 4 {
            Ipv4Addr::from(self.array::<4>(what)?).into()
        } else {
            Ipv6Addr::from(self.array::<16>(what)?).into()
        };
        Ok((address, self.u16(what)?))
    }

    fn side(&mut self, family: u8, protocol: u8) -> Result<Side, WireError> {
        let (src, src_port) = self.endpoint(family, "source")?;
        let (dst, dst_port) = self.endpoint(family, "destination")?;
        let tenant = self.name("tenant")?;
        Ok(Side { key: FlowKey { src, dst, src_port, dst_port, protocol }, tenant })
    }

    fn name(&mut self, what: &'static str) -> Result<String, WireError> {
        const { assert!(NAME_BYTES_MAX == u8::MAX as usize) };
        let length = usize::from(self.u8(what)?);
        let (taken, rest) = self.bytes.split_at_checked(length).ok_or(WireError::Truncated(what))?;
        self.bytes = rest;
        std::str::from_utf8(taken).map(str::to_owned).map_err(|_| WireError::Name(what))
    }

    fn tcp(&mut self) -> Result<TcpState, WireError> {
        let state = self.u8("state")?;
        if crate::tcp::State::from_u8(state) as u8 != state {
            return Err(WireError::Value("state", state.into()));
        }
        Ok(TcpState {
            state,
            scale: self.u8("scales")?,
            end: [self.u32("sequence number")?, self.u32("sequence number")?],
            window: [self.u16("window")?, self.u16("window")?],
        })
    }

    fn counts(&mut self) -> Result<Counts, WireError> {
        Ok(Counts {
            age_ms: self.u64("age")?,
            packets: [self.u64("packets")?, self.u64("packets")?],
            bytes: [self.u64("bytes")?, self.u64("bytes")?],
        })
    }

    fn shift(&mut self) -> Result<Shift, WireError> {
        let (first, length) = (self.u32("first byte")?, self.u8("header length")?);
        let acknowledged = self.flag("acknowledged")?;
        Shift::from_parts(first, length, acknowledged).ok_or(WireError::Value("header length", length.into()))
    }

    fn source(&mut self) -> Result<Source, WireError> {
        let mode = match self.u8("mode")? {
            1 => NatMode::AddressAndPort,
            2 => NatMode::PortOnly,
            3 => NatMode::None,
            other => return Err(WireError::Value("mode", other.into())),
        };
        let kind = self.u8("provider")?;
        let name = self.name("rule")?;
        let by = match kind {
            1 => Provider::Interface(name),
            2 => Provider::Server(name),
            other => return Err(WireError::Value("provider", other.into())),
        };
        Ok(Source { mode, by, blocks: self.u64("blocks")? })
    }

    fn backend(&mut self, family: u8) -> Result<Backend, WireError> {
        let (address, port) = self.endpoint(family, "backend")?;
        Ok(Backend { address: SocketAddr::new(address, port), server: self.name("server")? })
    }
}
