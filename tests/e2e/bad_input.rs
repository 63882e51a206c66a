//! Bad input: whatever arrives on the Internet side is counted and changes nothing.

use std::net::{Ipv4Addr, UdpSocket};
use std::time::Duration;

use fastrand::Rng;
use steering::cores::CoreSet;
use steering::table::{BucketTable, Unit};
use testbed::stop::Stop;
use testbed::topology::Site;
use testbed::traffic::{Span, udp};
use tunnel::handshake::{Identity, Initiator};
use tunnel::hello::{Capabilities, Hello, ProcessorInfo};

use crate::capture::*;
use crate::machine::isolated;
use crate::scene::*;

/// Every way to spoil one captured frame: shorter, longer, single bits, another kind, another counter, noise.
fn spoiled(frame: &[u8], random: &mut Rng) -> Vec<Vec<u8>> {
    let good = payload(frame);
    let mut list = Vec::new();
    for length in (0..=good.len().min(64)).chain([good.len() - 1]) {
        list.push(with_payload(frame, &good[..length]));
    }
    for _ in 0..60 {
        let mut bytes = good.to_vec();
        let bit = random.u64(..bytes.len() as u64 * 8);
        bytes[(bit / 8) as usize] ^= 1 << (bit % 8);
        list.push(with_payload(frame, &bytes));
    }
    // Every kind and version there is or is not, in front of the same bytes.
    for first in 0..=255u8 {
        let mut bytes = good.to_vec();
        if bytes[0] != first {
            bytes[0] = first;
            list.push(with_payload(frame, &bytes));
        }
    }
    // Every field of the header on its own.
    for at in 1..16 {
        let mut bytes = good.to_vec();
        bytes[at] ^= 0xff;
        list.push(with_payload(frame, &bytes));
    }
    let mut noise = vec![0; good.len()];
    random.fill(&mut noise);
    list.push(with_payload(frame, &noise));
    noise[0] = good[0];
    list.push(with_payload(frame, &noise));
    let mut longer = good.to_vec();
    longer.extend_from_slice(&noise[..noise.len().min(200)]);
    list.push(with_payload(frame, &longer));
    list
}

/// Some frames of each kind of datagram.
fn samples(frames: &[Vec<u8>]) -> Vec<&Vec<u8>> {
    let mut list = Vec::new();
    for kind in 1..=6u8 {
        let of_kind: Vec<_> = frames.iter().filter(|frame| payload(frame)[0] & 15 == kind).collect();
        // Small ones and large ones.
        list.extend(of_kind.iter().take(3));
        list.extend(of_kind.iter().filter(|frame| frame.len() > 1_000).take(3));
    }
    list
}

/// A crowd of strangers: real and spoiled datagrams from 8,000 places.
fn strangers(frames: &[Vec<u8>], random: &mut Rng) -> Vec<Vec<u8>> {
    (0..8_000u32)
        .map(|number| {
            let frame = &frames[random.usize(..frames.len())];
            let mut bytes = payload(frame).to_vec();
            if number % 2 == 0 {
                let at = random.usize(..bytes.len());
                bytes[at] ^= 1;
            }
            let address = Ipv4Addr::new(198, 18, 0, 3 + (number % 250) as u8);
            from_address(&with_payload(frame, &bytes), address, 1_000 + number as u16)
        })
        .collect()
}

