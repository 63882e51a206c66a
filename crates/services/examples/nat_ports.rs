//! How long a new flow's port takes: `cargo run --release -p services --example nat_ports`.
//!
//! Binds flows to an empty NAT, to one that is half full and to one that has 0.1 % of its ports free, releases one for
//! each new one, and prints nanoseconds and words of port tables for a pair of bind and release.

#![allow(clippy::print_stdout, reason = "an example prints")]

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use packet::flow::FlowKey;
use services::flow::{Record, flags};
use services::nat::{BindRequest, Binding, Nat, NatPolicy};
use services::random::Random;
use services::spec::{Mapping, NatMode, NatSpec, PortChoice};
use steering::port_solver::ReplyPorts;
use steering::table::{BucketTable, Unit};

/// Pairs of bind and release that are timed.
const ROUNDS: usize = 400_000;

fn main() {
    for (name, mode, tables) in [
        ("C2, 64 tables, 1 address", NatMode::AddressAndPort, 64),
        ("C2, 1 table, 1 address", NatMode::AddressAndPort, 1),
        ("C3, 256 tables", NatMode::PortOnly, 256),
    ] {
        for fill in [0.0, 0.5, 0.999] {
            measure(name, mode, tables, fill);
        }
    }
}

/// A flow of a random client to a random server.
fn flow(random: &mut Random) -> FlowKey {
    let word = random.word().to_be_bytes();
    FlowKey {
        src: IpAddr::from([10, 0, word[0] & 3, word[1]]),
        dst: IpAddr::from([198, 18, word[2], word[3]]),
        src_port: u16::from_be_bytes([word[4], word[5]]),
        dst_port: 443,
        protocol: 6,
    }
}

/// Core 0 of 4.
fn gateway(mode: NatMode, tables: u16, random: &mut Random) -> Option<Nat> {
    let spec = NatSpec {
        out: Some(packet::attachment::InterfaceId(0)),
        mode,
        addresses: vec![IpAddr::from([192, 0, 2, 1])],
        from: vec![],
        from_peers: vec![],
        tenants: vec![],
        of_interface: false,
        mapping: Mapping::EndpointDependent,
        ports: (1024, 65_535),
        port_choice: PortChoice::Random,
        reserved: vec![],
        tables,
        flows_per_client_max: 0,
        ports_per_client: 0,
        assemble_fragments: false,
    };
    let policy = Arc::new(NatPolicy::compile(&[spec], &[], &[], &[]));
    let keys: Vec<[u8; 40]> = (0..64).map(|_| std::array::from_fn(|_| random.word() as u8)).collect();
    let (hasher, solvers) = ReplyPorts::draw(7, 10, keys)?;
    let units = [0, 1, 2, 3].map(|id| Unit { id, weight: 1 });
    let table = BucketTable::new(128, &units).ok()?;
    let mut nat = Nat::new(0, 4, &mut Random::of_number(7));
    nat.follow(&policy, &table, &Arc::new(hasher), &Arc::new(solvers));
    Some(nat)
}

fn bind(nat: &mut Nat, client: FlowKey, random: &mut Random) -> Option<Binding> {
    let request = BindRequest {
        rule: 0,
        client,
        tenant: 0,
        out_tenant: 0,
        random: random.word(),
        home: None,
        next: None,
    };
    nat.bind(0, &request, |_| false).ok()
}

fn measure(name: &str, mode: NatMode, tables: u16, fill: f64) {
    let mut random = Random::of_number(1);
    let Some(mut nat) = gateway(mode, tables, &mut random) else { return };
    // A quarter of the ports of each table and slot is this core's.
    let ports = 64_512.0 * f64::from(tables) * 2.0 / 4.0;
    let wanted = ((ports * fill) as usize).max(1000);
    let mut held: Vec<(FlowKey, Binding)> = Vec::with_capacity(wanted);
    let mut tries = 0;
    while held.len() < wanted && tries < wanted * 2 {
        tries += 1;
        let client = flow(&mut random);
        held.extend(bind(&mut nat, client, &mut random).map(|binding| (client, binding)));
    }
    nat.events().for_each(drop);
    let before = nat.status();
    let (mut failed, began) = (0, Instant::now());
    for round in 0..ROUNDS {
        let place = round.wrapping_mul(7919) % held.len();
        let Some((client, binding)) = held.get_mut(place) else { break };
        release(&mut nat, client, binding);
        let next = flow(&mut random);
        // The full table may not have a port for the new remote; it has one for the old.
        for client_now in [next, *client] {
            if let Some(new) = bind(&mut nat, client_now, &mut random) {
                (*client, *binding) = (client_now, new);
                break;
            }
            failed += 1;
        }
        if round % 8192 == 0 {
            nat.events().for_each(drop);
        }
    }
    let ns = began.elapsed().as_nanos() as f64 / ROUNDS as f64;
    let status = nat.status();
    println!(
        "{name:26} {:5.1} % full, {:8} held: {ns:6.0} ns, {:5.2} words, {} checks, {failed} failed",
        status.ports_held as f64 * 100.0 / ports,
        status.ports_held,
        (status.words_read - before.words_read) as f64 / ROUNDS as f64,
        status.flow_checks - before.flow_checks,
    );
}

fn release(nat: &mut Nat, client: &FlowKey, binding: &Binding) {
    let reply = FlowKey { src: binding.source, src_port: binding.port, ..*client }.reversed();
    let counted = if binding.counted { flags::COUNTED } else { 0 };
    let flags = flags::SOURCE_NAT | counted;
    let record = Record { flags, port_table: binding.table, ..Record::default() };
    nat.release(0, &reply, 0, &record, client, 0);
}
