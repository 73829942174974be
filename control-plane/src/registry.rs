//! Where engines register: leases, over gRPC beside xDS.
//!
//! [`table`] decides, and has the clock given in; this carries it. What is registered is a source of configuration
//! ([`crate::source::leases`]), and only what is on disk is served, so that a restart takes nothing away.

pub mod table;

use crate::{
    ads::{Ending, ended, unread},
    tls::Peer,
};
use outrigger_xds::{
    registry::{self, Holder, Registration},
    wire::outrigger::registry::v1::{self as wire, registry_server},
};
use serde_json::{Value, json};
use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::Instant,
};
use table::{Heard, LOOK_INTERVAL, Refusal, Table};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

/// Streams of nodes at once.
const STREAMS_MAX: usize = 20_000;
/// Longest registration.
pub const REGISTRATION_BYTES_MAX: usize = 1 << 20;

/// The leases, and who follows them.
#[derive(Debug)]
pub struct Registry {
    table: Mutex<Table>,
    /// The table's generation.
    news: watch::Sender<u64>,
    streams: AtomicUsize,
    /// Streams ever, each with its number.
    last: AtomicU64,
}

impl Registry {
    /// With this table.
    #[must_use]
    pub fn new(table: Table) -> Arc<Self> {
        let registry = Self {
            news: watch::Sender::new(table.generation()),
            table: Mutex::new(table),
            streams: AtomicUsize::new(0),
            last: AtomicU64::new(0),
        };
        registry.tell(&registry.table());
        Arc::new(registry)
    }

    /// Nothing in it can be half done: what is decided is done at once.
    pub(crate) fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Another number whenever something else is to be served.
    pub(crate) fn subscribe(&self) -> watch::Receiver<u64> {
        self.news.subscribe()
    }

    fn tell(&self, table: &Table) {
        #[expect(clippy::cast_precision_loss, reason = "at most LEASES_MAX")]
        metrics::gauge!("outrigger_control_plane_leases").set(table.leases().len() as f64);
        let generation = table.generation();
        self.news.send_if_modified(|last| {
            let is_news = *last != generation;
            *last = generation;
            is_news
        });
    }

    pub(crate) fn hear(&self, said: Registration, from: &str) -> Result<wire::Lease, Refusal> {
        let node = said.holder().to_string();
        let mut table = self.table();
        let heard = table.hear(said, from, Instant::now());
        self.tell(&table);
        drop(table);
        let (heard, length) = heard.inspect_err(|refusal| {
            tracing::warn!(node, from, %refusal, "a registration is refused");
        })?;
        count(heard.as_str());
        match heard {
            Heard::New | Heard::Left => tracing::info!(node, from, "{}", heard.as_str()),
            Heard::Changed | Heard::Renewed => tracing::debug!(node, from, "{}", heard.as_str()),
        }
        Ok(registry::lease(length))
    }

    /// Ends leases that are over, for as long as the process lives.
    pub async fn look(self: Arc<Self>) {
        loop {
            tokio::time::sleep(LOOK_INTERVAL).await;
            let mut table = self.table();
            let over = table.look(Instant::now());
            if over.is_empty() {
                continue;
            }
            self.tell(&table);
            drop(table);
            metrics::counter!("outrigger_control_plane_leases_expired_total")
                .increment(over.len() as u64);
            for node in over {
                tracing::warn!(%node, "its lease is over: its engines are taken away");
            }
        }
    }

    /// For people: who registered what, and until when. `placed` says what became of an engine: the pool that it is in, and whom
    /// requests to it go through.
    #[must_use]
    pub fn to_json(&self, placed: impl Fn(&Holder, &str) -> (Value, Value)) -> Value {
        let now = Instant::now();
        let table = self.table();
        let leases = table.leases().iter().map(|(holder, lease)| {
            let said = &lease.registration;
            let engines = said.engines.iter().map(|engine| {
                let (state, models) = (&engine.state, engine.state.models.iter());
                let (pool, through) = placed(holder, &engine.id);
                json!({
                    "id": engine.id,
                    "address": engine.address.to_string(),
                    "kind": state.kind.as_str(),
                    "version": state.version,
                    "models": models.map(|model| &*model.id).collect::<Vec<_>>(),
                    "role": state.role.as_str(),
                    "health": state.health.as_str(),
                    "reason": state.reason,
                    "kv_blocks": state.kv_blocks,
                    "block_tokens": state.block_tokens,
                    "pool": pool,
                    "through": through,
                })
            });
            json!({
                "node": holder.id,
                "registrant": holder.registrant.as_str(),
                "version": said.node.version,
                "cluster": said.node.cluster,
                "region": said.node.region,
                "zone": said.node.zone,
                "address": said.node.address.to_string(),
                "labels": said.node.labels,
                "from": lease.from,
                "length_seconds": lease.length.as_secs_f64(),
                "seconds_left": lease.until.saturating_duration_since(now).as_secs_f64(),
                "engines": engines.collect::<Vec<_>>(),
            })
        });
        Value::Array(leases.collect())
    }
}

