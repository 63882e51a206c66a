//! Keeps the kernel from forwarding between interfaces that a datapath forwards between, also when the process has died.
//!
//! While it lives the kernel never does: [`crate::ingress_guard`] takes their packets away before. When it ends without
//! taking leave, that is gone, and a host with `ip_forward = 1` would pass on everything, by no rule and untranslated. So
//! there is a table of `nft` at the forward hook, which needs no process. What comes in for the host, what it sends, and
//! what it passes on to its other devices never meets it; multicast, and what IPsec has unwrapped or will wrap, are the host's too.

use crate::Result;
use crate::error::Context;
use crate::nft;
use crate::own_tables::{self, CLOSED, INTERFACES};

/// The guard of one process. Dropping it leaves the table where it is.
#[derive(Debug)]
pub struct ForwardGuard {
    table: String,
    devices: Vec<String>,
}

impl ForwardGuard {
    /// That of the process with this TUN device; it does nothing yet.
    #[must_use]
    pub fn new(tun: &str) -> Self {
        Self { table: own_tables::name(CLOSED, tun), devices: Vec::new() }
    }

    /// The table that is in force, as `nft` names it; `None`: there is none.
    #[must_use]
    pub fn name(&self) -> Option<String> {
        (!self.devices.is_empty()).then(|| format!("inet {}", self.table))
    }

    /// Closes forwarding between these devices, whether or not they are there, and no others, in one transaction.
    ///
    /// # Errors
    /// Without CAP_NET_ADMIN or the program `nft`; what was in force stays.
    pub fn set(&mut self, devices: &[String]) -> Result<()> {
        if self.devices == devices {
            return Ok(());
        }
        let what = format!("close forwarding between {} for when this process dies", devices.join(", "));
        if devices.is_empty() {
            nft::rules(&own_tables::removal(&self.table)).context(what)?;
        } else {
            // Kernels without IPsec do not know what it has unwrapped, or will wrap.
            let tried = nft::rules(&make(&self.table, devices, true));
            tried.or_else(|_| nft::rules(&make(&self.table, devices, false))).context(what)?;
        }
        self.devices = devices.to_vec();
        Ok(())
    }

    /// Closes it again if somebody has removed the table; returns whether that was so.
    ///
    /// # Errors
    /// As [`Self::set`].
    pub fn keep(&mut self) -> Result<bool> {
        if self.devices.is_empty() || !own_tables::is_gone(&self.table) {
            return Ok(false);
        }
        let devices = std::mem::take(&mut self.devices);
        self.set(&devices).inspect_err(|_| self.devices.clone_from(&devices)).map(|()| true)
    }

    /// Opens it again.
    ///
    /// # Errors
    /// As [`Self::set`].
    pub fn remove(&mut self) -> Result<()> {
        self.set(&[])
    }
}

fn make(table: &str, devices: &[String], ipsec: bool) -> String {
    let names: Vec<String> = devices.iter().map(|device| format!("\"{device}\"")).collect();
    // Where the kernel shows the firewall what it bridges (`bridge-nf-call-iptables`, which Docker switches on), that comes in and leaves by
    // the bridge.
    let same: Vec<String> = names.iter().map(|name| format!("{name} . {name}")).collect();
    let ipsec = if ipsec { "    meta secpath exists accept\n    rt ipsec exists accept\n" } else { "" };
    format!(
        "{}table inet {table} {{\n  set {INTERFACES} {{ type ifname; elements = {{ {} }} }}\n  chain forward {{\n    \
         type filter hook forward priority -10; policy accept;\n    ip daddr 224.0.0.0/4 accept\n    \
         ip6 daddr ff00::/8 accept\n{ipsec}    iifname . oifname {{ {} }} accept\n    \
         iifname @{INTERFACES} oifname @{INTERFACES} drop\n  }}\n}}\n",
        own_tables::removal(table),
        names.join(", "),
        same.join(", ")
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::own_tables::{remove_left_by, remove_orphans, tables};
    use crate::testing::isolated;

    #[test]
    fn the_table_follows_and_is_found_again_by_whoever_comes_next() {
        isolated(|| {
            let devices = |names: &[&str]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
            let mut guard = ForwardGuard::new("ana7");
            assert_eq!(guard.name(), None);
            guard.set(&devices(&["eth0", "eth1"])).unwrap();
            guard.set(&devices(&["eth0", "lan.7"])).unwrap();
            assert_eq!(guard.name().as_deref(), Some("inet anabranch_closed-ana7"));
            let list = ["list", "table", "inet", "anabranch_closed-ana7"];
            let listed = std::process::Command::new("nft").args(list).output().unwrap();
            let text = String::from_utf8_lossy(&listed.stdout);
            assert!(text.contains("\"lan.7\"") && !text.contains("eth1"), "{text}");
            // Somebody clears away all that is of nft.
            assert!(!guard.keep().unwrap());
            nft::rules("flush ruleset").unwrap();
            assert!(guard.keep().unwrap());
            assert_eq!(tables().unwrap(), ["anabranch_closed-ana7"]);
            // Its process ends.
            drop(guard);
            assert_eq!(tables().unwrap(), ["anabranch_closed-ana7"]);
            // That of a process that lives has its device.
            let mut alive = ForwardGuard::new("lo");
            alive.set(&devices(&["eth0"])).unwrap();
            assert_eq!(
                remove_orphans(&devices(&["lan.7", "eth1", "eth0"])).unwrap(),
                ["anabranch_closed-ana7"]
            );
            assert_eq!(remove_left_by("lo").unwrap(), Vec::<String>::new());
            assert_eq!(tables().unwrap(), ["anabranch_closed-lo"]);
            alive.remove().unwrap();
            assert_eq!(tables().unwrap(), Vec::<String>::new());
        });
    }

    /// Another gateway dies too: who starts or stops opens nothing of it.
    #[test]
    fn what_another_process_closed_stays_closed() {
        isolated(|| {
            let devices = |names: &[&str]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
            for (tun, between) in [("ana0", ["eth0", "eth1"]), ("ana1", ["eth1", "a-device-of-15"])] {
                ForwardGuard::new(tun).set(&devices(&between)).unwrap();
            }
            let both = ["anabranch_closed-ana0", "anabranch_closed-ana1"];
            assert_eq!(remove_orphans(&devices(&["eth1"])).unwrap(), Vec::<String>::new());
            assert_eq!(tables().unwrap(), both);
            assert_eq!(remove_orphans(&devices(&["eth0", "eth1", "eth2"])).unwrap(), both[..1]);
            assert_eq!(remove_left_by("ana0").unwrap(), Vec::<String>::new());
            assert_eq!(tables().unwrap(), both[1..]);
            assert_eq!(remove_left_by("ana1").unwrap(), both[1..]);
            // The name of a device may be none of `nft`.
            let netlink = crate::netlink::Netlink::open().unwrap();
            let _tun = crate::tun::Tun::create("ana~0", 1).unwrap();
            assert!(netlink.link("ana~0").unwrap().is_some());
            ForwardGuard::new("ana~0").set(&devices(&["eth0"])).unwrap();
            assert_eq!(remove_orphans(&devices(&["eth0"])).unwrap(), Vec::<String>::new());
            assert_eq!(tables().unwrap(), ["anabranch_closed-ana_0"]);
        });
    }
}
