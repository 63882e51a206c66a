//! Why a packet ended early: one enum for the product, so that a counter, a log line, a test and the
//! documentation all use the same word.
//!
//! To add a reason, add one line to the list below. Its number is used in memory only and may change between
//! versions; its name is what operators see and must not.

use std::fmt;

macro_rules! drop_reasons {
    ($($variant:ident $name:literal $doc:literal,)+) => {
        /// The reason for which a packet, datagram or frame was dropped.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u8)]
        pub enum DropReason {
            $(#[doc = $doc] $variant,)+
        }

        impl DropReason {
            /// Every reason, in the order of the numbers.
            pub const ALL: &'static [DropReason] = &[$(DropReason::$variant,)+];

            /// How many reasons there are.
            pub const COUNT: usize = Self::ALL.len();

            /// The name operators see: lower case, words joined by `-`. Stable.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(DropReason::$variant => $name,)+
                }
            }

            /// One line of documentation.
            #[must_use]
            pub const fn doc(self) -> &'static str {
                match self {
                    $(DropReason::$variant => $doc,)+
                }
            }
        }
    };
}

drop_reasons! {
    // a datagram from the Internet, in the order of the checks
    TooShort "too-short" "A datagram shorter than the header of its kind.",
    BadVersion "bad-version" "A datagram of a protocol version that is not spoken here.",
    UnknownType "unknown-type" "A datagram of an unknown kind.",
    UnknownIndex "unknown-index" "A receiver index that names no session of this node.",
    CoreOutOfRange "core-out-of-range" "A sending or receiving core beyond what the handshake agreed on.",
    AuthFailed "auth-failed" "A datagram that does not open under its lane's key.",
    Replayed "replayed" "A counter that was already received.",
    TooOld "too-old" "A counter that is behind the replay window.",
    // the handshake
    HandshakeMac "handshake-mac" "A handshake message whose first MAC is wrong: the sender does not know our public key.",
    HandshakeCookie "handshake-cookie" "Under load, a handshake message without a valid cookie.",
    HandshakeUnknownPeer "handshake-unknown-peer" "A handshake of a public key that is not configured.",
    HandshakeReplayed "handshake-replayed" "A handshake whose timestamp is not newer than the last one of its peer.",
    HandshakeRate "handshake-rate" "A handshake beyond the rate that its source or this node allows.",
    HandshakeMalformed "handshake-malformed" "A handshake message whose layout or payload cannot be read.",
    HandshakeSteering "handshake-steering" "A handshake of a peer that wants, or does not accept, another way to address cores than this side.",
    HandshakeEthernet "handshake-ethernet" "A handshake of a peer that carries Ethernet frames where this side does not, or the other way round.",
    HandshakeFailed "handshake-failed" "A handshake message that fails its cryptography.",
    // frames in an opened datagram
    FrameMalformed "frame-malformed" "An inner frame whose lengths or fields are wrong.",
    FrameUnknown "frame-unknown" "An inner frame of an unknown kind.",
    FrameBudget "frame-budget" "A control frame beyond what one datagram, or a bond within some time, may ask for; or about what was never sent.",
    CleartextRefused "cleartext-refused" "Unencrypted data where the configuration does not allow it.",
    // a datagram from another unit of the cluster
    BusTooShort "bus-too-short" "A datagram of another unit that ends before its headers or its Ethernet header do.",
    BusVersion "bus-version" "A datagram of another unit in a version or type that is not spoken here.",
    BusUnknownHandoff "bus-unknown-handoff" "A datagram of another unit whose handoff or hook is unknown here.",
    BusMalformed "bus-malformed" "A datagram of another unit whose fields contradict each other.",
    BusTtlExpired "bus-ttl-expired" "A packet that was sent on between the units of a cluster too often.",
    // the packet itself
    IpMalformed "ip-malformed" "An IP packet whose header, lengths or extension headers are wrong.",
    SourceNotAllowed "source-not-allowed" "A packet whose source address its peer may not use.",
    NoPeer "no-peer" "A packet to a destination that no peer has.",
    NoPath "no-path" "A packet for a peer to whom no path is usable.",
    // the gateway's services, in the order they look at a packet
    TtlExpired "ttl-expired" "A packet whose time to live ran out here.",
    MartianThisNetwork "martian-this-network" "A packet from or to 0.0.0.0/8 or ::, which goes no further than its link (RFC 6890).",
    MartianLoopback "martian-loopback" "A packet from or to a loopback address, 127.0.0.0/8 or ::1.",
    MartianLinkLocal "martian-link-local" "A packet from or to 169.254.0.0/16 or fe80::/10, which no router passes on (RFC 3927, RFC 4291).",
    MartianReserved "martian-reserved" "A packet from or to 240.0.0.0/4, which nobody has (RFC 1112).",
    MartianMapped "martian-mapped" "An IPv6 packet from or to ::ffff:0:0/96, which are addresses of IPv4 (RFC 4038).",
    MartianMulticast "martian-multicast" "A packet whose source is a multicast address.",
    SourceRouted "source-routed" "A packet that names the routers it wants to go by: LSRR, SSRR, or a type 0 routing header (RFC 5095, RFC 7126).",
    BadSource "bad-source" "A source address that cannot come in here: ours, a broadcast address, a neighbor's of another interface.",
    WrongIngress "wrong-ingress" "A packet of a known flow, or an error about one, by an interface that no route to its sender leads by.",
    DirectedBroadcast "directed-broadcast" "A packet to the broadcast address of a network of ours, which no router passes on (RFC 2644).",
    RuleDrop "rule-drop" "A firewall rule drops it.",
    RuleReject "rule-reject" "A firewall rule rejects it; the sender is told.",
    DefaultDrop "default-drop" "No firewall rule allows it.",
    NoRoute "no-route" "No route to the destination; the sender is told.",
    RouteBlackhole "route-blackhole" "The route to the destination is a black hole.",
    RouteUnreachable "route-unreachable" "The route says that the destination is unreachable; the sender is told.",
    RouteProhibited "route-prohibited" "The route prohibits the destination; the sender is told.",
    NoNeighbor "no-neighbor" "The next hop's hardware address is not known.",
    NotNew "not-new" "A packet of no known flow that cannot begin one.",
    TcpInvalid "tcp-invalid" "A TCP segment that contradicts its connection's state or window.",
    IcmpNotForwarded "icmp-not-forwarded" "A redirect or source quench, which no router passes on (RFC 6633).",
    IcmpInvalid "icmp-invalid" "An ICMP error about no known flow, or one whose quote contradicts it.",
    FlowTableFull "flow-table-full" "No room for one more flow.",
    EmbryonicFull "embryonic-full" "Too many flows that never saw a reply.",
    FlowsPerClient "flows-per-client" "One client has as many flows as it may.",
    NatPortsExhausted "nat-ports-exhausted" "No free port of this core, destination and address.",
    NatNoAddress "nat-no-address" "The interface has no address that its NAT could give: no DHCP answer yet.",
    NatGone "nat-gone" "A packet of a flow whose translation does not hold any more: an address, route or rule is another now.",
    NatNoMapping "nat-no-mapping" "A packet to a translated address that no mapping expects.",
    NatUnsupported "nat-unsupported" "A protocol or option that cannot be translated.",
    NoBackend "no-backend" "A virtual server without a backend that may take the connection.",
    ServerFull "server-full" "A virtual server with as many connections as it may have.",
    FragmentsFull "fragments-full" "No room to hold one more fragment.",
    FragmentTimeout "fragment-timeout" "A fragment whose others did not arrive in time.",
    FragmentOverlap "fragment-overlap" "A fragment that overlaps or contradicts another one of its packet.",
    FragmentInvalid "fragment-invalid" "A fragment too small, too far out or of a length that cannot be.",
    UnitUnknown "unit-unknown" "A packet for or from a unit or shared interface of a cluster that is not known here.",
    UnitStandby "unit-standby" "A packet at a shared interface of a cluster that another dispatcher has now.",
    EraUnknown "era-unknown" "A packet of a bucket table that this unit of a cluster does not have.",
    PuntLimit "punt-limit" "A packet that was handed on between cores too often.",
    // Ethernet frames, in the order the switch looks at them
    EthernetMalformed "ethernet-malformed" "An Ethernet frame that is shorter than its headers, larger than the TAP device takes, or from no station.",
    EthernetNotAllowed "ethernet-not-allowed" "An Ethernet frame of or for a peer without ethernet = true, or without a TAP device here.",
    EthernetLinkLocal "ethernet-link-local" "A frame to 01:80:c2:00:00:00 to 0f (spanning tree, link aggregation, pause), which no bridge passes on.",
    EthernetLoop "ethernet-loop" "A frame of a LAN that is joined elsewhere too: this node's TAP device stands by until that ends.",
    EthernetMoves "ethernet-moves" "A frame of a station that moved between peers or the LAN too often: it stays where it was for now.",
    EthernetSameSide "ethernet-same-side" "A frame to a station on the side that it came from.",
    EthernetNoRelay "ethernet-no-relay" "A frame of a peer to a station at another peer, where frames are not passed on between peers.",
    EthernetHops "ethernet-hops" "A frame that was passed on between peers too often.",
    EthernetFlood "ethernet-flood" "A broadcast, multicast or a frame to an unknown station beyond the rate that its side may send of them.",
    // limits
    QueueFull "queue-full" "A queue reached its limit of bytes or packets.",
    CoDel "codel" "Dropped by CoDel to keep the queue's delay low.",
    ReassemblyFull "reassembly-full" "No room to reassemble one more packet from pieces.",
    ReassemblyTimeout "reassembly-timeout" "A piece whose other pieces did not arrive in time.",
    PieceOverlap "piece-overlap" "A piece that overlaps or contradicts another one of its packet.",
    PeerMemory "peer-memory" "A datagram of a lane for which its peer, or all peers together, may not make this node keep more.",
    ReorderFull "reorder-full" "No room to hold one more packet until its predecessor arrives.",
    RingFull "ring-full" "The ring to the core that owns the flow is full.",
    // output
    TunWrite "tun-write" "The TUN device refused the packet.",
    SendError "send-error" "The socket refused the datagram.",
    TooBig "too-big" "A packet that does not fit where it has to go and must not be fragmented.",
    BadOffload "bad-offload" "An offload header that contradicts its packet.",
}

