//! Certificates that change while the proxy runs, from secrets and from files, without a connection noticing.

use super::{
    dynamic::{Files, typed},
    tls::{Ca, Pair, TlsClient, context, der, outbound},
    upstream_tls::{fleet, terminating},
};
use outrigger_conformance::{
    harness::{Client, OneChain, ProxyBuilder, TestProxy, Upstream, Version, alive, eventually},
    sim::{Config, SimEngine},
};
use outrigger_xds::resource::{
    secret::{SecretConfig, ValidationSecret},
    tls::{CommonTls, DownstreamTls, UpstreamTls},
};
use serde_json::{Value, json};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

pub(super) fn secret(name: &str, content: Value) -> Value {
    let mut secret = content;
    secret["name"] = json!(name);
    typed("envoy.extensions.transport_sockets.tls.v3.Secret", secret)
}

pub(super) fn certificate(pair: &Pair) -> Value {
    let (chain, key) = (&pair.chain, &pair.key);
    json!({ "tls_certificate": {
        "certificate_chain": { "inline_string": chain }, "private_key": { "inline_string": key },
    } })
}

fn believing(ca: &Ca) -> Value {
    json!({ "validation_context": { "trusted_ca": { "inline_string": ca.pem } } })
}

fn config(files: &Files, name: &str) -> SecretConfig {
    SecretConfig {
        name: name.into(),
        source: Some(files.source("secrets.yaml")),
    }
}

/// Certificate and CA are secrets.
fn secured(files: &Files) -> DownstreamTls {
    DownstreamTls {
        common: CommonTls {
            certificate_secrets: vec![config(files, "own")],
            validation_secret: Some(ValidationSecret {
                secret: config(files, "ca"),
                names: Vec::new(),
            }),
            ..CommonTls::default()
        },
        require_client_certificate: true,
    }
}

