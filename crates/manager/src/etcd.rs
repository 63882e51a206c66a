//! The store on etcd 3.4 or later, for several managers of which one leads.
//!
//! * The leader holds the key `PREFIX/leader`, which hangs on a lease: if the manager does not keep it alive, etcd removes the key
//!   and another manager makes it anew. The *term* is the key's create revision. etcd's revisions only grow, so terms do.
//! * Every write of the state is a transaction that succeeds only while the leader key has that create revision: a manager
//!   that was stopped for a while, or cut off, and does not know that another one leads, can write nothing (fencing). What it
//!   would send to units follows a write, and units turn away managers of an older term.
//! * It succeeds only while the state is the one that this manager wrote or read last, too: a write that was under way for long (a member
//!   of etcd that hung) would else put an older state over a newer one of the same term.
//! * A leader that has not heard from etcd for the lease's time, less a margin, stops by itself. That time is measured from
//!   before the request by a clock that only goes forward and goes on while the machine sleeps: setting the wall clock
//!   changes nothing.
//!
//! It speaks to etcd's JSON gateway (`/v3/…`, part of every etcd): one HTTP client for all, no code that is generated.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, anyhow, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};

use crate::store::{SaveError, Store};

/// Time for one request.
const PATIENCE: Duration = Duration::from_secs(2);
/// Largest answer: a state and some words around it.
const ANSWER_BYTES_MAX: u64 = 16 << 20;
/// Times that a write is tried over earlier ones of our own.
const SAVE_TRIES: usize = 4;
/// Share of the lease's time after which a leader that has not kept it alive stops: the rest is for clocks that differ.
const SAFE_PERCENT: u64 = 80;

/// Where and as whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EtcdSettings {
    /// `http://127.0.0.1:2379`, members of one etcd cluster.
    pub endpoints: Vec<String>,
    /// In front of all keys, without a slash at its end.
    pub prefix: String,
    /// Time of the lease, seconds; etcd gives at least two.
    pub lease_s: u64,
    /// Name of this manager, as others are told it.
    pub name: String,
}

/// The store.
pub struct EtcdStore {
    client: Client,
    settings: EtcdSettings,
    lead: Option<Lead>,
    /// Who leads, if it is another one.
    leader: Option<String>,
    /// Modification revision of the state that was written or read last; 0: there is none.
    state_revision: u64,
}

/// Leadership, while its thread keeps the lease alive.
struct Lead {
    lease: String,
    term: u64,
    until_ns: Arc<Mutex<u64>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl EtcdStore {
    /// A store that has asked nobody yet.
    #[must_use]
    pub fn new(settings: EtcdSettings) -> Self {
        Self {
            client: Client::new(settings.endpoints.clone()),
            settings,
            lead: None,
            leader: None,
            state_revision: 0,
        }
    }

    fn key(&self, name: &str) -> String {
        BASE64.encode(format!("{}/{name}", self.settings.prefix))
    }

    /// Makes the leader's key if there is none; the term.
    fn claim(&mut self, lease: &str) -> anyhow::Result<Option<u64>> {
        let key = self.key("leader");
        let none = json!({ "key": key, "target": "CREATE", "result": "EQUAL", "create_revision": "0" });
        let make = json!({ "request_put": { "key": key, "value": BASE64.encode(&self.settings.name), "lease": lease } });
        let look = json!({ "request_range": { "key": key } });
        let request = json!({ "compare": [none], "success": [make], "failure": [look] });
        let answer = self.client.call("/v3/kv/txn", &request)?;
        if answer["succeeded"] == true {
            let revision = number(&answer["header"]["revision"]).context("etcd's answer has no revision")?;
            return Ok(Some(revision));
        }
        let value = &answer["responses"][0]["response_range"]["kvs"][0]["value"];
        self.leader = value
            .as_str()
            .and_then(|text| BASE64.decode(text).ok())
            .map(|name| String::from_utf8_lossy(&name).into_owned());
        Ok(None)
    }
}

impl Store for EtcdStore {
    fn campaign(&mut self) -> anyhow::Result<Option<u64>> {
        self.lead = None;
        let before_ns = now_ns();
        let granted = self.client.call("/v3/lease/grant", &json!({ "TTL": self.settings.lease_s }))?;
        let lease = granted["ID"].as_str().context("etcd gave no lease")?.to_owned();
        let seconds = number(&granted["TTL"]).context("etcd gave a lease without time")?;
        let claimed = self.claim(&lease);
        let Ok(Some(term)) = claimed else {
            // Not needed; it would end by itself.
            let _ = self.client.call("/v3/lease/revoke", &json!({ "ID": lease }));
            return claimed;
        };
        self.leader = None;
        let until_ns = Arc::new(Mutex::new(before_ns + safe_ns(seconds)));
        let stop = Arc::new(AtomicBool::new(false));
        let thread = {
            let (client, lease) = (self.client.clone(), lease.clone());
            let (until_ns, stop) = (Arc::clone(&until_ns), Arc::clone(&stop));
            std::thread::Builder::new()
                .name("lease".to_owned())
                .spawn(move || keep_alive(client, &lease, seconds, &until_ns, &stop))?
        };
        self.lead = Some(Lead { lease, term, until_ns, stop, thread: Some(thread) });
        Ok(Some(term))
    }

