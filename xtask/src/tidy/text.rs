//! Rules for everything that people read: no paths of one machine, no dead links.

use super::Violation;
use super::files::File;

/// Folders that exist on somebody's machine only. In two parts each, so that this file does not break its rule.
const MACHINE_FOLDERS: &[(&str, &str)] = &[("/wo", "rk"), ("/ro", "ot"), ("/ho", "me"), ("/Us", "ers")];

/// Texts that speak about how a change came to be and not about the program, again in two parts.
const ORIGINS: &[(&str, &str)] = &[
    ("co-authored", "-by"),
    ("generated", " with"),
    ("generated", " by an"),
    ("contract", ".md"),
    ("house", " rules"),
    ("language", " model"),
    ("the brief", " says"),
];

/// Folders whose files may be named in texts; such a file has to exist.
const LINKED: &[&str] = &[
    "docs/",
    ".ci/",
    ".github/",
    "etc/",
    "bench/",
    "crates/",
    "fuzz/",
    "sim/",
    "tests/",
    "xtask/",
    "research/",
];

/// Endings of files that people write.
const ENDINGS: &[&str] = &[".md", ".rs", ".toml", ".sh", ".txt", ".yml", ".service"];

/// Looks at every line of a text. `exists` knows the workspace's files.
pub fn check(file: &File, exists: &dyn Fn(&str) -> bool, found: &mut Vec<Violation>) {
    if file.path == "Cargo.lock" {
        return;
    }
    for (index, line) in file.text.lines().enumerate() {
        let mut report = |rule, message| {
            found.push(Violation { file: file.path.clone(), line: index + 1, rule, message });
        };
        for (first, second) in MACHINE_FOLDERS {
            let folder = format!("{first}{second}");
            if names_folder(line, &folder) {
                report("machine-path", format!("`{folder}` is a folder of one machine: use a relative path"));
            }
        }
        let lower = line.to_lowercase();
        for (first, second) in ORIGINS {
            let origin = format!("{first}{second}");
            if lower.contains(&origin) {
                let message = format!("`{origin}`: say what the program does, not how the text came to be");
                report("origin", message);
            }
        }
        for link in links(file, line) {
            // A package's own files are named from its folder too.
            if !exists(&link) && !exists(&format!("{}/{link}", file.package())) {
                report("dead-link", format!("`{link}` does not exist: write it, or correct the link"));
            }
        }
    }
}

/// Whether `line` has an absolute path that begins with `folder`.
fn names_folder(line: &str, folder: &str) -> bool {
    line.match_indices(folder).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        let after = line[at + folder.len()..].chars().next();
        before.is_none_or(|c| !c.is_alphanumeric() && !matches!(c, '.' | '/' | '-' | '_' | '*' | '}' | '>'))
            && after.is_none_or(|c| !c.is_alphanumeric() && !matches!(c, '-' | '_'))
    })
}

/// Files of the workspace that a line points to.
fn links(file: &File, line: &str) -> Vec<String> {
    let is_page = file.path.ends_with(".md");
    let mut links = Vec::new();
    if is_page {
        let targets =
            line.match_indices("](").filter_map(|(at, _)| line[at + 2..].split([')', '#', ' ']).next());
        let local = |target: &&str| !target.is_empty() && !target.contains(':') && !target.starts_with('<');
        links.extend(targets.filter(local).map(|target| resolve(&file.path, target)));
    }
    if is_page || line.trim_start().starts_with("//") || line.starts_with('#') {
        let is_path = |c: char| c.is_ascii_alphanumeric() || "./_-".contains(c);
        // A pattern such as `docs/*.md` or `docs/<name>.md` names no file.
        let words = line.split(|c: char| !is_path(c) && !"*<>{}$…".contains(c));
        for path in words.filter(|word| word.chars().all(is_path)).map(|word| word.trim_end_matches('.')) {
            let in_folder = LINKED.iter().any(|folder| path.starts_with(folder));
            // A page of the first folder: in capitals, as README.md.
            let is_page = !path.contains('/')
                && path.starts_with(|c: char| c.is_ascii_uppercase())
                && path.ends_with(".md");
            if is_page || (in_folder && ENDINGS.iter().any(|ending| path.ends_with(ending))) {
                links.push(path.to_owned());
            }
        }
        // What went into other pages.
        if ["design ", "design, "].iter().any(|page| line.contains(&format!("{page}§"))) {
            links.push(["docs/desi", "gn.md"].concat());
        }
    }
    links
}

/// `target` as seen from the folder of `from`.
fn resolve(from: &str, target: &str) -> String {
    let mut parts: Vec<&str> = from.split('/').collect();
    parts.pop();
    if target.starts_with('/') {
        parts.clear();
    }
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            name => parts.push(name),
        }
    }
    parts.join("/")
}
