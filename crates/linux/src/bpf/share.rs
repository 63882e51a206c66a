//! Which frames of an interface stay with the kernel, and which are the datapath's.
//!
//! One program says it, in two places: as a filter of the packet socket ([`crate::packet_ring`]) it lets in
//! what is the datapath's, and behind it, at the interface ([`crate::ingress_guard`]), it stops the very same
//! frames, so that nothing is processed twice and nothing by nobody.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;

use super::assembler::{Assembler, If, Op, R0, R1, Size};
use super::classic::{self, Classic, MARK, PACKET_MARK, PACKET_TYPE, Place, TO_US, VLAN_TAG, Width};
use super::device_ingress::INGRESS_MARK;
use super::kernel;
use super::reuseport::Instruction;
use crate::error::Context;
use crate::{Error, Result};

/// UDP ports that a [`KernelShare`] may name.
pub const UDP_PORTS_MAX: usize = 64;
/// Addresses that a [`KernelShare`] may name.
pub const ADDRESSES_MAX: usize = 256;

/// Result of the classic program for the datapath's frames: all bytes of them.
const TAKE: u32 = u32::MAX;
/// Results at the interface (linux/bpf.h, `enum tcx_action_base`).
const TCX_NEXT: i32 = -1;
const TCX_DROP: i32 = 2;

/// Positions from the start of the Ethernet frame.
const ETHER_TYPE: u32 = 12;
const IP: u32 = 14;
const UDP_V6: u32 = IP + 40;

const DHCP_SERVER: u32 = 67;
const DHCP_CLIENT: u32 = 68;
/// Hop limit of a neighbor discovery packet that crossed no router (RFC 4861 §7.1).
const HOP_LIMIT_FRESH: u32 = 255;
/// ICMPv6 types of neighbor discovery, first and last (RFC 4861: 133–137).
const DISCOVERY: (u32, u32) = (133, 137);

/// The traffic of an interface that stays with the kernel, besides what always does: what the datapath itself gives back to the
/// interface ([`INGRESS_MARK`]), everything but IP, frames of a VLAN (a tag with a priority only names none), broadcast and multicast frames, neighbor discovery (ICMPv6 133–137 with hop limit
/// 255), and answers of a DHCP server (UDP 67 to 68).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KernelShare {
    /// UDP to these ports, not fragmented or the first fragment, without IPv6 extension headers: the tunnel's
    /// own port. At most [`UDP_PORTS_MAX`].
    pub udp_ports: Vec<u16>,
    /// The ports count only with one of these destinations: the addresses of this host. `None`: with any,
    /// which lets traffic *through* the gateway past the datapath. At most [`ADDRESSES_MAX`].
    pub addresses: Option<Vec<IpAddr>>,
    /// IPv6 to link-local addresses (fe80::/10), which are never routed and belong to the device: routing
    /// daemons, DHCPv6.
    pub link_local: bool,
}

impl KernelShare {
    /// The program as a classic socket filter on Ethernet frames: 0 for what stays with the kernel.
    pub(crate) fn filter(&self) -> Result<Vec<Instruction>> {
        const WHAT: &str = "say which frames stay with the kernel";
        let fail = |text: &str| {
            let error = std::io::Error::new(std::io::ErrorKind::InvalidInput, text.to_owned());
            Error::new(WHAT, error)
        };
        if self.udp_ports.len() > UDP_PORTS_MAX {
            return Err(fail("more than 64 UDP ports"));
        }
        if self.addresses.as_ref().is_some_and(|list| list.len() > ADDRESSES_MAX) {
            return Err(fail("more than 256 addresses"));
        }
        self.write().ok_or_else(|| fail("the program cannot be written"))
    }

    /// Loads the program for an interface. `PermissionDenied` without CAP_BPF and CAP_NET_ADMIN.
    pub(crate) fn load_guard(&self) -> Result<OwnedFd> {
        const WHAT: &str = "load the program that keeps the kernel's stack from the datapath's frames";
        let verdict = |result| if result == TAKE { TCX_DROP } else { TCX_NEXT };
        // The mark has done its work: the host's own programs and rules see none.
        let unmark = |asm: &mut Assembler| {
            let begin = asm.label();
            asm.load(Size::Word, R0, R1, PACKET_MARK);
            asm.jump_if_value32(If::NotEqual, R0, INGRESS_MARK, begin);
            asm.op_value(Op::Move, R0, 0);
            asm.store(Size::Word, R1, PACKET_MARK, R0);
            asm.op_value(Op::Move, R0, TCX_NEXT);
            asm.exit();
            asm.place(begin);
        };
        let code = classic::translate(&self.filter()?, unmark, verdict)
            .ok_or_else(|| Error::new(WHAT, std::io::ErrorKind::InvalidData.into()))?;
        kernel::load_classifier(&code).context(WHAT)
    }

    fn write(&self) -> Option<Vec<Instruction>> {
        let mut asm = Classic::default();
        let (kernel, take, v4, v6) = (asm.ahead(), asm.ahead(), asm.ahead(), asm.ahead());
        asm.load(Width::Word, PACKET_TYPE);
        asm.unless_equal(TO_US, kernel);
        asm.load(Width::Word, MARK);
        asm.if_equal(INGRESS_MARK, kernel);
        asm.load(Width::Word, VLAN_TAG);
        asm.and(0x0fff);
        asm.unless_equal(0, kernel);
        asm.load(Width::Half, ETHER_TYPE);
        asm.if_equal(libc::ETH_P_IP as u32, v4);
        asm.if_equal(libc::ETH_P_IPV6 as u32, v6);
        asm.jump(kernel);
        asm.place(v4);
        self.write_v4(&mut asm, kernel, take);
        asm.place(v6);
        self.write_v6(&mut asm, kernel, take);
        asm.place(kernel);
        asm.end(0);
        asm.place(take);
        asm.end(TAKE);
        asm.finish()
    }

