//! The engine's own token counts, picked out of its responses as bytes.
//!
//! Inside JSON strings quotes are escaped, so the bytes `"usage":` can only be a key. Nothing is parsed until the end:
//! the first and the last object found are kept (Anthropic's streams tell input at first and output at last).

use super::Api;
use memchr::memmem::Finder;
use serde::Deserialize;
use std::sync::LazyLock;

/// Longest usage object kept; vLLM's and SGLang's have some 250 bytes.
const USAGE_BYTES_MAX: usize = 4 << 10;
/// Longest `meta_info` kept; it may hold log probabilities.
const META_BYTES_MAX: usize = 1 << 20;
/// The longer of the two keys.
const KEY_BYTES_MAX: usize = b"\"meta_info\":".len();

static USAGE: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(b"\"usage\":"));
/// SGLang's `/generate`.
static META_INFO: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(b"\"meta_info\":"));

/// Token counts of one request; `None` is untold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Usage {
    /// All prompt tokens, cached ones included.
    pub(super) prompt: Option<u64>,
    /// Generated tokens.
    pub(super) completion: Option<u64>,
    /// Prompt tokens that the engine took from its cache.
    pub(super) cached: Option<u64>,
}

/// Looks for usage objects in a stream of bytes, however it is cut.
#[derive(Debug, Default)]
pub(super) struct UsageFinder {
    api: Api,
    first: Vec<u8>,
    last: Vec<u8>,
    /// Between two pieces: the end of what came, or an object that is not whole yet.
    carry: Vec<u8>,
}

impl UsageFinder {
    pub(super) fn new(api: Api) -> Self {
        Self {
            api,
            ..Self::default()
        }
    }

    /// A whole event: what it contains is not cut. Says whether it told usage.
    pub(super) fn event(&mut self, data: &[u8]) -> bool {
        let Found::Object(object, _) = find(self.api, data) else {
            return false;
        };
        self.keep(object);
        true
    }

    /// The next piece of a body.
    pub(super) fn chunk(&mut self, chunk: &[u8]) {
        if self.carry.is_empty() {
            let rest = self.scan(chunk);
            self.carry.extend_from_slice(rest);
        } else {
            let mut joined = std::mem::take(&mut self.carry);
            joined.extend_from_slice(chunk);
            let rest = self.scan(&joined).len();
            joined.drain(..joined.len() - rest);
            self.carry = joined;
        }
    }

    /// Takes every whole object; returns the end that may belong to the next piece.
    fn scan<'a>(&mut self, bytes: &'a [u8]) -> &'a [u8] {
        let mut rest = bytes;
        loop {
            match find(self.api, rest) {
                Found::Object(object, end) => {
                    self.keep(object);
                    rest = &rest[end..];
                }
                Found::Begun(start) if rest.len() - start <= bytes_max(self.api) => {
                    return &rest[start..];
                }
                Found::Begun(start) => rest = &rest[start + 1..],
                Found::Nothing => {
                    return &rest[rest.len().saturating_sub(KEY_BYTES_MAX - 1)..];
                }
            }
        }
    }

    fn keep(&mut self, object: &[u8]) {
        if object.len() > bytes_max(self.api) {
            return;
        }
        if self.first.is_empty() {
            self.first.extend_from_slice(object);
        } else {
            self.last.clear();
            self.last.extend_from_slice(object);
        }
    }

    /// What the engine said, at the end.
    pub(super) fn finish(&self) -> Usage {
        let first = read(&self.first, self.api);
        let last = read(&self.last, self.api);
        Usage {
            prompt: last.prompt.or(first.prompt),
            completion: last.completion.or(first.completion),
            cached: last.cached.or(first.cached),
        }
    }
}

fn bytes_max(api: Api) -> usize {
    if api == Api::Generate {
        META_BYTES_MAX
    } else {
        USAGE_BYTES_MAX
    }
}

fn find(api: Api, bytes: &[u8]) -> Found<'_> {
    match find_object(&USAGE, bytes) {
        Found::Nothing if api == Api::Generate => find_object(&META_INFO, bytes),
        found => found,
    }
}

enum Found<'a> {
    /// A whole object, and where it ends.
    Object(&'a [u8], usize),
    /// A key whose object is not whole; where the key begins.
    Begun(usize),
    Nothing,
}

fn find_object<'a>(key: &Finder<'_>, bytes: &'a [u8]) -> Found<'a> {
    let mut from = 0;
    while let Some(at) = key.find(&bytes[from..]).map(|at| at + from) {
        let mut start = at + key.needle().len();
        while bytes.get(start) == Some(&b' ') {
            start += 1;
        }
        match bytes.get(start) {
            None => return Found::Begun(at),
            Some(b'{') => match object_length(&bytes[start..]) {
                Some(length) => {
                    return Found::Object(&bytes[start..start + length], start + length);
                }
                None => return Found::Begun(at),
            },
            Some(_) => from = start,
        }
    }
    Found::Nothing
}

