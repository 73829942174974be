//! Answers "which text fits this JSON schema": a writer that follows the schema and takes its choices from a hash.
//!
//! Knows what people put into tools and response formats: objects, arrays, strings, numbers, booleans, null, `enum`,
//! `const`, `anyOf`/`oneOf` and references into the schema itself. Any other keyword that restricts is refused by its
//! name, wherever it stands, so that a text is never written that only seems to fit.

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::model::mix;

/// Nesting at which a schema that refers to itself is given up.
const DEPTH_MAX: usize = 32;
/// Nesting from which on only what is required is written.
const DEPTH_BRIEF: usize = 4;
/// Words of a string whose length the schema leaves open: from this, and up to twice as many. Long, as those of the
/// small model behind the recordings are.
const WORDS: u64 = 20;
/// What a range of numbers spans when one of its ends is open.
const SPAN: f64 = 100.0;

/// Keywords that say something a text does not depend on, or that the writer keeps by never writing more.
const REMARKS: &[&str] = &[
    "$schema",
    "$id",
    "$comment",
    "$defs",
    "definitions",
    "title",
    "description",
    "default",
    "examples",
    "deprecated",
    "readOnly",
    "writeOnly",
    "additionalProperties",
    "strict",
];
const KEYWORDS: &[&str] = &[
    "type",
    "properties",
    "required",
    "items",
    "anyOf",
    "oneOf",
    "enum",
    "const",
    "$ref",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "exclusiveMaximum",
];

/// A JSON object whose keys keep their order.
struct Ordered<T>(Vec<(String, T)>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Ordered<T> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Entries<T>(std::marker::PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Entries<T> {
            type Value = Ordered<T>;

            fn expecting(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                out.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Ordered<T>, A::Error> {
                let mut out = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    out.push(entry);
                }
                Ok(Ordered(out))
            }
        }
        from.deserialize_map(Entries(std::marker::PhantomData))
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Types {
    One(String),
    Many(Vec<String>),
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Keywords<'a> {
    r#type: Option<Types>,
    #[serde(borrow)]
    properties: Option<Ordered<&'a RawValue>>,
    required: Vec<String>,
    #[serde(borrow)]
    items: Option<&'a RawValue>,
    #[serde(borrow)]
    any_of: Vec<&'a RawValue>,
    #[serde(borrow)]
    one_of: Vec<&'a RawValue>,
    #[serde(borrow, rename = "enum")]
    values: Vec<&'a RawValue>,
    #[serde(borrow, rename = "const")]
    value: Option<&'a RawValue>,
    #[serde(rename = "$ref")]
    reference: Option<String>,
    min_length: Option<usize>,
    max_length: Option<usize>,
    min_items: Option<usize>,
    max_items: Option<usize>,
    minimum: Option<f64>,
    maximum: Option<f64>,
    exclusive_minimum: Option<f64>,
    exclusive_maximum: Option<f64>,
}

fn keywords(schema: &RawValue) -> Result<Keywords<'_>, String> {
    if schema.get() == "true" {
        return Ok(Keywords::default());
    }
    let wrong = |error: serde_json::Error| format!("{error}");
    let all: Ordered<IgnoredAny> = serde_json::from_str(schema.get()).map_err(wrong)?;
    for (name, _) in &all.0 {
        if !REMARKS.contains(&name.as_str()) && !KEYWORDS.contains(&name.as_str()) {
            return Err(name.clone());
        }
    }
    serde_json::from_str(schema.get()).map_err(wrong)
}

impl<'a> Keywords<'a> {
    /// What stands instead of this schema: the target of its reference, or one of several.
    fn branches(&self, root: &'a RawValue) -> Result<Vec<&'a RawValue>, String> {
        match &self.reference {
            Some(reference) => Ok(vec![
                find(root, reference).ok_or_else(|| reference.clone())?,
            ]),
            None => Ok(self.any_of.iter().chain(&self.one_of).copied().collect()),
        }
    }

    fn properties(&self) -> &[(String, &'a RawValue)] {
        self.properties.as_ref().map_or(&[], |list| &list.0)
    }

    fn types(&self) -> Vec<&str> {
        match &self.r#type {
            Some(Types::One(one)) => vec![one],
            Some(Types::Many(many)) => many.iter().map(String::as_str).collect(),
            None if self.properties.is_some() || !self.required.is_empty() => vec!["object"],
            None if self.items.is_some() => vec!["array"],
            None => vec!["string"],
        }
    }

    /// The ends of a range of numbers, and whether each belongs to it.
    fn range(&self) -> ((f64, bool), (f64, bool)) {
        let low = match (self.minimum, self.exclusive_minimum) {
            (Some(at), Some(above)) if at > above => Some((at, true)),
            (_, Some(above)) => Some((above, false)),
            (at, None) => at.map(|at| (at, true)),
        };
        let high = match (self.maximum, self.exclusive_maximum) {
            (Some(at), Some(below)) if at < below => Some((at, true)),
            (_, Some(below)) => Some((below, false)),
            (at, None) => at.map(|at| (at, true)),
        };
        match (low, high) {
            (Some(low), Some(high)) => (low, high),
            (Some(low), None) => (low, (low.0 + SPAN, true)),
            (None, Some(high)) => ((high.0 - SPAN, true), high),
            (None, None) => ((0.0, true), (SPAN, true)),
        }
    }
}

/// The schema a reference names: `#` or `#/a/b`.
fn find<'a>(root: &'a RawValue, reference: &str) -> Option<&'a RawValue> {
    let mut at = root;
    for step in reference.strip_prefix('#')?.split('/').skip(1) {
        let step = step.replace("~1", "/").replace("~0", "~");
        let entries: Ordered<&RawValue> = serde_json::from_str(at.get()).ok()?;
        at = entries.0.into_iter().find(|(name, _)| *name == step)?.1;
    }
    Some(at)
}

