//! A control plane of the tests' own, in both protocols, by all services: it answers as a simple server does, tells at once
//! what changes, and remembers all that it was told.

use super::ads_services;
use futures_util::{Stream, StreamExt, stream};
use outrigger_conformance::harness::eventually;
use outrigger_xds::{
    resource::{
        ads::{Ads, GrpcService, Target},
        config_source::{ConfigSource, INITIAL_FETCH_TIMEOUT_DEFAULT, Origin},
        endpoint::Address,
        route::TypedConfig,
    },
    subscription::Protocol,
    wire::{
        envoy::service::discovery::v3::{
            DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
            Resource, ResourceError, ResourceName,
        },
        google::rpc::Status as Detail,
    },
};
use prost_types::Any;
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    path::PathBuf,
    pin::Pin,
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::sync::{mpsc, watch};
use tonic::{Code, Request, Response, Status, Streaming};

/// A resource with its version and life.
#[derive(Clone)]
struct Entry {
    version: u64,
    any: Any,
    ttl: Option<Duration>,
}

/// What it has, by type and name.
#[derive(Default)]
pub(super) struct World {
    resources: BTreeMap<String, BTreeMap<String, Entry>>,
    version: u64,
    versions: BTreeMap<String, u64>,
    heard: Vec<Value>,
    /// Nothing is answered.
    mute: bool,
    /// What was refused is sent again at once.
    stubborn: bool,
    /// What it cannot send, by type: name and why.
    broken: BTreeMap<String, Vec<(String, String)>>,
    /// Whoever asks for it has its stream ended.
    denied: Option<String>,
}

impl World {
    /// What of that a stream is told that wants these.
    fn errors(&self, type_url: &str, watched: &Watched) -> Vec<ResourceError> {
        let all = self.broken.get(type_url).into_iter().flatten();
        let wanted = all.filter(|(name, _)| watched.all || watched.names.contains(name));
        let each = wanted.map(|(name, why)| ResourceError {
            resource_name: Some(ResourceName { name: name.clone() }),
            error_detail: Some(Detail {
                code: Code::Unavailable.into(),
                message: why.clone(),
            }),
        });
        each.collect()
    }

    /// Whether the last request asked for what is not given away.
    fn is_denied(&self) -> bool {
        let names = self.heard.last().and_then(|last| last["names"].as_array());
        let denied = self.denied.as_ref();
        denied.is_some_and(|denied| names.is_some_and(|names| names.contains(&json!(denied))))
    }
}

type Shared = Arc<Mutex<World>>;

/// A control plane. It ends, with all its connections, when it is dropped.
pub(super) struct AdsServer {
    pub(super) address: SocketAddr,
    /// Where it listens as well, if anywhere.
    pipe: Option<PathBuf>,
    world: Shared,
    changed: watch::Sender<u64>,
    runtime: Option<tokio::runtime::Runtime>,
}

fn any(resource: &Value) -> (String, Any) {
    let names = ["name", "cluster_name"];
    let name = names.iter().find_map(|key| resource[*key].as_str());
    let config = TypedConfig::from_json(resource).unwrap();
    (name.unwrap().to_owned(), Any::from(&config))
}

impl AdsServer {
    pub(super) fn start() -> Self {
        Self::also_at(None)
    }

