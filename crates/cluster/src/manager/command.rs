//! Commands that an operator may give, and whether it can be done.

use std::collections::BTreeMap;
use std::net::IpAddr;

use steering::units::NODES_MAX;

use super::state::{BLOCKS, Standing, State};
use crate::codec::is_name;
use crate::encapsulation::HUB_INTERFACE;
use crate::message::{INTERFACE_ADDRESSES_MAX, INTERFACES_MAX, Role, SharedInterface};

/// Largest weight: with 4,096 units and 65,536 buckets every sum still fits.
pub const WEIGHT_MAX: u32 = 1_000_000;

/// Most outside addresses.
pub const OUTSIDE_MAX: usize = 64;

/// Most commands that wait to be carried out.
pub const ACCEPTED_MAX: usize = 64;

/// Most steps of one command.
pub const STEPS_MAX: usize = 256;

/// A wish of an operator. All steps of a command take effect with the same era.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Command {
    /// Units come, go, or change their share.
    Change(Vec<Step>),
    /// The shared interfaces and the addresses that sources are translated to, whole.
    Configure {
        /// The interfaces.
        interfaces: Vec<SharedInterface>,
        /// The addresses. Flows of one that is left out end.
        outside: Vec<IpAddr>,
    },
}

/// A change of one unit.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// It takes part as soon as it is connected; one that drains takes part again.
    Add {
        /// The node.
        node: u16,
        /// Bus address and task, if it was not enrolled.
        enrol: Option<(IpAddr, Role)>,
        /// Its capacity; `None`: what it says of itself.
        weight: Option<u32>,
    },
    /// It gets no new flows and stays until its own have ended.
    Drain {
        /// The node.
        node: u16,
        /// It is removed when nothing is left.
        remove: bool,
        /// Its flows go to another unit, and it does not wait for their end.
        migrate: bool,
    },
    /// It takes no part any more.
    Remove {
        /// The node.
        node: u16,
        /// Also if it still has flows: they end.
        force: bool,
    },
    /// Its capacity.
    Weight {
        /// The node.
        node: u16,
        /// Relative to the others'.
        weight: u32,
    },
}

impl Step {
    /// The node.
    #[must_use]
    pub fn node(&self) -> u16 {
        match self {
            Self::Add { node, .. }
            | Self::Drain { node, .. }
            | Self::Remove { node, .. }
            | Self::Weight { node, .. } => *node,
        }
    }
}

/// Why a command is not accepted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    /// It makes no sense, whatever the state.
    #[error("{0}")]
    Invalid(String),
    /// No such unit.
    #[error("no unit {0} is enrolled")]
    Unknown(u16),
    /// It contradicts the state or what was accepted before.
    #[error("{0}")]
    Conflict(String),
    /// Too many wait.
    #[error("{ACCEPTED_MAX} commands wait already")]
    Busy,
    /// Another manager leads; its name, if that is known.
    #[error("another manager leads{}", .0.as_ref().map_or_else(String::new, |leader| format!(": {leader}")))]
    NotLeading(Option<String>),
    /// It could not be stored.
    #[error("the change was not stored: {0}")]
    Store(String),
}

/// A unit as it will be when all that was accepted is done.
#[derive(Clone, Copy, Debug)]
struct Projected {
    address: IpAddr,
    role: Role,
    weight: u32,
    standing: Standing,
}

/// Checks a command against the state and what waits. `is_drained`: whether nothing is left on a unit.
pub(super) fn check(
    state: &State,
    command: &Command,
    is_drained: &dyn Fn(u16) -> bool,
) -> Result<(), CommandError> {
    if state.accepted.len() >= ACCEPTED_MAX {
        return Err(CommandError::Busy);
    }
    let steps = match command {
        Command::Change(steps) => steps,
        Command::Configure { interfaces, outside } => return check_configuration(interfaces, outside),
    };
    if steps.is_empty() || steps.len() > STEPS_MAX {
        return Err(CommandError::Invalid(format!("{} steps: 1 to {STEPS_MAX} are possible", steps.len())));
    }
    let mut units = BTreeMap::new();
    for (node, unit) in &state.units {
        let (address, role, weight, standing) = (unit.address, unit.role, unit.weight, unit.standing);
        units.insert(*node, Projected { address, role, weight, standing });
    }
    let waiting = state.accepted.iter().filter_map(|accepted| match &accepted.command {
        Command::Change(steps) => Some(steps),
        Command::Configure { .. } => None,
    });
    for step in waiting.flatten() {
        // What became impossible meanwhile is left out when its turn comes.
        let _ = project(&mut units, step, &|_| true);
    }
    let had_owner = state
        .units
        .values()
        .any(|unit| matches!(unit.standing, Standing::Active | Standing::Lost) && unit.role.owns_flows());
    let owned = |units: &BTreeMap<u16, Projected>| {
        units.values().any(|unit| {
            let active = matches!(unit.standing, Standing::Active | Standing::Lost);
            active && unit.role.owns_flows() && unit.weight > 0
        })
    };
    let will_have_owner = owned(&units);
    let mut nodes: Vec<u16> = steps.iter().map(Step::node).collect();
    nodes.sort_unstable();
    if let Some(twice) = nodes.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(CommandError::Invalid(format!("unit {} has two steps in one change", twice[0])));
    }
    for step in steps {
        project(&mut units, step, is_drained)?;
    }
    // Units that were never added may be taken back, all of them; those that take part may not all stop.
    let only_removes = steps.iter().all(|step| matches!(step, Step::Remove { .. }));
    if (had_owner || (will_have_owner && !only_removes)) && !owned(&units) {
        return Err(CommandError::Conflict("no data plane would be left to own flows".into()));
    }
    Ok(())
}

