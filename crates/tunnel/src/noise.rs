//! The primitives under the Noise pattern: X25519 of x25519-dalek, ChaCha20-Poly1305 of ring, BLAKE2s of blake2, and the
//! system's random numbers. `snow` brings the pattern only, so that the product has one implementation of each primitive.
//!
//! What is secret and held here is wiped when it is dropped: private keys, cipher keys, the state of the hash, and what HKDF
//! computes on its way. The chaining key and the preshared key are `snow`'s, which does not wipe them.

use blake2::{Blake2s256, Digest};
use ring::aead;
use ring::rand::{SecureRandom, SystemRandom};
use snow::Error;
use snow::params::{CipherChoice, DHChoice, HashChoice};
use snow::resolvers::CryptoResolver;
use snow::types::{Cipher, Dh, Hash, Random};
use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::Zeroizing;

use crate::aead::TAG_BYTES;

/// Length of keys and of hashes, bytes.
const KEY_BYTES: usize = 32;
/// Block length of BLAKE2s, bytes.
const BLOCK_BYTES: usize = 64;

/// The primitives of [`crate::handshake::NOISE_PROTOCOL`], and no others.
#[derive(Clone, Copy, Debug)]
pub struct Primitives;

impl CryptoResolver for Primitives {
    fn resolve_rng(&self) -> Option<Box<dyn Random>> {
        Some(Box::new(SystemNumbers(SystemRandom::new())))
    }

    fn resolve_dh(&self, choice: &DHChoice) -> Option<Box<dyn Dh>> {
        matches!(choice, DHChoice::Curve25519).then(|| Box::new(X25519::new([0; KEY_BYTES])) as Box<dyn Dh>)
    }

    fn resolve_hash(&self, choice: &HashChoice) -> Option<Box<dyn Hash>> {
        matches!(choice, HashChoice::Blake2s).then(|| Box::new(Blake2s::default()) as Box<dyn Hash>)
    }

    fn resolve_cipher(&self, choice: &CipherChoice) -> Option<Box<dyn Cipher>> {
        matches!(choice, CipherChoice::ChaChaPoly).then(|| Box::new(ChaChaPoly::default()) as Box<dyn Cipher>)
    }
}

struct SystemNumbers(SystemRandom);

impl Random for SystemNumbers {
    fn try_fill_bytes(&mut self, dest: &mut [u8]) -> Result<(), Error> {
        self.0.fill(dest).map_err(|_| Error::Rng)
    }
}

/// A key pair of RFC 7748.
struct X25519 {
    private: StaticSecret,
    public: [u8; KEY_BYTES],
}

impl X25519 {
    fn new(private: [u8; KEY_BYTES]) -> Self {
        let private = StaticSecret::from(private);
        let public = PublicKey::from(&private).to_bytes();
        Self { private, public }
    }
}

impl Dh for X25519 {
    fn name(&self) -> &'static str {
        "25519"
    }

    fn pub_len(&self) -> usize {
        KEY_BYTES
    }

    fn priv_len(&self) -> usize {
        KEY_BYTES
    }

    fn set(&mut self, privkey: &[u8]) {
        let mut private = Zeroizing::new([0; KEY_BYTES]);
        private.copy_from_slice(privkey);
        *self = Self::new(*private);
    }

    fn generate(&mut self, rng: &mut dyn Random) -> Result<(), Error> {
        let mut private = Zeroizing::new([0; KEY_BYTES]);
        rng.try_fill_bytes(private.as_mut_slice())?;
        *self = Self::new(*private);
        Ok(())
    }

    fn pubkey(&self) -> &[u8] {
        &self.public
    }

    fn privkey(&self) -> &[u8] {
        self.private.as_bytes()
    }

    /// Refuses points of small order (RFC 7748 section 6.1): everybody knows the secret that they give.
    fn dh(&self, pubkey: &[u8], out: &mut [u8]) -> Result<(), Error> {
        let public = pubkey.first_chunk::<KEY_BYTES>().ok_or(Error::Dh)?;
        let shared = self.private.diffie_hellman(&PublicKey::from(*public));
        if !shared.was_contributory() {
            return Err(Error::Dh);
        }
        out.get_mut(..KEY_BYTES).ok_or(Error::Dh)?.copy_from_slice(shared.as_bytes());
        Ok(())
    }
}

/// ChaCha20-Poly1305 (RFC 8439) with Noise's nonce: 32 zero bits, the counter in little endian (section 12.3).
#[derive(Default)]
struct ChaChaPoly {
    key: Zeroizing<[u8; KEY_BYTES]>,
}

