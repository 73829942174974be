//! The engines we know of, by name: live state that outlives every configuration.
//!
//! Feeds write here, from the main runtime; requests read endpoints through views. An endpoint keeps its identity
//! (its `Arc`, its counters, its slot in the KV index) for as long as its name is known.

mod report;

use ahash::{AHashMap, AHashSet};
use outrigger_filters::{
    breakers::Breakers,
    endpoints::{Endpoint, Host, Live, Secured, Via, clock_ms},
    kv_index::KvIndex,
};
use outrigger_xds::{
    feed::{Continuity, FeedBody, FeedMessage},
    orca::LoadReport,
    report::{EngineId, EngineState, Health, KvSnapshot, Load},
    resource::{
        cluster::{ConnectionOptions, UpstreamProtocol},
        endpoint::{Address, HealthStatus},
    },
};
use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};
use tokio::sync::watch;

/// Where a message came from, which decides how its engines are reached.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Source {
    /// The engines beside us; their addresses are configured.
    Local,
    /// A peer's inbound listener; its engines are reached through it.
    Peer(Address),
}

struct Known {
    /// Never empty; more than one where clusters differ in how they use it. All share what is live.
    variants: Vec<Arc<Endpoint>>,
    source: Source,
    epoch: u64,
    heard: Continuity,
    /// Its blocks have another size than ours and are not indexed.
    unfit: bool,
    /// What its load report says, if it is beside us.
    rates: report::Rates,
}

impl Known {
    fn new(endpoint: Arc<Endpoint>, source: Source) -> Self {
        Self {
            variants: vec![endpoint],
            source,
            epoch: 0,
            heard: Continuity::default(),
            unfit: false,
            rates: report::Rates::default(),
        }
    }

    /// Any of them, for what they share.
    fn endpoint(&self) -> &Arc<Endpoint> {
        &self.variants[0]
    }
}

/// How configuration reaches and uses an endpoint.
#[derive(Debug, Clone, Copy)]
pub struct Way<'a> {
    /// Where.
    pub address: &'a Address,
    /// Its name.
    pub hostname: &'a str,
    /// Places it where policies choose by hash; engines behind a peer are placed by their own names.
    pub hash_key: &'a str,
    /// Of the cluster.
    pub breakers: &'a Arc<Breakers>,
    /// Of the cluster.
    pub connection: &'a Arc<ConnectionOptions>,
    /// What stands there.
    pub via: Via,
    /// Spoken there.
    pub protocol: UpstreamProtocol,
    /// How it is secured.
    pub tls: Option<&'a Secured>,
    /// At least 1.
    pub weight: u32,
    /// As configured.
    pub health_status: HealthStatus,
    /// 0 is used first.
    pub priority: u32,
    /// Which of the cluster's.
    pub locality: usize,
    /// Where that is.
    pub place: &'a Arc<[String; 3]>,
    /// Who uses it so.
    pub cluster: &'a Arc<str>,
}

impl Way<'_> {
    fn is_of(&self, endpoint: &Endpoint) -> bool {
        endpoint.address == *self.address
            && endpoint.via == self.via
            && endpoint.protocol == self.protocol
            && endpoint.tls.as_ref() == self.tls
            && endpoint.weight == self.weight.max(1)
            && endpoint.health_status == self.health_status
            && endpoint.priority == self.priority
            && endpoint.locality == self.locality
            && endpoint.place == *self.place
            && endpoint.cluster == *self.cluster
            && *endpoint.hostname == *self.hostname
            && (self.via == Via::Peer || *endpoint.hash_key == *self.hash_key)
            && Arc::ptr_eq(&endpoint.breakers, self.breakers)
            && endpoint.connection == *self.connection
    }
}

/// All of them.
pub struct Fleet {
    index: Arc<KvIndex>,
    /// Tokens in a canonical block of the index.
    block_tokens: usize,
    known: Mutex<AHashMap<EngineId, Known>>,
    /// Peers whose feeds told all they had at least once, be it nothing.
    told: Mutex<AHashSet<Address>>,
    /// Counts changes of membership; views are rebuilt when it moves.
    changed: watch::Sender<u64>,
}

impl Fleet {
    /// Nobody yet; the index has blocks of `block_tokens` tokens.
    #[must_use]
    pub fn new(index: Arc<KvIndex>, block_tokens: usize) -> Arc<Self> {
        Arc::new(Self {
            index,
            block_tokens,
            known: Mutex::default(),
            told: Mutex::default(),
            changed: watch::Sender::new(0),
        })
    }

