//! Everything around the data path: configuration, the host, operators' commands.
//!
//! A guided tour, in the order things happen when a node starts:
//!
//! 1. [`config`] reads the one TOML file and says everything that is wrong with it at once; [`key`] reads keys.
//! 2. [`event_loop`] takes the instance lock and sleeps until something happens; `events` are what other threads send it.
//!    `node` is what it runs: TUN interface, engine, WANs. [`timestamp_floor`] keeps the one number that must survive a
//!    restart.
//! 3. [`host_facts`] reads devices, addresses, routes and sysctls. [`wans`] turns devices into WANs; [`route_plan`] says
//!    which routes and rules the host should have for them and for allowed-ips; [`kernel_routes`] puts those into the
//!    kernel and takes them out again; `device_settings` keeps single settings. [`nic_hash`] predicts queues of network cards. [`peer_names`] asks for DNS names of peers, again and again.
//! 4. [`gateway`] is all that is not the tunnel; `health_process` starts the process that checks its backends.
//! 5. [`control_socket`] takes operators' requests, which [`protocol`] describes; `commands` carries
//!    them out; [`reload`]
//!    compares configurations; [`status`] is everything that is shown.
//!
//! Modules that decide are pure and tested as such ([`config`], [`wans`], [`route_plan`], [`peer_names`], [`reload`],
//! [`gateway::policy`], [`status`]); those that touch the system are thin. There is no runtime: one thread sleeps on a few
//! descriptors, name look-ups and control connections have short-lived threads of their own. No module uses one that,
//! directly or not, uses it.

mod cluster_link;
mod commands;
pub mod config;
pub mod control_socket;
mod copies;
mod device_settings;
pub mod event_loop;
mod events;
mod files;
pub mod gateway;
pub mod handover;
mod health_process;
mod host_checks;
pub mod host_facts;
pub mod host_ports;
pub mod kernel_routes;
pub mod key;
mod lan;
mod nat64;
pub mod nic_hash;
mod node;
pub mod peer_names;
pub mod protocol;
mod refusals;
pub mod reload;
pub mod route_plan;
mod shared_devices;
pub mod status;
mod sync;
mod takeover;
pub mod timestamp_floor;
mod tls_paths;
mod unit_key;
mod wan_changes;
mod wan_use;
pub mod wans;
mod warn_once;

pub use node::{StartError, host_warnings};
pub use refusals::refusals;
