//! Overrides: changes by command while the node runs, on top of the configuration.
//!
//! * **Groups** (row R5): prefixes added and removed; they stay over a reload and end with the program.
//! * **Backends**: drained, or with another weight; likewise.
//! * **Leases** (row R1): port ranges handed out on request. They survive a restart, in a file of the state
//!   directory, because who holds one goes on using it.
//!
//! Pure, but for the file: [`super::policy`] puts it together with the configuration.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use services::spec::{GatewaySpec, NatMode, NatSpec};

use crate::config::services::values::word;
use crate::config::services::{BLOCK_PORTS, Backend, GROUP_MEMBERS_MAX, Group, LEASES_MAX, Lease, Services};
use crate::config::values::ValueError;
use crate::files::{Durable, read_bounded, replace_file};
use crate::protocol::{BackendWish, LeaseWish};
use crate::status::{GroupReport, LeaseReport};

/// A file with more is not ours.
const FILE_BYTES_MAX: u64 = 16 << 20;

/// Largest number of blocks that one lease has: block 0 is never given.
const BLOCKS_MAX: u32 = 63;

/// Reason why a change is not possible, for whoever asked for it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OverrideError {
    /// Nothing has this name.
    #[error("no {what} is named \"{name}\"; {known}")]
    Unknown {
        /// Kind of thing.
        what: &'static str,
        /// As it was written.
        name: String,
        /// The names there are, in words.
        known: String,
    },
    /// [`GROUP_MEMBERS_MAX`].
    #[error("a group has at most {GROUP_MEMBERS_MAX} prefixes")]
    GroupFull,
    /// No backend, or not exactly one.
    #[error("\"{backend}\" is no backend of {server}, or several; there are {known}")]
    NoBackend {
        /// Virtual server.
        server: String,
        /// As it was written.
        backend: String,
        /// The backends there are.
        known: String,
    },
    /// A weight beyond 1,000.
    #[error("{0} is not a weight from 0 to 1000")]
    Weight(u16),
    /// The holder's name.
    #[error("{0}")]
    LeaseName(ValueError),
    /// Number of ports of a lease.
    #[error("{0} ports are not between 1 and {ports_max}", ports_max = BLOCKS_MAX * BLOCK_PORTS)]
    LeasePorts(u32),
    /// The name is in use for another lease.
    #[error("\"{0}\" holds a lease already; return it first, or choose another name")]
    LeaseHeld(String),
    /// [`LEASES_MAX`].
    #[error("there are {LEASES_MAX} leases already")]
    LeasesFull,
    /// Packets of the holder are not translated.
    #[error("no [[nat]] with mode \"address-and-port\" translates packets from {0}")]
    NoNat(IpNet),
    /// Packets of the holder are not translated to this address.
    #[error("no [[nat]] that translates packets from {from} has the address {address}; there are {known}")]
    NoNatAddress {
        /// Holder's prefix.
        from: IpNet,
        /// Address that is wanted.
        address: IpAddr,
        /// Addresses there are, in words.
        known: String,
    },
    /// No run of free blocks is long enough.
    #[error("no address has {0} free ports side by side; what was returned rests for two minutes")]
    NoFreePorts(u32),
    /// The lease is not one of a command.
    #[error("\"{0}\" stands in the configuration; remove it there and reload")]
    Configured(String),
}

/// Leases would not survive a restart.
#[derive(Debug, thiserror::Error)]
#[error("{} cannot be written ({error}); the lease ends with the program", path.display())]
pub struct LeaseFileError {
    path: PathBuf,
    error: io::Error,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct GroupChange {
    added: BTreeSet<IpNet>,
    removed: BTreeSet<IpNet>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct BackendChange {
    drained: bool,
    weight: Option<u16>,
}

/// Changes by command, on top of the configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Overrides {
    groups: BTreeMap<String, GroupChange>,
    backends: BTreeMap<(String, SocketAddr), BackendChange>,
    leases: Vec<Lease>,
}

impl Overrides {
    /// The prefixes of a group now.
    #[must_use]
    pub fn members(&self, group: &Group) -> Vec<IpNet> {
        let Some(change) = self.groups.get(&group.name) else { return group.members.clone() };
        let kept = group.members.iter().filter(|net| !change.removed.contains(net)).copied();
        let mut list: Vec<IpNet> = kept.chain(change.added.iter().copied()).collect();
        list.sort_unstable();
        list.dedup();
        list
    }

