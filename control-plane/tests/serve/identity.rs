//! Who may come to the port of xDS, and as which node.

use crate::{
    harness::{Delta, PATIENCE, Served, as_str, cluster, endpoints, eventually, everything, node},
    secure::{Ca, HOUR, channel, client, der, reconnecting, shake},
};
use outrigger_control_plane::{ca::Pair, session::ENDPOINTS_MAX, tls};
use outrigger_xds::{
    subscription::Kind,
    wire::envoy::{
        config::core::v3::Node,
        service::{
            cluster::v3::cluster_discovery_service_client::ClusterDiscoveryServiceClient,
            discovery::v3::{
                DiscoveryRequest,
                aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
            },
            load_stats::v3::{
                LoadStatsRequest, load_reporting_service_client::LoadReportingServiceClient,
            },
            status::v3::{
                ClientStatusRequest,
                client_status_discovery_service_client::ClientStatusDiscoveryServiceClient,
            },
        },
    },
};
use rustls::{
    ClientConfig,
    pki_types::CertificateDer,
    version::{TLS12, TLS13},
};
use std::{
    fs,
    sync::{Arc, Mutex},
    time::{Duration, Instant, SystemTime},
};
use tokio::time::timeout;
use tonic::{Code, Status};

pub(crate) fn named(id: &str) -> Node {
    Node {
        id: id.into(),
        ..node("envoy")
    }
}

async fn everything_served(test: &str, tls: tls::Options) -> Served {
    Served::secured(test, &as_str(&everything()), tls).await
}

/// What the first request of a stream of this node leads to.
async fn admitted(served: &Served, config: ClientConfig, id: &str) -> Result<(), Status> {
    let request = DiscoveryRequest {
        node: Some(named(id)),
        type_url: Kind::Clusters.type_url().into(),
        ..DiscoveryRequest::default()
    };
    let requests = tokio_stream::iter([request]);
    let forever = tokio_stream::StreamExt::chain(requests, tokio_stream::pending());
    let channel = channel(served.running.address, config);
    let mut client = AggregatedDiscoveryServiceClient::new(channel);
    let answers = client.stream_aggregated_resources(forever).await?;
    let answer = timeout(PATIENCE, answers.into_inner().message()).await;
    answer.expect("an answer").map(drop)
}

const BAD_LOADS: &str = "outrigger_control_plane_certificate_loads_total{result=\"bad\"}";

/// A metric by now; those of all tests of this process are in it.
async fn count(served: &Served, metric: &str) -> u64 {
    let (_, page) = served.get("/stats/prometheus").await;
    let mut values = page.lines().filter_map(|line| line.strip_prefix(metric));
    let value = values.next().map(|value| value.trim().parse());
    value.transpose().unwrap().unwrap_or_default()
}

async fn counted(served: &Served, metric: &str, least: u64) {
    eventually(metric, async || {
        (count(served, metric).await >= least).then_some(())
    })
    .await;
}

#[tokio::test]
async fn strangers_shake_no_hands_and_are_counted() {
    let (ca, other) = (
        Ca::new("strangers", "fleet"),
        Ca::new("strangers-other", "fleet"),
    );
    let served = everything_served("strangers", ca.options()).await;
    let own = "spiffe://fleet/node/a";
    for version in [&TLS12, &TLS13] {
        let good = ca.good(own);
        admitted(&served, client(&ca, Some(&good), version), "a")
            .await
            .unwrap();
    }
    let now = SystemTime::now();
    let cases = [
        (None, "no_certificate"),
        (Some(other.good(own)), "untrusted"),
        (Some(ca.good("spiffe://elsewhere/node/a")), "identity"),
        (Some(ca.pair(own, now - 2 * HOUR, HOUR)), "expired"),
        (Some(ca.pair(own, now + 2 * HOUR, HOUR)), "expired"),
    ];
    for (pair, reason) in &cases {
        let metric = format!("outrigger_control_plane_handshakes_total{{result=\"{reason}\"}}");
        let before = count(&served, &metric).await;
        for version in [&TLS12, &TLS13] {
            let config = client(&ca, pair.as_ref(), version);
            let refused = admitted(&served, config, "a").await;
            assert!(refused.is_err(), "{reason}");
        }
        // Of both.
        counted(&served, &metric, before + 2).await;
    }
    // Plain text is none of it.
    let plain = format!("http://{}", served.running.address);
    let channel = tonic::transport::Channel::from_shared(plain).unwrap();
    if let Ok(channel) = channel.connect().await {
        let mut client = ClusterDiscoveryServiceClient::new(channel);
        let fetched = client.fetch_clusters(DiscoveryRequest::default()).await;
        assert!(fetched.is_err(), "{fetched:?}");
    }
    // Nor is a server that the client's CA does not vouch for.
    let good = ca.good(own);
    let config = client(&other, Some(&good), &TLS13);
    assert!(shake(served.running.address, config).await.is_err());
}

