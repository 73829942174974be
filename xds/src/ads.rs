//! One stream of a control plane, by its aggregated discovery service or by that of one type: requests out, answers in.
//!
//! What is asked, and what becomes of an answer, is [`crate::subscription`]'s; when to come again is the caller's. A
//! stream ends at its first error. Requests can be sent before the server says anything.

use crate::{
    feed::Dialer,
    load::binary::Packed,
    problems::causes,
    resource::{ads::MESSAGE_BYTES_MAX_DEFAULT, bootstrap::Node},
    subscription::{Answer, Ask, Kind, Protocol, Request, Sent},
    wire::{
        envoy::{
            config::core::v3 as core, service::discovery::v3 as wire, r#type::v3::SemanticVersion,
        },
        google::rpc::Status as Detail,
    },
};
use futures_util::{Stream, StreamExt, TryFutureExt, stream};
use http::{HeaderName, HeaderValue, uri::PathAndQuery};
use hyper_util::rt::TokioIo;
use prost::{Message, Name};
use prost_types::Any;
use std::{pin::Pin, time::Duration};
use tokio::sync::mpsc;
use tonic::{
    Code, Status, Streaming,
    client::Grpc,
    metadata::MetadataMap,
    transport::{Channel, Endpoint},
};
use tonic_prost::ProstCodec;

/// Requests that wait for the connection.
pub(crate) const REQUESTS_MAX: usize = 16;
/// A request that is not even taken for so long will not be.
pub(crate) const SEND_TIMEOUT: Duration = Duration::from_secs(30);
/// What we understand beyond what every client does.
const CLIENT_FEATURES: [&str; 2] = [
    "xds.config.supports-resource-ttl",
    "xds.config.resource-in-sotw",
];
/// How long a connection to a server may take, unless somebody says otherwise.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How often a server is asked whether it is there.
const PING_INTERVAL: Duration = Duration::from_secs(30);
/// A server that does not say so by then is gone.
const PING_TIMEOUT: Duration = Duration::from_secs(20);
/// Protobuf allows 10,000 years.
const PROTOBUF_SECONDS: u64 = 315_576_000_000;
const NANOS_PER_SECOND: u32 = 1_000_000_000;
/// `error_detail.code` of what was not accepted.
const REFUSED: Code = Code::InvalidArgument;

/// A server of a control plane.
#[derive(Clone)]
pub struct Server {
    /// `:authority` of requests.
    pub authority: String,
    /// Opens a connection.
    pub dialer: Dialer,
    /// Headers of requests.
    pub metadata: Vec<(String, String)>,
    /// Longer messages break the stream.
    pub message_bytes_max: usize,
    /// How long opening a connection may take.
    pub connect_timeout: Duration,
    /// How often it is pinged.
    pub ping_interval: Duration,
    /// A connection is dead that does not answer a ping for so long.
    pub ping_timeout: Duration,
}

impl Server {
    /// That is reached so, without headers and with the usual times.
    #[must_use]
    pub fn new(authority: String, dialer: Dialer) -> Self {
        Self {
            authority,
            dialer,
            metadata: Vec::new(),
            message_bytes_max: MESSAGE_BYTES_MAX_DEFAULT,
            connect_timeout: CONNECT_TIMEOUT,
            ping_interval: PING_INTERVAL,
            ping_timeout: PING_TIMEOUT,
        }
    }
}

/// Why a stream cannot be opened, or ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AdsError {
    /// The server cannot be reached.
    #[error("cannot connect: {0}")]
    Connect(String),
    /// The stream ended.
    #[error("the stream ended: {0}")]
    Broken(String),
}

/// An open stream.
pub struct AdsStream {
    protocol: Protocol,
    node: core::Node,
    requests: Requests,
    answers: Answers,
}

/// What a stream brings.
#[derive(Debug)]
pub enum Event {
    /// The server has taken it. Some say so only with their first answer.
    Accepted,
    /// An answer.
    Answer(Answer),
}

type Answers = Pin<Box<dyn Stream<Item = Result<Event, Status>> + Send>>;

enum Requests {
    State(mpsc::Sender<wire::DiscoveryRequest>),
    Delta(mpsc::Sender<wire::DeltaDiscoveryRequest>),
}