    /// Adds prefixes to a group, or removes them. Returns how many members changed.
    pub fn change_group(
        &mut self,
        services: &Services,
        name: &str,
        nets: &[IpNet],
        add: bool,
    ) -> Result<usize, OverrideError> {
        let group = find_group(services, name)?;
        let before: BTreeSet<IpNet> = self.members(group).into_iter().collect();
        if add && before.len() + nets.len() > GROUP_MEMBERS_MAX {
            return Err(OverrideError::GroupFull);
        }
        let change = self.groups.entry(name.to_owned()).or_default();
        let mut changed = BTreeSet::new();
        for net in nets.iter().map(IpNet::trunc) {
            if before.contains(&net) == add || !changed.insert(net) {
                continue;
            }
            let configured = group.members.contains(&net);
            match (add, configured) {
                (true, true) => change.removed.remove(&net),
                (true, false) => change.added.insert(net),
                (false, true) => change.removed.insert(net),
                (false, false) => change.added.remove(&net),
            };
        }
        if change.added.is_empty() && change.removed.is_empty() {
            self.groups.remove(name);
        }
        Ok(changed.len())
    }

    /// Members of the group of this name; none if there is no such group.
    pub fn members_of(&self, services: &Services, name: &str) -> Vec<IpNet> {
        let group = services.groups.iter().find(|group| group.name == name);
        group.map_or_else(Vec::new, |group| self.members(group))
    }

    /// All groups, or one.
    pub fn list_groups(
        &self,
        services: &Services,
        name: Option<&str>,
    ) -> Result<Vec<GroupReport>, OverrideError> {
        if let Some(name) = name {
            find_group(services, name)?;
        }
        let report = |group: &Group| {
            let change = self.groups.get(&group.name);
            let list = |set: fn(&GroupChange) -> &BTreeSet<IpNet>| -> Vec<IpNet> {
                change.map_or_else(Vec::new, |change| set(change).iter().copied().collect())
            };
            GroupReport {
                name: group.name.clone(),
                members: self.members(group).len(),
                added: list(|change| &change.added),
                removed: list(|change| &change.removed),
            }
        };
        let wanted = services.groups.iter().filter(|group| name.is_none_or(|name| group.name == name));
        Ok(wanted.map(report).collect())
    }

    /// Weight of a backend in force.
    #[must_use]
    pub fn weight(&self, server: &str, backend: &Backend) -> u16 {
        let change = self.backends.get(&(server.to_owned(), backend.address));
        match change {
            Some(BackendChange { drained: true, .. }) => 0,
            Some(BackendChange { weight: Some(weight), .. }) => *weight,
            _ => backend.weight,
        }
    }

    /// Drains a backend, enables it, or changes its weight; returns its address.
    pub fn change_backend(
        &mut self,
        services: &Services,
        server: &str,
        backend: &str,
        wish: BackendWish,
    ) -> Result<SocketAddr, OverrideError> {
        let names = services.servers.iter().map(|server| server.name.as_str());
        let found = services.servers.iter().find(|known| known.name == server);
        let found = found.ok_or_else(|| unknown("virtual server", server, names))?;
        let matches = |known: &Backend| {
            known.address.to_string() == backend || known.address.ip().to_string() == backend
        };
        let mut candidates = found.backends.iter().filter(|known| matches(known));
        let (Some(known), None) = (candidates.next(), candidates.next()) else {
            let all: Vec<String> = found.backends.iter().map(|known| known.address.to_string()).collect();
            let (server, backend) = (server.to_owned(), backend.to_owned());
            return Err(OverrideError::NoBackend { server, backend, known: all.join(", ") });
        };
        let change = self.backends.entry((server.to_owned(), known.address)).or_default();
        match wish {
            BackendWish::Drain => change.drained = true,
            BackendWish::Enable => change.drained = false,
            BackendWish::Weight(weight) if weight <= 1_000 => change.weight = Some(weight),
            BackendWish::Weight(weight) => return Err(OverrideError::Weight(weight)),
        }
        Ok(known.address)
    }

    /// Leases that were taken by command.
    #[must_use]
    pub fn leases(&self) -> &[Lease] {
        &self.leases
    }

