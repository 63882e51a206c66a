//! Interfaces come and go: sockets for all cores, the guard that keeps the kernel's stack out, the steering program.

use std::collections::BTreeMap;
use std::sync::Arc;

use linux::bpf::{KernelShare, MACS_MAX, OwnPorts, SteeringProgram};
use linux::forward_guard::ForwardGuard;
use linux::ingress_guard::{GuardKind, IngressGuard};
use linux::netlink::nftables;
use linux::packet_ring::{Fanout, Group, PacketRing, PacketRingOptions, RingFilter};
use linux::packet_sender::PacketSender;
use linux::packet_socket::PacketSocket;
use linux::raw_ip::RawIpSender;
use packet::attachment::InterfaceId;
use services::spec::{GatewaySpec, HostMode, InterfaceSpec, LinkSpec};
use steering::ownership::Ownership;

use crate::output::DeviceIngress;

use super::shared::{SharedDevice, SharedSource};
use super::{Command, GatewaySettings, Interface, Readers, Shared, lock};

/// Memory of one core's ring of one interface.
const RING_BYTES: usize = 8 << 20;

/// Ports that are open now, by place of the interface.
#[derive(Default)]
pub(crate) struct Opened {
    ports: Vec<Option<OpenPort>>,
    /// Outlives a process that is killed.
    closed: Option<ForwardGuard>,
    /// Why others are not.
    pub errors: BTreeMap<InterfaceId, String>,
}

/// One interface in use.
struct OpenPort {
    index: u32,
    device: String,
    reading: Reading,
    share: KernelShare,
    guard: IngressGuard,
    /// At a dispatcher that can be taken over: a table that outlives a process that is killed. Until its addresses are elsewhere the kernel would answer
    /// and reset the flows of all data planes.
    outliving: Option<IngressGuard>,
    /// Filters of the rings in use, which are the workers'.
    filters: Vec<RingFilter>,
    /// Whether other machines share it.
    shared: Option<SharedDevice>,
}

/// Purpose for which its rings and senders were opened.
struct Reading {
    /// Hardware address; `None` without link-layer header.
    mac: Option<[u8; 6]>,
    tenant: u16,
    readers: Readers,
    /// Tells the kernel which core owns a packet; without the privilege rings do that work.
    program: Option<SteeringProgram>,
}

impl Reading {
    fn new(shared: &Shared, interface: &InterfaceSpec, readers: Readers) -> Self {
        let cores = shared.reports.len();
        let ownership = shared.ownership.load();
        let loaded = SteeringProgram::load(&ownership.hasher, interface.tenant, ownership.table.owners());
        let program = match loaded {
            Ok(program) if readers == Readers::Flow && cores > 1 => Some(program),
            Ok(_) => None,
            Err(error) => {
                tracing::info!(device = interface.device, %error, "no steering program; packets of the wrong core take a ring");
                None
            }
        };
        Self { mac: mac_of(interface), tenant: interface.tenant, readers, program }
    }

    fn is_for(&self, interface: &InterfaceSpec, readers: Readers) -> bool {
        (self.mac, self.tenant, self.readers) == (mac_of(interface), interface.tenant, readers)
    }
}

impl OpenPort {
    fn is_at(&self, interface: &InterfaceSpec, index: Option<u32>) -> bool {
        self.device == interface.device && Some(self.index) == index
    }

    /// Nothing comes in any more, also where a core that hangs does not close its ring.
    fn close_rings(&self) {
        for filter in &self.filters {
            if let Err(error) = filter.close() {
                tracing::warn!(device = self.device, %error, "packets may arrive twice for a moment");
            }
        }
    }

    /// Opens rings and senders for all cores in place of those that they have, for `reading`; the guard stays. On error all
    /// is as before.
    fn open_again(&mut self, shared: &Shared, id: InterfaceId, reading: Reading) -> Result<(), linux::Error> {
        let before = std::mem::replace(&mut self.reading, reading);
        let opened = self.open_rings(shared, id);
        if opened.is_err() {
            self.reading = before;
        }
        opened
    }

    /// Whether the host gets by this device what the datapath finds to be its own.
    fn gives_back(&self) -> bool {
        self.guard.kind() == GuardKind::Program && self.shared.is_none()
    }

    fn has_table(&self) -> bool {
        self.outliving.is_some() || self.guard.kind() == GuardKind::Table
    }

