//! Keeps the gateway in line with the configuration, the host and the operators' commands: addresses on devices, the
//! engine's policy, checks of backends, the NAT log.
//!
//! One order everywhere: addresses on the devices first, then the engine, then the checks. Nothing here is per packet.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use health::{HealthChange, HealthTarget};
use linux::netlink::Netlink;
use linux::privileges::User;
use services::spec::GatewaySpec;

use super::addresses::{AddressPlan, Addresses};
use super::contradictions;
use super::engine::{EngineHandle, EngineRefusal};
use super::nat_log::{self, NatLog};
use super::overrides::{LeaseFile, LeaseFileError, Overrides};
use super::policy::{self, Desired};
use crate::config::Config;
use crate::config::services::Services;
use crate::events::{EventSender, NodeEvent};
use crate::health_process::HealthHelper;
use crate::host_facts::HostFacts;
use crate::status::ServicesStatus;
use crate::warn_once::WarnOnce;

/// Pause before something that failed is tried again; it grows, and then less and less often.
const RETRY_MIN: Duration = Duration::from_secs(1);
/// The longest pause between two tries.
const RETRY_MAX: Duration = Duration::from_secs(60);
/// So often flows are looked through for addresses that nothing else needs.
const LOOK_FOR_FLOWS: Duration = Duration::from_secs(5);

/// The control side of the gateway's services.
pub(crate) struct GatewaySupervisor {
    /// Changes by command.
    pub(crate) overrides: Overrides,
    lease_file: LeaseFile,
    addresses: Addresses,
    /// Facts about the host, as read last.
    facts: Option<HostFacts>,
    /// Policy that the engine has taken.
    told: Option<Desired>,
    /// Policy that it refused, and why; said once.
    failed: Option<(Desired, EngineRefusal)>,
    /// Interfaces that it could not open, and why; said once.
    closed: BTreeMap<String, String>,
    /// Time of the next try after a failure, and the pause before it, which doubles.
    retry: Option<(Instant, Duration)>,
    checks: Option<HealthHelper>,
    /// Targets and user that it was given last.
    checked: (Vec<HealthTarget>, User),
    /// Numbers for the checks: a backend keeps its own as long as the program runs.
    health_ids: BTreeMap<(String, SocketAddr), u16>,
    log: NatLog,
    warnings: WarnOnce,
    events: EventSender,
    /// When flows were last looked through for addresses that linger.
    asked_for_flows: Option<Instant>,
}

impl GatewaySupervisor {
    /// With the leases and addresses of an earlier run.
    pub(crate) fn new(config: &Config, control_socket: &Path, events: EventSender) -> Self {
        let lease_file = LeaseFile::new(&config.node.state_dir, &config.tun.name);
        let mut overrides = Overrides::default();
        if !config.services.is_empty() {
            lease_file.load(&mut overrides);
        }
        let mut supervisor = Self {
            overrides,
            lease_file,
            addresses: Addresses::open(control_socket),
            facts: None,
            told: None,
            failed: None,
            closed: BTreeMap::new(),
            retry: None,
            checks: None,
            checked: (Vec::new(), config.services.settings.health_user),
            health_ids: BTreeMap::new(),
            log: NatLog::default(),
            warnings: WarnOnce::default(),
            events,
            asked_for_flows: None,
        };
        for said in supervisor.configured(config) {
            tracing::warn!("{said}");
        }
        supervisor
    }

    /// A configuration is in force, at the start or after a reload; [`Self::refresh`] follows. Returns what is to be said.
    pub(crate) fn configured(&mut self, config: &Config) -> Vec<String> {
        let log_file = config.services.settings.log_file.as_deref();
        self.log.follow(log_file, self.told.is_some(), linux::clock::realtime_ns());
        let said = self.overrides.settle(&config.services);
        if !said.is_empty()
            && let Err(error) = self.store_leases()
        {
            tracing::warn!("{error}");
        }
        said
    }

    /// The host has changed, or the configuration: brings devices, engine and checks into line. What fails is tried
    /// again ([`Self::tick`]).
    pub(crate) fn refresh(
        &mut self,
        config: &Config,
        mut facts: HostFacts,
        netlink: &Netlink,
        handle: &EngineHandle<'_>,
    ) {
        if !config.services.is_empty() || self.told.is_some() {
            self.addresses.apply(netlink, &AddressPlan::new(&config.services, &facts), &facts);
        } else {
            // What a run that was killed left behind.
            self.addresses.clear(netlink);
        }
        facts.lingering = self.addresses.lingering();
        for text in contradictions::left_out(&config.services, &facts) {
            self.warnings.warn(text);
        }
        self.facts = Some(facts);
        self.tell(config, handle);
        self.serve_the_host(config);
    }

    /// Leads the host's own programs and its other devices to the services in force.
    fn serve_the_host(&mut self, config: &Config) {
        let (Some(facts), Some(told)) = (&self.facts, &self.told) else { return };
        let Some(index) = facts.tun_index else { return };
        let others = policy::other_devices(config, facts);
        self.addresses.own_services.follow(&told.spec, others, (&config.tun.name, index));
    }

