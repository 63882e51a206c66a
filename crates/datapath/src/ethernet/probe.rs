//! Protection against loops: LANs that two TAP devices are in and that are joined elsewhere too.
//!
//! A node says on its LAN, once a second, that it is there. Bridges and other nodes pass that on as any multicast. When a
//! node's own word comes back to it by a *bond*, its LAN and that of another node are joined twice: a loop. Both hear each
//! other on their LAN then, and the one with the higher number stands by: it takes no frame from its TAP device and gives it
//! none, but these words, so that the proof goes on as long as the loop does. Three seconds without one and it works again. The
//! peers of a node that begins or ceases to stand by hear a word of that too: stations of its LAN are reached another way from
//! now on, and what its peers heard of them on their own LAN was by the way around. So two nodes of one site are a pair of which
//! one works, too.
//!
//! A word is a frame of EtherType 0x88b5 (IEEE 802, local experiments) to a group address of local meaning; payload, big endian:
//!
//! ```text
//! "ANABLOOP" | kind:8 (1 here, 2 forget) | hops:8 | number of the node:64 | proof:64
//! ```
//!
//! The proof is a hash under a secret of the node's, so that nobody else can make a node believe that its own word came back.

use packet::array_at;
use packet::ethernet::{EthernetHeader, FRAME_BYTES_MIN, Mac};
use services::hash::SecretState;
use services::icmp::Limiter;
use std::hash::BuildHasher as _;

use super::{Port, SECOND_NS};

/// Pause between two words, and shortest one when something looks like a loop.
const PAUSE_NS: u64 = SECOND_NS;
const PAUSE_NS_MIN: u64 = SECOND_NS / 10;
/// A word that was heard counts for so long.
const FRESH_NS: u64 = 3 * SECOND_NS;
/// Words of one side that are passed on, or heeded, in a second: anybody can make a frame that looks like one.
pub(super) const WORDS_PER_S: u32 = 200;
/// Nodes that pass a word on at most.
const HOPS: u8 = 8;

const ETHER_TYPE: u16 = 0x88b5;
const GROUP: Mac = Mac([0x03, 0x41, 0x4e, 0x41, 0x42, 0x52]);
const MAGIC: [u8; 8] = *b"ANABLOOP";
const KIND_AT: usize = 14 + 8;
const HOPS_AT: usize = 14 + 9;
const NUMBER_AT: usize = 14 + 10;
const PROOF_AT: usize = 14 + 18;

/// Kinds of words.
const HERE: u8 = 1;
/// The node begins or ceases to stand by.
const FORGET: u8 = 2;
/// Words of that to the peers: what is on its way then may teach them anew.
const FORGETS: u8 = 2;

/// Way of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Word {
    /// It is no word of a node.
    No,
    /// One of another node: it is passed on, whatever the state.
    PassOn,
    /// A node beyond this peer begins or ceases to stand by; for the other peers too.
    Forget,
    /// Our own, one that came too far, or one of too many: it ends here.
    Ends,
}

/// State of the protection at one core; the core that has all group frames hears, the others are told.
#[derive(Debug)]
pub(super) struct Protection {
    number: u64,
    secret: SecretState,
    next_ns: u64,
    said_ns: u64,
    /// When our own word came back by a bond.
    proof_ns: Option<u64>,
    /// When a node with a lower number was heard on the LAN.
    lower_ns: Option<u64>,
    standby_until_ns: u64,
    /// Words that the peers still get about that.
    forgets: u8,
}

impl Protection {
    pub fn new(number: u64, secret: SecretState) -> Self {
        Self {
            number,
            secret,
            next_ns: 0,
            said_ns: 0,
            proof_ns: None,
            lower_ns: None,
            standby_until_ns: 0,
            forgets: 0,
        }
    }

    /// Whether the TAP device stands by.
    pub fn stands_by(&self, now_ns: u64) -> bool {
        now_ns < self.standby_until_ns
    }

    /// Another core says until when it does.
    pub fn stand_by_until(&mut self, until_ns: u64) {
        self.standby_until_ns = self.standby_until_ns.max(until_ns);
    }

