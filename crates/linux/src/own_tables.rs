//! Tables of `nft` that outlive the process that made them.
//!
//! They carry the name of its TUN device, which lives as long as the process: that of a device that is not there was left behind.

use crate::Result;
use crate::error::Context;
use crate::netlink::nftables;
use crate::nft;
use crate::sys::interface_index;

/// Begin of the name of a [`crate::forward_guard`]'s table.
pub(crate) const CLOSED: &str = "anabranch_closed-";
/// Begin of the name of a [`crate::forward_leads`]'s table.
pub(crate) const FORWARDS: &str = "anabranch_forwards-";

/// Removes the tables of processes that died; their names.
///
/// # Errors
/// Without CAP_NET_ADMIN or the program `nft`.
pub fn remove_orphans() -> Result<Vec<String>> {
    const WHAT: &str = "remove tables of a process that died";
    let mut orphans = tables()?;
    orphans.retain(|table| tun_of(table).is_some_and(|tun| interface_index(tun).is_err()));
    for table in &orphans {
        nft::rules(&removal(table)).context(WHAT)?;
    }
    Ok(orphans)
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
    names.retain(|name| tun_of(name).is_some());
    Ok(names)
}

/// Whether a table is not there any more: `flush ruleset`, with which most files for `nft` begin, takes all of them along. Who cannot be asked has it.
pub(crate) fn is_gone(table: &str) -> bool {
    tables().is_ok_and(|tables| !tables.iter().any(|name| name == table))
}

fn tun_of(table: &str) -> Option<&str> {
    [CLOSED, FORWARDS].into_iter().find_map(|prefix| table.strip_prefix(prefix))
}
