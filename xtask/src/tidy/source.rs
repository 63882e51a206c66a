//! Rust source, with code and comments apart.
//!
//! Not a parser: strings, characters and comments are blanked, lines and columns stay. That is enough to find words
//! and matching braces, and it also sees what macros hide.

use std::ops::Range;

/// One file.
pub struct Source {
    /// The code; comments and the contents of strings are blanks.
    pub code: String,
    /// The comments; everything else is blank.
    pub comments: String,
    lines: Vec<usize>,
    tests: Vec<Range<usize>>,
}

/// A function with its body.
pub struct Function<'a> {
    /// Its name.
    pub name: &'a str,
    /// First and last line, from 1.
    pub lines: (usize, usize),
}

#[derive(Clone, Copy, PartialEq)]
enum Inside {
    Code,
    Line,
    Block(usize),
    Text,
    Raw(usize),
}

impl Source {
    /// Takes `text` apart.
    pub fn new(text: &str) -> Self {
        let (code, comments) = apart(text.as_bytes());
        let lines = std::iter::once(0).chain(text.match_indices('\n').map(|(at, _)| at + 1)).collect();
        let mut source = Self { code, comments, lines, tests: Vec::new() };
        source.tests = source.test_items();
        source
    }

    /// Line of a byte, from 1.
    pub fn line(&self, at: usize) -> usize {
        self.lines.partition_point(|start| *start <= at)
    }

    /// Number of lines.
    pub fn line_count(&self) -> usize {
        self.code.lines().count()
    }

    /// Whether the byte lies in an item under `#[cfg(test)]`.
    pub fn is_test(&self, at: usize) -> bool {
        self.tests.iter().any(|range| range.contains(&at))
    }

    /// Every place of `word` in the code that is not part of a longer name.
    pub fn words<'a>(&'a self, word: &'a str) -> impl Iterator<Item = usize> + 'a {
        let code = self.code.as_bytes();
        self.code.match_indices(word).map(|(at, _)| at).filter(move |at| {
            let before = at.checked_sub(1).is_none_or(|at| !is_name(code[at]));
            before && code.get(at + word.len()).is_none_or(|byte| !is_name(*byte))
        })
    }

    /// Every function that has a body, nested ones too.
    pub fn functions(&self) -> impl Iterator<Item = Function<'_>> {
        self.words("fn").filter_map(|at| {
            let name_at = at + 2 + self.code[at + 2..].find(|c: char| !c.is_whitespace())?;
            let name = &self.code[name_at..];
            let name = &name[..name.bytes().position(|byte| !is_name(byte))?];
            let open = self.body(name_at)?;
            (!name.is_empty())
                .then(|| Function { name, lines: (self.line(at), self.line(self.closing(open))) })
        })
    }

    /// The `{` of the item that begins at `at`, unless a `;` ends it before.
    fn body(&self, at: usize) -> Option<usize> {
        let mut depth = 0usize;
        for (offset, byte) in self.code.as_bytes()[at..].iter().enumerate() {
            match byte {
                b'(' | b'[' => depth += 1,
                b')' | b']' => depth = depth.saturating_sub(1),
                b'{' if depth == 0 => return Some(at + offset),
                b';' if depth == 0 => return None,
                _ => {}
            }
        }
        None
    }

    /// The `}` that belongs to the `{` at `open`, or the end of the file.
    fn closing(&self, open: usize) -> usize {
        let mut depth = 0usize;
        for (offset, byte) in self.code.as_bytes()[open..].iter().enumerate() {
            match byte {
                b'{' => depth += 1,
                b'}' if depth == 1 => return open + offset,
                b'}' => depth -= 1,
                _ => {}
            }
        }
        self.code.len()
    }

    fn test_items(&self) -> Vec<Range<usize>> {
        let marks = self.code.match_indices("#[cfg(test)]").map(|(at, mark)| at..at + mark.len());
        marks.filter_map(|mark| Some(mark.start..self.closing(self.body(mark.end)?))).collect()
    }
}

