//! `anabranch cluster`: the manager's REST interface from a terminal.

use std::fmt::Write as _;
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};
use clap::{Subcommand, ValueEnum};
use manager::api::types::{
    Accepted, Change, ChangeStep, ClusterReport, Configuration, Duty, EventLine, IssuedToken, NewToken,
    NewUnit, Plan, Problem,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::EXIT_NOT_RUNNING;
use crate::dispatcher_commands;
use crate::output::{complain, print, print_json};

/// Pause between two looks at a change.
const LOOK: Duration = Duration::from_millis(50);
/// One request.
const PATIENCE: Duration = Duration::from_secs(10);

/// Arguments of `cluster`.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  export ANABRANCH_TOKEN_FILE=/etc/anabranch/manager.token
  anabranch cluster status
  anabranch cluster add 11 --address 10.9.0.11 --role dataplane
  anabranch cluster token 12 --role dataplane > 12.token           for [cluster] token-file there
  anabranch cluster drain 11 --remove
  anabranch cluster change 'add 12' 'drain 11' 'weight 13 2'      all with one era
  anabranch cluster config shared.json
  anabranch cluster health                                        this machine, without a manager
  anabranch cluster trace 'tcp 10.1.0.2:40000 > 10.2.0.2:443'      which data planes see it; on a dispatcher, without a manager

Changes wait until they are in force, and say what they wait for; --no-wait returns when they are stored.
A manager with TLS is reached with curl: curl --cacert ca.pem -H \"Authorization: Bearer $(cat token)\" https://…/v1/cluster")]
pub(crate) struct Args {
    /// The manager; given several times, the one of them that leads
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8470", global = true)]
    api: Vec<String>,
    /// File with the manager's token
    #[arg(long, value_name = "PATH", env = "ANABRANCH_TOKEN_FILE", global = true)]
    token_file: Option<PathBuf>,
    /// Do not wait until a change is in force
    #[arg(long, global = true)]
    no_wait: bool,
    /// Print JSON
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Eras, chains, units, second hops, and why a change waits
    Status,
    /// Have a unit take part
    Add {
        /// Node id
        node: u16,
        /// Address inside the bonds; needed once
        #[arg(long, requires = "role")]
        address: Option<IpAddr>,
        /// Duty; needed once
        #[arg(long, requires = "address")]
        role: Option<Role>,
        /// Capacity relative to other data planes' [default: what the unit says]
        #[arg(long)]
        weight: Option<u32>,
    },
    /// Give a unit no new flows; its own stay until they end, unless told otherwise
    Drain {
        /// Node id
        node: u16,
        /// Remove it when nothing is left on it
        #[arg(long)]
        remove: bool,
        /// Hand its flows to another data plane, which goes on with them: it is done in a few seconds
        #[arg(long)]
        migrate: bool,
        /// End its flows now and remove it: as `remove --force`
        #[arg(long, conflicts_with_all = ["migrate", "remove"])]
        reset: bool,
    },
    /// Remove a unit
    Remove {
        /// Node id
        node: u16,
        /// Also if it still has flows: they end
        #[arg(long)]
        force: bool,
    },
    /// Give a unit another capacity
    Weight {
        /// Node id
        node: u16,
        /// Relative to other data planes'
        weight: u32,
    },
    /// Make a token with which a unit enrols itself, once; it is printed, and nowhere else to be had
    Token {
        /// Node id
        node: u16,
        /// Duty
        #[arg(long)]
        role: Role,
        /// Capacity relative to other data planes' [default: what the unit says]
        #[arg(long)]
        weight: Option<u32>,
        /// How long it is valid
        #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..=10_080))]
        minutes: u32,
    },
    /// Several steps with one era
    Change {
        /// 'add N', 'drain N', 'drain N migrate', 'remove N', 'weight N W'
        #[arg(required = true)]
        steps: Vec<String>,
    },
    /// The change under way, and those that wait
    Plan,
    /// Lines of the manager's log
    Events,
    /// Whether this machine can do its part; for keepalived, BIRD and the like
    Health(dispatcher_commands::HealthArgs),
    /// This dispatcher takes over the addresses that another one may have
    Takeover(dispatcher_commands::TakeoverArgs),
    /// Way of a flow's packets through the cluster, from this dispatcher on
    Trace(dispatcher_commands::TraceArgs),
    /// It lets go of them
    Release(dispatcher_commands::TakeoverArgs),
    /// Show the shared interfaces and outside addresses, or replace them by those of a JSON file
    Config {
        /// The file
        file: Option<PathBuf>,
    },
}

