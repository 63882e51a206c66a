//! Rounds of the cores, what they hand to each other, and the control threads.

use datapath::memory::{MemoryOutput, Sent};
use datapath::{Handed, Ready};
use steering::assign::PlanError;
use tunnel::time::Time;

use super::World;
use crate::control::ROUND_NS;
use crate::events::Event;
use crate::inner::Place;

/// Time until what a core hands over is there, ns: it wakes the other thread.
const HAND_OVER_NS: u64 = 5_000;
/// Threads that are woken together run within this time, ns, in no particular order.
const WAKE_NS: u64 = 50_000;

impl World {
    /// Applies a site's configuration of the tunnel as it is in [`crate::site::Site::snapshot`].
    pub fn reload(&mut self, site: usize) {
        let at = &mut self.sites[site];
        let mut actions = Vec::new();
        let now = at.time(self.now);
        at.node.apply(now, &at.snapshot, &mut actions);
        if let Some(first) = at.workers.first_mut() {
            first.actions.extend(actions);
        }
        for worker in &mut at.workers {
            worker.dirty = true;
        }
        self.log("reload", [site as u64, 0, 0, 0]);
        self.settle();
    }

    /// Puts a site's services and interfaces in force as they are in [`crate::control::Control::spec`].
    ///
    /// # Errors
    /// Text for the operator: everything stays as it was.
    pub fn reload_services(&mut self, site: usize) -> Result<(), String> {
        let at = &mut self.sites[site];
        let (now, starts, is_first) = (at.time(self.now), at.starts, !at.control.is_serving());
        at.control.apply(now)?;
        if is_first {
            self.schedule(self.now.plus_ns(ROUND_NS), Event::Control(site, starts));
        }
        self.log("services", [site as u64, 0, 0, 0]);
        self.published(site);
        Ok(())
    }

    /// Takes a core's buckets away (`false`), or gives it some again. Its flows go on on it until they end.
    ///
    /// # Errors
    /// No bucket table is possible.
    pub fn set_core(&mut self, site: usize, core: u8, enabled: bool) -> Result<(), PlanError> {
        let at = &mut self.sites[site];
        let reports = at.workers.iter().map(|worker| &worker.report).collect::<Vec<_>>();
        at.control.set_core(core, enabled, &reports)?;
        self.log("core", [site as u64, u64::from(core), u64::from(enabled), 0]);
        self.published(site);
        Ok(())
    }

    /// Stops a site: it says good-bye, then neither sends nor receives.
    pub fn stop(&mut self, site: usize) {
        let now = self.sites[site].time(self.now);
        let mut out = MemoryOutput::default();
        if let Some(worker) = self.sites[site].workers.first_mut() {
            worker.round.datapath.close(now, &mut out);
        }
        self.collect(site, 0, out);
        self.sites[site].running = false;
    }

    /// Control has published something: each worker wakes in its own time and takes it over.
    fn published(&mut self, site: usize) {
        for core in 0..self.sites[site].workers.len() {
            let at = self.now.plus_ns(self.random.u64(..WAKE_NS));
            self.wake_at(site, core, at);
        }
    }

    /// One round of a site's control thread.
    pub(super) fn control(&mut self, site: usize, starts: u32) {
        let at = &mut self.sites[site];
        if at.starts != starts {
            return;
        }
        if at.running {
            let now = at.time(self.now);
            let reports = at.workers.iter().map(|worker| &worker.report).collect::<Vec<_>>();
            if at.control.round(now, &reports) {
                self.published(site);
            }
        }
        self.schedule(self.now.plus_ns(ROUND_NS), Event::Control(site, starts));
    }

    fn wake_at(&mut self, site: usize, core: usize, at: Time) {
        let worker = &mut self.sites[site].workers[core];
        if at < worker.wake {
            worker.wake = at;
            self.schedule(at, Event::Wake(site, core as u8));
        }
    }

    pub(super) fn wake(&mut self, site: usize, core: u8) {
        if let Some(worker) = self.sites[site].workers.get_mut(usize::from(core))
            && worker.wake <= self.now
        {
            worker.wake = Time::MAX;
            worker.dirty = true;
        }
    }

    pub(super) fn take_handed(&mut self, site: usize, starts: u32, core: u8, handed: Handed) {
        let at = &mut self.sites[site];
        if at.starts == starts
            && let Some(worker) = at.workers.get_mut(usize::from(core))
        {
            worker.round.ports.put_handed(handed);
            worker.dirty = true;
        }
    }

    /// Runs every core that has something to do, until none has.
    pub(super) fn settle(&mut self) {
        let mut busy = true;
        while busy {
            busy = false;
            for site in 0..self.sites.len() {
                for core in 0..self.sites[site].workers.len() {
                    let worker = &self.sites[site].workers[core];
                    if self.sites[site].running && worker.dirty && !worker.hung {
                        busy = true;
                        self.round(site, core);
                    }
                }
            }
        }
    }

    /// A core wakes up: as the engine's worker does it.
    fn round(&mut self, site: usize, core: usize) {
        let at = &mut self.sites[site];
        let now = at.time(self.now);
        let offset_ns = at.clock_offset_ns;
        let worker = &mut at.workers[core];
        worker.follow(&at.control);
        let actions = std::mem::take(&mut worker.actions);
        if !actions.is_empty() {
            worker.round.datapath.run(now, actions, &mut worker.round.ports.out);
        }
        let ready: Vec<Ready> = worker.round.ports.ready().collect();
        let round = worker.round.round(now, &ready);
        worker.publish(now);
        worker.dirty = round.more;
        let out = worker.round.ports.take_output();
        let wake = Time::from_ns(round.next.ns().saturating_sub(offset_ns)).max(self.now.plus_ns(1));
        self.wake_at(site, core, wake);
        self.collect(site, core as u8, out);
    }

    /// Sends on what a round gave out.
    fn collect(&mut self, site: usize, core: u8, out: MemoryOutput) {
        for (to, handed) in out.handed {
            self.sites[site].counters.crossed += 1;
            self.log("handed", [site as u64, u64::from(core), u64::from(to), 0]);
            let starts = self.sites[site].starts;
            self.schedule(self.now.plus_ns(HAND_OVER_NS), Event::Handed(site, starts, to, handed));
        }
        for sent in out.sent {
            match sent {
                Sent::Datagrams(target, segment, bytes) => {
                    self.transmit(site, core, &target, segment, &bytes);
                }
                // No node of the simulation shares an interface with another, or has a TAP device.
                Sent::SharedDevice(..) | Sent::Tap(..) => {}
                Sent::Host(offload, packet) => {
                    self.log("out", [site as u64, u64::from(core), packet.len() as u64, 0]);
                    self.came(Place::Site(site), (site, core), &offload, &packet);
                }
                Sent::Interface(interface, offload, frame) => {
                    self.log("frame", [site as u64, u64::from(core), frame.len() as u64, 0]);
                    self.send_frame(site, core, interface, offload, &frame);
                }
                Sent::Resolve(interface, next_hop, offload, packet) => {
                    self.log("resolve", [site as u64, u64::from(core), packet.len() as u64, 0]);
                    self.resolve(site, core, interface, next_hop, offload, packet);
                }
            }
        }
    }
}
