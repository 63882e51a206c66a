//! Record of a flow: what is remembered of it besides its addresses.

use packet::attachment::Ingress;

/// Which way a packet of a flow goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Direction {
    /// As the packet that began the flow.
    Original = 0,
    /// The other way.
    Reply = 1,
}

impl Direction {
    /// The other one.
    #[must_use]
    pub const fn flipped(self) -> Self {
        match self {
            Self::Original => Self::Reply,
            Self::Reply => Self::Original,
        }
    }
}

/// Bits of [`Record::flags`].
pub mod flags {
    /// A packet in the reply direction was seen.
    pub const REPLIED: u16 = 1;
    /// Fragments of this flow are assembled before they are translated (row C5).
    pub const ASSEMBLE: u16 = 1 << 1;
    /// The source was translated: a port of [`super::Record::port_table`] is held.
    pub const SOURCE_NAT: u16 = 1 << 2;
    /// The destination was translated: by a virtual server or a port forward.
    pub const DEST_NAT: u16 = 1 << 3;
    /// Only one direction comes by (direct return): TCP is not checked against the other.
    pub const ONE_WAY: u16 = 1 << 4;
    /// One end is the gateway itself.
    pub const LOCAL: u16 = 1 << 5;
    /// The mapping is an endpoint-independent one: its port belongs to the mapping, not to the flow.
    pub const MAPPED: u16 = 1 << 6;
    /// TCP sequence numbers are shifted (a PROXY protocol header was inserted).
    pub const PROXY_PROTOCOL: u16 = 1 << 7;
    /// The flow was picked up in mid-stream: TCP windows are not known.
    pub const MID_STREAM: u16 = 1 << 8;
    /// Answers are looked at for QUIC's connection ids, until the handshake is over.
    pub const LEARNS_IDS: u16 = 1 << 9;
    /// TCP: the sequence numbers are those of an earlier moment; the next segment with ACK tells them.
    pub const RESYNC: u16 = 1 << 10;
    /// It was another machine's: its outside port need not be among those of this machine's rules.
    pub const INHERITED: u16 = 1 << 11;
    /// The outside port is the client's own and stands in no port table, where another remote's flow has its place.
    pub const OWN_PORT: u16 = 1 << 12;
    /// It counts as one of its client's flows.
    pub const COUNTED: u16 = 1 << 13;
}

/// The mutable part of a flow, common to all kinds: 36 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Record {
    /// IP protocol.
    pub protocol: u8,
    /// TCP: [`crate::tcp::State`] as a number. Others: 0.
    pub state: u8,
    /// See [`flags`].
    pub flags: u16,
    /// When, in the core's count of changes, the flow was decided; if that is not the present one it is decided again.
    /// 0: never is.
    pub era: u16,
    /// By what the packet came that began it, in the compact form that [`Record::ingress`] reads.
    pub in_port: u16,
    /// When the last packet came, in ticks of 2^27 ns (0.134 s) of the monotonic clock.
    pub seen: u32,
    /// Where packets of each direction leave, as the core numbers its next hops; place by [`Direction`].
    pub next_hop: [u16; 2],
    /// NAT rule + 1, or 0.
    pub nat: u16,
    /// Backend id + 1, or 0.
    pub backend: u16,
    /// Which port table its port is from, as [`crate::nat`] numbers them.
    pub port_table: u8,
    /// TCP window scales: low four bits of the original direction, high four of the reply; 15 = none offered.
    pub scale: u8,
    /// Firewall rule that allowed it + 1, or 0 for the default.
    pub rule: u16,
    /// TCP: highest sequence number + length sent, place by [`Direction`].
    pub tcp_end: [u32; 2],
    /// TCP: largest window that this direction's receiver advertised, unscaled as on the wire.
    pub tcp_window: [u16; 2],
}

const _: () = assert!(size_of::<Record>() == 36);

impl Record {
    /// By what the packet came that began the flow.
    #[must_use]
    pub const fn ingress(&self) -> Ingress {
        Ingress::from_compact(self.in_port)
    }
}
