//! Health checks of a virtual server's backends: the process that makes them, and real servers that it checks.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use control::status::{BackendStatus, HealthProcessStatus};
use testbed::program::{Program, ScratchDir};
use testbed::topology::Node;

use crate::gateway_scene::*;
use crate::machine::isolated;
use crate::scene::*;

fn backend(gateway: &Gateway, number: usize) -> BackendStatus {
    services(gateway).virtual_servers[0].backends[number].clone()
}

fn process(gateway: &Gateway) -> HealthProcessStatus {
    services(gateway).health_checks.unwrap_or_default()
}

const QUICK: &str = "interval-ms = 200, timeout-ms = 200, fall = 2, rise = 2";

fn tcp_server(health: &str) -> String {
    format!(
        "{ALLOW}[[virtual-server]]\nname = \"web\"\nlisten = \"tcp 10.1.1.10:80\"\n\
         backends = [\"10.1.2.2:80\", \"10.1.3.2:80\"]\nhealth = {{ {health}, {QUICK} }}\n"
    )
}

/// Row C6: checks are made by a process that has no rights and none of the gateway's descriptors. When it is killed, verdicts
/// stay, traffic flows, `status` says so, and its successor goes on from there; a reload does not disturb it.
#[test]
fn c6_checks_are_made_by_a_process_of_their_own() {
    isolated(|| {
        let lans = Lans::new(3);
        let first = Mirror::start(lans.host(2), "backend2", "0.0.0.0:80");
        let second = Mirror::start(lans.host(3), "backend3", "0.0.0.0:80");
        let gateway = lans.start(&tcp_server("tcp = true"));
        wait_for("the process", PATIENCE, || process(&gateway).running);
        let begun = process(&gateway);
        drop(first);
        wait_for("a dead backend", PATIENCE, || backend(&gateway, 0).state == "down");
        assert!(backend(&gateway, 0).reason.contains("refused"), "{:?}", backend(&gateway, 0));

        let of = |name: &str| std::fs::read_to_string(format!("/proc/{}/{name}", begun.process)).unwrap();
        assert!(of("cmdline").starts_with("anabranch\0health\0--user\x0065534:65534\0"), "{}", of("cmdline"));
        let status = of("status");
        for line in ["CapPrm:\t0000000000000000", "CapEff:\t0000000000000000", "NoNewPrivs:\t1"] {
            assert!(status.contains(line), "{status}");
        }
        let changed_user = status.contains("Uid:\t65534\t65534\t65534\t65534");
        assert_ne!(changed_user, begun.kept_rights.contains("user"), "{begun:?}\n{status}");
        let descriptors: Vec<String> = std::fs::read_dir(format!("/proc/{}/fd", begun.process))
            .unwrap()
            .filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok())
            .map(|link| link.display().to_string())
            .collect();
        let is_foreign = |link: &&String| {
            let own =
                ["socket:", "anon_inode:[event", "/dev/null", "pipe:"].iter().any(|it| link.starts_with(it));
            !own && !link.ends_with("/gw.log")
        };
        assert_eq!(descriptors.iter().find(is_foreign), None, "{descriptors:?}");
        assert!(descriptors.len() < 40, "{descriptors:?}");

        // Its end is nobody else's.
        assert!(process(&gateway) == begun && begun.restarts == 0);
        shell(lans.gateway(), &format!("kill -9 {}", begun.process));
        wait_for("a successor", PATIENCE, || {
            assert_eq!(
                (backend(&gateway, 0).state, backend(&gateway, 1).state),
                ("down".into(), "up".into())
            );
            assert_eq!(ask_tcp(lans.host(1), "10.1.1.10:80").name, "backend3");
            let now = process(&gateway);
            now.running && now.process != begun.process
        });
        let successor = process(&gateway);
        assert_eq!(successor.restarts, 1);
        assert!(successor.last_end.contains("signal: 9"), "{successor:?}");
        let (_, text) = gateway.command(&["status"]);
        assert!(text.contains("health checks: by process") && text.contains("signal: 9"), "{text}");
        let _first = Mirror::start(lans.host(2), "backend2", "0.0.0.0:80");
        wait_for("the successor's verdict", PATIENCE, || backend(&gateway, 0).state == "up");
        drop(second);
        wait_for("its verdict of the other", PATIENCE, || backend(&gateway, 1).state == "down");

        // A reload with another kind of check: the same process, and the verdicts hold until it has others.
        let other = tcp_server("http = \"/health\", fall = 3").replace(", fall = 2", "");
        assert_eq!(lans.reload(&gateway, &other).0, 0);
        assert_eq!((backend(&gateway, 0).state, backend(&gateway, 1).state), ("up".into(), "down".into()));
        assert_eq!(process(&gateway), successor);
        // Without checks nothing is left to do, and none is down.
        let text = tcp_server("tcp = true");
        let none: Vec<&str> = text.lines().filter(|line| !line.starts_with("health")).collect();
        assert_eq!(lans.reload(&gateway, &none.join("\n")).0, 0);
        wait_for("no process", PATIENCE, || {
            !process(&gateway).running && !Path::new(&format!("/proc/{}", successor.process)).exists()
        });
        wait_for("none is down", PATIENCE, || backend(&gateway, 1).state == "up");
    });
}

