//! Bootstraps as users write them: what is understood, and what is refused with which words at which place.

use outrigger_xds::{
    load::{Syntax, bootstrap, bootstrap_from_value, bootstrap_to_json, config_dump},
    resource::{
        bootstrap::{Admin, Bootstrap, Node},
        cluster::{CircuitBreakers, Cluster, LbPolicy, UpstreamProtocol},
        endpoint::{Address, ClusterLoadAssignment, Duty, HealthStatus, LbEndpoint},
        listener::{
            AccessLog, AccessLogFormat, AccessLogSink, Codec, HttpConnectionManager, HttpFilter,
            Listener, TrafficDirection,
        },
        route::{
            Action, HeaderMatch, HeaderValueMatch, PathMatch, RetryPolicy, Route, RouteAction,
            RouteConfiguration, RouteMatch, TypedConfig, VirtualHost,
        },
    },
};
use serde_json::{Value, json};
use std::time::Duration;

const ROUTER: &str = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router";
const KV_ROUTING: &str = "type.googleapis.com/outrigger.filters.http.kv_routing.v1.Config";
const TYPED_STRUCT: &str = "type.googleapis.com/xds.type.v3.TypedStruct";
const MANAGER: &str = "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";

const FULL: &str = r#"
node: {id: proxy-a, cluster: fleet, metadata: {team: inference}}
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
    - filters:
      - name: hcm
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: ingress
          codec_type: 1
          stream_idle_timeout: 0s
          request_timeout: 0.25s
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
            virtual_hosts:
            - name: all
              domains: ["*"]
              retry_policy: {retry_on: "connect-failure, reset", num_retries: 3}
              routes:
              - name: health
                match: {path: /health}
                direct_response: {status: 200, body: {inline_string: fine}}
              - match:
                  prefix: /v1/
                  case_sensitive: false
                  headers: [{name: X-Team, string_match: {prefix: a}, invert_match: true}, {name: x-any}]
                route: {cluster: engines, timeout: 0s, idle_timeout: 1.5s, prefix_rewrite: /}
                typed_per_filter_config:
                  kv:
                    "@type": type.googleapis.com/udpa.type.v1.TypedStruct
                    type_url: type.googleapis.com/outrigger.filters.http.kv_routing.v1.Config
                    value: {debug_header: true}
  clusters:
  - name: engines
    connect_timeout: 0.5s
    type: STRICT_DNS
    lb_policy: LEAST_REQUEST
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {http2_protocol_options: {}}
    circuit_breakers:
      thresholds: [{max_connections: 10, retry_budget: {budget_percent: {value: 12.5}}}]
    load_assignment:
      cluster_name: engines
      endpoints:
      - lb_endpoints:
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

fn full_manager() -> HttpConnectionManager {
    let typed = |type_url: &str, value: Value| TypedConfig {
        type_url: type_url.into(),
        value,
    };
    let filter = |name: &str, config: TypedConfig, is_optional| HttpFilter {
        name: name.into(),
        config,
        is_optional,
        disabled: false,
    };
    let kv = json!({"block_tokens": 32, "overlap_weight": 1.5, "list": [1, null, true]});
    let format = json!({"status": "%RESPONSE_CODE%", "nested": {"ttft": "%TTFT%"}});
    HttpConnectionManager {
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
            sink: AccessLogSink::Stdout,
            format: AccessLogFormat::Json(serde_json::from_value(format).expect("an object")),
        }],
        use_remote_address: true,
        preserve_external_request_id: false,
        generate_request_id: false,
        stream_idle_timeout: Duration::ZERO,
        request_timeout: Duration::from_millis(250),
        idle_timeout: Duration::from_secs(10),
        drain_timeout: Duration::from_secs(5),
        max_request_headers_kb: 96,
        h2_max_concurrent_streams: 7,
    }
}

