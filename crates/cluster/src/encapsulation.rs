//! Headers between the units of a cluster.
