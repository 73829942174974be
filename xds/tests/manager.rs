//! What connection managers say of their own answers and of their clients, and clusters of their sockets: read, and shown
//! again as it was read.

use outrigger_xds::{
    load::{Syntax, Unknown, bootstrap, bootstrap_from_value, bootstrap_over, bootstrap_to_json},
    resource::{
        canary::Enforcing,
        client_cert::{ClientCert, Forward},
        edge::Underscores,
        health_check::Checker,
        listener::AccessLogFormat,
        log_filter::{How, LogFilter},
        tls::{NameKind, NameMatch, NamePattern},
    },
};
use std::time::Duration;

const TEXT: &str = r#"
node: {id: a}
static_resources:
  listeners:
  - name: l
    address: {socket_address: {address: 127.0.0.1, port_value: 0}}
    filter_chains:
    - filters:
      - name: http
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: h
          http_protocol_options: {}
          common_http_protocol_options: {max_stream_duration: 7s, headers_with_underscores_action: DROP_HEADER}
          internal_address_config: {cidr_ranges: [{address_prefix: 10.0.0.0, prefix_len: 8}]}
          forward_client_cert_details: APPEND_FORWARD
          set_current_client_cert_details: {subject: true, uri: true, chain: true}
          local_reply_config:
            mappers:
            - filter:
                or_filter:
                  filters:
                  - status_code_filter: {comparison: {op: GE, value: {default_value: 500, runtime_key: k}}}
                  - and_filter:
                      filters:
                      - duration_filter: {comparison: {op: LE, value: {default_value: 9, runtime_key: k}}}
                      - header_filter: {header: {name: x-a, present_match: true}}
                  - response_flag_filter: {flags: [UH, NR]}
              status_code: 418
              body: {inline_string: text}
              body_format_override: {text_format_source: {inline_string: "%LOCAL_REPLY_BODY%"}, content_type: text/html}
              headers_to_add: [{header: {key: x-b, value: "1"}}]
            body_format: {json_format: {says: "%LOCAL_REPLY_BODY%"}}
          access_log:
          - name: log
            filter: {status_code_filter: {comparison: {op: NE, value: {default_value: 200, runtime_key: k}}}}
            typed_config: {"@type": type.googleapis.com/envoy.extensions.access_loggers.stream.v3.StdoutAccessLog}
          route_config: {}
          http_filters: [{name: router, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}]
  clusters:
  - name: c
    type: STATIC
    load_assignment: {cluster_name: c}
    transport_socket_matches:
    - name: plain
      match: {mode: off, level: 2}
      transport_socket: {name: raw, typed_config: {"@type": type.googleapis.com/envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer}}
"#;

#[test]
fn what_is_said_is_read_and_shown_again() {
    let read = bootstrap(TEXT, Syntax::Yaml).unwrap();
    let http = read.listeners[0].http_managers().next().unwrap();
    assert_eq!(http.max_stream_duration, Duration::from_secs(7));
    assert_eq!(http.edge.underscores, Underscores::Drop);
    let ranges = &http.edge.internal_addresses;
    assert!(ranges[0].contains("10.9.9.9".parse().unwrap()));
    let wanted = ClientCert {
        forward: Forward::AppendForward,
        subject: true,
        uri: true,
        chain: true,
        ..ClientCert::default()
    };
    assert_eq!(http.edge.client_cert, wanted);
    let mapper = &http.local_replies.mappers[0];
    assert_eq!(mapper.status.unwrap(), 418);
    assert_eq!(mapper.body.as_deref(), Some("text"));
    let format = mapper.body_format.as_ref().unwrap();
    assert_eq!(format.content_type, "text/html");
    let all = http.local_replies.body_format.as_ref().unwrap();
    assert_eq!(all.content_type, "application/json");
    assert!(matches!(all.format, AccessLogFormat::Json(_)));
    let Some(LogFilter::Status(comparison)) = &http.access_log[0].filter else {
        panic!("{:?}", http.access_log[0])
    };
    assert_eq!((comparison.how, comparison.value), (How::NotEqual, 200));
    let holds = |number| comparison.how.holds(number, comparison.value.into());
    assert!(holds(404) && !holds(200));
    let matched = &read.clusters[0].socket_matches[0];
    assert_eq!((matched.wanted.len(), &matched.tls), (2, &None));
    let again = bootstrap_from_value(bootstrap_to_json(&read)).unwrap();
    assert_eq!(again, read);
}

