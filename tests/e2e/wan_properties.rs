//! Worth of a WAN: direction, limits, quota, schedule (row T12). Cost is in `classes.rs`, tier in `paths.rs`.

use std::path::Path;

use linux::clock::{local_time, realtime_ns};
use testbed::emulator::Way;
use testbed::topology::{LinkSpec, Node, Site};

use crate::gateway_scene::shell;
use crate::machine::isolated;
use crate::scene::*;

/// A branch with both WANs, the second with more lines, and a hub that knows nothing of it.
struct Two {
    scene: Scene,
    text: String,
    branch: Gateway,
    hub: Gateway,
}

impl Two {
    fn new(links: &[LinkSpec], lines: &str) -> Self {
        let scene = Scene::new(links);
        let (branch, hub) = scene.pair();
        let text = branch.text(&scene.directory);
        let hub = scene.start(scene.b(), &hub);
        let branch = Gateway::start(scene.a(), &scene.directory, "branch", &with(&text, lines));
        Self { scene, text, branch, hub }
    }

    fn join(&mut self) {
        for gateway in [&mut self.branch, &mut self.hub] {
            gateway.wait("two paths", PATIENCE, |report| {
                let paths = report.status.peers[0].paths.iter();
                let joined = paths.filter(|path| matches!(path.state.as_str(), "up" | "standby"));
                joined.map(|path| &path.remote).collect::<std::collections::BTreeSet<_>>().len() == 2
            });
        }
    }

    /// Bytes that the branch and the hub have sent over the second link.
    fn second(&self) -> (u64, u64) {
        let address = self.scene.testbed.addresses(Site::A, 1).ipv4.unwrap().to_string();
        let sent = |gateway: &Gateway| -> u64 {
            let paths = peer(gateway).paths.into_iter();
            let second = paths.filter(|path| path.wan == "wan1" || path.remote.contains(&address));
            second.map(|path| path.tx_bytes).sum()
        };
        (sent(&self.branch), sent(&self.hub))
    }

    /// Bytes that an upload and then a download of two seconds each send over the second link.
    fn transfers(&self) -> (u64, u64) {
        let (a, b) = (self.scene.a(), self.scene.b());
        let before = self.second();
        tcp_seconds(a, b, HUB_IP, 2, 2.0);
        tcp_seconds(b, a, BRANCH_IP, 2, 2.0);
        let after = self.second();
        (after.0 - before.0, after.1 - before.1)
    }

    fn reload(&self, lines: &str) {
        std::fs::write(&self.branch.config, with(&self.text, lines)).unwrap();
        assert_eq!(self.branch.command(&["reload"]).0, 0, "{}", self.branch.log());
    }
}

fn with(text: &str, lines: &str) -> String {
    text.replace("interface = \"wan1\"", &format!("interface = \"wan1\"\n{lines}"))
}

/// Bytes below which a link carried keepalives, reports and acknowledgements at most, and above which it carried data.
const IDLE: u64 = 100_000;
const BUSY: u64 = 500_000;

/// Row T12: a WAN carries data in one direction only, and both sides keep to it; live.
#[test]
fn t12_a_wan_has_a_direction() {
    isolated(|| {
        let mut two = Two::new(&[link(20.0, 10.0), link(20.0, 10.0)], "direction = \"receive\"");
        two.join();
        let (up, down) = two.transfers();
        assert!(up < IDLE && down > BUSY, "receive: up {up}, down {down}");
        two.reload("direction = \"send\"");
        wait_for("the hub knows", PATIENCE, || {
            let report = two.hub.status().unwrap();
            report.status.peers[0].paths.iter().any(|path| path.state == "standby")
        });
        wait_for("the branch sends", PATIENCE, || paths_up(&two.branch.status().unwrap()) == 2);
        let (up, down) = two.transfers();
        assert!(up > BUSY && down < IDLE, "send: up {up}, down {down}");
    });
}

