//! Every drop reason is raised somewhere: one that nothing raises is a counter that stays at zero and explains nothing.

use std::collections::BTreeSet;

use super::Violation;
use super::files::File;
use super::source::{Source, words};

/// Where the reasons are listed.
pub const LIST: &str = "crates/packet/src/drop_reason.rs";
/// In front of the list, and behind it.
const BEGIN: &str = "\ndrop_reasons! {\n";
const END: &str = "\n}";

/// Reasons of the list, and those that code outside of tests raises.
#[derive(Default)]
pub struct DropReasons {
    /// With the line of each.
    listed: Vec<(String, usize)>,
    raised: BTreeSet<String>,
}

impl DropReasons {
    /// Reads one file.
    pub fn read(&mut self, file: &File, source: &Source) {
        if file.path == LIST {
            self.listed = list(source);
        } else if !file.is_test() && !file.path.starts_with("crates/testbed/") {
            let places = words(&source.code, "DropReason").filter(|at| !source.is_test(*at));
            self.raised.extend(places.filter_map(|at| raised(&source.code, at)).map(str::to_owned));
        }
    }

    /// Looks for reasons that nothing raises.
    pub fn check(self, found: &mut Vec<Violation>) {
        for (name, line) in self.listed.into_iter().filter(|(name, _)| !self.raised.contains(name)) {
            let message =
                format!("nothing raises `DropReason::{name}`: raise it where it belongs, or remove it");
            found.push(Violation { file: LIST.to_owned(), line, rule: "drop-reason", message });
        }
    }
}

/// The reasons of the list, each with its line.
fn list(source: &Source) -> Vec<(String, usize)> {
    let Some(begin) = source.code.find(BEGIN).map(|at| at + BEGIN.len()) else { return Vec::new() };
    let Some(length) = source.code[begin..].find(END) else { return Vec::new() };
    let first = source.line(begin);
    let lines = source.code[begin..begin + length].lines().enumerate();
    lines
        .filter_map(|(index, line)| {
            let name = line.split_whitespace().next()?;
            name.starts_with(|c: char| c.is_ascii_uppercase()).then(|| (name.to_owned(), first + index))
        })
        .collect()
}

/// The reason that is named where `DropReason` stands at `at`, unless it is only compared with.
fn raised(code: &str, at: usize) -> Option<&str> {
    let rest = code[at..].strip_prefix("DropReason::")?;
    let length = rest.find(|c: char| !c.is_ascii_alphanumeric()).unwrap_or(rest.len());
    let (name, behind) = rest.split_at(length);
    let (before, behind) = (code[..at].trim_end(), behind.trim_start());
    let before = before.strip_suffix("packet::").unwrap_or(before).trim_end();
    let is_pattern = ["=>", "|", "if ", ") =>", ") |"].iter().any(|next| behind.starts_with(next))
        && !behind.starts_with("||");
    let is_compared = ["==", "!=", "@"].iter().any(|last| before.ends_with(last));
    // Behind the arguments of a closure it is raised, behind another reason it is one more pattern.
    let earlier = before.strip_suffix('|').and_then(|earlier| earlier.rsplit('|').next());
    let is_alternative = earlier.is_some_and(|earlier| earlier.contains("DropReason"));
    (!is_pattern && !is_compared && !is_alternative).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(code: &str) -> Vec<String> {
        let file = |path: &str, text: &str| File { path: path.to_owned(), text: text.to_owned() };
        let list = file(
            LIST,
            "macro_rules! drop_reasons { () => {} }\n\ndrop_reasons! {\n    // of packets\n    Late \"late\" \"Came Late.\",\n    \
             Full \"full\" \"No room.\",\n}\n",
        );
        let mut reasons = DropReasons::default();
        for file in [list, file("crates/tunnel/src/a.rs", code)] {
            let source = file.source().unwrap_or_else(|| panic!("{} is Rust", file.path));
            reasons.read(&file, &source);
        }
        let mut found = Vec::new();
        reasons.check(&mut found);
        found.iter().map(|violation| format!("{}: {}", violation.line, violation.message)).collect()
    }

    #[test]
    fn a_reason_that_is_only_compared_with_is_not_raised() {
        let raises =
            "fn a() { if full { return Err(DropReason::Full); } a.map_err(|_| packet::DropReason::Late) }\n";
        assert_eq!(check(raises), Vec::<String>::new());
        for compares in [
            "fn a() { match reason { DropReason::Late => 1, _ => DropReason::Full } }",
            "fn a() { if reason == DropReason::Late { drop(DropReason::Full) } }",
            "fn a() { match r { Err(DropReason::Late) => 1, DropReason::Full | DropReason::Late => b(DropReason::Full) } }",
            "// DropReason::Late\nfn a() { drop(DropReason::Full) }\n#[cfg(test)]\nmod tests { fn b() { drop(DropReason::Late) } }",
        ] {
            let found = check(compares);
            assert_eq!(found.len(), 1, "{compares}: {found:?}");
            assert!(
                found.iter().all(|found| found.starts_with("5: ") && found.contains("Late")),
                "{found:?}"
            );
        }
    }
}
