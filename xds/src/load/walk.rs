//! Does a JSON value fit a protobuf message? Every field that does not is named with its place.
//!
//! What does not fit is taken out, so that the rest can still be decoded and judged. Meaning (names that must not be
//! empty, limits) is not looked at here: that is each resource's own `TryFrom`.

use super::{extensions, known, known_cluster, known_discovery, known_listener, known_tls};
use crate::{
    problems::{ConfigErrors, join},
    protobuf::{self, EXACT_INTEGER_MAX},
    wire::{
        envoy::{
            config::{
                cluster::v3::load_balancing_policy::Policy, core::v3::TypedExtensionConfig,
                route::v3::FilterConfig,
            },
            extensions::filters::network::http_connection_manager::v3::HttpFilter,
        },
        xds::r#type::v3::TypedStruct,
    },
};
use prost::Name;
use prost_reflect::{FieldDescriptor, Kind, MessageDescriptor};
use serde_json::{Map, Value, json};

/// Seconds in the longest `google.protobuf.Duration`, about 10,000 years.
const DURATION_SECONDS_MAX: u64 = 315_576_000_000;

/// Fields that are transcribed to be judged, and have no effect.
const NO_EFFECT: [(&str, &str); 1] = [(
    "envoy.config.bootstrap.v3.Bootstrap",
    "bootstrap_extensions",
)];

/// What a walk found.
#[derive(Default)]
pub(super) struct Walk {
    /// What is wrong.
    pub(super) errors: ConfigErrors,
    /// Places of fields that were taken out because they were wrong.
    pub(super) removed: Vec<String>,
    /// Places of fields that are known and have no effect.
    pub(super) ignored: Vec<String>,
    /// Whether what nobody knows is no error: as in Envoy, in configuration that comes while we run.
    pub(super) dynamic: bool,
    /// The same of a bootstrap, if it is asked for.
    tolerant: bool,
    /// Places of fields that nobody knows.
    pub(super) unknown: Vec<String>,
    /// What is inside may be of a type that nobody knows.
    optional: bool,
}

impl Walk {
    /// Of what came while we run.
    pub(super) fn dynamic() -> Self {
        Self {
            dynamic: true,
            ..Self::default()
        }
    }

    /// Of a bootstrap that may hold what nobody knows.
    pub(super) fn tolerant() -> Self {
        Self {
            tolerant: true,
            ..Self::default()
        }
    }

    /// Walks `value` as a `message` that stands at `place`; `false` if it cannot be one at all.
    pub(super) fn message(
        &mut self,
        message: &MessageDescriptor,
        value: &mut Value,
        place: &str,
    ) -> bool {
        match message.full_name() {
            "google.protobuf.Any" => self.any(value, place),
            "google.protobuf.Duration" => self.duration(value, place),
            "google.protobuf.Struct" if !value.is_object() => {
                self.mismatch(place, "an object", value)
            }
            "google.protobuf.ListValue" if !value.is_array() => {
                self.mismatch(place, "a list", value)
            }
            "google.protobuf.Struct" | "google.protobuf.Value" | "google.protobuf.ListValue" => {
                self.exact_numbers(value, place)
            }
            name if name.starts_with("google.protobuf.") && name.ends_with("Value") => {
                let kind = message
                    .get_field(1)
                    .expect("invariant: a wrapper has one field")
                    .kind();
                self.kind(&kind, value, place)
            }
            _ => match value {
                Value::Object(fields) => {
                    self.fields(message, fields, place);
                    true
                }
                _ => self.mismatch(place, "an object", value),
            },
        }
    }

    fn fields(
        &mut self,
        message: &MessageDescriptor,
        fields: &mut Map<String, Value>,
        place: &str,
    ) {
        let outer = self.optional;
        self.optional = may_be_unknown(message.full_name(), fields, outer);
        let mut seen = Vec::new();
        for key in fields.keys().cloned().collect::<Vec<_>>() {
            let Some(field) = field_by_key(message, &key) else {
                fields.remove(&key);
                self.not_transcribed(message, &key, place);
                continue;
            };
            // Null means unset, except for a JSON value of any shape.
            if fields[&key].is_null()
                && !matches!(field.kind(), Kind::Message(m) if m.full_name() == "google.protobuf.Value")
            {
                fields.remove(&key);
                continue;
            }
            let here = join(place, field.name());
            let twice = self.twice(&field, &seen, &here, place);
            seen.push(field.clone());
            if NO_EFFECT.contains(&(message.full_name(), field.name())) {
                self.ignored.push(here.clone());
            }
            if twice || !self.field(&field, &mut fields[&key], &here) {
                fields.remove(&key);
                self.removed.push(here);
            }
        }
        self.optional = outer;
    }

