//! Secret keys, and the two small settings that both the configuration and the handshake speak of.

use subtle::ConstantTimeEq;
use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::{Zeroize, ZeroizeOnDrop};

/// 32 secret bytes: an X25519 private key, or a preshared key. Wiped when dropped, never printed,
/// compared in constant time.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct PrivateKey([u8; 32]);

impl PrivateKey {
    /// Wraps the bytes. An X25519 key needs no clamping: every use of it clamps.
    #[must_use]
    pub const fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The X25519 public key that belongs to this private key (RFC 7748).
    #[must_use]
    pub fn public(&self) -> [u8; 32] {
        PublicKey::from(&StaticSecret::from(self.0)).to_bytes()
    }

    /// The secret bytes.
    #[must_use]
    pub const fn bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl std::fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PrivateKey(secret)")
    }
}

impl PartialEq for PrivateKey {
    fn eq(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl Eq for PrivateKey {}

/// Whether a public key can take part in a Diffie-Hellman exchange. The few points of small order (the zero
/// key among them) give the same result to everybody and would let anyone pose as that peer.
#[must_use]
pub fn public_key_is_sound(public: &[u8; 32]) -> bool {
    // Clamped scalars are multiples of the cofactor 8, so any of them sends small-order points to zero.
    StaticSecret::from([0x55; 32]).diffie_hellman(&PublicKey::from(*public)).was_contributory()
}

/// How inner packets are protected (row T11), per tunnel. Control frames are sealed in all cases.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Encryption {
    /// Nothing is sealed: for networks that are protected otherwise, and measurements.
    Off = 0,
    /// The front of each datagram is clear but authenticated, the rest is sealed.
    Partial = 1,
    /// Everything behind the 16-byte header is sealed.
    #[default]
    On = 2,
}

impl Encryption {
    /// The number on the wire.
    #[must_use]
    pub const fn number(self) -> u8 {
        self as u8
    }

    /// The mode with this number.
    #[must_use]
    pub const fn from_number(number: u8) -> Option<Self> {
        Some(match number {
            0 => Self::Off,
            1 => Self::Partial,
            2 => Self::On,
            _ => return None,
        })
    }

    /// Outcome for two sides with these wishes: the stricter of both, so that neither can lower the other.
    #[must_use]
    pub fn agree(self, other: Self) -> Self {
        self.max(other)
    }
}

/// Definition of a flow (row T2): the fields that enter the hash which picks the core.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum FlowDefinition {
    /// Both addresses, both ports, protocol.
    #[default]
    FiveTuple = 0,
    /// Both addresses, both ports.
    FourTuple = 1,
    /// Both addresses.
    TwoTuple = 2,
    /// The five-tuple and the six DSCP bits.
    FiveTupleDscp = 3,
}

impl FlowDefinition {
    /// The number on the wire.
    #[must_use]
    pub const fn number(self) -> u8 {
        self as u8
    }

    /// Whether a connection of TCP on the ports of an older one is a flow of its own where cores of flows are remembered.
    #[must_use]
    pub const fn has_connections(self) -> bool {
        matches!(self, Self::FiveTuple | Self::FiveTupleDscp)
    }

    /// The definition with this number.
    #[must_use]
    pub const fn from_number(number: u8) -> Option<Self> {
        Some(match number {
            0 => Self::FiveTuple,
            1 => Self::FourTuple,
            2 => Self::TwoTuple,
            3 => Self::FiveTupleDscp,
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(text: &str) -> [u8; 32] {
        std::array::from_fn(|at| u8::from_str_radix(&text[2 * at..2 * at + 2], 16).unwrap_or_default())
    }

    #[test]
    fn public_keys_of_rfc_7748() {
        // Section 6.1: Alice, Bob.
        for (private, public) in [
            (
                "77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a",
                "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a",
            ),
            (
                "5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb",
                "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f",
            ),
        ] {
            assert_eq!(PrivateKey::new(hex(private)).public(), hex(public));
        }
    }

    #[test]
    fn points_of_small_order_are_refused() {
        let mut one = [0; 32];
        one[0] = 1;
        // A point of order 8.
        let eight = hex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800");
        for bad in [[0; 32], one, eight] {
            assert!(!public_key_is_sound(&bad));
        }
        for seed in 1..20 {
            assert!(public_key_is_sound(&PrivateKey::new([seed; 32]).public()));
        }
    }

    #[test]
    fn secrets_are_not_printed() {
        let key = PrivateKey::new([0xab; 32]);
        assert_eq!(format!("{key:?}"), "PrivateKey(secret)");
        assert_eq!(key, key.clone());
        assert_ne!(key, PrivateKey::new([0xaa; 32]));
    }

    #[test]
    fn numbers_round_trip() {
        for number in 0..=255 {
            if let Some(mode) = Encryption::from_number(number) {
                assert_eq!(mode.number(), number);
            }
            if let Some(flow) = FlowDefinition::from_number(number) {
                assert_eq!(flow.number(), number);
            }
        }
        assert_eq!((0..=255).filter_map(Encryption::from_number).count(), 3);
        assert_eq!((0..=255).filter_map(FlowDefinition::from_number).count(), 4);
    }

    #[test]
    fn the_stricter_wish_wins() {
        use Encryption::{Off, On, Partial};
        for (one, other, both) in [(Off, Off, Off), (Off, On, On), (Partial, Off, Partial), (On, Partial, On)]
        {
            assert_eq!(one.agree(other), both);
            assert_eq!(other.agree(one), both);
        }
    }
}
