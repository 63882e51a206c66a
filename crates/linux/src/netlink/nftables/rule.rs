//! Rules of nftables, one by one: their acts, as far as a gateway beside them has to know.

use std::net::IpAddr;

use super::{attribute, attributes, first, text};
use crate::sys::interface_of_index;

/// Keys of a `meta` expression that name a device: index and name of that by which a packet came, and by which it leaves.
const META_DEVICES: std::ops::RangeInclusive<u32> = 4..=7;
const META_NAMES: std::ops::RangeInclusive<u32> = 6..=7;
/// Key of a `meta` expression for the mark.
const META_MARK: u32 = 3;
/// Verdicts that lead to another chain.
const JUMP: i32 = -3;
const GOTO: i32 = -4;
/// Destination addresses in the headers of IPv4 and IPv6: offset and length.
const DESTINATIONS: [(u32, u32); 2] = [(16, 4), (24, 16)];

/// Something that a rule does to packets that are not only the host's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Act {
    /// Kind.
    pub effect: Effect,
    /// Devices by which a packet has to come or leave for it, by name (`*` at the end: all that begin so). Empty: any, or not known.
    pub devices: Vec<String>,
}

/// See [`Act`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Drops or rejects.
    Refuse,
    /// Leads packets to a program of this host, whatever their destination is.
    Redirect,
    /// Leads packets to another host, the destination is translated.
    Translate(IpAddr),
    /// Gives packets a mark, by which rules of routing choose.
    Mark,
}

/// A rule as read.
#[derive(Default)]
pub(super) struct Rule {
    pub(super) chain: String,
    pub(super) bytes: Vec<u8>,
    /// Drops or rejects every packet.
    pub(super) refuses_all: bool,
    pub(super) act: Option<Act>,
    /// Chains that it leads to.
    pub(super) jumps: Vec<String>,
    /// It leads to chains that a map names.
    pub(super) jumps_by_map: bool,
}

/// Facts gathered from a rule's expressions, in their order.
#[derive(Default)]
struct Reader<'a> {
    registers: Vec<(u32, &'a [u8])>,
    devices: Vec<String>,
    /// Keys of the last `meta`.
    device_key: Option<u32>,
    conditions: u32,
    /// Tests the connection's state.
    tracks: bool,
    /// Tests a header or a device.
    selects: bool,
    /// Only for certain destinations.
    to_some: bool,
    /// By routes: a filter of reverse paths, or what is local.
    by_routes: bool,
    refuses: bool,
    effect: Option<Effect>,
    jumps: Vec<String>,
    jumps_by_map: bool,
}

impl Rule {
    /// A rule as the kernel lists it.
    pub(super) fn read(bytes: &[u8]) -> Option<Self> {
        let mut reader = Reader::default();
        let mut rest = attribute(attributes(bytes)?, 4).unwrap_or_default();
        while let Some((expression, _, next)) = first(rest) {
            rest = next;
            let name = attribute(expression, 1).unwrap_or_default();
            let name = name.strip_suffix(b"\0").unwrap_or(name);
            reader.expression(name, attribute(expression, 2).unwrap_or_default());
        }
        // A filter of reverse paths, and what belongs to no connection: there are such here as well.
        let usual = reader.by_routes || reader.tracks && !reader.selects;
        let effect = match reader.effect {
            Some(Effect::Redirect) if reader.to_some => None,
            None | Some(Effect::Mark) if reader.refuses => (!usual).then_some(Effect::Refuse),
            found => found,
        };
        Some(Self {
            chain: text(bytes, 2)?,
            bytes: bytes.to_vec(),
            refuses_all: reader.refuses && reader.conditions == 0,
            act: effect.map(|effect| Act { effect, devices: reader.devices }),
            jumps: reader.jumps,
            jumps_by_map: reader.jumps_by_map,
        })
    }
}

impl<'a> Reader<'a> {
    fn expression(&mut self, name: &[u8], data: &'a [u8]) {
        match name {
            b"counter" | b"log" => {}
            b"immediate" => self.immediate(data),
            b"reject" => self.refuses = true,
            b"redir" | b"tproxy" => self.effect = Some(Effect::Redirect),
            b"nat" => self.translation(data),
            b"target" => self.target(data),
            _ => self.condition(name, data),
        }
    }

