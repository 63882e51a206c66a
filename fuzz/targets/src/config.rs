//! The configuration file.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use control::config::{Config, PEERS_MAX, Severity, WANS_MAX};

/// A folder of this thread with the key files that configurations of the corpus name; gone at its end.
struct Folder(PathBuf);

impl Folder {
    fn new() -> std::io::Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let memory = Path::new("/dev/shm");
        let parent = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
        let name = format!("anabranch-fuzz-{}-{}", std::process::id(), NEXT.fetch_add(1, Relaxed));
        let folder = Self(parent.join(name));
        std::fs::create_dir_all(&folder.0)?;
        std::fs::write(folder.0.join("node.key"), crate::seeds::PRIVATE_KEY)?;
        std::fs::write(folder.0.join("bad.key"), "secret!\n")?;
        Ok(folder)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Every file gets an answer: a configuration within the limits, or errors that each point at a line of
/// it and say something.
pub fn config(data: &[u8]) {
    thread_local! {
        static FOLDER: RefCell<Option<Folder>> = const { RefCell::new(None) };
    }
    // No key file but ours: the input must not choose what is read from the machine.
    let elsewhere = |line: &str| line.contains("file") && (line.contains('/') || line.contains('\\'));
    if String::from_utf8_lossy(data).lines().any(elsewhere) {
        return;
    }
    FOLDER.with_borrow_mut(|folder| {
        let folder = folder.get_or_insert_with(|| Folder::new().expect("a folder for configurations"));
        let path = folder.0.join("site.toml");
        std::fs::write(&path, data).expect("the folder takes files");
        judged(&path, data);
    });
}

fn judged(path: &Path, data: &[u8]) {
    let loaded = Config::load(path);
    let lines = data.split(|byte| *byte == b'\n').count();
    for problem in &loaded.problems {
        let text = problem.to_string();
        assert!(text.contains("site.toml"), "no file in {text}");
        assert!(problem.line <= lines, "no such line: {text}");
    }
    let errors = loaded.problems.iter().filter(|problem| problem.severity == Severity::Error).count();
    assert_eq!(loaded.config.is_none(), errors > 0, "errors and a configuration, or neither");
    if let Some(config) = loaded.config {
        assert!(config.peers.len() <= PEERS_MAX && config.wans.len() <= WANS_MAX);
        assert!((1280..=9000).contains(&config.tun.mtu));
    }
}
