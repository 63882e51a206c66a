//! A packet as it was read, once, before anything changes it.

use packet::icmp::Kind;
use packet::{DropReason, FlowKey, Ingress, IpHeader};

use super::{Frame, Origin};
use crate::spec::UDP;
use crate::tcp::Segment;

const UDP_HEADER_BYTES: usize = 8;

/// Facts about one packet on its way through the services.
#[derive(Clone, Copy)]
pub(super) struct PacketContext {
    /// The time, ns.
    pub now_ns: u64,
    /// By what it came in.
    pub ingress: Ingress,
    /// Tenant of what comes in there.
    pub tenant: u16,
    /// How it reached this core.
    pub origin: Origin,
    /// Its transport checksum covers the pseudo-header only.
    pub partial: bool,
    /// Its IP header.
    pub header: IpHeader,
    /// Its flow key.
    pub key: FlowKey,
}

impl PacketContext {
    /// Reads the header of a packet whose key is known.
    ///
    /// # Errors
    /// [`DropReason::IpMalformed`].
    #[inline]
    pub fn read(
        now_ns: u64,
        frame: &Frame<'_>,
        key: FlowKey,
        tenant: u16,
        origin: Origin,
    ) -> Result<Self, DropReason> {
        let header = IpHeader::parse(frame.packet())?;
        let partial = frame.offload.needs_csum_at(header.header_bytes);
        Ok(Self { now_ns, ingress: frame.ingress, tenant, origin, partial, header, key })
    }

    /// Whether it is a fragment without the start of the upper layer: what stands there is no header.
    #[inline]
    pub fn is_later_fragment(&self) -> bool {
        self.header.fragment.is_some_and(|fragment| fragment.offset > 0)
    }

    /// Kind of the ICMP message, if it is one.
    #[inline]
    pub fn icmp(&self, frame: &Frame<'_>) -> Option<Kind> {
        if self.is_later_fragment() {
            return None;
        }
        Kind::of(&self.header, self.header.payload(frame.packet()))
    }

    /// Payload of the UDP datagram as far as it is in this packet; empty where there is none.
    #[inline]
    pub fn datagram<'a>(&self, frame: &'a Frame<'_>) -> &'a [u8] {
        if self.header.protocol != UDP || self.is_later_fragment() {
            return &[];
        }
        self.header.payload(frame.packet()).get(UDP_HEADER_BYTES..).unwrap_or_default()
    }

    /// The TCP segment.
    ///
    /// # Errors
    /// [`DropReason::TcpInvalid`]: none can be read.
    #[inline]
    pub fn segment(&self, frame: &Frame<'_>) -> Result<Segment, DropReason> {
        if self.is_later_fragment() {
            return Err(DropReason::TcpInvalid);
        }
        Segment::of(self.header.payload(frame.packet())).ok_or(DropReason::TcpInvalid)
    }
}
