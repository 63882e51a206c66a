//! The round of a core: pull, act, push, tick. The engine runs it on a thread with sockets behind [`Ports`];
//! captures and tests run the same one in memory.

use packet::attachment::InterfaceId;
use tunnel::time::Time;

use crate::datapath::Datapath;
use crate::ports::{Output as _, Ports, Pulled};

/// Packets taken from other cores in a round at most.
const HANDED_MAX: usize = 256;

/// A source that may have something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ready {
    /// The host's queue.
    Host,
    /// The TAP device's queue.
    Tap,
    /// A socket of the tunnel, by the number that the ports gave it.
    Socket(u64),
    /// An interface.
    Interface(InterfaceId),
    /// Neighbors or the host at a shared interface.
    Shared(InterfaceId),
}

/// Result of a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Round {
    /// When the next is due at the latest.
    pub next: Time,
    /// Some source may have more: the next is due now.
    pub more: bool,
}

/// A core's datapath and its ports.
pub struct Worker<P: Ports> {
    /// Datapath, which decides.
    pub datapath: Datapath,
    /// Where packets come from and go to.
    pub ports: P,
}

impl<P: Ports> Worker<P> {
    /// One round at `now`. `ready`: sources of which somebody told that they have something; interfaces that nobody tells
    /// of and other cores' packets are looked for in any case.
    pub fn round(&mut self, now: Time, ready: &[Ready]) -> Round {
        let Self { datapath, ports } = self;
        datapath.begin(now);
        let mut more = false;
        for source in ready {
            let pulled = match *source {
                Ready::Host => ports.pull_host(&mut |packet, out| datapath.host(now, packet, out)),
                Ready::Tap => ports.pull_tap(&mut |packet, out| datapath.tap(now, packet, out)),
                Ready::Socket(socket) => ports.pull_socket(socket, &mut |source, bytes, stride, out| {
                    // Delays are measured by it: what came in while this round was under way came no sooner.
                    let arrival = out.clock(now);
                    datapath.datagrams(arrival, source, bytes, stride, out);
                }),
                Ready::Interface(id) => {
                    ports.pull_interface(id, &mut |frames, out| datapath.interface(now, frames, out))
                }
                Ready::Shared(id) => {
                    ports.pull_shared(id, &mut |frame, out| datapath.shared_device(now, id, frame, out))
                }
            };
            more |= pulled == Pulled::Budget;
        }
        let pulled = ports.pull_interfaces(&mut |frames, out| datapath.interface(now, frames, out));
        more |= pulled == Pulled::Budget;
        more |= self.take_handed(now) == Pulled::Budget;
        // A round may have been long, or interrupted; datagrams leave now and not when it began.
        self.ports.look_at_clock();
        let out = self.ports.out();
        let next = self.datapath.finish(out.clock(now), out);
        Round { next, more }
    }

    fn take_handed(&mut self, now: Time) -> Pulled {
        for _ in 0..HANDED_MAX {
            let Some(handed) = self.ports.pop() else { return Pulled::All };
            self.datapath.handed(now, handed, self.ports.out());
        }
        Pulled::Budget
    }
}