impl DropReason {
    /// The reason of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<DropReason> {
        Self::ALL.iter().copied().find(|reason| reason.name() == name)
    }
}

impl fmt::Display for DropReason {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(self.name())
    }
}

impl std::error::Error for DropReason {}

/// One counter for each [`DropReason`]. Belongs to one core; counters wrap after 2^64 packets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DropCounters([u64; DropReason::COUNT]);

impl DropCounters {
    /// All zero.
    #[must_use]
    pub const fn new() -> Self {
        DropCounters([0; DropReason::COUNT])
    }

    /// Counts one packet.
    #[inline]
    pub fn add(&mut self, reason: DropReason) {
        self.add_n(reason, 1);
    }

    /// Counts `n` packets.
    #[inline]
    pub fn add_n(&mut self, reason: DropReason, n: u64) {
        if let Some(counter) = self.0.get_mut(reason as usize) {
            *counter = counter.wrapping_add(n);
        }
    }

    /// Adds all counters of another core.
    pub fn merge(&mut self, other: &DropCounters) {
        for (reason, n) in other.iter() {
            self.add_n(reason, n);
        }
    }

    /// Packets dropped for this reason.
    #[inline]
    #[must_use]
    pub fn get(&self, reason: DropReason) -> u64 {
        self.0.get(reason as usize).copied().unwrap_or(0)
    }

