//! The way of a flow's packets through a cluster, asked by a packet.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpStream};

use serde_json::Value;
use testbed::cluster::{self as bed, FIRST_DISPATCHER};

use crate::cluster_scene::{Cluster, Plan, nothing};
use crate::machine::busy;
use crate::scene::tcp_listener;

/// A firewall: the flow's key is the same on both sides.
const SERVICES: &str = "[[rule]]\nname = \"no strangers\"\naction = \"drop\"\nfrom = \"wan\"\n";
const CONNECTIONS: usize = 60;

/// The way of one packet from the client.
fn trace(cluster: &Cluster, port: u16) -> Value {
    let packet = format!("tcp {}:{port} > {}:7400", bed::CLIENTS[0], bed::SERVERS[0]);
    let said = cluster.run(FIRST_DISPATCHER, &["cluster", "trace", &packet, "--json"]).unwrap();
    serde_json::from_str(&said).unwrap()
}

/// Client ports of the connections that a data plane has.
fn ports(cluster: &Cluster, node: u16) -> Vec<u16> {
    let said = cluster.run(node, &["status", "--flows", "--limit", "1000", "--json"]).unwrap();
    let said: Value = serde_json::from_str(&said).unwrap();
    let flows = said["flows"].as_array().unwrap_or_else(|| panic!("{said:#}"));
    let client = format!("{}:", bed::CLIENTS[0]);
    flows.iter().filter_map(|flow| flow["source"].as_str()?.strip_prefix(&client)?.parse().ok()).collect()
}

/// Rows D3, D5: the answer names the unit that has a flow, as the units' own lists do, also when its bucket has moved and the packet
/// takes the way along the chain; of a flow that nobody has it names the unit that would begin it, and none begins.
#[test]
fn d3_d5_a_trace_names_the_way_and_the_unit_of_a_flow() {
    let _busy = busy();
    let plan = Plan { dispatchers: 1, data_planes: 2, services: SERVICES, manager: "" };
    let (cluster, ()) = Cluster::start(&plan, &[11, 12], |_, text| text, nothing);
    cluster.join(&[11, 12]);
    let address = SocketAddr::new(bed::SERVERS[0].into(), 7_400);
    let listener = tcp_listener(&cluster.bed.server, address);
    let mut open = Vec::new();
    for _ in 0..CONNECTIONS {
        let stream = cluster.bed.client.run(|| TcpStream::connect(address)).unwrap().unwrap();
        open.push((stream.local_addr().unwrap().port(), stream, listener.accept().unwrap()));
    }
    let lists: BTreeMap<u16, Vec<u16>> = [11, 12].map(|node| (node, ports(&cluster, node))).into();
    assert_eq!(lists.values().map(Vec::len).sum::<usize>(), CONNECTIONS, "{lists:?}");
    let unit_of = |port: u16| *lists.iter().find(|(_, ports)| ports.contains(&port)).unwrap().0;

    for (port, ..) in &open {
        let said = trace(&cluster, *port);
        assert_eq!(said["verdict"], "has-flow", "{said:#}");
        assert_eq!(
            (&said["dispatcher"], &said["unit"]),
            (&Value::from(FIRST_DISPATCHER), &Value::from(unit_of(*port)))
        );
        assert_eq!(
            (&said["way"], &said["punts"]),
            (&Value::from(vec![unit_of(*port)]), &Value::from(0)),
            "{said:#}"
        );
    }
    // All buckets of one unit move; its flows do not.
    cluster.manage(&["drain", "12"]).unwrap();
    let era = cluster.settled();
    for (port, ..) in &open {
        let said = trace(&cluster, *port);
        let unit = unit_of(*port);
        assert_eq!((&said["verdict"], &said["unit"]), (&Value::from("has-flow"), &Value::from(unit)));
        assert_eq!(said["era"].as_u64(), Some(era), "{said:#}");
        let way = if unit == 12 { vec![11, 12] } else { vec![11] };
        assert_eq!((&said["way"], &said["punts"]), (&Value::from(way.clone()), &Value::from(way.len() - 1)));
    }
    assert!(lists[&12].len() > 10, "{lists:?}");

    // Who owns the bucket asks the one before it, if that may have it, and would begin the flow then.
    for port in 1..=20 {
        let said = trace(&cluster, port);
        assert_eq!(
            (&said["verdict"], &said["unit"]),
            (&Value::from("would-begin"), &Value::from(11)),
            "{said:#}"
        );
        assert!(said["way"] == Value::from([11]) || said["way"] == Value::from([11, 12, 11]), "{said:#}");
    }
    assert_eq!([11, 12].map(|node| ports(&cluster, node).len()).iter().sum::<usize>(), CONNECTIONS);
    // Whoever does not have the interface cannot ask.
    let packet = format!("tcp {}:1 > {}:2", bed::CLIENTS[0], bed::SERVERS[0]);
    let refused = cluster.run(11, &["cluster", "trace", &packet]).unwrap_err();
    assert!(refused.contains("no answer within a second"), "{refused}");
}
