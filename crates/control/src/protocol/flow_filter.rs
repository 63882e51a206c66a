//! Which flows are meant: `anabranch status --flows --match 'tcp 10.0.0.5 port 443'`.

use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use ipnet::IpNet;
use packet::flow::protocol_number;
use serde::{Deserialize, Serialize};

use crate::config::values::ValueError;
use crate::status::FlowReport;

/// Words of one filter at most.
const WORDS_MAX: usize = 32;

/// Conditions that must all hold; none = every flow.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FlowFilter {
    /// IP protocol.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub protocol: Option<u8>,
    /// Each of these is one of the flow's ends, before or after translation.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ends: Vec<End>,
    /// Each of these is a port of one of its ends.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<u16>,
    /// Interface where it came in or leaves.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interface: Option<String>,
    /// Tenant.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
    /// Core that owns it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub core: Option<usize>,
}

/// An address, or all of a prefix, with or without a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// Addresses.
    pub net: IpNet,
    /// Port, if one is meant.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
}

impl End {
    fn covers(self, end: SocketAddr) -> bool {
        self.net.contains(&end.ip()) && self.port.is_none_or(|port| port == end.port())
    }
}

impl FlowFilter {
    /// Whether a flow is meant.
    #[must_use]
    pub fn matches(&self, flow: &FlowReport) -> bool {
        let ends = [flow.source, flow.destination, flow.translated_source, flow.translated_destination];
        self.may_match(flow.core, (flow.protocol, ends))
            && self.interface.as_ref().is_none_or(|name| *name == flow.interface || *name == flow.out)
            && self.tenant.as_ref().is_none_or(|name| *name == flow.tenant)
    }

    /// Whether a flow may be meant, by all but names: its core, its protocol and its ends, before and after translation.
    #[must_use]
    pub fn may_match(&self, core: usize, (protocol, ends): (u8, [SocketAddr; 4])) -> bool {
        self.protocol.is_none_or(|wanted| wanted == protocol)
            && self.core.is_none_or(|wanted| wanted == core)
            && self.ends.iter().all(|wanted| ends.iter().any(|end| wanted.covers(*end)))
            && self.ports.iter().all(|port| ends.iter().any(|end| end.port() == *port))
    }
}

impl FromStr for FlowFilter {
    type Err = ValueError;

    /// Words in any order: a protocol, addresses, prefixes, `address:port`, `port 443`, `interface lan`, `tenant red`,
    /// `core 1`; a `>` between two ends is ignored.
    fn from_str(text: &str) -> Result<Self, ValueError> {
        const RIGHT: &str = "write for example 'tcp 10.0.0.5 port 443' or 'udp 10.0.0.0/24 interface lan'";
        let mut filter = Self::default();
        let mut words = text.split_whitespace();
        for _ in 0..WORDS_MAX {
            let Some(word) = words.next() else { return Ok(filter) };
            let mut argument =
                || words.next().ok_or_else(|| format!("nothing stands behind \"{word}\"; {RIGHT}"));
            let number = |text: &str| text.parse().map_err(|_| format!("\"{text}\" is not a port; {RIGHT}"));
            match word {
                ">" => {}
                "port" => filter.ports.push(number(argument()?)?),
                "interface" => filter.interface = Some(argument()?.to_owned()),
                "tenant" => filter.tenant = Some(argument()?.to_owned()),
                "core" => filter.core = Some(usize::from(number(argument()?)?)),
                word => match (end(word), protocol_number(word)) {
                    (Some(end), _) => filter.ends.push(end),
                    (None, Some(protocol)) => filter.protocol = Some(protocol),
                    (None, None) => {
                        return Err(
                            format!("\"{word}\" is neither a protocol nor an address; {RIGHT}").into()
                        );
                    }
                },
            }
        }
        Err(format!("more than {WORDS_MAX} words; {RIGHT}").into())
    }
}

fn end(word: &str) -> Option<End> {
    if let Ok(net) = word.parse::<IpNet>() {
        return Some(End { net, port: None });
    }
    if let Ok(address) = word.parse::<IpAddr>() {
        return Some(End { net: IpNet::from(address), port: None });
    }
    let address: SocketAddr = word.parse().ok()?;
    Some(End { net: IpNet::from(address.ip()), port: Some(address.port()) })
}

#[cfg(test)]
pub(crate) mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    /// A web request of 10.0.0.5 that leaves as 203.0.113.1.
    pub(crate) fn flow() -> FlowReport {
        FlowReport {
            core: 1,
            bucket: 77,
            protocol: 6,
            source: "10.0.0.5:1234".parse().unwrap(),
            destination: "198.51.100.7:443".parse().unwrap(),
            translated_source: "203.0.113.1:2048".parse().unwrap(),
            translated_destination: "198.51.100.7:443".parse().unwrap(),
            tenant: String::new(),
            interface: "lan".to_owned(),
            out: "wan".to_owned(),
            state: "established".to_owned(),
            rule: "default".to_owned(),
            nat: "address-and-port".to_owned(),
            virtual_server: String::new(),
            idle_seconds: 1.5,
            expires_in_seconds: 7438.5,
        }
    }

    #[test]
    fn words() {
        for (text, expected) in [
            ("", true),
            ("tcp", true),
            ("6", true),
            ("udp", false),
            ("10.0.0.5", true),
            ("10.0.0.0/24 tcp port 443", true),
            ("10.0.0.5:1234 > 198.51.100.7:443", true),
            ("203.0.113.1:2048", true),
            ("203.0.113.1:2049", false),
            ("port 2048 port 443", true),
            ("port 80", false),
            ("interface wan core 1", true),
            ("core 0", false),
            ("tenant red", false),
            ("::/0", false),
        ] {
            let filter: FlowFilter = text.parse().unwrap();
            assert_eq!(filter.matches(&flow()), expected, "{text}");
            let json = serde_json::to_string(&filter).unwrap();
            assert_eq!(serde_json::from_str::<FlowFilter>(&json).unwrap(), filter);
        }
        for (wrong, part) in
            [("port", "nothing stands behind"), ("port x", "not a port"), ("colour", "neither a protocol")]
        {
            assert!(wrong.parse::<FlowFilter>().unwrap_err().to_string().contains(part), "{wrong}");
        }
        assert!("tcp ".repeat(100).parse::<FlowFilter>().is_err());
    }
}
