//! Machines of a cluster in one machine: a manager, dispatchers and data planes on a network of their own, a client in front of
//! the shared interface `lan` and a server behind the shared interface `wan`.
//!
//! ```text
//!  client 10.1.0.2–4 ── lan 10.1.0.1 [dispatcher(s)] wan 10.2.0.1 ── 10.2.0.2–5 server
//!                                   ║ bonds ║
//!                       [manager]  [data plane] [data plane] …
//! ```
//! Each machine is a node with a gateway of its own in it. Node ids: the manager 1, dispatchers from 2 on, data planes from
//! [`FIRST_DATA_PLANE`] on; the address inside the bonds is 10.9.0.ID.

mod edge;

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use ipnet::{IpNet, Ipv4Net};

use crate::program::{Program, ScratchDir};
use crate::topology::Node;

pub use edge::{EDGE, Edge};

/// Node id of the manager.
pub const MANAGER: u16 = 1;
/// Node id of the first dispatcher.
pub const FIRST_DISPATCHER: u16 = 2;
/// Node id of the first data plane.
pub const FIRST_DATA_PLANE: u16 = 11;
/// The client's addresses.
pub const CLIENTS: [Ipv4Addr; 3] =
    [Ipv4Addr::new(10, 1, 0, 2), Ipv4Addr::new(10, 1, 0, 3), Ipv4Addr::new(10, 1, 0, 4)];
/// The server's addresses.
pub const SERVERS: [Ipv4Addr; 4] = [
    Ipv4Addr::new(10, 2, 0, 2),
    Ipv4Addr::new(10, 2, 0, 3),
    Ipv4Addr::new(10, 2, 0, 4),
    Ipv4Addr::new(10, 2, 0, 5),
];
/// The shared address of `lan`.
pub const LAN: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 1);
/// The shared address of `wan`, which sources are translated to.
pub const WAN: Ipv4Addr = Ipv4Addr::new(10, 2, 0, 1);
/// Hardware addresses of the shared interfaces.
pub const LAN_MAC: [u8; 6] = [2, 0, 0, 0, 1, 1];
/// Hardware address of `wan`.
pub const WAN_MAC: [u8; 6] = [2, 0, 0, 0, 2, 1];
/// Most data planes.
pub const DATA_PLANES_MAX: u16 = 64;
/// UDP port of the bonds.
const PORT: u16 = 4600;

/// Kinds of machines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Duty {
    /// Decides who owns what.
    Manager,
    /// Has shared interfaces.
    Dispatcher,
    /// Owns flows.
    DataPlane,
}

/// One machine.
pub struct Machine {
    /// Node id.
    pub id: u16,
    /// Its duty.
    pub duty: Duty,
    /// Its namespace.
    pub node: Node,
    config: PathBuf,
    socket: PathBuf,
    log: PathBuf,
    program: Option<Program>,
}

/// Way of two dispatchers that have both interfaces, on one network each with the client and the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pair {
    /// One of them has the shared addresses (`takeover = true`).
    Takeover,
    /// Both take in what is routed to them, at addresses of their own: [`own_address`]. Client and server have no routes yet.
    Routed,
}

/// Number and services of the machines.
#[derive(Clone, Copy, Debug)]
pub struct ClusterSpec<'a> {
    /// The program.
    pub program: &'a Path,
    /// One dispatcher has both interfaces; of two the first has `lan` and the second `wan`.
    pub dispatchers: u16,
    /// Data planes, at most [`DATA_PLANES_MAX`]; they need not all take part.
    pub data_planes: u16,
    /// Sections of the configuration that all data planes have, such as `[[nat]]`.
    pub services: &'a str,
    /// Those that dispatchers have: virtual servers whose backends see their clients' own addresses.
    pub dispatcher_services: &'a str,
}

/// A dispatcher's own address beside a shared one, of a [`Pair::Routed`].
#[must_use]
pub const fn own_address(shared: Ipv4Addr, id: u16) -> Ipv4Addr {
    let [first, second, third, _] = shared.octets();
    Ipv4Addr::new(first, second, third, 250 + id as u8)
}