    /// Packets dropped for any reason.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.0.iter().fold(0, |sum, n| sum.wrapping_add(*n))
    }

    /// Every reason with its counter, zeros included, in the order of [`DropReason::ALL`].
    pub fn iter(&self) -> impl Iterator<Item = (DropReason, u64)> + '_ {
        DropReason::ALL.iter().copied().zip(self.0.iter().copied())
    }
}

impl Default for DropCounters {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn numbers_are_dense_and_names_are_kebab_case_and_unique() {
        let mut names = BTreeSet::new();
        for (index, reason) in DropReason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, index);
            let name = reason.name();
            assert!(name.chars().all(|c| c.is_ascii_lowercase() || c == '-'), "{name}");
            assert!(!name.starts_with('-') && !name.ends_with('-') && !name.contains("--"), "{name}");
            assert!(names.insert(name), "{name} is there twice");
            assert!(reason.doc().ends_with('.') && !reason.doc().contains('\n'), "{name}");
            assert_eq!(DropReason::from_name(name), Some(*reason));
            assert_eq!(reason.to_string(), name);
        }
        assert_eq!(DropReason::from_name("no-such-reason"), None);
    }

    #[test]
    fn counters_count() {
        let mut counters = DropCounters::default();
        counters.add(DropReason::CoDel);
        counters.add_n(DropReason::QueueFull, 5);
        counters.add(DropReason::QueueFull);
        assert_eq!(counters.get(DropReason::CoDel), 1);
        assert_eq!(counters.get(DropReason::QueueFull), 6);
        assert_eq!(counters.get(DropReason::TooShort), 0);
        let mut sum = counters.clone();
        sum.merge(&counters);
        assert_eq!(sum.total(), 14);
        assert_eq!(sum.iter().filter(|(_, n)| *n != 0).count(), 2);
        assert_eq!(sum.iter().count(), DropReason::COUNT);
        counters.add_n(DropReason::QueueFull, u64::MAX);
        assert_eq!(counters.get(DropReason::QueueFull), 5);
    }
}