fn full_routes(debug: TypedConfig) -> RouteConfiguration {
    let health = Route {
        name: "health".into(),
        r#match: RouteMatch {
            path: PathMatch::Path("/health".into()),
            ..RouteMatch::default()
        },
        action: Action::DirectResponse {
            status: 200,
            body: "fine".into(),
        },
        typed_per_filter_config: [].into(),
    };
    let headers = vec![
        HeaderMatch {
            name: "x-team".into(),
            value: HeaderValueMatch::Prefix("a".into()),
            invert: true,
        },
        HeaderMatch {
            name: "x-any".into(),
            value: HeaderValueMatch::Present(true),
            invert: false,
        },
    ];
    let v1 = Route {
        name: String::new(),
        r#match: RouteMatch {
            path: PathMatch::Prefix("/v1/".into()),
            case_sensitive: false,
            headers,
        },
        action: Action::Route(RouteAction {
            cluster: "engines".into(),
            timeout: Some(Duration::ZERO),
            idle_timeout: Some(Duration::from_millis(1500)),
            retry_policy: None,
            prefix_rewrite: Some("/".into()),
        }),
        typed_per_filter_config: [("kv".to_owned(), debug)].into(),
    };
    let retry_policy = RetryPolicy {
        retry_on: vec!["connect-failure".into(), "reset".into()],
        num_retries: 3,
        per_try_timeout: Duration::ZERO,
    };
    let all = VirtualHost {
        name: "all".into(),
        domains: vec!["*".into()],
        routes: vec![health, v1],
        retry_policy: Some(retry_policy),
    };
    RouteConfiguration {
        name: "local".into(),
        virtual_hosts: vec![all],
    }
}

/// What `FULL` means.
fn full() -> Bootstrap {
    let file = AccessLogSink::File("/dev/null".into());
    let facts = json!({"duty": "engine", "role": "prefill"});
    let engines = ClusterLoadAssignment {
        cluster_name: "engines".into(),
        endpoints: vec![
            LbEndpoint {
                address: socket("localhost", 8000),
                health_status: HealthStatus::Healthy,
                load_balancing_weight: 3,
                metadata: [("outrigger".to_owned(), facts)].into(),
            },
            LbEndpoint {
                address: socket("10.0.0.2", 8000),
                health_status: HealthStatus::Draining,
                load_balancing_weight: 1,
                metadata: [].into(),
            },
        ],
    };
    Bootstrap {
        node: Node {
            id: "proxy-a".into(),
            cluster: "fleet".into(),
        },
        admin: Some(Admin {
            address: socket("127.0.0.1", 9901),
            access_log: vec![AccessLog {
                sink: file,
                format: AccessLogFormat::Text(None),
            }],
        }),
        listeners: vec![Listener {
            name: "outbound".into(),
            address: socket("::1", 8080),
            traffic_direction: TrafficDirection::Outbound,
            http: full_manager(),
            tcp_backlog_size: 512,
        }],
        clusters: vec![Cluster {
            name: "engines".into(),
            connect_timeout: Duration::from_millis(500),
            lb_policy: LbPolicy::LeastRequest,
            load_assignment: engines,
            protocol: UpstreamProtocol::Http2,
            circuit_breakers: CircuitBreakers {
                max_connections: 10,
                retry_budget_percent: 12.5,
                ..CircuitBreakers::default()
            },
        }],
    }
}

#[test]
fn a_full_bootstrap_means_what_it_says() {
    let read = bootstrap(FULL, Syntax::Yaml).unwrap_or_else(|errors| panic!("{errors}"));
    assert_eq!(read, full());
    assert_eq!(
        read.clusters[0].load_assignment.endpoints[0].duty(),
        Duty::Engine
    );
}

#[test]
fn what_is_shown_reads_back_equal() {
    for plain in [full(), Bootstrap::default()] {
        let shown = bootstrap_to_json(&plain);
        let text = serde_json::to_string(&shown).expect("JSON");
        assert_eq!(
            bootstrap(&text, Syntax::Json).unwrap_or_else(|errors| panic!("{errors}")),
            plain,
            "{text}"
        );
        // YAML is a superset of what we show.
        assert_eq!(
            bootstrap(&text, Syntax::Yaml).unwrap_or_else(|errors| panic!("{errors}")),
            plain,
            "{text}"
        );
    }
}