/// Row T4 and "Bad input": garbage, truncated, bit-flipped, replayed and reordered datagrams of every kind reach both sides
/// from the right and from wrong addresses, while real data flows. All of them are counted, the session and its
/// paths stay as they are, memory does not grow, the data is whole.
#[test]
fn t4_hostile_datagrams_of_every_kind_are_counted_and_change_nothing() {
    isolated(|| {
        let scene = Scene::new(&[link(200.0, 1.0)]);
        let (a, b) = (scene.a(), scene.b());
        let (branch, hub) = scene.pair();
        let (at_hub, at_branch) = (Capture::start(b, "wan0", 20_000), Capture::start(a, "wan0", 20_000));
        let (branch, hub) = scene.join(&branch, &hub, 1);
        tcp_seconds(a, b, HUB_IP, 2, 1.0);
        let (to_hub, to_branch) = (at_hub.finish(), at_branch.finish());
        let has = |frames: &[Vec<u8>], kind: u8| frames.iter().any(|frame| payload(frame)[0] == 0x10 | kind);
        assert!(has(&to_hub, 1) && has(&to_hub, 4), "no initiation, no data seen");
        assert!(has(&to_branch, 2) && has(&to_branch, 4), "no response, no data seen");

        let before = (peer(&branch), peer(&hub));
        let memory = (resident_kb(&branch), resident_kb(&hub));
        let flow = tcp_start(a, b, HUB_IP, 5203, 2, 8.0);
        let mut random = Rng::with_seed(1);
        let mut sent = [0, 0];
        let drops_before = [drops(&hub, &[]), drops(&branch, &[])];
        for (side, (place, frames)) in [(a, &to_hub), (b, &to_branch)].into_iter().enumerate() {
            for sample in samples(frames) {
                sent[side] += inject(place, "wan0", &spoiled(sample, &mut random));
            }
            // Copies of the last real data, backwards, from the right address.
            let copies: Vec<Vec<u8>> =
                frames.iter().rev().take(1_000).map(|frame| with_payload(frame, payload(frame))).collect();
            sent[side] += inject(place, "wan0", &copies);
        }
        let strangers = strangers(&to_hub, &mut random);
        sent[0] += inject(a, "wan0", &strangers);
        tcp_finish(flow);

        for (name, gateway, sent, before) in
            [("hub", &hub, sent[0], drops_before[0]), ("branch", &branch, sent[1], drops_before[1])]
        {
            // A datagram may get lost on the busy link; the kernel itself drops empty ones of wrong length.
            let counted = settled(|| drops(gateway, &[]) - before);
            assert!(counted * 10 >= sent * 8, "{name}: {counted} of {sent} were counted");
        }
        assert!(settled(|| drops(&hub, &["replayed", "too-old"])) > 500, "no replays were counted");
        for reasons in [
            &["too-short"][..],
            &["bad-version"],
            &["unknown-type"],
            &["unknown-index"],
            &["auth-failed"],
            &["handshake-mac", "handshake-malformed", "handshake-rate"],
        ] {
            wait_for(&format!("{reasons:?}"), PATIENCE, || drops(&hub, reasons) > 0);
        }
        let after = (peer(&branch), peer(&hub));
        for (before, after) in [(&before.0, &after.0), (&before.1, &after.1)] {
            assert_eq!(after.state, "up");
            assert_eq!(before.handshakes, after.handshakes, "a new session was made");
            assert_eq!(before.paths[0].remote, after.paths[0].remote, "a path was led astray");
            assert_eq!(before.paths.len(), after.paths.len());
        }
        for (gateway, before) in [(&branch, memory.0), (&hub, memory.1)] {
            let grown = resident_kb(gateway).saturating_sub(before);
            assert!(grown < 64 * 1024, "{grown} kB more memory");
        }
        echo(a, b, HUB_IP);
    });
}

