//! The `migration` filter before engines that do as they are told: when it moves a stream, how long it tries, and what it tells.

use crate::fleet::{Fleet, vllm};
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http::{Request, Response, StatusCode, Uri};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use outrigger_filters::{
    body::{BodyError, RequestBody, ResponseBody, full},
    endpoints::{Host, Via},
    error::Flag,
    filter::{
        Chain, Context, End, Handled, HttpFilter, LogFields, Next, RouteFacts, StreamObserver,
    },
    migration,
    openai::{Api, OpenAiRequest, StreamLimits},
    registry,
};
use outrigger_xds::{
    report::{EngineId, EngineKind, Health},
    resource::route::TypedConfig,
};
use serde_json::{Value, json};
use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

/// What an engine does with a request.
enum Answer {
    /// Events, each so many milliseconds after the one before it, and then what is last.
    Events(u64, Vec<String>, Last),
    /// The head, so many milliseconds later the first event, and then the others.
    Prefill(u64, Vec<String>),
    Status(u16),
    /// No response.
    Nothing,
}

#[derive(Clone, Copy)]
enum Last {
    Break,
    Done,
    Silence,
}

/// The engines behind the filter: the first request goes to `e0`, the next to `e1`, and so on.
#[derive(Default)]
struct Engines {
    answers: Mutex<VecDeque<Answer>>,
    seen: Mutex<Vec<(Uri, Bytes)>>,
    ends: Ends,
}

type Ended = (End, Option<u64>);

/// How each leg ended, and the tokens that it was told to have had.
#[derive(Clone, Default)]
struct Ends(Arc<Mutex<Vec<Ended>>>);

impl StreamObserver for Ends {
    fn on_end(&mut self, end: End, log: &mut LogFields) {
        self.0.lock().unwrap().push((end, log.tokens_seen));
    }
}

fn events(prefill: u64, pause: u64, events: Vec<String>, last: Last) -> ResponseBody {
    let events = events.into_iter().enumerate();
    let events = stream::iter(events).then(move |(at, event)| async move {
        let pause = if at == 0 { prefill } else { pause };
        tokio::time::sleep(Duration::from_millis(pause)).await;
        Ok(Frame::data(Bytes::from(format!("data: {event}\n\n"))))
    });
    let end = stream::once(async move {
        match last {
            Last::Done => Ok(Frame::data(Bytes::from("data: [DONE]\n\n"))),
            Last::Break => Err(BodyError::new(Flag::UpstreamConnectionTermination, "cut")),
            Last::Silence => std::future::pending().await,
        }
    });
    StreamBody::new(events.chain(end)).boxed_unsync()
}

impl HttpFilter for Engines {
    fn handle<'a>(
        &'a self,
        request: Request<RequestBody>,
        context: &'a mut Context,
        _: Next<'a>,
    ) -> Handled<'a> {
        Box::pin(async move {
            let uri = request.uri().clone();
            let body = request.into_body().collect().await.unwrap().to_bytes();
            let number = {
                let mut seen = self.seen.lock().unwrap();
                seen.push((uri, body));
                seen.len() - 1
            };
            context.log.upstream_host = Some(EngineId(format!("e{number}").into()));
            context.observers.push(Box::new(self.ends.clone()));
            let answer = self.answers.lock().unwrap().pop_front();
            let stream = |body| {
                let head = Response::builder().header("content-type", "text/event-stream");
                Ok(head.body(body).unwrap())
            };
            match answer {
                Some(Answer::Events(pause, list, last)) => stream(events(pause, pause, list, last)),
                Some(Answer::Prefill(pause, list)) => stream(events(pause, 0, list, Last::Done)),
                Some(Answer::Status(status)) => {
                    let mut response = Response::new(full("no"));
                    *response.status_mut() = StatusCode::from_u16(status).unwrap();
                    Ok(response)
                }
                Some(Answer::Nothing) | None => std::future::pending().await,
            }
        })
    }
}

fn fleet() -> Fleet {
    let nobody = Arc::new(|_: &str, _: &[u8]| (StatusCode::NOT_FOUND, String::new()));
    Fleet::new(&[Via::Local, Via::Local], &vllm(""), nobody)
}

