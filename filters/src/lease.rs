//! A place at an engine behind a peer, held by the proxy beside that engine until its request comes.
//!
//! The holder names the lease, and asks for it again and again until the request is on its way, which takes the name along.
//! So others learn of the request before it comes. A peer that does not answer at once is not waited for; one that knows
//! no leases is done without: then the place is held here alone. Whoever holds a lease and is gone loses it by its silence.

use crate::{
    body::{RequestBody, ResponseBody},
    endpoints::{Endpoint, SendOptions, Upstream},
    error::Error,
    filter::PromptFacts,
    router::attempt::{ENDPOINT_HEADER, tell_prompt},
    services::Services,
};
use bytes::Bytes;
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri, header,
};
use outrigger_xds::resource::route_action::Priority;
use rand::Rng;
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{runtime::Handle, task::AbortHandle};

/// Paths of leases, on inbound listeners.
pub const PREFIX: &str = "/outrigger.lease.v1.Lease/";
/// Asks for a lease, or for more time.
pub const HOLD: &str = "/outrigger.lease.v1.Lease/Hold";
/// Gives it back.
pub const FREE: &str = "/outrigger.lease.v1.Lease/Free";
/// Names the lease; on an answer it says that leases are known here.
pub const LEASE_HEADER: HeaderName = HeaderName::from_static("x-outrigger-lease");
/// For so long a place is held since it was asked for last.
pub const LEASE: Duration = Duration::from_secs(1);
/// It is asked for again so often.
const RENEWAL: Duration = Duration::from_millis(300);
/// For the first answer; a request waits for it.
const ANSWER: Duration = Duration::from_millis(20);

/// What came of asking.
pub enum Asked {
    /// The place is held.
    Held(Lease),
    /// There is none.
    Refused,
    /// No answer in time: it may be held, or will be when it is asked for again.
    Late(Lease),
    /// The peer knows no leases, or not this engine.
    Untold,
}

/// A place that is held as long as this lives, or until the request takes it over.
pub struct Lease {
    peer: Arc<Peer>,
    renewals: AbortHandle,
    claimed: bool,
}

struct Peer {
    upstream: Arc<dyn Upstream>,
    endpoint: Arc<Endpoint>,
    name: HeaderValue,
    headers: HeaderMap,
}

impl Peer {
    fn new(services: &Services, endpoint: &Arc<Endpoint>, prompt: &PromptFacts) -> Option<Self> {
        let name = format!("{:016x}", rand::rng().random::<u64>());
        let name = HeaderValue::from_str(&name).ok()?;
        let host = HeaderValue::from_str(&endpoint.address.to_string()).ok()?;
        let mut headers = HeaderMap::new();
        headers.insert(header::HOST, host);
        headers.insert(ENDPOINT_HEADER, endpoint.id_header()?);
        headers.insert(LEASE_HEADER, name.clone());
        // Where it decodes nothing is computed.
        tell_prompt(&mut headers, prompt, Some(prompt.tokens));
        Some(Self {
            upstream: services.upstream.clone(),
            endpoint: endpoint.clone(),
            name,
            headers,
        })
    }

    async fn say(
        &self,
        path: &'static str,
        limit: Duration,
    ) -> Option<Result<Response<ResponseBody>, Error>> {
        let mut request = Request::new(RequestBody::full(Bytes::new()));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = Uri::from_static(path);
        request.headers_mut().clone_from(&self.headers);
        let options = SendOptions {
            connect_timeout: limit,
            headers_timeout: Some(limit),
            replace_stale: true,
            upgrade: false,
            priority: Priority::default(),
        };
        let sent = self.upstream.send(&self.endpoint, &mut request, options);
        tokio::time::timeout(limit, sent).await.ok()
    }
}

