//! `anabranch demo --gateway`: clients, a gateway and a server farm in namespaces; real HTTP, DNS and TCP through each way of
//! translating addresses and through a virtual server, while a backend dies and a core is taken away; and a report.
//!
//! [`scene`] builds the networks and starts the gateway, [`farm`] is the backends that die and come back, [`course`] sends
//! the traffic, [`report`] says what came of it.

mod course;
mod farm;
mod report;
mod scene;

use std::sync::Arc;

use anyhow::Context;
use testbed::Privilege;
use testbed::stop::Stop;

use super::progress::Progress;
use course::Course;
use farm::Farm;
use report::Report;
use scene::Scene;

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
    let mut scene = Scene::build(privilege, progress)?;
    let farm = Arc::new(Farm::start(&scene.farm)?);
    scene.wait_until_up(stop, progress)?;
    let course = Course { scene: &mut scene, farm: Arc::clone(&farm), stop }.run(seconds as f64, progress);
    let results = course.with_context(|| format!("the gateway said last:\n{}", scene.last_words()))?;
    progress.step("Ending the gateway");
    drop(scene);
    let report = Report::new(seconds, &results);
    Ok((if json { report.json()? } else { report.text() }, report.ok))
}
