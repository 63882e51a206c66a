//! Shared interfaces that one of several dispatchers has (rows R9, R10): whoever has their addresses.
//!
//! The kernel's addresses say it, so that it does not matter who put them there: keepalived, `anabranch cluster takeover` in
//! a hook of something else, or an operator with `ip`. A dispatcher that gets them takes the shared hardware address and
//! announces all of them, by ARP and neighbor advertisements, on every such device and so in every VLAN. One that has them
//! no more gives the hardware address back and stands by: it takes nothing in and sends nothing out.
//!
//! A file beside the control socket remembers the devices' own hardware addresses, for the start after a crash.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ::cluster::snapshot::Holding;
use linux::netlink::Netlink;
use linux::packet_socket::PacketSocket;

use crate::config::Config;
use crate::config::services::Interface;
use crate::files::{Durable, read_bounded, replace_file};
use crate::host_facts::{DeviceFacts, HostFacts};
use crate::status::SharedInterfaceReport;

/// Pauses before each announcement: some are lost, and a switch may learn late.
const PAUSES_MS: [u64; 5] = [0, 50, 200, 750, 2_000];
/// Largest file of hardware addresses.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Interfaces of this machine that other dispatchers may have.
pub(crate) struct Takeover {
    /// In the configuration's order, `None` for those that are this machine's alone.
    holdings: Vec<Option<Arc<Holding>>>,
    /// An operator, or a hook, wants this machine to have them.
    wanted: bool,
    file: PathBuf,
    /// Hardware addresses that devices had before.
    before: BTreeMap<String, [u8; 6]>,
}

impl Takeover {
    /// With what an earlier run left behind.
    pub fn open(config: &Config, control_socket: &Path) -> Self {
        let file = control_socket.with_extension("macs");
        let text = read_bounded(&file, FILE_BYTES_MAX).unwrap_or_default();
        let holding =
            |interface: &Interface| interface.shared.map(|_| Arc::new(Holding::new(!interface.takeover)));
        Self {
            holdings: config.services.interfaces.iter().map(holding).collect(),
            wanted: false,
            before: serde_json::from_str(&text).unwrap_or_default(),
            file,
        }
    }

    /// Who has each interface, for the cores.
    pub fn holding(&self, place: usize) -> Arc<Holding> {
        let known = self.holdings.get(place).cloned().flatten();
        known.unwrap_or_else(|| Arc::new(Holding::new(true)))
    }

    /// Whether this machine puts the addresses on its devices itself.
    pub fn is_wanted(&self) -> bool {
        self.wanted
    }

    /// Takes the interfaces over, or lets go of them.
    ///
    /// # Errors
    /// Text for the operator: there is nothing to take over.
    pub fn want(&mut self, config: &Config, wanted: bool) -> Result<(), String> {
        if !config.services.interfaces.iter().any(|interface| interface.takeover) {
            return Err(
                "no [[interface]] has takeover = true: there is nothing that another dispatcher may have"
                    .into(),
            );
        }
        self.wanted = wanted;
        Ok(())
    }

    /// Looks at who has the interfaces, and acts on what has changed; the kernel tells of it.
    pub fn follow(&mut self, config: &Config, facts: &HostFacts, netlink: &Netlink) {
        let places = config.services.interfaces.iter().zip(self.holdings.clone());
        for (interface, holding) in places.filter(|(interface, _)| interface.takeover) {
            let (Some(holding), Some(device)) = (holding, facts.device(&interface.device)) else { continue };
            let has = has_addresses(interface, device);
            self.keep_mac(interface, device, has, netlink);
            if holding.set_active(has) {
                if has {
                    tracing::info!(interface = interface.name, "this dispatcher has the interface now");
                    let mac = interface.mac.unwrap_or(device.mac());
                    announce(interface, device, mac, &holding);
                } else {
                    tracing::info!(interface = interface.name, "this dispatcher stands by");
                }
            }
        }
    }

