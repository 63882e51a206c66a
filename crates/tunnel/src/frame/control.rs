//! Control frames: kinds 4–17 and the extensions.

use super::{Frame, Get, Put, kind};
use packet::drop_reason::DropReason;

/// Bytes of one entry of a report.
pub const REPORT_ENTRY_BYTES: usize = 37;
/// Bytes of one range of a NACK.
const RANGE_BYTES: usize = 10;
/// Most entries of one report: one for every path in use, with room to spare.
pub const ENTRIES_MAX: usize = 64;
/// Most ranges of one NACK.
pub const RANGES_MAX: usize = 64;

/// One path's line of a report. It speaks of the lane (path, core that gets the report, core that sends it).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReportEntry {
    /// The path.
    pub path: u8,
    /// Highest counter that arrived on the lane.
    pub highest: u64,
    /// When that counter arrived: microseconds of the receiver's clock, wraps after 71 minutes.
    pub arrival_us: u32,
    /// Microseconds between that arrival and the sending of this report.
    pub hold_us: u32,
    /// Datagrams received on the lane since its beginning.
    pub packets: u64,
    /// Bytes of UDP payload received on the lane since its beginning.
    pub bytes: u64,
    /// Datagrams the receiver holds for lost on the lane since its beginning, wraps.
    pub lost: u32,
}

/// Arrivals, path by path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Report<'a> {
    /// It speaks of lanes without a receiving core.
    pub not_told: bool,
    entries: &'a [u8],
}

impl<'a> Report<'a> {
    /// Number of entries, 1 to [`ENTRIES_MAX`].
    pub const fn len(&self) -> usize {
        self.entries.len() / REPORT_ENTRY_BYTES
    }

    /// Never true for a report that was parsed.
    pub const fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The entries in the order they were written.
    pub fn entries(&self) -> impl ExactSizeIterator<Item = ReportEntry> + use<'a> {
        self.entries.chunks_exact(REPORT_ENTRY_BYTES).map(|bytes| {
            let mut get = Get { rest: bytes };
            // The chunk has exactly an entry's length, so no read fails; an empty entry would be harmless.
            entry(&mut get).unwrap_or_default()
        })
    }
}

fn entry(get: &mut Get<'_>) -> Result<ReportEntry, DropReason> {
    Ok(ReportEntry {
        path: get.u8()?,
        highest: get.u64()?,
        arrival_us: get.u32()?,
        hold_us: get.u32()?,
        packets: get.u64()?,
        bytes: get.u64()?,
        lost: get.u32()?,
    })
}

/// Counters of a lane that are missing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NackRange {
    /// First missing counter.
    pub first: u64,
    /// How many from there on, at least 1.
    pub count: u16,
}

/// Asks to send datagrams of the lane (path, sending core, core that sends this) again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Nack<'a> {
    /// Path of the lane.
    pub path: u8,
    /// Sending core of the lane.
    pub sending_core: u8,
    /// The lane is the one without a receiving core.
    pub not_told: bool,
    ranges: &'a [u8],
}

impl<'a> Nack<'a> {
    /// The ranges in the order they were written, 1 to [`RANGES_MAX`]; none is empty and none wraps.
    pub fn ranges(&self) -> impl ExactSizeIterator<Item = NackRange> + use<'a> {
        self.ranges.chunks_exact(RANGE_BYTES).map(|bytes| {
            let mut get = Get { rest: bytes };
            range(&mut get).unwrap_or_default()
        })
    }
}

fn range(get: &mut Get<'_>) -> Result<NackRange, DropReason> {
    Ok(NackRange { first: get.u64()?, count: get.u16()? })
}

/// Why a session ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloseReason {
    /// The process ends (0).
    Shutdown,
    /// The peer was taken out of the configuration (1).
    Removed,
    /// Another session took this one's place (2).
    Replaced,
    /// A reason of a later version.
    Other(u8),
}

impl CloseReason {
    /// The reason of a byte.
    pub const fn from_byte(byte: u8) -> Self {
        match byte {
            0 => Self::Shutdown,
            1 => Self::Removed,
            2 => Self::Replaced,
            other => Self::Other(other),
        }
    }

    /// The reason's byte.
    pub const fn byte(self) -> u8 {
        match self {
            Self::Shutdown => 0,
            Self::Removed => 1,
            Self::Replaced => 2,
            Self::Other(other) => other,
        }
    }
}

/// A path as the peer sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerPathState {
    /// Send nothing over it (0).
    Down,
    /// It may be used (1).
    Up,
    /// Reports stopped; new data goes elsewhere (2).
    Suspect,
    /// The dialer took it away for good (3).
    Removed,
}

impl PeerPathState {
    /// The state's byte.
    pub const fn byte(self) -> u8 {
        match self {
            Self::Down => 0,
            Self::Up => 1,
            Self::Suspect => 2,
            Self::Removed => 3,
        }
    }
}

