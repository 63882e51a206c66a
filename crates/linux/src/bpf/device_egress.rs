//! Program for the frames that leave a guarded device (tcx egress). It does two things.
//!
//! *A way back into the device*: frames that the datapath leaves to the host come in by the device they came by, as if nobody had
//! read them, so that the host's firewall, its programs and its counters see the device. The datapath sends such a frame *out* of
//! the device with a mark ([`INGRESS_MARK`]); the program turns it round into the device's ingress, where the guard lets it pass
//! and takes the mark away.
//!
//! *Ports of an address that the host shares with address translation*: a packet of the host's own from a port that a translated
//! flow has now would get that flow's answers, or spoil them. It goes to the TUN device in place of leaving, and the datapath
//! sees whether the two are in each other's way ([`PortCounts`], [`OwnPorts`]). Frames of the datapath itself are told by
//! another mark ([`OWN_MARK`]), which is taken away.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::assembler::{Assembler, If, Instruction, Label, Op, R0, R1, R2, R6, R7, Size};
use super::classic::PACKET_MARK;
use super::kernel;
use super::port_counts::PortCounts;
use crate::Result;
use crate::error::Context;
use crate::link_layer::LinkLayer;
use crate::sys::interface_index;

/// Mark of a frame on its way back into its device. Chosen by chance: no other program should use it.
pub const INGRESS_MARK: u32 = 0x7a3c_91e5;
/// Mark of a frame that the datapath sends.
pub const OWN_MARK: u32 = 0x7a3c_91e6;

/// `TCX_NEXT` (linux/bpf.h).
const NEXT: i32 = -1;
/// Offset of the device's index in `struct __sk_buff`.
const PACKET_INTERFACE: i16 = 40;
/// The helper `bpf_redirect`, and its flag for the ingress (`BPF_F_INGRESS`).
const REDIRECT: i32 = 23;
const TO_INGRESS: i32 = 1;
/// Sizes of packet loads as classic BPF encodes them.
const HALF: u8 = 0x08;
const BYTE: u8 = 0x10;
const ETHERNET_BYTES: u32 = 14;
const ETHER_TYPE_AT: u32 = 12;
const IPV6_BYTES: u32 = 40;
/// Position of the id of an ICMP query.
const ICMP_ID_AT: u32 = 4;

/// The host's packets from ports that flows have go to the TUN device.
#[derive(Clone, Debug)]
pub struct OwnPorts {
    counts: Arc<PortCounts>,
    /// Index of the TUN device.
    tun: u32,
}

impl OwnPorts {
    /// From ports whose count is not 0 to the TUN device of this name, in the calling thread's namespace.
    pub fn new(counts: Arc<PortCounts>, tun: &str) -> Result<Self> {
        let tun = interface_index(tun).context(format_args!("find {tun}"))?;
        Ok(Self { counts, tun })
    }
}

/// Loads the program for such a device. `PermissionDenied` without CAP_BPF and CAP_NET_ADMIN.
pub(crate) fn load(layer: LinkLayer, own: Option<&OwnPorts>) -> Result<OwnedFd> {
    const WHAT: &str = "load the program for what leaves a device";
    let code =
        program(layer, own).ok_or_else(|| crate::Error::new(WHAT, std::io::ErrorKind::InvalidData.into()))?;
    kernel::load_classifier(&code).context(WHAT)
}

fn program(layer: LinkLayer, own: Option<&OwnPorts>) -> Option<Vec<Instruction>> {
    let mut asm = Assembler::default();
    let (back, of_host, next) = (asm.label(), asm.label(), asm.label());
    asm.op(Op::Move, R6, R1);
    asm.load(Size::Word, R0, R6, PACKET_MARK);
    asm.jump_if_value32(If::Equal, R0, INGRESS_MARK, back);
    asm.jump_if_value32(If::NotEqual, R0, OWN_MARK, of_host);
    asm.op_value(Op::Move, R0, 0);
    asm.store(Size::Word, R6, PACKET_MARK, R0);
    asm.jump(next);
    asm.place(of_host);
    if let Some(own) = own {
        write_own(&mut asm, layer, own, next);
    }
    asm.place(next);
    asm.op_value(Op::Move, R0, NEXT);
    asm.exit();
    asm.place(back);
    asm.load(Size::Word, R1, R6, PACKET_INTERFACE);
    asm.op_value(Op::Move, R2, TO_INGRESS);
    asm.call(REDIRECT);
    asm.exit();
    asm.finish()
}

