//! Nothing unfinished, nothing left over from a search for a fault, no test that does not run.

use super::Violation;
use super::files::File;
use super::source::Source;

const BANNED: &[(&str, &str)] = &[
    ("todo!", "write it, or leave it out"),
    ("unimplemented!", "write it, or leave it out"),
    ("dbg!", "use tracing, or remove it"),
    ("#[ignore", "a test that does not run proves nothing: make it run or remove it"),
];

/// Looks for what should not be committed.
pub fn check(file: &File, source: &Source, found: &mut Vec<Violation>) {
    for (text, instead) in BANNED {
        for (at, _) in source.code.match_indices(text) {
            let message = format!("`{}`: {instead}", text.trim_start_matches("#["));
            found.push(Violation {
                file: file.path.clone(),
                line: source.line(at),
                rule: "unfinished",
                message,
            });
        }
    }
}
