//! Configuration of filters beside their routes: what is most specific counts.

use http::Method;
use outrigger_conformance::harness::{OneChain, ProxyBuilder, Upstream, Version, request};
use outrigger_proxy::bootstrap::{FLEET, OUTBOUND};
use outrigger_xds::load::{self, Syntax};

/// A fault that answers with this status.
fn abort(status: u16) -> String {
    format!(
        r#"{{fault: {{"@type": type.googleapis.com/envoy.extensions.filters.http.fault.v3.HTTPFault, abort: {{http_status: {status}, percentage: {{numerator: 100}}}}}}}}"#
    )
}

/// Every level configures the filter.
fn resources() -> String {
    format!(
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
          stat_prefix: t
          http_filters:
          - name: fault
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.fault.v3.HTTPFault}}
          - name: router
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
          route_config:
            typed_per_filter_config: {table}
            virtual_hosts:
            - name: own
              domains: [own.example]
              typed_per_filter_config: {host}
              routes:
              - match: {{prefix: /off}}
                route: {{cluster: fleet}}
                typed_per_filter_config: {{fault: {{"@type": type.googleapis.com/envoy.config.route.v3.FilterConfig, disabled: true}}}}
              - match: {{prefix: /route}}
                route: {{cluster: fleet}}
                typed_per_filter_config: {route}
              - match: {{prefix: /weighted}}
                route: {{weighted_clusters: {{clusters: [{{name: fleet, weight: 1, typed_per_filter_config: {weighted}}}]}}}}
                typed_per_filter_config: {route}
              - {{match: {{prefix: /}}, route: {{cluster: fleet}}}}
            - name: all
              domains: ["*"]
              routes: [{{match: {{prefix: /}}, route: {{cluster: fleet}}}}]
  clusters:
  - {{name: fleet, load_assignment: {{cluster_name: fleet}}}}
"#,
        table = abort(410),
        host = abort(411),
        route = abort(412),
        weighted = abort(413),
    )
}

#[tokio::test]
async fn the_weighted_cluster_comes_before_the_route_the_virtual_host_and_the_table() {
    let mut read =
        load::bootstrap(&resources(), Syntax::Yaml).unwrap_or_else(|errors| panic!("{errors}"));
    assert_eq!(read.clusters[0].name, FLEET);
    let server = Upstream::named("a").await;
    let proxy = ProxyBuilder::new()
        .server(server.address)
        .edit(move |bootstrap| {
            for listener in &mut bootstrap.listeners {
                if listener.name == OUTBOUND {
                    let http = read.listeners[0].http().clone();
                    listener.http().http_filters = http.http_filters.clone();
                    listener.http().route_config = http.route_config.clone();
                }
            }
        })
        .start();
    let mut client = proxy.client(Version::H1).await;
    for (host, path, status) in [
        ("other.example", "/", 410),
        ("own.example", "/", 411),
        ("own.example", "/route", 412),
        ("own.example", "/weighted", 413),
        ("own.example", "/off", 200),
    ] {
        let mut asked = request(Method::GET, path, "");
        asked
            .headers_mut()
            .insert(http::header::HOST, host.parse().unwrap());
        let reply = client.send(asked).await;
        assert_eq!(reply.status, status, "{host}{path}");
    }
}
