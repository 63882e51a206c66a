//! The small languages inside strings: rates, endpoints, prefixes, interface patterns, keys.
//!
//! A parser's error is a [`ValueError`].

use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use ipnet::IpNet;

use super::section::shown;

/// Mistake in one value: what is wrong, and what would be right. The text follows the key in a message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ValueError(String);

impl From<String> for ValueError {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl From<&str> for ValueError {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

/// Where a peer can be dialled.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Endpoint {
    /// A fixed address.
    Address(SocketAddr),
    /// A DNS name, resolved while the gateway runs, again and again.
    Name {
        /// Host name in lower case.
        host: String,
        /// UDP port.
        port: u16,
    },
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Name { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

/// An endpoint: `198.18.0.2:4600`, `[2001:db8::1]:4600` or `hub.example.net:4600`.
pub fn endpoint(text: &str) -> Result<Endpoint, ValueError> {
    const RIGHT: &str = "write \"198.18.0.2:4600\", \"[2001:db8::1]:4600\" or \"hub.example.net:4600\"";
    if let Ok(address) = text.parse::<SocketAddr>() {
        return usable_address(address);
    }
    if let Ok(address) = text.parse::<Ipv6Addr>() {
        // fd00::1:4600 is an address too; nobody can tell whether a port was meant.
        return Err(
            format!("\"{address}\" has no port; write \"[{address}]:4600\" with the peer's port").into()
        );
    }
    if text.parse::<IpAddr>().is_ok() {
        return Err(
            format!("\"{}\" has no port; write \"{}:4600\" with the peer's port", shown(text), text).into()
        );
    }
    let Some((host, port)) = text.rsplit_once(':') else {
        let host = shown(text);
        return Err(format!("\"{host}\" has no port; {RIGHT}").into());
    };
    let port = match port.parse::<u16>() {
        Ok(0) => return Err("port 0 cannot be dialled; write the port the peer listens on".into()),
        Ok(port) => port,
        Err(_) => {
            return Err(format!("\"{}\" is not a port from 1 to 65535; {RIGHT}", shown(port)).into());
        }
    };
    if host.starts_with('[') {
        return Err(format!("\"{}\" is not an IPv6 address; {RIGHT}", shown(host)).into());
    }
    if host.contains(':') {
        return Err(
            format!("\"{}\": an IPv6 address needs brackets before a port; {RIGHT}", shown(text)).into()
        );
    }
    let host = host_name(host).ok_or_else(|| format!("\"{}\" is not a host name; {RIGHT}", shown(host)))?;
    Ok(Endpoint::Name { host, port })
}

fn usable_address(address: SocketAddr) -> Result<Endpoint, ValueError> {
    if address.port() == 0 {
        return Err("port 0 cannot be dialled; write the port the peer listens on".into());
    }
    let ip = address.ip().to_canonical();
    let broadcast = matches!(ip, IpAddr::V4(ip) if ip.is_broadcast());
    if ip.is_unspecified() || ip.is_multicast() || broadcast {
        return Err(format!("{ip} is not the address of one host; write the peer's own address").into());
    }
    if let SocketAddr::V6(v6) = address
        && v6.ip().is_unicast_link_local()
    {
        return Err(
            format!("{ip} is a link-local address, which needs an interface; use a global one").into()
        );
    }
    Ok(Endpoint::Address(SocketAddr::new(ip, address.port())))
}

/// A host name by RFC 1123 (underscores let pass), lower case, without the final dot.
fn host_name(host: &str) -> Option<String> {
    let host = host.strip_suffix('.').unwrap_or(host);
    let label_is_sound = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    };
    // A last label of digits only is a mistyped IPv4 address: no top-level domain looks like that.
    let numeric = host.rsplit('.').next().is_some_and(|label| label.bytes().all(|b| b.is_ascii_digit()));
    (host.len() <= 253 && host.split('.').all(label_is_sound) && !numeric).then(|| host.to_ascii_lowercase())
}

/// An interface address with its prefix length, such as `10.77.0.1/24`.
pub fn interface_address(text: &str) -> Result<IpNet, ValueError> {
    if let Ok(net) = text.parse::<IpNet>() {
        let address = net.addr();
        if address.is_unspecified() || address.is_multicast() {
            return Err(format!("{address} cannot be the address of an interface").into());
        }
        if net.prefix_len() == 0 {
            return Err(
                format!("a prefix of length 0 is not a network; write \"{address}/24\" or longer").into()
            );
        }
        return Ok(net);
    }
    let example = if text.contains(':') { "fd77::1/64" } else { "10.77.0.1/24" };
    match text.parse::<IpAddr>() {
        Ok(address) => {
            let bits = if address.is_ipv4() { 24 } else { 64 };
            Err(format!("\"{address}\" has no prefix length; write for example \"{address}/{bits}\"").into())
        }
        Err(_) => Err(format!(
            "\"{}\" is not an address with a prefix length; write for example \"{example}\"",
            shown(text)
        )
        .into()),
    }
}

/// A prefix as in WireGuard's AllowedIPs: `10.0.0.0/8`; a bare address is one host.
pub fn prefix(text: &str) -> Result<IpNet, ValueError> {
    if let Ok(net) = text.parse::<IpNet>() {
        return Ok(net);
    }
    if let Ok(address) = text.parse::<IpAddr>() {
        return Ok(IpNet::from(address));
    }
    let example = if text.contains(':') { "fd77::/64" } else { "10.77.0.2/32" };
    Err(format!("\"{}\" is not a prefix; write for example \"{example}\"", shown(text)).into())
}

/// A rate such as `100 Mbit/s`, in bits per second.
pub fn rate(text: &str) -> Result<u64, ValueError> {
    const RIGHT: &str = "write for example \"100 Mbit/s\", \"1.5 Gbit/s\" or \"800 kbit/s\"";
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor = match unit.trim() {
        "bit/s" | "bit" | "bps" => 1.0,
        "kbit/s" | "kbit" | "kbps" | "Kbit/s" => 1e3,
        "Mbit/s" | "Mbit" | "Mbps" | "mbit/s" | "mbit" => 1e6,
        "Gbit/s" | "Gbit" | "Gbps" | "gbit/s" | "gbit" => 1e9,
        "" => return Err(format!("\"{}\" has no unit; {RIGHT}", shown(text)).into()),
        unit if unit.contains(['B', 'o']) || unit.to_lowercase().contains("byte") => {
            return Err(format!("\"{}\": rates are in bits, not bytes; {RIGHT}", shown(text)).into());
        }
        unit => return Err(format!("\"{}\" is not a unit of rate; {RIGHT}", shown(unit)).into()),
    };
    let number: f64 = number.parse().map_err(|_| format!("\"{}\" is not a rate; {RIGHT}", shown(text)))?;
    let bits = number * factor;
    if !(RATE_MIN..=RATE_MAX).contains(&bits) {
        return Err(format!("\"{}\" is not between 64 kbit/s and 1000 Gbit/s; {RIGHT}", shown(text)).into());
    }
    Ok(bits as u64)
}

/// Below this a path carries its own control frames and little else.
const RATE_MIN: f64 = 64e3;
const RATE_MAX: f64 = 1e12;

/// The name of a network interface: 1–15 bytes without `/`, white space and control characters.
pub fn interface_name(text: &str) -> Result<String, ValueError> {
    const BYTES_MAX: usize = 15;
    if text.is_empty() || text == "." || text == ".." {
        return Err("an interface needs a name; write for example \"wan0\"".into());
    }
    if text.len() > BYTES_MAX {
        return Err(format!("\"{}\" is longer than the {BYTES_MAX} bytes Linux allows", shown(text)).into());
    }
    if text.contains(|c: char| c == '/' || c == ':' || c == '%' || c.is_whitespace() || c.is_control()) {
        return Err(format!("\"{}\" has a character which interface names cannot have", shown(text)).into());
    }
    if text.contains(['*', '?']) {
        return Err(format!("\"{}\" is a pattern; write it as match = \"{0}\"", shown(text)).into());
    }
    Ok(text.to_owned())
}

/// A pattern of interface names: `*` stands for any characters, `?` for one.
pub fn interface_pattern(text: &str) -> Result<String, ValueError> {
    const BYTES_MAX: usize = 64;
    if text.is_empty() {
        return Err("an empty pattern matches nothing; write for example \"wwan*\"".into());
    }
    if text.len() > BYTES_MAX || text.contains(|c: char| c == '/' || c.is_whitespace() || c.is_control()) {
        return Err(format!(
            "\"{}\" cannot match an interface name; write for example \"wwan*\"",
            shown(text)
        )
        .into());
    }
    Ok(text.to_owned())
}

/// Whether a pattern with `*` and `?` matches the whole name.
pub fn matches(pattern: &str, name: &str) -> bool {
    let (pattern, name) = (pattern.as_bytes(), name.as_bytes());
    let (mut p, mut n) = (0, 0);
    // Where to go on when the last star must take one character more.
    let mut retry: Option<(usize, usize)> = None;
    while n < name.len() {
        match pattern.get(p) {
            Some(b'*') => {
                retry = Some((p, n));
                p += 1;
            }
            Some(c) if *c == b'?' || *c == name[n] => {
                p += 1;
                n += 1;
            }
            _ => match retry {
                Some((star, taken)) => {
                    p = star + 1;
                    n = taken + 1;
                    retry = Some((star, n));
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|c| *c == b'*')
}

/// A name for people: 1–64 characters, none of them a control character.
pub fn name(text: &str) -> Result<String, ValueError> {
    let count = text.chars().count();
    if count == 0 || count > 64 || text.chars().any(char::is_control) || text.trim() != text {
        return Err(format!(
            "\"{}\" is not a name of 1 to 64 visible characters; write for example \"hub\"",
            shown(text)
        )
        .into());
    }
    Ok(text.to_owned())
}

/// The address of a gateway.
pub fn gateway(text: &str) -> Result<IpAddr, ValueError> {
    match text.parse::<IpAddr>() {
        Ok(address) if !address.is_unspecified() && !address.is_multicast() => Ok(address),
        _ => Err(format!(
            "\"{}\" is not the address of a router; write for example \"192.0.2.1\"",
            shown(text)
        )
        .into()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn endpoints() {
        let address = |text: &str| Endpoint::Address(text.parse().unwrap());
        assert_eq!(endpoint("198.18.0.2:4600").unwrap(), address("198.18.0.2:4600"));
        assert_eq!(endpoint("[2001:db8::1]:1").unwrap(), address("[2001:db8::1]:1"));
        assert_eq!(endpoint("[::ffff:192.0.2.1]:5").unwrap(), address("192.0.2.1:5"));
        let name = Endpoint::Name { host: "hub.example.net".to_owned(), port: 4600 };
        assert_eq!(endpoint("Hub.example.NET.:4600").unwrap(), name);
        assert_eq!(name.to_string(), "hub.example.net:4600");
        for (wrong, part) in [
            ("198.18.0.2", "has no port; write \"198.18.0.2:4600\""),
            ("fd00::1", "write \"[fd00::1]:4600\""),
            ("198.18.0.2:0", "port 0"),
            ("hub:0", "port 0"),
            ("hub", "has no port"),
            ("hub:70000", "not a port from 1 to 65535"),
            ("hub:", "not a port"),
            ("300.1.1.1:80", "not a host name"),
            ("[fd00::x]:80", "not an IPv6 address"),
            ("fd00::x:80", "needs brackets"),
            ("0.0.0.0:80", "not the address of one host"),
            ("255.255.255.255:80", "not the address of one host"),
            ("[ff02::1]:80", "not the address of one host"),
            ("[fe80::1]:80", "link-local"),
            ("a b:80", "not a host name"),
            ("-a:80", "not a host name"),
            (":80", "not a host name"),
        ] {
            let message = endpoint(wrong).unwrap_err();
            assert!(message.to_string().contains(part), "{wrong}: {message}");
        }
    }

    #[test]
    fn rates() {
        for (text, bits) in [
            ("100 Mbit/s", 100_000_000),
            ("100Mbit", 100_000_000),
            ("1.5 Gbit/s", 1_500_000_000),
            ("800 kbit/s", 800_000),
            (" 64000 bit/s ", 64_000),
            ("20 Mbps", 20_000_000),
        ] {
            assert_eq!(rate(text).unwrap(), bits, "{text}");
        }
        for (wrong, part) in [
            ("100", "has no unit"),
            ("12 MB/s", "bits, not bytes"),
            ("12 Mbyte/s", "bits, not bytes"),
            ("fast", "not a unit"),
            ("Mbit/s", "is not a rate"),
            ("1.2.3 Mbit/s", "is not a rate"),
            ("1 kbit/s", "not between"),
            ("99999 Gbit/s", "not between"),
            ("-5 Mbit/s", "not a unit"),
        ] {
            let message = rate(wrong).unwrap_err();
            assert!(message.to_string().contains(part), "{wrong}: {message}");
        }
    }

    #[test]
    fn prefixes_and_addresses() {
        assert_eq!(prefix("10.0.0.1").unwrap(), "10.0.0.1/32".parse().unwrap());
        assert_eq!(prefix("::/0").unwrap(), "::/0".parse().unwrap());
        assert!(prefix("10.0.0.0/33").unwrap_err().to_string().contains("not a prefix"));
        assert_eq!(interface_address("10.77.0.1/24").unwrap(), "10.77.0.1/24".parse().unwrap());
        assert!(
            interface_address("10.77.0.1")
                .unwrap_err()
                .to_string()
                .contains("write for example \"10.77.0.1/24\"")
        );
        assert!(interface_address("fd77::1").unwrap_err().to_string().contains("\"fd77::1/64\""));
        assert!(interface_address("0.0.0.0/8").is_err());
        assert!(interface_address("10.0.0.1/0").is_err());
        assert!(interface_address("x/24").unwrap_err().to_string().contains("not an address"));
    }

    #[test]
    fn names_and_patterns() {
        assert!(interface_name("wan0").is_ok());
        assert!(interface_name("wwan*").unwrap_err().to_string().contains("match = \"wwan*\""));
        assert!(interface_name("a-name-of-16-chr").is_err());
        assert!(interface_name("a b").is_err());
        assert!(interface_name("").is_err());
        for (pattern, name, expected) in [
            ("wwan*", "wwan0", true),
            ("wwan*", "wwan", true),
            ("wwan*", "wan0", false),
            ("wan?", "wan0", true),
            ("wan?", "wan", false),
            ("*0", "wan10", true),
            ("*a*b", "xaxbxb", true),
            ("*a*b", "xaxbx", false),
            ("wan0", "wan0", true),
            ("", "", true),
            ("", "a", false),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
    }

    proptest! {
        #[test]
        fn nothing_panics(text in "\\PC{0,80}") {
            let _ = (endpoint(&text), rate(&text), prefix(&text), interface_address(&text));
            let _ = (interface_name(&text), interface_pattern(&text), name(&text), gateway(&text));
            let _ = matches(&text, "wan0");
        }

        #[test]
        fn a_displayed_endpoint_reads_the_same(text in "(\\[[0-9a-f:]{2,12}\\]|[a-z0-9.-]{1,20}):[0-9]{1,5}") {
            if let Ok(first) = endpoint(&text) {
                prop_assert_eq!(endpoint(&first.to_string()).unwrap(), first);
            }
        }
    }
}
