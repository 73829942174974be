//! Where we differed from a real Envoy, found by `conformance/envoy/run`: each case keeps one of these from coming back.

use http::{HeaderMap, Method};
use outrigger_conformance::harness::{
    Client, OneChain, ProxyBuilder, TestProxy, Upstream, Version, raw, request,
};
use outrigger_xds::resource::{
    bootstrap::Bootstrap,
    route::{Action, RetryPolicy, RouteAction},
    server_header::ServerHeader,
};
use serde_json::Value;
use std::time::Duration;

/// A plain route before the server, changed by `edit`.
pub(super) fn before(server: &Upstream, edit: impl Fn(&mut RouteAction) + 'static) -> TestProxy {
    ProxyBuilder::new()
        .server(server.address)
        .edit(move |bootstrap| {
            for listener in &mut bootstrap.listeners {
                // The router alone: what Envoy would have.
                let others = listener.http().http_filters.len() - 1;
                listener.http().http_filters.drain(..others);
            }
            for action in actions(bootstrap) {
                edit(action);
            }
        })
        .start()
}

fn actions(bootstrap: &mut Bootstrap) -> impl Iterator<Item = &mut RouteAction> {
    let listeners = bootstrap.listeners.iter_mut();
    let hosts = listeners.flat_map(|listener| &mut listener.http().route_config.virtual_hosts);
    let routes = hosts.flat_map(|host| &mut host.routes);
    routes.filter_map(|route| match &mut route.action {
        Action::Route(action) => Some(action),
        Action::Redirect(_) | Action::DirectResponse { .. } => None,
    })
}

/// A server that answers everything with these bytes and closes.
async fn says(bytes: &'static [u8]) -> Upstream {
    Upstream::start(move |mut conn, _| async move {
        conn.write(bytes).await;
        None
    })
    .await
}

fn flags_and_details(line: &Value) -> (&str, &str) {
    let text = |key: &str| line[key].as_str().unwrap_or_default();
    (text("response_flags"), text("response_code_details"))
}

#[tokio::test]
async fn garbage_gets_envoys_answer_and_a_line_in_the_log() {
    for (request, status, flags_details) in [
        (
            "\u{1} garbage\r\n\r\n",
            "400 Bad Request",
            ("DPE", "http1.codec_error"),
        ),
        (
            "GET / HTTP/1.1\r\nhost: a\r\nx: a\0b\r\n\r\n",
            "400 Bad Request",
            ("DPE", "http1.invalid_characters"),
        ),
        (
            "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: x\r\n\r\n",
            "501 Not Implemented",
            ("DPE", "http1.invalid_transfer_encoding"),
        ),
        (
            "GET / HTTP/1.2\r\nhost: a\r\n\r\n",
            "426 Upgrade Required",
            ("DPE", "low_version"),
        ),
        (
            "BREW / HTTP/1.1\r\nhost: a\r\n\r\n",
            "400 Bad Request",
            ("DPE", "http1.codec_error"),
        ),
    ] {
        let server = Upstream::named("a").await;
        let proxy = before(&server, |_| {});
        let answer = raw(proxy.outbound(), request.as_bytes()).await;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_default();
        assert!(
            head.starts_with(&format!("HTTP/1.1 {status}\r\n")),
            "{answer}"
        );
        assert!(status.ends_with(body) && !body.is_empty(), "{answer}");
        assert!(head.contains("\r\nconnection: close"), "{answer}");
        assert_eq!(flags_and_details(&proxy.only_log().await), flags_details);
        assert!(server.exchanges().is_empty(), "nothing goes on");
    }
}

