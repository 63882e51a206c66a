//! Many machines behind one interface (seed 002, rows D1–D12).
//!
//! Sans-IO: no clock, no I/O. In the order data flows:
//!
//! 1. [`encapsulation`]: the L1 and L2 headers between units, byte by byte.
//! 2. [`message`]: what manager and units say to each other, byte by byte.
//! 3. [`mod@unit`]: a unit's side: it takes tables, publishes what its cores work by, and acknowledges.
//! 4. [`manager`]: the manager's side: who takes part, the next table, and how it comes into force.
//! 5. [`scale`]: how many data planes there should be.
//! 6. [`snapshot`]: the members, as the cores of one of them go by them.
//!
//! Who owns a packet is [`steering::units`].

mod codec;
pub mod encapsulation;
pub mod hardware_address;
pub mod manager;
pub mod message;
pub mod scale;
pub mod snapshot;
pub mod unit;
