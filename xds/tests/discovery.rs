//! Resources that come while we run, as written: what is taken, what is refused, and where it says so.

use outrigger_xds::{
    accepted::Candidate,
    load::{
        Syntax, bootstrap, bootstrap_to_json,
        discovery::{Resource, response},
    },
    resource::{
        cluster::Cluster, config_source::Origin, endpoint::ClusterLoadAssignment,
        listener::Listener, route::RouteConfiguration, secret::Secret,
    },
};

fn read<R: Resource>(text: &str) -> Vec<Candidate<R>> {
    let response = response(text, Syntax::Yaml).expect("it is a response");
    assert_eq!(response.version, "7");
    response.read()
}

fn error<R: Resource>(candidate: &Candidate<R>) -> String {
    match &candidate.read {
        Ok(_) => panic!("{} is taken", candidate.name),
        Err(errors) => errors.to_string(),
    }
}

const CLUSTERS: &str = r#"
version_info: "7"
resources:
- "@type": type.googleapis.com/envoy.config.cluster.v3.Cluster
  name: a
  type: EDS
  eds_cluster_config: {service_name: s, eds_config: {path_config_source: {path: /eds.yaml}, initial_fetch_timeout: 1s}}
- "@type": type.googleapis.com/envoy.config.cluster.v3.Cluster
  name: b
  type: EDS
  bogus: 1
  eds_cluster_config: {eds_config: {path_config_source: {path: /eds.yaml, watched_directory: {path: /}}, of_tomorrow: {}}}
- "@type": type.googleapis.com/envoy.config.cluster.v3.Cluster
  name: c
  type: EDS
- {"@type": type.googleapis.com/envoy.config.cluster.v3.Cluster, name: d, type: EDS, eds_cluster_config: {eds_config: {ads: {}}}}
- {"@type": type.googleapis.com/envoy.config.listener.v3.Listener, name: e}
- {name: f}
- 7
- "@type": type.googleapis.com/envoy.config.cluster.v3.Cluster
  name: g
  type: STATIC
  load_assignment: {cluster_name: g, endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: x, port_value: 1}}}}]}]}
"#;

#[test]
fn each_resource_is_judged_by_itself() {
    let all = read::<Cluster>(CLUSTERS);
    let names: Vec<_> = all
        .iter()
        .map(|candidate| candidate.name.as_str())
        .collect();
    assert_eq!(names, ["a", "b", "c", "d", "e", "f", "", "g"]);
    let a = all[0].read.as_ref().unwrap().eds.as_ref().unwrap();
    assert_eq!(a.service_name, "s");
    assert_eq!(a.source.origin, Origin::Path("/eds.yaml".into()));
    assert_eq!(a.source.initial_fetch_timeout.as_secs(), 1);
    // What nobody knows is no error here.
    assert!(all[1].read.is_ok(), "{}", error(&all[1]));
    assert!(all[3].read.is_ok(), "{}", error(&all[3]));
    for (index, expected) in [
        (2, "resources[2].eds_cluster_config: required"),
        (
            4,
            "expected a envoy.config.cluster.v3.Cluster, got type.googleapis.com/envoy.config.listener.v3.Listener",
        ),
        (5, "resources[5]: '@type' is missing"),
        (6, "resources[6]: expected an object with '@type'"),
        (7, "resources[7].load_assignment: malformed IP address: x"),
    ] {
        let error = error(&all[index]);
        assert!(error.contains(expected), "{index}: {error}");
    }
    assert_eq!(all[2].configuration["name"], "c", "as written");
}

#[test]
fn a_text_that_is_no_response_is_an_error() {
    for (text, expected) in [
        ("{resources: [", "not valid YAML"),
        ("[]", "expected an object"),
        ("{resources: 1}", "resources: expected a list"),
        ("{version_info: 1}", "version_info: expected a string"),
        (
            "{resource_errors: [{resource_name: {dynamic_parameter_constraints: {}}}]}",
            "resource_errors[0].resource_name: not supported yet: dynamic_parameter_constraints",
        ),
    ] {
        let error = response(text, Syntax::Yaml).unwrap_err().to_string();
        assert!(error.contains(expected), "{text}: {error}");
    }
    let empty = response(
        "{\"versionInfo\": \"1\", \"nonce\": \"n\", \"canary\": true}",
        Syntax::Json,
    )
    .unwrap();
    assert_eq!((empty.version.as_str(), empty.resources.len()), ("1", 0));
}