/// "Bad input" at an open port: noise of every length by an ordinary socket, before anybody has joined.
#[test]
fn t4_noise_at_an_open_port_is_counted_and_does_not_keep_anybody_out() {
    isolated(|| {
        let scene = Scene::new(&[link(200.0, 1.0)]);
        let (branch, hub) = scene.pair();
        let mut hub = scene.start(scene.b(), &hub);
        hub.wait("running", PATIENCE, |_| true);
        let memory = resident_kb(&hub);
        let target = scene.endpoint(Site::B, 0);
        let socket = scene.a().run(|| UdpSocket::bind("0.0.0.0:0")).unwrap().unwrap();
        let mut random = Rng::with_seed(2);
        let mut buffer = vec![0; 1_472];
        for number in 0..6_000u64 {
            let length = (number % 1_473) as usize;
            random.fill(&mut buffer[..length]);
            if number % 2 == 1 && length > 0 {
                buffer[0] = 0x11 + (number / 2 % 6) as u8;
            }
            socket.send_to(&buffer[..length], &target).unwrap();
            if number % 32 == 0 {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        wait_for("the noise is counted", PATIENCE, || drops(&hub, &[]) >= 5_000);
        assert!(hub.status().unwrap().status.peers[0].paths.is_empty());
        let grown = resident_kb(&hub).saturating_sub(memory);
        assert!(grown < 32 * 1024, "{grown} kB more memory");
        let mut branch = scene.start(scene.a(), &branch);
        branch.wait("joined all the same", PATIENCE, |report| paths_up(report) == 1);
        echo(scene.a(), scene.b(), HUB_IP);
    });
}

/// A well-made first handshake message of somebody who knows the hub's public key and nothing else.
fn initiation(hub: &[u8; 32], number: u32) -> Vec<u8> {
    let mut key = [7; 32];
    key[..4].copy_from_slice(&number.to_be_bytes());
    let cores = BucketTable::new(128, &[Unit { id: 0, weight: 1 }]).unwrap();
    let processor = ProcessorInfo {
        cores: 1,
        usable: CoreSet::first(1),
        load: Vec::new(),
        reserved: Vec::new(),
        preferred: Vec::new(),
        policy: Default::default(),
        flow: Default::default(),
        tenant: 0,
        tunnel_core: None,
        flow_hash_key: [1; 40],
        table: cores,
    };
    let hello = Hello {
        version: 1,
        capabilities: Capabilities::RETRANSMIT,
        aeads: 3,
        timestamp_ns: Some(1_800_000_000_000_000_000),
        freshness: None,
        boot_id: 1,
        encryption: Default::default(),
        steering: Default::default(),
        accepted: tunnel::mode::ModeSet::CORE_ID,
        processor,
    };
    Initiator::start(&Identity::from_private(key), hub, None, &hello, number, 0, None).unwrap().1
}

/// Row T3 and "cookies under load": strangers flood the hub with handshakes that are well made. It asks for cookies, with
/// answers no longer than the question, computes little for strangers, and a real branch joins in the middle of it.
#[test]
fn t3_a_flood_of_handshakes_is_answered_with_cookies_and_keeps_nobody_out() {
    isolated(|| {
        let scene = Scene::new(&[link(200.0, 1.0)]);
        let (branch, hub) = scene.pair();
        let key = control::key::decode_public(&hub.keys.public).unwrap();
        let messages: Vec<Vec<u8>> = (0..200).map(|number| initiation(&key, number)).collect();
        let mut hub = scene.start(scene.b(), &hub);
        hub.wait("running", PATIENCE, |_| true);
        let memory = resident_kb(&hub);
        let target = scene.endpoint(Site::B, 0);
        let sockets: Vec<UdpSocket> = scene
            .a()
            .run(|| (0..50).map(|_| UdpSocket::bind("0.0.0.0:0")).collect::<Result<_, _>>())
            .unwrap()
            .unwrap();
        let end = Stop::new();
        let flood = {
            let (end, target) = (end.clone(), target.clone());
            std::thread::spawn(move || {
                let (mut sent, mut cookies, mut buffer) = (0u64, 0u64, vec![0; 2_000]);
                sockets.iter().for_each(|socket| socket.set_nonblocking(true).unwrap());
                while !end.sleep(Duration::from_millis(20)) {
                    for (message, socket) in
                        messages.iter().zip(sockets.iter().cycle()).skip(sent as usize % 150).take(50)
                    {
                        sent += u64::from(socket.send_to(message, &target).is_ok());
                        while let Ok((length, _)) = socket.recv_from(&mut buffer) {
                            assert_eq!(buffer[0], 0x13, "an answer to a stranger that is no cookie");
                            assert!(length <= message.len(), "{length} bytes answer {}", message.len());
                            cookies += 1;
                        }
                    }
                }
                (sent, cookies)
            })
        };
        wait_for("the hub is under load", PATIENCE, || {
            drops(&hub, &["handshake-cookie", "handshake-rate"]) > 100
        });
        let mut branch = scene.start(scene.a(), &branch);
        branch.wait("joined in the flood", PATIENCE, |report| paths_up(report) == 1);
        echo(scene.a(), scene.b(), HUB_IP);
        end.raise();
        let (sent, cookies) = flood.join().unwrap();
        assert!(cookies > 0, "no cookie for {sent} messages");
        let computed = settled(|| drops(&hub, &["handshake-unknown-peer"]));
        assert!(computed > 0 && computed < sent, "{computed} of {sent}");
        let grown = resident_kb(&hub).saturating_sub(memory);
        assert!(grown < 32 * 1024, "{grown} kB more memory");
    });
}

/// A link that flips a bit in every fiftieth frame behind the backs of all checksums: nothing of it reaches the inner side.
#[test]
fn t4_a_link_that_flips_bits_damages_nothing() {
    isolated(|| {
        let mut flipping = link(50.0, 3.0);
        (flipping.a_to_b.corrupt, flipping.b_to_a.corrupt) = (0.02, 0.02);
        let scene = Scene::new(&[flipping, link(50.0, 5.0)]);
        let (branch, hub) = scene.pair();
        let (_branch, hub) = scene.join(&branch, &hub, 2);
        tcp_seconds(scene.a(), scene.b(), HUB_IP, 2, 4.0);
        udp_seconds(scene.b(), scene.a(), BRANCH_IP, udp::Options::new(10.0, Span::seconds(2.0)));
        wait_for("damage is counted", PATIENCE, || drops(&hub, &["auth-failed"]) > 10);
    });
}

/// A wrong key on either side: never up, both sides say why.
#[test]
fn t1_a_wrong_key_is_never_up_and_status_says_why() {
    isolated(|| {
        let scene = Scene::new(&[link(100.0, 1.0)]);
        let (branch, hub) = scene.pair();
        let stranger = Config::new("branch", BRANCH_IP);
        let wrong =
            |text: &Config, right: &str| text.text(&scene.directory).replace(right, &stranger.keys.public);
        // The hub knows another branch than the one that calls.
        let hub_text = wrong(&hub, &branch.keys.public);
        let at_hub = Gateway::start(scene.b(), &scene.directory, "hub", &hub_text);
        let mut at_branch = scene.start(scene.a(), &branch);
        at_branch.wait("it tries", PATIENCE, |report| {
            report.status.peers[0].reason == "no answer to the handshake"
                && report.status.peers[0].state == "connecting"
        });
        wait_for("the hub counts it", PATIENCE, || drops(&at_hub, &["handshake-unknown-peer"]) >= 2);
        assert_eq!(peer(&at_hub).state, "connecting");
        assert_eq!(peer(&at_hub).reason, "waiting for the peer to dial");
        drop(at_branch);
        // The branch believes in another hub than the one that listens.
        let branch_text = wrong(&branch, &hub.keys.public).replace("\"branch\"", "\"branch2\"");
        let at_branch = Gateway::start(scene.a(), &scene.directory, "branch", &branch_text);
        wait_for("the hub counts it", PATIENCE, || drops(&at_hub, &["handshake-mac"]) >= 2);
        assert_eq!(peer(&at_branch).state, "connecting");
        assert_eq!((peer(&at_branch).handshakes, peer(&at_hub).handshakes), (0, 0));
        let (code, text) = at_branch.command(&["status"]);
        assert!(code == 0 && text.contains("connecting: no answer to the handshake"), "{text}");
    });
}

/// Two peers with one key are an error of the configuration, with file, line and key.
#[test]
fn t1_two_peers_with_one_key_are_refused() {
    let directory = testbed::program::ScratchDir::new("anabranch-e2e").unwrap();
    let (one, mut two) = (Config::new("one", BRANCH_IP), Config::new("two", "10.77.0.3"));
    two.keys.public.clone_from(&one.keys.public);
    let hub = Config::new("hub", HUB_IP).node_line("listen = 4600");
    let hub = hub.peer(&one, &[], &one.own_nets(), "").peer(&two, &[], &two.own_nets(), "");
    let text = hub.text(&directory);
    let line =
        text.lines().enumerate().filter(|(_, line)| line.starts_with("public-key")).nth(1).unwrap().0 + 1;
    let file = directory.write("hub.toml", &text).unwrap();
    let output =
        std::process::Command::new(env!("CARGO_BIN_EXE_anabranch")).arg("up").arg(&file).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    let expected =
        format!("{}:{line}:14: error: peer.public-key: peer \"one\" has the same key", file.display());
    assert!(said.contains(&expected), "{said}");
}

/// A preshared key that only one side has, too.
#[test]
fn t1_another_preshared_key_is_never_up() {
    isolated(|| {
        let scene = Scene::new(&[link(100.0, 1.0)]);
        let (branch, hub) = scene.pair();
        let key =
            |config: Config, key: &Keys| config.section(&format!("preshared-key = \"{}\"\n", key.private));
        let (one, other) = (Keys::new(), Keys::new());
        let branch = key(branch, &one);
        let right = hub.text(&scene.directory) + &format!("preshared-key = \"{}\"\n", one.private);
        let hub = key(hub, &other);
        let at_hub = scene.start(scene.b(), &hub);
        let mut at_branch = scene.start(scene.a(), &branch);
        wait_for("responses that do not open", PATIENCE, || drops(&at_branch, &["handshake-failed"]) >= 2);
        assert_eq!((peer(&at_branch).handshakes, peer(&at_branch).state.as_str()), (0, "connecting"));
        assert_ne!(peer(&at_hub).state, "up");
        // The right one, by reload: joined.
        std::fs::write(&at_hub.config, right).unwrap();
        assert_eq!(at_hub.command(&["reload"]).0, 0);
        at_branch.wait("joined", PATIENCE, |report| paths_up(report) == 1);
        echo(scene.a(), scene.b(), HUB_IP);
    });
}
