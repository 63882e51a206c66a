#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]
//! A gateway of several cores without any I/O: packets go in at interfaces as the kernel's steering would give them to
//! cores, and what leaves is looked at.

mod world;

mod balancing;
mod changes;
mod copies;
mod dead_backends;
mod errors;
mod fast;
mod firewall;
mod handover;
mod host_ports;
mod limits;
mod mappings;
mod moving;
mod peers;
mod proxy_sequence;
mod quic;
mod refusals;
mod routes;
mod translation;
mod units;
