//! One collector: a connection to an endpoint of its cluster, and one export after the other on it.

use crate::upstream::own::{self, Connection};
use bytes::Bytes;
use http::{HeaderName, HeaderValue, Request, Response, StatusCode, Uri, header, uri::Authority};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use outrigger_filters::endpoints::{Endpoint, Endpoints};
use outrigger_xds::{
    otlp,
    resource::{
        cluster::UpstreamProtocol,
        header_mutation::AppendAction,
        tracing::{OpenTelemetry, Transport},
    },
};
use std::{borrow::Cow, sync::Arc, time::Duration};

/// Of an answer's body.
const ANSWER_BYTES_MAX: usize = 65_536;
const GRPC_PATH: &str = "/opentelemetry.proto.collector.trace.v1.TraceService/Export";
const GRPC: &str = "application/grpc";
const PROTOBUF: &str = "application/x-protobuf";
const USER_AGENT: &str = concat!("outrigger/", env!("CARGO_PKG_VERSION"));

/// Why an export failed, for the log.
type Why = Cow<'static, str>;

pub(super) struct Collector {
    config: OpenTelemetry,
    endpoints: Arc<dyn Endpoints>,
    /// Kept for the next export.
    connection: Option<(Arc<Endpoint>, Connection)>,
}

impl Collector {
    pub(super) fn new(config: OpenTelemetry, endpoints: Arc<dyn Endpoints>) -> Self {
        Self {
            config,
            endpoints,
            connection: None,
        }
    }

    /// Drops its connection.
    pub(super) fn forget(&mut self) {
        self.connection = None;
    }

    /// Tells one message; gives how many of its spans were not taken.
    pub(super) async fn send(&mut self, message: Bytes) -> Result<u64, Why> {
        if let Some((endpoint, connection)) = self.connection.take().filter(|kept| self.fits(kept))
        {
            // The collector may close it meanwhile, which says nothing.
            if let Ok(answer) = self.ask(&endpoint, connection, message.clone()).await {
                return answer;
            }
        }
        let (endpoint, limit) = self.choose()?;
        let opening = own::connect(&endpoint, self.protocol(&endpoint));
        let opened = tokio::time::timeout(limit, opening).await;
        let opened = opened.map_err(|_| "connect: not in time")?;
        let connection = opened.map_err(|error| format!("connect: {error}"))?;
        self.ask(&endpoint, connection, message)
            .await
            .unwrap_or_else(|error| Err(error.to_string().into()))
    }

    /// Whether a connection goes where exports are to go now.
    fn fits(&self, (endpoint, connection): &(Arc<Endpoint>, Connection)) -> bool {
        let view = self.endpoints.view(&self.config.cluster);
        let is_known =
            view.is_some_and(|view| view.endpoints.iter().any(|now| Arc::ptr_eq(now, endpoint)));
        is_known && !connection.is_closed()
    }

    fn choose(&self) -> Result<(Arc<Endpoint>, Duration), Why> {
        let view = self.endpoints.view(&self.config.cluster);
        let view = view.ok_or_else(|| format!("no cluster '{}'", self.config.cluster))?;
        let candidates = view.candidates(None);
        let chosen = self.endpoints.choose(&view, &candidates, None);
        let chosen = chosen.ok_or("no endpoint is alive")?;
        Ok((candidates[chosen].clone(), view.connect_timeout))
    }

    fn protocol(&self, endpoint: &Endpoint) -> UpstreamProtocol {
        match self.config.transport {
            Transport::Grpc { .. } => UpstreamProtocol::Http2,
            Transport::Http { .. } => endpoint.protocol.for_client(false),
        }
    }

    /// The outer error is one of the connection.
    async fn ask(
        &mut self,
        endpoint: &Arc<Endpoint>,
        mut connection: Connection,
        message: Bytes,
    ) -> hyper::Result<Result<u64, Why>> {
        let request = match self.request(endpoint, message) {
            Ok(request) => request,
            Err(error) => return Ok(Err(error.to_string().into())),
        };
        let answer = connection.send(request).await?;
        let read = self.read(answer).await;
        if read.is_ok() {
            self.connection = Some((endpoint.clone(), connection));
        }
        Ok(read)
    }

    fn request(&self, endpoint: &Endpoint, message: Bytes) -> http::Result<Request<Full<Bytes>>> {
        let builder = Request::post(self.target(endpoint)?).header(header::USER_AGENT, USER_AGENT);
        let (builder, body) = match &self.config.transport {
            Transport::Grpc { .. } => (
                builder
                    .header(header::CONTENT_TYPE, GRPC)
                    .header(header::TE, "trailers"),
                own::grpc_frame(&message),
            ),
            Transport::Http { .. } => (builder.header(header::CONTENT_TYPE, PROTOBUF), message),
        };
        let mut request = builder.body(Full::new(body))?;
        if let Transport::Http { uri } = &self.config.transport
            && self.protocol(endpoint) == UpstreamProtocol::Http1
        {
            let uri: Uri = uri.parse()?;
            let host = uri.authority().map_or("", Authority::as_str);
            request
                .headers_mut()
                .insert(header::HOST, HeaderValue::from_str(host)?);
        }
        let added = self.config.headers.iter();
        for added in added.filter(|added| added.action != AppendAction::OverwriteIfExists) {
            let name = HeaderName::try_from(&added.name)?;
            request
                .headers_mut()
                .append(name, HeaderValue::from_str(&added.value)?);
        }
        Ok(request)
    }

    /// What is asked for: a path over HTTP/1, all of it over HTTP/2.
    fn target(&self, endpoint: &Endpoint) -> http::Result<Uri> {
        match &self.config.transport {
            Transport::Http { uri } => {
                let uri: Uri = uri.parse()?;
                if self.protocol(endpoint) == UpstreamProtocol::Http2 {
                    return Ok(uri);
                }
                let path = uri.path_and_query().map_or("/", |path| path.as_str());
                Ok(path.parse()?)
            }
            Transport::Grpc { authority } => {
                let named = if authority.is_empty() {
                    &self.config.cluster
                } else {
                    authority
                };
                let authority = own::authority(named, &endpoint.address);
                let scheme = if endpoint.tls.is_some() {
                    "https"
                } else {
                    "http"
                };
                Uri::builder()
                    .scheme(scheme)
                    .authority(authority)
                    .path_and_query(GRPC_PATH)
                    .build()
            }
        }
    }

    async fn read(&self, answer: Response<Incoming>) -> Result<u64, Why> {
        let (head, body) = answer.into_parts();
        let whole = Limited::new(body, ANSWER_BYTES_MAX).collect().await;
        let whole = whole.map_err(|error| format!("answer: {error}"))?;
        let nonsense = "an answer that is not OTLP";
        match self.config.transport {
            Transport::Http { .. } if head.status.is_success() => {
                Ok(otlp::rejected(&whole.to_bytes()).ok_or(nonsense)?)
            }
            Transport::Grpc { .. } if head.status == StatusCode::OK => {
                let status = own::grpc_status(&head.headers, whole.trailers());
                let status = status.ok_or(nonsense)?.clone();
                if status.as_bytes() != b"0" {
                    return Err(format!("grpc-status {status:?}").into());
                }
                let body = whole.to_bytes();
                let message = own::grpc_message(&body).ok_or(nonsense)?;
                Ok(otlp::rejected(message).ok_or(nonsense)?)
            }
            _ => Err(format!("status {}", head.status).into()),
        }
    }
}