/// Looks at every schema within `schema` once; the error names the first thing that cannot be followed.
pub(crate) fn check(schema: &RawValue) -> Result<(), String> {
    let (mut open, mut seen) = (vec![schema], Vec::new());
    while let Some(one) = open.pop() {
        if seen.contains(&one.get().as_ptr()) {
            continue;
        }
        seen.push(one.get().as_ptr());
        let keywords = keywords(one)?;
        for name in keywords.types() {
            if !TYPES.contains(&name) {
                return Err(format!("type {name}"));
            }
        }
        open.extend(keywords.branches(schema)?);
        open.extend(keywords.items);
        open.extend(keywords.properties().iter().map(|(_, property)| *property));
    }
    Ok(())
}

const TYPES: &[&str] = &[
    "object", "array", "string", "integer", "number", "boolean", "null",
];

/// Writes one text that fits `schema`. `bits` decides what is open; `word` gives words for strings. The error names
/// what cannot be followed.
pub(crate) fn write(
    schema: &RawValue,
    bits: u64,
    word: &dyn Fn(u64) -> String,
) -> Result<String, String> {
    let mut writer = Writer {
        root: schema,
        bits,
        word,
        out: String::new(),
    };
    writer.value(schema, 0)?;
    Ok(writer.out)
}

struct Writer<'a> {
    root: &'a RawValue,
    bits: u64,
    word: &'a dyn Fn(u64) -> String,
    out: String,
}

impl<'a> Writer<'a> {
    fn below(&mut self, end: u64) -> u64 {
        self.bits = mix(self.bits);
        (self.bits >> 20) % end.max(1)
    }

