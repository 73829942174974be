//! What becomes of a split request when a leg fails or its client leaves.

use super::disaggregation::{CHAT, Fleet, always, chat, config, disaggregation, engine, with_role};
use http::Method;
use outrigger_conformance::{
    harness::{Client, Conn, Exchange, ProxyBuilder, Upstream, Version, eventually, request},
    sim::{Config, Fault, FaultKind, Nixl},
};
use serde_json::{Value, json};
use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::Notify;

/// What a real engine's prompt takes here, more or less.
fn slow() -> Config {
    Config {
        prefill_tokens_per_s: 200.0,
        ..config()
    }
}

async fn fallback(fleet: &Fleet, body: &Value) -> Value {
    let told = fleet.both(Version::H1, CHAT, body).await;
    told.assert_same();
    told.record["fallback"].clone()
}

#[tokio::test]
async fn a_prefill_engine_that_fails_costs_time_and_nothing_else() {
    // One that is silent has computed the prompt, and keeps the blocks for a while.
    let lease = Duration::from_millis(300);
    let nixl = Nixl {
        lease,
        ..Nixl::default()
    };
    let prefill = engine(Config {
        nixl: Some(nixl),
        ..config()
    });
    let fields = always(json!({"prefill_timeout_ms": 400}));
    let fleet = Fleet::start(vec![prefill], vec![engine(config())], |builder| {
        builder.edit(disaggregation(fields))
    })
    .await;
    let cases = [
        (FaultKind::Http500, "refused"),
        (FaultKind::Reset, "failed"),
        (FaultKind::Truncate, "failed"),
        (FaultKind::Garbage, "failed"),
        (FaultKind::Stall, "timeout"),
    ];
    for (at, (kind, reason)) in cases.into_iter().enumerate() {
        for more in [json!({}), json!({"stream": true})] {
            // The first may find a connection that was used before, and is then tried again unnoticed.
            fleet.prefill[0].fault(Fault {
                count: 2,
                ..Fault::new(kind)
            });
            let got = fallback(&fleet, &chat(at, &more)).await;
            assert_eq!(got, json!(["prefill", reason]), "{kind:?}");
            fleet.prefill[0].disarm();
            // Whoever failed is passed over for a second.
            tokio::time::sleep(Duration::from_millis(1050)).await;
        }
    }
    assert_eq!(fleet.pulled(), 0);
    fleet.idle().await;
}

#[tokio::test]
async fn a_prefill_engine_that_dies_is_replaced_or_done_without() {
    let slow = || engine(slow());
    let fields = always(json!({}));
    let fleet = Fleet::start(vec![slow(), slow()], vec![engine(config())], |builder| {
        builder.edit(disaggregation(fields))
    })
    .await;
    let body = chat(1, &json!({"stream": true}));
    let kill = async {
        let look = || async {
            let busy = fleet.prefill.iter().find(|engine| engine.load().1 > 0);
            busy.map(|engine| engine.fault(Fault::new(FaultKind::Die)))
        };
        eventually("prefill runs", look).await;
    };
    let (told, ()) = tokio::join!(fleet.both(Version::H1, CHAT, &body), kill);
    told.assert_same();
    assert_eq!(
        told.record["fallback"],
        Value::Null,
        "the other one did it: {}",
        told.record
    );
    let last = fleet
        .prefill
        .iter()
        .find(|engine| !engine.is_dead())
        .unwrap();
    last.fault(Fault::new(FaultKind::Die));
    let told = fleet.both(Version::H1, CHAT, &chat(2, &json!({}))).await;
    told.assert_same();
}

