//! The gateway: everything of a node that is not the tunnel, from interfaces over rules and NAT to virtual servers.
//!
//! [`policy`] makes of the configuration, the host's facts and [`overrides`] (what was changed by command) the policy that
//! the engine is to run; [`engine`] tells it so and asks for its state. `supervisor` does that whenever something changes:
//! [`addresses`] puts addresses on devices before, the health monitors follow after. [`nat_log`] writes who had which port.

pub mod addresses;
pub mod contradictions;
pub mod engine;
mod host_routes;
pub(crate) mod inner;
mod ipv6_router;
pub mod nat_log;
pub mod overrides;
mod own_services;
pub mod policy;
pub(crate) mod supervisor;

/// Policies of IPsec that are followed at most, of each family and direction.
pub(crate) use self::host_routes::RULES_MAX as IPSEC_MAX;
