//! `cargo xtask test`: every test of the workspace, on a machine that may lack what they need.

mod again;
mod repeat;

use std::process::{Command, ExitCode};

use anyhow::{Context as _, bail};

use crate::{programs, root, say};

/// Description for people.
pub const HELP: &str = "\
cargo xtask test [--install] [FILTER]          all tests, or those whose name contains FILTER; up to four that fail run once
                                               more, alone, and those that pass then are named at the end
cargo xtask test --repeat N [--load] [FILTER]  the end-to-end tests N times, and a table of how they fared
    --install  installs the programs that the tests need and that are missing (apt-get), and opens /dev/net/tun to
               ordinary users, as udev does; CI=1 means the same
    --load     keeps every core busy meanwhile
    exit code  0 all passed, 1 a test failed, 2 wrong arguments or no run, 3 a program or device is missing
";

/// Exit code if a program is missing.
const MISSING: u8 = 3;

/// Arguments of the command.
#[derive(Debug, Default, PartialEq, Eq)]
struct Options {
    install: bool,
    load: bool,
    repeat: Option<usize>,
    filter: Option<String>,
}

impl Options {
    fn parse(arguments: &[&str]) -> anyhow::Result<Self> {
        let mut options = Self::default();
        let mut rest = arguments.iter();
        while let Some(argument) = rest.next() {
            match *argument {
                "--install" => options.install = true,
                "--load" => options.load = true,
                "--repeat" => {
                    let count = rest.next().context("--repeat needs a number")?;
                    let count = count.parse().ok().filter(|count| *count > 0);
                    options.repeat = Some(count.context("--repeat needs a number from 1")?);
                }
                option if option.starts_with('-') => bail!("unknown option {option}\n{HELP}"),
                filter if options.filter.is_none() => options.filter = Some(filter.to_owned()),
                more => bail!("one filter is enough: {more}\n{HELP}"),
            }
        }
        if options.load && options.repeat.is_none() {
            bail!("--load goes with --repeat\n{HELP}");
        }
        Ok(options)
    }
}

/// Runs the command.
///
/// # Errors
/// When arguments are wrong or something does not run at all.
pub fn run(arguments: &[&str]) -> anyhow::Result<ExitCode> {
    let options = Options::parse(arguments)?;
    let missing = programs::missing();
    if !missing.is_empty() {
        if !options.install && !is_ci() {
            say(&programs::advice(&missing))?;
            return Ok(ExitCode::from(MISSING));
        }
        if let Err(error) = programs::install(&missing) {
            say(&format!("{error:#}\n"))?;
            return Ok(ExitCode::from(MISSING));
        }
    }
    if !open_tun(options.install || is_ci())? {
        return Ok(ExitCode::from(MISSING));
    }
    let all_passed = match options.repeat {
        Some(rounds) => repeat::run(rounds, options.load, options.filter.as_deref())?,
        None => once(options.filter.as_deref())?,
    };
    Ok(if all_passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Makes sure that ordinary users may open the TUN device, as udev leaves it: some tests run the program as one. A machine
/// without udev gives it to root alone. `false`: it is closed, and what to do was said.
fn open_tun(mend: bool) -> anyhow::Result<bool> {
    use std::os::unix::fs::PermissionsExt;
    const DEVICE: &str = "/dev/net/tun";
    const FOR_ALL: u32 = 0o666;
    let Ok(about) = std::fs::metadata(DEVICE) else {
        say(&format!("there is no {DEVICE}: load the kernel's module with `modprobe tun`\n"))?;
        return Ok(false);
    };
    let closed = about.permissions().mode() & FOR_ALL != FOR_ALL;
    if closed && !(mend && std::fs::set_permissions(DEVICE, std::fs::Permissions::from_mode(FOR_ALL)).is_ok())
    {
        say(&format!("{DEVICE} is closed to ordinary users; as root: chmod 0666 {DEVICE}\n"))?;
        return Ok(false);
    }
    Ok(true)
}

fn is_ci() -> bool {
    std::env::var("CI").is_ok_and(|value| !["", "0", "false"].contains(&value.as_str()))
}

/// Targets that cargo is asked for, and the threads of their tests: together all tests of the workspace, each once. The end-to-end suite's
/// name is the only one that begins with its letters.
const PARTS: [(&[&str], Option<&str>); 3] = [
    (&["--lib", "--bins", "--test", "[!e]*", "--test", "e[!2]*"], None),
    (&["--test", "e2e"], Some(END_TO_END_THREADS)),
    (&["--doc"], None),
];

/// Variable with the number of tests that run at once, for the programs of tests.
const THREADS: &str = "RUST_TEST_THREADS";

/// The end-to-end tests decide themselves which of them run at once (`tests/e2e/machine.rs`): a thread for each that waits.
const END_TO_END_THREADS: &str = "24";

fn once(filter: Option<&str>) -> anyhow::Result<bool> {
    let mut all_passed = true;
    let mut unsteady = again::Unsteady::new();
    for (part, threads) in PARTS {
        let command = || {
            let mut command = cargo();
            command.args(["test", "--locked", "--workspace", "--no-fail-fast"]).args(part);
            command
        };
        let threads = threads.filter(|_| std::env::var_os(THREADS).is_none());
        match again::run(command, filter, threads, &mut std::io::stdout())? {
            Some(names) => unsteady.extend(names),
            None => all_passed = false,
        }
    }
    for name in unsteady {
        say(&format!("failed beside other tests, and passed alone: {name}\n"))?;
    }
    Ok(all_passed)
}

/// The cargo that runs this program.
fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments() {
        let parse = |text: &str| Options::parse(&text.split_whitespace().collect::<Vec<_>>());
        assert_eq!(parse("").unwrap_or_default(), Options::default());
        let filter = Some("nat".to_owned());
        let wanted = Options { install: true, load: true, repeat: Some(20), filter };
        assert_eq!(parse("--repeat 20 --load nat --install").ok(), Some(wanted));
        for wrong in ["--repeat", "--repeat 0", "--repeat many", "--load", "--instal", "one two"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
