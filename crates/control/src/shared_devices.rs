//! Devices of the interfaces that several machines share: a dispatcher has the real one; at a data plane a TAP device stands
//! for it, so that the host has its addresses, its routes and its neighbors there as if it were attached (row D2).

use std::collections::BTreeMap;
use std::sync::Arc;

use engine::gateway::SharedDevice;
use linux::netlink::Netlink;
use linux::tun::Tap;

use crate::config::Config;
use crate::config::services::Interface;

/// `net.ipv4.conf.*.arp_ignore`: never answer. The dispatcher's host does, once for all.
const ARP_SILENT: &str = "8";

/// Makes the devices that are needed; by name, those that are shared.
///
/// # Errors
/// Text for the operator.
pub(crate) fn open(config: &Config, netlink: &Netlink) -> Result<BTreeMap<String, SharedDevice>, String> {
    let Some(cluster) = &config.cluster else { return Ok(BTreeMap::new()) };
    let mut devices = BTreeMap::new();
    for interface in config.services.interfaces.iter().filter(|interface| interface.shared.is_some()) {
        let real = SharedDevice::Real { hub: cluster.hub_port.is_some(), takeover: interface.takeover };
        let device = if cluster.role.owns_flows() { tap(interface, netlink)? } else { real };
        devices.insert(interface.device.clone(), device);
    }
    Ok(devices)
}

/// The device that stands for an interface which another machine has.
fn tap(interface: &Interface, netlink: &Netlink) -> Result<SharedDevice, String> {
    let device = &interface.device;
    let failed =
        |error: linux::Error| format!("cannot make the device of interface {}: {error}", interface.name);
    let tap = Tap::create(device).map_err(failed)?;
    if let Some(mac) = interface.mac {
        netlink.set_mac(tap.index(), mac).map_err(failed)?;
    }
    if let Some(mtu) = interface.mtu {
        netlink.set_mtu(tap.index(), u32::from(mtu)).map_err(failed)?;
    }
    // Our own device: nothing to put back at the end.
    let settings = [
        (format!("ipv4/conf/{device}/arp_ignore"), ARP_SILENT),
        // What the others' neighbors say is news here.
        (format!("ipv4/conf/{device}/arp_accept"), "1"),
        (format!("ipv6/conf/{device}/accept_dad"), "0"),
        (format!("ipv6/conf/{device}/accept_untracked_na"), "1"),
    ];
    for (name, value) in settings {
        if let Err(error) = std::fs::write(format!("/proc/sys/net/{name}"), value) {
            tracing::debug!(name, %error, "not set");
        }
    }
    netlink.set_up(tap.index(), true).map_err(failed)?;
    Ok(SharedDevice::Tap(Arc::new(tap)))
}
