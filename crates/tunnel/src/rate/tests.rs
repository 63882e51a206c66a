//! Closed loops in virtual time. Run one with `--nocapture` to see its numbers, with `RATE_TRACE=1` for every report.
#![allow(clippy::unwrap_used, reason = "tests")]

use super::testcubic::Cubic;
use super::testlink::*;
use super::*;

/// Share of `rate` (bytes per second) that arrived while `stats` were taken.
fn share(sim: &Sim, stats: &Stats, rate: f64) -> f64 {
    stats.rate(sim.now) / rate
}

#[allow(clippy::print_stdout, reason = "shown with --nocapture")]
fn show(name: &str, sim: &Sim, stats: &Stats, rate: f64) {
    println!(
        "{name}: {:.2} %, queue {:.2} ms (max {:.1}), lost {} of {}, jitter {:.2} ms",
        100.0 * share(sim, stats, rate),
        stats.queue_ms(),
        stats.queue_us_max / 1e3,
        stats.lost,
        stats.packets,
        f64::from(sim.control.jitter_us()) / 1e3,
    );
}

/// Any rate and delay: at least 97 % with at most 5 ms of standing queue (3 packets on the slowest links).
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
        (1_000.0, 5_000),
        (1_000.0, 50_000),
    ] {
        let link = mbit(rate);
        let mut sim = Sim::new(Spec::new(link, owd_us), mbit(10.0));
        sim.run(3 * SECOND + owd_us * 20_000, &mut Greedy);
        let stats = sim.measure(12_000, &mut Greedy);
        show(&format!("{rate} Mbit/s, {owd_us} us"), &sim, &stats, link);
        assert!(share(&sim, &stats, link) > 0.97, "{rate} Mbit/s, {owd_us} us");
        let packet_ms = f64::from(MTU) / link * 1e3;
        assert!(stats.queue_ms() < 5.0f64.max(4.0 * packet_ms), "{rate}, {owd_us}: {}", stats.queue_ms());
        assert!(stats.lost * 100 <= stats.packets);
    }
}

/// 10 Gbit/s over 50 µs of round trip: more than 5 Gbit/s after 300 ms from 10 Mbit/s, also on a host that stalls.
#[test]
fn cold_start_10_gbit() {
    for stalls in [false, true] {
        let link = mbit(10_000.0);
        let mut spec = Spec::new(link, 25);
        if stalls {
            spec.receiver = Stalls::new(20_000.0, 5_000.0, 7);
        }
        let mut sim = Sim::new(spec, mbit(10.0));
        if stalls {
            sim.sender = Stalls::new(20_000.0, 5_000.0, 9);
        }
        sim.run(300 * MS, &mut Greedy);
        assert!(sim.control.rate() as f64 > mbit(5_000.0), "{}", sim.control.rate());
        sim.run(SECOND, &mut Greedy);
        let stats = sim.measure(1_000, &mut Greedy);
        show(&format!("10 Gbit/s, stalls {stalls}"), &sim, &stats, link);
        assert!(share(&sim, &stats, link) > if stalls { 0.94 } else { 0.99 });
    }
}

/// 100 → 20 Mbit/s is followed within 200 ms and a round trip; 20 → 100 within 2 s (2.5 s at 200 ms of round trip).
#[test]
#[allow(clippy::print_stdout, reason = "shown with --nocapture")]
fn capacity_steps() {
    for owd_us in [100, 5_000, 20_000, 100_000] {
        let mut spec = Spec::new(mbit(100.0), owd_us);
        spec.rate = vec![(0, mbit(100.0)), (5 * SECOND, mbit(20.0)), (10 * SECOND, mbit(100.0))];
        let mut sim = Sim::new(spec, mbit(10.0));
        let rtt_ms = 2 * owd_us / 1_000;
        sim.run(5 * SECOND + (200 + rtt_ms) * MS, &mut Greedy);
        let down = sim.control.rate() as f64;
        assert!(down < mbit(21.0), "{owd_us}: {}", down / mbit(1.0));
        sim.run(6 * SECOND, &mut Greedy);
        let stats = sim.measure(4_000, &mut Greedy);
        show(&format!("{owd_us} us, after the drop"), &sim, &stats, mbit(20.0));
        assert!(share(&sim, &stats, mbit(20.0)) > 0.97 && stats.queue_ms() < 5.0);
        while (sim.control.rate() as f64) < mbit(95.0) && sim.now < 15 * SECOND {
            sim.run(sim.now + 10 * MS, &mut Greedy);
        }
        println!("{owd_us} us: up after {} ms", sim.now / MS - 10_000);
        assert!(sim.now < 12 * SECOND + 3 * rtt_ms * MS, "{owd_us}: up after {}", sim.now / MS - 10_000);
    }
}

