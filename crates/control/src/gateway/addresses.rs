//! Addresses and devices of the gateway: what must be on a device, what of it is ours to take away again.
//!
//! Interface addresses and the outside addresses of services stay on the kernel's devices, so that the kernel answers ARP
//! and neighbor discovery for them. [`AddressPlan`] says what should be there and is pure; [`Addresses`] makes it so. Only
//! what this program added is removed, at the end or after a reload; a file beside the control socket remembers it, so
//! that a start after a crash still knows.
//!
//! The address of a service that a reload removes lingers while flows use it, [`LINGER`] at most: without it the neighbors
//! would not find the way for established connections any more.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use linux::netlink::Netlink;
use serde::{Deserialize, Serialize};

use super::ipv6_router::Ipv6Routers;
use super::own_services::OwnServices;
use crate::config::services::pools;
use crate::config::services::{ListenHost, Services};
use crate::files::{self, read_bounded};
use crate::host_facts::HostFacts;
use crate::takeover;
use crate::warn_once::WarnOnce;

/// Outside addresses of pools, forwards and virtual servers which no `[[interface]]` names as its own or as one that another
/// program adds. Of pools those that can be used, see [`pools::unusable`].
#[must_use]
pub fn extra(services: &Services, facts: &HostFacts) -> BTreeSet<IpAddr> {
    let unusable = pools::unusable(services, Some(facts));
    let pools = services.nats.iter().flat_map(|nat| nat.addresses.iter().copied());
    let sources = services.servers.iter().flat_map(|server| server.source_addresses.iter().copied());
    let servers = services.servers.iter().map(|server| server.listen.ip());
    let forwards = services.forwards.iter().filter_map(|forward| match forward.host {
        ListenHost::Address(address) => Some(address),
        ListenHost::Interface(_) => None,
    });
    let leases = services.leases.iter().map(|lease| lease.address);
    let own = |address: &IpAddr| {
        services.interfaces.iter().any(|interface| {
            interface.virtual_addresses.contains(address)
                || interface.addresses.iter().any(|net| net.addr() == *address)
        })
    };
    pools
        .chain(sources)
        .filter(|address| !unusable.contains_key(address))
        .chain(servers)
        .chain(forwards)
        .chain(leases)
        .filter(|address| !own(address))
        .collect()
}

/// Place of the interface where an address belongs: the one with the longest configured network around it, else the one
/// whose NAT uses it, else the first that leads out by a NAT, else the first.
#[must_use]
pub fn home(services: &Services, address: IpAddr) -> Option<usize> {
    let around = services.interfaces.iter().enumerate().filter_map(|(place, interface)| {
        let nets = interface.addresses.iter().filter(|net| net.contains(&address));
        nets.map(|net| net.prefix_len()).max().map(|length| (length, std::cmp::Reverse(place)))
    });
    if let Some((_, place)) = around.max() {
        return Some(place.0);
    }
    let place = |name: &str| services.interfaces.iter().position(|interface| interface.name == name);
    let using = services.nats.iter().find(|nat| nat.addresses.contains(&address)).or(services.nats.first());
    using.and_then(|nat| place(&nat.out)).or((!services.interfaces.is_empty()).then_some(0))
}

/// Addresses that devices should have, of those there are now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AddressPlan {
    /// Device, index and address with prefix length.
    pub addresses: Vec<DeviceAddress>,
    /// Devices to be switched on.
    pub up: Vec<u32>,
}

/// One address of one device.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct DeviceAddress {
    /// Index of the device.
    pub index: u32,
    /// Its name: an index alone may belong to another device after a restart of the machine.
    pub device: String,
    /// The address with its prefix length.
    pub net: IpNet,
}

/// Changes from what there is to a plan.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AddressChanges {
    /// To be added, first: taking the last address of a device away would take its routes along.
    pub add: Vec<DeviceAddress>,
    /// To be removed.
    pub remove: Vec<DeviceAddress>,
}

impl AddressPlan {
    /// Plan for a configuration on the devices there are.
    #[must_use]
    pub fn new(services: &Services, facts: &HostFacts) -> Self {
        let mut plan = Self::default();
        for interface in &services.interfaces {
            let Some(device) = facts.device(&interface.device) else { continue };
            if !device.up {
                plan.up.push(device.index);
            }
            // Whoever gives them to a machine gives it the interface.
            if interface.takeover && !facts.takes_over {
                continue;
            }
            for net in &interface.addresses {
                plan.add(device.index, &device.name, *net);
            }
        }
        for address in extra(services, facts) {
            let interface =
                home_by_facts(services, facts, address).and_then(|at| services.interfaces.get(at));
            let device = interface.and_then(|interface| facts.device(&interface.device));
            if let (Some(interface), Some(device)) = (interface, device) {
                let has = facts.takes_over || takeover::has_addresses(interface, device);
                if interface.takeover && !has {
                    continue;
                }
                plan.add(device.index, &device.name, IpNet::from(address));
            }
        }
        plan
    }