impl ChaChaPoly {
    /// ring's key, made for each of the few uses in a handshake: ring does not wipe its own.
    fn key(&self) -> aead::LessSafeKey {
        let key = aead::UnboundKey::new(&aead::CHACHA20_POLY1305, self.key.as_slice());
        aead::LessSafeKey::new(key.expect("the key is as long as the cipher's"))
    }
}

fn nonce(counter: u64) -> aead::Nonce {
    let mut nonce = [0; aead::NONCE_LEN];
    nonce[4..].copy_from_slice(&counter.to_le_bytes());
    aead::Nonce::assume_unique_for_key(nonce)
}

impl Cipher for ChaChaPoly {
    fn name(&self) -> &'static str {
        "ChaChaPoly"
    }

    fn set(&mut self, key: &[u8; KEY_BYTES]) {
        self.key.copy_from_slice(key);
    }

    fn encrypt(&self, counter: u64, authtext: &[u8], plaintext: &[u8], out: &mut [u8]) -> usize {
        let (text, rest) = out.split_at_mut(plaintext.len());
        text.copy_from_slice(plaintext);
        let tag = self.key().seal_in_place_separate_tag(nonce(counter), aead::Aad::from(authtext), text);
        let tag = tag.expect("a Noise message is shorter than the cipher's limit");
        rest[..TAG_BYTES].copy_from_slice(tag.as_ref());
        plaintext.len() + TAG_BYTES
    }

    fn decrypt(
        &self,
        counter: u64,
        authtext: &[u8],
        ciphertext: &[u8],
        out: &mut [u8],
    ) -> Result<usize, Error> {
        let (text, tag) = ciphertext.split_last_chunk::<TAG_BYTES>().ok_or(Error::Decrypt)?;
        let out = out.get_mut(..text.len()).ok_or(Error::Decrypt)?;
        out.copy_from_slice(text);
        self.key()
            .open_in_place_separate_tag(
                nonce(counter),
                aead::Aad::from(authtext),
                aead::Tag::from(*tag),
                out,
                0..,
            )
            .map(|opened| opened.len())
            .map_err(|_| Error::Decrypt)
    }
}

/// BLAKE2s (RFC 7693), with the HMAC (RFC 2104) and HKDF of Noise's section 4.3 such that nothing of them stays in memory.
#[derive(Default)]
struct Blake2s(Blake2s256);

impl Hash for Blake2s {
    fn name(&self) -> &'static str {
        "BLAKE2s"
    }

    fn block_len(&self) -> usize {
        BLOCK_BYTES
    }

    fn hash_len(&self) -> usize {
        KEY_BYTES
    }

    fn reset(&mut self) {
        self.0 = Blake2s256::new();
    }

    fn input(&mut self, data: &[u8]) {
        Digest::update(&mut self.0, data);
    }

    fn result(&mut self, out: &mut [u8]) {
        out[..KEY_BYTES].copy_from_slice(&std::mem::take(&mut self.0).finalize());
    }

    fn hmac(&mut self, key: &[u8], data: &[u8], out: &mut [u8]) {
        out[..KEY_BYTES].copy_from_slice(hmac(key, &[data]).as_slice());
    }

    fn hkdf(
        &mut self,
        chaining_key: &[u8],
        input_key_material: &[u8],
        outputs: usize,
        out1: &mut [u8],
        out2: &mut [u8],
        out3: &mut [u8],
    ) {
        let secret = hmac(chaining_key, &[input_key_material]);
        let mut last = Zeroizing::new([0; KEY_BYTES]);
        for (number, out) in (1u8..).zip([out1, out2, out3]).take(outputs) {
            let before = if number == 1 { &[][..] } else { last.as_slice() };
            last = hmac(secret.as_slice(), &[before, &[number]]);
            out[..KEY_BYTES].copy_from_slice(last.as_slice());
        }
    }
}

/// HMAC over the parts; the key is at most a block long.
fn hmac(key: &[u8], parts: &[&[u8]]) -> Zeroizing<[u8; KEY_BYTES]> {
    let pass = |pad: u8, parts: &[&[u8]]| {
        let mut block = Zeroizing::new([pad; BLOCK_BYTES]);
        for (byte, key) in block.iter_mut().zip(key) {
            *byte ^= key;
        }
        let mut hash = Blake2s256::new_with_prefix(block.as_slice());
        for part in parts {
            Digest::update(&mut hash, part);
        }
        Zeroizing::new(<[u8; KEY_BYTES]>::from(hash.finalize()))
    };
    pass(0x5c, &[pass(0x36, parts).as_slice()])
}

#[cfg(test)]
#[path = "noise_tests.rs"]
mod tests;
