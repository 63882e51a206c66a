//! The configuration file: one TOML file, kebab-case, WireGuard's words where WireGuard has them.
//!
//! [`Config::load`] reads a file and the key files it names. It does not stop at the first fault: all
//! [`Problem`]s come back together, each with its line, its key and what would be right.
//! Faults of syntax are reported alone, because everything behind them would be guesswork.
//!
//! The steps: `section` walks the TOML tables, `values` parses the little languages inside strings,
//! `read` and `services` turn the tables into the types of this module, `cross` and `services::check` look at what only
//! shows when several values are compared.
//!
//! Every key and the function that reads it, as in `etc/reference.toml` (a test compares them). A value is then found by
//! the name of its field: `git grep core_rebalance`.
//!
//! | section | keys | reader |
//! |---|---|---|
//! | `[node]` | name, private-key, private-key-file, listen, listen-tls, cores, rekey-after-seconds, location-file, state-dir, log-file, control-socket | `read::node` |
//! | `[node]` | reserved-cores, preferred-cores | `class_cores::read` |
//! | `[tun]` | name, address, mtu, route, table | `read::tun` |
//! | `[tap]` | name, mtu, bridge, relay, stations-max, stations-per-peer-max, station-age-seconds, flood-per-second-max, answer-neighbors | `tap::tap` |
//! | `[cluster]` | role, node-id, weight, bus, manager, token, token-file, hub, hub-key, hub-key-file, path-mtu | `cluster::cluster` |
//! | `[[wan]]` | interface, match, tier, rate-max, receive-rate-max, address-family, gateway, locations | `read::wan` |
//! | `[[wan]]` | cost, direction, latency-max, loss-max, hops-max, quota, quota-day, schedule | `properties::properties` |
//! | `[[class]]` | name, class, by-mark, from, to, protocol, port, dscp, server-name, tenant, peer, wan | `classes::class` |
//! | `[[peer]]` | name, public-key, preshared-key, preshared-key-file, hub, endpoints, tls-port, allowed-ips, wans, paths-per-wan-pair, sockets-per-path, spread, encryption, allow-cleartext, policy, flow, steering, accept-steering, tunnel-core, peer-tunnel-core, ask-core-first, tenant, ethernet | `read::peer` |
//! | `[[peer]]` | processor-info-file | `processor_file::read` |
//! | `[gateway]` | default-action, host, distribution, core-rebalance, log-file, health-user, keep-flows-seconds, timeouts | `services::read::gateway` |
//! | `[gateway]` | flows-max, embryonic-max, fragment-bytes-max, fragments-per-source-max, errors-per-second-max | `services::read::limits` |
//! | `[gateway]` | fragments, up-to-bytes, up-to-fragments, load-below-percent | `services::read::fragments` |
//! | `[gateway.timeouts]` | tcp-established-seconds, tcp-transitory-seconds, tcp-closed-seconds, udp-seconds, udp-unreplied-seconds, icmp-seconds, other-seconds, fragments-seconds | `services::read::timeouts` |
//! | `[[tenant]]` | name | `services::read::tenant` |
//! | `[[interface]]` | name, device, address, virtual-address, tenant, mtu, outside, tcp, shared, takeover, dispatchers, mac | `services::read::interface` |
//! | `[[route]]` | to, via, interface, tenant | `services::read::route` |
//! | `[[group]]` | name, members, file | `services::read::group` |
//! | `[[rule]]` | name, action, from, to, protocol, port, source-port, tenant | `services::read::rule` |
//! | `[[nat]]` | out, mode, addresses, from, tenants, mapping, ports, port-choice, tables, flows-per-client-max, ports-per-client, assemble-fragments | `services::balance::nat` |
//! | `[[forward]]` | listen, to, tenant, proxy-protocol | `services::balance::forward` |
//! | `[[virtual-server]]` | name, listen, backends, method, delivery, source, source-addresses, connections-max, slow-start-seconds, drain-seconds, proxy-protocol, affinity, reset-on-down | `services::balance::server` |
//! | `[[virtual-server]]` | health | `services::health::health` |
//! | `[[virtual-server]]` backends | address, weight, connections-max, drain-seconds | `services::balance::backends` |
//! | `[[virtual-server]]` health | tcp, tls, http, https, status, host, body, sni, ca-file, udp, dns, command, port, source, proxy-protocol, interval-ms, timeout-ms, fall, rise | `services::health::health` |
//! | `[[lease]]` | name, tenant, from, address, first-port, ports | `services::balance::lease` |

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read};
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use packet::attachment::BondId;
use steering::policy::Policy;
use tunnel::config::WanProperties;
use tunnel::mode::Steering;
use tunnel::{Encryption, FlowDefinition, PrivateKey};

use crate::key::{self, KeyFile};

