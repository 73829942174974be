//! Envoy's HTTP filters, and ours beside them, as a client and an engine see them.

use http::{Method, Request};
use outrigger_conformance::harness::{
    AnyBody, Client, OneChain, ProxyBuilder, TestProxy, Upstream, Version, request,
};
use outrigger_proxy::bootstrap::{FLEET, OUTBOUND};
use outrigger_xds::{load, resource::bootstrap::Bootstrap};
use serde_json::{Value, json};

const ENVOY: &str = "type.googleapis.com/envoy.extensions.filters.http";

/// `fields` of Envoy's filter message `name`, as an `Any`.
fn envoy(name: &str, mut fields: Value) -> Value {
    fields["@type"] = json!(format!("{ENVOY}.{name}"));
    fields
}

/// A configuration that switches a filter off for a route.
fn off() -> Value {
    json!({"@type": "type.googleapis.com/envoy.config.route.v3.FilterConfig", "disabled": true})
}

/// A route to the server.
fn to_server(prefix: &str, own: Value) -> Value {
    let mut route =
        json!({"name": "a-route", "match": {"prefix": prefix}, "route": {"cluster": FLEET}});
    route["typed_per_filter_config"] = own;
    route
}

/// What a configuration of `filters` before the router, and `routes`, is read as.
fn read(filters: &[(&str, Value)], routes: &Value) -> Result<Bootstrap, String> {
    let mut list: Vec<Value> = filters
        .iter()
        .map(|(name, config)| json!({"name": name, "typed_config": config}))
        .collect();
    list.push(json!({"name": "router", "typed_config": envoy("router.v3.Router", json!({}))}));
    let manager = json!({
        "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "t", "http_filters": list,
        "route_config": {"virtual_hosts": [{"name": "v", "domains": ["*"], "routes": routes}]},
    });
    let socket = json!({"socket_address": {"address": "127.0.0.1", "port_value": 0}});
    let listener = json!({"name": "l", "address": socket, "filter_chains": [{"filters": [{"name": "h", "typed_config": manager}]}]});
    let cluster = json!({"name": FLEET, "load_assignment": {"cluster_name": FLEET}});
    load::bootstrap_from_value(
        json!({"static_resources": {"listeners": [listener], "clusters": [cluster]}}),
    )
    .map_err(|error| error.to_string())
}

/// A proxy before `server` with `filters` before its router.
fn proxy(server: &Upstream, filters: &[(&str, Value)], routes: &Value) -> TestProxy {
    let read = read(filters, routes).unwrap();
    ProxyBuilder::new()
        .server(server.address)
        .edit(move |bootstrap| with(bootstrap, read))
        .start()
}

/// Puts the filters and routes of `read` into the outbound listener.
fn with(bootstrap: &mut Bootstrap, mut read: Bootstrap) {
    let read = read.listeners[0].http().clone();
    for listener in &mut bootstrap.listeners {
        if listener.name == OUTBOUND {
            listener.http().http_filters.clone_from(&read.http_filters);
            listener.http().route_config.clone_from(&read.route_config);
        }
    }
}

fn get(path: &str, headers: &[(&'static str, &'static str)]) -> Request<AnyBody> {
    let mut get = request(Method::GET, path, "");
    for (name, value) in headers {
        get.headers_mut().insert(*name, value.parse().unwrap());
    }
    get
}

/// A server that answers with a header of its own.
async fn server() -> Upstream {
    Upstream::start(|mut conn, _| async move {
        let answer = "HTTP/1.1 200 OK\r\nx-engine: e\r\ncontent-length: 2\r\n\r\nok";
        conn.write(answer).await.then_some(conn)
    })
    .await
}

fn put(key: &str, value: &str, action: &str) -> Value {
    json!({"append": {"header": {"key": key, "value": value}, "append_action": action}})
}

fn mutations() -> Value {
    json!({"mutations": {
        "request_mutations": [
            {"remove": "x-secret"},
            put("x-a", "two", "APPEND_IF_EXISTS_OR_ADD"),
            put("x-b", "new", "OVERWRITE_IF_EXISTS_OR_ADD"),
            put("x-c", "never", "OVERWRITE_IF_EXISTS"),
            put("x-d", "kept out", "ADD_IF_ABSENT"),
            put("x-path", "%REQ(:METHOD)% %REQ(:PATH):5% %ROUTE_NAME%", "ADD_IF_ABSENT"),
            put("x-empty", "%REQ(x-none)%", "ADD_IF_ABSENT"),
        ],
        "response_mutations": [
            {"remove": "x-engine"},
            put("x-status", "%RESPONSE_CODE% %RESPONSE_CODE_DETAILS% %REQ(x-a)%", "ADD_IF_ABSENT"),
            put("x-level", "filter", "OVERWRITE_IF_EXISTS_OR_ADD"),
        ],
    }})
}