/// Whether a byte may be part of a name.
pub fn is_name(byte: u8) -> bool {
    byte == b'_' || byte.is_ascii_alphanumeric()
}

fn apart(text: &[u8]) -> (String, String) {
    let mut code = Vec::with_capacity(text.len());
    let mut comments = Vec::with_capacity(text.len());
    let (mut at, mut inside) = (0, Inside::Code);
    while at < text.len() {
        let (bytes, next) = step(text, at, inside);
        for byte in &text[at..at + bytes] {
            let blank = if *byte == b'\n' { b'\n' } else { b' ' };
            let is_comment = |state| matches!(state, Inside::Line | Inside::Block(_));
            // The one thing of several bytes between code and code is a character literal, perhaps a brace.
            let is_code = inside == Inside::Code && !is_comment(next) && (bytes == 1 || next != Inside::Code);
            code.push(if is_code { *byte } else { blank });
            comments.push(if is_comment(inside) || is_comment(next) { *byte } else { blank });
        }
        at += bytes;
        inside = next;
    }
    // Only whole characters are blanked, so both are still UTF-8.
    (String::from_utf8_lossy(&code).into_owned(), String::from_utf8_lossy(&comments).into_owned())
}

/// How many bytes at `at` belong together, and what comes after them.
fn step(text: &[u8], at: usize, inside: Inside) -> (usize, Inside) {
    let rest = &text[at..];
    match inside {
        Inside::Code => step_in_code(text, at),
        Inside::Line => (1, if rest[0] == b'\n' { Inside::Code } else { Inside::Line }),
        Inside::Block(depth) if rest.starts_with(b"*/") => {
            (2, if depth == 1 { Inside::Code } else { Inside::Block(depth - 1) })
        }
        Inside::Block(depth) if rest.starts_with(b"/*") => (2, Inside::Block(depth + 1)),
        Inside::Block(depth) => (1, Inside::Block(depth)),
        Inside::Text if rest[0] == b'\\' => (rest.len().min(2), Inside::Text),
        Inside::Text => (1, if rest[0] == b'"' { Inside::Code } else { Inside::Text }),
        Inside::Raw(hashes) => {
            let ends =
                rest[0] == b'"' && rest[1..].iter().take_while(|byte| **byte == b'#').count() >= hashes;
            if ends { (1 + hashes, Inside::Code) } else { (1, Inside::Raw(hashes)) }
        }
    }
}

fn step_in_code(text: &[u8], at: usize) -> (usize, Inside) {
    let rest = &text[at..];
    let in_name = at > 0 && is_name(text[at - 1]);
    match rest[0] {
        b'/' if rest.starts_with(b"//") => (2, Inside::Line),
        b'/' if rest.starts_with(b"/*") => (2, Inside::Block(1)),
        b'"' => (1, Inside::Text),
        b'r' | b'b' | b'c' if !in_name => {
            let prefix = rest.iter().take_while(|byte| matches!(byte, b'r' | b'b' | b'c')).count();
            let hashes = rest[prefix..].iter().take_while(|byte| **byte == b'#').count();
            let raw = rest[prefix - 1] == b'r' && rest.get(prefix + hashes) == Some(&b'"');
            if raw { (prefix + hashes + 1, Inside::Raw(hashes)) } else { (1, Inside::Code) }
        }
        b'\'' => (character(rest), Inside::Code),
        _ => (1, Inside::Code),
    }
}

/// Bytes of a character literal, or 1 if the quote begins a lifetime.
fn character(rest: &[u8]) -> usize {
    if rest.get(1) == Some(&b'\\') {
        let end = rest.iter().skip(3).position(|byte| *byte == b'\'');
        return end.map_or(1, |end| end + 4);
    }
    let is_one = |bytes: &[u8]| std::str::from_utf8(bytes).is_ok_and(|text| text.chars().count() == 1);
    let end = rest.iter().skip(2).take(4).position(|byte| *byte == b'\'');
    end.filter(|end| is_one(&rest[1..end + 2])).map_or(1, |end| end + 3)
}
