//! Connections under churn: a clean run, and every way to break one, by a network between client and server that does it.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use linux::netns::set_sysctl;
use linux::testing::isolated;
use testbed::link::Shape;
use testbed::topology::{LinkSpec, Site, Testbed};
use testbed::traffic::churn::{Cause, Causes, Churn, Report, client, server};

/// A port of loopback that no other test has.
fn address() -> SocketAddr {
    static PORT: AtomicU16 = AtomicU16::new(7_000);
    (Ipv4Addr::LOCALHOST, PORT.fetch_add(1, Ordering::Relaxed)).into()
}

fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < end, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Counts of these causes, and none of others.
fn causes(counts: &[(Cause, u64)]) -> Causes {
    Causes::from_fn(|cause| counts.iter().filter(|(other, _)| *other == cause).map(|(_, count)| count).sum())
}

/// A proxy that breaks the first connection when it has passed so many bytes of one direction, and the report of a client that
/// goes on behind it.
fn through_proxy(what: Break, at_byte: u64, options: client::Options) -> Report {
    let (listen, proxy) = (address(), options.to);
    let server = server::start(None, listen).unwrap();
    start_proxy(proxy, listen, what, at_byte);
    let client = client::start(None, options).unwrap();
    wait_for("a broken connection", || client.figures().broken > 0 && server.figures().broken > 0);
    let completed = client.figures().completed;
    // Those that follow are whole.
    wait_for("others", || client.figures().completed > completed || client.figures().open_long > 0);
    let report = Churn { client, servers: vec![server] }.finish().unwrap();
    assert_eq!(report.broken, 1, "{report:#?}");
    assert!(report.client.figures.completed > 0 && !report.is_clean());
    report
}

/// Short connections are broken in their request or answer, the long one after several chunks.
fn both_kinds(what: Break, client: Cause, server: Cause) {
    isolated(|| {
        let short = client::Options { short_per_second: 20, ..client::Options::new(address(), 1) };
        let long = client::Options { long: 1, ..client::Options::new(address(), 1) };
        for (options, at_byte) in [(short, 150), (long, 5_000)] {
            let report = through_proxy(what, at_byte, options);
            assert_eq!(report.broken_by_cause.client, causes(&[(client, 1)]), "{report:#?}");
            assert_eq!(report.broken_by_cause.server, causes(&[(server, 1)]), "{report:#?}");
        }
    });
}

/// Way of a proxy to break a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Break {
    /// Resets both sides.
    Reset,
    /// Flips a bit of what the client sent.
    CorruptToServer,
    /// Flips a bit of what the server sent.
    CorruptToClient,
    /// Holds everything back from then on, longer than is allowed.
    Stall,
    /// Ends both sides with a FIN.
    Finish,
}

/// The first connection is broken, when it has passed so many bytes of one direction.
fn start_proxy(listen: SocketAddr, to: SocketAddr, what: Break, at_byte: u64) {
    let listener = TcpListener::bind(listen).unwrap();
    std::thread::spawn(move || {
        let mut what = Some((what, at_byte));
        for near in listener.incoming() {
            let (near, far) = (near.unwrap(), TcpStream::connect(to).unwrap());
            let (near2, far2) = (near.try_clone().unwrap(), far.try_clone().unwrap());
            let what = what.take();
            std::thread::spawn(move || copy(near, far, what, true));
            std::thread::spawn(move || copy(far2, near2, what, false));
        }
    });
}

/// Copies from one side to the other until the end.
fn copy(mut from: TcpStream, mut to: TcpStream, what: Option<(Break, u64)>, to_server: bool) {
    let mut buffer = vec![0; 65_536];
    let mut passed = 0u64;
    while let Ok(bytes) = from.read(&mut buffer) {
        if bytes == 0 {
            let _ = to.shutdown(Shutdown::Write);
            return;
        }
        let here = what.filter(|(_, at)| (passed..passed + bytes as u64).contains(at));
        let before = here.filter(|_| to_server).map_or(0, |(_, at)| (at - passed) as usize);
        if to.write_all(&buffer[..before]).is_err() {
            return;
        }
        match here {
            Some((Break::CorruptToServer, at)) if to_server => buffer[(at - passed) as usize] ^= 4,
            Some((Break::CorruptToClient, at)) if !to_server => buffer[(at - passed) as usize] ^= 4,
            Some((Break::Stall, _)) if to_server => {
                // Longer than both sides wait; they end it.
                std::thread::sleep(Duration::from_secs(8));
                return;
            }
            Some((Break::Reset, _)) if to_server => {
                // Sends a RST, however many handles there are.
                [&from, &to].into_iter().for_each(|side| rustix::net::connect_unspec(side).unwrap());
                return;
            }
            Some((Break::Finish, _)) if to_server => {
                let _ = from.shutdown(Shutdown::Both);
                let _ = to.shutdown(Shutdown::Both);
                return;
            }
            _ => {}
        }
        passed += bytes as u64;
        if to.write_all(&buffer[before..bytes]).is_err() {
            return;
        }
    }
    // A reset is passed on, unless nothing is.
    if !matches!(what, Some((Break::Stall, _))) {
        let _ = rustix::net::connect_unspec(&to);
    }
}

