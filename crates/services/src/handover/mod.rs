//! Flows on their way to another process or another machine: records that mean the same there.
//!
//! A flow's record in the table is made of places: of rules, backends, interfaces, next hops, port tables. None of them
//! means anything outside the core that wrote it. An [`Entry`] has names and addresses instead, durations and no clock
//! values; [`wire`] is its form in bytes (`docs/wire-flow-records.md`). [`crate::Services::export`] writes what a core
//! has, [`crate::Services::import`] takes it over where the present policy still agrees, or says why not ([`Refusal`]).
//!
//! # Which core takes a flow over
//!
//! NAT chose a flow's port so that its replies hash to the core that has it. A new process that drew a new hash key would
//! get nearly all replies on wrong cores, and a ring for each packet of each old flow, for hours. So the hash key and the
//! bucket table go along with the flows, and a process with as many cores starts with them: then [`owner`] is the core
//! that had the flow, its replies come there, and new ports stay apart from old ones as they did before. With another
//! number of cores the key alone is kept: nearly all ports were chosen such that both directions fall into one bucket, which
//! has one owner whatever the table is. A flow whose directions then come to different cores is not taken over.
//! The key is secret and is kept beside the records, never in one.
//!
//! # On another machine
//!
//! [`crate::Services::copies`] writes what is new or has ended, a little at a time, and another machine keeps it. When that one has to go
//! on with the flows it has a hash key of its own: [`crate::Services::inherit`] takes a flow over at the core that its requests come to, and
//! says whether replies come to another one ([`InheritedFlows`]). Ports belong to a machine by lease, and the lease comes along.

mod inherited;
mod refusal;
pub mod wire;

use std::net::{IpAddr, SocketAddr};

use packet::attachment::Ingress;
use packet::flow::FlowKey;
use steering::ownership::Ownership;

use crate::nat::mapping_core;
use crate::policy::Policy;
use crate::proxy_protocol::Shift;
use crate::spec::NatMode;
use crate::steer;

pub use inherited::{InheritedFlows, Strays};
pub use refusal::{Refusal, Refusals};

/// Longest name, bytes.
pub const NAME_BYTES_MAX: usize = 255;

/// The core of an entry that names none.
pub const NO_CORE: u8 = u8::MAX;

/// One thing that a core knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// A flow.
    Flow(Box<FlowEntry>),
    /// An endpoint-independent mapping, with or without flows.
    Mapping(MappingEntry),
}

/// A flow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlowEntry {
    /// The core that had it, or [`NO_CORE`].
    pub core: u8,
    /// Key and tenant of its original direction.
    pub original: Side,
    /// Key and tenant of its replies, as they arrive.
    pub reply: Side,
    /// [`crate::flow::flags`].
    pub flags: u16,
    /// By what its packets of the original direction come in.
    pub ingress: Place,
    /// How long ago its last packet came, ms.
    pub idle_ms: u32,
    /// State of the connection; there is one if and only if the protocol is TCP.
    pub tcp: Option<TcpState>,
    /// Counts; translated flows have some.
    pub counts: Option<Counts>,
    /// Shift of the sequence numbers behind a PROXY protocol header.
    pub shift: Option<Shift>,
    /// Who gave it its source.
    pub source: Option<Source>,
    /// Its backend.
    pub backend: Option<Backend>,
}

/// A key and whose it is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Side {
    /// Addresses, ports and protocol.
    pub key: FlowKey,
    /// Name of the tenant; empty: the shared one.
    pub tenant: String,
}

/// Where packets come in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// The host's own stack.
    Host,
    /// The interface of this name in the configuration.
    Interface(String),
    /// The peer of this name.
    Peer(String),
}

/// TCP, as [`crate::flow::Record`] has it; places by [`crate::flow::Direction`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TcpState {
    /// [`crate::tcp::State`] as a number.
    pub state: u8,
    /// Window scales.
    pub scale: u8,
    /// Highest sequence number + length sent.
    pub end: [u32; 2],
    /// Largest window advertised, unscaled.
    pub window: [u16; 2],
}

