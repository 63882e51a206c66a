//! The rules of the house, checked.
//!
//! [`files`] finds what belongs to the repository, [`source`] separates code from comments and strings. Then each
//! rule looks at what it needs: [`graph`] at `cargo metadata`, [`purity`], [`unsafety`], [`size`], [`words`] and
//! [`macros`] at code, [`drop_reasons`] at the list of reasons and who raises them, [`text`] at everything, [`versions`] at
//! where the Rust version stands, [`rows`] and [`keys`] at the tests of the real program. A [`Violation`] says where, which rule, and what would be right. [`EXCEPTIONS`] are few and have
//! reasons; one that is no longer needed is a violation. A rule that does not hold everywhere yet has numbers in
//! [`ratchet`].

mod drop_reasons;
mod exceptions;
mod files;
mod graph;
mod keys;
mod macros;
mod purity;
mod ratchet;
mod rows;
mod size;
mod source;
#[cfg(test)]
mod tests;
mod text;
mod unsafety;
mod versions;
mod words;

use std::fmt;
use std::path::Path;

use exceptions::EXCEPTIONS;

/// Something that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Violation {
    /// Path from the workspace's folder.
    pub file: String,
    /// Counted from 1.
    pub line: usize,
    /// Name of the rule, as [`exceptions::Exception`] has it.
    pub rule: &'static str,
    /// The fault, and what would be right.
    pub message: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}: {}", self.file, self.line, self.rule, self.message)
    }
}

/// All violations of the workspace in `root`, by file and line.
///
/// # Errors
/// When a file cannot be read or `cargo metadata` does not run.
pub fn check(root: &Path) -> anyhow::Result<Vec<Violation>> {
    Ok(ratchet::apply(&ratchet::read(root)?, look(root)?))
}

/// Lowers the numbers of the ratchet to what there is.
///
/// # Errors
/// As [`check`], and when the file cannot be written.
pub fn lower(root: &Path) -> anyhow::Result<()> {
    let text = ratchet::lowered(&ratchet::read(root)?, &look(root)?);
    Ok(std::fs::write(root.join(ratchet::FILE), text)?)
}

/// Violations that no exception covers, in order, each once.
fn look(root: &Path) -> anyhow::Result<Vec<Violation>> {
    let files = files::read(root)?;
    let mut found = Vec::new();
    let metadata = graph::metadata(root)?;
    graph::check(&metadata, &mut found);
    versions::check(&metadata, &files, &mut found);
    let mut reasons = drop_reasons::DropReasons::default();
    for file in &files {
        text::check(file, &|path| root.join(path).exists(), &mut found);
        if let Some(source) = file.source() {
            purity::check(file, &source, &mut found);
            unsafety::check(file, &source, &mut found);
            size::check(file, &source, &mut found);
            macros::check(file, &source, &mut found);
            words::check(file, &source, &mut found);
            reasons.read(file, &source);
            if source.functions.is_none() {
                let message = "this is no Rust: nothing could be checked".to_owned();
                found.push(Violation { file: file.path.clone(), line: 1, rule: "syntax", message });
            }
        }
    }
    reasons.check(&mut found);
    rows::check(&files, &mut found);
    keys::check(&files, &mut found);
    let mut kept = exceptions::apply(EXCEPTIONS, found);
    kept.sort();
    kept.dedup();
    Ok(kept)
}
