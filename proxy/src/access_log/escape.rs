//! How bytes that a client chose are put into a line without breaking it: as JSON string content, or as text.
//!
//! Neither lets a control character through, so that nobody can forge a line or drive a terminal.

use std::io::Write;

/// Which escaping a value needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Escape {
    /// Content of a JSON string, quotes not included.
    Json,
    /// None: a header's value, which cannot hold what could break it.
    Nothing,
    /// A field of a text line: `\xNN`, as nginx writes it, for what could break line or quotes.
    Text,
}

impl Escape {
    /// Appends `bytes`, cut to `bytes_max` of them at a character boundary.
    pub(super) fn append(self, bytes: &[u8], bytes_max: Option<usize>, out: &mut Vec<u8>) {
        let bytes = cut(bytes, bytes_max);
        if self == Self::Nothing || are_plain(bytes) {
            out.extend_from_slice(bytes);
            return;
        }
        for chunk in bytes.utf8_chunks() {
            let mut rest = chunk.valid();
            while let Some((at, character)) = rest
                .char_indices()
                .find(|(_, character)| needs_escape(*character))
            {
                out.extend_from_slice(&rest.as_bytes()[..at]);
                self.escape(character, out);
                rest = &rest[at + character.len_utf8()..];
            }
            out.extend_from_slice(rest.as_bytes());
            match self {
                Self::Json if !chunk.invalid().is_empty() => {
                    out.extend_from_slice("\u{fffd}".as_bytes())
                }
                Self::Json | Self::Nothing => {}
                Self::Text => chunk.invalid().iter().for_each(|byte| hex(*byte, out)),
            }
        }
    }

    fn escape(self, character: char, out: &mut Vec<u8>) {
        match (self, character) {
            (Self::Nothing, other) => {
                out.extend_from_slice(other.encode_utf8(&mut [0; 4]).as_bytes());
            }
            (Self::Text, _) => character
                .encode_utf8(&mut [0; 4])
                .bytes()
                .for_each(|byte| hex(byte, out)),
            (Self::Json, '"') => out.extend_from_slice(b"\\\""),
            (Self::Json, '\\') => out.extend_from_slice(b"\\\\"),
            (Self::Json, '\n') => out.extend_from_slice(b"\\n"),
            (Self::Json, '\t') => out.extend_from_slice(b"\\t"),
            (Self::Json, other) => {
                write!(out, "\\u{:04x}", u32::from(other)).expect("invariant: a Vec takes all")
            }
        }
    }
}

fn hex(byte: u8, out: &mut Vec<u8>) {
    const DIGITS: &[u8; 16] = b"0123456789ABCDEF";
    let digit = |value: u8| DIGITS[usize::from(value & 0xf)];
    out.extend_from_slice(&[b'\\', b'x', digit(byte >> 4), digit(byte)]);
}

fn needs_escape(character: char) -> bool {
    character.is_control() || character == '"' || character == '\\'
}

/// Whether all are printable ASCII, and neither quote nor backslash. Eight at a time: most of a line passes here.
fn are_plain(bytes: &[u8]) -> bool {
    let (eights, rest) = bytes.as_chunks::<8>();
    let mut last = [b' '; 8];
    last[..rest.len()].copy_from_slice(rest);
    let found = eights
        .iter()
        .fold(odd(last), |found, eight| found | odd(*eight));
    found == 0
}

/// Not zero if one of them is not plain.
fn odd(bytes: [u8; 8]) -> u64 {
    const ONES: u64 = u64::MAX / 0xff;
    const HIGH: u64 = ONES << 7;
    let word = u64::from_le_bytes(bytes);
    // Borrows out of a byte spoil only those above one that was found.
    let below = |word: u64, least: u8| word.wrapping_sub(ONES * u64::from(least)) & !word;
    let is = |byte: u8| below(word ^ (ONES * u64::from(byte)), 1);
    (word | below(word, 0x20) | is(0x7f) | is(b'"') | is(b'\\')) & HIGH
}