#[derive(Clone, Copy, ValueEnum)]
enum Role {
    Dispatcher,
    Dataplane,
}

impl From<Role> for Duty {
    fn from(role: Role) -> Self {
        match role {
            Role::Dispatcher => Self::Dispatcher,
            Role::Dataplane => Self::Dataplane,
        }
    }
}

/// Runs it.
pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    // What this machine itself knows needs no manager.
    match &args.command {
        Command::Health(args) => return dispatcher_commands::health(args),
        Command::Trace(trace) => return dispatcher_commands::trace(trace, args.json),
        Command::Takeover(args) => return Ok(dispatcher_commands::takeover(args, true)),
        Command::Release(args) => return Ok(dispatcher_commands::takeover(args, false)),
        _ => {}
    }
    let token = match &args.token_file {
        Some(path) => std::fs::read_to_string(path)
            .with_context(|| format!("{}: cannot be read", path.display()))?
            .trim()
            .to_owned(),
        None => bail!("name the manager's token with --token-file or ANABRANCH_TOKEN_FILE"),
    };
    let api = leading(&args.api, &token);
    let client = Client::new(api, &token);
    let result = match &args.command {
        Command::Status => status(args, &client),
        Command::Plan => client.get::<Plan>("/v1/plan").and_then(|plan| Ok(print_json(&plan)?)),
        Command::Events => events(args, &client),
        Command::Config { file: None } => {
            client.get::<Configuration>("/v1/config").and_then(|config| Ok(print_json(&config)?))
        }
        Command::Config { file: Some(file) } => {
            let text = std::fs::read_to_string(file)
                .with_context(|| format!("{}: cannot be read", file.display()))?;
            let config: Configuration =
                serde_json::from_str(&text).with_context(|| format!("{}", file.display()))?;
            client.send("PUT", "/v1/config", &config).and_then(|accepted| client.follow(args, accepted))
        }
        Command::Token { node, role, weight, minutes } => {
            let (role, valid_seconds) = ((*role).into(), Some(minutes * 60));
            let wanted = NewToken { node: *node, role, weight: *weight, valid_seconds };
            client.send::<IssuedToken>("POST", "/v1/tokens", &wanted).and_then(|issued| {
                if args.json {
                    print_json(&issued)?;
                } else {
                    print(&format!("{}\n", issued.token))?;
                }
                Ok(())
            })
        }
        change => client
            .send("POST", "/v1/changes", &Change { steps: steps(change)? })
            .and_then(|accepted| client.follow(args, accepted)),
    };
    match result {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(CallError::Unreachable(error)) => {
            complain(&format!("anabranch: no manager at {api}: {error}"));
            Ok(ExitCode::from(EXIT_NOT_RUNNING))
        }
        Err(CallError::Other(error)) => {
            complain(&format!("anabranch: {error:#}"));
            Ok(ExitCode::FAILURE)
        }
    }
}

/// The first manager that answers for the cluster; the first one, which says why not, if none does.
fn leading<'a>(apis: &'a [String], token: &str) -> &'a str {
    let leads = |api: &&String| Client::new(api, token).get::<Plan>("/v1/plan").is_ok();
    let found = if apis.len() > 1 { apis.iter().find(leads) } else { None };
    found.or(apis.first()).map_or("", String::as_str)
}

/// Steps that a command stands for.
fn steps(command: &Command) -> anyhow::Result<Vec<ChangeStep>> {
    Ok(match command {
        Command::Add { node, address, role, weight } => vec![ChangeStep::Add(NewUnit {
            node: *node,
            address: *address,
            role: role.map(Into::into),
            weight: *weight,
        })],
        Command::Drain { node, reset: true, .. } => vec![ChangeStep::Remove { node: *node, force: true }],
        Command::Drain { node, remove, migrate, .. } => {
            vec![ChangeStep::Drain { node: *node, remove: *remove, migrate: *migrate }]
        }
        Command::Remove { node, force } => vec![ChangeStep::Remove { node: *node, force: *force }],
        Command::Weight { node, weight } => vec![ChangeStep::Weight { node: *node, weight: *weight }],
        Command::Change { steps } => steps.iter().map(|text| step(text)).collect::<anyhow::Result<_>>()?,
        _ => Vec::new(),
    })
}

