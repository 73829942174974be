//! The fleet as filters see it: clusters, their endpoints, and the way to them. The proxy implements the traits.

mod part;
mod record;
mod tally;
mod upstream;

pub use part::{Part, has_halves};
pub use record::{Outcomes, Record};
pub use tally::{Counts, Ended, Tally};
pub use upstream::{SendOptions, Upstream};

use crate::{
    breakers::Breakers,
    error::{Error, Flag, GivenUp},
    lease::Lease,
};
use arc_swap::{ArcSwap, ArcSwapOption};
use http::{HeaderMap, HeaderName, HeaderValue};
use outrigger_xds::{
    block_hash::BlockHash,
    report::{EngineId, EngineState, Load, Role},
    resource::{
        cluster::{ConnectionOptions, LbPolicy, OriginalDst, UpstreamProtocol},
        endpoint::{Address, HealthStatus},
        route_action::Priority,
    },
};
use std::{
    any::Any,
    fmt,
    net::SocketAddr,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

/// The current endpoints of a cluster: a moment's view, immutable.
#[derive(Debug, Clone)]
pub struct ClusterView {
    /// Cluster name.
    pub name: Arc<str>,
    /// How one is chosen when no filter ranked them.
    pub lb_policy: LbPolicy,
    /// Default 5 s.
    pub connect_timeout: Duration,
    /// Whether nothing tells its endpoints apart but their load: one weight, one priority, and nobody judges their
    /// health.
    pub even: bool,
    /// Request headers that may name endpoints, before the policy is asked.
    pub override_host: Arc<[HeaderName]>,
    /// How much of it may be in use.
    pub breakers: Arc<Breakers>,
    /// A peer is configured whose feed was not heard yet.
    pub silent_peer: bool,
    /// A request goes where it was meant to, and nothing is chosen: there are no endpoints to choose from.
    pub original_dst: Option<Arc<OriginalDst>>,
    /// There are endpoints, and all are ordinary servers.
    pub plain: bool,
    /// All endpoints, whatever their health.
    pub endpoints: Vec<Arc<Endpoint>>,
}

impl ClusterView {
    /// Endpoints that may get a request for `model`: alive, and serving it. If none serves the model, all that are
    /// alive (one of them then gives the engine's own 404); if none is alive, none.
    #[must_use]
    pub fn candidates(&self, model: Option<&str>) -> Vec<Arc<Endpoint>> {
        let mut alive: Vec<_> = self
            .endpoints
            .iter()
            .filter(|endpoint| endpoint.is_alive())
            .cloned()
            .collect();
        // The model first: an engine that is ejected, but has it, can do more than one that is well and has not.
        if let Some(model) = model
            && alive.iter().any(|endpoint| endpoint.serves(model))
        {
            alive.retain(|endpoint| endpoint.serves(model));
        }
        if !self.even {
            self.keep_preferred(&mut alive);
        }
        alive
    }

    /// Takes out those that a health check, outlier detection or configuration speaks against, as long as others are left.
    fn keep_preferred(&self, alive: &mut Vec<Arc<Endpoint>>) {
        for level in [Level::Healthy, Level::Degraded] {
            if alive.iter().any(|endpoint| endpoint.level() == level) {
                alive.retain(|endpoint| endpoint.level() == level);
                return;
            }
        }
    }
}

/// What a cluster's configuration, health checks and outlier detection together say of an endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// Gets requests.
    Healthy,
    /// Gets them where too few are healthy.
    Degraded,
    /// Gets them in a panic only.
    Unhealthy,
    /// Gets nothing new: it drains, or its feed says that it is not there.
    Out,
}

/// What one cluster knows of one endpoint of its own.
#[derive(Debug, Default)]
pub struct Host {
    flags: AtomicU32,
    /// When its turn is, in the virtual time of the cluster's weighted round robin.
    pub turn: AtomicU64,
    /// How its requests went.
    pub tally: Tally,
    /// What outlier detection counts.
    pub record: Record,
    /// What its load reports earn it.
    pub reported: Reported,
    /// Connections that are open, or about to be.
    pub connections: AtomicU64,
    /// Since when it is there, or well again, on [`clock_ms`]'s clock.
    pub since_ms: AtomicU64,
}

