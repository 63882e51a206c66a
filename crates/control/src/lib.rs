//! Everything around the data path: what the operator writes, what the host does, what people ask.
//!
//! A guided tour, in the order things happen when a gateway starts:
//!
//! 1. [`config`] reads the one TOML file and says everything that is wrong with it at once; [`key`] reads keys.
//! 2. [`up`] takes the instance lock, makes the TUN interface, starts the engine and then sleeps until something
//!    happens; [`state`] keeps the one number that must survive a restart.
//! 3. [`wan`] turns the host's interfaces into WANs; [`plan`] says which routes and rules the host should have for them
//!    and for allowed-ips; [`host`] puts those into the kernel and takes them out again.
//! 4. [`resolve`] asks for DNS names, again and again.
//! 5. What is not the tunnel: `router` tells the engine, through [`handle`], what [`spec`] makes of the configuration,
//!    the host and what was changed by command ([`live`]); [`addresses`] keeps addresses on devices, [`pools`] finds
//!    those that cannot be used, [`health`] checks backends, [`nat_log`] writes who had which port, [`show`] makes text of it.
//! 6. [`socket`] answers commands; [`report`] shows the state, [`reload`] compares configurations.
//!
//! What decides is pure and tested as such ([`config`], [`wan`], [`plan`], [`resolve`], [`reload`], [`report`]); what
//! touches the system is thin. There is no runtime: one thread sleeps on a few descriptors, name look-ups and control
//! connections have short-lived threads of their own.

pub mod addresses;
pub mod config;
mod gateway;
pub mod handle;
pub mod health;
pub mod host;
pub mod key;
pub mod live;
pub mod nat_log;
pub mod plan;
pub mod pools;
pub mod reload;
pub mod report;
pub mod resolve;
mod router;
pub mod show;
pub mod socket;
pub mod spec;
pub mod state;
pub mod up;
pub mod wan;

pub use gateway::host_warnings;
