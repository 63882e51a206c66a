//! Frames: a length before each message, and a buffer that cuts a stream into them.

use super::{Message, wire};
use crate::codec::{CodecError, Reader, Writer};

/// The one version of the messages. A peer of another one is refused.
pub const VERSION: u8 = 2;

/// Longest frame without its length: two tables of 65,536 buckets with chains of four, and every list at its limit.
pub const FRAME_BYTES_MAX: usize = 2 << 20;

/// Bytes of the length.
const LENGTH_BYTES: usize = 4;

/// Why bytes are no message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The length is more than a frame may have, or nothing.
    #[error("a frame of {0} bytes: 2 to {FRAME_BYTES_MAX} are possible")]
    Length(usize),
    /// Another version of the protocol.
    #[error("version {0} of the cluster protocol; this program speaks {VERSION}")]
    Version(u8),
    /// No message has this number.
    #[error("a message of unknown kind {0}")]
    Kind(u8),
    /// The body is wrong.
    #[error("a malformed message: {0}")]
    Body(CodecError),
}

/// Appends a message as a frame.
pub(super) fn write(message: &Message, out: &mut Vec<u8>) -> Result<(), FrameError> {
    let start = out.len();
    let mut writer = Writer::new(out);
    writer.u32(0);
    writer.u8(VERSION);
    wire::put(&mut writer, message);
    let bytes = out.len() - start - LENGTH_BYTES;
    if bytes > FRAME_BYTES_MAX {
        out.truncate(start);
        return Err(FrameError::Length(bytes));
    }
    if let Some(length) = out.get_mut(start..start + LENGTH_BYTES) {
        length.copy_from_slice(&(bytes as u32).to_be_bytes());
    }
    Ok(())
}

/// Reads version, kind and body.
pub(super) fn read(frame: &[u8]) -> Result<Message, FrameError> {
    let [version, kind, body @ ..] = frame else { return Err(FrameError::Length(frame.len())) };
    if *version != VERSION {
        return Err(FrameError::Version(*version));
    }
    let mut reader = Reader::new(body);
    let message = wire::take(*kind, &mut reader)?.ok_or(FrameError::Kind(*kind))?;
    reader.end()?;
    Ok(message)
}

/// Bytes of a stream that are not a whole message yet. Holds what has come, at most one frame and what was read with it.
#[derive(Debug, Default)]
pub struct Frames {
    bytes: Vec<u8>,
    /// Where the next frame begins.
    at: usize,
}

impl Frames {
    /// Takes what was read from the stream.
    pub fn push(&mut self, bytes: &[u8]) {
        // What was taken out makes room, once for a push and not for a message.
        self.bytes.drain(..self.at);
        self.at = 0;
        self.bytes.extend_from_slice(bytes);
    }

    /// The next message; `None`: more bytes are needed.
    ///
    /// # Errors
    /// When the stream holds something else: it cannot go on then.
    pub fn take(&mut self) -> Result<Option<Message>, FrameError> {
        let left = self.bytes.get(self.at..).unwrap_or(&[]);
        let Some((length, rest)) = left.split_first_chunk::<LENGTH_BYTES>() else { return Ok(None) };
        let bytes = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
        if !(2..=FRAME_BYTES_MAX).contains(&bytes) {
            return Err(FrameError::Length(bytes));
        }
        let Some(frame) = rest.get(..bytes) else { return Ok(None) };
        let message = read(frame)?;
        self.at += LENGTH_BYTES + bytes;
        Ok(Some(message))
    }
}