/// Row T12: a WAN whose round trip or loss is beyond its limit carries nothing while there is another, in both directions.
#[test]
fn t12_a_wan_beyond_its_latency_or_loss_is_left_alone() {
    isolated(|| {
        let mut two = Two::new(&[link(20.0, 10.0), link(20.0, 40.0)], "latency-max = \"60 ms\"");
        two.join();
        let tiers = |gateway: &Gateway| -> Vec<u8> {
            peer(gateway).paths.iter().map(|path| path.tier).filter(|tier| *tier > 0).collect()
        };
        let left = || tiers(&two.branch) == [254] && tiers(&two.hub) == [254];
        wait_for("both sides leave it", PATIENCE, left);
        let (up, down) = two.transfers();
        assert!(up < IDLE && down < IDLE, "slow: up {up}, down {down}");
        two.scene.testbed.change(1, Way::Both, |shape| shape.delay_us = 5_000).unwrap();
        wait_for("it is quick again", PATIENCE, || {
            tiers(&two.branch).is_empty() && tiers(&two.hub).is_empty()
        });
        let (up, down) = two.transfers();
        assert!(up > BUSY && down > BUSY, "quick: up {up}, down {down}");
        // Now it loses data, and may not.
        two.reload("loss-max = \"2 %\"");
        two.scene.testbed.change(1, Way::AToB, |shape| shape.loss = 0.1).unwrap();
        tcp_seconds(two.scene.a(), two.scene.b(), HUB_IP, 2, 4.0);
        wait_for("both sides leave it", PATIENCE, left);
        let (up, down) = two.transfers();
        assert!(up < IDLE && down < IDLE, "lossy: up {up}, down {down}");
    });
}

/// Row T12: a WAN by which too many routers lie on the way carries nothing while there is another; the TTL tells.
#[test]
fn t12_a_wan_by_too_many_routers_is_left_alone() {
    isolated(|| {
        let mut two = Two::new(&[link(20.0, 10.0), link(20.0, 10.0)], "hops-max = 3");
        two.join();
        let routers = |number: u8| {
            let rule = format!(
                "nft 'table inet routers; flush table inet routers; table inet routers {{ chain out {{ type filter hook output \
                 priority 0; oifname \"wan1\" ip ttl set {}; }}; }}'",
                64 - number
            );
            shell(two.scene.b(), &rule);
        };
        let address = two.scene.testbed.addresses(Site::A, 1).ipv4.unwrap().to_string();
        let seen = |gateway: &Gateway, hops: u8, tier: u8| {
            let paths = peer(gateway).paths.into_iter().filter(|path| path.state == "up");
            let mut second = paths.filter(|path| path.wan == "wan1" || path.remote.contains(&address));
            second.all(|path| (path.hops, path.tier) == (Some(hops), tier))
        };
        routers(3);
        wait_for("as many as may be", PATIENCE, || seen(&two.branch, 3, 0));
        let (up, down) = two.transfers();
        assert!(up > BUSY && down > BUSY, "three routers: up {up}, down {down}");
        routers(4);
        wait_for("both sides leave it", PATIENCE, || seen(&two.branch, 4, 254) && seen(&two.hub, 0, 254));
        let (up, down) = two.transfers();
        assert!(up < IDLE && down < IDLE, "four routers: up {up}, down {down}");
        routers(0);
        wait_for("a shorter way", PATIENCE, || seen(&two.branch, 0, 0) && seen(&two.hub, 0, 0));
        let (up, down) = two.transfers();
        assert!(up > BUSY && down > BUSY, "no router: up {up}, down {down}");
    });
}

/// Row T12: a WAN whose quota is used up carries data only while no other works, also after a restart.
#[test]
fn t12_a_quota_is_kept_over_a_restart() {
    isolated(|| {
        let mut two = Two::new(&[link(20.0, 10.0), link(20.0, 10.0)], "quota = \"3 MB\"");
        two.join();
        tcp_seconds(two.scene.a(), two.scene.b(), HUB_IP, 2, 4.0);
        let used_up = |gateway: &Gateway| {
            let report = gateway.status().unwrap();
            let wan = report.wans.iter().find(|wan| wan.interface == "wan1").cloned().unwrap();
            wan.state == "quota used up" && wan.quota_used >= 3_000_000 && wan.tier == 255
        };
        wait_for("the quota is used up", PATIENCE, || used_up(&two.branch));
        let known = |gateway: &Gateway| peer(gateway).paths.iter().any(|path| path.tier == 255);
        wait_for("the hub knows", PATIENCE, || known(&two.hub));
        let (up, down) = two.transfers();
        assert!(up < IDLE && down < IDLE, "used up: up {up}, down {down}");
        two.branch.program.stop().unwrap();
        two.branch = Gateway::start(
            two.scene.a(),
            &two.scene.directory,
            "branch",
            &with(&two.text, "quota = \"3 MB\""),
        );
        two.join();
        wait_for("it is still used up", PATIENCE, || used_up(&two.branch) && known(&two.hub));
        let (up, down) = two.transfers();
        assert!(up < IDLE && down < IDLE, "after a restart: up {up}, down {down}");
        // Better than nothing.
        two.scene.testbed.set_carrier(0, Site::A, false).unwrap();
        wait_for("wan0 is down", PATIENCE, || paths_up(&two.branch.status().unwrap()) == 1);
        let (up, down) = two.transfers();
        assert!(up > BUSY && down > BUSY, "alone: up {up}, down {down}");
    });
}

