//! Services of a gateway: what it does with a packet besides carrying it, which is firewall, NAT, load balancing,
//! fragments (rows C2–C6, R1, R4, R5, R11). State machines without I/O and without a clock: time comes in as `now_ns`
//! (monotonic, nanoseconds), packets and log records go out.
//!
//! One [`Services`] for each processor core; cores share nothing but the compiled [`policy::Policy`]. A tour in the
//! order a packet meets the parts:
//!
//! 1. [`steer`]: which core owns it. Whoever reads a packet asks this first and hands it over when it is not the one.
//! 2. [`fragment`]: pieces of packets wait at the core of their addresses until the ports are known (row C5).
//! 3. [`flow`]: one look-up in the core's table. A hit has everything: how to rewrite, where to send.
//! 4. A miss takes the slow path once per flow: [`rules`] (firewall and address groups), [`balance`] (virtual
//!    servers), [`nat`] (source translation, port forwards, leases), [`route`]. The outcome becomes a flow.
//! 5. [`tcp`] follows the connection's state; [`rewrite`] and [`icmp`] change the bytes, keep the checksums right
//!    and answer what must be answered.
//! 6. [`pipeline`] puts this together: batches in, frames out, expiry, reload without losing a flow.
//!
//! [`handover`] carries flows to another process: at a restart of the program none breaks.
//!
//! [`spec`] is what the operator wants, in plain data; [`policy`] is its compiled form, replaced as a whole. [`random`] is
//! where everything comes from that nobody may foretell, [`hash`] keeps strangers from choosing what meets in a table.

pub mod balance;
pub mod flow;
pub mod fragment;
pub mod handover;
pub mod hash;
pub mod held_ports;
pub mod icmp;
pub mod nat;
pub mod pipeline;
pub mod policy;
pub mod proxy_protocol;
pub mod random;
pub mod rewrite;
pub mod route;
pub mod rules;
pub mod spec;
pub mod steer;
pub mod tcp;

pub use pipeline::Services;
