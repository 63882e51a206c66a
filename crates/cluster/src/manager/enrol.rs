//! Units that are known by a key of their own, and tokens by which a key becomes known, once each.
//!
//! The caller checks signatures and digests; here is what follows from them. A token is stored as its digest, and forgotten with
//! the same write that makes the key known: it is used once, whatever fails in between.

use steering::units::NODES_MAX;

use super::command::{Command, CommandError, Step, check_weight};
use super::state::{Accepted, SHARE_NORMAL, Standing, UnitRecord};
use super::{Manager, Output, Then};
use crate::message::{Message, Refusal, Role};

/// Most tokens that nobody has used yet.
pub const TOKENS_MAX: usize = 64;

/// A token that nobody has used yet.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Token {
    /// SHA-256 of its bytes.
    pub digest: [u8; 32],
    /// The unit that it is for.
    pub node: u16,
    /// Its task.
    pub role: Role,
    /// Its capacity; `None`: what it says of itself.
    pub weight: Option<u32>,
    /// When it ends, seconds since 1970.
    pub ends_s: u64,
}

impl std::fmt::Debug for Token {
    /// Without the digest.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Token")
            .field("node", &self.node)
            .field("ends_s", &self.ends_s)
            .finish_non_exhaustive()
    }
}

/// A unit that has proved a key and wants to be known by it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Enrolment {
    connection: u64,
    /// Digest of the token.
    digest: [u8; 32],
    now_s: u64,
}

impl Enrolment {
    pub(super) fn connection(self) -> u64 {
        self.connection
    }
}

/// Work that waits while a state is being written.
#[derive(Clone, Debug)]
pub(super) enum Queued {
    Command(u64, Command),
    Token(u64, Token, u64),
    Enrol(Enrolment),
}

impl Manager {
    /// A token was made, at `now_s` seconds since 1970; the answer is an [`Output::Answer`]. An earlier one for the same unit ends.
    pub fn issue(&mut self, now_ns: u64, request: u64, token: Token, now_s: u64) {
        self.queue(now_ns, Queued::Token(request, token, now_s));
    }

    /// The unit of a connection has proved that it has `key`. `token`: the digest of the token that it told, and the time in seconds
    /// since 1970; of no account where the key is known already.
    pub fn proved(&mut self, now_ns: u64, connection: u64, key: [u8; 32], token: Option<([u8; 32], u64)>) {
        let known = self.state.keys.values().any(|known| *known == key);
        let Some(entry) = self.connections.get_mut(&connection) else { return };
        entry.key = Some(key);
        match token.filter(|_| !known) {
            None => self.send(connection, Message::Admitted),
            Some((digest, now_s)) => {
                self.queue(now_ns, Queued::Enrol(Enrolment { connection, digest, now_s }));
            }
        }
    }

    /// The unit of a connection did not prove the key that it told.
    pub fn unproved(&mut self, connection: u64) {
        self.refuse(connection, 0, Refusal::Key);
    }

    /// Makes a token known.
    pub(super) fn accept_token(&mut self, request: u64, token: Token, now_s: u64) {
        if let Err(error) = self.check_token(&token, now_s) {
            self.outputs.push(Output::Answer { request, result: Err(error) });
            return;
        }
        let before = self.state.clone();
        self.state.tokens.retain(|known| known.ends_s > now_s && known.node != token.node);
        self.state.tokens.push(token);
        let number = self.state.number();
        self.event(Some(token.node), "a token was made for it".into());
        self.save(Then::Accept { request, number }, before);
    }

    fn check_token(&self, token: &Token, now_s: u64) -> Result<(), CommandError> {
        let node = token.node;
        if node >= NODES_MAX {
            return Err(CommandError::Invalid(format!(
                "node id {node}: 0 to {} are possible",
                NODES_MAX - 1
            )));
        }
        if let Some(weight) = token.weight {
            check_weight(weight)?;
        }
        if self.state.units.contains_key(&node) {
            return Err(CommandError::Conflict(format!("unit {node} is enrolled; remove it first")));
        }
        let others = self.state.tokens.iter().filter(|known| known.ends_s > now_s && known.node != node);
        if others.count() >= TOKENS_MAX {
            return Err(CommandError::Conflict(format!("{TOKENS_MAX} tokens wait for their use already")));
        }
        Ok(())
    }

    /// A key becomes known by a token, and the unit takes part.
    pub(super) fn accept_enrolment(&mut self, enrolment: Enrolment) {
        let Enrolment { connection, digest, now_s } = enrolment;
        let Some(super::Connection { address, key: Some(key), .. }) =
            self.connections.get(&connection).copied()
        else {
            return;
        };
        let equal = |known: &[u8; 32]| known.iter().zip(&digest).fold(0, |all, (a, b)| all | (a ^ b)) == 0;
        // All of them are compared, so that the time says nothing.
        let found =
            self.state.tokens.iter().filter(|token| equal(&token.digest)).fold(None, |_, token| Some(*token));
        let Some(token) = found.filter(|token| token.ends_s > now_s) else {
            return self.refuse(connection, 0, Refusal::Token);
        };
        let taken = self.state.units.values().any(|unit| unit.address == address);
        if taken || self.state.units.contains_key(&token.node) {
            return self.refuse(connection, token.node, Refusal::Identity);
        }
        let before = self.state.clone();
        self.state.tokens.retain(|known| known.digest != token.digest);
        self.state.keys.insert(token.node, key);
        let unit = UnitRecord {
            address,
            role: token.role,
            weight: token.weight.unwrap_or(0),
            share_permille: SHARE_NORMAL,
            standing: Standing::Free,
            joined: 0,
            instance: 0,
            forget: false,
            migrate: false,
        };
        self.state.units.insert(token.node, unit);
        let number = self.state.number();
        let add = Step::Add { node: token.node, enrol: None, weight: token.weight };
        self.state.accepted.push(Accepted { number, command: Command::Change(vec![add]) });
        self.event(Some(token.node), format!("enrolled from {address} by its token"));
        self.save(Then::Admit { connection }, before);
    }

    /// The key is stored.
    pub(super) fn enrolled(&mut self, connection: u64) {
        self.due.plan = true;
        self.send(connection, Message::Admitted);
    }
}