fn own_mutations() -> Value {
    envoy(
        "header_mutation.v3.HeaderMutationPerRoute",
        json!({"mutations": {"response_mutations": [put("x-level", "route", "OVERWRITE_IF_EXISTS_OR_ADD")]}}),
    )
}

#[tokio::test]
async fn header_mutation_changes_requests_and_responses_in_envoys_order() {
    for version in Version::BOTH {
        let server = server().await;
        let filters = [(
            "mutate",
            envoy("header_mutation.v3.HeaderMutation", mutations()),
        )];
        let direct = json!({"match": {"path": "/direct"}, "direct_response": {"status": 403, "body": {"inline_string": "no"}}});
        let routes = json!([
            direct,
            to_server("/own", json!({"mutate": own_mutations()})),
            to_server("/off", json!({"mutate": off()})),
            to_server("/a", json!({})),
        ]);
        let proxy = proxy(&server, &filters, &routes);
        let mut client = proxy.client(version).await;
        let sent = [
            ("x-secret", "s"),
            ("x-a", "one"),
            ("x-b", "old"),
            ("x-d", "mine"),
        ];
        let reply = client.send(get("/a/path", &sent)).await;
        let got = server.only();
        assert_eq!(
            (got.count("x-secret"), got.count("x-a")),
            (0, 2),
            "{version:?}"
        );
        assert_eq!(
            [got.header("x-b"), got.header("x-c"), got.header("x-d")],
            ["new", "", "mine"]
        );
        assert_eq!(got.header("x-path"), "GET /a/pa a-route");
        assert_eq!(got.count("x-empty"), 0);
        assert_eq!(reply.header("x-engine"), "");
        assert_eq!(reply.header("x-status"), "200 via_upstream one");
        assert_eq!(reply.header("x-level"), "filter");
        let reply = client.send(get("/own", &[])).await;
        assert_eq!(reply.header("x-level"), "route");
        let reply = client.send(get("/off", &sent)).await;
        assert_eq!(
            (reply.header("x-level"), reply.header("x-engine")),
            ("", "e")
        );
        let reply = client.send(get("/direct", &[])).await;
        assert_eq!(
            (reply.status.as_u16(), reply.header("x-status")),
            (403, "403 direct_response two")
        );
        let reply = client.send(get("/nowhere", &[])).await;
        assert_eq!(
            (reply.status.as_u16(), reply.header("x-status")),
            (404, "404 route_not_found two")
        );
    }
}

fn limit(mut more: Value) -> Value {
    let all = json!({"default_value": {"numerator": 100}});
    let base = json!({
        "stat_prefix": "lrl", "filter_enabled": all, "filter_enforced": all,
        // No token comes back within a test.
        "token_bucket": {"max_tokens": 2, "tokens_per_fill": 1, "fill_interval": "3600s"},
    });
    for (key, value) in base.as_object().unwrap() {
        let fields = more.as_object_mut().unwrap();
        fields.entry(key).or_insert(value.clone());
    }
    envoy("local_ratelimit.v3.LocalRateLimit", more)
}

/// Routes with a bucket of their own, one that refuses nobody, none, and two with the filter's.
fn limited_routes() -> Value {
    let own = limit(json!({
        "status": {"code": "ServiceUnavailable"},
        "token_bucket": {"max_tokens": 1, "fill_interval": "3600s"},
    }));
    let lenient = limit(json!({
        "filter_enforced": {"default_value": {"numerator": 0}, "runtime_key": "k"},
        "token_bucket": {"max_tokens": 1, "fill_interval": "3600s"},
        "request_headers_to_add_when_not_enforced": [{"header": {"key": "x-over", "value": "yes"}}],
    }));
    json!([
        to_server("/own", json!({"limit": own})),
        to_server("/lenient", json!({"limit": lenient})),
        to_server("/off", json!({"limit": off()})),
        to_server("/a", json!({})),
        to_server("/b", json!({})),
    ])
}