fn chain(fleet: &Fleet, value: Value, answers: Vec<Answer>) -> (Chain, Arc<Engines>) {
    let engines = Arc::new(Engines {
        answers: Mutex::new(answers.into()),
        ..Engines::default()
    });
    let config = TypedConfig {
        type_url: migration::TYPE_URL.into(),
        value,
    };
    let filter = registry::build(&config, &[], &fleet.services).unwrap();
    (vec![filter, engines.clone()].into(), engines)
}

/// What the client reads, and the error at which it ends.
async fn ask(chain: &Chain, more: Value) -> (String, Option<String>) {
    let read = read(chain, more);
    let limit = Duration::from_secs(20);
    tokio::time::timeout(limit, read).await.expect("it ends")
}

async fn read(chain: &Chain, more: Value) -> (String, Option<String>) {
    let mut body = json!({"model": "m", "stream": true, "temperature": 0, "messages": [{"role": "user", "content": "hi"}]});
    for (name, value) in more.as_object().unwrap() {
        body[name] = value.clone();
    }
    let body = Bytes::from(body.to_string());
    let openai = OpenAiRequest::parse(Api::Chat, &body, StreamLimits::default()).unwrap();
    let mut context = Context {
        route: Arc::new(RouteFacts {
            cluster: "engines".into(),
            ..RouteFacts::default()
        }),
        openai: Some(Arc::new(openai)),
        ..Context::default()
    };
    let request = Request::post("/v1/chat/completions?key=1");
    let request = request.body(RequestBody::full(body)).unwrap();
    let answer = Next::new(chain).run(request, &mut context).await;
    let mut body = answer.unwrap().into_body();
    let mut text = String::new();
    while let Some(frame) = body.frame().await {
        match frame {
            Ok(frame) => text.push_str(std::str::from_utf8(frame.data_ref().unwrap()).unwrap()),
            Err(error) => return (text, Some(error.message)),
        }
    }
    (text, None)
}

fn opening() -> String {
    json!({"id": "c", "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}],
        "prompt_token_ids": [1, 2]})
    .to_string()
}

fn chunk(delta: &Value, id: u64) -> String {
    json!({"id": "c", "choices": [{"index": 0, "delta": delta, "token_ids": [id]}]}).to_string()
}

fn begun() -> Vec<String> {
    vec![opening(), chunk(&json!({"content": "a"}), 3)]
}

fn rest() -> Answer {
    let rest = json!({"id": "x", "choices": [{"index": 0, "text": "b", "token_ids": [4], "finish_reason": "stop"}]});
    Answer::Events(0, vec![rest.to_string()], Last::Done)
}

#[tokio::test]
async fn the_query_is_kept_and_every_leg_is_told_its_end() {
    let fleet = fleet();
    let answers = vec![Answer::Events(0, begun(), Last::Break), rest()];
    let (chain, engines) = chain(&fleet, json!({}), answers);
    let (text, error) = ask(&chain, json!({})).await;
    assert_eq!(error, None, "{text}");
    assert!(text.ends_with("data: [DONE]\n\n"), "{text}");
    let moved = engines.seen.lock().unwrap()[1].0.to_string();
    assert_eq!(moved, "/v1/completions?key=1");
    let ends = engines.ends.0.lock().unwrap().clone();
    assert_eq!(
        ends,
        [(End::UpstreamBroke, Some(2)), (End::Complete, Some(1))]
    );
}

#[tokio::test]
async fn a_busy_engine_does_not_end_a_stream() {
    let fleet = fleet();
    for (status, goes_on) in [(429, true), (408, true), (400, false)] {
        let answers = vec![
            Answer::Events(0, begun(), Last::Break),
            Answer::Status(status),
            rest(),
        ];
        let (chain, _) = chain(&fleet, json!({}), answers);
        let (text, error) = ask(&chain, json!({})).await;
        assert_eq!(error.is_none(), goes_on, "{status}: {text} {error:?}");
    }
}

