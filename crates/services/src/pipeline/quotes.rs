//! ICMP errors that quote a fragment. The kernel's steering knows no ports of such a quote, so they come to any core.
//!
//! The quote of a first fragment has its ports: the error goes to its flow's owner like any packet of it. That of a later
//! one tells only addresses and identification: the core that sent the fragment on remembers its flow, and cores are
//! asked in turn.

use std::sync::Arc;

use packet::icmp::{HEADER_BYTES, Kind};
use packet::{DropReason, FlowKey, IpHeader};

use super::context::PacketContext;
use super::{Frame, Origin, Output, Services};
use crate::fragment::SentId;

/// Fragment that an ICMP error quotes.
pub(super) enum Quoted {
    /// A first fragment: the flow key of the error.
    First(FlowKey),
    /// A later one.
    Later(SentId),
}

impl Quoted {
    /// The fragment that an error quotes; `None`: it is no error, or quotes a whole packet, or nothing that can be read.
    #[inline]
    pub fn of(packet: &PacketContext, frame: &Frame<'_>) -> Option<Self> {
        if packet.icmp(frame) != Some(Kind::Error) {
            return None;
        }
        let quote = packet.header.payload(frame.packet()).get(HEADER_BYTES..)?;
        let inner = IpHeader::parse_quoted(quote).ok()?;
        let id = SentId::of(&inner).filter(|_| inner.version == packet.header.version)?;
        match inner.fragment {
            Some(fragment) if fragment.offset > 0 => Some(Self::Later(id)),
            _ => FlowKey::of_quoted_first(&inner, quote).map(|key| Self::First(key.reversed())),
        }
    }
}

impl Services {
    /// An ICMP error about a fragment.
    #[cold]
    pub(super) fn fragment_error(
        &mut self,
        packet: &PacketContext,
        frame: &mut Frame<'_>,
        quoted: &Quoted,
        out: &mut impl Output,
    ) {
        let id = match quoted {
            Quoted::First(key) => {
                let packet = PacketContext { key: *key, ..*packet };
                let found = self.flows.find(key, packet.tenant);
                return self.act_whole(&packet, frame, found, out);
            }
            Quoted::Later(id) => id,
        };
        let sent = self.fragments.sent.find(packet.now_ns, id);
        let flow = sent.and_then(|(key, tenant)| self.flows.find(&key, tenant));
        let Some((flow, of_quote)) = flow else {
            return self.ask_next_core(packet, frame, out);
        };
        // An error travels against the packet that it is about.
        if let Err(reason) = self.established_error(packet, frame, (flow, of_quote.flipped()), out) {
            self.dropped(frame, reason);
        }
    }

    /// The next core may have sent the quoted fragment on; the last one knows that nobody has.
    fn ask_next_core(&mut self, packet: &PacketContext, frame: &mut Frame<'_>, out: &mut impl Output) {
        let asked = match packet.origin {
            Origin::Handed { visit } => visit.saturating_add(1),
            Origin::Wire | Origin::MappingConfirmed | Origin::Hairpin => 1,
        };
        let ownership = &self.routing.ownership;
        let cores = ownership.cores;
        let later = (asked..cores).find_map(|visit| {
            let core =
                ((u16::from(self.routing.core) + 1 + u16::from(visit - asked)) % u16::from(cores)) as u8;
            ownership.is_alive(core).then_some((core, visit))
        });
        // Whoever forges errors costs one core, not all of them.
        let may_ask = packet.origin != Origin::Wire || self.fragments.questions.allow(packet.now_ns);
        match later {
            Some((core, visit)) if may_ask => self.pass_on(frame, core, Origin::Handed { visit }, None, out),
            Some(_) => self.dropped(frame, DropReason::IcmpInvalid),
            None => {
                let policy = Arc::clone(&self.routing.policy);
                if let Err(reason) = self.unknown_error(&policy, packet, frame) {
                    self.dropped(frame, reason);
                }
            }
        }
    }
}
