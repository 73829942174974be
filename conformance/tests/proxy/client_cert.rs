//! What is told of a client's certificate (`x-forwarded-client-cert`), and whose requests come from inside.

use super::tls::{Ca, TlsClient, context, outbound};
use outrigger_conformance::harness::{OneChain, ProxyBuilder, TestProxy, Upstream, raw};
use outrigger_xds::resource::{
    cidr::CidrRange,
    client_cert::{ClientCert, Forward},
    edge::{Edge, Underscores},
};

fn with(server: &Upstream, edge: Edge) -> TestProxy {
    ProxyBuilder::new()
        .server(server.address)
        .edit(move |bootstrap| {
            let http = outbound(bootstrap).http();
            http.edge = edge;
            http.preserve_external_request_id = false;
        })
        .start()
}

async fn get(proxy: &TestProxy, fields: &str) -> String {
    let ask = format!("GET / HTTP/1.1\r\nhost: h\r\nconnection: close\r\n{fields}\r\n");
    raw(proxy.outbound(), ask.as_bytes()).await
}

const FORGED: &str = "Hash=forged";

#[tokio::test]
async fn a_certificate_is_told_as_the_configuration_says() {
    let ca = Ca::new();
    let ours = ca.pair(&["proxy.test", "spiffe://test/proxy"]);
    let theirs = ca.pair(&["client.test", "other.test", "spiffe://test/client"]);
    let server = Upstream::named("a").await;
    let subject = "CN=rcgen self signed cert";
    let all =
        format!("Subject=\"{subject}\";URI=spiffe://test/client;DNS=client.test;DNS=other.test");
    for (forward, shows, want) in [
        (Forward::Sanitize, true, None),
        (Forward::ForwardOnly, true, Some(FORGED.to_owned())),
        (Forward::ForwardOnly, false, None),
        (Forward::AlwaysForwardOnly, false, Some(FORGED.to_owned())),
        (Forward::AppendForward, false, None),
        (
            Forward::AppendForward,
            true,
            Some(format!("{FORGED},By=spiffe://test/proxy;Hash=#;{all}")),
        ),
        (Forward::SanitizeSet, false, None),
        (
            Forward::SanitizeSet,
            true,
            Some(format!("By=spiffe://test/proxy;Hash=#;{all}")),
        ),
    ] {
        let mut tls = context(&[&ours]);
        tls.common.validation = Some(ca.validation(Vec::new()));
        let edge = Edge {
            client_cert: ClientCert {
                forward,
                subject: true,
                dns: true,
                uri: true,
                ..ClientCert::default()
            },
            ..Edge::default()
        };
        let proxy = ProxyBuilder::new()
            .server(server.address)
            .edit(move |bootstrap| {
                let listener = outbound(bootstrap);
                listener.chain().tls = Some(tls);
                listener.http().edge = edge;
            })
            .start();
        for protocol in ["http/1.1", "h2"] {
            let client = TlsClient::new(&ca, shows.then_some(&theirs)).alpn(&[protocol]);
            assert!(client.get(proxy.outbound(), "/x").await.is_some());
            let told = server.exchanges().pop().unwrap();
            let told = told.header("x-forwarded-client-cert").to_owned();
            assert_eq!(
                hashless(&told),
                want.clone().unwrap_or_default(),
                "{forward:?}"
            );
        }
    }
}

/// With `#` for 64 hexadecimal digits.
fn hashless(told: &str) -> String {
    let parts = told
        .split(';')
        .map(|part| match part.strip_prefix("Hash=") {
            Some(hash) if hash.len() == 64 && hash.bytes().all(|byte| byte.is_ascii_hexdigit()) => {
                "Hash=#".to_owned()
            }
            _ => part.to_owned(),
        });
    parts.collect::<Vec<_>>().join(";")
}

#[tokio::test]
async fn whole_certificates_are_told_escaped() {
    let ca = Ca::new();
    let (ours, theirs) = (ca.pair(&["proxy.test"]), ca.pair(&["client.test"]));
    let server = Upstream::named("a").await;
    let mut tls = context(&[&ours]);
    tls.common.validation = Some(ca.validation(Vec::new()));
    let proxy = ProxyBuilder::new()
        .server(server.address)
        .edit(move |bootstrap| {
            let listener = outbound(bootstrap);
            listener.chain().tls = Some(tls);
            listener.http().edge.client_cert = ClientCert {
                forward: Forward::SanitizeSet,
                cert: true,
                chain: true,
                uri: true,
                ..ClientCert::default()
            };
        })
        .start();
    let client = TlsClient::new(&ca, Some(&theirs));
    assert!(client.get(proxy.outbound(), "/x").await.is_some());
    let told = server.only();
    let told = told.header("x-forwarded-client-cert");
    let pem = theirs.chain.replace("\r\n", "\n").replace('\n', "%0A");
    let pem = pem.replace(' ', "%20").replace('+', "%2B");
    let pem = pem.replace('/', "%2F").replace('=', "%3D");
    let (hash, rest) = told.split_once(';').unwrap();
    assert!(hash.starts_with("Hash="), "{told}");
    assert_eq!(rest, format!("Cert=\"{pem}\";Chain=\"{pem}\";URI="));
}

#[tokio::test]
async fn requests_from_inside_keep_their_ids_and_are_called_internal() {
    let server = Upstream::named("a").await;
    let inside = vec![CidrRange::new("127.0.0.0".parse().unwrap(), 8)];
    let proxy = with(
        &server,
        Edge {
            internal_addresses: inside,
            ..Edge::default()
        },
    );
    let id = "x-request-id: mine\r\nx-envoy-internal: no\r\n";
    get(&proxy, id).await;
    let told = server.exchanges().pop().unwrap();
    assert_eq!(told.header("x-envoy-internal"), "true");
    assert_eq!(told.header("x-request-id"), "mine");
    assert_eq!(told.header("x-envoy-external-address"), "");
    assert_eq!(told.header("x-forwarded-for"), "127.0.0.1");
    // Somebody is behind whoever asks.
    get(&proxy, &format!("{id}x-forwarded-for: 127.0.0.1\r\n")).await;
    let told = server.exchanges().pop().unwrap();
    assert_eq!(told.header("x-envoy-internal"), "");
    assert_ne!(told.header("x-request-id"), "mine");
    assert_eq!(told.header("x-envoy-external-address"), "127.0.0.1");
}

#[tokio::test]
async fn headers_with_underscores_are_refused_or_dropped() {
    let server = Upstream::named("a").await;
    let edge = |underscores| Edge {
        underscores,
        ..Edge::default()
    };
    let fields = "x_odd: 1\r\nx-plain: 2\r\n";
    let allows = with(&server, edge(Underscores::Allow));
    get(&allows, fields).await;
    assert_eq!(server.exchanges().pop().unwrap().header("x_odd"), "1");
    let drops = with(&server, edge(Underscores::Drop));
    get(&drops, fields).await;
    let told = server.exchanges().pop().unwrap();
    assert_eq!((told.header("x_odd"), told.header("x-plain")), ("", "2"));
    let dropped = "envoy_http1_dropped_headers_with_underscores";
    assert!(drops.metric(dropped, "").await >= 1.0);
    let before = server.exchanges().len();
    let refuses = with(&server, edge(Underscores::Reject));
    let answer = get(&refuses, fields).await;
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
    let line = refuses.only_log().await;
    assert_eq!(line["response_code_details"], "http1.unexpected_underscore");
    assert_eq!(line["response_flags"], "DPE");
    assert_eq!(server.exchanges().len(), before);
    let answer = get(&refuses, "x-plain: 2\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
}
