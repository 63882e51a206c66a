//! Key by which the manager of a cluster knows this machine: it follows from the node's private key, so that nothing more has to be
//! kept.

use ::cluster::message::{Proof, Secret, signed_bytes};
use ring::digest::{Context, SHA256};
use ring::signature::{Ed25519KeyPair, KeyPair as _};
use tunnel::PrivateKey;
use zeroize::Zeroizing;

/// The key, and the token by which it becomes known.
pub(crate) struct UnitKey {
    pair: Ed25519KeyPair,
    token: Secret,
}

impl UnitKey {
    /// Of a node with this private key; `None`, with a line in the log, if it cannot be had.
    pub fn new(private_key: &PrivateKey, token: &PrivateKey) -> Option<Self> {
        let mut context = Context::new(&SHA256);
        context.update(b"anabranch unit key");
        context.update(private_key.bytes());
        let mut seed = Zeroizing::new([0; 32]);
        seed.copy_from_slice(context.finish().as_ref());
        match Ed25519KeyPair::from_seed_unchecked(&*seed) {
            Ok(pair) => Some(Self { pair, token: Secret(*token.bytes()) }),
            Err(error) => {
                tracing::error!(%error, "no key for the cluster");
                None
            }
        }
    }

    /// The public half.
    pub fn public(&self) -> [u8; 32] {
        let mut key = [0; 32];
        key.copy_from_slice(self.pair.public_key().as_ref());
        key
    }

    /// Answer to the manager's challenge.
    pub fn prove(&self, nonce: &[u8; 32]) -> Proof {
        let mut signature = [0; 64];
        signature.copy_from_slice(self.pair.sign(&signed_bytes(nonce, &self.public())).as_ref());
        Proof { signature, token: Some(self.token) }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use ring::signature::{ED25519, UnparsedPublicKey};

    use super::*;

    #[test]
    fn the_key_follows_from_the_nodes_and_signs_the_challenge() {
        let key = |byte: u8| UnitKey::new(&PrivateKey::new([byte; 32]), &PrivateKey::new([5; 32])).unwrap();
        let (one, other) = (key(1), key(2));
        assert_eq!(one.public(), key(1).public());
        assert_ne!(one.public(), other.public());
        let proof = one.prove(&[9; 32]);
        let verify = |nonce: [u8; 32]| {
            UnparsedPublicKey::new(&ED25519, one.public())
                .verify(&signed_bytes(&nonce, &one.public()), &proof.signature)
        };
        assert!(verify([9; 32]).is_ok() && verify([8; 32]).is_err());
        assert_eq!(proof.token, Some(Secret([5; 32])));
        assert!(!format!("{proof:?}").contains("5, 5"), "not for logs");
    }
}
