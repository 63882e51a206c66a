//! Where stations are: learnt from the source of each frame, forgotten with age, held when they move too often.
//!
//! Each core has all stations: what one learns it tells the others ([`Station`]), so that a frame of any flow finds its
//! destination and no lock stands between. A core that was not told floods, within the rate for that, until it hears the
//! station itself.

use std::collections::BTreeMap;

use packet::ethernet::{Mac, Vlan};
use services::hash::SecretState;

use super::aged::AgedTable;
use super::{Port, SECOND_NS};

/// A station may move so often at once …
const MOVES_BURST: u8 = 3;
/// … and once more each time so long has passed.
const MOVE_NS: u64 = 4 * SECOND_NS;
/// Other cores hear of a station that is where it was after this part of its age.
const TELLS_PER_AGE: u64 = 8;

/// A station, as one core tells the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Station {
    /// VLAN.
    pub vlan: Vlan,
    /// Hardware address.
    pub mac: Mac,
    /// Where it is.
    pub port: Port,
    /// When it was heard there, ns.
    pub heard_ns: u64,
}

/// News that the source of a frame gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Learned {
    /// Nothing new.
    Known,
    /// Something that the other cores have to hear.
    News,
    /// Nothing, because there is no room: of its side, or at all.
    NoRoom,
    /// It moved too often and is held where it was.
    Held,
}

/// Limits of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct StationLimits {
    /// All stations.
    pub max: usize,
    /// Those behind one peer; the LAN has half of all.
    pub per_peer: usize,
    /// A station that is silent is forgotten after so long.
    pub age_ns: u64,
}

impl StationLimits {
    /// Stations of one side.
    pub fn room_of(&self, port: Port) -> usize {
        match port {
            Port::Tap => self.max / 2,
            Port::Bond(_) => self.per_peer,
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Place {
    port: Port,
    heard_ns: u64,
    told_ns: u64,
    /// Moves that were made and not forgotten yet, and since when they are.
    moves: u8,
    moves_ns: u64,
}

/// All stations that a core knows.
#[derive(Debug)]
pub(super) struct Stations {
    table: AgedTable<(Vlan, Mac), Place>,
    by_port: BTreeMap<Port, usize>,
    limits: StationLimits,
}

impl Stations {
    pub fn new(limits: StationLimits, state: SecretState) -> Self {
        Self { table: AgedTable::new(limits.max, state), by_port: BTreeMap::new(), limits }
    }

    /// Other limits from now on.
    pub fn set_limits(&mut self, limits: StationLimits) {
        self.limits = limits;
        self.table.set_max(limits.max);
    }

    /// Where a station is, if that is known.
    pub fn port_of(&self, now_ns: u64, vlan: Vlan, mac: Mac) -> Option<Port> {
        let place = self.table.get(&(vlan, mac))?;
        (now_ns.saturating_sub(place.heard_ns) < self.limits.age_ns).then_some(place.port)
    }

    /// Stations on each side.
    pub fn by_port(&self) -> &BTreeMap<Port, usize> {
        &self.by_port
    }

    /// All stations.
    pub fn len(&self) -> usize {
        self.table.len()
    }

    /// A frame of this station came in here.
    pub fn learn(&mut self, now_ns: u64, vlan: Vlan, mac: Mac, port: Port) -> Learned {
        let (age_ns, room) = (self.limits.age_ns, self.limits.room_of(port));
        let has_room = self.by_port.get(&port).copied().unwrap_or(0) < room;
        let Some(place) = self.table.get_mut(&(vlan, mac)) else {
            let place = Place { port, heard_ns: now_ns, told_ns: now_ns, moves: 0, moves_ns: now_ns };
            if !has_room || !self.table.insert((vlan, mac), place) {
                return Learned::NoRoom;
            }
            *self.by_port.entry(port).or_default() += 1;
            return Learned::News;
        };
        if place.port == port {
            place.heard_ns = now_ns;
            if now_ns.saturating_sub(place.told_ns) < age_ns / TELLS_PER_AGE {
                return Learned::Known;
            }
            place.told_ns = now_ns;
            return Learned::News;
        }
        let forgotten = (now_ns.saturating_sub(place.moves_ns) / MOVE_NS).min(u64::from(place.moves));
        place.moves -= forgotten as u8;
        place.moves_ns = if place.moves == 0 { now_ns } else { place.moves_ns + forgotten * MOVE_NS };
        if place.moves >= MOVES_BURST {
            return Learned::Held;
        }
        if !has_room {
            return Learned::NoRoom;
        }
        place.moves += 1;
        let from = std::mem::replace(&mut place.port, port);
        (place.heard_ns, place.told_ns) = (now_ns, now_ns);
        leave(&mut self.by_port, from);
        *self.by_port.entry(port).or_default() += 1;
        Learned::News
    }

    /// Another core heard a station. What this one heard later stands.
    pub fn hear(&mut self, station: &Station) {
        let known = self.table.get(&(station.vlan, station.mac));
        if known.is_none_or(|place| place.heard_ns < station.heard_ns) {
            self.learn(station.heard_ns, station.vlan, station.mac, station.port);
        }
    }

    /// Looks at some entries, and forgets those that are old.
    pub fn sweep(&mut self, now_ns: u64, count: usize) {
        let Self { table, by_port, limits } = self;
        table.sweep(count, |_, place| {
            let stays = now_ns.saturating_sub(place.heard_ns) < limits.age_ns;
            if !stays {
                leave(by_port, place.port);
            }
            stays
        });
    }

    /// Forgets all stations on sides that are gone.
    pub fn keep_ports(&mut self, stays: impl Fn(Port) -> bool) {
        self.table.retain(|_, place| stays(place.port));
        self.by_port.retain(|port, _| stays(*port));
    }

    /// Whether the counts are those of the entries.
    #[cfg(test)]
    pub fn is_sound(&self) -> bool {
        let mut counted: BTreeMap<Port, usize> = BTreeMap::new();
        for (_, place) in self.table.iter() {
            *counted.entry(place.port).or_default() += 1;
        }
        counted == self.by_port && self.table.len() <= self.limits.max
    }
}

/// One less on a side.
pub(super) fn leave(by_port: &mut BTreeMap<Port, usize>, port: Port) {
    if let Some(count) = by_port.get_mut(&port) {
        *count -= 1;
        if *count == 0 {
            by_port.remove(&port);
        }
    }
}
