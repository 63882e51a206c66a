//! `anabranch demo` and `anabranch demo --gateway` as a user runs them: real gateways, real data, nothing left behind.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::machine::busy;
use crate::scene::{PATIENCE, wait_for};

/// A directory for temporary files of one demo, so that what it leaves behind can be seen.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("anabranch-demo-test-{name}-{}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn demo(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_anabranch"));
        command.arg("demo").args(arguments).env("TMPDIR", &self.0);
        command
    }

    fn is_empty(&self) -> bool {
        std::fs::read_dir(&self.0).unwrap().next().is_none()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Processes that have this path in their command line, as the gateways of a demo have.
fn processes_with(path: &Path) -> Vec<String> {
    let path = path.to_str().unwrap();
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    entries
        .filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok())
        .map(|line| String::from_utf8_lossy(&line).replace('\0', " "))
        .filter(|line| line.contains(path))
        .collect()
}

fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap(), signal).unwrap();
}

fn errors(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn all_data_arrives_intact_and_the_json_has_every_figure() {
    let _busy = busy();
    let scratch = Scratch::new("json");
    let output = scratch.demo(&["--json", "--seconds", "8"]).output().unwrap();
    assert!(output.status.success(), "{}\n{}", output.status, errors(&output));
    // Exactly one object: anything else on standard output would not parse.
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    for key in [
        "tcp1_mbps",
        "tcp16_mbps",
        "udp_mbps",
        "udp_loss_percent",
        "best_link_mbps",
        "links_sum_mbps",
        "ideal_mbps",
        "longest_gap_ms",
        "bytes_verified",
        "cross_core_packets",
        "packets_read",
        "flows_split_over_cores",
        "cores",
    ] {
        assert!(report[key].is_number(), "{key}: {report:#}");
    }
    assert_eq!(report["intact"], true);
    assert_eq!(report["best_link_mbps"], 100.0);
    assert_eq!(report["links_sum_mbps"], 170.0);
    assert_eq!(report["flows_split_over_cores"], 0);
    // Without the right to load steering programs packets take a ring; the result is the same.
    if rustix::process::getuid().is_root() {
        let share = report["cross_core_packets"].as_f64().unwrap() / report["packets_read"].as_f64().unwrap();
        assert!(share < 0.01, "{share}: {report:#}");
    }
    // 8 s at a fraction of what the links carry; that all three carried something shows in their shares.
    assert!(report["bytes_verified"].as_u64().unwrap() > 20_000_000, "{report:#}");
    let paths = report["paths"].as_array().unwrap();
    assert_eq!(paths.len(), 3);
    for path in paths {
        assert_eq!(path["state"], "up", "{report:#}");
        assert!(path["tx_bytes"].as_u64().unwrap() > 10_000, "{report:#}");
    }
    assert!(scratch.is_empty());
    assert_eq!(processes_with(&scratch.0), Vec::<String>::new());
}

#[test]
fn the_report_for_people_says_what_matters() {
    let _busy = busy();
    let scratch = Scratch::new("text");
    let output = scratch.demo(&["--seconds", "4"]).output().unwrap();
    assert!(output.status.success(), "{}\n{}", output.status, errors(&output));
    let text = String::from_utf8_lossy(&output.stdout);
    for part in ["wan0", "wan2", "one TCP stream", "longest gap", "branch", "hub", "arrived intact"] {
        assert!(text.contains(part), "{part} is missing in:\n{text}");
    }
    // Standard error is no terminal here: plain lines.
    assert!(errors(&output).contains("3 paths up"), "{}", errors(&output));
    assert!(!errors(&output).contains('\u{1b}'), "{}", errors(&output));
}

/// Rows C2, C3, C4 (each way of translating, with HTTP, DNS and long connections), C6 (a virtual server one of whose backends
/// dies and comes back), C7 (a worker core is taken away and put back while connections live) and C10 (all of it on this machine
/// alone). Nothing may break but what was connected to the backend that died.
#[test]
fn c2_c3_c4_c6_c7_c10_the_gateway_demo_breaks_nothing() {
    let _busy = busy();
    let scratch = Scratch::new("gateway");
    let output = scratch.demo(&["--gateway", "--seconds", "6", "--json"]).output().unwrap();
    let report: Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}\n{}", errors(&output)));
    assert!(output.status.success(), "{}\n{report:#}", output.status);
    assert_eq!(report["ok"], true, "{report:#}");
    assert_eq!(report["faults"], serde_json::json!([]));
    let number = |key: &str| report[key].as_f64().unwrap_or_else(|| panic!("{key}: {report:#}"));
    for key in ["failed_requests", "broken_connections", "corrupt_answers", "replies_on_wrong_core"] {
        assert_eq!(number(key), 0.0, "{key}: {report:#}");
    }
    for key in ["requests", "connections", "bytes_verified", "latency_p99_ms", "backend_detection_ms"] {
        assert!(number(key) > 0.0, "{key}: {report:#}");
    }
    assert!(number("handoffs") >= 0.0);
    let cores = report["cores"].as_array().unwrap();
    assert!(cores.len() >= 2, "{report:#}");
    for core in cores {
        for key in ["core", "flows", "packets", "handoffs", "load_percent"] {
            assert!(core[key].is_number(), "{key}: {core:#}");
        }
        assert!(core["flows"].as_u64().unwrap() > 0, "a core did nothing: {report:#}");
    }
    let phases = report["phases"].as_array().unwrap();
    let rows: Vec<&str> = phases.iter().map(|phase| phase["row"].as_str().unwrap()).collect();
    assert_eq!(rows, ["C2", "C3", "C4", "C4", "C6", "C7"]);
    for phase in phases {
        assert!(phase["requests"].as_u64().unwrap() > 10, "{phase:#}");
        // With steering programs the request and its reply come to the owner by themselves (rows C2 and C3; C4 as long as
        // the destination is not translated either).
        if rustix::process::getuid().is_root() && !["C6", "C7"].contains(&phase["row"].as_str().unwrap()) {
            assert_eq!(phase["handoffs"], 0, "{phase:#}");
        }
    }
    let backends = report["backends"].as_array().unwrap();
    assert_eq!(backends.len(), 4, "{report:#}");
    assert!(backends.iter().all(|backend| backend["requests"].as_u64().unwrap() > 0), "{report:#}");
    let buckets = report["core_taken"]["buckets"].as_array().unwrap();
    assert!(buckets[0].as_u64() > Some(0) && buckets[1] == 0 && buckets[2].as_u64() > Some(0), "{report:#}");
    assert!(!report["reload_changes"].as_array().unwrap().is_empty(), "{report:#}");
    assert!(scratch.is_empty());
    assert_eq!(processes_with(&scratch.0), Vec::<String>::new());
}

