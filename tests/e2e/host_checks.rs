//! Obstacles on the host are told, with the command that mends them, and the command does.

use std::process::{Command, Output};
use std::time::Duration;

use testbed::topology::{Node, Site};

use crate::machine::isolated;
use crate::program::up;
use crate::scene::*;

/// A shell command in a node, to its end.
fn shell(place: &Node, text: &str) -> String {
    let mut command = Command::new("sh");
    command.args(["-c", &format!("PATH=$PATH:/usr/sbin:/sbin; {text}")]);
    place.output(command).unwrap()
}

/// `anabranch check` in a node: what it says on standard error.
fn check(place: &Node, gateway: &Gateway) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_anabranch"));
    command.arg("check").arg(&gateway.config);
    place.prepare(&mut command).unwrap();
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The command behind the first `; ` of a warning, up to `end`.
fn remedy<'a>(warning: &'a str, begin: &str, end: &str) -> &'a str {
    let from = warning.find(begin).unwrap_or_else(|| panic!("{begin} in {warning}"));
    let text = &warning[from..];
    text.split_once(end).map_or(text, |(command, _)| command).trim()
}

/// A LAN that goes into the tunnel by the kernel's forwarding: forwarding is off, then Docker's firewall comes. Both are said by
/// `check`, log and status, and what they say to do helps.
#[test]
fn forwarding_that_is_off_and_a_firewall_that_drops_are_told_and_the_remedies_work() {
    isolated(|| {
        let mut scene = Scene::new(&[link(50.0, 1.0)]);
        let host = scene.testbed.add_host(Site::A).unwrap();
        let a = scene.a();
        let (branch, hub) = scene.pair();
        let lan = host.addresses.ipv4.unwrap();
        let text = hub.text(&scene.directory);
        let text = text.replacen("allowed-ips = [", &format!("allowed-ips = [\"{lan}/32\", "), 1);
        let _hub = Gateway::start(scene.b(), &scene.directory, "hub", &text);
        shell(a, "sysctl -qw net.ipv4.ip_forward=0");
        let mut gateway = scene.start(a, &branch);
        gateway.wait("one path", PATIENCE, |report| paths_up(report) == 1);
        let passes = || {
            let mut ping = Command::new("ping");
            ping.args(["-c", "1", "-W", "1", HUB_IP]);
            host.node.prepare(&mut ping).unwrap();
            ping.output().unwrap().status.success()
        };
        assert!(!passes());
        let told = gateway.wait("forwarding", PATIENCE, |report| !report.warnings.is_empty()).warnings;
        assert!(told[0].contains("net.ipv4.ip_forward = 0"), "{told:?}");
        assert!(gateway.log().contains("net.ipv4.ip_forward = 0") && check(a, &gateway).contains(&told[0]));
        assert!(gateway.command(&["status"]).1.contains(&told[0]));
        shell(a, remedy(&told[0], "sysctl -w", ","));
        assert!(passes());
        gateway.wait("no obstacle", PATIENCE, |report| report.warnings.is_empty());

        shell(
            a,
            "nft 'table ip filter { chain FORWARD { type filter hook forward priority 0; policy drop; \
                  jump DOCKER-USER; iifname \"docker0\" accept; }; chain DOCKER-USER { }; }'",
        );
        assert!(!passes());
        let told = gateway.wait("the firewall", PATIENCE, |report| !report.warnings.is_empty()).warnings;
        assert!(told[0].contains("Docker sets this"), "{told:?}");
        assert!(check(a, &gateway).contains(&told[0]));
        wait_for("a line in the log", PATIENCE, || gateway.log().contains("Docker sets this"));
        // The same in nft's words: iptables may not be there.
        for side in ["iifname", "oifname"] {
            shell(a, &format!("nft insert rule ip filter DOCKER-USER {side} ana0 accept"));
        }
        assert!(passes());
        gateway.wait("no obstacle", PATIENCE, |report| report.warnings.is_empty());

        // The same in the tables of `iptables-legacy`, which nftables does not show.
        shell(a, "nft delete table ip filter");
        shell(
            a,
            "iptables-legacy -P FORWARD DROP; iptables-legacy -N DOCKER-USER; iptables-legacy -A FORWARD -j DOCKER-USER",
        );
        assert!(!passes());
        let told = gateway.wait("the firewall", PATIENCE, |report| !report.warnings.is_empty()).warnings;
        assert!(told[0].contains("iptables-legacy") && told[0].contains("Docker sets this"), "{told:?}");
        shell(a, remedy(&told[0], "iptables-legacy -I", "\n"));
        assert!(passes(), "{told:?}");
        gateway.wait("no obstacle", PATIENCE, |report| report.warnings.is_empty());
        shell(a, "iptables-legacy -F; iptables-legacy -P FORWARD ACCEPT");

        shell(
            a,
            "nft 'table inet fw { chain forward { type filter hook forward priority 0; \
                  ct state established accept; counter reject; }; }'",
        );
        assert!(!passes());
        let told = gateway.wait("the firewall", PATIENCE, |report| !report.warnings.is_empty()).warnings;
        shell(a, remedy(&told[0], "nft insert", "\n"));
        assert!(passes(), "{told:?}");
    });
}