#[test]
fn thousands_of_connections_over_a_plain_network_are_all_whole() {
    isolated(|| {
        let mut bed = Testbed::new(&[LinkSpec::new(Shape::default())], 1).unwrap();
        let (near, far) = (bed.add_host(Site::A).unwrap(), bed.add_host(Site::A).unwrap());
        let to = SocketAddr::new(far.addresses.any().unwrap(), 7000);
        let second = Ipv4Addr::new(10, 1, 1, 3);
        let index = near.node.interface("eth0").unwrap();
        near.node.netlink().unwrap().add_address(index, format!("{second}/24").parse().unwrap()).unwrap();
        let server = server::start(Some(&far.node), to).unwrap();
        let options = client::Options {
            sources: vec![near.addresses.any().unwrap(), second.into()],
            short_per_second: 800,
            long: 300,
            long_life: Some(Duration::from_secs(1)),
            udp: 100,
            udp_interval: Duration::from_millis(50),
            udp_life: Some(Duration::from_secs(2)),
            ..client::Options::new(to, 1)
        };
        let client = client::start(Some(&near.node), options).unwrap();
        wait_for("all long connections", || client.figures().open_long >= 290);
        let mark = client.mark();
        assert!(mark.open >= 250, "{mark:?}");
        wait_for("3,000 connections", || client.figures().completed > 3_000);
        let alive = client.alive(mark);
        assert!(alive < mark.open * 3 / 4, "{alive} of {mark:?}");
        let report = Churn { client, servers: vec![server] }.finish().unwrap();
        assert!(report.is_clean(), "{report:#?}");
        let (client, server) = (&report.client.figures, &report.servers[0].figures);
        assert_eq!(client.connections, client.completed);
        assert_eq!((server.connections, server.completed), (client.connections, client.connections));
        assert_eq!((client.open, client.open_long, server.open, server.open_long), (0, 0, 0, 0));
        assert_eq!((report.broken, report.udp_lost), (0, 0));
        assert!(report.udp_associations > 100 && client.udp_answered > 1_000, "{client:?}");
        assert_eq!(server.udp_associations, client.udp_associations);
        assert!(report.client.bytes_checked > 10_000_000 && report.servers[0].bytes_checked > 10_000_000);
        assert!((0.001..3_000.0).contains(&report.longest_gap_ms), "{report:#?}");
        assert_eq!(report.client.marks.len(), 1);
    });
}

#[test]
fn a_reset_is_counted_by_both_sides() {
    both_kinds(Break::Reset, Cause::Reset, Cause::Reset);
}

#[test]
fn an_end_that_nobody_sent_is_counted_by_both_sides() {
    both_kinds(Break::Finish, Cause::UnexpectedEnd, Cause::UnexpectedEnd);
}

#[test]
fn a_stall_is_counted_by_both_sides() {
    both_kinds(Break::Stall, Cause::Stall, Cause::Stall);
}

#[test]
fn a_wrong_byte_is_counted_by_the_side_that_gets_it_and_the_other_is_reset() {
    both_kinds(Break::CorruptToServer, Cause::Reset, Cause::WrongByte);
    both_kinds(Break::CorruptToClient, Cause::WrongByte, Cause::Reset);
}

