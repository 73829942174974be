//! The engines we know of, by name: live state that outlives every configuration.
//!
//! Feeds write here, from the main runtime; requests read endpoints through views. An endpoint keeps its identity
//! (its `Arc`, its counters, its slot in the KV index) for as long as its name is known.

use ahash::{AHashMap, AHashSet};
use outrigger_filters::{
    endpoints::{Endpoint, EndpointStats, Live, Via},
    kv_index::KvIndex,
};
use outrigger_xds::{
    feed::{Continuity, FeedBody, FeedMessage},
    report::{EngineId, EngineState, Health},
    resource::{cluster::UpstreamProtocol, endpoint::Address},
};
use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};
use tokio::sync::{Notify, watch};

/// Where a message came from, which decides how its engines are reached.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Source {
    /// The engines beside us; their addresses are configured.
    Local,
    /// A peer's inbound listener; its engines are reached through it.
    Peer(Address),
}

struct Known {
    endpoint: Arc<Endpoint>,
    source: Source,
    epoch: u64,
    heard: Continuity,
}

/// All of them.
pub struct Fleet {
    index: Arc<KvIndex>,
    known: Mutex<AHashMap<EngineId, Known>>,
    /// Counts changes of membership; views are rebuilt when it moves.
    changed: watch::Sender<u64>,
    /// Engines that were told of before configuration named them.
    overheard: Mutex<AHashSet<EngineId>>,
    /// Configuration now names one of them.
    wanted: Notify,
}

impl Fleet {
    /// Nobody yet.
    #[must_use]
    pub fn new(index: Arc<KvIndex>) -> Arc<Self> {
        Arc::new(Self {
            index,
            known: Mutex::default(),
            changed: watch::Sender::new(0),
            overheard: Mutex::default(),
            wanted: Notify::new(),
        })
    }

    fn overheard(&self) -> MutexGuard<'_, AHashSet<EngineId>> {
        self.overheard
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Completes when an engine was configured that had been told of before: whoever tells must tell again.
    pub async fn wanted(&self) {
        self.wanted.notified().await;
    }

    fn known(&self) -> MutexGuard<'_, AHashMap<EngineId, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Moves when membership changes.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// An endpoint that configuration names: kept if it is known, else new and not yet heard of.
    pub fn configure(
        &self,
        id: &EngineId,
        address: &Address,
        via: Via,
        protocol: UpstreamProtocol,
        weight: u32,
    ) -> Arc<Endpoint> {
        let mut known = self.known();
        if let Some(found) = known.get(id) {
            let same = found.endpoint.address == *address
                && found.endpoint.via == via
                && found.endpoint.protocol == protocol
                && found.endpoint.weight == weight;
            if same {
                return found.endpoint.clone();
            }
        }
        let endpoint = self.endpoint(id, address, via, protocol, weight);
        if let Some(found) = known.get(id) {
            // Same engine, other way to it: what is known of it stays.
            endpoint.live.store(found.endpoint.live.load_full());
        }
        let before = known.remove(id);
        let (epoch, heard) =
            before.map_or_else(Default::default, |found| (found.epoch, found.heard));
        known.insert(
            id.clone(),
            Known {
                endpoint: endpoint.clone(),
                source: Source::Local,
                epoch,
                heard,
            },
        );
        if self.overheard().remove(id) {
            self.wanted.notify_one();
        }
        endpoint
    }

    fn endpoint(
        &self,
        id: &EngineId,
        address: &Address,
        via: Via,
        protocol: UpstreamProtocol,
        weight: u32,
    ) -> Arc<Endpoint> {
        Arc::new(Endpoint {
            id: id.clone(),
            address: address.clone(),
            via,
            protocol,
            weight: weight.max(1),
            slot: self.index.slot(id),
            live: Default::default(),
            stats: EndpointStats::default(),
        })
    }

    /// The engines a peer has told of.
    #[must_use]
    pub fn behind(&self, peer: &Address) -> Vec<Arc<Endpoint>> {
        let known = self.known();
        let mut found: Vec<_> = known
            .values()
            .filter(|known| matches!(&known.source, Source::Peer(address) if address == peer))
            .map(|known| known.endpoint.clone())
            .collect();
        found.sort_by(|a, b| a.id.cmp(&b.id));
        found
    }

