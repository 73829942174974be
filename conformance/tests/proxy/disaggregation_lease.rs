//! A place for the decode leg is known to others before prefill starts, and it is given back, whoever dies.

use super::disaggregation::{CHAT, Fleet, always, chat, config, disaggregation, engine, with_role};
use http::{HeaderValue, Method};
use outrigger_conformance::{
    harness::{
        Client, Process, ProxyBuilder, TestProxy, Version, eventually, hosts, request, wait_alive,
    },
    sim::{Config, SimEngine},
};
use outrigger_filters::lease::{FREE, HOLD, LEASE, LEASE_HEADER};
use outrigger_filters::router::attempt::ENDPOINT_HEADER;
use outrigger_proxy::bootstrap::{FLEET, LOCAL};
use serde_json::{Value, json};
use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

/// Until an answer comes in time, on a machine that has other things to do.
const PATIENCE: Duration = Duration::from_secs(60);
const PROGRAM: &str = env!("CARGO_BIN_EXE_outrigger-demo");

/// A prompt takes it longer than a lease lasts.
fn slow() -> Config {
    Config {
        prefill_tokens_per_s: 100.0,
        ..config()
    }
}

/// The proxy beside an engine for decode, that takes so many requests at once.
async fn beside(decode: &SimEngine, requests_max: u32) -> TestProxy {
    let proxy = with_role(ProxyBuilder::new(), decode, "decode")
        .edit(move |bootstrap| {
            for cluster in &mut bootstrap.clusters {
                if cluster.name == LOCAL {
                    cluster.circuit_breakers.default.max_requests = requests_max;
                }
            }
        })
        .start();
    proxy.wait_alive(1).await;
    proxy
}

/// An entry beside engines for prefill, with these peers.
async fn entry(prefill: &[SimEngine], peers: &[&TestProxy]) -> TestProxy {
    let builder = ProxyBuilder::new().flag("--policy", "kv");
    let builder = prefill.iter().fold(builder, |builder, engine| {
        with_role(builder, engine, "prefill")
    });
    let builder = peers
        .iter()
        .fold(builder, |builder, peer| builder.peer(peer.inbound()));
    let proxy = builder.edit(disaggregation(always(json!({})))).start();
    proxy.wait_alive(prefill.len() + peers.len()).await;
    proxy
}

/// Requests that an engine for decode has, as it is told.
async fn told(admin: SocketAddr) -> u64 {
    let hosts = hosts(admin, FLEET).await;
    let decode = hosts
        .iter()
        .filter(|host| host["outrigger"]["role"] == "decode");
    decode
        .map(|host| {
            let load = &host["outrigger"]["load"];
            load["active_requests"].as_u64().unwrap()
        })
        .sum()
}

async fn becomes(admin: SocketAddr, count: u64) {
    let look = || async { (told(admin).await == count).then_some(()) };
    eventually(&format!("{count} are told of"), look).await;
}

/// Says something of a lease to a proxy, as a peer would.
async fn say(path: &str, name: &'static str, proxy: &TestProxy) -> u16 {
    let hosts = hosts(proxy.admin(), FLEET).await;
    let id = hosts[0]["outrigger"]["engine_id"].as_str().unwrap();
    let mut client = Client::connect(proxy.inbound(), Version::H2).await;
    let mut ask = request(Method::POST, path, "");
    let headers = ask.headers_mut();
    headers.insert(LEASE_HEADER, HeaderValue::from_static(name));
    headers.insert(ENDPOINT_HEADER, HeaderValue::from_str(id).unwrap());
    client.send(ask).await.status.as_u16()
}

