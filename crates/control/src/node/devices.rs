//! Settings of the host's devices that this node needs: [`crate::device_settings`].

use std::collections::BTreeSet;

use super::Node;
use crate::gateway::policy;
use crate::host_facts::HostView;

impl Node {
    /// Reverse-path filters, and whether router advertisements are believed.
    pub(super) fn set_devices(&mut self, view: &HostView) {
        let loose = self.loose(view);
        self.host.loosen_reverse_path(&loose);
        let interfaces = self.config.services.interfaces.iter();
        let inside = interfaces.filter(|interface| policy::is_inside(&self.config, interface));
        let inside = inside.map(|interface| interface.device.clone()).collect();
        self.host.ignore_router_advertisements(&inside);
    }

    /// Interfaces where packets come in whose way back is another one.
    fn loose(&self, view: &HostView) -> BTreeSet<String> {
        let lives = self.lives.iter().filter(|live| live.index.is_some());
        let mut names: BTreeSet<String> = lives.map(|live| live.wan.interface.clone()).collect();
        if self.config.wans.is_empty() && self.config.has_default_route() {
            // The tunnel takes the default route: replies of the peer seem to come from the wrong side.
            let with_default = |index| {
                view.routes.iter().any(|r| r.spec.dst.prefix_len() == 0 && r.spec.interface == Some(index))
            };
            names.extend(view.links.iter().filter(|l| with_default(l.index)).map(|link| link.name.clone()));
        }
        if !self.config.services.is_empty() {
            // What is for the host comes out of the TUN interface, wherever it came from.
            names.insert(self.config.tun.name.clone());
        }
        names
    }
}
