//! The real program from end to end: gateways in network namespaces, real TCP and UDP through emulated links, every
//! byte verified. Each test names the row of the mission it shows.
//!
//! Run as root or as an ordinary user who may make user namespaces; where neither is allowed the tests fail and say
//! so.
#![allow(clippy::unwrap_used, reason = "tests")]

mod bad_input;
mod capture;
mod classes;
mod cli;
mod cluster;
mod cluster_load;
mod cluster_mtu;
mod cluster_scene;
mod cluster_trace;
mod cores;
mod demo;
mod demo_user;
mod dissector;
mod distribution;
mod download;
mod encryption;
mod ethernet;
mod gateway_clients;
mod gateway_cores;
mod gateway_devices;
mod gateway_failures;
mod gateway_floods;
mod gateway_forward;
mod gateway_fragments;
mod gateway_health;
mod gateway_host;
mod gateway_moments;
mod gateway_nat;
mod gateway_quic;
mod gateway_raw;
mod gateway_reload;
mod gateway_restart;
mod gateway_routes;
mod gateway_rules;
mod gateway_scene;
mod gateway_servers;
mod gateway_tunnel;
mod gateway_vrrp;
mod handoffs;
mod host_checks;
mod host_daemons;
mod host_networks;
mod host_traffic;
mod hubs;
mod loss;
mod managers;
mod mtu;
mod names;
mod operator;
mod paths;
mod program;
mod reload;
mod scene;
mod steering;
mod takeover;
mod talk;
mod tls_path;
mod tunnel_cores;
mod wan_properties;
mod wans;
mod web;
