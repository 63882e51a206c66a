//! Who may depend on whom.
//!
//! ```text
//! packet ← steering ← {tunnel, services, cluster} ← datapath ← engine ← control ← anabranch
//! linux  ← engine, health ← control;   linux  ← testbed;   testbed ← anabranch;   sim: all up to datapath;   sim ← testbed
//! ```

use std::path::Path;
use std::process::Command;

use anyhow::Context as _;
use serde_json::Value;

use super::Violation;

/// Crates that are state machines only.
pub const SANS_IO: &[&str] = &["packet", "steering", "tunnel", "services", "cluster", "datapath", "sim"];

/// Each package of the workspace and those of the workspace that it may use.
const ALLOWED: &[(&str, &[&str])] = &[
    ("packet", &[]),
    ("steering", &["packet"]),
    ("tunnel", &["packet", "steering"]),
    ("services", &["packet", "steering"]),
    ("cluster", &["packet", "steering"]),
    // The manager of a cluster: a process of its own, the only one with a runtime.
    ("manager", &["packet", "steering", "cluster", "linux"]),
    ("datapath", &["packet", "steering", "tunnel", "services", "cluster"]),
    ("sim", &["packet", "steering", "tunnel", "services", "cluster", "datapath"]),
    // The steering programs compute `steering`'s hash in the kernel.
    ("linux", &["packet", "steering"]),
    // The emulator runs the simulator's model of a link in real time.
    ("testbed", &["linux", "packet", "sim"]),
    ("engine", &["packet", "steering", "tunnel", "services", "cluster", "datapath", "linux"]),
    // Checks of backends: a process of its own.
    ("health", &["packet", "steering", "services", "linux"]),
    // Datagrams over TCP: a process of its own.
    ("tls-path", &["linux"]),
    (
        "control",
        &[
            "packet", "steering", "tunnel", "services", "cluster", "datapath", "linux", "engine", "health",
            "tls-path",
        ],
    ),
    (
        "anabranch",
        &[
            "packet", "steering", "tunnel", "services", "cluster", "manager", "datapath", "linux", "engine",
            "control", "health", "tls-path", "testbed",
        ],
    ),
    // Tests and measurements of the real program.
    (
        "tests",
        &[
            "packet",
            "steering",
            "tunnel",
            "services",
            "cluster",
            "manager",
            "datapath",
            "linux",
            "engine",
            "health",
            "control",
            "testbed",
            "anabranch",
        ],
    ),
    (
        "bench",
        &[
            "packet",
            "steering",
            "tunnel",
            "services",
            "cluster",
            "manager",
            "datapath",
            "linux",
            "engine",
            "health",
            "control",
            "testbed",
            "anabranch",
        ],
    ),
    (
        "fuzz-targets",
        &["packet", "steering", "tunnel", "services", "cluster", "datapath", "linux", "health", "control"],
    ),
    ("xtask", &[]),
];

/// Foreign crates, who may use them, and why nobody else.
const FOREIGN: &[(&str, &[&str], &str)] = &[
    ("tokio", &["manager"], "only `manager` may have a runtime"),
    ("libc", &["linux", "engine", "testbed", "anabranch"], "system calls belong to `linux`"),
    (
        "rustix",
        &["linux", "engine", "control", "health", "tls-path", "testbed", "anabranch", "tests", "bench"],
        "no I/O here",
    ),
    ("socket2", &["linux", "testbed"], "sockets belong to `linux`"),
    ("netlink-packet-route", &["linux"], "netlink belongs to `linux`"),
    ("clap", &["anabranch"], "only the program has a command line"),
];

/// A dependency as `cargo metadata` tells it.
struct Edge<'a> {
    package: &'a str,
    manifest: &'a str,
    on: &'a str,
    is_local: bool,
    is_dev: bool,
}

/// The answer of `cargo metadata` about the workspace.
///
/// # Errors
/// When cargo does not run or answers with something else.
pub fn metadata(root: &Path) -> anyhow::Result<Value> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--no-deps", "--offline", "--format-version", "1"])
        .current_dir(root)
        .output()
        .context("cargo metadata does not run")?;
    let said = String::from_utf8_lossy(&output.stderr);
    anyhow::ensure!(output.status.success(), "cargo metadata: {said}");
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// Checks every dependency of every package.
pub fn check(metadata: &Value, found: &mut Vec<Violation>) {
    let root = metadata["workspace_root"].as_str().unwrap_or_default();
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let name = package["name"].as_str().unwrap_or_default();
        let manifest = package["manifest_path"].as_str().unwrap_or_default();
        let manifest = manifest.strip_prefix(root).unwrap_or(manifest).trim_start_matches('/');
        let mut report = |message| {
            found.push(Violation { file: manifest.to_owned(), line: 1, rule: "dependency", message });
        };
        if !ALLOWED.iter().any(|(known, _)| *known == name) {
            report(format!(
                "`{name}` is new: give it a place in xtask/src/tidy/graph.rs and in ARCHITECTURE.md"
            ));
            continue;
        }
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let edge = Edge {
                package: name,
                manifest,
                on: dependency["name"].as_str().unwrap_or_default(),
                is_local: dependency["path"].is_string(),
                is_dev: dependency["kind"] == "dev",
            };
            if let Some(message) = fault(&edge) {
                report(message);
            }
        }
    }
}

fn fault(edge: &Edge<'_>) -> Option<String> {
    let Edge { package, manifest, on, is_local, is_dev } = edge;
    if *is_local {
        let (_, allowed) = ALLOWED.iter().find(|(name, _)| name == package)?;
        // A program's own tests may use the test bed.
        let ok = allowed.contains(on) || (*is_dev && *on == "testbed" && !SANS_IO.contains(package));
        let list = if allowed.is_empty() { "nothing".to_owned() } else { allowed.join(", ") };
        return (!ok)
            .then(|| format!("`{package}` must not depend on `{on}`; of the workspace it may use: {list}"));
    }
    let (_, users, why) = FOREIGN.iter().find(|(name, ..)| name == on)?;
    let ok = users.contains(package);
    (!ok).then(|| format!("`{package}` must not depend on `{on}`: {why} (remove it from {manifest})"))
}
