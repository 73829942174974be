//! The stand-alone configuration: flags become the same resources that a bootstrap file would hold.

use crate::{
    access_log,
    options::{self, Options, Policy, Switch},
};
use outrigger_filters::{kv_routing, openai, router};
use outrigger_xds::{
    resource::{
        ads::{Ads, GrpcService, Target},
        bootstrap::{Admin, Bootstrap, Node},
        canary::Canary,
        cluster::{Cluster, Discovery, Dns, LbPolicy, UpstreamProtocol},
        config_source::{ConfigSource, INITIAL_FETCH_TIMEOUT_DEFAULT, Origin},
        endpoint::{Address, ClusterLoadAssignment, HealthStatus, LbEndpoint, METADATA_NAMESPACE},
        filter_chain::FilterChain,
        header_mutation::HeaderMutations,
        health_check::{Checker, HealthCheck},
        listener::{
            AccessLog, AccessLogFormat, AccessLogSink, HttpConnectionManager, HttpFilter, Listener,
            TrafficDirection,
        },
        route::{
            Action, Route, RouteAction, RouteConfiguration, RouteMatch, TypedConfig, VirtualHost,
        },
        server_header::ServerHeader,
        tls::{
            CommonTls, DataSource, DownstreamTls, NameKind, NameMatch, NamePattern, TlsCertificate,
            UpstreamTls, Validation, WholeRegex,
        },
        tracing::{EXPORT_TIMEOUT_DEFAULT, OpenTelemetry, Tracing, Transport},
        upgrade::Upgrade,
    },
    subscription::Protocol,
};
use serde_json::{Value, json};
use std::{collections::BTreeMap, path::Path, time::Duration};

/// Listener that clients use.
pub const OUTBOUND: &str = "outbound";
/// Listener that peers use.
pub const INBOUND: &str = "inbound";
/// Cluster of all engines, near and far.
pub const FLEET: &str = "fleet";
/// Cluster of the engines beside us.
pub const LOCAL: &str = "local";
/// Cluster of the control plane, where it is spoken to by TLS.
pub const CONTROL_PLANE: &str = "control_plane";
/// Who the control plane is by its certificate, in whichever trust domain: any node has a certificate of the same CA.
const CONTROL_PLANE_ID: &str = "spiffe://[^/]+/control-plane";
/// Cluster of the collector that traces go to.
pub const COLLECTOR: &str = "otlp_collector";

/// Turns flags into resources.
///
/// # Errors
/// Everything that is wrong with the flags.
pub fn from_options(options: &Options) -> Result<Bootstrap, Vec<String>> {
    let mut errors = Vec::new();
    let mut keep =
        |result: Result<Address, String>| result.map_err(|error| errors.push(error)).ok();
    let outbound = keep(options::listen(&options.listen, "--listen"));
    let inbound = keep(options::listen(&options.inbound, "--inbound"));
    let admin = keep(options::listen(&options.admin, "--admin"));
    let peers: Vec<_> = options
        .peer
        .iter()
        .filter_map(|peer| keep(options::url(peer, "--peer")))
        .collect();
    let collector = options.otlp_endpoint.as_deref();
    let collector = collector.and_then(|url| keep(options::collector(url).map(|(at, _)| at)));
    let engines = options.engine.iter().map(|text| options::engine(text));
    let engines: Vec<_> = engines
        .filter_map(|engine| engine.map_err(|error| errors.push(error)).ok())
        .collect();
    let (Some(outbound), Some(inbound), Some(admin), true) =
        (outbound, inbound, admin, errors.is_empty())
    else {
        return Err(errors);
    };
    let node = options.node();
    let local: Vec<_> = engines
        .iter()
        .map(|engine| engine_endpoint(&node, engine))
        .collect();
    let fleet: Vec<_> = local
        .iter()
        .cloned()
        .chain(peers.iter().map(peer_endpoint))
        .collect();
    let ours = Bootstrap {
        node: Node {
            id: node,
            cluster: "outrigger".into(),
            ..Node::default()
        },
        admin: Some(Admin {
            pipe_mode: 0,
            address: admin,
            access_log: Vec::new(),
        }),
        clusters: collector.iter().map(collector_cluster).collect(),
        ..Bootstrap::default()
    };
    match &options.control_plane {
        Some(url) => driven(options, ours, url, (inbound, local)),
        None => Ok(alone(options, ours, (outbound, inbound), (fleet, local))),
    }
}

