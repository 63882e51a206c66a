//! `anabranch demo` and `demo --gateway` as an ordinary user.

use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::Value;

use crate::machine::busy;

/// A place an ordinary user can use, with the program in it. Removed when dropped.
struct Public(PathBuf);

impl Public {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("anabranch-public-{}-{number}", std::process::id()));
        std::fs::DirBuilder::new().mode(0o755).create(&path).unwrap();
        let public = Self(path);
        // By a process of its own: a descriptor that writes here would be inherited by what other tests start meanwhile, and a
        // file that somebody may write to cannot be executed.
        let copied = Command::new("cp").arg(env!("CARGO_BIN_EXE_anabranch")).arg(public.program()).status();
        assert!(copied.unwrap().success());
        std::fs::create_dir(public.temporary()).unwrap();
        std::fs::set_permissions(public.temporary(), PermissionsExt::from_mode(0o777)).unwrap();
        public
    }

    fn program(&self) -> PathBuf {
        self.0.join("anabranch")
    }

    fn temporary(&self) -> PathBuf {
        self.0.join("tmp")
    }

    /// The demo as an ordinary user.
    fn demo(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.program());
        command.arg("demo").args(arguments).env("TMPDIR", self.temporary()).current_dir("/");
        if rustix::process::getuid().is_root() {
            command.uid(65_534).gid(65_534);
        }
        command
    }

    fn processes(&self) -> usize {
        let program = self.program();
        let entries = std::fs::read_dir("/proc").unwrap().flatten();
        entries
            .filter(|entry| std::fs::read_link(entry.path().join("exe")).is_ok_and(|exe| exe == program))
            .count()
    }
}

impl Drop for Public {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Rows T1, T2, T4: an ordinary user (`nobody` when the test is run by root) makes the demo in a user namespace. Without the
/// right to load steering programs rings bring each packet to its core, and no flow is split.
#[test]
fn t2_t4_an_ordinary_user_runs_the_demo_without_steering_programs() {
    let _busy = busy();
    let public = Public::new();
    let output = public.demo(&["--json", "--seconds", "5"]).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{errors}");
    assert!(!errors.contains(" ERROR "), "{errors}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let number = |key: &str| report[key].as_f64().unwrap_or_else(|| panic!("no {key}: {report:#}"));
    for key in
        ["tcp1_mbps", "tcp16_mbps", "udp_mbps", "best_link_mbps", "links_sum_mbps", "bytes_verified", "cores"]
    {
        assert!(number(key) > 0.0, "{key}: {report:#}");
    }
    for key in ["udp_loss_percent", "longest_gap_ms", "cross_core_packets"] {
        assert!(number(key) >= 0.0, "{key}: {report:#}");
    }
    assert_eq!(report["intact"], true);
    assert_eq!(number("flows_split_over_cores"), 0.0, "{report:#}");
    assert_eq!(report["paths"].as_array().unwrap().len(), 3);
    assert_eq!(std::fs::read_dir(public.temporary()).unwrap().count(), 0, "left behind");
    assert_eq!(public.processes(), 0, "left running");
}

/// Rows C2, C3, C4, C6, C7: an ordinary user runs the gateway demo, with `nft` in place of the programs that the kernel refuses, and
/// rings in place of its steering. Nothing breaks; without `nft` it says what is missing.
#[test]
fn c2_c3_c4_c6_c7_an_ordinary_user_runs_the_gateway_demo() {
    let _busy = busy();
    let public = Public::new();
    let output = public.demo(&["--gateway", "--json", "--seconds", "5"]).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    let report: Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}\n{errors}"));
    assert_eq!(output.status.code(), Some(0), "{report:#}");
    assert!(report["requests"].as_u64() > Some(100), "{report:#}");
    for key in ["failed_requests", "broken_connections", "corrupt_answers"] {
        assert_eq!(report[key], 0, "{key}: {report:#}");
    }
    assert!(report["handoffs"].as_u64() > Some(0), "rings bring packets to their core: {report:#}");
    let output = public.demo(&["--gateway", "--seconds", "5"]).env("PATH", "/nonexistent").output().unwrap();
    assert_eq!(output.status.code(), Some(4));
    assert!(String::from_utf8_lossy(&output.stderr).contains("needs the program nft"));
    assert_eq!(std::fs::read_dir(public.temporary()).unwrap().count(), 0, "left behind");
    assert_eq!(public.processes(), 0, "left running");
}
