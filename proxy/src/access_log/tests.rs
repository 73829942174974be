//! Formats by table: what a configuration says, and the line it gives.

use super::*;
use outrigger_filters::error::Flag;
use outrigger_xds::resource::listener::{AccessLogFormat, AccessLogSink};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::UNIX_EPOCH,
};

const DECISION: &str = r#"{"policy":"kv","winner":"a/127.0.0.1:8000","cost":1.5}"#;

fn full_log() -> LogFields {
    LogFields {
        upstream_host: Some("a/127.0.0.1:8000".into()),
        upstream_cluster: "engines".into(),
        attempts: 2,
        model: Some("smol\"lm".into()),
        routing_decision: Some(DECISION.into()),
        hit_tokens_predicted: Some(96),
        hit_tokens_confirmed: Some(95),
        prompt_tokens: Some(120),
        completion_tokens: Some(7),
        upstream_service_time: Some(Duration::from_millis(41)),
        ..LogFields::default()
    }
}

const REMOTE: EndAddress = EndAddress::Ip(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 50000));
const DIRECT: EndAddress = EndAddress::Ip(SocketAddr::new(
    IpAddr::V4(Ipv4Addr::new(127, 0, 0, 2)),
    50001,
));
const LOCAL: EndAddress = EndAddress::Ip(SocketAddr::new(IpAddr::V6(Ipv6Addr::LOCALHOST), 8080));

fn full_entry(log: &LogFields) -> Entry<'_> {
    Entry {
        start: UNIX_EPOCH + Duration::new(1_795_347_015, 7_000_000),
        duration: Duration::from_micros(250_900),
        request_duration: Some(Duration::from_millis(3)),
        response_duration: Some(Duration::from_millis(44)),
        method: &Method::POST,
        path: "/v1/chat/completions?a=\"b\"",
        authority: "llm.local",
        protocol: Some(Version::HTTP_11),
        code: 200,
        bytes_received: 512,
        bytes_sent: 4096,
        downstream_remote: &REMOTE,
        downstream_direct_remote: &DIRECT,
        downstream_local: &LOCAL,
        tls: None,
        connection_id: 9,
        request_id: "id-1",
        trace_id: "4bf92f3577b34da6a3ce929d0e0e4736",
        route_name: "chat",
        virtual_host: "all",
        ttft: Some(Duration::from_micros(41_250)),
        itl_p99: Some(Duration::from_millis(12)),
        log,
        local_reply_body: "",
    }
}

/// Of a client that left before anything was known.
fn empty_entry<'a>(log: &'a LogFields, method: &'a Method) -> Entry<'a> {
    Entry {
        duration: Duration::ZERO,
        request_duration: None,
        response_duration: None,
        method,
        path: "",
        authority: "",
        code: 0,
        bytes_received: 0,
        bytes_sent: 0,
        request_id: "",
        trace_id: "",
        route_name: "",
        virtual_host: "",
        ttft: None,
        itl_p99: None,
        ..full_entry(log)
    }
}

fn request() -> http::request::Parts {
    let request = http::Request::builder()
        .uri("/v1/chat/completions")
        .header("user-agent", "curl/8 \"quoted\"")
        .header("x-forwarded-for", "10.0.0.9")
        .header("x-latin", HeaderValue::from_bytes(b"caf\xe9").unwrap())
        .header(
            "x-utf8",
            HeaderValue::from_bytes("café".as_bytes()).unwrap(),
        );
    request.body(()).unwrap().into_parts().0
}

fn compile(format: &AccessLogFormat) -> Result<(Template, Headers), String> {
    let mut headers = Headers::default();
    let template = Template::compile(format, &mut headers, "access_log[0]")?;
    Ok((template, headers))
}

fn render(format: &AccessLogFormat, entry: &Entry<'_>) -> String {
    let (template, headers) = compile(format).unwrap();
    let logs = AccessLogs {
        logs: Vec::new(),
        headers,
    };
    let mut captured = logs.capture(&request());
    let mut response = HeaderMap::new();
    response.insert(
        "content-type",
        HeaderValue::from_static("text/event-stream"),
    );
    logs.capture_response(&response, &mut captured);
    let mut line = Vec::new();
    template.render(entry, &captured, &mut line);
    String::from_utf8(line).expect("a line is UTF-8")
}

