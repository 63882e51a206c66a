//! Each rule finds what it is for and lets pass what is right; and the repository keeps them all.
#![allow(clippy::unwrap_used, reason = "tests")]

use serde_json::json;

use super::exceptions::Exception;
use super::files::File;
use super::source::Source;
use super::*;

fn file(path: &str, text: &str) -> File {
    File { path: path.to_owned(), text: text.to_owned() }
}

/// Violations of one rule module for one Rust file, as `line: rule`.
fn found(check: fn(&File, &Source, &mut Vec<Violation>), path: &str, text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let file = file(path, text);
    check(&file, &file.source().unwrap(), &mut found);
    found.iter().map(|violation| format!("{}: {}", violation.line, violation.rule)).collect()
}

#[test]
fn the_repository_keeps_the_rules() {
    let violations = check(crate::root()).unwrap();
    let text: Vec<String> = violations.iter().map(ToString::to_string).collect();
    assert!(text.is_empty(), "\n{}\n", text.join("\n"));
}

#[test]
fn comments_and_strings_are_no_code() {
    let text = r##"let a = "x // y { unsafe"; // unsafe {
/* outer /* inner */ still */ let b = '{'; let c: &'static str = r#"} " "#; let d = b"\"{"; let e = '\'';
"##;
    let source = Source::new(text);
    assert_eq!(source.code.len(), text.len());
    assert_eq!(source.words("unsafe").count(), 0);
    assert!(!source.code.contains(['{', '}']), "{}", source.code);
    assert!(source.code.contains("&'static str"), "{}", source.code);
    assert!(source.code.contains("let e ="), "{}", source.code);
    assert!(source.comments.contains("unsafe {") && source.comments.contains("still"), "{}", source.comments);
    assert!(!source.comments.contains("let"), "{}", source.comments);
}

#[test]
fn functions_are_measured_to_their_own_brace() {
    let text = "fn short(a: [u8; 2]) -> u8 where u8: Copy {\n if a { '}' } else { 1 }\n}\ntrait T {\n fn none();\n}\n\
                fn outer() {\n fn inner() {}\n}\n";
    let source = Source::new(text);
    let seen: Vec<_> = source.functions().map(|f| (f.name.to_owned(), f.lines)).collect();
    let expected = [("short", (1, 3)), ("outer", (7, 9)), ("inner", (8, 8))];
    assert_eq!(seen, expected.map(|(name, lines)| (name.to_owned(), lines)));
}

#[test]
fn long_files_and_functions() {
    let body = |lines: usize| format!("fn f() {{\n{}}}\n", "f();\n".repeat(lines - 2));
    assert!(found(size::check, "sim/src/a.rs", &body(70)).is_empty());
    assert_eq!(found(size::check, "sim/src/a.rs", &body(71)), ["1: function-lines"]);
    assert!(found(size::check, "sim/src/a.rs", &"//\n".repeat(800)).is_empty());
    assert_eq!(found(size::check, "sim/src/a.rs", &"//\n".repeat(801)), ["1: file-lines"]);
}

#[test]
fn pure_crates_have_no_clock() {
    let text = "use std::time::Instant;\n// Instant::now() is not for us\nlet a = \"SystemTime\";\nstruct InstantLike;\n";
    assert_eq!(found(purity::check, "crates/tunnel/src/a.rs", text), ["1: sans-io"]);
    assert_eq!(found(purity::check, "sim/src/a.rs", text), ["1: sans-io"]);
    assert!(found(purity::check, "crates/engine/src/a.rs", text).is_empty());
}

#[test]
fn pure_crates_have_threads_in_tests_only() {
    let text =
        "fn a() { std::thread::scope(f) }\n#[cfg(test)]\nmod tests { fn b() { std::thread::scope(f) } }\n";
    assert_eq!(found(purity::check, "crates/packet/src/a.rs", text), ["1: sans-io"]);
    assert!(found(purity::check, "crates/packet/src/a/tests.rs", text).is_empty());
    assert!(found(purity::check, "crates/packet/tests/a.rs", text).is_empty());
}

#[test]
fn unsafe_is_at_home_in_linux_and_has_reasons() {
    let good = "// SAFETY: it is.\nlet a =\n    unsafe { b() };\n/// # Safety\nunsafe fn c() {}\n";
    assert!(found(unsafety::check, "crates/linux/src/a.rs", good).is_empty());
    assert_eq!(found(unsafety::check, "crates/engine/src/a.rs", good), ["3: unsafe", "5: unsafe"]);
    let bad = "// SAFETY: of another.\nlet a = 1;\nlet b = unsafe { c() };\nunsafe impl Send for D {}\n";
    assert_eq!(found(unsafety::check, "crates/linux/src/a.rs", bad), ["3: safety", "4: safety"]);
}

