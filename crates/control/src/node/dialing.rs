//! Addresses that are dialled: endpoints of peers, and where UDP does not get through, over TCP ([`crate::tls_paths`]).

use std::net::{IpAddr, SocketAddr};

use super::{ENDPOINTS_MAX, Node};
use crate::config::Endpoint;
use crate::nat64;
use crate::tls_paths::LineState;
use crate::wans;

impl Node {
    /// Looks which lines need a connection over TCP, and which no more.
    pub(super) fn look_at_lines(&mut self) {
        let bonds = self.engine.bonds();
        let mut lines = Vec::new();
        for peer in self.config.peers.iter().filter(|peer| !peer.endpoints.is_empty()) {
            let Some(port) = peer.paths.tls_port else { continue };
            let Some(bond) = bonds.iter().find(|bond| bond.peer.load().id == peer.id) else { continue };
            let remotes: Vec<SocketAddr> =
                self.endpoints(&peer.endpoints).iter().map(|to| SocketAddr::new(to.ip(), port)).collect();
            let allowed = wans::ids_for_peer(peer.wans.as_deref(), &self.lives);
            for live in self.lives.iter().filter(|live| live.wan.up && bond.dialer) {
                let wan = &live.wan;
                if allowed.as_ref().is_some_and(|allowed| !allowed.contains(&wan.id)) {
                    continue;
                }
                let is_of = |remote: &&SocketAddr| {
                    wan.addresses.iter().any(|own| own.is_ipv4() == remote.ip().to_canonical().is_ipv4())
                };
                let remotes = remotes.iter().filter(is_of).copied().collect();
                let works = bond.paths.load().iter().any(|path| path.route().wan == wan.id && path.usable());
                lines.push(LineState { line: (peer.id, wan.id), remotes, works });
            }
        }
        let devices: Vec<(u16, String)> =
            self.lives.iter().map(|live| (live.wan.id, live.wan.interface.clone())).collect();
        let device = |wan: u16| {
            let found = devices.iter().find(|(id, _)| *id == wan).map(|(_, interface)| interface.clone());
            found.filter(|interface| !interface.is_empty())
        };
        if self.tls_paths.look(&lines, device) {
            self.tell_wans();
        }
    }

    /// The process for TLS paths with this number says something; `None`: it has ended.
    pub(crate) fn tls_path(&mut self, number: u32, said: Option<&tls_path::protocol::FromHelper>) {
        if self.tls_paths.heard(number, said) {
            self.tell_wans();
        }
    }

    /// Addresses to dial, names replaced by what they stand for.
    pub(super) fn endpoints(&self, endpoints: &[Endpoint]) -> Vec<SocketAddr> {
        let mut prefixes = self.routers.prefixes();
        if prefixes.is_empty() {
            prefixes = nat64::prefixes(&self.resolver.addresses(nat64::NAME));
        }
        let mut list: Vec<SocketAddr> = Vec::new();
        for endpoint in endpoints {
            let addresses: Vec<_> = match endpoint {
                Endpoint::Address(address) => {
                    let translated = |prefix: &nat64::Nat64Prefix| match address.ip().to_canonical() {
                        IpAddr::V4(ipv4) => {
                            Some(SocketAddr::new(prefix.address(ipv4).into(), address.port()))
                        }
                        IpAddr::V6(_) => None,
                    };
                    [*address].into_iter().chain(prefixes.iter().filter_map(translated)).collect()
                }
                Endpoint::Name { host, port } => {
                    self.resolver.addresses(host).into_iter().map(|ip| SocketAddr::new(ip, *port)).collect()
                }
            };
            for address in addresses {
                if !list.contains(&address) && list.len() < ENDPOINTS_MAX {
                    list.push(address);
                }
            }
        }
        list
    }
}