/// A step in words.
fn step(text: &str) -> anyhow::Result<ChangeStep> {
    let words: Vec<&str> = text.split_whitespace().collect();
    let node = |word: &str| word.parse::<u16>().with_context(|| format!("\"{word}\" is no node id"));
    Ok(match words[..] {
        ["add", id] => ChangeStep::Add(NewUnit { node: node(id)?, address: None, role: None, weight: None }),
        ["drain", id] => ChangeStep::Drain { node: node(id)?, remove: false, migrate: false },
        ["drain", id, "migrate"] => ChangeStep::Drain { node: node(id)?, remove: false, migrate: true },
        ["remove", id] => ChangeStep::Remove { node: node(id)?, force: false },
        ["weight", id, weight] => {
            let weight = weight.parse().with_context(|| format!("\"{weight}\" is no weight"))?;
            ChangeStep::Weight { node: node(id)?, weight }
        }
        _ => {
            bail!("\"{text}\" is not one of 'add N', 'drain N', 'drain N migrate', 'remove N', 'weight N W'")
        }
    })
}

/// Reason why a call failed.
pub(crate) enum CallError {
    /// Nobody answers.
    Unreachable(String),
    /// The manager refuses, or something else.
    Other(anyhow::Error),
}

impl From<CallError> for anyhow::Error {
    fn from(error: CallError) -> Self {
        match error {
            CallError::Unreachable(error) => anyhow!("the manager does not answer: {error}"),
            CallError::Other(error) => error,
        }
    }
}

impl From<anyhow::Error> for CallError {
    fn from(error: anyhow::Error) -> Self {
        Self::Other(error)
    }
}

impl From<std::io::Error> for CallError {
    fn from(error: std::io::Error) -> Self {
        Self::Other(error.into())
    }
}

impl From<ureq::Error> for CallError {
    fn from(error: ureq::Error) -> Self {
        Self::Other(error.into())
    }
}

/// A caller of the manager.
pub(crate) struct Client {
    agent: ureq::Agent,
    api: String,
    authorization: String,
}

impl Client {
    /// A caller with a token.
    pub(crate) fn new(api: &str, token: &str) -> Self {
        let config = ureq::Agent::config_builder().timeout_global(Some(PATIENCE)).http_status_as_error(false);
        // The manager is near, and a proxy of the environment has no business with the token.
        let config = config.proxy(None).build();
        let api = api.trim_end_matches('/').to_owned();
        Self { agent: config.into(), api, authorization: format!("Bearer {token}") }
    }

    /// Reads something.
    pub(crate) fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, CallError> {
        let request = self.agent.get(format!("{}{path}", self.api));
        answer(request.header("Authorization", &self.authorization).call())
    }