    fn keep_guards(&self, tables: &[String]) -> Result<bool, linux::Error> {
        let behind = self.outliving.as_ref().map_or(Ok(false), |table| table.keep(&self.share, tables));
        Ok(self.guard.keep(&self.share, tables)? | behind?)
    }

    /// Says anew what is left to the kernel, to the rings first: what both have for a moment is better than what nobody has.
    fn set_kernel_share(&mut self, share: &KernelShare) -> Result<(), linux::Error> {
        if self.share == *share {
            return Ok(());
        }
        self.filters.iter().try_for_each(|filter| filter.set_kernel_share(share))?;
        self.guard.set_kernel_share(share)?;
        self.share = share.clone();
        if let Some(Err(error)) = self.outliving.as_ref().map(|table| table.set_kernel_share(share)) {
            tracing::warn!(device = self.device, %error, "the kernel's share after a crash is an old one");
        }
        Ok(())
    }
}

/// Hardware address of an interface.
fn mac_of(interface: &InterfaceSpec) -> Option<[u8; 6]> {
    match &interface.link {
        LinkSpec::Ethernet { mac, .. } => Some(*mac),
        LinkSpec::PointToPoint => None,
    }
}

/// Hardware addresses of devices on top of an interface.
fn macs_on_top(interface: Option<&InterfaceSpec>) -> Vec<[u8; 6]> {
    match interface.map(|interface| &interface.link) {
        Some(LinkSpec::Ethernet { more, .. }) => more.iter().copied().take(MACS_MAX).collect(),
        Some(LinkSpec::PointToPoint) | None => Vec::new(),
    }
}

impl Opened {
    /// The kernel's steering programs follow the bucket table.
    pub fn follow_table(&self, ownership: &Ownership) {
        for port in self.ports.iter().flatten() {
            if let Some(program) = &port.reading.program
                && let Err(error) = program.update_table(ownership.table.owners())
            {
                tracing::warn!(device = port.device, %error, "the kernel steers by the old table; rings mend it");
            }
        }
    }

    /// Devices of the open interfaces.
    pub fn devices(&self) -> Vec<String> {
        self.ports.iter().flatten().map(|port| port.device.clone()).collect()
    }

    /// Closes everything, and leaves nothing behind.
    pub fn clear(&mut self) {
        self.ports.clear();
        if let Some(Err(error)) = self.closed.take().map(|mut guard| guard.remove()) {
            tracing::warn!(%error, "the kernel does not forward between the interfaces");
        }
    }

    /// Table that keeps the kernel from forwarding between the interfaces when this process has died.
    pub fn forward_guard(&self) -> Option<String> {
        self.closed.as_ref()?.name()
    }

    /// Makes that table again if somebody has removed it, and those of the interfaces that have some.
    pub fn keep_tables(&mut self) -> Result<bool, linux::Error> {
        let closed = self.closed.as_mut().map_or(Ok(false), ForwardGuard::keep);
        let ports = self.keep_guards();
        Ok(closed? | ports?)
    }

    fn keep_guards(&self) -> Result<bool, linux::Error> {
        if !self.ports.iter().flatten().any(OpenPort::has_table) {
            return Ok(false);
        }
        let tables = nftables::netdev_tables()?;
        let kept: Vec<_> = self.ports.iter().flatten().map(|port| port.keep_guards(&tables)).collect();
        kept.into_iter().try_fold(false, |any, kept| Ok(any | kept?))
    }

    /// Before an interface is opened: what its guard takes from the kernel must not come back when nobody forwards.
    fn close_forwarding(&mut self, settings: &GatewaySettings, tun: &str) {
        let devices: Vec<String> =
            settings.spec.interfaces.iter().map(|interface| interface.device.clone()).collect();
        let guard = self.closed.get_or_insert_with(|| ForwardGuard::new(tun));
        if let Err(error) = guard.set(&devices) {
            tracing::warn!(%error, "if this process dies the kernel may forward between the interfaces");
        }
    }

    /// (index, place) of the open interfaces.
    pub fn indices(&self) -> Vec<(u32, InterfaceId)> {
        let ports = (0..).zip(&self.ports);
        ports.filter_map(|(place, port)| port.as_ref().map(|port| (port.index, InterfaceId(place)))).collect()
    }
}

