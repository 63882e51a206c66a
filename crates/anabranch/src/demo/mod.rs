//! `anabranch demo`: two sites, three emulated links, two real gateways, real traffic, a link that falls silent; and a report.
//!
//! [`sites`] builds the network and starts the gateways, [`mod@run`] sends the traffic and measures it where it
//! arrives, [`progress`] shows what is going on meanwhile, [`report`] says what came of it.
//! The gateways are this very program, started as `anabranch up CONFIG`: nothing is simulated but the links.
//!
//! `anabranch demo --gateway` shows the other half of the program; it is in [`gateway`]. `anabranch demo --cluster` shows many
//! machines behind one interface; it is in [`cluster`].

mod cluster;
mod gateway;
pub(crate) mod progress;
mod report;
mod run;
mod sites;

use std::io::Write;
use std::os::fd::AsFd;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use linux::event::{Epoll, Interest, Signal, Signals};
use testbed::Privilege;
use testbed::stop::Stop;

use progress::Progress;
use report::Report;
use run::DemoRun;
use sites::Sites;

/// Seconds of traffic unless told otherwise.
const SECONDS: u64 = 36;
/// Exit code that a shell expects of a program ended by Ctrl-C.
const EXIT_STOPPED: u8 = 130;

const EXAMPLES: &str = "\
Example:
  anabranch demo                          about 40 seconds, then a report
  anabranch demo --gateway                NAT, virtual servers, cores: about 25 seconds, then a report
  anabranch demo --cluster                machines come and go under thousands of connections: about 55 seconds
  anabranch demo --seconds 120            longer, for steadier figures
  anabranch demo --json > demo.json       for programs

With --gateway the exit code is 0 only if nothing broke that should not: a connection may end because its own backend died,
a request may be tried again until the gateway knows of that death, and nothing else may fail.";

/// Arguments of `anabranch demo`.
#[derive(Clone, Copy, Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Show NAT, virtual servers and the firewall instead of the bond: HTTP, DNS and TCP through one gateway while a backend
    /// dies, a core is taken away and the configuration is read again
    #[arg(long)]
    pub gateway: bool,
    /// Show many machines behind one interface instead: a manager, two dispatchers and four data planes; connections go on while
    /// data planes come, drain and change their share
    #[arg(long, conflicts_with = "gateway")]
    pub cluster: bool,
    /// Seconds of traffic, all phases together [default: 36, with --gateway 20, with --cluster 40]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(4..=86_400))]
    pub seconds: Option<u64>,
    /// Print one JSON object instead of the report, as the only thing on standard output
    #[arg(long)]
    pub json: bool,
}

/// Runs the demo. Call it before any thread exists: as an ordinary user it enters a user namespace first.
///
/// The exit code is 0 if all data arrived intact and nothing broke, 1 if not, 130 after Ctrl-C. Nothing is left behind in any case.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let default = match args {
        Args { cluster: true, .. } => cluster::SECONDS,
        Args { gateway: true, .. } => gateway::SECONDS,
        _ => SECONDS,
    };
    let seconds = args.seconds.unwrap_or(default);
    let privilege = testbed::gain_privilege()?;
    let stop = stop_on_signals()?;
    let mut progress = Progress::new();
    if privilege == Privilege::UserNamespace {
        progress.note(
            "Not root: everything runs in a user namespace, where the kernel takes no steering programs.",
        );
    }
    let result = if args.cluster {
        cluster::perform(seconds, args.json, &stop, &mut progress)
    } else if args.gateway {
        gateway::perform(seconds, args.json, privilege, &stop, &mut progress)
    } else {
        perform(seconds, args.json, &stop, &mut progress)
    };
    progress.end();
    if stop.is_raised() {
        progress.note("Stopped; everything is cleaned up.");
        return Ok(ExitCode::from(EXIT_STOPPED));
    }
    let (text, good) = result?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "{text}").and_then(|()| out.flush()).context("write the report to standard output")?;
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The report as text or JSON, and whether all data arrived intact.
fn perform(seconds: u64, json: bool, stop: &Stop, progress: &mut Progress) -> anyhow::Result<(String, bool)> {
    let mut sites = Sites::build(progress)?;
    sites.wait_until_joined(stop, progress)?;
    let before = sites.statuses()?;
    let (client, server) = sites.sites();
    let silence = |on| sites.silence(on);
    let run = DemoRun {
        client,
        server,
        server_ip: sites::HUB_IP.into(),
        links: &sites::LINKS,
        silence: &silence,
        stop,
    };
    let mut loaded = None;
    let results = run.run(seconds as f64, progress, &mut || {
        loaded = Some(sites.statuses()?);
        Ok(())
    })?;
    let after = sites.statuses()?;
    sites.check_alive()?;
    progress.step("Ending the gateways");
    drop(sites);
    let report = Report::new(seconds, &results, [&before, loaded.as_ref().unwrap_or(&after), &after]);
    Ok((if json { report.json()? } else { report.text() }, report.intact))
}

/// Ctrl-C, SIGTERM and a closed terminal raise the flag; whoever runs looks at it several times a second.
pub(crate) fn stop_on_signals() -> anyhow::Result<Stop> {
    let signals =
        Signals::new(&[Signal::Interrupt, Signal::Terminate, Signal::HangUp]).context("receive signals")?;
    let epoll = Epoll::new().context("wait for signals")?;
    epoll.add(signals.as_fd(), 0, Interest::Read).context("wait for signals")?;
    let stop = Stop::new();
    let flag = stop.clone();
    let wait = move || {
        let mut ready = Vec::new();
        while epoll.wait(&mut ready, Some(Duration::from_secs(3_600))).is_ok() {
            if matches!(signals.next(), Ok(Some(_))) {
                flag.raise();
            }
        }
    };
    std::thread::Builder::new().name("signals".into()).spawn(wait).context("start a thread")?;
    Ok(stop)
}
