//! Rows C2, C3 and C4 over many random flows: which core gets each reply.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Instant;

use anyhow::anyhow;
use packet::attachment::{Egress, InterfaceId};
use packet::flow::FlowKey;
use serde::Serialize;
use services::pipeline::Outcome;
use services::spec::{
    Affinity, Attachment, BackendSpec, BalanceMethod, DeliveryMode, GatewaySpec, NatMode, ResetOnDown,
    RuleAction, RuleSpec, ServerSpec, SideSpec, TCP, UDP,
};

use super::cores::{Coming, Cores};
use super::packets;
use crate::bench::gateway::{self, Kind, LAN, WAN};

/// Flows whose replies wait at once: what they look like has to be remembered.
const ROUND: u64 = 1 << 20;
/// Where virtual servers listen.
const LISTEN: [&str; 2] = ["203.0.113.10", "2001:db8::10"];

/// One line of the result.
#[derive(Serialize)]
pub struct Row {
    /// Row of `docs/requirements.md`.
    row: &'static str,
    what: &'static str,
    cores: u8,
    pub flows: u64,
    ipv6_flows: u64,
    /// Buckets that moved to another core after half the flows had begun.
    buckets_moved: usize,
    /// First packets handed from core to core, and how often that had to be.
    pub requests_handed_over: u64,
    requests_demanded: u64,
    /// Replies that were read by another core than the flow's, and how many had to be by the hash's definition.
    pub replies_elsewhere: u64,
    pub replies_demanded: u64,
    /// Replies handed from core to core.
    replies_handed_over: u64,
    /// Count of the cores themselves.
    replies_on_wrong_core: u64,
    /// Flows that did not begin, began on the wrong core or were translated wrongly, and replies that did not reach
    /// the client as they should, every checksum right.
    pub failures: u64,
    seconds: f64,
    pub kept: bool,
}

/// Plan of a run.
#[derive(Clone, Copy)]
pub struct Plan {
    row: &'static str,
    what: &'static str,
    mode: NatMode,
    server: bool,
    /// A network card's own hash, which is not symmetric, chooses who reads.
    card: bool,
    /// Buckets move in the middle.
    moves: bool,
}

impl Plan {
    const fn new(row: &'static str, what: &'static str, mode: NatMode) -> Self {
        Self { row, what, mode, server: false, card: false, moves: false }
    }

    /// All of them.
    pub fn all() -> [Self; 7] {
        let c2 = Self::new("C2", "address and port", NatMode::AddressAndPort);
        let c3 = Self::new("C3", "port only", NatMode::PortOnly);
        let c4 = Self::new("C4", "none", NatMode::None);
        [
            c2,
            c3,
            c4,
            Self { what: "none, behind a virtual server", server: true, ..c4 },
            Self { what: "none, a card's asymmetric RSS reads", card: true, ..c4 },
            Self { what: "address and port, buckets move", moves: true, ..c2 },
            Self { what: "port only, buckets move", moves: true, ..c3 },
        ]
    }

    fn spec(self) -> anyhow::Result<GatewaySpec> {
        let mut spec = gateway::spec(match self.mode {
            NatMode::AddressAndPort => Kind::Nat,
            NatMode::PortOnly => Kind::PortOnly,
            NatMode::None => Kind::Plain,
        })?;
        spec.default_action = RuleAction::Drop;
        let from = SideSpec { attachments: vec![Attachment::Interface(LAN)], ..SideSpec::default() };
        spec.rules = vec![RuleSpec { name: "inside".to_owned(), from, ..RuleSpec::default() }];
        if self.mode == NatMode::None {
            spec.nats.extend(gateway::spec(Kind::Nat)?.nats);
        }
        for nat in &mut spec.nats {
            nat.mode = self.mode;
            if self.mode == NatMode::AddressAndPort {
                // Next IP when one's ports are taken: several of each family.
                for more in ["203.0.113.2", "203.0.113.3", "2001:db8::2"] {
                    nat.addresses.push(more.parse()?);
                }
            }
        }
        if self.server {
            spec.servers = servers()?;
            let to = SideSpec {
                prefixes: vec!["203.0.113.10/32".parse()?, "2001:db8::10/128".parse()?],
                ..SideSpec::default()
            };
            spec.rules.push(RuleSpec { name: "services".to_owned(), to, ..RuleSpec::default() });
        }
        Ok(spec)
    }

    fn draw(self, number: u64, listens: &[(SocketAddr, u8)]) -> FlowKey {
        let place = gateway::mix(number) as usize % listens.len().max(1);
        match listens.get(place) {
            Some((listen, protocol)) => {
                packets::random_client(number, (listen.ip(), listen.port()), *protocol)
            }
            None => packets::random_flow(number),
        }
    }

