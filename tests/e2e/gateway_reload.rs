//! A running gateway gets another configuration; wrong ones; devices that come late.

use crate::gateway_scene::*;
use crate::machine::isolated;
use crate::scene::*;

const NAT: &str = "[[nat]]\nout = \"lan2\"\n";

/// Rows C2, C6, C10: reloads that add and remove rules, NATs, servers and groups while connections run through all of them; none
/// breaks, each keeps its translation.
#[test]
fn c2_c6_reload_breaks_no_flow() {
    isolated(|| {
        let lans = Lans::new(3);
        let server = "[[virtual-server]]\nname = \"web\"\nlisten = \"tcp 10.1.1.10:80\"\nbackends = [\"10.1.2.2:80\"]\n";
        let forward = "[[forward]]\nlisten = \"tcp lan1:81\"\nto = \"10.1.3.2:80\"\n";
        let first = format!("{ALLOW}{NAT}{server}{forward}");
        let gateway = lans.start(&first);
        let _two = Mirror::start(lans.host(2), "two", "0.0.0.0:80");
        let _three = Mirror::start(lans.host(3), "three", "0.0.0.0:80");
        let open = |to: &str| Talk::open(lans.host(1), to).unwrap();
        let mut talks: Vec<Talk> =
            ["10.1.2.2:80", "10.1.1.10:80", "10.1.1.1:81"].repeat(6).into_iter().map(open).collect();
        let stream = Bulk::start(lans.host(1), "10.1.2.2:80", 2);
        let udp = UdpClient::new(lans.host(1), "0.0.0.0:0");
        let seen = udp.ask("10.1.2.2:80", 64);
        let era = services(&gateway).policy_era;
        let rules = "[[group]]\nname = \"some\"\nmembers = [\"10.1.1.2\"]\n\
                     [[rule]]\nname = \"a\"\naction = \"allow\"\nfrom = \"some\"\n";
        let without = server.replace("\"10.1.2.2:80\"", "\"10.1.3.2:80\"");
        let texts = [
            format!("{ALLOW}{NAT}{server}{forward}{rules}"),
            // Nothing new is translated or forwarded, what lives goes on; the server has another backend.
            format!("{ALLOW}{without}"),
            format!("{ALLOW}{NAT}mode = \"port-only\"\n{server}{forward}"),
            first.clone(),
        ];
        for text in texts.iter().cycle().take(12) {
            let (code, said) = lans.reload(&gateway, text);
            assert_eq!(code, 0, "{said}");
            for talk in &mut talks {
                talk.echo(5_000).unwrap();
            }
            assert_eq!(udp.ask("10.1.2.2:80", 64), seen, "another translation after a reload");
        }
        stream.finish();
        wait_for("what the reloads took is told", PATIENCE, || {
            let after = services(&gateway);
            let told = |core: &control::status::CoreServices| {
                core.reload_us_max > 0 && core.round_us_max >= core.reload_us_max
            };
            after.policy_era > era && after.cores.iter().all(told)
        });
        let after = services(&gateway);
        for core in &after.cores {
            // What a reload costs is said, and is part of a round.
            let (longest, cpu) = (core.reload_us_max, core.reload_cpu_us_max);
            assert!(longest >= core.reload_us_last && longest > 0 && cpu > 0, "{core:?}");
            assert!(core.round_us_max >= longest, "{core:?}");
        }
        assert_eq!(open("10.1.1.10:80").answer.name, "two");
        no_reply_went_astray(&gateway);
    });
}