    fn known(&self) -> MutexGuard<'_, AHashMap<EngineId, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn told(&self) -> MutexGuard<'_, AHashSet<Address>> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a peer's feed was heard: that no engine is known behind it means that it has none.
    #[must_use]
    pub fn has_told(&self, peer: &Address) -> bool {
        self.told().contains(peer)
    }

    /// What is known of all other engines that are heard of.
    #[must_use]
    pub fn others(&self, id: &EngineId) -> Vec<Arc<EngineState>> {
        let known = self.known();
        let others = known.iter().filter(|(other, _)| *other != id);
        let live = others.map(|(_, known)| known.endpoint().live.load_full());
        live.filter(|live| live.heard)
            .map(|live| live.state.clone())
            .collect()
    }

    /// Moves when membership changes.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// An endpoint that configuration names: kept if it is known, else new and not yet heard of.
    pub fn configure(&self, id: &EngineId, way: &Way<'_>) -> Arc<Endpoint> {
        let mut known = self.known();
        let Some(found) = known.get_mut(id) else {
            let endpoint = self.endpoint(id, way, &[]);
            known.insert(id.clone(), Known::new(endpoint.clone(), Source::Local));
            return endpoint;
        };
        if let Some(same) = found.variants.iter().find(|known| way.is_of(known)) {
            return same.clone();
        }
        // Same engine, other way to it: what is known of it stays.
        let endpoint = self.endpoint(id, way, &found.variants);
        if found.source != Source::Local {
            found.source = Source::Local;
            found.variants.clear();
        }
        found.variants.push(endpoint.clone());
        endpoint
    }

    /// Configuration names these and no others: the rest of what it named before is no longer known.
    pub fn retain_configured(&self, named: &AHashSet<EngineId>) {
        self.retain(|id, known| known.source != Source::Local || named.contains(id));
        for known in self.known().values_mut() {
            // Ways that no cluster goes any more. The views hold those that are still gone.
            let mut kept = 0;
            let last = known.variants.len() - 1;
            let mut at = 0;
            known.variants.retain(|endpoint| {
                let stays = Arc::strong_count(endpoint) > 1 || (at == last && kept == 0);
                at += 1;
                kept += usize::from(stays);
                stays
            });
        }
    }

    /// Forgets those that do not stay; gives how many.
    fn retain(&self, stays: impl Fn(&EngineId, &Known) -> bool) -> usize {
        let mut known = self.known();
        let before = known.len();
        known.retain(|id, known| {
            let stays = stays(id, known);
            if !stays {
                self.index.remove(known.endpoint().slot);
            }
            stays
        });
        let gone = before - known.len();
        if gone > 0 {
            self.changed.send_modify(|count| *count += 1);
        }
        gone
    }

    /// A new endpoint; `twins` have the same name, and what is live is shared with them.
    fn endpoint(&self, id: &EngineId, way: &Way<'_>, twins: &[Arc<Endpoint>]) -> Arc<Endpoint> {
        let twin = twins.first();
        let of_cluster = twins.iter().find(|twin| twin.cluster == *way.cluster);
        Arc::new(Endpoint {
            id: id.clone(),
            address: way.address.clone(),
            hostname: way.hostname.into(),
            hash_key: match way.via {
                Via::Peer => id.0.clone(),
                Via::Local | Via::Plain => way.hash_key.into(),
            },
            breakers: way.breakers.clone(),
            connection: way.connection.clone(),
            via: way.via,
            protocol: way.protocol,
            tls: way.tls.cloned(),
            weight: way.weight.max(1),
            health_status: way.health_status,
            priority: way.priority,
            locality: way.locality,
            place: way.place.clone(),
            cluster: way.cluster.clone(),
            host: of_cluster.map_or_else(new_host, |twin| twin.host.clone()),
            slot: self.index.slot(id),
            live: twin.map_or_else(Default::default, |twin| twin.live.clone()),
            stats: twin.map_or_else(Default::default, |twin| twin.stats.clone()),
        })
    }

