#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod chains;
mod commands;
mod enrol;
mod harness;
mod heirs;
mod leases;
mod loss;
mod random;
mod restart;
mod rollout;
mod stored;