    /// Every lease, those of the configuration first.
    #[must_use]
    pub fn list_leases(&self, services: &Services) -> Vec<LeaseReport> {
        let report = |lease: &Lease, configured| LeaseReport {
            name: lease.name.clone(),
            tenant: lease.tenant.clone().unwrap_or_default(),
            from: lease.from,
            address: lease.address,
            first_port: lease.first_port,
            last_port: last_port(lease),
            configured,
        };
        let configured = services.leases.iter().map(|lease| report(lease, true));
        configured.chain(self.leases.iter().map(|lease| report(lease, false))).collect()
    }

    /// Takes a range: the first free blocks of a NAT that translates these packets. Asking again with the same words gives
    /// the same lease. `spec`: what the engine was told last. `closed`: blocks of an address that nobody can be given now,
    /// see [`super::engine::EngineHandle::closed_blocks`].
    pub fn take_lease(
        &mut self,
        services: &Services,
        spec: &GatewaySpec,
        wish: &LeaseWish,
        closed: &dyn Fn(IpAddr) -> u64,
    ) -> Result<Lease, OverrideError> {
        word(&wish.name).map_err(OverrideError::LeaseName)?;
        let from = wish.from.trunc();
        let block = BLOCK_PORTS;
        let blocks = wish.ports.div_ceil(block);
        if blocks == 0 || blocks > BLOCKS_MAX {
            return Err(OverrideError::LeasePorts(wish.ports));
        }
        let tenant = match &wish.tenant {
            None => 0,
            Some(name) => {
                let names = || services.tenants.iter().map(String::as_str);
                let place = names().position(|tenant| tenant == name);
                place.ok_or_else(|| unknown("tenant", name, names()))? + 1
            }
        };
        let all = || services.leases.iter().chain(&self.leases);
        if let Some(held) = all().find(|lease| lease.name == wish.name) {
            let same = held.from == from && held.tenant == wish.tenant && held.ports == blocks * block;
            let address = wish.address.is_none_or(|address| address == held.address);
            if same && address {
                return Ok(held.clone());
            }
            return Err(OverrideError::LeaseHeld(wish.name.clone()));
        }
        if all().count() >= LEASES_MAX {
            return Err(OverrideError::LeasesFull);
        }
        let tenant = u16::try_from(tenant).unwrap_or(u16::MAX);
        let nats: Vec<&NatSpec> = spec.nats.iter().filter(|nat| takes(nat, from, tenant)).collect();
        if nats.is_empty() {
            return Err(OverrideError::NoNat(from));
        }
        known_address(&nats, wish)?;
        let of_family = |address: &&IpAddr| address.is_ipv4() == from.addr().is_ipv4();
        for nat in nats {
            let wanted = |address: &&IpAddr| wish.address.is_none_or(|wanted| wanted == **address);
            for address in nat.addresses.iter().filter(of_family).filter(wanted) {
                let taken = all().filter(|lease| lease.address == *address);
                let taken: Vec<(u32, u32)> =
                    taken.map(|lease| (lease.first_port.into(), last_port(lease).into())).collect();
                if let Some(first_port) = free_blocks(nat, &taken, closed(*address), blocks) {
                    let lease = Lease {
                        name: wish.name.clone(),
                        tenant: wish.tenant.clone(),
                        from,
                        address: *address,
                        first_port,
                        ports: blocks * block,
                    };
                    self.leases.push(lease.clone());
                    return Ok(lease);
                }
            }
        }
        Err(OverrideError::NoFreePorts(blocks * block))
    }

    /// Gives a range back.
    pub fn return_lease(&mut self, services: &Services, name: &str) -> Result<(), OverrideError> {
        if services.leases.iter().any(|lease| lease.name == name) {
            return Err(OverrideError::Configured(name.to_owned()));
        }
        let place = self.leases.iter().position(|lease| lease.name == name);
        let names = self.leases.iter().map(|lease| lease.name.as_str());
        let place = place.ok_or_else(|| unknown("lease", name, names))?;
        self.leases.remove(place);
        Ok(())
    }