/// Jitter of many kinds, FIFO per path: no collapse, no bufferbloat.
#[test]
fn noisy_links() {
    for (rate, owd_us, noise, least, queue_ms) in [
        (100.0, 10_000, Noise::Uniform(10_000.0), 0.96, 10.0),
        (100.0, 10_000, Noise::Exponential(3_000.0), 0.93, 12.0),
        (100.0, 30_000, Noise::Gauss(5_000.0), 0.93, 10.0),
        (20.0, 30_000, Noise::Gauss(10_000.0), 0.86, 16.0),
        (300.0, 30_000, Noise::Uniform(30_000.0), 0.96, 10.0),
        (100.0, 30_000, Noise::Radio(3_000.0), 0.95, 14.0),
        (50.0, 30_000, Noise::Radio(10_000.0), 0.78, 30.0),
    ] {
        let mut sum = 0.0;
        for seed in 1..4 {
            let mut spec = Spec::new(mbit(rate), owd_us);
            (spec.noise, spec.seed) = (noise, seed);
            let mut sim = Sim::new(spec, mbit(10.0));
            sim.run(4 * SECOND, &mut Greedy);
            let stats = sim.measure(15_000, &mut Greedy);
            show(&format!("{rate} Mbit/s, {noise:?}, seed {seed}"), &sim, &stats, mbit(rate));
            // A single run's share moves by two or three percent with every change of the law.
            assert!(share(&sim, &stats, mbit(rate)) > least - 0.03, "{rate} {noise:?}");
            assert!(stats.queue_ms() < queue_ms, "{rate} {noise:?}: {}", stats.queue_ms());
            sum += share(&sim, &stats, mbit(rate));
        }
        assert!(sum / 3.0 > least, "{rate} {noise:?}: {}", sum / 3.0);
    }
}

/// Loss that has nothing to do with the rate does not slow.
#[test]
fn random_loss() {
    for (rate, loss) in [(100.0, 0.001), (100.0, 0.01), (100.0, 0.05), (100.0, 0.15), (20.0, 0.02)] {
        let mut spec = Spec::new(mbit(rate), 20_000);
        spec.loss = loss;
        let mut sim = Sim::new(spec, mbit(10.0));
        sim.run(4 * SECOND, &mut Greedy);
        let stats = sim.measure(15_000, &mut Greedy);
        show(&format!("{rate} Mbit/s, loss {loss}"), &sim, &stats, mbit(rate) * (1.0 - loss));
        assert!(share(&sim, &stats, mbit(rate) * (1.0 - loss)) > 0.96, "{rate} {loss}");
        assert!(stats.queue_ms() < 12.0);
    }
}

/// Buffers too short to show a delay: the loss itself is kept small.
#[test]
fn short_buffers() {
    for (rate, owd_us, queue_us) in [(100.0, 10_000, 1_000), (100.0, 10_000, 3_000), (1_000.0, 2_000, 2_000)]
    {
        let mut spec = Spec::new(mbit(rate), owd_us);
        spec.queue_us = queue_us;
        let mut sim = Sim::new(spec, mbit(10.0));
        sim.burst = 8;
        sim.run(4 * SECOND, &mut Greedy);
        let stats = sim.measure(15_000, &mut Greedy);
        show(&format!("{rate} Mbit/s, {queue_us} us of buffer"), &sim, &stats, mbit(rate));
        assert!(share(&sim, &stats, mbit(rate)) > 0.95);
        assert!((stats.lost as f64) < 0.03 * stats.packets as f64, "{}", stats.lost);
    }
}

