//! Many machines behind one interface (seed 002, rows D1–D12).
//!
//! Sans-IO: no clock, no I/O. In the order data flows:
//!
//! 1. [`encapsulation`]: the L1 and L2 headers between units, byte by byte.
//!
//! Who owns a packet is [`steering::units`].

pub mod encapsulation;
