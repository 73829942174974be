//! How a configured format becomes a line: a flat list of steps, found once, run per request.

use super::{
    Captured, Entry, Headers,
    escape::{Escape, append_padded, append_uint},
    operator::{Operator, Value, long_flag},
};
use outrigger_xds::resource::listener::AccessLogFormat;
use serde_json::Value as Json;
use std::{collections::BTreeMap, io::Write};

/// Envoy's line, where no format is configured.
const DEFAULT_TEXT: &str = concat!(
    "[%START_TIME%] \"%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%\" %RESPONSE_CODE% ",
    "%RESPONSE_FLAGS% %BYTES_RECEIVED% %BYTES_SENT% %DURATION% %RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% ",
    "\"%REQ(X-FORWARDED-FOR)%\" \"%REQ(USER-AGENT)%\" \"%REQ(X-REQUEST-ID)%\" \"%REQ(:AUTHORITY)%\" ",
    "\"%UPSTREAM_HOST%\"\n"
);

/// A compiled format. A text format is written as it is, a line feed at its end is the configuration's business, as
/// in Envoy; a JSON format is one object and a line feed.
#[derive(Debug)]
pub(super) struct Template {
    steps: Vec<Step>,
}

#[derive(Debug)]
enum Step {
    /// Goes out as it is.
    Raw(Vec<u8>),
    Field {
        operator: Operator,
        bytes_max: Option<usize>,
        shape: Shape,
    },
}

/// How a field stands in the line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shape {
    /// In a text line.
    Text,
    /// In a header's value: as it is, and nothing when missing.
    Bare,
    /// A whole JSON value: keeps its type, `null` when missing.
    JsonValue,
    /// Part of a JSON string.
    JsonPart,
}

impl Template {
    /// Compiles a format; the headers it needs are added to `headers`.
    ///
    /// # Errors
    /// The place below `place` and what is wrong there.
    pub(super) fn compile(
        format: &AccessLogFormat,
        headers: &mut Headers,
        place: &str,
    ) -> Result<Self, String> {
        let mut compiler = Compiler {
            steps: Vec::new(),
            headers,
        };
        match format {
            AccessLogFormat::Text(text) => {
                let text = text.as_deref().unwrap_or(DEFAULT_TEXT);
                compiler
                    .text(text, Shape::Text)
                    .map_err(|error| format!("{place}.text_format: {error}"))?;
            }
            AccessLogFormat::Json(object) => {
                compiler.object(object.iter(), &format!("{place}.json_format"))?;
                compiler.raw(b"\n");
            }
        }
        Ok(Self {
            steps: compiler.steps,
        })
    }

    /// Compiles the value of a header.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(super) fn bare(text: &str, headers: &mut Headers) -> Result<Self, String> {
        let mut compiler = Compiler {
            steps: Vec::new(),
            headers,
        };
        compiler.text(text, Shape::Bare)?;
        Ok(Self {
            steps: compiler.steps,
        })
    }

    /// What it always is, if it has no operators.
    pub(super) fn constant(&self) -> Option<&[u8]> {
        match self.steps.as_slice() {
            [] => Some(&[]),
            [Step::Raw(bytes)] => Some(bytes),
            _ => None,
        }
    }

    /// Appends the line.
    pub(super) fn render(&self, entry: &Entry<'_>, captured: &Captured, out: &mut Vec<u8>) {
        for step in &self.steps {
            match step {
                Step::Raw(bytes) => out.extend_from_slice(bytes),
                Step::Field {
                    operator,
                    bytes_max,
                    shape,
                } => {
                    field(&operator.value(entry, captured), *bytes_max, *shape, out);
                }
            }
        }
    }
}

struct Compiler<'a> {
    steps: Vec<Step>,
    headers: &'a mut Headers,
}