    /// Whether `field`, or another of the same choice, has been seen in this message.
    fn twice(
        &mut self,
        field: &FieldDescriptor,
        seen: &[FieldDescriptor],
        here: &str,
        place: &str,
    ) -> bool {
        if seen.contains(field) {
            self.errors.add(here, "written twice");
            return true;
        }
        let Some(choice) = field.containing_oneof() else {
            return false;
        };
        let Some(other) = seen
            .iter()
            .find(|other| other.containing_oneof().as_ref() == Some(&choice))
        else {
            return false;
        };
        self.errors.add(
            place,
            format!(
                "only one of '{}' and '{}' may be set",
                other.name(),
                field.name()
            ),
        );
        true
    }

    fn not_transcribed(&mut self, message: &MessageDescriptor, key: &str, place: &str) {
        let name = snake_case(key);
        let listed = |tables: [&[(&str, &[&str])]; 5]| {
            let mut entries = tables.into_iter().flatten();
            entries
                .any(|(of, fields)| *of == message.full_name() && fields.contains(&name.as_str()))
        };
        if listed([
            known::NOT_SUPPORTED,
            known_cluster::NOT_SUPPORTED,
            known_discovery::NOT_SUPPORTED,
            known_listener::NOT_SUPPORTED,
            known_tls::NOT_SUPPORTED,
        ]) {
            self.errors.add(place, format!("not supported yet: {name}"));
            self.removed.push(join(place, &name));
        } else if listed([
            known::IGNORED,
            known_cluster::IGNORED,
            known_discovery::IGNORED,
            known_listener::IGNORED,
            known_tls::IGNORED,
        ]) {
            self.ignored.push(join(place, &name));
        } else if self.dynamic || self.tolerant {
            self.unknown.push(join(place, key));
        } else {
            self.errors.add(place, format!("no such field: '{key}'"));
        }
    }

    fn field(&mut self, field: &FieldDescriptor, value: &mut Value, here: &str) -> bool {
        if field.is_map() {
            let Kind::Message(entry) = field.kind() else {
                return false;
            };
            let kind = entry.map_entry_value_field().kind();
            let Value::Object(entries) = value else {
                return self.mismatch(here, "an object", value);
            };
            for (key, value) in entries.iter_mut() {
                let place = format!("{here}[\"{key}\"]");
                self.or_default(&kind, value, place);
            }
            return true;
        }
        if field.is_list() {
            // As Envoy, takes one value for a list of it.
            if !value.is_array() {
                *value = Value::Array(vec![value.take()]);
            }
            let Value::Array(list) = value else {
                return false;
            };
            let mut index = 0;
            list.retain_mut(|value| {
                let place = format!("{here}[{index}]");
                index += 1;
                let is_left_out = is_ignored(value);
                if is_left_out {
                    self.ignored.push(place);
                } else {
                    self.or_default(&field.kind(), value, place);
                }
                !is_left_out
            });
            return true;
        }
        self.kind(&field.kind(), value, here)
    }

    /// An element that does not fit becomes the default, so that the others keep their index.
    fn or_default(&mut self, kind: &Kind, value: &mut Value, place: String) {
        if !self.kind(kind, value, &place) {
            *value = match kind {
                Kind::Message(message) if message.full_name() == "google.protobuf.Any" => {
                    any_of_nothing()
                }
                Kind::Message(_) => json!({}),
                Kind::String | Kind::Bytes => json!(""),
                Kind::Bool => json!(false),
                _ => json!(0),
            };
            self.removed.push(place);
        }
    }

