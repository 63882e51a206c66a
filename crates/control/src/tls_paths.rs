//! Paths over TCP and TLS where UDP does not get through: when one is dialled and when it is left ([`Fallback`], pure), and the
//! process that carries them ([`tls_path`]).
//!
//! A line, one peer over one WAN, on which no UDP path works for [`SILENT`] gets a connection to the peer's `tls-port`. While it
//! carries, the engine has one more WAN ([`relay_wan`]) whose only endpoint is the process's UDP port; its challenges go on over
//! UDP as before. When UDP has worked for [`SETTLED`] the connection is closed.

mod process;

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use engine::config::Wan;
use packet::attachment::BondId;

pub(crate) use process::TlsPaths;

/// Time without a UDP path after which TCP is tried.
const SILENT: Duration = Duration::from_secs(3);
/// Time that UDP has to work before the connection is closed.
const SETTLED: Duration = Duration::from_secs(10);
/// Pause after a connection that failed; it doubles up to [`PAUSE_MAX`].
const PAUSE_MIN: Duration = Duration::from_secs(5);
const PAUSE_MAX: Duration = Duration::from_secs(60);

/// Bit that tells the WAN of a connection from the WAN that the connection goes by.
const RELAY: u16 = 0x4000;
/// WAN by which datagrams of peers come out of their connections.
const ACCEPTED: u16 = 0x7fff;

/// A peer over a WAN.
pub(crate) type Line = (BondId, u16);

/// A line as it is now.
#[derive(Clone, Debug)]
pub(crate) struct LineState {
    pub line: Line,
    /// Addresses and TCP ports to connect to; empty: TCP is not to be tried.
    pub remotes: Vec<SocketAddr>,
    /// A UDP path works.
    pub works: bool,
}

/// Something to do about a line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// Connect to this address, by the line's WAN, under this number.
    Dial { id: u32, line: Line, remote: SocketAddr },
    /// Close the connection.
    HangUp { id: u32 },
}

/// State of one line.
struct Known {
    silent_since: Option<Instant>,
    works_since: Option<Instant>,
    dial: Option<Dial>,
    not_before: Instant,
    pause: Duration,
    tries: usize,
}

#[derive(Clone, Copy)]
struct Dial {
    id: u32,
    /// UDP port of the process, when the connection carries.
    port: Option<u16>,
}

/// Which lines go over TCP.
#[derive(Default)]
pub(crate) struct Fallback {
    lines: BTreeMap<Line, Known>,
    last_id: u32,
}

impl Fallback {
    /// Looks at all lines that are there; what is to be done. One that is missing is gone.
    pub(crate) fn look(&mut self, now: Instant, lines: &[LineState]) -> Vec<Order> {
        let mut orders = Vec::new();
        self.lines.retain(|line, known| {
            let is_there = lines.iter().any(|state| state.line == *line && !state.remotes.is_empty());
            if let (false, Some(dial)) = (is_there, known.dial) {
                orders.push(Order::HangUp { id: dial.id });
            }
            is_there
        });
        for state in lines.iter().filter(|state| !state.remotes.is_empty()) {
            let known = self.lines.entry(state.line).or_insert_with(|| Known::new(now));
            if state.works {
                known.silent_since = None;
                let settled = now.duration_since(*known.works_since.get_or_insert(now)) >= SETTLED;
                if settled && let Some(dial) = known.dial.take() {
                    known.pause = PAUSE_MIN;
                    orders.push(Order::HangUp { id: dial.id });
                }
                continue;
            }
            known.works_since = None;
            let silent = now.duration_since(*known.silent_since.get_or_insert(now)) >= SILENT;
            if silent && known.dial.is_none() && now >= known.not_before {
                self.last_id += 1;
                known.dial = Some(Dial { id: self.last_id, port: None });
                let remote = state.remotes.get(known.tries % state.remotes.len()).copied();
                known.tries += 1;
                let (id, line) = (self.last_id, state.line);
                orders.extend(remote.map(|remote| Order::Dial { id, line, remote }));
            }
        }
        orders
    }