fn text(format: &str, entry: &Entry<'_>) -> String {
    render(&AccessLogFormat::Text(Some(format.to_owned())), entry)
}

fn json_line(format: Value, entry: &Entry<'_>) -> Value {
    let Value::Object(members) = format else {
        panic!("a format is an object")
    };
    let line = render(&AccessLogFormat::Json(members.into_iter().collect()), entry);
    assert_eq!(line.find('\n'), Some(line.len() - 1), "one line: {line:?}");
    serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"))
}

#[test]
fn envoys_default_line() {
    let mut log = full_log();
    assert_eq!(
        render(&AccessLogFormat::Text(None), &full_entry(&log)),
        "[2026-11-22T11:30:15.007Z] \"POST /v1/chat/completions?a=\\x22b\\x22 HTTP/1.1\" 200 - 512 4096 250 41 \
         \"10.0.0.9\" \"curl/8 \\x22quoted\\x22\" \"id-1\" \"llm.local\" \"a/127.0.0.1:8000\"\n"
    );
    log = LogFields {
        flags: vec![Flag::DownstreamConnectionTermination],
        ..LogFields::default()
    };
    assert_eq!(
        render(
            &AccessLogFormat::Text(None),
            &empty_entry(&log, &Method::GET)
        ),
        "[2026-11-22T11:30:15.007Z] \"GET - HTTP/1.1\" 0 DC 0 0 0 - \"10.0.0.9\" \"curl/8 \\x22quoted\\x22\" \"-\" \"-\" \"-\"\n"
    );
}

#[test]
fn our_operators_in_text() {
    let log = full_log();
    for (format, expect) in [
        ("%TTFT% %ITL_P99%", "41.25 12"),
        ("%PREFIX_HIT_TOKENS% %PREFIX_HIT_TOKENS_CONFIRMED%", "96 95"),
        (
            "%PROMPT_TOKENS% %COMPLETION_TOKENS% %MODEL%",
            "120 7 smol\\x22lm",
        ),
        ("%MIGRATIONS%", "0"),
        ("%ROUTING_DECISION%", DECISION),
    ] {
        assert_eq!(text(format, &full_entry(&log)), expect, "{format}");
    }
}

#[test]
fn addresses_in_text() {
    let log = full_log();
    for (format, expect) in [
        (
            "%DOWNSTREAM_REMOTE_ADDRESS% %DOWNSTREAM_DIRECT_REMOTE_ADDRESS%",
            "127.0.0.1:50000 127.0.0.2:50001",
        ),
        (
            "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT% %DOWNSTREAM_REMOTE_PORT%",
            "127.0.0.1 50000",
        ),
        (
            "%DOWNSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_LOCAL_PORT%",
            "[::1]:8080 8080",
        ),
    ] {
        assert_eq!(text(format, &full_entry(&log)), expect, "{format}");
    }
}

#[test]
fn envoys_operators_in_text() {
    let mut log = full_log();
    log.flags = vec![
        Flag::UpstreamRetryLimitExceeded,
        Flag::UpstreamConnectionFailure,
    ];
    log.details = "upstream reset{connection termination}".to_owned();
    let entry = full_entry(&log);
    for (format, expect) in [
        ("%START_TIME(%s.%3f)%", "1795347015.007"),
        (
            "%REQ(:METHOD)% %REQ(:AUTHORITY)% %REQ(:SCHEME)%",
            "POST llm.local http",
        ),
        (
            "%REQ(:PATH):3%|%REQ_WITHOUT_QUERY(:PATH)%",
            "/v1|/v1/chat/completions",
        ),
        ("%REQ(X-NONE?USER-AGENT):4%", "curl"),
        ("%REQ(X-NONE)%|%REQ(X-NONE):3%|%REQ(X-A?X-B)%", "-|-|-"),
        ("%REQ(X-LATIN)% %REQ(x-utf8)%", "caf\\xE9 café"),
        ("%RESP(Content-Type)% %RESP(X-NONE)%", "text/event-stream -"),
        ("%PROTOCOL% %RESPONSE_CODE%", "HTTP/1.1 200"),
        (
            "%RESPONSE_CODE_DETAILS%",
            "upstream_reset{connection_termination}",
        ),
        ("%RESPONSE_FLAGS%", "URX,UF"),
        (
            "%RESPONSE_FLAGS_LONG%",
            "UpstreamRetryLimitExceeded,UpstreamConnectionFailure",
        ),
        ("%BYTES_RECEIVED% %BYTES_SENT%", "512 4096"),
        (
            "%DURATION% %REQUEST_DURATION% %RESPONSE_DURATION% %RESPONSE_TX_DURATION%",
            "250 3 44 206",
        ),
        ("%COMMON_DURATION(DS_RX_END:US_RX_BEG:ms)%", "41"),
        (
            "%UPSTREAM_HOST% %UPSTREAM_CLUSTER%",
            "a/127.0.0.1:8000 engines",
        ),
        ("%UPSTREAM_REQUEST_ATTEMPT_COUNT%", "2"),
        (
            "%CONNECTION_ID% %STREAM_ID% %ROUTE_NAME% %VIRTUAL_HOST_NAME%",
            "9 id-1 chat all",
        ),
        ("%TRACE_ID:8%", "4bf92f35"),
        (
            "%REQUESTED_SERVER_NAME% %DYNAMIC_METADATA(a:b)% %DOWNSTREAM_TLS_VERSION%",
            "- - -",
        ),
        ("100%% \"é\"\n", "100% \"é\"\n"),
        ("%ACCESS_LOG_TYPE%", "DownstreamEnd"),
        ("", ""),
    ] {
        assert_eq!(text(format, &entry), expect, "{format}");
    }
    assert_eq!(text("%PID%", &entry), std::process::id().to_string());
    assert_ne!(text("%HOSTNAME%", &entry), "");
}

