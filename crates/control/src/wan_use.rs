//! Use of WANs over time (row T12): what was carried of a month's quota, and when and where a WAN may be used at all.
//!
//! Counted are the tunnel's datagrams with their IP and UDP headers, in both directions, as far as this process sends and
//! receives them, over TCP and TLS too where this node dials; by which WAN peers connect over TLS is not known. The sums are kept in
//! the state directory, so that a restart does not begin the month anew. What the provider counts besides (other programs,
//! retransmissions of the link, what TCP and TLS add) is for the operator to leave room for.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use linux::clock::{LocalTime, local_time};
use serde::{Deserialize, Serialize};
use tunnel::bond::Bonds;

use crate::config::properties::Quota;
use crate::config::{self, Config, WANS_MAX};
use crate::files::{Durable, read_bounded, replace_file};
use crate::tls_paths;
use crate::wans::LiveWan;

/// Tier of a WAN whose quota is used up: the last.
pub const SPENT_TIER: u8 = 255;
/// IP and UDP headers of a datagram.
const HEADER_BYTES: u64 = 28;
/// The sums are written this often: so much of them a crash may lose.
const WRITE_EVERY: Duration = Duration::from_secs(30);
/// A larger file is not ours.
const FILE_BYTES_MAX: u64 = 65_536;
/// A longer file names no location.
const LOCATION_BYTES_MAX: u64 = 256;

/// Bytes that a WAN carried since its month began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Used {
    /// Year and month in which the month of the quota began.
    year: i32,
    month: u8,
    bytes: u64,
}

/// Counts of WANs with a quota, by interface.
pub(crate) struct WanUse {
    path: PathBuf,
    used: BTreeMap<String, Used>,
    /// Counters of each path as of the last time, by bond, path and its place in memory.
    counted: BTreeMap<(usize, u8, usize), u64>,
    /// WANs whose quota is used up, and those that may not be used now.
    spent: BTreeSet<String>,
    closed: BTreeMap<String, &'static str>,
    /// Location where this node is; `None`: nobody says.
    location: Option<String>,
    written: Instant,
    changed: bool,
    complained: bool,
}

impl WanUse {
    /// Takes up what an earlier run counted.
    pub(crate) fn load(directory: &Path, tun: &str) -> Self {
        let path = directory.join(format!("wan-use-{tun}.json"));
        let used = match read(&path) {
            Ok(used) => used,
            Err(error) if error.kind() == io::ErrorKind::NotFound => BTreeMap::new(),
            Err(error) => {
                tracing::warn!("{} cannot be read ({error}): quotas begin anew", path.display());
                BTreeMap::new()
            }
        };
        Self {
            path,
            used,
            counted: BTreeMap::new(),
            spent: BTreeSet::new(),
            closed: BTreeMap::new(),
            location: None,
            written: Instant::now(),
            changed: false,
            complained: false,
        }
    }

    /// Counts what the bonds' paths carried. Whether a WAN may be used now that might not before, or the other way round.
    pub(crate) fn tick(&mut self, config: &Config, lives: &[LiveWan], bonds: &Bonds) -> bool {
        let wans = &config.wans;
        let limited =
            |wan: &config::Wan| wan.quota.is_some() || wan.schedule.is_limited() || !wan.locations.is_empty();
        if self.used.is_empty() && !wans.iter().any(limited) {
            return false;
        }
        let now = local_time(linux::clock::realtime_ns() / 1_000_000_000);
        self.count(&now, wans, lives, bonds);
        self.look_where(config);
        let again = self.look(&now, wans, lives);
        if self.changed && (again || self.written.elapsed() >= WRITE_EVERY) {
            self.write();
        }
        again
    }

    /// Looks at what the host has: WANs that are spent are of the last tier, those that are closed are down.
    pub(crate) fn apply(&mut self, config: &Config, lives: &mut [LiveWan]) {
        self.look_where(config);
        self.look(&local_time(linux::clock::realtime_ns() / 1_000_000_000), &config.wans, lives);
        for live in lives {
            if let Some(state) = self.closed.get(&live.wan.interface) {
                live.wan.up = false;
                live.state = state;
            } else if self.spent.contains(&live.wan.interface) {
                live.wan.tier = SPENT_TIER;
                live.state = if live.wan.up { "quota used up" } else { live.state };
            }
        }
    }

    /// Bytes of its quota that a WAN has used.
    pub(crate) fn used(&self, interface: &str) -> u64 {
        self.used.get(interface).map_or(0, |used| used.bytes)
    }

    /// At an orderly end.
    pub(crate) fn finish(&mut self) {
        if self.changed {
            self.write();
        }
    }

