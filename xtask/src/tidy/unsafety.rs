//! `unsafe` only in the crate `linux`, and never without a reason beside it.

use super::Violation;
use super::files::File;
use super::source::Source;

const HOME: &str = "crates/linux";

/// Looks at every `unsafe`.
pub fn check(file: &File, source: &Source, found: &mut Vec<Violation>) {
    for at in source.words("unsafe") {
        let line = source.line(at);
        let mut report = |rule, message: &str| {
            found.push(Violation { file: file.path.clone(), line, rule, message: message.to_owned() });
        };
        if file.package() != HOME {
            report("unsafe", "`unsafe` outside of crates/linux: give that crate a safe function for it");
        }
        let what = source.code[at + "unsafe".len()..].trim_start();
        let asserts = what.starts_with('{') || what.starts_with("impl");
        if asserts && !has_reason(source, line) {
            report("safety", "no `// SAFETY:` above this `unsafe`: say why it is sound");
        }
    }
}

/// Whether a comment on this line, or right above the statement it belongs to, begins with SAFETY.
fn has_reason(source: &Source, line: usize) -> bool {
    let code: Vec<&str> = source.code.lines().collect();
    let comments: Vec<&str> = source.comments.lines().collect();
    let has = |index: usize| comments.get(index).is_some_and(|comment| comment.contains("SAFETY:"));
    let mut index = line - 1;
    loop {
        if has(index) {
            return true;
        }
        let Some(above) = index.checked_sub(1) else { return false };
        // The statement above this one ends there.
        let ends = code[above].trim_end().ends_with([';', '{', '}']);
        if ends && !has(above) {
            return false;
        }
        index = above;
    }
}
