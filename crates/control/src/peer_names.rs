//! DNS names of peers: asked in the background, again and again.
//!
//! [`Resolver`] decides when to ask and what an answer means; it knows no sockets and no clock, only times it
//! is given. [`ask`] is the thread that asks the system's resolver, which may block for many seconds, so a
//! new question does not wait for an old one.
//!
//! A name is asked again after a minute, a second after a failure (there may be no link or no name service
//! yet), and at once when a WAN changes. Addresses of earlier answers are kept for some minutes: name
//! servers rotate through large sets, and paths must not come and go with every answer.

use std::collections::BTreeMap;
use std::net::{IpAddr, ToSocketAddrs};
use std::time::{Duration, Instant};

/// After an answer.
const AGAIN: Duration = Duration::from_secs(60);
/// After a failure.
const RETRY: Duration = Duration::from_secs(1);
/// After many failures in a row.
const RETRY_MAX: Duration = Duration::from_secs(5);
/// Questions follow each other at least so far apart, even when a link flaps.
const GAP: Duration = Duration::from_millis(200);
/// A question that has not come back after this long no longer holds up the next one.
const PATIENCE: Duration = Duration::from_secs(3);
/// An address stays so long after the last answer that contained it.
const KEEP: Duration = Duration::from_secs(300);
/// Addresses of one name at most.
const ADDRESSES_MAX: usize = 8;
/// Unanswered questions of one name at most; each is a thread.
const OPEN_MAX: usize = 4;
/// Unanswered questions in all.
const OPEN_TOTAL_MAX: usize = 64;

/// The answer to one question.
pub type Answer = Result<Vec<IpAddr>, String>;

#[derive(Default)]
struct Name {
    /// With the time of the last answer that had it.
    addresses: Vec<(IpAddr, Instant)>,
    open: usize,
    asked_at: Option<Instant>,
    /// The open questions went over links as they were before: do not wait for them.
    outdated: bool,
    next_at: Option<Instant>,
    failures: u32,
    /// Last failure, for `status`.
    error: Option<String>,
}

/// When to ask for which name, and what is known.
#[derive(Default)]
pub struct Resolver {
    names: BTreeMap<String, Name>,
}

impl Resolver {
    /// Sets the names that matter; known ones keep their addresses.
    pub fn set_names<'a>(&mut self, names: impl IntoIterator<Item = &'a str>) {
        let mut old = std::mem::take(&mut self.names);
        for name in names {
            if !self.names.contains_key(name) {
                self.names.insert(name.to_owned(), old.remove(name).unwrap_or_default());
            }
        }
    }

    /// The names to ask for now; each is one call of [`ask`].
    pub fn due(&mut self, now: Instant) -> Vec<String> {
        let mut total: usize = self.names.values().map(|name| name.open).sum();
        let mut list = Vec::new();
        for (host, name) in &mut self.names {
            let waiting =
                name.open > 0 && !name.outdated && name.asked_at.is_some_and(|at| now < at + PATIENCE);
            let early = name.next_at.is_some_and(|at| now < at);
            if waiting || early || name.open >= OPEN_MAX || total >= OPEN_TOTAL_MAX {
                continue;
            }
            name.open += 1;
            total += 1;
            name.asked_at = Some(now);
            name.outdated = false;
            // Should no answer come at all, this is when the next question may go.
            name.next_at = Some(now + PATIENCE);
            list.push(host.clone());
        }
        list
    }

    /// When [`Self::due`] has something at the latest.
    #[must_use]
    pub fn next(&self) -> Option<Instant> {
        self.names
            .values()
            .filter(|name| name.open < OPEN_MAX)
            .filter_map(|name| match (name.next_at, name.asked_at) {
                (Some(at), Some(asked)) if name.open > 0 && !name.outdated => Some(at.max(asked + PATIENCE)),
                (at, _) => at,
            })
            .min()
    }

    /// Takes an answer; returns whether the addresses of the name changed.
    pub fn answer(&mut self, host: &str, answer: Answer, now: Instant) -> bool {
        let Some(name) = self.names.get_mut(host) else { return false };
        name.open = name.open.saturating_sub(1);
        let before = name.list();
        match answer {
            Ok(addresses) if !addresses.is_empty() => {
                if name.failures > 0 || name.addresses.is_empty() {
                    tracing::info!(host, ?addresses, "resolved");
                }
                name.failures = 0;
                name.error = None;
                name.next_at = Some(now + AGAIN);
                name.merge(&addresses, now);
            }
            Ok(_) => name.failed(host, "no address".to_owned(), now),
            Err(error) => name.failed(host, error, now),
        }
        name.list() != before
    }

    /// A WAN changed or a peer cannot be reached: asks again soon, names that fail at once.
    pub fn hurry(&mut self, now: Instant) {
        for name in self.names.values_mut() {
            let earliest = name.asked_at.map_or(now, |at| at + GAP).max(now);
            name.next_at = Some(name.next_at.map_or(earliest, |at| at.min(earliest)));
            name.outdated = true;
        }
    }

    /// Addresses of a name.
    #[must_use]
    pub fn addresses(&self, host: &str) -> Vec<IpAddr> {
        self.names.get(host).map(Name::list).unwrap_or_default()
    }

    /// Why a name has no address yet.
    #[must_use]
    pub fn error(&self, host: &str) -> Option<&str> {
        self.names.get(host)?.error.as_deref()
    }

    /// Whether there are names at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }
}

