//! Streams of a real vLLM 0.32, cut and continued as they were recorded.

use super::{
    budget::{Held, Shared},
    cause::Cause,
    recipe::{self, Asked, Way},
    rewrite,
    splice::Splice,
};
use crate::{
    openai::{Api, OpenAiRequest, StreamLimits},
    sse,
};
use bytes::BytesMut;
use serde_json::{Value, json};
use std::sync::Arc;

fn recording(name: &str) -> Value {
    let path = format!(
        "{}/../conformance/fixtures/migration/{name}.json",
        env!("CARGO_MANIFEST_DIR")
    );
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

pub(super) fn splice(asked: &Asked) -> Splice {
    let shared = Arc::<Shared>::default();
    Splice::new(
        Asked {
            choices: 1,
            ..asked.clone()
        },
        Held::new(shared, 1 << 20),
    )
}

pub(super) fn raw(chunk: &Value) -> Vec<u8> {
    format!("data: {chunk}\n\n").into_bytes()
}

pub(super) fn text_of(out: &[u8]) -> String {
    let events = std::str::from_utf8(out).unwrap().split("\n\n");
    let chunks = events.filter_map(|event| event.strip_prefix("data: {"));
    chunks
        .map(|rest| serde_json::from_str::<Value>(&format!("{{{rest}")).unwrap())
        .map(|chunk| {
            let choice = &chunk["choices"][0];
            let text = choice["delta"]["content"].as_str();
            text.or(choice["text"].as_str())
                .unwrap_or_default()
                .to_owned()
        })
        .collect()
}

pub(super) fn chunk(text: &str, ids: &[u64]) -> Vec<u8> {
    raw(
        &json!({"id": "c", "choices": [{"index": 0, "text": text, "token_ids": ids,
        "finish_reason": null, "prompt_token_ids": [1, 2, 3]}]}),
    )
}

#[test]
fn a_recorded_chat_goes_on_as_recorded_completions() {
    let whole = recording("reference_stream");
    let whole: Vec<_> = whole.as_array().unwrap().iter().map(raw).collect();
    let mut undisturbed = BytesMut::new();
    let chat = Asked {
        chat: true,
        ..Asked::default()
    };
    let mut stream = splice(&chat);
    for event in &whole {
        stream.admit(event, &mut undisturbed).unwrap();
    }
    for kept in [1, 13, 27, 39] {
        let mut stream = splice(&chat);
        let mut out = BytesMut::new();
        // The opening chunk, and a token a chunk.
        for event in &whole[..=kept] {
            stream.admit(event, &mut out).unwrap();
        }
        let cut = stream.cut();
        assert_eq!(
            (cut.tokens, cut.again_tokens, cut.again_chars),
            (kept, 0, 0)
        );
        let rest = recording(&format!("completions_ids_K{kept}"));
        let prompt = &rest[0]["choices"][0]["prompt_token_ids"];
        let sequence = String::from_utf8(stream.sequence(&cut)).unwrap();
        assert_eq!(format!("[{sequence}]"), prompt.to_string());
        stream.go_on(&cut, Way::Completions);
        for event in rest.as_array().unwrap() {
            stream.admit(&raw(event), &mut out).unwrap();
        }
        assert_eq!(text_of(&out), text_of(&undisturbed), "{kept}");
        assert!(stream.is_finished());
        let text = String::from_utf8(out.to_vec()).unwrap();
        assert!(!text.contains("token_ids\":[") && !text.contains("text_completion"));
        assert_eq!(text.matches("\"role\"").count(), 1);
    }
}

#[test]
fn the_recorded_pieces_of_an_emoji_are_not_cut() {
    let recorded = recording("boundary_and_sampling");
    let mut stream = splice(&Asked::default());
    let mut out = BytesMut::new();
    let mut cuts = Vec::new();
    for event in recorded["emoji_ref"].as_array().unwrap() {
        let ids: Vec<u64> = serde_json::from_value(event[1].clone()).unwrap();
        let event = chunk(event[0].as_str().unwrap(), &ids);
        stream.admit(&event, &mut out).unwrap();
        cuts.push(stream.cut().tokens);
    }
    assert_eq!(
        cuts[..5],
        [0, 0, 3, 4, 5],
        "never behind its first two tokens"
    );
}

#[test]
fn with_stop_strings_the_cut_is_where_all_text_was_told() {
    let recorded = recording("boundary_and_sampling");
    // "answer is" holds eight characters back.
    let mut stream = splice(&Asked {
        margin: 8,
        lag: 8,
        ..Asked::default()
    });
    let mut out = BytesMut::new();
    // What the tokens say: " Paris", ".", "\n", "\n", "The", " answer".
    let lengths = [6, 1, 1, 1, 3, 7];
    for (at, event) in recorded["stop"]["ref"].as_array().unwrap()[..6]
        .iter()
        .enumerate()
    {
        let ids: Vec<u64> = serde_json::from_value(event[1].clone()).unwrap();
        let event = chunk(event[0].as_str().unwrap(), &ids);
        stream.admit(&event, &mut out).unwrap();
        let cut = stream.cut();
        let kept: usize = lengths[..cut.tokens].iter().sum();
        let delivered = text_of(&out).len();
        assert!(kept <= delivered, "{at}: {cut:?}");
        assert_eq!(kept + cut.again_chars, delivered, "{at}: {cut:?}");
        assert_eq!(cut.tokens + cut.again_tokens, at + 1);
    }
    assert_eq!(
        stream.cut().tokens,
        4,
        "11 characters are told, 9 are whole tokens"
    );
}

#[test]
fn what_is_generated_again_is_told_once_or_not_at_all() {
    let asked = Asked {
        margin: 2,
        lag: 2,
        ids: true,
        ..Asked::default()
    };
    let begin = || {
        let mut stream = splice(&asked);
        let mut out = BytesMut::new();
        // "abc", "defg", "hi" with two characters held back.
        for (text, ids) in [("a", [1]), ("bcde", [2]), ("fg", [3])] {
            stream.admit(&chunk(text, &ids), &mut out).unwrap();
        }
        let cut = stream.cut();
        assert_eq!((cut.tokens, cut.again_tokens, cut.again_chars), (2, 1, 0));
        stream.go_on(&cut, Way::Completions);
        (stream, BytesMut::new())
    };
    let (mut stream, mut out) = begin();
    stream.admit(&chunk("", &[3]), &mut out).unwrap();
    assert!(out.is_empty(), "the client has seen this id");
    stream.admit(&chunk("hij", &[4]), &mut out).unwrap();
    assert_eq!(text_of(&out), "hij");
    assert!(String::from_utf8_lossy(&out).contains("\"token_ids\":[4]"));
    let (mut stream, mut out) = begin();
    let other = stream.admit(&chunk("", &[7]), &mut out);
    assert!(matches!(other, Err(Cause::Diverged)));
}

#[test]
fn an_engine_that_ignores_the_tokens_is_found_out() {
    let opening = |ids: &[u64]| {
        raw(
            &json!({"id": "c", "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}],
            "prompt_token_ids": ids}),
        )
    };
    let content = |text: &str, id: u64| {
        raw(
            &json!({"id": "c", "choices": [{"index": 0, "delta": {"content": text}, "token_ids": [id]}]}),
        )
    };
    let begin = || {
        let mut stream = splice(&Asked {
            chat: true,
            ..Asked::default()
        });
        let mut out = BytesMut::new();
        stream.admit(&opening(&[1, 2]), &mut out).unwrap();
        stream.admit(&content("x", 3), &mut out).unwrap();
        stream.go_on(&stream.cut(), Way::Entrance);
        stream
    };
    let mut out = BytesMut::new();
    let ignored = begin().admit(&opening(&[1, 2]), &mut out);
    assert!(matches!(ignored, Err(Cause::Unproven)));
    let mut stream = begin();
    stream.admit(&opening(&[1, 2, 3]), &mut out).unwrap();
    stream.admit(&content("y", 4), &mut out).unwrap();
    assert_eq!(text_of(&out), "y");
    assert!(!String::from_utf8_lossy(&out).contains("role"));
}

#[test]
fn an_error_that_blames_the_request_is_no_reason_to_move() {
    let mut out = BytesMut::new();
    let said = |code: u64| raw(&json!({"error": {"message": "no", "code": code}}));
    let mut stream = splice(&Asked::default());
    assert!(matches!(
        stream.admit(&said(500), &mut out),
        Err(Cause::Error(_))
    ));
    stream.admit(&said(400), &mut out).unwrap();
    assert!(!out.is_empty());
}

#[test]
fn a_finished_stream_is_completed_here() {
    let mut stream = splice(&Asked {
        usage: true,
        ..Asked::default()
    });
    let mut out = BytesMut::new();
    stream.admit(&chunk("a", &[5]), &mut out).unwrap();
    let last = json!({"id": "c", "choices": [{"index": 0, "text": "b", "token_ids": [6], "finish_reason": "length"}]});
    stream.admit(&raw(&last), &mut out).unwrap();
    let mut rest = BytesMut::new();
    assert!(stream.complete(&mut rest));
    let rest = String::from_utf8(rest.to_vec()).unwrap();
    let (usage, done) = rest.split_once("\n\n").unwrap();
    let usage: Value = serde_json::from_str(usage.strip_prefix("data: ").unwrap()).unwrap();
    assert_eq!(
        usage["usage"],
        json!({"prompt_tokens": 3, "total_tokens": 5, "completion_tokens": 2})
    );
    assert_eq!(done, "data: [DONE]\n\n");
}

/// `cargo test -p outrigger-filters --release -- --ignored --nocapture the_cost_of_an_event`
#[test]
#[ignore = "prints figures"]
fn the_cost_of_an_event() {
    let whole = recording("reference_stream");
    let whole: Vec<_> = whole.as_array().unwrap().iter().map(raw).collect();
    let chat = Asked {
        chat: true,
        ..Asked::default()
    };
    let nanoseconds = |work: &mut dyn FnMut(&[u8])| {
        let rounds = (0..2_000).map(|_| {
            let begun = std::time::Instant::now();
            whole.iter().for_each(|event| work(event));
            begun.elapsed().as_nanos() as usize / whole.len()
        });
        rounds.min().unwrap_or_default()
    };
    let mut stream = splice(&chat);
    let spliced = nanoseconds(&mut |event| {
        let mut out = BytesMut::with_capacity(event.len());
        stream.admit(event, &mut out).unwrap();
        std::hint::black_box(out.freeze());
    });
    let copied = nanoseconds(&mut |event| {
        std::hint::black_box(BytesMut::from(event).freeze());
    });
    let mut stream = splice(&chat);
    let mut out = BytesMut::new();
    for event in &whole[..40] {
        stream.admit(event, &mut out).unwrap();
    }
    let held = stream.sequence(&stream.cut()).len() as f64 / (47.0 + 39.0);
    println!("{spliced} ns an event, of which {copied} ns are a copy; {held:.1} bytes a token");
}

#[test]
fn an_event_of_several_tokens_is_no_place_to_cut_behind() {
    let mut stream = splice(&Asked::default());
    let mut out = BytesMut::new();
    // The second is the first piece of a character.
    stream.admit(&chunk("a", &[5, 15107]), &mut out).unwrap();
    let cut = stream.cut();
    assert_eq!(
        (cut.tokens, cut.again_tokens, cut.again_chars),
        (0, 2, 1),
        "its text may lack what its last token says"
    );
    stream.admit(&chunk("é", &[6]), &mut out).unwrap();
    assert_eq!(stream.cut().tokens, 3, "here all is told");
}

#[test]
fn a_batch_is_not_finished_by_its_first_prompt() {
    let body = json!({"model": "m", "stream": true, "prompt": ["a", "b"]}).to_string();
    let openai = OpenAiRequest::parse(Api::Completions, &body.into(), StreamLimits::default());
    let mut stream = Splice::new(
        recipe::asked(&openai.unwrap()),
        Held::new(Arc::default(), 1 << 20),
    );
    let mut out = BytesMut::new();
    let last = json!({"id": "c", "choices": [{"index": 0, "text": "b", "token_ids": [6], "finish_reason": "length"}]});
    stream.admit(&raw(&last), &mut out).unwrap();
    assert!(!stream.is_finished(), "the other prompt has nothing yet");
}

#[test]
fn what_nobody_was_shown_may_be_drawn_anew() {
    let begin = |asked: &Asked| {
        let mut stream = splice(asked);
        let mut out = BytesMut::new();
        stream.admit(&chunk("a", &[1]), &mut out).unwrap();
        // A piece of a character.
        stream.admit(&chunk("", &[2]), &mut out).unwrap();
        stream.go_on(&stream.cut(), Way::Completions);
        stream
    };
    let mut out = BytesMut::new();
    let mut stream = begin(&Asked::default());
    stream.admit(&chunk("b", &[7]), &mut out).unwrap();
    assert_eq!(text_of(&out), "b");
    let mut shown = begin(&Asked {
        ids: true,
        ..Asked::default()
    });
    let other = shown.admit(&chunk("b", &[7]), &mut out);
    assert!(matches!(other, Err(Cause::Diverged)), "2 was shown");
}

#[test]
fn ids_figures_and_reasons_that_were_shown_are_a_beginning() {
    let admit = |asked: Asked, event: Value| {
        let mut stream = splice(&asked);
        let mut out = BytesMut::new();
        stream.admit(&raw(&event), &mut out).unwrap();
        stream.began
    };
    let ids = Asked {
        ids: true,
        ..Asked::default()
    };
    let piece = json!({"choices": [{"text": "", "token_ids": [9], "prompt_token_ids": [1]}]});
    assert!(admit(ids, piece.clone()) && !admit(Asked::default(), piece));
    let figures = json!({"choices": [{"text": "", "logprobs": {"tokens": ["x"]}, "token_ids": [9], "prompt_token_ids": [1]}]});
    assert!(admit(Asked::default(), figures));
    let reason = json!({"choices": [{"text": "", "finish_reason": "stop"}]});
    assert!(admit(Asked::default(), reason));
}

#[test]
fn text_that_follows_is_told_although_ids_are_no_longer_held() {
    let mut stream = Splice::new(
        Asked {
            choices: 1,
            margin: 2,
            ..Asked::default()
        },
        // Enough for the beginning.
        Held::new(Arc::default(), 4 << 10),
    );
    let mut out = BytesMut::new();
    stream.admit(&chunk("abc", &[1]), &mut out).unwrap();
    stream.admit(&chunk("d", &[2]), &mut out).unwrap();
    let cut = stream.cut();
    assert_eq!((cut.tokens, cut.again_chars), (0, 4));
    stream.go_on(&cut, Way::Restart);
    out.clear();
    stream.forget("memory");
    for (text, id) in [("abc", 1), ("d", 2), ("e", 3), ("f", 4)] {
        stream.admit(&chunk(text, &[id]), &mut out).unwrap();
    }
    assert_eq!(text_of(&out), "ef");
}

#[test]
fn a_stream_of_no_chunks_is_not_whole() {
    let mut stream = splice(&Asked::default());
    assert!(!stream.may_end());
    stream.admit(b": ping\n\n", &mut BytesMut::new()).unwrap();
    assert!(!stream.may_end());
}

#[test]
fn usage_that_comes_with_each_chunk_is_not_the_account() {
    let mut stream = splice(&Asked {
        usage: true,
        ..Asked::default()
    });
    let mut out = BytesMut::new();
    let last = json!({"id": "c", "choices": [{"index": 0, "text": "b", "token_ids": [6], "finish_reason": "length",
        "prompt_token_ids": [1, 2]}], "usage": {"prompt_tokens": 2, "total_tokens": 3, "completion_tokens": 1}});
    stream.admit(&raw(&last), &mut out).unwrap();
    out.clear();
    assert!(stream.complete(&mut out));
    let rest = String::from_utf8_lossy(&out);
    assert!(rest.contains("\"choices\":[],\"usage\""), "{rest}");
}

/// As vLLM 0.32 does it: its `DeltaMessage(content=delta_text)` is always sent, a parser's `None` only with ids or figures.
#[test]
fn only_what_a_parser_kept_to_itself_is_kept_from_who_asked_for_no_ids() {
    let said = |delta: Value, logprobs: Value| {
        raw(
            &json!({"id": "c", "choices": [{"index": 0, "delta": delta, "logprobs": logprobs,
            "finish_reason": null, "token_ids": [3]}], "prompt_token_ids": [1, 2]}),
        )
    };
    let figures = json!({"content": [{"token": "x", "logprob": -1, "bytes": [195]}]});
    for (delta, logprobs, told) in [
        (json!({"content": ""}), Value::Null, true),
        (json!({}), figures, true),
        (json!({}), Value::Null, false),
    ] {
        let event = said(delta.clone(), logprobs.clone());
        let chat = Asked {
            chat: true,
            ..Asked::default()
        };
        let mut stream = splice(&chat);
        let mut out = BytesMut::new();
        stream.admit(&event, &mut out).unwrap();
        assert_eq!(!out.is_empty(), told, "{delta} {logprobs}");
        // Nor where a chunk is written anew.
        out.clear();
        let form = rewrite::Form {
            head: b"{\"id\":\"c\",",
            chat: true,
            ids: false,
        };
        let data = sse::Event { raw: &event }.data();
        rewrite::event(data, &form, &rewrite::Skip::default(), &mut out).unwrap();
        assert_eq!(!out.is_empty(), told, "{delta} {logprobs}, written anew");
        if told {
            let text = String::from_utf8_lossy(&out);
            assert!(text.contains(&format!("\"delta\":{delta}")), "{text}");
        }
    }
}

fn completion(more: &Value) -> Arc<OpenAiRequest> {
    let mut body = json!({"model": "m", "stream": true, "prompt": "a"});
    for (name, value) in more.as_object().unwrap() {
        body[name] = value.clone();
    }
    let body = body.to_string().into();
    let openai = OpenAiRequest::parse(Api::Completions, &body, StreamLimits::default());
    Arc::new(openai.unwrap())
}

fn rules(may_risk: bool) -> recipe::Rules {
    recipe::Rules {
        same_distribution: false,
        context_tokens: 0,
        lag_is_known: true,
        may_risk,
        has_our_seed: false,
        told_none: false,
    }
}

#[test]
fn what_no_engine_can_follow_begins_anew_where_it_can_be_compared() {
    for (field, value, reason) in [
        ("ebnf", json!("root ::= x"), "guided"),
        ("structural_tag", json!("{}"), "guided"),
        ("stop_regex", json!("a+"), "stop"),
        ("bad_words", json!(["x"]), "logit_state"),
        ("presence_penalty", json!(1), "penalties"),
        ("thinking_token_budget", json!(9), "thinking_budget"),
    ] {
        let mut stream = splice(&Asked::default());
        stream
            .admit(&chunk("a", &[1]), &mut BytesMut::new())
            .unwrap();
        let drawn = completion(&json!({(field): value}));
        let refused = recipe::recipe(&drawn, &stream, &rules(true)).unwrap_err();
        assert_eq!(refused, reason, "{field}");
        let greedy = completion(&json!({"temperature": 0, (field): value}));
        let runs = recipe::recipe(&greedy, &stream, &rules(false)).unwrap_err();
        assert_eq!(runs, reason, "a stream that runs is not risked");
        for determined in [
            json!({"temperature": 0, (field): value}),
            json!({"seed": 1, (field): value}),
        ] {
            let determined = completion(&determined);
            let anew = recipe::recipe(&determined, &stream, &rules(true)).unwrap();
            let again = (anew.cut.again_tokens, anew.cut.again_chars);
            assert_eq!((anew.way, anew.body, again), (Way::Restart, None, (1, 1)));
        }
    }
    let seeded = completion(&json!({"seed": 1}));
    let mut stream = splice(&Asked::default());
    stream
        .admit(&chunk("a", &[1]), &mut BytesMut::new())
        .unwrap();
    assert_eq!(
        recipe::recipe(&seeded, &stream, &rules(false)).unwrap_err(),
        "seed"
    );
    assert_eq!(
        recipe::recipe(&seeded, &stream, &rules(true)).unwrap().way,
        Way::Restart
    );
}

#[test]
fn a_call_that_is_made_again_is_told_once_or_not_at_all() {
    let event = |delta: Value, ids: &[u64]| {
        raw(
            &json!({"id": "c", "choices": [{"index": 0, "delta": delta, "token_ids": ids, "finish_reason": null}],
            "prompt_token_ids": [9]}),
        )
    };
    let call = |arguments: &str| json!({"tool_calls": [{"index": 0, "function": {"arguments": arguments}}]});
    let begin = || {
        let mut stream = splice(&Asked {
            chat: true,
            ..Asked::default()
        });
        let mut out = BytesMut::new();
        for (delta, id) in [
            (json!({"reasoning": "hm"}), 1),
            (json!({}), 2),
            (json!({"content": "well"}), 3),
            (call("{\"a"), 4),
        ] {
            stream.admit(&event(delta, &[id]), &mut out).unwrap();
        }
        let cut = stream.all_again();
        stream.go_on(&cut, Way::Restart);
        (stream, BytesMut::new())
    };
    let (mut stream, mut out) = begin();
    for (delta, id) in [
        (json!({"reasoning": "hm"}), 1),
        (json!({}), 2),
        (json!({"content": "well"}), 3),
        (call("{\"a"), 4),
    ] {
        stream.admit(&event(delta, &[id]), &mut out).unwrap();
        assert!(out.is_empty(), "the client has had it: {out:?}");
    }
    stream.admit(&event(call("\"}"), &[5]), &mut out).unwrap();
    assert_eq!(
        String::from_utf8_lossy(&out).matches("arguments").count(),
        1
    );
    for other in [
        event(json!({"reasoning": "hm"}), &[7]),
        event(json!({"reasoning": "hm, well"}), &[1, 2, 3, 4, 5]),
    ] {
        let (mut stream, mut out) = begin();
        let got = stream.admit(&other, &mut out);
        assert!(matches!(got, Err(Cause::Diverged)), "{got:?}");
        assert!(out.is_empty());
    }
}
