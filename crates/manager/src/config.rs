//! Configuration of the manager: one TOML file.
//!
//! ```toml
//! [manager]
//! bus = "10.9.0.1:4601"               # where units connect, an address inside the tunnel; required
//! api = "127.0.0.1:8470"              # REST; beyond loopback only with TLS
//! token-file = "manager.token"        # who may use REST; made at the first start
//! store = "/var/lib/anabranch/cluster.redb"
//! # etcd = ["http://127.0.0.1:2379"]  # in place of store: several managers, one of which leads
//! # etcd-prefix = "/anabranch"        # in front of its keys
//! # lease-seconds = 5                 # another manager leads so long after this one was cut off
//! # name = "10.9.0.1"                # how others call this manager; its bus address unless set
//! # tls-certificate = "manager.pem"   # with tls-key
//! # tls-key = "manager.key"
//! drain-ms = 1000                     # between an era in force and the next
//! dead-after-ms = 400                 # a unit that was silent so long is lost
//! blocks-per-unit = 4                 # blocks of 1,024 ports of each outside address
//! quarantine-seconds = 240            # before ports of a lost unit are used again
//! follow-load = false                 # shares follow the load that units report
//! pool = ["10.9.0.0/24"]              # units from here may connect without being enrolled; they are free until added
//! ```

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use cluster::manager::Settings;
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

/// The file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    manager: Section,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Section {
    bus: SocketAddr,
    api: Option<SocketAddr>,
    token_file: PathBuf,
    store: Option<PathBuf>,
    #[serde(default)]
    etcd: Vec<String>,
    etcd_prefix: Option<String>,
    lease_seconds: Option<u64>,
    name: Option<String>,
    tls_certificate: Option<PathBuf>,
    tls_key: Option<PathBuf>,
    drain_ms: Option<u64>,
    dead_after_ms: Option<u64>,
    blocks_per_unit: Option<usize>,
    quarantine_seconds: Option<u64>,
    #[serde(default)]
    follow_load: bool,
    #[serde(default)]
    pool: Vec<String>,
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
        let File { manager } = toml::from_str(text)?;
        let store = store(&manager, folder)?;
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
            let least = 4 * u64::from(settings.heartbeat_ms);
            ensure!(
                (least..=60_000).contains(&dead_after_ms),
                "manager.dead-after-ms: {dead_after_ms} is not within {least} to 60000: a unit whose CPU is taken \
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
        settings.follow_load = manager.follow_load;
        for text in &manager.pool {
            let net: IpNet = text.parse().map_err(|_| {
                anyhow::anyhow!("manager.pool: \"{text}\" is no network; write for example \"10.9.0.0/24\"")
            })?;
            settings.pool.push((net.addr(), net.prefix_len()));
        }
        Ok(Self { bus: manager.bus, api, token_file: folder.join(manager.token_file), store, tls, settings })
    }
}

/// The store that a file names.
fn store(manager: &Section, folder: &Path) -> anyhow::Result<StoreSettings> {
    if let (Some(path), []) = (&manager.store, &manager.etcd[..]) {
        return Ok(StoreSettings::File(folder.join(path)));
    }
    ensure!(
        manager.store.is_none() && !manager.etcd.is_empty(),
        "manager: name either store = \"cluster.redb\", for one manager, or etcd = [\"http://127.0.0.1:2379\"], for several"
    );
    let endpoint = |text: &String| {
        let text = text.trim_end_matches('/');
        let host = text.strip_prefix("http://").filter(|host| !host.is_empty() && !host.contains('/'));
        ensure!(
            host.is_some(),
            "manager.etcd: \"{text}\" is no address; write for example \"http://127.0.0.1:2379\""
        );
        Ok(text.to_owned())
    };
    let lease_s = manager.lease_seconds.unwrap_or(LEASE_S);
    ensure!((2..=60).contains(&lease_s), "manager.lease-seconds: {lease_s} is not within 2 to 60");
    let prefix = manager.etcd_prefix.as_deref().unwrap_or("/anabranch").trim_end_matches('/').to_owned();
    ensure!(!prefix.is_empty(), "manager.etcd-prefix: empty; write for example \"/anabranch\"");
    Ok(StoreSettings::Etcd(EtcdSettings {
        endpoints: manager.etcd.iter().map(endpoint).collect::<anyhow::Result<_>>()?,
        prefix,
        lease_s,
        name: manager.name.clone().unwrap_or_else(|| manager.bus.to_string()),
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
        assert!(error("etcd = [\"http://a:1\"]\n").contains("either store"));
        let etcd = |rest: &str| {
            Config::parse(
                &format!("[manager]\nbus = \"10.9.0.1:4601\"\ntoken-file = \"t\"\n{rest}"),
                Path::new("/etc/x"),
            )
        };
        assert!(format!("{:#}", etcd("").unwrap_err()).contains("either store"));
        assert!(format!("{:#}", etcd("etcd = [\"a:2379\"]\n").unwrap_err()).contains("is no address"));
        let StoreSettings::Etcd(settings) = etcd("etcd = [\"http://a:2379/\"]\n").unwrap().store else {
            panic!()
        };
        assert_eq!(
            (settings.endpoints, settings.name),
            (vec!["http://a:2379".to_owned()], "10.9.0.1:4601".to_owned())
        );
        assert!(error("pool = [\"10.0.0.0/33\"]\n").contains("pool"));
    }
}
