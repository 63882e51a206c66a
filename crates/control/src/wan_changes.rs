//! Changes of WANs while the program runs (`anabranch path`, row T12): taken out, put back, worth something else than the file says. They
//! hold until the program ends, over reloads too, and are not written anywhere.

use std::collections::{BTreeMap, BTreeSet};

use crate::config::{self, InterfaceMatch, read, values};
use crate::protocol::WanWish;
use crate::wans::LiveWan;

/// Shown as the state of a WAN that was taken out.
const OFF: &str = "off (anabranch path)";
/// Keys of `[[wan]]` that may change.
const KEYS: [&str; 12] = [
    "tier",
    "cost",
    "direction",
    "latency-max",
    "loss-max",
    "hops-max",
    "rate-max",
    "receive-rate-max",
    "quota",
    "quota-day",
    "schedule",
    "locations",
];
/// Longest value, bytes.
const VALUE_BYTES_MAX: usize = 512;

/// Why a change is refused, for whoever asked for it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum WanChangeError {
    /// The configuration leaves it to the host's routes.
    #[error("there is no [[wan]] in the configuration")]
    NoWans,
    /// Nothing has this name.
    #[error("no WAN is named \"{name}\"; there are {known}")]
    Unknown {
        /// As it was written.
        name: String,
        /// Those there are.
        known: String,
    },
    /// One section stands for several interfaces.
    #[error(
        "\"{name}\" is of the section match = \"{pattern}\"; write that: its interfaces are all worth the same"
    )]
    OneOfMany {
        /// As it was written.
        name: String,
        /// The section's pattern.
        pattern: String,
    },
    /// It was taken out together with others.
    #[error("\"{name}\" is off by \"{pattern}\"; write that")]
    OffByPattern {
        /// As it was written.
        name: String,
        /// Pattern by which it was taken out.
        pattern: String,
    },
    /// Not a key that may change.
    #[error("{key} cannot be changed here; there are {}", KEYS.join(", "))]
    Key {
        /// As it was written.
        key: String,
    },
    /// The reader of the configuration refuses the values.
    #[error("{0}")]
    Values(String),
}

/// Changes in force.
#[derive(Clone, Debug, Default)]
pub(crate) struct WanChanges {
    /// The sections as they stand in the file.
    file: Vec<config::Wan>,
    /// Names and patterns of interfaces that are taken out.
    off: BTreeSet<String>,
    /// By the interface or pattern of a section: keys and values, as in the file.
    set: BTreeMap<String, BTreeMap<String, String>>,
}

impl WanChanges {
    /// None, of these sections.
    pub(crate) fn new(wans: &[config::Wan]) -> Self {
        Self { file: wans.to_vec(), ..Self::default() }
    }

    /// The sections of a file that was read: they are replaced by what is in force. Changes of sections that are gone are forgotten, and so
    /// are those that the file no longer permits.
    pub(crate) fn configured(&mut self, wans: &mut [config::Wan]) {
        self.file = wans.to_vec();
        let file = &self.file;
        self.off.retain(|name| file.iter().any(|wan| is_of(wan, name)));
        self.set.retain(|name, keys| {
            let wan = file.iter().find(|wan| wan.interface.text() == name);
            wan.is_some_and(|wan| changed(wan, keys).is_ok())
        });
        self.put(wans);
    }

    /// Takes a wish over; `wans` are the sections in force.
    pub(crate) fn change(
        &mut self,
        name: &str,
        wish: &WanWish,
        wans: &mut [config::Wan],
    ) -> Result<(), WanChangeError> {
        if self.file.is_empty() {
            return Err(WanChangeError::NoWans);
        }
        if !self.file.iter().any(|wan| is_of(wan, name)) {
            let known: Vec<&str> = self.file.iter().map(|wan| wan.interface.text()).collect();
            return Err(WanChangeError::Unknown { name: name.to_owned(), known: known.join(", ") });
        }
        match wish {
            WanWish::Off => {
                self.off.insert(name.to_owned());
            }
            WanWish::On => {
                self.off.remove(name);
                if let Some(pattern) = self.off.iter().find(|off| values::matches(off, name)) {
                    return Err(WanChangeError::OffByPattern {
                        name: name.to_owned(),
                        pattern: pattern.clone(),
                    });
                }
            }
            WanWish::Set(keys) => {
                let wan = self.section(name)?;
                let mut all = self.set.get(name).cloned().unwrap_or_default();
                all.extend(keys.iter().map(|(key, value)| (key.clone(), value.clone())));
                changed(wan, &all)?;
                self.set.insert(name.to_owned(), all);
            }
            WanWish::Reset => {
                self.section(name)?;
                self.set.remove(name);
            }
        }
        self.put(wans);
        Ok(())
    }

