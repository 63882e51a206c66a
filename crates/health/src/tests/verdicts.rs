//! Verdicts that are known before the first check, targets whose TLS fails, and many targets.

use super::*;

/// Verdicts of an earlier process hold until checks in a row say otherwise, and are not told again.
#[test]
fn a_verdict_from_before_is_kept() {
    let (alive, dead) = (address(8), address(9));
    let _listener = TcpListener::bind(alive).unwrap();
    let (sender, news) = mpsc::channel();
    let known = |up| Some(Known { up, silent: false });
    let targets = vec![
        (target(1, alive, HealthKind::Tcp), known(true)),
        (target(2, alive, HealthKind::Tcp), known(false)),
        (target(3, dead, HealthKind::Tcp), known(false)),
    ];
    let monitors = Monitors::start(targets, Box::new(move |news| drop(sender.send(news)))).unwrap();
    let mut seen = Vec::new();
    while seen.len() < 2 {
        seen.push(news.recv_timeout(PATIENCE).unwrap());
    }
    wait_until("some checks more", || [1, 2, 3].iter().all(|id| status(&monitors, *id).unwrap().checks > 6));
    seen.extend(news.try_iter());
    seen.sort_by_key(|news| match news {
        HealthNews::Change(change) => change.id,
        HealthNews::Reason { id, .. } | HealthNews::NotChecked { id, .. } => *id,
    });
    let [HealthNews::Change(came_up), HealthNews::Reason { id: 3, reason }] = &seen[..] else {
        panic!("{seen:?}")
    };
    assert!(came_up.id == 2 && came_up.up && reason.contains("refused"), "{seen:?}");
}

/// Not the target's fault, and no end of checking.
#[test]
fn a_file_of_authorities_that_is_gone_is_no_failure() {
    let listener = TcpListener::bind(address(10)).unwrap();
    let tls = TlsCheck { sni: None, authorities: Some("/nonexistent/ca.pem".into()) };
    let (sender, news) = mpsc::channel();
    let targets = fresh(vec![target(1, listener.local_addr().unwrap(), HealthKind::Tls(tls))]);
    let _monitors = Monitors::start(targets, Box::new(move |news| drop(sender.send(news)))).unwrap();
    for _ in 0..3 {
        let HealthNews::NotChecked { id: 1, error } = news.recv_timeout(PATIENCE).unwrap() else { panic!() };
        assert!(error.starts_with("/nonexistent/ca.pem: "), "{error}");
    }
}

/// A server that talks something else, or sends without end, is told from one that speaks TLS.
#[test]
fn who_speaks_no_tls_is_found_out() {
    for (answer, reason) in
        [(b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(), "TLS: "), (vec![0x16; 1 << 20], "TLS: ")]
    {
        let (address, _ends) =
            serve_answers(vec![String::from_utf8_lossy(&answer).into_owned()], 1 << 20, Duration::ZERO);
        let tls = TlsCheck { sni: None, authorities: None };
        let mut target = target(1, address, HealthKind::Tls(tls));
        target.spec.timeout_ms = 600_000;
        let (_monitors, changes) = start(vec![target]);
        let down = next(&changes);
        assert!(!down.up && down.reason.contains(reason), "{down:?}");
    }
}

/// A thousand targets on one thread: half of them answer.
#[test]
fn a_thousand_targets() {
    let listener = TcpListener::bind("0.0.0.0:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let closed = address(7).port();
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let server = std::thread::spawn(move || {
        for stream in listener.incoming() {
            drop(stream);
            if stopped.load(Ordering::SeqCst) {
                break;
            }
        }
    });
    let targets = (0..1_000u16)
        .map(|id| {
            let host = Ipv4Addr::from_bits(0x7f20_0001 + u32::from(id));
            let address = SocketAddr::from((host, if id % 2 == 0 { port } else { closed }));
            let mut target = target(id, address, HealthKind::Tcp);
            (target.spec.interval_ms, target.spec.timeout_ms) = (600_000, 30_000);
            target
        })
        .collect();
    let (monitors, changes) = start(targets);
    let mut seen = vec![None; 1_000];
    for _ in 0..1_000 {
        let change = next(&changes);
        assert_eq!(seen[usize::from(change.id)].replace(change.up), None, "one change each");
    }
    assert!((0..).zip(&seen).all(|(id, up)| *up == Some(id % 2 == 0)));
    assert!(monitors.statuses().iter().all(|status| status.checks == 1));
    stop.store(true, Ordering::SeqCst);
    drop(TcpStream::connect(("127.0.0.1", port)));
    server.join().unwrap();
}