/// Brings what is open in line with what is wanted; what cannot be opened is noted.
pub(super) fn follow(shared: &Shared, settings: &GatewaySettings, listen_port: Option<u16>, tun: &str) {
    let own_ports = shared.own_ports(tun);
    let mut opened = lock(&shared.opened);
    let opened = &mut *opened;
    opened.close_forwarding(settings, tun);
    let wanted = settings.spec.interfaces.len();
    let places = opened.ports.len().max(wanted);
    opened.ports.resize_with(places, || None);
    let usual = kernel_share(&settings.spec, listen_port);
    let of_hub = KernelShare { udp_ports: Vec::new(), ..usual.clone() };
    let hubs = hub_devices(shared);
    opened.errors.clear();
    for place in 0..places {
        let interface = settings.spec.interfaces.get(place);
        let index = settings.devices.get(place).copied().flatten();
        let id = InterfaceId(place as u16);
        let is_hub = interface.is_some_and(|interface| hubs.contains(&interface.device));
        let common = if is_hub { &of_hub } else { &usual };
        let mut share = KernelShare { macs: macs_on_top(interface), ..common.clone() };
        let Some(slot) = opened.ports.get_mut(place) else { continue };
        // Only a device of this machine alone, with programs at it, gives the host something back.
        share.dhcp_answers |= slot.as_ref().is_some_and(|port| !port.gives_back());
        let there = |port: &OpenPort| interface.is_some_and(|interface| port.is_at(interface, index));
        if let Some(port) = slot.take_if(|port| !there(port)) {
            port.close_rings();
            for core in 0..shared.reports.len() {
                shared.send(core, Command::Close(id));
            }
        }
        let (Some(interface), Some(index)) = (interface, index) else { continue };
        let readers = settings.readers;
        let result = match slot {
            Some(port) if port.reading.is_for(interface, readers) => port.set_kernel_share(&share),
            Some(port) => port
                .set_kernel_share(&share)
                .and_then(|()| port.open_again(shared, id, Reading::new(shared, interface, readers))),
            None => open(shared, (id, index), interface, readers, (&share, own_ports.as_ref()))
                .map(|port| *slot = Some(port)),
        };
        if let Err(error) = result {
            opened.errors.insert(id, error.to_string());
        }
    }
    opened.ports.truncate(wanted.max(1));
}

/// Devices at which the tunnel's port is that of the data planes.
fn hub_devices(shared: &Shared) -> Vec<String> {
    let devices = lock(&shared.cluster.devices);
    let hubs = devices.iter().filter(|(_, device)| matches!(device, SharedDevice::Real { hub: true, .. }));
    hubs.map(|(name, _)| name.clone()).collect()
}

/// Interfaces that the kernel does not spread by the bucket table are read by the cores that work: a core that hangs is
/// left alone in its old fanout group, where it starves nobody.
pub(crate) fn follow_cores(shared: &Shared) {
    let mut opened = lock(&shared.opened);
    for (id, port) in (0..).zip(&mut opened.ports) {
        let Some(port) = port.as_mut().filter(|port| port.reading.program.is_none()) else { continue };
        if let Err(error) = port.open_rings(shared, InterfaceId(id)) {
            tracing::error!(device = port.device, %error, "a core that hangs still gets packets");
        }
    }
}

fn open(
    shared: &Shared,
    (id, index): (InterfaceId, u32),
    interface: &InterfaceSpec,
    readers: Readers,
    (share, own_ports): (&KernelShare, Option<&OwnPorts>),
) -> Result<OpenPort, linux::Error> {
    let reading = Reading::new(shared, interface, readers);
    let device = lock(&shared.cluster.devices).get(&interface.device).cloned();
    let guard = IngressGuard::attach(&interface.device, share, own_ports)?;
    let outliving = match (&device, guard.kind()) {
        (Some(SharedDevice::Real { takeover: true, .. }), GuardKind::Program) => {
            outliving(&interface.device, share)
        }
        _ => None,
    };
    let mut port = OpenPort {
        index,
        device: interface.device.clone(),
        reading,
        share: share.clone(),
        guard,
        outliving,
        filters: Vec::new(),
        shared: device,
    };
    if !port.gives_back() {
        port.share.dhcp_answers = true;
        port.guard.set_kernel_share(&port.share)?;
    }
    port.open_rings(shared, id)?;
    Ok(port)
}

/// The guard that a killed process leaves behind, and the next start replaces.
fn outliving(device: &str, share: &KernelShare) -> Option<IngressGuard> {
    match IngressGuard::attach_table(device, share) {
        Ok(guard) => Some(guard),
        Err(error) => {
            let told = "if this process is killed the kernel may reset flows until another dispatcher has the addresses";
            tracing::warn!(device, %error, "no table behind the guard; {told}");
            None
        }
    }
}

