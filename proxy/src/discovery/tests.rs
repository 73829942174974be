//! The model as tables: what waits for what, and for how long.

use super::model::{Kind, Model, Subscription};
use outrigger_xds::{
    accepted::{Scope, Update},
    load::{
        Syntax, bootstrap,
        discovery::{Resource, response},
    },
    resource::config_source::Origin,
};
use std::time::{Duration, Instant, SystemTime};

const WRITTEN: &str = r#"
static_resources:
  clusters:
  - name: a
    type: EDS
    eds_cluster_config: {service_name: s, eds_config: {path_config_source: {path: /eds}, initial_fetch_timeout: 2s}}
  - name: b
    type: EDS
    eds_cluster_config: {eds_config: {path_config_source: {path: /eds}, initial_fetch_timeout: 0s}}
    transport_socket:
      name: tls
      typed_config:
        "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext
        common_tls_context:
          tls_certificate_sds_secret_configs: [{name: own, sds_config: {path_config_source: {path: /sds}}}]
  listeners:
  - name: l
    address: {socket_address: {address: 127.0.0.1, port_value: 1}}
    filter_chains:
    - filters:
      - name: http
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: p
          rds: {route_config_name: t, config_source: {path_config_source: {path: /rds}}}
          http_filters:
          - name: r
            typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}
"#;

fn model(now: Instant) -> Model {
    let mut model = Model {
        bootstrap: bootstrap(WRITTEN, Syntax::Yaml).unwrap(),
        ..Model::default()
    };
    model.subscribe(now);
    model
}

fn update<R: Resource>(fields: &str) -> Update<R> {
    let kind = R::TYPE;
    let text = format!("{{resources: [{{'@type': type.googleapis.com/{kind}, {fields}}}]}}");
    Update {
        version: "1".into(),
        at: SystemTime::UNIX_EPOCH,
        resources: response(&text, Syntax::Yaml).unwrap().read(),
        removed: Vec::new(),
        scope: Scope::Named,
    }
}

fn path(path: &str) -> Origin {
    Origin::Path(path.into())
}

/// Names of clusters and listeners that are complete.
fn complete(model: &Model) -> Vec<String> {
    let clusters = model
        .all_clusters()
        .filter_map(|one| model.complete_cluster(one));
    let listeners = model
        .all_listeners()
        .filter_map(|one| model.complete_listener(one));
    let clusters = clusters.map(|cluster| cluster.name);
    clusters
        .chain(listeners.map(|listener| listener.name))
        .collect()
}

fn come(model: &mut Model, what: &str) {
    let mut all = |_: &_| Ok(());
    match what {
        "s" | "b" => {
            let set = model.assignments.entry(path("/eds")).or_default();
            set.take(update(&format!("cluster_name: {what}")), &mut all);
        }
        "own" => {
            let secret = "name: own, validation_context: {trusted_ca: {filename: /ca}}";
            let set = model.secrets.entry(path("/sds")).or_default();
            set.take(update(secret), &mut |_| Ok(()));
        }
        table => {
            let set = model.tables.entry(path("/rds")).or_default();
            set.take(update(&format!("name: {table}")), &mut |_| Ok(()));
        }
    }
}

#[test]
fn a_resource_is_complete_when_all_that_it_names_has_come() {
    let mut model = model(Instant::now());
    let steps: [(&str, &[&str]); 5] = [
        ("other", &[]),
        ("s", &["a"]),
        ("b", &["a"]),
        ("own", &["a", "b"]),
        ("t", &["a", "b", "l"]),
    ];
    for (what, expected) in steps {
        come(&mut model, what);
        assert_eq!(complete(&model), expected, "after {what}");
    }
}

#[test]
fn what_does_not_come_in_its_time_is_gone_without() {
    let begun = Instant::now();
    let mut model = model(begun);
    let asked: Vec<_> = model
        .waits
        .keys()
        .map(|asked| (asked.kind, asked.name.clone()))
        .collect();
    let expected = [
        (Kind::Endpoints, "b"),
        (Kind::Endpoints, "s"),
        (Kind::Routes, "t"),
        (Kind::Secrets, "own"),
    ];
    assert_eq!(asked, expected.map(|(kind, name)| (kind, name.to_owned())));
    let mut late = |seconds| {
        let late = model.expire(begun + Duration::from_secs(seconds));
        let names: Vec<String> = late.into_iter().map(|asked| asked.name).collect();
        (names, complete(&model))
    };
    let named = |names: &[&str]| {
        names
            .iter()
            .map(|name| (*name).to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(late(1), (named(&[]), named(&[])));
    assert_eq!(late(2), (named(&["s"]), named(&["a"])));
    assert_eq!(late(15), (named(&["t", "own"]), named(&["a", "l"])));
    assert_eq!(late(99), (named(&[]), named(&["a", "l"])), "0 is for ever");
}

#[test]
fn what_nobody_asks_for_any_more_is_forgotten() {
    let begun = Instant::now();
    let mut model = model(begun);
    come(&mut model, "s");
    come(&mut model, "t");
    model.bootstrap.listeners.clear();
    model.bootstrap.clusters.remove(1);
    model.subscribe(begun);
    let left: Vec<&Subscription> = model.waits.keys().collect();
    assert_eq!((left.len(), left[0].name.as_str()), (1, "s"));
    assert!(model.tables.is_empty() && !model.assignments.is_empty());
}
