//! A message as a control plane sends it, as the JSON that a file would hold, so that both are judged by the same rules.
//!
//! A field that we did not transcribe has a number and no name on the wire. [`NUMBERS`] gives it the name under which it is
//! refused or ignored; what has none there is unknown to everybody. What types of an `Any` are not ours keep their type URL alone.

use crate::{
    problems::ConfigErrors,
    protobuf::{descriptor, dynamic_to_json},
};
use prost::{Message, encoding::decode_varint};
use prost_reflect::{DynamicMessage, FieldDescriptor, MapKey, ReflectMessage, Value as Reflected};
use prost_types::Any;
use serde_json::{Map, Value, json};
use std::{collections::HashMap, sync::LazyLock};

/// Configuration nested deeper in `Any`s is refused.
const ANYS_MAX: usize = 32;

/// Fields of Envoy's that we left out, a message a line: its name, and `number=name` of each.
const NUMBERS: &str = include_str!("numbers.txt");

/// Names of fields left out, by message and number.
static NAMES: LazyLock<HashMap<(&str, u32), &str>> = LazyLock::new(|| {
    let lines = NUMBERS.lines().filter_map(|line| line.split_once(' '));
    let fields = lines.flat_map(|(message, fields)| {
        let fields = fields.split(' ').filter_map(|field| field.split_once('='));
        fields.filter_map(move |(number, name)| Some(((message, number.parse().ok()?), name)))
    });
    fields.collect()
});

/// A resource as it came, not looked at yet.
#[derive(Debug, Clone, PartialEq)]
pub struct Packed(pub(crate) Any);

/// The first field of all resources is their name.
#[derive(Clone, PartialEq, Message)]
struct Named {
    #[prost(string, tag = "1")]
    name: String,
}

impl From<Any> for Packed {
    fn from(any: Any) -> Self {
        Self(any)
    }
}

impl Packed {
    /// Its name; empty if it has none. Of a message that cannot be read it is still found where it comes first.
    #[must_use]
    pub(crate) fn name(&self) -> String {
        let bytes = &*self.0.value;
        let named = Named::decode(bytes).map(|named| named.name);
        named.unwrap_or_else(|_| first_text(bytes).unwrap_or_default())
    }

    /// As the JSON of an `Any`.
    ///
    /// # Errors
    /// It is no message of the type that it says, or nested too deeply.
    pub fn to_json(&self) -> Result<Value, ConfigErrors> {
        any_to_json(&self.0, ANYS_MAX).map_err(|message| ConfigErrors::one("", message))
    }
}

/// Field 1 as a text, if a message begins with it.
fn first_text(mut bytes: &[u8]) -> Option<String> {
    const TAG: u64 = 1 << 3 | 2;
    let tag = decode_varint(&mut bytes).ok()?;
    let length = usize::try_from(decode_varint(&mut bytes).ok()?).ok()?;
    let text = bytes.get(..length).filter(|_| tag == TAG)?;
    String::from_utf8(text.to_vec()).ok()
}

fn any_to_json(any: &Any, depth: usize) -> Result<Value, String> {
    let Some(depth) = depth.checked_sub(1) else {
        return Err("nested too deeply".to_owned());
    };
    let mut fields = match descriptor(&any.type_url) {
        Some(known) => {
            let message = DynamicMessage::decode(known, &*any.value)
                .map_err(|error| format!("not a valid {}: {error}", any.type_url))?;
            fields_to_json(&message, depth)?
        }
        None => Map::new(),
    };
    fields.insert("@type".to_owned(), Value::String(any.type_url.clone()));
    Ok(Value::Object(fields))
}

fn fields_to_json(message: &DynamicMessage, depth: usize) -> Result<Map<String, Value>, String> {
    let mut fields = Map::new();
    for (field, value) in message.fields() {
        let value = field_to_json(&field, value, depth)?;
        fields.insert(field.name().to_owned(), value);
    }
    let descriptor = message.descriptor();
    for unknown in message.unknown_fields() {
        let number = unknown.number();
        let name = NAMES.get(&(descriptor.full_name(), number));
        let name = name.map_or_else(|| number.to_string(), |name| (*name).to_owned());
        fields.insert(name, Value::Null);
    }
    Ok(fields)
}

