//! Operators' commands about the gateway: `flows`, `explain`, `lease`, `group`, `backend`, `core`.
//!
//! A change goes into the overrides first and then to the engine; one that the engine refuses stays only where it is
//! harmless, see [`Commands::take_lease`].

use std::net::{IpAddr, SocketAddr};

use packet::attachment::{Ingress, InterfaceId};
use packet::flow::FlowKey;
use packet::server_name::ServerName;

use crate::config::services::Services;
use crate::config::{Config, classes};
use crate::gateway::engine::{EngineHandle, EngineRefusal, ExplainError, FLOWS_MAX};
use crate::gateway::overrides::OverrideError;
use crate::gateway::supervisor::GatewaySupervisor;
use crate::protocol::{FlowClass, LeaseWish, Request, Response};

/// Reason why a command was not carried out, for whoever gave it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CommandError {
    /// Nothing of the gateway is configured.
    #[error("there is no [[interface]]: this node has a tunnel only")]
    NoGateway,
    /// The engine has no policy yet.
    #[error("the packet engine is not ready yet")]
    NotReady,
    /// The request is for the event loop.
    #[error("not for the packet engine")]
    NotForGateway,
    /// The request contradicts the configuration, or an earlier command.
    #[error(transparent)]
    Override(#[from] OverrideError),
    /// The engine does not take it.
    #[error(transparent)]
    Refused(#[from] EngineRefusal),
    /// A packet to explain is not understood.
    #[error("{text}: {error}")]
    Packet {
        /// As it was written.
        text: String,
        /// Its mistake.
        error: String,
    },
    /// A packet to explain lacks ports: no rule about ports would match as it does for real packets.
    #[error(
        "{text}: {protocol} needs a port from 1 to 65535 on both sides; write for example '{protocol} {src} > {dst}'"
    )]
    PacketPorts {
        /// As it was written.
        text: String,
        /// Its protocol.
        protocol: &'static str,
        /// Source with a port.
        src: SocketAddr,
        /// Destination with a port.
        dst: SocketAddr,
    },
    /// A server's name is none.
    #[error("\"{0}\" is no name of a host; write for example www.example.org")]
    ServerName(String),
    /// Nobody answers a question for the way.
    #[error("{0}")]
    Trace(&'static str),
    /// `--interface` names no peer, or "tunnel" where there are several.
    #[error("\"{name}\" is not one peer; there are {known}")]
    NoPeer {
        /// As it was written.
        name: String,
        /// The peers, as they are to be written.
        known: String,
    },
    /// No peer has the destination.
    #[error("no peer has {address} among its allowed-ips")]
    NoPeerFor {
        /// The destination.
        address: IpAddr,
    },
    /// A packet to explain comes in nowhere.
    #[error("no interface is named \"{name}\"; there are {known}")]
    NoInterface {
        /// As it was written.
        name: String,
        /// The names there are.
        known: String,
    },
    /// There is nothing to explain.
    #[error(transparent)]
    Explain(#[from] ExplainError),
}

/// The gateway as commands see it.
pub(crate) struct Commands<'a> {
    /// Overrides and policy.
    pub gateway: &'a mut GatewaySupervisor,
    /// Configuration in force.
    pub config: &'a Config,
    /// The engine.
    pub engine: &'a EngineHandle<'a>,
}