    fn kind(&mut self, kind: &Kind, value: &mut Value, here: &str) -> bool {
        match kind {
            Kind::Message(message) => self.message(message, value, here),
            Kind::Enum(names) => {
                let known = match &*value {
                    Value::String(name) => names.get_value_by_name(name).is_some(),
                    Value::Number(number) => number
                        .as_i64()
                        .and_then(|number| i32::try_from(number).ok())
                        .is_some_and(|number| names.get_value(number).is_some()),
                    _ => return self.mismatch(here, "the name of an enum value", value),
                };
                if !known {
                    let all: Vec<String> = names
                        .values()
                        .map(|value| value.name().to_owned())
                        .collect();
                    self.errors.add(
                        here,
                        format!("unknown value {value}; it is one of {}", all.join(", ")),
                    );
                }
                known
            }
            Kind::String => value.is_string() || self.mismatch(here, "a string", value),
            Kind::Bytes => value.is_string() || self.mismatch(here, "a base64 string", value),
            Kind::Bool => value.is_boolean() || self.mismatch(here, "true or false", value),
            Kind::Double | Kind::Float => {
                value.is_number() || self.mismatch(here, "a number", value)
            }
            Kind::Uint32 | Kind::Fixed32 => self.integer(value, here, 0, u32::MAX.into()),
            Kind::Uint64 | Kind::Fixed64 => self.integer(value, here, 0, u64::MAX.into()),
            Kind::Int32 | Kind::Sint32 | Kind::Sfixed32 => {
                self.integer(value, here, i32::MIN.into(), i32::MAX.into())
            }
            Kind::Int64 | Kind::Sint64 | Kind::Sfixed64 => {
                self.integer(value, here, i64::MIN.into(), i64::MAX.into())
            }
        }
    }

    /// An integer, which protobuf JSON also allows as a string or with an empty fraction.
    fn integer(&mut self, value: &mut Value, here: &str, min: i128, max: i128) -> bool {
        let number = match &*value {
            Value::Number(number) => number
                .as_i64()
                .map(i128::from)
                .or_else(|| number.as_u64().map(i128::from))
                .or_else(|| number.as_f64().and_then(whole)),
            Value::String(text) => text.parse().ok(),
            _ => None,
        };
        let Some(number) = number else {
            return self.mismatch(here, "a whole number", value);
        };
        if number < min || number > max {
            self.errors.add(
                here,
                format!("must be between {min} and {max}, is {number}"),
            );
            return false;
        }
        *value = json!(number.to_string());
        true
    }

    fn duration(&mut self, value: &mut Value, place: &str) -> bool {
        let good = value.as_str().is_some_and(is_duration);
        good || self.mismatch(place, "a duration such as \"0.25s\"", value)
    }

    pub(super) fn any(&mut self, value: &mut Value, place: &str) -> bool {
        let Value::Object(fields) = value else {
            return self.mismatch(place, "an object with '@type'", value);
        };
        let Some(Value::String(type_url)) = fields.remove("@type") else {
            self.errors.add(
                place,
                "'@type' is missing: it names the type of this configuration",
            );
            return false;
        };
        if protobuf::is_typed_struct(&type_url) {
            self.typed_struct(fields, place);
        } else if let Some(message) = protobuf::descriptor(&type_url) {
            self.fields(&message, fields, place);
        } else if self.optional {
            // The filter chain decides what becomes of it; a TypedStruct carries what we cannot encode.
            let inner = Value::Object(std::mem::take(fields));
            *value = typed_struct(&type_url, &inner);
            return true;
        } else {
            self.unknown_type(&type_url, place);
            return false;
        }
        fields.insert("@type".to_owned(), Value::String(type_url));
        true
    }

    fn unknown_type(&mut self, type_url: &str, place: &str) {
        let message = if extensions::NOT_SUPPORTED.contains(&protobuf::type_name(type_url)) {
            format!("not supported yet: {type_url}")
        } else {
            format!(
                "unknown type: '{type_url}' (filters of our own come inside an xds.type.v3.TypedStruct)"
            )
        };
        self.errors.add(place, message);
    }

    fn typed_struct(&mut self, fields: &mut Map<String, Value>, place: &str) {
        let message = protobuf::descriptor(&TypedStruct::full_name());
        self.fields(
            &message.expect("invariant: TypedStruct is transcribed"),
            fields,
            place,
        );
        let inner = fields
            .get("type_url")
            .or_else(|| fields.get("typeUrl"))
            .and_then(Value::as_str);
        let Some(inner) = inner.map(str::to_owned) else {
            return;
        };
        if let Some(message) = protobuf::descriptor(&inner) {
            if let Some(Value::Object(value)) = fields.get_mut("value") {
                self.fields(&message, value, &join(place, "value"));
            }
        } else if extensions::NOT_SUPPORTED.contains(&protobuf::type_name(&inner)) && !self.optional
        {
            self.errors
                .add(place, format!("not supported yet: {inner}"));
        }
    }

