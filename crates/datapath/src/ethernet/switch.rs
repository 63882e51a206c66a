//! Where a frame goes: the decision of a learning switch whose ports are the TAP device and the bonds of peers (row T14).
//!
//! 1. Words of the loop protection pass in any case; while this node stands by, nothing else passes the TAP device.
//! 2. Frames that are no frames, that come from no station, or that no bridge passes on end here.
//! 3. The source is learnt, and so is what ARP and neighbor discovery say.
//! 4. A known destination gets the frame, never on the side that it came from; between two peers only where that is
//!    configured (`relay`) and the frame has hops left.
//! 5. A question about an address whose owner is known is answered.
//! 6. Everything else is flooded, within the rate that its side may flood: to the LAN and all peers if it came from the
//!    LAN, to the LAN alone if it came from a peer (split horizon), with `relay` to the other peers as well.
//!
//! Pure: time and bytes come in. One core decides about a frame; [`Switch::news`] is for the others.

use std::collections::BTreeMap;

use packet::DropReason;
use packet::attachment::BondId;
use packet::ethernet::{EthernetHeader, Resolution};
use services::hash::SecretState;
use services::icmp::Limiter;

use super::neighbors::Neighbors;
use super::probe::{Protection, WORDS_PER_S, Word};
use super::stations::{Learned, Station, StationLimits, Stations};
use super::{Port, SECOND_NS};

/// News that wait for the other cores at most; beyond that those learn by themselves.
const NEWS_MAX: usize = 256;
/// Entries of a table that are looked at a second at least, for age.
const SWEEP_PARTS: u64 = 8;

/// Settings of the switch; all may change while it works.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Largest payload of a frame behind its header and tags: the MTU of the TAP device.
    pub mtu: u16,
    /// Peers may reach each other through this node.
    pub relay: bool,
    /// Stations at most; the LAN has half of them.
    pub stations_max: usize,
    /// Stations behind one peer at most.
    pub stations_per_peer: usize,
    /// A station that is silent is forgotten after so many seconds.
    pub age_s: u32,
    /// Frames a second that one side may flood: broadcasts and multicasts, and as many again to unknown stations.
    pub flood_per_s: u32,
    /// Questions about known addresses are answered here.
    pub answers: bool,
    /// Peers that Ethernet frames are exchanged with.
    pub peers: Vec<BondId>,
    /// Those of them that are down: their stations may be elsewhere.
    pub down: Vec<BondId>,
    /// Number of this node among all that share a LAN: the one with the lowest works.
    pub number: u64,
    /// Cores that work: each has its part of the rate for unknown stations.
    pub cores: u8,
}

impl Settings {
    fn limits(&self) -> StationLimits {
        StationLimits {
            max: self.stations_max,
            per_peer: self.stations_per_peer,
            age_ns: u64::from(self.age_s) * SECOND_NS,
        }
    }
}

/// A decision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The frame ends here.
    Drop(DropReason),
    /// It goes there.
    To(Port),
    /// It goes to all of these.
    Flood {
        /// The TAP device gets it.
        tap: bool,
        /// All peers but the one that it came from get it.
        peers: bool,
    },
    /// It ends here, and this frame goes back to where it came from.
    Answer(Vec<u8>),
    /// It ends here without being lost: a word of a node that was heard.
    Heard,
}

/// News of one core for the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum News {
    /// Where a station is.
    Station(Station),
    /// The TAP device stands by until then, ns.
    Standby(u64),
    /// Stations behind this peer may be elsewhere, and those of the LAN behind it.
    Forget(Port),
    /// All stations may be elsewhere.
    ForgetAll,
}

/// Counts of one core.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SwitchCounters {
    /// Frames to a known station.
    pub known: u64,
    /// Frames that were flooded.
    pub flooded: u64,
    /// Frames of one peer that went to others.
    pub relayed: u64,
    /// Questions that were answered here.
    pub answered: u64,
    /// Stations that were not learnt for want of room.
    pub not_learned: u64,
    /// How often stations had to be forgotten because a node began or ceased to stand by: what bridges learnt is wrong then.
    pub forgotten: u64,
}

/// How often one side may flood, or say words.
#[derive(Clone, Copy, Debug)]
struct Budget {
    group: Limiter,
    unknown: Limiter,
    /// Of the loop protection.
    words: Limiter,
}

/// The switch at one core.
#[derive(Debug)]
pub struct Switch {
    settings: Settings,
    stations: Stations,
    neighbors: Neighbors,
    protection: Protection,
    budgets: BTreeMap<Port, Budget>,
    news: Vec<News>,
    swept_ns: u64,
    /// The TAP device stood by when this core last looked.
    was_standby: bool,
    /// Counts.
    pub counters: SwitchCounters,
}

