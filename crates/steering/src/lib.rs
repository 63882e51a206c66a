//! Who owns a flow: one crate for links, cores and machines.
//!
//! Pure computation: no clock, no I/O, no threads, no randomness of its own. Time, seeds and random
//! words are passed in. The tour, in the order a packet meets the parts:
//!
//! 1. [`toeplitz`]: the linear hash that network cards use. Any key, any input order; reproduces the
//!    official verification vectors, so it predicts a card's queue.
//! 2. [`symmetric`]: our own use of it. Endpoints in canonical order under a secret key, so that both
//!    directions of a flow have one hash. Its module page is the definition, byte by byte, which a
//!    BPF program and a peer reproduce.
//! 3. [`table`]: hash → bucket → owner. A table has an era; each bucket has a chain of earlier owners.
//!    The page also defines the table's wire form.
//! 4. [`assign`]: the next table when units come, go or change weight: exact quotas, as few moves as
//!    possible, histories kept short.
//! 5. [`era`]: which table serves a packet while two are in force, and when the next change may start. [`owner_chain`]: who
//!    is asked about a packet of a bucket that moved, and who may begin a flow.
//! 6. [`cores`], [`policy`]: a sender's choice among the receiver's cores: by the receiver's table, or
//!    round robin, at random, or least loaded, with a bounded register of flows.
//! 7. [`port_solver`]: the inverse: a source port whose replies come back to a wanted core, in O(1).
//! 8. [`ownership`]: hash, its inverse, table and working cores as one value: what a node's tunnel, interfaces and kernel
//!    programs share, and the chain of cores to ask about a packet.
//! 9. [`units`]: the same for the machines of a cluster: the manager's key, the tables of two eras, port leases, and what a
//!    unit does with a packet of a flow that it does not have.
//! 10. [`vote`]: cores tell their load, an arbiter moves a few buckets; cores that hang are found.
//! 11. [`distribution`]: other ways to give packets to cores, to compare with the table.
//!
//! ```
//! use steering::symmetric::FlowHasher;
//! use steering::table::{BucketTable, Unit};
//!
//! let hasher = FlowHasher::new([0x5a; 40]);
//! let units: Vec<Unit> = (0..4).map(|id| Unit { id, weight: 1 }).collect();
//! let table = BucketTable::new(128, &units)?;
//! let flow = packet::flow::FlowKey {
//!     src: "10.0.0.5".parse().unwrap(),
//!     dst: "1.2.3.4".parse().unwrap(),
//!     src_port: 1234,
//!     dst_port: 443,
//!     protocol: 6,
//! };
//! let hash = hasher.hash(&flow, 0);
//! assert_eq!(hash, hasher.hash(&flow.reversed(), 0));
//! assert!(table.owner_of_hash(hash) < 4);
//! # Ok::<(), steering::table::TableError>(())
//! ```

pub mod assign;
pub mod cores;
pub mod distribution;
pub mod era;
pub mod owner_chain;
pub mod ownership;
pub mod policy;
pub mod port_solver;
pub mod registry;
pub mod symmetric;
pub mod table;
pub mod toeplitz;
pub mod units;
pub mod vote;