#[tokio::test]
async fn local_ratelimit_answers_429_once_its_bucket_is_empty() {
    for version in Version::BOTH {
        let server = server().await;
        let base = limit(json!({
            "enable_x_ratelimit_headers": "DRAFT_VERSION_03",
            "response_headers_to_add": [{"header": {"key": "x-limited", "value": "%REQ(:PATH)% %RESPONSE_CODE%"}}],
        }));
        let routes = limited_routes();
        let proxy = proxy(&server, &[("limit", base)], &routes);
        let mut client = proxy.client(version).await;
        // One bucket for both routes.
        let first = client.send(get("/a", &[])).await;
        assert_eq!(
            (first.status.as_u16(), first.header("x-limited")),
            (200, "")
        );
        let told = |reply: &outrigger_conformance::harness::Reply| {
            ["limit", "remaining"]
                .map(|name| reply.header(&format!("x-ratelimit-{name}")).to_owned())
        };
        assert_eq!(told(&first), ["2", "1"], "{version:?}");
        assert_eq!(
            first.header("x-ratelimit-reset"),
            "0",
            "one more passes at once"
        );
        assert_eq!(client.send(get("/b", &[])).await.status, 200);
        let over = client.send(get("/a", &[])).await;
        assert_eq!(
            (over.status.as_u16(), over.text().as_str()),
            (429, "local_rate_limited")
        );
        assert_eq!(told(&over), ["2", "0"]);
        let reset: u64 = over.header("x-ratelimit-reset").parse().unwrap();
        assert!((3500..=3600).contains(&reset), "{reset}");
        assert_eq!(over.header("x-limited"), "/a 429");
        assert_eq!(over.header("content-type"), "text/plain");
        // Nothing else was used up by it, and it counts where no route is, too.
        assert_eq!(client.send(get("/nowhere", &[])).await.status, 429);
        assert_eq!(client.send(get("/own", &[])).await.status, 200);
        assert_eq!(client.send(get("/own", &[])).await.status, 503);
        for _ in 0..2 {
            assert_eq!(client.send(get("/lenient", &[])).await.status, 200);
            assert_eq!(client.send(get("/off", &[])).await.status, 200);
        }
        let lenient: Vec<_> = server
            .exchanges()
            .into_iter()
            .filter(|got| got.path() == "/lenient")
            .collect();
        assert_eq!(
            [lenient[0].header("x-over"), lenient[1].header("x-over")],
            ["", "yes"]
        );
        let log = &proxy.log(3).await[2];
        assert_eq!(
            (&log["response_flags"], &log["response_code_details"]),
            (&json!("RL"), &json!("local_rate_limited"))
        );
        assert!(
            proxy
                .metric("envoy_http_local_rate_limit_rate_limited", "lrl")
                .await
                >= 3.0
        );
    }
}

#[tokio::test]
async fn local_ratelimit_tells_grpc_clients_in_their_way() {
    for version in Version::BOTH {
        let server = server().await;
        let one = json!({"max_tokens": 1, "fill_interval": "3600s"});
        let own = limit(json!({"token_bucket": one, "rate_limited_as_resource_exhausted": true}));
        let routes = json!([
            to_server("/exhausted", json!({"limit": own})),
            to_server("/", json!({})),
        ]);
        let base = limit(json!({"token_bucket": one}));
        let proxy = proxy(&server, &[("limit", base)], &routes);
        let mut client = proxy.client(version).await;
        for (path, told) in [("/a", "14"), ("/exhausted", "8")] {
            assert_eq!(client.send(get(path, &[])).await.status, 200);
            let mut grpc = get(path, &[("content-type", "application/grpc")]);
            *grpc.method_mut() = Method::POST;
            let reply = client.send(grpc).await;
            assert_eq!(
                (reply.status.as_u16(), reply.header("grpc-status")),
                (200, told)
            );
        }
    }
}

fn path_is(path: &str) -> Value {
    json!([{"name": ":path", "string_match": {"exact": path}}])
}

