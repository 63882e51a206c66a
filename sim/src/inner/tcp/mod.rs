//! A bulk TCP flow with both ends: real packets, connection set-up, CUBIC, SACK, RACK, tail-loss probes; it is not closed.

mod cubic;
mod receiver;
mod sender;

use tunnel::time::Time;

use receiver::Receiver;
pub use receiver::TcpReceived;
use sender::Sender;
pub use sender::TcpSent;

use super::{Arrived, Emit, Ends, Side};

/// Payload bytes of a segment: an MTU of 1,500 less the headers.
pub const MSS: usize = 1_460;

/// How a flow sends.
#[derive(Clone, Copy, Debug)]
pub struct TcpSpec {
    /// First segment.
    pub start: Time,
    /// No new data leaves from here on.
    pub stop: Time,
    /// Bytes to send in all; `u64::MAX` = as many as possible.
    pub bytes: u64,
    /// Leave slow start when the delay rises, as Linux does (HyStart).
    pub hystart: bool,
}

/// The flow with both ends.
pub struct TcpFlow {
    spec: TcpSpec,
    sender: Sender,
    receiver: Receiver,
}

impl TcpFlow {
    /// A flow between `ends`; the client sends.
    pub fn new(ends: Ends, spec: TcpSpec) -> Self {
        Self { spec, sender: Sender::new(ends, &spec), receiver: Receiver::new(ends.id) }
    }

    /// Statistics of the receiver so far.
    pub fn received(&self) -> &TcpReceived {
        self.receiver.stats()
    }

    /// Statistics of the sender so far.
    pub fn sent(&self) -> TcpSent {
        self.sender.stats()
    }

    /// Whether every byte arrived and was acknowledged.
    pub fn finished(&self) -> bool {
        self.sender.acknowledged() >= self.spec.bytes
    }

    /// Measures the longest gap from the last bytes that came in order.
    pub(crate) fn reset_gap(&mut self) {
        self.receiver.reset_gap();
    }

    pub(super) fn poll(&mut self, now: Time, out: &mut Vec<Emit>) -> Time {
        if now < self.spec.start {
            return self.spec.start;
        }
        if now >= self.spec.stop {
            self.sender.close();
        }
        let ack = self.receiver.poll(now, out);
        let sender = self.sender.poll(now, out);
        ack.min(sender).min(if now < self.spec.stop { self.spec.stop } else { Time::MAX })
    }

    pub(super) fn packet(&mut self, now: Time, arrived: &Arrived<'_>, out: &mut Vec<Emit>) {
        match arrived.side {
            Side::Server => self.receiver.packet(now, arrived, out),
            Side::Client => self.sender.acknowledge(now, &arrived.packet),
        }
    }
}
