//! Configuration of the manager: one TOML file.
//!
//! ```toml
//! [manager]
//! bus = "10.9.0.1:4601"               # where units connect, an address inside the tunnel; required
//! api = "127.0.0.1:8470"              # REST; beyond loopback only with TLS
//! token-file = "manager.token"        # who may use REST; made at the first start
//! store = "/var/lib/anabranch/cluster.redb"
//! # tls-certificate = "manager.pem"   # with tls-key
//! # tls-key = "manager.key"
//! drain-ms = 1000                     # between an era in force and the next
//! dead-after-ms = 375                 # a unit that was silent so long is lost
//! blocks-per-unit = 4                 # blocks of 1,024 ports of each outside address
//! quarantine-seconds = 240            # before ports of a lost unit are used again
//! follow-load = false                 # shares follow the load that units report
//! load-sample-seconds = 10            # a unit has to be the most loaded in three samples
//! load-pause-seconds = 60             # after buckets were moved for the load
//! # chains = "counted"                # for comparisons: "newest:1", "clock:MS", "rendezvous"; connections break
//! pool = ["10.9.0.0/24"]              # units from here may connect without being enrolled; they are free until added
//!
//! [flows]
//! replicate = false                   # data planes send copies of their flows to another one, which goes on with them if they die
//!
//! [etcd]                              # in place of store: several managers, one of which leads
//! endpoints = ["http://127.0.0.1:2379"]
//! prefix = "/anabranch"               # in front of its keys
//! lease-seconds = 5                   # another manager leads so long after this one was cut off
//! name = "manager1"                   # how others call this manager; its bus address unless set
//!
//! [scaling]                           # data planes that are started and stopped by hooks
//! pool = [{ node = 21, address = "10.9.0.21" }, 22]   # in the order in which they are started; an address enrols
//! start = "/etc/anabranch/unit"       # shell command, run in this file's folder; gets "start" and the node id
//! stop = "/etc/anabranch/unit"        # the same with "stop"
//! above-percent = 70                  # mean load of the data planes above which one is started …
//! below-percent = 30                  # … and below which one is drained and stopped
//! for-seconds = 30                    # the load has to be there for so long
//! pause-seconds = 120                 # after a change
//! start-within-seconds = 120          # who does not come in this time is given up, and the next is tried
//! least = 1                           # data planes in all
//! most = 8
//! ```

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use cluster::manager::Settings;
use cluster::scale::{PoolUnit, ScaleSettings};
use ipnet::IpNet;
use serde::Deserialize;

use crate::etcd::EtcdSettings;

/// Where REST listens unless told otherwise.
const API: &str = "127.0.0.1:8470";
/// Time of a leader's lease unless told otherwise, seconds.
const LEASE_S: u64 = 5;
/// A larger file is no configuration.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// Nanoseconds of a millisecond.
const MS: u64 = 1_000_000;
/// Least `dead-after-ms`: a few heartbeats, which come late at times.
const DEAD_AFTER_LEAST_MS: u64 = 200;

