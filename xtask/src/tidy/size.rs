//! Files, functions and structs that grew too large to be understood at once.

use super::Violation;
use super::files::File;
use super::source::Source;

/// Longest file, lines.
pub const FILE_LINES_MAX: usize = 800;
/// Longest function, lines, from `fn` to the closing brace.
pub const FUNCTION_LINES_MAX: usize = 70;
/// Most arguments of a function, `self` among them.
pub const ARGUMENTS_MAX: usize = 7;
/// Most fields of a struct.
pub const FIELDS_MAX: usize = 15;

/// Measures a file, its functions and its structs.
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
    for function in source.functions.iter().flatten() {
        let (name, lines) = (&function.name, function.lines.1 + 1 - function.lines.0);
        if lines > FUNCTION_LINES_MAX {
            let message =
                format!("`{name}` has {lines} lines; at most {FUNCTION_LINES_MAX}: split it by what it does");
            report(function.lines.0, "function-lines", message);
        }
        if function.arguments > ARGUMENTS_MAX {
            let message = format!(
                "`{name}` has {} arguments; at most {ARGUMENTS_MAX}: those that belong together make a type",
                function.arguments
            );
            report(function.lines.0, "arguments", message);
        }
    }
    for (name, line, fields) in &source.structs {
        if *fields > FIELDS_MAX {
            let message = format!(
                "`{name}` has {fields} fields; at most {FIELDS_MAX}: give each duty a part of its own"
            );
            report(*line, "struct-fields", message);
        }
    }
}