impl Switch {
    /// A switch that knows nothing yet. `secret`: key of its tables and proofs, the same at all cores of a node.
    #[must_use]
    pub fn new(settings: Settings, secret: SecretState) -> Self {
        let mut switch = Self {
            stations: Stations::new(settings.limits(), secret.clone()),
            neighbors: Neighbors::new(settings.limits(), secret.clone()),
            protection: Protection::new(settings.number, secret),
            budgets: BTreeMap::new(),
            news: Vec::new(),
            swept_ns: 0,
            was_standby: false,
            counters: SwitchCounters::default(),
            settings,
        };
        switch.set_budgets();
        switch
    }

    /// Settings in force.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Other settings from now on. Stations of peers that are gone are forgotten.
    pub fn configure(&mut self, settings: Settings) {
        self.stations.set_limits(settings.limits());
        self.neighbors.set_limits(settings.limits());
        self.settings = settings;
        let Settings { peers, down, .. } = &self.settings;
        self.stations.keep_ports(|port| match port {
            Port::Tap => true,
            Port::Bond(bond) => peers.contains(&bond) && !down.contains(&bond),
        });
        self.set_budgets();
    }

    fn set_budgets(&mut self) {
        let ports = self.settings.peers.iter().map(|bond| Port::Bond(*bond)).chain([Port::Tap]);
        let group = self.settings.flood_per_s;
        let unknown = group.div_ceil(u32::from(self.settings.cores.max(1)));
        let mut old = std::mem::take(&mut self.budgets);
        for port in ports {
            let new = Budget {
                group: Limiter::new(group),
                unknown: Limiter::new(unknown),
                words: Limiter::new(WORDS_PER_S),
            };
            let mut budget = old.remove(&port).unwrap_or(new);
            budget.group.set_rate(group);
            budget.unknown.set_rate(unknown);
            self.budgets.insert(port, budget);
        }
    }

    /// Decides about a frame. `hops`: how often it may still go from peer to peer, this time included. The bytes of a word of
    /// the loop protection may change.
    pub fn frame(&mut self, now_ns: u64, from: Port, hops: u8, frame: &mut [u8]) -> Verdict {
        self.decide(now_ns, from, hops, frame).unwrap_or_else(Verdict::Drop)
    }

    fn decide(&mut self, now_ns: u64, from: Port, hops: u8, frame: &mut [u8]) -> Result<Verdict, DropReason> {
        let header = EthernetHeader::parse(frame)?;
        let words = self.budgets.get_mut(&from).map(|budget| &mut budget.words);
        let (word, until_ns) = self.protection.look(now_ns, from, &header, frame, words);
        if let Some(until_ns) = until_ns {
            self.counters.forgotten += u64::from(!self.was_standby);
            self.was_standby = true;
            self.tell(News::Standby(until_ns));
        }
        match word {
            Word::PassOn => return Ok(self.everywhere(from, hops)),
            Word::Forget => {
                self.counters.forgotten += 1;
                self.forget_behind(from);
                self.tell(News::Forget(from));
                return Ok(Verdict::Flood { tap: false, peers: self.settings.relay && hops > 1 });
            }
            Word::Ends => return Ok(Verdict::Heard),
            Word::No => {}
        }
        let stands_by = self.protection.stands_by(now_ns);
        if stands_by && from == Port::Tap {
            return Err(DropReason::EthernetLoop);
        }
        // The kernel keeps to the MTU by itself, and gives several frames in one.
        let too_long = frame.len() > header.payload_at + usize::from(self.settings.mtu);
        if from != Port::Tap && too_long || !header.src.is_station() {
            return Err(DropReason::EthernetMalformed);
        }
        if header.dst.is_link_local() {
            return Err(DropReason::EthernetLinkLocal);
        }
        let is_known = self.learn(now_ns, from, &header)?;
        let resolution = Resolution::of(&header, frame).filter(|_| self.settings.answers);
        if let Some((address, mac, router)) = resolution.and_then(|it| it.tells).filter(|_| is_known) {
            self.neighbors.tell(now_ns, (header.vlan, address), (from, mac), router);
        }
        let group = header.dst.is_group();
        if !group && let Some(port) = self.stations.port_of(now_ns, header.vlan, header.dst) {
            return self.towards(from, port, hops, stands_by);
        }
        if let Some(answer) = resolution.and_then(|asked| self.answer(now_ns, from, &header, &asked, frame)) {
            self.counters.answered += 1;
            return Ok(Verdict::Answer(answer));
        }
        let allowed = self.budgets.get_mut(&from).is_some_and(|budget| {
            let limiter = if group { &mut budget.group } else { &mut budget.unknown };
            limiter.allow(now_ns)
        });
        if !allowed {
            return Err(DropReason::EthernetFlood);
        }
        match self.everywhere(from, hops) {
            Verdict::Flood { tap, peers } if stands_by && tap && !peers => Err(DropReason::EthernetLoop),
            Verdict::Flood { tap, peers } => {
                self.counters.flooded += 1;
                self.counters.relayed += u64::from(peers && from != Port::Tap);
                Ok(Verdict::Flood { tap: tap && !stands_by, peers })
            }
            verdict => Ok(verdict),
        }
    }

