//! Text to JSON value, where a key written twice is an error instead of a silent overwrite.

use super::Syntax;
use crate::problems::ConfigErrors;
use serde::{
    Deserialize, Deserializer,
    de::{Error, MapAccess, SeqAccess, Visitor},
};
use serde_json::{Map, Number, Value};
use std::fmt;

/// The text as a value; the error names line and column.
pub(super) fn parse(text: &str, syntax: Syntax) -> Result<Value, ConfigErrors> {
    let parsed = match syntax {
        Syntax::Yaml => serde_yaml_ng::from_str::<Strict>(text)
            .map_err(|error| format!("not valid YAML: {error}")),
        Syntax::Json => {
            serde_json::from_str::<Strict>(text).map_err(|error| format!("not valid JSON: {error}"))
        }
    };
    parsed
        .map(|strict| strict.0)
        .map_err(|message| ConfigErrors::one("", message))
}

/// The documents of a text, without those that are empty: YAML may hold several, JSON is one.
pub(super) fn documents(text: &str, syntax: Syntax) -> Result<Vec<Value>, ConfigErrors> {
    if syntax == Syntax::Json {
        return Ok(vec![parse(text, syntax)?]);
    }
    let read = serde_yaml_ng::Deserializer::from_str(text)
        .map(|document| Strict::deserialize(document).map(|strict| strict.0))
        .filter(|read| !matches!(read, Ok(Value::Null)));
    read.collect::<Result<_, _>>()
        .map_err(|error| ConfigErrors::one("", format!("not valid YAML: {error}")))
}

struct Strict(Value);

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(AnyValue).map(Self)
    }
}

struct AnyValue;

impl<'de> Visitor<'de> for AnyValue {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value that JSON can express")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        let number = Number::from_f64(value).ok_or_else(|| E::custom("a number must be finite"))?;
        Ok(Value::Number(number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(Strict(value)) = list.next_element()? {
            values.push(value);
        }
        Ok(Value::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut fields = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            let Strict(value) = entries.next_value()?;
            if fields.contains_key(&key) {
                return Err(A::Error::custom(format!("'{key}' is written twice")));
            }
            fields.insert(key, value);
        }
        Ok(Value::Object(fields))
    }
}
