#![allow(clippy::unwrap_used, reason = "tests")]

use std::net::IpAddr;

use super::*;

const S: u64 = 1_000_000_000;

fn settings() -> ScaleSettings {
    ScaleSettings {
        pool: [12, 13].map(|node| PoolUnit { node, address: None }).to_vec(),
        above_percent: 70,
        below_percent: 30,
        for_ns: 10 * S,
        pause_ns: 60 * S,
        least: 1,
        most: 3,
        start_within_ns: 20 * S,
    }
}

/// Units 11 (of the operator's own), 12 and 13 (of the pool), and time.
struct World {
    scaler: Scaler,
    seen: Seen,
    now_ns: u64,
}

impl World {
    fn new() -> Self {
        let unit = |node, standing| SeenUnit {
            node,
            address: IpAddr::from([10, 9, 0, node as u8]),
            standing,
            connected: standing == Standing::Active,
            load_percent: 50,
            live: u64::from(node),
            is_awaited: false,
        };
        let units = vec![unit(11, Standing::Active), unit(12, Standing::Free), unit(13, Standing::Free)];
        Self { scaler: Scaler::new(settings()), seen: Seen { units, is_idle: true }, now_ns: S }
    }

    fn unit(&mut self, node: u16) -> &mut SeenUnit {
        self.seen.units.iter_mut().find(|unit| unit.node == node).unwrap()
    }

    fn load(&mut self, percent: u8) {
        self.seen.units.iter_mut().for_each(|unit| unit.load_percent = percent);
    }

    /// Looks once a second; everything that was wanted in this time, as short words.
    fn seconds(&mut self, count: u64) -> Vec<String> {
        let mut said = Vec::new();
        for _ in 0..count {
            for want in self.scaler.look(self.now_ns, &self.seen) {
                said.push(match want {
                    Want::Start(node) => format!("start {node}"),
                    Want::Stop(node) => format!("stop {node}"),
                    Want::Command(Command::Change(steps), _) => match steps[..] {
                        [Step::Add { node, enrol: Some((address, Role::DataPlane)), .. }] => {
                            format!("add {node} at {address}")
                        }
                        [Step::Add { node, .. }] => {
                            self.unit(node).is_awaited = true;
                            format!("add {node}")
                        }
                        [Step::Drain { node, remove: true, migrate: false }] => {
                            self.unit(node).standing = Standing::Draining { remove: true };
                            format!("drain {node}")
                        }
                        [Step::Remove { node, force: true }] => {
                            self.unit(node).is_awaited = false;
                            format!("remove {node}")
                        }
                        ref other => panic!("{other:?}"),
                    },
                    Want::Command(other, _) => panic!("{other:?}"),
                });
            }
            self.now_ns += S;
        }
        said
    }

    fn comes(&mut self, node: u16) {
        let unit = self.unit(node);
        (unit.standing, unit.connected, unit.is_awaited) = (Standing::Active, true, false);
    }
}

#[test]
fn a_unit_is_added_and_started_when_the_load_was_above_for_long_enough() {
    let mut world = World::new();
    world.load(80);
    assert!(world.seconds(9).is_empty());
    // One moment below the mark, and it begins anew.
    world.load(70);
    assert!(world.seconds(1).is_empty());
    world.load(90);
    assert!(world.seconds(10).is_empty());
    assert_eq!(world.seconds(2), ["add 12", "start 12"]);
    // It is on its way, and then the pause: nothing more, however high the load is.
    assert!(world.seconds(15).is_empty());
    world.comes(12);
    assert!(world.seconds(40).is_empty());
    assert_eq!(world.seconds(12), ["add 13", "start 13"]);
    world.comes(13);
    // As many as there may be.
    assert!(world.seconds(200).is_empty());
}

#[test]
fn the_unit_with_the_fewest_flows_is_drained_and_stopped_when_it_is_empty() {
    let mut world = World::new();
    world.comes(12);
    world.comes(13);
    world.unit(13).live = 5;
    world.load(10);
    assert_eq!(world.seconds(11), ["drain 13"]);
    assert!(world.seconds(300).is_empty(), "its flows have not ended");
    let unit = world.unit(13);
    unit.standing = Standing::Free;
    assert_eq!(world.seconds(1), ["stop 13"]);
    // Until it is gone it is not told again.
    assert_eq!(world.seconds(1), ["drain 12"]);
    world.unit(13).connected = false;
    assert!(world.seconds(100).is_empty());
    world.unit(12).standing = Standing::Free;
    assert_eq!(world.seconds(1), ["stop 12"]);
    world.unit(12).connected = false;
    // The operator's own unit is not of the pool, and the least stays.
    assert!(world.seconds(300).is_empty());
}

#[test]
fn nobody_is_stopped_if_the_others_would_then_have_too_much_to_do() {
    let mut world = World::new();
    world.scaler = Scaler::new(ScaleSettings { below_percent: 45, ..settings() });
    world.comes(12);
    world.load(40);
    assert!(world.seconds(100).is_empty(), "one alone would have 80 %");
    world.load(28);
    assert_eq!(world.seconds(1), ["drain 12"]);
}

#[test]
fn a_unit_that_does_not_come_is_given_up_and_another_one_is_tried() {
    let mut world = World::new();
    world.load(90);
    assert_eq!(world.seconds(12), ["add 12", "start 12"]);
    assert_eq!(world.seconds(20), ["remove 12", "stop 12"]);
    assert_eq!(world.seconds(45), ["add 13", "start 13"]);
    // A hook that fails says so at once, and is not run again and again.
    world.scaler.hook_failed(13);
    assert_eq!(world.seconds(1), ["remove 13", "stop 13"]);
    // The manager has forgotten 12; the policy has not.
    world.seen.units.retain(|unit| unit.node != 12);
    assert_eq!(world.seconds(61), ["add 12 at 10.9.0.12"]);
}

#[test]
fn too_few_are_mended_at_once_and_a_new_manager_goes_on() {
    let mut world = World::new();
    world.scaler = Scaler::new(ScaleSettings { least: 2, ..settings() });
    assert_eq!(world.seconds(1), ["add 12"]);
    // Another manager leads now.
    world.scaler = Scaler::new(ScaleSettings { least: 2, ..settings() });
    assert_eq!(world.seconds(1), ["start 12"]);
    world.comes(12);
    world.unit(13).connected = true;
    assert_eq!(world.seconds(1), ["stop 13"], "the one before had drained it");
    world.seen.is_idle = false;
    world.unit(12).standing = Standing::Free;
    world.unit(12).connected = false;
    assert!(world.seconds(1).is_empty(), "a change is under way");
}