/// Engines beside us.
fn local_cluster(options: &Options, engines: Vec<LbEndpoint>) -> Cluster {
    Cluster {
        health_check: (options.canary == Switch::On).then(canary),
        ..cluster(LOCAL, options.policy, engines)
    }
}

/// With `--engine` and `--peer` there is all that is needed.
fn alone(
    options: &Options,
    ours: Bootstrap,
    (outbound, inbound): (Address, Address),
    (fleet, local): (Vec<LbEndpoint>, Vec<LbEndpoint>),
) -> Bootstrap {
    let fleet = Cluster {
        tls: peers_tls(options).map(|common| UpstreamTls {
            common,
            sni: String::new(),
        }),
        ..cluster(FLEET, options.policy, fleet)
    };
    let clusters = [fleet, local_cluster(options, local)].into_iter();
    Bootstrap {
        listeners: vec![
            outbound_listener(options, outbound),
            inbound_listener(options, inbound),
        ],
        clusters: clusters.chain(ours.clusters).collect(),
        ..ours
    }
}

/// `--control-plane`: what is beside us is ours to say, and all else comes.
fn driven(
    options: &Options,
    ours: Bootstrap,
    url: &str,
    (inbound, local): (Address, Vec<LbEndpoint>),
) -> Result<Bootstrap, Vec<String>> {
    let (server, secured) = options::control_plane(options, url).map_err(|error| vec![error])?;
    let cluster = secured.then(|| control_plane_cluster(options, &server));
    let cluster = cluster.transpose().map_err(|error| vec![error])?;
    let from_ads = Some(ConfigSource {
        origin: Origin::Ads,
        initial_fetch_timeout: INITIAL_FETCH_TIMEOUT_DEFAULT,
    });
    let target = if secured {
        Target::Cluster {
            name: CONTROL_PLANE.into(),
            authority: server.to_string(),
            message_bytes_max: None,
        }
    } else {
        Target::Address {
            uri: server.to_string(),
            address: server,
            stat_prefix: CONTROL_PLANE.into(),
        }
    };
    let service = GrpcService {
        target,
        initial_metadata: Vec::new(),
    };
    let load_stats = Some(Ads {
        protocol: Protocol::State,
        servers: vec![service.clone()],
        rate_limit: None,
    });
    let mut driven = Bootstrap {
        load_stats,
        lds: from_ads.clone(),
        cds: from_ads,
        ads: Some(Ads {
            protocol: Protocol::Delta,
            servers: vec![service],
            rate_limit: None,
        }),
        ..ours
    };
    driven.clusters.extend(cluster);
    // Without engines nobody has to be let in.
    if !local.is_empty() {
        driven.listeners.push(inbound_listener(options, inbound));
        driven.clusters.push(local_cluster(options, local));
    }
    Ok(driven)
}

/// `--control-plane https://…`: this node's identity is the one that peers see.
fn control_plane_cluster(options: &Options, address: &Address) -> Result<Cluster, String> {
    let id = WholeRegex::new(CONTROL_PLANE_ID)?;
    let tls = peers_tls(options).map(|mut common| {
        if let Some(validation) = &mut common.validation {
            validation.names.push(NameMatch {
                kind: NameKind::Uri,
                pattern: NamePattern::Regex(id.clone()),
            });
        }
        let is_name = address.host.parse::<std::net::IpAddr>().is_err();
        UpstreamTls {
            common,
            sni: if is_name {
                address.host.clone()
            } else {
                String::new()
            },
        }
    });
    Ok(Cluster {
        protocol: UpstreamProtocol::Http2,
        tls,
        ..server_cluster(CONTROL_PLANE, address)
    })
}

/// `--otlp-endpoint`.
fn collector_cluster(address: &Address) -> Cluster {
    server_cluster(COLLECTOR, address)
}

/// One server that is no engine: a name is looked up as long as we run.
fn server_cluster(name: &str, address: &Address) -> Cluster {
    let discovery = match address.host.parse::<std::net::IpAddr>() {
        Ok(_) => Discovery::Static,
        Err(_) => Discovery::Dns(Dns::default()),
    };
    let endpoint = LbEndpoint {
        metadata: BTreeMap::new(),
        ..endpoint(address, Value::Null)
    };
    Cluster {
        discovery,
        ..cluster(name, Policy::RoundRobin, vec![endpoint])
    }
}

