//! `anabranch demo --gateway`: clients, a gateway and a server farm in namespaces; real HTTP, DNS and TCP through each way of
//! translating addresses and through a virtual server, while a backend dies and a core is taken away; and a report.
//!
//! [`network`] builds the networks and starts the gateway, [`server_farm`] is the backends that die and come back, [`run`] sends
//! the traffic, [`report`] says what came of it.

mod network;
mod report;
mod run;
mod server_farm;

use std::sync::Arc;

use anyhow::Context;
use testbed::Privilege;
use testbed::stop::Stop;

use super::progress::Progress;
use network::GatewayNetwork;
use report::Report;
use run::DemoRun;
use server_farm::Farm;

/// Seconds of traffic unless told otherwise.
pub(super) const SECONDS: u64 = 20;

/// The report as text or JSON, and whether nothing broke that should not.
pub(super) fn perform(
    seconds: u64,
    json: bool,
    privilege: Privilege,
    stop: &Stop,
    progress: &mut Progress,
) -> anyhow::Result<(String, bool)> {
    let mut network = GatewayNetwork::build(privilege, progress)?;
    let farm = Arc::new(Farm::start(&network.farm)?);
    network.wait_until_up(stop, progress)?;
    let run = DemoRun { network: &mut network, farm: Arc::clone(&farm), stop }.run(seconds as f64, progress);
    let results = run.with_context(|| format!("the gateway said last:\n{}", network.last_words()))?;
    progress.step("Ending the gateway");
    drop(network);
    let report = Report::new(seconds, &results);
    Ok((if json { report.json()? } else { report.text() }, report.ok))
}
