//! Upgrades: whether a request may ask for one, and what becomes of a connection when it gets it.
//!
//! From then on its bytes are nobody's but the two ends'. The connection's own task carries them, so that whatever counts
//! the connection counts it until its end.

use super::record::Record;
use crate::{
    codec::client::Client,
    head,
    metrics::HttpStats,
    pump::{self, Limits, Passed},
    snapshot::HttpConfig,
};
use futures_util::{FutureExt, future::BoxFuture};
use http::{HeaderValue, StatusCode, Version, header, request::Parts};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use outrigger_filters::{
    body::ResponseBody,
    error::{Error, Flag},
    filter::{End, LogFields},
    sse::Summary,
};
use std::{
    sync::{Arc, Mutex, PoisonError, atomic::Ordering::Relaxed},
    time::Duration,
};

/// What a connection does after HTTP, given its client; taken once, when HTTP on it has ended.
#[derive(Default)]
pub(crate) struct Afterwards(Mutex<Option<Tunnel>>);

type Tunnel = Box<dyn FnOnce(Client) -> BoxFuture<'static, ()> + Send>;

impl std::fmt::Debug for Afterwards {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Afterwards")
    }
}

impl Afterwards {
    pub(crate) fn take(&self) -> Option<Tunnel> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn set(&self, tunnel: Tunnel) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(tunnel);
    }
}

/// What a request asks for.
pub(super) struct Asked {
    pub(super) protocol: HeaderValue,
}

/// What a request asks for.
///
/// # Errors
/// It may not, or cannot on this connection.
pub(super) fn asked(parts: &Parts, config: &HttpConfig) -> Result<Asked, Error> {
    let protocol = parts.headers.get(header::UPGRADE).cloned();
    let allowed = protocol
        .filter(|_| parts.version == Version::HTTP_11)
        .filter(|protocol| config.may_upgrade(parts, protocol.as_bytes()));
    match allowed {
        Some(protocol) => Ok(Asked { protocol }),
        None => Err(head::unflagged(StatusCode::FORBIDDEN, "upgrade_failed")),
    }
}

/// Makes a head ask for an upgrade.
pub(super) fn announce(headers: &mut http::HeaderMap, protocol: &HeaderValue) {
    headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(header::UPGRADE, protocol.clone());
}

/// A tunnel through which nothing goes is ended after this where `stream_idle_timeout` is off (for generations, which have
/// limits of their own): whoever vanished without a word would hold two sockets for ever. As `tcp_proxy`'s default.
const TUNNEL_IDLE_SECONDS_MAX: u64 = 3_600;

/// How long the tunnel may last.
pub(super) fn limits(idle: Option<Duration>, until: Option<std::time::Instant>) -> Limits {
    Limits {
        idle: Some(idle.unwrap_or(Duration::from_secs(TUNNEL_IDLE_SECONDS_MAX))),
        until: until.map(Into::into),
    }
}

/// Both ends have agreed: when their HTTP is over, their bytes are carried.
pub(super) fn begin(
    upstream: OnUpgrade,
    held: ResponseBody,
    record: Record,
    mut log: LogFields,
    limits: Limits,
) {
    let connection = record.connection.clone();
    let active = Active::new(record.stats.clone());
    let tunnel = async move |client: Client| {
        let (_active, _held) = (active, held);
        let passed = Passed::default();
        let mut record = record;
        let end = match upstream.await {
            Ok(upstream) => pump::run(client, TokioIo::new(upstream), limits, &passed).await,
            Err(error) => {
                tracing::debug!(%error, "an upgrade did not come about");
                pump::End::Broken
            }
        };
        match end {
            pump::End::Idle => log.flags.push(Flag::StreamIdleTimeout),
            pump::End::Expired => log.flags.push(Flag::DurationTimeout),
            pump::End::Complete | pump::End::Broken => {}
        }
        record.bytes_received = passed.received.load(Relaxed);
        record.end(Summary {
            end: End::Complete,
            bytes: passed.sent.load(Relaxed),
            first_byte: None,
            gap_p99: None,
            log,
        });
    };
    connection
        .afterwards
        .set(Box::new(move |client| tunnel(client).boxed()));
}

/// Counts an upgraded connection until dropped.
struct Active(Arc<HttpStats>);

impl Active {
    fn new(stats: Arc<HttpStats>) -> Self {
        stats.downstream_cx_upgrades_total.increment(1);
        stats.downstream_cx_upgrades_active.increment(1.0);
        Self(stats)
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.0.downstream_cx_upgrades_active.decrement(1.0);
    }
}