/// The weight that an endpoint's load reports earn it. Times are on [`clock_ms`]'s clock; 0 is never.
#[derive(Debug, Default)]
pub struct Reported {
    /// By the last report; the bits of a number.
    pub latest: AtomicU64,
    /// As it is used now.
    pub weight: AtomicU64,
    /// Since when reports come.
    pub since_ms: AtomicU64,
    /// When the last one came.
    pub at_ms: AtomicU64,
}

impl Host {
    /// Its active health checks fail.
    pub const FAILED_ACTIVE_HC: u32 = 1;
    /// Outlier detection has ejected it.
    pub const FAILED_OUTLIER_CHECK: u32 = 1 << 1;
    /// Its active health checks say that it is degraded.
    pub const DEGRADED_ACTIVE_HC: u32 = 1 << 2;
    /// No health check has ended yet.
    pub const PENDING_ACTIVE_HC: u32 = 1 << 3;
    /// The last health check got no answer in time.
    pub const ACTIVE_HC_TIMEOUT: u32 = 1 << 4;
    /// Somebody checks it, whatever came of that.
    pub const CHECKED: u32 = 1 << 5;
    /// Nobody has gone there for a while: pooled connections to it are to end.
    pub const RETIRED: u32 = 1 << 6;

    /// Whether one of `flags` is set.
    #[must_use]
    pub fn has(&self, flags: u32) -> bool {
        self.flags.load(Relaxed) & flags != 0
    }

    /// Sets or clears `flags`; true if that changed something.
    pub fn set(&self, flags: u32, to: bool) -> bool {
        let before = if to {
            self.flags.fetch_or(flags, Relaxed)
        } else {
            self.flags.fetch_and(!flags, Relaxed)
        };
        let after = if to { before | flags } else { before & !flags };
        before != after
    }
}

/// How an endpoint is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Via {
    /// Its own socket, beside this proxy.
    Local,
    /// Through the inbound listener of the proxy beside it.
    Peer,
    /// Its own socket, and nothing is known of it: an ordinary HTTP server.
    #[default]
    Plain,
}

/// A way to secure connections, which only the way out understands.
#[derive(Clone)]
pub struct Secured {
    /// Connections of one are never used for another.
    pub id: u64,
    /// What it is.
    pub context: Arc<dyn Any + Send + Sync>,
}

impl PartialEq for Secured {
    fn eq(&self, other: &Self) -> bool {
        self.id == other.id
    }
}

impl fmt::Debug for Secured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Secured({})", self.id)
    }
}

/// One endpoint. Lives as long as somebody holds it; what changes is behind atomics.
#[derive(Debug, Default)]
pub struct Endpoint {
    /// Its name in the fleet.
    pub id: EngineId,
    /// Where to connect.
    pub address: Address,
    /// Its name; the host of its address if it has no other.
    pub hostname: Arc<str>,
    /// Places it where policies choose by hash.
    pub hash_key: Arc<str>,
    /// What stands at that address.
    pub via: Via,
    /// How it is spoken to.
    pub protocol: UpstreamProtocol,
    /// How it is secured; none is plain text.
    pub tls: Option<Secured>,
    /// `load_balancing_weight`, at least 1.
    pub weight: u32,
    /// As its cluster's configuration says.
    pub health_status: HealthStatus,
    /// 0 is used first.
    pub priority: u32,
    /// Which of the cluster's localities.
    pub locality: usize,
    /// Where that is: region, zone, sub-zone.
    pub place: Arc<[String; 3]>,
    /// The cluster that uses it so.
    pub cluster: Arc<str>,
    /// How much of that cluster may be in use.
    pub breakers: Arc<Breakers>,
    /// Of connections to it.
    pub connection: Arc<ConnectionOptions>,
    /// What that cluster knows of it.
    pub host: Arc<Host>,
    /// Where the KV index keeps it.
    pub slot: usize,
    /// What is known of it now. One for all endpoints of this name: clusters may differ in weight or protocol.
    pub live: Arc<ArcSwap<Live>>,
    /// Counted by this proxy; one for all endpoints of this name.
    pub stats: Arc<EndpointStats>,
}

/// What is known of an endpoint now.
#[derive(Debug, Clone)]
pub struct Live {
    /// Identity, models, health.
    pub state: Arc<EngineState>,
    /// As last told.
    pub load: Load,
    /// When `load` was told.
    pub load_at: Instant,
    /// Whether whoever tells of it can be heard.
    pub heard: bool,
}

