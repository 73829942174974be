//! Tells a feed over gRPC, inside whatever HTTP/2 server the caller runs.
//!
//! Nothing is queued here: the source is asked for more only when the subscriber has read what it got.

use super::{FeedSource, frames::to_frames};
use crate::wire::outrigger::feed::v1 as wire;
use futures_util::{Stream, StreamExt, stream};
use std::{convert::Infallible, pin::Pin, sync::Arc};
use tonic::{Request, Response, Status, codegen::Service};
use wire::feed_server::{Feed, FeedServer};

/// Requests whose path starts so are for the feed's service.
pub const PATH_PREFIX: &str = "/outrigger.feed.v1.Feed/";

/// The feed of `source` as a gRPC service for HTTP/2 requests with any body.
pub fn service<B>(
    source: Arc<dyn FeedSource>,
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
    FeedServer::new(Teller { source })
}

struct Teller {
    source: Arc<dyn FeedSource>,
}

#[tonic::async_trait]
impl Feed for Teller {
    type SubscribeStream = Pin<Box<dyn Stream<Item = Result<wire::FeedFrame, Status>> + Send>>;

    async fn subscribe(
        &self,
        _request: Request<wire::SubscribeRequest>,
    ) -> Result<Response<Self::SubscribeStream>, Status> {
        metrics::counter!("outrigger_feed_subscriptions").increment(1);
        let frames = self
            .source
            .subscribe()
            .flat_map(|message| stream::iter(to_frames(&message)).map(Ok));
        Ok(Response::new(Box::pin(frames)))
    }
}