/// The network with all machines. Everything is gone when it is dropped.
pub struct ClusterBed {
    // Dropped in this order: first the programs, then the network, then their files.
    machines: Vec<Machine>,
    /// The client in front of `lan`.
    pub client: Node,
    /// The server behind `wan`.
    pub server: Node,
    bus: Node,
    /// The switches in front of a pair of dispatchers.
    switches: Vec<Node>,
    pair: Option<Pair>,
    directory: ScratchDir,
    program: PathBuf,
}

/// Address of a machine inside the bonds.
#[must_use]
pub const fn bus_address(id: u16) -> Ipv4Addr {
    Ipv4Addr::new(10, 9, 0, id as u8)
}

/// Address of a machine on the network that carries the bonds.
const fn carrier_address(id: u16) -> Ipv4Addr {
    Ipv4Addr::new(10, 200, id as u8, 2)
}

const fn carrier_gateway(id: u16) -> Ipv4Addr {
    Ipv4Addr::new(10, 200, id as u8, 1)
}

fn net(address: Ipv4Addr, length: u8) -> anyhow::Result<IpNet> {
    Ok(IpNet::V4(Ipv4Net::new(address, length)?))
}

impl ClusterBed {
    /// Builds network, keys and configurations; nothing runs yet.
    ///
    /// # Errors
    /// What the system refuses.
    pub fn new(spec: &ClusterSpec<'_>) -> anyhow::Result<Self> {
        Self::build(spec, None)
    }

    /// The same with two dispatchers that both have `lan` and `wan`.
    ///
    /// # Errors
    /// What the system refuses.
    pub fn with_pair(spec: &ClusterSpec<'_>, pair: Pair) -> anyhow::Result<Self> {
        ensure!(spec.dispatchers == 2, "a pair has two dispatchers");
        Self::build(spec, Some(pair))
    }

    fn build(spec: &ClusterSpec<'_>, pair: Option<Pair>) -> anyhow::Result<Self> {
        ensure!((1..=2).contains(&spec.dispatchers), "one or two dispatchers");
        ensure!((1..=DATA_PLANES_MAX).contains(&spec.data_planes), "1 to {DATA_PLANES_MAX} data planes");
        let directory = ScratchDir::new("cluster")?;
        let bus = Node::create("bus")?;
        bus.forward()?;
        let dispatchers = (0..spec.dispatchers).map(|place| (FIRST_DISPATCHER + place, Duty::Dispatcher));
        let data_planes = (0..spec.data_planes).map(|place| (FIRST_DATA_PLANE + place, Duty::DataPlane));
        let ids: Vec<(u16, Duty)> =
            std::iter::once((MANAGER, Duty::Manager)).chain(dispatchers).chain(data_planes).collect();
        let mut machines = Vec::with_capacity(ids.len());
        for (id, duty) in ids {
            machines.push(machine(id, duty, &bus, &directory)?);
        }
        let mut bed = Self {
            machines,
            client: Node::create("client")?,
            server: Node::create("server")?,
            bus,
            switches: Vec::new(),
            pair,
            directory,
            program: spec.program.to_owned(),
        };
        match pair {
            None => bed.connect_ends(spec.dispatchers)?,
            Some(pair) => bed.connect_pair(pair)?,
        }
        bed.configure(spec)?;
        Ok(bed)
    }

    /// The client and the server at the dispatchers' interfaces.
    fn connect_ends(&self, dispatchers: u16) -> anyhow::Result<()> {
        let last = FIRST_DISPATCHER + dispatchers - 1;
        let ends = [
            (&self.client, &CLIENTS[..], FIRST_DISPATCHER, "lan", LAN, LAN_MAC),
            (&self.server, &SERVERS[..], last, "wan", WAN, WAN_MAC),
        ];
        for (end, addresses, dispatcher, interface, shared, mac) in ends {
            let machine = self.machine(dispatcher)?;
            let own =
                addresses.iter().map(|address| net(*address, 24)).collect::<anyhow::Result<Vec<_>>>()?;
            end.connect("eth0", &own, &machine.node, interface, &[net(shared, 24)?])?;
            let netlink = machine.node.netlink()?;
            netlink.set_mac(machine.node.interface(interface)?, mac)?;
            end.add_route("eth0", IpNet::V4(Ipv4Net::default()), IpAddr::V4(shared))?;
        }
        Ok(())
    }