/// Both hosts stall, reports are late and some are lost.
#[test]
fn stalls_and_late_reports() {
    for (rate, owd_us, every_us, up_to_us, least) in [
        (100.0, 10_000, 20_000.0, 5_000.0, 0.95),
        (1_000.0, 1_000, 10_000.0, 5_000.0, 0.92),
        (3_000.0, 50, 10_000.0, 5_000.0, 0.92),
        // Both together are away 30–40 % of the time …
        (3_000.0, 50, 30_000.0, 20_000.0, 0.78),
        // … or for longer than any queue lasts.
        (100.0, 20_000, 200_000.0, 50_000.0, 0.85),
        (100.0, 20_000, 1_000_000.0, 300_000.0, 0.82),
    ] {
        let mut spec = Spec::new(mbit(rate), owd_us);
        spec.receiver = Stalls::new(every_us, up_to_us, 3);
        let mut sim = Sim::new(spec, mbit(10.0));
        sim.sender = Stalls::new(every_us, up_to_us, 4);
        (sim.report_loss, sim.report_late_us) = (0.1, 10_000.0);
        sim.run(4 * SECOND, &mut Greedy);
        let stats = sim.measure(12_000, &mut Greedy);
        show(&format!("{rate} Mbit/s, stalls of {up_to_us} us each {every_us}"), &sim, &stats, mbit(rate));
        assert!(share(&sim, &stats, mbit(rate)) > least, "{rate} {up_to_us}");
        assert!(stats.queue_ms() < 12.0, "{rate} {up_to_us}: {}", stats.queue_ms());
    }
}

/// Nothing but the hosts limits: stalls must never bring the rate near what is offered.
#[test]
fn the_host_is_the_limit() {
    for (offered, every_us, up_to_us) in
        [(3_000.0, 10_000.0, 5_000.0), (3_000.0, 5_000.0, 2_000.0), (300.0, 30_000.0, 20_000.0)]
    {
        let mut spec = Spec::new(mbit(100_000.0), 50);
        spec.receiver = Stalls::new(every_us, up_to_us, 3);
        let mut sim = Sim::new(spec, mbit(10.0));
        sim.sender = Stalls::new(every_us, up_to_us, 4);
        let mut source = Bursts::new(mbit(offered), 43);
        sim.run(2 * SECOND, &mut source);
        let mut bytes = 0;
        for _ in 0..400 {
            bytes += sim.measure(10, &mut source).bytes;
            assert!(sim.control.rate() as f64 > 1.5 * mbit(offered), "{offered}: {}", sim.control.rate());
        }
        assert!(bytes as f64 > 0.99 * 4.0 * mbit(offered), "{offered}: {bytes}");
    }
}

/// Rate that was found: it stays while a source sends next to nothing, between hosts that are busy with something else.
fn keeps_its_rate(found: impl Fn() -> Sim) {
    for (trickle, burst) in [(2.0, 13), (20.0, 30), (0.5, 1)] {
        let mut sim = found();
        let found = sim.control.rate();
        sim.link.spec.receiver = Stalls::new(30_000.0, 20_000.0, 3);
        sim.sender = Stalls::new(30_000.0, 20_000.0, 4);
        let mut source = Bursts::new(mbit(trickle), burst);
        for _ in 0..800 {
            sim.measure(10, &mut source);
            assert!(sim.control.rate() > found / 2, "{trickle}: {} of {found}", sim.control.rate());
            assert!(sim.control.capacity() > found / 2, "{trickle}: {} of {found}", sim.control.capacity());
        }
    }
}

