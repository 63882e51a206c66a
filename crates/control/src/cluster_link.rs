//! Connection of a unit to the cluster's manager: a thread that keeps it, and puts in force what the manager says.
//!
//! The protocol is [`cluster::unit`]'s. Without the manager everything stays in force as it is; the connection is tried again.

use std::collections::BTreeSet;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ::cluster::message::{Frames, Message};
use ::cluster::snapshot::{SharedInterface, Snapshot};
use ::cluster::unit::{Action, Figures, Identity, Snapshot as Told, Unit};
use engine::gateway::ClusterHandle;
use linux::affinity::{Scheduling, schedule_current_thread};
use steering::units::Lease;

use crate::config::cluster::Cluster;
use crate::copies::{Assigned, Backup, Copies};
use crate::events::{EventSender, NodeEvent};
use crate::status::{ClusterStatus, DataPlaneReport};
use crate::sync::lock;
use crate::unit_key::UnitKey;

/// Between two tries to connect, and for one try.
const CONNECT_PAUSE: Duration = Duration::from_millis(200);
const CONNECT_PATIENCE: Duration = Duration::from_secs(1);
/// Waiting for the manager's words, in which time the cores may have taken a snapshot over.
const WAIT: Duration = Duration::from_millis(2);
/// The same while nothing is under way.
const IDLE_WAIT: Duration = Duration::from_millis(20);
/// The policy follows the manager's word within this time.
const POLICY_PATIENCE: Duration = Duration::from_secs(1);
/// A manager that says nothing for so long is gone, or stopped: it says something every second.
const SILENCE_MAX: Duration = Duration::from_secs(5);
/// A manager that does not take what is sent for so long is gone.
const WRITE_PATIENCE: Duration = Duration::from_secs(1);
/// Figures are told this often …
const REPORT_EVERY: Duration = Duration::from_secs(1);
/// … and so long after a change, when the cores' counts are of it.
const REPORT_AFTER_CHANGE: Duration = Duration::from_millis(150);

/// The running thread; it ends when this is dropped.
pub(crate) struct ClusterLink {
    stop: Arc<AtomicBool>,
    status: Arc<Mutex<ClusterStatus>>,
    thread: Option<JoinHandle<()>>,
}

impl ClusterLink {
    /// Starts it. `key`: by which the manager knows this machine, if it does. `interfaces`: the shared ones; their addresses come from the manager.
    pub fn start(
        (settings, key): (Cluster, Option<UnitKey>),
        interfaces: Vec<SharedInterface>,
        engine: ClusterHandle,
        events: EventSender,
    ) -> io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut instance = [0; 8];
        getrandom::fill(&mut instance).map_err(io::Error::other)?;
        let identity = Identity {
            node: settings.node,
            role: settings.role,
            weight: settings.weight,
            instance: u64::from_be_bytes(instance),
        };
        let status = Arc::new(Mutex::new(ClusterStatus {
            role: if settings.role.owns_flows() { "dataplane" } else { "dispatcher" }.to_owned(),
            node: settings.node,
            manager: settings.managers.first().map(ToString::to_string).unwrap_or_default(),
            ..ClusterStatus::default()
        }));
        let owns_flows = settings.role.owns_flows();
        let copies = owns_flows.then(|| Copies::start(settings.node, settings.bus, &engine)).transpose()?;
        let link = Link {
            status: Arc::clone(&status),
            unit: Unit::new(identity).with_key(key.as_ref().map(UnitKey::public)),
            key,
            settings,
            interfaces,
            engine,
            events,
            began: Instant::now(),
            taken: 0,
            published: 0,
            report_due: Instant::now(),
            blocks: None,
            beats: None,
            copies,
        };
        let told = Arc::clone(&stop);
        let thread = std::thread::Builder::new().name("cluster".to_owned()).spawn(move || link.run(&told))?;
        Ok(Self { stop, status, thread: Some(thread) })
    }
}

impl ClusterLink {
    /// Part of this machine in the cluster as it is now.
    pub fn status(&self) -> ClusterStatus {
        lock(&self.status).clone()
    }
}

impl Drop for ClusterLink {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the cluster's thread panicked");
        }
    }
}