async fn shows(client: &TlsClient, proxy: &TestProxy, pair: &Pair) {
    eventually("the certificate is shown", || async {
        let answer = client.get(proxy.outbound(), "/x").await?;
        (answer.leaf == der(pair)).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_listener_takes_new_secrets_and_open_connections_stay() {
    let (files, ca, server) = (Files::new(), Ca::new(), Upstream::named("a").await);
    let (old, new, own) = (
        ca.pair(&["proxy.test"]),
        ca.pair(&["proxy.test"]),
        ca.pair(&["client"]),
    );
    let trusted = secret("ca", believing(&ca));
    files.respond(
        "secrets.yaml",
        "1",
        &[secret("own", certificate(&old)), trusted.clone()],
    );
    let tls = secured(&files);
    let proxy = ProxyBuilder::new()
        .server(server.address)
        .edit(move |bootstrap| outbound(bootstrap).chain().tls = Some(tls))
        .start();
    let client = TlsClient::new(&ca, Some(&own));
    shows(&client, &proxy, &old).await;
    let mut open = client.shake(proxy.outbound()).await.unwrap();
    assert!(
        TlsClient::new(&ca, None)
            .get(proxy.outbound(), "/x")
            .await
            .is_none()
    );
    files.respond(
        "secrets.yaml",
        "2",
        &[secret("own", certificate(&new)), trusted.clone()],
    );
    shows(&client, &proxy, &new).await;
    open.write_all(b"GET /x HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        .await
        .unwrap();
    let mut answer = String::new();
    open.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

#[tokio::test]
async fn a_bad_secret_changes_nothing_and_the_other_of_its_update_applies() {
    let (files, ca, server) = (Files::new(), Ca::new(), Upstream::named("a").await);
    let (new, own) = (ca.pair(&["proxy.test"]), ca.pair(&["client"]));
    let good = [
        secret("own", certificate(&new)),
        secret("ca", believing(&ca)),
    ];
    files.respond("secrets.yaml", "2", &good);
    let tls = secured(&files);
    let proxy = ProxyBuilder::new()
        .server(server.address)
        .edit(move |bootstrap| outbound(bootstrap).chain().tls = Some(tls))
        .start();
    let client = TlsClient::new(&ca, Some(&own));
    shows(&client, &proxy, &new).await;
    let mut wrong = ca.pair(&["proxy.test"]);
    wrong.key.clone_from(&new.key);
    let stranger = Ca::new();
    files.respond(
        "secrets.yaml",
        "3",
        &[
            secret("own", certificate(&wrong)),
            secret("ca", believing(&stranger)),
        ],
    );
    eventually("the other CA is believed", || async {
        let refused = client.get(proxy.outbound(), "/x").await.is_none();
        refused.then_some(())
    })
    .await;
    let theirs = stranger.pair(&["client"]);
    shows(&TlsClient::new(&ca, Some(&theirs)), &proxy, &new).await;
    assert!(proxy.metric("envoy_sds_update_rejected", "own").await >= 1.0);
    let dump = Client::get(proxy.admin(), "/config_dump").await.text();
    assert!(
        dump.contains("does not fit") && dump.contains("[redacted]"),
        "{dump}"
    );
    assert!(!dump.contains("PRIVATE KEY"), "{dump}");
    let certs = Client::get(proxy.admin(), "/certs").await.json();
    let shown = &certs["certificates"][0]["cert_chain"][0];
    assert_eq!(shown["subject_alt_names"], json!([{ "dns": "proxy.test" }]));
    assert!(
        shown["days_until_expiration"]
            .as_str()
            .unwrap()
            .parse::<u64>()
            .unwrap()
            > 0,
        "{shown}"
    );
    assert!(certs["certificates"][0]["ca_cert"][0]["serial_number"].is_string());
}

#[tokio::test]
async fn a_listener_whose_secrets_do_not_come_shakes_no_hands() {
    let (files, ca, server) = (Files::new(), Ca::new(), Upstream::named("a").await);
    files.put("secrets.yaml", "not yet");
    let mut own = config(&files, "own");
    own.source.as_mut().unwrap().initial_fetch_timeout = Duration::from_millis(300);
    let tls = DownstreamTls {
        common: CommonTls {
            certificate_secrets: vec![own],
            ..CommonTls::default()
        },
        require_client_certificate: false,
    };
    let proxy = ProxyBuilder::new()
        .server(server.address)
        .edit(move |bootstrap| outbound(bootstrap).chain().tls = Some(tls))
        .start();
    assert_eq!(
        Client::get(proxy.admin(), "/ready").await.text(),
        "INITIALIZING\n"
    );
    let place = eventually("it listens all the same", || async {
        proxy.proxy.address(outrigger_proxy::bootstrap::OUTBOUND)
    })
    .await;
    let client = TlsClient::new(&ca, None);
    assert!(client.get(place, "/x").await.is_none());
    let metric = "envoy_listener_server_ssl_socket_factory_downstream_context_secrets_not_ready";
    let port = place.port().to_string();
    assert!(proxy.metric(metric, &port).await >= 1.0);
    let pair = ca.pair(&["proxy.test"]);
    files.respond("secrets.yaml", "1", &[secret("own", certificate(&pair))]);
    shows(&client, &proxy, &pair).await;
}

#[tokio::test]
async fn certificates_of_the_command_line_are_read_again_when_their_files_change() {
    let (files, ca, server) = (Files::new(), Ca::new(), Upstream::named("a").await);
    let (old, new, own) = (
        ca.pair(&["proxy.test"]),
        ca.pair(&["proxy.test"]),
        ca.pair(&["client"]),
    );
    let put = |pair: &Pair| {
        files.put("cert.pem", &pair.chain);
        files.put("key.pem", &pair.key);
    };
    put(&old);
    files.put("ca.pem", &ca.pem);
    let proxy = ProxyBuilder::new()
        .server(server.address)
        .flag("--tls-cert", &files.path("cert.pem"))
        .flag("--tls-key", &files.path("key.pem"))
        .flag("--tls-client-ca", &files.path("ca.pem"))
        .start();
    let client = TlsClient::new(&ca, Some(&own));
    shows(&client, &proxy, &old).await;
    assert!(
        TlsClient::new(&ca, None)
            .get(proxy.outbound(), "/x")
            .await
            .is_none()
    );
    put(&new);
    shows(&client, &proxy, &new).await;
    // Half of a change is no change.
    let before = proxy
        .metric("outrigger_tls_renewal_failures_total", "outbound")
        .await;
    files.put("cert.pem", &old.chain);
    eventually("the failure is counted", || async {
        let now = proxy
            .metric("outrigger_tls_renewal_failures_total", "outbound")
            .await;
        (now > before).then_some(())
    })
    .await;
    shows(&client, &proxy, &new).await;
    files.put("key.pem", &old.key);
    shows(&client, &proxy, &old).await;
}

#[tokio::test]
async fn upstreams_see_the_new_certificate_on_new_connections_only() {
    let (files, ca, clients) = (Files::new(), Ca::new(), Ca::new());
    let (old, new) = (clients.pair(&["old"]), clients.pair(&["new"]));
    let plain = Upstream::start(|mut conn, asked| async move {
        if asked.path() == "/slow" {
            tokio::time::sleep(Duration::from_millis(600)).await;
        }
        conn.json("200 OK", "{}").await.then_some(conn)
    })
    .await;
    let (address, seen) =
        terminating(&ca.pair(&["engine.test"]), Some(&clients), plain.address).await;
    files.respond(
        "secrets.yaml",
        "1",
        &[
            secret("own", certificate(&old)),
            secret("ca", believing(&ca)),
        ],
    );
    let tls = UpstreamTls {
        common: secured(&files).common,
        sni: String::new(),
    };
    let proxy = ProxyBuilder::new()
        .server(address)
        .edit(move |bootstrap| fleet(bootstrap).tls = Some(tls))
        .start();
    let ask = |path: &'static str| {
        let proxy = &proxy;
        async move {
            proxy
                .client(Version::H1)
                .await
                .post(path, "{}")
                .await
                .status
        }
    };
    let who = || {
        let seen = seen.lock().unwrap();
        seen.iter()
            .map(|seen| seen.client.clone().unwrap())
            .collect::<Vec<_>>()
    };
    assert_eq!(ask("/x").await, 200);
    let renewals = proxy.metric("outrigger_tls_renewals_total", "fleet").await;
    files.respond(
        "secrets.yaml",
        "2",
        &[
            secret("own", certificate(&new)),
            secret("ca", believing(&ca)),
        ],
    );
    eventually("it is renewed", || async {
        let now = proxy.metric("outrigger_tls_renewals_total", "fleet").await;
        (now > renewals).then_some(())
    })
    .await;
    assert_eq!(ask("/x").await, 200);
    assert_eq!(who(), [der(&old)], "the open connection goes on");
    let (slow, quick) = tokio::join!(ask("/slow"), async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        ask("/x").await
    });
    assert_eq!((slow.as_u16(), quick.as_u16()), (200, 200));
    assert_eq!(who(), [der(&old), der(&new)]);
}

#[tokio::test]
async fn flags_make_mutual_tls_between_proxies() {
    let (files, ca) = (Files::new(), Ca::new());
    files.put("ca.pem", &ca.pem);
    for at in ["a", "b"] {
        let pair = ca.pair(&[&format!("spiffe://fleet.test/{at}")]);
        files.put(&format!("{at}.pem"), &pair.chain);
        files.put(&format!("{at}.key"), &pair.key);
    }
    let secured = |at: &str| {
        ProxyBuilder::new()
            .flag("--peer-tls-cert", &files.path(&format!("{at}.pem")))
            .flag("--peer-tls-key", &files.path(&format!("{at}.key")))
            .flag("--peer-tls-ca", &files.path("ca.pem"))
    };
    let engines =
        [Config::default(), Config::default()].map(|config| SimEngine::start(config).unwrap());
    let far = secured("b").engine(engines[1].http_addr).start();
    // With an engine of its own, which is spoken to in plain text.
    let near = secured("a")
        .engine(engines[0].http_addr)
        .peer(far.inbound())
        .start();
    near.wait_alive(2).await;
    for _ in 0..4 {
        let body = r#"{"model":"sim","prompt":"hello","max_tokens":2}"#;
        let reply = near
            .client(Version::H1)
            .await
            .post("/v1/completions", body)
            .await;
        assert_eq!(reply.status, 200, "{}", reply.text());
    }
    let stranger = ProxyBuilder::new().peer(far.inbound()).start();
    let peer = far.inbound().to_string();
    eventually("the feed fails", || async {
        let failures = stranger
            .metric("outrigger_feed_failures_total", &peer)
            .await;
        (failures >= 1.0).then_some(())
    })
    .await;
    assert_eq!(alive(stranger.admin()).await, 0);
}

/// An unused name in a context is no secret, and two ways to say one thing are refused.
#[test]
fn one_way_to_say_who_we_are() {
    let pair = Ca::new().pair(&["a"]);
    let mut tls = context(&[&pair]);
    tls.common.certificate_secrets = vec![SecretConfig {
        name: "own".into(),
        source: None,
    }];
    let mut bootstrap = outrigger_xds::resource::bootstrap::Bootstrap::default();
    let listener = outrigger_proxy::bootstrap::from_options(
        &<outrigger_proxy::options::Options as clap::Parser>::parse_from(["outrigger-proxy"]),
    );
    bootstrap.listeners = listener.unwrap().listeners;
    bootstrap.listeners[0].chain().tls = Some(tls);
    let json = outrigger_xds::load::bootstrap_to_json(&bootstrap);
    let errors = outrigger_xds::load::bootstrap_from_value(json)
        .unwrap_err()
        .to_string();
    assert!(
        errors.contains("only one of 'tls_certificates'"),
        "{errors}"
    );
}
