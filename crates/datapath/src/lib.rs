//! One core's way of a packet, whole: from interface, host or bond to interface, host or bond.
//!
//! ```text
//!   host (TUN queue) ──┐                                            ┌──▶ host
//!   interface (ring) ──┼──▶ services: flow → rewrite → Egress ──────┼──▶ interface
//!   bond (UDP socket) ─┘ ▲       ▲                                  └──▶ bond: schedule → seal
//!      open → order → merge      └── rings: packets that another core read
//! ```
//!
//! Sans-IO: time, bytes and snapshots come in, packets leave through [`Output`]. In the order data flows:
//!
//! * [`ports`]: where a round takes packets from ([`Ports`]) and gives them to ([`Output`]). The engine has sockets behind
//!   it, captures and tests have memory.
//! * [`worker`]: the round: pull, act, push, tick. [`Worker`] owns the core's [`Datapath`] and its ports.
//! * [`mod@datapath`]: the [`Datapath`] of one core and the *single* routing decision: with services in force they decide every
//!   packet, without them the host and the bonds are joined directly.
//! * [`delivery`]: what a bond delivered is merged to super-packets and decided at once, while it is in the cache.
//! * `place`: which core a bond's packet is for, where the peer named none.
//! * [`to_bond`]: what was decided for a bond.
//! * [`units`]: what goes to other machines of a cluster and comes from them; `hub`: bonds that end at any of them.
//! * [`ethernet`]: the switch between a TAP device and bonds; [`lan`]: what it is given and where its frames go.
//! * [`handed`]: what goes from one core to another.
//! * [`memory`]: ports in memory; [`capture`]: recorded packets through the cores of a node.
//!
//! Nine ways, none of which copies or allocates per packet: frames of an interface are changed where the kernel put them,
//! packets of the host in the buffer that they were read into, packets of a bond in the buffer that they were merged into
//! (the merge is their one copy). Each has [`packet::buffer::HEADROOM_BYTES`] or an Ethernet header of room in front.
//! `tests/nine_ways.rs` counts.
//!
//! Order of calls on a [`Datapath`] in one round, all with the same `now`: [`Datapath::begin`]; any number of
//! [`Datapath::host`], [`Datapath::tap`], [`Datapath::interface`], [`Datapath::datagrams`], [`Datapath::handed`]; [`Datapath::finish`].

pub mod capture;
pub mod datapath;
pub mod delivery;
mod era_wait;
pub mod ethernet;
pub mod handed;
mod hub;
pub mod lan;
pub mod memory;
mod path_mtu;
mod place;
pub mod ports;
pub mod to_bond;
pub mod trace;
pub mod units;
pub mod worker;

pub use datapath::{Datapath, Snapshots};
pub use handed::Handed;
pub use ports::{Output, Ports, Pulled};
pub use worker::{Ready, Round, Worker};
