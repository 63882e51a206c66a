//! Members of a cluster as one of them knows them: a snapshot that control publishes and the cores read.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering::Relaxed};

use packet::attachment::InterfaceId;
use steering::units::Units;

use crate::message::{Member, Role};

/// Who has a shared interface now, of the dispatchers that can have it. Outlives snapshots: it changes without the manager.
#[derive(Debug)]
pub struct Holding {
    /// This dispatcher has it. One that stands by takes nothing in and sends nothing out.
    active: AtomicBool,
    /// The dispatcher from which a frame of it came last; [`Holding::NOBODY`] before the first.
    heard: AtomicU16,
}

impl Holding {
    /// No node id is as large.
    const NOBODY: u16 = u16::MAX;

    /// Of an interface that this machine has from the start, or not.
    #[must_use]
    pub fn new(active: bool) -> Self {
        Self { active: AtomicBool::new(active), heard: AtomicU16::new(Self::NOBODY) }
    }

    /// Whether this machine has the interface.
    #[inline]
    #[must_use]
    pub fn is_active(&self) -> bool {
        self.active.load(Relaxed)
    }

    /// It has it from now on, or has it no more; whether that is news.
    pub fn set_active(&self, active: bool) -> bool {
        self.active.swap(active, Relaxed) != active
    }

    /// A frame of it came from `dispatcher`.
    #[inline]
    pub fn hear(&self, dispatcher: u16) {
        // The line is shared by all cores: it is written only when there is news.
        if self.heard.load(Relaxed) != dispatcher {
            self.heard.store(dispatcher, Relaxed);
        }
    }

    /// The dispatcher from which a frame came last.
    #[must_use]
    pub fn heard(&self) -> Option<u16> {
        Some(self.heard.load(Relaxed)).filter(|node| *node != Self::NOBODY)
    }
}

impl PartialEq for Holding {
    fn eq(&self, other: &Self) -> bool {
        (self.is_active(), self.heard()) == (other.is_active(), other.heard())
    }
}

impl Eq for Holding {}

/// A shared interface, as this member has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SharedInterface {
    /// Its number in the encapsulation, the same at all members.
    pub ifid: u8,
    /// This member's own interface.
    pub interface: InterfaceId,
    /// Addresses that all members share: what is sent to them is a unit's business and not the dispatcher's.
    pub addresses: Vec<IpAddr>,
    /// Node ids of the dispatchers that have it; empty: all have.
    pub dispatchers: Vec<u16>,
    /// Who has it now.
    pub holding: Arc<Holding>,
}

/// The cluster, as this member's cores go by it.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Grows with each snapshot: [`crate::unit::Snapshot::number`].
    pub number: u64,
    /// Duty of this member.
    pub role: Role,
    /// Who owns what.
    pub units: Arc<Units>,
    /// Members, by node id.
    pub members: Vec<Member>,
    /// Data planes in the order in which they were added: the chain of broadcasts (row D8).
    pub order: Vec<u16>,
    /// Shared interfaces.
    pub shared: Vec<SharedInterface>,
    /// UDP port at the shared addresses at which the units are one hub for bonds of others (row R6); `None`: they are none.
    pub hub_port: Option<u16>,
    /// A dispatcher answers frames that do not fit one datagram with "too big"; else the bond takes them in pieces (row D11).
    pub answers_too_big: bool,
}

impl Snapshot {
    /// A member by its node id.
    #[must_use]
    pub fn member(&self, node: u16) -> Option<&Member> {
        let place = self.members.binary_search_by_key(&node, |member| member.node).ok()?;
        self.members.get(place)
    }

    /// This member.
    #[must_use]
    pub fn own(&self) -> Option<&Member> {
        self.member(self.units.node)
    }

    /// Number of a shared interface in the encapsulation; `None`: it belongs to this machine alone.
    #[inline]
    #[must_use]
    pub fn ifid(&self, interface: InterfaceId) -> Option<u8> {
        self.shared.iter().find(|shared| shared.interface == interface).map(|shared| shared.ifid)
    }

    /// Whether this member, a dispatcher, has the interface of that number now.
    #[must_use]
    pub fn is_active(&self, ifid: u8) -> bool {
        self.shared.iter().any(|shared| shared.ifid == ifid && shared.holding.is_active())
    }

    /// This member's interface of a number.
    #[inline]
    #[must_use]
    pub fn interface(&self, ifid: u8) -> Option<InterfaceId> {
        self.shared.iter().find(|shared| shared.ifid == ifid).map(|shared| shared.interface)
    }

    /// The dispatcher by which a packet leaves a shared interface: the one that took it in, if it has the interface;
    /// else one of those that have it, by `hash`.
    #[must_use]
    pub fn dispatcher(&self, ifid: u8, taken_in_by: Option<u16>, hash: u32) -> Option<u16> {
        let shared = self.shared.iter().find(|shared| shared.ifid == ifid)?;
        let named = |node: u16| shared.dispatchers.is_empty() || shared.dispatchers.contains(&node);
        let has = |member: &&Member| member.role.dispatches() && named(member.node);
        if let Some(member) = taken_in_by.and_then(|node| self.member(node)).filter(has) {
            return Some(member.node);
        }
        let count = self.members.iter().filter(has).count();
        self.members.iter().filter(has).nth(hash as usize % count.max(1)).map(|member| member.node)
    }