    fn count(&mut self, now: &LocalTime, wans: &[config::Wan], lives: &[LiveWan], bonds: &Bonds) {
        let mut fresh: BTreeMap<u16, u64> = BTreeMap::new();
        let mut counted = BTreeMap::new();
        for bond in bonds.iter() {
            for path in bond.paths.load().iter() {
                let traffic = &path.traffic;
                let datagrams = traffic.tx_datagrams.load(Relaxed) + traffic.rx_datagrams.load(Relaxed);
                let bytes = traffic.tx_bytes.load(Relaxed) + traffic.rx_bytes.load(Relaxed);
                let sum = bytes + datagrams * HEADER_BYTES;
                let key = (bond.slot, path.id, Arc::as_ptr(path) as usize);
                // A path that is new counts from nothing.
                let before = self.counted.get(&key).copied().filter(|before| *before <= sum).unwrap_or(0);
                *fresh.entry(path.route().wan).or_default() += sum - before;
                counted.insert(key, sum);
            }
        }
        self.counted = counted;
        for live in lives {
            let Some(quota) = quota_of(live, wans) else { continue };
            let (year, month) = began(now, quota.day);
            let used = self.used.entry(live.wan.interface.clone()).or_default();
            // A clock that starts in the past, as those without a battery do, forgets nothing.
            if (used.year, used.month) < (year, month) {
                *used = Used { year, month, bytes: 0 };
                self.changed = true;
            }
            // What goes by this WAN over TCP and TLS is its too.
            let by = [live.wan.id, tls_paths::relay_id(live.wan.id)];
            let bytes: u64 = by.iter().filter_map(|id| fresh.get(id)).sum();
            used.bytes = used.bytes.saturating_add(bytes);
            self.changed |= bytes > 0;
        }
        // Interfaces that come and go under ever new names do not make it grow.
        while self.used.len() > 4 * WANS_MAX {
            self.used.pop_first();
        }
    }

    fn look(&mut self, now: &LocalTime, wans: &[config::Wan], lives: &[LiveWan]) -> bool {
        let names = |which: &dyn Fn(&LiveWan) -> bool| -> BTreeSet<String> {
            lives.iter().filter(|live| which(live)).map(|live| live.wan.interface.clone()).collect()
        };
        let spent = names(&|live| {
            let used = self.used.get(&live.wan.interface).copied().unwrap_or_default();
            quota_of(live, wans).is_some_and(|quota| {
                (used.year, used.month) >= began(now, quota.day) && used.bytes >= quota.bytes
            })
        });
        let closed = lives.iter().filter_map(|live| {
            let wan = live.section.and_then(|section| wans.get(section))?;
            Some((live.wan.interface.clone(), self.closing(wan, now)?))
        });
        let closed = closed.collect();
        let changed = (&spent, &closed) != (&self.spent, &self.closed);
        (self.spent, self.closed) = (spent, closed);
        changed
    }

    /// Why a WAN may not be used now and here.
    fn closing(&self, wan: &config::Wan, now: &LocalTime) -> Option<&'static str> {
        let here = |location: &String| self.location.as_ref() == Some(location);
        if !wan.locations.is_empty() && !wan.locations.iter().any(here) {
            Some("not used at this location")
        } else if !wan.schedule.allows(now.weekday, now.minute) {
            Some("outside its schedule")
        } else {
            None
        }
    }

    /// Reads where this node is, if some WAN is not everywhere.
    fn look_where(&mut self, config: &Config) {
        let file = config.node.location_file.as_deref();
        let file = file.filter(|_| config.wans.iter().any(|wan| !wan.locations.is_empty()));
        let location = file.and_then(|file| read_bounded(file, LOCATION_BYTES_MAX).ok());
        let location = location.map(|text| text.trim().to_owned()).filter(|text| !text.is_empty());
        if location != self.location {
            tracing::info!(location = location.as_deref().unwrap_or("unknown"), "location");
            self.location = location;
        }
    }

    fn write(&mut self) {
        self.written = Instant::now();
        let text = serde_json::to_string(&self.used).unwrap_or_default() + "\n";
        match replace_file(&self.path, text.as_bytes(), Durable::Later) {
            Ok(()) => (self.changed, self.complained) = (false, false),
            Err(error) if !self.complained => {
                self.complained = true;
                let path = self.path.display();
                tracing::warn!("{path} cannot be written ({error}): after a restart quotas begin anew");
            }
            Err(_) => {}
        }
    }
}

fn quota_of(live: &LiveWan, wans: &[config::Wan]) -> Option<Quota> {
    wans.get(live.section?)?.quota
}

/// Year and month in which the quota's present month began.
fn began(now: &LocalTime, day: u8) -> (i32, u8) {
    match (now.day >= day, now.month) {
        (true, month) => (now.year, month),
        (false, 1) => (now.year - 1, 12),
        (false, month) => (now.year, month - 1),
    }
}

