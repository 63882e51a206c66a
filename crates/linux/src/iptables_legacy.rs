//! Chains of `iptables-legacy`, which nftables does not show: as [`crate::netlink::nftables`], enough to say what a host's
//! firewall keeps from passing.
//!
//! They are read by `iptables-legacy-save` (`ip6tables-legacy-save`), and only in a namespace that has such a table already:
//! asking for one that is not there would make the kernel load and add it.

use std::fs::OpenOptions;
use std::io::{self, Read as _};
use std::time::{Duration, Instant};

use crate::launcher::{self, Launched, Program, SAVE_PROGRAMS, Streams};
use crate::netlink::nftables::{BaseChain, Hook};

/// Bytes of rules that are looked at, at most.
const TEXT_BYTES_MAX: u64 = 8 << 20;
/// The program is ended after so long.
const PATIENCE: Duration = Duration::from_secs(2);

/// Base chains of the table `filter` in the calling thread's namespace that drop what none of their rules accepts. Empty where
/// there is no such table, or no program to read it.
#[must_use]
pub fn dropping_chains() -> Vec<BaseChain> {
    // The last are places in the list of programs.
    let families =
        [("ip", "/proc/net/ip_tables_names", [0, 1]), ("ip6", "/proc/net/ip6_tables_names", [2, 3])];
    let mut list = Vec::new();
    for (family, tables, programs) in families {
        let names = std::fs::read_to_string(tables).unwrap_or_default();
        if !names.lines().any(|name| name == "filter") {
            continue;
        }
        let text = programs
            .into_iter()
            .filter(|program| is_legacy(*program))
            .find_map(|program| output(|streams| launcher::spawn(Program::SaveRules(program), streams)));
        list.extend(text.into_iter().flat_map(|text| parse(family, &text)));
    }
    list
}

/// Whether a program of [`SAVE_PROGRAMS`] shows the legacy tables. What is called `iptables-save` is a link to either kind.
fn is_legacy(program: u8) -> bool {
    let version = || output(|streams| launcher::spawn(Program::SaveVersion(program), streams));
    SAVE_PROGRAMS.get(usize::from(program)).is_some_and(|name| name.contains("legacy"))
        || version().is_some_and(|text| !text.contains("nf_tables"))
}

/// Output of a program, if it ends well and in time.
fn output(start: impl FnOnce(Streams) -> io::Result<Launched>) -> Option<String> {
    let ((input, _), (pipe, output)) = (io::pipe().ok()?, io::pipe().ok()?);
    let nothing = OpenOptions::new().write(true).open("/dev/null").ok()?;
    let mut launched =
        start(Streams { input: input.into(), output: output.into(), errors: nothing.into() }).ok()?;
    let reader = std::thread::spawn(move || {
        let mut text = Vec::new();
        pipe.take(TEXT_BYTES_MAX).read_to_end(&mut text).map(|_| text)
    });
    let end = Instant::now() + PATIENCE;
    let status = loop {
        match launched.try_wait() {
            Ok(None) if Instant::now() < end => std::thread::sleep(Duration::from_millis(2)),
            Ok(Some(status)) => break Some(status),
            Ok(None) | Err(_) => {
                let _ = launched.kill();
                let _ = launched.wait();
                break None;
            }
        }
    };
    let text = reader.join().ok()?.ok()?;
    status.filter(std::process::ExitStatus::success)?;
    Some(String::from_utf8_lossy(&text).into_owned())
}

/// The chains of a table in the words of `iptables-save`.
fn parse(family: &'static str, text: &str) -> Vec<BaseChain> {
    let mut table = String::new();
    let (mut names, mut bases): (Vec<String>, Vec<(String, Hook, bool)>) = (Vec::new(), Vec::new());
    let mut rules = Vec::new();
    for line in text.lines() {
        if let Some(name) = line.strip_prefix('*') {
            name.clone_into(&mut table);
        } else if let Some(chain) = line.strip_prefix(':') {
            let mut words = chain.split_whitespace();
            let (Some(name), Some(policy)) = (words.next(), words.next()) else { continue };
            names.push(name.to_owned());
            let hook = match name {
                "INPUT" => Hook::Input,
                "FORWARD" => Hook::Forward,
                _ => continue,
            };
            bases.push((name.to_owned(), hook, policy == "DROP"));
        } else if let Some(rule) = line.strip_prefix("-A ") {
            add_rule(rule, &mut bases, &mut rules);
        }
    }
    if table != "filter" {
        return Vec::new();
    }
    let dropping = bases.into_iter().filter(|(_, _, drops)| *drops);
    dropping
        .map(|(name, hook, _)| BaseChain {
            family,
            table: table.clone(),
            name,
            hook,
            devices: Vec::new(),
            refuses: true,
            acts: Vec::new(),
            rules: rules.clone(),
            chains: names.clone(),
            legacy: true,
        })
        .collect()
}

