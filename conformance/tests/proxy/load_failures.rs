//! Load reports (LRS) tell whose fault it was: an engine that we give up on has failed, and one whose client left has not.

use super::{
    envoy::before,
    failures::openai,
    load_reports::until_asked,
    load_server::{LoadServer, Sum, everything},
    migration::migration,
};
use http::Method;
use outrigger_conformance::{
    harness::{ProxyBuilder, TestProxy, Upstream, Version, eventually, request},
    sim::{Config, Fault, FaultKind, SimEngine},
};
use outrigger_proxy::bootstrap::FLEET;
use outrigger_xds::resource::{retry_policy::RetryPolicy, route_action::RouteAction};
use serde_json::json;
use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};
use tokio::{io::AsyncWriteExt, net::TcpStream};

const STREAM: &str = r#"{"model":"sim","prompt":"p","stream":true,"temperature":0,"max_tokens":60,"ignore_eos":true}"#;
const SHORT: Duration = Duration::from_millis(100);
/// Streams of which one meets a fault.
const ASKED: u64 = 4;

/// Never ends an answer, and begins only some.
async fn stalling() -> Upstream {
    Upstream::start(|mut conn, exchange| async move {
        match exchange.path() {
            "/silent" => true,
            _ => conn.begin_events().await && conn.event(r#"{"id":1}"#).await,
        };
        conn.gone().await;
        None
    })
    .await
}

/// Before a server, with the router alone, told of by load reports.
async fn reported(
    load: &LoadServer,
    server: &Upstream,
    edit: impl Fn(&mut RouteAction) + 'static,
) -> TestProxy {
    let proxy = before(server, edit);
    let mut told = proxy.bootstrap.clone();
    told.load_stats = Some(load.as_configured());
    proxy.proxy.apply(told).unwrap();
    until_asked(load).await;
    proxy
}

#[tokio::test]
async fn an_answer_that_we_do_not_wait_for_any_longer_has_failed() {
    let server = stalling().await;
    for (path, limit) in [
        ("/silent", "idle"),
        ("/half", "idle"),
        ("/silent", "total"),
        ("/half", "total"),
    ] {
        let load = LoadServer::start(everything());
        let proxy = reported(&load, &server, move |action| {
            action.timeout = Some(Duration::ZERO);
            match limit {
                "idle" => action.idle_timeout = Some(SHORT),
                _ => action.max_stream_duration = Some(SHORT),
            }
        })
        .await;
        let reply = proxy
            .client(Version::H1)
            .await
            .send(request(Method::GET, path, ""))
            .await;
        assert!(
            reply.broken || reply.status == 504,
            "{path} {limit}: {}",
            reply.status
        );
        let told = Sum {
            issued: 1,
            failed: 1,
            ..Sum::default()
        };
        load.hears(FLEET, told).await;
    }
}

#[tokio::test]
async fn a_stream_without_a_next_token_has_failed() {
    let server = stalling().await;
    let load = LoadServer::start(everything());
    let proxy = ProxyBuilder::new()
        .server(server.address)
        .edit(openai("inter_token_timeout_ms", 100))
        .edit(load.edit())
        .start();
    until_asked(&load).await;
    let mut client = proxy.client(Version::H1).await;
    let reply = client.post("/v1/completions", STREAM).await;
    assert_eq!(reply.status, 200);
    assert!(reply.text().contains("\"error\""), "{}", reply.text());
    let told = Sum {
        issued: 1,
        failed: 1,
        ..Sum::default()
    };
    load.hears(FLEET, told).await;
}

/// The stream goes on elsewhere, and the client sees nothing of it; the engine that was left has failed all the same.
#[tokio::test]
async fn an_engine_that_a_stream_left_for_its_fault_has_failed() {
    for kind in [FaultKind::Stall, FaultKind::InBandError] {
        let engine = || {
            let config = Config {
                decode_itl_ms: 1.0,
                ..Config::default()
            };
            SimEngine::start(config).unwrap()
        };
        let engines = [engine(), engine()];
        let load = LoadServer::start(everything());
        let builder = ProxyBuilder::new().edit(migration(json!({"stall_ms": 300})));
        let builder = engines
            .iter()
            .fold(builder, |builder, engine| builder.engine(engine.http_addr));
        let proxy = builder.edit(load.edit()).start();
        proxy.wait_alive(engines.len()).await;
        until_asked(&load).await;
        engines[0].fault(Fault {
            after_tokens: 20,
            ..Fault::new(kind)
        });
        let mut client = proxy.client(Version::H1).await;
        for _ in 0..ASKED {
            let reply = client.post("/v1/completions", STREAM).await;
            assert!(
                reply.text().ends_with("data: [DONE]\n\n"),
                "{kind:?}: {}",
                reply.text()
            );
        }
        let told = eventually("all of it is told", || async {
            let sum = load.sum(FLEET);
            let is_over = sum.issued > ASKED && sum.issued == sum.succeeded + sum.failed;
            is_over.then_some(sum)
        });
        let told = tokio::time::timeout(Duration::from_secs(20), told).await;
        let told = told.unwrap_or_else(|_| panic!("{kind:?}: {:?}", load.sum(FLEET)));
        assert_eq!(told.succeeded, ASKED, "{kind:?}: {told:?}");
    }
}

#[tokio::test]
async fn each_attempt_counts_as_it_ended() {
    let asked = Arc::new(AtomicUsize::new(0));
    let server = Upstream::start(move |mut conn, _| {
        let is_first = asked.fetch_add(1, Relaxed) == 0;
        async move {
            let status = if is_first { "500 Told" } else { "200 OK" };
            conn.json(status, "{}").await.then_some(conn)
        }
    })
    .await;
    let load = LoadServer::start(everything());
    let proxy = reported(&load, &server, |action| {
        action.retry_policy = Some(RetryPolicy {
            retry_on: vec!["5xx".into()],
            num_retries: 1,
            ..RetryPolicy::default()
        });
    })
    .await;
    let reply = proxy
        .client(Version::H1)
        .await
        .send(request(Method::GET, "/x", ""))
        .await;
    assert_eq!(reply.status, 200);
    let told = Sum {
        issued: 2,
        succeeded: 1,
        failed: 1,
        ..Sum::default()
    };
    load.hears(FLEET, told).await;
}

#[tokio::test]
async fn a_client_that_leaves_in_mid_upload_says_nothing_of_the_endpoint() {
    let server = stalling().await;
    let load = LoadServer::start(everything());
    let proxy = reported(&load, &server, |_| {}).await;
    let mut client = TcpStream::connect(proxy.outbound()).await.unwrap();
    let head = b"POST /silent HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\nhalf";
    client.write_all(head).await.unwrap();
    let told = Sum {
        issued: 1,
        ..Sum::default()
    };
    load.hears(
        FLEET,
        Sum {
            in_progress: 1,
            ..told
        },
    )
    .await;
    drop(client);
    load.hears(FLEET, told).await;
}