fn count(result: &'static str) {
    metrics::counter!("outrigger_control_plane_registrations_total", "result" => result)
        .increment(1);
}

/// As a gRPC service. Without a registry there is no place to keep leases, and nobody may register.
#[derive(Debug)]
pub struct Service {
    /// Set when streams are to end.
    pub ending: watch::Receiver<Option<Ending>>,
    /// The leases.
    pub registry: Option<Arc<Registry>>,
}

#[tonic::async_trait]
impl registry_server::Registry for Service {
    type RegisterStream = ReceiverStream<Result<wire::Lease, Status>>;

    async fn register(
        &self,
        request: tonic::Request<Streaming<wire::Registration>>,
    ) -> Result<tonic::Response<Self::RegisterStream>, Status> {
        let registry = self.registry.clone().ok_or_else(|| {
            count("refused");
            Status::failed_precondition("nobody may register here: it was started without --leases")
        })?;
        let slot = Slot::take(&registry).ok_or_else(|| {
            count("refused");
            Status::resource_exhausted("too many streams")
        })?;
        let peer = Peer::of(&request);
        let (sender, receiver) = mpsc::channel(1);
        let talk = Talk {
            slot,
            from: peer
                .address
                .map(|from| from.to_string())
                .unwrap_or_default(),
            peer,
            node: None,
        };
        tokio::spawn(talk.run(request.into_inner(), sender, self.ending.clone()));
        Ok(tonic::Response::new(ReceiverStream::new(receiver)))
    }
}

/// A stream that counts until it is dropped.
struct Slot(Arc<Registry>);

impl Slot {
    fn take(registry: &Arc<Registry>) -> Option<Self> {
        let slot = Self(registry.clone());
        (registry.streams.fetch_add(1, Relaxed) < STREAMS_MAX).then_some(slot)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Relaxed);
    }
}

/// One stream. Its end says nothing of the lease.
struct Talk {
    slot: Slot,
    peer: Peer,
    from: String,
    /// Who speaks on it.
    node: Option<String>,
}

impl Talk {
    async fn run(
        mut self,
        mut said: Streaming<wire::Registration>,
        answers: mpsc::Sender<Result<wire::Lease, Status>>,
        mut ending: watch::Receiver<Option<Ending>>,
    ) {
        let number = self.slot.0.last.fetch_add(1, Relaxed);
        let over = ended(&mut ending, number);
        tokio::pin!(over);
        loop {
            let message = tokio::select! {
                message = said.message() => message,
                () = answers.closed() => return,
                () = &mut over => return,
            };
            let message = match message {
                Ok(Some(message)) => Ok(message),
                Ok(None) => return,
                // A stream that breaks refuses nobody.
                Err(status) => match unread(status) {
                    Ok(()) => return,
                    Err(status) => Err(status),
                },
            };
            let answer = self.answer(message);
            let is_last = answer.is_err();
            if answers.send(answer).await.is_err() || is_last {
                return;
            }
        }
    }

    fn answer(&mut self, said: Result<wire::Registration, Status>) -> Result<wire::Lease, Status> {
        let answer = said.and_then(|said| self.judge(said));
        if answer.is_err() {
            count("refused");
        }
        answer
    }

    fn judge(&mut self, said: wire::Registration) -> Result<wire::Lease, Status> {
        let said = Registration::try_from(said)
            .map_err(|errors| Status::invalid_argument(errors.to_string()))?;
        self.peer.admit(&said.node.id)?;
        let node = self.node.get_or_insert_with(|| said.node.id.clone());
        if *node != said.node.id {
            let message = format!("this stream is node '{node}', not '{}'", said.node.id);
            return Err(Status::invalid_argument(message));
        }
        self.slot.0.hear(said, &self.from).map_err(|refusal| {
            let message = refusal.to_string();
            match refusal {
                Refusal::TooMany(_) => Status::resource_exhausted(message),
                Refusal::Elsewhere { .. } | Refusal::Taken { .. } => {
                    Status::already_exists(message)
                }
            }
        })
    }
}