    /// Looks at a frame; a word that is passed on loses a hop. `words`: how many its side may still say ([`WORDS_PER_S`]). Also: until when the TAP device stands by, when that is news for
    /// the other cores.
    pub fn look(
        &mut self,
        now_ns: u64,
        from: Port,
        header: &EthernetHeader,
        frame: &mut [u8],
        words: Option<&mut Limiter>,
    ) -> (Word, Option<u64>) {
        if header.ether_type != ETHER_TYPE
            || header.payload_at != 14
            || header.dst != GROUP
            || array_at(frame, 14) != Some(MAGIC)
        {
            return (Word::No, None);
        }
        let (Some(number), Some(proof)) = (array_at(frame, NUMBER_AT), array_at(frame, PROOF_AT)) else {
            return (Word::No, None);
        };
        let (number, proof) = (u64::from_be_bytes(number), u64::from_be_bytes(proof));
        let own = number == self.number;
        let forget = frame.get(KIND_AT) == Some(&FORGET);
        match from {
            _ if forget => {}
            Port::Bond(_) if own && proof == self.proof() => self.proof_ns = Some(now_ns),
            Port::Tap if number < self.number => self.lower_ns = Some(now_ns),
            _ => {}
        }
        let hops = frame.get_mut(HOPS_AT);
        let far = hops.as_ref().is_none_or(|hops| **hops <= 1);
        // One to forget is heeded wherever it came to its end; how far it goes on, the hops of the bond say.
        let passes = !own && (forget || !far) && words.is_some_and(|words| words.allow(now_ns));
        if let Some(hops) = hops {
            *hops = hops.saturating_sub(1).min(HOPS);
        }
        let word = match (forget, from) {
            (true, Port::Bond(_)) if passes => Word::Forget,
            (false, _) if passes => Word::PassOn,
            _ => Word::Ends,
        };
        (word, self.decide(now_ns))
    }

    /// Stands by while both are fresh: the proof and somebody who works in our place.
    fn decide(&mut self, now_ns: u64) -> Option<u64> {
        let until = |at: Option<u64>| at.map(|at| at + FRESH_NS).filter(|until| *until > now_ns);
        let until_ns = until(self.proof_ns)?.min(until(self.lower_ns)?);
        (until_ns > self.standby_until_ns).then(|| {
            if !self.stands_by(now_ns) {
                self.forgets = FORGETS;
                self.hurry();
            }
            self.standby_until_ns = until_ns;
            until_ns
        })
    }

    /// The node has ceased to stand by: its peers hear of it.
    pub fn works_again(&mut self) {
        self.forgets = FORGETS;
        self.hurry();
    }

    /// Something looks like a loop: say the next word soon.
    pub fn hurry(&mut self) {
        self.next_ns = self.next_ns.min(self.said_ns + PAUSE_NS_MIN);
    }

    /// When the next word is due.
    pub fn next_ns(&self) -> u64 {
        self.next_ns
    }

    /// Our words, if they are due: for the LAN, and for the peers.
    pub fn say(&mut self, now_ns: u64) -> Option<(Vec<u8>, Option<Vec<u8>>)> {
        if now_ns < self.next_ns {
            return None;
        }
        (self.said_ns, self.next_ns) = (now_ns, now_ns + PAUSE_NS);
        let forget = (self.forgets > 0).then(|| self.word(FORGET));
        self.forgets = self.forgets.saturating_sub(1);
        Some((self.word(HERE), forget))
    }

    fn word(&self, kind: u8) -> Vec<u8> {
        let [.., a, b, c, d, e] = self.number.to_be_bytes();
        let mut frame = Vec::with_capacity(FRAME_BYTES_MIN);
        frame.extend(GROUP.0);
        frame.extend([2, a, b, c, d, e]);
        frame.extend(ETHER_TYPE.to_be_bytes());
        frame.extend(MAGIC);
        frame.extend([kind, HOPS]);
        frame.extend(self.number.to_be_bytes());
        frame.extend(self.proof().to_be_bytes());
        frame.resize(FRAME_BYTES_MIN, 0);
        frame
    }

    fn proof(&self) -> u64 {
        self.secret.hash_one(self.number)
    }
}
