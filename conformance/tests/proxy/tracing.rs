//! Traces by OTLP, seen by a collector of the test's own: which spans come, whose they are, and what a collector that is
//! dead, slow or talks nonsense changes (nothing but a counter).

use super::collector::{CLIENT, Collector, GRPC_PATH, Manner, SERVER, Seen};
use http::{Method, Request};
use outrigger_conformance::{
    harness::{
        OneChain, Process, ProxyBuilder, TestProxy, Upstream, Version, eventually, free_address,
        metric, request,
    },
    sim::{Config, SimEngine},
};
use outrigger_xds::resource::bootstrap::Bootstrap;
use std::time::Duration;
use tokio::net::TcpSocket;

const PROGRAM: &str = env!("CARGO_BIN_EXE_outrigger-demo");
pub(crate) const CHAT: &str = "/v1/chat/completions";
const CHAT_BODY: &str = r#"{"model":"m","messages":[{"role":"user","content":"hello"}]}"#;
pub(crate) const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
pub(crate) const CALLER: &str = "b7ad6b7169203331";

/// An engine that answers everything.
pub(crate) async fn answering() -> Upstream {
    Upstream::start(|mut conn, _| async move { conn.json("200 OK", "{}").await.then_some(conn) })
        .await
}

pub(crate) fn traced(collector: &str) -> ProxyBuilder {
    ProxyBuilder::new().flag("--otlp-endpoint", collector)
}

/// A change to the tracing of the outbound listener.
pub(crate) fn tracing_of(
    bootstrap: &mut Bootstrap,
) -> &mut outrigger_xds::resource::tracing::Tracing {
    let outbound = bootstrap.listeners[0].http();
    outbound.tracing.as_mut().unwrap()
}

