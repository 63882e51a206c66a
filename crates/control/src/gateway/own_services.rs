//! Virtual servers and port forwards for the host itself: its own programs, and what comes by its other devices.
//!
//! The address of a service is on a device of the host, so that neighbors find it; to the host it would be the host, where nobody
//! listens. [`LoopbackRedirect`] turns what the host's own programs send to virtual servers to the TUN device, and the datapath gets
//! it like everything that the host sends to others. The source is the address itself, as the kernel chooses it; the answers
//! come back by the TUN device, which has to take packets from one of the host's own addresses (`accept_local`). Not with direct
//! return: the backend has the address too, and takes nothing from itself.
//!
//! A forward changes the destination alone, which the kernel can do itself: [`ForwardLeads`], for the host's own programs and for what
//! comes by a device that is no interface (containers, a VPN), under the host's firewall and connection tracking; one to the host itself for
//! everybody. The kernel has no virtual servers of ours and no PROXY protocol: it leads there through the datapath ([`super::inner`]). `check` names what other
//! devices do not reach all the same.

use std::net::SocketAddr;

use linux::bpf::LoopbackRedirect;
use linux::forward_leads::{ForwardLeads, Lead};
use services::spec::{DeliveryMode, ForwardSpec, GatewaySpec, InnerSpec};

use crate::device_settings::{self, DeviceSettings};

/// The host's way to services, while there are any.
#[derive(Debug, Default)]
pub(super) struct OwnServices {
    /// The TUN device's index and what goes there.
    told: (u32, Vec<(u8, SocketAddr)>),
    redirect: Option<LoopbackRedirect>,
    /// `accept_local` of the TUN device, which takes it along.
    accepts: DeviceSettings,
    leads: Option<ForwardLeads>,
    /// Devices and forwards that were led last, also when that failed.
    led: Option<(Vec<String>, Vec<Lead>)>,
}

impl OwnServices {
    /// Follows a policy that is in force. `others`: the host's other devices; `tun`: name and index of the TUN device.
    pub(super) fn follow(&mut self, spec: &GatewaySpec, others: Vec<String>, tun: (&str, u32)) {
        let (name, index) = tun;
        self.turn(served(spec), name, index);
        self.lead((others, leads(spec)), name);
    }

    fn turn(&mut self, served: Vec<(u8, SocketAddr)>, tun: &str, index: u32) {
        let wanted = (index, served);
        if wanted == self.told {
            return;
        }
        if wanted.1.is_empty() {
            self.turn_no_more();
        } else {
            self.accept_local(tun);
            let done = match &self.redirect {
                Some(redirect) => redirect.set(index, &wanted.1),
                None => LoopbackRedirect::attach(index, &wanted.1).map(|new| self.redirect = Some(new)),
            };
            if let Err(error) = done {
                tracing::warn!(%error, "this host itself does not reach its virtual servers");
            }
        }
        self.told = wanted;
    }

    fn lead(&mut self, wanted: (Vec<String>, Vec<Lead>), tun: &str) {
        if self.led.as_ref() == Some(&wanted) {
            return;
        }
        let table = self.leads.get_or_insert_with(|| ForwardLeads::new(tun));
        if let Err(error) = table.set(&wanted.0, &wanted.1) {
            tracing::warn!(%error, "this host itself and its other devices do not reach port forwards");
        }
        self.led = Some(wanted);
    }

    /// Leads to forwards again if somebody has cleared the table away; returns whether that was so.
    pub(super) fn keep(&mut self) -> Result<bool, linux::Error> {
        self.leads.as_mut().map_or(Ok(false), ForwardLeads::keep)
    }

    /// Puts everything back as it was.
    pub(super) fn clear(&mut self) {
        self.turn_no_more();
        if let Some(Err(error)) = self.leads.take().map(|mut table| table.set(&[], &[])) {
            tracing::warn!(%error, "a table of nft stays");
        }
        self.led = None;
    }

    fn turn_no_more(&mut self) {
        self.redirect = None;
        self.told = (0, Vec::new());
        self.accepts.clear();
    }

    fn accept_local(&mut self, device: &str) {
        if let Err(error) = self.accepts.set(&device_settings::name("ipv4", device, "accept_local"), "1") {
            tracing::warn!(device, %error, "answers of virtual servers may not reach this host itself");
        }
    }
}

/// Virtual servers that the host's own programs reach.
fn served(spec: &GatewaySpec) -> Vec<(u8, SocketAddr)> {
    let through = spec.servers.iter().filter(|server| server.delivery == DeliveryMode::Nat);
    through.map(|server| (server.protocol, server.listen)).collect()
}

/// Services that the kernel leads packets to: to forwards of the tenant that the host is of, without a PROXY header, itself; to other services through the
/// datapath ([`super::inner`]). The host's own programs have another way to virtual servers.
fn leads(spec: &GatewaySpec) -> Vec<Lead> {
    let plain = |forward: &&ForwardSpec| forward.tenant == 0 && !forward.proxy_protocol;
    let lead = |forward: &ForwardSpec| Lead {
        protocol: forward.protocol,
        listen: forward.listen,
        to: forward.to,
        ports: forward.ports.max(1),
        own: true,
        all: forward.leads_here(&spec.interfaces),
    };
    let through = |inner: &InnerSpec| Lead {
        protocol: inner.protocol,
        listen: inner.listen,
        to: inner.inner,
        ports: 1,
        own: !spec
            .servers
            .iter()
            .any(|server| (server.protocol, server.listen) == (inner.protocol, inner.listen)),
        all: false,
    };
    let to_inner = spec.host.inners.iter().map(through);
    spec.forwards.iter().filter(plain).map(lead).chain(to_inner).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use services::spec::{HostSpec, InterfaceSpec, LinkSpec};

    fn forward(port: u16, ports: u16) -> ForwardSpec {
        ForwardSpec {
            protocol: 6,
            listen: SocketAddr::new("203.0.113.1".parse().unwrap(), port),
            to: "192.168.10.5:80".parse().unwrap(),
            ports,
            tenant: 0,
            proxy_protocol: false,
        }
    }

    /// The kernel has no PROXY protocol and no tenants; to the first it leads through the datapath.
    #[test]
    fn the_kernel_leads_to_plain_forwards_of_its_own_tenant() {
        let spec = GatewaySpec {
            forwards: vec![
                forward(80, 1),
                ForwardSpec { proxy_protocol: true, ..forward(81, 1) },
                ForwardSpec { tenant: 1, ..forward(82, 1) },
                forward(1_024, 64_000),
                forward(100, 3),
            ],
            host: HostSpec {
                inners: vec![InnerSpec {
                    protocol: 6,
                    inner: "192.0.0.11:1024".parse().unwrap(),
                    listen: "203.0.113.1:81".parse().unwrap(),
                }],
                ..HostSpec::default()
            },
            ..GatewaySpec::default()
        };
        let led = |spec: &GatewaySpec| -> Vec<(u16, u16, bool)> {
            leads(spec).iter().map(|lead| (lead.listen.port(), lead.ports, lead.all)).collect()
        };
        assert_eq!(led(&spec), [(80, 1, false), (1_024, 64_000, false), (100, 3, false), (81, 1, false)]);
        let lan =
            InterfaceSpec::new("eth1", vec!["192.168.10.5/24".parse().unwrap()], LinkSpec::PointToPoint);
        let here = GatewaySpec { interfaces: vec![lan], ..spec };
        assert_eq!(led(&here), [(80, 1, true), (1_024, 64_000, true), (100, 3, true), (81, 1, false)]);
    }
}