#[tokio::test]
async fn a_client_is_the_node_that_its_certificate_says_and_no_other() {
    let ca = Ca::new("nodes", "fleet");
    let tls = tls::Options {
        identity: vec!["/ns/prod/sa/proxy=prod-*".parse().unwrap()],
        ..ca.options()
    };
    let served = everything_served("identity", tls).await;
    let config = |id: &str| client(&ca, Some(&ca.good(id)), &TLS13);
    let (a, istio) = ("spiffe://fleet/node/a", "spiffe://fleet/ns/prod/sa/proxy");
    let cases = [
        (a, "a", true),
        (a, "b", false),
        (istio, "prod-1", true),
        (istio, "a", false),
        ("spiffe://fleet/ns/test/sa/proxy", "prod-1", false),
        // What is issued over a stream opens none: a stolen certificate would live for ever.
        ("spiffe://fleet/peer/a", "a", false),
    ];
    let metric = "outrigger_control_plane_streams_refused_total{reason=\"identity\"}";
    let before = count(&served, metric).await;
    for (id, node, expected) in cases {
        let result = admitted(&served, config(id), node).await;
        assert_eq!(result.is_ok(), expected, "{id} {node}: {result:?}");
        if let Err(status) = result {
            assert_eq!(status.code(), Code::PermissionDenied, "{id} {node}");
        }
    }
    let refused = cases.iter().filter(|(.., is_good)| !is_good).count() as u64;
    counted(&served, metric, before + refused).await;
    // So it is with all that names a node.
    let as_b = || channel(served.running.address, config(a));
    let request = DiscoveryRequest {
        node: Some(named("b")),
        ..DiscoveryRequest::default()
    };
    let fetched = ClusterDiscoveryServiceClient::new(as_b())
        .fetch_clusters(request)
        .await;
    assert_eq!(fetched.unwrap_err().code(), Code::PermissionDenied);
    let report = LoadStatsRequest {
        node: Some(named("b")),
        ..LoadStatsRequest::default()
    };
    let forever =
        tokio_stream::StreamExt::chain(tokio_stream::iter([report]), tokio_stream::pending());
    let reports = LoadReportingServiceClient::new(as_b())
        .stream_load_stats(forever)
        .await;
    let refused = match reports {
        Ok(answers) => answers.into_inner().message().await.map(drop),
        Err(status) => Err(status),
    };
    assert_eq!(refused.unwrap_err().code(), Code::PermissionDenied);
}

#[tokio::test]
async fn a_client_is_told_of_the_status_of_its_own_node_only() {
    let ca = Ca::new("status", "fleet");
    let served = everything_served("status", ca.options()).await;
    let config = |id: &str| client(&ca, Some(&ca.good(id)), &TLS13);
    let mut streams = Vec::new();
    for id in ["a", "b"] {
        let at = channel(
            served.running.address,
            config(&format!("spiffe://fleet/node/{id}")),
        );
        let mut stream = Delta::over(at, named(id)).await;
        stream.want(Kind::Clusters, &[]).await;
        stream.take(None).await;
        streams.push(stream);
    }
    let at = channel(served.running.address, config("spiffe://fleet/node/a"));
    let status = ClientStatusDiscoveryServiceClient::new(at)
        .fetch_client_status(ClientStatusRequest::default())
        .await;
    let configs = status.unwrap().into_inner().config;
    let ids: Vec<String> = configs.into_iter().map(|it| it.node.unwrap().id).collect();
    assert_eq!(ids, ["a"]);
}