/// Connects and opens a stream of one type, or of all if none is given.
///
/// # Errors
/// [`AdsError::Connect`].
pub async fn open(
    server: &Server,
    (kind, protocol): (Option<Kind>, Protocol),
    node: &Node,
) -> Result<AdsStream, AdsError> {
    let client = Grpc::new(connect(server).await?)
        .max_decoding_message_size(server.message_bytes_max)
        .max_encoding_message_size(usize::MAX);
    let method = PathAndQuery::from_static(method(kind, protocol));
    let (requests, answers) = match protocol {
        Protocol::State => {
            let (sender, answers) = converse(client, server, method, of_state);
            (Requests::State(sender), answers)
        }
        Protocol::Delta => {
            let (sender, answers) = converse(client, server, method, of_delta);
            (Requests::Delta(sender), answers)
        }
    };
    Ok(AdsStream {
        protocol,
        node: introduced(node),
        requests,
        answers,
    })
}

pub(crate) async fn connect(server: &Server) -> Result<Channel, AdsError> {
    let refused = |error: &dyn std::error::Error| AdsError::Connect(causes(error));
    let uri = format!("http://{}", server.authority);
    let endpoint = Endpoint::from_shared(uri).map_err(|error| refused(&error))?;
    let endpoint = endpoint
        .http2_keep_alive_interval(server.ping_interval)
        .keep_alive_timeout(server.ping_timeout)
        .keep_alive_while_idle(true);
    let dialer = server.dialer.clone();
    let dial = tower::service_fn(move |_: http::Uri| {
        let dialing = dialer();
        async move { dialing.await.map(TokioIo::new) }
    });
    let connecting = endpoint.connect_with_connector(dial);
    match tokio::time::timeout(server.connect_timeout, connecting).await {
        Ok(connected) => connected.map_err(|error| refused(&error)),
        Err(_) => {
            let limit = server.connect_timeout;
            Err(AdsError::Connect(format!("no answer within {limit:?}")))
        }
    }
}

/// The method of a stream of one type, or of all.
fn method(kind: Option<Kind>, protocol: Protocol) -> &'static str {
    let [state, delta] = match kind {
        None => [
            "/envoy.service.discovery.v3.AggregatedDiscoveryService/StreamAggregatedResources",
            "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources",
        ],
        Some(Kind::Runtimes) => [
            "/envoy.service.runtime.v3.RuntimeDiscoveryService/StreamRuntime",
            "/envoy.service.runtime.v3.RuntimeDiscoveryService/DeltaRuntime",
        ],
        Some(Kind::Clusters) => [
            "/envoy.service.cluster.v3.ClusterDiscoveryService/StreamClusters",
            "/envoy.service.cluster.v3.ClusterDiscoveryService/DeltaClusters",
        ],
        Some(Kind::Endpoints) => [
            "/envoy.service.endpoint.v3.EndpointDiscoveryService/StreamEndpoints",
            "/envoy.service.endpoint.v3.EndpointDiscoveryService/DeltaEndpoints",
        ],
        Some(Kind::Listeners) => [
            "/envoy.service.listener.v3.ListenerDiscoveryService/StreamListeners",
            "/envoy.service.listener.v3.ListenerDiscoveryService/DeltaListeners",
        ],
        Some(Kind::Routes) => [
            "/envoy.service.route.v3.RouteDiscoveryService/StreamRoutes",
            "/envoy.service.route.v3.RouteDiscoveryService/DeltaRoutes",
        ],
        Some(Kind::Secrets) => [
            "/envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets",
            "/envoy.service.secret.v3.SecretDiscoveryService/DeltaSecrets",
        ],
        Some(Kind::Extensions) => [
            "/envoy.service.extension.v3.ExtensionConfigDiscoveryService/StreamExtensionConfigs",
            "/envoy.service.extension.v3.ExtensionConfigDiscoveryService/DeltaExtensionConfigs",
        ],
    };
    match protocol {
        Protocol::State => state,
        Protocol::Delta => delta,
    }
}

/// Whatever is put into the sender, of which so many may wait, with the server's headers.
pub(crate) fn outgoing<T: Send + 'static>(
    server: &Server,
    waiting_max: usize,
) -> (
    mpsc::Sender<T>,
    tonic::Request<impl Stream<Item = T> + Send + 'static>,
) {
    let (sender, receiver) = mpsc::channel(waiting_max);
    let requests = stream::unfold(receiver, |mut receiver| async move {
        Some((receiver.recv().await?, receiver))
    });
    let mut request = tonic::Request::new(requests);
    *request.metadata_mut() = metadata(server);
    (sender, request)
}

fn metadata(server: &Server) -> MetadataMap {
    let mut headers = http::HeaderMap::new();
    for (key, value) in &server.metadata {
        // They were checked when they were configured.
        let (key, value) = (
            HeaderName::from_bytes(key.as_bytes()),
            HeaderValue::from_str(value),
        );
        if let (Ok(key), Ok(value)) = (key, value) {
            headers.append(key, value);
        }
    }
    MetadataMap::from_headers(headers)
}

