//! Each row of the mission has a test that runs the real program and names the row.

use super::Violation;
use super::files::File;
use super::source::is_name;

/// Rows that are built.
const ROWS: &[&str] = &[
    "T1", "T2", "T3", "T4", "T10", "T11", "T13", "C1", "C2", "C3", "C4", "C5", "C6", "C7", "C8", "C9", "C10",
    "R1", "R4", "R5", "R7", "R8", "R11",
];

/// Folder of the tests that run the real program.
const FOLDER: &str = "tests/";

/// Looks for each row in the comments above those tests, or in their names (`t4_…`).
pub fn check(files: &[File], found: &mut Vec<Violation>) {
    let named: Vec<String> = files
        .iter()
        .filter(|file| file.path.starts_with(FOLDER))
        .filter_map(File::source)
        .flat_map(|source| {
            let functions: Vec<(usize, String)> =
                source.functions().map(|function| (function.lines.0, function.name.to_uppercase())).collect();
            functions
                .into_iter()
                .map(move |(line, name)| format!("{} {}", above(&source, line), name.replace('_', " ")))
        })
        .collect();
    for row in ROWS {
        if !named.iter().any(|text| has_word(text, row)) {
            let (file, line, rule) = (FOLDER.to_owned(), 1, "mission-row");
            let message = format!(
                "no test of the real program names row {row}: put it in the comment above the test's function"
            );
            found.push(Violation { file, line, rule, message });
        }
    }
}

/// The comments right above a line, with the attributes between left out.
fn above(source: &super::source::Source, line: usize) -> String {
    let lines = source.code.lines().zip(source.comments.lines()).take(line - 1);
    let lines: Vec<(&str, &str)> = lines.collect();
    let near = lines.iter().rev().take_while(|(code, comment)| {
        code.trim().starts_with("#[") || (code.trim().is_empty() && !comment.trim().is_empty())
    });
    near.map(|(_, comment)| *comment).collect::<Vec<_>>().join(" ")
}

fn has_word(text: &str, word: &str) -> bool {
    text.match_indices(word).any(|(at, _)| {
        let bytes = text.as_bytes();
        at.checked_sub(1).is_none_or(|at| !is_name(bytes[at]))
            && bytes.get(at + word.len()).is_none_or(|byte| !is_name(*byte))
    })
}
