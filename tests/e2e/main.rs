//! The real program from end to end: gateways in network namespaces, real TCP and UDP through emulated links, every
//! byte verified. Each test names the row of the mission it shows.
//!
//! Run as root or as an ordinary user who may make user namespaces; where neither is allowed the tests fail and say
//! so.
#![allow(clippy::unwrap_used, reason = "tests")]

mod bad_input;
mod capture;
mod cores;
mod demo;
mod download;
mod encryption;
mod mtu;
mod names;
mod paths;
mod reload;
mod scene;
#[path = "../../crates/anabranch/tests/support/mod.rs"]
mod support;
mod wans;
