//! A network in one machine: two sites, emulated links between them, real traffic over them.
//!
//! A guided tour, in the order data flows:
//!
//! 1. [`traffic`] sends TCP and UDP from a node and checks every byte at the other end.
//! 2. [`topology`] is what it runs over: nodes in network namespaces, joined by virtual cables, and [`program`]s
//!    such as a gateway inside them.
//! 3. [`emulator`] stands in the middle of each cable and carries the frames in real time.
//! 4. [`link`] is the model that tells when a packet arrives, or that it does not, repeatably for a seed.
//!
//! [`cluster`] is another network: machines that share their interfaces; [`hash_balancer`] is what that is measured against.
//!
//! Everything is gone when the [`topology::Testbed`] is dropped, and when the process ends in any other way. [`stop`]
//! ends what runs after a Ctrl-C.

pub mod cluster;
pub mod emulator;
pub mod hash_balancer;
pub use sim::link;
pub mod program;
pub mod stop;
pub mod topology;
pub mod traffic;

use anyhow::Context;

/// Where the right to make namespaces came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Privilege {
    /// The process has it.
    Root,
    /// The process is now root of a user namespace of its own. Some things stay refused, such as BPF programs.
    UserNamespace,
}

/// Makes sure that this process may make network namespaces: as an ordinary user it becomes root of a user namespace of
/// its own. Call it in `main` before any thread exists.
pub fn gain_privilege() -> anyhow::Result<Privilege> {
    if linux::netns::is_privileged() {
        return Ok(Privilege::Root);
    }
    linux::netns::enter_user_namespace()
        .context("network namespaces are needed here: run it as root, or allow user namespaces")?;
    Ok(Privilege::UserNamespace)
}
