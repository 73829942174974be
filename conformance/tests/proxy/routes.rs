//! Routes as an Envoy operator writes them: which request goes where, and how it looks when it gets there.

use http::{HeaderName, HeaderValue, Method};
use outrigger_conformance::harness::{
    Client, OneChain, ProxyBuilder, Reply, TestProxy, Upstream, Version, eventually, request,
};
use outrigger_proxy::bootstrap::OUTBOUND;
use outrigger_xds::{
    load::{self, Syntax},
    resource::{bootstrap::Bootstrap, cluster::UpstreamProtocol},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
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
    started(read(table, servers).unwrap_or_else(|errors| panic!("{errors}")))
}

fn started(mut read: Bootstrap) -> TestProxy {
    ProxyBuilder::new()
        .edit(move |bootstrap| {
            let http = read.listeners[0].http();
            for listener in &mut bootstrap.listeners {
                if listener.name == OUTBOUND {
                    listener.http().route_config = http.route_config.clone();
                    listener.http().http_filters = http.http_filters.clone();
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

/// Names of routes and what they match.
const CONDITIONS: &[(&str, &str)] = &[
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

#[tokio::test]
async fn each_condition_of_a_route_decides() {
    let served =
        |name: &str| format!("direct_response: {{status: 200, body: {{inline_string: {name}}}}}");
    let routes: String = CONDITIONS
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

/// All lines of a header.
fn lines(reply: &Reply, name: &str) -> Vec<String> {
    let all = reply.headers.get_all(name).iter();
    all.map(|value| value.to_str().unwrap().to_owned())
        .collect()
}

/// All lines of a header of the last request.
fn sent(server: &Upstream, name: &str) -> Vec<String> {
    let last = server.exchanges().pop().unwrap();
    let of_name = last.headers.into_iter().filter(|(known, _)| known == name);
    of_name.map(|(_, value)| value).collect()
}

#[tokio::test]
async fn weights_share_the_requests_and_a_header_may_decide() {
    let (a, b) = (Upstream::named("a").await, Upstream::named("b").await);
    let proxy = routed(
        &table(
            r#"
- match: {prefix: /chance}
  route: {weighted_clusters: {clusters: [{name: a, weight: 1}, {name: b, weight: 3}]}}
- match: {prefix: /number}
  route: {weighted_clusters: {clusters: [{name: a, weight: 1}, {cluster_header: x-c, weight: 3}], header_name: x-number}}
- match: {prefix: /named}
  route: {cluster_header: x-c}
- match: {prefix: /missing}
  route: {cluster_header: x-c, cluster_not_found_response_code: NOT_FOUND}
"#,
        ),
        &[&a, &b],
    );
    for version in Version::BOTH {
        let mut client = proxy.client(version).await;
        let (before_a, before_b) = (a.exchanges().len(), b.exchanges().len());
        for _ in 0..80 {
            assert_eq!(get(&mut client, "/chance", &[]).await.status, 200);
        }
        let share = (
            a.exchanges().len() - before_a,
            b.exchanges().len() - before_b,
        );
        assert_eq!(share.0 + share.1, 80);
        assert!((5..40).contains(&share.0), "a quarter goes to a: {share:?}");
        for (path, headers, status, served) in [
            ("/number", &["x-number: 4", "x-c: b"][..], 200, "a"),
            ("/number", &["x-number: 7", "x-c: b"], 200, "b"),
            ("/number", &["x-number: 7", "x-c: nowhere"], 503, ""),
            ("/named", &["x-c: b"], 200, "b"),
            ("/named", &["x-c: a"], 200, "a"),
            ("/named", &["x-c: nowhere"], 503, ""),
            ("/named", &[], 503, ""),
            ("/missing", &["x-c: nowhere"], 404, ""),
        ] {
            let reply = get(&mut client, path, headers).await;
            assert_eq!(reply.status, status, "{path} {headers:?}");
            if served.is_empty() {
                assert_eq!(
                    (reply.text(), reply.header("x-outrigger-error")),
                    (String::new(), "NC")
                );
            } else {
                assert_eq!(reply.json()["served_by"], served, "{path} {headers:?}");
            }
        }
    }
    let last = proxy.log(176).await.pop().unwrap();
    assert_eq!(last["response_code_details"], "cluster_not_found");
}

const EDITED: &str = r#"
request_headers_to_add: [{header: {key: x-o, value: table}}, {header: {key: x-last, value: table}, append: false}]
response_headers_to_add: [{header: {key: x-o, value: table}}]
response_headers_to_remove: [x-secret]
virtual_hosts:
- name: all
  domains: ["*"]
  request_headers_to_add: [{header: {key: x-o, value: host}}, {header: {key: x-last, value: host}, append: false}]
  response_headers_to_add: [{header: {key: x-o, value: host}}]
  routes:
  - match: {prefix: /order}
    name: named
    route:
      weighted_clusters:
        clusters:
        - name: a
          weight: 1
          request_headers_to_add: [{header: {key: x-o, value: weight}}]
          response_headers_to_add: [{header: {key: x-o, value: weight}}]
    request_headers_to_add: [{header: {key: x-o, value: "route %ROUTE_NAME%"}}]
    response_headers_to_add: [{header: {key: x-o, value: "route %REQ(x-in)% %RESP(content-type)%"}}]
  - match: {prefix: /actions}
    route: {cluster: a}
    request_headers_to_add:
    - {header: {key: x-a, value: "%REQ(:path)%|%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%|%REQ(x-none)%|%%"}}
    - {header: {key: x-empty, value: "%REQ(x-none)%"}}
    - {header: {key: x-keep, value: "%REQ(x-none)%"}, keep_empty_value: true}
    - {header: {key: x-ow, value: new}, append_action: OVERWRITE_IF_EXISTS}
    - {header: {key: x-ow2, value: new}, append_action: OVERWRITE_IF_EXISTS}
    - {header: {key: x-set, value: new}, append_action: OVERWRITE_IF_EXISTS_OR_ADD}
    - {header: {key: x-abs, value: new}, append_action: ADD_IF_ABSENT}
    - {header: {key: x-app, value: "%REQ(x-gone)%new"}, append: true}
    request_headers_to_remove: [x-gone]
  - match: {prefix: /direct}
    direct_response: {status: 200, body: {inline_string: here}}
    response_headers_to_add: [{header: {key: x-o, value: route}}]
  - match: {prefix: /nowhere}
    route: {cluster_header: x-none}
"#;

#[tokio::test]
async fn headers_are_added_and_removed_in_envoys_order() {
    let a = Upstream::start(|mut conn, _| async move {
        conn.write("HTTP/1.1 200 OK\r\ncontent-type: t/t\r\nx-secret: 1\r\nx-o: up\r\ncontent-length: 0\r\n\r\n")
            .await
            .then_some(conn)
    })
    .await;
    let proxy = routed(EDITED, &[&a]);
    for version in Version::BOTH {
        let mut client = proxy.client(version).await;
        let reply = get(&mut client, "/order", &["x-in: given"]).await;
        assert_eq!(sent(&a, "x-o"), ["weight", "route named", "host", "table"]);
        assert_eq!(sent(&a, "x-last"), ["table"]);
        assert_eq!(
            lines(&reply, "x-o"),
            ["up", "weight", "route given t/t", "host", "table"]
        );
        assert_eq!(reply.header("x-secret"), "");
        let headers = [
            "x-gone: 1",
            "x-ow: old",
            "x-abs: old",
            "x-app: old",
            "x-set: old",
        ];
        get(&mut client, "/actions?q", &headers).await;
        for (name, expected) in [
            ("x-a", &["/actions?q|127.0.0.1||%"][..]),
            ("x-empty", &[]),
            ("x-keep", &[""]),
            ("x-ow", &["new"]),
            ("x-ow2", &[]),
            ("x-set", &["new"]),
            ("x-abs", &["old"]),
            ("x-app", &["old", "new"]),
            ("x-gone", &[]),
        ] {
            assert_eq!(sent(&a, name), expected, "{version:?} {name}");
        }
        let direct = get(&mut client, "/direct", &[]).await;
        assert_eq!(
            (direct.text(), lines(&direct, "x-o")),
            (
                "here".into(),
                vec!["route".into(), "host".into(), "table".into()]
            )
        );
        let local = get(&mut client, "/nowhere", &[]).await;
        assert_eq!(lines(&local, "x-o"), ["host", "table"], "local replies too");
    }
    let specific = format!(
        "most_specific_header_mutations_wins: true\n{}",
        EDITED.trim()
    );
    let proxy = routed(&specific, &[&a]);
    let mut client = proxy.client(Version::H1).await;
    let reply = get(&mut client, "/order", &[]).await;
    assert_eq!(sent(&a, "x-o"), ["table", "host", "route named", "weight"]);
    assert_eq!(sent(&a, "x-last"), ["host"]);
    assert_eq!(
        lines(&reply, "x-o"),
        ["up", "table", "host", "route  t/t", "weight"]
    );
}

#[tokio::test]
async fn a_header_value_that_is_no_format_is_refused_with_its_place() {
    for (value, says) in [
        ("%BOGUS%", "unknown operator %BOGUS%"),
        ("50%", "percent sign"),
    ] {
        let mut read = read(
            &table(&format!(
                "- match: {{prefix: /}}\n  direct_response: {{status: 200}}\n  response_headers_to_add: [{{header: {{key: x-a, value: \"{value}\"}}}}]"
            )),
            &[],
        )
        .unwrap();
        let proxy = ProxyBuilder::new().start();
        let mut pushed = proxy.bootstrap.clone();
        for listener in &mut pushed.listeners {
            listener.http().route_config = read.listeners[0].http().route_config.clone();
        }
        let error = proxy.proxy.apply(pushed).unwrap_err().join("\n");
        assert!(
            error.contains(says) && error.contains("routes[0]: response_headers_to_add: 'x-a'"),
            "{error}"
        );
    }
}

const REWRITES: &str = r#"
- match: {prefix: /prefix}
  route: {cluster: a, prefix_rewrite: /new, host_rewrite_literal: other.host, append_x_forwarded_host: true}
- match: {safe_regex: {regex: "/regex/.*"}}
  route: {cluster: a, regex_rewrite: {pattern: {regex: "/([a-z]+)([0-9])"}, substitution: "/\\2\\1$1"}}
- match: {safe_regex: {regex: "/whole/.*"}}
  route: {cluster: a, prefix_rewrite: /w}
- match: {prefix: /header}
  route: {cluster: a, host_rewrite_header: x-host}
- match: {prefix: /weight}
  route: {weighted_clusters: {clusters: [{name: a, weight: 1, host_rewrite_literal: weight.host}]}}
- match: {prefix: /auto}
  route: {cluster: a, auto_host_rewrite: true}
"#;

#[tokio::test]
async fn paths_and_hosts_are_rewritten_and_the_old_ones_told() {
    let a = Upstream::named("a").await;
    let proxy = routed(&table(REWRITES), &[&a]);
    for version in Version::BOTH {
        let mut client = proxy.client(version).await;
        let asked = proxy.outbound().to_string();
        for (path, headers, new, old_path, host, old_host, forwarded) in [
            (
                "/prefix/x?q",
                &["x-forwarded-host: was"][..],
                "/new/x?q",
                "/prefix/x?q",
                "other.host",
                asked.as_str(),
                format!("was,{asked}"),
            ),
            (
                "/regex/ab1/c2?d3",
                &[],
                "/regex/1ab$1/2c$1?d3",
                "/regex/ab1/c2?d3",
                &asked,
                "",
                String::new(),
            ),
            (
                "/whole/x?q",
                &[],
                "/w?q",
                "/whole/x?q",
                &asked,
                "",
                String::new(),
            ),
            (
                "/header",
                &["x-host: from.header"],
                "/header",
                "",
                "from.header",
                &asked,
                String::new(),
            ),
            (
                "/weight",
                &[],
                "/weight",
                "",
                "weight.host",
                "",
                String::new(),
            ),
            ("/auto", &[], "/auto", "", &asked, "", String::new()),
        ] {
            assert_eq!(get(&mut client, path, headers).await.status, 200);
            let got = a.exchanges().pop().unwrap();
            assert_eq!(
                (
                    got.path(),
                    got.header("x-envoy-original-path"),
                    got.header("host"),
                    got.header("x-envoy-original-host"),
                    got.header("x-forwarded-host")
                ),
                (new, old_path, host, old_host, forwarded.as_str()),
                "{version:?} {path}"
            );
        }
    }
}

#[tokio::test]
async fn redirects_point_where_envoys_do() {
    let redirects = [
        (
            "/both",
            r#"host_redirect: h.example, path_redirect: "/p?z=1""#,
        ),
        ("/https", "https_redirect: true, strip_query: true"),
        (
            "/port",
            "port_redirect: 81, prefix_rewrite: /new, response_code: PERMANENT_REDIRECT",
        ),
        (
            "/regex",
            r#"scheme_redirect: ftp, regex_rewrite: {pattern: {regex: "/regex/([a-z]+)"}, substitution: "/\\1/\\0"}"#,
        ),
        (
            "/all",
            "https_redirect: true, path_redirect: /fix, port_redirect: 443, response_code: FOUND",
        ),
    ];
    let routes: String = redirects
        .iter()
        .map(|(path, redirect)| {
            format!("- match: {{prefix: {path}}}\n  redirect: {{{redirect}}}\n")
        })
        .collect();
    let proxy = routed(&table(&routes), &[]);
    for version in Version::BOTH {
        let mut client = proxy.client(version).await;
        let asked = proxy.outbound().to_string();
        for (path, status, location) in [
            ("/both/a?q=1", 301, "http://h.example/p?z=1".to_owned()),
            ("/https/a?q=1", 301, format!("https://{asked}/https/a")),
            (
                "/port/a?q=1",
                308,
                "http://127.0.0.1:81/new/a?q=1".to_owned(),
            ),
            (
                "/regex/abc?q=1",
                301,
                format!("ftp://{asked}/abc//regex/abc?q=1"),
            ),
            ("/all?q=1", 302, "https://127.0.0.1:443/fix?q=1".to_owned()),
        ] {
            let reply = get(&mut client, path, &[]).await;
            assert_eq!(
                (reply.status.as_u16(), reply.header("location")),
                (status, location.as_str()),
                "{version:?}"
            );
            assert_eq!(
                (reply.text().as_str(), reply.header("content-type")),
                ("", "")
            );
        }
    }
    let last = proxy.log(10).await.pop().unwrap();
    assert_eq!(last["response_code_details"], "direct_response");
    assert!(proxy.metric("envoy_http_rq_redirect", "").await >= 10.0);
}

#[tokio::test]
async fn a_table_says_how_large_direct_responses_may_be_and_whether_ports_count() {
    let body = "x".repeat(5000);
    let direct = |more: &str| {
        format!(
            "{more}virtual_hosts:\n- name: all\n  domains: [a.example]\n  routes: [{{match: {{prefix: /}}, direct_response: {{status: 200, body: {{inline_string: {body}}}}}}}]"
        )
    };
    let refused = read(&direct(""), &[]).unwrap_err();
    assert!(
        refused.contains("has 5000 bytes, more than 4096"),
        "{refused}"
    );
    let proxy = routed(
        &direct("max_direct_response_body_size_bytes: 5000\nignore_port_in_host_matching: true\n"),
        &[],
    );
    let mut client = proxy.client(Version::H1).await;
    let reply = get(&mut client, "/", &["host: A.example:81"]).await;
    assert_eq!((reply.status.as_u16(), reply.body.len()), (200, 5000));
    assert_eq!(
        get(&mut client, "/", &["host: b.example:81"]).await.status,
        404
    );
}

#[tokio::test]
async fn an_endpoint_with_a_name_gives_its_name_to_the_host() {
    let a = Upstream::named("a").await;
    let route = "- match: {prefix: /}\n  route: {cluster: a, auto_host_rewrite: true, append_x_forwarded_host: true}";
    let mut read = read(&table(route), &[&a]).unwrap();
    read.clusters[0].load_assignment.endpoints[0].address.host = "localhost".into();
    let proxy = started(read);
    for version in Version::BOTH {
        let mut client = proxy.client(version).await;
        assert_eq!(get(&mut client, "/", &[]).await.status, 200);
        let asked = proxy.outbound().to_string();
        assert_eq!(sent(&a, "host"), ["localhost"]);
        assert_eq!(sent(&a, "x-envoy-original-host"), [asked.as_str()]);
        assert_eq!(sent(&a, "x-forwarded-host"), [asked.as_str()]);
    }
}

/// Answers as the request's `x-fail` says (status, then more header lines), and 200 without it.
async fn failing() -> Upstream {
    Upstream::start(|mut conn, got| async move {
        let (status, more) = match got.header("x-fail").split_once(' ') {
            Some((status, more)) => (
                status.to_owned(),
                format!("{}\r\n", more.replace('=', ": ")),
            ),
            None if got.count("x-fail") > 0 => (got.header("x-fail").to_owned(), String::new()),
            None => ("200".to_owned(), String::new()),
        };
        conn.write(format!(
            "HTTP/1.1 {status} X\r\n{more}content-length: 0\r\n\r\n"
        ))
        .await
        .then_some(conn)
    })
    .await
}

/// Names of routes and their retry policies.
const POLICIES: &[(&str, &str)] = &[
    (
        "codes",
        "retry_on: retriable-status-codes, retriable_status_codes: [418, 404]",
    ),
    (
        "headers",
        "retry_on: retriable-headers, retriable_headers: [{name: x-again, string_match: {exact: please}}]",
    ),
    ("grpc", r#"retry_on: "unavailable,internal""#),
    ("all5xx", "retry_on: 5xx"),
    (
        "request",
        "retry_on: 5xx, retriable_request_headers: [{name: x-safe}]",
    ),
    (
        "previous",
        "retry_on: 5xx, retry_host_predicate: [{name: envoy.retry_host_predicates.previous_hosts}], host_selection_retry_max_attempts: 5",
    ),
];

#[tokio::test]
async fn retries_follow_the_policys_conditions() {
    let a = failing().await;
    let routes: String = POLICIES
        .iter()
        .map(|(name, policy)| {
            let back_off = "num_retries: 2, retry_back_off: {base_interval: 0.001s}";
            format!("- match: {{path: /{name}}}\n  route: {{cluster: a, retry_policy: {{{policy}, {back_off}}}}}\n")
        })
        .collect();
    let counted =
        "include_request_attempt_count: true\n  include_attempt_count_in_response: true\n  routes:";
    let proxy = routed(&table(&routes).replacen("routes:", counted, 1), &[&a]);
    let mut logged = 0;
    for version in Version::BOTH {
        let mut client = proxy.client(version).await;
        for (path, headers, attempts) in [
            ("/codes", &["x-fail: 418"][..], 3),
            ("/codes", &["x-fail: 503"], 1),
            ("/headers", &["x-fail: 200 x-again=please"], 3),
            ("/headers", &["x-fail: 503 x-again=no"], 1),
            ("/grpc", &["x-fail: 200 grpc-status=14"], 3),
            ("/grpc", &["x-fail: 200 grpc-status=1"], 1),
            ("/all5xx", &["x-fail: 501"], 3),
            ("/all5xx", &["x-fail: 503 x-envoy-overloaded=true"], 1),
            ("/all5xx", &["x-fail: 503 x-envoy-ratelimited=true"], 1),
            ("/all5xx", &[], 1),
            ("/request", &["x-fail: 500"], 1),
            ("/request", &["x-fail: 500", "x-safe: 1"], 3),
            ("/previous", &["x-fail: 500"], 3),
        ] {
            let before = a.exchanges().len();
            let reply = get(&mut client, path, headers).await;
            let seen: Vec<String> = a.exchanges()[before..]
                .iter()
                .map(|got| got.header("x-envoy-attempt-count").to_owned())
                .collect();
            assert_eq!(
                seen,
                ["1", "2", "3"][..attempts],
                "{version:?} {path} {headers:?}"
            );
            assert_eq!(reply.header("x-envoy-attempt-count"), attempts.to_string());
            logged += 1;
            let log = proxy.log(logged).await.pop().unwrap();
            let flags = if attempts == 3 { "URX" } else { "-" };
            assert_eq!(
                log["response_flags"].as_str().unwrap_or("-"),
                flags,
                "{path} {headers:?}"
            );
        }
    }
}

#[tokio::test]
async fn upstreams_are_told_how_long_they_have() {
    let a = failing().await;
    let proxy = routed(
        &table(
            r#"
- match: {path: /default}
  route: {cluster: a}
- match: {path: /given}
  route: {cluster: a, timeout: 2.5s}
- match: {path: /off}
  route: {cluster: a, timeout: 0s}
- match: {path: /try}
  route: {cluster: a, timeout: 9s, retry_policy: {retry_on: 5xx, per_try_timeout: 3s}}
"#,
        ),
        &[&a],
    );
    let mut client = proxy.client(Version::H1).await;
    for (path, told) in [
        ("/default", &["15000"][..]),
        ("/given", &["2500"]),
        ("/off", &[]),
        ("/try", &["3000"]),
    ] {
        assert_eq!(get(&mut client, path, &[]).await.status, 200);
        assert_eq!(sent(&a, "x-envoy-expected-rq-timeout-ms"), told, "{path}");
    }
}

/// Answers with a head, and with the first half of a body, and then no more; `/nothing` gets nothing at all.
async fn stalling() -> Upstream {
    Upstream::start(|mut conn, got| async move {
        if !got.path().starts_with("/nothing") {
            conn.write("HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\nhalf")
                .await;
        }
        conn.gone().await;
        None
    })
    .await
}

#[tokio::test]
async fn grpc_has_the_time_that_its_client_asks_for_within_the_routes() {
    let a = stalling().await;
    let table =
        table("- match: {prefix: /}\n  route: {cluster: a, timeout: 0s, max_grpc_timeout: 0.3s}\n");
    let proxy = routed(&table, &[&a]);
    for (asked, least_ms) in [("100m", 100), ("1H", 300)] {
        let timeout = format!("grpc-timeout: {asked}");
        let headers = ["content-type: application/grpc", timeout.as_str()];
        let mut client = proxy.client(Version::H1).await;
        let began = std::time::Instant::now();
        let reply = get(&mut client, "/nothing", &headers).await;
        // As Envoy tells gRPC of a 504.
        assert_eq!(
            (reply.status.as_u16(), reply.header("grpc-status")),
            (200, "14")
        );
        let took = began.elapsed();
        assert!(took.as_millis() >= least_ms, "{asked}: {took:?}");
        let told = sent(&a, "x-envoy-expected-rq-timeout-ms");
        assert_eq!(told, [least_ms.to_string()], "{asked}");
    }
}

#[tokio::test]
async fn idle_and_whole_streams_have_their_limits() {
    let a = stalling().await;
    let proxy = routed(
        &table(
            r#"
- match: {safe_regex: {regex: "/[a-z]+/idle"}}
  route: {cluster: a, timeout: 0s, idle_timeout: 0.2s}
- match: {safe_regex: {regex: "/[a-z]+/max"}}
  route: {cluster: a, timeout: 0.01s, max_stream_duration: {max_stream_duration: 0.3s}}
"#,
        ),
        &[&a],
    );
    for (count, (path, text, flag, details)) in [
        (
            "/nothing/idle",
            "stream timeout",
            "SI",
            "stream_idle_timeout",
        ),
        (
            "/nothing/max",
            "downstream duration timeout",
            "DT",
            "max_duration_timeout",
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let mut client = proxy.client(Version::H1).await;
        let reply = get(&mut client, path, &[]).await;
        assert_eq!((reply.status.as_u16(), reply.text().as_str()), (504, text));
        let log = proxy.log(count + 1).await.pop().unwrap();
        assert_eq!(
            (&log["response_flags"], &log["response_code_details"]),
            (&flag.into(), &details.into())
        );
    }
    assert_eq!(
        sent(&a, "x-envoy-expected-rq-timeout-ms").len(),
        0,
        "timeout counts no more"
    );
    for (count, (path, flag)) in [("/half/idle", "SI"), ("/half/max", "DT")]
        .into_iter()
        .enumerate()
    {
        let mut client = proxy.client(Version::H1).await;
        let reply = get(&mut client, path, &[]).await;
        assert_eq!(
            (reply.status.as_u16(), reply.text().as_str(), reply.broken),
            (200, "half", true),
            "{path}"
        );
        let log = proxy.log(count + 3).await.pop().unwrap();
        assert!(
            log["response_flags"].as_str().unwrap().contains(flag),
            "{log}"
        );
    }
}

/// Reads HTTP/2 frames until the head of a request; gives its stream.
async fn head(socket: &mut TcpStream) -> Option<u8> {
    loop {
        let mut frame = [0; 9];
        socket.read_exact(&mut frame).await.ok()?;
        let length = usize::from(frame[1]) << 8 | usize::from(frame[2]);
        socket.read_exact(&mut vec![0; length]).await.ok()?;
        if frame[3] == 1 {
            return Some(frame[8]);
        }
    }
}

/// Refuses the first request of its life with `REFUSED_STREAM`, and answers the others.
async fn refusing(listener: TcpListener) {
    let mut first = true;
    while let Ok((mut socket, _)) = listener.accept().await {
        let mut preface = [0; 24];
        socket.read_exact(&mut preface).await.unwrap();
        socket
            .write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0])
            .await
            .unwrap();
        while let Some(stream) = head(&mut socket).await {
            let answer: &[u8] = if first {
                &[0, 0, 4, 3, 0, 0, 0, 0, stream, 0, 0, 0, 7]
            } else {
                &[0, 0, 1, 1, 5, 0, 0, 0, stream, 0x88]
            };
            first = false;
            socket.write_all(answer).await.unwrap();
        }
    }
}

#[tokio::test]
async fn a_refused_stream_is_tried_again_under_its_condition_only() {
    for (condition, status, attempts) in [("refused-stream", 200, 2), ("connect-failure", 503, 1)] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = tokio::spawn(refusing(listener));
        let routes = format!(
            "- match: {{prefix: /}}\n  route: {{cluster: h2, retry_policy: {{retry_on: {condition}}}}}"
        );
        let mut read = read(
            &table(&routes).replacen(
                "virtual_hosts",
                "validate_clusters: false\nvirtual_hosts",
                1,
            ),
            &[],
        )
        .unwrap();
        let mut cluster = self::read(
            &table(&routes.replace("h2", "a")),
            &[&Upstream::named("a").await],
        )
        .unwrap()
        .clusters
        .remove(0);
        cluster.name = "h2".into();
        cluster.protocol = UpstreamProtocol::Http2;
        cluster.load_assignment.endpoints[0].address.port = port;
        read.clusters = vec![cluster];
        let proxy = started(read);
        let mut client = proxy.client(Version::H1).await;
        let reply = get(&mut client, "/", &[]).await;
        assert_eq!(reply.status, status, "{condition}: {}", reply.text());
        assert_eq!(proxy.only_log().await["attempts"], attempts);
        server.abort();
    }
}

#[tokio::test]
async fn copies_go_to_another_cluster_and_nobody_waits_for_them() {
    let (a, b) = (Upstream::named("a").await, stalling().await);
    let proxy = routed(
        &table(
            r#"
- match: {path: /no}
  route: {cluster: a, request_mirror_policies: [{cluster: b, runtime_fraction: {default_value: {numerator: 0}}}]}
- match: {prefix: /}
  route: {cluster: a, request_mirror_policies: [{cluster: nowhere}, {cluster: b}]}
  request_headers_to_add: [{header: {key: x-added, value: here}}]
"#,
        ),
        &[&a, &b],
    );
    for (count, version) in Version::BOTH.into_iter().enumerate() {
        let mut client = proxy.client(version).await;
        assert_eq!(get(&mut client, "/no", &[]).await.status, 200);
        let reply = get(&mut client, "/nothing?q", &["host: some.host:81"]).await;
        assert_eq!(reply.json()["served_by"], "a", "{version:?}");
        let copy = eventually("the copy", || async { b.exchanges().get(count).cloned() }).await;
        assert_eq!(
            (copy.path(), copy.header("x-added")),
            ("/nothing?q", "here")
        );
        let asked = sent(&a, "host").remove(0);
        let (name, port) = asked.split_once(':').unwrap();
        assert_eq!(copy.header("host"), format!("{name}-shadow:{port}"));
    }
    let skipped = proxy
        .metric("outrigger_mirrors_skipped_total", "no_cluster")
        .await;
    assert!(skipped >= 2.0, "{skipped}");
}
