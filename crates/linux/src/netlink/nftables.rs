//! Base chains of nftables and what their rules mention: enough to say what a host's firewall keeps from passing.
//!
//! Also iptables has its chains here (`iptables-nft`). Rules are not interpreted: [`BaseChain::mentions`] searches the bytes
//! of a table's rules for a device name or a port, so that who finds nothing may be wrong about a set, never about a rule. Only what
//! rules drop, and where they lead packets, is read one by one ([`Act`]).

mod rule;

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use super::{End, Messages, RECEIVE_BYTES, receive};
use crate::error::Context;
use crate::sys::{check_size, owned, set_option};
use crate::{Error, Result};

use rule::Rule;
pub use rule::{Act, Effect};

/// Acts of one chain that are told, at most.
const ACTS_MAX: usize = 64;
/// Bytes of rules of one table that are looked at, at most.
const RULE_BYTES_MAX: usize = 8 << 20;
/// Chains that are looked at, at most.
const CHAINS_MAX: usize = 4_096;

const SUBSYSTEM: u16 = 10;
/// Tables that are looked at, at most.
const TABLES_MAX: usize = 4_096;
const GET_TABLE: u16 = (SUBSYSTEM << 8) | 1;
const GET_CHAIN: u16 = (SUBSYSTEM << 8) | 4;
const GET_RULE: u16 = (SUBSYSTEM << 8) | 7;
const GET_ELEMENTS: u16 = (SUBSYSTEM << 8) | 13;
/// Devices of a set that are told, at most.
const DEVICES_MAX: usize = 65_536;
/// Families (linux/netfilter.h).
const INET: u8 = 1;
const NETDEV: u8 = 5;
const ATTRIBUTE_KIND: u16 = 0x3fff;

/// Hook of the network stack at which a base chain stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// Packets that come in by some devices, before anything else.
    Ingress,
    /// Packets that come in, before their destination is looked up.
    Prerouting,
    /// Packets to the host.
    Input,
    /// Packets that the host forwards.
    Forward,
}

/// A base chain that keeps packets from passing or leads them elsewhere: by its policy, by a last rule without a condition, or by
/// some rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseChain {
    /// "ip", "ip6", "inet" or "netdev".
    pub family: &'static str,
    /// Table.
    pub table: String,
    /// Chain.
    pub name: String,
    /// Where it stands.
    pub hook: Hook,
    /// The devices that it stands at, with [`Hook::Ingress`].
    pub devices: Vec<String>,
    /// It drops what none of its rules accepts.
    pub refuses: bool,
    /// Acts of its rules, and of those of chains that it leads to; each once, at most 64. Not told of `legacy`.
    pub acts: Vec<Act>,
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

/// Base chains of the calling thread's namespace that keep packets from passing or lead them elsewhere; at the input hook those
/// that drop what none of their rules accepts. Empty where the kernel has no nftables.
///
/// # Errors
/// As the kernel refuses the question: without CAP_NET_ADMIN.
pub fn base_chains() -> Result<Vec<BaseChain>> {
    let Some(socket) = open()? else { return Ok(Vec::new()) };
    let mut chains: Vec<Chain> = Vec::new();
    dump(&socket, GET_CHAIN, 0, &[], &mut |bytes| {
        if chains.len() < CHAINS_MAX {
            chains.extend(Chain::read(bytes));
        }
    })
    .context("list the chains of nftables")?;
    let (mut list, mut seen) = (Vec::new(), BTreeSet::new());
    for Chain { family, table, .. } in chains.iter().filter(|chain| chain.hook.is_some()) {
        let Some(name) = family_name(*family).filter(|_| seen.insert((family, table))) else { continue };
        let (mut rules, mut size) = (Vec::new(), 0);
        dump(&socket, GET_RULE, *family, &[table], &mut |bytes| {
            size += bytes.len();
            if size <= RULE_BYTES_MAX {
                rules.extend(Rule::read(bytes));
            }
        })
        .context("list the rules of nftables")?;
        let of_table: Vec<&Chain> =
            chains.iter().filter(|chain| chain.table == *table && chain.family == *family).collect();
        list.extend(of_table.iter().filter_map(|chain| chain.with_rules(name, &of_table, &rules)));
    }
    Ok(list)
}

