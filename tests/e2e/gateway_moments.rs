//! Strangers probe a gateway from outside while it starts, runs, is reloaded, dies and comes again.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;
use testbed::program::Program;

use crate::gateway_scene::*;
use crate::machine::{busy, isolated};
use crate::program::Gateway;
use crate::scene::*;

const INSIDE: &str = "[[nat]]\nout = \"lan2\"\n";

/// Sends each IP protocol, and TCP, UDP and SCTP to a thousand ports in turn, whole and in fragments, to hosts behind the gateway: round
/// after round. Arguments: the inside IPv4 and IPv6 address, where the round is written.
const PROBES: &str = r#"
import os, socket, struct, sys, time
to4, to6, told = sys.argv[1:4]
raw4 = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
raw6 = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_RAW)
from4, from6 = socket.inet_aton("10.1.2.2"), socket.inet_pton(socket.AF_INET6, "fd00:1:2::2")
def send(protocol, upper, pieces=0):
    head = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(upper), 7, pieces, 64, protocol, 0, from4, socket.inet_aton(to4))
    try:
        raw4.sendto(head + upper, (to4, 0))
    except OSError:
        pass
    if pieces:
        upper = struct.pack(">BBHI", protocol, 0, pieces & 0x1fff << 3 | pieces >> 13, 7) + upper
        protocol = 44
    head = struct.pack(">IHBB16s16s", 6 << 28, len(upper), protocol, 64, from6, socket.inet_pton(socket.AF_INET6, to6))
    try:
        raw6.sendto(head + upper, (to6, 0))
    except OSError:
        pass
rounds = 0
while True:
    for protocol in range(256):
        send(protocol, os.urandom(64))
    for step in range(1000):
        port = 1 + (rounds * 1000 + step) % 65535
        syn = struct.pack(">HHIIBBHHH", 40000, port, 1, 0, 0x50, 2, 1000, 0, 0)
        send(6, syn)
        send(6, syn[:12] + b"\x50\x10" + syn[14:])
        datagram = struct.pack(">HHHH", 40000, port, 16, 0) + b"12345678"
        send(17, datagram)
        send(132, datagram)
        if step % 50 == 0:
            send(17, datagram, 0x2000)
            send(17, datagram, 2)
            time.sleep(0.001)
    rounds += 1
    with open(told, "w") as file:
        file.write(str(rounds))
"#;

/// A gateway whose kernel forwards, strangers who probe it, and a host inside that counts what comes through.
struct Probed {
    lans: Lans,
    _probes: Program,
    told: PathBuf,
}

impl Probed {
    fn new() -> Self {
        let lans = Lans::new(2);
        shell(lans.gateway(), "sysctl -q -w net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1");
        shell(
            lans.host(1),
            "nft 'table inet seen { chain in { type filter hook prerouting priority -300; ip saddr 10.1.2.2 counter; \
             ip6 saddr fd00:1:2::2 counter; }; }'",
        );
        let script = lans.scene.directory.write("probes.py", PROBES).unwrap();
        let told = lans.scene.directory.path().join("rounds");
        let mut probes = Command::new("python3");
        probes.arg(script).args(["10.1.1.2", "fd00:1:1::2"]).arg(&told);
        let log = lans.scene.directory.path().join("probes.log");
        let probes = lans.host(2).start(probes, Some(&log)).unwrap();
        Self { lans, _probes: probes, told }
    }

    /// Packets of strangers that came to the host inside after two more whole rounds of probes.
    fn seen(&self, when: &str) -> u64 {
        let rounds =
            || std::fs::read_to_string(&self.told).ok().and_then(|text| text.parse().ok()).unwrap_or(0_u64);
        let from = rounds();
        wait_for(when, 60.0, || rounds() >= from + 2);
        let text = shell(self.lans.host(1), "nft list table inet seen");
        let words: Vec<&str> = text.split_whitespace().collect();
        let counts = words.windows(2).filter(|pair| pair[0] == "packets");
        counts.map(|pair| pair[1].parse::<u64>().unwrap()).sum()
    }

    fn has_table(&self) -> bool {
        shell(self.lans.gateway(), "nft list tables").contains("anabranch_closed")
    }
}

