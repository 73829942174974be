//! What a client of gRPC is sent, which is configured without a proxy (gRFC A27, A28): a listener is an `ApiListener`, and
//! endpoints are somewhere and have a share of the load.

use crate::snapshot::{ForGrpc, Resource, Snapshot};
use outrigger_xds::{
    load::written,
    subscription::Kind,
    wire::envoy::{
        config::{
            core::v3::HttpProtocolOptions,
            endpoint::v3::{ClusterLoadAssignment, LocalityLbEndpoints},
            listener::v3::{ApiListener, FilterChain, Listener, filter::ConfigType as Network},
            route::v3::{
                FilterConfig, RouteConfiguration, route::Action, route_action::ClusterSpecifier,
            },
        },
        extensions::filters::{
            http::{fault::v3::HttpFault, router::v3::Router},
            network::http_connection_manager::v3::{
                HttpConnectionManager, http_connection_manager::RouteSpecifier,
                http_filter::ConfigType,
            },
        },
    },
};
use prost::{Message, Name};
use prost_types::Any;
use std::{collections::BTreeMap, sync::Arc};

/// Of what other clients are sent. Listeners without HTTP are left out, and secrets, which it has by other ways.
pub(crate) fn snapshot(others: &Snapshot) -> Snapshot {
    let mut snapshot = Snapshot::default();
    snapshot.adopt(Kind::Clusters, others);
    for kind in [Kind::Listeners, Kind::Routes, Kind::Endpoints] {
        for resource in others.of(kind).values() {
            match resource.for_grpc(|| told(kind, resource)) {
                ForGrpc::AsItIs => snapshot.insert(kind, resource.clone()),
                ForGrpc::Other(other) => snapshot.insert(kind, other.clone()),
                ForGrpc::Nothing => {}
            }
        }
    }
    snapshot
}

fn told(kind: Kind, resource: &Resource) -> ForGrpc {
    let (changed, unchanged) = match kind {
        Kind::Listeners => (listener(resource), ForGrpc::Nothing),
        Kind::Routes => (routes(resource), ForGrpc::AsItIs),
        _ => (endpoints(resource), ForGrpc::AsItIs),
    };
    changed.map_or(unchanged, |other| ForGrpc::Other(Arc::new(other)))
}

fn listener(resource: &Resource) -> Option<Resource> {
    let wire = Listener::decode(&*resource.any.value).ok()?;
    let mut chains = wire.filter_chains.iter().chain(&wire.default_filter_chain);
    let manager = chains.find_map(manager)?;
    let wire = Listener {
        name: wire.name,
        api_listener: Some(ApiListener {
            api_listener: Some(pack(&managed(manager))),
        }),
        ..Listener::default()
    };
    Some(changed(resource, &wire))
}

fn manager(chain: &FilterChain) -> Option<HttpConnectionManager> {
    chain.filters.iter().find_map(|filter| {
        let Some(Network::TypedConfig(any)) = &filter.config_type else {
            return None;
        };
        is::<HttpConnectionManager>(any)
            .then(|| HttpConnectionManager::decode(&*any.value).ok())
            .flatten()
    })
}

/// Only what it reads: of the rest it refuses some, and has no use for any.
fn managed(manager: HttpConnectionManager) -> HttpConnectionManager {
    let limit = manager
        .common_http_protocol_options
        .and_then(|options| options.max_stream_duration);
    let mut http_filters = manager.http_filters;
    http_filters.retain(|filter| match &filter.config_type {
        Some(ConfigType::TypedConfig(any)) => filter.is_optional || is_understood(any),
        // It has no filters whose configuration comes from elsewhere.
        Some(ConfigType::ConfigDiscovery(_)) | None => false,
    });
    let mut route_specifier = manager.route_specifier;
    if let Some(RouteSpecifier::RouteConfig(table)) = &mut route_specifier {
        strip(table);
    }
    HttpConnectionManager {
        stat_prefix: manager.stat_prefix,
        route_specifier,
        http_filters,
        common_http_protocol_options: limit.map(|limit| HttpProtocolOptions {
            max_stream_duration: Some(limit),
            ..HttpProtocolOptions::default()
        }),
        ..HttpConnectionManager::default()
    }
}

/// It passes over what is optional; what else it does not know it refuses, with all around it.
fn is_understood(any: &Any) -> bool {
    is::<Router>(any)
        || is::<HttpFault>(any)
        || (is::<FilterConfig>(any)
            && FilterConfig::decode(&*any.value).is_ok_and(|within| {
                within.is_optional || within.config.as_ref().is_some_and(is_understood)
            }))
}

