//! Copies of requests for other clusters, whose answers nobody reads. They never hold up the request itself.

use super::host;
use crate::{
    body::{RequestBody, ResponseBody},
    endpoints::{Endpoint, SendOptions, Via, Want},
    error::Flag,
    filter::Context,
    matching::authority,
    runtime::Share,
    services::Services,
};
use http::Request;
use http_body_util::BodyExt;
use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

/// Copies on their way at once, in the whole process.
pub const MIRRORS_MAX: usize = 1_024;
/// A copy whose route has no timeout is given up after this.
pub const MIRROR_SECONDS_MAX: u64 = 600;

/// Who gets copies.
#[derive(Debug, Clone)]
pub struct Mirror {
    /// Which cluster.
    pub cluster: String,
    /// Of how many requests; none is all.
    pub share: Option<Share>,
    /// Whether their host says that they are copies.
    pub append_suffix: bool,
}

static ON_THE_WAY: AtomicUsize = AtomicUsize::new(0);

/// Counts one copy until dropped.
struct Counted;

impl Counted {
    fn new() -> Option<Self> {
        let counted = Self;
        // Whoever finds too many takes itself off again at once, by being dropped.
        (ON_THE_WAY.fetch_add(1, Relaxed) < MIRRORS_MAX).then_some(counted)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        ON_THE_WAY.fetch_sub(1, Relaxed);
    }
}

/// Sends the copies that the route asks for.
pub(super) fn send(services: &Services, request: &Request<RequestBody>, context: &Context) {
    for mirror in &*context.route.mirrors {
        if !mirror.share.as_ref().is_none_or(Share::draw) {
            continue;
        }
        if let Err(reason) = one(services, mirror, request, context) {
            metrics::counter!("outrigger_mirrors_skipped_total", "envoy_cluster_name" => mirror.cluster.clone(), "reason" => reason)
                .increment(1);
        }
    }
}

fn one(
    services: &Services,
    mirror: &Mirror,
    request: &Request<RequestBody>,
    context: &Context,
) -> Result<(), &'static str> {
    let view = services
        .endpoints
        .view(&mirror.cluster)
        .ok_or("no_cluster")?;
    // Behind a peer an engine has to be named; a copy is for whoever takes it.
    let fits = |endpoint: &&Arc<Endpoint>| endpoint.via != Via::Peer && endpoint.is_alive();
    let candidates: Vec<_> = view.endpoints.iter().filter(fits).cloned().collect();
    let chosen = services.endpoints.choose(&view, &candidates, None);
    let endpoint = candidates[chosen.ok_or("no_healthy_upstream")?].clone();
    let mut copy = copy(request).ok_or("body_not_read")?;
    let counted = Counted::new().ok_or("too_many")?;
    let priority = context.route.priority;
    let want = Want {
        priority,
        ..Want::default()
    };
    let mut reservation = services
        .endpoints
        .reserve(&view, &endpoint, &want)
        .map_err(|_| "overflow")?;
    if mirror.append_suffix {
        let shadow = shadow(authority(copy.uri(), copy.headers()));
        host::replace(&mut copy, &shadow, false, false);
    }
    let limit = context
        .route
        .timeout
        .unwrap_or(Duration::from_secs(MIRROR_SECONDS_MAX));
    let options = SendOptions {
        connect_timeout: view.connect_timeout,
        headers_timeout: Some(limit),
        replace_stale: true,
        upgrade: false,
        priority,
    };
    let upstream = services.upstream.clone();
    tokio::spawn(async move {
        let _counted = counted;
        let exchange = async {
            let answer = upstream.send(&endpoint, &mut copy, options).await;
            let answer = answer.map_err(|error| error.flag)?;
            reservation.status(answer.status());
            drain(answer.into_body()).await
        };
        let outcome = tokio::time::timeout(limit, exchange)
            .await
            .unwrap_or(Err(Flag::UpstreamRequestTimeout));
        reservation.finish(outcome.err());
    });
    Ok(())
}

/// The request once more, if its body is at hand. Bodies are shared, not copied.
fn copy(request: &Request<RequestBody>) -> Option<Request<RequestBody>> {
    let mut copy = Request::new(request.body().replay()?);
    *copy.method_mut() = request.method().clone();
    *copy.uri_mut() = request.uri().clone();
    *copy.headers_mut() = request.headers().clone();
    Some(copy)
}

/// Reads a body to its end.
async fn drain(mut body: ResponseBody) -> Result<(), Flag> {
    while let Some(frame) = body.frame().await {
        frame.map_err(|error| error.flag)?;
    }
    Ok(())
}

/// As Envoy writes it: before the port.
fn shadow(host: &str) -> String {
    match host.rsplit_once(':') {
        Some((name, port))
            if !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit()) =>
        {
            format!("{name}-shadow:{port}")
        }
        _ => format!("{host}-shadow"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shadow_stands_before_the_port() {
        for (host, expected) in [
            ("a.example", "a.example-shadow"),
            ("a.example:80", "a.example-shadow:80"),
            ("a:", "a:-shadow"),
        ] {
            assert_eq!(shadow(host), expected);
        }
    }
}