#[tokio::test]
async fn a_request_framed_twice_is_refused_in_either_order() {
    for fields in [
        "content-length: 6\r\ntransfer-encoding: chunked",
        "transfer-encoding: chunked\r\ncontent-length: 6",
        "content-length: 6\r\ncontent-length: 6",
    ] {
        let server = Upstream::named("a").await;
        let proxy = before(&server, |_| {});
        let request = format!(
            "POST / HTTP/1.1\r\nhost: a\r\n{fields}\r\n\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\nhost: a\r\n\r\n"
        );
        let answer = raw(proxy.outbound(), request.as_bytes()).await;
        assert!(
            answer.starts_with("HTTP/1.1 400 Bad Request\r\n"),
            "{answer}"
        );
        assert_eq!(
            answer.matches("HTTP/1.1 ").count(),
            1,
            "one answer: {answer}"
        );
        assert!(server.exchanges().is_empty(), "nothing goes on");
    }
}

#[tokio::test]
async fn an_upstream_that_breaks_http_is_a_bad_gateway() {
    for bytes in [
        &b"\0garbage\r\n\r\n"[..],
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    ] {
        let server = says(bytes).await;
        let proxy = before(&server, |_| {});
        let reply = Client::get(proxy.outbound(), "/x").await;
        assert_eq!(reply.status, 502);
        let details = "upstream_reset_before_response_started{protocol_error}";
        assert_eq!(flags_and_details(&proxy.only_log().await), ("UPE", details));
    }
}

#[tokio::test]
async fn what_came_before_a_break_reaches_the_client() {
    let server = says(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf").await;
    let proxy = before(&server, |_| {});
    let answer = raw(proxy.outbound(), b"GET /x HTTP/1.1\r\nhost: a\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    assert!(answer.ends_with("\r\n\r\nhalf"), "{answer}");
    let details = "upstream_reset_after_response_started{protocol_error}";
    assert_eq!(flags_and_details(&proxy.only_log().await), ("UPE", details));
}

#[tokio::test]
async fn an_answer_to_head_is_no_client_that_went_away() {
    for version in Version::BOTH {
        let proxy = ProxyBuilder::new()
            .server("127.0.0.1:1".parse().unwrap())
            .start();
        let mut client = proxy.client(version).await;
        let reply = client.send(request(Method::HEAD, "/x", "")).await;
        assert_eq!(reply.status, 503, "{version:?}");
        assert_ne!(reply.header("content-length"), "", "{version:?}");
        let line = proxy.only_log().await;
        let details = "upstream_reset_before_response_started{remote_connection_failure|\
                       delayed_connect_error:_Connection_refused}";
        assert_eq!(flags_and_details(&line), ("UF", details), "{version:?}");
    }
}

#[tokio::test]
async fn a_routes_idle_timeout_ends_what_stands_still() {
    for (request, status) in [
        ("GET /x HTTP/1.1\r\nhost: a\r\n\r\n", "504 Gateway Timeout"),
        (
            "POST /x HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\nhalf",
            "408 Request Timeout",
        ),
    ] {
        let server = Upstream::start(|mut conn, _| async move {
            conn.gone().await;
            None
        })
        .await;
        let proxy = before(&server, |action| {
            action.timeout = Some(Duration::ZERO);
            action.idle_timeout = Some(Duration::from_millis(100));
        });
        let request = request.replace("host: a", "host: a\r\nconnection: close");
        let answer = raw(proxy.outbound(), request.as_bytes()).await;
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status}\r\n")),
            "{answer}"
        );
        assert!(answer.ends_with("stream timeout"), "{answer}");
        let line = proxy.only_log().await;
        assert_eq!(flags_and_details(&line), ("SI", "stream_idle_timeout"));
    }
}

#[tokio::test]
async fn an_explicit_5xx_policy_retries_all_of_them() {
    let server = Upstream::start(|mut conn, _| async move {
        conn.answer("501 Not Implemented", "text/plain", "no")
            .await
            .then_some(conn)
    })
    .await;
    let proxy = before(&server, |action| {
        action.retry_policy = Some(RetryPolicy {
            retry_on: vec!["5xx".into()],
            num_retries: 1,
            per_try_timeout: Duration::ZERO,
            ..RetryPolicy::default()
        });
    });
    assert_eq!(Client::get(proxy.outbound(), "/x").await.status, 501);
    let tries = server.exchanges();
    assert_eq!(tries.len(), 2);
    assert_eq!(
        tries[0].header("x-request-id"),
        tries[1].header("x-request-id"),
        "what is no generation keeps its id"
    );
    assert_eq!(
        tries[1].count("content-length"),
        0,
        "GET has no body at any try"
    );
}

