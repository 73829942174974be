//! One question to one endpoint.

use super::Found;
use crate::{tls::Stream, upstream};
use bytes::Bytes;
use http::{Request, header};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use outrigger_filters::endpoints::Secured;
use outrigger_xds::resource::{
    cluster::{ConnectionOptions, UpstreamProtocol},
    endpoint::Address,
    health_check::{Checker, HealthCheck},
};
use std::sync::Arc;

/// Of an answer's body; a longer one costs the connection.
const ANSWER_BYTES_MAX: usize = 65_536;
/// What the upstream's log can tell checks by; Envoy's own.
const USER_AGENT: &str = "Envoy/HC";
/// An answer with it is well, but others are better.
const DEGRADED_HEADER: &str = "x-envoy-degraded";

pub(super) struct Asker {
    checker: Checker,
    host: String,
    address: Address,
    tls: Option<Secured>,
    options: Arc<ConnectionOptions>,
    reuse: bool,
    connection: Option<SendRequest<Empty<Bytes>>>,
}

impl Asker {
    pub(super) fn new(
        config: &HealthCheck,
        cluster: &str,
        (address, tls): (&Address, Option<&Secured>),
        options: &Arc<ConnectionOptions>,
    ) -> Self {
        let host = match &config.checker {
            Checker::Http { host, .. } if !host.is_empty() => host.clone(),
            _ => cluster.to_owned(),
        };
        Self {
            checker: config.checker.clone(),
            host,
            address: address.clone(),
            tls: tls.cloned(),
            options: options.clone(),
            reuse: config.reuse_connection,
            connection: None,
        }
    }

    /// Drops its connection.
    pub(super) fn forget(&mut self) {
        self.connection = None;
    }

    pub(super) async fn ask(&mut self) -> Found {
        if self.checker == Checker::Tcp {
            return match self.open().await {
                Ok(_) => Found::Well { degraded: false },
                Err(_) => Found::Unreachable,
            };
        }
        let kept = self
            .connection
            .take()
            .filter(|connection| !connection.is_closed());
        if let Some(kept) = kept {
            // The endpoint may have closed it while nobody looked: that says nothing about its health.
            if let Some(found) = self.ask_http(kept).await {
                return found;
            }
        }
        let Some(fresh) = self.connect().await else {
            return Found::Unreachable;
        };
        self.ask_http(fresh).await.unwrap_or(Found::Unreachable)
    }

    async fn open(&self) -> std::io::Result<Stream> {
        let tls = self.tls.as_ref();
        let protocol = Some(UpstreamProtocol::Http1);
        upstream::connect::open(&self.address, tls, protocol, &self.options).await
    }

    async fn connect(&self) -> Option<SendRequest<Empty<Bytes>>> {
        let socket = self.open().await.ok()?;
        let (sender, connection) = handshake(TokioIo::new(socket)).await.ok()?;
        // It ends when the sender is dropped.
        tokio::spawn(connection);
        Some(sender)
    }

    /// `None` is no answer.
    async fn ask_http(&mut self, mut sender: SendRequest<Empty<Bytes>>) -> Option<Found> {
        let Checker::Http {
            path,
            method,
            expected,
            ..
        } = &self.checker
        else {
            return None;
        };
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, &self.host)
            .header(header::USER_AGENT, USER_AGENT)
            .body(Empty::new())
            .ok()?;
        let answer = sender.send_request(request).await.ok()?;
        let status = answer.status().as_u16();
        let degraded = answer.headers().contains_key(DEGRADED_HEADER);
        let well = expected.iter().any(|range| range.contains(&status));
        let whole = Limited::new(answer.into_body(), ANSWER_BYTES_MAX)
            .collect()
            .await;
        if whole.is_ok() && self.reuse {
            self.connection = Some(sender);
        }
        Some(if well {
            Found::Well { degraded }
        } else {
            Found::Refused
        })
    }
}
