#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::status::{BackendStatus, CoreServices, NatStatus, RuleStatus, UnmetOfNat};

fn status() -> ServicesStatus {
    ServicesStatus {
        cores: vec![CoreServices {
            core: 0,
            state: "active".to_owned(),
            buckets: 64,
            rx_packets: 9,
            live_flows: 3,
            busy_percent: 12.4,
            ..Default::default()
        }],
        interfaces: vec![InterfaceStatus {
            name: "lan".to_owned(),
            device: "eth1".to_owned(),
            state: "up".to_owned(),
            rx_packets: 9,
            rx_bytes: 2048,
            addresses: vec!["10.0.0.254/24".to_owned()],
            nic_hash: NicHashStatus { function: "toeplitz".to_owned(), queues: 8, ..Default::default() },
            ..Default::default()
        }],
        rules: vec![RuleStatus { name: "default".to_owned(), action: "drop".to_owned(), matched_flows: 7 }],
        nats: vec![NatStatus {
            out: "wan".to_owned(),
            mode: "address-and-port".to_owned(),
            used_ports: Some(5),
            total_ports: 1000,
            live_flows: 3,
            ..Default::default()
        }],
        virtual_servers: vec![ServerStatus {
            name: "web".to_owned(),
            listen: "tcp 203.0.113.10:80".to_owned(),
            method: "maglev".to_owned(),
            delivery: "nat".to_owned(),
            live_connections: 2,
            backends: vec![BackendStatus {
                address: "10.0.0.1:80".to_owned(),
                state: "down".to_owned(),
                reason: "refused".to_owned(),
                weight: 1,
                state_age_seconds: 5,
                ..Default::default()
            }],
            ..Default::default()
        }],
        drops: [("rule-drop".to_owned(), 7)].into(),
        ..Default::default()
    }
}

#[test]
fn services_as_text() {
    let expected = "
interface  device  state  tenant  in  bytes in  out  bytes out  lost  RSS                 addresses
lan        eth1    up     -        9   2.0 KiB    0        0 B     0  toeplitz, 8 queues  10.0.0.254/24

gateway core  state   buckets  busy  flows  new flows  in  out  handed over  taken over
0             active       64  12 %      3          0   9    0            0           0

rule     action  flows
default  drop        7

NAT  mode              flows  ports   full  exhausted  refused  addresses
wan  address-and-port      3      5  0.5 %          0        0  -

virtual server web: tcp 203.0.113.10:80 maglev, nat, 2 live, 0 in all, 0 refused
  backend      state  since  weight  live  total  reason
  10.0.0.1:80  down     5 s       1     0      0  refused

handed to their core by ring: 0 packets; replies on a wrong core: 0 packets
gateway dropped: rule-drop 7
";
    let text = services(&status());
    assert_eq!(text, expected, "\n{text}");
    let lost = services(&ServicesStatus {
        unmet: UnmetOfNat { lost_nat_events: 3, ..UnmetOfNat::default() },
        ..status()
    });
    assert!(lost.contains("\nlost from the NAT log: 3 events\n"), "{lost}");
    let mut failed = status();
    failed.interfaces[0].reason = "no nft".to_owned();
    let failed = services(&failed);
    assert!(failed.contains("\ninterface lan does not work: no nft\n"), "{failed}");
    let json = serde_json::to_value(status()).unwrap();
    assert_eq!(serde_json::from_value::<ServicesStatus>(json).unwrap(), status());
}

#[test]
fn flows_and_explanations_as_text() {
    let flow = crate::protocol::flow_filter::tests::flow();
    let list = FlowList { flows: vec![flow.clone()], live_flows: 9, more: true, cut: true };
    let text = flows(&list);
    assert!(
        text.contains("from 203.0.113.1:2048")
            && text.ends_with("1 of 9 flows shown; more match, see --limit; no time to look at all\n"),
        "{text}"
    );
    let about = Explanation {
        packet: "tcp 10.0.0.5:1234 > 198.51.100.7:443".to_owned(),
        interface: "lan".to_owned(),
        hash: 0xabc,
        bucket: 77,
        core: 1,
        verdict: "forward".to_owned(),
        rule: "out".to_owned(),
        rule_action: "allow".to_owned(),
        nat: 1,
        nat_mode: "address-and-port".to_owned(),
        translated_source: Some("203.0.113.1:0".parse().unwrap()),
        route: "0.0.0.0/0 via 203.0.113.254".to_owned(),
        out: "wan".to_owned(),
        next_hop: Some("203.0.113.254".parse().unwrap()),
        reply_core: Some(1),
        ..Explanation::default()
    };
    let expected = "\
packet      tcp 10.0.0.5:1234 > 198.51.100.7:443
comes in    lan
core        1 (hash 00000abc, bucket 77)
flow        none yet: this packet would begin one
rule        out: allow
NAT         [[nat]] number 1, address-and-port, leaves as 203.0.113.1 with a port chosen when the flow begins
route       0.0.0.0/0 via 203.0.113.254 by wan
next hop    203.0.113.254 (not asked for yet)
reply core  1 (the same)
verdict     forward
";
    let text = explanation(&about);
    assert_eq!(text, expected, "\n{text}");
    let by_server = explanation(&Explanation { nat: 0, ..about.clone() });
    assert!(
        by_server.contains("NAT         of the virtual server, address-and-port, leaves as 203"),
        "{by_server}"
    );
    let on_card = |nic: NicPrediction| explanation(&Explanation { nic: Some(nic), ..about.clone() });
    let eth0 = NicPrediction { device: "eth0".to_owned(), ..Default::default() };
    let queues = on_card(NicPrediction { queue: Some(3), queue_with_ports: Some(5), ..eth0.clone() });
    let told =
        "\nNIC         eth0 gives it to queue 5 if it hashes ports, to queue 3 by addresses alone\nflow ";
    assert!(queues.contains(told), "{queues}");
    let one = on_card(NicPrediction { queue: Some(3), ..eth0.clone() });
    assert!(one.contains("\nNIC         eth0 gives it to queue 3\n"), "{one}");
    let none = on_card(NicPrediction { reason: "no key".to_owned(), ..eth0 });
    assert!(none.contains("\nNIC         no queue of eth0 is known: no key\n"), "{none}");
    let known = explanation(&Explanation { flow: Some(flow), ..about });
    assert!(known.contains("flow        known, established"), "{known}");
}