/// Names of the tables of the family `inet`.
///
/// # Errors
/// As the kernel refuses the question: without CAP_NET_ADMIN.
pub fn inet_tables() -> Result<Vec<String>> {
    tables(INET)
}

/// Names of the tables of the family `netdev`.
///
/// # Errors
/// As [`inet_tables`].
pub fn netdev_tables() -> Result<Vec<String>> {
    tables(NETDEV)
}

/// Devices in a set of a table of the family `inet`.
///
/// # Errors
/// As [`inet_tables`]; there is no such set.
pub fn device_set(table: &str, set: &str) -> Result<Vec<String>> {
    let Some(socket) = open()? else { return Ok(Vec::new()) };
    let mut names = Vec::new();
    dump(&socket, GET_ELEMENTS, INET, &[table, set], &mut |bytes| {
        let mut rest = attributes(bytes).and_then(|list| attribute(list, 3)).unwrap_or_default();
        while let Some((element, _, next)) = first(rest) {
            // The key's value: its bytes up to the first zero.
            let value = attribute(element, 1).and_then(|key| attribute(key, 1)).unwrap_or_default();
            let name = value.split(|byte| *byte == 0).next().unwrap_or_default();
            if names.len() < DEVICES_MAX {
                names.push(String::from_utf8_lossy(name).into_owned());
            }
            rest = next;
        }
    })
    .context("list a set of nftables")?;
    Ok(names)
}

fn tables(family: u8) -> Result<Vec<String>> {
    let Some(socket) = open()? else { return Ok(Vec::new()) };
    let mut names = Vec::new();
    dump(&socket, GET_TABLE, family, &[], &mut |bytes| {
        if names.len() < TABLES_MAX {
            names.extend(text(bytes, 1));
        }
    })
    .context("list the tables of nftables")?;
    Ok(names)
}

/// A socket for questions; `None`: the kernel has no nftables.
fn open() -> Result<Option<OwnedFd>> {
    // SAFETY: no pointers are passed.
    let socket = owned(unsafe {
        libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::NETLINK_NETFILTER)
    });
    let socket = match socket {
        Ok(socket) => socket,
        Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => return Ok(None),
        Err(error) => return Err(Error::new("open a netfilter socket", error)),
    };
    let patience = libc::timeval { tv_sec: 2, tv_usec: 0 };
    set_option(&socket, libc::SOL_SOCKET, libc::SO_RCVTIMEO, &patience).context("set a time limit")?;
    Ok(Some(socket))
}

/// A chain as the kernel lists it.
struct Chain {
    family: u8,
    table: String,
    name: String,
    hook: Option<Hook>,
    devices: Vec<String>,
    drops: bool,
}

impl Chain {
    fn read(bytes: &[u8]) -> Option<Self> {
        let family = *bytes.get(16)?;
        let stands = attribute(attributes(bytes)?, 4);
        let number = stands.and_then(|hook| attribute(hook, 1)?.first_chunk());
        let kind = text(bytes, 7);
        let hook = match (family, number.map(|number| u32::from_be_bytes(*number)), kind.as_deref()) {
            (NETDEV, Some(0), Some("filter")) | (INET, Some(5), Some("filter")) => Some(Hook::Ingress),
            (NETDEV, ..) => None,
            (_, Some(0), Some("filter" | "nat")) => Some(Hook::Prerouting),
            (_, Some(1), Some("filter")) => Some(Hook::Input),
            (_, Some(2), Some("filter")) => Some(Hook::Forward),
            _ => None,
        };
        let policy = attribute(attributes(bytes)?, 5).and_then(|policy| policy.first_chunk());
        Some(Self {
            family,
            table: text(bytes, 1)?,
            name: text(bytes, 3)?,
            hook,
            devices: stands.map(devices).unwrap_or_default(),
            drops: policy.is_some_and(|policy| u32::from_be_bytes(*policy) == 0),
        })
    }

