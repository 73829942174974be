//! A bootstrap that says everything that can be said, as text and as what it means.

use super::full_routes::full_routes;
use outrigger_xds::resource::{
    ads::{Ads, GrpcService, Target},
    bootstrap::{Admin, Bootstrap, Node},
    cluster::{
        Balancing, CircuitBreakers, Cluster, Discovery, Dns, LbPolicy, RetryLimit, Thresholds,
        UpstreamProtocol,
    },
    config_source::{ConfigSource, INITIAL_FETCH_TIMEOUT_DEFAULT, Origin},
    endpoint::{Address, ClusterLoadAssignment, HealthStatus, LbEndpoint, Locality},
    filter_chain::FilterChain,
    health_check::{Checker, HealthCheck},
    listener::{
        AccessLog, AccessLogFormat, AccessLogSink, Codec, HttpConnectionManager, HttpFilter,
        Listener,
    },
    outlier_detection::{OutlierDetection, Rule},
    route::TypedConfig,
    runtime::{LayerContent, Rtds, RuntimeLayer},
    server_header::ServerHeader,
    tls::{
        CommonTls, DataSource, DownstreamTls, NameKind, NameMatch, NamePattern, TlsCertificate,
        TlsParams, Validation,
    },
};
use outrigger_xds::subscription::{Protocol, RateLimit};
use serde_json::{Map, Value, json};
use std::time::Duration;

const ROUTER: &str = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router";
const KV_ROUTING: &str = "type.googleapis.com/outrigger.filters.http.kv_routing.v1.Config";

pub(crate) const FULL: &str = r#"
node:
  id: proxy-a
  cluster: fleet
  metadata: {team: inference}
  locality: {region: r, zone: z, sub_zone: s}
  client_features: feature
  user_agent_name: envoy
dynamic_resources:
  ads_config:
    api_type: DELTA_GRPC
    transport_api_version: V3
    set_node_on_first_message_only: true
    rate_limit_settings: {max_tokens: 7, fill_rate: 0.5}
    grpc_services:
    - envoy_grpc: {cluster_name: engines, authority: xds.example, max_receive_message_length: 1000}
      initial_metadata: [{key: x-token, value: secret}]
    - google_grpc: {target_uri: "dns:///xds.example:18000", stat_prefix: xds}
  lds_config: {ads: {}, resource_api_version: V3, initial_fetch_timeout: 0s}
  cds_config: {ads: {}, resource_api_version: V3}
layered_runtime:
  layers:
  - name: rtds
    rtds_layer:
      name: rt
      rtds_config: {ads: {}, resource_api_version: V3, initial_fetch_timeout: 0s}
  - {name: admin, admin_layer: {}}
cluster_manager:
  enable_deferred_cluster_creation: true
  load_stats_config:
    api_type: GRPC
    transport_api_version: V3
    grpc_services: [{envoy_grpc: {cluster_name: engines}}]
admin:
  address: {socket_address: {address: 127.0.0.1, port_value: 9901}}
  access_log:
  - {name: log, typed_config: {"@type": type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog, path: /dev/null}}
