//! JSON whose keys keep their order, and how two such values are compared with what depends on a model left out.

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};

/// Keys whose values depend on text, ids or time: only the kind of value is compared.
const MASKED: &[&str] = &[
    "id",
    "request_id",
    "created",
    "created_at",
    "item_id",
    "delta",
    "arguments",
    "token_logprobs",
    "text_offset",
    "rank",
    "decoded_token",
    "content",
    "text",
    "token",
    "logprob",
    "bytes",
    "prompt_tokens",
    "total_tokens",
    "cached_tokens",
    "created_cache_tokens",
    "input_tokens",
    "cache_write_tokens",
    "cache_creation_input_tokens",
    "cache_read_input_tokens",
    "prompt_token_ids",
    "token_ids",
    "tokens",
    "token_strs",
    "count",
    "prompt",
    "endpoint",
    "replay_endpoint",
];

/// Keys whose objects have tokens as their keys, as many as it takes: only the kinds of their values are compared.
const BY_TOKEN: &[&str] = &["top_logprobs", "prompt_logprobs"];

#[derive(Debug)]
pub(crate) enum Json {
    Null,
    Bool(bool),
    Number(String),
    Text(String),
    List(Vec<Self>),
    Object(Vec<(String, Self)>),
}

impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = Json;

            fn expecting(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                out.write_str("JSON")
            }
            fn visit_unit<E>(self) -> Result<Json, E> {
                Ok(Json::Null)
            }
            fn visit_bool<E>(self, value: bool) -> Result<Json, E> {
                Ok(Json::Bool(value))
            }
            fn visit_u64<E>(self, value: u64) -> Result<Json, E> {
                Ok(Json::Number(value.to_string()))
            }
            fn visit_i64<E>(self, value: i64) -> Result<Json, E> {
                Ok(Json::Number(value.to_string()))
            }
            fn visit_f64<E>(self, value: f64) -> Result<Json, E> {
                Ok(Json::Number(format!("{value:?}")))
            }
            fn visit_str<E>(self, value: &str) -> Result<Json, E> {
                Ok(Json::Text(value.to_owned()))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Json, A::Error> {
                let mut out = Vec::new();
                while let Some(value) = list.next_element()? {
                    out.push(value);
                }
                Ok(Json::List(out))
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Json, A::Error> {
                let mut out = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    out.push(entry);
                }
                Ok(Json::Object(out))
            }
        }
        from.deserialize_any(Any)
    }
}

impl Json {
    pub(crate) fn parse(text: &str) -> Self {
        serde_json::from_str(text).unwrap_or_else(|error| panic!("{error} in {text}"))
    }

    /// The value written out, with masked values as their kind, and `also` masked too.
    pub(crate) fn shape(&self, also: &[&str]) -> String {
        self.write(false, also)
    }

    /// The kinds in a list of objects that have tokens as their keys, equal neighbours counted once; `None` if `key`
    /// is of no such list. (The logprobs of chat tell tokens as values.)
    fn by_token(&self, key: &str, also: &[&str]) -> Option<String> {
        let Self::List(list) = self else { return None };
        let tells = |value: &Self| matches!(value, Self::Object(entries) if entries.iter().any(|(key, _)| key == "token"));
        if !BY_TOKEN.contains(&key) || list.iter().any(tells) {
            return None;
        }
        let mut shapes = Vec::new();
        for value in list {
            match value {
                Self::Object(entries) => shapes.extend(
                    entries
                        .iter()
                        .map(|(_, value)| format!("{{*:{}}}", value.write(true, also))),
                ),
                other => shapes.push(other.write(true, also)),
            }
        }
        shapes.dedup();
        Some(format!("[{}]", shapes.join(",")))
    }

    fn write(&self, masked: bool, also: &[&str]) -> String {
        match self {
            Self::Null => "null".to_owned(),
            Self::Bool(value) => value.to_string(),
            Self::Number(_) if masked => "#".to_owned(),
            Self::Text(_) if masked => "\"…\"".to_owned(),
            Self::Number(value) => value.clone(),
            Self::Text(value) => format!("{value:?}"),
            Self::List(list) => {
                let mut shapes: Vec<String> =
                    list.iter().map(|value| value.write(masked, also)).collect();
                if masked && !list.iter().any(|value| matches!(value, Self::Object(_))) {
                    shapes.dedup();
                }
                format!("[{}]", shapes.join(","))
            }
            Self::Object(entries) => {
                let entry = |(key, value): &(String, Self)| {
                    let masked = MASKED.contains(&key.as_str()) || also.contains(&key.as_str());
                    match value.by_token(key, also) {
                        Some(shape) => format!("{key}:{shape}"),
                        None => format!("{key}:{}", value.write(masked, also)),
                    }
                };
                format!(
                    "{{{}}}",
                    entries.iter().map(entry).collect::<Vec<_>>().join(",")
                )
            }
        }
    }
}