#[test]
fn a_trickle_between_busy_hosts() {
    keeps_its_rate(|| {
        let mut sim = Sim::new(Spec::new(mbit(3_000.0), 50), mbit(10.0));
        sim.run(4 * SECOND, &mut Greedy);
        sim
    });
}

/// The same while nothing has shown the limit yet.
#[test]
fn a_trickle_before_any_limit() {
    keeps_its_rate(|| {
        let mut sim = Sim::new(Spec::new(mbit(100_000.0), 50), mbit(10.0));
        sim.run(2 * SECOND, &mut Bursts::new(mbit(3_000.0), 43));
        assert_eq!(sim.control.phase(), Phase::Startup);
        sim
    });
}

/// A slow link that a source fills before the start rate is reached: long before it drops anything.
#[test]
fn a_slow_link_below_the_start_rate() {
    for (rate, offered) in [(0.5, 2.0), (1.0, 3.0), (0.064, 1.0)] {
        let mut spec = Spec::new(mbit(rate), 20_000);
        spec.queue_us = 4_000_000;
        let mut sim = Sim::new(spec, mbit(20.0));
        sim.run(3 * SECOND, &mut Bursts::new(mbit(offered), 1));
        let found = sim.control.rate() as f64;
        assert!(found < 1.5 * mbit(rate), "{rate}: {found}");
        let mut sim = Sim::new(sim.link.spec.clone(), mbit(20.0));
        sim.run(8 * SECOND, &mut Greedy);
        let found = sim.control.rate() as f64;
        assert!(found < 1.5 * mbit(rate), "{rate}, greedy: {found}");
    }
}

/// A source that does not fill the link, and a link that takes even less from one moment on.
#[test]
fn a_link_that_chokes_a_trickle() {
    let mut spec = Spec::new(mbit(100.0), 20_000);
    spec.rate = vec![(0, mbit(100.0)), (4 * SECOND, mbit(5.0))];
    spec.queue_us = 2_000_000;
    let mut sim = Sim::new(spec, mbit(10.0));
    sim.run(3 * SECOND, &mut Greedy);
    let mut source = Bursts::new(mbit(20.0), 1);
    sim.run(4_500 * MS, &mut source);
    let stats = sim.measure(3_000, &mut source);
    assert!(stats.queue_ms() < 150.0, "{}", stats.queue_ms());
    assert!((sim.control.rate() as f64) < mbit(6.0));
}

/// A delay that was measured too low for a moment makes all later ones look like a queue; the rate grows all the same.
#[test]
fn a_base_delay_that_is_too_low() {
    // Some three milliseconds of it hide behind the standing queue.
    for low_us in [3_500, 4_500, 5_500, 6_500] {
        let mut spec = Spec::new(mbit(100.0), 20_000);
        spec.owd_us = vec![(0, 20_000), (3 * SECOND, 20_000 - low_us), (3_200 * MS, 20_000)];
        spec.rate = vec![(0, mbit(100.0)), (3_300 * MS, mbit(400.0))];
        let mut sim = Sim::new(spec, mbit(10.0));
        // A sender that is always a little late sends less than it may.
        sim.sender = Stalls::new(1_000.0, 200.0, 4);
        sim.run(6_500 * MS, &mut Greedy);
        let stats = sim.measure(1_000, &mut Greedy);
        show(&format!("base {low_us} us too low"), &sim, &stats, mbit(400.0));
        assert!(share(&sim, &stats, mbit(400.0)) > 0.9, "{low_us}");
    }
}

/// A longer route is not taken for a queue, a shorter one is noticed.
#[test]
fn route_changes() {
    let mut spec = Spec::new(mbit(100.0), 20_000);
    spec.owd_us = vec![(0, 20_000), (8 * SECOND, 50_000), (16 * SECOND, 20_000)];
    let mut sim = Sim::new(spec, mbit(10.0));
    sim.run(4 * SECOND, &mut Greedy);
    for _ in 0..10 {
        let stats = sim.measure(2_000, &mut Greedy);
        show(&format!("until {} s", sim.now / SECOND), &sim, &stats, mbit(100.0));
        assert!(share(&sim, &stats, mbit(100.0)) > 0.94);
        assert!(stats.queue_ms() < 8.0);
    }
}