#[test]
fn what_nobody_knows_is_refused_unless_it_is_asked_for() {
    let texts = [(TEXT, Syntax::Yaml), ("{node: {bogus: 1}}", Syntax::Yaml)];
    let error = bootstrap_over(&texts, Unknown::Refused).unwrap_err();
    assert_eq!(error.problems().len(), 1, "{error}");
    let read = bootstrap_over(&texts, Unknown::Counted).unwrap();
    assert_eq!(read, bootstrap(TEXT, Syntax::Yaml).unwrap());
    // What Envoy has and we do not is never counted only.
    let refused = [texts[0], ("{overload_manager: {}}", Syntax::Yaml)];
    assert!(bootstrap_over(&refused, Unknown::Counted).is_err());
}

#[test]
fn grpc_checks_need_http2() {
    let cluster = "{name: g, type: STATIC, load_assignment: {cluster_name: g}, health_checks: \
        [{timeout: 1s, interval: 1s, unhealthy_threshold: 1, healthy_threshold: 1, grpc_health_check: {}}]}";
    let text = format!("{{node: {{id: a}}, static_resources: {{clusters: [{cluster}]}}}}");
    let error = bootstrap(&text, Syntax::Yaml).unwrap_err().to_string();
    assert!(
        error.contains("grpc_health_check: only in a cluster that speaks HTTP/2"),
        "{error}"
    );
}

#[test]
fn a_canary_is_read_and_shown_as_it_was() {
    let text = r#"
static_resources:
  clusters:
  - name: c
    load_assignment: {cluster_name: c}
    health_checks:
    - timeout: 3s
      interval: 5s
      unhealthy_threshold: 3
      healthy_threshold: 2
      custom_health_check:
        name: outrigger.health_checkers.canary
        typed_config:
          "@type": type.googleapis.com/xds.type.v3.TypedStruct
          type_url: type.googleapis.com/outrigger.health_checkers.canary.v1.Config
          value: {prefill_tokens_per_s: 900, golden: {enforcing: report, expected: " 10"}}
"#;
    let read = bootstrap(text, Syntax::Yaml).unwrap();
    let check = read.clusters[0].health_check.clone().unwrap();
    let Checker::Canary(canary) = &check.checker else {
        panic!("{check:?}")
    };
    assert_eq!(canary.prefill_tokens_per_s, 900);
    assert_eq!(canary.golden.enforcing, Enforcing::Report);
    assert_eq!(canary.golden.max_tokens, 8, "the rest is the default");
    let shown = bootstrap_to_json(&read);
    assert_eq!(bootstrap_from_value(shown).unwrap(), read);
}

/// The form that bootstraps of go-control-plane have.
#[test]
fn the_old_form_of_http2_is_read_and_the_new_one_goes_before() {
    use outrigger_xds::resource::cluster::UpstreamProtocol;
    let options = |explicit: &str| {
        let name = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
        format!(
            r#"typed_extension_protocol_options: {{"{name}": {{"@type": type.googleapis.com/{name}, explicit_http_config: {{{explicit}: {{}}}}}}}}"#
        )
    };
    let old = "http2_protocol_options: {}".to_owned();
    for (fields, expected) in [
        (old.clone(), UpstreamProtocol::Http2),
        (
            format!("{old}, {}", options("http_protocol_options")),
            UpstreamProtocol::Http1,
        ),
        (options("http2_protocol_options"), UpstreamProtocol::Http2),
        ("type: STATIC".to_owned(), UpstreamProtocol::Http1),
    ] {
        let cluster = format!("{{name: c, load_assignment: {{cluster_name: c}}, {fields}}}");
        let text = format!("static_resources: {{clusters: [{cluster}]}}");
        let read = bootstrap(&text, Syntax::Yaml).unwrap();
        assert_eq!(read.clusters[0].protocol, expected, "{fields}");
    }
}

