//! TLS as clients see it: which certificate, which version, who is let in, and what is told of it.

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::{
    body::Incoming,
    client::conn::{http1, http2},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use outrigger_conformance::harness::{
    Client, OneChain, ProxyBuilder, Upstream, Version, eventually, raw,
};
use outrigger_proxy::bootstrap::OUTBOUND;
use outrigger_xds::resource::{
    bootstrap::Bootstrap,
    listener::{AccessLogFormat, Listener},
    tls::{
        CommonTls, DataSource, DownstreamTls, NameKind, NameMatch, NamePattern, TlsCertificate,
        TlsParams, Validation,
    },
};
use rcgen::{CertificateParams, IsCa, Issuer, KeyPair, SanType};
use rustls::{
    ClientConfig, RootCertStore,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
    version::{TLS12, TLS13},
};
use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

/// A certificate and its key as PEM.
#[derive(Clone)]
pub(super) struct Pair {
    pub(super) chain: String,
    pub(super) key: String,
}

impl Pair {
    pub(super) fn resource(&self) -> TlsCertificate {
        TlsCertificate {
            chain: DataSource::Inline(self.chain.clone().into()),
            key: DataSource::Inline(self.key.clone().into()),
        }
    }
}

pub(super) struct Ca {
    pub(super) pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Ca {
    pub(super) fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        // Two CAs of one name would be told apart by their signatures only.
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let name = format!("CA {}", NEXT.fetch_add(1, Relaxed));
        params
            .distinguished_name
            .push(rcgen::DnType::CommonName, name);
        params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key).unwrap().pem();
        Self {
            pem,
            issuer: Issuer::new(params, key),
        }
    }

    /// A certificate for names; what looks like a URI is one.
    pub(super) fn pair(&self, names: &[&str]) -> Pair {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        for name in names {
            let text = (*name).try_into().unwrap();
            params.subject_alt_names.push(if name.contains("://") {
                SanType::URI(text)
            } else {
                SanType::DnsName(text)
            });
        }
        Pair {
            chain: params.signed_by(&key, &self.issuer).unwrap().pem(),
            key: key.serialize_pem(),
        }
    }

    pub(super) fn validation(&self, names: Vec<NameMatch>) -> Validation {
        Validation {
            trusted_ca: DataSource::Inline(self.pem.clone().into()),
            names,
        }
    }
}

pub(super) fn context(pairs: &[&Pair]) -> DownstreamTls {
    DownstreamTls {
        common: CommonTls {
            certificates: pairs.iter().map(|pair| pair.resource()).collect(),
            alpn: vec!["h2".into(), "http/1.1".into()],
            ..CommonTls::default()
        },
        require_client_certificate: false,
    }
}

pub(super) fn outbound(bootstrap: &mut Bootstrap) -> &mut Listener {
    let mut all = bootstrap.listeners.iter_mut();
    all.find(|listener| listener.name == OUTBOUND).unwrap()
}

/// What a client believes and is.
pub(super) struct TlsClient {
    config: ClientConfig,
    name: &'static str,
}

impl TlsClient {
    pub(super) fn new(ca: &Ca, own: Option<&Pair>) -> Self {
        let mut roots = RootCertStore::empty();
        roots
            .add(CertificateDer::from_pem_slice(ca.pem.as_bytes()).unwrap())
            .unwrap();
        let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(&[&TLS12, &TLS13])
            .unwrap()
            .with_root_certificates(roots);
        let config = match own {
            None => builder.with_no_client_auth(),
            Some(pair) => builder
                .with_client_auth_cert(
                    CertificateDer::pem_slice_iter(pair.chain.as_bytes())
                        .collect::<Result<_, _>>()
                        .unwrap(),
                    PrivateKeyDer::from_pem_slice(pair.key.as_bytes()).unwrap(),
                )
                .unwrap(),
        };
        Self {
            config,
            name: "proxy.test",
        }
    }

