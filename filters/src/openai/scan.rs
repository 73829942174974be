//! The members of a JSON object, where they stand: keys and raw values, contents skipped and nothing copied.
//!
//! It finds boundaries and judges nothing else: whatever is valid JSON is cut right, and of what is not, some is cut
//! too. Who reads a value parses it, and the engine says what is wrong with a body.

use memchr::memchr2;
use std::borrow::Cow;

/// Calls `member` with each key and raw value of the object that `text` is, in order. `None` if it is no object.
pub(crate) fn members<'a>(text: &'a str, mut member: impl FnMut(&str, &'a str)) -> Option<()> {
    let bytes = text.as_bytes();
    let mut at = skip_blank(bytes, 0);
    if *bytes.get(at)? != b'{' {
        return None;
    }
    at = skip_blank(bytes, at + 1);
    if *bytes.get(at)? == b'}' {
        return ends(bytes, at + 1);
    }
    loop {
        if *bytes.get(at)? != b'"' {
            return None;
        }
        let end = string_end(bytes, at)?;
        let key = unescaped(text.get(at..end)?)?;
        at = skip_blank(bytes, end);
        if *bytes.get(at)? != b':' {
            return None;
        }
        at = skip_blank(bytes, at + 1);
        let end = value_end(bytes, at)?;
        member(&key, text.get(at..end)?);
        at = skip_blank(bytes, end);
        match *bytes.get(at)? {
            b',' => at = skip_blank(bytes, at + 1),
            b'}' => return ends(bytes, at + 1),
            _ => return None,
        }
    }
}

/// A key without its quotes.
fn unescaped(quoted: &str) -> Option<Cow<'_, str>> {
    let inner = quoted.get(1..quoted.len() - 1)?;
    if inner.contains('\\') {
        return serde_json::from_str(quoted).ok().map(Cow::Owned);
    }
    Some(Cow::Borrowed(inner))
}

fn ends(bytes: &[u8], at: usize) -> Option<()> {
    (skip_blank(bytes, at) == bytes.len()).then_some(())
}

fn skip_blank(bytes: &[u8], mut at: usize) -> usize {
    while matches!(bytes.get(at), Some(b' ' | b'\n' | b'\r' | b'\t')) {
        at += 1;
    }
    at
}

/// Behind the value that begins at `at`.
fn value_end(bytes: &[u8], at: usize) -> Option<usize> {
    match bytes.get(at)? {
        b'"' => string_end(bytes, at),
        b'{' | b'[' => container_end(bytes, at),
        b'-' | b'0'..=b'9' | b't' | b'f' | b'n' => {
            let is_over =
                |byte: &u8| matches!(byte, b',' | b'}' | b']' | b' ' | b'\n' | b'\r' | b'\t');
            let rest = &bytes[at..];
            Some(at + rest.iter().position(is_over).unwrap_or(rest.len()))
        }
        _ => None,
    }
}

/// Behind the object or list that begins at `at`; brackets are counted, strings are skipped.
fn container_end(bytes: &[u8], mut at: usize) -> Option<usize> {
    let mut depth = 0_usize;
    loop {
        match bytes.get(at)? {
            b'"' => {
                at = string_end(bytes, at)?;
                continue;
            }
            b'{' | b'[' => depth += 1,
            b'}' | b']' => {
                depth -= 1;
                if depth == 0 {
                    return Some(at + 1);
                }
            }
            _ => {}
        }
        at += 1;
    }
}

/// Behind the string whose opening quote is at `at`.
fn string_end(bytes: &[u8], at: usize) -> Option<usize> {
    let mut from = at + 1;
    loop {
        let found = from + memchr2(b'"', b'\\', bytes.get(from..)?)?;
        if bytes[found] == b'"' {
            return Some(found + 1);
        }
        from = found + 2;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::value::RawValue;
    use std::collections::BTreeMap;

    fn found(text: &str) -> Option<Vec<(String, &str)>> {
        let mut all = Vec::new();
        members(text, |key, value| all.push((key.to_owned(), value)))?;
        Some(all)
    }

    #[test]
    fn members_are_cut_where_they_end() {
        let text = " {\"a\" : 1 ,\"b\\u0063\":[{\"x\":\"]}\\\"\"},[2]],\n\"d\":\"e\\\\\",\"é\":null,\"f\":-1e5}\n";
        let expected = [
            ("a", "1"),
            ("bc", "[{\"x\":\"]}\\\"\"},[2]]"),
            ("d", "\"e\\\\\""),
            ("é", "null"),
            ("f", "-1e5"),
        ];
        let expected = expected.map(|(key, value)| (key.to_owned(), value));
        assert_eq!(found(text).unwrap(), expected);
        assert_eq!(found("{ }").unwrap(), []);
        for cut in 0..text.trim_end().len() {
            if text.is_char_boundary(cut) {
                assert!(found(&text[..cut]).is_none(), "{}", &text[..cut]);
            }
        }
    }

    #[test]
    fn what_is_no_object_has_no_members() {
        for text in [
            "",
            "[]",
            "1",
            "\"{\"",
            "{\"a\"}",
            "{a:1}",
            "{\"a\":}",
            "{\"a\":1,}",
            "{\"a\":1}x",
            "{,}",
            "{\"\\u\":1}",
        ] {
            assert!(found(text).is_none(), "{text}");
        }
    }

    #[test]
    fn whatever_serde_reads_is_cut_as_serde_cuts_it() {
        let mut seed = 11_u32;
        let mut next = |below: usize| {
            seed ^= seed << 13;
            seed ^= seed >> 17;
            seed ^= seed << 5;
            seed as usize % below
        };
        let pieces = [
            "{",
            "}",
            "[",
            "]",
            "\"a\"",
            "\"b\\\"\"",
            ":",
            ",",
            "1",
            "true",
            " ",
            "\"é{\"",
            "null",
            "-2.5e1",
        ];
        let mut valid = 0;
        for _ in 0..400_000 {
            let mut text = String::from("{\"k\":");
            for _ in 0..next(9) {
                text += pieces[next(pieces.len())];
            }
            text.push('}');
            let Ok(expected) = serde_json::from_str::<BTreeMap<String, &RawValue>>(&text) else {
                continue;
            };
            valid += 1;
            let found: BTreeMap<_, _> = found(&text).expect(&text).into_iter().collect();
            let expected: BTreeMap<_, _> = expected
                .into_iter()
                .map(|(key, raw)| (key, raw.get()))
                .collect();
            assert_eq!(found, expected, "{text}");
        }
        assert!(valid > 1_000, "{valid} of them were JSON");
    }
}
