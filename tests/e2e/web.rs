//! A web server, and a download from it by `curl` whose every byte is verified.

use std::io::{Read, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::process::{ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use ring::digest::{Context, SHA256};
use testbed::topology::Node;
use testbed::traffic::pattern::Pattern;

use crate::scene::*;

/// A small web server that gives everybody the same file. It ends when dropped.
pub struct WebServer {
    _thread: Background<()>,
    /// SHA-256 of the file.
    pub digest: Vec<u8>,
    /// Size of the file.
    pub bytes: u64,
    address: SocketAddr,
}

impl WebServer {
    pub fn start(place: &Node, address: &str, bytes: u64) -> Self {
        let address = socket(address, 80);
        let listener = tcp_listener(place, address);
        listener.set_nonblocking(true).unwrap();
        let thread = Background::start(move |end| {
            while !end.load(Ordering::Relaxed) {
                match listener.accept() {
                    // A client that goes away early is its own affair: it notices that bytes are missing.
                    Ok((stream, _)) => drop(std::thread::spawn(move || serve(stream, bytes))),
                    Err(_) => std::thread::sleep(Duration::from_millis(20)),
                }
            }
        });
        let mut context = Context::new(&SHA256);
        body(bytes, |block| {
            context.update(block);
            Ok(())
        })
        .unwrap();
        Self { _thread: thread, digest: context.finish().as_ref().to_vec(), bytes, address }
    }

    /// Starts to fetch the file with `curl`.
    pub fn fetch(&self, from: &Node) -> Download {
        let mut command = Command::new("curl");
        command.args(["--silent", "--show-error", "--fail", "--max-time", "180"]);
        command.arg(format!("http://{}/file", self.address));
        command.stdout(Stdio::piped());
        from.prepare(&mut command).unwrap();
        let received = Arc::new(AtomicU64::new(0));
        let mut child = command.spawn().expect("curl is needed");
        let input = child.stdout.take().unwrap();
        let counter = Arc::clone(&received);
        let thread = std::thread::spawn(move || hash(input, &counter));
        Download { child, received, thread, bytes: self.bytes, digest: self.digest.clone() }
    }
}

fn body(bytes: u64, mut take: impl FnMut(&[u8]) -> std::io::Result<()>) -> std::io::Result<()> {
    let (mut pattern, mut left) = (Pattern::new(7), bytes);
    while left > 0 {
        let block = pattern.next_block();
        let part = block.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        take(&block[..part])?;
        left -= part as u64;
    }
    Ok(())
}

fn serve(mut stream: TcpStream, bytes: u64) {
    let mut request = [0; 4096];
    let mut length = 0;
    while !request[..length].windows(4).any(|end| end == b"\r\n\r\n") {
        match stream.read(&mut request[length..]) {
            Ok(read) if read > 0 => length += read,
            _ => return,
        }
    }
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {bytes}\r\nConnection: close\r\n\r\n");
    let _ = stream.write_all(head.as_bytes()).and_then(|()| body(bytes, |block| stream.write_all(block)));
}

fn hash(mut input: ChildStdout, counter: &AtomicU64) -> (u64, Vec<u8>) {
    let mut context = Context::new(&SHA256);
    let mut buffer = vec![0; 1 << 16];
    while let Ok(read) = input.read(&mut buffer) {
        if read == 0 {
            break;
        }
        context.update(&buffer[..read]);
        counter.fetch_add(read as u64, Ordering::Relaxed);
    }
    (counter.load(Ordering::Relaxed), context.finish().as_ref().to_vec())
}

/// A file on its way.
pub struct Download {
    child: std::process::Child,
    received: Arc<AtomicU64>,
    thread: JoinHandle<(u64, Vec<u8>)>,
    bytes: u64,
    digest: Vec<u8>,
}

impl Download {
    /// Waits until so many megabytes have arrived.
    #[track_caller]
    pub fn wait_megabytes(&self, megabytes: u64) {
        let what = format!("{megabytes} MB of the file");
        wait_for(&what, 60.0, || self.received.load(Ordering::Relaxed) >= megabytes * 1_000_000);
    }

    /// Waits for the end; the file must be whole and unchanged.
    #[track_caller]
    pub fn finish(mut self) {
        let (bytes, digest) = self.thread.join().unwrap();
        let status = self.child.wait().unwrap();
        assert!(status.success(), "curl: {status} after {bytes} bytes");
        assert_eq!(bytes, self.bytes, "bytes of the file");
        assert_eq!(digest, self.digest, "SHA-256 of the file");
    }
}
