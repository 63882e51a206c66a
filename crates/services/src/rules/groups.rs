//! Named sets of addresses that change while the gateway runs (row R5).

use std::collections::BTreeSet;
use std::sync::Arc;

use ipnet::IpNet;

use crate::spec::GroupSpec;

/// One group. A member inside a bigger member of the same group stays a member of its own: it is still there when the
/// bigger one goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    name: String,
    members: BTreeSet<IpNet>,
}

impl Group {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its members, host bits zero, in order.
    pub fn members(&self) -> impl ExactSizeIterator<Item = IpNet> + '_ {
        self.members.iter().copied()
    }
}

/// All groups, in the order of [`crate::spec::GatewaySpec::groups`]. Cheap to copy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Groups(Vec<Arc<Group>>);

impl Groups {
    /// Takes the operator's groups.
    ///
    /// # Errors
    /// When two have the same name.
    pub fn new(specs: &[GroupSpec]) -> Result<Self, String> {
        let mut groups = Self::default();
        for spec in specs {
            if groups.names().any(|name| name == spec.name) {
                return Err(format!("group \"{}\" is there twice: give each its own name", spec.name));
            }
            let members = spec.members.iter().map(IpNet::trunc).collect();
            groups.0.push(Arc::new(Group { name: spec.name.clone(), members }));
        }
        Ok(groups)
    }

    /// The group at a place of the list.
    #[must_use]
    pub fn by_place(&self, place: usize) -> Option<&Group> {
        self.0.get(place).map(Arc::as_ref)
    }

    /// All of them, in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &Group> {
        self.0.iter().map(Arc::as_ref)
    }

    /// Their names, in order.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.iter().map(Group::name)
    }

    /// Gives one group other members; what that adds and removes.
    pub(super) fn replace(&mut self, place: usize, members: &[IpNet]) -> (Vec<IpNet>, Vec<IpNet>) {
        let Some(group) = self.0.get_mut(place) else { return Default::default() };
        let members: BTreeSet<IpNet> = members.iter().map(IpNet::trunc).collect();
        let added: Vec<IpNet> = members.difference(&group.members).copied().collect();
        let removed: Vec<IpNet> = group.members.difference(&members).copied().collect();
        if !added.is_empty() || !removed.is_empty() {
            *group = Arc::new(Group { name: group.name.clone(), members });
        }
        (added, removed)
    }
}