struct Link {
    unit: Unit,
    key: Option<UnitKey>,
    settings: Cluster,
    interfaces: Vec<SharedInterface>,
    engine: ClusterHandle,
    events: EventSender,
    began: Instant,
    /// Numbers of the snapshot that all cores have, and of the last one.
    taken: u64,
    published: u64,
    report_due: Instant,
    blocks: Option<Arc<[Lease]>>,
    /// Heartbeats go here.
    beats: Option<UdpSocket>,
    status: Arc<Mutex<ClusterStatus>>,
    /// Of flows, at a data plane.
    copies: Option<Copies>,
}

/// Reasons that were told since there was a manager: each once, and no more than a few.
#[derive(Default)]
struct Complaints(BTreeSet<String>);

impl Complaints {
    const MAX: usize = 8;

    fn is_new(&mut self, error: &io::Error) -> bool {
        self.0.len() < Self::MAX && self.0.insert(error.to_string())
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn clear(&mut self) {
        self.0.clear();
    }
}

impl Link {
    fn run(mut self, stop: &AtomicBool) {
        // It has little to do, and who is late counts as dead.
        if let Err(error) = schedule_current_thread(Scheduling::Preempting) {
            tracing::debug!(%error, "priority stays");
        }
        let mut complaints = Complaints::default();
        let managers = self.settings.managers.clone();
        // The one that led last, then the others in turn.
        let mut turn = 0;
        while !stop.load(Relaxed) {
            let Some(manager) = managers.get(turn % managers.len().max(1)) else { return };
            lock(&self.status).manager = manager.to_string();
            let mut pause = CONNECT_PAUSE;
            match TcpStream::connect_timeout(manager, CONNECT_PATIENCE) {
                Ok(stream) => {
                    let began = Instant::now();
                    let ended = self.talk(stream, *manager, stop);
                    if self.unit.is_connected() {
                        complaints.clear();
                    }
                    self.unit.disconnected();
                    if began.elapsed() > CONNECT_PATIENCE {
                        // Silence of twice the pause is death, and the one that led until now probably leads still.
                        pause = Duration::ZERO;
                        turn = turn.wrapping_sub(1);
                    }
                    lock(&self.status).connected = false;
                    if let Err(error) = ended
                        && !stop.load(Relaxed)
                        && complaints.is_new(&error)
                    {
                        tracing::warn!(%manager, %error, "no manager; the cluster goes on as it is");
                    }
                }
                Err(error) if complaints.is_empty() => {
                    complaints.is_new(&error);
                    tracing::info!(%manager, %error, "the cluster's manager cannot be reached yet");
                }
                Err(_) => {}
            }
            turn = turn.wrapping_add(1);
            self.follow_cores(&mut None).ok();
            std::thread::sleep(pause);
        }
    }