    fn add(&mut self, index: u32, device: &str, net: IpNet) {
        self.addresses.push(DeviceAddress { index, device: device.to_owned(), net });
    }

    /// Changes that lead to the plan, given what is there and what of it we added.
    #[must_use]
    pub fn difference(&self, facts: &HostFacts, added: &BTreeSet<DeviceAddress>) -> AddressChanges {
        let present = |entry: &DeviceAddress, exactly: bool| {
            let device = facts
                .devices
                .iter()
                .find(|device| device.index == entry.index && device.name == entry.device);
            device.is_some_and(|device| {
                device
                    .addresses
                    .iter()
                    .any(|net| if exactly { *net == entry.net } else { net.addr() == entry.net.addr() })
            })
        };
        // An operator may have put the address there with another prefix length: that is as good.
        let host = |entry: &DeviceAddress| entry.net.prefix_len() == entry.net.max_prefix_len();
        let add = self.addresses.iter().filter(|entry| !present(entry, !host(entry))).cloned().collect();
        let remove = added
            .iter()
            .filter(|entry| !self.addresses.contains(entry) && present(entry, true))
            .cloned()
            .collect();
        AddressChanges { add, remove }
    }
}

/// As [`home`], but a device's own network counts as well: with DHCP only the host knows it.
fn home_by_facts(services: &Services, facts: &HostFacts, address: IpAddr) -> Option<usize> {
    let around = services.interfaces.iter().enumerate().filter_map(|(place, interface)| {
        let device = facts.device(&interface.device)?;
        let nets = interface.addresses.iter().chain(&device.addresses);
        let nets = nets.filter(|net| net.prefix_len() < net.max_prefix_len() && net.contains(&address));
        nets.map(|net| net.prefix_len()).max().map(|length| (length, std::cmp::Reverse(place)))
    });
    around.max().map(|(_, place)| place.0).or_else(|| home(services, address))
}

/// Keeps the devices as the plan says.
pub struct Addresses {
    file: PathBuf,
    added: BTreeSet<DeviceAddress>,
    /// Entries of the last plan.
    planned: BTreeSet<DeviceAddress>,
    /// Entries that were ours and planned, and until when they stay at most.
    lingering: BTreeMap<DeviceAddress, Instant>,
    /// Devices that are a router's for IPv6.
    pub(super) ipv6_routers: Ipv6Routers,
    /// The way from the host itself to its services.
    pub(super) own_services: OwnServices,
    warnings: WarnOnce,
    /// Entries of an earlier run were looked at.
    inherited: bool,
}

/// An address that no service has any more stays so long at most.
pub const LINGER: Duration = Duration::from_secs(300);

/// Largest file of remembered entries.
const FILE_BYTES_MAX: u64 = 16 << 20;

impl Addresses {
    /// With what an earlier run left behind, remembered beside its control socket.
    #[must_use]
    pub fn open(control_socket: &Path) -> Self {
        let file = control_socket.with_extension("addresses");
        let added = read(&file).unwrap_or_default();
        Self {
            file,
            added,
            planned: BTreeSet::new(),
            lingering: BTreeMap::new(),
            ipv6_routers: Ipv6Routers::open(control_socket),
            own_services: OwnServices::default(),
            warnings: WarnOnce::default(),
            inherited: false,
        }
    }

