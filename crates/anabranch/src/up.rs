//! `anabranch up`

use std::path::PathBuf;
use std::process::ExitCode;

use control::StartError;
use control::config::Config;
use control::event_loop::Options;

use crate::logging::{self, LogFile};
use crate::output::complain;
use crate::{EXIT_CANNOT_START, EXIT_CONFIGURATION};

/// Arguments of `up`.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  anabranch up /etc/anabranch/site.toml
  anabranch up site.toml --log debug --socket /tmp/site.sock

Runs until Ctrl-C, SIGTERM or \"anabranch stop\", and takes everything back it has set up: interface, routes, rules.
SIGHUP reloads the configuration and opens the log file anew. Needs root or CAP_NET_ADMIN (and CAP_BPF for steering).
Exit code 0: ended in order. 1: the configuration is wrong. 4: it cannot start.")]
pub(crate) struct Args {
    /// Configuration file
    #[arg(value_name = "CONFIG")]
    config: PathBuf,
    /// Control socket [default: node.control-socket, then /run/anabranch/NAME.sock, after the TUN interface]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
}

/// Runs a gateway.
pub(crate) fn run(args: Args, log: Option<&str>) -> anyhow::Result<ExitCode> {
    let loaded = Config::load(&args.config);
    let Some(config) = loaded.config else {
        for problem in &loaded.problems {
            complain(&problem.to_string());
        }
        return Ok(ExitCode::from(EXIT_CONFIGURATION));
    };
    let file = config.node.log_file.as_deref().map(LogFile::open);
    logging::start(log, "info", file.clone())?;
    for problem in &loaded.problems {
        tracing::warn!("{problem}");
    }
    let reopen_log = file.map(|file| Box::new(move || file.reopen()) as Box<dyn Fn() + Send>);
    match control::event_loop::run(config, Options { socket: args.socket, reopen_log }) {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(StartError::Start(reason)) => {
            // Into the log for those who look there, and to the terminal.
            tracing::error!("{reason}");
            complain(&format!("anabranch: {reason}"));
            Ok(ExitCode::from(EXIT_CANNOT_START))
        }
    }
}
