//! Fleets of halves of SGLang that lack something: no half gets a request without its other half, whoever is missing, and
//! nobody of unknown kind is taken for a half, or for an engine that serves requests whole.

use super::disaggregation::{CHAT, COMPLETIONS, always, chat, completion, disaggregation};
use super::disaggregation_sglang::{Fleet, config, half, start};
use super::migration::migration;
use outrigger_conformance::{
    harness::{ProxyBuilder, Upstream, Version, eventually},
    sim::{Config, Fault, FaultKind, Side},
};
use serde_json::{Value, json};
use std::time::Duration;

/// It comes back where it was.
fn again(side: Side, port: u16) -> Config {
    Config { port, ..half(side) }
}

/// One of each, and nobody else.
async fn of_halves(moves: Value) -> Fleet {
    let (prefill, decode) = (vec![half(Side::Prefill)], vec![half(Side::Decode)]);
    let build = |builder: ProxyBuilder| {
        let builder = builder.edit(disaggregation(always(json!({}))));
        builder.edit(migration(moves))
    };
    Fleet::build(prefill, decode, Vec::new(), build).await
}

/// Nobody is there for a request; says why it was not split.
async fn assert_nobody(fleet: &Fleet, body: &Value, reason: &str) {
    let (status, text, _) = fleet.ask(Version::H1, CHAT, body).await;
    assert_eq!(status, 503, "{text}");
    let label = format!("reason=\"{reason}\"");
    let counted = fleet.proxy.metric("outrigger_disaggregation_total", &label);
    assert!(counted.await >= 1.0, "{reason}");
}

#[tokio::test]
async fn a_half_is_not_asked_for_all_of_it_while_the_other_is_missing() {
    for (side, reason) in [(Side::Prefill, "no_prefill"), (Side::Decode, "no_decode")] {
        // Streams wait in a storm.
        let mut fleet = of_halves(json!({"resume_timeout_ms": 300})).await;
        let engines = match side {
            Side::Prefill => &mut fleet.prefill,
            Side::Decode => &mut fleet.decode,
        };
        let mut gone = engines.remove(0);
        let port = gone.http_addr.port();
        gone.stop();
        fleet.proxy.wait_alive(1).await;
        assert_nobody(&fleet, &chat(1, &json!({"stream": true})), reason).await;
        assert_nobody(&fleet, &chat(2, &json!({})), reason).await;
        // What no pair could serve either is refused by whoever is there.
        let (status, text, _) = fleet
            .ask(Version::H2, CHAT, &chat(3, &json!({"n": 2})))
            .await;
        assert_eq!(status, 400, "{text}");
        let (status, text, _) = fleet
            .ask(Version::H2, CHAT, &chat(3, &json!({"model": "another"})))
            .await;
        assert!((400..500).contains(&status), "{status} {text}");
        let back = start(again(side, port));
        match side {
            Side::Prefill => fleet.prefill.push(back),
            Side::Decode => fleet.decode.push(back),
        }
        fleet.proxy.wait_alive(2).await;
        let record = fleet.same(Version::H1, CHAT, &chat(4, &json!({}))).await;
        assert_eq!(record["decision"], "split", "{record}");
    }
}

#[tokio::test]
async fn an_engine_of_unknown_kind_gets_no_leg_and_nothing_whole_beside_halves() {
    let fakes = [(); 2].map(|()| {
        Upstream::engine(
            |mut conn, _| async move { conn.json("200 OK", "{}").await.then_some(conn) },
        )
    });
    let [prefill, decode] = fakes;
    let unknown = [(prefill.await, "prefill"), (decode.await, "decode")];
    let flags: Vec<_> = (unknown.iter())
        .map(|(fake, role)| format!("http://{};role={role}", fake.address))
        .collect();
    for fields in [always(json!({})), json!({"decision_header": true})] {
        let (prefill, decode) = (start(half(Side::Prefill)), start(half(Side::Decode)));
        let mut builder = ProxyBuilder::new().flag("--policy", "kv");
        for flag in [&prefill.url(), &decode.url()].into_iter().chain(&flags) {
            builder = builder.flag("--engine", flag);
        }
        let proxy = builder.edit(disaggregation(fields)).start();
        proxy.wait_alive(4).await;
        let mut fleet = Fleet {
            prefill: vec![prefill],
            decode: vec![decode],
            whole: Vec::new(),
            proxy,
        };
        for seed in 0..6 {
            let record = fleet.same(Version::H1, CHAT, &chat(seed, &json!({}))).await;
            assert_eq!(record["decision"], "split", "{record}");
        }
        fleet.decode.clear();
        fleet.proxy.wait_alive(3).await;
        assert_nobody(&fleet, &chat(7, &json!({})), "no_decode").await;
    }
    for (fake, role) in &unknown {
        assert!(
            fake.exchanges().is_empty(),
            "{role}: {:?}",
            fake.exchanges()
        );
    }
}

#[tokio::test]
async fn a_half_does_not_stand_in_for_an_engine_that_failed() {
    let (prefill, decode) = (vec![half(Side::Prefill)], vec![half(Side::Decode)]);
    let fields = json!({"mode": "never", "decision_header": true});
    let fleet = Fleet::start(prefill, decode, vec![config()], fields).await;
    fleet.whole[0].fault(Fault {
        count: 100,
        ..Fault::new(FaultKind::Http500)
    });
    for more in [json!({}), json!({"stream": true})] {
        let (status, text, _) = fleet.ask(Version::H1, CHAT, &chat(1, &more)).await;
        assert_eq!(status, 500, "{text}");
    }
}

/// The only half for decode dies in the middle of a stream, and comes back: the half for prefill is not asked for the rest.
#[tokio::test]
async fn a_stream_waits_for_the_half_that_is_missing() {
    // It asks for the half that died until that is known to be dead.
    let mut fleet = of_halves(json!({"attempts_max": 50})).await;
    let mut gone = fleet.decode.remove(0);
    let port = gone.http_addr.port();
    gone.fault(Fault {
        after_tokens: 9,
        ..Fault::new(FaultKind::Die)
    });
    let restart = async {
        eventually("it died", || async { gone.is_dead().then_some(()) }).await;
        gone.stop();
        fleet.proxy.wait_alive(1).await;
        // Longer than the stream needs to ask for somebody else.
        tokio::time::sleep(Duration::from_millis(500)).await;
        start(again(Side::Decode, port))
    };
    let body = completion(1, &json!({"stream": true, "max_tokens": 60}));
    let (_, _back) = tokio::join!(fleet.same(Version::H1, COMPLETIONS, &body), restart);
    assert!(fleet.proxy.metric("outrigger_migrations_total", "").await >= 1.0);
}
