//! Reads one TOML table key by key, and reports every wrong value instead of stopping at the first.

use std::ops::{Range, RangeInclusive};

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::problem::{Problems, suggestion};
use super::values::ValueError;

/// A value together with its place in the file.
#[derive(Clone, Debug)]
pub(crate) struct At<T> {
    pub(crate) value: T,
    pub(crate) at: Range<usize>,
}

impl<T> At<T> {
    pub(crate) fn new(value: T, at: Range<usize>) -> Self {
        Self { value, at }
    }
}

/// One table of the file. Every key that is asked for counts as known; [`Section::finish`] reports the others.
pub(crate) struct Section<'a, 'p, 't> {
    name: &'static str,
    table: Option<&'a DeTable<'a>>,
    /// Where the table stands; what is missing in it is reported here.
    pub(crate) at: Range<usize>,
    pub(crate) problems: &'p mut Problems<'t>,
    known: Vec<&'static str>,
}

impl<'a, 'p, 't> Section<'a, 'p, 't> {
    /// A section that is there, or (`None`) one in which every value takes its default.
    pub(crate) fn new(
        name: &'static str,
        table: Option<(&'a DeTable<'a>, Range<usize>)>,
        problems: &'p mut Problems<'t>,
    ) -> Self {
        let (table, at) = table.map_or((None, 0..0), |(table, at)| (Some(table), at));
        Self { name, table, at, problems, known: Vec::new() }
    }

    /// Full name of a key, as messages show it.
    pub(crate) fn key(&self, key: &str) -> String {
        if self.name.is_empty() { key.to_owned() } else { format!("{}.{key}", self.name) }
    }

    pub(crate) fn error(&mut self, at: &Range<usize>, key: &str, message: impl Into<String>) {
        let key = self.key(key);
        self.problems.error(at, &key, message);
    }

    pub(crate) fn warning(&mut self, at: &Range<usize>, key: &str, message: impl Into<String>) {
        let key = self.key(key);
        self.problems.warning(at, &key, message);
    }

    /// Something that must be there is not.
    pub(crate) fn missing(&mut self, key: &str, message: impl Into<String>) {
        let at = self.at.clone();
        self.error(&at, key, message);
    }

    pub(crate) fn value(&mut self, key: &'static str) -> Option<&'a Spanned<DeValue<'a>>> {
        if !self.known.contains(&key) {
            self.known.push(key);
        }
        self.table?.get(key)
    }

    /// A string; `right` shows one that would be right.
    pub(crate) fn text(&mut self, key: &'static str, right: &str) -> Option<At<String>> {
        let value = self.value(key)?;
        self.as_text(key, value, right)
    }

    fn as_text(
        &mut self,
        key: &'static str,
        value: &Spanned<DeValue<'_>>,
        right: &str,
    ) -> Option<At<String>> {
        if let DeValue::String(text) = value.get_ref() {
            return Some(At::new(text.to_string(), value.span()));
        }
        let found = kind(value.get_ref());
        self.error(&value.span(), key, format!("{found} found, a string is needed; for example {right}"));
        None
    }

    /// A string that `parse` understands; its error says what would be right.
    pub(crate) fn parsed<T>(
        &mut self,
        key: &'static str,
        right: &str,
        parse: impl Fn(&str) -> Result<T, ValueError>,
    ) -> Option<At<T>> {
        let text = self.text(key, right)?;
        self.parse_text(key, text, parse)
    }

    fn parse_text<T>(
        &mut self,
        key: &'static str,
        text: At<String>,
        parse: impl Fn(&str) -> Result<T, ValueError>,
    ) -> Option<At<T>> {
        match parse(&text.value) {
            Ok(value) => Some(At::new(value, text.at)),
            Err(mistake) => {
                self.error(&text.at, key, mistake.to_string());
                None
            }
        }
    }