    /// Takes one message in. False means a gap: the listener must ask anew.
    pub fn apply(&self, source: &Source, message: FeedMessage) -> bool {
        let mut known = self.known();
        if !known.contains_key(&message.engine) {
            let Source::Peer(address) = source else {
                tracing::debug!(engine = %message.engine, "feed tells of an engine that is not configured");
                self.overheard().insert(message.engine);
                return true;
            };
            let endpoint = self.endpoint(
                &message.engine,
                address,
                Via::Peer,
                UpstreamProtocol::Http2,
                1,
            );
            let entry = Known {
                endpoint,
                source: source.clone(),
                epoch: message.epoch,
                heard: Continuity::default(),
            };
            known.insert(message.engine.clone(), entry);
            self.changed.send_modify(|count| *count += 1);
        }
        let Some(entry) = known.get_mut(&message.engine) else {
            return true;
        };
        if entry.source != *source {
            // Beside us and behind a peer at once: what is beside us knows best. Of two peers, the first.
            // A proxy that is its own peer (one list of peers for all) is such a case, and harmless.
            tracing::debug!(engine = %message.engine, "two sources tell of one engine name");
            metrics::counter!("outrigger_feed_conflicts_total").increment(1);
            return true;
        }
        let gone = message.body == FeedBody::Gone;
        let whole = self.take(entry, message);
        if gone && matches!(source, Source::Peer(_)) {
            let (id, slot) = (entry.endpoint.id.clone(), entry.endpoint.slot);
            known.remove(&id);
            self.index.remove(slot);
            self.changed.send_modify(|count| *count += 1);
        }
        whole
    }

    fn take(&self, entry: &mut Known, message: FeedMessage) -> bool {
        let news = match entry.heard.admit(&message) {
            Ok(news) => news,
            Err(error) => {
                tracing::warn!(%error, "a feed must begin anew");
                metrics::counter!("outrigger_feed_gaps_total").increment(1);
                return false;
            }
        };
        let endpoint = &entry.endpoint;
        match message.body {
            FeedBody::State(state) => self.take_state(endpoint, state),
            FeedBody::Load(load) => {
                let known = endpoint.live.load_full();
                endpoint.live.store(Arc::new(Live {
                    load,
                    load_at: Instant::now(),
                    ..(*known).clone()
                }));
            }
            FeedBody::Snapshot(snapshot) => {
                self.index.replace(endpoint.slot, &snapshot);
                entry.epoch = message.epoch;
                count_events(endpoint, message.seq);
            }
            FeedBody::Changes(changes) if news => {
                if entry.epoch != message.epoch {
                    self.index.clear(endpoint.slot);
                    entry.epoch = message.epoch;
                }
                for change in &changes {
                    self.index.apply(endpoint.slot, change);
                }
                count_events(endpoint, message.seq);
            }
            FeedBody::Changes(_) => {}
            // Whoever watched the engine beside us is gone; the engine may well be there, and requests will tell.
            FeedBody::Gone if entry.source == Source::Local => self.index.clear(endpoint.slot),
            FeedBody::Gone => self.forget(endpoint),
        }
        true
    }

    fn take_state(&self, endpoint: &Endpoint, state: EngineState) {
        let known = endpoint.live.load_full();
        if *known.state != state {
            tracing::info!(engine = %endpoint.id, health = state.health.as_str(), kind = state.kind.as_str(),
                version = state.version, models = state.models.len(), kv_events = state.kv_events, reason = state.reason,
                "engine state");
        }
        if state.health == Health::Dead {
            self.index.clear(endpoint.slot);
        }
        // Well again, or heard of again: what failed before says nothing about it now.
        if state.health == Health::Healthy
            && (known.state.health != Health::Healthy || !known.heard)
        {
            endpoint
                .stats
                .inhibited_until_ms
                .store(0, std::sync::atomic::Ordering::Relaxed);
        }
        endpoint.live.store(Arc::new(Live {
            state: Arc::new(state),
            heard: true,
            ..(*known).clone()
        }));
    }

    fn forget(&self, endpoint: &Endpoint) {
        let known = endpoint.live.load_full();
        endpoint.live.store(Arc::new(Live {
            heard: false,
            ..(*known).clone()
        }));
        self.index.clear(endpoint.slot);
    }

    /// A source cannot be heard any more: its engines get no requests until it can.
    pub fn lost(&self, source: &Source) {
        for known in self
            .known()
            .values()
            .filter(|known| known.source == *source)
        {
            self.forget(&known.endpoint);
        }
    }

    /// A peer was taken out of the configuration: its engines are no longer known.
    pub fn dismiss(&self, peer: &Address) {
        let source = Source::Peer(peer.clone());
        let mut known = self.known();
        known.retain(|_, known| {
            let stays = known.source != source;
            if !stays {
                self.index.remove(known.endpoint.slot);
            }
            stays
        });
        self.changed.send_modify(|count| *count += 1);
    }
}

fn count_events(endpoint: &Endpoint, seq: u64) {
    metrics::gauge!("outrigger_kv_events_seq", "engine" => endpoint.id.to_string()).set(seq as f64);
}
