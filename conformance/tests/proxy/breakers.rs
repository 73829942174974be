//! Circuit breakers: who is refused, who waits, and what is told of it.

use http::Method;
use outrigger_conformance::harness::{
    Client, OneChain, ProxyBuilder, Reply, TestProxy, Upstream, Version, eventually, request,
};
use outrigger_proxy::bootstrap::FLEET;
use outrigger_xds::resource::{
    cluster::{RetryLimit, Thresholds},
    retry_policy::RetryPolicy,
    route::Action,
    route_action::Priority,
};
use std::{sync::Arc, time::Duration};
use tokio::sync::Semaphore;

/// Answers each request when it is let go.
async fn held() -> (Upstream, Arc<Semaphore>) {
    let gate = Arc::new(Semaphore::new(0));
    let at = gate.clone();
    let server = Upstream::start(move |mut conn, _| {
        let at = at.clone();
        async move {
            at.acquire().await.unwrap().forget();
            conn.json("200 OK", "{}").await.then_some(conn)
        }
    })
    .await;
    (server, gate)
}

fn proxy(server: &Upstream, edit: impl Fn(&mut Thresholds) + 'static) -> TestProxy {
    ProxyBuilder::new()
        .server(server.address)
        .edit(move |bootstrap| {
            for cluster in &mut bootstrap.clusters {
                edit(&mut cluster.circuit_breakers.default);
            }
        })
        .start()
}

/// A request on a connection of its own.
fn ask(proxy: &TestProxy, path: &'static str) -> tokio::task::JoinHandle<Reply> {
    let address = proxy.outbound();
    tokio::spawn(async move { Client::get(address, path).await })
}

async fn until_asked(server: &Upstream, count: usize) {
    eventually("the server is asked", || async {
        (server.exchanges().len() >= count).then_some(())
    })
    .await;
}

async fn until(proxy: &TestProxy, name: &str, least: f64) {
    eventually(name, || async {
        (proxy.metric(name, FLEET).await >= least).then_some(())
    })
    .await;
}

fn assert_overflow(reply: &Reply) {
    assert_eq!(reply.status, 503);
    assert_eq!(
        (
            reply.header("x-envoy-overloaded"),
            reply.header("x-outrigger-error")
        ),
        ("true", "UO"),
    );
    let text = reply.text();
    assert!(text.contains("reset reason: overflow"), "{text}");
}

#[tokio::test]
async fn a_request_too_many_is_refused_and_not_tried_again() {
    let (server, gate) = held().await;
    let proxy = proxy(&server, |limits| {
        limits.max_requests = 1;
        limits.track_remaining = true;
    });
    let running = ask(&proxy, "/a");
    until_asked(&server, 1).await;
    let open = "envoy_cluster_circuit_breakers_default_rq_open";
    until(&proxy, open, 1.0).await;
    let remaining = "envoy_cluster_circuit_breakers_default_remaining_cx";
    assert!(proxy.metric(remaining, FLEET).await > 60_000.0);
    assert_overflow(&ask(&proxy, "/b").await.unwrap());
    let line = proxy.only_log().await;
    assert_eq!(
        (&line["response_flags"], &line["response_code_details"]),
        (
            &"UO".into(),
            &"upstream_reset_before_response_started{overflow}".into()
        ),
    );
    gate.add_permits(1);
    assert_eq!(running.await.unwrap().status, 200);
    gate.add_permits(1);
    assert_eq!(
        ask(&proxy, "/c").await.unwrap().status,
        200,
        "there is room again"
    );
    let refused = "envoy_cluster_upstream_rq_pending_overflow";
    assert!(proxy.metric(refused, FLEET).await >= 1.0);
}

