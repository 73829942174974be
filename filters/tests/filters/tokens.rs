//! Token ids: which source is used, when it is trusted, what happens when it fails.

use crate::fleet::{Engine, Fleet, recording, small_model, vllm};
use bytes::Bytes;
use http::{HeaderMap, StatusCode};
use outrigger_filters::{
    endpoints::Via,
    openai::{Api, OpenAiRequest, StreamLimits},
    tokens::{How, Source, Tokenized, Tokenizers, TokenizersConfig, Unavailable},
};
use outrigger_xds::report::EngineKind;
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

fn request(api: Api, body: &str) -> Arc<OpenAiRequest> {
    Arc::new(
        OpenAiRequest::parse(
            api,
            &Bytes::copy_from_slice(body.as_bytes()),
            StreamLimits::default(),
        )
        .unwrap(),
    )
}

fn chat(content: &str) -> Arc<OpenAiRequest> {
    let body =
        serde_json::json!({"model": "m", "messages": [{"role": "user", "content": content}]});
    request(Api::Chat, &body.to_string())
}

async fn tokens(
    fleet: &Fleet,
    request: &Arc<OpenAiRequest>,
    ask: bool,
) -> Result<Tokenized, Unavailable> {
    let mut headers = HeaderMap::new();
    headers.insert("authorization", "Bearer k".parse().unwrap());
    headers.insert("x-request-id", "r".parse().unwrap());
    let source = Source {
        endpoint: &fleet.endpoints[0],
        headers: &headers,
        ask,
        services: &fleet.services,
    };
    fleet.services.tokenizers.tokens(request, source).await
}

/// Answers with what a real vLLM answered.
fn recorded() -> Engine {
    Arc::new(|path, _| match path {
        "/v1/chat/completions/render" => (StatusCode::OK, recording("chat_render.body")),
        "/tokenize" => (StatusCode::OK, recording("tokenize_chat.body")),
        _ => (StatusCode::NOT_FOUND, "{\"detail\":\"Not Found\"}".into()),
    })
}

#[tokio::test]
async fn ids_in_the_request_are_exact_at_once() {
    let fleet = Fleet::new(&[Via::Local], &vllm(""), recorded());
    let ids: Vec<u32> = (0..5000).collect();
    for body in [
        format!("{{\"model\":\"m\",\"prompt\":{ids:?}}}"),
        format!("{{\"model\":\"m\",\"prompt\":[{ids:?}]}}"),
    ] {
        let got = tokens(&fleet, &request(Api::Completions, &body), false)
            .await
            .unwrap();
        assert_eq!((got.how, &*got.ids), (How::Ids, &ids[..]));
    }
    assert!(fleet.paths().is_empty());
}

#[tokio::test]
async fn the_engine_renders_and_an_exact_repeat_is_not_asked_again() {
    let fleet = Fleet::new(&[Via::Peer], &vllm(""), recorded());
    let recorded = request(Api::Chat, &recording("chat_render.request.json"));
    let first = tokens(&fleet, &recorded, true).await.unwrap();
    assert_eq!((first.how, first.ids.len()), (How::Render, 34));
    let again = tokens(&fleet, &recorded, false).await.unwrap();
    assert_eq!((again.how, &again.ids), (How::Remembered, &first.ids));
    let asked = fleet.asked.lock().unwrap()[0].clone();
    assert_eq!(asked.endpoint.0.as_ref(), "e0");
    assert_eq!(
        asked.headers["x-outrigger-endpoint"], "e0",
        "the proxy beside it must know which engine"
    );
    assert_eq!(asked.headers["authorization"], "Bearer k");
    assert!(
        !asked.headers.contains_key("x-request-id"),
        "vLLM forbids using one twice at once"
    );
    assert_eq!(
        tokens(&fleet, &chat("other"), false).await,
        Err(Unavailable::NotAsked)
    );
}

#[tokio::test]
async fn a_refused_render_is_remembered_and_tokenize_is_asked_instead() {
    let engine: Engine = Arc::new(|path, body| match path {
        "/tokenize" => {
            let body: serde_json::Value = serde_json::from_slice(body).unwrap();
            assert_eq!(body["messages"][0]["role"], "user");
            (StatusCode::OK, "{\"count\":2,\"tokens\":[7,8]}".into())
        }
        _ => (
            StatusCode::FORBIDDEN,
            recording("inference_generate_disabled_403.body"),
        ),
    });
    let fleet = Fleet::new(&[Via::Local], &vllm(""), engine);
    for text in ["a", "b"] {
        let got = tokens(&fleet, &chat(text), true).await.unwrap();
        assert_eq!((got.how, &*got.ids), (How::Tokenize, &[7, 8][..]));
    }
    assert_eq!(
        fleet.paths(),
        ["/v1/chat/completions/render", "/tokenize", "/tokenize"]
    );
}