    /// A switch for each interface, with the end and both dispatchers.
    fn connect_pair(&mut self, pair: Pair) -> anyhow::Result<()> {
        for (end, address, shared, interface) in
            [(&self.client, CLIENTS[0], LAN, "lan"), (&self.server, SERVERS[0], WAN, "wan")]
        {
            let switch = Node::create(format!("{interface}-switch"))?;
            end.connect("eth0", &[net(address, 24)?], &switch, "end", &[])?;
            let mut script =
                "ip link add br0 type bridge forward_delay 0\nip link set end master br0\n".to_owned();
            for id in [FIRST_DISPATCHER, FIRST_DISPATCHER + 1] {
                let own = [net(own_address(shared, id), 24)?];
                let own: &[IpNet] = if pair == Pair::Routed { &own } else { &[] };
                self.machine(id)?.node.connect(interface, own, &switch, &format!("d{id}"), &[])?;
                writeln!(script, "ip link set d{id} master br0")?;
            }
            let mut command = Command::new("sh");
            command.args(["-e", "-c", &format!("{script}ip link set br0 up")]);
            switch.output(command)?;
            if pair == Pair::Takeover {
                end.add_route("eth0", IpNet::V4(Ipv4Net::default()), IpAddr::V4(shared))?;
            }
            self.switches.push(switch);
        }
        Ok(())
    }

    fn configure(&mut self, spec: &ClusterSpec<'_>) -> anyhow::Result<()> {
        let mut public = Vec::new();
        for machine in &self.machines {
            let key = self.run(&["genkey"], None)?;
            self.directory.write(&format!("{}.key", machine.id), &key)?;
            public.push((machine.id, self.run(&["pubkey"], Some(&key))?.trim().to_owned()));
        }
        for machine in &self.machines {
            let text = self.text(machine, spec, &public)?;
            std::fs::write(&machine.config, text)?;
        }
        Ok(())
    }

    /// The configuration of one machine.
    fn text(
        &self,
        machine: &Machine,
        spec: &ClusterSpec<'_>,
        keys: &[(u16, String)],
    ) -> anyhow::Result<String> {
        let id = machine.id;
        let path = self.directory.path().to_str().context("a strange directory for temporary files")?;
        let mut text = String::new();
        writeln!(text, "[node]\nname = \"node{id}\"\nprivate-key-file = \"{id}.key\"\nlisten = {PORT}")?;
        writeln!(text, "state-dir = {path:?}\ncontrol-socket = {:?}", machine.socket)?;
        writeln!(text, "[tun]\naddress = [\"{}/24\"]", bus_address(id))?;
        let role = match machine.duty {
            Duty::Manager => None,
            Duty::Dispatcher => Some("dispatcher"),
            Duty::DataPlane => Some("dataplane"),
        };
        if let Some(role) = role {
            let manager = bus_address(MANAGER);
            writeln!(text, "[cluster]\nrole = \"{role}\"\nnode-id = {id}\nmanager = \"{manager}\"")?;
            let last = FIRST_DISPATCHER + spec.dispatchers - 1;
            let interfaces = [("lan", 0, LAN, LAN_MAC, FIRST_DISPATCHER), ("wan", 1, WAN, WAN_MAC, last)];
            for (name, ifid, address, mac, dispatcher) in interfaces {
                if machine.duty == Duty::Dispatcher && id != dispatcher && self.pair.is_none() {
                    continue;
                }
                let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
                writeln!(text, "[[interface]]\nname = \"{name}\"\nshared = {ifid}\nmac = \"{mac}\"")?;
                let dispatches = machine.duty == Duty::Dispatcher;
                match self.pair {
                    None => writeln!(text, "dispatchers = [{dispatcher}]\naddress = [\"{address}/24\"]")?,
                    Some(Pair::Routed) if dispatches => {
                        writeln!(text, "address = [\"{}/24\"]", own_address(address, id))?;
                    }
                    Some(pair) => {
                        let sixth = 1 + ifid;
                        writeln!(text, "address = [\"{address}/24\", \"fd0{sixth}::1/64\"]")?;
                        if dispatches && pair == Pair::Takeover {
                            writeln!(text, "takeover = true")?;
                        }
                    }
                }
            }
            let services = match machine.duty {
                Duty::DataPlane => spec.services,
                _ => spec.dispatcher_services,
            };
            writeln!(text, "{services}")?;
        }
        for (peer, key) in keys.iter().filter(|(peer, _)| *peer != id) {
            let (carrier, bus) = (carrier_address(*peer), bus_address(*peer));
            writeln!(text, "[[peer]]\nname = \"node{peer}\"\npublic-key = \"{key}\"")?;
            writeln!(text, "endpoints = [\"{carrier}:{PORT}\"]\nallowed-ips = [\"{bus}/32\"]")?;
        }
        Ok(text)
    }