    /// The device has the shared hardware address while this machine has the interface, and its own otherwise.
    fn keep_mac(&mut self, interface: &Interface, device: &DeviceFacts, has: bool, netlink: &Netlink) {
        let Some(shared) = interface.mac else { return };
        let own = self.before.get(&device.name).copied();
        let (mac, own) = match (has, own) {
            (true, own) if device.mac() != shared => (shared, Some(own.unwrap_or(device.mac()))),
            (false, Some(own)) if device.mac() == shared => (own, None),
            _ => return,
        };
        // First the file: who finds it after a crash finds the truth.
        match own {
            Some(own) => self.before.insert(device.name.clone(), own),
            None => self.before.remove(&device.name),
        };
        let bytes = serde_json::to_vec(&self.before).unwrap_or_default();
        if let Err(error) = replace_file(&self.file, &bytes, Durable::Later) {
            tracing::warn!(file = %self.file.display(), %error, "hardware addresses are not remembered");
        }
        if let Err(error) = netlink.set_mac(device.index, mac) {
            tracing::warn!(device = device.name, %error, "the hardware address stays");
        }
    }

    /// Who has what, for people.
    pub fn report(&self, config: &Config) -> Vec<SharedInterfaceReport> {
        let places = config.services.interfaces.iter().zip(&self.holdings);
        let report = |(interface, holding): (&Interface, &Option<Arc<Holding>>)| {
            let holding = holding.as_ref()?;
            Some(SharedInterfaceReport { name: interface.name.clone(), active: holding.is_active() })
        };
        places.filter_map(report).collect()
    }

    /// Gives the devices their own hardware addresses back.
    pub fn end(self, netlink: &Netlink) {
        for (device, mac) in &self.before {
            if let Ok(Some(link)) = netlink.link(device)
                && let Err(error) = netlink.set_mac(link.index, *mac)
            {
                tracing::warn!(device, %error, "the hardware address stays");
            }
        }
        let _ = std::fs::remove_file(&self.file);
    }
}

/// Whether a device has all addresses by which one has the interface, whatever their prefix length.
pub(crate) fn has_addresses(interface: &Interface, device: &DeviceFacts) -> bool {
    let has = |address: IpAddr| device.addresses.iter().any(|net| net.addr() == address);
    device.up && interface.addresses.iter().all(|net| has(net.addr()))
}

/// Announces every address of a device that is shared, some times, for as long as this machine has it.
fn announce(interface: &Interface, device: &DeviceFacts, mac: [u8; 6], holding: &Arc<Holding>) {
    let (name, holding) = (device.name.clone(), Arc::clone(holding));
    let link_local =
        |address: &IpAddr| matches!(address, IpAddr::V6(address) if address.is_unicast_link_local());
    let configured = interface.addresses.iter().map(|net| net.addr());
    let others = device.addresses.iter().map(|net| net.addr()).filter(|address| !link_local(address));
    let mut addresses: Vec<IpAddr> = configured.chain(others).collect();
    addresses.sort_unstable();
    addresses.dedup();
    let frames: Vec<Vec<u8>> =
        addresses.iter().flat_map(|address| packet::announce::frames(mac, *address)).collect();
    let work = move || {
        let socket = match PacketSocket::open(&name, false, false) {
            Ok(socket) => socket,
            Err(error) => return tracing::warn!(device = name, %error, "nothing is announced"),
        };
        for pause in PAUSES_MS {
            std::thread::sleep(Duration::from_millis(pause));
            if !holding.is_active() {
                return;
            }
            for frame in &frames {
                if let Err(error) = socket.send(frame) {
                    tracing::warn!(device = name, %error, "not announced");
                }
            }
        }
    };
    if let Err(error) = std::thread::Builder::new().name("announce".to_owned()).spawn(work) {
        tracing::warn!(%error, "nothing is announced");
    }
}
