//! Writes the steering program.
//!
//! Registers: R6 the packet, R7 where the current header starts, R8 where the IP packet ends (both counted
//! from the start of the outer packet), R9 the protocol. The stack holds what is named below. An ICMP error
//! is read as two packets, the outer one and the quoted one; [`Level`] says which one the code being written
//! reads.

use crate::bpf::assembler::{
    Assembler, FRAME, If, Instruction, Label, Op, R0, R1, R2, R3, R4, R5, R6, R7, R8, R9, Reg, Size,
};
use packet::icmp::Kind;

/// The fixed IP header.
const HEADER: i16 = -40;
/// Some bytes of the header behind it.
const SCRATCH: i16 = -48;
/// Where the bytes of the packet being read end: those of the whole, or of the quote.
const AVAILABLE: i16 = -56;
/// Protocol of the outer packet while the quote is read.
const OUTER_PROTOCOL: i16 = -64;
/// Not zero behind an IPv6 fragment header.
const FRAGMENT_SEEN: i16 = -72;
/// Source and destination port, 32 bits each, host order.
const PORTS: i16 = -80;
/// Not zero: the first port belongs to the lower address, whichever that is (ICMP identifier).
const PORT_IS_ID: i16 = -88;
/// Addresses, 16 bytes each, as in the packet.
const SOURCE: i16 = -104;
const DESTINATION: i16 = -120;
/// Bytes that are hashed: low address, high address, low port, high port.
const INPUT: i16 = -160;

/// `bpf_skb_load_bytes(packet, offset, to, bytes)`
const CALL_LOAD_BYTES: i32 = 26;
/// Offset of `len` in `struct __sk_buff`.
const PACKET_BYTES: i16 = 0;
/// Bytes of one table in the map: 256 words.
const TABLE_BYTES: i16 = 1024;
/// As many tables as a 16-bit instruction offset reaches.
const REACH: i16 = 31;
/// Number of the table for the protocol, behind those of the input bytes.
const PROTOCOL_TABLE: i16 = 36;
/// As in `packet::ip`.
const EXTENSION_HEADERS_MAX: usize = packet::ip::EXTENSION_HEADERS_MAX;

const PORT_PROTOCOLS: [u8; 4] = [
    packet::ip::PROTOCOL_TCP,
    packet::ip::PROTOCOL_UDP,
    packet::ip::PROTOCOL_SCTP,
    packet::ip::PROTOCOL_UDP_LITE,
];

/// Offsets and sizes that differ between the IP versions.
struct Version {
    number: i32,
    header_bytes: i32,
    icmp: u8,
    address_bytes: i16,
    source_at: i16,
    destination_at: i16,
}

const V4: Version = Version {
    number: 4,
    header_bytes: 20,
    icmp: packet::ip::PROTOCOL_ICMP,
    address_bytes: 4,
    source_at: 12,
    destination_at: 16,
};
const V6: Version = Version {
    number: 6,
    header_bytes: 40,
    icmp: packet::ip::PROTOCOL_ICMPV6,
    address_bytes: 16,
    source_at: 8,
    destination_at: 24,
};

/// Protocol numbers of IPv6 extension headers.
fn extensions() -> impl Iterator<Item = u8> {
    (0..=u8::MAX).filter(|protocol| packet::ip::is_extension(*protocol))
}

