//! Arithmetic in the field of 256 elements (polynomial x⁸+x⁴+x³+x²+1, generator 2), on whole datagrams.

/// The polynomial without its highest term.
const POLYNOMIAL: u8 = 0x1d;
const LOW_BITS: u64 = 0x7f7f_7f7f_7f7f_7f7f;
const HIGH_BITS: u64 = 0x8080_8080_8080_8080;

/// Powers of 2, and the exponent of each element but 0.
const TABLES: ([u8; 255], [u8; 256]) = {
    let (mut powers, mut exponents) = ([0; 255], [0; 256]);
    let (mut exponent, mut value) = (0, 1u8);
    while exponent < 255 {
        powers[exponent] = value;
        exponents[value as usize] = exponent as u8;
        value = double(value);
        exponent += 1;
    }
    (powers, exponents)
};

const fn double(value: u8) -> u8 {
    (value << 1) ^ if value & 0x80 != 0 { POLYNOMIAL } else { 0 }
}

/// 2 to the power of `exponent`.
pub(super) const fn power(exponent: usize) -> u8 {
    TABLES.0[exponent % 255]
}

/// Product of two elements.
pub(super) fn multiply(a: u8, b: u8) -> u8 {
    if a == 0 || b == 0 {
        return 0;
    }
    power(usize::from(TABLES.1[usize::from(a)]) + usize::from(TABLES.1[usize::from(b)]))
}

/// The element whose product with `a` is 1; `a` is not 0.
pub(super) fn inverse(a: u8) -> u8 {
    power(255 - usize::from(TABLES.1[usize::from(a)]))
}

/// `sum` += `bytes`; `sum` is at least as long.
pub(super) fn add(sum: &mut [u8], bytes: &[u8]) {
    for (sum, byte) in sum.iter_mut().zip(bytes) {
        *sum ^= byte;
    }
}

/// `sum` += `factor` × `bytes`; `sum` is at least as long.
pub(super) fn add_multiple(sum: &mut [u8], bytes: &[u8], factor: u8) {
    if factor == 1 {
        return add(sum, bytes);
    }
    // Eight products of each bit of the factor at once would need wider registers than all machines have; a table of 256 is
    // in the first cache after the first bytes.
    let mut products = [0; 256];
    for (at, product) in products.iter_mut().enumerate().skip(1) {
        *product = multiply(at as u8, factor);
    }
    for (sum, byte) in sum.iter_mut().zip(bytes) {
        *sum ^= products[usize::from(*byte)];
    }
}

/// Doubles every element, eight at a time.
pub(super) fn double_all(bytes: &mut [u8]) {
    let (words, rest) = bytes.as_chunks_mut::<8>();
    for word in words {
        let value = u64::from_ne_bytes(*word);
        let carries = (value & HIGH_BITS) >> 7;
        *word = (((value & LOW_BITS) << 1) ^ carries.wrapping_mul(u64::from(POLYNOMIAL))).to_ne_bytes();
    }
    for byte in rest {
        *byte = double(*byte);
    }
}

/// Multiplies every element.
pub(super) fn multiply_all(bytes: &mut [u8], factor: u8) {
    if factor != 1 {
        bytes.iter_mut().for_each(|byte| *byte = multiply(*byte, factor));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_a_field() {
        for a in 1..=255u8 {
            assert_eq!(multiply(a, inverse(a)), 1, "{a}");
            assert_eq!(multiply(a, 1), a);
            assert_eq!(multiply(a, 2), double(a));
            for b in [1, 2, 3, 29, 127, 200, 255] {
                assert_eq!(multiply(a, b), multiply(b, a));
                assert_eq!(multiply(a, b ^ 5), multiply(a, b) ^ multiply(a, 5));
            }
        }
        // The generator reaches every element but 0.
        let mut seen = [false; 256];
        (0..255).for_each(|exponent| seen[usize::from(power(exponent))] = true);
        assert_eq!(seen.iter().filter(|seen| **seen).count(), 255);
    }

    #[test]
    fn whole_slices_are_as_single_elements() {
        let bytes: Vec<u8> = (0..=255).chain(0..7).collect();
        let mut doubled = bytes.clone();
        double_all(&mut doubled);
        let mut multiplied = bytes.clone();
        multiply_all(&mut multiplied, 77);
        let mut sum = bytes.clone();
        add_multiple(&mut sum, &bytes, 77);
        for (at, byte) in bytes.iter().enumerate() {
            assert_eq!(doubled[at], double(*byte));
            assert_eq!(multiplied[at], multiply(*byte, 77));
            assert_eq!(sum[at], byte ^ multiply(*byte, 77));
        }
    }
}
