//! The rows of `docs/requirements.md` and the tests of the real program, compared both ways.

use std::collections::BTreeMap;

use super::Violation;
use super::files::File;
use super::source::{Source, words};

/// The page with one line for each row: `| T1 | words | tests or "not yet" |`.
pub const PAGE: &str = "docs/requirements.md";

/// Folder of the tests that run the real program.
const FOLDER: &str = "tests/e2e/";

/// A line of the page.
struct Row<'a> {
    line: usize,
    code: &'a str,
    tests: Vec<&'a str>,
    is_open: bool,
}

/// Compares rows and tests, and looks for rows that comments name and the page does not have.
pub fn check(files: &[File], found: &mut Vec<Violation>) {
    let Some(page) = files.iter().find(|file| file.path == PAGE) else { return };
    let rows = rows(&page.text);
    let tests: BTreeMap<String, String> =
        files.iter().filter(|file| file.path.starts_with(FOLDER)).flat_map(tests).collect();
    let mut report = |line, message: String| {
        found.push(Violation { file: PAGE.to_owned(), line, rule: "mission-row", message });
    };
    for row in &rows {
        for test in &row.tests {
            match tests.get(*test) {
                None => report(row.line, format!("there is no test `{test}` in {FOLDER}")),
                Some(said) if !names(said, row.code) => {
                    report(
                        row.line,
                        format!("`{test}` does not name {}: say so above its function", row.code),
                    );
                }
                Some(_) => {}
            }
        }
        let named = tests.iter().find(|(_, said)| names(said, row.code));
        match (row.tests.is_empty(), named) {
            (true, Some((test, _))) => {
                report(row.line, format!("`{test}` names row {}: put it here", row.code));
            }
            (true, None) if !row.is_open => {
                report(row.line, format!("row {} has no test: name one, or say \"not yet\"", row.code));
            }
            _ => {}
        }
    }
    for (test, said) in &tests {
        for code in codes(said).filter(|code| !rows.iter().any(|row| row.code == *code)) {
            report(1, format!("`{test}` names row {code}, which this page does not have"));
        }
    }
}

/// The rows of the page.
fn rows(page: &str) -> Vec<Row<'_>> {
    let lines = page.lines().enumerate();
    lines
        .filter_map(|(index, line)| {
            let mut cells = line.strip_prefix("| ")?.split('|').map(str::trim);
            let (code, _, proof) = (cells.next()?, cells.next()?, cells.next()?);
            is_code(code).then(|| Row {
                line: index + 1,
                code,
                tests: proof.split('`').skip(1).step_by(2).collect(),
                is_open: proof.contains("not yet"),
            })
        })
        .collect()
}

/// The tests of a file, and the words of each that may name rows: the comment above it, and its name.
fn tests(file: &File) -> Vec<(String, String)> {
    let Some(source) = file.source() else { return Vec::new() };
    let module = file.path[FOLDER.len()..].trim_end_matches(".rs").replace('/', "::");
    let functions = source.functions.iter().flatten();
    functions
        .filter_map(|function| {
            let (is_test, above) = above(&source, function.lines.0);
            let said = format!("{above} {}", function.name.to_uppercase().replace('_', " "));
            is_test.then(|| (format!("{module}::{}", function.name), said))
        })
        .collect()
}

/// Whether the attributes right above a line make a test of it, and the comments between and above them.
fn above(source: &Source, line: usize) -> (bool, String) {
    let lines: Vec<(&str, &str)> = source.code.lines().zip(source.comments.lines()).take(line - 1).collect();
    let near = lines.iter().rev().take_while(|(code, comment)| {
        code.trim().starts_with("#[") || (code.trim().is_empty() && !comment.trim().is_empty())
    });
    let near: Vec<&(&str, &str)> = near.collect();
    let is_test = near.iter().any(|(code, _)| code.trim() == "#[test]");
    (is_test, near.iter().map(|(_, comment)| *comment).collect::<Vec<_>>().join(" "))
}

fn names(text: &str, code: &str) -> bool {
    words(text, code).next().is_some()
}

/// Every word of `text` that has the form of a row's code.
fn codes(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| is_code(word))
}

fn is_code(word: &str) -> bool {
    let number = word.strip_prefix(['T', 'C', 'D', 'R']).unwrap_or("");
    (1..=2).contains(&number.len()) && number.bytes().all(|byte| byte.is_ascii_digit())
}
