//! Settings of the kernel for single devices (`net.ipv4.conf.DEVICE…`) that this program changes, and puts back.
//!
//! A setting is read and set each time it is wanted: a device that went and came back has its defaults, and `systemd-sysctl` writes
//! what its files say. What was there before is put back when the setting is not wanted any more or the program ends, unless
//! somebody has set something else since. A file beside the control socket remembers it, so that a start after a crash does not
//! take its own value for the host's.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use linux::netns::{set_sysctl, sysctl};
use serde::{Deserialize, Serialize};

use crate::files::{read_bounded, remember};

/// Largest file of remembered settings.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Setting that was changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Changed {
    /// Value that somebody else had set last.
    before: String,
    /// Value that it was given.
    ours: String,
}

/// Settings that one part of the program has changed, by name.
#[derive(Debug, Default)]
pub(crate) struct DeviceSettings {
    /// `None`: all of them go with their devices.
    file: Option<PathBuf>,
    changed: BTreeMap<String, Changed>,
}

/// Name of a device's setting, of `ipv4` or `ipv6`; dots of the device's name are written with `/`.
pub(crate) fn name(family: &str, device: &str, setting: &str) -> String {
    format!("net.{family}.conf.{}.{setting}", device.replace('.', "/"))
}

impl DeviceSettings {
    /// With what a run that died had changed, as this file remembers it.
    pub(crate) fn open(file: PathBuf) -> Self {
        let text = read_bounded(&file, FILE_BYTES_MAX).unwrap_or_default();
        let mut changed: BTreeMap<String, Changed> = serde_json::from_str(&text).unwrap_or_default();
        changed
            .retain(|name, _| ["net.ipv4.conf.", "net.ipv6.conf."].iter().any(|all| name.starts_with(all)));
        Self { file: Some(file), changed }
    }

    /// Gives a setting this value. Whether it has it by this program now and had not before; not where it has it anyway, or there is
    /// no such device.
    ///
    /// # Errors
    /// As the kernel refuses it.
    pub(crate) fn set(&mut self, name: &str, value: &str) -> Result<bool, linux::Error> {
        let Some(before) = sysctl(name).ok().filter(|now| now != value) else { return Ok(false) };
        let known = self.changed.insert(name.to_owned(), Changed { before, ours: value.to_owned() });
        // First the file: who finds it after a crash finds the truth.
        self.remember();
        set_sysctl(name, value).map(|()| known.is_none()).inspect_err(|_| {
            self.changed.remove(name);
            self.remember();
        })
    }

    /// Puts those back that are not wanted any more.
    pub(crate) fn retain(&mut self, wanted: impl Fn(&str) -> bool) {
        let count = self.changed.len();
        self.changed.retain(|name, changed| {
            let stays = wanted(name);
            if !stays && sysctl(name).is_ok_and(|now| now == changed.ours) {
                // A device that is gone took its settings along.
                let _ = set_sysctl(name, &changed.before);
            }
            stays
        });
        if self.changed.len() != count {
            self.remember();
        }
    }

    /// Of settings that end with this word, puts back all but those of these names.
    pub(crate) fn keep_only(&mut self, setting: &str, wanted: &BTreeSet<String>) {
        self.retain(|name| name.rsplit('.').next() != Some(setting) || wanted.contains(name));
    }

    /// Puts everything back.
    pub(crate) fn clear(&mut self) {
        self.retain(|_| false);
    }

    fn remember(&self) {
        let Some(file) = &self.file else { return };
        let kept = (!self.changed.is_empty()).then_some(&self.changed);
        if let Err(error) = remember(file, kept) {
            let file = file.display();
            tracing::warn!(%file, %error, "after a crash, settings of devices would stay as they are");
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use linux::testing::isolated;

    #[test]
    fn what_was_there_is_put_back_whoever_sets_it_and_dies_meanwhile() {
        isolated(|| {
            let file = std::env::temp_dir().join(format!("anabranch-settings-{}", std::process::id()));
            let (loose, deaf) = (name("ipv4", "lo", "rp_filter"), name("ipv6", "lo", "accept_ra"));
            let put = |name: &str, value: &str| set_sysctl(name, value).unwrap();
            let is = |loose_is: &str, deaf_is: &str| {
                assert_eq!(
                    (sysctl(&loose).unwrap().as_str(), sysctl(&deaf).unwrap().as_str()),
                    (loose_is, deaf_is)
                );
            };
            put(&loose, "1");
            put(&deaf, "1");
            let mut settings = DeviceSettings::open(file.clone());
            assert!(settings.set(&loose, "2").unwrap() && settings.set(&deaf, "0").unwrap());
            assert!(!settings.set(&name("ipv4", "none", "rp_filter"), "2").unwrap());
            is("2", "0");
            // Somebody writes other values: ours again, and theirs at the end.
            put(&deaf, "2");
            assert!(!settings.set(&deaf, "0").unwrap());
            is("2", "0");
            // Killed. The next run wants one of them.
            drop(settings);
            let mut settings = DeviceSettings::open(file.clone());
            assert!(!settings.set(&deaf, "0").unwrap());
            settings.retain(|name| name == deaf);
            is("1", "0");
            settings.clear();
            is("1", "2");
            assert!(!file.exists());
            // What somebody has set since is theirs.
            settings.set(&deaf, "0").unwrap();
            put(&deaf, "1");
            settings.clear();
            is("1", "1");
        });
    }
}