#[test]
fn the_gateway_report_for_people_says_what_matters() {
    let _busy = busy();
    let scratch = Scratch::new("gateway-text");
    let output = scratch.demo(&["--gateway", "--seconds", "4"]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}\n{text}\n{}", output.status, errors(&output));
    for part in
        ["(C2)", "(C3)", "(C4)", "(C6)", "(C7)", "hand-offs", "load", "10.20.0.13:80", "Nothing broke"]
    {
        assert!(text.contains(part), "{part} is missing in:\n{text}");
    }
    assert!(!errors(&output).contains('\u{1b}'), "{}", errors(&output));
}

#[test]
fn ctrl_c_and_even_sigkill_leave_nothing_behind() {
    let _busy = busy();
    for (kind, code) in [(Signal::INT, Some(130)), (Signal::TERM, Some(130)), (Signal::KILL, None)] {
        ends_without_a_trace(&["--seconds", "60"], 2, kind, code);
    }
    ends_without_a_trace(&["--gateway", "--seconds", "60"], 1, Signal::INT, Some(130));
    ends_without_a_trace(&["--gateway", "--seconds", "60"], 1, Signal::KILL, None);
}

/// Starts a demo with so many gateways and ends it with a signal.
fn ends_without_a_trace(arguments: &[&str], gateways: usize, kind: Signal, code: Option<i32>) {
    let scratch = Scratch::new(&format!("signal{}-{gateways}", kind.as_raw()));
    let mut command = scratch.demo(arguments);
    let mut demo = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    wait_for("the gateways run", PATIENCE, || processes_with(&scratch.0).len() == gateways);
    std::thread::sleep(Duration::from_millis(1_500));
    let start = Instant::now();
    signal(&demo, kind);
    assert_eq!(demo.wait().unwrap().code(), code, "{kind:?}");
    assert!(start.elapsed() < Duration::from_secs(5), "{kind:?}: {:?}", start.elapsed());
    wait_for("the gateways are gone", PATIENCE, || processes_with(&scratch.0).is_empty());
    // Nobody can clean up after a SIGKILL but the kernel, and files are not its business.
    assert!(kind == Signal::KILL || scratch.is_empty(), "{kind:?}");
}
