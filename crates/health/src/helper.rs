//! The process that makes the checks: `anabranch health`, started by the gateway with one end of a socket pair as its standard
//! input. It ends when the other end is closed.

use std::io::{self, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use linux::privileges::{self, User};

use crate::protocol::{self, ALIVE_MS, FromHelper, Lines, ToHelper};
use crate::{HealthNews, Monitors, lock};

/// Descriptors that it wants: of checks under way, of connections that are ending, its own.
const DESCRIPTORS: u64 = 8_192;

/// So much sooner than other processes the kernel may end it when memory is short (`proc_pid_oom_score_adj`): the gateway
/// goes on without it.
const OOM_SCORE: &str = "300";

/// Checks until the gateway ends. `user`: whose rights it takes.
///
/// # Errors
/// When standard input is no socket, or what comes over it is not the gateway's.
pub fn run(user: &User) -> io::Result<()> {
    let input = io::stdin();
    let socket = input.as_fd().try_clone_to_owned()?;
    if !linux::process::is_socket(&socket) {
        let text = "standard input is no socket: the gateway starts this process itself, see anabranch up";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    let mut gateway = UnixStream::from(socket);
    // What the kernel does not allow here, it does not need either.
    let _ = linux::process::raise_open_files(DESCRIPTORS);
    let _ = std::fs::write("/proc/self/oom_score_adj", OOM_SCORE);
    let kept = privileges::give_up(user).join("; ");
    let sender = Arc::new(Mutex::new(gateway.try_clone()?));
    let news = Arc::clone(&sender);
    let on_news = move |news_of: HealthNews| send(&news, &FromHelper::News(news_of));
    let monitors = Monitors::start(Vec::new(), Box::new(on_news))?;
    send(&sender, &FromHelper::Alive { kept: kept.clone() });
    std::thread::Builder::new().name("alive".to_owned()).spawn(move || {
        loop {
            std::thread::sleep(Duration::from_millis(ALIVE_MS));
            send(&sender, &FromHelper::Alive { kept: kept.clone() });
        }
    })?;
    let (mut lines, mut targets) = (Lines::default(), Vec::new());
    let mut buffer = vec![0; 64 << 10];
    loop {
        let bytes = match gateway.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            // The gateway is gone.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(()),
            Err(error) => return Err(error),
        };
        lines.receive(buffer.get(..bytes).unwrap_or_default(), |message| match message {
            ToHelper::Target(target, known) => targets.push((*target, known)),
            ToHelper::Apply => monitors.update(std::mem::take(&mut targets)),
        })?;
    }
}

/// A message that cannot be sent is for nobody: the gateway has gone, and reading tells so.
fn send(gateway: &Mutex<UnixStream>, message: &FromHelper) {
    if let Ok(line) = protocol::line(message) {
        let _ = lock(gateway).write_all(&line);
    }
}
