//! Puts a [`HostPlan`] into the kernel, and takes it out again.
//!
//! Every call compares with what the kernel has now, so it also repairs what others removed (the kernel
//! itself drops the routes of an interface that goes down). What cannot be done is logged once, not each time.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;

use ipnet::IpNet;
use linux::netlink::{Family, Netlink, Route, RouteSpec, RuleSpec};

use crate::config;
use crate::device_settings::{self, DeviceSettings};
use crate::host_facts::read_rp_filter;
use crate::route_plan::{HostPlan, Numbers, RouteChanges};
use crate::warn_once::WarnOnce;

/// Routes, rules and interface settings of one instance; dropping it takes everything back.
pub struct KernelRoutes {
    netlink: Netlink,
    numbers: Numbers,
    tun_index: Option<u32>,
    warnings: WarnOnce,
    /// Reverse-path filters, and whether router advertisements are believed.
    settings: DeviceSettings,
    has_ipv6: bool,
}

impl KernelRoutes {
    /// Opens the kernel's tables and removes what an earlier instance with the same TUN name left behind. Settings of interfaces
    /// that one with this control socket had changed are known, and put back when they are not wanted any more.
    pub fn open(numbers: Numbers, control_socket: &Path) -> linux::Result<Self> {
        let mut host = Self {
            netlink: Netlink::open()?,
            numbers,
            tun_index: None,
            warnings: WarnOnce::default(),
            settings: DeviceSettings::open(control_socket.with_extension("settings")),
            has_ipv6: Path::new("/proc/sys/net/ipv6").exists(),
        };
        let removed = host.apply(&HostPlan::default());
        if removed > 0 {
            tracing::info!(removed, "routes and rules left behind by an earlier run are gone");
        }
        Ok(host)
    }

    /// The session with the kernel.
    #[must_use]
    pub fn netlink(&self) -> &Netlink {
        &self.netlink
    }

    /// Index of the TUN interface, once [`Self::set_up_tun`] was called.
    #[must_use]
    pub fn tun_index(&self) -> Option<u32> {
        self.tun_index
    }

    /// Logs a warning, unless it was logged before.
    pub(crate) fn warn(&mut self, text: String) {
        self.warnings.warn(text);
    }

    /// Sets MTU, queue and addresses of the TUN interface and switches it on.
    pub fn set_up_tun(&mut self, index: u32, tun: &config::Tun, addresses: &[IpNet]) -> linux::Result<()> {
        self.tun_index = Some(index);
        // WireGuard's interfaces have no link-local address either: there is no neighbor to find.
        let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{}/addr_gen_mode", tun.name), "1");
        self.netlink.set_mtu(index, u32::from(tun.mtu))?;
        for (what, result) in [
            ("transmit queue", self.netlink.set_tx_queue_len(index, TX_QUEUE_PACKETS)),
            ("super-packets", self.netlink.set_gso_max(index, GSO_BYTES_MAX)),
        ] {
            if let Err(error) = result {
                tracing::debug!(%error, "the TUN interface keeps its default: {what}");
            }
        }
        self.set_addresses(addresses)?;
        self.netlink.set_up(index, true)
    }

