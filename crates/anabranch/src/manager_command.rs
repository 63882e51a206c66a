//! `anabranch manager`

use std::path::PathBuf;
use std::process::ExitCode;

use manager::config::Config;

use crate::output::complain;
use crate::{EXIT_CANNOT_START, EXIT_CONFIGURATION, logging};

/// Arguments of `manager`.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  anabranch up node.toml &                  the bonds to the units
  anabranch manager manager.toml            in front of them: plans, REST, the store

The file, every key:
  [manager]
  bus = \"10.9.0.1:4601\"                     an address of this machine inside the tunnel: units connect here
  api = \"127.0.0.1:8470\"                    REST under /v1; beyond loopback only with TLS
  token-file = \"manager.token\"              who may use it; made at the first start
  store = \"/var/lib/anabranch/cluster.redb\"
  tls-certificate = \"manager.pem\"           with tls-key
  tls-key = \"manager.key\"
  drain-ms = 1000                           between an era in force and the next
  dead-after-ms = 375                       a unit that was silent so long is lost
  blocks-per-unit = 4                       blocks of 1,024 ports of each outside address
  quarantine-seconds = 240                  before ports of a lost unit are used again
  follow-load = false                       shares follow the load
  load-sample-seconds = 10                  who is the most loaded in three samples gives something away
  load-pause-seconds = 60                   between two moves of buckets for the load
  chains = \"counted\"                        for comparisons: newest:N, clock:MS, rendezvous; connections break
  pool = [\"10.9.0.0/24\"]                    units from here may connect without being enrolled
  [etcd]                                    in place of store: several managers, one of which leads
  endpoints = [\"http://127.0.0.1:2379\"]
  prefix = \"/anabranch\"                    in front of its keys
  lease-seconds = 5                         another one leads so long after a leader was cut off
  name = \"manager1\"                        how others call it; its bus address by default
  [scaling]                                 data planes that hooks start and stop
  pool = [{ node = 21, address = \"10.9.0.21\" }]   or node ids of units that are enrolled, such as 22
  start = \"/etc/anabranch/unit\"             gets \"start\" and the node id
  stop = \"/etc/anabranch/unit\"              gets \"stop\" and the node id
  above-percent = 70                        mean load above which one is started
  below-percent = 30                        and below which one is drained and stopped
  for-seconds = 30                          the load has to be there for so long
  pause-seconds = 120                       after a change
  start-within-seconds = 120                who does not come is given up
  least = 1                                 data planes in all
  most = 8

Runs until Ctrl-C or SIGTERM. Traffic does not need it: without a manager everything goes on as it is.
Exit code 0: ended in order. 1: the configuration is wrong. 4: it cannot start.")]
pub(crate) struct Args {
    /// Configuration file
    #[arg(value_name = "CONFIG")]
    config: PathBuf,
}

/// Runs a manager.
pub(crate) fn run(args: &Args, log: Option<&str>) -> anyhow::Result<ExitCode> {
    let config = match Config::load(&args.config) {
        Ok(config) => config,
        Err(error) => {
            complain(&format!("anabranch: {error:#}"));
            return Ok(ExitCode::from(EXIT_CONFIGURATION));
        }
    };
    logging::start(log, "info", None)?;
    // All its threads: whoever hears late calls others late.
    if let Err(error) = linux::affinity::schedule_current_thread(linux::affinity::Scheduling::Preempting) {
        tracing::debug!(%error, "priority stays");
    }
    match manager::run(&config, |_| {}) {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(error) => {
            complain(&format!("anabranch: {error:#}"));
            Ok(ExitCode::from(EXIT_CANNOT_START))
        }
    }
}