/// The file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    manager: Section,
    #[serde(default)]
    flows: FlowsSection,
    etcd: Option<EtcdSection>,
    scaling: Option<ScalingSection>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct FlowsSection {
    #[serde(default)]
    replicate: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct EtcdSection {
    endpoints: Vec<String>,
    prefix: Option<String>,
    lease_seconds: Option<u64>,
    name: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct ScalingSection {
    pool: Vec<PoolEntry>,
    start: String,
    stop: String,
    above_percent: Option<u8>,
    below_percent: Option<u8>,
    for_seconds: Option<u64>,
    pause_seconds: Option<u64>,
    start_within_seconds: Option<u64>,
    least: Option<usize>,
    most: Option<usize>,
}

/// A node id, or that and a bus address.
#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "a node id such as 21, or { node = 21, address = \"10.9.0.21\" }")]
enum PoolEntry {
    Node(u16),
    #[serde(rename_all = "kebab-case")]
    Unit {
        node: u16,
        address: IpAddr,
    },
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Section {
    bus: SocketAddr,
    api: Option<SocketAddr>,
    token_file: PathBuf,
    store: Option<PathBuf>,
    tls_certificate: Option<PathBuf>,
    tls_key: Option<PathBuf>,
    drain_ms: Option<u64>,
    dead_after_ms: Option<u64>,
    blocks_per_unit: Option<usize>,
    quarantine_seconds: Option<u64>,
    #[serde(default)]
    follow_load: bool,
    load_sample_seconds: Option<u64>,
    load_pause_seconds: Option<u64>,
    chains: Option<String>,
    #[serde(default)]
    pool: Vec<String>,
}

/// `[scaling]`: data planes that are started and stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scaling {
    /// When and which.
    pub policy: ScaleSettings,
    /// Shell command that starts a machine; it gets `start` and the node id.
    pub start: String,
    /// Shell command that stops one; it gets `stop` and the node id.
    pub stop: String,
    /// Where they are run: the configuration's folder.
    pub folder: PathBuf,
}

/// Kind and place of the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreSettings {
    /// A file of this machine: one manager.
    File(PathBuf),
    /// etcd: several managers.
    Etcd(EtcdSettings),
}

/// Configuration of a manager.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where units connect.
    pub bus: SocketAddr,
    /// Where REST listens.
    pub api: SocketAddr,
    /// The file with the token; made when it is not there.
    pub token_file: PathBuf,
    /// The store.
    pub store: StoreSettings,
    /// Certificate chain and private key, PEM.
    pub tls: Option<(PathBuf, PathBuf)>,
    /// Times and sizes.
    pub settings: Settings,
    /// Data planes that are started and stopped by hooks.
    pub scaling: Option<Scaling>,
}

impl Config {
    /// Reads a file. Paths in it are relative to it.
    ///
    /// # Errors
    /// With the line, the key and what would be right.
    pub fn load(path: &Path) -> anyhow::Result<Self> {
        let shown = path.display();
        let size = std::fs::metadata(path).with_context(|| format!("{shown}: cannot be read"))?.len();
        ensure!(size <= FILE_BYTES_MAX, "{shown}: larger than 1 MiB, which is no configuration");
        let text = std::fs::read_to_string(path).with_context(|| format!("{shown}: cannot be read"))?;
        Self::parse(&text, path.parent().unwrap_or(Path::new("."))).with_context(|| format!("{shown}"))
    }

    /// Reads the text of a file that lies in `folder`.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn parse(text: &str, folder: &Path) -> anyhow::Result<Self> {
        let File { manager, flows, etcd, scaling } = toml::from_str(text)?;
        let scaling = scaling.map(|section| scaling_of(section, folder)).transpose()?;
        let store = store(&manager, etcd, folder)?;
        let api = match manager.api {
            Some(api) => api,
            None => API.parse()?,
        };
        let tls = match (manager.tls_certificate, manager.tls_key) {
            (Some(certificate), Some(key)) => Some((folder.join(certificate), folder.join(key))),
            (None, None) => None,
            _ => bail!("manager: tls-certificate and tls-key belong together"),
        };
        if !api.ip().is_loopback() && tls.is_none() {
            bail!(
                "manager.api: {api} is not on loopback, and the token would go over the network in the clear; \
                 set tls-certificate and tls-key, or use 127.0.0.1"
            );
        }
        let mut settings = Settings::default();
        if let Some(drain_ms) = manager.drain_ms {
            ensure!(drain_ms <= 600_000, "manager.drain-ms: {drain_ms} is more than ten minutes");
            settings.drain_ns = drain_ms * MS;
        }
        if let Some(dead_after_ms) = manager.dead_after_ms {
            ensure!(
                (DEAD_AFTER_LEAST_MS..=60_000).contains(&dead_after_ms),
                "manager.dead-after-ms: {dead_after_ms} is not within {DEAD_AFTER_LEAST_MS} to 60000: a unit whose CPU is taken \
                 away for a moment must live"
            );
            settings.dead_after_ns = dead_after_ms * MS;
        }
        if let Some(blocks) = manager.blocks_per_unit {
            ensure!((1..=63).contains(&blocks), "manager.blocks-per-unit: {blocks} is not within 1 to 63");
            settings.blocks_per_unit = blocks;
        }
        if let Some(seconds) = manager.quarantine_seconds {
            ensure!(seconds <= 86_400, "manager.quarantine-seconds: {seconds} is more than a day");
            settings.quarantine_ns = seconds * 1_000 * MS;
        }
        settings.replicate = flows.replicate;
        settings.follow_load = manager.follow_load;
        for (key, given, time_ns) in [
            ("load-sample-seconds", manager.load_sample_seconds, &mut settings.load_sample_ns),
            ("load-pause-seconds", manager.load_pause_seconds, &mut settings.load_pause_ns),
        ] {
            let Some(seconds) = given else { continue };
            ensure!((1..=3_600).contains(&seconds), "manager.{key}: {seconds} is not within 1 to 3600");
            *time_ns = seconds * 1_000 * MS;
        }
        if let Some(chains) = manager.chains {
            settings.chains = chains.parse().map_err(|wrong| anyhow::anyhow!("manager.chains: {wrong}"))?;
        }
        for text in &manager.pool {
            let net: IpNet = text.parse().map_err(|_| {
                anyhow::anyhow!("manager.pool: \"{text}\" is no network; write for example \"10.9.0.0/24\"")
            })?;
            settings.pool.push((net.addr(), net.prefix_len()));
        }
        let token_file = folder.join(manager.token_file);
        Ok(Self { bus: manager.bus, api, token_file, store, tls, settings, scaling })
    }
}