#[tokio::test]
async fn with_no_more_connections_requests_wait_and_too_many_of_them_are_refused() {
    let (server, gate) = held().await;
    let proxy = proxy(&server, |limits| {
        limits.max_connections = 1;
        limits.max_pending_requests = 2;
    });
    let first = ask(&proxy, "/first");
    until_asked(&server, 1).await;
    let waiting = [ask(&proxy, "/second"), ask(&proxy, "/third")];
    let pending = "envoy_cluster_upstream_rq_pending_active";
    until(&proxy, pending, 2.0).await;
    assert_overflow(&ask(&proxy, "/fourth").await.unwrap());
    for name in [
        "envoy_cluster_circuit_breakers_default_cx_open",
        "envoy_cluster_circuit_breakers_default_rq_pending_open",
        "envoy_cluster_upstream_cx_overflow",
    ] {
        until(&proxy, name, 1.0).await;
    }
    gate.add_permits(3);
    assert_eq!(first.await.unwrap().status, 200);
    for reply in waiting {
        assert_eq!(reply.await.unwrap().status, 200);
    }
    assert_eq!(server.connections(), 1, "all went over one connection");
}

#[tokio::test]
async fn a_client_that_goes_away_while_it_waits_makes_room() {
    let (server, gate) = held().await;
    let proxy = proxy(&server, |limits| {
        limits.max_connections = 1;
        limits.max_pending_requests = 1;
    });
    let first = ask(&proxy, "/first");
    until_asked(&server, 1).await;
    let waiting = ask(&proxy, "/second");
    let pending = "envoy_cluster_upstream_rq_pending_active";
    until(&proxy, pending, 1.0).await;
    waiting.abort();
    let third = eventually("the next may wait", || async {
        let mut asked = ask(&proxy, "/third");
        // A refusal comes at once.
        match tokio::time::timeout(Duration::from_millis(200), &mut asked).await {
            Ok(_) => None,
            Err(_) => Some(asked),
        }
    })
    .await;
    gate.add_permits(2);
    assert_eq!(first.await.unwrap().status, 200);
    assert_eq!(third.await.unwrap().status, 200);
}

#[tokio::test]
async fn priorities_have_limits_of_their_own() {
    let (server, gate) = held().await;
    let proxy = ProxyBuilder::new()
        .server(server.address)
        .edit(|bootstrap| {
            for cluster in &mut bootstrap.clusters {
                cluster.circuit_breakers.high.max_requests = 0;
            }
            for listener in &mut bootstrap.listeners {
                let hosts = &mut listener.http().route_config.virtual_hosts;
                let Some(route) = hosts.first().and_then(|host| host.routes.last()).cloned() else {
                    continue;
                };
                let mut high = route;
                high.r#match.path =
                    outrigger_xds::resource::route::PathMatch::Prefix("/high".into());
                if let Action::Route(action) = &mut high.action {
                    action.priority = Priority::High;
                }
                hosts[0].routes.insert(0, high);
            }
        })
        .start();
    assert_overflow(&ask(&proxy, "/high").await.unwrap());
    gate.add_permits(1);
    assert_eq!(ask(&proxy, "/low").await.unwrap().status, 200);
    let open = "envoy_cluster_circuit_breakers_high_rq_open";
    until(&proxy, open, 1.0).await;
}

#[tokio::test]
async fn retries_have_a_limit() {
    let server =
        Upstream::start(
            |mut conn, _| async move { conn.json("500 Told", "{}").await.then_some(conn) },
        )
        .await;
    let proxy = |count| {
        ProxyBuilder::new()
            .server(server.address)
            .edit(move |bootstrap| {
                for cluster in &mut bootstrap.clusters {
                    cluster.circuit_breakers.default.retries = RetryLimit::Count(count);
                }
                for listener in &mut bootstrap.listeners {
                    for host in &mut listener.http().route_config.virtual_hosts {
                        host.retry_policy = Some(RetryPolicy {
                            retry_on: vec!["5xx".into()],
                            num_retries: 2,
                            ..RetryPolicy::default()
                        });
                    }
                }
            })
            .start()
    };
    assert_eq!(ask(&proxy(0), "/a").await.unwrap().status, 500);
    assert_eq!(server.exchanges().len(), 1, "no retry is allowed");
    let some = proxy(1);
    assert_eq!(
        some.client(Version::H1)
            .await
            .send(request(Method::GET, "/b", ""))
            .await
            .status,
        500
    );
    assert_eq!(server.exchanges().len(), 4, "one at a time is");
    assert!(
        some.metric("envoy_cluster_upstream_rq_retry_overflow", FLEET)
            .await
            >= 1.0
    );
}
