//! The way to services for the host's other devices, where the kernel cannot translate the destination to the right host itself: to
//! virtual servers, whose backend the datapath chooses, and to forwards with a PROXY header.
//!
//! The kernel translates the destination to an endpoint that is routed to the TUN device, so that the packet passes the host's own
//! firewall and its address translation like any that it passes on, and the answer comes back the same way. The datapath takes it for
//! one to the service.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use services::spec::{DeliveryMode, ForwardSpec, InnerSpec, ServerSpec};

use crate::config::services::Services;

/// Addresses of these endpoints: one of the IETF's own network (RFC 6890) and one of the prefix that no router passes on (RFC 6666).
/// Nobody else is reached by them.
pub(crate) const ADDRESSES: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(192, 0, 0, 11)), IpAddr::V6(Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0, 11))];
/// Port of the first endpoint.
const PORT_FIRST: u16 = 1_024;

/// The addresses that a configuration needs: of the versions in which its services listen.
pub(crate) fn addresses(services: &Services) -> impl Iterator<Item = IpAddr> + '_ {
    ADDRESSES.into_iter().filter(|address| {
        let alike = |listen: SocketAddr| listen.is_ipv4() == address.is_ipv4();
        let nat = services.servers.iter().filter(|server| server.delivery == DeliveryMode::Nat);
        nat.map(|server| server.listen).any(alike)
            || services
                .forwards
                .iter()
                .any(|forward| forward.proxy_protocol && forward.to.is_ipv4() == address.is_ipv4())
    })
}

/// An endpoint for each such service. Not with direct return: the backend has the address too, and answers past us.
pub(super) fn endpoints(servers: &[ServerSpec], forwards: &[ForwardSpec]) -> Vec<InnerSpec> {
    let servers = servers.iter().filter(|server| server.delivery == DeliveryMode::Nat);
    let servers = servers.map(|server| (server.protocol, server.listen));
    let proxied = forwards.iter().filter(|forward| leads_to(forward));
    let all = servers.chain(proxied.map(|forward| (forward.protocol, forward.listen)));
    let mut list: Vec<InnerSpec> = Vec::new();
    for ((protocol, listen), port) in all.zip(PORT_FIRST..=u16::MAX) {
        let [v4, v6] = ADDRESSES;
        let address = if listen.is_ipv4() { v4 } else { v6 };
        if !list.iter().any(|known| (known.protocol, known.listen) == (protocol, listen)) {
            list.push(InnerSpec { protocol, inner: SocketAddr::new(address, port), listen });
        }
    }
    list
}

/// Whether a forward needs such an endpoint, and may have one: the host is of no tenant.
fn leads_to(forward: &ForwardSpec) -> bool {
    forward.proxy_protocol && forward.tenant == 0 && forward.ports <= 1
}