#[tokio::test]
async fn a_decode_engine_that_refuses_or_breaks_is_done_without() {
    let fleet = Fleet::of(1, 1, always(json!({}))).await;
    let cases = [
        (FaultKind::Http500, json!({})),
        (FaultKind::Http500, json!({"stream": true})),
        (FaultKind::Reset, json!({})),
        (FaultKind::InBandError, json!({"stream": true})),
    ];
    let count = cases.len();
    for (at, (kind, more)) in cases.into_iter().enumerate() {
        fleet.decode[0].fault(Fault::new(kind));
        let got = fallback(&fleet, &chat(at, &more)).await;
        assert_eq!(got[0], "decode", "{kind:?}: {got}");
        tokio::time::sleep(Duration::from_millis(1050)).await;
    }
    let taken = fleet.pulled();
    assert!(taken <= count, "blocks are taken once: {taken}");
    let fallbacks = "outrigger_disaggregation_fallbacks_total";
    assert_eq!(fleet.proxy.metric(fallbacks, "decode").await, count as f64);
}

#[tokio::test]
async fn a_decode_engine_that_was_not_reached_is_replaced() {
    let fleet = Fleet::of(1, 2, always(json!({}))).await;
    let mut asked = 0;
    while fleet.proxy.metric("outrigger_retries_total", "fleet").await == 0.0 {
        asked += 1;
        assert!(asked < 50, "the engine that refuses is never chosen");
        // Connections that are open stay so: nobody takes it for dead.
        fleet.decode[0].fault(Fault {
            for_ms: 500,
            ..Fault::new(FaultKind::Refuse)
        });
        let got = fallback(&fleet, &chat(asked, &json!({"max_tokens": 4}))).await;
        assert_eq!(got, Value::Null, "the other one takes the blocks");
    }
    assert_eq!(fleet.pulled(), asked);
    fleet.idle().await;
}

#[tokio::test]
async fn params_that_nobody_gives_are_done_without() {
    let prefill = engine(config());
    let relay = relay(prefill.http_addr, |conn, body| async move {
        let body = body.replacen(
            "\"do_remote_prefill\":true",
            "\"do_remote_prefill\":false",
            1,
        );
        whole(conn, &body).await
    })
    .await;
    let decode = engine(config());
    let url = format!("http://{};role=prefill", relay.address);
    let builder = ProxyBuilder::new().flag("--engine", &url);
    let proxy = with_role(builder, &decode, "decode")
        .edit(disaggregation(always(json!({}))))
        .start();
    proxy.wait_alive(2).await;
    let fleet = Fleet {
        prefill: Vec::new(),
        decode: vec![decode],
        proxy,
    };
    let got = fallback(&fleet, &chat(1, &json!({}))).await;
    assert_eq!(got, json!(["prefill", "no_params"]));
}

#[tokio::test]
async fn a_client_that_leaves_during_prefill_stops_it() {
    let fields = always(json!({}));
    let fleet = Fleet::start(vec![engine(slow())], vec![engine(config())], |builder| {
        builder.edit(disaggregation(fields))
    })
    .await;
    for version in Version::BOTH {
        let mut client = fleet.proxy.client(version).await;
        let body = chat(1, &json!({"stream": true})).to_string();
        let task =
            tokio::spawn(async move { client.try_send(request(Method::POST, CHAT, body)).await });
        let runs = || async { (fleet.prefill[0].load().1 == 1).then_some(()) };
        eventually("prefill runs", runs).await;
        task.abort();
        let left = Instant::now();
        let quiet = || async { (fleet.prefill[0].load().1 == 0).then_some(()) };
        eventually("prefill stops", quiet).await;
        let took = left.elapsed();
        println!("{version:?}: prefill stopped after {took:?}");
        assert!(
            took < Duration::from_millis(500),
            "a whole prefill takes two seconds: {took:?}"
        );
        fleet.idle().await;
    }
    assert_eq!(fleet.prefill[0].transfers(), (0, 0, 0), "nothing was kept");
}

