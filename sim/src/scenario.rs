//! The usual topologies.

use std::net::{Ipv4Addr, SocketAddr};

use ipnet::{IpNet, Ipv4Net};
use packet::attachment::{BondId, Egress, InterfaceId};
use services::spec::{
    Affinity, BackendSpec, BalanceMethod, DeliveryMode, Mapping, NatMode, NatSpec, PeerSpec, ResetOnDown,
    ServerSpec, UDP,
};

use crate::link::Shape;
use crate::world::{World, site_prefix};

/// Wall clock of a site whose clock is right, ns since 1970 (some day in 2026).
pub const WALL_CLOCK_NS: u64 = 1_790_000_000_000_000_000;

/// Site 0 dials site 1 over one cable for each link, each between WANs of their own. Not started.
///
/// Cable n joins WAN n of site 0 with WAN n of site 1; both directions are alike.
pub fn pair(seed: u64, cores: (u8, u8), links: &[Shape]) -> World {
    let mut world = World::new(seed);
    let (a, b) = (world.site(cores.0, WALL_CLOCK_NS), world.site(cores.1, WALL_CLOCK_NS));
    for link in links {
        let ends = ((a, world.wan(a, 1_500)), (b, world.wan(b, 1_500)));
        world.cable(ends.0, ends.1, link.clone(), link.clone());
    }
    world.peer(a, b);
    world
}

/// Like [`pair`], but site 1 has one WAN with one address, as a hub in a data centre.
pub fn to_hub(seed: u64, cores: (u8, u8), links: &[Shape]) -> World {
    let mut world = World::new(seed);
    let (a, b) = (world.site(cores.0, WALL_CLOCK_NS), world.site(cores.1, WALL_CLOCK_NS));
    let hub = world.wan(b, 1_500);
    for link in links {
        let wan = world.wan(a, 1_500);
        world.cable((a, wan), (b, hub), link.clone(), link.clone());
    }
    world.peer(a, b);
    world
}

/// Site 0 is a hub with one WAN; every other site dials it over `links`.
pub fn star(seed: u64, hub_cores: u8, spokes: usize, spoke_cores: u8, links: &[Shape]) -> World {
    let mut world = World::new(seed);
    let hub = world.site(hub_cores, WALL_CLOCK_NS);
    let wan = world.wan(hub, 1_500);
    for _ in 0..spokes {
        let spoke = world.site(spoke_cores, WALL_CLOCK_NS);
        for link in links {
            let own = world.wan(spoke, 1_500);
            world.cable((spoke, own), (hub, wan), link.clone(), link.clone());
        }
        world.peer(spoke, hub);
    }
    world
}

/// A branch with a LAN (site 0) whose hosts reach the world through a bond and the NAT of a hub (site 1), and a virtual
/// server of the hub.
pub struct Gateways {
    /// World of both, not started.
    pub world: World,
    /// Hosts of the branch's LAN.
    pub clients: Vec<usize>,
    /// Hosts behind the hub's NAT.
    pub servers: Vec<usize>,
    /// Hosts behind the hub's virtual server.
    pub backends: Vec<usize>,
}

impl Gateways {
    /// Address that the hub's NAT gives.
    pub const OUTSIDE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
    /// Where the hub's virtual server for UDP listens.
    pub const LISTEN: (Ipv4Addr, u16) = (Ipv4Addr::new(10, 1, 0, 100), 7_000);
    /// Port of its backends.
    pub const BACKEND_PORT: u16 = 9_000;

    /// Both sites over one cable for each link, with so many cores.
    pub fn new(seed: u64, cores: (u8, u8), links: &[Shape]) -> Self {
        let mut world = pair(seed, cores, links);
        let anywhere = IpNet::from(Ipv4Net::default());
        let branch = &mut world.sites[0];
        if let Some(hub) = branch.peer_mut("site1") {
            hub.allowed_ips = vec![anywhere];
        }
        let lan = branch.add_interface("lan", net([10, 0, 1, 1], 24));
        branch.add_route(anywhere, Egress::Bond(BondId(1)), None);
        branch.control.spec.peers = vec![peer_spec(1, anywhere)];
        let hub = &mut world.sites[1];
        let wan = hub.add_interface("wan", net(Self::OUTSIDE.octets(), 24));
        let dmz = hub.add_interface("dmz", net([10, 1, 2, 1], 24));
        hub.add_route(site_prefix(0), Egress::Bond(BondId(0)), None);
        hub.add_route(net(Self::LISTEN.0.octets(), 32), Egress::Host, None);
        hub.control.spec.peers = vec![peer_spec(0, site_prefix(0))];
        hub.control.spec.nats = vec![masquerade(wan)];
        hub.control.spec.servers = vec![virtual_server()];
        let clients = (10..14).map(|last| world.neighbor(0, lan, [10, 0, 1, last])).collect();
        let servers = (80..84).map(|last| world.neighbor(1, wan, [203, 0, 113, last])).collect();
        let backends = (10..12).map(|last| world.neighbor(1, dmz, [10, 1, 2, last])).collect();
        Self { world, clients, servers, backends }
    }
}

fn net(address: [u8; 4], bits: u8) -> IpNet {
    IpNet::from(Ipv4Net::new_assert(address.into(), bits))
}

fn peer_spec(site: u16, allowed: IpNet) -> PeerSpec {
    PeerSpec { id: BondId(site), name: format!("site{site}"), tenant: 0, allowed_ips: vec![allowed] }
}

fn masquerade(out: InterfaceId) -> NatSpec {
    NatSpec {
        out: Some(out),
        port_choice: services::spec::PortChoice::default(),
        mode: NatMode::AddressAndPort,
        addresses: vec![Gateways::OUTSIDE.into()],
        from: vec![site_prefix(0)],
        from_peers: Vec::new(),
        tenants: Vec::new(),
        of_interface: false,
        mapping: Mapping::EndpointDependent,
        ports: (1_024, 65_535),
        reserved: Vec::new(),
        tables: 256,
        flows_per_client_max: 0,
        ports_per_client: 0,
        assemble_fragments: false,
    }
}

/// Keeps the client's address and port: replies hash to another core than requests.
fn virtual_server() -> ServerSpec {
    let backend = |last| BackendSpec {
        address: SocketAddr::from(([10, 1, 2, last], Gateways::BACKEND_PORT)),
        weight: 1,
        connections_max: 0,
        drain_s: 0,
    };
    ServerSpec {
        name: "echo".to_owned(),
        protocol: UDP,
        listen: Gateways::LISTEN.into(),
        backends: [10, 11].map(backend).to_vec(),
        method: BalanceMethod::RoundRobin,
        delivery: DeliveryMode::Nat,
        source: NatMode::None,
        source_addresses: Vec::new(),
        connections_max: 0,
        slow_start_s: 0,
        proxy_protocol: false,
        reset_on_down: ResetOnDown::default(),
        affinity: Affinity::default(),
    }
}