/// Asks the proxy beside an engine for a place there.
pub async fn ask(services: &Services, endpoint: &Arc<Endpoint>, prompt: &PromptFacts) -> Asked {
    let asked = match Peer::new(services, endpoint, prompt) {
        Some(peer) => first(Arc::new(peer)).await,
        None => Asked::Untold,
    };
    let outcome = match &asked {
        Asked::Held(_) => "held",
        Asked::Refused => "refused",
        Asked::Late(_) => "late",
        Asked::Untold => "untold",
    };
    metrics::counter!("outrigger_leases_asked_total", "outcome" => outcome).increment(1);
    asked
}

async fn first(peer: Arc<Peer>) -> Asked {
    let begun = Instant::now();
    let answer = match peer.say(HOLD, ANSWER).await {
        Some(Ok(answer)) => answer,
        // Who is gone says so at once; a connection that takes too long is of somebody who is busy.
        Some(Err(error)) if error.is_breakdown() && begun.elapsed() < ANSWER => {
            return Asked::Refused;
        }
        Some(Err(_)) | None => return Asked::Late(Lease::new(peer)),
    };
    let known = answer.headers().contains_key(LEASE_HEADER);
    match answer.status() {
        StatusCode::OK if known => Asked::Held(Lease::new(peer)),
        StatusCode::SERVICE_UNAVAILABLE if known => Asked::Refused,
        _ => Asked::Untold,
    }
}

async fn renew(peer: Arc<Peer>) {
    loop {
        tokio::time::sleep(RENEWAL).await;
        drop(peer.say(HOLD, LEASE).await);
    }
}

impl Lease {
    fn new(peer: Arc<Peer>) -> Self {
        let renewals = tokio::spawn(renew(peer.clone())).abort_handle();
        Self {
            peer,
            renewals,
            claimed: false,
        }
    }

    /// Its name, for the request that takes it over. If that never comes the lease ends by itself.
    #[must_use]
    pub fn claim(mut self) -> HeaderValue {
        self.claimed = true;
        self.peer.name.clone()
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.renewals.abort();
        if self.claimed {
            return;
        }
        if let Ok(runtime) = Handle::try_current() {
            let peer = self.peer.clone();
            runtime.spawn(async move { drop(peer.say(FREE, LEASE).await) });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::body::empty;
    use futures_util::future::BoxFuture;

    /// A peer that says the same to all, or nothing, or is not there (status 0).
    struct Says(Option<(u16, bool)>);

    impl Upstream for Says {
        fn send<'a>(
            &'a self,
            _endpoint: &'a Arc<Endpoint>,
            _request: &'a mut Request<RequestBody>,
            _options: SendOptions,
        ) -> BoxFuture<'a, Result<Response<ResponseBody>, Error>> {
            Box::pin(async {
                let Some((status, knows)) = self.0 else {
                    return std::future::pending().await;
                };
                if status == 0 {
                    return Err(Error::no_healthy_upstream());
                }
                let mut response = Response::builder().status(status);
                if knows {
                    response = response.header(LEASE_HEADER, "1");
                }
                Ok(response.body(empty()).unwrap())
            })
        }
    }

    #[tokio::test]
    async fn only_a_peer_that_knows_leases_refuses() {
        for (says, expected) in [
            (Some((200, true)), "held"),
            (Some((503, true)), "refused"),
            (Some((404, true)), "untold"),
            (Some((200, false)), "untold"),
            (Some((503, false)), "untold"),
            (Some((0, false)), "refused"),
            (None, "late"),
        ] {
            let peer = Peer {
                upstream: Arc::new(Says(says)),
                endpoint: Arc::default(),
                name: HeaderValue::from_static("a"),
                headers: HeaderMap::new(),
            };
            let begun = Instant::now();
            let asked = match first(Arc::new(peer)).await {
                Asked::Held(_) => "held",
                Asked::Refused => "refused",
                Asked::Late(_) => "late",
                Asked::Untold => "untold",
            };
            assert_eq!(asked, expected, "{says:?}");
            assert!(begun.elapsed() < ANSWER * 20, "{says:?}");
        }
    }
}