/// A file with a time zone (RFC 8536) in which it is noon of this month's 15th; year and month.
fn fifteenth(place: &Node, file: &Path) -> (i32, u8) {
    let said = shell(place, "date -u '+%Y %-m %-d %-H'");
    let numbers: Vec<i32> = said.split_whitespace().map(|number| number.parse().unwrap()).collect();
    let [year, month, day, hour] = numbers[..] else { panic!("{said}") };
    let offset_s = (15 - day) * 86_400 + (12 - hour) * 3_600;
    // Indicators, leap seconds and transitions: none. One kind of local time, with a name of four bytes.
    let mut text = b"TZif".to_vec();
    text.resize(20, 0);
    for count in [0, 0, 0, 0, 1, 4u32] {
        text.extend(count.to_be_bytes());
    }
    text.extend(offset_s.to_be_bytes());
    text.extend(b"\0\0MID\0");
    std::fs::write(file, text).unwrap();
    (year, u8::try_from(month).unwrap())
}

/// Row T12: the month of a quota begins on the day that is configured. What was used before counts no more from then on.
#[test]
fn t12_the_month_of_a_quota_begins_on_its_day() {
    isolated(|| {
        let scene = Scene::new(&[link(20.0, 10.0), link(20.0, 10.0)]);
        let directory = scene.directory.path().join("branch");
        std::fs::create_dir(&directory).unwrap();
        let zone = directory.join("zone");
        let (year, month) = fifteenth(scene.a(), &zone);
        let (last_year, last) = if month == 1 { (year - 1, 12) } else { (year, month - 1) };
        let used = format!("{{\"wan1\":{{\"year\":{last_year},\"month\":{last},\"bytes\":4000000}}}}\n");
        std::fs::write(directory.join("wan-use-ana0.json"), used).unwrap();
        let (branch, _) = scene.pair();
        let quota =
            |day: u8| with(&branch.text(&scene.directory), &format!("quota = \"3 MB\"\nquota-day = {day}"));
        let zone = format!(":{}", zone.display());
        let mut branch =
            Gateway::start_with(scene.a(), &scene.directory, "branch", &quota(16), &[("TZ", &zone)]);
        let state = |report: &control::status::Report, wanted: &str| {
            report.wans.iter().any(|wan| wan.interface == "wan1" && wan.state == wanted)
        };
        branch.wait("last month's use counts until the 16th", PATIENCE, |report| {
            state(report, "quota used up")
        });
        std::fs::write(&branch.config, quota(15)).unwrap();
        assert_eq!(branch.command(&["reload"]).0, 0, "{}", branch.log());
        branch.wait("a new month", PATIENCE, |report| state(report, "up"));
    });
}

/// Row T12: outside its schedule a WAN is not used at all; within it is.
#[test]
fn t12_a_wan_has_a_schedule() {
    isolated(|| {
        let now = local_time(realtime_ns() / 1_000_000_000);
        let hour = now.minute / 60;
        let span = |from: u16, to: u16| format!("schedule = \"{:02}:00-{:02}:00\"", from % 24, to % 24);
        let mut two = Two::new(&[link(20.0, 10.0), link(20.0, 10.0)], &span(hour + 4, hour + 6));
        two.branch.wait("the other path", PATIENCE, |report| paths_up(report) == 1);
        let state = |gateway: &Gateway| {
            let report = gateway.status().unwrap();
            report.wans.iter().find(|wan| wan.interface == "wan1").unwrap().state.clone()
        };
        assert_eq!(state(&two.branch), "outside its schedule");
        assert_eq!(two.transfers(), (0, 0));
        two.reload(&span(hour + 23, hour + 3));
        two.join();
        let (up, down) = two.transfers();
        assert!(state(&two.branch) == "up" && up > BUSY && down > BUSY, "up {up}, down {down}");
        two.reload(&span(hour + 4, hour + 6));
        wait_for("it is left", PATIENCE, || paths_up(&two.branch.status().unwrap()) == 1);
    });
}

