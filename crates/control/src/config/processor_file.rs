//! `processor-info-file`: what holds about a peer's cores in place of what the peer tells (row T3).
//!
//! A TOML file of its own, so that whoever manages machines can write it without touching the configuration:
//!
//! ```toml
//! cores = 4
//! usable = [0, 1, 2]
//! reserved = { critical = [2] }
//! preferred = { interactive = [1] }
//! policy = "round-robin"
//! ```
//!
//! Every key may be left out. The node follows the file while it runs, once a second.

use std::collections::BTreeMap;
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use packet::attachment::BondId;
use steering::policy::Policy;
use toml::de::DeValue;
use tunnel::core_overrides::CoreOverrides;

use super::class_cores::of_classes;
use super::problem::{Problem, Problems};
use super::read::absolute_or_in;
use super::section::Section;
use super::{Peer, Severity, Surroundings};
use crate::files::read_bounded;

/// Cores of a peer at most.
const CORES_MAX: usize = tunnel::hello::CORES_MAX as usize;
/// A larger file is none of these.
const BYTES_MAX: usize = 64 << 10;

/// The file of a peer, and what it said when it was read last.
#[derive(Clone, Debug)]
pub struct ProcessorFile {
    /// Where it is.
    pub path: PathBuf,
    /// Its contents.
    pub cores: Arc<CoreOverrides>,
    /// State of the file that was read: size, inode, time of change. Not known of one that the configuration named just now.
    seen: Option<(u64, u64, i64, i64)>,
}

impl PartialEq for ProcessorFile {
    fn eq(&self, other: &Self) -> bool {
        (&self.path, &self.cores) == (&other.path, &other.cores)
    }
}

impl ProcessorFile {
    /// Reads the file again if it changed since the last time. `Ok(true)`: it says something else now.
    ///
    /// # Errors
    /// The faults, once for each change; what it said before holds on.
    pub(crate) fn follow(&mut self) -> Result<bool, String> {
        let state = |file: Metadata| (file.size(), file.ino(), file.ctime(), file.ctime_nsec());
        let now = std::fs::metadata(&self.path).map(state).unwrap_or_default();
        if self.seen == Some(now) {
            return Ok(false);
        }
        self.seen = Some(now);
        let text = read_bounded(&self.path, BYTES_MAX as u64 + 1);
        let text = text.map_err(|error| format!("cannot read {} ({error})", self.path.display()))?;
        let cores = parse(&text, &self.path).map_err(|problems| problems.join("; "))?;
        let changed = cores != *self.cores;
        self.cores = Arc::new(cores);
        Ok(changed)
    }
}

/// Follows the files of all peers. True if one says something else now.
pub(crate) fn follow(peers: &mut [Peer]) -> bool {
    let mut changed = false;
    for peer in peers {
        match peer.processor.as_mut().map_or(Ok(false), ProcessorFile::follow) {
            Ok(true) => {
                tracing::info!(peer = peer.name, "processor-info-file has changed and is in force");
                changed = true;
            }
            Ok(false) => {}
            Err(error) => {
                tracing::warn!(peer = peer.name, %error, "processor-info-file is not used; the earlier one is in force");
            }
        }
    }
    changed
}

/// Contents of the files, by bond.
pub(crate) fn of_peers(peers: &[Peer]) -> BTreeMap<BondId, Arc<CoreOverrides>> {
    let said = |peer: &Peer| Some((peer.id, Arc::clone(&peer.processor.as_ref()?.cores)));
    peers.iter().filter_map(said).collect()
}

/// Reads the key of `[[peer]]`, and the file that it names.
pub(super) fn read(
    section: &mut Section<'_, '_, '_>,
    surroundings: &Surroundings<'_>,
) -> Option<ProcessorFile> {
    let key = "processor-info-file";
    let path = section.parsed(key, "\"hub-cores.toml\"", |text| absolute_or_in(surroundings, text))?;
    let text = match (surroundings.read_text)(&path.value) {
        Ok(text) => text,
        Err(error) => {
            let shown = path.value.display();
            let message = format!("cannot read {shown} ({error}); make the file, or correct the name");
            section.error(&path.at, key, message);
            return None;
        }
    };
    match parse(&text, &path.value) {
        Ok(cores) => Some(ProcessorFile { path: path.value, cores: Arc::new(cores), seen: None }),
        Err(problems) => {
            for problem in problems {
                section.error(&path.at, key, problem);
            }
            None
        }
    }
}