impl Name {
    fn list(&self) -> Vec<IpAddr> {
        let mut list: Vec<IpAddr> = self.addresses.iter().map(|(ip, _)| *ip).collect();
        list.sort_unstable();
        list
    }

    fn merge(&mut self, addresses: &[IpAddr], now: Instant) {
        let mut fresh: Vec<IpAddr> = Vec::new();
        for ip in addresses.iter().map(IpAddr::to_canonical) {
            if !ip.is_unspecified() && !ip.is_multicast() && !fresh.contains(&ip) {
                fresh.push(ip);
            }
        }
        // Those we have already stay when there are more than we take.
        fresh.sort_by_key(|ip| !self.addresses.iter().any(|(known, _)| known == ip));
        fresh.truncate(ADDRESSES_MAX);
        self.addresses.retain(|(ip, seen)| !fresh.contains(ip) && now < *seen + KEEP);
        self.addresses.truncate(ADDRESSES_MAX - fresh.len());
        self.addresses.extend(fresh.into_iter().map(|ip| (ip, now)));
    }

    fn failed(&mut self, host: &str, error: String, now: Instant) {
        if self.error.as_ref() != Some(&error) {
            tracing::warn!(host, error, "cannot resolve; trying again");
        }
        self.failures = self.failures.saturating_add(1);
        self.error = Some(error);
        let pause = (RETRY * self.failures.div_ceil(5)).min(RETRY_MAX);
        self.next_at = Some(now + pause);
    }
}

/// Asks the system's resolver in a thread of its own and hands the answer to `reply`.
pub fn ask(host: String, reply: impl FnOnce(String, Answer) + Send + 'static) -> std::io::Result<()> {
    std::thread::Builder::new()
        .name("resolver".to_owned())
        .spawn(move || {
            let answer = match (host.as_str(), 0).to_socket_addrs() {
                Ok(list) => Ok(list.map(|address| address.ip()).collect()),
                Err(error) => Err(error.to_string()),
            };
            reply(host, answer);
        })
        .map(drop)
}

/// Addresses of the name servers in the text of a `resolv.conf`, without those on this host.
#[must_use]
pub fn name_servers(resolv_conf: &str) -> Vec<IpAddr> {
    const MAX: usize = 8;
    let mut list = Vec::new();
    for line in resolv_conf.lines() {
        let mut words = line.split_whitespace();
        if words.next() != Some("nameserver") {
            continue;
        }
        let Some(ip) = words.next().and_then(|word| word.parse::<IpAddr>().ok()) else { continue };
        if !ip.is_loopback() && !ip.is_unspecified() && !list.contains(&ip) && list.len() < MAX {
            list.push(ip);
        }
    }
    list
}