/// Certificate, key and CA as files.
struct Files(std::path::PathBuf);

impl Files {
    fn new(test: &str) -> Self {
        let dir = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("tls-{test}"));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }

    fn put(&self, name: &str, text: &str) {
        fs::write(self.0.join(".new"), text).unwrap();
        fs::rename(self.0.join(".new"), self.0.join(name)).unwrap();
    }

    fn pair(&self, pair: &Pair) {
        self.put("key.pem", &pair.key);
        self.put("cert.pem", &pair.chain);
    }

    fn options(&self) -> tls::Options {
        let at = |name: &str| Some(self.0.join(name));
        tls::Options {
            tls_cert: at("cert.pem"),
            tls_key: at("key.pem"),
            tls_client_ca: at("ca.pem"),
            trust_domain: Some("fleet".parse().unwrap()),
            // So that clients are looked at often.
            certificate_ttl_s: 2,
            ..tls::Options::default()
        }
    }
}

/// Until new connections are shown this certificate.
async fn shown(served: &Served, config: &ClientConfig, pair: &Pair) {
    eventually("the certificate is shown", async || {
        (leaf(served, config).await? == der(&pair.chain)).then_some(())
    })
    .await;
}

/// What a new connection is shown, if it is good.
async fn leaf(served: &Served, config: &ClientConfig) -> Option<CertificateDer<'static>> {
    let stream = shake(served.running.address, config.clone()).await.ok()?;
    let chain = stream.get_ref().1.peer_certificates()?;
    chain.first().map(|leaf| leaf.clone().into_owned())
}

#[tokio::test]
async fn files_are_read_again_and_streams_go_on_until_nobody_vouches_for_them() {
    let (ca, other) = (Ca::new("files", "fleet"), Ca::new("files-other", "fleet"));
    let files = Files::new("files");
    let server = |ca: &Ca| ca.good("spiffe://fleet/control-plane");
    let (old, new) = (server(&ca), server(&ca));
    files.pair(&old);
    files.put("ca.pem", ca.pem());
    let served = everything_served("files-tls", files.options()).await;
    let own = ca.good("spiffe://fleet/node/a");
    let config = client(&ca, Some(&own), &TLS13);
    shown(&served, &config, &old).await;
    let at = channel(served.running.address, config.clone());
    let mut stream = Delta::over(at, named("a")).await;
    stream.want(Kind::Clusters, &[]).await;
    assert_eq!(stream.take(None).await, "Clusters[a]");
    // A key of another certificate changes nothing.
    let before = count(&served, BAD_LOADS).await;
    files.put("key.pem", &new.key);
    counted(&served, BAD_LOADS, before + 1).await;
    shown(&served, &config, &old).await;
    files.put("cert.pem", &new.chain);
    shown(&served, &config, &new).await;
    served.put(
        "more.yaml",
        &format!("[{}, {}]", cluster("b"), endpoints("b", 1)),
    );
    assert_eq!(stream.take(None).await, "Clusters[b]");
    // Two CAs, then only the other one.
    files.put("ca.pem", &format!("{}{}", ca.pem(), other.pem()));
    let theirs = other.good("spiffe://fleet/node/b");
    let as_b = client(&ca, Some(&theirs), &TLS13);
    eventually("the other CA is believed, too", async || {
        admitted(&served, as_b.clone(), "b").await.ok()
    })
    .await;
    stream.is_quiet().await;
    files.put("ca.pem", other.pem());
    let ended = timeout(PATIENCE, stream.answers.message()).await;
    assert_eq!(ended.unwrap().unwrap_err().code(), Code::Unauthenticated);
    assert!(admitted(&served, config, "a").await.is_err());
    admitted(&served, as_b, "b").await.unwrap();
}

