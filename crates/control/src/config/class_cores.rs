//! `reserved-cores` and `preferred-cores`: cores of this node for classes of flows (rows T3, T13).

use steering::cores::CoreSet;
use steering::ownership::ClassCores;
use toml::de::DeValue;
use tunnel::class::Class;

use super::Cores;
use super::section::{At, Section, whole_number};

/// Most cores of a node.
const CORES_MAX: usize = steering::ownership::CORES_MAX as usize;

/// Reads both keys of `[node]`.
pub(super) fn read(section: &mut Section<'_, '_, '_>, cores: &Cores) -> ClassCores {
    let count = match cores {
        Cores::All => CORES_MAX,
        Cores::Count(count) => *count,
        Cores::List(cpus) => cpus.len(),
    };
    let numbers = (count, "cores are numbered in the order of node.cores");
    let classes = ClassCores {
        reserved: of_classes(section, "reserved-cores", numbers),
        preferred: of_classes(section, "preferred-cores", numbers),
    };
    let left = CoreSet::first(count as u16).without(&classes.all_reserved());
    if left.is_empty()
        && let Some(value) = section.value("reserved-cores")
    {
        let at = value.span();
        section.error(&at, "reserved-cores", "every core is reserved; leave one for all other classes");
    }
    classes
}

/// A table of classes and their cores, of so many that are numbered as the words say.
pub(super) fn of_classes(
    section: &mut Section<'_, '_, '_>,
    key: &'static str,
    (count, numbering): (usize, &str),
) -> Vec<(u8, CoreSet)> {
    let Some(table) = section.table(key, "{ critical = [1] }") else { return Vec::new() };
    let mut inner = Section::new(key, Some(table), section.problems);
    let mut all = Vec::new();
    for class in Class::ALL {
        let core = |value: &DeValue<'_>| match whole_number(value).and_then(|core| u8::try_from(core).ok()) {
            Some(core) if usize::from(core) < count => Ok(core),
            _ => Err(format!("not a core from 0 to {}; {numbering}", count - 1).into()),
        };
        let list: Vec<At<u8>> = inner.items(class.name(), core).unwrap_or_default();
        if !list.is_empty() {
            all.push((class as u8, list.into_iter().map(|at| at.value).collect()));
        }
    }
    inner.finish();
    all
}