    /// The chain with its rules' acts, if there is anything to tell.
    fn with_rules(&self, family: &'static str, of_table: &[&Self], rules: &[Rule]) -> Option<BaseChain> {
        let hook = self.hook?;
        let refuses = self.drops || rules.iter().any(|rule| rule.chain == self.name && rule.refuses_all);
        let mut acts: Vec<Act> = Vec::new();
        if hook != Hook::Input {
            let led = self.led_to(of_table, rules);
            for act in
                rules.iter().filter(|rule| led.contains(rule.chain.as_str())).filter_map(|r| r.act.as_ref())
            {
                if acts.len() < ACTS_MAX && !acts.contains(act) {
                    acts.push(act.clone());
                }
            }
        }
        (refuses || !acts.is_empty()).then(|| BaseChain {
            family,
            table: self.table.clone(),
            name: self.name.clone(),
            hook,
            devices: self.devices.clone(),
            refuses,
            acts,
            rules: rules.iter().flat_map(|rule| rule.bytes.iter().copied()).collect(),
            chains: of_table.iter().map(|chain| chain.name.clone()).collect(),
            legacy: false,
        })
    }

    /// This chain and those that its rules lead to.
    fn led_to<'a>(&'a self, of_table: &[&'a Self], rules: &'a [Rule]) -> BTreeSet<&'a str> {
        let mut led = BTreeSet::from([self.name.as_str()]);
        let mut ahead = vec![self.name.as_str()];
        while let Some(name) = ahead.pop() {
            for rule in rules.iter().filter(|rule| rule.chain == name) {
                let by_map = of_table.iter().filter(|chain| rule.jumps_by_map && chain.hook.is_none());
                let next =
                    rule.jumps.iter().map(String::as_str).chain(by_map.map(|chain| chain.name.as_str()));
                ahead.extend(next.filter(|next| led.insert(next)));
            }
        }
        led
    }
}

/// Names of the devices that a hook is for.
fn devices(hook: &[u8]) -> Vec<String> {
    let one = attribute(hook, 3);
    let mut rest = attribute(hook, 4).unwrap_or_default();
    let mut names: Vec<&[u8]> = one.into_iter().collect();
    while let Some((name, _, next)) = first(rest) {
        names.push(name);
        rest = next;
    }
    let text = |name: &[u8]| String::from_utf8_lossy(name).trim_end_matches('\0').to_owned();
    let mut names: Vec<String> = names.into_iter().map(text).collect();
    names.sort_unstable();
    names.dedup();
    names
}