/// A source that sends less than the link takes, in bursts or with pauses, is not slowed, and a greedy one after it
/// finds a sensible rate.
#[test]
fn sources_that_do_not_fill_the_link() {
    for (rate, burst, on_ms, off_ms) in [
        (30.0, 1, 0, 0),
        (30.0, 43, 0, 0),
        (80.0, 43, 0, 0),
        (200.0, 10, 300, 700),
        (200.0, 10, 2_000, 2_000),
    ] {
        let mut sim = Sim::new(Spec::new(mbit(100.0), 20_000), mbit(10.0));
        let mut source = Bursts { on_off: (on_ms * MS, off_ms * MS), ..Bursts::new(mbit(rate), burst) };
        sim.run(5 * SECOND, &mut source);
        let stats = sim.measure(8_000, &mut source);
        show(&format!("{rate} Mbit/s x {burst}, {on_ms}/{off_ms} ms"), &sim, &stats, mbit(100.0));
        let offered = if on_ms == 0 { rate } else { rate * on_ms as f64 / (on_ms + off_ms) as f64 };
        assert!(share(&sim, &stats, mbit(100.0)) > 0.95 * (offered / 100.0).min(0.8));
        assert!(stats.queue_ms() < 6.0);
        let stats = sim.measure(3_000, &mut Greedy);
        show("    then greedy", &sim, &stats, mbit(100.0));
        assert!(share(&sim, &stats, mbit(100.0)) > 0.97);
        assert!(stats.queue_ms() < 15.0 && stats.lost == 0);
    }
}

/// CUBIC inside: its queue is in our FQ-CoDel and not in the link, and it uses the link.
#[test]
fn cubic_inside() {
    for (rate, owd_us) in
        [(20.0, 20_000), (100.0, 500), (100.0, 10_000), (100.0, 40_000), (170.0, 27_000), (1_000.0, 5_000)]
    {
        let mut sim = Sim::new(Spec::new(mbit(rate), owd_us), mbit(10.0));
        let mut source = Cubic::new(2 * owd_us * 1_000, crate::queue::TARGET_US, crate::queue::INTERVAL_US);
        sim.run(8 * SECOND, &mut source);
        let seconds = if rate > 500.0 { 8_000 } else { 30_000 };
        let stats = sim.measure(seconds, &mut source);
        let waited_ms = source.waited_ms / source.sent as f64;
        show(&format!("CUBIC {rate} Mbit/s {owd_us} us, waits {waited_ms:.1} ms"), &sim, &stats, mbit(rate));
        assert!(share(&sim, &stats, mbit(rate)) > 0.98, "{rate} {owd_us}");
        assert!(stats.queue_ms() < 5.0 && stats.lost == 0, "{rate} {owd_us}: {}", stats.queue_ms());
    }
}

/// Two cores of the peer report in turn, the second one on a tenth of the packets.
#[test]
fn reports_of_two_lanes() {
    for (rate, owd_us) in [(100.0, 10_000), (1_000.0, 1_000), (20.0, 40_000)] {
        let mut sim = Sim::new(Spec::new(mbit(rate), owd_us), mbit(10.0));
        sim.link.lanes = 2;
        sim.run(4 * SECOND, &mut Greedy);
        let stats = sim.measure(10_000, &mut Greedy);
        show(&format!("two lanes, {rate} Mbit/s"), &sim, &stats, mbit(rate));
        assert!(share(&sim, &stats, mbit(rate)) > 0.97);
        assert!(stats.queue_ms() < 8.0, "{}", stats.queue_ms());
    }
}

