//! The upper layer's part of a translation: ports or identifier, and the checksum.

use super::bytes::{
    array_at, changed, changed_partial, delta, delta16, put, put_u16, put_u32, u16_at, u32_at,
};
use super::{crc32c, ports};
use packet::icmp::{self, Kind};
use packet::ip::{
    PROTOCOL_ICMP, PROTOCOL_ICMPV6, PROTOCOL_SCTP, PROTOCOL_TCP, PROTOCOL_UDP, PROTOCOL_UDP_LITE,
};
use packet::{DropReason, checksum};

/// Protocol number of DCCP: its checksum covers the pseudo-header (RFC 4340 §9.1).
const PROTOCOL_DCCP: u8 = 33;
/// Where SCTP has its CRC32c.
const SCTP_CHECKSUM_OFFSET: usize = 8;

/// How much of the upper layer is here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Extent {
    /// All of it.
    Whole,
    /// The start of a fragmented one: the headers.
    First,
    /// A later fragment: no headers.
    Later,
    /// The start of one that an ICMP error quotes, cut anywhere.
    Quoted,
}

/// A translation, as the upper layer sees it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Change {
    /// Delta of both addresses.
    pub addresses: u64,
    /// Of IP.
    pub version: u8,
    /// New source port. ICMP: identifier here or in the destination port.
    pub src_port: u16,
    /// New destination port.
    pub dst_port: u16,
    /// The checksum is partial.
    pub partial: bool,
    /// Extent of the upper layer that is here.
    pub extent: Extent,
}

impl Change {
    /// Changes the upper layer; leaves it as it is in case of an error.
    pub(super) fn apply(&self, upper: &mut [u8], protocol: u8) -> Result<(), DropReason> {
        if self.extent == Extent::Later {
            return Ok(());
        }
        match protocol {
            PROTOCOL_TCP => self.with_ports(upper, 16, 20, false),
            PROTOCOL_UDP | PROTOCOL_UDP_LITE => self.with_ports(upper, 6, 8, true),
            PROTOCOL_SCTP => self.sctp(upper),
            PROTOCOL_ICMP if self.version == 4 => self.icmp(upper, 0),
            PROTOCOL_ICMPV6 if self.version == 6 => self.icmp(upper, self.addresses),
            PROTOCOL_DCCP => {
                self.require(upper, 8)?;
                self.field(upper, 6, self.addresses, 0, false);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// The headers reach that far. In a quote they need not.
    fn require(&self, upper: &[u8], bytes: usize) -> Result<(), DropReason> {
        match self.extent {
            _ if upper.len() >= bytes => Ok(()),
            Extent::Quoted => Ok(()),
            Extent::First => Err(DropReason::FragmentInvalid),
            Extent::Whole | Extent::Later => Err(DropReason::IpMalformed),
        }
    }

    /// TCP, UDP and UDP-Lite. `zero_is_none`: a checksum of zero means that there is none.
    fn with_ports(
        &self,
        upper: &mut [u8],
        checksum_at: usize,
        header_bytes: usize,
        zero_is_none: bool,
    ) -> Result<(), DropReason> {
        self.require(upper, header_bytes)?;
        let Some(old) = u32_at(upper, 0) else { return Ok(()) };
        let new = ports(self.src_port, self.dst_port);
        self.field(upper, checksum_at, self.addresses, delta(old, new), zero_is_none);
        put_u32(upper, 0, new);
        Ok(())
    }

    /// The checksum field, if it is here: `pseudo` and `rest` are the deltas of what a partial checksum covers and what
    /// it does not.
    fn field(&self, upper: &mut [u8], at: usize, pseudo: u64, rest: u64, zero_is_none: bool) {
        let Some(old) = u16_at(upper, at) else { return };
        let new = match (self.partial, zero_is_none) {
            (true, _) => changed_partial(old, pseudo),
            (false, true) if old == 0 => 0,
            (false, true) => checksum::nonzero(changed(old, pseudo + rest)),
            (false, false) => changed(old, pseudo + rest),
        };
        put_u16(upper, at, new);
    }

    /// Nothing in SCTP's CRC depends on addresses.
    fn sctp(&self, upper: &mut [u8]) -> Result<(), DropReason> {
        self.require(upper, 12)?;
        let Some(old) = array_at::<4>(upper, 0) else { return Ok(()) };
        let new = ports(self.src_port, self.dst_port).to_be_bytes();
        let difference = u32::from_ne_bytes(old) ^ u32::from_ne_bytes(new);
        match self.extent {
            _ if difference == 0 => return Ok(()),
            // Nobody checks the CRC of a packet that is cut.
            Extent::Quoted => {}
            Extent::Whole if self.partial => {}
            Extent::Whole => {
                let change = crc32c::change(difference.to_ne_bytes(), upper.len());
                let change = change.ok_or(DropReason::NatUnsupported)?;
                let crc = array_at(upper, SCTP_CHECKSUM_OFFSET).map_or(0, u32::from_le_bytes);
                put(upper, SCTP_CHECKSUM_OFFSET, &(crc ^ change).to_le_bytes());
            }
            Extent::First | Extent::Later => return Err(DropReason::NatUnsupported),
        }
        put(upper, 0, &new);
        Ok(())
    }

    /// `pseudo`: delta of the pseudo-header, which only ICMPv6 has.
    fn icmp(&self, upper: &mut [u8], pseudo: u64) -> Result<(), DropReason> {
        let has_id = upper.first().is_some_and(|first| Kind::of_type(self.version, *first).has_id());
        let mut rest = 0;
        if has_id {
            self.require(upper, icmp::HEADER_BYTES)?;
            let id = if self.src_port != 0 { self.src_port } else { self.dst_port };
            if let Some(old) = u16_at(upper, icmp::ID_OFFSET) {
                rest = delta16(old, id);
                put_u16(upper, icmp::ID_OFFSET, id);
            }
        } else if pseudo != 0 {
            self.require(upper, 4)?;
        }
        // Without a pseudo-header a partial checksum is zero and stays so.
        if pseudo != 0 || !self.partial {
            self.field(upper, 2, pseudo, rest, false);
        }
        Ok(())
    }
}