fn field_to_json(
    field: &FieldDescriptor,
    value: &Reflected,
    depth: usize,
) -> Result<Value, String> {
    match value {
        Reflected::List(list) => list
            .iter()
            .map(|value| value_to_json(field, value, depth))
            .collect(),
        Reflected::Map(map) => {
            let prost_reflect::Kind::Message(entry) = field.kind() else {
                return Err(format!("{}: no map", field.full_name()));
            };
            let of_entry = entry.map_entry_value_field();
            let entries = map.iter().map(|(key, value)| {
                Ok((key_to_text(key), value_to_json(&of_entry, value, depth)?))
            });
            entries
                .collect::<Result<Map<_, _>, String>>()
                .map(Value::Object)
        }
        value => value_to_json(field, value, depth),
    }
}

fn key_to_text(key: &MapKey) -> String {
    match key {
        MapKey::Bool(key) => key.to_string(),
        MapKey::I32(key) => key.to_string(),
        MapKey::I64(key) => key.to_string(),
        MapKey::U32(key) => key.to_string(),
        MapKey::U64(key) => key.to_string(),
        MapKey::String(key) => key.clone(),
    }
}

/// One value in protobuf's JSON mapping.
fn value_to_json(
    field: &FieldDescriptor,
    value: &Reflected,
    depth: usize,
) -> Result<Value, String> {
    use base64::{Engine, engine::general_purpose::STANDARD};
    Ok(match value {
        Reflected::Bool(value) => json!(value),
        Reflected::I32(value) => json!(value),
        Reflected::U32(value) => json!(value),
        Reflected::I64(value) => json!(value.to_string()),
        Reflected::U64(value) => json!(value.to_string()),
        Reflected::F32(value) => json!(value),
        Reflected::F64(value) => json!(value),
        Reflected::String(text) => json!(text),
        Reflected::Bytes(bytes) => json!(STANDARD.encode(bytes)),
        Reflected::EnumNumber(number) => enum_to_json(field, *number),
        Reflected::Message(message) => message_to_json(message, depth)?,
        Reflected::List(_) | Reflected::Map(_) => {
            return Err(format!("{}: nested lists", field.full_name()));
        }
    })
}

/// By name where it has one, so that a wrong one is told as in a file.
fn enum_to_json(field: &FieldDescriptor, number: i32) -> Value {
    let prost_reflect::Kind::Enum(names) = field.kind() else {
        return json!(number);
    };
    names
        .get_value(number)
        .map_or_else(|| json!(number), |value| json!(value.name()))
}

