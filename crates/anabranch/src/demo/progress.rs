//! Progress on standard error while the demo runs: a bar on a terminal, plain lines elsewhere.

use std::fmt::Display;
use std::io::{IsTerminal, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// Ticks of a bar per second of its phase.
const TICKS_PER_SECOND: f64 = 20.0;

/// Shows one step or phase at a time.
pub(crate) struct Progress {
    terminal: bool,
    bar: Option<ProgressBar>,
    name: String,
}

impl Progress {
    pub(crate) fn new() -> Self {
        Self { terminal: std::io::stderr().is_terminal(), bar: None, name: String::new() }
    }

    /// A line that stays.
    pub(crate) fn note(&self, text: impl Display) {
        match &self.bar {
            Some(bar) => bar.suspend(|| line(&text)),
            None => line(&text),
        }
    }

    /// A step of unknown length begins.
    pub(crate) fn step(&mut self, name: &str) {
        self.end();
        name.clone_into(&mut self.name);
        if !self.terminal {
            return line(&name);
        }
        let bar = ProgressBar::new_spinner();
        if let Ok(style) = ProgressStyle::with_template("  {spinner} {prefix}  {msg}") {
            bar.set_style(style);
        }
        bar.set_prefix(name.to_owned());
        bar.enable_steady_tick(Duration::from_millis(120));
        self.bar = Some(bar);
    }

    /// A phase of known length begins.
    pub(crate) fn phase(&mut self, name: &str, seconds: f64) {
        self.end();
        name.clone_into(&mut self.name);
        if !self.terminal {
            return line(&format_args!("{name} ({seconds:.0} s)"));
        }
        let bar = ProgressBar::new((seconds * TICKS_PER_SECOND) as u64);
        if let Ok(style) = ProgressStyle::with_template("  {prefix:<28} {bar:30} {msg}") {
            bar.set_style(style.progress_chars("━╸─"));
        }
        bar.set_prefix(name.to_owned());
        self.bar = Some(bar);
    }

    /// How far the phase is, and what to say about it.
    pub(crate) fn tick(&self, elapsed: Duration, text: impl Display) {
        if let Some(bar) = &self.bar {
            bar.set_position((elapsed.as_secs_f64() * TICKS_PER_SECOND) as u64);
            bar.set_message(text.to_string());
        }
    }

    /// Text about the present step.
    pub(crate) fn message(&self, text: impl Display) {
        if let Some(bar) = &self.bar {
            bar.set_message(text.to_string());
        }
    }

    /// The present step or phase is over; its result stays on the screen.
    pub(crate) fn done(&mut self, text: impl Display) {
        let name = std::mem::take(&mut self.name);
        match self.bar.take() {
            Some(bar) => {
                bar.finish_and_clear();
                line(&format_args!("  {name:<28} {text}"));
            }
            None => line(&format_args!("  {text}")),
        }
    }

    /// Takes away whatever moves.
    pub(crate) fn end(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

/// Standard error may be closed; the demo does not depend on being watched.
fn line(text: &dyn Display) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}
