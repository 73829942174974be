//! The routes of the bootstrap that says everything that can be said, as what they mean.

use outrigger_xds::resource::{
    hash_policy::{HashCookie, HashPolicy, HashSource},
    header_mutation::{AppendAction, HeaderMutations, HeaderToAdd, Mutations},
    matching::{
        Fraction, HeaderMatch, HeaderValueMatch, Pattern, QueryMatch, QueryValueMatch,
        RegexRewrite, StringMatch,
    },
    mirror_policy::MirrorPolicy,
    route::{
        Action, ClusterSpecifier, HostRewrite, PathMatch, Redirect, RetryPolicy, Route,
        RouteAction, RouteConfiguration, RouteMatch, TypedConfig, VirtualHost,
    },
    route_action::{
        ClusterNotFound, ClusterWeight, PathRedirect, Priority, WeightedClusters, WeightedName,
    },
};
use std::time::Duration;

fn add(name: &str, value: &str, action: AppendAction, keep_empty_value: bool) -> HeaderToAdd {
    HeaderToAdd {
        name: name.into(),
        value: value.into(),
        action,
        keep_empty_value,
    }
}

fn swap() -> RegexRewrite {
    RegexRewrite {
        regex: "(a)(b)".into(),
        substitution: "\\2\\1".into(),
    }
}

fn present(name: &str) -> HeaderMatch {
    HeaderMatch {
        name: name.into(),
        value: HeaderValueMatch::Present(true),
        invert: false,
        missing_is_empty: false,
    }
}

fn full_away() -> Route {
    Route {
        name: String::new(),
        r#match: RouteMatch {
            path: PathMatch::Path("/old".into()),
            ..RouteMatch::default()
        },
        action: Action::Redirect(Redirect {
            scheme: Some("https".into()),
            host: Some("new.example".into()),
            port: Some(8443),
            path: Some(PathRedirect::Regex(swap())),
            status: 308,
            strip_query: true,
        }),
        typed_per_filter_config: [].into(),
        headers: HeaderMutations {
            request: Mutations::default(),
            response: Mutations {
                add: vec![add("x-a", "%PROTOCOL%", AppendAction::AddIfAbsent, true)],
                remove: vec!["x-b".into()],
            },
        },
    }
}

fn full_mixed() -> Route {
    Route {
        name: String::new(),
        r#match: RouteMatch::default(),
        action: Action::Route(RouteAction {
            cluster: ClusterSpecifier::Weighted(WeightedClusters {
                clusters: vec![
                    ClusterWeight {
                        cluster: WeightedName::Name("engines".into()),
                        weight: 3,
                        headers: HeaderMutations {
                            request: Mutations {
                                add: vec![add(
                                    "x-old",
                                    "1",
                                    AppendAction::OverwriteIfExistsOrAdd,
                                    false,
                                )],
                                remove: vec![],
                            },
                            response: Mutations::default(),
                        },
                        host_rewrite: Some("in.side".into()),
                        typed_per_filter_config: [].into(),
                    },
                    ClusterWeight {
                        cluster: WeightedName::Header("x-cluster".into()),
                        weight: 0,
                        headers: HeaderMutations::default(),
                        host_rewrite: None,
                        typed_per_filter_config: [].into(),
                    },
                ],
                header_name: Some("x-number".into()),
            }),
            cluster_not_found: ClusterNotFound::NotFound,
            regex_rewrite: Some(swap()),
            host_rewrite: Some(HostRewrite::Header("x-host".into())),
            append_x_forwarded_host: true,
            max_stream_duration: Some(Duration::from_secs(7)),
            max_grpc_timeout: Some(Duration::from_secs(9)),
            mirrors: vec![MirrorPolicy {
                cluster: "engines".into(),
                runtime_fraction: Some(Fraction {
                    numerator: 1,
                    denominator: 100,
                    runtime_key: String::new(),
                }),
                append_suffix: false,
            }],
            ..RouteAction::default()
        }),
        typed_per_filter_config: [].into(),
        headers: HeaderMutations::default(),
    }
}