/// Row C6: checks have the rights of the user who is configured; a reload with another one makes another process.
#[test]
fn c6_checks_have_a_users_rights() {
    isolated(|| {
        let lans = Lans::new(3);
        let _mirrors = [2, 3].map(|number| Mirror::start(lans.host(number), "backend", "0.0.0.0:80"));
        let server = tcp_server("tcp = true");
        let gateway = lans.start(&server);
        wait_for("the process", PATIENCE, || process(&gateway).running);
        let first = process(&gateway);
        let daemon = server.replace("[[virtual", "health-user = \"daemon\"\n[[virtual");
        assert_eq!(lans.reload(&gateway, &daemon).0, 0);
        wait_for("another process", PATIENCE, || {
            let now = process(&gateway);
            now.running && now.process != first.process
        });
        let of = |name: &str| {
            std::fs::read_to_string(format!("/proc/{}/{name}", process(&gateway).process)).unwrap()
        };
        assert!(of("cmdline").contains("--user\x001:1\0"), "{}", of("cmdline"));
        let changed_user = of("status").contains("Uid:\t1\t1\t1\t1");
        assert_ne!(changed_user, process(&gateway).kept_rights.contains("user"), "{}", of("status"));
    });
}

/// nginx with TLS and the PROXY protocol on port 443, the same without on 444; ended when dropped.
struct Nginx {
    directory: ScratchDir,
    server: Program,
}

impl Nginx {
    fn start(place: &Node) -> Self {
        let directory = ScratchDir::new("anabranch-nginx").unwrap();
        // The process that checks is another user.
        std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let at = directory.path().display();
        shell(
            place,
            &format!(
                "cd {at} && umask 022 && openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes \
                 -keyout ca.key -out ca.pem -subj /CN=authority -days 2 2>&1 && \
                 openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout server.key \
                 -out server.csr -subj /CN=good.test 2>&1 && echo subjectAltName=DNS:good.test > names && \
                 openssl x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 \
                 -out server.pem -extfile names 2>&1 && cp ca.pem other.pem && openssl req -x509 -newkey ec \
                 -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout other.key -out other.pem -subj /CN=other \
                 -days 2 2>&1"
            ),
        );
        let servers = |listen: &str| {
            format!(
                "server {{ listen {listen} default_server; ssl_reject_handshake on; }}\n\
                 server {{ listen {listen}; server_name good.test; ssl_certificate server.pem;\n\
                 ssl_certificate_key server.key;\n\
                 location /health {{ return 200 \"ready for $remote_addr\\n\"; }}\n\
                 location /busy {{ return 503; }} }}\n"
            )
        };
        let proxied = servers("443 ssl proxy_protocol");
        let plain = servers("444 ssl");
        let text = format!(
            "daemon off; master_process off; pid {at}/pid; error_log {at}/error.log info;\nevents {{}}\n\
             http {{ access_log {at}/access.log;\n{proxied}{plain}}}\n"
        );
        directory.write("nginx.conf", text).unwrap();
        let mut command = Command::new("/usr/sbin/nginx");
        command.args([
            "-p",
            &at.to_string(),
            "-c",
            &format!("{at}/nginx.conf"),
            "-e",
            &format!("{at}/error.log"),
        ]);
        let log = directory.path().join("nginx.log");
        let server = place.start(command, Some(&log)).unwrap();
        Self { directory, server }
    }