/// Rows C2, C10: an interface that gets another name keeps its flows, its translation and its number; its device has no second one.
#[test]
fn c2_c10_a_reload_renames_an_interface() {
    isolated(|| {
        let lans = Lans::new(2);
        let gateway = lans.start(&format!("{ALLOW}{NAT}"));
        let _mirror = Mirror::start(lans.host(2), "server", "0.0.0.0:80");
        let mut talk = Talk::open(lans.host(1), "10.1.2.2:80").unwrap();
        let renamed = "[[interface]]\nname = \"inet\"\ndevice = \"lan2\"\n[[nat]]\nout = \"inet\"\n";
        let (code, said) = lans.reload(&gateway, &format!("{ALLOW}{renamed}"));
        assert!(code == 0 && said.contains("interface lan2: renamed to inet"), "{said}");
        let all = services(&gateway).interfaces;
        let names: Vec<_> = all.iter().map(|one| (one.name.as_str(), one.device.as_str())).collect();
        assert_eq!(names, [("lan1", "lan1"), ("inet", "lan2")]);
        talk.echo(5_000).unwrap();
        let answer = Talk::open(lans.host(1), "10.1.2.2:80").unwrap().answer;
        assert_eq!(answer.source.ip().to_string(), "10.1.2.1", "new connections are translated");
        assert_eq!(lans.reload(&gateway, &format!("{ALLOW}{NAT}")).0, 0);
        talk.echo(5_000).unwrap();
        no_reply_went_astray(&gateway);
    });
}

/// Rows C2, C6: a device gets another hardware address, and other cores read: sockets are opened anew while connections run. The
/// kernel answers none of their packets meanwhile, and their owners read them afterwards as before.
#[test]
fn c2_c6_interfaces_opened_anew_break_no_flow() {
    isolated(|| {
        let lans = Lans::new(2);
        let text = |distribution: &str| format!("{ALLOW}distribution = \"{distribution}\"\n{NAT}");
        let gateway = lans.start(&text("flow"));
        let _mirror = Mirror::start(lans.host(2), "server", "0.0.0.0:80");
        let stream = Bulk::start(lans.host(1), "10.1.2.2:80", 2);
        let mut talks: Vec<Talk> =
            (0..16).map(|_| Talk::open(lans.host(1), "10.1.2.2:80").unwrap()).collect();
        let mut all_answer = |what: &str| {
            for talk in &mut talks {
                talk.echo(5_000).unwrap_or_else(|error| panic!("{what}: {error}"));
            }
        };
        for last in 1..=6 {
            shell(lans.gateway(), &format!("ip link set lan2 address 02:00:00:00:77:0{last}"));
            shell(lans.host(2), "ip neigh flush all");
            all_answer("another hardware address");
        }
        for distribution in ["interface", "flow", "random", "flow"] {
            let (code, said) = lans.reload(&gateway, &text(distribution));
            assert_eq!(code, 0, "{said}");
            all_answer(distribution);
            if distribution == "flow" {
                let before = handed_over(&gateway);
                all_answer("by their owners");
                let handed = handed_over(&gateway) - before;
                assert!(handed < 20, "{handed} of many packets were read by other cores");
            }
        }
        stream.finish();
        no_reply_went_astray(&gateway);
    });
}

