//! Cores for a class of flows (rows T3, T4, T13), and what that is worth.

use testbed::topology::Node;

use crate::machine::{alone, isolated};
use crate::scene::*;
use crate::talk::{Heard, Talk};

const CLASS: &str = "[[class]]\nname = \"calls\"\nclass = \"critical\"\nport = 7000\n";

/// Packets that each core of a gateway has written to TUN.
fn written(gateway: &Gateway) -> Vec<u64> {
    settled(|| gateway.status().unwrap().status.cores.iter().map(|core| core.tun_tx_packets).collect())
}

/// A call of 500 small datagrams a second, as critical ones are.
fn call(from: &Node, to: &Node) -> Heard {
    Talk { bytes: 200, gap: std::time::Duration::from_millis(2), ..Talk::new(7000, 4.0) }
        .start(from, to, HUB_IP)
        .finish()
}

/// Rows T3, T4, T13: the hub has core 1 for critical flows only, and tells the branch. A call goes there, a burst of bulk does not, and
/// the call does not feel it. When the core is taken away the call goes to the other one, and comes back with it.
#[test]
fn t13_a_reserved_core_is_its_classs_alone() {
    let _alone = alone();
    isolated(|| {
        let scene = Scene::new(&[link(400.0, 2.0)]);
        let (a, b) = (scene.a(), scene.b());
        let (branch, hub) = scene.pair();
        let branch = branch.node_line("cores = [0]").section(CLASS);
        let hub = hub.node_line("cores = [0, 1]\nreserved-cores = { critical = [1] }").section(CLASS);
        let (branch, hub) = scene.join(&branch, &hub, 1);
        let state = |core: usize| hub.status().unwrap().status.core_states[core].clone();
        let asked = |port: u16| {
            let flow = format!("udp {BRANCH_IP}:40000 > {HUB_IP}:{port}");
            branch.command(&["class", &flow]).1
        };
        assert!(asked(7000).contains("its core 1"), "{}", asked(7000));
        assert!(asked(7001).contains("its core 0"), "{}", asked(7001));
        // All that makes traffic shares a CPU with the branch and with core 0.
        linux::affinity::allow_current_thread(&[0]).unwrap();
        let idle = call(a, b);
        let before = written(&hub);
        let bulk = tcp_start(a, b, HUB_IP, 5203, 8, 7.0);
        std::thread::sleep(std::time::Duration::from_secs(1));
        let loaded = call(a, b);
        tcp_finish(bulk);
        let wrote: Vec<u64> = written(&hub).iter().zip(&before).map(|(new, old)| new - old).collect();
        eprintln!(
            "p99 of a critical flow: idle {:.2} ms, beside bulk {:.2} ms, ratio {:.2}; by core {wrote:?}",
            idle.p99_ms,
            loaded.p99_ms,
            loaded.p99_ms / idle.p99_ms
        );
        assert_eq!((loaded.received, loaded.reordered), (loaded.sent, 0), "{loaded:?}");
        // Nothing else is on its core, and nothing of it elsewhere.
        assert!(wrote[1] >= loaded.received && wrote[1] < loaded.received + 50, "{wrote:?} {loaded:?}");
        assert!(wrote[0] > 10_000, "{wrote:?}");
        // Most of it is the sending side's, which shares its CPU with everything else; other programs may have the machine too.
        assert!(loaded.p99_ms < idle.p99_ms + 150.0, "{idle:?} {loaded:?}");
        // Taken away and given back, the branch is told.
        assert_eq!(state(1), "reserved");
        assert_eq!(hub.command(&["core", "drain", "1"]).0, 0);
        wait_for("the branch hears that it is gone", PATIENCE, || asked(7000).contains("its core 0"));
        assert_eq!(hub.command(&["core", "enable", "1"]).0, 0);
        wait_for("the branch hears that it is back", PATIENCE, || asked(7000).contains("its core 1"));
    });
}

/// Rows T3, T13: the hub prefers core 1 for interactive flows and tells the branch. All of them go there, others go to both cores; while
/// the core is away they go to the other one.
#[test]
fn t13_a_preferred_core_has_its_class_and_others() {
    isolated(|| {
        let scene = Scene::new(&[link(400.0, 2.0)]);
        let (a, b) = (scene.a(), scene.b());
        let (branch, hub) = scene.pair();
        let class = CLASS.replace("critical", "interactive");
        let hub = hub.node_line("cores = [0, 1]\npreferred-cores = { interactive = [1] }");
        let (branch, hub) = scene.join(&branch.section(&class), &hub.section(&class), 1);
        let cores = |port: u16| -> [usize; 2] {
            let asked = (40_000..40_020)
                .map(|own| branch.command(&["class", &format!("udp {BRANCH_IP}:{own} > {HUB_IP}:{port}")]).1);
            let asked: Vec<String> = asked.collect();
            ["its core 0", "its core 1"].map(|core| asked.iter().filter(|said| said.contains(core)).count())
        };
        assert_eq!(cores(7000), [0, 20]);
        assert!(cores(7001).iter().all(|count| *count > 0), "{:?}", cores(7001));
        let before = written(&hub);
        let heard = Talk { bytes: 200, ..Talk::new(7000, 1.0) }.start(a, b, HUB_IP).finish();
        let wrote: Vec<u64> = written(&hub).iter().zip(&before).map(|(new, old)| new - old).collect();
        assert!(heard.received == heard.sent && wrote[1] >= heard.sent, "{wrote:?} {heard:?}");
        assert_eq!(hub.command(&["core", "drain", "1"]).0, 0);
        wait_for("the branch hears that it is gone", PATIENCE, || cores(7000) == [20, 0]);
    });
}
