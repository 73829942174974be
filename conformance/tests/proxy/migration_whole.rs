//! Answers in one piece that outlive their engines: the client reads one whole answer, or is told that there is none.

use super::migration::migration;
use outrigger_conformance::harness::{
    Conn, Exchange, OneChain, ProxyBuilder, TestProxy, Upstream, Version,
};
use outrigger_xds::resource::header_mutation::{AppendAction, HeaderToAdd};
use serde_json::{Value, json};
use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};
use tokio::sync::mpsc;

pub(super) const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
pub(super) const WHOLE: &str = r#"{"id":"c","choices":[{"index":0,"message":{"role":"assistant","content":"whole"},"finish_reason":"stop"}],"usage":{"prompt_tokens":1,"completion_tokens":1,"total_tokens":2}}"#;
pub(super) const CHUNKED: &str =
    "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n";

/// How an answer does not come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Break {
    /// The connection closes within the length that was told.
    Length,
    /// Or before the last chunk.
    Chunks,
    /// Or it is reset.
    Reset,
    /// It only ever closes, and the JSON is not whole.
    UntilClose,
    /// Nothing comes behind the first half.
    Silence,
    /// Nor behind the head.
    NoByte,
}

pub(super) async fn break_off(mut conn: Conn, how: Break) -> Option<Conn> {
    let half = &WHOLE[..WHOLE.len() / 2];
    let length = WHOLE.len();
    match how {
        Break::Length | Break::Reset => {
            conn.write(format!("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{half}"))
                .await;
        }
        Break::UntilClose => {
            conn.write(format!(
                "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n{half}"
            ))
            .await;
        }
        Break::NoByte => {
            conn.write(CHUNKED).await;
        }
        Break::Chunks | Break::Silence => {
            conn.write(CHUNKED).await;
            conn.chunk(half).await;
        }
    }
    // It has gone on its way.
    tokio::time::sleep(Duration::from_millis(20)).await;
    match how {
        Break::Silence => {
            conn.gone().await;
        }
        Break::Reset => conn.reset(),
        _ => {}
    }
    None
}