    /// Forgets leases that a new configuration makes impossible: name or ports are in its own `[[lease]]` sections, or
    /// the tenant is gone. Returns what is said about it.
    pub fn settle(&mut self, services: &Services) -> Vec<String> {
        let mut said = Vec::new();
        self.leases.retain(|lease| {
            let clash = services.leases.iter().find(|other| {
                other.name == lease.name
                    || (other.address == lease.address
                        && other.first_port <= last_port(lease)
                        && lease.first_port <= last_port(other))
            });
            let tenant_known = lease.tenant.as_ref().is_none_or(|name| services.tenants.contains(name));
            match clash {
                Some(other) => {
                    said.push(format!("lease {} ends: the configuration has {}", lease.name, other.name));
                }
                None if !tenant_known => said.push(format!("lease {} ends: its tenant is gone", lease.name)),
                None => return true,
            }
            false
        });
        self.groups.retain(|name, _| services.groups.iter().any(|group| group.name == *name));
        self.backends.retain(|(server, address), _| {
            let known = services.servers.iter().find(|known| known.name == *server);
            known.is_some_and(|known| known.backends.iter().any(|backend| backend.address == *address))
        });
        said
    }
}

fn takes(nat: &NatSpec, from: IpNet, tenant: u16) -> bool {
    nat.mode == NatMode::AddressAndPort
        && (nat.tenants.is_empty() || nat.tenants.contains(&tenant))
        && (nat.from.is_empty() || nat.from.iter().any(|net| net.contains(&from)))
}

/// Whether one of these NATs has the address that is wished for, if one is.
fn known_address(nats: &[&NatSpec], wish: &LeaseWish) -> Result<(), OverrideError> {
    const SHOWN: usize = 8;
    let Some(wanted) = wish.address else { return Ok(()) };
    if nats.iter().any(|nat| nat.addresses.contains(&wanted)) {
        return Ok(());
    }
    let known = nats.iter().flat_map(|nat| &nat.addresses).take(SHOWN);
    let known: Vec<String> = known.map(IpAddr::to_string).collect();
    Err(OverrideError::NoNatAddress {
        from: wish.from.trunc(),
        address: wanted,
        known: if known.is_empty() { "none now".to_owned() } else { known.join(", ") },
    })
}

/// First port of the first free run of whole blocks that the NAT may use.
fn free_blocks(nat: &NatSpec, taken: &[(u32, u32)], closed: u64, blocks: u32) -> Option<u16> {
    let (low, high) = (u32::from(nat.ports.0), u32::from(nat.ports.1));
    let reserved = nat.reserved.iter().map(|(first, last)| (u32::from(*first), u32::from(*last)));
    let used: Vec<(u32, u32)> = reserved.chain(taken.iter().copied()).collect();
    let free = |block: &u32| {
        let (first, last) = (block * BLOCK_PORTS, block * BLOCK_PORTS + BLOCK_PORTS - 1);
        let open = closed >> block & 1 == 0;
        open && first >= low && last <= high && !used.iter().any(|(a, b)| *a <= last && first <= *b)
    };
    let first = (1..64 - blocks + 1).find(|start| (*start..start + blocks).all(|block| free(&block)))?;
    u16::try_from(first * BLOCK_PORTS).ok()
}

fn last_port(lease: &Lease) -> u16 {
    u16::try_from(u32::from(lease.first_port) + lease.ports - 1).unwrap_or(u16::MAX)
}

fn find_group<'a>(services: &'a Services, name: &str) -> Result<&'a Group, OverrideError> {
    let names = services.groups.iter().map(|group| group.name.as_str());
    services.groups.iter().find(|group| group.name == name).ok_or_else(|| unknown("group", name, names))
}

fn unknown<'a>(what: &'static str, name: &str, names: impl Iterator<Item = &'a str>) -> OverrideError {
    const SHOWN: usize = 20;
    let names: Vec<&str> = names.take(SHOWN).collect();
    let known =
        if names.is_empty() { "there is none".to_owned() } else { format!("there are {}", names.join(", ")) };
    OverrideError::Unknown { what, name: name.to_owned(), known }
}

/// Where leases are kept over a restart.
pub struct LeaseFile {
    path: PathBuf,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Kept {
    name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tenant: Option<String>,
    from: IpNet,
    address: IpAddr,
    first_port: u16,
    ports: u32,
}

impl LeaseFile {
    /// Of the instance with this TUN interface.
    #[must_use]
    pub fn new(state_dir: &Path, tun_name: &str) -> Self {
        Self { path: state_dir.join(format!("leases-{tun_name}.json")) }
    }

    /// Reads what was kept; nothing where there is no such file.
    pub fn load(&self, overrides: &mut Overrides) {
        let kept = match read_bounded(&self.path, FILE_BYTES_MAX) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return,
            Err(error) => Err(error.to_string()),
            Ok(text) => serde_json::from_str::<Vec<Kept>>(&text).map_err(|error| error.to_string()),
        };
        match kept {
            Ok(kept) => {
                overrides.leases = kept.into_iter().filter_map(Kept::sound).take(LEASES_MAX).collect();
            }
            Err(error) => tracing::warn!("leases of the last run are lost: {}: {error}", self.path.display()),
        }
    }

