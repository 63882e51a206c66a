//! The host itself beside the gateway: how it gets its packets, its ports, tunnels and policies.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use packet::flow::FlowKey;

use crate::held_ports::HeldPorts;

/// The host itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostSpec {
    /// How it gets what is addressed to it.
    pub mode: HostMode,
    /// First and last port of its own outgoing connections. (0, 0): not told, see [`HostSpec::is_port`].
    pub ports: (u16, u16),
    /// Other ports that its programs hold, and have held for a while.
    pub held_ports: Arc<HeldPorts>,
    /// Ways by which its other devices reach services.
    pub inners: Vec<InnerSpec>,
    /// Addresses of the TUN device, by which peers know the gateway.
    pub tunnel_addresses: Vec<IpNet>,
    /// Its tunnels by protocols without ports.
    pub tunnels: Vec<HostTunnel>,
    /// Its policies of IPsec about packets that leave, the first ones first.
    pub sealed: Vec<SealedSpec>,
    /// Addresses that lead into the TUN device alone: the source, one of each IP version, of what goes to backends on the host and
    /// behind its other devices, so that the answers come by here.
    pub client_addresses: Vec<IpAddr>,
    /// Addresses that peers know: the source of what goes to backends behind them.
    pub peer_sources: Vec<IpAddr>,
    /// Addresses that other machines have too (row D2), with first and last of the ports that are theirs.
    pub others_ports: BTreeMap<IpAddr, Vec<(u16, u16)>>,
}

impl HostSpec {
    /// Whether a packet is one of those that the kernel seals: by the first policy about it.
    #[must_use]
    pub fn seals(&self, key: &FlowKey) -> bool {
        self.sealed.iter().find(|policy| policy.matches(key)).is_some_and(|policy| policy.seals)
    }

    /// Whether the host's own outgoing connections may use a port. From 32,768 on when nothing else was told: Linux's
    /// range begins there.
    #[must_use]
    pub const fn is_port(&self, port: u16) -> bool {
        match self.ports {
            (0, 0) => port >= 32_768,
            (first, last) => first <= port && port <= last,
        }
    }
}

/// Ports that are the host's alone for its own connections, where a NAT with these ports has its address: all of the kernel's range
/// `of_host`. Where that leaves the NAT less than a quarter of its own, as on hosts whose range is `1024 65535`, the lower half of what
/// both have: a program of the host that gets a port of the upper half which a flow has is led around it.
#[must_use]
pub fn kept_ports(of_host: (u16, u16), of_nat: (u16, u16)) -> (u16, u16) {
    let low = of_nat.0.max(1_024);
    let (first, last) = (low.max(of_host.0), of_nat.1.min(of_host.1));
    let (Some(steps), Some(all)) = (last.checked_sub(first), of_nat.1.checked_sub(low)) else {
        return of_host;
    };
    let (both, all) = (u32::from(steps) + 1, u32::from(all) + 1);
    if (all - both) * 4 >= all { of_host } else { (of_host.0, first + (steps >> 1)) }
}

/// A tunnel of the host by a protocol without ports (GRE, IPIP, 6in4, ESP): what comes from its other end is the host's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HostTunnel {
    /// IP protocol.
    pub protocol: u8,
    /// Address of the host; `None`: any.
    pub local: Option<IpAddr>,
    /// Address of the other end; `None`: any.
    pub remote: Option<IpAddr>,
}

/// A policy of IPsec about packets that leave, which the kernel seals or lets pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SealedSpec {
    /// Sources.
    pub from: IpNet,
    /// Destinations.
    pub to: IpNet,
    /// Protocol; `None`: all.
    pub protocol: Option<u8>,
    /// Source ports, inclusive; `None`: all.
    pub src_ports: Option<(u16, u16)>,
    /// Destination ports, inclusive; `None`: all.
    pub dst_ports: Option<(u16, u16)>,
    /// Whether such packets must not leave as they are.
    pub seals: bool,
}

impl SealedSpec {
    /// Whether it is about a packet.
    #[must_use]
    pub fn matches(&self, key: &FlowKey) -> bool {
        let within = |ports: Option<(u16, u16)>, port: u16| {
            ports.is_none_or(|(first, last)| (first..=last).contains(&port))
        };
        self.from.contains(&key.src)
            && self.to.contains(&key.dst)
            && self.protocol.is_none_or(|protocol| protocol == key.protocol)
            && within(self.src_ports, key.src_port)
            && within(self.dst_ports, key.dst_port)
    }
}

/// An endpoint of the gateway's own that leads to a service: the kernel translates there what comes for the service by devices that are
/// no interfaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InnerSpec {
    /// TCP or UDP.
    pub protocol: u8,
    /// The endpoint; its address is routed to the TUN device.
    pub inner: SocketAddr,
    /// Where the virtual server or forward listens.
    pub listen: SocketAddr,
}

/// How the host gets what comes in by an interface for itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum HostMode {
    /// By the device it came by: the host's own firewall, and programs bound to the device, work as without us. Of our rules only
    /// those that match count, not the default.
    #[default]
    Native,
    /// By the tunnel device, as everything else that the datapath decides: rules, the default and tenants hold (row R7).
    Datapath,
}
