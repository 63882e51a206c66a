//! Why something is not taken over, and how often.

/// Reason for not taking an entry over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[repr(u8)]
pub enum Refusal {
    /// It contradicts itself.
    #[error("malformed")]
    Malformed = 0,
    /// Its interface or peer is no more.
    #[error("interface gone")]
    Interface = 1,
    /// Its tenant is no more, or another one's packets come in there.
    #[error("tenant gone")]
    Tenant = 2,
    /// Its port forward, virtual server or backend is no more, or leads elsewhere.
    #[error("service gone")]
    Service = 3,
    /// Its NAT rule is no more, or translates otherwise.
    #[error("NAT rule gone")]
    Rule = 4,
    /// Its outside address is not one of that rule any more.
    #[error("address gone")]
    Address = 5,
    /// Its outside port is not one of that rule's or client's any more, or somebody else has it.
    #[error("port not free")]
    Port = 6,
    /// The firewall refuses it now.
    #[error("firewall")]
    Firewall = 7,
    /// A new flow would be translated otherwise.
    #[error("translated otherwise")]
    Translation = 8,
    /// A limit is reached: of flows, of its client, of its server.
    #[error("limit")]
    Limit = 9,
    /// Its packets come to another core.
    #[error("other core")]
    Core = 10,
    /// It is there already.
    #[error("already there")]
    Known = 11,
    /// It was silent for too long.
    #[error("expired")]
    Expired = 12,
}

impl Refusal {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 13] = [
        Self::Malformed,
        Self::Interface,
        Self::Tenant,
        Self::Service,
        Self::Rule,
        Self::Address,
        Self::Port,
        Self::Firewall,
        Self::Translation,
        Self::Limit,
        Self::Core,
        Self::Known,
        Self::Expired,
    ];
}

/// Counts by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Refusals([u64; Refusal::ALL.len()]);

impl Refusals {
    /// One more.
    pub fn add(&mut self, reason: Refusal) {
        self.add_many(reason, 1);
    }

    /// So many more.
    pub fn add_many(&mut self, reason: Refusal, count: u64) {
        if let Some(sum) = self.0.get_mut(reason as usize) {
            *sum += count;
        }
    }

    /// Adds other counts.
    pub fn merge(&mut self, other: &Self) {
        for (sum, more) in self.0.iter_mut().zip(other.0) {
            *sum += more;
        }
    }

    /// All together.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }

    /// Reasons that were counted, and how often.
    pub fn iter(&self) -> impl Iterator<Item = (Refusal, u64)> + '_ {
        Refusal::ALL.into_iter().zip(self.0).filter(|(_, count)| *count > 0)
    }
}
