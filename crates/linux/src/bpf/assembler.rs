//! A small eBPF assembler with labels: as much of the instruction set (RFC 9669) as our program needs.

/// A register. 0 is a result, 1–5 are arguments and lost in calls, 6–9 are kept, 10 points behind the stack.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Reg(pub u8);

pub(super) const R0: Reg = Reg(0);
pub(super) const R1: Reg = Reg(1);
pub(super) const R2: Reg = Reg(2);
pub(super) const R3: Reg = Reg(3);
pub(super) const R4: Reg = Reg(4);
pub(super) const R5: Reg = Reg(5);
pub(super) const R6: Reg = Reg(6);
pub(super) const R7: Reg = Reg(7);
pub(super) const R8: Reg = Reg(8);
pub(super) const R9: Reg = Reg(9);
pub(super) const FRAME: Reg = Reg(10);

/// One instruction as the kernel reads it.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Instruction {
    pub code: u8,
    /// Destination in the low half, source in the high half.
    pub registers: u8,
    pub offset: i16,
    pub immediate: i32,
}

/// A place in the program, to jump to.
#[derive(Clone, Copy)]
pub(super) struct Label(usize);

/// Bytes moved by a load or store.
#[derive(Clone, Copy)]
pub(super) enum Size {
    Byte,
    Half,
    Word,
    Double,
}

impl Size {
    fn bits(self) -> u8 {
        match self {
            Size::Word => 0x00,
            Size::Half => 0x08,
            Size::Byte => 0x10,
            Size::Double => 0x18,
        }
    }
}

/// Arithmetic, 64 bits unless it says 32.
#[derive(Clone, Copy)]
pub(super) enum Op {
    Add,
    And,
    ShiftLeft,
    ShiftRight,
    Xor,
    Move,
}

impl Op {
    fn bits(self) -> u8 {
        match self {
            Op::Add => 0x00,
            Op::And => 0x50,
            Op::ShiftLeft => 0x60,
            Op::ShiftRight => 0x70,
            Op::Xor => 0xa0,
            Op::Move => 0xb0,
        }
    }
}

/// Condition of a jump; comparisons are unsigned.
#[derive(Clone, Copy)]
pub(super) enum If {
    Equal,
    NotEqual,
    Greater,
    Less,
}

impl If {
    fn bits(self) -> u8 {
        match self {
            If::Equal => 0x10,
            If::Greater => 0x20,
            If::NotEqual => 0x50,
            If::Less => 0xa0,
        }
    }
}

const CLASS_LOAD_IMMEDIATE: u8 = 0x18;
const CLASS_LOAD: u8 = 0x61;
const CLASS_STORE_IMMEDIATE: u8 = 0x62;
const CLASS_STORE: u8 = 0x63;
const CLASS_ALU32: u8 = 0x04;
const CLASS_ALU64: u8 = 0x07;
const CLASS_JUMP: u8 = 0x05;
const CLASS_JUMP32: u8 = 0x06;
const CLASS_LOAD_PACKET: u8 = 0x20;
const CLASS_LOAD_PACKET_AT: u8 = 0x40;
const FROM_REGISTER: u8 = 0x08;
const TO_BIG_ENDIAN: u8 = 0xdc;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;
const PSEUDO_MAP: u8 = 1;
const PSEUDO_MAP_VALUE: u8 = 2;

/// A program being written.
#[derive(Default)]
pub(super) struct Assembler {
    code: Vec<Instruction>,
    labels: Vec<Option<usize>>,
    /// Jumps whose offset is filled in at the end.
    jumps: Vec<(usize, Label)>,
}

impl Assembler {
    fn emit(&mut self, code: u8, to: Reg, from: Reg, offset: i16, immediate: i32) {
        self.code.push(Instruction { code, registers: to.0 | (from.0 << 4), offset, immediate });
    }

    /// A label that is not placed yet.
    pub(super) fn label(&mut self) -> Label {
        self.labels.push(None);
        Label(self.labels.len() - 1)
    }

    /// Places a label here.
    pub(super) fn place(&mut self, label: Label) {
        self.labels[label.0] = Some(self.code.len());
    }

    /// `to = to op from`, 64 bits.
    pub(super) fn op(&mut self, op: Op, to: Reg, from: Reg) {
        self.emit(CLASS_ALU64 | FROM_REGISTER | op.bits(), to, from, 0, 0);
    }

    /// `to = to op value`, 64 bits; the value is sign-extended.
    pub(super) fn op_value(&mut self, op: Op, to: Reg, value: i32) {
        self.emit(CLASS_ALU64 | op.bits(), to, R0, 0, value);
    }