#[test]
fn details_default_to_via_upstream_unless_nothing_was_sent() {
    let log = LogFields::default();
    assert_eq!(
        text("%RESPONSE_CODE_DETAILS%", &full_entry(&log)),
        "via_upstream"
    );
    assert_eq!(
        text("%RESPONSE_CODE_DETAILS%", &empty_entry(&log, &Method::GET)),
        "-"
    );
}

#[test]
fn json_keeps_types() {
    let log = full_log();
    let line = json_line(
        json!({
            "code": "%RESPONSE_CODE%",
            "ttft": "%TTFT%",
            "decision": "%ROUTING_DECISION%",
            "mixed": "\"%MODEL%\" took %DURATION% ms, %REQ(X-NONE)%",
            "agent": "%REQ(USER-AGENT)%",
            "latin": "%REQ(X-LATIN)%",
            "cut": "%REQ(USER-AGENT):6%",
            "none": "%REQ(X-NONE)%",
            "nested": {"b": ["%BYTES_SENT%", 1, true, null], "a": {}},
            "quo\"ted": "100%%",
        }),
        &full_entry(&log),
    );
    assert_eq!(
        line,
        json!({
            "code": 200,
            "ttft": 41.25,
            "decision": {"policy": "kv", "winner": "a/127.0.0.1:8000", "cost": 1.5},
            "mixed": "\"smol\"lm\" took 250 ms, -",
            "agent": "curl/8 \"quoted\"",
            "latin": "caf\u{fffd}",
            "cut": "curl/8",
            "none": null,
            "nested": {"b": [4096, 1, true, null], "a": {}},
            "quo\"ted": "100%",
        })
    );
}

#[test]
fn a_decision_that_is_no_object_cannot_break_the_line() {
    for decision in ["", "kv", "{\"a\":\n1}", "\"}"] {
        let log = LogFields {
            routing_decision: Some(decision.into()),
            ..LogFields::default()
        };
        let line = json_line(
            json!({"d": "%ROUTING_DECISION%", "e": 1}),
            &full_entry(&log),
        );
        assert_eq!(line, json!({"d": decision, "e": 1}));
        assert!(!text("%ROUTING_DECISION%", &full_entry(&log)).contains('\n'));
    }
}

#[test]
fn the_stand_alone_format() {
    let log = full_log();
    let line = json_line(default_json().into_iter().collect(), &full_entry(&log));
    assert_eq!(line["start_time"], "2026-11-22T11:30:15.007Z");
    assert_eq!(line["path"], "/v1/chat/completions?a=\"b\"");
    assert_eq!(line["response_flags"], "-");
    assert_eq!(line["response_code_details"], "via_upstream");
    assert_eq!(line["routing_decision"]["policy"], "kv");
    assert_eq!(line["prefix_hit_tokens_confirmed"], 95);
    assert_eq!(line.as_object().unwrap().len(), 27);

    let log = LogFields::default();
    let line = json_line(
        default_json().into_iter().collect(),
        &empty_entry(&log, &Method::GET),
    );
    for missing in [
        "ttft_ms",
        "upstream_host",
        "model",
        "routing_decision",
        "request_id",
        "prompt_tokens",
    ] {
        assert_eq!(line[missing], Value::Null, "{missing}");
    }
    assert_eq!(line["response_code"], 0);
}

