#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;
use proptest::collection::vec;
use proptest::prelude::*;

/// A frame that owns its bytes, so that it can be drawn at random.
#[derive(Clone, Debug)]
enum Drawn {
    Packet(PacketHead, Vec<u8>),
    Piece(PieceHead, Vec<u8>),
    Report(Vec<ReportEntry>),
    NotTold(Vec<ReportEntry>),
    Nack(u8, u8, Vec<NackRange>),
    ProcessorInfo(Vec<u8>),
    Extension(u8, Vec<u8>),
    Small(Frame<'static>),
}

impl Drawn {
    fn write(&self, out: &mut [u8], at: usize) -> Option<usize> {
        match self {
            Self::Packet(head, body) => Frame::Packet { head: *head, start: 0, body }.write(out, at),
            Self::Piece(head, body) => Frame::Piece { head: *head, start: 0, body }.write(out, at),
            Self::Report(entries) => write_report(out, at, entries),
            Self::NotTold(entries) => {
                let end = write_report(out, at, entries)?;
                of_lane_not_told(&mut out[at..]);
                Some(end)
            }
            Self::Nack(path, core, ranges) => write_nack(out, at, *path, *core, ranges),
            Self::ProcessorInfo(body) => Frame::ProcessorInfo(body).write(out, at),
            Self::Extension(kind, body) => Frame::Extension { kind: *kind, body }.write(out, at),
            Self::Small(frame) => frame.write(out, at),
        }
    }

    fn assert_is(&self, frame: Frame<'_>) {
        match (self, frame) {
            (Self::Packet(a, x), Frame::Packet { head: b, body: y, .. }) => assert_eq!((*a, &x[..]), (b, y)),
            (Self::Piece(a, x), Frame::Piece { head: b, body: y, .. }) => assert_eq!((*a, &x[..]), (b, y)),
            (Self::Report(entries), Frame::Report(report)) => {
                assert_eq!(report.len(), entries.len());
                assert!(!report.is_empty() && !report.not_told);
                assert!(report.entries().eq(entries.iter().copied()));
            }
            (Self::NotTold(entries), Frame::Report(report)) => {
                assert!(report.not_told && report.entries().eq(entries.iter().copied()));
            }
            (Self::Nack(path, core, ranges), Frame::Nack(nack)) => {
                assert_eq!((*path, *core), (nack.path, nack.sending_core));
                assert!(nack.ranges().eq(ranges.iter().copied()));
            }
            (Self::ProcessorInfo(a), Frame::ProcessorInfo(b)) => assert_eq!(a, b),
            (Self::Extension(kind, a), Frame::Extension { kind: other, body: b }) => {
                assert_eq!((*kind, &a[..]), (other, b));
            }
            (Self::Small(a), b) => assert_eq!(*a, b),
            (a, b) => panic!("{a:?} came back as {b:?}"),
        }
    }

