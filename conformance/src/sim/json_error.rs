//! Answers "what would Python's json module say about this text": its message and position, as vLLM passes them on.
//!
//! Only finds the first error; values are read by serde_json.

type Found = (usize, &'static str);

const VALUE: &str = "Expecting value";
const PROPERTY: &str = "Expecting property name enclosed in double quotes";
const COMMA: &str = "Expecting ',' delimiter";
/// Python gives up at about this depth; so does serde_json.
const DEPTH_MAX: usize = 128;

/// Position (in characters) and message of the first error; `None` if Python would accept `text`.
pub(crate) fn first_error(text: &str) -> Option<(usize, &'static str)> {
    let mut scanner = Scanner {
        text: text.chars().collect(),
        at: 0,
    };
    scanner.blanks();
    scanner.value(0).err().or_else(|| {
        scanner.blanks();
        (scanner.at < scanner.text.len()).then_some((scanner.at, "Extra data"))
    })
}

struct Scanner {
    text: Vec<char>,
    at: usize,
}

impl Scanner {
    fn peek(&self) -> Option<char> {
        self.text.get(self.at).copied()
    }

    fn blanks(&mut self) {
        while matches!(self.peek(), Some(' ' | '\t' | '\n' | '\r')) {
            self.at += 1;
        }
    }

    fn value(&mut self, depth: usize) -> Result<(), Found> {
        let wrong = (self.at, VALUE);
        if depth > DEPTH_MAX {
            return Err(wrong);
        }
        match self.peek().ok_or(wrong)? {
            '"' => self.string(),
            '{' => self.object(depth),
            '[' => self.array(depth),
            '-' | '0'..='9' => self.number(),
            _ => {
                let words = ["null", "true", "false", "NaN", "Infinity"];
                let rest = &self.text[self.at..];
                let word = words.iter().find(|word| {
                    word.chars().zip(rest).filter(|(a, b)| a == *b).count() == word.len()
                });
                self.at += word.ok_or(wrong)?.len();
                Ok(())
            }
        }
    }

    fn number(&mut self) -> Result<(), Found> {
        let start = self.at;
        self.at += usize::from(self.peek() == Some('-'));
        let digits = |scanner: &mut Self| {
            let from = scanner.at;
            while scanner.peek().is_some_and(|c| c.is_ascii_digit()) {
                scanner.at += 1;
            }
            scanner.at > from
        };
        if self.peek() == Some('0') {
            self.at += 1;
        } else if !digits(self) {
            return Err((start, VALUE));
        }
        for lead in [&['.'][..], &['e', 'E']] {
            let before = self.at;
            if self.peek().is_some_and(|c| lead.contains(&c)) {
                self.at += 1;
                self.at += usize::from(lead.len() > 1 && matches!(self.peek(), Some('+' | '-')));
                if !digits(self) {
                    self.at = before;
                }
            }
        }
        Ok(())
    }

    fn string(&mut self) -> Result<(), Found> {
        let start = self.at;
        let unterminated = (start, "Unterminated string starting at");
        loop {
            self.at += 1;
            match self.peek().ok_or(unterminated)? {
                '"' => {
                    self.at += 1;
                    return Ok(());
                }
                '\\' => {
                    self.at += 1;
                    match self.peek().ok_or(unterminated)? {
                        'u' => {
                            let digits =
                                self.text.get(self.at + 1..self.at + 5).unwrap_or_default();
                            if digits.len() < 4 || !digits.iter().all(char::is_ascii_hexdigit) {
                                return Err((self.at, "Invalid \\uXXXX escape"));
                            }
                        }
                        '"' | '\\' | '/' | 'b' | 'f' | 'n' | 'r' | 't' => {}
                        _ => return Err((self.at - 1, "Invalid \\escape")),
                    }
                }
                '\0'..='\u{1f}' => return Err((self.at, "Invalid control character at")),
                _ => {}
            }
        }
    }

    fn object(&mut self, depth: usize) -> Result<(), Found> {
        self.at += 1;
        self.blanks();
        if self.peek() == Some('}') {
            self.at += 1;
            return Ok(());
        }
        loop {
            if self.peek() != Some('"') {
                return Err((self.at, PROPERTY));
            }
            self.string()?;
            self.blanks();
            if self.peek() != Some(':') {
                return Err((self.at, "Expecting ':' delimiter"));
            }
            self.at += 1;
            self.blanks();
            self.value(depth + 1)?;
            if self.closes('}')? {
                return Ok(());
            }
        }
    }

    fn array(&mut self, depth: usize) -> Result<(), Found> {
        self.at += 1;
        self.blanks();
        if self.peek() == Some(']') {
            self.at += 1;
            return Ok(());
        }
        loop {
            self.value(depth + 1)?;
            if self.closes(']')? {
                return Ok(());
            }
        }
    }

    /// Behind an element: true at the closing bracket, false behind a comma.
    fn closes(&mut self, bracket: char) -> Result<bool, Found> {
        self.blanks();
        let found = self.peek();
        if found != Some(bracket) && found != Some(',') {
            return Err((self.at, COMMA));
        }
        self.at += 1;
        if found == Some(',') {
            self.blanks();
        }
        Ok(found == Some(bracket))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Expected values are those of CPython 3.11's `json.loads`.
    #[test]
    fn errors_are_named_and_placed_as_python_does() {
        for (text, expected) in [
            ("", Some((0, VALUE))),
            (r#"{"a": ["#, Some((7, VALUE))),
            (r#"{"a" 1}"#, Some((5, "Expecting ':' delimiter"))),
            (r#"{"a": 1 "b"}"#, Some((8, COMMA))),
            ("[1 2]", Some((3, COMMA))),
            (r#"{a: 1}"#, Some((1, PROPERTY))),
            (r#"{"a": "b"#, Some((6, "Unterminated string starting at"))),
            ("{} x", Some((3, "Extra data"))),
            ("\"a\nb\"", Some((2, "Invalid control character at"))),
            (r#""é\q""#, Some((2, "Invalid \\escape"))),
            (r#"{"a": [1, -2.5e3, null, "\u00e9"], "b": {}} "#, None),
        ] {
            assert_eq!(first_error(text), expected, "{text}");
        }
    }
}