fn cut(bytes: &[u8], bytes_max: Option<usize>) -> &[u8] {
    let Some(max) = bytes_max.filter(|max| *max < bytes.len()) else {
        return bytes;
    };
    let is_continuation = |byte: u8| byte & 0xc0 == 0x80;
    // A character has at most three continuation bytes; more of them are not UTF-8 and may be cut anywhere.
    let end = (max.saturating_sub(3)..=max)
        .rev()
        .find(|end| !is_continuation(bytes[*end]))
        .unwrap_or(max);
    &bytes[..end]
}

/// Appends a number.
pub(super) fn append_uint(value: u64, out: &mut Vec<u8>) {
    let mut digits = [0; 20];
    let mut at = digits.len();
    let mut rest = value;
    loop {
        at -= 1;
        digits[at] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    out.extend_from_slice(&digits[at..]);
}

/// Appends `value` with exactly `width` digits, the lowest ones.
pub(super) fn append_padded(value: u64, width: u32, out: &mut Vec<u8>) {
    for power in (0..width).rev() {
        out.push(b'0' + (value / 10_u64.pow(power) % 10) as u8);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(escape: Escape, input: &[u8], max: Option<usize>, expect: &str) {
        let mut out = Vec::new();
        escape.append(input, max, &mut out);
        assert_eq!(
            String::from_utf8(out).expect("whatever comes in, UTF-8 goes out"),
            expect,
            "{input:?}"
        );
    }

    #[test]
    fn one_byte_that_is_not_plain_is_found_wherever_it_stands() {
        let is_plain = |byte: u8| matches!(byte, 0x20..=0x7e) && byte != b'"' && byte != b'\\';
        for (length, others) in [(8, b' '), (13, b'~'), (13, b'!'), (3, b'#'), (16, b'[')] {
            for (at, byte) in (0..length).flat_map(|at| (0..=255).map(move |byte| (at, byte))) {
                let mut bytes = vec![others; length];
                bytes[at] = byte;
                assert_eq!(are_plain(&bytes), is_plain(byte), "{bytes:?}");
            }
        }
        assert!(are_plain(b""));
    }

    #[test]
    fn json_strings_stay_json() {
        for input in [
            "plain",
            "",
            "a\"b\\c",
            "line\nfeed\ttab\r\0\u{1b}[31m",
            "é漢🚀",
            "\u{9b}31m\u{7f}",
        ] {
            let mut out = vec![b'"'];
            Escape::Json.append(input.as_bytes(), None, &mut out);
            out.push(b'"');
            assert!(out.iter().all(|byte| *byte >= 0x20), "{input:?}");
            assert_eq!(serde_json::from_slice::<String>(&out).unwrap(), input);
        }
        check(Escape::Json, b"a\xff\xfeb", None, "a\u{fffd}\u{fffd}b");
        check(Escape::Json, b"\xc3", None, "\u{fffd}");
    }

    #[test]
    fn text_cannot_forge_a_line_or_a_quote() {
        check(Escape::Text, b"curl/8.1", None, "curl/8.1");
        check(Escape::Text, b"a\" 200 - \"b", None, "a\\x22 200 - \\x22b");
        check(
            Escape::Text,
            b"a\r\n[2026]\\",
            None,
            "a\\x0D\\x0A[2026]\\x5C",
        );
        check(
            Escape::Text,
            "\u{9b}31m é".as_bytes(),
            None,
            "\\xC2\\x9B31m é",
        );
        check(Escape::Text, b"\xff", None, "\\xFF");
    }

    #[test]
    fn lengths_cut_between_characters() {
        check(Escape::Text, b"abcdef", Some(3), "abc");
        check(Escape::Text, b"abc", Some(3), "abc");
        check(Escape::Text, b"abc", Some(0), "");
        check(Escape::Json, "aé漢".as_bytes(), Some(2), "a");
        check(Escape::Json, "aé漢".as_bytes(), Some(5), "aé");
        check(Escape::Json, &[0x80; 8], Some(6), &"\u{fffd}".repeat(6));
    }

    #[test]
    fn numbers() {
        for value in [0, 7, 10, 12_345, u64::MAX] {
            let mut out = Vec::new();
            append_uint(value, &mut out);
            assert_eq!(String::from_utf8(out).unwrap(), value.to_string());
        }
        let mut out = Vec::new();
        append_padded(7, 3, &mut out);
        assert_eq!(out, b"007");
    }
}
