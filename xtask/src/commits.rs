//! `cargo xtask commits BASE..HEAD`: the subjects of new commits.

use std::process::{Command, ExitCode};

use anyhow::Context as _;

use crate::{root, say};

/// Longest subject, characters.
const SUBJECT_MAX: usize = 72;

/// Checks each commit of a range that is no merge.
///
/// # Errors
/// When git does not run or does not know the range.
pub fn run(range: &str) -> anyhow::Result<ExitCode> {
    let output = Command::new("git")
        .args(["log", "--no-merges", "--format=%h %s", range, "--"])
        .current_dir(root())
        .output()
        .context("git does not run")?;
    anyhow::ensure!(output.status.success(), "git log: {}", String::from_utf8_lossy(&output.stderr));
    let mut faults = 0;
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let (commit, subject) = line.split_once(' ').unwrap_or((line, ""));
        if let Some(fault) = fault(subject) {
            say(&format!("{commit} {subject}\n    {fault}\n"))?;
            faults += 1;
        }
    }
    Ok(if faults == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The first thing that is wrong with a subject.
fn fault(subject: &str) -> Option<String> {
    let length = subject.chars().count();
    if length > SUBJECT_MAX {
        return Some(format!("{length} characters; at most {SUBJECT_MAX}: the why belongs in the body"));
    }
    let is_area = |area: &str| {
        let is_part = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-_/, .".contains(c);
        !area.is_empty() && area.chars().all(is_part)
    };
    match subject.split_once(": ") {
        Some((area, what)) if is_area(area) && !what.trim().is_empty() => {
            what.ends_with('.').then(|| "no full stop at the end".to_owned())
        }
        _ => Some(
            "the area comes first, in small letters: \"nat: end flows whose address is gone\"".to_owned(),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subjects() {
        for good in ["nat: end flows whose address is gone", "engine, tunnel: one ring", ".ci: install jq"] {
            assert_eq!(fault(good), None, "{good}");
        }
        let long = format!("nat: {}", "x".repeat(SUBJECT_MAX - 4));
        for bad in ["End flows whose address is gone", "nat: ", "NAT: end flows", "nat: end flows.", &long] {
            assert!(fault(bad).is_some(), "{bad}");
        }
    }
}
