//! What a client of gRPC is sent, which is configured without a proxy (gRFC A27, A28): a listener is an `ApiListener`, and
//! endpoints are somewhere and have a share of the load.

use crate::snapshot::{Resource, Snapshot};
use outrigger_xds::{
    load::written,
    subscription::Kind,
    wire::envoy::{
        config::{
            core::v3::{HttpProtocolOptions, Locality},
            endpoint::v3::ClusterLoadAssignment,
            listener::v3::{ApiListener, FilterChain, Listener, filter::ConfigType as Network},
        },
        extensions::filters::{
            http::{fault::v3::HttpFault, router::v3::Router},
            network::http_connection_manager::v3::{
                HttpConnectionManager, HttpFilter, http_filter::ConfigType,
            },
        },
    },
};
use prost::{Message, Name};
use prost_types::Any;
use std::sync::Arc;

/// Of what other clients are sent. Listeners without HTTP are left out, and secrets, which it has by other ways.
pub(crate) fn snapshot(others: &Snapshot) -> Snapshot {
    let mut snapshot = Snapshot::default();
    for kind in [Kind::Clusters, Kind::Routes] {
        snapshot.adopt(kind, others);
    }
    for resource in others.of(Kind::Listeners).values() {
        if let Some(made) = listener(resource) {
            snapshot.insert(Kind::Listeners, Arc::new(made));
        }
    }
    for resource in others.of(Kind::Endpoints).values() {
        let made = endpoints(resource).map_or_else(|| resource.clone(), Arc::new);
        snapshot.insert(Kind::Endpoints, made);
    }
    snapshot
}

fn listener(resource: &Resource) -> Option<Resource> {
    let wire = Listener::decode(&*resource.any.value).ok()?;
    let mut chains = wire.filter_chains.iter().chain(&wire.default_filter_chain);
    let manager = chains.find_map(manager)?;
    let wire = Listener {
        name: wire.name,
        api_listener: Some(ApiListener {
            api_listener: Some(pack(&told(manager))),
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
fn told(manager: HttpConnectionManager) -> HttpConnectionManager {
    let limit = manager
        .common_http_protocol_options
        .and_then(|options| options.max_stream_duration);
    let mut http_filters = manager.http_filters;
    http_filters.retain(is_understood);
    HttpConnectionManager {
        stat_prefix: manager.stat_prefix,
        route_specifier: manager.route_specifier,
        http_filters,
        common_http_protocol_options: limit.map(|limit| HttpProtocolOptions {
            max_stream_duration: Some(limit),
            ..HttpProtocolOptions::default()
        }),
        ..HttpConnectionManager::default()
    }
}

/// It passes over what is optional; another one that it does not know is a listener that it refuses.
fn is_understood(filter: &HttpFilter) -> bool {
    let Some(ConfigType::TypedConfig(any)) = &filter.config_type else {
        return false;
    };
    filter.is_optional || is::<Router>(any) || is::<HttpFault>(any)
}

/// None if they are as it wants them: it refuses endpoints of no locality, and passes over a locality of no weight.
fn endpoints(resource: &Resource) -> Option<Resource> {
    let mut wire = ClusterLoadAssignment::decode(&*resource.any.value).ok()?;
    let is_good =
        |locality: &Option<Locality>, weight: Option<u32>| locality.is_some() && weight.is_some();
    let mut groups = wire.endpoints.iter();
    if groups.all(|group| is_good(&group.locality, group.load_balancing_weight)) {
        return None;
    }
    for group in &mut wire.endpoints {
        group.locality.get_or_insert_default();
        group.load_balancing_weight.get_or_insert(1);
    }
    Some(changed(resource, &wire))
}

fn changed<M: Message + Name>(resource: &Resource, wire: &M) -> Resource {
    let any = pack(wire);
    Resource {
        name: resource.name.clone(),
        version: written::version(&any),
        any,
        endpoints: resource.endpoints.clone(),
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
    fn endpoints_are_somewhere_and_have_a_share() {
        let assignment = |group: &str| {
            format!(
                "{{'@type': {TYPE}.config.endpoint.v3.ClusterLoadAssignment, cluster_name: a, endpoints: [{{{group}}}]}}"
            )
        };
        let told = |group: &str| {
            let snapshot = made(&assignment(group));
            let any = &snapshot.of(Kind::Endpoints)["a"].any;
            let mut wire = ClusterLoadAssignment::decode(&*any.value).unwrap();
            let group = wire.endpoints.remove(0);
            (
                group.locality.map(|it| it.zone),
                group.load_balancing_weight,
            )
        };
        assert_eq!(told("lb_endpoints: []"), (Some(String::new()), Some(1)));
        assert_eq!(
            told("lb_endpoints: [], locality: {zone: b}, load_balancing_weight: 3"),
            (Some("b".into()), Some(3))
        );
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