impl Commands<'_> {
    /// Carries out a request.
    pub(crate) fn answer(&mut self, request: &Request) -> Response {
        self.carry_out(request).unwrap_or_else(|error| Response::error(error.to_string()))
    }

    fn carry_out(&mut self, request: &Request) -> Result<Response, CommandError> {
        let services = &self.config.services;
        if needs_services(request, services) && services.is_empty() && self.gateway.policy().is_none() {
            return Err(CommandError::NoGateway);
        }
        let overrides = &mut self.gateway.overrides;
        match request {
            Request::Flows { filter, limit } => {
                let flows = self.engine.flows(filter, (*limit).min(FLOWS_MAX));
                Ok(Response { flows: Some(flows), ..Response::done() })
            }
            Request::Class { packet, dscp, server_name } => {
                let flow = packet_of(packet)?;
                let server = server_name.as_deref().map(server_of).transpose()?;
                let class = classes::of_flow(self.config, &flow, *dscp, server.as_ref(), &|group| {
                    overrides.members_of(services, group)
                });
                let (class, bond, of_flow) = class.ok_or(CommandError::NoPeerFor { address: flow.dst })?;
                let (core, peer_core) = self.engine.cores_of(bond, &flow, *dscp, of_flow);
                // With services the core of its record sends it: see `explain`.
                let core = services.is_empty().then_some(core);
                let class = FlowClass { core, peer_core, ..class };
                Ok(Response { class: Some(class), ..Response::done() })
            }
            Request::Explain { packet, interface } => self.explain(packet, interface.as_deref()),
            Request::Trace { packet, interface } => self.trace(packet, interface.as_deref()),
            Request::LeaseTake(wish) => self.take_lease(wish),
            Request::LeaseReturn { name } => {
                overrides.return_lease(services, name)?;
                self.apply()?;
                Ok(Response { warning: self.store_leases(), ..Response::done() })
            }
            Request::LeaseList => {
                Ok(Response { leases: Some(overrides.list_leases(services)), ..Response::done() })
            }
            Request::GroupChange { name, prefixes, add } => {
                let changed = overrides.change_group(services, name, prefixes, *add)?;
                if !services.is_empty() {
                    self.apply()?;
                }
                Ok(Response { changed: Some(changed), ..Response::done() })
            }
            Request::GroupList { name } => {
                let groups = overrides.list_groups(services, name.as_deref())?;
                Ok(Response { groups: Some(groups), ..Response::done() })
            }
            Request::Backend { server, backend, wish } => {
                let address = overrides.change_backend(services, server, backend, *wish)?.to_string();
                self.apply()?;
                let servers = self.engine.status().virtual_servers;
                let mut of_server = servers.into_iter().filter(|known| known.name == *server);
                let mut all = of_server.next().map(|known| known.backends).unwrap_or_default().into_iter();
                let backend = all.find(|known| known.address == address);
                Ok(Response { backend, ..Response::done() })
            }
            Request::Core { core, enabled } => {
                self.engine.set_core(*core, *enabled)?;
                Ok(Response::done())
            }
            Request::Status
            | Request::Reload
            | Request::Stop
            | Request::Takeover { .. }
            | Request::Path { .. } => Err(CommandError::NotForGateway),
        }
    }

    fn apply(&mut self) -> Result<(), EngineRefusal> {
        self.gateway.apply(self.config, self.engine)
    }

    /// Warning for the operator if leases would not survive a restart.
    fn store_leases(&self) -> Option<String> {
        self.gateway.store_leases().err().map(|error| error.to_string())
    }

    /// The bond to the peer of this name, or to the only one.
    fn bond_of(&self, name: Option<&str>) -> Result<Ingress, CommandError> {
        let peers = self.gateway.policy().map(|policy| policy.peers.as_slice()).unwrap_or_default();
        let peer = match (name, peers) {
            (Some(name), _) => peers.iter().find(|peer| peer.name == name),
            (None, [only]) => Some(only),
            (None, _) => None,
        };
        let unknown = || {
            let names: Vec<String> = peers.iter().map(|peer| format!("peer:{}", peer.name)).collect();
            let name = name.map_or_else(|| "tunnel".to_owned(), |name| format!("peer:{name}"));
            CommandError::NoPeer { name, known: names.join(", ") }
        };
        peer.map(|peer| Ingress::Bond(peer.id)).ok_or_else(unknown)
    }

    /// The interface of this name.
    fn interface_of(&self, name: &str) -> Result<InterfaceId, CommandError> {
        let interfaces = self.gateway.policy().map(|policy| policy.interfaces.as_slice()).unwrap_or_default();
        let place = interfaces.iter().position(|interface| interface.name == name);
        let id = place.and_then(|place| u16::try_from(place).ok()).map(InterfaceId);
        let names: Vec<&str> = interfaces.iter().map(|interface| interface.name.as_str()).collect();
        id.ok_or_else(|| CommandError::NoInterface { name: name.to_owned(), known: names.join(", ") })
    }

    fn trace(&self, packet: &str, interface: Option<&str>) -> Result<Response, CommandError> {
        let key = packet_of(packet)?;
        let interface = interface.map(|name| self.interface_of(name)).transpose()?;
        let trace = self.engine.trace(&key, interface).map_err(CommandError::Trace)?;
        Ok(Response { trace: Some(trace), ..Response::done() })
    }

    fn explain(&self, packet: &str, interface: Option<&str>) -> Result<Response, CommandError> {
        let key = packet_of(packet)?;
        let ingress = match interface {
            None => None,
            Some("gateway") => Some(Ingress::Host),
            Some("tunnel") => Some(self.bond_of(None)?),
            Some(name) if name.starts_with("peer:") => Some(self.bond_of(name.strip_prefix("peer:"))?),
            Some(name) => Some(Ingress::Interface(self.interface_of(name)?)),
        };
        let explanation = self.engine.explain(&key, ingress)?;
        Ok(Response { explanation: Some(Box::new(explanation)), ..Response::done() })
    }

    /// Takes a lease. If the engine refuses, it is given back: nobody uses ports that the engine does not know.
    fn take_lease(&mut self, wish: &LeaseWish) -> Result<Response, CommandError> {
        let services = &self.config.services;
        let Some(policy) = self.gateway.policy().cloned() else { return Err(CommandError::NotReady) };
        let before = self.gateway.overrides.clone();
        let closed = |address: IpAddr| self.engine.closed_blocks(address);
        let lease = self.gateway.overrides.take_lease(services, &policy, wish, &closed)?;
        let mut warning = None;
        if self.gateway.overrides != before {
            if let Err(refusal) = self.apply() {
                self.gateway.overrides = before;
                return Err(refusal.into());
            }
            warning = self.store_leases();
        }
        let mut leases = self.gateway.overrides.list_leases(services);
        leases.retain(|held| held.name == lease.name);
        Ok(Response { leases: Some(leases), warning, ..Response::done() })
    }
}

