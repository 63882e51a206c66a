//! Second run, alone, of the few tests that failed beside others: whether a busy machine did it, or the program.

use std::io::{BufRead as _, BufReader, Write};
use std::process::{Command, Stdio};

use anyhow::Context as _;

use super::THREADS;

/// Tests that get a second run; if more fail, it is not by chance.
const TESTS_MAX: usize = 4;

/// Tests that failed in a run, and passed alone.
pub type Unsteady = Vec<String>;

/// Runs a part of the tests, and those that fail alone once more: those that passed only then, or `None` if a test failed, or
/// something did not run at all. `part`: `cargo test` with what it builds; `filter`: of the names;
/// `screen`: where all that is said goes.
///
/// # Errors
/// When cargo does not run.
pub fn run(
    part: impl Fn() -> Command,
    filter: Option<&str>,
    threads: Option<&str>,
    screen: &mut impl Write,
) -> anyhow::Result<Option<Unsteady>> {
    let mut first = part();
    first.args(filter);
    if let Some(threads) = threads {
        first.env(THREADS, threads);
    }
    let (passed, failed) = watch(first, screen)?;
    if passed {
        return Ok(Some(Unsteady::new()));
    }
    if failed.is_empty() || failed.len() > TESTS_MAX {
        return Ok(None);
    }
    for name in &failed {
        writeln!(screen, "\n{name} failed beside other tests; once more, alone")?;
        let mut second = part();
        second.args(["--", "--exact", name]).env(THREADS, "1");
        let (passed, failed) = watch(second, screen)?;
        if !passed || !failed.is_empty() {
            return Ok(None);
        }
    }
    Ok(Some(failed))
}

/// Runs a command and shows what it says; whether it succeeded, and the tests that it calls failed.
fn watch(mut command: Command, screen: &mut impl Write) -> anyhow::Result<(bool, Vec<String>)> {
    let mut child = command.stdout(Stdio::piped()).spawn().context("cargo does not run")?;
    let output = child.stdout.take().context("no standard output")?;
    let mut failed = Vec::new();
    // As bytes: a test may print anything.
    for line in BufReader::new(output).split(b'\n') {
        let line = String::from_utf8_lossy(&line?).into_owned();
        failed.extend(failure(&line).map(str::to_owned));
        writeln!(screen, "{line}")?;
    }
    Ok((child.wait()?.success(), failed))
}

/// Name of the test that this line of libtest calls failed.
fn failure(line: &str) -> Option<&str> {
    line.trim_end().strip_prefix("test ")?.strip_suffix(" ... FAILED")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Outcome of a part whose runs are this script, with the number of the run in `$n`.
    fn outcome(script: &str) -> Option<Unsteady> {
        let runs = std::cell::Cell::new(0);
        let part = || {
            runs.set(runs.get() + 1);
            let mut command = Command::new("sh");
            command.args(["-c", script, "sh"]).env("n", runs.get().to_string());
            command
        };
        run(part, None, Some("24"), &mut std::io::sink()).unwrap_or_else(|error| panic!("{error:#}"))
    }

    #[test]
    fn what_fails_twice_fails() {
        assert_eq!(outcome("echo 'test a::b ... ok'"), Some(vec![]));
        let once = "[ $n = 1 ] || exit 0; echo 'test a::b ... FAILED'; exit 101";
        assert_eq!(outcome(once), Some(vec!["a::b".to_owned()]));
        assert_eq!(outcome("echo 'test a::b ... FAILED'; exit 101"), None);
        // The second of two.
        let two = "if [ $n = 1 ]; then printf 'test a ... FAILED\\ntest b ... FAILED\\n'; exit 101; fi; [ \"$3\" = a ]";
        assert_eq!(outcome(two), None);
        // It does not build, or crashes: nobody knows what failed.
        assert_eq!(outcome("[ $n != 1 ]"), None);
        // Too many for chance.
        let many =
            "[ $n = 1 ] || exit 0; for i in 1 2 3 4 5; do echo \"test t$i ... FAILED\"; done; exit 101";
        assert_eq!(outcome(many), None);
    }

    #[test]
    fn the_second_run_is_alone_and_of_one_test() {
        let script = "[ $n = 1 ] && [ $RUST_TEST_THREADS = 24 ] && echo 'test a::b ... FAILED' && exit 101; \
                      [ $RUST_TEST_THREADS = 1 ] && [ \"$*\" = '-- --exact a::b' ]";
        assert_eq!(outcome(script), Some(vec!["a::b".to_owned()]));
    }
}