    /// The WANs that are taken out are down.
    pub(crate) fn apply(&self, lives: &mut [LiveWan]) {
        for live in lives {
            if self.off.iter().any(|off| values::matches(off, &live.wan.interface)) {
                live.wan.up = false;
                live.state = OFF;
            }
        }
    }

    /// The section of this name.
    fn section(&self, name: &str) -> Result<&config::Wan, WanChangeError> {
        let own = self.file.iter().find(|wan| wan.interface.text() == name);
        let pattern = || {
            self.file.iter().find(|wan| is_of(wan, name)).map_or("", |wan| wan.interface.text()).to_owned()
        };
        own.ok_or_else(|| WanChangeError::OneOfMany { name: name.to_owned(), pattern: pattern() })
    }

    /// Puts the changes in force.
    fn put(&self, wans: &mut [config::Wan]) {
        for (wan, file) in wans.iter_mut().zip(&self.file) {
            let keys = self.set.get(file.interface.text());
            let now = keys.and_then(|keys| changed(file, keys).ok());
            *wan = now.unwrap_or_else(|| file.clone());
        }
    }
}

/// Whether a section is the one of this name, or the interface is one of its.
fn is_of(wan: &config::Wan, name: &str) -> bool {
    wan.interface.text() == name || wan.interface.covers(name)
}

/// A section with other values.
fn changed(file: &config::Wan, keys: &BTreeMap<String, String>) -> Result<config::Wan, WanChangeError> {
    let mut text = match &file.interface {
        InterfaceMatch::Name(name) => format!("interface = {}\n", toml_value(name)),
        InterfaceMatch::Pattern(pattern) => format!("match = {}\n", toml_value(pattern)),
    };
    for (key, value) in keys {
        if !KEYS.contains(&key.as_str()) {
            return Err(WanChangeError::Key { key: key.clone() });
        }
        if value.len() > VALUE_BYTES_MAX || value.contains(char::is_control) {
            return Err(WanChangeError::Values(format!("{key}: not a value")));
        }
        text.push_str(&format!("{key} = {}\n", toml_value(value)));
    }
    let new = read::one_wan(&text).map_err(|problems| {
        let said: Vec<String> =
            problems.iter().map(|problem| format!("{}: {}", problem.key, problem.message)).collect();
        WanChangeError::Values(said.join("; "))
    })?;
    let mut wan = file.clone();
    for key in keys.keys() {
        match key.as_str() {
            "tier" => wan.tier = new.tier,
            "cost" => wan.properties.cost = new.properties.cost,
            "direction" => wan.properties.direction = new.properties.direction,
            "latency-max" => wan.properties.latency_max_us = new.properties.latency_max_us,
            "loss-max" => wan.properties.loss_max = new.properties.loss_max,
            "hops-max" => wan.properties.hops_max = new.properties.hops_max,
            "rate-max" => wan.rate_max_bps = new.rate_max_bps,
            "receive-rate-max" => wan.receive_rate_max_bps = new.receive_rate_max_bps,
            "schedule" => wan.schedule.clone_from(&new.schedule),
            "locations" => wan.locations.clone_from(&new.locations),
            _ => {
                wan.quota = new.quota;
                wan.properties.metered = new.properties.metered;
            }
        }
    }
    Ok(wan)
}