/// Whether a request is about the packet engine's services: cores there are in any case, and groups may be named by classes alone.
fn needs_services(request: &Request, services: &Services) -> bool {
    match request {
        Request::Core { .. } | Request::Class { .. } => false,
        Request::GroupChange { .. } | Request::GroupList { .. } => services.groups.is_empty(),
        _ => true,
    }
}

/// A server as an operator writes it.
fn server_of(text: &str) -> Result<ServerName, CommandError> {
    ServerName::new(text.as_bytes()).ok_or_else(|| CommandError::ServerName(text.to_owned()))
}

/// A packet as an operator writes it.
fn packet_of(text: &str) -> Result<FlowKey, CommandError> {
    let key: FlowKey = text
        .parse()
        .map_err(|error| CommandError::Packet { text: text.to_owned(), error: format!("{error}") })?;
    let protocol = packet::flow::protocol_name(key.protocol).unwrap_or_default();
    if matches!(protocol, "tcp" | "udp" | "sctp") && (key.src_port == 0 || key.dst_port == 0) {
        let with = |address: IpAddr, port: u16, example: u16| {
            SocketAddr::new(address, if port == 0 { example } else { port })
        };
        return Err(CommandError::PacketPorts {
            text: text.to_owned(),
            protocol,
            src: with(key.src, key.src_port, 40_000),
            dst: with(key.dst, key.dst_port, 443),
        });
    }
    Ok(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_to_explain_needs_its_ports() {
        for text in ["tcp 10.0.0.1 > 1.2.3.4:443", "tcp 10.0.0.1:40000 > 1.2.3.4:0", "tcp 10.0.0.1 > 1.2.3.4"]
        {
            let said = packet_of(text).err().map(|error| error.to_string());
            let expected = format!(
                "{text}: tcp needs a port from 1 to 65535 on both sides; write for example 'tcp 10.0.0.1:40000 > 1.2.3.4:443'"
            );
            assert_eq!(said, Some(expected));
        }
        for text in ["udp 10.0.0.1:1 > 1.2.3.4:53", "icmp 10.0.0.1 > 1.2.3.4 id 7", "gre 10.0.0.1 > 1.2.3.4"]
        {
            assert!(packet_of(text).is_ok(), "{text}");
        }
    }
}
