//! Many short and long TCP connections and UDP associations at once, every byte of them compared at both ends, and a count of
//! those that break. Shows whether connections survive while the network between client and server is rebuilt.
//!
//! Each side is one thread around epoll, in a node or in a process of its own: the server learns all it has to know from the
//! first line of a connection (`wire.rs`) and from the head of a datagram (`udp.rs`), never from addresses, so that there may be
//! NAT and virtual servers between. Both sides count what breaks on their own.
//!
//! * A short connection is a request of random size and an answer derived from it. A quarter of them is closed by the client
//!   first; more would fill its ports with those in TIME-WAIT.
//! * A long one exchanges a chunk in both directions every 100 to 500 ms until its time is over, and is replaced then.
//! * A UDP association is a socket that sends numbered datagrams, each of which is answered.
//!
//! [`client::start`] and [`server::start`] give a [`Side`] each; [`Churn`] is one client and its servers.

mod associations;
mod cause;
pub mod client;
mod meter;
mod report;
pub mod server;
mod slots;
mod timers;
mod udp;
mod waiter;
mod wire;

use std::sync::Arc;
use std::thread::JoinHandle;

use anyhow::bail;

pub use cause::{Cause, Causes, UdpCause};
pub use report::{BySide, Figures, MarkReport, Report, SideReport};

use crate::stop::Stop;
use meter::Meter;

/// A connection is broken when nothing moved for so long while something was owed; an association is lost, ns.
pub const STALL_NS: u64 = 3_000_000_000;
/// A connection is broken when it does not open within this time: a SYN and its repetitions after 1 and 3 s, since Linux 6.5 after
/// each of 1 to 4 s, ns.
pub const OPEN_NS_MAX: u64 = 5_000_000_000;
/// Files that a side wants to have open.
const FILES: u64 = 200_000;

/// One side while it runs. It ends when this is dropped.
#[derive(Debug)]
pub struct Side {
    meter: Arc<Meter>,
    end: Stop,
    stop: Stop,
    thread: Option<JoinHandle<anyhow::Result<()>>>,
}

/// A moment marked by [`Side::mark`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// Its number, from 0.
    pub number: usize,
    /// Connections that were open.
    pub open: u64,
}

impl Side {
    fn start(
        name: &str,
        meter: Arc<Meter>,
        run: impl FnOnce(Stop, Stop) -> anyhow::Result<()> + Send + 'static,
    ) -> anyhow::Result<Side> {
        // As many as the system permits: beyond that it counts as an error of this side.
        let _ = linux::process::raise_open_files(FILES);
        let (end, stop) = (Stop::new(), Stop::new());
        let flags = (end.clone(), stop.clone());
        let thread = std::thread::Builder::new().name(name.into()).spawn(move || run(flags.0, flags.1))?;
        Ok(Side { meter, end, stop, thread: Some(thread) })
    }

    /// Counts as they are now.
    #[must_use]
    pub fn figures(&self) -> Figures {
        self.meter.figures()
    }

    /// Marks this moment, for instance just before the network is changed. The report tells of it as well.
    pub fn mark(&self) -> Mark {
        let (number, open) = self.meter.mark();
        Mark { number, open }
    }

    /// Number of connections that were open at the mark and still are.
    #[must_use]
    pub fn alive(&self, mark: Mark) -> u64 {
        self.meter.alive(mark.number)
    }

    /// Begins nothing new and brings what is open to its end. [`finish`](Self::finish) waits for that.
    pub fn end(&self) {
        self.end.raise();
    }

    /// Whether the thread has ended.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Ends it and waits until nothing is open, up to a limit.
    pub fn finish(mut self) -> anyhow::Result<SideReport> {
        self.end();
        if let Some(thread) = self.thread.take() {
            match thread.join() {
                Ok(result) => result?,
                Err(_) => bail!("a thread of the traffic failed"),
            }
        }
        Ok(self.meter.report())
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        self.stop.raise();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A client and its servers in one process.
#[derive(Debug)]
pub struct Churn {
    /// The side that begins connections.
    pub client: Side,
    /// The sides that answer; several behind a virtual server.
    pub servers: Vec<Side>,
}

impl Churn {
    /// Ends the client, then the servers, and unites their reports.
    pub fn finish(self) -> anyhow::Result<Report> {
        let client = self.client.finish()?;
        self.servers.iter().for_each(Side::end);
        let servers = self.servers.into_iter().map(Side::finish).collect::<anyhow::Result<_>>()?;
        Ok(Report::new(client, servers))
    }
}
