//! A stream goes on at an engine of another kind that serves the same model: by token ids, which mean the same to both.

use super::disaggregation::{COMPLETIONS, completion};
use super::support::story;
use outrigger_conformance::{
    harness::{Client, ProxyBuilder, Version},
    sim::{Config, Fault, FaultKind, Profile, SimEngine},
};
use serde_json::json;

fn engine(profile: Profile) -> SimEngine {
    let config = Config {
        profile,
        decode_itl_ms: 1.0,
        ..Config::default()
    };
    SimEngine::start(config).unwrap()
}

#[tokio::test]
async fn a_stream_goes_from_vllm_to_sglang_and_back() {
    let engines = [engine(Profile::Vllm), engine(Profile::Sglang)];
    let builder = ProxyBuilder::new().flag("--engine", &engines[0].url());
    let proxy = builder.flag("--engine", &engines[1].url()).start();
    proxy.wait_alive(2).await;
    for (seed, kind) in [
        FaultKind::Reset,
        FaultKind::InBandError,
        FaultKind::Truncate,
    ]
    .into_iter()
    .enumerate()
    {
        // Whoever begins hands it to the other, and gets it back.
        for engine in &engines {
            engine.fault(Fault {
                after_tokens: 9,
                ..Fault::new(kind)
            });
        }
        let body = completion(seed, &json!({"stream": true, "max_tokens": 60})).to_string();
        let mut client = proxy.client(Version::H1).await;
        let got = client.post(COMPLETIONS, body.clone()).await.text();
        let alone = self::engine(Profile::Vllm);
        let mut client = Client::connect(alone.http_addr, Version::H1).await;
        let expected = client.post(COMPLETIONS, body).await.text();
        let (got, expected) = (story(&got), story(&expected));
        assert_eq!(got.problem(), None, "{kind:?}");
        assert_eq!(
            (got.text, got.finish),
            (expected.text, expected.finish),
            "{kind:?}"
        );
        // Whoever failed is passed over for a second.
        tokio::time::sleep(std::time::Duration::from_millis(1050)).await;
    }
    assert!(proxy.metric("outrigger_migrations_total", "").await >= 6.0);
}