/// The name servers this host uses now, those behind a local forwarder included.
#[must_use]
pub fn system_name_servers() -> Vec<IpAddr> {
    const BYTES_MAX: u64 = 64 << 10;
    let mut list = Vec::new();
    for path in
        ["/etc/resolv.conf", "/run/systemd/resolve/resolv.conf", "/run/NetworkManager/no-stub-resolv.conf"]
    {
        let Ok(file) = std::fs::File::open(path) else { continue };
        let mut text = String::new();
        if std::io::Read::read_to_string(&mut std::io::Read::take(file, BYTES_MAX), &mut text).is_ok() {
            list.extend(name_servers(&text).into_iter().filter(|ip| !list.contains(ip)).collect::<Vec<_>>());
        }
    }
    list
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn ips(list: &[&str]) -> Vec<IpAddr> {
        list.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn resolver() -> (Resolver, Instant) {
        let mut resolver = Resolver::default();
        resolver.set_names(["hub"]);
        (resolver, Instant::now())
    }

    #[test]
    fn asked_at_once_then_every_minute() {
        let (mut resolver, start) = resolver();
        assert_eq!(resolver.due(start), ["hub"]);
        assert_eq!(resolver.due(start), Vec::<String>::new());
        assert!(resolver.answer("hub", Ok(ips(&["192.0.2.2", "192.0.2.1"])), start));
        assert_eq!(resolver.addresses("hub"), ips(&["192.0.2.1", "192.0.2.2"]));
        assert_eq!(resolver.next(), Some(start + AGAIN));
        assert!(resolver.due(start + AGAIN - GAP).is_empty());
        assert_eq!(resolver.due(start + AGAIN), ["hub"]);
        assert!(!resolver.answer("hub", Ok(ips(&["192.0.2.1", "192.0.2.2"])), start + AGAIN));
    }

    #[test]
    fn a_failure_is_asked_again_and_loses_nothing() {
        let (mut resolver, start) = resolver();
        resolver.due(start);
        assert!(!resolver.answer("hub", Err("no link".to_owned()), start));
        assert_eq!(resolver.error("hub"), Some("no link"));
        assert_eq!(resolver.due(start + RETRY), ["hub"]);
        resolver.answer("hub", Ok(ips(&["192.0.2.1"])), start + RETRY);
        assert_eq!(resolver.error("hub"), None);
        resolver.due(start + RETRY + AGAIN);
        assert!(!resolver.answer("hub", Ok(vec![]), start + RETRY + AGAIN));
        assert_eq!(resolver.addresses("hub"), ips(&["192.0.2.1"]));
        // Many failures slow it down, but not below one question in five seconds.
        let mut now = start + RETRY + AGAIN;
        for _ in 0..100 {
            now = resolver.next().unwrap();
            resolver.due(now);
            resolver.answer("hub", Err("no".to_owned()), now);
        }
        assert_eq!(resolver.next(), Some(now + RETRY_MAX));
    }

    #[test]
    fn a_hanging_question_holds_up_nothing_but_threads_are_bounded() {
        let (mut resolver, start) = resolver();
        let mut asked = 0;
        for milliseconds in (0..60_000).step_by(100) {
            let now = start + Duration::from_millis(milliseconds);
            asked += resolver.due(now).len();
            if milliseconds == 1000 {
                // A new link: the question over the old one may hang for ever.
                resolver.hurry(now);
                assert_eq!(resolver.due(now), ["hub"]);
                asked += 1;
            }
        }
        assert_eq!(asked, OPEN_MAX);
        assert!(resolver.answer("hub", Ok(ips(&["192.0.2.1"])), start + Duration::from_secs(61)));
    }

    #[test]
    fn hurrying_does_not_flood() {
        let (mut resolver, start) = resolver();
        let mut asked = 0;
        for milliseconds in 0..1000 {
            let now = start + Duration::from_millis(milliseconds);
            resolver.hurry(now);
            for host in resolver.due(now) {
                asked += 1;
                resolver.answer(&host, Err("no".to_owned()), now);
            }
        }
        assert!(asked <= 1000 / 200 + 1, "{asked}");
    }

    #[test]
    fn rotating_answers_do_not_shake_paths() {
        let (mut resolver, start) = resolver();
        resolver.answer("hub", Ok(ips(&["192.0.2.1", "192.0.2.2"])), start);
        assert!(resolver.answer("hub", Ok(ips(&["192.0.2.3"])), start + AGAIN));
        assert!(!resolver.answer("hub", Ok(ips(&["192.0.2.1", "192.0.2.3"])), start + AGAIN * 2));
        // After some minutes without it an address is gone.
        let late = start + KEEP + AGAIN;
        assert!(resolver.answer("hub", Ok(ips(&["192.0.2.1", "192.0.2.3"])), late));
        assert_eq!(resolver.addresses("hub"), ips(&["192.0.2.1", "192.0.2.3"]));
        // Never more than a handful.
        let many: Vec<IpAddr> = (0..200u32).map(|n| IpAddr::from((n + 1).to_be_bytes())).collect();
        resolver.answer("hub", Ok(many), late);
        assert_eq!(resolver.addresses("hub").len(), ADDRESSES_MAX);
        assert!(resolver.addresses("hub").len() <= ADDRESSES_MAX);
    }

    #[test]
    fn names_come_and_go() {
        let (mut resolver, start) = resolver();
        resolver.answer("hub", Ok(ips(&["192.0.2.1"])), start);
        resolver.set_names(["hub", "other"]);
        assert_eq!(resolver.addresses("hub"), ips(&["192.0.2.1"]));
        resolver.set_names(["other"]);
        assert!(resolver.addresses("hub").is_empty());
        assert!(!resolver.answer("hub", Ok(ips(&["192.0.2.9"])), start));
        resolver.set_names([]);
        assert!(resolver.is_empty() && resolver.next().is_none());
    }

    #[test]
    fn name_servers_of_a_resolv_conf() {
        let text = "# nameserver 9.9.9.9\nsearch lan\nnameserver 127.0.0.53\nnameserver 192.0.2.53\n\
                    nameserver 192.0.2.53\nnameserver\nnameserver x\n\tnameserver 2001:db8::53 \n";
        assert_eq!(name_servers(text), ips(&["192.0.2.53", "2001:db8::53"]));
    }

    #[test]
    fn the_system_is_asked() {
        let (sender, receiver) = std::sync::mpsc::channel();
        ask("127.0.0.1".to_owned(), move |host, answer| sender.send((host, answer)).unwrap()).unwrap();
        let (host, answer) = receiver.recv_timeout(Duration::from_secs(10)).unwrap();
        assert_eq!((host.as_str(), answer.unwrap()), ("127.0.0.1", ips(&["127.0.0.1"])));
    }
}