fn kill(gateway: &mut Gateway) {
    gateway.program.signal(Signal::KILL).unwrap();
    gateway.program.wait(Duration::from_secs(20)).unwrap();
}

/// Row C2: nothing new comes in from outside without a rule, of any protocol, port or version, whole or in pieces, in any moment; after
/// a death without leave the kernel does not forward in our place, and the host's own traffic goes on.
#[test]
fn c2_nothing_new_comes_in_whatever_happens() {
    let _busy = busy();
    isolated(|| {
        let probed = Probed::new();
        let Probed { lans, .. } = &probed;
        assert!(probed.seen("an open host") > 1_000, "without the program the kernel forwards");

        let mut gateway = lans.start(INSIDE);
        let quiet = probed.seen("a gateway that has started");
        assert!(dropped(&gateway, "default-drop") > 0);
        let table = gateway.status().and_then(|report| report.forward_guard).unwrap();
        assert!(table.starts_with("inet anabranch_closed-"), "{table}");
        let rule = format!("{INSIDE}[[rule]]\naction = \"allow\"\nfrom = \"lan1\"\n");
        assert_eq!(lans.reload(&gateway, &rule).0, 0);
        assert_eq!(probed.seen("a gateway that was reloaded"), quiet);

        kill(&mut gateway);
        let _own = Mirror::start(lans.gateway(), "own", "[::]:8080");
        assert_eq!(probed.seen("a host whose gateway died"), quiet);
        // The host's own traffic goes on, in both directions.
        ping(lans.host(1), "-c 1 10.1.1.1");
        ping(lans.gateway(), "-c 1 10.1.2.2");
        assert_eq!(ask_tcp(lans.host(2), "10.1.2.1:8080").name, "own");

        let mut gateway = lans.start(INSIDE);
        assert_eq!(probed.seen("the next gateway"), quiet);
        gateway.program.signal(Signal::TERM).unwrap();
        assert!(
            gateway.program.wait(Duration::from_secs(20)).unwrap().is_some_and(|status| status.success())
        );
        let log = gateway.log();
        assert!(log.contains("from now on the kernel forwards between lan1, lan2"), "{log}");
        assert!(!probed.has_table());
    });
}

/// Row R7: `stop` takes away what a gateway that died left.
#[test]
fn r7_stop_opens_what_a_dead_gateway_closed() {
    isolated(|| {
        let lans = Lans::new(2);
        let tables = || shell(lans.gateway(), "nft list tables");
        let mut gateway = lans.start(INSIDE);
        kill(&mut gateway);
        assert!(tables().contains("anabranch_closed"));
        assert_eq!(lans.gateway().run(|| gateway.command(&["stop"]).0).unwrap(), 0);
        assert!(!tables().contains("anabranch_closed"));
    });
}

/// Row R7: of two gateways on a host that die, each stays closed until it is itself started again or stopped.
#[test]
fn r7_one_gateway_opens_nothing_of_another() {
    isolated(|| {
        let lans = Lans::new(4);
        let directory = lans.scene.directory.path().display();
        let text = |name: &str, tun: &str, first: u8| {
            format!(
                "[node]\nname = \"{name}\"\nstate-dir = \"{directory}/{name}\"\ncontrol-socket = \"{directory}/{name}.sock\"\n\
                 [tun]\nname = \"{tun}\"\n[[interface]]\nname = \"lan{first}\"\n[[interface]]\nname = \"lan{}\"\n{ALLOW}",
                first + 1
            )
        };
        let start = |name: &str, tun: &str, first: u8| {
            let text = text(name, tun, first);
            let mut gateway = Gateway::start(lans.gateway(), &lans.scene.directory, name, &text);
            ready(&mut gateway);
            gateway
        };
        let tables = || shell(lans.gateway(), "nft list tables");
        let closed = || (tables().contains("closed-ana0"), tables().contains("closed-ana1"));
        let (mut one, mut two) = (start("one", "ana0", 1), start("two", "ana1", 3));
        kill(&mut two);
        kill(&mut one);
        assert_eq!(closed(), (true, true));
        let stop = |gateway: &Gateway| lans.gateway().run(|| gateway.command(&["stop"]).0).unwrap();
        let one = start("one", "ana0", 1);
        assert_eq!(closed(), (true, true), "the start of one opens nothing of two");
        assert_eq!(stop(&one), 0);
        wait_for("one is open", PATIENCE, || closed() == (false, true));
        assert_eq!(stop(&one), 3, "nothing runs there");
        assert_eq!(closed(), (false, true));
        assert_eq!(stop(&two), 0);
        assert_eq!(closed(), (false, false));
    });
}

