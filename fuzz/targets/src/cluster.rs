//! Messages between manager and units of a cluster, what a unit makes of them, and the manager's stored state.

use cluster::manager::{Manager, Settings, State};
use cluster::message::{Message, Role};
use cluster::unit::{Action, Figures, Identity, Unit};

/// A message that is accepted says the same when it is written and read again.
pub fn cluster_message(data: &[u8]) {
    let Ok(message) = Message::decode(data) else { return };
    let mut bytes = Vec::new();
    if message.encode(&mut bytes).is_ok() {
        let body = bytes.get(4..).unwrap_or(&[]);
        assert_eq!(Message::decode(body).as_ref(), Ok(&message));
    }
}

/// Frames of a manager gone mad, each behind a 16-bit length: the unit keeps one state that is whole.
pub fn cluster_unit(data: &[u8]) {
    let mut unit = Unit::new(Identity { node: 3, role: Role::Both, weight: 1, instance: 1 });
    unit.connected();
    let mut left = data;
    let mut now_ns = 0;
    while let Some((length, rest)) = left.split_first_chunk::<2>() {
        let length = usize::from(u16::from_be_bytes(*length)).min(rest.len());
        let (frame, rest) = rest.split_at(length);
        left = rest;
        now_ns += 1_000_000;
        let Ok(message) = Message::decode(frame) else { continue };
        let mut number = None;
        for action in unit.receive(now_ns, message) {
            match action {
                Action::Publish(snapshot) => {
                    let units = &snapshot.units;
                    let served = units.eras.of_parity(units.in_force & 1 == 1).map(|table| table.era());
                    assert_eq!(served, Some(units.in_force), "the era in force is held");
                    assert!(snapshot.blocks.iter().all(|lease| lease.node == 3), "ports of another unit");
                    assert!(number < Some(snapshot.number), "numbers grow");
                    number = Some(snapshot.number);
                }
                Action::Leave => assert!(unit.snapshot().is_none()),
                Action::Refused(_) => drop(unit.connected()),
                Action::ForgetFlows | Action::Inherit(_) | Action::Send(_) | Action::Prove { .. } => {}
            }
        }
        if let Some(number) = number {
            unit.took_over(number);
        }
        unit.tick(now_ns);
        let live = [u32::from(frame.len() as u16); 16];
        unit.report(&Figures {
            live: &live,
            in_use: 16,
            load_percent: 9,
            second_hops: 0,
            packets: 0,
            copied_to: None,
            inherited: 0,
        });
    }
}

/// A stored state that is accepted says the same when it is written and read again, and a manager can start with it.
pub fn cluster_state(data: &[u8]) {
    let Ok(state) = State::decode(data) else { return };
    assert_eq!(State::decode(&state.encode()).as_ref(), Ok(&state));
    let mut manager = Manager::resume(Settings::default(), state, 0);
    for second in 1..8 {
        manager.tick(second * 1_000_000_000);
        manager.outputs();
    }
}
