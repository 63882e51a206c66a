//! Leases of port blocks, asked for by whoever may use the control socket.

use std::net::IpAddr;

use services::nat::lease::{Lease, Leases, blocks_of};
use services::spec::LeaseSpec;

/// Bytes of one step.
const STEP_BYTES: usize = 6;
/// How long returned blocks rest, ns.
const REST_NS: u64 = 100;

/// Steps `what:8 | address and holder:8 | first:8 | count:8 | waits:16`: leases are taken, returned and configured. No block ever belongs to
/// two, none is given again before it has rested, and a configuration that is refused changes nothing.
pub fn port_lease(data: &[u8]) {
    let leases = Leases::default();
    leases.set_rest(REST_NS);
    let mut now_ns = 0;
    // When each block of the two addresses was given back.
    let mut returned = [[None::<u64>; 64]; 2];
    for step in data.chunks_exact(STEP_BYTES) {
        now_ns += u64::from(u16::from_be_bytes([step[4], step[5]]));
        let before = leases.list();
        let spec = spec(step);
        match step[0] % 5 {
            0 => drop(leases.take(now_ns, spec)),
            1 => {
                let taken = leases.take_any(now_ns, spec, &[address(0), address(1)], |_| !1);
                if let Ok((lease, _)) = taken {
                    assert!(lease.spec.first_port >= 1_024, "a block that may not be leased");
                }
            }
            2 => drop(leases.give_back(now_ns, u32::from(step[2]))),
            3 => {
                let specs: Vec<LeaseSpec> = step.windows(4).map(self::spec).collect();
                let refused = leases.refused(now_ns, &specs);
                let (_, errors) = leases.configure(now_ns, &specs);
                assert_eq!(refused, errors);
                if !errors.is_empty() {
                    assert_eq!(leases.list(), before, "a refused configuration changed something");
                }
            }
            _ => leases.tick(now_ns),
        }
        let after = leases.list();
        note(&before, &after, now_ns, &mut returned);
        apart(&leases, &after, now_ns);
    }
}

fn address(number: u8) -> IpAddr {
    IpAddr::from([192, 0, 2, 1 + number % 2])
}

fn spec(step: &[u8]) -> LeaseSpec {
    let [_, who, first, count, ..] = *step else { unreachable!("steps have four bytes and more") };
    LeaseSpec {
        name: format!("holder-{}", who >> 4),
        tenant: u16::from(who >> 6),
        from: format!("10.{}.0.0/16", who >> 2).parse().expect("a prefix"),
        address: address(who),
        // Most are whole blocks.
        first_port: (u16::from(first & 63) << 10) | u16::from(first >> 7),
        ports: (u32::from(count & 7) << 10) | u32::from(count >> 7),
    }
}

/// Blocks that are new in a lease have rested; those that are no more in one begin to.
fn note(before: &[Lease], after: &[Lease], now_ns: u64, returned: &mut [[Option<u64>; 64]; 2]) {
    for (number, times) in returned.iter_mut().enumerate() {
        let held = |leases: &[Lease]| {
            let of_it = leases.iter().filter(|lease| lease.spec.address == address(number as u8));
            of_it.fold(0, |all, lease| all | blocks(lease))
        };
        let (was, is) = (held(before), held(after));
        for (block, time) in times.iter_mut().enumerate() {
            let bit = 1 << block;
            if is & bit != 0 && was & bit == 0 {
                assert!(time.is_none_or(|time| now_ns >= time + REST_NS), "block {block} has not rested");
            }
            if was & bit != 0 && is & bit == 0 {
                *time = Some(now_ns);
            }
        }
    }
}

fn blocks(lease: &Lease) -> u64 {
    blocks_of(lease.spec.first_port, lease.spec.ports).expect("a lease is of whole blocks")
}

/// No two leases share a block, and all of them are closed.
fn apart(leases: &Leases, all: &[Lease], now_ns: u64) {
    for number in 0..2 {
        let closed = leases.closed(now_ns, address(number));
        let mut seen = 0;
        for lease in all.iter().filter(|lease| lease.spec.address == address(number)) {
            assert_eq!(seen & blocks(lease), 0, "a block with two holders");
            seen |= blocks(lease);
        }
        assert_eq!(seen & !closed, 0, "a leased block is free");
    }
}
