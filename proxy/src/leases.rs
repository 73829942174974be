//! Places at engines beside this proxy that peers hold for requests to come.
//!
//! A place counts as its request will: in what is told of the engine's load, and against the cluster's limits. It ends with
//! the holder's word, with the request that takes it over, or a second after it was asked for last.

use crate::{route::Target, snapshot::HttpConfig};
use ahash::AHashMap;
use http::{HeaderMap, HeaderValue, Response, StatusCode, request::Parts};
use outrigger_filters::{
    body::{ResponseBody, empty},
    endpoints::{ClusterView, Endpoints, Place, Via, Want},
    lease::{FREE, LEASE, LEASE_HEADER},
    router::attempt,
};
use outrigger_xds::report::EngineId;
use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Instant,
};

/// Places that are held at once for all peers.
const LEASES_MAX: usize = 4096;

/// What a peer holds.
struct Held {
    /// Until its request took it: what is asked for later than that is too late.
    place: Option<Place>,
    until: Instant,
}

/// All that is held.
pub struct Leases {
    endpoints: Arc<dyn Endpoints>,
    held: Mutex<AHashMap<HeaderValue, Held>>,
}

impl Leases {
    /// Nothing yet.
    #[must_use]
    pub fn new(endpoints: Arc<dyn Endpoints>) -> Arc<Self> {
        Arc::new(Self {
            endpoints,
            held: Mutex::default(),
        })
    }

    fn held(&self) -> MutexGuard<'_, AHashMap<HeaderValue, Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a peer is told that asks for a place, asks again, or gives it back.
    #[must_use]
    pub fn answer(self: &Arc<Self>, config: &HttpConfig, parts: &Parts) -> Response<ResponseBody> {
        let status = match parts.headers.get(LEASE_HEADER) {
            None => StatusCode::BAD_REQUEST,
            Some(name) if parts.uri.path() == FREE => {
                self.end(name);
                StatusCode::OK
            }
            Some(name) => self.hold(name, config, parts),
        };
        let mut response = Response::new(empty());
        *response.status_mut() = status;
        let known = HeaderValue::from_static("1");
        response.headers_mut().insert(LEASE_HEADER, known);
        response
    }

    fn hold(
        self: &Arc<Self>,
        name: &HeaderValue,
        config: &HttpConfig,
        parts: &Parts,
    ) -> StatusCode {
        let until = Instant::now() + LEASE;
        let mut held = self.held();
        if let Some(known) = held.get_mut(name) {
            known.until = until;
            return StatusCode::OK;
        }
        if held.len() >= LEASES_MAX {
            return StatusCode::SERVICE_UNAVAILABLE;
        }
        match self.place(config, parts) {
            None => StatusCode::NOT_FOUND,
            Some(None) => StatusCode::SERVICE_UNAVAILABLE,
            Some(place) => {
                held.insert(name.clone(), Held { place, until });
                tell(held.len());
                tokio::spawn(watch(Arc::downgrade(self), name.clone()));
                StatusCode::OK
            }
        }
    }

    /// A place as it is asked for, if there is one; `None` if there is no such engine.
    fn place(&self, config: &HttpConfig, parts: &Parts) -> Option<Option<Place>> {
        let headers = &parts.headers;
        let engine = headers.get(attempt::ENDPOINT_HEADER)?.to_str().ok()?;
        let engine = EngineId::from(engine);
        let view = self.view(config, parts)?;
        let mut beside = view.endpoints.iter();
        let endpoint =
            beside.find(|endpoint| endpoint.id == engine && endpoint.via == Via::Local)?;
        let prompt = attempt::told(headers);
        let want = Want {
            prompt_tokens: prompt.tokens,
            hit_tokens: attempt::told_hits(headers).unwrap_or(0),
            blocks: prompt.blocks,
            ..Want::default()
        };
        let reserve = || self.endpoints.reserve(&view, endpoint, &want).ok();
        let reserved = endpoint.is_alive().then(reserve).flatten();
        Some(reserved.map(|reservation| Place {
            endpoint: engine,
            reservation,
            lease: None,
        }))
    }

    /// The cluster that the request will go to.
    fn view(&self, config: &HttpConfig, parts: &Parts) -> Option<Arc<ClusterView>> {
        let Target::Chain { choice, .. } = &config.route(parts)?.target else {
            return None;
        };
        let cluster = &choice.destination(&parts.headers).cluster;
        self.endpoints.view(&cluster.facts(&parts.headers).cluster)
    }

    /// The place that is held for a request, if it says so.
    pub fn take(&self, headers: &HeaderMap) -> Option<Place> {
        let name = headers.get(LEASE_HEADER)?;
        self.held().get_mut(name)?.place.take()
    }

    fn end(&self, name: &HeaderValue) {
        let mut held = self.held();
        // What it counts ends outside the lock.
        let ended = held.remove(name);
        tell(held.len());
        drop((held, ended));
    }

    /// When it ends, unless it is asked for again.
    fn until(&self, name: &HeaderValue) -> Option<Instant> {
        self.held().get(name).map(|known| known.until)
    }

    fn lapse(&self, name: &HeaderValue) {
        let held = self.held();
        let unused = held.get(name).is_some_and(|known| known.place.is_some());
        drop(held);
        if unused {
            metrics::counter!("outrigger_leases_lapsed_total").increment(1);
        }
        self.end(name);
    }
}

fn tell(held: usize) {
    metrics::gauge!("outrigger_leases_held").set(held as f64);
}

/// Ends a lease when its time is over.
async fn watch(leases: Weak<Leases>, name: HeaderValue) {
    while let Some(leases) = leases.upgrade()
        && let Some(until) = leases.until(&name)
    {
        if until <= Instant::now() {
            return leases.lapse(&name);
        }
        drop(leases);
        tokio::time::sleep_until(until.into()).await;
    }
}
