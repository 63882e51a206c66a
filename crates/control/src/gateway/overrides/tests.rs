#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::config::tests::config;
use crate::gateway::policy::gateway_spec;

const BASE: &str = "[[interface]]\nname = \"wan\"\ndevice = \"eth0\"\n[[tenant]]\nname = \"red\"\n[[group]]\nname = \"g\"\n\
                    members = [\"192.0.2.0/24\"]\n[[virtual-server]]\nname = \"web\"\nlisten = \"tcp 203.0.113.10:80\"\n\
                    backends = [\"10.0.0.1:80\", \"10.0.0.1:81\"]\n[[nat]]\nout = \"wan\"\nports = \"1024-8191\"\n\
                    addresses = [\"203.0.113.20\", \"203.0.113.21\"]\n[[lease]]\nname = \"fixed\"\nfrom = \"10.9.0.0/16\"\n\
                    address = \"203.0.113.20\"\nfirst-port = 2048\nports = 2048\n";

fn all() -> (Services, GatewaySpec) {
    let config = config("", BASE);
    let spec = gateway_spec(&config, &crate::gateway::policy::tests::facts(), &Overrides::default());
    (config.services, spec)
}

fn wish(name: &str, from: &str, ports: u32) -> LeaseWish {
    LeaseWish { name: name.to_owned(), from: from.parse().unwrap(), tenant: None, address: None, ports }
}

#[test]
fn groups_change_and_change_back() {
    let (services, _) = all();
    let mut live = Overrides::default();
    let nets: Vec<IpNet> =
        ["192.0.2.0/24", "10.0.0.1/8", "10.0.0.0/8"].map(|net| net.parse().unwrap()).to_vec();
    assert_eq!(live.change_group(&services, "g", &nets, true), Ok(1));
    assert_eq!(live.members(&services.groups[0]).len(), 2);
    assert_eq!(live.change_group(&services, "g", &nets, false), Ok(2));
    assert_eq!(live.members(&services.groups[0]), []);
    let report = &live.list_groups(&services, Some("g")).unwrap()[0];
    assert_eq!((report.members, report.added.len(), report.removed.len()), (0, 0, 1));
    assert_eq!(live.change_group(&services, "g", &nets[..1], true), Ok(1));
    assert_eq!(live, Overrides::default());
    assert!(live.change_group(&services, "h", &nets, true).unwrap_err().to_string().contains("there are g"));
}

#[test]
fn backends_are_drained_and_weighed() {
    let (services, _) = all();
    let backend = &services.servers[0].backends[0];
    let mut live = Overrides::default();
    let mut change = |wish| {
        live.change_backend(&services, "web", "10.0.0.1:80", wish).unwrap();
        live.weight("web", backend)
    };
    assert_eq!(change(BackendWish::Weight(7)), 7);
    assert_eq!(change(BackendWish::Drain), 0);
    assert_eq!(change(BackendWish::Enable), 7);
    for (server, backend) in [("web", "10.0.0.1"), ("web", "10.0.0.9:80"), ("wep", "10.0.0.1:80")] {
        assert!(
            live.change_backend(&services, server, backend, BackendWish::Drain).is_err(),
            "{server} {backend}"
        );
    }
}

#[test]
fn leases_are_taken_once_and_given_back() {
    let (services, spec) = all();
    let mut live = Overrides::default();
    let take = |live: &mut Overrides, name: &str, ports| {
        live.take_lease(&services, &spec, &wish(name, "10.0.1.0/24", ports), &|_| 0)
    };
    // 2048–4095 of the first address are the configuration's.
    let first = take(&mut live, "a", 1).unwrap();
    assert_eq!(
        (first.address.to_string().as_str(), first.first_port, first.ports),
        ("203.0.113.20", 1024, 1024)
    );
    assert_eq!(take(&mut live, "a", 1000).unwrap(), first);
    assert!(take(&mut live, "a", 2000).unwrap_err().to_string().contains("holds a lease already"));
    assert_eq!(take(&mut live, "b", 4096).unwrap().first_port, 4096);
    let other = take(&mut live, "c", 7000).unwrap();
    assert_eq!((other.address.to_string().as_str(), other.ports), ("203.0.113.21", 7168));
    assert!(take(&mut live, "d", 1).unwrap_err().to_string().contains("no address has 1024 free ports"));
    let elsewhere = LeaseWish { address: Some("1.2.3.4".parse().unwrap()), ..wish("x", "10.0.1.0/24", 1024) };
    assert_eq!(
        live.take_lease(&services, &spec, &elsewhere, &|_| 0).unwrap_err().to_string(),
        "no [[nat]] that translates packets from 10.0.1.0/24 has the address 1.2.3.4; there are 203.0.113.20, 203.0.113.21"
    );
    live.return_lease(&services, "b").unwrap();
    assert_eq!(take(&mut live, "d", 1).unwrap().first_port, 4096);
    assert!(
        live.return_lease(&services, "fixed")
            .unwrap_err()
            .to_string()
            .contains("stands in the configuration")
    );
    assert!(live.return_lease(&services, "zz").unwrap_err().to_string().contains("there are a, c, d"));
    for (from, ports) in [("10.0.1.0/24", 0), ("10.0.1.0/24", 65_536), ("fd00::/64", 1024)] {
        assert!(
            live.take_lease(&services, &spec, &wish("x", from, ports), &|_| 0).is_err(),
            "{from} {ports}"
        );
    }
}

