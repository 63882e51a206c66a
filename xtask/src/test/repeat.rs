//! The end-to-end tests many times in a row, with or without load, and a table of each test's passes and times.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context as _, ensure};
use serde_json::Value;

use super::{END_TO_END_THREADS, THREADS, cargo};
use crate::{root, say};

/// The package whose `tests` folder and end-to-end suite are repeated.
const PACKAGE: &str = "anabranch";

/// How one test fared: seconds of each pass, and of each failure.
#[derive(Debug, Default)]
struct Record {
    passes: Vec<f64>,
    failures: Vec<f64>,
}

/// Every test's record, by its name.
type Table = BTreeMap<String, Record>;

/// Runs the tests `rounds` times. Whether all of them passed each time.
///
/// # Errors
/// When they cannot be built or started, or when no test has a name with `filter`.
pub fn run(rounds: usize, load: bool, filter: Option<&str>) -> anyhow::Result<bool> {
    let suites = build()?;
    let mut table = Table::new();
    let end = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        for _ in 0..if load { cores } else { 0 } {
            scope.spawn(|| {
                while !end.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
        }
        let done = (1..=rounds).try_for_each(|round| {
            suites.iter().try_for_each(|suite| one_round(suite, filter, &mut table))?;
            let failures: usize = table.values().map(|record| record.failures.len()).sum();
            say(&format!("round {round} of {rounds}: {failures} failures so far\n"))
        });
        end.store(true, Ordering::Relaxed);
        done
    })?;
    ensure!(!table.is_empty(), "no end-to-end test has {filter:?} in its name");
    say(&text(&table))?;
    Ok(table.values().all(|record| record.failures.is_empty()))
}

/// Builds the end-to-end tests; the programs they became.
fn build() -> anyhow::Result<Vec<PathBuf>> {
    let mut command = cargo();
    // Of the whole workspace, or its parts would be built anew with fewer features.
    command.args(["test", "--locked", "--workspace", "--test", "e2e", "--no-run"]);
    command.arg("--message-format=json-render-diagnostics").stderr(Stdio::inherit());
    let output = command.output().context("cargo does not run")?;
    ensure!(output.status.success(), "the tests do not build");
    let messages = String::from_utf8(output.stdout)?;
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let suites = messages.filter(|message| message["target"]["kind"][0] == "test");
    Ok(suites.filter_map(|message| message["executable"].as_str().map(PathBuf::from)).collect())
}

/// Runs one program of tests once and books what it says.
fn one_round(suite: &Path, filter: Option<&str>, table: &mut Table) -> anyhow::Result<()> {
    let mut command = Command::new(suite);
    // Messages with times are behind the switch for unstable options, which this variable opens on a stable compiler.
    command.args(["-Z", "unstable-options", "--format", "json", "--report-time"]).env("RUSTC_BOOTSTRAP", "1");
    if std::env::var_os(THREADS).is_none() {
        command.env(THREADS, END_TO_END_THREADS);
    }
    command.args(filter).current_dir(root().join("crates").join(PACKAGE)).stdout(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("{} does not start", suite.display()))?;
    let output = child.stdout.take().context("no standard output")?;
    for line in BufReader::new(output).lines() {
        book(&line?, table)?;
    }
    let status = child.wait()?;
    // 101: tests failed, and the table says which. Anything else has no entry there.
    ensure!(matches!(status.code(), Some(0 | 101)), "{} ended with {status}", suite.display());
    Ok(())
}

/// Takes one message of libtest.
fn book(line: &str, table: &mut Table) -> anyhow::Result<()> {
    let Ok(message) = serde_json::from_str::<Value>(line) else { return Ok(()) };
    let (Some("test"), Some(name)) = (message["type"].as_str(), message["name"].as_str()) else {
        return Ok(());
    };
    let seconds = message["exec_time"].as_f64().unwrap_or_default();
    match message["event"].as_str() {
        Some("ok") => table.entry(name.to_owned()).or_default().passes.push(seconds),
        Some("failed") => {
            table.entry(name.to_owned()).or_default().failures.push(seconds);
            say(&format!("--- {name} failed\n{}\n", message["stdout"].as_str().unwrap_or_default()))?;
        }
        _ => {}
    }
    Ok(())
}

/// The table for people: those that failed first.
fn text(table: &Table) -> String {
    let mut rows: Vec<(&String, &Record)> = table.iter().collect();
    rows.sort_by_key(|(_, record)| std::cmp::Reverse(record.failures.len()));
    let mut text = format!("{:>6} {:>6} {:>8} {:>8}  test\n", "passed", "failed", "median s", "longest s");
    for (name, record) in rows {
        let mut seconds: Vec<f64> = record.passes.iter().chain(&record.failures).copied().collect();
        seconds.sort_by(f64::total_cmp);
        let (median, longest) = (seconds[seconds.len() / 2], seconds[seconds.len() - 1]);
        let (passed, failed) = (record.passes.len(), record.failures.len());
        text.push_str(&format!("{passed:>6} {failed:>6} {median:>8.1} {longest:>8.1}  {name}\n"));
    }
    let sum = |count: fn(&Record) -> usize| table.values().map(count).sum::<usize>();
    // In the words of test runners, so that what reads their last line can read this one.
    text.push_str(&format!("{} passed, {} failed\n", sum(|r| r.passes.len()), sum(|r| r.failures.len())));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_become_a_table_with_failures_first() {
        let mut table = Table::new();
        for line in [
            r#"{"type":"suite","event":"started","test_count":2}"#,
            r#"{"type":"test","event":"started","name":"a::b"}"#,
            r#"{"type":"test","name":"a::b","event":"ok","exec_time":1.5}"#,
            r#"{"type":"test","name":"a::c","event":"ok","exec_time":3.0}"#,
            r#"{"type":"test","name":"a::c","event":"failed","exec_time":2.0,"stdout":"left: 1"}"#,
            "noise of a test",
        ] {
            assert!(book(line, &mut table).is_ok());
        }
        let text = text(&table);
        let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[1], ["1", "1", "3.0", "3.0", "a::c"]);
        assert_eq!(lines[2], ["1", "0", "1.5", "1.5", "a::b"]);
        assert!(text.ends_with("\n2 passed, 1 failed\n"), "{text}");
    }
}