#[tokio::test]
async fn health_check_answers_without_an_upstream_until_told_to_fail() {
    for version in Version::BOTH {
        let server = server().await;
        let check = |path: &str, pass_through: bool| {
            let fields = json!({"pass_through_mode": pass_through, "headers": path_is(path)});
            envoy("health_check.v3.HealthCheck", fields)
        };
        let filters = [
            ("check", check("/healthz", false)),
            ("through", check("/engine", true)),
        ];
        // No route is for /healthz.
        let routes = json!([to_server("/a", json!({})), to_server("/engine", json!({}))]);
        let proxy = proxy(&server, &filters, &routes);
        let mut client = proxy.client(version).await;
        let reply = client.send(get("/healthz", &[])).await;
        assert_eq!((reply.status.as_u16(), reply.text().as_str()), (200, ""));
        assert!(
            reply
                .headers
                .contains_key("x-envoy-upstream-healthchecked-cluster")
        );
        assert_eq!(server.exchanges().len(), 0, "{version:?}");
        let reply = client.send(get("/engine", &[])).await;
        assert_eq!((reply.status.as_u16(), reply.text().as_str()), (200, "ok"));
        assert!(
            reply
                .headers
                .contains_key("x-envoy-upstream-healthchecked-cluster")
        );
        let mut admin = Client::connect(proxy.admin(), Version::H1).await;
        admin.post("/healthcheck/fail", "").await;
        // Connections are asked to end meanwhile, so each request has its own.
        let reply = proxy.client(version).await.send(get("/healthz", &[])).await;
        assert_eq!((reply.status.as_u16(), reply.text().as_str()), (503, ""));
        assert_eq!(
            proxy
                .client(version)
                .await
                .send(get("/engine", &[]))
                .await
                .status,
            503
        );
        let reply = proxy.client(version).await.send(get("/a", &[])).await;
        assert_eq!(
            (
                reply.status.as_u16(),
                reply.header("x-envoy-immediate-health-check-fail")
            ),
            (200, "true")
        );
        admin.post("/healthcheck/ok", "").await;
        assert_eq!(
            proxy
                .client(version)
                .await
                .send(get("/healthz", &[]))
                .await
                .status,
            200
        );
        let log = proxy.log(3).await;
        assert_eq!(log[0]["response_code_details"], "health_check_ok");
        assert_eq!(
            (&log[2]["response_code_details"], &log[2]["response_flags"]),
            (&json!("health_check_failed"), &json!("LH"))
        );
    }
}

fn policy(more: Value) -> Value {
    let mut fields = json!({
        "allow_origin_string_match": [{"exact": "https://a.test"}, {"suffix": ".b.test"}],
        "allow_methods": "GET, POST", "allow_headers": "authorization", "expose_headers": "x-engine",
        "max_age": "600", "allow_credentials": true,
    });
    if let Value::Object(more) = more {
        fields.as_object_mut().unwrap().extend(more);
    }
    envoy("cors.v3.CorsPolicy", fields)
}

fn preflight(path: &str, origin: &'static str) -> Request<AnyBody> {
    let mut ask = get(
        path,
        &[
            ("origin", origin),
            ("access-control-request-method", "POST"),
            ("access-control-request-private-network", "true"),
        ],
    );
    *ask.method_mut() = Method::OPTIONS;
    ask
}

fn shared_routes() -> Value {
    let all = json!({"allow_origin_string_match": [{"exact": "*"}], "allow_credentials": false, "allow_private_network_access": true});
    json!([
        to_server("/open", json!({"cors": policy(all)})),
        to_server(
            "/strict",
            json!({"cors": policy(json!({"forward_not_matching_preflights": false}))})
        ),
        to_server(
            "/never",
            json!({"cors": policy(json!({"filter_enabled": {"default_value": {"numerator": 0}}}))})
        ),
        to_server("/none", json!({})),
        json!({"match": {"prefix": "/gone"}, "direct_response": {"status": 410}, "typed_per_filter_config": {"cors": policy(json!({}))}}),
        to_server("/", json!({"cors": policy(json!({}))})),
    ])
}