    /// One that is reached by a pipe as well.
    pub(super) fn also_at(pipe: Option<PathBuf>) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut server = Self {
            address: listener.local_addr().unwrap(),
            pipe,
            world: Shared::default(),
            changed: watch::Sender::new(0),
            runtime: None,
        };
        server.serve(listener);
        server
    }

    fn serve(&mut self, listener: std::net::TcpListener) {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let service = Service {
            world: self.world.clone(),
            changed: self.changed.clone(),
        };
        ads_services::serve(&runtime, &service, listener, self.pipe.as_deref());
        self.runtime = Some(runtime);
    }

    /// It is gone, and its connections with it; what it has stays.
    pub(super) fn kill(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }

    /// It is there again, at the same address.
    pub(super) async fn revive(&mut self) {
        let listener = eventually("its port is free", || async {
            std::net::TcpListener::bind(self.address).ok()
        });
        let listener = listener.await;
        self.serve(listener);
    }

    fn change(&self, change: impl FnOnce(&mut World)) {
        change(&mut self.world.lock().unwrap());
        self.changed.send_modify(|count| *count += 1);
    }

    /// Has these from now on.
    pub(super) fn put(&self, resources: &[Value]) {
        self.put_any(resources.iter().map(any).collect(), None);
    }

    /// The same, for a while.
    pub(super) fn put_for(&self, resource: &Value, ttl: Duration) {
        self.put_any(vec![any(resource)], Some(ttl));
    }

    /// Has these bytes under these names.
    pub(super) fn put_any(&self, resources: Vec<(String, Any)>, ttl: Option<Duration>) {
        self.change(|world| {
            world.version += 1;
            let version = world.version;
            for (name, any) in resources {
                world.versions.insert(any.type_url.clone(), version);
                let of_type = world.resources.entry(any.type_url.clone()).or_default();
                of_type.insert(name, Entry { version, any, ttl });
            }
        });
    }

    /// Has it no more.
    pub(super) fn remove(&self, message: &str, name: &str) {
        let type_url = format!("type.googleapis.com/{message}");
        self.change(|world| {
            world.version += 1;
            let version = world.version;
            world.versions.insert(type_url.clone(), version);
            world.resources.entry(type_url).or_default().remove(name);
        });
    }

    /// It cannot send one of these any more, or for the first time.
    pub(super) fn breaks(&self, message: &str, name: &str, why: &str) {
        let type_url = format!("type.googleapis.com/{message}");
        self.change(|world| {
            world.version += 1;
            let version = world.version;
            world.versions.insert(type_url.clone(), version);
            let broken = world.broken.entry(type_url).or_default();
            broken.push((name.to_owned(), why.to_owned()));
        });
    }

    /// It can send all again.
    pub(super) fn mends(&self) {
        self.change(|world| world.broken.clear());
    }

    /// Whether it answers at all.
    pub(super) fn mute(&self, mute: bool) {
        self.change(|world| world.mute = mute);
    }

    /// Whether it sends again what was refused.
    pub(super) fn stubborn(&self) {
        self.change(|world| world.stubborn = true);
    }

    /// Ends the stream of whoever asks for it.
    pub(super) fn deny(&self, name: &str) {
        self.change(|world| world.denied = Some(name.to_owned()));
    }

    /// All requests so far.
    pub(super) fn heard(&self) -> Vec<Value> {
        self.world.lock().unwrap().heard.clone()
    }

    /// Forgets what it was told.
    pub(super) fn forget(&self) {
        self.world.lock().unwrap().heard.clear();
    }

    /// The first request of which this is true, as soon as there is one.
    pub(super) async fn hears(&self, what: &str, is_it: impl Fn(&Value) -> bool) -> Value {
        eventually(what, || async { self.heard().into_iter().find(&is_it) }).await
    }

    /// As a proxy is told of it.
    pub(super) fn as_configured(&self, protocol: Protocol) -> Ads {
        ads(protocol, &[self.address])
    }
}

impl Drop for AdsServer {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A control plane with these servers.
pub(super) fn ads(protocol: Protocol, servers: &[SocketAddr]) -> Ads {
    let server = |at: &SocketAddr| GrpcService {
        target: Target::Address {
            address: Address {
                host: at.ip().to_string(),
                port: at.port(),
            },
            uri: at.to_string(),
            stat_prefix: "xds".into(),
        },
        initial_metadata: vec![("x-token".into(), "secret".into())],
    };
    Ads {
        protocol,
        servers: servers.iter().map(server).collect(),
        rate_limit: None,
    }
}

pub(super) fn from_ads() -> ConfigSource {
    ConfigSource {
        origin: Origin::Ads,
        initial_fetch_timeout: INITIAL_FETCH_TIMEOUT_DEFAULT,
    }
}

#[derive(Clone)]
pub(super) struct Service {
    world: Shared,
    changed: watch::Sender<u64>,
}

pub(super) type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// What one stream was told of one type.
#[derive(Default)]
struct Watched {
    names: BTreeSet<String>,
    all: bool,
    sent: BTreeMap<String, u64>,
    version: u64,
    nonce: String,
}

impl Watched {
    fn wanted(&self, world: &World, type_url: &str) -> BTreeMap<String, Entry> {
        let all = world.resources.get(type_url).into_iter().flatten();
        let wanted = all.filter(|(name, _)| self.all || self.names.contains(*name));
        wanted
            .map(|(name, entry)| (name.clone(), entry.clone()))
            .collect()
    }
}

fn kind(type_url: &str) -> &str {
    type_url.rsplit('.').next().unwrap_or_default()
}

fn is_whole(type_url: &str) -> bool {
    matches!(kind(type_url), "Cluster" | "Listener")
}

/// A stream of either protocol: hears a request, or that something changed, and says what is to be said.
pub(super) trait Variant: Send + 'static {
    type Request: Send + 'static;
    type Answer: Send + 'static;
    fn by(service: &'static str) -> Self;
    fn hear(&mut self, world: &mut World, request: Self::Request) -> Vec<Self::Answer>;
    fn look(&mut self, world: &mut World) -> Vec<Self::Answer>;
}

/// A stream of one service.
pub(super) fn converse<V: Variant>(
    service: &Service,
    request: Request<Streaming<V::Request>>,
    name: &'static str,
) -> Result<Response<Answers<V::Answer>>, Status> {
    authorized(&request)?;
    let (mut requests, mut variant) = (request.into_inner(), V::by(name));
    let (sender, receiver) = mpsc::channel(16);
    let world = service.world.clone();
    let mut changed = service.changed.subscribe();
    tokio::spawn(async move {
        loop {
            let answers = tokio::select! {
                request = requests.message() => {
                    let Ok(Some(request)) = request else { return };
                    let (answers, is_denied) = {
                        let mut world = world.lock().unwrap();
                        (variant.hear(&mut world, request), world.is_denied())
                    };
                    if is_denied {
                        let denied = Status::invalid_argument("not for you");
                        let _ = sender.send(Err(denied)).await;
                        return;
                    }
                    answers
                }
                changed = changed.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    variant.look(&mut world.lock().unwrap())
                }
            };
            for answer in answers {
                if sender.send(Ok(answer)).await.is_err() {
                    return;
                }
            }
        }
    });
    let answers = stream::unfold(receiver, |mut receiver| async move {
        Some((receiver.recv().await?, receiver))
    });
    Ok(Response::new(answers.boxed()))
}