    pub(super) fn alpn(mut self, protocols: &[&str]) -> Self {
        let all = protocols.iter().map(|name| name.as_bytes().to_vec());
        self.config.alpn_protocols = all.collect();
        self
    }

    pub(super) fn asks_for(mut self, name: &'static str) -> Self {
        self.name = name;
        self
    }

    pub(super) async fn shake(&self, address: SocketAddr) -> std::io::Result<TlsStream<TcpStream>> {
        let socket = TcpStream::connect(address).await.unwrap();
        let name = ServerName::try_from(self.name).unwrap();
        let connector = TlsConnector::from(Arc::new(self.config.clone()));
        connector.connect(name, socket).await
    }

    /// A GET by the protocol that was agreed on; none if the connection ends without an answer.
    pub(super) async fn get(&self, address: SocketAddr, path: &str) -> Option<Answer> {
        let stream = self.shake(address).await.ok()?;
        let h2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
        let leaf = stream.get_ref().1.peer_certificates().unwrap()[0].clone();
        let request = Request::builder()
            .method(Method::GET)
            .header("x-forwarded-client-cert", "Hash=forged")
            .body(Full::<Bytes>::default())
            .unwrap();
        let response = if h2 {
            let (mut sender, driver) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
                .await
                .ok()?;
            tokio::spawn(driver);
            let mut request = request;
            *request.uri_mut() = format!("https://proxy.test{path}").parse().unwrap();
            sender.send_request(request).await.ok()?
        } else {
            let (mut sender, driver) = http1::handshake(TokioIo::new(stream)).await.ok()?;
            tokio::spawn(driver);
            let mut request = request;
            *request.uri_mut() = path.parse().unwrap();
            let host = "proxy.test".parse().unwrap();
            request.headers_mut().insert("host", host);
            sender.send_request(request).await.ok()?
        };
        Some(Answer::read(response, leaf, h2).await)
    }
}

pub(super) struct Answer {
    pub(super) status: StatusCode,
    body: String,
    pub(super) leaf: CertificateDer<'static>,
    h2: bool,
}

impl Answer {
    async fn read(response: Response<Incoming>, leaf: CertificateDer<'static>, h2: bool) -> Self {
        let status = response.status();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        let body = String::from_utf8_lossy(&body).into_owned();
        Self {
            status,
            body,
            leaf,
            h2,
        }
    }
}

pub(super) fn der(pair: &Pair) -> CertificateDer<'static> {
    CertificateDer::from_pem_slice(pair.chain.as_bytes()).unwrap()
}

/// An upstream that says what it got.
pub(super) async fn telling() -> Upstream {
    Upstream::start(|mut conn, got| async move {
        let body = format!(
            "proto={} xfcc={}",
            got.header("x-forwarded-proto"),
            got.header("x-forwarded-client-cert")
        );
        conn.answer("200 OK", "text/plain", &body)
            .await
            .then_some(conn)
    })
    .await
}

fn tls_log(bootstrap: &mut Bootstrap) {
    let fields = [
        ("version", "%DOWNSTREAM_TLS_VERSION%"),
        ("sni", "%REQUESTED_SERVER_NAME%"),
        ("uri", "%DOWNSTREAM_PEER_URI_SAN%"),
        ("dns", "%DOWNSTREAM_PEER_DNS_SAN%"),
        ("scheme", "%REQ(:SCHEME)%"),
    ];
    let fields: BTreeMap<_, _> = fields
        .map(|(name, operator)| (name.to_owned(), operator.into()))
        .into();
    outbound(bootstrap).http().access_log[0].format = AccessLogFormat::Json(fields);
}

