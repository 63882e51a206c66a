//! `anabranch demo`: two sites, three emulated links, two real gateways, real traffic, a link that falls silent; and a report.
//!
//! [`stage`] builds the network and starts the gateways, [`course`] sends the traffic and measures it where it
//! arrives, [`progress`] shows what is going on meanwhile, [`report`] says what came of it.
//! The gateways are this very program, started as `anabranch up CONFIG`: nothing is simulated but the links.

mod course;
mod progress;
mod report;
mod stage;

use std::io::Write;
use std::os::fd::AsFd;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use linux::event::{Epoll, Interest, Signal, Signals};
use testbed::Privilege;
use testbed::stop::Stop;

use course::Course;
use progress::Progress;
use report::Report;
use stage::Stage;

/// Seconds of traffic unless told otherwise.
const SECONDS: u64 = 36;
/// What a shell expects of a program ended by Ctrl-C.
const EXIT_STOPPED: u8 = 130;

const EXAMPLES: &str = "\
Example:
  anabranch demo                          about 40 seconds, then a report
  anabranch demo --seconds 120            longer, for steadier figures
  anabranch demo --json > demo.json       for programs";

/// Arguments of `anabranch demo`.
#[derive(Clone, Copy, Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Seconds of traffic, all phases together [default: 36]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(4..=86_400))]
    pub seconds: Option<u64>,
    /// Print one JSON object instead of the report, as the only thing on standard output
    #[arg(long)]
    pub json: bool,
}

/// Runs the demo. Call it before any thread exists: as an ordinary user it enters a user namespace first.
///
/// The exit code is 0 if all data arrived intact, 1 if not, 130 after Ctrl-C. Nothing is left behind in any case.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let seconds = args.seconds.unwrap_or(SECONDS);
    let privilege = testbed::gain_privilege()?;
    let stop = stop_on_signals()?;
    let mut progress = Progress::new();
    if privilege == Privilege::UserNamespace {
        progress.note(
            "Not root: everything runs in a user namespace, where the kernel takes no steering programs.",
        );
    }
    let result = perform(seconds, &stop, &mut progress);
    progress.end();
    if stop.is_raised() {
        progress.note("Stopped; everything is cleaned up.");
        return Ok(ExitCode::from(EXIT_STOPPED));
    }
    let report = result?;
    let mut out = std::io::stdout().lock();
    let text = if args.json { report.json()? } else { report.text() };
    writeln!(out, "{text}").and_then(|()| out.flush()).context("write the report to standard output")?;
    Ok(if report.intact { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn perform(seconds: u64, stop: &Stop, progress: &mut Progress) -> anyhow::Result<Report> {
    let mut stage = Stage::build(progress)?;
    stage.wait_until_joined(stop, progress)?;
    let before = stage.statuses()?;
    let (client, server) = stage.sites();
    let silence = |on| stage.silence(on);
    let course = Course {
        client,
        server,
        server_ip: stage::HUB_IP.into(),
        links: &stage::LINKS,
        silence: &silence,
        stop,
    };
    let mut loaded = None;
    let results = course.run(seconds as f64, progress, &mut || {
        loaded = Some(stage.statuses()?);
        Ok(())
    })?;
    let after = stage.statuses()?;
    stage.check_alive()?;
    progress.step("Ending the gateways");
    drop(stage);
    Ok(Report::new(seconds, &results, [&before, loaded.as_ref().unwrap_or(&after), &after]))
}

/// Ctrl-C, SIGTERM and a closed terminal raise the flag; whoever runs looks at it several times a second.
fn stop_on_signals() -> anyhow::Result<Stop> {
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
