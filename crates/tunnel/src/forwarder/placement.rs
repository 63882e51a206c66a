//! Cores for the packets of a datagram that arrived, by its header and its labels (rows T4–T9).

use packet::attachment::Placement;

use crate::frame::Frame;
use crate::frame::extension::{SEALED_CORE, SESSION_ID};
use crate::header::{Header, NOT_TOLD};
use crate::mode::SteeringMode;
use crate::session::Session;

/// Which core processes the packets of a datagram, as far as its header tells.
pub(super) fn placement_of(session: &Session, header: &Header) -> Placement {
    let tell = (session.receives == SteeringMode::ReceiverAssigned).then_some(header.sending_core);
    if header.receiving_core == NOT_TOLD { Placement::ByFlow { tell } } else { Placement::Here }
}

/// Which core processes the packets behind a label; `None` where this session has no such labels.
pub(super) fn labelled(
    session: &Session,
    header: &Header,
    frame: &Frame<'_>,
    body: &[u8],
) -> Option<Placement> {
    if header.receiving_core != NOT_TOLD {
        return None;
    }
    match (frame, session.receives, body) {
        (Frame::Extension { kind: SEALED_CORE, .. }, SteeringMode::SealedCoreId, [core]) => {
            Some(Placement::Core(*core))
        }
        (Frame::Extension { kind: SESSION_ID, .. }, SteeringMode::SessionId, id) => {
            Some(Placement::BySession(u64::from_be_bytes(id.try_into().ok()?)))
        }
        _ => None,
    }
}
