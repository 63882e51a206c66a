//! QUIC's clear headers, from whoever sends to a virtual server, and the server names that clients of both sides ask for.

use packet::quic::initial::{Initial, InitialKeys, crypto_frames};
use packet::quic::{CONNECTION_ID_BYTES_MAX, Kind, Packet};
use packet::server_name::{NAME_BYTES_MAX, PIECES_MAX, Payload, ServerName, look};
use packet::tls::{self, Answer};

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

/// Pieces of a flow, each `offset:16 | length:16 | bytes`: over TCP, and over QUIC as datagrams and as what opened Initials hold.
///
/// A name is a name; what is looked for has an end; what the beginning of a message says, all of it says.
pub fn server_name(data: &[u8]) {
    of_message(data);
    for (_, bytes) in crypto_frames(data) {
        of_message(bytes);
    }
    let (mut tcp, mut udp, mut pieces) = (None, None, 0);
    let mut rest = data;
    while let Some((&[a, b, c, d], behind)) = rest.split_first_chunk::<4>() {
        let length = usize::from(u16::from_be_bytes([c, d])).min(behind.len());
        let (bytes, behind) = behind.split_at(length);
        let sequence = u32::from(u16::from_be_bytes([a, b]));
        let begun = tcp.is_some();
        let found = look(&mut tcp, Payload::Tcp { sequence, is_syn: false, bytes });
        found.iter().for_each(is_name);
        // Bare acknowledgments do not count.
        pieces = match &tcp {
            Some(_) if begun => pieces + u8::from(!bytes.is_empty()),
            _ => 0,
        };
        assert!(pieces < PIECES_MAX, "it is looked for in every piece");
        look(&mut udp, Payload::Udp { stride: 1_200, bytes }).iter().for_each(is_name);
        if let Some((packet, _)) = Initial::first(bytes) {
            let opened = InitialKeys::of_client(&packet).and_then(|keys| keys.open(&packet));
            assert!(opened.is_none_or(|opened| opened.len() < bytes.len()));
        }
        rest = behind;
    }
}

fn is_name(name: &ServerName) {
    assert!(
        (1..=NAME_BYTES_MAX).contains(&name.len()) && !name.bytes().any(|byte| byte.is_ascii_uppercase())
    );
    assert_eq!(ServerName::new(name.as_bytes()).as_ref(), Some(name));
}

fn of_message(bytes: &[u8]) {
    for read in [tls::of_records, tls::of_handshake] {
        let whole = read(bytes);
        if let Answer::Name(name) = &whole {
            is_name(name);
        }
        match read(&bytes[..bytes.len() / 2]) {
            Answer::Incomplete => {}
            early => assert_eq!(early, whole),
        }
    }
}
