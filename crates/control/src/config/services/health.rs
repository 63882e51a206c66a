//! `health` of a `[[virtual-server]]`.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use ::health::{
    DnsCheck, HealthKind, HealthSpec, HttpCheck, INTERVAL_MS_MIN, TIME_MS_MAX, TlsCheck, UdpCheck,
};
use services::spec::TCP;
use toml::de::DeValue;

use super::super::section::Section;
use super::super::values::ValueError;
use super::read::plain;
use super::values;

const KEY: &str = "virtual-server.health";
const RIGHT: &str = "health = { tcp = true }, { http = \"/health\" }, { https = \"/health\" }, { tls = true }, { dns = \"www.example.net\" }, { udp = \"ping\" } or { command = \
                     [\"/usr/bin/check\"] }";
/// The ways to check, one of which is given.
const WAYS: [&str; 7] = ["tcp", "tls", "http", "https", "udp", "dns", "command"];
/// Most words of a command.
const ARGUMENTS_MAX: usize = 256;
/// Longest text that is sent or looked for.
const TEXT_BYTES_MAX: usize = 1_024;

/// Reads it. `listen`: of the server; `proxied`: its backends expect the PROXY protocol.
pub(super) fn health(
    section: &mut Section<'_, '_, '_>,
    listen: (u8, SocketAddr),
    proxied: bool,
) -> Option<HealthSpec> {
    let table = section.table("health", "{ tcp = true }")?;
    let mut inner = Section::new(KEY, Some(table), section.problems);
    let kind = way(&mut inner);
    let interval_ms = inner.number_or("interval-ms", INTERVAL_MS_MIN.into()..=TIME_MS_MAX.into(), 2_000);
    let timeout_ms = inner.number_or("timeout-ms", 1..=TIME_MS_MAX.into(), 1_000.min(interval_ms));
    let fall = inner.number_or("fall", 1..=100, 3);
    let rise = inner.number_or("rise", 1..=100, 2);
    let port = inner.number("port", 1..=65_535).and_then(|port| u16::try_from(port.value).ok());
    let source = inner.parsed("source", "\"10.0.0.254\"", values::host_address);
    let asked_proxy = inner.flag("proxy-protocol");
    let at = inner.at.clone();
    if let Some(source) = source.as_ref().filter(|source| source.value.is_ipv4() != listen.1.is_ipv4()) {
        let message =
            format!("{} is not of the address family of {}; change one of them", source.value, listen.1);
        inner.problems.error(&source.at, "virtual-server.health.source", message);
    }
    let by_connection = matches!(kind, Some(HealthKind::Tcp | HealthKind::Tls(_) | HealthKind::Http(_)));
    if let Some(proxy) = asked_proxy.as_ref().filter(|proxy| proxy.value && kind.is_some() && !by_connection)
    {
        let message = "the PROXY protocol belongs to a check over TCP; remove it";
        inner.problems.error(&proxy.at, "virtual-server.health.proxy-protocol", message);
    }
    inner.finish();
    // On another port another program answers, as a rule.
    let by_server = proxied && listen.0 == TCP && port.is_none();
    let spec = HealthSpec {
        kind: kind?,
        interval_ms,
        timeout_ms,
        fall,
        rise,
        port,
        source: source.map(|source| source.value),
        proxy_protocol: by_connection && asked_proxy.map_or(by_server, |proxy| proxy.value),
    };
    if let Some(problem) = spec.problem() {
        section.problems.error(&at, KEY, format!("{problem}; correct it"));
    }
    Some(spec)
}