/// Reads a control frame whose kind and flags were taken already.
pub(super) fn parse<'a>(kind: u8, flags: u8, get: &mut Get<'a>) -> Result<Frame<'a>, DropReason> {
    if kind >= kind::EXTENSION {
        let bytes = usize::from(get.u16()?);
        return Ok(Frame::Extension { kind, body: get.take(bytes)? });
    }
    let not_told = matches!(kind, kind::REPORT | kind::NACK) && flags == LANE_NOT_TOLD;
    if flags != 0 && !not_told {
        return Err(DropReason::FrameUnknown);
    }
    Ok(match kind {
        kind::REPORT => {
            let count = usize::from(get.u8()?);
            if count == 0 || count > ENTRIES_MAX {
                return Err(DropReason::FrameMalformed);
            }
            Frame::Report(Report { not_told, entries: get.take(count * REPORT_ENTRY_BYTES)? })
        }
        kind::NACK => nack(not_told, get)?,
        kind::CHALLENGE => Frame::Challenge { token: get.array()?, path: get.u8()? },
        kind::RESPONSE => Frame::Response { token: get.array()? },
        kind::PING => Frame::Ping { id: get.u32()? },
        kind::PONG => Frame::Pong { id: get.u32()? },
        kind::PROBE => Frame::Probe { id: get.u32()?, size: get.u16()? },
        kind::PROBE_ACK => Frame::ProbeAck { id: get.u32()?, size: get.u16()? },
        kind::MARKER => Frame::Marker { stamp: get.u32()? },
        kind::ASSIGNMENT => Frame::Assignment { hash: get.u32()?, core: get.u8()? },
        kind::PROCESSOR_INFO => {
            let bytes = usize::from(get.u16()?);
            Frame::ProcessorInfo(get.take(bytes)?)
        }
        kind::CLOSE => Frame::Close { reason: CloseReason::from_byte(get.u8()?) },
        kind::PATH_STATE => {
            let path = get.u8()?;
            let state = match get.u8()? {
                0 => PeerPathState::Down,
                1 => PeerPathState::Up,
                2 => PeerPathState::Suspect,
                3 => PeerPathState::Removed,
                _ => return Err(DropReason::FrameMalformed),
            };
            Frame::PathState { path, state }
        }
        _ => return Err(DropReason::FrameUnknown),
    })
}

fn nack<'a>(not_told: bool, get: &mut Get<'a>) -> Result<Frame<'a>, DropReason> {
    let path = get.u8()?;
    let sending_core = get.u8()?;
    let count = usize::from(get.u8()?);
    if count == 0 || count > RANGES_MAX {
        return Err(DropReason::FrameMalformed);
    }
    let nack = Nack { path, sending_core, not_told, ranges: get.take(count * RANGE_BYTES)? };
    let sound = |range: NackRange| range.count > 0 && range.first.checked_add(range.count.into()).is_some();
    if !nack.ranges().all(sound) {
        return Err(DropReason::FrameMalformed);
    }
    Ok(Frame::Nack(nack))
}

/// Flag of a report or NACK that speaks of lanes without a receiving core ([`crate::header::NOT_TOLD`]).
const LANE_NOT_TOLD: u8 = 0x01;

const fn lane_flag(not_told: bool) -> u8 {
    if not_told { LANE_NOT_TOLD } else { 0 }
}

/// Makes a report or NACK that was written at the start of `frame` speak of lanes without a receiving core.
pub fn of_lane_not_told(frame: &mut [u8]) {
    if let Some(flags) = frame.get_mut(1) {
        *flags = LANE_NOT_TOLD;
    }
}

/// Bytes of a report frame with that many entries.
pub const fn report_bytes(entries: usize) -> usize {
    3 + entries * REPORT_ENTRY_BYTES
}

/// Bytes of a NACK frame with that many ranges.
pub const fn nack_bytes(ranges: usize) -> usize {
    5 + ranges * RANGE_BYTES
}

/// Writes a report at `at` and returns its end; `None` when it does not fit, is empty or has more than
/// [`ENTRIES_MAX`] entries.
pub fn write_report(out: &mut [u8], at: usize, entries: &[ReportEntry]) -> Option<usize> {
    if entries.is_empty() || entries.len() > ENTRIES_MAX {
        return None;
    }
    let end = at.checked_add(report_bytes(entries.len()))?;
    let mut put = Put::new(out.get_mut(at..end)?);
    put.bytes(&[kind::REPORT, 0, u8::try_from(entries.len()).ok()?])?;
    for entry in entries {
        put.u8(entry.path)?;
        put.u64(entry.highest)?;
        put.u32(entry.arrival_us)?;
        put.u32(entry.hold_us)?;
        put.u64(entry.packets)?;
        put.u64(entry.bytes)?;
        put.u32(entry.lost)?;
    }
    Some(end)
}