    /// All sides but the one that it came from, as far as split horizon and hops allow.
    fn everywhere(&self, from: Port, hops: u8) -> Verdict {
        match from {
            Port::Tap => Verdict::Flood { tap: false, peers: true },
            Port::Bond(_) => Verdict::Flood { tap: true, peers: self.settings.relay && hops > 1 },
        }
    }

    /// Learns where the source is; whether it has a place in the table.
    fn learn(&mut self, now_ns: u64, from: Port, header: &EthernetHeader) -> Result<bool, DropReason> {
        match self.stations.learn(now_ns, header.vlan, header.src, from) {
            Learned::Known => {}
            Learned::NoRoom => {
                self.counters.not_learned += 1;
                return Ok(false);
            }
            Learned::News => self.tell(News::Station(Station {
                vlan: header.vlan,
                mac: header.src,
                port: from,
                heard_ns: now_ns,
            })),
            Learned::Held => {
                self.protection.hurry();
                return Err(DropReason::EthernetMoves);
            }
        }
        Ok(true)
    }

    fn towards(&mut self, from: Port, to: Port, hops: u8, stands_by: bool) -> Result<Verdict, DropReason> {
        match (from, to) {
            (from, to) if from == to => return Err(DropReason::EthernetSameSide),
            (_, Port::Tap) if stands_by => return Err(DropReason::EthernetLoop),
            (Port::Bond(_), Port::Bond(_)) if !self.settings.relay => {
                return Err(DropReason::EthernetNoRelay);
            }
            (Port::Bond(_), Port::Bond(_)) if hops <= 1 => return Err(DropReason::EthernetHops),
            (Port::Bond(_), Port::Bond(_)) => self.counters.relayed += 1,
            _ => {}
        }
        self.counters.known += 1;
        Ok(Verdict::To(to))
    }

    /// Answers a question if that is known: the owner is on another side, and was heard there.
    fn answer(
        &self,
        now_ns: u64,
        from: Port,
        header: &EthernetHeader,
        asked: &Resolution,
        frame: &[u8],
    ) -> Option<Vec<u8>> {
        let (mac, router) = self.neighbors.owner(now_ns, header.vlan, asked.asks?)?;
        let at = self.stations.port_of(now_ns, header.vlan, mac)?;
        if at == from || mac == header.src {
            return None;
        }
        asked.answer(header, frame, mac, router)
    }

    /// Forgets who is behind this peer; and who was heard on the LAN, because that may have been by the way around.
    fn forget_behind(&mut self, peer: Port) {
        self.stations.keep_ports(|port| port != peer && port != Port::Tap);
    }

    fn tell(&mut self, news: News) {
        if self.news.len() < NEWS_MAX {
            self.news.push(news);
        }
    }

    /// News for the other cores since the last call.
    pub fn news(&mut self) -> Vec<News> {
        std::mem::take(&mut self.news)
    }

    /// News of another core.
    pub fn hear(&mut self, news: &News) {
        match news {
            News::Station(station) => self.stations.hear(station),
            News::Standby(until_ns) => self.protection.stand_by_until(*until_ns),
            News::Forget(from) => self.forget_behind(*from),
            News::ForgetAll => self.stations.keep_ports(|_| false),
        }
    }

    /// Forgets what is old, a part of it at a time. `speaks`: this core has the frames that many hear; what it gives then is a
    /// frame for the LAN, and perhaps one for all peers.
    pub fn tick(&mut self, now_ns: u64, speaks: bool) -> Option<(Vec<u8>, Option<Vec<u8>>)> {
        if self.was_standby && !self.protection.stands_by(now_ns) {
            self.was_standby = false;
            self.protection.works_again();
            self.counters.forgotten += 1;
            self.stations.keep_ports(|_| false);
            self.tell(News::ForgetAll);
        }
        if now_ns >= self.swept_ns + SECOND_NS / SWEEP_PARTS {
            self.swept_ns = now_ns;
            let part = |entries: usize| entries / (8 * SWEEP_PARTS as usize) + 1;
            self.stations.sweep(now_ns, part(self.stations.len()));
            self.neighbors.sweep(now_ns, part(self.neighbors.len()));
        }
        if speaks { self.protection.say(now_ns) } else { None }
    }

    /// When [`Self::tick`] has something to do.
    #[must_use]
    pub fn next_ns(&self, speaks: bool) -> u64 {
        if speaks { self.protection.next_ns() } else { self.swept_ns + SECOND_NS }
    }

    /// Stations by side.
    #[must_use]
    pub fn stations(&self) -> &BTreeMap<Port, usize> {
        self.stations.by_port()
    }

    /// Addresses whose owner is known here.
    #[must_use]
    pub fn neighbors(&self) -> usize {
        self.neighbors.len()
    }

    /// Whether the TAP device stands by because its LAN is joined elsewhere.
    #[must_use]
    pub fn stands_by(&self, now_ns: u64) -> bool {
        self.protection.stands_by(now_ns)
    }

    #[cfg(test)]
    pub(super) fn is_sound(&self) -> bool {
        self.stations.is_sound() && self.neighbors.is_sound()
    }
}