/// None if there is nothing in it that it does not know.
fn routes(resource: &Resource) -> Option<Resource> {
    let mut wire = RouteConfiguration::decode(&*resource.any.value).ok()?;
    strip(&mut wire).then(|| changed(resource, &wire))
}

/// Whether anything was said of filters that it does not know.
fn strip(table: &mut RouteConfiguration) -> bool {
    let mut any = keep_understood(&mut table.typed_per_filter_config);
    for host in &mut table.virtual_hosts {
        any |= keep_understood(&mut host.typed_per_filter_config);
        for route in &mut host.routes {
            any |= keep_understood(&mut route.typed_per_filter_config);
            let Some(Action::Route(action)) = &mut route.action else {
                continue;
            };
            if let Some(ClusterSpecifier::WeightedClusters(weighted)) =
                &mut action.cluster_specifier
            {
                for cluster in &mut weighted.clusters {
                    any |= keep_understood(&mut cluster.typed_per_filter_config);
                }
            }
        }
    }
    any
}

fn keep_understood(filters: &mut BTreeMap<String, Any>) -> bool {
    let before = filters.len();
    filters.retain(|_, config| is_understood(config));
    filters.len() < before
}

/// None if they are as it wants them: it refuses endpoints of no locality and a locality that comes twice, passes over one of no
/// weight, and shares by locality whatever the endpoints weigh.
fn endpoints(resource: &Resource) -> Option<Resource> {
    let wire = ClusterLoadAssignment::decode(&*resource.any.value).ok()?;
    let mut groups: Vec<LocalityLbEndpoints> = Vec::new();
    for mut group in wire.endpoints.iter().cloned() {
        let weights = group.lb_endpoints.iter();
        let weights = weights.map(|endpoint| endpoint.load_balancing_weight.unwrap_or(1));
        let sum = weights.fold(0, u32::saturating_add).max(1);
        group.locality.get_or_insert_default();
        let weight = *group.load_balancing_weight.get_or_insert(sum);
        let is_there = |known: &&mut LocalityLbEndpoints| {
            known.priority == group.priority && known.locality == group.locality
        };
        match groups.iter_mut().find(is_there) {
            None => groups.push(group),
            Some(known) => {
                known.lb_endpoints.append(&mut group.lb_endpoints);
                let together = known.load_balancing_weight.unwrap_or(0);
                known.load_balancing_weight = Some(together.saturating_add(weight));
            }
        }
    }
    let made = ClusterLoadAssignment {
        endpoints: groups,
        ..wire.clone()
    };
    (made != wire).then(|| changed(resource, &made))
}

fn changed<M: Message + Name>(resource: &Resource, wire: &M) -> Resource {
    let any = pack(wire);
    Resource {
        name: resource.name.clone(),
        version: written::version(&any),
        any,
        endpoints: resource.endpoints.clone(),
        ..Resource::default()
    }
}

fn pack<M: Message + Name>(message: &M) -> Any {
    Any {
        type_url: format!("type.googleapis.com/{}", M::full_name()),
        value: message.encode_to_vec(),
    }
}

fn is<M: Name>(any: &Any) -> bool {
    any.type_url.rsplit('/').next() == Some(&M::full_name())
}

#[cfg(test)]
mod tests {
    use super::*;
    use outrigger_xds::load::{Syntax, documents};

    const TYPE: &str = "type.googleapis.com/envoy";

    fn made(text: &str) -> Snapshot {
        let mut others = Snapshot::default();
        for value in documents(text, Syntax::Yaml).unwrap() {
            let written = written::resource(value, "").unwrap();
            others.insert(written.meaning.kind(), Arc::new(Resource::from(&written)));
        }
        snapshot(&others)
    }

    fn listener(filters: &str) -> String {
        let hcm = "extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";
        format!(
            "'@type': {TYPE}.config.listener.v3.Listener
name: echo
address: {{socket_address: {{address: 127.0.0.1, port_value: 1}}}}
filter_chains:
- filters:
  - name: hcm
    typed_config:
      '@type': {TYPE}.{hcm}
      stat_prefix: echo
      use_remote_address: true
      common_http_protocol_options: {{max_stream_duration: 7s, idle_timeout: 1s}}
      rds: {{route_config_name: table, config_source: {{ads: {{}}}}}}
      http_filters: [{filters}]
"
        )
    }

    fn filter(name: &str, kind: &str, rest: &str) -> String {
        format!(
            "{{name: {name}, typed_config: {{'@type': {TYPE}.extensions.filters.http.{kind}}}{rest}}}"
        )
    }

