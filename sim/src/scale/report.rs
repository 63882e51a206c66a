//! Figures of a run, as Markdown and as a picture (SVG).

use std::collections::BTreeMap;
use std::fmt::Write;

use cluster::manager::{Event, Stage};

use super::{SECOND, Scenario};

/// Figures of a moment when nothing is under way.
#[derive(Clone, Debug)]
pub struct Sample {
    /// Seconds since the start.
    pub at_s: u32,
    /// Live flows.
    pub flows: u64,
    /// Of these, by the number of units that their packets come to, less one.
    pub by_units: [u64; 6],
    /// Buckets by the length of their chain.
    pub chains: [u64; 5],
    /// Data planes that own buckets.
    pub owners: usize,
    /// The table with its chains as it is sent.
    pub table_bytes: usize,
}

/// Fates of flows.
#[derive(Clone, Copy, Debug, Default)]
pub struct FlowCounts {
    /// Begun, each try counted.
    pub begun: u64,
    /// Tries that followed one without an answer.
    pub tried_again: u64,
    /// Times that a packet of a live flow was followed to its end, one for each flow and check.
    pub checked: u64,
    /// Ended because a packet came to a unit that would have begun it anew, or went nowhere while nothing was under way.
    pub broken: u64,
    /// Two units began the same flow.
    pub begun_twice: u64,
    /// Answers to a translated flow that would go to another unit, by flow and check.
    pub answers_astray: u64,
    /// Of units that died.
    pub lost_by_crash: u64,
    /// Of units that had to forget them because they were left out.
    pub forgotten: u64,
    /// Most flows whose packets were lost at one moment of a change: they were punted to a dead unit.
    pub lost_at_once_max: u64,
}

/// Faults of a run.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    /// Processes of units that died.
    pub crashes: u64,
    /// Units that stood still for 300 ms.
    pub stalls: u64,
    /// Starts of the manager from its store.
    pub manager_restarts: u64,
    /// Connections made.
    pub connections: u64,
    /// Connections that broke with all that was under way.
    pub broken_connections: u64,
    /// Commands that the manager refused.
    pub refused: u64,
    /// Packets of flows that began during changes, hop by hop.
    pub packets: u64,
    /// Of these lost at a unit that was dead or did not have their era.
    pub packets_lost: u64,
}

/// Figures of a run.
#[derive(Clone, Debug)]
pub struct Report {
    /// Size of the run.
    pub scenario: Scenario,
    /// Virtual time at which the day began, and the time now.
    pub start_ns: u64,
    /// See `start_ns`.
    pub now_ns: u64,
    /// Flows.
    pub flows: FlowCounts,
    /// Faults.
    pub faults: Faults,
    /// Scale events.
    pub events: u64,
    /// Eras that came into force, with the time from the plan until all units worked by them, in ns.
    pub rollouts_ns: Vec<u64>,
    /// Buckets that moved.
    pub moved: u64,
    /// Figures by time.
    pub samples: Vec<Sample>,
    /// Why a change waits at the end.
    pub waits: Option<String>,
    /// Log of the manager, its last lines.
    pub lines: Vec<String>,
    planned_ns: u64,
}

/// Lines of the log that are kept.
const LINES_MAX: usize = 2_000;

impl Report {
    pub(super) fn new(scenario: Scenario) -> Self {
        Self {
            scenario,
            start_ns: 0,
            now_ns: 0,
            flows: FlowCounts::default(),
            faults: Faults::default(),
            events: 0,
            rollouts_ns: Vec::new(),
            moved: 0,
            samples: Vec::new(),
            waits: None,
            lines: Vec::new(),
            planned_ns: 0,
        }
    }

    pub(super) fn note_event(&mut self, now_ns: u64, event: &Event) {
        if let Some(moved) = event.text.strip_suffix(" buckets move").and_then(|text| text.rsplit(' ').next())
        {
            self.planned_ns = now_ns;
            self.moved += moved.parse().unwrap_or(0);
        }
        let node = event.node.map_or_else(|| "      ".to_owned(), |node| format!("{node:5} "));
        self.note(now_ns, &format!("{node}{}", event.text));
    }