    /// Whole numbers in a `Struct` must survive its doubles.
    fn exact_numbers(&mut self, value: &Value, place: &str) -> bool {
        match value {
            Value::Number(number) => {
                let size = number
                    .as_u64()
                    .or_else(|| number.as_i64().map(i64::unsigned_abs));
                let exact = size.is_none_or(|size| size <= EXACT_INTEGER_MAX);
                if !exact {
                    self.errors.add(
                        place,
                        format!("{number} is too large to be carried exactly"),
                    );
                }
                exact
            }
            // No short cut: every problem is wanted.
            Value::Array(list) => {
                let each = list.iter().enumerate();
                each.fold(true, |good, (i, value)| {
                    self.exact_numbers(value, &format!("{place}[{i}]")) && good
                })
            }
            Value::Object(fields) => fields.iter().fold(true, |good, (key, value)| {
                self.exact_numbers(value, &join(place, key)) && good
            }),
            Value::Null | Value::Bool(_) | Value::String(_) => true,
        }
    }

    fn mismatch(&mut self, here: &str, expected: &str, value: &Value) -> bool {
        self.errors
            .add(here, format!("expected {expected}, got {}", kind_of(value)));
        false
    }
}

/// Whether an element of a list is an extension that has no effect here.
fn is_ignored(element: &Value) -> bool {
    let Some(config) = member(element, ["typed_config", "typedConfig"]) else {
        return false;
    };
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let mut type_url = config.get("@type").and_then(text);
    if type_url.as_deref().is_some_and(protobuf::is_typed_struct) {
        type_url = member(config, ["type_url", "typeUrl"]).and_then(text);
    }
    type_url.is_some_and(|url| extensions::IGNORED.contains(&protobuf::type_name(&url)))
}

/// A field by either of its names.
fn member<'a>(of: &'a Value, names: [&str; 2]) -> Option<&'a Value> {
    names.into_iter().find_map(|name| of.get(name))
}

/// Whether an extension in this message may be of a type that nobody knows; `outer` says so of what is around it.
fn may_be_unknown(name: &str, fields: &Map<String, Value>, outer: bool) -> bool {
    let is_optional = || {
        ["is_optional", "isOptional"]
            .iter()
            .any(|key| fields.get(*key) == Some(&Value::Bool(true)))
    };
    let filters = [HttpFilter::full_name(), FilterConfig::full_name()];
    (filters.iter().any(|filter| name == filter) && is_optional())
        || name == Policy::full_name()
        || (name == TypedExtensionConfig::full_name() && outer)
}

pub(super) fn field_by_key(message: &MessageDescriptor, key: &str) -> Option<FieldDescriptor> {
    message
        .get_field_by_name(key)
        .or_else(|| message.get_field_by_json_name(key))
}

fn typed_struct(type_url: &str, value: &Value) -> Value {
    json!({
        "@type": format!("type.googleapis.com/{}", TypedStruct::full_name()),
        "type_url": type_url,
        "value": value,
    })
}

/// Stands where an `Any` of no known type stood; its problem is already noted.
fn any_of_nothing() -> Value {
    typed_struct("", &json!({}))
}

/// `maxRequestHeadersKb` to `max_request_headers_kb`.
pub(super) fn snake_case(key: &str) -> String {
    let mut name = String::with_capacity(key.len() + 4);
    for letter in key.chars() {
        if letter.is_ascii_uppercase() {
            name.push('_');
        }
        name.push(letter.to_ascii_lowercase());
    }
    name
}

#[expect(clippy::cast_possible_truncation, reason = "the range is checked")]
fn whole(number: f64) -> Option<i128> {
    (number.fract() == 0.0 && number.abs() <= EXACT_INTEGER_MAX as f64).then_some(number as i128)
}

fn is_duration(text: &str) -> bool {
    let Some(number) = text.strip_suffix('s') else {
        return false;
    };
    let number = number.strip_prefix('-').unwrap_or(number);
    let (seconds, fraction) = number
        .split_once('.')
        .map_or((number, None), |(s, f)| (s, Some(f)));
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    digits(seconds)
        && seconds
            .parse::<u64>()
            .is_ok_and(|seconds| seconds <= DURATION_SECONDS_MAX)
        && fraction.is_none_or(|fraction| digits(fraction) && fraction.len() <= 9)
}

fn kind_of(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(_) | Value::Number(_) => value.to_string(),
        Value::String(text) => format!("\"{}\"", text.chars().take(40).collect::<String>()),
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "an object".to_owned(),
    }
}
