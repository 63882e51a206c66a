//! Ethernet frames between a TAP device and the bonds of peers (row T14): a switch, pure and the same at every core.
//!
//! * [`mod@switch`]: the decision about a frame.
//! * `stations`: where stations are; `neighbors`: who has which address; `aged`: the table behind both.
//! * `probe`: protection against loops.

mod aged;
mod neighbors;
mod probe;
mod stations;
pub mod switch;
#[cfg(test)]
mod tests;

use packet::attachment::BondId;

pub use stations::Station;
pub use switch::{News, Settings, Switch, SwitchCounters, Verdict};

const SECOND_NS: u64 = 1_000_000_000;

/// One side of the switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Port {
    /// The TAP device, and the LAN behind it.
    Tap,
    /// The bond of a peer.
    Bond(BondId),
}
