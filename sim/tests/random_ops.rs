//! Random operations on a random bond: whatever happens, nothing panics, nothing is damaged or comes twice, and
//! when the network heals every path comes back and traffic flows.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::net::SocketAddr;

use fastrand::Rng;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestRng, TestRunner};
use sim::cable::Datagram;
use sim::inner::tcp::TcpSpec;
use sim::inner::udp::UdpSpec;
use sim::link::Shape;
use sim::scenario::to_hub;
use sim::site::LISTEN_PORT;
use sim::world::World;
use steering::policy::Policy;
use tunnel::mode::SteeringMode;

#[derive(Clone, Debug)]
enum Op {
    Udp { back: bool, bytes: usize, mbps: u8 },
    Tcp { back: bool, bytes: u32 },
    Advance { ms: u64 },
    CutLink { link: usize, direction: Option<usize> },
    HealLink { link: usize },
    SetRate { link: usize, mbps: u8 },
    SetMtu { link: usize, mtu: u32 },
    Rebind { link: usize, address: bool },
    Restart { site: usize },
    RestartWithCores { site: usize, cores: u8 },
    Stop { site: usize },
    WanDown { link: usize },
    WanUp { link: usize },
    RemoveWan { link: usize },
    Reload { site: usize },
    SpendKey { site: usize },
    Steering { site: usize, mode: u8 },
    Garbage { site: usize, count: u8 },
    Replay { count: u8 },
}

fn op() -> impl Strategy<Value = Op> {
    let link = 0..3usize;
    prop_oneof![
        4 => (any::<bool>(), 44..=1_500usize, 1..8u8).prop_map(|(back, bytes, mbps)| Op::Udp { back, bytes, mbps }),
        2 => (any::<bool>(), 1_000..2_000_000u32).prop_map(|(back, bytes)| Op::Tcp { back, bytes }),
        8 => (1..700u64).prop_map(|ms| Op::Advance { ms }),
        1 => Just(Op::Advance { ms: 20_000 }),
        3 => (link.clone(), prop::option::of(0..2usize)).prop_map(|(link, direction)| Op::CutLink { link, direction }),
        3 => link.clone().prop_map(|link| Op::HealLink { link }),
        1 => (link.clone(), 1..60u8).prop_map(|(link, mbps)| Op::SetRate { link, mbps }),
        1 => (link.clone(), 1_280..1_500u32).prop_map(|(link, mtu)| Op::SetMtu { link, mtu }),
        2 => (link.clone(), any::<bool>()).prop_map(|(link, address)| Op::Rebind { link, address }),
        1 => (0..2usize).prop_map(|site| Op::Restart { site }),
        1 => (0..2usize, 1..5u8).prop_map(|(site, cores)| Op::RestartWithCores { site, cores }),
        1 => (0..2usize).prop_map(|site| Op::Stop { site }),
        2 => link.clone().prop_map(|link| Op::WanDown { link }),
        2 => link.clone().prop_map(|link| Op::WanUp { link }),
        1 => link.prop_map(|link| Op::RemoveWan { link }),
        1 => (0..2usize).prop_map(|site| Op::Reload { site }),
        2 => (0..2usize).prop_map(|site| Op::SpendKey { site }),
        2 => (0..2usize, 0..7u8).prop_map(|(site, mode)| Op::Steering { site, mode }),
        2 => (0..2usize, any::<u8>()).prop_map(|(site, count)| Op::Garbage { site, count }),
        2 => any::<u8>().prop_map(|count| Op::Replay { count }),
    ]
}

/// How a site's peers shall address its cores, and how they are chosen.
fn steer(snapshot: &mut tunnel::config::Snapshot, mode: u8, policy: u8) {
    for peer in &mut snapshot.peers {
        peer.steering.receive = SteeringMode::from_number(mode % 7).unwrap();
        peer.policy = Policy::from_u8(policy % 4).unwrap();
    }
}

struct Run {
    world: World,
    random: Rng,
    wans: Vec<tunnel::config::Wan>,
    nats: u8,
    removed: [bool; 3],
}