    /// Whether the frame's last byte may be missing without anybody noticing: its length is the datagram's.
    fn open_ended(&self) -> bool {
        matches!(
            self,
            Self::Packet(PacketHead { bytes: None, .. }, _) | Self::Piece(PieceHead { bytes: None, .. }, _)
        )
    }
}

fn an_order() -> impl Strategy<Value = Order> {
    any::<(u32, u16, bool)>().prop_map(|(stamp, back, same_path)| Order { stamp, back, same_path })
}

fn packet() -> impl Strategy<Value = Drawn> {
    let head = (any::<[bool; 4]>(), proptest::option::of(an_order()), any::<Option<u16>>());
    (head, vec(any::<u8>(), 1..80)).prop_map(|(([ethernet, partial, group, len], order, tenant), body)| {
        let bytes = len.then_some(body.len() as u16);
        Drawn::Packet(PacketHead { ethernet, partial, group, order, tenant, bytes }, body)
    })
}

fn piece() -> impl Strategy<Value = Drawn> {
    let head = (any::<[bool; 4]>(), an_order(), any::<Option<u16>>(), any::<(u16, u16)>());
    (head, vec(any::<u8>(), 1..80)).prop_map(|((bits, order, tenant, (total, offset)), body)| {
        let [ethernet, partial, group, len] = bits;
        let bytes = len.then_some(body.len() as u16);
        let total = total.max(body.len() as u16);
        let offset = offset.min(total - body.len() as u16);
        Drawn::Piece(PieceHead { ethernet, partial, group, order, total, offset, tenant, bytes }, body)
    })
}

fn report() -> impl Strategy<Value = Drawn> {
    let entry = any::<(u8, u64, u32, u32, u64, u64, u32)>().prop_map(
        |(path, highest, arrival_us, hold_us, packets, bytes, lost)| ReportEntry {
            path,
            highest,
            arrival_us,
            hold_us,
            packets,
            bytes,
            lost,
        },
    );
    vec(entry, 1..=ENTRIES_MAX).prop_map(Drawn::Report)
}

fn nack() -> impl Strategy<Value = Drawn> {
    let range = (0..u64::MAX - 70_000, 1..=u16::MAX).prop_map(|(first, count)| NackRange { first, count });
    (any::<(u8, u8)>(), vec(range, 1..=RANGES_MAX))
        .prop_map(|((path, core), ranges)| Drawn::Nack(path, core, ranges))
}

fn small() -> impl Strategy<Value = Drawn> {
    let state = prop_oneof![
        Just(PeerPathState::Down),
        Just(PeerPathState::Up),
        Just(PeerPathState::Suspect),
        Just(PeerPathState::Removed),
    ];
    (0..10_u8, any::<[u8; 8]>(), any::<(u32, u16, u8)>(), state).prop_map(
        |(which, token, (id, size, byte), state)| {
            Drawn::Small(match which {
                0 => Frame::Challenge { token, path: byte },
                1 => Frame::Response { token },
                2 => Frame::Ping { id },
                3 => Frame::Pong { id },
                4 => Frame::Probe { id, size },
                5 => Frame::ProbeAck { id, size },
                6 => Frame::Marker { stamp: id },
                7 => Frame::Assignment { hash: id, core: byte },
                8 => Frame::Close { reason: CloseReason::from_byte(byte) },
                _ => Frame::PathState { path: byte, state },
            })
        },
    )
}

fn any_frame() -> impl Strategy<Value = Drawn> {
    let bytes = vec(any::<u8>(), 0..60);
    prop_oneof![
        3 => packet(),
        2 => piece(),
        1 => report(),
        1 => nack(),
        3 => small(),
        1 => bytes.clone().prop_map(Drawn::ProcessorInfo),
        1 => (kind::EXTENSION..=255, bytes).prop_map(|(kind, body)| Drawn::Extension(kind, body)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn every_frame_comes_back_and_no_shorter_one_does(frame in any_frame(), before in 0..9_usize) {
        let mut out = vec![0xaa; 4_096];
        let end = frame.write(&mut out, before).unwrap();
        prop_assert!(out[end..].iter().all(|&byte| byte == 0xaa), "wrote behind its end");
        let (parsed, next) = parse(&out[..end], before).unwrap().unwrap();
        frame.assert_is(parsed);
        prop_assert_eq!(next, end);
        prop_assert_eq!(parsed.encoded_len(), end - before);
        // Written again by the general writer it is the same.
        let mut again = vec![0xaa; 4_096];
        prop_assert_eq!(parsed.write(&mut again, before), Some(end));
        prop_assert_eq!(&again, &out);
        for cut in before..end {
            match parse(&out[..cut], before) {
                Ok(None) => prop_assert_eq!(cut, before),
                Ok(Some((Frame::Packet { body, .. } | Frame::Piece { body, .. }, next))) => {
                    prop_assert!(frame.open_ended());
                    prop_assert!(!body.is_empty());
                    prop_assert_eq!(next, cut);
                }
                Ok(Some(other)) => prop_assert!(false, "{} bytes of {:?} gave {:?}", cut - before, frame, other),
                Err(reason) => prop_assert_eq!(reason, DropReason::FrameMalformed),
            }
        }
        // And it is not written where it does not fit.
        for room in 0..end {
            prop_assert_eq!(frame.write(&mut out[..room], before), None);
        }
    }

    #[test]
    fn frames_follow_each_other_up_to_the_padding(drawn in vec(any_frame(), 0..8), padding in 0..5_usize) {
        let mut out = vec![0xaa; 32_768];
        let mut end = 0;
        let drawn: Vec<Drawn> = drawn.into_iter().filter(|frame| !frame.open_ended()).collect();
        for frame in &drawn {
            end = frame.write(&mut out, end).unwrap();
        }
        let plaintext = &mut out[..end + padding];
        prop_assert_eq!(write_padding(plaintext, end), Some(end + padding));
        let mut frames = Frames::new(plaintext);
        for frame in &drawn {
            frame.assert_is(frames.next().unwrap().unwrap());
        }
        prop_assert!(frames.next().is_none());
    }

    #[test]
    fn any_bytes_are_survived(bytes in vec(any::<u8>(), 0..300), kind in 0..20_u8, flags in 0..0x80_u8) {
        for plaintext in [bytes.clone(), [vec![kind, flags], bytes.clone()].concat(), [vec![kind, 0], bytes].concat()] {
            let mut at = 0;
            while let Ok(Some((frame, next))) = parse(&plaintext, at) {
                prop_assert!(next > at && next <= plaintext.len());
                match frame {
                    Frame::Packet { start, body, .. } | Frame::Piece { start, body, .. } => {
                        prop_assert!(!body.is_empty());
                        prop_assert_eq!(body, &plaintext[start..start + body.len()]);
                    }
                    Frame::Report(report) => prop_assert!(report.entries().len() <= ENTRIES_MAX),
                    Frame::Nack(nack) => prop_assert!(nack.ranges().len() <= RANGES_MAX),
                    _ => {}
                }
                // What can be read can be written, to the same bytes.
                let mut out = vec![0; plaintext.len()];
                prop_assert_eq!(frame.write(&mut out, at), Some(next));
                if !matches!(frame, Frame::Extension { .. }) {
                    prop_assert_eq!(&out[at..next], &plaintext[at..next]);
                }
                at = next;
            }
            let mut frames = Frames::new(&plaintext);
            let errors = frames.by_ref().filter(Result::is_err).count();
            prop_assert!(errors <= 1);
            prop_assert!(frames.next().is_none());
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" ")
}

/// The examples of `docs/wire-frames.md`, by name.
fn examples() -> Vec<(&'static str, Vec<u8>)> {
    let mut out = Vec::new();
    let mut add = |name, frame: Drawn| {
        let mut bytes = vec![0; 512];
        let end = frame.write(&mut bytes, 0).unwrap();
        bytes.truncate(end);
        out.push((name, bytes));
    };
    let body = || vec![0x45, 0x00, 0x00, 0x1c];
    let order = Order { stamp: 0x0001_0203, back: 7, same_path: false };
    let plain = PacketHead { bytes: None, ..PacketHead::default() };
    add("packet-open", Drawn::Packet(plain, body()));
    let head = PacketHead {
        partial: true,
        group: true,
        order: Some(order),
        tenant: Some(0x0102),
        bytes: Some(4),
        ethernet: false,
    };
    add("packet-full", Drawn::Packet(head, body()));
    let head = PacketHead {
        ethernet: true,
        order: Some(Order { same_path: true, ..order }),
        bytes: Some(4),
        ..PacketHead::default()
    };
    add("ethernet", Drawn::Packet(head, vec![0x08, 0x02, 0x00, 0x5e]));
    let head = PieceHead { order, total: 1_500, offset: 1_400, bytes: Some(4), ..PieceHead::default() };
    add("piece", Drawn::Piece(head, vec![1, 2, 3, 4]));
    let entry = ReportEntry {
        path: 2,
        highest: 1_000_000,
        arrival_us: 0xfedc_ba98,
        hold_us: 9_500,
        packets: 999_990,
        bytes: 1_400_000_000,
        lost: 10,
    };
    add("report", Drawn::Report(vec![entry]));
    add("report-not-told", Drawn::NotTold(vec![entry]));
    let ranges = vec![NackRange { first: 999_000, count: 3 }, NackRange { first: 999_010, count: 1 }];
    add("nack", Drawn::Nack(2, 1, ranges));
    let token = [0xde, 0xad, 0xbe, 0xef, 0x00, 0x11, 0x22, 0x33];
    add("challenge", Drawn::Small(Frame::Challenge { token, path: 3 }));
    add("response", Drawn::Small(Frame::Response { token }));
    add("ping", Drawn::Small(Frame::Ping { id: 5 }));
    add("pong", Drawn::Small(Frame::Pong { id: 5 }));
    add("probe", Drawn::Small(Frame::Probe { id: 6, size: 1_472 }));
    add("probe-ack", Drawn::Small(Frame::ProbeAck { id: 6, size: 1_472 }));
    add("marker", Drawn::Small(Frame::Marker { stamp: 0x0001_0203 }));
    add("assignment", Drawn::Small(Frame::Assignment { hash: 0xcafe_f00d, core: 3 }));
    add("processor-info", Drawn::ProcessorInfo(vec![0x01, 0x02, 0x03]));
    add("close", Drawn::Small(Frame::Close { reason: CloseReason::Removed }));
    add("path-state", Drawn::Small(Frame::PathState { path: 1, state: PeerPathState::Down }));
    add("extension", Drawn::Extension(0x90, vec![0xff, 0xfe]));
    let timing = |path: u8, delay_us: i32, jitter_us: u32| {
        [&[path][..], &delay_us.to_be_bytes(), &jitter_us.to_be_bytes()].concat()
    };
    let body = [timing(0, -2_000, 300), timing(2, 30_000, 3_000)].concat();
    add("path-timing", Drawn::Extension(128, body));
    out.push(("processor-info-seen", crate::advertise::seen(&[0x01, 0x02, 0x03])));
    let extension = |kind: u8, body: &[u8]| crate::lifecycle::encode(&Frame::Extension { kind, body });
    let limits = crate::path_limits::PathLimits::default();
    let metered = crate::path_limits::PathLimits { tier: 1, metered: true, cost: 5, ..limits };
    let capped = crate::path_limits::PathLimits { receive_bps: Some(20_000_000), closed: true, ..limits };
    let entries = [(1, metered), (2, capped)];
    out.push(("path-limits", extension(131, &crate::path_limits::write(0x0001_e240, &entries))));
    out.push(("path-limits-seen", extension(132, &0x0001_e240u32.to_be_bytes())));
    let label = |label: crate::mode::Label| {
        let mut bytes = vec![0; label.encoded_len()];
        assert_eq!(label.write(&mut bytes), bytes.len());
        bytes
    };
    out.push(("sealed-core", label(crate::mode::Label::Core(3))));
    out.push(("session-id", label(crate::mode::Label::Session(0xa3b8_f20a_88c2_3eb0))));
    out.push(("repair", extension(135, &crate::fec::tests::example().encode())));
    out.push(("core-wanted", extension(136, &[0xca, 0xfe, 0xf0, 0x0d, 0])));
    let body = vec![0x45, 0x00, 0x00, 0x1c];
    // A whole plaintext: a packet, the first piece of the next one, a marker, padding.
    let mut bytes = vec![0; 64];
    let head =
        PacketHead { order: Some(Order { stamp: 8, back: 1, same_path: true }), bytes: Some(4), ..plain };
    let mut at = Drawn::Packet(head, body).write(&mut bytes, 0).unwrap();
    let piece = PieceHead {
        order: Order { stamp: 9, back: 1, same_path: true },
        total: 1_000,
        bytes: Some(2),
        ..PieceHead::default()
    };
    at = Drawn::Piece(piece, vec![0x45, 0x00]).write(&mut bytes, at).unwrap();
    at = Frame::Marker { stamp: 9 }.write(&mut bytes, at).unwrap();
    write_padding(&mut bytes[..at + 3], at).unwrap();
    bytes.truncate(at + 3);
    out.push(("plaintext", bytes));
    out
}

#[test]
fn the_documentation_shows_these_bytes() {
    let documentation = include_str!("../../../../docs/wire-frames.md");
    let documented: Vec<(&str, &str)> = documentation
        .lines()
        .filter_map(|line| line.strip_prefix("    "))
        .filter_map(|line| line.split_once(": "))
        .map(|(name, bytes)| (name.trim(), bytes.trim()))
        .collect();
    let examples: Vec<(&str, String)> =
        examples().into_iter().map(|(name, bytes)| (name, hex(&bytes))).collect();
    assert_eq!(documented.len(), examples.len());
    for ((name, bytes), (name_documented, bytes_documented)) in examples.iter().zip(&documented) {
        assert_eq!((*name, bytes.as_str()), (*name_documented, *bytes_documented));
    }
}

#[test]
fn what_contradicts_itself_is_malformed() {
    let malformed: [&[u8]; 16] = [
        &[kind::PACKET],
        &[kind::PACKET, 0],
        &[kind::PACKET, flag::LEN, 0, 0, 0x45],
        &[kind::PACKET, flag::LEN, 0, 5, 1, 2, 3, 4],
        &[kind::PACKET, flag::SAME_PATH, 0x45, 0, 0, 0, 0, 0, 0],
        &[kind::ETHERNET, flag::ORDER, 0, 0, 0, 1, 0],
        // A piece without stamp, one that reaches past its packet, one of an empty packet.
        &[kind::PIECE, 0, 0, 0, 0, 1, 0, 0, 0, 9, 0, 0, 0x45],
        &[kind::PIECE, flag::ORDER, 0, 0, 0, 1, 0, 0, 0, 9, 0, 9, 0x45],
        &[kind::PIECE, flag::ORDER, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0x45],
        // A report without entries, one with too many; the same for NACKs, and empty and wrapping ranges.
        &[kind::REPORT, 0, 0],
        &[kind::REPORT, 0, 65],
        &[kind::NACK, 0, 1, 1, 0],
        &[kind::NACK, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0],
        &[kind::NACK, 0, 1, 1, 1, 255, 255, 255, 255, 255, 255, 255, 255, 0, 1],
        &[kind::PATH_STATE, 0, 1, 4],
        &[kind::PROCESSOR_INFO, 0, 0, 2, 1],
    ];
    for bytes in malformed {
        assert_eq!(parse(bytes, 0), Err(DropReason::FrameMalformed), "{bytes:02x?}");
    }
    assert_eq!(parse(&[1, 2, 3], 4), Err(DropReason::FrameMalformed), "behind the end");
}

#[test]
fn what_this_version_does_not_know_is_told_apart() {
    let unknown: [&[u8]; 5] = [
        &[18, 0, 1, 2, 3],
        &[127, 0, 1, 2, 3],
        &[kind::PACKET, 0x80, 0x45],
        &[kind::PACKET, flag::ETHERNET, 0x45],
        &[kind::PING, 1, 0, 0, 0, 1],
    ];
    for bytes in unknown {
        assert_eq!(parse(bytes, 0), Err(DropReason::FrameUnknown), "{bytes:02x?}");
    }
    // Extensions carry their length: what follows them is read.
    let bytes = [200, 0x55, 0, 2, 9, 9, kind::CLOSE, 0, 77];
    let frames: Vec<_> = Frames::new(&bytes).map(Result::unwrap).collect();
    let close = Frame::Close { reason: CloseReason::Other(77) };
    assert_eq!(frames, [Frame::Extension { kind: 200, body: &[9, 9] }, close]);
}

#[test]
fn nothing_is_written_that_could_not_be_read() {
    let mut out = vec![0; 70_000];
    let long = vec![1; 65_536];
    let packet = |bytes| Frame::Packet {
        head: PacketHead { bytes, ..PacketHead::default() },
        start: 0,
        body: &long[..9],
    };
    assert_eq!(packet(Some(9)).write(&mut out, 0), Some(13));
    assert_eq!(packet(Some(8)).write(&mut out, 0), None);
    assert_eq!(Frame::Packet { head: PacketHead::default(), start: 0, body: &[] }.write(&mut out, 0), None);
    let head = PieceHead { total: 10, offset: 2, ..PieceHead::default() };
    assert_eq!(Frame::Piece { head, start: 0, body: &long[..9] }.write(&mut out, 0), None);
    assert_eq!(Frame::ProcessorInfo(&long).write(&mut out, 0), None);
    assert_eq!(Frame::Extension { kind: 127, body: &[] }.write(&mut out, 0), None);
    assert_eq!(write_report(&mut out, 0, &[]), None);
    assert_eq!(write_report(&mut out, 0, &[ReportEntry::default(); ENTRIES_MAX + 1]), None);
    assert_eq!(write_nack(&mut out, 0, 0, 0, &[NackRange { first: 1, count: 0 }]), None);
    assert_eq!(write_nack(&mut out, 0, 0, 0, &[NackRange { first: u64::MAX, count: 1 }]), None);
    assert_eq!(write_nack(&mut out, 0, 0, 0, &[NackRange { first: 1, count: 1 }; RANGES_MAX + 1]), None);
    assert_eq!(Frame::Ping { id: 1 }.write(&mut out, usize::MAX), None);
    assert_eq!(write_padding(&mut out, 70_001), None);
}

#[test]
fn a_length_can_be_filled_in_later() {
    let mut out = [0; 40];
    let head = PacketHead { bytes: Some(0), tenant: Some(3), ..PacketHead::default() };
    let body_at = head.write(&mut out, 5).unwrap();
    assert_eq!(body_at, 5 + head.encoded_len());
    out[body_at..body_at + 6].fill(0x77);
    assert_eq!(PacketHead::patch_bytes(&mut out, 5, 6), Some(()));
    let (frame, next) = parse(&out, 5).unwrap().unwrap();
    let expected = PacketHead { bytes: Some(6), ..head };
    assert_eq!(frame, Frame::Packet { head: expected, start: body_at, body: &[0x77; 6] });
    assert_eq!(next, body_at + 6);
    // Not where there is no length, no head or no room.
    assert_eq!(PacketHead::patch_bytes(&mut out, body_at, 6), None);
    PacketHead::default().write(&mut out, 0).unwrap();
    assert_eq!(PacketHead::patch_bytes(&mut out, 0, 6), None);
    assert_eq!(PacketHead::patch_bytes(&mut out, 37, 6), None);
    assert_eq!(PacketHead::patch_bytes(&mut out, usize::MAX, 6), None);
}

#[test]
fn lengths_are_as_published() {
    assert_eq!(report_bytes(2), 3 + 2 * 37);
    assert_eq!(nack_bytes(2), 25);
    let all = PacketHead {
        bytes: Some(1),
        order: Some(Order::default()),
        tenant: Some(1),
        ..PacketHead::default()
    };
    assert_eq!(all.encoded_len(), PACKET_HEAD_BYTES_MAX);
    let all = PieceHead { bytes: Some(1), tenant: Some(1), ..PieceHead::default() };
    assert_eq!(all.encoded_len(), PIECE_HEAD_BYTES_MAX);
    assert_eq!(Frame::Probe { id: 0, size: 0 }.encoded_len(), PROBE_BYTES);
    // The largest report fits a datagram of any path it is likely to meet when split; one per path of 32 does.
    assert!(report_bytes(32) < 1_200);
}