    /// Gives the TUN interface exactly these addresses (link-local ones of the kernel aside).
    pub fn set_addresses(&mut self, wanted: &[IpNet]) -> linux::Result<()> {
        let Some(index) = self.tun_index else { return Ok(()) };
        let present: Vec<IpNet> = self
            .netlink
            .addresses(index)?
            .into_iter()
            .filter(|address| !address.link_local)
            .map(|address| address.net)
            .collect();
        // New ones first: removing the last IPv4 address would remove the interface's routes.
        for net in wanted.iter().filter(|net| !present.contains(net)) {
            match self.netlink.add_address(index, *net) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    if net.addr().is_ipv6() {
                        self.warnings.warn(format!("{error}; is IPv6 switched off on this host?"));
                    } else {
                        return Err(error);
                    }
                }
                _ => {}
            }
        }
        for net in present.iter().filter(|net| !wanted.contains(net)) {
            if let Err(error) = self.netlink.del_address(index, *net) {
                self.warnings.warn(error.to_string());
            }
        }
        Ok(())
    }

    /// Makes the kernel's tables what the plan says. Returns how many entries changed.
    pub fn apply(&mut self, plan: &HostPlan) -> usize {
        let found = self.found();
        let mut changes = plan.difference(&found);
        if !self.has_ipv6 {
            changes.add.routes.retain(|route| route.dst.addr().is_ipv4());
            changes.add.rules.retain(|rule| rule.family == Family::V4);
        }
        self.carry_out(&changes)
    }

    fn found(&mut self) -> HostPlan {
        let (mut routes, mut rules): (Vec<Route>, Vec<RuleSpec>) = (Vec::new(), Vec::new());
        let families: &[Family] = if self.has_ipv6 { &[Family::V4, Family::V6] } else { &[Family::V4] };
        for &family in families {
            match self.netlink.routes(Some(family)) {
                Ok(list) => routes.extend(list),
                Err(error) => self.warnings.warn(format!("{error} ({family:?})")),
            }
            match self.netlink.rules(Some(family)) {
                Ok(list) => rules.extend(list),
                Err(error) => self.warnings.warn(format!("{error} ({family:?})")),
            }
        }
        HostPlan::found(self.numbers, self.tun_index, &routes, &rules)
    }

    fn carry_out(&mut self, changes: &RouteChanges) -> usize {
        let mut done = 0;
        for rule in &changes.remove.rules {
            done += usize::from(self.check(self.netlink.del_rule(rule), gone, ""));
        }
        for route in &changes.remove.routes {
            done += usize::from(self.check(self.netlink.del_route(route), gone, ""));
        }
        // Connected networks before the gateways within them.
        let mut routes: Vec<&RouteSpec> = changes.add.routes.iter().collect();
        routes.sort_by_key(|route| route.gateway.is_some());
        for route in routes {
            let hint = "; another route to the same network is there already and stays";
            done += usize::from(self.check(self.netlink.add_route(route), |_| false, hint));
        }
        for rule in &changes.add.rules {
            let there = |error: &linux::Error| error.kind() == io::ErrorKind::AlreadyExists;
            done += usize::from(self.check(self.netlink.add_rule(rule), there, ""));
        }
        done
    }

    fn check(
        &mut self,
        result: linux::Result<()>,
        harmless: impl Fn(&linux::Error) -> bool,
        hint_when_there: &str,
    ) -> bool {
        match result {
            Ok(()) => true,
            Err(error) if harmless(&error) => false,
            Err(error) => {
                let there = error.kind() == io::ErrorKind::AlreadyExists;
                let hint = if there { hint_when_there } else { "" };
                self.warnings.warn(format!("{error}{hint}"));
                false
            }
        }
    }

    /// Lets packets in whose way back would be another interface (reverse-path filter `strict` → `loose`): with policy
    /// routing, and for the host's own packets out of the TUN interface, that is the normal case. The kernel goes by the
    /// larger of the interface's value and that of `all`, so that 2 wins over a strict `all`. Given are all such interfaces: of
    /// others it is taken back, as at the end.
    pub fn loosen_reverse_path(&mut self, interfaces: &BTreeSet<String>) {
        let wanted = |interface: &String| device_settings::name("ipv4", interface, "rp_filter");
        self.settings.keep_only("rp_filter", &interfaces.iter().map(wanted).collect());
        for interface in interfaces {
            let (Some(all), Some(own)) = (read_rp_filter("all"), read_rp_filter(interface)) else { continue };
            if all.max(own) != 1 {
                continue;
            }
            match self.settings.set(&wanted(interface), "2") {
                Ok(true) => tracing::info!(interface, "reverse-path filter set from strict to loose"),
                Ok(false) => {}
                Err(error) => self.warnings.warn(format!(
                    "{interface} has a strict reverse-path filter (rp_filter = 1) which drops what comes in there, and it \
                     cannot be changed: {error}; set it to 2"
                )),
            }
        }
    }

    /// Has the kernel not believe router advertisements on these interfaces: there we are the router (RFC 4861 §6.2.7), and any host
    /// could make itself ours. Given are all of them: on others it is taken back, as at the end.
    pub fn ignore_router_advertisements(&mut self, interfaces: &BTreeSet<String>) {
        let wanted = |interface: &String| device_settings::name("ipv6", interface, "accept_ra");
        self.settings.keep_only("accept_ra", &interfaces.iter().map(wanted).collect());
        for interface in interfaces {
            match self.settings.set(&wanted(interface), "0") {
                Ok(true) => {
                    tracing::info!(interface, "router advertisements of its hosts are not believed (accept_ra = 0)");
                }
                Ok(false) => {}
                Err(error) => self.warnings.warn(format!(
                    "{interface}: any host there can become this gateway's way out by a router advertisement, and accept_ra \
                     cannot be changed: {error}; set net.ipv6.conf.{interface}.accept_ra to 0"
                )),
            }
        }
    }

    /// Removes all routes and rules of this instance. Returns how many there were.
    pub fn clear(&mut self) -> usize {
        self.settings.clear();
        self.apply(&HostPlan::default())
    }
}

impl Drop for KernelRoutes {
    fn drop(&mut self) {
        self.clear();
    }
}

/// Packets the kernel queues for the workers; super-packets count once.
const TX_QUEUE_PACKETS: u32 = 1000;
/// Largest super-packet the kernel may hand over: what 16-bit length fields can tell.
const GSO_BYTES_MAX: u32 = 65_535;

/// Whether an error says that the entry to delete is not there.
fn gone(error: &linux::Error) -> bool {
    // ESRCH for routes, ENOENT for rules, ENODEV for an interface that vanished meanwhile.
    matches!(error.raw_os_error(), Some(3 | 2 | 19))
}
