//! Keys as WireGuard writes them: 32 bytes in base64, 44 characters ending in `=`.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use tunnel::PrivateKey;
use zeroize::{Zeroize, Zeroizing};

/// Why a text is not a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// Nothing there.
    #[error("the key is empty")]
    Empty,
    /// Characters base64 does not have, or wrong padding.
    #[error("not base64")]
    NotBase64,
    /// Base64, but of another length than 32 bytes.
    #[error("{0} bytes instead of 32")]
    Length(usize),
    /// A public key that gives everybody the same secret.
    #[error("not a usable public key")]
    Weak,
}

/// A new random private key.
pub fn generate() -> io::Result<PrivateKey> {
    let mut bytes = [0u8; 32];
    getrandom::fill(&mut bytes).map_err(|error| io::Error::other(error.to_string()))?;
    // Clamped as `wg genkey` does, so that other tools show the same bytes (RFC 7748 §5).
    bytes[0] &= 248;
    bytes[31] = (bytes[31] & 127) | 64;
    let key = PrivateKey::new(bytes);
    bytes.zeroize();
    Ok(key)
}

/// Base64 of 32 bytes.
#[must_use]
pub fn encode(bytes: &[u8; 32]) -> String {
    STANDARD.encode(bytes)
}

/// 32 bytes from base64; white space around it is ignored.
pub fn decode(text: &str) -> Result<[u8; 32], KeyError> {
    let text = text.trim();
    if text.is_empty() {
        return Err(KeyError::Empty);
    }
    // Longer texts cannot be keys; do not decode megabytes to find out.
    if text.len() > 256 {
        return Err(KeyError::Length(text.len() * 3 / 4));
    }
    let bytes = Zeroizing::new(STANDARD.decode(text).map_err(|_| KeyError::NotBase64)?);
    <[u8; 32]>::try_from(bytes.as_slice()).map_err(|_| KeyError::Length(bytes.len()))
}

/// A public key, checked to be usable.
pub fn decode_public(text: &str) -> Result<[u8; 32], KeyError> {
    let key = decode(text)?;
    if tunnel::keys::public_key_is_sound(&key) { Ok(key) } else { Err(KeyError::Weak) }
}

/// A private or preshared key.
pub fn decode_secret(text: &str) -> Result<PrivateKey, KeyError> {
    let mut bytes = decode(text)?;
    let key = PrivateKey::new(bytes);
    bytes.zeroize();
    Ok(key)
}

/// Contents of a key file.
pub struct KeyFile {
    /// Its text.
    pub text: Zeroizing<String>,
    /// Whether users other than the owner may read it.
    pub exposed: bool,
}

/// A key file is one line; nothing longer is read.
const KEY_FILE_BYTES_MAX: u64 = 4096;

/// Reads a key file.
pub fn read_file(path: &Path) -> io::Result<KeyFile> {
    let file = File::open(path)?;
    let metadata = file.metadata()?;
    if metadata.is_dir() {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    let mut text = Zeroizing::new(String::with_capacity(128));
    file.take(KEY_FILE_BYTES_MAX).read_to_string(&mut text)?;
    Ok(KeyFile { text, exposed: metadata.mode() & 0o077 != 0 })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn keys_round_trip() {
        let key = generate().unwrap();
        let text = encode(key.bytes());
        assert_eq!(text.len(), 44);
        assert_eq!(decode_secret(&format!("  {text}\n")).unwrap(), key);
        assert_ne!(generate().unwrap(), key);
    }

    #[test]
    fn public_key_of_rfc_7748() {
        // Section 6.1, Alice's keys, in base64.
        let private = decode_secret("dwdtCnMYpX08FsFyUbJmRd9ML4frwJkqsXf7pR25LCo=").unwrap();
        assert_eq!(encode(&private.public()), "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=");
    }

    #[test]
    fn wrong_keys() {
        assert_eq!(decode(" \n"), Err(KeyError::Empty));
        assert_eq!(decode("hub"), Err(KeyError::NotBase64));
        assert_eq!(decode("aGVsbG8="), Err(KeyError::Length(5)));
        assert_eq!(decode(&"A".repeat(1000)), Err(KeyError::Length(750)));
        assert_eq!(decode_public(&encode(&[0; 32])), Err(KeyError::Weak));
    }
}
