//! Data planes that have copies of each other's flows: one dies under connections, or hands them over and leaves. Real TCP connections and
//! UDP associations through address translation, a firewall and virtual servers, every byte checked at both ends.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use serde_json::Value;
use testbed::cluster::{CLIENTS, LAN, SERVERS};
use testbed::traffic::churn::{Churn, client, server};

use crate::cluster_scene::{Cluster, Plan, nothing, unit};
use crate::machine::busy;

const PORT: u16 = 7_000;
const LISTEN: u16 = 8_000;
const PLANES: [u16; 3] = [11, 12, 13];
/// Long connections through each of the three services, and associations.
const LONG: usize = 240;
const UDP: usize = 20;
/// Time in which connections notice that they are broken: 3 s without what they wait for, after a pause of their own.
const NOTICE: Duration = Duration::from_secs(8);

fn virtual_server(protocol: &str, source: &str) -> String {
    format!(
        "[[virtual-server]]\nlisten = \"{protocol} {LAN}:{LISTEN}\"\nsource = \"{source}\"\n\
         backends = [\"{}:{PORT}\", \"{}:{PORT}\"]\n",
        SERVERS[2], SERVERS[3]
    )
}

fn services() -> String {
    format!(
        "[[nat]]\nout = \"wan\"\nfrom = [\"{}/32\"]\n\
         [[rule]]\nname = \"no strangers\"\naction = \"drop\"\nfrom = \"wan\"\n{}{}",
        CLIENTS[0],
        virtual_server("tcp", "none"),
        virtual_server("udp", "address-and-port")
    )
}

struct Scene {
    // Dropped in this order.
    traffic: Vec<Churn>,
    cluster: Cluster,
}

impl Scene {
    /// Three data planes and what goes through them.
    fn start(manager: &str) -> Self {
        let services = services();
        let plan = Plan { dispatchers: 2, data_planes: 3, services: &services, manager };
        // Where backends see their clients' own addresses dispatchers find the unit of their answers.
        let section = format!("{}[[peer]]", virtual_server("tcp", "none"));
        let edit = |id: u16, text: String| {
            if id == 2 || id == 3 { text.replacen("[[peer]]", &section, 1) } else { text }
        };
        let (cluster, ()) = Cluster::start(&plan, &PLANES, edit, nothing);
        cluster.join(&PLANES);
        let mut scene = Self { traffic: Vec::new(), cluster };
        let at = |address, port| SocketAddr::new(IpAddr::V4(address), port);
        let ways = [
            (at(SERVERS[0], PORT), &SERVERS[..1]),
            (at(SERVERS[1], PORT), &SERVERS[1..2]),
            (at(LAN, LISTEN), &SERVERS[2..]),
        ];
        for (place, (to, servers)) in ways.into_iter().enumerate() {
            let bed = &scene.cluster.bed;
            let servers = servers
                .iter()
                .map(|address| server::start(Some(&bed.server), at(*address, PORT)).unwrap())
                .collect();
            let options = client::Options {
                sources: vec![IpAddr::V4(CLIENTS[place])],
                long: LONG,
                pauses: 4,
                udp: UDP,
                ..client::Options::new(to, place as u64)
            };
            let client = client::start(Some(&bed.client), options).unwrap();
            scene.traffic.push(Churn { client, servers });
        }
        scene.cluster.until("all connections are open", |cluster| {
            let live: u64 = PLANES.iter().map(|node| cluster.unit(*node, "live_flows")).sum();
            (live >= 3 * (LONG + UDP) as u64).then_some(())
        });
        // They are older than what may be lost.
        std::thread::sleep(Duration::from_secs(3));
        assert_eq!(scene.broken(), 0, "before anything happened");
        scene
    }

    /// Broken connections and lost associations, seen by either side.
    fn broken(&self) -> u64 {
        let of = |traffic: &Churn| {
            let servers: u64 = traffic.servers.iter().map(|server| server.figures().broken).sum();
            let client = traffic.client.figures();
            client.broken.max(servers) + client.udp_lost
        };
        self.traffic.iter().map(of).sum()
    }

