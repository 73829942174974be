//! A `Gateway` as listeners and their route table.

use super::{
    Resource, V3, ads,
    filters::{self, Wanted},
    rules::{Named, Rules, Whole},
    tls,
};
use crate::short::gateway::{Gateway, Route as RouteRule};
use outrigger_xds::resource::{
    access_log::{AccessLog, AccessLogFormat, AccessLogSink, default_json},
    config_source::Rds,
    endpoint::Address,
    filter_chain::FilterChain,
    listener::{HttpConnectionManager, HttpFilter, Listener, TrafficDirection},
    matching::{HeaderMatch, HeaderValueMatch, Pattern, StringMatch},
    route::{Route, RouteConfiguration, VirtualHost},
    server_header::ServerHeader,
    tls::DownstreamTls,
    upgrade::Upgrade,
};
use std::time::Duration;

/// Length of the accept queue, as a stand-alone proxy has it.
const BACKLOG: u32 = 16_384;

/// All of a gateway, for each node that has it.
pub(super) fn of_gateway(
    whole: &Whole<'_>,
    named: &Named<'_, Gateway>,
    resources: &mut Vec<Resource>,
) {
    let gateway = named.spec;
    let nodes = gateway.nodes.iter().map(|node| Some(node.clone()));
    let nodes: Vec<_> = if gateway.nodes.is_empty() {
        vec![None]
    } else {
        nodes.collect()
    };
    let made = made(whole, named);
    for node in nodes {
        resources.extend(made.iter().map(|v3| Resource {
            origin: named.origin.clone(),
            node: node.clone(),
            v3: v3.clone(),
        }));
    }
}

fn made(whole: &Whole<'_>, named: &Named<'_, Gateway>) -> Vec<V3> {
    let gateway = named.spec;
    let rules = gateway.routes.iter();
    let routes: Vec<_> = rules
        .flat_map(|rule| routes(whole, gateway, rule))
        .collect();
    let of_all = routes.iter().find(|route| route.is_for_all);
    let first = of_all.map(|route| route.wanted.clone()).unwrap_or_default();
    let chain = filters::chain(&first, routes.iter().map(|route| route.wanted.as_slice()));
    let hosts = gateway.routes.iter().map(|rule| {
        let own = routes.iter().filter(|made| made.fleet == rule.fleet);
        let own = own.map(|made| Route {
            typed_per_filter_config: filters::own(&first, &made.wanted),
            ..made.route.clone()
        });
        VirtualHost {
            name: rule.fleet.clone(),
            domains: rule.hosts.clone(),
            routes: own.collect(),
            ..VirtualHost::default()
        }
    });
    let table = V3::Routes(table(named.name(), hosts.collect()));
    let listeners = listener_names(named).into_iter().zip(&gateway.listeners);
    let listeners = listeners.map(|(name, rule)| {
        let manager = HttpConnectionManager {
            use_remote_address: true,
            access_log: access_log(&gateway.access_log),
            ..connection_manager(&name, named.name(), chain.clone())
        };
        let tls = rule.tls.as_ref().map(tls::downstream);
        let address = rule.address.0.clone();
        let direction = TrafficDirection::Outbound;
        V3::Listener(Box::new(listener(
            &name,
            address,
            direction,
            (manager, tls),
        )))
    });
    listeners.chain([table]).collect()
}

/// The gateway's own name, or one for each if there are several.
pub(super) fn listener_names(named: &Named<'_, Gateway>) -> Vec<String> {
    let name = |listener: &Option<String>| match listener {
        Some(listener) => format!("{}/{listener}", named.name()),
        None => named.name().to_owned(),
    };
    let listeners = named.spec.listeners.iter();
    listeners.map(|listener| name(&listener.name)).collect()
}

/// A route, less what it says of filters.
struct Made<'a> {
    fleet: &'a str,
    route: Route,
    wanted: Vec<Wanted>,
    /// Not of one tenant.
    is_for_all: bool,
}

/// Routes to a fleet: first those of tenants, since the first that matches wins.
fn routes<'a>(whole: &'a Whole<'_>, gateway: &Gateway, rule: &'a RouteRule) -> Vec<Made<'a>> {
    let name = rule.fleet.as_str();
    let Some(fleet) = whole.fleets.get(name) else {
        return Vec::new();
    };
    let made = |route, rules: &Rules<'_>, is_for_all| Made {
        fleet: name,
        route,
        wanted: filters::wanted(rules, fleet.spec, gateway),
        is_for_all,
    };
    let header = gateway.tenant_header.as_deref().unwrap_or_default();
    let mut all = Vec::new();
    for (policy, tenant, rules) in whole.tenants(name) {
        let mut route = filters::route(format!("{name}/{policy}"), name, &rules);
        route.r#match.headers = vec![is(header, tenant)];
        all.push(made(route, &rules, false));
    }
    let rules = whole.base(name);
    let route = filters::route(name.to_owned(), name, &rules);
    all.push(made(route, &rules, true));
    all
}

fn is(header: &str, value: &str) -> HeaderMatch {
    HeaderMatch {
        name: header.to_ascii_lowercase(),
        value: HeaderValueMatch::Text(StringMatch {
            pattern: Pattern::Exact(value.to_owned()),
            ignore_case: false,
        }),
        invert: false,
        missing_is_empty: false,
    }
}

/// A route table that comes by RDS.
pub(super) fn table(name: &str, virtual_hosts: Vec<VirtualHost>) -> RouteConfiguration {
    RouteConfiguration {
        name: name.to_owned(),
        virtual_hosts,
        validate_clusters: false,
        ..RouteConfiguration::default()
    }
}

/// What all listeners of ours have in common.
pub(super) fn connection_manager(
    stat_prefix: &str,
    table: &str,
    http_filters: Vec<HttpFilter>,
) -> HttpConnectionManager {
    let rds = Rds {
        source: ads(),
        name: table.to_owned(),
    };
    HttpConnectionManager {
        stat_prefix: stat_prefix.to_owned(),
        preserve_external_request_id: true,
        server_header: ServerHeader::AppendIfAbsent,
        http_filters,
        route_config: rds.not_yet(),
        rds: Some(rds),
        stream_idle_timeout: Duration::ZERO,
        upgrades: vec![Upgrade {
            name: "websocket".into(),
            enabled: true,
        }],
        ..HttpConnectionManager::default()
    }
}

/// A listener of one chain.
pub(super) fn listener(
    name: &str,
    address: Address,
    traffic_direction: TrafficDirection,
    (manager, tls): (HttpConnectionManager, Option<DownstreamTls>),
) -> Listener {
    let chain = FilterChain {
        tls,
        ..FilterChain::http(manager)
    };
    Listener {
        traffic_direction,
        tcp_backlog_size: BACKLOG,
        ..Listener::new(name, address, chain)
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
        format: AccessLogFormat::Json(default_json()),
    }]
}