    /// Whether a flow leaves as its row says.
    fn is_right(self, request: &FlowKey, leaving: &FlowKey) -> bool {
        let source = match self.mode {
            NatMode::AddressAndPort => {
                leaving.src != request.src && leaving.src.is_ipv4() == request.src.is_ipv4()
            }
            NatMode::PortOnly => leaving.src == request.src,
            NatMode::None => (leaving.src, leaving.src_port) == (request.src, request.src_port),
        };
        let moved = leaving.dst != request.dst;
        source && moved == self.server && leaving.protocol == request.protocol
    }
}

/// The four services of two families, with backends of which each core owns some replies and not others.
fn servers() -> anyhow::Result<Vec<ServerSpec>> {
    let mut servers = Vec::new();
    for (protocol, port) in [(TCP, 443u16), (UDP, 53)] {
        for address in LISTEN {
            let address: IpAddr = address.parse()?;
            let backend = |last: u8| {
                let ip = match address {
                    IpAddr::V4(_) => Ipv4Addr::new(10, 0, 1, last).into(),
                    IpAddr::V6(_) => std::net::Ipv6Addr::from(0xfd << 120 | u128::from(last)).into(),
                };
                BackendSpec { address: SocketAddr::new(ip, port), weight: 1, connections_max: 0, drain_s: 0 }
            };
            servers.push(ServerSpec {
                name: format!("{address} {port}"),
                protocol,
                listen: SocketAddr::new(address, port),
                backends: (10..26).map(backend).collect(),
                method: BalanceMethod::Maglev,
                delivery: DeliveryMode::Nat,
                source: NatMode::None,
                source_addresses: Vec::new(),
                connections_max: 0,
                slow_start_s: 0,
                proxy_protocol: false,
                reset_on_down: ResetOnDown::default(),
                affinity: Affinity::default(),
            });
        }
    }
    Ok(servers)
}

/// A flow as the test knows it.
#[derive(Clone, Copy)]
struct Flow {
    request: FlowKey,
    leaving: FlowKey,
    /// Where it began; 255: nowhere.
    core: u8,
    /// By the definition of the hash and the table at that time.
    owner: u8,
}

struct Run {
    plan: Plan,
    cores: Cores,
    inside: InterfaceId,
    outside: InterfaceId,
    listens: Vec<(SocketAddr, u8)>,
    row: Row,
}

/// Runs one plan.
pub fn run(plan: Plan, flows: u64, count: u8) -> anyhow::Result<Row> {
    let spec = plan.spec()?;
    let listens = spec.servers.iter().map(|server| (server.listen, server.protocol)).collect();
    let cores = Cores::new(gateway::assemble(spec, count)?);
    let (inside, outside) = if plan.server { (WAN, LAN) } else { (LAN, WAN) };
    let row = Row {
        row: plan.row,
        what: plan.what,
        cores: count,
        flows,
        ipv6_flows: 0,
        buckets_moved: 0,
        requests_handed_over: 0,
        requests_demanded: 0,
        replies_elsewhere: 0,
        replies_demanded: 0,
        replies_handed_over: 0,
        replies_on_wrong_core: 0,
        failures: 0,
        seconds: 0.0,
        kept: false,
    };
    let mut run = Run { plan, cores, inside, outside, listens, row };
    let started = Instant::now();
    let round = if plan.moves { flows.div_ceil(2).max(1) } else { ROUND };
    let mut first = 0;
    while first < flows {
        let before = run.cores.ownership.clone();
        let mut opened = run.open(first, round.min(flows - first));
        if plan.moves && first == 0 {
            run.row.buckets_moved = run.cores.move_buckets().map_err(|error| anyhow!(error))?;
        }
        run.answer(&mut opened, &before);
        first += round;
    }
    let mut row = run.row;
    row.replies_on_wrong_core = run.cores.replies_on_wrong_core();
    row.seconds = started.elapsed().as_secs_f64();
    row.kept = row.failures == 0
        && row.requests_handed_over == row.requests_demanded
        && row.replies_elsewhere == row.replies_demanded
        && row.replies_handed_over == row.replies_demanded
        && row.replies_on_wrong_core == 0
        && (plan.moves == (row.buckets_moved > 0) || count == 1);
    Ok(row)
}

impl Run {
    /// First packets.
    fn open(&mut self, first: u64, count: u64) -> Vec<Flow> {
        let handed_before = self.cores.handed;
        let mut flows = Vec::with_capacity(count as usize);
        for number in first..first + count {
            let request = self.plan.draw(number, &self.listens);
            self.row.ipv6_flows += u64::from(request.src.is_ipv6());
            let bucket = self.bucket_by_definition(&request);
            let owner = self.cores.ownership.table.owner(bucket) as u8;
            flows.push(Flow { request, leaving: request, core: u8::MAX, owner });
            // A bucket with a history: its earlier owners are asked before the owner begins a flow.
            let history = self.cores.ownership.table.chain(bucket).len() as u64;
            let (reader, elsewhere) = self.reader(&request, owner);
            let asked = if history > 0 { history + 1 } else { u64::from(elsewhere) };
            self.row.requests_demanded += asked;
            let coming = Coming { key: request, replies: false, number: (number - first) as u32 };
            let inside = self.inside;
            self.cores.arrive(usize::from(reader), inside, coming, &mut opened(&mut flows, self.outside));
        }
        self.cores.finish(self.inside, &mut opened(&mut flows, self.outside));
        self.row.requests_handed_over += self.cores.handed - handed_before;
        flows
    }

