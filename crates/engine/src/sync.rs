//! Atomics and fences: the standard library's, or loom's where a test explores every interleaving
//! (`RUSTFLAGS="--cfg loom" cargo test -p engine --lib loom`).

#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicBool, AtomicU64, fence};
#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{AtomicBool, AtomicU64, fence};
