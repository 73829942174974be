//! Tells a control plane of the engines beside us, again and again, so that others find them: what we say counts for a lease.
//!
//! Only engines that are written (in flags, or in the bootstrap) are told: those that a control plane puts beside us it knows.

use super::{
    Shared,
    control_plane::{Backoff, at, in_cluster},
};
use crate::engines;
use futures_util::StreamExt;
use outrigger_filters::{end_address::EndAddress, services::is_loopback};
use outrigger_xds::{
    ads::Server,
    feed::{FeedBody, FeedSource},
    registry::{
        ENGINES_MAX, Engine, MODELS_MAX, Node, Registration, RegistryError, RegistryStream,
        TEXT_BYTES_MAX, open,
    },
    report::{EngineId, EngineState, Health, Model, Role},
    resource::{bootstrap::Bootstrap, endpoint::Address, listener::TrafficDirection},
};
use rand::Rng;
use std::{collections::BTreeMap, net::IpAddr, sync::Arc, time::Duration};
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};

/// How long an attempt may take, to the answer; of a short lease a part, see [`Registering::limit`].
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long it is waited until all engines said how they are. Who registers before says that it serves nothing.
const STATES_TIMEOUT: Duration = Duration::from_secs(10);
/// Shortest time between two renewals.
const RENEW_MIN: Duration = Duration::from_millis(100);
/// What a lease is taken for before one was given.
const LEASE_GUESS: Duration = Duration::from_secs(30);
/// How long the end waits until the control plane knows of it.
pub(super) const FAREWELL: Duration = Duration::from_secs(1);
/// After our own feed ended.
const FEED_PAUSE: Duration = Duration::from_secs(1);

/// Where we register, and what of that configuration does not say.
#[derive(Debug, Clone)]
pub struct Registrar {
    /// The control plane.
    pub server: Registry,
    /// Where others reach us; none is where our inbound listener is.
    pub advertise: Option<Address>,
    /// To be chosen by.
    pub labels: BTreeMap<String, String>,
}

/// A control plane where engines are registered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Registry {
    /// In plain text.
    Address(Address),
    /// An endpoint of a cluster of the bootstrap, secured as that says.
    Cluster {
        /// Its name.
        name: String,
        /// `:authority`; empty is the cluster's name.
        authority: String,
    },
}

impl Registry {
    /// Where it is, or the first of it.
    fn address<'a>(&'a self, written: &'a Bootstrap) -> Result<&'a Address, String> {
        match self {
            Self::Address(address) => Ok(address),
            Self::Cluster { name, .. } => {
                let mut clusters = written.clusters.iter();
                let cluster = clusters.find(|cluster| cluster.name == *name);
                let endpoint = cluster.and_then(|it| it.load_assignment.endpoints.first());
                endpoint.map(|endpoint| &endpoint.address).ok_or_else(|| {
                    format!("registering: no endpoint is written of a cluster '{name}'")
                })
            }
        }
    }

    /// All of it, in order.
    fn servers(&self, shared: &Shared) -> Vec<Server> {
        match self {
            Self::Address(address) => vec![at(address)],
            Self::Cluster { name, authority } => in_cluster(shared, name, authority),
        }
    }
}

/// What is known of the engines beside us.
type States = BTreeMap<EngineId, EngineState>;

/// Begins to register; nothing happens if no engine is written. Dropping `done` says that it is over.
///
/// # Errors
/// Nobody could reach us at the address that would be told.
pub(super) fn start(
    shared: &Arc<Shared>,
    registrar: Option<Registrar>,
    done: std::sync::mpsc::Sender<()>,
) -> Result<(), String> {
    let Some(registrar) = registrar else {
        return Ok(());
    };
    if engines::configured(&shared.bootstrap.load().clusters)
        .0
        .is_empty()
    {
        tracing::info!("no engine stands beside this proxy: it does not register");
        return Ok(());
    }
    let node = node(shared, &registrar)?;
    let (told, states) = watch::channel(States::new());
    shared.runtime.spawn(hear(shared.clone(), told));
    let registering = Registering {
        shared: shared.clone(),
        registry: registrar.server,
        at: 0,
        node,
        states,
        lease: LEASE_GUESS,
        until: None,
    };
    shared.runtime.spawn(async move {
        registering.run().await;
        drop(done);
    });
    Ok(())
}