#[test]
fn all_types_are_read_and_shown_again() {
    fn same<R: Resource + PartialEq + std::fmt::Debug>(fields: &str) {
        let text = format!(
            "{{version_info: '7', resources: [{{'@type': type.googleapis.com/{}, {fields}}}]}}",
            R::TYPE
        );
        let all = read::<R>(&text);
        let first = all[0].read.as_ref().unwrap();
        assert_eq!(first.name(), "a");
        let shown = serde_json::json!({ "version_info": "7", "resources": [first.to_json()] });
        let again = read::<R>(&shown.to_string());
        assert_eq!(again[0].read.as_ref().unwrap(), first);
    }
    same::<RouteConfiguration>("name: a, virtual_hosts: []");
    same::<ClusterLoadAssignment>("cluster_name: a");
    same::<Secret>(
        "name: a, tls_certificate: {certificate_chain: {filename: /c}, private_key: {filename: /k}, watched_directory: {path: /}}",
    );
    same::<Secret>("name: a, validation_context: {trusted_ca: {inline_string: x}}");
    let file = "{path_config_source: {path: /f}}";
    let router = "{name: r, typed_config: {'@type': type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}";
    let manager = format!(
        "{{'@type': type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager, \
          stat_prefix: a, http_filters: [{router}], rds: {{route_config_name: t, config_source: {file}}}}}"
    );
    let tls = format!(
        "{{name: tls, typed_config: {{'@type': type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext, \
          require_client_certificate: true, common_tls_context: {{ \
          tls_certificate_sds_secret_configs: [{{name: own, sds_config: {file}}}], \
          combined_validation_context: {{default_validation_context: {{match_typed_subject_alt_names: [{{san_type: DNS, matcher: {{exact: x}}}}]}}, \
          validation_context_sds_secret_config: {{name: ca}}}}}}}}}}"
    );
    let address = "{socket_address: {address: 127.0.0.1, port_value: 1}}";
    same::<Listener>(&format!(
        "name: a, address: {address}, filter_chains: [{{filters: [{{name: h, typed_config: {manager}}}], transport_socket: {tls}}}]"
    ));
}

/// Unless the table says so itself.
#[test]
fn clusters_of_a_table_that_comes_may_come_later() {
    let table = |more: &str| {
        let text = format!(
            "{{version_info: '7', resources: [{{'@type': type.googleapis.com/{}, name: a{more}}}]}}",
            RouteConfiguration::TYPE
        );
        read::<RouteConfiguration>(&text)[0].read.clone().unwrap()
    };
    assert!(!table("").validate_clusters);
    assert!(table(", validate_clusters: true").validate_clusters);
    assert!(table(", validateClusters: true").validate_clusters);
}

#[test]
fn a_bootstrap_says_where_more_comes_from() {
    let text = "
static_resources: {secrets: [{name: s, validation_context: {trusted_ca: {filename: /ca}}}]}
dynamic_resources:
  lds_config: {path_config_source: {path: /l}, resource_api_version: V3}
  cds_config: {path_config_source: {path: /c}}
";
    let read = bootstrap(text, Syntax::Yaml).unwrap();
    assert_eq!(read.lds.as_ref().unwrap().origin, Origin::Path("/l".into()));
    assert_eq!(read.secrets[0].name, "s");
    let again = bootstrap(&bootstrap_to_json(&read).to_string(), Syntax::Json).unwrap();
    assert_eq!(again, read);
    for (text, expected) in [
        (
            "{dynamic_resources: {ads_config: {}}}",
            "dynamic_resources.ads_config.grpc_services: at least one is required",
        ),
        (
            "{dynamic_resources: {lds_config: {}}}",
            "dynamic_resources.lds_config: required: path_config_source",
        ),
        (
            "{dynamic_resources: {lds_config: {path: /l}}}",
            "not supported yet: path",
        ),
        (
            "{dynamic_resources: {lds_config: {path_config_source: {path: ''}}}}",
            "must not be empty",
        ),
        (
            "{dynamic_resources: {lds_config: {path_config_source: {path: /l}, bogus: 1}}}",
            "no such field: 'bogus'",
        ),
        (
            "{static_resources: {secrets: [{name: s, generic_secret: {}}]}}",
            "not supported yet: generic_secret",
        ),
        (
            "{static_resources: {secrets: [{name: s}]}}",
            "required: tls_certificate or validation_context",
        ),
    ] {
        let error = bootstrap(text, Syntax::Yaml).unwrap_err().to_string();
        assert!(error.contains(expected), "{text}: {error}");
    }
}
