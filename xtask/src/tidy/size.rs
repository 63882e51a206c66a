//! Files and functions that grew too long to be read at once.

use super::Violation;
use super::files::File;
use super::source::Source;

/// Longest file, lines.
pub const FILE_LINES_MAX: usize = 800;
/// Longest function, lines, from `fn` to the closing brace.
pub const FUNCTION_LINES_MAX: usize = 70;

/// Measures a file and its functions.
pub fn check(file: &File, source: &Source, found: &mut Vec<Violation>) {
    let mut report = |line, rule, message| {
        found.push(Violation { file: file.path.clone(), line, rule, message });
    };
    let lines = source.line_count();
    if lines > FILE_LINES_MAX {
        let message =
            format!("{lines} lines; at most {FILE_LINES_MAX}: give one responsibility a file of its own");
        report(1, "file-lines", message);
    }
    for function in source.functions() {
        let lines = function.lines.1 + 1 - function.lines.0;
        if lines > FUNCTION_LINES_MAX {
            let message = format!(
                "`{}` has {lines} lines; at most {FUNCTION_LINES_MAX}: split it by what it does",
                function.name
            );
            report(function.lines.0, "function-lines", message);
        }
    }
}
