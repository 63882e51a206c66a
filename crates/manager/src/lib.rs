//! The manager of a cluster (row D1): a process of its own, the only one with a runtime, HTTP and TLS.
//!
//! In the order in which a change passes:
//!
//! 1. [`config`]: where it listens and where it stores.
//! 2. [`api`]: REST, through which operators say what they want.
//! 3. [`actor`]: the thread that owns [`cluster::manager::Manager`], stores its state and then carries out what it says.
//! 4. [`store`]: the bytes on the disk, or in [`etcd`] for several managers of which one leads.
//! 5. [`units`]: the connections over which units are told; [`proofs`]: keys that they prove there.
//! 6. `hooks`: programs that start and stop machines.
//!
//! [`run`] joins them.

pub mod actor;
pub mod api;
pub mod config;
pub mod etcd;
mod hooks;
pub mod proofs;
pub mod store;
pub mod units;

use std::io::Write as _;
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use cluster::manager::State;
use tokio::net::{TcpListener, UdpSocket};

use actor::{Actor, Clock, Event, Events};
use config::{Config, StoreSettings};
use etcd::EtcdStore;
use store::{FileStore, Store};

/// The address inside the tunnel may come a moment after the start.
const BIND_PATIENCE: Duration = Duration::from_secs(30);
/// Bytes of a token that is made.
const TOKEN_BYTES: usize = 24;

/// Runs a manager until SIGINT or SIGTERM. `ready` is called when it listens.
///
/// # Errors
/// What it cannot have: the store, an address, a certificate.
pub fn run(config: &Config, ready: impl FnOnce(SocketAddr)) -> anyhow::Result<()> {
    let token = token(&config.token_file)?;
    let store: Box<dyn Store> = match &config.store {
        StoreSettings::File(path) => {
            let mut store = FileStore::open(path)?;
            // Nobody else can mend it: better no start than one without the cluster.
            if let Some(bytes) = store.load()? {
                State::decode(&bytes)
                    .with_context(|| format!("{} holds no state of a cluster", path.display()))?;
            }
            Box::new(store)
        }
        StoreSettings::Etcd(settings) => Box::new(EtcdStore::new(settings.clone())),
    };
    let clock = Clock::start();
    let (sender, receiver) = std::sync::mpsc::sync_channel(actor::EVENTS_MAX);
    let actor = Actor::new(config, store, clock, sender.clone());
    let thread =
        std::thread::Builder::new().name("manager".to_owned()).spawn(move || actor.run(&receiver))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let events = Events(sender);
    let result = runtime.block_on(serve(config, events.clone(), &token, clock, ready));
    // What is under way is stored; the next start goes on with it.
    let _ = events.0.send(Event::Stop);
    ensure!(thread.join().is_ok(), "the manager's thread panicked");
    result
}

async fn serve(
    config: &Config,
    events: Events,
    token: &str,
    clock: Clock,
    ready: impl FnOnce(SocketAddr),
) -> anyhow::Result<()> {
    let units = bind(config.bus).await?;
    let beats = UdpSocket::bind(config.bus).await;
    let beats = beats.with_context(|| format!("cannot take heartbeats on UDP {}", config.bus))?;
    tokio::spawn(units::beats(beats, events.clone(), clock));
    tokio::spawn(units::listen(units, events.clone(), clock));
    let router = api::router(events, token.into());
    let api = bind(config.api).await?;
    let address = api.local_addr()?;
    let listener = api.into_std()?;
    let service = router.into_make_service();
    let server: std::pin::Pin<Box<dyn Future<Output = std::io::Result<()>> + Send>> = match &config.tls {
        None => Box::pin(axum_server::from_tcp(listener)?.serve(service)),
        Some((certificate, key)) => {
            // An error says that there is one already, which does as well.
            let _ = rustls::crypto::ring::default_provider().install_default();
            let tls = axum_server::tls_rustls::RustlsConfig::from_pem_file(certificate, key).await;
            let tls = tls.with_context(|| {
                format!("{} and {} are no certificate with its key", certificate.display(), key.display())
            })?;
            Box::pin(axum_server::from_tcp_rustls(listener, tls)?.serve(service))
        }
    };
    ready(address);
    tracing::info!(bus = %config.bus, api = %address, "manager");
    if !config.settings.chains.keeps_flows() {
        tracing::warn!(chains = %config.settings.chains, "connections break at changes: only \"counted\" keeps all of them");
    }
    let mut interrupt = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt())?;
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::select! {
        result = server => result.context("REST ended")?,
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    Ok(())
}

/// Waits for an address that the tunnel is about to get.
async fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    let deadline = tokio::time::Instant::now() + BIND_PATIENCE;
    let mut told = false;
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => return Ok(listener),
            Err(error)
                if error.kind() == std::io::ErrorKind::AddrNotAvailable
                    && tokio::time::Instant::now() < deadline =>
            {
                if !std::mem::replace(&mut told, true) {
                    tracing::info!(%address, "waiting for this address; is the tunnel up?");
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            Err(error) => return Err(error).with_context(|| format!("cannot listen on {address}")),
        }
    }
}

/// The token of a file; made when there is none, readable by its owner alone.
fn token(path: &Path) -> anyhow::Result<String> {
    let shown = path.display();
    match std::fs::read_to_string(path) {
        Ok(text) => {
            let token = text.trim();
            ensure!(token.len() >= 16, "{shown}: a token has at least 16 characters");
            Ok(token.to_owned())
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let mut bytes = [0; TOKEN_BYTES];
            getrandom::fill(&mut bytes).map_err(|error| anyhow::anyhow!("no random numbers: {error}"))?;
            let token: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            let file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
            let mut file = file.with_context(|| format!("cannot make the token file {shown}"))?;
            writeln!(file, "{token}").with_context(|| format!("cannot write {shown}"))?;
            Ok(token)
        }
        Err(error) => Err(error).with_context(|| format!("cannot read the token file {shown}")),
    }
}