fn node(shared: &Shared, registrar: &Registrar) -> Result<Node, String> {
    let written = shared.bootstrap.load();
    registrar.server.address(&written)?;
    let address = match &registrar.advertise {
        Some(address) => address.clone(),
        None => inbound(shared, registrar.server.address(&written)?)?,
    };
    let [region, zone, _] = written.node.locality.clone();
    Ok(Node {
        id: written.node.id.clone(),
        cluster: written.node.cluster.clone(),
        region,
        zone,
        address,
        labels: registrar.labels.clone(),
    })
}

/// Where the first inbound listener really is.
fn inbound(shared: &Shared, server: &Address) -> Result<Address, String> {
    let written = shared.bootstrap.load();
    let mut listeners = written.listeners.iter();
    let is_inbound = |direction: TrafficDirection| direction == TrafficDirection::Inbound;
    let listener = listeners.find(|it| is_inbound(it.traffic_direction));
    let listener = listener.ok_or("registering: there is no inbound listener, give --advertise")?;
    let bound = shared.listeners.addresses().remove(&listener.name);
    match bound {
        Some(EndAddress::Ip(at)) if is_for_others(at.ip(), server) => Ok(Address {
            host: at.ip().to_string(),
            port: at.port(),
        }),
        _ => Err(format!(
            "registering: others cannot reach the listener '{}' at the address that it binds, give --advertise",
            listener.name
        )),
    }
}

/// Whether whoever hears of an address from this control plane can reach us there: of loopback, only who is on our machine.
fn is_for_others(ip: IpAddr, server: &Address) -> bool {
    !ip.is_unspecified() && (!ip.is_loopback() || is_loopback(&server.host))
}

/// Follows what peers are told of our engines, for as long as the process lives.
async fn hear(shared: Arc<Shared>, told: watch::Sender<States>) {
    loop {
        let mut messages = shared.local.subscribe();
        while let Some(message) = messages.next().await {
            told.send_if_modified(|states| match message.body {
                FeedBody::State(state) => take(states, message.engine, state),
                FeedBody::Gone => states.remove(&message.engine).is_some(),
                FeedBody::Load(_) | FeedBody::Snapshot(_) | FeedBody::Changes(_) => false,
            });
        }
        sleep(FEED_PAUSE).await;
    }
}

/// Whether a state is news. One that does not answer serves what it did: it is no other engine for that.
fn take(states: &mut States, engine: EngineId, mut state: EngineState) -> bool {
    let known = states.get(&engine);
    if let Some(known) = known.filter(|_| {
        state.models.is_empty() && matches!(state.health, Health::Dead | Health::Unknown)
    }) {
        state.models.clone_from(&known.models);
        state.version.clone_from(&known.version);
        (state.kind, state.role) = (known.kind, known.role);
    }
    let is_news = known != Some(&state);
    states.insert(engine, state);
    is_news
}

/// What fits of a text.
fn cut(text: &str) -> String {
    let said = text.chars().filter(|letter| !letter.is_control());
    let mut cut: String = said.collect();
    cut.truncate(cut.floor_char_boundary(TEXT_BYTES_MAX));
    cut
}

fn engine(
    id: &EngineId,
    written: &engines::ConfiguredEngine,
    (known, is_left): (Option<&EngineState>, bool),
) -> Engine {
    let role = match written.role.as_str() {
        "prefill" => Some(Role::Prefill),
        "decode" => Some(Role::Decode),
        _ => None,
    };
    let known = known.cloned().unwrap_or_default();
    let models = known.models.into_iter().map(|model| Model {
        id: cut(&model.id),
        ..Model::default()
    });
    Engine {
        id: id.to_string(),
        address: written.address.clone(),
        state: EngineState {
            kind: known.kind,
            version: cut(&known.version),
            models: models.take(MODELS_MAX).collect(),
            role: role.unwrap_or(known.role),
            // It stays so when it is stopped: else it would be for others again, and dead.
            health: if is_left {
                Health::Draining
            } else {
                known.health
            },
            reason: cut(&known.reason),
            block_tokens: known.block_tokens,
            kv_blocks: known.kv_blocks,
            ..EngineState::default()
        },
    }
}

fn count(result: &'static str) {
    metrics::counter!("outrigger_registrations_total", "result" => result).increment(1);
}

/// What is said, answered in time.
async fn within<T>(
    limit: Duration,
    said: impl Future<Output = Result<T, RegistryError>>,
) -> Result<T, RegistryError> {
    let late = |_| RegistryError::Broken(format!("no answer within {limit:?}"));
    timeout(limit, said).await.map_err(late)?
}