/// `--otlp-endpoint`, `--otlp-sampling`.
fn tracing(options: &Options) -> Option<Tracing> {
    let url = options.otlp_endpoint.as_ref()?;
    let (_, has_path) = options::collector(url).ok()?;
    let transport = if has_path {
        Transport::Http { uri: url.clone() }
    } else {
        Transport::Grpc {
            authority: String::new(),
        }
    };
    Some(Tracing {
        provider: Some(OpenTelemetry {
            service_name: "outrigger".into(),
            cluster: COLLECTOR.into(),
            timeout: EXPORT_TIMEOUT_DEFAULT,
            headers: Vec::new(),
            transport,
        }),
        random_sampling: options.otlp_sampling,
        spawn_upstream_span: true,
        ..Tracing::default()
    })
}

fn alpn() -> Vec<String> {
    vec!["h2".into(), "http/1.1".into()]
}

fn file(path: &Path) -> DataSource {
    DataSource::File(path.to_string_lossy().into_owned())
}

fn common_tls(cert: &Path, key: &Path, ca: Option<&Path>) -> CommonTls {
    CommonTls {
        certificates: vec![TlsCertificate {
            chain: file(cert),
            key: file(key),
        }],
        validation: ca.map(|ca| Validation {
            trusted_ca: file(ca),
            names: Vec::new(),
        }),
        ..CommonTls::default()
    }
}

/// Towards clients: `--tls-cert`, `--tls-key`, `--tls-client-ca`.
fn clients_tls(options: &Options) -> Option<DownstreamTls> {
    let (cert, key) = options
        .tls_cert
        .as_deref()
        .zip(options.tls_key.as_deref())?;
    let ca = options.tls_client_ca.as_deref();
    Some(DownstreamTls {
        common: CommonTls {
            alpn: alpn(),
            ..common_tls(cert, key, ca)
        },
        require_client_certificate: ca.is_some(),
    })
}

/// Between proxies, both ways: `--peer-tls-cert`, `--peer-tls-key`, `--peer-tls-ca`.
fn peers_tls(options: &Options) -> Option<CommonTls> {
    let pair = options
        .peer_tls_cert
        .as_deref()
        .zip(options.peer_tls_key.as_deref());
    let (cert, key) = pair?;
    let ca = options.peer_tls_ca.as_deref()?;
    Some(common_tls(cert, key, Some(ca)))
}

fn engine_endpoint(node: &str, engine: &options::EngineOption) -> LbEndpoint {
    let id = format!("{node}/{}", engine.address);
    let mut ours = json!({"duty": "engine", "id": id, "role": engine.role.as_str()});
    if !engine.bootstrap.is_empty() {
        ours["bootstrap"] = engine.bootstrap.as_str().into();
    }
    if !engine.cohort.is_empty() {
        ours["cohort"] = engine.cohort.as_str().into();
    }
    endpoint(&engine.address, ours)
}

fn peer_endpoint(peer: &Address) -> LbEndpoint {
    endpoint(peer, json!({"duty": "peer"}))
}

fn endpoint(address: &Address, ours: Value) -> LbEndpoint {
    LbEndpoint {
        address: address.clone(),
        hostname: String::new(),
        health_status: HealthStatus::Healthy,
        load_balancing_weight: 1,
        locality: 0,
        metadata: BTreeMap::from([(METADATA_NAMESPACE.to_owned(), ours)]),
    }
}

fn cluster(name: &str, policy: Policy, endpoints: Vec<LbEndpoint>) -> Cluster {
    let lb_policy = match policy {
        // What the filter leaves unranked goes by load.
        Policy::Kv | Policy::LeastRequest => LbPolicy::LeastRequest,
        Policy::RoundRobin => LbPolicy::RoundRobin,
        Policy::Random => LbPolicy::Random,
    };
    Cluster {
        name: name.into(),
        lb_policy,
        load_assignment: ClusterLoadAssignment {
            cluster_name: name.into(),
            endpoints,
            ..ClusterLoadAssignment::default()
        },
        ..Cluster::default()
    }
}

/// What is asked of the engines beside us.
#[must_use]
pub fn canary() -> HealthCheck {
    let seconds = Duration::from_secs;
    HealthCheck {
        timeout: seconds(3),
        interval: seconds(5),
        unhealthy_threshold: 3,
        healthy_threshold: 2,
        unhealthy_interval: seconds(1),
        checker: Checker::Canary(Canary::default()),
        ..HealthCheck::default()
    }
}

