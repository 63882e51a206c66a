//! Work on the repository itself: `cargo xtask test` runs every test on any machine, `cargo xtask tidy` checks the rules.
//!
//! The rules are checked by an ordinary test of this package too, so `cargo test --workspace` includes them.

mod commits;
mod programs;
mod test;
mod tidy;

use std::io::Write as _;
use std::path::Path;
use std::process::ExitCode;

const HELP: &str =
    "cargo xtask tidy    check dependency direction, purity, unsafe, sizes, texts and links\n\n";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let run = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["tidy"] => tidy_up(),
        ["tidy", "--lower"] => tidy::lower(root()).map(|()| ExitCode::SUCCESS),
        ["commits", range] => commits::run(range),
        ["test", "help" | "--help" | "-h"] => say(test::HELP).map(|()| ExitCode::SUCCESS),
        ["test", ref arguments @ ..] => test::run(arguments),
        ["help" | "--help" | "-h"] => help().map(|()| ExitCode::SUCCESS),
        _ => help().map(|()| ExitCode::from(2)),
    };
    run.unwrap_or_else(|error| {
        let _ = writeln!(std::io::stderr(), "xtask: {error:#}");
        ExitCode::from(2)
    })
}

fn help() -> anyhow::Result<()> {
    say(&format!("{HELP}{}", test::HELP))
}

fn tidy_up() -> anyhow::Result<ExitCode> {
    let violations = tidy::check(root())?;
    let mut text = String::new();
    for violation in &violations {
        text.push_str(&format!("{violation}\n"));
    }
    text.push_str(&match violations.len() {
        0 => "tidy: all rules hold\n".to_owned(),
        1 => "tidy: 1 violation\n".to_owned(),
        count => format!("tidy: {count} violations\n"),
    });
    say(&text)?;
    Ok(if violations.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn say(text: &str) -> anyhow::Result<()> {
    std::io::stdout().write_all(text.as_bytes())?;
    Ok(())
}

/// The workspace's folder.
fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."))
}
