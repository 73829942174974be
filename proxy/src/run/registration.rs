//! Tells a control plane of the engines beside us, again and again, so that others find them: what we say counts for a lease.
//!
//! Only engines that are written (in flags, or in the bootstrap) are told: those that a control plane puts beside us it knows.

use super::{
    Shared,
    control_plane::{Backoff, at},
};
use crate::engines;
use futures_util::StreamExt;
use outrigger_filters::end_address::EndAddress;
use outrigger_xds::{
    ads::Server,
    feed::{FeedBody, FeedSource},
    registry::{
        ENGINES_MAX, Engine, MODELS_MAX, Node, Registration, RegistryError, RegistryStream,
        TEXT_BYTES_MAX, open,
    },
    report::{EngineId, EngineState, Health, Model, Role},
    resource::{endpoint::Address, listener::TrafficDirection},
};
use rand::Rng;
use std::{collections::BTreeMap, sync::Arc, time::Duration};
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};

/// How long an answer may take.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
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
    pub server: Address,
    /// Where others reach us; none is where our inbound listener is.
    pub advertise: Option<Address>,
    /// To be chosen by.
    pub labels: BTreeMap<String, String>,
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
        server: at(&registrar.server),
        node,
        states,
        lease: LEASE_GUESS,
    };
    shared.runtime.spawn(async move {
        registering.run().await;
        drop(done);
    });
    Ok(())
}

fn node(shared: &Shared, registrar: &Registrar) -> Result<Node, String> {
    let written = shared.bootstrap.load();
    let address = match &registrar.advertise {
        Some(address) => address.clone(),
        None => inbound(shared)?,
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
fn inbound(shared: &Shared) -> Result<Address, String> {
    let written = shared.bootstrap.load();
    let mut listeners = written.listeners.iter();
    let is_inbound = |direction: TrafficDirection| direction == TrafficDirection::Inbound;
    let listener = listeners.find(|it| is_inbound(it.traffic_direction));
    let listener = listener.ok_or("registering: there is no inbound listener, give --advertise")?;
    let bound = shared.listeners.addresses().remove(&listener.name);
    match bound {
        Some(EndAddress::Ip(at)) if !at.ip().is_unspecified() => Ok(Address {
            host: at.ip().to_string(),
            port: at.port(),
        }),
        _ => Err(format!(
            "registering: others cannot reach the listener '{}' at the address that it binds, give --advertise",
            listener.name
        )),
    }
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
    known: Option<&EngineState>,
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
            health: known.health,
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

fn late(_: tokio::time::error::Elapsed) -> RegistryError {
    RegistryError::Broken(format!("no answer within {ANSWER_TIMEOUT:?}"))
}

struct Registering {
    shared: Arc<Shared>,
    server: Server,
    node: Node,
    states: watch::Receiver<States>,
    /// The last one that was given.
    lease: Duration,
}

impl Registering {
    fn registration(&mut self) -> Registration {
        let (configured, _) = engines::configured(&self.shared.bootstrap.load().clusters);
        let states = self.states.borrow_and_update();
        let engines = configured.iter().take(ENGINES_MAX);
        Registration {
            node: self.node.clone(),
            engines: engines
                .map(|(id, written)| engine(id, written, states.get(id)))
                .collect(),
            leaving: false,
        }
    }

    /// Until the process drains; then says that it goes.
    async fn run(mut self) {
        let drain = self.shared.drain.clone();
        let mut backoff = Backoff::new();
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
            }
            count(match error {
                RegistryError::Refused(_) => "refused",
                RegistryError::Broken(_) => "broken",
            });
            let server = &self.server.authority;
            tracing::warn!(server, %error, "not registered at the control plane: the next attempt comes soon");
            // Three attempts fit into a lease whatever the pause.
            let pause = backoff.pause().min(self.lease / 3);
            tokio::select! {
                () = sleep(pause) => {}
                () = drain.begun() => return self.leave(None).await,
            }
        }
    }

    /// Holds a lease until the process drains; the stream is what is left of it.
    async fn hold(&mut self, was_taken: &mut bool) -> Result<RegistryStream, RegistryError> {
        let drain = self.shared.drain.clone();
        let mut said = self.registration();
        let opening = timeout(ANSWER_TIMEOUT, open(&self.server, &said)).await;
        let mut stream = opening.map_err(late)??;
        loop {
            let lease = timeout(ANSWER_TIMEOUT, stream.lease()).await;
            self.lease = lease.map_err(late)??;
            count("taken");
            metrics::gauge!("outrigger_registered").set(1.0);
            if !std::mem::replace(was_taken, true) {
                let (server, lease) = (&self.server.authority, self.lease);
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
            stream.say(&said).await?;
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
                None => open(&self.server, &leaving).await?,
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