pub(crate) fn chat(
    headers: &[(&'static str, &str)],
) -> Request<outrigger_conformance::harness::AnyBody> {
    let mut request = request(Method::POST, CHAT, CHAT_BODY);
    for (name, value) in headers {
        request.headers_mut().insert(*name, value.parse().unwrap());
    }
    request
}

pub(crate) async fn ask(proxy: &TestProxy, headers: &[(&'static str, &str)]) {
    let mut client = proxy.client(Version::H1).await;
    assert_eq!(client.send(chat(headers)).await.status, 200);
}

#[tokio::test]
async fn two_hops_are_one_trace_and_each_span_has_its_parent() {
    let collector = Collector::start(Manner::Takes).await;
    let engine = SimEngine::start(Config::default()).unwrap();
    let inbound = free_address();
    let near = traced(&collector.grpc())
        .engine(engine.http_addr)
        .flag("--inbound", &inbound.to_string())
        .start();
    let far = traced(&collector.grpc())
        .flag("--policy", "kv")
        .peer(inbound)
        .start();
    near.wait_alive(1).await;
    far.wait_alive(1).await;
    let mut client = far.client(Version::H1).await;
    let model = Config::default().model;
    // Ids: exact, without asking anybody.
    let prompt: Vec<u32> = (1..80).collect();
    let body = format!(r#"{{"model":"{model}","prompt":{prompt:?},"max_tokens":2}}"#);
    let reply = client.post("/v1/completions", body).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    let all = collector.spans(5, |_| true).await;
    let only = |what: &str, fits: &dyn Fn(&Seen) -> bool| {
        let found: Vec<_> = all.iter().filter(|span| fits(span)).collect();
        assert_eq!(found.len(), 1, "{what}: {all:#?}");
        found[0].clone()
    };
    let entry = only("entry", &|span| span.name.starts_with("egress "));
    let routing = only("routing", &|span| span.name == "kv_routing");
    let to_peer = only("to the peer", &|span| span.name == "router fleet egress");
    let peer = only("at the peer", &|span| span.name == "ingress");
    let to_engine = only("to the engine", &|span| span.name == "router local egress");
    assert!(all.iter().all(|span| span.trace == entry.trace), "{all:#?}");
    assert_eq!(entry.parent, "");
    assert_eq!(routing.parent, entry.id);
    assert_eq!(to_peer.parent, entry.id);
    assert_eq!(peer.parent, to_peer.id);
    assert_eq!(to_engine.parent, peer.id);
    assert_eq!((entry.kind, peer.kind), (SERVER, SERVER));
    assert_eq!((to_peer.kind, to_engine.kind), (CLIENT, CLIENT));
    assert!(all.iter().all(|span| span.took > 0), "{all:#?}");
    // The entry knows what was generated, and how it was routed.
    assert_eq!(entry.tag("gen_ai.request.model"), model);
    assert_eq!(entry.tag("gen_ai.usage.output_tokens"), "2");
    assert_eq!(routing.tag("outrigger.routing.candidates"), "1");
    let served = entry.tag("outrigger.endpoint");
    assert!(served.ends_with(&engine.http_addr.to_string()), "{served}");
    assert_eq!(routing.tag("outrigger.routing.endpoint"), served);
    assert!(
        !routing.tag("outrigger.routing.cost").is_empty(),
        "{routing:?}"
    );
    assert!(
        !routing.tag("outrigger.routing.how").is_empty(),
        "{routing:?}"
    );
    let (path, headers, resource) = collector.first_export();
    assert_eq!(path, GRPC_PATH);
    assert_eq!(headers["content-type"], "application/grpc");
    assert_eq!(resource["service.name"], "outrigger");
}

#[tokio::test]
async fn who_sent_it_decides_and_what_is_not_sampled_passes_as_it_came() {
    let collector = Collector::start(Manner::Takes).await;
    let engine = answering().await;
    let proxy = traced(&collector.http()).server(engine.address).start();
    let unsampled = format!("00-{TRACE}-{CALLER}-00");
    ask(
        &proxy,
        &[("traceparent", &unsampled), ("tracestate", "a=1")],
    )
    .await;
    let passed = engine.only();
    assert_eq!(passed.header("traceparent"), unsampled);
    assert_eq!(passed.header("tracestate"), "a=1");

    // Later spans go the same way: when they are there, those would be.
    let quiet = traced(&collector.http())
        .flag("--otlp-sampling", "0")
        .server(engine.address)
        .start();
    ask(&quiet, &[]).await;
    let sampled = format!("00-{TRACE}-{CALLER}-01");
    ask(&quiet, &[("traceparent", &sampled), ("tracestate", "a=1")]).await;
    let spans = collector.spans(2, |_| true).await;
    assert_eq!(spans.len(), 2, "{spans:#?}");
    let server = spans.iter().find(|span| span.kind == SERVER).unwrap();
    let client = spans.iter().find(|span| span.kind == CLIENT).unwrap();
    assert_eq!(
        (server.trace.as_str(), server.parent.as_str()),
        (TRACE, CALLER)
    );
    assert_eq!((client.trace.as_str(), &client.parent), (TRACE, &server.id));
    assert_eq!(
        (server.state.as_str(), client.state.as_str()),
        ("a=1", "a=1")
    );
    let told = engine.exchanges().pop().unwrap();
    assert_eq!(
        told.header("traceparent"),
        format!("00-{TRACE}-{}-01", client.id)
    );
    assert_eq!(told.header("tracestate"), "a=1");
    let (path, headers, _) = collector.first_export();
    assert_eq!(path, "/v1/traces");
    assert_eq!(headers["content-type"], "application/x-protobuf");
    assert_eq!(headers["host"], collector.address.to_string());
}

/// A short path, and tags of each kind.
fn add_tags(bootstrap: &mut Bootstrap) {
    use outrigger_xds::resource::tracing::{CustomTag, TagValue};
    let tracing = tracing_of(bootstrap);
    tracing.max_path_tag_length = 8;
    let header = |name: &str| TagValue::RequestHeader(name.into(), "none".into());
    tracing.custom_tags = [
        ("zone", TagValue::Literal("z1".into())),
        ("tenant", header("x-tenant")),
        ("other", header("x-other")),
        (
            "home",
            TagValue::Environment("OUTRIGGER_NOT_SET".into(), "d".into()),
        ),
        (
            "nothing",
            TagValue::Environment("OUTRIGGER_NOT_SET".into(), String::new()),
        ),
    ]
    .map(|(tag, value)| CustomTag {
        tag: tag.into(),
        value,
    })
    .into();
}

#[tokio::test]
async fn spans_say_what_envoys_say() {
    let collector = Collector::start(Manner::Takes).await;
    let engine = answering().await;
    let proxy = traced(&collector.grpc())
        .server(engine.address)
        .edit(add_tags)
        .start();
    ask(
        &proxy,
        &[("x-tenant", "t1"), ("user-agent", "me"), ("host", "api")],
    )
    .await;
    let spans = collector.spans(2, |_| true).await;
    let server = spans.iter().find(|span| span.kind == SERVER).unwrap();
    let client = spans.iter().find(|span| span.kind == CLIENT).unwrap();
    let log = proxy.only_log().await;
    for (tag, value) in [
        ("component", "proxy"),
        ("http.method", "POST"),
        ("http.url", "http://api/v1/chat"),
        ("http.protocol", "HTTP/1.1"),
        ("http.status_code", "200"),
        ("response_flags", "-"),
        ("user_agent", "me"),
        ("downstream_cluster", "-"),
        ("upstream_cluster", "fleet"),
        ("upstream_cluster.name", "fleet"),
        ("peer.address", "127.0.0.1"),
        ("request_size", &CHAT_BODY.len().to_string()),
        ("response_size", "2"),
        ("node_id", &proxy.bootstrap.node.id),
        ("guid:x-request-id", log["request_id"].as_str().unwrap()),
    ] {
        assert_eq!(server.tag(tag), value, "{tag}: {server:#?}");
    }
    assert_eq!(server.name, "egress api");
    let address = engine.address.to_string();
    for (tag, value) in [
        ("component", "proxy"),
        ("http.status_code", "200"),
        ("response_flags", "-"),
        ("upstream_cluster", "fleet"),
        ("upstream_address", &address),
        ("peer.address", &address),
    ] {
        assert_eq!(client.tag(tag), value, "{tag}: {client:#?}");
    }
    for span in [server, client] {
        for (tag, value) in [
            ("zone", "z1"),
            ("tenant", "t1"),
            ("other", "none"),
            ("home", "d"),
        ] {
            assert_eq!(span.tag(tag), value, "{tag}: {span:#?}");
        }
        assert!(!span.attributes.contains_key("nothing"), "{span:#?}");
        assert!(!span.failed, "{span:#?}");
    }
    // The id tells the next proxy that it was chosen by chance.
    assert_eq!(&server.tag("guid:x-request-id")[14..15], "9");
}

#[tokio::test]
async fn a_failed_attempt_and_the_one_that_answers_are_two_spans() {
    let collector = Collector::start(Manner::Takes).await;
    let good = answering().await;
    let dead = TcpSocket::new_v4().unwrap();
    dead.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let dead = dead.local_addr().unwrap();
    let proxy = traced(&collector.grpc())
        .server(dead)
        .server(good.address)
        .start();
    // In turn: one of two begins at the dead one.
    ask(&proxy, &[]).await;
    ask(&proxy, &[]).await;
    let attempts = collector.spans(3, |span| span.kind == CLIENT).await;
    let failed: Vec<_> = attempts.iter().filter(|span| span.failed).collect();
    assert_eq!(failed.len(), 1, "{attempts:#?}");
    let failed = failed[0];
    assert_eq!(failed.tag("response_flags"), "UF");
    assert_eq!(failed.tag("http.status_code"), "0");
    assert_eq!(failed.tag("error"), "true");
    assert_eq!(failed.tag("upstream_address"), dead.to_string());
    let same = |span: &&Seen| span.parent == failed.parent && span.id != failed.id;
    let second = attempts.iter().find(same).unwrap();
    assert_eq!(second.trace, failed.trace);
    assert_eq!(second.tag("retry.count"), "1");
    assert_eq!(second.tag("http.status_code"), "200");
    let told: Vec<_> = good.exchanges();
    let parents: Vec<_> = told.iter().map(|told| told.header("traceparent")).collect();
    let expected = format!("00-{}-{}-01", second.trace, second.id);
    assert!(
        parents.contains(&expected.as_str()),
        "{parents:?} {expected}"
    );
}

#[tokio::test]
async fn clients_may_ask_and_strangers_may_not_force() {
    let collector = Collector::start(Manner::Takes).await;
    let engine = answering().await;
    let proxy = traced(&collector.http())
        .flag("--otlp-sampling", "0")
        .server(engine.address)
        .start();
    ask(&proxy, &[("x-envoy-force-trace", "true")]).await;
    ask(&proxy, &[("x-client-trace-id", "mine")]).await;
    let spans = collector.spans(2, |_| true).await;
    assert_eq!(spans.len(), 2, "{spans:#?}");
    let server = spans.iter().find(|span| span.kind == SERVER).unwrap();
    assert_eq!(server.tag("guid:x-client-trace-id"), "mine");
    assert_eq!(&server.tag("guid:x-request-id")[14..15], "b");
    let told = engine.exchanges().pop().unwrap();
    assert_eq!(told.header("x-request-id"), server.tag("guid:x-request-id"));
}

#[tokio::test]
async fn an_answer_without_an_upstream_is_a_span_that_failed() {
    let collector = Collector::start(Manner::Takes).await;
    let proxy = traced(&collector.grpc()).start();
    let mut client = proxy.client(Version::H2).await;
    assert_eq!(client.post(CHAT, CHAT_BODY).await.status, 503);
    let spans = collector.spans(1, |span| span.kind == SERVER).await;
    assert!(spans[0].failed, "{spans:#?}");
    assert_eq!(spans[0].tag("response_flags"), "UH");
    assert_eq!(spans[0].tag("http.status_code"), "503");
    assert_eq!(spans[0].tag("http.protocol"), "HTTP/2");
}

#[tokio::test]
async fn a_collector_that_is_no_good_costs_spans_and_no_request() {
    let dead = TcpSocket::new_v4().unwrap();
    dead.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let mut urls = vec![format!("http://{}", dead.local_addr().unwrap())];
    let mut kept = Vec::new();
    for manner in [Manner::Refuses, Manner::Babbles, Manner::Stays] {
        let collector = Collector::start(manner).await;
        urls.extend([collector.grpc(), collector.http()]);
        kept.push(collector);
    }
    for url in urls {
        let engine = answering().await;
        let proxy = traced(&url)
            .server(engine.address)
            .edit(|bootstrap| {
                for listener in &mut bootstrap.listeners {
                    let tracing = listener.http().tracing.as_mut().unwrap();
                    let provider = tracing.provider.as_mut().unwrap();
                    provider.timeout = Duration::from_millis(100);
                }
            })
            .start();
        let dropped = || {
            let reason = r#"reason="export_failed""#;
            metric(proxy.admin(), "outrigger_spans_dropped_total", reason)
        };
        let before = dropped().await;
        for _ in 0..3 {
            ask(&proxy, &[]).await;
        }
        // Of other cases in this process, too: at least ours.
        eventually(&format!("{url}: spans are dropped"), || async {
            (dropped().await >= before + 6.0).then_some(())
        })
        .await;
        ask(&proxy, &[]).await;
    }
    assert!(kept.iter().all(|collector| collector.seen().is_empty()));
}

#[tokio::test]
async fn the_last_spans_are_told_before_the_process_ends() {
    let collector = Collector::start(Manner::Takes).await;
    let engine = answering().await;
    let (url, endpoint) = (format!("http://{}", engine.address), collector.grpc());
    let flags = [
        "--engine",
        url.as_str(),
        "--otlp-endpoint",
        endpoint.as_str(),
    ];
    let mut process = Process::proxy(PROGRAM, &flags).await;
    let outbound = process.listener("outbound").await;
    let mut client = outrigger_conformance::harness::Client::connect(outbound, Version::H1).await;
    // Whatever is answered, by the engine or for it.
    client.send(chat(&[])).await;
    process.signal("TERM");
    let ended = process.ended(Duration::from_secs(10)).await.unwrap();
    assert!(ended.success(), "{ended:?}");
    let servers: Vec<_> = collector.seen();
    assert!(
        servers.iter().any(|span| span.kind == SERVER),
        "{servers:#?}"
    );
}
