//! Flows that people ask for: each worker looks through its table a little at a time, between packets.

use std::collections::VecDeque;

use services::Services;

use crate::gateway::{FlowAnswer, FlowEntry, FlowQuery};

/// A worker looks for so long in a round, or a few flows more: packets that come meanwhile wait.
const STEP_NS: u64 = 250_000;
/// Flows between two looks at the clock.
const STEP_FLOWS: usize = 64;
/// Questions that wait at most; who asks more gets no answer.
const QUESTIONS_MAX: usize = 16;

/// Questions to one worker; the first of them is being answered.
#[derive(Default)]
pub(crate) struct Searches {
    waiting: VecDeque<Search>,
}

struct Search {
    query: FlowQuery,
    cursor: u64,
    found: Vec<FlowEntry>,
}

impl Searches {
    /// Takes a question.
    pub fn add(&mut self, query: FlowQuery) {
        if self.waiting.len() < QUESTIONS_MAX {
            self.waiting.push_back(Search { query, cursor: 0, found: Vec::new() });
        }
    }

    /// Looks at some flows. `false`: there is nothing to look for.
    #[inline]
    pub fn step(&mut self, core: u8, services: &Services) -> bool {
        if self.waiting.is_empty() {
            return false;
        }
        self.look(core, services);
        !self.waiting.is_empty()
    }

    #[cold]
    fn look(&mut self, core: u8, services: &Services) {
        let began_ns = linux::clock::monotonic_ns();
        let mut now_ns = began_ns;
        while let Some(search) = self.waiting.front_mut()
            && now_ns.saturating_sub(began_ns) < STEP_NS
        {
            let complete = search.look(core, services, now_ns);
            now_ns = linux::clock::monotonic_ns();
            if (complete || now_ns >= search.query.until_ns)
                && let Some(Search { query, found, .. }) = self.waiting.pop_front()
            {
                let _ = query.answer.try_send(FlowAnswer { flows: found, complete });
            }
        }
    }
}

