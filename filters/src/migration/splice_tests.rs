//! Streams that break again while what was told is generated again, and those that stay after all.

use super::{
    cause::Cause,
    recipe::{Asked, Way},
    splice::Splice,
    tests::{chunk, raw, splice, text_of},
    told::{Kept, Told},
};
use bytes::BytesMut;
use serde_json::json;

const WORDS: [(&str, u64); 5] = [("a", 11), ("b", 12), ("c", 13), ("d", 14), ("e", 15)];

fn tell(stream: &mut Splice, out: &mut BytesMut, words: &[(&str, u64)]) -> Result<(), Cause> {
    words
        .iter()
        .try_for_each(|(text, id)| stream.admit(&chunk(text, &[*id]), out))
}

/// Told five words; the next engine repeats some of them and breaks.
fn broken_twice(repeated: usize, out: &mut BytesMut) -> Splice {
    let mut stream = splice(&Asked::default());
    tell(&mut stream, out, &WORDS).unwrap();
    let cut = stream.all_again();
    stream.go_on(&cut, Way::Restart);
    tell(&mut stream, out, &WORDS[..repeated]).unwrap();
    assert_eq!(text_of(out), "abcde");
    assert_eq!(stream.tokens_told(), 5, "{repeated}");
    stream
}

#[test]
fn a_second_break_forgets_nothing_of_what_was_told() {
    for repeated in 0..=5 {
        let mut out = BytesMut::new();
        let mut stream = broken_twice(repeated, &mut out);
        let cut = stream.all_again();
        assert_eq!((cut.again_tokens, cut.again_chars), (5, 5), "{repeated}");
        stream.go_on(&cut, Way::Restart);
        tell(&mut stream, &mut out, &WORDS).unwrap();
        assert_eq!(text_of(&out), "abcde", "{repeated}");
        tell(&mut stream, &mut out, &[("f", 16)]).unwrap();
        assert_eq!(text_of(&out), "abcdef", "{repeated}");
    }
}

#[test]
fn behind_the_tokens_that_were_repeated_the_others_are_still_compared() {
    for repeated in 1..5 {
        let mut out = BytesMut::new();
        let mut stream = broken_twice(repeated, &mut out);
        let cut = stream.cut();
        assert_eq!((cut.tokens, cut.again_tokens), (repeated, 5 - repeated));
        stream.go_on(&cut, Way::Completions);
        let other = [("x", 99)];
        let told = tell(&mut stream, &mut out, &other);
        assert!(matches!(told, Err(Cause::Diverged)), "{repeated}: {told:?}");
    }
}

#[test]
fn a_call_is_not_told_twice_after_a_second_break() {
    let call = |id: u64| {
        let delta = json!({"tool_calls": [{"index": 0, "function": {"arguments": "1"}}]});
        raw(
            &json!({"id": "c", "choices": [{"index": 0, "delta": delta, "token_ids": [id]}],
            "prompt_token_ids": [1, 2, 3]}),
        )
    };
    let asked = Asked {
        chat: true,
        ..Asked::default()
    };
    let mut stream = splice(&asked);
    let mut out = BytesMut::new();
    for id in 10..15 {
        stream.admit(&call(id), &mut out).unwrap();
    }
    let told = out.clone();
    for repeated in [10..12, 10..10, 10..15] {
        let cut = stream.all_again();
        stream.go_on(&cut, Way::Restart);
        for id in repeated {
            stream.admit(&call(id), &mut out).unwrap();
        }
        assert_eq!(out, told);
    }
}

#[test]
fn reasoning_behind_the_last_mark_is_known() {
    let thought = |ids: &[u64]| {
        let choice = json!({"index": 0, "delta": {"reasoning": "hm"}, "token_ids": ids});
        raw(&json!({"id": "c", "choices": [choice], "prompt_token_ids": [1]}))
    };
    let mut stream = splice(&Asked {
        chat: true,
        ..Asked::default()
    });
    let mut out = BytesMut::new();
    for (ids, since) in [(&[5][..], false), (&[6, 7], true), (&[8], false)] {
        stream.admit(&thought(ids), &mut out).unwrap();
        assert_eq!(stream.reasoned_since, since, "{ids:?}");
    }
    assert_eq!(stream.cut().tokens, 4);
}

#[test]
fn a_stream_that_stays_keeps_its_text() {
    let silent = |text: &str| raw(&json!({"id": "c", "choices": [{"index": 0, "text": text}]}));
    let mut stream = splice(&Asked::default());
    stream.keep_text(Kept::new(None, true, false));
    let mut out = BytesMut::new();
    stream.admit(&silent("ab"), &mut out).unwrap();
    let told = Told {
        prompt: [1, 2].into(),
        ids: vec![7, 8],
    };
    let kept = stream.retell(&told).unwrap();
    assert_eq!((stream.cut().tokens, stream.is_retold), (2, true));
    stream.untell(kept);
    stream.admit(&silent("c"), &mut out).unwrap();
    assert_eq!((stream.untold, stream.is_retold), (None, false));
    let kept = stream.kept.as_ref().unwrap();
    assert_eq!(kept.bytes(), 3 + 8, "its text, and the ids of its prompt");
}
