//! Cleartext on the WAN, as an observer reads it.

use std::net::{Ipv4Addr, UdpSocket};
use std::time::Duration;
use testbed::topology::Node;

use crate::capture::{Capture, payload};
use crate::machine::isolated;
use crate::program::Keys;
use crate::scene::*;

/// Twice in each datagram: at its front and far behind.
const MARKER: &[u8] = b"the eagle flies on friday night!";

/// Sends datagrams with the marker through the tunnel and waits until all are there.
fn send_marked(from: &Node, to: &Node, address: &str) {
    let far = udp_socket(to, (address, 5400));
    far.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let near = from.run(|| UdpSocket::bind("0.0.0.0:0")).unwrap().unwrap();
    let mut text = MARKER.to_vec();
    text.resize(1_000, b'.');
    text.extend_from_slice(MARKER);
    let mut buffer = vec![0; 2_000];
    for _ in 0..20 {
        near.send_to(&text, (address, 5400)).unwrap();
        let (length, _) = far.recv_from(&mut buffer).unwrap();
        assert!(buffer[..length] == text, "damaged");
    }
}

fn count(frames: &[Vec<u8>], kind: u8) -> usize {
    frames.iter().filter(|frame| payload(frame)[0] == 0x10 | kind).count()
}

/// Row T11: encryption on, partial and off, per tunnel. An observer of the WAN finds a known text in the last two only; the stricter
/// side decides; without permission to send clear text neither is possible.
#[test]
fn t11_encryption_on_partial_and_off_as_an_observer_sees_them() {
    isolated(|| {
        let scene = Scene::new(&[link(100.0, 1.0)]);
        let (a, b) = (scene.a(), scene.b());
        let mode = |mode: &str| match mode {
            "on" => String::new(),
            mode => format!("encryption = \"{mode}\"\nallow-cleartext = true\n"),
        };
        // What both ask for, what they agree on, how often the text of 20 datagrams may be seen, kind of the datagrams.
        let cases = [
            ("on", "on", "", 0..1, 4),
            ("off", "off", "off", 20..100, 5),
            ("partial", "partial", "payload only", 0..100, 6),
            ("off", "on", "", 0..1, 4),
        ];
        for (ours, theirs, shown, seen, kind) in cases {
            let (branch, hub) = scene.pair();
            let (branch, hub) = (branch.section(&mode(ours)), hub.section(&mode(theirs)));
            let capture = Capture::start(b, "wan0", 5_000);
            let (branch, hub) = scene.join(&branch, &hub, 1);
            send_marked(a, b, HUB_IP);
            echo(a, b, HUB_IP);
            for gateway in [&branch, &hub] {
                let encryption = peer(gateway).encryption;
                assert!(encryption.contains(shown), "{ours}/{theirs}: {encryption}");
                assert_eq!(
                    shown.is_empty(),
                    !encryption.contains("off") && !encryption.contains("only"),
                    "{encryption}"
                );
                let warned = gateway.log().contains(" WARN ");
                let asked = if std::ptr::eq(gateway, &raw const branch) { ours } else { theirs };
                assert_eq!(warned, asked != "on", "{ours}/{theirs}: a loud warning\n{}", gateway.log());
            }
            drop((branch, hub));
            let frames = capture.finish();
            let finds = |frame: &Vec<u8>| payload(frame).windows(MARKER.len()).any(|part| part == MARKER);
            let found = frames.iter().filter(|frame| finds(frame)).count();
            assert!(seen.contains(&found), "{ours}/{theirs}: the text was seen in {found} datagrams");
            // The inner header is in the front that `partial` leaves clear.
            let addresses = [BRANCH_IP, HUB_IP].map(|ip| ip.parse::<Ipv4Addr>().unwrap().octets()).concat();
            let tells = |frame: &&Vec<u8>| payload(frame).windows(8).any(|part| part == addresses);
            let told = frames.iter().filter(tells).count();
            let as_agreed = if shown.is_empty() { told == 0 } else { told >= 10 };
            assert!(as_agreed, "{ours}/{theirs}: inner addresses in {told} datagrams");
            assert!(
                count(&frames, kind) >= 20,
                "{ours}/{theirs}: {} datagrams of kind {kind}",
                count(&frames, kind)
            );
            let whole = |frame: &&Vec<u8>| {
                payload(frame).windows(MARKER.len()).filter(|part| *part == MARKER).count() == 2
            };
            if ours == "partial" {
                assert_eq!(frames.iter().filter(whole).count(), 0, "all of the text is clear");
            }
        }
    });
}

/// Row T11: clear text needs two words in the configuration; one alone is refused with file, line and key.
#[test]
fn t11_clear_text_is_refused_without_permission() {
    let directory = testbed::program::ScratchDir::new("anabranch-e2e").unwrap();
    for mode in ["off", "partial"] {
        let (branch, hub) =
            (Config::new("branch", BRANCH_IP), Config::new("hub", HUB_IP).node_line("listen = 4600"));
        let text =
            hub.peer(&branch, &[], &branch.own_nets(), &format!("encryption = \"{mode}\"")).text(&directory);
        let line = text.lines().position(|line| line.starts_with("encryption")).unwrap() + 1;
        let file = directory.write("hub.toml", &text).unwrap();
        for command in ["check", "up"] {
            let program = env!("CARGO_BIN_EXE_anabranch");
            let output = std::process::Command::new(program).arg(command).arg(&file).output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(1), "{said}");
            let expected = format!("{}:{line}:", file.display());
            assert!(said.contains(&expected) && said.contains("error: peer.encryption"), "{said}");
            assert!(said.contains("allow-cleartext = true"), "{said}");
        }
    }
}

/// Row T11: where a second key is configured, in a file or in its place, a peer that has another one is no peer, though its first key is right.
#[test]
fn t11_a_preshared_key_must_be_the_same_on_both_sides() {
    isolated(|| {
        let scene = Scene::new(&[link(100.0, 1.0)]);
        let (branch, hub) = scene.pair();
        let keys = ["one.psk", "other.psk"].map(|name| {
            let key = Keys::new().private;
            scene.directory.write(name, &key).unwrap();
            key
        });
        let text = hub.text(&scene.directory);
        let hub = scene.start(scene.b(), &hub.section("preshared-key-file = \"other.psk\"\n"));
        let mut branch = scene.start(scene.a(), &branch.section("preshared-key-file = \"one.psk\"\n"));
        // The second key seals the hub's answer.
        wait_for("no answer is right", PATIENCE, || drops(&branch, &["handshake-failed"]) > 1);
        assert_eq!(peer(&branch).handshakes, 0);
        std::fs::write(&hub.config, format!("{text}preshared-key = \"{}\"\n", keys[0])).unwrap();
        assert_eq!(hub.command(&["reload"]).0, 0, "{}", hub.log());
        branch.wait("joined", PATIENCE, |report| paths_up(report) == 1);
        echo(scene.a(), scene.b(), HUB_IP);
    });
}
