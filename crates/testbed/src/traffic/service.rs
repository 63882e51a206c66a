//! A TCP server that can die and come back: when it dies its port is closed and its connections end.

use std::collections::BTreeMap;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context;

use crate::topology::Node;

/// Behaviour of a server on a connection. The number is that of the service.
pub type Handler = fn(&TcpStream, u32) -> std::io::Result<()>;

#[derive(Default)]
struct Shared {
    connections: Mutex<BTreeMap<u64, TcpStream>>,
    accepted: AtomicU64,
    dead: AtomicBool,
}

impl Shared {
    fn connections(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, TcpStream>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A running server. It dies when this is dropped.
pub struct Service {
    number: u32,
    address: SocketAddr,
    listener: Arc<TcpListener>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Service {
    /// Listens on `address` in `node`; each connection is handled by a thread of its own.
    pub fn start(node: &Node, address: SocketAddr, number: u32, handler: Handler) -> anyhow::Result<Service> {
        let listener = node
            .run(|| TcpListener::bind(address))?
            .with_context(|| format!("cannot listen on {address} in {}", node.name()))?;
        let listener = Arc::new(listener);
        let shared = Arc::new(Shared::default());
        let (ear, state) = (Arc::clone(&listener), Arc::clone(&shared));
        let thread = std::thread::Builder::new()
            .name(format!("server-{number}"))
            .spawn(move || accept(&ear, &state, number, handler))?;
        Ok(Service { number, address, listener, shared, thread: Some(thread) })
    }

    /// The number it tells its clients.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.number
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Connections so far.
    #[must_use]
    pub fn accepted(&self) -> u64 {
        self.shared.accepted.load(Ordering::Relaxed)
    }

    /// Closes the port and ends all connections, as when a program is killed.
    pub fn kill(&mut self) {
        self.shared.dead.store(true, Ordering::SeqCst);
        // Wakes the thread that accepts.
        let _ = rustix::net::shutdown(&*self.listener, rustix::net::Shutdown::Both);
        for stream in self.shared.connections().values() {
            let _ = stream.shutdown(Shutdown::Both);
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.kill();
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>, number: u32, handler: Handler) {
    for id in 0.. {
        let stream = match listener.accept() {
            _ if shared.dead.load(Ordering::SeqCst) => return,
            Ok((stream, _)) => stream,
            // A connection that was gone before it was taken, or no descriptors: not the end of the server.
            Err(_) => {
                std::thread::sleep(Duration::from_millis(1));
                continue;
            }
        };
        shared.accepted.fetch_add(1, Ordering::Relaxed);
        let _ = stream.set_nodelay(true);
        let Ok(copy) = stream.try_clone() else { continue };
        shared.connections().insert(id, copy);
        if shared.dead.load(Ordering::SeqCst) {
            let _ = stream.shutdown(Shutdown::Both);
            return;
        }
        let state = Arc::clone(shared);
        let serve = move || {
            // How a connection ends is for its client to judge.
            let _ = handler(&stream, number);
            let _ = stream.shutdown(Shutdown::Both);
            state.connections().remove(&id);
        };
        if std::thread::Builder::new().name(format!("server-{number}")).spawn(serve).is_err() {
            shared.connections().remove(&id);
        }
    }
}