    fn condition(&mut self, name: &[u8], data: &[u8]) {
        self.conditions += 1;
        match name {
            // It sets it, out of a register.
            b"meta" if number(data, 2) == Some(META_MARK) && number(data, 3).is_some() => {
                self.effect.get_or_insert(Effect::Mark);
            }
            b"meta" => {
                self.device_key = number(data, 2).filter(|key| META_DEVICES.contains(key));
                self.selects |= self.device_key.is_some();
            }
            b"cmp" => self.comparison(data),
            b"payload" => {
                self.selects = true;
                let place = number(data, 3).zip(number(data, 4));
                let network = number(data, 2) == Some(1);
                self.to_some |= network && place.is_some_and(|place| DESTINATIONS.contains(&place));
            }
            b"ct" => self.tracks = true,
            b"fib" => (self.by_routes, self.to_some) = (true, true),
            b"match" => {
                let kind = attribute(data, 1).unwrap_or_default();
                self.to_some |= kind.starts_with(b"addrtype");
                self.by_routes |= kind.starts_with(b"rpfilter");
                let state = kind.starts_with(b"conntrack") || kind.starts_with(b"state");
                self.tracks |= state;
                self.selects |= !state && !kind.starts_with(b"comment");
            }
            b"lookup" => self.jumps_by_map |= number(data, 3) == Some(0),
            _ => {}
        }
    }

    /// A comparison with what the last `meta` brought.
    fn comparison(&mut self, data: &[u8]) {
        let Some(key) = self.device_key.take() else { return };
        let value = attribute(data, 3).and_then(|value| attribute(value, 1));
        let equal = number(data, 2) == Some(0);
        let Some(value) = value.filter(|_| equal) else { return };
        if !META_NAMES.contains(&key) {
            let index = value.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes));
            return self.devices.extend(index.and_then(interface_of_index));
        }
        let end = value.iter().position(|byte| *byte == 0);
        let name = String::from_utf8_lossy(&value[..end.unwrap_or(value.len())]);
        self.devices.push(if end.is_some() { name.into_owned() } else { format!("{name}*") });
    }

    fn immediate(&mut self, data: &'a [u8]) {
        let Some(content) = attribute(data, 2) else { return };
        if let (Some(register), Some(value)) = (number(data, 1), attribute(content, 1)) {
            self.registers.push((register, value));
        }
        let Some(verdict) = attribute(content, 2) else { return };
        match number(verdict, 1).map(u32::cast_signed) {
            Some(0) => self.refuses = true,
            Some(JUMP | GOTO) => {
                let chain = attribute(verdict, 2).unwrap_or_default();
                self.jumps.push(String::from_utf8_lossy(chain).trim_end_matches('\0').to_owned());
            }
            _ => {}
        }
    }

    /// `dnat to ADDRESS`; an address out of a map is not known.
    fn translation(&mut self, data: &[u8]) {
        let register = number(data, 3).filter(|_| number(data, 1) == Some(1));
        let value =
            register.and_then(|register| self.registers.iter().rev().find(|(place, _)| *place == register));
        self.effect = value.and_then(|(_, value)| address(value)).map(Effect::Translate);
    }

    /// A target of `iptables`.
    fn target(&mut self, data: &[u8]) {
        let name = attribute(data, 1).unwrap_or_default();
        let info = attribute(data, 3).unwrap_or_default();
        match name.strip_suffix(b"\0").unwrap_or(name) {
            b"DROP" | b"REJECT" => self.refuses = true,
            b"REDIRECT" | b"TPROXY" => self.effect = Some(Effect::Redirect),
            b"MARK" | b"CONNMARK" => {
                self.effect.get_or_insert(Effect::Mark);
            }
            // xt_DNAT: its first revision has a count and flags in front of IPv4 addresses, later ones flags in front of either.
            b"DNAT" => {
                let old = number(data, 2).unwrap_or(0) == 0;
                let bytes = info.get(if old { 8..12 } else { 4..20 }).unwrap_or_default();
                // An IPv4 address in the room of an IPv6 one: the rest is zero.
                let short = bytes.get(4..).is_some_and(|rest| rest.iter().all(|byte| *byte == 0));
                let bytes = if short { &bytes[..4] } else { bytes };
                self.effect = address(bytes).map(Effect::Translate);
            }
            _ => {}
        }
    }
}

/// A number of 32 bits among attributes.
fn number(attributes: &[u8], kind: u16) -> Option<u32> {
    Some(u32::from_be_bytes(*attribute(attributes, kind)?.first_chunk()?))
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        16 => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
        _ => None,
    }
}