#[test]
fn blocks_that_rest_or_belong_to_clients_are_not_offered() {
    let (services, spec) = all();
    let mut live = Overrides::default();
    let first: IpAddr = "203.0.113.20".parse().unwrap();
    // 1024 rests, 4096 is a client's own.
    let closed = |address: IpAddr| if address == first { 0b1_0010 } else { 0 };
    let mut take = |name: &str, ports| {
        let lease = live.take_lease(&services, &spec, &wish(name, "10.0.1.0/24", ports), &closed).unwrap();
        (lease.address, lease.first_port)
    };
    assert_eq!(take("a", 1024), (first, 5120));
    assert_eq!(take("b", 3072), ("203.0.113.21".parse().unwrap(), 1024));
}

#[test]
fn leases_survive_in_their_file_unless_the_configuration_takes_their_ports() {
    let (mut services, spec) = all();
    let directory = std::env::temp_dir().join(format!("anabranch-leases-{}", std::process::id()));
    let file = LeaseFile::new(&directory, "ana0");
    let mut live = Overrides::default();
    file.load(&mut live);
    let asked = LeaseWish { tenant: Some("red".to_owned()), ..wish("a", "10.0.1.0/24", 1024) };
    live.take_lease(&services, &spec, &asked, &|_| 0).unwrap();
    live.take_lease(&services, &spec, &wish("b", "10.0.2.0/24", 1024), &|_| 0).unwrap();
    file.store(&live).unwrap();
    let mut again = Overrides::default();
    file.load(&mut again);
    assert_eq!(again, live);
    assert_eq!(again.settle(&services), Vec::<String>::new());
    services.tenants.clear();
    services.leases[0].first_port = 4096;
    assert_eq!(
        again.settle(&services),
        ["lease a ends: its tenant is gone", "lease b ends: the configuration has fixed"]
    );
    std::fs::remove_dir_all(&directory).unwrap();
}

#[test]
fn rules_for_the_kernel() {
    let (services, _) = all();
    let text = nftables(&Overrides::default().list_leases(&services));
    for part in [
        "ip saddr 10.9.0.0/16 meta l4proto { tcp, udp } snat ip to 203.0.113.20:2048-4095 comment \"fixed\"",
        "ct original ip saddr 10.9.0.0/16 meta l4proto { tcp, udp } ip saddr 203.0.113.20 th sport != 2048-4095 counter drop",
    ] {
        assert!(text.contains(part), "{text}");
    }
}

/// A pod, a part of its prefix that another one has, and a second range for that one.
fn nested() -> Vec<LeaseReport> {
    let lease = |name: &str, from: &str, first_port: u16| LeaseReport {
        name: name.to_owned(),
        tenant: String::new(),
        from: from.parse().unwrap(),
        address: "203.0.113.20".parse().unwrap(),
        first_port,
        last_port: first_port + 1023,
        configured: false,
    };
    vec![
        lease("all", "10.0.0.0/24", 1024),
        lease("pod-1", "10.0.0.64/26", 2048),
        lease("p2", "10.0.0.65/32", 3072),
        lease("more", "10.0.0.65/32", 5120),
    ]
}

#[test]
fn of_nested_leases_the_longest_prefix_counts() {
    let text = nftables(&nested());
    let order: Vec<&str> = text
        .lines()
        .filter(|line| line.contains("} snat ip to"))
        .filter_map(|line| line.split_whitespace().nth(2))
        .collect();
    assert_eq!(order, ["10.0.0.65/32", "10.0.0.65/32", "10.0.0.64/26", "10.0.0.0/24"]);
    for part in [
        "ct original ip saddr 10.0.0.0/24 ct original ip saddr != { 10.0.0.64/26 } meta l4proto",
        "ct original ip saddr 10.0.0.64/26 ct original ip saddr != { 10.0.0.65/32 } meta l4proto",
        "ct original ip saddr 10.0.0.65/32 meta l4proto { tcp, udp } ip saddr 203.0.113.20 th sport != { 3072-4095, 5120-6143 } counter",
    ] {
        assert!(text.contains(part), "{part} is missing in\n{text}");
    }
}

#[test]
fn the_kernel_takes_the_rules() {
    linux::testing::isolated(|| {
        let mut child = std::process::Command::new("nft")
            .args(["-f", "-"])
            .stdin(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        io::Write::write_all(&mut child.stdin.take().unwrap(), nftables(&nested()).as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    });
}
