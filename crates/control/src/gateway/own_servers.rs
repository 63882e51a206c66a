//! Virtual servers for the host's own programs.
//!
//! The address of a virtual server is on a device of the host, so that neighbors find it; to the host's own programs it would be
//! the host, where nobody listens. [`LoopbackRedirect`] turns what they send there to the TUN device, and the datapath gets it
//! like everything that the host sends to others. The source is the address itself, as the kernel chooses it; the answers
//! come back by the TUN device, which has to take packets from one of the host's own addresses (`accept_local`).
//!
//! Not with direct return: the backend has the address too, and takes nothing from itself.

use std::net::SocketAddr;

use linux::bpf::LoopbackRedirect;
use services::spec::{DeliveryMode, GatewaySpec};

/// The redirection, while there are virtual servers.
#[derive(Debug, Default)]
pub(super) struct OwnServers {
    /// The TUN device's index and what goes there.
    told: (u32, Vec<(u8, SocketAddr)>),
    redirect: Option<LoopbackRedirect>,
    /// The TUN device whose `accept_local` was switched on, to be put back at the end.
    accepts: Option<String>,
}

impl OwnServers {
    /// Follows a policy that is in force. `tun`: name and index of the TUN device.
    pub(super) fn follow(&mut self, spec: &GatewaySpec, tun: (&str, u32)) {
        let through = spec.servers.iter().filter(|server| server.delivery == DeliveryMode::Nat);
        let endpoints: Vec<(u8, SocketAddr)> =
            through.map(|server| (server.protocol, server.listen)).collect();
        let (name, index) = tun;
        let wanted = (index, endpoints);
        if wanted == self.told {
            return;
        }
        if wanted.1.is_empty() {
            self.clear();
        } else {
            self.accept_local(name);
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

    /// Puts everything back as it was.
    pub(super) fn clear(&mut self) {
        self.redirect = None;
        self.told = (0, Vec::new());
        if let Some(device) = self.accepts.take() {
            // A device that is gone took its settings along.
            let _ = linux::netns::set_sysctl(&setting(&device), "0");
        }
    }

    fn accept_local(&mut self, device: &str) {
        let is_off = || linux::netns::sysctl(&setting(device)).is_ok_and(|value| value == "0");
        if self.accepts.is_some() || !is_off() {
            return;
        }
        match linux::netns::set_sysctl(&setting(device), "1") {
            Ok(()) => self.accepts = Some(device.to_owned()),
            Err(error) => {
                tracing::warn!(device, %error, "answers of virtual servers may not reach this host itself");
            }
        }
    }
}

/// Name of the setting; dots of a device's name are written with `/`.
fn setting(device: &str) -> String {
    format!("net.ipv4.conf.{}.accept_local", device.replace('.', "/"))
}
