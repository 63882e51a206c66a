//! An interpreter for the part of eBPF that the steering program uses (RFC 9669), strict about every memory
//! access.

use crate::bpf::assembler::Instruction;

const STACK_BYTES: usize = 512;
/// Where the stack ends, and where the maps begin, in the machine's address space.
const STACK_END: u64 = 0x1000_0000;
const MAPS: [u64; 2] = [0x2000_0000, 0x3000_0000];
const CONTEXT: u64 = 0x4000_0000;
const STEPS_MAX: usize = 4096;

/// A program with its two maps, which it knows as 0 and 1.
pub(super) struct Machine {
    pub code: Vec<Instruction>,
    pub maps: [Vec<u8>; 2],
}

struct State<'a> {
    registers: [u64; 11],
    stack: [Option<u8>; STACK_BYTES],
    packet: &'a [u8],
}

impl Machine {
    /// Runs the program on a packet; returns its result.
    pub fn run(&self, packet: &[u8]) -> u32 {
        let mut state = State { registers: [0; 11], stack: [None; STACK_BYTES], packet };
        state.registers[1] = CONTEXT;
        state.registers[10] = STACK_END;
        let mut at = 0usize;
        for _ in 0..STEPS_MAX {
            let instruction = self.code[at];
            at += 1;
            let to = usize::from(instruction.registers & 15);
            let from = usize::from(instruction.registers >> 4);
            match instruction.code {
                0x95 => return state.registers[0] as u32,
                0x85 => state.load_bytes(instruction.immediate),
                0x18 => {
                    assert_eq!(from, 2, "only map values");
                    state.registers[to] = MAPS[instruction.immediate as usize];
                    at += 1;
                }
                0xdc => state.registers[to] = big_endian(state.registers[to], instruction.immediate),
                code => match code & 7 {
                    1 => {
                        let address = state.registers[from].wrapping_add_signed(instruction.offset.into());
                        state.registers[to] = self.load(&state, address, width(code));
                    }
                    2 | 3 => {
                        let value =
                            if code & 7 == 2 { instruction.immediate as u64 } else { state.registers[from] };
                        let address = state.registers[to].wrapping_add_signed(instruction.offset.into());
                        state.store(address, &value.to_le_bytes()[..width(code)]);
                    }
                    4 | 7 => {
                        let right = right(&state, &instruction);
                        state.registers[to] = arithmetic(code, state.registers[to], right);
                    }
                    5 => {
                        if jumps(code, state.registers[to], right(&state, &instruction)) {
                            at = at.wrapping_add_signed(instruction.offset.into());
                        }
                    }
                    _ => panic!("instruction {code:#x}"),
                },
            }
        }
        panic!("the program does not end");
    }

    fn load(&self, state: &State<'_>, address: u64, bytes: usize) -> u64 {
        if address == CONTEXT {
            return state.packet.len() as u64;
        }
        let mut out = [0; 8];
        for (index, byte) in out.iter_mut().take(bytes).enumerate() {
            let address = address + index as u64;
            *byte = if address >= MAPS[1] {
                self.maps[1][(address - MAPS[1]) as usize]
            } else if address >= MAPS[0] {
                self.maps[0][(address - MAPS[0]) as usize]
            } else {
                state.stack[stack_index(address)].expect("the stack is read where it was written")
            };
        }
        // The maps hold numbers of this machine; the tests run on little-endian machines like the kernel's here.
        u64::from_le_bytes(out)
    }
}

impl State<'_> {
    fn store(&mut self, address: u64, bytes: &[u8]) {
        for (index, byte) in bytes.iter().enumerate() {
            self.stack[stack_index(address + index as u64)] = Some(*byte);
        }
    }

    /// `bpf_skb_load_bytes`; afterwards the argument registers hold nonsense.
    fn load_bytes(&mut self, function: i32) {
        assert_eq!((function, self.registers[1]), (26, CONTEXT));
        let (offset, to, bytes) = (self.registers[2] as usize, self.registers[3], self.registers[4] as usize);
        let result = match self.packet.get(offset..offset + bytes) {
            Some(part) => {
                self.store(to, part);
                0
            }
            None => -14i64 as u64,
        };
        self.registers[0] = result;
        self.registers[1..6].fill(0xdead_beef_dead_beef);
    }
}

fn stack_index(address: u64) -> usize {
    let index = address + STACK_BYTES as u64 - STACK_END;
    assert!(index < STACK_BYTES as u64, "outside the stack: {address:#x}");
    index as usize
}

fn width(code: u8) -> usize {
    match code & 0x18 {
        0x00 => 4,
        0x08 => 2,
        0x10 => 1,
        _ => 8,
    }
}

fn big_endian(value: u64, bits: i32) -> u64 {
    match bits {
        16 => u64::from((value as u16).swap_bytes()),
        32 => u64::from((value as u32).swap_bytes()),
        _ => value.swap_bytes(),
    }
}

fn right(state: &State<'_>, instruction: &Instruction) -> u64 {
    if instruction.code & 8 == 0 {
        i64::from(instruction.immediate) as u64
    } else {
        state.registers[usize::from(instruction.registers >> 4)]
    }
}

fn arithmetic(code: u8, left: u64, right: u64) -> u64 {
    let wide = code & 7 == 7;
    let (left, right) = if wide { (left, right) } else { (left & 0xffff_ffff, right & 0xffff_ffff) };
    let result = match code & 0xf0 {
        0x00 => left.wrapping_add(right),
        0x50 => left & right,
        0x60 => left << right,
        0x70 => left >> right,
        0xa0 => left ^ right,
        0xb0 => right,
        other => panic!("arithmetic {other:#x}"),
    };
    if wide { result } else { result & 0xffff_ffff }
}

fn jumps(code: u8, left: u64, right: u64) -> bool {
    match code & 0xf0 {
        0x00 => true,
        0x10 => left == right,
        0x20 => left > right,
        0x50 => left != right,
        0xa0 => left < right,
        other => panic!("jump {other:#x}"),
    }
}
