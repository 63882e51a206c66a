//! Keeps the kernel's own stack from seeing what the datapath handles.
//!
//! Packet sockets see a frame before the ingress hook does; behind them the guard drops what a
//! [`KernelShare`] does not leave to the kernel, so that the kernel neither answers nor forwards it. It is an
//! eBPF program of the interface (tcx, Linux 6.6), which is gone with the process however that ends; or, where
//! programs are not allowed, an `nft` table of the interface, which a killed process leaves behind and the next
//! start replaces.
//!
//! Between two processes [`hold_interfaces`] keeps the stack from the flows of the first one until the second one guards the
//! interface: a table whose timed set makes it drop nothing any more when the time is over, whoever is still alive.

use std::net::IpAddr;
use std::os::fd::OwnedFd;

use crate::bpf::{KernelShare, OwnPorts, device_egress, kernel, nft_ether_type};
use crate::error::Context;
use crate::link_layer::LinkLayer;
use crate::nft;
use crate::sys::interface_index;
use crate::{Error, Result};

/// Parts of a guard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuardKind {
    /// An eBPF program at the interface's tcx ingress.
    Program,
    /// A table of `nft` in the family `netdev`.
    Table,
}

#[derive(Debug)]
enum Hold {
    /// The link of the guard, and that of the program for what leaves.
    Program(OwnedFd, #[expect(dead_code, reason = "held until the guard goes")] OwnedFd),
    Table(String),
}

/// An interface whose traffic the kernel's stack does not see, but for a [`KernelShare`]. Dropping it takes
/// the guard away.
#[derive(Debug)]
pub struct IngressGuard {
    interface: String,
    layer: LinkLayer,
    hold: Hold,
}

impl IngressGuard {
    /// Guards an interface of the calling thread's namespace: with a program, or with `nft` if that is not
    /// allowed or not known to this kernel. Needs CAP_NET_ADMIN.
    /// `own`: what becomes of the host's packets from ports that flows have; with `nft` they leave as ever.
    pub fn attach(interface: &str, kernel: &KernelShare, own: Option<&OwnPorts>) -> Result<IngressGuard> {
        match IngressGuard::attach_program(interface, kernel, own) {
            Ok(guard) => Ok(guard),
            Err(program) => IngressGuard::attach_table(interface, kernel).map_err(|table| {
                let text = format!(
                    "guard {interface}: needs CAP_BPF and CAP_NET_ADMIN with Linux 6.6 or later ({program}), \
                     or CAP_NET_ADMIN and the program nft"
                );
                Error::new(text, table.into())
            }),
        }
    }

    /// Only with a program.
    pub fn attach_program(
        interface: &str,
        share: &KernelShare,
        own: Option<&OwnPorts>,
    ) -> Result<IngressGuard> {
        let what = format!("attach a program to the ingress of {interface}");
        let index = interface_index(interface).context(&what)?;
        let layer = LinkLayer::of(interface).context(&what)?;
        let program = share.load_guard(layer)?;
        let back = device_egress::load(layer, own)?;
        let link = kernel::attach_ingress(index, &program).context(&what)?;
        let back = kernel::attach_egress(index, &back)
            .context(format!("attach a program to the egress of {interface}"))?;
        // What a killed process left behind would drop by its own, older rules; what a stopped one did has done its work.
        let tables = [table_name(interface), hold_name(interface)];
        let _ = nft::rules(&tables.map(|table| remove_table(&table)).concat());
        Ok(IngressGuard { interface: interface.to_owned(), layer, hold: Hold::Program(link, back) })
    }

    /// Only with `nft`.
    pub fn attach_table(interface: &str, share: &KernelShare) -> Result<IngressGuard> {
        let what = format!("guard {interface} with an nft table");
        let layer = LinkLayer::of(interface).context(&what)?;
        share.filter(layer)?;
        let table = table_name(interface);
        let script = make_table(&table, interface, layer, share) + &remove_table(&hold_name(interface));
        nft::rules(&script).context(&what)?;
        Ok(IngressGuard { interface: interface.to_owned(), layer, hold: Hold::Table(table) })
    }

    /// Its parts.
    pub fn kind(&self) -> GuardKind {
        match self.hold {
            Hold::Program(..) => GuardKind::Program,
            Hold::Table(_) => GuardKind::Table,
        }
    }

    /// Says anew what is left to the kernel, without a moment without guard. Call it in the namespace of the
    /// interface.
    pub fn set_kernel_share(&self, share: &KernelShare) -> Result<()> {
        let what = format!("change the guard of {}", self.interface);
        match &self.hold {
            Hold::Program(link, _) => {
                let program = share.load_guard(self.layer)?;
                kernel::replace_program(link, &program).context(what)
            }
            Hold::Table(table) => {
                share.filter(self.layer)?;
                nft::rules(&make_table(table, &self.interface, self.layer, share)).context(what)
            }
        }
    }