    fn errors(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("error.log")).unwrap_or_default()
    }
}

/// Row C6: a real server with TLS, name and certificate, behind the PROXY protocol; each condition is looked at, and the
/// server sees neither a reset nor a broken header.
#[test]
fn c6_health_by_https() {
    isolated(|| {
        let lans = Lans::new(2);
        let mut nginx = Nginx::start(lans.host(2));
        let at = nginx.directory.path().display().to_string();
        shell(lans.gateway(), "ip addr add 10.1.2.9/24 dev lan2");
        let section = |proxied: bool, health: &str| {
            format!(
                "{ALLOW}[[virtual-server]]\nname = \"web\"\nlisten = \"tcp 10.1.1.10:443\"\n\
                 backends = [\"10.1.2.2:443\"]\nproxy-protocol = {proxied}\n\
                 health = {{ {health}, interval-ms = 200, timeout-ms = 2000, fall = 2, rise = 2 }}\n"
            )
        };
        let good = format!("https = \"/health\", sni = \"good.test\", ca-file = \"{at}/ca.pem\"");
        let gateway = lans.start(&section(true, &format!("{good}, body = \"ready\"")));
        let up = || wait_for("up", PATIENCE, || backend(&gateway, 0).state == "up" && is_checked(&nginx));
        fn is_checked(nginx: &Nginx) -> bool {
            let log = std::fs::read_to_string(nginx.directory.path().join("access.log"));
            log.is_ok_and(|log| log.contains("GET /health HTTP/1.1\" 200"))
        }
        up();
        let (good_at_444, name) =
            (format!("{good}, port = 444"), "https = \"/health\", host = \"good.test\"");
        for (proxied, health, reason) in [
            (true, good.replace("good.test", "bad.test"), "TLS: received fatal alert"),
            (true, good.replace("ca.pem", "other.pem"), "TLS: invalid peer certificate: UnknownIssuer"),
            (true, format!("{good}, body = \"never\""), "does not contain \"never\""),
            (true, good.replace("/health", "/busy"), "HTTP status 503"),
            (true, good.replace("/health", "/busy") + ", status = [503]", ""),
            (true, name.to_owned(), ""),
            (true, "tls = true".to_owned(), "TLS: received fatal alert"),
            (true, "tls = true, sni = \"good.test\"".to_owned(), ""),
            (false, good.clone(), ""),
            (true, good_at_444.clone(), ""),
            (true, format!("{good_at_444}, proxy-protocol = true"), ""),
            (true, format!("{good_at_444}, body = \"for 10.1.2.1\\n\""), ""),
            (true, format!("{good_at_444}, body = \"for 10.1.2.9\""), "does not contain"),
            (true, format!("{good_at_444}, body = \"for 10.1.2.9\", source = \"10.1.2.9\""), ""),
        ] {
            // Where the header is missing or too much, the server ends the connection.
            let speaks_wrongly = (!proxied && health == good) || health.ends_with("proxy-protocol = true");
            let state = if reason.is_empty() && !speaks_wrongly { "up" } else { "down" };
            assert_eq!(lans.reload(&gateway, &section(proxied, &health)).0, 0, "{health}");
            if state == "up" {
                // It is up already: two checks that fail would show.
                std::thread::sleep(Duration::from_millis(900));
            }
            wait_for(&format!("{state}: {health}"), PATIENCE, || {
                let backend = backend(&gateway, 0);
                backend.state == state && (state == "up" || backend.reason.contains(reason))
            });
            if state == "down" {
                assert_eq!(lans.reload(&gateway, &section(true, &good)).0, 0);
                wait_for("up again", PATIENCE, || backend(&gateway, 0).state == "up");
            }
        }
        let errors = nginx.errors();
        assert!(!errors.to_lowercase().contains("reset"), "{errors}");
        nginx.server.check_alive().unwrap();
    });
}