static_resources:
  listeners:
  - name: outbound
    trafficDirection: OUTBOUND
    address: {socketAddress: {address: "::1", portValue: 8080}}
    tcp_backlog_size: 512
    filter_chains:
    - transport_socket_connect_timeout: 7s
      transport_socket:
        name: tls
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
          require_client_certificate: true
          common_tls_context:
            alpn_protocols: [h2, http/1.1]
            tls_params: {tls_minimum_protocol_version: TLSv1_3, cipher_suites: ["[A|B]", C], ecdh_curves: [X25519]}
            tls_certificates:
            - {certificate_chain: {filename: /c.pem}, private_key: {filename: /k.pem}}
            validation_context:
              trusted_ca: {inline_string: ca}
              match_typed_subject_alt_names:
              - {san_type: URI, matcher: {prefix: "spiffe://a/"}}
              - {san_type: DNS, matcher: {exact: b}}
      filters:
      - name: hcm
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: ingress
          server_name: edge
          server_header_transformation: PASS_THROUGH
          codec_type: 1
          stream_idle_timeout: 0s
          request_timeout: 0.25s
          request_headers_timeout: 3s
          use_remote_address: true
          generate_request_id: false
          max_request_headers_kb: 96
          common_http_protocol_options: {idle_timeout: 10s}
          http2ProtocolOptions: {maxConcurrentStreams: 7}
          access_log:
          - name: envoy.access_loggers.stdout
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.access_loggers.stream.v3.StdoutAccessLog
              log_format: {json_format: {status: "%RESPONSE_CODE%", nested: {ttft: "%TTFT%"}}}
          http_filters:
          - name: kv
            typed_config:
              "@type": type.googleapis.com/xds.type.v3.TypedStruct
              type_url: type.googleapis.com/outrigger.filters.http.kv_routing.v1.Config
              value: {block_tokens: 32, overlap_weight: 1.5, list: [1, null, true]}
          - name: fancy
            is_optional: true
            typed_config: {"@type": type.googleapis.com/example.Fancy, size: 3}
          - name: router
            typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}
          route_config:
            name: local
            request_headers_to_remove: [X-Gone]
            most_specific_header_mutations_wins: true
            validate_clusters: true
            max_direct_response_body_size_bytes: 5000
            ignore_port_in_host_matching: true
            virtual_hosts:
            - name: all
              domains: ["*"]
              include_request_attempt_count: true
              include_attempt_count_in_response: true
              retry_policy:
                retry_on: connect-failure, reset
                num_retries: 3
                retriable_status_codes: [418]
                retriable_headers: [{name: x-again}]
                retriable_request_headers: [{name: X-Safe, present_match: true}]
                retry_back_off: {base_interval: 0.005s}
                host_selection_retry_max_attempts: 5
                retry_host_predicate:
                - name: envoy.retry_host_predicates.previous_hosts
                  typed_config: {"@type": type.googleapis.com/envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate}
              routes:
              - name: health
                match: {path: /health}
                direct_response: {status: 200, body: {inline_string: fine}}
              - match: {path: /old}
                redirect: {https_redirect: true, host_redirect: new.example, port_redirect: 8443, response_code: PERMANENT_REDIRECT, strip_query: true, regex_rewrite: {pattern: {regex: "(a)(b)"}, substitution: '\2\1'}}
                response_headers_to_add: [{header: {key: X-A, value: "%PROTOCOL%"}, append_action: ADD_IF_ABSENT, keep_empty_value: true}]
                response_headers_to_remove: [X-B]
              - match:
                  prefix: /v1/
                  case_sensitive: false
                  headers: [{name: X-Team, string_match: {prefix: a}, invert_match: true, treat_missing_header_as_empty: true}, {name: x-any}, {name: x-n, range_match: {start: -1, end: "5"}}]
                  query_parameters: [{name: q, string_match: {safe_regex: {google_re2: {}, regex: "a+"}, ignore_case: true}}, {name: p, present_match: true}]
                  runtime_fraction: {default_value: {numerator: 5, denominator: MILLION}, runtime_key: share}
                  grpc: {}
                route:
                  cluster: engines
                  timeout: 0s
                  idle_timeout: 1.5s
                  prefix_rewrite: /
                  priority: HIGH
                  hash_policy:
                  - {header: {header_name: X-User, regex_rewrite: {pattern: {regex: "(a)(b)"}, substitution: '\2\1'}}, terminal: true}
                  - {cookie: {name: c, ttl: 5s, path: /p, attributes: [{name: SameSite, value: Lax}]}}
                  - {connection_properties: {source_ip: true}}
                  - {query_parameter: {name: q}}
                typed_per_filter_config:
                  kv:
                    "@type": type.googleapis.com/udpa.type.v1.TypedStruct
                    type_url: type.googleapis.com/outrigger.filters.http.kv_routing.v1.Config
                    value: {debug_header: true}
              - match: {prefix: /}
                route:
                  weighted_clusters:
                    total_weight: 3
                    header_name: x-number
                    clusters:
                    - {name: engines, weight: 3, request_headers_to_add: [{header: {key: x-old, value: "1"}, append: false}], host_rewrite_literal: in.side}
                    - {cluster_header: x-cluster, weight: 0}
                  cluster_not_found_response_code: NOT_FOUND
                  regex_rewrite: {pattern: {google_re2: {}, regex: "(a)(b)"}, substitution: '\2\1'}
                  host_rewrite_header: x-host
                  append_x_forwarded_host: true
                  max_stream_duration: {max_stream_duration: 7s}
                  max_grpc_timeout: 9s
                  request_mirror_policies: [{cluster: engines, runtime_fraction: {default_value: {numerator: 1}}, disable_shadow_host_suffix_append: true, trace_sampled: true}]
  clusters:
  - name: engines
    connect_timeout: 0.5s
    type: STRICT_DNS
    outlier_detection: {consecutive_5xx: 7, base_ejection_time: 400s, split_external_local_origin_errors: true, failure_percentage_threshold: 70, max_ejection_time_jitter: 2s, successful_active_health_check_uneject_host: false}
    health_checks: [{timeout: 1s, interval: 2s, interval_jitter: 0.5s, unhealthy_threshold: 3, healthy_threshold: 2, reuse_connection: false, unhealthy_edge_interval: 4s, http_health_check: {path: /health, method: HEAD, expected_statuses: [{start: 200, end: 300}], retriable_statuses: [{start: 503, end: 504}], codec_client_type: HTTP2}}]
    common_lb_config: {healthy_panic_threshold: {value: 25}, locality_weighted_lb_config: {}}
    least_request_lb_config: {choice_count: 3, active_request_bias: {default_value: 1.5, runtime_key: x}}
    lb_policy: LEAST_REQUEST
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {http2_protocol_options: {}}
    circuit_breakers:
      thresholds: [{max_connections: 10, retry_budget: {budget_percent: {value: 12.5}}}]
      per_host_thresholds: [{max_connections: 4}]
    load_assignment:
      cluster_name: engines
      endpoints:
      - locality: {region: r, sub_zone: s}
        lb_endpoints:
        - endpoint: {address: {socket_address: {address: localhost, port_value: 8000}}}
          load_balancing_weight: 3
          metadata: {filter_metadata: {outrigger: {duty: engine, role: prefill}}}
        - endpoint: {address: {socket_address: {address: 10.0.0.2, port_value: "8000"}}}
          health_status: DRAINING