/// Writes a NACK at `at` and returns its end; `None` when it does not fit, is empty, has more than
/// [`RANGES_MAX`] ranges, or a range that is empty or wraps.
pub fn write_nack(
    out: &mut [u8],
    at: usize,
    path: u8,
    sending_core: u8,
    ranges: &[NackRange],
) -> Option<usize> {
    if ranges.is_empty() || ranges.len() > RANGES_MAX {
        return None;
    }
    let end = at.checked_add(nack_bytes(ranges.len()))?;
    let mut put = Put::new(out.get_mut(at..end)?);
    put.bytes(&[kind::NACK, 0, path, sending_core, u8::try_from(ranges.len()).ok()?])?;
    for range in ranges {
        if range.count == 0 {
            return None;
        }
        range.first.checked_add(range.count.into())?;
        put.u64(range.first)?;
        put.u16(range.count)?;
    }
    Some(end)
}

impl Frame<'_> {
    /// Bytes the frame takes on the wire.
    pub fn encoded_len(&self) -> usize {
        match self {
            Self::Packet { head, body, .. } => head.encoded_len() + body.len(),
            Self::Piece { head, body, .. } => head.encoded_len() + body.len(),
            Self::Report(report) => 3 + report.entries.len(),
            Self::Nack(nack) => 5 + nack.ranges.len(),
            Self::Challenge { .. } => 11,
            Self::Response { .. } => 10,
            Self::Ping { .. } | Self::Pong { .. } | Self::Marker { .. } => 6,
            Self::Probe { .. } | Self::ProbeAck { .. } => 8,
            Self::Assignment { .. } => 7,
            Self::ProcessorInfo(body) | Self::Extension { body, .. } => 4 + body.len(),
            Self::Close { .. } => 3,
            Self::PathState { .. } => 4,
        }
    }

    /// Writes the frame at `at` and returns its end; `None` when it does not fit or could not be read back
    /// (a body longer than its length field, say). Reports and NACKs have writers of their own.
    pub fn write(&self, out: &mut [u8], at: usize) -> Option<usize> {
        let end = at.checked_add(self.encoded_len())?;
        let mut put = Put::new(out.get_mut(at..end)?);
        match *self {
            Self::Packet { head, body, .. } => {
                whole(head.bytes, body)?;
                let body_at = head.write(out, at)?;
                out.get_mut(body_at..end)?.copy_from_slice(body);
                return Some(end);
            }
            Self::Piece { head, body, .. } => {
                whole(head.bytes, body)?;
                if usize::from(head.offset) + body.len() > usize::from(head.total) {
                    return None;
                }
                let body_at = head.write(out, at)?;
                out.get_mut(body_at..end)?.copy_from_slice(body);
                return Some(end);
            }
            Self::Report(report) => {
                put.bytes(&[kind::REPORT, lane_flag(report.not_told), u8::try_from(report.len()).ok()?])?;
                put.bytes(report.entries)?;
            }
            Self::Nack(nack) => {
                let count = u8::try_from(nack.ranges.len() / RANGE_BYTES).ok()?;
                put.bytes(&[kind::NACK, lane_flag(nack.not_told), nack.path, nack.sending_core, count])?;
                put.bytes(nack.ranges)?;
            }
            Self::Extension { kind, body } => {
                if kind < kind::EXTENSION {
                    return None;
                }
                put.bytes(&[kind, 0])?;
                put.u16(u16::try_from(body.len()).ok()?)?;
                put.bytes(body)?;
            }
            Self::ProcessorInfo(body) => {
                put.bytes(&[kind::PROCESSOR_INFO, 0])?;
                put.u16(u16::try_from(body.len()).ok()?)?;
                put.bytes(body)?;
            }
            _ => self.write_small(&mut put)?,
        }
        Some(end)
    }

    /// The frames of fixed length.
    fn write_small(&self, put: &mut Put<'_>) -> Option<()> {
        let id = |put: &mut Put<'_>, kind: u8, id: u32| {
            put.bytes(&[kind, 0])?;
            put.u32(id)
        };
        match *self {
            Self::Challenge { token, path } => {
                put.bytes(&[kind::CHALLENGE, 0])?;
                put.bytes(&token)?;
                put.u8(path)
            }
            Self::Response { token } => {
                put.bytes(&[kind::RESPONSE, 0])?;
                put.bytes(&token)
            }
            Self::Ping { id: ping } => id(put, kind::PING, ping),
            Self::Pong { id: ping } => id(put, kind::PONG, ping),
            Self::Marker { stamp } => id(put, kind::MARKER, stamp),
            Self::Probe { id: probe, size } => {
                id(put, kind::PROBE, probe)?;
                put.u16(size)
            }
            Self::ProbeAck { id: probe, size } => {
                id(put, kind::PROBE_ACK, probe)?;
                put.u16(size)
            }
            Self::Assignment { hash, core } => {
                id(put, kind::ASSIGNMENT, hash)?;
                put.u8(core)
            }
            Self::Close { reason } => put.bytes(&[kind::CLOSE, 0, reason.byte()]),
            Self::PathState { path, state } => put.bytes(&[kind::PATH_STATE, 0, path, state.byte()]),
            _ => None,
        }
    }
}

/// The body must be what the head says.
fn whole(bytes: Option<u16>, body: &[u8]) -> Option<()> {
    let fits = !body.is_empty() && bytes.is_none_or(|bytes| usize::from(bytes) == body.len());
    fits.then_some(())
}