    /// The dispatcher by which something of this member itself leaves a shared interface: the one that was heard last, if it
    /// has it still.
    #[must_use]
    pub fn dispatcher_now(&self, ifid: u8) -> Option<u16> {
        let heard = self.shared.iter().find(|shared| shared.ifid == ifid)?.holding.heard();
        self.dispatcher(ifid, heard, 0)
    }

    /// The dispatcher after this one, in the order of node ids, that can have a shared interface: where a packet goes that
    /// is to leave by an interface which this one does not have now.
    #[must_use]
    pub fn other_dispatcher(&self, ifid: u8) -> Option<u16> {
        let shared = self.shared.iter().find(|shared| shared.ifid == ifid)?;
        let own = self.units.node;
        let named = |node: u16| shared.dispatchers.is_empty() || shared.dispatchers.contains(&node);
        let others = || {
            let members = self.members.iter().filter(|member| member.role.dispatches());
            members.map(|member| member.node).filter(|node| *node != own && named(*node))
        };
        others().find(|node| *node > own).or_else(|| others().next())
    }

    /// The data plane that gets a broadcast after this one; the first for a dispatcher.
    #[must_use]
    pub fn next_in_chain(&self) -> Option<u16> {
        let place = self.order.iter().position(|node| *node == self.units.node);
        self.order.get(place.map_or(0, |place| place + 1)).copied()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use steering::era::Eras;
    use steering::symmetric::FlowHasher;
    use steering::table::BucketTable;
    use steering::units::Leases;

    use super::*;

    fn member(node: u16, role: Role) -> Member {
        let address = format!("10.9.0.{node}").parse().unwrap();
        Member { node, role, weight: 1, address }
    }

    fn shared(ifid: u8, interface: u16, dispatchers: &[u16]) -> SharedInterface {
        let interface = InterfaceId(interface);
        SharedInterface {
            ifid,
            interface,
            addresses: Vec::new(),
            dispatchers: dispatchers.to_vec(),
            holding: Arc::new(Holding::new(true)),
        }
    }

    fn snapshot(node: u16) -> Snapshot {
        let table = BucketTable::from_owners(0, vec![5; 4]).unwrap();
        let (eras, hasher) = (Eras::new(table), FlowHasher::new([7; 40]));
        Snapshot {
            number: 1,
            role: Role::DataPlane,
            units: Arc::new(Units { node, hasher, eras, in_force: 0, leases: Leases::default() }),
            members: vec![
                member(1, Role::Dispatcher),
                member(2, Role::Dispatcher),
                member(5, Role::DataPlane),
                member(7, Role::DataPlane),
            ],
            order: vec![7, 5],
            shared: vec![shared(1, 4, &[2]), shared(0, 3, &[])],
            hub_port: None,
            answers_too_big: true,
        }
    }

    #[test]
    fn a_packet_leaves_by_the_dispatcher_that_took_its_flow_in_if_it_has_the_interface() {
        let snapshot = snapshot(5);
        assert_eq!(snapshot.dispatcher(0, Some(1), 0), Some(1));
        assert_eq!(snapshot.dispatcher(1, Some(1), 3), Some(2), "1 does not have it");
        assert_eq!([0, 1, 2].map(|hash| snapshot.dispatcher(0, None, hash)), [Some(1), Some(2), Some(1)]);
        assert_eq!(snapshot.dispatcher(9, Some(1), 0), None);
        assert_eq!(snapshot.dispatcher(0, Some(5), 1), Some(2), "a data plane sends nothing out");
    }

    #[test]
    fn who_was_heard_last_has_the_interface_while_it_is_a_member() {
        let mut snapshot = snapshot(5);
        assert_eq!(snapshot.dispatcher_now(0), Some(1), "nobody was heard");
        snapshot.shared[1].holding.hear(2);
        assert_eq!(snapshot.dispatcher_now(0), Some(2));
        snapshot.members.remove(1);
        assert_eq!(snapshot.dispatcher_now(0), Some(1), "2 is gone");
        assert_eq!(snapshot.dispatcher_now(9), None);
    }

    #[test]
    fn who_stands_by_knows_the_next_one() {
        assert_eq!([1, 2].map(|node| snapshot(node).other_dispatcher(0)), [Some(2), Some(1)]);
        assert_eq!([1, 2].map(|node| snapshot(node).other_dispatcher(1)), [Some(2), None]);
        let holding = Holding::new(false);
        assert!(holding.set_active(true) && !holding.set_active(true) && holding.is_active());
    }

    #[test]
    fn broadcasts_go_along_the_order_of_addition() {
        assert_eq!([1, 7, 5].map(|node| snapshot(node).next_in_chain()), [Some(7), Some(5), None]);
    }

    #[test]
    fn interfaces_have_a_number_of_the_cluster() {
        let snapshot = snapshot(5);
        assert_eq!((snapshot.ifid(InterfaceId(4)), snapshot.ifid(InterfaceId(9))), (Some(1), None));
        assert_eq!((snapshot.interface(1), snapshot.interface(4)), (Some(InterfaceId(4)), None));
        assert_eq!(snapshot.own().map(|member| member.node), Some(5));
    }
}