    /// Why connections broke, by service.
    fn causes(&self) -> String {
        let of = |traffic: &Churn| {
            let client = traffic.client.figures();
            format!("{:?}, {} associations", client.broken_by_cause, client.udp_lost)
        };
        self.traffic.iter().map(of).collect::<Vec<_>>().join("; ")
    }

    fn bytes_go_on(&self) {
        let gaps: Vec<f64> =
            self.traffic.iter().map(|traffic| traffic.client.figures().longest_gap_ms).collect();
        eprintln!("longest gaps {gaps:.0?} ms");
        let answered =
            || self.traffic.iter().map(|traffic| traffic.client.figures().udp_answered).collect::<Vec<_>>();
        let before = answered();
        std::thread::sleep(Duration::from_secs(1));
        assert!(before.iter().zip(answered()).all(|(before, after)| after > before + UDP as u64));
    }

    /// A part of a machine's word about copies.
    fn part(&self, node: u16, key: &str) -> Value {
        self.cluster.status_of(node)["cluster"]["copies"][key].clone()
    }

    /// One data plane dies; its flows, and what broke.
    fn kill(&mut self, node: u16) -> (u64, u64) {
        let flows = self.cluster.unit(node, "live_flows");
        self.cluster.bed.stop(node, true).unwrap();
        std::thread::sleep(NOTICE);
        (flows, self.broken())
    }
}

/// A data plane is killed under more than 200 connections. One that others have copies of breaks none of them; without copies all of them
/// break, and only they.
#[test]
fn d6_a_data_plane_dies_and_none_of_its_connections() {
    let _busy = busy();
    let mut scene = Scene::start("dead-after-ms = 600\n[flows]\nreplicate = true");
    let backup = scene.cluster.until("copies are complete", |_| scene.part(12, "at").as_u64());
    // The manager has heard so.
    std::thread::sleep(Duration::from_secs(2));
    assert!(scene.part(backup as u16, "kept").as_u64() > Some(200));
    let (flows, broken) = scene.kill(12);
    let inherited = scene.part(backup as u16, "inherited").as_u64().unwrap();
    eprintln!("replicated: unit 12 had {flows} flows, {broken} broke, unit {backup} inherited {inherited}");
    assert!(flows > 200, "{flows}");
    assert_eq!(broken, 0, "of {flows}: {}\n{}", scene.causes(), scene.cluster.events());
    assert!(inherited > 200, "{inherited}");
    scene.bytes_go_on();
    let status = scene.cluster.status();
    let share = |node| unit(&status, node).unwrap()["buckets"].as_u64().unwrap();
    assert_eq!([share(11), share(13)], [32_768; 2], "buckets are shared again");
    drop(scene);

    let mut scene = Scene::start("dead-after-ms = 600");
    assert!(scene.part(12, "at").is_null());
    let (flows, broken) = scene.kill(12);
    eprintln!("without copies: unit 12 had {flows} flows, {broken} broke");
    // Those that nothing translates go on without a record.
    assert!(flows > 200 && broken > 100 && broken <= flows, "{broken} of {flows}");
}

/// A data plane leaves at once, by handing its connections to another one: nobody notices, also not that its machine is switched off then.
#[test]
fn d6_a_data_plane_hands_its_connections_over_and_leaves() {
    let _busy = busy();
    let mut scene = Scene::start("");
    let flows = scene.cluster.unit(12, "live_flows");
    let began = Instant::now();
    scene.cluster.manage(&["drain", "12", "--migrate", "--remove", "--no-wait"]).unwrap();
    scene.cluster.until("it leaves", |cluster| {
        let status = cluster.status();
        unit(&status, 12).is_none_or(|unit| unit["standing"] == "free").then_some(())
    });
    let took = began.elapsed();
    let (_, broken) = scene.kill(12);
    let inherited: u64 = [11, 13].iter().map(|node| scene.part(*node, "inherited").as_u64().unwrap()).sum();
    eprintln!("unit 12 handed {inherited} of {flows} flows over and left in {took:?}, {broken} broke");
    assert_eq!(broken, 0, "{}\n{}", scene.causes(), scene.cluster.events());
    assert!(flows > 200 && inherited > 200, "{inherited} of {flows}");
    assert!(took < Duration::from_secs(20), "{took:?}");
    scene.bytes_go_on();
}
