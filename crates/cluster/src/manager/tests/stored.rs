use proptest::prelude::*;
use steering::assign::plan;
use steering::table::{BucketTable, Unit};

use super::harness::*;
use crate::manager::*;
use crate::message::{Pair, Role, SharedInterface};

fn table(era: u32) -> BucketTable {
    BucketTable::from_owners(era, vec![1, 1, 2, 2]).unwrap()
}

fn state() -> State {
    let unit = |id, weight| Unit { id, weight };
    let mut state = State::new(KEY);
    let record = |node: u16, role, standing| UnitRecord {
        address: address(node),
        role,
        weight: u32::from(node),
        share_permille: 950,
        standing,
        joined: 3,
        instance: u64::MAX,
        forget: node == 2,
        migrate: node == 4,
    };
    let standings = [
        Standing::Free,
        Standing::Active,
        Standing::Draining { remove: false },
        Standing::Draining { remove: true },
        Standing::Lost,
    ];
    for (node, standing) in (1..).zip(standings) {
        state.units.insert(node, record(node, Role::Both, standing));
    }
    state.units.insert(9, record(9, Role::Dispatcher, Standing::Active));
    state.interfaces.push(SharedInterface {
        id: 1,
        outside: true,
        mac: [2; 6],
        name: "wan0".into(),
        addresses: vec![("2001:db8::1".parse().unwrap(), 64)],
    });
    state.outside = vec!["192.0.2.1".parse().unwrap()];
    state.blocks = vec![
        Block { address: "192.0.2.1".parse().unwrap(), block: 1, node: None, resting: false },
        Block { address: "192.0.2.1".parse().unwrap(), block: 63, node: Some(2), resting: true },
    ];
    let next = plan(&table(u32::MAX), &[unit(1, 1), unit(2, 3)], &[]).unwrap();
    state.table = Some(table(u32::MAX));
    state.change = Some(Change { table: next, committing: true });
    state.fence = true;
    state.keys.insert(2, [0x17; 32]);
    let digest = [0x2a; 32];
    state.tokens.push(Token {
        digest,
        node: 8,
        role: Role::DataPlane,
        weight: Some(3),
        ends_s: 1_800_000_000,
    });
    state.copies = vec![Pair { unit: 1, heir: 2 }, Pair { unit: 2, heir: 1 }];
    state.heirs = vec![Inheritance { pair: Pair { unit: 7, heir: 2 }, planned: true }];
    let steps = vec![
        Step::Add { node: 1, enrol: Some((address(1), Role::DataPlane)), weight: Some(7) },
        Step::Add { node: 2, enrol: None, weight: None },
        Step::Drain { node: 3, remove: true, migrate: true },
        Step::Remove { node: 4, force: true },
        Step::Weight { node: 5, weight: 8 },
    ];
    let (one, two) = (state.number(), state.number());
    state.accepted.push(Accepted { number: one, command: Command::Change(steps) });
    let (interfaces, outside) = (state.interfaces.clone(), state.outside.clone());
    state.accepted.push(Accepted { number: two, command: Command::Configure { interfaces, outside } });
    state
}

#[test]
fn a_state_is_read_back_and_every_cut_is_refused() {
    let state = state();
    let bytes = state.encode();
    assert_eq!(State::decode(&bytes).as_ref(), Ok(&state));
    assert_eq!(State::decode(&State::new(KEY).encode()), Ok(State::new(KEY)));
    for end in 0..bytes.len() {
        assert!(State::decode(&bytes[..end]).is_err(), "cut at {end}");
    }
    assert!(State::decode(&[&bytes[..], &[0]].concat()).is_err());
    let mut newer = bytes;
    newer[0] = 4;
    assert!(State::decode(&newer).is_err(), "another version");
}

#[test]
fn a_state_that_contradicts_itself_is_refused() {
    let mut gap = state();
    gap.table = Some(table(5));
    assert!(State::decode(&gap.encode()).is_err());
    let mut first = state();
    first.blocks[0].block = 0;
    assert!(State::decode(&first.encode()).is_err(), "the first block is never leased");
}

#[test]
fn the_key_is_not_printed() {
    let mut state = state();
    state.key = [173; 40];
    assert!(!format!("{state:?}").contains("173"));
}

proptest! {
    #[test]
    fn changed_bytes_are_refused_or_are_a_state(place in any::<prop::sample::Index>(), value: u8) {
        let mut bytes = state().encode();
        let place = place.index(bytes.len());
        bytes[place] = value;
        if let Ok(state) = State::decode(&bytes) {
            prop_assert_eq!(State::decode(&state.encode()), Ok(state.clone()));
            // A manager can start with it.
            let mut manager = Manager::resume(settings(), state, 0);
            manager.tick(10_000 * MS);
        }
    }
}