#[tokio::test]
async fn clients_are_served_over_tls_by_the_protocol_they_agree_on() {
    let (ca, server) = (Ca::new(), telling().await);
    let pair = ca.pair(&["proxy.test"]);
    let tls = context(&[&pair]);
    let proxy = ProxyBuilder::new()
        .server(server.address)
        .edit(move |bootstrap| {
            tls_log(bootstrap);
            outbound(bootstrap).chain().tls = Some(tls);
        })
        .start();
    for (offered, h2) in [
        (&["h2", "http/1.1"][..], true),
        (&["http/1.1"], false),
        (&[], false),
        // Not one of ours: goes on without, as with Envoy.
        (&["istio"], false),
    ] {
        let client = TlsClient::new(&ca, None).alpn(offered);
        let answer = client.get(proxy.outbound(), "/x").await.unwrap();
        assert_eq!(
            (answer.status.as_u16(), answer.h2),
            (200, h2),
            "{offered:?}"
        );
        assert_eq!(answer.body, "proto=https xfcc=", "{offered:?}");
    }
    let lines = proxy.log(4).await;
    let line = &lines[0];
    assert_eq!(line["version"], "TLSv1.3");
    assert_eq!(line["sni"], "proxy.test");
    assert!(
        lines.iter().all(|line| line["scheme"] == "https"),
        "{lines:?}"
    );
    assert!(line["uri"].is_null() || line["uri"] == "-", "{line}");
    let handshakes = proxy.metric("envoy_listener_ssl_handshake", "").await;
    assert!(handshakes >= 4.0);
    assert!(proxy.metric("envoy_listener_ssl_no_certificate", "").await >= 4.0);
    // Plain text on a port of TLS is an error of the client's, and no request.
    let answer = raw(proxy.outbound(), b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    assert!(!answer.contains("HTTP/1.1"), "{answer}");
    eventually("the error is counted", || async {
        let errors = proxy
            .metric("envoy_listener_ssl_connection_error", "")
            .await;
        (errors >= 1.0).then_some(())
    })
    .await;
}

#[tokio::test]
async fn the_certificate_is_chosen_by_server_name() {
    let (ca, server) = (Ca::new(), telling().await);
    let first = ca.pair(&["first.test"]);
    let wild = ca.pair(&["*.wild.test"]);
    let exact = ca.pair(&["exact.wild.test"]);
    let tls = context(&[&first, &wild, &exact]);
    let proxy = ProxyBuilder::new()
        .server(server.address)
        .edit(move |bootstrap| outbound(bootstrap).chain().tls = Some(tls))
        .start();
    for (name, pair) in [
        ("first.test", &first),
        ("any.wild.test", &wild),
        ("exact.wild.test", &exact),
    ] {
        let client = TlsClient::new(&ca, None).asks_for(name);
        let answer = client.get(proxy.outbound(), "/x").await.unwrap();
        assert_eq!(answer.leaf, der(pair), "{name}");
    }
    // Nobody's name: the first, which this client then does not believe.
    let other = TlsClient::new(&ca, None).asks_for("other.test");
    let error = other.shake(proxy.outbound()).await.unwrap_err();
    assert!(error.to_string().contains("first.test"), "{error}");
}

#[tokio::test]
async fn versions_are_kept_to() {
    let (ca, server) = (Ca::new(), telling().await);
    let pair = ca.pair(&["proxy.test"]);
    for (only_1_2, version) in [(true, "TLSv1_2"), (false, "TLSv1_3")] {
        let mut tls = context(&[&pair]);
        tls.common.params = TlsParams {
            only_1_2,
            only_1_3: !only_1_2,
            cipher_suites: vec!["ECDHE-ECDSA-AES256-GCM-SHA384".into()],
            ecdh_curves: vec!["P-384".into()],
        };
        let proxy = ProxyBuilder::new()
            .server(server.address)
            .edit(move |bootstrap| outbound(bootstrap).chain().tls = Some(tls))
            .start();
        let client = TlsClient::new(&ca, None);
        let stream = client.shake(proxy.outbound()).await.unwrap();
        let connection = stream.get_ref().1;
        assert_eq!(
            format!("{:?}", connection.protocol_version().unwrap()),
            version
        );
        if only_1_2 {
            let suite = connection.negotiated_cipher_suite().unwrap().suite();
            assert!(format!("{suite:?}").contains("ECDSA_WITH_AES_256_GCM_SHA384"));
        }
        let group = connection.negotiated_key_exchange_group().unwrap().name();
        assert_eq!(format!("{group:?}"), "secp384r1");
    }
}

#[tokio::test]
async fn clients_need_a_certificate_with_a_name_that_is_believed() {
    let (ca, stranger, server) = (Ca::new(), Ca::new(), telling().await);
    let pair = ca.pair(&["proxy.test"]);
    let mut tls = context(&[&pair]);
    tls.require_client_certificate = true;
    let uri = |pattern| NameMatch {
        kind: NameKind::Uri,
        pattern,
    };
    tls.common.validation = Some(ca.validation(vec![
        uri(NamePattern::Prefix("spiffe://fleet.test/ns/a/".into())),
        uri(NamePattern::Exact("spiffe://fleet.test/one".into())),
        NameMatch {
            kind: NameKind::Dns,
            pattern: NamePattern::Suffix(".friends.test".into()),
        },
    ]));
    let proxy = ProxyBuilder::new()
        .server(server.address)
        .edit(move |bootstrap| {
            tls_log(bootstrap);
            outbound(bootstrap).chain().tls = Some(tls);
        })
        .start();
    let get = async |own: Option<&Pair>| {
        let client = TlsClient::new(&ca, own);
        client.get(proxy.outbound(), "/x").await
    };
    let good = [
        "spiffe://fleet.test/ns/a/sa/b",
        "spiffe://fleet.test/one",
        "a.friends.test",
    ];
    for name in good {
        let answer = get(Some(&ca.pair(&[name]))).await;
        let answer = answer.unwrap_or_else(|| panic!("{name} is let in"));
        assert_eq!(answer.body, "proto=https xfcc=", "{name}");
    }
    let lines = proxy.log(3).await;
    assert_eq!(lines[0]["uri"], good[0]);
    assert_eq!(lines[2]["dns"], good[2]);
    assert!(get(None).await.is_none(), "no certificate");
    for name in [
        "spiffe://fleet.test/ns/b/x",
        "spiffe://fleet.test/one/more",
        "friends.test",
    ] {
        assert!(get(Some(&ca.pair(&[name]))).await.is_none(), "{name}");
    }
    let unknown = stranger.pair(&["spiffe://fleet.test/one"]);
    assert!(get(Some(&unknown)).await.is_none(), "another CA");
    for (name, count) in [("no_cert", 1.0), ("san", 3.0), ("error", 1.0)] {
        let metric = format!("envoy_listener_ssl_fail_verify_{name}");
        eventually(&metric, || async {
            (proxy.metric(&metric, "").await >= count).then_some(())
        })
        .await;
    }
    assert_eq!(server.exchanges().len(), 3, "nobody else came through");
}

#[tokio::test]
async fn a_client_may_come_without_a_certificate_where_none_is_required() {
    let (ca, stranger, server) = (Ca::new(), Ca::new(), telling().await);
    let mut tls = context(&[&ca.pair(&["proxy.test"])]);
    tls.common.validation = Some(ca.validation(Vec::new()));
    let proxy = ProxyBuilder::new()
        .server(server.address)
        .edit(move |bootstrap| outbound(bootstrap).chain().tls = Some(tls))
        .start();
    let get = async |own: Option<&Pair>| {
        let client = TlsClient::new(&ca, own);
        client.get(proxy.outbound(), "/x").await.is_some()
    };
    assert!(get(None).await);
    assert!(get(Some(&ca.pair(&["a.test"]))).await);
    assert!(!get(Some(&stranger.pair(&["a.test"]))).await);
}

#[tokio::test]
async fn a_handshake_that_does_not_end_holds_up_nobody_and_is_ended() {
    let (ca, server) = (Ca::new(), telling().await);
    let tls = context(&[&ca.pair(&["proxy.test"])]);
    let proxy = ProxyBuilder::new()
        .server(server.address)
        .edit(move |bootstrap| {
            let chain = outbound(bootstrap).chain();
            chain.tls = Some(tls);
            chain.connect_timeout = Duration::from_millis(700);
        })
        .start();
    let mut silent = TcpStream::connect(proxy.outbound()).await.unwrap();
    let mut half = TcpStream::connect(proxy.outbound()).await.unwrap();
    // The beginning of a ClientHello.
    half.write_all(&[22, 3, 1, 2, 0, 1, 0, 1, 252])
        .await
        .unwrap();
    let client = TlsClient::new(&ca, None);
    assert!(client.get(proxy.outbound(), "/x").await.is_some());
    for socket in [&mut silent, &mut half] {
        let mut rest = Vec::new();
        let read = tokio::time::timeout(Duration::from_secs(10), socket.read_to_end(&mut rest));
        assert!(read.await.is_ok(), "closed");
    }
    let metric = "envoy_listener_downstream_cx_transport_socket_connect_timeout";
    eventually("both are counted", || async {
        (proxy.metric(metric, "").await >= 2.0).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_push_brings_new_certificates_and_open_connections_stay() {
    let (ca, server) = (Ca::new(), telling().await);
    let (old, new) = (ca.pair(&["proxy.test"]), ca.pair(&["proxy.test"]));
    let tls = context(&[&old]);
    let proxy = ProxyBuilder::new()
        .server(server.address)
        .edit(move |bootstrap| outbound(bootstrap).chain().tls = Some(tls))
        .start();
    let client = TlsClient::new(&ca, None);
    let mut open = client.shake(proxy.outbound()).await.unwrap();
    let mut next = proxy.bootstrap.clone();
    outbound(&mut next).chain().tls = Some(context(&[&new]));
    proxy.proxy.apply(next.clone()).unwrap();
    let answer = client.get(proxy.outbound(), "/x").await.unwrap();
    assert_eq!(answer.leaf, der(&new));
    open.write_all(b"GET /x HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        .await
        .unwrap();
    let mut answer = String::new();
    open.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    // A key of another certificate changes nothing.
    let mut wrong = new.clone();
    wrong.key = old.key.clone();
    outbound(&mut next).chain().tls = Some(context(&[&wrong]));
    let errors = proxy.proxy.apply(next).unwrap_err();
    assert!(errors[0].contains("does not fit"), "{errors:?}");
    let answer = client.get(proxy.outbound(), "/x").await.unwrap();
    assert_eq!(answer.leaf, der(&new));
}

#[tokio::test]
async fn a_client_that_asked_nothing_was_never_closed_by_the_idle_timeout() {
    let server = telling().await;
    let proxy = ProxyBuilder::new()
        .server(server.address)
        .edit(|bootstrap| outbound(bootstrap).http().idle_timeout = Duration::from_millis(300))
        .start();
    // Nothing; the beginning of a preface; a whole one, and no stream.
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00";
    for begun in [&b""[..], b"PRI", preface] {
        let mut socket = TcpStream::connect(proxy.outbound()).await.unwrap();
        socket.write_all(begun).await.unwrap();
        let mut rest = Vec::new();
        let read = tokio::time::timeout(Duration::from_secs(10), socket.read_to_end(&mut rest));
        assert!(read.await.is_ok(), "{begun:?}");
    }
    let closed = proxy
        .metric("envoy_http_downstream_cx_idle_timeout", "")
        .await;
    assert!(closed >= 3.0, "{closed}");
    for version in Version::BOTH {
        let mut client = Client::connect(proxy.outbound(), version).await;
        assert_eq!(client.post("/x", "{}").await.status, 200, "{version:?}");
    }
}