    /// The engines a peer has told of, as a cluster uses them that configures the peer this way.
    #[must_use]
    pub fn behind(&self, way: &Way<'_>) -> Vec<Arc<Endpoint>> {
        let mut known = self.known();
        let mut found: Vec<_> = known
            .iter_mut()
            .filter(|(_, known)| matches!(&known.source, Source::Peer(address) if address == way.address))
            .map(|(id, known)| {
                if let Some(same) = known.variants.iter().find(|known| way.is_of(known)) {
                    return same.clone();
                }
                let endpoint = self.endpoint(id, way, &known.variants);
                known.variants.push(endpoint.clone());
                endpoint
            })
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
                return true;
            };
            match message.body {
                FeedBody::State(_) => {}
                FeedBody::Gone => return true,
                // It was somebody else's when this source told its state, and has been dropped meanwhile.
                FeedBody::Load(_) | FeedBody::Snapshot(_) | FeedBody::Changes(_) => return false,
            }
            let way = Way {
                address,
                via: Via::Peer,
                protocol: UpstreamProtocol::Http2,
                tls: None,
                weight: 1,
                health_status: HealthStatus::default(),
                priority: 0,
                locality: 0,
                place: &Arc::default(),
                cluster: &Arc::default(),
                hostname: &address.host,
                hash_key: "",
                breakers: &Arc::default(),
                connection: &Arc::default(),
            };
            let endpoint = self.endpoint(&message.engine, &way, &[]);
            known.insert(message.engine.clone(), Known::new(endpoint, source.clone()));
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
            let (id, slot) = (entry.endpoint().id.clone(), entry.endpoint().slot);
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
        let endpoint = &entry.variants[0];
        match message.body {
            FeedBody::State(state) => self.take_state(&entry.variants, state),
            FeedBody::Load(load) => {
                if entry.source == Source::Local {
                    report::renew(&entry.variants, &load, &mut entry.rates);
                }
                take_load(endpoint, load);
            }
            FeedBody::Snapshot(snapshot) => {
                let unfit = self.is_unfit(&snapshot);
                if unfit && !entry.unfit {
                    tracing::warn!(engine = %endpoint.id, theirs = snapshot.block_tokens, ours = self.block_tokens,
                        "KV blocks of another size than ours are not indexed: --block-tokens must be the same everywhere");
                }
                entry.unfit = unfit;
                if unfit {
                    metrics::counter!("outrigger_feed_unfit_blocks_total", "engine" => endpoint.id.to_string())
                        .increment(1);
                    self.index.clear(endpoint.slot);
                } else {
                    self.index.replace(endpoint.slot, &snapshot);
                }
                entry.epoch = message.epoch;
                count_events(endpoint, message.seq);
            }
            FeedBody::Changes(changes) if news => {
                if entry.epoch != message.epoch {
                    self.index.clear(endpoint.slot);
                    entry.epoch = message.epoch;
                }
                for change in changes.iter().filter(|_| !entry.unfit) {
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

    /// Whether a snapshot's hashes can match none of ours. An empty one may leave its size unsaid.
    fn is_unfit(&self, snapshot: &KvSnapshot) -> bool {
        snapshot.block_tokens != 0 && snapshot.block_tokens as usize != self.block_tokens
    }

    fn take_state(&self, variants: &[Arc<Endpoint>], state: EngineState) {
        let endpoint = &variants[0];
        let known = endpoint.live.load_full();
        if *known.state != state {
            tracing::info!(engine = %endpoint.id, health = state.health.as_str(), kind = state.kind.as_str(),
                version = state.version, models = state.models.len(), kv_events = state.kv_events, reason = state.reason,
                "engine state");
        }
        if state.health == Health::Dead {
            self.index.clear(endpoint.slot);
            endpoint.note_fall(&known);
        }
        // Well again, or heard of again: what failed before says nothing about it now.
        if state.health == Health::Healthy
            && (known.state.health != Health::Healthy || !known.heard)
        {
            endpoint.stats.inhibited_until_ms.store(0, Relaxed);
        }
        let was_unhealthy = known.state.health == Health::Unhealthy;
        let is_unhealthy = state.health == Health::Unhealthy;
        endpoint.live.store(Arc::new(Live {
            state: Arc::new(state),
            heard: true,
            ..(*known).clone()
        }));
        if was_unhealthy != is_unhealthy {
            // Back after a while: where policies start slowly, they do.
            for variant in variants {
                variant.host.since_ms.store(clock_ms(), Relaxed);
            }
            // Its clusters are no longer even, or are again.
            self.changed.send_modify(|count| *count += 1);
        }
    }

    fn forget(&self, endpoint: &Endpoint) {
        let known = endpoint.live.load_full();
        endpoint.note_fall(&known);
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
            self.forget(known.endpoint());
        }
    }

    /// A source has told all it has: what else was known from it is gone, be it that it has another name now.
    pub fn retain_named(&self, source: &Source, named: &AHashSet<EngineId>) {
        let gone = self.retain(|id, known| known.source != *source || named.contains(id));
        if gone > 0 {
            tracing::info!(?source, gone, "engines are no longer told of");
        }
        if let Source::Peer(peer) = source
            && self.told().insert(peer.clone())
        {
            self.changed.send_modify(|count| *count += 1);
        }
    }

    /// A peer was taken out of the configuration: its engines are no longer known.
    pub fn dismiss(&self, peer: &Address) {
        let source = Source::Peer(peer.clone());
        self.retain(|_, known| known.source != source);
        self.told().remove(peer);
    }
}

/// Of an endpoint that is there from now on.
fn new_host() -> Arc<Host> {
    let host = Host::default();
    host.since_ms.store(clock_ms(), Relaxed);
    Arc::new(host)
}

fn take_load(endpoint: &Endpoint, load: Load) {
    let known = endpoint.live.load_full();
    endpoint.live.store(Arc::new(Live {
        load,
        load_at: Instant::now(),
        ..(*known).clone()
    }));
}

/// No engine runs or queues more requests than this.
const REPORTED_MAX: f64 = 1e6;

/// A load report of an endpoint that no feed tells of: all that routing can know of its load.
pub fn reported(endpoint: &Endpoint, told: &LoadReport) {
    let named = |name: &str| {
        let value = told.named_metrics.get(name).copied();
        value.filter(|value| value.is_finite())
    };
    let running = named("num_requests_running");
    let waiting = named("num_requests_waiting");
    let kv_usage = named("kv_cache_usage_perc");
    if running.or(waiting).or(kv_usage).is_none() {
        return;
    }
    // Numbers of a stranger: what is no count becomes one, and sums of counts stay in range.
    let count = |number: Option<f64>| number.unwrap_or(0.0).clamp(0.0, REPORTED_MAX) as u64;
    let load = Load {
        running: count(running),
        waiting: count(waiting),
        kv_usage: kv_usage.unwrap_or(0.0).clamp(0.0, 1.0),
        engine_age: Some(Duration::ZERO),
        ..Load::default()
    };
    take_load(endpoint, load);
}

fn count_events(endpoint: &Endpoint, seq: u64) {
    metrics::gauge!("outrigger_kv_events_seq", "engine" => endpoint.id.to_string()).set(seq as f64);
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK_TOKENS: usize = 32;

    fn breakers() -> Arc<Breakers> {
        static ONE: std::sync::LazyLock<Arc<Breakers>> = std::sync::LazyLock::new(Arc::default);
        ONE.clone()
    }

    fn fleet() -> (Arc<Fleet>, Arc<KvIndex>) {
        let index = Arc::new(KvIndex::default());
        (Fleet::new(index.clone(), BLOCK_TOKENS), index)
    }

    fn named(names: &[&str]) -> AHashSet<EngineId> {
        names.iter().map(|name| EngineId::from(*name)).collect()
    }

    fn configure(fleet: &Fleet, id: &str, weight: u32) -> Arc<Endpoint> {
        let way = Way {
            address: &Address::default(),
            hostname: "",
            hash_key: "",
            breakers: &breakers(),
            connection: &Arc::default(),
            via: Via::Local,
            protocol: UpstreamProtocol::Http1,
            tls: None,
            weight,
            health_status: HealthStatus::default(),
            priority: 0,
            locality: 0,
            place: &Arc::default(),
            cluster: &"c".into(),
        };
        fleet.configure(&id.into(), &way)
    }

    fn message(engine: &str, body: FeedBody) -> FeedMessage {
        FeedMessage {
            engine: engine.into(),
            epoch: 1,
            seq: 1,
            body,
        }
    }

    fn healthy(engine: &str) -> FeedMessage {
        let state = EngineState {
            health: Health::Healthy,
            ..EngineState::default()
        };
        message(engine, FeedBody::State(state))
    }

    #[test]
    fn an_engine_that_a_push_takes_away_leaves_nothing() {
        let (fleet, index) = fleet();
        let (stays, goes) = (configure(&fleet, "stays", 1), configure(&fleet, "goes", 1));
        let peer = Source::Peer(Address::default());
        assert!(fleet.apply(&peer, healthy("far")));
        fleet.retain_configured(&named(&["stays"]));
        assert_eq!(index.slot(&"new".into()), goes.slot, "its slot is free");
        assert!(Arc::ptr_eq(&configure(&fleet, "stays", 1), &stays));
        let far = Way {
            address: &Address::default(),
            hostname: "",
            hash_key: "",
            breakers: &breakers(),
            connection: &Arc::default(),
            via: Via::Peer,
            protocol: UpstreamProtocol::Http2,
            tls: None,
            weight: 1,
            health_status: HealthStatus::default(),
            priority: 0,
            locality: 0,
            place: &Arc::default(),
            cluster: &"c".into(),
        };
        assert_eq!(fleet.behind(&far).len(), 1);
    }

    #[test]
    fn only_an_engine_that_was_alive_falls() {
        let (fleet, _index) = fleet();
        let peer = Source::Peer(Address::default());
        let tell = |engine: &str, health: Health| {
            let state = EngineState {
                health,
                ..EngineState::default()
            };
            assert!(fleet.apply(&peer, message(engine, FeedBody::State(state))));
        };
        let fell = |engine: &str| fleet.known()[&engine.into()].endpoint().fell_at().is_some();
        // One that was dead when it was first heard of, and one that is stopped in order.
        tell("dead", Health::Dead);
        for health in [Health::Unknown, Health::Healthy, Health::Draining] {
            tell("drains", health);
        }
        tell("drains", Health::Dead);
        for health in [Health::Healthy, Health::Unhealthy] {
            tell("ill", health);
            tell("lost", health);
        }
        tell("ill", Health::Dead);
        assert!(fell("ill"));
        fleet.lost(&peer);
        assert!(fell("lost"));
        assert!(!fell("dead") && !fell("drains"));
    }

    #[test]
    fn numbers_of_a_load_report_are_bounded() {
        let endpoint = Endpoint::default();
        let numbers = [
            ("num_requests_running", 1e30),
            ("num_requests_waiting", -1.0),
            ("kv_cache_usage_perc", f64::NAN),
        ];
        let told = LoadReport {
            named_metrics: numbers.map(|(name, value)| (name.to_owned(), value)).into(),
            ..LoadReport::default()
        };
        reported(&endpoint, &told);
        let load = &endpoint.live.load().load;
        assert_eq!((load.running, load.waiting), (1_000_000, 0));
        assert_eq!(load.kv_usage.to_bits(), 0);
    }

    #[test]
    fn what_is_known_of_an_engine_is_one_however_clusters_use_it() {
        let (fleet, _index) = fleet();
        let light = configure(&fleet, "e", 1);
        let heavy = configure(&fleet, "e", 5);
        light.inhibit();
        light
            .stats
            .active
            .fetch_add(3, std::sync::atomic::Ordering::Relaxed);
        assert!(heavy.is_inhibited());
        assert!(fleet.apply(&Source::Local, healthy("e")));
        assert!(light.is_alive() && heavy.is_alive());
        for _ in 0..2 {
            assert!(Arc::ptr_eq(&configure(&fleet, "e", 5), &heavy));
            assert!(Arc::ptr_eq(&configure(&fleet, "e", 1), &light));
            fleet.retain_configured(&named(&["e"]));
        }
        // No cluster has it at weight 1 any more.
        drop(light);
        fleet.retain_configured(&named(&["e"]));
        assert_eq!(fleet.known()[&"e".into()].variants.len(), 1);
        assert!(configure(&fleet, "e", 1).is_alive());
    }

    #[test]
    fn an_unhealthy_engine_is_there_where_nobody_else_is_and_its_views_are_built_anew() {
        use outrigger_filters::endpoints::Level;
        let (fleet, _index) = fleet();
        let endpoint = configure(&fleet, "e", 1);
        let changed = fleet.watch();
        let told = |health: Health| {
            let state = EngineState {
                health,
                ..EngineState::default()
            };
            message("e", FeedBody::State(state))
        };
        for (health, level) in [
            (Health::Unhealthy, Level::Unhealthy),
            (Health::Healthy, Level::Healthy),
        ] {
            let before = *changed.borrow();
            assert!(fleet.apply(&Source::Local, told(health)));
            assert!(endpoint.is_alive() && endpoint.fits(None));
            assert_eq!(endpoint.level(), level);
            assert_ne!(*changed.borrow(), before);
        }
    }

    #[test]
    fn an_engine_dropped_by_one_peer_is_asked_for_at_the_other_that_tells_of_it() {
        let (fleet, _index) = fleet();
        let peer = |port| {
            Source::Peer(Address {
                port,
                ..Address::default()
            })
        };
        assert!(fleet.apply(&peer(1), healthy("moves")));
        assert!(fleet.apply(&peer(2), healthy("moves")), "a conflict");
        let Source::Peer(first) = peer(1) else {
            unreachable!()
        };
        assert!(!fleet.has_told(&first));
        fleet.retain_named(&peer(1), &named(&[]));
        assert!(fleet.has_told(&first));
        let load = message("moves", FeedBody::Load(Default::default()));
        assert!(!fleet.apply(&peer(2), load), "its state is not known");
        assert!(fleet.apply(&peer(2), healthy("moves")));
    }
}