/// ICMP types whose kind is wanted.
fn icmp_types(version: &Version, wanted: impl Fn(Kind) -> bool) -> impl Iterator<Item = i32> {
    let of_type = |message_type: i32| Kind::of_type(version.number as u8, message_type as u8);
    (0..=i32::from(u8::MAX)).filter(move |message_type| wanted(of_type(*message_type)))
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Level {
    Whole,
    Quote,
}

/// The places that the code of one version jumps to.
#[derive(Clone, Copy)]
struct Places {
    /// The key is complete.
    hash: Label,
    /// The packet being read has no readable IP header.
    malformed: Label,
}

/// The program; `None` if it cannot be assembled, which a test excludes.
///
/// `tables` is the descriptor of the map with the Toeplitz tables of the 36 input bytes and one more for the
/// protocol, `owners` of that with the owners of `buckets` buckets.
pub(super) fn program(tables: i32, owners: i32, buckets: usize) -> Option<Vec<Instruction>> {
    let mut writer = Writer { asm: Assembler::default() };
    let w = &mut writer;
    w.asm.op(Op::Move, R6, R1);
    for slot in [FRAGMENT_SEEN, PORTS, PORT_IS_ID] {
        w.asm.store_value(Size::Double, FRAME, slot, 0);
    }
    w.asm.load(Size::Word, R1, R6, PACKET_BYTES);
    w.asm.store(Size::Double, FRAME, AVAILABLE, R1);
    w.asm.op_value(Op::Move, R7, 0);
    let (other, version6, mixed) = (w.asm.label(), w.asm.label(), w.asm.label());
    w.fetch(R7, SCRATCH, 1, other);
    w.asm.load(Size::Byte, R1, FRAME, SCRATCH);
    w.asm.op_value(Op::ShiftRight, R1, 4);
    w.asm.jump_if_value(If::Equal, R1, V6.number, version6);
    w.asm.jump_if_value(If::NotEqual, R1, V4.number, other);
    w.version(&V4, tables, other, mixed);
    w.asm.place(version6);
    w.version(&V6, tables, other, mixed);
    w.asm.place(mixed);
    w.owner(owners, buckets);
    w.asm.place(other);
    w.asm.op_value(Op::Move, R0, 0);
    w.asm.exit();
    writer.asm.finish()
}

struct Writer {
    asm: Assembler,
}

impl Writer {
    /// All for one IP version: read the packet, hash its key into R0, go to `done`.
    fn version(&mut self, version: &Version, tables: i32, malformed: Label, done: Label) {
        let (hash, quote, unreadable) = (self.asm.label(), self.asm.label(), self.asm.label());
        let places = Places { hash, malformed };
        self.header(version, Level::Whole, places);
        self.upper_layer(version, Some(quote), places);

        self.asm.place(quote);
        self.asm.store(Size::Double, FRAME, OUTER_PROTOCOL, R9);
        self.asm.store(Size::Double, FRAME, AVAILABLE, R8);
        self.asm.store_value(Size::Double, FRAME, FRAGMENT_SEEN, 0);
        self.asm.op_value(Op::Add, R7, 8);
        let places = Places { hash, malformed: unreadable };
        self.header(version, Level::Quote, places);
        self.upper_layer(version, None, places);
        // A quote that cannot be read: the error goes by its own addresses, which are still in place.
        self.asm.place(unreadable);
        self.asm.load(Size::Double, R9, FRAME, OUTER_PROTOCOL);

        self.asm.place(hash);
        self.order(version);
        self.toeplitz(version, tables);
        self.asm.jump(done);
    }

    /// Copies `bytes` bytes of the packet at offset `at` (a register) to the stack, or jumps.
    fn fetch(&mut self, at: Reg, slot: i16, bytes: i32, missing: Label) {
        self.asm.op(Op::Move, R2, at);
        self.fetch_r2(slot, bytes, missing);
    }

    fn fetch_r2(&mut self, slot: i16, bytes: i32, missing: Label) {
        self.asm.op(Op::Move, R1, R6);
        self.asm.op(Op::Move, R3, FRAME);
        self.asm.op_value(Op::Add, R3, i32::from(slot));
        self.asm.op_value(Op::Move, R4, bytes);
        self.asm.call(CALL_LOAD_BYTES);
        self.asm.jump_if_value(If::NotEqual, R0, 0, missing);
    }

    /// Jumps unless `bytes` more bytes lie between R7 and the end of the IP packet.
    fn need(&mut self, bytes: i32, missing: Label) {
        self.asm.op(Op::Move, R1, R7);
        self.asm.op_value(Op::Add, R1, bytes);
        self.asm.jump_if(If::Greater, R1, R8, missing);
    }

    /// Loads a 16-bit field of the stack in host order.
    fn load_u16(&mut self, to: Reg, slot: i16) {
        self.asm.load(Size::Half, to, FRAME, slot);
        self.asm.big_endian(to, 16);
    }

    /// Reads the IP header at R7: afterwards R7 is the upper layer, R8 the end, R9 the protocol, and the
    /// addresses are stored. A fragment goes to `hash` at once: it has no ports.
    fn header(&mut self, version: &Version, level: Level, places: Places) {
        let malformed = places.malformed;
        self.asm.load(Size::Double, R8, FRAME, AVAILABLE);
        self.need(version.header_bytes, malformed);
        self.fetch(R7, HEADER, version.header_bytes, malformed);
        if level == Level::Quote {
            self.asm.load(Size::Byte, R1, FRAME, HEADER);
            self.asm.op_value(Op::ShiftRight, R1, 4);
            self.asm.jump_if_value(If::NotEqual, R1, version.number, malformed);
        }
        // The end as the header tells it. The quote may be cut; the whole must be there.
        self.load_u16(R2, HEADER + if version.number == 4 { 2 } else { 4 });
        self.asm.op(Op::Add, R2, R7);
        if version.number == 6 {
            self.asm.op_value(Op::Add, R2, version.header_bytes);
        }
        let cut = self.asm.label();
        let missing = if level == Level::Quote { cut } else { malformed };
        self.asm.jump_if(If::Greater, R2, R8, missing);
        self.asm.op(Op::Move, R8, R2);
        self.asm.place(cut);
        if version.number == 4 { self.header_v4(places) } else { self.header_v6(places) }
    }

    fn header_v4(&mut self, places: Places) {
        self.asm.load(Size::Byte, R1, FRAME, HEADER);
        self.asm.op_value(Op::And, R1, 0x0f);
        self.asm.op_value(Op::ShiftLeft, R1, 2);
        self.asm.jump_if_value(If::Less, R1, V4.header_bytes, places.malformed);
        self.asm.op(Op::Add, R7, R1);
        self.asm.jump_if(If::Greater, R7, R8, places.malformed);
        self.asm.load(Size::Byte, R9, FRAME, HEADER + 9);
        self.copy_addresses(&V4);
        // More fragments, or an offset.
        self.load_u16(R1, HEADER + 6);
        self.asm.op_value(Op::And, R1, 0x3fff);
        self.asm.jump_if_value(If::NotEqual, R1, 0, places.hash);
    }

    fn header_v6(&mut self, places: Places) {
        let (walked, fragment) = (self.asm.label(), self.asm.label());
        self.asm.op_value(Op::Add, R7, V6.header_bytes);
        self.asm.load(Size::Byte, R9, FRAME, HEADER + 6);
        for _ in 0..EXTENSION_HEADERS_MAX {
            self.extension(walked, fragment, places.malformed);
        }
        // One more would be one too many.
        for protocol in extensions() {
            self.asm.jump_if_value(If::Equal, R9, i32::from(protocol), places.malformed);
        }
        self.asm.jump(walked);
        self.asm.place(fragment);
        self.copy_addresses(&V6);
        self.asm.jump(places.hash);
        self.asm.place(walked);
        self.copy_addresses(&V6);
    }

    /// One IPv6 extension header at R7 with the protocol R9, or on to `walked` if it is none.
    fn extension(&mut self, walked: Label, fragment: Label, malformed: Label) {
        let (common, is_fragment, is_ah, step) =
            (self.asm.label(), self.asm.label(), self.asm.label(), self.asm.label());
        for protocol in extensions() {
            self.asm.jump_if_value(If::Equal, R9, i32::from(protocol), common);
        }
        self.asm.jump(walked);

        self.asm.place(common);
        self.need(2, malformed);
        self.fetch(R7, SCRATCH, 2, malformed);
        self.asm.jump_if_value(If::Equal, R9, i32::from(packet::ip::PROTOCOL_FRAGMENT), is_fragment);
        self.asm.load(Size::Byte, R5, FRAME, SCRATCH + 1);
        self.asm.jump_if_value(If::Equal, R9, i32::from(packet::ip::PROTOCOL_AH), is_ah);
        self.asm.op_value(Op::Add, R5, 1);
        self.asm.op_value(Op::ShiftLeft, R5, 3);
        self.asm.jump(step);
        self.asm.place(is_ah);
        self.asm.op_value(Op::Add, R5, 2);
        self.asm.op_value(Op::ShiftLeft, R5, 2);
        self.asm.jump(step);

        self.asm.place(is_fragment);
        self.need(8, malformed);
        self.asm.load(Size::Double, R1, FRAME, FRAGMENT_SEEN);
        self.asm.jump_if_value(If::NotEqual, R1, 0, malformed);
        self.asm.store_value(Size::Double, FRAME, FRAGMENT_SEEN, 1);
        self.fetch(R7, SCRATCH, 4, malformed);
        self.asm.load(Size::Byte, R9, FRAME, SCRATCH);
        self.load_u16(R1, SCRATCH + 2);
        // The reserved bits do not count.
        self.asm.op_value(Op::And, R1, 0xfff9);
        self.asm.jump_if_value(If::NotEqual, R1, 0, fragment);
        self.asm.op_value(Op::Move, R5, 8);

        self.asm.place(step);
        self.asm.op(Op::Add, R7, R5);
        self.asm.jump_if(If::Greater, R7, R8, malformed);
        self.asm.load(Size::Byte, R9, FRAME, SCRATCH);
    }

    fn copy_addresses(&mut self, version: &Version) {
        for (from, to) in [(version.source_at, SOURCE), (version.destination_at, DESTINATION)] {
            for at in (0..version.address_bytes).step_by(4) {
                self.asm.load(Size::Word, R1, FRAME, HEADER + from + at);
                self.asm.store(Size::Word, FRAME, to + at, R1);
            }
        }
    }

    /// Ports or ICMP identifier of the upper layer at R7. An ICMP error goes to `quote`, if quotes are read.
    fn upper_layer(&mut self, version: &Version, quote: Option<Label>, places: Places) {
        let (ports, icmp, query) = (self.asm.label(), self.asm.label(), self.asm.label());
        for protocol in PORT_PROTOCOLS {
            self.asm.jump_if_value(If::Equal, R9, i32::from(protocol), ports);
        }
        self.asm.jump_if_value(If::Equal, R9, i32::from(version.icmp), icmp);
        self.asm.jump(places.hash);

        self.asm.place(ports);
        self.need(4, places.hash);
        self.fetch(R7, SCRATCH, 4, places.hash);
        self.load_u16(R1, SCRATCH);
        self.asm.store(Size::Word, FRAME, PORTS, R1);
        self.load_u16(R1, SCRATCH + 2);
        self.asm.store(Size::Word, FRAME, PORTS + 4, R1);
        self.asm.jump(places.hash);

        self.asm.place(icmp);
        self.need(1, places.hash);
        self.fetch(R7, SCRATCH, 1, places.hash);
        self.asm.load(Size::Byte, R1, FRAME, SCRATCH);
        for message_type in icmp_types(version, Kind::has_id) {
            self.asm.jump_if_value(If::Equal, R1, message_type, query);
        }
        if let Some(quote) = quote {
            for message_type in icmp_types(version, |kind| kind == Kind::Error) {
                self.asm.jump_if_value(If::Equal, R1, message_type, quote);
            }
        }
        self.asm.jump(places.hash);

        self.asm.place(query);
        self.need(6, places.hash);
        self.asm.op(Op::Move, R2, R7);
        self.asm.op_value(Op::Add, R2, 4);
        self.fetch_r2(SCRATCH, 2, places.hash);
        self.load_u16(R1, SCRATCH);
        self.asm.store(Size::Word, FRAME, PORTS, R1);
        self.asm.store_value(Size::Double, FRAME, PORT_IS_ID, 1);
        self.asm.jump(places.hash);
    }

    /// Puts the endpoints into the canonical order: by address, then by port.
    fn order(&mut self, version: &Version) {
        let (keep, swap, equal, write) =
            (self.asm.label(), self.asm.label(), self.asm.label(), self.asm.label());
        // R1 and R2: ports of the low and of the high endpoint. R3 and R4: stack addresses of their addresses.
        self.asm.load(Size::Word, R1, FRAME, PORTS);
        self.asm.load(Size::Word, R2, FRAME, PORTS + 4);
        let (size, bits, step) =
            if version.address_bytes == 4 { (Size::Word, 32, 4) } else { (Size::Double, 64, 8) };
        for at in (0..version.address_bytes).step_by(step) {
            self.asm.load(size, R3, FRAME, SOURCE + at);
            self.asm.load(size, R4, FRAME, DESTINATION + at);
            self.asm.big_endian(R3, bits);
            self.asm.big_endian(R4, bits);
            self.asm.jump_if(If::Less, R3, R4, keep);
            self.asm.jump_if(If::Greater, R3, R4, swap);
        }
        self.asm.jump(equal);

        self.asm.place(swap);
        self.copy_input(version, DESTINATION, SOURCE);
        // The identifier is in the low slot already.
        self.asm.load(Size::Double, R5, FRAME, PORT_IS_ID);
        self.asm.jump_if_value(If::NotEqual, R5, 0, write);
        self.swap_ports();
        self.asm.jump(write);

        let in_order = self.asm.label();
        self.asm.place(equal);
        self.asm.jump_if(If::Less, R1, R2, in_order);
        self.swap_ports();
        self.asm.place(in_order);
        self.asm.place(keep);
        self.copy_input(version, SOURCE, DESTINATION);

        self.asm.place(write);
        let at = INPUT + 2 * version.address_bytes;
        for (port, at) in [(R1, at), (R2, at + 2)] {
            self.asm.big_endian(port, 16);
            self.asm.store(Size::Half, FRAME, at, port);
        }
    }

    fn swap_ports(&mut self) {
        self.asm.op(Op::Move, R5, R1);
        self.asm.op(Op::Move, R1, R2);
        self.asm.op(Op::Move, R2, R5);
    }

    /// Copies the addresses to the input, low first; keeps R1 and R2.
    fn copy_input(&mut self, version: &Version, low: i16, high: i16) {
        for (from, to) in [(low, INPUT), (high, INPUT + version.address_bytes)] {
            for at in (0..version.address_bytes).step_by(4) {
                self.asm.load(Size::Word, R3, FRAME, from + at);
                self.asm.store(Size::Word, FRAME, to + at, R3);
            }
        }
    }

    /// R0 = the flow hash: a look-up in its table of 256 words for each byte of the input, and one for the
    /// protocol.
    fn toeplitz(&mut self, version: &Version, tables: i32) {
        self.asm.map_value(R4, tables);
        self.asm.op_value(Op::Move, R0, 0);
        let input_bytes = 2 * version.address_bytes + 4;
        for byte in 0..input_bytes {
            if byte == REACH {
                self.asm.op_value(Op::Add, R4, i32::from(REACH) * i32::from(TABLE_BYTES));
            }
            self.asm.load(Size::Byte, R1, FRAME, INPUT + byte);
            self.look_up(byte % REACH * TABLE_BYTES);
        }
        let base = (input_bytes - 1) / REACH * REACH;
        self.asm.op_value(Op::Add, R4, i32::from(PROTOCOL_TABLE - base) * i32::from(TABLE_BYTES));
        self.asm.op(Op::Move, R1, R9);
        self.asm.op_value(Op::And, R1, 0xff);
        self.look_up(0);
    }

    /// R0 ^= the word number R1 of the table at R4 + `table`.
    fn look_up(&mut self, table: i16) {
        self.asm.op_value(Op::ShiftLeft, R1, 2);
        self.asm.op(Op::Move, R2, R4);
        self.asm.op(Op::Add, R2, R1);
        self.asm.load(Size::Word, R3, R2, table);
        self.asm.op32(Op::Xor, R0, R3);
    }

    /// Returns the owner of the core's bucket for the hash in R0.
    fn owner(&mut self, owners: i32, buckets: usize) {
        self.asm.op32_value(Op::ShiftRight, R0, 16);
        self.asm.op32_value(Op::And, R0, u32::try_from(buckets - 1).unwrap_or(0xffff));
        self.asm.op_value(Op::ShiftLeft, R0, 1);
        self.asm.map_value(R1, owners);
        self.asm.op(Op::Add, R1, R0);
        self.asm.load(Size::Half, R0, R1, 0);
        self.asm.exit();
    }
}
