//! The store on a real etcd: one leads, writes of an older leader do nothing, and a leader that is cut off stops by itself.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use manager::etcd::{EtcdSettings, EtcdStore};
use manager::store::{SaveError, Store};

const PATIENCE: Duration = Duration::from_secs(20);

/// An etcd of one member, gone when it is dropped.
struct Etcd {
    process: Child,
    folder: PathBuf,
    endpoint: String,
}

impl Etcd {
    fn start(name: &str, quota_bytes: u64) -> Self {
        let folder = std::env::temp_dir().join(format!("anabranch-etcd-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&folder);
        // Both are free while they are held.
        let ports = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let [client, peer] = ports.map(|port| format!("http://{}", port.local_addr().unwrap()));
        let mut command = Command::new("etcd");
        command.arg("--data-dir").arg(&folder).args([
            "--listen-client-urls",
            &client,
            "--advertise-client-urls",
        ]);
        command.args([&client, "--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
        command.args(["--initial-cluster", &format!("default={peer}"), "--unsafe-no-fsync"]);
        command.args(["--quota-backend-bytes", &quota_bytes.to_string()]);
        let process = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        Self { process, folder, endpoint: client }
    }

    fn settings(&self, name: &str) -> EtcdSettings {
        EtcdSettings {
            endpoints: vec!["http://127.0.0.1:1".to_owned(), self.endpoint.clone()],
            prefix: "/test".to_owned(),
            lease_s: 2,
            name: name.to_owned(),
        }
    }

    fn store(&self, name: &str) -> EtcdStore {
        EtcdStore::new(self.settings(name))
    }

    fn signal(&self, name: &str) {
        let status = Command::new("kill").args([name, &self.process.id().to_string()]).status();
        assert!(status.unwrap().success());
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

fn until<T>(what: &str, mut get: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(value) = get() {
            return value;
        }
        assert!(began.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn d1_one_manager_leads_and_the_next_one_has_a_later_term_and_the_state() {
    let etcd = Etcd::start("lead", 1 << 30);
    let (mut first, mut second) = (etcd.store("first"), etcd.store("second"));
    let term = until("etcd starts", || first.campaign().ok().flatten());
    assert!(first.leads() && !second.leads());
    assert_eq!((second.campaign().unwrap(), second.leader()), (None, Some("first")));
    assert_eq!(first.load().unwrap(), None);
    let state = vec![7; 700_000];
    first.save(&state).unwrap();
    assert!(matches!(second.save(b"not the leader's"), Err(SaveError::Lost)));
    // It is kept alive beyond its time.
    std::thread::sleep(Duration::from_millis(4_500));
    assert!(first.leads());
    assert_eq!(second.campaign().unwrap(), None);
    // In order, another one leads at once.
    drop(first);
    let next = second.campaign().unwrap().unwrap();
    assert!(next > term && second.load().unwrap() == Some(state));
}

#[test]
fn d1_a_leader_that_is_cut_off_stops_and_one_that_slept_writes_nothing() {
    let etcd = Etcd::start("fence", 1 << 30);
    let (mut first, mut second) = (etcd.store("first"), etcd.store("second"));
    until("etcd starts", || first.campaign().ok().flatten());
    first.save(b"one").unwrap();
    // etcd does not answer: the leader knows by its own clock.
    etcd.signal("-STOP");
    until("the leader stops", || (!first.leads()).then_some(()));
    assert!(matches!(first.save(b"two"), Err(SaveError::Failed(_))));
    etcd.signal("-CONT");
    // The second one leads as soon as the lease has ended; the first one believes that it leads, as after a long sleep.
    let term = until("the second one leads", || second.campaign().ok().flatten());
    assert!(term > 1);
    let said = first.save(b"three");
    assert!(matches!(said, Err(SaveError::Lost)), "{said:?}");
    assert_eq!(second.load().unwrap().as_deref(), Some(&b"one"[..]));
    second.save(b"four").unwrap();
    assert_eq!(first.load().unwrap().as_deref(), Some(&b"four"[..]), "anybody may read");
}

#[test]
fn d10_a_full_etcd_refuses_a_write_and_says_why() {
    let etcd = Etcd::start("full", 3 << 20);
    let mut store = etcd.store("first");
    until("etcd starts", || store.campaign().ok().flatten());
    let mut last = 0;
    let error = (0..100u8)
        .find_map(|number| match store.save(&vec![number; 300_000]) {
            Ok(()) => {
                last = number;
                None
            }
            Err(error) => Some(error.to_string()),
        })
        .unwrap();
    assert!(error.contains("space exceeded"), "{error}");
    assert!(store.load().unwrap() == Some(vec![last; 300_000]), "the one before is kept");
    assert!(store.leads());
}

/// A member of etcd that hangs: what comes in is held back, and passed on when it works again.
struct Hanging {
    address: SocketAddr,
    holds: Arc<AtomicBool>,
}

impl Hanging {
    fn start(etcd: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let holds = Arc::new(AtomicBool::new(false));
        let hold = Arc::clone(&holds);
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let (mut client, mut member) = (client.unwrap(), TcpStream::connect(etcd).unwrap());
                let (mut back, mut answers) = (client.try_clone().unwrap(), member.try_clone().unwrap());
                std::thread::spawn(move || std::io::copy(&mut answers, &mut back));
                let hold = Arc::clone(&hold);
                std::thread::spawn(move || {
                    let mut bytes = [0; 65_536];
                    while let Ok(got) = client.read(&mut bytes)
                        && got > 0
                    {
                        while hold.load(Relaxed) {
                            std::thread::sleep(Duration::from_millis(5));
                        }
                        member.write_all(&bytes[..got]).unwrap();
                    }
                    // The member does not see at once that nobody waits for its answer.
                    std::thread::sleep(Duration::from_secs(5));
                });
            }
        });
        Self { address, holds }
    }
}

#[test]
fn d1_a_write_that_was_under_way_for_long_does_not_bring_an_old_state_back() {
    let etcd = Etcd::start("late", 1 << 30);
    let hanging = Hanging::start(etcd.endpoint.trim_start_matches("http://").parse().unwrap());
    let endpoints = vec![format!("http://{}", hanging.address), etcd.endpoint.clone()];
    let mut first = etcd.store("before");
    until("etcd starts", || first.campaign().ok().flatten());
    drop(first);
    let mut store = EtcdStore::new(EtcdSettings { endpoints, lease_s: 30, ..etcd.settings("first") });
    until("leads", || store.campaign().ok().flatten());
    assert_eq!(store.load().unwrap(), None);
    store.save(b"one").unwrap();
    hanging.holds.store(true, Relaxed);
    store.save(b"two").unwrap();
    store.save(b"three").unwrap();
    hanging.holds.store(false, Relaxed);
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(store.load().unwrap().as_deref(), Some(&b"three"[..]));
    store.save(b"four").unwrap();
    assert_eq!(store.load().unwrap().as_deref(), Some(&b"four"[..]));
}
