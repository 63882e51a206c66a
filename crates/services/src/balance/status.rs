//! Status of virtual servers, as `status` shows it.

use std::net::SocketAddr;
use std::sync::atomic::Ordering::Relaxed;

use super::compile::Server;
use super::state::TENTHS;
use crate::spec::BalanceMethod;

/// One virtual server.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct ServerStatus {
    /// Name.
    pub name: String,
    /// IP protocol: 6 or 17.
    pub protocol: u8,
    /// Address and port that clients use.
    pub listen: SocketAddr,
    /// How it chooses.
    pub method: BalanceMethod,
    /// Live connections.
    pub live: u32,
    /// Connections since the start.
    pub total: u64,
    /// Connections refused since the start: no backend that takes any, or no room.
    pub refused: u64,
    /// Live connections at most; 0 = no limit.
    pub connections_max: u32,
    /// Its backends in the order of the configuration.
    pub backends: Vec<BackendStatus>,
}

/// One backend.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct BackendStatus {
    /// Its id.
    pub id: u16,
    /// Address and port.
    pub address: SocketAddr,
    /// Weight, as configured or set while running.
    pub weight: u16,
    /// Weight that counts now, to a tenth: less during a slow start, 0 when it takes no new connections.
    pub effective_weight: f64,
    /// Whether its monitor calls it up; true without one.
    pub up: bool,
    /// No new connections by the operator's wish.
    pub draining: bool,
    /// How long its connections may still last, s, rounded up; `None`: it does not drain, or there is no limit.
    pub drain_left_s: Option<u32>,
    /// Live connections.
    pub live: u32,
    /// Connections that are over and still remembered for what comes late.
    pub over: u32,
    /// Connections since the start.
    pub total: u64,
    /// Live connections at most; 0 = no limit.
    pub connections_max: u32,
    /// How often it went down.
    pub failures: u64,
}

/// The status of a server.
pub fn of(server: &Server, now_ns: u64) -> ServerStatus {
    let backends = server.backends.iter().zip(server.tenths(now_ns)).map(|(backend, tenths)| BackendStatus {
        id: backend.state.id,
        address: backend.state.address,
        weight: backend.state.weight(backend.weight),
        effective_weight: f64::from(tenths) / f64::from(TENTHS),
        up: backend.state.is_up(),
        draining: backend.state.is_draining(backend.weight),
        drain_left_s: (backend.state.drain_left_ns(backend.weight, backend.drain_s, now_ns))
            .map(|left_ns| left_ns.div_ceil(1_000_000_000) as u32),
        live: backend.state.count.live(),
        over: backend.state.count.held().saturating_sub(backend.state.count.live()),
        total: backend.state.count.total(),
        connections_max: backend.connections_max,
        failures: backend.state.failures(),
    });
    ServerStatus {
        name: server.state.name.clone(),
        protocol: server.protocol,
        listen: server.listen,
        method: server.method,
        live: server.state.count.live(),
        total: server.state.count.total(),
        refused: server.state.refused.load(Relaxed),
        connections_max: server.connections_max,
        backends: backends.collect(),
    }
}
