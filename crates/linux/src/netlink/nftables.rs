//! Base chains of nftables and what their rules mention: enough to say what a host's firewall keeps from passing.
//!
//! Also iptables has its chains here (`iptables-nft`). Rules are not interpreted: [`BaseChain::mentions`] searches the bytes
//! of a table's rules for a device name or a port, so that who finds nothing may be wrong about a set, never about a rule.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use super::{End, Messages, RECEIVE_BYTES, receive};
use crate::error::Context;
use crate::sys::{check_size, owned, set_option};
use crate::{Error, Result};

/// Bytes of rules of one table that are looked at, at most.
const RULE_BYTES_MAX: usize = 8 << 20;
/// Chains that are looked at, at most.
const CHAINS_MAX: usize = 4_096;

const SUBSYSTEM: u16 = 10;
const GET_CHAIN: u16 = (SUBSYSTEM << 8) | 4;
const GET_RULE: u16 = (SUBSYSTEM << 8) | 7;
const ATTRIBUTE_KIND: u16 = 0x3fff;

/// Hook of the network stack at which a base chain stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// Packets to the host.
    Input,
    /// Packets that the host forwards.
    Forward,
}

/// A base chain of the filter kind that drops: by its policy, or by a last rule without a condition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseChain {
    /// "ip", "ip6" or "inet".
    pub family: &'static str,
    /// Table.
    pub table: String,
    /// Chain.
    pub name: String,
    /// Where it stands.
    pub hook: Hook,
    /// The rules of its table as the kernel lists them.
    pub rules: Vec<u8>,
    /// All chains of its table.
    pub chains: Vec<String>,
    /// Of `iptables-legacy`, which has chains of its own beside these ([`crate::iptables_legacy`]).
    pub legacy: bool,
}

impl BaseChain {
    /// Whether any rule of its table has these bytes: a device name, a port.
    #[must_use]
    pub fn mentions(&self, bytes: &[u8]) -> bool {
        !bytes.is_empty() && self.rules.windows(bytes.len()).any(|window| window == bytes)
    }

    /// Whether its table has a chain of this name.
    #[must_use]
    pub fn has_chain(&self, name: &str) -> bool {
        self.chains.iter().any(|chain| chain == name)
    }

    /// Whether it sees packets of this address family.
    #[must_use]
    pub fn covers(&self, ipv4: bool) -> bool {
        matches!((self.family, ipv4), ("inet", _) | ("ip", true) | ("ip6", false))
    }
}

/// Base chains of the calling thread's namespace that drop what none of their rules accepts. Empty where the kernel has no
/// nftables.
///
/// # Errors
/// As the kernel refuses the question: without CAP_NET_ADMIN.
pub fn dropping_chains() -> Result<Vec<BaseChain>> {
    // SAFETY: no pointers are passed.
    let socket = owned(unsafe {
        libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::NETLINK_NETFILTER)
    });
    let socket = match socket {
        Ok(socket) => socket,
        Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => return Ok(Vec::new()),
        Err(error) => return Err(Error::new("open a netfilter socket", error)),
    };
    let patience = libc::timeval { tv_sec: 2, tv_usec: 0 };
    set_option(&socket, libc::SOL_SOCKET, libc::SO_RCVTIMEO, &patience).context("set a time limit")?;
    let mut chains: Vec<Chain> = Vec::new();
    dump(&socket, GET_CHAIN, 0, &[], &mut |bytes| {
        if chains.len() < CHAINS_MAX {
            chains.extend(Chain::read(bytes));
        }
    })
    .context("list the chains of nftables")?;
    let mut list = Vec::new();
    for chain in &chains {
        let (Some(hook), Some(family)) = (chain.hook, family_name(chain.family)) else { continue };
        let (mut rules, mut refuses) = (Vec::new(), chain.drops);
        let mut table = chain.table.clone().into_bytes();
        table.push(0);
        dump(&socket, GET_RULE, chain.family, &table, &mut |bytes| {
            if rules.len() + bytes.len() <= RULE_BYTES_MAX {
                rules.extend_from_slice(bytes);
            }
            refuses |= text(bytes, 2).as_deref() == Some(&chain.name) && refuses_all(bytes);
        })
        .context("list the rules of nftables")?;
        if refuses {
            let same = |other: &&Chain| other.table == chain.table && other.family == chain.family;
            list.push(BaseChain {
                family,
                table: chain.table.clone(),
                name: chain.name.clone(),
                hook,
                rules,
                chains: chains.iter().filter(same).map(|other| other.name.clone()).collect(),
                legacy: false,
            });
        }
    }
    Ok(list)
}

/// A chain as the kernel lists it.
struct Chain {
    family: u8,
    table: String,
    name: String,
    hook: Option<Hook>,
    drops: bool,
}

impl Chain {
    fn read(bytes: &[u8]) -> Option<Self> {
        let hook = attribute(attributes(bytes)?, 4).and_then(|hook| {
            match u32::from_be_bytes(*attribute(hook, 1)?.first_chunk()?) {
                1 => Some(Hook::Input),
                2 => Some(Hook::Forward),
                _ => None,
            }
        });
        let filter = text(bytes, 7).is_some_and(|kind| kind == "filter");
        let policy = attribute(attributes(bytes)?, 5).and_then(|policy| policy.first_chunk());
        Some(Self {
            family: *bytes.get(16)?,
            table: text(bytes, 1)?,
            name: text(bytes, 3)?,
            hook: hook.filter(|_| filter),
            drops: policy.is_some_and(|policy| u32::from_be_bytes(*policy) == 0),
        })
    }
}

