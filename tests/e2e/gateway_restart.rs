//! The program is stopped and started again while connections are open: a clean end hands all flows to the next run.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use testbed::topology::Node;

use crate::gateway_clients::*;
use crate::gateway_scene::*;
use crate::machine::isolated;
use crate::scene::*;

const NAT: &str = "[[nat]]\nout = \"lan2\"\n";

/// Where the virtual server listens: an address that only the gateway has, and only while it runs.
const SERVER: &str = "10.1.2.100:80";

/// On a machine that is busy with other tests a restart takes its time.
const PATIENT: &str = "keep-flows-seconds = 60\n";

fn sections(more: &str) -> String {
    format!("{ALLOW}{PATIENT}{NAT}{more}")
}

fn flows_file(lans: &Lans) -> PathBuf {
    lans.scene.directory.path().join("gw.flows")
}

/// Stops the gateway in order; so long nobody is there.
fn restart(lans: &Lans, mut gateway: Running, sections: &str, pause: Duration) -> Running {
    gateway.program.signal(Signal::TERM).unwrap();
    assert!(gateway.program.wait(Duration::from_secs(20)).unwrap().is_some_and(|status| status.success()));
    assert!(flows_file(lans).exists());
    std::thread::sleep(pause);
    let next = lans.start(sections);
    assert!(!flows_file(lans).exists(), "it is read once");
    next
}

