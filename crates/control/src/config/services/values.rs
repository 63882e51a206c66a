//! The small languages inside the strings of these sections. Every parser returns what is wrong; what would be right.

use std::net::{IpAddr, SocketAddr};

use cluster::hardware_address::{self, HardwareAddressError};
use ipnet::IpNet;
use packet::flow::{protocol_name, protocol_number};
use services::spec::{TCP, UDP};
use toml::de::DeValue;

use super::super::section::{kind, shown, whole_number};
use super::super::values::{ValueError, prefix};
use super::{ListenHost, NAT_ADDRESSES_MAX, RESERVED};

/// A name that commands and rules use: 1–64 letters, digits and `-_.`, no address and no reserved word.
pub fn word(text: &str) -> Result<String, ValueError> {
    let sound = |c: char| c.is_alphanumeric() || matches!(c, '-' | '_' | '.');
    let count = text.chars().count();
    if !(1..=64).contains(&count) || !text.chars().all(sound) || text.starts_with('-') {
        return Err(format!(
            "\"{}\" is not a name of 1 to 64 letters, digits and the characters - _ .; write for example \"lan\"",
            shown(text)
        ).into());
    }
    if RESERVED.contains(&text) {
        return Err(format!("\"{text}\" has a meaning in rules; choose another name").into());
    }
    if prefix(text).is_ok() {
        return Err(format!("\"{text}\" is an address; choose another name").into());
    }
    Ok(text.to_owned())
}

/// A hardware address: `02:00:5e:00:01:01`, of one interface and not of a group.
pub fn mac(text: &str) -> Result<[u8; 6], ValueError> {
    hardware_address::parse(text).map_err(|error| {
        let message = match error {
            HardwareAddressError::NotOne => {
                format!("\"{}\" is {error}; write for example \"02:00:5e:00:01:01\"", shown(text))
            }
            HardwareAddressError::Group => {
                format!("{text} is {error}; one interface has an even first byte")
            }
        };
        message.into()
    })
}

/// Where a server listens, as text: `tcp 203.0.113.10:80`.
pub fn listen(text: &str) -> Result<(u8, SocketAddr), ValueError> {
    let example = "write for example \"tcp 203.0.113.10:80\"";
    let (protocol, rest) =
        split(text).ok_or_else(|| format!("\"{}\" has no protocol; {example}", shown(text)))?;
    let [protocol] = protocols_of(protocol)?[..] else {
        return Err(format!("one protocol is needed here; {example}").into());
    };
    Ok((protocol, endpoint(rest, example)?))
}

/// Protocols, host, first and last port of what a forward listens on.
pub type Listen = (Vec<u8>, ListenHost, (u16, u16));

/// Where a forward listens: `tcp 203.0.113.1:8080`, `udp [2001:db8::1]:53`, `tcp+udp wan:53`, `udp wan:16384-16393`. First
/// and last port are the last of what is returned.
pub fn forward_listen(text: &str) -> Result<Listen, ValueError> {
    let example =
        "write for example \"tcp 203.0.113.1:8080\", or \"tcp wan:8080\" for the addresses of an interface";
    let (protocol, rest) =
        split(text).ok_or_else(|| format!("\"{}\" has no protocol; {example}", shown(text)))?;
    let protocols = protocols_of(protocol)?;
    if let Some((name, ports)) = rest.rsplit_once(':')
        && let Ok(name) = word(name)
    {
        let ports = sound_ports(ports, example)?;
        return Ok((protocols, ListenHost::Interface(name), ports));
    }
    let (address, ports) = endpoints(rest, example)?;
    Ok((protocols, ListenHost::Address(address), ports))
}

/// An address with a port, or with a range of ports: the first and the last.
fn endpoints(text: &str, example: &str) -> Result<(IpAddr, (u16, u16)), ValueError> {
    let Some((host, ports)) = text.rsplit_once(':').filter(|(_, ports)| is_range(ports)) else {
        let address = endpoint(text, example)?;
        return Ok((address.ip(), (address.port(), address.port())));
    };
    let (first, last) = sound_ports(ports, example)?;
    let address = endpoint(&format!("{host}:{first}"), example)?;
    Ok((address.ip(), (first, last)))
}

