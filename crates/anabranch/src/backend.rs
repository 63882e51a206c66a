//! `anabranch backend` and `anabranch core`

use std::process::ExitCode;

use control::protocol::BackendWish;
use control::protocol::Request;

use crate::output::{RunningNode, print};

/// Arguments of `backend`.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  anabranch backend drain web 10.0.0.1:80      before maintenance: no new connections, live ones go on
  anabranch backend enable web 10.0.0.1:80
  anabranch backend weight web 10.0.0.1:80 3

Holds until the program ends, over reloads as well. \"drain\" says how many connections are left and how long
they may last (drain-seconds of the server or backend), each time it is called; so does \"anabranch status\".")]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// No new connections for a backend
    Drain(Which),
    /// New connections again, with the weight there was
    Enable(Which),
    /// Another weight
    Weight {
        #[command(flatten)]
        which: Which,
        /// Share relative to the other backends, 0 to 1000
        #[arg(value_parser = clap::value_parser!(u16).range(0..=1000))]
        weight: u16,
    },
}

#[derive(clap::Args)]
struct Which {
    /// Name of the virtual server
    server: String,
    /// Address of the backend, with its port where several have the same
    backend: String,
    #[command(flatten)]
    target: RunningNode,
}

/// Changes a backend.
pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let (which, wish) = match args.command {
        Command::Drain(which) => (which, BackendWish::Drain),
        Command::Enable(which) => (which, BackendWish::Enable),
        Command::Weight { which, weight } => (which, BackendWish::Weight(weight)),
    };
    let server = which.server.clone();
    let request = Request::Backend { server: which.server, backend: which.backend, wish };
    let response = match which.target.ask(request) {
        Ok(response) => response,
        Err(code) => return Ok(code),
    };
    if let Some(backend) = response.backend.filter(|_| wish == BackendWish::Drain) {
        print(&control::status::draining(&server, &backend))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Arguments of `core`.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  anabranch core drain 1       new flows go to the other cores; its own stay on it until they end
  anabranch core enable 1

\"anabranch status\" shows which buckets and flows a core has.")]
pub(crate) struct CoreArgs {
    #[command(subcommand)]
    command: CoreCommand,
}

#[derive(clap::Subcommand)]
enum CoreCommand {
    /// Take a core out of work
    Drain(WhichCore),
    /// Put it back
    Enable(WhichCore),
}

#[derive(clap::Args)]
struct WhichCore {
    /// Core id, as in status
    core: usize,
    #[command(flatten)]
    target: RunningNode,
}

/// Takes a core out of work, or puts it back.
pub(crate) fn run_core(args: CoreArgs) -> anyhow::Result<ExitCode> {
    let (which, enabled) = match args.command {
        CoreCommand::Drain(which) => (which, false),
        CoreCommand::Enable(which) => (which, true),
    };
    let request = Request::Core { core: which.core, enabled };
    Ok(which.target.ask(request).map_or_else(|code| code, |_| ExitCode::SUCCESS))
}
