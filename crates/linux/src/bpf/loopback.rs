//! The way from the host's own programs to addresses that are on its devices and served elsewhere: to the kernel such an
//! address is the host itself, and what is sent there goes by the loopback device. A program where frames leave that device
//! (tcx egress) sends those of some protocols, addresses and ports to another device instead, whose owner knows better. It is
//! gone with the process however that ends.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;

use super::assembler::{Assembler, If, Instruction, Label, Op, R0, R1, R2, R6, R7, R8, R9};
use super::kernel;
use crate::Result;
use crate::error::Context;
use crate::sys::interface_index;

/// `TCX_NEXT` (linux/bpf.h).
const NEXT: i32 = -1;
/// The helper `bpf_redirect`.
const REDIRECT: i32 = 23;
/// Sizes of loads as classic BPF encodes them.
const WORD: u8 = 0x00;
const HALF: u8 = 0x08;
const BYTE: u8 = 0x10;
const ETHERNET_BYTES: u32 = 14;
const IPV4: u32 = 0x0800;
const IPV6: u32 = 0x86dd;
/// Bytes from a transport header to its destination port.
const PORT_AT: u32 = 2;

/// Protocols and ports by address.
type Endpoints = BTreeMap<IpAddr, Vec<(u8, u16)>>;

/// Redirection of what the host sends to some endpoints of its own to another device. Dropping it ends that.
#[derive(Debug)]
pub struct LoopbackRedirect {
    link: OwnedFd,
}

impl LoopbackRedirect {
    /// Sends packets of these IP protocols (TCP or UDP) to these addresses and ports to the device with this index. Needs
    /// CAP_BPF, CAP_NET_ADMIN and Linux 6.6.
    pub fn attach(device: u32, endpoints: &[(u8, SocketAddr)]) -> Result<Self> {
        const WHAT: &str = "attach a program to the egress of lo";
        let index = interface_index("lo").context(WHAT)?;
        let link = kernel::attach_egress(index, load(device, endpoints)?).context(WHAT)?;
        Ok(Self { link })
    }

    /// Other endpoints, without a moment between.
    pub fn set(&self, device: u32, endpoints: &[(u8, SocketAddr)]) -> Result<()> {
        kernel::replace_program(&self.link, load(device, endpoints)?).context("change the program of lo")
    }
}

fn load(device: u32, endpoints: &[(u8, SocketAddr)]) -> Result<OwnedFd> {
    const WHAT: &str = "load the program of lo";
    let code = program(device, endpoints)
        .ok_or_else(|| crate::Error::new(WHAT, std::io::ErrorKind::InvalidInput.into()))?;
    kernel::load_classifier(&code).context(WHAT)
}

/// `None`: more endpoints than a program can be long.
fn program(device: u32, endpoints: &[(u8, SocketAddr)]) -> Option<Vec<Instruction>> {
    let mut by_address = Endpoints::new();
    for (protocol, endpoint) in endpoints {
        by_address.entry(endpoint.ip()).or_default().push((*protocol, endpoint.port()));
    }
    let mut asm = Assembler::default();
    let (ipv6, next, redirect) = (asm.label(), asm.label(), asm.label());
    asm.op(Op::Move, R6, R1);
    asm.load_packet(HALF, 12, None);
    asm.jump_if_value32(If::Equal, R0, IPV6, ipv6);
    asm.jump_if_value32(If::NotEqual, R0, IPV4, next);
    match_ipv4(&mut asm, &by_address, next, redirect);
    asm.place(ipv6);
    match_ipv6(&mut asm, &by_address, redirect);
    asm.place(next);
    asm.op_value(Op::Move, R0, NEXT);
    asm.exit();
    asm.place(redirect);
    asm.op32_value(Op::Move, R1, device);
    asm.op_value(Op::Move, R2, 0);
    asm.call(REDIRECT);
    asm.exit();
    asm.finish()
}

fn match_ipv4(asm: &mut Assembler, endpoints: &Endpoints, next: Label, redirect: Label) {
    // Later fragments have no ports; the loopback device's MTU leaves none.
    asm.load_packet(HALF, ETHERNET_BYTES + 6, None);
    asm.op32_value(Op::And, R0, 0x1fff);
    asm.jump_if_value32(If::NotEqual, R0, 0, next);
    asm.load_packet(BYTE, ETHERNET_BYTES + 9, None);
    asm.op(Op::Move, R8, R0);
    asm.load_packet(WORD, ETHERNET_BYTES + 16, None);
    asm.op(Op::Move, R9, R0);
    asm.load_packet(BYTE, ETHERNET_BYTES, None);
    asm.op32_value(Op::And, R0, 0x0f);
    asm.op32_value(Op::ShiftLeft, R0, 2);
    asm.op(Op::Move, R7, R0);
    asm.load_packet(HALF, ETHERNET_BYTES + PORT_AT, Some(R7));
    asm.op32_value(Op::ShiftLeft, R8, 16);
    asm.op32(Op::Add, R0, R8);
    for (address, ports) in endpoints {
        let IpAddr::V4(address) = address else { continue };
        let other = asm.label();
        asm.jump_if_value32(If::NotEqual, R9, address.to_bits(), other);
        match_ports(asm, ports, redirect);
        asm.jump(next);
        asm.place(other);
    }
    asm.jump(next);
}

fn match_ipv6(asm: &mut Assembler, endpoints: &Endpoints, redirect: Label) {
    // The destination in two halves; of packets with extension headers the protocol is none of ours.
    for (register, at) in [(R7, 24), (R8, 32)] {
        asm.load_packet(WORD, ETHERNET_BYTES + at, None);
        asm.op(Op::Move, register, R0);
        asm.op_value(Op::ShiftLeft, register, 32);
        asm.load_packet(WORD, ETHERNET_BYTES + at + 4, None);
        asm.op(Op::Add, register, R0);
    }
    asm.load_packet(BYTE, ETHERNET_BYTES + 6, None);
    asm.op(Op::Move, R9, R0);
    asm.op32_value(Op::ShiftLeft, R9, 16);
    asm.load_packet(HALF, ETHERNET_BYTES + 40 + PORT_AT, None);
    asm.op32(Op::Add, R0, R9);
    for (address, ports) in endpoints {
        let IpAddr::V6(address) = address else { continue };
        let other = asm.label();
        let bits = address.to_bits();
        for (register, half) in [(R7, (bits >> 64) as u64), (R8, bits as u64)] {
            asm.jump_if_value32(If::NotEqual, register, half as u32, other);
            asm.op(Op::Move, R1, register);
            asm.op_value(Op::ShiftRight, R1, 32);
            asm.jump_if_value32(If::NotEqual, R1, (half >> 32) as u32, other);
        }
        match_ports(asm, ports, redirect);
        asm.place(other);
    }
}

/// R0 has the protocol in its upper and the port in its lower 16 bits.
fn match_ports(asm: &mut Assembler, ports: &[(u8, u16)], redirect: Label) {
    for (protocol, port) in ports {
        asm.jump_if_value32(If::Equal, R0, u32::from(*protocol) << 16 | u32::from(*port), redirect);
    }
}