#[test]
fn stderr_and_text_formats_read_back_equal() {
    let mut plain = full();
    let text = AccessLogFormat::Text(Some("%REQ(:PATH)%\n".into()));
    plain.listeners[0].http.access_log = vec![
        AccessLog {
            sink: AccessLogSink::Stderr,
            format: text.clone(),
        },
        AccessLog {
            sink: AccessLogSink::File("/tmp/log".into()),
            format: text,
        },
        AccessLog {
            sink: AccessLogSink::Stdout,
            format: AccessLogFormat::Text(None),
        },
    ];
    assert_eq!(
        bootstrap_from_value(bootstrap_to_json(&plain)).unwrap_or_else(|errors| panic!("{errors}")),
        plain
    );
}

#[test]
fn a_dump_has_envoys_shape() {
    let dump = config_dump(&full(), "v1", "2026-01-02T03:04:05Z");
    let kinds: Vec<&str> = dump["configs"]
        .as_array()
        .expect("a list")
        .iter()
        .filter_map(|c| c["@type"].as_str())
        .collect();
    let prefix = "type.googleapis.com/envoy.admin.v3.";
    let want = [
        "BootstrapConfigDump",
        "ClustersConfigDump",
        "ListenersConfigDump",
        "RoutesConfigDump",
    ];
    assert_eq!(kinds, want.map(|kind| format!("{prefix}{kind}")));
    let cluster = &dump["configs"][1]["static_clusters"][0];
    assert_eq!(cluster["last_updated"], "2026-01-02T03:04:05Z");
    assert_eq!(
        cluster["cluster"]["@type"],
        "type.googleapis.com/envoy.config.cluster.v3.Cluster"
    );
    assert_eq!(cluster["cluster"]["connect_timeout"], "0.500s");
    let manager = &dump["configs"][2]["static_listeners"][0]["listener"]["filter_chains"][0]["filters"]
        [0]["typed_config"];
    assert_eq!(manager["@type"], MANAGER);
    assert_eq!(
        manager["http_filters"][0]["typed_config"]["@type"],
        TYPED_STRUCT
    );
    assert_eq!(
        manager["http_filters"][0]["typed_config"]["value"]["block_tokens"],
        json!(32)
    );
    assert_eq!(
        dump["configs"][3]["static_route_configs"][0]["route_config"]["name"],
        "local"
    );
}

/// `FULL` as JSON with one place changed; `Value::Null` at the end of a pointer removes it.
fn changed(changes: &[(&str, Value)]) -> Value {
    let mut value = bootstrap_to_json(&full());
    for (pointer, new) in changes {
        let (parent, key) = pointer.rsplit_once('/').expect("a pointer");
        let parent = value
            .pointer_mut(parent)
            .unwrap_or_else(|| panic!("no {parent}"));
        match parent {
            Value::Object(fields) if new.is_null() => {
                assert!(fields.remove(key).is_some(), "{pointer} is there");
            }
            Value::Object(fields) => {
                fields.insert(key.to_owned(), new.clone());
            }
            Value::Array(list) if key == "-" => list.push(new.clone()),
            Value::Array(list) => list[key.parse::<usize>().expect("an index")] = new.clone(),
            other => panic!("{pointer} is in {other}"),
        }
    }
    value
}

fn problems(changes: &[(&str, Value)]) -> Vec<String> {
    let errors = bootstrap_from_value(changed(changes)).expect_err("refused");
    errors.problems().iter().map(ToString::to_string).collect()
}

const L: &str = "/static_resources/listeners/0";
const C: &str = "/static_resources/clusters/0";
const H: &str = "/static_resources/listeners/0/filter_chains/0/filters/0/typed_config";