#[tokio::test]
async fn sglang_is_asked_to_tokenize_only() {
    let fleet = Fleet::new(&[Via::Local], &vllm(""), recorded());
    fleet.change(0, |state| state.kind = EngineKind::Sglang);
    let got = tokens(&fleet, &chat("x"), true).await.unwrap();
    assert_eq!((got.how, got.ids.len()), (How::Tokenize, 34));
    assert_eq!(fleet.paths(), ["/tokenize"]);
}

#[tokio::test]
async fn what_cannot_be_exact_says_why() {
    let fleet = Fleet::new(
        &[Via::Local],
        &vllm(""),
        Arc::new(|_, _| (StatusCode::INTERNAL_SERVER_ERROR, "x".into())),
    );
    let image = r#"{"model":"m","messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"x"}}]}]}"#;
    let cases = [
        (request(Api::Chat, image), Unavailable::Media),
        (
            request(Api::Completions, r#"{"model":"m","prompt":["a","b"]}"#),
            Unavailable::Batch,
        ),
        (
            request(
                Api::Completions,
                r#"{"model":"m","prompt":"a","truncate_prompt_tokens":5}"#,
            ),
            Unavailable::Opaque,
        ),
        (
            request(Api::Completions, r#"{"model":"m"}"#),
            Unavailable::NoPrompt,
        ),
        (
            request(Api::Embeddings, r#"{"model":"m","input":"a"}"#),
            Unavailable::UnsupportedApi,
        ),
        (chat("x"), Unavailable::EngineFailed),
    ];
    for (request, expected) in cases {
        assert_eq!(tokens(&fleet, &request, true).await, Err(expected));
    }
    let media: Engine = Arc::new(|_, _| {
        (
            StatusCode::OK,
            r#"{"token_ids":[1],"features":{"mm_hashes":{"image":["a"]}}}"#.into(),
        )
    });
    let fleet = Fleet::new(&[Via::Local], &vllm(""), media);
    assert_eq!(
        tokens(&fleet, &chat("x"), true).await,
        Err(Unavailable::Media)
    );
    let rejects: Engine =
        Arc::new(|_, _| (StatusCode::BAD_REQUEST, recording("err_no_messages.body")));
    let fleet = Fleet::new(&[Via::Local], &vllm(""), rejects);
    assert_eq!(
        tokens(&fleet, &chat("x"), true).await,
        Err(Unavailable::EngineRejected)
    );
}

/// An engine that tokenises with a local tokenizer of its own, as long as `honest`; then its template differs.
fn twin(honest: Arc<AtomicBool>) -> Engine {
    let tokenizer = fastokens::Tokenizer::from_file(&small_model().join("tokenizer.json")).unwrap();
    Arc::new(move |path, body| {
        let body: serde_json::Value = serde_json::from_slice(body).unwrap();
        let mut text = match path {
            "/v1/completions/render" => body["prompt"].as_str().unwrap().to_owned(),
            _ => chatml(&body["messages"]),
        };
        if !honest.load(Relaxed) {
            text.push('!');
        }
        let special = path == "/v1/completions/render";
        let ids = tokenizer
            .encode_with_special_tokens(&text, special)
            .unwrap();
        let answer = serde_json::json!({"token_ids": ids, "features": null});
        let answer = if special {
            serde_json::json!([answer])
        } else {
            answer
        };
        (StatusCode::OK, answer.to_string())
    })
}

/// The project's small template, written out by hand.
fn chatml(messages: &serde_json::Value) -> String {
    let source = std::fs::read_to_string(small_model().join("chat_template.jinja")).unwrap();
    let mut environment = minijinja::Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.add_template("t", &source).unwrap();
    let config = std::fs::read(small_model().join("tokenizer_config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_slice(&config).unwrap();
    let context = minijinja::context! {
        messages => minijinja::Value::from_serialize(messages),
        add_generation_prompt => true,
        bos_token => config["bos_token"].as_str(),
        eos_token => config["eos_token"].as_str(),
    };
    environment
        .get_template("t")
        .unwrap()
        .render(context)
        .unwrap()
}

/// Asks until the local tokenizer was loaded (in the background) and judged.
async fn settled(fleet: &Fleet) -> Tokenized {
    let mut last = None;
    for round in 0..200 {
        let got = tokens(
            fleet,
            &chat(&format!("Round {round}: what is an outrigger?")),
            true,
        )
        .await
        .unwrap();
        if got.how == How::Local {
            return got;
        }
        last = Some(got);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    last.unwrap()
}

#[tokio::test]
async fn a_local_tokenizer_is_used_once_it_agrees_with_the_engine() {
    let honest = Arc::new(AtomicBool::new(true));
    let root = small_model();
    let fleet = Fleet::new(&[Via::Local], &vllm(root.to_str().unwrap()), twin(honest));
    assert_eq!(settled(&fleet).await.how, How::Local);
    let asked = fleet.paths().len();
    for text in ["short", &"a long text, naïve 数字. ".repeat(1000)] {
        let request = chat(text);
        let got = tokens(&fleet, &request, false).await.unwrap();
        let tokenizer = fastokens::Tokenizer::from_file(&root.join("tokenizer.json")).unwrap();
        let rendered = chatml(&serde_json::json!([{"role": "user", "content": text}]));
        assert_eq!(
            *got.ids,
            *tokenizer.encode(&rendered).unwrap(),
            "{} bytes",
            text.len()
        );
        assert_eq!(got.how, How::Local);
    }
    assert_eq!(fleet.paths().len(), asked, "no engine was asked for these");
    let completion = request(
        Api::Completions,
        r#"{"model":"m-lora","prompt":"Once upon"}"#,
    );
    assert_eq!(
        tokens(&fleet, &completion, true).await.unwrap().how,
        How::Local,
        "an adapter has its base's tokenizer"
    );
}

#[tokio::test]
async fn a_local_tokenizer_that_disagrees_is_never_used() {
    let root = small_model();
    let fleet = Fleet::new(
        &[Via::Local],
        &vllm(root.to_str().unwrap()),
        twin(Arc::new(AtomicBool::new(false))),
    );
    assert_eq!(settled(&fleet).await.how, How::Render);
}

#[tokio::test]
async fn a_client_without_a_key_does_not_turn_the_local_tokenizer_off() {
    let root = small_model();
    for refusal in [401, 403, 429] {
        let refusing = Arc::new(AtomicBool::new(true));
        let twin = twin(Arc::new(AtomicBool::new(true)));
        let engine: Engine = {
            let refusing = refusing.clone();
            Arc::new(move |path, body| match refusing.load(Relaxed) {
                true => (StatusCode::from_u16(refusal).unwrap(), "{}".into()),
                false => twin(path, body),
            })
        };
        let mut fleet = Fleet::new(&[Via::Local], &vllm(root.to_str().unwrap()), engine);
        fleet.services.tokenizers = Arc::new(Tokenizers::new(TokenizersConfig {
            verify_again_after: Duration::from_millis(20),
            ..TokenizersConfig::default()
        }));
        // Only the probe asks the engine here.
        while fleet.paths().is_empty() {
            assert!(tokens(&fleet, &chat("x"), false).await.is_err());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        refusing.store(false, Relaxed);
        assert_eq!(settled(&fleet).await.how, How::Local, "after a {refusal}");
    }
}

#[tokio::test]
async fn a_client_that_is_not_let_in_says_nothing_of_the_engine() {
    for (status, expected) in [
        (StatusCode::UNAUTHORIZED, Unavailable::EngineDenied),
        (StatusCode::FORBIDDEN, Unavailable::EngineDenied),
        (StatusCode::TOO_MANY_REQUESTS, Unavailable::EngineFailed),
    ] {
        let engine: Engine = Arc::new(move |_, _| (status, "{}".into()));
        let fleet = Fleet::new(&[Via::Local], &vllm(""), engine);
        fleet.change(0, |state| state.kind = EngineKind::Sglang);
        for _ in 0..2 {
            let got = tokens(&fleet, &chat("x"), true).await;
            assert_eq!(got, Err(expected), "{status}");
        }
        assert_eq!(fleet.paths().len(), 2, "the next client is asked for");
    }
}

#[tokio::test]
async fn a_model_without_files_here_is_asked_of_its_engine() {
    let fleet = Fleet::new(&[Via::Local], &vllm("/nowhere/at/all"), recorded());
    for _ in 0..3 {
        assert_eq!(
            tokens(&fleet, &chat("x"), true).await.unwrap().ids.len(),
            34
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