    /// One connection, until it ends.
    fn talk(&mut self, mut stream: TcpStream, manager: SocketAddr, stop: &AtomicBool) -> io::Result<()> {
        stream.set_nodelay(true)?;
        let beats = UdpSocket::bind(SocketAddr::new(stream.local_addr()?.ip(), 0))?;
        beats.set_nonblocking(true)?;
        beats.connect(manager)?;
        self.beats = Some(beats);
        stream.set_write_timeout(Some(WRITE_PATIENCE))?;
        let mut frames = Frames::default();
        let mut buffer = vec![0; 64 << 10];
        let actions = self.unit.connected();
        let mut to = Some(&mut stream);
        self.act(actions, &mut to)?;
        let mut wait = Duration::ZERO;
        let mut heard = Instant::now();
        while !stop.load(Relaxed) {
            let next = if self.taken == self.published { self.until_heartbeat() } else { WAIT };
            if next != wait {
                wait = next;
                stream.set_read_timeout(Some(wait))?;
            }
            match stream.read(&mut buffer) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(bytes) => {
                    heard = Instant::now();
                    frames.push(buffer.get(..bytes).unwrap_or_default());
                }
                // A process that was stopped and goes on is interrupted here: that is no reason to connect anew.
                Err(error) if error.kind() == ErrorKind::Interrupted => heard = Instant::now(),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    if heard.elapsed() > SILENCE_MAX {
                        return Err(io::Error::new(ErrorKind::TimedOut, "the manager is silent"));
                    }
                }
                Err(error) => return Err(error),
            }
            let mut to = Some(&mut stream);
            while let Some(message) = frames.take().map_err(io::Error::other)? {
                let actions = self.unit.receive(self.now_ns(), message);
                self.act(actions, &mut to)?;
                let connected = self.unit.is_connected();
                if connected && !std::mem::replace(&mut lock(&self.status).connected, true) {
                    tracing::info!(%manager, "connected to the cluster's manager");
                }
            }
            self.follow_cores(&mut to)?;
            let actions = self.unit.tick(self.now_ns());
            self.act(actions, &mut to)?;
            self.report(&mut to)?;
        }
        Ok(())
    }

    /// Time to wait while nothing is under way: heartbeats are exact, as the manager's patience is short.
    fn until_heartbeat(&self) -> Duration {
        let due_ns = self.unit.deadline_ns().unwrap_or(u64::MAX);
        Duration::from_nanos(due_ns.saturating_sub(self.now_ns())).clamp(WAIT, IDLE_WAIT)
    }

    fn now_ns(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// Tells the protocol what all cores work by.
    fn follow_cores(&mut self, to: &mut Option<&mut TcpStream>) -> io::Result<()> {
        let taken = self.engine.taken();
        if taken == self.taken {
            return Ok(());
        }
        self.taken = taken;
        self.report_due = self.report_due.min(Instant::now() + REPORT_AFTER_CHANGE);
        let actions = self.unit.took_over(taken);
        self.act(actions, to)
    }

    fn report(&mut self, to: &mut Option<&mut TcpStream>) -> io::Result<()> {
        self.engine.move_bonds();
        let now = Instant::now();
        if now < self.report_due {
            return Ok(());
        }
        let figures = self.engine.figures();
        if figures.snapshot < self.taken {
            // Counted before: a flow that began since would not be in it, and its bucket's chain would end.
            self.report_due = now + IDLE_WAIT;
            return Ok(());
        }
        self.report_due = now + REPORT_EVERY;
        {
            let mut status = lock(&self.status);
            status.packets.second_hops = figures.second_hops;
            status.packets.packets = figures.packets;
            status.packets.waited_for_era = figures.waited_for_era;
            status.flows = figures.flows;
            status.copies.inherited = figures.inherited;
            status.copies.at = self.copied_to();
            status.copies.kept = self.copies.as_ref().map_or(0, Copies::kept);
        }
        if figures.inherited == 0 {
            self.engine.forget_inherited();
        }
        let actions = self.unit.report(&Figures {
            live: &figures.live,
            in_use: figures.live.iter().map(|live| u64::from(*live)).sum(),
            load_percent: figures.load_percent,
            second_hops: figures.second_hops,
            packets: figures.packets,
            copied_to: self.copied_to(),
            inherited: figures.inherited,
        });
        self.act(actions, to)
    }

    fn act(&mut self, actions: Vec<Action>, to: &mut Option<&mut TcpStream>) -> io::Result<()> {
        for action in actions {
            match action {
                Action::Publish(told) => self.publish(&told),
                Action::ForgetFlows => self.engine.forget_flows(),
                Action::Inherit(units) => units.into_iter().for_each(|unit| self.inherit(unit)),
                Action::Leave => {
                    tracing::warn!("this machine does not take part in the cluster any more");
                    self.engine.apply(None);
                    if let Some(copies) = &self.copies {
                        copies.follow(Assigned::default());
                    }
                    lock(&self.status).member = false;
                    self.tell_blocks(Some(Arc::from([])));
                }
                // By itself: it must not wait behind a long report.
                Action::Send(message @ Message::Heartbeat { .. }) => self.beat(&message),
                Action::Send(message) => send(&message, to)?,
                Action::Prove { nonce } => {
                    if let Some(key) = &self.key {
                        send(&Message::Proof(Box::new(key.prove(&nonce))), to)?;
                    }
                }
                Action::Refused(reason) => {
                    return Err(io::Error::other(format!(
                        "the manager refuses this machine: {}",
                        reason.text()
                    )));
                }
            }
        }
        Ok(())
    }

    fn beat(&self, message: &Message) {
        let mut frame = Vec::new();
        if let (Some(beats), Ok(())) = (&self.beats, message.encode(&mut frame)) {
            // One that is lost is followed by the next.
            let _ = beats.send(&frame);
        }
    }

    fn publish(&mut self, told: &Told) {
        let snapshot = snapshot(told, &self.settings, &self.interfaces);
        self.published = told.number;
        let eras = &snapshot.units.eras;
        tracing::debug!(
            number = told.number,
            newest = eras.newest().era(),
            in_force = snapshot.units.in_force,
            members = snapshot.members.len(),
            "cluster"
        );
        {
            let mut status = lock(&self.status);
            status.member = true;
            status.newest_era = eras.newest().era();
            status.era_in_force = snapshot.units.in_force;
            status.share.buckets = eras.newest().count(self.settings.node);
            status.share.port_blocks = told.blocks.len();
            status.members = snapshot.members.iter().map(|member| member.node).collect();
            let planes = snapshot.members.iter().filter(|member| member.role.owns_flows());
            let plane = |member: &::cluster::message::Member| DataPlaneReport {
                node: member.node,
                address: member.address,
                reachable: member.node == self.settings.node,
            };
            status.data_planes = planes.map(plane).collect();
        }
        self.assign_copies(told);
        // First the policy: a core that works by the snapshot has to have its ports.
        self.tell_blocks(Some(Arc::clone(&told.blocks)));
        self.engine.apply(Some(Arc::new(snapshot)));
    }

    fn copied_to(&self) -> Option<u16> {
        self.copies.as_ref().and_then(Copies::copied_to)
    }

    /// Who gets copies of this machine's flows, and whose come here.
    fn assign_copies(&self, told: &Told) {
        let Some(copies) = &self.copies else { return };
        let address =
            |node: u16| told.members.iter().find(|member| member.node == node).map(|member| member.address);
        let own = self.settings.node;
        let backup = told.copies.iter().find(|pair| pair.unit == own);
        let backup = backup.and_then(|pair| Some(Backup { node: pair.heir, address: address(pair.heir)? }));
        let sources = told.copies.iter().filter(|pair| pair.heir == own);
        let sources = sources.filter_map(|pair| Some((address(pair.unit)?, pair.unit))).collect();
        copies.follow(Assigned { backup, sources });
    }

    /// The flows of a unit that died, or leaves, are this machine's from now on.
    fn inherit(&self, unit: u16) {
        let Some(copies) = &self.copies else { return };
        let records = &copies.take(unit);
        // Nobody is dead because it has much to take over.
        let taken = self.engine.inherit(records, &mut || self.beat(&Message::Heartbeat { load_percent: 0 }));
        let said = crate::handover::status(&taken);
        let lost: u64 = said.lost.values().sum();
        tracing::info!(unit, flows = said.flows, lost, reasons = ?said.lost, "took over the flows of another unit");
    }

    /// The node's thread gives address translation the ports that are this machine's.
    fn tell_blocks(&mut self, blocks: Option<Arc<[Lease]>>) {
        if blocks == self.blocks {
            return;
        }
        self.blocks.clone_from(&blocks);
        let Some(blocks) = blocks else { return };
        let (done, told) = sync_channel(1);
        let blocks = blocks.iter().copied().collect();
        if !self.events.send(NodeEvent::PortBlocks { blocks, done }) {
            return;
        }
        let deadline = Instant::now() + POLICY_PATIENCE;
        while let Err(RecvTimeoutError::Timeout) = told.recv_timeout(IDLE_WAIT) {
            // Nobody is dead because the node's thread is busy.
            self.beat(&Message::Heartbeat { load_percent: 0 });
            if Instant::now() > deadline {
                tracing::warn!("the policy does not know the ports of this machine yet");
                return;
            }
        }
    }
}

fn send(message: &Message, to: &mut Option<&mut TcpStream>) -> io::Result<()> {
    let Some(stream) = to else { return Ok(()) };
    let mut frame = Vec::new();
    message.encode(&mut frame).map_err(io::Error::other)?;
    stream.write_all(&frame)
}

/// The cluster in this machine's numbers.
fn snapshot(told: &Told, settings: &Cluster, interfaces: &[SharedInterface]) -> Snapshot {
    let order: Vec<u16> =
        told.members.iter().filter(|member| member.role.owns_flows()).map(|member| member.node).collect();
    let mut members = told.members.to_vec();
    members.sort_by_key(|member| member.node);
    let shared = interfaces.iter().map(|shared| {
        let known = told.interfaces.iter().find(|known| known.id == shared.ifid);
        let addresses = known.into_iter().flat_map(|known| &known.addresses).map(|(address, _)| *address);
        SharedInterface { addresses: addresses.collect(), ..shared.clone() }
    });
    Snapshot {
        number: told.number,
        role: settings.role,
        units: Arc::clone(&told.units),
        members,
        order,
        shared: shared.collect(),
        hub_port: settings.hub_port,
        answers_too_big: settings.answers_too_big,
    }
}
