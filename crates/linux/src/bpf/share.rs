//! Which frames of an interface stay with the kernel, and which are the datapath's.
//!
//! One program says it, in two places: as a filter of the packet socket ([`crate::packet_ring`]) it lets in
//! what is the datapath's, and behind it, at the interface ([`crate::ingress_guard`]), it stops the very same
//! frames, so that nothing is processed twice and nothing by nobody.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;

use super::assembler::{Assembler, If, Op, R0, R1, Size};
use super::classic::{
    self, Classic, MARK, PACKET_MARK, PACKET_TYPE, Place, TO_OTHERS, TO_US, VLAN_TAG, Width,
};
use super::device_egress::INGRESS_MARK;
use super::kernel;
use super::reuseport::Instruction;
use crate::error::Context;
use crate::link_layer::LinkLayer;
use crate::{Error, Result};

/// UDP ports that a [`KernelShare`] may name.
pub const UDP_PORTS_MAX: usize = 64;
/// Addresses that a [`KernelShare`] may name.
pub const ADDRESSES_MAX: usize = 256;
/// Hardware addresses that a [`KernelShare`] may name.
pub const MACS_MAX: usize = 64;

/// Result of the classic program for the datapath's frames: all bytes of them.
const TAKE: u32 = u32::MAX;
/// Results at the interface (linux/bpf.h, `enum tcx_action_base`).
const TCX_NEXT: i32 = -1;
const TCX_DROP: i32 = 2;

/// Positions from the start of an Ethernet frame.
const ETHER_TYPE: u32 = 12;
const IP_OF_ETHERNET: u32 = 14;
/// From the start of an IPv6 header to what follows it.
const IPV6_BYTES: u32 = 40;
/// First byte of IPv4 destinations that are multicast or broadcast (RFC 5771), and of IPv6 ones (RFC 4291 §2.7).
const GROUP_V4: u32 = 224;
const GROUP_V6: u32 = 0xff;

const DHCP_SERVER: u32 = 67;
const DHCP_CLIENT: u32 = 68;
/// Hop limit of a neighbor discovery packet that crossed no router (RFC 4861 §7.1).
const HOP_LIMIT_FRESH: u32 = 255;
/// ICMPv6 types of neighbor discovery, first and last (RFC 4861: 133–137).
const DISCOVERY: (u32, u32) = (133, 137);

/// The traffic of an interface that stays with the kernel, besides what always does: what the datapath itself gives back to the
/// interface ([`INGRESS_MARK`]), everything but IP, frames of a VLAN (a tag with a priority only names none), broadcast and multicast
/// frames, and neighbor discovery (ICMPv6 133–137 with hop limit 255). Where there is no link-layer header, packets to multicast and broadcast
/// addresses are what such frames are.
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
    /// Answers of a DHCP server (UDP 67 to 68), also those that are on their way to a client behind another interface. False: the
    /// datapath tells them apart and gives the host its own. A table of `nft` leaves them to the kernel in any case.
    pub dhcp_answers: bool,
    /// Further hardware addresses whose frames are the datapath's as those to the device's own are: of devices that the host has
    /// on top of it (macvlan, VRRP). At most [`MACS_MAX`].
    pub macs: Vec<[u8; 6]>,
}

impl KernelShare {
    /// The program as a classic socket filter on packets of such a device: 0 for what stays with the kernel.
    pub(crate) fn filter(&self, layer: LinkLayer) -> Result<Vec<Instruction>> {
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
        if self.macs.len() > MACS_MAX {
            return Err(fail("more than 64 hardware addresses"));
        }
        self.write(layer).ok_or_else(|| fail("the program cannot be written"))
    }

    /// Loads the program for an interface. `PermissionDenied` without CAP_BPF and CAP_NET_ADMIN.
    pub(crate) fn load_guard(&self, layer: LinkLayer) -> Result<OwnedFd> {
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
        let code = classic::translate(&self.filter(layer)?, unmark, verdict)
            .ok_or_else(|| Error::new(WHAT, std::io::ErrorKind::InvalidData.into()))?;
        kernel::load_classifier(&code).context(WHAT)
    }