    /// Addresses that linger go when no flow uses them any more. Returns whether the host is to be looked at again.
    fn let_go(&mut self, netlink: &Netlink, handle: &EngineHandle<'_>) -> bool {
        let lingering = self.addresses.lingering();
        let now = Instant::now();
        if lingering.is_empty() || self.asked_for_flows.is_some_and(|at| now < at + LOOK_FOR_FLOWS) {
            return false;
        }
        self.asked_for_flows = Some(now);
        let used = handle.used_addresses(&lingering);
        self.addresses.let_go(netlink, &used, now)
    }

    /// Tells the engine, unless it knows. Returns whether it failed.
    fn tell(&mut self, config: &Config, handle: &EngineHandle<'_>) -> bool {
        let Some(facts) = &self.facts else { return false };
        if config.services.is_empty() && self.told.is_none() {
            return false;
        }
        let desired = policy::desired(config, facts, &self.overrides);
        if self.told.as_ref() == Some(&desired) && self.failed.is_none() {
            // How backends are checked is not the engine's business, and may have changed all the same.
            self.monitor(&config.services);
            return false;
        }
        let again = self.failed.as_ref().is_some_and(|(failed, _)| *failed == desired);
        if again && !self.retry_is_due() {
            return true;
        }
        if !again {
            self.retry = None;
        }
        for text in contradictions::of_policy(&desired.spec) {
            self.warnings.warn(text);
        }
        match handle.apply(&desired) {
            Ok(()) => {
                self.addresses.ipv6_routers.follow(&desired.spec);
                if self.told.is_none()
                    && let Some(taken) = handle.taken_over()
                {
                    tracing::info!("{}", crate::handover::text(&taken));
                }
                self.told = Some(desired);
                self.failed = None;
                self.note_interfaces(handle);
                self.monitor(&config.services);
                false
            }
            Err(error) => {
                if self.failed.as_ref().is_none_or(|(_, known)| *known != error) {
                    tracing::error!("the packet engine keeps its old policy: {error}; trying again");
                }
                self.failed = Some((desired, error));
                self.retry_later();
                true
            }
        }
    }

    /// Says once which interfaces do not work, and once when they do.
    fn note_interfaces(&mut self, handle: &EngineHandle<'_>) {
        let closed = handle.interface_errors();
        for (interface, reason) in &closed {
            if self.closed.get(interface) != Some(reason) {
                tracing::error!("interface {interface} does not work: {reason}; trying again");
            }
        }
        for interface in self.closed.keys().filter(|interface| !closed.contains_key(*interface)) {
            tracing::info!(interface, "the interface does not fail any more");
        }
        self.closed = closed;
        if self.closed.is_empty() {
            self.retry = None;
        } else {
            self.retry_later();
        }
    }

    fn retry_is_due(&self) -> bool {
        self.retry.is_none_or(|(at, _)| Instant::now() >= at)
    }

    fn retry_later(&mut self) {
        let pause = self.retry.map_or(RETRY_MIN, |(_, pause)| (pause * 2).min(RETRY_MAX));
        self.retry = Some((Instant::now() + pause, pause));
    }

    /// Tells the checks which backends there are.
    fn monitor(&mut self, services: &Services) {
        let mut targets = Vec::new();
        for server in &services.servers {
            let Some(health) = &server.health else { continue };
            for backend in &server.backends {
                let key = (server.name.clone(), backend.address);
                let next = u16::try_from(self.health_ids.len());
                let id = match (self.health_ids.get(&key), next) {
                    (Some(id), _) => *id,
                    (None, Ok(next)) => {
                        self.health_ids.insert(key, next);
                        next
                    }
                    // More backends than numbers in the life of a program: this one counts as up.
                    (None, Err(_)) => continue,
                };
                targets.push(HealthTarget {
                    id,
                    server: server.name.clone(),
                    address: backend.address,
                    spec: health.clone(),
                });
            }
        }
        let user = services.settings.health_user;
        let wanted = (targets, user);
        if let Some(checks) = &self.checks {
            if wanted != self.checked {
                self.checked.clone_from(&wanted);
                checks.update(wanted.0, user);
            }
            return;
        }
        if wanted.0.is_empty() {
            return;
        }
        self.checked.clone_from(&wanted);
        let started = self.events.try_clone().and_then(|events| {
            let on_change = move |change| {
                events.send(NodeEvent::Health(change));
            };
            HealthHelper::start(wanted.0, user, Box::new(on_change))
        });
        match started {
            Ok(checks) => self.checks = Some(checks),
            Err(error) => tracing::error!(%error, "backends are not checked"),
        }
    }

    /// The checks have a verdict.
    pub(crate) fn health(&self, services: &Services, change: &HealthChange, handle: &EngineHandle<'_>) {
        let found = self.health_ids.iter().find(|(_, id)| **id == change.id);
        let Some(((name, address), _)) = found else { return };
        let server = services.servers.iter().position(|server| server.name == *name);
        let Some(server) = server else { return };
        let backends = services.servers.get(server).map(|server| &server.backends);
        let backend = backends.and_then(|list| list.iter().position(|backend| backend.address == *address));
        if let Some(backend) = backend {
            handle.set_backend_up(server, backend, change.up, change.silent);
        }
    }

