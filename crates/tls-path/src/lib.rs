//! Paths over TCP and TLS, for networks that block UDP (rows T1, T12): the process `anabranch tls-path` carries the tunnel's
//! sealed datagrams between UDP sockets of this machine and connections to port 443.
//!
//! ```text
//!   node ══ UDP, loopback ══ tls-path ══ TCP, TLS ══ tls-path ══ UDP, loopback ══ node
//!   dials 127.0.0.1:P        one socket a connection              hears from 127.0.0.1:Q
//! ```
//!
//! In the order in which a datagram goes:
//! * [`protocol`]: what the node tells the process (which sockets to use) and hears from it, over a packet socket pair;
//! * [`helper`]: the process, one thread that sleeps on all sockets;
//! * `connection`: one connection, its TLS state and its UDP socket;
//! * [`framing`]: datagrams in a stream of bytes;
//! * `tls`: certificates and who is believed.
//!
//! It holds no key of the tunnel and sees sealed datagrams only: what TLS adds is that middle boxes let them pass, and neither
//! side's certificate is proof of anything. Its end is the end of the paths over it, nothing else. It has no rights: the node
//! opens the sockets that need some and hands them over.

pub mod framing;
pub mod helper;
pub mod protocol;

mod connection;
mod tls;
