//! Client status discovery (CSDS): a client tells what it has of each resource, and what became of its newest version.
//!
//! It is told inside whatever HTTP/2 server the caller runs. What is so is looked up each time that somebody asks.

use crate::{
    accepted::Failure,
    ads::introduced,
    resource::{bootstrap::Node, route::TypedConfig},
    subscription::Kind,
    wire::envoy::{
        admin::v3::{ClientResourceStatus, UpdateFailureState},
        service::status::v3::{
            ClientConfig, ClientStatusRequest, ClientStatusResponse,
            client_config::GenericXdsConfig,
            client_status_discovery_service_server::{
                ClientStatusDiscoveryService, ClientStatusDiscoveryServiceServer,
            },
        },
    },
};
use futures_util::{Stream, StreamExt};
use prost_types::Any;
use serde_json::Value;
use std::{convert::Infallible, pin::Pin, sync::Arc, time::SystemTime};
use tonic::{Request, Response, Status, Streaming, codegen::Service};

/// Requests whose path starts so are for this service.
pub const PATH_PREFIX: &str = "/envoy.service.status.v3.ClientStatusDiscoveryService/";

/// All that a client has.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Client {
    /// Who it is.
    pub node: Node,
    /// What it has, or waits for.
    pub resources: Vec<Held>,
}

/// One resource.
#[derive(Debug, Clone, PartialEq)]
pub struct Held {
    /// Of which type.
    pub kind: Kind,
    /// Its name.
    pub name: String,
    /// Of what is in effect; empty if nothing is.
    pub version: String,
    /// What is in effect, as the JSON of an `Any`; none if nothing is, or it is not to be told.
    pub resource: Option<Value>,
    /// When that came.
    pub at: Option<SystemTime>,
    /// What became of the newest version.
    pub status: Outcome,
    /// What is wrong with it.
    pub error: Option<Failure>,
}

/// `envoy.admin.v3.ClientResourceStatus`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Asked for.
    Requested,
    /// Asked for, and not there.
    DoesNotExist,
    /// Taken.
    Acked,
    /// Refused.
    Nacked,
    /// The server says that it cannot send it.
    ReceivedError,
}

impl Outcome {
    fn to_wire(self) -> ClientResourceStatus {
        match self {
            Self::Requested => ClientResourceStatus::Requested,
            Self::DoesNotExist => ClientResourceStatus::DoesNotExist,
            Self::Acked => ClientResourceStatus::Acked,
            Self::Nacked => ClientResourceStatus::Nacked,
            Self::ReceivedError => ClientResourceStatus::ReceivedError,
        }
    }

    /// Envoy's name.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        self.to_wire().as_str_name()
    }
}

/// Looks up what is so now, with or without the resources themselves.
pub type Look = dyn Fn(bool) -> Client + Send + Sync;

/// The service, for HTTP/2 requests with any body.
pub fn service<B>(
    look: Arc<Look>,
) -> impl Service<
    http::Request<B>,
    Response = http::Response<tonic::body::Body>,
    Error = Infallible,
    Future: Future<Output = Result<http::Response<tonic::body::Body>, Infallible>> + Send,
> + Clone
+ Send
+ Sync
+ use<B>
where
    B: tonic::codegen::Body + Send + 'static,
    B::Error: Into<tonic::codegen::StdError> + Send + 'static,
{
    ClientStatusDiscoveryServiceServer::new(Teller { look }).max_encoding_message_size(usize::MAX)
}

#[derive(Clone)]
struct Teller {
    look: Arc<Look>,
}

impl Teller {
    async fn answer(self, request: ClientStatusRequest) -> Result<ClientStatusResponse, Status> {
        if !request.node_matchers.is_empty() {
            let message = "not supported: node_matchers; there is one client here";
            return Err(Status::invalid_argument(message));
        }
        let with_contents = !request.exclude_resource_contents;
        // A large configuration takes its time.
        let looked = tokio::task::spawn_blocking(move || (self.look)(with_contents)).await;
        let client = looked.map_err(|error| Status::internal(error.to_string()))?;
        Ok(ClientStatusResponse {
            config: vec![ClientConfig {
                node: Some(introduced(&client.node)),
                generic_xds_configs: client.resources.into_iter().map(Into::into).collect(),
            }],
        })
    }
}

impl From<Held> for GenericXdsConfig {
    fn from(plain: Held) -> Self {
        let resource = plain.resource.as_ref();
        let (kind, name) = (plain.kind, &plain.name);
        let typed = resource.and_then(|resource| {
            TypedConfig::from_json(resource)
                .inspect_err(|error| {
                    tracing::warn!(?kind, name, %error, "its content cannot be told over CSDS");
                })
                .ok()
        });
        Self {
            type_url: plain.kind.type_url().to_owned(),
            name: plain.name,
            version_info: plain.version,
            xds_config: typed.as_ref().map(Any::from),
            last_updated: plain.at.map(Into::into),
            config_status: 0,
            client_status: plain.status.to_wire().into(),
            error_state: plain.error.map(|failure| UpdateFailureState {
                last_update_attempt: Some(failure.at.into()),
                details: failure.details,
                version_info: failure.version,
            }),
        }
    }
}

#[tonic::async_trait]
impl ClientStatusDiscoveryService for Teller {
    type StreamClientStatusStream =
        Pin<Box<dyn Stream<Item = Result<ClientStatusResponse, Status>> + Send>>;

    async fn stream_client_status(
        &self,
        request: Request<Streaming<ClientStatusRequest>>,
    ) -> Result<Response<Self::StreamClientStatusStream>, Status> {
        let teller = self.clone();
        // One answer at a time: who does not read is asked nothing.
        let answers = request.into_inner().then(move |request| {
            let teller = teller.clone();
            async move { teller.answer(request?).await }
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn fetch_client_status(
        &self,
        request: Request<ClientStatusRequest>,
    ) -> Result<Response<ClientStatusResponse>, Status> {
        let answer = self.clone().answer(request.into_inner()).await?;
        Ok(Response::new(answer))
    }
}
