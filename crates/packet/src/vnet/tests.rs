#![allow(clippy::unwrap_used, reason = "tests")]
use super::*;
use proptest::prelude::*;

#[test]
fn layout() {
    let bytes = [1, 0x81, 0x42, 0, 0xb4, 0x05, 0x14, 0, 0x10, 0];
    let header = VirtioNetHeader {
        flags: NEEDS_CSUM,
        gso_type: GSO_TCPV4 | GSO_ECN,
        hdr_len: 66,
        gso_size: 1460,
        csum_start: 20,
        csum_offset: 16,
    };
    assert_eq!(VirtioNetHeader::parse(&bytes), Ok(header));
    assert_eq!(header.to_bytes(), bytes);
    assert!(header.needs_csum());
    assert!(!VirtioNetHeader { flags: DATA_VALID, ..header }.needs_csum());
}

#[test]
fn cut() {
    for bytes in 0..VNET_HEADER_BYTES {
        assert_eq!(VirtioNetHeader::parse(&[0; VNET_HEADER_BYTES][..bytes]), Err(DropReason::BadOffload));
        assert!(!VirtioNetHeader::default().write(&mut [0; VNET_HEADER_BYTES][..bytes]));
    }
}

proptest! {
    #[test]
    fn round_trip(bytes: [u8; 10]) {
        let header = VirtioNetHeader::parse(&bytes).unwrap();
        let mut out = [0xee; 12];
        prop_assert!(header.write(&mut out));
        prop_assert_eq!(&out[..10], &bytes);
        prop_assert_eq!(&out[10..], &[0xee; 2]);
    }
}