fn message_to_json(message: &DynamicMessage, depth: usize) -> Result<Value, String> {
    match message.descriptor().full_name() {
        "google.protobuf.Any" => {
            let any = message
                .transcode_to::<Any>()
                .map_err(|error| error.to_string())?;
            any_to_json(&any, depth)
        }
        name if name.starts_with("google.protobuf.") => Ok(dynamic_to_json(message)),
        _ => fields_to_json(message, depth).map(Value::Object),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{
        discovery::{Response, Unread},
        known, known_cluster, known_discovery, known_listener, known_tls,
    };
    use super::*;
    use crate::resource::{cluster::Cluster, route::TypedConfig};

    fn cluster() -> Value {
        json!({
            "@type": "type.googleapis.com/envoy.config.cluster.v3.Cluster",
            "name": "a",
            "connect_timeout": "0.250s",
            "lb_policy": "RING_HASH",
            "ring_hash_lb_config": { "minimum_ring_size": "7" },
            "circuit_breakers": { "thresholds": [{ "priority": "HIGH", "max_connections": 5 }] },
            "typed_extension_protocol_options": {
                "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                    "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                    "explicit_http_config": { "http2_protocol_options": {} },
                },
            },
            "load_assignment": { "cluster_name": "a", "endpoints": [{ "lb_endpoints": [{
                "endpoint": { "address": { "socket_address": { "address": "127.0.0.1", "port_value": 80 } } },
                "metadata": { "filter_metadata": { "outrigger": { "n": 3, "list": [1.5, "x", true] } } },
            }] }] },
        })
    }

    fn packed(resource: &Value) -> Packed {
        let config = TypedConfig::from_json(resource).unwrap();
        Packed(Any::from(&config))
    }

    /// As it would be taken, or what is wrong.
    fn read(any: Result<Value, ConfigErrors>) -> Result<Cluster, String> {
        let unread = Unread {
            name: String::new(),
            version: String::new(),
            any,
        };
        let response = Response {
            resources: vec![unread],
            ..Response::default()
        };
        let read = response.read::<Cluster>().remove(0).read;
        read.map_err(|errors| errors.to_string())
    }

    #[test]
    fn bytes_mean_what_the_text_means() {
        let packed = packed(&cluster());
        assert_eq!(packed.name(), "a");
        let text = read(Ok(cluster()));
        assert!(text.is_ok(), "{text:?}");
        assert_eq!(read(packed.to_json()), text);
    }

    #[test]
    fn a_field_that_we_left_out_is_known_by_its_number() {
        // A field with this number that holds no bytes.
        let with = |number: u64| {
            let mut packed = packed(&cluster());
            prost::encoding::encode_varint(number << 3 | 2, &mut packed.0.value);
            packed.0.value.push(0);
            read(packed.to_json())
        };
        let refused = with(53).unwrap_err();
        assert_eq!(
            refused,
            "resources[0]: not supported yet: dns_resolution_config"
        );
        assert_eq!(with(25), read(Ok(cluster())), "metadata has no effect");
        assert_eq!(with(5000), read(Ok(cluster())), "nobody knows it");
    }

    #[test]
    fn every_field_that_is_refused_or_ignored_has_a_number() {
        let tables = [
            known::NOT_SUPPORTED,
            known::IGNORED,
            known_cluster::NOT_SUPPORTED,
            known_cluster::IGNORED,
            known_discovery::NOT_SUPPORTED,
            known_discovery::IGNORED,
            known_listener::NOT_SUPPORTED,
            known_listener::IGNORED,
            known_tls::NOT_SUPPORTED,
            known_tls::IGNORED,
        ];
        let numbered: std::collections::HashSet<(&str, &str)> = NAMES
            .iter()
            .map(|((message, _), name)| (*message, *name))
            .collect();
        for (message, fields) in tables.into_iter().flatten() {
            for field in *fields {
                let known = numbered.contains(&(*message, *field));
                assert!(known, "{message}.{field} has no line in numbers.txt");
            }
        }
    }

    #[test]
    fn what_is_no_message_or_nested_without_end_is_an_error() {
        let type_url = packed(&cluster()).0.type_url;
        let garbage = Packed(Any {
            type_url: type_url.clone(),
            value: vec![0xff; 9],
        });
        assert!(
            garbage
                .to_json()
                .unwrap_err()
                .to_string()
                .contains("not a valid")
        );
        assert_eq!(garbage.name(), "");
        let mut torn = packed(&cluster());
        torn.0.value.truncate(torn.0.value.len() - 1);
        assert!(torn.to_json().is_err());
        assert_eq!(torn.name(), "a");
        let options = "typed_extension_protocol_options";
        let mut nested = cluster();
        for _ in 0..ANYS_MAX {
            let mut outer = json!({ "@type": type_url, "name": "a" });
            outer[options] = json!({ "x": nested });
            nested = outer;
        }
        let error = packed(&nested).to_json().unwrap_err().to_string();
        assert!(error.contains("nested too deeply"), "{error}");
    }
}
