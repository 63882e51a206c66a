//! Three services of one cluster, and the connections through each: a firewall, address translation, virtual servers.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use testbed::cluster::{CLIENTS, LAN, SERVERS};
use testbed::hash_balancer::{VIRTUAL, VirtualPorts};
use testbed::topology::Node;
use testbed::traffic::churn::{Churn, client, server};

/// TCP and UDP port of servers and backends.
const PORT: u16 = 7_000;
/// Port of the virtual servers.
const LISTEN: u16 = 8_000;
/// Ports of nftables' virtual servers.
pub(super) const PORTS: VirtualPorts = VirtualPorts { listen: LISTEN, backend: PORT };
/// Names of the services, in the order in which they have addresses.
pub(super) const NAMES: [&str; 3] = ["nat", "firewall", "virtual-server"];

/// Connections to begin, of all services together.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(super) struct Load {
    /// Short connections begun each second
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub(super) short_rate: u32,
    /// Long connections open at all times
    #[arg(long, value_name = "N", default_value_t = 1_100)]
    pub(super) long: usize,
    /// Mean of the exponential life times of long connections and of associations, seconds
    #[arg(long, value_name = "S", default_value_t = 15)]
    pub(super) long_life: u64,
    /// Pauses between the data of a long connection are so many times as long as 100 to 500 ms
    #[arg(long, value_name = "N", default_value_t = 6)]
    pub(super) pauses: u32,
    /// UDP associations at all times
    #[arg(long, value_name = "N", default_value_t = 90)]
    pub(super) udp: usize,
}

/// Sections of data planes.
pub(super) fn data_plane_sections() -> String {
    format!(
        "[[nat]]\nout = \"wan\"\nfrom = [\"{}/32\"]\n\
         [[rule]]\nname = \"no strangers\"\naction = \"drop\"\nfrom = \"wan\"\n{}{}",
        CLIENTS[0],
        virtual_server("tcp", "none"),
        virtual_server("udp", "address-and-port")
    )
}

/// Sections of dispatchers: where backends see their clients' own addresses, answers are found by them.
pub(super) fn dispatcher_sections() -> String {
    virtual_server("tcp", "none")
}

fn virtual_server(protocol: &str, source: &str) -> String {
    format!(
        "[[virtual-server]]\nlisten = \"{protocol} {LAN}:{LISTEN}\"\nsource = \"{source}\"\n\
         backends = [\"{}:{PORT}\", \"{}:{PORT}\"]\n",
        SERVERS[2], SERVERS[3]
    )
}

/// Connections through each service, in the order of [`NAMES`]. `nftables`: the virtual servers are that network's.
pub(super) fn start(
    (inside, outside): (&Node, &Node),
    load: &Load,
    seed: u64,
    nftables: bool,
) -> anyhow::Result<Vec<Churn>> {
    let virtual_server = if nftables { VIRTUAL } else { LAN };
    let at = |address, port| SocketAddr::new(IpAddr::V4(address), port);
    let ways = [
        (at(SERVERS[0], PORT), &SERVERS[..1]),
        (at(SERVERS[1], PORT), &SERVERS[1..2]),
        (at(virtual_server, LISTEN), &SERVERS[2..]),
    ];
    let mut traffic = Vec::new();
    for (place, (to, servers)) in ways.into_iter().enumerate() {
        let listen = servers.iter().map(|server| server::start(Some(outside), at(*server, PORT)));
        let servers = listen.collect::<anyhow::Result<_>>()?;
        let life = Some(Duration::from_secs(load.long_life));
        let options = client::Options {
            sources: vec![IpAddr::V4(CLIENTS[place])],
            short_per_second: share(load.short_rate as usize, place) as u32,
            long: share(load.long, place),
            long_life: life,
            pauses: load.pauses,
            udp: share(load.udp, place),
            udp_life: life,
            ..client::Options::new(to, seed.wrapping_add(place as u64))
        };
        traffic.push(Churn { client: client::start(Some(inside), options)?, servers });
    }
    Ok(traffic)
}

/// A third; what is left over goes to the first ones.
fn share(all: usize, place: usize) -> usize {
    all / NAMES.len() + usize::from(place < all % NAMES.len())
}
