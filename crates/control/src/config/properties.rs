//! Worth of a `[[wan]]` (row T12): cost, limits, direction, quota, times.

use tunnel::config::{Direction, WanProperties};

use super::section::{Section, shown};
use super::values::ValueError;

/// Most spans of one schedule.
const SPANS_MAX: usize = 64;
/// Minutes of a day.
const DAY_MINUTES: u16 = 24 * 60;

/// Bytes that a WAN may carry in a month.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quota {
    /// Bytes of the tunnel's datagrams with their IP and UDP headers, both directions.
    pub bytes: u64,
    /// Day on which the month begins, 1–28.
    pub day: u8,
}

/// A span of time that comes back every week, in local time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Bit 0: Monday.
    days: u8,
    /// Minutes since midnight; an end that is not after the beginning is on the next day.
    from: u16,
    to: u16,
}

/// When a WAN may be used; empty: always.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Schedule(Vec<Span>);

impl Schedule {
    /// Whether it may be used at this time: weekday from 0, Monday, and minute of the day.
    #[must_use]
    pub fn allows(&self, weekday: u8, minute: u16) -> bool {
        let on = |days: u8, day: u8| days & 1 << (day % 7) != 0;
        let within = |span: &Span| {
            let Span { days, from, to } = *span;
            if from < to {
                return on(days, weekday) && (from..to).contains(&minute);
            }
            (on(days, weekday) && minute >= from) || (on(days, weekday + 6) && minute < to)
        };
        self.0.is_empty() || self.0.iter().any(within)
    }

    /// There are times at which it may not be used.
    #[must_use]
    pub fn is_limited(&self) -> bool {
        !self.0.is_empty()
    }
}

/// More routers than that no datagram passes that leaves with our TTL.
const HOPS_MAX: u64 = 63;

/// Reads them all.
pub(super) fn properties(section: &mut Section<'_, '_, '_>) -> (WanProperties, Option<Quota>, Schedule) {
    let directions = [("both", Direction::Both), ("send", Direction::Send), ("receive", Direction::Receive)];
    let quota = section.parsed("quota", "\"50 GB\"", bytes);
    let day = section.number("quota-day", 1..=28);
    if let (None, Some(day)) = (&quota, &day) {
        section.error(&day.at, "quota-day", "there is no quota; add quota = \"50 GB\" or remove it");
    }
    let day = day.and_then(|day| u8::try_from(day.value).ok()).unwrap_or(1);
    let spans = section.list("schedule", "\"mon-fri 08:00-18:00\"", span).unwrap_or_default();
    section.at_most("schedule", &spans, SPANS_MAX);
    let properties = WanProperties {
        cost: section.number_or("cost", 0..=65_535, 0),
        metered: quota.is_some(),
        direction: section.choice("direction", &directions).map_or(Direction::Both, |way| way.value),
        latency_max_us: section.parsed("latency-max", "\"80 ms\"", latency).map(|us| us.value),
        loss_max: section.parsed("loss-max", "\"2 %\"", loss).map(|loss| loss.value),
        hops_max: section.number("hops-max", 0..=HOPS_MAX).map(|hops| hops.value as u8),
    };
    let quota = quota.map(|bytes| Quota { bytes: bytes.value, day });
    (properties, quota, Schedule(spans.into_iter().map(|span| span.value).collect()))
}

/// A number and its unit.
fn with_unit<'t>(text: &'t str, right: &str) -> Result<(f64, &'t str), ValueError> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number = number.parse().map_err(|_| format!("\"{}\" has no number; {right}", shown(text)))?;
    Ok((number, unit.trim()))
}

/// An amount of data: `50 GB`, `1.5 TB`, `200 MB`. Bytes.
fn bytes(text: &str) -> Result<u64, ValueError> {
    const RIGHT: &str = "write for example \"50 GB\" or \"500 MB\"";
    let (number, unit) = with_unit(text, RIGHT)?;
    let factor = match unit {
        "MB" => 1e6,
        "GB" => 1e9,
        "TB" => 1e12,
        _ => return Err(format!("\"{}\" is not MB, GB or TB; {RIGHT}", shown(unit)).into()),
    };
    let bytes = number * factor;
    if !(1e6..=1e18).contains(&bytes) {
        return Err(format!("\"{}\" is not between 1 MB and 1000000 TB; {RIGHT}", shown(text)).into());
    }
    Ok(bytes as u64)
}

/// A round trip: `80 ms`, `1.5 s`. Microseconds.
fn latency(text: &str) -> Result<u32, ValueError> {
    const RIGHT: &str = "write for example \"80 ms\"";
    let (number, unit) = with_unit(text, RIGHT)?;
    let factor = match unit {
        "ms" => 1e3,
        "s" => 1e6,
        _ => return Err(format!("\"{}\" is not ms or s; {RIGHT}", shown(unit)).into()),
    };
    let us = number * factor;
    if !(1e3..=60e6).contains(&us) {
        return Err(format!("\"{}\" is not between 1 ms and 60 s; {RIGHT}", shown(text)).into());
    }
    Ok(us as u32)
}