/// Resets that this node's kernel has sent.
fn resets(place: &Node) -> u64 {
    let text = shell(place, "nstat -asz TcpOutRsts | tail -1");
    text.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Tuples as they are outside.
fn outside(gateway: &Gateway, words: &str) -> BTreeSet<String> {
    let list = flows(gateway, words).flows;
    list.iter().map(|flow| format!("{} {}", flow.source, flow.translated_source)).collect()
}

/// How many flows were taken over, and how many not.
fn taken_over(gateway: &Gateway) -> (u64, u64) {
    let taken = services(gateway).taken_over.unwrap_or_default();
    (taken.flows, taken.lost.values().sum())
}

/// Row C2: a start that fails after it has found the flows leaves them to the next one.
#[test]
fn c2_a_start_that_fails_loses_no_flow() {
    isolated(|| {
        let lans = Lans::new(2);
        let (client, server) = (lans.host(1), lans.host(2));
        let sections = sections("");
        let mut gateway = lans.start(&sections);
        let _mirror = Mirror::start(server, "server", "0.0.0.0:80");
        let mut talk = Talk::open(client, "10.1.2.2:80").unwrap();
        gateway.program.signal(Signal::TERM).unwrap();
        gateway.program.wait(Duration::from_secs(20)).unwrap();
        let text = lans.text(&sections).replacen("[node]\n", "[node]\nlisten = 4600\nlisten-tls = 443\n", 1);
        let config = lans.scene.directory.write("taken.toml", &text).unwrap();
        let holder = tcp_listener(lans.gateway(), "[::]:443");
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_anabranch"));
        command.arg("up").arg(config);
        let refused = format!("{:#}", lans.gateway().output(command).unwrap_err());
        assert!(refused.contains("TCP port 443 is taken"), "{refused}");
        drop(holder);
        let gateway = lans.start(&sections);
        wait_for("the flow is taken over", PATIENCE, || taken_over(&gateway).0 >= 1);
        talk.echo(20_000).unwrap();
    });
}

/// Row C2: 200 connections through a NAT, some of them busy, a UDP association and a ping go on over two restarts with the
/// ports that they had, and nobody sends a reset.
#[test]
fn c2_a_restart_breaks_no_flow_of_a_nat() {
    isolated(|| {
        let lans = Lans::new(2);
        let (client, server) = (lans.host(1), lans.host(2));
        let sections = sections("");
        let mut gateway = lans.start(&sections);
        let _mirror = Mirror::start(server, "server", "0.0.0.0:80");
        let ssh = Ssh::start(server, 2222);
        let mut session = ssh.session(client, "10.1.2.2");
        let mut talks: Vec<Talk> = (0..200).map(|_| Talk::open(client, "10.1.2.2:80").unwrap()).collect();
        let udp = UdpClient::new(client, "0.0.0.0:0");
        let before = udp.ask("10.1.2.2:80", 64);
        assert_eq!(before.source.ip(), gateway_ip(2));
        let ports = outside(&gateway, "10.1.2.2");
        assert!(ports.len() >= 202, "{}", ports.len());
        let sent = resets(lans.gateway());
        for pause in [Duration::from_millis(1_500), Duration::ZERO] {
            let bulk = Bulk::start(client, "10.1.2.2:80", 4);
            gateway = restart(&lans, gateway, &sections, pause);
            let (taken, lost) = taken_over(&gateway);
            assert!(taken >= 206 && lost == 0, "{taken} {lost}");
            bulk.finish();
            assert!(outside(&gateway, "10.1.2.2").is_superset(&ports));
            for talk in &mut talks {
                talk.echo(1_000).unwrap();
            }
            session.echo("again");
            assert_eq!(udp.try_ask("10.1.2.2:80", 64).as_ref(), Some(&before));
            no_reply_went_astray(&gateway);
        }
        assert_eq!(resets(lans.gateway()), sent, "the kernel answered for connections that it does not know");
        let log = gateway.log();
        assert!(log.contains("flows taken over from the run before, 0 not"), "{log}");
        // What ends now gives its port back.
        drop(talks);
        wait_for("few flows", PATIENCE, || services(&gateway).nats[0].live_flows < 100);
    });
}

/// Row C6: connections to a virtual server stay at their backends, whose address is the gateway's while it is away.
#[test]
fn c6_a_restart_breaks_no_connection_to_a_virtual_server() {
    isolated(|| {
        for source in ["none", "port-only", "address-and-port"] {
            let lans = Lans::new(3);
            let client = lans.host(2);
            let sections = format!(
                "{ALLOW}{PATIENT}[[virtual-server]]\nname = \"web\"\nlisten = \"tcp {SERVER}\"\nsource = \"{source}\"\n\
                 backends = [\"10.1.1.2:80\", \"10.1.3.2:80\"]\n"
            );
            let mut gateway = lans.start(&sections);
            let _one = Mirror::start(lans.host(1), "one", "0.0.0.0:80");
            let _other = Mirror::start(lans.host(3), "other", "0.0.0.0:80");
            let mut talks: Vec<Talk> = (0..40).map(|_| Talk::open(client, SERVER).unwrap()).collect();
            let sent = resets(lans.gateway());
            for pause in [Duration::from_millis(1_200), Duration::ZERO] {
                let bulk = Bulk::start(client, SERVER, 2);
                gateway = restart(&lans, gateway, &sections, pause);
                bulk.finish();
                for talk in &mut talks {
                    talk.echo(1_000).unwrap();
                }
                assert!(services(&gateway).virtual_servers[0].live_connections >= 40);
            }
            assert_eq!((resets(lans.gateway()), taken_over(&gateway).1), (sent, 0), "{source}");
            // The address that waited for the next run is its own again.
            let addresses = shell(lans.gateway(), "ip -4 address show dev lan2");
            let server = addresses.split("10.1.2.100/32").nth(1).unwrap();
            assert!(server.contains("valid_lft forever"), "{addresses}");
            assert_eq!(gateway.command(&["stop"]).0, 0);
        }
    });
}

/// Nobody comes after the end: the kernel has its interfaces back when the time is over, and the addresses are gone.
#[test]
fn without_a_next_run_the_host_is_as_before() {
    isolated(|| {
        let lans = Lans::new(2);
        let keep = "keep-flows-seconds = 2\n";
        let text = format!("{ALLOW}{keep}{NAT}addresses = [\"10.1.2.1\", \"10.1.2.50\"]\n");
        let mut gateway = lans.start(&text);
        let _mirror = Mirror::start(lans.host(2), "server", "0.0.0.0:80");
        let mut talk = Talk::open(lans.host(1), "10.1.2.2:80").unwrap();
        let stopped = Instant::now();
        assert!(gateway.program.stop().unwrap().success());
        let connects = || {
            let to: std::net::SocketAddr = "10.1.2.1:5000".parse().unwrap();
            let patience = Duration::from_millis(200);
            let connect = || std::net::TcpStream::connect_timeout(&to, patience);
            lans.host(2).run(connect).unwrap().unwrap_err().kind()
        };
        let addresses = || shell(lans.gateway(), "ip -4 address show dev lan2");
        if stopped.elapsed() < Duration::from_secs(1) {
            assert_eq!(connects(), std::io::ErrorKind::TimedOut, "a port of flows waits");
            assert!(addresses().contains("10.1.2.50"));
        }
        // The host itself answers all the time.
        ping(lans.host(2), "-c 2 10.1.2.1");
        wait_for("the kernel", PATIENCE, || connects() == std::io::ErrorKind::ConnectionRefused);
        assert!(stopped.elapsed() > Duration::from_secs(2));
        wait_for("no address", PATIENCE, || !addresses().contains("10.1.2.50"));
        // A late start uses what is still of use; the table is gone with it.
        let gateway = lans.start(&text);
        assert_eq!(taken_over(&gateway).0, 1);
        assert!(!shell(lans.gateway(), "nft list tables").contains("anabranch_hold"));
        let _ = talk.echo(10);
        assert_eq!(gateway.command(&["stop"]).0, 0);
    });
}

/// A crash hands nothing over: the next run resets what is forgotten, at the inside.
#[test]
fn a_crash_leaves_no_flows() {
    isolated(|| {
        let lans = Lans::new(2);
        let mut gateway = lans.start(&sections(""));
        let _mirror = Mirror::start(lans.host(2), "server", "0.0.0.0:80");
        let mut talk = Talk::open(lans.host(1), "10.1.2.2:80").unwrap();
        gateway.program.signal(Signal::KILL).unwrap();
        assert!(gateway.program.wait(Duration::from_secs(5)).unwrap().is_some());
        assert!(!flows_file(&lans).exists());
        let gateway = lans.start(&sections(""));
        assert_eq!(services(&gateway).taken_over, None);
        let error = talk.echo(1_000).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}");
    });
}