    fn leads(&self) -> bool {
        self.lead.as_ref().is_some_and(|lead| now_ns() < *lock(&lead.until_ns))
    }

    fn leader(&self) -> Option<&str> {
        self.leader.as_deref()
    }

    fn load(&mut self) -> anyhow::Result<Option<Vec<u8>>> {
        let answer = self.client.call("/v3/kv/range", &json!({ "key": self.key("state") }))?;
        let stored = Stored::of(&answer)?;
        self.state_revision = stored.revision;
        Ok(stored.value)
    }

    fn save(&mut self, state: &[u8]) -> Result<(), SaveError> {
        // Those of our own writes that were thought to have failed may come in between.
        for _ in 0..SAVE_TRIES {
            let Some(term) = self.lead.as_ref().map(|lead| lead.term) else { return Err(SaveError::Lost) };
            match self.write(term, state).map_err(SaveError::Failed)? {
                Written::Now => return Ok(()),
                Written::NotLeading => {
                    self.lead = None;
                    return Err(SaveError::Lost);
                }
                Written::Over(stored) => {
                    self.state_revision = stored.revision;
                    if stored.value.as_deref() == Some(state) {
                        return Ok(());
                    }
                }
            }
        }
        Err(SaveError::Failed(anyhow!("earlier writes of the state come in between")))
    }
}

impl EtcdStore {
    /// Writes the state if this term is still the leader's, over the state that is known.
    fn write(&mut self, term: u64, state: &[u8]) -> anyhow::Result<Written> {
        let (leader, key) = (self.key("leader"), self.key("state"));
        let mine = json!({
            "key": leader, "target": "CREATE", "result": "EQUAL", "create_revision": term.to_string(),
        });
        let known = json!({
            "key": key, "target": "MOD", "result": "EQUAL", "mod_revision": self.state_revision.to_string(),
        });
        let put = json!({ "request_put": { "key": key, "value": BASE64.encode(state) } });
        let look = |key| json!({ "request_range": { "key": key } });
        let request =
            json!({ "compare": [mine, known], "success": [put], "failure": [look(&leader), look(&key)] });
        let answer = match self.client.call("/v3/kv/txn", &request) {
            Ok(answer) => answer,
            Err(error) => {
                // It may have been written all the same: the answer was lost, or it was the last one that found room.
                let known = self.state_revision;
                if self.load().is_ok_and(|stored| stored.as_deref() == Some(state)) {
                    return Ok(Written::Now);
                }
                self.state_revision = known;
                return Err(error);
            }
        };
        if answer["succeeded"] == true {
            self.state_revision =
                number(&answer["header"]["revision"]).context("etcd's answer has no revision")?;
            return Ok(Written::Now);
        }
        let found = |place: usize| &answer["responses"][place]["response_range"];
        if number(&found(0)["kvs"][0]["create_revision"]) != Some(term) {
            return Ok(Written::NotLeading);
        }
        Ok(Written::Over(Stored::of(found(1))?))
    }
}

/// A state as etcd has it.
struct Stored {
    value: Option<Vec<u8>>,
    revision: u64,
}

impl Stored {
    fn of(range: &Value) -> anyhow::Result<Self> {
        let found = &range["kvs"][0];
        let Some(value) = found["value"].as_str() else { return Ok(Self { value: None, revision: 0 }) };
        let value = BASE64.decode(value).context("etcd's value is no base64")?;
        let revision = number(&found["mod_revision"]).context("etcd's answer has no revision")?;
        Ok(Self { value: Some(value), revision })
    }
}

/// Answer of etcd to a write.
enum Written {
    Now,
    /// Another manager has the leader's key, or nobody.
    NotLeading,
    /// There is another state than was known: an earlier write of ours.
    Over(Stored),
}

impl Drop for Lead {
    /// The lease ends by itself.
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}

impl Drop for EtcdStore {
    /// Another manager leads at once.
    fn drop(&mut self) {
        if let Some(lead) = self.lead.take()
            && let Err(error) = self.client.call("/v3/lease/revoke", &json!({ "ID": lead.lease }))
        {
            tracing::warn!(%error, "the lease ends by itself");
        }
    }
}

/// Keeps a lease alive until it is told to stop, or the lease has ended.
fn keep_alive(mut client: Client, lease: &str, seconds: u64, until_ns: &Mutex<u64>, stop: &AtomicBool) {
    // Four times in the time of a lease: some may be lost.
    let pause = Duration::from_millis(seconds * 1_000 / 4);
    loop {
        std::thread::park_timeout(pause);
        if stop.load(Relaxed) {
            return;
        }
        let before_ns = now_ns();
        match client.call("/v3/lease/keepalive", &json!({ "ID": lease })) {
            Ok(answer) => match number(&answer["result"]["TTL"]) {
                Some(seconds) if seconds > 0 => *lock(until_ns) = before_ns + safe_ns(seconds),
                _ => {
                    *lock(until_ns) = 0;
                    return;
                }
            },
            Err(error) => tracing::warn!(%error, "the lease is not kept alive"),
        }
    }
}

fn safe_ns(seconds: u64) -> u64 {
    seconds.saturating_mul(SAFE_PERCENT * 10_000_000)
}

/// Nanoseconds since the machine was started, its sleep included.
fn now_ns() -> u64 {
    linux::clock::boottime_ns()
}

fn lock(value: &Mutex<u64>) -> std::sync::MutexGuard<'_, u64> {
    value.lock().unwrap_or_else(PoisonError::into_inner)
}

