//! Listens to a feed over gRPC and ends at the first doubt.
//!
//! It does not reconnect: the caller does, and begins anew with the snapshots that every subscription starts with.

use super::{Assembler, Continuity, FeedError, FeedMessage, frames::FRAME_READ_BYTES_MAX};
use crate::{problems::causes, wire::outrigger::feed::v1 as wire};
use futures_util::{Stream, future::BoxFuture, stream};
use hyper_util::rt::TokioIo;
use std::{io, pin::Pin, sync::Arc, time::Duration};
use tokio::io::{AsyncRead, AsyncWrite};
use tonic::{Streaming, transport::Endpoint};
use wire::feed_client::FeedClient;

/// What is heard; after an error it ends.
pub type FeedSubscription = Pin<Box<dyn Stream<Item = Result<FeedMessage, FeedError>> + Send>>;

/// When a teller counts as dead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FeedTimeouts {
    /// Until the connection stands and the subscription is answered. Default 3 s.
    pub connect: Duration,
    /// Between HTTP/2 PINGs, also on a silent connection. Default 2 s.
    pub ping_interval: Duration,
    /// Until a PING is answered. Default 2 s.
    pub ping_timeout: Duration,
}

impl Default for FeedTimeouts {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(3),
            ping_interval: Duration::from_secs(2),
            ping_timeout: Duration::from_secs(2),
        }
    }
}

/// Subscribes at `uri` (`http://host:port`, HTTP/2 by prior knowledge).
///
/// # Errors
/// [`FeedError::Connect`] if nobody answers in time, [`FeedError::Broken`] if the answer is no subscription. The stream's
/// own errors are why it ended.
pub async fn connect(
    uri: http::Uri,
    timeouts: FeedTimeouts,
) -> Result<FeedSubscription, FeedError> {
    connect_by(uri, timeouts, None).await
}

/// What a dialer opened.
pub trait Connection: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Connection for T {}

/// Opens a connection in its own way (TLS), which this crate knows nothing of.
pub type Dialer =
    Arc<dyn Fn() -> BoxFuture<'static, io::Result<Box<dyn Connection>>> + Send + Sync>;

/// As [`connect`], over what `dialer` opens.
///
/// # Errors
/// As [`connect`].
pub async fn connect_by(
    uri: http::Uri,
    timeouts: FeedTimeouts,
    dialer: Option<Dialer>,
) -> Result<FeedSubscription, FeedError> {
    let name = uri.to_string();
    let refused = |reason: String| FeedError::Connect {
        uri: name.clone(),
        reason,
    };
    let endpoint = Endpoint::from(uri)
        .connect_timeout(timeouts.connect)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(timeouts.ping_interval)
        .keep_alive_timeout(timeouts.ping_timeout)
        .keep_alive_while_idle(true);
    let subscribe = async {
        let channel = match dialer {
            None => endpoint.connect().await,
            Some(dialer) => {
                let dial = tower::service_fn(move |_: http::Uri| {
                    let dialing = dialer();
                    async move { dialing.await.map(TokioIo::new) }
                });
                endpoint.connect_with_connector(dial).await
            }
        };
        let channel = channel.map_err(|error| refused(causes(&error)))?;
        let mut client = FeedClient::new(channel).max_decoding_message_size(FRAME_READ_BYTES_MAX);
        let answer = client.subscribe(wire::SubscribeRequest {}).await;
        let frames = answer
            .map_err(|status| FeedError::Broken(causes(&status)))?
            .into_inner();
        Ok((client, frames))
    };
    let (client, frames) = tokio::time::timeout(timeouts.connect, subscribe)
        .await
        .unwrap_or_else(|_| Err(refused(format!("no answer within {:?}", timeouts.connect))))?;
    let listener = Listener {
        _client: client,
        frames,
        assembler: Assembler::default(),
        continuity: Continuity::default(),
    };
    Ok(Box::pin(stream::unfold(
        Some(listener),
        |listener| async move {
            let mut listener = listener?;
            match listener.next().await {
                Ok(message) => Some((Ok(message), Some(listener))),
                Err(error) => Some((Err(error), None)),
            }
        },
    )))
}

struct Listener<C> {
    /// Keeps the connection open.
    _client: C,
    frames: Streaming<wire::FeedFrame>,
    assembler: Assembler,
    continuity: Continuity,
}

impl<C> Listener<C> {
    async fn next(&mut self) -> Result<FeedMessage, FeedError> {
        loop {
            // A backlog is always ready: without a pause it would starve the connection's own task, PINGs included.
            tokio::task::consume_budget().await;
            let frame = match self.frames.message().await {
                Ok(Some(frame)) => frame,
                Ok(None) => return Err(FeedError::Broken("the teller ended it".to_owned())),
                Err(status) => return Err(FeedError::Broken(causes(&status))),
            };
            let Some(message) = self.assembler.push_frame(frame)? else {
                continue;
            };
            if self.continuity.admit(&message)? {
                return Ok(message);
            }
        }
    }
}