/// A client is looked at each second, which must not put off what is held back for it.
#[tokio::test]
async fn what_waits_for_endpoints_is_told_in_time_while_certificates_are_looked_at() {
    let ca = Ca::new("waits", "fleet");
    let served = everything_served("waits", ca.options()).await;
    let own = ca.good("spiffe://fleet/node/a");
    let at = channel(served.running.address, client(&ca, Some(&own), &TLS13));
    let mut stream = Delta::over(at, named("a")).await;
    stream.want(Kind::Routes, &["table"]).await;
    assert_eq!(stream.take(None).await, "Routes[table]");
    stream.want(Kind::Clusters, &[]).await;
    assert_eq!(stream.take(None).await, "Clusters[a]");
    // It never asks for endpoints of the cluster.
    let begun = Instant::now();
    stream.want(Kind::Listeners, &[]).await;
    assert_eq!(stream.take(None).await, "Listeners[edge]");
    let waited = begun.elapsed();
    assert!(waited > ENDPOINTS_MAX / 2, "{waited:?}");
}

#[tokio::test]
async fn a_stream_ends_with_its_certificate() {
    let ca = Ca::new("ends", "fleet");
    let tls = tls::Options {
        // The control plane's own outlives a slow machine; clients are looked at each second.
        certificate_ttl_s: 8,
        ..ca.options()
    };
    let served = everything_served("ends", tls).await;
    let brief = ca.pair(
        "spiffe://fleet/node/a",
        SystemTime::now(),
        Duration::from_secs(15),
    );
    let current = Arc::new(Mutex::new(client(&ca, Some(&brief), &TLS13)));
    let known = current.clone();
    let at = reconnecting(served.running.address, move || {
        known.lock().unwrap().clone()
    });
    let mut stream = Delta::over(at.clone(), named("a")).await;
    stream.want(Kind::Clusters, &[]).await;
    assert_eq!(stream.take(None).await, "Clusters[a]");
    // What is new counts once its connection is closed, though it never lost it itself.
    let good = ca.good("spiffe://fleet/node/a");
    *current.lock().unwrap() = client(&ca, Some(&good), &TLS13);
    let ended = timeout(PATIENCE, stream.answers.message()).await;
    assert_eq!(ended.unwrap().unwrap_err().code(), Code::Unauthenticated);
    let request = || DiscoveryRequest {
        node: Some(named("a")),
        ..DiscoveryRequest::default()
    };
    eventually("it is let in again", async || {
        let mut client = ClusterDiscoveryServiceClient::new(at.clone());
        client.fetch_clusters(request()).await.ok()
    })
    .await;
}

/// Without it no node comes any more.
#[tokio::test]
async fn the_own_certificate_is_renewed_whatever_becomes_of_the_files_of_the_ca() {
    let ca = Ca::new("broken", "fleet");
    let tls = tls::Options {
        certificate_ttl_s: 2,
        ..ca.options()
    };
    let served = everything_served("broken", tls).await;
    let own = ca.good("spiffe://fleet/node/a");
    let config = client(&ca, Some(&own), &TLS13);
    let key = ca.dir.join("ca.key");
    let breaks: [&dyn Fn(); 2] = [&|| fs::write(&key, "none").unwrap(), &|| {
        fs::remove_file(&key).unwrap()
    }];
    for broken in breaks {
        let before = count(&served, BAD_LOADS).await;
        broken();
        counted(&served, BAD_LOADS, before + 1).await;
        // Not one that was made before the files were known to be bad.
        let known = leaf(&served, &config).await;
        eventually("another certificate is shown", async || {
            let shown = leaf(&served, &config).await?;
            (Some(shown) != known).then_some(())
        })
        .await;
        eventually("it is let in", async || {
            admitted(&served, config.clone(), "a").await.ok()
        })
        .await;
    }
}
