//! `anabranch cluster health`, `takeover` and `release`: this machine's part in a cluster, by its own control socket. Whoever
//! decides which dispatcher has the addresses (keepalived, BIRD, FRR) calls them; no manager is needed.

use std::process::{Command, ExitCode, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use control::protocol::{Request, Response};

use crate::EXIT_CONFIGURATION;
use crate::output::{RunningNode, complain, print, print_json};

/// Arguments of `health`.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  anabranch cluster health                                 once: exit code 0 if this machine can do its part
  anabranch cluster health --watch --up 'birdc enable shared' --down 'birdc disable shared'

Fit is a machine whose gateway answers in time, that takes part in the cluster, and that reaches a data plane. The
manager need not be there. --watch looks on and on, and runs a command at the first look and whenever that changes.
Exit code 1: not fit; it says why. 3: no gateway runs.
etc/keepalived.conf and etc/bird.conf are whole examples.")]
pub(crate) struct HealthArgs {
    /// Look again and again
    #[arg(long)]
    watch: bool,
    /// Pause between two looks, milliseconds
    #[arg(long, value_name = "MS", default_value_t = 200, value_parser = clap::value_parser!(u64).range(10..=60_000))]
    every: u64,
    /// A gateway that has not answered for so long is not fit, milliseconds
    #[arg(long, value_name = "MS", default_value_t = 2_000, value_parser = clap::value_parser!(u64).range(100..=30_000))]
    timeout: u64,
    /// Shell command for when this machine is fit
    #[arg(long, value_name = "COMMAND", requires = "watch")]
    up: Option<String>,
    /// Shell command for when it is not
    #[arg(long, value_name = "COMMAND", requires = "watch")]
    down: Option<String>,
    #[command(flatten)]
    target: RunningNode,
}

/// Looks at this machine.
pub(crate) fn health(args: &HealthArgs) -> anyhow::Result<ExitCode> {
    if !args.watch {
        return Ok(match look(args) {
            Ok(()) => {
                print("fit\n")?;
                ExitCode::SUCCESS
            }
            Err((code, why)) => {
                complain(&format!("anabranch: not fit: {why}"));
                ExitCode::from(code)
            }
        });
    }
    let mut told = None;
    loop {
        let verdict = look(args);
        let fit = verdict.is_ok();
        if told != Some(fit) {
            match &verdict {
                Ok(()) => complain("fit"),
                Err((_, why)) => complain(&format!("not fit: {why}")),
            }
            let hook = if fit { &args.up } else { &args.down };
            // One that failed is tried again at the next look.
            told = run_hook(hook.as_deref()).then_some(fit);
        }
        std::thread::sleep(Duration::from_millis(args.every));
    }
}

/// Whether the hook did its work; none always does.
fn run_hook(hook: Option<&str>) -> bool {
    let Some(hook) = hook else { return true };
    match Command::new("sh").args(["-c", hook]).stdin(Stdio::null()).status() {
        Ok(status) if status.success() => true,
        Ok(status) => {
            complain(&format!("anabranch: {hook}: {status}; trying again"));
            false
        }
        Err(error) => {
            complain(&format!("anabranch: {hook}: {error}; trying again"));
            false
        }
    }
}

/// Whether this machine is fit; else the exit code and the reason.
fn look(args: &HealthArgs) -> Result<(), (u8, String)> {
    let patience = Duration::from_millis(args.timeout);
    let answer = match ask(&args.target).recv_timeout(patience) {
        Ok(answer) => answer?,
        Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
            return Err((
                EXIT_CONFIGURATION,
                format!("the gateway does not answer within {} ms", args.timeout),
            ));
        }
    };
    let status = answer.status.ok_or((EXIT_CONFIGURATION, "the answer has no status".to_owned()))?;
    let cluster = status.cluster.ok_or((EXIT_CONFIGURATION, "the gateway has no [cluster]".to_owned()))?;
    cluster.health().map_err(|why| (EXIT_CONFIGURATION, why))
}

/// The answer of a thread that may wait longer than we do.
fn ask(target: &RunningNode) -> Receiver<Result<Response, (u8, String)>> {
    let (sender, receiver) = channel();
    let socket = target.path().map(ToOwned::to_owned);
    std::thread::spawn(move || {
        let answer = control::control_socket::find(socket.as_deref())
            .and_then(|path| control::control_socket::call(&path, Request::Status))
            .map_err(|error| (crate::EXIT_NOT_RUNNING, error.to_string()));
        // Whoever asked may have given up.
        let _ = sender.send(answer);
    });
    receiver
}

/// Arguments of `takeover` and `release`.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  anabranch cluster takeover      this dispatcher gets the addresses of its interfaces with takeover = true, and announces them
  anabranch cluster release       it lets go of them, and stands by

For hooks of what decides which dispatcher has them, if that does not put the addresses on the devices itself. keepalived does
(virtual_ipaddress): then neither is needed. A gateway that is started stands by.")]
pub(crate) struct TakeoverArgs {
    #[command(flatten)]
    target: RunningNode,
}

/// Takes the interfaces over that other dispatchers may have, or lets go of them.
pub(crate) fn takeover(args: &TakeoverArgs, take: bool) -> ExitCode {
    match args.target.ask(Request::Takeover { take }) {
        Ok(_) => ExitCode::SUCCESS,
        Err(code) => code,
    }
}

/// Arguments of `trace`.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  anabranch cluster trace 'tcp 10.1.0.2:40000 > 10.2.0.2:443'          on the dispatcher that takes the packet in
  anabranch cluster trace 'udp 10.2.0.2:53 > 10.2.0.1:61000' --interface wan --json

A packet of this flow goes the way of its packets and asks: each data plane hands it on as it would hand on those, and the one that
would process them answers. Nothing is processed, and no flow begins.
Exit code 1: no answer. 3: no gateway runs.")]
pub(crate) struct TraceArgs {
    /// The packet: 'PROTOCOL SOURCE > DESTINATION'
    #[arg(value_name = "PACKET")]
    packet: String,
    /// Shared interface that it comes in at [default: where its source is]
    #[arg(long, value_name = "NAME")]
    interface: Option<String>,
    #[command(flatten)]
    target: RunningNode,
}

/// Asks for the way of a flow's packets.
pub(crate) fn trace(args: &TraceArgs, json: bool) -> anyhow::Result<ExitCode> {
    let request = Request::Trace { packet: args.packet.clone(), interface: args.interface.clone() };
    let response = match args.target.ask(request) {
        Ok(response) => response,
        Err(code) => return Ok(code),
    };
    let trace = response.trace.unwrap_or_default();
    if json {
        print_json(&trace)?;
    } else {
        print(&trace.text())?;
    }
    Ok(ExitCode::SUCCESS)
}