/// A number or a list as it is, anything else as a string.
fn toml_value(text: &str) -> String {
    let plain = text.parse::<u64>().is_ok() || text.starts_with(['[', '"']);
    if plain { text.to_owned() } else { format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\"")) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use tunnel::config::Direction;

    use super::*;
    use crate::config::tests::config as configuration;

    const WANS: &str = "[[wan]]\ninterface = \"wan0\"\ntier = 1\n[[wan]]\nmatch = \"wwan*\"\nrate-max = \"20 Mbit/s\"\n\
                        [[peer]]\nname = \"hub\"\npublic-key = \"$HUB\"\nallowed-ips = [\"10.77.0.2/32\"]\n";

    fn wans(text: &str) -> Vec<config::Wan> {
        configuration("listen = 4600", &format!("[tun]\naddress = [\"10.77.0.1/24\"]\n{text}")).wans
    }

    fn set(keys: &[(&str, &str)]) -> WanWish {
        WanWish::Set(keys.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect())
    }

    #[test]
    fn values_are_read_as_in_the_file_and_hold_over_reloads() {
        let (mut changes, mut now) = (WanChanges::default(), wans(WANS));
        changes.configured(&mut now);
        assert_eq!(now, wans(WANS));
        changes.change("wan0", &set(&[("tier", "3"), ("direction", "receive")]), &mut now).unwrap();
        changes.change("wan0", &set(&[("cost", "7")]), &mut now).unwrap();
        changes
            .change(
                "wwan*",
                &set(&[("rate-max", "5 Mbit/s"), ("schedule", "[\"mon 08:00-09:00\"]")]),
                &mut now,
            )
            .unwrap();
        let check = |now: &[config::Wan]| {
            assert_eq!((now[0].tier, now[0].properties.cost), (3, 7));
            assert_eq!(now[0].properties.direction, Direction::Receive);
            assert_eq!(now[1].rate_max_bps, Some(5_000_000));
            assert!(now[1].schedule.is_limited());
        };
        check(&now);
        let mut again = wans(WANS);
        changes.configured(&mut again);
        check(&again);
        changes.change("wan0", &WanWish::Reset, &mut again).unwrap();
        assert_eq!(again[0], wans(WANS)[0]);
        // Of a section that is gone nothing is kept.
        changes.configured(&mut wans(&WANS.replace("wwan*", "lte*")));
        let mut last = wans(WANS);
        changes.configured(&mut last);
        assert_eq!(last, wans(WANS));
    }

    #[test]
    fn what_cannot_be_is_refused_and_changes_nothing() {
        let (mut changes, mut now) = (WanChanges::default(), wans(WANS));
        let mut said = |changes: &mut WanChanges, name: &str, wish: &WanWish| {
            changes.change(name, wish, &mut now).unwrap_err().to_string()
        };
        assert_eq!(said(&mut changes, "wan0", &WanWish::Off), "there is no [[wan]] in the configuration");
        changes.configured(&mut wans(WANS));
        assert_eq!(
            said(&mut changes, "wan9", &WanWish::Off),
            "no WAN is named \"wan9\"; there are wan0, wwan*"
        );
        assert!(said(&mut changes, "wwan0", &set(&[("tier", "1")])).contains("write that"));
        assert!(said(&mut changes, "wan0", &set(&[("gateway", "1.2.3.4")])).contains("there are tier, cost"));
        for (key, value, about) in [
            ("tier", "300", "wan.tier: 300 found, a whole number from 0 to 255 is needed"),
            ("rate-max", "fast", "wan.rate-max: "),
            ("quota-day", "3", "wan.quota-day: there is no quota"),
            ("cost", "1\ntier = 2", "cost: not a value"),
            ("cost", "\"1", "not TOML"),
        ] {
            let said = said(&mut changes, "wan0", &set(&[(key, value)]));
            assert!(said.contains(about), "{said}");
        }
        assert!(changes.set.is_empty() && changes.off.is_empty());
    }

    #[test]
    fn off_by_a_pattern_is_on_by_the_pattern() {
        let (mut changes, mut now) = (WanChanges::default(), wans(WANS));
        changes.configured(&mut now);
        changes.change("wwan*", &WanWish::Off, &mut now).unwrap();
        let refused = changes.change("wwan0", &WanWish::On, &mut now).unwrap_err();
        assert_eq!(refused.to_string(), "\"wwan0\" is off by \"wwan*\"; write that");
        changes.change("wwan*", &WanWish::On, &mut now).unwrap();
        changes.change("wwan0", &WanWish::On, &mut now).unwrap();
    }
}
