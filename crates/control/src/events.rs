//! Events that other threads send to the node's thread ([`crate::event_loop`]).

use std::collections::BTreeSet;
use std::io;
use std::sync::mpsc::SyncSender;

use health::HealthChange;
use linux::event::EventFd;
use steering::units::Lease;

use crate::peer_names::Answer;
use crate::protocol::{Request, Response};

/// Event for the node's thread.
pub(crate) enum NodeEvent {
    /// A name was resolved, or not.
    Answer(String, Answer),
    /// Somebody asks over the control socket.
    Request(Request, SyncSender<Response>),
    /// A backend passes its checks, or does not.
    Health(HealthChange),
    /// The process for TLS paths with this number says something; `None`: it has ended.
    TlsPath(u32, Option<tls_path::protocol::FromHelper>),
    /// Blocks of ports that the cluster's manager leases to this machine.
    PortBlocks {
        /// Those that address translation may use from now on.
        blocks: BTreeSet<Lease>,
        /// Told when the policy says so.
        done: SyncSender<()>,
    },
}

/// Sender of other threads to the node's thread, which it wakes.
pub(crate) struct EventSender {
    pub(crate) sender: SyncSender<NodeEvent>,
    pub(crate) wake: EventFd,
}

impl EventSender {
    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { sender: self.sender.clone(), wake: self.wake.try_clone()? })
    }

    /// Hands an event over; `false` when the node has ended.
    pub(crate) fn send(&self, event: NodeEvent) -> bool {
        self.sender.send(event).is_ok() && self.wake.signal().is_ok()
    }
}
