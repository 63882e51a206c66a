//! Programs that run inside a node, and the directory their files live in. Both are gone when dropped.

use std::fs::{DirBuilder, File};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::process::{Pid, Signal, kill_process};

/// How long a program may take to end after SIGTERM before it is killed.
const GRACE: Duration = Duration::from_secs(5);

/// A running program. It is ended when this is dropped, and the kernel kills it if the thread that started it is gone.
#[derive(Debug)]
pub struct Program {
    name: String,
    child: Child,
    log: Option<PathBuf>,
}

impl Program {
    /// Starts `command`; standard output and errors go to the file `log` if there is one, otherwise where the command says.
    pub fn start(mut command: Command, log: Option<&Path>) -> anyhow::Result<Program> {
        let name = command.get_program().to_string_lossy().into_owned();
        if let Some(path) = log {
            let file = File::create(path).with_context(|| format!("create {}", path.display()))?;
            command.stdout(file.try_clone()?).stderr(file).stdin(Stdio::null());
        }
        let child = command.spawn().with_context(|| format!("start {name}"))?;
        Ok(Program { name, child, log: log.map(Path::to_owned) })
    }

    /// Its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Fails when it has ended already, with the last lines it wrote.
    pub fn check_alive(&mut self) -> anyhow::Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => {
                bail!("{} has ended ({status}); it said:\n{}", self.name, self.last_lines(20))
            }
        }
    }

    /// The last lines of its log; empty without one.
    #[must_use]
    pub fn last_lines(&self, count: usize) -> String {
        let text = self.log.as_ref().and_then(|path| std::fs::read(path).ok()).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(count)..].join("\n")
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        let id = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).context("process id")?;
        kill_process(id, signal).with_context(|| format!("signal {}", self.name))
    }

    /// Ends it with SIGTERM, and SIGKILL if it takes more than 5 s.
    pub fn stop(&mut self) -> anyhow::Result<ExitStatus> {
        if let Some(status) = self.child.try_wait()? {
            return Ok(status);
        }
        self.signal(Signal::TERM)?;
        if let Some(status) = self.wait(GRACE)? {
            return Ok(status);
        }
        self.child.kill()?;
        Ok(self.child.wait()?)
    }

    /// Waits until it ends, at most so long.
    pub fn wait(&mut self, time: Duration) -> anyhow::Result<Option<ExitStatus>> {
        let end = Instant::now() + time;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(Some(status));
            }
            if Instant::now() >= end {
                return Ok(None);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            tracing::warn!(%error, name = self.name, "a program could not be ended");
        }
    }
}

/// A directory for configurations, keys and sockets, readable by its owner only, removed when dropped.
#[derive(Debug)]
pub struct ScratchDir {
    path: PathBuf,
}

impl ScratchDir {
    /// Makes one below the system's directory for temporary files.
    pub fn new(name: &str) -> anyhow::Result<ScratchDir> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let base = std::env::temp_dir();
        for _ in 0..1_000 {
            let number = NUMBER.fetch_add(1, Ordering::Relaxed);
            let path = base.join(format!("{name}-{}-{number}", std::process::id()));
            match DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => return Ok(ScratchDir { path }),
                // Left by a process of the same id that was killed; the next number is free.
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(error) => {
                    return Err(error).with_context(|| {
                        format!("make {} (set TMPDIR to a directory that can be written)", path.display())
                    });
                }
            }
        }
        bail!("no free name for a directory in {}", base.display());
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes a file in it, readable by its owner only.
    pub fn write(&self, name: &str, contents: impl AsRef<[u8]>) -> anyhow::Result<PathBuf> {
        use std::io::Write;
        use std::os::unix::fs::OpenOptionsExt;
        let path = self.path.join(name);
        let file =
            std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path);
        let write = |mut file: File| file.write_all(contents.as_ref());
        file.and_then(write).with_context(|| format!("write {}", path.display()))?;
        Ok(path)
    }
}

impl Drop for ScratchDir {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.path) {
            tracing::warn!(%error, path = %self.path.display(), "not removed");
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn a_program_ends_and_its_directory_goes() {
        let directory = ScratchDir::new("anabranch-test").unwrap();
        let path = directory.path().to_owned();
        let log = path.join("log");
        let mut command = Command::new("sh");
        command.args(["-c", "echo ready; exec sleep 60"]);
        let mut program = Program::start(command, Some(&log)).unwrap();
        while program.last_lines(1) != "ready" {
            program.check_alive().unwrap();
            std::thread::sleep(Duration::from_millis(5));
        }
        let started = Instant::now();
        assert!(!program.stop().unwrap().success());
        assert!(started.elapsed() < Duration::from_secs(2));
        assert!(program.check_alive().unwrap_err().to_string().contains("ready"));
        directory.write("key", "secret").unwrap();
        drop(directory);
        assert!(!path.exists());
    }

    #[test]
    fn a_missing_program_is_named() {
        let error = Program::start(Command::new("/nonexistent/program"), None).unwrap_err();
        assert!(format!("{error:#}").contains("/nonexistent/program"));
    }
}