fn family_name(number: u8) -> Option<&'static str> {
    match number {
        1 => Some("inet"),
        2 => Some("ip"),
        10 => Some("ip6"),
        _ => None,
    }
}

/// Attributes of a message, behind its header (16) and that of netfilter (4).
fn attributes(bytes: &[u8]) -> Option<&[u8]> {
    bytes.get(20..)
}

/// Value of the first attribute of a kind.
fn attribute(mut rest: &[u8], kind: u16) -> Option<&[u8]> {
    while let Some((value, found, next)) = first(rest) {
        if found == kind {
            return Some(value);
        }
        rest = next;
    }
    None
}

/// Value and kind of the first attribute, and what follows it.
fn first(rest: &[u8]) -> Option<(&[u8], u16, &[u8])> {
    let head: &[u8; 4] = rest.first_chunk()?;
    let length = usize::from(u16::from_ne_bytes([head[0], head[1]]));
    let value = rest.get(4..length)?;
    let next = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    Some((value, u16::from_ne_bytes([head[2], head[3]]) & ATTRIBUTE_KIND, next))
}

/// A text attribute of a message.
fn text(bytes: &[u8], kind: u16) -> Option<String> {
    let value = attribute(attributes(bytes)?, kind)?;
    Some(String::from_utf8_lossy(value).trim_end_matches('\0').to_owned())
}

/// Whether a rule drops or rejects every packet: it has no expression that compares anything.
fn refuses_all(bytes: &[u8]) -> bool {
    let Some(mut rest) = attributes(bytes).and_then(|bytes| attribute(bytes, 4)) else { return false };
    let mut refuses = false;
    while let Some((expression, _, next)) = first(rest) {
        rest = next;
        let name = attribute(expression, 1).unwrap_or_default();
        match name.strip_suffix(b"\0").unwrap_or(name) {
            b"counter" | b"log" => {}
            b"reject" => refuses = true,
            // Data, in it the verdict, in it the code: 0 is NF_DROP.
            b"immediate" => {
                let code = [2, 2, 2, 1].iter().try_fold(expression, |within, kind| attribute(within, *kind));
                refuses |= code.is_some_and(|code| code == [0; 4]);
            }
            _ => return false,
        }
    }
    refuses
}

/// Asks for a list of chains or rules; `table` restricts rules to one.
fn dump(
    socket: &OwnedFd,
    kind: u16,
    family: u8,
    table: &[u8],
    each: &mut dyn FnMut(&[u8]),
) -> io::Result<()> {
    let mut request = vec![0; 20];
    if !table.is_empty() {
        request.extend(u16::try_from(table.len() + 4).unwrap_or(u16::MAX).to_ne_bytes());
        request.extend(1u16.to_ne_bytes());
        request.extend_from_slice(table);
        request.resize(request.len().next_multiple_of(4), 0);
    }
    let length = request.len() as u32;
    request[..4].copy_from_slice(&length.to_ne_bytes());
    request[4..6].copy_from_slice(&kind.to_ne_bytes());
    let flags = (libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16;
    request[6..8].copy_from_slice(&flags.to_ne_bytes());
    request[16] = family;
    // SAFETY: the kernel reads `request.len()` bytes.
    check_size(unsafe { libc::send(socket.as_raw_fd(), request.as_ptr().cast(), request.len(), 0) })?;
    let mut buffer = vec![0; RECEIVE_BYTES];
    loop {
        let length = receive(socket, &mut buffer, 0)?;
        for part in Messages(&buffer[..length]) {
            match part.end()? {
                End::Done => return Ok(()),
                End::More => each(part.bytes),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::testing::isolated;

    fn nft(text: &str) {
        let done = std::process::Command::new("nft").arg(text).status().unwrap();
        assert!(done.success(), "{text}");
    }

    #[test]
    fn chains_that_drop_and_what_their_rules_mention() {
        isolated(|| {
            assert_eq!(dropping_chains().unwrap(), []);
            nft("table ip filter { chain FORWARD { type filter hook forward priority 0; policy drop; \
                 iifname \"docker0\" accept; }; chain DOCKER-USER { }; }");
            nft(
                "table inet f { chain input { type filter hook input priority 0; udp dport 4600 accept; counter drop; }; \
                 chain forward { type filter hook forward priority 0; ip saddr 10.0.0.1 drop; }; }",
            );
            nft("table inet z { chain pass { type filter hook forward priority 9; log reject; accept; }; \
                 chain fine { type filter hook input priority 9; accept; }; \
                 chain n { type nat hook prerouting priority 0; }; }");
            let chains = dropping_chains().unwrap();
            let names: Vec<_> =
                chains.iter().map(|c| (c.family, c.table.as_str(), c.name.as_str(), c.hook)).collect();
            assert_eq!(
                names,
                [
                    ("ip", "filter", "FORWARD", Hook::Forward),
                    ("inet", "f", "input", Hook::Input),
                    ("inet", "z", "pass", Hook::Forward)
                ]
            );
            assert!(chains[0].mentions(b"docker0\0") && !chains[0].mentions(b"ana0\0"));
            assert!(chains[0].has_chain("DOCKER-USER") && !chains[1].has_chain("DOCKER-USER"));
            assert!(
                chains[1].mentions(&4600u16.to_be_bytes()) && !chains[1].mentions(&4601u16.to_be_bytes())
            );
            assert!(chains[0].covers(true) && !chains[0].covers(false) && chains[1].covers(false));
        });
    }
}
