//! Functions that the fuzzer runs: one per parser and state machine that strangers can reach.
//!
//! Each function takes any bytes, must not panic, and asserts what must hold for every input. `fuzz/fuzz_targets` calls
//! them from cargo-fuzz; `tests/replay.rs` calls them with the committed corpora, in every `cargo test --workspace`.
//!
//! From the outside in:
//!
//! 1. [`header`]: the 16 clear bytes of a datagram.
//! 2. [`handshake()`]: what a stranger may send before any key is agreed; [`tampering()`]: what somebody in between may do
//!    to a genuine handshake.
//! 3. [`frames()`]: what stands in a data datagram, pieces put together included; [`table()`]: bucket tables in it;
//!    [`peer_frames()`]: what a peer makes a node do with it.
//! 4. [`packet()`]: inner packets and super-packets, from the TUN device or from a peer.
//!    [`quic_header()`]: connection ids of QUIC; [`server_name()`]: what TLS and QUIC say in the clear.
//! 5. [`fragments()`]: packets in pieces, from any interface of the gateway.
//! 6. [`nat_rewrite()`]: packets that the gateway translates; [`tcp_track()`]: segments of connections that it follows;
//!    [`proxy_protocol()`]: segments behind the PROXY protocol's header; [`gateway()`]: all of it, between interfaces, host and a peer.
//! 7. [`encapsulation()`]: datagrams between the units of a cluster; [`reassembly()`]: frames that they carry in fragments.
//! 8. [`ethernet()`]: frames at the switch between a TAP device and bonds.
//! 9. [`config()`]: the configuration file; [`control_request()`]: lines over local sockets; [`port_lease()`]: ports that are asked for.
//! 10. [`health_answer()`]: answers of backends that are checked.
//! 11. [`cluster_message()`]: messages between manager and units of a cluster; [`cluster_unit()`]: what a unit makes of them;
//!     [`cluster_state()`]: the manager's stored state.
//! 12. [`flow_record()`]: flows that another process or machine hands over.
//! 13. [`netlink()`], [`control_message()`], [`packet_ring()`]: what the kernel writes.
#![allow(clippy::missing_panics_doc, reason = "a panic is what the fuzzer looks for")]

mod cluster;
mod config;
mod flow_records;
mod fragments;
mod frames;
mod gateway;
mod handshake;
mod health;
mod kernel;
mod leases;
mod packet;
mod peer;
mod proxy;
mod quic;
pub mod seeds;
mod socket_lines;
mod switch;
pub mod track;
pub mod translate;
mod units;

pub use cluster::{cluster_message, cluster_state, cluster_unit};
pub use config::config;
pub use flow_records::flow_record;
pub use fragments::{fragments, steps as fragment_steps};
pub use frames::{frames, table};
pub use gateway::gateway;
pub use handshake::{handshake, tampering};
pub use health::health_answer;
pub use kernel::{control_message, netlink, packet_ring};
pub use leases::port_lease;
pub use packet::packet;
pub use peer::peer_frames;
pub use proxy::proxy_protocol;
pub use quic::{quic_header, server_name};
pub use socket_lines::control_request;
pub use switch::ethernet;
pub use track::tcp_track;
pub use translate::nat_rewrite;
pub use units::{encapsulation, reassembly, steps as reassembly_steps};

use tunnel::header::{HEADER_BYTES, Header};

/// A target: any bytes in, a panic if something is wrong.
pub type Target = fn(&[u8]);

/// Every target with the name of its corpus.
pub const TARGETS: &[(&str, Target)] = &[
    ("cluster_message", cluster_message),
    ("cluster_state", cluster_state),
    ("cluster_unit", cluster_unit),
    ("config", config),
    ("control_message", control_message),
    ("control_request", control_request),
    ("encapsulation", encapsulation),
    ("ethernet", ethernet),
    ("flow_record", flow_record),
    ("fragments", fragments),
    ("frames", frames),
    ("gateway", gateway),
    ("handshake", handshake),
    ("header", header),
    ("health_answer", health_answer),
    ("nat_rewrite", nat_rewrite),
    ("netlink", netlink),
    ("packet", packet),
    ("packet_ring", packet_ring),
    ("peer_frames", peer_frames),
    ("port_lease", port_lease),
    ("proxy_protocol", proxy_protocol),
    ("quic_header", quic_header),
    ("reassembly", reassembly),
    ("server_name", server_name),
    ("table", table),
    ("tampering", tampering),
    ("tcp_track", tcp_track),
];

/// A header that is accepted is written back as the same bytes.
pub fn header(data: &[u8]) {
    if let Ok(header) = Header::parse(data) {
        assert_eq!(header.to_bytes()[..], data[..HEADER_BYTES]);
    }
}
