//! A way back into a device: frames that the datapath leaves to the host come in by the device they came by, as if nobody had read
//! them, so that the host's firewall, its programs and its counters see the device.
//!
//! The datapath sends such a frame *out* of the device with a mark ([`INGRESS_MARK`]); a program where frames leave (tcx egress)
//! turns it round into the device's ingress, where the guard lets it pass and takes the mark away.

use std::os::fd::OwnedFd;

use super::assembler::{Assembler, If, Op, R0, R1, R2, Size};
use super::classic::PACKET_MARK;
use super::kernel;
use crate::Result;
use crate::error::Context;

/// Mark of a frame on its way back into its device. Chosen by chance: no other program should use it.
pub const INGRESS_MARK: u32 = 0x7a3c_91e5;

/// `TCX_NEXT` (linux/bpf.h).
const NEXT: i32 = -1;
/// Offset of the device's index in `struct __sk_buff`.
const PACKET_INTERFACE: i16 = 40;
/// The helper `bpf_redirect`, and its flag for the ingress (`BPF_F_INGRESS`).
const REDIRECT: i32 = 23;
const TO_INGRESS: i32 = 1;

/// Loads the program for where frames leave. `PermissionDenied` without CAP_BPF and CAP_NET_ADMIN.
pub(crate) fn load() -> Result<OwnedFd> {
    const WHAT: &str = "load the program that gives frames back to their device";
    let mut asm = Assembler::default();
    let back = asm.label();
    asm.load(Size::Word, R0, R1, PACKET_MARK);
    asm.jump_if_value32(If::Equal, R0, INGRESS_MARK, back);
    asm.op_value(Op::Move, R0, NEXT);
    asm.exit();
    asm.place(back);
    asm.load(Size::Word, R1, R1, PACKET_INTERFACE);
    asm.op_value(Op::Move, R2, TO_INGRESS);
    asm.call(REDIRECT);
    asm.exit();
    let code = asm.finish().ok_or_else(|| crate::Error::new(WHAT, std::io::ErrorKind::InvalidData.into()))?;
    kernel::load_classifier(&code).context(WHAT)
}
