//! Chat templates as the engines run them: Jinja with the settings and functions of Hugging Face's `transformers`.

use minijinja::{Environment, Error, ErrorKind, Value, value::Kwargs};
use serde::Serialize;
use serde_json::ser::Formatter;
use std::{
    io,
    time::{SystemTime, UNIX_EPOCH},
};

/// A compiled chat template.
pub(super) struct ChatTemplate {
    environment: Environment<'static>,
    bos_token: Value,
    eos_token: Value,
    pad_token: Value,
    unk_token: Value,
}

/// Special tokens that templates may name; empty if the model has none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct SpecialTokens {
    pub(super) bos: Option<String>,
    pub(super) eos: Option<String>,
    pub(super) pad: Option<String>,
    pub(super) unk: Option<String>,
}

const NAME: &str = "chat";

impl ChatTemplate {
    /// Compiles `source`.
    pub(super) fn new(source: String, tokens: SpecialTokens) -> Result<Self, Error> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", tojson);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_template_owned(NAME, source)?;
        let value = |token: Option<String>| token.map_or(Value::UNDEFINED, Value::from);
        Ok(Self {
            environment,
            bos_token: value(tokens.bos),
            eos_token: value(tokens.eos),
            pad_token: value(tokens.pad),
            unk_token: value(tokens.unk),
        })
    }

    /// Renders a conversation. `more` are further variables (`chat_template_kwargs`), which win over ours.
    pub(super) fn render(
        &self,
        messages: &Value,
        tools: &Value,
        add_generation_prompt: bool,
        more: &[(String, Value)],
    ) -> Result<String, Error> {
        let mut variables = vec![
            ("messages", messages.clone()),
            ("tools", tools.clone()),
            ("documents", Value::from(())),
            ("add_generation_prompt", Value::from(add_generation_prompt)),
            ("bos_token", self.bos_token.clone()),
            ("eos_token", self.eos_token.clone()),
            ("pad_token", self.pad_token.clone()),
            ("unk_token", self.unk_token.clone()),
        ];
        variables.retain(|(name, value)| {
            !value.is_undefined() && !more.iter().any(|(other, _)| other == name)
        });
        variables.extend(
            more.iter()
                .map(|(name, value)| (name.as_str(), value.clone())),
        );
        self.environment
            .get_template(NAME)?
            .render(variables.into_iter().collect::<Value>())
    }
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

/// Python's `json.dumps(ensure_ascii=False)`: blanks after `,` and `:`, or lines with `indent`.
#[expect(
    clippy::needless_pass_by_value,
    reason = "minijinja hands over keyword arguments by value"
)]
fn tojson(value: &Value, kwargs: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    let _: Option<bool> = kwargs.get("ensure_ascii")?;
    let _: Option<bool> = kwargs.get("sort_keys")?;
    kwargs.assert_all_used()?;
    let mut out = Vec::new();
    let written = match indent {
        Some(indent) => {
            let indent = " ".repeat(indent);
            let formatter = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(
                &mut out, formatter,
            ))
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(
            &mut out, Spaced,
        )),
    };
    written.map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))?;
    // JSON comes from UTF-8, and marked safe it is not escaped again.
    Ok(Value::from_safe_string(
        String::from_utf8_lossy(&out).into_owned(),
    ))
}

/// Python's separators.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        if first {
            Ok(())
        } else {
            writer.write_all(b", ")
        }
    }

    fn begin_object_key<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        if first {
            Ok(())
        } else {
            writer.write_all(b", ")
        }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}

/// The current time (UTC) in strftime's words; those that templates use.
fn strftime_now(format: &str) -> String {
    let seconds = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    strftime(format, seconds)
}

fn strftime(format: &str, seconds: u64) -> String {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = [
        "Thursday",
        "Friday",
        "Saturday",
        "Sunday",
        "Monday",
        "Tuesday",
        "Wednesday",
    ];
    let days = seconds / 86_400;
    let (year, month, day) = civil(days);
    let month_name = MONTHS[month as usize - 1];
    let day_name = DAYS[(days % 7) as usize];
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(char) = chars.next() {
        if char != '%' {
            out.push(char);
            continue;
        }
        match chars.next() {
            Some('Y') => out.push_str(&year.to_string()),
            Some('m') => out.push_str(&format!("{month:02}")),
            Some('d') => out.push_str(&format!("{day:02}")),
            Some('B') => out.push_str(month_name),
            Some('b') => out.push_str(&month_name[..3]),
            Some('A') => out.push_str(day_name),
            Some('a') => out.push_str(&day_name[..3]),
            Some('H') => out.push_str(&format!("{:02}", seconds / 3600 % 24)),
            Some('M') => out.push_str(&format!("{:02}", seconds / 60 % 60)),
            Some('S') => out.push_str(&format!("{:02}", seconds % 60)),
            Some('%') => out.push('%'),
            Some(other) => out.extend(['%', other]),
            None => out.push('%'),
        }
    }
    out
}

/// Days since 1970-01-01 to year, month, day (Howard Hinnant's `civil_from_days`).
fn civil(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let of_era = shifted % 146_097;
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json(text: &str) -> Value {
        serde_json::from_str(text).unwrap()
    }

    fn render(source: &str, messages: &str, tools: &str) -> Result<String, Error> {
        let tokens = SpecialTokens {
            bos: Some("<s>".into()),
            ..SpecialTokens::default()
        };
        let template = ChatTemplate::new(source.into(), tokens)?;
        template.render(&json(messages), &json(tools), true, &[])
    }

    #[test]
    fn blocks_are_trimmed_as_transformers_does() {
        let source = "{{ bos_token }}\n  {% for m in messages %}\n{{ m['role'] }}: {{ m.content.strip() }}\n  {% endfor %}\n{% if add_generation_prompt %}A:{% endif %}";
        let text = render(source, r#"[{"role":"user","content":" hi "}]"#, "null").unwrap();
        assert_eq!(text, "<s>\nuser: hi\nA:");
    }

    #[test]
    fn json_is_written_as_python_does_with_keys_in_order() {
        let tools = r#"[{"type":"function","function":{"name":"f","a":{"z":1,"b":[true,null,"<é'\"&>"]}}}]"#;
        let text = render(
            "{% for t in tools %}{{ t | tojson }}{% endfor %}",
            "[]",
            tools,
        )
        .unwrap();
        assert_eq!(
            text,
            r#"{"type": "function", "function": {"name": "f", "a": {"z": 1, "b": [true, null, "<é'\"&>"]}}}"#
        );
        let text = render(
            "{{ tools | tojson(indent=2) }}",
            "[]",
            r#"{"a":[1],"b":{}}"#,
        )
        .unwrap();
        assert_eq!(text, "{\n  \"a\": [\n    1\n  ],\n  \"b\": {}\n}");
    }

    #[test]
    fn a_template_may_refuse() {
        let error = render("{{ raise_exception('no system role') }}", "[]", "null").unwrap_err();
        assert!(error.to_string().contains("no system role"));
    }

    #[test]
    fn dates_are_right() {
        assert_eq!(
            strftime("%d %b %Y %A %H:%M:%S %%", 1_795_337_681),
            "22 Nov 2026 Sunday 08:54:41 %"
        );
        assert_eq!(
            strftime("%Y-%m-%d %a %B", 951_782_400),
            "2000-02-29 Tue February"
        );
    }
}
