//! Up or down, from the outcomes of checks in a row.

/// Up or down, and how near it is to the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RiseFall {
    up: bool,
    checked: bool,
    /// Checks in a row that contradict `up`.
    against: u8,
    /// Checks in a row that had no answer at all.
    unanswered: u8,
    /// Whether it is down and was said to be silent.
    silent: bool,
}

/// News about a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct News {
    /// Whether it is up.
    pub up: bool,
    /// It is down, and does not answer at all.
    pub silent: bool,
}

impl RiseFall {
    /// Up, until the first check decides.
    pub const fn new() -> Self {
        Self { up: true, checked: false, against: 0, unanswered: 0, silent: false }
    }

    /// With a verdict from before, which `fall` or `rise` further checks change.
    pub const fn resumed(up: bool, silent: bool) -> Self {
        Self { up, checked: true, against: 0, unanswered: 0, silent: !up && silent }
    }

    /// Whether it counts as up.
    pub const fn is_up(&self) -> bool {
        self.up
    }

    /// Whether there was a check.
    pub const fn is_checked(&self) -> bool {
        self.checked
    }

    /// Takes the outcome of a check; `answered`: by whatever, a refusal included. Returns the state when that is news: with
    /// the first check, when it goes up or down, and when one that is down falls silent.
    pub fn take(&mut self, success: bool, answered: bool, fall: u8, rise: u8) -> Option<News> {
        if success == self.up {
            self.against = 0;
        } else {
            self.against = self.against.saturating_add(1);
        }
        self.unanswered = if answered { 0 } else { self.unanswered.saturating_add(1) };
        let needed = if self.up { fall } else { rise };
        let turns = self.against > 0 && (self.against >= needed || !self.checked);
        let first = !self.checked;
        self.checked = true;
        if turns {
            self.up = success;
            self.against = 0;
        }
        let was_silent = self.silent;
        let falls_silent = self.unanswered >= fall || (first && !answered);
        self.silent = !self.up && (was_silent || falls_silent);
        let news = turns || first || (self.silent && !was_silent);
        news.then_some(News { up: self.up, silent: self.silent })
    }
}

#[cfg(test)]
mod tests {
    use super::RiseFall;

    type UpAndSilent = (bool, bool);

    /// A target falls silent with its verdict, or later while it is down; a refusal is an answer.
    #[test]
    fn silence_is_told_apart() {
        // Outcomes, fall 2 and rise 2: success, answered by a failure, silence; and what is reported of up and silent.
        let cases: [(&str, &[Option<UpAndSilent>]); 5] = [
            ("s", &[Some((false, true))]),
            ("-ss", &[Some((false, false)), None, Some((false, true))]),
            ("+--ss", &[Some((true, false)), None, Some((false, false)), None, Some((false, true))]),
            ("+ss-++", &[Some((true, false)), None, Some((false, true)), None, None, Some((true, false))]),
            ("+s-s-", &[Some((true, false)), None, Some((false, false)), None, None]),
        ];
        for (outcomes, reported) in cases {
            let mut state = RiseFall::new();
            let take = |it| state.take(it == '+', it != 's', 2, 2).map(|news| (news.up, news.silent));
            assert_eq!(outcomes.chars().map(take).collect::<Vec<_>>(), reported, "{outcomes}");
        }
    }

    /// A verdict from before is neither told again nor changed by a single check.
    #[test]
    fn a_verdict_from_before_holds() {
        let reported = |state: RiseFall, outcomes: &str| -> Vec<Option<UpAndSilent>> {
            let mut state = state;
            let take = |it| state.take(it == '+', it != 's', 2, 2).map(|news| (news.up, news.silent));
            outcomes.chars().map(take).collect()
        };
        assert_eq!(reported(RiseFall::resumed(true, false), "+--"), [None, None, Some((false, false))]);
        assert_eq!(reported(RiseFall::resumed(false, false), "-++"), [None, None, Some((true, false))]);
        assert_eq!(reported(RiseFall::resumed(false, true), "ss-"), [None, None, None]);
    }
}
