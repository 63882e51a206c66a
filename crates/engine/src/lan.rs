//! The switch between the TAP device and bonds, from the control side (row T14).

use std::sync::{Arc, Mutex};

use arc_swap::ArcSwapOption;

pub use datapath::ethernet::Settings;
use datapath::lan::{Lan, LanReport};
use services::hash::SecretState;

use crate::{Engine, gateway, worker};

/// The switch, shared by control and all workers.
pub(crate) struct LanShared {
    /// Settings in force.
    pub published: ArcSwapOption<Lan>,
    /// Last report of each core.
    reports: Vec<Mutex<Option<LanReport>>>,
}

impl LanShared {
    /// No switch yet.
    pub fn new(cores: usize) -> Self {
        Self { published: ArcSwapOption::empty(), reports: (0..cores).map(|_| Mutex::default()).collect() }
    }

    /// Report of a core.
    pub fn put(&self, core: u8, report: Option<LanReport>) {
        if let Some(place) = self.reports.get(usize::from(core)) {
            *gateway::lock(place) = report;
        }
    }
}

impl Engine {
    /// Report that each core made last, up to 50 ms ago; none without a TAP device.
    pub fn lan_reports(&self) -> impl Iterator<Item = LanReport> + '_ {
        self.shared.gateway.lan.reports.iter().filter_map(|report| gateway::lock(report).clone())
    }

    /// Puts these settings of the switch in force. Its number and its cores are the engine's to fill in.
    ///
    /// # Errors
    /// The first time, when the system gives no random numbers.
    pub fn put_lan(&self, settings: Settings) -> std::io::Result<()> {
        let shared = &self.shared.gateway;
        let secret = match shared.lan.published.load_full() {
            Some(lan) => lan.secret.clone(),
            None => SecretState::draw(&mut worker::random()?),
        };
        let [a, b, c, d, e, f, g, h, ..] = self.shared.node.public_key();
        let settings = Settings {
            number: u64::from_be_bytes([a, b, c, d, e, f, g, h]),
            cores: self.shared.node.cores,
            ..settings
        };
        if shared.lan.published.load().as_ref().is_some_and(|lan| lan.settings == settings) {
            return Ok(());
        }
        shared.lan.published.store(Some(Arc::new(Lan { settings, secret })));
        shared.changed();
        self.shared.wake_all();
        Ok(())
    }
}
