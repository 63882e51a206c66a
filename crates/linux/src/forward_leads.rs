//! Leads what the host itself sends to a port forward at an outside address, and what comes for it by the host's other devices, to the
//! host behind it.
//!
//! To the kernel an outside address is the host itself: a program of the host, a container or a VPN client that sends to a forward
//! there would find nobody. So a table of `nft` translates the destination, as an operator of a kernel's NAT would have it, and the
//! kernel sends or passes the packet on by its own routes, firewall and address translation. The host's own rules at the same
//! hooks come first.

use std::net::{IpAddr, SocketAddr};

use crate::Result;
use crate::error::Context;
use crate::nft;
use crate::own_tables::{self, FORWARDS};

/// Ports of one forward that lead to others, at most; `nft` lists each of them.
const MOVED_PORTS_MAX: u16 = 1_024;
/// Ports of a forward that the host's own programs reach, at most: among more there are those that they use themselves.
const OWN_PORTS_MAX: u16 = 1_024;

/// A port forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lead {
    /// IP protocol: TCP (6) or UDP (17).
    pub protocol: u8,
    /// Outside address and first port.
    pub listen: SocketAddr,
    /// Inside address, of the same version, and first port.
    pub to: SocketAddr,
    /// Number of ports, at least 1.
    pub ports: u16,
    /// Also for the host's own programs.
    pub own: bool,
    /// For everybody, by whatever device: it leads to the host itself.
    pub all: bool,
}

impl Lead {
    /// Rule of `nft`. `None`: the kernel cannot have it.
    fn rule(&self) -> Option<String> {
        let protocol = match self.protocol {
            6 => "tcp",
            17 => "udp",
            _ => return None,
        };
        let (family, to) = match (self.listen.ip(), self.to.ip()) {
            (IpAddr::V4(_), IpAddr::V4(to)) => ("ip", to.to_string()),
            (IpAddr::V6(_), IpAddr::V6(to)) => ("ip6", format!("[{to}]")),
            _ => return None,
        };
        let (first, inside) = (self.listen.port(), self.to.port());
        let steps = self.ports.checked_sub(1)?;
        let last = first.checked_add(steps)?;
        let ports = if steps == 0 { first.to_string() } else { format!("{first}-{last}") };
        let target = if first == inside {
            to
        } else if steps == 0 {
            format!("{to}:{inside}")
        } else if self.ports <= MOVED_PORTS_MAX {
            let pairs = (0..=steps).map(|step| Some((first + step, inside.checked_add(step)?)));
            let pairs = pairs.map(|pair| pair.map(|(from, to)| format!("{from} : {to}")));
            let pairs: Vec<String> = pairs.collect::<Option<_>>()?;
            format!("{to} : {protocol} dport map {{ {} }}", pairs.join(", "))
        } else {
            return None;
        };
        let listen = self.listen.ip();
        Some(format!("    {family} daddr {listen} {protocol} dport {ports} dnat {family} to {target}\n"))
    }
}

/// The table of one process. Dropping it leaves the table where it is.
#[derive(Debug)]
pub struct ForwardLeads {
    table: String,
    /// Devices and leads in force; `None`: what a process that died left, if it did.
    told: Option<(Vec<String>, Vec<Lead>)>,
}

impl ForwardLeads {
    /// That of the process with this TUN device; it does nothing yet.
    #[must_use]
    pub fn new(tun: &str) -> Self {
        Self { table: own_tables::name(FORWARDS, tun), told: None }
    }

    /// Leads what the host's own programs send and what comes by these devices, and nothing else, in one transaction. Of two leads
    /// with the same port the first counts.
    ///
    /// # Errors
    /// Without CAP_NET_ADMIN, the program `nft` or a kernel that translates addresses; what was in force stays.
    pub fn set(&mut self, devices: &[String], leads: &[Lead]) -> Result<()> {
        const WHAT: &str = "lead the host's other devices to port forwards";
        let wanted =
            if leads.is_empty() { (Vec::new(), Vec::new()) } else { (devices.to_vec(), leads.to_vec()) };
        if self.told.as_ref() == Some(&wanted) {
            return Ok(());
        }
        if wanted.1.is_empty() && self.told.is_none() && own_tables::is_gone(&self.table) {
            self.told = Some(wanted);
            return Ok(());
        }
        let mut script = own_tables::removal(&self.table);
        if !wanted.1.is_empty() {
            script += &make(&self.table, &wanted.0, &wanted.1);
        }
        nft::rules(&script).context(WHAT)?;
        self.told = Some(wanted);
        Ok(())
    }

    /// Makes the table again if somebody has removed it; returns whether that was so.
    ///
    /// # Errors
    /// As [`Self::set`].
    pub fn keep(&mut self) -> Result<bool> {
        let Some(told) = self.told.take_if(|told| !told.1.is_empty() && own_tables::is_gone(&self.table))
        else {
            return Ok(false);
        };
        let made = self.set(&told.0, &told.1);
        self.told.get_or_insert(told);
        made.map(|()| true)
    }
}