#[tokio::test]
async fn cors_answers_preflights_of_origins_that_match() {
    for version in Version::BOTH {
        let server = server().await;
        let routes = shared_routes();
        let proxy = proxy(
            &server,
            &[("cors", envoy("cors.v3.Cors", json!({})))],
            &routes,
        );
        let mut client = proxy.client(version).await;
        let reply = client.send(preflight("/x", "https://a.test")).await;
        let allow = |name: &str| reply.header(&format!("access-control-{name}")).to_owned();
        assert_eq!(
            (reply.status.as_u16(), reply.text().as_str()),
            (200, ""),
            "{version:?}"
        );
        assert_eq!(
            [
                "allow-origin",
                "allow-methods",
                "allow-headers",
                "max-age",
                "allow-credentials",
                "expose-headers",
                "allow-private-network"
            ]
            .map(allow),
            [
                "https://a.test",
                "GET, POST",
                "authorization",
                "600",
                "true",
                "x-engine",
                ""
            ]
        );
        assert_eq!(server.exchanges().len(), 0);
        let reply = client.send(preflight("/open", "https://any.test")).await;
        assert_eq!(
            ["allow-origin", "allow-credentials", "allow-private-network"]
                .map(|name| reply.header(&format!("access-control-{name}")).to_owned()),
            ["https://any.test", "", "true"]
        );
        let reply = client.send(preflight("/strict", "https://evil.test")).await;
        assert_eq!(
            (
                reply.status.as_u16(),
                reply.header("access-control-allow-origin")
            ),
            (200, "")
        );
        assert_eq!(server.exchanges().len(), 0, "{version:?}: answered here");
        // Preflights that do not match, and those of routes without a policy, are the engine's.
        let before = server.exchanges().len();
        client.send(preflight("/x", "https://evil.test")).await;
        client.send(preflight("/none", "https://a.test")).await;
        assert_eq!(server.exchanges().len(), before + 2);
        assert_eq!(
            proxy.log(1).await[0]["response_code_details"],
            "cors_response"
        );
    }
}

#[tokio::test]
async fn cors_marks_responses_for_origins_that_match() {
    for version in Version::BOTH {
        let server = server().await;
        let filters = [("cors", envoy("cors.v3.Cors", json!({})))];
        let proxy = proxy(&server, &filters, &shared_routes());
        let mut client = proxy.client(version).await;
        for (path, origin, sees) in [
            ("/x", "https://x.b.test", true),
            ("/gone", "https://x.b.test", false),
            ("/x", "https://evil.test", false),
            ("/never", "https://a.test", false),
            ("/none", "https://a.test", false),
        ] {
            let reply = client.send(get(path, &[("origin", origin)])).await;
            let seen = reply.header("access-control-allow-origin");
            assert_eq!(
                seen,
                if sees { origin } else { "" },
                "{version:?} {path} {origin}"
            );
            assert_eq!(
                reply.header("access-control-expose-headers"),
                if sees { "x-engine" } else { "" }
            );
            assert_eq!(reply.header("access-control-allow-methods"), "");
        }
    }
}

fn percent(numerator: u32) -> Value {
    json!({"numerator": numerator})
}

fn fault(fields: Value) -> Value {
    envoy("fault.v3.HTTPFault", fields)
}

fn hurt_routes() -> Value {
    let own = |fields: Value| json!({"fault": fault(fields)});
    json!([
        to_server(
            "/grpc",
            own(json!({"abort": {"grpc_status": 5, "percentage": percent(100)}}))
        ),
        to_server(
            "/asked",
            own(json!({
                "abort": {"header_abort": {}, "percentage": percent(100)},
                "delay": {"header_delay": {}, "percentage": percent(100)},
            }))
        ),
        to_server(
            "/slow",
            own(json!({"delay": {"fixed_delay": "0.05s", "percentage": percent(100)}}))
        ),
        to_server(
            "/none",
            own(json!({"abort": {"http_status": 503}, "max_active_faults": 0}))
        ),
        to_server(
            "/full",
            own(
                json!({"abort": {"http_status": 503, "percentage": percent(100)}, "max_active_faults": 0})
            )
        ),
        to_server(
            "/other",
            own(
                json!({"abort": {"http_status": 503, "percentage": percent(100)}, "upstream_cluster": "other"})
            )
        ),
        to_server("/", json!({})),
    ])
}