/// The form of istiod's clusters for ports without a protocol.
#[test]
fn a_cluster_may_speak_what_its_clients_do_and_close_what_is_idle() {
    use outrigger_xds::resource::cluster::UpstreamProtocol;
    let name = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
    let text = |idle: &str| {
        format!(
            r#"static_resources: {{clusters: [{{name: c, load_assignment: {{cluster_name: c}}, typed_extension_protocol_options: {{"{name}": {{"@type": type.googleapis.com/{name},
            common_http_protocol_options: {{idle_timeout: {idle}}}, use_downstream_protocol_config: {{http_protocol_options: {{}}, http2_protocol_options: {{}}}}}}}}}}]}}"#
        )
    };
    let read = bootstrap(&text("300s"), Syntax::Yaml).unwrap();
    let cluster = &read.clusters[0];
    assert_eq!(
        cluster.protocol,
        UpstreamProtocol::Downstream { http2: true }
    );
    assert_eq!(
        cluster.connection.idle_limit(),
        Some(Duration::from_secs(300))
    );
    let shown = bootstrap_to_json(&read);
    assert_eq!(bootstrap_from_value(shown).unwrap(), read);
    let never = bootstrap(&text("0s"), Syntax::Yaml).unwrap();
    assert_eq!(never.clusters[0].connection.idle_limit(), None);
    let refused = bootstrap(&text("-1s"), Syntax::Yaml).unwrap_err();
    assert!(
        refused
            .to_string()
            .contains("common_http_protocol_options.idle_timeout"),
        "{refused}"
    );
}

/// What only tells of traffic has no effect; its neighbours keep their places.
#[test]
fn extensions_that_only_tell_are_left_out() {
    let grpc =
        "type.googleapis.com/envoy.extensions.access_loggers.grpc.v3.HttpGrpcAccessLogConfig";
    let stats = "type.googleapis.com/stats.PluginConfig";
    let text = format!(
        r#"
admin:
  address: {{socket_address: {{address: 127.0.0.1, port_value: 0}}}}
  access_log:
  - name: grpc
    typed_config: {{"@type": "{grpc}", common_config: {{log_name: echo}}}}
  - name: mesh
    typed_config: {{"@type": type.googleapis.com/udpa.type.v1.TypedStruct, type_url: "{stats}", value: {{a: 1}}}}
  - name: own
    typed_config: {{"@type": type.googleapis.com/envoy.extensions.access_loggers.stream.v3.StdoutAccessLog}}
"#
    );
    let read = bootstrap(&text, Syntax::Yaml).unwrap();
    assert_eq!(read.admin.unwrap().access_log.len(), 1);
    // Who keeps somebody out is not left out.
    let rules = "type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC";
    let refused = bootstrap(&text.replace(stats, rules), Syntax::Yaml).unwrap_err();
    let refused = refused.to_string();
    assert!(
        refused.contains("admin.access_log[1]") && refused.contains("RBAC"),
        "{refused}"
    );
}

/// A cluster as istiod writes it for a peer in its mesh.
fn cluster_of_istio(filter: &str, names: &str) -> String {
    format!(
        r#"
static_resources:
  clusters:
  - name: peer
    load_assignment: {{cluster_name: peer}}
    filters:
    - name: f
      typed_config: {{"@type": type.googleapis.com/udpa.type.v1.TypedStruct, type_url: "{filter}", value: {{protocol: istio-peer-exchange}}}}
    transport_socket:
      name: tls
      typed_config:
        "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext
        common_tls_context:
          alpn_protocols: [istio-peer-exchange, istio]
          validation_context: {{trusted_ca: {{inline_string: x}}, {names}}}
"#
    )
}