fn project(
    units: &mut BTreeMap<u16, Projected>,
    step: &Step,
    is_drained: &dyn Fn(u16) -> bool,
) -> Result<(), CommandError> {
    let node = step.node();
    if let Step::Add { enrol, weight, .. } = step {
        return project_add(units, node, *enrol, *weight);
    }
    let unit = units.get_mut(&node).ok_or(CommandError::Unknown(node))?;
    let conflict = |text: &str| Err(CommandError::Conflict(format!("unit {node} {text}")));
    match step {
        Step::Add { .. } => {}
        Step::Drain { remove, .. } => match unit.standing {
            Standing::Active => unit.standing = Standing::Draining { remove: *remove },
            Standing::Draining { .. } => return conflict("drains already"),
            Standing::Free | Standing::Lost => return conflict("takes no part"),
        },
        Step::Remove { force, .. } => match unit.standing {
            Standing::Free | Standing::Lost => drop(units.remove(&node)),
            Standing::Draining { .. } if is_drained(node) => unit.standing = Standing::Free,
            _ if *force => unit.standing = Standing::Free,
            Standing::Active => return conflict("takes part: drain it first, or force its removal"),
            Standing::Draining { .. } => return conflict("still has flows: wait, or force its removal"),
        },
        Step::Weight { weight, .. } => {
            check_weight(*weight)?;
            if !unit.role.owns_flows() {
                return conflict("only dispatches: it has no weight");
            }
            if !matches!(unit.standing, Standing::Active | Standing::Lost) {
                return conflict("takes no part");
            }
            unit.weight = *weight;
        }
    }
    Ok(())
}

fn project_add(
    units: &mut BTreeMap<u16, Projected>,
    node: u16,
    enrol: Option<(IpAddr, Role)>,
    weight: Option<u32>,
) -> Result<(), CommandError> {
    if node >= NODES_MAX {
        return Err(CommandError::Invalid(format!("node id {node}: 0 to {} are possible", NODES_MAX - 1)));
    }
    if let Some(weight) = weight {
        check_weight(weight)?;
    }
    if let Some((address, _)) = enrol
        && let Some((other, _)) =
            units.iter().find(|(other, unit)| unit.address == address && **other != node)
    {
        return Err(CommandError::Conflict(format!("{address} is the bus address of unit {other}")));
    }
    match (units.get_mut(&node), enrol) {
        (Some(unit), enrol) => {
            if enrol.is_some_and(|enrol| enrol != (unit.address, unit.role)) {
                return Err(CommandError::Conflict(format!(
                    "unit {node} is enrolled with another address or role"
                )));
            }
            if unit.standing == Standing::Active {
                return Err(CommandError::Conflict(format!("unit {node} takes part already")));
            }
            unit.standing = Standing::Active;
            // A weight that the unit will tell itself counts as one.
            unit.weight = weight.unwrap_or(unit.weight.max(1));
        }
        (None, Some((address, role))) => {
            if address.is_unspecified() || address.is_multicast() {
                return Err(CommandError::Invalid(format!("{address} cannot be a bus address")));
            }
            let weight = weight.unwrap_or(1);
            units.insert(node, Projected { address, role, weight, standing: Standing::Active });
        }
        (None, None) => return Err(CommandError::Unknown(node)),
    }
    Ok(())
}

pub(super) fn check_weight(weight: u32) -> Result<(), CommandError> {
    if (1..=WEIGHT_MAX).contains(&weight) {
        Ok(())
    } else {
        Err(CommandError::Invalid(format!("weight {weight}: 1 to {WEIGHT_MAX} are possible; drain for none")))
    }
}

fn check_configuration(interfaces: &[SharedInterface], outside: &[IpAddr]) -> Result<(), CommandError> {
    let invalid = |text: String| Err(CommandError::Invalid(text));
    if interfaces.len() > INTERFACES_MAX || outside.len() > OUTSIDE_MAX {
        return invalid(format!("at most {INTERFACES_MAX} interfaces and {OUTSIDE_MAX} outside addresses"));
    }
    for (place, interface) in interfaces.iter().enumerate() {
        let SharedInterface { id, mac, name, addresses, .. } = interface;
        if !is_name(name) {
            return invalid(format!(
                "`{name}` is no name of an interface: 1 to 15 letters, digits, `.`, `-`, `_`"
            ));
        }
        if interfaces.iter().take(place).any(|other| other.id == *id || other.name == *name) {
            return invalid(format!("interface `{name}` or its number {id} stands twice"));
        }
        if *id == HUB_INTERFACE {
            return invalid(format!("interface `{name}`: number {id} stands for peers of a hub"));
        }
        if mac[0] & 1 == 1 || mac == &[0; 6] {
            return invalid(format!("interface `{name}`: the MAC address is not one station's"));
        }
        let wrong =
            addresses.iter().find(|(address, prefix)| *prefix > if address.is_ipv4() { 32 } else { 128 });
        if let Some((address, prefix)) = wrong {
            return invalid(format!("interface `{name}`: {address}/{prefix} has too long a prefix"));
        }
        if addresses.len() > INTERFACE_ADDRESSES_MAX {
            return invalid(format!("interface `{name}`: more than {INTERFACE_ADDRESSES_MAX} addresses"));
        }
    }
    let mut sorted = outside.to_vec();
    sorted.sort_unstable();
    if let Some(twice) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
        return invalid(format!("outside address {} stands twice", twice[0]));
    }
    match outside.iter().find(|address| address.is_unspecified() || address.is_multicast()) {
        Some(address) => invalid(format!("{address} cannot be an outside address")),
        None => Ok(()),
    }
}

/// Blocks that one address has for units.
pub(super) const BLOCKS_USABLE: usize = BLOCKS as usize - 1;
