//! Which endpoint a request goes to by its hash, by what it names, and by how new an endpoint is.

use http::{HeaderName, Method};
use outrigger_conformance::harness::{
    OneChain, ProxyBuilder, TestProxy, Upstream, Version, eventually, hosts, request,
};
use outrigger_proxy::bootstrap::OUTBOUND;
use outrigger_xds::{
    load::{self, Syntax},
    resource::bootstrap::Bootstrap,
};
use std::collections::BTreeSet;

const LB: &str = "type.googleapis.com/envoy.extensions.load_balancing_policies";

/// A route with `action` to the cluster `c`, which has `fields` and these servers.
pub(crate) fn read(action: &str, fields: &str, servers: &[Upstream]) -> Result<Bootstrap, String> {
    let fields = format!("{}\n    {fields}", assignment(servers));
    read_all(action, &fields)
}

/// As `proxy`, with a load assignment of its own among the fields.
fn replaced(fields: &str) -> TestProxy {
    started(read_all("", fields).unwrap_or_else(|errors| panic!("{errors}")))
}

fn assignment(servers: &[Upstream]) -> String {
    let endpoints: String = servers
        .iter()
        .map(|server| {
            let port = server.address.port();
            format!("{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}}}}},")
        })
        .collect();
    format!("load_assignment: {{cluster_name: c, endpoints: [{{lb_endpoints: [{endpoints}]}}]}}")
}

fn read_all(action: &str, fields: &str) -> Result<Bootstrap, String> {
    let text = format!(
        r#"
static_resources:
  listeners:
  - name: outbound
    address: {{socket_address: {{address: 127.0.0.1, port_value: 0}}}}
    filter_chains:
    - filters:
      - name: hcm
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: balancing
          http_filters:
          - name: router
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
          route_config:
            virtual_hosts: [{{name: v, domains: ["*"], routes: [{{match: {{prefix: /}}, route: {{cluster: c{action}}}}}]}}]
  clusters:
  - name: c
    connect_timeout: 1s
    {fields}
"#
    );
    load::bootstrap(&text, Syntax::Yaml).map_err(|errors| errors.to_string())
}

pub(crate) fn proxy(action: &str, fields: &str, servers: &[Upstream]) -> TestProxy {
    started(read(action, fields, servers).unwrap_or_else(|errors| panic!("{errors}")))
}

fn started(mut read: Bootstrap) -> TestProxy {
    ProxyBuilder::new()
        .edit(move |bootstrap| {
            for listener in &mut bootstrap.listeners {
                if listener.name == OUTBOUND {
                    let http = read.listeners[0].http().clone();
                    listener.http().route_config = http.route_config.clone();
                    listener.http().http_filters = http.http_filters.clone();
                }
            }
            bootstrap.clusters.extend(read.clusters);
        })
        .start()
}

async fn servers() -> Vec<Upstream> {
    let mut servers = Vec::new();
    for name in ["a", "b", "c"] {
        servers.push(Upstream::named(name).await);
    }
    servers
}

/// Who serves a request with these headers, and the cookie the client is given.
async fn served(proxy: &TestProxy, path: &str, headers: &[(&str, &str)]) -> (String, String) {
    let mut asked = request(Method::GET, path, "");
    for (name, value) in headers {
        let name: HeaderName = name.parse().unwrap();
        asked.headers_mut().append(name, value.parse().unwrap());
    }
    let reply = proxy.client(Version::H1).await.send(asked).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    let name = reply.json()["served_by"].as_str().unwrap().to_owned();
    (name, reply.header("set-cookie").to_owned())
}

const BY_HEADER: &str = ", hash_policy: [{header: {header_name: x-user}}]";

#[tokio::test]
async fn requests_with_one_hash_stay_with_one_endpoint() {
    let servers = servers().await;
    for policy in ["lb_policy: RING_HASH", "lb_policy: MAGLEV"] {
        let proxy = proxy(BY_HEADER, policy, &servers);
        let mut used = BTreeSet::new();
        for user in 0..30 {
            let user = format!("user-{user}");
            let (first, _) = served(&proxy, "/", &[("x-user", &user)]).await;
            let (second, _) = served(&proxy, "/", &[("x-user", &user)]).await;
            assert_eq!(first, second, "{policy}");
            used.insert(first);
        }
        assert_eq!(used.len(), 3, "{policy}");
    }
}

#[tokio::test]
async fn an_endpoint_that_is_gone_moves_only_its_own_requests() {
    let mut servers = servers().await;
    let proxy = proxy(BY_HEADER, "lb_policy: RING_HASH", &servers);
    let mut before = Vec::new();
    for user in 0..20 {
        let user = format!("user-{user}");
        let (name, _) = served(&proxy, "/", &[("x-user", &user)]).await;
        before.push((user, name));
    }
    servers.pop();
    for (user, name) in before {
        let (now, _) = served(&proxy, "/", &[("x-user", &user)]).await;
        assert_ne!(now, "c");
        if name != "c" {
            assert_eq!(now, name, "{user}");
        }
    }
}

#[tokio::test]
async fn a_cookie_is_given_once_and_keeps_its_endpoint() {
    let servers = servers().await;
    let action = ", hash_policy: [{cookie: {name: sticky, ttl: 60s, path: /, attributes: [{name: SameSite, value: Lax}]}}]";
    let proxy = proxy(action, "lb_policy: RING_HASH", &servers);
    let (name, cookie) = served(&proxy, "/", &[]).await;
    assert!(cookie.starts_with("sticky=\""), "{cookie}");
    assert!(
        cookie.ends_with("; Max-Age=60; Path=/; SameSite=Lax; HttpOnly"),
        "{cookie}"
    );
    let pair = cookie.split(';').next().unwrap();
    for _ in 0..5 {
        let (again, given) = served(&proxy, "/", &[("cookie", pair)]).await;
        assert_eq!((again.as_str(), given.as_str()), (name.as_str(), ""));
    }
}