impl Run {
    fn new(seed: u64) -> Self {
        let mut random = Rng::with_seed(seed);
        let links: Vec<Shape> = (0..3)
            .map(|n| {
                let link =
                    Shape::new(10.0 + random.u64(..40) as f64, 2.0 + random.u64(..40) as f64).mtu(1_500);
                match (n + random.u64(..4)) % 4 {
                    0 => link.jitter(random.u64(..6_000) as u32, true),
                    1 => link.loss(0.01),
                    2 => link.duplicate(0.02).corrupt(0.01),
                    _ => link,
                }
            })
            .collect();
        let cores = (1 + random.u64(..4) as u8, 1 + random.u64(..4) as u8);
        let mut world = to_hub(seed, cores, &links);
        for cable in 0..2 {
            world.nat(cable);
        }
        for site in &mut world.sites {
            steer(&mut site.snapshot, random.u8(..6), random.u8(..4));
        }
        world.capture(true);
        world.start();
        world.run_ms(300);
        let wans = world.sites[0].snapshot.wans.clone();
        Self { world, random, wans, nats: 100, removed: [false; 3] }
    }

    fn wan_up(&mut self, link: usize, up: bool) {
        if let Some(wan) = self.world.sites[0].wan_mut(link as u16) {
            wan.up = up;
        }
        self.world.reload(0);
    }

    fn apply(&mut self, op: &Op) {
        let world = &mut self.world;
        let now = world.now;
        let ends = |back: bool| if back { (1, 0) } else { (0, 1) };
        match *op {
            Op::Udp { back, bytes, mbps } => {
                let (from, to) = ends(back);
                world.udp(from, to, UdpSpec::mbps(bytes, f64::from(mbps), now, now.plus_ms(300)));
            }
            Op::Tcp { back, bytes } => {
                let (from, to) = ends(back);
                world.tcp(
                    from,
                    to,
                    TcpSpec { hystart: true, start: now, stop: now.plus_ms(500), bytes: u64::from(bytes) },
                );
            }
            Op::Advance { ms } => world.run_ms(ms),
            Op::CutLink { link, direction: None } => world.cables[link].cut(true),
            Op::CutLink { link, direction: Some(direction) } => world.cables[link].links[direction].cut(true),
            Op::HealLink { link } => world.cables[link].cut(false),
            Op::SetRate { link, mbps } => {
                world.cables[link].links.iter_mut().for_each(|l| l.set_rate(f64::from(mbps)));
            }
            Op::SetMtu { link, mtu } => world.cables[link].links.iter_mut().for_each(|l| l.set_mtu(mtu)),
            Op::Rebind { link, address } => {
                self.nats = self.nats.wrapping_add(1);
                let public = address.then(|| [203, 0, 113, self.nats].into());
                if let Some(nat) = &mut world.cables[link].nat {
                    nat.rebind(public);
                }
            }
            Op::Restart { site } => world.restart(site, true),
            Op::RestartWithCores { site, cores } => {
                world.sites[site].set_cores(cores);
                world.restart(site, true);
            }
            Op::Stop { site } => {
                if world.sites[site].is_running() {
                    world.stop(site);
                }
            }
            Op::WanDown { link } => self.wan_up(link, false),
            Op::WanUp { link } => self.wan_up(link, true),
            Op::RemoveWan { link } => {
                self.removed[link] = true;
                world.sites[0].snapshot.wans.retain(|wan| usize::from(wan.id) != link);
                world.reload(0);
            }
            Op::Reload { site } => world.reload(site),
            Op::SpendKey { site } => {
                if let Some(session) = &*world.sites[site].bond(0).unwrap().current.load() {
                    session.spend();
                }
            }
            Op::Steering { site, mode } => {
                steer(&mut world.sites[site].snapshot, mode, mode);
                world.reload(site);
            }
            Op::Garbage { site, count } => self.garbage(site, count),
            Op::Replay { count } => self.replay(count),
        }
    }

