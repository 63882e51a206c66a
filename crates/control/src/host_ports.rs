//! Ports that programs of the host hold, listening or connected: address translation must not give them out where it shares
//! an address with the host, or the answers of strangers would be taken for those of clients.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use linux::socket_list::each_local_port;
use services::held_ports::{HeldPort, HeldPorts};

/// Ports that are kept track of at most.
const HELD_MAX: usize = 65_536;
/// How often sockets are looked at where anybody may send to a client's port…
const LOOK_OFTEN: Duration = Duration::from_millis(100);
/// … and where only the remote end of a flow may, so that a program that has its port as well does not miss much…
const LOOK_SELDOM: Duration = Duration::from_secs(1);
/// … but looking takes at most this part of the time: one of so many.
const TIME_SHARE: u32 = 50;
/// A port counts as held once it was there for so long: a resolver has another one for each question, and flows that have the port go on
/// meanwhile.
const SETTLED: Duration = Duration::from_secs(1);

/// The ports that the host held when they were looked at.
#[derive(Debug, Default)]
pub(crate) struct SocketWatch {
    /// Those of the last look, and when they were seen first; `None`: before the first look.
    since: BTreeMap<HeldPort, Option<Instant>>,
    known: Arc<HeldPorts>,
    opened: Arc<HeldPorts>,
    next_at: Option<Instant>,
}

/// Changes that a look has found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Seen {
    /// [`SocketWatch::known`].
    pub known: bool,
    /// [`SocketWatch::opened`].
    pub opened: bool,
}

impl SocketWatch {
    /// Those that have been there for a while: the policy has them.
    pub fn known(&self) -> &Arc<HeldPorts> {
        &self.known
    }

    /// Those that have been opened since, among them what became known with the last look.
    pub fn opened(&self) -> &Arc<HeldPorts> {
        &self.opened
    }

    /// When to look again.
    pub fn next_at(&self) -> Option<Instant> {
        self.next_at
    }

    /// Looks again, if it is time to; `ephemeral`: the range of the host's own outgoing connections, which is never given out;
    /// `mapped`: whether there are endpoint-independent mappings.
    pub fn look(&mut self, ephemeral: (u16, u16), mapped: bool) -> Seen {
        let start = Instant::now();
        if self.next_at.is_some_and(|next| start < next) {
            return Seen::default();
        }
        let first = self.next_at.is_none();
        let mut found = BTreeMap::new();
        let listed = each_local_port(|protocol, address, port| {
            let own = !address.is_loopback() && !(ephemeral.0..=ephemeral.1).contains(&port);
            if own && found.len() < HELD_MAX {
                let held = HeldPort { protocol, port, address };
                let since = self.since.get(&held).copied();
                found.insert(held, since.unwrap_or((!first).then_some(start)));
            }
        });
        if let Err(error) = listed {
            if first {
                tracing::warn!(%error, "ports of the host's programs are not seen, and may be given to flows");
            }
            self.next_at = Some(start + SETTLED);
            return Seen::default();
        }
        let settled = |since: &Option<Instant>| since.is_none_or(|since| start - since >= SETTLED);
        let known = found.iter().filter(|(_, since)| settled(since)).map(|(held, _)| *held);
        let known = HeldPorts::new(known);
        let is_known = |held: &HeldPort| self.known.has_socket(held);
        // The policy is made anew with what became known in a moment.
        let opened = found.keys().filter(|held| !first && !is_known(held)).copied();
        let opened = HeldPorts::new(opened);
        let seen = Seen { known: known != *self.known, opened: opened != *self.opened };
        if seen.known {
            self.known = Arc::new(known);
        }
        if seen.opened {
            self.opened = Arc::new(opened);
        }
        self.since = found;
        let pause = if mapped { LOOK_OFTEN } else { LOOK_SELDOM };
        self.next_at = Some(start + (start.elapsed() * TIME_SHARE).max(pause));
        seen
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use std::net::{TcpListener, UdpSocket};

    /// Looks as if so much time had passed.
    fn look_after(watch: &mut SocketWatch, time: Duration, ephemeral: (u16, u16)) -> Seen {
        watch.next_at = Some(Instant::now());
        watch.since.values_mut().flatten().for_each(|since| *since = since.checked_sub(time).unwrap());
        watch.look(ephemeral, true)
    }

    fn has(ports: &HeldPorts, port: u16) -> bool {
        ports.iter().any(|held| held.port == port)
    }

    #[test]
    fn sockets_come_and_go() {
        const SOON: Duration = Duration::from_millis(100);
        let mut watch = SocketWatch::default();
        let (tcp, udp) = (TcpListener::bind("0.0.0.0:0").unwrap(), UdpSocket::bind("[::]:0").unwrap());
        let ports = [tcp.local_addr().unwrap().port(), udp.local_addr().unwrap().port()];
        assert_eq!(watch.look((1, 1), true), Seen { known: true, opened: false });
        assert!(ports.iter().all(|port| has(watch.known(), *port)));
        drop(tcp);
        assert_eq!(watch.look((1, 1), true), Seen::default(), "not all the time");
        look_after(&mut watch, SOON, (1, 1));
        assert!(has(watch.known(), ports[1]) && !has(watch.known(), ports[0]));
        // One that is there for a moment, and one that stays.
        let moment = UdpSocket::bind("0.0.0.0:0").unwrap();
        let stays = UdpSocket::bind("0.0.0.0:0").unwrap();
        let [gone, port] = [&moment, &stays].map(|socket| socket.local_addr().unwrap().port());
        assert!(look_after(&mut watch, SOON, (1, 1)).opened);
        drop(moment);
        assert!(has(watch.opened(), gone) && has(watch.opened(), port) && !has(watch.known(), port));
        look_after(&mut watch, SETTLED, (1, 1));
        assert!(!has(watch.opened(), gone) && !has(watch.known(), gone));
        assert!(has(watch.opened(), port) && has(watch.known(), port), "until the policy has it");
        look_after(&mut watch, SOON, (1, 1));
        assert!(!has(watch.opened(), port) && has(watch.known(), port));
        look_after(&mut watch, SOON, (1, 65_535));
        assert!(watch.known().is_empty());
    }
}
