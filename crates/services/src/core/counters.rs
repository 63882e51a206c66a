//! What one core counts.

/// Counts of one core since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Counters {
    /// Packets read (each segment of a super-packet counts as one frame here).
    pub rx_packets: u64,
    /// Bytes of IP packets read.
    pub rx_bytes: u64,
    /// Packets that went on.
    pub tx_packets: u64,
    /// Bytes of IP packets that went on.
    pub tx_bytes: u64,
    /// Packets to the host's own stack.
    pub to_host: u64,
    /// Flows begun.
    pub flows_opened: u64,
    /// Flows ended.
    pub flows_closed: u64,
    /// Packets handed to another core.
    pub handed_out: u64,
    /// Packets that another core handed to this one.
    pub handed_in: u64,
    /// Replies of flows with a source port of ours that another core had to hand over: 0 unless buckets moved.
    pub replies_on_wrong_core: u64,
    /// Flows decided again after a reload.
    pub decided_again: u64,
    /// Flows that a reload's new rules ended.
    pub flows_refused: u64,
    /// ICMP errors and resets made here.
    pub answers: u64,
}
