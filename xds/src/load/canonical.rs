//! The same bytes for the same message, always and everywhere: fields by number, maps by key, and so within every `Any`.
//!
//! Protobuf leaves the order of a map open, and encoders make use of it. Versions of resources are made of their bytes, and
//! must not change when nothing else does.

use crate::protobuf::descriptor;
use prost::{
    Message,
    encoding::{WireType, encode_key, encode_varint},
};
use prost_reflect::{DynamicMessage, FieldDescriptor, Kind, MapKey, ReflectMessage, Value};
use prost_types::Any;
use std::collections::{BTreeMap, HashMap};

/// A message that has no unknown fields, such as one that was read from JSON.
///
/// # Errors
/// An `Any` in it does not hold what it says.
pub(super) fn bytes(message: &DynamicMessage) -> Result<Vec<u8>, String> {
    if message.descriptor().full_name() == "google.protobuf.Any" {
        let any = message.transcode_to::<Any>();
        return of_any(any.map_err(|error| error.to_string())?);
    }
    let fields = message
        .fields()
        .map(|(field, value)| (field.number(), (field, value)));
    let mut written = Vec::new();
    for (field, value) in fields.collect::<BTreeMap<_, _>>().into_values() {
        write_field(&field, value, &mut written)?;
    }
    Ok(written)
}

/// What is of a type of nobody's stays as it is.
fn of_any(mut any: Any) -> Result<Vec<u8>, String> {
    if let Some(known) = descriptor(&any.type_url) {
        let message = DynamicMessage::decode(known, &*any.value)
            .map_err(|error| format!("not a valid {}: {error}", any.type_url))?;
        any.value = bytes(&message)?;
    }
    Ok(any.encode_to_vec())
}

fn write_field(field: &FieldDescriptor, value: &Value, out: &mut Vec<u8>) -> Result<(), String> {
    match value {
        Value::Message(message) => write_inner(field.number(), &bytes(message)?, out),
        Value::List(list) if matches!(field.kind(), Kind::Message(_)) => {
            for value in list {
                write_field(field, value, out)?;
            }
        }
        Value::Map(entries) => write_map(field, entries, out)?,
        value => write_plain(field, value.clone(), out),
    }
    Ok(())
}

fn write_map(
    field: &FieldDescriptor,
    entries: &HashMap<MapKey, Value>,
    out: &mut Vec<u8>,
) -> Result<(), String> {
    let Kind::Message(entry) = field.kind() else {
        return Err(format!("{}: no map", field.full_name()));
    };
    for (key, value) in entries.iter().collect::<BTreeMap<_, _>>() {
        let mut inner = Vec::new();
        write_plain(&entry.map_entry_key_field(), key.clone().into(), &mut inner);
        write_field(&entry.map_entry_value_field(), value, &mut inner)?;
        write_inner(field.number(), &inner, out);
    }
    Ok(())
}

fn write_inner(number: u32, inner: &[u8], out: &mut Vec<u8>) {
    encode_key(number, WireType::LengthDelimited, out);
    encode_varint(inner.len() as u64, out);
    out.extend_from_slice(inner);
}

/// A field without messages in it, as a message of that field alone: messages in a row are one message.
fn write_plain(field: &FieldDescriptor, value: Value, out: &mut Vec<u8>) {
    let mut alone = DynamicMessage::new(field.parent_message().clone());
    alone.set_field(field, value);
    out.extend(alone.encode_to_vec());
}
