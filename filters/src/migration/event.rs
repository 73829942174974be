//! What one event of a stream says, as places in its bytes: one pass over its strings, nothing copied.
//!
//! Keys count wherever they stand, together with the type of their value: no engine has a second `"token_ids":[` in an
//! event, and what looks like one inside a text has its quotes escaped.

use std::ops::Range;

/// Places in an event; ranges hold whole JSON values.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Facts {
    /// `choices[0].token_ids`, if it is a list.
    pub(super) ids: Option<Range<usize>>,
    /// `prompt_token_ids`, if it is a list.
    pub(super) prompt_ids: Option<Range<usize>>,
    /// `delta.content` or `text`, if it is a string; with its quotes.
    pub(super) text: Option<Range<usize>>,
    /// `finish_reason`, if it is a string; with its quotes.
    pub(super) finish: Option<Range<usize>>,
    /// Where the key `choices` begins.
    pub(super) choices: Option<usize>,
    /// `delta.role`: the event opens a choice.
    pub(super) role: bool,
    /// Something that a parser made of the text: tool calls.
    pub(super) tools: bool,
    /// Or reasoning.
    pub(super) reasoning: bool,
    /// `usage` is an object.
    pub(super) usage: bool,
    /// There are choices, and none of them: the account at the end.
    pub(super) no_choices: bool,
    /// `logprobs` is an object.
    pub(super) logprobs: bool,
}

impl Facts {
    /// Reads an event to its blank line, from the place behind which something may be new.
    pub(super) fn of(event: &[u8], mut at: usize) -> Self {
        let mut facts = Self::default();
        while let Some(quote) = memchr::memchr(b'"', &event[at..]) {
            let start = at + quote;
            let Some(end) = string_end(event, start) else {
                break;
            };
            at = end;
            if event.get(end) == Some(&b':') {
                let blanks = event[end + 1..]
                    .iter()
                    .take_while(|byte| **byte == b' ')
                    .count();
                at = facts.note(event, start..end, end + 1 + blanks);
            }
        }
        facts
    }

    /// Takes one key and its value in; gives where to read on.
    fn note(&mut self, event: &[u8], key: Range<usize>, value: usize) -> usize {
        let first = event.get(value).copied().unwrap_or_default();
        match (&event[key.start + 1..key.end - 1], first) {
            (b"token_ids", b'[') => return keep(&mut self.ids, list(event, value)),
            (b"prompt_token_ids", b'[') => return keep(&mut self.prompt_ids, list(event, value)),
            (b"content" | b"text", b'"') => return keep(&mut self.text, string(event, value)),
            (b"finish_reason", b'"') => return keep(&mut self.finish, string(event, value)),
            (b"choices", b'[') => {
                self.choices = Some(key.start);
                self.no_choices = event.get(value + 1) == Some(&b']');
            }
            (b"role", b'"') => self.role = true,
            (b"tool_calls", b'[') => self.tools |= event.get(value + 1) != Some(&b']'),
            (b"function_call", b'{') => self.tools = true,
            (b"reasoning" | b"reasoning_content", b'"') => {
                self.reasoning |= event.get(value + 1) != Some(&b'"');
            }
            (b"usage", b'{') => self.usage = true,
            (b"logprobs", b'{') => self.logprobs = true,
            _ => {}
        }
        value
    }

    /// Whether it brings text.
    pub(super) fn has_text(&self) -> bool {
        self.text.as_ref().is_some_and(|text| text.len() > 2)
    }

    /// Whether it brings ids.
    pub(super) fn has_ids(&self) -> bool {
        self.ids.as_ref().is_some_and(|ids| ids.len() > 2)
    }
}

fn keep(slot: &mut Option<Range<usize>>, found: Range<usize>) -> usize {
    let end = found.end;
    *slot = Some(found);
    end
}

fn list(event: &[u8], start: usize) -> Range<usize> {
    let end = memchr::memchr(b']', &event[start..]).map_or(event.len(), |at| start + at + 1);
    start..end
}

fn string(event: &[u8], start: usize) -> Range<usize> {
    start..string_end(event, start).unwrap_or(event.len())
}

/// The place behind the closing quote of the string that opens at `start`.
fn string_end(bytes: &[u8], start: usize) -> Option<usize> {
    let mut at = start + 1;
    loop {
        let found = at + memchr::memchr2(b'"', b'\\', bytes.get(at..)?)?;
        if bytes[found] == b'"' {
            return Some(found + 1);
        }
        at = found + 2;
    }
}

