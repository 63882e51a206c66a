//! The `anabranch` program: reads the command line and calls the crate that does the work.

mod backend;
mod bench;
mod check;
mod class;
mod cluster_commands;
mod demo;
mod dispatcher_commands;
mod explain;
mod genkey;
mod group;
mod health_command;
mod launch;
mod lease;
mod logging;
mod manager_command;
mod output;
mod path_command;
mod pubkey;
mod reload;
mod replay;
mod scale;
mod status;
mod stop;
mod tls_path_command;
mod traffic;
mod up;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Large tables lie in huge pages.
#[global_allocator]
static ALLOCATOR: linux::memory::HugePages = linux::memory::HugePages;

/// The configuration is wrong, or the demo's data did not arrive intact.
const EXIT_CONFIGURATION: u8 = 1;
/// The command line is wrong; clap uses the same.
const EXIT_COMMAND_LINE: u8 = 2;
/// No running gateway answers.
const EXIT_NOT_RUNNING: u8 = 3;
/// The gateway cannot start: a permission, a port or an interface is missing, or another instance runs.
const EXIT_CANNOT_START: u8 = 4;

const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  the configuration is wrong (up, check, reload, replay), a key is wrong (pubkey), data was damaged (demo), or the
     gateway refused (explain, lease, group, backend, core)
  2  the command line is wrong
  3  no running gateway answers (all commands that ask it)
  4  the gateway cannot start: missing permission, a port or interface that is taken, another instance (up); a file
     cannot be read or written (replay)

Examples:
  anabranch demo                           see it work, on this machine alone
  anabranch genkey | tee node.key | anabranch pubkey
  anabranch check site.toml && anabranch up site.toml
  anabranch status";

/// Bonds any number of Internet links into one encrypted tunnel.
#[derive(Parser)]
#[command(name = "anabranch", version, after_help = EXIT_CODES, max_term_width = 110)]
struct Cli {
    /// Log level: error, warn, info, debug, trace, or a filter such as `info,engine=debug`
    /// [default: the variable ANABRANCH_LOG, then RUST_LOG, then info]
    #[arg(long, value_name = "LEVEL", global = true)]
    log: Option<String>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Show it working: two sites, three emulated links, real traffic, a link is cut; prints a report
    Demo(demo::Args),
    /// Print a new private key
    Genkey(genkey::Args),
    /// Read a private key from standard input and print its public key
    Pubkey(pubkey::Args),
    /// Run a capture through the gateway's production loop, without interfaces
    Replay(replay::Args),
    /// Measure the engine in this process, without interfaces
    Bench(bench::Args),
    /// Run a gateway in the foreground (systemd: Type=notify)
    Up(up::Args),
    /// Check a configuration; every error names file, line and what would be right
    Check(check::Args),
    /// Show the live state of the running gateway
    Status(status::Args),
    /// Show where a packet would go, and why
    Explain(explain::Args),
    /// Tell which traffic class a flow is of, and why
    Class(class::Args),
    /// Take a WAN out, put it back, or change what it is worth
    Path(path_command::Args),
    /// Take, return and list ranges of outside ports
    Lease(lease::Args),
    /// Run the manager of a cluster
    Manager(manager_command::Args),
    /// Show and change a cluster: units come, drain and go
    Cluster(cluster_commands::Args),
    /// Change address groups live
    Group(group::Args),
    /// Drain, enable or weigh a backend of a virtual server
    Backend(backend::Args),
    /// Take a core out of work, or put it back
    Core(backend::CoreArgs),
    /// Make the running gateway read its configuration again; drops no flow
    Reload(reload::Args),
    /// Stop the running gateway in an orderly way
    Stop(stop::Args),
    /// Check backends for a running gateway, which starts this itself
    #[command(hide = true)]
    Health(health_command::Args),
    /// Carry datagrams over TCP and TLS for a running node, which starts this itself
    #[command(hide = true)]
    TlsPath(tls_path_command::Args),
    /// Start programs for a running node, which starts this itself
    #[command(hide = true)]
    Launch(launch::Args),
    /// Begin and answer connections that are checked byte by byte
    #[command(hide = true)]
    Traffic(traffic::Args),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let log = cli.log.as_deref();
    let result = match cli.command {
        Command::Demo(args) => logging::to_stderr(log, "warn").and_then(|()| demo::run(args)),
        Command::Bench(args) => bench::run(&args),
        Command::Replay(args) => logging::to_stderr(log, "warn").and_then(|()| replay::run(&args)),
        Command::Genkey(args) => genkey::run(&args),
        Command::Pubkey(args) => pubkey::run(&args),
        Command::Up(args) => up::run(args, log),
        Command::Check(args) => check::run(&args),
        Command::Status(args) => status::run(&args),
        Command::Explain(args) => explain::run(args),
        Command::Class(args) => class::run(args),
        Command::Path(args) => path_command::run(args),
        Command::Lease(args) => lease::run(args),
        Command::Manager(args) => manager_command::run(&args, log),
        Command::Cluster(args) => cluster_commands::run(&args),
        Command::Group(args) => group::run(args),
        Command::Backend(args) => backend::run(args),
        Command::Core(args) => backend::run_core(args),
        Command::Reload(args) => reload::run(&args),
        Command::Stop(args) => stop::run(&args),
        Command::Health(args) => health_command::run(&args),
        Command::TlsPath(args) => tls_path_command::run(&args),
        Command::Launch(args) => launch::run(&args),
        Command::Traffic(args) => logging::to_stderr(log, "warn").and_then(|()| traffic::run(args)),
    };
    result.unwrap_or_else(|error| {
        output::complain(&format!("anabranch: {error:#}"));
        ExitCode::from(EXIT_CANNOT_START)
    })
}

/// Whose rights a helper process takes, as its command line says it.
fn helper_user(text: &str) -> Result<linux::privileges::User, String> {
    linux::privileges::User::find(text).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_explains_itself_with_an_example() {
        for command in Cli::command().get_subcommands() {
            let help = command.clone().render_long_help().to_string();
            assert!(help.contains("Example"), "{} has no example:\n{help}", command.get_name());
        }
    }
}