    /// Runs the program to its end, outside the network.
    fn run(&self, arguments: &[&str], input: Option<&str>) -> anyhow::Result<String> {
        let mut command = Command::new(&self.program);
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().with_context(|| format!("start {}", self.program.display()))?;
        if let (Some(input), Some(mut stdin)) = (input, child.stdin.take()) {
            std::io::Write::write_all(&mut stdin, input.as_bytes())?;
        }
        let output = child.wait_with_output()?;
        ensure!(output.status.success(), "{arguments:?} failed: {}", output.status);
        Ok(String::from_utf8(output.stdout)?)
    }

    /// A machine by its node id.
    ///
    /// # Errors
    /// When there is none.
    pub fn machine(&self, id: u16) -> anyhow::Result<&Machine> {
        let found = self.machines.iter().find(|machine| machine.id == id);
        found.with_context(|| format!("there is no machine {id}"))
    }

    /// All machines.
    #[must_use]
    pub fn machines(&self) -> &[Machine] {
        &self.machines
    }

    /// Node ids of the data planes.
    pub fn data_planes(&self) -> impl Iterator<Item = u16> + '_ {
        let planes = self.machines.iter().filter(|machine| machine.duty == Duty::DataPlane);
        planes.map(|machine| machine.id)
    }

    /// Where files of this cluster may lie.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Starts the gateways of all machines.
    ///
    /// # Errors
    /// When one does not start.
    pub fn start(&mut self) -> anyhow::Result<()> {
        let ids: Vec<u16> = self.machines.iter().map(|machine| machine.id).collect();
        ids.into_iter().try_for_each(|id| self.start_one(id))
    }

    /// Starts the gateway of one machine.
    ///
    /// # Errors
    /// When it does not start.
    pub fn start_one(&mut self, id: u16) -> anyhow::Result<()> {
        let program = self.program.clone();
        let machine = self.machines.iter_mut().find(|machine| machine.id == id);
        let machine = machine.with_context(|| format!("there is no machine {id}"))?;
        let mut command = Command::new(program);
        command.arg("up").arg(&machine.config);
        machine.program = Some(machine.node.start(command, Some(&machine.log))?);
        Ok(())
    }

    /// Starts another command of the program on a machine.
    ///
    /// # Errors
    /// When it does not start.
    pub fn start_command(&self, id: u16, arguments: &[&str], log: &str) -> anyhow::Result<Program> {
        let mut command = Command::new(&self.program);
        command.args(arguments);
        self.machine(id)?.node.start(command, Some(&self.directory.path().join(log)))
    }

    /// Ends the gateway of a machine: in order, or at once as a crash does.
    ///
    /// # Errors
    /// When it does not end.
    pub fn stop(&mut self, id: u16, crash: bool) -> anyhow::Result<()> {
        let machine = self.machines.iter_mut().find(|machine| machine.id == id);
        if let Some(mut program) = machine.and_then(|machine| machine.program.take()) {
            if crash {
                program.signal(rustix::process::Signal::KILL)?;
            }
            program.stop()?;
        }
        Ok(())
    }

    /// Sets the MTU of the network between the machines, which they do not know of: a router there tells them, or drops.
    ///
    /// # Errors
    /// What the system refuses.
    pub fn set_bus_mtu(&self, mtu_bytes: u32) -> anyhow::Result<()> {
        let netlink = self.bus.netlink()?;
        for machine in &self.machines {
            netlink.set_mtu(self.bus.interface(&format!("m{}", machine.id))?, mtu_bytes)?;
        }
        Ok(())
    }

    /// Process id of the gateway of a machine.
    ///
    /// # Errors
    /// When it does not run.
    pub fn process(&self, id: u16) -> anyhow::Result<u32> {
        Ok(self.machine(id)?.program.as_ref().context("its gateway does not run")?.id())
    }

    /// Takes the CPU away from the gateway of a machine for so long.
    ///
    /// # Errors
    /// When it does not run.
    pub fn pause(&self, id: u16, time: std::time::Duration) -> anyhow::Result<()> {
        self.halt(id, true)?;
        std::thread::sleep(time);
        self.halt(id, false)
    }

    /// Takes the CPU away from the gateway of a machine, or gives it back.
    ///
    /// # Errors
    /// When it does not run.
    pub fn halt(&self, id: u16, halted: bool) -> anyhow::Result<()> {
        let program = self.machine(id)?.program.as_ref().context("its gateway does not run")?;
        program.signal(if halted { rustix::process::Signal::STOP } else { rustix::process::Signal::CONT })
    }

    /// Cuts a machine's cable to the others, or mends it: no packet passes, and nobody is told.
    ///
    /// # Errors
    /// What the system refuses.
    pub fn cut(&self, id: u16, cut: bool) -> anyhow::Result<()> {
        let port = format!("m{id}");
        let rules = if cut {
            format!(
                "add table inet cut_{port}\nadd chain inet cut_{port} into {{ type filter hook prerouting priority -500; }}\n\
                 add rule inet cut_{port} into iifname {port} drop\n\
                 add chain inet cut_{port} from {{ type filter hook postrouting priority 500; }}\n\
                 add rule inet cut_{port} from oifname {port} drop\n"
            )
        } else {
            format!("delete table inet cut_{port}\n")
        };
        let mut command = Command::new("nft");
        command.arg(rules);
        self.bus.output(command)?;
        Ok(())
    }

    /// Fails when a gateway that was started has ended, with its last words.
    ///
    /// # Errors
    /// Then.
    pub fn check_alive(&mut self) -> anyhow::Result<()> {
        for machine in &mut self.machines {
            if let Some(program) = &mut machine.program {
                program.check_alive().with_context(|| format!("machine {}", machine.id))?;
            }
        }
        Ok(())
    }

    /// Where the manager listens for units.
    #[must_use]
    pub fn manager_address(&self) -> SocketAddr {
        SocketAddr::new(IpAddr::V4(bus_address(MANAGER)), 4601)
    }
}

impl Machine {
    /// The control socket of its gateway.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its gateway's log.
    #[must_use]
    pub fn log(&self) -> &Path {
        &self.log
    }
}

fn machine(id: u16, duty: Duty, bus: &Node, directory: &ScratchDir) -> anyhow::Result<Machine> {
    let node = Node::create(format!("node{id}"))?;
    let (own, gateway) = (net(carrier_address(id), 30)?, net(carrier_gateway(id), 30)?);
    node.connect("eth0", &[own], bus, &format!("m{id}"), &[gateway])?;
    node.add_route("eth0", net(Ipv4Addr::new(10, 200, 0, 0), 16)?, IpAddr::V4(carrier_gateway(id)))?;
    let file = |ending: &str| directory.path().join(format!("{id}.{ending}"));
    Ok(Machine {
        id,
        duty,
        node,
        config: file("toml"),
        socket: file("sock"),
        log: file("log"),
        program: None,
    })
}