/// Unicode characters of a JSON string, given with its quotes: what Python calls its length.
pub(super) fn characters(quoted: &[u8]) -> usize {
    let inner = quoted.get(1..quoted.len() - 1).unwrap_or_default();
    let mut count = 0;
    let mut at = 0;
    while let Some(&byte) = inner.get(at) {
        at += match byte {
            b'\\' if inner.get(at + 1) == Some(&b'u') => {
                // The second half of a pair is no character of its own.
                let low = inner.get(at + 2).is_some_and(|first| first | 0x20 == b'd')
                    && matches!(inner.get(at + 3), Some(b'c'..=b'f' | b'C'..=b'F'));
                count -= usize::from(low && count > 0);
                6
            }
            b'\\' => 2,
            _ => {
                count -= usize::from(byte & 0xc0 == 0x80 && count > 0);
                1
            }
        };
        count += 1;
    }
    count
}

/// How many ids a list holds, given with its brackets.
pub(super) fn list_length(list: &[u8]) -> usize {
    let inner = list.get(1..list.len() - 1).unwrap_or_default();
    if inner.trim_ascii().is_empty() {
        0
    } else {
        1 + memchr::memchr_iter(b',', inner).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at<'a>(event: &'a str, range: Option<&Range<usize>>) -> Option<&'a str> {
        range.map(|range| &event[range.clone()])
    }

    #[test]
    fn a_chunk_is_read_by_places() {
        let event = concat!(
            r#"data: {"id":"c","choices":[{"index":0,"delta":{"content":"a \"token_ids\":[1] é"},"#,
            r#""logprobs":{"content":[{"token":"text","bytes":[1]}]},"finish_reason":"length","token_ids":[5, 6]}],"#,
            r#""usage":{"prompt_tokens":1}}"#,
            "\n\n"
        );
        let facts = Facts::of(event.as_bytes(), 0);
        assert_eq!(at(event, facts.ids.as_ref()), Some("[5, 6]"));
        assert_eq!(
            at(event, facts.text.as_ref()),
            Some(r#""a \"token_ids\":[1] é""#)
        );
        assert_eq!(at(event, facts.finish.as_ref()), Some("\"length\""));
        assert!(facts.usage && !facts.role && !facts.tools && !facts.reasoning);
        assert_eq!(facts.choices, event.find("\"choices\""));
    }

    #[test]
    fn nulls_are_nothing_and_parsed_output_is_told() {
        let opening = r#"data: {"choices":[{"delta":{"role":"assistant","content":""},"finish_reason":null}],"prompt_token_ids":[1,2],"usage":null}"#;
        let facts = Facts::of(opening.as_bytes(), 0);
        assert!(facts.role && !facts.has_text() && !facts.usage && facts.finish.is_none());
        assert_eq!(at(opening, facts.prompt_ids.as_ref()), Some("[1,2]"));
        let null = br#"data: {"choices":[{"text":"x","token_ids":null,"prompt_token_ids":null}]}"#;
        let facts = Facts::of(null, 0);
        assert!(facts.ids.is_none() && facts.prompt_ids.is_none() && facts.has_text());
        let top = br#"data: {"choices":[{"text":"","logprobs":{"top_logprobs":[{"text":-1,"token_ids":-2,"content":-3}]}}]}"#;
        let facts = Facts::of(top, 0);
        assert!(facts.ids.is_none() && !facts.has_text());
        let calls = br#"data: {"choices":[{"delta":{"content":null,"tool_calls":[{"index":0}]}}]}"#;
        assert!(Facts::of(calls, 0).tools);
        assert!(!Facts::of(br#"data: {"choices":[{"delta":{"tool_calls":[]}}]}"#, 0).tools);
        assert!(Facts::of(br#"data: {"choices":[{"delta":{"reasoning":"hm"}}]}"#, 0).reasoning);
        let sglang = br#"data: {"choices":[{"delta":{"reasoning_content":null,"content":"a"}}]}"#;
        assert!(!Facts::of(sglang, 0).reasoning);
    }

    #[test]
    fn cut_and_empty_events_do_no_harm() {
        for event in [
            "",
            "data: [DONE]\n\n",
            ": ping\n\n",
            "data: {\"text\":\"ab\\",
            "\"token_ids\":[",
        ] {
            let facts = Facts::of(event.as_bytes(), 0);
            assert!(facts.choices.is_none(), "{event}");
        }
    }

    #[test]
    fn characters_are_those_of_the_text() {
        for text in ["", "abc", "é", "漢字", "🎨", "a\"b\\c\n", "\u{1}x"] {
            let quoted = serde_json::to_string(text).unwrap();
            assert_eq!(
                characters(quoted.as_bytes()),
                text.chars().count(),
                "{text}"
            );
        }
        assert_eq!(characters(br#""\ud83c\udfa8!""#), 2, "a pair is one");
        assert_eq!(characters(br#""\u00e9""#), 1);
    }

    #[test]
    fn ids_are_counted() {
        for (list, length) in [("[]", 0), ("[ ]", 0), ("[7]", 1), ("[1, 2,3]", 3)] {
            assert_eq!(list_length(list.as_bytes()), length);
        }
    }
}
