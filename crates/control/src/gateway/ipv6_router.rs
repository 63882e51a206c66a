//! The kernel's part of an IPv6 router on the devices of inside interfaces.
//!
//! The kernel answers neighbor solicitations for the gateway's addresses. A host that gets such an answer without the router flag
//! takes it that its router is none any more and drops its default route (RFC 4861 §7.2.5); and routing advertisers look at the
//! same setting. So `net.ipv6.conf.DEVICE.forwarding` is 1 on these devices. The kernel itself forwards nothing by that: it asks
//! `net.ipv6.conf.all.forwarding`, and does not see what the datapath takes.

use std::collections::BTreeSet;
use std::path::Path;

use services::spec::{GatewaySpec, HostMode};

use crate::device_settings::{self, DeviceSettings};

/// Devices that are to be a router's.
#[derive(Debug)]
pub(super) struct Ipv6Routers {
    /// Names of their settings.
    wanted: BTreeSet<String>,
    settings: DeviceSettings,
}

impl Ipv6Routers {
    /// With what an earlier run left behind, remembered beside its control socket.
    pub(super) fn open(control_socket: &Path) -> Self {
        let settings = DeviceSettings::open(control_socket.with_extension("routers"));
        Self { wanted: BTreeSet::new(), settings }
    }

    /// Follows a policy that is in force.
    pub(super) fn follow(&mut self, spec: &GatewaySpec) {
        let native = spec.host.mode == HostMode::Native;
        let routes = |device: &&services::spec::InterfaceSpec| {
            native && !device.outside && device.addresses.iter().any(|net| net.addr().is_ipv6())
        };
        let setting = |device: &str| device_settings::name("ipv6", device, "forwarding");
        self.wanted = spec.interfaces.iter().filter(routes).map(|one| setting(&one.device)).collect();
        self.settings.retain(|name| self.wanted.contains(name));
        // Where it is 1 already somebody else wants it, and will take it back.
        for name in &self.wanted {
            if let Err(error) = self.settings.set(name, "1") {
                tracing::warn!(%error, "hosts may not take this device for a router");
            }
        }
    }

    /// Sets again what somebody has set back: a write to `net.ipv6.conf.all.forwarding`, as at each start of `systemd-sysctl`, goes to every device.
    pub(super) fn keep(&mut self) {
        for name in &self.wanted {
            if let Err(error) = self.settings.set(name, "1") {
                tracing::debug!(%error, "a device is no router's any more");
            }
        }
    }

    /// Puts everything back as it was.
    pub(super) fn clear(&mut self) {
        self.wanted.clear();
        self.settings.clear();
    }
}