impl Live {
    fn is_alive(&self) -> bool {
        use outrigger_xds::report::Health;
        self.heard && matches!(self.state.health, Health::Healthy | Health::Unhealthy)
    }
}

impl Default for Live {
    fn default() -> Self {
        Self {
            state: Arc::default(),
            load: Load::default(),
            load_at: Instant::now(),
            heard: false,
        }
    }
}

/// Counters of one endpoint as this proxy uses it.
#[derive(Debug, Default)]
pub struct EndpointStats {
    /// Requests in flight.
    pub active: AtomicU64,
    /// Connections that could not be opened.
    pub connect_fail: AtomicU64,
    /// Of these, for want of time.
    pub connect_timeout: AtomicU64,
    /// Connections opened.
    pub connections: AtomicU64,
    /// Of these, for HTTP/2.
    pub connections_http2: AtomicU64,
    /// Connections open.
    pub connections_active: AtomicU64,
    /// Prompt tokens of requests in flight here whose first token has not come, less predicted hits.
    pub prefill_tokens: AtomicU64,
    /// How busy it is, as a header for whoever sent a request; made when its feed tells, if it is beside us.
    pub report: ArcSwapOption<HeaderValue>,
    /// Its name as a header, made when it is first told.
    pub id_header: OnceLock<Option<HeaderValue>>,
    /// The admin wants it to be left: nothing new goes there, and what can move moves.
    pub leaving: AtomicBool,
    /// Until when it is passed over after a failure, in ms on [`clock_ms`]'s clock; 0 is not.
    pub inhibited_until_ms: AtomicU64,
    /// When it was last found dead, or was no longer heard of; 0: never.
    pub fell_ms: AtomicU64,
}

/// Milliseconds on a monotonic clock that starts with the process.
#[must_use]
pub fn clock_ms() -> u64 {
    static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_millis() as u64
}

/// How long an endpoint is passed over after it refused or broke a connection.
pub const INHIBIT_MS: u64 = 1_000;

impl Endpoint {
    /// Its name in the fleet as a header; `None` if it cannot be one.
    #[must_use]
    pub fn id_header(&self) -> Option<HeaderValue> {
        let made = || HeaderValue::from_str(&self.id.0).ok();
        self.stats.id_header.get_or_init(made).clone()
    }

    /// May a request go there? An endpoint nothing is told of (an ordinary server) is alive until it fails.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        if self.is_draining() {
            return false;
        }
        if self.via == Via::Plain {
            return true;
        }
        self.live.load().is_alive()
    }

    /// It was found dead just now, or is no longer heard of: a break, if it was alive before.
    pub fn note_fall(&self, before: &Live) {
        if before.is_alive() {
            self.stats.fell_ms.store(clock_ms().max(1), Relaxed);
        }
    }

    /// When that was last.
    #[must_use]
    pub fn fell_at(&self) -> Option<Instant> {
        let fell = self.stats.fell_ms.load(Relaxed);
        let ago = Duration::from_millis(clock_ms().saturating_sub(fell));
        (fell > 0)
            .then(|| Instant::now().checked_sub(ago))
            .flatten()
    }

    /// Alive, and serving `model` if one is named: both answers from one look.
    #[must_use]
    pub fn fits(&self, model: Option<&str>) -> bool {
        if self.is_draining() {
            return false;
        }
        if self.via == Via::Plain {
            return true;
        }
        let live = self.live.load();
        let models = &live.state.models;
        let serves = |model| models.is_empty() || models.iter().any(|known| known.id == model);
        live.is_alive() && model.is_none_or(serves)
    }

    /// What it is used for.
    #[must_use]
    pub fn role(&self) -> Role {
        self.live.load().state.role
    }

    /// Whether configuration or the admin took it out.
    fn is_draining(&self) -> bool {
        self.health_status == HealthStatus::Draining || self.stats.leaving.load(Relaxed)
    }

    /// What is known of its health, all in all.
    #[must_use]
    pub fn level(&self) -> Level {
        use outrigger_xds::report::Health;
        if !self.is_alive() {
            return Level::Out;
        }
        let told = self.live.load().state.health;
        let failed = Host::FAILED_ACTIVE_HC | Host::FAILED_OUTLIER_CHECK;
        if told == Health::Unhealthy || self.host.has(failed) {
            return Level::Unhealthy;
        }
        match self.health_status {
            HealthStatus::Unhealthy => Level::Unhealthy,
            HealthStatus::Draining => Level::Out,
            HealthStatus::Healthy if !self.host.has(Host::DEGRADED_ACTIVE_HC) => Level::Healthy,
            HealthStatus::Healthy | HealthStatus::Degraded => Level::Degraded,
        }
    }

    /// Whether it was passed over lately because it failed.
    #[must_use]
    pub fn is_inhibited(&self) -> bool {
        let until = self.stats.inhibited_until_ms.load(Relaxed);
        until != 0 && clock_ms() < until
    }

    /// Notes a failure of the connection itself: others are preferred for [`INHIBIT_MS`].
    pub fn inhibit(&self) {
        self.stats
            .inhibited_until_ms
            .store(clock_ms() + INHIBIT_MS, Relaxed);
    }

    /// Whether it serves `model`, as base model or adapter. An engine that told no models serves any.
    #[must_use]
    pub fn serves(&self, model: &str) -> bool {
        let live = self.live.load();
        live.state.models.is_empty() || live.state.models.iter().any(|known| known.id == model)
    }
}