impl Compiler<'_> {
    fn raw(&mut self, bytes: &[u8]) {
        if let Some(Step::Raw(before)) = self.steps.last_mut() {
            before.extend_from_slice(bytes);
        } else if !bytes.is_empty() {
            self.steps.push(Step::Raw(bytes.to_vec()));
        }
    }

    fn object<'v>(
        &mut self,
        members: impl Iterator<Item = (&'v String, &'v Json)>,
        place: &str,
    ) -> Result<(), String> {
        self.raw(b"{");
        for (index, (key, value)) in members.enumerate() {
            if index > 0 {
                self.raw(b",");
            }
            self.raw(Json::from(key.as_str()).to_string().as_bytes());
            self.raw(b":");
            self.json(value, &format!("{place}.{key}"))?;
        }
        self.raw(b"}");
        Ok(())
    }

    fn json(&mut self, value: &Json, place: &str) -> Result<(), String> {
        match value {
            Json::String(text) => self
                .json_string(text)
                .map_err(|error| format!("{place}: {error}")),
            Json::Object(members) => {
                // Sorted, whatever serde_json's map keeps.
                let sorted: BTreeMap<_, _> = members.iter().collect();
                self.object(sorted.into_iter(), place)
            }
            Json::Array(items) => {
                self.raw(b"[");
                for (index, item) in items.iter().enumerate() {
                    if index > 0 {
                        self.raw(b",");
                    }
                    self.json(item, &format!("{place}[{index}]"))?;
                }
                self.raw(b"]");
                Ok(())
            }
            literal @ (Json::Null | Json::Bool(_) | Json::Number(_)) => {
                self.raw(literal.to_string().as_bytes());
                Ok(())
            }
        }
    }

    fn json_string(&mut self, text: &str) -> Result<(), String> {
        if let Some((token, "")) = text
            .strip_prefix('%')
            .and_then(|rest| Token::parse(rest).ok())
        {
            return self.field(&token, Shape::JsonValue);
        }
        self.raw(b"\"");
        self.text(text, Shape::JsonPart)?;
        self.raw(b"\"");
        Ok(())
    }

    /// Literals and operators in turn.
    fn text(&mut self, text: &str, shape: Shape) -> Result<(), String> {
        let mut rest = text;
        while let Some((before, after)) = rest.split_once('%') {
            self.literal(before, shape);
            if let Some(after) = after.strip_prefix('%') {
                self.literal("%", shape);
                rest = after;
                continue;
            }
            let (token, after) = Token::parse(after)?;
            self.field(&token, shape)?;
            rest = after;
        }
        self.literal(rest, shape);
        Ok(())
    }

    fn literal(&mut self, text: &str, shape: Shape) {
        if matches!(shape, Shape::Text | Shape::Bare) {
            self.raw(text.as_bytes());
        } else {
            let mut escaped = Vec::new();
            Escape::Json.append(text.as_bytes(), None, &mut escaped);
            self.raw(&escaped);
        }
    }

    fn field(&mut self, token: &Token<'_>, shape: Shape) -> Result<(), String> {
        let operator = Operator::compile(token.name, token.argument, self.headers)?;
        if operator == Operator::Absent {
            tracing::warn!(
                operator = token.name,
                "format: this operator has nothing to show in this proxy"
            );
        }
        self.steps.push(Step::Field {
            operator,
            bytes_max: token.bytes_max,
            shape,
        });
        Ok(())
    }
}

/// One operator as written: `NAME(argument):bytes_max`, between percent signs.
struct Token<'a> {
    name: &'a str,
    argument: Option<&'a str>,
    bytes_max: Option<usize>,
}

