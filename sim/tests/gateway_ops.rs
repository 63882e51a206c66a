//! Random operations on a branch and a hub with NAT and a virtual server: after each of them every flow has one owner,
//! nothing is damaged, comes twice or changes its outside port, and in the end everything works.
#![allow(clippy::unwrap_used, reason = "tests")]

use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestRng, TestRunner};
use sim::inner::tcp::TcpSpec;
use sim::inner::udp::UdpSpec;
use sim::link::Shape;
use sim::scenario::Gateways;
use sim::site::Readers;

const CORES: u8 = 3;

#[derive(Clone, Debug)]
enum Op {
    Udp { flows: usize },
    Server { flows: usize },
    Tcp { bytes: u32 },
    Advance { ms: u64 },
    CutLink { link: usize, direction: Option<usize> },
    HealLink { link: usize },
    SetCore { site: usize, core: u8, enabled: bool },
    SpendKey { site: usize },
    ReloadServices { site: usize, rule: bool },
    Scatter { site: usize, on: bool },
}

fn op() -> impl Strategy<Value = Op> {
    let (link, site) = (0..3usize, 0..2usize);
    prop_oneof![
        4 => (1..12usize).prop_map(|flows| Op::Udp { flows }),
        2 => (1..8usize).prop_map(|flows| Op::Server { flows }),
        2 => (1_000..400_000u32).prop_map(|bytes| Op::Tcp { bytes }),
        8 => (1..300u64).prop_map(|ms| Op::Advance { ms }),
        1 => Just(Op::Advance { ms: 6_000 }),
        2 => (link.clone(), prop::option::of(0..2usize)).prop_map(|(link, direction)| Op::CutLink { link, direction }),
        2 => link.prop_map(|link| Op::HealLink { link }),
        6 => (site.clone(), 0..CORES, any::<bool>())
            .prop_map(|(site, core, enabled)| Op::SetCore { site, core, enabled }),
        2 => site.clone().prop_map(|site| Op::SpendKey { site }),
        2 => (site.clone(), any::<bool>()).prop_map(|(site, rule)| Op::ReloadServices { site, rule }),
        1 => (site, any::<bool>()).prop_map(|(site, on)| Op::Scatter { site, on }),
    ]
}

struct Run {
    gateways: Gateways,
    turn: usize,
}

impl Run {
    fn new(seed: u64) -> Self {
        let links = [
            Shape::new(50.0, 5.0),
            Shape::new(30.0, 20.0).loss(0.01),
            Shape::new(20.0, 30.0).jitter(4_000, true),
        ];
        let mut gateways = Gateways::new(seed, (CORES, CORES), &links);
        for site in 0..2 {
            // Silent flows end within a run: owner chains come and go.
            let timeouts = &mut gateways.world.sites[site].control.spec.timeouts;
            (timeouts.udp_s, timeouts.udp_unreplied_s) = (3, 2);
        }
        gateways.world.start();
        gateways.world.run_ms(500);
        Self { gateways, turn: 0 }
    }

    fn udp(&mut self, flows: usize, to_server: bool, ms: u64) -> Vec<usize> {
        let Gateways { world, clients, servers, backends } = &mut self.gateways;
        let backends: Vec<_> = backends.iter().map(|host| (*host, Gateways::BACKEND_PORT)).collect();
        let start = world.now;
        (0..flows)
            .map(|n| {
                self.turn += 1;
                let every_ns = 20_000_000 + 300_000 * n as u64;
                let spec = UdpSpec { packet_bytes: 400, every_ns, burst: 1, start, stop: start.plus_ms(ms) };
                let client = clients[self.turn % clients.len()];
                if to_server {
                    world.server_udp(client, Gateways::LISTEN, &backends, spec)
                } else {
                    world.host_udp(client, servers[self.turn % servers.len()], Gateways::OUTSIDE, spec)
                }
            })
            .collect()
    }