"#;

fn socket(host: &str, port: u16) -> Address {
    Address {
        host: host.into(),
        port,
    }
}

fn full_tls() -> DownstreamTls {
    let name = |kind, pattern| NameMatch { kind, pattern };
    DownstreamTls {
        common: CommonTls {
            params: TlsParams {
                only_1_3: true,
                only_1_2: false,
                cipher_suites: vec!["A".into(), "B".into(), "C".into()],
                ecdh_curves: vec!["X25519".into()],
            },
            certificates: vec![TlsCertificate {
                chain: DataSource::File("/c.pem".into()),
                key: DataSource::File("/k.pem".into()),
            }],
            validation: Some(Validation {
                trusted_ca: DataSource::Inline(b"ca".to_vec()),
                names: vec![
                    name(NameKind::Uri, NamePattern::Prefix("spiffe://a/".into())),
                    name(NameKind::Dns, NamePattern::Exact("b".into())),
                ],
            }),
            certificate_secrets: Vec::new(),
            validation_secret: None,
            alpn: vec!["h2".into(), "http/1.1".into()],
        },
        require_client_certificate: true,
    }
}

fn full_manager() -> HttpConnectionManager {
    let typed = |type_url: &str, value: Value| TypedConfig {
        type_url: type_url.into(),
        value,
    };
    let filter = |name: &str, config: TypedConfig, is_optional| HttpFilter {
        name: name.into(),
        config,
        discovery: None,
        is_optional,
        disabled: false,
    };
    let kv = json!({"block_tokens": 32, "overlap_weight": 1.5, "list": [1, null, true]});
    let format = json!({"status": "%RESPONSE_CODE%", "nested": {"ttft": "%TTFT%"}});
    HttpConnectionManager {
        rds: None,
        stat_prefix: "ingress".into(),
        codec: Codec::Http1,
        route_config: full_routes(typed(KV_ROUTING, json!({"debug_header": true}))),
        http_filters: vec![
            filter("kv", typed(KV_ROUTING, kv), false),
            filter(
                "fancy",
                typed("type.googleapis.com/example.Fancy", json!({"size": 3})),
                true,
            ),
            filter("router", typed(ROUTER, json!({})), false),
        ],
        access_log: vec![AccessLog {
            filter: None,
            sink: AccessLogSink::Stdout,
            format: AccessLogFormat::Json(serde_json::from_value(format).expect("an object")),
        }],
        use_remote_address: true,
        preserve_external_request_id: false,
        server_name: "edge".into(),
        server_header: ServerHeader::PassThrough,
        generate_request_id: false,
        stream_idle_timeout: Duration::ZERO,
        request_timeout: Duration::from_millis(250),
        request_headers_timeout: Duration::from_secs(3),
        idle_timeout: Duration::from_secs(10),
        drain_timeout: Duration::from_secs(5),
        max_request_headers_kb: 96,
        h2_max_concurrent_streams: 7,
        ..HttpConnectionManager::default()
    }
}

