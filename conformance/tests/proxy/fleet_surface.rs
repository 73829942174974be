//! What a fleet answers as one, and what of it is open to whom: engines' administration, the inbound listener, what only
//! proxies may say.

use super::fleet::{CHAT, COMPLETIONS, ENDPOINT, echo, engine, generation, get, models, pair};
use http::Method;
use outrigger_conformance::{
    harness::{Client, ProxyBuilder, Upstream, Version, free_address, hosts, request},
    sim::{Config, SimEngine},
};
use std::{collections::BTreeSet, net::SocketAddr};

#[tokio::test]
async fn what_administers_engines_is_refused_from_outside() {
    let engine = SimEngine::start(Config {
        dev_mode: true,
        ..Config::default()
    })
    .unwrap();
    let proxy = ProxyBuilder::new().engine(engine.http_addr).start();
    proxy.wait_alive(1).await;
    for version in Version::BOTH {
        for address in [proxy.outbound(), proxy.inbound()] {
            let mut client = Client::connect(address, version).await;
            for path in [
                "/sleep",
                "/sleep/",
                "/sleep?level=2",
                "/%73leep",
                "//sleep",
                "/%2fsleep",
                "/reset_prefix_cache",
                "/server_info",
                "/kv_event_sources",
                "/v1/load_lora_adapter",
                "/v1%2fload_lora_adapter",
                "/collective_rpc",
                "/start_profile",
                "/flush_cache",
            ] {
                for method in [Method::POST, Method::GET] {
                    let reply = client.send(request(method.clone(), path, "{}")).await;
                    assert_eq!(reply.status, 403, "{method} {path} {version:?}");
                }
            }
        }
        let told = proxy.client(version).await.post("/sleep", "{}").await;
        assert_eq!(told.json()["error"]["type"], "PermissionDeniedError");
    }
}

#[tokio::test]
async fn weights_and_corpora_of_engines_are_not_open_to_clients() {
    let server = Upstream::named("engine").await;
    let proxy = ProxyBuilder::new().server(server.address).start();
    let mut client = proxy.client(Version::H1).await;
    for path in [
        // vLLM 0.32
        "/start_weight_update",
        "/start_draft_weight_update",
        "/update_weights",
        "/update_weight_version",
        "/finish_weight_update",
        "/init_weight_transfer_engine",
        "/shutdown_weight_transfer_engine",
        "/weight_checker",
        "/weight_info",
        // SGLang 0.5.23
        "/begin_weight_update",
        "/end_weight_update",
        "/weights_checker",
        "/add_external_corpus",
        "/remove_external_corpus",
        "/list_external_corpora",
        "/remote_instance_transfer_engine_info",
        "/get_remote_instance_transfer_engine_info",
    ] {
        for method in [Method::POST, Method::GET, Method::PUT] {
            let reply = client.send(request(method.clone(), path, "{}")).await;
            assert_eq!(reply.status, 403, "{method} {path}");
        }
    }
    assert!(server.exchanges().is_empty(), "nothing reached the engine");
}

#[tokio::test]
async fn inbound_serves_only_what_it_is_asked_for_by_name_and_has() {
    let engine = engine("sim");
    let proxy = ProxyBuilder::new().engine(engine.http_addr).start();
    proxy.wait_alive(1).await;
    let id = hosts(proxy.admin(), "local").await[0]["outrigger"]["engine_id"]
        .as_str()
        .unwrap()
        .to_owned();
    for version in Version::BOTH {
        let mut client = Client::connect(proxy.inbound(), version).await;
        for (named, status) in [
            (None, 503),
            (Some("elsewhere/1.2.3.4:8000"), 503),
            (Some(id.as_str()), 200),
        ] {
            let mut call = request(Method::POST, COMPLETIONS, generation("sim"));
            if let Some(named) = named {
                call.headers_mut().insert(ENDPOINT, named.parse().unwrap());
            }
            let reply = client.send(call).await;
            assert_eq!(
                reply.status,
                status,
                "{named:?} {version:?}: {}",
                reply.text()
            );
            if status == 503 {
                assert_eq!(
                    reply.header("x-outrigger-retry"),
                    "nothing-sent",
                    "{named:?}"
                );
                assert_eq!(reply.header("x-outrigger-error"), "UH");
            }
        }
    }
}