fn read(path: &Path) -> io::Result<BTreeMap<String, Used>> {
    Ok(serde_json::from_str(&read_bounded(path, FILE_BYTES_MAX)?)?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::host_facts::HostView;
    use crate::wans::WanRegistry;
    use crate::wans::tests::{link, named};

    const NOON: LocalTime = LocalTime { year: 2026, month: 3, day: 4, weekday: 2, minute: 720 };

    fn lives(wans: &[config::Wan]) -> Vec<LiveWan> {
        let view = HostView { links: vec![link(2, "lte"), link(3, "dsl")], ..HostView::default() };
        WanRegistry::default().observe(wans, "ana0", &view)
    }

    fn with_quota(bytes: u64, day: u8) -> Vec<config::Wan> {
        let quota = Some(Quota { bytes, day });
        vec![config::Wan { quota, ..named("lte") }, named("dsl")]
    }

    #[test]
    fn a_quota_is_kept_over_a_restart_and_begins_anew_with_its_month() {
        let directory = std::env::temp_dir().join(format!("anabranch-use-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&directory);
        let wans = with_quota(1_000, 5);
        let mut using = WanUse::load(&directory, "ana0");
        using.count(&NOON, &wans, &lives(&wans), &Bonds::default());
        using.used.get_mut("lte").unwrap().bytes = 1_000;
        assert!(using.look(&NOON, &wans, &lives(&wans)), "it is used up");
        assert!(!using.look(&NOON, &wans, &lives(&wans)));
        using.finish();
        let mut again = WanUse::load(&directory, "ana0");
        assert_eq!(again.used("lte"), 1_000);
        again.look(&NOON, &wans, &lives(&wans));
        assert_eq!(again.spent.iter().collect::<Vec<_>>(), ["lte"]);
        // On the 5th the next month begins.
        let next = LocalTime { day: 5, ..NOON };
        again.count(&next, &wans, &lives(&wans), &Bonds::default());
        assert!(again.look(&next, &wans, &lives(&wans)));
        assert_eq!(again.used("lte"), 0);
        let _ = std::fs::remove_dir_all(&directory);
    }

    /// Without a battery a clock starts years ago, until somebody tells it the time.
    #[test]
    fn a_clock_that_starts_in_the_past_forgets_nothing() {
        let wans = with_quota(1_000, 5);
        let mut using = WanUse::load(Path::new("/nowhere"), "ana0");
        using.count(&NOON, &wans, &lives(&wans), &Bonds::default());
        using.used.get_mut("lte").unwrap().bytes = 1_000;
        let past = LocalTime { year: 1970, month: 1, day: 1, ..NOON };
        using.count(&past, &wans, &lives(&wans), &Bonds::default());
        using.look(&past, &wans, &lives(&wans));
        assert_eq!((using.used("lte"), using.spent.len()), (1_000, 1), "used up until somebody knows better");
        using.count(&NOON, &wans, &lives(&wans), &Bonds::default());
        using.look(&NOON, &wans, &lives(&wans));
        assert_eq!((using.used("lte"), using.spent.len()), (1_000, 1));
        let next = LocalTime { month: 4, day: 5, ..NOON };
        using.count(&next, &wans, &lives(&wans), &Bonds::default());
        assert_eq!(using.used("lte"), 0);
    }

    #[test]
    fn months_begin_on_their_day() {
        let at = |month, day| LocalTime { month, day, ..NOON };
        assert_eq!(began(&at(1, 14), 15), (2025, 12));
        assert_eq!(began(&at(1, 15), 15), (2026, 1));
        assert_eq!(began(&at(12, 31), 1), (2026, 12));
    }

    #[test]
    fn a_wan_is_closed_where_it_is_not_wanted() {
        let locations = vec!["depot".to_owned(), "yard".to_owned()];
        let wans = vec![config::Wan { locations, ..named("lte") }, named("dsl")];
        let mut using = WanUse::load(Path::new("/nowhere"), "ana0");
        for (location, closed) in
            [(None, 1), (Some("road"), 1), (Some("yard"), 0), (Some("depot"), 0), (Some("depo"), 1)]
        {
            using.location = location.map(str::to_owned);
            using.look(&NOON, &wans, &lives(&wans));
            assert_eq!(using.closed.len(), closed, "{location:?}");
            assert!(using.closed.keys().all(|name| name == "lte"));
        }
    }

    #[test]
    fn a_wan_that_is_spent_is_of_the_last_tier() {
        let wans = with_quota(10, 1);
        let mut using = WanUse::load(Path::new("/nowhere"), "ana0");
        let now = local_time(linux::clock::realtime_ns() / 1_000_000_000);
        using.count(&now, &wans, &lives(&wans), &Bonds::default());
        using.used.get_mut("lte").unwrap().bytes = 10;
        let mut lives = lives(&wans);
        let mut config = config::tests::config("", "");
        config.wans = wans;
        using.apply(&config, &mut lives);
        assert_eq!((lives[0].wan.tier, lives[1].wan.tier), (SPENT_TIER, 0));
    }
}
