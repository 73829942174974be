//! Routes as an Envoy operator writes them: which request goes where, and how it looks when it gets there.

use http::{HeaderName, HeaderValue, Method};
use outrigger_conformance::harness::{
    Client, ProxyBuilder, Reply, TestProxy, Upstream, Version, request,
};
use outrigger_proxy::bootstrap::OUTBOUND;
use outrigger_xds::{
    load::{self, Syntax},
    resource::bootstrap::Bootstrap,
};

/// Whole listeners are read, so that the routes pass every check that a file passes.
fn read(table: &str, servers: &[&Upstream]) -> Result<Bootstrap, String> {
    let indent = |text: &str, by: usize| text.replace('\n', &format!("\n{}", " ".repeat(by)));
    let clusters: String = servers
        .iter()
        .enumerate()
        .map(|(index, server)| cluster(["a", "b", "c"][index], server.address.port()))
        .collect();
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
          stat_prefix: routes
          http_filters:
          - name: router
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
          route_config:
            {}
  clusters:
{clusters}"#,
        indent(table.trim(), 12),
    );
    load::bootstrap(&text, Syntax::Yaml).map_err(|errors| errors.to_string())
}

fn cluster(name: &str, port: u16) -> String {
    format!(
        "  - {{name: {name}, connect_timeout: 1s, type: STATIC, load_assignment: {{cluster_name: {name}, endpoints: [{{lb_endpoints: \
         [{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}}}}}]}}]}}}}\n"
    )
}

/// A proxy with these routes; clusters `a`, `b`, `c` are the servers.
fn routed(table: &str, servers: &[&Upstream]) -> TestProxy {
    let read = read(table, servers).unwrap_or_else(|errors| panic!("{errors}"));
    ProxyBuilder::new()
        .edit(move |bootstrap| {
            let http = &read.listeners[0].http;
            for listener in &mut bootstrap.listeners {
                if listener.name == OUTBOUND {
                    listener.http.route_config = http.route_config.clone();
                    listener.http.http_filters = http.http_filters.clone();
                }
            }
            bootstrap.clusters.extend(read.clusters.clone());
        })
        .start()
}

/// One virtual host for everything, with these routes.
fn table(routes: &str) -> String {
    let routes = routes.trim().replace('\n', "\n  ");
    format!("virtual_hosts:\n- name: all\n  domains: [\"*\"]\n  routes:\n  {routes}")
}

/// `GET path` with headers written `name: value`.
async fn get(client: &mut Client, path: &str, headers: &[&str]) -> Reply {
    let mut asked = request(Method::GET, path, "");
    for header in headers {
        let (name, value) = header.split_once(": ").unwrap();
        asked.headers_mut().insert(
            name.parse::<HeaderName>().unwrap(),
            value.parse::<HeaderValue>().unwrap(),
        );
    }
    client.send(asked).await
}

#[tokio::test]
async fn each_condition_of_a_route_decides() {
    let served =
        |name: &str| format!("direct_response: {{status: 200, body: {{inline_string: {name}}}}}");
    let conditions = [
        ("regex", r#"safe_regex: {regex: "/r/[0-9]+"}"#),
        (
            "exact",
            r#"prefix: /h, headers: [{name: x-a, string_match: {exact: One, ignore_case: true}}]"#,
        ),
        (
            "range",
            r#"prefix: /h, headers: [{name: x-n, range_match: {start: 1, end: 10}}]"#,
        ),
        (
            "old",
            r#"prefix: /h, headers: [{name: x-old, safe_regex_match: {regex: "a.c"}}]"#,
        ),
        (
            "missing",
            r#"prefix: /h, headers: [{name: x-none, string_match: {exact: x}, invert_match: true, treat_missing_header_as_empty: true}, {name: x-go, present_match: true}]"#,
        ),
        (
            "method",
            r#"prefix: /h, headers: [{name: ":method", string_match: {exact: POST}}]"#,
        ),
        (
            "query",
            r#"prefix: /q, query_parameters: [{name: a, string_match: {prefix: x}}, {name: b, present_match: true}]"#,
        ),
        (
            "absent",
            r#"prefix: /q, query_parameters: [{name: c, present_match: false}, {name: d, present_match: true}]"#,
        ),
        ("grpc", "prefix: /g, grpc: {}"),
        (
            "never",
            "prefix: /f, runtime_fraction: {default_value: {numerator: 0}}",
        ),
        (
            "always",
            "prefix: /f, runtime_fraction: {default_value: {numerator: 10000, denominator: TEN_THOUSAND}, runtime_key: k}",
        ),
    ];
    let routes: String = conditions
        .iter()
        .map(|(name, condition)| format!("- match: {{{condition}}}\n  {}\n", served(name)))
        .collect();
    let proxy = routed(&table(&routes), &[]);
    for version in Version::BOTH {
        let mut client = proxy.client(version).await;
        for (path, headers, expected) in [
            ("/r/12?x", &[][..], "regex"),
            ("/r/12x", &[], ""),
            ("/h", &["x-a: oNE"], "exact"),
            ("/h", &["x-a: oNEs"], ""),
            ("/h", &["x-n: 9"], "range"),
            ("/h", &["x-n: 10"], ""),
            ("/h", &["x-n: nine"], ""),
            ("/h", &["x-old: abc"], "old"),
            ("/h", &["x-old: abcd"], ""),
            ("/h", &["x-go: 1"], "missing"),
            ("/h", &["x-go: 1", "x-none: x"], ""),
            ("/q?a=xy&b", &[], "query"),
            ("/q?a=xy", &[], ""),
            ("/q?d", &[], "absent"),
            ("/q?d&c", &[], ""),
            ("/q?b=&a=yx", &[], ""),
            ("/g", &["content-type: application/grpc+proto"], "grpc"),
            ("/g", &["content-type: application/grpc-web"], ""),
            ("/f", &[], "always"),
        ] {
            let reply = get(&mut client, path, headers).await;
            let status = if expected.is_empty() { 404 } else { 200 };
            assert_eq!(
                (reply.status.as_u16(), reply.text().as_str()),
                (status, expected),
                "{version:?} {path} {headers:?}"
            );
        }
        assert_eq!(client.post("/h", "").await.text(), "method");
    }
}
