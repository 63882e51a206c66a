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
            if groups.place(&spec.name).is_some() {
                return Err(format!("group \"{}\" is there twice: give each its own name", spec.name));
            }
            let members = spec.members.iter().map(IpNet::trunc).collect();
            groups.0.push(Arc::new(Group { name: spec.name.clone(), members }));
        }
        Ok(groups)
    }

    /// The group of this name.
    #[must_use]
    pub fn by_name(&self, name: &str) -> Option<&Group> {
        self.0.iter().map(Arc::as_ref).find(|group| group.name == name)
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

    /// As the operator would have written them.
    #[must_use]
    pub fn to_specs(&self) -> Vec<GroupSpec> {
        self.iter()
            .map(|group| GroupSpec { name: group.name.clone(), members: group.members().collect() })
            .collect()
    }

    pub(super) fn place(&self, name: &str) -> Option<usize> {
        self.0.iter().position(|group| group.name == name)
    }

    /// Changes one group; the members that were really added and removed.
    pub(super) fn change(
        &mut self,
        place: usize,
        add: &[IpNet],
        remove: &[IpNet],
    ) -> (Vec<IpNet>, Vec<IpNet>) {
        let Some(group) = self.0.get_mut(place).map(Arc::make_mut) else { return Default::default() };
        let mut removed: BTreeSet<IpNet> =
            remove.iter().map(IpNet::trunc).filter(|member| group.members.remove(member)).collect();
        let mut added = Vec::new();
        for member in add.iter().map(IpNet::trunc) {
            if group.members.insert(member) && !removed.remove(&member) {
                added.push(member);
            }
        }
        (added, removed.into_iter().collect())
    }

    /// Gives one group other members; what that adds and removes.
    pub(super) fn replace(&mut self, place: usize, members: &[IpNet]) -> (Vec<IpNet>, Vec<IpNet>) {
        let Some(group) = self.0.get_mut(place).map(Arc::make_mut) else { return Default::default() };
        let members: BTreeSet<IpNet> = members.iter().map(IpNet::trunc).collect();
        let added = members.difference(&group.members).copied().collect();
        let removed = group.members.difference(&members).copied().collect();
        group.members = members;
        (added, removed)
    }
}