pub(crate) fn outlier_detection() -> OutlierDetection {
    let rule = |count, enforcing| Rule { count, enforcing };
    OutlierDetection {
        consecutive_5xx: rule(7, 100),
        consecutive_gateway_failure: rule(5, 0),
        consecutive_local_origin_failure: rule(5, 100),
        split_external_local_origin_errors: true,
        interval: Duration::from_secs(10),
        base_ejection_time: Duration::from_secs(400),
        max_ejection_time: Duration::from_secs(400),
        max_ejection_percent: 10,
        always_eject_one_host: false,
        enforcing_success_rate: 100,
        success_rate_minimum_hosts: 5,
        success_rate_request_volume: 100,
        success_rate_stdev_factor: 1900,
        enforcing_local_origin_success_rate: 100,
        failure_percentage_threshold: 70,
        enforcing_failure_percentage: 0,
        enforcing_failure_percentage_local_origin: 0,
        failure_percentage_minimum_hosts: 5,
        failure_percentage_request_volume: 50,
        max_ejection_time_jitter: Duration::from_secs(2),
        uneject_by_health_check: false,
        latency: None,
    }
}

fn health_check() -> HealthCheck {
    let seconds = Duration::from_secs;
    HealthCheck {
        timeout: seconds(1),
        interval: seconds(2),
        interval_jitter: Duration::from_millis(500),
        interval_jitter_percent: 0,
        initial_jitter: Duration::ZERO,
        unhealthy_threshold: 3,
        healthy_threshold: 2,
        reuse_connection: false,
        no_traffic_interval: seconds(60),
        no_traffic_healthy_interval: seconds(60),
        unhealthy_interval: seconds(2),
        unhealthy_edge_interval: seconds(4),
        healthy_edge_interval: seconds(2),
        checker: Checker::Http {
            host: String::new(),
            path: "/health".into(),
            method: http::Method::HEAD,
            expected: std::iter::once(200..300).collect(),
            retriable: std::iter::once(503..504).collect(),
            http2: true,
        },
    }
}

fn engines() -> ClusterLoadAssignment {
    let facts = json!({"duty": "engine", "role": "prefill"});
    ClusterLoadAssignment {
        cluster_name: "engines".into(),
        endpoints: vec![
            LbEndpoint {
                address: socket("localhost", 8000),
                hostname: String::new(),
                health_status: HealthStatus::Healthy,
                load_balancing_weight: 3,
                locality: 0,
                metadata: [("outrigger".to_owned(), facts)].into(),
            },
            LbEndpoint {
                address: socket("10.0.0.2", 8000),
                hostname: String::new(),
                health_status: HealthStatus::Draining,
                load_balancing_weight: 1,
                locality: 0,
                metadata: [].into(),
            },
        ],
        localities: vec![Locality {
            place: ["r", "", "s"].map(str::to_owned).into(),
            ..Locality::default()
        }],
        overprovisioning_factor: 0,
    }
}

