#![allow(clippy::unwrap_used, reason = "tests")]

use linux::netlink::Netlink;
use linux::testing::isolated;

use super::*;
use crate::config::tests::config;
use crate::gateway::policy::tests::facts;
use crate::host_facts::HostView;

const BASE: &str = "[[interface]]\nname = \"wan\"\ndevice = \"eth0\"\n[[interface]]\nname = \"lan\"\ndevice = \"eth1\"\n\
                    address = \"10.0.0.254/24\"\n[[nat]]\nout = \"wan\"\naddresses = [\"198.51.100.9\", \"203.0.113.1\"]\n\
                    [[virtual-server]]\nlisten = \"tcp 203.0.113.10:80\"\nbackends = [\"10.0.0.1:80\"]\n\
                    [[forward]]\nlisten = \"tcp 10.0.0.99:80\"\nto = \"10.0.0.1\"\n";

fn lines(list: &[DeviceAddress]) -> Vec<String> {
    list.iter().map(|entry| format!("{} {}", entry.device, entry.net)).collect()
}

#[test]
fn addresses_go_where_their_network_is() {
    let services = config("", BASE).services;
    let plan = AddressPlan::new(&services, &facts());
    assert_eq!(
        lines(&plan.addresses),
        [
            "eth1 10.0.0.254/24",
            "eth1 10.0.0.99/32",
            // In nobody's network: where its NAT leads out.
            "eth0 198.51.100.9/32",
            "eth0 203.0.113.1/32",
            "eth0 203.0.113.10/32",
        ]
    );
    // The device has 203.0.113.1/24 and 203.0.113.10/32 already: they are not ours.
    let changes = plan.difference(&facts(), &BTreeSet::new());
    assert_eq!(lines(&changes.add), ["eth1 10.0.0.99/32", "eth0 198.51.100.9/32"]);
    assert_eq!(changes.remove, []);
    let added: BTreeSet<DeviceAddress> = plan.addresses.iter().cloned().collect();
    let changes = AddressPlan::default().difference(&facts(), &added);
    assert_eq!(lines(&changes.remove), ["eth0 203.0.113.10/32", "eth1 10.0.0.254/24"]);
    assert_eq!(plan.up, Vec::<u32>::new());
}

#[test]
fn only_what_was_added_is_taken_away_even_by_the_next_run() {
    isolated(|| {
        let netlink = Netlink::open().unwrap();
        netlink.add_veth("eth0", "peer0", None).unwrap();
        netlink.add_veth("eth1", "peer1", None).unwrap();
        let index = netlink.link("eth0").unwrap().unwrap().index;
        netlink.add_address(index, "203.0.113.10/32".parse().unwrap()).unwrap();
        let services = config("", BASE).services;
        let facts = || HostFacts::new(&HostView::read(&netlink).unwrap(), None, (1, 2));
        let present = || -> Vec<String> {
            let mut list: Vec<String> = facts()
                .devices
                .iter()
                .flat_map(|device| device.addresses.iter().map(|net| format!("{} {net}", device.name)))
                .filter(|line| !line.contains("fe80") && !line.starts_with("lo"))
                .collect();
            list.sort();
            list
        };
        let directory = std::env::temp_dir().join(format!("anabranch-addresses-{}", std::process::id()));
        let socket = directory.join("ana0.sock");
        let mut addresses = Addresses::open(&socket);
        let apply = |addresses: &mut Addresses| {
            let facts = facts();
            addresses.apply(&netlink, &AddressPlan::new(&services, &facts), &facts)
        };
        assert!(apply(&mut addresses));
        let full = [
            "eth0 198.51.100.9/32",
            "eth0 203.0.113.1/32",
            "eth0 203.0.113.10/32",
            "eth1 10.0.0.254/24",
            "eth1 10.0.0.99/32",
        ];
        assert_eq!(present(), full);
        assert!(netlink.link("eth0").unwrap().unwrap().up && netlink.link("eth1").unwrap().unwrap().up);
        assert!(!apply(&mut addresses), "nothing is left to do");
        // Killed; the next run knows what is its own.
        std::mem::forget(addresses);
        let mut next = Addresses::open(&socket);
        assert!(!apply(&mut next));
        next.clear(&netlink);
        assert_eq!(present(), ["eth0 203.0.113.10/32"]);
        assert!(!socket.with_extension("addresses").exists());
        let _ = std::fs::remove_dir_all(&directory);
    });
}
