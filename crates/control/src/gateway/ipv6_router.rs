//! The kernel's part of an IPv6 router on the devices of inside interfaces.
//!
//! The kernel answers neighbor solicitations for the gateway's addresses. A host that gets such an answer without the router flag
//! takes it that its router is none any more and drops its default route (RFC 4861 §7.2.5); and routing advertisers look at the
//! same setting. So `net.ipv6.conf.DEVICE.forwarding` is 1 on these devices. The kernel itself forwards nothing by that: it asks
//! `net.ipv6.conf.all.forwarding`, and does not see what the datapath takes.

use std::collections::BTreeSet;

use services::spec::{GatewaySpec, HostMode};

/// Devices that were told to be a router's, to be put back at the end.
#[derive(Debug, Default)]
pub(super) struct Ipv6Routers {
    devices: BTreeSet<String>,
}

impl Ipv6Routers {
    /// Follows a policy that is in force.
    pub(super) fn follow(&mut self, spec: &GatewaySpec) {
        let native = spec.host.mode == HostMode::Native;
        let routes = |device: &&services::spec::InterfaceSpec| {
            native && !device.outside && device.addresses.iter().any(|net| net.addr().is_ipv6())
        };
        let wanted: BTreeSet<&str> =
            spec.interfaces.iter().filter(routes).map(|interface| interface.device.as_str()).collect();
        self.devices.retain(|device| wanted.contains(device.as_str()) || put(device, "0").is_err());
        for device in wanted {
            // Where it is 1 already somebody else wants it, and will take it back.
            if !self.devices.contains(device)
                && linux::netns::sysctl(&setting(device)).is_ok_and(|value| value == "0")
            {
                match put(device, "1") {
                    Ok(()) => _ = self.devices.insert(device.to_owned()),
                    Err(error) => {
                        tracing::warn!(device, %error, "hosts may not take this device for a router");
                    }
                }
            }
        }
    }

    /// Sets again what somebody has set back: a write to `net.ipv6.conf.all.forwarding`, as at each start of `systemd-sysctl`, goes to every device.
    pub(super) fn keep(&self) {
        for device in &self.devices {
            if linux::netns::sysctl(&setting(device)).is_ok_and(|value| value == "0")
                && let Err(error) = put(device, "1")
            {
                tracing::debug!(device, %error, "it is no router's device any more");
            }
        }
    }

    /// Puts everything back as it was.
    pub(super) fn clear(&mut self) {
        for device in std::mem::take(&mut self.devices) {
            // A device that is gone took its settings along.
            let _ = put(&device, "0");
        }
    }
}

fn put(device: &str, value: &str) -> Result<(), linux::Error> {
    linux::netns::set_sysctl(&setting(device), value)
}

/// Name of the setting; dots of a device's name are written with `/`.
fn setting(device: &str) -> String {
    format!("net.ipv6.conf.{}.forwarding", device.replace('.', "/"))
}