/// Reads the text of such a file.
///
/// # Errors
/// Everything that is wrong with it, each with file, line and key.
fn parse(text: &str, path: &Path) -> Result<CoreOverrides, Vec<String>> {
    if text.len() > BYTES_MAX {
        return Err(vec![format!("{}: larger than {} KiB", path.display(), BYTES_MAX >> 10)]);
    }
    let file = path.display().to_string();
    let mut problems = Problems::new(&file, text);
    let cores = problems.document().map(|document| {
        overrides(Section::new("", Some((document.get_ref(), document.span())), &mut problems))
    });
    let problems = problems.into_sorted();
    let wrong = problems.iter().filter(|problem| problem.severity == Severity::Error);
    let wrong: Vec<String> = wrong.map(Problem::to_string).collect();
    cores.filter(|_| wrong.is_empty()).ok_or(wrong)
}

fn overrides(mut section: Section<'_, '_, '_>) -> CoreOverrides {
    let cores = section.number("cores", 1..=CORES_MAX as u64);
    let count = cores.as_ref().map_or(CORES_MAX, |cores| cores.value as usize);
    let usable = section.value("usable").map(|value| {
        if matches!(value.get_ref(), DeValue::Array(items) if items.is_empty()) {
            section.error(&value.span(), "usable", "no core is left; name at least one, or remove the key");
        }
        let list = section.numbers("usable", 0..=count as u64 - 1);
        list.into_iter().filter_map(|core| u8::try_from(core.value).ok()).collect()
    });
    let policies = Policy::ALL.map(|policy| (policy.name(), policy));
    let mut classes = |key| {
        section.value(key)?;
        Some(of_classes(&mut section, key, (count, "the peer's cores are numbered from 0")))
    };
    let (reserved, preferred) = (classes("reserved"), classes("preferred"));
    let policy = section.choice("policy", &policies).map(|policy| policy.value);
    section.finish();
    let cores = cores.and_then(|cores| u8::try_from(cores.value).ok());
    CoreOverrides { cores, usable, reserved, preferred, policy }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use tunnel::class::Class;

    use super::*;

    fn said(text: &str) -> Vec<String> {
        parse(text, Path::new("hub-cores.toml")).unwrap_err()
    }

    #[test]
    fn every_key() {
        let text = "cores = 4\nusable = [0, 2]\nreserved = { critical = [2] }\npreferred = { interactive = [0] }\n\
                    policy = \"random\"\n";
        let set = |core: u8| [core].into_iter().collect();
        let expected = CoreOverrides {
            cores: Some(4),
            usable: Some([0, 2].into_iter().collect()),
            reserved: Some(vec![(Class::Critical as u8, set(2))]),
            preferred: Some(vec![(Class::Interactive as u8, set(0))]),
            policy: Some(Policy::Random),
        };
        assert_eq!(parse(text, Path::new("x")), Ok(expected));
        assert_eq!(parse("# nothing yet\n", Path::new("x")), Ok(CoreOverrides::default()));
    }

    #[test]
    fn faults_are_named_with_file_and_line() {
        assert_eq!(
            said("cores = 2\nusable = [2]\nreserved = { critical = [5] }\npolicy = \"fast\"\nload = 3\n"),
            [
                "hub-cores.toml:2:11: error: usable: 2 found, whole numbers from 0 to 1 are needed",
                "hub-cores.toml:3:26: error: reserved.critical: not a core from 0 to 1; the peer's cores are numbered \
                 from 0",
                "hub-cores.toml:4:10: error: policy: \"fast\" is not one of \"hash\", \"round-robin\", \"random\", \
                 \"least-loaded\"",
                "hub-cores.toml:5:1: error: load: unknown key; known here: cores, usable, reserved, preferred, policy",
            ]
        );
        assert!(said("usable = []\n")[0].contains("no core is left"));
        assert!(said("usable = \n")[0].starts_with("hub-cores.toml:1"));
        assert!(said(&" ".repeat(BYTES_MAX + 1))[0].ends_with("larger than 64 KiB"));
    }

    #[test]
    fn a_file_is_followed_and_a_wrong_one_changes_nothing() {
        let path = std::env::temp_dir().join(format!("anabranch-{}-cores.toml", std::process::id()));
        std::fs::write(&path, "usable = [0]\n").unwrap();
        let mut file = ProcessorFile { path: path.clone(), cores: Arc::default(), seen: None };
        assert_eq!((file.follow(), file.follow()), (Ok(true), Ok(false)));
        let before = Arc::clone(&file.cores);
        std::fs::write(&path, "usable = [9999]\n").unwrap();
        assert!(file.follow().unwrap_err().contains("cores.toml:1:11"));
        assert_eq!((file.follow(), &file.cores), (Ok(false), &before), "said once");
        std::fs::remove_file(&path).unwrap();
        assert!(file.follow().unwrap_err().starts_with("cannot read"));
        assert_eq!((file.follow(), &file.cores), (Ok(false), &before));
        std::fs::write(&path, "usable = [1]\n").unwrap();
        assert_eq!(file.follow(), Ok(true));
        assert_ne!(file.cores, before);
        std::fs::remove_file(&path).unwrap();
    }
}
