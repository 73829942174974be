//! One question to one endpoint.

use super::{Found, grpc};
use crate::{
    canary::{Asked, Prober},
    tls::Stream,
    upstream::{
        self,
        own::{self, Connection},
    },
};
use bytes::Bytes;
use http::{Request, StatusCode, Uri, header};
use http_body_util::{BodyExt, Full, Limited};
use outrigger_filters::endpoints::Secured;
use outrigger_xds::{
    report::EngineState,
    resource::{
        cluster::{ConnectionOptions, UpstreamProtocol},
        endpoint::Address,
        health_check::{Checker, HealthCheck},
    },
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
    connection: Option<Connection>,
    /// For canaries.
    prober: Prober,
    serves: EngineState,
}

impl Asker {
    pub(super) fn new(
        config: &HealthCheck,
        cluster: &str,
        (address, tls): (&Address, Option<&Secured>),
        options: &Arc<ConnectionOptions>,
    ) -> Self {
        let host = match &config.checker {
            Checker::Http { host, .. } => host,
            Checker::Grpc { authority, .. } => authority,
            Checker::Tcp | Checker::Canary(_) => "",
        };
        let host = if host.is_empty() { cluster } else { host };
        Self {
            checker: config.checker.clone(),
            host: host.to_owned(),
            address: address.clone(),
            tls: tls.cloned(),
            options: options.clone(),
            reuse: config.reuse_connection,
            connection: None,
            prober: Prober::new(address.clone(), options.clone(), tls.cloned()),
            serves: EngineState::default(),
        }
    }

    /// Drops its connection.
    pub(super) fn forget(&mut self) {
        self.connection = None;
    }

    pub(super) async fn ask(&mut self) -> Found {
        if let Checker::Canary(_) = self.checker {
            return self.generate().await;
        }
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
            if let Some(found) = self.ask_on(kept).await {
                return found;
            }
        }
        let Some(fresh) = self.connect().await else {
            return Found::Unreachable;
        };
        self.ask_on(fresh).await.unwrap_or(Found::Unreachable)
    }

    /// A server of which nobody tells us: it has to say itself what it serves.
    async fn generate(&mut self) -> Found {
        if self.serves.models.is_empty() {
            match self.prober.model().await {
                Some(model) => self.serves.models.push(model),
                None => return Found::Doubtful,
            }
        }
        match self.prober.ask(&self.serves).await {
            Asked::Well(_) => Found::Well { degraded: false },
            Asked::Failed(_) | Asked::Busy(_) | Asked::Unproven(_) => Found::Doubtful,
            // It may serve something else by now; as it is, it answers.
            Asked::Refused(_) => {
                self.serves.models.clear();
                Found::Well { degraded: false }
            }
        }
    }

    fn protocol(&self) -> UpstreamProtocol {
        match self.checker {
            Checker::Grpc { .. } | Checker::Http { http2: true, .. } => UpstreamProtocol::Http2,
            Checker::Tcp | Checker::Canary(_) | Checker::Http { .. } => UpstreamProtocol::Http1,
        }
    }

    async fn open(&self) -> std::io::Result<Stream> {
        let (tls, protocol) = (self.tls.as_ref(), Some(self.protocol()));
        upstream::connect::open(&self.address, tls, protocol, &self.options).await
    }

    /// The connection ends when its sender is dropped.
    async fn connect(&self) -> Option<Connection> {
        let socket = self.open().await.ok()?;
        Connection::over(socket, self.protocol()).await.ok()
    }

    /// `None` is no answer.
    async fn ask_on(&mut self, mut connection: Connection) -> Option<Found> {
        let answer = connection.send(self.question()?).await.ok()?;
        let (head, body) = answer.into_parts();
        let whole = Limited::new(body, ANSWER_BYTES_MAX).collect().await;
        let is_whole = whole.is_ok();
        let found = match &self.checker {
            Checker::Grpc { .. } => {
                let whole = whole.ok()?;
                let trailers = whole.trailers().cloned();
                grpc::found(&head, trailers.as_ref(), &whole.to_bytes())
            }
            checker => judge(
                checker,
                head.status,
                head.headers.contains_key(DEGRADED_HEADER),
            ),
        };
        if is_whole && self.reuse {
            self.connection = Some(connection);
        }
        Some(found)
    }

    /// `None` where the checker asks nothing.
    fn question(&self) -> Option<Request<Full<Bytes>>> {
        let (method, path) = match &self.checker {
            Checker::Http { path, method, .. } => (method, path.as_str()),
            Checker::Grpc { .. } => (&http::Method::POST, grpc::PATH),
            Checker::Tcp | Checker::Canary(_) => return None,
        };
        let request = Request::builder()
            .method(method)
            .header(header::USER_AGENT, USER_AGENT);
        let request = if self.protocol() == UpstreamProtocol::Http2 {
            let scheme = if self.tls.is_some() { "https" } else { "http" };
            let target = Uri::builder()
                .scheme(scheme)
                .authority(own::authority(&self.host, &self.address));
            request.uri(target.path_and_query(path).build().ok()?)
        } else {
            request.uri(path).header(header::HOST, &self.host)
        };
        let request = match &self.checker {
            Checker::Grpc { service, .. } => request
                .header(header::CONTENT_TYPE, grpc::CONTENT_TYPE)
                .header(header::TE, "trailers")
                .body(Full::new(grpc::question(service))),
            _ => request.body(Full::default()),
        };
        request.ok()
    }
}

fn judge(checker: &Checker, status: StatusCode, degraded: bool) -> Found {
    let Checker::Http {
        expected,
        retriable,
        ..
    } = checker
    else {
        return Found::Refused;
    };
    let status = status.as_u16();
    if expected.iter().any(|range| range.contains(&status)) {
        Found::Well { degraded }
    } else if retriable.iter().any(|range| range.contains(&status)) {
        Found::Doubtful
    } else {
        Found::Refused
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checks_by_grpc() -> HealthCheck {
        HealthCheck {
            checker: Checker::Grpc {
                service: String::new(),
                authority: String::new(),
            },
            ..HealthCheck::default()
        }
    }

    #[test]
    fn http2_asks_for_the_whole_path_whatever_the_cluster_is_called() {
        for (cluster, authority) in [
            ("engines", "engines"),
            ("outbound|8000||svc.ns.svc.cluster.local", "127.0.0.1:80"),
            ("httproute/ns/x/rule/0", "127.0.0.1:80"),
        ] {
            let config = checks_by_grpc();
            let address = Address {
                host: "127.0.0.1".into(),
                port: 80,
            };
            let asker = Asker::new(&config, cluster, (&address, None), &Arc::default());
            let target = asker.question().unwrap().into_parts().0.uri;
            assert_eq!(target.authority().unwrap(), authority, "{cluster}");
            assert_eq!(target.path(), grpc::PATH, "{cluster}");
        }
    }
}