#[tokio::test]
async fn all_moves_together_have_one_limit_of_time() {
    let fleet = fleet();
    let mut answers = vec![Answer::Events(0, begun(), Last::Break)];
    answers.extend((0..40).map(|_| Answer::Events(100, vec![opening()], Last::Break)));
    let limits = json!({"resume_timeout_ms": 450, "attempts_max": 30});
    let (chain, engines) = chain(&fleet, limits, answers);
    let (_, error) = ask(&chain, json!({})).await;
    let told = error.unwrap();
    assert!(told.ends_with("elsewhere: timeout"), "{told}");
    let calls = engines.seen.lock().unwrap().len();
    assert!((2..=7).contains(&calls), "{calls}");
}

#[tokio::test]
async fn a_suspect_waits_for_its_turn_no_longer_than_a_stall() {
    let fleet = fleet();
    let dies = || Answer::Events(0, vec![opening()], Last::Break);
    let limits = json!({"stall_ms": 100, "attempts_max": 9});
    let answers = vec![dies(), dies(), Answer::Nothing];
    let (first, engines) = chain(&fleet, limits.clone(), answers);
    let runs = tokio::spawn(async move { ask(&first, json!({})).await });
    while engines.seen.lock().unwrap().len() < 3 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let (second, _) = chain(&fleet, limits, vec![dies(), dies(), rest()]);
    let ended = tokio::time::timeout(Duration::from_secs(5), ask(&second, json!({}))).await;
    let (_, error) = ended.expect("it does not wait for ever");
    let told = error.unwrap();
    assert!(told.ends_with("elsewhere: suspect"), "{told}");
    runs.abort();
}

