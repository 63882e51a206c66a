//! The bond protocol: any number of links to a peer become one encrypted tunnel, on all cores.
//!
//! Sans-IO: nothing here reads a clock, opens a socket or starts a thread. Every call takes `now`; what must be
//! sent or delivered goes to the caller's [`forwarder::Output`]. The modules, in the order data flows:
//!
//! * Who we are and whom we know: [`keys`], [`config`], [`node`] (shared by all cores), [`bond`], [`path`]; what flows want of
//!   the paths: [`class`], by the servers that they ask for too (`server_names`).
//! * How a session comes to be: [`mac`] guards, [`handshake`] with its [`hello`] makes the keys (`noise` has the primitives), [`session`] holds
//!   them, [`index`] names it; [`mode`] says how cores are addressed, [`core_overrides`] what of them an operator knows better; [`lifecycle`] joins paths by challenge, watches and revives them, [`mtu`] measures them, and
//!   `advertise` tells the peer what changes about our cores, [`path_limits`] what our WANs ask for; `strain` finds paths beyond their limits.
//! * Sending, on one core ([`forwarder`]): [`queue`] (FQ-CoDel) → [`schedule`] (earliest arrival) → [`frame`]s in a datagram
//!   of the path's [`send_log`] → [`header`] (and [`header_seal`]) and [`aead`] → out. [`rate`] says how fast; [`fec`] sends repair symbols along on paths that lose.
//! * Receiving, on the core the header names: [`replay`] → [`aead`] (and [`fec`], which brings back what was lost) → [`frame`] → [`reassemble`] → [`order`] → out.
//!
//! Memory that a peer makes us keep is counted, per bond and per node: [`memory`].
//!
//! A *lane* is the header bytes (path, sending core, receiving core) as sent: counter, replay window and statistics
//! of a lane belong to one core at each end, so no packet ever takes a lock.
//!
//! Byte layouts: `docs/wire.md` and `docs/wire-frames.md`.

mod advertise;
pub mod aead;
mod allowance;
pub mod bond;
pub mod class;
pub mod config;
mod cookies;
pub mod core_overrides;
pub mod fec;
pub mod forwarder;
pub mod frame;
pub mod handshake;
pub mod header;
pub mod header_seal;
pub mod hello;
pub mod index;
pub mod keys;
pub mod lifecycle;
pub mod mac;
pub mod memory;
pub mod mode;
pub mod mtu;
pub mod node;
mod noise;
pub mod order;
pub mod path;
pub mod path_limits;
pub mod queue;
pub mod rate;
pub mod reassemble;
pub mod replay;
pub mod schedule;
pub mod send_log;
mod server_names;
pub mod session;
mod strain;
pub mod time;

pub use keys::{Encryption, FlowDefinition, PrivateKey};
