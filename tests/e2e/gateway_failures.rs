//! Failures are told once, with the reason and what would help, and end as soon as they can.

use std::os::unix::fs::symlink;
use std::process::Command;

use control::status::InterfaceStatus;

use crate::gateway_scene::*;
use crate::machine::isolated;
use crate::program::up;
use crate::scene::*;

fn lines(gateway: &Gateway, text: &str) -> usize {
    gateway.log().lines().filter(|line| line.contains(text)).count()
}

fn interface(gateway: &Gateway, name: &str) -> InterfaceStatus {
    services(gateway).interfaces.into_iter().find(|interface| interface.name == name).unwrap()
}

/// Row R7: without the right to load programs and without `nft`, nothing keeps the kernel's stack out: no interface is
/// "up", the state says why, one line of the log too; with `nft` they come by themselves.
#[test]
fn r7_interfaces_that_cannot_be_guarded_are_not_up() {
    isolated(|| {
        let lans = Lans::new(2);
        lans.scene.expect_error("does not work: guard lan");
        let tools = lans.scene.directory.path().join("tools");
        std::fs::create_dir(&tools).unwrap();
        let nft = shell(lans.gateway(), "PATH=$PATH:/usr/sbin:/sbin command -v nft");
        let config = lans.scene.directory.write("gw.toml", lans.text(ALLOW)).unwrap();
        let mut command = Command::new("/usr/bin/setpriv");
        command.args(["--bounding-set=-bpf,-sys_admin,-perfmon", "--"]);
        let program = up(&config);
        command.arg(program.get_program()).args(program.get_args());
        command.env_remove("ANABRANCH_LOG").env_remove("RUST_LOG").env("PATH", &tools);
        let log = lans.scene.directory.path().join("gw.log");
        let program = lans.gateway().start(command, Some(&log)).unwrap();
        let socket = lans.scene.directory.path().join("gw.sock");
        let mut gateway = Gateway { program, socket, config, log };
        gateway.wait("a failed interface", PATIENCE, |report| {
            report.gateway.as_ref().is_some_and(|all| all.interfaces[0].state == "failed")
        });
        for name in ["lan1", "lan2"] {
            let interface = interface(&gateway, name);
            assert_eq!(interface.state, "failed");
            assert!(interface.reason.contains("the program nft is not installed"), "{interface:?}");
        }
        let (_, text) = gateway.command(&["status"]);
        assert!(text.contains("interface lan1 does not work: guard lan1: needs CAP_BPF"), "{text}");
        // Some tries later: the log has what it had.
        let patience = std::time::Instant::now();
        wait_for("four seconds", PATIENCE, || patience.elapsed().as_secs() >= 4);
        assert_eq!(lines(&gateway, "interface lan1 does not work"), 1, "{}", gateway.log());
        let all = gateway.log().lines().count();
        assert!(all < 20, "{all} lines:\n{}", gateway.log());
        symlink(nft.trim(), tools.join("nft")).unwrap();
        ready(&mut gateway);
        let _mirror = Mirror::start(lans.host(2), "server", "0.0.0.0:80");
        assert_eq!(ask_tcp(lans.host(1), "10.1.2.2:80").name, "server");
        assert!(services(&gateway).interfaces.iter().all(|interface| interface.reason.is_empty()));
    });
}

/// One interface that cannot be opened takes nothing from the others.
#[test]
fn an_interface_that_fails_is_alone_with_it() {
    isolated(|| {
        let lans = Lans::new(2);
        lans.scene.expect_error("interface strange does not work");
        // A device whose packets nobody here can read: TUNSETIFF, then TUNSETLINK with X.25. It has a carrier while it is open.
        let mut holder = Command::new("python3");
        holder.args([
            "-c",
            "import fcntl, struct, time
tun = open('/dev/net/tun', 'r+b', buffering=0)
fcntl.ioctl(tun, 0x400454ca, struct.pack('16sH22s', b'tun9', 0x1001, b''))
fcntl.ioctl(tun, 0x400454cd, 271)
time.sleep(120)",
        ]);
        let _holder = lans.gateway().start(holder, None).unwrap();
        wait_for("the device", PATIENCE, || {
            try_shell(lans.gateway(), "ip link show tun9 | grep x25").is_ok()
        });
        shell(lans.gateway(), "ip link set tun9 up");
        let text = lans.text(&format!(
            "{ALLOW}[[interface]]\nname = \"strange\"\ndevice = \"tun9\"\n[[nat]]\nout = \"lan2\"\n"
        ));
        let mut gateway = Gateway::start(lans.gateway(), &lans.scene.directory, "gw", &text);
        gateway.wait("two interfaces up, one failed", PATIENCE, |report| {
            let all = report.gateway.as_ref().map(|all| &all.interfaces);
            let count = |state| all.map_or(0, |all| all.iter().filter(|one| one.state == state).count());
            (count("up"), count("failed")) == (2, 1)
        });
        assert!(interface(&gateway, "strange").reason.contains("neither Ethernet nor none"));
        let _mirror = Mirror::start(lans.host(2), "server", "0.0.0.0:80");
        assert_eq!(ask_tcp(lans.host(1), "10.1.2.2:80").name, "server");
        // The policy is in force: commands work.
        assert_eq!(explain(&gateway, "tcp 10.1.1.2:1234 > 10.1.2.2:80").verdict, "forward");
        assert_eq!(lines(&gateway, "interface strange does not work"), 1);
    });
}