    fn garbage(&mut self, site: usize, count: u8) {
        let Some(wan) = self.world.sites[site].snapshot.wans.first().cloned() else { return };
        for _ in 0..count {
            let to = SocketAddr::new(wan.addresses[0], LISTEN_PORT);
            let from = SocketAddr::from(([198, 51, 100, self.random.u8(..)], 7));
            let mut bytes: Vec<u8> = (0..self.random.u64(..300)).map(|_| self.random.u8(..)).collect();
            if let Some(first) = bytes.first_mut() {
                *first = 0x10 | *first & 7;
            }
            self.world.receive(site, wan.id, Datagram { from, to, bytes });
        }
        self.world.run_ms(1);
    }

    fn replay(&mut self, count: u8) {
        for _ in 0..count {
            let at = self.random.usize(..self.world.captured.len());
            let Some((site, datagram)) = self.world.captured.get(at).cloned() else { continue };
            let wans = &self.world.sites[site].snapshot.wans;
            if let Some(wan) =
                wans.iter().find(|wan| wan.addresses.contains(&datagram.to.ip())).map(|wan| wan.id)
            {
                self.world.receive(site, wan, datagram);
            }
        }
        self.world.run_ms(1);
    }

    /// Everything works again: all paths must come back, and new flows must arrive.
    fn heal(&mut self) -> Result<(), TestCaseError> {
        let world = &mut self.world;
        world.capture(false);
        for cable in &mut world.cables {
            cable.cut(false);
            for link in &mut cable.links {
                link.set_rate(30.0);
                link.set_mtu(1_500);
            }
        }
        world.sites[0].snapshot.wans.clone_from(&self.wans);
        for site in 0..2 {
            if !world.sites[site].is_running() {
                world.restart(site, true);
            }
        }
        world.start();
        let back =
            world.run_until_true(10_000, |world| (0..2).all(|site| world.sites[site].paths_up(0) == 3));
        prop_assert!(back, "paths came not back\n{}", world.describe());
        // An idle side hears of a new NAT mapping with the next ping of the other, not before.
        world.run_ms(2_000);
        let start = world.now;
        let spec =
            UdpSpec { packet_bytes: 1_400, every_ns: 4_000_000, burst: 1, start, stop: start.plus_ms(1_000) };
        let flows = [world.udp(0, 1, spec), world.udp(1, 0, spec)];
        let tcp =
            world.tcp(0, 1, TcpSpec { hystart: true, start, stop: start.plus_ms(20_000), bytes: 500_000 });
        world.run_ms(3_000);
        world.run_until_true(10_000, |world| world.tcp_flow(tcp).unwrap().finished());
        world.check().map_err(TestCaseError::fail)?;
        for flow in flows {
            let stats = world.udp_stats(flow);
            prop_assert!(stats.received + 8 >= stats.sent, "{stats:?}\n{}", world.describe());
        }
        prop_assert!(world.tcp_flow(tcp).unwrap().finished(), "TCP stalls\n{}", world.describe());
        Ok(())
    }
}

fn check(seed: u64, ops: &[Op]) -> Result<(), TestCaseError> {
    let mut run = Run::new(seed);
    for op in ops {
        run.apply(op);
        run.world.check().map_err(|what| TestCaseError::fail(format!("{what} after {op:?}")))?;
        for site in 0..2 {
            let (bonds, paths, sessions) = run.world.sites[site].held();
            prop_assert!(
                bonds == 1 && paths <= 16 && sessions <= 3,
                "site {site} holds {bonds} {paths} {sessions}"
            );
        }
    }
    run.heal()
}

/// `SIM_SEED` chooses other histories, `SIM_CASES` more of them.
#[test]
fn random_operations_leave_nothing_broken() {
    let seed = sim::seed(1);
    let cases = std::env::var("SIM_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(24);
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let config = Config { cases, failure_persistence: None, max_shrink_iters: 200, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
    let histories = (0..1_000_000u64, prop::collection::vec(op(), 3..30));
    let result = runner.run(&histories, |(seed, ops)| check(seed, &ops));
    if let Err(error) = result {
        panic!("SIM_SEED={seed}: {error}");
    }
}