    /// `to = to op from`, 32 bits; the upper half becomes zero.
    pub(super) fn op32(&mut self, op: Op, to: Reg, from: Reg) {
        self.emit(CLASS_ALU32 | FROM_REGISTER | op.bits(), to, from, 0, 0);
    }

    /// `to = to op value`, 32 bits; the upper half becomes zero.
    pub(super) fn op32_value(&mut self, op: Op, to: Reg, value: u32) {
        self.emit(CLASS_ALU32 | op.bits(), to, R0, 0, value.cast_signed());
    }

    /// Turns 16, 32 or 64 bits from network to host order.
    pub(super) fn big_endian(&mut self, register: Reg, bits: i32) {
        self.emit(TO_BIG_ENDIAN, register, R0, 0, bits);
    }

    /// `to = memory[base + offset]`
    pub(super) fn load(&mut self, size: Size, to: Reg, base: Reg, offset: i16) {
        self.emit(CLASS_LOAD | size.bits(), to, base, offset, 0);
    }

    /// `memory[base + offset] = from`
    pub(super) fn store(&mut self, size: Size, base: Reg, offset: i16, from: Reg) {
        self.emit(CLASS_STORE | size.bits(), base, from, offset, 0);
    }

    /// `memory[base + offset] = value`
    pub(super) fn store_value(&mut self, size: Size, base: Reg, offset: i16, value: i32) {
        self.emit(CLASS_STORE_IMMEDIATE | size.bits(), base, R0, offset, value);
    }

    /// `to` = address of the only value of an array map.
    pub(super) fn map_value(&mut self, to: Reg, map: i32) {
        self.emit(CLASS_LOAD_IMMEDIATE, to, Reg(PSEUDO_MAP_VALUE), 0, map);
        self.emit(0, R0, R0, 0, 0);
    }

    /// `to` = a map itself, for a call.
    pub(super) fn map(&mut self, to: Reg, map: i32) {
        self.emit(CLASS_LOAD_IMMEDIATE, to, Reg(PSEUDO_MAP), 0, map);
        self.emit(0, R0, R0, 0, 0);
    }

    /// Jumps if `left` compares so with `value` (sign-extended).
    pub(super) fn jump_if_value(&mut self, condition: If, left: Reg, value: i32, label: Label) {
        self.jumps.push((self.code.len(), label));
        self.emit(CLASS_JUMP | condition.bits(), left, R0, 0, value);
    }

    /// As [`Assembler::jump_if_value`], comparing 32 bits.
    pub(super) fn jump_if_value32(&mut self, condition: If, left: Reg, value: u32, label: Label) {
        self.jumps.push((self.code.len(), label));
        self.emit(CLASS_JUMP32 | condition.bits(), left, R0, 0, value.cast_signed());
    }

    /// R0 = bytes of the packet in R6 at `offset`, plus `index` if there is one, in host order; a load beyond
    /// its end ends the program with 0. Loses the argument registers. `size` as classic BPF encodes it.
    pub(super) fn load_packet(&mut self, size: u8, offset: u32, index: Option<Reg>) {
        let class = if index.is_some() { CLASS_LOAD_PACKET_AT } else { CLASS_LOAD_PACKET };
        self.emit(class | size, R0, index.unwrap_or(R0), 0, offset.cast_signed());
    }

    /// Jumps if `left` compares so with `right`.
    pub(super) fn jump_if(&mut self, condition: If, left: Reg, right: Reg, label: Label) {
        self.jumps.push((self.code.len(), label));
        self.emit(CLASS_JUMP | FROM_REGISTER | condition.bits(), left, right, 0, 0);
    }

    /// Jumps always.
    pub(super) fn jump(&mut self, label: Label) {
        self.jumps.push((self.code.len(), label));
        self.emit(CLASS_JUMP, R0, R0, 0, 0);
    }

    /// Calls a kernel function by its number.
    pub(super) fn call(&mut self, function: i32) {
        self.emit(CALL, R0, R0, 0, function);
    }

    /// Ends the program with the result in R0.
    pub(super) fn exit(&mut self) {
        self.emit(EXIT, R0, R0, 0, 0);
    }

    /// The finished program; `None` if a label was never placed or is more than 32,767 instructions away.
    pub(super) fn finish(mut self) -> Option<Vec<Instruction>> {
        for (at, label) in self.jumps {
            let target = i64::try_from(self.labels[label.0]?).ok()?;
            let distance = target - i64::try_from(at).ok()? - 1;
            self.code[at].offset = i16::try_from(distance).ok()?;
        }
        Some(self.code)
    }
}
