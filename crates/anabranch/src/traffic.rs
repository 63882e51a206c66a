//! `anabranch traffic`: the two sides of the traffic that shows whether connections survive, each in a process of its own.

use std::net::{IpAddr, SocketAddr};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use linux::event::{Epoll, Interest, Signal, Signals};
use testbed::traffic::churn::{Side, SideReport, client, server};

use crate::output;

/// Arguments of `traffic`.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  ip netns exec server anabranch traffic serve --listen 10.0.2.2:7000
  ip netns exec client anabranch traffic churn --to 10.0.2.2:7000 --seconds 60 --short-rate 1000 --long 1000 --json

Exit code 0 if no connection broke and no association was lost, 1 if not.")]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Answer clients until SIGTERM or Ctrl-C, then print the server's report as JSON
    Serve(ServeArgs),
    /// Begin connections and check them, then print the client's report
    Churn(ChurnArgs),
}

#[derive(clap::Args)]
#[command(after_help = "Example:\n  anabranch traffic serve --listen 10.0.2.2:7000")]
struct ServeArgs {
    /// Address for TCP and UDP; of one interface, so that UDP answers come from it
    #[arg(long, value_name = "ADDR")]
    listen: SocketAddr,
}

#[derive(clap::Args)]
#[command(after_help = "\
Example:
  anabranch traffic churn --to 10.0.2.2:7000 --seconds 60 --short-rate 1000 --long 1000 --udp 100

SIGHUP marks a moment: the report says how many connections were open then, and how many of those broke later.")]
struct ChurnArgs {
    /// Server, or virtual server
    #[arg(long, value_name = "ADDR")]
    to: SocketAddr,
    /// Own address; several are used in turn [default: the system's choice]
    #[arg(long, value_name = "IP")]
    from: Vec<IpAddr>,
    /// How long connections are begun, s; those open then come to their end
    #[arg(long, value_name = "N", default_value_t = 60)]
    seconds: u64,
    /// Short connections begun each second
    #[arg(long, value_name = "N", default_value_t = 100)]
    short_rate: u32,
    /// Short connections that may be open at a time
    #[arg(long, value_name = "N", default_value_t = 5_000)]
    short_open_max: usize,
    /// Long connections open at all times
    #[arg(long, value_name = "N", default_value_t = 0)]
    long: usize,
    /// Mean life time of a long connection, s [default: the whole run]
    #[arg(long, value_name = "SECONDS")]
    long_life: Option<f64>,
    /// Pauses between the data of a long connection are so many times as long as 100 to 500 ms
    #[arg(long, value_name = "N", default_value_t = 1)]
    pauses: u32,
    /// UDP associations at all times
    #[arg(long, value_name = "N", default_value_t = 0)]
    udp: usize,
    /// Pause between two datagrams of an association, ms
    #[arg(long, value_name = "MS", default_value_t = 200)]
    udp_interval: u64,
    /// Mean life time of an association, s [default: the whole run]
    #[arg(long, value_name = "SECONDS")]
    udp_life: Option<f64>,
    /// Seed of sizes, pauses, life times and data
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

/// Runs one side.
pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let heard = match args.command {
        Command::Serve(_) => &[Signal::Interrupt, Signal::Terminate][..],
        Command::Churn(_) => &[Signal::Interrupt, Signal::Terminate, Signal::HangUp],
    };
    // Before any thread exists.
    let signals = Signals::new(heard).context("receive signals")?;
    let (side, seconds, json) = match args.command {
        Command::Serve(args) => (server::start(None, args.listen)?, None, true),
        Command::Churn(args) => {
            let (seconds, json) = (args.seconds, args.json);
            (client::start(None, options(args)?)?, Some(seconds), json)
        }
    };
    wait(&signals, &side, seconds.map(Duration::from_secs))?;
    let report = side.finish()?;
    if json {
        output::print_json(&report)?;
    } else {
        output::print(&text(&report))?;
    }
    Ok(if report.is_clean() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn options(args: ChurnArgs) -> anyhow::Result<client::Options> {
    let life = |seconds: Option<f64>| {
        seconds.map(Duration::try_from_secs_f64).transpose().context("a life time is a number of seconds")
    };
    Ok(client::Options {
        sources: args.from,
        short_per_second: args.short_rate,
        short_open_max: args.short_open_max,
        long: args.long,
        long_life: life(args.long_life)?,
        pauses: args.pauses,
        udp: args.udp,
        udp_interval: Duration::from_millis(args.udp_interval),
        udp_life: life(args.udp_life)?,
        ..client::Options::new(args.to, args.seed)
    })
}

/// Waits for a signal to end, for the end of the time, or for the end of a side that failed.
fn wait(signals: &Signals, side: &Side, time: Option<Duration>) -> anyhow::Result<()> {
    const LOOK: Duration = Duration::from_millis(200);
    let epoll = Epoll::new().context("wait for signals")?;
    epoll.add(signals, 0, Interest::Read).context("wait for signals")?;
    let start = std::time::Instant::now();
    let mut ready = Vec::new();
    loop {
        let left = time.map_or(LOOK, |time| time.saturating_sub(start.elapsed()).min(LOOK));
        epoll.wait(&mut ready, Some(left)).context("wait for signals")?;
        match signals.next().context("receive signals")? {
            Some(Signal::HangUp) => {
                side.mark();
            }
            Some(_) => return Ok(()),
            None if side.has_ended() || left.is_zero() => return Ok(()),
            None => {}
        }
    }
}

fn text(report: &SideReport) -> String {
    let figures = &report.figures;
    let mut text = format!(
        "{} connections: {} completed, {} broken, {} undecided; longest gap {:.1} ms (this side late by {:.1} ms)\n\
         {} UDP associations: {} lost; {} datagrams, {} answered\n",
        figures.connections,
        figures.completed,
        figures.broken,
        report.undecided,
        figures.longest_gap_ms,
        report.longest_delay_ms,
        figures.udp_associations,
        figures.udp_lost,
        figures.udp_sent,
        figures.udp_answered,
    );
    for fault in &report.faults {
        text.push_str(fault);
        text.push('\n');
    }
    text
}