    fn tcp(&mut self, bytes: u64) -> usize {
        let Gateways { world, clients, servers, .. } = &mut self.gateways;
        self.turn += 1;
        let (start, stop) = (world.now, world.now.plus_ms(60_000));
        let spec = TcpSpec { hystart: true, start, stop, bytes };
        let (client, server) = (clients[self.turn % clients.len()], servers[self.turn % servers.len()]);
        world.host_tcp(client, server, Gateways::OUTSIDE, spec)
    }

    fn apply(&mut self, op: &Op) {
        let world = &mut self.gateways.world;
        match *op {
            Op::Udp { flows } => drop(self.udp(flows, false, 700)),
            Op::Server { flows } => drop(self.udp(flows, true, 700)),
            Op::Tcp { bytes } => _ = self.tcp(bytes.into()),
            Op::Advance { ms } => world.run_ms(ms),
            Op::CutLink { link, direction: None } => world.cables[link].cut(true),
            Op::CutLink { link, direction: Some(direction) } => world.cables[link].links[direction].cut(true),
            Op::HealLink { link } => world.cables[link].cut(false),
            Op::SetCore { site, core, enabled } => {
                let control = &world.sites[site].control;
                let others = (0..CORES).filter(|other| *other != core && !control.is_drained(*other)).count();
                if enabled || others > 0 {
                    world.set_core(site, core, enabled).unwrap();
                }
            }
            Op::SpendKey { site } => {
                if let Some(session) = &*world.sites[site].bond(0).unwrap().current.load() {
                    session.spend();
                }
            }
            Op::ReloadServices { site, rule } => {
                // A rule that decides nothing: every flow is decided again all the same.
                world.sites[site].control.spec.rules =
                    if rule { vec![Default::default()] } else { Vec::new() };
                world.reload_services(site).unwrap();
            }
            Op::Scatter { site, on } => {
                world.sites[site].readers = if on { Readers::Random } else { Readers::Owner };
            }
        }
        self.gateways.world.run_ms(1);
    }

    /// Everything works again: all paths must come back, and new flows must arrive, there and back.
    fn heal(&mut self) -> Result<(), TestCaseError> {
        let world = &mut self.gateways.world;
        world.cables.iter_mut().for_each(|cable| cable.cut(false));
        for site in 0..2 {
            for core in 0..CORES {
                world.set_core(site, core, true).unwrap();
            }
        }
        let back =
            world.run_until_true(10_000, |world| (0..2).all(|site| world.sites[site].paths_up(0) == 3));
        prop_assert!(back, "paths came not back\n{}", world.describe());
        world.run_ms(2_000);
        let mut flows = self.udp(6, false, 1_000);
        flows.extend(self.udp(6, true, 1_000));
        let tcp = self.tcp(300_000);
        let world = &mut self.gateways.world;
        world.run_ms(2_000);
        world.run_until_true(10_000, |world| world.tcp_flow(tcp).unwrap().finished());
        world.check().map_err(TestCaseError::fail)?;
        for flow in flows {
            let missing = world.udp_missing(flow);
            prop_assert!(missing.len() <= 2, "{missing:?}\n{}", world.describe());
        }
        prop_assert!(world.tcp_flow(tcp).unwrap().finished(), "TCP stalls\n{}", world.describe());
        Ok(())
    }
}

fn check(seed: u64, ops: &[Op]) -> Result<(), TestCaseError> {
    let mut run = Run::new(seed);
    for op in ops {
        run.apply(op);
        run.gateways.world.check().map_err(|what| TestCaseError::fail(format!("{what} after {op:?}")))?;
    }
    run.heal()
}

/// `SIM_SEED` chooses other histories, `SIM_CASES` more of them.
#[test]
fn random_operations_leave_every_flow_with_one_owner() {
    let seed = sim::seed(1);
    let cases = std::env::var("SIM_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(24);
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let config = Config { cases, failure_persistence: None, max_shrink_iters: 200, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
    let histories = (0..1_000_000u64, prop::collection::vec(op(), 3..40));
    let result = runner.run(&histories, |(seed, ops)| check(seed, &ops));
    if let Err(error) = result {
        panic!("SIM_SEED={seed}: {error}");
    }
}