#[tokio::test]
async fn a_client_that_leaves_a_stream_leaves_nothing_behind() {
    let fleet = Fleet::of(1, 1, always(json!({}))).await;
    for version in Version::BOTH {
        let mut client = fleet.proxy.client(version).await;
        let body = chat(1, &json!({"stream": true, "max_tokens": 5000})).to_string();
        let mut stream = client.begin(request(Method::POST, CHAT, body)).await;
        stream.until("content").await;
        drop(stream);
        client.abandon();
        let left = Instant::now();
        let quiet = || async { (fleet.decode[0].load().1 == 0).then_some(()) };
        eventually("decode stops", quiet).await;
        println!("{version:?}: decode stopped after {:?}", left.elapsed());
        fleet.idle().await;
    }
}

/// The client leaves when the prompt was computed, and before anybody was sent for its blocks: they are given back at
/// once, long before their lease ends, by the engine that would have decoded.
#[tokio::test]
async fn blocks_that_nobody_waits_for_are_given_back() {
    let prefill = engine(config());
    let (half, go) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (told, wait) = (half.clone(), go.clone());
    let relay = relay(prefill.http_addr, move |mut conn, body| {
        let (told, wait) = (told.clone(), wait.clone());
        async move {
            let length = body.len();
            let head = format!("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n");
            conn.write(head + &body[..length / 2]).await;
            told.notify_one();
            wait.notified().await;
            conn.write(&body[length / 2..]).await.then_some(conn)
        }
    })
    .await;
    let decode = engine(config());
    let url = format!("http://{};role=prefill", relay.address);
    let builder = ProxyBuilder::new().flag("--engine", &url);
    let proxy = with_role(builder, &decode, "decode")
        .edit(disaggregation(always(json!({}))))
        .start();
    proxy.wait_alive(2).await;
    let mut client = proxy.client(Version::H1).await;
    let body = chat(1, &json!({"max_tokens": 5000})).to_string();
    let task =
        tokio::spawn(async move { client.try_send(request(Method::POST, CHAT, body)).await });
    half.notified().await;
    // Nothing tells when the proxy has read what is on its way to it.
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(prefill.transfers(), (1, 0, 0), "blocks are kept");
    task.abort();
    let line = proxy.only_log().await;
    assert_eq!(line["response_flags"], "DC", "{line}");
    assert_eq!(prefill.transfers(), (1, 0, 0), "blocks are kept");
    go.notify_one();
    let left = Instant::now();
    let freed = || async { (prefill.transfers() == (0, 1, 0)).then_some(()) };
    eventually("blocks are given back", freed).await;
    println!("blocks were given back after {:?}", left.elapsed());
    let quiet = || async { (decode.load() == (0, 0, 0.0)).then_some(()) };
    eventually("decode ends after one token", quiet).await;
    let releases = || async {
        let released = proxy
            .metric("outrigger_disaggregation_releases_total", "released")
            .await;
        (released == 1.0).then_some(())
    };
    eventually("it is counted", releases).await;
}

async fn whole(mut conn: Conn, body: &str) -> Option<Conn> {
    conn.json("200 OK", body).await.then_some(conn)
}

/// A server that is what the engine behind it is; `answer` gets the bodies of its answers to POSTs.
async fn relay<F>(
    engine: SocketAddr,
    answer: impl Fn(Conn, String) -> F + Clone + Send + Sync + 'static,
) -> Upstream
where
    F: Future<Output = Option<Conn>> + Send + 'static,
{
    Upstream::start(move |mut conn, exchange: Exchange| {
        let answer = answer.clone();
        async move {
            if exchange.line.starts_with("GET ") {
                let reply = Client::get(engine, exchange.path()).await;
                let status = reply.status.to_string();
                let kind = reply.header("content-type").to_owned();
                return conn
                    .answer(&status, &kind, &reply.text())
                    .await
                    .then_some(conn);
            }
            let mut client = Client::connect(engine, Version::H1).await;
            let path = exchange.path().to_owned();
            let reply = client.post(&path, exchange.body.clone()).await;
            answer(conn, reply.text()).await
        }
    })
    .await
}
