//! Keys that units prove, and tokens that operators get: what has to do with cryptography.

use std::collections::HashMap;
use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use cluster::message::{Message, Proof, signed_bytes};
use ring::digest::{SHA256, digest};
use ring::signature::{ED25519, UnparsedPublicKey};
use tokio::sync::mpsc;

/// A proved key, and the digest of the token that came with the proof, at this second since 1970.
pub type Proved = ([u8; 32], Option<([u8; 32], u64)>);

/// Connections on which a key is being proved.
#[derive(Default)]
pub struct Proofs(HashMap<u64, Asked>);

struct Asked {
    key: [u8; 32],
    nonce: [u8; 32],
}

impl Proofs {
    /// The unit of a connection told its key: it is sent a challenge. One that gets none connects again.
    pub fn ask(&mut self, connection: u64, key: [u8; 32], to: &mpsc::Sender<Message>) {
        if let Some(nonce) = random()
            && to.try_send(Message::Challenge { nonce }).is_ok()
        {
            self.0.insert(connection, Asked { key, nonce });
        }
    }

    /// Checks a proof; a challenge has one answer.
    pub fn check(&mut self, connection: u64, proof: &Proof) -> Option<Proved> {
        let Asked { key, nonce } = self.0.remove(&connection)?;
        let signed =
            UnparsedPublicKey::new(&ED25519, key).verify(&signed_bytes(&nonce, &key), &proof.signature);
        signed.ok()?;
        Some((key, proof.token.map(|token| (digest_of(&token.0), unix_s()))))
    }

    /// A connection ended.
    pub fn forget(&mut self, connection: u64) {
        self.0.remove(&connection);
    }

    /// All connections ended.
    pub fn clear(&mut self) {
        self.0.clear();
    }
}

/// A new token: its text, and the digest that is stored. `None`: there are no random numbers.
#[must_use]
pub fn make_token() -> Option<(String, [u8; 32])> {
    let bytes = random()?;
    Some((STANDARD.encode(bytes), digest_of(&bytes)))
}

/// Seconds since 1970.
#[must_use]
pub fn unix_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn digest_of(token: &[u8; 32]) -> [u8; 32] {
    let mut bytes = [0; 32];
    bytes.copy_from_slice(digest(&SHA256, token).as_ref());
    bytes
}

fn random() -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes).is_ok().then_some(bytes)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]
    use cluster::message::Secret;
    use ring::signature::{Ed25519KeyPair, KeyPair as _};

    use super::*;

    #[test]
    fn a_proof_is_of_this_challenge_and_this_key_and_counts_once() {
        let pair = Ed25519KeyPair::from_seed_unchecked(&[9; 32]).unwrap();
        let key: [u8; 32] = pair.public_key().as_ref().try_into().unwrap();
        let sign = |nonce: &[u8; 32]| {
            let signature = pair.sign(&signed_bytes(nonce, &key)).as_ref().try_into().unwrap();
            Proof { signature, token: Some(Secret([1; 32])) }
        };
        let mut proofs = Proofs::default();
        let (sender, mut receiver) = mpsc::channel(9);
        let mut ask = |proofs: &mut Proofs, key: [u8; 32]| {
            proofs.ask(1, key, &sender);
            let Ok(Message::Challenge { nonce }) = receiver.try_recv() else { panic!("no challenge") };
            nonce
        };
        let nonce = ask(&mut proofs, key);
        let proof = sign(&nonce);
        assert_eq!(proofs.check(2, &proof), None, "nobody was asked there");
        let (proved, token) = proofs.check(1, &proof).unwrap();
        assert_eq!((proved, token.map(|(digest, _)| digest)), (key, Some(digest_of(&[1; 32]))));
        assert_eq!(proofs.check(1, &proof), None);
        assert_ne!(ask(&mut proofs, key), nonce);
        assert_eq!(proofs.check(1, &proof), None, "a proof of another connection");
        let nonce = ask(&mut proofs, [3; 32]);
        assert_eq!(proofs.check(1, &sign(&nonce)), None, "another key");
    }

    #[test]
    fn tokens_are_all_different_and_known_by_their_digest() {
        let (text, digest) = make_token().unwrap();
        let bytes: [u8; 32] = STANDARD.decode(&text).unwrap().try_into().unwrap();
        assert_eq!((text.len(), digest_of(&bytes)), (44, digest));
        assert_ne!(make_token().unwrap().0, text);
    }
}
