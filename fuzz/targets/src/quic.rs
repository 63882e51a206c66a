//! QUIC's clear headers, from whoever sends to a virtual server.

use packet::quic::{CONNECTION_ID_BYTES_MAX, Kind, Packet};

/// Ids and rest are parts of the datagram, in order and without a gap; known versions have short ids.
pub fn quic_header(data: &[u8]) {
    let Some(packet) = Packet::parse(data) else { return };
    match packet {
        Packet::Short(rest) => assert_eq!(rest, &data[1..]),
        Packet::Long(header) => {
            let (destination, source) = (header.destination, header.source);
            let lengths = [destination.len() as u8, source.len() as u8];
            let whole = [&data[..5], &lengths[..1], destination, &lengths[1..], source, header.rest].concat();
            assert_eq!(whole, data);
            if !matches!(header.kind, Kind::Unknown | Kind::VersionNegotiation) {
                assert!(destination.len().max(source.len()) <= CONNECTION_ID_BYTES_MAX);
            }
        }
    }
}
