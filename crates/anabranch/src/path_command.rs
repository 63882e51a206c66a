//! `anabranch path`: changes of WANs while the gateway runs.

use std::process::ExitCode;

use control::protocol::{Request, WanWish};

use crate::output::RunningNode;

/// Arguments of `path`.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  anabranch path off wan1              before its modem is unplugged: flows go on over the others
  anabranch path on wan1
  anabranch path set wan1 tier=1       a backup from now on
  anabranch path set lte cost=5 'rate-max=20 Mbit/s' 'latency-max=80 ms'
  anabranch path reset wan1            as the file says

WAN is the interface of a [[wan]], or the pattern of one with match. Keys and values are those of
[[wan]]: tier, cost, direction, latency-max, loss-max, hops-max, rate-max, receive-rate-max,
quota, quota-day, schedule, locations. What is changed holds until the program ends, over reloads as well, and the
file stays as it is. \"anabranch status\" shows each WAN and its paths.")]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Do not use a WAN any more
    Off(Which),
    /// Use it again
    On(Which),
    /// Change what it is worth
    Set {
        /// Interface or pattern of its section
        wan: String,
        /// Keys of the section and their values
        #[arg(required = true, value_name = "KEY=VALUE", value_parser = key_and_value)]
        values: Vec<(String, String)>,
        #[command(flatten)]
        target: RunningNode,
    },
    /// Its worth is what the file says
    Reset(Which),
}

#[derive(clap::Args)]
struct Which {
    /// Interface or pattern of its section
    wan: String,
    #[command(flatten)]
    target: RunningNode,
}

fn key_and_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.trim().is_empty() => Ok((key.trim().to_owned(), value.trim().to_owned())),
        _ => Err("write KEY=VALUE, for example tier=1".to_owned()),
    }
}

/// Changes a WAN.
pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let (wan, target, wish) = match args.command {
        Command::Off(which) => (which.wan, which.target, WanWish::Off),
        Command::On(which) => (which.wan, which.target, WanWish::On),
        Command::Set { wan, values, target } => (wan, target, WanWish::Set(values)),
        Command::Reset(which) => (which.wan, which.target, WanWish::Reset),
    };
    Ok(target.ask(Request::Path { wan, wish }).map_or_else(|code| code, |_| ExitCode::SUCCESS))
}
