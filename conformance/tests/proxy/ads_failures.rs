//! Control planes that send what is wrong, are slow, or die, and what becomes of traffic meanwhile.

use super::{
    ads::{BOTH, cluster, driven, edge, everything},
    ads_server::{AdsServer, ads, from_ads},
    dynamic::{address, answers, at, dump, endpoints, listener, routes_to, served_by, typed},
};
use outrigger_conformance::harness::{Client, ProxyBuilder, Upstream, eventually, free_address};
use outrigger_xds::{
    ads::Server,
    feed::Connection,
    resource::{ads::Target, cluster::Cluster},
    subscription::Protocol,
};
use prost_types::Any;
use serde_json::{Value, json};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

/// `lb_subset_config` (22), empty: what Envoy has and we do not comes by its number.
const SUBSETS_OF_A_CLUSTER: [u8; 3] = [0xb2, 0x01, 0x00];

fn is_refusal(request: &Value) -> bool {
    request["type"] == "Cluster" && !request["error"].is_null()
}

fn bytes_of(resource: &Value) -> Any {
    let config = outrigger_xds::resource::route::TypedConfig::from_json(resource).unwrap();
    Any::from(&config)
}

#[tokio::test]
async fn the_good_apply_and_each_bad_one_is_named_with_its_field() {
    for protocol in BOTH {
        let one = Upstream::named("one").await;
        let control = everything(one.address);
        let mut bad = cluster("bad");
        bad["lb_policy"] = json!("CLUSTER_PROVIDED");
        let mut newer = bytes_of(&cluster("newer"));
        newer.value.extend(SUBSETS_OF_A_CLUSTER);
        control.put(&[bad]);
        control.put_any(vec![("newer".into(), newer)], None);
        let proxy = driven(control.as_configured(protocol));
        served_by(at(&proxy, "edge").await, "one").await;
        let refused = control.hears("the refusal", is_refusal).await;
        let why = refused["error"].as_str().unwrap();
        assert!(
            why.contains("'bad': ") && why.contains("lb_policy"),
            "{why}"
        );
        assert!(
            why.contains("'newer': ") && why.contains("lb_subset_config"),
            "{why}"
        );
        assert!(!why.contains("backend"), "{why}");
        let clusters = dump(proxy.admin(), "ClustersConfigDump").await;
        let failed: Vec<&Value> = clusters["dynamic_warming_clusters"]
            .as_array()
            .unwrap()
            .iter()
            .collect();
        assert_eq!(failed.len(), 2, "{clusters:#}");
        assert_eq!(failed[0]["client_status"], "NACKED");
        assert!(failed[0]["error_state"]["details"].is_string());
        // A good version mends it.
        control.put(&[
            cluster("bad"),
            cluster("newer"),
            endpoints("bad", &[one.address]),
            endpoints("newer", &[one.address]),
        ]);
        eventually("all is well", || async {
            let clusters = dump(proxy.admin(), "ClustersConfigDump").await;
            let active = clusters["dynamic_active_clusters"].as_array().unwrap();
            let well = active.iter().all(|one| one["error_state"].is_null());
            (active.len() == 3 && well).then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn garbage_is_refused_and_nothing_else() {
    for protocol in BOTH {
        let one = Upstream::named("one").await;
        let control = everything(one.address);
        let proxy = driven(control.as_configured(protocol));
        let edge = at(&proxy, "edge").await;
        served_by(edge, "one").await;
        let type_url = bytes_of(&cluster("x")).type_url;
        let garbage = Any {
            type_url: type_url.clone(),
            value: vec![0xff; 40],
        };
        let mut cut = bytes_of(&cluster("backend"));
        cut.value.truncate(cut.value.len() - 3);
        control.put_any(
            vec![("garbage".into(), garbage), ("backend".into(), cut)],
            None,
        );
        let refused = control.hears("the refusal", is_refusal).await;
        let why = refused["error"].as_str().unwrap();
        assert!(why.contains("not a valid"), "{why}");
        served_by(edge, "one").await;
        assert_eq!(Client::get(edge, "/x").await.status, 200);
    }
}

/// A cluster of control planes, under the name that istiod gives its own.
fn of_servers(endpoints: &Value) -> (String, Cluster) {
    let name = "outbound|15012||istiod";
    let http2 = typed(
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
        json!({ "explicit_http_config": { "http2_protocol_options": {} } }),
    );
    let cluster = json!({
        "name": name,
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": http2,
        },
        "load_assignment": { "cluster_name": name, "endpoints": [{ "lb_endpoints": endpoints }] },
    });
    let mut read = super::listeners::read(&[], &[cluster]).unwrap();
    (name.to_owned(), read.clusters.remove(0))
}

#[tokio::test]
async fn servers_of_a_cluster_are_found_when_they_come_whatever_its_name() {
    let one = Upstream::named("one").await;
    let control = everything(one.address);
    let here = json!([{ "endpoint": { "address": address(control.address) } }]);
    let ((name, empty), (_, full)) = (of_servers(&json!([])), of_servers(&here));
    let mut asked = control.as_configured(Protocol::Delta);
    asked.servers[0].target = Target::Cluster {
        name: name.clone(),
        authority: String::new(),
        message_bytes_max: None,
    };
    let proxy = ProxyBuilder::new()
        .edit(|bootstrap| {
            bootstrap.clusters.push(empty);
            bootstrap.ads = Some(asked);
            bootstrap.lds = Some(from_ads());
            bootstrap.cds = Some(from_ads());
        })
        .start();
    let mut pushed = proxy.bootstrap.clone();
    pushed.clusters.retain(|cluster| cluster.name != name);
    pushed.clusters.push(full);
    let begun = Instant::now();
    proxy.proxy.apply(pushed).unwrap();
    served_by(at(&proxy, "edge").await, "one").await;
    let took = begun.elapsed();
    assert!(
        took < Duration::from_secs(5),
        "no pause is over first: {took:?}"
    );
}

#[tokio::test]
async fn a_storm_of_refusals_does_not_spin() {
    let one = Upstream::named("one").await;
    let control = everything(one.address);
    let proxy = driven(control.as_configured(Protocol::State));
    let edge = at(&proxy, "edge").await;
    served_by(edge, "one").await;
    control.stubborn();
    let mut bad = cluster("bad");
    bad["lb_policy"] = json!("CLUSTER_PROVIDED");
    control.forget();
    let begun = Instant::now();
    control.put(&[bad]);
    let refusals = || {
        control
            .heard()
            .iter()
            .filter(|request| is_refusal(request))
            .count()
    };
    eventually("the bucket is empty", || async {
        let many = refusals() >= 80;
        (many || begun.elapsed() > Duration::from_secs(8)).then_some(())
    })
    .await;
    served_by(edge, "one").await;
    let most = 100.0 + 10.0 * begun.elapsed().as_secs_f64();
    let refusals = refusals() as f64;
    assert!(
        refusals > 1.0 && refusals <= most + 1.0,
        "{refusals} refusals"
    );
}

#[tokio::test]
async fn traffic_goes_on_without_a_control_plane_and_what_is_there_is_not_sent_again() {
    for protocol in BOTH {
        let (one, two) = (Upstream::named("one").await, Upstream::named("two").await);
        let mut control = everything(one.address);
        let proxy = driven(control.as_configured(protocol));
        let edge = at(&proxy, "edge").await;
        served_by(edge, "one").await;
        control.kill();
        control.forget();
        for _ in 0..20 {
            assert_eq!(Client::get(edge, "/x").await.status, 200);
        }
        control.revive().await;
        control
            .hears("routes are asked for", |request| {
                request["type"] == "RouteConfiguration"
            })
            .await;
        let heard = control.heard();
        assert!(!heard[0]["node"].is_null(), "each stream says who we are");
        for kind in [
            "Cluster",
            "ClusterLoadAssignment",
            "Listener",
            "RouteConfiguration",
        ] {
            let first = heard
                .iter()
                .find(|request| request["type"] == kind)
                .unwrap();
            match protocol {
                Protocol::State => assert_eq!(first["version"], "1", "{kind}"),
                Protocol::Delta => {
                    assert_eq!(first["versions"].as_object().unwrap().len(), 1, "{kind}");
                }
            }
            assert_eq!(first["nonce"], "", "{kind}: nonces are of a stream");
        }
        control.put(&[endpoints("backend", &[two.address])]);
        served_by(edge, "two").await;
    }
}

#[tokio::test]
async fn the_next_server_is_asked_while_the_first_cannot_be_reached() {
    let one = Upstream::named("one").await;
    let mut first = AdsServer::start();
    first.kill();
    let second = everything(one.address);
    let proxy = driven(ads(Protocol::Delta, &[first.address, second.address]));
    served_by(at(&proxy, "edge").await, "one").await;
}

#[tokio::test]
async fn a_control_plane_that_says_nothing_is_waited_for_as_long_as_was_said() {
    let one = Upstream::named("one").await;
    let control = AdsServer::start();
    control.mute(true);
    let short = |mut ads: outrigger_xds::resource::config_source::ConfigSource| {
        ads.initial_fetch_timeout = Duration::from_millis(400);
        ads
    };
    let configured = control.as_configured(Protocol::Delta);
    let proxy = outrigger_conformance::harness::ProxyBuilder::new()
        .edit(move |bootstrap| {
            bootstrap.ads = Some(configured);
            bootstrap.lds = Some(short(super::ads_server::from_ads()));
            bootstrap.cds = Some(short(super::ads_server::from_ads()));
        })
        .start();
    assert_eq!(Client::get(proxy.admin(), "/ready").await.status, 503);
    eventually("it goes on without", || async {
        (Client::get(proxy.admin(), "/ready").await.status == 200).then_some(())
    })
    .await;
    // Late is not too late.
    control.mute(false);
    control.put(&[
        cluster("backend"),
        endpoints("backend", &[one.address]),
        edge(),
        routes_to("table", "backend"),
    ]);
    served_by(at(&proxy, "edge").await, "one").await;
}

#[tokio::test]
async fn a_life_that_is_none_is_refused_and_one_of_ages_does_no_harm() {
    for protocol in BOTH {
        let one = Upstream::named("one").await;
        let control = everything(one.address);
        let ages = Duration::from_secs(315_576_000_000);
        control.put_for(&endpoints("backend", &[one.address]), ages);
        let proxy = driven(control.as_configured(protocol));
        let edge = at(&proxy, "edge").await;
        served_by(edge, "one").await;
        let never = Duration::from_secs(i64::MAX.unsigned_abs());
        control.put_for(&cluster("brief"), never);
        let refused = control.hears("the refusal", is_refusal).await;
        let why = refused["error"].as_str().unwrap();
        assert!(why.contains("'brief': ") && why.contains("ttl"), "{why}");
        served_by(edge, "one").await;
    }
}

#[tokio::test]
async fn what_is_refused_at_first_is_not_waited_for() {
    for protocol in BOTH {
        let (one, two) = (Upstream::named("one").await, Upstream::named("two").await);
        let control = everything(one.address);
        let mut bad = endpoints("broken", &[one.address]);
        bad["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"]["socket_address"]["address"] =
            json!("not.an.address");
        control.put(&[cluster("broken"), bad]);
        let ads = control.as_configured(protocol);
        // All listeners wait for all clusters, and these endpoints would be waited for 15 s.
        let proxy = driven(ads);
        served_by(at(&proxy, "edge").await, "one").await;
        let refused = |request: &Value| {
            request["type"] == "ClusterLoadAssignment" && !request["error"].is_null()
        };
        control.hears("the refusal", refused).await;
        // Within less than the 15 s.
        eventually("readiness", || async {
            (Client::get(proxy.admin(), "/ready").await.status == 200).then_some(())
        })
        .await;
        // A good version is still welcome.
        control.put(&[
            endpoints("broken", &[two.address]),
            routes_to("table", "broken"),
        ]);
        served_by(at(&proxy, "edge").await, "two").await;
    }
}

#[tokio::test]
async fn a_server_that_hangs_is_noticed() {
    for protocol in BOTH {
        // The kernel accepts for it.
        let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = silent.local_addr().unwrap();
        let server = Server {
            authority: address.to_string(),
            dialer: Arc::new(move || {
                Box::pin(async move {
                    let socket = tokio::net::TcpStream::connect(address).await?;
                    Ok(Box::new(socket) as Box<dyn Connection>)
                })
            }),
            metadata: Vec::new(),
            message_bytes_max: 1 << 20,
            connect_timeout: Duration::from_secs(5),
            ping_interval: Duration::from_millis(100),
            ping_timeout: Duration::from_millis(100),
        };
        let node = outrigger_xds::resource::bootstrap::Node::default();
        let mut stream = outrigger_xds::ads::open(&server, (None, protocol), &node)
            .await
            .unwrap();
        let next = tokio::time::timeout(Duration::from_secs(8), stream.next()).await;
        assert!(next.expect("it is noticed").is_err());
    }
}

#[tokio::test]
async fn what_comes_is_judged_beside_what_is_there() {
    for protocol in BOTH {
        let one = Upstream::named("one").await;
        let control = everything(one.address);
        let shared = free_address();
        control.put(&[listener("first", shared, answers("first"))]);
        let proxy = driven(control.as_configured(protocol));
        served_by(at(&proxy, "first").await, "first").await;
        control.put(&[listener("twin", shared, answers("twin"))]);
        let is_refusal =
            |request: &Value| request["type"] == "Listener" && !request["error"].is_null();
        let refused = control.hears("the refusal", is_refusal).await;
        let why = refused["error"].as_str().unwrap();
        assert!(why.contains("duplicate address"), "{why}");
    }
}