/// etcd's JSON writes 64-bit numbers as texts.
fn number(value: &Value) -> Option<u64> {
    value.as_u64().or_else(|| value.as_str()?.parse().ok())
}

/// HTTP to the members, the one that answered last first.
#[derive(Clone)]
struct Client {
    agent: ureq::Agent,
    endpoints: Vec<String>,
}

impl Client {
    fn new(endpoints: Vec<String>) -> Self {
        let config = ureq::Agent::config_builder().timeout_global(Some(PATIENCE)).http_status_as_error(false);
        // The members are near: no proxy of the environment leads to them.
        let config = config.proxy(None).build();
        Self { agent: config.into(), endpoints }
    }

    /// Asks one member after the other until one does it. Everything that is asked may be done twice: who had no answer to a
    /// claim finds the key made, and gives its lease back.
    fn call(&mut self, path: &str, body: &Value) -> anyhow::Result<Value> {
        let mut failed: Option<anyhow::Error> = None;
        for place in 0..self.endpoints.len() {
            let Some(endpoint) = self.endpoints.get(place).cloned() else { break };
            match self.ask(&endpoint, path, body) {
                Ok(answer) => {
                    self.endpoints.swap(0, place);
                    return Ok(answer);
                }
                // What a member says is told rather than that others cannot be reached.
                Err(error) if failed.is_none() || !error.is::<ureq::Error>() => {
                    failed = Some(error.context(format!("etcd at {endpoint}")));
                }
                Err(_) => {}
            }
        }
        Err(failed.unwrap_or_else(|| anyhow!("no etcd is configured")))
    }

    fn ask(&self, endpoint: &str, path: &str, body: &Value) -> anyhow::Result<Value> {
        let mut response = self.agent.post(format!("{endpoint}{path}")).send_json(body)?;
        let status = response.status();
        let text = response.body_mut().with_config().limit(ANSWER_BYTES_MAX).read_to_string()?;
        let answer: Value =
            serde_json::from_str(text.trim()).with_context(|| format!("{status}: no JSON"))?;
        let said = answer["message"].as_str().or_else(|| answer["error"].as_str()).unwrap_or(&text);
        ensure!(status.is_success(), "{said} ({status})");
        Ok(answer)
    }
}
