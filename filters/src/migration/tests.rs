//! Streams of a real vLLM 0.32, cut and continued as they were recorded.

use super::{
    budget::{Held, Shared},
    splice::{Asked, Cause, Splice, Way},
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

fn splice(asked: &Asked) -> Splice {
    let shared = Arc::<Shared>::default();
    Splice::new(
        Asked {
            choices: 1,
            ..asked.clone()
        },
        Held::new(shared, 1 << 20),
    )
}

fn raw(chunk: &Value) -> Vec<u8> {
    format!("data: {chunk}\n\n").into_bytes()
}

fn text_of(out: &[u8]) -> String {
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

fn chunk(text: &str, ids: &[u64]) -> Vec<u8> {
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