/// Row C10: a wrong configuration is refused with file, line, key and what would be right, by `check`, `up` and `reload`; the
/// running gateway goes on unchanged.
#[test]
fn c10_wrong_configurations_are_refused() {
    isolated(|| {
        let lans = Lans::new(2);
        let good = format!("{ALLOW}{NAT}");
        let gateway = lans.start(&good);
        let _mirror = Mirror::start(lans.host(2), "server", "0.0.0.0:80");
        lans.scene.expect_error("reload refused");
        let mut talk = Talk::open(lans.host(1), "10.1.2.2:80").unwrap();
        let wrong = [
            ("[[nat]]\nout = \"lan9\"\n", "lan9"),
            ("[[nat]]\nout = \"lan2\"\nmode = \"adress-and-port\"\n", "address-and-port"),
            ("[[virtual-server]]\nlisten = \"10.1.1.10:80\"\nbackends = [\"10.1.2.2:80\"]\n", "tcp"),
            ("[[virtual-server]]\nlisten = \"tcp 10.1.1.10:80\"\nbackends = [\"10.1.2.2\"]\n", "no port"),
            ("[[rule]]\naction = \"alow\"\n", "allow"),
            ("[[rule]]\naction = \"allow\"\nfrom = \"lan12\"\n", "lan12"),
            ("[[rule]]\naction = \"allow\"\nprotocol = \"icmp\"\nport = 80\n", "no ports"),
            ("[[forward]]\nlisten = \"tcp lan2:80\"\n", "to"),
            ("[[interface]]\nname = \"lan1\"\n", "two interfaces"),
            (
                "[[lease]]\nname = \"pod\"\nfrom = \"10.1.1.0/24\"\naddress = \"10.1.2.1\"\nfirst-port = 1000\nports = 1024\n",
                "1024",
            ),
            ("[[tenant]]\nname = \"gateway\"\n", "gateway"),
            ("[[group]]\nname = \"g\"\nmembers = [\"10.0.0.0/33\"]\n", "10.0.0.0/33"),
            ("[[health]]\n", "health"),
        ];
        for (section, hint) in wrong {
            let (code, _) = lans.reload(&gateway, &format!("{good}{section}"));
            assert_eq!(code, 1, "{section}");
            for verb in ["check", "up"] {
                let said = try_shell(
                    lans.host(1),
                    &format!(
                        "'{}' {verb} '{}' 2>&1; echo code $?",
                        env!("CARGO_BIN_EXE_anabranch"),
                        gateway.config.display()
                    ),
                )
                .unwrap();
                assert!(said.contains("code 1"), "{verb} {section}: {said}");
                assert!(said.contains("gw.toml:") && said.contains(hint), "{verb} {section}: {said}");
            }
            talk.echo(1_000).unwrap();
        }
        assert_eq!(lans.reload(&gateway, &good).0, 0);
        talk.echo(1_000).unwrap();
    });
}

/// Rows C2, C6, C10: a virtual server and a pool's address leave the configuration: their connections go on, also when the
/// neighbours ask for the addresses again; nothing new gets there, and the addresses go when the connections have.
#[test]
fn c2_c6_c10_addresses_stay_until_their_flows_end() {
    isolated(|| {
        let lans = Lans::new(2);
        let server = "[[virtual-server]]\nlisten = \"tcp 10.1.1.10:80\"\nbackends = [\"10.1.2.2:80\"]\n";
        let pool = "[[nat]]\nout = \"lan2\"\naddresses = [\"10.1.2.16\"]\n";
        let gateway = lans.start(&format!("{ALLOW}{server}{pool}"));
        let _mirror = Mirror::start(lans.host(2), "server", "0.0.0.0:80");
        let there = || {
            let list = shell(lans.gateway(), "ip -o -4 address show");
            ["10.1.1.10/32", "10.1.2.16/32"].map(|net| list.contains(net))
        };
        let mut served = Talk::open(lans.host(1), "10.1.1.10:80").unwrap();
        let mut translated = Talk::open(lans.host(1), "10.1.2.2:80").unwrap();
        assert_eq!(translated.answer.source.ip().to_string(), "10.1.2.16");
        let (code, text) = lans.reload(&gateway, &format!("{ALLOW}{NAT}"));
        assert_eq!((code, there()), (0, [true, true]), "{text}");
        for number in [1, 2] {
            shell(lans.host(number), "ip neigh flush all");
        }
        served.echo(50_000).unwrap();
        translated.echo(50_000).unwrap();
        // Nothing new: the host answers for itself, and the pool is the interface's own address.
        assert!(Talk::open(lans.host(1), "10.1.1.10:80").is_err());
        assert_eq!(ask_tcp(lans.host(1), "10.1.2.2:80").source.ip(), gateway_ip(2));
        assert_eq!(there(), [true, true]);
        drop(served);
        wait_for("the server's address goes", 60.0, || there() == [false, true]);
        translated.echo(50_000).unwrap();
        // One that is wanted again stays for good.
        assert_eq!(lans.reload(&gateway, &format!("{ALLOW}{pool}")).0, 0);
        drop(translated);
        wait_for("its flow is gone", 60.0, || flows(&gateway, "tcp 10.1.2.16").flows.is_empty());
        assert_eq!(ask_tcp(lans.host(1), "10.1.2.2:80").source.ip().to_string(), "10.1.2.16");
        assert_eq!(there(), [false, true]);
    });
}

