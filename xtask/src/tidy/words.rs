//! Words of code and comments: names of the field, and documentation that begins with one.

use super::Violation;
use super::files::File;
use super::source::{Source, words};

/// Names that a network engineer would not guess, and what the field says.
const NAMES: &[(&str, &str)] = &[
    ("Letter", "command"),
    ("Keeper", "control thread"),
    ("keeper", "control thread"),
    ("lie_down", "prepare_sleep"),
    ("get_up", "woke"),
    ("Train", "GSO batch"),
    ("Trains", "GSO batches"),
    ("train", "GSO batch"),
    ("trains", "GSO batches"),
    ("couple", "append to a GSO batch"),
    ("Begun", "BloomFilter"),
    ("LOOP", "HAIRPIN"),
    ("shifted", "proxy_protocol"),
    ("course", "resolution"),
    ("judge", "filter"),
    ("stops", "owner_chain"),
    ("neighbour", "neighbor"),
    ("neighbours", "neighbors"),
    ("Neighbour", "Neighbor"),
];

/// Looks for names that have better ones, in code, and for documentation that begins with "What".
pub fn check(file: &File, source: &Source, found: &mut Vec<Violation>) {
    for (name, instead) in NAMES {
        for at in words(&source.code, name) {
            found.push(Violation {
                file: file.path.clone(),
                line: source.line(at),
                rule: "name",
                message: format!("`{name}`: the field says {instead}"),
            });
        }
    }
    let mut above = "";
    for (index, comment) in source.comments.lines().enumerate() {
        let comment = comment.trim();
        let kind = ["//!", "///"].into_iter().find(|kind| comment.starts_with(kind)).unwrap_or("");
        let first = comment[kind.len()..].split_whitespace().next();
        if kind != above && !kind.is_empty() && first == Some("What") {
            found.push(Violation {
                file: file.path.clone(),
                line: index + 1,
                rule: "doc-first-word",
                message: "documentation begins with a noun or verb of the field, not with \"What\""
                    .to_owned(),
            });
        }
        above = kind;
    }
}