mod class_cores;
pub mod classes;
pub mod cluster;
mod cross;
mod problem;
pub mod processor_file;
pub mod properties;
pub(crate) mod read;
mod section;
pub mod services;
pub mod tap;
#[cfg(test)]
pub(crate) mod tests;
pub mod values;

use classes::TrafficClass;
use problem::Problems;
pub use problem::{Problem, Severity};
use processor_file::ProcessorFile;
use properties::{Quota, Schedule};
use services::Services;
use steering::ownership::ClassCores;
pub use values::Endpoint;

/// Most `[[wan]]` sections.
pub const WANS_MAX: usize = 64;
/// Most locations of one `[[wan]]`.
pub const LOCATIONS_MAX: usize = 64;
/// Most `[[peer]]` sections.
pub const PEERS_MAX: usize = 4096;
/// Most endpoints of one peer.
pub const ENDPOINTS_MAX: usize = 32;
/// A larger file is not a configuration.
const FILE_BYTES_MAX: u64 = 8 << 20;
/// Nor is a larger one the list of a group.
const GROUP_BYTES_MAX: u64 = 64 << 20;
/// Where state is kept unless told otherwise.
pub const STATE_DIR: &str = "/var/lib/anabranch";
/// Where control sockets are unless told otherwise.
pub const RUNTIME_DIR: &str = "/run/anabranch";

/// A whole configuration without errors.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// The file it came from.
    pub path: PathBuf,
    /// `[node]`.
    pub node: Node,
    /// `[tun]`.
    pub tun: Tun,
    /// `[tap]`: a LAN that is bridged with those of peers.
    pub tap: Option<tap::Tap>,
    /// `[[wan]]` in file order; empty = the host's default route.
    pub wans: Vec<Wan>,
    /// `[[peer]]` in file order.
    pub peers: Vec<Peer>,
    /// Public keys by the number of their bond, also of peers that are gone: [`crate::reload`] carries them on.
    pub bonds: Vec<[u8; 32]>,
    /// `[[class]]` in file order: the first that matches a flow decides.
    pub classes: Vec<TrafficClass>,
    /// `[[interface]]` and all that belongs to it.
    pub services: Services,
    /// `[cluster]`: the machines that share interfaces with this one.
    pub cluster: Option<cluster::Cluster>,
}

/// `[node]`: this machine.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// Name for status and logs; the host name by default.
    pub name: String,
    /// X25519 private key.
    pub private_key: PrivateKey,
    /// The file has no key, which is fine without peers: this one was made for the run.
    pub key_was_made: bool,
    /// UDP port that peers dial.
    pub listen: Option<u16>,
    /// TCP port on which peers connect whose network blocks UDP.
    pub listen_tls: Option<u16>,
    /// Cores that work.
    pub cores: Cores,
    /// Those of them that are for some classes of flows.
    pub class_cores: ClassCores,
    /// Sessions get new keys after this long, 5–120 s.
    pub rekey_after_seconds: u8,
    /// File with the name of the location where this node is, for WANs that are not everywhere.
    pub location_file: Option<PathBuf>,
    /// Directory of the state file; [`STATE_DIR`] by default.
    pub state_dir: PathBuf,
    /// Log file; standard error by default.
    pub log_file: Option<PathBuf>,
    /// Control socket; `/run/anabranch/<tun name>.sock` by default.
    pub control_socket: Option<PathBuf>,
}

/// Which CPUs get a worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cores {
    /// All CPUs the process may use, at most 128.
    All,
    /// The first so many of them, 1–128.
    Count(usize),
    /// These CPU numbers; core ids follow the list.
    List(Vec<usize>),
}

/// `[tun]`: the interface to the inner side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tun {
    /// Interface name.
    pub name: String,
    /// Addresses of this node within the tunnel.
    pub addresses: Vec<IpNet>,
    /// MTU in bytes, 1280–9000.
    pub mtu: u16,
    /// Whether routes for allowed-ips are installed.
    pub routes: Routes,
}

/// Routes of allowed-ips, as with `Table` of WireGuard's tools.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Routes {
    /// Into the main table; default routes by a firewall mark and a table of their own.
    Auto,
    /// All of them into this table, without rules.
    Table(u32),
    /// None.
    Off,
}

/// `[[wan]]`: one Internet link, or all that match a pattern.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wan {
    /// Which interfaces.
    pub interface: InterfaceMatch,
    /// 0 is preferred; a higher tier is used only when no lower one works.
    pub tier: u8,
    /// Upper bound for what is sent, bits per second.
    pub rate_max_bps: Option<u64>,
    /// Upper bound for what peers send over it, bits per second.
    pub receive_rate_max_bps: Option<u64>,
    /// Address families that are used.
    pub family: Family,
    /// Gateways by family, where the main routing table does not know them.
    pub gateways: Vec<IpAddr>,
    /// Its worth.
    pub properties: WanProperties,
    /// Most that it carries in a month.
    pub quota: Option<Quota>,
    /// When it may be used.
    pub schedule: Schedule,
    /// Locations where it may be used; empty: everywhere.
    pub locations: Vec<String>,
}

