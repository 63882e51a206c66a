#![allow(clippy::unwrap_used, reason = "tests")]
use std::os::unix::process::CommandExt;

use super::*;
use crate::netlink::Netlink;
use crate::testing::isolated;

#[test]
fn a_namespace_is_its_own_network_and_the_caller_stays_outside() {
    isolated(|| {
        let here = Namespace::current().unwrap();
        let other = Namespace::create().unwrap();
        assert!(!here.is_same(&other).unwrap());
        assert!(here.is_same(&Namespace::current().unwrap()).unwrap());
        let inside = other
            .run(|| {
                let links = Netlink::open().unwrap().links().unwrap();
                (Namespace::current().unwrap(), links)
            })
            .unwrap();
        assert!(inside.0.is_same(&other.try_clone().unwrap()).unwrap());
        assert_eq!(inside.1.len(), 1);
        assert!(inside.1[0].loopback && inside.1[0].up);
        assert!(here.is_same(&Namespace::current().unwrap()).unwrap());
    });
}

#[test]
fn a_program_starts_inside() {
    isolated(|| {
        let namespace = Namespace::create().unwrap();
        let wanted = rustix::fs::fstat(&namespace).unwrap().st_ino;
        let mut command = Command::new("readlink");
        command.arg("/proc/self/ns/net");
        namespace.prepare_command(&mut command).unwrap();
        let output = command.output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), format!("net:[{wanted}]"));
    });
}

#[test]
fn a_child_dies_with_its_thread() {
    let child = std::thread::spawn(|| {
        let mut command = Command::new("sleep");
        command.arg("1000");
        die_with_thread(&mut command);
        command.spawn().unwrap()
    });
    let status = child.join().unwrap().wait().unwrap();
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(libc::SIGKILL));
}

#[test]
fn settings_belong_to_the_namespace() {
    isolated(|| {
        let other = Namespace::create().unwrap();
        set_sysctl("net.ipv4.ip_forward", "1").unwrap();
        assert_eq!(sysctl("net.ipv4.ip_forward").unwrap(), "1");
        assert_eq!(other.run(|| sysctl("net.ipv4.ip_forward").unwrap()).unwrap(), "0");
        assert!(sysctl("net.no.such.thing").is_err());
        Netlink::open().unwrap().add_veth("with.dot", "b", None).unwrap();
        assert_eq!(sysctl("net.ipv4.conf.with/dot.forwarding").unwrap(), "1");
    });
}

fn as_ordinary_user(command: &mut Command) {
    if !rustix::process::getuid().is_root() {
        return;
    }
    command.uid(65_534).gid(65_534);
    // After a change of user, and before the next exec, /proc/self belongs to root.
    // SAFETY: one system call.
    unsafe {
        command.pre_exec(|| check(libc::prctl(libc::PR_SET_DUMPABLE, 1)).map(drop));
    }
}

/// View of an ordinary user after entering: user 0, and a network with a loopback that answers.
const PROOF: &str = "id -u; grep -c : /proc/self/net/dev; cat /proc/self/uid_map | tr -s ' '";

#[test]
fn an_ordinary_user_becomes_root_of_an_empty_network() {
    let mut command = Command::new("sh");
    command.args(["-c", PROOF]);
    as_ordinary_user(&mut command);
    prepare_command_in_user_namespace(&mut command);
    let output = command.output().expect("user namespaces are needed for this test");
    let text = String::from_utf8_lossy(&output.stdout);
    let lines: Vec<_> = text.lines().map(str::trim).collect();
    assert_eq!(lines[..2], ["0", "1"], "{text}");
    assert!(lines[2].starts_with("0 ") && lines[2].ends_with(" 1"), "{text}");
}

#[test]
fn a_process_with_one_thread_enters_by_itself_and_can_make_a_tun() {
    let mut command = Command::new("sh");
    command.args(["-c", PROOF]);
    as_ordinary_user(&mut command);
    // The child has one thread, like a program at the start of `main`.
    // SAFETY: the C library's allocator works in a forked child.
    unsafe {
        command.pre_exec(|| {
            enter_user_namespace()?;
            if !is_privileged() {
                return Err(io::Error::other("not privileged inside"));
            }
            let tun = crate::tun::Tun::create("user0", 2)?;
            Netlink::open()?.set_up(tun.index(), true)?;
            let loopback = Netlink::open()?.link("lo")?.ok_or(io::ErrorKind::NotFound)?;
            if loopback.up { Ok(()) } else { Err(io::Error::other("the loopback is off")) }
        });
    }
    let output = command.output().expect("user namespaces are needed for this test");
    assert!(String::from_utf8_lossy(&output.stdout).starts_with("0\n"));
}

#[test]
fn a_process_with_several_threads_is_told_why_it_cannot_enter() {
    // The test harness has several threads.
    let error = std::thread::spawn(enter_user_namespace).join().unwrap().unwrap_err();
    assert!(error.to_string().contains("user namespace"), "{error}");
}

#[test]
fn the_kernels_own_ports_are_read() {
    isolated(|| {
        set_sysctl("net.ipv4.ip_local_port_range", "40000 50000").unwrap();
        assert_eq!(local_port_range().unwrap(), (40_000, 50_000));
    });
}