    fn write(&self, layer: LinkLayer) -> Option<Vec<Instruction>> {
        let mut asm = Classic::default();
        let (kernel, take, v4, v6) = (asm.ahead(), asm.ahead(), asm.ahead(), asm.ahead());
        self.write_receiver(&mut asm, layer, kernel);
        asm.load(Width::Word, MARK);
        asm.if_equal(INGRESS_MARK, kernel);
        let ip = match layer {
            LinkLayer::Ethernet => {
                asm.load(Width::Word, VLAN_TAG);
                asm.and(0x0fff);
                asm.unless_equal(0, kernel);
                asm.load(Width::Half, ETHER_TYPE);
                asm.if_equal(libc::ETH_P_IP as u32, v4);
                asm.if_equal(libc::ETH_P_IPV6 as u32, v6);
                IP_OF_ETHERNET
            }
            LinkLayer::None => {
                asm.load(Width::Byte, 0);
                asm.and(0xf0);
                asm.if_equal(0x40, v4);
                asm.if_equal(0x60, v6);
                0
            }
        };
        asm.jump(kernel);
        asm.place(v4);
        if layer == LinkLayer::None {
            asm.load(Width::Byte, ip + 16);
            asm.if_above(GROUP_V4 - 1, kernel);
        }
        self.write_v4(&mut asm, ip, kernel, take);
        asm.place(v6);
        if layer == LinkLayer::None {
            asm.load(Width::Byte, ip + 24);
            asm.if_equal(GROUP_V6, kernel);
        }
        self.write_v6(&mut asm, ip, kernel, take);
        asm.place(kernel);
        asm.end(0);
        asm.place(take);
        asm.end(TAKE);
        asm.finish()
    }

    /// Leaves frames to others to the kernel.
    fn write_receiver(&self, asm: &mut Classic, layer: LinkLayer, kernel: Place) {
        asm.load(Width::Word, PACKET_TYPE);
        if layer == LinkLayer::None || self.macs.is_empty() {
            asm.unless_equal(TO_US, kernel);
            return;
        }
        let ours = asm.ahead();
        asm.if_equal(TO_US, ours);
        asm.unless_equal(TO_OTHERS, kernel);
        for [first @ .., five, six] in &self.macs {
            let next = asm.ahead();
            asm.load(Width::Word, 0);
            asm.unless_equal(u32::from_be_bytes(*first), next);
            asm.load(Width::Half, 4);
            asm.if_equal(u32::from(u16::from_be_bytes([*five, *six])), ours);
            asm.place(next);
        }
        asm.jump(kernel);
        asm.place(ours);
    }

    fn write_v4(&self, asm: &mut Classic, ip: u32, kernel: Place, take: Place) {
        asm.load(Width::Byte, ip + 9);
        asm.unless_equal(u32::from(packet::ip::PROTOCOL_UDP), take);
        // Later fragments have no ports.
        asm.load(Width::Half, ip + 6);
        asm.and(0x1fff);
        asm.unless_equal(0, take);
        asm.load(Width::Byte, ip);
        asm.and(0x0f);
        asm.shift_left(2);
        asm.x_from_a();
        if self.dhcp_answers {
            let ports = asm.ahead();
            asm.load_at_x(Width::Half, ip + 2);
            asm.unless_equal(DHCP_CLIENT, ports);
            asm.load_at_x(Width::Half, ip);
            asm.if_equal(DHCP_SERVER, kernel);
            asm.place(ports);
        }
        if let Some(list) = &self.addresses {
            if v4_of(list).next().is_none() {
                // What nothing leads to is no program to the kernel.
                return asm.jump(take);
            }
            let ours = asm.ahead();
            asm.load(Width::Word, ip + 16);
            for address in v4_of(list) {
                asm.if_equal(address.to_bits(), ours);
            }
            asm.jump(take);
            asm.place(ours);
        }
        asm.load_at_x(Width::Half, ip + 2);
        self.write_ports(asm, kernel, take);
    }