    #[test]
    fn a_listener_is_told_without_its_socket_and_with_the_filters_that_grpc_knows() {
        let cors = "cors.v3.Cors";
        let filters = [
            filter("cors", cors, ""),
            filter("optional", cors, ", is_optional: true"),
            filter("router", "router.v3.Router", ""),
        ];
        let snapshot = made(&listener(&filters.join(", ")));
        let told = &snapshot.of(Kind::Listeners)["echo"];
        let wire = Listener::decode(&*told.any.value).unwrap();
        assert_eq!((wire.address, wire.filter_chains.len()), (None, 0));
        let any = wire.api_listener.unwrap().api_listener.unwrap();
        assert!(is::<HttpConnectionManager>(&any));
        let manager = HttpConnectionManager::decode(&*any.value).unwrap();
        let names: Vec<&str> = manager.http_filters.iter().map(|it| &*it.name).collect();
        assert_eq!(names, ["optional", "router"]);
        assert!(manager.route_specifier.is_some() && manager.use_remote_address.is_none());
        let options = manager.common_http_protocol_options.unwrap();
        assert_eq!(
            (
                options.max_stream_duration.unwrap().seconds,
                options.idle_timeout
            ),
            (7, None)
        );
    }

    #[test]
    fn endpoints_are_somewhere_once_and_have_a_share() {
        let told = |groups: &str| {
            let snapshot = made(&format!(
                "{{'@type': {TYPE}.config.endpoint.v3.ClusterLoadAssignment, cluster_name: a, endpoints: [{groups}]}}"
            ));
            let any = &snapshot.of(Kind::Endpoints)["a"].any;
            let wire = ClusterLoadAssignment::decode(&*any.value).unwrap();
            let groups = wire.endpoints.into_iter();
            let told = groups.map(|group| {
                let zone = group.locality.unwrap().zone;
                (zone, group.load_balancing_weight, group.lb_endpoints.len())
            });
            told.collect::<Vec<_>>()
        };
        let some = |count: usize| {
            let one =
                "{endpoint: {address: {socket_address: {address: 127.0.0.1, port_value: 1}}}}";
            format!("lb_endpoints: [{}]", vec![one; count].join(", "))
        };
        let nowhere = String::new;
        assert_eq!(told("{lb_endpoints: []}"), [(nowhere(), Some(1), 0)]);
        // As Envoy, which has them in one pot.
        let two = format!("{{{}}}, {{{}}}", some(1), some(9));
        assert_eq!(told(&two), [(nowhere(), Some(10), 10)]);
        let apart = format!(
            "{{{}, locality: {{zone: b}}}}, {{{}, priority: 1}}",
            some(1),
            some(2)
        );
        assert_eq!(
            told(&apart),
            [("b".into(), Some(1), 1), (nowhere(), Some(2), 2)]
        );
        let good = format!(
            "{{{}, locality: {{zone: b}}, load_balancing_weight: 3}}",
            some(1)
        );
        assert_eq!(told(&good), [("b".into(), Some(3), 1)]);
    }

    #[test]
    fn routes_say_nothing_of_filters_that_it_does_not_know() {
        let cors =
            "{'@type': type.googleapis.com/envoy.extensions.filters.http.cors.v3.CorsPolicy}";
        let snapshot = made(&format!(
            "'@type': {TYPE}.config.route.v3.RouteConfiguration
name: table
virtual_hosts:
- name: all
  domains: ['*']
  typed_per_filter_config:
    cors: {cors}
    optional: {{'@type': {TYPE}.config.route.v3.FilterConfig, config: {cors}, is_optional: true}}
  routes: [{{match: {{prefix: /}}, route: {{cluster: a}}, typed_per_filter_config: {{cors: {cors}}}}}]
"
        ));
        let any = &snapshot.of(Kind::Routes)["table"].any;
        let wire = RouteConfiguration::decode(&*any.value).unwrap();
        let host = &wire.virtual_hosts[0];
        let names: Vec<&String> = host.typed_per_filter_config.keys().collect();
        assert_eq!(names, ["optional"]);
        assert!(host.routes[0].typed_per_filter_config.is_empty());
    }

    #[test]
    fn what_has_no_http_is_left_out() {
        let tcp = format!(
            "'@type': {TYPE}.config.listener.v3.Listener
name: tcp
address: {{socket_address: {{address: 127.0.0.1, port_value: 1}}}}
filter_chains: [{{filters: [{{name: tcp, typed_config: {{'@type': {TYPE}.extensions.filters.network.tcp_proxy.v3.TcpProxy, stat_prefix: t, cluster: a}}}}]}}]
"
        );
        assert!(made(&tcp).of(Kind::Listeners).is_empty());
    }
}
