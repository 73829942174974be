//! Does a document look as the schema says? All problems at once, each with its place.
//!
//! It knows the keywords that our own schema uses, and no others: a test holds the two together.

use super::{SCHEMA, text};
use serde_json::{Map, Value};
use std::sync::LazyLock;

static PARSED: LazyLock<Value> = LazyLock::new(|| {
    serde_json::from_str(SCHEMA).expect("invariant: the checked-in schema is JSON")
});

/// What is wrong with `value` by a definition of the schema: places and messages.
pub(super) fn check(definition: &str, value: &Value) -> Vec<(String, String)> {
    let mut found = Found::default();
    found.value(&PARSED["$defs"][definition], value, "");
    found.0
}

#[derive(Default)]
struct Found(Vec<(String, String)>);

impl Found {
    fn add(&mut self, place: &str, message: impl Into<String>) {
        self.0.push((place.to_owned(), message.into()));
    }

    fn value(&mut self, rule: &Value, value: &Value, place: &str) {
        if let Some(definition) = rule.get("$ref").and_then(Value::as_str) {
            let pointer = definition.trim_start_matches('#');
            let rule = PARSED.pointer(pointer).unwrap_or(&Value::Null);
            return self.value(rule, value, place);
        }
        if let Some(choices) = rule.get("oneOf").and_then(Value::as_array) {
            return self.choice(choices, value, place);
        }
        if let Some(expected) = rule.get("const") {
            if expected != value {
                self.add(place, format!("expected {expected}, got {}", shown(value)));
            }
            return;
        }
        if let Some(words) = rule.get("enum").and_then(Value::as_array) {
            return self.word(words, value, place);
        }
        let expected = kind_of(rule);
        if !is_a(expected, value) {
            let message = format!("expected {}, got {}", said(expected), shown(value));
            return self.add(place, message);
        }
        match value {
            Value::Object(fields) => self.object(rule, fields, place),
            Value::Array(items) => self.list(rule, items, place),
            Value::String(text) => self.text(rule, text, place),
            Value::Number(_) => self.number(rule, value, place),
            Value::Null | Value::Bool(_) => {}
        }
    }

    /// Choices differ in their type: the one that a value has is the one that was meant.
    fn choice(&mut self, choices: &[Value], value: &Value, place: &str) {
        match choices.iter().find(|rule| is_a(kind_of(rule), value)) {
            Some(rule) => self.value(rule, value, place),
            None => {
                let kinds: Vec<_> = choices.iter().map(|rule| said(kind_of(rule))).collect();
                let message = format!("expected {}, got {}", kinds.join(" or "), shown(value));
                self.add(place, message);
            }
        }
    }

    fn word(&mut self, words: &[Value], value: &Value, place: &str) {
        if !words.contains(value) {
            let words: Vec<_> = words.iter().filter_map(Value::as_str).collect();
            let message = format!("expected one of {}, got {}", words.join(", "), shown(value));
            self.add(place, message);
        }
    }

    fn object(&mut self, rule: &Value, fields: &Map<String, Value>, place: &str) {
        let required = rule.get("required").and_then(Value::as_array);
        for name in required.into_iter().flatten().filter_map(Value::as_str) {
            if !fields.contains_key(name) {
                self.add(&join(place, name), "required");
            }
        }
        for (name, value) in fields {
            let known = rule.get("properties").and_then(|known| known.get(name));
            match known.or(rule.get("additionalProperties")) {
                Some(rule) if rule.is_object() => self.value(rule, value, &join(place, name)),
                _ => self.add(place, format!("no such field: '{name}'")),
            }
        }
    }

    fn list(&mut self, rule: &Value, items: &[Value], place: &str) {
        let least = rule.get("minItems").and_then(Value::as_u64);
        if least.is_some_and(|least| (items.len() as u64) < least) {
            self.add(place, "must not be empty");
        }
        for (index, item) in items.iter().enumerate() {
            self.value(&rule["items"], item, &format!("{place}[{index}]"));
        }
    }

    fn text(&mut self, rule: &Value, text: &str, place: &str) {
        if rule.get("minLength").is_some() && text.is_empty() {
            self.add(place, "must not be empty");
        }
        if let Some(format) = rule.get("format").and_then(Value::as_str)
            && let Err(message) = text::check(format, text)
        {
            self.add(place, message);
        }
    }

    fn number(&mut self, rule: &Value, value: &Value, place: &str) {
        let bound = |name: &str| rule.get(name).and_then(Value::as_f64);
        let number = value.as_f64().unwrap_or(f64::NAN);
        if let Some(least) = bound("minimum").filter(|least| number < *least) {
            self.add(place, format!("must be at least {least}, got {value}"));
        }
        if let Some(most) = bound("maximum").filter(|most| number > *most) {
            self.add(place, format!("must be at most {most}, got {value}"));
        }
    }
}

fn join(place: &str, name: &str) -> String {
    if place.is_empty() {
        name.to_owned()
    } else {
        format!("{place}.{name}")
    }
}

fn kind_of(rule: &Value) -> &str {
    rule.get("type").and_then(Value::as_str).unwrap_or_default()
}

fn is_a(kind: &str, value: &Value) -> bool {
    match kind {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_u64() || value.is_i64(),
        "number" => value.is_number(),
        _ => false,
    }
}

/// A type in words.
fn said(kind: &str) -> &'static str {
    match kind {
        "object" => "fields",
        "array" => "a list",
        "string" => "a text",
        "boolean" => "true or false",
        "integer" => "a whole number",
        _ => "a number",
    }
}

/// A value, or what it is if it is large.
fn shown(value: &Value) -> String {
    match value {
        Value::Object(_) => "fields".to_owned(),
        Value::Array(_) => "a list".to_owned(),
        Value::Null => "nothing".to_owned(),
        Value::Bool(_) | Value::Number(_) | Value::String(_) => value.to_string(),
    }
}