/// Whether all these engines said how they are.
fn are_told(engines: &BTreeMap<EngineId, engines::ConfiguredEngine>, states: &States) -> bool {
    let mut ids = engines.keys();
    ids.all(|id| {
        let state = states.get(id);
        state.is_some_and(|it| !it.models.is_empty() || it.health != Health::Unknown)
    })
}

struct Registering {
    shared: Arc<Shared>,
    registry: Registry,
    /// Which server is asked: the one that gave a lease, or the next after one that did not.
    at: usize,
    node: Node,
    states: watch::Receiver<States>,
    /// The last one that was given.
    lease: Duration,
    /// When it is over, if one was.
    until: Option<Instant>,
}

impl Registering {
    fn registration(&mut self) -> Registration {
        let (configured, _) = engines::configured(&self.shared.bootstrap.load().clusters);
        let states = self.states.borrow_and_update();
        let engines = configured.iter().take(ENGINES_MAX);
        Registration {
            node: self.node.clone(),
            engines: engines
                .map(|(id, written)| {
                    let is_left = self.shared.local.is_left(id);
                    engine(id, written, (states.get(id), is_left))
                })
                .collect(),
            leaving: false,
        }
    }

    /// Until all engines said how they are, or that takes too long.
    async fn told(&mut self) {
        let (configured, _) = engines::configured(&self.shared.bootstrap.load().clusters);
        let told = self.states.wait_for(|states| are_told(&configured, states));
        // Those that say nothing are told as they are.
        let _ = timeout(STATES_TIMEOUT, told).await;
    }

    /// How long an attempt may take.
    fn limit(&self) -> Duration {
        (self.lease / 6).clamp(RENEW_MIN, ATTEMPT_TIMEOUT)
    }

    /// Longest pause after an attempt. While a lease runs, two more fit into it after a renewal at a third of it that failed: 1/3 and
    /// three times 1/6 for attempts, two times 1/12 for pauses. Later nothing is lost any more, but a control plane that was away gives
    /// whom it knew a whole lease to come back in.
    fn pause_max(&self) -> Duration {
        let runs = self.until.is_some_and(|until| Instant::now() < until);
        self.lease / if runs { 12 } else { 3 }
    }

    /// Until the process drains; then says that it goes.
    async fn run(mut self) {
        let drain = self.shared.drain.clone();
        let mut backoff = Backoff::new();
        tokio::select! {
            () = self.told() => {}
            () = drain.begun() => return self.leave(None).await,
        }
        loop {
            metrics::gauge!("outrigger_registered").set(0.0);
            let mut was_taken = false;
            let held = self.hold(&mut was_taken).await;
            metrics::gauge!("outrigger_registered").set(0.0);
            let error = match held {
                Ok(stream) => return self.leave(Some(stream)).await,
                Err(error) => error,
            };
            if was_taken {
                backoff = Backoff::new();
            } else if !self.registry.servers(&self.shared).is_empty() {
                self.at = self.at.wrapping_add(1);
            }
            count(match error {
                RegistryError::Refused(_) => "refused",
                RegistryError::Broken(_) => "broken",
            });
            let registry = &self.registry;
            tracing::warn!(?registry, %error, "not registered at the control plane: the next attempt comes soon");
            let pause = backoff.pause().min(self.pause_max());
            tokio::select! {
                () = sleep(pause) => {}
                () = drain.begun() => return self.leave(None).await,
            }
        }
    }

    fn server(&self) -> Result<Server, RegistryError> {
        let mut servers = self.registry.servers(&self.shared);
        if servers.is_empty() {
            let none = "its cluster waits for something, or has no endpoint";
            return Err(RegistryError::Broken(none.into()));
        }
        let at = self.at % servers.len();
        Ok(servers.swap_remove(at))
    }

