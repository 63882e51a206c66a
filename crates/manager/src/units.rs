//! Connections of the units: TCP on the manager's address inside the bonds. Whoever connects from a unit's address is that
//! unit: its bond has proved it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use cluster::message::{Frames, Message};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::mpsc;

use crate::actor::{Clock, Event, Events};

/// Messages to one unit that wait at most.
const WAITING_MAX: usize = 64;
/// A unit that takes nothing for so long is cut off.
const WRITE_PATIENCE: Duration = Duration::from_secs(2);
/// Connections at a time.
const CONNECTIONS_MAX: usize = 8_192;

/// Takes connections for ever.
pub async fn listen(listener: TcpListener, events: Events, clock: Clock) {
    let next = AtomicU64::new(1);
    let open = Arc::new(tokio::sync::Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(permit) = Arc::clone(&open).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let connection = next.fetch_add(1, Relaxed);
                let events = events.clone();
                tokio::spawn(async move {
                    serve(stream, connection, events, clock).await;
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "a unit could not connect");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

/// Takes heartbeats for ever: datagrams of one frame each, so that they wait behind nothing.
pub async fn beats(socket: UdpSocket, events: Events, clock: Clock) {
    let mut buffer = [0; 64];
    loop {
        let Ok((bytes, from)) = socket.recv_from(&mut buffer).await else {
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        };
        let mut frames = Frames::default();
        frames.push(buffer.get(..bytes).unwrap_or_default());
        if let Ok(Some(message @ Message::Heartbeat { .. })) = frames.take() {
            let (address, at_ns) = (from.ip().to_canonical(), clock.now_ns());
            if !events.send(Event::Beat { address, at_ns, message }).await {
                return;
            }
        }
    }
}

async fn serve(stream: TcpStream, connection: u64, events: Events, clock: Clock) {
    let Ok(peer) = stream.peer_addr() else { return };
    if stream.set_nodelay(true).is_err() {
        return;
    }
    let (from, to) = stream.into_split();
    let (sender, receiver) = mpsc::channel(WAITING_MAX);
    let address = peer.ip().to_canonical();
    if !events.send(Event::Connected { connection, address, to: sender }).await {
        return;
    }
    let writing = write(to, receiver);
    let reading = read(from, connection, &events, clock);
    tokio::select! {
        () = writing => {}
        result = reading => if let Err(error) = result {
            tracing::info!(%address, %error, "connection of a unit ended");
        }
    }
    events.send(Event::Disconnected(connection)).await;
}

async fn write(mut to: OwnedWriteHalf, mut messages: mpsc::Receiver<Message>) {
    let mut frame = Vec::new();
    while let Some(message) = messages.recv().await {
        frame.clear();
        if let Err(error) = message.encode(&mut frame) {
            tracing::error!(%error, "a message is too long");
            return;
        }
        match tokio::time::timeout(WRITE_PATIENCE, to.write_all(&frame)).await {
            Ok(Ok(())) => {}
            _ => return,
        }
    }
    // What was sent before the end arrives.
    let _ = to.shutdown().await;
}

async fn read(
    mut from: OwnedReadHalf,
    connection: u64,
    events: &Events,
    clock: Clock,
) -> std::io::Result<()> {
    let mut frames = Frames::default();
    let mut buffer = vec![0; 64 << 10];
    loop {
        let bytes = from.read(&mut buffer).await?;
        if bytes == 0 {
            return Ok(());
        }
        frames.push(buffer.get(..bytes).unwrap_or_default());
        while let Some(message) = frames.take().map_err(std::io::Error::other)? {
            let at_ns = clock.now_ns();
            if !events.send(Event::Received { connection, at_ns, message }).await {
                return Ok(());
            }
        }
    }
}
