//! Crates without I/O: no clock, no sockets, no threads, no randomness of their own.

use super::files::File;
use super::source::Source;
use super::{Violation, graph};

/// A word of the code, what to do instead, and whether tests may use it.
const BANNED: &[(&str, &str, bool)] = &[
    ("Instant", "take `now: Time` from the caller", false),
    ("SystemTime", "take the time from the caller", false),
    ("UdpSocket", "return datagrams to the caller", false),
    ("TcpStream", "return bytes to the caller", false),
    ("TcpListener", "leave sockets to the crates `linux` and `engine`", false),
    ("UnixStream", "leave sockets to the crate `control`", false),
    ("UnixDatagram", "leave sockets to the crate `control`", false),
    ("ToSocketAddrs", "names are resolved by the crate `control`", false),
    ("tokio", "a state machine needs no runtime", false),
    ("thread::spawn", "the caller owns the threads", true),
    ("thread::scope", "the caller owns the threads", true),
    ("thread::Builder", "the caller owns the threads", true),
    ("thread::sleep", "return a deadline to the caller", true),
    ("std::fs", "the caller reads and writes files", true),
    ("std::process", "the caller starts and ends processes", true),
    ("std::env", "take settings as arguments", true),
    ("getrandom", "take random bytes or a seed as an argument", true),
    ("OsRng", "take random bytes or a seed as an argument", true),
    ("SystemRandom", "take random bytes or a seed as an argument", true),
    ("RandomState", "use a fixed or seeded hasher: iteration order must not change between runs", true),
];

/// Where a word stands all the same.
const EXCEPTIONS: [(&str, &str); 1] = [
    // Ephemeral keys of a handshake: an argument could be given twice, or kept.
    ("crates/tunnel/src/noise.rs", "SystemRandom"),
];

/// Looks for words that a crate without I/O has no use for.
pub fn check(file: &File, source: &Source, found: &mut Vec<Violation>) {
    let name = file.package().rsplit('/').next().unwrap_or_default();
    if !graph::SANS_IO.contains(&name) {
        return;
    }
    for (word, instead, tests_may) in BANNED {
        if EXCEPTIONS.contains(&(file.path.as_str(), word)) {
            continue;
        }
        for at in source.words(word) {
            if *tests_may && (file.is_test() || source.is_test(at)) {
                continue;
            }
            found.push(Violation {
                file: file.path.clone(),
                line: source.line(at),
                rule: "sans-io",
                message: format!("`{word}` in `{name}`, which has no I/O and no clock: {instead}"),
            });
        }
    }
}