fn family_name(number: u8) -> Option<&'static str> {
    match number {
        INET => Some("inet"),
        NETDEV => Some("netdev"),
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
pub(super) fn attribute(mut rest: &[u8], kind: u16) -> Option<&[u8]> {
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

/// Asks for a list of tables, chains, rules or a set's elements; the names of a table and a set say of which.
fn dump(
    socket: &OwnedFd,
    kind: u16,
    family: u8,
    names: &[&str],
    each: &mut dyn FnMut(&[u8]),
) -> io::Result<()> {
    let mut request = vec![0; 20];
    for (attribute, name) in (1u16..).zip(names) {
        request.extend(u16::try_from(name.len() + 5).unwrap_or(u16::MAX).to_ne_bytes());
        request.extend(attribute.to_ne_bytes());
        request.extend_from_slice(name.as_bytes());
        request.push(0);
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

/// Readers of lists, for the fuzzer.
pub(crate) mod testing {
    use super::*;

    pub(crate) fn base_chains(datagram: &[u8]) -> usize {
        let parts = || Messages(datagram).map(|part| part.bytes);
        let chains: Vec<Chain> = parts().filter_map(Chain::read).collect();
        let rules: Vec<Rule> = parts().filter_map(Rule::read).collect();
        let all: Vec<&Chain> = chains.iter().collect();
        let told = chains.iter().filter_map(|chain| chain.with_rules("inet", &all, &rules));
        told.map(|chain| chain.acts.len()).sum::<usize>() + chains.len() + rules.len()
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

    fn act(effect: Effect, devices: &[&str]) -> Act {
        Act { effect, devices: devices.iter().map(|name| (*name).to_owned()).collect() }
    }

    #[test]
    fn chains_that_drop_and_what_their_rules_mention() {
        isolated(|| {
            assert_eq!(base_chains().unwrap(), []);
            nft("table ip filter { chain FORWARD { type filter hook forward priority 0; policy drop; \
                 iifname \"docker0\" accept; }; chain DOCKER-USER { }; }");
            nft(
                "table inet f { chain input { type filter hook input priority 0; udp dport 4600 accept; counter drop; }; \
                 chain forward { type filter hook forward priority 0; ct state invalid drop; }; }",
            );
            nft("table inet z { chain pass { type filter hook forward priority 9; log reject; accept; }; \
                 chain fine { type filter hook input priority 9; accept; }; \
                 chain n { type nat hook prerouting priority 0; }; }");
            let chains = base_chains().unwrap();
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

    #[test]
    fn what_rules_refuse_and_where_they_lead() {
        isolated(|| {
            nft(
                "table inet f { set bad { type ipv4_addr; }; chain fw { type filter hook forward priority 0; ct state invalid drop; \
                 iifname \"virbr*\" reject; jump lists; }; chain lists { iifname \"eth1\" oifname \"eth0\" ip saddr @bad drop; \
                 iifname != \"eth0\" tcp dport 25 drop; oif \"lo\" reject; }; chain other { ip saddr 10.0.0.1 drop; }; }",
            );
            nft(
                "table ip n { chain pre { type nat hook prerouting priority dstnat; iifname \"eth1\" udp dport 53 redirect to :5353; \
                 ip daddr 192.0.2.1 tcp dport 80 redirect to :8080; fib daddr type local tcp dport 8080 dnat to 192.168.10.5:80; }; \
                 chain post { type nat hook postrouting priority srcnat; masquerade; }; }",
            );
            nft(
                "table ip6 m { chain rp { type filter hook prerouting priority 10; fib saddr . iif oif missing drop; }; \
                 chain raw { type filter hook prerouting priority raw; iifname vmap { \"eth0\" : jump strangers }; }; \
                 chain strangers { ip6 saddr 2001:db8::/32 drop; }; }",
            );
            nft(
                "table inet p { chain pre { type filter hook prerouting priority mangle; iifname \"eth1\" ct mark set meta mark; \
                 iifname \"eth1\" tcp dport 443 meta mark set 0x200; }; }",
            );
            nft(
                "table netdev d { chain in { type filter hook ingress device \"lo\" priority 0; ip saddr 10.0.0.1 drop; }; \
                 chain out { type filter hook egress device \"lo\" priority 0; tcp dport 445 drop; }; }",
            );
            let chains = base_chains().unwrap();
            let told: Vec<_> =
                chains.iter().map(|c| (c.name.as_str(), c.hook, c.refuses, c.acts.clone())).collect();
            let address = "192.168.10.5".parse().unwrap();
            assert_eq!(
                told,
                [
                    (
                        "fw",
                        Hook::Forward,
                        false,
                        vec![
                            act(Effect::Refuse, &["virbr*"]),
                            act(Effect::Refuse, &["eth1", "eth0"]),
                            act(Effect::Refuse, &[]),
                            act(Effect::Refuse, &["lo"])
                        ]
                    ),
                    (
                        "pre",
                        Hook::Prerouting,
                        false,
                        vec![act(Effect::Redirect, &["eth1"]), act(Effect::Translate(address), &[])]
                    ),
                    ("raw", Hook::Prerouting, false, vec![act(Effect::Refuse, &[])]),
                    ("pre", Hook::Prerouting, false, vec![act(Effect::Mark, &["eth1"])]),
                    ("in", Hook::Ingress, false, vec![act(Effect::Refuse, &[])]),
                ]
            );
            assert_eq!(
                (chains[4].family, chains[4].devices.as_slice()),
                ("netdev", ["lo".to_owned()].as_slice())
            );
        });
    }

    /// The targets of `iptables`, which are no expressions of nftables.
    #[test]
    fn where_targets_of_iptables_lead() {
        isolated(|| {
            for words in [
                "-A PREROUTING -i eth0 -p tcp --dport 80 -j DNAT --to-destination 192.168.10.5:8080",
                "-A PREROUTING -i eth1 -p udp --dport 53 -j REDIRECT --to-ports 5353",
                "-A PREROUTING -m addrtype --dst-type LOCAL -p udp --dport 54 -j REDIRECT --to-ports 5353",
            ] {
                let done = std::process::Command::new("iptables-nft")
                    .args(["-t", "nat"])
                    .args(words.split(' '))
                    .status();
                assert!(done.unwrap().success(), "{words}");
            }
            let chains = base_chains().unwrap();
            let address = "192.168.10.5".parse().unwrap();
            let acts = [act(Effect::Translate(address), &["eth0"]), act(Effect::Redirect, &["eth1"])];
            assert_eq!(chains.len(), 1, "{chains:?}");
            assert_eq!((chains[0].hook, chains[0].acts.as_slice()), (Hook::Prerouting, acts.as_slice()));
        });
    }
}