/// Length of the object that begins here; strings in it are skipped.
fn object_length(bytes: &[u8]) -> Option<usize> {
    let mut depth = 0usize;
    let mut in_string = false;
    let mut escaped = false;
    for (index, byte) in bytes.iter().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b'{' if !in_string => depth += 1,
            b'}' if !in_string => {
                depth -= 1;
                if depth == 0 {
                    return Some(index + 1);
                }
            }
            _ => {}
        }
    }
    None
}

/// All dialects at once: OpenAI (chat, completions), Responses, Anthropic, SGLang's `meta_info`.
#[derive(Debug, Default, Deserialize)]
struct Counts {
    prompt_tokens: Option<u64>,
    completion_tokens: Option<u64>,
    input_tokens: Option<u64>,
    output_tokens: Option<u64>,
    cached_tokens: Option<u64>,
    cache_read_input_tokens: Option<u64>,
    cache_creation_input_tokens: Option<u64>,
    prompt_tokens_details: Option<Details>,
    input_tokens_details: Option<Details>,
}

#[derive(Debug, Default, Deserialize)]
struct Details {
    cached_tokens: Option<u64>,
}

fn read(object: &[u8], api: Api) -> Usage {
    if object.is_empty() {
        return Usage::default();
    }
    let Ok(counts) = serde_json::from_slice::<Counts>(object) else {
        return Usage::default();
    };
    let details = counts
        .prompt_tokens_details
        .or(counts.input_tokens_details)
        .unwrap_or_default();
    let mut usage = Usage {
        prompt: counts.prompt_tokens.or(counts.input_tokens),
        completion: counts.completion_tokens.or(counts.output_tokens),
        cached: details
            .cached_tokens
            .or(counts.cached_tokens)
            .or(counts.cache_read_input_tokens),
    };
    if api == Api::Messages {
        // Anthropic's input_tokens leaves out what was read from, or written to, the cache.
        let aside = counts.cache_read_input_tokens.unwrap_or(0)
            + counts.cache_creation_input_tokens.unwrap_or(0);
        usage.prompt = usage.prompt.map(|prompt| prompt + aside);
    }
    usage
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHAT: &str = r#"{"choices":[{"message":{"content":"a \"usage\":{\"prompt_tokens\":9} b"}}],"usage":{"prompt_tokens":34,"total_tokens":58,"completion_tokens":24,"prompt_tokens_details":{"cached_tokens":32,"created_cache_tokens":0,"multimodal_tokens":null},"completion_tokens_details":null},"prompt_token_ids":[1,2,3]}"#;

    #[test]
    fn a_body_cut_anywhere_gives_the_same_counts() {
        let expected = Usage {
            prompt: Some(34),
            completion: Some(24),
            cached: Some(32),
        };
        for size in 1..CHAT.len() {
            let mut finder = UsageFinder::new(Api::Chat);
            for chunk in CHAT.as_bytes().chunks(size) {
                finder.chunk(chunk);
            }
            assert_eq!(finder.finish(), expected, "pieces of {size}");
            assert!(finder.carry.len() < USAGE_BYTES_MAX);
        }
    }

    #[test]
    fn every_dialect_is_read() {
        let cases = [
            (
                Api::Chat,
                r#"{"usage": {"prompt_tokens": 3, "completion_tokens": 1}}"#,
                (Some(3), Some(1), None),
            ),
            (Api::Chat, r#"{"usage":null}"#, (None, None, None)),
            (
                Api::Responses,
                r#"{"usage":{"input_tokens":34,"input_tokens_details":{"cached_tokens":32},"output_tokens":8}}"#,
                (Some(34), Some(8), Some(32)),
            ),
            (
                Api::Messages,
                r#"{"usage":{"input_tokens":2,"output_tokens":8,"cache_creation_input_tokens":0,"cache_read_input_tokens":32}}"#,
                (Some(34), Some(8), Some(32)),
            ),
            (
                Api::Generate,
                r#"{"text":"x","meta_info":{"finish_reason":{"type":"length"},"prompt_tokens":5,"completion_tokens":8,"cached_tokens":4}}"#,
                (Some(5), Some(8), Some(4)),
            ),
        ];
        for (api, body, (prompt, completion, cached)) in cases {
            let mut finder = UsageFinder::new(api);
            finder.chunk(body.as_bytes());
            assert_eq!(
                finder.finish(),
                Usage {
                    prompt,
                    completion,
                    cached
                },
                "{body}"
            );
        }
    }

    #[test]
    fn of_an_anthropic_stream_input_and_output_are_joined() {
        let mut finder = UsageFinder::new(Api::Messages);
        finder.event(br#"{"type":"message_start","message":{"usage":{"input_tokens":34,"output_tokens":0}}}"#);
        finder.event(br#"{"type":"message_delta","usage":{"output_tokens":8}}"#);
        assert_eq!(
            finder.finish(),
            Usage {
                prompt: Some(34),
                completion: Some(8),
                cached: None
            }
        );
    }
}