/// What a request will ask of the endpoint that gets it.
#[derive(Debug, Clone, Default)]
pub struct Want {
    /// Prompt tokens; 0 if unknown.
    pub prompt_tokens: u64,
    /// Of these, predicted to be cached there.
    pub hit_tokens: u64,
    /// Chain hashes of the prompt's full blocks.
    pub blocks: Arc<[BlockHash]>,
    /// Which circuit breakers count.
    pub priority: Priority,
    /// Says why it is dropped before its end, if that is the endpoint's fault.
    pub given_up: GivenUp,
}

/// A request counted against an endpoint until dropped.
pub trait Reservation: Send + Sync {
    /// The first byte of the response came: prefill is over.
    fn first_byte(&mut self);
    /// The status of its response came.
    fn status(&mut self, status: http::StatusCode);
    /// Whether it wants to know how long tokens after the first take.
    fn watches_tokens(&self) -> bool {
        false
    }
    /// The first token of a stream came after so long; so many tokens of the prompt had to be computed before.
    fn first_token(&mut self, took: Duration, uncached_tokens: u64) {
        let _ = (took, uncached_tokens);
    }
    /// A later token was waited for so long.
    fn later_token(&mut self, waited: Duration) {
        let _ = waited;
    }
    /// Whether it wants to know what streams, and whole answers that an engine had to compute, bring.
    fn watches_answers(&self) -> bool {
        false
    }
    /// A piece of one came; an engine reports its own failure in one, too.
    fn answer_piece(&mut self, is_failure: bool) {
        let _ = is_failure;
    }
    /// A load report came, in headers or trailers.
    fn report(&mut self, headers: &HeaderMap);
    /// It ended, whole or for this reason; dropping without it counts as cancelled.
    fn finish(&mut self, broken: Option<Flag>);
}

/// A place at an endpoint that waits for its request.
pub struct Place {
    /// Whose.
    pub endpoint: EngineId,
    /// It is counted there as the request would be.
    pub reservation: Box<dyn Reservation>,
    /// The same at the proxy beside the engine, if that is a peer and knows leases.
    pub lease: Option<Lease>,
}

/// The fleet.
pub trait Endpoints: Send + Sync {
    /// A cluster as it is now; `None` if there is no such cluster.
    fn view(&self, cluster: &str) -> Option<Arc<ClusterView>>;

    /// One of `candidates` (indexes into it) by the cluster's own policy and what it knows of their health; `None` if
    /// there are none that may be used. `hash` is the request's, for policies that choose by it.
    fn choose(
        &self,
        view: &ClusterView,
        candidates: &[Arc<Endpoint>],
        hash: Option<u64>,
    ) -> Option<usize>;

    /// The endpoint at an address, in a cluster of type `ORIGINAL_DST`; `None` if it is no such cluster, or has too many.
    fn original(&self, view: &ClusterView, address: SocketAddr) -> Option<Arc<Endpoint>> {
        let _ = (view, address);
        None
    }

    /// Counts a leg against an endpoint. The endpoint beside us is told at once; one behind a peer learns it from the
    /// request itself, and its proxy may refuse.
    ///
    /// # Errors
    /// The endpoint beside us refuses (a limit, draining); the error carries its load in the message.
    fn reserve(
        &self,
        view: &ClusterView,
        endpoint: &Arc<Endpoint>,
        want: &Want,
    ) -> Result<Box<dyn Reservation>, Error>;
}