/// The policy of `[scaling]`.
fn scaling_of(section: ScalingSection, folder: &Path) -> anyhow::Result<Scaling> {
    let (above, below) = (section.above_percent.unwrap_or(70), section.below_percent.unwrap_or(30));
    ensure!(
        above <= 100 && below < above,
        "scaling: below-percent {below} has to be less than above-percent {above}, and that at most 100"
    );
    ensure!(
        !section.pool.is_empty(),
        "scaling.pool: name the node ids that may be started and stopped, such as [21, 22]"
    );
    let unit = |entry: PoolEntry| match entry {
        PoolEntry::Node(node) => PoolUnit { node, address: None },
        PoolEntry::Unit { node, address } => PoolUnit { node, address: Some(address) },
    };
    let pool: Vec<PoolUnit> = section.pool.into_iter().map(unit).collect();
    let wrong = pool.iter().find(|unit| unit.node >= steering::units::NODES_MAX);
    if let Some(PoolUnit { node, .. }) = wrong {
        bail!("scaling.pool: {node} is no node id; 0 to {} are possible", steering::units::NODES_MAX - 1);
    }
    let seconds = |key: &str, given: Option<u64>, usual: u64| {
        let seconds = given.unwrap_or(usual);
        ensure!(seconds <= 86_400, "scaling.{key}: {seconds} is more than a day");
        Ok(seconds * 1_000 * MS)
    };
    let (least, most) =
        (section.least.unwrap_or(1), section.most.unwrap_or(usize::from(steering::units::NODES_MAX)));
    ensure!(least <= most, "scaling: least {least} is more than most {most}");
    Ok(Scaling {
        policy: ScaleSettings {
            pool,
            above_percent: above,
            below_percent: below,
            for_ns: seconds("for-seconds", section.for_seconds, 30)?,
            pause_ns: seconds("pause-seconds", section.pause_seconds, 120)?,
            start_within_ns: seconds("start-within-seconds", section.start_within_seconds, 120)?,
            least,
            most,
        },
        start: section.start,
        stop: section.stop,
        folder: if folder.as_os_str().is_empty() { PathBuf::from(".") } else { folder.to_owned() },
    })
}

