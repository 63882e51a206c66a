//! Which rules the two addresses of a packet satisfy: one trie for the prefixes of all rules and groups (row R5).
//!
//! An *address set* is a group, or the prefixes that one side of a rule lists. A prefix of the trie has the sets that
//! list it, and its *class*: these and the sets of every shorter prefix around it. So one longest match gives
//! all sets that an address is in. Equal classes are one; for each the rules are known that its sets satisfy
//! as source and as destination.
//!
//! A group's change touches its changed prefixes and the prefixes inside these, nothing else.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use hashbrown::HashMap;
use ipnet::IpNet;
use prefix_trie::joint::JointPrefixMap;

use super::bits::{Bits, Dense, Pair};

/// Number of an address set; groups come first, in their order.
pub(super) type SetId = u32;

/// Fixed: the order of the hash is never seen, and what is hashed is the operator's.
type Hasher = crate::hash::ConfigState;

/// Classes that nothing uses any more, beyond the number of prefixes, before all are made anew.
const UNUSED_CLASSES: usize = 1_024;

/// Sides that are fixed while groups change: which rules name which sets.
#[derive(Clone, Debug, Default)]
pub(super) struct Sides {
    /// By set: the rules that name it as source.
    pub(super) sources: Vec<Vec<u16>>,
    /// By set: the rules that name it as destination.
    pub(super) destinations: Vec<Vec<u16>>,
    /// Rules that take any source.
    pub(super) any_source: Bits,
    /// Rules that take any destination.
    pub(super) any_destination: Bits,
    /// Number of rules.
    pub(super) rules: usize,
}

/// Addresses that are in the same sets.
#[derive(Debug)]
struct Class {
    /// Ascending.
    sets: Arc<[SetId]>,
    /// Rules satisfied by such a source.
    source: Bits,
    /// Rules satisfied by such a destination.
    destination: Bits,
}

/// A prefix of the trie.
#[derive(Clone, Debug)]
struct Node {
    /// The sets that list this very prefix, ascending.
    own: Arc<[SetId]>,
    /// Place in [`Addresses::classes`].
    class: u32,
}

/// The trie and its classes.
#[derive(Clone, Debug, Default)]
pub(super) struct Addresses {
    trie: JointPrefixMap<IpNet, Node>,
    classes: Vec<Arc<Class>>,
    numbers: HashMap<Arc<[SetId]>, u32, Hasher>,
}

impl Addresses {
    /// Of all (prefix, set) pairs.
    pub(super) fn compile(mut members: Vec<(IpNet, SetId)>, sides: &Sides) -> Self {
        members.sort_unstable();
        members.dedup();
        let mut addresses = Self::default();
        for same in members.chunk_by(|(one, _), (other, _)| one == other) {
            let own: Arc<[SetId]> = same.iter().map(|&(_, set)| set).collect();
            if let Some(&(prefix, _)) = same.first() {
                addresses.trie.insert(prefix, Node { own, class: 0 });
            }
        }
        addresses.classify_all(sides);
        addresses
    }

    /// From now on `set` lists `added` too and `removed` no longer.
    pub(super) fn change(&mut self, set: SetId, added: &[IpNet], removed: &[IpNet], sides: &Sides) {
        for &prefix in removed {
            self.list(prefix, set, false);
        }
        for &prefix in added {
            self.list(prefix, set, true);
        }
        if self.classes.len() > self.trie.len() + UNUSED_CLASSES {
            self.classify_all(sides);
            return;
        }
        let mut touched = BTreeSet::new();
        for prefix in added.iter().chain(removed) {
            touched.extend(self.trie.children(prefix).map(|(inner, _)| inner));
        }
        for prefix in touched {
            self.classify(&prefix, sides);
        }
    }

