#![allow(clippy::unwrap_used, reason = "tests")]

use super::testcubic::Cubic;
use super::testlink::*;
use super::*;

#[allow(clippy::print_stdout, reason = "shown with --nocapture")]
fn report(name: &str, sim: &Sim, stats: &Stats, rate: f64) {
    println!(
        "{name}: utilisation {:.2} % queue mean {:.2} ms max {:.1} ms lost {} of {}, jitter {:.2} ms",
        100.0 * stats.rate(sim.now) / rate,
        stats.queue_ms(),
        stats.queue_us_max / 1e3,
        stats.lost,
        stats.packets,
        f64::from(sim.control.jitter_us()) / 1e3,
    );
}

#[test]
fn fixed_links() {
    for (rate, owd_us) in [
        (0.5, 30_000),
        (2.0, 20_000),
        (20.0, 40_000),
        (100.0, 30),
        (100.0, 10_000),
        (100.0, 100_000),
        (50.0, 400_000),
        (1000.0, 5_000),
        (1000.0, 50_000),
    ] {
        let rate_bytes = mbit(rate);
        let mut sim = Sim::new(Spec::new(rate_bytes, owd_us), mbit(10.0));
        sim.run(3 * SECOND + owd_us * 20_000, &mut Greedy);
        let start = sim.link.stats;
        let stats = sim.measure(12_000, &mut Greedy);
        report(&format!("{rate} Mbit/s {owd_us} us (start: lost {} max q {:.0} ms)", start.lost, start.queue_us_max/1e3), &sim, &stats, rate_bytes);
    }
}

#[test]
#[allow(clippy::print_stdout, reason = "x")]
fn cold_start_10g() {
    for noise in [false, true] {
        let mut spec = Spec::new(mbit(10_000.0), 25);
        if noise { spec.receiver = Stalls::new(20_000.0, 5_000.0, 7); }
        let mut sim = Sim::new(spec, mbit(10.0));
        if noise { sim.sender = Stalls::new(20_000.0, 5_000.0, 9); }
        let mut reached = None;
        while sim.now < 2 * SECOND {
            sim.run(sim.now + 20*MS, &mut Greedy);
            if reached.is_none() && sim.control.rate() as f64 > mbit(5_000.0) { reached = Some(sim.now / MS); }
        }
        let stats = sim.measure(2000, &mut Greedy);
        report(&format!("10G noise {noise} reached {reached:?}"), &sim, &stats, mbit(10_000.0));
    }
}

#[test]
#[allow(clippy::print_stdout, reason = "x")]
fn capacity_steps() {
    for owd in [100, 5_000, 20_000, 100_000] {
        let mut spec = Spec::new(mbit(100.0), owd);
        spec.rate = vec![(0, mbit(100.0)), (5 * SECOND, mbit(20.0)), (10 * SECOND, mbit(100.0))];
        let mut sim = Sim::new(spec, mbit(10.0));
        sim.run(5 * SECOND, &mut Greedy);
        sim.link.restart_stats(sim.now);
        let mut down = None;
        let mut drained = None;
        while sim.now < 10 * SECOND {
            let at = sim.now;
            let s = sim.measure(10, &mut Greedy);
            if down.is_none() && sim.control.rate() as f64 <= mbit(21.0) { down = Some((at - 5*SECOND)/MS); }
            if down.is_some() && drained.is_none() && s.packets > 0 && s.queue_ms() < 6.0 { drained = Some((at - 5*SECOND)/MS); }
        }
        let mut up = None;
        while sim.now < 15 * SECOND {
            sim.run(sim.now + 10*MS, &mut Greedy);
            if up.is_none() && sim.control.rate() as f64 >= mbit(95.0) { up = Some(sim.now / MS - 10_000); }
        }
        println!("owd {owd}: down {down:?} drained {drained:?} up {up:?}");
    }
}