    /// Makes the devices what the plan says. Returns whether anything changed.
    pub fn apply(&mut self, netlink: &Netlink, plan: &AddressPlan, facts: &HostFacts) -> bool {
        if !std::mem::replace(&mut self.inherited, true) {
            self.inherit(netlink, facts);
        }
        self.linger(plan, Instant::now());
        let mut changes = plan.difference(facts, &self.added);
        changes.remove.retain(|entry| !self.lingering.contains_key(entry));
        for entry in &changes.add {
            match netlink.add_address(entry.index, entry.net) {
                Ok(()) => {
                    self.added.insert(entry.clone());
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => {
                    let hint = if entry.net.addr().is_ipv6() { "; is IPv6 switched off there?" } else { "" };
                    self.warnings.warn(format!("{}: {error}{hint}", entry.device));
                }
            }
        }
        for entry in &changes.remove {
            self.remove(netlink, entry);
        }
        // What is not there any more, because its device went, is not ours any more either.
        let there = |entry: &DeviceAddress| {
            facts.devices.iter().any(|device| device.index == entry.index && device.name == entry.device)
        };
        let before = self.added.len();
        self.added.retain(there);
        self.lingering.retain(|entry, _| self.added.contains(entry));
        for index in &plan.up {
            if let Err(error) = netlink.set_up(*index, true) {
                self.warnings.warn(error.to_string());
            }
        }
        let changed = !changes.add.is_empty() || !changes.remove.is_empty() || before != self.added.len();
        if changed {
            self.remember();
        }
        changed
    }

    /// Addresses of an earlier run stay for good from now on, if they are still there; it may have left them for a while only.
    fn inherit(&mut self, netlink: &Netlink, facts: &HostFacts) {
        let there = |entry: &DeviceAddress| {
            let mut devices = facts.devices.iter();
            devices.any(|device| {
                (device.index, &device.name) == (entry.index, &entry.device)
                    && device.addresses.contains(&entry.net)
            })
        };
        self.added.retain(there);
        for entry in &self.added {
            if let Err(error) = netlink.set_address_lifetime(entry.index, entry.net, None) {
                self.warnings.warn(format!("{}: {error}", entry.device));
            }
        }
    }

    /// Leaves what was added where it is, for so many seconds: neighbors go on finding the way for flows that the next run
    /// takes over.
    pub fn leave(&mut self, netlink: &Netlink, seconds: u16) {
        self.ipv6_routers.clear();
        self.own_services.clear();
        for entry in &self.added {
            if let Err(error) = netlink.set_address_lifetime(entry.index, entry.net, Some(seconds.into())) {
                self.warnings.warn(format!("{}: {error}", entry.device));
            }
        }
        self.remember();
    }

    /// Addresses of services go when their flows have; those of interfaces, and what is wanted elsewhere, at once.
    fn linger(&mut self, plan: &AddressPlan, now: Instant) {
        let planned: BTreeSet<DeviceAddress> = plan.addresses.iter().cloned().collect();
        let wanted: BTreeSet<IpAddr> = planned.iter().map(|entry| entry.net.addr()).collect();
        for entry in self.planned.difference(&planned).filter(|entry| self.added.contains(*entry)) {
            if entry.net.prefix_len() == entry.net.max_prefix_len() {
                self.lingering.entry(entry.clone()).or_insert(now + LINGER);
            }
        }
        self.lingering.retain(|entry, _| !wanted.contains(&entry.net.addr()));
        self.planned = planned;
    }

    /// Addresses that stay only because flows may use them.
    #[must_use]
    pub fn lingering(&self) -> BTreeSet<IpAddr> {
        self.lingering.keys().map(|entry| entry.net.addr()).collect()
    }

    /// Takes those away that are not in `used`, and those whose time is over. Returns whether there were any.
    pub fn let_go(&mut self, netlink: &Netlink, used: &BTreeSet<IpAddr>, now: Instant) -> bool {
        let done = |(entry, until): (&DeviceAddress, &Instant)| {
            (now >= *until || !used.contains(&entry.net.addr())).then(|| entry.clone())
        };
        let gone: Vec<DeviceAddress> = self.lingering.iter().filter_map(done).collect();
        for entry in &gone {
            self.lingering.remove(entry);
            self.remove(netlink, entry);
        }
        if !gone.is_empty() {
            self.remember();
        }
        !gone.is_empty()
    }

    /// Takes away what was added.
    pub fn clear(&mut self, netlink: &Netlink) {
        self.ipv6_routers.clear();
        self.own_services.clear();
        self.lingering.clear();
        for entry in std::mem::take(&mut self.added) {
            self.remove(netlink, &entry);
        }
        self.remember();
    }

    fn remove(&mut self, netlink: &Netlink, entry: &DeviceAddress) {
        self.added.remove(entry);
        let gone = |error: &linux::Error| {
            // EADDRNOTAVAIL, ENODEV: somebody else was faster.
            matches!(error.raw_os_error(), Some(99 | 19))
        };
        match netlink.del_address(entry.index, entry.net) {
            Err(error) if !gone(&error) => self.warnings.warn(format!("{}: {error}", entry.device)),
            _ => {}
        }
    }

    fn remember(&mut self) {
        let added = (!self.added.is_empty()).then_some(&self.added);
        if let Err(error) = files::remember(&self.file, added) {
            let file = self.file.display();
            self.warnings.warn(format!(
                "{file} cannot be written ({error}): after a crash, addresses would be left on the devices"
            ));
        }
    }
}

fn read(file: &Path) -> Option<BTreeSet<DeviceAddress>> {
    let text = read_bounded(file, FILE_BYTES_MAX).ok()?;
    serde_json::from_str(&text).ok()
}

#[cfg(test)]
mod tests;
