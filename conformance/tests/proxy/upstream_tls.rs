//! TLS towards upstreams: whom we believe, by which name, and who we are to them.

use super::{
    clusters::{health_check, wait_failed},
    tls::{Ca, Pair, context, der, outbound, telling},
};
use http::Method;
use outrigger_conformance::{
    harness::{EchoH2, OneChain, ProxyBuilder, Upstream, Version, alive, eventually},
    sim::{Config, SimEngine},
};
use outrigger_proxy::bootstrap::{FLEET, INBOUND};
use outrigger_xds::resource::{
    bootstrap::Bootstrap,
    cluster::{Cluster, UpstreamProtocol},
    health_check::Checker,
    listener::AccessLogFormat,
    tls::{CommonTls, NameKind, NameMatch, NamePattern, UpstreamTls},
};
use rustls::{
    RootCertStore, ServerConfig,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::WebPkiClientVerifier,
};
use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex},
};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;

/// What a server of TLS saw of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SeenBy {
    pub(super) sni: Option<String>,
    pub(super) alpn: Option<String>,
    pub(super) client: Option<CertificateDer<'static>>,
}

/// Takes TLS off before `behind`.
pub(super) async fn terminating(
    pair: &Pair,
    clients: Option<&Ca>,
    behind: SocketAddr,
) -> (SocketAddr, Arc<Mutex<Vec<SeenBy>>>) {
    let builder = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap();
    let builder = match clients {
        None => builder.with_no_client_auth(),
        Some(ca) => {
            let mut roots = RootCertStore::empty();
            roots
                .add(CertificateDer::from_pem_slice(ca.pem.as_bytes()).unwrap())
                .unwrap();
            let provider = Arc::new(ring::default_provider());
            let verifier =
                WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
            builder.with_client_cert_verifier(verifier.unwrap())
        }
    };
    let key = PrivateKeyDer::from_pem_slice(pair.key.as_bytes()).unwrap();
    let mut config = builder.with_single_cert(vec![der(pair)], key).unwrap();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let seen: Arc<Mutex<Vec<SeenBy>>> = Arc::default();
    let noted = seen.clone();
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let (acceptor, noted) = (acceptor.clone(), noted.clone());
            tokio::spawn(async move {
                let Ok(mut stream) = acceptor.accept(socket).await else {
                    return;
                };
                let connection = stream.get_ref().1;
                let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
                noted.lock().unwrap().push(SeenBy {
                    sni: connection.server_name().map(str::to_owned),
                    alpn: connection.alpn_protocol().map(text),
                    client: connection.peer_certificates().map(|all| all[0].clone()),
                });
                let mut plain = TcpStream::connect(behind).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut stream, &mut plain).await;
            });
        }
    });
    (address, seen)
}

pub(super) fn fleet(bootstrap: &mut Bootstrap) -> &mut Cluster {
    let mut all = bootstrap.clusters.iter_mut();
    all.find(|cluster| cluster.name == FLEET).unwrap()
}

pub(super) fn dns(name: &str) -> NameMatch {
    NameMatch {
        kind: NameKind::Dns,
        pattern: NamePattern::Exact(name.into()),
    }
}

#[tokio::test]
async fn upstreams_are_reached_over_tls_with_a_name_and_a_certificate() {
    let (ca, ours) = (Ca::new(), Ca::new());
    let own = ours.pair(&["spiffe://fleet.test/proxy"]);
    let (plain, echo) = (telling().await, EchoH2::start().await);
    for (protocol, behind, alpn) in [
        (UpstreamProtocol::Http1, plain.address, "http/1.1"),
        (UpstreamProtocol::Http2, echo.address, "h2"),
    ] {
        let pair = ca.pair(&["engine.test"]);
        let (address, seen) = terminating(&pair, Some(&ours), behind).await;
        let tls = UpstreamTls {
            common: CommonTls {
                certificates: vec![own.resource()],
                validation: Some(ca.validation(vec![dns("engine.test")])),
                ..CommonTls::default()
            },
            sni: "engine.test".into(),
        };
        let proxy = ProxyBuilder::new()
            .server(address)
            .edit(move |bootstrap| {
                fleet(bootstrap).protocol = protocol;
                fleet(bootstrap).tls = Some(tls);
            })
            .start();
        for version in Version::BOTH {
            let mut client = proxy.client(version).await;
            for _ in 0..2 {
                let reply = client.post("/x", "{}").await;
                assert_eq!(reply.status, 200, "{protocol:?} {}", reply.text());
            }
        }
        let expected = SeenBy {
            sni: Some("engine.test".into()),
            alpn: Some(alpn.into()),
            client: Some(der(&own)),
        };
        let seen = seen.lock().unwrap().clone();
        assert_eq!(seen, [expected], "one connection for all: {protocol:?}");
    }
}

