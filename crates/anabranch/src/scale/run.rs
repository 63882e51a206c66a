//! One run: connections through all services, and events under them.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use manager::api::types::{ClusterReport, Duty};
use testbed::hash_balancer::{FIRST_GATEWAY, HashBalancer};
use testbed::stop::Stop;
use testbed::topology::Node;
use testbed::traffic::churn::Churn as Traffic;

use super::churn::{Churn, Step, text};
use super::machines::{self, Machines, Spec};
use super::report::{Event, Settled, Units, Variant};
use super::services::{self, NAMES};
use super::{Args, Progress, Way};

/// Connections open and grow to their number before the first event.
const WARM_UP: Duration = Duration::from_secs(5);
/// A change that waits for flows to end.
const CHANGE_MAX: Duration = Duration::from_secs(120);
/// Pause between two looks while nothing happens.
const LOOK: Duration = Duration::from_millis(200);
/// Length of one while of the second hops after the last event.
const WHILE: Duration = Duration::from_secs(10);
/// Units report about once a second.
const REPORTED: Duration = Duration::from_millis(2_500);

/// Whatever leads connections to machines.
enum Balancer {
    Cluster(Box<Machines>),
    Nftables(HashBalancer),
}

/// Makes one run.
pub(super) fn run(
    args: &Args,
    way: Way,
    events: usize,
    stop: &Stop,
    progress: &mut Progress,
) -> anyhow::Result<Variant> {
    let nodes = machines::data_planes(args.data_planes);
    let present = usize::from(args.data_planes).div_ceil(2).max(2);
    progress.step(&format!("{way}: building it"));
    let mut balancer = Balancer::build(args, way, &nodes[..present], stop)?;
    let traffic = services::start(balancer.ends(), &args.load, args.seed, way == Way::Nftables)?;
    let mut run = Run {
        began: Instant::now(),
        traffic,
        churn: Churn::new(args.seed, &nodes, present),
        changes: Vec::new(),
        stop,
    };
    let pause = Duration::from_millis(args.pause_ms);
    progress.phase(&format!("{way}: {events} events"), (pause * events as u32 + WARM_UP).as_secs_f64());
    let result = run.events(&mut balancer, events, pause, progress);
    if let (Err(_), Balancer::Cluster(machines)) = (&result, &balancer) {
        progress.note(format!("The manager said last:\n{}", machines.manager.last_lines(30)));
    }
    result?;
    let settled = run.settle(&mut balancer, Duration::from_secs(args.settle), progress)?;
    let units = balancer.units()?;
    progress.step(&format!("{way}: bringing all connections to their end"));
    let Run { began, traffic, changes, .. } = run;
    let seconds = began.elapsed().as_secs_f64();
    let finish = |(name, side): (&str, Traffic)| Ok((name.to_owned(), side.finish()?));
    let traffic = NAMES.into_iter().zip(traffic).map(finish).collect::<anyhow::Result<Vec<_>>>()?;
    let variant = Variant::new(way.to_string(), seconds, traffic, changes, (units, settled));
    if let (false, Way::Chains(chains), Balancer::Cluster(machines)) = (variant.is_clean(), way, &balancer)
        && chains.keeps_flows()
    {
        progress.note(format!("The manager said last:\n{}", machines.manager.last_lines(60)));
    }
    Ok(variant)
}

struct Run<'a> {
    began: Instant,
    traffic: Vec<Traffic>,
    churn: Churn,
    changes: Vec<Event>,
    stop: &'a Stop,
}

