//! The programs we give the kernel, so that it hands each packet to the core that owns it.
//!
//! * [`reuseport_program`]: classic BPF, needs no privilege. Picks the UDP socket of a group by the receiving
//!   core byte of the tunnel header.
//! * [`SteeringProgram`]: eBPF, needs CAP_BPF (root). Makes a TUN device pick its queue by the very hash and
//!   bucket table that the engine uses ([`::steering::symmetric`], [`packet::flow`]), so that a packet is
//!   read on the core that owns its flow. Without it the kernel's own flow table and the engine's ring do the
//!   same work, only slower.
//! * [`KernelShare`]: which frames of an interface stay with the kernel's own stack. The same program as a
//!   filter of packet sockets (classic, no privilege) and at the interface (eBPF).
//! * [`INGRESS_MARK`]: the way by which frames for the host come in again by their device (eBPF).
//! * [`OwnPorts`]: the way of the host's packets from ports that translated flows have (eBPF).
//! * [`LoopbackRedirect`]: the way from the host to addresses of its own that are served elsewhere (eBPF).

mod assembler;
mod classic;
pub(crate) mod device_egress;
pub(crate) mod kernel;
mod loopback;
mod port_counts;
mod reuseport;
mod share;
mod steering;

pub use self::device_egress::{INGRESS_MARK, OWN_MARK, OwnPorts};
pub use self::loopback::LoopbackRedirect;
pub use self::port_counts::PortCounts;
pub use self::reuseport::{Instruction, attach_reuseport, reuseport_program};
pub(crate) use self::share::nft_ether_type;
pub use self::share::{ADDRESSES_MAX, KernelShare, MACS_MAX, UDP_PORTS_MAX};
pub use self::steering::{SteeringProgram, TABLE_BUCKETS_MAX};