#[test]
fn one_thing_wrong_is_one_problem_at_its_place() {
    let l = "static_resources.listeners[0]";
    let c = "static_resources.clusters[0]";
    let h = "static_resources.listeners[0].filter_chains[0].filters[0].typed_config";
    let v = "route_config.virtual_hosts[0]";
    let wildcard = json!({"name": "second", "domains": ["*"]});
    let router = json!({"name": "again", "typed_config": {"@type": ROUTER}});
    let rbac = "type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC";
    let table: Vec<(String, Value, String)> = vec![
        ("/bogus".into(), json!(1), "no such field: 'bogus'".into()),
        (
            "/dynamic_resources".into(),
            json!({}),
            "not supported yet: dynamic_resources".into(),
        ),
        (
            format!("{H}/route_config/bogus_field"),
            json!(1),
            format!("{h}.route_config: no such field: 'bogus_field'"),
        ),
        (
            format!("{H}/stat_prefix"),
            json!(""),
            format!("{h}.stat_prefix: must not be empty"),
        ),
        (
            format!("{H}/stat_prefix"),
            Value::Null,
            format!("{h}.stat_prefix: must not be empty"),
        ),
        (
            format!("{H}/stat_prefix"),
            json!(7),
            format!("{h}.stat_prefix: expected a string, got 7"),
        ),
        (
            format!("{H}/rds"),
            json!({}),
            format!("{h}: not supported yet: rds"),
        ),
        (
            format!("{H}/upgradeConfigs"),
            json!([]),
            format!("{h}: not supported yet: upgrade_configs"),
        ),
        (
            format!("{H}/codec_type"),
            json!("HTTP3"),
            format!("{h}.codec_type: not supported yet: HTTP3"),
        ),
        (
            format!("{H}/codec_type"),
            json!("HTTP9"),
            format!(
                "{h}.codec_type: unknown value \"HTTP9\"; it is one of AUTO, HTTP1, HTTP2, HTTP3"
            ),
        ),
        (
            format!("{H}/codec_type"),
            json!(9),
            format!("{h}.codec_type: unknown value 9; it is one of AUTO, HTTP1, HTTP2, HTTP3"),
        ),
        (
            format!("{H}/drain_timeout"),
            json!("5 seconds"),
            format!("{h}.drain_timeout: expected a duration such as \"0.25s\", got \"5 seconds\""),
        ),
        (
            format!("{H}/drain_timeout"),
            json!(5),
            format!("{h}.drain_timeout: expected a duration such as \"0.25s\", got 5"),
        ),
        (
            format!("{H}/drain_timeout"),
            json!("-5s"),
            format!("{h}.drain_timeout: must not be negative"),
        ),
        (
            format!("{H}/use_remote_address"),
            json!("yes"),
            format!("{h}.use_remote_address: expected true or false, got \"yes\""),
        ),
        (
            format!("{H}/max_request_headers_kb"),
            json!(-1),
            format!("{h}.max_request_headers_kb: must be between 0 and 4294967295, is -1"),
        ),
        (
            format!("{H}/max_request_headers_kb"),
            json!(9000),
            format!("{h}.max_request_headers_kb: must be between 1 and 8192, is 9000"),
        ),
        (
            format!("{H}/http_filters"),
            json!([]),
            format!("{h}.http_filters: required: at least the router"),
        ),
        (
            format!("{H}/http_filters/0"),
            router,
            format!(
                "{h}.http_filters[0]: terminal filter 'again' must be the last filter of the chain"
            ),
        ),
        (
            format!("{H}/http_filters/2/disabled"),
            json!(true),
            format!("{h}.http_filters[2]: the router cannot be disabled"),
        ),
        (
            format!("{H}/http_filters/0/typed_config"),
            json!({"@type": rbac}),
            format!("{h}.http_filters[0].typed_config: not supported yet: {rbac}"),
        ),
        (
            format!("{H}/http_filters/0/typed_config"),
            json!({"@type": TYPED_STRUCT, "type_url": rbac}),
            format!("{h}.http_filters[0].typed_config: not supported yet: {rbac}"),
        ),
        (
            format!("{H}/http_filters/0/typed_config"),
            json!({"value": {}}),
            format!(
                "{h}.http_filters[0].typed_config: '@type' is missing: it names the type of this configuration"
            ),
        ),
        (
            format!("{H}/http_filters/0/typed_config/value/n"),
            json!(u64::MAX),
            format!(
                "{h}.http_filters[0].typed_config.value.n: 18446744073709551615 is too large to be carried exactly"
            ),
        ),
        (
            format!("{H}/http_filters/0/typed_config/type_url"),
            Value::Null,
            format!("{h}.http_filters[0].typed_config.type_url: must not be empty"),
        ),
        (
            format!("{H}/http_filters/2/typed_config/start_child_span"),
            json!(true),
            format!("{h}.http_filters[2].typed_config: not supported yet: start_child_span"),
        ),
        (
            format!("{H}/access_log/0/typed_config"),
            json!({"@type": ROUTER}),
            format!("{h}.access_log[0].typed_config: not supported yet: {ROUTER} as an access log"),
        ),
        (
            format!("{H}/route_config/virtual_hosts/-"),
            wildcard,
            format!(
                "{h}.route_config.virtual_hosts[1].domains[0]: Only a single wildcard domain is permitted"
            ),
        ),
        (
            format!("{H}/route_config/virtual_hosts/0/domains"),
            json!([]),
            format!("{h}.{v}.domains: must have at least one"),
        ),
        (
            format!("{H}/route_config/virtual_hosts/0/domains"),
            json!(["a.b", "A.b"]),
            format!(
                "{h}.{v}.domains[1]: Only unique values for domains are permitted; duplicate of 'A.b'"
            ),
        ),
        (
            format!("{H}/route_config/virtual_hosts/0/domains"),
            json!(["a.*.b"]),
            format!("{h}.{v}.domains[0]: 'a.*.b' is not a domain: a name, *.suffix, prefix.* or *"),
        ),
        (
            format!("{H}/route_config/virtual_hosts/0/routes/1/route/cluster"),
            json!("nowhere"),
            format!("{h}.{v}.routes[1].route.cluster: unknown cluster 'nowhere'"),
        ),
        (
            format!("{H}/route_config/virtual_hosts/0/routes/1/redirect"),
            json!({}),
            format!("{h}.{v}.routes[1]: not supported yet: redirect"),
        ),
        (
            format!("{H}/route_config/virtual_hosts/0/routes/1/direct_response"),
            json!({"status": 200}),
            format!("{h}.{v}.routes[1]: only one of 'direct_response' and 'route' may be set"),
        ),
        (
            format!("{H}/route_config/virtual_hosts/0/routes/0/direct_response/status"),
            json!(99),
            format!("{h}.{v}.routes[0].direct_response.status: must be between 200 and 599, is 99"),
        ),
        (
            format!("{H}/route_config/virtual_hosts/0/routes/0/direct_response/body/inline_string"),
            json!("x".repeat(4097)),
            format!(
                "{h}.{v}.routes[0].direct_response.body.inline_string: has 4097 bytes, more than 4096"
            ),
        ),
        (
            format!("{H}/route_config/virtual_hosts/0/routes/0/match"),
            json!({}),
            format!("{h}.{v}.routes[0].match: required: prefix, path or path_separated_prefix"),
        ),
        (
            format!("{H}/route_config/virtual_hosts/0/routes/0/match"),
            json!({"path_separated_prefix": "/a/"}),
            format!(
                "{h}.{v}.routes[0].match.path_separated_prefix: '/a/' must begin with '/', not end with it, and hold no '?' or '#'"
            ),
        ),
        (
            format!("{H}/route_config/virtual_hosts/0/routes/1/match/headers/0/string_match"),
            json!({"ignore_case": true, "exact": "a"}),
            format!(
                "{h}.{v}.routes[1].match.headers[0].string_match: not supported yet: ignore_case"
            ),
        ),
        (
            format!("{H}/route_config/virtual_hosts/0/retry_policy/retry_on"),
            json!("5xx,sometimes"),
            format!("{h}.{v}.retry_policy.retry_on: unknown condition 'sometimes'"),
        ),
        (
            format!("{L}/address"),
            Value::Null,
            format!("{l}.address: required"),
        ),
        (
            format!("{L}/address/socket_address/port_value"),
            json!(70_000),
            format!("{l}.address.socket_address.port_value: must be at most 65535, is 70000"),
        ),
        (
            format!("{L}/address/pipe"),
            json!({"path": "/tmp/x"}),
            format!("{l}.address: not supported yet: pipe"),
        ),
        (
            format!("{L}/filter_chains"),
            json!([]),
            format!("{l}.filter_chains: required: one filter chain"),
        ),
        (
            format!("{L}/filter_chains/-"),
            json!({}),
            format!("{l}.filter_chains: not supported yet: 2 filter chains"),
        ),
        (
            format!("{L}/filter_chains/0/transport_socket"),
            json!({"name": "tls"}),
            format!("{l}.filter_chains[0]: not supported yet: transport_socket"),
        ),
        (
            format!("{L}/enable_reuse_port"),
            json!(false),
            format!(
                "{l}.enable_reuse_port: not supported yet: false (every worker binds its own socket)"
            ),
        ),
        (
            format!("{L}/name"),
            json!(""),
            format!("{l}.name: must not be empty"),
        ),
        (
            format!("{C}/type"),
            json!("EDS"),
            format!("{c}.type: not supported yet: EDS"),
        ),
        (
            format!("{C}/type"),
            json!("STATIC"),
            format!(
                "{c}.load_assignment: malformed IP address: localhost; a host name needs the cluster type STRICT_DNS"
            ),
        ),
        (
            format!("{C}/lb_policy"),
            json!("MAGLEV"),
            format!("{c}.lb_policy: not supported yet: MAGLEV"),
        ),
        (
            format!("{C}/connect_timeout"),
            json!("0s"),
            format!("{c}.connect_timeout: must be greater than 0"),
        ),
        (
            format!("{C}/health_checks"),
            json!([]),
            format!("{c}: not supported yet: health_checks"),
        ),
        (
            format!("{C}/transport_socket"),
            json!({}),
            format!("{c}: not supported yet: transport_socket"),
        ),
        (
            format!("{C}/load_assignment/endpoints/0/priority"),
            json!(1),
            format!("{c}.load_assignment.endpoints[0].priority: not supported yet: priority 1"),
        ),
        (
            format!(
                "{C}/load_assignment/endpoints/0/lb_endpoints/1/endpoint/address/socket_address/port_value"
            ),
            json!(0),
            format!(
                "{c}.load_assignment.endpoints[0].lb_endpoints[1].endpoint.address.socket_address.port_value: must not be 0"
            ),
        ),
        (
            format!("{C}/circuit_breakers/thresholds/0/priority"),
            json!("HIGH"),
            format!("{c}.circuit_breakers.thresholds[0].priority: not supported yet: HIGH"),
        ),
        (
            format!("{C}/circuit_breakers/thresholds/0/retry_budget/budget_percent/value"),
            json!(101),
            format!(
                "{c}.circuit_breakers.thresholds[0].retry_budget.budget_percent.value: must be between 0 and 100, is 101"
            ),
        ),
    ];
    for (pointer, value, want) in table {
        assert_eq!(
            problems(&[(&pointer, value.clone())]),
            [want],
            "{pointer} = {value}"
        );
    }
}

