//! Reasons why this host would not run a configuration that is right in itself: what a start would find out, found before.

use linux::netlink::Netlink;
use services::policy::Policy;

use crate::config::{Config, Severity};
use crate::event_loop::cpus;
use crate::gateway::overrides::Overrides;
use crate::gateway::policy::gateway_spec;
use crate::host_facts::{HostFacts, HostView, read_ephemeral_ports};
use crate::node::problem;

/// Reasons why [`crate::event_loop::run`] would refuse this configuration here, or leave an interface of it out, for the
/// operator to read. What cannot be asked refuses nothing.
#[must_use]
pub fn refusals(config: &Config) -> Vec<String> {
    let view = Netlink::open().and_then(|netlink| HostView::read(&netlink)).unwrap_or_default();
    let mut list = Vec::new();
    let allowed = linux::affinity::allowed_cpus();
    if let Some(error) = allowed.ok().and_then(|allowed| cpus(&config.node.cores, &allowed).err()) {
        list.push(("node.cores", error.trim_start_matches("node.cores: ").to_owned()));
    }
    list.extend(tunnel_device(config, &view));
    list.extend(interfaces(config, &view));
    list.extend(policy(config, &view));
    list.into_iter()
        .map(|(key, message)| problem(config, Severity::Error, key, message).to_string())
        .collect()
}

/// A device of another kind has the name of the tunnel's. A TUN device may be that of a run that goes on.
fn tunnel_device(config: &Config, view: &HostView) -> Option<(&'static str, String)> {
    let name = &config.tun.name;
    let link = view.link(name).filter(|link| link.kind.as_deref() != Some("tun"))?;
    let kind = link.kind.as_deref().unwrap_or("network");
    Some(("tun.name", format!("\"{name}\" is a {kind} device of this host; choose a name that is free")))
}

/// Devices whose packets are none that can be forwarded.
fn interfaces(config: &Config, view: &HostView) -> Vec<(&'static str, String)> {
    let mut list = Vec::new();
    for interface in &config.services.interfaces {
        let Some(link) = view.link(&interface.device) else { continue };
        let device = &interface.device;
        match link.layer {
            None => list.push((
                "interface.device",
                format!("the link layer of \"{device}\" is neither Ethernet nor none; name another device"),
            )),
            Some(linux::link_layer::LinkLayer::None) if interface.shared.is_some() => list.push((
                "interface.shared",
                format!("\"{device}\" has no Ethernet header, which machines that share it need; take a device that has"),
            )),
            Some(_) => {}
        }
    }
    list
}

/// Rules, NATs and leases that the engine would not take.
fn policy(config: &Config, view: &HostView) -> Option<(&'static str, String)> {
    let facts = HostFacts::new(view, None, read_ephemeral_ports());
    let spec = gateway_spec(config, &facts, &Overrides::default());
    Policy::compile(spec, None, 0).err().map(|error| ("gateway", error))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use linux::link_layer::LinkLayer;

    use super::*;
    use crate::config::tests::config;
    use crate::wans::tests::link;

    #[test]
    fn devices_that_cannot_be_used_are_named() {
        let mut lan = link(2, "lan");
        let mut tun = link(3, "ana0");
        let view = |links: &[&linux::netlink::Link]| HostView {
            links: links.iter().map(|link| (*link).clone()).collect(),
            ..HostView::default()
        };
        let given = config("", "[[interface]]\nname = \"lan\"\n[tun]\nname = \"ana0\"\n");
        assert_eq!(interfaces(&given, &view(&[&lan])), []);
        assert_eq!(interfaces(&given, &view(&[])), [], "it may come");
        lan.layer = Some(LinkLayer::None);
        assert_eq!(interfaces(&given, &view(&[&lan])), []);
        lan.layer = None;
        let said = interfaces(&given, &view(&[&lan]));
        assert_eq!(said[0].0, "interface.device");
        assert!(said[0].1.starts_with("the link layer of \"lan\" is neither"), "{said:?}");
        assert!(tunnel_device(&given, &view(&[&tun])).unwrap().1.contains("\"ana0\" is a network device"));
        tun.kind = Some("tun".to_owned());
        assert_eq!(tunnel_device(&given, &view(&[&tun])), None);
        assert_eq!(tunnel_device(&given, &view(&[])), None);
        assert_eq!(policy(&given, &view(&[&lan])), None);
    }
}