/// A share of lost datagrams: `2 %`, `0.5%`. Of 10,000.
fn loss(text: &str) -> Result<u16, ValueError> {
    const RIGHT: &str = "write for example \"2 %\"";
    let (number, unit) = with_unit(text, RIGHT)?;
    if unit != "%" {
        return Err(format!("\"{}\" is not %; {RIGHT}", shown(unit)).into());
    }
    if !(0.01..=100.0).contains(&number) {
        return Err(format!("\"{}\" is not between 0.01 % and 100 %; {RIGHT}", shown(text)).into());
    }
    Ok((number * 100.0).round() as u16)
}

const DAYS: [&str; 7] = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"];

/// A span: `mon-fri 08:00-18:00`, `sat,sun 00:00-24:00`, `22:00-06:00` (every day).
fn span(text: &str) -> Result<Span, ValueError> {
    let wrong = || -> ValueError {
        format!("\"{}\" is not a span of time; write for example \"mon-fri 08:00-18:00\"", shown(text)).into()
    };
    let (days, hours) = match text.trim().split_once(char::is_whitespace) {
        Some((days, hours)) => (days_of(days).ok_or_else(wrong)?, hours.trim()),
        None => (0x7f, text.trim()),
    };
    let (from, to) = hours.split_once('-').ok_or_else(wrong)?;
    let (from, to) = (minute(from).ok_or_else(wrong)?, minute(to).ok_or_else(wrong)?);
    if from == DAY_MINUTES || from == to {
        return Err(wrong());
    }
    Ok(Span { days, from, to })
}

fn days_of(text: &str) -> Option<u8> {
    let day = |name: &str| DAYS.iter().position(|day| day.eq_ignore_ascii_case(name));
    text.split(',').try_fold(0, |days, part| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (day(first)?, day(last)?);
        let count = (last + 7 - first) % 7;
        Some((first..=first + count).fold(days, |days, day| days | 1 << (day % 7)))
    })
}

fn minute(text: &str) -> Option<u16> {
    let (hour, minute) = text.trim().split_once(':')?;
    let two = |text: &str| text.parse::<u16>().ok().filter(|_| text.len() == 2 && !text.starts_with('+'));
    let at = two(hour)? * 60 + two(minute).filter(|minute| *minute < 60)?;
    (at <= DAY_MINUTES).then_some(at)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::config::tests::{config, said_of};

    #[test]
    fn everything_is_read() {
        let text = "[[wan]]\ninterface = \"lte\"\ncost = 7\ndirection = \"receive\"\nlatency-max = \"80 ms\"\nloss-max = \"0.5%\"\nhops-max = 12\n\
                    quota = \"50 GB\"\nquota-day = 15\nschedule = [\"mon-fri 08:00-18:00\"]\n";
        let wan = config("listen = 4600", text).wans.remove(0);
        let properties = WanProperties {
            cost: 7,
            metered: true,
            direction: Direction::Receive,
            latency_max_us: Some(80_000),
            loss_max: Some(50),
            hops_max: Some(12),
        };
        assert_eq!(wan.properties, properties);
        assert_eq!(wan.quota, Some(Quota { bytes: 50_000_000_000, day: 15 }));
        assert!(wan.schedule.allows(4, 17 * 60 + 59) && !wan.schedule.allows(4, 18 * 60));
        assert!(!wan.schedule.allows(5, 600) && wan.schedule.is_limited());
    }

    #[test]
    fn spans_cross_midnight_and_the_end_of_the_week() {
        let schedule = |text: &str| Schedule(vec![span(text).unwrap()]);
        let night = schedule("fri-sun 22:00-06:00");
        let on = |day, hour: u16| night.allows(day, hour * 60);
        assert!(on(4, 22) && on(5, 5) && on(6, 23) && on(0, 5));
        assert!(!on(4, 5) && !on(0, 6) && !on(0, 22) && !on(5, 12));
        assert!(schedule("sat,mon 00:00-24:00").allows(0, 1439) && !schedule("sat 00:00-24:00").allows(6, 0));
        assert!(schedule("sun-tue 08:00-09:00").allows(1, 500));
        assert!((0..7).all(|day| schedule("08:00-09:00").allows(day, 480)));
        assert!(Schedule::default().allows(3, 3));
        for wrong in [
            "mon",
            "mon 8:00-9:00",
            "mon 08:00-25:00",
            "xyz 08:00-09:00",
            "24:00-01:00",
            "08:00-08:00",
            "08:60-09:00",
        ] {
            assert!(span(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn mistakes_are_named() {
        for (line, what) in [
            ("quota = \"50 GiB\"", "is not MB, GB or TB"),
            ("quota = \"1 kB\"", "is not MB, GB or TB"),
            ("quota-day = 3", "there is no quota"),
            ("latency-max = \"80\"", "is not ms or s"),
            ("latency-max = \"0.5 ms\"", "not between 1 ms and 60 s"),
            ("loss-max = \"2\"", "is not %"),
            ("loss-max = \"101 %\"", "not between"),
            ("direction = \"up\"", "is not one of \"both\""),
            ("schedule = \"always\"", "is not a span of time"),
            ("cost = -1", "a whole number from 0"),
        ] {
            let problems = said_of(&format!("[[wan]]\ninterface = \"lte\"\n{line}\n"));
            assert!(problems.iter().any(|problem| problem.contains(what)), "{line}: {problems:?}");
        }
    }
}