impl OpenPort {
    /// A ring for each core that reads the interface, and what each core that works needs to send. They take the place of
    /// those that are there at once when all are open, so that no core sees a packet that another one has sent on.
    fn open_rings(&mut self, shared: &Shared, id: InterfaceId) -> Result<(), linux::Error> {
        let cores = shared.reports.len();
        let ownership = shared.ownership.load();
        let works = |core: usize| ownership.is_alive(core as u8);
        let Reading { readers, program, .. } = &self.reading;
        let fanout = match (readers, program) {
            (Readers::Flow, Some(program)) => Fanout::Steering(program),
            (Readers::Flow | Readers::Interface, _) => Fanout::Hash,
            (Readers::RoundRobin, _) => Fanout::RoundRobin,
            (Readers::Random, _) => Fanout::Random,
            (Readers::Cpu, _) => Fanout::Cpu,
        };
        let alone = *readers == Readers::Interface || cores == 1;
        let reader = (0..cores).map(|turn| (id.index() + turn) % cores).find(|core| works(*core));
        // The steering program names a core by its place in the group, so that there all cores are in it.
        let reads = |core: usize| if alone { Some(core) == reader } else { program.is_some() || works(core) };
        let mut options = PacketRingOptions {
            group: if alone { Group::Alone } else { Group::New },
            fanout,
            ring_bytes: RING_BYTES,
            kernel: self.share.clone(),
            closed: true,
            ..PacketRingOptions::default()
        };
        let mut interfaces = Vec::with_capacity(cores);
        let mut filters = Vec::with_capacity(cores);
        for core in 0..cores {
            let ring = if reads(core) { Some(PacketRing::open(&self.device, &options)?) } else { None };
            if let Some(ring) = &ring {
                options.group = ring.group();
                filters.push(ring.filter()?);
            }
            interfaces.push(self.interface(id, core, ring)?);
        }
        // What both have for a moment is better than what nobody has.
        filters.iter().try_for_each(|filter| filter.set_kernel_share(&self.share))?;
        self.close_rings();
        self.filters = filters;
        for (core, interface) in interfaces.into_iter().enumerate() {
            shared.send(core, Command::Open(Box::new(interface)));
        }
        Ok(())
    }

    /// Sockets that a core needs to use the interface.
    fn interface(
        &self,
        id: InterfaceId,
        core: usize,
        ring: Option<PacketRing>,
    ) -> Result<Interface, linux::Error> {
        let (sender, raw) = (PacketSender::open(&self.device, false)?, RawIpSender::open(&self.device)?);
        let back = match self.guard.kind() {
            GuardKind::Program => {
                sender.set_own()?;
                raw.set_own()?;
                let sender = PacketSender::open_to_ingress(&self.device)?;
                Some(DeviceIngress { sender, mac: self.reading.mac.unwrap_or_default() })
            }
            GuardKind::Table => None,
        };
        let tap = match &self.shared {
            Some(SharedDevice::Tap(tap)) => Some(Arc::clone(tap)),
            _ => None,
        };
        Ok(Interface { id, ring, sender, raw, back, shared: shared_source(self, core)?, tap })
    }
}

/// Source of what else passes at an interface that other machines share; one core sees to it.
fn shared_source(port: &OpenPort, core: usize) -> Result<Option<SharedSource>, linux::Error> {
    Ok(match &port.shared {
        Some(SharedDevice::Real { .. }) if core == 0 => {
            Some(SharedSource::Neighbors(PacketSocket::open_neighbor_discovery(&port.device)?))
        }
        Some(SharedDevice::Tap(tap)) if core == 0 => Some(SharedSource::Host(Arc::clone(tap))),
        _ => None,
    })
}

/// The tunnel's own datagrams and what never leaves a link stay with the kernel.
pub(super) fn kernel_share(spec: &GatewaySpec, listen_port: Option<u16>) -> KernelShare {
    let own: Vec<_> = spec
        .interfaces
        .iter()
        .flat_map(|interface| &interface.addresses)
        .map(|address| address.addr())
        .collect();
    KernelShare {
        udp_ports: listen_port.into_iter().collect(),
        addresses: (own.len() <= linux::bpf::ADDRESSES_MAX).then_some(own),
        link_local: true,
        dhcp_answers: spec.host.mode != HostMode::Native,
        macs: Vec::new(),
    }
}
