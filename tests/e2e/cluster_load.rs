//! A cluster that follows its load: shares by capacity and by what units have to do (row D7), machines that are started and
//! stopped (row D12). Connections go on meanwhile, every byte checked at both ends.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use testbed::cluster::ClusterBed;
use testbed::traffic::churn::{Churn, client};

use crate::cluster_scene::{Cluster, PORT, PROGRAM, Plan, nothing, unit};
use crate::machine::busy;

/// Associations that ended are forgotten soon: a machine that drains waits for them.
const SERVICES: &str =
    "[[nat]]\nout = \"wan\"\n[gateway]\ntimeouts = { udp-seconds = 6, tcp-closed-seconds = 3 }\n";

/// Machines that hooks start: each a gateway in its own network, of which it is told by a process that lives there.
struct Hooked {
    directory: PathBuf,
    _places: Vec<testbed::program::Program>,
}

impl Hooked {
    /// Makes the hook, beside the manager's configuration, and gives it the networks of these machines.
    fn new(bed: &ClusterBed, nodes: &[u16]) -> Self {
        let directory = bed.directory().to_owned();
        let hook = directory.join("unit");
        std::fs::write(&hook, Self::script()).unwrap();
        std::fs::set_permissions(&hook, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let mut places = Vec::new();
        for node in nodes {
            let mut command = Command::new("sleep");
            command.arg("1000");
            let place = bed.machine(*node).unwrap().node.start(command, None).unwrap();
            std::fs::write(directory.join(format!("{node}.place")), place.id().to_string()).unwrap();
            places.push(place);
        }
        Self { directory, _places: places }
    }

    /// The shell script that the manager runs.
    fn script() -> String {
        format!(
            "#!/bin/sh\nset -e\necho \"$1 $2\" >> hooks\ncase $1 in\n\
             start) nsenter --net=/proc/$(cat $2.place)/ns/net {PROGRAM} up $2.toml > $2.log 2>&1 < /dev/null &\n\
             echo $! > $2.pid ;;\n\
             stop) kill $(cat $2.pid); rm $2.pid ;;\nesac\n"
        )
    }

    fn said(&self) -> Vec<String> {
        let text = std::fs::read_to_string(self.directory.join("hooks")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }
}

impl Drop for Hooked {
    fn drop(&mut self) {
        for entry in std::fs::read_dir(&self.directory).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.extension().is_some_and(|extension| extension == "pid")
                && let Ok(text) = std::fs::read_to_string(&path)
                && let Some(id) = text.trim().parse().ok().and_then(Pid::from_raw)
            {
                let _ = kill_process(id, Signal::KILL);
            }
        }
    }
}

/// Datagrams that keep the machines busy until they are dropped: a little more every few seconds, until `is_enough`. How much
/// that is depends on this machine.
fn burden(cluster: &Cluster, is_enough: impl Fn() -> bool) -> Vec<Churn> {
    const STEPS_MAX: u16 = 16;
    let more = |step: u16| {
        let some = |options| client::Options { udp: 20, udp_interval: Duration::from_millis(8), ..options };
        let traffic = cluster.traffic_to(PORT + step, some);
        for _ in 0..40 {
            if is_enough() {
                break;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        traffic
    };
    let all: Vec<Churn> = (1..=STEPS_MAX).map_while(|step| (!is_enough()).then(|| more(step))).collect();
    assert!(is_enough(), "{}", cluster.events());
    all
}

/// The whole cycle, and its beginning once more over the same machine: connections come, the load is above the mark, the hook starts a machine that
/// nobody enrolled, it joins and gets its buckets; they go, the load is below the mark, it is drained, its flows end, the hook
/// stops it; and it is started again. Nothing breaks.
#[test]
fn d12_a_machine_is_started_when_the_load_is_high_and_stopped_when_it_is_low() {
    let _busy = busy();
    let scaling = "[scaling]\npool = [{ node = 12, address = \"10.9.0.12\" }]\nstart = \"./unit\"\nstop = \"./unit\"\n\
                   above-percent = 35\nbelow-percent = 18\nfor-seconds = 3\npause-seconds = 3\nleast = 0\nmost = 2\n";
    let plan = Plan { dispatchers: 2, data_planes: 2, services: SERVICES, manager: scaling };
    let (cluster, hooked) = Cluster::start(&plan, &[11], |_, text| text, |bed| Hooked::new(bed, &[12]));
    cluster.join(&[11]);
    // What goes on all the time, on the machine that stays and on the one that comes.
    let steady = cluster.traffic(|options| client::Options {
        short_per_second: 30,
        long: 40,
        long_life: Some(Duration::from_secs(4)),
        udp: 10,
        udp_life: Some(Duration::from_secs(4)),
        ..options
    });
    for round in 1..=2 {
        let busy = burden(&cluster, || hooked.said().len() == 2 * round - 1);
        let buckets = cluster.until("it gets its share", |all| {
            let status = all.status();
            let unit = unit(&status, 12)?;
            (unit["standing"] == "active" && unit["connected"] == true)
                .then(|| unit["buckets"].as_u64())
                .flatten()
        });
        assert_eq!(buckets, 32_768, "half of all");
        cluster.until("flows begin there", |all| (all.unit(12, "live_flows") > 5).then_some(()));
        if round == 2 {
            break;
        }
        drop(busy);
        cluster.until("the hook stops it", |_| (hooked.said().len() == 2 * round).then_some(()));
        cluster.until("it is gone", |all| {
            let status = all.status();
            let unit = unit(&status, 12)?;
            (unit["standing"] == "free" && unit["connected"] == false && unit["buckets"] == 0).then_some(())
        });
    }
    assert_eq!(hooked.said(), ["start 12", "stop 12", "start 12"]);
    let report = steady.finish().unwrap();
    assert_eq!((report.broken, report.udp_lost), (0, 0), "{report:#?}\n{}", cluster.events());
    assert!(report.connections > 500, "{report:#?}");
}

/// Something else on the CPU of one machine, until it is dropped.
struct Hog([Child; 2]);

impl Hog {
    /// Pins the gateway of a machine to the first CPU, and takes most of that.
    fn beside(cluster: &Cluster, node: u16) -> Self {
        let process = cluster.bed.process(node).unwrap().to_string();
        let pinned = Command::new("taskset").args(["-a", "-p", "-c", "0", &process]).output().unwrap();
        assert!(pinned.status.success(), "{pinned:?}");
        // More than a worker has to say, where that is allowed.
        let words = ["-c", "0", "nice", "-n", "-20", "sh", "-c", "while :; do :; done"];
        let hog = |_| Command::new("taskset").args(words).stderr(Stdio::null()).spawn().unwrap();
        Self([(); 2].map(hog))
    }
}

impl Drop for Hog {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Buckets and new connections are shared by the capacities that machines tell; one whose CPU is taken by something else has
/// fewer buckets after a while, and all of them again when it is over. Nothing breaks.
#[test]
fn d7_shares_follow_capacities_and_load() {
    let _busy = busy();
    let follow = "follow-load = true\nload-sample-seconds = 1\nload-pause-seconds = 2\n";
    let plan = Plan { dispatchers: 2, data_planes: 3, services: SERVICES, manager: follow };
    let weight = |node: u16, text: String| match node {
        13 => text.replacen("[cluster]\n", "[cluster]\nweight = 2\n", 1),
        _ => text,
    };
    let (cluster, ()) = Cluster::start(&plan, &[11, 12, 13], weight, nothing);
    cluster.join(&[11, 12, 13]);
    let buckets = |all: &Cluster| [11, 12, 13].map(|node| all.unit(node, "buckets"));
    assert_eq!(buckets(&cluster), [16_384, 16_384, 32_768]);

    let traffic = cluster.traffic(|options| client::Options { long: 600, pauses: 2, udp: 60, ..options });
    let mut before = [0; 3];
    let live = cluster.until("all have begun, and were counted", |all| {
        std::thread::sleep(Duration::from_millis(1_500));
        let live = [11, 12, 13].map(|node| all.unit(node, "live_flows"));
        (std::mem::replace(&mut before, live) == live && live.iter().sum::<u64>() >= 660).then_some(live)
    });
    // Of 660 flows a quarter, 165, has a standard deviation of 11, and a half of 13.
    let shares = [(live[0], 165), (live[1], 165), (live[2], 330)];
    assert!(shares.iter().all(|(live, share)| live.abs_diff(*share) < 60), "{live:?}");

    let hog = Hog::beside(&cluster, 11);
    let first = cluster.until("it gives something away", |all| {
        let status = all.status();
        let now = unit(&status, 11)?["buckets"].as_u64()?;
        (now < 15_800).then_some(now)
    });
    assert!(first > 14_000, "little by little: {first}");
    assert!(cluster.events().contains("unit 11 is loaded more than others"), "{}", cluster.events());
    drop(hog);
    cluster.until("it gets everything back", |all| (buckets(all) == [16_384, 16_384, 32_768]).then_some(()));
    let report = traffic.finish().unwrap();
    assert_eq!((report.broken, report.udp_lost), (0, 0), "{report:#?}\n{}", cluster.events());
}
