//! Clusters whose endpoints are not all secured alike (`transport_socket_matches`).

use super::tls::Ca;
use super::upstream_tls::{dns, fleet, terminating};
use http::Method;
use outrigger_conformance::harness::{ProxyBuilder, Upstream, Version, request};
use outrigger_xds::resource::{
    endpoint::LbEndpoint,
    socket_match::SocketMatch,
    tls::{CommonTls, UpstreamTls},
};
use serde_json::{Map, Value, json};

fn wanted(value: &Value) -> Map<String, Value> {
    value.as_object().unwrap().clone()
}

fn told(endpoint: &mut LbEndpoint, value: Value) {
    let place = "envoy.transport_socket_match".to_owned();
    endpoint.metadata.insert(place, value);
}

#[tokio::test]
async fn an_endpoint_is_secured_as_its_metadata_says() {
    let ca = Ca::new();
    let (server, pair) = (Upstream::named("a").await, ca.pair(&["engine.test"]));
    let (tls_address, seen) = terminating(&pair, None, server.address).await;
    let tls = UpstreamTls {
        common: CommonTls {
            validation: Some(ca.validation(vec![dns("engine.test")])),
            ..CommonTls::default()
        },
        sni: "engine.test".into(),
    };
    let proxy = ProxyBuilder::new()
        .flag("--policy", "round_robin")
        .server(tls_address)
        .server(server.address)
        .edit(move |bootstrap| {
            let fleet = fleet(bootstrap);
            let endpoints = &mut fleet.load_assignment.endpoints;
            told(&mut endpoints[0], json!({"tlsMode": "istio", "other": 1}));
            told(&mut endpoints[1], json!({"tlsMode": "none"}));
            fleet.socket_matches = vec![
                SocketMatch {
                    name: "two".into(),
                    wanted: wanted(&json!({"tlsMode": "istio", "other": 2})),
                    tls: None,
                },
                SocketMatch {
                    name: "mutual".into(),
                    wanted: wanted(&json!({"tlsMode": "istio"})),
                    tls: Some(tls),
                },
                SocketMatch {
                    name: "plain".into(),
                    wanted: Map::new(),
                    tls: None,
                },
            ];
        })
        .start();
    let mut client = proxy.client(Version::H1).await;
    for _ in 0..4 {
        let reply = client.send(request(Method::GET, "/x", "")).await;
        assert_eq!(reply.status, 200);
    }
    assert_eq!(server.exchanges().len(), 4);
    let sni = seen.lock().unwrap()[0].sni.clone();
    assert_eq!(sni.as_deref(), Some("engine.test"));
    assert_eq!(
        server.connections(),
        2,
        "one that was secured, one that was not"
    );
}
