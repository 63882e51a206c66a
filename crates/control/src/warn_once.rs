//! Warnings that are logged once, not with each attempt.

use std::collections::BTreeSet;

/// Texts that were logged. Bounded: after so many different ones nobody reads on.
#[derive(Default)]
pub(crate) struct WarnOnce(BTreeSet<String>);

impl WarnOnce {
    const MAX: usize = 256;

    /// Logs a warning, unless it was logged before.
    pub(crate) fn warn(&mut self, text: String) {
        if self.0.len() < Self::MAX && !self.0.contains(&text) {
            tracing::warn!("{text}");
            self.0.insert(text);
        }
    }
}
