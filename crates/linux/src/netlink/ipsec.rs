//! The kernel's IPsec policies (XFRM): which of the packets that it passes on leave or must come in under IPsec.
//!
//! Daemons (strongSwan, libreswan) set them for tunnels without a device of their own. Who forwards past the kernel would send
//! in the clear what they say is sealed.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use ipnet::IpNet;
use packet::ip::{PROTOCOL_SCTP, PROTOCOL_TCP, PROTOCOL_UDP, PROTOCOL_UDP_LITE};

use super::nftables::attribute;
use super::tunnel::Tunnel;
use super::{End, Messages, RECEIVE_BYTES, open_protocol, receive};
use crate::Result;
use crate::error::Context;
use crate::sys::check_size;

/// Of linux/xfrm.h: the questions for policies and states, and the groups (4 and 3) of their changes.
const GET_POLICY: u16 = 0x15;
const NEW_POLICY: u16 = 0x13;
const GROUP_POLICY: u32 = 1 << 3;
const GET_STATE: u16 = 0x12;
const NEW_STATE: u16 = 0x10;
const GROUP_STATE: u32 = 1 << 2;
/// Attributes: what protects, the mark that a packet has, the number of an interface whose packets alone are meant.
const TEMPLATES: u16 = 5;
/// Of a state: it goes in UDP.
const IN_UDP: u16 = 4;
const MARK: u16 = 21;
const INTERFACE: u16 = 31;
/// Lengths of `xfrm_userpolicy_id` and `xfrm_userpolicy_info`, and of the header before them.
const ID_BYTES: usize = 64;
const INFO_BYTES: usize = 168;
const HEADER_BYTES: usize = 16;
/// Lengths of `xfrm_usersa_id` and `xfrm_usersa_info`.
const STATE_ID_BYTES: usize = 24;
const STATE_BYTES: usize = 224;
/// Policies and states that are read at most. Who asks takes the first ones of them.
const READ_MAX: usize = 65_536;
/// Messages that are taken at once.
const MESSAGES_MAX: usize = 4096;

/// Action of a policy on the packets that it selects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IpsecAction {
    /// They are under IPsec.
    Protect,
    /// They are not.
    Pass,
    /// They are dropped.
    Block,
}

/// A policy about packets that are passed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IpsecPolicy {
    /// Whether it is about what leaves; else about what has come in and is passed on.
    pub outward: bool,
    /// The lowest counts.
    pub priority: u32,
    /// Of two with the same priority the older one counts.
    pub index: u32,
    /// Sources.
    pub from: IpNet,
    /// Destinations.
    pub to: IpNet,
    /// Protocol; `None`: all.
    pub protocol: Option<u8>,
    /// Source ports, inclusive; `None`: all.
    pub src_ports: Option<(u16, u16)>,
    /// Destination ports, inclusive; `None`: all.
    pub dst_ports: Option<(u16, u16)>,
    /// Action on these packets.
    pub action: IpsecAction,
}

/// All policies of the calling thread's namespace that may meet a forwarded packet without a mark, the first ones first. None
/// where the kernel has no IPsec, and for who may not ask.
///
/// # Errors
/// As the kernel refuses the question.
pub fn ipsec_policies() -> Result<Vec<IpsecPolicy>> {
    let mut list: Vec<IpsecPolicy> =
        list((GET_POLICY, ID_BYTES), NEW_POLICY, read).context("list the policies of IPsec")?;
    list.sort_by_key(|policy| (!policy.outward, policy.priority, policy.index));
    Ok(list)
}

/// The tunnels and pairs of hosts of the calling thread's namespace that IPsec has states for, but for those in UDP: each once, in
/// both directions. None where the kernel has no IPsec, and for who may not ask.
///
/// # Errors
/// As the kernel refuses the question.
pub fn ipsec_tunnels() -> Result<BTreeSet<Tunnel>> {
    let states =
        list((GET_STATE, STATE_ID_BYTES), NEW_STATE, read_state).context("list the states of IPsec")?;
    let turned = |tunnel: &Tunnel| Tunnel { local: tunnel.remote, remote: tunnel.local, ..*tunnel };
    Ok(states.iter().flat_map(|tunnel| [*tunnel, turned(tunnel)]).collect())
}

/// Tells that policies and states change.
#[derive(Debug)]
pub struct IpsecMonitor {
    socket: OwnedFd,
    buffer: Vec<u8>,
}

impl IpsecMonitor {
    /// Opens a monitor in the calling thread's namespace; `None` where the kernel has no IPsec.
    ///
    /// # Errors
    /// Without CAP_NET_ADMIN.
    pub fn open() -> Result<Option<Self>> {
        let socket = open(GROUP_POLICY | GROUP_STATE).context("open a monitor of IPsec")?;
        Ok(socket.map(|socket| Self { socket, buffer: vec![0; RECEIVE_BYTES] }))
    }

