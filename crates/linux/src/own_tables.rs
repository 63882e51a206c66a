//! Tables of `nft` that outlive the process that made them.
//!
//! They carry the name of its TUN device, which lives as long as the process: that of a device that is not there was left behind.

use crate::Result;
use crate::error::Context;
use crate::netlink::{Netlink, nftables};
use crate::nft;
use crate::sys::interface_index;

/// Begin of the name of a [`crate::forward_guard`]'s table.
pub(crate) const CLOSED: &str = "anabranch_closed-";
/// The set of the devices between which one of them closes forwarding.
pub(crate) const INTERFACES: &str = "interfaces";
/// Begin of the name of a [`crate::forward_leads`]'s table.
pub(crate) const FORWARDS: &str = "anabranch_forwards-";

/// Removes tables of processes that died: those that close nothing but these devices, which are the caller's by now. What another
/// gateway closed stays closed until that starts again, or is stopped ([`remove_left_by`]). Returns their names.
///
/// # Errors
/// Without CAP_NET_ADMIN or the program `nft`.
pub fn remove_orphans(devices: &[String]) -> Result<Vec<String>> {
    let alive: Vec<String> = Netlink::open()?.links()?.into_iter().map(|link| link.name).collect();
    let mut orphans = tables()?;
    orphans.retain(|table| !of(alive.iter().map(String::as_str)).any(|name| name == *table));
    let mut list = Vec::new();
    for table in orphans {
        let closes = if table.starts_with(CLOSED) {
            nftables::device_set(&table, INTERFACES)?
        } else {
            // Of forwards: nobody takes the packets.
            Vec::new()
        };
        if closes.iter().all(|device| devices.contains(device)) {
            list.push(table);
        }
    }
    remove(list)
}

/// Removes what the process with this TUN device left behind, unless the device is there. Returns the tables' names.
///
/// # Errors
/// As [`remove_orphans`].
pub fn remove_left_by(tun: &str) -> Result<Vec<String>> {
    if interface_index(tun).is_ok() {
        return Ok(Vec::new());
    }
    let mut left = tables()?;
    left.retain(|table| of([tun].into_iter()).any(|name| name == *table));
    remove(left)
}

fn remove(tables: Vec<String>) -> Result<Vec<String>> {
    for table in &tables {
        nft::rules(&removal(table)).context("remove tables of a process that died")?;
    }
    Ok(tables)
}

/// Names of the tables of the processes with these TUN devices.
fn of<'a>(tuns: impl Iterator<Item = &'a str>) -> impl Iterator<Item = String> {
    tuns.flat_map(|tun| [name(CLOSED, tun), name(FORWARDS, tun)])
}

/// Name of a table. Names of nft are letters, digits and a few signs.
pub(crate) fn name(prefix: &str, tun: &str) -> String {
    let plain = |letter: char| letter.is_ascii_alphanumeric() || matches!(letter, '-' | '_' | '.');
    let tun: String = tun.chars().map(|letter| if plain(letter) { letter } else { '_' }).collect();
    format!("{prefix}{tun}")
}

/// Script that removes a table. Deleting needs it to be there; declaring it makes it so.
pub(crate) fn removal(table: &str) -> String {
    format!("table inet {table} {{ }}\ndelete table inet {table}\n")
}

/// Names of all tables of ours.
pub(crate) fn tables() -> Result<Vec<String>> {
    let mut names = nftables::inet_tables()?;
    names.retain(|name| [CLOSED, FORWARDS].iter().any(|prefix| name.starts_with(prefix)));
    Ok(names)
}

/// Whether a table is not there any more: `flush ruleset`, with which most files for `nft` begin, takes all of them along. Who cannot be asked has it.
pub(crate) fn is_gone(table: &str) -> bool {
    tables().is_ok_and(|tables| !tables.iter().any(|name| name == table))
}