    /// A connection carries datagrams: the process takes them at this port.
    pub(crate) fn up(&mut self, id: u32, port: u16) -> Option<Line> {
        let (line, known) = self.dialed(id)?;
        known.dial = Some(Dial { id, port: Some(port) });
        Some(line)
    }

    /// A connection is no more.
    pub(crate) fn down(&mut self, now: Instant, id: u32) -> Option<Line> {
        let (line, known) = self.dialed(id)?;
        known.dial = None;
        known.not_before = now + known.pause;
        known.pause = (known.pause * 2).min(PAUSE_MAX);
        Some(line)
    }

    /// All connections are gone with their process.
    pub(crate) fn all_down(&mut self, now: Instant) {
        let ids: Vec<u32> = self.lines.values().filter_map(|known| Some(known.dial?.id)).collect();
        for id in ids {
            self.down(now, id);
        }
    }

    /// Lines that go over TCP, with the process's address for each.
    pub(crate) fn relays(&self) -> impl Iterator<Item = (Line, SocketAddr)> {
        self.lines.iter().filter_map(|(line, known)| {
            let port = known.dial?.port?;
            Some((*line, SocketAddr::from((Ipv4Addr::LOCALHOST, port))))
        })
    }

    fn dialed(&mut self, id: u32) -> Option<(Line, &mut Known)> {
        let found = self.lines.iter_mut().find(|(_, known)| known.dial.is_some_and(|dial| dial.id == id));
        found.map(|(line, known)| (*line, known))
    }
}

impl Known {
    fn new(now: Instant) -> Self {
        Self {
            silent_since: None,
            works_since: None,
            dial: None,
            not_before: now,
            pause: PAUSE_MIN,
            tries: 0,
        }
    }
}

/// Number of the WAN of the connections that go by another WAN.
pub(crate) fn relay_id(of: u16) -> u16 {
    RELAY | of
}

/// The WAN of the connections that go by another WAN: as good as that one.
pub(crate) fn relay_wan(of: &Wan, relays: Vec<SocketAddr>) -> Wan {
    Wan {
        id: relay_id(of.id),
        interface: String::new(),
        addresses: Vec::new(),
        mtu: 1500,
        relays: Some(relays),
        ..of.clone()
    }
}

/// The WAN by which datagrams come out of peers' connections, where WANs are bound to their interfaces.
pub(crate) fn accepting_wan() -> Wan {
    Wan { interface: "lo".to_owned(), relays: Some(Vec::new()), ..Wan::new(ACCEPTED, Vec::new()) }
}

/// Ids that stand for a peer's WANs: each with its connections, and peers' own connections.
pub(crate) fn with_relays(mut wans: Vec<u16>) -> Vec<u16> {
    wans.extend(wans.clone().into_iter().map(relay_id));
    wans.push(ACCEPTED);
    wans
}