/// Row C10: exit codes of the commands that ask a gateway: 3 when none answers.
#[test]
fn c10_without_a_gateway_commands_say_so() {
    let socket = "/nonexistent/anabranch.sock";
    for arguments in [
        vec!["status", "--flows"],
        vec!["explain", "tcp 10.0.0.1:1 > 10.0.0.2:2"],
        vec!["lease", "list"],
        vec!["group", "list"],
        vec!["backend", "drain", "web", "10.0.0.1:80"],
        vec!["core", "drain", "1"],
    ] {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_anabranch"));
        let output = command.args(&arguments).args(["--socket", socket]).output().unwrap();
        assert_eq!(output.status.code(), Some(3), "{arguments:?}");
        assert!(!output.stderr.is_empty(), "{arguments:?}");
    }
}

/// Rows C1, C10: a device that is not there yet is named in the view and used as soon as it comes; one that goes and comes back
/// works again, and so does its NAT.
#[test]
fn c1_c10_devices_come_and_go() {
    isolated(|| {
        let lans = Lans::new(2);
        let _mirror = Mirror::start(lans.host(2), "server", "0.0.0.0:80");
        let text = lans.text(&format!("{ALLOW}[[interface]]\nname = \"late\"\n{NAT}"));
        let mut gateway = Gateway::start(lans.gateway(), &lans.scene.directory, "gw", &text);
        gateway.wait("the others are up", PATIENCE, |report| {
            report
                .gateway
                .as_ref()
                .is_some_and(|all| all.interfaces.iter().filter(|i| i.state == "up").count() == 2)
        });
        assert!(curl(lans.host(1), "10.1.2.2").is_ok());
        shell(lans.gateway(), "ip link add late type veth peer name other && ip link set other up");
        shell(lans.gateway(), "ip link set late up && ip addr add 10.8.0.1/24 dev late");
        ready(&mut gateway);
        // The cable of the outside is pulled.
        shell(lans.host(2), "ip link set eth0 down");
        gateway.wait("no carrier", PATIENCE, |report| {
            report
                .gateway
                .as_ref()
                .is_some_and(|all| all.interfaces.iter().any(|i| i.name == "lan2" && i.state != "up"))
        });
        shell(lans.host(2), "ip link set eth0 up");
        ready(&mut gateway);
        wait_for("it works again", PATIENCE, || curl_for(lans.host(1), "10.1.2.2", 2).is_ok());
    });
}

/// Row C10: what the gateway adds to devices is gone when it ends, and the host's kernel is as before.
#[test]
fn c10_nothing_is_left_behind() {
    isolated(|| {
        let lans = Lans::new(2);
        let state = || {
            let addresses = shell(lans.gateway(), "ip -o address show scope global | sort");
            let filters = shell(lans.gateway(), "tc filter show dev lan1 ingress; tc qdisc show dev lan1");
            addresses + &filters
        };
        wait_for("no tentative addresses", PATIENCE, || {
            !shell(lans.gateway(), "ip -6 address").contains("tentative")
        });
        let before = state();
        let gateway = lans.start(&format!(
            "{ALLOW}[[interface]]\nname = \"one\"\ndevice = \"lan1\"\naddress = \"10.50.0.1/24\"\n\
             [[nat]]\nout = \"lan2\"\naddresses = [\"10.1.2.16/30\"]\n"
        ));
        assert_ne!(state(), before);
        assert_eq!(gateway.command(&["stop"]).0, 0);
        drop(gateway);
        for _ in 0..100 {
            if state() == before {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        assert_eq!(state(), before);
    });
}
