//! Every system call of the product, behind small safe types.
//!
//! Nothing above this crate contains `unsafe` for the sake of Linux, and nothing in this crate knows
//! what a tunnel is. A guided tour, in the order a gateway uses the parts:
//!
//! 1. [`process`]: an instance lock, resource limits; [`privileges`]: rights given up; [`launcher`]: programs started by another process;
//!    [`sandbox`]: calls and files that this one needs, and no others; [`affinity`]: which CPUs we may use and pinning;
//!    [`cpu_load`]: who waits for a CPU, and which is idle.
//! 2. [`netns`]: network namespaces, entering a user namespace as an ordinary user, programs inside.
//! 3. [`netlink`]: links, addresses, routes, rules, neighbors, and a [`netlink::Monitor`] which tells
//!    when an interface comes, goes, loses its carrier or changes its address. [`ethtool`]: offloads.
//! 4. [`tun`]: a multi-queue TUN device with super-packets (`vnet_hdr`, TSO and USO).
//! 5. [`udp`]: UDP sockets with GSO and GRO, bound to a device, alone or as a group in core order.
//! 6. [`bpf`]: the classic program which picks the socket by the receiving core, and the program
//!    which makes a TUN device pick its queue by our own flow hash.
//! 7. [`event`] and [`clock`]: what a worker sleeps on (epoll, eventfd, timerfd, signalfd) and its time.
//! 8. [`packet_ring`] and [`packet_sender`]: the frames of a plain interface, one ring per core, super-packets
//!    whole. [`ingress_guard`]: the kernel's own stack does not see them, and [`forward_guard`]: it does not
//!    forward them when the process has died. [`forward_leads`]: port forwards for the host's other devices. [`own_tables`]: what of
//!    these outlives the process. [`raw_ip`]: packets to neighbors that the kernel has to find first. [`link_layer`]: which devices have an Ethernet header, and which none.
//! 9. [`iptables_legacy`]: chains of the host's firewall that netlink does not show. [`router_discovery`]: router
//!    advertisements as they come in.
//! 10. [`packet_socket`]: raw Ethernet frames of one interface, for the link emulator.
//!
//! [`memory`] is the allocator of the product: huge pages for large tables.
//!
//! Everything that a worker calls per packet is non-blocking and returns [`std::io::Result`], where
//! `WouldBlock` means "nothing now". Everything that is called while configuring returns [`Result`],
//! whose error says what was tried.

pub mod affinity;
pub mod bpf;
pub mod clock;
pub mod cpu_load;
mod error;
pub mod ethtool;
pub mod event;
pub mod forward_guard;
pub mod forward_leads;
pub mod ingress_guard;
pub mod iptables_legacy;
pub mod launcher;
pub mod link_layer;
pub mod memory;
pub mod netlink;
pub mod netns;
mod nft;
pub mod own_tables;
pub mod packet_ring;
pub mod packet_sender;
pub mod packet_socket;
pub mod privileges;
pub mod process;
pub mod raw_ip;
pub mod router_discovery;
pub mod sandbox;
pub mod socket_list;
mod sys;
pub mod tcp;
pub mod testing;
pub mod tun;
pub mod udp;

pub use error::{Error, Result};