fn accepted<T>(
    answers: Streaming<T>,
    read: fn(T) -> Answer,
) -> impl Stream<Item = Result<Event, Status>> {
    let answers = answers.map(move |answer| answer.map(read).map(Event::Answer));
    stream::iter([Ok(Event::Accepted)]).chain(answers)
}

/// Calls a method; it is accepted by the time that its first event is there.
fn converse<Q, A>(
    mut client: Grpc<Channel>,
    server: &Server,
    method: PathAndQuery,
    read: fn(A) -> Answer,
) -> (mpsc::Sender<Q>, Answers)
where
    Q: Message + 'static,
    A: Message + Default + 'static,
{
    let (sender, request) = outgoing(server, REQUESTS_MAX);
    let answers = async move {
        client.ready().await.map_err(|error| {
            let why = causes(&error);
            Status::unavailable(format!("the connection is gone: {why}"))
        })?;
        let codec: ProstCodec<Q, A> = ProstCodec::default();
        let answer = client.streaming(request, method, codec).await?;
        Ok(accepted(answer.into_inner(), read))
    };
    (sender, Box::pin(answers.try_flatten_stream()))
}

impl AdsStream {
    /// Sends a request; waits while too many wait, but not for ever.
    ///
    /// # Errors
    /// [`AdsError::Broken`].
    pub async fn send(&mut self, request: Request) -> Result<(), AdsError> {
        let sending = tokio::time::timeout(SEND_TIMEOUT, self.hand_over(request)).await;
        sending.unwrap_or_else(|_| {
            let error = format!("no request was taken within {SEND_TIMEOUT:?}");
            Err(AdsError::Broken(error))
        })
    }

    async fn hand_over(&mut self, request: Request) -> Result<(), AdsError> {
        let node = request.first.then(|| self.node.clone());
        let sent = match &self.requests {
            Requests::State(sender) => sender.send(to_state(request, node)).await.map_err(drop),
            Requests::Delta(sender) => sender.send(to_delta(request, node)).await.map_err(drop),
        };
        match sent {
            Ok(()) => Ok(()),
            // The answers say why.
            Err(()) => match self.next().await {
                Ok(_) => Err(AdsError::Broken("requests are not taken".to_owned())),
                Err(error) => Err(error),
            },
        }
    }

    /// What comes next. May be dropped and called again.
    ///
    /// # Errors
    /// [`AdsError::Broken`], as soon as the server or the connection ends it.
    pub async fn next(&mut self) -> Result<Event, AdsError> {
        match self.answers.next().await {
            Some(Ok(event)) => Ok(event),
            Some(Err(status)) => Err(broken(&status)),
            None => Err(AdsError::Broken("the server closed it".to_owned())),
        }
    }

    /// Which variant is spoken.
    #[must_use]
    pub fn protocol(&self) -> Protocol {
        self.protocol
    }
}

/// A stream that ended with this.
pub(crate) fn broken(status: &Status) -> AdsError {
    AdsError::Broken(format!("{:?}: {}", status.code(), causes(status)))
}

/// Who we are, in full.
pub(crate) fn introduced(node: &Node) -> core::Node {
    let number = |text: &str| text.parse().unwrap_or_default();
    let version = SemanticVersion {
        major_number: number(env!("CARGO_PKG_VERSION_MAJOR")),
        minor_number: number(env!("CARGO_PKG_VERSION_MINOR")),
        patch: number(env!("CARGO_PKG_VERSION_PATCH")),
    };
    let build = core::BuildVersion {
        version: Some(version),
    };
    let mut wire = core::Node::from(node);
    for feature in CLIENT_FEATURES {
        if !wire.client_features.iter().any(|known| known == feature) {
            wire.client_features.push(feature.to_owned());
        }
    }
    core::Node {
        user_agent_name: "outrigger".to_owned(),
        user_agent_version_type: Some(core::node::UserAgentVersionType::UserAgentBuildVersion(
            build,
        )),
        ..wire
    }
}

fn detail(error: Option<String>) -> Option<Detail> {
    error.map(|message| Detail {
        code: REFUSED.into(),
        message,
    })
}

