//! A fleet without sockets: endpoints whose state the test sets, and engines that are closures.

use arc_swap::ArcSwap;
use futures_util::future::BoxFuture;
use http::{Request, Response, StatusCode};
use outrigger_filters::{
    body::{RequestBody, ResponseBody, full},
    endpoints::{
        ClusterView, Endpoint, Endpoints, Live, Reservation, SendOptions, Upstream, Via, Want,
    },
    error::{Error, Flag},
    filter::{Chain, Context, Handled, HttpFilter, Next, Ranked, RouteFacts, StreamObserver},
    kv_index::{KvIndex, Limits},
    registry,
    services::Services,
    tokens::{Tokenizers, TokenizersConfig},
};
use outrigger_xds::{
    report::{EngineId, EngineKind, EngineState, Health, Load, Model},
    resource::{cluster::LbPolicy, route::TypedConfig},
};
use std::{
    path::PathBuf,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

/// What an engine answers: path and body in, status and body out.
pub(crate) type Engine = Arc<dyn Fn(&str, &[u8]) -> (StatusCode, String) + Send + Sync>;

/// One question that came to an engine: endpoint, path, headers.
#[derive(Debug, Clone)]
pub(crate) struct Asked {
    pub(crate) endpoint: EngineId,
    pub(crate) path: String,
    pub(crate) headers: http::HeaderMap,
}

pub(crate) struct Fleet {
    pub(crate) endpoints: Vec<Arc<Endpoint>>,
    pub(crate) asked: Arc<Mutex<Vec<Asked>>>,
    pub(crate) services: Services,
}

struct View(Vec<Arc<Endpoint>>);

impl Endpoints for View {
    fn view(&self, cluster: &str) -> Option<Arc<ClusterView>> {
        (cluster == "engines").then(|| {
            Arc::new(ClusterView {
                name: cluster.into(),
                lb_policy: LbPolicy::default(),
                connect_timeout: Duration::from_secs(5),
                silent_peer: false,
                original_dst: None,
                plain: false,
                even: true,
                override_host: Arc::default(),
                breakers: Arc::default(),
                endpoints: self.0.clone(),
            })
        })
    }

    fn choose(
        &self,
        _view: &ClusterView,
        candidates: &[Arc<Endpoint>],
        _hash: Option<u64>,
    ) -> Option<usize> {
        (!candidates.is_empty()).then_some(0)
    }

    fn reserve(
        &self,
        _view: &ClusterView,
        _endpoint: &Arc<Endpoint>,
        _want: &Want,
    ) -> Result<Box<dyn Reservation>, Error> {
        Ok(Box::new(Free))
    }
}

/// A reservation that nobody counts.
struct Free;

impl Reservation for Free {
    fn report(&mut self, _headers: &http::HeaderMap) {}

    fn first_byte(&mut self) {}
    fn status(&mut self, _status: StatusCode) {}
    fn finish(&mut self, _broken: Option<Flag>) {}
}

struct Answers {
    engine: Engine,
    asked: Arc<Mutex<Vec<Asked>>>,
}

impl Upstream for Answers {
    fn send<'a>(
        &'a self,
        endpoint: &'a Arc<Endpoint>,
        request: &'a mut Request<RequestBody>,
        _options: SendOptions,
    ) -> BoxFuture<'a, Result<Response<ResponseBody>, Error>> {
        Box::pin(async move {
            let asked = Asked {
                endpoint: endpoint.id.clone(),
                path: request.uri().path().to_owned(),
                headers: request.headers().clone(),
            };
            let path = asked.path.clone();
            self.asked.lock().unwrap().push(asked);
            let body = request.body().whole().cloned().unwrap_or_default();
            let (status, answer) = (self.engine)(&path, &body);
            let mut response = Response::new(full(answer));
            *response.status_mut() = status;
            Ok(response)
        })
    }
}

/// The state of a vLLM that serves `m` and the adapter `m-lora`, with files at `root`.
pub(crate) fn vllm(root: &str) -> EngineState {
    let model = |id: &str, parent: Option<&str>| Model {
        id: id.into(),
        parent: parent.map(Into::into),
        root: root.into(),
        ..Model::default()
    };
    EngineState {
        kind: EngineKind::Vllm,
        models: vec![model("m", None), model("m-lora", Some("m"))],
        health: Health::Healthy,
        block_tokens: 32,
        dp_size: 1,
        kv_events: true,
        ..EngineState::default()
    }
}

impl Fleet {
    /// One endpoint per entry of `vias`, all with `state`.
    pub(crate) fn new(vias: &[Via], state: &EngineState, engine: Engine) -> Self {
        let kv_index = Arc::new(KvIndex::new(Limits::default()));
        let endpoints: Vec<Arc<Endpoint>> = vias
            .iter()
            .enumerate()
            .map(|(index, via)| {
                let id = EngineId(format!("e{index}").into());
                let live = Live {
                    state: Arc::new(state.clone()),
                    heard: true,
                    ..Live::default()
                };
                Arc::new(Endpoint {
                    slot: kv_index.slot(&id),
                    id,
                    via: *via,
                    weight: 1,
                    cluster: "engines".into(),
                    live: Arc::new(ArcSwap::from_pointee(live)),
                    ..Endpoint::default()
                })
            })
            .collect();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let services = Services {
            endpoints: Arc::new(View(endpoints.clone())),
            upstream: Arc::new(Answers {
                engine,
                asked: asked.clone(),
            }),
            kv_index,
            tokenizers: Arc::new(Tokenizers::new(TokenizersConfig::default())),
            compute: tokio::runtime::Handle::current(),
            migration: Arc::default(),
            token_limits: Arc::default(),
            serving: Arc::default(),
            node_cluster: Arc::default(),
            own_host: None,
            runtime: Arc::default(),
            stat_prefix: Arc::default(),
        };
        Self {
            endpoints,
            asked,
            services,
        }
    }