/// Counts of a flow; places by [`crate::flow::Direction`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// How long ago it began, ms.
    pub age_ms: u64,
    /// Packets.
    pub packets: [u64; 2],
    /// Bytes.
    pub bytes: [u64; 2],
}

/// NAT rule: not by its place in the list, which the next configuration may change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// How it translates.
    pub mode: NatMode,
    /// Whose rule it is.
    pub by: Provider,
    /// Blocks of 1,024 ports of the outside address that the client has for itself, as bits; 0: none.
    pub blocks: u64,
}

/// Owner of a NAT rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Provider {
    /// A `[[nat]]` whose `out` is the interface of this name.
    Interface(String),
    /// The virtual server of this name.
    Server(String),
}

/// A backend of a virtual server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backend {
    /// Name of the server.
    pub server: String,
    /// The backend's address and port.
    pub address: SocketAddr,
}

/// An endpoint-independent mapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MappingEntry {
    /// The core that had it, or [`NO_CORE`].
    pub core: u8,
    /// IP protocol.
    pub protocol: u8,
    /// Tenant of the client, by name.
    pub tenant: String,
    /// The client's address and port, or query identifier.
    pub inside: SocketAddr,
    /// Tenant of the outer interface, by name.
    pub out_tenant: String,
    /// Outside address and port.
    pub outside: SocketAddr,
    /// Who gave it.
    pub source: Source,
    /// Flows are begun where it is.
    pub is_home: bool,
}

/// Number of a tenant.
#[must_use]
pub fn tenant_number(policy: &Policy, name: &str) -> Option<u16> {
    if name.is_empty() {
        return Some(crate::route::SHARED_TENANT);
    }
    let place = policy.spec.tenants.iter().position(|known| known == name)?;
    u16::try_from(place).ok()
}

/// The present number of a place.
#[must_use]
pub fn ingress_of(policy: &Policy, place: &Place) -> Option<Ingress> {
    match place {
        Place::Host => Some(Ingress::Host),
        Place::Interface(name) => {
            let place = policy.spec.interfaces.iter().position(|interface| interface.name == *name)?;
            Some(Ingress::Interface(packet::attachment::InterfaceId(u16::try_from(place).ok()?)))
        }
        Place::Peer(name) => {
            let peer = policy.spec.peers.iter().find(|peer| peer.name == *name)?;
            Some(Ingress::Bond(peer.id))
        }
    }
}

/// The core that has to take an entry over: the one that had it where its packets are still brought there, else the one that
/// would begin it now.
///
/// # Errors
/// [`Refusal::Tenant`], [`Refusal::Interface`]: the packets' keys cannot be told any more.
pub fn owner(policy: &Policy, ownership: &Ownership, entry: &Entry) -> Result<u8, Refusal> {
    match entry {
        Entry::Flow(flow) => {
            let ingress = ingress_of(policy, &flow.ingress).ok_or(Refusal::Interface)?;
            let tenant = tenant_number(policy, &flow.original.tenant).ok_or(Refusal::Tenant)?;
            let chain = steer::owners(ownership, policy, &flow.original.key, tenant, ingress).chain;
            Ok(if chain.cores().contains(&flow.core) { flow.core } else { chain.creator })
        }
        Entry::Mapping(mapping) => {
            Ok(mapping_core(mapping.outside.ip(), mapping.outside.port(), ownership.cores))
        }
    }
}

impl Entry {
    /// The core that had it means nothing here: it was another machine's.
    pub fn forget_core(&mut self) {
        match self {
            Entry::Flow(flow) => flow.core = NO_CORE,
            Entry::Mapping(mapping) => mapping.core = NO_CORE,
        }
    }
}

impl FlowEntry {
    /// Whether both addresses of both keys and of the backend are of one IP version.
    pub(crate) fn is_of_one_family(&self) -> bool {
        let ipv4 = self.original.key.src.is_ipv4();
        let keys = [&self.original.key, &self.reply.key];
        let backend = self.backend.as_ref().map(|backend| backend.address.ip());
        let all = keys.into_iter().flat_map(|key| [key.src, key.dst]).chain(backend);
        all.map(|address: IpAddr| address.is_ipv4()).all(|is| is == ipv4)
    }
}

#[cfg(test)]
mod tests;
