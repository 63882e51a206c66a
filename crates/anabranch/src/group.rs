//! `anabranch group`

use std::process::ExitCode;

use control::protocol::Request;
use ipnet::IpNet;

use crate::lease::net;
use crate::output::{RunningNode, print, print_json};

/// Arguments of `group`.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  anabranch group add blocked 198.51.100.7 2001:db8:7::/48
  anabranch group remove blocked 198.51.100.7
  anabranch group list

Changes a [[group]] of the configuration at once, for new flows and old ones. It holds until the program ends, over
reloads as well; write it into the configuration, or into the group's file, to keep it.")]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Add prefixes
    Add(Change),
    /// Remove prefixes
    Remove(Change),
    /// List groups
    List {
        /// Only this one
        name: Option<String>,
        /// Print JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        target: RunningNode,
    },
}

#[derive(clap::Args)]
struct Change {
    /// The group
    name: String,
    /// Addresses or prefixes
    #[arg(required = true, value_name = "PREFIX", value_parser = net)]
    prefixes: Vec<IpNet>,
    #[command(flatten)]
    target: RunningNode,
}

/// Changes or lists groups.
pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let (change, add) = match args.command {
        Command::Add(change) => (change, true),
        Command::Remove(change) => (change, false),
        Command::List { name, json, target } => {
            let response = match target.ask(Request::GroupList { name }) {
                Ok(response) => response,
                Err(code) => return Ok(code),
            };
            let groups = response.groups.unwrap_or_default();
            if json {
                print_json(&groups)?;
            } else {
                print(&control::status::groups(&groups))?;
            }
            return Ok(ExitCode::SUCCESS);
        }
    };
    let request = Request::GroupChange { name: change.name, prefixes: change.prefixes, add };
    match change.target.ask(request) {
        Ok(response) => {
            let what = if add { "added" } else { "removed" };
            print(&format!("{} {what}\n", response.changed.unwrap_or(0)))?;
            Ok(ExitCode::SUCCESS)
        }
        Err(code) => Ok(code),
    }
}