    pub(crate) fn paths(&self) -> Vec<String> {
        self.asked
            .lock()
            .unwrap()
            .iter()
            .map(|asked| asked.path.clone())
            .collect()
    }

    /// Tells a new load of one endpoint.
    pub(crate) fn tell(&self, index: usize, load: Load) {
        let live = Live::clone(&self.endpoints[index].live.load());
        self.endpoints[index].live.store(Arc::new(Live {
            load,
            load_at: Instant::now(),
            ..live
        }));
    }

    pub(crate) fn change(&self, index: usize, change: impl FnOnce(&mut EngineState)) {
        let mut live = Live::clone(&self.endpoints[index].live.load());
        change(Arc::make_mut(&mut live.state));
        self.endpoints[index].live.store(Arc::new(live));
    }

    /// The chain of `filters`, then the router: requests come to the engines.
    pub(crate) fn chain_to_engines(&self, filters: &[(&str, serde_json::Value)]) -> Chain {
        let router = (outrigger_filters::router::TYPE_URL, serde_json::json!({}));
        let all = filters.iter().chain(std::iter::once(&router));
        all.map(|(type_url, value)| {
            let config = TypedConfig {
                type_url: (*type_url).into(),
                value: value.clone(),
            };
            registry::build(&config, &[], &self.services).unwrap()
        })
        .collect()
    }

    /// The chain of `openai`, then `more`, then a filter that answers and leaves everything in the [`Outcome`].
    pub(crate) fn chain(&self, more: &[(&str, serde_json::Value)]) -> (Chain, Arc<Last>) {
        let last = Arc::new(Last::default());
        let mut filters: Vec<Arc<dyn HttpFilter>> = Vec::new();
        for (type_url, value) in more {
            let config = TypedConfig {
                type_url: (*type_url).into(),
                value: value.clone(),
            };
            filters.push(registry::build(&config, &[], &self.services).unwrap());
        }
        filters.push(last.clone());
        (filters.into(), last)
    }
}

/// What came to the end of the chain.
#[derive(Default)]
pub(crate) struct Last {
    pub(crate) body: Mutex<Option<bytes::Bytes>>,
}

impl HttpFilter for Last {
    fn handle<'a>(
        &'a self,
        request: Request<RequestBody>,
        _context: &'a mut Context,
        _next: Next<'a>,
    ) -> Handled<'a> {
        Box::pin(async move {
            use http_body_util::BodyExt;
            let body = request.into_body().collect().await.unwrap().to_bytes();
            *self.body.lock().unwrap() = Some(body);
            Ok(Response::new(full("ok")))
        })
    }
}

/// A request's context after the chain.
pub(crate) struct Outcome {
    pub(crate) context: Context,
    pub(crate) headers: http::HeaderMap,
}

impl Outcome {
    pub(crate) fn names(&self) -> Vec<String> {
        self.context
            .ranked
            .iter()
            .map(|ranked: &Ranked| ranked.endpoint.id.0.to_string())
            .collect()
    }

    pub(crate) fn decision(&self) -> serde_json::Value {
        serde_json::from_str(self.context.log.routing_decision.as_deref().unwrap()).unwrap()
    }

    pub(crate) fn observer(&mut self) -> Box<dyn StreamObserver> {
        self.context.observers.pop().unwrap()
    }
}

/// Sends a JSON body along a chain.
pub(crate) async fn post(chain: &Chain, path: &str, body: impl Into<bytes::Bytes>) -> Outcome {
    let request = Request::post(path).header("content-type", "application/json");
    run(chain, request.body(RequestBody::full(body)).unwrap()).await
}

pub(crate) async fn run(chain: &Chain, request: Request<RequestBody>) -> Outcome {
    let route = Arc::new(RouteFacts {
        cluster: "engines".into(),
        ..RouteFacts::default()
    });
    let mut context = Context {
        route,
        debug: true,
        ..Context::default()
    };
    let response = Next::new(chain).run(request, &mut context).await.unwrap();
    Outcome {
        context,
        headers: response.headers().clone(),
    }
}

/// A file of the project's recordings of a real vLLM 0.32.0.
pub(crate) fn recording(name: &str) -> String {
    let path = fixtures().join("http-vllm-0.32.0").join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn fixtures() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../conformance/fixtures")
}

/// The small model that the project ships for its simulated engines.
pub(crate) fn small_model() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../conformance/assets")
        .canonicalize()
        .unwrap()
}

pub(crate) const OPENAI: &str = outrigger_filters::openai::TYPE_URL;
pub(crate) const KV: &str = outrigger_filters::kv_routing::TYPE_URL;
