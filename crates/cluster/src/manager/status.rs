//! The state of the cluster for people.

use std::net::IpAddr;

use steering::table::{BucketTable, CHAIN_MAX};

use super::command::{Command, Step};
use super::state::Standing;
use super::{Manager, Stage};
use crate::message::Role;
use crate::scale::{Seen, SeenUnit};

/// State of the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// Era in force; `None` before the first.
    pub in_force: Option<u32>,
    /// Era of the change under way.
    pub next: Option<u32>,
    /// How far the change is.
    pub stage: &'static str,
    /// Units that have not acknowledged what the stage waits for.
    pub missing: Vec<u16>,
    /// Why accepted commands wait.
    pub waits: Option<String>,
    /// Numbers of the commands that wait.
    pub accepted: Vec<u64>,
    /// Buckets by the length of their chain, from 0 to 4.
    pub chains: [usize; CHAIN_MAX + 1],
    /// Live flows by the length of their bucket's chain, from 0 to 4.
    pub flows_by_chain: [u64; CHAIN_MAX + 1],
    /// Live flows by their unit's place: 0 the owner of the bucket, 1 to 4 its place in the chain.
    pub flows_by_place: [u64; CHAIN_MAX + 1],
    /// Blocks of ports that nobody has and that are not free yet.
    pub quarantined: usize,
    /// Units by node id.
    pub units: Vec<UnitStatus>,
}

/// State of a unit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnitStatus {
    /// The node id.
    pub node: u16,
    /// Its bus address.
    pub address: IpAddr,
    /// Its task.
    pub role: Role,
    /// Its standing.
    pub standing: Standing,
    /// It has a connection.
    pub connected: bool,
    /// Its capacity.
    pub weight: u32,
    /// Buckets that it owns by the newest table.
    pub buckets: usize,
    /// Buckets in whose chain it stands.
    pub chained: usize,
    /// Live flows that it told, counted by bucket.
    pub live: u64,
    /// Load in percent.
    pub load_percent: u8,
    /// Packets that it sent on to another unit.
    pub second_hops: u64,
    /// Packets that came.
    pub packets: u64,
    /// Blocks of ports that it has.
    pub blocks: usize,
    /// Nothing is left on it.
    pub drained: bool,
}

impl Manager {
    /// The state for people.
    #[must_use]
    pub fn status(&self) -> Status {
        let newest = self.state.newest();
        let mut chains = [0; CHAIN_MAX + 1];
        for bucket in 0..newest.map_or(0, BucketTable::buckets) {
            let length = newest.map_or(0, |table| table.chain(bucket).len());
            if let Some(count) = chains.get_mut(length) {
                *count += 1;
            }
        }
        let (flows_by_chain, flows_by_place) = self.flows_in_chains();
        Status {
            in_force: self.state.table.as_ref().map(BucketTable::era),
            next: self.state.change.as_ref().map(|change| change.table.era()),
            stage: self.stage.name(),
            missing: self.missing(),
            waits: self.waits.as_ref().map(ToString::to_string),
            accepted: self.state.accepted.iter().map(|accepted| accepted.number).collect(),
            chains,
            flows_by_chain,
            flows_by_place,
            quarantined: self.state.blocks.iter().filter(|block| block.node.is_none()).count(),
            units: self.state.units.keys().filter_map(|node| self.unit_status(*node)).collect(),
        }
    }

    /// The data planes, for the policy of how many there should be.
    #[must_use]
    pub fn seen(&self) -> Seen {
        let waiting = |node: u16| {
            let steps = self.state.accepted.iter().flat_map(|accepted| match &accepted.command {
                Command::Change(steps) => &steps[..],
                Command::Configure { .. } => &[],
            });
            steps.into_iter().any(|step| matches!(step, Step::Add { node: added, .. } if *added == node))
        };
        let planes = self.state.units.iter().filter(|(_, unit)| unit.role.owns_flows());
        let seen = planes.map(|(node, unit)| {
            let peer = self.peers.get(node);
            let figures = peer.map(|peer| &peer.figures);
            SeenUnit {
                node: *node,
                address: unit.address,
                standing: unit.standing,
                connected: peer.is_some_and(|peer| peer.connection.is_some()),
                load_percent: figures.map_or(0, |figures| figures.load_percent),
                live: figures.map_or(0, |figures| figures.live.iter().map(|live| u64::from(*live)).sum()),
                is_awaited: waiting(*node),
            }
        });
        Seen { units: seen.collect(), is_idle: self.stage == Stage::Idle && self.saving.is_none() }
    }

    /// Live flows that units told, by the length of the chain and by the place in it of the unit that has them.
    fn flows_in_chains(&self) -> ([u64; CHAIN_MAX + 1], [u64; CHAIN_MAX + 1]) {
        let (mut by_chain, mut by_place) = ([0; CHAIN_MAX + 1], [0; CHAIN_MAX + 1]);
        let Some(table) = self.state.newest() else { return (by_chain, by_place) };
        for (node, peer) in &self.peers {
            let told = peer.figures.live.iter().enumerate().filter(|(_, flows)| **flows > 0);
            for (bucket, flows) in told {
                let chain = table.chain(bucket);
                let place = if table.owner(bucket) == *node {
                    Some(0)
                } else {
                    chain.iter().position(|unit| unit == node).map(|place| place + 1)
                };
                if let (Some(place), Some(count)) = (place, by_chain.get_mut(chain.len())) {
                    *count += u64::from(*flows);
                    by_place[place] += u64::from(*flows);
                }
            }
        }
        (by_chain, by_place)
    }

    fn unit_status(&self, node: u16) -> Option<UnitStatus> {
        let unit = self.state.units.get(&node)?;
        let newest = self.state.newest();
        let chained = newest.map_or(0, |table| {
            (0..table.buckets()).filter(|bucket| table.chain(*bucket).contains(&node)).count()
        });
        let peer = self.peers.get(&node);
        let figures = peer.map(|peer| &peer.figures);
        let live = figures.map_or(0, |figures| figures.live.iter().map(|flows| u64::from(*flows)).sum());
        Some(UnitStatus {
            node,
            address: unit.address,
            role: unit.role,
            standing: unit.standing,
            connected: peer.is_some_and(|peer| peer.connection.is_some()),
            weight: unit.weight,
            buckets: newest.map_or(0, |table| table.count(node)),
            chained,
            live,
            load_percent: figures.map_or(0, |figures| figures.load_percent),
            second_hops: figures.map_or(0, |figures| figures.second_hops),
            packets: figures.map_or(0, |figures| figures.packets),
            blocks: self.state.blocks.iter().filter(|block| block.node == Some(node)).count(),
            drained: self.is_drained(node),
        })
    }
}