/// What `FULL` means.
pub(crate) fn full() -> Bootstrap {
    let file = AccessLogSink::File("/dev/null".into());
    Bootstrap {
        node: Node {
            id: "proxy-a".into(),
            cluster: "fleet".into(),
            metadata: Map::from_iter([("team".to_owned(), json!("inference"))]),
            locality: ["r", "z", "s"].map(str::to_owned),
            client_features: vec!["feature".into()],
        },
        admin: Some(Admin {
            pipe_mode: 0,
            address: socket("127.0.0.1", 9901),
            access_log: vec![AccessLog {
                filter: None,
                sink: file,
                format: AccessLogFormat::Text(None),
            }],
        }),
        listeners: vec![Listener {
            tcp_backlog_size: 512,
            ..Listener::new("outbound", socket("::1", 8080), full_chain())
        }],
        clusters: vec![full_cluster()],
        secrets: Vec::new(),
        lds: Some(ads_source(Duration::ZERO)),
        cds: Some(ads_source(INITIAL_FETCH_TIMEOUT_DEFAULT)),
        ads: Some(full_ads()),
        load_stats: Some(Ads {
            protocol: Protocol::State,
            servers: vec![GrpcService {
                target: Target::Cluster {
                    name: "engines".into(),
                    authority: String::new(),
                    message_bytes_max: None,
                },
                initial_metadata: Vec::new(),
            }],
            rate_limit: None,
        }),
        runtime: full_runtime(),
    }
}

fn full_runtime() -> Vec<RuntimeLayer> {
    let rtds = Rtds {
        name: "rt".into(),
        source: ads_source(Duration::ZERO),
    };
    vec![
        RuntimeLayer {
            name: "rtds".into(),
            content: LayerContent::Rtds(rtds),
        },
        RuntimeLayer::admin(),
    ]
}

fn ads_source(initial_fetch_timeout: Duration) -> ConfigSource {
    ConfigSource {
        origin: Origin::Ads,
        initial_fetch_timeout,
    }
}

fn full_ads() -> Ads {
    let cluster = Target::Cluster {
        name: "engines".into(),
        authority: "xds.example".into(),
        message_bytes_max: Some(1000),
    };
    let address = Target::Address {
        address: socket("xds.example", 18000),
        uri: "dns:///xds.example:18000".into(),
        stat_prefix: "xds".into(),
    };
    Ads {
        protocol: Protocol::Delta,
        servers: vec![
            GrpcService {
                target: cluster,
                initial_metadata: vec![("x-token".into(), "secret".into())],
            },
            GrpcService {
                target: address,
                initial_metadata: Vec::new(),
            },
        ],
        rate_limit: Some(RateLimit {
            max_tokens: 7,
            fill_rate: 0.5,
        }),
    }
}

fn full_cluster() -> Cluster {
    Cluster {
        name: "engines".into(),
        connect_timeout: Duration::from_millis(500),
        discovery: Discovery::Dns(Dns::default()),
        lb_policy: LbPolicy::LeastRequest,
        balancing: Balancing {
            healthy_panic_threshold: 25.0,
            locality_weighted: true,
            choice_count: 3,
            active_request_bias: 1.5,
            ..Balancing::default()
        },
        health_check: Some(health_check()),
        outlier_detection: Some(outlier_detection()),
        load_assignment: engines(),
        eds: None,
        connection: Default::default(),
        protocol: UpstreamProtocol::Http2,
        socket_matches: Vec::new(),
        tls: None,
        circuit_breakers: CircuitBreakers {
            default: Thresholds {
                max_connections: 10,
                max_connections_per_host: Some(4),
                retries: RetryLimit::Budget {
                    percent: 12.5,
                    min_concurrency: 3,
                },
                ..Thresholds::default()
            },
            ..CircuitBreakers::default()
        },
    }
}

fn full_chain() -> FilterChain {
    FilterChain {
        tls: Some(full_tls()),
        connect_timeout: Duration::from_secs(7),
        ..FilterChain::http(full_manager())
    }
}