#[test]
fn limits_hold() {
    let mut control = RateController::new(1_000_000, 50_000, Some(2_000_000));
    let sample = |now_ms: u64, bytes: u64, owd_us: i64| Sample {
        now: Time::from_ms(now_ms),
        delivered_bytes: bytes,
        interval_us: 20_000,
        owd_us,
        rtt_us: 1_000,
        lost: 0,
        received: 30,
        limited: true,
    };
    for n in 1..50 {
        control.on_sample(&sample(20 * n, control.rate() / 50, 500));
        assert!(control.rate() <= 2_000_000);
    }
    assert_eq!(control.rate(), 2_000_000);
    control.set_max(Some(1_500_000));
    assert_eq!(control.rate(), 1_500_000);
    control.set_max(Some(1));
    assert_eq!(control.rate(), 50_000, "the minimum wins");
    // A link that delivers nothing but a trickle: never below the minimum.
    control.set_max(None);
    for n in 50..200 {
        control.on_sample(&sample(20 * n, 10, 500 + 20_000 * n as i64));
        assert!(control.rate() >= 50_000);
    }
}

#[test]
fn a_return_starts_with_half() {
    let mut sim = Sim::new(Spec::new(mbit(100.0), 10_000), mbit(10.0));
    sim.run(3 * SECOND, &mut Greedy);
    assert!(sim.control.rate() as f64 > mbit(90.0));
    sim.control.restart(Time::from_ns(sim.now));
    assert_eq!(sim.control.phase(), Phase::Startup);
    let half = sim.control.rate() as f64;
    assert!((mbit(45.0)..mbit(55.0)).contains(&half));
    let stats = sim.measure(2_000, &mut Greedy);
    assert!(share(&sim, &stats, mbit(100.0)) > 0.95);
}

/// A link that is known to be slow is not flooded when it comes back, also when its full queue hides the base delay.
#[test]
fn a_slow_link_returns() {
    let mut spec = Spec::new(mbit(0.064), 20_000);
    spec.queue_us = 1_000_000;
    let mut sim = Sim::new(spec, mbit(20.0));
    sim.run(10 * SECOND, &mut Greedy);
    for _ in 0..3 {
        sim.control.restart(Time::from_ns(sim.now));
        assert!((sim.control.rate() as f64) < mbit(0.1), "{}", sim.control.rate());
        let stats = sim.measure(6_000, &mut Greedy);
        assert!(stats.lost < 60, "{} packets lost, {} bytes came", stats.lost, stats.bytes);
    }
}

/// Most of what is sent is lost and the rest comes now and then: no pauses of the source.
#[test]
fn a_flooded_slow_link_is_noticed() {
    let mut control = RateController::new(2_500_000, 2_000, None);
    for n in 1..20 {
        control.on_sample(&Sample {
            now: Time::from_ms(500 * n),
            delivered_bytes: 4 * 1_500,
            interval_us: 500_000,
            owd_us: 1_000_000,
            rtt_us: 1_020_000,
            lost: 10,
            received: 4,
            limited: n % 4 == 0,
        });
    }
    assert!(control.rate() < 30_000, "{}", control.rate());
}

proptest::proptest! {
    /// Whatever a peer reports: no panic, and the rate stays within its limits.
    #[test]
    fn any_reports(samples in proptest::collection::vec(
        (0u64..1 << 40, 0u64..u64::MAX, 0u64..1 << 33, proptest::num::i64::ANY,
         proptest::num::u32::ANY, proptest::num::u32::ANY, proptest::num::u32::ANY, proptest::bool::ANY), 1..80)) {
        let mut control = RateController::new(10_000, 1_000, Some(1 << 40));
        let mut now = Time::ZERO;
        for (step, delivered_bytes, interval_us, owd_us, rtt_us, lost, received, limited) in samples {
            now = now.plus_ns(step);
            control.on_sample(&Sample { now, delivered_bytes, interval_us, owd_us, rtt_us, lost, received, limited });
            proptest::prop_assert!((1_000..=1 << 40).contains(&control.rate()));
            let _ = (control.delay_us(), control.queue_delay_us(), control.jitter_us(), control.loss_ratio());
        }
    }
}