    /// Replies. `before`: the table in force when the flows began.
    fn answer(&mut self, flows: &mut [Flow], before: &steering::ownership::Ownership) {
        let (handed_before, mut right) = (self.cores.handed, 0);
        let inside = self.inside;
        for number in 0..flows.len() {
            let Some(flow) = flows.get(number).copied() else { continue };
            if flow.core != flow.owner || !self.plan.is_right(&flow.request, &flow.leaving) {
                continue;
            }
            let key = flow.leaving.reversed();
            let bucket = self.bucket_by_definition(&key);
            let owner = self.cores.ownership.table.owner(bucket) as u8;
            let (reader, by_card) = self.reader(&key, owner);
            // With C2 and C3 the hash has to name the flow's core, unless the bucket has moved since.
            self.row.replies_demanded += u64::from(match self.plan.mode {
                NatMode::None if self.plan.card => by_card,
                NatMode::None => owner != flow.owner,
                _ => owner != before.table.owner(bucket) as u8,
            });
            self.row.replies_elsewhere += u64::from(reader != flow.core);
            let coming = Coming { key, replies: true, number: number as u32 };
            self.cores.arrive(
                usize::from(reader),
                self.outside,
                coming,
                &mut answered(flows, inside, &mut right),
            );
        }
        self.cores.finish(self.outside, &mut answered(flows, inside, &mut right));
        self.row.replies_handed_over += self.cores.handed - handed_before;
        self.row.failures += flows.len() as u64 - right;
    }

    /// Who reads a packet whose owner by the definition is known, and whether that is somebody else.
    fn reader(&self, key: &FlowKey, owner: u8) -> (u8, bool) {
        if self.plan.card {
            // An indirection table of 128 entries, as drivers set it up.
            let reader = (packets::card_hash(key) & 127) as u8 % self.cores.ownership.cores;
            return (reader, reader != owner);
        }
        let ownership = &self.cores.ownership;
        (ownership.table.owner(ownership.bucket(key, 0)) as u8, false)
    }

    fn bucket_by_definition(&self, key: &FlowKey) -> usize {
        let ownership = &self.cores.ownership;
        let hash = packets::hash_by_definition(&ownership.hasher, key);
        (hash >> 16) as usize % ownership.table.buckets()
    }
}

/// Notes where a flow began and how it leaves.
fn opened(flows: &mut [Flow], outside: InterfaceId) -> impl FnMut(u8, Outcome, &FlowKey, u32) + '_ {
    move |core, outcome, key, number| {
        if let Some(flow) = flows.get_mut(number as usize)
            && outcome == Outcome::Forward(Egress::Interface(outside))
            && flow.core == u8::MAX
        {
            (flow.leaving, flow.core) = (*key, core);
        }
    }
}

/// Counts replies that reach the client as answers to what it sent, from the core of the flow.
fn answered<'a>(
    flows: &'a [Flow],
    inside: InterfaceId,
    right: &'a mut u64,
) -> impl FnMut(u8, Outcome, &FlowKey, u32) + 'a {
    move |core, outcome, key, number| {
        let Some(flow) = flows.get(number as usize) else { return };
        let whole = outcome == Outcome::Forward(Egress::Interface(inside)) && *key == flow.request.reversed();
        *right += u64::from(whole && core == flow.core);
    }
}

impl Row {
    /// A line for people.
    pub fn line(&self) -> String {
        format!(
            "{:<3} {:<36} {:>10} {:>9} {:>8} {:>12} {:>12} {:>12} {:>9}  {}\n",
            self.row,
            self.what,
            self.flows,
            self.ipv6_flows,
            self.buckets_moved,
            format!("{}/{}", self.requests_handed_over, self.requests_demanded),
            format!("{}/{}", self.replies_elsewhere, self.replies_demanded),
            self.replies_handed_over,
            self.failures,
            if self.kept { "ok" } else { "NOT KEPT" }
        )
    }

    /// Headings of the columns of [`Row::line`].
    pub fn head() -> String {
        format!(
            "{:<3} {:<36} {:>10} {:>9} {:>8} {:>12} {:>12} {:>12} {:>9}\n",
            "row", "mode", "flows", "of IPv6", "moved", "requests", "replies", "replies", "failures"
        ) + &format!(
            "{:<3} {:<36} {:>10} {:>9} {:>8} {:>12} {:>12} {:>12}\n",
            "", "", "", "", "buckets", "handed/due", "astray/due", "handed over"
        )
    }
}