/// Row R7: the running process has the rights that it needs and no others, shows its memory to nobody and writes it nowhere; what it
/// starts has no more.
#[test]
fn r7_the_process_gives_up_what_it_does_not_need() {
    isolated(|| {
        let lans = Lans::new(2);
        let gateway = lans.start(INSIDE);
        let status = std::fs::read_to_string(format!("/proc/{}/status", gateway.program.id())).unwrap();
        let field =
            |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned();
        let needed = linux::privileges::NEEDED.bits();
        for set in ["CapPrm:", "CapEff:", "CapBnd:"] {
            let has = u64::from_str_radix(&field(set), 16).unwrap();
            assert_eq!(has & !needed, 0, "{set} {has:x}");
        }
        assert_eq!(field("NoNewPrivs:"), "1");
        let limits = std::fs::read_to_string(format!("/proc/{}/limits", gateway.program.id())).unwrap();
        let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
        assert_eq!(core.split_whitespace().nth(4), Some("0"), "{core}");
        // What is not dumpable belongs to root of the first user namespace.
        let log = gateway.log();
        assert!(!log.contains("a right is kept"), "{log}");
    });
}

/// Row R7: a thread of the running process that is made to do what a gateway never does fails to, and the gateway goes on; so do
/// its workers' threads, which the same filter holds for.
#[cfg(target_arch = "x86_64")]
#[test]
fn r7_the_running_process_is_in_a_sandbox() {
    use linux::testing::Argument::{Number, Text};
    use linux::testing::Halted;

    isolated(|| {
        let lans = Lans::new(2);
        let gateway = lans.start(INSIDE);
        let process = gateway.program.id();
        for task in std::fs::read_dir(format!("/proc/{process}/task")).unwrap() {
            let status = std::fs::read_to_string(task.unwrap().path().join("status")).unwrap();
            for line in ["Seccomp:\t2", "Seccomp_filters:\t1", "NoNewPrivs:\t1"] {
                assert!(status.contains(line), "{line}: {status}");
            }
        }
        let (nothing, append) = (Number(0), i64::from(libc::O_WRONLY | libc::O_APPEND));
        let own = gateway.socket.with_file_name("made").display().to_string();
        let calls = [
            ("execve", libc::SYS_execve, [Text("/bin/true"), nothing, nothing], libc::EPERM),
            ("ptrace", libc::SYS_ptrace, [Number(16), Number(1), nothing], libc::EPERM),
            ("mount", libc::SYS_mount, [Text("none"), Text("/mnt"), Text("tmpfs")], libc::EPERM),
            ("kexec_load", libc::SYS_kexec_load, [nothing; 3], libc::EPERM),
            (
                "unshare",
                libc::SYS_unshare,
                [Number(libc::CLONE_NEWUSER.into()), nothing, nothing],
                libc::EPERM,
            ),
            ("passwords", libc::SYS_open, [Text("/etc/shadow"), Number(append), nothing], libc::EACCES),
            (
                "passwords, at",
                libc::SYS_openat,
                [Number(-1), Text("/etc/shadow"), Number(append)],
                libc::EACCES,
            ),
            // It is the sandbox that says no, not the way of asking: these are a gateway's own.
            ("its own files", libc::SYS_mkdir, [Text(&own), Number(0o700), nothing], 0),
            ("reading", libc::SYS_access, [Text("/etc/passwd"), Number(libc::R_OK.into()), nothing], 0),
        ];
        let main = Halted::thread(process, "anabranch").unwrap();
        for (what, call, arguments, errno) in calls {
            assert_eq!(main.system_call(call, arguments).unwrap(), -i64::from(errno), "{what}");
        }
        drop(main);
        assert!(gateway.status().is_some(), "it goes on");
        let log = gateway.log();
        assert!(!log.contains("sandbox is not complete"), "{log}");
    });
}