fn make(table: &str, devices: &[String], leads: &[Lead]) -> String {
    // `nft` has no way to write the others.
    let writable = devices.iter().filter(|device| !device.contains(['"', '\\']));
    let names: Vec<String> = writable.map(|device| format!("\"{device}\"")).collect();
    let all: String = leads.iter().filter_map(Lead::rule).collect();
    let few: String =
        leads.iter().filter(|lead| lead.own && lead.ports <= OWN_PORTS_MAX).filter_map(Lead::rule).collect();
    let by_others = if names.is_empty() {
        String::new()
    } else {
        format!("    iifname != {{ {} }} accept\n{all}", names.join(", "))
    };
    let by_all: String = leads.iter().filter(|lead| lead.all).filter_map(Lead::rule).collect();
    format!(
        "table inet {table} {{\n  chain prerouting {{\n    type nat hook prerouting priority -99; policy accept;\n{by_all}{by_others}  }}\n  \
         chain output {{\n    type nat hook output priority -99; policy accept;\n    oifname != \"lo\" accept\n{few}  }}\n}}\n"
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::testing::isolated;

    fn lead(protocol: u8, listen: &str, to: &str, ports: u16) -> Lead {
        Lead {
            protocol,
            listen: listen.parse().unwrap(),
            to: to.parse().unwrap(),
            ports,
            own: true,
            all: false,
        }
    }

    fn listed() -> String {
        let list = ["list", "table", "inet", "anabranch_forwards-ana7"];
        let listed = std::process::Command::new("nft").args(list).output().unwrap();
        String::from_utf8_lossy(&listed.stdout).into_owned()
    }

    #[test]
    fn the_kernel_takes_each_kind_of_forward() {
        isolated(|| {
            let mut leads = ForwardLeads::new("ana7");
            let devices = vec!["docker0".to_owned(), "vpn.7".to_owned(), "a\"b".to_owned()];
            let all = [
                lead(6, "203.0.113.1:8080", "192.168.10.5:80", 1),
                lead(17, "203.0.113.1:5000", "192.168.10.5:5000", 10),
                lead(6, "203.0.113.1:6000", "192.168.10.5:7000", 3),
                lead(6, "[2001:db8::1]:8080", "[fd00::5]:80", 1),
                // Nothing that nft would take, or not in this length.
                lead(132, "203.0.113.1:9000", "192.168.10.5:80", 1),
                lead(6, "203.0.113.1:10000", "192.168.10.5:20000", 2_000),
            ];
            let dmz = [lead(17, "203.0.113.1:1024", "192.168.10.5:1024", 64_000)];
            leads.set(&devices, &all).unwrap();
            let text = listed();
            for part in ["vpn.7", "to 192.168.10.5:80", "5000-5009", "6002 : 7002", "[fd00::5]:80"] {
                assert!(text.contains(part), "{part}: {text}");
            }
            assert_eq!(text.matches("dnat").count(), 8, "{text}");
            // Other devices; all ports, of which some are the host's own; no devices; nothing.
            leads.set(&devices[..1], &all[..1]).unwrap();
            let text = listed();
            assert!(!text.contains("vpn.7") && text.matches("dnat").count() == 2, "{text}");
            leads.set(&devices, &dmz).unwrap();
            assert_eq!(listed().matches("dnat").count(), 1, "{}", listed());
            let others = Lead { own: false, ..all[0] };
            leads.set(&devices, &[others]).unwrap();
            assert_eq!(listed().matches("dnat").count(), 1, "{}", listed());
            leads.set(&[], &all[..1]).unwrap();
            assert_eq!(listed().matches("dnat").count(), 1, "{}", listed());
            leads.set(&devices, &[all[1], Lead { all: true, ..all[0] }]).unwrap();
            let text = listed();
            let (before, _) = text.split_once("iifname").unwrap();
            assert!(before.contains("8080") && !before.contains("5000"), "{text}");
            leads.set(&devices, &[]).unwrap();
            assert_eq!(listed(), "");
        });
    }

    #[test]
    fn a_table_that_somebody_removed_is_made_again() {
        isolated(|| {
            let mut leads = ForwardLeads::new("ana7");
            let all = [lead(6, "203.0.113.1:8080", "192.168.10.5:80", 1)];
            assert!(!leads.keep().unwrap(), "there is none yet");
            leads.set(&["docker0".to_owned()], &all).unwrap();
            let text = listed();
            assert!(!leads.keep().unwrap());
            nft::rules("flush ruleset").unwrap();
            assert!(leads.keep().unwrap() && listed() == text, "{}", listed());
            leads.set(&[], &[]).unwrap();
            assert!(!leads.keep().unwrap());
        });
    }

    #[test]
    fn a_table_of_a_process_that_died_is_an_orphan() {
        isolated(|| {
            let all = [lead(6, "203.0.113.1:8080", "192.168.10.5:80", 1)];
            ForwardLeads::new("ana7").set(&["docker0".to_owned()], &all).unwrap();
            ForwardLeads::new("lo").set(&["docker0".to_owned()], &all).unwrap();
            assert_eq!(own_tables::remove_orphans(&[]).unwrap(), ["anabranch_forwards-ana7"]);
            assert_eq!(own_tables::tables().unwrap(), ["anabranch_forwards-lo"]);
            // The next process with the same device has no forwards.
            ForwardLeads::new("lo").set(&["docker0".to_owned()], &[]).unwrap();
            assert_eq!(own_tables::tables().unwrap(), Vec::<String>::new());
        });
    }
}
