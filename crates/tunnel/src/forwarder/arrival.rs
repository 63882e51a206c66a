//! Knowledge that an authenticated datagram gives of its path: it lives, and where the peer is.

use super::Output;
use super::receive::Context;
use super::transmit::PathTx;
use crate::bond::Bond;
use crate::header::Header;
use crate::path::Route;

/// Whose old address was heard so lately has not moved: a NAT may show each of a peer's sockets with an address of its own.
const STAYS_NS: u64 = 5_000_000;

/// Whether a datagram came over another path than its lane's, as repeats and copies do.
pub(super) fn came_over_another<O: Output>(
    cx: &Context<'_, O>,
    path_at: Option<usize>,
    header: &Header,
) -> bool {
    if let Some((_, path)) = cx.source.socket {
        return path != header.path;
    }
    let comes_by = |tx: &PathTx| {
        let route = tx.path.route();
        route.wan == cx.source.wan && route.remote.ip() == cx.source.remote.ip()
    };
    let own = path_at.and_then(|at| cx.tx.paths.get(at));
    own.is_none_or(|own| !comes_by(own))
        && cx.tx.paths.iter().any(|tx| tx.path.id != header.path && comes_by(tx))
}

/// The newest datagram of a lane tells that the path lives and, to a listener, where the peer is.
pub(super) fn note_arrival<O: Output>(cx: &mut Context<'_, O>, bond: &Bond, path_at: usize, header: &Header) {
    let (now, source) = (cx.now, *cx.source);
    let route = cx.tx.paths[path_at].path.route();
    if bond.dialer {
        // A repeat came over another path's socket: it says nothing about this one.
        if source.socket.is_none_or(|(_, path)| path == header.path) {
            cx.tx.paths[path_at].path.note_heard(now, source.hops);
        }
        return;
    }
    let known_elsewhere = |tx: &PathTx| {
        tx.path.id != header.path
            && tx.path.route().remote.ip() == source.remote.ip()
            && tx.path.route().wan == source.wan
    };
    if route.remote.ip() == source.remote.ip() && route.wan == source.wan {
        let tx = &mut cx.tx.paths[path_at];
        tx.path.note_heard(now, source.hops);
        let core = usize::from(header.sending_core);
        if tx.tuples.len() <= core {
            tx.tuples.resize(core + 1, None);
        }
        if route.remote != source.remote && !tx.path.usable() {
            // A NAT gave the path another port while it was away: whatever was learned before is stale.
            tx.path.set_route(Route { remote: source.remote, ..route });
        }
        tx.tuples[core] = Some((tx.path.route_version(), source.remote));
        tx.newest_tuple = tx.tuples[core];
    } else if !cx.tx.paths[path_at].path.heard_within(now, STAYS_NS)
        && !cx.tx.paths.iter().any(known_elsewhere)
    {
        cx.node.on_moved(now, bond, header.path, &source);
    }
}