/// Whether this shall be a range: a number may have a sign.
fn is_range(text: &str) -> bool {
    text.trim_start().trim_start_matches('-').contains('-') && !text.trim_start().starts_with('-')
}

/// One port or a range, without port 0.
fn sound_ports(text: &str, example: &str) -> Result<(u16, u16), ValueError> {
    if !is_range(text) {
        return sound_port(text, example).map(|port| (port, port));
    }
    let (first, last) = port_range(text)?;
    if first == 0 {
        return Err(format!("port 0 is no port; {example}").into());
    }
    Ok((first, last))
}

fn split(text: &str) -> Option<(&str, &str)> {
    let (protocol, rest) = text.trim().split_once(char::is_whitespace)?;
    Some((protocol, rest.trim()))
}

fn protocols_of(text: &str) -> Result<Vec<u8>, ValueError> {
    match text {
        "tcp" => Ok(vec![TCP]),
        "udp" => Ok(vec![UDP]),
        "tcp+udp" | "udp+tcp" => Ok(vec![TCP, UDP]),
        other => {
            Err(format!("\"{}\" is not a protocol with ports; write \"tcp\" or \"udp\"", shown(other)).into())
        }
    }
}

/// An address with a port that one host can have.
pub fn endpoint(text: &str, example: &str) -> Result<SocketAddr, ValueError> {
    let address: SocketAddr = text.parse().map_err(|_| {
        if text.parse::<IpAddr>().is_ok() {
            format!("\"{}\" has no port; {example}", shown(text)).into()
        } else if let Some(mistake) = wrong_port(text, example) {
            mistake
        } else {
            format!("\"{}\" is not an address with a port; {example}", shown(text)).into()
        }
    })?;
    if address.port() == 0 {
        return Err(format!("port 0 is no port; {example}").into());
    }
    host(address.ip())?;
    Ok(SocketAddr::new(address.ip(), address.port()))
}

/// Mistake in the port, if it is the only one.
fn wrong_port(text: &str, example: &str) -> Option<ValueError> {
    let (address, port) = text.rsplit_once(':')?;
    let bare = address.strip_prefix('[').and_then(|inner| inner.strip_suffix(']')).unwrap_or(address);
    bare.parse::<IpAddr>().ok()?;
    sound_port(port, example).err()
}

fn sound_port(text: &str, example: &str) -> Result<u16, ValueError> {
    match text.parse::<u16>() {
        Ok(port @ 1..) => Ok(port),
        _ => Err(format!("\"{}\" is not a port from 1 to 65535; {example}", shown(text)).into()),
    }
}

/// The address and port of a backend: `10.0.0.1:80`.
pub fn backend(text: &str) -> Result<SocketAddr, ValueError> {
    endpoint(text, "write for example \"10.0.0.1:80\"")
}

/// Where a forward leads: an address with a port or a range of ports, or without one (the ports it listens on).
pub fn target(text: &str) -> Result<(IpAddr, Option<(u16, u16)>), ValueError> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Ok((host(address)?, None));
    }
    let (address, ports) = endpoints(text, "write for example \"10.0.0.5:80\"")?;
    Ok((address, Some(ports)))
}

/// An address that one host can have.
pub fn host_address(text: &str) -> Result<IpAddr, ValueError> {
    match text.parse::<IpAddr>() {
        Ok(address) => host(address),
        Err(_) => {
            Err(format!("\"{}\" is not an address; write for example \"203.0.113.1\"", shown(text)).into())
        }
    }
}

fn host(address: IpAddr) -> Result<IpAddr, ValueError> {
    let broadcast = matches!(address, IpAddr::V4(ip) if ip.is_broadcast());
    if address.is_unspecified() || address.is_multicast() || broadcast || address.is_loopback() {
        return Err(format!("{address} is not the address of one host; write the address itself").into());
    }
    Ok(address)
}

