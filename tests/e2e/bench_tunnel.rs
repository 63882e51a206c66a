//! Measurements of the tunnel through the built program: cores in memory, and the bare relay that it is compared with.

use std::process::Command;

use testbed::program::Program;
use testbed::topology::Site;

use crate::gateway_scene::try_shell;
use crate::machine::{busy, isolated};
use crate::scene::*;

fn bench(arguments: &[&str]) -> serde_json::Value {
    let output = Command::new(env!("CARGO_BIN_EXE_anabranch")).arg("bench").args(arguments).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_str(&text).unwrap()
}

/// Rows T4–T9: in every mode every packet that two cores seal is opened and delivered by the two cores of the other side; where the
/// clear header names the owner of the flow nothing is handed over, where the receiver finds it out half of the flows are.
#[test]
fn t4_t9_cores_in_memory_seal_and_open_in_every_mode() {
    let _busy = busy();
    let reports = bench(&["tunnel", "--packets", "4096", "--runs", "1", "--bytes", "300", "--json"]);
    let reports = reports.as_array().unwrap();
    assert_eq!(reports.len(), 7);
    for report in reports {
        let mode = report["mode"].as_str().unwrap();
        for rates in [&report["send"], &report["receive"]] {
            for rate in ["one_kpps", "two_kpps", "independent_kpps"] {
                assert!(rates[rate].as_f64().unwrap() > 1.0, "{report}");
            }
        }
        let handed = report["handed_percent"].as_f64().unwrap();
        let expected = match mode {
            "core-id" => 0.0..1.0,
            // Who reads it finds out: the header is sealed, or names none.
            "sealed-header" | "receiver-decides" => 40.0..60.0,
            _ => 0.0..101.0,
        };
        assert!(expected.contains(&handed), "{report}");
    }
}

/// The relay carries what the bond is compared by: one TCP stream, every byte of it, with either cipher.
#[test]
fn the_bare_relay_carries_a_stream() {
    isolated(|| {
        for cipher in ["", "--chacha"] {
            let scene = Scene::new(&[link(100.0, 1.0)]);
            let ends = [(Site::A, scene.a(), "10.79.0.1"), (Site::B, scene.b(), "10.79.0.2")];
            let address = |site| format!("{}:5000", scene.testbed.addresses(site, 0).ipv4.unwrap());
            let _relays: Vec<Program> = ends
                .iter()
                .map(|(site, node, inner)| {
                    let other = if *site == Site::A { Site::B } else { Site::A };
                    let mut command = Command::new(env!("CARGO_BIN_EXE_anabranch"));
                    command.args(["bench", "relay", "--tun", "relay0"]);
                    command.args(["--local", &address(*site), "--remote", &address(other)]);
                    command.args(Some(cipher).filter(|cipher| !cipher.is_empty()));
                    node.prepare(&mut command).unwrap();
                    let log = scene.directory.path().join(format!("relay{inner}.log"));
                    let running = Program::start(command, Some(&log)).unwrap();
                    wait_for("the device", PATIENCE, || {
                        try_shell(node, &format!("ip addr add {inner}/24 dev relay0")).is_ok()
                    });
                    try_shell(node, "ip link set relay0 mtu 1400 gso_max_size 60000 up").unwrap();
                    running
                })
                .collect();
            wait_for("the relay", PATIENCE, || try_echo(scene.a(), scene.b(), "10.79.0.2").is_ok());
            echo(scene.b(), scene.a(), "10.79.0.1");
        }
    });
}