    /// Asks for a change.
    pub(crate) fn send<T: DeserializeOwned>(
        &self,
        method: &str,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, CallError> {
        let url = format!("{}{path}", self.api);
        let request = if method == "PUT" { self.agent.put(url) } else { self.agent.post(url) };
        answer(request.header("Authorization", &self.authorization).send_json(body))
    }

    /// Waits until a change is in force, unless nobody wants to.
    fn follow(&self, args: &Args, accepted: Accepted) -> Result<(), CallError> {
        let took = if args.no_wait { None } else { Some(self.wait(accepted)?) };
        if args.json {
            print_json(&accepted)?;
        } else if let Some(took) = took {
            print(&format!("change {} is in force after {} ms\n", accepted.accepted, took.as_millis()))?;
        } else {
            print(&format!("change {} is stored\n", accepted.accepted))?;
        }
        Ok(())
    }

    /// Says what the change waits for; how long it took.
    fn wait(&self, accepted: Accepted) -> Result<Duration, CallError> {
        let began = Instant::now();
        let mut told = String::new();
        loop {
            let plan: Plan = self.get("/v1/plan")?;
            let waits = plan.accepted.contains(&accepted.accepted);
            if !waits && matches!(plan.stage.as_str(), "idle" | "draining") {
                return Ok(began.elapsed());
            }
            let why = plan.waits.unwrap_or_else(|| match plan.missing[..] {
                [] => plan.stage.clone(),
                ref missing => format!("{}, waiting for {missing:?}", plan.stage),
            });
            if began.elapsed() > Duration::from_secs(1) && why != told {
                complain(&why);
                told = why;
            }
            std::thread::sleep(LOOK);
        }
    }
}

fn answer<T: DeserializeOwned>(
    result: Result<ureq::http::Response<ureq::Body>, ureq::Error>,
) -> Result<T, CallError> {
    let mut response = match result {
        Ok(response) => response,
        Err(error @ (ureq::Error::Io(_) | ureq::Error::Timeout(_) | ureq::Error::HostNotFound)) => {
            return Err(CallError::Unreachable(error.to_string()));
        }
        Err(error) => return Err(error.into()),
    };
    let status = response.status();
    let text = response.body_mut().read_to_string()?;
    if status.is_success() {
        return Ok(serde_json::from_str(&text).context("the manager's answer is not understood")?);
    }
    let said = serde_json::from_str::<Problem>(&text).map_or(text, |problem| problem.error);
    Err(anyhow!("{said} ({status})").into())
}

fn status(args: &Args, client: &Client) -> Result<(), CallError> {
    let report: ClusterReport = client.get("/v1/cluster")?;
    if args.json {
        print_json(&report)?;
    } else {
        print(&text(&report))?;
    }
    Ok(())
}

fn text(report: &ClusterReport) -> String {
    let ClusterReport { plan, chains, flows_by_chain: _, flows_by_place, quarantined_blocks, units } = report;
    let mut out = String::new();
    let era = plan.era.map_or_else(|| "none yet".to_owned(), |era| era.to_string());
    let _ = write!(out, "era {era}, {}", plan.stage);
    if let Some(next) = plan.next_era {
        let _ = write!(out, " to era {next}");
    }
    if !plan.missing.is_empty() {
        let _ = write!(out, ", waiting for {:?}", plan.missing);
    }
    let _ = writeln!(out);
    if let Some(waits) = &plan.waits {
        let _ = writeln!(out, "changes {:?} wait: {waits}", plan.accepted);
    }
    let lengths = (0..).zip(chains).map(|(length, buckets)| format!("{length}: {buckets}"));
    let _ = writeln!(out, "buckets by length of their chain: {}", lengths.collect::<Vec<_>>().join(", "));
    let places = (0..).zip(flows_by_place).map(|(place, flows)| format!("{place}: {flows}"));
    let _ = writeln!(out, "flows by their unit's place in it: {}", places.collect::<Vec<_>>().join(", "));
    if *quarantined_blocks > 0 {
        let _ = writeln!(out, "{quarantined_blocks} port blocks of lost units are not used yet");
    }
    let _ = writeln!(
        out,
        "\n{:>4}  {:<15} {:<10} {:<9} {:>6} {:>7} {:>8} {:>8} {:>5} {:>10} {:>11} {:>6}",
        "node",
        "address",
        "role",
        "state",
        "weight",
        "buckets",
        "in chain",
        "flows",
        "load",
        "packets",
        "second hops",
        "ports"
    );
    for unit in units {
        let role = match unit.role {
            Duty::Dispatcher => "dispatcher",
            Duty::Dataplane => "dataplane",
            Duty::Both => "both",
        };
        let state = if unit.connected { unit.standing.clone() } else { format!("{}, away", unit.standing) };
        let load = format!("{} %", unit.load_percent);
        let _ = writeln!(
            out,
            "{:>4}  {:<15} {role:<10} {state:<9} {:>6} {:>7} {:>8} {:>8} {load:>5} {:>10} {:>11} {:>6}",
            unit.node,
            unit.address.to_string(),
            unit.weight,
            unit.buckets,
            unit.chained_buckets,
            unit.live_flows,
            unit.packets,
            unit.second_hops,
            unit.port_blocks * 1_024,
        );
    }
    out
}

fn events(args: &Args, client: &Client) -> Result<(), CallError> {
    let lines: Vec<EventLine> = client.get("/v1/events")?;
    if args.json {
        print_json(&lines)?;
        return Ok(());
    }
    let mut out = String::new();
    for line in lines {
        let (seconds, ms) = (line.at_unix_ms / 1_000 % 86_400, line.at_unix_ms % 1_000);
        let node = line.node.map_or_else(String::new, |node| format!("unit {node}: "));
        let _ = writeln!(
            out,
            "{:02}:{:02}:{:02}.{ms:03}Z  {node}{}",
            seconds / 3_600,
            seconds / 60 % 60,
            seconds % 60,
            line.text
        );
    }
    print(&out)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_read_in_words() {
        assert!(matches!(step("weight 13 2"), Ok(ChangeStep::Weight { node: 13, weight: 2 })));
        assert!(matches!(
            step(" drain  11 "),
            Ok(ChangeStep::Drain { node: 11, remove: false, migrate: false })
        ));
        for wrong in ["", "drain", "drain x", "weight 1", "start 1", "weight 1 -1", "add 70000"] {
            assert!(step(wrong).is_err(), "{wrong}");
        }
    }
}
