//! A collector of traces, to be looked at: what it was told, over gRPC and over HTTP, and collectors that are no good.

use bytes::{Buf, Bytes};
use http::{HeaderMap, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, combinators::BoxBody};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use outrigger_conformance::harness::eventually;
use prost::Message;
use std::{
    collections::BTreeMap,
    convert::Infallible,
    net::SocketAddr,
    sync::{Arc, Mutex},
};
use tokio::net::TcpListener;

pub(crate) const GRPC_PATH: &str = "/opentelemetry.proto.collector.trace.v1.TraceService/Export";

/// OTLP as it stands in its own files, as far as the cases look.
mod otlp {
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Request {
        #[prost(message, repeated, tag = "1")]
        pub(super) resources: Vec<Resources>,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Resources {
        #[prost(message, optional, tag = "1")]
        pub(super) resource: Option<Resource>,
        #[prost(message, repeated, tag = "2")]
        pub(super) scopes: Vec<Scope>,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Resource {
        #[prost(message, repeated, tag = "1")]
        pub(super) attributes: Vec<KeyValue>,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Scope {
        #[prost(message, repeated, tag = "2")]
        pub(super) spans: Vec<Span>,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Span {
        #[prost(bytes = "vec", tag = "1")]
        pub(super) trace: Vec<u8>,
        #[prost(bytes = "vec", tag = "2")]
        pub(super) id: Vec<u8>,
        #[prost(string, tag = "3")]
        pub(super) state: String,
        #[prost(bytes = "vec", tag = "4")]
        pub(super) parent: Vec<u8>,
        #[prost(string, tag = "5")]
        pub(super) name: String,
        #[prost(int32, tag = "6")]
        pub(super) kind: i32,
        #[prost(fixed64, tag = "7")]
        pub(super) start: u64,
        #[prost(fixed64, tag = "8")]
        pub(super) end: u64,
        #[prost(message, repeated, tag = "9")]
        pub(super) attributes: Vec<KeyValue>,
        #[prost(message, optional, tag = "15")]
        pub(super) status: Option<Status>,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Status {
        #[prost(int32, tag = "3")]
        pub(super) code: i32,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct KeyValue {
        #[prost(string, tag = "1")]
        pub(super) key: String,
        #[prost(message, optional, tag = "2")]
        pub(super) value: Option<AnyValue>,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct AnyValue {
        #[prost(string, optional, tag = "1")]
        pub(super) text: Option<String>,
        #[prost(int64, optional, tag = "3")]
        pub(super) int: Option<i64>,
        #[prost(double, optional, tag = "4")]
        pub(super) real: Option<f64>,
    }
}

/// Kind of a span.
pub(crate) const SERVER: i32 = 2;
/// Kind of a span.
pub(crate) const CLIENT: i32 = 3;

/// A span as a case reads it.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) trace: String,
    pub(crate) id: String,
    pub(crate) parent: String,
    pub(crate) state: String,
    pub(crate) name: String,
    pub(crate) kind: i32,
    pub(crate) took: u64,
    pub(crate) failed: bool,
    pub(crate) attributes: BTreeMap<String, String>,
}

impl Seen {
    fn of(span: otlp::Span) -> Self {
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        Self {
            trace: hex(&span.trace),
            id: hex(&span.id),
            parent: hex(&span.parent),
            state: span.state,
            name: span.name,
            kind: span.kind,
            took: span.end.checked_sub(span.start).unwrap(),
            failed: span.status.is_some_and(|status| status.code == 2),
            attributes: texts(span.attributes),
        }
    }

    pub(crate) fn tag(&self, name: &str) -> &str {
        self.attributes.get(name).map_or("", String::as_str)
    }
}

fn texts(attributes: Vec<otlp::KeyValue>) -> BTreeMap<String, String> {
    let text = |value: otlp::AnyValue| {
        let int = value.int.map(|int| int.to_string());
        let real = value.real.map(|real| real.to_string());
        value.text.or(int).or(real).unwrap()
    };
    let each = attributes.into_iter();
    each.map(|attribute| (attribute.key, text(attribute.value.unwrap())))
        .collect()
}

/// What a collector makes of an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Manner {
    Takes,
    Refuses,
    Babbles,
    Stays,
}

/// Path, headers and resource of each.
type Exports = Arc<Mutex<Vec<(String, HeaderMap, BTreeMap<String, String>)>>>;

pub(crate) struct Collector {
    pub(crate) address: SocketAddr,
    spans: Arc<Mutex<Vec<Seen>>>,
    exports: Exports,
}

impl Collector {
    pub(crate) async fn start(manner: Manner) -> Self {
        let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let this = Self {
            address: socket.local_addr().unwrap(),
            spans: Arc::default(),
            exports: Arc::default(),
        };
        let (spans, exports) = (this.spans.clone(), this.exports.clone());
        tokio::spawn(async move {
            while let Ok((socket, _)) = socket.accept().await {
                let (spans, exports) = (spans.clone(), exports.clone());
                let serve = service_fn(move |request| {
                    answer(manner, request, spans.clone(), exports.clone())
                });
                tokio::spawn(async move {
                    let builder = auto::Builder::new(TokioExecutor::new());
                    // The proxy may leave.
                    let _ = builder.serve_connection(TokioIo::new(socket), serve).await;
                });
            }
        });
        this
    }

    pub(crate) fn grpc(&self) -> String {
        format!("http://{}", self.address)
    }

    pub(crate) fn http(&self) -> String {
        format!("http://{}/v1/traces", self.address)
    }

    /// The first export: its path, its headers, and whose spans they are.
    pub(crate) fn first_export(&self) -> (String, HeaderMap, BTreeMap<String, String>) {
        self.exports.lock().unwrap()[0].clone()
    }

    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.spans.lock().unwrap().clone()
    }

    /// The spans, once there are so many that `counts`.
    pub(crate) async fn spans(&self, count: usize, counts: impl Fn(&Seen) -> bool) -> Vec<Seen> {
        eventually(&format!("{count} spans"), || async {
            let seen: Vec<_> = self.seen().into_iter().filter(&counts).collect();
            (seen.len() >= count).then_some(seen)
        })
        .await
    }
}

async fn answer(
    manner: Manner,
    request: Request<Incoming>,
    spans: Arc<Mutex<Vec<Seen>>>,
    exports: Exports,
) -> Result<Response<BoxBody<Bytes, Infallible>>, Infallible> {
    let (head, body) = request.into_parts();
    let mut body = body.collect().await.unwrap().to_bytes();
    let is_grpc = head.uri.path() == GRPC_PATH;
    let mut response = Response::builder();
    match manner {
        Manner::Stays => std::future::pending().await,
        Manner::Refuses => response = response.status(StatusCode::SERVICE_UNAVAILABLE),
        Manner::Takes | Manner::Babbles => {}
    }
    if manner != Manner::Takes {
        let nonsense = Full::new(Bytes::from_static(b"<html>no collector</html>"));
        return Ok(response.body(nonsense.boxed()).unwrap());
    }
    if is_grpc {
        assert_eq!(body.get_u8(), 0, "not compressed");
        assert_eq!(body.get_u32() as usize, body.len());
    }
    let told = otlp::Request::decode(body).unwrap();
    for resource in told.resources {
        let of = texts(resource.resource.unwrap().attributes);
        let export = (head.uri.path().to_owned(), head.headers.clone(), of);
        exports.lock().unwrap().push(export);
        let new = resource.scopes.into_iter().flat_map(|scope| scope.spans);
        spans.lock().unwrap().extend(new.map(Seen::of));
    }
    if !is_grpc {
        response = response.header(header::CONTENT_TYPE, "application/x-protobuf");
        return Ok(response.body(Full::default().boxed()).unwrap());
    }
    let trailers = HeaderMap::from_iter([("grpc-status".parse().unwrap(), "0".parse().unwrap())]);
    let body = Full::new(Bytes::from_static(&[0; 5])).with_trailers(async { Some(Ok(trailers)) });
    response = response.header(header::CONTENT_TYPE, "application/grpc");
    Ok(response.body(body.boxed()).unwrap())
}
