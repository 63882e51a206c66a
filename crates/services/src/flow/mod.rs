//! The flow table of one core, and what it keeps of a flow.

mod record;

pub use record::{Direction, Record, flags};