/// Sidecars that agree on it send each other metadata ahead of a stream.
#[test]
fn metadata_of_istio_is_never_agreed_on() {
    let exchange = "type.googleapis.com/envoy.tcp.metadataexchange.config.MetadataExchange";
    let read = bootstrap(&cluster_of_istio(exchange, ""), Syntax::Yaml).unwrap();
    let tls = read.clusters[0].tls.as_ref().unwrap();
    assert_eq!(tls.common.alpn, ["istio"]);
    let other = "type.googleapis.com/envoy.extensions.filters.network.rbac.v3.RBAC";
    let refused = bootstrap(&cluster_of_istio(other, ""), Syntax::Yaml).unwrap_err();
    let refused = refused.to_string();
    assert!(refused.contains("filters[0]"), "{refused}");
}

#[test]
fn names_of_any_kind_count_where_there_are_no_others() {
    let exchange = "type.googleapis.com/envoy.tcp.metadataexchange.config.MetadataExchange";
    let names = |names: &str| {
        let read = bootstrap(&cluster_of_istio(exchange, names), Syntax::Yaml).unwrap();
        let tls = read.clusters[0].tls.clone().unwrap();
        tls.common.validation.unwrap().names
    };
    let named = |kind, name: &str| NameMatch {
        kind,
        pattern: NamePattern::Exact(name.to_owned()),
    };
    let old = "match_subject_alt_names: [{exact: old}]";
    let both = [named(NameKind::Dns, "old"), named(NameKind::Uri, "old")];
    assert_eq!(names(old), both);
    let new = "match_typed_subject_alt_names: [{san_type: URI, matcher: {exact: new}}]";
    assert_eq!(
        names(&format!("{old}, {new}")),
        [named(NameKind::Uri, "new")]
    );
    let wrong = cluster_of_istio(
        exchange,
        "match_subject_alt_names: [{exact: a, ignore_case: true}]",
    );
    let refused = bootstrap(&wrong, Syntax::Yaml).unwrap_err().to_string();
    assert!(
        refused.contains("match_subject_alt_names[0]: not supported yet: ignore_case"),
        "{refused}"
    );
}

/// What istiod writes beside that; none of it can change what happens to a request.
#[test]
fn what_istiod_writes_without_effect_is_taken() {
    let cluster = |discovery: &str| {
        let text =
            format!("static_resources: {{clusters: [{{name: c, dns_jitter: 0.1s, {discovery}}}]}}");
        bootstrap(&text, Syntax::Yaml)
    };
    let read = cluster("type: STATIC").unwrap();
    let nobody = &read.clusters[0].load_assignment;
    assert_eq!((&*nobody.cluster_name, nobody.endpoints.len()), ("c", 0));
    let shown = bootstrap_to_json(&read);
    let again = bootstrap_from_value(shown).unwrap();
    assert_eq!(again.clusters, read.clusters);
    assert!(cluster("type: STRICT_DNS").is_err(), "names are needed");

    let tag = "{tag: a, metadata: {kind: {route: {}}, metadata_key: {key: k}}}";
    let told = "{tag: b, metadata: {kind: {host: {}}, metadata_key: {key: k}, default_value: d}}";
    let manager = format!(
        "stat_prefix: h\n          tracing: {{custom_tags: [{tag}, {told}]}}\n          proxy_100_continue: true"
    );
    let read = bootstrap(&TEXT.replace("stat_prefix: h", &manager), Syntax::Yaml).unwrap();
    let tracing = read.listeners[0]
        .http_managers()
        .next()
        .unwrap()
        .tracing
        .clone()
        .unwrap();
    let tags: Vec<_> = tracing.custom_tags.iter().map(|tag| &*tag.tag).collect();
    assert_eq!(tags, ["b"]);
}
