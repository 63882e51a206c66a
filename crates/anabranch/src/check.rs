//! `anabranch check`

use std::path::PathBuf;
use std::process::ExitCode;

use control::config::{Config, Cores, InterfaceMatch};

use crate::EXIT_CONFIGURATION;
use crate::output::{complain, print};

/// Arguments of `check`.
#[derive(clap::Args)]
#[command(after_help = "\
Example:
  anabranch check site.toml

Errors and warnings go to standard error, one a line, as FILE:LINE:COLUMN: error: KEY: what is wrong; what is right.
Exit code 0: the gateway would start with it on this host (there may be warnings). 1: there are errors.")]
pub(crate) struct Args {
    /// Configuration file
    #[arg(value_name = "CONFIG")]
    config: PathBuf,
}

/// Checks a configuration.
pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let loaded = Config::load(&args.config);
    for problem in &loaded.problems {
        complain(&problem.to_string());
    }
    let Some(config) = loaded.config else { return Ok(ExitCode::from(EXIT_CONFIGURATION)) };
    for warning in control::host_warnings(&config) {
        complain(&warning);
    }
    let refusals = control::refusals(&config);
    for refusal in &refusals {
        complain(refusal);
    }
    if !refusals.is_empty() {
        return Ok(ExitCode::from(EXIT_CONFIGURATION));
    }
    print(&format!("{}: OK: {}\n", args.config.display(), summary(&config)))?;
    Ok(ExitCode::SUCCESS)
}

fn summary(config: &Config) -> String {
    let role = match config.node.listen {
        Some(port) => format!("listens on UDP {port}"),
        None if config.peers.is_empty() => "no tunnel".to_owned(),
        None => "only dials".to_owned(),
    };
    let cores = match &config.node.cores {
        Cores::All => "all cores".to_owned(),
        Cores::Count(count) => format!("{count} cores"),
        Cores::List(list) => format!("{} cores", list.len()),
    };
    let wans: Vec<&str> = config
        .wans
        .iter()
        .map(|wan| match &wan.interface {
            InterfaceMatch::Name(text) | InterfaceMatch::Pattern(text) => text.as_str(),
        })
        .collect();
    let wans = match (wans.is_empty(), config.peers.is_empty()) {
        (false, _) => format!("WANs: {}; ", wans.join(", ")),
        (true, false) => "WANs: the host's default route; ".to_owned(),
        (true, true) => String::new(),
    };
    let peers: Vec<&str> = config.peers.iter().map(|peer| peer.name.as_str()).collect();
    let peers = match peers.len() {
        0 => "no peers".to_owned(),
        1..=8 => format!("peers: {}", peers.join(", ")),
        count => format!("{count} peers"),
    };
    let mut text =
        format!("node {} on {}, {role}, {cores}; {wans}{peers}", config.node.name, config.tun.name);
    let key = if !config.node.key_was_made {
        format!("public key {}", control::key::encode(&config.node.private_key.public()))
    } else if config.peers.is_empty() {
        String::new()
    } else {
        "a key made for each run".to_owned()
    };
    for part in [services(config), key] {
        if !part.is_empty() {
            text.push_str("; ");
            text.push_str(&part);
        }
    }
    text
}

/// Summary of everything besides the tunnel.
fn services(config: &Config) -> String {
    let all = &config.services;
    if all.is_empty() {
        return String::new();
    }
    let interfaces: Vec<&str> =
        all.interfaces.iter().map(|interface| interface.name.as_str()).take(8).collect();
    let more = if all.interfaces.len() > interfaces.len() { ", …" } else { "" };
    let mut text = format!("interfaces: {}{more}", interfaces.join(", "));
    for (number, what) in [
        (all.rules.len(), "rule"),
        (all.nats.len(), "NAT"),
        (all.forwards.len(), "forward"),
        (all.servers.len(), "virtual server"),
    ] {
        if number > 0 {
            let plural = if number == 1 { "" } else { "s" };
            text.push_str(&format!(", {number} {what}{plural}"));
        }
    }
    text
}
