//! Placeholder tour; the integrator rewrites it.
pub mod time;
