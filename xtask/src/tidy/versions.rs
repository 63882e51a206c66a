//! The oldest Rust that builds this, the same wherever it is said.

use serde_json::Value;

use super::Violation;
use super::files::File;

/// Files that name the version, and the text before it.
const PLACES: &[(&str, &str)] =
    &[("clippy.toml", "msrv = \""), ("README.md", "Rust "), (".github/workflows/ci.yml", "RUST_OLDEST: \"")];

/// Compares every package's `rust-version` and the other places with that of the first package.
pub fn check(metadata: &Value, files: &[File], found: &mut Vec<Violation>) {
    let packages = || metadata["packages"].as_array().into_iter().flatten();
    let Some(wanted) = packages().find_map(|package| package["rust_version"].as_str()) else { return };
    let mut report = |file: &str, message: String| {
        found.push(Violation { file: file.to_owned(), line: 1, rule: "rust-version", message });
    };
    for package in packages().filter(|package| package["rust_version"] != wanted) {
        let name = package["name"].as_str().unwrap_or_default();
        report(
            "Cargo.toml",
            format!("`{name}` does not say rust-version {wanted}: rust-version.workspace = true"),
        );
    }
    for (path, before) in PLACES {
        let text = files.iter().find(|file| file.path == *path).map_or("", |file| &file.text);
        let said = text.match_indices(before).map(|(at, _)| &text[at + before.len()..]);
        let said = said.filter(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
        let version = |rest: &str| {
            rest.split(|c: char| c != '.' && !c.is_ascii_digit())
                .next()
                .map(|v| v.trim_end_matches('.').to_owned())
        };
        let said: Vec<String> = said.filter_map(version).collect();
        if said.is_empty() || said.iter().any(|version| version != wanted) {
            report(path, format!("the oldest Rust is {wanted} by Cargo.toml; here: {said:?}"));
        }
    }
}