#[test]
fn a_type_nobody_knows_is_refused_unless_optional() {
    let unknown = json!({"@type": "type.googleapis.com/example.Nothing"});
    let found = problems(&[(&format!("{H}/http_filters/0/typed_config"), unknown.clone())]);
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].contains(
        "http_filters[0].typed_config: unknown type: 'type.googleapis.com/example.Nothing'"
    ));
    let optional = changed(&[
        (&format!("{H}/http_filters/0/typed_config"), unknown),
        (&format!("{H}/http_filters/0/is_optional"), json!(true)),
    ]);
    let read = bootstrap_from_value(optional).unwrap_or_else(|errors| panic!("{errors}"));
    assert_eq!(
        read.listeners[0].http.http_filters[0].config.type_url,
        "type.googleapis.com/example.Nothing"
    );
}

#[test]
fn all_problems_come_at_once() {
    let found = problems(&[
        ("/bogus", json!(1)),
        (&format!("{H}/stat_prefix"), json!(1)),
        (&format!("{H}/http_filters/2"), json!(5)),
        (&format!("{H}/route_config/virtual_hosts/0/name"), json!("")),
        (&format!("{C}/type"), json!("EDS")),
        (&format!("{C}/load_assignment/bogus"), json!("EDS")),
    ]);
    assert_eq!(found.len(), 6, "{found:#?}");
    for part in [
        "'bogus'",
        "stat_prefix: expected",
        "http_filters[2]: expected",
        "virtual_hosts[0].name",
        ".type: not",
        "load_assignment: no such",
    ] {
        assert!(
            found.iter().any(|problem| problem.contains(part)),
            "{part} in {found:#?}"
        );
    }
}