    fn write_v6(&self, asm: &mut Classic, ip: u32, kernel: Place, take: Place) {
        let (icmp, udp) = (asm.ahead(), asm.ahead());
        if self.link_local {
            asm.load(Width::Half, ip + 24);
            asm.and(0xffc0);
            asm.if_equal(0xfe80, kernel);
        }
        asm.load(Width::Byte, ip + 6);
        asm.if_equal(u32::from(packet::ip::PROTOCOL_UDP), udp);
        asm.if_equal(u32::from(packet::ip::PROTOCOL_ICMPV6), icmp);
        asm.jump(take);

        asm.place(icmp);
        asm.load(Width::Byte, ip + 7);
        asm.unless_equal(HOP_LIMIT_FRESH, take);
        asm.load(Width::Byte, ip + IPV6_BYTES);
        asm.if_above(DISCOVERY.1, take);
        asm.if_above(DISCOVERY.0 - 1, kernel);
        asm.jump(take);

        asm.place(udp);
        if let Some(list) = &self.addresses {
            if v6_of(list).next().is_none() {
                return asm.jump(take);
            }
            let ours = asm.ahead();
            for address in v6_of(list) {
                let next = asm.ahead();
                let bits = address.to_bits();
                for word in 0..4u32 {
                    asm.load(Width::Word, ip + 24 + 4 * word);
                    asm.unless_equal((bits >> (96 - 32 * word)) as u32, next);
                }
                asm.jump(ours);
                asm.place(next);
            }
            asm.jump(take);
            asm.place(ours);
        }
        asm.load(Width::Half, ip + IPV6_BYTES + 2);
        self.write_ports(asm, kernel, take);
    }

    fn write_ports(&self, asm: &mut Classic, kernel: Place, take: Place) {
        for port in &self.udp_ports {
            asm.if_equal(u32::from(*port), kernel);
        }
        asm.jump(take);
    }

    /// Rules of `nft` that leave frames to others to the kernel.
    fn nft_receiver(&self, layer: LinkLayer) -> Vec<String> {
        if layer == LinkLayer::None || self.macs.is_empty() {
            return vec!["meta pkttype != host accept".to_owned()];
        }
        let mac = |mac: &[u8; 6]| mac.map(|byte| format!("{byte:02x}")).join(":");
        let macs: Vec<String> = self.macs.iter().map(mac).collect();
        vec![
            "meta pkttype != { host, other } accept".to_owned(),
            format!("meta pkttype other ether daddr != {{ {} }} accept", macs.join(", ")),
        ]
    }

    /// The same as rules of `nft` for the ingress hook, one a line, behind which everything is dropped.
    pub(crate) fn nft_rules(&self, layer: LinkLayer) -> Vec<String> {
        let kind = nft_ether_type(layer);
        let mut rules = self.nft_receiver(layer);
        if layer == LinkLayer::Ethernet {
            rules.push("ether type 8021q vlan id 0 vlan type { ip, ip6 } drop".to_owned());
            rules.push("ether type { 8021q, 8021ad } accept".to_owned());
        }
        rules.push(format!("{kind} != {{ ip, ip6 }} accept"));
        if layer == LinkLayer::None {
            rules.push(format!("{kind} ip ip daddr >= 224.0.0.0 accept"));
            rules.push(format!("{kind} ip6 ip6 daddr ff00::/8 accept"));
        }
        rules.push(format!("{kind} ip ip frag-off & 0x1fff == 0 udp sport 67 udp dport 68 accept"));
        if self.link_local {
            rules.push(format!("{kind} ip6 ip6 daddr fe80::/10 accept"));
        }
        rules.push(format!("{kind} ip6 ip6 nexthdr icmpv6 ip6 hoplimit 255 icmpv6 type 133-137 accept"));
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
                "{kind} ip {daddr}ip frag-off & 0x1fff == 0 ip protocol udp udp dport {{ {ports} }} accept"
            );
            rules.push(rule);
        }
        if let Some(daddr) = v6 {
            rules.push(format!("{kind} ip6 {daddr}ip6 nexthdr udp udp dport {{ {ports} }} accept"));
        }
        rules
    }
}

/// Words of nft for the protocol behind the link-layer header.
pub(crate) fn nft_ether_type(layer: LinkLayer) -> &'static str {
    match layer {
        LinkLayer::Ethernet => "ether type",
        LinkLayer::None => "meta protocol",
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
