//! A discrete-event network with virtual time that drives whole nodes: the product's round on every core.
//!
//! Nothing here reads a clock or does I/O, and everything random comes from one seed: the same seed runs the same events,
//! byte for byte but for the keys. In the order in which a packet meets them:
//!
//! * [`inner`]: applications whose packets carry contents that the other end can check.
//! * [`host`]: neighbors of a site, on which applications run; others run behind a site's TUN device.
//! * [`site`]: a [`tunnel::node::Node`] with its cores, sockets, WANs and interfaces, as the engine runs it on a machine;
//!   each core is a [`datapath::Worker`] over ports in memory.
//! * [`control`]: the site's control thread: services, bucket tables, neighbors.
//! * [`cable`], [`nat`] and [`link`]: what is between two WANs. The model of a link is the test bed's, too.
//! * [`world`]: routes datagrams and frames, wakes cores, counts what must never happen.
//! * [`scenario`]: the usual topologies in one call.
//! * [`scale`]: apart from all that, a cluster of hundreds of units with millions of flows, by the product's decisions alone.
//!
//! A failed test prints its seed; `SIM_SEED=<number>` runs every test with that one.

pub mod cable;
pub mod control;
mod events;
pub mod host;
pub mod inner;
pub mod link;
mod log;
pub mod nat;
pub mod scale;
pub mod scenario;
pub mod site;
pub mod world;

/// The seed to use: the one in the environment variable `SIM_SEED`, or else `usual`.
pub fn seed(usual: u64) -> u64 {
    std::env::var("SIM_SEED").ok().and_then(|text| text.trim().parse().ok()).unwrap_or(usual)
}