    /// Makes its table again if it has one and that is not among these, the [`netdev_tables`](crate::netlink::nftables::netdev_tables) of now: `flush ruleset`,
    /// with which most files for `nft` begin, takes it along. Returns whether that was so.
    ///
    /// # Errors
    /// Without CAP_NET_ADMIN or the program `nft`, or when the interface is not there any more.
    pub fn keep(&self, share: &KernelShare, tables: &[String]) -> Result<bool> {
        match &self.hold {
            Hold::Table(table) if !tables.contains(table) => self.set_kernel_share(share).map(|()| true),
            Hold::Table(_) | Hold::Program(..) => Ok(false),
        }
    }
}

impl Drop for IngressGuard {
    fn drop(&mut self) {
        if let Hold::Table(table) = &self.hold
            && let Err(error) = nft::rules(&remove_table(table))
        {
            tracing::warn!(%error, table, "an nft table could not be removed");
        }
    }
}

/// Packets that the kernel's stack must not see between two processes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeldPorts {
    /// Addresses of the host: what is for others passes through, and is dropped.
    pub own: Vec<IpAddr>,
    /// Ports of these that are the datapath's, first and last: TCP, UDP, SCTP.
    pub ports: Vec<(IpAddr, (u16, u16))>,
}

/// Drops what is the datapath's at these interfaces for so many seconds, by tables of `nft` that need no process; the next
/// [`IngressGuard`] removes that of its interface. Behind that time they are still there and drop nothing. All of them, or
/// none: the kernel takes its time for each transaction.
pub fn hold_interfaces(
    interfaces: &[String],
    share: &KernelShare,
    held: &HeldPorts,
    seconds: u16,
) -> Result<()> {
    let what = format!("hold {} with nft tables", interfaces.join(", "));
    let script: String =
        interfaces.iter().map(|interface| make_hold(interface, share, held, seconds)).collect();
    nft::rules(&script).context(&what)
}

/// Of another beginning than [`table_name`], whatever the interface is called.
fn hold_name(interface: &str) -> String {
    table_name(interface).replacen("anabranch-", "anabranch_hold-", 1)
}

fn make_hold(interface: &str, share: &KernelShare, held: &HeldPorts, seconds: u16) -> String {
    let table = hold_name(interface);
    let layer = LinkLayer::of(interface).unwrap_or_default();
    let kind = nft_ether_type(layer);
    let mut rules = vec![format!("{kind} != @held accept")];
    rules.extend(share.nft_rules(layer));
    for (family, ipv4) in [("ip", true), ("ip6", false)] {
        let own: Vec<String> =
            held.own.iter().filter(|own| own.is_ipv4() == ipv4).map(ToString::to_string).collect();
        let through = if own.is_empty() {
            format!("{kind} {family} drop")
        } else {
            format!("{kind} {family} {family} daddr != {{ {} }} drop", own.join(", "))
        };
        rules.push(through);
    }
    for address in &held.own {
        let of_address = held.ports.iter().filter(|(of, _)| of == address);
        let ranges: Vec<String> = of_address.map(|(_, (first, last))| format!("{first}-{last}")).collect();
        if ranges.is_empty() {
            continue;
        }
        let family = if address.is_ipv4() { "ip" } else { "ip6" };
        rules.push(format!(
            "{kind} {family} {family} daddr {address} meta l4proto {{ tcp, udp, sctp }} th dport {{ {} }} drop",
            ranges.join(", ")
        ));
    }
    let rules: String = rules.iter().map(|rule| format!("    {rule}\n")).collect();
    format!(
        "{}table netdev {table} {{\n  set held {{ type ether_type; flags timeout; elements = {{ 0x0800 timeout \
         {seconds}s, 0x86dd timeout {seconds}s }} }}\n  chain ingress {{\n    type filter hook ingress device \
         \"{interface}\" priority -500; policy accept;\n{rules}  }}\n}}\n",
        remove_table(&table)
    )
}

/// Names of nft are letters, digits and a few signs.
fn table_name(interface: &str) -> String {
    let plain = |letter: char| letter.is_ascii_alphanumeric() || matches!(letter, '-' | '_' | '.');
    let name: String = interface.chars().map(|letter| if plain(letter) { letter } else { '_' }).collect();
    format!("anabranch-{name}")
}

/// Deleting needs the table to be there; declaring it makes it so.
fn remove_table(table: &str) -> String {
    format!("table netdev {table} {{ }}\ndelete table netdev {table}\n")
}

/// One transaction: the old table goes and the new one comes at once.
fn make_table(table: &str, interface: &str, layer: LinkLayer, share: &KernelShare) -> String {
    let rules: String = share.nft_rules(layer).iter().map(|rule| format!("    {rule}\n")).collect();
    format!(
        "{}table netdev {table} {{\n  chain ingress {{\n    type filter hook ingress device \"{interface}\" \
         priority -500; policy drop;\n{rules}  }}\n}}\n",
        remove_table(table)
    )
}

#[cfg(test)]
mod tests;
