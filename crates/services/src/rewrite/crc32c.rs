//! CRC32c (RFC 9260 appendix A) after four of the covered bytes changed, without reading the others.
//!
//! The CRC is linear: the CRCs of two messages of one length differ by the bare CRC of their difference, which here is
//! four bytes and then zeros. A zero byte multiplies by x^8 in the field of the polynomial, so any number of them is
//! one power of x.

/// The Castagnoli polynomial, lowest bit first.
const POLYNOMIAL: u32 = 0x82f6_3b78;

/// x^(8 · 2^k) for k = 0, 1, … 16: enough for 131,071 bytes.
const POWERS: [u32; 17] = {
    let mut powers = [0; 17];
    // x^8: the highest bit is x^0.
    powers[0] = 1 << (31 - 8);
    let mut k = 1;
    while k < 17 {
        powers[k] = multiply(powers[k - 1], powers[k - 1]);
        k += 1;
    }
    powers
};

/// Product of two polynomials modulo the polynomial.
const fn multiply(a: u32, mut b: u32) -> u32 {
    let (mut product, mut bit) = (0, 1u32 << 31);
    while bit != 0 {
        if a & bit != 0 {
            product ^= b;
        }
        b = (b >> 1) ^ (if b & 1 != 0 { POLYNOMIAL } else { 0 });
        bit >>= 1;
    }
    product
}

/// Difference to xor to the CRC (as the number whose little-endian bytes are on the wire) of `message_bytes` bytes when
/// their first four change by the xor `difference`. At most 65,539 bytes: `None` for more, and for less than four.
pub(super) fn change(difference: [u8; 4], message_bytes: usize) -> Option<u32> {
    let mut zeros = message_bytes.checked_sub(4).filter(|zeros| *zeros < 1 << 16)?;
    let mut crc = u32::from_le_bytes(difference);
    // The four bytes themselves: 32 shifts, which is a multiplication by x^32.
    crc = multiply(crc, POWERS[2]);
    for power in POWERS {
        if zeros & 1 != 0 {
            crc = multiply(crc, power);
        }
        zeros >>= 1;
    }
    Some(crc)
}