#[test]
fn duplicate_names_are_refused() {
    let both = bootstrap_to_json(&full());
    let listener = both["static_resources"]["listeners"][0].clone();
    let cluster = both["static_resources"]["clusters"][0].clone();
    let found = problems(&[
        ("/static_resources/listeners/-", listener),
        ("/static_resources/clusters/-", cluster),
    ]);
    let want = [
        "static_resources.listeners[1].name: duplicate name 'outbound'",
        "static_resources.clusters[1].name: duplicate name 'engines'",
    ];
    assert_eq!(found, want);
}

#[test]
fn a_typed_struct_stands_for_the_type_it_names() {
    let mut manager = bootstrap_to_json(&full())
        .pointer(H)
        .expect("the manager")
        .clone();
    manager.as_object_mut().expect("an object").remove("@type");
    manager["bogus"] = json!(1);
    let wrapped = json!({"@type": TYPED_STRUCT, "type_url": MANAGER, "value": manager});
    let found = problems(&[(H, wrapped.clone())]);
    let place = "static_resources.listeners[0].filter_chains[0].filters[0].typed_config.value";
    assert_eq!(found, [format!("{place}: no such field: 'bogus'")]);
    let mut good = wrapped;
    good["value"]
        .as_object_mut()
        .expect("an object")
        .remove("bogus");
    assert_eq!(
        bootstrap_from_value(changed(&[(H, good)])).unwrap_or_else(|errors| panic!("{errors}")),
        full()
    );
}

#[test]
fn both_key_styles_at_once_are_refused() {
    let found = problems(&[(&format!("{C}/connectTimeout"), json!("1s"))]);
    assert_eq!(
        found,
        ["static_resources.clusters[0].connect_timeout: written twice"]
    );
}

#[test]
fn text_that_cannot_be_read_says_where() {
    let wrong = |text: &str, syntax, part: &str| {
        let errors = bootstrap(text, syntax).expect_err("refused").to_string();
        assert!(errors.contains(part), "{part:?} in {errors:?}");
    };
    wrong("node: {id: a\nadmin: 1", Syntax::Yaml, "line 2");
    wrong(
        "node: {id: a}\nnode: {id: b}",
        Syntax::Yaml,
        "'node' is written twice",
    );
    wrong(
        r#"{"node": {"id": "a", "id": "b"}}"#,
        Syntax::Json,
        "'id' is written twice",
    );
    wrong("{", Syntax::Json, "line 1 column 1");
    wrong("- a", Syntax::Yaml, "expected an object, got a list");
    wrong("", Syntax::Yaml, "expected an object, got null");
}