    fn one<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.below(list.len() as u64) as usize]
    }

    fn value(&mut self, schema: &'a RawValue, depth: usize) -> Result<(), String> {
        if depth > DEPTH_MAX {
            return Err("a schema without an end".to_owned());
        }
        let keywords = keywords(schema)?;
        let mut branches = keywords.branches(self.root)?;
        if !branches.is_empty() {
            if depth > DEPTH_BRIEF && branches.iter().any(|branch| is_plain(branch)) {
                branches.retain(|branch| is_plain(branch));
            }
            let branch = self.one(&branches);
            return self.value(branch, depth + 1);
        }
        if let Some(value) = keywords.value {
            self.out.push_str(value.get());
            return Ok(());
        }
        if !keywords.values.is_empty() {
            let value = self.one(&keywords.values);
            self.out.push_str(value.get());
            return Ok(());
        }
        match self.one(&keywords.types()) {
            "object" => self.object(&keywords, depth),
            "array" => self.array(&keywords, depth),
            "string" => self.string(&keywords),
            "integer" => self.integer(&keywords),
            "number" => self.number(&keywords),
            "boolean" => {
                let value = self.one(&["true", "false"]);
                self.out.push_str(value);
                Ok(())
            }
            "null" => {
                self.out.push_str("null");
                Ok(())
            }
            other => Err(format!("type {other}")),
        }
    }

    fn object(&mut self, keywords: &Keywords<'a>, depth: usize) -> Result<(), String> {
        let mut lead = "";
        self.out.push('{');
        for (name, schema) in keywords.properties() {
            let required = keywords.required.contains(name);
            if !required && (depth > DEPTH_BRIEF || self.below(2) == 0) {
                continue;
            }
            self.name(lead, name);
            self.value(schema, depth + 1)?;
            lead = ", ";
        }
        for name in &keywords.required {
            if !keywords.properties().iter().any(|(known, _)| known == name) {
                self.name(lead, name);
                self.string(&Keywords::default())?;
                lead = ", ";
            }
        }
        self.out.push('}');
        Ok(())
    }

    fn name(&mut self, lead: &str, name: &str) {
        self.out.push_str(lead);
        self.out
            .push_str(&serde_json::Value::from(name).to_string());
        self.out.push_str(": ");
    }

    fn array(&mut self, keywords: &Keywords<'a>, depth: usize) -> Result<(), String> {
        let least = keywords.min_items.unwrap_or(0);
        let most = keywords.max_items.unwrap_or(least + 3);
        if least > most {
            return Err("minItems above maxItems".to_owned());
        }
        let more = if depth > DEPTH_BRIEF {
            0
        } else {
            self.below((most - least).min(3) as u64 + 1) as usize
        };
        self.out.push('[');
        for at in 0..least + more {
            if at > 0 {
                self.out.push_str(", ");
            }
            match keywords.items {
                Some(items) => self.value(items, depth + 1)?,
                None => self.string(&Keywords::default())?,
            }
        }
        self.out.push(']');
        Ok(())
    }

    fn string(&mut self, keywords: &Keywords<'_>) -> Result<(), String> {
        let least = keywords.min_length.unwrap_or(0);
        let most = keywords.max_length.unwrap_or(usize::MAX);
        if least > most {
            return Err("minLength above maxLength".to_owned());
        }
        let words = WORDS + self.below(WORDS + 1);
        let (mut text, mut written) = (String::new(), 0);
        while written < words || text.chars().count() < least {
            let bits = self.below(u64::MAX);
            if written > 0 {
                text.push(' ');
            }
            text.push_str(&(self.word)(bits));
            written += 1;
        }
        let text: String = text.chars().take(most).collect();
        self.out
            .push_str(&serde_json::Value::from(text).to_string());
        Ok(())
    }

    fn integer(&mut self, keywords: &Keywords<'_>) -> Result<(), String> {
        let ((low, with_low), (high, with_high)) = keywords.range();
        let first = if with_low {
            low.ceil()
        } else {
            low.floor() + 1.0
        };
        let last = if with_high {
            high.floor()
        } else {
            high.ceil() - 1.0
        };
        if first > last {
            return Err("an empty range of numbers".to_owned());
        }
        let steps = (last - first).min(1_000_000.0) as u64;
        let value = first + self.below(steps + 1) as f64;
        self.out.push_str(&format!("{value}"));
        Ok(())
    }

    fn number(&mut self, keywords: &Keywords<'_>) -> Result<(), String> {
        let ((low, with_low), (high, with_high)) = keywords.range();
        if low > high || low == high && !(with_low && with_high) {
            return Err("an empty range of numbers".to_owned());
        }
        // Between the ends, never at one of them.
        let value = low + (high - low) * (self.below(63) + 1) as f64 / 64.0;
        self.out.push_str(&format!("{value}"));
        Ok(())
    }
}

