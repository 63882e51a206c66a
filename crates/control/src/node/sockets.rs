//! Sockets of the host's programs, whose ports flows must not have ([`crate::host_ports`]).

use std::sync::Arc;
use std::time::Instant;

use services::spec::Mapping;

use super::Node;
use crate::host_facts::read_ephemeral_ports;

impl Node {
    /// When [`Self::look_at_sockets`] wants to be called.
    pub(crate) fn look_at_sockets_at(&self) -> Option<Instant> {
        self.config.services.gives_ports().then(|| self.sockets.next_at()).flatten()
    }

    /// Which ports programs of the host hold. Workers hear of what was opened at once; returns whether [`Self::refresh`] is needed for what
    /// has been there for a while.
    pub(crate) fn look_at_sockets(&mut self) -> bool {
        if !self.config.services.gives_ports() {
            return false;
        }
        let mapped = self.config.services.nats.iter().any(|nat| nat.mapping == Mapping::EndpointIndependent);
        let seen = self.sockets.look(read_ephemeral_ports(), mapped);
        if seen.opened {
            self.engine.set_opened_ports(Arc::clone(self.sockets.opened()));
        }
        seen.known
    }
}