#[test]
fn wrong_formats_are_refused_by_name_and_place() {
    for (format, expect) in [
        ("%NOPE%", "unknown operator %NOPE%"),
        ("%TRAILER(x)%", "unknown operator %TRAILER%"),
        ("%REQ%", "%REQ% needs an argument"),
        ("%REQ()%", "%REQ% needs an argument"),
        ("%REQ(a b)%", "\"a b\" is no header name"),
        ("%DURATION(x)%", "%DURATION% takes no argument"),
        ("%START_TIME(%Q)%", "unknown time conversion \"%Q\""),
        ("%COMMON_DURATION(DS_RX_BEG:X:ms)%", "time point \"X\""),
        (
            "%COMMON_DURATION(DS_RX_BEG:DS_TX_END:ns)%",
            "unit must be ms",
        ),
        ("%DURATION", "no closing percent sign"),
        ("%REQ(a%", "no closing parenthesis"),
        ("%REQ(a):%", "no length after the colon"),
        ("50% off", "no operator after the percent sign"),
    ] {
        let error = compile(&AccessLogFormat::Text(Some(format.to_owned()))).unwrap_err();
        assert!(
            error.starts_with("access_log[0].text_format: ") && error.contains(expect),
            "{format}: {error}"
        );
        let nested = BTreeMap::from([("a".to_owned(), json!({"b": [0, format]}))]);
        let error = compile(&AccessLogFormat::Json(nested)).unwrap_err();
        assert!(
            error.starts_with("access_log[0].json_format.a.b[1]: ") && error.contains(expect),
            "{format}: {error}"
        );
    }
}

#[test]
fn only_named_headers_are_kept() {
    let sinks = Sinks::default();
    let config = |format: &str| AccessLog {
        filter: None,
        sink: AccessLogSink::Stderr,
        format: AccessLogFormat::Text(Some(format.to_owned())),
    };
    let logs = AccessLogs::new(
        &[
            config("%REQ(A?USER-AGENT)% %REQ(:PATH)%"),
            config("%REQ(user-agent)% %RESP(B)%"),
        ],
        &sinks,
        &Runtime::default(),
    )
    .unwrap();
    assert!(!logs.is_empty());
    let captured = logs.capture(&request());
    assert_eq!(
        captured.request,
        [None, Some(HeaderValue::from_static("curl/8 \"quoted\""))]
    );
    assert_eq!(captured.response.capacity(), 0);
    assert!(
        AccessLogs::new(&[], &sinks, &Runtime::default())
            .unwrap()
            .is_empty()
    );
}

#[test]
#[ignore = "a measurement, for release builds: cargo test --release -- --ignored --nocapture nanoseconds_per_line"]
fn nanoseconds_per_line() {
    let log = full_log();
    let entry = full_entry(&log);
    for (name, format) in [
        ("text", AccessLogFormat::Text(None)),
        ("json", AccessLogFormat::Json(default_json())),
    ] {
        let directory = std::env::temp_dir().join(format!("outrigger-line-{}", std::process::id()));
        let sink = AccessLogSink::File(directory.to_string_lossy().into_owned());
        let sinks = Sinks::default();
        let logs = AccessLogs::new(
            &[AccessLog {
                filter: None,
                sink,
                format,
            }],
            &sinks,
            &Runtime::default(),
        )
        .unwrap();
        let parts = request();
        let (rounds, lines) = (100, 1_000);
        let mut spent = Duration::ZERO;
        for _ in 0..rounds {
            let begun = std::time::Instant::now();
            for _ in 0..lines {
                let captured = logs.capture(&parts);
                logs.write(&entry, &captured);
            }
            spent += begun.elapsed();
            assert!(sinks.flush(Duration::from_secs(5)));
        }
        println!(
            "{name}: {} ns per line",
            spent.as_nanos() / (rounds * lines)
        );
        std::fs::remove_file(directory).unwrap();
    }
}