    /// Why a configuration cannot take force: the packet engine would refuse it.
    pub(crate) fn refused(&self, config: &Config, handle: &EngineHandle<'_>) -> Option<String> {
        let facts = self.facts.as_ref()?;
        let mut overrides = self.overrides.clone();
        overrides.settle(&config.services);
        let spec = policy::gateway_spec(config, facts, &overrides);
        // Those that were taken by command are there already.
        let refused = handle.refused_leases(&spec.leases);
        (!refused.is_empty()).then(|| refused.join("; "))
    }

    /// Once a second: writes the log, tries again what did not work. Returns whether the engine is to be told again.
    pub(crate) fn tick(&mut self, netlink: &Netlink, handle: &EngineHandle<'_>) -> bool {
        self.write_log(handle);
        handle.tick();
        self.keep(handle);
        let gone = self.let_go(netlink, handle);
        let other_mtu = self.look_at_mtus();
        if !self.closed.is_empty() && self.failed.is_none() && self.retry_is_due() {
            handle.open_interfaces();
            self.note_interfaces(handle);
        }
        gone || other_mtu || (self.failed.is_some() && self.retry_is_due())
    }

    /// Whether the MTU for IPv6 of an interface's device is another one.
    fn look_at_mtus(&mut self) -> bool {
        let (Some(facts), Some(told)) = (&mut self.facts, &self.told) else { return false };
        facts.read_ipv6_mtus(told.spec.interfaces.iter().map(|interface| interface.device.as_str()))
    }

    /// Restores what this process has set on the host and others have cleared away, as a restart of the firewall does.
    fn keep(&mut self, handle: &EngineHandle<'_>) {
        self.addresses.ipv6_routers.keep();
        for kept in [handle.keep_tables(), self.addresses.own_services.keep()] {
            match kept {
                Ok(true) => tracing::info!("a table of nft that somebody had removed is there again"),
                Ok(false) => {}
                Err(error) => tracing::debug!(%error, "a table of nft that somebody has removed"),
            }
        }
    }

    fn write_log(&mut self, handle: &EngineHandle<'_>) {
        let Some(told) = self.told.as_ref().filter(|_| self.log.is_on()) else { return };
        let clocks = (linux::clock::monotonic_ns(), linux::clock::realtime_ns());
        let (events, lost) = handle.take_nat_events();
        self.log.write(&events, &told.spec.tenants, clocks);
        self.log.lost(lost, clocks.1);
    }

    /// The log file was renamed.
    pub(crate) fn reopen_log(&mut self) {
        self.log.reopen();
    }

    /// Live state, if there is anything but the tunnel.
    pub(crate) fn status(&self, services: &Services, handle: &EngineHandle<'_>) -> Option<ServicesStatus> {
        if services.is_empty() && self.told.is_none() {
            return None;
        }
        let mut status = handle.status();
        status.leases = self.overrides.list_leases(services);
        status.groups = self.overrides.list_groups(services, None).unwrap_or_default();
        if let Some(checks) = &self.checks {
            let (process, reasons) = checks.view();
            status.health_checks = Some(process);
            for server in &mut status.virtual_servers {
                for backend in &mut server.backends {
                    let id =
                        backend.address.parse().ok().and_then(|address| {
                            self.health_ids.get(&(server.name.clone(), address)).copied()
                        });
                    if let Some(reason) = id.and_then(|id| reasons.get(&id)) {
                        backend.reason.clone_from(reason);
                    }
                }
            }
        }
        Some(status)
    }

    /// Policy that the engine has taken.
    pub(crate) fn policy(&self) -> Option<&GatewaySpec> {
        self.told.as_ref().map(|told| &told.spec)
    }

    /// Tells the engine of changed overrides.
    pub(crate) fn apply(&mut self, config: &Config, handle: &EngineHandle<'_>) -> Result<(), EngineRefusal> {
        if !self.tell(config, handle) {
            return Ok(());
        }
        self.failed.as_ref().map_or(Ok(()), |(_, refusal)| Err(refusal.clone()))
    }

    /// Keeps the leases over a restart.
    pub(crate) fn store_leases(&self) -> Result<(), LeaseFileError> {
        self.lease_file.store(&self.overrides)
    }

    /// The end begins: checks stop, the last events are written.
    pub(crate) fn end(&mut self, handle: &EngineHandle<'_>) {
        self.checks = None;
        self.write_log(handle);
        self.log.end(linux::clock::realtime_ns(), nat_log::ENDED);
    }

    /// Leaves addresses to the next run, which has so many seconds to come; the kernel takes them away then.
    pub(crate) fn leave(&mut self, netlink: &Netlink, seconds: u16) {
        self.addresses.leave(netlink, seconds);
    }

    /// Takes addresses back, after the engine's last packet.
    pub(crate) fn clear(&mut self, netlink: &Netlink) {
        self.addresses.clear(netlink);
    }
}