impl Run<'_> {
    fn events(
        &mut self,
        balancer: &mut Balancer,
        events: usize,
        pause: Duration,
        progress: &Progress,
    ) -> anyhow::Result<()> {
        self.pass(WARM_UP, progress)?;
        for _ in 0..events {
            let next = Instant::now() + pause;
            let steps = self.churn.event();
            let event = self.event(balancer, &steps)?;
            progress.message(&event.text);
            self.changes.push(event);
            self.pass(next.saturating_duration_since(Instant::now()), progress)?;
        }
        Ok(())
    }

    fn event(&mut self, balancer: &mut Balancer, steps: &[Step]) -> anyhow::Result<Event> {
        let mut open = 0;
        for service in &self.traffic {
            open += service.client.mark().open;
            service.servers.iter().for_each(|server| {
                server.mark();
            });
        }
        let (at_s, text) = (self.began.elapsed().as_secs_f64(), text(steps));
        let took = balancer.change(steps, &self.churn, self.stop).with_context(|| text.clone())?;
        let [flows_in_chains_of_3, flows_at_third] = balancer.long_chains()?;
        let in_force_ms = took.as_secs_f64() * 1e3;
        Ok(Event { at_s, text, open, in_force_ms, flows_in_chains_of_3, flows_at_third })
    }

    /// Second hops from now on, by whiles.
    fn settle(
        &mut self,
        balancer: &mut Balancer,
        time: Duration,
        progress: &mut Progress,
    ) -> anyhow::Result<Vec<Settled>> {
        let (began, mut settled) = (Instant::now(), Vec::new());
        if time.is_zero() {
            return Ok(settled);
        }
        progress.phase("and no event more", time.as_secs_f64());
        let Balancer::Cluster(machines) = balancer else { return Ok(settled) };
        let mut before = hops(&machines.cluster()?);
        while began.elapsed() < time {
            self.pass(WHILE, progress)?;
            machines.alive(self.stop)?;
            let status = machines.cluster()?;
            let now = hops(&status);
            settled.push(Settled {
                after_s: began.elapsed().as_secs_f64(),
                second_hops_percent: percent(now.0.saturating_sub(before.0), now.1.saturating_sub(before.1)),
                chained_buckets: status.chains.iter().skip(1).sum(),
                flows_away: status.flows_by_place.iter().skip(1).sum(),
            });
            before = now;
        }
        Ok(settled)
    }

    fn pass(&self, time: Duration, progress: &Progress) -> anyhow::Result<()> {
        let end = Instant::now() + time;
        while Instant::now() < end {
            if self.stop.sleep(LOOK.min(end.saturating_duration_since(Instant::now()))) {
                anyhow::bail!("stopped");
            }
            let figures: Vec<_> = self.traffic.iter().map(|service| service.client.figures()).collect();
            let sum = |of: fn(&testbed::traffic::churn::Figures) -> u64| figures.iter().map(of).sum::<u64>();
            progress.tick(
                self.began.elapsed(),
                format!(
                    "{} connections, {} open, {} broken, {} UDP lost",
                    sum(|each| each.connections),
                    sum(|each| each.open),
                    sum(|each| each.broken),
                    sum(|each| each.udp_lost)
                ),
            );
        }
        Ok(())
    }
}

impl Balancer {
    fn build(args: &Args, way: Way, present: &[u16], stop: &Stop) -> anyhow::Result<Self> {
        let Way::Chains(chains) = way else {
            let bed = HashBalancer::new(args.data_planes, services::PORTS)?;
            bed.balance(&present.iter().map(|node| (*node, 1)).collect::<Vec<_>>())?;
            return Ok(Self::Nftables(bed));
        };
        let manager = format!(
            "drain-ms = 300\npool = [\"10.9.0.0/24\"]\nblocks-per-unit = {}\ndead-after-ms = {}\nchains = \"{chains}\"",
            56 / args.data_planes,
            args.dead_after_ms
        );
        let spec = Spec {
            dispatchers: 2,
            data_planes: args.data_planes,
            services: &services::data_plane_sections(),
            dispatcher_services: &services::dispatcher_sections(),
            manager: &manager,
        };
        let mut machines = Machines::start(&spec)?;
        machines.join(present, stop)?;
        Ok(Self::Cluster(Box::new(machines)))
    }

    /// Client and server.
    fn ends(&self) -> (&Node, &Node) {
        match self {
            Self::Cluster(machines) => (&machines.bed.client, &machines.bed.server),
            Self::Nftables(bed) => (&bed.client, &bed.server),
        }
    }

    /// Carries out an event; how long it took.
    fn change(&mut self, steps: &[Step], churn: &Churn, stop: &Stop) -> anyhow::Result<Duration> {
        let began = Instant::now();
        match self {
            Self::Cluster(machines) => {
                machines.change(&machines::change(steps), stop, Instant::now() + CHANGE_MAX)
            }
            Self::Nftables(bed) => {
                debug_assert_eq!(machines::data_planes(1), [FIRST_GATEWAY]);
                bed.balance(&churn.shares())?;
                Ok(began.elapsed())
            }
        }
    }

    /// Live flows in buckets with three earlier owners or more, and at the third or an earlier one.
    fn long_chains(&self) -> anyhow::Result<[u64; 2]> {
        let Self::Cluster(machines) = self else { return Ok([0; 2]) };
        let status = machines.cluster()?;
        Ok([&status.flows_by_chain, &status.flows_by_place].map(|flows| flows.iter().skip(3).sum()))
    }

    fn units(&mut self) -> anyhow::Result<Units> {
        let Self::Cluster(machines) = self else { return Ok(Units::default()) };
        std::thread::sleep(REPORTED);
        let (hops, packets) = hops(&machines.cluster()?);
        let removed =
            machines.events()?.iter().filter(|line| line.text.contains("is drained and leaves")).count();
        Ok(Units { second_hops_percent: percent(hops, packets), packets, removed })
    }
}

/// Second hops and packets of all data planes.
fn hops(status: &ClusterReport) -> (u64, u64) {
    let planes = status.units.iter().filter(|unit| unit.role != Duty::Dispatcher);
    planes.fold((0, 0), |(hops, packets), unit| (hops + unit.second_hops, packets + unit.packets))
}

fn percent(part: u64, whole: u64) -> f64 {
    100.0 * part as f64 / whole.max(1) as f64
}