#[test]
fn nobody_listening_and_no_way_are_told_apart() {
    isolated(|| {
        let refused = client::Options { short_per_second: 50, ..client::Options::new(address(), 1) };
        let nowhere = SocketAddr::from((Ipv4Addr::new(198, 51, 100, 1), 7_000));
        let unreachable = client::Options { short_per_second: 50, ..client::Options::new(nowhere, 1) };
        for (options, cause) in [(refused, Cause::Refused), (unreachable, Cause::Unreachable)] {
            let client = client::start(None, options).unwrap();
            wait_for("attempts", || client.figures().broken >= 10);
            let report = client.finish().unwrap();
            let figures = &report.figures;
            assert_eq!(figures.broken_by_cause, causes(&[(cause, figures.connections)]), "{report:#?}");
            assert_eq!((figures.opened, figures.completed, report.local_errors), (0, 0, 0));
        }
    });
}

/// A link whose frames can be withheld, with a server behind it.
fn link_and_server() -> (Testbed, SocketAddr, testbed::traffic::churn::Side) {
    let bed = Testbed::new(&[LinkSpec::new(Shape::default())], 1).unwrap();
    let to = SocketAddr::new(bed.addresses(Site::B, 0).any().unwrap(), 7_000);
    let server = server::start(Some(bed.site(Site::B)), to).unwrap();
    (bed, to, server)
}

#[test]
fn a_lost_syn_breaks_a_connection_after_five_seconds_and_not_before() {
    isolated(|| {
        let (bed, to, server) = link_and_server();
        let options = client::Options { long: 4, ..client::Options::new(to, 1) };
        // The first two SYNs are lost; the third opens it.
        bed.black_hole(0, true).unwrap();
        let client = client::start(Some(bed.site(Site::A)), options.clone()).unwrap();
        std::thread::sleep(Duration::from_secs(2));
        bed.black_hole(0, false).unwrap();
        wait_for("the third SYN", || client.figures().open_long == 4);
        let report = Churn { client, servers: vec![server] }.finish().unwrap();
        assert!(report.is_clean() && report.connections == 4, "{report:#?}");
        bed.black_hole(0, true).unwrap();
        let silent = |expected| {
            let begun = Instant::now();
            let client = client::start(Some(bed.site(Site::A)), options.clone()).unwrap();
            wait_for("broken connections", || client.figures().broken >= 4);
            let took = begun.elapsed().as_secs_f64();
            let figures = client.figures();
            assert_eq!(figures.broken_by_cause, causes(&[(expected, figures.broken)]), "{figures:?}");
            took
        };
        let took = silent(Cause::NotOpened);
        assert!((4.9..6.5).contains(&took), "{took} s");
        // A kernel that gives up earlier says so.
        let early = || {
            // Since Linux 6.5 there are more repetitions, a second apart.
            let _ = set_sysctl("net.ipv4.tcp_syn_linear_timeouts", "0");
            set_sysctl("net.ipv4.tcp_syn_retries", "1")
        };
        bed.site(Site::A).run(early).unwrap().unwrap();
        let took = silent(Cause::TimedOut);
        assert!((2.0..4.9).contains(&took), "{took} s");
    });
}

#[test]
fn a_short_silence_is_a_gap_and_a_long_one_breaks_and_loses_everything_open() {
    isolated(|| {
        let (bed, to, server) = link_and_server();
        let options = client::Options { long: 20, udp: 10, ..client::Options::new(to, 1) };
        let client = client::start(Some(bed.site(Site::A)), options).unwrap();
        let open = || client.figures().open_long == 20 && client.figures().udp_answered > 50;
        wait_for("connections", open);
        let first = client.mark();
        bed.black_hole(0, true).unwrap();
        std::thread::sleep(Duration::from_millis(1_000));
        bed.black_hole(0, false).unwrap();
        std::thread::sleep(Duration::from_millis(1_500));
        let figures = client.figures();
        assert_eq!((figures.broken, figures.udp_lost), (0, 0), "{figures:?}");
        assert!((500.0..2_900.0).contains(&figures.longest_gap_ms), "{figures:?}");
        assert_eq!((first.open, client.alive(first)), (20, 20));
        let second = client.mark();
        bed.black_hole(0, true).unwrap();
        wait_for("broken connections", || {
            client.figures().broken >= 20 && client.figures().udp_lost >= 10 && server.figures().broken >= 20
        });
        bed.black_hole(0, false).unwrap();
        assert_eq!(client.alive(second), 0);
        wait_for("connections again", open);
        let report = Churn { client, servers: vec![server] }.finish().unwrap();
        assert!(report.broken_by_cause.client.count(Cause::Stall) >= 20, "{report:#?}");
        assert!(report.broken_by_cause.server.count(Cause::Stall) >= 20, "{report:#?}");
        assert!(report.client.udp_no_answer >= 10 && report.udp_lost >= 10, "{report:#?}");
        assert!(report.longest_gap_ms >= 3_000.0);
        let marks = &report.client.marks;
        assert_eq!((marks[0].broken_later, marks[1].broken_later), (20, 20), "{report:#?}");
        assert!(marks[0].longest_gap_ms < 3_000.0 && marks[1].longest_gap_ms >= 3_000.0, "{marks:?}");
        assert!(report.client.lived_marks[2] >= 20, "{report:#?}");
    });
}

