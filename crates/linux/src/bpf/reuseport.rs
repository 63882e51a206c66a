//! Which socket of an SO_REUSEPORT group a datagram goes to: a classic BPF program, which needs no privilege.
//!
//! It sees the UDP payload and returns a position in the group (the order in which the sockets were bound). A
//! position that does not exist makes the kernel fall back to its hash of the 4-tuple; the program uses that
//! for everything that names no core, and never drops. It runs once per merged train, on the first datagram's
//! bytes: this is why each (sending core, receiving core) pair has a 4-tuple of its own.

use std::os::fd::AsFd;

use crate::Result;
use crate::error::Context;
use crate::sys::set_option;

/// A classic BPF instruction.
pub type Instruction = libc::sock_filter;

/// Not a position in any group: the kernel picks by its hash.
const FALL_BACK: u32 = u32::MAX;
/// The receiving core is not told; the sending core stands in for it (lane 255).
const NOT_TOLD: u32 = 255;
/// The lowest kind of datagram that belongs to a lane (4 sealed, 5 clear, 6 partial; below are
/// handshakes).
const KIND_DATA_MIN: u32 = 4;
/// The kind whose receiving core is sealed: the sending core stands in for it.
const KIND_SEALED_HEADER: u32 = 7;

const LOAD_BYTE: u16 = (libc::BPF_LD | libc::BPF_B | libc::BPF_ABS) as u16;
const LOAD_LENGTH: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_LEN) as u16;
const AND: u16 = (libc::BPF_ALU | libc::BPF_AND | libc::BPF_K) as u16;
const MODULO: u16 = (libc::BPF_ALU | libc::BPF_MOD | libc::BPF_K) as u16;
const JUMP_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const JUMP_AT_LEAST: u16 = (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
const RETURN_A: u16 = (libc::BPF_RET | libc::BPF_A) as u16;

fn statement(code: u16, k: u32) -> Instruction {
    Instruction { code, jt: 0, jf: 0, k }
}

/// Jumps over `if_true` or `if_false` instructions.
fn jump(code: u16, k: u32, if_true: u8, if_false: u8) -> Instruction {
    Instruction { code, jt: if_true, jf: if_false, k }
}

/// The program for a group of `cores` sockets (1–255): a data datagram goes by its receiving core byte, or if
/// that is 255 or sealed by its sending core modulo `cores`; handshakes, garbage and cores that do not exist go by the
/// kernel's hash.
pub fn reuseport_program(cores: usize) -> Vec<Instruction> {
    let cores = u32::try_from(cores).unwrap_or(u32::MAX).clamp(1, NOT_TOLD);
    vec![
        // Too short for the three bytes: a load beyond the end would return 0, that is core 0.
        statement(LOAD_LENGTH, 0),
        jump(JUMP_AT_LEAST, 3, 0, 11),
        statement(LOAD_BYTE, 0),
        statement(AND, 0x0f),
        jump(JUMP_EQUAL, KIND_SEALED_HEADER, 5, 0),
        jump(JUMP_AT_LEAST, KIND_DATA_MIN, 0, 7),
        statement(LOAD_BYTE, 1),
        jump(JUMP_EQUAL, NOT_TOLD, 2, 0),
        jump(JUMP_AT_LEAST, cores, 4, 0),
        statement(RETURN_A, 0),
        statement(LOAD_BYTE, 2),
        statement(MODULO, cores),
        statement(RETURN_A, 0),
        statement(RETURN, FALL_BACK),
    ]
}

/// Gives the whole group of this socket the program. Attach it when all sockets are bound.
pub fn attach_reuseport(socket: impl AsFd, program: &[Instruction]) -> Result<()> {
    let filter = libc::sock_fprog {
        len: u16::try_from(program.len()).unwrap_or(u16::MAX),
        filter: program.as_ptr().cast_mut(),
    };
    set_option(socket, libc::SOL_SOCKET, libc::SO_ATTACH_REUSEPORT_CBPF, &filter)
        .context("attach the program that picks the socket by core")
}
