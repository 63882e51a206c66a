//! The control socket: a Unix socket, mode 0600, one JSON line there and one back.
//!
//! [`Server`] accepts connections in a thread; each request goes to the gateway's own thread and
//! its answer back. [`call`] is the other end, for the commands that ask a running gateway.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::fs::Mode;

use crate::config::RUNTIME_DIR;
use crate::protocol::{Request, Response};

/// Handles one request; runs in a thread of the connection and may block.
pub type Handler = dyn Fn(Request) -> Response + Send + Sync;

/// A request is one line; the longest has some ten thousand prefixes for a group.
const REQUEST_BYTES_MAX: u64 = 1 << 20;
/// A client that sends or reads nothing for so long is cut off.
const CLIENT_PATIENCE: Duration = Duration::from_secs(5);
/// A gateway answers within this time, also when it waits for a port.
const ANSWER_PATIENCE: Duration = Duration::from_secs(30);
/// Connections at the same time.
const CONNECTIONS_MAX: usize = 16;
/// A status with thousands of peers is some megabytes.
const ANSWER_BYTES_MAX: u64 = 256 << 20;

/// Listens until it is dropped.
pub struct Server {
    path: PathBuf,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Opens the socket. The caller holds the instance lock, so that a socket which is there already belongs
    /// to nobody. Call it before other threads exist: it changes the file mode mask for a moment.
    pub fn start(path: &Path, handler: Arc<Handler>) -> io::Result<Self> {
        match std::fs::symlink_metadata(path) {
            Ok(metadata) if metadata.file_type().is_socket() => std::fs::remove_file(path)?,
            Ok(_) => {
                let message = format!("{} exists and is not a socket", path.display());
                return Err(io::Error::new(io::ErrorKind::AlreadyExists, message));
            }
            Err(_) => {}
        }
        let mask = rustix::process::umask(Mode::from_raw_mode(0o177));
        let listener = UnixListener::bind(path);
        rustix::process::umask(mask);
        let listener = listener?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("control".to_owned())
            .spawn(move || accept(&listener, &stopped, &handler))?;
        Ok(Self { path: path.to_owned(), stop, thread: Some(thread) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // Wakes the thread that accepts; if that fails, the thread ends with the process.
        let woken = UnixStream::connect(&self.path).is_ok();
        if let Some(thread) = self.thread.take()
            && woken
        {
            let _ = thread.join();
        }
        let _ = std::fs::remove_file(&self.path);
    }
}

fn accept(listener: &UnixListener, stop: &AtomicBool, handler: &Arc<Handler>) {
    let open = Arc::new(AtomicUsize::new(0));
    loop {
        let connection = listener.accept();
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let stream = match connection {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, most likely: nothing to do but to try again, not in a tight loop.
                tracing::debug!(%error, "control socket");
                std::thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        if open.load(Ordering::Relaxed) >= CONNECTIONS_MAX {
            continue;
        }
        open.fetch_add(1, Ordering::Relaxed);
        let (handler, counter) = (Arc::clone(handler), Arc::clone(&open));
        let thread = std::thread::Builder::new().name("control-client".to_owned()).spawn(move || {
            if let Err(error) = serve(&stream, &*handler) {
                tracing::debug!(%error, "control client");
            }
            counter.fetch_sub(1, Ordering::Relaxed);
        });
        if thread.is_err() {
            open.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

fn serve(mut stream: &UnixStream, handler: &Handler) -> io::Result<()> {
    stream.set_read_timeout(Some(CLIENT_PATIENCE))?;
    stream.set_write_timeout(Some(CLIENT_PATIENCE))?;
    let mut line = String::new();
    BufReader::new(stream.take(REQUEST_BYTES_MAX)).read_line(&mut line)?;
    let response = match serde_json::from_str::<Request>(&line) {
        Ok(request) => handler(request),
        Err(error) => Response::error(format!("request not understood: {error}")),
    };
    let mut text = serde_json::to_string(&response)?;
    text.push('\n');
    stream.write_all(text.as_bytes())
}

/// Why [`call`] has no answer.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// Nobody listens there.
    #[error("no gateway is running: nothing listens on {0}")]
    NotRunning(PathBuf),
    /// The socket belongs to somebody else.
    #[error("not permitted to open {0}; run the command as the user the gateway runs as (root)")]
    Permission(PathBuf),
    /// No socket was named and there is not exactly one.
    #[error("{0}")]
    Choose(String),
    /// The connection broke, or the answer was not understood.
    #[error("no answer on {0}: {1}")]
    Broken(PathBuf, io::Error),
}

/// Sends a request and waits for the answer.
#[expect(clippy::needless_pass_by_value, reason = "whoever asks has no use for the question afterwards")]
pub fn call(path: &Path, request: Request) -> Result<Response, CallError> {
    let mut stream = UnixStream::connect(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => CallError::NotRunning(path.to_owned()),
        io::ErrorKind::PermissionDenied => CallError::Permission(path.to_owned()),
        _ => CallError::Broken(path.to_owned(), error),
    })?;
    let mut exchange = || -> io::Result<Response> {
        stream.set_read_timeout(Some(ANSWER_PATIENCE))?;
        stream.set_write_timeout(Some(CLIENT_PATIENCE))?;
        stream.write_all(format!("{}\n", serde_json::to_string(&request)?).as_bytes())?;
        let mut answer = Vec::new();
        (&stream).take(ANSWER_BYTES_MAX).read_to_end(&mut answer)?;
        if answer.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(serde_json::from_slice(&answer)?)
    };
    exchange().map_err(|error| CallError::Broken(path.to_owned(), error))
}

/// The socket to use: the one given, or the only one there is.
pub fn find(given: Option<&Path>) -> Result<PathBuf, CallError> {
    find_in(given, Path::new(RUNTIME_DIR))
}

fn find_in(given: Option<&Path>, directory: &Path) -> Result<PathBuf, CallError> {
    if let Some(path) = given {
        return Ok(path.to_owned());
    }
    let entries = std::fs::read_dir(directory);
    if entries.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied) {
        return Err(CallError::Permission(directory.to_owned()));
    }
    let mut list: Vec<PathBuf> = entries
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "sock"))
        .collect();
    list.sort();
    match list.as_slice() {
        [only] => Ok(only.clone()),
        [] => Err(CallError::Choose(format!(
            "no gateway is running: there is no socket in {}; if yours is elsewhere, name it with --socket",
            directory.display()
        ))),
        many => {
            let names: Vec<String> = many.iter().map(|path| path.display().to_string()).collect();
            Err(CallError::Choose(format!(
                "several gateways; choose one with --socket: {}",
                names.join(", ")
            )))
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn directory(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("anabranch-socket-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        path
    }

    fn answer(request: Request) -> Response {
        match request {
            Request::Stop => Response::done(),
            other => Response::error(format!("not now: {other:?}")),
        }
    }

    #[test]
    fn requests_and_answers() {
        let directory = directory("calls");
        let path = directory.join("a.sock");
        let server = Server::start(&path, Arc::new(answer)).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(call(&path, Request::Stop).unwrap().ok);
        let refused = call(&path, Request::Reload).unwrap();
        assert_eq!((refused.ok, refused.error.as_deref()), (false, Some("not now: Reload")));
        // Rubbish gets an answer, too much of it as well; then the next client is served.
        for rubbish in [&b"hello\n"[..], b"{\"command\":\"dance\"}\n", &[&[b'x'; 10_000][..], b"\n"].concat()]
        {
            let mut stream = UnixStream::connect(&path).unwrap();
            let _ = stream.write_all(rubbish);
            let mut text = String::new();
            let _ = stream.read_to_string(&mut text);
            assert!(text.is_empty() || text.contains("not understood"), "{text}");
        }
        assert!(call(&path, Request::Stop).unwrap().ok);
        drop(server);
        assert!(!path.exists());
        assert!(matches!(call(&path, Request::Status), Err(CallError::NotRunning(_))));
        std::fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn a_stale_socket_is_replaced_but_no_other_file() {
        let directory = directory("stale");
        let path = directory.join("a.sock");
        drop(UnixListener::bind(&path).unwrap());
        assert!(matches!(call(&path, Request::Status), Err(CallError::NotRunning(_))));
        drop(Server::start(&path, Arc::new(answer)).unwrap());
        std::fs::write(&path, "precious").unwrap();
        let error = Server::start(&path, Arc::new(answer)).map(drop).unwrap_err();
        assert!(error.to_string().contains("is not a socket"));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
        std::fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn the_only_socket_is_found() {
        let directory = directory("find");
        let error = |given| find_in(given, &directory).unwrap_err().to_string();
        assert!(error(None).contains("no gateway is running"));
        std::fs::write(directory.join("ana0.sock"), "").unwrap();
        std::fs::write(directory.join("ana0.sock.lock"), "").unwrap();
        assert_eq!(find_in(None, &directory).unwrap(), directory.join("ana0.sock"));
        std::fs::write(directory.join("ana1.sock"), "").unwrap();
        assert!(error(None).contains("several gateways; choose one with --socket"));
        assert_eq!(find_in(Some(Path::new("/x")), &directory).unwrap(), Path::new("/x"));
        std::fs::remove_dir_all(&directory).unwrap();
    }
}