/// Notes what a rule names, and whether it drops everything that comes to it.
fn add_rule(rule: &str, bases: &mut [(String, Hook, bool)], rules: &mut Vec<u8>) {
    let words: Vec<&str> = rule.split_whitespace().collect();
    for pair in words.windows(2) {
        let [option, value] = pair else { continue };
        match *option {
            "-i" | "-o" => {
                rules.extend_from_slice(value.as_bytes());
                rules.push(0);
            }
            "--dport" | "--dports" => {
                let ports = value.split([',', ':']).filter_map(|port| port.parse::<u16>().ok());
                ports.for_each(|port| rules.extend_from_slice(&port.to_be_bytes()));
            }
            _ => {}
        }
    }
    let refuses_all = matches!(words.get(1..3), Some(["-j", "DROP" | "REJECT"]));
    if refuses_all && let Some(base) = bases.iter_mut().find(|base| words.first() == Some(&base.0.as_str())) {
        base.2 = true;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    const DOCKER: &str = "# Generated by iptables-save v1.8.9\n*filter\n:INPUT ACCEPT [5:300]\n:FORWARD DROP [0:0]\n\
        :OUTPUT ACCEPT [0:0]\n:DOCKER-USER - [0:0]\n-A FORWARD -j DOCKER-USER\n-A FORWARD -o docker0 -j ACCEPT\n\
        -A DOCKER-USER -j RETURN\nCOMMIT\n";

    #[test]
    fn dropping_chains_of_a_table() {
        let list = parse("ip", DOCKER);
        assert_eq!(list.len(), 1);
        assert_eq!((list[0].name.as_str(), list[0].hook, list[0].legacy), ("FORWARD", Hook::Forward, true));
        assert!(list[0].has_chain("DOCKER-USER") && list[0].mentions(b"docker0\0"));
        assert!(!list[0].mentions(b"ana0\0"));
        let refusing = "*filter\n:INPUT ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\n-A INPUT -p udp -m udp --dport 4600 -j ACCEPT\n\
            -A INPUT -j REJECT --reject-with icmp-port-unreachable\n-A FORWARD -i lan -j DROP\nCOMMIT\n";
        let list = parse("ip6", refusing);
        assert_eq!(list.iter().map(|chain| chain.name.as_str()).collect::<Vec<_>>(), ["INPUT"]);
        assert!(list[0].mentions(&4600u16.to_be_bytes()));
        assert!(parse("ip", "*nat\n:INPUT DROP [0:0]\nCOMMIT\n").is_empty());
        for wrong in
            ["", ":", "*", "-A", "-A ", ":FORWARD", "*filter\n:FORWARD\n-A FORWARD -j\n-A FORWARD -i"]
        {
            assert!(parse("ip", wrong).is_empty(), "{wrong}");
        }
    }

    #[test]
    fn a_program_that_hangs_or_fails_says_nothing() {
        let run = |program: &str, arguments: &[&str]| {
            let mut command = std::process::Command::new(program);
            command.args(arguments);
            output(|streams| launcher::spawn_here(command, streams))
        };
        assert_eq!(run("sh", &["-c", "echo yes"]).as_deref(), Some("yes\n"));
        assert_eq!(run("sh", &["-c", "echo no; exit 1"]), None);
        assert_eq!(run("no-such-program-anywhere", &[]), None);
        let begin = Instant::now();
        assert_eq!(run("sleep", &["60"]), None);
        assert!(begin.elapsed() < Duration::from_secs(20));
    }
}