/// Names one interface or many.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum InterfaceMatch {
    /// `interface = "wan0"`.
    Name(String),
    /// `match = "wwan*"`.
    Pattern(String),
}

impl InterfaceMatch {
    /// Whether an interface of this name is meant.
    #[must_use]
    pub fn covers(&self, interface: &str) -> bool {
        match self {
            Self::Name(name) => name == interface,
            Self::Pattern(pattern) => values::matches(pattern, interface),
        }
    }

    /// The text in the file.
    #[must_use]
    pub fn text(&self) -> &str {
        match self {
            Self::Name(text) | Self::Pattern(text) => text,
        }
    }
}

/// Which address families of a WAN are used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Family {
    /// Both.
    #[default]
    Any,
    /// IPv4 only.
    Ipv4,
    /// IPv6 only.
    Ipv6,
}

impl Family {
    /// Whether an address is of a family in use.
    #[must_use]
    pub fn covers(self, address: IpAddr) -> bool {
        match self {
            Self::Any => true,
            Self::Ipv4 => address.is_ipv4(),
            Self::Ipv6 => address.is_ipv6(),
        }
    }
}

/// Paths of one bond.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerPaths {
    /// Those over UDP, and how bulk is spread over all.
    pub udp: tunnel::config::PeerPaths,
    /// TCP port of its endpoints that is tried where UDP does not get through; `None` = never.
    pub tls_port: Option<u16>,
}

/// `[[peer]]`: the other end of one bond.
#[derive(Clone, Debug, PartialEq)]
pub struct Peer {
    /// Number of its bond: the same for a public key as long as the program runs.
    pub id: BondId,
    /// Name, unique.
    pub name: String,
    /// X25519 public key, unique.
    pub public_key: [u8; 32],
    /// Optional preshared key.
    pub preshared_key: Option<PrivateKey>,
    /// Its kind.
    pub kind: PeerKind,
    /// Where to dial; empty = the peer dials us.
    pub endpoints: Vec<Endpoint>,
    /// Inner prefixes behind this peer, without host bits.
    pub allowed_ips: Vec<IpNet>,
    /// Tenant of what comes from it; `None` = the shared one.
    pub tenant: Option<String>,
    /// WANs this bond may use (row T1), by interface name or pattern; `None` = all.
    pub wans: Option<Vec<String>>,
    /// Paths to it.
    pub paths: PeerPaths,
    /// Encryption of inner packets (row T11).
    pub encryption: Encryption,
    /// How a sending core chooses the receiving core (row T4).
    pub policy: Policy,
    /// Definition of a flow (row T2).
    pub flow: FlowDefinition,
    /// How cores are addressed (rows T4–T9).
    pub steering: Steering,
    /// Its cores as a file has them, whatever it tells (row T3).
    pub processor: Option<ProcessorFile>,
}

/// Kind of a peer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PeerKind {
    /// It dials the hub that this machine is a unit of, and knows it by the hub's key.
    pub hub: bool,
    /// Ethernet frames are exchanged with it (row T14).
    pub ethernet: bool,
}

/// A configuration that was read: what came out, and what is to be said about it.
#[derive(Debug)]
pub struct Loaded {
    /// The configuration; `None` when there are errors.
    pub config: Option<Config>,
    /// Errors and warnings in the order of the file.
    pub problems: Vec<Problem>,
}

impl Loaded {
    /// The configuration, or the errors.
    pub fn into_result(self) -> Result<(Config, Vec<Problem>), Vec<Problem>> {
        match self.config {
            Some(config) => Ok((config, self.problems)),
            None => Err(self.problems),
        }
    }
}

/// Surroundings of the text that [`parse`] reads.
pub(crate) struct Surroundings<'a> {
    /// File name for messages.
    pub(crate) file: &'a str,
    /// The file's directory: key files are relative to it.
    pub(crate) directory: &'a Path,
    /// Users other than the owner may read the file.
    pub(crate) exposed: bool,
    /// Name of this host.
    pub(crate) host: &'a str,
    /// Reads a key file.
    pub(crate) read_key: &'a dyn Fn(&Path) -> io::Result<KeyFile>,
    /// Reads another text file, such as the prefixes of a group.
    pub(crate) read_text: &'a dyn Fn(&Path) -> io::Result<String>,
}

