//! What others may do to traces: texts that are too long, clients that go away, trace contexts and request ids that are
//! not what they seem.

use super::{
    collector::{CLIENT, Collector, Manner, SERVER, Seen},
    tracing::{CALLER, CHAT, TRACE, answering, ask, chat, traced, tracing_of},
};
use outrigger_conformance::harness::{OneChain, ProxyBuilder, Upstream, Version, eventually};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

#[tokio::test]
async fn what_a_client_makes_long_is_short_in_a_span() {
    let collector = Collector::start(Manner::Takes).await;
    let engine = answering().await;
    let proxy = traced(&collector.grpc()).server(engine.address).start();
    let agent = "u".repeat(5000);
    let (parent, state) = (format!("00-{TRACE}-{CALLER}-01"), "s".repeat(600));
    let headers = [
        ("user-agent", agent.as_str()),
        ("traceparent", &parent),
        ("tracestate", &state),
    ];
    ask(&proxy, &headers).await;
    let spans = collector.spans(2, |_| true).await;
    let server = spans.iter().find(|span| span.kind == SERVER).unwrap();
    assert_eq!(server.tag("user_agent"), &agent[..1024]);
    assert!(spans.iter().all(|span| span.state.is_empty()), "{spans:#?}");
    assert_eq!(engine.only().header("tracestate"), state, "as it came");
}

#[tokio::test]
async fn an_attempt_that_nobody_waits_for_any_more_is_canceled() {
    let collector = Collector::start(Manner::Takes).await;
    // One that never answers, and one that stops in the middle.
    for head in [false, true] {
        let engine = Upstream::start(move |mut conn, _| async move {
            if head {
                conn.write("HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf")
                    .await;
            }
            conn.gone().await;
            None
        })
        .await;
        let proxy = traced(&collector.grpc()).server(engine.address).start();
        let mut client = TcpStream::connect(proxy.outbound()).await.unwrap();
        let ask = format!("POST {CHAT} HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\n{{}}");
        client.write_all(ask.as_bytes()).await.unwrap();
        eventually("the engine is asked", || async {
            (engine.exchanges().len() == 1).then_some(())
        })
        .await;
        if head {
            let mut byte = [0];
            client.read_exact(&mut byte).await.unwrap();
        }
        drop(client);
        let code = if head { "200" } else { "0" };
        let canceled = |span: &Seen| span.kind == CLIENT && span.tag("http.status_code") == code;
        let spans = collector.spans(1, canceled).await;
        assert_eq!(spans[0].tag("canceled"), "true", "{spans:#?}");
        assert_eq!(spans[0].tag("response_flags"), "-", "{spans:#?}");
        assert!(spans[0].failed, "{spans:#?}");
    }
}

#[tokio::test]
async fn an_id_says_only_what_is_decided_here() {
    let collector = Collector::start(Manner::Takes).await;
    let engine = answering().await;
    let told = "00001388-0000-9000-8000-000000000000";
    // A stranger's at the edge, and a neighbour's where nothing is traced.
    let edge = traced(&collector.grpc())
        .flag("--otlp-sampling", "0")
        .server(engine.address)
        .edit(|bootstrap| bootstrap.listeners[0].http().preserve_external_request_id = true)
        .start();
    let none = traced(&collector.grpc())
        .server(engine.address)
        .edit(|bootstrap| {
            tracing_of(bootstrap).overall_sampling = 0.0;
            let outbound = bootstrap.listeners[0].http();
            outbound.use_remote_address = false;
        })
        .start();
    for proxy in [&edge, &none] {
        ask(proxy, &[("x-request-id", told)]).await;
        let upstream = engine.exchanges().pop().unwrap();
        assert_eq!(
            upstream.header("x-request-id"),
            "00001388-0000-4000-8000-000000000000"
        );
    }
}

#[tokio::test]
async fn state_without_a_trace_goes_and_lines_of_it_are_one() {
    let collector = Collector::start(Manner::Takes).await;
    let engine = answering().await;
    let proxy = traced(&collector.grpc()).server(engine.address).start();
    let malformed = format!("00-{TRACE}-+7ad6b7169203331-01");
    for headers in [
        vec![("tracestate", "a=1")],
        vec![("tracestate", "a=1"), ("traceparent", &malformed)],
    ] {
        ask(&proxy, &headers).await;
        let upstream = engine.exchanges().pop().unwrap();
        assert_eq!(upstream.count("tracestate"), 0, "{upstream:?}");
        let told = upstream.header("traceparent");
        assert!(told.ends_with("-01") && !told.contains(TRACE), "{told}");
    }
    let mut request = chat(&[("traceparent", &format!("00-{TRACE}-{CALLER}-01"))]);
    for state in ["a=1", "b=2"] {
        let state = state.parse().unwrap();
        request.headers_mut().append("tracestate", state);
    }
    let mut client = proxy.client(Version::H1).await;
    assert_eq!(client.send(request).await.status, 200);
    let upstream = engine.exchanges().pop().unwrap();
    assert_eq!(upstream.header("tracestate"), "a=1,b=2");
    let spans = collector.spans(2, |span| span.trace == TRACE).await;
    assert!(
        spans.iter().all(|span| span.state == "a=1,b=2"),
        "{spans:#?}"
    );
}

#[tokio::test]
async fn a_proxy_that_traces_nothing_does_not_decide_for_the_next() {
    let collector = Collector::start(Manner::Takes).await;
    let engine = answering().await;
    let next = traced(&collector.grpc()).server(engine.address).start();
    let first = ProxyBuilder::new().server(next.outbound()).start();
    ask(&first, &[]).await;
    let spans = collector.spans(2, |_| true).await;
    let server = spans.iter().find(|span| span.kind == SERVER).unwrap();
    assert_eq!(server.parent, "", "nobody made a span before");
}