impl<'a> Token<'a> {
    /// Takes what follows the opening percent sign; gives the operator and what follows its closing one.
    fn parse(text: &'a str) -> Result<(Self, &'a str), String> {
        let shown: String = text.chars().take(32).collect();
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let end = text.find(|c| !is_name(c)).unwrap_or(text.len());
        let (name, mut rest) = text.split_at(end);
        if name.is_empty() {
            return Err(format!(
                "no operator after the percent sign in \"%{shown}\" (a literal one is written %%)"
            ));
        }
        let mut argument = None;
        if let Some(inside) = rest.strip_prefix('(') {
            let (inside, after) = inside
                .split_once(')')
                .ok_or(format!("no closing parenthesis in \"%{shown}\""))?;
            argument = Some(inside);
            rest = after;
        }
        let mut bytes_max = None;
        if let Some(length) = rest.strip_prefix(':') {
            let end = length
                .find(|c: char| !c.is_ascii_digit())
                .unwrap_or(length.len());
            let max = length[..end]
                .parse()
                .map_err(|_| format!("no length after the colon in \"%{shown}\""))?;
            bytes_max = Some(max);
            rest = &length[end..];
        }
        let rest = rest
            .strip_prefix('%')
            .ok_or(format!("no closing percent sign in \"%{shown}\""))?;
        Ok((
            Self {
                name,
                argument,
                bytes_max,
            },
            rest,
        ))
    }
}

fn field(value: &Value<'_>, bytes_max: Option<usize>, shape: Shape, out: &mut Vec<u8>) {
    match (shape, value) {
        (Shape::Bare, Value::Missing) => {}
        (Shape::Bare, _) => append(value, bytes_max, Escape::Nothing, out),
        (Shape::Text, _) => append(value, bytes_max, Escape::Text, out),
        (Shape::JsonPart, _) => append(value, bytes_max, Escape::Json, out),
        (Shape::JsonValue, Value::Missing) => out.extend_from_slice(b"null"),
        (Shape::JsonValue, Value::Uint(_) | Value::Millis(_)) => {
            append(value, None, Escape::Json, out)
        }
        (Shape::JsonValue, Value::Object(object)) if looks_like_object(object) => {
            out.extend_from_slice(object.as_bytes());
        }
        (Shape::JsonValue, _) => {
            out.push(b'"');
            append(value, bytes_max, Escape::Json, out);
            out.push(b'"');
        }
    }
}

/// A cheap guard against a filter's mistake: what passes cannot break the line. Its grammar is the filter's duty.
fn looks_like_object(text: &str) -> bool {
    text.starts_with('{') && text.ends_with('}') && !text.bytes().any(|byte| byte < 0x20)
}

/// Appends a value as text.
fn append(value: &Value<'_>, bytes_max: Option<usize>, escape: Escape, out: &mut Vec<u8>) {
    let start = out.len();
    match value {
        Value::Missing => out.push(b'-'),
        Value::Uint(number) => append_uint(*number, out),
        Value::Millis(time) => append_millis(*time, out),
        Value::Bytes(bytes) => return escape.append(bytes, bytes_max, out),
        Value::Object(object)
            if escape == Escape::Text && bytes_max.is_none() && looks_like_object(object) =>
        {
            out.extend_from_slice(object.as_bytes());
        }
        Value::Object(object) => return escape.append(object.as_bytes(), bytes_max, out),
        Value::Spaceless(text) => {
            escape.append(text.as_bytes(), bytes_max, out);
            out[start..]
                .iter_mut()
                .filter(|byte| **byte == b' ')
                .for_each(|byte| *byte = b'_');
            return;
        }
        Value::Socket(address) => write!(out, "{address}").expect("invariant: a Vec takes all"),
        Value::Ip(address) => write!(out, "{address}").expect("invariant: a Vec takes all"),
        Value::Time(format, time) => format.append(*time, out),
        Value::Flags(flags, long) => {
            for (index, flag) in flags.iter().enumerate() {
                if index > 0 {
                    out.push(b',');
                }
                let name = if *long {
                    long_flag(*flag)
                } else {
                    flag.as_str()
                };
                out.extend_from_slice(name.as_bytes());
            }
        }
    }
    if let Some(max) = bytes_max {
        out.truncate(start + max);
    }
}

/// Milliseconds with up to three decimals, none of them an idle zero.
fn append_millis(time: std::time::Duration, out: &mut Vec<u8>) {
    append_uint(time.as_millis() as u64, out);
    let micros = u64::from(time.subsec_micros() % 1000);
    if micros > 0 {
        out.push(b'.');
        append_padded(micros, 3, out);
        while out.last() == Some(&b'0') {
            out.pop();
        }
    }
}