#[test]
fn noisy_links() {
    for (rate, owd, noise) in [
        (100.0, 10_000, Noise::Uniform(10_000.0)),
        (100.0, 10_000, Noise::Exponential(3_000.0)),
        (100.0, 30_000, Noise::Exponential(8_000.0)),
        (100.0, 30_000, Noise::Gauss(5_000.0)),
        (20.0, 30_000, Noise::Gauss(10_000.0)),
        (300.0, 30_000, Noise::Uniform(30_000.0)),
        (100.0, 30_000, Noise::Radio(3_000.0)),
        (50.0, 30_000, Noise::Radio(10_000.0)),
    ] {
        let mut spec = Spec::new(mbit(rate), owd);
        spec.noise = noise;
        let mut sim = Sim::new(spec, mbit(10.0));
        sim.run(4 * SECOND, &mut Greedy);
        let stats = sim.measure(20_000, &mut Greedy);
        report(&format!("{rate} {owd} {noise:?}"), &sim, &stats, mbit(rate));
    }
}

#[test]
fn random_loss() {
    for (rate, loss) in [(100.0, 0.001), (100.0, 0.01), (100.0, 0.05), (100.0, 0.15), (20.0, 0.02)] {
        let mut spec = Spec::new(mbit(rate), 20_000);
        spec.loss = loss;
        let mut sim = Sim::new(spec, mbit(10.0));
        sim.run(4 * SECOND, &mut Greedy);
        let stats = sim.measure(20_000, &mut Greedy);
        report(&format!("{rate} loss {loss}"), &sim, &stats, mbit(rate) * (1.0 - loss));
    }
}

#[test]
fn shallow_buffers() {
    for (rate, owd, queue) in [(100.0, 10_000, 1_000), (100.0, 10_000, 3_000), (1000.0, 2_000, 2_000)] {
        let mut spec = Spec::new(mbit(rate), owd);
        spec.queue_us = queue;
        let mut sim = Sim::new(spec, mbit(10.0));
        sim.burst = 8;
        sim.run(4 * SECOND, &mut Greedy);
        let stats = sim.measure(20_000, &mut Greedy);
        report(&format!("{rate} shallow {queue}"), &sim, &stats, mbit(rate));
    }
}

#[test]
fn stalls_and_late_reports() {
    for (rate, owd, every, upto) in [(100.0, 10_000, 20_000.0, 5_000.0), (1000.0, 1_000, 10_000.0, 5_000.0), (3000.0, 50, 10_000.0, 5_000.0), (3000.0, 50, 30_000.0, 20_000.0), (100.0, 20_000, 200_000.0, 50_000.0), (100.0, 20_000, 1_000_000.0, 300_000.0)] {
        let mut spec = Spec::new(mbit(rate), owd);
        spec.receiver = Stalls::new(every, upto, 3);
        let mut sim = Sim::new(spec, mbit(10.0));
        sim.sender = Stalls::new(every, upto, 4);
        sim.report_loss = 0.1;
        sim.report_late_us = 10_000.0;
        sim.run(4 * SECOND, &mut Greedy);
        let stats = sim.measure(20_000, &mut Greedy);
        report(&format!("{rate} stalls every {every} up to {upto}"), &sim, &stats, mbit(rate));
    }
}

#[test]
fn route_change() {
    let mut spec = Spec::new(mbit(100.0), 20_000);
    spec.owd_us = vec![(0, 20_000), (8 * SECOND, 50_000), (16 * SECOND, 20_000)];
    let mut sim = Sim::new(spec, mbit(10.0));
    sim.run(4 * SECOND, &mut Greedy);
    for _ in 0..9 {
        let stats = sim.measure(2_000, &mut Greedy);
        report(&format!("route at {}", sim.now / SECOND), &sim, &stats, mbit(100.0));
    }
}

