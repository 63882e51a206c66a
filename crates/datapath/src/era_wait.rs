//! Packets of other units whose era is not held here yet: they wait for its table, briefly, and within a bound (row D6).
//!
//! Only a packet that would begin a flow waits: one of a flow that is here needs no table, and one whose chain goes on goes on.

use std::collections::VecDeque;

use packet::{PacketBuf, PacketPool};

/// Most packets of a core that wait.
const WAITING_MAX: usize = 256;

/// Time after which a table that has not come does not come.
const PATIENCE_NS: u64 = 200_000_000;

/// Packets that wait, oldest first.
#[derive(Debug, Default)]
pub(crate) struct EraWait {
    waiting: VecDeque<(u64, PacketBuf)>,
    /// Tables came since the last look.
    news: bool,
}

impl EraWait {
    /// Keeps a packet, whose buffer becomes another one; `false`: too many wait.
    pub fn push(&mut self, now_ns: u64, packet: &mut PacketBuf, pool: &mut PacketPool) -> bool {
        if self.waiting.len() >= WAITING_MAX {
            return false;
        }
        let spare = pool.take(packet.capacity());
        let packet = std::mem::replace(packet, spare);
        self.waiting.push_back((now_ns.saturating_add(PATIENCE_NS), packet));
        true
    }

    /// Keeps a packet that was looked at again in vain, until its time is over.
    pub fn push_again(&mut self, until_ns: u64, packet: PacketBuf) {
        self.waiting.push_back((until_ns, packet));
    }

    /// Other tables are in force: all are looked at again.
    pub fn tables_came(&mut self) {
        self.news = !self.waiting.is_empty();
    }

    /// Packets to look at again now, and whether they may wait once more.
    pub fn take(&mut self, now_ns: u64) -> (VecDeque<(u64, PacketBuf)>, bool) {
        if std::mem::take(&mut self.news) {
            return (std::mem::take(&mut self.waiting), true);
        }
        let late = self.waiting.partition_point(|(until_ns, _)| *until_ns <= now_ns);
        let rest = self.waiting.split_off(late);
        (std::mem::replace(&mut self.waiting, rest), false)
    }

    /// When the oldest has waited long enough.
    pub fn due_ns(&self) -> Option<u64> {
        self.waiting.front().map(|(until_ns, _)| *until_ns)
    }
}