/// Another program holds the port: its name and how to stop it. A firewall that lets nothing in is told as well.
#[test]
fn a_port_that_is_taken_or_filtered_is_told() {
    isolated(|| {
        let scene = Scene::new(&[link(50.0, 1.0)]);
        let b = scene.b();
        let (_, hub) = scene.pair();
        let mut holder = Command::new("python3");
        holder.args([
            "-c",
            "import socket, time; s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM); s.bind(('::', 4600)); time.sleep(60)",
        ]);
        let mut holder = b.start(holder, None).unwrap();
        wait_for("the port is taken", PATIENCE, || shell(b, "cat /proc/net/udp6").contains(":11F8"));
        let file = scene.directory.write("hub.toml", hub.text(&scene.directory)).unwrap();
        let run = |command: &mut Command| -> Output {
            b.prepare(command).unwrap();
            command.output().unwrap()
        };
        let output = run(&mut up(&file));
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{text}");
        assert!(text.contains("UDP port 4600 is taken by python3") && text.contains("kill "), "{text}");
        let output = run(Command::new(env!("CARGO_BIN_EXE_anabranch")).arg("check").arg(&file));
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(text.contains("UDP port 4600 is taken by python3"), "{text}");
        holder.signal(rustix::process::Signal::KILL).unwrap();
        holder.wait(Duration::from_secs(5)).unwrap();

        shell(
            b,
            "nft 'table inet fw { chain input { type filter hook input priority 0; policy drop; iifname lo accept; }; }'",
        );
        let mut gateway = scene.start(b, &hub);
        let told = gateway.wait("the firewall", PATIENCE, |report| !report.warnings.is_empty()).warnings;
        shell(b, remedy(&told[0], "nft insert", "\n"));
        gateway.wait("no obstacle", PATIENCE, |report| report.warnings.is_empty());
        assert!(!check(b, &gateway).contains("is taken by"), "its own port is no obstacle");
    });
}

/// The shipped unit: a service type that systemd 252 knows, with a way to reload; `systemd-analyze` where it is installed.
#[test]
fn the_unit_is_one_that_systemd_252_takes() {
    let unit = include_str!("../../etc/anabranch@.service");
    let value = |key: &str| unit.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
    assert_eq!(value("Type"), Some("notify"), "notify-reload came with systemd 253");
    assert_eq!(value("ExecReload"), Some("/bin/kill -HUP $MAINPID"));
    for (key, set) in [
        ("NoNewPrivileges", "yes"),
        ("LimitCORE", "0"),
        ("ProtectSystem", "strict"),
        ("MemoryDenyWriteExecute", "yes"),
        ("RestrictAddressFamilies", "AF_UNIX AF_INET AF_INET6 AF_NETLINK AF_PACKET"),
        (
            "SystemCallFilter",
            "@system-service bpf perf_event_open seccomp landlock_create_ruleset landlock_add_rule \
             landlock_restrict_self",
        ),
    ] {
        assert_eq!(value(key), Some(set), "{key}");
    }
    let directory = testbed::program::ScratchDir::new("anabranch-unit").unwrap();
    let unit = unit.replace("/usr/bin/anabranch", env!("CARGO_BIN_EXE_anabranch"));
    directory.write("anabranch@.service", &unit).unwrap();
    let file = directory.write("anabranch@site.service", &unit).unwrap();
    match Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(file).output() {
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(output.status.success() && !text.contains("anabranch"), "{text}");
        }
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::NotFound),
    }
}
