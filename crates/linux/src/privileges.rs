//! Rights of this process that it does not need.

use std::fs;
use std::io;

use rustix::process::{DumpableBehavior, Gid, Resource, Rlimit, Uid};
use rustix::thread::{CapabilitySet, CapabilitySets};

/// Number of `nobody` and `nogroup` where no file says otherwise.
const NOBODY: u32 = 65_534;

/// Users of the system; those of a directory service are named by number.
const USERS: &str = "/etc/passwd";

/// A user to become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct User {
    /// Its number.
    pub uid: u32,
    /// Number of its group.
    pub gid: u32,
}

impl User {
    /// The user of this name in `/etc/passwd`, or `UID` or `UID:GID` as numbers.
    ///
    /// # Errors
    /// When there is none.
    pub fn find(name: &str) -> io::Result<User> {
        find(name, &fs::read_to_string(USERS).unwrap_or_default()).ok_or_else(|| {
            let text = format!(
                "there is no user {name:?} in {USERS}; write a name from there, or numbers as 65534:65534"
            );
            io::Error::new(io::ErrorKind::NotFound, text)
        })
    }
}

fn find(name: &str, users: &str) -> Option<User> {
    let named = users.lines().find_map(|line| {
        let mut fields = line.split(':');
        let known = fields.next()?;
        let (uid, gid) = (fields.nth(1)?.parse().ok()?, fields.next()?.parse().ok()?);
        (known == name).then_some(User { uid, gid })
    });
    named.or_else(|| {
        if name == "nobody" {
            return Some(User { uid: NOBODY, gid: NOBODY });
        }
        let (uid, gid) = name.split_once(':').unwrap_or((name, name));
        Some(User { uid: uid.parse().ok()?, gid: gid.parse().ok()? })
    })
}

/// Becomes this user, without any capability, for good: nothing that is started from now on gets more. Call it before
/// another thread exists. An ordinary user stays who it is. Returns what could not be given up, in words: root of a user
/// namespace without other users cannot become another one.
pub fn give_up(user: &User) -> Vec<String> {
    let mut kept = Vec::new();
    let mut note = |what: &str, result: rustix::io::Result<()>| {
        if let Err(error) = result {
            kept.push(format!("{what}: {error}"));
        }
    };
    note("new rights by programs", rustix::thread::set_no_new_privs(true));
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    if rustix::process::getuid().is_root() && user.uid != 0 {
        note("further groups", rustix::thread::set_thread_groups(&[]));
        note(&format!("group, for {}", user.gid), rustix::thread::set_thread_res_gid(gid, gid, gid));
        note(&format!("user, for {}", user.uid), rustix::thread::set_thread_res_uid(uid, uid, uid));
    }
    let none = CapabilitySet::empty();
    let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
    note("capabilities", rustix::thread::set_capabilities(None, sets));
    kept
}

/// Capabilities that a node keeps: devices, routes and packets of the network; BPF programs, whose arithmetic with pointers the
/// kernel refuses without PERFMON; files and sockets of others than
/// root; limits and priorities; a port below 1,024; becoming the user of health checks.
pub const NEEDED: CapabilitySet = CapabilitySet::NET_ADMIN
    .union(CapabilitySet::NET_RAW)
    .union(CapabilitySet::BPF)
    .union(CapabilitySet::PERFMON)
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::SYS_RESOURCE)
    .union(CapabilitySet::SYS_NICE)
    .union(CapabilitySet::NET_BIND_SERVICE)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETGID);

/// Gives up all capabilities but [`NEEDED`], for programs that are started too, and the gain of others by them; memory is not
/// shown to other processes of the user and never written to a core file: keys are in it. Call it before another thread exists.
/// Returns what could not be done, in words.
pub fn keep_needed() -> Vec<String> {
    let mut failed = Vec::new();
    let mut note = |what: &str, result: rustix::io::Result<()>| {
        if let Err(error) = result {
            failed.push(format!("{what}: {error}"));
        }
    };
    for capability in CapabilitySet::all().difference(NEEDED).iter() {
        // The kernel may not know it, or this process may not change the set: then it has none to give up either.
        let is_there = rustix::thread::capability_is_in_bounding_set(capability) == Ok(true);
        if is_there && rustix::thread::remove_capability_from_bounding_set(capability).is_err() {
            break;
        }
    }
    match rustix::thread::capabilities(None) {
        Ok(sets) => {
            let kept = CapabilitySets {
                effective: sets.effective.intersection(NEEDED),
                permitted: sets.permitted.intersection(NEEDED),
                inheritable: CapabilitySet::empty(),
            };
            note("capabilities", rustix::thread::set_capabilities(None, kept));
        }
        Err(error) => note("capabilities", Err(error)),
    }
    note("new rights by programs", rustix::thread::set_no_new_privs(true));
    note("hidden memory", rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable));
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    note("no core files", rustix::process::setrlimit(Resource::Core, none));
    failed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_found_by_name_or_number() {
        let users = "root:x:0:0:root:/:/bin/bash\nbroken\nchecker:x:990:991::/:/bin/false\n";
        assert_eq!(find("checker", users), Some(User { uid: 990, gid: 991 }));
        assert_eq!(find("root", users), Some(User { uid: 0, gid: 0 }));
        assert_eq!(find("nobody", users), Some(User { uid: NOBODY, gid: NOBODY }));
        assert_eq!(find("12:13", users), Some(User { uid: 12, gid: 13 }));
        assert_eq!(find("12", users), Some(User { uid: 12, gid: 12 }));
        assert_eq!(find("broken", users), None);
        assert_eq!(find("", users), None);
    }

    /// In a thread: rights are a thread's.
    #[test]
    fn nothing_is_left_of_the_capabilities() {
        let status = std::thread::spawn(|| {
            let user = User { uid: rustix::process::getuid().as_raw(), gid: 0 };
            assert_eq!(give_up(&user), Vec::<String>::new());
            fs::read_to_string("/proc/thread-self/status").unwrap_or_default()
        });
        let status = status.join().unwrap_or_default();
        for line in ["CapPrm:\t0000000000000000", "CapEff:\t0000000000000000", "NoNewPrivs:\t1"] {
            assert!(status.contains(line), "{status}");
        }
    }
}