/// A packet of the host's own, to one receiver: its port is looked up.
fn write_own(asm: &mut Assembler, layer: LinkLayer, own: &OwnPorts, next: Label) {
    let (ipv4, ipv6, look_up) = (asm.label(), asm.label(), asm.label());
    let ip = match layer {
        LinkLayer::Ethernet => {
            asm.load_packet(BYTE, 0, None);
            asm.op32_value(Op::And, R0, 1);
            asm.jump_if_value32(If::NotEqual, R0, 0, next);
            asm.load_packet(HALF, ETHER_TYPE_AT, None);
            asm.jump_if_value32(If::Equal, R0, libc::ETH_P_IP as u32, ipv4);
            asm.jump_if_value32(If::Equal, R0, libc::ETH_P_IPV6 as u32, ipv6);
            ETHERNET_BYTES
        }
        LinkLayer::None => {
            asm.load_packet(BYTE, 0, None);
            asm.op32_value(Op::ShiftRight, R0, 4);
            asm.jump_if_value32(If::Equal, R0, 4, ipv4);
            asm.jump_if_value32(If::Equal, R0, 6, ipv6);
            0
        }
    };
    asm.jump(next);
    asm.place(ipv4);
    // To a group, or a later fragment, which has no ports: as the first one goes, its receiver puts them together.
    asm.load_packet(BYTE, ip + 16, None);
    asm.jump_if_value32(If::Greater, R0, 223, next);
    asm.load_packet(HALF, ip + 6, None);
    asm.op32_value(Op::And, R0, 0x1fff);
    asm.jump_if_value32(If::NotEqual, R0, 0, next);
    asm.load_packet(BYTE, ip, None);
    asm.op32_value(Op::And, R0, 0x0f);
    asm.op32_value(Op::ShiftLeft, R0, 2);
    asm.op(Op::Move, R7, R0);
    asm.load_packet(BYTE, ip + 9, None);
    write_port(asm, ip, (u32::from(packet::ip::PROTOCOL_ICMP), 8), (look_up, next));
    asm.place(ipv6);
    asm.load_packet(HALF, ip + 24, None);
    asm.jump_if_value32(If::Greater, R0, 0xfe7f, next);
    asm.op_value(Op::Move, R7, IPV6_BYTES as i32);
    asm.load_packet(BYTE, ip + 6, None);
    write_port(asm, ip, (u32::from(packet::ip::PROTOCOL_ICMPV6), 128), (look_up, next));
    asm.place(look_up);
    asm.op32_value(Op::And, R0, 0xffff);
    asm.op32_value(Op::ShiftLeft, R0, 2);
    asm.map_value(R1, own.counts.map());
    asm.op(Op::Add, R1, R0);
    asm.load(Size::Word, R0, R1, 0);
    asm.jump_if_value32(If::Equal, R0, 0, next);
    asm.op32_value(Op::Move, R1, own.tun);
    asm.op_value(Op::Move, R2, 0);
    asm.call(REDIRECT);
    asm.exit();
}

/// R0 has the protocol, R7 the length of the IP header; afterwards R0 has the source port, or the id of an echo request. `icmp`:
/// number of ICMP and type of the request.
fn write_port(asm: &mut Assembler, ip: u32, icmp: (u32, u32), (look_up, next): (Label, Label)) {
    let ports = asm.label();
    for protocol in [packet::ip::PROTOCOL_TCP, packet::ip::PROTOCOL_UDP, packet::ip::PROTOCOL_SCTP] {
        asm.jump_if_value32(If::Equal, R0, u32::from(protocol), ports);
    }
    asm.jump_if_value32(If::NotEqual, R0, icmp.0, next);
    asm.load_packet(BYTE, ip, Some(R7));
    asm.jump_if_value32(If::NotEqual, R0, icmp.1, next);
    asm.load_packet(HALF, ip + ICMP_ID_AT, Some(R7));
    asm.jump(look_up);
    asm.place(ports);
    asm.load_packet(HALF, ip, Some(R7));
    asm.jump(look_up);
}