pub(super) async fn answer(mut conn: Conn, chunked: bool) -> Option<Conn> {
    if !chunked {
        return conn.json("200 OK", WHOLE).await.then_some(conn);
    }
    conn.write(CHUNKED).await;
    for piece in WHOLE.as_bytes().chunks(50) {
        conn.chunk(piece).await;
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    conn.end().await.then_some(conn)
}

/// So many servers, of which the first that are asked break off.
pub(super) async fn servers(count: usize, breaks: usize, how: Break) -> Vec<Upstream> {
    let asked = Arc::new(AtomicUsize::new(0));
    let mut all = Vec::new();
    for _ in 0..count {
        let asked = asked.clone();
        let serve = move |conn: Conn, _: Exchange| {
            let number = asked.fetch_add(1, SeqCst);
            async move {
                if number < breaks {
                    break_off(conn, how).await
                } else {
                    answer(conn, number % 2 == 1).await
                }
            }
        };
        all.push(Upstream::engine(serve).await);
    }
    all
}

pub(super) fn proxy(servers: &[Upstream], fields: Value) -> TestProxy {
    let builder = ProxyBuilder::new().edit(migration(fields));
    let add = |builder: ProxyBuilder, server: &Upstream| builder.server(server.address);
    servers.iter().fold(builder, add).start()
}

/// Sets the limits of `openai`.
pub(super) fn openai(
    fields: Value,
) -> impl FnOnce(&mut outrigger_xds::resource::bootstrap::Bootstrap) {
    move |bootstrap| {
        let listeners = bootstrap.listeners.iter_mut();
        for filter in listeners.flat_map(|listener| listener.http().http_filters.iter_mut()) {
            if filter.name == "openai" {
                filter.config.value = fields.clone();
            }
        }
    }
}

pub(super) fn body(path: &str, more: &Value) -> String {
    let mut body = json!({"model": "m", "max_tokens": 8});
    match path {
        CHAT => body["messages"] = json!([{"role": "user", "content": "hi"}]),
        _ => body["prompt"] = json!("hi"),
    }
    for (name, value) in more.as_object().unwrap() {
        body[name] = value.clone();
    }
    body.to_string()
}

pub(super) fn tried(servers: &[Upstream]) -> usize {
    servers.iter().map(|server| server.exchanges().len()).sum()
}

#[tokio::test]
async fn what_breaks_before_it_is_whole_is_asked_for_anew() {
    for (at, how) in [
        Break::Length,
        Break::Chunks,
        Break::Reset,
        Break::UntilClose,
        Break::Silence,
        Break::NoByte,
    ]
    .into_iter()
    .enumerate()
    {
        let servers = servers(3, 1, how).await;
        let proxy = proxy(&servers, json!({"stall_ms": 200}));
        let mut client = proxy.client(Version::BOTH[at % 2]).await;
        let (path, more) = match at % 3 {
            0 => (CHAT, json!({"response_format": {"type": "json_object"}})),
            1 => (COMPLETIONS, json!({"n": 3, "seed": 1, "temperature": 1})),
            _ => (
                CHAT,
                json!({"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required"}),
            ),
        };
        let reply = client.post(path, body(path, &more)).await;
        assert_eq!(
            (reply.status.as_u16(), reply.text()),
            (200, WHOLE.to_owned()),
            "{how:?}"
        );
        assert!(!reply.broken, "{how:?}");
        assert_eq!(tried(&servers), 2, "{how:?}");
        let line = proxy.only_log().await;
        assert_eq!(
            (&line["migrations"], &line["model"]),
            (&json!(1), &json!("m")),
            "{line}"
        );
        let ids = servers.iter().flat_map(Upstream::exchanges);
        let ids: Vec<_> = ids
            .map(|got| got.header("x-request-id").to_owned())
            .collect();
        assert!(ids[0] != ids[1], "each call has an id of its own: {ids:?}");
    }
}

/// Where routes change nothing the router gives back what it sent; where they do, it is copied before.
#[tokio::test]
async fn the_next_engine_is_asked_what_the_first_was() {
    for added in [0, 1] {
        let servers = servers(2, 1, Break::Length).await;
        let builder = ProxyBuilder::new().edit(move |bootstrap| {
            for listener in &mut bootstrap.listeners {
                let headers = &mut listener.http().route_config.headers.request.add;
                headers.extend((0..added).map(|_| HeaderToAdd {
                    name: "x-route".to_owned(),
                    value: "told".to_owned(),
                    action: AppendAction::AppendIfExistsOrAdd,
                    keep_empty_value: false,
                }));
            }
        });
        let add = |builder: ProxyBuilder, server: &Upstream| builder.server(server.address);
        let proxy = servers.iter().fold(builder, add).start();
        let mut client = proxy.client(Version::H1).await;
        let body = body(CHAT, &json!({}));
        let reply = client.post(CHAT, body.clone()).await;
        assert_eq!(reply.text(), WHOLE);
        let asked: Vec<_> = servers.iter().flat_map(Upstream::exchanges).collect();
        assert_eq!(asked.len(), 2);
        for exchange in &asked {
            assert_eq!(exchange.body, body.as_bytes());
            assert_eq!(exchange.count("x-route"), added);
        }
        let fields = |exchange: &Exchange| {
            let mut fields = exchange.headers.clone();
            fields.retain(|(name, _)| name != "x-request-id");
            fields.sort();
            (exchange.line.clone(), fields)
        };
        assert_eq!(fields(&asked[0]), fields(&asked[1]));
    }
}

#[tokio::test]
async fn where_no_engine_can_it_is_an_error_and_never_a_cut_200() {
    let no_place = json!({"budget_percent": 0, "min_resume_concurrency": 0, "stall_ms": 100});
    let short = json!({"resume_timeout_ms": 100, "attempts_max": 99});
    for (how, limits, reason, status, calls) in [
        (Break::Reset, json!({}), "attempts", 503, 4..=4),
        (Break::Chunks, short, "timeout", 502, 2..=6),
        (Break::Length, no_place, "budget", 502, 1..=1),
    ] {
        let servers = servers(6, 6, how).await;
        let proxy = proxy(&servers, limits);
        let mut client = proxy.client(Version::H1).await;
        let reply = client.post(CHAT, body(CHAT, &json!({}))).await;
        assert_eq!(reply.status, status, "{reason}: {}", reply.text());
        let told = reply.json()["error"]["message"]
            .as_str()
            .unwrap()
            .to_owned();
        assert!(told.starts_with("upstream connect error"), "{told}");
        let label = format!("reason=\"{reason}\"");
        let counted = proxy
            .metric("outrigger_migration_refusals_total", &label)
            .await;
        assert!(counted >= 1.0, "{reason}");
        let tried = tried(&servers);
        assert!(calls.contains(&tried), "{reason}: {tried}");
    }
}

#[tokio::test]
async fn an_answer_that_ended_too_early_is_a_bad_gateway() {
    let servers = servers(1, 9, Break::UntilClose).await;
    let proxy = proxy(&servers, json!({}));
    let mut client = proxy.client(Version::H2).await;
    let reply = client.post(CHAT, body(CHAT, &json!({}))).await;
    assert_eq!(reply.status, 502, "{}", reply.text());
}

#[tokio::test]
async fn an_answer_that_falls_silent_where_there_is_no_other_engine_is_late() {
    let servers = servers(1, 9, Break::Silence).await;
    let proxy = ProxyBuilder::new()
        .edit(openai(json!({"inter_token_timeout_ms": 400})))
        .server(servers[0].address)
        .start();
    let begun = Instant::now();
    let mut client = proxy.client(Version::H1).await;
    let reply = client.post(CHAT, body(CHAT, &json!({}))).await;
    assert_eq!(reply.status, 504, "{}", reply.text());
    let took = begun.elapsed();
    assert!(
        took >= Duration::from_millis(400) && took < Duration::from_secs(5),
        "{took:?}"
    );
    assert_eq!(tried(&servers), 1);
}

/// A server that sends a piece whenever it is told to, breaks off when it is told nothing more, and says who asked.
async fn on_command(head: &'static str) -> (Upstream, mpsc::UnboundedSender<&'static str>) {
    let (told, pieces) = mpsc::unbounded_channel::<&'static str>();
    let pieces = Arc::new(tokio::sync::Mutex::new(pieces));
    let serve = move |mut conn: Conn, _: Exchange| {
        let pieces = pieces.clone();
        async move {
            conn.write(head).await;
            let mut pieces = pieces.lock().await;
            while let Some(piece) = pieces.recv().await {
                if piece.is_empty() {
                    return conn.end().await.then_some(conn);
                }
                conn.chunk(piece).await;
            }
            None
        }
    };
    (Upstream::engine(serve).await, told)
}

#[tokio::test]
async fn what_cannot_be_held_goes_on_as_it_comes() {
    for (fields, metric) in [
        (
            json!({"whole_bytes_max": 100}),
            "outrigger_migration_whole_overflow_total",
        ),
        (
            json!({"held_bytes_max": 100}),
            "outrigger_migration_memory_overflow_total",
        ),
    ] {
        let (server, told) = on_command(CHUNKED).await;
        let proxy = proxy(std::slice::from_ref(&server), fields);
        let (long, rest) = WHOLE.split_at(120);
        told.send(long).unwrap();
        let mut client = proxy.client(Version::H1).await;
        let post = outrigger_conformance::harness::request(
            http::Method::POST,
            CHAT,
            body(CHAT, &json!({})),
        );
        let mut reply = client.begin(post).await;
        let mut seen = Vec::new();
        while seen.len() < long.len() {
            seen.extend_from_slice(&reply.next().await.unwrap());
        }
        assert_eq!(seen, long.as_bytes(), "before the rest was sent");
        told.send(rest).unwrap();
        told.send("").unwrap();
        while let Some(more) = reply.next().await {
            seen.extend_from_slice(&more);
        }
        assert_eq!(String::from_utf8(seen).unwrap(), WHOLE);
        assert!(proxy.metric(metric, "").await >= 1.0, "{metric}");
    }
}

#[tokio::test]
async fn what_was_held_is_given_back() {
    let asked = Arc::new(AtomicUsize::new(0));
    let mut servers = Vec::new();
    for _ in 0..2 {
        let asked = asked.clone();
        servers.push(
            Upstream::engine(move |mut conn: Conn, _| {
                let number = asked.fetch_add(1, SeqCst);
                async move {
                    if number % 2 == 1 {
                        return answer(conn, false).await;
                    }
                    conn.write(CHUNKED).await;
                    conn.chunk(" ".repeat(8 << 10)).await;
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    None
                }
            })
            .await,
        );
    }
    let proxy = proxy(&servers, json!({"held_bytes_max": 20 << 10}));
    let mut client = proxy.client(Version::H1).await;
    for round in 0..4 {
        let reply = client.post(CHAT, body(CHAT, &json!({}))).await;
        assert_eq!(reply.text(), WHOLE, "it was held in round {round}");
        // Whoever failed is passed over for a second.
        tokio::time::sleep(Duration::from_millis(1050)).await;
    }
}

#[tokio::test]
async fn a_client_that_leaves_ends_it() {
    let (left, mut seen) = mpsc::unbounded_channel();
    let serve = move |mut conn: Conn, _: Exchange| {
        let left = left.clone();
        async move {
            conn.write(CHUNKED).await;
            conn.chunk("{").await;
            left.send(conn.gone().await).unwrap();
            None
        }
    };
    let server = Upstream::engine(serve).await;
    let proxy = proxy(std::slice::from_ref(&server), json!({}));
    for version in Version::BOTH {
        let mut client = proxy.client(version).await;
        let post = client.post(CHAT, body(CHAT, &json!({})));
        assert!(
            tokio::time::timeout(Duration::from_millis(300), post)
                .await
                .is_err()
        );
        drop(client);
        let gone = tokio::time::timeout(Duration::from_secs(5), seen.recv()).await;
        assert!(gone.unwrap().is_some());
    }
    assert_eq!(server.exchanges().len(), 2, "and nobody else is asked");
}

#[tokio::test]
async fn errors_empty_answers_and_trailers_pass() {
    let serve = |mut conn: Conn, got: Exchange| async move {
        let asked = String::from_utf8_lossy(&got.body).into_owned();
        if asked.contains("refuse") {
            return conn
                .json("400 Bad Request", r#"{"error":{"message":"no"}}"#)
                .await
                .then_some(conn);
        }
        if asked.contains("cut") {
            conn.write("HTTP/1.1 400 Bad Request\r\ncontent-length: 50\r\n\r\nhalf")
                .await;
            return None;
        }
        if asked.contains("nothing") {
            return conn
                .write("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
                .await
                .then_some(conn);
        }
        conn.write("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntrailer: x-last\r\ntransfer-encoding: chunked\r\n\r\n").await;
        conn.chunk(WHOLE).await;
        conn.write("0\r\nx-last: yes\r\n\r\n").await.then_some(conn)
    };
    let servers = [Upstream::engine(serve).await, Upstream::engine(serve).await];
    let proxy = proxy(&servers, json!({}));
    let mut client = proxy.client(Version::H2).await;
    let mut ask = async |what: &str| client.post(CHAT, body(CHAT, &json!({"user": what}))).await;
    let reply = ask("refuse").await;
    assert_eq!(
        (reply.status.as_u16(), reply.text().as_str()),
        (400, r#"{"error":{"message":"no"}}"#)
    );
    let reply = ask("cut").await;
    assert_eq!((reply.status.as_u16(), reply.broken), (400, true));
    let reply = ask("nothing").await;
    assert_eq!(
        (reply.status.as_u16(), reply.body.len(), reply.broken),
        (200, 0, false)
    );
    let reply = ask("trailers").await;
    assert_eq!(reply.text(), WHOLE);
    assert_eq!(reply.trailers.unwrap()["x-last"], "yes");
    assert_eq!(tried(&servers), 4, "nothing was asked for anew");
}

#[tokio::test]
async fn the_proxy_beside_an_engine_passes_the_break_on_and_the_entry_asks_elsewhere() {
    let servers = servers(2, 1, Break::Chunks).await;
    let besides: Vec<_> = servers
        .iter()
        .map(|server| ProxyBuilder::new().engine(server.address).start())
        .collect();
    let builder = ProxyBuilder::new();
    let add = |builder: ProxyBuilder, beside: &TestProxy| builder.peer(beside.inbound());
    let entry = besides.iter().fold(builder, add).start();
    entry.wait_alive(2).await;
    let mut client = entry.client(Version::H2).await;
    let reply = client.post(CHAT, body(CHAT, &json!({}))).await;
    assert_eq!(
        (reply.status.as_u16(), reply.text()),
        (200, WHOLE.to_owned())
    );
    assert_eq!(entry.only_log().await["migrations"], 1);
    for server in &servers {
        assert_eq!(server.exchanges().len(), 1, "each was asked once");
    }
}