impl Search {
    /// Looks at the next flows; whether that was all that was wanted.
    fn look(&mut self, core: u8, services: &Services, now_ns: u64) -> bool {
        let (flows, next) = services.flows().scan(self.cursor, STEP_FLOWS);
        for flow in flows {
            let Some(entry) = services.entry(flow, now_ns) else { continue };
            let entry = FlowEntry {
                core,
                original: entry.original,
                reply: entry.reply,
                record: entry.record,
                counters: entry.counters,
                idle_ns: entry.idle_ns,
                expires_ns: entry.expires_ns,
                ways: entry.ways,
            };
            if (self.query.matches)(&entry) {
                self.found.push(entry);
                if self.found.len() >= self.query.limit {
                    return true;
                }
            }
        }
        self.cursor = next.unwrap_or(self.cursor);
        next.is_none()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::sync::Arc;
    use std::sync::mpsc::{Receiver, sync_channel};
    use std::time::{Duration, Instant};

    use packet::PacketPool;
    use packet::attachment::{Ingress, InterfaceId};
    use packet::flow::FlowKey;
    use packet::vnet::VirtioNetHeader;
    use services::pipeline::{ETHERNET_BYTES, Frame, Handed, Neighbors, Outcome, Output};
    use services::policy::Policy;
    use services::random::Random;
    use services::spec::{GatewaySpec, InterfaceSpec, LinkSpec, RouteSpec};
    use steering::ownership::Ownership;

    use super::*;
    use crate::gateway::keys;

    #[derive(Default)]
    struct Nowhere(PacketPool);

    impl Output for Nowhere {
        fn emit(&mut self, _: Outcome, _: Option<&FlowKey>, _: &VirtioNetHeader, _: &mut [u8]) {}

        fn to_unit(&mut self, _: u16, _: &Frame<'_>) {}

        fn hand_over(&mut self, _: u8, _: Handed) -> bool {
            false
        }

        fn buffers(&mut self) -> &mut PacketPool {
            &mut self.0
        }
    }

    /// A core with so many flows of UDP from one interface to another.
    fn with_flows(count: u16) -> Services {
        let interface = |name| InterfaceSpec::new(name, Vec::new(), LinkSpec::PointToPoint);
        let out = Ingress::Interface(InterfaceId(1));
        let spec = GatewaySpec {
            interfaces: vec![interface("in"), interface("out")],
            tenants: vec![String::new()],
            routes: vec![RouteSpec::new(0, "0.0.0.0/0".parse().unwrap(), out.into(), None)],
            default_action: services::spec::RuleAction::Allow,
            ..GatewaySpec::default()
        };
        let policy = Arc::new(Policy::compile(spec, None, 0).unwrap().0);
        let ownership = Arc::new(Ownership::new(1, keys()).unwrap());
        let mut services =
            Services::new(0, Random::of_number(1), &policy, &ownership, Arc::new(Neighbors::default()));
        for port in 0..count {
            let mut bytes = vec![0; ETHERNET_BYTES];
            bytes.extend([0x45, 0, 0, 28, 0, 0, 0x40, 0, 64, 17, 0x26, 0xcf, 10, 0, 0, 1, 10, 0, 0, 2]);
            bytes.extend(port.to_be_bytes());
            bytes.extend([0, 9, 0, 8, 0, 0]);
            let ingress = Ingress::Interface(InterfaceId(0));
            let mut frames = [Frame::new(ingress, VirtioNetHeader::default(), &mut bytes)];
            services.batch(1, &mut frames, &mut Nowhere::default());
        }
        assert_eq!(services.flows().len(), usize::from(count));
        services
    }

    fn query(
        limit: usize,
        patience: Duration,
        matches: impl Fn(&FlowEntry) -> bool + Send + Sync + 'static,
    ) -> (FlowQuery, Receiver<FlowAnswer>) {
        let (answer, answers) = sync_channel(1);
        let until_ns = linux::clock::monotonic_ns() + patience.as_nanos() as u64;
        (FlowQuery { matches: Arc::new(matches), limit, until_ns, answer }, answers)
    }

    const LONG: Duration = Duration::from_secs(600);

    #[test]
    fn a_search_leaves_time_for_packets_and_sees_all_flows() {
        let services = with_flows(500);
        let mut searches = Searches::default();
        let slow = |entry: &FlowEntry| {
            std::thread::sleep(Duration::from_millis(1));
            entry.original.0.src_port % 100 == 7
        };
        let (query, answers) = query(1_000, LONG, slow);
        searches.add(query);
        let mut steps = 0;
        loop {
            let began = Instant::now();
            let more = searches.step(0, &services);
            steps += 1;
            // A core that is busy for 200 ms hangs (`core_watch`).
            assert!(began.elapsed() < Duration::from_millis(190), "step {steps}: {:?}", began.elapsed());
            if !more {
                break;
            }
        }
        let answer = answers.try_recv().unwrap();
        assert!(answer.complete && steps >= 4, "{steps}");
        let mut ports: Vec<_> = answer.flows.iter().map(|entry| entry.original.0.src_port).collect();
        ports.sort_unstable();
        assert_eq!(ports, [7, 107, 207, 307, 407]);
    }

    #[test]
    fn a_search_ends_with_enough_flows_or_when_its_time_is_over() {
        let services = with_flows(500);
        let mut searches = Searches::default();
        let (enough, answers) = query(3, LONG, |_| true);
        searches.add(enough);
        while searches.step(0, &services) {}
        let answer = answers.try_recv().unwrap();
        assert!(answer.complete && answer.flows.len() == 3, "{answer:?}");
        let (late, answers) = query(1_000, Duration::ZERO, |_| true);
        searches.add(late);
        while searches.step(0, &services) {}
        let answer = answers.try_recv().unwrap();
        assert!(!answer.complete && (1..500).contains(&answer.flows.len()), "{answer:?}");
    }

    #[test]
    fn questions_wait_for_each_other_and_not_without_limit() {
        let services = with_flows(10);
        let mut searches = Searches::default();
        let answers: Vec<_> = (0..QUESTIONS_MAX + 3)
            .map(|_| {
                let (query, answers) = query(100, LONG, |_| true);
                searches.add(query);
                answers
            })
            .collect();
        while searches.step(0, &services) {}
        let answered = answers.iter().filter(|answers| answers.try_recv().is_ok_and(|all| all.complete));
        assert_eq!(answered.count(), QUESTIONS_MAX);
    }
}