#[tokio::test]
async fn fault_ends_and_delays_requests_on_purpose() {
    for version in Version::BOTH {
        let server = server().await;
        let base = fault(json!({
            "abort": {"http_status": 503, "percentage": percent(100)},
            "headers": [{"name": "x-hurt", "present_match": true}],
        }));
        let routes = hurt_routes();
        let proxy = proxy(&server, &[("fault", base)], &routes);
        let mut client = proxy.client(version).await;
        let reply = client.send(get("/a", &[("x-hurt", "1")])).await;
        assert_eq!(
            (reply.status.as_u16(), reply.text().as_str()),
            (503, "fault filter abort"),
            "{version:?}"
        );
        for path in ["/a", "/none", "/full", "/other", "/asked"] {
            assert_eq!(client.send(get(path, &[])).await.status, 200, "{path}");
        }
        let sent = server.exchanges().len();
        assert_eq!(client.send(get("/grpc", &[])).await.status, 200);
        let mut grpc = get("/grpc", &[("content-type", "application/grpc")]);
        *grpc.method_mut() = Method::POST;
        let reply = client.send(grpc).await;
        assert_eq!(
            (reply.status.as_u16(), reply.header("grpc-status")),
            (200, "5")
        );
        let both = [
            ("x-envoy-fault-abort-request", "418"),
            ("x-envoy-fault-delay-request", "40"),
        ];
        let started = std::time::Instant::now();
        assert_eq!(client.send(get("/asked", &both)).await.status, 418);
        assert!(started.elapsed().as_millis() >= 40);
        let never = [both[0], ("x-envoy-fault-abort-request-percentage", "0")];
        assert_eq!(client.send(get("/asked", &never)).await.status, 200);
        let started = std::time::Instant::now();
        assert_eq!(client.send(get("/slow", &[])).await.status, 200);
        assert!(started.elapsed().as_millis() >= 50);
        assert_eq!(server.exchanges().len(), sent + 2);
        let log = proxy.log(11).await;
        let seen = |index: usize| {
            (
                log[index]["response_flags"].clone(),
                log[index]["response_code_details"].clone(),
            )
        };
        assert_eq!(seen(0), (json!("FI"), json!("fault_filter_abort")));
        assert_eq!(seen(8), (json!("DI,FI"), json!("fault_filter_abort")));
        assert_eq!(seen(10), (json!("DI"), json!("via_upstream")));
        assert!(proxy.metric("envoy_http_fault_aborts_injected", "").await >= 4.0);
        assert!(proxy.metric("envoy_http_fault_faults_overflow", "").await >= 1.0);
    }
}

#[test]
fn what_a_filter_cannot_do_is_refused_by_name() {
    let mutation = |mutations: Value| {
        (
            "m",
            envoy(
                "header_mutation.v3.HeaderMutation",
                json!({"mutations": mutations}),
            ),
        )
    };
    let cases = [
        (
            mutation(json!({"query_parameter_mutations": []})),
            "not supported yet: query_parameter_mutations",
        ),
        (
            mutation(
                json!({"request_mutations": [{"append": {"header": {"key": "a", "value": "%DYNAMIC_METADATA(a)%"}}}]}),
            ),
            "request_mutations[0]: header 'a': not supported yet in a header value: %DYNAMIC_METADATA(a)%",
        ),
        (
            mutation(json!({"request_mutations": [{"remove": ":path"}]})),
            "':'-prefixed or host headers may not be modified: ':path'",
        ),
    ];
    let limits = [
        (json!({"descriptors": []}), "not supported yet: descriptors"),
        (
            json!({"token_bucket": {"max_tokens": 1, "fill_interval": "0.01s"}}),
            "token_bucket.fill_interval: must be >= 50ms",
        ),
        (
            json!({"token_bucket": {"fill_interval": "1s"}}),
            "max_tokens: must be greater than 0",
        ),
        (json!({"stat_prefix": ""}), "stat_prefix: must not be empty"),
    ];
    let others = [
        (
            (
                "h",
                envoy(
                    "health_check.v3.HealthCheck",
                    json!({"pass_through_mode": true, "cache_time": "1s"}),
                ),
            ),
            "not supported yet: cache_time",
        ),
        (
            ("h", envoy("health_check.v3.HealthCheck", json!({}))),
            "pass_through_mode: required",
        ),
        (
            ("f", fault(json!({"response_rate_limit": {}}))),
            "not supported yet: response_rate_limit",
        ),
        (
            ("f", fault(json!({"abort": {"http_status": 99}}))),
            "abort.http_status: must be between 200 and 599, is 99",
        ),
    ];
    let limits = limits.map(|(more, expected)| (("l", limit(more)), expected));
    for (filter, expected) in cases.into_iter().chain(limits).chain(others) {
        let error = refusal(&[filter]);
        assert!(error.contains(expected), "{error}");
    }
}

/// Why a configuration is refused, by reading it or by building it.
fn refusal(filters: &[(&str, Value)]) -> String {
    let read = match read(filters, &json!([to_server("/", json!({}))])) {
        Ok(read) => read,
        Err(error) => return error,
    };
    let mut bootstrap = base();
    with(&mut bootstrap, read);
    outrigger_proxy::process::check(&bootstrap)
        .expect_err("refused")
        .join("\n")
}

/// What flags make.
fn base() -> Bootstrap {
    use clap::Parser as _;
    let options = outrigger_proxy::options::Options::parse_from(["outrigger-proxy"]);
    outrigger_proxy::bootstrap::from_options(&options).unwrap()
}