#[derive(Default)]
pub(super) struct State {
    service: &'static str,
    watched: BTreeMap<String, Watched>,
    nonces: u64,
}

impl State {
    fn say(&mut self, world: &World, type_url: &str) -> Vec<DiscoveryResponse> {
        if world.mute {
            return Vec::new();
        }
        self.nonces += 1;
        let watched = self.watched.entry(type_url.to_owned()).or_default();
        watched.version = world.versions.get(type_url).copied().unwrap_or_default();
        watched.nonce = format!("s{}", self.nonces);
        let errors = world.errors(type_url, watched);
        let wanted = watched.wanted(world, type_url);
        let resources = wanted.into_iter().map(|(name, entry)| match entry.ttl {
            None => entry.any,
            Some(_) => wrapped(name, entry),
        });
        vec![DiscoveryResponse {
            version_info: watched.version.to_string(),
            resources: resources.collect(),
            type_url: type_url.to_owned(),
            nonce: watched.nonce.clone(),
            resource_errors: errors,
        }]
    }
}

fn wrapped(name: String, entry: Entry) -> Any {
    use prost::Message;
    Any {
        type_url: "type.googleapis.com/envoy.service.discovery.v3.Resource".into(),
        value: resource(name, entry).encode_to_vec(),
    }
}

fn resource(name: String, entry: Entry) -> Resource {
    Resource {
        version: entry.version.to_string(),
        resource: Some(entry.any),
        name,
        ttl: entry.ttl.map(|ttl| ttl.try_into().unwrap()),
    }
}

impl Variant for State {
    type Request = DiscoveryRequest;
    type Answer = DiscoveryResponse;

    fn by(service: &'static str) -> Self {
        Self {
            service,
            ..Self::default()
        }
    }

    fn hear(&mut self, world: &mut World, request: DiscoveryRequest) -> Vec<DiscoveryResponse> {
        let error = request.error_detail.map(|error| error.message);
        world.heard.push(json!({
            "service": self.service,
            "type": kind(&request.type_url),
            "names": request.resource_names,
            "version": request.version_info,
            "nonce": request.response_nonce,
            "error": error,
            "node": request.node.as_ref().map(|node| (&node.id, &node.user_agent_name)),
        }));
        let type_url = request.type_url;
        let first = !self.watched.contains_key(&type_url);
        let watched = self.watched.entry(type_url.clone()).or_default();
        let names: BTreeSet<String> = request.resource_names.into_iter().collect();
        let other = names != watched.names;
        watched.all = names.is_empty() && is_whole(&type_url);
        watched.names = names;
        let version = world.versions.get(&type_url).copied().unwrap_or_default();
        let is_news = first && request.version_info != version.to_string();
        if is_news || (other && !first) || (world.stubborn && error.is_some()) {
            return self.say(world, &type_url);
        }
        if first {
            watched.version = version;
        }
        Vec::new()
    }

