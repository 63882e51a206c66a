//! Problems of a configuration: where, which key, what is wrong and what would be right.

use std::fmt;
use std::ops::Range;

use toml::Spanned;
use toml::de::DeTable;

/// How bad a [`Problem`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// The gateway does not start with it.
    Error,
    /// It starts, but this is probably not what was meant.
    Warning,
}

/// One thing that is wrong, with its place in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// File as the user named it.
    pub file: String,
    /// Line, from 1; 0 when it concerns the file as a whole.
    pub line: usize,
    /// Column in characters, from 1; 0 when it concerns the file as a whole.
    pub column: usize,
    /// Error or warning.
    pub severity: Severity,
    /// Key, for example `peer.endpoints`; empty for a fault of the syntax.
    pub key: String,
    /// The mistake and what would be right, one sentence each, separated by a semicolon.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.file)?;
        if self.line > 0 {
            write!(f, ":{}:{}", self.line, self.column)?;
        }
        f.write_str(match self.severity {
            Severity::Error => ": error: ",
            Severity::Warning => ": warning: ",
        })?;
        if !self.key.is_empty() {
            write!(f, "{}: ", self.key)?;
        }
        f.write_str(&self.message)
    }
}

/// Collects problems while a file is read, and knows the text so that byte offsets become lines.
pub(crate) struct Problems<'a> {
    file: &'a str,
    text: &'a str,
    list: Vec<Problem>,
}

/// Nobody reads more than this, and a hostile file must not make us write more.
const PROBLEMS_MAX: usize = 100;

impl<'a> Problems<'a> {
    pub(crate) fn new(file: &'a str, text: &'a str) -> Self {
        Self { file, text, list: Vec::new() }
    }

    pub(crate) fn error(&mut self, at: &Range<usize>, key: &str, message: impl Into<String>) {
        self.push(Some(at), Severity::Error, key, message.into());
    }

    pub(crate) fn warning(&mut self, at: &Range<usize>, key: &str, message: impl Into<String>) {
        self.push(Some(at), Severity::Warning, key, message.into());
    }

    /// About the file as a whole.
    pub(crate) fn whole(&mut self, severity: Severity, key: &str, message: impl Into<String>) {
        self.push(None, severity, key, message.into());
    }

    fn push(&mut self, at: Option<&Range<usize>>, severity: Severity, key: &str, message: String) {
        if self.list.len() >= PROBLEMS_MAX {
            return;
        }
        let (line, column) = at.map_or((0, 0), |at| position(self.text, at.start));
        let file = self.file.to_owned();
        let key = key.to_owned();
        self.list.push(Problem { file, line, column, severity, key, message });
    }

    /// Parses the text; faults of the syntax are problems. `None`: there are some.
    pub(crate) fn document(&mut self) -> Option<Spanned<DeTable<'a>>> {
        let (document, errors) = DeTable::parse_recoverable(self.text);
        for error in &errors {
            let at = error.span().unwrap_or(0..0);
            self.error(&at, "", format!("not TOML: {}", error.message()));
        }
        errors.is_empty().then_some(document)
    }

    /// All problems in the order of the file, those of the whole file first.
    pub(crate) fn into_sorted(mut self) -> Vec<Problem> {
        self.list.sort_by_key(|problem| (problem.line, problem.column));
        self.list.dedup();
        self.list
    }
}

/// Line and column (in characters), both from 1, of a byte offset.
pub(crate) fn position(text: &str, offset: usize) -> (usize, usize) {
    let before = text.get(..offset.min(text.len())).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |at| at + 1);
    let line = before.matches('\n').count() + 1;
    (line, before[line_start..].chars().count() + 1)
}

/// The known word that `word` was probably meant to be: the same letters in another style
/// (`PublicKey`, `public_key`), or at most two slips of the finger away.
pub(crate) fn suggestion<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let plain = plain(word);
    let slips_max = match plain.len() {
        0..=2 => 0,
        3..=5 => 1,
        _ => 2,
    };
    known
        .into_iter()
        .map(|candidate| (distance(&plain, &self::plain(candidate)), candidate))
        .filter(|(slips, _)| *slips <= slips_max)
        .min_by_key(|(slips, _)| *slips)
        .map(|(_, candidate)| candidate)
}

/// Lower case without separators; cut, because nobody's slip of the finger is longer.
fn plain(word: &str) -> String {
    word.chars().filter(|c| !matches!(c, '-' | '_' | ' ')).take(64).flat_map(char::to_lowercase).collect()
}

/// Levenshtein distance with neighboring letters swapped counted once.
fn distance(a: &str, b: &str) -> usize {
    let a: Vec<char> = a.chars().collect();
    let b: Vec<char> = b.chars().collect();
    let mut rows = vec![vec![0usize; b.len() + 1]; a.len() + 1];
    rows[0] = (0..=b.len()).collect();
    for i in 1..=a.len() {
        rows[i][0] = i;
        for j in 1..=b.len() {
            let changed = usize::from(a[i - 1] != b[j - 1]);
            let mut best = (rows[i - 1][j - 1] + changed).min(rows[i - 1][j] + 1).min(rows[i][j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            rows[i][j] = best;
        }
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_become_lines_and_columns() {
        let text = "a\nbä c\n\nd";
        assert_eq!(position(text, 0), (1, 1));
        assert_eq!(position(text, 2), (2, 1));
        // Columns count characters: ä has two bytes.
        assert_eq!(position(text, 6), (2, 4));
        assert_eq!(position(text, 8), (3, 1));
        assert_eq!(position(text, 9), (4, 1));
        assert_eq!(position(text, 999), (4, 2));
        // Within a character: nothing sensible, but no panic.
        let _ = position(text, 4);
    }

    #[test]
    fn slips_are_recognised() {
        let keys = ["public-key", "endpoints", "allowed-ips", "wans", "name"];
        for (wrong, right) in [
            ("publickey", "public-key"),
            ("PublicKey", "public-key"),
            ("public_key", "public-key"),
            ("endpoint", "endpoints"),
            ("AllowedIPs", "allowed-ips"),
            ("alowed-ips", "allowed-ips"),
            ("nmae", "name"),
            ("wan", "wans"),
        ] {
            assert_eq!(suggestion(wrong, keys), Some(right), "{wrong}");
        }
        for strange in ["colour", "x", "", "persistent-keepalive"] {
            assert_eq!(suggestion(strange, keys), None, "{strange}");
        }
    }
}
