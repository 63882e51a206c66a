//! Rules that do not hold everywhere yet: how often a package may break one, a number that only falls.
//!
//! The numbers stand in `xtask/ratchet.txt`, one line for a rule and a package; no line is none. Whoever mends some
//! runs `cargo xtask tidy --lower`, which lowers them to what there is.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context as _;

use super::Violation;

/// Where the numbers stand, from the workspace's folder.
pub const FILE: &str = "xtask/ratchet.txt";

/// Rules with such numbers.
const RULES: &[&str] = &["doc-first-word", "name", "struct-fields", "arguments"];

/// Violations that are allowed, by rule and package.
pub type Allowed = BTreeMap<(String, String), usize>;

/// Reads the numbers.
///
/// # Errors
/// When a line is not a rule with such numbers, a package and a number.
pub fn read(root: &Path) -> anyhow::Result<Allowed> {
    parse(&std::fs::read_to_string(root.join(FILE)).with_context(|| format!("{FILE} cannot be read"))?)
}

/// Takes the numbers from the text of the file.
///
/// # Errors
/// As [`read`].
pub fn parse(text: &str) -> anyhow::Result<Allowed> {
    let lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines
        .map(|line| match line.split_whitespace().collect::<Vec<_>>()[..] {
            [rule, package, number] if RULES.contains(&rule) => {
                let number = number.parse().with_context(|| format!("{FILE}: {line}"))?;
                Ok(((rule.to_owned(), package.to_owned()), number))
            }
            _ => anyhow::bail!("{FILE}: {line}: wanted: one of {RULES:?}, package, number"),
        })
        .collect()
}

/// Leaves out violations of packages that have no more of a rule than they may.
pub fn apply(allowed: &Allowed, found: Vec<Violation>) -> Vec<Violation> {
    let count = count(&found);
    let is_over = |violation: &Violation| {
        let key = key(violation);
        count.get(&key).is_none_or(|count| *count > allowed.get(&key).copied().unwrap_or(0))
    };
    found.into_iter().filter(is_over).collect()
}

/// The file's text with each number at what there is, or at what it was where that is less.
pub fn lowered(allowed: &Allowed, found: &[Violation]) -> String {
    let mut text = "# Rule, package, how often the rule may be broken there. Numbers only fall: cargo xtask tidy --lower\n".to_owned();
    for ((rule, package), count) in count(found) {
        let most = allowed.get(&(rule.clone(), package.clone())).copied().unwrap_or(0).min(count);
        if most > 0 {
            text.push_str(&format!("{rule:<15} {package:<18} {most}\n"));
        }
    }
    text
}

fn count(found: &[Violation]) -> Allowed {
    let mut count = Allowed::new();
    for violation in found.iter().filter(|violation| RULES.contains(&violation.rule)) {
        *count.entry(key(violation)).or_default() += 1;
    }
    count
}

fn key(violation: &Violation) -> (String, String) {
    (violation.rule.to_owned(), super::files::package(&violation.file).to_owned())
}