#[tokio::test]
async fn cookies_in_pieces_are_one_line_upstream() {
    let server = Upstream::named("a").await;
    let proxy = before(&server, |_| {});
    let mut get = request(Method::GET, "/x", "");
    get.headers_mut().append("cookie", "a=1".parse().unwrap());
    get.headers_mut().append("cookie", "b=2".parse().unwrap());
    let mut client = proxy.client(Version::H2).await;
    assert_eq!(client.send(get).await.status, 200);
    assert_eq!(server.only().header("cookie"), "a=1; b=2");
}

#[tokio::test]
async fn headers_of_envoys_own_are_not_taken_from_clients() {
    let server = Upstream::named("a").await;
    let proxy = before(&server, |action| {
        action.timeout = Some(Duration::from_secs(5));
        action.prefix_rewrite = Some("/new/".into());
    });
    let mut get = request(Method::GET, "/x", "");
    let told: &mut HeaderMap = get.headers_mut();
    for name in [
        "x-envoy-retry-on",
        "x-envoy-internal",
        "x-envoy-max-retries",
    ] {
        told.insert(name, "9".parse().unwrap());
    }
    told.insert("x-forwarded-proto", "https".parse().unwrap());
    told.insert("te", "gzip, trailers".parse().unwrap());
    assert_eq!(proxy.client(Version::H1).await.send(get).await.status, 200);
    let got = server.only();
    for name in [
        "x-envoy-retry-on",
        "x-envoy-internal",
        "x-envoy-max-retries",
    ] {
        assert_eq!(got.count(name), 0, "{name}");
    }
    assert_eq!(got.header("x-envoy-external-address"), "127.0.0.1");
    assert_eq!(got.header("x-envoy-original-path"), "/x");
    assert_eq!(got.header("x-forwarded-proto"), "http");
    assert_eq!(got.header("te"), "trailers");
    let expected: u64 = got
        .header("x-envoy-expected-rq-timeout-ms")
        .parse()
        .unwrap();
    assert!((1..=5000).contains(&expected), "{expected}");
}

#[tokio::test]
async fn a_failed_health_check_asks_clients_to_go() {
    let server = Upstream::named("a").await;
    let proxy = before(&server, |_| {});
    let stays = Client::get(proxy.outbound(), "/x").await;
    assert_eq!(stays.header("connection"), "");
    let mut admin = Client::connect(proxy.admin(), Version::H1).await;
    assert_eq!(admin.post("/healthcheck/fail", "").await.status, 200);
    let goes = Client::get(proxy.outbound(), "/x").await;
    assert_eq!(
        (goes.status.as_u16(), goes.header("connection")),
        (200, "close")
    );
}

#[tokio::test]
async fn the_server_header_is_as_configured() {
    for (how, name) in [
        (ServerHeader::Overwrite, "edge"),
        (ServerHeader::AppendIfAbsent, "uvicorn"),
        (ServerHeader::PassThrough, "uvicorn"),
    ] {
        let server = says(b"HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-length: 0\r\n\r\n").await;
        let proxy = ProxyBuilder::new()
            .server(server.address)
            .edit(move |bootstrap| {
                for listener in &mut bootstrap.listeners {
                    listener.http().server_name = "edge".into();
                    listener.http().server_header = how;
                }
            })
            .start();
        let reply = Client::get(proxy.outbound(), "/x").await;
        assert_eq!(reply.header("server"), name, "{how:?}");
    }
}
