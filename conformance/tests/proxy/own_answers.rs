//! What the connection manager makes of its own answers, and what it logs: `local_reply_config`, filters of access logs.

use http::{Method, StatusCode};
use outrigger_conformance::harness::{
    OneChain, ProxyBuilder, TestProxy, Upstream, Version, request,
};
use outrigger_xds::resource::{
    header_mutation::{AppendAction, HeaderToAdd},
    listener::{AccessLogFormat, HttpConnectionManager},
    local_reply::{BodyFormat, LocalReplyConfig, ResponseMapper},
    log_filter::{Comparison, How, LogFilter},
    matching::{HeaderMatch, HeaderValueMatch},
};
use serde_json::{Value, json};

fn proxy(edit: impl Fn(&mut HttpConnectionManager) + 'static) -> TestProxy {
    ProxyBuilder::new()
        .edit(move |bootstrap| {
            for listener in &mut bootstrap.listeners {
                edit(listener.http());
            }
        })
        .start()
}

fn status(how: How, value: u32) -> LogFilter {
    LogFilter::Status(Comparison {
        how,
        value,
        runtime_key: "key".into(),
    })
}

fn mapper(filter: LogFilter) -> ResponseMapper {
    ResponseMapper {
        filter,
        status: None,
        body: None,
        body_format: None,
        headers_to_add: Vec::new(),
    }
}

fn text(format: &str, content_type: &str) -> BodyFormat {
    BodyFormat {
        format: AccessLogFormat::Text(Some(format.into())),
        content_type: content_type.into(),
    }
}

fn object(format: &Value) -> BodyFormat {
    let fields = format.as_object().unwrap().clone();
    BodyFormat {
        format: AccessLogFormat::Json(fields.into_iter().collect()),
        content_type: "application/json".into(),
    }
}

fn add(name: &str, value: &str) -> HeaderToAdd {
    HeaderToAdd {
        name: name.into(),
        value: value.into(),
        action: AppendAction::AppendIfExistsOrAdd,
        keep_empty_value: false,
    }
}

/// Nobody is in the fleet: every routed request is a 503.
#[tokio::test]
async fn the_first_mapper_that_fits_changes_an_answer() {
    let is_asked = LogFilter::Header(HeaderMatch {
        name: "x-asked".into(),
        value: HeaderValueMatch::Present(true),
        invert: false,
        missing_is_empty: false,
    });
    let replies = LocalReplyConfig {
        mappers: vec![
            ResponseMapper {
                status: Some(StatusCode::IM_A_TEAPOT),
                body: Some("asked for".into()),
                headers_to_add: vec![
                    add("x-reason", "%RESPONSE_CODE_DETAILS% %REQ(X-ASKED)%"),
                    add("x-reason", "second"),
                ],
                ..mapper(LogFilter::And(vec![status(How::Equal, 503), is_asked]))
            },
            ResponseMapper {
                body_format: Some(text("<%LOCAL_REPLY_BODY%|%RESP(X-KIND)%>", "text/html")),
                headers_to_add: vec![add("x-kind", "page")],
                ..mapper(LogFilter::Flags(vec!["UH".into()]))
            },
            ResponseMapper {
                status: Some(StatusCode::OK),
                ..mapper(status(How::AtLeast, 0))
            },
        ],
        body_format: None,
    };
    let proxy = proxy(move |http| http.local_replies = replies.clone());
    for version in Version::BOTH {
        let mut client = proxy.client(version).await;
        let mut asked = request(Method::GET, "/x", "");
        asked.headers_mut().insert("x-asked", "so".parse().unwrap());
        let reply = client.send(asked).await;
        assert_eq!(reply.status, 418);
        let reasons = reply.headers.get_all("x-reason").iter();
        let reasons: Vec<_> = reasons.map(|value| value.to_str().unwrap()).collect();
        assert_eq!(reasons, ["no_healthy_upstream so", "second"]);
        // In the form of its route, which speaks OpenAI's API.
        assert_eq!(reply.json()["error"]["message"], "asked for");
        assert_eq!(reply.json()["error"]["code"], 418);
        let reply = client.send(request(Method::GET, "/x", "")).await;
        assert_eq!(reply.status, 503);
        assert_eq!(reply.headers["content-type"], "text/html");
        assert_eq!(reply.headers["retry-after"], "1", "what else it says stays");
        assert_eq!(reply.text(), "<no healthy upstream|page>");
    }
}

#[tokio::test]
async fn a_body_format_is_of_all_answers_and_of_none_of_the_upstreams() {
    let format = object(
        &json!({"code": "%RESPONSE_CODE%", "says": "%LOCAL_REPLY_BODY%", "path": "%REQ(:PATH)%"}),
    );
    let server = Upstream::named("a").await;
    let edit = move |http: &mut HttpConnectionManager| {
        http.local_replies.body_format = Some(format.clone());
    };
    let alone = proxy(edit.clone());
    let mut client = alone.client(Version::H1).await;
    let reply = client.send(request(Method::GET, "/x", "")).await;
    assert_eq!(reply.status, 503);
    assert_eq!(reply.headers["content-type"], "application/json");
    let wanted = json!({"code": 503, "says": "no healthy upstream", "path": "/x"});
    assert_eq!(reply.json(), wanted);
    let mut grpc = request(Method::POST, "/x", "");
    let kind = "application/grpc".parse().unwrap();
    grpc.headers_mut().insert("content-type", kind);
    let reply = client.send(grpc).await;
    assert_eq!(reply.headers["grpc-status"], "14");
    let message = reply.headers["grpc-message"].to_str().unwrap();
    let message: Value = serde_json::from_str(message).unwrap();
    assert_eq!(message, wanted);
    let served = ProxyBuilder::new()
        .server(server.address)
        .edit(move |bootstrap| {
            for listener in &mut bootstrap.listeners {
                edit(listener.http());
            }
        })
        .start();
    let mut client = served.client(Version::H1).await;
    let reply = client.send(request(Method::GET, "/x", "")).await;
    assert_eq!(reply.json()["served_by"], "a");
}

#[tokio::test]
async fn only_what_the_filter_lets_pass_is_logged() {
    let proxy = proxy(|http| {
        for log in &mut http.access_log {
            log.filter = Some(LogFilter::Or(vec![
                status(How::Equal, 426),
                LogFilter::Header(HeaderMatch {
                    name: "x-log".into(),
                    value: HeaderValueMatch::Present(true),
                    invert: false,
                    missing_is_empty: false,
                }),
            ]));
        }
    });
    let mut client = proxy.client(Version::H1).await;
    client.send(request(Method::GET, "/silent", "")).await;
    let mut logged = request(Method::GET, "/told", "");
    logged.headers_mut().insert("x-log", "1".parse().unwrap());
    client.send(logged).await;
    assert_eq!(proxy.only_log().await["path"], "/told");
}