#[tokio::test]
async fn the_query_and_the_clients_address_are_hashed_too() {
    let servers = servers().await;
    let action = ", hash_policy: [{query_parameter: {name: k}, terminal: true}, {connection_properties: {source_ip: true}}]";
    let proxy = proxy(action, "lb_policy: MAGLEV", &servers);
    let (first, _) = served(&proxy, "/x?k=1", &[]).await;
    let (by_address, _) = served(&proxy, "/x", &[]).await;
    for _ in 0..5 {
        assert_eq!(served(&proxy, "/y?z=0&k=1", &[]).await.0, first);
        assert_eq!(served(&proxy, "/y", &[]).await.0, by_address, "one address");
    }
}

#[tokio::test]
async fn a_request_names_its_endpoint_or_the_fallback_decides() {
    let servers = servers().await;
    let fields = format!(
        r#"load_balancing_policy:
      policies:
      - typed_extension_config:
          name: unknown
          typed_config: {{"@type": type.googleapis.com/example.NobodyKnows, a: 1}}
      - typed_extension_config:
          name: override_host
          typed_config:
            "@type": {LB}.override_host.v3.OverrideHost
            override_host_sources: [{{header: x-gateway-destination-endpoint}}]
            fallback_policy:
              policies:
              - typed_extension_config:
                  name: least
                  typed_config: {{"@type": {LB}.least_request.v3.LeastRequest, selection_method: FULL_SCAN}}"#
    );
    let proxy = proxy("", &fields, &servers);
    let header = "x-gateway-destination-endpoint";
    let [a, b] = [0, 1].map(|at| servers[at].address.to_string());
    for _ in 0..5 {
        assert_eq!(served(&proxy, "/", &[(header, &b)]).await.0, "b");
        let list = format!("10.0.0.1:9, {a},{b}");
        assert_eq!(served(&proxy, "/", &[(header, &list)]).await.0, "a");
    }
    let mut used = BTreeSet::new();
    for _ in 0..60 {
        used.insert(served(&proxy, "/", &[(header, "10.0.0.1:9")]).await.0);
    }
    assert_eq!(used.len(), 3, "nobody is there who was named");
}

#[tokio::test]
async fn a_policy_that_nobody_knows_is_refused_by_name() {
    let servers = servers().await;
    let typed = |policy: &str| {
        format!(
            "load_balancing_policy: {{policies: [{{typed_extension_config: {{name: p, typed_config: {policy}}}}}]}}"
        )
    };
    for (policy, told) in [
        (
            r#"{"@type": type.googleapis.com/envoy.extensions.load_balancing_policies.subset.v3.Subset}"#.to_owned(),
            "not supported yet",
        ),
        (
            format!(r#"{{"@type": {LB}.ring_hash.v3.RingHash, minimum_ring_size: 9, maximum_ring_size: 8}}"#),
            "minimum_ring_size (9) > maximum_ring_size (8)",
        ),
        (
            format!(r#"{{"@type": {LB}.maglev.v3.Maglev, table_size: 65536}}"#),
            "must be a prime",
        ),
        (
            format!(r#"{{"@type": {LB}.ring_hash.v3.RingHash, hash_function: MURMUR_HASH_2}}"#),
            "not supported yet: MURMUR_HASH_2",
        ),
        (
            format!(r#"{{"@type": {LB}.round_robin.v3.RoundRobin, slow_start_config: {{aggression: {{default_value: 0, runtime_key: k}}}}}}"#),
            "slow_start_window: required",
        ),
    ] {
        let errors = read("", &typed(&policy), &servers).unwrap_err();
        assert!(errors.contains(told), "{policy}: {errors}");
    }
}

#[tokio::test]
async fn a_name_is_looked_up_and_its_addresses_are_the_endpoints() {
    let servers = servers().await;
    let port = servers[0].address.port();
    let fields = |family: &str, name: &str| {
        format!(
            "type: STRICT_DNS\n    dns_lookup_family: {family}\n    dns_refresh_rate: 0.05s\n    \
             load_assignment: {{cluster_name: c, endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: {name}, port_value: {port}}}}}}}}}]}}]}}"
        )
    };
    let text = fields("V4_ONLY", "localhost");
    let named = replaced(&text);
    let host = eventually("the name is looked up", || async {
        let hosts = hosts(named.admin(), "c").await;
        let host = hosts.into_iter().next()?;
        (host["address"]["socket_address"]["address"] == "127.0.0.1").then_some(host)
    })
    .await;
    assert_eq!(host["hostname"], "localhost");
    assert_eq!(served(&named, "/", &[]).await.0, "a");
    // No name of this domain exists (RFC 6761).
    let nobody = replaced(&fields("AUTO", "nobody.invalid"));
    eventually("the lookup fails", || async {
        let failures = nobody.metric("envoy_cluster_update_failure", "\"c\"").await;
        (failures > 0.0 && hosts(nobody.admin(), "c").await.is_empty()).then_some(())
    })
    .await;
    let reply = nobody
        .client(Version::H1)
        .await
        .send(request(Method::GET, "/", ""))
        .await;
    assert_eq!(
        (reply.status.as_u16(), reply.header("x-outrigger-error")),
        (503, "UH")
    );
}