impl Config {
    /// Reads and checks a file, and the key files it names. Never fails: a file that cannot be read is a [`Problem`] too.
    #[must_use]
    pub fn load(path: &Path) -> Loaded {
        let file = path.display().to_string();
        let (text, exposed) = match read_text(path, FILE_BYTES_MAX) {
            Ok(read) => read,
            Err(error) => {
                let mut problems = Problems::new(&file, "");
                let message = format!("cannot read the configuration ({error}); name an existing TOML file");
                problems.whole(Severity::Error, "", message);
                return Loaded { config: None, problems: problems.into_sorted() };
            }
        };
        let directory = path.parent().unwrap_or(Path::new(""));
        let mut loaded = Self::read(&text, &file, directory, exposed);
        if let Some(config) = &mut loaded.config {
            config.path = path.to_owned();
        }
        loaded
    }

    /// Checks the text of a file that is called `file` in messages; key files are looked for in `directory`. `exposed`: users other
    /// than the owner can read the file.
    #[must_use]
    pub fn read(text: &str, file: &str, directory: &Path, exposed: bool) -> Loaded {
        let host = rustix::system::uname();
        let surroundings = Surroundings {
            file,
            directory,
            exposed,
            host: host.nodename().to_str().unwrap_or("node"),
            read_key: &key::read_file,
            read_text: &|path| Ok(read_text(path, GROUP_BYTES_MAX)?.0),
        };
        parse(text, &surroundings)
    }

    /// Path of the control socket.
    #[must_use]
    pub fn control_socket(&self) -> PathBuf {
        self.node.control_socket.clone().unwrap_or_else(|| default_control_socket(&self.tun.name))
    }

    /// Directories that stay writable while the process runs, besides that of the control socket; others do not.
    pub(crate) fn writable_directories(&self) -> Vec<&Path> {
        let logs = [&self.node.log_file, &self.services.settings.log_file];
        let logs = logs.into_iter().flatten().map(|path| directory_of(path));
        logs.chain([self.node.state_dir.as_path(), Path::new("/var/log")]).collect()
    }

    /// Whether a peer gets the host's default route.
    #[must_use]
    pub fn has_default_route(&self) -> bool {
        self.host_prefixes().any(|net| net.prefix_len() == 0)
    }

    /// Prefixes to which the host itself may send by the tunnel: all peers' allowed-ips, but not the default routes of
    /// tenants, since the host is none of theirs.
    pub fn host_prefixes(&self) -> impl Iterator<Item = &IpNet> {
        self.peers.iter().flat_map(|peer| {
            let shared = peer.tenant.is_none();
            peer.allowed_ips.iter().filter(move |net| shared || net.prefix_len() > 0)
        })
    }

    /// Gives peers the numbers of their bonds: those in `known` keep theirs. The numbers of peers that are gone are used
    /// again only when there are no others.
    pub(crate) fn number_bonds(&mut self, known: Vec<[u8; 32]>) {
        let mut bonds = known;
        let keys: BTreeSet<[u8; 32]> = self.peers.iter().map(|peer| peer.public_key).collect();
        for peer in &mut self.peers {
            let place = bonds.iter().position(|key| *key == peer.public_key).unwrap_or_else(|| {
                let full = bonds.len() >= usize::from(BondId::MAX);
                let gone = if full { bonds.iter().position(|key| !keys.contains(key)) } else { None };
                match gone.and_then(|place| Some((place, bonds.get_mut(place)?))) {
                    Some((place, key)) => {
                        *key = peer.public_key;
                        place
                    }
                    None => {
                        bonds.push(peer.public_key);
                        bonds.len() - 1
                    }
                }
            });
            peer.id = BondId(place as u16);
        }
        self.bonds = bonds;
    }
}

/// The directory of a file: of a bare name, the present one.
pub(crate) fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(directory) if directory.as_os_str().is_empty() => Path::new("."),
        Some(directory) => directory,
        None => path,
    }
}

/// Where the control socket of the instance with this TUN interface is by default.
#[must_use]
pub fn default_control_socket(tun_name: &str) -> PathBuf {
    Path::new(RUNTIME_DIR).join(format!("{tun_name}.sock"))
}

fn read_text(path: &Path, bytes_max: u64) -> io::Result<(String, bool)> {
    let file = File::open(path)?;
    let metadata = file.metadata()?;
    if metadata.is_dir() {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    let mut text = String::new();
    if file.take(bytes_max + 1).read_to_string(&mut text)? as u64 > bytes_max {
        return Err(io::Error::other(format!("larger than {} MiB", bytes_max >> 20)));
    }
    Ok((text, metadata.mode() & 0o044 != 0))
}

/// Reads the text of a configuration.
pub(crate) fn parse(text: &str, surroundings: &Surroundings<'_>) -> Loaded {
    let mut problems = Problems::new(surroundings.file, text);
    let document = problems.document();
    let config = document.and_then(|document| read::config(&document, surroundings, &mut problems));
    let problems = problems.into_sorted();
    let config = config.filter(|_| problems.iter().all(|problem| problem.severity != Severity::Error));
    Loaded { config, problems }
}
