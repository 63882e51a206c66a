#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::testing::{client_hello, records};

fn name(text: &str) -> Answer {
    Answer::Name(ServerName::new(text.as_bytes()).unwrap())
}

#[test]
fn the_name_is_found_as_soon_as_it_is_there() {
    let message = client_hello(Some("WWW.Example.org"), 700);
    assert_eq!(of_handshake(&message), name("www.example.org"));
    let answers: Vec<Answer> = (0..message.len()).map(|length| of_handshake(&message[..length])).collect();
    let first = answers.iter().position(|answer| *answer != Answer::Incomplete).unwrap();
    // The padding stands in front of the name here, another extension behind it.
    assert!((700..message.len() - 4).contains(&first), "{first} of {}", message.len());
    assert!(answers[first..].iter().all(|answer| *answer == name("www.example.org")));
}

#[test]
fn records_may_cut_the_message_anywhere() {
    let message = client_hello(Some("example.org"), 0);
    for length in 1..message.len() {
        let stream = records(&message, length);
        assert!(begins_hello(&stream));
        assert_eq!(of_records(&stream), name("example.org"), "{length}");
        let cut = stream.len() - 60;
        assert_eq!(of_records(&stream[..cut]), Answer::Incomplete, "{length}");
    }
    // A record of another kind in the middle of it.
    let mut stream = records(&message, 40);
    stream[45] = 23;
    assert_eq!(of_records(&stream), Answer::Nothing);
}

#[test]
fn what_names_no_server_is_nothing() {
    assert_eq!(of_handshake(&client_hello(None, 0)), Answer::Nothing);
    for name in ["192.0.2.1", "2001:db8::1", "a b", "", "..", "a..b", &"x".repeat(64)] {
        assert_eq!(of_handshake(&client_hello(Some(name), 0)), Answer::Nothing, "{name}");
    }
    let mut server_hello = client_hello(Some("example.org"), 0);
    server_hello[0] = 2;
    assert_eq!(of_handshake(&server_hello), Answer::Nothing);
    assert_eq!(of_records(b"GET / HTTP/1.1\r\n"), Answer::Nothing);
    assert!(!begins_hello(b"\x17\x03\x03\x00\x20\x01"));
}

#[test]
fn lengths_that_contradict_each_other_are_nothing() {
    let message = client_hello(Some("example.org"), 0);
    // The message ends within its extensions, which say more.
    let mut short = message.clone();
    short[3] -= 20;
    short.truncate(message.len() - 20);
    assert_eq!(of_handshake(&short), Answer::Nothing);
    // A name longer than its extension.
    let at = message.windows(11).position(|bytes| bytes == b"example.org").unwrap();
    let mut long = message;
    long[at - 1] += 1;
    assert_eq!(of_handshake(&long), Answer::Nothing);
}
