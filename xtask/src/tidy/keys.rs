//! Keys of `etc/reference.toml` that the tests of the real program use: a key that none of them writes may be read and forgotten, and
//! nothing would show it. A key counts by its name, whichever section it stands in.

use std::collections::{BTreeMap, BTreeSet};

use super::Violation;
use super::files::File;

/// The file with every key there is.
pub const REFERENCE: &str = "etc/reference.toml";

/// Files that write configurations for the real program, by how their paths begin: its tests, and the clusters that some of them start.
const WRITERS: &[&str] = &["tests/e2e/", "crates/testbed/src/cluster"];

/// Looks for keys of the reference that no writer has.
pub fn check(files: &[File], found: &mut Vec<Violation>) {
    let Some(reference) = files.iter().find(|file| file.path == REFERENCE) else { return };
    let writers = files.iter().filter(|file| WRITERS.iter().any(|folder| file.path.starts_with(folder)));
    let written: BTreeSet<String> = writers
        .flat_map(|file| keys(&literals(file)).map(|(_, key)| key.to_owned()).collect::<Vec<_>>())
        .collect();
    let mut lines = BTreeMap::new();
    for (at, key) in keys(&reference.text) {
        lines.entry(key).or_insert_with(|| reference.text[..at].matches('\n').count() + 1);
    }
    for (key, line) in lines.into_iter().filter(|(key, _)| !written.contains(*key)) {
        let message =
            format!("no test in {} sets `{key}`: write one that fails when the key is ignored", WRITERS[0]);
        found.push(Violation { file: REFERENCE.to_owned(), line, rule: "reference-key", message });
    }
}

/// The words in front of ` = `, with their places: keys of sections, of tables in a line, and those that a comment shows.
fn keys(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let is_key = |c: &char| c.is_ascii_lowercase() || c.is_ascii_digit() || *c == '-';
    text.match_indices(" = ").filter_map(move |(end, _)| {
        let length = text[..end].chars().rev().take_while(is_key).count();
        let key = &text[end - length..end];
        key.starts_with(|c: char| c.is_ascii_lowercase()).then_some((end - length, key))
    })
}

/// Contents of the literals of a Rust file; an escaped line end is one.
fn literals(file: &File) -> String {
    let Some(source) = file.source() else { return String::new() };
    let apart = source.code.as_bytes().iter().zip(source.comments.as_bytes());
    let inside = file.text.bytes().zip(apart).map(|(byte, apart)| {
        let is_literal = matches!(apart, (b' ', b' '));
        if is_literal { byte } else { b'\n' }
    });
    String::from_utf8_lossy(&inside.collect::<Vec<u8>>()).replace("\\n", "\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEYS: &str = "[node]\n# Name. Default: none.\nname = \"a\"\n# log-file = \"x\"\n\
                        # { tcp = true }, or { http = \"/path\", host-2 = \"b\" }\nname = \"again\"\n";

    fn check(path: &str, test: &str) -> Vec<String> {
        let file = |path: &str, text: &str| File { path: path.to_owned(), text: text.to_owned() };
        let mut found = Vec::new();
        super::check(&[file(REFERENCE, KEYS), file(path, test)], &mut found);
        found.iter().map(|violation| format!("{}: {}", violation.line, violation.message)).collect()
    }

    #[test]
    fn a_key_that_no_test_writes_is_found() {
        let all = "const A: &str = \"name = \\\"b\\\"\\nlog-file = \\\"x\\\"\\nhealth = {{ tcp = true, http = 1, host-2 = 2 }}\";";
        assert_eq!(check("tests/e2e/a.rs", all), Vec::<String>::new());
        assert_eq!(check("crates/control/src/a.rs", all).len(), 5);
        let lines = check("tests/e2e/a.rs", &all.replace("http", "https").replace("\\nlog", "\\nblog"));
        assert!(lines.len() == 2 && lines[0].starts_with("5: ") && lines[1].starts_with("4: "), "{lines:?}");
    }

    #[test]
    fn code_and_comments_write_nothing() {
        let nothing = "/// name = \"b\"\nfn a() { let name = 1; let tcp = name; // tcp = true\n}";
        assert_eq!(check("tests/e2e/a.rs", nothing).len(), 5);
    }
}