#[tokio::test]
async fn a_stream_does_not_hop_where_nobody_is_well() {
    let fleet = fleet();
    for endpoint in &fleet.endpoints {
        endpoint.host.set(Host::FAILED_ACTIVE_HC, true);
    }
    let mut list = begun();
    list.extend((0..10).map(|id| chunk(&json!({"content": "x"}), 10 + id)));
    let answers = vec![Answer::Events(50, list, Last::Done), rest()];
    let (chain, engines) = chain(&fleet, json!({"stall_ms": 400}), answers);
    let (text, _) = ask(&chain, json!({})).await;
    assert!(text.ends_with("data: [DONE]\n\n"), "{text}");
    assert_eq!(engines.seen.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn a_stream_leaves_a_draining_engine_when_its_reasoning_is_over() {
    let fleet = fleet();
    fleet.change(0, |state| state.health = Health::Draining);
    let mut list = vec![opening()];
    list.extend((0..6).map(|id| chunk(&json!({"reasoning": "hm"}), 10 + id)));
    list.extend((0..20).map(|id| chunk(&json!({"content": "x"}), 20 + id)));
    let answers = vec![Answer::Events(50, list, Last::Done), rest()];
    let (chain, engines) = chain(&fleet, json!({"stall_ms": 400}), answers);
    let (text, error) = ask(&chain, json!({})).await;
    assert_eq!(error, None, "{text}");
    assert_eq!(engines.seen.lock().unwrap().len(), 2, "{text}");
    assert!(text.contains("\"b\""), "{text}");
}

#[tokio::test]
async fn a_stream_that_runs_does_not_stop_to_wait_for_a_place() {
    let fleet = fleet();
    let limits = json!({"stall_ms": 10_000, "budget_percent": 0, "min_resume_concurrency": 1});
    let broken = vec![Answer::Events(0, begun(), Last::Break), Answer::Nothing];
    let (first, engines) = chain(&fleet, limits.clone(), broken);
    let has_place = tokio::spawn(async move { ask(&first, json!({})).await });
    while engines.seen.lock().unwrap().len() < 2 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    fleet.change(0, |state| state.health = Health::Draining);
    let mut list = begun();
    // Long enough for several looks.
    list.extend((0..60).map(|id| chunk(&json!({"content": "x"}), 10 + id)));
    let (second, engines) = chain(
        &fleet,
        limits.clone(),
        vec![Answer::Events(50, list.clone(), Last::Done)],
    );
    let begins = Instant::now();
    let (text, error) = ask(&second, json!({})).await;
    assert_eq!(error, None, "{text}");
    assert!(begins.elapsed() < Duration::from_secs(9), "it waited");
    assert_eq!(engines.seen.lock().unwrap().len(), 1);

    let answers = vec![Answer::Events(50, list, Last::Done), rest()];
    let (third, engines) = chain(&fleet, limits, answers);
    let runs = tokio::spawn(async move { ask(&third, json!({})).await });
    // It has looked once, and stayed.
    tokio::time::sleep(Duration::from_millis(1_300)).await;
    assert_eq!(engines.seen.lock().unwrap().len(), 1);
    has_place.abort();
    let (text, error) = runs.await.unwrap();
    assert_eq!(error, None, "{text}");
    assert_eq!(engines.seen.lock().unwrap().len(), 2, "it looks again");
}

#[tokio::test]
async fn a_stream_that_could_not_leave_looks_again() {
    let fleet = fleet();
    fleet.change(0, |state| state.health = Health::Draining);
    let mut list = begun();
    list.extend((0..60).map(|id| chunk(&json!({"content": "x"}), 10 + id)));
    let mut answers = vec![Answer::Events(20, list, Last::Done)];
    answers.extend((0..3).map(|_| Answer::Status(503)));
    answers.push(rest());
    let (chain, engines) = chain(&fleet, json!({"stall_ms": 400}), answers);
    let (text, error) = ask(&chain, json!({})).await;
    assert_eq!(error, None, "{text}");
    assert!(text.contains("\"b\""), "{text}");
    assert_eq!(engines.seen.lock().unwrap().len(), 5);
}

#[tokio::test]
async fn what_held_a_stream_at_one_engine_does_not_hold_it_at_the_next() {
    let fleet = fleet();
    let mut list = begun();
    list.push(chunk(&json!({"content": "b"}), 4));
    // It is silent for too long, cannot move, goes on, and breaks.
    let mut answers = vec![Answer::Events(700, list, Last::Break)];
    answers.extend((0..3).map(|_| Answer::Status(503)));
    let silent = json!({"id": "x", "choices": [{"index": 0, "text": "c", "token_ids": [5]}]});
    answers.push(Answer::Events(0, vec![silent.to_string()], Last::Silence));
    answers.push(rest());
    let (chain, engines) = chain(&fleet, json!({"stall_ms": 200}), answers);
    let (text, error) = ask(&chain, json!({})).await;
    assert_eq!(error, None, "{text}");
    assert_eq!(engines.seen.lock().unwrap().len(), 6, "{text}");
}

#[tokio::test]
async fn a_long_prefill_is_no_stall() {
    let fleet = fleet();
    let last = || {
        json!({"id": "c", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
            .to_string()
    };
    let whole = || vec![opening(), chunk(&json!({"content": "a"}), 3), last()];
    let answers = vec![Answer::Prefill(1_000, whole())];
    let (first, engines) = chain(&fleet, json!({"stall_ms": 100}), answers);
    let (text, error) = ask(&first, json!({})).await;
    assert_eq!(error, None, "{text}");
    assert_eq!(engines.seen.lock().unwrap().len(), 1);
    // Elsewhere it has as long as the whole move.
    let moves = |prefill| {
        let rest = json!({"id": "x", "choices": [{"index": 0, "text": "b", "token_ids": [4], "finish_reason": "stop"}]});
        vec![
            Answer::Events(0, begun(), Last::Break),
            Answer::Prefill(prefill, vec![rest.to_string()]),
        ]
    };
    for (prefill, limit, whole) in [(1_000, 60_000, true), (60_000, 500, false)] {
        let limits = json!({"stall_ms": 100, "resume_timeout_ms": limit});
        let (chain, engines) = chain(&fleet, limits, moves(prefill));
        let (text, error) = ask(&chain, json!({})).await;
        assert_eq!(error.is_none(), whole, "{text} {error:?}");
        assert!(error.is_none_or(|told| told.ends_with("elsewhere: timeout")));
        assert_eq!(engines.seen.lock().unwrap().len(), 2, "{prefill}");
    }
}

#[tokio::test]
async fn a_prompt_whose_ids_make_no_event_is_not_asked_for_them() {
    let fleet = fleet();
    for (bytes, asked) in [(100, true), (200 << 10, false)] {
        let (chain, engines) = chain(&fleet, json!({}), vec![rest()]);
        let long = "x".repeat(bytes);
        ask(
            &chain,
            json!({"messages": [{"role": "user", "content": long}]}),
        )
        .await;
        let body = engines.seen.lock().unwrap()[0].1.clone();
        let text = std::str::from_utf8(&body).unwrap();
        assert_eq!(text.contains("return_token_ids"), asked, "{bytes}");
    }
}

#[tokio::test]
async fn the_length_of_a_context_is_known_when_its_engine_is_gone() {
    let mut state = vllm("");
    state.models[0].context_tokens = 100;
    let nobody = Arc::new(|_: &str, _: &[u8]| (StatusCode::NOT_FOUND, String::new()));
    let fleet = Fleet::new(&[Via::Local, Via::Local], &state, nobody);
    let answers = vec![Answer::Events(0, begun(), Last::Break), rest()];
    let (chain, engines) = chain(&fleet, json!({}), answers);
    // Whoever is asked first is no longer among the endpoints.
    let before = (Uri::from_static("/"), Bytes::new());
    *engines.seen.lock().unwrap() = vec![before.clone(), before];
    let (text, error) = ask(&chain, json!({})).await;
    assert_eq!(error, None, "{text}");
    let moved = engines.seen.lock().unwrap()[3].1.clone();
    let moved: Value = serde_json::from_slice(&moved).unwrap();
    assert_eq!(moved["max_tokens"], 97, "two of the prompt, one told");
}

#[tokio::test]
async fn a_tokenizer_that_no_engine_confirmed_proves_nothing() {
    let files = concat!(env!("CARGO_MANIFEST_DIR"), "/../conformance/assets");
    let mut state = vllm(files);
    state.kind = EngineKind::Sglang;
    let nobody = Arc::new(|_: &str, _: &[u8]| (StatusCode::NOT_FOUND, String::new()));
    let fleet = Fleet::new(&[Via::Local, Via::Local], &state, nobody);
    let told = json!({"id": "c", "choices": [{"index": 0, "delta": {"content": "The sky"}}]});
    let broken = || Answer::Events(0, vec![told.to_string()], Last::Break);
    let answers = std::iter::repeat_with(broken).take(100).collect();
    let (chain, engines) = chain(&fleet, json!({}), answers);
    let mut asked = 0;
    let told = loop {
        let (_, error) = ask(&chain, json!({"max_tokens": 9})).await;
        let told = error.unwrap();
        asked += 1;
        // Until the tokenizer is loaded, nobody knows the prompt.
        if !told.ends_with("elsewhere: no_token_ids") || asked == 100 {
            break told;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    assert!(told.ends_with("elsewhere: not_verified"), "{told}");
    assert_eq!(engines.seen.lock().unwrap().len(), asked, "none moved");
    assert!(
        fleet.paths().contains(&"/tokenize".to_owned()),
        "it was asked"
    );
}

/// An engine that answers in one piece, at once.
struct InOnePiece;

impl HttpFilter for InOnePiece {
    fn handle<'a>(
        &'a self,
        _: Request<RequestBody>,
        _: &'a mut Context,
        _: Next<'a>,
    ) -> Handled<'a> {
        let head = Response::builder().header("content-type", "application/json");
        let answer = head.body(full("{\"choices\":[]}")).unwrap();
        Box::pin(std::future::ready(Ok(answer)))
    }
}

/// `cargo test -p outrigger-filters --release --test filters -- --ignored --nocapture the_cost_of_a_whole_answer`
#[tokio::test]
#[ignore = "prints figures"]
async fn the_cost_of_a_whole_answer() {
    let fleet = fleet();
    let (with, _) = chain(&fleet, json!({}), Vec::new());
    let with: Chain = vec![with[0].clone(), Arc::new(InOnePiece)].into();
    let without: Chain = vec![Arc::new(InOnePiece) as Arc<dyn HttpFilter>].into();
    for (name, chain) in [("without", without), ("with", with)] {
        let mut best = Duration::MAX;
        for _ in 0..200 {
            let begun = Instant::now();
            for _ in 0..100 {
                std::hint::black_box(read(&chain, json!({"stream": false})).await);
            }
            best = best.min(begun.elapsed() / 100);
        }
        println!("{name} migration: {} ns a request", best.as_nanos());
    }
}
