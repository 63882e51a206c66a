#![allow(clippy::unwrap_used, reason = "tests")]

use super::testbond::*;
use super::*;
use crate::rate::testlink::*;

fn at(sorted: &[u64], share: f64) -> f64 {
    sorted[((sorted.len() - 1) as f64 * share) as usize] as f64 / 1e6
}

#[test]
#[allow(clippy::print_stdout, reason = "x")]
fn three_links() {
    for (name, noise, loss) in [("clean", Noise::None, 0.0), ("loss", Noise::None, 0.001), ("radio", Noise::Radio(2_000.0), 0.0)] {
        let mut specs = vec![Spec::new(mbit(100.0), 10_000), Spec::new(mbit(50.0), 20_000), Spec::new(mbit(20.0), 40_000)];
        for s in &mut specs { s.noise = noise; s.loss = loss; }
        let mut bond = Bond::new(specs, mbit(10.0));
        bond.greedy = vec![1];
        bond.ping = Some((9, 20 * MS, 0));
        for _ in 0..3 { 
        bond.run(bond.now + 3 * SECOND);
        let rate = bond.measure(5_000);
        let waits = bond.waits(1);
        let mut pings: Vec<u64> = bond.arrivals.iter().filter(|a| a.flow == 9).map(|a| a.at - a.born).collect();
        pings.sort_unstable();
        println!("{name}: {:.2} % of 170; waits mean {:.2} p50 {:.2} p99 {:.2} max {:.2} ms; ping p50 {:.1} p99 {:.1} max {:.1}; shares {:?} q {:?} choices {}",
            rate / mbit(170.0) * 100.0,
            waits.iter().sum::<u64>() as f64 / waits.len() as f64 / 1e6,
            at(&waits, 0.5), at(&waits, 0.99), at(&waits, 1.0),
            at(&pings, 0.5), at(&pings, 0.99), at(&pings, 1.0),
            bond.paths.iter().map(|p| (p.link.stats.rate(bond.now) / 1250.0).round() / 100.0).collect::<Vec<_>>(),
            bond.paths.iter().map(|p| (p.link.stats.queue_ms()* 100.0).round() / 100.0).collect::<Vec<_>>(),
            bond.choices);
        }
    }
}