    /// Keeps the leases there are.
    pub fn store(&self, overrides: &Overrides) -> Result<(), LeaseFileError> {
        let kept: Vec<Kept> = overrides.leases.iter().map(Kept::of).collect();
        serde_json::to_vec_pretty(&kept)
            .map_err(io::Error::from)
            .and_then(|text| replace_file(&self.path, &text, Durable::Later))
            .map_err(|error| LeaseFileError { path: self.path.clone(), error })
    }
}

impl Kept {
    fn of(lease: &Lease) -> Self {
        Self {
            name: lease.name.clone(),
            tenant: lease.tenant.clone(),
            from: lease.from,
            address: lease.address,
            first_port: lease.first_port,
            ports: lease.ports,
        }
    }

    fn sound(self) -> Option<Lease> {
        let whole =
            u32::from(self.first_port).is_multiple_of(BLOCK_PORTS) && self.ports.is_multiple_of(BLOCK_PORTS);
        let fits = self.ports > 0 && u32::from(self.first_port).checked_add(self.ports)? <= 65_536;
        (whole && fits && self.first_port > 0).then_some(Lease {
            name: self.name,
            tenant: self.tenant,
            from: self.from,
            address: self.address,
            first_port: self.first_port,
            ports: self.ports,
        })
    }
}

/// Rules for nftables that enforce the same ranges in the kernel of a host whose pods hold them (row R1): every prefix is
/// translated to its range, and what would still leave with a port of somebody else is dropped. Of nested prefixes the
/// longest counts, as in the gateway. Load with `nft -f`; loading again replaces the table.
#[must_use]
pub fn nftables(leases: &[LeaseReport]) -> String {
    let mut translate = String::new();
    let mut enforce = String::new();
    let mut sorted: Vec<&LeaseReport> = leases.iter().collect();
    sorted.sort_by_key(|lease| std::cmp::Reverse(lease.from.prefix_len()));
    for lease in sorted {
        let LeaseReport { from, address, first_port, last_port, name, .. } = lease;
        let (ip, icmp) = if address.is_ipv4() { ("ip", "icmp") } else { ("ip6", "ipv6-icmp") };
        translate.push_str(&format!(
            "\t\t{ip} saddr {from} meta l4proto {{ tcp, udp }} snat {ip} to {}:{first_port}-{last_port} comment \"{name}\"\n\
             \t\t{ip} saddr {from} meta l4proto {icmp} snat {ip} to {address} comment \"{name}\"\n",
            if address.is_ipv4() { address.to_string() } else { format!("[{address}]") },
        ));
        // Holders of a part of the prefix have ports of their own.
        let inner =
            leases.iter().map(|other| other.from).filter(|other| other != from && from.contains(other));
        let inner = IpNet::aggregate(&inner.collect());
        let except = match inner[..] {
            [] => String::new(),
            _ => format!("ct original {ip} saddr != {{ {} }} ", joined(&inner)),
        };
        // One holder may have several ranges of an address.
        let ranges = leases.iter().filter(|other| other.from == *from && other.address == *address);
        let ranges: Vec<String> =
            ranges.map(|other| format!("{}-{}", other.first_port, other.last_port)).collect();
        let ranges = match &ranges[..] {
            [one] => one.clone(),
            _ => format!("{{ {} }}", ranges.join(", ")),
        };
        enforce.push_str(&format!(
            "\t\tct original {ip} saddr {from} {except}meta l4proto {{ tcp, udp }} {ip} saddr {address} \
             th sport != {ranges} counter drop comment \"{name}\"\n"
        ));
    }
    format!(
        "# Port ranges handed out by anabranch: nft -f FILE\n\
         table inet anabranch_leases\n\
         delete table inet anabranch_leases\n\
         table inet anabranch_leases {{\n\
         \tchain translate {{\n\t\ttype nat hook postrouting priority srcnat; policy accept;\n{translate}\t}}\n\
         \tchain enforce {{\n\t\ttype filter hook postrouting priority srcnat + 10; policy accept;\n{enforce}\t}}\n\
         }}\n"
    )
}

fn joined(nets: &[IpNet]) -> String {
    nets.iter().map(IpNet::to_string).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests;
