//! Program for the frames that leave a guarded device (tcx egress). It does two things.
//!
//! *A way back into the device*: frames that the datapath leaves to the host come in by the device they came by, as if nobody had
//! read them, so that the host's firewall, its programs and its counters see the device. The datapath sends such a frame *out* of
//! the device with a mark ([`INGRESS_MARK`]); the program turns it round into the device's ingress, where the guard lets it pass
//! and takes the mark away.
//!
//! *Ports of an address that the host shares with address translation*: a packet of the host's own from a port of that which a translated
//! flow has now would get that flow's answers, or spoil them. It goes to the TUN device in place of leaving, and the datapath
//! sees whether the two are in each other's way ([`PortCounts`], [`OwnPorts`]). Frames of the datapath itself are told by
//! another mark ([`OWN_MARK`]), which is taken away.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::assembler::{Assembler, FRAME, If, Instruction, Label, Op, R0, R1, R2, R6, R7, Size};
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
/// The helper `bpf_map_lookup_elem`.
const LOOK_UP: i32 = 1;
/// The source address on the stack.
const SOURCE: i16 = -16;
/// Sizes of packet loads as classic BPF encodes them.
const WORD: u8 = 0x00;
const HALF: u8 = 0x08;
const BYTE: u8 = 0x10;
const ETHERNET_BYTES: u32 = 14;
const ETHER_TYPE_AT: u32 = 12;
const IPV6_BYTES: u32 = 40;
/// Position of the id of an ICMP query.
const ICMP_ID_AT: u32 = 4;

/// The host's packets from ports and addresses that flows have go to the TUN device.
#[derive(Clone, Debug)]
pub struct OwnPorts {
    counts: Arc<PortCounts>,
    /// Index of the TUN device.
    tun: u32,
}

impl OwnPorts {
    /// From ports whose count is not 0, of the addresses told, to the TUN device of this name, in the calling thread's namespace.
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

/// A packet of the host's own, to one receiver: its port is looked up, and its source.
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
    asm.store_value(Size::Double, FRAME, SOURCE, 0);
    asm.store_value(Size::Word, FRAME, SOURCE + 8, 0xffff);
    asm.load_packet(WORD, ip + 12, None);
    asm.store(Size::Word, FRAME, SOURCE + 12, R0);
    asm.load_packet(BYTE, ip + 9, None);
    write_port(asm, ip, (u32::from(packet::ip::PROTOCOL_ICMP), 8), (look_up, next));
    asm.place(ipv6);
    asm.load_packet(HALF, ip + 24, None);
    asm.jump_if_value32(If::Greater, R0, 0xfe7f, next);
    asm.op_value(Op::Move, R7, IPV6_BYTES as i32);
    for word in 0..4u8 {
        asm.load_packet(WORD, ip + 8 + 4 * u32::from(word), None);
        asm.store(Size::Word, FRAME, SOURCE + 4 * i16::from(word), R0);
    }
    asm.load_packet(BYTE, ip + 6, None);
    write_port(asm, ip, (u32::from(packet::ip::PROTOCOL_ICMPV6), 128), (look_up, next));
    asm.place(look_up);
    asm.op32_value(Op::And, R0, 0xffff);
    asm.op32_value(Op::ShiftLeft, R0, 2);
    asm.map_value(R1, own.counts.map());
    asm.op(Op::Add, R1, R0);
    asm.load(Size::Word, R0, R1, 0);
    asm.jump_if_value32(If::Equal, R0, 0, next);
    asm.map(R1, own.counts.addresses());
    asm.op(Op::Move, R2, FRAME);
    asm.op_value(Op::Add, R2, i32::from(SOURCE));
    asm.call(LOOK_UP);
    asm.jump_if_value(If::Equal, R0, 0, next);
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::net::IpAddr;
    use std::sync::atomic::Ordering;

    use super::*;
    use crate::testing::isolated;

    /// `TC_ACT_REDIRECT`.
    const REDIRECTED: u32 = 7;

    fn frame(src: &str, protocol: u8, port: u16) -> Vec<u8> {
        let src: IpAddr = src.parse().unwrap();
        let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
        match src {
            IpAddr::V4(src) => {
                frame.extend([8, 0, 0x45, 0, 0, 40, 0, 0, 0, 0, 64, protocol, 0, 0]);
                frame.extend(src.octets());
                frame.extend([198, 51, 100, 7]);
            }
            IpAddr::V6(src) => {
                frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 20, protocol, 64]);
                frame.extend(src.octets());
                frame.extend([0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7]);
            }
        }
        frame.extend(port.to_be_bytes());
        frame.extend([0; 18]);
        frame
    }

    /// Only what comes from an address that flows have leaves the kernel's way, whatever else has the number of a flow's port.
    #[test]
    fn ports_of_other_addresses_are_no_matter() {
        isolated(|| {
            let counts = match PortCounts::new() {
                Ok(counts) => Arc::new(counts),
                // An ordinary user's namespace cannot make maps.
                Err(error) => {
                    assert!(std::env::var_os(crate::testing::INSIDE).is_some(), "root may: {error}");
                    return;
                }
            };
            let own = OwnPorts { counts: Arc::clone(&counts), tun: 1 };
            let program = load(LinkLayer::Ethernet, Some(&own)).unwrap();
            let goes = |frame: &[u8]| kernel::testing::run(&program, frame, 1).unwrap().0 == REDIRECTED;
            let addresses = |list: &[&str]| list.iter().map(|text| text.parse().unwrap()).collect();
            counts.set_addresses(&addresses(&["203.0.113.1", "2001:db8::1"])).unwrap();
            (*counts).as_ref()[8_080].store(1, Ordering::Relaxed);
            for (src, protocol, port, leaves) in [
                ("203.0.113.1", 6, 8_080, true),
                ("203.0.113.1", 17, 8_080, true),
                ("203.0.113.1", 6, 8_081, false),
                ("192.168.10.1", 6, 8_080, false),
                ("203.0.113.2", 6, 8_080, false),
                ("2001:db8::1", 6, 8_080, true),
                ("2001:db8::2", 6, 8_080, false),
                ("fd00::1", 17, 8_080, false),
                ("::ffff:203.0.113.2", 17, 8_080, false),
            ] {
                assert_eq!(goes(&frame(src, protocol, port)), leaves, "{src} {protocol} {port}");
            }
            counts.set_addresses(&addresses(&["192.168.10.1"])).unwrap();
            assert!(goes(&frame("192.168.10.1", 6, 8_080)) && !goes(&frame("203.0.113.1", 6, 8_080)));
        });
    }
}
