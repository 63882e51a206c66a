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
    let seen: Vec<_> = source.functions.into_iter().flatten().map(|f| (f.name, f.lines)).collect();
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
         `docs/gone.md` `docs/wire.md` `docs/<name>.md`\n{}\nsee crates/a/src/b.rs, Gone.md and (design §4)\n",
        ["co-Authored", "-by: somebody"].concat()
    );
    let mut found = Vec::new();
    let exists = |path: &str| path == "docs/wire.md";
    text::check(&file("docs/page.md", &text), &exists, &mut found);
    let seen: Vec<_> = found.iter().map(|v| (v.line, v.rule)).collect();
    assert_eq!(
        seen,
        [
            (1, "machine-path"),
            (2, "machine-path"),
            (3, "dead-link"),
            (4, "dead-link"),
            (5, "origin"),
            (6, "dead-link"),
            (6, "dead-link"),
            (6, "dead-link")
        ]
    );
    assert!(found[2].message.contains("`gone.md`"), "{}", found[2]);
}

#[test]
fn many_arguments_and_fields() {
    let text = |count: usize| {
        let list = |name: &str| (0..count).map(|n| format!("{name}{n}: u8")).collect::<Vec<_>>().join(", ");
        format!("struct S {{ {} }}\nimpl S {{\n fn f({}) {{}}\n}}\n", list("f"), list("a"))
    };
    assert!(found(size::check, "sim/src/a.rs", &text(7)).is_empty());
    assert_eq!(found(size::check, "sim/src/a.rs", &text(8)), ["3: arguments"]);
    assert_eq!(found(size::check, "sim/src/a.rs", &text(16)), ["3: arguments", "1: struct-fields"]);
}

#[test]
fn names_of_the_field_and_documentation_that_begins_with_one() {
    let text = "//! What it is.\n//! What more.\n/// A thing.\n/// What it is for.\nstruct Letter;\n// What we do\n\
                /// What it does.\nfn letter() { train(); let restrain = \"train\"; }\n";
    assert_eq!(
        found(words::check, "sim/src/a.rs", text),
        ["5: name", "8: name", "1: doc-first-word", "7: doc-first-word"]
    );
}

#[test]
fn numbers_of_the_ratchet_only_fall() {
    let violation =
        |rule, file: &str, line| Violation { file: file.to_owned(), line, rule, message: String::new() };
    let one = |line| violation("name", "crates/packet/src/a.rs", line);
    let allowed = ratchet::parse("# text\nname crates/packet 2\nname sim 5\n").unwrap();
    assert!(ratchet::parse("unsafe sim 5").is_err() && ratchet::parse("name sim few").is_err());
    assert!(ratchet::apply(&allowed, vec![one(1), one(2)]).is_empty());
    assert_eq!(ratchet::apply(&allowed, vec![one(1), one(2), one(3)]).len(), 3);
    assert_eq!(ratchet::apply(&allowed, vec![violation("name", "xtask/src/a.rs", 1)]).len(), 1);
    assert_eq!(ratchet::apply(&allowed, vec![violation("unsafe", "sim/src/a.rs", 1)]).len(), 1);
    let text = ratchet::lowered(&allowed, &[one(1), one(2), one(3), violation("name", "sim/src/a.rs", 1)]);
    let numbers: Vec<usize> = ratchet::parse(&text).unwrap().into_values().collect();
    assert_eq!(numbers, [2, 1], "{text}");
}

#[test]
fn rows_and_tests_name_each_other() {
    let page = "# Rows\n| row | words | proof |\n|---|---|---|\n\
                | T1 | a | `a::a` |\n| T2 | b | `a::a` |\n| T3 | c | |\n| T4 | d | not yet |\n| T5 | e | not yet |\n| T6 | f | `a::gone` |\n";
    let text = "/// Row T1 and T10.\n#[test]\nfn a() {}\n\n// T2\n\nfn b() {}\n#[test]\nfn t4_and_more() {}\n/// T3\nfn no_test() {}\n";
    let mut found = Vec::new();
    rows::check(&[file(rows::PAGE, page), file("tests/e2e/a.rs", text)], &mut found);
    let seen: Vec<String> = found.iter().map(|v| format!("{}: {}", v.line, v.message)).collect();
    let wanted = [
        "5: `a::a` does not name T2: say so above its function",
        "6: row T3 has no test: name one, or say \"not yet\"",
        "7: `a::t4_and_more` names row T4: put it here",
        "9: there is no test `a::gone` in tests/e2e/",
        "1: `a::a` names row T10, which this page does not have",
    ];
    assert_eq!(seen, wanted);
}

#[test]
fn the_oldest_rust_is_one_everywhere() {
    let metadata = json!({ "packages": [
        { "name": "packet", "rust_version": "1.90" }, { "name": "sim", "rust_version": "1.91" },
    ]});
    let files = [
        file("clippy.toml", "msrv = \"1.90\"\n"),
        file("README.md", "Rust 1.89 or newer; Rust and C"),
        file(".github/workflows/ci.yml", "RUST_OLDEST: \"1.90\"\n"),
    ];
    let mut found = Vec::new();
    versions::check(&metadata, &files, &mut found);
    assert_eq!(found.iter().map(|v| v.file.as_str()).collect::<Vec<_>>(), ["Cargo.toml", "README.md"]);
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
