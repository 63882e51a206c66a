//! Classic BPF: a small assembler, and the translation into eBPF, so that one program can be a socket filter
//! without privilege and a program at an interface with it.

use super::assembler::{Assembler, If, Instruction as Extended, Label, Op, R0, R1, R6, R7, Size};
use super::reuseport::Instruction;

/// Loads and jumps as the classic machine encodes them (linux/bpf_common.h).
const LOAD_ABSOLUTE: u16 = (libc::BPF_LD | libc::BPF_ABS) as u16;
const LOAD_INDIRECT: u16 = (libc::BPF_LD | libc::BPF_IND) as u16;
const AND: u16 = (libc::BPF_ALU | libc::BPF_AND | libc::BPF_K) as u16;
const SHIFT_LEFT: u16 = (libc::BPF_ALU | libc::BPF_LSH | libc::BPF_K) as u16;
const X_FROM_A: u16 = (libc::BPF_MISC | libc::BPF_TAX) as u16;
const JUMP: u16 = (libc::BPF_JMP | libc::BPF_JA) as u16;
const JUMP_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const JUMP_GREATER: u16 = (libc::BPF_JMP | libc::BPF_JGT | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
const SIZE_MASK: u16 = 0x18;

/// Offsets that name a property of the packet in place of bytes (linux/filter.h, `SKF_AD_OFF`).
const PROPERTIES: u32 = 0xffff_f000;
/// To whom the frame is addressed; [`TO_US`] is our own hardware address.
pub(super) const PACKET_TYPE: u32 = PROPERTIES + 4;
/// The mark of the packet.
pub(super) const MARK: u32 = PROPERTIES + 20;
/// Priority and number of the VLAN (IEEE 802.1Q, 16 bits); 0 without a tag.
pub(super) const VLAN_TAG: u32 = PROPERTIES + 44;
/// The value of [`PACKET_TYPE`] for frames to this host (`PACKET_HOST`).
pub(super) const TO_US: u32 = 0;
/// Its value for frames to another hardware address (`PACKET_OTHERHOST`).
pub(super) const TO_OTHERS: u32 = 3;

/// Offset of the mark in `struct __sk_buff`.
pub(super) const PACKET_MARK: i16 = 8;

/// Bytes of a load.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Width {
    Byte,
    Half,
    Word,
}

impl Width {
    fn bits(self) -> u16 {
        (match self {
            Width::Byte => libc::BPF_B,
            Width::Half => libc::BPF_H,
            Width::Word => libc::BPF_W,
        }) as u16
    }
}

/// A place ahead in the program.
#[derive(Clone, Copy)]
pub(super) struct Place(usize);

/// A classic program being written. Conditional jumps of the machine reach 255 instructions; here each is a
/// short one over a long one, which reaches everything.
#[derive(Default)]
pub(super) struct Classic {
    code: Vec<Instruction>,
    places: Vec<Option<usize>>,
    jumps: Vec<(usize, Place)>,
}

impl Classic {
    fn emit(&mut self, code: u16, k: u32) {
        self.code.push(Instruction { code, jt: 0, jf: 0, k });
    }

    /// A place that comes later.
    pub(super) fn ahead(&mut self) -> Place {
        self.places.push(None);
        Place(self.places.len() - 1)
    }

    /// Here it is.
    pub(super) fn place(&mut self, place: Place) {
        if let Some(slot) = self.places.get_mut(place.0) {
            *slot = Some(self.code.len());
        }
    }

    /// A = bytes at `offset` of the frame, or a property of it.
    pub(super) fn load(&mut self, width: Width, offset: u32) {
        self.emit(LOAD_ABSOLUTE | width.bits(), offset);
    }

    /// A = bytes at X + `offset` of the frame.
    pub(super) fn load_at_x(&mut self, width: Width, offset: u32) {
        self.emit(LOAD_INDIRECT | width.bits(), offset);
    }

    /// A &= value
    pub(super) fn and(&mut self, value: u32) {
        self.emit(AND, value);
    }

    /// A <<= bits
    pub(super) fn shift_left(&mut self, bits: u32) {
        self.emit(SHIFT_LEFT, bits);
    }