/// Row T12: a WAN that is used at one location is left elsewhere, and where nobody says where the machine is; by the peer as well, and for good.
#[test]
fn t12_a_wan_has_locations() {
    isolated(|| {
        let mut two = Two::new(&[link(20.0, 10.0), link(20.0, 10.0)], "");
        let file = two.scene.directory.path().join("location");
        two.join();
        two.text = two.text.replace("[node]\n", &format!("[node]\nlocation-file = \"{}\"\n", file.display()));
        two.reload("locations = [\"depot\", \"the yard\"]");
        let state = |two: &Two| {
            let report = two.branch.status().unwrap();
            report.wans.iter().find(|wan| wan.interface == "wan1").unwrap().state.clone()
        };
        let is = |two: &Two, wanted: &str, paths: usize| {
            wait_for(wanted, PATIENCE, || {
                let up = |gateway: &Gateway| paths_up(&gateway.status().unwrap());
                state(two) == wanted && [&two.branch, &two.hub].iter().all(|gateway| up(gateway) == paths)
            });
        };
        is(&two, "not used at this location", 1);
        std::fs::write(&file, "the yard\n").unwrap();
        is(&two, "up", 2);
        let (up, down) = two.transfers();
        assert!(up > BUSY && down > BUSY, "up {up}, down {down}");
        std::fs::write(&file, "road\n").unwrap();
        is(&two, "not used at this location", 1);
        let (up, down) = two.transfers();
        assert!(up < IDLE && down < IDLE, "up {up}, down {down}");
    });
}

/// Row T12: an operator changes a WAN while it runs: a backup from now on, taken out under a transfer, as the file says again; over a
/// reload as well.
#[test]
fn t12_a_wan_is_changed_by_command() {
    isolated(|| {
        let mut two = Two::new(&[link(20.0, 10.0), link(20.0, 10.0)], "");
        two.join();
        let command = |two: &Two, arguments: &[&str]| two.branch.complaint(&[&["path"], arguments].concat());
        assert_eq!(command(&two, &["set", "wan1", "tier=1", "rate-max=15 Mbit/s"]).0, 0);
        let tier = |gateway: &Gateway| peer(gateway).paths.iter().map(|path| path.tier).max();
        let both = |now: Option<u8>| tier(&two.branch) == now && tier(&two.hub) == now;
        wait_for("both sides leave it", PATIENCE, || both(Some(1)));
        assert_eq!(two.branch.command(&["reload"]).0, 0);
        let (up, down) = two.transfers();
        assert!(up < IDLE && down < IDLE, "tier 1: up {up}, down {down}");

        assert_eq!(command(&two, &["reset", "wan1"]).0, 0);
        wait_for("both carry", PATIENCE, || both(Some(0)));
        let transfer = tcp_start(two.scene.a(), two.scene.b(), HUB_IP, 5203, 2, 3.0);
        std::thread::sleep(std::time::Duration::from_secs(1));
        assert_eq!(command(&two, &["off", "wan1"]).0, 0);
        wait_for("it is off", PATIENCE, || {
            two.branch.status().unwrap().wans.iter().any(|wan| wan.state == "off (anabranch path)")
        });
        let off = two.second();
        tcp_finish(transfer);
        let after = two.second();
        assert!(after.0.saturating_sub(off.0) < IDLE, "nothing more over it: {off:?} {after:?}");
        let (code, said) = command(&two, &["off", "wan0"]);
        assert!(code == 0 && said.contains("no WAN is up now"), "{said}");
        for wan in ["wan0", "wan1"] {
            assert_eq!(command(&two, &["on", wan]).0, 0);
        }
        wait_for("both are back", PATIENCE, || paths_up(&two.branch.status().unwrap()) == 2);

        let (code, said) = command(&two, &["set", "wan7", "tier=1"]);
        assert!(code == 1 && said.contains("no WAN is named \"wan7\"; there are wan0, wan1"), "{said}");
    });
}