    /// Whether there were changes since the last call. Never blocks.
    ///
    /// # Errors
    /// As the kernel refuses to tell.
    pub fn read(&mut self) -> io::Result<bool> {
        let mut any = false;
        // Whoever floods must not hold the caller up: what is left wakes it again.
        for _ in 0..MESSAGES_MAX {
            match receive(&self.socket, &mut self.buffer, libc::MSG_DONTWAIT) {
                Ok(_) => any = true,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                // Some were lost: something changed.
                Err(error)
                    if error.raw_os_error() == Some(libc::ENOBUFS)
                        || error.kind() == io::ErrorKind::InvalidData =>
                {
                    any = true;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(any)
    }
}

impl AsFd for IpsecMonitor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn open(groups: u32) -> io::Result<Option<OwnedFd>> {
    match open_protocol(libc::NETLINK_XFRM, groups) {
        Ok(socket) => Ok(Some(socket)),
        Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Answers of the kernel to a question, which has so many bytes behind its header: messages of this kind as `read` makes of them.
fn list<T>(question: (u16, usize), kind: u16, read: impl Fn(&[u8]) -> Option<T>) -> io::Result<Vec<T>> {
    let list = open(0)
        .and_then(|socket| socket.map_or(Ok(Vec::new()), |socket| dump(&socket, question, kind, read)));
    match list {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(Vec::new()),
        list => list,
    }
}

fn dump<T>(
    socket: &OwnedFd,
    (question, bytes): (u16, usize),
    kind: u16,
    read: impl Fn(&[u8]) -> Option<T>,
) -> io::Result<Vec<T>> {
    let mut request = [0; HEADER_BYTES + ID_BYTES];
    let request = &mut request[..HEADER_BYTES + bytes.min(ID_BYTES)];
    let length = request.len() as u32;
    request[..4].copy_from_slice(&length.to_ne_bytes());
    request[4..6].copy_from_slice(&question.to_ne_bytes());
    let flags = (libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16;
    request[6..8].copy_from_slice(&flags.to_ne_bytes());
    // SAFETY: the kernel reads `request.len()` bytes.
    check_size(unsafe { libc::send(socket.as_raw_fd(), request.as_ptr().cast(), request.len(), 0) })?;
    let mut buffer = vec![0; RECEIVE_BYTES];
    let mut list = Vec::new();
    loop {
        let length = receive(socket, &mut buffer, 0)?;
        for part in Messages(&buffer[..length]) {
            match part.end()? {
                End::Done => return Ok(list),
                End::More if part.kind == kind && list.len() < READ_MAX => list.extend(read(part.bytes)),
                End::More => {}
            }
        }
    }
}

/// A policy from its message; `None` for one that no forwarded packet without a mark meets.
fn read(bytes: &[u8]) -> Option<IpsecPolicy> {
    let info: &[u8; INFO_BYTES] = bytes.get(HEADER_BYTES..)?.first_chunk()?;
    let attributes = bytes.get(HEADER_BYTES + INFO_BYTES..)?;
    let outward = match info[160] {
        1 => true,
        2 => false,
        _ => return None,
    };
    if word(attribute(attributes, INTERFACE), 0) != 0 {
        return None;
    }
    if word(attribute(attributes, MARK), 0) != 0 {
        return None;
    }
    let ipv4 = match i32::from(u16::from_ne_bytes([info[40], info[41]])) {
        libc::AF_INET => true,
        libc::AF_INET6 => false,
        _ => return None,
    };
    let net = |at: usize, length: u8| Some(IpNet::new(address(info, at, ipv4)?, length).ok()?.trunc());
    let protocol = Some(info[44]).filter(|protocol| *protocol != 0);
    // Of ICMP these are type and code, and the kernel looks closer than is needed here.
    let has_ports = matches!(protocol, Some(PROTOCOL_TCP | PROTOCOL_UDP | PROTOCOL_UDP_LITE | PROTOCOL_SCTP));
    let ports = |at: usize| {
        let port = u16::from_be_bytes([info[at], info[at + 1]]);
        let mask = u16::from_be_bytes([info[at + 2], info[at + 3]]);
        (has_ports && mask != 0).then_some((port & mask, port | !mask))
    };
    let protects = attribute(attributes, TEMPLATES).is_some_and(|templates| !templates.is_empty());
    Some(IpsecPolicy {
        outward,
        priority: word(Some(info), 152),
        index: word(Some(info), 156),
        from: net(16, info[43])?,
        to: net(0, info[42])?,
        protocol,
        src_ports: ports(36),
        dst_ports: ports(32),
        action: match (info[161], protects) {
            (1, _) => IpsecAction::Block,
            (_, true) => IpsecAction::Protect,
            (_, false) => IpsecAction::Pass,
        },
    })
}

/// The ends of a state from its message; `None` for one whose packets have ports.
fn read_state(bytes: &[u8]) -> Option<Tunnel> {
    let info: &[u8; STATE_BYTES] = bytes.get(HEADER_BYTES..)?.first_chunk()?;
    if attribute(bytes.get(HEADER_BYTES + STATE_BYTES..)?, IN_UDP).is_some() {
        return None;
    }
    let ipv4 = match i32::from(u16::from_ne_bytes([info[212], info[213]])) {
        libc::AF_INET => true,
        libc::AF_INET6 => false,
        _ => return None,
    };
    let [to, from] = [56, 80].map(|at| address(info, at, ipv4));
    Some(Tunnel::of(info[76], from, to))
}

/// An `xfrm_address_t`.
fn address(bytes: &[u8], at: usize, ipv4: bool) -> Option<IpAddr> {
    let bytes: [u8; 16] = *bytes.get(at..)?.first_chunk()?;
    Some(if ipv4 {
        IpAddr::from(Ipv4Addr::from(*bytes.first_chunk::<4>()?))
    } else {
        IpAddr::from(Ipv6Addr::from(bytes))
    })
}

/// A number of the host's byte order; 0 where there is none.
fn word(bytes: Option<&[u8]>, at: usize) -> u32 {
    let found = bytes.and_then(|bytes| bytes.get(at..)?.first_chunk());
    found.map_or(0, |bytes| u32::from_ne_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use crate::testing::isolated;

    fn xfrm(policy: &str) -> bool {
        let command = format!("ip xfrm policy {policy}");
        std::process::Command::new("sh").args(["-c", &command]).status().unwrap().success()
    }

    #[test]
    fn policies_are_read_in_the_kernels_order_and_their_changes_told() {
        isolated(|| {
            let mut monitor = IpsecMonitor::open().unwrap().expect("a kernel with IPsec");
            assert_eq!(ipsec_policies().unwrap(), []);
            let template = "tmpl src 203.0.113.1 dst 198.51.100.7 proto esp mode tunnel";
            assert!(xfrm(&format!("add src 10.1.0.0/16 dst 10.9.0.0/16 dir out priority 9 {template}")));
            assert!(xfrm(&format!("add src 10.9.0.0/16 dst 10.1.0.0/16 dir fwd {template}")));
            assert!(xfrm(&format!("add src 10.9.0.0/16 dst 10.1.0.0/16 dir in {template}")));
            assert!(xfrm("add src 10.1.0.0/16 dst 10.9.7.1/32 proto tcp dport 80 dir out priority 3"));
            assert!(xfrm("add src fd00::/8 dst 2001:db8::/32 dir out action block priority 4"));
            // Those of other packets than forwarded ones without a mark.
            assert!(xfrm(&format!("add src 10.1.0.0/16 dst 10.8.0.0/16 dir out mark 5 {template}")));
            assert!(monitor.read().unwrap());
            assert!(!monitor.read().unwrap());
            let list = ipsec_policies().unwrap();
            let told: Vec<_> = list
                .iter()
                .map(|p| (p.outward, p.from.to_string(), p.to.to_string(), p.protocol, p.dst_ports, p.action))
                .collect();
            let net = |text: &str| text.to_owned();
            assert_eq!(
                told,
                [
                    (
                        true,
                        net("10.1.0.0/16"),
                        net("10.9.7.1/32"),
                        Some(6),
                        Some((80, 80)),
                        IpsecAction::Pass
                    ),
                    (true, net("fd00::/8"), net("2001:db8::/32"), None, None, IpsecAction::Block),
                    (true, net("10.1.0.0/16"), net("10.9.0.0/16"), None, None, IpsecAction::Protect),
                    (false, net("10.9.0.0/16"), net("10.1.0.0/16"), None, None, IpsecAction::Protect),
                ]
            );
            assert!(list.iter().all(|policy| policy.src_ports.is_none()));
            assert!(xfrm("flush"));
            assert!(monitor.read().unwrap());
            assert_eq!(ipsec_policies().unwrap(), []);
        });
    }

    #[test]
    fn short_messages_are_no_policies() {
        for length in [0, HEADER_BYTES, HEADER_BYTES + INFO_BYTES - 1] {
            assert_eq!(read(&vec![0xff; length]), None);
        }
        assert_eq!(read(&[0xff; HEADER_BYTES + INFO_BYTES + 3]), None);
        for length in 0..HEADER_BYTES + STATE_BYTES + 8 {
            assert_eq!(read_state(&vec![0xff; length]), None);
        }
    }

    /// As the kernel writes it: whoever has no ESP has this test all the same.
    #[test]
    fn states_name_both_ends() {
        let mut message = vec![0; HEADER_BYTES + STATE_BYTES];
        let info = &mut message[HEADER_BYTES..];
        info[56..60].copy_from_slice(&[198, 51, 100, 7]);
        info[76] = 50;
        info[80..84].copy_from_slice(&[203, 0, 113, 1]);
        info[212..214].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
        let [local, remote] = ["203.0.113.1", "198.51.100.7"].map(|text| Some(text.parse().unwrap()));
        assert_eq!(read_state(&message), Some(Tunnel { protocol: 50, local, remote }));
        // Around a NAT it is UDP.
        let mut in_udp = message.clone();
        in_udp.extend([28, 0, 4, 0]);
        in_udp.extend([0; 24]);
        assert_eq!(read_state(&in_udp), None);
        isolated(|| assert!(ipsec_tunnels().unwrap().is_empty()));
    }
}