    /// The rules that take these addresses: by source, by destination.
    #[inline]
    pub(super) fn pairs<'a>(&'a self, src: IpAddr, dst: IpAddr, sides: &'a Sides) -> [Pair<'a>; 2] {
        let source = self.class_of(src).map(|class| &class.source);
        let destination = self.class_of(dst).map(|class| &class.destination);
        [Pair { any: &sides.any_source, met: source }, Pair { any: &sides.any_destination, met: destination }]
    }

    /// The sets that an address is in, ascending.
    pub(super) fn sets_of(&self, address: IpAddr) -> &[SetId] {
        self.class_of(address).map_or(&[], |class| &class.sets)
    }

    /// The longest prefix around an address that `set` lists.
    pub(super) fn prefix_of(&self, address: IpAddr, set: SetId) -> Option<IpNet> {
        let around = self.trie.cover(&IpNet::from(address));
        around.filter(|(_, node)| node.own.contains(&set)).map(|(prefix, _)| prefix).last()
    }

    /// Number of prefixes.
    pub(super) fn len(&self) -> usize {
        self.trie.len()
    }

    /// Prefixes that are in the other trie with the same list of sets and the same class.
    #[cfg(test)]
    pub(super) fn shared_with(&self, other: &Self) -> usize {
        let same = |(prefix, node): &(IpNet, &Node)| {
            let node_there = other.trie.get(prefix);
            node_there.is_some_and(|there| Arc::ptr_eq(&there.own, &node.own) && there.class == node.class)
        };
        self.trie.iter().filter(same).count()
    }

    /// Number of classes, those included that nothing uses any more.
    pub(super) fn classes(&self) -> usize {
        self.classes.len()
    }

    #[inline]
    fn class_of(&self, address: IpAddr) -> Option<&Class> {
        let (_, node) = self.trie.get_lpm(&IpNet::from(address))?;
        self.classes.get(node.class as usize).map(Arc::as_ref)
    }

    /// Adds or takes away a set at one prefix; the class is made later.
    fn list(&mut self, prefix: IpNet, set: SetId, listed: bool) {
        let old = self.trie.get(&prefix);
        let mut own: Vec<SetId> = old.map_or_else(Vec::new, |node| node.own.to_vec());
        own.retain(|&other| other != set);
        if listed {
            own.push(set);
            own.sort_unstable();
        }
        if own.is_empty() {
            self.trie.remove(&prefix);
        } else {
            let class = old.map_or(0, |node| node.class);
            self.trie.insert(prefix, Node { own: own.into(), class });
        }
    }

    fn classify_all(&mut self, sides: &Sides) {
        self.classes.clear();
        self.numbers.clear();
        let prefixes: Vec<IpNet> = self.trie.keys().collect();
        for prefix in prefixes {
            self.classify(&prefix, sides);
        }
    }

    /// Finds or makes the class of one prefix of the trie.
    fn classify(&mut self, prefix: &IpNet, sides: &Sides) {
        let mut sets: Vec<SetId> =
            self.trie.cover_values(prefix).flat_map(|node| node.own.iter().copied()).collect();
        sets.sort_unstable();
        sets.dedup();
        let number = match self.numbers.get(sets.as_slice()) {
            Some(&number) => number,
            None => self.add_class(sets.into(), sides),
        };
        if let Some(node) = self.trie.get_mut(prefix) {
            node.class = number;
        }
    }

    fn add_class(&mut self, sets: Arc<[SetId]>, sides: &Sides) -> u32 {
        let rules = |of: &[Vec<u16>]| {
            let mut all = Dense::new(sides.rules);
            let named = sets.iter().filter_map(|&set| of.get(set as usize));
            named.flatten().for_each(|&rule| all.insert(rule));
            all.compress()
        };
        let class = Class {
            source: rules(&sides.sources),
            destination: rules(&sides.destinations),
            sets: sets.clone(),
        };
        let number = self.classes.len() as u32;
        self.classes.push(Arc::new(class));
        self.numbers.insert(sets, number);
        number
    }
}