#[tokio::test]
async fn what_only_proxies_may_say_is_not_believed_of_clients() {
    let (one, two) = (echo("one").await, echo("two").await);
    let (first, second) = pair(one.address, two.address, "round_robin").await;
    let far = hosts(second.admin(), "local").await[0]["outrigger"]["engine_id"]
        .as_str()
        .unwrap()
        .to_owned();
    for version in Version::BOTH {
        // Without a model a request stays here, whatever the client says.
        let mut call = request(Method::POST, "/custom", "{}");
        for (name, value) in [
            (ENDPOINT, far.as_str()),
            ("x-outrigger-prompt-tokens", "1000000"),
            ("x-outrigger-hit-tokens", "5"),
            ("x-outrigger-blocks", "AAAA"),
            ("x-outrigger-retry", "nothing-sent"),
        ] {
            call.headers_mut().insert(name, value.parse().unwrap());
        }
        let reply = first.client(version).await.send(call).await;
        assert_eq!(reply.json()["served_by"], "one");
        let got = one.exchanges().pop().unwrap();
        let told: Vec<_> = got
            .headers
            .iter()
            .filter(|(name, _)| name.starts_with("x-outrigger-") && name != "x-outrigger-via")
            .collect();
        assert!(told.is_empty(), "{told:?}");
    }
    // What peers say to each other is for them, not for the engine.
    for _ in 0..4 {
        assert_eq!(
            first
                .client(Version::H1)
                .await
                .post(CHAT, r#"{"model":"m"}"#)
                .await
                .status,
            200
        );
    }
    for got in two.exchanges() {
        assert_eq!(got.count(ENDPOINT), 0, "{got:?}");
    }
    assert!(!two.exchanges().is_empty());
}

#[tokio::test]
async fn requests_without_a_model_stay_on_their_node() {
    let (one, two) = (echo("one").await, echo("two").await);
    let (first, second) = pair(one.address, two.address, "round_robin").await;
    for version in Version::BOTH {
        for _ in 0..4 {
            for (proxy, name) in [(&first, "one"), (&second, "two")] {
                let reply = proxy.client(version).await.post("/any/path", "{}").await;
                assert_eq!(reply.json()["served_by"], name);
            }
        }
    }
    let own = engine("sim");
    let far = engine("sim");
    let (near, _other) = pair(own.http_addr, far.http_addr, "round_robin").await;
    let mut client = near.client(Version::H1).await;
    for path in ["/health", "/metrics", "/version", "/load", "/ping"] {
        let reply = get(&mut client, path).await;
        assert_eq!(reply.status, 200, "{path}: {}", reply.text());
        assert_eq!(
            reply.header("server"),
            "uvicorn",
            "{path} is the engine's own"
        );
        let port = own.http_addr.port().to_string();
        assert!(
            reply.header(ENDPOINT).ends_with(&port),
            "{path}: {}",
            reply.header(ENDPOINT)
        );
    }
}

#[tokio::test]
async fn a_gateway_answers_for_itself() {
    let engine = engine("sim");
    let beside = ProxyBuilder::new().engine(engine.http_addr).start();
    let gateway = ProxyBuilder::new().peer(beside.inbound()).start();
    let nobody = ProxyBuilder::new().start();
    gateway.wait_alive(1).await;
    for version in Version::BOTH {
        let mut client = gateway.client(version).await;
        assert_eq!(get(&mut client, "/health").await.status, 200);
        assert!(
            get(&mut client, "/version")
                .await
                .text()
                .contains("outrigger")
        );
        assert_eq!(get(&mut client, "/metrics").await.status, 200);
        assert_eq!(
            models(&get(&mut client, "/v1/models").await),
            BTreeSet::from(["sim".to_owned()])
        );
        assert_eq!(
            client.post(COMPLETIONS, generation("sim")).await.status,
            200
        );
        let mut client = nobody.client(version).await;
        assert_eq!(get(&mut client, "/health").await.status, 503);
        assert_eq!(get(&mut client, "/version").await.status, 200);
    }
}

#[tokio::test]
async fn a_loop_ends_in_508() {
    let own = free_address();
    let looped = ProxyBuilder::new()
        .flag("--listen", &own.to_string())
        .server(own)
        .start();
    for version in Version::BOTH {
        for path in [CHAT, "/other"] {
            let reply = looped.client(version).await.post(path, "{}").await;
            assert_eq!(reply.status, 508, "{path} {version:?}: {}", reply.text());
        }
    }
    // Two that send to each other.
    let (a, b) = (free_address(), free_address());
    let build = |own: SocketAddr, other| {
        ProxyBuilder::new()
            .flag("--listen", &own.to_string())
            .server(other)
            .start()
    };
    let (first, _second) = (build(a, b), build(b, a));
    assert_eq!(
        first
            .client(Version::H1)
            .await
            .post("/other", "{}")
            .await
            .status,
        508
    );
}