/// The store that a file names.
fn store(manager: &Section, etcd: Option<EtcdSection>, folder: &Path) -> anyhow::Result<StoreSettings> {
    let etcd = match (&manager.store, etcd) {
        (Some(path), None) => return Ok(StoreSettings::File(folder.join(path))),
        (None, Some(etcd)) => etcd,
        _ => bail!(
            "manager: name either store = \"cluster.redb\", for one manager, or [etcd] with endpoints = \
             [\"http://127.0.0.1:2379\"], for several"
        ),
    };
    ensure!(!etcd.endpoints.is_empty(), "etcd.endpoints: name one, for example \"http://127.0.0.1:2379\"");
    let endpoint = |text: &String| {
        let text = text.trim_end_matches('/');
        let host = text.strip_prefix("http://").filter(|host| !host.is_empty() && !host.contains('/'));
        ensure!(
            host.is_some(),
            "etcd.endpoints: \"{text}\" is no address; write for example \"http://127.0.0.1:2379\""
        );
        Ok(text.to_owned())
    };
    let lease_s = etcd.lease_seconds.unwrap_or(LEASE_S);
    ensure!((2..=60).contains(&lease_s), "etcd.lease-seconds: {lease_s} is not within 2 to 60");
    let prefix = etcd.prefix.as_deref().unwrap_or("/anabranch").trim_end_matches('/').to_owned();
    ensure!(!prefix.is_empty(), "etcd.prefix: empty; write for example \"/anabranch\"");
    Ok(StoreSettings::Etcd(EtcdSettings {
        endpoints: etcd.endpoints.iter().map(endpoint).collect::<anyhow::Result<_>>()?,
        prefix,
        lease_s,
        name: etcd.name.unwrap_or_else(|| manager.bus.to_string()),
    }))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    const LEAST: &str = "[manager]\nbus = \"10.9.0.1:4601\"\ntoken-file = \"t\"\nstore = \"s\"\n";

    fn error(rest: &str) -> String {
        format!("{:#}", Config::parse(&format!("{LEAST}{rest}"), Path::new("/etc/x")).unwrap_err())
    }

    #[test]
    fn paths_are_relative_to_the_file_and_the_rest_has_defaults() {
        let config = Config::parse(LEAST, Path::new("/etc/x")).unwrap();
        assert_eq!(
            (config.token_file, config.store),
            ("/etc/x/t".into(), StoreSettings::File("/etc/x/s".into()))
        );
        assert_eq!((config.api, config.settings), (API.parse().unwrap(), Settings::default()));
    }

    #[test]
    fn faults_say_what_would_be_right() {
        assert!(error("api = \"192.0.2.1:80\"\n").contains("not on loopback"));
        assert!(error("tls-key = \"k\"\n").contains("belong together"));
        assert!(error("dead-after-ms = 60\n").contains("not within 200 to 60000"));
        assert!(error("blocks-per-unit = 64\n").contains("1 to 63"));
        assert!(error("colour = 1\n").contains("unknown field `colour`"));
        let scaling = |rest: &str| error(&format!("[scaling]\nstart = \"a\"\nstop = \"b\"\n{rest}"));
        assert!(scaling("pool = []\n").contains("name the node ids"));
        assert!(scaling("pool = [4096]\n").contains("0 to 4095"));
        assert!(
            scaling("pool = [1]\nabove-percent = 20\n")
                .contains("below-percent 30 has to be less than above-percent 20")
        );
        assert!(scaling("pool = [1]\nleast = 3\nmost = 2\n").contains("least 3 is more than most 2"));
        let text = format!(
            "{LEAST}[scaling]\nstart = \"a\"\nstop = \"b\"\npool = [7, {{ node = 8, address = \"10.9.0.8\" }}]\n"
        );
        let pool = Config::parse(&text, Path::new("/etc/x")).unwrap().scaling.unwrap().policy.pool;
        let eighth = PoolUnit { node: 8, address: Some("10.9.0.8".parse().unwrap()) };
        assert_eq!(pool, [PoolUnit { node: 7, address: None }, eighth]);
        assert!(scaling("pool = [{ node = 8 }]\n").contains("a node id such as 21, or"));
        assert!(error("[etcd]\nendpoints = [\"http://a:1\"]\n").contains("either store"));
        let etcd = |rest: &str| {
            Config::parse(
                &format!("[manager]\nbus = \"10.9.0.1:4601\"\ntoken-file = \"t\"\n{rest}"),
                Path::new("/etc/x"),
            )
        };
        assert!(format!("{:#}", etcd("").unwrap_err()).contains("either store"));
        assert!(
            format!("{:#}", etcd("[etcd]\nendpoints = [\"a:2379\"]\n").unwrap_err())
                .contains("is no address")
        );
        let StoreSettings::Etcd(settings) = etcd("[etcd]\nendpoints = [\"http://a:2379/\"]\n").unwrap().store
        else {
            panic!()
        };
        assert_eq!(
            (settings.endpoints, settings.name),
            (vec!["http://a:2379".to_owned()], "10.9.0.1:4601".to_owned())
        );
        assert!(error("chains = \"newest:9\"\n").contains("manager.chains"));
        assert!(error("pool = [\"10.0.0.0/33\"]\n").contains("pool"));
    }
}
