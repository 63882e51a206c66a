//! Contradictions that only show when the host's state is known, or all of the policy together: pool addresses that
//! cannot be used on this host, services that come to coincide, leases that nobody has.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use services::spec::{GatewaySpec, NatMode};

use crate::config::services::Services;
use crate::config::services::pools::{Unusable, unusable};
use crate::config::services::values::listen_text;
use crate::host_facts::HostFacts;

/// Pool addresses that the host's state makes impossible, for the operator to read.
#[must_use]
pub fn left_out(services: &Services, facts: &HostFacts) -> Vec<String> {
    let known = unusable(services, None);
    let found = unusable(services, Some(facts));
    // An address that moves between machines is missing on all but one of them.
    let new =
        found.iter().filter(|(address, why)| !known.contains_key(address) && **why != Unusable::Elsewhere);
    new.map(|(address, why)| format!("{address} of a pool {why}: it is left out; remove it from the pool"))
        .collect()
}

/// First and last port, and whose.
type Ports = (u16, u16, String);

/// Services that have come to listen on the same endpoint, and leases whose address no NAT has.
#[must_use]
pub fn of_policy(spec: &GatewaySpec) -> Vec<String> {
    let mut said = Vec::new();
    let mut taken: BTreeMap<(u8, IpAddr), Vec<Ports>> = BTreeMap::new();
    let servers = spec
        .servers
        .iter()
        .map(|server| (server.protocol, server.listen, server.listen.port(), format!("\"{}\"", server.name)));
    let forwards = spec.forwards.iter().map(|forward| {
        (forward.protocol, forward.listen, forward.last_port(), format!("the forward to {}", forward.to))
    });
    for (protocol, listen, last, name) in servers.chain(forwards) {
        let here = taken.entry((protocol, listen.ip())).or_default();
        match here.iter().find(|(from, to, _)| *from <= last && listen.port() <= *to) {
            Some((.., first)) => said.push(format!(
                "{} is where {first} and {name} listen; {first} gets everything, give them different ports",
                listen_text(protocol, listen)
            )),
            None => {
                here.push((listen.port(), last, name));
            }
        }
    }
    let pools: BTreeSet<IpAddr> = spec
        .nats
        .iter()
        .filter(|nat| nat.mode == NatMode::AddressAndPort)
        .flat_map(|nat| nat.addresses.iter().copied())
        .collect();
    for lease in spec.leases.iter().filter(|lease| !pools.contains(&lease.address)) {
        said.push(format!(
            "lease \"{}\": no [[nat]] has the address {} now, so that its holder gets other ports",
            lease.name, lease.address
        ));
    }
    said
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::config::tests::config;
    use crate::gateway::addresses::AddressPlan;
    use crate::gateway::overrides::Overrides;
    use crate::gateway::policy::gateway_spec;
    use crate::gateway::policy::tests::facts;

    const WAN: &str = "[[interface]]\nname = \"wan\"\ndevice = \"eth0\"\n";

    /// `eth0` has 203.0.113.1/24 from DHCP, and the kernel's routes lead to .253 and .254.
    #[test]
    fn a_pool_around_the_routers_leaves_them_to_the_network() {
        let pool = "[[nat]]\nout = \"wan\"\naddresses = \"203.0.113.0/24\"\n";
        let config = config("", &format!("{WAN}{pool}"));
        let said = left_out(&config.services, &facts());
        assert_eq!(said.len(), 4, "{said:?}");
        assert_eq!(
            said[2],
            "203.0.113.254 of a pool belongs to the next router towards 0.0.0.0/0: it is left out; remove it from the pool"
        );
        let left = |address: IpAddr| {
            ["203.0.113.0", "203.0.113.253", "203.0.113.254", "203.0.113.255"]
                .contains(&address.to_string().as_str())
        };
        let spec = gateway_spec(&config, &facts(), &Overrides::default());
        assert_eq!(spec.nats[0].addresses.len(), 252);
        assert!(!spec.nats[0].addresses.iter().any(|address| left(*address)));
        assert!(
            !spec.routes.iter().any(|route| route.prefix.prefix_len() == 32 && left(route.prefix.addr()))
        );
        let plan = AddressPlan::new(&config.services, &facts());
        assert_eq!(plan.addresses.len(), 252);
        assert!(
            !plan.addresses.iter().any(|entry| left(entry.net.addr())),
            "the kernel would take them for its own"
        );
    }

    #[test]
    fn ipv4_is_translated_when_nothing_is_left_of_its_pool() {
        let pool =
            "[[nat]]\nout = \"wan\"\naddresses = [\"203.0.113.254\", \"203.0.113.253\", \"2001:db8::9\"]\n";
        let config = config("", &format!("{WAN}{pool}"));
        let spec = gateway_spec(&config, &facts(), &Overrides::default());
        let addresses: Vec<String> = spec.nats[0].addresses.iter().map(ToString::to_string).collect();
        assert_eq!(addresses, ["2001:db8::9", "203.0.113.1", "203.0.113.10"], "the interface's own");
    }

    #[test]
    fn services_that_come_to_coincide_and_leases_without_address() {
        let text = format!(
            "{WAN}[[nat]]\nout = \"wan\"\n[[forward]]\nlisten = \"tcp wan:8080\"\nto = \"10.0.0.5:80\"\n[[forward]]\n\
             listen = \"tcp 203.0.113.1:8081\"\nto = \"10.0.0.6:80\"\n[[virtual-server]]\nname = \"web\"\n\
             listen = \"tcp 203.0.113.1:8080\"\nbackends = [\"10.0.0.7:80\"]\n[[lease]]\nname = \"pod\"\n\
             from = \"10.0.0.0/24\"\naddress = \"203.0.113.9\"\nfirst-port = 2048\nports = 1024\n"
        );
        let config = config("", &text);
        let said = of_policy(&gateway_spec(&config, &facts(), &Overrides::default()));
        assert_eq!(
            said,
            [
                "tcp 203.0.113.1:8080 is where \"web\" and the forward to 10.0.0.5:80 listen; \"web\" gets everything, give \
                 them different ports",
                "lease \"pod\": no [[nat]] has the address 203.0.113.9 now, so that its holder gets other ports"
            ]
        );
        let mut elsewhere = facts();
        elsewhere.devices[1].addresses = vec!["203.0.113.9/24".parse().unwrap()];
        assert_eq!(of_policy(&gateway_spec(&config, &elsewhere, &Overrides::default())), [] as [String; 0]);
    }
}