/// Addresses of a pool: one address, or a prefix that stands for all of its addresses.
pub fn pool(text: &str) -> Result<Vec<IpAddr>, ValueError> {
    let Ok(net) = text.parse::<IpNet>() else { return Ok(vec![host_address(text)?]) };
    let bits = u32::from(net.max_prefix_len() - net.prefix_len());
    if bits > NAT_ADDRESSES_MAX.ilog2() {
        return Err(
            format!("{net} has more than {NAT_ADDRESSES_MAX} addresses; write a smaller prefix").into()
        );
    }
    host(net.network())?;
    Ok(match net.trunc() {
        IpNet::V4(net) => {
            let first = u32::from(net.network());
            (0..1u32 << bits).map(|n| IpAddr::V4(first.wrapping_add(n).into())).collect()
        }
        IpNet::V6(net) => {
            let first = u128::from(net.network());
            (0..1u128 << bits).map(|n| IpAddr::V6(first.wrapping_add(n).into())).collect()
        }
    })
}

/// An IP protocol by name or number.
pub fn protocol(value: &DeValue<'_>) -> Result<u8, ValueError> {
    const RIGHT: &str = "write for example \"tcp\", \"udp\", \"icmp\" or a number from 0 to 255";
    if let Some(number) = whole_number(value) {
        return u8::try_from(number).map_err(|_| format!("{number} is not a protocol; {RIGHT}").into());
    }
    let DeValue::String(text) = value else { return Err(format!("{} found; {RIGHT}", kind(value)).into()) };
    protocol_number(text).ok_or_else(|| format!("\"{}\" is not a protocol; {RIGHT}", shown(text)).into())
}

/// A port or a range of ports: `80`, `"80-90"`.
pub fn ports(value: &DeValue<'_>) -> Result<(u16, u16), ValueError> {
    const RIGHT: &str = "write for example 80 or \"80-90\"";
    if let Some(number) = whole_number(value) {
        let port =
            u16::try_from(number).map_err(|_| format!("{number} is not a port from 0 to 65535; {RIGHT}"))?;
        return Ok((port, port));
    }
    let DeValue::String(text) = value else { return Err(format!("{} found; {RIGHT}", kind(value)).into()) };
    port_range(text)
}

/// A range of ports as text: `80-90`.
pub fn port_range(text: &str) -> Result<(u16, u16), ValueError> {
    const RIGHT: &str = "write for example 80 or \"80-90\"";
    let wrong = || format!("\"{}\" is not a range of ports; {RIGHT}", shown(text));
    let number = |text: &str| text.trim().parse::<u16>().map_err(|_| wrong());
    let (first, last) = match text.split_once('-') {
        Some((first, last)) => (number(first)?, number(last)?),
        None => (number(text)?, number(text)?),
    };
    if first > last {
        return Err(format!("\"{}\" ends before it begins; write \"{last}-{first}\"", shown(text)).into());
    }
    Ok((first, last))
}

/// `tcp 203.0.113.10:80`.
#[must_use]
pub fn listen_text(protocol: u8, listen: SocketAddr) -> String {
    format!("{} {listen}", protocol_text(protocol))
}

/// Name of a protocol, or its number.
#[must_use]
pub fn protocol_text(protocol: u8) -> String {
    protocol_name(protocol).map_or_else(|| protocol.to_string(), str::to_owned)
}

/// The prefixes of a group's file: one a line, `#` begins a comment. `Err`: line number and what is wrong with it.
pub fn group_file(text: &str, members_max: usize) -> Result<Vec<IpNet>, (usize, ValueError)> {
    let mut list = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.split('#').next().unwrap_or("").trim();
        if line.is_empty() {
            continue;
        }
        if list.len() == members_max {
            return Err((number + 1, format!("more than {members_max} prefixes; split the group").into()));
        }
        list.push(prefix(line).map_err(|message| (number + 1, message))?.trunc());
    }
    Ok(list)
}