    fn look(&mut self, world: &mut World) -> Vec<DiscoveryResponse> {
        let of = |type_url: &str| world.versions.get(type_url).copied().unwrap_or_default();
        let news = self.watched.iter().filter(|(type_url, watched)| {
            of(type_url) > watched.version
                && (watched.all || !watched.wanted(world, type_url).is_empty())
        });
        let news: Vec<String> = news.map(|(type_url, _)| type_url.clone()).collect();
        news.iter()
            .flat_map(|type_url| self.say(world, type_url))
            .collect()
    }
}

#[derive(Default)]
pub(super) struct Delta {
    service: &'static str,
    watched: BTreeMap<String, Watched>,
    nonces: u64,
}

impl Delta {
    fn say(
        &mut self,
        world: &World,
        type_url: &str,
        asked: &[String],
    ) -> Vec<DeltaDiscoveryResponse> {
        if world.mute {
            return Vec::new();
        }
        let watched = self.watched.entry(type_url.to_owned()).or_default();
        let wanted = watched.wanted(world, type_url);
        let versions = wanted
            .iter()
            .map(|(name, entry)| (name.clone(), entry.version));
        let sent = std::mem::replace(&mut watched.sent, versions.collect());
        let gone = sent.keys().filter(|name| !wanted.contains_key(*name));
        let unknown = asked.iter().filter(|name| !wanted.contains_key(*name));
        let errors = world.errors(type_url, watched);
        let is_broken = |name: &&String| {
            let name = Some(*name);
            let broken = errors.iter().map(|error| error.resource_name.as_ref());
            broken.flatten().any(|known| Some(&known.name) == name)
        };
        let absent = gone.chain(unknown).filter(|name| !is_broken(name));
        let removed: BTreeSet<String> = absent.cloned().collect();
        let new = wanted
            .into_iter()
            .filter(|(name, entry)| sent.get(name) != Some(&entry.version));
        let resources: Vec<Resource> = new.map(|(name, entry)| resource(name, entry)).collect();
        if resources.is_empty() && removed.is_empty() && errors.is_empty() {
            return Vec::new();
        }
        self.nonces += 1;
        vec![DeltaDiscoveryResponse {
            system_version_info: world.version.to_string(),
            resources,
            type_url: type_url.to_owned(),
            nonce: format!("d{}", self.nonces),
            removed_resources: removed.into_iter().collect(),
            resource_errors: errors,
        }]
    }
}

impl Variant for Delta {
    type Request = DeltaDiscoveryRequest;
    type Answer = DeltaDiscoveryResponse;

    fn by(service: &'static str) -> Self {
        Self {
            service,
            ..Self::default()
        }
    }

    fn hear(
        &mut self,
        world: &mut World,
        request: DeltaDiscoveryRequest,
    ) -> Vec<DeltaDiscoveryResponse> {
        let error = request.error_detail.map(|error| error.message);
        world.heard.push(json!({
            "service": self.service,
            "type": kind(&request.type_url),
            "names": request.resource_names_subscribe,
            "gone": request.resource_names_unsubscribe,
            "versions": request.initial_resource_versions,
            "nonce": request.response_nonce,
            "error": error,
            "node": request.node.as_ref().map(|node| (&node.id, &node.user_agent_name)),
        }));
        let type_url = request.type_url;
        let first = !self.watched.contains_key(&type_url);
        let watched = self.watched.entry(type_url.clone()).or_default();
        let asked = request.resource_names_subscribe;
        if first {
            watched.all = asked.is_empty() && is_whole(&type_url);
            let known = request.initial_resource_versions.into_iter();
            watched.sent = known
                .map(|(name, version)| (name, version.parse().unwrap_or_default()))
                .collect();
        } else {
            watched.sent.retain(|name, _| !asked.contains(name));
        }
        for name in &request.resource_names_unsubscribe {
            watched.names.remove(name);
            watched.sent.remove(name);
        }
        watched.names.extend(asked.iter().cloned());
        if world.stubborn && error.is_some() {
            watched.sent.clear();
        }
        self.say(world, &type_url, &asked)
    }

    fn look(&mut self, world: &mut World) -> Vec<DeltaDiscoveryResponse> {
        let all: Vec<String> = self.watched.keys().cloned().collect();
        all.iter()
            .flat_map(|type_url| self.say(world, type_url, &[]))
            .collect()
    }
}

/// Its `initial_metadata` must have come.
fn authorized<T>(request: &Request<T>) -> Result<(), Status> {
    match request.metadata().get("x-token") {
        Some(token) if token == "secret" => Ok(()),
        _ => Err(Status::unauthenticated("who are you?")),
    }
}