/// Whether a schema refers to no other by name, so that writing it comes to an end soon.
fn is_plain(schema: &RawValue) -> bool {
    !schema.get().contains("\"$ref\"")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn wrote(schema: &Value, bits: u64) -> Result<Value, String> {
        let schema = RawValue::from_string(schema.to_string()).unwrap();
        check(&schema)?;
        let text = write(&schema, bits, &|bits| format!("w{}", bits % 10))?;
        Ok(serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error} in {text}")))
    }

    #[test]
    fn texts_fit_their_schema() {
        let schema = json!({
            "type": "object",
            "title": "T",
            "$defs": {"node": {"type": "object", "required": ["next"], "properties": {
                "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}}},
            "required": ["id", "ratio", "open", "kind", "tags", "name", "maybe", "list", "more"],
            "properties": {
                "id": {"type": "integer", "minimum": 3, "exclusiveMaximum": 5},
                "ratio": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
                "open": {"type": "boolean"},
                "kind": {"enum": ["a \"quoted\" one", 7, null]},
                "tags": {"type": "array", "minItems": 2, "maxItems": 3, "items": {"type": "string", "maxLength": 4}},
                "name": {"type": "string", "minLength": 300},
                "maybe": {"type": ["integer", "null"]},
                "list": {"$ref": "#/$defs/node"},
                "extra": {"const": {"x": 1}}
            }
        });
        for bits in 0..500 {
            let value = wrote(&schema, bits).unwrap();
            assert!(matches!(value["id"].as_i64(), Some(3 | 4)), "{value}");
            let ratio = value["ratio"].as_f64().unwrap();
            assert!(ratio > 0.0 && ratio <= 1.0, "{value}");
            assert!(value["open"].is_boolean() && value["more"].is_string());
            let kinds = [json!("a \"quoted\" one"), json!(7), Value::Null];
            assert!(kinds.contains(&value["kind"]), "{value}");
            let tags = value["tags"].as_array().unwrap();
            assert!((2..=3).contains(&tags.len()), "{value}");
            assert!(tags.iter().all(|tag| tag.as_str().unwrap().len() <= 4));
            assert!(value["name"].as_str().unwrap().len() >= 300);
            assert!(value["maybe"].is_i64() || value["maybe"].is_null());
            assert!(value["list"].is_object());
            let extra = value.get("extra");
            assert!(extra.is_none_or(|extra| *extra == json!({"x": 1})));
        }
        assert_ne!(wrote(&schema, 1), wrote(&schema, 2));
    }

    #[test]
    fn properties_keep_the_order_of_the_schema() {
        let text =
            r#"{"required": ["z", "a"], "properties": {"z": {"const": 1}, "a": {"const": 2}}}"#;
        let schema = RawValue::from_string(text.to_owned()).unwrap();
        assert_eq!(
            write(&schema, 0, &|_| String::new()).unwrap(),
            r#"{"z": 1, "a": 2}"#
        );
    }

    #[test]
    fn what_cannot_be_followed_is_named_wherever_it_stands() {
        for (schema, says) in [
            (json!({"type": "string", "pattern": "a+"}), "pattern"),
            (
                json!({"anyOf": [{"type": "null"}, {"items": {"format": "date"}}]}),
                "format",
            ),
            (json!({"type": "date"}), "type date"),
            (json!({"$ref": "#/$defs/none"}), "#/$defs/none"),
            (
                json!({"type": "integer", "minimum": 2, "maximum": 1}),
                "an empty range of numbers",
            ),
            (
                json!({"required": ["a"], "properties": {"a": {"$ref": "#"}}}),
                "a schema without an end",
            ),
        ] {
            assert_eq!(wrote(&schema, 0), Err(says.to_owned()), "{schema}");
        }
    }
}