#[tokio::test]
async fn other_entries_know_of_a_place_before_its_leg_starts() {
    let (prefill, decode) = ([engine(slow())], engine(config()));
    let behind = beside(&decode, 100).await;
    let proxy = entry(&prefill, &[&behind]).await;
    let other = entry(&[], &[&behind]).await;
    let fleet = Fleet {
        prefill: Vec::new(),
        decode: vec![decode],
        proxy,
    };
    let watch = async {
        becomes(other.admin(), 1).await;
        let since = Instant::now();
        // Held by renewals: prefill takes longer than a lease.
        while since.elapsed() < LEASE + Duration::from_millis(200) {
            assert_eq!(fleet.decode[0].load().0, 0, "it has not started there");
            assert_eq!(told(other.admin()).await, 1);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let body = chat(1, &json!({}));
    let (got, ()) = tokio::join!(fleet.both(Version::H1, CHAT, &body), watch);
    got.assert_same();
    assert_eq!(got.record["fallback"], Value::Null, "{}", got.record);
    // The leg took the place over: it is not counted twice, nor afterwards.
    becomes(other.admin(), 0).await;
}

#[tokio::test]
async fn a_client_that_leaves_gives_the_place_back() {
    let (prefill, decode) = ([engine(slow())], engine(config()));
    let behind = beside(&decode, 100).await;
    let proxy = entry(&prefill, &[&behind]).await;
    let mut client = proxy.client(Version::H1).await;
    let body = chat(1, &json!({})).to_string();
    let asks = client.post(CHAT, body);
    let leaves = becomes(behind.admin(), 1);
    tokio::select! {
        reply = asks => panic!("{}", reply.text()),
        () = leaves => {}
    }
    let left = Instant::now();
    client.abandon();
    becomes(behind.admin(), 0).await;
    let took = left.elapsed();
    assert!(took < LEASE / 2, "not for want of renewals: {took:?}");
}

#[tokio::test]
async fn a_place_lasts_as_long_as_it_is_asked_for() {
    let decode = engine(config());
    let behind = beside(&decode, 100).await;
    let begun = Instant::now();
    while begun.elapsed() < LEASE * 2 {
        assert_eq!(say(HOLD, "one", &behind).await, 200);
        tokio::time::sleep(LEASE / 5).await;
        assert_eq!(told(behind.admin()).await, 1);
    }
    let silent = Instant::now();
    becomes(behind.admin(), 0).await;
    let took = silent.elapsed();
    assert!(took > LEASE / 2 && took < LEASE * 3, "{took:?}");
    let lapsed = behind.metric("outrigger_leases_lapsed_total", "").await;
    assert!(lapsed >= 1.0);
    assert_eq!(say(HOLD, "two", &behind).await, 200);
    becomes(behind.admin(), 1).await;
    assert_eq!(say(FREE, "two", &behind).await, 200);
    let freed = Instant::now();
    becomes(behind.admin(), 0).await;
    assert!(freed.elapsed() < LEASE / 2);
}

#[tokio::test]
async fn who_has_no_place_left_is_passed_over() {
    let prefill = [engine(config())];
    let (full, free) = (engine(config()), engine(config()));
    let (at_full, at_free) = (beside(&full, 1).await, beside(&free, 100).await);
    let fleet = Fleet {
        prefill: Vec::new(),
        proxy: entry(&prefill, &[&at_full, &at_free]).await,
        decode: vec![full, free],
    };
    let labels = r#"outcome="refused""#;
    let refused = || fleet.proxy.metric("outrigger_leases_asked_total", labels);
    let before = refused().await;
    let begun = Instant::now();
    for seed in 0.. {
        assert!(begun.elapsed() < PATIENCE, "the full one never refuses");
        assert_eq!(say(HOLD, "all", &at_full).await, 200);
        assert_eq!(say(HOLD, "more", &at_full).await, 503);
        let told = fleet.both(Version::H1, CHAT, &chat(seed, &json!({}))).await;
        told.assert_same();
        assert_eq!(told.record["fallback"], Value::Null, "{}", told.record);
        if refused().await > before {
            break;
        }
    }
}

#[tokio::test]
async fn an_entry_that_is_killed_holds_nothing() {
    let (prefill, decode) = ([engine(slow())], engine(config()));
    let behind = beside(&decode, 100).await;
    let prefill_url = format!("{};role=prefill", prefill[0].url());
    let peer = format!("http://{}", behind.inbound());
    let flags = ["--policy", "kv", "--engine", &prefill_url, "--peer", &peer];
    let process = Process::proxy(PROGRAM, &flags).await;
    wait_alive(process.admin, 2).await;
    let outbound = process.listener("outbound").await;
    let mut client = Client::connect(outbound, Version::H1).await;
    let body = chat(1, &json!({"stream": true})).to_string();
    let ask = request(Method::POST, CHAT, body);
    let asks = tokio::spawn(async move { client.try_send(ask).await.is_some() });
    becomes(behind.admin(), 1).await;
    process.signal("KILL");
    let killed = Instant::now();
    becomes(behind.admin(), 0).await;
    assert!(killed.elapsed() < LEASE * 3);
    asks.abort();
}