#[test]
#[allow(clippy::print_stdout, reason = "x")]
fn bursty_sources() {
    for (rate, burst, on_off) in [(30.0, 1, (0,0)), (30.0, 43, (0,0)), (80.0, 43, (0,0)), (200.0, 10, (300 * MS, 700 * MS)), (200.0, 10, (2000 * MS, 2000 * MS))] {
        let mut sim = Sim::new(Spec::new(mbit(100.0), 20_000), mbit(10.0));
        let mut source = Bursts { rate: mbit(rate), burst, on_off: on_off, due: 0, backlog: 0 };
        sim.run(5 * SECOND, &mut source);
        let stats = sim.measure(20_000, &mut source);
        report(&format!("source {rate} x {burst} {on_off:?} rate {} ", sim.control.rate() / 125_000), &sim, &stats, mbit(100.0));
        let mut sim2 = sim;
        let stats = sim2.measure(3_000, &mut Greedy);
        report("  then greedy", &sim2, &stats, mbit(100.0));
    }
}

#[test]
fn one() {
    let mut spec = Spec::new(mbit(100.0), 10_000);
    match std::env::var("ONE").unwrap_or_default().as_str() {
        "exp" => spec.noise = Noise::Exponential(3_000.0),
        "gauss" => spec.noise = Noise::Gauss(5_000.0),
        "uni" => spec.noise = Noise::Uniform(30_000.0),
        "drop" => { spec = Spec::new(mbit(100.0), 100); spec.rate = vec![(0, mbit(100.0)), (5 * SECOND, mbit(20.0)), (10 * SECOND, mbit(100.0))];}
        "loss" => spec.loss = 0.15,
        "exp8" => { spec = Spec::new(mbit(100.0), 30_000); spec.noise = Noise::Exponential(8_000.0);}
        "shallow" => spec.queue_us = 1_000,
        _ => return,
    }
    let mut sim = Sim::new(spec, mbit(10.0));
    sim.run(12 * SECOND, &mut Greedy);
}

#[test]
#[allow(clippy::print_stdout, reason = "x")]
fn cubic_inside() {
    for (rate, owd) in [(100.0, 500), (100.0, 10_000), (100.0, 40_000), (20.0, 20_000), (170.0, 20_000), (170.0, 27_000), (400.0, 20_000), (1000.0, 5_000)] {
      for (target, interval) in [(10_000, 100_000), (20_000, 100_000), (20_000, 200_000), (25_000, 100_000), (25_000,150_000), (25_000, 200_000)] {
        let mut sim = Sim::new(Spec::new(mbit(rate), owd), mbit(10.0));
        let mut source = Cubic::new(2 * owd * 1_000, target, interval);
        sim.run(8 * SECOND, &mut source);
        (source.waited_ms, source.sent, source.losses) = (0.0, 0, 0);
        let stats = sim.measure(40_000, &mut source);
        report(&format!("cubic {rate} {owd} target {target} {interval} wait {:.1} ms losses {}", source.waited_ms / source.sent as f64, source.losses), &sim, &stats, mbit(rate));
      }
    }
}

#[test]
#[allow(clippy::print_stdout, reason = "x")]
fn host_is_the_limit() {
    for (offered, every, upto) in [(3000.0, 10_000.0, 5_000.0), (3000.0, 5_000.0, 2_000.0), (300.0, 30_000.0, 20_000.0), (8000.0, 20_000.0, 5_000.0)] {
        let mut spec = Spec::new(mbit(100_000.0), 50);
        spec.receiver = Stalls::new(every, upto, 3);
        let mut sim = Sim::new(spec, mbit(10.0));
        sim.sender = Stalls::new(every, upto, 4);
        let mut source = Bursts { rate: mbit(offered), burst: 43, on_off: (0, 0), due: 0, backlog: 0 };
        let mut least = f64::INFINITY;
        sim.run(2 * SECOND, &mut source);
        let mut delivered = 0;
        for _ in 0..1000 {
            let s = sim.measure(10, &mut source);
            delivered += s.bytes;
            least = least.min(sim.control.rate() as f64 / 125_000.0);
        }
        println!("offered {offered} every {every} up to {upto}: least rate {least:.0} delivered {:.2} %, backlog {}", delivered as f64 / 10.0 / mbit(offered) * 100.0, source.backlog);
    }
}