    fn write_v4(&self, asm: &mut Classic, kernel: Place, take: Place) {
        asm.load(Width::Byte, IP + 9);
        asm.unless_equal(u32::from(packet::ip::PROTOCOL_UDP), take);
        // Later fragments have no ports.
        asm.load(Width::Half, IP + 6);
        asm.and(0x1fff);
        asm.unless_equal(0, take);
        asm.load(Width::Byte, IP);
        asm.and(0x0f);
        asm.shift_left(2);
        asm.x_from_a();
        let ports = asm.ahead();
        asm.load_at_x(Width::Half, IP + 2);
        asm.unless_equal(DHCP_CLIENT, ports);
        asm.load_at_x(Width::Half, IP);
        asm.if_equal(DHCP_SERVER, kernel);
        asm.place(ports);
        if let Some(list) = &self.addresses {
            let ours = asm.ahead();
            asm.load(Width::Word, IP + 16);
            for address in v4_of(list) {
                asm.if_equal(address.to_bits(), ours);
            }
            asm.jump(take);
            asm.place(ours);
        }
        asm.load_at_x(Width::Half, IP + 2);
        self.write_ports(asm, kernel, take);
    }

    fn write_v6(&self, asm: &mut Classic, kernel: Place, take: Place) {
        let (icmp, udp) = (asm.ahead(), asm.ahead());
        if self.link_local {
            asm.load(Width::Half, IP + 24);
            asm.and(0xffc0);
            asm.if_equal(0xfe80, kernel);
        }
        asm.load(Width::Byte, IP + 6);
        asm.if_equal(u32::from(packet::ip::PROTOCOL_UDP), udp);
        asm.if_equal(u32::from(packet::ip::PROTOCOL_ICMPV6), icmp);
        asm.jump(take);

        asm.place(icmp);
        asm.load(Width::Byte, IP + 7);
        asm.unless_equal(HOP_LIMIT_FRESH, take);
        asm.load(Width::Byte, UDP_V6);
        asm.if_above(DISCOVERY.1, take);
        asm.if_above(DISCOVERY.0 - 1, kernel);
        asm.jump(take);

        asm.place(udp);
        if let Some(list) = &self.addresses {
            let ours = asm.ahead();
            for address in v6_of(list) {
                let next = asm.ahead();
                let bits = address.to_bits();
                for word in 0..4u32 {
                    asm.load(Width::Word, IP + 24 + 4 * word);
                    asm.unless_equal((bits >> (96 - 32 * word)) as u32, next);
                }
                asm.jump(ours);
                asm.place(next);
            }
            asm.jump(take);
            asm.place(ours);
        }
        asm.load(Width::Half, UDP_V6 + 2);
        self.write_ports(asm, kernel, take);
    }

    fn write_ports(&self, asm: &mut Classic, kernel: Place, take: Place) {
        for port in &self.udp_ports {
            asm.if_equal(u32::from(*port), kernel);
        }
        asm.jump(take);
    }

    /// The same as rules of `nft` for the ingress hook, one a line, behind which everything is dropped.
    pub(crate) fn nft_rules(&self) -> Vec<String> {
        let mut rules = vec![
            "meta pkttype != host accept".to_owned(),
            "ether type 8021q vlan id 0 vlan type { ip, ip6 } drop".to_owned(),
            "ether type { 8021q, 8021ad } accept".to_owned(),
            "ether type != { ip, ip6 } accept".to_owned(),
            "ether type ip ip frag-off & 0x1fff == 0 udp sport 67 udp dport 68 accept".to_owned(),
        ];
        if self.link_local {
            rules.push("ether type ip6 ip6 daddr fe80::/10 accept".to_owned());
        }
        rules
            .push("ether type ip6 ip6 nexthdr icmpv6 ip6 hoplimit 255 icmpv6 type 133-137 accept".to_owned());
        let list = |items: Vec<String>| items.join(", ");
        let ports = list(self.udp_ports.iter().map(u16::to_string).collect());
        if ports.is_empty() {
            return rules;
        }
        let (v4, v6) = match &self.addresses {
            None => (Some(String::new()), Some(String::new())),
            Some(all) => {
                let v4 = list(v4_of(all).map(|address| address.to_string()).collect());
                let v6 = list(v6_of(all).map(|address| address.to_string()).collect());
                let set = |family: &str, text: String| {
                    (!text.is_empty()).then(|| format!("{family} daddr {{ {text} }} "))
                };
                (set("ip", v4), set("ip6", v6))
            }
        };
        if let Some(daddr) = v4 {
            let rule = format!(
                "ether type ip {daddr}ip frag-off & 0x1fff == 0 ip protocol udp udp dport {{ {ports} }} accept"
            );
            rules.push(rule);
        }
        if let Some(daddr) = v6 {
            rules.push(format!("ether type ip6 {daddr}ip6 nexthdr udp udp dport {{ {ports} }} accept"));
        }
        rules
    }
}

fn v4_of(list: &[IpAddr]) -> impl Iterator<Item = Ipv4Addr> {
    list.iter().filter_map(|address| match address {
        IpAddr::V4(address) => Some(*address),
        IpAddr::V6(_) => None,
    })
}

fn v6_of(list: &[IpAddr]) -> impl Iterator<Item = Ipv6Addr> {
    list.iter().filter_map(|address| match address {
        IpAddr::V6(address) => Some(*address),
        IpAddr::V4(_) => None,
    })
}