fn full_v1(debug: TypedConfig) -> Route {
    let text = |pattern| StringMatch {
        pattern,
        ignore_case: false,
    };
    let headers = vec![
        HeaderMatch {
            name: "x-team".into(),
            value: HeaderValueMatch::Text(text(Pattern::Prefix("a".into()))),
            invert: true,
            missing_is_empty: true,
        },
        HeaderMatch {
            name: "x-any".into(),
            value: HeaderValueMatch::Present(true),
            invert: false,
            missing_is_empty: false,
        },
        HeaderMatch {
            name: "x-n".into(),
            value: HeaderValueMatch::Range(-1, 5),
            invert: false,
            missing_is_empty: false,
        },
    ];
    let query_parameters = vec![
        QueryMatch {
            name: "q".into(),
            value: QueryValueMatch::Text(StringMatch {
                pattern: Pattern::Regex("a+".into()),
                ignore_case: true,
            }),
        },
        QueryMatch {
            name: "p".into(),
            value: QueryValueMatch::Present(true),
        },
    ];
    Route {
        name: String::new(),
        r#match: RouteMatch {
            path: PathMatch::Prefix("/v1/".into()),
            case_sensitive: false,
            headers,
            query_parameters,
            runtime_fraction: Some(Fraction {
                numerator: 5,
                denominator: 1_000_000,
                runtime_key: "share".into(),
            }),
            grpc: true,
        },
        action: Action::Route(RouteAction {
            cluster: "engines".into(),
            timeout: Some(Duration::ZERO),
            idle_timeout: Some(Duration::from_millis(1500)),
            prefix_rewrite: Some("/".into()),
            priority: Priority::High,
            hash_policy: full_hash(),
            ..RouteAction::default()
        }),
        typed_per_filter_config: [("kv".to_owned(), debug)].into(),
        headers: HeaderMutations::default(),
    }
}

fn full_hash() -> Vec<HashPolicy> {
    let policy = |source, terminal| HashPolicy { source, terminal };
    let cookie = HashCookie {
        name: "c".into(),
        ttl: Some(Duration::from_secs(5)),
        path: "/p".into(),
        attributes: vec![("SameSite".into(), "Lax".into())],
    };
    let header = HashSource::Header {
        name: "x-user".into(),
        rewrite: Some(swap()),
    };
    vec![
        policy(header, true),
        policy(HashSource::Cookie(cookie), false),
        policy(HashSource::SourceIp, false),
        policy(HashSource::QueryParameter("q".into()), false),
    ]
}

pub(crate) fn full_routes(debug: TypedConfig) -> RouteConfiguration {
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
        headers: HeaderMutations::default(),
    };
    let retry_policy = RetryPolicy {
        retry_on: vec!["connect-failure".into(), "reset".into()],
        num_retries: 3,
        per_try_timeout: Duration::ZERO,
        retriable_status_codes: vec![418],
        retriable_headers: vec![present("x-again")],
        retriable_request_headers: vec![present("x-safe")],
        base_interval: Duration::from_millis(5),
        max_interval: Duration::from_millis(50),
        previous_hosts: true,
        host_selection_attempts: 5,
    };
    let all = VirtualHost {
        name: "all".into(),
        domains: vec!["*".into()],
        routes: vec![health, full_away(), full_v1(debug), full_mixed()],
        retry_policy: Some(retry_policy),
        mirrors: Vec::new(),
        include_request_attempt_count: true,
        include_attempt_count_in_response: true,
        headers: HeaderMutations::default(),
        typed_per_filter_config: [].into(),
    };
    RouteConfiguration {
        name: "local".into(),
        virtual_hosts: vec![all],
        headers: HeaderMutations {
            request: Mutations {
                add: vec![],
                remove: vec!["x-gone".into()],
            },
            response: Mutations::default(),
        },
        most_specific_header_mutations_wins: true,
        mirrors: Vec::new(),
        validate_clusters: true,
        max_direct_response_body_bytes: 5000,
        ignore_port_in_host_matching: true,
        typed_per_filter_config: [].into(),
    }
}