/// The way that is given, with the keys that belong to it.
fn way(inner: &mut Section<'_, '_, '_>) -> Option<HealthKind> {
    let tcp = inner.flag("tcp").is_some_and(|tcp| tcp.value);
    let tls = inner.flag("tls").is_some_and(|tls| tls.value);
    let http = inner.parsed("http", "\"/health\"", http_path);
    let https = inner.parsed("https", "\"/health\"", http_path);
    let udp = inner.parsed("udp", "\"ping\"", text);
    let dns = inner.parsed("dns", "\"www.example.net\"", text);
    let command = inner.list("command", "\"/usr/bin/check\"", argument).unwrap_or_default();
    inner.at_most("command", &command, ARGUMENTS_MAX);
    let statuses = inner.items("status", status_codes);
    let host = inner.parsed("host", "\"www.example.net\"", http_host).map(|host| host.value);
    let body = inner.parsed("body", "\"ready\"", text).map(|body| body.value);
    let sni = inner.parsed("sni", "\"www.example.net\"", server_name).map(|sni| sni.value);
    let authorities = inner.parsed("ca-file", "\"/etc/ssl/certs/ca-certificates.crt\"", ca_file);
    report_mixtures(inner);
    // A name that HTTP asks for is the one that the certificate is for, as with every browser.
    let asked =
        host.as_deref().and_then(|host| server_name(host.rsplit_once(':').map_or(host, |it| it.0)).ok());
    let check = TlsCheck { sni: sni.or(asked), authorities: authorities.map(|path| path.value) };
    let (program, arguments) = command.split_first().unzip();
    let (path, check) = match (http, https) {
        (Some(path), _) => (Some(path.value), None),
        (None, https) => (https.map(|path| path.value), Some(check)),
    };
    Some(match (path, udp, dns, program) {
        (Some(path), ..) => {
            let statuses = plain(statuses).into_iter().flat_map(|(first, last)| first..=last).collect();
            HealthKind::Http(HttpCheck { path, host, statuses, body, tls: check })
        }
        (None, Some(send), ..) => HealthKind::Udp(UdpCheck { send: send.value, body }),
        (None, None, Some(name), _) => HealthKind::Dns(DnsCheck { name: name.value }),
        (None, None, None, Some(program)) => HealthKind::Command {
            program: program.value.clone().into(),
            arguments: arguments.unwrap_or_default().iter().map(|argument| argument.value.clone()).collect(),
        },
        (None, None, None, None) if tls => HealthKind::Tls(check.unwrap_or(NO_TLS)),
        (None, None, None, None) if tcp => HealthKind::Tcp,
        (None, None, None, None) => return None,
    })
}

const NO_TLS: TlsCheck = TlsCheck { sni: None, authorities: None };

/// Keys that do not go together.
fn report_mixtures(inner: &mut Section<'_, '_, '_>) {
    let at = inner.at.clone();
    let mut given = |keys: &[&'static str]| keys.iter().filter(|key| inner.value(key).is_some()).count();
    let mistakes = [
        (given(&WAYS) == 0).then(|| format!("nothing says how; write {RIGHT}")),
        (given(&WAYS) > 1).then(|| format!("more than one way is given; write {RIGHT}")),
        (given(&["status", "host"]) > 0 && given(&["http", "https"]) == 0)
            .then(|| "status and host belong to a check by HTTP; write http = \"/health\"".to_owned()),
        (given(&["body"]) > 0 && given(&["http", "https", "udp"]) == 0)
            .then(|| "body belongs to a check by HTTP or UDP; write http = \"/health\"".to_owned()),
        (given(&["sni", "ca-file"]) > 0 && given(&["https", "tls"]) == 0)
            .then(|| "sni and ca-file belong to a check by TLS; write https = \"/health\"".to_owned()),
    ];
    for mistake in mistakes.into_iter().flatten() {
        inner.problems.error(&at, KEY, mistake);
    }
}

fn server_name(text: &str) -> Result<String, ValueError> {
    let check = TlsCheck { sni: Some(text.to_owned()), ..NO_TLS };
    check.problem().map_or_else(|| Ok(text.to_owned()), |problem| Err(problem.into()))
}

fn ca_file(text: &str) -> Result<PathBuf, ValueError> {
    let path = Path::new(text);
    let check = TlsCheck { authorities: Some(path.to_owned()), ..NO_TLS };
    if let Some(problem) = check.problem() {
        return Err(problem.into());
    }
    ::health::authorities(path).map_err(|error| error.to_string())?;
    Ok(path.to_owned())
}

fn text(text: &str) -> Result<String, ValueError> {
    if text.is_empty() || text.len() > TEXT_BYTES_MAX {
        return Err(format!("a text has 1 to {TEXT_BYTES_MAX} bytes").into());
    }
    Ok(text.to_owned())
}

fn http_path(text: &str) -> Result<String, ValueError> {
    let sound = text.starts_with('/') && text.len() <= 1024 && text.bytes().all(|b| b.is_ascii_graphic());
    if sound {
        Ok(text.to_owned())
    } else {
        Err("not a path of visible characters that begins with /; write for example \"/health\"".into())
    }
}

fn http_host(text: &str) -> Result<String, ValueError> {
    if !text.is_empty() && text.len() <= 255 && text.bytes().all(|b| b.is_ascii_graphic()) {
        Ok(text.to_owned())
    } else {
        Err("not a host name; write for example \"www.example.net\"".into())
    }
}

fn argument(text: &str) -> Result<String, ValueError> {
    if text.is_empty() || text.len() > 4096 || text.contains('\0') {
        return Err("an argument has 1 to 4096 characters and no NUL".into());
    }
    Ok(text.to_owned())
}

fn status_codes(value: &DeValue<'_>) -> Result<(u16, u16), ValueError> {
    match values::ports(value) {
        Ok((first @ 100.., last @ ..=599)) => Ok((first, last)),
        _ => Err("not a status from 100 to 599; write for example 200 or \"200-299\"".into()),
    }
}