/// Sends datagrams on to the server and back, from another port when `moved`, with a wrong bit when `wrong`.
fn relay(to: SocketAddr, moved: u64, wrong: u64) -> SocketAddr {
    let near = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = near.local_addr().unwrap();
    std::thread::spawn(move || {
        let mut far = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let mut buffer = [0; 2_000];
        for number in 1.. {
            let (bytes, from) = near.recv_from(&mut buffer).unwrap();
            if number == moved {
                far = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            }
            far.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
            buffer[50] ^= u8::from(number == wrong);
            far.send_to(&buffer[..bytes], to).unwrap();
            if let Ok(bytes) = far.recv(&mut buffer) {
                buffer[50] ^= u8::from(wrong > 0 && number == wrong + 1);
                near.send_to(&buffer[..bytes], from).unwrap();
            }
        }
    });
    address
}

#[test]
fn another_source_loses_an_association_and_wrong_bytes_are_counted() {
    isolated(|| {
        for (moved, wrong) in [(5, 0), (0, 5)] {
            let listen = address();
            let server = server::start(None, listen).unwrap();
            let options = client::Options {
                udp: 1,
                udp_interval: Duration::from_millis(20),
                ..client::Options::new(relay(listen, moved, wrong), 1)
            };
            let client = client::start(None, options).unwrap();
            wait_for("answers", || client.figures().udp_answered >= 20);
            let report = Churn { client, servers: vec![server] }.finish().unwrap();
            let (client, server) = (&report.client, &report.servers[0]);
            let lost = u64::from(moved > 0);
            assert_eq!((server.udp_source_changed, client.udp_no_answer), (lost, 0), "{report:#?}");
            assert_eq!((report.udp_associations, report.udp_lost), (1, lost), "{report:#?}");
            // One on its way there, one on its way back.
            assert_eq!((server.udp_corrupt, client.udp_corrupt), (1 - lost, 1 - lost), "{report:#?}");
            assert!(!report.is_clean());
        }
    });
}

#[test]
fn a_server_that_ends_first_breaks_what_it_cuts_and_a_probe_is_no_connection_of_a_client() {
    isolated(|| {
        let listen = address();
        let server = server::start(None, listen).unwrap();
        drop(TcpStream::connect(listen).unwrap());
        wait_for("the probe", || server.figures().connections == 1 && server.figures().open == 0);
        let options = client::Options { long: 5, ..client::Options::new(listen, 1) };
        let client = client::start(None, options).unwrap();
        wait_for("connections", || server.figures().open_long == 5);
        let report = server.finish().unwrap();
        assert_eq!((report.figures.broken, report.undecided, report.without_data), (0, 5, 1), "{report:#?}");
        wait_for("resets", || client.figures().broken_by_cause.count(Cause::Reset) == 5);
    });
}

#[test]
fn what_cannot_be_is_refused() {
    let to = SocketAddr::from((Ipv4Addr::LOCALHOST, 7_000));
    let refused = |options: client::Options| client::start(None, options).unwrap_err().to_string();
    let options = client::Options::new(to, 1);
    assert!(refused(client::Options { long: 200_000, ..options.clone() }).contains("100000"));
    assert!(refused(client::Options { udp_interval: Duration::ZERO, ..options.clone() }).contains("pause"));
    assert!(refused(client::Options { sources: vec!["::1".parse().unwrap()], ..options }).contains("::1"));
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
    let _taken = TcpListener::bind(taken).unwrap();
    let error = format!("{:#}", server::start(None, taken).unwrap_err());
    assert!(error.contains(&taken.to_string()), "{error}");
}