    /// A list of strings, each understood by `parse`. A single string is a list of one.
    pub(crate) fn list<T>(
        &mut self,
        key: &'static str,
        right: &str,
        parse: impl Fn(&str) -> Result<T, ValueError>,
    ) -> Option<Vec<At<T>>> {
        let value = self.value(key)?;
        let items: Vec<&Spanned<DeValue<'_>>> = match value.get_ref() {
            DeValue::Array(items) => items.iter().collect(),
            DeValue::String(_) => vec![value],
            DeValue::Integer(_)
            | DeValue::Float(_)
            | DeValue::Boolean(_)
            | DeValue::Datetime(_)
            | DeValue::Table(_) => {
                let found = kind(value.get_ref());
                let message = format!("{found} found, a list of strings is needed; for example [{right}]");
                self.error(&value.span(), key, message);
                return None;
            }
        };
        let mut list = Vec::with_capacity(items.len());
        for item in items {
            if let Some(text) = self.as_text(key, item, right)
                && let Some(parsed) = self.parse_text(key, text, &parse)
            {
                list.push(parsed);
            }
        }
        Some(list)
    }

    /// A list of values of any kind, each understood by `parse`. A single value is a list of one.
    pub(crate) fn items<T>(
        &mut self,
        key: &'static str,
        parse: impl Fn(&DeValue<'_>) -> Result<T, ValueError>,
    ) -> Option<Vec<At<T>>> {
        let value = self.value(key)?;
        let items: Vec<&Spanned<DeValue<'_>>> = match value.get_ref() {
            DeValue::Array(items) => items.iter().collect(),
            _ => vec![value],
        };
        let mut list = Vec::with_capacity(items.len());
        for item in items {
            match parse(item.get_ref()) {
                Ok(value) => list.push(At::new(value, item.span())),
                Err(mistake) => self.error(&item.span(), key, mistake.to_string()),
            }
        }
        Some(list)
    }

    /// A table inside this section, such as `health = { tcp = true }`.
    pub(crate) fn table(
        &mut self,
        key: &'static str,
        right: &str,
    ) -> Option<(&'a DeTable<'a>, Range<usize>)> {
        let value = self.value(key)?;
        if let DeValue::Table(table) = value.get_ref() {
            return Some((table, value.span()));
        }
        let found = kind(value.get_ref());
        self.error(&value.span(), key, format!("{found} found, a table is needed; for example {right}"));
        None
    }

    /// A list of whole numbers, or one of them; empty without the key.
    pub(crate) fn numbers(&mut self, key: &'static str, range: RangeInclusive<u64>) -> Vec<At<u64>> {
        let Some(value) = self.value(key) else { return Vec::new() };
        let items: Vec<&Spanned<DeValue<'_>>> = match value.get_ref() {
            DeValue::Array(items) => items.iter().collect(),
            _ => vec![value],
        };
        let mut list = Vec::with_capacity(items.len());
        for item in items {
            match whole_number(item.get_ref()) {
                Some(number) if range.contains(&number) => list.push(At::new(number, item.span())),
                found => {
                    let found =
                        found.map_or_else(|| kind(item.get_ref()).to_owned(), |number| number.to_string());
                    let (from, to) = (range.start(), range.end());
                    let message = format!("{found} found, whole numbers from {from} to {to} are needed");
                    self.error(&item.span(), key, message);
                }
            }
        }
        list
    }

    /// A whole number within a range, or its default.
    pub(crate) fn number_or<T>(&mut self, key: &'static str, range: RangeInclusive<u64>, default: T) -> T
    where
        T: TryFrom<u64>,
    {
        self.number(key, range).and_then(|number| T::try_from(number.value).ok()).unwrap_or(default)
    }

    /// A required value: reports it when it is missing.
    pub(crate) fn required<T>(
        &mut self,
        key: &'static str,
        right: &str,
        parse: impl Fn(&str) -> Result<T, ValueError>,
    ) -> Option<At<T>> {
        if self.value(key).is_none() {
            self.missing(key, format!("missing; write {key} = {right}"));
        }
        self.parsed(key, right, parse)
    }

    /// Refuses what a list has beyond `count_max`.
    pub(crate) fn at_most<T>(&mut self, key: &'static str, list: &[At<T>], count_max: usize) {
        if let Some(extra) = list.get(count_max) {
            let message = format!("more than {count_max} of them; remove some");
            self.error(&extra.at, key, message);
        }
    }

    /// A whole number within a range.
    pub(crate) fn number(&mut self, key: &'static str, range: RangeInclusive<u64>) -> Option<At<u64>> {
        let value = self.value(key)?;
        let span = value.span();
        match whole_number(value.get_ref()) {
            Some(number) if range.contains(&number) => Some(At::new(number, span)),
            found => {
                let found =
                    found.map_or_else(|| kind(value.get_ref()).to_owned(), |number| number.to_string());
                let (from, to) = (range.start(), range.end());
                let message = format!("{found} found, a whole number from {from} to {to} is needed");
                self.error(&span, key, message);
                None
            }
        }
    }

    /// `true` or `false`.
    pub(crate) fn flag(&mut self, key: &'static str) -> Option<At<bool>> {
        let value = self.value(key)?;
        if let DeValue::Boolean(flag) = value.get_ref() {
            return Some(At::new(*flag, value.span()));
        }
        let found = kind(value.get_ref());
        self.error(&value.span(), key, format!("{found} found, true or false (without quotes) is needed"));
        None
    }

    /// One word of several.
    pub(crate) fn choice<T: Copy>(
        &mut self,
        key: &'static str,
        words: &[(&'static str, T)],
    ) -> Option<At<T>> {
        let right = words.first().map_or("", |(word, _)| *word);
        let text = self.text(key, &format!("\"{right}\""))?;
        if let Some((_, value)) = words.iter().find(|(word, _)| *word == text.value) {
            return Some(At::new(*value, text.at));
        }
        let all: Vec<String> = words.iter().map(|(word, _)| format!("\"{word}\"")).collect();
        let mut message = format!("\"{}\" is not one of {}", shown(&text.value), all.join(", "));
        if let Some(meant) = suggestion(&text.value, words.iter().map(|(word, _)| *word)) {
            message.push_str(&format!("; did you mean \"{meant}\"?"));
        }
        self.error(&text.at, key, message);
        None
    }

    /// Reports every key nobody asked for.
    pub(crate) fn finish(mut self) {
        let Some(table) = self.table else { return };
        for (name, _) in table {
            if self.known.contains(&name.get_ref().as_ref()) {
                continue;
            }
            let mut message = String::from("unknown key");
            match suggestion(name.get_ref(), self.known.iter().copied()) {
                Some(meant) => message.push_str(&format!("; did you mean \"{meant}\"?")),
                None => message.push_str(&format!("; known here: {}", self.known.join(", "))),
            }
            self.error(&name.span(), shown(name.get_ref()).as_str(), message);
        }
    }
}

/// Kind of a value, for messages.
pub(crate) fn kind(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a string",
        DeValue::Integer(_) => "a number",
        DeValue::Float(_) => "a number with a fraction",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    }
}

/// A number that is not negative and has no fraction.
pub(crate) fn whole_number(value: &DeValue<'_>) -> Option<u64> {
    match value {
        DeValue::Integer(number) => u64::from_str_radix(number.as_str(), number.radix()).ok(),
        DeValue::String(_)
        | DeValue::Float(_)
        | DeValue::Boolean(_)
        | DeValue::Datetime(_)
        | DeValue::Array(_)
        | DeValue::Table(_) => None,
    }
}

/// User text for a message: without control characters, and not longer than a line.
pub(crate) fn shown(text: &str) -> String {
    const CHARACTERS_MAX: usize = 60;
    let mut short: String =
        text.chars().take(CHARACTERS_MAX).map(|c| if c.is_control() { '?' } else { c }).collect();
    if text.chars().nth(CHARACTERS_MAX).is_some() {
        short.push('…');
    }
    short
}
