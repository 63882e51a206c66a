//! The program under test: keys, configuration files, a gateway that runs in a node of the test bed.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use control::control_socket::{CallError, call};
use control::key;
use control::protocol::{Request, Response};
use control::status::Report;
use testbed::program::{Program, ScratchDir};
use testbed::topology::Node;

/// A pair of keys in base64.
#[derive(Clone)]
pub struct Keys {
    pub private: String,
    pub public: String,
}

impl Keys {
    pub fn new() -> Self {
        let key = key::generate().unwrap();
        Self { private: key::encode(key.bytes()), public: key::encode(&key.public()) }
    }
}

/// A gateway; ended when dropped.
pub struct Gateway {
    pub program: Program,
    pub socket: PathBuf,
    pub config: PathBuf,
    pub log: PathBuf,
}

/// The part of a configuration every test has: `[node]` with files of its own in `directory`.
pub fn node(directory: &ScratchDir, name: &str, keys: &Keys, more: &str) -> String {
    let path = directory.path().display();
    format!(
        "[node]\nname = \"{name}\"\nprivate-key = \"{}\"\nstate-dir = \"{path}/{name}\"\n\
         control-socket = \"{path}/{name}.sock\"\n{more}\n",
        keys.private
    )
}

impl Gateway {
    /// Starts `anabranch up` in a node with this configuration.
    pub fn start(place: &Node, directory: &ScratchDir, name: &str, config: &str) -> Self {
        Self::start_with(place, directory, name, config, &[])
    }

    /// The same with more variables in its environment.
    pub fn start_with(
        place: &Node,
        directory: &ScratchDir,
        name: &str,
        config: &str,
        environment: &[(&str, &str)],
    ) -> Self {
        let config = directory.write(&format!("{name}.toml"), config).unwrap();
        let log = directory.path().join(format!("{name}.log"));
        let mut command = up(&config);
        command.envs(environment.iter().copied());
        let program = place.start(command, Some(&log)).unwrap();
        Self { program, socket: directory.path().join(format!("{name}.sock")), config, log }
    }

    pub fn call(&self, request: Request) -> Result<Response, CallError> {
        call(&self.socket, request)
    }

    /// Live state, once the socket answers.
    pub fn status(&self) -> Option<Report> {
        self.call(Request::Status).ok()?.status.map(|report| *report)
    }

    /// Waits until the state is as wanted; fails with state and log.
    #[track_caller]
    pub fn wait(&mut self, what: &str, seconds: f64, wanted: impl Fn(&Report) -> bool) -> Report {
        let start = Instant::now();
        loop {
            let report = self.status();
            if let Some(report) = report.as_ref().filter(|report| wanted(report)) {
                return report.clone();
            }
            if let Err(error) = self.program.check_alive() {
                panic!("{what}: {error}");
            }
            if start.elapsed().as_secs_f64() > seconds {
                let state =
                    report.map_or_else(|| "no answer".to_owned(), |report| control::status::text(&report));
                panic!("{what}: not within {seconds} s\n{state}\n{}", self.log());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Runs a command of the program against this gateway: exit code and standard output.
    pub fn command(&self, arguments: &[&str]) -> (i32, String) {
        let output = self.ask(arguments);
        (output.status.code().unwrap(), String::from_utf8(output.stdout).unwrap())
    }

    /// As [`Self::command`], with what is said to standard error.
    pub fn complaint(&self, arguments: &[&str]) -> (i32, String) {
        let output = self.ask(arguments);
        (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
    }

    fn ask(&self, arguments: &[&str]) -> std::process::Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_anabranch"));
        command.args(arguments).arg("--socket").arg(&self.socket).output().unwrap()
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }
}

pub fn up(config: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_anabranch"));
    command.arg("up").arg(config).env_remove("ANABRANCH_LOG").env_remove("RUST_LOG");
    command
}

/// Number of paths of the first peer that carry data.
pub fn paths_up(report: &Report) -> usize {
    let paths = report.status.peers.first().map(|peer| peer.paths.as_slice()).unwrap_or_default();
    paths.iter().filter(|path| path.state == "up").count()
}