/// Flows that the next configuration does not want end, with the reason; `keep-flows-seconds = 0` hands nothing over.
#[test]
fn flows_that_do_not_fit_the_next_configuration_end() {
    isolated(|| {
        let lans = Lans::new(2);
        let gateway = lans.start(&sections(""));
        let _mirror = Mirror::start(lans.host(2), "server", "0.0.0.0:80");
        let _talks: Vec<Talk> = (0..5).map(|_| Talk::open(lans.host(1), "10.1.2.2:80").unwrap()).collect();
        let refusing = sections("[[rule]]\naction = \"drop\"\nfrom = \"lan1\"\nprotocol = \"tcp\"\n");
        let mut gateway = restart(&lans, gateway, &refusing, Duration::ZERO);
        let taken = services(&gateway).taken_over.unwrap();
        assert_eq!(taken.lost.get("firewall"), Some(&5), "{taken:?}");
        let (_, text) = gateway.command(&["status"]);
        assert!(text.contains("flows taken over from the run before, 5 not: firewall 5"), "{text}");
        assert!(gateway.program.stop().unwrap().success());
        let none = format!("{ALLOW}keep-flows-seconds = 0\n{NAT}");
        let mut gateway = lans.start(&none);
        let _talk = Talk::open(lans.host(1), "10.1.2.2:80").unwrap();
        assert!(gateway.program.stop().unwrap().success());
        assert!(!flows_file(&lans).exists());
        assert!(!shell(lans.gateway(), "nft list tables").contains("anabranch_hold"));
    });
}

/// A file that cannot be written costs the flows and nothing else: the end is in order and leaves nothing, the log says why.
#[test]
fn a_file_that_cannot_be_written_costs_only_the_flows() {
    isolated(|| {
        let lans = Lans::new(2);
        // What is in the way cannot be removed.
        std::fs::create_dir(lans.scene.directory.path().join("gw.flows-new")).unwrap();
        let mut gateway = lans.start(&sections(""));
        let _mirror = Mirror::start(lans.host(2), "server", "0.0.0.0:80");
        let _talk = Talk::open(lans.host(1), "10.1.2.2:80").unwrap();
        assert!(gateway.program.stop().unwrap().success());
        assert!(gateway.log().contains("the next run begins without flows"), "{}", gateway.log());
        assert!(!shell(lans.gateway(), "nft list tables").contains("anabranch_hold"));
        let gateway = lans.start(&sections(""));
        assert_eq!(services(&gateway).taken_over, None);
        assert_eq!(ask_tcp(lans.host(1), "10.1.2.2:80").name, "server");
    });
}