    /// Holds a lease until the process drains; the stream is what is left of it.
    async fn hold(&mut self, was_taken: &mut bool) -> Result<RegistryStream, RegistryError> {
        let drain = self.shared.drain.clone();
        let server = self.server()?;
        let mut said = self.registration();
        let mut asked = Instant::now();
        let opening = async {
            let mut stream = open(&server, &said).await?;
            let lease = stream.lease().await?;
            Ok((stream, lease))
        };
        let (mut stream, mut lease) = within(self.limit(), opening).await?;
        loop {
            self.lease = lease;
            self.until = Some(asked + lease);
            count("taken");
            metrics::gauge!("outrigger_registered").set(1.0);
            if !std::mem::replace(was_taken, true) {
                let (server, lease) = (&server.authority, self.lease);
                tracing::info!(server, ?lease, "registered at the control plane");
            }
            // Not all at once.
            let share = rand::rng().random_range(0.8..1.0);
            let renewal = sleep((self.lease / 3).mul_f64(share).max(RENEW_MIN));
            tokio::pin!(renewal);
            loop {
                tokio::select! {
                    () = &mut renewal => break,
                    Ok(()) = self.states.changed() => {
                        if self.registration() != said {
                            break;
                        }
                    }
                    unasked = stream.lease() => drop(unasked?),
                    () = drain.begun() => return Ok(stream),
                }
            }
            said = self.registration();
            asked = Instant::now();
            let renewing = async {
                stream.say(&said).await?;
                stream.lease().await
            };
            lease = within(self.limit(), renewing).await?;
        }
    }

    /// Says that we go, on the stream that is open or on a new one.
    async fn leave(&mut self, stream: Option<RegistryStream>) {
        let leaving = Registration {
            node: self.node.clone(),
            engines: Vec::new(),
            leaving: true,
        };
        let leaving = async {
            let mut stream = match stream {
                None => open(&self.server()?, &leaving).await?,
                Some(mut stream) => {
                    stream.say(&leaving).await?;
                    stream
                }
            };
            stream.lease().await
        };
        match timeout(FAREWELL, leaving).await {
            Ok(Ok(_)) => tracing::info!("the control plane knows that we go"),
            Ok(Err(error)) => tracing::warn!(%error, "the control plane does not know that we go"),
            Err(_) => tracing::warn!("the control plane does not know that we go"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ours() -> BTreeMap<EngineId, engines::ConfiguredEngine> {
        let written = engines::ConfiguredEngine {
            address: Address {
                host: "127.0.0.1".into(),
                port: 8000,
            },
            role: String::new(),
            bootstrap: String::new(),
            cohort: String::new(),
        };
        BTreeMap::from([(EngineId::from("e"), written)])
    }

    fn state(health: Health, models: &[&str]) -> EngineState {
        let models = models.iter().map(|id| Model {
            id: (*id).into(),
            ..Model::default()
        });
        EngineState {
            health,
            models: models.collect(),
            ..EngineState::default()
        }
    }

    #[test]
    fn who_is_drained_and_then_dead_is_to_be_left_still() {
        let (id, written) = ours().pop_first().unwrap();
        let told = |health, is_left| {
            let known = state(health, &[]);
            engine(&id, &written, (Some(&known), is_left)).state.health
        };
        for health in [Health::Healthy, Health::Dead, Health::Unknown] {
            assert_eq!(told(health, true), Health::Draining);
            assert_eq!(told(health, false), health);
        }
    }

    #[test]
    fn who_serves_nothing_yet_is_waited_for() {
        let mut states = States::new();
        assert!(!are_told(&ours(), &states));
        for (said, is_told) in [
            (state(Health::Unknown, &[]), false),
            (state(Health::Unknown, &["m"]), true),
            (state(Health::Dead, &[]), true),
            (state(Health::Healthy, &["m"]), true),
        ] {
            states.insert(EngineId::from("e"), said);
            assert_eq!(are_told(&ours(), &states), is_told);
        }
        // One that does not answer any more serves what it did.
        assert!(take(&mut states, "e".into(), state(Health::Dead, &[])));
        assert_eq!(&*states[&EngineId::from("e")].models[0].id, "m");
    }

    #[test]
    fn loopback_is_for_those_on_this_machine() {
        for (ip, server, expected) in [
            ("127.0.0.1", "127.0.0.1", true),
            ("127.0.0.1", "localhost", true),
            ("127.0.0.1", "10.0.0.9", false),
            ("::1", "control-plane", false),
            ("10.0.0.1", "10.0.0.9", true),
            ("0.0.0.0", "127.0.0.1", false),
            ("::", "10.0.0.9", false),
        ] {
            let server = Address {
                host: server.into(),
                port: 1,
            };
            assert_eq!(
                is_for_others(ip.parse().unwrap(), &server),
                expected,
                "{ip}"
            );
        }
    }
}