    /// X = A
    pub(super) fn x_from_a(&mut self) {
        self.emit(X_FROM_A, 0);
    }

    /// Goes to the place.
    pub(super) fn jump(&mut self, place: Place) {
        self.jumps.push((self.code.len(), place));
        self.emit(JUMP, 0);
    }

    fn jump_over(&mut self, code: u16, k: u32, if_true: u8, if_false: u8, place: Place) {
        self.code.push(Instruction { code, jt: if_true, jf: if_false, k });
        self.jump(place);
    }

    /// Goes to the place if A is this.
    pub(super) fn if_equal(&mut self, value: u32, place: Place) {
        self.jump_over(JUMP_EQUAL, value, 0, 1, place);
    }

    /// Goes to the place if A is anything else.
    pub(super) fn unless_equal(&mut self, value: u32, place: Place) {
        self.jump_over(JUMP_EQUAL, value, 1, 0, place);
    }

    /// Goes to the place if A is above this (unsigned).
    pub(super) fn if_above(&mut self, value: u32, place: Place) {
        self.jump_over(JUMP_GREATER, value, 0, 1, place);
    }

    /// Ends with this result.
    pub(super) fn end(&mut self, value: u32) {
        self.emit(RETURN, value);
    }

    /// The finished program; `None` if a place was never placed, or lies behind.
    pub(super) fn finish(mut self) -> Option<Vec<Instruction>> {
        for (at, place) in self.jumps {
            let target = (*self.places.get(place.0)?)?;
            self.code.get_mut(at)?.k = u32::try_from(target.checked_sub(at + 1)?).ok()?;
        }
        Some(self.code)
    }
}

/// The same program for the extended machine. `begin` writes what comes before it, with the packet in R1, which it leaves there;
/// `result` says what a classic result becomes. A load beyond the
/// end of the frame ends the program with 0, as it does in the classic machine. `None` for instructions that
/// [`Classic`] does not write.
pub(super) fn translate(
    code: &[Instruction],
    begin: impl FnOnce(&mut Assembler),
    result: impl Fn(u32) -> i32,
) -> Option<Vec<Extended>> {
    let mut asm = Assembler::default();
    begin(&mut asm);
    let labels: Vec<Label> = code.iter().map(|_| asm.label()).collect();
    // A is R0, X is R7; loads want the packet in R6.
    asm.op(Op::Move, R6, R1);
    asm.op_value(Op::Move, R0, 0);
    asm.op_value(Op::Move, R7, 0);
    for (at, instruction) in code.iter().enumerate() {
        asm.place(*labels.get(at)?);
        let target = |distance: usize| labels.get(at + 1 + distance).copied();
        let size = instruction.code & SIZE_MASK;
        match instruction.code {
            JUMP => asm.jump(target(instruction.k as usize)?),
            JUMP_EQUAL | JUMP_GREATER => {
                let condition = if instruction.code == JUMP_EQUAL { If::Equal } else { If::Greater };
                let label = target(usize::from(instruction.jt))?;
                asm.jump_if_value32(condition, R0, instruction.k, label);
                asm.jump(target(usize::from(instruction.jf))?);
            }
            AND => asm.op32_value(Op::And, R0, instruction.k),
            SHIFT_LEFT => asm.op32_value(Op::ShiftLeft, R0, instruction.k),
            X_FROM_A => asm.op(Op::Move, R7, R0),
            RETURN => {
                asm.op_value(Op::Move, R0, result(instruction.k));
                asm.exit();
            }
            // Offsets in `struct __sk_buff`.
            _ if instruction.k == PACKET_TYPE => asm.load(Size::Word, R0, R6, 4),
            _ if instruction.k == MARK => asm.load(Size::Word, R0, R6, PACKET_MARK),
            _ if instruction.k == VLAN_TAG => asm.load(Size::Word, R0, R6, 24),
            load if load == LOAD_ABSOLUTE | size => asm.load_packet(size as u8, instruction.k, None),
            load if load == LOAD_INDIRECT | size => asm.load_packet(size as u8, instruction.k, Some(R7)),
            _ => return None,
        }
    }
    asm.finish()
}