fn outbound_listener(options: &Options, address: Address) -> Listener {
    let mut filters = vec![
        ours("engine_api", json!({"fleet_answers": true})),
        HttpFilter {
            name: "openai".into(),
            config: TypedConfig {
                type_url: openai::TYPE_URL.into(),
                value: json!({"body_bytes_max": options.body_bytes_max}),
            },
            discovery: None,
            is_optional: false,
            disabled: false,
        },
    ];
    filters.push(ours("stored_responses", json!({})));
    filters.push(ours("migration", json!({})));
    if options.policy == Policy::Kv {
        filters.push(HttpFilter {
            name: "kv_routing".into(),
            config: TypedConfig {
                type_url: kv_routing::TYPE_URL.into(),
                value: json!({"block_tokens": options.block_tokens, "decision_header": true}),
            },
            discovery: None,
            is_optional: false,
            disabled: false,
        });
    }
    filters.push(ours("disaggregation", json!({"decision_header": true})));
    filters.push(router_filter());
    let http = HttpConnectionManager {
        stat_prefix: OUTBOUND.into(),
        use_remote_address: true,
        preserve_external_request_id: true,
        server_header: ServerHeader::AppendIfAbsent,
        access_log: access_log(&options.access_log),
        http_filters: filters,
        route_config: everything_to(FLEET),
        tracing: tracing(options),
        stream_idle_timeout: Duration::ZERO,
        upgrades: vec![websocket()],
        ..HttpConnectionManager::default()
    };
    let tls = clients_tls(options);
    listener(OUTBOUND, address, TrafficDirection::Outbound, (http, tls))
}

fn inbound_listener(options: &Options, address: Address) -> Listener {
    let http = HttpConnectionManager {
        tracing: tracing(options),
        stat_prefix: INBOUND.into(),
        preserve_external_request_id: true,
        server_header: ServerHeader::AppendIfAbsent,
        http_filters: vec![
            ours("engine_api", json!({"fleet_answers": false})),
            router_filter(),
        ],
        route_config: everything_to(LOCAL),
        stream_idle_timeout: Duration::ZERO,
        upgrades: vec![websocket()],
        ..HttpConnectionManager::default()
    };
    let tls = peers_tls(options).map(|common| DownstreamTls {
        common: CommonTls {
            alpn: alpn(),
            ..common
        },
        require_client_certificate: true,
    });
    listener(INBOUND, address, TrafficDirection::Inbound, (http, tls))
}

fn listener(
    name: &str,
    address: Address,
    traffic_direction: TrafficDirection,
    (http, tls): (HttpConnectionManager, Option<DownstreamTls>),
) -> Listener {
    let chain = FilterChain {
        tls,
        ..FilterChain::http(http)
    };
    Listener {
        traffic_direction,
        tcp_backlog_size: 16_384,
        ..Listener::new(name, address, chain)
    }
}

fn websocket() -> Upgrade {
    Upgrade {
        name: "websocket".into(),
        enabled: true,
    }
}

fn ours(name: &str, value: Value) -> HttpFilter {
    let type_url = format!("type.googleapis.com/outrigger.filters.http.{name}.v1.Config");
    HttpFilter {
        name: name.into(),
        config: TypedConfig { type_url, value },
        discovery: None,
        is_optional: false,
        disabled: false,
    }
}

fn router_filter() -> HttpFilter {
    HttpFilter {
        name: "router".into(),
        config: TypedConfig {
            type_url: router::TYPE_URL.into(),
            value: json!({}),
        },
        discovery: None,
        is_optional: false,
        disabled: false,
    }
}

fn everything_to(cluster: &str) -> RouteConfiguration {
    let action = RouteAction {
        cluster: cluster.into(),
        timeout: Some(Duration::ZERO),
        ..RouteAction::default()
    };
    let route = Route {
        name: cluster.into(),
        r#match: RouteMatch {
            case_sensitive: true,
            ..RouteMatch::default()
        },
        action: Action::Route(action),
        typed_per_filter_config: BTreeMap::new(),
        headers: HeaderMutations::default(),
    };
    RouteConfiguration {
        name: cluster.into(),
        virtual_hosts: vec![VirtualHost {
            name: "all".into(),
            domains: vec!["*".into()],
            routes: vec![route],
            ..VirtualHost::default()
        }],
        ..RouteConfiguration::default()
    }
}

fn access_log(target: &str) -> Vec<AccessLog> {
    let sink = match target {
        "none" => return Vec::new(),
        "-" => AccessLogSink::Stdout,
        path => AccessLogSink::File(path.to_owned()),
    };
    vec![AccessLog {
        filter: None,
        sink,
        format: AccessLogFormat::Json(access_log::default_json()),
    }]
}
