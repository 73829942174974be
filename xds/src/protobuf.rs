//! Between protobuf and JSON: descriptors, `Any`, `Struct`, `Duration`.
//!
//! Knows no resource. Follows the protobuf JSON mapping with `snake_case` keys, and Envoy's rule that a `TypedStruct`
//! stands for the type it names.

use crate::{
    problems::ConfigErrors,
    resource::route::TypedConfig,
    wire::{self, udpa::r#type::v1::TypedStruct as OldTypedStruct, xds::r#type::v3::TypedStruct},
};
use prost::{Message, Name};
use prost_reflect::{
    DescriptorPool, DynamicMessage, MessageDescriptor, ReflectMessage, SerializeOptions,
};
use prost_types::{Any, Struct, value::Kind};
use serde_json::{Number, Value};
use std::{sync::LazyLock, time::Duration};

/// What every type URL begins with.
pub(crate) const TYPE_URL_PREFIX: &str = "type.googleapis.com/";

/// Whole numbers up to here survive the double of a `google.protobuf.Value`.
pub(crate) const EXACT_INTEGER_MAX: u64 = 1 << 53;

static POOL: LazyLock<DescriptorPool> = LazyLock::new(|| {
    DescriptorPool::decode(wire::DESCRIPTORS)
        .expect("invariant: the checked-in descriptors are valid")
});

/// The message a type URL (or a bare full name) names, if we transcribed it.
pub(crate) fn descriptor(type_url: &str) -> Option<MessageDescriptor> {
    POOL.get_message_by_name(type_name(type_url))
        .filter(|found| !found.full_name().starts_with("google.protobuf."))
}

/// Full message name in a type URL.
pub(crate) fn type_name(type_url: &str) -> &str {
    type_url.rsplit('/').next().unwrap_or(type_url)
}

/// Whether a type URL names either `TypedStruct`.
pub(crate) fn is_typed_struct(type_url: &str) -> bool {
    let name = type_name(type_url);
    name == TypedStruct::full_name() || name == OldTypedStruct::full_name()
}

/// JSON already known to fit `descriptor`, as a message.
pub(crate) fn from_json(
    descriptor: MessageDescriptor,
    value: &Value,
) -> Result<DynamicMessage, ConfigErrors> {
    DynamicMessage::deserialize(descriptor, value)
        .map_err(|error| ConfigErrors::one("", error.to_string()))
}

/// The plain type that a message in JSON means.
pub(crate) fn plain<W, P>(value: &Value) -> Result<P, ConfigErrors>
where
    W: Message + Name + Default,
    P: TryFrom<W, Error = ConfigErrors>,
{
    let descriptor =
        descriptor(&W::full_name()).expect("invariant: wire types come from the descriptors");
    let wire: W = from_json(descriptor, value)?
        .transcode_to()
        .map_err(|error| ConfigErrors::one("", error.to_string()))?;
    P::try_from(wire)
}

/// A message as protobuf JSON with `snake_case` keys; unset fields are left out.
pub(crate) fn to_json<M: Message + Name>(message: &M) -> Value {
    let descriptor =
        descriptor(&M::full_name()).expect("invariant: wire types come from the descriptors");
    match DynamicMessage::decode(descriptor, message.encode_to_vec().as_slice()) {
        Ok(decoded) => dynamic_to_json(&decoded),
        Err(error) => not_shown(&M::full_name(), &error),
    }
}

pub(crate) fn dynamic_to_json(message: &DynamicMessage) -> Value {
    let options = SerializeOptions::new().use_proto_field_name(true);
    match message.serialize_with_options(serde_json::value::Serializer, &options) {
        Ok(mut json) => {
            whole_numbers(&mut json);
            json
        }
        Err(error) => not_shown(message.descriptor().full_name(), &error),
    }
}

/// Happens only to what no text can say: JSON nested deeper than protobuf's recursion limit.
fn not_shown(message: &str, error: &dyn std::error::Error) -> Value {
    tracing::error!(%error, message, "cannot be shown as JSON");
    metrics::counter!("outrigger_config_not_shown").increment(1);
    Value::Null
}

/// The type behind a `TypedStruct` if we know it; anything else as it is.
fn resolve(any: Any) -> Result<Any, ConfigErrors> {
    if !is_typed_struct(&any.type_url) {
        return Ok(any);
    }
    // Both TypedStructs have the same fields.
    let inner = decode::<TypedStruct>(&any)?;
    let Some(descriptor) = descriptor(&inner.type_url) else {
        return Ok(any);
    };
    let value = struct_to_json(inner.value.unwrap_or_default());
    let value = from_json(descriptor, &value)
        .map_err(|error| at("value", error))?
        .encode_to_vec();
    Ok(Any {
        type_url: inner.type_url,
        value,
    })
}

fn at(place: &str, part: ConfigErrors) -> ConfigErrors {
    let mut moved = ConfigErrors::default();
    moved.absorb(place, part);
    moved
}

fn decode<M: Message + Default>(any: &Any) -> Result<M, ConfigErrors> {
    M::decode(any.value.as_slice()).map_err(|error| {
        ConfigErrors::one(
            "",
            format!("not a valid {}: {error}", type_name(&any.type_url)),
        )
    })
}

/// The message in `any` if it is an `M`; `Ok(None)` if it is something else.
pub(crate) fn unpack<M: Message + Name + Default>(any: &Any) -> Result<Option<M>, ConfigErrors> {
    let any = resolve(any.clone())?;
    if type_name(&any.type_url) == M::full_name() {
        decode(&any).map(Some)
    } else {
        Ok(None)
    }
}

/// A message in an `Any`.
pub(crate) fn pack<M: Message + Name>(message: &M) -> Any {
    Any {
        type_url: format!("{TYPE_URL_PREFIX}{}", M::full_name()),
        value: message.encode_to_vec(),
    }
}

impl TryFrom<Any> for TypedConfig {
    type Error = ConfigErrors;

    fn try_from(any: Any) -> Result<Self, ConfigErrors> {
        let any = resolve(any)?;
        if is_typed_struct(&any.type_url) {
            let inner = decode::<TypedStruct>(&any)?;
            if inner.type_url.is_empty() {
                return Err(ConfigErrors::one("type_url", "must not be empty"));
            }
            return Ok(Self {
                type_url: inner.type_url,
                value: struct_to_json(inner.value.unwrap_or_default()),
            });
        }
        let Some(descriptor) = descriptor(&any.type_url) else {
            return Err(ConfigErrors::one(
                "",
                format!("unknown type: '{}'", any.type_url),
            ));
        };
        let message =
            DynamicMessage::decode(descriptor, any.value.as_slice()).map_err(|error| {
                ConfigErrors::one(
                    "",
                    format!("not a valid {}: {error}", type_name(&any.type_url)),
                )
            })?;
        Ok(Self {
            type_url: any.type_url,
            value: dynamic_to_json(&message),
        })
    }
}

impl TypedConfig {
    /// From the JSON of an `Any` (`@type` and the message's fields) inside another configuration.
    ///
    /// # Errors
    /// The type is unknown, or the value does not fit it.
    pub fn from_json(value: &Value) -> Result<Self, ConfigErrors> {
        let any = POOL
            .get_message_by_name("google.protobuf.Any")
            .expect("invariant: our messages use it");
        from_json(any, value)?
            .transcode_to::<Any>()
            .map_err(|error| ConfigErrors::one("", error.to_string()))?
            .try_into()
    }
}

impl From<&TypedConfig> for Any {
    fn from(config: &TypedConfig) -> Self {
        let typed =
            descriptor(&config.type_url).and_then(|known| from_json(known, &config.value).ok());
        match typed {
            Some(message) => Self {
                type_url: config.type_url.clone(),
                value: message.encode_to_vec(),
            },
            None => pack(&TypedStruct {
                type_url: config.type_url.clone(),
                value: Some(struct_from_json(config.value.clone())),
            }),
        }
    }
}

/// JSON of a `Struct`; whole numbers become integers again.
pub(crate) fn struct_to_json(fields: Struct) -> Value {
    Value::Object(
        fields
            .fields
            .into_iter()
            .map(|(key, value)| (key, value_to_json(value)))
            .collect(),
    )
}

fn value_to_json(value: prost_types::Value) -> Value {
    match value.kind {
        None | Some(Kind::NullValue(_)) => Value::Null,
        Some(Kind::NumberValue(number)) => number_to_json(number),
        Some(Kind::StringValue(text)) => Value::String(text),
        Some(Kind::BoolValue(truth)) => Value::Bool(truth),
        Some(Kind::StructValue(fields)) => struct_to_json(fields),
        Some(Kind::ListValue(list)) => {
            Value::Array(list.values.into_iter().map(value_to_json).collect())
        }
    }
}

#[expect(clippy::cast_possible_truncation, reason = "the range is checked")]
fn number_to_json(number: f64) -> Value {
    if number.fract() == 0.0 && number.abs() <= EXACT_INTEGER_MAX as f64 {
        Value::Number(Number::from(number as i64))
    } else {
        Number::from_f64(number).map_or(Value::Null, Value::Number)
    }
}

/// A JSON object as a `Struct`; anything but an object is an empty one.
pub(crate) fn struct_from_json(value: Value) -> Struct {
    let Value::Object(fields) = value else {
        return Struct::default();
    };
    Struct {
        fields: fields
            .into_iter()
            .map(|(key, value)| (key, value_from_json(value)))
            .collect(),
    }
}

fn value_from_json(value: Value) -> prost_types::Value {
    let kind = match value {
        Value::Null => Kind::NullValue(0),
        Value::Bool(truth) => Kind::BoolValue(truth),
        Value::Number(number) => Kind::NumberValue(number.as_f64().unwrap_or(f64::NAN)),
        Value::String(text) => Kind::StringValue(text),
        Value::Array(list) => Kind::ListValue(prost_types::ListValue {
            values: list.into_iter().map(value_from_json).collect(),
        }),
        Value::Object(_) => Kind::StructValue(struct_from_json(value)),
    };
    prost_types::Value { kind: Some(kind) }
}

/// Doubles that are whole become integers, everywhere below.
fn whole_numbers(value: &mut Value) {
    match value {
        Value::Number(number) if number.is_f64() => {
            if let Some(double) = number.as_f64() {
                *value = number_to_json(double);
            }
        }
        Value::Array(list) => list.iter_mut().for_each(whole_numbers),
        Value::Object(fields) => fields.values_mut().for_each(whole_numbers),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// A duration that is not negative.
pub(crate) fn duration(wire: prost_types::Duration) -> Result<Duration, ConfigErrors> {
    Duration::try_from(wire).map_err(|_| ConfigErrors::one("", "must not be negative"))
}

/// A duration as protobuf has it.
pub(crate) fn to_duration(duration: Duration) -> prost_types::Duration {
    // Fails only beyond 292 billion years, which reading a configuration cannot produce.
    prost_types::Duration::try_from(duration).unwrap_or(prost_types::Duration {
        seconds: i64::MAX,
        nanos: 0,
    })
}
