use super::*;

fn endpoint(text: &str) -> SocketAddr {
    text.parse().expect("an endpoint")
}

fn flow(at_ns: u64, kind: NatEventKind, inside: &str, outside: &str, remote: Option<&str>) -> NatEvent {
    let (inside, outside, remote) = (endpoint(inside), endpoint(outside), remote.map(endpoint));
    NatEvent { at_ns, kind, tenant: 1, protocol: 6, inside, outside, ports: 1, remote }
}

#[test]
fn the_log_answers_who_had_an_endpoint() {
    use NatEventKind::{BlockGranted, BlockReturned, Closed, Opened};
    let outside = "192.0.2.1:5000";
    let (a, b) = ("10.0.0.1:40000", "10.0.0.2:40000");
    let block = |at_ns, kind| {
        let (holder, first) = ((2, endpoint("10.9.0.1:0").ip()), (endpoint("192.0.2.1:0").ip(), 8192));
        NatEvent::of_blocks(at_ns, kind, holder, first, 2)
    };
    let log = [
        flow(10, Opened, a, outside, Some("198.51.100.1:80")),
        flow(20, Opened, b, outside, Some("198.51.100.2:80")),
        block(25, BlockGranted),
        flow(30, Closed, a, outside, Some("198.51.100.1:80")),
        flow(40, Opened, b, "192.0.2.1:6000", None),
        block(50, BlockReturned),
    ];
    let ask = |port: u16, protocol, remote: Option<&str>, at_ns| {
        let question = Question {
            outside: SocketAddr::new(endpoint(outside).ip(), port),
            protocol,
            remote: remote.map(endpoint),
            at_ns,
        };
        who_had(&log, &question)
    };
    let (a, b, holder) = ((1, endpoint(a)), (1, endpoint(b)), (2, endpoint("10.9.0.1:0")));
    assert_eq!(ask(5000, 6, Some("198.51.100.1:80"), 9), []);
    assert_eq!(ask(5000, 6, Some("198.51.100.1:80"), 25), [a]);
    assert_eq!(ask(5000, 6, None, 25), [a, b], "the port alone does not tell");
    assert_eq!(ask(5000, 6, None, 35), [b]);
    assert_eq!(ask(5000, 17, None, 25), []);
    assert_eq!(ask(6000, 6, Some("203.0.113.9:9"), 45), [b], "a mapping is for every remote");
    assert_eq!(ask(8192, 17, None, 30), [holder]);
    assert_eq!(ask(10_239, 6, None, 30), [holder]);
    assert_eq!(ask(10_240, 6, None, 30), []);
    assert_eq!(ask(8192, 17, None, 50), []);
}

#[test]
fn the_queue_is_bounded_and_counts() {
    let mut queue = EventQueue::default();
    let event = flow(1, NatEventKind::Opened, "10.0.0.1:1", "192.0.2.1:1", None);
    for _ in 0..EVENTS_MAX + 3 {
        queue.push(event);
    }
    assert_eq!((queue.lost(), queue.drain().count()), (3, EVENTS_MAX));
    queue.push(event);
    assert_eq!((queue.lost(), queue.drain().count()), (3, 1));
}
