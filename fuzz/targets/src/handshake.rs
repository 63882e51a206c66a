//! Datagrams before there is a session.

use std::net::SocketAddr;
use std::sync::{Mutex, OnceLock, PoisonError};

use packet::DropReason;
use tunnel::handshake::{HANDSHAKE_BYTES_MAX, Identity, Initiator, open_initiation};
use tunnel::hello::Hello;
use tunnel::mac::{Admission, CookieStore, Guard, GuardLimits, MAC_BYTES, MacKeys};
use tunnel::time::Time;

use crate::seeds;

/// The same for all inputs: making keys is what costs time.
struct Scene {
    dialer: Identity,
    listener: Identity,
    /// Waits for a Response for ever.
    waiting: Mutex<Initiator>,
}

fn scene() -> &'static Scene {
    static SCENE: OnceLock<Scene> = OnceLock::new();
    SCENE.get_or_init(|| {
        let (dialer, listener) = (seeds::dialer(), seeds::listener());
        let (waiting, _) = start(&dialer, &listener);
        Scene { dialer, listener, waiting: Mutex::new(waiting) }
    })
}

fn start(dialer: &Identity, listener: &Identity) -> (Initiator, Vec<u8>) {
    Initiator::start(dialer, &listener.public(), None, &seeds::hello(Some(5)), seeds::DIALER_INDEX, 2, None)
        .expect("the hello fits")
}

/// Datagrams of a stranger: as they are, and with the MAC that everybody who knows our public key can make. Only an
/// Initiation of our own making may open, and no Response ever ends the waiting attempt.
pub fn handshake(data: &[u8]) {
    let scene = scene();
    one(scene, data);
    if data.len() <= 2 * HANDSHAKE_BYTES_MAX {
        for public in [scene.listener.public(), scene.dialer.public()] {
            let mut stamped = data.to_vec();
            MacKeys::new(&public).append(&mut stamped, None);
            one(scene, &stamped);
        }
    }
    if let Ok(hello) = Hello::decode(data) {
        // Only what was longer than this version writes cannot be written.
        if let Ok(bytes) = hello.encode() {
            assert!(Hello::decode(&bytes).as_ref() == Ok(&hello), "the hello is read back as something else");
        }
    }
}

fn one(scene: &Scene, datagram: &[u8]) {
    if let Ok(opened) = open_initiation(&scene.listener, datagram) {
        assert_eq!(opened.remote_static, scene.dialer.public(), "a stranger spoke as somebody else");
    }
    let mut waiting = scene.waiting.lock().unwrap_or_else(PoisonError::into_inner);
    assert!(waiting.finish(datagram).is_err(), "a Response that nobody sent was accepted");
    guarded(scene, datagram);
}

/// A listener under load: it answers with less than it gets, or not at all.
fn guarded(scene: &Scene, datagram: &[u8]) {
    let source = SocketAddr::from(([192, 0, 2, 1], 4600));
    let limits = GuardLimits { free_per_second: 1, free_burst: 1, ..GuardLimits::default() };
    let guard = Guard::new(&scene.listener.public(), [7; 32], limits);
    let mut store = CookieStore::new(&scene.listener.public());
    let now = Time::from_ns(1_000_000_000);
    for _ in 0..3 {
        store.sent(datagram);
        if let Admission::Reply(reply) = guard.admit(now, source, datagram) {
            assert!(
                reply.len() <= datagram.len(),
                "{} bytes answer {}: an amplifier",
                reply.len(),
                datagram.len()
            );
            // Who sent the message takes the answer to it, but not a changed one.
            let mut changed = reply;
            changed[reply.len() - 1] ^= 1;
            assert_eq!(store.accept(now, &changed), Err(DropReason::HandshakeCookie));
            assert_eq!(store.accept(now, &reply), Ok(()));
            assert!(store.cookie(now).is_some());
        }
    }
    assert!(store.accept(now, datagram).is_err(), "a cookie reply that nobody sent was accepted");
}

/// Somebody in between changes bytes of a genuine handshake: `data` is a list of (offset:16, xor:8), first for the
/// Initiation, behind an offset of 0xffff for the Response, cut after 0xfffe. What was changed is refused, and the
/// genuine message still works afterwards.
pub fn tampering(data: &[u8]) {
    let Scene { dialer, listener, .. } = scene();
    let (mut initiator, initiation) = start(dialer, listener);
    let mut edits = data.chunks_exact(3).map(|edit| (u16::from_be_bytes([edit[0], edit[1]]), edit[2]));
    let changed = edited(&initiation, edits.by_ref().take_while(|edit| edit.0 != u16::MAX));
    if let Some(changed) = changed {
        assert!(open_initiation(listener, &changed).is_err(), "a changed Initiation was accepted");
    }
    let opened = open_initiation(listener, &initiation).expect("a genuine Initiation");
    assert_eq!((opened.sender_index, opened.path, opened.timestamp_ns), (seeds::DIALER_INDEX, 2, 5));
    let (response, theirs) =
        opened.respond(None, &seeds::hello(None), seeds::LISTENER_INDEX, None).expect("the hello fits");
    if let Some(changed) = edited(&response, edits) {
        assert!(initiator.finish(&changed).is_err(), "a changed Response was accepted");
    }
    let ours = initiator.finish(&response).expect("a genuine Response after a bad one");
    assert!(ours.send_key == theirs.receive_key && ours.receive_key == theirs.send_key);
    assert_eq!(ours.remote_index, seeds::LISTENER_INDEX);
}

/// `message` with changes, if there are any that matter: nobody checks mac2 unless under load.
fn edited(message: &[u8], edits: impl Iterator<Item = (u16, u8)>) -> Option<Vec<u8>> {
    let mut changed = message.to_vec();
    for (offset, xor) in edits {
        if offset == u16::MAX - 1 {
            changed.truncate(message.len() * usize::from(xor) / 256);
        } else if !changed.is_empty() {
            let at = usize::from(offset) % changed.len();
            changed[at] ^= xor;
        }
    }
    let checked = message.len() - MAC_BYTES;
    (changed.get(..checked) != message.get(..checked)).then_some(changed)
}
