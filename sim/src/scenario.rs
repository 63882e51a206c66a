//! The usual topologies.

use crate::link::Link;
use crate::world::World;

/// Wall clock of a site whose clock is right, ns since 1970 (some day in 2026).
pub const WALL_CLOCK_NS: u64 = 1_790_000_000_000_000_000;

/// Site 0 dials site 1 over one cable for each link, each between WANs of their own. Not started.
///
/// Cable n joins WAN n of site 0 with WAN n of site 1; both directions are alike.
pub fn pair(seed: u64, cores: (u8, u8), links: &[Link]) -> World {
    let mut world = World::new(seed);
    let (a, b) = (world.site(cores.0, WALL_CLOCK_NS), world.site(cores.1, WALL_CLOCK_NS));
    for link in links {
        let ends = ((a, world.wan(a, 1_500)), (b, world.wan(b, 1_500)));
        world.cable(ends.0, ends.1, link.clone(), link.clone());
    }
    world.peer(a, b);
    world
}

/// Like [`pair`], but site 1 has one WAN with one address, as a hub in a data centre.
pub fn to_hub(seed: u64, cores: (u8, u8), links: &[Link]) -> World {
    let mut world = World::new(seed);
    let (a, b) = (world.site(cores.0, WALL_CLOCK_NS), world.site(cores.1, WALL_CLOCK_NS));
    let hub = world.wan(b, 1_500);
    for link in links {
        let wan = world.wan(a, 1_500);
        world.cable((a, wan), (b, hub), link.clone(), link.clone());
    }
    world.peer(a, b);
    world
}

/// Site 0 is a hub with one WAN; every other site dials it over `links`.
pub fn star(seed: u64, hub_cores: u8, spokes: usize, spoke_cores: u8, links: &[Link]) -> World {
    let mut world = World::new(seed);
    let hub = world.site(hub_cores, WALL_CLOCK_NS);
    let wan = world.wan(hub, 1_500);
    for _ in 0..spokes {
        let spoke = world.site(spoke_cores, WALL_CLOCK_NS);
        for link in links {
            let own = world.wan(spoke, 1_500);
            world.cable((spoke, own), (hub, wan), link.clone(), link.clone());
        }
        world.peer(spoke, hub);
    }
    world
}