    pub(super) fn note(&mut self, now_ns: u64, text: &str) {
        if self.lines.len() == LINES_MAX {
            self.lines.remove(0);
        }
        self.lines.push(format!("{:9.3} {text}", now_ns as f64 / SECOND as f64));
    }

    pub(super) fn note_stage(&mut self, now_ns: u64, before: Stage, after: Stage) {
        let draining = |stage| matches!(stage, Stage::Draining { .. });
        if draining(after) && !draining(before) {
            self.rollouts_ns.push(now_ns.saturating_sub(self.planned_ns));
        }
    }

    /// Whether no flow broke but by crashes.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        let flows = &self.flows;
        flows.broken == 0 && flows.begun_twice == 0 && flows.answers_astray == 0 && flows.forgotten == 0
    }

    /// The report as Markdown tables.
    #[must_use]
    pub fn markdown(&self) -> String {
        let mut text = String::new();
        let Scenario { seed, planes, dispatchers, flows, seconds, .. } = self.scenario;
        // Writing to a string does not fail.
        let _ = writeln!(
            text,
            "Seed {seed}: {} units ({planes} data planes at most, {dispatchers} dispatchers), {flows} flows at a time, {:.1} hours.\n",
            planes + dispatchers,
            f64::from(seconds) / 3_600.0
        );
        let _ = writeln!(text, "| what | how many |\n|---|---|");
        for (what, count) in self.rows() {
            let _ = writeln!(text, "| {what} | {count} |");
        }
        self.hours(&mut text);
        text
    }

    fn rows(&self) -> Vec<(&'static str, String)> {
        let (flows, faults) = (&self.flows, &self.faults);
        let mut rollouts = self.rollouts_ns.clone();
        rollouts.sort_unstable();
        let rollout = |permille: usize| {
            let place = rollouts.len().saturating_sub(1) * permille / 1_000;
            format!("{} ms", rollouts.get(place).copied().unwrap_or(0) / 1_000_000)
        };
        let counts = [
            ("scale events", self.events),
            ("eras", self.rollouts_ns.len() as u64),
            ("buckets moved", self.moved),
            ("flows begun", flows.begun - flows.tried_again),
            ("packets of live flows followed to their end", flows.checked),
            ("**flows broken**", flows.broken),
            ("flows begun twice", flows.begun_twice),
            ("answers to another unit", flows.answers_astray),
            ("flows forgotten by a unit left out while it lived", flows.forgotten),
            ("flows lost with a unit that died", flows.lost_by_crash),
            ("most flows that waited at one moment for a dead unit to be left out", flows.lost_at_once_max),
            ("tries to begin a flow that got no answer", flows.tried_again),
            ("units that died", faults.crashes),
            ("units that stood still for 300 ms", faults.stalls),
            ("restarts of the manager", faults.manager_restarts),
            ("connections that broke", faults.broken_connections),
            ("packets of flows that began during changes, hop by hop", faults.packets),
            ("of these lost at a dead unit or one without their era", faults.packets_lost),
        ];
        let mut rows: Vec<(&str, String)> =
            counts.into_iter().map(|(what, count)| (what, count.to_string())).collect();
        rows.push(("from the plan until all units work by it, median", rollout(500)));
        rows.push(("the same, longest of 99 %", rollout(990)));
        let bytes = self.samples.iter().map(|sample| sample.table_bytes).max().unwrap_or(0);
        rows.push(("table with its chains as it is sent, largest", format!("{bytes} bytes")));
        rows
    }

    fn hours(&self, text: &mut String) {
        let _ = writeln!(
            text,
            "\n| hour | data planes | flows | second hop | third and more | buckets with a chain of 1 | 2 | 3 | 4 | table bytes |\n|---|---|---|---|---|---|---|---|---|---|"
        );
        let mut by_hour: BTreeMap<u32, &Sample> = BTreeMap::new();
        for sample in &self.samples {
            by_hour.insert(sample.at_s / 3_600, sample);
        }
        for (hour, sample) in by_hour {
            let Sample { flows, by_units, chains, owners, table_bytes, .. } = sample;
            let more: u64 = by_units.iter().skip(2).sum();
            let _ = writeln!(
                text,
                "| {} | {owners} | {flows} | {:.2} % | {:.3} % | {} | {} | {} | {} | {table_bytes} |",
                hour + 1,
                percent(by_units[1], *flows),
                percent(more, *flows),
                chains[1],
                chains[2],
                chains[3],
                chains[4],
            );
        }
    }

    /// The report's figures by time as a picture: data planes, share of packets with a second hop, buckets with chains.
    #[must_use]
    pub fn svg(&self) -> String {
        const WIDTH: f64 = 860.0;
        const HEIGHT: f64 = 150.0;
        let end = f64::from(self.samples.last().map_or(1, |sample| sample.at_s).max(1));
        type Line<'a> = (&'a str, &'a str, Box<dyn Fn(&Sample) -> f64>);
        let buckets = self.scenario.buckets as f64;
        let chained = |least: usize| {
            move |sample: &Sample| sample.chains.iter().skip(least).sum::<u64>() as f64 * 100.0 / buckets
        };
        let lines: [Line<'_>; 5] = [
            ("data planes that own buckets", "#555555", Box::new(|sample| sample.owners as f64)),
            (
                "% of packets with more than one hop",
                "#c03020",
                Box::new(|sample| percent(sample.flows - sample.by_units[0], sample.flows)),
            ),
            ("% of buckets with earlier owners", "#2060a0", Box::new(chained(1))),
            ("% of buckets with three and more", "#208040", Box::new(chained(3))),
            (
                "KB of the table as it is sent",
                "#806000",
                Box::new(|sample| sample.table_bytes as f64 / 1_000.0),
            ),
        ];
        let total = lines.len() as f64 * (HEIGHT + 40.0);
        let mut text = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 960 {total}\" font-family=\"sans-serif\" font-size=\"13\">\n<rect width=\"960\" height=\"{total}\" fill=\"white\"/>\n"
        );
        for (row, (name, color, value)) in lines.iter().enumerate() {
            let top = row as f64 * (HEIGHT + 40.0) + 24.0;
            let most = self.samples.iter().map(value).fold(0.0, f64::max);
            let scale = if most > 0.0 { most } else { 1.0 };
            let mut points = String::new();
            for sample in &self.samples {
                let x = 60.0 + f64::from(sample.at_s) / end * WIDTH;
                let y = top + HEIGHT - value(sample) / scale * HEIGHT;
                let _ = write!(points, "{x:.1},{y:.1} ");
            }
            let bottom = top + HEIGHT;
            let right = 60.0 + WIDTH;
            let _ = writeln!(
                text,
                "<text x=\"60\" y=\"{:.0}\" fill=\"{color}\">{name}</text>\n<text x=\"6\" y=\"{:.0}\">{most:.1}</text>\n<text x=\"6\" y=\"{bottom}\">0</text>\n<path d=\"M60 {top} V{bottom} H{right}\" fill=\"none\" stroke=\"#999\"/>\n<polyline fill=\"none\" stroke=\"{color}\" points=\"{}\"/>",
                top - 7.0,
                top + 10.0,
                points.trim_end(),
            );
        }
        let _ = writeln!(
            text,
            "<text x=\"60\" y=\"{:.0}\">0 to {:.1} hours</text>\n</svg>",
            total - 2.0,
            end / 3_600.0
        );
        text
    }
}

fn percent(part: u64, whole: u64) -> f64 {
    part as f64 * 100.0 / whole.max(1) as f64
}