/// Name of a WAN for people, of those that are known.
pub(crate) fn name(wan: &Wan, wans: &[Wan]) -> String {
    let Some(_) = &wan.relays else { return wan.interface.clone() };
    let of = wans.iter().find(|other| relay_id(other.id) == wan.id && other.relays.is_none());
    match of.map(|of| of.interface.as_str()) {
        Some(name) if !name.is_empty() => format!("{name} (TLS)"),
        _ => "TLS".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    const LINE: Line = (BondId(3), 1);

    fn state(works: bool) -> Vec<LineState> {
        let remotes = ["198.18.0.2:443", "198.18.1.2:443"].map(|remote| remote.parse().unwrap());
        vec![LineState { line: LINE, remotes: remotes.into(), works }]
    }

    fn dial(id: u32, remote: &str) -> Vec<Order> {
        vec![Order::Dial { id, line: LINE, remote: remote.parse().unwrap() }]
    }

    #[test]
    fn a_silent_line_is_dialled_and_left_when_udp_has_settled() {
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let mut fallback = Fallback::default();
        assert_eq!(fallback.look(at(0), &state(false)), []);
        assert_eq!(fallback.look(at(2), &state(false)), []);
        assert_eq!(fallback.look(at(3), &state(false)), dial(1, "198.18.0.2:443"));
        assert_eq!(fallback.look(at(4), &state(false)), [], "it is on its way");
        assert_eq!(fallback.relays().count(), 0);
        assert_eq!(fallback.up(1, 5_000), Some(LINE));
        assert_eq!(fallback.relays().next(), Some((LINE, "127.0.0.1:5000".parse().unwrap())));
        // A UDP path that comes and goes does not end it.
        assert_eq!(fallback.look(at(5), &state(true)), []);
        assert_eq!(fallback.look(at(14), &state(true)), []);
        assert_eq!(fallback.look(at(15), &state(false)), []);
        assert_eq!(fallback.look(at(16), &state(true)), []);
        assert_eq!(fallback.look(at(26), &state(true)), [Order::HangUp { id: 1 }]);
        assert_eq!(fallback.relays().count(), 0);
        assert_eq!((fallback.up(1, 5_000), fallback.down(at(26), 1)), (None, None), "its last words");
        assert_eq!(fallback.look(at(27), &state(true)), []);
    }

    #[test]
    fn what_fails_is_tried_less_and_less_often_at_each_address() {
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let mut fallback = Fallback::default();
        let mut dialed = Vec::new();
        for second in 0..400 {
            for order in fallback.look(at(second), &state(false)) {
                let Order::Dial { id, remote, .. } = order else { panic!("{order:?}") };
                dialed.push((second, remote.ip().to_string()));
                assert_eq!(fallback.down(at(second), id), Some(LINE));
            }
        }
        let seconds: Vec<u64> = dialed.iter().map(|(second, _)| *second).collect();
        assert_eq!(seconds, [3, 8, 18, 38, 78, 138, 198, 258, 318, 378]);
        assert!(dialed.iter().step_by(2).all(|(_, remote)| remote == "198.18.0.2"), "{dialed:?}");
        assert!(dialed.iter().skip(1).step_by(2).all(|(_, remote)| remote == "198.18.1.2"), "{dialed:?}");
    }

    #[test]
    fn a_line_that_is_gone_takes_its_connection_with_it() {
        let start = Instant::now();
        let mut fallback = Fallback::default();
        fallback.look(start, &state(false));
        let later = start + SILENT;
        assert_eq!(fallback.look(later, &state(false)).len(), 1);
        assert_eq!(fallback.look(later, &[]), [Order::HangUp { id: 1 }]);
        assert_eq!(fallback.look(later, &state(false)), [], "it begins anew");
        fallback.look(later + SILENT, &state(false));
        fallback.up(2, 5_000);
        fallback.all_down(later + SILENT);
        assert_eq!(fallback.relays().count(), 0);
        assert_eq!(fallback.look(later + SILENT + PAUSE_MIN, &state(false)).len(), 1);
    }

    #[test]
    fn connections_have_wans_of_their_own() {
        let mut of = accepting_wan();
        (of.id, of.interface, of.relays, of.tier) = (2, "lte".to_owned(), None, 1);
        let relay = relay_wan(&of, vec!["127.0.0.1:9".parse().unwrap()]);
        assert_eq!((relay.id, relay.tier, relay.interface.as_str()), (0x4002, 1, ""));
        let wans = [of, relay, accepting_wan()];
        let names: Vec<String> = wans.iter().map(|wan| name(wan, &wans)).collect();
        assert_eq!(names, ["lte", "lte (TLS)", "TLS"]);
        assert_eq!(with_relays(vec![1, 2]), [1, 2, 0x4001, 0x4002, ACCEPTED]);
    }
}