#[test]
fn unfinished_code() {
    let text =
        "todo!();\n// todo!()\nlet a = \"dbg!(1)\";\ndbg!(1);\n#[ignore]\nfn a() { unimplemented!() }\n";
    let mut lines = found(macros::check, "sim/src/a.rs", text);
    lines.sort();
    assert_eq!(lines, ["1: unfinished", "4: unfinished", "5: unfinished", "6: unfinished"]);
}

#[test]
fn texts_name_no_machine_and_no_missing_file() {
    let home = ["/ho", "me"].concat();
    let text = format!(
        "see {home}/me/x and `{home}`\n~{home}/no, some{home}/no, {home}work no\n[a](wire.md#x) [b](../gone.md) [c](https://x.y/)\n\
         `docs/gone.md` `docs/wire.md` `docs/<name>.md`\n{}\n",
        ["co-Authored", "-by: somebody"].concat()
    );
    let mut found = Vec::new();
    let exists = |path: &str| path == "docs/wire.md";
    text::check(&file("docs/page.md", &text), &exists, &mut found);
    let seen: Vec<_> = found.iter().map(|v| (v.line, v.rule)).collect();
    assert_eq!(
        seen,
        [(1, "machine-path"), (2, "machine-path"), (3, "dead-link"), (4, "dead-link"), (5, "origin")]
    );
    assert!(found[2].message.contains("`gone.md`"), "{}", found[2]);
}

#[test]
fn every_row_wants_a_test_that_names_it() {
    let text = "/// Row T1 and T10.\n#[test]\nfn a() {}\n\n// T2\n\nfn b() {}\n/// T3T\nfn t4_and_t11() {}\n/// T13\nfn c() {}\n";
    let mut found = Vec::new();
    rows::check(
        &[file("tests/e2e/a.rs", text), file("crates/tunnel/src/a.rs", "/// T2\nfn a() {}")],
        &mut found,
    );
    let rows = found.iter().filter_map(|v| v.message.split(['w', ':']).nth(1));
    let tunnel_rows: Vec<_> = rows.filter(|row| row.starts_with(" T")).collect();
    assert_eq!(tunnel_rows, [" T2", " T3"]);
}

#[test]
fn dependencies_point_one_way() {
    let package = |name: &str, dependencies: serde_json::Value| json!({ "name": name, "manifest_path": format!("/r/crates/{name}/Cargo.toml"), "dependencies": dependencies });
    let metadata = json!({ "workspace_root": "/r", "packages": [
        package("tunnel", json!([{ "name": "packet", "path": "/r/crates/packet" }, { "name": "linux", "path": "/r/crates/linux" }])),
        package("sim", json!([{ "name": "tokio", "kind": null }, { "name": "proptest", "kind": "dev" }])),
        package("control", json!([{ "name": "testbed", "path": "/r/crates/testbed", "kind": "dev" }])),
        package("engine", json!([{ "name": "control", "path": "/r/crates/control" }])),
        package("novelty", json!([])),
    ]});
    let mut found = Vec::new();
    graph::check(&metadata, &mut found);
    let seen: Vec<_> = found.iter().map(|v| v.file.as_str()).collect();
    assert_eq!(seen, ["tunnel", "sim", "engine", "novelty"].map(|name| format!("crates/{name}/Cargo.toml")));
    assert!(found[0].message.contains("`tunnel` must not depend on `linux`"), "{}", found[0]);
}

#[test]
fn exceptions_cover_what_they_name_and_nothing_else() {
    let violation = |file: &str, message: &str| Violation {
        file: file.to_owned(),
        line: 3,
        rule: "unsafe",
        message: message.to_owned(),
    };
    let exception = |file, about| Exception { rule: "unsafe", file, about, reason: "measured" };
    let list = [exception("a.rs", "`x`"), exception("b.rs", "")];
    let kept = exceptions::apply(&list, vec![violation("a.rs", "`x` is"), violation("a.rs", "`y` is")]);
    let seen: Vec<_> = kept.iter().map(|v| (v.file.as_str(), v.rule)).collect();
    assert_eq!(seen, [("b.rs", "exception"), ("a.rs", "unsafe")]);
}