#[tokio::test]
async fn an_upstream_that_is_not_believed_gets_no_request() {
    let (ca, stranger, server) = (Ca::new(), Ca::new(), telling().await);
    for (issuer, name, reason) in [
        (
            &stranger,
            "engine.test",
            "TLS_error:_invalid_peer_certificate:_UnknownIssuer",
        ),
        (
            &ca,
            "other.test",
            "TLS_error:_invalid_peer_certificate:_ApplicationVerificationFailure",
        ),
    ] {
        let pair = issuer.pair(&[name]);
        let (address, _seen) = terminating(&pair, None, server.address).await;
        let tls = UpstreamTls {
            common: CommonTls {
                validation: Some(ca.validation(vec![dns("engine.test")])),
                ..CommonTls::default()
            },
            sni: String::new(),
        };
        let proxy = ProxyBuilder::new()
            .server(address)
            .edit(move |bootstrap| {
                fleet(bootstrap).tls = Some(tls);
                let fields = [
                    ("flags", "%RESPONSE_FLAGS%"),
                    ("details", "%RESPONSE_CODE_DETAILS%"),
                    ("reason", "%UPSTREAM_TRANSPORT_FAILURE_REASON%"),
                ];
                let fields: BTreeMap<_, _> = fields
                    .map(|(name, operator)| (name.to_owned(), operator.into()))
                    .into();
                outbound(bootstrap).http().access_log[0].format = AccessLogFormat::Json(fields);
            })
            .start();
        let reply = proxy.client(Version::H1).await.post("/x", "{}").await;
        assert_eq!(reply.status, 503);
        assert_eq!(reply.header("x-outrigger-error"), "UF");
        assert!(
            reply.text().contains("transport failure reason: TLS_error"),
            "{}",
            reply.text()
        );
        let line = proxy.only_log().await;
        let flags = line["flags"].as_str().unwrap();
        assert!(flags.starts_with("UF"), "{flags}");
        assert_eq!(line["reason"], reason);
        let details =
            format!("upstream_reset_before_response_started{{remote_connection_failure|{reason}}}");
        assert_eq!(line["details"], details.as_str());
    }
    assert_eq!(server.exchanges().len(), 0);
}

#[tokio::test]
async fn proxies_speak_mutual_tls_the_feed_included() {
    let ca = Ca::new();
    let name = |at: &str| format!("spiffe://fleet.test/{at}");
    let pairs = [ca.pair(&[&name("a")]), ca.pair(&[&name("b")])];
    let believed = |at: &str| NameMatch {
        kind: NameKind::Uri,
        pattern: NamePattern::Exact(name(at)),
    };
    let mut server = context(&[&pairs[1]]);
    server.require_client_certificate = true;
    server.common.validation = Some(ca.validation(vec![believed("a")]));
    let engine = SimEngine::start(Config::default()).unwrap();
    let far = ProxyBuilder::new()
        .engine(engine.http_addr)
        .edit(move |bootstrap| {
            let mut all = bootstrap.listeners.iter_mut();
            let inbound = all.find(|listener| listener.name == INBOUND).unwrap();
            inbound.chain().tls = Some(server);
        })
        .start();
    let tls = UpstreamTls {
        common: CommonTls {
            certificates: vec![pairs[0].resource()],
            validation: Some(ca.validation(vec![believed("b")])),
            ..CommonTls::default()
        },
        sni: String::new(),
    };
    let near = ProxyBuilder::new()
        .peer(far.inbound())
        .edit(move |bootstrap| fleet(bootstrap).tls = Some(tls))
        .start();
    near.wait_alive(1).await;
    let body = r#"{"model":"sim","prompt":"hello","max_tokens":2}"#;
    for version in Version::BOTH {
        let mut client = near.client(version).await;
        let reply = client.post("/v1/completions", body).await;
        assert_eq!(reply.status, 200, "{}", reply.text());
    }
    // Without it, a peer hears nothing.
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

#[tokio::test]
async fn health_checks_shake_hands_as_requests_do() {
    let ca = Ca::new();
    let plain = Upstream::named("a").await;
    let pair = ca.pair(&["engine.test"]);
    let (address, seen) = terminating(&pair, None, plain.address).await;
    let tls = UpstreamTls {
        common: CommonTls {
            validation: Some(ca.validation(vec![dns("engine.test")])),
            ..CommonTls::default()
        },
        sni: "engine.test".into(),
    };
    let proxy = ProxyBuilder::new()
        .server(address)
        .edit(move |bootstrap| {
            fleet(bootstrap).health_check = Some(health_check(Checker::Http {
                host: "health.example".into(),
                path: "/health".into(),
                method: Method::GET,
                expected: std::iter::once(200..201).collect(),
                retriable: Vec::new(),
                http2: false,
            }));
            fleet(bootstrap).tls = Some(tls);
        })
        .start();
    wait_failed(&proxy, 0, false).await;
    assert_eq!(plain.exchanges()[0].path(), "/health");
    let seen = seen.lock().unwrap()[0].clone();
    assert_eq!(
        (seen.sni.as_deref(), seen.alpn.as_deref()),
        (Some("engine.test"), Some("http/1.1"))
    );
}