fn to_state(request: Request, node: Option<core::Node>) -> wire::DiscoveryRequest {
    let (version_info, resource_names) = match request.ask {
        Ask::State { version, names } => (version, names),
        Ask::Delta { subscribe, .. } => (String::new(), subscribe),
    };
    wire::DiscoveryRequest {
        version_info,
        node,
        resource_names,
        type_url: request.kind.type_url().to_owned(),
        response_nonce: request.nonce,
        error_detail: detail(request.error),
    }
}

fn to_delta(request: Request, node: Option<core::Node>) -> wire::DeltaDiscoveryRequest {
    let whole = wire::DeltaDiscoveryRequest {
        node,
        type_url: request.kind.type_url().to_owned(),
        response_nonce: request.nonce,
        error_detail: detail(request.error),
        ..Default::default()
    };
    match request.ask {
        Ask::State { names, .. } => wire::DeltaDiscoveryRequest {
            resource_names_subscribe: names,
            ..whole
        },
        Ask::Delta {
            subscribe,
            unsubscribe,
            initial_versions,
        } => wire::DeltaDiscoveryRequest {
            resource_names_subscribe: subscribe,
            resource_names_unsubscribe: unsubscribe,
            initial_resource_versions: initial_versions,
            ..whole
        },
    }
}

fn of_state(answer: wire::DiscoveryResponse) -> Answer {
    Answer {
        type_url: answer.type_url,
        version: answer.version_info,
        nonce: answer.nonce,
        resources: answer.resources.into_iter().map(unwrapped).collect(),
        removed: Vec::new(),
        errors: errors(answer.resource_errors),
    }
}

fn of_delta(answer: wire::DeltaDiscoveryResponse) -> Answer {
    Answer {
        type_url: answer.type_url,
        version: answer.system_version_info,
        nonce: answer.nonce,
        resources: answer.resources.into_iter().map(sent).collect(),
        removed: answer.removed_resources,
        errors: errors(answer.resource_errors),
    }
}

/// What cannot be sent, and why.
fn errors(told: Vec<wire::ResourceError>) -> Vec<(String, String)> {
    let each = told.into_iter().map(|error| {
        let name = error.resource_name.unwrap_or_default().name;
        let detail = error.error_detail.unwrap_or_default();
        (
            name,
            format!("{:?}: {}", Code::from(detail.code), detail.message),
        )
    });
    each.collect()
}

/// A resource of the state of the world, which may come as a `Resource`.
fn unwrapped(any: Any) -> Sent {
    let is_wrapped = any.type_url.ends_with(&wire::Resource::full_name());
    match wire::Resource::decode(&*any.value) {
        Ok(wrapper) if is_wrapped => sent(wrapper),
        _ => {
            let body = Packed(any);
            Sent {
                name: body.name(),
                version: String::new(),
                ttl: None,
                error: None,
                body: Some(body),
            }
        }
    }
}

fn sent(wrapper: wire::Resource) -> Sent {
    let body = wrapper.resource.map(Packed);
    let name = match &body {
        Some(body) if wrapper.name.is_empty() => body.name(),
        _ => wrapper.name,
    };
    let ttl = wrapper.ttl.map(life).transpose();
    Sent {
        name,
        version: wrapper.version,
        error: ttl.as_ref().err().cloned(),
        ttl: ttl.unwrap_or_default(),
        body,
    }
}

/// A `ttl`, within what Protobuf allows of a duration.
fn life(ttl: prost_types::Duration) -> Result<Duration, String> {
    let seconds = u64::try_from(ttl.seconds);
    let nanos = u32::try_from(ttl.nanos);
    match (seconds, nanos) {
        (Ok(seconds @ ..=PROTOBUF_SECONDS), Ok(nanos @ ..NANOS_PER_SECOND)) => {
            Ok(Duration::new(seconds, nanos))
        }
        _ => Err(format!("ttl: not a duration of 0 s or more: {ttl:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_life_is_a_duration_or_wrong() {
        let cases = [
            (0, 0, Some(Duration::ZERO)),
            (1, 500_000_000, Some(Duration::from_millis(1500))),
            (
                315_576_000_000,
                0,
                Some(Duration::from_secs(315_576_000_000)),
            ),
            (315_576_000_001, 0, None),
            (i64::MAX, 0, None),
            (-1, 0, None),
            (0, -1, None),
            (0, 1_000_000_000, None),
        ];
        for (seconds, nanos, expected) in cases {
            let wrapper = wire::Resource {
                ttl: Some(prost_types::Duration { seconds, nanos }),
                ..Default::default()
            };
            let sent = sent(wrapper);
            assert_eq!(sent.ttl, expected, "{seconds} s {nanos} ns");
            assert_eq!(sent.error.is_none(), expected.is_some());
        }
    }
}
