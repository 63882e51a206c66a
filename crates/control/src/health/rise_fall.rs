//! Up or down, from the outcomes of checks in a row.

/// Up or down, and how near it is to the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RiseFall {
    up: bool,
    checked: bool,
    /// Checks in a row that contradict `up`.
    against: u8,
}

impl RiseFall {
    /// Up, until the first check decides.
    pub const fn new() -> Self {
        Self { up: true, checked: false, against: 0 }
    }

    /// Whether it counts as up.
    pub const fn is_up(&self) -> bool {
        self.up
    }

    /// Whether there was a check.
    pub const fn is_checked(&self) -> bool {
        self.checked
    }

    /// Takes the outcome of a check. Returns whether the target is up when that is news: with the first check, and when it changes.
    pub fn take(&mut self, success: bool, fall: u8, rise: u8) -> Option<bool> {
        if success == self.up {
            self.against = 0;
        } else {
            self.against = self.against.saturating_add(1);
        }
        let needed = if self.up { fall } else { rise };
        let turns = self.against > 0 && (self.against >= needed || !self.checked);
        let first = !self.checked;
        self.checked = true;
        if turns {
            self.up = success;
            self.against = 0;
        }
        (turns || first).then_some(self.up)
    }
}
